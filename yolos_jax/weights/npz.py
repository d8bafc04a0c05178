"""Reads numpy's npz files, one array at a time."""

import functools
import math
import os
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import ml_dtypes
import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.weights.tensor import Tensor

MOST_PACKED = 20  # times its size that an .npz may unpack to
DAMAGED = (  # what numpy and zipfile raise for an .npz that is
    OSError, ValueError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def read(file: BinaryIO) -> dict[str, Tensor]:
    """The arrays of an .npz; nothing if it is another zip archive."""
    try:
        archive = zipfile.ZipFile(file)
        members = [m for m in archive.infolist() if m.filename.endswith('.npy')]
        if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
            raise ValueError('it is packed in a way that numpy does not write')
        if sum(m.file_size for m in members) > MOST_PACKED * os.fstat(file.fileno()).st_size:
            raise ValueError(f'it unpacks to more than {MOST_PACKED} times its size, as no weights do')
        headers = {m.filename: _header(archive, m) for m in members}
    except DAMAGED as error:
        raise InputError(f'{file.name}: damaged ({error})') from None
    return {
        name.removesuffix('.npy'): Tensor(shape, functools.partial(_values, archive, name, dtype))
        for name, (shape, dtype) in headers.items()
    }


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple, np.dtype]:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in reader:
            raise ValueError(f'{member.filename} is of an unknown version')
        shape, _, dtype = reader[version](file)
        if member.file_size != file.tell() + math.prod(shape) * dtype.itemsize or dtype.hasobject:
            raise ValueError(f'{member.filename} is not the array it says')
    # numpy has no bfloat16 and saves it as two raw bytes
    return shape, np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype('V2') else dtype


def _values(archive: zipfile.ZipFile, member: str, dtype: np.dtype) -> np.ndarray:
    try:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False).view(dtype)
    except DAMAGED as error:
        raise InputError(f'{archive.filename}: damaged at {member} ({error})') from None
