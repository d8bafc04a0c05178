"""Keeps the compiled programs of a run in a folder, with the SHA-256 of each.

JAX checks nothing of what it reads from its cache: after a flipped bit a program crashes at every start, or
computes something else. Nor does it replace a file that a full disk or a kill cut off.
"""

import contextlib
from pathlib import Path

import jax

from yolos_jax import files
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run import cluster

SUMS = 'sha256.json'
ENTRIES = '*-cache'  # JAX's files


class CompiledPrograms:
    """The folder that JAX keeps compiled programs in, and reads them from in later starts."""

    def __init__(self, folder: Path) -> None:
        """Set JAX's cache to the folder; process 0 removes the programs that do not match their checksums.

        A folder set by JAX_COMPILATION_CACHE_DIR takes precedence, and is left alone.
        """
        self._folder, self._sums, self._stamps = None, {}, {}
        if jax.config.jax_compilation_cache_dir is None:
            if cluster.is_first():  # the only process in which JAX writes programs
                self._folder = folder
                self._remove_damaged()
            cluster.barrier('compiled programs')
            jax.config.update('jax_compilation_cache_dir', str(folder))
            jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
            # with XLA's own caches JAX 0.10 has the folder's path in the key of a program: one that was
            # moved, or lies elsewhere on another host, would have none
            jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')

    def note(self) -> None:
        """Write the checksums of the programs that are new or have changed.

        If there is no room for that, on a full disk, these programs may be cut off too, and are removed.
        """
        if not self._folder:
            return
        new = dict(self._entries().items() - self._stamps.items())
        if not new:
            return
        for path, stamp in new.items():
            with contextlib.suppress(OSError):  # another start may have removed it
                self._sums[path.name], self._stamps[path] = files.sha256(path), stamp
        try:
            files.write_json(self._folder / SUMS, self._sums)
        except StorageError:
            for path in new:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _remove_damaged(self) -> None:
        noted = {}
        with contextlib.suppress(InputError):  # missing or damaged
            noted = files.read_json(self._folder / SUMS)
        for path, stamp in self._entries().items():
            with contextlib.suppress(OSError):  # of another user, whose folder the run will not get either
                if noted.get(path.name) == (digest := files.sha256(path)):
                    self._sums[path.name], self._stamps[path] = digest, stamp
                else:
                    path.unlink()

    def _entries(self) -> dict[Path, tuple[int, int]]:
        """JAX's files, with the time and size of each."""
        entries = {}
        with contextlib.suppress(OSError):
            for path in self._folder.glob(ENTRIES):
                stat = path.stat()
                entries[path] = stat.st_mtime_ns, stat.st_size
        return entries
