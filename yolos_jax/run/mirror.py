"""Keeps a run's folder in a bucket equal to the local copy that the run works in.

A bucket has no appends and no renames, so a run writes to a local folder, and changed files are uploaded
whole: after every checkpoint, and once a minute. A checkpoint's `meta` is uploaded last and removed first:
a step without it is not listed.
"""

import concurrent.futures
import contextlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from yolos_jax.bucket import COMMITTED, Bucket
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run.lease import LOCK, Lease
from yolos_jax.run.run_files import CONFIG, PROGRAMS
from yolos_jax.weights.checkpoint import FOLDER, STATE

STEP = re.compile(rf'{FOLDER}/(\d+|broken-[\w-]+)/(.+)')
EVERY = 60  # seconds between two pushes of metrics


class Mirror:
    """A run's folder in a bucket and its local copy: `pull` fills it, `push` writes back what changed."""

    def __init__(self, bucket: Bucket, folder: Path, programs: Path, lease: Lease | None) -> None:
        """programs: the local folder of compiled programs; lease: held by the process that writes."""
        self.bucket, self.folder, self._programs, self._lease = bucket, folder, programs, lease
        self._stamps: dict[str, tuple] = {}  # of the files that equal their object in the bucket
        self._removed: set[str] = set()  # steps, until a push removes them from the bucket
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pushing: concurrent.futures.Future | None = None
        self._pushed = time.monotonic()

    def pull(self) -> None:
        """Make the local folder equal to the bucket, but without the arrays of checkpoints (`fetch`)."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        names = self.bucket.names()
        steps = {match[1] for name in names if (match := STEP.fullmatch(name))}
        whole = {step for step in steps if f'{FOLDER}/{step}/{COMMITTED}' in names and step.isdecimal()}
        self._removed = {step for step in steps - whole if step.isdecimal()}  # incomplete
        kept = [name for name in names if name != LOCK and not self._is_unfetched(name, whole)]
        self.bucket.download({name: self._path(name) for name in kept if not self._path(name).exists()})
        for step in whole:
            (self.folder / FOLDER / step / STATE).mkdir(parents=True, exist_ok=True)
        self._stamps = {name: _stamp(self._path(name)) for name in kept}

    def _is_unfetched(self, name: str, whole: set[str]) -> bool:
        match = STEP.fullmatch(name)
        return bool(match) and (match[1] not in whole or match[2].startswith(f'{STATE}/'))

    def fetch(self, step: Path) -> None:
        """Download the arrays of a step to its local folder, unless they are there."""
        if not any((step / STATE).iterdir()):
            names = self.bucket.names(f'{FOLDER}/{step.name}/{STATE}/')
            self.bucket.download({name: self._path(name) for name in names})
            self._stamps |= {name: _stamp(self._path(name)) for name in names}

    def remove(self, step: str) -> None:
        """Note that a step was removed: with the next push it is removed from the bucket too.

        What else is gone from the local folder stays there: what cleans /tmp may have removed it.
        """
        self._removed.add(step)

    def start_push(self, after: Callable[[], None] = lambda: None) -> None:
        """Push in a thread, once `after` has returned; waits for a push in progress first."""
        self.finish_push()
        self._pushing = self._pool.submit(self._push_now, after)

    def push_now_and_then(self, every: float = EVERY) -> None:
        """Push in a thread if no push is under way and the last one was over `every` seconds ago.

        A failed push is retried by the next one: a run does not end because an upload of metrics failed.
        """
        if (self._pushing is None or self._pushing.done()) and time.monotonic() - self._pushed > every:
            if self._pushing and isinstance(self._pushing.exception(), StorageError):
                return  # of a checkpoint: the next save raises it, once its own step is on the disk
            self.finish_push()  # another run's lock, say
            self._pushing = self._pool.submit(self._try_push)

    def _try_push(self) -> None:
        with contextlib.suppress(InputError):
            self._push_now()

    def finish_push(self) -> None:
        """Wait for the push under way; raises what it raised."""
        push, self._pushing = self._pushing, None
        if push:
            push.result()

    def push(self, *, removes: bool = False) -> None:
        """Make the bucket equal to the local folder.

        removes: whether files that are gone from the folder are removed, but for steps. Those of a run are
            not, as for `remove`.

        Raises:
            InputError: the bucket cannot be written to, or belongs to another run now.
        """
        self.start_push()
        self.finish_push()
        if removes:
            names = [name for name in self._stamps if not STEP.fullmatch(name)]
            for name in [name for name in names if not self._path(name).exists()]:
                self.bucket.remove(name)
                del self._stamps[name]

    def _push_now(self, after: Callable[[], None] = lambda: None) -> None:
        after()
        self._lease.check()
        paths = {str(path.relative_to(self.folder)): path for path in _files(self.folder)}
        paths |= {f'{PROGRAMS}/{path.name}': path for path in _files(self._programs)}
        stamps = {name: _stamp(path) for name, path in paths.items()}
        changed = [name for name in paths if stamps[name] and stamps[name] != self._stamps.get(name)]
        changed = [name for name in changed if STEP.fullmatch(name) or not name.startswith(f'{FOLDER}/')]
        upload = lambda names: self.bucket.upload({name: paths[name] for name in names}, self._lease.check)
        upload(name for name in changed if name == CONFIG)  # first: by it a folder is known as a run's
        upload(name for name in changed if name != CONFIG)
        self._stamps |= {name: stamps[name] for name in changed}
        for step in sorted(self._removed):
            if not (self.folder / FOLDER / step).exists():  # it may have been saved again
                self._lease.check()
                self.bucket.remove(f'{FOLDER}/{step}/{COMMITTED}')
                self.bucket.remove_all(f'{FOLDER}/{step}/')
            self._removed.remove(step)
        self._pushed = time.monotonic()

    def _path(self, name: str) -> Path:
        inside, _, rest = name.partition('/')
        return self._programs / rest if inside == PROGRAMS else self.folder / name


def _files(folder: Path) -> list[Path]:
    """The complete files below a folder, without those that are being written."""
    paths = folder.rglob('*') if folder.is_dir() else []
    # a picture may be called _trash.jpg, or .hidden.jpg
    hidden = re.compile(
        rf'(.*/)?\.[^/]*\.part|{re.escape(LOCK)}|{FOLDER}/(_trash/|.*\.orbax-checkpoint-tmp).*', re.S
    )
    return [p for p in paths if not hidden.fullmatch(p.relative_to(folder).as_posix()) and p.is_file()]


def _stamp(path: Path) -> tuple | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns
