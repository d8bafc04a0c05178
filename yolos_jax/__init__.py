"""YOLOS in JAX: object detection with a plain ViT and [DET] tokens (arXiv 2106.00666)."""

from yolos_jax import data, losses, matcher, optim, steps
from yolos_jax.backbones import init_from_backbone
from yolos_jax.errors import InputError
from yolos_jax.inference import Detections, Detector
from yolos_jax.model import YOLOS_B, YOLOS_S, YOLOS_S_DWR, YOLOS_TI, Yolos, patchify
from yolos_jax.weights import load

__all__ = [
    'YOLOS_B', 'YOLOS_S', 'YOLOS_S_DWR', 'YOLOS_TI', 'Detections', 'Detector', 'InputError', 'Yolos',
    'data', 'init_from_backbone', 'load', 'losses', 'matcher', 'optim', 'patchify', 'steps',
]  # fmt: skip
