"""Options of a run beyond its recipe: freezing, moving averages, patience, more epochs, and its files."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    launch,
    make_hf,
    make_vit,
    metric_lines,
    read_detector,
    reference_tensors,
    result,
    swap_classes,
    tiny_config,
    torches,
)
from yolos_jax.configs import finetune

from yolos_jax import evaluation, optim, steps, weights
from yolos_jax.data import geometry, records
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import detection
from yolos_jax.run.starting_point import frozen_blocks, model_fields
from yolos_jax.weights import Pretrained, checkpoint


@pytest.fixture(scope='module')
def averaged(coco_folder, tmp_path_factory):
    """A run of two epochs with a moving average."""
    folder = tmp_path_factory.mktemp('averaged')
    launch(tiny_config(data=coco_folder, epochs=2, eval_every=1, ema=0.99), folder)
    return folder


def test_a_run_writes_its_config_log_and_metrics_to_its_folder(averaged):
    config = json.loads((averaged / 'config.json').read_text())
    assert config['ema'] == 0.99 and config['model.width'] == 32
    text = (averaged / 'log.txt').read_text()
    assert 'parameters ' in text and 'AP_small' in text and 'of the time was training' in text
    lines = metric_lines(averaged)
    assert [line['epoch'] for line in lines if 'epoch_loss' in line] == [1, 2]
    times = [line['time'] for line in lines]
    assert times == sorted(times) and times[-1] - times[0] < 3600


def test_the_exported_detector_is_the_moving_average(averaged):
    """It equals the saved average bit for bit, which differs from the trained parameters."""
    newest = checkpoint.steps(averaged / 'checkpoints')[-1]
    exported = read_detector(averaged / 'checkpoints' / str(newest)).params
    from orbax.checkpoint import PyTreeCheckpointHandler

    state = PyTreeCheckpointHandler().restore(averaged / 'checkpoints' / str(newest) / 'state')
    jax.tree.map(np.testing.assert_array_equal, exported, state['ema'])
    differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state['ema'], state['params'])
    assert max(jax.tree.leaves(differ)) > 1e-4


def test_the_moving_average_is_what_is_evaluated(averaged, coco_folder):
    newest = checkpoint.steps(averaged / 'checkpoints')[-1]
    saved = read_detector(averaged / 'checkpoints' / str(newest))
    val_set = records.read(coco_folder, 'val2017')
    batches = EvalBatches(val_set, size=saved.size, max_size=saved.max_size, batch_size=4, max_targets=100)
    step = steps.make_evaluation_step(saved.model)
    outputs = evaluation.detect(lambda batch: jax.device_get(step(saved.params, batch)), batches)
    (line,) = [line for line in metric_lines(averaged) if 'AP' in line and line['step'] == newest]
    assert line['val_loss'] == pytest.approx(evaluation.mean_losses(outputs)['val_loss'], rel=1e-5)


def test_the_metrics_of_a_run_have_its_rates_and_what_was_clipped(averaged):
    lines = [line for line in metric_lines(averaged) if 'loss' in line]
    rate = optim.learning_rate(1e-3, 2, 6)
    rates = [line['learning_rate'] for line in lines]
    np.testing.assert_allclose(rates, [rate(line['step'] - 1) for line in lines])
    assert [line['clipped'] for line in lines] == [1] * len(lines)  # all gradients are above 0.1
    board = b''.join(path.read_bytes() for path in averaged.glob('events.out.tfevents.*'))
    assert b'fresh_learning_rate' in board  # its config


def test_a_stopped_run_with_a_moving_average_ends_as_an_unbroken_one(averaged, coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, epochs=2, eval_every=1, ema=0.99)
    launch(config, tmp_path, stop_after=7)
    launch(config, tmp_path)
    assert result(tmp_path)[1:] == result(averaged)[1:]
    assert [line['starts'] for line in metric_lines(tmp_path) if 'starts' in line] == [1, 2, 2]


@pytest.mark.trials
def test_a_sharded_average_is_resumed_bit_for_bit(coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, epochs=1, batch_size=8, ema=0.9, shard_params=True)
    launch(config, tmp_path / 'unbroken', devices=8)
    launch(config, tmp_path / 'run', stop_after=2, devices=8)
    launch(config, tmp_path / 'run', devices=8)
    params, checksums, _ = result(tmp_path / 'run')
    assert checksums == result(tmp_path / 'unbroken')[1]
    assert any(name.startswith('ema/') for name in checksums)
    assert not np.array_equal(params['backbone']['norm']['bias'], np.zeros(32))


@pytest.fixture(scope='module')
def frozen(coco_folder, tmp_path_factory):
    """The parameters from which two runs start, and {what is frozen: the run's folder}."""
    config = tiny_config(data=coco_folder, epochs=1, weight_decay=0.1, log_every=1, clip_norm=1e9)
    start = _fresh_detector(config, tmp_path_factory.mktemp('frozen') / 'start')
    runs = {freeze: tmp_path_factory.mktemp('frozen') for freeze in ('backbone', '1')}
    for config.freeze, folder in runs.items():
        launch(config, folder)
    return start, runs


@pytest.mark.parametrize('freeze', ['backbone', '1'])
def test_frozen_parameters_stay_bit_for_bit_and_the_rest_is_trained(freeze, frozen):
    start, runs = frozen
    trained = read_detector(runs[freeze]).params
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), trained, start)
    assert not any(jax.tree.leaves([same['class_embed'], same['bbox_embed']]))
    assert same['backbone']['pos_embed'] and same['backbone']['cls_token']
    if freeze == 'backbone':
        assert all(jax.tree.leaves(same['backbone']))
    else:
        assert not same['backbone']['norm']['bias'] and not same['backbone']['det_token']
        blocks = [params['backbone']['blocks'] for params in (trained, start)]
        first, second = (
            jax.tree.map(lambda a, b, i=i: np.array_equal(a[i], b[i]), *blocks) for i in (0, 1)
        )
        assert all(jax.tree.leaves(first)) and not all(jax.tree.leaves(second))


