"""Common corruptions of photographs, to measure the robustness of a detector.

After Michaelis et al. (arXiv 1907.07484) and the image corruptions of Hendrycks and Dietterich (arXiv
1903.12261), at their strengths 1, 3 and 5 of five. Fog and rain are simpler here, and motion blur goes in
any direction, so results can be compared with one another, but not with published ones.

Images are RGB, uint8 [height, width, 3]; x is one in float32, 0..1.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

STRENGTHS = (1, 3, 5)


def corrupt(image: np.ndarray, name: str, strength: int, seed: int) -> np.ndarray:
    """A corrupted copy of an image, the same for the same seed.

    name: a key of CORRUPTIONS; strength: one of STRENGTHS.
    """
    random = np.random.default_rng([list(CORRUPTIONS).index(name), strength, seed % 2**32])
    function, values = CORRUPTIONS[name]
    x = function(np.float32(image) / 255, values[STRENGTHS.index(strength)], random)
    return np.asarray(_to_pillow(x))


def _to_pillow(x: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def _from_pillow(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _noise(x: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    return x + random.normal(0, deviation, x.shape).astype(np.float32)


def _blur(x: np.ndarray, radius: float, _: np.random.Generator) -> np.ndarray:
    return _from_pillow(_to_pillow(x).filter(ImageFilter.GaussianBlur(radius)))


def _motion(x: np.ndarray, length: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    """The mean of copies along a line, with weights that fall off from its middle."""
    radius, deviation = length
    angle, total = random.uniform(0, np.pi), np.zeros_like(x)
    steps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (steps / deviation) ** 2)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        total += np.float32(weight) * _shifted(x, step * np.sin(angle), step * np.cos(angle))
    return total


def _shifted(x: np.ndarray, up: float, left: float) -> np.ndarray:
    """x moved by whole pixels; the pixels of its edges are repeated."""
    height, width = x.shape[:2]
    rows = np.clip(np.arange(height) + round(up), 0, height - 1)
    columns = np.clip(np.arange(width) + round(left), 0, width - 1)
    return x[rows[:, None], columns]


def _jpeg(x: np.ndarray, quality: int, _: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _to_pillow(x).save(file, 'jpeg', quality=quality)
    with Image.open(file) as image:
        return _from_pillow(image)


def _brightness(x: np.ndarray, more: float, _: np.random.Generator) -> np.ndarray:
    """Raises the value of HSV, the largest of the three colours; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    return np.where(value > 0, x * np.minimum(value + more, 1) / np.maximum(value, 1e-6), more)


def _contrast(x: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * factor + mean


def _fog(x: np.ndarray, strength: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Adds clouds, noise of all scales from the whole image down, and keeps the range."""
    amount, decay = strength
    clouds, (height, width) = np.zeros(x.shape[:2], np.float32), x.shape[:2]
    for octave in range(1, 8):
        grid = Image.fromarray(random.random((2**octave + 1,) * 2, np.float32))
        clouds += np.asarray(grid.resize((width, height), Image.BICUBIC)) / decay**octave
    clouds = (clouds - clouds.min()) / max(float(np.ptp(clouds)), 1e-6)
    brightest = x.max()
    return (x + amount * clouds[..., None]) * brightest / (brightest + amount)


def _rain(x: np.ndarray, strength: tuple[float, int], random: np.random.Generator) -> np.ndarray:
    """Draws bright streaks, all in one direction, over a slightly darker image."""
    share, radius = strength
    drops = (random.random(x.shape[:2]) < share).astype(np.float32)
    lean, streaks = random.uniform(-0.4, 0.4), np.zeros_like(drops)
    for step in range(-radius, radius + 1):
        streaks += _shifted(drops, step, step * lean)
    streaks = np.minimum(streaks, 1)[..., None] * 0.6
    return x * 0.85 * (1 - streaks) + streaks


# {name: (a function of image, parameter and generator; its parameters at the strengths 1, 3 and 5)}
CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {
    'noise': (_noise, (0.08, 0.18, 0.38)),
    'blur': (_blur, (1, 3, 6)),
    'motion': (_motion, ((10, 3), (15, 8), (20, 15))),
    'jpeg': (_jpeg, (25, 15, 7)),
    'brightness': (_brightness, (0.1, 0.3, 0.5)),
    'contrast': (_contrast, (0.4, 0.2, 0.05)),
    'fog': (_fog, ((1.5, 2.0), (2.5, 1.7), (3.0, 1.4))),
    'rain': (_rain, ((0.001, 8), (0.003, 12), (0.006, 16))),
}
