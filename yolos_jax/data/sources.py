"""Finds the images and annotations of a split in a folder as an annotation tool exported it.

The layout is detected: those of COCO, Roboflow, CVAT, FiftyOne and Label Studio are variants of a COCO
folder; `yolo` reads YOLO's, and `array_records` data sets of tensorflow-datasets.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax.data import annotations, array_records, folders, image_folder, yolo
from yolos_jax.data.annotations import Annotations
from yolos_jax.data.folders import BucketFolder, Folder
from yolos_jax.errors import InputError

PREFIX, ROBOFLOW, FIFTYONE = 'instances_', '_annotations.coco.json', 'labels.json'
ROBOFLOW_SPLITS = 'train', 'valid', 'test'
IMAGES = '.jpg', '.jpeg', '.png'  # the commonest suffixes
UPRIGHT = {'info': {'upright': True}}  # begins our COCO files whose boxes refer to upright images
# names that tools give to the same split; if the one asked for is missing, another is taken
SYNONYMS = (('train2017', 'train', 'training'), ('val2017', 'val', 'valid', 'validation'))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a split comes from.

    path: the annotation file, or the data set, for messages; images: from the names of files to the
    `Folder`, `BucketFolder` or `array_records.Split` they are in, and their names there; load: reads the
    annotations; split: its name as the data set has it; stamped: the file that changes with them, None if
    no single one does; version: a text that changes with them too; truth: the JSON file to evaluate
    against, None for the annotations of `load`.
    """

    path: Path | str
    images: Callable[[np.ndarray], tuple[Any, np.ndarray]]
    load: Callable[[], Annotations]
    split: str
    stamped: Path | None = None
    version: str = ''
    truth: Path | None = None

    def read_truth(self) -> Annotations:
        """The annotations to evaluate against."""
        return annotations.read(self.truth) if self.truth else self.load()


def find(root: str | Path, split: str) -> Source:
    """The source of a split of `root`: a folder of one of the layouts, or the description of a YOLO one.

    root: a path, or the URL of a folder in a bucket (gs:// or s3://): annotations are copied, images are
    read one by one. split: its name, or another of its names (`SYNONYMS`).

    Raises:
        InputError: there is no such folder or split; the message names the splits that exist.
    """
    folder = folders.open_folder(root)
    if folder.has(array_records.INFO):
        return _of_array_records(folder, split)
    if description := yolo_description(folder):
        return _of_yolo(folder, description, split)
    return _of_coco(folder, split)


def _of_array_records(folder: Folder | BucketFolder, split: str) -> Source:
    name = choose(split, array_records.splits(folder), folder)
    data_set, truth = array_records.Split(folder, name), f'annotations/{PREFIX}{name}.json'
    return Source(
        path=str(folder),
        images=lambda files: (data_set, files),
        load=data_set.read,
        split=name,
        stamped=folder.local(array_records.INFO),
        version=data_set.version(),
        truth=folder.local(truth) if folder.has(truth) else Path(f'{folder}/{truth}'),
    )


def _of_yolo(folder: Folder, description: Path, split: str) -> Source:
    data_set = yolo.read_description(description)
    try:
        name = choose(split, list(data_set.splits), folder)
    except InputError as error:
        missing = [f'; {description}: {entry} does not exist' for entry in data_set.missing]
        raise InputError(f'{error}{"".join(missing)}', error.argument) from None
    return Source(
        path=description,
        images=lambda files: (Folder(data_set.root, upright=True), files),
        load=lambda: yolo.read(data_set, name),
        split=name,
    )


def _of_coco(folder: Folder | BucketFolder, split: str) -> Source:
    """Its images may lie where COCO, CVAT, Roboflow, FiftyOne or Label Studio put them."""
    files = coco_files(folder)
    name = choose(split, list(files), folder)
    beside = os.path.dirname(files[name])
    names = name, f'images/{name}', 'images', beside, os.path.join(beside, 'data')
    places = [*map(folder.inside, names), folder]
    return of_json(folder.local(files[name]), places, argument='data', split=name)


def yolo_description(folder: Folder | BucketFolder) -> Path | None:
    """The description of a data set in YOLO's form, else None; raises InputError in a bucket."""
    if isinstance(folder, Folder):
        return yolo.description(folder.path)
    if folder.glob('data.y*ml'):
        raise InputError(
            f'{folder}: YOLO data sets are not read from a bucket; convert this one to array_record files '
            'with yolos tfds and upload those',
            'data',
        )
    return None


def of_json(file: Path, places: Sequence[Folder | BucketFolder], *, argument: str, split: str) -> Source:
    """The source of a COCO file whose images are in one of `places`; argument: the one that names them."""
    mark = json.dumps(UPRIGHT).encode()[:-1]
    with open(file, 'rb') as content:
        if content.read(len(mark)) == mark:  # of local files, as YOLO's are
            places = [dataclasses.replace(x, upright=True) if isinstance(x, Folder) else x for x in places]
    return Source(
        path=file,
        images=lambda names: image_folder.locate(names, places, file, argument),
        load=lambda: annotations.read(file),
        split=split,
        stamped=file,
        truth=file,
    )