def test_weights_that_are_new_are_not_frozen(coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, freeze='backbone')
    with pytest.raises(InputError, match='no weights to freeze'):
        launch(config, tmp_path / 'scratch')
    torch.save({'model': torches(make_vit(5, 32, 2))}, tmp_path / 'vit.pth')
    config.init_from = str(tmp_path / 'vit.pth')
    with pytest.raises(InputError, match=r'no \[DET\] tokens'):
        launch(config, tmp_path / 'vit-run')


def _fresh_detector(config, folder):
    """A detector of random weights, from which the config then starts; gives its parameters."""
    model = _model(config)
    params = jax.device_get(init_params(model, jax.random.key(config.seed)))
    classes = {1: 'circle', 2: 'square', 3: 'triangle'}
    checkpoint.write(Pretrained(model, params, classes, config.eval_size, config.eval_max_size), folder)
    config.init_from = str(folder)
    return params


def _model(config):
    return Yolos(**model_fields(config) | {'dtype': np.float32}, num_classes=4)


@pytest.mark.parametrize('freeze', ['3', 'heads', '-1'])
def test_a_freeze_that_is_no_number_of_blocks_is_named(freeze):
    with pytest.raises(InputError, match='nor a number of its 2 blocks') as error:
        frozen_blocks(tiny_config(freeze=freeze), _model(tiny_config()))
    assert error.value.argument == 'freeze'
    assert frozen_blocks(tiny_config(freeze='2'), _model(tiny_config())) == 2


def test_gradients_are_clipped_by_the_norm_of_the_trained_parameters_only():
    params = init_params(_model(tiny_config()), jax.random.key(0))
    ones = jax.tree.map(np.ones_like, params)
    optimizer = optim.make_optimizer(params, 1.0, 0.0, 1.0, frozen_blocks=2)
    _, state = optimizer.update(ones, optimizer.init(params), params)
    (moments,) = [
        s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(x := s, 'mu')
    ]
    heads = [params['class_embed'], params['bbox_embed']]
    count = sum(x.size for x in jax.tree.leaves(heads))
    np.testing.assert_allclose(
        moments.mu['class_embed']['layers_2']['bias'], 0.1 / np.sqrt(count), rtol=1e-5
    )
    assert not moments.mu['backbone']['pos_embed'].any()


