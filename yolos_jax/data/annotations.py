"""A COCO annotation file as columns."""

import codecs
import collections
import contextlib
import dataclasses
import mmap
import os
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from yolos_jax.errors import InputError

SMALL, LARGE = 32**2, 96**2  # areas in square pixels: COCO's objects are small below, large from there on
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]  # in memory, names are padded to the longest one


class _Image(msgspec.Struct, gc=False):
    id: Whole
    file_name: Text
    height: Side
    width: Side


class _Annotation(msgspec.Struct, gc=False):
    image_id: Whole
    category_id: Whole
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool | None = 0
    area: float | None = None  # for the evaluation
    id: Whole = -1


class _Category(msgspec.Struct):
    id: Whole
    name: Text


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclasses.dataclass(frozen=True)
class Annotations:
    """n images, their m annotations and the classes, in the order of the file.

    ids int64 [n]; files str [n]; heights, widths int64 [n]; annotation_ids int64 [m], -1 without one;
    owners int64 [m], the annotated images' ids; labels int64 [m], category ids; crowd bool [m];
    areas float64 [m], NaN without one; boxes float64 [m, 4] xywh in pixels; categories: (id, name) pairs;
    notes: deviations from COCO's format that were accepted, a line each.
    """

    path: Path | str
    ids: np.ndarray
    files: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    annotation_ids: np.ndarray
    owners: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    categories: list
    notes: tuple[str, ...] = ()

    def known_areas(self) -> np.ndarray:
        """The areas; width x height where one is missing or negative (0 where a side is negative)."""
        return np.where(self.areas >= 0, self.areas, np.maximum(self.boxes[:, 2:], 0).prod(axis=1))


def read(path: str | Path) -> Annotations:
    """The annotations of a COCO JSON file.

    Also accepted, with a note: numbers written as text or with a point (1.0), a byte order mark, and
    backslashes in file names.

    Raises:
        InputError: the file is missing, empty or not COCO's; the message names the error and, if it is in
            an image or annotation, the id of that.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'{path}: no such annotation file')
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise InputError(f'{path}: is empty')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                coco, notes = _decode(data)
            except (ValueError, OverflowError, RecursionError) as error:  # msgspec's are ValueErrors
                raise InputError(
                    f'{path}: not a COCO detection file: {error}{_where(error, data)}'
                ) from None
    column = lambda rows, name, kind: np.fromiter((getattr(row, name) for row in rows), kind, len(rows))
    names = [image.file_name for image in coco.images]
    if any('\\' in name for name in names):
        names = [name.replace('\\', '/') for name in names]
        notes.append('backslashes in file names are read as slashes')
    return Annotations(
        path=path,
        ids=column(coco.images, 'id', np.int64),
        files=np.array(names, str),
        heights=column(coco.images, 'height', np.int64),
        widths=column(coco.images, 'width', np.int64),
        annotation_ids=column(coco.annotations, 'id', np.int64),
        owners=column(coco.annotations, 'image_id', np.int64),
        labels=column(coco.annotations, 'category_id', np.int64),
        crowd=column(coco.annotations, 'iscrowd', bool),
        areas=np.array([np.nan if x.area is None else x.area for x in coco.annotations], np.float64),
        boxes=np.array([x.bbox for x in coco.annotations], np.float64).reshape(-1, 4),
        categories=[(category.id, category.name) for category in coco.categories],
        notes=tuple(notes),
    )


def _decode(data: mmap.mmap) -> tuple[_Coco, list[str]]:
    """A file as structs and notes, read strictly first, then leniently; raises msgspec's strict error."""
    mark = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    notes = ['its byte order mark is ignored'] if mark else []
    with memoryview(data) as view, view[mark:] as text:
        try:
            return msgspec.json.decode(text, type=_Coco), notes
        except msgspec.ValidationError:
            with contextlib.suppress(msgspec.ValidationError):  # the strict error is the one to show
                coco = msgspec.json.decode(text, type=_Coco, strict=False)
                return coco, [*notes, 'whole numbers that are written as text or with a point are read']
            raise


