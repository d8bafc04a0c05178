import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, noise
from jax.sharding import PartitionSpec as P

from yolos_jax import spmd, steps
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import patchify
from yolos_jax.run import mesh as meshes


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    """And not computed whole by every device in silence."""
    double = spmd.over_batch(lambda x: 2 * x)
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]  # no mesh
    mesh = meshes.make_mesh()
    with jax.set_mesh(mesh), pytest.raises(ValueError, match='12 rows does not divide over 8 devices'):
        jax.jit(double).lower(jnp.ones(12))
    patches, grid = patchify([noise(64, 96)] * 3)
    model = Yolos(**TINY, num_classes=3)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match='3 rows does not divide'):
        model.apply({'params': init_params(model, jax.random.key(0))}, patches, grid)


def test_an_explicit_mesh_is_refused():
    with jax.set_mesh(jax.make_mesh((8,), ('batch',))), pytest.raises(ValueError, match='mesh.make_mesh'):
        jax.jit(spmd.over_batch(lambda x: 2 * x)).lower(jnp.ones(16))


def test_a_model_is_initialised_under_a_mesh_too():
    mesh, model = meshes.make_mesh(), Yolos(**TINY, num_classes=3)
    patches, grid = patchify([noise(64, 96)] * 8)
    with jax.set_mesh(mesh):
        params = jax.jit(model.init)(jax.random.key(0), patches, grid)['params']
    jax.tree.map(np.testing.assert_array_equal, params, init_params(model, jax.random.key(0)))


def test_parts_are_made_of_each_devices_own_rows():
    from benchmarks.collectives import collectives

    mesh = meshes.make_mesh(jax.devices()[:2])
    with jax.set_mesh(mesh):
        rows = meshes.shard({'x': np.arange(8)}, mesh)
        program = jax.jit(lambda batch: spmd.split_rows(batch, 2)).lower(rows).compile()
        assert np.asarray(program(rows)['x']).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
        assert collectives(program.as_text()) == {}


def test_a_predictor_uses_its_mesh_without_a_mesh_context():
    mesh, model = meshes.make_mesh(), Yolos(**TINY, num_classes=3)
    params = init_params(model, jax.random.key(0))
    patches, grid = patchify([noise(64, 96, i) for i in range(8)])
    predict = meshes.make_predictor(steps.make_predict_step(model), mesh)
    alone = steps.make_predict_step(model)(params, {'patches': patches, 'grid': grid})
    spread = predict(params, {'patches': patches, 'grid': grid})
    np.testing.assert_allclose(spread['scores'], alone['scores'], rtol=1e-5)


def test_within_a_users_own_shard_map_rows_are_split_already():
    """Its axis may have the name of ours."""

    def rows(x):
        assert spmd.num_devices() == 1 and spmd.gathered(x) is x
        return spmd.over_batch(lambda x: 2 * x)(x)

    mesh = jax.make_mesh((8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(rows, mesh=mesh, in_specs=P('batch'), out_specs=P('batch'))
    np.testing.assert_array_equal(jax.jit(split)(jnp.arange(16.0)), 2 * np.arange(16.0))
