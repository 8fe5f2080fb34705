"""The one exception a user meets."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be worked with.

    The message is one line that says what is wrong, where, and how to mend it. The command line
    prints it without a traceback and exits with code 2.
    """
