import random

import numpy as np
import pytest
from scipy import stats

from yolos_jax.data import geometry
from yolos_jax.data.geometry import Recipe, draw, move_boxes, resize_shape
from yolos_jax.patches import longest_side, shortest_length

S = Recipe(sizes=tuple(range(480, 801, 16)), max_size=1333)


def reference_shape(height, width, size, max_size):
    """The rule of `resize` in the reference's datasets/transforms.py, in its own arithmetic."""
    short, long = float(min(height, width)), float(max(height, width))
    if max_size is not None and long / short * size > max_size:
        size = int(round(max_size * short / long))
    if (width <= height and width == size) or (height <= width and height == size):
        h, w = height, width
    elif width < height:
        h, w = int(size * height / width), size
    else:
        h, w = size, int(size * width / height)
    return max(h - h % 16, 16), max(w - w % 16, 16)


def test_resize_shape_is_the_references_rule():
    rng = random.Random(0)
    for _ in range(500):
        height, width = rng.randint(20, 2000), rng.randint(20, 2000)
        for size, max_size in ((800, 1333), (512, 853), (rng.randrange(256, 801, 16), 1013), (400, None)):
            expected = reference_shape(height, width, size, max_size)
            assert resize_shape(height, width, size, max_size) == expected


def test_resize_shape_works_on_whole_columns():
    height, width = np.array([480, 640, 100]), np.array([640, 480, 2000])
    rows, columns = resize_shape(height, width, 800, 1333)
    for i in range(3):
        assert (rows[i], columns[i]) == resize_shape(int(height[i]), int(width[i]), 800, 1333)


def test_very_thin_images_keep_a_row_of_patches():
    assert resize_shape(10, 3000, 800, 1333)[0] == 16


def test_a_sequence_is_as_long_as_the_longer_side_needs_and_no_longer():
    side = np.arange(1, 1000)
    for count in (side, 3 * side):
        length = shortest_length(count, side)
        assert all(s <= longest_side(n) for s, n in zip(side, length, strict=True))
        np.testing.assert_array_equal(length[:128], count[:128])
        assert all(
            longest_side(n - 1) < s for s, n in zip(side[128:], length[128:], strict=True) if n > 3 * s
        )


def test_a_draw_depends_on_seed_epoch_and_record_alone():
    heights, widths = np.full(50, 480), np.full(50, 640)
    one = draw(heights, widths, S, 1, 2)
    first = draw(heights[:20], widths[:20], S, 1, 2)
    for name in ('flip', 'crop', 'before', 'box', 'shape'):
        np.testing.assert_array_equal(getattr(first, name), getattr(one, name)[:20])
    for seed, epoch in ((1, 3), (2, 2)):
        assert (draw(heights, widths, S, seed, epoch).shape != one.shape).any()


def test_crops_lie_inside_the_image_and_within_their_bounds():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(100, 1500, (2, 3000))
    drawn = draw(heights, widths, S, 0, 0)
    top, left, h, w = drawn.box.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= drawn.before[:, 0]).all() and (left + w <= drawn.before[:, 1]).all()
    cropped = drawn.crop
    assert 0.45 < cropped.mean() < 0.55 and 0.45 < drawn.flip.mean() < 0.55
    assert h[cropped].min() == 384 and h[cropped].max() == 600
    assert set(np.minimum(*drawn.before[cropped].T)) == {400, 496, 592}
    plain = ~cropped
    np.testing.assert_array_equal(drawn.before[plain], np.stack([heights, widths], 1)[plain])


def test_a_recipe_has_the_values_it_is_given_and_else_the_published_ones_for_the_size():
    given = dict(sizes=(480, 512), max_size=900, crop_from=(400,), crop_min=100, crop_max=200)
    assert Recipe.from_fields(given, 512, 853) == Recipe(**given)
    assert Recipe.from_fields(given | {'max_size': 0}, 512, 853) == Recipe(**given | {'max_size': 853})
    assert Recipe.from_fields(given | {'sizes': ()}) == S
    half = Recipe(tuple(range(240, 401, 16)), 666, crop_from=(200, 250, 300), crop_min=192, crop_max=300)
    assert Recipe.from_fields(given | {'sizes': ()}, 400, 666) == half


