"""Exceptions for users, and the exit status of a program that ends with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. One message names the file, line, key or weight, what was found, what was wanted, and the way out.

    Programs print the message and exit with :attr:`status`; only ``--debug`` shows a traceback.
    """

    status = 1


class UsageError(UserError):
    """A command line or config that is wrong in itself, whatever the disk holds and whatever the machine is."""

    status = 2


def explain(error: UserError | OSError) -> tuple[int, str]:
    """Return the exit status and the message of a program that ends with this error."""
    if isinstance(error, UserError):
        return error.status, str(error)
    where = f"{error.filename}: " if error.filename else ""
    return 1, f"{where}{error.strerror or error}"


def listed(problems: Sequence[str], most: int = 5) -> str:
    """Return the first problems on one line, and the number of further ones."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def some(names: Iterable[object], most: int = 4) -> str:
    """Return the first names, and the number of all if there are more; ``nothing`` without any."""
    told = [str(name) for name in names]
    return ", ".join(told[:most]) + (f", … ({len(told)})" if len(told) > most else "") or "nothing"


def reason(error: BaseException) -> str:
    """Return the first line of another package's error, or the error's kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the key before the message of a :class:`UserError` or ``OSError`` that is raised inside."""
    try:
        yield
    except UserError as error:
        told = type(error)(f"{key}: {error}")
        told.__dict__.update(error.__dict__)
        raise told from None
    except OSError as error:
        raise UserError(f"{key}: {explain(error)[1]}") from None
