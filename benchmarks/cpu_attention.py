"""Attention of one image on a CPU, alternately: this project's kernel, XLA's plain products, and PyTorch's.

    python benchmarks/cpu_attention.py [--rounds=20]

Prints the median milliseconds of a forward pass and of one with its gradient, for YOLOS-Ti and -S on
512x688 pixels and pre-training on 224x224, and the GFLOP/s of the kernel's products. Each side runs CALLS
times in a row, as the threads of the one before wait actively for a while.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from peers import in_turns

from yolos_jax import attention

CALLS = 10
SHAPES = {'YOLOS-Ti': (1, 3, 1477, 64), 'YOLOS-S': (1, 6, 1477, 64), 'ViT-S, 8 images': (8, 6, 197, 64)}


def jax_side(kernel, arrays: list[np.ndarray], with_gradient: bool):
    """A call of a kernel, compiled."""
    *qkv, weight = (jnp.asarray(x) for x in arrays)
    lengths = jnp.full(len(weight), weight.shape[2], jnp.int32)
    if with_gradient:
        loss = lambda q, k, v: (kernel(q, k, v, lengths) * weight).sum()
        function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    else:
        function = jax.jit(lambda q, k, v: kernel(q, k, v, lengths))
    return lambda: [jax.block_until_ready(function(*qkv)) for _ in range(CALLS)]


def torch_side(arrays: list[np.ndarray], with_gradient: bool):
    """PyTorch's fused attention."""
    import torch

    *qkv, weight = (torch.from_numpy(x) for x in arrays)
    for x in qkv:
        x.requires_grad_(with_gradient)

    def call() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(*qkv)
        if with_gradient:
            torch.autograd.grad((out * weight).sum(), qkv)

    return lambda: [call() for _ in range(CALLS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=20)
    rounds = parser.parse_args().rounds
    for name, shape in SHAPES.items():
        arrays = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(4)]
        for with_gradient in (False, True):
            sides = {
                'here': jax_side(attention.flash, arrays, with_gradient),
                'plain': jax_side(attention.dense, arrays, with_gradient),
                'torch': torch_side(arrays, with_gradient),
            }
            times = {
                side: 1e3 / CALLS * np.median(values) for side, values in in_turns(sides, rounds).items()
            }
            products = (7 if with_gradient else 2) * 2 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
            row = ', '.join(f'{side} {value:.1f} ms' for side, value in times.items())
            what = 'with gradient' if with_gradient else 'forward'
            print(f'{name}, {what}: {row}; here {products / times["here"] / 1e6:.0f} GFLOP/s')


if __name__ == '__main__':
    main()
