"""A small YOLOS from scratch, on the shapes of `yolos shapes runs/shapes`.

    make quickstart, or
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Two CPU cores, 4 minutes: AP50 0.77 to 0.85.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()
    c.data = 'runs/shapes'

    c.model.width = 128
    c.model.depth = 4
    c.model.heads = 4
    c.model.pos_grid = (7, 8)  # 112 x 128 pixels, the middle of the sizes below
    c.model.num_det_tokens = 20  # an image has at most 5 objects
    c.model.dtype = 'float32'  # bfloat16 is no faster on a CPU

    c.augment.sizes = (96, 112)
    c.augment.max_size = 176
    c.augment.crop_from = (96, 112, 128)
    c.augment.crop_min = 80
    c.augment.crop_max = 128
    c.eval_size = 112
    c.eval_max_size = 176
    c.num_lengths = 2  # each length costs ten seconds of compilation, and no sequence is long
    c.max_targets = 20

    c.batch_size = 8
    c.epochs = 20
    c.learning_rate = 1.5e-4  # six times the published rate: nothing pre-trained to keep
    c.log_every = 50
    c.save_every = 1000
    c.eval_every = 5
    return c.lock()