def of_images(a: Annotations, ids: np.ndarray) -> Annotations:
    """The images with these ids, and their annotations."""
    images, annotations = np.isin(a.ids, ids), np.isin(a.owners, ids)
    columns = {name: getattr(a, name)[images] for name in ('ids', 'files', 'heights', 'widths')}
    columns |= {
        name: getattr(a, name)[annotations]
        for name in ('annotation_ids', 'owners', 'labels', 'crowd', 'areas', 'boxes')
    }
    return dataclasses.replace(a, **columns)


def read_field(path: str | Path, kind: str, field: str) -> tuple[list, list]:
    """Any field of the images or annotations of a COCO file, in its order.

    path: a file that `read` takes; kind: 'images' or 'annotations'; field: also one in a mapping, as
    attributes.occluded.

    Returns:
        The image id of each, and its value of the field, None if it has none.

    Raises:
        InputError: the file cannot be read, none of them has the field, or it is a mapping.
    """
    owners, values = _read_column(path, kind, field)
    outer, _, inner = field.partition('.')
    if inner and all(value is None for value in values):
        owners, mappings = _read_column(path, kind, outer)
        values = [value.get(inner) if isinstance(value, dict) else None for value in mappings]
    if all(value is None for value in values):
        raise InputError(f'{path}: none of its {kind} has a field {field}', 'by')
    if mappings := [value for value in values if isinstance(value, dict)]:
        names = ', '.join(f'{kind}.{field}.{name}' for name in mappings[0])[:200]
        raise InputError(f'{path}: {kind}.{field} is a mapping; name a field in it: {names}', 'by')
    return owners, values


def _read_column(path: str | Path, kind: str, field: str) -> tuple[list, list]:
    owner = 'id' if kind == 'images' else 'image_id'
    columns = [('owner', Whole), ('value', Any, None)]
    if field == owner:
        columns.pop()
    row = msgspec.defstruct('Row', columns, rename={'owner': owner, 'value': field})
    file = msgspec.defstruct('File', [(kind, list[row])])
    try:
        data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        rows = getattr(msgspec.json.decode(data, type=file, strict=False), kind)
    except (OSError, ValueError) as error:
        raise InputError(f'{path}: {kind}.{field} cannot be read ({error})') from None
    owners = [x.owner for x in rows]
    return owners, owners if field == owner else [x.value for x in rows]


def tolerated(count: int) -> int:
    """How many of `count` images may be unreadable: one in a thousand, but at least three."""
    return max(3, count // 1000)


def class_names(categories: list) -> dict[int, str]:
    """{id: name} of (id, name) pairs; a name that several ids share gets the id appended."""
    counts = collections.Counter(name for _, name in categories)
    return {number: f'{name} (id {number})' if counts[name] > 1 else name for number, name in categories}


def read_classes(path: str | Path) -> dict[int, str]:
    """The classes {id: name} of a COCO annotation file; raises InputError as `read`."""
    classes = dict(read(path).categories)
    if not classes:
        raise InputError(f'{path}: lists no categories')
    return classes


def _where(error: Exception, data: mmap.mmap) -> str:
    """', in the object with id 7' for an error in an object that has one, else ''."""
    number = re.search(rb'"id"\s*:\s*([^,}\s]+)', _object_of(error, data))
    return f', in the object with id {number[1].decode(errors="replace")[:40]}' if number else ''


def _object_of(error: Exception, data: mmap.mmap) -> bytes | msgspec.Raw:
    """The text of the object with an error at a byte or in a list element; empty if it is in none."""
    if byte := re.search(r'\(byte (\d+)\)', str(error)):
        at = int(byte[1])
        begin, end = data.rfind(b'{', 0, at), data.find(b'}', at)
        if data.rfind(b'}', 0, at) > begin:
            return b''  # the byte is in no object, but behind one
        return data[max(begin, 0) : end if end > 0 else at]
    if element := re.search(r'\$\.(images|annotations|categories)\[(\d+)\]', str(error)):
        kind, index = element[1], int(element[2])
        with contextlib.suppress(ValueError, RecursionError):  # the error to show is the first one
            elements = msgspec.json.decode(memoryview(data), type=dict[str, msgspec.Raw])[kind]
            return msgspec.json.decode(elements, type=list[msgspec.Raw])[index]
    return b''
