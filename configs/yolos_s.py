r"""YOLOS-S on COCO (arXiv 2106.00666, table 6).

    python train.py --config=configs/yolos_s.py --workdir=DIR \
        --config.data=COCO --config.init_from=DEIT_S

Published: 36.1 AP at 800 pixels after 150 epochs, about 10 days on 8 RTX 2080 Ti. After the first epoch:
train loss 3.334, AP 0.0255 (from 300 epochs of DeiT; 3.393, 0.0238 from 200).
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 384
    c.model.depth = 12
    c.model.heads = 6
    c.model.pos_grid = (32, 54)  # 512 x 864
    c.model.mid_pos_grid = (32, 54)

    c.augment.sizes = tuple(range(480, 801, 16))
    c.augment.max_size = 1333
    return c.lock()
