"""Everything that is to be known of one accelerator, in one command: bash benchmarks/gpu.sh [--output=DIR]

Writes DIR/gpu.json and DIR/gpu.md, one row for each measurement, and prints the rows as they come: training
steps (images/s, share of the peak, memory) beside transformers with torch.compile in bfloat16, what
rematerialisation and another attention kernel do, inference, the matching, the accuracy of float32 and
bfloat16 against the CPU, and how long the accelerator waits for images in a run from JPEG files. Parts that
do not start within --minutes are left out, and named. Random weights and pixels.
"""

import argparse
import collections
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from data import photograph
from peers import make_model, make_torch, random_batch, torch_targets
from yolos_jax.configs import yolos_ti

from yolos_jax import attention, files, matcher, optim, steps
from yolos_jax.model import YOLOS_B, YOLOS_S, YOLOS_TI, init_params
from yolos_jax.patches import PATCH
from yolos_jax.run.train import train
from yolos_jax.tools import speed

MODELS = {'Ti': (YOLOS_TI, (32, 43)), 'S': (YOLOS_S, (41, 60)), 'B': (YOLOS_B, (41, 60))}  # median sizes
SMALL = {'small': (dict(width=32, depth=2, heads=2, pos_grid=(4, 4), mid_pos_grid=(4, 4)), (4, 6))}
PEAK = 790e12  # FLOP/s in bfloat16 that an H100 or H200 reaches with large products


class Table:
    """Rows of measurements, written after each."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline, self.rows = folder, deadline, []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, measure: Callable[[], dict]) -> None:
        """Measure and write a row; an error (out of memory, say) is its content."""
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
        about = {
            'device': jax.devices()[0].device_kind,
            'jax': jax.__version__,
            'date': time.strftime('%F'),
        }
        files.write_json(self.folder / 'gpu.json', about | {'rows': self.rows})
        lines = [f'| {row["what"]} | {text_of(row)} |' for row in self.rows]
        head = [
            f'{about["device"]}, jax {about["jax"]}, {about["date"]}',
            '',
            '| what | measured |',
            '|---|---|',
        ]
        (self.folder / 'gpu.md').write_text('\n'.join([*head, *lines]) + '\n')


def text_of(row: dict) -> str:
    """A row's values in words."""
    values = {key: value for key, value in row.items() if key != 'what'}
    return ', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in values.items())


def seconds(run: Callable, wait: Callable, calls: int = 10, rounds: int = 5) -> float:
    """The median time of a call, of several rounds of `calls`, after two that warm up."""
    times = []
    for number in range(rounds + 1):
        clock = time.perf_counter()
        for _ in range(calls if number else 2):
            result = run()
        wait(result)
        times.append((time.perf_counter() - clock) / calls)
    return statistics.median(times[1:])


def train_ours(fields: dict, grid: tuple, images: int, length: int | None = None, **options) -> dict:
    """A training step: images/s, share of the peak, memory of the program."""
    model = make_model(fields, 'bfloat16', **options)
    params = init_params(model, jax.random.key(0))
    optimizer, batch = (
        optim.make_optimizer(params, 1e-4),
        jax.device_put(random_batch(images, grid, length)),
    )
    state = [steps.init_state(params, optimizer)]
    step = (
        jax.jit(steps.make_train_step(model, optimizer), donate_argnums=0).lower(state[0], batch).compile()
    )
    memory = step.memory_analysis()

    def run() -> dict:
        state[0], metrics = step(state[0], batch)
        return metrics

    per_step = seconds(run, jax.block_until_ready)
    flops = 3 * 2 * speed.computed_macs(model, batch['patches'].shape[1]) * images
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return {'images/s': images / per_step, 'peak %': 100 * flops / per_step / PEAK, 'GB': used / 1e9}


