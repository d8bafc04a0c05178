"""Images with one class each, from folders SPLIT/CLASS/IMAGE or a data set of tensorflow-datasets.

Labels of tensorflow-datasets' imagenet2012 are read together with the images, so that starting a run does
not read them all.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from yolos_jax.data import array_records, folders, pixels, sources
from yolos_jax.data.annotations import tolerated
from yolos_jax.data.folders import BucketFolder, Folder
from yolos_jax.errors import InputError
from yolos_jax.file_names import is_utf8

FEW = 32  # examples that enter the digest of a data set, beside the number and size of all


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """n images of a split.

    path: of the split, for messages; classes: their names by label; files str [n] and labels int32 [n],
    both empty where a data set stores them with each image; images: reads the images; bad_images: how
    many may turn out to be unreadable.
    """

    path: str
    classes: list[str]
    files: np.ndarray
    labels: np.ndarray
    images: Any
    count: int
    bad_images: int
    advice: ClassVar[str] = ''  # for the error if more are bad

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return self.images.name(self.files[i] if len(self.files) else str(i))

    def start_read(self, i: int) -> Callable[[], tuple[bytes, int]]:
        """A function that returns the encoded bytes and the label of image i; a bucket is asked at once.

        It raises InputError if they cannot be read.
        """
        if not len(self.files):
            example = self.images.examples.start_read(i)
            return lambda: self._bytes_and_label(example())
        read = self.images.start_read(self.files[i], i)
        return lambda: (read(), int(self.labels[i]))

    def _bytes_and_label(self, example: dict) -> tuple[bytes, int]:
        image, label = example['image'], int(example['label'])
        if not 0 <= label < len(self.classes):
            raise InputError(f'{self.path}: a label is {label}, of {len(self.classes)} classes', 'data')
        return image, label

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """{what is hashed: hash}, the same for the same data wherever they are stored."""
        classes = json.dumps([self.classes, self.count]).encode()
        of_names = hashlib.sha256(classes + self.files.tobytes() + self.labels.tobytes()).hexdigest()
        result = {'images and classes': of_names}
        if not len(self.files):
            result['examples'] = self._digest_of_examples()
        return result

    def _digest_of_examples(self) -> str:
        """A hash of the sizes of all examples and of a few whole ones, since a start does not read all."""
        hashed = hashlib.sha256(json.dumps(self.images.sizes()).encode())
        rows = np.linspace(0, len(self) - 1, min(FEW, len(self))).astype(int).tolist()
        for read_example in [self.start_read(row) for row in rows]:
            image, label = read_example()
            hashed.update(image + str(label).encode())
        return hashed.hexdigest()


def read(root: str | Path, split: str, classes: list[str] | None = None) -> LabelledImages:
    """The images of a split of a data folder; no image is opened.

    root: its path, or the URL of one in a bucket. split: its name, or another of its names
    (`sources.SYNONYMS`). classes: the names that labels index; when None those of the split itself,
    sorted by name as in torchvision's ImageFolder.

    Raises:
        InputError: there is no such folder or split, it has no images in folders of classes, or a folder
            of a class has none that can be read.
    """
    folder = folders.open_folder(root)
    if folder.has(array_records.INFO):
        return _of_tfds(folder, sources.choose(split, array_records.splits(folder), folder))
    name = sources.choose(split, folder.folders(), folder)
    where = folder.inside(name)
    files = sorted(filter(pixels.is_image, where.walk()), key=_place)
    of_class = [file.partition('/')[0] for file in files if '/' in file]
    if not files or len(of_class) < len(files):
        raise InputError(
            f'{folder}/{name}: {len(of_class)} of {len(files)} images are in the folder of a class, as '
            f'{name}/CLASS/IMAGE.jpg',
            'data',
        )
    empty = sorted({x for x in where.folders() if not x.startswith('.')} - set(of_class))
    if empty and classes is None:  # when the training split is read
        raise InputError(f'{where}/{empty[0]}: has no images ({" ".join(pixels.ENDINGS)})', 'data')
    known = classes or sorted(set(of_class))
    if wrong := next((name for name in known if not is_utf8(name)), None):
        raise InputError(f'{where}: the name of a class is not UTF-8: {os.fsencode(wrong)!r}', 'data')
    if unknown := sorted(set(of_class) - set(known)):
        raise InputError(f'{folder}/{name}: no training image has the class {unknown[0]}', 'data')
    label = {name: i for i, name in enumerate(known)}
    labels = np.array([label[name] for name in of_class], np.int32)
    count = len(files)
    return LabelledImages(
        path=str(where),
        classes=known,
        files=np.array(files, str),
        labels=labels,
        images=where,
        count=count,
        bad_images=tolerated(count),
    )


def _place(file: str) -> tuple[str, str, str]:
    """The key that images are sorted by, as in torchvision's ImageFolder: class, folder in it, name."""
    inside, _, name = file.rpartition('/')
    return file.partition('/')[0], inside, name


def _of_tfds(folder: Folder | BucketFolder, name: str) -> LabelledImages:
    split, empty = array_records.Split(folder, name), np.zeros(0)
    features = split.features
    if not {'image', 'label'} <= set(features):
        raise InputError(f'{folder}: its examples have no label, but {", ".join(features)}', 'data')
    count, path = split.examples.count, f'{folder}: {split.split}'
    classes = list(getattr(features['label'], 'names', []))
    if not classes or features['label'].shape:
        raise InputError(f'{folder}: its label is not a ClassLabel with names', 'data')
    if not hasattr(features['image'], 'encoding_format'):
        raise InputError(f'{folder}: its image is not an Image, but {features["image"]}', 'data')
    return LabelledImages(path, classes, empty, empty, split, count, tolerated(count))
