"""Failure trials at random moments: kills, stops, exceptions, full disks. SCALE=0.1 takes a tenth."""

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, TINY, make_hf, read_detector, result, tiny_config

from yolos_jax.run import mesh as meshes
from yolos_jax.run.train import train
from yolos_jax.weights import checkpoint, hf, reference

SCALE = float(os.environ.get('SCALE', 1))
PARTS = 4  # of which two run at a time
FLAGS = (
    '--config.model.width=32 --config.model.depth=2 --config.model.heads=2 --config.model.num_det_tokens=6 '
    '--config.epochs=6 --config.batch_size=4 --config.num_lengths=1 --config.learning_rate=1e-3 '
    '--config.log_every=1 --config.save_every=1 --config.eval_every=3'
).split()


def count(full):
    """How many trials of so many, of this part."""
    return max(math.ceil(full * SCALE / PARTS), 1)


def start(folder, data, **options):
    command = [sys.executable, 'train.py', '--config=configs/quickstart.py', *FLAGS]
    command += [f'--workdir={folder}', f'--config.data={data}']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes | options)


@pytest.fixture(scope='module')
def unbroken(coco_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    out, err = (process := start(folder, coco_folder)).communicate()
    assert process.returncode == 0, err
    return folder


def same_result(folder, unbroken):
    params, checksums, lines = result(folder)
    expected = result(unbroken)
    jax.tree.map(np.testing.assert_array_equal, params, expected[0])
    assert checksums == expected[1] and lines == expected[2]


@pytest.mark.trials
@pytest.mark.parametrize('part', range(PARTS))
def test_runs_killed_at_random_end_as_an_unbroken_one(
    part, unbroken, coco_folder, tmp_path, record_property
):
    rng, kills, runs = random.Random(part), 0, 0
    while kills < count(200):
        folder, process = tmp_path / str(runs), None
        while process is None or process.returncode != 0:
            process = start(folder, coco_folder, stderr=subprocess.STDOUT)
            if kills < count(200):
                for line in process.stdout:  # once it trains, at any moment
                    if line.startswith('compiled'):
                        break
                try:
                    process.wait(rng.uniform(0, 1.5))
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
            out = process.stdout.read()
            process.wait()
            assert process.returncode in (0, -9), out
        same_result(folder, unbroken)
        runs += 1
    record_property('row', ('runs killed while training and saving', kills))


@pytest.mark.trials
@pytest.mark.parametrize('part', range(PARTS))
def test_signals_at_random_stop_a_run_and_lose_nothing(
    part, unbroken, coco_folder, tmp_path, record_property
):
    rng, stops, longest, folder = random.Random(part), 0, 0.0, tmp_path / 'run'
    while stops < count(100):
        process = start(folder, coco_folder)
        try:
            process.wait(0.1 + rng.expovariate(1 / 3))
        except subprocess.TimeoutExpired:
            number, clock = rng.choice([signal.SIGTERM, signal.SIGINT]), time.monotonic()
            process.send_signal(number)
            _, err = process.communicate()
            elapsed = time.monotonic() - clock
            longest = max(longest, elapsed)
            stops += 1
            # by the signal itself before Python can take it
            assert process.returncode in (128 + number, -number, 0), err
            assert 'Traceback' not in err and 'KeyboardInterrupt' not in err, err
            # one that was at its end already is not asked again
            assert process.returncode or elapsed < 10, 'trained on'
        else:
            assert process.communicate() and process.returncode == 0
        if process.returncode == 0:  # trained to its end
            same_result(folder, unbroken)
            shutil.rmtree(folder)
    record_property('row', ('signals to a run', stops))
    record_property('seconds', longest)


@pytest.mark.trials
@pytest.mark.parametrize('part', range(PARTS))
def test_exceptions_at_random_lose_nothing(part, coco_folder, tmp_path, record_property):
    mesh = meshes.make_mesh(jax.devices()[:1])
    train(tiny_config(data=coco_folder), tmp_path / 'unbroken', mesh=mesh)
    rng, trials, errors = random.Random(part), 0, (RuntimeError, KeyboardInterrupt, MemoryError, OSError)
    while trials < count(50):
        folder, moments = tmp_path / str(trials), rng.sample(range(18), 3)

        def fail(step, moments=moments):
            if step.number in moments:
                moments.remove(step.number)
                raise rng.choice(errors)('a fault of the test')

        while moments:
            with pytest.raises(errors):
                train(tiny_config(data=coco_folder), folder, mesh=mesh, on_step=fail)
            trials += 1
        train(tiny_config(data=coco_folder), folder, mesh=mesh)
        same_result(folder, tmp_path / 'unbroken')
    record_property('row', ('exceptions while training', trials))


WRITERS = {'jax': checkpoint.write, 'hf': hf.write, 'yolos': reference.write}


@pytest.mark.trials
@pytest.mark.parametrize('form', WRITERS)
def test_conversions_killed_at_random_leave_nothing_or_all(form, tmp_path, record_property):
    make_hf(TINY, num_classes=5).save_pretrained(tmp_path / 'x')
    rng, expected, kills = random.Random(form), read_detector(tmp_path / 'x').params, 0
    trials = itertools.count()
    while kills < max(round(20 * SCALE), 1):  # those that were done before count as none
        output = tmp_path / f'out-{next(trials)}'
        options = [f'--input={tmp_path / "x"}', f'--output={output}', f'--to={form}']
        process = subprocess.Popen([sys.executable, 'convert_torch_weights.py', *options], cwd=ROOT)
        try:
            process.wait(rng.uniform(0.5, 4))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if output.exists():
            params = read_detector(output / 'yolos.pth' if form == 'yolos' else output).params
            jax.tree.map(np.testing.assert_array_equal, params, expected)
    record_property('row', ('conversions killed', kills))


@pytest.mark.trials
@pytest.mark.parametrize('megabytes', [1, 2, 3, 4, 5, 6, 8, 10])
def test_a_full_disk_ends_a_run_in_one_line_and_it_resumes(
    megabytes, coco_folder, unbroken, tmp_path, record_property
):
    disk = tmp_path / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', disk], check=True)
    try:
        process = start(disk / 'run', coco_folder)
        _, err = process.communicate()
        last = (err.strip().splitlines() or [''])[-1]
        assert process.returncode == 0 or last.startswith('error: ') and 'Traceback' not in err, err
        if (disk / 'run' / 'checkpoints').exists():
            shutil.copytree(disk / 'run', tmp_path / 'run')
            process = start(tmp_path / 'run', coco_folder)
            _, err = process.communicate()
            assert process.returncode == 0, err
            same_result(tmp_path / 'run', unbroken)
    finally:
        subprocess.run(['umount', disk], check=True)
    record_property('row', ('disks that fill up', 1))
