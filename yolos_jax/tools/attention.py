"""What [DET] tokens look at: their attention over the patches, drawn on the photograph.

    yolos attention --weights=PATH --output=DIR [--block=-1] [--threshold=0.5] IMAGE_OR_FOLDER ...

For each image a page: a row for each detection, with the attention of its token in each head of a block
(the last one), and their mean.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import Detector, attention, files, visualize, weights
from yolos_jax.data import pixels
from yolos_jax.detections import to_rgbx
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import cli
from yolos_jax.tools import video
from yolos_jax.tools.predict import find_images

SIDE, GAP, MARGIN = 220, 6, 24  # pixels of a page's pictures, between them, and above them


def maps(model: Yolos, params: dict, patches: np.ndarray, grid: np.ndarray, block: int = -1) -> jax.Array:
    """The weights [B, H, Q, N] of [DET] tokens on patches in a block: softmax over all tokens, padding 0.

    patches, grid: as for the model. block: its index; -1 is the last.

    Raises:
        InputError: the model has no such block.
    """
    if not -model.depth <= block < model.depth:
        raise InputError(f'block is {block}, and the model has {model.depth}', 'block')
    depth = block % model.depth + 1
    return _maps(model, depth, params, patches, grid)


def _maps(model: Yolos, depth: int, params: dict, patches: jax.Array, grid: jax.Array) -> jax.Array:
    """The last block of a model is computed for [DET] tokens alone, outside the scan over the others.

    So a model of the first `depth` blocks has the attention in question there, and a kernel that keeps its
    weights, where it sees as many queries as there are tokens, gives it without another forward pass.
    """
    Q, seen = model.num_det_tokens, []

    def keeping(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        if q.shape[2] == Q:
            seen.append(attention.weights(q, k, lengths))
        return attention.dense(q, k, v, lengths)

    backbone = params['backbone'] | {
        'blocks': jax.tree.map(lambda x: x[:depth], params['backbone']['blocks'])
    }
    if model.mid_pos_grid is not None:
        backbone['mid_pos_embed'] = backbone['mid_pos_embed'][: depth - 1]
    part = model.clone(depth=depth, attention_kernel=keeping)

    @jax.jit
    def run(params: dict, patches: jax.Array, grid: jax.Array) -> jax.Array:
        part.apply({'params': params}, patches, grid)
        return seen.pop()[..., model.special :]

    return run(params | {'backbone': backbone}, jnp.asarray(patches), jnp.asarray(grid))


def page(
    image: np.ndarray, boxes: np.ndarray, captions: Sequence[str], weights_of: np.ndarray
) -> Image.Image:
    """A row for each of n detections: the image with its box, the mean of all heads, and each head.

    image: uint8 [height, width, 3]; boxes [n, 4] xyxy in its pixels; weights_of [n, H, rows, columns].
    """
    scale = SIDE / max(image.shape[:2])
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.BILINEAR)
    heads = weights_of.shape[1]
    sheet = Image.new(
        'RGB', ((2 + heads) * (width + GAP), max(len(boxes), 1) * (height + MARGIN + GAP)), 'white'
    )
    pen, font = ImageDraw.Draw(sheet), visualize.load_font(None, 13)
    for row, (box, caption, of_heads) in enumerate(zip(boxes, captions, weights_of, strict=True)):
        top = row * (height + MARGIN + GAP)
        titles = [caption, 'mean of heads', *(f'head {h}' for h in range(heads))]
        panels = [small, *(overlay(small, w) for w in [of_heads.mean(axis=0), *of_heads])]
        for column, (title, panel) in enumerate(zip(titles, panels, strict=True)):
            left = column * (width + GAP)
            sheet.paste(panel, (left, top + MARGIN))
            pen.text((left + 2, top + 4), title, 'black', font)
            corners = np.clip(np.asarray(box) * scale, 0, [width - 1, height - 1] * 2)
            pen.rectangle((corners + [left, top + MARGIN] * 2).tolist(), outline='white')
    return sheet


def overlay(image: Image.Image, weight: np.ndarray) -> Image.Image:
    """A weight [rows, columns], relative to its largest, as a heat map on a darkened image."""
    import matplotlib

    heat = weight / max(float(weight.max()), 1e-12)
    heat = Image.fromarray(np.float32(heat)).resize(image.size, Image.BILINEAR)
    coloured = matplotlib.colormaps['inferno'](np.asarray(heat))[..., :3]
    strength = np.asarray(heat)[..., None] * 0.75
    mixed = np.asarray(image) / 255 * 0.6 * (1 - strength) + coloured * strength
    return Image.fromarray((255 * np.clip(mixed, 0, 1)).astype(np.uint8))


def examine(
    detector: Detector, pretrained: weights.Pretrained, path: Path, threshold: float, block: int
) -> Image.Image | None:
    """The page of an image file; None without a detection."""
    prepared = detector.prepare(path)
    outputs = detector.outputs({'patches': prepared.patches[None], 'grid': prepared.grid[None]})
    scores = outputs['scores'][0]
    tokens = [i for i in np.argsort(-scores, kind='stable') if scores[i] >= threshold]
    if not tokens:
        return None
    rows, columns = prepared.grid
    of_all = maps(pretrained.model, pretrained.params, prepared.patches[None], prepared.grid[None], block)
    of_tokens = np.asarray(of_all[0, :, tokens, : rows * columns])  # [n, H, N]
    of_tokens = of_tokens.reshape(*of_tokens.shape[:2], rows, columns)
    height, width = prepared.size
    boxes = outputs['boxes'][0][tokens] * np.float32([width, height, width, height])
    names = [
        pretrained.classes.get(label, f'class {label}') for label in outputs['labels'][0][tokens].tolist()
    ]
    captions = [f'{name} {scores[i]:.2f}' for name, i in zip(names, tokens, strict=True)]
    return page(pixels.to_rgb(to_rgbx(path)), boxes, captions, of_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--weights', required=True, help=cli.WEIGHTS)
    parser.add_argument('--output', required=True, type=Path, help='a folder for the pages')
    parser.add_argument('--threshold', type=float, default=0.5, help='least score of a detection (0.5)')
    parser.add_argument('--block', type=int, default=-1, help='index of the block (-1, the last)')
    parser.add_argument('images', nargs='+', help='image files or folders')
    args = parser.parse_args(arguments)
    paths = [path for path in find_images(args.images, args.output) if not video.is_video(path)]
    with weights.open(args.weights) as source:
        pretrained = source.detector(log=print)
    detector = Detector(pretrained, batch_size=1)
    for path, name in files.names_for(paths).items():
        try:
            sheet = examine(detector, pretrained, path, args.threshold, args.block)
        except InputError as error:
            print(f'left out: {error}', file=sys.stderr)
            continue
        if sheet is None:
            print(f'{path}: nothing above {args.threshold}')
            continue
        with files.replacing(args.output / f'{name}.png') as file:
            sheet.save(file, 'png')
        print(args.output / f'{name}.png')


if __name__ == '__main__':
    cli.run(main)
