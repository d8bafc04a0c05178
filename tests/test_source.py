import argparse
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import TINY, forward, make_hf, noise, read_detector, reference_tensors, to_torch
from safetensors.torch import save_file

import yolos_jax
from yolos_jax import model
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import patchify
from yolos_jax.weights import names

C = 5
PUBLISHED = {'YOLOS_TI': 163, 'YOLOS_S': 164, 'YOLOS_S_DWR': 188}
ARGS = argparse.Namespace(init_pe_size=[64, 96], mid_pe_size=[64, 96], lr=1e-4, backbone_name='small')


@pytest.fixture(scope='module')
def hf():
    return make_hf(TINY, num_classes=C)


@pytest.fixture(scope='module')
def expected(hf):
    return {name: tensor.numpy() for name, tensor in reference_tensors(hf).items()}


def state_dict(hf, prefix=''):
    return {prefix + k: torch.from_numpy(v.numpy()) for k, v in reference_tensors(hf).items()}


def check(path, expected, **hints):
    yolos, params = yolos_jax.load(path, **hints)
    assert (yolos.num_classes, yolos.num_det_tokens) == (C, TINY['num_det_tokens'])
    pretrained = names.from_params(params, yolos)
    assert pretrained.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(pretrained[name].numpy(), value)
    return yolos


@pytest.mark.parametrize('new_format', [True, False])
def test_a_training_file_of_the_reference_is_read(new_format, hf, expected, tmp_path):
    content = {'model': state_dict(hf), 'optimizer': {'state': {}}, 'epoch': 9, 'args': ARGS}
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=new_format)
    yolos = check(tmp_path / 'x.pth', expected, heads=2)
    assert yolos.eps == 1e-6 and yolos.pos_grid == yolos.mid_pos_grid == (4, 6)


def test_a_damaged_config_beside_a_file_of_the_reference_is_ignored(hf, expected, tmp_path):
    (tmp_path / 'config.json').write_text('[')
    torch.save(state_dict(hf), tmp_path / 'x.pth')
    check(tmp_path / 'x.pth', expected, heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6))


@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'module._orig_mod.'])
@pytest.mark.parametrize('names', ["the original's", "Hugging Face's"])
def test_a_bare_state_dict_is_read(names, prefix, hf, expected, tmp_path):
    tensors = state_dict(hf) if names == "the original's" else hf.state_dict()
    tensors = {prefix + name: x for name, x in tensors.items()} | {'n_averaged': torch.tensor(3)}
    torch.save(tensors, tmp_path / 'x.pth')
    yolos = check(tmp_path / 'x.pth', expected, heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6))
    assert yolos.eps == (1e-6 if names == "the original's" else 1e-12)


def test_other_weights_in_a_file_are_named(hf, tmp_path):
    torch.save({'model': state_dict(hf), 'model_ema': state_dict(hf), 'epoch': 3}, tmp_path / 'x.pth')
    lines = []
    read_detector(tmp_path / 'x.pth', heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6), log=lines.append)
    assert lines[1].endswith('ignored, as they are no weights: epoch')
    assert lines[2].endswith('the weights in model_ema')


@pytest.mark.parametrize('form', ['folder', 'file', 'bin', 'names of v5', 'behind a prefix'])
def test_a_hugging_face_folder_is_read(form, hf, expected, tmp_path):
    hf.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors' if form == 'file' else tmp_path
    if form == 'behind a prefix':
        save_file({f'module.{name}': x for name, x in hf.state_dict().items()}, path / 'model.safetensors')
    if form in ('bin', 'names of v5'):
        tensors = hf.state_dict()
        if form == 'bin':
            tensors = {k.replace('interpolation.', ''): v for k, v in tensors.items()}
        torch.save(tensors, tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    yolos = check(path, expected)
    assert yolos.eps == 1e-12
    file = 'pytorch_model.bin' if form in ('bin', 'names of v5') else 'model.safetensors'
    assert read_detector(path).about['source'] == f'{tmp_path.name}/{file}'
    with pytest.raises(InputError, match='heads is for a .pth'):
        read_detector(path, heads=2)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_are_read_from_their_files_and_give_the_same_outputs(name, tmp_path):
    """A .pth with nothing but the tensors; logits against transformers with the same weights."""
    fields = getattr(model, name)
    hf = make_hf(fields, eps=1e-6)
    tensors = state_dict(hf)
    assert len(tensors) == PUBLISHED[name]
    torch.save({'model': tensors}, tmp_path / 'x.pth')
    pretrained = read_detector(tmp_path / 'x.pth')
    sizes = (512, 853) if name == 'YOLOS_TI' else (800, 1333)
    assert pretrained.classes[90] == 'toothbrush' and (pretrained.size, pretrained.max_size) == sizes
    assert all(getattr(pretrained.model, field) == value for field, value in fields.items())
    image = noise(160, 208)
    with torch.no_grad():
        theirs = hf(pixel_values=to_torch(image))
    ours = jax.jit(pretrained.model.apply)({'params': pretrained.params}, *patchify([image]))
    assert theirs.logits.abs().max() > 0.5
    np.testing.assert_allclose(ours['pred_logits'], theirs.logits, atol=2e-5)
    np.testing.assert_allclose(ours['pred_boxes'], theirs.pred_boxes, atol=2e-6)


def test_the_largest_published_model_is_recognised_by_its_shapes(tmp_path):
    """Its values would be half a gigabyte of random numbers."""
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float16), model.param_shapes(Yolos(**model.YOLOS_B))
    )
    tensors = names.from_params(zeros, Yolos(**model.YOLOS_B))
    torch.save({'model': {k: torch.from_numpy(x.numpy()) for k, x in tensors.items()}}, tmp_path / 'x.pth')
    pretrained = read_detector(tmp_path / 'x.pth')
    assert len(tensors) == 164 and (pretrained.size, pretrained.max_size) == (800, 1333)
    assert all(getattr(pretrained.model, field) == value for field, value in model.YOLOS_B.items())


