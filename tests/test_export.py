import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import TINY, make_hf, noise, to_torch
from transformers import YolosForObjectDetection, YolosImageProcessor

import yolos_jax
from yolos_jax import adapt, convert, export, model, weights
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, patchify

ROOT = Path(yolos_jax.__file__).parent.parent
CLASSES = {1: 'cat', 2: 'dog', 4: 'bird'}
WRITERS = {'jax': export.to_jax, 'hf': export.to_hf, 'yolos': export.to_yolos}


def make(fields, num_classes=5, classes=CLASSES, **rest):
    """A detector with random weights that give logits of about 1."""
    yolos = Yolos(**fields, num_classes=num_classes, eps=1e-5)  # one that no form takes for granted
    rng = np.random.default_rng(0)
    draw = lambda shape: np.float32(rng.normal(0, shape[-1] ** -0.5 if len(shape) > 1 else 0.1, shape))
    batch = np.zeros((1, 1, 768), np.uint8), np.ones((1, 2), np.int32)
    shapes = jax.eval_shape(yolos.init, jax.random.key(0), *batch)['params']
    params = jax.tree.map(lambda x: draw(x.shape), shapes)
    return weights.Weights(yolos, params, classes, 64, 128, **rest)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    for name in ('model', 'classes', 'size', 'max_size'):
        assert getattr(a, name) == getattr(b, name), name


def path_of(form, folder):
    return folder / 'yolos.pth' if form == 'yolos' else folder


@pytest.mark.parametrize('chain', [('yolos', 'jax', 'hf', 'jax', 'yolos'), ('hf', 'yolos', 'hf')])
@pytest.mark.parametrize('mid', [True, False])
def test_a_chain_of_conversions_returns_the_same_bits(chain, mid, tmp_path):
    found = first = make(TINY if mid else {k: v for k, v in TINY.items() if k != 'mid_pos_grid'})
    files = []
    for number, form in enumerate(chain):
        folder = tmp_path / str(number)
        WRITERS[form](found, folder)
        found = weights.read(path_of(form, folder))
        same(found, first)
        files += [hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob('yolos.pth')]
    assert len(set(files)) <= 1  # the .pth at both ends is the same file


