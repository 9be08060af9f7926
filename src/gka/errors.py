"""The one exception that is meant for people rather than for a traceback."""


class InputError(ValueError):
    """Something given by the user cannot be used.

    Its message names the argument or file, says what was wrong and what was expected. Commands print it
    on one line and exit with status 2; in Python it is an ordinary `ValueError`.
    """
