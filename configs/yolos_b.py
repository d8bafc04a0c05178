r"""YOLOS-B on COCO (arXiv 2106.00666, table 6).

    python train.py --config=configs/yolos_b.py --workdir=DIR \
        --config.data=COCO --config.init_from=DEIT_B_DISTILLED_384

Published: 42.0 AP at 800 pixels after 150 epochs, about 20 days on 8 RTX 2080 Ti. After the first epoch:
train loss 2.819, AP 0.0638.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 768
    c.model.depth = 12
    c.model.heads = 12
    c.model.pos_grid = (50, 84)  # 800 x 1344
    c.model.mid_pos_grid = (50, 84)

    c.augment.sizes = tuple(range(480, 801, 16))
    c.augment.max_size = 1333
    return c.lock()
