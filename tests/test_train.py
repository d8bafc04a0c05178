import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from test_backbones import make_vit, torches

import train
from configs import finetune, quickstart
from yolos_jax import adapt, checkpoints, progress, run, sharding, weights
from yolos_jax.data import records
from yolos_jax.errors import InputError

ROOT = Path(train.__file__).parent


def tiny(**changes):
    """The quickstart made smaller: 3 epochs of 6 steps, saved and logged at uneven intervals."""
    c = quickstart.get_config()
    with c.unlocked():
        c.model.update(width=32, depth=2, heads=2, num_det_tokens=6)
        c.update(
            epochs=3,
            learning_rate=1e-3,
            batch_size=4,
            log_every=4,
            save_every=5,
            eval_every=2,
            num_lengths=1,
        )
        c.update({name: str(v) if name == 'data' else v for name, v in changes.items()})
    return c


def launch(config, workdir, stop_after=None, devices=1):
    """Train in `workdir` on so many devices; SIGTERM arrives while step `stop_after` runs."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step, done = progress.Progress.step, []

    def counted(self, images):
        step(self, images)
        done.append(1)
        if len(done) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, run.folder(workdir):
        patch.setattr(sharding, 'make_mesh', lambda: mesh)
        patch.setattr(progress.Progress, 'step', counted)
        train.train(config, Path(workdir))


def result(workdir):
    """All that a run leaves: the last state, its parameters, and its metrics but for the speed."""
    folder = workdir / 'checkpoints'
    params, meta = checkpoints.read(folder, checkpoints.steps(folder)[-1])
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    for line in lines:
        line.pop('images_per_s', None)
    return params, meta['checksums'], lines


@pytest.fixture(scope='module')
def unbroken(coco_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    launch(tiny(data=coco_folder), workdir)
    return workdir


def test_a_run_leaves_what_it_promises(unbroken):
    _, _, lines = result(unbroken)
    assert {line['step'] for line in lines if 'AP' in line} == {12, 18}
    assert [line['step'] for line in lines if 'loss' in line] == [4, 8, 12, 16]
    assert [line['step'] for line in lines if 'epoch_loss' in line] == [6, 12, 18]
    losses = [line['epoch_loss'] for line in lines if 'epoch_loss' in line]
    assert losses[2] < 0.95 * losses[0]  # it learns
    assert (unbroken / 'curves.png').stat().st_size > 10_000
    assert list(unbroken.glob('events.out.tfevents.*'))
    found = weights.read(unbroken)
    assert found.classes == {1: 'circle', 2: 'square', 3: 'triangle'} and found.size == 112


@pytest.mark.parametrize('step', [1, 5, 6, 11, 17])
def test_a_run_stopped_after_any_step_ends_as_an_unbroken_one(step, unbroken, coco_folder, tmp_path):
    launch(tiny(data=coco_folder), tmp_path, step)
    assert checkpoints.steps(tmp_path / 'checkpoints')[-1] == step
    launch(tiny(data=coco_folder), tmp_path)
    params, checksums, lines = result(tmp_path)
    expected = result(unbroken)
    jax.tree.map(np.testing.assert_array_equal, params, expected[0])
    assert checksums == expected[1]  # the optimiser's state too
    assert lines == expected[2]


def test_a_killed_run_ends_as_an_unbroken_one(unbroken, coco_folder, tmp_path, monkeypatch):
    """What was written after the last checkpoint is done again, and stands once."""
    take = progress.Tally.take

    def crash(self, which):
        if which == 'window' and self._waiting[0] == 7:
            raise KeyboardInterrupt
        return take(self, which)

    monkeypatch.setattr(progress.Tally, 'take', crash)
    with pytest.raises(KeyboardInterrupt):
        launch(tiny(data=coco_folder), tmp_path)
    monkeypatch.undo()
    launch(tiny(data=coco_folder), tmp_path)
    assert result(tmp_path)[1:] == result(unbroken)[1:]


def test_eight_devices_train_as_one_does(coco_folder, tmp_path):
    losses = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        launch(tiny(data=coco_folder, batch_size=8, log_every=1), workdir, devices=devices)
        losses.append([line['loss'] for line in result(workdir)[2] if 'loss' in line])
    assert len(losses[0]) == 9
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_fine_tuning_starts_from_a_run_and_keeps_known_classes(unbroken, coco_folder, tmp_path):
    found = weights.read(unbroken)
    fewer = {5: 'Triangle', 9: 'star'}
    changed, said = adapt.with_classes(found, fewer, 0)
    assert '2 classes, 1 of them kept' in said and changed.model.num_classes == 10
    old, new = (w.params['class_embed']['layers_2'] for w in (found, changed))
    np.testing.assert_array_equal(new['kernel'][:, 5], old['kernel'][:, 3])
    np.testing.assert_array_equal(new['kernel'][:, 10], old['kernel'][:, 4])  # no object
    with pytest.raises(InputError, match='reset_classes'):
        adapt.check_classes(found, fewer, 'x.json')
    config = tiny(data=coco_folder, init_from=str(unbroken), epochs=1)
    launch(config, tmp_path)
    first = next(line['loss'] for line in result(tmp_path)[2] if 'loss' in line)
    scratch = next(line['loss'] for line in result(unbroken)[2] if 'loss' in line)
    assert first < 0.95 * scratch


def test_the_finetune_config_takes_the_model_from_the_weights(unbroken, coco_folder, tmp_path):
    config = finetune.get_config()
    with config.unlocked():
        small = tiny()
        config.update(data=str(coco_folder), init_from=str(unbroken), epochs=1, batch_size=8)
        config.update(eval_size=small.eval_size, eval_max_size=small.eval_max_size, num_lengths=1)
        config.augment.update(small.augment)
    launch(config, tmp_path)
    assert weights.read(tmp_path).model.num_det_tokens == 6


@pytest.mark.parametrize(
    ('init_from', 'width', 'says'),
    [('', 0, 'name a detector, or set the model'), ('run', 64, 'config.model.width is 64, and 32 in')],
)
def test_a_model_that_is_not_the_weights_is_named(init_from, width, says, unbroken, coco_folder):
    config = tiny(init_from=init_from and str(unbroken))
    with config.unlocked():
        config.model.width = width
    with pytest.raises(InputError, match=says):
        train.make_start(config, records.read(coco_folder, 'train2017'))


def test_training_starts_from_a_backbone(coco_folder, tmp_path):
    vit = make_vit()
    torch.save({'model': torches(vit)}, tmp_path / 'deit.pth')
    config = tiny(init_from=str(tmp_path / 'deit.pth'))
    start = train.make_start(config, records.read(coco_folder, 'train2017'))
    bias = start.params['backbone']['norm']['bias']
    np.testing.assert_array_equal(bias, vit['norm.bias'])
    assert start.about['source'] == 'deit.pth' and start.classes[3] == 'triangle'


def test_a_length_is_compiled_once(coco_folder, tmp_path, monkeypatch):
    lengths, compiler = [], train.compile_step

    def counted(train_step, state, batch, log):
        lengths.append(batch['patches'].shape[1])
        return compiler(train_step, state, batch, log)

    monkeypatch.setattr(train, 'compile_step', counted)
    launch(tiny(data=coco_folder, num_lengths=3, eval_every=9), tmp_path)
    assert 2 <= len(lengths) <= 3 and len(set(lengths)) == len(lengths)


def test_a_run_is_not_resumed_with_another_config(unbroken, coco_folder):
    with pytest.raises(InputError, match=r'learning_rate: .* then, 0.5 now'):
        launch(tiny(data=coco_folder, learning_rate=0.5), unbroken)


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    script = (
        'import sys, time\nfrom yolos_jax import run\n'
        'with run.folder(sys.argv[1]):\n    print(1, flush=True)\n    time.sleep(60)'
    )
    other = subprocess.Popen([sys.executable, '-c', script, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match=f'in use by another run .process {other.pid}'):
            with run.folder(tmp_path):
                pass
    finally:
        other.kill()
        other.wait()
    with run.folder(tmp_path):  # a killed run's lock is no obstacle
        pass


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'data': '/nowhere'}, '/nowhere: no such data folder'),
        ({'batch_size': 3}, 'config.batch_size is 3, which does not divide over 8 devices'),
        ({'batch_size': 32}, '24 images are less than one batch of 32'),
        ({'images_per_group': 3}, 'config.images_per_group is 3'),
        ({'init_from': '/nowhere'}, '/nowhere: no such file or folder'),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_compiled(
    changes, says, coco_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, 'compile_step', None)
    with pytest.raises(InputError, match=says):
        launch(tiny(**({'data': coco_folder, 'batch_size': 8} | changes)), tmp_path, devices=8)


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        (['--config.lerning_rate=1'], 'Did you mean "learning_rate"'),
        (['--config.model.widht=1'], 'Did you mean "width"'),
        (['--config.batch_size=many'], "--config.batch_size=many: invalid literal for int.* 'many'"),
        (['--wokdir=x'], 'Did you mean: workdir'),
        (['--config.data=/nowhere'], 'error: /nowhere: no such data folder'),
    ],
)
def test_the_script_says_what_is_wrong_in_one_line(flags, says, tmp_path):
    command = [
        sys.executable,
        'train.py',
        '--config=configs/quickstart.py',
        f'--workdir={tmp_path}',
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    import re

    assert re.search(says, done.stderr)


@pytest.mark.parametrize('name', [path.stem for path in (ROOT / 'configs').glob('*.py')])
def test_every_config_describes_itself(name):
    module = importlib.import_module(f'configs.{name}')
    assert module.get_config().batch_size > 0
    if name != 'common':
        assert f'--config=configs/{name}.py' in module.__doc__ and 'AP' in module.__doc__
