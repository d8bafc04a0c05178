"""COCO as tensorflow-datasets prepares it (coco/2017), read from array_record files without TensorFlow.

A data set is a folder DIR/coco/2017/1.1.0 with dataset_info.json and array_record files, made by
`python -m yolos_jax.tools.build_tfds` or by tensorflow-datasets itself. Images are stored as the bytes of
their files, boxes as float32 [ymin, xmin, ymax, xmax] over the image's size, labels as indices into the
sorted list of categories. COCO's boxes have two decimals, and rounded to two they come back exactly.

Evaluation is always by the official file: annotations/instances_val2017.json in the same folder.
"""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax.data import class_names, pixels
from yolos_jax.data.annotations import Annotations
from yolos_jax.errors import InputError

SPLITS = {'train2017': 'train', 'val2017': 'validation'}  # COCO's name: tensorflow-datasets'
CATEGORIES = 'categories.json'  # (id, name) pairs in the order of the labels; without it, COCO's


def is_dataset(root: str | Path) -> bool:
    """Whether a folder is a data set of tensorflow-datasets."""
    return info_file(root).is_file()


def info_file(root: str | Path) -> Path:
    """The file that is there in every data set, and changes with it."""
    return Path(root) / 'dataset_info.json'


def splits(root: str | Path) -> list[str]:
    """The splits of a data set, under COCO's names."""
    coco = {name: ours for ours, name in SPLITS.items()}
    return [
        coco.get(split['name'], split['name'])
        for split in json.loads(info_file(root).read_text())['splits']
    ]


@functools.cache
def _open(root: Path, split: str) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds  # here, since it takes half a second

    builder = tfds.builder_from_directory(root)
    name = SPLITS.get(split, split)
    if name not in builder.info.splits:
        raise InputError(f'{root}: has no split {name}, but {", ".join(builder.info.splits)}')
    try:
        examples = builder.as_data_source(name, decoders={'image': tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise InputError(
            f'{root}: is not in array_record format; make it anew with yolos_jax.tools.build_tfds '
            f'({str(error).splitlines()[0]})'
        ) from None
    return builder, examples


class Images:
    """The images of a split, by their row in the data set."""

    def __init__(self, root: Path, split: str) -> None:
        self._root, self._split = root, split

    def name(self, file: str) -> str:
        """How to name an image to a reader."""
        return f'{self._root}: {self._split}/{file}'

    def missing(self, names: np.ndarray) -> list[str]:  # noqa: ARG002  the interface of sources.Folder
        """None: the images are in the data set."""
        return []

    def read(self, file: str, row: int) -> bytes:  # noqa: ARG002  as above
        """The encoded bytes of an image."""
        return _open(self._root, self._split)[1][int(row)]['image']


def read(root: Path, split: str) -> Annotations:
    """The annotations of a split, in the order of the data set.

    Every example is read once, for the size of its image.
    """
    builder, examples = _open(root, split)
    names = builder.info.features['objects']['label'].names
    categories = _categories(root, names)
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda i: _row(root, examples[i]), range(len(examples))))
    ids, files, sizes, annotation_ids, labels, crowd, areas, boxes = zip(*rows, strict=True)
    heights, widths = np.array(sizes, np.int64).T
    return Annotations(
        path=Path(root),
        ids=np.array(ids, np.int64),
        files=np.array(files, str),
        heights=heights,
        widths=widths,
        annotation_ids=np.concatenate(annotation_ids),
        owners=np.repeat(np.array(ids, np.int64), [len(x) for x in labels]),
        labels=np.array([number for number, _ in categories], np.int64)[np.concatenate(labels)],
        crowd=np.concatenate(crowd),
        areas=np.concatenate(areas),
        boxes=np.concatenate(boxes),
        categories=categories,
    )


def _row(root: Path, example: dict) -> tuple:
    file, objects = example['image/filename'].decode(), example['objects']
    height, width = pixels.size(example['image'], f'{root}: {file}')
    y0, x0, y1, x1 = np.asarray(objects['bbox'], np.float64).reshape(-1, 4).T
    boxes = np.stack([x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height], axis=1)
    return (
        int(example['image/id']),
        file,
        (height, width),
        np.asarray(objects['id'], np.int64),
        np.asarray(objects['label'], np.int64),
        np.asarray(objects['is_crowd'], bool),
        np.asarray(objects['area'], np.float64),
        boxes.round(2),
    )


def _categories(root: Path, names: list[str]) -> list:
    path = Path(root) / CATEGORIES
    if path.is_file():
        return [(number, name) for number, name in json.loads(path.read_text())]
    if list(names) != list(class_names.COCO.values()):
        raise InputError(f'{root}: the classes are not those of COCO, and there is no {CATEGORIES}')
    return list(class_names.COCO.items())
