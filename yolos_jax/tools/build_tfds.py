"""A COCO folder as a data set of tensorflow-datasets, made without TensorFlow.

    python -m yolos_jax.tools.build_tfds COCO_FOLDER DIR

writes DIR/coco/2017/1.1.0, in the layout of tensorflow-datasets' own coco/2017 with array_record files:
few large files, which network file systems prefer to 118,000 small ones. It is a data folder for training
and evaluation. The splits train2017 and val2017 become train and validation, others keep their names.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from yolos_jax import files
from yolos_jax.data import annotations, array_records, records, sources
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.tools.tfds_builder import Coco


def build(root: str | Path, out: str | Path) -> Path:
    """Prepare the data set; returns its folder.

    Raises:
        InputError: the COCO folder is not whole, or its splits have different categories.
    """
    root = Path(root)
    splits = {}
    for split in sources.splits(root):
        records.read(root, split)  # raises where something is wrong
        splits[split] = root / split, annotations.read(root / 'annotations' / f'instances_{split}.json')
    categories = [a.categories for _, a in splits.values()]
    if any(other != categories[0] for other in categories):
        raise InputError(f'{root}: the categories of {" and ".join(splits)} are not the same')
    builder = Coco(splits, data_dir=str(out))
    with tempfile.TemporaryDirectory() as empty:
        builder.download_and_prepare(download_dir=empty)
    folder = Path(builder.data_dir)
    for split in splits:
        (folder / 'annotations').mkdir(exist_ok=True)
        shutil.copy(root / 'annotations' / f'instances_{split}.json', folder / 'annotations')
    files.write_json(folder / array_records.CATEGORIES, categories[0])
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('coco', help='a COCO folder')
    parser.add_argument('out', help='where to put coco/2017/1.1.0')
    args = parser.parse_args(arguments)
    print(build(args.coco, args.out))


if __name__ == '__main__':
    cli.run(main)
