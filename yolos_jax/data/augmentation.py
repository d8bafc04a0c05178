"""The augmentation of DeiT's pre-training, as timm makes it: crops, RandAugment, erasing and mixing.

This file makes all random draws, arrays over the images of a batch from (seed, step) alone, and does the
8-bit work with Pillow, bit for bit as timm for the same draws. `mixing` works on normalised pixels.

RandAugment is rand-m9-mstd0.5-inc1: two of fifteen operations, each applied to half of the images, at a
strength of 9 +- 0.5 of 10.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from yolos_jax.data.resize import resize
from yolos_jax.data.slide import slide
from yolos_jax.data.streams import Stream, generator
from yolos_jax.patches import MEAN, patchify

ATTEMPTS = 10  # to draw a rectangle that fits; after these the crop is the middle, and nothing is erased
LAYERS = 2  # operations for an image
STRENGTH, STRENGTH_STD = 9, 0.5
CROP_AREA, CROP_RATIO = (0.08, 1), (3 / 4, 4 / 3)  # share of the image; width over height
ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # height over width
EVAL_CROP = 0.875  # of the shorter side
FILL = tuple(round(255 * float(x)) for x in MEAN)  # for pixels that an operation leaves empty

DRAWS = {  # uniform numbers for each image
    'crop_area': ATTEMPTS, 'crop_ratio': ATTEMPTS, 'crop_place': 2, 'flip': 1, 'op': LAYERS,
    'skips': LAYERS, 'negates': LAYERS, 'erases': 1,
    'erase_area': ATTEMPTS, 'erase_ratio': ATTEMPTS, 'erase_place': 2,
}  # fmt: skip


class Recipe(NamedTuple):
    """The settings of the augmentation."""

    size: int  # of the square images, in pixels
    repeats: int  # of an image in a batch, each augmented anew (arXiv 1902.05509); it is decoded once
    erasing: float  # the share of images of which a rectangle is erased
    mixup: float  # of the Beta distribution; 0: never
    cutmix: float
    group: int  # consecutive images that are mixed with each other, all in the same way


def draw(rows: int, seed: int, step: int) -> dict[str, np.ndarray]:
    """The random numbers of a batch: 'strength' [B, 2], 'noise' uint32 [B], and those of `DRAWS`."""
    rng = generator(Stream.AUGMENTATION, seed, step)
    numbers = {name: rng.random((rows, count)) for name, count in DRAWS.items()}
    numbers['strength'] = rng.normal(STRENGTH, STRENGTH_STD, (rows, LAYERS))
    return numbers | {'noise': rng.integers(1 << 32, size=rows, dtype=np.uint32)}


def draw_mix(rows: int, recipe: Recipe, seed: int, step: int) -> dict[str, np.ndarray]:
    """The draws by which images are mixed, the same for all images of a group: 'weight', 'box' and 'share'.

    They are as `mixing` takes them. If mixup and CutMix are both in use, each group gets one at random.
    """
    size, mixup, cutmix = recipe.size, recipe.mixup, recipe.cutmix
    rng = generator(Stream.MIXING, seed, step)
    groups = rows // recipe.group
    weight, share = np.ones((2, groups), np.float32)
    box = np.zeros((groups, 4), np.int32)
    for i in range(groups):
        if cutmix and (not mixup or rng.random() < 0.5):
            top, left, bottom, right = cut_box(size, rng.beta(cutmix, cutmix), rng.integers(size, size=2))
            box[i] = top, left, bottom, right
            share[i] = 1 - (bottom - top) * (right - left) / size**2
        elif mixup:
            weight[i] = share[i] = rng.beta(mixup, mixup)
    of_groups = {'weight': weight, 'box': box, 'share': share}
    return {name: np.repeat(x, recipe.group, axis=0) for name, x in of_groups.items()}


def cut_box(size: int, share: float, centre: np.ndarray) -> tuple[int, int, int, int]:
    """A square of 1 - `share` of an image's area, clipped at its edges: top, left, bottom, right."""
    side = int(size * math.sqrt(1 - share))
    first, last = centre - side // 2, centre + side // 2
    (top, left), (bottom, right) = np.clip([first, last], 0, size)
    return int(top), int(left), int(bottom), int(right)


