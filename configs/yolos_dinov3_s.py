r"""YOLOS from DINOv3, ViT-S (arXiv 2508.10104).

    python train.py --config=configs/yolos_dinov3_s.py --workdir=DIR \
        --config.data=COCO --config.init_from=facebook/dinov3-vits16-pretrain-lvd1689m

To get the weights, accept the DINOv3 License, which also covers what is made from them.
Not trained on COCO by us: no AP is known.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import yolos_dinov2_s


def get_config() -> ConfigDict:
    c = yolos_dinov2_s.get_config()
    c.model.pos_grid = None  # rope in its place
    c.model.rope = True
    c.model.eps = 1e-5
    return c
