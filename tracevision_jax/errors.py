"""The exception that means "the user can fix this": commands print its message and exit with status 2."""


class UserError(Exception):
    """A mistake in the user's input: the message says what is wrong, where, and what to do."""


class Stuck(UserError):
    """A thread of this process hangs in the system, so that the process cannot end in the ordinary way: commands leave
    at once after printing the message."""
