r"""YOLOS from DINOv3, ViT-B (arXiv 2508.10104).

    python train.py --config=configs/yolos_dinov3_b.py --workdir=DIR \
        --config.data=COCO --config.init_from=facebook/dinov3-vitb16-pretrain-lvd1689m

To get the weights, accept the DINOv3 License, which also covers what is made from them.
Not trained on COCO by us: no AP is known.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import yolos_dinov3_s


def get_config() -> ConfigDict:
    c = yolos_dinov3_s.get_config()
    c.model.width = 768
    c.model.heads = 12
    return c
