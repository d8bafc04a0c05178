"""Keeps the compiled programs of a run in a folder, with the SHA-256 of each.

JAX checks nothing of what it reads from its cache: after a flipped bit a program crashes at every start, or
computes something else. Nor does it replace a file that a full disk or a kill cut off.
"""

import contextlib
import json
from pathlib import Path

import jax

from yolos_jax import files
from yolos_jax.errors import StorageError

SUMS = 'sha256.json'
ENTRIES = '*-cache'  # JAX's files


class CompiledPrograms:
    """The folder that JAX keeps compiled programs in, and reads them from when the run starts again."""

    def __init__(self, folder: Path) -> None:
        """Set JAX's cache to the folder, without the programs that are not as they were noted.

        Where JAX was told of another place, by JAX_COMPILATION_CACHE_DIR, that one stays as it is.
        """
        self._folder = None
        if jax.config.jax_compilation_cache_dir is None:
            self._folder, self._changed, self._sums = folder, None, {}
            noted = _read(folder / SUMS)
            for path in folder.glob(ENTRIES):
                if noted.get(path.name) == (digest := files.sha256(path)):
                    self._sums[path.name] = digest
                else:
                    path.unlink(missing_ok=True)
            jax.config.update('jax_compilation_cache_dir', str(folder))
            jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

    def note(self) -> None:
        """Note the programs that are new; without one it costs a microsecond.

        Where there is no room for that, on a full disk, the programs may be cut off too, and are removed.
        """
        if not self._folder or not self._folder.exists():
            return
        changed = self._folder.stat().st_mtime_ns
        if changed == self._changed:
            return
        new = [path for path in self._folder.glob(ENTRIES) if path.name not in self._sums]
        self._sums |= {path.name: files.sha256(path) for path in new}
        try:
            files.write_json(self._folder / SUMS, self._sums)
        except StorageError:
            for path in new:
                with contextlib.suppress(OSError):
                    path.unlink()
        self._changed = self._folder.stat().st_mtime_ns


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
