"""Pictures of detections, and what all pictures and figures need: fonts, colours, files."""

import colorsys
import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from yolos_jax import files
from yolos_jax.errors import InputError

LONGEST = 4096  # most pixels of an enlarged side: JPEG and memory have bounds
DUPLICATE = 0.7  # a picture leaves out a detection with a larger IoU with a better one of its class


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    captions: Sequence[str],
    font: str | Path | None = None,
) -> np.ndarray:
    """A copy of an image, uint8 [height, width, 3], with boxes drawn on it.

    Captions are within the image, beside their box and not on one another if there is room; where boxes or
    captions overlap, the first is on top. An image with a side below 320 pixels is enlarged by a whole
    number, so that the text fits, as long as the longer side stays below 4096.

    boxes: [n, 4] xyxy in pixels; labels: [n], which give the colours; captions: n texts. font: a file of a
        TrueType or OpenType font; DejaVu Sans when None.

    Raises:
        InputError: the font cannot be read.
    """
    picture = Image.fromarray(image)
    scale = enlargement(*picture.size)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    short = min(picture.size)
    thick = max(short // 200, 2)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * scale
    colours = [colour_of(int(label)) for label in labels]
    for box, colour in reversed([*zip(boxes, colours, strict=True)]):
        pen.rectangle(_inside(box, picture.size), outline=colour, width=thick)
    placed: list[np.ndarray] = []
    letterings = []
    for box, text in zip(boxes, captions, strict=True):
        lettering, text = fitted(font, max(short // 32, 13), text, picture.width)
        area = np.array(lettering.getbbox(text, anchor='la')) + [0, 0, 6, 4]
        corner = _corner(_inside(box, picture.size), area[2:], picture.size, placed)
        placed.append(np.concatenate([corner, corner + area[2:]]))
        letterings.append((lettering, text))
    for area, colour, (lettering, text) in reversed([*zip(placed, colours, letterings, strict=True)]):
        pen.rectangle(area.tolist(), fill=colour)
        ink = 'black' if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else 'white'
        pen.text((area[:2] + [3, 2]).tolist(), text, ink, lettering, anchor='la')
    return np.asarray(picture)


def enlargement(width: int, height: int) -> int:
    """How many times as large `draw` makes an image of this size."""
    return max(min(-(-320 // min(width, height)), LONGEST // max(width, height)), 1)


def without_duplicates(boxes: np.ndarray, labels: np.ndarray, iou: float = DUPLICATE) -> np.ndarray:
    """Indices of boxes [n, 4] xyxy, best first, without those that overlap a better one of their class.

    For pictures; an evaluation counts duplicates as COCO does.
    """
    kept: list[int] = []
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for i in range(len(boxes)):
        others = [k for k in kept if labels[k] == labels[i]]
        shared = _shared(boxes[others], boxes[i])
        if not (shared > iou * (areas[others] + areas[i] - shared)).any():
            kept.append(i)
    return np.array(kept, np.int64)


def _inside(box: np.ndarray, size: tuple[int, int]) -> list[float]:
    """A box with its corners within the picture and in order."""
    box = np.clip(box, 0, np.tile(size, 2) - 1)
    return np.concatenate([box[:2], np.maximum(box[2:], box[:2])]).tolist()


def _corner(
    box: list[float], extent: np.ndarray, size: tuple[int, int], placed: Sequence[np.ndarray]
) -> np.ndarray:
    """Where the upper left corner of a caption goes: the first of the places beside a box that is free."""
    left, top, right, bottom = box
    width, height = extent
    places = [
        (left, top - height), (left, top), (left, bottom), (right - width, top - height),
        (right - width, bottom), (right, top), (left - width, top), (left, bottom - height),
    ]  # fmt: skip
    places = np.clip(np.array(places), 0, np.maximum(np.array(size) - 1 - extent, 0)).round()
    captions = np.concatenate([places, places + extent], axis=1)
    overlap = sum((_shared(captions, other) for other in placed), np.zeros(len(places)))
    return places[int(np.argmin(overlap))]


def _shared(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The area [n] that each of some boxes [n, 4] shares with another."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    return np.prod(np.clip(high - low, 0, None), axis=1)


def fitted(font: str | Path | None, size: int, text: str, width: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font in which a text is no wider than the picture, and the text, cut where it must be."""
    text = ''.join(c if c.isprintable() else ' ' for c in text)
    while (lettering := load_font(font, size)).getlength(text) > width - 8 and size > 9:
        size -= 1
    while lettering.getlength(text) > width - 8 and len(text) > 1:
        text = text.rstrip('\N{HORIZONTAL ELLIPSIS}')[:-1] + '\N{HORIZONTAL ELLIPSIS}'
    return lettering, text


def default_font() -> Path:
    """The file of DejaVu Sans that comes with matplotlib."""
    # without importing matplotlib, which takes a second
    folder = Path(importlib.util.find_spec('matplotlib').origin).parent
    return folder / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'


@functools.cache
def load_font(file: str | Path | None, size: int) -> ImageFont.FreeTypeFont:
    """A font of a size in pixels, from a file or DejaVu Sans; raises InputError if it cannot be read."""
    file = default_font() if file is None else file
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise InputError(f'{file}: no font that can be read ({error})', 'font') from None


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class in pictures."""
    return rgb(label * 0.618034 % 1, 0.7, 1.0)  # steps of the golden ratio keep neighbouring labels apart


def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """A colour of HSV, each 0..1, as Pillow takes it."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def corners(boxes: np.ndarray) -> np.ndarray:
    """Boxes [n, 4] xywh as xyxy; a negative side counts as 0."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + np.maximum(boxes[:, 2:], 0)], axis=1)


def plain(text: str) -> str:
    """Text for matplotlib, which takes $ for a formula and omits labels that begin with _."""
    return ' ' * text.startswith('_') + text.replace('$', r'\$')


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib Figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format='png')
    files.write(path, file.getvalue())


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A PIL image as a file's content: saving to a file directly, PIL leaves half of it on a full disk."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