def test_transformers_sees_what_we_see_in_the_exported_folder(tmp_path):
    found = make(TINY)
    export.to_hf(found, tmp_path / 'hf')
    hf, said = YolosForObjectDetection.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(said[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert hf.config.id2label == {0: 'N/A', 1: 'cat', 2: 'dog', 3: 'N/A', 4: 'bird'}
    image = noise(48, 80)
    with torch.no_grad():
        expected = hf.eval()(to_torch(image))
    mine = found.model.apply({'params': found.params}, *patchify([image]))
    assert expected.logits.abs().max() > 0.4
    np.testing.assert_allclose(mine['pred_logits'], expected.logits, atol=1e-5)
    np.testing.assert_allclose(mine['pred_boxes'], expected.pred_boxes, atol=2e-6)


def test_the_exported_preprocessor_resizes_and_normalises_as_we_do(tmp_path):
    export.to_hf(make(TINY), tmp_path / 'hf')
    said = json.loads((tmp_path / 'hf' / 'preprocessor_config.json').read_text())
    processor = YolosImageProcessor.from_pretrained(tmp_path / 'hf')
    assert (processor.size['shortest_edge'], processor.size['longest_edge']) == (64, 128)
    np.testing.assert_allclose(processor.image_mean, model.MEAN)
    np.testing.assert_allclose(processor.image_std, model.STD)
    assert processor.resample == said['resample'] == 2


@pytest.mark.parametrize('name', ['YOLOS_TI', 'YOLOS_S', 'YOLOS_S_DWR', 'YOLOS_B'])
def test_the_exported_file_has_the_names_shapes_and_types_of_the_references(name, tmp_path):
    fields = getattr(model, name)
    export.to_yolos(make(fields, 91), tmp_path / 'x')
    found = torch.load(tmp_path / 'x' / 'yolos.pth', weights_only=True)['model']
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == reference_state(**fields)


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


def test_what_hugging_face_cannot_say_is_an_error(tmp_path):
    found = make(TINY | {'mid_pos_grid': (3, 3)})
    with pytest.raises(InputError, match='new_pos_grid'):
        export.to_hf(found, tmp_path / 'x')
    changed, _ = adapt.with_pos_grid(found, (4, 6))
    export.to_hf(changed, tmp_path / 'x')
    assert weights.read(tmp_path / 'x').model.mid_pos_grid == (4, 6)


def test_the_model_card_says_what_is_known_and_no_more(tmp_path):
    config = {'epochs': 7, 'learning_rate': 0.1, 'augment.sizes': [96, 112], 'val_split': 'val2017'}
    about = {'config': config, 'AP': 0.31234, 'source': 'deit.pth', 'sha256': 'a' * 64}
    card = export.model_card(make(TINY, about=about))
    for text in ('0.312 on val2017', 'epochs: 7', 'sides in training: [96, 112]', 'deit.pth, SHA-256 aaaa'):
        assert text in card
    assert 'cat, dog, bird' in card and 'resized to 64 pixels' in card
    bare = export.model_card(make(TINY))
    assert 'not measured' in bare and '## Training' not in bare and 'None' not in bare


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
    (tmp_path / 'x' / 'mine').write_text('mine')
    for write in WRITERS.values():
        with pytest.raises(InputError, match='exists and is not empty'):
            write(make(TINY), tmp_path / 'x')
    assert (tmp_path / 'x' / 'mine').read_text() == 'mine'


def script(*arguments, **options):
    command = [sys.executable, 'convert_torch_weights.py', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_the_script_converts_adapts_and_says_so(coco_folder, tmp_path):
    hf = make_hf(TINY, num_classes=5)
    hf.save_pretrained(tmp_path / 'hf')
    annotations = coco_folder / 'annotations' / 'instances_val2017.json'
    options = [f'--new_classes={annotations}', '--new_det_tokens=9', '--new_pos_grid', 5, 5]
    done = script(f'--input={tmp_path / "hf"}', f'--output={tmp_path / "x"}', *options)
    assert done.returncode == 0, done.stderr
    found = weights.read(tmp_path / 'x')
    assert found.classes == {1: 'circle', 2: 'square', 3: 'triangle'} and found.model.num_classes == 4
    assert found.model.num_det_tokens == 9 and found.model.mid_pos_grid == (5, 5)
    for text in ('used 68 tensors', '[DET] tokens: 7 of 7 kept, 2 fresh', 'pos_embed 4x6 -> 5x5',
                 'class head: 3 classes, 0 of them kept', found.about['sha256']):  # fmt: skip
        assert text in done.stdout


@pytest.mark.parametrize('form', WRITERS)
def test_a_killed_conversion_leaves_nothing_that_loads_or_all(form, tmp_path):
    found = make(TINY)
    export.to_jax(found, tmp_path / 'x')
    for tenths in (5, 15, 20, 25, 30, 35):
        output = tmp_path / f'{form}-{tenths}'
        options = [f'--input={tmp_path / "x"}', f'--output={output}', f'--to={form}']
        process = subprocess.Popen([sys.executable, 'convert_torch_weights.py', *options], cwd=ROOT)
        time.sleep(tenths / 10)
        process.kill()
        process.wait()
        if output.exists():
            same(weights.read(path_of(form, output)), found)


def test_converting_the_largest_model_needs_less_than_twice_and_a_half_its_file(tmp_path):
    export.to_yolos(make(model.YOLOS_B, 91), tmp_path / '0')
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


def test_the_script_makes_a_detector_of_a_published_backbone(tmp_path):
    from test_backbones import make_vit, torches

    vit = make_vit(1 + 14**2, 192, 12)
    torch.save({'model': torches(vit)}, tmp_path / 'deit.pth')
    done = script(f'--input={tmp_path / "deit.pth"}', f'--output={tmp_path / "x"}')
    assert done.returncode == 0 and 'pos_embed 14x14 -> 50x83' in done.stdout, done.stderr
    found = weights.read(tmp_path / 'x')
    assert found.model.heads == 3 and found.classes[1] == 'person'
    tensors = convert.from_params(found.params, found.model)
    np.testing.assert_array_equal(tensors['backbone.norm.bias'].numpy(), vit['norm.bias'])


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / 'x.pth').write_bytes(b'hello')
    for arguments, says in (
        (['--input=/nowhere', f'--output={tmp_path / "y"}'], '/nowhere: no such file or folder'),
        ([f'--input={tmp_path / "x.pth"}', f'--output={tmp_path / "y"}'], 'no file of torch.save'),
        ([f'--input={tmp_path / "x.pth"}', f'--output={tmp_path}'], 'exists and is not empty'),
    ):
        done = script(*arguments)
        assert done.returncode == 1 and says in done.stderr
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']
