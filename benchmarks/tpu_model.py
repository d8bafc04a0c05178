"""What XLA's own cost model says of the training step on a TPU, on a machine without any.

    pip install libtpu
    python benchmarks/tpu_model.py [--cases S:2459:4 Ti:1371:8 B:2459:2] [--remat 4] [--top 20]

A case is a model, a length in patches, and images a chip, in bfloat16 on v5e:2x4. The compiler
estimates a number of cycles for each fusion; this script sums them at 1.5 GHz, loop bodies times their trip
counts. Mosaic kernels (attention) have no estimate and are not included. It also prints the time that the
matrix products and attention would take at the chip's peak, 197 TFLOP/s.
"""

import argparse
import collections
import os
import re
import time

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')

from collectives import computations
from jax.experimental import topologies
from tpu_compile import MODELS, compile_step  # sets up jax for it

from yolos_jax.run import mesh as meshes

CLOCK, PEAK = 1.5e9, 197e12  # of v5e: 4 x 128 x 128 multiply-adds a cycle
CASES = 'S:2459:4', 'Ti:1371:8', 'B:2459:2'
KINDS = (  # the first whose pattern is in the name of an operation
    ('matching and loss', r'shard_map/while|assign|giou'),
    (
        'residuals',
        r'dynamic_update_index_in_dim|dynamic_index_in_dim|backbone/slice|backbone/broadcast_in_dim',
    ),
    ('positions', r'posembed|bsi,ijd|positions'),
    ('qkv, proj', r'attn/(qkv|proj)'),
    ('around attention', r'attn'),
    ('mlp', r'mlp'),
    ('qkv, proj', r'qkv|proj'),
    ('norms', r'norm'),
    ('optimiser', r'jit\(_where\)|step\)/reduce_sum|step\)/(mul|add|sub|sqrt|div)'),
    ('patches', r'patch_embed'),
    ('heads', r'class_embed|bbox_embed'),
)


def operations(text, trips):
    """(cycles, how often, name) of each operation; trips: of the loop over the blocks."""
    lines, entry = computations(text)
    result = []

    def walk(name, times):
        for line in lines[name]:
            if ' while(' in line:
                # the matching's loop makes one trip, as with a trained model
                walk(re.search(r'body=%?([\w.\-]+)', line)[1], times * (trips if 'backbone' in line else 1))
            elif re.search(r' (conditional|call)\(', line):
                pattern = (
                    r'(?:to_apply|branch_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)'
                )
                for called in re.findall(pattern, line):
                    walk(called, times)
            elif cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                op = re.search(r'op_name="([^"]*)"', line)
                result.append((int(cycles[1]) * times, times, op[1] if op else line.strip()[:80]))

    walk(entry, 1)
    return result


def kind(operation):
    return next((name for name, pattern in KINDS if re.search(pattern, operation)), 'other')


def at_peak(fields, length, images):
    """Milliseconds of the dense layers' and of attention's products at peak, forward and backward."""
    D, L, S = fields['width'], fields['depth'], length + 101
    dense = 2 * S * D * 12 * D * L + 2 * length * 768 * D
    attention = 4 * S * S * D * L
    return 3e3 * dense * images / PEAK, 3.5e3 * attention * images / PEAK


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', default=CASES, metavar='MODEL:PATCHES:IMAGES')
    parser.add_argument('--remat', type=int, default=0, help='config.model.remat')
    parser.add_argument('--top', type=int, default=0, help='also list the costliest operations')
    args = parser.parse_args()
    mesh = meshes.make_mesh(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4').devices)
    for case in args.cases:
        name, length, images = case.split(':')
        fields = MODELS[name] | dict(remat=args.remat)
        length, images, clock = int(length), int(images), time.monotonic()
        program, _ = compile_step(fields, length, mesh, images)
        costs = operations(program.as_text(), fields['depth'] - 1)
        milliseconds = lambda cycles: cycles / CLOCK * 1e3
        total = sum(cycles for cycles, _, _ in costs)
        dense, attention = at_peak(fields, length, images)
        temporaries = program.memory_analysis().temp_size_in_bytes / 1e9
        print(
            f'{case}: {milliseconds(total):.1f} ms outside the attention kernel (its products at peak '
            f'{dense:.1f}; attention at peak {attention:.1f}), temporaries {temporaries:.2f} GB; '
            f'compiled in {time.monotonic() - clock:.0f} s'
        )
        by_kind = collections.Counter()
        for cycles, _, operation in costs:
            by_kind[kind(operation)] += cycles
        for what, cycles in by_kind.most_common():
            print(f'    {what:18} {milliseconds(cycles):6.2f} ms {cycles / total:6.1%}')
        for cycles, times, operation in sorted(costs, reverse=True)[: args.top]:
            print(f'    {milliseconds(cycles):6.2f} ms x{times:<3} {operation[-110:]}', flush=True)


if __name__ == '__main__':
    main()