@pytest.mark.parametrize(
    ('content', 'size'),
    [
        ({'size': {'shortest_edge': 64, 'longest_edge': 96}}, (64, 96)),
        ({'size': 48, 'max_size': 80}, (48, 80)),
        ({'size': 48}, (48, 1333)),
        ({'size': {'shortest_edge': 48}, 'max_size': 80}, (48, 80)),
        ({'size': {'shortest_edge': 48, 'longest_edge': None}}, (48, 100_000)),
        (
            {'size': {'max_height': 96, 'max_width': 96}, 'do_pad': False, 'pad_size': {'height': 96}},
            (96, 96),
        ),
        ({}, (800, 1333)),
    ],
)
def test_the_size_to_detect_at_is_that_of_the_preprocessor(content, size, hf, tmp_path, capsys):
    hf.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(content))
    pretrained = read_detector(tmp_path)
    assert (pretrained.size, pretrained.max_size) == size
    printed = capsys.readouterr().err
    assert ('detections may differ a little' in printed) == ('max_height' in str(content))
    assert ('may not be how it was trained' in printed) == (content == {})


@pytest.mark.parametrize(
    'content',
    [
        {'size': {'height': 64, 'width': 64}},
        {'size': {'max_height': 64, 'max_width': 96}},
        {'size': [64, 96]},
        {'size': {'shortest_edge': 64}, 'do_resize': False},
        {'size': {'shortest_edge': 'x'}},
        {'size': {'max_height': 64, 'max_width': 64}, 'pad_size': {'height': 64, 'width': 64}},
        {'image_mean': [0.5, 0.5]},
        {'image_std': [0, 0, 0]},
        {'image_std': [float('inf')] * 3},
        [],
    ],
)
def test_a_preprocessor_that_does_something_else_is_refused(content, hf, tmp_path):
    hf.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(content))
    with pytest.raises(InputError, match='model.safetensors: ') as error:
        read_detector(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'content',
    [
        {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.25, 0.125]},
        {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.5, 0.25, 0.125]},
        {'rescale_factor': 1 / 127.5, 'image_mean': [1, 1, 1], 'image_std': [1, 0.5, 0.25]},
        {'do_normalize': False},
        {'do_rescale': False, 'image_mean': [120, 110, 100], 'image_std': [60, 61, 62]},
    ],
)
def test_pixels_of_another_mean_and_deviation_are_seen_as_trained(content, hf, tmp_path, capsys):
    """Against the model of transformers, fed what its preprocessor makes of the image."""
    hf.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(content))
    image = noise(64, 96)
    factor = content.get('rescale_factor', 1 / 255)
    pixels = np.float64(image) * (factor if content.get('do_rescale', True) else 1)
    if content.get('do_normalize', True):
        pixels = (pixels - content['image_mean']) / content['image_std']
    with torch.no_grad():
        theirs = hf(pixel_values=torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
    yolos, params = yolos_jax.load(tmp_path)
    assert 'go into patch_embed' in capsys.readouterr().err
    ours = forward(yolos, params, *patchify([image]))
    np.testing.assert_allclose(ours['pred_logits'], theirs.logits, atol=2e-5)


def broken(tensors, how):
    name = 'backbone.blocks.1.mlp.fc1.weight'
    if how == 'missing':
        del tensors[name]
    elif how == 'extra':
        tensors['backbone.blocks.0.ls1.gamma'] = torch.ones(32)
    elif how == 'shape':
        tensors[name] = tensors[name][:-1]
    elif how == 'nan':
        tensors[name][3, 3] = float('nan')
    elif how == 'backbone':
        tensors = {k.removeprefix('backbone.'): v for k, v in tensors.items() if 'det_token' not in k}
    return tensors


@pytest.mark.parametrize(
    ('how', 'says'),
    [
        ('missing', r'1 missing: backbone.blocks.1.mlp.fc1.weight \[128, 32\]'),
        ('extra', r'1 not expected: backbone.blocks.0.ls1.gamma \[32\]'),
        ('shape', r'1 of another shape: .*fc1.weight \[127, 32\] instead of \[128, 32\]'),
        ('nan', 'not finite, in backbone.blocks.1.mlp.fc1.weight'),
        ('backbone', 'no YOLOS detector .*perhaps a backbone'),
    ],
)
def test_nothing_is_silently_skipped(how, says, hf, tmp_path):
    tensors = broken({k: v.clone() for k, v in state_dict(hf).items()}, how)
    torch.save({'model': tensors, 'args': ARGS}, tmp_path / 'x.pth')
    with pytest.raises(InputError, match=says) as error:
        read_detector(tmp_path / 'x.pth', heads=2)
    assert str(error.value).startswith(str(tmp_path / 'x.pth'))


def test_fields_that_a_file_lacks_are_asked_for(hf, tmp_path):
    torch.save(state_dict(hf), tmp_path / 'x.pth')
    with pytest.raises(InputError, match='heads of its 3 blocks of width 32; give heads'):
        read_detector(tmp_path / 'x.pth')
    with pytest.raises(InputError, match='grid of its pos_embed .24 patches.; give pos_grid'):
        read_detector(tmp_path / 'x.pth', heads=2)
    with pytest.raises(InputError, match='give pos_grid'):
        read_detector(tmp_path / 'x.pth', heads=2, pos_grid=(5, 5))


@pytest.mark.parametrize(
    ('key', 'value', 'says'),
    [
        ('patch_size', 14, 'patch_size is 14; only 16'),
        ('hidden_act', 'relu', "hidden_act is 'relu'; only 'gelu'"),
        ('model_type', 'detr', "model_type is 'detr'"),
        ('num_hidden_layers', None, 'does not say num_hidden_layers'),
        ('image_size', 96, r'image_size is 96, not \[height, width\]'),
        ('id2label', ['a', 'b'], r'id2label is \["a", "b"\], not \{number: name\}'),
        ('num_hidden_layers', 4, '12 missing'),
        ('intermediate_size', 64, 'intermediate_size is 64; only 128'),
        ('qkv_bias', False, 'qkv_bias is False'),
        ('id2label', {'9': 'cat'}, 'names a class 9, but the head has 5'),
        ('id2label', {'0': None}, 'id2label of config.json has None as the name of a class'),
    ],
)
def test_a_config_of_another_model_is_named(key, value, says, hf, tmp_path):
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config[key] = value
    if value is None:
        del config[key]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        read_detector(tmp_path)


def test_values_missing_in_a_config_are_transformers_defaults(hf, expected, tmp_path, capsys):
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for key in ('layer_norm_eps', 'use_mid_position_embeddings', 'id2label', 'label2id'):
        config.pop(key, None)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    yolos = check(tmp_path, expected)
    assert yolos.eps == 1e-12 and yolos.mid_pos_grid == yolos.pos_grid
    assert read_detector(tmp_path).classes == {i: f'LABEL_{i}' for i in range(C)}
    assert 'another filter' not in capsys.readouterr().err
    (tmp_path / 'preprocessor_config.json').write_text('{"resample": 3}')
    read_detector(tmp_path)
    assert 'preprocessor_config.json resizes by another filter than bilinear' in capsys.readouterr().err


def test_a_folder_of_several_files_of_weights_is_refused(tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.pth').touch()
    with pytest.raises(InputError, match='neither a checkpoint folder'):
        read_detector(tmp_path)
    for name in ('model.safetensors.index.json', 'pytorch_model.bin.index.json'):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match='its weights are in several files; save them again as one'):
            read_detector(tmp_path)
        (tmp_path / name).unlink()


def test_a_folder_of_an_adapter_says_to_merge_it(tmp_path):
    (tmp_path / 'rng_state.pth').touch()  # of Trainer, without weights
    with pytest.raises(InputError, match='neither a checkpoint folder'):
        read_detector(tmp_path)
    (tmp_path / 'adapter_config.json').touch()
    with pytest.raises(InputError, match='a PEFT adapter without its base model; merge them'):
        read_detector(tmp_path)


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / 'x').write_text('x')
    with pytest.raises(InputError, match='neither a checkpoint folder'):
        read_detector(tmp_path)
    for inside in ('checkpoint-20', 'snapshots/0a'):  # of Trainer, of the hub's cache
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / 'model.safetensors').touch()
        with pytest.raises(InputError, match=f'name one of those in it: .*/{inside}$'):
            read_detector(tmp_path)
        (tmp_path / inside / 'model.safetensors').unlink()
    with pytest.raises(InputError, match='no such file'):
        read_detector(tmp_path / 'nowhere')


def test_a_run_that_this_user_may_not_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    (tmp_path / 'checkpoints').mkdir()
    monkeypatch.setattr(Path, 'iterdir', refuse)
    with pytest.raises(InputError, match=f'^{tmp_path}: cannot be read .Permission denied'):
        yolos_jax.load(tmp_path)
