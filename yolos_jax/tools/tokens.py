"""Show what [DET] tokens specialise in: places, sizes, or classes.

    yolos tokens --weights=PATH --data=FOLDER --output=DIR

It runs over a validation split. boxes.png shows the centres of the boxes that some tokens predict, blue for
small, green for medium and red for large ones; classes.png shows how often tokens predict each class,
beside how often objects have it; tokens.json has the paper's two correlations.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from yolos_jax import attention, class_matching, evaluation, files, visualize, weights
from yolos_jax.data import records
from yolos_jax.data.annotations import LARGE, SMALL
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.progress_bar import progress_bar
from yolos_jax.run import cli
from yolos_jax.tools import flags

SHOWN = 10  # tokens in boxes.png, as in the paper's figure 4
METHOD = (
    "rho is Pearson's, over all pairs of tokens in every image: of the cosine similarity of two learned "
    'token embeddings with the distance of the centres of the predicted boxes (Euclidean, in 0..1), and '
    'with the cosine similarity of the predicted class logits. "images averaged first": the same after '
    'the mean over images of the distance, or similarity, of each pair.'
)


def correlation(tokens: np.ndarray, centres: np.ndarray, average_images: bool = False) -> float | None:
    """Pearson's rho of tokens' cosine similarity and the distance of what they predict.

    Args:
        tokens: [Q, D], the learned embeddings. centres: [I, Q, 2], of the boxes they predict in I images.
        average_images: average distances over images first; else correlate all pairs in all images.

    Returns:
        rho; None where one of the two is constant.
    """
    return _pearson(cosine(tokens), (distances(x) for x in centres), average_images)


def class_correlation(tokens: np.ndarray, logits: np.ndarray, average_images: bool = False) -> float | None:
    """As `correlation`, with the cosine similarity of class logits [I, Q, C + 1] and not a distance."""
    return _pearson(cosine(tokens), (cosine(x) for x in logits), average_images)


def cosine(x: np.ndarray) -> np.ndarray:
    """Cosine similarity of each pair of rows of [Q, D], [Q (Q - 1) / 2]."""
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def distances(x: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pair of rows of [Q, 2], [Q (Q - 1) / 2]."""
    x = np.asarray(x, np.float64)
    first, second = np.triu_indices(len(x), 1)
    return np.linalg.norm(x[first] - x[second], axis=-1)


def _pearson(similarity: np.ndarray, of_images: Iterable[np.ndarray], average_images: bool) -> float | None:
    """rho of a vector with the vectors of images, not in memory together; None where either is constant."""
    count, mean, squares, products = 0, np.zeros_like(similarity), 0.0, 0.0
    centred = similarity - similarity.mean()
    for values in of_images:
        count, mean = count + 1, mean + values
        squares, products = squares + values @ values, products + centred @ values
    mean /= max(count, 1)
    if average_images:
        squares, products, count = mean @ mean, centred @ mean, 1
    n = count * len(similarity)
    variance = (squares / n - mean.mean() ** 2) * (centred @ centred) / len(similarity)
    return float(products / n / np.sqrt(variance)) if variance > 0 else None


def predictions(model: Yolos, params: dict, batches: EvalBatches) -> dict[str, np.ndarray]:
    """The predictions of all tokens in I images.

    'pred_logits' [I, Q, C + 1], 'pred_boxes' [I, Q, 4] cxcywh in 0..1, and 'index' [I], the records.
    """
    kernel = attention.for_platform(attention.platform_of(jax.devices()[0]), model.dtype)
    apply = jax.jit(model.clone(attention_kernel=kernel).apply)
    predict = lambda batch: jax.device_get(apply({'params': params}, batch['patches'], batch['grid']))
    with progress_bar(total=len(batches), unit='batch') as bar:
        return evaluation.detect(predict, batches, on_batch=bar.update)


