"""Shared by tests: small models, random images and targets, COCO folders, and transformers' models."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from absl.testing import flagsaver

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def saved_flags():
    """absl's flags are afterwards as before, without those of a config's keys."""
    import tensorflow_datasets  # noqa: F401
    from array_record.python import array_record_data_source  # noqa: F401

    # both define flags when they are imported, which would be deleted
    with flagsaver.flagsaver():
        yield


def make_hf(fields, eps=1e-12, num_classes=91):
    """A transformers YOLOS with random weights large enough for logits of about 1."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=fields['width'],
        num_hidden_layers=fields['depth'],
        num_attention_heads=fields['heads'],
        intermediate_size=4 * fields['width'],
        image_size=[16 * side for side in fields['pos_grid']],
        num_detection_tokens=fields.get('num_det_tokens', 100),
        num_labels=num_classes,
        layer_norm_eps=eps,
        use_mid_position_embeddings=fields.get('mid_pos_grid') is not None,
    )
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and 'position' not in name and 'token' not in name:
                value.normal_(0, value[0].numel() ** -0.5)
            else:
                value.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.1)
    return model


def reference_tensors(hf):
    """The weights of a transformers YOLOS under the reference's names, as they are now."""
    from yolos_jax.weights import hf_names
    from yolos_jax.weights.tensor import Tensor

    values = {name: value.detach().numpy().copy() for name, value in hf.state_dict().items()}
    return hf_names.to_reference({k: Tensor(v.shape, lambda v=v: v) for k, v in values.items()})


def forward(yolos, params, patches, grid):
    """The outputs of a detector, compiled as one program: by itself each operation is one."""
    import jax

    return jax.jit(yolos.apply)({'params': params}, patches, grid)


