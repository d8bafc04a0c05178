"""Sets where Numba caches compiled functions, and under which names."""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def set_up() -> None:
    """Choose a folder if Numba would find none, and remove the indices that a power cut left empty."""
    _choose_folder()
    package = Path(__file__).parent
    for folder in {package, Path(os.environ.get('NUMBA_CACHE_DIR') or package)}:
        with contextlib.suppress(OSError):
            for index in folder.rglob('*.nbi'):
                if not index.stat().st_size:  # Numba would raise at every start
                    index.unlink()


def _choose_folder() -> None:
    """Set NUMBA_CACHE_DIR to a temporary folder of this user if Numba could write to no other."""
    caches = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    existing = next((place for place in (caches, *caches.parents) if place.exists()), caches)
    places = [Path(__file__).parent] + [existing] * caches.is_absolute()  # relative: the home is not known
    if 'NUMBA_CACHE_DIR' in os.environ or any(os.access(place, os.W_OK) for place in places):
        return
    with contextlib.suppress(OSError):  # where nothing at all can be written, Numba says so when it is used
        folder = Path(tempfile.gettempdir(), f'yolos_jax-numba-{os.getuid()}')
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():  # never run compiled code of another user
            folder = tempfile.mkdtemp(prefix='yolos_jax-numba-')
        os.environ['NUMBA_CACHE_DIR'] = str(folder)
        if 'numba' in sys.modules:
            sys.modules['numba'].config.reload_config()


def renamed(function: Callable) -> Callable:
    """A function under a name that changes with any file of its folder, for Numba's cache.

    For functions that call those of other files: Numba looks for changes in a function's own file only, and
    else runs the code that the others had before.
    """
    function.__qualname__ += f'_{_hash_of(Path(function.__code__.co_filename).parent)}'
    return function


@functools.cache
def _hash_of(folder: Path) -> str:
    code = b''.join(path.read_bytes() for path in sorted(folder.glob('*.py')))
    return hashlib.sha256(code).hexdigest()[:16]
