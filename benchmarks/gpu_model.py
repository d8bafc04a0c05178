"""What XLA makes of the training step for a GPU, on a machine without any: kernels and memory traffic.

    pip install -c constraints.txt jax-cuda12-plugin
    python benchmarks/gpu_model.py [--cases S:2459:8 Ti:1371:32] [--top 20]

A case is a model, a length in patches, and images a GPU, in bfloat16 on an H200. XLA chooses the kernels of
products by trying them on a GPU; here it takes its defaults. Bytes are those of each kernel's operands and
results, as if every kernel found nothing in a cache.
"""

import argparse
import collections
import math
import os
import re
import time

os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')  # there are no CUDA libraries to look at

from collectives import BYTES, computations
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies
from tpu_compile import MODELS, compile_step, gigabytes  # sets up jax for it

from yolos_jax.run import mesh as meshes

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
CASES = 'S:2459:8', 'S:2459:32', 'Ti:1371:32'
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z-]+)\((.*)')
FREE = 'parameter', 'get-tuple-element', 'bitcast', 'tuple', 'constant'


def size(shape):
    """The bytes of a shape, or of all in a tuple, as HLO text has them."""
    arrays = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape)
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(',') if n) for kind, dims in arrays)


def instructions(lines):
    """{name: (shape, operation, operands, line)} of a computation."""
    result = {}
    for line in lines:
        if match := INSTRUCTION.match(line):
            name, shape, operation, rest = match.groups()
            operands = re.findall(r'%([\w.-]+)', re.split(r'\)(?:, |$)', rest)[0])
            result[name] = shape, operation, operands, line
    return result


def moved(fused):
    """The bytes that a fused computation reads and writes: of an array that it slices, the slices."""
    users = collections.defaultdict(list)
    for name, (_, _, operands, _) in fused.items():
        for operand in operands:
            users[operand].append(name)

    def read(name):
        total = 0
        for user in users[name]:
            shape, operation, operands, _ = fused[user]
            if operation in ('slice', 'dynamic-slice', 'gather') and operands[0] == name:
                total += size(shape)
            elif operation == 'bitcast':
                total += read(user)
            elif operation != 'dynamic-update-slice' or operands[0] != name:  # which writes in place
                return size(fused[name][0])
        return min(total, size(fused[name][0]))

    def written(name):
        shape, operation, operands, _ = fused[name]
        if operation in ('tuple', 'bitcast'):
            return sum(written(operand) for operand in operands)
        return size(fused[operands[1]][0] if operation == 'dynamic-update-slice' else shape)

    reads = sum(read(name) for name, (_, operation, _, _) in fused.items() if operation == 'parameter')
    return reads + written(next(name for name in fused if ' ROOT ' in f' {fused[name][3].strip()}'))


def kernels(text):
    """(bytes, kind, name) of each kernel of a compiled program; the matching's loop is not looked into."""
    programs, entry = computations(text)
    outer, result = instructions(programs[entry]), []
    for shape, operation, operands, line in outer.values():
        if operation in FREE:
            continue
        called = re.search(r'kind=(\w+), calls=%?([\w.-]+)', line)
        target = re.search(r'custom_call_target="([^"]+)"', line)
        if called:
            kind = 'products' if called[1] == 'kCustom' else 'elementwise and sums'
            cost = moved(instructions(programs[called[2]]))
        else:
            kind = 'attention' if target and 'fmha' in target[1] else operation
            cost = size(shape) + sum(size(outer[operand][0]) for operand in operands)
        name = re.search(r'op_name="([^"]*)"', line)
        result.append((cost, kind, f'{shape[:40]:40} {name[1][-90:] if name else ""}'))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', default=CASES, metavar='MODEL:PATCHES:IMAGES')
    parser.add_argument('--top', type=int, default=0, help='also list the kernels that move most')
    args = parser.parse_args()
    # JAX asks the GPU for its kind and for the version of cuDNN
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda _: True
    cudnn.is_cuda_compute_capability_equal = lambda _: False
    options = dict(platform='cuda', topology_name='H200', topology='1x1x1', target_config=H200)
    mesh = meshes.make_mesh(topologies.get_topology_desc(**options).devices)
    for case in args.cases:
        name, length, images = case.split(':')
        clock = time.monotonic()
        program, _ = compile_step(MODELS[name], int(length), mesh, int(images), platform='gpu')
        costs, took = kernels(program.as_text()), time.monotonic() - clock
        print(
            f'{case}: {len(costs)} kernels, {gigabytes(program):.2f} GB in memory, compiled in {took:.0f} s'
        )
        for kind in ('products', 'attention', 'elementwise and sums'):
            of_kind = [cost for cost, this, _ in costs if this == kind]
            print(f'    {kind:22} {len(of_kind):4} kernels move {sum(of_kind) / 1e9:6.2f} GB', flush=True)
        for cost, kind, name in sorted(costs, reverse=True)[: args.top]:
            print(f'    {cost / 1e6:8.1f} MB {kind:20} {name}')


if __name__ == '__main__':
    main()
