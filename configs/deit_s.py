r"""DeiT-S on ImageNet-1k (arXiv 2012.12877, table 9), the backbone of YOLOS-S, after 200 or 300 epochs.

    python pretrain.py --config=configs/deit_s.py --workdir=DIR --config.data=IMAGENET --config.epochs=200

Published: 79.8 % top-1 after 300 epochs.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import deit_ti


def get_config() -> ConfigDict:
    c = deit_ti.get_config()
    c.model.width = 384
    c.model.heads = 6
    return c
