r"""DeiT-S (dWr) on ImageNet-1k, YOLOS-S (dWr)'s backbone: narrower and deeper (arXiv 2106.00666, table 4).

python pretrain.py --config=configs/deit_s_dwr.py --workdir=DIR --config.data=IMAGENET
"""

from ml_collections import ConfigDict
from yolos_jax.configs import deit_ti


def get_config() -> ConfigDict:
    c = deit_ti.get_config()
    c.model.width = 330
    c.model.depth = 14
    c.model.heads = 6
    c.model.size = 240  # as the original's
    return c
