"""`Detections`: the objects found in an image, to iterate over, draw and export."""

import dataclasses
import http.client
import itertools
import string
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from yolos_jax import visualize
from yolos_jax.data import pixels
from yolos_jax.errors import InputError, StorageError

# what an array of another library raises that numpy cannot read (torch's bfloat16, or with a gradient)
NO_ARRAY = TypeError, ValueError, RuntimeError
Picture = np.ndarray | Image.Image | str | Path | bytes | bytearray | BinaryIO
LINK_SECONDS = 30  # to wait for an answer


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

    def select(self, rows: Sequence[int]) -> 'Detections':
        """Some of the objects, by their position, or by a mask, bool [n]."""
        rows = np.arange(len(self))[np.asarray(rows, None if len(rows) else np.int64)]
        arrays = self.boxes[rows], self.scores[rows], self.labels[rows]
        return Detections(*arrays, [self.names[i] for i in rows], self.image, self.size)

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
            {
                'box': [round(float(x), 2) for x in one.box],
                'score': round(one.score, 4),
                'label': one.label,
                'name': one.name,
            }
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
        array = pixels.to_rgb(to_rgbx(opened(image)))
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


def opened(image: Picture) -> Picture:
    """The bytes behind an http(s) link or in a file object; other images as they are.

    Raises:
        InputError: they cannot be read (a link: `StorageError`).
    """
    if isinstance(image, str) and image.startswith(('http://', 'https://')):
        try:
            link = urllib.parse.quote(image, safe=string.punctuation)  # spaces, letters that are not ASCII
            with urllib.request.urlopen(link, timeout=LINK_SECONDS) as response:
                return response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise StorageError(f'{image}: cannot be fetched ({error})') from None
    if isinstance(image, bytearray):
        return bytes(image)
    if not isinstance(image, Image.Image) and hasattr(image, 'read'):
        try:
            content = image.read()
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f'an image in an open file cannot be read ({error})') from None
        if isinstance(content, str):
            raise InputError("an image in an open file is text; open the file with 'rb'")
        return content
    return image


def to_rgbx(image: Picture) -> np.ndarray:
    """The pixels of a picture turned upright, RGBX (`data.pixels`); raises InputError as `Detector`."""
    if isinstance(image, str) and '://' in image:
        raise InputError(f'{image}: images are read from files and http(s) links; copy it first')
    if isinstance(image, str | Path):
        return pixels.read_image(Path(image), upright=True)
    if isinstance(image, bytes):
        return pixels.decode(image, 'an image in memory', upright=True)
    if isinstance(image, Image.Image):
        try:
            return pixels.from_pillow(image, upright=True)
        except pixels.UNREADABLE as error:
            raise InputError(f'an image cannot be read ({error})') from None
    if hasattr(image, '__array__'):  # of JAX or torch too
        try:
            array = np.asarray(image)
        except NO_ARRAY as error:
            raise InputError(f'an image is no array that numpy can read ({error})') from None
        return pixels.from_array(array)
    raise InputError(
        f'an image is {type(image).__name__}; give an array, a PIL image, a path or the bytes of a file, '
        'or a list of them; many go through `stream`'
    )
