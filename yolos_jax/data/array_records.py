"""COCO as tensorflow-datasets prepares it (coco/2017), read from array_record files without TensorFlow.

A data set is a folder DIR/coco/2017/1.1.0 with dataset_info.json and array_record files, made by
`yolos tfds` or by tensorflow-datasets itself. Images are stored as the bytes of their files, boxes as
float32 [ymin, xmin, ymax, xmax] over the image's size, labels as indices into the sorted list of
categories. COCO's boxes have two decimals, so rounding to two decimals restores them exactly.

Examples in a bucket are read by byte ranges (`record_ranges`); the files that describe the data set are
copied. Evaluation always uses the official file, annotations/instances_val2017.json in the same folder.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from google.protobuf.message import Error as ProtobufError

from yolos_jax.data import coco_classes, pixels
from yolos_jax.data.annotations import Annotations
from yolos_jax.data.folders import BucketFolder, Folder
from yolos_jax.errors import InputError

SPLITS = {'train2017': 'train', 'val2017': 'validation'}  # COCO's name: tensorflow-datasets'
CATEGORIES = 'categories.json'  # (id, name) pairs in the order of the labels; without it, COCO's
FEATURES = 'tensorflow_datasets.core.features.'  # where the classes in features.json come from
# its keys, of all versions, for the name of a class, and for a string that is JSON
CLASS_KEYS, JSON_KEYS = ('pythonClassName', 'python_class_name', 'type'), ('json', 'content')
INFO = 'dataset_info.json'  # present in every data set
DAMAGED = ValueError, TypeError, LookupError, RuntimeError, OSError, ProtobufError
READERS = 128  # threads that read all examples: a bucket answers each after a while


def splits(folder: Folder | BucketFolder) -> list[str]:
    """The splits of a data set, under COCO's names."""
    with _naming(f'{folder}/{INFO}'):
        stored = json.loads(folder.local(INFO).read_text())['splits']
        return [coco_name(split['name']) for split in stored]


def _check_classes(features: str | bytes, what: str) -> None:
    """Raises InputError if a features.json names a class of another module, which tfds would import.

    features: its text; tfds also reads JSON in its strings. what: the file, for the message.
    """

    def check(content: dict) -> dict:
        for key, value in content.items():
            if not isinstance(value, str):  # 'type' may also be the name of a feature
                continue
            if key in CLASS_KEYS and not value.startswith(FEATURES):
                raise InputError(f'{what}: {value!r} is no feature of tensorflow-datasets', 'data')
            if key in JSON_KEYS:
                _check_classes(value, what)
        return content

    json.loads(features, object_hook=check)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raises InputError in place of what readers raise for a damaged file."""
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        text = ' '.join(str(error).split())[:200]
        raise InputError(f'{what}: damaged or incomplete ({text}); copy it again', 'data') from None


def coco_name(split: str) -> str:
    """COCO's name of a split: `validation` of a data set is read as val2017."""
    return {name: ours for ours, name in SPLITS.items()}.get(split, split)


