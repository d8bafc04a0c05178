"""Where the images and annotations of a split are: folders as annotation tools export them.

Which layout a folder has is seen by looking: COCO's, Roboflow's, CVAT's and Label Studio's are forms of a
COCO folder; `yolo` reads YOLO's, and `array_records` data sets of tensorflow-datasets.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax import bucket
from yolos_jax.data import annotations, array_records, yolo
from yolos_jax.data.annotations import Annotations
from yolos_jax.errors import InputError

PREFIX, ROBOFLOW = 'instances_', '_annotations.coco.json'
# names that tools give to the same split; asked for one of them, another that is there is taken
SYNONYMS = (('train2017', 'train', 'training'), ('val2017', 'val', 'valid', 'validation'))


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files in a folder."""

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

    path: the annotation file, or the data set, for messages; images: from the names of files to the
    `Folder` or `array_records.Images` they are in, and their names there; load: reads the annotations;
    stamped: the file that changes with them, None where there is no single one; truth: the JSON that an
    evaluation is by, None where it is by `load`.
    """

    path: Path
    images: Callable[[np.ndarray], tuple[Any, np.ndarray]]
    load: Callable[[], Annotations]
    stamped: Path | None = None
    truth: Path | None = None

    def read_truth(self) -> Annotations:
        """The annotations that an evaluation is by."""
        return annotations.read(self.truth) if self.truth else self.load()


def find(root: str | Path, split: str) -> Source:
    """The source of a split of `root`: a folder of one of the layouts, or the .yaml file of a YOLO one.

    split: its name, or another of its names (`SYNONYMS`).

    Raises:
        InputError: there is no such folder or split, which names those that are there.
    """
    if bucket.is_url(root):
        raise InputError(f'{root}: data are not read from a bucket; copy or mount them (gcsfuse)', 'data')
    root = Path(root)
    if not root.exists():
        raise InputError(f'{root}: no such data folder', 'data')
    if array_records.is_dataset(root):
        name = choose(split, array_records.splits(root), root)
        images = array_records.Images(root, name)
        return Source(
            root,
            lambda files: (images, files),
            lambda: array_records.read(root, name),
            stamped=array_records.info_file(root),
            truth=root / 'annotations' / f'{PREFIX}{name}.json',
        )
    if description := yolo.description(root):
        folders = yolo.read_description(description)
        name = choose(split, list(folders.splits), root)
        return Source(
            description, lambda files: (Folder(folders.root), files), lambda: yolo.read(folders, name)
        )
    files = coco_files(root)
    name = choose(split, list(files), root)
    places = [root / name, root / 'images' / name, root / 'images', files[name].parent, root]
    return of_json(files[name], places)


def of_json(file: Path, places: Sequence[Path]) -> Source:
    """The source of a COCO file whose images are in one of some folders."""
    return Source(
        file,
        lambda names: locate(names, places, file),
        lambda: annotations.read(file),
        stamped=file,
        truth=file,
    )


def coco_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder by the name of their split, in the first layout that has any.

    COCO and CVAT: annotations/instances_NAME.json (or NAME.json); Roboflow: NAME/_annotations.coco.json;
    Label Studio, and whatever lies on top: NAME.json.
    """
    if files := sorted((root / 'annotations').glob(f'{PREFIX}*.json')):
        return {file.stem.removeprefix(PREFIX): file for file in files}
    if files := sorted((root / 'annotations').glob('*.json')):
        return {file.stem: file for file in files}
    if files := sorted(root.glob(f'*/{ROBOFLOW}')):
        return {file.parent.name: file for file in files}
    return {file.stem.removesuffix('.coco'): file for file in sorted(root.glob('*.json'))}


def choose(split: str, available: Sequence[str], root: Path) -> str:
    """The name under which a split is there; raises InputError with those that are."""
    if split in available:
        return split
    for names in SYNONYMS:
        for name in names if split in names else ():
            if name in available:
                return name
    if len(available) == 1 and split in SYNONYMS[0] and available[0] not in SYNONYMS[1]:
        return available[0]  # tools that know no splits export one, whatever its name
    if not available:
        raise InputError(
            f'{root}: no data set is seen in it: no annotations/instances_*.json (COCO, CVAT), '
            f'*/{ROBOFLOW} (Roboflow), *.json (Label Studio), data.yaml (YOLO) or dataset_info.json '
            '(tensorflow-datasets)',
            'data',
        )
    raise InputError(f'{root}: has no split {split}, but {", ".join(available)}', 'split')


def locate(files: np.ndarray, places: Sequence[Path], annotation_file: Path) -> tuple[Folder, np.ndarray]:
    """The folder that images are in, and their names there.

    Tried are each of the folders and, in each, the names as they are, without the folders that they have in
    common, and without any. Taken is what has the most of the first hundred.

    Raises:
        InputError: none fits.
    """
    common = os.path.commonpath({os.path.dirname(name) for name in files.tolist()})
    forms = [lambda name: name, lambda name: os.path.relpath(name, common or '.'), os.path.basename]
    sample = files[:100].tolist()
    tries = [(place, form) for place in places for form in forms]
    there = lambda place, form: sum((place / form(name)).is_file() for name in sample)
    place, form = next((t for t in tries if there(*t) == len(sample)), None) or max(
        tries, key=lambda t: there(*t)
    )
    if not there(place, form):
        raise InputError(
            f'{annotation_file}: the images it names ({sample[0][:80]}, ...) are not in {places[0]}, nor '
            'where else exports put them',
            'images',
        )
    return Folder(place), np.array([form(name) for name in files.tolist()], str)


def splits(root: str | Path) -> list[str]:
    """The names of the splits of a data folder; raises InputError where there are none."""
    root = Path(root)
    if array_records.is_dataset(root):
        return array_records.splits(root)
    if description := yolo.description(root):
        return list(yolo.read_description(description).splits)
    names = list(coco_files(root))
    return names or [choose('', names, root)]
