"""Weights of detectors and of pre-trained ViTs: any file in, four forms out.

Read a detector (`read`); or open a file (`open`), look at what it holds (`Source`), and take a detector
(`Pretrained`) or a backbone.
"""

from yolos_jax.weights import checkpoint
from yolos_jax.weights.pretrained import Pretrained
from yolos_jax.weights.source import HINTS, Source, init_from_backbone, load, open_source, read

open = open_source  # not in the list below, as `import *` would hide Python's

__all__ = [
    'HINTS', 'Pretrained', 'Source', 'checkpoint', 'init_from_backbone', 'load', 'open_source', 'read',
]  # fmt: skip
