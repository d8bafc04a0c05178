r"""YOLOS from DINOv3, ViT-B (arXiv 2508.10104).

    python train.py --config=configs/yolos_dinov3_b.py --workdir=DIR \
        --config.data=COCO --config.init_from=facebook/dinov3-vitb16-pretrain-lvd1689m

The weights are given out on acceptance of the DINOv3 License, which binds what is made from them.
Not trained on COCO by us: no AP is known.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 768
    c.model.depth = 12
    c.model.heads = 12
    c.model.pos_grid = None  # rope in its place
    c.model.registers = 4
    c.model.rope = True
    c.model.eps = 1e-5

    c.augment.sizes = tuple(range(480, 801, 16))
    c.augment.max_size = 1333

    c.epochs = 36  # a quarter of the published 150: such features need fewer
    c.learning_rate = 2e-5  # of detectors from DINOv3 with plain ViTs (MixMatchDet), as the next
    c.fresh_learning_rate = 2e-4
    return c.lock()
