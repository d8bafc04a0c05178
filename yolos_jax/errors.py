"""Errors with a message for the user: unusable input, unreachable storage, diverged runs."""

from collections.abc import Iterable


def shown(names: Iterable, most: int = 5) -> str:
    """The first few of some names or numbers, for a message."""
    names = [str(name) for name in names]
    return ', '.join(names[:most]) + (', ...' if len(names) > most else '')


class InputError(ValueError):
    """A file, folder or value cannot be used; the message names it and says what to do.

    Control characters in the message are escaped, so that it is one line of plain text.
    argument: the name of the argument at fault, if any; a script adds the flag that sets it.
    """

    exit_status = 1

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))
        self.argument = argument
        if argument:
            self.add_note(f'argument to change: {argument}')  # scripts name the flag instead


class StorageError(InputError):
    """A storage does not answer or refuses a request; the file asked for may be fine."""


class DivergedError(InputError):
    """The loss of a run is no longer finite; a restart would end the same way."""

    exit_status = 3
