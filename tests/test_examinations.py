"""The paper's examinations: cost, attention of [DET] tokens, and what tokens specialise in."""

import json

import jax
import numpy as np
import pytest
import torch
from helpers import TINY, make_hf, noise, read_detector, to_torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import yolos_jax
from yolos_jax.data import geometry
from yolos_jax.errors import InputError
from yolos_jax.model import init_params
from yolos_jax.patches import patchify
from yolos_jax.tools import attention, card, compare, evaluate, speed, tokens, verify


def small(fields):
    """A published model with tables for a small image, which quick tests need."""
    return fields | {'pos_grid': (6, 8), 'mid_pos_grid': fields.get('mid_pos_grid') and (6, 8)}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights') / 'hf'
    hf = make_hf(TINY, num_classes=4)
    hf.config.id2label = {0: 'N/A', 1: 'circle', 2: 'square', 3: 'triangle'}
    hf.save_pretrained(folder)
    size = {'size': {'shortest_edge': 64, 'longest_edge': 128}}
    (folder / 'preprocessor_config.json').write_text(json.dumps(size))
    return folder


@pytest.mark.parametrize(
    ('command', 'arguments'),
    [
        (attention, ['--weights=/nowhere', 'image.jpg']),
        (tokens, ['--weights=/nowhere', '--data=/nowhere']),
        (speed, ['--weights=/nowhere', '--data=/nowhere']),
        (compare, ['/nowhere']),
        (card, ['--weights=/nowhere']),
        (verify, []),
    ],
)
def test_an_unwritable_output_is_an_error_before_any_work(command, arguments, tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(InputError, match='x: cannot be written to: .*file is a file') as error:
        command.main([*arguments, f'--output={tmp_path / "file" / "x" / "x"}'])
    assert error.value.argument == 'output'


def test_a_page_of_attention_never_replaces_another_file(tmp_path):
    output = tmp_path / 'output'
    output.mkdir()
    images = [tmp_path / name for name in ('first.jpg', 'second.jpg')]
    for path in (*images, output / 'second.png'):
        Image.fromarray(noise(32, 32)).save(path)
    with pytest.raises(InputError, match=r'second\.png: exists and is not') as error:
        attention.main(['--weights=/nowhere', f'--output={output}', *map(str, images)])
    assert error.value.argument == 'output'


def test_attention_in_videos_is_not_drawn(tmp_path, capsys):
    (tmp_path / 'x.mp4').touch()
    with pytest.raises(InputError, match='all inputs are videos; give images'):
        attention.main(['--weights=/nowhere', f'--output={tmp_path / "output"}', str(tmp_path)])
    assert capsys.readouterr().err == f'left out: {tmp_path}/x.mp4: a video\n'


@pytest.mark.parametrize('name', ['YOLOS_TI', 'YOLOS_S_DWR'])
def test_multiply_adds_are_those_that_torch_counts(name):
    fields = getattr(yolos_jax, name)
    hf = make_hf(small(fields))
    hf.set_attn_implementation('eager')  # the counter does not know the fused one of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(pixel_values=to_torch(noise(160, 208)))
    ours = speed.macs(yolos_jax.Yolos(**fields), (10, 13))
    assert 2 * ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ('name', 'size', 'gflops'),
    [('YOLOS_TI', 512, 18.8), ('YOLOS_S', 800, 194), ('YOLOS_S_DWR', 784, 172), ('YOLOS_B', 800, 538)],
)
def test_the_cost_of_a_photograph_is_about_the_papers(name, size, gflops):
    height, width = geometry.resize_shape(480, 640, size, size * 1333 // 800)
    macs = speed.macs(yolos_jax.Yolos(**getattr(yolos_jax, name)), (height // 16, width // 16))
    assert macs / 1e9 == pytest.approx(gflops, rel=0.1)


def test_the_computed_cost_saves_most_of_the_last_block_and_includes_padding():
    model = yolos_jax.Yolos(**yolos_jax.YOLOS_TI)
    assert 0.9 < speed.computed_macs(model, 32 * 42) / speed.macs(model, (32, 42)) < 0.97
    assert speed.computed_macs(model, 2000) > speed.computed_macs(model, 1344)


def test_an_evaluation_from_python_is_that_of_the_command(saved, coco_folder, tmp_path):
    evaluate.main(
        [f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--num_processes=1']
    )
    written = json.loads((tmp_path / 'metrics.json').read_text())
    del written['about']
    for detector in (saved, read_detector(saved), yolos_jax.Detector.from_pretrained(saved)):
        assert yolos_jax.evaluate(detector, coco_folder) == written
    assert set(written['classes']) == {'circle', 'square', 'triangle'}


def test_speed_is_measured_over_the_images_of_a_split(saved, coco_folder, tmp_path, capsys):
    speed.main([f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--images=6'])
    numbers = json.loads((tmp_path / 'speed.json').read_text())
    assert numbers['images'] == 6 and numbers['parameters'] == sum(
        x.size for x in jax.tree.leaves(read_detector(saved).params)
    )
    for rates in (numbers['fps'], numbers['fps_from_file']):
        assert 0 < rates['p10'] <= rates['median'] <= rates['p90']
    assert 'GFLOPs' in capsys.readouterr().out and numbers['gflops'] < 0.1


@pytest.mark.parametrize('name', ['YOLOS_TI', 'YOLOS_S'])
@pytest.mark.parametrize('block', [-1, 5])
def test_attention_is_that_of_transformers(name, block):
    """With padding, on a grid of its own, in every head."""
    hf = make_hf(small(getattr(yolos_jax, name)))
    hf.set_attn_implementation('eager')
    image = noise(96, 128)
    with torch.no_grad():
        theirs = hf(pixel_values=to_torch(image), output_attentions=True).attentions[block][0]
    Q = 100
    expected = theirs[:, -Q:, 1:-Q].numpy()  # [CLS], patches, [DET]
    model, params = _ours(hf)
    patches, grid = patchify([image], 70)
    ours = attention.maps(model, params, patches, grid, block)
    assert ours.shape == (1, model.heads, Q, 70)
    np.testing.assert_allclose(ours[0, :, :, :48], expected, atol=1e-5)
    assert not np.asarray(ours[..., 48:]).any()
    assert expected.max() > 3 * np.median(expected)  # some patches are looked at more than others


@pytest.mark.parametrize('length', [48, 70])
def test_attention_to_an_object_is_drawn_where_the_object_is(length):
    """Two images differ only in an object. In a model of one block, the attention to all other patches then
    changes by one common factor; without that factor, only the object is left, and only it is bright."""
    model = yolos_jax.Yolos(**TINY | {'depth': 1})
    params = init_params(model, jax.random.key(0))
    image = np.full((96, 128, 3), 90, np.uint8)
    with_object = image.copy()
    with_object[32:64, 80:112] = 250, 20, 20  # rows 2 and 3, columns 5 and 6 of patches
    patches, grid = patchify([image, with_object], length)
    before, after = np.asarray(attention.maps(model, params, patches, grid))[..., :48]
    factor = np.log(after / before)
    change = abs(factor - np.median(factor, axis=-1, keepdims=True)).reshape(-1, 6, 8).max(axis=0)
    inside = np.zeros((6, 8), bool)
    inside[2:4, 5:7] = True
    assert change[inside].min() > 100 * change[~inside].max()
    drawn = np.asarray(attention.overlay(Image.fromarray(image), change / change.max())).sum(axis=2)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert 32 <= y < 64 and 80 <= x < 112


def _ours(hf):
    from helpers import reference_tensors

    from yolos_jax.weights import names

    config = hf.config
    grid = tuple(side // 16 for side in config.image_size)
    model = yolos_jax.Yolos(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        pos_grid=grid,
        mid_pos_grid=grid if config.use_mid_position_embeddings else None,
        eps=config.layer_norm_eps,
    )
    return model, names.to_params(reference_tensors(hf), model)


def test_a_block_that_is_not_there_is_named(saved):
    model, params = yolos_jax.load(saved)
    with pytest.raises(InputError, match='block is 3, but the model has 3 blocks'):
        attention.maps(model, params, *patchify([noise(64, 64)]), 3)


def test_an_overlay_is_brightest_where_the_weight_is():
    image = Image.new('RGB', (160, 96), (40, 40, 40))
    weight = np.zeros((6, 10))
    weight[1, 7] = 1
    heat = np.asarray(attention.overlay(image, weight), np.int32).sum(axis=2)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y - 24) <= 8 and abs(x - 120) <= 8
    assert (heat[60:, :80] < heat.max() / 3).all()


def test_pages_of_attention_are_written(saved, coco_folder, tmp_path):
    image = coco_folder / 'val2017' / '000000000003.jpg'
    attention.main([f'--weights={saved}', f'--output={tmp_path}', '--threshold=0', str(image)])
    page = Image.open(tmp_path / '000000000003.png')
    assert page.width > 3 * 200 and page.height > TINY['num_det_tokens'] * 100
    attention.main([f'--weights={saved}', f'--output={tmp_path}', '--threshold=0', str(image)])  # its own
    Image.new('RGB', (9, 9)).save(tmp_path / '000000000003.png')
    with pytest.raises(InputError, match='000000000003.png: exists and is not'):
        attention.main([f'--weights={saved}', f'--output={tmp_path}', '--threshold=0', str(image)])


def test_correlations_are_numpys_on_tokens_made_for_them():
    rng = np.random.default_rng(0)
    embeddings, centres = rng.normal(size=(20, 8)), rng.random((7, 20, 2))
    logits = rng.normal(size=(7, 20, 5))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    similarity = np.array([unit[i] @ unit[j] for i, j in pairs])
    distance = np.array([[np.linalg.norm(c[i] - c[j]) for i, j in pairs] for c in centres])
    cosine = np.array(
        [[x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i, j in pairs] for x in logits]
    )
    for values, ours in (
        (distance, lambda average: tokens.correlation(embeddings, centres, average)),
        (cosine, lambda average: tokens.class_correlation(embeddings, logits, average)),
    ):
        every = np.corrcoef(np.tile(similarity, 7), values.ravel())[0, 1]
        assert ours(False) == pytest.approx(every, abs=1e-6)
        assert ours(True) == pytest.approx(np.corrcoef(similarity, values.mean(0))[0, 1], abs=1e-6)


def test_tokens_that_lie_as_their_boxes_do_have_a_correlation_of_nearly_minus_one():
    """Tokens on a small arc: their angle, and so one minus the cosine, grows with the distance."""
    place = np.linspace(0, 0.3, 50)
    embeddings = np.stack([np.cos(place), np.sin(place)], axis=1)
    centres = np.stack([place, place], axis=1)[None]
    assert tokens.correlation(embeddings, centres) < -0.95


def test_tokens_that_predict_the_same_have_no_correlation():
    assert tokens.correlation(np.eye(5), np.ones((3, 5, 2))) is None


def test_tokens_that_are_the_same_have_no_correlation():
    places = np.random.default_rng(0).random((3, 5, 2))
    assert tokens.correlation(np.zeros((5, 4)), places) is None  # as transformers makes them


def test_the_tokens_command_writes_its_numbers_and_pictures(saved, coco_folder, tmp_path):
    tokens.main([f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}'])
    numbers = json.loads((tmp_path / 'tokens.json').read_text())
    assert numbers['images'] == 10 and numbers['tokens'] == TINY['num_det_tokens']
    assert -1 <= numbers['rho with distance'] <= 1 and 'Pearson' in numbers['method']
    for name in ('boxes.png', 'classes.png'):
        assert (tmp_path / name).stat().st_size > 5000
