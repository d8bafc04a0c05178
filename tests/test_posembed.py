import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from yolos_jax import posembed


def torch_bicubic(table, grid):
    chw = torch.from_numpy(table).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(chw, size=grid, mode='bicubic', align_corners=False)
    return out[0].permute(1, 2, 0).numpy()


def table(rows, columns, width=8, deviation=0.02):
    return np.random.default_rng(0).normal(0, deviation, (rows, columns, width)).astype(np.float32)


GRIDS = [
    ((50, 83), (32, 43)),
    ((32, 54), (50, 83)),
    ((32, 54), (43, 32)),  # taller than wide
    ((14, 14), (50, 84)),
    ((24, 24), (1, 83)),
    ((32, 54), (36, 48)),  # as many patches as the table, in another shape
]


@pytest.mark.parametrize(('source', 'grid'), GRIDS)
def test_a_table_is_resampled_at_load_as_torch_does(source, grid):
    t = table(*source, deviation=1)
    np.testing.assert_allclose(posembed.resample(t, grid), torch_bicubic(t, grid), atol=1e-6, rtol=0)


def by_products(table, grids, length):
    """A table as sequences of patches alone, in the way of a GPU or TPU."""
    layout = posembed.layout(table.shape[:2], jnp.array(grids), length)
    return posembed.sequences(jnp.zeros((0, table.shape[-1])), jnp.asarray(table), layout)


def by_taps(table, grids, length):
    """The same, in the way of a CPU."""
    taps = posembed.taps(table.shape[:2], jnp.array(grids), length)
    return posembed.from_taps(jnp.zeros((0, table.shape[-1])), table, taps)  # NumPy's too: read parameters


ways = pytest.mark.parametrize('spread', [by_products, by_taps])


@ways
@pytest.mark.parametrize(('source', 'grid'), GRIDS)
def test_a_table_is_resampled_in_the_model_as_torch_does(source, grid, spread):
    t = table(*source)
    resampled = spread(t, [grid], grid[0] * grid[1])[0].reshape(*grid, -1)
    np.testing.assert_allclose(resampled, torch_bicubic(t, grid), atol=2e-7)


@ways
def test_every_image_of_a_batch_gets_its_own_grid(spread):
    t = table(32, 54)
    grids = [(20, 30), (30, 20), (32, 43), (1, 90), (90, 1), (37, 37), (0, 0)]
    out = np.asarray(jax.jit(lambda grids: spread(t, grids, 1400))(jnp.array(grids)))
    for sequence, (rows, columns) in zip(out, grids, strict=True):
        if rows:
            expected = torch_bicubic(t, (rows, columns)).reshape(rows * columns, -1)
            np.testing.assert_allclose(sequence[: rows * columns], expected, atol=2e-7)
        assert not sequence[rows * columns :].any()


@ways
def test_the_same_grid_returns_the_table_itself(spread):
    t = table(32, 54)
    assert np.array_equal(spread(t, [(32, 54)], 32 * 54)[0], t.reshape(-1, t.shape[-1]))


@ways
@pytest.mark.parametrize('grid', [(20, 30), (30, 20)])
def test_the_gradient_is_torchs(grid, spread):
    t = table(16, 24)
    weight = np.random.default_rng(1).normal(size=(*grid, t.shape[-1])).astype(np.float32)
    source = torch.from_numpy(t).requires_grad_()
    chw = source.permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(chw, size=grid, mode='bicubic', align_corners=False)
    (out[0].permute(1, 2, 0) * torch.from_numpy(weight)).sum().backward()

    def loss(t):
        rows = spread(t, [grid], 700)[0, : grid[0] * grid[1]]
        return (rows.reshape(*grid, -1) * weight).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(t)), source.grad.numpy(), atol=2e-5, rtol=2e-5)


def test_sine_tables_tell_every_patch_from_every_other():
    rows = posembed.sine((7, 8), 128)
    assert rows.shape == (56, 128)
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1) + np.eye(56) * 9
    assert distance.min() > 1
    np.testing.assert_allclose(rows[0], np.tile([0, 2], 2).repeat(32))  # sines and cosines of 0
    np.testing.assert_allclose(rows[3 * 8 + 5, [0, 31, 64, 95]], 2 * np.sin([3, 0.03, 5, 0.05]), rtol=1e-6)
    assert posembed.sine((3, 3), 330).shape == (9, 330)  # not a multiple of 4
