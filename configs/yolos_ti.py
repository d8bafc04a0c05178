r"""YOLOS-Ti on COCO (arXiv 2106.00666, table 6).

    python train.py --config=configs/yolos_ti.py --workdir=DIR \
        --config.data=COCO --config.init_from=DEIT_TI

Published: 28.7 AP at 512 pixels after 300 epochs, about 8 days on 8 RTX 2080 Ti (4 for 150, issue 5 of
hustvl/YOLOS). After the first epoch: train loss 3.762, AP 0.0137.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 192
    c.model.depth = 12
    c.model.heads = 3
    c.model.pos_grid = (50, 83)  # 800 x 1333

    c.augment.sizes = tuple(range(256, 609, 16))
    c.augment.max_size = 608 * 1333 // 800
    c.eval_size = 512
    c.eval_max_size = 512 * 1333 // 800

    c.batch_size = 16
    c.images_per_group = 2
    c.epochs = 300
    c.learning_rate = 5e-5
    return c.lock()
