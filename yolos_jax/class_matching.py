"""Matches the classes of a detector with those of a data set, which may number them differently."""

import dataclasses

import numpy as np

from yolos_jax.data.records import Records
from yolos_jax.errors import InputError, shown
from yolos_jax.naming import name_key
from yolos_jax.weights.pretrained import Pretrained


def match(pretrained: Pretrained, records: Records) -> tuple[dict[int, int], list[str]]:
    """The category id in the data for each label of a detector, and notes for the reader.

    The same number with the same name is the same class; where numbers differ, names decide.

    Returns:
        {label: category id}, and lines for the reader.

    Raises:
        InputError: they have no class in common.
    """
    own_names, data_names = _names(pretrained), _names(records)
    names = {*data_names.values()}
    if data_names == {number: name for number, name in own_names.items() if name in names}:
        return pretrained.category_ids, []
    category_of = _by_name(pretrained, records)
    if not category_of:
        raise InputError(
            f'{records.source.path}: none of its classes ({shown(records.classes.values())}) is among the '
            f'classes of the detector ({shown(pretrained.classes.values())})'
        )
    path, notes = records.source.path, []
    if len(names) < len(data_names):
        notes.append(f'{path}: of classes with one name, only the last with objects can be detected')
    if any(pretrained.category_ids[label] != number for label, number in category_of.items()):
        notes.append(f'{path}: its classes are numbered differently, and matched by name')
    detected = {data_names[number] for number in category_of.values()}
    if absent := [name for name in records.classes.values() if name_key(name) not in detected]:
        notes.append(f'{path}: classes that cannot be detected: {shown(absent)}')
    return category_of, notes


def _names(of: Pretrained | Records) -> dict[int, str]:
    """{category id: class name, as it is compared}."""
    return {of.category_ids[label]: name_key(name) for label, name in of.classes.items()}


def _by_name(pretrained: Pretrained, records: Records) -> dict[int, int]:
    """{label: category id} of the classes whose name the data have too."""
    ids, data_names = pretrained.category_ids, _names(records)
    used = {records.category_ids[label] for label in np.unique(records.labels).tolist()}
    # of one name the last that has objects: exports of Roboflow have an unused category beside one
    by_use = sorted(data_names.items(), key=lambda item: item[0] in used)
    by_name = {name: number for number, name in by_use}
    result = {}
    for label, name in ((label, name_key(name)) for label, name in pretrained.classes.items()):
        if name in by_name:
            same = data_names.get(ids[label]) == name and (ids[label] in used or by_name[name] not in used)
            result[label] = ids[label] if same else by_name[name]
    return result


def relabelled(records: Records, category_of: dict[int, int]) -> Records:
    """Records whose objects have the labels of a detector; objects that it cannot detect are left out.

    category_of: as `match` gives it.
    """
    label_of = {category: label for label, category in category_of.items()}
    new = np.array([label_of.get(records.category_ids[x], -1) for x in records.labels.tolist()], np.int32)
    kept = new >= 0
    first = np.concatenate([[0], np.cumsum(kept)])[records.first]
    return dataclasses.replace(records, labels=new[kept], boxes=records.boxes[kept], first=first)
