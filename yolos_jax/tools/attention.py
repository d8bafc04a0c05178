"""Draw what [DET] tokens look at: their attention over the patches of a photograph.

    yolos attention --weights=PATH --output=DIR [--block=-1] [--threshold=0.5] IMAGE_OR_FOLDER ...

Each image gets a page with a row for each detection: the attention of its token in each head of a block (by
default the last one), and the mean of the heads.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from yolos_jax import Detector, attention, file_names, files, visualize
from yolos_jax.detections import Detections, best_first
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import cli
from yolos_jax.tools import flags, prediction_files, video
from yolos_jax.tools.predict import find_images

SIDE, GAP, MARGIN = 220, 6, 24  # pixels of a page's pictures, between them, and above them


def maps(model: Yolos, params: dict, patches: np.ndarray, grid: np.ndarray, block: int = -1) -> jax.Array:
    """The weights of [DET] tokens on patches in a block, as `make_maps`."""
    return make_maps(model, block)(params, patches, grid)


def make_maps(model: Yolos, block: int = -1) -> Callable:
    """A function of parameters, patches and grid (as for the model), compiled once for a length.

    It returns the weights [B, H, Q, N] of [DET] tokens on patches in a block: softmax over all tokens,
    padding 0. block: its index; -1 is the last.

    The last block of a model is computed for [DET] tokens alone, outside the scan over the others. So the
    model is cut after the wanted block, and a kernel that keeps the weights whenever it sees Q queries
    captures them in a single forward pass.

    Raises:
        InputError: the model has no such block.
    """
    if not -model.depth <= block < model.depth:
        raise InputError(f'block is {block}, but the model has {model.depth} blocks', 'block')
    depth, Q, seen = block % model.depth + 1, model.num_det_tokens, []

    def keeping(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        if q.shape[2] == Q:
            seen.append(attention.weights(q, k, lengths))
        return attention.dense(q, k, v, lengths)

    part = model.clone(depth=depth, attention_kernel=keeping)

    @jax.jit
    def maps_of(params: dict, patches: jax.Array, grid: jax.Array) -> jax.Array:
        backbone = dict(params['backbone'])
        backbone['blocks'] = jax.tree.map(lambda x: x[:depth], backbone['blocks'])
        if model.mid_pos_grid is not None:
            backbone['mid_pos_embed'] = backbone['mid_pos_embed'][: depth - 1]
        part.apply({'params': params | {'backbone': backbone}}, patches, grid)
        return seen.pop()[..., model.special :]

    return maps_of


def look(
    detector: Detector, maps: Callable, path: str | Path, threshold: float
) -> tuple[Detections, np.ndarray]:
    """The objects in an image file, and the attention of the token of each: [n, H, rows, columns].

    maps: of `make_maps`. Raises InputError as the detector.
    """
    prepared = detector.prepare(path, keep=True)
    batch = {'patches': prepared.patches[None], 'grid': prepared.grid[None]}
    outputs = {name: of_batch[0] for name, of_batch in detector.outputs(batch).items()}
    tokens, (rows, columns) = best_first(outputs['scores'], threshold), prepared.grid
    weights = np.asarray(maps(detector.params, **batch))[0, :, tokens, : rows * columns]  # [n, H, N]
    weights = weights.reshape(*weights.shape[:2], rows, columns)
    return detector.detections(prepared, outputs, tokens), weights


def sheet(detections: Detections, weights: np.ndarray, font: Path | None = None) -> Image.Image:
    """A row for each detection of `look`: the image with its box, the mean of all heads, and each head.

    font: as for `visualize.draw`.
    """
    image = detections.image
    scale = SIDE / max(image.shape[:2])
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.BILINEAR)
    heads = weights.shape[1]
    size = (2 + heads) * (width + GAP), max(len(detections), 1) * (height + MARGIN + GAP)
    result = Image.new('RGB', size, 'white')
    pen = ImageDraw.Draw(result)
    columns = detections.boxes, detections.labels, detections.captions(), weights
    for row, (box, label, caption, of_heads) in enumerate(zip(*columns, strict=True)):
        top = row * (height + MARGIN + GAP)
        titles = [caption, 'mean of heads', *(f'head {h}' for h in range(heads))]
        panels = [small, *(overlay(small, w) for w in [of_heads.mean(axis=0), *of_heads])]
        for column, (title, panel) in enumerate(zip(titles, panels, strict=True)):
            left = column * (width + GAP)
            result.paste(panel, (left, top + MARGIN))
            lettering, title = visualize.fitted(font, 13, title, width)
            pen.text((left + 2, top + 4), title, 'black', lettering)
            corners = np.clip(box * scale, 0, [width - 1, height - 1] * 2)
            colour = 'white' if column else visualize.colour_of(label)  # on the darkened ones
            pen.rectangle((corners + [left, top + MARGIN] * 2).tolist(), outline=colour, width=2)
    return result


def overlay(image: Image.Image, weight: np.ndarray) -> Image.Image:
    """A weight [rows, columns], relative to its largest, as a heat map on a darkened image."""
    import matplotlib

    heat = weight / max(float(weight.max()), 1e-12)
    heat = Image.fromarray(np.float32(heat)).resize(image.size, Image.BILINEAR)
    coloured = matplotlib.colormaps['inferno'](np.asarray(heat))[..., :3]
    strength = np.asarray(heat)[..., None] * 0.75
    mixed = np.asarray(image) / 255 * 0.6 * (1 - strength) + coloured * strength
    return Image.fromarray((255 * np.clip(mixed, 0, 1)).astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and draw."""
    parser = flags.parser(__doc__)
    flags.add_weights(parser)
    parser.add_argument('--output', required=True, type=Path, help='a folder for the pages')
    parser.add_argument('--threshold', type=float, default=0.5, help='minimum score of a detection (0.5)')
    parser.add_argument('--block', type=int, default=-1, help='index of the block (-1, the last)')
    flags.add_font(parser)
    parser.add_argument('images', nargs='+', help='image files or folders')
    args = parser.parse_args(arguments)
    files.check_folder(args.output)
    flags.check_threshold(args.threshold)
    visualize.load_font(args.font, 13)  # raises before any work is done
    inputs = find_images(args.images, args.output)
    for path in filter(video.is_video, inputs):
        print(f'left out: {path}: a video', file=sys.stderr)
    paths = [path for path in inputs if not video.is_video(path)]
    if not paths:
        raise InputError('all inputs are videos; give images')
    targets = {path: args.output / f'{name}.png' for path, name in file_names.for_output(paths).items()}
    for target in targets.values():
        if target.exists() and not prediction_files.is_own(target):
            raise InputError(
                f'{target}: exists and is not an attention page; choose another output', 'output'
            )
    options = dict(log=print, batch_size=1, **flags.hints(args))
    detector = Detector.from_pretrained(args.weights, args.step, **options)
    maps = make_maps(detector.model, args.block)
    bad = 0
    for path, target in targets.items():
        try:
            detections, weights = look(detector, maps, path, args.threshold)
        except InputError as error:
            print(f'left out: {error}', file=sys.stderr)
            bad += 1
            continue
        if not len(detections):
            print(f'{path}: nothing above {args.threshold}')
            continue
        made_by, page = PngInfo(), sheet(detections, weights, args.font)
        made_by.add_text('comment', prediction_files.MADE_BY)
        files.write(target, visualize.encoded(page, 'png', pnginfo=made_by))
        print(target)
    if bad:
        print(f'{bad} of {len(paths)} could not be read', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main)
