"""Reads Darknet's description of a data set in YOLO's format, obj.data; CVAT exports it as "YOLO 1.1"."""

from pathlib import Path

from yolos_jax.errors import InputError

SUFFIX = '.data'
SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


def read(file: Path) -> dict:
    """What a data.yaml would say; empty for another file.

    'names', their count 'nc', and the list of images of each split.

    Raises:
        InputError: the file of class names that it names cannot be read.
    """
    try:
        lines = file.read_text('utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs, start = (line.partition('=') for line in lines if '=' in line), prefix(file.parent)
    values = {key.strip().lower(): value.strip().removeprefix(start) for key, _, value in pairs}
    if 'names' not in values:
        return {}
    names = file.parent / values['names']
    try:
        classes = [line.strip() for line in names.read_text('utf-8-sig').rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{names}: no list of class names in UTF-8 ({error})', 'data') from None
    lists = {SPLITS[key]: value for key, value in values.items() if key in SPLITS}
    return lists | {'names': classes, 'nc': values.get('classes')}


def prefix(folder: Path) -> str:
    """How paths relative to `folder` begin in such files: Darknet has all in `data`, exports have not."""
    return '' if (folder / 'data').exists() else 'data/'