def test_no_draw_has_more_patches_than_announced():
    heights, widths = np.random.default_rng(0).integers(200, 900, (2, 200))
    most = geometry.most_patches(heights, widths, S)
    seen = max(draw(heights, widths, S, 0, e).shape.prod(axis=1).max() // 256 for e in range(200))
    assert 0.97 * most <= seen <= most
    narrow = Recipe(sizes=(336,), max_size=560, crop_from=(168, 210), crop_min=176, crop_max=252)
    heights, widths = np.full(200, 369), np.full(200, 742)  # cropped from 160 rows and not 168
    most = geometry.most_patches(heights, widths, narrow)
    assert max(draw(heights, widths, narrow, 0, e).counts.max() for e in range(50)) <= most


def test_boxes_of_a_plain_resize_keep_their_place():
    drawn = geometry.fixed(np.array([480]), np.array([640]), 800, 1333)
    moved, kept = move_boxes(np.array([[64, 48, 320, 240]]), 480, 640, drawn[0])
    np.testing.assert_allclose(moved, [[0.3, 0.3, 0.4, 0.4]], atol=1e-6)
    assert kept.tolist() == [0]


def test_boxes_follow_flip_and_crop():
    place = geometry.Geometry(
        flip=True,
        crop=True,
        before=np.array([400, 800]),  # the image is 100 x 400
        box=np.array([100, 500, 200, 200]),
        shape=np.array([320, 320]),
    )
    boxes = np.array([[50.0, 30.0, 100.0, 45.0], [300.0, 30.0, 390.0, 45.0]])
    moved, kept = move_boxes(boxes, 100, 400, place)
    # flipped: x 300..350, scaled by 2 and 4: 600..700 x 120..180, in the crop: 100..200 x 20..80
    np.testing.assert_allclose(moved, [[0.75, 0.25, 0.5, 0.3]], atol=1e-6)
    assert kept.tolist() == [0]  # the other lies outside the crop


@pytest.mark.parametrize('recipe', [Recipe(sizes=(32,), max_size=64, crop_from=(32,), crop_min=384)])
def test_images_smaller_than_the_crop_are_used_whole(recipe):
    drawn = draw(np.full(20, 40), np.full(20, 50), recipe, 0, 0)
    cropped = drawn.crop
    np.testing.assert_array_equal(drawn.box[cropped, 2:], drawn.before[cropped])


def reference_draw(height, width, recipe, rng):
    """The reference's make_coco_transforms('train') on one image: flip, crop box or None, final size."""
    flip, box = rng.random() < 0.5, None
    if rng.random() >= 0.5:  # RandomSelect
        height, width = reference_shape(height, width, rng.choice(recipe.crop_from), None)
        w = rng.randint(recipe.crop_min, min(width, recipe.crop_max))
        h = rng.randint(recipe.crop_min, min(height, recipe.crop_max))
        box = rng.randint(0, height - h), rng.randint(0, width - w), h, w
        height, width = h, w
    return flip, box, reference_shape(height, width, rng.choice(recipe.sizes), recipe.max_size)


def test_draws_have_the_references_distribution():
    """20,000 images of COCO's sizes: every marginal of the draws, by Kolmogorov-Smirnov."""
    rng, n = random.Random(1), 20_000
    sizes = np.array(rng.choices([(480, 640), (427, 640), (640, 480), (375, 500), (640, 427)], k=n))
    ours = draw(*sizes.T, S, 0, 0)
    theirs = [reference_draw(*size, S, rng) for size in sizes.tolist()]
    assert stats.binomtest(int(ours.flip.sum()), n).pvalue > 0.01
    assert stats.binomtest(int(ours.crop.sum()), n).pvalue > 0.01
    shapes = np.array([shape for *_, shape in theirs])
    boxes = np.array([box for _, box, _ in theirs if box])
    cropped = ours.box[ours.crop]
    pairs = {
        'rows': (ours.shape[:, 0], shapes[:, 0]),
        'columns': (ours.shape[:, 1], shapes[:, 1]),
        'final area': (ours.shape.prod(axis=1), shapes.prod(axis=1)),
        'crop area': (cropped[:, 2:].prod(axis=1), boxes[:, 2:].prod(axis=1)),
        **{f'crop {i}': (cropped[:, i], boxes[:, i]) for i in range(4)},
    }
    for name, (a, b) in pairs.items():
        assert stats.ks_2samp(a, b).pvalue > 0.01, name
