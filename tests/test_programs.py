"""Programs are compiled ahead, kept in the workdir, and made again where they are damaged."""

import concurrent.futures
import os
import resource
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax.experimental.layout import Format, Layout

from yolos_jax.run import mesh as meshes
from yolos_jax.run.compiled import CompiledPrograms
from yolos_jax.run.programs import Programs

MESH = meshes.make_mesh(jax.devices()[:1])
STATE = {'sum': jnp.float32(0)}


def batch_of(length):
    return {'patches': np.ones((2, length, 3), np.float32)}


def programs_of(step, lengths, log, state=STATE):
    return Programs(step, MESH, state=state, empty=batch_of, lengths=np.array(lengths), log=log)


def add(state, batch):
    return {'sum': state['sum'] + batch['patches'].sum()}, {}


def test_lengths_are_compiled_ahead_in_the_order_in_which_they_come():
    lines, done = [], threading.Event()

    def log(line):
        lines.append(line)
        if len(lines) == 4:
            done.set()

    programs = programs_of(jax.jit(add), [5, 7, 5, 4, 7], log)
    assert done.wait(60) and lines[0] == 'compiling for sequences of 5, 7, 4 patches ...'
    assert [int(line.split()[5]) for line in lines[1:]] == [5, 7, 4]  # before any batch is there
    for length in (5, 9):  # the second of another epoch
        program = programs.of(length, lambda: None)
        assert program(STATE, meshes.shard(batch_of(length), MESH))[0]['sum'] == 6 * length
    programs.close()


def test_a_program_takes_the_state_in_its_memory_layout():
    """On a TPU the default layout of the tables between blocks is not that of a run; here one is set."""
    layout = Format(Layout((0, 1, 3, 2)), meshes.replicated(MESH))
    state = {'sum': jax.jit(lambda: jnp.zeros((1, 1, 2, 3)), out_shardings=layout)()}
    assert state['sum'].format.layout != jnp.zeros((1, 1, 2, 3)).format.layout
    step = jax.jit(add, donate_argnums=0, out_shardings=({'sum': layout}, {}))
    programs = programs_of(step, [5], print, state)
    program = programs.of(5, lambda: None)
    assert (program(state, meshes.shard(batch_of(5), MESH))[0]['sum'] == 30).all()
    programs.close()


def test_a_caller_waiting_for_a_program_is_called_back_and_gets_its_error():
    released, calls = threading.Event(), []

    def slow(state, batch):
        released.wait(60)
        raise ValueError('no such program')

    def on_wait():
        calls.append(1)
        if len(calls) == 3:
            released.set()

    programs = programs_of(jax.jit(slow), [5], print)
    with pytest.raises(ValueError, match='no such program'):
        programs.of(5, on_wait)
    assert len(calls) >= 3
    programs.close()


def test_a_closed_compiler_begins_no_other_program():
    begun, released = threading.Event(), threading.Event()

    def slow(state, batch):
        begun.set()
        released.wait(60)
        return add(state, batch)

    programs = programs_of(jax.jit(slow), [5, 7], print)
    assert begun.wait(60)
    programs.close()
    released.set()
    with pytest.raises(concurrent.futures.CancelledError):
        programs.of(7, lambda: None)


@pytest.fixture
def start(tmp_path):
    """Starts of runs that keep their programs in one folder."""
    names = 'enable_xla_caches', 'min_compile_time_secs'
    keys = 'jax_compilation_cache_dir', *(f'jax_persistent_cache_{name}' for name in names)
    before = {key: getattr(jax.config, key) for key in keys}

    def start():
        jax.config.update('jax_compilation_cache_dir', None)
        return CompiledPrograms(tmp_path)

    yield start
    for key, value in before.items():
        jax.config.update(key, value)


def names(folder):
    return sorted(path.name for path in folder.glob('*-cache'))


def test_programs_that_a_killed_run_did_not_note_are_removed_and_earlier_ones_stay(start, tmp_path):
    for number in range(3):
        programs = start()
        (tmp_path / f'{number}-cache').write_bytes(b'program')
        programs.note()
        (tmp_path / 'half-cache').write_bytes(b'pro')
    start()
    assert names(tmp_path) == ['0-cache', '1-cache', '2-cache']


def test_programs_that_a_full_disk_may_have_cut_are_removed(start, tmp_path):
    programs = start()
    (tmp_path / 'half-cache').write_bytes(b'pro')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        programs.note()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names(tmp_path)


def test_a_folder_of_programs_that_the_user_set_is_left_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / 'x-cache').touch()
    CompiledPrograms(tmp_path).note()
    assert jax.config.jax_compilation_cache_dir == before and names(tmp_path) == ['x-cache']


def test_programs_are_kept_also_in_a_moved_folder_and_a_damaged_one_is_made_again(tmp_path):
    script = (
        'import sys, pathlib, jax, jax.numpy as jnp\nfrom yolos_jax.run import compiled\n'
        'programs = compiled.CompiledPrograms(pathlib.Path(sys.argv[1]) / "compiled")\n'
        'jax.monitoring.register_event_listener(lambda name, **_: print(name))\n'
        'x, sorts = jnp.eye(30), jax.jit(lambda x: [x := jnp.sort(x * i, axis=i % 2) for i in range(30)])\n'
        'print(float(sorts(x)[-1].sum()))\nprograms.note()'
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_COMPIL', 'JAX_PERSIST'))}

    def run(folder=tmp_path):
        command = [sys.executable, '-c', script, folder]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        *events, value = done.stdout.split()
        return value, '/jax/compilation_cache/cache_hits' in events, done.stderr

    value, hit, _ = run()
    assert not hit
    (elsewhere := tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'compiled').rename(elsewhere / 'compiled')
    assert run(elsewhere) == (value, True, '')
    cut, flipped = (lambda x: x[:100]), (lambda x: x[:50] + bytes([x[50] ^ 1]) + x[51:])
    for damaged in (cut, flipped):
        for name in names(elsewhere / 'compiled'):
            path = elsewhere / 'compiled' / name
            path.write_bytes(damaged(path.read_bytes()))
        # JAX does not see it, so that it neither warns nor crashes
        assert run(elsewhere) == (value, False, '') and names(elsewhere / 'compiled')
    assert run(elsewhere) == (value, True, '')
