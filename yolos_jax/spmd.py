"""Data parallelism in the model and the loss: a batch's rows are spread over the mesh's batch axis.

The mesh is the one of `jax.set_mesh` around the call (`run.mesh` makes it). Without a mesh there is one
device, and every function here leaves things as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

BATCH = 'batch'  # the mesh's one axis


def _is_spread(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether the rows of a batch are spread; within a pmap or shard_map of this name they are split.

    Raises ValueError for an axis of type Explicit, jax.make_mesh's default: XLA is to choose the shardings.
    """
    if BATCH in mesh.explicit_axes:
        raise ValueError('the mesh has an Explicit axis; make it with yolos_jax.run.mesh.make_mesh()')
    return BATCH in mesh.axis_names and BATCH not in mesh.manual_axes


def num_devices() -> int:
    """How many devices the rows of a batch are spread over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[BATCH] if _is_spread(mesh) else 1


def gathered(x: jax.Array) -> jax.Array:
    """Replicate a parameter on every device; its gradient is summed over the devices.

    Call this where a layer's parameters are used, so that XLA gathers them and not the activations.
    """
    if not _is_spread(jax.sharding.get_abstract_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, P())


def over_batch(function: Callable, shared: int = 0) -> Callable:
    """`function`, run by each device on its own rows.

    For code that XLA does not partition well: under plain jit, a loop over a sharded batch synchronises all
    devices in every iteration, and kernels are not partitioned at all. Arguments and results have the batch
    as their first axis, except the first `shared` arguments: these are replicated, and their gradients are
    summed over the devices.

    Raises:
        ValueError: (when called) the rows do not divide over the devices.
    """

    def run(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if not _is_spread(mesh):
            return function(*args)
        rows, devices = jax.tree.leaves(args[-1])[0].shape[0], mesh.shape[BATCH]
        if rows % devices:
            raise ValueError(f'a batch of {rows} rows does not divide over {devices} devices')
        specs = (P(),) * shared + (P(BATCH),) * (len(args) - shared)
        return jax.shard_map(function, in_specs=specs, out_specs=P(BATCH), check_vma=False)(*args)

    return run


def split_rows(batch: dict, count: int) -> dict:
    """A batch {name: [B, ...]} in parts [count, B / count, ...], each made of every device's own rows."""
    devices = num_devices()

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % (devices * count):
            raise ValueError(f'{x.shape[0]} rows on {devices} devices do not divide into {count} parts')
        parts = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)  # [count, devices, rows, ...]
        return parts.reshape(count, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
