"""The exceptions that are meant for people rather than for a traceback."""


class InputError(ValueError):
    """Something given by the user cannot be used.

    Its message names the argument or file, says what was wrong and what was expected. Commands print it
    on one line and exit with status 2; in Python it is an ordinary `ValueError`.
    """


class StorageError(InputError, OSError):
    """A file or folder cannot be written: the disk is full or read-only, or permission is missing.

    An `OSError` too, for callers that handle those.
    """


class RenamedWarning(FutureWarning):
    """An option or a key is given by a name of an earlier release; the new one is named."""


def reason_of(error: Exception) -> str:
    """The first line of what an exception says; its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
