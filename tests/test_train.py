import dataclasses
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, launch, make_vit, read_detector, result, tiny_config, torches

from yolos_jax.data import records
from yolos_jax.errors import DivergedError, InputError
from yolos_jax.run import mesh as meshes
from yolos_jax.run.starting_point import make_start
from yolos_jax.run.train import train
from yolos_jax.weights import adapt, checkpoint, step_ap


@pytest.fixture(scope='module')
def unbroken(coco_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    launch(tiny_config(data=coco_folder), folder)
    return folder


def test_a_run_leaves_metrics_curves_and_checkpoints(unbroken):
    _, _, lines = result(unbroken)
    assert {line['step'] for line in lines if 'AP' in line} == {12, 18}
    assert [line['step'] for line in lines if 'loss' in line] == [4, 8, 12, 16]
    assert [line['step'] for line in lines if 'epoch_loss' in line] == [6, 12, 18]
    losses = [line['epoch_loss'] for line in lines if 'epoch_loss' in line]
    assert losses[2] < 0.95 * losses[0]  # it learns
    assert (unbroken / 'curves.png').stat().st_size > 10_000
    board = b''.join(path.read_bytes() for path in unbroken.glob('events.out.tfevents.*'))
    for tag in (b'val_loss', b'learning_rate', b'grad_norm', b'validation/7', b'_hparams_/session_start'):
        assert tag in board
    card = (unbroken / 'README.md').read_text()
    assert '| training images | 24, with ' in card and '| starts, steps lost to stops | 1, 0 |' in card
    pretrained = read_detector(unbroken)
    assert pretrained.about['training']['hardware'].startswith('1 x cpu')
    assert pretrained.classes == {1: 'circle', 2: 'square', 3: 'triangle'} and pretrained.size == 112


def test_a_second_run_in_the_process_is_refused_while_the_first_one_trains(coco_folder, tmp_path):
    def second(step):
        with pytest.raises(InputError, match='this process trains already'):
            train(tiny_config(data=coco_folder), tmp_path / 'second')

    launch(tiny_config(data=coco_folder), tmp_path / 'first', stop_after=1, on_step=second)
    assert not (tmp_path / 'second').exists()


@pytest.mark.parametrize('step', [pytest.param(1, marks=pytest.mark.trials), 6])
def test_a_run_stopped_after_any_step_ends_as_an_unbroken_one(step, unbroken, coco_folder, tmp_path):
    held = [], []  # bytes on all devices, in each start
    note = lambda start: held[start].append(sum(x.nbytes for x in jax.live_arrays()))
    launch(tiny_config(data=coco_folder), tmp_path, step, on_step=lambda _: note(0))
    assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == step
    gc.collect()
    launch(tiny_config(data=coco_folder), tmp_path, on_step=lambda _: note(1))
    params, checksums, lines = result(tmp_path)
    assert max(held[1]) < max(held[0]) + sum(x.nbytes for x in jax.tree.leaves(params))
    expected = result(unbroken)
    jax.tree.map(np.testing.assert_array_equal, params, expected[0])
    assert checksums == expected[1]  # the optimiser's state too
    assert lines == expected[2]


def test_a_killed_run_ends_as_an_unbroken_one(unbroken, coco_folder, tmp_path):
    """Steps after the last checkpoint are repeated, and their metrics are written only once."""

    def crash(step):
        if step.number == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(tiny_config(data=coco_folder), tmp_path, on_step=crash)
    shutil.rmtree(tmp_path / 'checkpoints' / '9')  # which a kill would not have let it save
    launch(tiny_config(data=coco_folder), tmp_path)
    assert result(tmp_path)[1:] == result(unbroken)[1:]


def test_a_run_interrupted_or_stopped_in_a_notebook_ends_as_an_unbroken_one(
    unbroken, coco_folder, tmp_path
):
    """Python's own Ctrl-C, an error of `on_step` and its True: each saves the step that was complete."""

    def act(step):
        if step.number == 3:
            signal.raise_signal(signal.SIGINT)
        if step.number == 6:
            raise RuntimeError('a fault of the test')
        # no bool means nothing
        return step.metrics['loss'] > 0 if step.number == 8 else step.metrics['loss']

    options, ends = dict(mesh=meshes.make_mesh(jax.devices()[:1]), on_step=act), []
    held = sum(x.nbytes for x in jax.live_arrays())
    for _ in range(4):
        try:
            ends.append(train(tiny_config(data=coco_folder), tmp_path, **options))
        except (KeyboardInterrupt, RuntimeError) as error:
            # a notebook keeps the error: its traceback must not hold the state on the device
            assert sum(x.nbytes for x in jax.live_arrays()) < held + 500_000  # a state has 680,000
            ends.append(type(error))
        ends.append(checkpoint.steps(tmp_path / 'checkpoints')[-1])
    assert ends[:6] == [KeyboardInterrupt, 4, RuntimeError, 7, 0, 9] and ends[6] is None
    assert result(tmp_path)[1:] == result(unbroken)[1:]


@pytest.mark.trials
def test_eight_devices_train_as_one_does(coco_folder, tmp_path):
    losses = []
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        config = tiny_config(data=coco_folder, batch_size=8, log_every=1, epochs=2)
        launch(config, folder, devices=devices)
        losses.append([line['loss'] for line in result(folder)[2] if 'loss' in line])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_fine_tuning_starts_from_a_run_and_keeps_known_classes(unbroken, coco_folder, tmp_path):
    pretrained = read_detector(unbroken)
    fewer = {5: 'Triangle', 9: 'star'}
    changed, report = adapt.with_classes(pretrained, fewer, 0)
    assert '2 classes, 1 of them kept' in report and changed.model.num_classes == 10
    old, new = (p.params['class_embed']['layers_2'] for p in (pretrained, changed))
    np.testing.assert_array_equal(new['kernel'][:, 5], old['kernel'][:, 3])
    np.testing.assert_array_equal(new['kernel'][:, 10], old['kernel'][:, 4])  # no object
    with pytest.raises(InputError, match='not those of the weights'):
        adapt.check_classes(pretrained, fewer, 'x.json')
    launch(tiny_config(data=coco_folder, init_from=str(unbroken), epochs=1), tmp_path)
    first = next(line['loss'] for line in result(tmp_path)[2] if 'loss' in line)
    scratch = next(line['loss'] for line in result(unbroken)[2] if 'loss' in line)
    assert first < 0.95 * scratch


@pytest.mark.parametrize(
    ('init_from', 'width', 'says'),
    [('', 0, 'name a detector, or set the model'), ('run', 64, 'model.width is 64, but 32 in')],
)
def test_a_missing_model_or_one_that_contradicts_the_weights_is_refused(
    init_from, width, says, unbroken, coco_folder
):
    config = tiny_config(init_from=init_from and str(unbroken))
    with config.unlocked():
        config.model.width = width
    with pytest.raises(InputError, match=says):
        make_start(config, records.read(coco_folder, 'train2017'), 'cpu')


def test_training_starts_from_a_backbone(coco_folder, tmp_path):
    vit = make_vit()
    torch.save({'model': torches(vit)}, tmp_path / 'deit.pth')
    config = tiny_config(init_from=str(tmp_path / 'deit.pth'))
    start = make_start(config, records.read(coco_folder, 'train2017'), 'cpu')
    bias = start.params['backbone']['norm']['bias']
    np.testing.assert_array_equal(bias, vit['norm.bias'])
    assert start.about['source'] == 'deit.pth' and start.classes[3] == 'triangle'


def test_a_length_is_compiled_once(coco_folder, tmp_path, capsys):
    lengths = []
    config = tiny_config(data=coco_folder, num_lengths=2, epochs=1)
    launch(config, tmp_path, on_step=lambda step: lengths.append(step.length))
    assert 2 == len(set(lengths)) < len(lengths)
    compiled = re.findall(r'compiled for 4 sequences of (\d+) patches', capsys.readouterr().out)
    assert sorted(map(int, compiled)) == sorted(set(lengths))


def test_a_run_is_not_resumed_with_another_config(unbroken, coco_folder):
    with pytest.raises(InputError, match=r'learning_rate: .* then, 0.5 now'):
        launch(tiny_config(data=coco_folder, learning_rate=0.5), unbroken)


@pytest.mark.parametrize(
    ('changes', 'says', 'argument'),
    [
        ({'data': '/nowhere'}, '/nowhere: no such data folder', 'data'),
        ({'batch_size': 3}, 'batch_size is 3, which does not divide over 8 devices', 'batch_size'),
        ({'batch_size': 32}, '24 images are less than one batch of 32', 'batch_size'),
        ({'images_per_group': 3}, 'images_per_group is 3', 'images_per_group'),
        ({'init_from': '/nowhere'}, '/nowhere: no such file or folder', None),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_compiled(
    changes, says, argument, coco_folder, tmp_path, capsys
):
    with pytest.raises(InputError, match=says) as error:
        launch(tiny_config(**({'data': coco_folder, 'batch_size': 8} | changes)), tmp_path, devices=8)
    assert error.value.argument == argument and 'compiled' not in capsys.readouterr().out


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'configs').glob('[a-z]*.py')))
def test_every_config_describes_itself(name):
    module = importlib.import_module(f'yolos_jax.configs.{name}')
    assert module.get_config().batch_size > 0
    if name != 'common':
        assert f'--config=configs/{name}.py' in module.__doc__
        assert ('pretrain.py' if name.startswith('deit') else 'AP') in module.__doc__


