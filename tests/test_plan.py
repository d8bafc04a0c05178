import itertools

import numpy as np
import pytest

from configs import yolos_s, yolos_ti
from yolos_jax.data import geometry
from yolos_jax.data.plan import choose_lengths, in_order, plan, waste

RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.integers(100, 2000, 1003)
LENGTHS = (500, 1000, 1500, 2000)


def test_an_epoch_holds_every_image_once_but_for_the_last_few():
    batches, lengths = plan(COUNTS, LENGTHS, 8, seed=0, epoch=0)
    assert batches.shape == (125, 8) and lengths.shape == (125,)
    used = batches.ravel()
    assert len(set(used)) == 1000 and set(lengths) <= set(LENGTHS)


def test_every_image_fits_its_batch_and_no_shorter_length_would_do():
    batches, lengths = plan(COUNTS, LENGTHS, 8, seed=0, epoch=0)
    longest = COUNTS[batches].max(axis=1)
    assert (longest <= lengths).all()
    assert all(
        n == min(length for length in LENGTHS if length >= m) for m, n in zip(longest, lengths, strict=True)
    )


def test_a_plan_depends_on_seed_and_epoch():
    one = plan(COUNTS, LENGTHS, 8, 0, 0)[0]
    np.testing.assert_array_equal(one, plan(COUNTS, LENGTHS, 8, 0, 0)[0])
    assert (one != plan(COUNTS, LENGTHS, 8, 0, 1)[0]).any()
    assert (one != plan(COUNTS, LENGTHS, 8, 1, 0)[0]).any()


def test_other_images_share_a_batch_and_are_left_out_in_each_epoch():
    first, *others = (plan(np.full(11, 400), LENGTHS, 4, 0, epoch)[0] for epoch in range(20))
    assert len({frozenset(batches.ravel()) for batches in (first, *others)}) > 10
    batches_of = lambda batches: {frozenset(batch) for batch in batches.tolist()}
    assert not any(batches_of(first) & batches_of(other) for other in others)


def test_lengths_come_in_no_order():
    _, lengths = plan(COUNTS, LENGTHS, 8, 0, 0)
    assert (np.diff(lengths) < 0).sum() > 20


def test_few_images_are_padded_beyond_their_own_length():
    batches, lengths = plan(COUNTS, LENGTHS, 8, 0, 0)
    own = np.array(LENGTHS)[np.searchsorted(LENGTHS, COUNTS[batches])]
    assert (own != lengths[:, None]).sum() <= len(LENGTHS) * 8


@pytest.mark.parametrize('how_many', [1, 2, 3])
def test_the_chosen_lengths_waste_the_least_possible(how_many):
    counts = RANDOM.integers(1, 150, 300)
    chosen = choose_lengths(counts, 150, how_many, special=5)
    tile = 8
    assert all((length + 5) % tile == 0 for length in chosen) and len(chosen) <= how_many
    assert chosen[-1] >= 150 > chosen[-1] - tile
    total = lambda lengths: np.array(lengths)[np.searchsorted(lengths, counts)].sum()
    candidates = range(chosen[-1] % tile, chosen[-1], tile)
    others = itertools.combinations(candidates, how_many - 1)
    assert total(chosen) == min(total((*other, chosen[-1])) for other in others)


def test_evaluation_sees_every_image_once():
    batches, lengths = in_order(COUNTS, LENGTHS, 8)
    assert batches.shape == (126, 8)
    real = batches[batches >= 0]
    assert sorted(real) == list(range(1003)) and (batches < 0).sum() == 5
    for batch, length in zip(batches, lengths, strict=True):
        assert COUNTS[batch[batch >= 0]].max() <= length


def test_waste_is_the_share_of_padding():
    assert waste(np.array([5, 10]), np.array([[0, 1]]), np.array([10])) == 0.25


def coco_like_sizes(n, rng):
    """(heights, widths) after COCO: the commonest six in their shares; others 640 or 500 pixels long."""
    common = [(480, 640), (427, 640), (640, 480), (426, 640), (375, 500), (640, 427)]
    shares = [0.215, 0.124, 0.070, 0.045, 0.044, 0.036]
    long = np.where(rng.random(n) < 0.8, 640, 500)
    short = (long * rng.triangular(0.45, 0.7, 1, n)).astype(int)
    upright = rng.random(n) < 0.29
    sizes = np.stack([np.where(upright, long, short), np.where(upright, short, long)], axis=1)
    kind = rng.choice(7, n, p=[*shares, 1 - sum(shares)])
    return np.where(kind[:, None] < 6, np.array([*common, (0, 0)])[kind], sizes).T


@pytest.mark.parametrize(('config', 'most'), [(yolos_s, 0.09), (yolos_ti, 0.125)])
def test_eight_lengths_leave_little_padding_on_coco(config, most):
    config = config.get_config()
    heights, widths = coco_like_sizes(118_000, np.random.default_rng(0))
    recipe = geometry.Recipe(**config.augment)
    counts = geometry.draw(heights, widths, recipe, 0, 0).counts
    longest = geometry.most_patches(heights, widths, recipe)
    lengths = choose_lengths(counts, longest, config.num_lengths)
    assert len(lengths) == 8
    batches, used = plan(counts, lengths, config.batch_size, 0, 0)
    assert waste(counts, batches, used) < most
