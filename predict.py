"""Detect objects in images.

    python predict.py --weights=PATH --output=DIR IMAGE_OR_FOLDER ...

Writes each image with its detections drawn on it, and predictions.json, to the output folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from yolos_jax import Detector, files, visualize
from yolos_jax.data import pixels
from yolos_jax.errors import InputError
from yolos_jax.run import cli

ENDINGS = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif'}


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files among files and folders."""
    images = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f'{path}: no such file or folder')
        inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in ENDINGS)
        if path.is_dir() and not inside:
            raise InputError(f'{path}: no images in this folder')
        images += inside if path.is_dir() else [path]
    return images


def free_name(stem: str, taken: set[str]) -> str:
    """The name of a picture: that of its image, numbered where several images share it."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f'{stem}-{number}'
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and detect."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--weights', required=True, help=cli.WEIGHTS)
    parser.add_argument('--output', required=True, type=Path, help='a folder for pictures and JSON')
    parser.add_argument('--threshold', type=float, default=0.5, help='least score of a detection (0.5)')
    parser.add_argument('images', nargs='+', help='image files or folders')
    args = parser.parse_args(arguments)

    paths = find_images(args.images)
    detector = Detector.from_pretrained(args.weights)
    args.output.mkdir(parents=True, exist_ok=True)
    content, names = [], set()
    for path in tqdm(paths, unit='image'):
        image = pixels.to_rgb(pixels.read_image(path, upright=True))
        (detections,) = detector([image], args.threshold)
        name = free_name(path.stem, names)
        names.add(name)
        scored = zip(detections.names, detections.scores, strict=True)
        captions = [f'{label} {score:.2f}' for label, score in scored]
        picture = visualize.draw(image, detections.boxes, detections.labels, captions)
        Image.fromarray(picture).save(args.output / f'{name}.jpg', quality=92)
        entry = {'image': str(path), 'picture': f'{name}.jpg', 'detections': detections.to_list()}
        content.append(entry)
    files.write_json(args.output / 'predictions.json', content)
    count = sum(len(entry['detections']) for entry in content)
    print(f'{count} objects in {len(paths)} images: {args.output}')


if __name__ == '__main__':
    cli.run(main)
