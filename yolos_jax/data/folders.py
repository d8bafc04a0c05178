"""Folders of data: on a file system, or in a bucket (gs:// or s3://)."""

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from yolos_jax import bucket, file_names, files
from yolos_jax.bucket import Bucket
from yolos_jax.data.record_ranges import RecordRanges
from yolos_jax.errors import InputError

YOLO_FILES = (
    '.yaml',
    '.yml',
    '.data',
)  # of the file that describes a data set in YOLO's form, and may be named for it


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a file system. Names are relative paths of files in it, with / between folders.

    upright: whether boxes refer to its photographs turned upright by EXIF, and not to the stored pixels.
    """

    path: Path
    upright: bool = False

    def __str__(self) -> str:
        return str(self.path)

    def inside(self, name: str) -> 'Folder':
        """A folder in this one."""
        return Folder(self.path / name)

    def glob(self, pattern: str) -> list[str]:
        """The names that fit a pattern, sorted; hidden files do not count (macOS's ._ files)."""
        names = (path.relative_to(self.path).as_posix() for path in self.path.glob(pattern))
        return sorted(name for name in names if not file_names.is_hidden(name))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return os.path.isfile(self.path / name)  # False for a name that is too long, too

    def copies(self, names: Iterable[str]) -> Path:  # noqa: ARG002  the interface of BucketFolder
        """A folder on a file system with the files of these names: this one."""
        return self.path

    def local(self, name: str) -> Path:
        """The path of a file on a file system."""
        return self.path / name

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """{name: a text that changes with the file's content}, from its size and time."""
        stats = {name: (self.path / name).stat() for name in names}
        return {name: f'{stat.st_size} {stat.st_mtime_ns}' for name, stat in stats.items()}

    def name(self, file: str) -> str:
        """The name of an image in messages."""
        return str(self.path / file)

    def start_read(self, file: str, row: int) -> Callable[[], bytes]:  # noqa: ARG002  as array_records.Split
        """A function that returns the bytes of a file, or raises InputError if it cannot be read."""
        return functools.partial(self._read, file)

    def _read(self, file: str) -> bytes:
        name = os.path.join(self.path, file)
        try:
            with open(name, 'rb', buffering=0, opener=files.without_waiting) as stream:
                return stream.read() or b''
        except OSError as error:
            raise InputError(f'{self.path / file}: {error.strerror}') from None

    def missing(self, names: np.ndarray) -> list[str]:
        """The names of files that do not exist; their folders are listed, no file is opened."""
        parents = sorted({os.path.dirname(name) for name in names.tolist()})
        listed = (os.path.join(parent, name) for parent in parents for name in self._listed(parent))
        present = np.fromiter(map(hash, listed), np.int64)  # a tenth of the memory of the names
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        present.sort()
        absent = np.searchsorted(present, wanted) == np.searchsorted(present, wanted, 'right')
        return [str(name) for name in names[absent] if not os.path.exists(self.path / name)]

    def _listed(self, inside: str) -> list[str]:
        try:
            return os.listdir(self.path / inside)
        except OSError:
            return []

    def prefix(self, root: str | Path) -> str | None:
        """The prefix that makes this folder's file names relative to `root`; None if it is not inside."""
        inside = os.path.relpath(self.path, root)
        if inside == '.':
            return ''
        return None if inside.startswith('..') else f'{inside}/'

    def folders(self) -> list[str]:
        """The names of the folders in this one."""
        return sorted(path.name for path in self.path.iterdir() if path.is_dir())

    def walk(self, inside: str = '') -> Iterator[str]:
        """The names of all files below."""
        try:
            with os.scandir(self.path / inside) as entries:
                folders = {entry.name: entry.is_dir() for entry in entries}
        except OSError as error:  # a link to itself, or no right to read
            raise InputError(f'{self.path / inside}: cannot be listed ({error.strerror})', 'data') from None
        for name, is_folder in folders.items():
            if is_folder:
                yield from self.walk(f'{inside}{name}/')
            else:
                yield inside + name


@dataclasses.dataclass(frozen=True)
class BucketFolder:
    """A folder in a bucket, with the interface of `Folder`.

    names: of all objects in `bucket`, which is listed once. base: the folder, as the prefix of its objects'
    names.
    """

    bucket: Bucket
    names: frozenset[str]
    base: str = ''
    upright: ClassVar[bool] = False

    def __str__(self) -> str:
        return f'{self.bucket.url}/{self.base}'.rstrip('/')

    def inside(self, name: str) -> 'BucketFolder':
        """A folder in this one."""
        return dataclasses.replace(self, base=self._object(f'{name}/') if name else self.base)

    def glob(self, pattern: str) -> list[str]:
        """The names that fit a pattern, sorted; hidden files do not count."""
        depth, is_hidden = pattern.count('/'), file_names.is_hidden
        names = (name for name in self.walk() if name.count('/') == depth and not is_hidden(name))
        return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))

    def has(self, name: str) -> bool:
        """Whether there is an object of this name."""
        return self._object(name) in self.names

    def copies(self, names: Iterable[str]) -> Path:
        """A folder on a file system with copies of the objects of these names."""
        return self.bucket.copy(map(self._object, names), files.cache()) / self.base

    def local(self, name: str) -> Path:
        """The path of a copy of an object on a file system."""
        return self.copies([name]) / name

    def records(self, names: Iterable[str]) -> RecordRanges:
        """The records of some array_record files; raises InputError if they are no such files."""
        return RecordRanges(self.bucket, [*map(self._object, names)])

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """{name: a text that changes with the object's content}."""
        versions = self.bucket.versions(map(self._object, names))
        return {name: version.hex() for name, version in versions.items()}

    def name(self, file: str) -> str:
        """The name of an image in messages."""
        return f'{self.bucket.url}/{self._object(file)}'

    def start_read(self, file: str, row: int) -> Callable[[], bytes]:  # noqa: ARG002  as array_records.Split
        """Request an object; returns a function that waits for its bytes, or raises InputError."""
        return self.bucket.start_read(self._object(file)).result

    def prefix(self, root: str | Path) -> str:  # noqa: ARG002  as `Folder`
        """The prefix of this folder's objects relative to the folder that was opened."""
        return self.base

    def folders(self) -> list[str]:
        """The names of the folders in this one."""
        return sorted({name.partition('/')[0] for name in self.walk() if '/' in name})

    def walk(self) -> Iterator[str]:
        """The names of all objects below."""
        return (name.removeprefix(self.base) for name in self.names if name.startswith(self.base))

    def missing(self, names: np.ndarray) -> list[str]:
        """The names of objects that do not exist."""
        return [name for name in names.tolist() if not self.has(name)]

    def _object(self, name: str) -> str:
        return os.path.normpath(f'{self.base}{name}') + '/' * name.endswith('/')


def open_folder(root: str | Path, argument: str | None = 'data') -> Folder | BucketFolder:
    """Open a folder by path or URL; one in a bucket is listed. argument: the one that names it, for errors.

    Raises:
        InputError: there is no such folder.
    """
    if bucket.is_url(root):
        store = Bucket(root)
        if names := frozenset(store.names()):
            return BucketFolder(store, names)
    elif os.path.isdir(root) or Path(root).suffix in YOLO_FILES and os.path.isfile(root):
        return Folder(Path(root))
    elif os.path.exists(root):
        raise InputError(f'{root}: a file; name the data folder that it is in', argument)
    raise InputError(f'{root}: no such data folder', argument)
