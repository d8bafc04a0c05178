import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, forward, make_hf, make_vit, noise, read_detector, to_torch, torches
from transformers import YolosForObjectDetection, YolosImageProcessor

from yolos_jax import model, weights
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import MEAN, STD, patchify
from yolos_jax.tools import convert as command
from yolos_jax.weights import adapt, checkpoint, hf, names, native, reference

CLASSES = {1: 'cat', 2: 'dog', 4: 'bird'}
WRITERS = {'jax': checkpoint.write, 'hf': hf.write, 'yolos': reference.write}


def make(fields, num_classes=5, classes=CLASSES, **rest):
    """A detector with random weights that give logits of about 1."""
    yolos = Yolos(**fields, num_classes=num_classes, eps=1e-5)  # one that no form takes for granted
    rng = np.random.default_rng(0)
    draw = lambda shape: np.float32(rng.normal(0, shape[-1] ** -0.5 if len(shape) > 1 else 0.1, shape))
    batch = np.zeros((1, 1, 768), np.uint8), np.ones((1, 2), np.int32)
    shapes = jax.eval_shape(yolos.init, jax.random.key(0), *batch)['params']
    params = jax.tree.map(lambda x: draw(x.shape), shapes)
    return weights.Pretrained(yolos, params, classes, 64, 128, **rest)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    for name in ('model', 'classes', 'size', 'max_size'):
        assert getattr(a, name) == getattr(b, name), name


def path_of(form, folder):
    return folder / 'yolos.pth' if form == 'yolos' else folder


@pytest.mark.parametrize('chain', [('yolos', 'jax', 'hf', 'jax', 'yolos'), ('hf', 'yolos', 'hf')])
@pytest.mark.parametrize('mid', [True, False])
def test_a_chain_of_conversions_returns_the_same_bits(chain, mid, tmp_path):
    pretrained = first = make(TINY if mid else {k: v for k, v in TINY.items() if k != 'mid_pos_grid'})
    files = []
    for number, form in enumerate(chain):
        folder = tmp_path / str(number)
        WRITERS[form](pretrained, folder)
        pretrained = read_detector(path_of(form, folder))
        same(pretrained, first)
        same(read_detector(folder), first)
        files += [hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob('yolos.pth')]
    assert len(set(files)) <= 1  # the .pth at both ends is the same file


def test_an_exported_folder_gives_the_same_outputs_in_transformers(tmp_path):
    pretrained = make(TINY)
    hf.write(pretrained, tmp_path / 'hf')
    theirs, info = YolosForObjectDetection.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert theirs.config.id2label == {0: 'N/A', 1: 'cat', 2: 'dog', 3: 'N/A', 4: 'bird'}
    image = noise(48, 80)
    with torch.no_grad():
        expected = theirs.eval()(to_torch(image))
    ours = forward(pretrained.model, pretrained.params, *patchify([image]))
    assert expected.logits.abs().max() > 0.4
    np.testing.assert_allclose(ours['pred_logits'], expected.logits, atol=1e-5)
    np.testing.assert_allclose(ours['pred_boxes'], expected.pred_boxes, atol=2e-6)


def test_the_exported_preprocessor_resizes_and_normalises_as_we_do(tmp_path):
    hf.write(make(TINY), tmp_path / 'hf')
    info = json.loads((tmp_path / 'hf' / 'preprocessor_config.json').read_text())
    processor = YolosImageProcessor.from_pretrained(tmp_path / 'hf')
    assert (processor.size['shortest_edge'], processor.size['longest_edge']) == (64, 128)
    np.testing.assert_allclose(processor.image_mean, MEAN)
    np.testing.assert_allclose(processor.image_std, STD)
    assert processor.resample == info['resample'] == 2


@pytest.mark.parametrize('name', ['YOLOS_TI', 'YOLOS_S_DWR'])  # without tables between blocks and with
def test_the_exported_file_has_the_names_shapes_and_types_of_the_references(name, tmp_path):
    fields = getattr(model, name)
    reference.write(make(fields, 91), tmp_path / 'x')
    pretrained = torch.load(tmp_path / 'x' / 'yolos.pth', weights_only=True)['model']
    assert {k: (tuple(v.shape), v.dtype) for k, v in pretrained.items()} == reference_state(**fields)