def draw_boxes(path: Path, boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Draw the centres of tokens' boxes [I, Q, 4], cxcywh in 0..1; sizes [I, 2]: (height, width)."""
    count = min(SHOWN, boxes.shape[1])
    figure = Figure(figsize=(13, 5.6), layout='constrained')
    axes = figure.subplots(2, -(-count // 2), squeeze=False)
    areas = boxes[..., 2] * boxes[..., 3] * sizes.prod(axis=1)[:, None]
    colours = np.where(areas < SMALL, 'tab:blue', np.where(areas < LARGE, 'tab:green', 'tab:red'))
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    for token, ax in enumerate(axes.flat[:count]):
        ax.scatter(boxes[:, token, 0], boxes[:, token, 1], s=4, c=colours[:, token])
        ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], title=f'token {token}', aspect='equal')
    figure.suptitle('centres of predicted boxes: blue small, green medium, red large')
    visualize.save(figure, path)


def draw_classes(path: Path, predicted: np.ndarray, actual: np.ndarray, names: Sequence[str]) -> None:
    """Draw how often tokens predict each class, and how often objects have it, [C] each, as shares."""
    figure = Figure(figsize=(max(6, len(names) / 5), 4), layout='constrained')
    ax = figure.subplots()
    place = np.arange(len(names))
    ax.bar(place - 0.2, predicted / max(predicted.sum(), 1), 0.4, label='predicted')
    ax.bar(place + 0.2, actual / max(actual.sum(), 1), 0.4, label='objects')
    ax.set_xticks(place, [*map(visualize.plain, names)], rotation=90 if len(names) > 8 else 0, fontsize=8)
    ax.set_ylabel('share')
    ax.legend()
    visualize.save(figure, path)


@cli.without_flags('bad_images')  # which a run has as a key, and this command does not
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and examine."""
    parser = flags.parser(__doc__)
    flags.add_weights(parser)
    parser.add_argument('--data', required=True, help='a data folder')
    parser.add_argument('--split', default='val2017', help='the split (val2017)')
    parser.add_argument('--output', required=True, type=Path, help='a folder')
    args = parser.parse_args(arguments)
    files.check_folder(args.output)
    data = records.read(args.data, args.split)
    pretrained = weights.read(args.weights, args.step, log=print, **flags.hints(args))
    if pretrained.model.num_det_tokens < 3:
        raise InputError(f'{args.weights}: correlations need 3 [DET] tokens or more', 'weights')
    category_of, notes = class_matching.match(pretrained, data)
    for note in notes:
        print(note)
    data = class_matching.relabelled(data, category_of)
    model, size = pretrained.model, {'size': pretrained.size, 'max_size': pretrained.max_size}
    outputs = predictions(model, pretrained.params, EvalBatches(data, batch_size=1, **size))
    tokens, boxes = np.asarray(pretrained.params['backbone']['det_token'])[0], outputs['pred_boxes']
    numbers = {'images': len(boxes), 'tokens': len(tokens), 'method': METHOD}
    for key, average in (('', False), (', images averaged first', True)):
        numbers[f'rho with distance{key}'] = correlation(tokens, boxes[..., :2], average)
        numbers[f'rho with classes{key}'] = class_correlation(tokens, outputs['pred_logits'], average)
    sizes = np.stack([data.heights, data.widths], axis=1)[outputs['index']]
    draw_boxes(args.output / 'boxes.png', boxes, sizes)
    labels = sorted(pretrained.classes)
    predicted = np.bincount(outputs['pred_logits'][..., :-1].argmax(-1).ravel(), minlength=max(labels) + 1)
    actual = np.bincount(data.labels, minlength=max(labels) + 1)
    names = [pretrained.classes[label] for label in labels]
    draw_classes(args.output / 'classes.png', predicted[labels], actual[labels], names)
    files.write_json(args.output / 'tokens.json', numbers)
    for name, value in numbers.items():
        print(f'{name}: {value:.3f}' if isinstance(value, float) else f'{name}: {value}')


if __name__ == '__main__':
    cli.run(main)
