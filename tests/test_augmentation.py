"""DeiT's augmentation against timm's, and against what timm gave."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from yolos_jax.data import augmentation, pixels
from yolos_jax.data.augmentation import OPERATIONS
from yolos_jax.patches import unpatchify

NAMES = (
    'AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd '
    'ColorIncreasing ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY '
    'TranslateXRel TranslateYRel'
).split()


def photograph(height, width, seed=0):
    """Coarse colours with grain on them, RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3))
    grain = rng.integers(-20, 20, (height, width, 3))
    image = np.repeat(np.repeat(coarse, 16, axis=0), 16, axis=1)[:height, :width] + grain
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def timm(name):
    """A module of timm by its file: `import timm` would need torchvision."""
    package = importlib.util.find_spec('timm')
    assert package, 'timm is not installed; make test does that'
    path = Path(package.submodule_search_locations[0]) / 'data' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize('name', NAMES)
def test_an_operation_equals_that_of_the_timm_installed(name, sign, monkeypatch):
    theirs, image = timm('auto_augment'), photograph(96, 112)
    # its own source of random numbers: for the sign, and to apply the operation
    monkeypatch.setattr(theirs.random, 'random', lambda: 0.9 if sign < 0 else 0.1)
    options = {'img_mean': augmentation.FILL, 'interpolation': Image.Resampling.BICUBIC}
    for strength in (0.81, 0.9, 1.0):
        operation = theirs.AugmentOp(name, prob=1.0, magnitude=strength * 10, hparams=options)
        assert operation(image) == OPERATIONS[NAMES.index(name)](image, strength, sign)


def test_erased_rectangles_are_those_of_timm_for_the_same_draws(monkeypatch):
    theirs = timm('random_erasing')
    draws, erased = augmentation.draw(64, seed=3, step=5), 0
    for i in range(64):
        row = {name: values[i] for name, values in draws.items()}
        box = augmentation.erase_box(224, row, 0.25)
        attempts = [u for pair in zip(row['erase_area'], row['erase_ratio'], strict=True) for u in pair]
        places, uniforms = iter(row['erase_place']), iter(attempts)
        fake = type('Random', (), {})()
        fake.random = lambda row=row: row['erases'][0]
        fake.uniform = lambda a, b, uniforms=uniforms: a + (b - a) * next(uniforms)
        fake.randint = lambda a, b, places=places: a + int(next(places) * (b - a + 1))
        monkeypatch.setattr(theirs, 'random', fake)
        image = torch.zeros(3, 224, 224)
        theirs.RandomErasing(0.25, mode='pixel', device='cpu')(image)
        changed = np.argwhere(image.numpy().any(axis=0))
        erased += len(changed) > 0
        expected = (*changed.min(axis=0), *(changed.max(axis=0) + 1)) if len(changed) else (0, 0, 0, 0)
        assert box == tuple(map(int, expected))
    assert 5 < erased < 30


def test_a_cut_has_the_area_that_is_drawn_and_ends_at_the_edges():
    assert augmentation.cut_box(224, 0.75, np.array([112, 112])) == (56, 56, 168, 168)
    assert augmentation.cut_box(224, 0.75, np.array([0, 223])) == (0, 167, 56, 224)
    assert augmentation.cut_box(224, 0.553, np.array([112, 112])) == (38, 38, 186, 186)  # of 149, as timm


def test_a_crop_is_cut_out_resized_and_flipped_as_pillow_does():
    image, out = photograph(160, 208), np.zeros((16, 768), np.uint8)
    draws = augmentation.draw(200, seed=0, step=0)
    seen = {'flipped': 0, 'plain': 0}
    for i in range(200):
        row = {name: values[i] for name, values in draws.items()}
        if (row['skips'] <= 0.5).any():
            continue
        top, left, h, w = augmentation.crop_box(
            160, 208, row['crop_area'], row['crop_ratio'], row['crop_place']
        )
        assert 0 <= top <= 160 - h and 0 <= left <= 208 - w and 0.05 < h * w / (160 * 208) <= 1
        expected = image.crop((left, top, left + w, top + h)).resize((64, 64), Image.Resampling.BICUBIC)
        flipped = row['flip'][0] < 0.5
        seen['flipped' if flipped else 'plain'] += 1
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else expected
        augmentation.train_image(pixels.to_rgbx(image), 64, row, out)
        squares = np.asarray(expected).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 768)
        np.testing.assert_array_equal(out, squares)
    assert min(seen.values()) > 10


