r"""YOLOS-S (dWr) on COCO (arXiv 2106.00666, table 6).

    python train.py --config=configs/yolos_s_dwr.py --workdir=DIR \
        --config.data=COCO --config.init_from=DEIT_S_DWR

Published: 37.6 AP at 800 pixels after 150 epochs. After the first epoch:
train loss 3.329, AP 0.0267.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import yolos_s


def get_config() -> ConfigDict:
    c = yolos_s.get_config()
    c.model.width = 330
    c.model.depth = 14
    return c
