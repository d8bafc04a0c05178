"""Pre-train a ViT on images with one class each, as DeiT.

    yolos pretrain --config=deit_ti --workdir=DIR --config.data=IMAGENET

The data are a folder train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg, or tensorflow-datasets' imagenet2012.
The workdir receives metrics.jsonl, TensorBoard files, curves.png, checkpoints/, and deit.pth, the weights
of the best evaluation, which a detector starts from. The same command in the same workdir resumes where
the last one stopped.
"""

from collections.abc import Callable
from pathlib import Path

from yolos_jax import bucket
from yolos_jax.configs import deit_ti
from yolos_jax.run import cli, cluster, pretraining
from yolos_jax.run.train import Step
from yolos_jax.tools import train
from yolos_jax.weights import deit

KEYS = deit_ti.get_config
DETECTORS = {  # configs by width, depth and heads
    (128, 4, 4): 'quickstart',
    (192, 12, 3): 'yolos_ti',
    (384, 12, 6): 'yolos_s',
    (330, 14, 6): 'yolos_s_dwr',
    (768, 12, 12): 'yolos_b',
}


def main(on_step: Callable[[Step], bool | None] | None = None) -> None:
    """Parse the flags and pre-train; on_step: as for `yolos_jax.train`."""
    train.main(on_step, pretraining.pretrain)
    model = train.CONFIG.value.model
    config = DETECTORS.get((model.width, model.depth, model.heads), 'CONFIG')
    place = train.WORKDIR.value
    if cluster.is_first() and (bucket.is_url(place) or Path(place, deit.FILE).exists()):
        print(
            f'start a detector from it with: yolos train --config={config} --workdir=DIR '
            f'--config.data=COCO --config.init_from={place}'
        )


if __name__ == '__main__':
    cli.run_with_flags(main, KEYS)