@pytest.fixture(scope='module')
def diverging(unbroken, tmp_path_factory):
    """Weights whose detections are not finite: the square of what a norm sees is beyond float32."""
    pretrained = read_detector(unbroken)
    params = jax.tree.map(lambda x: x * np.float32(1e25), pretrained.params)
    folder = tmp_path_factory.mktemp('diverging') / 'x'
    checkpoint.write(dataclasses.replace(pretrained, params=params), folder)
    return folder


@pytest.mark.row('starts of a run that is not finite', count=2)
def test_a_run_whose_loss_is_not_finite_fails_at_every_start(diverging, coco_folder, tmp_path):
    """Of six steps and of eighteen, less and more than it takes to give up."""
    config = tiny_config(data=coco_folder, init_from=str(diverging), save_every=1, eval_every=9)
    steps = []
    for config.epochs, tried in (1, 6), (3, 10):
        with pytest.raises(DivergedError, match=rf'not finite in {tried} steps .*images \d+, \d+') as error:
            launch(config, tmp_path, on_step=lambda step: steps.append(step.number))
        assert error.value.exit_status == 3 and checkpoint.steps(tmp_path / 'checkpoints') == []
    assert steps == [*range(6), *range(10)]


@pytest.mark.parametrize('step', [pytest.param(0, marks=pytest.mark.trials), 8])
def test_an_exception_saves_what_was_trained_and_the_run_ends_as_an_unbroken_one(
    step, unbroken, coco_folder, tmp_path
):
    """The loader fails after the step: a photograph was deleted meanwhile."""
    data = tmp_path / 'data'
    shutil.copytree(coco_folder, data)
    away = tmp_path / 'away'

    def take_away(current):
        if current.number == step:
            (data / 'train2017').rename(away)

    with pytest.raises(InputError, match='images are bad'):
        launch(tiny_config(data=data), tmp_path / 'run', on_step=take_away)
    assert checkpoint.steps(tmp_path / 'run' / 'checkpoints')[-1] > step
    away.rename(data / 'train2017')
    launch(tiny_config(data=data), tmp_path / 'run')
    assert result(tmp_path / 'run')[1:] == result(unbroken)[1:]


