"""The exceptions that users are meant to see, and the exit status of the programs that end with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: one message that names the file, line, key or weight, what was found, what was wanted, the way out.

    Programs print the message and exit with :attr:`status`; a traceback is shown with ``--debug`` only.
    """

    status = 1


class UsageError(UserError):
    """The command line or the config is wrong in itself, whatever lies on the disk and whatever the machine is."""

    status = 2


def explain(error: UserError | OSError) -> tuple[int, str]:
    """Exit status and message of a program that ends with this error."""
    if isinstance(error, UserError):
        return error.status, str(error)
    where = f"{error.filename}: " if error.filename else ""
    return 1, f"{where}{error.strerror or error}"


def listed(problems: Sequence[str], most: int = 5) -> str:
    """The first problems on one line, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the key before the message of a :class:`UserError` or an ``OSError`` that is raised inside."""
    try:
        yield
    except UserError as error:
        told = type(error)(f"{key}: {error}")
        told.__dict__.update(error.__dict__)
        raise told from None
    except OSError as error:
        raise UserError(f"{key}: {explain(error)[1]}") from None