def test_a_run_ends_when_its_ap_does_not_grow_where_it_is_evaluated(coco_folder, tmp_path, capsys):
    """After two epochs, four and six; patience of three epochs ends between the last two."""
    config = tiny_config(data=coco_folder, epochs=8, eval_every=2, learning_rate=0.0, patience=3)
    for _ in range(2):  # the same command does not train on
        assert launch(config, tmp_path) is None
        assert [line['step'] for line in metric_lines(tmp_path) if 'AP' in line] == [12, 24, 36]
        assert 'no improvement since step 12, for 3 epochs' in capsys.readouterr().out


@pytest.fixture(scope='module')
def longer(coco_folder, tmp_path_factory):
    """A run of an epoch that was trained for a second one; its log has a line every 100 steps."""
    folder = tmp_path_factory.mktemp('longer')
    for epochs in (1, 2):
        launch(tiny_config(data=coco_folder, epochs=epochs, log_every=100), folder)
    return folder


def test_a_finished_run_can_be_trained_for_longer(longer, coco_folder):
    assert '2 epochs instead of 1: from here on the learning rate' in (longer / 'log.txt').read_text()
    assert [line['step'] for line in metric_lines(longer) if 'AP' in line] == [6, 12]
    with pytest.raises(InputError, match='epochs: 2 then, 1 now'):
        launch(tiny_config(data=coco_folder, epochs=1), longer)


def test_small_data_is_logged_once_an_epoch(longer):
    assert [line['step'] for line in metric_lines(longer) if 'loss' in line] == [6, 12]


def test_a_run_whose_validation_classes_are_matched_by_name_resumes(coco_folder, tmp_path, capsys):
    swap_classes(shutil.copytree(coco_folder, tmp_path / 'data'), 'val2017')
    config = tiny_config(data=tmp_path / 'data', epochs=1)
    launch(config, tmp_path / 'run', stop_after=4)
    launch(config, tmp_path / 'run')
    assert 'matched by name' in capsys.readouterr().out
    assert [line['step'] for line in metric_lines(tmp_path / 'run') if 'AP' in line] == [6]
    swap_classes(tmp_path / 'data', 'val2017')
    with pytest.raises(InputError, match='labels of val differ'):
        launch(config, tmp_path / 'run')


def test_a_resumed_run_does_not_need_the_weights_it_started_from(coco_folder, tmp_path):
    torch.save({'model': torches(make_vit())}, tmp_path / 'vit.pth')
    config = tiny_config(data=coco_folder, epochs=2, init_from=str(tmp_path / 'vit.pth'))
    launch(config, tmp_path / 'unbroken')
    launch(config, tmp_path / 'run', stop_after=5)
    (tmp_path / 'vit.pth').unlink()
    launch(config, tmp_path / 'run')
    assert result(tmp_path / 'run')[1:] == result(tmp_path / 'unbroken')[1:]
    assert read_detector(tmp_path / 'run').about['source'] == 'vit.pth'
    launch(tiny_config(data=coco_folder, epochs=2), tmp_path / 'run')
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['init_from'] == str(tmp_path / 'vit.pth')  # which it did start from


def test_a_run_ends_where_no_image_of_the_validation_split_can_be_read(coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / 'data')
    data = records.read(tmp_path / 'data', 'val2017')
    for image in (tmp_path / 'data' / 'val2017').iterdir():
        image.write_bytes(image.read_bytes()[:100])
    outputs = {'index': np.arange(3), **{name: np.zeros((3, 1)) for name in ('boxes', 'scores', 'labels')}}
    assert detection.first_images(outputs, data, {}) == []  # TensorBoard alone lacks them
    config = tiny_config(data=tmp_path / 'data', bad_images=100, epochs=2)
    with pytest.raises(InputError, match='none of the images to evaluate on can be read'):
        launch(config, tmp_path / 'run')


