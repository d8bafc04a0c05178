"""Images per second and core from a JPEG file to the model's input, against the reference's transforms.

    python benchmarks/data.py [--images=200]

The reference is datasets/coco.py and transforms.py of hustvl/YOLOS, written with Pillow and torch on one
thread: a normalised float32 tensor. Ours writes uint8 patches; the device normalises them. Both take the
same draws of flip, crop and scale, on the same synthetic photographs of COCO's commonest sizes, in turns.
"""

import argparse
import io
import time

import numpy as np
import torch
from PIL import Image

from configs import yolos_s, yolos_ti
from yolos_jax.data import geometry, pixels
from yolos_jax.model import MEAN, STD

SIZES = [(480, 640)] * 8 + [(427, 640)] * 5 + [(640, 480)] * 3 + [(375, 500)] * 2 + [(640, 427)] * 2


def photograph(rng, height, width):
    """A JPEG of about 150 kB at 640x480, as COCO's: smooth shapes with grain on them."""
    coarse = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), np.float32)
    noisy = np.clip(smooth + rng.normal(0, 11, (height, width, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, 'jpeg', quality=90)
    return file.getvalue()


def reference(data, drawn):
    """The reference's transforms, with its draws made beforehand."""
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert('RGB')
    if drawn['flip']:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if drawn['crop']:
        image = image.resize(drawn['before'].tolist()[::-1], Image.BILINEAR)
        top, left, height, width = drawn['box'].tolist()
        image = image.crop((left, top, left + width, top + height))
    image = image.resize(drawn['shape'].tolist()[::-1], Image.BILINEAR)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def ours(data, drawn, out):
    pixels.place(pixels.decode(data, 'image'), drawn, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    sizes = np.array([SIZES[i] for i in rng.integers(len(SIZES), size=args.images)])
    files = [photograph(rng, *size) for size in sizes.tolist()]
    print(f'{args.images} images, {np.mean([len(f) for f in files]) / 1000:.0f} kB on average')
    for name, config in (('S', yolos_s), ('Ti', yolos_ti)):
        recipe = geometry.Recipe(**config.get_config().augment)
        drawn = geometry.draw(*sizes.T, recipe, 0, 0)
        out = np.zeros((geometry.most_patches(*sizes.T, recipe), 768), np.uint8)
        sides = {'reference': reference, 'ours': lambda *args, out=out: ours(*args, out)}
        times = {side: [] for side in sides}
        for i in [0, *range(args.images)]:  # the first twice, to warm up
            one = {key: values[i] for key, values in drawn.items()}
            for side, work in sides.items():
                clock = time.process_time()
                work(files[i], one)
                times[side].append(time.process_time() - clock)
        mean = {side: np.mean(values[1:]) for side, values in times.items()}
        print(
            f'{name}: reference {1 / mean["reference"]:.0f}, ours {1 / mean["ours"]:.0f} images/s/core, '
            f'ratio {mean["reference"] / mean["ours"]:.2f}'
        )


if __name__ == '__main__':
    main()
