"""Opens and locks a run's folder, on a disk or in a bucket: one run at a time."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from yolos_jax import bucket, files
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run import cluster, lease
from yolos_jax.run.lease import LOCK
from yolos_jax.run.mirror import Mirror
from yolos_jax.run.run_files import PROGRAMS


class Workdir(NamedTuple):
    """A folder that is locked for this run."""

    name: str  # as the user gave it: a path, or the URL of a folder in a bucket
    folder: Path  # where it is, or its local copy
    mirror: Mirror | None  # keeps the bucket equal to the copy
    handle: int | None  # the open folder, if it is on a disk, in the process that locked it

    def check(self) -> None:
        """Raises InputError if the folder was removed or replaced while this run used it."""
        if self.handle is None:
            return
        try:
            is_ours = os.path.samestat(os.fstat(self.handle), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            is_ours = False
        except OSError:  # of the network, perhaps; what is written next will tell
            return
        if not is_ours:
            raise InputError(f'{self.folder}: was removed or replaced while this run used it')


@contextlib.contextmanager
def opened(location: str | Path, *, removes: bool = False) -> Iterator[Workdir]:
    """The folder at a path or URL, made and locked; the lock ends with the process, however that ends.

    In a cluster, process 0 locks the folder and writes to it. A folder in a bucket is copied to `own_copy`,
    without the arrays of its checkpoints, and the copy is removed at the end.

    removes: whether files that are gone from the copy at the end are removed from the bucket.

    Raises:
        InputError: it cannot be written to, or another run is using it.
        StorageError: what was written last could not be uploaded; the message names the copy, which stays.
    """
    if not bucket.is_url(location):
        files.check_local(location, 'output' if removes else 'workdir')
        with locked(Path(location).absolute()) as handle:
            work = Workdir(str(location), Path(location).absolute(), None, handle)
            work.check()
            yield work
        return
    place, folder = bucket.Bucket(location), own_copy(location)
    with contextlib.ExitStack() as stack:
        held = lease.Lease(place) if cluster.is_first() else None
        if held:
            stack.callback(held.release)
        cluster.barrier('lock')
        mirror = Mirror(place, folder, programs_folder(location), held)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mirror.pull()
        try:
            yield Workdir(place.url, folder, mirror, None)
        except BaseException as error:
            if cluster.is_first():
                try:
                    push_last(mirror)
                except InputError as problem:
                    print(problem, file=sys.stderr)  # the first error is the one to raise
            if isinstance(error, InputError):
                raise type(error)(str(error).replace(str(folder), place.url), error.argument) from error
            raise
        if cluster.is_first():
            push_last(mirror, removes=removes)


def push_last(mirror: Mirror, *, removes: bool = False) -> None:
    """Upload what has changed; where the bucket does not answer, the copy stays under another name.

    Raises:
        InputError: the bucket belongs to another run now.
        StorageError: it could not be uploaded; the message names the folder that has it.
    """
    try:
        mirror.push(removes=removes)
    except StorageError as error:
        kept = mirror.folder.with_name(f'kept-{time.time_ns()}')  # the next start removes process-...
        os.rename(mirror.folder, kept)
        raise StorageError(f'{error}; what was not uploaded is in {kept}') from None


def own_copy(url: str) -> Path:
    """The folder of this process for its copy; those of processes that were killed are removed."""
    copies = local_copy(url)
    files.remove_left(copies, 'process-')
    return copies / f'process-{os.getpid()}'  # a hanging process whose lock was taken over has another


def local_copy(url: str) -> Path:
    """The folder on a host for copies of a folder in a bucket while a run uses it, one for each process.

    Its name contains the host's, since hosts may share their temporary folder, and process ids repeat. The
    folder around it is made, for this user alone: others could put programs in it.

    Raises:
        InputError: that folder is another user's.
    """
    own = Path(tempfile.gettempdir()) / f'yolos_jax-{os.getuid()}'
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    if own.lstat().st_uid != os.getuid():
        raise InputError(
            f'{own}: belongs to another user; name another folder for temporary files (TMPDIR)'
        )
    name = hashlib.sha256(bucket.Bucket(url).url.encode()).hexdigest()[:16]
    return own / f'{name}-{socket.gethostname()}'


def programs_folder(location: str | Path) -> Path:
    """Where the compiled programs of a run are kept on this host."""
    return (local_copy(location) if bucket.is_url(location) else Path(location).absolute()) / PROGRAMS


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """Make and lock a run's folder; gives the open folder. The lock ends with the process.

    In a cluster, process 0 does this for all; the others get None.

    Raises:
        InputError: it cannot be written to, or another run is using it.
    """
    if not cluster.is_first():
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path / LOCK, 'a+'))
            # while it is open, no other folder gets its inode
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise InputError(f'{path}: in use by another run ({lock.read().strip()})') from None
            lock.truncate(0)
            os.write(lock.fileno(), f'process {os.getpid()} on {socket.gethostname()}'.encode())
        except OSError as error:
            raise InputError(f'{path}: cannot write to it ({files.why_not(path, error)})') from None
        yield handle


def owner(workdir: Workdir) -> str | None:
    """The owner of the lock on a run's folder; for a folder without a lock file, its name."""
    lock = workdir.folder / LOCK
    return lock.read_text() if lock.exists() else workdir.name
