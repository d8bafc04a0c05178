"""Images per second and core from a JPEG file to the model's input, against the reference's transforms.

    python benchmarks/data.py [--images=400]

The reference is datasets/coco.py, transforms.py and util/misc.py of hustvl/YOLOS, written with Pillow and
torch on one thread: a normalised float32 tensor, copied into a batch. Ours writes uint8 patches into one,
which the device normalises. Both take the same draws of flip, crop and scale, on the same synthetic
photographs of COCO's commonest sizes with seven objects each, in turns of 100. Then ours again with images
that were decoded before (config.data_cache), and the steps of a device that the loader feeds.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from yolos_jax.configs import yolos_s, yolos_ti

from yolos_jax import files
from yolos_jax.data import folders, geometry, loader, records
from yolos_jax.data.batches import TrainBatches
from yolos_jax.data.cache import DecodedImages
from yolos_jax.patches import MEAN, STD

SIZES = [(480, 640)] * 8 + [(427, 640)] * 5 + [(640, 480)] * 3 + [(375, 500)] * 2 + [(640, 427)] * 2
OBJECTS = 7  # COCO's mean
TURN = 100


def photograph(rng, height, width):
    """A JPEG of about 150 kB at 640x480, as COCO's: smooth shapes with grain on them."""
    coarse = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), np.float32)
    noisy = np.clip(smooth + rng.normal(0, 11, (height, width, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, 'jpeg', quality=90)
    return file.getvalue()


def write_coco(root, count, splits, objects):
    """A COCO folder whose splits have so many photographs of 640x480 each, with so many boxes in one."""
    rng = np.random.default_rng(0)
    images = [{'id': i, 'file_name': f'{i}.jpg', 'height': 480, 'width': 640} for i in range(1, count + 1)]
    box = {'category_id': 1, 'iscrowd': 0, 'area': 1e4}
    corners = rng.uniform(0, 300, (objects * count, 2)).tolist()
    boxes = [
        box | {'id': i + 1, 'image_id': i // objects + 1, 'bbox': [x, y, 100, 100]}
        for i, (x, y) in enumerate(corners)
    ]
    content = {'images': images, 'annotations': boxes, 'categories': [{'id': 1, 'name': 'thing'}]}
    for split in splits:
        (root / split).mkdir(parents=True)
        for image in images:
            (root / split / image['file_name']).write_bytes(photograph(rng, 480, 640))
        files.write_json(root / 'annotations' / f'instances_{split}.json', content)


def write_data(folder, count):
    """`Records` of so many photographs in a folder."""
    rng = np.random.default_rng(0)
    sizes = np.array([SIZES[i] for i in rng.integers(len(SIZES), size=count)])
    names = [f'{i}.jpg' for i in range(count)]
    for name, size in zip(names, sizes.tolist(), strict=True):
        (folder / name).write_bytes(photograph(rng, *size))
    corners = np.sort(rng.uniform(0, 375, (count * OBJECTS, 2, 2)), axis=1).reshape(-1, 4)
    return records.Records(
        ids=np.arange(count),
        files=np.array(names),
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        rows=np.arange(count),
        boxes=corners.astype(np.float32),
        labels=np.ones(count * OBJECTS, np.int32),
        first=np.arange(count + 1) * OBJECTS,
        classes={1: 'thing'},
        dropped={},
        category_ids={1: 1},
        notes=[],
        images=folders.Folder(folder),
        source=None,
        bad_images=0,
    )


def reference_target(boxes, labels, height, width):
    """ConvertCocoPolysToMask."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    area, crowd = torch.tensor([100.0] * len(boxes)), torch.tensor([0] * len(boxes))
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    target = {'boxes': boxes[keep], 'labels': torch.tensor(labels, dtype=torch.int64)[keep]}
    target |= {'area': area[keep], 'iscrowd': crowd[keep], 'image_id': torch.tensor([1])}
    return target | {
        'orig_size': torch.as_tensor([height, width]),
        'size': torch.as_tensor([height, width]),
    }


def reference_resize(image, target, shape):
    ratio = [new / old for new, old in zip(shape[::-1], image.size, strict=True)]
    target['boxes'] = target['boxes'] * torch.as_tensor(ratio * 2)
    target['area'] = target['area'] * (ratio[0] * ratio[1])
    target['size'] = torch.tensor(shape)
    return image.resize(shape[::-1], Image.BILINEAR)


def reference_crop(image, target, box):
    top, left, height, width = box
    target['size'] = torch.tensor([height, width])
    boxes = target['boxes'] - torch.as_tensor([left, top, left, top])
    limit = torch.as_tensor([width, height], dtype=torch.float32)
    boxes = torch.min(boxes.reshape(-1, 2, 2), limit).clamp(min=0)
    target['area'] = (boxes[:, 1, :] - boxes[:, 0, :]).prod(dim=1)
    target['boxes'] = boxes.reshape(-1, 4)
    keep = torch.all(boxes[:, 1, :] > boxes[:, 0, :], dim=1)
    for field in ('labels', 'area', 'iscrowd', 'boxes'):
        target[field] = target[field][keep]
    return image.crop((left, top, left + width, top + height))


def reference(data, i, drawn):
    """The reference's dataset, transforms and collation of a batch of one, with its draws made before."""
    with Image.open(data.images.path / data.files[i]) as file:
        image = file.convert('RGB')
    boxes, labels = data.objects(i)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    target = reference_target(boxes, labels.tolist(), image.height, image.width)
    if drawn.flip[i]:
        signs, width = torch.as_tensor([-1, 1, -1, 1]), image.width
        target['boxes'] = target['boxes'][:, [2, 1, 0, 3]] * signs + torch.as_tensor([width, 0, width, 0])
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if drawn.crop[i]:
        image = reference_resize(image, target, drawn.before[i].tolist())
        image = reference_crop(image, target, drawn.box[i].tolist())
    image = reference_resize(image, target, drawn.shape[i].tolist())
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    tensor = tensor.clone().sub_(mean).div_(std)
    x0, y0, x1, y1 = target['boxes'].unbind(-1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    target['boxes'] = boxes / torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
    _, height, width = tensor.shape  # nested_tensor_from_tensor_list
    padded, mask = torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
    padded[0].copy_(tensor)
    mask[0] = False


def batches_of(data, config, batch_size=8):
    """The training batches of a config's recipe."""
    recipe = geometry.Recipe(**config.get_config().augment)
    options = dict(num_lengths=8, special=101, batch_size=batch_size, max_targets=100, seed=0)
    return TrainBatches.make(data, recipe, **options)


def ours(source, drawn, i):
    """A row of a batch, as the loader's threads fill it."""
    batch = source.empty(1, int(drawn.counts[i]))
    row = {name: values[0, ...] for name, values in batch.items()}
    source.fill(drawn, 0, i, source.start_image(i)(), row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), args.images)
        size = np.mean([len(data.start_read(i)()) for i in range(len(data))]) / 1000
        print(f'{len(data)} images, {size:.0f} kB on average')
        for name, config in (('S', yolos_s), ('Ti', yolos_ti)):
            compare(name, data, geometry.Recipe(**config.get_config().augment))
            feed(name, data, config)


def compare(name, data, recipe):
    drawn = geometry.draw(data.heights, data.widths, recipe, 0, 0)
    source = TrainBatches(data, recipe, lengths=(), batch_size=1, max_targets=100, seed=0)
    decoded = TrainBatches(data, recipe, lengths=(), batch_size=1, max_targets=100, seed=0)
    decoded.cache = DecodedImages(tempfile.gettempdir(), data.heights, data.widths)
    for i in range(len(data)):
        decoded.start_image(i)()
    sides = {
        'reference': lambda i: reference(data, i, drawn),
        'ours': lambda i: ours(source, drawn, i),
        'decoded': lambda i: ours(decoded, drawn, i),
    }
    turns = [range(first, min(first + TURN, len(data))) for first in range(0, len(data), TURN)]
    for work in sides.values():  # to warm up
        list(map(work, turns[0]))
    spent = dict.fromkeys(sides, 0.0)
    for turn in turns:
        for side, work in sides.items():
            clock = time.process_time()
            list(map(work, turn))
            spent[side] += time.process_time() - clock
    speed = {side: len(data) / seconds for side, seconds in spent.items()}
    print(
        f'{name}: reference {speed["reference"]:.0f}, ours {speed["ours"]:.0f} images/s/core, '
        f'ratio {speed["ours"] / speed["reference"]:.2f}; decoded before {speed["decoded"]:.0f}, '
        f'{speed["decoded"] / speed["ours"]:.2f} times ours'
    )


def feed(name, data, config, step=0.05, count=150):
    """How much longer the steps of a device take because it waits for images.

    The device is a clock: as in JAX, a step is dispatched while the one before is still computed.
    """
    source, ready, start = batches_of(data, config), 0.0, 0.0
    for number, _, _ in loader.load(source, range(count + 10)):
        now = time.perf_counter()
        ready = max(now, ready) + step  # when the device will have computed this step
        start = ready if number == 9 else start
        time.sleep(max(ready - step - now, 0))
    spent = (ready - start) / count
    print(f'{name}: steps of {1000 * step:.0f} ms on batches of 8 take {1000 * spent:.1f} ms')


if __name__ == '__main__':
    main()
