import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from yolos_jax import cluster
from yolos_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'tests' / 'recording_train.py'
HEARTBEAT = 10
SHORT = '--config.save_every=2', '--config.epochs=2'
TRIALS = range(int(os.environ.get('TRIALS', 1)))


def start(data, workdir, processes, devices, *flags, what='run', heartbeat=60, last=()):
    """Start a small run of so many processes with so many devices each; `last`: flags of the last one."""
    small = 'width=32 depth=2 heads=2 num_det_tokens=6'.split()
    fixed = 'batch_size=8 num_lengths=1 epochs=7 learning_rate=1e-3 log_every=1 eval_every=7'.split()
    command = [SCRIPT, workdir, what, f'--config={ROOT}/configs/quickstart.py', f'--workdir={workdir}']
    command += [f'--config.data={data}', f'--heartbeat={heartbeat}']
    command += [*(f'--config.model.{x}' for x in small), *(f'--config.{x}' for x in fixed), *flags]
    return spawn(command, workdir, processes, devices, last)


def spawn(command, logs, processes, devices, last=()):
    """A script as so many processes that know of each other, each writing to a log."""
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    environment = os.environ | {
        'PYTHONPATH': str(ROOT),
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    }
    started = []
    for i in range(processes):
        place = [f'--coordinator={coordinator}', f'--num_processes={processes}', f'--process_id={i}']
        own = [*(place if processes > 1 else []), *(last if i == processes - 1 else [])]
        with open(logs / f'log-{i}', 'a') as log:
            one = [sys.executable, *command, *own]
            started.append(subprocess.Popen(one, env=environment, stdout=log, stderr=log))
    return started


def finish(started, workdir, seconds=300):
    """Wait for all; returns their exit statuses and outputs."""
    try:
        codes = [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(workdir / f'log-{i}').read_text() for i in range(len(started))]


def run(data, workdir, processes, devices, *flags, **options):
    codes, logs = finish(start(data, workdir, processes, devices, *flags, **options), workdir)
    assert codes == [0] * processes, logs
    return workdir


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def consumed(workdir):
    """{step: sorted image ids}, of all processes."""
    ids = {}
    for path in workdir.glob('ids-*'):
        for step, mine in map(json.loads, path.read_text().splitlines()):
            ids.setdefault(step, []).extend(mine)
    return {step: sorted(found) for step, found in ids.items()}


def ap(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    (found,) = [
        {k: v for k, v in line.items() if k.startswith(('AP', 'AR'))} for line in lines if 'AP' in line
    ]
    return found


@pytest.fixture(scope='module')
def alone(coco_folder, tmp_path_factory):
    """21 steps of one process with one device."""
    return run(coco_folder, tmp_path_factory.mktemp('alone') / 'run', 1, 1)


@pytest.mark.parametrize(('processes', 'devices'), [(1, 8), (2, 4), (4, 2)])
def test_a_run_is_the_same_on_every_layout(processes, devices, alone, coco_folder, tmp_path):
    """Losses, the images of every step, and the AP of ten images in batches of eight."""
    workdir = run(coco_folder, tmp_path / 'run', processes, devices)
    expected = losses(alone)
    assert len(expected) == 21
    np.testing.assert_allclose([*losses(workdir).values()], [*expected.values()], rtol=1e-5)
    assert consumed(workdir) == consumed(alone)
    assert ap(workdir).keys() == ap(alone).keys()
    assert ap(workdir) == pytest.approx(ap(alone), abs=0)


def test_evaluation_by_two_processes_is_that_of_one(alone, coco_folder, tmp_path):
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [ROOT / 'eval.py', f'--weights={alone}', f'--data={coco_folder}', f'--output={out}']
        codes, logs = finish(spawn([*command, '--batch_size=4'], out, processes, 4 // processes), out)
        assert codes == [0] * processes, logs
        found.append([(out / name).read_text() for name in ('metrics.json', 'predictions.json')])
    assert found[0] == found[1]
    assert set(json.loads(found[0][1])[0]) == {'image_id', 'category_id', 'bbox', 'score'}


def test_a_run_goes_on_with_other_processes_and_devices(alone, coco_folder, tmp_path):
    """2 x 4, then 1 x 8, then 2 x 2 with sharded state, then 1 x 1; SIGTERM reaches one process."""
    workdir = tmp_path / 'run'
    run(coco_folder, workdir, 2, 4, what='term:3')
    first = max(losses(workdir))
    run(coco_folder, workdir, 1, 8, what=f'term:{first + 3}')
    second = max(losses(workdir))
    run(coco_folder, workdir, 2, 2, '--config.shard_params', what=f'term:{second + 3}')
    third = max(losses(workdir))
    assert 3 < first < second < third < 21
    run(coco_folder, workdir, 1, 1)
    found, expected = losses(workdir), losses(alone)
    assert list(found) == list(expected)
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)
    steps = consumed(alone)
    assert all(set(ids) == set(steps[step]) for step, ids in consumed(workdir).items())
    assert ap(workdir) == pytest.approx(ap(alone), abs=1e-3)


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        (
            ['--config.learning_rate=2e-3'],
            'config.learning_rate of process 1 differs from that of process 0',
        ),
        (
            ['--config.train_split=val2017'],
            'config.train_split of process 1; the training data of process 1; the plan of',
        ),
    ],
)
def test_processes_that_disagree_stop_and_say_over_what(flags, says, coco_folder, tmp_path):
    started = start(coco_folder, tmp_path, 2, 1, heartbeat=HEARTBEAT, last=flags)
    codes, logs = finish(started, tmp_path, 120)
    assert 0 not in codes and any(says in log for log in logs), logs
    assert 'Traceback' not in logs[0] and not (tmp_path / 'checkpoints').exists()