def of_files(file: str | Path, images: str | Path | None = None, argument: str = 'images') -> Source:
    """The source of a COCO file; images: the folder of its images, None: its own, or `images` in it.

    images may also be a YOLO data set or its description: then they are beside it, or where it says.

    Either may be the URL of something in a bucket. argument: the one that names the folder, for errors.

    Raises:
        InputError: the file or the folder does not exist.
    """
    parent, _, name = str(file).rpartition('/')
    beside = folders.open_folder(parent or Path(file).parent, None)
    if not beside.has(name):
        raise InputError(f'{file}: no such annotation file')
    if not images:
        places = [beside, beside.inside('images'), beside.inside('data')]
    else:
        places = [folders.open_folder(images, argument)]
        if isinstance(places[0], Folder):
            # only a file that was named has to be in order
            with contextlib.suppress(*([] if Path(images).is_file() else [InputError])):
                if description := yolo.description(Path(images)):
                    places = [Folder(description.parent), Folder(yolo.read_description(description).root)]
    return of_json(beside.local(name), places, argument=argument, split=name)


def coco_files(folder: Folder | BucketFolder) -> dict[str, str]:
    """The names of a folder's annotation files by their split, in the first layout that has any.

    COCO and CVAT: annotations/instances_NAME.json (or NAME.json); Roboflow: NAME/_annotations.coco.json;
    FiftyOne: NAME/labels.json beside NAME/data/; Label Studio and others: NAME.json in the folder itself.
    """
    if files := folder.glob(f'annotations/{PREFIX}*.json'):
        return {Path(file).stem.removeprefix(PREFIX): file for file in files}
    if files := folder.glob('annotations/*.json'):
        return {Path(file).stem: file for file in files}
    if files := folder.glob(f'*/{ROBOFLOW}'):
        return {os.path.dirname(file): file for file in files}
    exports = {os.path.dirname(file): file for file in folder.glob(f'*/{FIFTYONE}')}
    # other folders may have a file of this name
    if exports := {name: file for name, file in exports.items() if 'data' in folder.inside(name).folders()}:
        return exports
    if folder.has(ROBOFLOW) and isinstance(folder, Folder):
        own = Path(os.path.abspath(folder.path))
        whole = Folder(own.parent)
        if own.name in ROBOFLOW_SPLITS and len(whole.glob(f'*/{ROBOFLOW}')) > 1:
            raise InputError(f'{folder}: one split of a data set; name its parent, {whole}', 'data')
    # notes.json: of Label Studio's export in YOLO's form
    on_top = [file for file in folder.glob('*.json') if file != 'notes.json']
    of_image = lambda file: any(folder.has(f'{Path(file).stem}{suffix}') for suffix in IMAGES)
    if on_top and all(map(of_image, on_top)):
        why = 'has a JSON file for each image, as labelme writes them; labelme2coco joins them'
        raise InputError(f'{folder}: {why}', 'data')
    names = [Path(file).stem.removesuffix('.coco') for file in on_top]
    if len(set(names)) < len(names):  # train.json and train.coco.json
        names = [Path(file).stem for file in on_top]
    return dict(zip(names, on_top, strict=True))


def choose(split: str, available: Sequence[str], root: Folder | BucketFolder | str) -> str:
    """The name that a split has among `available`; raises InputError with the available names."""
    if split in available:
        return split
    by_lower = {name.lower(): name for name in available}  # CVAT writes Train and Validation
    synonyms = next((names for names in SYNONYMS if split in names), ())
    for spelt in (dict(zip(available, available, strict=True)), by_lower):
        if named := [spelt[name] for name in synonyms if name in spelt]:
            return named[0]
    if len(available) == 1 and split in SYNONYMS[0] and available[0].lower() not in SYNONYMS[1]:
        return available[0]  # tools without splits export a single one, under any name
    if not available:
        raise no_data_set(root)
    raise InputError(f'{root}: has no split {split}; it has {", ".join(available)}', 'split')


def no_data_set(root: Folder | BucketFolder | str) -> InputError:
    """The error for a folder in none of the layouts."""
    if isinstance(root, Folder) and [*root.path.glob('labels/'), *root.path.glob('*/labels/')]:
        entries = ''.join(f'`{split}: {place}`, ' for split, place in _yolo_splits(root.path).items())
        listed = ', those in classes.txt' * (root.path / 'classes.txt').exists()  # of Label Studio
        return InputError(
            f"{root}: has YOLO's labels and no data.yaml; write one: `path: .`, {entries}and `names:` with "
            f'a list of the classes{listed}',
            'data',
        )
    if isinstance(root, Folder) and next(root.path.glob('Annotations/*.xml'), None):
        return InputError(
            f"{root}: Pascal VOC's XML is not read; docs/data.md shows how to convert it", 'data'
        )
    return InputError(
        f'{root}: not a known data set: no annotations/instances_*.json (COCO, CVAT), '
        f'*/{ROBOFLOW} (Roboflow), */{FIFTYONE} (FiftyOne), *.json (Label Studio), data.yaml or obj.data '
        '(YOLO) or dataset_info.json (tensorflow-datasets)',
        'data',
    )


def _yolo_splits(root: Path) -> dict[str, str]:
    """The folders of images by split, as a data.yaml would name them, where YOLO's labels are in `root`."""
    result = {}
    for split, names in zip(yolo.SPLITS, (*SYNONYMS, ('test',)), strict=True):
        places = [place for name in names for place in (f'images/{name}', f'{name}/images')]
        if place := next((place for place in places if (root / place).is_dir()), None):
            result[split] = place
    return result or {'train': 'images'}


def splits(root: str | Path) -> list[str]:
    """The names of the splits of a data folder; raises InputError if there are none."""
    folder = folders.open_folder(root)
    if folder.has(array_records.INFO):
        return array_records.splits(folder)
    if description := yolo_description(folder):
        return list(yolo.read_description(description).splits)
    if names := list(coco_files(folder)):
        return names
    raise no_data_set(folder)