def train_torch(fields: dict, grid: tuple, images: int) -> dict:
    """The same in transformers: fused attention, torch.compile, bfloat16 where torch chooses it."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and jax.devices()[0].platform != 'cpu':
        return {'left out': 'torch sees no GPU'}
    hf = make_torch(fields, attn_implementation='sdpa').to(device).train()
    model = torch.compile(hf) if device == 'cuda' else hf
    batch = random_batch(images, grid)
    pixels = torch.randn(images, 3, PATCH * grid[0], PATCH * grid[1], device=device)
    labels, adamw = torch_targets(batch, device), torch.optim.AdamW(hf.parameters(), 1e-4)

    def run() -> None:
        adamw.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.1)
        adamw.step()

    wait = (lambda _: torch.cuda.synchronize()) if device == 'cuda' else (lambda _: None)
    result = {'images/s': images / seconds(run, wait, calls=5)}
    return result | ({'GB': torch.cuda.max_memory_allocated() / 1e9} if device == 'cuda' else {})


def infer(fields: dict, grid: tuple, images: int) -> dict:
    """The prediction step."""
    model = make_model(fields, 'bfloat16')
    params, step = init_params(model, jax.random.key(0)), steps.make_predict_step(model)
    batch = jax.device_put(random_batch(images, grid))
    batch = {name: batch[name] for name in ('patches', 'grid')}
    return {'images/s': images / seconds(lambda: step(params, batch), jax.block_until_ready)}


def matching(images: int, trained: bool) -> dict:
    """The matching alone: of alike queries, as before training, or of one for each object."""
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
    exact, batch = make_model(fields, 'float32', attention_kernel=attention.by_head), random_batch(1, grid)
    with jax.default_device(jax.devices('cpu')[0]):
        params = jax.device_get(init_params(exact, jax.random.key(0)))
        logits = lambda model, params: model.apply({'params': params}, batch['patches'], batch['grid'])
        reference = np.asarray(jax.jit(logits, static_argnums=0)(exact, params)['pred_logits'])
    here = jax.jit(logits, static_argnums=0)(make_model(fields, dtype), params)['pred_logits']
    difference = np.abs(np.asarray(here, np.float32) - reference).max()
    return {'difference': float(difference), 'of': float(np.abs(reference).max())}


def write_coco(root: Path, count: int) -> None:
    """A COCO folder of photographs with 7 boxes each, both splits the same."""
    (root / 'annotations').mkdir(parents=True)
    images, rng = [], np.random.default_rng(0)
    for number in range(1, count + 1):
        images.append({'id': number, 'file_name': f'{number}.jpg', 'width': 640, 'height': 480})
        for split in ('train2017', 'val2017'):
            (root / split).mkdir(exist_ok=True)
            (root / split / f'{number}.jpg').write_bytes(photograph(rng, 480, 640))
    box = {'category_id': 1, 'iscrowd': 0, 'area': 1e4}
    corners = rng.uniform(0, 300, (7 * count, 2)).tolist()
    objects = [
        box | {'id': i + 1, 'image_id': i // 7 + 1, 'bbox': [x, y, 100, 100]}
        for i, (x, y) in enumerate(corners)
    ]
    content = {'images': images, 'annotations': objects, 'categories': [{'id': 1, 'name': 'thing'}]}
    for split in ('train2017', 'val2017'):
        files.write_json(root / 'annotations' / f'instances_{split}.json', content)


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
        write_coco(Path(folder) / 'data', 64)
        config.update(
            data=f'{folder}/data', num_lengths=2, log_every=10_000, eval_every=10_000, epochs=10_000
        )
        config.model.update(fields)
        if small:
            config.augment.update(sizes=(64,), max_size=96, crop_from=(64, 72), crop_min=32, crop_max=64)
            config.update(eval_size=64, eval_max_size=96, num_lengths=1)
        with contextlib.suppress(StopIteration):
            train(config, f'{folder}/run', on_step=on_step)
    per_step = (marks[1] - marks[0]) / (count - count // 4)
    timed = collections.Counter(lengths[count // 4 + 1 :])
    without = sum(
        n * config.batch_size / train_ours(fields, (4, 4), config.batch_size, length)['images/s']
        for length, n in timed.items()
    )
    waits = 1 - without / timed.total() / per_step
    return {'images/s': config.batch_size / per_step, 's/step': per_step, 'waits %': 100 * waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('runs/gpu'))
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--small', action='store_true', help='tiny models, to try it on a CPU')
    args = parser.parse_args()
    table = Table(args.output, time.monotonic() + 60 * args.minutes)
    models, batches = (SMALL, (2,)) if args.small else (MODELS, (8, 16, 32))
    for name, (fields, grid) in models.items():
        for images in batches:
            row = f'training step {name}, {grid[0] * grid[1]} patches, batch {images}'
            table.add(row, lambda a=(fields, grid, images): train_ours(*a))
        table.add(f'{row}, transformers', lambda a=(fields, grid, images): train_torch(*a))
        table.add(f'{row}, remat', lambda a=(fields, grid, images): train_ours(*a, remat=True))
        for images in (1, batches[-1]):
            table.add(f'inference {name}, batch {images}', lambda a=(fields, grid, images): infer(*a))
        for dtype in ('float32', 'bfloat16'):
            table.add(f'logits {name}, {dtype}', lambda a=(fields, grid, dtype): accuracy(*a))
    plain = lambda: train_ours(fields, grid, batches[0], attention_kernel=attention.dense)
    table.add(f'training step {name}, batch {batches[0]}, XLA attention', plain)
    for trained in (False, True):
        what = 'trained' if trained else 'untrained'
        table.add(f'matching, batch {batches[-1]}, {what}', lambda t=trained: matching(batches[-1], t))
    fields, count = (fields, 8) if args.small else (YOLOS_TI, 200)
    table.add('run from files', lambda: run_from_files(fields, count, args.small))


if __name__ == '__main__':
    main()
