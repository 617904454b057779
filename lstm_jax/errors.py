"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one line that names what is wrong and what to do. Commands print it on standard
    error and exit with code 2; it never reaches a user as a traceback.
    """
