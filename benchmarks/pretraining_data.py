"""Images a second and core that pre-training loads, beside timm's transforms on Pillow, in turns.

    pip download --no-deps timm; unzip timm-*.whl 'timm/data/auto_augment.py'
    python benchmarks/pretraining_data.py timm/data/auto_augment.py

JPEG files of 500 x 375 to 224 pixels, one thread. timm's: opened by Pillow, cropped, resized, flipped,
RandAugment, an array [3, 224, 224]. `import timm` would need torchvision, whose crop and resize of Pillow's
images are two lines.
"""

import argparse
import importlib.util
import random
import tempfile
from pathlib import Path

import numpy as np
from peers import in_turns
from PIL import Image

from yolos_jax.data import augmentation, class_batches, labelled

SIZE, IMAGES, TURNS = 224, 96, 9


def write_data(folder):
    """Images about as large as those of ImageNet (110 kB)."""
    rng = np.random.default_rng(0)
    (folder / 'train' / 'a').mkdir(parents=True)
    for i in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        noisy = np.asarray(coarse.resize((500, 375), Image.BICUBIC)) + rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
            folder / f'train/a/{i}.jpg', quality=93
        )


def timms(path):
    """timm's transform of a file."""
    spec = importlib.util.spec_from_file_location('auto_augment', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {'translate_const': 100, 'img_mean': augmentation.FILL, 'interpolation': Image.BICUBIC}
    augment = module.rand_augment_transform('rand-m9-mstd0.5-inc1', options)

    def transform(file):
        image = Image.open(file).convert('RGB')
        uniform = np.random.random
        top, left, h, w = augmentation.crop_box(375, 500, uniform(10), uniform(10), uniform(2))
        image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.ascontiguousarray(np.asarray(augment(image)).transpose(2, 0, 1))

    return transform


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('auto_augment', help='the file of timm')
    transform = timms(parser.parse_args().auto_augment)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        records = labelled.read(folder, 'train')
        files = [Path(folder) / 'train' / file for file in records.files.tolist()]
        images = class_batches.EvalBatches(records, SIZE, 1)
        out = images.empty(1, 196)['patches'][0]
        draws = augmentation.draw(3 * IMAGES, seed=0, step=0)
        rows = [{name: values[i] for name, values in draws.items()} for i in range(3 * IMAGES)]

        def ours(repeats):
            for i in range(IMAGES // repeats):
                image, _ = images.start_image(i)()
                for row in rows[i * repeats : (i + 1) * repeats]:
                    augmentation.train_image(image, SIZE, row, out)

        sides = {
            'timm': lambda: [transform(file) for file in files],
            'ours, each image once': lambda: ours(1),
            'ours, each image three times': lambda: ours(3),
        }
        times = in_turns(sides, TURNS)
    for name, seconds in times.items():
        rate, ratio = IMAGES / np.median(seconds), np.median(times['timm'] / seconds)
        print(f'{name:30} {rate:6.0f} images/s, {ratio:.2f} times timm')


if __name__ == '__main__':
    main()