def test_the_step_to_read_can_be_chosen_and_is_reported(averaged, tmp_path):
    newest = checkpoint.steps(averaged / 'checkpoints')[-1]
    said = []
    for path, step in ((averaged, newest), (averaged / 'checkpoints' / str(newest), None)):
        with weights.open(path, step) as source:
            assert source.detector(log=said.append).about['step'] == newest
    assert all(f'step {newest}, AP' in line for line in said)
    with weights.open(averaged) as source, pytest.raises(InputError, match='heads is for a .pth'):
        source.detector(heads=2)
    with pytest.raises(InputError, match=f'has no step 5; it has .*{newest}'):
        weights.open(averaged, 5)
    with pytest.raises(InputError, match='no checkpoints of a run'):
        shutil.copy(averaged / 'config.json', tmp_path / 'x.pth')
        weights.open(tmp_path / 'x.pth', 5)


def test_fine_tuning_takes_the_sizes_of_the_weights():
    config = finetune.get_config()
    recipe_of = lambda *sizes: geometry.Recipe.from_fields(config.augment, *sizes)
    recipe = recipe_of(112, 176)
    assert recipe.sizes == (64, 80, 96, 112) and recipe.max_size == 176
    eight_hundred = recipe_of(800, 1333)
    assert eight_hundred.sizes == tuple(range(480, 801, 16)) and eight_hundred.max_size == 1333
    crops = eight_hundred.crop_from, eight_hundred.crop_min, eight_hundred.crop_max
    assert crops == ((400, 500, 600), 384, 600)


def of_weights(folder, data, **changes):
    config = finetune.get_config()
    with config.unlocked():
        config.update(data=str(data), init_from=str(folder), epochs=0, batch_size=8)
        for name, value in changes.items():
            group, _, key = name.rpartition('__')
            (config[group] if group else config)[key] = value
    return config


def test_a_bound_that_is_not_given_is_that_of_the_weights(averaged, coco_folder):
    config = of_weights(averaged, coco_folder, augment__sizes=(96, 112))
    start = read_detector(averaged)
    recipe = geometry.Recipe.from_fields(config.augment, start.size, start.max_size)
    assert recipe.sizes == (96, 112) and recipe.max_size == 176


def test_fine_tuning_takes_and_names_the_model_of_weights(averaged, coco_folder, tmp_path, capsys):
    config = of_weights(averaged, coco_folder, epochs=1, num_lengths=1)
    launch(config, tmp_path / 'tuned')
    assert f'weights      {averaged}' in capsys.readouterr().out
    assert read_detector(tmp_path / 'tuned').model.num_det_tokens == 6
    card = (tmp_path / 'tuned' / 'README.md').read_text()
    assert f'| from | {averaged.name} |' in card and 'longest side in training' not in card
    launch(tiny_config(data=coco_folder, epochs=0), tmp_path / 'new')
    assert 'weights      from scratch' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'train_images': 'x'}, 'train_images is x, which has no effect without train_json'),
        ({'augment__crop_max': 300}, 'augment.crop_max is 300, which has no effect without augment.sizes'),
        ({'train_split': 'x', 'train_json': 'y'}, 'train_split is x, which has no effect with train_json'),
        ({'val_split': 'x', 'val_fraction': 0.5}, 'val_split is x, which has no effect with val_fraction'),
        ({'val_json': 'x', 'val_fraction': 0.5}, 'val_json is x, which has no effect with val_fraction'),
        ({'model__num_det_tokens': 50}, 'model.num_det_tokens is 50, but 6 in'),
        ({'model__width': 64}, 'model.width is 64, but model.depth 0; set both, or neither'),
        ({'model__eps': 0.01}, 'model.eps is 0.01, but 1e-06 in'),
        ({'lerning_rate': 0.1}, 'no such key: lerning_rate; did you mean learning_rate'),
        ({'eval_max_size': 8}, 'eval_max_size is 8, less than a patch'),
        ({'augment__crop_from': (), 'augment__sizes': (96,)}, 'crops are of 384 to 600 pixels'),
        ({'bad_images': -5}, 'bad_images is -5'),
        ({'val_json': 'caf\udce9.json'}, 'val_json is .* not UTF-8'),
    ],
)
def test_unused_or_invalid_config_values_are_refused(changes, says, averaged, coco_folder, tmp_path):
    with pytest.raises(InputError, match=says):
        launch(of_weights(averaged, coco_folder, **changes), tmp_path / 'run')


