"""The mesh, where arrays live on it, and the way host batches become global arrays."""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from yolos_jax.errors import InputError

BATCH = 'batch'  # the mesh's one axis: rows of a batch are spread over it


def make_mesh(devices=None):
    """A mesh of all devices (or those given) along the batch axis."""
    devices = jax.devices() if devices is None else devices
    # Explicit, the default type, would refuse to join sharded patches and replicated [DET] tokens
    return jax.make_mesh((len(devices),), (BATCH,), axis_types=(AxisType.Auto,), devices=devices)


def check_divides(batch_size, mesh, name):
    """Raises InputError where a batch does not divide over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(
            f'{name} is {batch_size}, which does not divide over {mesh.size} devices: make it a multiple '
            f'of {mesh.size}'
        )


def shard(batch, mesh):
    """This process's rows of a batch {name: array} as global arrays, spread over the mesh."""
    rows = NamedSharding(mesh, P(BATCH))
    return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}


def replicate(tree, mesh):
    """Every array of a tree, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def over_batch(function):
    """`function`, run by each device on its own rows where a mesh is set, else as it is.

    For loops and kernels that XLA cannot split: a loop over a sharded batch under plain jit asks all
    devices in every trip whether to go on. Arguments and results have the batch as their first axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if BATCH not in mesh.axis_names:
        return function
    return jax.shard_map(function, in_specs=P(BATCH), out_specs=P(BATCH), check_vma=False)
