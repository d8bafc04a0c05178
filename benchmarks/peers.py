"""YOLOS here and in every other runtime that is installed, on this machine's CPU, in turns.

    pip install onnx onnxscript onnxruntime openvino
    python benchmarks/peers.py [--variant=YOLOS_TI] [--rounds=10] [--photographs=24] [--skip=torch.compile]

Times one image of 512x688 in float32 forward, a training step on it, and the way from the file of a
photograph to its boxes. Peers: transformers (PyTorch's fused attention), torch.compile, and ONNX Runtime
and OpenVINO on an ONNX export of transformers' model; those that are not installed are left out. Prints the
median of each and the median of the ratios peer / here of a round; above 1, here is faster. Random weights.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from data import photograph

from yolos_jax import Detector, attention, model, optim, steps, weights
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import PATCH, PATCH_DIM
from yolos_jax.run.cli import keep_memory

GRID = 32, 43  # 512 x 688 pixels
TARGETS = 7  # COCO's mean


def random_batch(images: int, grid: tuple[int, int], length: int | None = None) -> dict:
    """A training batch of random pixels and boxes, all of one size; length: padded to so many patches."""
    rng, N = np.random.default_rng(0), length or grid[0] * grid[1]
    return {
        'patches': rng.integers(0, 256, (images, N, PATCH_DIM), dtype=np.uint8),
        'grid': np.tile(np.int32(grid), (images, 1)),
        'labels': rng.integers(1, 91, (images, 100)).astype(np.int32),
        'boxes': rng.uniform(0.1, 0.4, (images, 100, 4)).astype(np.float32),
        'valid': np.tile(np.arange(100) < TARGETS, (images, 1)),
    }


def make_model(fields: dict, dtype: str, **options) -> Yolos:
    """The model with the kernel for this machine's devices."""
    kernel = attention.for_platform(attention.platform_of(jax.devices()[0]), jnp.dtype(dtype))
    return Yolos(**fields, dtype=jnp.dtype(dtype), **{'attention_kernel': kernel} | options)


def make_torch(fields: dict, **options):
    """transformers' model of the same sizes."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=fields['width'],
        num_hidden_layers=fields['depth'],
        num_attention_heads=fields['heads'],
        intermediate_size=4 * fields['width'],
        image_size=[PATCH * side for side in fields['pos_grid']],
        use_mid_position_embeddings='mid_pos_grid' in fields,
        num_labels=91,
        **options,
    )
    return YolosForObjectDetection(config).eval()


def torch_targets(batch: dict, device: str = 'cpu') -> list[dict]:
    """A batch's objects as transformers takes them."""
    import torch

    return [
        {
            'class_labels': torch.from_numpy(labels[valid]).long().to(device),
            'boxes': torch.from_numpy(boxes[valid]).to(device),
        }
        for labels, boxes, valid in zip(batch['labels'], batch['boxes'], batch['valid'], strict=True)
    ]


def forward_sides(yolos: Yolos, params: dict, hf, skip: list[str], folder: Path) -> dict[str, Callable]:
    """A call of each runtime that is installed, on one image; folder: for the ONNX file."""
    import torch

    batch, pixels = random_batch(1, GRID), torch.randn(1, 3, PATCH * GRID[0], PATCH * GRID[1])
    forward, image = jax.jit(yolos.apply), (batch['patches'], batch['grid'])
    sides = {
        'yolos_jax': lambda: jax.block_until_ready(forward({'params': params}, *image)),
        'transformers': lambda: hf(pixels),
    }
    if 'torch.compile' not in skip:
        compiled = torch.compile(hf, dynamic=False)
        sides['torch.compile'] = lambda: compiled(pixels)
    for name, session in {'ONNX Runtime': onnx_session, 'OpenVINO': openvino_session}.items():
        try:
            sides[name] = session(hf, pixels, folder / 'yolos.onnx')
        except ImportError as error:
            print(f'left out: {error}')
    return sides


