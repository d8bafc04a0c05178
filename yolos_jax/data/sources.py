"""Where the images and annotations of a split are: a COCO folder, or a data set of tensorflow-datasets."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax.data import annotations, array_records
from yolos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Folder:
    """The image files of a COCO folder's split."""

    path: Path

    def name(self, file: str) -> str:
        """The path of a file."""
        return str(self.path / file)

    def read(self, file: str, row: int) -> bytes:  # noqa: ARG002  the interface of array_records.Images
        """The bytes of a file."""
        try:
            with open(os.path.join(self.path, file), 'rb', buffering=0) as stream:
                return stream.read()
        except OSError as error:
            raise InputError(f'{self.path / file}: {error.strerror}') from None

    def missing(self, names: np.ndarray) -> list[str]:
        """Those of the files named that are not there; folders are listed, files not opened."""
        present = np.fromiter(map(hash, self._walk()), np.int64)  # a tenth of the memory of the names
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        present.sort()
        absent = np.searchsorted(present, wanted) == np.searchsorted(present, wanted, 'right')
        return [str(name) for name in names[absent] if not (self.path / name).exists()]

    def _walk(self, inside: str = '') -> Iterator[str]:
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._walk(f'{inside}{entry.name}/')
                else:
                    yield inside + entry.name


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a split comes from.

    images: a `Folder` or `array_records.Images`; load: reads its `annotations.Annotations`; stamped: the
    file that changes with them; annotation_file: for evaluation.
    """

    images: Any
    load: Callable[[], annotations.Annotations]
    stamped: Path
    annotation_file: Path


def find(root: str | Path, split: str) -> Source:
    """The source of a split of `root`; raises InputError where a file or folder is missing."""
    root = Path(root)
    file = root / 'annotations' / f'instances_{split}.json'
    if array_records.is_dataset(root):
        images = array_records.Images(root, split)
        return Source(images, lambda: array_records.read(root, split), array_records.info_file(root), file)
    for place, kind in ((root, 'data folder'), (file, 'annotation file'), (root / split, 'image folder')):
        if not place.exists():
            raise InputError(f'{place}: no such {kind} (a COCO folder has annotations/ and {split}/)')
    return Source(Folder(root / split), lambda: annotations.read(file), file, file)


def splits(root: str | Path) -> list[str]:
    """The names of the splits of a data folder; raises InputError where there are none."""
    root = Path(root)
    if array_records.is_dataset(root):
        return array_records.splits(root)
    prefix = 'instances_'
    names = sorted(p.stem.removeprefix(prefix) for p in (root / 'annotations').glob(f'{prefix}*.json'))
    if not names:
        raise InputError(f'{root}: no annotations/instances_*.json, and no dataset_info.json')
    return names
