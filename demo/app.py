"""A web page that detects objects in a photograph, and shows which patches each detection attends to.

    python demo/app.py --weights=PATH [--port=7860]

This folder can also be used as a Hugging Face Space; README.md explains how.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import Detections, Detector, visualize
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.tools import attention, flags

EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / 'examples').glob('*.jpg'))
LEAST = 0.05  # least score that the threshold can be set to show
HOW = 'Drop a photograph, move the threshold, and click an object to see which patches its token looked at.'


class Seen(NamedTuple):
    """The detections in a photograph, best first, without duplicates, and the attention of their tokens."""

    detections: Detections
    attention: np.ndarray  # [n, rows, columns], the mean of the last block's heads

    def above(self, threshold: float) -> Detections:
        """The detections to show, which are the first ones."""
        return self.detections[: int(np.sum(self.detections.scores >= threshold))]


class Demo:
    """A detector behind a page."""

    def __init__(self, path: str) -> None:
        self.detector = Detector.from_pretrained(path, log=print, batch_size=1)
        self.maps = attention.make_maps(self.detector.model)

    def see(self, path: str | None) -> Seen | None:
        """The detections in a file and their attention; None, with a warning, if it is not an image."""
        if path is None:
            return None
        try:
            detections, weights = attention.look(self.detector, self.maps, path, LEAST)
        except InputError as error:
            reason = str(error).removeprefix(f'{path}: ')
            gr.Warning(f'{Path(path).name}: {reason}', title='This file cannot be shown')
            return None
        kept = visualize.without_duplicates(detections.boxes, detections.labels)
        return Seen(detections[kept], weights[kept].mean(axis=1))

    def draw(self, seen: Seen | None, threshold: float) -> tuple[Image.Image | None, list[list]]:
        """The photograph with its boxes, and a table of them."""
        if seen is None:
            return None, []
        shown = seen.above(threshold)
        return shown.draw(), [[one.name, round(one.score, 3)] for one in shown]

    def show(self, path: str | None, threshold: float) -> tuple:
        """A new photograph: what was seen, its picture, its table, and an empty attention."""
        seen = self.see(path)
        return seen, *self.draw(seen, threshold), None

    def look(self, seen: Seen | None, threshold: float, event: gr.SelectData) -> Image.Image | None:
        """The attention of the token of the smallest box at a click."""
        if seen is None:
            return None
        height, width = seen.detections.size
        x, y = np.array(event.index) / visualize.enlargement(width, height)
        boxes = seen.above(threshold).boxes
        inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        if not inside.any():
            gr.Info('There is no box where you clicked.')
            return None
        sizes = np.where(inside, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), np.inf)
        return self.overlay(seen, int(sizes.argmin()))

    def choose(self, seen: Seen | None, event: gr.SelectData) -> Image.Image | None:
        """The attention of the token of a row of the table."""
        return seen and self.overlay(seen, event.index[0])

    def overlay(self, seen: Seen, i: int) -> Image.Image:
        """The attention of detection i over the photograph, with its box."""
        photograph = Image.fromarray(seen.detections.image)
        scale = visualize.enlargement(*photograph.size)  # as the detections are drawn
        photograph = photograph.resize((scale * photograph.width, scale * photograph.height))
        picture = attention.overlay(photograph, seen.attention[i])
        corners = np.clip(scale * seen.detections.boxes[i], 0, np.tile(picture.size, 2) - 1)
        ImageDraw.Draw(picture).rectangle(corners.tolist(), outline='white', width=2)
        return picture


def make_page(demo: Demo) -> gr.Blocks:
    """The page; one photograph is processed at a time, others wait in a queue."""
    images = dict(interactive=False, height=440, buttons=['download', 'fullscreen'])
    with gr.Blocks(title='YOLOS', analytics_enabled=False) as page:
        gr.Markdown(f'# YOLOS\n{HOW}')
        seen = gr.State()
        with gr.Row():
            file = gr.File(label='Photograph', type='filepath', height=130, elem_id='photograph')
            with gr.Column():
                threshold = gr.Slider(0, 1, 0.5, step=0.01, label='Threshold', elem_id='threshold')
                gr.Examples(EXAMPLES, file)
        with gr.Row():
            picture = gr.Image(label='Detections', elem_id='detections', **images)
            looked = gr.Image(label='Attention', elem_id='attention', **images)
        table = gr.Dataframe(headers=['object', 'score'], interactive=False, elem_id='objects')
        file.change(demo.show, [file, threshold], [seen, picture, table, looked])
        threshold.change(demo.draw, [seen, threshold], [picture, table], trigger_mode='always_last')
        picture.select(demo.look, [seen, threshold], looked)
        table.select(demo.choose, seen, looked)
    return page.queue(default_concurrency_limit=1)


def main() -> None:
    """Parse the arguments and serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--weights', default=os.environ.get('WEIGHTS', 'hustvl/yolos-tiny'), help=flags.WEIGHTS
    )
    host = os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1')
    parser.add_argument('--host', default=host, help='address to serve (this machine only; 0.0.0.0: all)')
    parser.add_argument('--port', type=int, default=7860, help='port of the page (7860)')
    args = parser.parse_args()
    make_page(Demo(args.weights)).launch(server_name=args.host, server_port=args.port)


if __name__ == '__main__':
    cli.run(main)
