"""The one exception type that users are meant to see."""


class UserError(Exception):
    """Bad input: one message that names the file, line, key or weight, what was found, what was wanted, the way out.

    Programs print the message and exit 1 (2 for bad arguments); a traceback is shown with ``--debug`` only.
    """
