r"""A detector for your own classes, from one that is already trained.

    python train.py --config=configs/finetune.py --workdir=DIR \
        --config.data=YOUR_FOLDER --config.init_from=WEIGHTS

YOUR_FOLDER is what docs/data.md lists: COCO's layout (annotations/instances_train2017.json and so on), or
what Roboflow, CVAT, FiftyOne, Label Studio and YOLO's tools write. The classes come from it. Without a
validation split in it, --config.val_fraction=0.1 takes a tenth of the images. WEIGHTS is anything
`yolos_jax.load` takes; the model comes from the weights.

An image takes at most as much memory and time as with the weights' own config; the AP depends on your data.
"""

from ml_collections import ConfigDict
from yolos_jax.configs import common


def get_config() -> ConfigDict:
    c = common.get_config()  # model.width stays 0: the model is that of init_from
    c.reset_classes = True  # rows of classes that the weights know by name are kept

    c.augment.sizes = ()  # (): those of the published S and B, scaled: 480 to 800 for 800
    c.eval_size = 0  # taken from the weights, like the other sides
    c.eval_max_size = 0

    c.epochs = 50  # a third of the published 150: the backbone has seen objects before
    c.eval_every = 5
    c.save_every = 500
    return c.lock()
