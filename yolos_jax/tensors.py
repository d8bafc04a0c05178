"""Files of named tensors: safetensors, torch.save's and numpy's npz, read one tensor at a time.

No format's code is run, and no file is in memory as a whole: a tensor is a shape and a function that
reads its values.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from yolos_jax import torchfile, unpickle
from yolos_jax.errors import InputError

# where training scripts keep the weights, the outermost first
INNER = ('model', 'state_dict', 'teacher', 'module')
MOST_PACKED = 20
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$')


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read or computed when `numpy()` is called."""

    shape: tuple
    numpy: Callable


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """tensors: {name: object with .shape and .numpy()}. about: what else the file says, a dict."""

    path: Path
    tensors: dict
    about: dict
    sha256: str


def read(path):
    """The tensors of a file.

    Raises:
        InputError: it is missing, damaged or of another kind, holds no tensors, or is not the file whose
            SHA-256 its name (`deit_tiny_patch16_224-a1311bcf.pth`) or `FILE.sha256` gives.
    """
    path = Path(path)
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
        digest = sha256(path)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    _check_hash(path, digest)
    about = {}
    if start[8:9] == b'{':  # safetensors: the length of a header, then JSON
        found = _read_safetensors(path)
    elif start.startswith(b'PK') and (arrays := _read_npz(path)):
        found = arrays
    else:
        found, about = _read_torch(path)
    if not found:
        raise InputError(f'{path}: no tensors in it')
    return TensorFile(path, found, about, digest)


def sha256(path):
    """A file's SHA-256 in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_hash(path, digest):
    said = _HASH_IN_NAME.search(path.name)
    wanted = (
        {path.name: said[1]} if said and not re.fullmatch(r'\d{8}', said[1]) else {}
    )  # 8 digits: a date
    sidecar = path.with_name(path.name + '.sha256')
    if sidecar.exists():
        wanted[sidecar.name] = (sidecar.read_text().split() or ['nothing'])[0].lower()
    for source, start in wanted.items():
        if not digest.startswith(start):
            raise InputError(
                f'{path}: damaged, or another file: its SHA-256 is {digest}, and {source} says {start}; '
                'fetch it again'
            )


def _read_safetensors(path):
    def values(name):
        with _safetensors(path) as file:  # opened anew: its pages would all stay in memory
            return file.get_tensor(name)

    with _safetensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return {name: Tensor(shape, lambda name=name: values(name)) for name, shape in shapes.items()}


def _safetensors(path):
    try:
        return safetensors.safe_open(path, 'numpy')
    except safetensors.SafetensorError as error:
        raise InputError(f'{path}: damaged, or no safetensors file ({error})') from None


def _read_npz(path):
    """The arrays of an .npz; nothing if it is another zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith('.npy')]
            if sum(m.file_size for m in members) > MOST_PACKED * path.stat().st_size:
                raise ValueError(f'it unpacks to more than {MOST_PACKED} times its size, as no weights do')
            headers = {m.filename: _npy_header(archive, m) for m in members}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f'{path}: damaged ({error})') from None

    def values(member, dtype):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return archive[member].view(dtype)
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f'{path}: damaged at {member} ({error})') from None

    return {
        member.removesuffix('.npy'): Tensor(shape, lambda member=member, dtype=dtype: values(member, dtype))
        for member, (shape, dtype) in headers.items()
    }


def _npy_header(archive, member):
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


def _read_torch(path):
    content = torchfile.read(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: holds a {type(content).__name__}, not weights')
    about = {}
    while inner := next((key for key in INNER if isinstance(content.get(key), dict)), None):
        about |= {key: value for key, value in content.items() if key != inner}
        content = content[inner]
    return {k: v for k, v in content.items() if isinstance(v, unpickle.Tensor)}, about


def write_safetensors(path, found):
    """Write tensors {name: object with .shape and .numpy()} as float32, one at a time.

    The safetensors package takes all of them in memory at once.
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in found.items():
        size = 4 * math.prod(tensor.shape)
        header[name] = {
            'dtype': 'F32',
            'shape': list(tensor.shape),
            'data_offsets': [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in found.values():
            file.write(np.ascontiguousarray(tensor.numpy(), '<f4').data)
        file.flush()
        os.fsync(file.fileno())
