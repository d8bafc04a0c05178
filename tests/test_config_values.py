"""The values of a config reach the place that uses them: optimiser, loss, step, start and batches."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import (
    TINY,
    make_targets,
    make_vit,
    noise,
    pretraining_config,
    read_deit,
    swap_classes,
    tiny_config,
    torches,
)  # fmt: skip

from yolos_jax import classification, classifier, losses, optim, steps
from yolos_jax.classifier import Classifier
from yolos_jax.data import loader, records
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import patchify
from yolos_jax.run import detection, pretraining, setup, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.starting_point import make_start, start_from_detector
from yolos_jax.weights import Pretrained, checkpoint, deit

MODEL = Classifier(width=32, depth=2, heads=2, num_classes=20, size=64)


def test_the_optimiser_and_the_loss_of_a_run_are_those_of_its_config():
    config = tiny_config(weight_decay=0.5, clip_norm=1e-3, learning_rate=0.1, fresh_learning_rate=0.2)
    config.images_per_group = 2
    model = Yolos(**TINY, num_classes=4)
    params = init_params(model, jax.random.key(0))
    start = Pretrained(model, params, {}, 64, 96)
    of_run = detection.make_optimizer(config, start, lambda step: 0.1)
    expected = optim.make_optimizer(params, lambda step: 0.1, 0.5, 1e-3, fresh_factor=2.0)
    ones = jax.tree.map(jnp.ones_like, params)
    moves = [jax.jit(x.update)(ones, x.init(params), params) for x in (of_run, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *moves)

    patches, grid = patchify([noise(64, 96, i) for i in range(2)])
    batch = make_targets((3, 0), 4, 4)[0] | {'patches': patches, 'grid': grid}
    outputs = jax.jit(model.apply)({'params': params}, patches, grid)
    set_loss = jax.jit(losses.set_loss, static_argnums=2)
    one, two = (float(set_loss(outputs, batch, group)[1]['loss_ce']) for group in (1, 2))
    loss = float(jax.jit(detection.make_loss(config, start))(params, batch, batch)[1]['loss_ce'])
    assert loss == pytest.approx(two, rel=1e-5) != pytest.approx(one, rel=1e-5)


def test_options_that_save_memory_reach_the_step():
    """A batch in parts, a sharded state, and its memory given to the next one."""
    config, rows = tiny_config(accumulate_steps=2, shard_params=True), []

    def loss(params, part, whole):
        rows.append(len(part['x']))
        return (part['x'] @ params['w']).mean(), {}

    mesh = meshes.make_mesh(jax.devices()[:2])
    state, step = setup.make_step(config, mesh, {'w': np.ones((8, 3))}, optax.adamw(0.1), loss)
    assert not state['params']['w'].is_fully_replicated
    with jax.set_mesh(mesh):
        step(state, meshes.shard({'x': np.ones((8, 8), np.float32)}, mesh))
    assert set(rows) == {4} and state['params']['w'].is_deleted()


def test_the_seed_and_the_sizes_reach_the_start_of_a_run(coco_folder, tmp_path):
    train_set, starts, plans = records.read(coco_folder, 'train2017'), [], []
    for seed in (1, 2):
        config = tiny_config(seed=seed)
        starts.append(make_start(config, train_set, 'cpu'))
        plans.append(detection.make_batches(config, train_set, starts[-1]).plan(0).indices)
    one, two = (start.params['backbone']['det_token'] for start in starts)
    assert isinstance(one, np.ndarray)  # and not on a device, beside the state
    assert not np.array_equal(one, two) and not np.array_equal(*plans)
    checkpoint.write(starts[0], tmp_path / 'saved')
    config = tiny_config(init_from=str(tmp_path / 'saved'), eval_size=96, eval_max_size=160)
    start = make_start(config, train_set, 'cpu')
    assert (start.size, start.max_size) == (96, 160)


def test_the_seed_is_that_of_what_a_backbone_lacks(coco_folder, tmp_path):
    torch.save({'model': torches(make_vit())}, tmp_path / 'vit.pth')
    train_set, tokens = records.read(coco_folder, 'train2017'), []
    for seed in (1, 2):
        config = tiny_config(seed=seed, init_from=str(tmp_path / 'vit.pth'))
        tokens.append(make_start(config, train_set, 'cpu').params['backbone']['det_token'])
    assert not np.array_equal(*tokens)


def test_a_start_knows_which_classes_have_objects_and_the_ids_of_their_categories(coco_folder):
    train_set, lines = records.read(coco_folder, 'train2017'), []
    ids = {label: label + 10_000 for label in train_set.classes}
    numbered = dataclasses.replace(train_set, category_ids=ids)
    start = make_start(tiny_config(), numbered, 'cpu')
    assert start.about['category_ids'] == {str(label): number for label, number in ids.items()}
    classes = {0: train_set.classes[1]} | train_set.classes  # as Roboflow writes a supercategory
    renamed = dataclasses.replace(train_set, classes=classes)
    start_from_detector(tiny_config(reset_classes=True), start, renamed, lines.append)
    assert '1 unused: others have their names' in lines[0]


def test_the_labels_of_classes_matched_by_name_are_those_of_the_detector(coco_folder, tmp_path):
    swap_classes(shutil.copytree(coco_folder, tmp_path / 'data'), 'val2017')
    labels, stored = [], []
    for data in (coco_folder, tmp_path / 'data'):
        with workdir.opened(tmp_path / f'run-{len(labels)}') as work:
            run = detection.prepare(tiny_config(data=data), meshes.make_mesh(jax.devices()[:1]), work)
        labels.append(run.val_batches.records.labels.tolist())
        stored.append(records.read(data, 'val2017').labels.tolist())
    assert labels[0] == labels[1] and stored[0] != stored[1]


def test_the_card_is_of_the_best_step(tmp_path):
    run = SimpleNamespace(start=Pretrained(Yolos(**TINY, num_classes=4), {}, {1: 'cat'}, 64, 96))
    aps = {6: 0.31, 12: 0.2, 18: None}
    detection.DetectorSetup.finish(run, tmp_path, aps, {'config': {'epochs': 3}}, None)
    card = (tmp_path / 'README.md').read_text()
    assert 'AP 0.310 on' in card and '| step of these weights | 6 |' in card


def prepared(config, folder):
    config.model.update(width=MODEL.width, depth=MODEL.depth)
    with workdir.opened(folder) as work:
        return pretraining.prepare(config, meshes.make_mesh(jax.devices()[:1]), work)


def test_a_pre_training_uses_the_values_of_its_config(class_folder, tmp_path):
    changes = dict(smoothing=0.2, drop_path=0.5, weight_decay=0.3, warmup_epochs=2)
    config = pretraining_config(class_folder, final_learning_rate=0.0, **changes)
    rates, expected = prepared(config, tmp_path / 'a').rate, optim.warmup_cosine(1e-3, 4, 2, 3, final=0.0)
    np.testing.assert_array_equal([rates(i) for i in range(12)], [expected(i) for i in range(12)])

    config.warmup_epochs = 0  # so that the first step moves by the whole rate
    run = prepared(config, tmp_path / 'b')
    params = classifier.init_params(MODEL, jax.random.key(0))
    loss = classification.make_loss(MODEL, smoothing=0.2, drop_path=0.5, group=config.augment.mix_group)
    optimizer = optim.make_deit_optimizer(params, run.rate, 0.3)
    _, batch, _ = next(loader.load(run.batches, [0]))
    update = jax.jit(steps.make_update(loss, optimizer))
    expected, of_loss = update(steps.init_state(params, optimizer), batch)
    state, metrics = run.train_step(run.state, batch)
    assert float(metrics['loss']) == pytest.approx(float(of_loss['loss']), rel=1e-6)
    heads = (x['params']['head']['kernel'] for x in (state, expected))
    np.testing.assert_allclose(*heads, rtol=3e-5, atol=1e-6)


def test_a_pre_training_starts_from_its_seed_or_a_classifier(class_folder, tmp_path):
    file = tmp_path / 'deit.pth'
    deit.write(classifier.init_params(MODEL, jax.random.key(7)), MODEL, file)
    one = prepared(pretraining_config(class_folder, init_from=str(file)), tmp_path / 'a')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.state['params']), read_deit(file)[1])
    config = pretraining_config(class_folder, seed=1, teacher=str(file), xavier_init=True)
    config.model.dtype = 'bfloat16'
    two = prepared(config, tmp_path / 'b')
    assert two.digests['train']['teacher'] and two.model.dtype == 'bfloat16'
    assert not np.array_equal(one.batches.plan(0).indices, two.batches.plan(0).indices)
    kernels = [x.state['params']['backbone']['blocks']['mlp']['fc1']['kernel'] for x in (one, two)]
    assert float(kernels[1].std()) > 2 * float(kernels[0].std())  # Xavier's
