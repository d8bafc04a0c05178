import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import storage
from helpers import ROOT, TINY, finish, make_hf, metric_lines, spawn

from yolos_jax import cpus
from yolos_jax.bucket import Bucket
from yolos_jax.errors import InputError
from yolos_jax.run import cluster, lease
from yolos_jax.run import mesh as meshes
from yolos_jax.tools import make_shapes

SCRIPT = ROOT / 'tests' / 'acting_train.py'
TRIALS = range(int(os.environ.get('TRIALS', 1)))


def start(data, folder, processes, devices, *flags, what='run', heartbeat=1000, last=()):
    """Start a small run of so many processes with so many devices each; `last`: flags of the last one."""
    small = 'width=32 depth=2 heads=2 num_det_tokens=6'.split()
    fixed = 'batch_size=8 num_lengths=1 epochs=3 learning_rate=1e-3 log_every=1 eval_every=3'.split()
    command = [SCRIPT, folder, what, f'--config={ROOT}/configs/quickstart.py', f'--workdir={folder}']
    command += [f'--config.data={data}', f'--heartbeat={heartbeat}']
    command += [*(f'--config.model.{x}' for x in small), *(f'--config.{x}' for x in fixed), *flags]
    return spawn(command, folder, processes, devices, last)


def run(data, folder, processes, devices, *flags, status=0, **options):
    codes, logs = finish(start(data, folder, processes, devices, *flags, **options), folder)
    assert codes == [status] * processes, logs
    return folder


def losses(folder):
    return {line['step']: line['loss'] for line in metric_lines(folder) if 'loss' in line}


def consumed(folder):
    """{step: sorted image ids}, of all processes."""
    ids = {}
    for path in folder.glob('ids-*'):
        for step, of_process in map(json.loads, path.read_text().splitlines()):
            ids.setdefault(step, []).extend(of_process)
    return {step: sorted(of_step) for step, of_step in ids.items()}


def ap(folder):
    (line,) = [line for line in metric_lines(folder) if 'AP' in line]
    return {k: v for k, v in line.items() if k.startswith(('AP', 'AR'))}


@pytest.fixture(scope='module')
def alone(coco_folder, tmp_path_factory):
    """Nine steps of one process with one device."""
    return run(coco_folder, tmp_path_factory.mktemp('alone') / 'run', 1, 1)


def check_same(folder, alone):
    """Losses, the images of every step, and the AP of ten images in batches of eight."""
    expected = losses(alone)
    assert len(expected) == 9
    np.testing.assert_allclose([*losses(folder).values()], [*expected.values()], rtol=1e-5)
    assert ap(folder).keys() == ap(alone).keys()
    assert ap(folder) == pytest.approx(ap(alone), abs=0)


@pytest.mark.trials
@pytest.mark.parametrize(('processes', 'devices'), [(1, 8), (2, 2), (2, 4), (4, 2)])
def test_a_run_is_the_same_on_every_layout(processes, devices, alone, coco_folder, tmp_path):
    folder = run(coco_folder, tmp_path / 'run', processes, devices)
    check_same(folder, alone)
    assert consumed(folder) == consumed(alone)


