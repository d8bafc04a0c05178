"""Detect objects in images.

    python predict.py --weights=PATH --output=DIR IMAGE_OR_FOLDER ...

Writes each image with its detections drawn on it, and predictions.json, to the output folder.
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from yolos_jax import Detector, cli, files, visualize
from yolos_jax.data import pixels
from yolos_jax.errors import InputError

ENDINGS = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif'}


def find_images(paths):
    """The image files among files and folders."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f'{path}: no such file or folder')
        inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in ENDINGS)
        if path.is_dir() and not inside:
            raise InputError(f'{path}: no images in this folder')
        found += inside if path.is_dir() else [path]
    return found


def main():
    """Parse the arguments and detect."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--weights', required=True, help='a workdir, checkpoint, Hugging Face folder or .pth'
    )
    parser.add_argument('--output', required=True, type=Path, help='a folder for pictures and JSON')
    parser.add_argument('--threshold', type=float, default=0.5, help='least score of a detection (0.5)')
    parser.add_argument('images', nargs='+', help='image files or folders')
    args = parser.parse_args()

    paths = find_images(args.images)
    detector = Detector.from_pretrained(args.weights)
    args.output.mkdir(parents=True, exist_ok=True)
    content, names = [], set()
    for path in tqdm(paths, unit='image'):
        image = pixels.read_image(path, upright=True)[..., :3]
        (found,) = detector([image], args.threshold)
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f'{path.stem}-{number}'
        names.add(name)
        captions = [f'{n} {score:.2f}' for n, score in zip(found.names, found.scores, strict=True)]
        picture = visualize.draw(image, found.boxes, found.labels, captions)
        Image.fromarray(picture).save(args.output / f'{name}.jpg', quality=92)
        content.append({'image': str(path), 'picture': f'{name}.jpg', 'detections': found.to_list()})
    files.write_json(args.output / 'predictions.json', content)
    count = sum(len(entry['detections']) for entry in content)
    print(f'{count} objects in {len(paths)} images: {args.output}')


if __name__ == '__main__':
    cli.run(main)
