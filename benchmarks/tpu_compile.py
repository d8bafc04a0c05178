"""The training step compiled for slices of TPUs, on a machine without any.

    pip install libtpu
    python benchmarks/tpu_compile.py [--models Ti S S-dWr B L H] [--slices v5e:2x4 2*v5e:16x16]
        [--lengths N] [--shard_params]

The published recipes in bfloat16 at every bucket length, one image per chip (Ti: two, a group of its class
loss). Says the memory of a chip that the program takes, and the bytes of each kind of collective: what is
called send goes to another slice, over the data centre's network; all the others stay within one.
"""

import argparse
import os
import time

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from collectives import collectives
from jax.experimental import topologies

import yolos_jax
from yolos_jax import attention, optim, steps
from yolos_jax.model import Yolos, param_shapes
from yolos_jax.run import mesh as meshes

MODELS = {
    'Ti': yolos_jax.YOLOS_TI,
    'S': yolos_jax.YOLOS_S,
    'S-dWr': yolos_jax.YOLOS_S_DWR,
    'B': yolos_jax.YOLOS_B,
    # no YOLOS was published with these; what --shard_params is for
    'L': yolos_jax.YOLOS_B | {'width': 1024, 'depth': 24, 'heads': 16},
    'H': yolos_jax.YOLOS_B | {'width': 1280, 'depth': 32, 'heads': 16},
}
LENGTHS = {  # of the recipes on COCO, as train.py chooses them
    'Ti': (475, 667, 859, 1115, 1371, 1627, 1947, 2395),
    'S': (1307, 1563, 1819, 2075, 2459, 2843, 3355, 4251),
}
SLICES = ('v5e:2x4', 'v5e:16x16', 'v5p:2x2x2', 'v5p:4x8x8')


def compile_step(fields, length, mesh, per_chip, shard_params=False, platform='tpu'):
    """The compiled step of a model on a mesh, from shapes alone."""
    kernel = attention.for_platform(platform, jnp.bfloat16)
    model = Yolos(**fields, num_classes=91, dtype=jnp.bfloat16, attention_kernel=kernel)
    params = param_shapes(model)
    optimizer = optim.make_optimizer(params, 1e-4)
    state = jax.eval_shape(lambda params: steps.init_state(params, optimizer), params)
    B, T = per_chip * mesh.size, 100
    batch = {
        'patches': ((B, length, 768), jnp.uint8),
        'grid': ((B, 2), jnp.int32),
        'labels': ((B, T), jnp.int32),
        'boxes': ((B, T, 4), jnp.float32),
        'valid': ((B, T), bool),
    }
    step = steps.make_train_step(model, optimizer, per_chip)
    return compiled(step, state, batch, mesh, shard_params), params


def compiled(step, state, batch, mesh, shard_params=False):
    """A step compiled for a state, of shapes, and a batch {name: (shape, type)}."""
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    layout = meshes.largest_axis(state, mesh) if shard_params else jax.tree.map(lambda _: whole, state)
    layout = meshes.in_memory(state, layout)
    batch = {k: jax.ShapeDtypeStruct(*v, sharding=rows) for k, v in batch.items()}
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(placed, state, layout)
    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))
        return step.lower(state, batch).compile()


def gigabytes(program):
    """The memory of a chip that a compiled program takes."""
    m = program.memory_analysis()
    used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return (used + m.temp_size_in_bytes) / 1e9


def devices_of(name):
    """The devices of 'v5e:2x4', or of two slices of it, '2*v5e:2x4'."""
    *count, topology = name.split('*')
    options = dict(num_slices=int(count[0])) if count else {}
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **options).devices


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', default=['Ti', 'S', 'B'], choices=MODELS)
    parser.add_argument('--slices', nargs='+', default=SLICES)
    parser.add_argument('--lengths', nargs='+', type=int, help='only these')
    parser.add_argument('--shard_params', action='store_true', help='as config.shard_params')
    args = parser.parse_args()
    for name in args.slices:
        mesh = meshes.make_mesh(devices_of(name))
        for model in args.models:
            for length in args.lengths or LENGTHS['Ti' if model == 'Ti' else 'S']:
                clock = time.monotonic()
                per_chip = 2 if model == 'Ti' else 1
                program, params = compile_step(MODELS[model], length, mesh, per_chip, args.shard_params)
                size = 4 * sum(x.size for x in jax.tree.leaves(params))
                sent = collectives(program.as_text())
                share = sum(size_of_kind for _, size_of_kind in sent.values()) / size
                took = time.monotonic() - clock
                print(
                    f'{name} {model} {length}: {gigabytes(program):.2f} GB, sends {share:.2f} of the '
                    f'parameters, {sent}, compiled in {took:.0f} s',
                    flush=True,
                )


if __name__ == '__main__':
    main()
