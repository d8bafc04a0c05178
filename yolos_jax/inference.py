"""Images in, detections out."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from yolos_jax import attention, steps, weights
from yolos_jax.data import geometry, pixels
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH, PATCH_DIM

Picture = np.ndarray | Image.Image | str | Path


@dataclasses.dataclass(frozen=True)
class Detections:
    """The n objects detected in an image, best first.

    boxes float32 [n, 4] xyxy in pixels of the image given; scores float32 [n]; labels int32 [n]; names:
    n class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]

    def to_list(self) -> list[dict]:
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

    def __init__(self, pretrained: weights.Pretrained, device: jax.Device | None = None) -> None:
        """device: the one to compute on; JAX's first when None."""
        device = jax.devices()[0] if device is None else device
        model = pretrained.model
        kernel = attention.for_platform(device.platform, model.dtype)
        self.classes, self.size, self.max_size = pretrained.classes, pretrained.size, pretrained.max_size
        self._process = os.getpid()
        self._params = jax.device_put(pretrained.params, device)
        self._step = steps.make_predict_step(model.clone(attention_kernel=kernel))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> 'Detector':
        """From anything `weights.open` takes that is a detector."""
        with weights.open(path) as source:
            return cls(source.detector())

    def __call__(self, images: Sequence[Picture], threshold: float = 0.5) -> list[Detections]:
        """The objects in each image with a score of at least `threshold`.

        images: a list of uint8 [height, width, 3] RGB arrays, PIL images or paths (of photographs: they
            are turned upright as their EXIF says). Each is resized as for evaluation; results do not
            depend on what else is in the list.

        Raises:
            InputError: an image cannot be read or is of another kind.
            RuntimeError: the process was forked after the detector was made, which JAX does not survive.
        """
        if os.getpid() != self._process:
            raise RuntimeError('a Detector does not work after a fork: make it in the process that uses it')
        return [self._detect(_to_rgbx(image), threshold) for image in images]

    def _detect(self, image: np.ndarray, threshold: float) -> Detections:
        height, width = image.shape[:2]
        resized = geometry.fixed([height], [width], self.size, self.max_size)
        patches = np.zeros((1, self._length(resized.counts[0]), PATCH_DIM), np.uint8)
        pixels.place(image, resized[0], patches[0])
        outputs = jax.device_get(self._step(self._params, {'patches': patches, 'grid': resized.grid}))
        scores, labels, boxes = (outputs[name][0] for name in ('scores', 'labels', 'boxes'))
        order = np.argsort(-scores, kind='stable')
        order = order[scores[order] >= threshold]
        boxes = boxes[order] * np.float32([width, height, width, height])
        labels = labels[order]
        names = [self.classes.get(int(label), f'class {label}') for label in labels]
        return Detections(boxes, scores[order], labels, names)

    def _length(self, count: int) -> int:
        """One of few sequence lengths, so that images of many shapes share a compiled program."""
        most = (self.size // PATCH) * (min(self.max_size, 2 * self.size) // PATCH)
        step = max(-(-most // 4), 1)
        return -(-int(count) // step) * step


def _to_rgbx(image: Any) -> np.ndarray:
    if isinstance(image, str | Path):
        return pixels.read_image(Path(image), upright=True)
    if isinstance(image, Image.Image):
        return pixels.to_rgbx(image.convert('RGB'))
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return pixels.to_rgbx(image)
    what = f'{image.dtype} {image.shape}' if is_array else type(image).__name__
    raise InputError(f'an image is {what}; give uint8 [height, width, 3], a PIL image or a path')
