"""Reads data sets in YOLO's format: a data.yaml or obj.data, and a text file of boxes for each image.

As ultralytics reads them: `images/train/x.jpg` has its boxes in `labels/train/x.txt`, a row each of class
and centre, width and height over the image's size, on photographs turned upright. A polygon becomes its
bounding box; key points after a box are ignored, and so are repeated rows.
"""

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import yaml

from yolos_jax import files
from yolos_jax.data import darknet, pixels
from yolos_jax.data.annotations import Annotations, tolerated
from yolos_jax.data.folders import YOLO_FILES
from yolos_jax.errors import InputError

SPLITS = ('train', 'val', 'test')
LONGEST_NUMBER = 6  # digits, of a class or a count
LARGEST_SHARE = 2  # of an image's side, since boxes may leave it; larger values are pixels


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of a data.yaml or obj.data.

    root: the common folder of the images; splits: {split: image files}; missing: entries for val and test
    that do not exist; classes: {label: name}; key_points: how many numbers follow the box in a row.
    """

    path: Path
    root: Path
    splits: dict[str, list[Path]]
    missing: list
    classes: dict[int, str]
    key_points: int

    def labels_of(self, image: Path) -> Path:
        """The file of labels of an image, an absolute path.

        Darknet's is beside the image. Else the last folder named images becomes labels.
        """
        if self.path.suffix != darknet.SUFFIX:
            image = Path('/labels/'.join(str(image).rsplit('/images/', 1)))
        return image.with_suffix('.txt')


def description(root: Path) -> Path | None:
    """The .yaml or .data file of a data set in YOLO's form, given its folder or the file; else None.

    Raises InputError if it has a data.yaml that cannot be read, or several other files of this form.
    """
    if root.is_file():
        return root if root.suffix in YOLO_FILES else None
    candidates = sorted(file for suffix in YOLO_FILES for file in root.glob(f'[!.]*{suffix}'))
    contents = {file: _load(file, optional=file.stem != 'data') for file in candidates}
    described = [file for file, content in contents.items() if {'names', 'nc'} & content.keys()]
    if named_data := [file for file in described if file.stem == 'data']:
        return named_data[0]
    # one of a model has no splits
    described = [file for file in described if contents[file].keys() & set(SPLITS)]
    if len(described) > 1:
        names = ', '.join(file.name for file in described)
        raise InputError(f'{root}: has several data set files ({names}); name one of them', 'data')
    return described[0] if described else None


class _AsWritten(yaml.SafeLoader):
    """Reads values as text, except null: classes may be named no, on or 010."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == 'tag:yaml.org,2002:null']
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """Refuses aliases of lists and mappings: each may double what a few bytes stand for."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError(f'*{alias.anchor} stands for a list or mapping; write it out')
        return node


def _load(file: Path, *, optional: bool = False) -> dict:
    if file.suffix == darknet.SUFFIX:
        return darknet.read(file)
    try:
        content = yaml.load(file.read_text('utf-8-sig'), _AsWritten)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if optional:
            return {}
        raise InputError(f'{file}: cannot be read ({" ".join(str(error).split())})', 'data') from None
    return content if isinstance(content, dict) else {}


def read_description(file: Path) -> Description:
    """The content of a data.yaml; raises InputError if it cannot be used."""
    content = _load(file)
    classes = _classes(content, file)
    base = file.parent / str(content.get('path') or '')
    if not base.is_dir():  # it is a path on the exporting machine, or the folder was moved
        base = file.parent
    splits, missing = {}, []
    for split in filter(content.get, SPLITS):
        entries = content[split] if isinstance(content[split], list) else [content[split]]
        if split == 'train' or all(_place(base, str(entry)) for entry in entries):
            splits[split] = _images(base, entries, file)
        else:  # exports may name splits that they lack
            missing.append(content[split])
    folders = {str(image.parent) for images in splits.values() for image in images}
    if not folders:
        raise InputError(f'{file}: names no images; add where they are, such as `train: images`', 'data')
    root = Path(os.path.commonpath(folders))
    shape = content.get('kpt_shape', ['0'])
    if not isinstance(shape, list) or len(shape) > 2 or not all(map(_is_number, shape)):
        raise InputError(f'{file}: its kpt_shape is {str(shape)[:50]}, not [points, 2 or 3]', 'data')
    return Description(file, root, splits, missing, classes, key_points=math.prod(map(int, shape)))


def _classes(content: dict, file: Path) -> dict[int, str]:
    """The names of the classes in a data.yaml."""
    names, count = content.get('names'), content.get('nc')
    if names is None and _is_number(count):
        names = [f'class_{i}' for i in range(int(count))]  # as Ultralytics calls them
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not isinstance(names, dict) or not all(map(_is_number, names)) or not names:
        raise InputError(f'{file}: its names are neither a list nor a mapping of numbers', 'data')
    if unnamed := [key for key, name in names.items() if not isinstance(name, str)]:
        raise InputError(f'{file}: the name of class {unnamed[0]} is {names[unnamed[0]]!r}', 'data')
    if _is_number(count) and int(count) != len(names):
        raise InputError(f'{file}: nc is {count}, but it names {len(names)} classes', 'data')
    return {int(key): name for key, name in names.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, str) and value.isdecimal() and len(value) <= LONGEST_NUMBER


def _images(base: Path, entries: list, file: Path) -> list[Path]:
    """The image files of a split. An entry is a folder, or a text file with a name in each line."""
    images = []
    for entry in entries:
        place = _place(base, str(entry))
        if place is None:
            raise InputError(f'{file}: {entry} does not exist', 'data')
        if place.is_dir():
            images += sorted(place / name for name in files.walk(place) if pixels.is_image(name))
        else:
            try:
                text = place.read_text('utf-8-sig').replace('\\', '/')
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f'{place}: no list of images in UTF-8 ({error})', 'data') from None
            prefix = darknet.prefix(base) if file.suffix == darknet.SUFFIX else ''
            lines = [line.strip().removeprefix(prefix) for line in text.splitlines() if line.strip()]
            images += [(place.parent if line.startswith('./') else base) / line for line in lines]
    return [Path(os.path.abspath(path)) for path in images]  # without ..


def _place(base: Path, name: str) -> Path | None:
    """The path of an entry, or None; Roboflow's entries begin with one ../ too many."""
    name = name.replace('\\', '/')  # as Windows writes it
    return next(filter(os.path.exists, (base / name, base / name.removeprefix('../'))), None)


