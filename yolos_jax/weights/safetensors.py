"""Reads and writes safetensors files, one tensor at a time."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.weights.tensor import Tensor

TYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip
LARGEST_HEADER = 100_000_000  # as the format's own library has it


def read(file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    The format's own library would open the file again and keep what it has read in memory.
    """
    try:
        file.seek(0)
        length, size = int.from_bytes(file.read(8), 'little'), os.fstat(file.fileno()).st_size
        if not length <= min(LARGEST_HEADER, size - 8):
            raise ValueError('its header is longer than the file')
        header = json.loads(file.read(length))
        header.pop('__metadata__', None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            if entry['dtype'] not in TYPES:
                raise InputError(f'{file.name}: {name} is of type {entry["dtype"]}, which is not read')
            dtype, shape = np.dtype(TYPES[entry['dtype']]), tuple(entry['shape'])
            if any(type(n) is not int or n < 0 for n in (*shape, *entry['data_offsets'])):
                raise ValueError(f'{name} has an impossible shape')
            begin, previous, end = entry['data_offsets'][0], end, entry['data_offsets'][1]
            if begin != previous or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name} is not as long as its shape says')
            tensors[name] = Tensor(shape, _reader(file, 8 + length + begin, shape, dtype))
        if end != size - 8 - length:
            raise ValueError('it is not as long as its header says')
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f'{file.name}: damaged, or no safetensors file ({error})') from None
    return tensors


def _reader(file: BinaryIO, start: int, shape: tuple, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """A function that reads an array of an open file."""
    size = math.prod(shape) * dtype.itemsize
    return lambda: files.read_at(file, start, size).view(dtype).reshape(shape)


def write(path: str | Path, tensors: dict) -> None:
    """Write tensors {name: object with .shape and .numpy()} as float32, one at a time.

    The safetensors package takes all of them in memory at once.
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        size = 4 * math.prod(tensor.shape)
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.numpy(), '<f4').data)
