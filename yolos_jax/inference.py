"""Images in, detections out."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from yolos_jax import steps, weights
from yolos_jax.data import geometry, pixels
from yolos_jax.errors import InputError
from yolos_jax.model import PATCH


@dataclasses.dataclass(frozen=True)
class Detections:
    """The n objects found in an image, best first.

    boxes float32 [n, 4] xyxy in pixels of the image given; scores float32 [n]; labels int32 [n]; names:
    n class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list

    def to_list(self):
        """The objects as plain dicts: 'box' (xyxy), 'score', 'label', 'name'."""
        rows = zip(self.boxes, self.scores, self.labels, self.names, strict=True)
        return [
            {
                'box': [round(float(x), 2) for x in box],
                'score': round(float(score), 4),
                'label': int(label),
                'name': name,
            }
            for box, score, label, name in rows
        ]


class Detector:
    """A detector ready for use: `Detector.from_pretrained(path)(images)`."""

    def __init__(self, found):
        """found: `weights.Weights`."""
        self.classes, self.size, self.max_size = found.classes, found.size, found.max_size
        self._params = jax.device_put(found.params)
        self._step = steps.make_predict_step(found.model)

    @classmethod
    def from_pretrained(cls, path):
        """From anything `weights.read` takes."""
        return cls(weights.read(path))

    def __call__(self, images, threshold=0.5):
        """The objects in each image with a score of at least `threshold`: a list of `Detections`.

        images: a list of uint8 [height, width, 3] RGB arrays, PIL images or paths (of photographs: they
            are turned upright as their EXIF says). Each is resized as for evaluation; results do not
            depend on what else is in the list.

        Raises:
            InputError: an image cannot be read or is of another kind.
        """
        return [self._one(_pixels(image), threshold) for image in images]

    def _one(self, image, threshold):
        height, width = image.shape[:2]
        drawn = geometry.fixed([height], [width], self.size, self.max_size)
        drawn = {name: values[0] for name, values in drawn.items()}
        patches = np.zeros((1, self._length(drawn['shape']), 3 * PATCH**2), np.uint8)
        pixels.place(image, drawn, patches[0])
        batch = {'patches': patches, 'grid': drawn['shape'][None] // PATCH}
        found = jax.device_get(self._step(self._params, batch))
        scores, labels, boxes = (found[name][0] for name in ('scores', 'labels', 'boxes'))
        order = np.argsort(-scores, kind='stable')
        order = order[scores[order] >= threshold]
        boxes = boxes[order] * np.float32([width, height, width, height])
        labels = labels[order]
        names = [self.classes.get(int(label), f'class {label}') for label in labels]
        return Detections(boxes, scores[order], labels, names)

    def _length(self, shape):
        """One of few sequence lengths, so that images of many shapes share a compiled program."""
        most = (self.size // PATCH) * (self.max_size // PATCH)
        step = max(-(-most // 4), 1)
        return -(-(shape[0] * shape[1] // PATCH**2) // step) * step


def _pixels(image):
    """The image as RGBX."""
    if isinstance(image, str | Path):
        return pixels.read_image(Path(image), upright=True)
    if isinstance(image, Image.Image):
        return pixels.rgbx(image.convert('RGB'))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        if image.shape[2] == 3:
            return pixels.rgbx(image)
    what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
    raise InputError(f'an image is {what}; give uint8 [height, width, 3], a PIL image or a path')
