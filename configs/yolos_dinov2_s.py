r"""YOLOS from DINOv2 with registers, ViT-S (arXiv 2304.07193, 2309.16588).

    python train.py --config=configs/yolos_dinov2_s.py --workdir=DIR \
        --config.data=COCO --config.init_from=dinov2_vits14_reg4_pretrain.pth

The patch projection, made for 14 pixels, is resampled to 16 (FlexiViT). Not trained on COCO by us: no AP is
known. For ViT-B: width 768, heads 12, and dinov2_vitb14_reg4_pretrain.pth.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.model.width = 384
    c.model.depth = 12
    c.model.heads = 6
    c.model.pos_grid = (50, 84)  # 800 x 1344: the file's 37 x 37 for 14 pixels, resampled
    c.model.registers = 4

    c.augment.sizes = tuple(range(480, 801, 16))
    c.augment.max_size = 1333

    c.epochs = 36  # a quarter of the published 150: such features need fewer
    c.learning_rate = 2e-5  # this and the next as for plain-ViT detectors from DINOv2 (MixMatchDet)
    c.fresh_learning_rate = 2e-4
    return c.lock()
