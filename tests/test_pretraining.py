"""Pre-training: its parity with a torch loop of timm's formulae, its runs, and what starts from it."""

import functools
import shutil

import helpers
import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, finish, metric_lines, pretraining_config, read_deit, spawn
from torch.nn import functional
from yolos_jax.configs import quickstart

from yolos_jax import classification, classifier, mixing, optim, posembed, steps, vit, weights
from yolos_jax.classifier import Classifier
from yolos_jax.data import augmentation, class_batches, labelled, loader
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import config_checks, config_files
from yolos_jax.run import mesh as meshes
from yolos_jax.run.pretraining import group_size, pretrain
from yolos_jax.weights import checkpoint, deit, names, step_ap

B, GROUP, SIZE = 16, 8, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = augmentation.Recipe(size=SIZE, repeats=3, erasing=0.5, mixup=0.8, cutmix=1.0, group=GROUP)
MODEL = Classifier(width=64, depth=3, heads=2, num_classes=20, size=SIZE)
launch = functools.partial(helpers.launch, start=pretrain)


def loss_lines(folder):
    kept = ('loss', 'top1', 'top5', 'val_loss', 'epoch_loss', 'grad_norm')
    lines = [{k: line[k] for k in ('step', *kept) if k in line} for line in metric_lines(folder)]
    return [line for line in lines if len(line) > 1]


def images_of(patches):
    """Patches [B, N, 768] as images [B, 3, height, width]."""
    side = round(patches.shape[1] ** 0.5)
    images = patches.reshape(-1, side, side, 16, 16, 3).transpose(0, 5, 1, 3, 2, 4)
    return images.reshape(-1, 3, side * 16, side * 16)


def torch_logits(p, images, kept, heads):
    """A ViT of timm's names."""
    D = p['cls_token'].shape[-1]
    x = functional.conv2d(images, p['patch_embed.proj.weight'], p['patch_embed.proj.bias'], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p['cls_token'].expand(len(x), -1, -1), x], dim=1) + p['pos_embed']
    norm = lambda x, name: functional.layer_norm(x, (D,), p[f'{name}.weight'], p[f'{name}.bias'], 1e-6)
    dense = lambda x, name: functional.linear(x, p[f'{name}.weight'], p[f'{name}.bias'])
    for i, (of_attention, of_mlp) in enumerate(kept):
        block = f'blocks.{i}.'
        qkv = dense(norm(x, block + 'norm1'), block + 'attn.qkv')
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + dense(y, block + 'attn.proj') * of_attention[:, None, None]
        y = dense(functional.gelu(dense(norm(x, block + 'norm2'), block + 'mlp.fc1')), block + 'mlp.fc2')
        x = x + y * of_mlp[:, None, None]
    return dense(norm(x[:, :1], 'norm')[:, 0], 'head')


