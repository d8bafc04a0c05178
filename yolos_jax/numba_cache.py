"""Gives Numba a cache folder where neither this package nor the home folder can be written to."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def set_up() -> None:
    """Set NUMBA_CACHE_DIR to a temporary folder of this user if Numba would find no folder and raise."""
    home = os.path.expanduser('~')
    places = Path(__file__).parent, home, os.environ.get('XDG_CACHE_HOME') or home
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
