"""Exceptions whose message is written for the user."""


class InputError(ValueError):
    """The user's input cannot be used.

    The message names the argument or file, what was wrong and what was expected. Commands print it without a
    traceback and exit with status 2; in Python it is an ordinary `ValueError`.
    """


class StorageError(InputError, OSError):
    """A file or folder cannot be written: the disk is full or read-only, or permission is missing."""


class BusyError(InputError):
    """Another process writes to the folder; the message names it."""


class NotAvailable(InputError):
    """Something that is compared cannot run here; the message says why."""


class RenamedWarning(FutureWarning):
    """An option or a key has the name of an earlier release; the message gives the new one."""


def reason_of(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class SharedError(InputError):
    """An error that every process of a job raises; commands print it on rank 0 alone."""

    on_every_rank = True


class LostRank(InputError):
    """A process of the job has ended without a word. Its message is empty where another rank has told it.

    Attributes:
        rank: the lost one.
    """

    def __init__(self, rank: int | None, message: str) -> None:
        super().__init__(message)
        self.rank = rank
