"""Draw a small data set for trying pre-training: images of one shape each, in folders of classes.

python -m yolos_jax.tools.make_classes DIR
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import files, visualize
from yolos_jax.run import cli
from yolos_jax.tools import flags, make_shapes

KINDS = 'filled', 'outline'
SIDE = 64  # of the images, in pixels
SPLITS = {'train': 400, 'val': 40}  # images of each class
STAR = [
    (0.5 + r * np.sin(a), 0.5 - r * np.cos(a))
    for r, a in zip([0.5, 0.2] * 5, np.arange(10) * np.pi / 5, strict=True)
]
FORMS = {  # polygons in a square of side 1
    'circle': [(0.5 + 0.5 * np.sin(a), 0.5 - 0.5 * np.cos(a)) for a in np.arange(40) * np.pi / 20],
    'square': [(0, 0), (1, 0), (1, 1), (0, 1)],
    'triangle': [(0.5, 0), (1, 1), (0, 1)],
    'star': STAR,
    'plus': [
        (0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7), (0.7, 1), (0.3, 1), (0.3, 0.7),
        (0, 0.7), (0, 0.3), (0.3, 0.3),
    ],
    'arrow': [(0, 0.3), (0.5, 0.3), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.7), (0, 0.7)],
    'L': [(0, 0), (0.35, 0), (0.35, 0.65), (1, 0.65), (1, 1), (0, 1)],
    'T': [(0, 0), (1, 0), (1, 0.35), (0.68, 0.35), (0.68, 1), (0.32, 1), (0.32, 0.35), (0, 0.35)],
    'U': [(0, 0), (0.3, 0), (0.3, 0.7), (0.7, 0.7), (0.7, 0), (1, 0), (1, 1), (0, 1)],
    'H': [
        (0, 0), (0.3, 0), (0.3, 0.35), (0.7, 0.35), (0.7, 0), (1, 0), (1, 1), (0.7, 1), (0.7, 0.65),
        (0.3, 0.65), (0.3, 1), (0, 1),
    ],
}  # fmt: skip


def write(root: str | Path, splits: dict[str, int] = SPLITS, seed: int = 0) -> bool:
    """Write the data set to `root`, whole or not at all; an existing one is left as it is.

    Each shape makes two classes: filled, and outlined. splits: {name: images of each class}. Returns
    whether it was written.
    """
    if all((Path(root) / split).is_dir() for split in splits):
        return False
    with files.new_folder(root) as part:
        for number, (split, count) in enumerate(splits.items()):
            rng = np.random.default_rng([seed, number])
            for label, (form, kind) in enumerate(itertools.product(FORMS, KINDS)):
                folder = part / split / f'{form}-{kind}'
                folder.mkdir(parents=True)
                for i in range(count):
                    picture(rng, label).save(folder / f'{i:04d}.jpg', quality=90)
    return True


def picture(rng: np.random.Generator, label: int) -> Image.Image:
    """An image of a class: its shape, at a random size, place and colour."""
    form, kind = divmod(label, len(KINDS))
    polygon = list(FORMS.values())[form]
    image = make_shapes.ground(rng, SIDE, SIDE)
    side = rng.uniform(0.5, 0.95) * SIDE
    place = rng.uniform(0, SIDE - side, 2)
    colour = visualize.rgb(rng.random(), rng.uniform(0.6, 1), rng.uniform(0.5, 1))
    points = [tuple(place + side * np.array(point)) for point in polygon]
    draw = ImageDraw.Draw(image)
    if KINDS[kind] == 'filled':
        draw.polygon(points, colour)
    else:
        draw.line([*points, points[0], points[1]], colour, 5, 'curve')
    return image


@cli.without_flags('output')
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the argument and write."""
    parser = flags.parser(__doc__)
    parser.add_argument('folder', help='where to put the data set')
    args = parser.parse_args(arguments)
    classes = len(FORMS) * len(KINDS)
    counts = ', '.join(f'{count * classes} images in {split}' for split, count in SPLITS.items())
    if write(args.folder):
        print(f'{args.folder}: {classes} classes, {counts}')
    else:
        print(f'{args.folder}: has a data set already, which is left unchanged')


if __name__ == '__main__':
    cli.run(main)