def reference_state(width, depth, pos_grid, heads, mid_pos_grid=None):
    """The state dict of the reference's Detector, written down from models/backbone.py and detector.py."""
    rows = lambda grid: 1 + grid[0] * grid[1] + 100
    shapes = {
        'backbone.cls_token': (1, 1, width),
        'backbone.det_token': (1, 100, width),
        'backbone.pos_embed': (1, rows(pos_grid), width),
        'backbone.patch_embed.proj.weight': (width, 3, 16, 16),
        'backbone.patch_embed.proj.bias': (width,),
        'backbone.norm.weight': (width,),
        'backbone.norm.bias': (width,),
    }
    if mid_pos_grid:
        shapes['backbone.mid_pos_embed'] = (depth - 1, 1, rows(mid_pos_grid), width)
    for i in range(depth):
        for layer, (out, into) in {
            'norm1': (width, 0),
            'attn.qkv': (3 * width, width),
            'attn.proj': (width, width),
            'norm2': (width, 0),
            'mlp.fc1': (4 * width, width),
            'mlp.fc2': (width, 4 * width),
        }.items():
            shapes[f'backbone.blocks.{i}.{layer}.weight'] = (out, into) if into else (out,)
            shapes[f'backbone.blocks.{i}.{layer}.bias'] = (out,)
    for head, out in (('class_embed', 92), ('bbox_embed', 4)):
        for i, size in enumerate((width, width, out)):
            shapes[f'{head}.layers.{i}.weight'] = (size, width)
            shapes[f'{head}.layers.{i}.bias'] = (size,)
    return {key: (shape, torch.float32) for key, shape in shapes.items()}


def test_tables_of_two_sizes_do_not_fit_the_hugging_face_form(tmp_path):
    pretrained = make(TINY | {'mid_pos_grid': (3, 3)})
    with pytest.raises(InputError, match='resample them to one size first'):
        hf.write(pretrained, tmp_path / 'x')
    changed, _ = adapt.with_pos_grid(pretrained, (4, 6))
    hf.write(changed, tmp_path / 'x')
    assert read_detector(tmp_path / 'x').model.mid_pos_grid == (4, 6)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    for form, write in WRITERS.items():
        if form != 'jax':
            with pytest.raises(InputError, match='No space left'):
                write(make(TINY), tmp_path / 'x')
    assert not list(tmp_path.iterdir())


def test_an_export_never_writes_over_anything(tmp_path):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'ours').write_text('ours')
    for write in WRITERS.values():
        with pytest.raises(InputError, match='exists and is not empty'):
            write(make(TINY), tmp_path / 'x')
    assert (tmp_path / 'x' / 'ours').read_text() == 'ours'


def convert(*arguments):
    command.main([str(argument) for argument in arguments])


def test_a_conversion_adapts_and_says_so(coco_folder, tmp_path, capsys):
    make_hf(TINY, num_classes=5).save_pretrained(tmp_path / 'hf')
    annotations = coco_folder / 'annotations' / 'instances_val2017.json'
    options = [f'--new_classes={annotations}', '--new_det_tokens=9', '--new_pos_grid', 5, 5]
    convert(f'--input={tmp_path / "hf"}', f'--output={tmp_path / "x"}', *options)
    pretrained = read_detector(tmp_path / 'x')
    assert pretrained.classes == {1: 'circle', 2: 'square', 3: 'triangle'}
    assert pretrained.model.num_classes == 4 and pretrained.model.num_det_tokens == 9
    assert pretrained.model.mid_pos_grid == (5, 5)
    printed = capsys.readouterr().out
    for text in ('used 68 tensors', '[DET] tokens: 7 of 7 kept, 2 fresh', 'pos_embed 4x6 -> 5x5',
                 'class head: 3 classes, 0 of them kept', pretrained.about['sha256']):  # fmt: skip
        assert text in printed