@pytest.mark.row('data changed under a run')
@pytest.mark.parametrize(
    ('field', 'value', 'says'),
    [
        ('file_name', None, 'file names of train'),
        ('width', 10_000, 'image sizes of train'),
        ('bbox', [1, 2, 30, 31.5], 'boxes of train'),
        ('category_id', 3, 'labels of train'),
        ('name', 'disc', 'classes of train'),
    ],
)
def test_a_run_does_not_resume_on_other_data(field, value, says, unbroken, coco_folder, tmp_path):
    shutil.copytree(unbroken, tmp_path / 'run')
    path = shutil.copytree(coco_folder, tmp_path / 'data') / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    kind = {'file_name': 'images', 'width': 'images', 'name': 'categories'}.get(field, 'annotations')
    entry = next(x for x in content[kind] if x[field] != value)
    if field == 'file_name':
        value = f'other-{entry[field]}'
        shutil.copy(path.parents[1] / 'train2017' / entry[field], path.parents[1] / 'train2017' / value)
    entry[field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f'other data .*{says}'):
        launch(tiny_config(data=tmp_path / 'data'), tmp_path / 'run')


def test_a_run_that_lacks_its_last_evaluation_makes_it_when_restarted(unbroken, coco_folder, tmp_path):
    """With the same data elsewhere."""
    shutil.copytree(unbroken, tmp_path / 'run')
    data = shutil.copytree(coco_folder, tmp_path / 'data')
    newest = tmp_path / 'run' / 'checkpoints' / '18'
    (newest / step_ap.FILE).unlink()
    launch(tiny_config(data=data), tmp_path / 'run')
    assert result(tmp_path / 'run')[2] == result(unbroken)[2]
    assert step_ap.read(newest) is not None


