r"""DeiT-Ti on ImageNet-1k (arXiv 2012.12877, table 9), the backbone of YOLOS-Ti.

    python pretrain.py --config=configs/deit_ti.py --workdir=DIR --config.data=IMAGENET

Published: 72.2 % top-1 after 300 epochs; distilled from a RegNetY-16GF 74.5 %.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.data = ''  # a folder, or its gs:// or s3:// URL: train/CLASS/IMAGE.jpg, or tensorflow-datasets'
    c.train_split = 'train'
    c.val_split = 'val'  # or 'validation'
    c.bad_images = config_dict.placeholder(int)  # how many may be unreadable; None: max(3, 0.1 %)
    c.init_from = ''  # a classifier to start from, a workdir or .pth; its positions are resampled
    c.teacher = ''  # to distil from: a workdir or .pth of a classifier, or logits [images, classes] (.npy)

    c.model = ConfigDict()
    c.model.width = 192
    c.model.depth = 12
    c.model.heads = 3
    c.model.size = 224  # of the square images, in pixels
    c.model.dtype = 'bfloat16'  # twice float32's speed on accelerators; parameters stay float32
    c.model.remat = 0  # how many first blocks are recomputed in the backward pass; 4: a third less memory

    c.augment = ConfigDict()  # in addition to rand-m9-mstd0.5-inc1 and a random crop
    c.augment.repeats = 3  # copies per batch, mixed differently; an epoch sees a third of the images
    c.augment.mixup = 0.8  # Beta distribution's alpha; half the groups get mixup, half CutMix; 0: never
    c.augment.cutmix = 1.0
    c.augment.mix_group = 128  # images mixed alike; 0: the batch; a GPU of the reference: 256, for B 64
    c.augment.erasing = 0.25  # share of images of which a rectangle is erased
    c.smoothing = 0.1  # of labels
    c.drop_path = 0.1  # stochastic depth rate of the last block; grows linearly from 0

    c.batch_size = 1024  # images per step, the global batch size
    c.accumulate_steps = 1  # parts of a batch computed one after the other, where memory is short
    c.shard_params = False  # True: shard parameters and optimiser state over the devices
    c.epochs = 300
    c.warmup_epochs = 5  # of the epochs, from a rate of 1e-6
    c.learning_rate = 1e-3  # the reference's: 5e-4 for each 512 images of a batch
    c.final_learning_rate = config_dict.placeholder(float)  # where the cosine ends; None: 1e-5
    c.weight_decay = 0.05
    c.ema = 0.0  # decay of a moving average of the weights, used in evaluation; 0.99996 in DeiT's code
    c.xavier_init = False  # True: Xavier's kernels and sine positions, as a narrow ViT needs
    c.seed = 0  # the reference's

    c.log_every = 100  # steps
    c.save_every = 2000  # steps, and before each evaluation; 0: only then
    c.spike_factor = 0.0  # report a loss above this many times the recent median; 0: never
    c.eval_every = 1  # epochs
    c.patience = 0  # epochs without a better top-1 after which a run ends; 0: never
    return c.lock()
