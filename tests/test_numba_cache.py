"""Where Numba keeps compiled functions when it finds no place by itself."""

import os
import tempfile

import pytest

from yolos_jax import numba_cache


@pytest.mark.parametrize('owner', ['ours', 'of somebody else'])
def test_a_private_cache_folder_is_used_if_the_default_one_is_not_writable(owner, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda *_: False)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('NUMBA_CACHE_DIR', '')
    monkeypatch.delenv('NUMBA_CACHE_DIR')
    mine = os.getuid()
    if owner != 'ours':  # the user has another number than who makes the folders
        monkeypatch.setattr(os, 'getuid', lambda: mine + 1)
    numba_cache.set_up()
    folder = os.environ['NUMBA_CACHE_DIR']
    assert os.path.dirname(folder) == str(tmp_path) and os.stat(folder).st_mode & 0o77 == 0
    assert (os.path.basename(folder) == f'yolos_jax-numba-{mine}') == (owner == 'ours')