def test_evaluation_by_two_processes_is_that_of_one(alone, coco_folder, tmp_path):
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [ROOT / 'eval.py', f'--weights={alone}', f'--data={coco_folder}', f'--output={out}']
        codes, logs = finish(spawn([*command, '--batch_size=4'], out, processes, 2 // processes), out)
        assert codes == [0] * processes, logs
        results.append([(out / name).read_text() for name in ('metrics.json', 'predictions.json')])
    assert results[0] == results[1]
    assert set(json.loads(results[0][1])[0]) == {'image_id', 'category_id', 'bbox', 'score'}


def test_processes_that_evaluate_different_things_stop_and_name_the_difference(
    alone, coco_folder, tmp_path
):
    command = [ROOT / 'eval.py', f'--weights={alone}', f'--data={coco_folder}', f'--output={tmp_path}']
    codes, logs = finish(spawn(command, tmp_path, 2, 1, last=['--size=64']), tmp_path)
    assert 0 not in codes and 'disagree: the size of the images of process 1' in ''.join(logs), logs


@pytest.mark.parametrize(
    ('number', 'status'),
    [(signal.SIGTERM, -15), pytest.param(signal.SIGINT, 130, marks=pytest.mark.trials)],
)
def test_a_signal_to_one_process_ends_an_evaluation(number, status, alone, coco_folder, tmp_path):
    out = tmp_path / 'out'
    command = [ROOT / 'eval.py', f'--weights={alone}', f'--data={coco_folder}', f'--output={out}']
    processes = spawn([*command, '--batch_size=2', '--corruptions', '--heartbeat=10'], tmp_path, 2, 1)
    while 'noise' not in (tmp_path / 'log-0').read_text() and processes[0].poll() is None:
        time.sleep(0.1)
    processes[1].send_signal(number)
    codes, logs = finish(processes, tmp_path)
    assert codes[1] == status and codes[0] not in (0, 1), logs
    assert 'unhealthy' in logs[0] and not (out / 'metrics.json').exists()


def test_sigterm_is_heard_between_the_batches_of_an_evaluation(tmp_path):
    """Of either process; it comes in the last step of an epoch, and JAX looks for it once a second."""
    make_shapes.write(tmp_path / 'data', {'train2017': 24, 'val2017': 600})
    folder = tmp_path / 'run'
    run(tmp_path / 'data', folder, 2, 1, '--config.eval_every=1', what='term:2', status=143)
    assert max(losses(folder)) == 3 and not any('AP' in line for line in metric_lines(folder))


def test_processes_that_are_done_wait_for_the_first(tmp_path):
    """For longer than the heartbeat: it may score, or put a checkpoint into a bucket."""
    (tmp_path / 'script.py').write_text(
        'import argparse, time\n'
        'from yolos_jax.run import cluster\n'
        'from yolos_jax.tools import flags\n'
        'parser = argparse.ArgumentParser()\n'
        'flags.add_cluster(parser)\n'
        'args = parser.parse_args()\n'
        'cluster.start(args.coordinator, args.num_processes, args.process_id, 5)\n'
        'time.sleep(15 * cluster.is_first())\n'
    )
    codes, logs = finish(spawn([tmp_path / 'script.py'], tmp_path, 2, 1), tmp_path)
    assert codes == [0, 0], logs


@pytest.mark.trials
def test_a_run_resumes_three_times_on_three_layouts(coco_folder, tmp_path):
    """SIGTERM to one process stops it each time; it ends as an unbroken run of one process."""
    more = '--config.epochs=7', '--config.eval_every=7'
    alone, folder, done = run(coco_folder, tmp_path / 'alone', 1, 1, *more), tmp_path / 'run', 0
    for processes, devices, *flags in [(2, 4), (1, 8), (2, 2, '--config.shard_params')]:
        run(coco_folder, folder, processes, devices, *flags, *more, what=f'term:{done + 1}', status=143)
        assert done + 1 < max(losses(folder)) < max(losses(alone))
        done = max(losses(folder))
    run(coco_folder, folder, 1, 1, *more)
    assert list(losses(folder)) == list(losses(alone))
    np.testing.assert_allclose([*losses(folder).values()], [*losses(alone).values()], rtol=1e-5)
    steps = consumed(alone)
    assert all(set(ids) == set(steps[step]) for step, ids in consumed(folder).items())
    assert ap(folder) == pytest.approx(ap(alone), abs=1e-3)


def test_processes_share_a_run_in_a_bucket_without_a_common_folder(
    alone, coco_folder, tmp_path, monkeypatch
):
    """Its parameters are in parts on 2 x 2 devices; it is stopped there and resumes, whole, on 1 x 2."""
    with storage.gcs() as url:
        for name, value in storage.environment(url, 'gs').items():
            monkeypatch.setenv(name, value)
        place = f'gs://{storage.BUCKET}/run'
        flags = [f'--workdir={place}', '--config.save_every=2']
        in_parts = [*flags, '--config.shard_params']
        run(coco_folder, tmp_path / 'logs', 2, 2, *in_parts, what='term:4', status=143)
        bucket = Bucket(place)
        steps = {int(name.split('/')[1]) for name in bucket.names('checkpoints/')}
        assert 5 <= max(steps) < 9 and '.lock' not in bucket.names()
        run(coco_folder, tmp_path / 'logs', 1, 2, *flags)
        bucket.download({name: tmp_path / 'run' / name for name in bucket.names()})
    check_same(tmp_path / 'run', alone)
    assert consumed(tmp_path / 'logs') == consumed(alone)


@pytest.mark.trials
@pytest.mark.row('two processes with a run in a bucket, either killed', count=1)
@pytest.mark.parametrize('victim', [0, 1])
def test_a_run_in_a_bucket_survives_the_death_of_either_process(
    victim, alone, coco_folder, tmp_path, monkeypatch
):
    with storage.gcs() as url:
        for name, value in storage.environment(url, 'gs').items():
            monkeypatch.setenv(name, value)
        place, logs = f'gs://{storage.BUCKET}/killed{victim}', tmp_path / 'logs'
        data = storage.upload(coco_folder, f'gs://{storage.BUCKET}/data')
        flags = [f'--workdir={place}', '--config.save_every=1']
        started = start(data, logs, 2, 2, *flags, what='wait:4', heartbeat=20)
        wait_for(logs / 'waiting', started)
        started[victim].kill()
        codes, _ = finish(started, logs)
        assert 0 not in codes
        bucket = Bucket(place)
        assert [name for name in bucket.names('checkpoints/') if name.endswith('meta/metadata')]
        if victim == 0:  # it held the lock
            time.sleep(lease.FORGOTTEN)
        run(data, logs, 2, 2, *flags)
        bucket.download({name: tmp_path / 'run' / name for name in bucket.names()})
    check_same(tmp_path / 'run', alone)


def test_processes_with_different_configs_stop_and_name_the_differences(coco_folder, tmp_path):
    last = ['--config.learning_rate=2e-3', '--config.train_split=val2017']
    codes, logs = finish(start(coco_folder, tmp_path, 2, 1, last=last), tmp_path)
    differ = 'learning_rate', 'train_split', 'the train data', 'the plan of batches'
    (log,) = [log for log in logs if 'the processes disagree' in log][:1]
    assert 0 not in codes and all(f'{name} of process 1' in log for name in differ), logs
    assert 'Traceback' not in logs[0] and not (tmp_path / 'checkpoints').exists()


def test_processes_whose_copies_of_the_weights_have_other_models_stop(coco_folder, tmp_path):
    for i, heads in enumerate((2, 4)):
        make_hf(TINY | {'heads': heads}, num_classes=4).save_pretrained(tmp_path / f'{i}' / 'weights')
    config = f'--config={ROOT}/configs/finetune.py', '--config.init_from=weights', '--config.batch_size=2'
    command = [SCRIPT, tmp_path, 'elsewhere', *config, f'--config.data={coco_folder}']
    codes, logs = finish(spawn([*command, f'--workdir={tmp_path / "run"}'], tmp_path, 2, 1), tmp_path)
    assert 0 not in codes and 'disagree: the model of process 1 differs' in ''.join(logs), logs


def wait_for(file, processes):
    """Wait until a file is there; a process that ends before is an error."""
    while not file.exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


KILLED = [(signal.SIGKILL, 1)]
ALSO_KILLED = [(signal.SIGKILL, 0), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]


@pytest.mark.row('two processes, one killed or frozen')
@pytest.mark.parametrize('trial', TRIALS)
@pytest.mark.parametrize(
    ('number', 'victim'), [*KILLED, *(pytest.param(*x, marks=pytest.mark.trials) for x in ALSO_KILLED)]
)
def test_a_dead_or_hung_process_ends_the_others_and_the_run_resumes_and_is_that_of_one_process(
    number, victim, trial, alone, coco_folder, tmp_path
):
    saves = '--config.save_every=1'
    started = start(coco_folder, tmp_path, 2, 1, saves, what='wait:4', heartbeat=20)
    wait_for(tmp_path / 'waiting', started)
    started[victim].send_signal(number)
    started[1 - victim].wait()  # ends by itself, whenever the heartbeat finds out
    started[victim].send_signal(signal.SIGCONT)
    codes, logs = finish(started, tmp_path)
    assert 0 not in codes
    log = logs[1 - victim]
    if victim == 1:
        assert re.search(r'tasks are unhealthy .*:\n1\n', log), log
    else:  # the leader itself, which the heartbeats go to
        assert 'leader task was preempted/died' in log or 'CoordinationService/Heartbeat' in log, log
    run(coco_folder, tmp_path, 2, 1, saves, what='unreadable')  # for one; both take an older step
    assert len([*(tmp_path / 'checkpoints').glob('broken-*')]) == 1
    check_same(tmp_path, alone)
    threads = max(cpus.usable() // 2, 1)  # for the processes are on one host, with the same CPUs
    assert (tmp_path / 'log.txt').read_text().count(f'processes 2, threads {threads},') == 2


@pytest.mark.row('two processes, one failing')
@pytest.mark.parametrize('trial', TRIALS)
@pytest.mark.parametrize(
    ('what', 'says'),
    [
        ('raise:3', 'RuntimeError: a fault of the test'),
        pytest.param('full:3', 'a save failed', marks=pytest.mark.trials),
    ],
)
def test_an_exception_in_one_process_ends_all_and_is_shown(trial, what, says, coco_folder, tmp_path):
    flags = '--config.save_every=1', '--config.epochs=1000', '--stuck=200'
    codes, logs = finish(start(coco_folder, tmp_path, 2, 1, *flags, what=what, heartbeat=20), tmp_path)
    assert 0 not in codes
    assert 'process 1 of 2:' in logs[1] and says in logs[1]
    assert 'no progress in' not in ''.join(logs)  # as of a process that is stuck


@pytest.mark.parametrize(
    ('variables', 'expected'),
    [
        ({}, None),
        ({'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, None),
        ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)'}, []),
        ({'SLURM_STEP_TASKS_PER_NODE': '1'}, []),
        ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, []),
        ({'SLURM_STEP_TASKS_PER_NODE': '4', 'CUDA_VISIBLE_DEVICES': '3'}, []),
        ({'SLURM_STEP_TASKS_PER_NODE': '4', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, None),
        ({'SLURM_STEP_TASKS_PER_NODE': '1', 'JAX_LOCAL_DEVICE_IDS': '2'}, None),
    ],
)
def test_a_process_that_shares_its_gpus_with_none_uses_all_that_it_sees(variables, expected, monkeypatch):
    for name in ('SLURM_STEP_TASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cluster._own_devices() == expected


def test_the_only_process_of_a_slurm_step_uses_all_gpus():
    step = {
        'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0',
        'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '1', 'SLURM_STEP_TASKS_PER_NODE': '1',
    }  # fmt: skip
    script = 'from jax._src import xla_bridge\nfrom yolos_jax.run import cluster\n'
    script += 'cluster.start()\nprint(xla_bridge.CUDA_VISIBLE_DEVICES.value)'
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | step, capture_output=True, text=True)
    assert done.stdout == 'all\n', done.stderr


def test_a_half_described_cluster_is_refused():
    with pytest.raises(InputError, match='need num_processes and process_id too') as error:
        cluster.start(coordinator='localhost:1')
    assert error.value.argument == 'num_processes'
    with pytest.raises(InputError, match='heartbeat is 0, less than a second'):
        cluster.start(heartbeat=0)


@pytest.mark.parametrize(('name', 'value'), [('OMPI_COMM_WORLD_SIZE', '2'), ('JOB_COMPLETION_INDEX', '1')])
def test_a_multi_process_launcher_that_jax_does_not_recognise_is_refused(name, value):
    script = (
        'from yolos_jax.errors import InputError\n'
        'from yolos_jax.run import cluster\n'
        'cluster.start(num_processes=1)\n'
        'try:\n    cluster.start()\nexcept InputError as error:\n    print(error)'
    )
    environment = os.environ | {name: value}
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert f'{name} is {value}, so there are several processes' in done.stdout, done.stderr


def test_one_process_of_a_launcher_is_alone(monkeypatch):
    for name, value in (('OMPI_COMM_WORLD_SIZE', '1'), ('JOB_COMPLETION_INDEX', '0')):
        monkeypatch.setenv(name, value)
    cluster._check_alone()


def test_processes_with_different_numbers_of_devices_are_refused():
    devices = [SimpleNamespace(process_index=i) for i in (0, 1, 1)]
    with pytest.raises(InputError, match='1 in process 0, 2 in process 1'):
        meshes.check_alike(devices)


def test_one_process_is_alone_and_agrees_with_itself():
    cluster.start(num_processes=1)
    assert cluster.is_alone() and cluster.is_first()
    cluster.agree({'a': 1, 'b': 'a path that is not UTF-8: caf\udce9'} | cluster.facts_of_code())
    x = np.array([[1 << 40], [3]])
    assert cluster.gather(x) is x and cluster.broadcast(0.1) == 0.1
