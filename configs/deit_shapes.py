"""A small ViT pre-trained on the shapes that `python -m yolos_jax.tools.make_classes` draws.

    python pretrain.py --config=configs/deit_shapes.py --workdir=runs/pretrained --config.data=runs/classes

It fits configs/quickstart.py, whose detector learns faster from this backbone than from scratch.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import deit_ti


def get_config() -> ConfigDict:
    c = deit_ti.get_config()
    c.data = 'runs/classes'
    c.model.width = 128
    c.model.depth = 4
    c.model.heads = 4
    c.model.size = 64
    c.model.dtype = 'float32'  # bfloat16 is no faster on a CPU
    c.augment.repeats = 1  # with few images per epoch, distinct ones in a batch teach more than copies
    c.augment.mixup = 0.0  # 20 classes and few epochs need less of this
    c.augment.cutmix = 0.0
    c.augment.erasing = 0.0
    c.augment.mix_group = 0
    c.drop_path = 0.0
    c.xavier_init = True  # a width of 128 needs larger kernels than DeiT's, and a detector strong positions
    c.batch_size = 64
    c.warmup_epochs = 2
    c.epochs = 50  # 87.5 % top-1 after 30, 94 after 40, 95 after 50
    c.eval_every = 10
    c.save_every = 0
    return c