def test_an_image_gets_its_two_operations_in_their_strength_and_direction():
    draws = augmentation.draw(150, seed=0, step=0)
    draws['skips'][:100] /= 2  # always, but for the last
    image, out, used = photograph(96, 96), np.zeros((16, 768), np.uint8), set()
    for i in range(150):
        row = {name: values[i] for name, values in draws.items()}
        plain = {**row, 'skips': np.ones(2)}
        augmentation.train_image(pixels.to_rgbx(image), 64, plain, out)
        expected = Image.fromarray(unpatchify(out, (4, 4)))
        for k in range(2):
            if row['skips'][k] <= 0.5:
                which, sign = int(15 * row['op'][k]), -1 if row['negates'][k] > 0.5 else 1
                expected = OPERATIONS[which](expected, min(row['strength'][k] / 10, 1), sign)
                used.add((which, sign))
        augmentation.train_image(pixels.to_rgbx(image), 64, row, out)
        np.testing.assert_array_equal(unpatchify(out, (4, 4)), expected)
    assert len(used) == 30


def test_a_crop_has_the_area_and_the_shape_that_are_drawn():
    for uniform, ratio in (0, 3 / 4), (0.25, (3 / 4) ** 0.5), (0.5, 1), (1, 4 / 3):
        for area in (0, 0.25):
            draws = np.full(10, area), np.full(10, uniform), np.array([0, 0.9999])
            top, left, h, w = augmentation.crop_box(1000, 1000, *draws)
            assert (top, left) == (0, 1000 - w) and w / h == pytest.approx(ratio, rel=0.01)
            assert h * w / 1e6 == pytest.approx(0.08 + 0.92 * area, rel=0.01)


def test_cutmix_alone_cuts_every_group_and_mixup_alone_none():
    recipe = augmentation.Recipe(size=64, repeats=1, erasing=0, mixup=0, cutmix=1.0, group=2)
    cut = augmentation.draw_mix(400, recipe, seed=0, step=0)
    assert (cut['share'] < 1).mean() > 0.9 and (cut['weight'] == 1).all()
    mixed = augmentation.draw_mix(400, recipe._replace(mixup=0.8, cutmix=0), seed=0, step=0)
    assert (mixed['weight'] < 1).all() and not mixed['box'].any()


def test_an_image_no_crop_fits_is_cut_in_the_middle():
    never = np.ones(10), np.zeros(10), np.zeros(2)  # the whole area at 3:4
    assert augmentation.crop_box(100, 400, *never) == (0, (400 - 133) // 2, 100, 133)
    assert augmentation.crop_box(400, 100, *never) == ((400 - 133) // 2, 0, 133, 100)
    for height, width in (1, 1), (1, 2), (2, 1):
        for area in np.linspace(0, 1, 9):
            draws = np.full(10, area), np.full(10, area), np.zeros(2)
            _, _, h, w = augmentation.crop_box(height, width, *draws)
            assert 1 <= h <= height and 1 <= w <= width


@pytest.mark.parametrize(('height', 'width'), [(160, 208), (208, 160), (100, 114)])
def test_evaluation_cuts_the_middle_out_of_the_image_resized(height, width):
    image, out = photograph(height, width), np.zeros((16, 768), np.uint8)
    augmentation.eval_image(pixels.to_rgbx(image), 64, out)
    short = 73  # 64 / 0.875
    shape = [short * side // min(height, width) for side in (height, width)]
    resized = image.resize(shape[::-1], Image.Resampling.BICUBIC)
    top, left = (round((side - 64) / 2) for side in shape)
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64)))
    squares = expected.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 768)
    np.testing.assert_array_equal(out, squares)


def test_half_of_the_operations_are_applied_with_a_mean_strength_of_nine():
    draws = augmentation.draw(20_000, seed=0, step=0)
    assert math.isclose((draws['skips'] <= 0.5).mean(), 0.5, abs_tol=0.01)
    assert math.isclose(draws['strength'].mean(), 9, abs_tol=0.02)
    assert math.isclose(draws['strength'].std(), 0.5, abs_tol=0.01)
    counts = np.bincount((draws['op'] * 15).astype(int).ravel(), minlength=15)
    assert counts.min() > 2400  # each about one in fifteen