def read(data: Description, split: str) -> Annotations:
    """The annotations of a split, images numbered from 1: those of a folder by name, of a list as listed.

    Up to `tolerated` images that cannot be read are left out, with a note.

    Raises:
        InputError: images are missing, more cannot be read, or a row of labels is not a box.
    """
    with ThreadPoolExecutor() as pool:
        listed = data.splits[split]
        exists = pool.map(os.path.exists, listed)
        if missing := [image for image, is_there in zip(listed, exists, strict=True) if not is_there]:
            raise InputError(
                f'{data.path}: {len(missing)} of {len(listed)} images of {split} are missing, the first is '
                f'{missing[0]}; a list of images names them relative to the folder of its `path`',
                'data',
            )
        sized = dict(zip(listed, pool.map(_size, listed), strict=True))
        images = [image for image, size in sized.items() if not isinstance(size, InputError)]
        bad = [str(size) for size in sized.values() if isinstance(size, InputError)]
        if len(bad) > tolerated(len(sized)):
            raise InputError(f'{bad[0]}; {len(bad)} of {len(sized)} images are bad')
        sizes = np.array([sized[image] for image in images], np.int64).reshape(-1, 2)
        of_files = pool.map(lambda image: _boxes(data.labels_of(image), data), images)
        rows, repeated = map(list, zip(*of_files, strict=True)) if images else ([], [])
    notes = [f'left out: {text}' for text in bad]
    if images and not any(data.labels_of(image).exists() for image in images):
        notes.append(f'no image has a file of labels, as {data.labels_of(images[0])} would be')
    if sum(repeated):
        notes.append(f'left out: {sum(repeated)} duplicate rows of labels')
    counts = [len(of_image) for of_image in rows]
    rows = np.concatenate([np.zeros((0, 5)), *rows])
    labels = rows[:, 0].astype(np.int64)
    size = np.repeat(sizes[:, ::-1], counts, axis=0)  # width, height
    extent = rows[:, 3:] * size
    boxes = np.concatenate([rows[:, 1:3] * size - extent / 2, extent], axis=1)
    ids = np.arange(1, len(images) + 1)
    return Annotations(
        path=data.path,
        ids=ids,
        files=np.array([str(image.relative_to(data.root)) for image in images], str),
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        annotation_ids=np.arange(1, len(rows) + 1),
        owners=np.repeat(ids, counts),
        labels=labels,
        crowd=np.zeros(len(rows), bool),
        areas=np.full(len(rows), np.nan),
        boxes=boxes,
        categories=sorted(data.classes.items()),
        notes=tuple(notes),
    )


def _size(image: Path) -> tuple[int, int] | InputError:
    try:
        return pixels.upright_size(image)
    except InputError as error:
        return error


def _boxes(file: Path, data: Description) -> tuple[np.ndarray, int]:
    """The rows of a label file as class, centre and extent [n, 5], and the number of repeated rows.

    A file that does not exist has no rows.
    """
    rows, repeated, key_points = {}, 0, data.key_points
    try:
        lines = file.read_text('utf-8-sig').splitlines()
    except FileNotFoundError:
        lines = []  # an image without objects
    except (OSError, ValueError) as error:
        raise InputError(f'{file}: cannot be read ({error})') from None
    for number, line in enumerate(lines, 1):
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = [np.nan]
        if not values:
            continue
        whole = tuple(values)
        if key_points and len(values) == 5 + key_points:
            values = values[:5]
        elif not key_points and len(values) > 5 and len(values) % 2:  # a polygon
            low, high = np.reshape(values[1:], (-1, 2)).min(0), np.reshape(values[1:], (-1, 2)).max(0)
            values = [values[0], *(low + high) / 2, *(high - low)]
        _check_row(values, data, f'{file}: line {number}', line)
        repeated += whole in rows
        rows[whole] = values
    return np.array([*rows.values()], np.float64).reshape(-1, 5), repeated


def _check_row(values: list[float], data: Description, where: str, line: str) -> None:
    if len(values) != 5 or not np.isfinite(values).all() or values[0] != int(values[0]):
        why = ' (a sixth number, perhaps a track or a confidence, has to go)' if len(values) == 6 else ''
        raise InputError(f'{where} is not a class with a box or polygon{why}: {line[:80]!r}')
    if values[0] not in data.classes:
        raise InputError(f'{where} has class {values[0]:g}, which {data.path.name} does not name')
    if (largest := max(values[1:])) > LARGEST_SHARE:
        raise InputError(f'{where} has {largest:g}, no share of the image: are they pixels?')
