import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from yolos_jax import boxes, matcher
from yolos_jax.run import mesh as meshes

B, Q, T = 20, 100, 100
assign = jax.jit(matcher.assign)
RANDOM = np.random.default_rng(0)
FAMILIES = {
    'uniform': lambda: RANDOM.random((T, Q)),
    'normal': lambda: RANDOM.normal(size=(T, Q)),
    'ties': lambda: RANDOM.integers(0, 4, (T, Q)),
    'all equal': lambda: np.ones((T, Q)),
    'rank one': lambda: np.outer(RANDOM.random(T), RANDOM.random(Q)),
    'equal rows': lambda: np.tile(RANDOM.random((1, Q)), (T, 1)),
    'equal columns': lambda: np.tile(RANDOM.random((T, 1)), (1, Q)),
    'products': lambda: np.outer(np.arange(1, T + 1), np.arange(1, Q + 1)),
    'wide range': lambda: 10 ** RANDOM.uniform(-6, 5, (T, Q)),
    'near ties': lambda: 1 + 1e-6 * RANDOM.random((T, Q)),
    'untrained': lambda: RANDOM.random((T, 1)) * 5 + 0.01 * RANDOM.normal(size=(T, Q)),
}


def check(cost, active, columns):
    """Each active row has a column of its own, and together they cost what scipy's do."""
    assert ((columns >= 0) == active).all()
    chosen = columns[active]
    assert len(set(chosen)) == len(chosen)
    cost = cost[active].astype(np.float64)
    best = cost[linear_sum_assignment(cost)].sum()
    ours = cost[np.arange(len(chosen)), chosen].sum()
    assert ours == pytest.approx(best, rel=1e-7, abs=1e-7)  # float32's own rounding


@pytest.mark.parametrize('family', FAMILIES)
def test_the_assignment_costs_what_scipys_does(family):
    cost = np.stack([FAMILIES[family]() for _ in range(B)]).astype(np.float32)
    active = np.arange(T) < RANDOM.integers(0, T + 1, (B, 1))
    columns = np.asarray(assign(cost, active))
    for image in zip(cost, active, columns, strict=True):
        check(*image)


def test_any_targets_may_be_the_valid_ones():
    cost = RANDOM.random((B, 30, Q)).astype(np.float32)
    active = RANDOM.random((B, 30)) < 0.5
    columns = np.asarray(assign(cost, active))
    for image in zip(cost, active, columns, strict=True):
        check(*image)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('where', [(), (3,), (slice(None), 5), (2, 2)])
def test_costs_that_are_not_finite_end_and_harm_no_other_image(value, where):
    cost = RANDOM.random((4, T, Q)).astype(np.float32)
    active = np.ones((4, T), bool)
    clean = np.asarray(assign(cost, active))
    cost[(1, *where)] = value
    columns = np.asarray(assign(cost, active))
    assert sorted(columns[1]) == list(range(Q))
    np.testing.assert_array_equal(columns[[0, 2, 3]], clean[[0, 2, 3]])


def problem(B=8, T=12, Q=10, C=5):
    make = lambda *shape: jnp.asarray(RANDOM.random(shape), jnp.float32)
    outputs = {'pred_logits': make(B, Q, C + 1), 'pred_boxes': make(B, Q, 4) * 0.5 + 0.1}
    targets = {
        'labels': jnp.asarray(RANDOM.integers(0, C, (B, T)), jnp.int32),
        'boxes': make(B, T, 4) * 0.5 + 0.1,
        'valid': jnp.arange(T) < jnp.arange(B)[:, None],
    }
    return outputs, targets


def test_the_cost_is_the_references():
    outputs, targets = problem()
    cost = matcher.cost_matrix(outputs, targets)
    b, t, q = 3, 1, 4
    probability = jax.nn.softmax(outputs['pred_logits'][b, q])[targets['labels'][b, t]]
    wanted, predicted = targets['boxes'][b, t], outputs['pred_boxes'][b, q]
    overlap = boxes.giou(boxes.cxcywh_to_xyxy(wanted), boxes.cxcywh_to_xyxy(predicted))
    expected = -probability + 5 * jnp.abs(wanted - predicted).sum() - 2 * overlap
    assert cost[b, t, q] == pytest.approx(float(expected), abs=1e-6)


def test_of_too_many_targets_the_largest_are_kept():
    outputs, targets = problem(T=14, Q=10)
    targets['valid'] = jnp.ones((8, 14), bool)
    query = np.asarray(matcher.match(outputs, targets))
    areas = np.asarray(targets['boxes'][..., 2] * targets['boxes'][..., 3])
    for chosen, area in zip(query, areas, strict=True):
        kept = chosen >= 0
        assert kept.sum() == 10 and area[kept].min() > area[~kept].max()


def test_a_sharded_batch_is_matched_equally_without_communication():
    outputs, targets = problem()
    alone = matcher.match(outputs, targets)
    mesh = meshes.make_mesh()
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        spread = [meshes.shard(x, mesh) for x in (outputs, targets)]
        program = jax.jit(matcher.match).lower(*spread).compile()
        np.testing.assert_array_equal(program(*spread), alone)
    assert 'all-reduce' not in program.as_text() and 'all-gather' not in program.as_text()


def test_with_64_bits_enabled_the_assignment_is_the_same():
    cost = RANDOM.random((3, 5, 9)).astype(np.float32)
    active = np.arange(5) < np.array([[5], [2], [0]])
    expected = assign(cost, active)
    with jax.enable_x64(True):
        columns = jax.jit(matcher.assign)(cost, active)
    assert columns.dtype == expected.dtype == np.int32
    np.testing.assert_array_equal(columns, expected)
