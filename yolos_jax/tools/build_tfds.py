"""A COCO folder as a data set of tensorflow-datasets, made without TensorFlow.

    python -m yolos_jax.tools.build_tfds COCO_FOLDER DIR

writes DIR/coco/2017/1.1.0, in the layout of tensorflow-datasets' own coco/2017 with array_record files:
few large files, which network file systems prefer to 118,000 small ones. It is a data folder for training
and evaluation. The splits train2017 and val2017 become train and validation, others keep their names.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from yolos_jax import files
from yolos_jax.data import annotations, array_records, records, sources
from yolos_jax.data.annotations import Annotations
from yolos_jax.errors import InputError
from yolos_jax.run import cli


class Coco(tfds.core.GeneratorBasedBuilder):
    """A COCO folder in the layout of coco/2017."""

    VERSION = tfds.core.Version('1.1.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='2017', version='1.1.0')]

    def __init__(self, splits: dict, **options: Any) -> None:
        """splits: {split: (image folder, `annotations.Annotations`)}."""
        self._splits = splits
        super().__init__(config='2017', file_format='array_record', **options)

    def _info(self) -> tfds.core.DatasetInfo:
        names = [name for _, name in next(iter(self._splits.values()))[1].categories]
        objects = {
            'area': np.int64,
            'bbox': tfds.features.BBoxFeature(),
            'id': np.int64,
            'is_crowd': np.bool_,
            'label': tfds.features.ClassLabel(names=names),
        }
        features = {
            'image': tfds.features.Image(encoding_format='jpeg'),
            'image/filename': tfds.features.Text(),
            'image/id': np.int64,
            'objects': tfds.features.Sequence(objects),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> dict:  # noqa: ARG002  the interface of tfds
        return {
            array_records.SPLITS.get(name, name): self._examples(*split)
            for name, split in self._splits.items()
        }

    def _generate_examples(self) -> Iterator:
        """Not used: each split has its own."""
        return iter(())

    def _examples(self, folder: Path, a: Annotations) -> Iterator[tuple[int, dict]]:
        labels = {number: k for k, (number, _) in enumerate(a.categories)}
        order = np.argsort(a.owners, kind='stable')
        first = np.searchsorted(a.owners[order], a.ids)
        last = np.searchsorted(a.owners[order], a.ids, side='right')
        for i, image_id in enumerate(a.ids.tolist()):
            size = a.heights[i], a.widths[i]
            yield (
                image_id,
                {
                    'image': folder / a.files[i],
                    'image/filename': str(a.files[i]),
                    'image/id': image_id,
                    'objects': [_object(a, k, labels, *size) for k in order[first[i] : last[i]]],
                },
            )


def _object(a: Annotations, k: int, labels: dict[int, int], height: int, width: int) -> dict:
    """Annotation k as tensorflow-datasets stores it; labels: {category id: label}."""
    x, y, w, h = a.boxes[k].astype(np.float64)
    box = np.clip([y / height, x / width, (y + h) / height, (x + w) / width], 0, 1)
    return {
        'area': int(w * h),
        'bbox': tfds.features.BBox(*box),
        'id': int(a.annotation_ids[k]),
        'is_crowd': bool(a.crowd[k]),
        'label': labels[int(a.labels[k])],
    }


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