def torch_batch(batch):
    """Images and targets, erased and mixed by timm's formulae."""
    images = torch.from_numpy(images_of(batch['patches'])).float() / 255
    images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    draw = lambda seed: jax.random.normal(jax.random.key(seed), batch['patches'].shape[1:])
    noise = torch.from_numpy(images_of(np.array(jax.vmap(draw)(batch['noise']))))
    for image, its_noise, (top, left, bottom, right) in zip(images, noise, batch['erase'], strict=True):
        image[:, top:bottom, left:right] = its_noise[:, top:bottom, left:right]
    labels = torch.full((len(images), 20), 0.1 / 20)
    labels[range(len(images)), batch['labels']] = 0.9 + 0.1 / 20
    mixed, targets = [], []
    for first in range(0, len(images), GROUP):
        x, y = images[first : first + GROUP], labels[first : first + GROUP]
        top, left, bottom, right = batch['box'][first]
        if bottom > top:
            x = x.clone()
            x[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / SIZE**2
        else:
            share = float(batch['weight'][first])
            x = x * share + x.flip(0) * (1 - share)
        mixed.append(x)
        targets.append(y * share + y.flip(0) * (1 - share))
    return torch.cat(mixed), torch.cat(targets)


def test_fresh_kernels_are_small_as_deits_or_as_large_as_the_width_needs():
    width, side = MODEL.width, MODEL.side
    for xavier, deviation in ((False, 0.02), (True, (2 / (width + 4 * width)) ** 0.5)):
        backbone = classifier.init_params(MODEL, jax.random.key(0), xavier=xavier)['backbone']
        one, other = (backbone['blocks']['mlp'][name]['kernel'].ravel() for name in ('fc1', 'fc2'))
        assert one.std() == pytest.approx(deviation, rel=0.1) and not (one == other).any()
        sines = classifier.SINES * posembed.sine((side, side), width)
        class_row, patches = backbone['pos_embed'][0, 0], backbone['pos_embed'][0, 1:]
        assert np.array_equal(patches, sines) if xavier else 0.015 < patches.std() < 0.025
        assert 0.01 < class_row.std() < 0.03


def test_eight_steps_are_those_of_a_torch_loop_with_the_formulae_of_timm(class_folder):
    source = class_batches.TrainBatches(labelled.read(class_folder, 'train'), RECIPE, batch_size=B, seed=0)
    params = classifier.init_params(MODEL, jax.random.key(0))
    rate = optim.warmup_cosine(1e-3, 4, 1, 3)
    optimizer = optim.make_deit_optimizer(params, rate, 0.05)
    loss = classification.make_loss(MODEL, smoothing=0.1, drop_path=0.5, group=GROUP)
    step, state = steps.make_update(loss, optimizer), steps.init_state(params, optimizer)
    exported = names.from_params(params, MODEL)
    theirs = {name.removeprefix('backbone.'): x.numpy() for name, x in exported.items()}
    theirs = {k: torch.from_numpy(np.array(x)).requires_grad_() for k, x in theirs.items()}
    no_decay = [x for k, x in theirs.items() if x.ndim == 1 or k in ('pos_embed', 'cls_token')]
    decay = [x for x in theirs.values() if all(x is not y for y in no_decay)]
    groups = [{'params': no_decay, 'weight_decay': 0.0}, {'params': decay, 'weight_decay': 0.05}]
    adamw, mixes = torch.optim.AdamW(groups), set()
    for number, batch, _ in loader.load(source, range(8)):
        state, metrics = step(state, batch)
        images, targets = torch_batch(batch)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(batch['noise'])
        kept = torch.from_numpy(np.array(classifier.stochastic_depth(keys, 3, 0.5)))
        logits = torch_logits(theirs, images, kept, heads=2)
        expected = torch.sum(-targets * functional.log_softmax(logits, dim=-1), dim=-1).mean()
        epoch = max(number // 3 - 1, 0)
        lr = 1e-6 if epoch < 1 else 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * epoch / 4))
        for group in adamw.param_groups:
            group['lr'] = lr
        adamw.zero_grad()
        expected.backward()
        adamw.step()
        mixes |= {bool(box.any()) for box in batch['box']}
        np.testing.assert_allclose(float(metrics['loss']), expected.item(), rtol=1e-5)
    assert mixes == {True, False}  # both CutMix and mixup occur
    new = names.from_params(state['params'], MODEL)
    moved = 0.0
    for name, x in new.items():
        mine, other = x.numpy(), theirs[name.removeprefix('backbone.')].detach().numpy()
        np.testing.assert_allclose(mine, other, atol=2e-5, err_msg=name)
        moved = max(moved, float(np.abs(mine - exported[name].numpy()).max()))
    assert moved > 1e-3


def test_stochastic_depth_grows_with_the_block_and_preserves_the_mean():
    kept = np.asarray(classifier.stochastic_depth(jax.random.split(jax.random.key(0), 20_000), 3, 0.5))
    assert kept.shape == (3, 2, 20_000)
    np.testing.assert_allclose((kept == 0).mean(axis=-1), [[0, 0], [0.25, 0.25], [0.5, 0.5]], atol=0.02)
    np.testing.assert_allclose(kept.mean(axis=-1), 1, atol=0.03)


