r"""DeiT-B on ImageNet-1k (arXiv 2012.12877, table 9).

    python pretrain.py --config=configs/deit_b.py --workdir=DIR --config.data=IMAGENET \
        --config.teacher=TEACHER

Published: 81.8 % top-1. YOLOS-B starts from the distilled one at 384 pixels, 85.2 %: --config.epochs=1000,
then 30 epochs in another workdir, with the same teacher and --config.init_from=DIR
--config.model.size=384 --config.epochs=30 --config.batch_size=512 --config.learning_rate=5e-6
--config.final_learning_rate=5e-6 --config.weight_decay=1e-8.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import deit_ti


def get_config() -> ConfigDict:
    c = deit_ti.get_config()
    c.model.width = 768
    c.model.heads = 12
    return c