BAD_VALUES = {
    'learning_rate': [float('inf'), float('nan'), -1.0, 2.0],
    'weight_decay': [float('nan'), -0.1],
    'clip_norm': [float('nan'), 0.0, float('inf')],
    'save_every': [-1],
    'log_every': [0],
    'eval_every': [0],
    'batch_size': [0],
    'num_lengths': [0],
    'seed': [-1],
    'val_fraction': [-0.1, 1.0],
    'ema': [1.0],
}


@pytest.mark.parametrize('name', BAD_VALUES)
def test_a_number_out_of_its_range_is_refused_at_the_start(name, coco_folder, tmp_path):
    for value in BAD_VALUES[name]:
        config = tiny_config(data=coco_folder)
        with config.unlocked(), config.ignore_type():
            config[name] = value
        with pytest.raises(InputError, match=f'{name} is {value}') as error:
            launch(config, tmp_path)
        assert error.value.argument == name


@pytest.mark.parametrize(
    ('name', 'value', 'says'),
    [('width', -3, 'width is -3'), ('heads', 5, 'width 32 is not a multiple of heads 5'),
     ('depth', 10**9, 'depth is 1000000000'), ('dtype', 'float8', 'model.dtype is float8')],
)  # fmt: skip
def test_a_model_of_nonsensical_sizes_is_refused_at_the_start(name, value, says, coco_folder, tmp_path):
    config = tiny_config(data=coco_folder)
    with config.unlocked():
        config.model[name] = value
    with pytest.raises(InputError, match=says):
        launch(config, tmp_path)


def spawn(*arguments, **options):
    command = [sys.executable, 'train.py', '--config=configs/quickstart.py', *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes | options)


SMALL = [f'--config.model.{x}' for x in 'width=32 depth=2 heads=2 num_det_tokens=6'.split()]


@pytest.mark.parametrize(
    ('number', 'line'),
    [
        pytest.param(signal.SIGTERM, 'devices', marks=pytest.mark.trials),
        (signal.SIGINT, 'compiled for'),
        (signal.SIGTERM, 'step 2/'),
    ],
)
def test_a_signal_ends_the_script_with_its_own_status_and_loses_nothing(
    number, line, coco_folder, tmp_path
):
    """While it compiles, and while it trains; before, it ends at once."""
    flags = [f'--workdir={tmp_path}', f'--config.data={coco_folder}', '--config.log_every=1', *SMALL]
    process = spawn(*flags, '--config.epochs=1000', '--config.eval_every=1000')
    for printed in process.stdout:
        if printed.startswith(line):
            break
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number and 'Traceback' not in err
    if line != 'devices':
        step = int(re.search(r'stopped after step (\d+)', out)[1])
        assert checkpoint.steps(tmp_path / 'checkpoints') == [step] * (step > 0)


def test_a_run_survives_a_closed_terminal_and_saves_on_sighup(coco_folder, tmp_path):
    flags = [f'--workdir={tmp_path}', f'--config.data={coco_folder}', '--config.log_every=1', *SMALL]
    process = spawn(*flags, '--config.epochs=1000', '--config.eval_every=1000')
    next(line for line in process.stdout if line.startswith('step 2/'))
    process.stdout.close()
    process.stderr.close()
    while 'step 9/' not in (tmp_path / 'log.txt').read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 128 + signal.SIGHUP
    assert checkpoint.steps(tmp_path / 'checkpoints')[0] >= 9


def test_an_unexpected_error_is_one_line_and_its_traceback_is_shown_on_demand(coco_folder, tmp_path):
    flags = [f'--workdir={tmp_path}', f'--config.data={coco_folder}', '--config.epochs=0', *SMALL]
    for extra in ([], ['--traceback']):
        process = spawn(*flags, *extra, env=os.environ | {'JAX_PLATFORMS': 'abacus'})
        _, err = process.communicate()
        assert process.returncode == 1 and ('Traceback' in err) == bool(extra)
        last = err.strip().splitlines()[-1]
        assert last.startswith('error: RuntimeError: ') and "'abacus'" in last


def test_an_error_before_the_first_step_leaves_no_checkpoint(coco_folder, tmp_path):
    """With one, the folder would refuse the config that is mended."""
    data = shutil.copytree(coco_folder, tmp_path / 'data')
    for image in (data / 'train2017').iterdir():
        image.write_bytes(b'')
    with pytest.raises(InputError, match='images are bad'):
        launch(tiny_config(data=data), tmp_path / 'run')
    assert checkpoint.steps(tmp_path / 'run' / 'checkpoints') == []
