"""The one error for what a user gives us."""


class InputError(ValueError):
    """A file, folder or value cannot be used; the message names it and says what to do.

    argument: the name of the argument at fault, where one is; a script adds the flag that sets it.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument
