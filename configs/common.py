"""Default values of all detector configs; each config changes some of them."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Defaults for training on COCO; a config that builds on them sets model, image sizes and schedule."""
    c = ConfigDict()
    c.data = ''  # a folder, or its gs:// or s3:// URL, as COCO or any tool of docs/data.md writes it
    c.train_split = 'train2017'  # or 'train', whichever exists
    c.val_split = 'val2017'  # or 'val', 'valid', 'validation'
    c.train_json = ''  # a COCO file to use in place of a split of `data`
    c.train_images = ''  # the folder of train_json's images; '': beside it
    c.val_json = ''  # as train_json, of the validation split
    c.val_images = ''  # as train_images
    c.val_fraction = 0.0  # 0.1: validate on a tenth of the training images, drawn by seed, not on a split
    c.data_cache = ''  # a folder on a local disk for decoded images: 3 times the images per core
    c.bad_images = config_dict.placeholder(int)  # how many may be unreadable; None: max(3, 0.1 %)

    c.model = ConfigDict()
    c.model.width = 0  # 0: the model is that of init_from
    c.model.depth = 0  # blocks
    c.model.heads = 0  # of attention
    c.model.pos_grid = (0, 0)  # rows, columns of the position table: the reference's init_pe_size // 16
    c.model.mid_pos_grid = config_dict.placeholder(tuple)  # of the tables between blocks; None: no tables
    c.model.num_det_tokens = 100  # the most objects that can be detected in an image
    c.model.registers = 0  # register tokens of the backbone: 4 for DINOv2 (with registers) and DINOv3
    c.model.rope = False  # True: DINOv3's positions, in place of tables
    c.model.eps = 0.0  # of LayerNorm; 0: 1e-6, as the published models have it
    c.model.dtype = 'bfloat16'  # twice float32's speed on accelerators; parameters stay float32
    c.model.remat = 0  # how many first blocks are recomputed in the backward pass; 4: a third less memory

    c.init_from = ''  # weights to start from, a ViT's or a detector's; '' trains from scratch
    c.freeze = ''  # 'backbone', or as text how many of its first blocks are frozen: '6'
    c.reset_classes = False  # True: use the data's classes; those that init_from knows by name are kept

    c.augment = ConfigDict()
    c.augment.sizes = (0,)  # shorter sides to train at, in pixels
    c.augment.max_size = 0  # bound of the longer side
    c.augment.crop_from = (400, 500, 600)  # half of the images: sides to resize to before a crop (DETR's)
    c.augment.crop_min = 384  # the least side of a crop, in pixels
    c.augment.crop_max = 600  # the greatest
    c.eval_size = 800  # shorter side of images in evaluations, in pixels
    c.eval_max_size = 1333  # bound of the longer
    c.num_lengths = 8  # sequence lengths, each a compiled program; 8 leave YOLOS-S 9 % padding, 4 16 %
    c.max_targets = 100  # as many as [DET] tokens; COCO's fullest train image has 93

    c.batch_size = 8  # images per step, the global batch size
    c.accumulate_steps = 1  # parts of a batch computed one after the other, where memory is short
    c.shard_params = False  # True: shard parameters and optimiser state over the devices
    c.images_per_group = 1  # images per mean of the class loss, as many as a GPU of the reference held
    c.epochs = 150  # passes over the training images
    c.learning_rate = 2.5e-5  # of AdamW, with a cosine to 1e-7
    c.fresh_learning_rate = 0.0  # for heads and [DET] tokens; 0: same as the rest, as in the reference
    c.weight_decay = 1e-4  # of kernels, mid_pos_embed and all of the heads
    c.clip_norm = 0.1  # gradients are clipped to this norm
    c.ema = 0.0  # decay of a moving average of the weights, used in evaluation; try 0.9998
    c.seed = 42  # the reference's

    c.log_every = 100  # steps; an epoch with fewer has a line at its end
    c.save_every = 2000  # steps, and before each evaluation; 0: only then
    c.spike_factor = 10.0  # report a loss above this many times the recent median; 0: never
    c.eval_every = 1  # epochs
    c.patience = 0  # epochs without a better AP after which a run ends; 0: never
    return c