def test_a_batch_does_not_depend_on_who_loads_its_rows_and_decodes_an_image_once(class_folder):
    records = labelled.read(class_folder, 'train')
    make = lambda: class_batches.TrainBatches(records, RECIPE, batch_size=B, seed=0)
    source, started = make(), []
    counted = make()
    counted.start_image = lambda index: started.append(index) or source.start_image(index)
    (_, whole, indices), (_, part, of_part) = (
        next(loader.load(counted, [4])),
        next(loader.load(source, [4], slice(5, 11))),
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(values[5:11], part[name], err_msg=name)
    np.testing.assert_array_equal(indices[5:11], of_part)
    assert len(started) == 6 == len(set(indices.tolist()))  # 16 rows, three of an image
    one = class_batches.TrainBatches(records, RECIPE._replace(repeats=1), batch_size=B, seed=0)
    assert sorted(one.plan(0).indices.ravel()) == sorted(set(one.plan(0).indices.ravel()))


def test_copies_of_an_image_are_dealt_to_groups_as_deits_sampler_deals_them_to_gpus(class_folder):
    gpus, of_gpu = 4, 4
    recipe = RECIPE._replace(group=of_gpu)
    source = class_batches.TrainBatches(labelled.read(class_folder, 'train'), recipe, batch_size=B, seed=0)
    drawn = source.plan(0).indices.ravel()
    for step, batch, indices in loader.load(source, range(3)):
        for rank in range(gpus):
            expected = drawn[rank::gpus][of_gpu * step : of_gpu * (step + 1)]
            np.testing.assert_array_equal(indices.reshape(gpus, of_gpu)[rank], expected)
        ways = {}
        for index, *way in zip(indices.tolist(), batch['weight'], *batch['box'].T, strict=True):
            ways.setdefault(index, []).append(tuple(way))
        assert all(len(set(of_image)) == len(of_image) for of_image in ways.values())


@pytest.fixture(scope='module')
def unbroken(class_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    launch(pretraining_config(class_folder), folder)
    return folder


def test_a_run_leaves_metrics_and_weights(unbroken):
    lines = loss_lines(unbroken)
    assert [line['step'] for line in lines if 'top1' in line] == [6, 12]
    assert all(0 <= line['top1'] <= line['top5'] <= 1 for line in lines if 'top1' in line)
    assert (unbroken / 'curves.png').stat().st_size > 10_000
    content = torch.load(unbroken / 'deit.pth', weights_only=True)
    assert content['model']['pos_embed'].shape == (1, 1 + 16, 64) and content['heads'] == 2
    assert content['model']['head.weight'].shape == (20, 64)


@pytest.mark.parametrize('step', [5, pytest.param(6, marks=pytest.mark.trials)])
def test_a_run_stopped_after_any_step_ends_as_an_unbroken_one(step, unbroken, class_folder, tmp_path):
    launch(pretraining_config(class_folder), tmp_path, step)
    assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == step
    launch(pretraining_config(class_folder), tmp_path)
    assert loss_lines(tmp_path) == loss_lines(unbroken)
    assert (tmp_path / 'deit.pth').read_bytes() == (unbroken / 'deit.pth').read_bytes()


@pytest.mark.trials
def test_eight_devices_pre_train_as_one_does(unbroken, class_folder, tmp_path):
    launch(pretraining_config(class_folder), tmp_path, devices=8)
    losses = [[line['loss'] for line in loss_lines(x) if 'loss' in line] for x in (tmp_path, unbroken)]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_batch_in_parts_gives_the_losses_of_the_whole(unbroken, class_folder, tmp_path):
    launch(pretraining_config(class_folder, accumulate_steps=2), tmp_path)
    losses = [[line['loss'] for line in loss_lines(x) if 'loss' in line] for x in (tmp_path, unbroken)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_batch_in_which_nothing_is_mixed_can_be_computed_in_parts(class_folder):
    config = pretraining_config(class_folder, accumulate_steps=4)
    config.augment.update(mix_group=0)
    with pytest.raises(InputError, match='16 images do not divide into so many parts of whole groups'):
        config_checks.check_batch_size(config, meshes.make_mesh(jax.devices()[:1]), group_size(config), 'x')
    config.augment.update(mixup=0.0, cutmix=0.0)
    config_checks.check_batch_size(config, meshes.make_mesh(jax.devices()[:1]), group_size(config), 'x')


def test_a_detector_starts_from_the_workdir(unbroken, capsys):
    yolos = Yolos(width=64, depth=3, heads=2, pos_grid=(4, 4), num_classes=3, num_det_tokens=5)
    params = weights.init_from_backbone(unbroken, yolos, jax.random.key(0))
    ours, pretrained = read_deit(unbroken / 'deit.pth')
    assert ours == MODEL
    for name in ('norm', 'patch_embed', 'cls_token', 'blocks'):
        jax.tree.map(np.testing.assert_array_equal, params['backbone'][name], pretrained['backbone'][name])
    table = pretrained['backbone']['pos_embed']
    np.testing.assert_allclose(params['backbone']['pos_embed'][:, :17], table, atol=1e-6)
    assert 'ignored 2: head' in capsys.readouterr().out
    with pytest.raises(InputError, match='a ViT of 2 heads; the model asks for 4'):
        weights.init_from_backbone(unbroken, yolos.clone(heads=4), jax.random.key(0))


def test_the_file_of_weights_has_the_best_top1(class_folder, tmp_path):
    config = pretraining_config(class_folder, epochs=2, eval_every=1, ema=0.9)
    launch(config, tmp_path)
    top1 = {line['step']: line['top1'] for line in metric_lines(tmp_path) if 'top1' in line}
    best = max(top1, key=lambda step: (top1[step], step))
    about = {
        'heads': 2,
        'step': best,
        'top1': top1[best],
        'classes': labelled.read(class_folder, 'train').classes,
    }
    assert deit.about(tmp_path / 'deit.pth') == about
    from orbax.checkpoint import PyTreeCheckpointHandler

    state = PyTreeCheckpointHandler().restore(tmp_path / 'checkpoints' / str(best) / 'state')
    jax.tree.map(np.testing.assert_array_equal, read_deit(tmp_path / 'deit.pth')[1], state['ema'])
    steps = checkpoint.steps(tmp_path / 'checkpoints')
    step_ap.write(tmp_path / 'checkpoints' / str(steps[-1]), 1.0)  # none after it is better
    (tmp_path / 'deit.pth').write_bytes(b'of another run')
    config.epochs = 3
    launch(config, tmp_path)
    assert (tmp_path / 'deit.pth').read_bytes() == b'of another run'
    shutil.rmtree(tmp_path / 'checkpoints')
    launch(config, tmp_path)
    best = max(line['top1'] for line in metric_lines(tmp_path) if 'top1' in line)
    assert deit.about(tmp_path / 'deit.pth')['top1'] == best


def test_a_run_is_not_resumed_with_another_teacher(class_folder, tmp_path):
    teacher = tmp_path / 'logits.npy'
    np.save(teacher, np.eye(20)[np.repeat(np.arange(20), 3)])
    config = pretraining_config(class_folder, teacher=str(teacher), epochs=2)
    launch(config, tmp_path / 'run', stop_after=2)
    moved = config.copy_and_resolve_references()
    moved.teacher = str(tmp_path / 'moved.npy')
    np.save(moved.teacher, np.eye(20)[np.repeat(np.arange(20)[::-1], 3)])
    with pytest.raises(InputError, match='teacher of train differ'):
        launch(moved, tmp_path / 'run')
    np.save(moved.teacher, np.load(teacher))
    launch(moved, tmp_path / 'run')


@pytest.mark.parametrize('kind', ['model', 'logits'])
def test_a_student_learns_from_its_teacher(kind, unbroken, class_folder, tmp_path):
    teacher = unbroken
    if kind == 'logits':
        teacher = tmp_path / 'logits.npy'
        np.save(teacher, np.eye(20)[np.repeat(np.arange(20), 3)])  # the truth
    run = tmp_path / 'run'
    for step in (3, None):  # it resumes with its teacher
        launch(pretraining_config(class_folder, teacher=str(teacher), epochs=2), run, step)
    lines = [line for line in metric_lines(run) if 'loss_teacher' in line]
    for line in lines:
        expected = (line['loss_true'] + line['loss_teacher']) / 2
        np.testing.assert_allclose(line['loss'], expected, rtol=1e-5)
    assert len(lines) == 6
    assert 'dist_token' in torch.load(run / 'deit.pth', weights_only=True)['model']


def test_erasing_and_mixing_are_what_loops_over_pixels_do():
    rng = np.random.default_rng(0)
    batch = {
        'patches': rng.integers(0, 256, (4, 16, 768), dtype=np.uint8),
        'erase': np.array([[0, 0, 0, 0], [10, 20, 40, 33], [0, 0, 64, 64], [63, 63, 64, 64]], np.int32),
        'noise': np.arange(4, dtype=np.uint32),
        'weight': np.array([1, 1, 0.25, 0.25], np.float32),
        'box': np.array([[5, 6, 30, 64]] * 2 + [[0, 0, 0, 0]] * 2, np.int32),
    }
    result = images_of(np.asarray(mixing.augmented(batch, 2)))
    plain = images_of(np.array(vit.normalised(batch['patches'])))
    for i, (top, left, bottom, right) in enumerate(batch['erase']):
        noise = images_of(np.array(jax.random.normal(jax.random.key(i), (16, 768)))[None])[0]
        plain[i, :, top:bottom, left:right] = noise[:, top:bottom, left:right]
    for i, partner in enumerate([1, 0, 3, 2]):
        weight = np.full((64, 64), batch['weight'][i])
        top, left, bottom, right = batch['box'][i]
        weight[top:bottom, left:right] = 0
        np.testing.assert_allclose(result[i], weight * plain[i] + (1 - weight) * plain[partner], atol=1e-6)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'data': ''}, 'no data'),
        ({'data': '/nowhere'}, 'no such data folder'),
        ({'batch_size': 61}, 'does not divide batch_size'),
        ({'batch_size': 64}, '60 images are less than one batch of 64'),
        ({'model.size': 60}, 'not a multiple of 16'),
        ({'model.heads': 7}, 'not a multiple of model.heads, 7'),
        ({'smoothing': 2.0}, 'smoothing is 2.0'),
        ({'teacher': '/nowhere.pth'}, 'no such file'),
        ({'teacher': '/nowhere.npy'}, 'not a file that numpy.save wrote'),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_compiled(
    changes, says, class_folder, tmp_path
):
    config = pretraining_config(class_folder)
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=says):
        launch(config, tmp_path)


