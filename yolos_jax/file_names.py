"""Names of files: free ones for output, hidden ones, and those that are not UTF-8."""

import itertools
import os
from collections.abc import Container, Iterable
from pathlib import Path

LONGEST_STEM = 230  # bytes of a file name, of the 255 that file systems allow


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8, so that weights, checkpoints and JSON can have it."""
    return not any('\udc80' <= character <= '\udcff' for character in name)  # these stand for other bytes


def is_hidden(name: str) -> bool:
    """Whether a file, by its name in a folder, is hidden or lies in a hidden folder."""
    return any(part.startswith('.') for part in name.split('/'))


def free(stem: str, taken: Container[str]) -> str:
    """A name without its suffix, numbered if it is taken, and cut if it leaves no room for a suffix.

    taken: names by `str.casefold`, since on many disks, such as macOS's, Cat.jpg is cat.jpg.
    """
    stem = os.fsencode(stem).decode(errors='replace')  # the names in a bucket are UTF-8
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    numbered = (f'{stem}-{number}' for number in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if name.casefold() not in taken)


def for_output(paths: Iterable[Path]) -> dict[Path, str]:
    """{file: name for its output}: the file's own name, numbered if several share it."""
    names, taken = {}, set()
    for path in dict.fromkeys(paths):
        names[path] = free(path.stem, taken)
        taken.add(names[path].casefold())
    return names
