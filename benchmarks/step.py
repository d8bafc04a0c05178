"""One image through YOLOS-Ti, forward and a training step, against transformers' PyTorch, in turns.

    python benchmarks/step.py [--variant=YOLOS_TI] [--batch=1] [--dtype=float32]

Prints the median time of each and the median of their ratios. transformers runs on the CPU, so compare on a
machine without an accelerator; elsewhere only ours is timed.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import attention, model, optim, steps
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import PATCH, PATCH_DIM
from yolos_jax.run.cli import keep_memory

GRID = 32, 43  # 512 x 688 pixels
TARGETS = 7  # COCO's mean


def ours(args):
    fields = getattr(model, args.variant)
    dtype = jnp.dtype(args.dtype)
    kernel = attention.for_platform(jax.devices()[0].platform, dtype)
    yolos = Yolos(**fields, dtype=dtype, attention_kernel=kernel)
    rng, B, N = np.random.default_rng(0), args.batch, GRID[0] * GRID[1]
    batch = {
        'patches': rng.integers(0, 256, (B, N, PATCH_DIM), dtype=np.uint8),
        'grid': np.tile(np.int32(GRID), (B, 1)),
        'labels': rng.integers(1, 91, (B, 100)).astype(np.int32),
        'boxes': rng.uniform(0.1, 0.4, (B, 100, 4)).astype(np.float32),
        'valid': np.arange(100)[None] < np.full((B, 1), TARGETS),
    }
    params = init_params(yolos, jax.random.key(0))
    optimizer = optim.make_optimizer(params, 1e-4)
    box = [steps.init_state(params, optimizer)]
    train = jax.jit(steps.make_train_step(yolos, optimizer, 1), donate_argnums=0)
    forward = jax.jit(lambda params: yolos.apply({'params': params}, batch['patches'], batch['grid']))

    def step():
        box[0], metrics = train(box[0], batch)
        metrics['loss'].block_until_ready()

    return {'forward': lambda: jax.block_until_ready(forward(box[0]['params'])), 'train step': step}


def theirs(args):
    import torch
    from transformers import YolosConfig, YolosForObjectDetection

    fields = getattr(model, args.variant)
    config = YolosConfig(
        hidden_size=fields['width'],
        num_hidden_layers=fields['depth'],
        num_attention_heads=fields['heads'],
        intermediate_size=4 * fields['width'],
        image_size=[PATCH * side for side in fields['pos_grid']],
        use_mid_position_embeddings='mid_pos_grid' in fields,
        num_labels=91,
    )
    hf = YolosForObjectDetection(config)
    optimizer = torch.optim.AdamW(hf.parameters(), 1e-4)
    pixels = torch.randn(args.batch, 3, PATCH * GRID[0], PATCH * GRID[1])
    boxes = torch.rand(TARGETS, 4) * 0.3 + 0.1
    labels = [{'class_labels': torch.randint(1, 91, (TARGETS,)), 'boxes': boxes}] * args.batch

    def forward():
        with torch.no_grad():
            hf(pixels)

    def step():
        optimizer.zero_grad()
        hf(pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.1)
        optimizer.step()

    return {'forward': forward, 'train step': step}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--variant', default='YOLOS_TI')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--rounds', type=int, default=12)
    args = parser.parse_args()
    keep_memory()
    sides = {'yolos_jax': ours(args)}
    if jax.default_backend() == 'cpu':
        sides['transformers'] = theirs(args)
    for what in ('forward', 'train step'):
        times = {name: [] for name in sides}
        for _ in range(args.rounds + 2):  # two to compile and warm up
            for name, side in sides.items():
                clock = time.perf_counter()
                side[what]()
                times[name].append(time.perf_counter() - clock)
        times = {name: np.array(values[2:]) for name, values in times.items()}
        line = ', '.join(f'{name} {1000 * np.median(values):.0f} ms' for name, values in times.items())
        if len(times) == 2:
            line += f', ratio {np.median(times["transformers"] / times["yolos_jax"]):.2f}'
        print(
            f'{what}: {line} ({args.variant}, batch {args.batch}, 512x688, {jax.devices()[0].device_kind})'
        )


if __name__ == '__main__':
    main()
