"""Reads what torch.save writes, without torch and without running its pickle (see `unpickle`).

Both formats are read: the zip archive (torch 1.6 and later; its CRCs are checked) and the older stream.
A tensor's values are read when asked for, so a file is never in memory as a whole.
"""

import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

from yolos_jax.errors import InputError
from yolos_jax.unpickle import Interpreter

ZIP = b'PK\x03\x04'
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read(path):
    """The object in a .pth file: dicts, lists, numbers, strings, and `Tensor` for its tensors.

    Raises:
        InputError: the file is missing, damaged or of another kind, or names something to import
            that is not a tensor or container.
    """
    path = Path(path)
    try:
        with open(path, 'rb') as file:
            return _read_zip(file) if file.read(4) == ZIP else _read_stream(file)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        NotImplementedError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f'{path}: damaged, or no file of torch.save ({error})') from None


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith('/data.pkl')]
        if len(pickles) != 1:
            raise InputError('a zip archive, but not one of torch.save (no data.pkl)')
        root = pickles[0].removesuffix('data.pkl')
        if f'{root}constants.pkl' in members:
            raise InputError('a TorchScript archive; save the state_dict() of the model instead')
        places = {name: _place(file, info) for name, info in members.items()}
        if f'{root}byteorder' in members and archive.read(f'{root}byteorder') != b'little':
            raise InputError('written on a big-endian machine')
        content = archive.read(pickles[0])
    storages = {}
    result = Interpreter(storages, file.name).run(BytesIO(content))
    for storage in storages.values():
        name = f'{root}data/{storage.key}'
        if name not in members or members[name].file_size < storage.size:
            raise InputError('cut short: data of some tensors is missing')
        storage.place = places[name]
    return result


def _place(file, info):
    """Where a member's bytes start, once they have proved to be those of its CRC."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(f'{info.filename!r} is compressed or encrypted; torch stores plain data')
    file.seek(info.header_offset)
    signature, name_length, extra_length = struct.unpack('<4s22xHH', file.read(30))
    place = info.header_offset + 30 + name_length + extra_length
    file.seek(place)
    left, crc = info.file_size, 0
    while left and (chunk := file.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if signature != ZIP or left:
        raise InputError(f'cut short at {info.filename!r}')
    if crc != info.CRC:
        raise InputError(f'damaged: the checksum of {info.filename!r} does not match')
    return place


def _read_stream(file):
    """The format before torch 1.6: five pickles, then each storage's count and raw data."""
    file.seek(0)
    storages = {}
    interpreter = Interpreter(storages, file.name)
    if interpreter.run(file) != LEGACY_MAGIC:
        raise InputError('no file of torch.save')
    interpreter.run(file)  # protocol version
    if not interpreter.run(file).get('little_endian', True):
        raise InputError('written on a big-endian machine')
    result, keys = interpreter.run(file), interpreter.run(file)
    end = Path(file.name).stat().st_size
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack('<q', file.read(8))
        if count != storage.count:
            raise InputError('a storage is not as long as its tensors say')
        storage.place = file.tell()
        if storage.place + storage.size > end:
            raise InputError('cut short: data of some tensors is missing')
        file.seek(storage.size, 1)
    if any(storage.place is None for storage in storages.values()):
        raise InputError('cut short: data of some tensors is missing')
    return result
