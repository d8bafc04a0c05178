"""Files and folders: atomic writing, checks before it, hashes, reads at an offset."""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from yolos_jax.errors import InputError, StorageError

DAY = 24 * 3600  # seconds


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends without an error.

    Raises:
        StorageError: it cannot be written.
    """
    path = Path(path)
    _remove_parts(path.parent)
    name = hashlib.sha1(path.name.encode(errors='surrogateescape')).hexdigest()[:12]  # names may be long
    name += secrets.token_hex(4)  # several threads may write one file
    part = path.with_name(f'.{name}.{_host()}-{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename not in (None, str(part), *map(str, path.parents)):
            raise  # about another file, which the block uses
        raise StorageError(f'{path}: cannot be written ({error.strerror or error})') from None
    finally:
        with contextlib.suppress(OSError):  # there may be no such folder
            part.unlink()


@functools.cache
def _host() -> str:
    """The name of this host and, on Linux, of its processes: containers may share the host's name."""
    namespace = Path('/proc/self/ns/pid')
    number = f'-{namespace.stat().st_ino}' if namespace.exists() else ''
    return socket.gethostname()[:60] + number


@functools.cache  # once in a process
def _remove_parts(folder: Path) -> None:
    """Remove what processes of this host that were killed have left in a folder."""
    with contextlib.suppress(OSError):
        for part in folder.glob(f'.*.{glob.escape(_host())}-*.part'):
            if not is_running(part.stem.rpartition('-')[2]):
                part.unlink()


def is_running(process: str) -> bool:
    """Whether there is a process of this id on this machine."""
    try:
        os.kill(int(process), 0)  # macOS has no /proc
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):  # no id: not ours; another user's process
        return True
    return True


def cache() -> Path:
    """The folder of downloaded files; those from Hugging Face are in its own cache."""
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'yolos_jax'
    except RuntimeError:  # a user without an entry in passwd, as in containers
        raise InputError('this user has no home folder; set XDG_CACHE_HOME') from None


def walk(root: Path) -> Iterator[str]:
    """The names of all files below a folder; links are followed, but no folder is visited twice."""
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner.clear()
            continue
        seen.add(real)
        # of several paths to one folder, the folder itself comes before links, on every file system
        inner.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)


def prune(folder: Path, most: int) -> None:
    """Remove the least recently modified folders in `folder` until the others hold at most `most` bytes.

    Folders modified during the last day stay: they may be in use.
    """
    with contextlib.suppress(FileNotFoundError):  # another process removes some; the next call goes on
        ages = {inner: time.time() - inner.stat().st_mtime for inner in folder.iterdir() if inner.is_dir()}
        kept = 0
        for inner in sorted(ages, key=ages.get):
            kept += sum(path.stat().st_size for path in inner.rglob('*') if path.is_file())
            if kept > most and ages[inner] > DAY:
                shutil.rmtree(inner, ignore_errors=True)


def write(path: str | Path, content: bytes) -> None:
    """Write a whole file, as `replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON to `path`."""
    write(path, json.dumps(content).encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises InputError if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}: damaged ({error}); remove it, and it is written again') from None
    if not isinstance(content, dict):
        raise InputError(f'{path}: damaged (not a JSON object); remove it, and it is written again')
    return content


def check_file(path: Path, argument: str, suffix: str) -> None:
    """Raises InputError if a file cannot be written, or has another suffix than `suffix`.

    argument: the name of the argument, for errors.
    """
    if os.path.isdir(path):
        raise InputError(f'{path}: is a folder; name a file in it', argument)
    check_folder(path.parent, argument)
    if path.suffix != suffix:
        raise InputError(f'{path}: does not end in {suffix}; choose another name', argument)


def check_folder(folder: Path, argument: str = 'output') -> None:
    """Raises InputError if files cannot be written to a folder, which need not exist yet."""
    check_local(folder, argument)
    folder = folder.absolute()
    # Path.exists raises PermissionError in a folder that may not be searched
    place = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not os.path.isdir(place):
        raise InputError(f'{folder}: cannot be written to: {place} is a file', argument)
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f'{folder}: cannot be written to: {place} is read-only for this user', argument)


def check_local(path: str | Path, argument: str = 'output') -> None:
    """Raises InputError if a path is a URL, of the web or of a bucket, perhaps misspelt: S3://, gcs://."""
    if re.match(r'\w+:/', str(path)):
        raise InputError(
            f'{path}: not a local path; a bucket is gs:// or s3://, where one is taken', argument
        )


def why_not(folder: Path, error: OSError) -> str:
    """Why a folder cannot be made: what the system says, or that its path is a link to nothing."""
    is_broken = os.path.islink(folder) and not os.path.exists(folder)
    return 'a link to nothing' if is_broken else error.strerror or str(error)


def check_free(folder: str | Path) -> None:
    """Raises InputError if `folder` exists already, unless it is an empty folder."""
    check_local(folder)
    folder = Path(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InputError(f'{folder}: exists and is not empty; choose another output', 'output')


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes that name when the block ends without an error.

    Raises:
        InputError: `folder` exists and is not empty, or it cannot be written.
    """
    check_free(folder)
    folder = Path(folder).resolve()  # a link to an empty folder stays one
    if os.path.ismount(folder):
        raise InputError(f'{folder}: a disk is mounted there; name a folder in it', 'output')
    prefix = f'.{folder.name}-{_host()}-'  # then the process and something random
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_left(folder.parent, prefix)
        part = folder.parent / f'{prefix}{os.getpid()}-{secrets.token_hex(4)}'
        part.mkdir()
    except OSError as error:
        raise InputError(f'{folder}: cannot write there ({error.strerror})') from None
    try:
        yield part
        os.replace(part, folder)
    except StorageError as error:
        raise StorageError(str(error).replace(str(part), str(folder))) from None
    except OSError as error:
        raise InputError(f'{folder}: cannot write there ({error.strerror})') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders in `parent` that are named `prefix` and a process id, if that process is gone."""
    for left in parent.glob(f'{glob.escape(prefix)}*'):
        if not is_running(left.name.removeprefix(prefix).partition('-')[0]):
            shutil.rmtree(left, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that does not wait where a pipe is that nothing writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_at(file: BinaryIO, start: int, size: int) -> np.ndarray:
    """`size` bytes of an open file from `start` on, uint8 [size]; the file's position does not change.

    Raises:
        InputError: it cannot be read, or is too short.
    """
    data = np.empty(size, np.uint8)
    filled = 0
    while filled < size:
        try:
            count = os.preadv(file.fileno(), [data[filled:]], start + filled)
        except OSError as error:
            raise InputError(f'{file.name}: {error.strerror}') from None
        if not count:
            raise InputError(f'{file.name}: ends before its data does')
        filled += count
    return data
