"""Folds the pixel statistics of other projects' models into their patch projections.

A model trained on pixels normalised otherwise gets a patch projection that gives the same on ours, so that
every model here takes pixels normalised by ImageNet's mean and deviation.
"""

import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.patches import MEAN, STD
from yolos_jax.weights import foreign_config
from yolos_jax.weights.tensor import Tensor
from yolos_jax.weights.tensors import BESIDE, TensorFile


def of_file(file: TensorFile) -> tuple[np.ndarray, np.ndarray]:
    """The statistics that a JSON beside a file of weights gives, or ImageNet's."""
    configs = (foreign_config.read(file, name) for name in reversed(BESIDE))
    given = (x for x in configs if {'image_mean', 'mean'} & x.keys() or x.get('do_normalize') is False)
    return read(next(given, {}))


def read(config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [3] of pixels in 0..1 that a preprocessor's config asks for.

    Raises:
        InputError: they are not three numbers each.
    """
    mean = config.get('image_mean', config.get('mean', MEAN.tolist()))
    std = config.get('image_std', config.get('std', STD.tolist()))
    if not config.get('do_normalize', True):
        mean, std = [0, 0, 0], [1, 1, 1]
    try:
        scale = 255 * config.get('rescale_factor', 1 / 255) if config.get('do_rescale', True) else 255
        mean, std = (np.array(x, np.float32).reshape(3) / np.float32(scale) for x in (mean, std))
    except (TypeError, ValueError):
        raise InputError(
            f'the mean {mean} and deviation {std} of its pixels are not three numbers'
        ) from None
    if not (np.isfinite([mean, std]).all() and (std > 0).all()):
        raise InputError(f'the mean {mean} and deviation {std} of its pixels are no statistics')
    return mean, std


def fold(tensors: dict, prefix: str, mean: np.ndarray, std: np.ndarray) -> list[str]:
    """Bring the patch convolution from pixels of (mean, std) to ours: x' = (x STD + MEAN - mean) / std.

    Returns a line for the reader, or none where the statistics are ImageNet's and nothing is done.
    """
    if np.allclose(mean, MEAN) and np.allclose(std, STD):
        return []
    weight = tensors[f'{prefix}weight'].numpy().astype(np.float32)
    bias = tensors[f'{prefix}bias'].numpy().astype(np.float32)
    shift = np.einsum('dchw,c->d', weight.astype(np.float64), (MEAN - mean) / std)
    new = {'weight': weight * (STD / std)[:, None, None], 'bias': (bias + shift).astype(np.float32)}
    for name, value in new.items():
        tensors[prefix + name] = Tensor(value.shape, lambda value=value: value)
    return [f'pixels: its mean {mean.tolist()} and deviation {std.tolist()} go into patch_embed']