def test_large_category_ids_are_numbered_and_kept_by_every_form(coco_folder, tmp_path):
    make_hf(TINY, num_classes=5).save_pretrained(tmp_path / 'start')
    content = json.loads((coco_folder / 'annotations' / 'instances_val2017.json').read_text())
    for entry, key in [(x, 'id') for x in content['categories']] + [
        (x, 'category_id') for x in content['annotations']
    ]:
        entry[key] += 10_000
    (tmp_path / 'classes.json').write_text(json.dumps(content))
    convert(
        f'--input={tmp_path / "start"}',
        f'--output={tmp_path / "x"}',
        f'--new_classes={tmp_path}/classes.json',
    )
    for form in ('safetensors', 'hf', 'yolos'):
        convert(f'--input={tmp_path / "x"}', f'--output={tmp_path / form}', f'--to={form}')
    for form in ('x', 'safetensors', 'hf', 'yolos'):
        pretrained = read_detector(tmp_path / form)
        assert pretrained.classes == {0: 'circle', 1: 'square', 2: 'triangle'}
        assert pretrained.about['category_ids'] == {'0': 10_001, '1': 10_002, '2': 10_003}


@pytest.mark.parametrize(
    'write', [hf.write, reference.write, native.write, checkpoint.write], ids=lambda f: f.__module__
)
def test_parameters_that_are_not_the_models_are_not_written(write, tmp_path):
    pretrained = make(TINY)
    shallow = dataclasses.replace(pretrained, model=pretrained.model.clone(depth=1))
    params = jax.tree.map(lambda x: x * np.float32(np.nan), pretrained.params)
    for bad, says in (
        (shallow, 'not the model'),
        (dataclasses.replace(pretrained, params=params), 'not finite'),
    ):
        with pytest.raises(InputError, match=says):
            write(bad, tmp_path / 'x')
        assert not (tmp_path / 'x').exists()


def test_an_exported_checkpoint_says_the_step_of_its_run(tmp_path):
    pretrained = make(TINY)
    checkpoint.write(dataclasses.replace(pretrained, about={'step': 5000}), tmp_path / 'x')
    assert read_detector(tmp_path / 'x').about['step'] == 5000
    (step,) = checkpoint.steps(tmp_path / 'x')
    with pytest.raises(InputError, match=f'is step {step}, not 7'):
        weights.open(tmp_path / 'x' / str(step), 7)


@pytest.mark.trials
def test_converting_the_largest_model_needs_less_than_twice_and_a_half_its_file(tmp_path):
    reference.write(make(model.YOLOS_B, 91), tmp_path / '0')
    program = (
        'import re, runpy\n'
        'runpy.run_path("convert_torch_weights.py", run_name="__main__")\n'
        'print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])\n'
    )
    size, source = (tmp_path / '0' / 'yolos.pth').stat().st_size, tmp_path / '0' / 'yolos.pth'
    for number, form in enumerate(('jax', 'hf', 'yolos'), 1):
        output = tmp_path / str(number)
        options = [f'--input={source}', f'--output={output}', f'--to={form}']
        command = [sys.executable, '-c', program, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout.split()[-1]) * 1024 < 2.5 * size, form
        source = output


def test_a_published_backbone_becomes_a_detector(tmp_path, capsys):
    vit = make_vit(1 + 14**2, 192, 12)
    torch.save({'model': torches(vit)}, tmp_path / 'deit.pth')
    convert(f'--input={tmp_path / "deit.pth"}', f'--output={tmp_path / "x"}')
    assert 'pos_embed 14x14 -> 50x83' in capsys.readouterr().out
    pretrained = read_detector(tmp_path / 'x')
    assert pretrained.model.heads == 3 and pretrained.classes[1] == 'person'
    tensors = names.from_params(pretrained.params, pretrained.model)
    np.testing.assert_array_equal(tensors['backbone.norm.bias'].numpy(), vit['norm.bias'])


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--input=/nowhere', '--output=y'], '/nowhere: no such file or folder'),
        (['--input=x.pth', '--output=y'], 'x.pth: damaged, or not a file of torch.save'),
        (['--input=x.pth', '--output=.'], 'exists and is not empty'),
        (['--input=vit.pth', '--output=y'], 'width 32, depth 2, .* which no published detector has'),
        (['--input=vit.pth', '--output=y', '--heads=2'], 'heads is for a .pth of a detector'),
    ],
)
def test_an_input_or_output_that_cannot_be_used_is_named(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.pth').write_bytes(b'hello')
    torch.save(torches(make_vit()), tmp_path / 'vit.pth')
    with pytest.raises(InputError, match=says):
        convert(*options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['vit.pth', 'x.pth']
