"""The mesh of devices, the shardings of arrays over it, and the transfer of host batches to it."""

import collections
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from yolos_jax import attention
from yolos_jax.errors import InputError
from yolos_jax.spmd import BATCH


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or those given) along the batch axis.

    Devices of a process are neighbours, so that its rows of a batch are too, and so are those of a TPU
    slice: XLA sums within slices before it sums between them, over the slower network.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=place_of)
    check_alike(devices)
    # Explicit, the default type, would refuse to join sharded patches and replicated [DET] tokens
    return Mesh(np.array(devices), (BATCH,), axis_types=(AxisType.Auto,))


def check_alike(devices: Sequence[jax.Device]) -> None:
    """Raises InputError if some processes have more devices than others."""
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        listed = ', '.join(f'{count} in process {process}' for process, count in sorted(counts.items())[:8])
        raise InputError(f'the processes have different numbers of devices: {listed}')


def place_of(device: jax.Device) -> tuple[int, int, int]:
    """The key that devices are sorted by: slice (of a TPU, else 0), process, id."""
    return getattr(device, 'slice_index', None) or 0, device.process_index, device.id


def check(mesh: Mesh) -> None:
    """Raises InputError if a mesh does not have the form of `make_mesh`'s."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != (BATCH,) or mesh.axis_types != (AxisType.Auto,):
        raise InputError(f'the mesh is {mesh}; make it with yolos_jax.run.mesh.make_mesh(devices)')


def platform(mesh: Mesh) -> str:
    """The platform of the devices, for `attention.for_platform`."""
    return attention.platform_of(mesh.devices.flat[0])


def check_divides(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError if a batch does not divide over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(
            f'batch_size is {batch_size}, which does not divide over {mesh.size} devices: make it a '
            f'multiple of {mesh.size}',
            'batch_size',
        )


def rows_of_process(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a batch that live on this process's devices."""
    devices = enumerate(mesh.devices.flat)
    local = [i for i, device in devices if device.process_index == jax.process_index()]
    each = batch_size // mesh.size
    return slice(local[0] * each, (local[-1] + 1) * each)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def largest_axis(tree: dict, mesh: Mesh) -> dict:
    """A sharding for each array of a tree: over its largest axis that the number of devices divides.

    Every device then keeps its part of parameters and optimiser state, and XLA gathers a layer when it is
    computed (ZeRO-3, arXiv 1910.02054). Arrays without such an axis stay whole.
    """

    def of_array(x: jax.Array) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        largest = max(fitting, key=lambda axis: x.shape[axis], default=None)
        return NamedSharding(mesh, P(*(BATCH if axis == largest else None for axis in range(x.ndim))))

    return jax.tree.map(of_array, tree)


def in_memory(tree: dict, shardings: dict) -> dict:
    """The shardings, with row-major order in memory fixed for four-dimensional arrays.

    By default a TPU moves the axis of size 1 of the blocks' position tables, [L - 1, 1, rows, D], into the
    last two axes, where tiles are then an eighth full. This costs 5 % of a step for YOLOS-S and 10 % for
    -B, by its compiler's estimate (benchmarks/tpu_model.py). Other devices are row-major anyway.
    """

    def of_array(x: jax.Array, sharding: NamedSharding) -> NamedSharding | Format:
        return Format(Layout(tuple(range(x.ndim))), sharding) if x.ndim == 4 else sharding

    return jax.tree.map(of_array, tree, shardings)


def replicate(tree: dict, mesh: Mesh) -> dict:
    """The arrays of a tree, the same in every process, whole on every device."""
    here = lambda x: x if isinstance(x, jax.Array) and x.is_fully_addressable else np.asarray(x)
    place = functools.partial(jax.make_array_from_process_local_data, replicated(mesh))
    return jax.tree.map(lambda x: place(here(x)), tree)


def shard(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch {name: array} as global arrays, spread over the mesh."""
    rows = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}


def shapes(batch: dict, mesh: Mesh) -> dict:
    """The shapes, types and shardings of a whole batch {name: array} as `shard` makes it."""
    rows, dtype = batch_sharding(mesh), jax.dtypes.canonicalize_dtype
    return {name: jax.ShapeDtypeStruct(x.shape, dtype(x.dtype), sharding=rows) for name, x in batch.items()}


def fetch_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of a global array that is spread over the mesh."""
    parts = sorted(x.addressable_shards, key=lambda part: part.index[0].start or 0)
    return np.concatenate([np.asarray(part.data) for part in parts])


@functools.cache  # equal models share what is compiled
def make_predictor(predict_step: Callable, mesh: Mesh) -> Callable[[dict, dict], dict]:
    """`predict(params, batch)`: a prediction step on this process's rows of a batch, numpy in and out."""
    step = jax.jit(predict_step, out_shardings=batch_sharding(mesh))

    def predict(params: dict, batch: dict) -> dict:
        with jax.set_mesh(mesh):
            return jax.tree.map(fetch_rows, step(params, shard(batch, mesh)))

    return predict