def until(condition, seconds):
    clock = time.monotonic()
    while not condition():
        assert time.monotonic() - clock < seconds
        time.sleep(0.1)
    return time.monotonic() - clock


def gone(process):
    return process.poll() is not None


@pytest.mark.parametrize('trial', TRIALS)
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_process_ends_the_others_and_the_run_resumes(
    number, victim, trial, coco_folder, tmp_path
):
    started = start(coco_folder, tmp_path, 2, 1, *SHORT, what='wait:3', heartbeat=HEARTBEAT)
    until((tmp_path / 'waiting').exists, 300)
    started[victim].send_signal(number)
    until(lambda: gone(started[1 - victim]), HEARTBEAT + 10)
    started[victim].send_signal(signal.SIGCONT)
    until(lambda: gone(started[victim]), HEARTBEAT + 10)
    said = (tmp_path / f'log-{1 - victim}').read_text()
    if victim == 1:
        assert re.search(r'tasks are unhealthy .*:\n1\n', said), said
    else:  # the leader itself, which the heartbeats go to
        assert 'leader task was preempted/died' in said or 'CoordinationService/Heartbeat' in said, said
    run(coco_folder, tmp_path, 2, 1, *SHORT)
    assert list(losses(tmp_path)) == list(range(1, 7))


@pytest.mark.parametrize('trial', TRIALS)
def test_an_exception_in_one_process_ends_all_and_is_shown(trial, coco_folder, tmp_path):
    """And the run resumes from the newest checkpoint that both can read."""
    flags = *SHORT, '--config.save_every=1'
    started = start(coco_folder, tmp_path, 2, 1, *flags, what='raise:5', heartbeat=HEARTBEAT)
    until(lambda: gone(started[1]), 300)
    until(lambda: gone(started[0]), HEARTBEAT + 10)
    codes, logs = finish(started, tmp_path)
    assert 0 not in codes
    assert 'process 1 of 2:' in logs[1] and 'RuntimeError: a fault of the test' in logs[1]
    run(coco_folder, tmp_path, 2, 1, *flags, what='unreadable')
    assert len([*(tmp_path / 'checkpoints').glob('broken-[45]')]) == 1
    assert list(losses(tmp_path)) == list(range(1, 7))


def test_a_process_that_is_stuck_ends_with_its_stacks(coco_folder, tmp_path):
    started = start(coco_folder, tmp_path, 2, 1, *SHORT, '--stuck=30', what='wait:3', heartbeat=HEARTBEAT)
    codes, logs = finish(started, tmp_path)
    assert 0 not in codes and (tmp_path / 'waiting').exists()
    # process 0 waits for the sum of gradients, and may be the first whose time is up
    assert any('Timeout (0:00:30)' in log and 'in train' in log for log in logs), logs


def test_a_half_described_cluster_is_refused():
    with pytest.raises(InputError, match='needs --num_processes and --process_id too'):
        cluster.start(coordinator='localhost:1')


def test_one_process_is_alone_and_agrees_with_itself():
    cluster.start(num_processes=1)
    assert cluster.is_alone() and cluster.is_first()
    cluster.agree({'a': 1, 'b': 'x'})
    x = np.array([[1 << 40], [3]])
    assert cluster.gather(x) is x and cluster.from_first(0.1) == 0.1
