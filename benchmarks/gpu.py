"""All measurements of one accelerator in one command: bash benchmarks/gpu.sh [--output=DIR]

    bash benchmarks/gpu.sh --only 'step S'     # the rows whose names match

Writes DIR/gpu.json and DIR/gpu.md, one row for each measurement, and prints the rows as they come: training
steps (images/s, share of the peak, memory) beside transformers with torch.compile in bfloat16, what
rematerialisation and another attention kernel do, inference, the matching, the accuracy of float32 and
bfloat16 against the CPU, and how long the accelerator waits for images in a run from JPEG files. Parts that
do not start within --minutes are left out, and named. Random weights and pixels.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import gc
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs memory too

import jax
import numpy as np
from data import write_coco
from peers import make_model, make_torch, random_batch, torch_targets
from yolos_jax.configs import yolos_ti

from yolos_jax import attention, files, matcher, optim, steps
from yolos_jax.model import YOLOS_B, YOLOS_S, YOLOS_TI, init_params
from yolos_jax.patches import PATCH
from yolos_jax.run import mesh as meshes
from yolos_jax.run.train import train
from yolos_jax.tools import speed

MODELS = {  # median sizes, and the length that such an image is padded to
    'Ti': (YOLOS_TI, (32, 42), 1371),
    'S': (YOLOS_S, (41, 59), 2459),
    'B': (YOLOS_B, (41, 59), 2459),
}
SMALL = {'small': (dict(width=32, depth=2, heads=2, pos_grid=(4, 4), mid_pos_grid=(4, 4)), (4, 6), 27)}
ROUNDS = 5  # of a measurement, but one where only the command is tried
PEAK = 790e12  # FLOP/s in bfloat16 that an H100 or H200 reaches with large products


class Table:
    """Rows of measurements, written after each."""

    def __init__(self, folder: Path, deadline: float, only: str) -> None:
        self.folder, self.deadline, self.only, self.rows = folder, deadline, only, []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, measure: Callable[[], dict]) -> None:
        """Measure and write a row; an error (out of memory, say) is its content."""
        if not re.search(self.only, what):
            return
        if time.monotonic() > self.deadline:
            values = {'left out': 'no time left'}
        else:
            try:
                values = measure()
            except Exception as error:  # the other rows are still worth having
                values = {'error': f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'}
        self.rows.append({'what': what} | values)
        gc.collect()
        jax.clear_caches()
        print(f'{what}: {text_of(self.rows[-1])}', flush=True)
        device, date = jax.devices()[0].device_kind, time.strftime('%F')
        about = {'device': device, 'jax': jax.__version__, 'date': date}
        files.write_json(self.folder / 'gpu.json', about | {'rows': self.rows})
        lines = [f'| {row["what"]} | {text_of(row)} |' for row in self.rows]
        head = [f'{device}, jax {jax.__version__}, {date}', '', '| what | measured |', '|---|---|']
        (self.folder / 'gpu.md').write_text('\n'.join([*head, *lines]) + '\n')


def text_of(row: dict) -> str:
    """A row's values in words."""
    values = {key: value for key, value in row.items() if key != 'what'}
    return ', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in values.items())


def seconds(run: Callable, wait: Callable, calls: int = 10) -> float:
    """The median time of a call, of several rounds of `calls`, after two that warm up."""
    times = []
    for number in range(ROUNDS + 1):
        clock = time.perf_counter()
        for _ in range(calls if number else 2):
            result = run()
        wait(result)
        times.append((time.perf_counter() - clock) / calls)
    return statistics.median(times[1:])


class Case(NamedTuple):
    """A training step to be measured."""

    fields: dict
    grid: tuple[int, int]
    length: int
    images: int
    options: dict = {}  # of the model


class Program(NamedTuple):
    """A compiled training step, and what it is called with."""

    step: Callable
    state: dict
    batch: dict
    flops: float
    seconds: float  # to compile, beside others


