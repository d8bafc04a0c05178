r"""YOLOS from DINOv3, ViT-S (arXiv 2508.10104).

    python train.py --config=configs/yolos_dinov3_s.py --workdir=DIR \
        --config.data=COCO --config.init_from=facebook/dinov3-vits16-pretrain-lvd1689m

To get the weights, accept the DINOv3 License, which also covers what is made from them.
Not trained on COCO by us: no AP is known.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 384
    c.model.depth = 12
    c.model.heads = 6
    c.model.pos_grid = None  # rope in its place
    c.model.registers = 4
    c.model.rope = True
    c.model.eps = 1e-5

    c.augment.sizes = tuple(range(480, 801, 16))
    c.augment.max_size = 1333

    c.epochs = 36  # a quarter of the published 150: such features need fewer
    c.learning_rate = 2e-5  # this and the next as for plain-ViT detectors from DINOv3 (MixMatchDet)
    c.fresh_learning_rate = 2e-4
    return c.lock()
