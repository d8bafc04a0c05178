"""Where Numba keeps what it has compiled: where neither this package nor the home can be written to."""

import os
import tempfile
from pathlib import Path


def set_up() -> None:
    """Name a folder for temporary files of this user's own, where Numba would find none and raise."""
    writable = (os.access(folder, os.W_OK) for folder in (Path(__file__).parent, os.path.expanduser('~')))
    if 'NUMBA_CACHE_DIR' in os.environ or any(writable):
        return
    folder = Path(tempfile.gettempdir(), f'yolos_jax-numba-{os.getuid()}')
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # compiled code of somebody else is not to be run
        folder = tempfile.mkdtemp(prefix='yolos_jax-numba-')
    os.environ['NUMBA_CACHE_DIR'] = str(folder)