def compile_step(case: Case) -> Program:
    """The training step of a case."""
    model = make_model(case.fields, 'bfloat16', **case.options)
    params = init_params(model, jax.random.key(0))
    optimizer = optim.make_optimizer(params, 1e-4)
    batch = jax.device_put(random_batch(case.images, case.grid, case.length))
    state, clock = steps.init_state(params, optimizer), time.perf_counter()
    train = jax.jit(steps.make_train_step(model, optimizer), donate_argnums=0)
    step = train.lower(state, batch).compile()
    flops = 3 * 2 * speed.computed_macs(model, case.length) * case.images
    return Program(step, state, batch, flops, time.perf_counter() - clock)


def compile_all(cases: dict[str, Case], only: str) -> dict[str, concurrent.futures.Future]:
    """The programs of the rows, compiled side by side: one after the other they take most of the time."""
    with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() // 4)) as pool:
        return {row: pool.submit(compile_step, case) for row, case in cases.items() if re.search(only, row)}


def train_ours(program: Program) -> dict:
    """A training step: images/s, share of the peak, memory of the program."""
    memory, state = program.step.memory_analysis(), [program.state]

    def run() -> dict:
        state[0], metrics = program.step(state[0], program.batch)
        return metrics

    per_step = seconds(run, jax.block_until_ready)
    return {
        'images/s': len(program.batch['grid']) / per_step,
        'peak %': 100 * program.flops / per_step / PEAK,
        'GB': (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9,
        's to compile': program.seconds,
    }


def train_torch(fields: dict, grid: tuple, images: int) -> dict:
    """The same in transformers: fused attention, torch.compile, bfloat16 where torch chooses it."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and jax.devices()[0].platform != 'cpu':
        return {'left out': 'torch sees no GPU'}
    hf = make_torch(fields, attn_implementation='sdpa').to(device).train()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        hf.vit.compile()  # the loss reads numbers back, where torch.compile starts again and again
    batch = random_batch(images, grid)
    pixels = torch.randn(images, 3, PATCH * grid[0], PATCH * grid[1], device=device)
    labels, adamw = torch_targets(batch, device), torch.optim.AdamW(hf.parameters(), 1e-4)

    def run() -> None:
        adamw.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = hf(pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.1)
        adamw.step()

    wait = (lambda _: torch.cuda.synchronize()) if device == 'cuda' else (lambda _: None)
    result = {'images/s': images / seconds(run, wait, calls=5)}
    return result | ({'GB': torch.cuda.max_memory_allocated() / 1e9} if device == 'cuda' else {})


def infer(fields: dict, grid: tuple, length: int, images: int) -> dict:
    """The prediction step."""
    model = make_model(fields, 'bfloat16')
    params, step = init_params(model, jax.random.key(0)), steps.make_predict_step(model)
    batch = jax.device_put(random_batch(images, grid, length))
    batch = {name: batch[name] for name in ('patches', 'grid')}
    return {'images/s': images / seconds(lambda: step(params, batch), jax.block_until_ready)}


def matching(images: int, trained: bool) -> dict:
    """The matching alone: with similar queries, as before training, or with one query for each object."""
    batch, rng = random_batch(images, (1, 1)), np.random.default_rng(1)
    logits = rng.normal(0, 0.01, (images, 100, 92)).astype(np.float32)
    boxes = rng.uniform(0.45, 0.55, (images, 100, 4)).astype(np.float32)
    if trained:
        boxes[:, :7] = batch['boxes'][:, :7]
    outputs = jax.device_put({'pred_logits': logits, 'pred_boxes': boxes})
    targets = jax.device_put({name: batch[name] for name in ('labels', 'boxes', 'valid')})
    match = jax.jit(matcher.match)
    return {'ms': 1e3 * seconds(lambda: match(outputs, targets), jax.block_until_ready)}


def accuracy(fields: dict, grid: tuple, dtype: str) -> dict:
    """The largest difference of logits from float32 on the CPU, and their size."""
    exact, batch = make_model(fields, 'float32', attention_kernel=attention.dense), random_batch(1, grid)
    with jax.default_device(jax.devices('cpu')[0]):
        params = jax.device_get(init_params(exact, jax.random.key(0)))
        logits = lambda model, params: model.apply({'params': params}, batch['patches'], batch['grid'])
        reference = np.asarray(jax.jit(logits, static_argnums=0)(exact, params)['pred_logits'])
    here = jax.jit(logits, static_argnums=0)(make_model(fields, dtype), params)['pred_logits']
    difference = np.abs(np.asarray(here, np.float32) - reference).max()
    return {'difference': float(difference), 'of': float(np.abs(reference).max())}


def run_from_files(fields: dict, count: int, small: bool) -> dict:
    """A run from JPEG files: images/s, and the share of its time in which the device waits for images."""
    marks, lengths, config = [], [], yolos_ti.get_config()

    def on_step(step) -> None:
        lengths.append(step.length)
        if step.number in (count // 4, count):
            jax.block_until_ready(step.metrics)
            marks.append(time.perf_counter())
        if step.number == count:
            raise StopIteration

    with tempfile.TemporaryDirectory() as folder, config.unlocked():
        write_coco(Path(folder) / 'data', 16 if small else 64, ('train2017', 'val2017'), objects=7)
        config.update(
            data=f'{folder}/data', num_lengths=2, log_every=10_000, eval_every=10_000, epochs=10_000
        )
        config.model.update(fields)
        if small:
            config.augment.update(sizes=(64,), max_size=96, crop_from=(64, 72), crop_min=32, crop_max=64)
            config.update(eval_size=64, eval_max_size=96, num_lengths=1)
        with contextlib.suppress(StopIteration):
            train(config, f'{folder}/run', meshes.make_mesh(jax.devices()[:1]), on_step)
    per_step = (marks[1] - marks[0]) / (count - count // 4)
    timed = collections.Counter(lengths[count // 4 + 1 :])
    without = 0.0
    for length, n in timed.items():
        side = int(length**0.5)  # of images that fill the sequence, as most do
        program = compile_step(Case(fields, (side, side), length, config.batch_size))
        without += n * config.batch_size / train_ours(program)['images/s']
    waits = 1 - without / timed.total() / per_step
    return {'images/s': config.batch_size / per_step, 's/step': per_step, 'waits %': 100 * waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('runs/gpu'))
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--only', default='', metavar='REGEX', help='the rows whose names it is found in')
    parser.add_argument('--small', action='store_true', help='tiny models, to try it on a CPU')
    args = parser.parse_args()
    global ROUNDS
    ROUNDS = 1 if args.small else ROUNDS
    table = Table(args.output, time.monotonic() + 60 * args.minutes, args.only)
    models, batches = (SMALL, (2,)) if args.small else (MODELS, (8, 16, 32))
    cases = {
        f'training step {name}, batch {images}': Case(*shape, images)
        for images in batches
        for name, shape in models.items()
    }
    name = 'small' if args.small else 'S'
    row = f'training step {name}, batch {batches[0]}'
    kernels = {"XLA's attention": attention.dense}
    if jax.devices()[0].platform == 'gpu':
        kernels['blocks as a loop'] = lambda *qkv: attention.fused(*qkv)
    variants = {kind: dict(attention_kernel=kernel) for kind, kernel in kernels.items()}
    variants['rematerialised'] = dict(remat=12)
    cases |= {f'{row}, {kind}': cases[row]._replace(options=options) for kind, options in variants.items()}
    for name, (fields, grid, _) in models.items():
        row = f'training step {name}, batch {batches[0]}, transformers'
        table.add(row, lambda a=(fields, grid, batches[0]): train_torch(*a))
    for trained in (False, True):
        what = 'trained' if trained else 'untrained'
        table.add(f'matching, batch {batches[-1]}, {what}', lambda t=trained: matching(batches[-1], t))
    for name, (fields, grid, length) in models.items():
        for images in (1, batches[-1]):
            row = f'inference {name}, batch {images}'
            table.add(row, lambda a=(fields, grid, length, images): infer(*a))
        for dtype in ('float32', 'bfloat16'):
            table.add(f'logits {name}, {dtype}', lambda a=(fields, grid, dtype): accuracy(*a))
    programs = compile_all(cases, args.only)  # last, as it may take all the time that is left
    for row in cases:
        table.add(row, lambda row=row: train_ours(programs.pop(row).result()))
    fields, count = (fields, 8) if args.small else (YOLOS_TI, 200)
    table.add('run from files', lambda: run_from_files(fields, count, args.small))


if __name__ == '__main__':
    main()