def onnx_session(hf, pixels, path: Path) -> Callable:
    """A call of ONNX Runtime on transformers' model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(
        export(hf, pixels, path), options, providers=['CPUExecutionProvider']
    )
    arrays = {session.get_inputs()[0].name: pixels.numpy()}
    return lambda: session.run(None, arrays)


def openvino_session(hf, pixels, path: Path) -> Callable:
    """A call of OpenVINO on transformers' model."""
    import openvino

    compiled = openvino.Core().compile_model(
        export(hf, pixels, path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'}
    )
    return lambda: compiled([pixels.numpy()])


def export(hf, pixels, path: Path) -> str:
    """The ONNX file of transformers' model, written once."""
    import torch

    class Plain(torch.nn.Module):
        def forward(self, x):
            outputs = hf(x)
            return outputs.logits, outputs.pred_boxes

    if not path.exists():
        torch.onnx.export(Plain(), (pixels,), str(path), dynamo=True, verbose=False)
    return str(path)


def training_sides(yolos: Yolos, params: dict, hf) -> dict[str, Callable]:
    """A training step here and in transformers: matching, loss, clipping and AdamW."""
    import torch

    batch = random_batch(1, GRID)
    optimizer = optim.make_optimizer(params, 1e-4)
    train = jax.jit(steps.make_train_step(yolos, optimizer), donate_argnums=0)
    state = [steps.init_state(jax.tree.map(jnp.copy, params), optimizer)]

    def ours() -> None:
        state[0], metrics = train(state[0], batch)
        metrics['loss'].block_until_ready()

    adamw = torch.optim.AdamW(hf.parameters(), 1e-4)
    pixels, labels = torch.randn(1, 3, PATCH * GRID[0], PATCH * GRID[1]), torch_targets(batch)

    def theirs() -> None:
        with torch.enable_grad():
            adamw.zero_grad()
            hf(pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.1)
        adamw.step()

    return {'yolos_jax': ours, 'transformers': theirs}


def file_sides(yolos: Yolos, params: dict, hf, count: int, folder: Path) -> dict[str, Callable]:
    """From the files of photographs, written to folder, to boxes: `Detector` and transformers' pipeline."""
    from transformers import YolosImageProcessor, pipeline

    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / f'{i}.jpg').write_bytes(photograph(rng, 480, 640))
    paths = sorted(map(str, folder.glob('*.jpg')))
    size = {'shortest_edge': 512, 'longest_edge': 853}
    processor = YolosImageProcessor(size=size)
    theirs = pipeline('object-detection', model=hf, image_processor=processor)
    detector = Detector(weights.Pretrained(yolos, params, {}, *size.values()))
    return {
        'yolos_jax': lambda: [detector(path) for path in paths],
        'transformers': lambda: [theirs(path) for path in paths],
    }


def in_turns(sides: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each side in each round, after two to compile and warm up."""
    times = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            clock = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - clock)
    return {name: np.array(values[2:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--variant', default='YOLOS_TI')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--photographs', type=int, default=24)
    parser.add_argument('--skip', nargs='*', default=[])
    args = parser.parse_args()
    import torch

    keep_memory()
    torch.set_grad_enabled(False)
    torch.set_num_threads(os.cpu_count())
    fields = getattr(model, args.variant)
    yolos, hf = make_model(fields, 'float32'), make_torch(fields)
    params = init_params(yolos, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sides = {
            'forward': lambda: (forward_sides(yolos, params, hf, args.skip, folder), 1),
            'file to boxes': lambda: (
                file_sides(yolos, params, hf, args.photographs, folder),
                args.photographs,
            ),
            'training step': lambda: (training_sides(yolos, params, hf), 1),
        }
        for what, make in sides.items():
            if what in args.skip:
                continue
            calls, images = make()
            times = in_turns(calls, args.rounds if images == 1 else 3)
            print(f'{what} ({args.variant}, {os.cpu_count()} cores)')
            for name, values in times.items():
                ratio = np.median(values / times['yolos_jax'])
                print(f'    {name:15} {1000 * np.median(values) / images:7.0f} ms   {ratio:.2f}')


if __name__ == '__main__':
    main()
