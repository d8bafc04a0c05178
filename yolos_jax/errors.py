"""The one error for what a user gives us."""


class InputError(ValueError):
    """A file, folder, key or value cannot be used; the message names it and says what to do."""
