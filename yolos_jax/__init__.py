"""YOLOS in JAX: object detection with a plain ViT and [DET] tokens (arXiv 2106.00666).

Names are imported when they are first used, so that reading data needs no JAX.
"""

from typing import TYPE_CHECKING

from yolos_jax import lazy as _lazy
from yolos_jax import numba_cache as _numba_cache

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from yolos_jax import analysis, data, losses, matcher, model, optim, steps, tools, weights
    from yolos_jax.detections import Detections
    from yolos_jax.errors import InputError
    from yolos_jax.inference import Detector
    from yolos_jax.model import YOLOS_B, YOLOS_S, YOLOS_S_DWR, YOLOS_TI, Yolos
    from yolos_jax.patches import patchify
    from yolos_jax.run.evaluate import evaluate
    from yolos_jax.run.pretraining import pretrain
    from yolos_jax.run.train import train
    from yolos_jax.weights import init_from_backbone, load

__version__ = '0.3.0'

__all__ = [
    'YOLOS_B', 'YOLOS_S', 'YOLOS_S_DWR', 'YOLOS_TI', 'Detections', 'Detector', 'InputError', 'Yolos',
    'analysis', 'data', 'evaluate', 'init_from_backbone', 'load', 'losses', 'matcher', 'model', 'optim',
    'patchify', 'pretrain', 'steps', 'tools', 'train', 'weights',
]  # fmt: skip

_numba_cache.set_up()
__getattr__ = _lazy.modules_of(
    __name__,
    {
        'detections': ['Detections'],
        'errors': ['InputError'],
        'inference': ['Detector'],
        'model': ['YOLOS_B', 'YOLOS_S', 'YOLOS_S_DWR', 'YOLOS_TI', 'Yolos'],
        'patches': ['patchify'],
        'run.evaluate': ['evaluate'],
        'run.pretraining': ['pretrain'],
        'run.train': ['train'],
        'weights': ['init_from_backbone', 'load'],
    },
)


def __dir__() -> list[str]:  # noqa: N807  PEP 562
    return sorted({*globals(), *__all__})