class Examples(NamedTuple):
    """The examples of a split."""

    count: int
    start_read: Callable[[int], Callable[[], dict]]  # requests a row; returns a function that waits for it


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set: its annotations, and its images by their row."""

    folder: Folder | BucketFolder
    split: str
    upright: ClassVar[bool] = False  # as `folders.Folder`

    def name(self, file: str) -> str:
        """The name of an image in messages."""
        return f'{self.folder}: {self.split}/{file}'

    def missing(self, names: np.ndarray) -> list[str]:  # noqa: ARG002  the interface of folders.Folder
        """An empty list: the data set has all its images."""
        return []

    def prefix(self, root: object) -> None:  # noqa: ARG002  as `folders.Folder`
        """None: the images are not files."""
        return

    def start_read(self, file: str, row: int) -> Callable[[], bytes]:  # noqa: ARG002  as above
        """A function that returns the encoded bytes of an image; a bucket is asked for them at once."""
        example = self.examples.start_read(int(row))
        return lambda: example()['image']

    def version(self) -> str:
        """A text that changes with the examples: corrected labels may leave `INFO` and all sizes alone."""
        names = [name for name in self.folder.glob('*') if '.array_record' in name or name == CATEGORIES]
        return json.dumps(self.folder.versions(names), sort_keys=True)

    def sizes(self) -> list[int]:
        """The bytes of all examples, and the number in each file: the same in every copy."""
        split = self._builder.info.splits[self._stored]
        return [split.num_bytes, *split.shard_lengths]

    def read(self) -> Annotations:
        """The annotations, in the order of the data set.

        Every example is read once, for the size of its image.

        Raises:
            InputError: an example cannot be read, or the classes are not known.
        """
        features = self._builder.info.features
        objects = getattr(dict(features.items()).get('objects'), 'feature', {})
        lacking = {'image', 'image/filename', 'image/id'} - {*features}
        if lacking := lacking | {'area', 'bbox', 'id', 'is_crowd', 'label'} - {*objects}:
            of_coco = f'its examples have no {", ".join(sorted(lacking))}, as those of coco do'
            raise InputError(f'{self.folder}: {of_coco}', 'data')
        categories = _categories(self.folder, objects['label'].names)
        examples = self.examples
        with ThreadPoolExecutor(READERS) as pool:
            read_row = lambda row: _row(self.folder, examples.start_read(row)())
            rows = list(pool.map(read_row, range(examples.count)))
        return _annotations(self.folder, rows, categories)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # here, since it takes half a second

        names = [name for name in self.folder.glob('*') if name.endswith(('.json', '.txt'))]
        with _naming(f'{self.folder}/{INFO} or features.json'):
            copies = self.folder.copies(names)
            _check_classes((Path(copies) / 'features.json').read_bytes(), f'{self.folder}/features.json')
            return tfds.builder_from_directory(copies)

    @functools.cached_property
    def _stored(self) -> str:
        """The name that the split, one of `splits`, has in the data set."""
        return self.split if self.split in self._builder.info.splits else SPLITS[self.split]

    @property
    def features(self) -> Any:
        """The features of an example, {name: feature of tensorflow-datasets}."""
        return self._builder.info.features

    @functools.cached_property
    def examples(self) -> Examples:
        """The examples; raises InputError if they are in another format."""
        import tensorflow_datasets as tfds

        info, stored = self._builder.info, self._stored
        if info.file_format.value != 'array_record':
            raise InputError(
                f'{self.folder}: is not in array_record format, but {info.file_format.value}; make it '
                'again with yolos tfds'
            )
        decoders = {'image': tfds.decode.SkipDecoding()}  # images are left encoded
        names = sorted(info.splits[stored].filenames)
        what = f'{self.folder}/{names[0]}' + (f' ... {names[-1]}' if len(names) > 1 else '')

        def named(read: Callable[[], dict]) -> dict:
            with _naming(what):
                return read()

        if isinstance(self.folder, Folder):
            with _naming(what):
                source = self._builder.as_data_source(stored, decoders=decoders)
                count = len(source)
            read = lambda row: functools.partial(source.__getitem__, row)
            return Examples(count, lambda row: functools.partial(named, read(row)))
        records = self.folder.records(names)

        def start_read(row: int) -> Callable[[], dict]:
            record = records.start_read(row)
            decode = lambda: info.features.deserialize_example_np(record(), decoders=decoders)
            return functools.partial(named, decode)

        return Examples(len(records), start_read)


def _annotations(folder: Folder | BucketFolder, rows: list[tuple], categories: list) -> Annotations:
    ids, files, sizes, annotation_ids, labels, crowd, areas, boxes = zip(*rows, strict=True)
    heights, widths = np.array(sizes, np.int64).T
    return Annotations(
        path=str(folder),
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


def _row(folder: Folder | BucketFolder, example: dict) -> tuple:
    file, objects = example['image/filename'].decode(), example['objects']
    try:
        height, width = pixels.size(example['image'], f'{folder}: {file}')
    except InputError:  # the loader will report it
        height = width = 1
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


def _categories(folder: Folder | BucketFolder, names: list[str]) -> list:
    if folder.has(CATEGORIES):
        with _naming(f'{folder}/{CATEGORIES}'):
            stored = json.loads(folder.local(CATEGORIES).read_text())
            pairs = [(int(number), str(name)) for number, name in stored]
        if len(pairs) != len(names):
            counts = f'{len(pairs)} categories, and features.json {len(names)}'
            raise InputError(f'{folder}/{CATEGORIES}: has {counts}', 'data')
        return pairs
    if list(names) != list(coco_classes.COCO.values()):
        raise InputError(f'{folder}: the classes are not those of COCO, and there is no {CATEGORIES}')
    return list(coco_classes.COCO.items())
