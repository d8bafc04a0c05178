"""The mesh, where arrays live on it, and the way host batches become global arrays."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from yolos_jax.errors import InputError

BATCH = 'batch'  # the mesh's one axis: rows of a batch are spread over it


def make_mesh(devices=None):
    """A mesh of all devices of all processes (or those given) along the batch axis.

    Devices of a process are neighbours, so that its rows of a batch are too.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit, the default type, would refuse to join sharded patches and replicated [DET] tokens
    return Mesh(np.array(devices), (BATCH,), axis_types=(AxisType.Auto,))


def check_divides(batch_size, mesh, name):
    """Raises InputError where a batch does not divide over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(
            f'{name} is {batch_size}, which does not divide over {mesh.size} devices: make it a multiple '
            f'of {mesh.size}'
        )


def rows_of_process(batch_size, mesh):
    """The rows of a batch that live on this process's devices, a slice."""
    mine = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    each = batch_size // mesh.size
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def over_rows(mesh):
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH))


def whole(mesh):
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def largest_axis(tree, mesh):
    """A sharding for each array of a tree: spread over its largest axis that the devices divide.

    Every device then keeps its part of parameters and optimiser state, and XLA gathers a layer when it is
    computed (ZeRO-3, arXiv 1910.02054). Arrays without such an axis stay whole.
    """

    def one(x):
        fitting = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        largest = max(fitting, key=lambda axis: x.shape[axis], default=None)
        return NamedSharding(mesh, P(*(BATCH if axis == largest else None for axis in range(x.ndim))))

    return jax.tree.map(one, tree)


def gathered(tree):
    """The arrays of a tree whole on every device from here on, inside jit where a mesh is set.

    Said where a layer's parameters are used, so that XLA gathers these, and not the layer's activations.
    """
    if BATCH not in jax.sharding.get_abstract_mesh().axis_names:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def place(tree, shardings):
    """The arrays of a tree, the same in every process, as global arrays under a tree of shardings."""

    def one(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def replicate(tree, mesh):
    """Every array of a tree, whole on every device."""
    return place(tree, jax.tree.map(lambda _: whole(mesh), tree))


def shard(batch, mesh):
    """This process's rows of a batch {name: array} as global arrays, spread over the mesh."""
    rows = over_rows(mesh)
    return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}


def fetch_rows(x):
    """This process's rows of a global array that is spread over the mesh, as numpy."""
    parts = sorted(x.addressable_shards, key=lambda part: part.index[0].start or 0)
    return np.concatenate([np.asarray(part.data) for part in parts])


def over_batch(function, shared=0):
    """`function`, run by each device on its own rows where a mesh is set, else as it is.

    For what XLA would not split well: a loop over a sharded batch under plain jit asks all devices in
    every trip whether to go on; kernels are not split at all. Arguments and results have the batch as
    their first axis, but for the first `shared` arguments: every device has them whole, and their
    gradients are summed over the devices as they leave the function.
    """

    def run(*args):
        mesh, rows = jax.sharding.get_abstract_mesh(), jax.tree.leaves(args[-1])[0].shape[0]
        if BATCH not in mesh.axis_names or rows % mesh.shape[BATCH]:  # Flax's init has one row
            return function(*args)
        specs = (P(),) * shared + (P(BATCH),) * (len(args) - shared)
        return jax.shard_map(function, in_specs=specs, out_specs=P(BATCH), check_vma=False)(*args)

    return run


def split_rows(batch, count):
    """A batch {name: [B, ...]} in `count` parts, [count, B / count, ...], each of all devices' own rows."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape[BATCH] if BATCH in mesh.axis_names else 1

    def one(x):
        parts = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)  # [count, devices, rows, ...]
        return parts.reshape(count, -1, *x.shape[1:])

    return jax.tree.map(one, batch)
