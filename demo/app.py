"""A page on which photographs are dropped: boxes, a threshold, and what a detection's token looked at.

    python demo/app.py --weights=PATH [--port=7860]

As it lies, this folder is a Space of Hugging Face too; README.md says how.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import Detector, visualize, weights
from yolos_jax.data import pixels
from yolos_jax.detections import to_rgbx
from yolos_jax.errors import InputError
from yolos_jax.tools import attention

EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / 'examples').glob('*.jpg'))
LEAST = 0.05  # score of what the threshold can bring in
HOW = 'Drop a photograph, move the threshold, and click an object to see which patches its token looked at.'


class Seen(NamedTuple):
    """A photograph, RGB, and what was detected in it, best first; tokens: which gave each detection."""

    image: np.ndarray
    boxes: np.ndarray  # xyxy, in pixels
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    tokens: np.ndarray
    attention: np.ndarray  # [tokens, rows, columns], the mean of the last block's heads

    def above(self, threshold: float) -> np.ndarray:
        """The detections to show: no duplicates of better ones."""
        kept = visualize.without_duplicates(self.boxes, self.labels)
        return kept[self.scores[kept] >= threshold]

    def captions(self, rows: np.ndarray) -> list[str]:
        """Name and score of detections."""
        return [f'{self.names[i]} {self.scores[i]:.2f}' for i in rows]


class Demo:
    """A detector behind a page."""

    def __init__(self, path: str) -> None:
        with weights.open(path) as source:
            self.pretrained = source.detector(log=print)
        self.detector = Detector(self.pretrained, batch_size=1)

    def see(self, path: str | None) -> Seen | None:
        """Everything there is to show of a file; None, and a sentence, where it is no image."""
        if path is None:
            return None
        try:
            image = pixels.to_rgb(to_rgbx(path))
            prepared = self.detector.prepare(path)
        except InputError as error:
            reason = str(error).removeprefix(f'{path}: ')
            gr.Warning(f'{Path(path).name}: {reason}', title='This file cannot be shown')
            return None
        inputs = prepared.patches[None], prepared.grid[None]
        outputs = self.detector.outputs(dict(zip(('patches', 'grid'), inputs, strict=True)))
        of_heads = attention.maps(self.pretrained.model, self.pretrained.params, *inputs)
        rows, columns = prepared.grid
        looked = np.asarray(of_heads[0].mean(axis=0))[:, : rows * columns].reshape(-1, rows, columns)
        scores = outputs['scores'][0]
        tokens = np.argsort(-scores, kind='stable')
        tokens = tokens[scores[tokens] >= LEAST]
        labels = outputs['labels'][0][tokens]
        names = [self.pretrained.classes.get(label, f'class {label}') for label in labels.tolist()]
        boxes = outputs['boxes'][0][tokens] * np.float32([*image.shape[1::-1]] * 2)
        return Seen(image, boxes, scores[tokens], labels, names, tokens, looked)

    def draw(self, seen: Seen | None, threshold: float) -> tuple[Image.Image | None, list[list]]:
        """The photograph with its boxes, and a table of them."""
        if seen is None:
            return None, []
        rows = seen.above(threshold)
        drawn = visualize.draw(seen.image, seen.boxes[rows], seen.labels[rows], seen.captions(rows))
        table = [[seen.names[i], round(float(seen.scores[i]), 3)] for i in rows]
        return Image.fromarray(drawn), table

    def show(self, path: str | None, threshold: float) -> tuple:
        """A new photograph: what was seen, its picture, its table, and an empty attention."""
        seen = self.see(path)
        return seen, *self.draw(seen, threshold), None

    def look(self, seen: Seen | None, threshold: float, event: gr.SelectData) -> Image.Image | None:
        """What the token of the smallest box at a click looked at."""
        if seen is None:
            return None
        rows = seen.above(threshold)
        scale = visualize.enlargement(seen.image.shape[1], seen.image.shape[0])
        x, y = np.array(event.index) / scale
        boxes = seen.boxes[rows]
        inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        if not inside.any():
            gr.Info('There is no box where you clicked.')
            return None
        sizes = np.where(inside, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), np.inf)
        return self.overlay(seen, rows[int(sizes.argmin())])

    def choose(self, seen: Seen | None, threshold: float, event: gr.SelectData) -> Image.Image | None:
        """The same for a row of the table."""
        return seen and self.overlay(seen, seen.above(threshold)[event.index[0]])

    def overlay(self, seen: Seen, i: int) -> Image.Image:
        """The attention of detection i over the photograph, with its box."""
        picture = attention.overlay(Image.fromarray(seen.image), seen.attention[seen.tokens[i]])
        corners = np.clip(seen.boxes[i], 0, np.tile(picture.size, 2) - 1)
        ImageDraw.Draw(picture).rectangle(corners.tolist(), outline='white', width=2)
        return picture


def make_page(demo: Demo) -> gr.Blocks:
    """The page; one photograph is computed at a time, others wait in a queue."""
    images = dict(interactive=False, show_label=False, height=440, buttons=['download', 'fullscreen'])
    with gr.Blocks(title='YOLOS', analytics_enabled=False) as page:
        gr.Markdown(f'# YOLOS\n{HOW}')
        seen = gr.State()
        with gr.Row():
            file = gr.File(label='Photograph', type='filepath', height=130, elem_id='photograph')
            with gr.Column():
                threshold = gr.Slider(0, 1, 0.5, step=0.01, label='Threshold', elem_id='threshold')
                gr.Examples(EXAMPLES, file)
        with gr.Row():
            picture = gr.Image(elem_id='detections', **images)
            looked = gr.Image(elem_id='attention', **images)
        table = gr.Dataframe(headers=['object', 'score'], interactive=False, elem_id='objects')
        file.change(demo.show, [file, threshold], [seen, picture, table, looked])
        threshold.change(demo.draw, [seen, threshold], [picture, table], trigger_mode='always_last')
        picture.select(demo.look, [seen, threshold], looked)
        table.select(demo.choose, [seen, threshold], looked)
    return page.queue(default_concurrency_limit=1)


def main() -> None:
    """Parse the arguments and serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--weights', default=os.environ.get('WEIGHTS', 'hustvl/yolos-tiny'))
    parser.add_argument('--host', default=os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1'))
    parser.add_argument('--port', type=int, default=7860)
    args = parser.parse_args()
    make_page(Demo(args.weights)).launch(server_name=args.host, server_port=args.port)


if __name__ == '__main__':
    main()
