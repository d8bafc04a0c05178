"""Where Numba keeps compiled functions if it finds no place by itself, and when it compiles them again."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest

from yolos_jax import numba_cache


@pytest.fixture(autouse=True)
def numba_as_it_was(monkeypatch):
    """`set_up` tells Numba of another folder."""
    yield
    monkeypatch.undo()
    numba.config.reload_config()


@pytest.mark.parametrize('owner', ['ours', 'of somebody else'])
def test_a_private_cache_folder_is_used_if_the_default_one_is_not_writable(owner, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    (home / '.cache').mkdir(parents=True)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(os, 'access', lambda path, _: Path(path) == home)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('NUMBA_CACHE_DIR', '')
    monkeypatch.delenv('NUMBA_CACHE_DIR')
    user = os.getuid()
    if owner != 'ours':  # the user has another number than who makes the folders
        monkeypatch.setattr(os, 'getuid', lambda: user + 1)
    numba_cache.set_up()
    folder = os.environ['NUMBA_CACHE_DIR']
    assert os.path.dirname(folder) == str(tmp_path) and os.stat(folder).st_mode & 0o77 == 0
    assert (os.path.basename(folder) == f'yolos_jax-numba-{user}') == (owner == 'ours')


def test_an_index_that_a_power_cut_left_empty_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv('NUMBA_CACHE_DIR', str(tmp_path))
    code = 'import numpy; from yolos_jax.data.slide import slide'
    code += '; slide(numpy.zeros((2, 2, 3), numpy.uint8), 0, 0.1, 1.0, (1, 2, 3))'
    for _ in range(2):
        subprocess.run([sys.executable, '-c', code], check=True)
        indices = [*tmp_path.rglob('*.nbi')]
        assert indices and all(index.stat().st_size for index in indices)
        for index in indices:
            os.truncate(index, 0)


CALLER = """
from numba import njit
from yolos_jax.called import called
from yolos_jax.numba_cache import renamed

@njit(cache=True)
@renamed
def call():
    return called()

print(call(), call.stats.cache_hits.total())
"""
CALLED = """
from numba import njit

@njit
def called():
    return 3
"""


def test_a_function_is_compiled_again_if_a_file_changes_that_it_calls(tmp_path):
    """Whoever updates a checkout or the package must not run the code of the version before."""
    package = tmp_path / 'yolos_jax'
    package.mkdir()
    (package / '__init__.py').touch()
    shutil.copy(numba_cache.__file__, package)
    (package / 'caller.py').write_text(CALLER)
    (package / 'called.py').write_text(CALLED)
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'NUMBA_CACHE_DIR': str(tmp_path / 'cache')}
    command = [sys.executable, '-m', 'yolos_jax.caller']
    run = lambda: subprocess.run(
        command, cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE
    ).stdout.split()
    assert run() == [b'3', b'0'] and run() == [b'3', b'1']
    (package / 'called.py').write_text(CALLED.replace('3', '5'))
    assert run() == [b'5', b'0']
