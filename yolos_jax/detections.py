"""`Detections`: the objects found in an image, to iterate over, draw and export."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from yolos_jax import pictures, visualize
from yolos_jax.data import pixels
from yolos_jax.errors import InputError
from yolos_jax.pictures import Picture


class Detection(NamedTuple):
    """One object: box [4] xyxy in pixels, score, label and class name."""

    box: np.ndarray
    score: float
    label: int
    name: str


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Detections:
    """The n objects detected in an image, best first.

    boxes float32 [n, 4] xyxy in pixels of the image given; scores float32 [n]; labels int64 [n], category
    ids of the detector's training data; names: n class names; image: as it was given (of a link or open
    file: the bytes), for drawing; size: its (height, width), upright.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    image: Picture | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of_tokens(
        cls,
        outputs: dict,
        tokens: np.ndarray,
        names: dict[int, str],
        size: tuple[int, int],
        *,
        ids: dict[int, int] | None = None,
        image: Picture | None = None,
    ) -> 'Detections':
        """The detections of some [DET] tokens in an image.

        outputs: of the image, as `steps.make_predict_step` gives them: 'boxes' [Q, 4], 'scores' [Q] and
        'labels' [Q]. tokens: their indices, best first. names: {label: class name}; size: of the image.
        ids: {label: category id}, where they differ.
        """
        labels, (height, width) = outputs['labels'][tokens].tolist(), size
        return cls(
            boxes=outputs['boxes'][tokens] * np.float32([width, height, width, height]),
            scores=outputs['scores'][tokens],
            labels=np.array([ids[label] for label in labels] if ids else labels, np.int64),
            names=[names.get(label, f'class {label}') for label in labels],
            image=image,
            size=size,
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        columns = self.boxes, self.scores.tolist(), self.labels.tolist(), self.names
        return itertools.starmap(Detection, zip(*columns, strict=True))

    def __repr__(self) -> str:
        best = ', '.join(self[:5].captions())
        return f'<{len(self)} detections{": " if best else ""}{best}{", ..." if len(self) > 5 else ""}>'

    def select(self, rows: Sequence[int] | np.ndarray) -> 'Detections':
        """Some of the objects, by their position, or by a mask, bool [n]."""
        rows = np.arange(len(self))[np.asarray(rows, None if len(rows) else np.int64)]
        arrays = self.boxes[rows], self.scores[rows], self.labels[rows]
        return Detections(*arrays, [self.names[i] for i in rows], self.image, self.size)

    @overload
    def __getitem__(self, rows: int | np.integer) -> Detection: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> 'Detections': ...

    def __getitem__(self, rows: Any) -> 'Detection | Detections':
        """One object by its position, or some by a slice or as `select` takes them."""
        if isinstance(rows, bool):  # of `names == 'cat'`, a list compared with a text
            raise InputError("a mask has to be an array, as np.array(detections.names) == 'cat' is")
        if isinstance(rows, int) or getattr(rows, 'ndim', 1) == 0:  # an index of numpy or JAX
            return list(self)[int(rows)]
        return self.select(np.arange(len(self))[rows] if isinstance(rows, slice) else rows)

    def captions(self) -> list[str]:
        """The name and score of each object."""
        return [f'{one.name} {one.score:.2f}' for one in self]

    def to_coco(self, image_id: int) -> list[dict]:
        """The objects as COCO's results, for pycocotools: 'bbox' is [x, y, width, height] in pixels."""
        sizes = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1).tolist()
        rows = zip(sizes, self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {'image_id': int(image_id), 'category_id': label, 'bbox': bbox, 'score': score}
            for bbox, score, label in rows
        ]

    def to_list(self) -> list[dict]:
        """The objects as plain dicts: 'box' (xyxy), 'score', 'label', 'name'."""
        return [
            one._asdict() | {'box': [round(float(x), 2) for x in one.box], 'score': round(one.score, 4)}
            for one in self
        ]

    def to_supervision(self) -> Any:
        """As `supervision.Detections`; that package must be installed."""
        import supervision

        data = {'class_name': np.array(self.names, str)}
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data
        )

    def draw(
        self,
        image: Picture | None = None,
        font: str | Path | None = None,
        duplicates: float = visualize.DUPLICATE,
    ) -> Image.Image:
        """The image with the objects drawn on it, as `visualize.draw`.

        image: the image to draw on, of any size; None: the one given to the detector.
        duplicates: an object is left out if its IoU with a better one of its class is above this.

        Raises:
            InputError: there is no image, or it or the font cannot be read.
        """
        image = self.image if image is None else image
        if image is None:
            raise InputError('these detections have no image to draw on; pass image')
        kept = self[visualize.without_duplicates(self.boxes, self.labels, duplicates)]
        array = pixels.to_rgb(pictures.decoded(pictures.opened(image)))
        height, width = self.size or array.shape[:2]
        scale = np.float32([array.shape[1] / width, array.shape[0] / height] * 2)
        drawn = visualize.draw(array, kept.boxes * scale, kept.labels, kept.captions(), font)
        return Image.fromarray(drawn)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return None if self.image is None else visualize.encoded(self.draw(), 'png')


def best_first(scores: np.ndarray, threshold: float) -> np.ndarray:
    """The indices of the scores that reach a threshold, best first."""
    order = np.argsort(-scores, kind='stable')
    return order[scores[order] >= threshold]
