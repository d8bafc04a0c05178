"""Draw a small data set for trials: coloured shapes on textured backgrounds, as a COCO folder.

python -m yolos_jax.tools.make_shapes DIR
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from yolos_jax import files, visualize
from yolos_jax.run import cli
from yolos_jax.tools import flags

CLASSES = ('circle', 'square', 'triangle')
SIZES = ((96, 96), (96, 128), (128, 96), (112, 112), (96, 144), (144, 96), (120, 120), (100, 133))
SPLITS = {'train2017': 2000, 'val2017': 200}  # COCO's own names, so that every path is COCO's


def write(root: str | Path, splits: dict[str, int] = SPLITS, seed: int = 0) -> bool:
    """Write the data set to `root`, whole or not at all; an existing one is left as it is.

    splits: {name: number of images}. Returns whether it was written.
    """
    if (Path(root) / 'annotations').is_dir():
        return False
    with files.new_folder(root) as part:
        (part / 'annotations').mkdir()
        for number, (split, count) in enumerate(splits.items()):
            _write_split(part, split, count, np.random.default_rng([seed, number]))
    return True


def _write_split(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    (root / split).mkdir()
    images, annotations = [], []
    for image_id in range(1, count + 1):
        picture, objects = _picture(rng)
        name = f'{image_id:012d}.jpg'
        picture.save(root / split / name, quality=90)
        images.append({'id': image_id, 'file_name': name, 'width': picture.width, 'height': picture.height})
        for category, box, crowd in objects:
            one = {'id': len(annotations) + 1, 'image_id': image_id, 'category_id': category, 'bbox': box}
            annotations.append(one | {'area': round(box[2] * box[3], 2), 'iscrowd': crowd})
    categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def _picture(rng: np.random.Generator) -> tuple[Image.Image, list]:
    height, width = SIZES[rng.integers(len(SIZES))]
    picture = ground(rng, height, width)
    draw = ImageDraw.Draw(picture)
    objects = []
    wanted = 0 if rng.random() < 0.05 else rng.integers(1, 6)
    if rng.random() < 0.05:
        objects.append((*_crowd(rng, draw, width, height), 1))
    for _ in range(wanted):
        side = int(np.exp(rng.uniform(np.log(24), np.log(72))))
        box = [int(rng.integers(0, width - side)), int(rng.integers(0, height - side)), side, side]
        if any(_overlap(box, other) > 0.3 for _, other, _ in objects):
            continue
        category = int(rng.integers(1, len(CLASSES) + 1))
        _shape(rng, draw, category, box)
        objects.append((category, box, 0))
    return picture, objects


def ground(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Blurred noise around one colour, with finer grain on it."""
    grey = rng.uniform(60, 196) + rng.normal(0, 8, 3)
    coarse = grey + rng.normal(0, rng.uniform(5, 25), (height // 16, width // 16, 1))
    coarse = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    ground = np.asarray(coarse.resize((width, height), Image.BICUBIC))
    grain = rng.normal(0, rng.uniform(2, 16), (height, width, 1))
    noisy = np.clip(ground + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).filter(ImageFilter.GaussianBlur(0.5))


def _shape(rng: np.random.Generator, draw: ImageDraw.ImageDraw, category: int, box: list) -> None:
    x, y, w, h = box
    hue = (category / len(CLASSES) + rng.uniform(-0.12, 0.12)) % 1  # a class has its range of colours
    colour = visualize.rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
    outline = tuple(c // 2 for c in colour)
    corners = [x, y, x + w - 1, y + h - 1]
    if category == 1:
        draw.ellipse(corners, colour, outline, 2)
    elif category == 2:
        draw.rectangle(corners, colour, outline, 2)
    else:
        draw.polygon([(x + w // 2, y), (x + w - 1, y + h - 1), (x, y + h - 1)], colour, outline, 2)


def _crowd(rng: np.random.Generator, draw: ImageDraw.ImageDraw, width: int, height: int) -> tuple:
    """A heap of tiny shapes of one class under one box: COCO's crowd, no target for training."""
    category = int(rng.integers(1, len(CLASSES) + 1))
    w, h = 48, 36
    x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    for _ in range(12):
        side = int(rng.integers(6, 12))
        place = [x + int(rng.integers(0, w - side)), y + int(rng.integers(0, h - side)), side, side]
        _shape(rng, draw, category, place)
    return category, [x, y, w, h]


def _overlap(a: list, b: list) -> float:
    """Intersection over the smaller of two xywh boxes."""
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    return max(sides[0], 0) * max(sides[1], 0) / min(a[2] * a[3], b[2] * b[3])


@cli.without_flags('output')
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the argument and write."""
    parser = flags.parser(__doc__)
    parser.add_argument('folder', help='where to put the data set')
    args = parser.parse_args(arguments)
    if write(args.folder):
        print(f'{args.folder}: ' + ', '.join(f'{n} images in {split}' for split, n in SPLITS.items()))
    else:
        print(f'{args.folder}: has a data set already, which is left unchanged')


if __name__ == '__main__':
    cli.run(main)
