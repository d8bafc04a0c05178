"""Pictures: detections drawn on an image, and the curves of a run."""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONGEST = 4096  # pixels of a side that enlarging may lead to: JPEG and memory have bounds


def draw(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], captions: Sequence[str]
) -> np.ndarray:
    """A copy of an image, uint8 [height, width, 3], with boxes drawn on it.

    boxes: [n, 4] xyxy in pixels; labels: [n], which give the colours; captions: n texts. An image with a
    side below 320 pixels comes back enlarged by a whole number, for the text to fit, where the longer one
    stays below 4096.
    """
    picture = Image.fromarray(image)
    scale = max(min(-(-320 // min(picture.size)), LONGEST // max(picture.size)), 1)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    short = min(picture.size)
    font = ImageFont.load_default(size=max(short // 30, 12))
    thick = max(short // 200, 2)
    for box, label, text in zip(boxes, labels, captions, strict=True):
        colour, box = _colour(int(label)), (np.asarray(box) * scale).tolist()
        pen.rectangle(box, outline=colour, width=thick)
        left, top, right, bottom = pen.textbbox((box[0], box[1]), text, font=font, anchor='lb')
        drop = max(-top, 0)  # a label above the image's edge moves down into it
        pen.rectangle((left, top + drop, right, bottom + drop), fill=colour)
        pen.text((box[0], box[1] + drop), text, 'black', font, anchor='lb')
    return np.asarray(picture)


def _colour(label: int) -> tuple[int, int, int]:
    hue = label * 0.618034 % 1  # steps of the golden ratio keep neighbouring labels apart
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 1.0))


def curves(workdir: str | Path) -> None:
    """Draw workdir/curves.png from workdir/metrics.jsonl: loss, its parts, and AP."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for axes, names in (
        (left, ('loss', 'loss_ce', 'loss_bbox', 'loss_giou')),
        (right, ('AP', 'AP50', 'AP75')),
    ):
        for name in names:
            points = [(line['step'], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set_xlabel('step')
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    figure.savefig(Path(workdir) / 'curves.png', dpi=120)
    plt.close(figure)
