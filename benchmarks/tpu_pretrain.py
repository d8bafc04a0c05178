"""The step of a pre-training compiled for slices of TPUs, on a machine without any.

    pip install libtpu
    python benchmarks/tpu_pretrain.py [--models deit_ti deit_s deit_s_dwr deit_b] [--slices v5e:2x4]

The configs as they are: bfloat16, 1,024 images of 224 pixels. Says the memory of a chip that the program
takes, and the bytes of each kind of collective.
"""

import argparse
import importlib
import time

import jax
import jax.numpy as jnp
from collectives import collectives
from tpu_compile import compiled, devices_of, gigabytes  # first: it keeps JAX from looking for a TPU

from yolos_jax import attention, classification, optim, steps
from yolos_jax.classifier import Classifier, param_shapes
from yolos_jax.run import mesh as meshes

MODELS = 'deit_ti', 'deit_s', 'deit_s_dwr', 'deit_b'


def compile_step(config, mesh):
    """The compiled step of a config on a mesh, from shapes alone."""
    dtype = jnp.bfloat16
    fields = dict(config.model) | {'dtype': dtype, 'attention_kernel': attention.for_platform('tpu', dtype)}
    model = Classifier(**fields, num_classes=1000)
    params, B = param_shapes(model), config.batch_size
    optimizer = optim.make_deit_optimizer(params, lambda _: 1e-3, config.weight_decay)
    state = jax.eval_shape(lambda params: steps.init_state(params, optimizer), params)
    batch = {
        'patches': ((B, model.side**2, 768), jnp.uint8),
        'labels': ((B,), jnp.int32),
        'noise': ((B,), jnp.uint32),
        'erase': ((B, 4), jnp.int32),
        'box': ((B, 4), jnp.int32),
        'weight': ((B,), jnp.float32),
        'share': ((B,), jnp.float32),
    }
    options = dict(smoothing=config.smoothing, drop_path=config.drop_path, group=config.augment.mix_group)
    step = steps.make_update(classification.make_loss(model, **options), optimizer)
    return compiled(step, state, batch, mesh)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', default=MODELS[:2], choices=MODELS)
    parser.add_argument('--slices', nargs='+', default=['v5e:2x4'])
    args = parser.parse_args()
    for name in args.slices:
        mesh = meshes.make_mesh(devices_of(name))
        for model in args.models:
            config = importlib.import_module(f'yolos_jax.configs.{model}').get_config()
            clock = time.monotonic()
            program = compile_step(config, mesh)
            took, sent = time.monotonic() - clock, collectives(program.as_text())
            print(
                f'{name} {model} {config.batch_size}: {gigabytes(program):.2f} GB, {sent}, '
                f'compiled in {took:.0f} s',
                flush=True,
            )


if __name__ == '__main__':
    main()