def test_a_run_of_an_earlier_version_with_unknown_keys_resumes(coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, epochs=1)
    launch(config, tmp_path)
    state = next((tmp_path / 'checkpoints' / '6' / 'meta').glob('metadata'))
    meta = json.loads(state.read_text())
    meta['config'] |= {'train_images': 'unread', 'note': 'unread'}
    meta['training']['software'] = 'yolos_jax 0.1'
    del meta['sha256'], meta['format']  # as version 0.1
    state.write_text(json.dumps(meta))
    with config.unlocked():
        config.update(epochs=2, train_images='unread', note='unread')
        del config.spike_factor
    launch(config, tmp_path)
    assert [line['step'] for line in metric_lines(tmp_path) if 'AP' in line] == [6, 12]
    assert 'saved with yolos_jax 0.1, now yolos_jax' in (tmp_path / 'log.txt').read_text()


def test_a_folder_that_orbax_takes_for_a_pattern_is_refused(coco_folder, averaged, tmp_path):
    for write in (
        lambda folder: launch(tiny_config(data=coco_folder), folder),
        lambda folder: checkpoint.write(read_detector(averaged), folder),
    ):
        with pytest.raises(InputError, match='checkpoints cannot be in a folder with'):
            write(tmp_path / 'lr[1e-4]' / 'x')
        assert not (tmp_path / 'lr[1e-4]').exists()


def test_a_start_that_failed_does_not_choose_the_validation_set_of_the_next(coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, epochs=1, val_fraction=0.1, init_from='/nowhere.pth')
    with pytest.raises(InputError, match='nowhere.pth'):
        launch(config, tmp_path)
    launch(tiny_config(data=coco_folder, epochs=1, val_fraction=0.5), tmp_path, stop_after=1)
    assert '12 images to train, 12 to evaluate' in (tmp_path / 'log.txt').read_text()


def test_a_copy_of_a_run_without_its_arrays_is_refused(averaged, coco_folder, tmp_path):
    """It would start from parameters that are zero."""
    shutil.copytree(averaged, tmp_path / 'run', ignore=shutil.ignore_patterns('state'))
    with pytest.raises(InputError, match='no checkpoint is complete .parts of .* are missing'):
        launch(tiny_config(data=coco_folder, epochs=2, eval_every=1, ema=0.99), tmp_path / 'run')
    names = [sorted(p.name for p in (x / 'checkpoints').iterdir()) for x in (averaged, tmp_path / 'run')]
    assert names[0] == names[1]


def test_a_refused_start_does_not_change_the_validation_set_of_the_run(coco_folder, tmp_path):
    data = shutil.copytree(coco_folder, tmp_path / 'data')
    config = tiny_config(data=data, epochs=1, val_fraction=0.2)
    launch(config, tmp_path / 'run')
    before = (tmp_path / 'run' / 'val.json').read_bytes()
    path = data / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    content['images'] = content['images'][1:]
    ids = {image['id'] for image in content['images']}
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in ids]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match='other data'):
        launch(config, tmp_path / 'run')
    assert (tmp_path / 'run' / 'val.json').read_bytes() == before


def test_the_norm_of_the_gradient_is_of_what_is_trained(frozen):
    first = [metric_lines(frozen[1][freeze])[0]['grad_norm'] for freeze in ('backbone', '1')]
    assert 0 < first[0] < 0.95 * first[1]


def test_weights_that_lack_values_have_to_be_converted_first(coco_folder, tmp_path):
    tensors = {name: torch.tensor(x.numpy()) for name, x in reference_tensors(make_hf(TINY)).items()}
    torch.save({'model': tensors}, tmp_path / 'x.pth')
    config = tiny_config(data=coco_folder, init_from=str(tmp_path / 'x.pth'))
    with pytest.raises(InputError, match='give heads to `yolos convert`, and use its output as init_from'):
        launch(config, tmp_path / 'run')