def to_torch(image):
    """An image uint8 [height, width, 3] as a torch model takes it: normalised [1, 3, height, width]."""
    import torch

    from yolos_jax.patches import MEAN, STD

    pixels = (np.float32(image) / np.float32(255) - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def noise(height, width, seed=0):
    """A random image, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


CLASSES = {1: 'circle', 2: 'square', 3: 'triangle'}
TINY = dict(width=32, depth=3, heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6), num_det_tokens=7)


def make_targets(counts, slots, num_classes, seed=0):
    """Random targets for images with so many objects each: ours, and transformers' labels."""
    import torch

    rng = np.random.default_rng(seed)
    B = len(counts)
    size = rng.uniform(0.05, 0.5, (B, slots, 2))
    centre = rng.uniform(size / 2, 1 - size / 2)
    boxes = np.concatenate([centre, size], axis=-1).astype(np.float32)
    labels = rng.integers(0, num_classes, (B, slots)).astype(np.int32)
    valid = np.arange(slots) < np.array(counts)[:, None]
    ours = {'labels': labels, 'boxes': boxes, 'valid': valid}
    theirs = [
        {'class_labels': torch.from_numpy(labels[b, :n]).long(), 'boxes': torch.from_numpy(boxes[b, :n])}
        for b, n in enumerate(counts)
    ]
    return ours, theirs


def write_coco(root, content, images=True):
    """A COCO folder with this annotation content and empty image files of the names in it."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / 'val').mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'annotations' / 'instances_val.json').write_text(text)
    if images and not isinstance(content, str):
        for image in content['images']:
            (root / 'val' / image['file_name']).touch()
    return root


def coco_content():
    """A small annotation file with a crowd, a box beyond the image, and one without an area."""
    return {
        'info': {'year': 2017},
        'images': [
            {'id': 7, 'file_name': 'b.jpg', 'height': 100, 'width': 200, 'license': 1},
            {'id': 3, 'file_name': 'a.jpg', 'height': 50, 'width': 60},
        ],
        'annotations': [
            {'id': 1, 'image_id': 7, 'category_id': 2, 'bbox': [10, 20, 30, 40], 'iscrowd': 0, 'area': 9.5,
             'segmentation': [[1, 2, 3]]},
            {'id': 2, 'image_id': 7, 'category_id': 5, 'bbox': [150.5, -5, 100, 50]},
            {'id': 3, 'image_id': 7, 'category_id': 5, 'bbox': [0, 0, 9, 9], 'iscrowd': 1},
            {'id': 4, 'image_id': 7, 'category_id': 5, 'bbox': [50, 50, 0, 10]},
        ],
        'categories': [{'id': 2, 'name': 'cat', 'supercategory': 'animal'}, {'id': 5, 'name': 'dog'}],
    }  # fmt: skip


def read_detector(path, **hints):
    """The `Pretrained` in a file or folder of weights."""
    from yolos_jax import weights

    return weights.read(path, **hints)


D, DEPTH, SIDE, H = 32, 2, 4, 2  # of `make_vit`: width, blocks, patches along a side, heads
LINEAR = {'attn.qkv': (3 * D, D), 'attn.proj': (D, D), 'mlp.fc1': (4 * D, D), 'mlp.fc2': (D, 4 * D)}


def make_vit(positions=1 + SIDE**2, width=D, depth=DEPTH):
    """A ViT in timm's names, weights large enough for features of about 1."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(0, shape[-1] ** -0.5 if len(shape) > 1 else 0.1, shape))
    vit = {
        'cls_token': draw(1, 1, width),
        'pos_embed': draw(1, positions, width),
        'patch_embed.proj.weight': draw(width, 3, 16, 16) / 16,
        'patch_embed.proj.bias': draw(width),
        'norm.weight': 1 + draw(width),
        'norm.bias': draw(width),
    }
    for i in range(depth):
        for norm in ('norm1', 'norm2'):
            vit |= {f'blocks.{i}.{norm}.weight': 1 + draw(width), f'blocks.{i}.{norm}.bias': draw(width)}
        for name, (rows, columns) in LINEAR.items():
            rows, columns = rows * width // D, columns * width // D
            vit |= {f'blocks.{i}.{name}.weight': draw(rows, columns), f'blocks.{i}.{name}.bias': draw(rows)}
    return vit


def torches(vit, prefix=''):
    """Arrays as torch's tensors."""
    import torch

    return {prefix + name: torch.tensor(value) for name, value in vit.items()}


def run_predict(weights, out, *arguments):
    """Predict with every token; returns the content of predictions.json."""
    from yolos_jax.tools import predict

    predict.main([f'--weights={weights}', f'--output={out}', '--threshold=0', *map(str, arguments)])
    return json.loads((out / 'predictions.json').read_text())


def make_video(path, frames, rate=10):
    """A video of RGB frames, uint8 [height, width, 3]."""
    import av

    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 96, 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def tiny_config(**changes):
    """The quickstart made smaller: 3 epochs of 6 steps, saved and logged at uneven intervals."""
    from yolos_jax.configs import quickstart

    c = quickstart.get_config()
    with c.unlocked():
        c.model.update(width=32, depth=2, heads=2, num_det_tokens=6)
        c.update(epochs=3, learning_rate=1e-3, batch_size=4, num_lengths=1)
        c.update(log_every=4, save_every=5, eval_every=2)
        c.update({name: str(v) if name == 'data' else v for name, v in changes.items()})
    return c


def pretraining_config(folder, **changes):
    """DeiT's recipe made smaller: 4 epochs of 3 steps, a ViT of three blocks."""
    from yolos_jax.configs import deit_ti

    c = deit_ti.get_config()
    c.update(data=str(folder), batch_size=16, epochs=4, warmup_epochs=1, log_every=1, eval_every=2)
    c.model.update(width=64, depth=3, heads=2, size=64, dtype='float32')
    c.augment.update(mix_group=8, erasing=0.5)
    c.update(changes)
    return c


def read_deit(path):
    """The classifier in a file of DeiT's form, and its parameters."""
    from yolos_jax.weights import deit, tensors

    with contextlib.closing(tensors.read(path)) as file:
        return deit.read(file)


def metric_lines(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def result(folder):
    """What a run leaves: its last parameters, checksums of its state, and its metrics but for times."""
    from yolos_jax.weights import checkpoint

    checkpoints = folder / 'checkpoints'
    params, meta = checkpoint.read_params(checkpoints, checkpoint.steps(checkpoints)[-1])
    lines = metric_lines(folder)
    for line in lines:
        for name in ('images_per_s', 'goodput', 'starts', 'steps_lost', 'time'):
            line.pop(name, None)
    return params, meta['checksums'], lines


def spawn(command, logs, processes, devices, last=()):
    """A script as so many processes that know of each other, each writing to a log."""
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    environment = os.environ | {
        'PYTHONPATH': str(ROOT),
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
    }
    started = []
    for i in range(processes):
        place = [f'--coordinator={coordinator}', f'--num_processes={processes}', f'--process_id={i}']
        own = [*(place if processes > 1 else []), *(last if i == processes - 1 else [])]
        with open(logs / f'log-{i}', 'a') as log:
            one = [sys.executable, ROOT / 'tests' / 'member.py', *command, *own]
            started.append(subprocess.Popen(one, env=environment, stdout=log, stderr=log))
    return started


def finish(started, logs):
    """Wait for all; returns their exit statuses and outputs."""
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(logs / f'log-{i}').read_text() for i in range(len(started))]


def annotated(coco, split):
    """The content of the annotation file of a split of a COCO folder."""
    return json.loads((coco / 'annotations' / f'instances_{split}.json').read_text())


def to_yolo(coco, root):
    """A COCO folder in YOLO's form, without ids: classes are numbered from 0."""
    for split, name in (('train2017', 'train'), ('val2017', 'val')):
        shutil.copytree(coco / split, root / 'images' / name)
        (root / 'labels' / name).mkdir(parents=True)
        part = annotated(coco, split)
        for image in part['images']:
            size = np.array([image['width'], image['height']])
            rows = []
            for a in part['annotations']:
                if a['image_id'] == image['id'] and not a['iscrowd']:
                    x, y, w, h = a['bbox']
                    box = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(size, 2)
                    if a['id'] % 2:  # a polygon with the same bounds
                        corners = np.array([x, y, x + w, y, x + w, y + h, x, y + h]) / np.tile(size, 4)
                        box = corners
                    rows.append(' '.join(map(str, [a['category_id'] - 1, *box])))
            if rows:
                file = (root / 'labels' / name / image['file_name']).with_suffix('.txt')
                file.write_text('\n'.join(rows) + '\n')
    names = [category['name'] for category in annotated(coco, 'train2017')['categories']]
    description = {'path': str(root), 'train': 'images/train', 'val': 'images/val', 'names': names}
    (root / 'data.yaml').write_text(yaml.safe_dump(description))


def launch(config, folder, stop_after=None, devices=1, on_step=None, start=None):
    """Train on so many devices; SIGTERM arrives after step `stop_after`. start: `train` or `pretrain`."""
    import jax

    from yolos_jax.run import mesh as meshes
    from yolos_jax.run.stop import StopSignal
    from yolos_jax.run.train import train

    def act(step):
        if on_step:
            on_step(step)
        if step.number + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)

    stop = StopSignal()
    try:
        mesh = meshes.make_mesh(jax.devices()[:devices])
        return (start or train)(config, folder, mesh=mesh, on_step=act, stop=stop)
    finally:
        stop.release()


def swap_classes(coco, split):
    """Give the first two categories of an annotation file each other's number."""
    content = annotated(coco, split)
    first, second = (category['id'] for category in content['categories'][:2])
    swapped = {first: second, second: first}
    for category in content['categories']:
        category['id'] = swapped.get(category['id'], category['id'])
    for one in content['annotations']:
        one['category_id'] = swapped.get(one['category_id'], one['category_id'])
    (coco / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
