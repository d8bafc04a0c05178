"""Reads and writes files of torch.save, without torch and without running a pickle (see `unpickle`).

Both formats are read: the zip archive (torch 1.6 and later; its CRCs are checked) and the older stream.
A tensor's values are read or written one at a time, so a file is never in memory as a whole.
"""

import math
import os
import struct
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.weights.unpickle import Interpreter

ZIP = b'PK\x03\x04'
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DAMAGED = (  # what Python's modules and `Interpreter` raise for a file that is
    ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError,
    NotImplementedError, EOFError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def read(file: BinaryIO) -> Any:
    """The object in an open .pth file: dicts, lists, numbers, strings, and `Tensor` for its tensors.

    Raises:
        InputError: the file is damaged or of another kind, or names something to import that is not a
            tensor or container.
    """
    try:
        file.seek(0)
        return _read_zip(file) if file.read(4) == ZIP else _read_stream(file)
    except InputError as error:
        raise InputError(f'{file.name}: {error}') from None
    except DAMAGED as error:
        raise InputError(f'{file.name}: damaged, or not a file of torch.save ({error})') from None


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if sum(info.file_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise InputError('its members claim more bytes than the file has')
        pickles = [name for name in members if name.endswith('/data.pkl')]
        if len(pickles) != 1:
            raise InputError('a zip archive, but not one of torch.save (no data.pkl)')
        root = pickles[0].removesuffix('data.pkl')
        if f'{root}constants.pkl' in members:
            raise InputError('a TorchScript archive; save the state_dict() of the model instead')
        for info in members.values():
            _check_entry(info)
        if damaged := archive.testzip():
            raise InputError(f'damaged: the checksum of {damaged!r} does not match')
        places = {name: _place(file, info) for name, info in members.items()}
        if f'{root}byteorder' in members and archive.read(f'{root}byteorder') != b'little':
            raise InputError('written on a big-endian machine')
        content = archive.read(pickles[0])
    interpreter = Interpreter(file)
    result = interpreter.run(BytesIO(content))
    for storage in interpreter.storages.values():
        name = f'{root}data/{storage.key}'
        if name not in members or members[name].file_size < storage.size:
            raise InputError('cut short: data of some tensors is missing')
        storage.place = places[name]
    return result


def _check_entry(info: zipfile.ZipInfo) -> None:
    """Raises InputError if an entry of the archive's directory is not one that torch writes."""
    if info.compress_type or info.flag_bits & 1:
        raise InputError(f'{info.filename!r} is compressed or encrypted; torch stores plain data')
    if info.compress_size != info.file_size or info.header_offset < 0:
        raise InputError(f'damaged: the size or place of {info.filename!r} does not match')


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The position of a member's bytes."""
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack('<26xHH', file.read(30))
    return info.header_offset + 30 + name_length + extra_length


def _read_stream(file: BinaryIO) -> Any:
    """The format before torch 1.6: five pickles, then each storage's count and raw data."""
    file.seek(0)
    interpreter = Interpreter(file)
    if interpreter.run(file) != LEGACY_MAGIC:
        raise InputError('not a file of torch.save')
    interpreter.run(file)  # protocol version
    if not interpreter.run(file).get('little_endian', True):
        raise InputError('written on a big-endian machine')
    result, keys = interpreter.run(file), interpreter.run(file)
    end = os.fstat(file.fileno()).st_size
    for key in keys:
        storage = interpreter.storages[key]
        (count,) = struct.unpack('<q', file.read(8))
        if count != storage.count:
            raise InputError('a storage is not as long as its tensors say')
        storage.place = file.tell()
        if storage.place + storage.size > end:
            raise InputError('cut short: data of some tensors is missing')
        file.seek(storage.size, 1)
    if any(storage.place is None for storage in interpreter.storages.values()):
        raise InputError('cut short: data of some tensors is missing')
    return result


def write(path: str | Path, content: Any) -> None:
    """Write `content` as torch.save does; torch.load(weights_only=True) reads it.

    content: dicts, lists, tuples, strings, numbers, and objects with .shape and .numpy() as its float32
        tensors.
    """
    tensors = []
    pickled = b'\x80\x02' + b''.join(_pickle(content, tensors)) + b'.'
    small = {'data.pkl': pickled, 'byteorder': b'little', 'version': b'3\n'}
    # uncompressed, as torch asks
    with files.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
        for name, data in small.items():
            archive.writestr(zipfile.ZipInfo(f'archive/{name}'), data)
        for key, tensor in enumerate(tensors):
            member = zipfile.ZipInfo(f'archive/data/{key}')
            member.file_size = 4 * math.prod(tensor.shape)
            with archive.open(member, 'w') as out:
                out.write(np.ascontiguousarray(tensor.numpy(), '<f4').reshape(-1).view(np.uint8))


def _pickle(value: Any, tensors: list) -> Iterator[bytes]:
    """The instructions (protocol 2) that make a value; its tensors are appended to `tensors`."""
    if value is None:
        yield b'N'
    elif isinstance(value, bool):
        yield b'\x88' if value else b'\x89'
    elif isinstance(value, int):
        size = value.bit_length() // 8 + 1
        yield b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)
    elif isinstance(value, float):
        yield b'G' + struct.pack('>d', value)
    elif isinstance(value, str):
        text = value.encode()
        yield b'X' + struct.pack('<I', len(text)) + text
    elif isinstance(value, dict | list | tuple):
        start, end = {dict: (b'}(', b'u'), list: (b'](', b'e'), tuple: (b'(', b't')}[type(value)]
        items = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
        yield start
        for item in items:
            yield from _pickle(item, tensors)
        yield end
    else:
        yield from _pickle_tensor(value, tensors)


def _pickle_tensor(tensor: Any, tensors: list) -> Iterator[bytes]:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    storage = 'storage', b'ctorch\nFloatStorage\n', str(len(tensors)), 'cpu', math.prod(tensor.shape)
    tensors.append(tensor)
    yield b'ctorch._utils\n_rebuild_tensor_v2\n(('
    for item in storage:
        yield item if isinstance(item, bytes) else b''.join(_pickle(item, tensors))
    yield b'tQ'
    for item in (0, tuple(tensor.shape), tuple(strides), False):
        yield from _pickle(item, tensors)
    yield b'ccollections\nOrderedDict\n)RtR'