def train_image(image: np.ndarray, size: int, draws: dict[str, np.ndarray], out: np.ndarray) -> None:
    """Write the patches of an image, augmented by its draws, into out [N, 768].

    image: RGBX, of any size. size: of the square, in pixels. draws: one row of `draw`.
    """
    uniform = (draws[f'crop_{name}'] for name in ('area', 'ratio', 'place'))
    top, left, h, w = crop_box(*image.shape[:2], *uniform)
    crop = np.ascontiguousarray(image[top : top + h, left : left + w])
    cropped = Image.fromarray(resize(crop, size, size, cubic=True)[..., :3])
    if draws['flip'][0] < 0.5:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for i in range(LAYERS):
        if draws['skips'][i] <= 0.5:
            operation = OPERATIONS[int(draws['op'][i] * len(OPERATIONS))]
            strength = min(max(draws['strength'][i], 0), 10) / 10
            cropped = operation(cropped, strength, -1 if draws['negates'][i] > 0.5 else 1)
    out[:] = patchify([cropped])[0][0]


def eval_image(image: np.ndarray, size: int, out: np.ndarray) -> None:
    """Write the patches of an image's middle into out [N, 768].

    The shorter side becomes size / 0.875, rounded down, and the middle square of `size` is cut out
    (torchvision's Resize and CenterCrop).
    """
    height, width = image.shape[:2]
    short = int(size / EVAL_CROP)
    if height <= width:
        shape = short, int(short * width / height)
    else:
        shape = int(short * height / width), short
    top, left = (round((side - size) / 2) for side in shape)
    middle = resize(image, *shape, box=(top, left, size, size), cubic=True)
    out[:] = patchify([middle[..., :3]])[0][0]


def crop_box(
    height: int, width: int, areas: np.ndarray, ratios: np.ndarray, place: np.ndarray
) -> tuple[int, int, int, int]:
    """The crop of an image (top, left, height, width): timm's RandomResizedCropAndInterpolation."""
    for area, ratio in zip(areas, ratios, strict=True):
        pixels = _between(area, *CROP_AREA) * height * width
        shape = math.exp(_between(ratio, *map(math.log, CROP_RATIO)))
        w, h = (max(round(math.sqrt(x)), 1) for x in (pixels * shape, pixels / shape))
        if w <= width and h <= height:
            top, left = int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def erase_box(size: int, draws: dict[str, np.ndarray], probability: float) -> tuple[int, int, int, int]:
    """The rectangle to erase in an image (top, left, bottom, right); all zeros for none."""
    if draws['erases'][0] > probability:
        return 0, 0, 0, 0
    for area, ratio in zip(draws['erase_area'], draws['erase_ratio'], strict=True):
        pixels = _between(area, *ERASE_AREA) * size * size
        shape = math.exp(_between(ratio, *map(math.log, ERASE_RATIO)))
        h, w = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if h < size and w < size:
            place = draws['erase_place']
            top, left = int(place[0] * (size - h + 1)), int(place[1] * (size - w + 1))
            return top, left, top + h, left + w
    return 0, 0, 0, 0


def _between(uniform: float, low: float, high: float) -> float:
    return low + (high - low) * uniform


# RandAugment's operations: (image, strength 0..1, sign -1 or 1) -> image


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.rotate(sign * strength * 30, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _slider(axis: int, slope: float, offset: float) -> Callable:
    """A shear by up to `slope`, or a shift by up to `offset` of the image's size, along an axis."""

    def operation(image: Image.Image, strength: float, sign: int) -> Image.Image:
        pixels = np.asarray(image)
        shift = sign * (strength * offset) * pixels.shape[axis]
        return Image.fromarray(slide(pixels, axis, sign * strength * slope, shift, FILL))

    return operation


def _plain(function: Callable) -> Callable:
    """An operation without a strength."""
    return lambda image, *_: function(image)


def _posterize(image: Image.Image, strength: float, _: int) -> Image.Image:
    dropped = 4 + int(strength * 4)  # bits, up to all 8, which Pillow 13's posterize refuses
    return image.point([value >> dropped << dropped for value in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, strength: float, _: int) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(strength * 256))


def _solarize_add(image: Image.Image, strength: float, _: int) -> Image.Image:
    """Dark values grow brighter."""
    added = int(strength * 110)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhancer(kind: Callable) -> Callable:
    """One of Pillow's enhancements, stronger or weaker than the original by the sign."""
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + sign * strength * 0.9))


OPERATIONS = (  # in timm's order
    _plain(ImageOps.autocontrast),
    _plain(ImageOps.equalize),
    _plain(ImageOps.invert),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhancer(ImageEnhance.Color),
    _enhancer(ImageEnhance.Contrast),
    _enhancer(ImageEnhance.Brightness),
    _enhancer(ImageEnhance.Sharpness),
    _slider(axis=1, slope=0.3, offset=0),
    _slider(axis=0, slope=0.3, offset=0),
    _slider(axis=1, slope=0, offset=0.45),
    _slider(axis=0, slope=0, offset=0.45),
)