def test_a_missing_split_is_named_with_its_key(class_folder, tmp_path):
    with pytest.raises(InputError, match='has no split none') as error:
        launch(pretraining_config(class_folder, val_split='none'), tmp_path)
    assert error.value.argument == 'val_split'


def test_each_command_refuses_the_config_of_the_other(coco_folder, class_folder, tmp_path):
    with pytest.raises(InputError, match='for training a detector'):
        launch(quickstart.get_config(), tmp_path / 'a')
    from yolos_jax.run.train import train

    with pytest.raises(InputError, match='for pre-training'):
        train(pretraining_config(class_folder), tmp_path / 'b')


def test_more_unreadable_images_than_tolerated_end_the_run(class_folder, tmp_path):
    shutil.copytree(class_folder, tmp_path / 'forms')
    for file in sorted((tmp_path / 'forms' / 'train').glob('*/0000.jpg'))[:12]:
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match=r'0000.jpg: .* more than 3 of 60 images are bad'):
        launch(pretraining_config(tmp_path / 'forms'), tmp_path / 'run')
    for file in sorted((tmp_path / 'forms' / 'val').glob('*/0000.jpg'))[:11]:
        file.write_bytes(b'')
    launch(pretraining_config(tmp_path / 'forms', bad_images=12, epochs=2), tmp_path / 'tolerant')
    right = loss_lines(tmp_path / 'tolerant')[-1]['top5'] * 40  # those that cannot be read are wrong
    assert right > 0 and abs(right - round(right)) < 1e-5


def test_two_processes_pre_train_as_one_does(unbroken, class_folder, tmp_path):
    values = config_files.flat(pretraining_config(class_folder)).items()
    flags = [f'--config.{key}={value}' for key, value in values if value is not None]
    command = [
        ROOT / 'pretrain.py',
        f'--config={ROOT}/configs/deit_ti.py',
        f'--workdir={tmp_path}/run',
        *flags,
    ]
    codes, logs = finish(spawn(command, tmp_path, processes=2, devices=2), tmp_path)
    assert codes == [0, 0], logs
    assert 'start a detector from it with: yolos train --config=CONFIG' in logs[0]
    losses = [
        [line['loss'] for line in loss_lines(x) if 'loss' in line] for x in (tmp_path / 'run', unbroken)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert loss_lines(tmp_path / 'run')[-1]['top1'] == loss_lines(unbroken)[-1]['top1']
