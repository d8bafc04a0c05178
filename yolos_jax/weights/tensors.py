"""Files of named tensors: safetensors, torch.save's and numpy's npz, read one tensor at a time.

A file is opened once and stays open while tensors are read. No format's code is run, and no file is in
memory as a whole: a tensor is a shape and a function that reads its values.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError, StorageError, shown
from yolos_jax.weights import torchfile
from yolos_jax.weights.unpickle import Tensor

# where training scripts keep the weights, the outermost first
INNER = ('model', 'state_dict', 'teacher', 'module', 'model_ema', 'state_dict_ema', 'ema')
MOST_PACKED = 20  # times its size that an .npz may unpack to
NPZ_DAMAGED = (  # what numpy and zipfile raise for an .npz that is
    OSError, ValueError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
SAFETENSORS_TYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip
SIDECAR = '.sha256'
# files of a Hugging Face folder, and those beside them that must not change either
SAFETENSORS = 'model.safetensors'
WITH_CONFIG = SAFETENSORS, 'pytorch_model.bin'
CONFIG, PREPROCESSOR = 'config.json', 'preprocessor_config.json'
BESIDE = CONFIG, PREPROCESSOR
LARGEST_HEADER = 100_000_000  # of a safetensors file, as its own library has it
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$')


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file of tensors.

    tensors: {name: object with .shape and .numpy()}. about: what else the file says, a dict. note: what a
    reader should know of its checksum.
    """

    path: Path
    tensors: dict
    about: dict
    sha256: str
    close: Callable[[], None]
    note: str = ''

    def beside(self, name: str) -> dict:
        """The JSON object in a file beside this one; empty if there is none.

        Raises:
            InputError: it cannot be read, or is another kind of JSON.
        """
        try:
            content = json.loads((self.path.parent / name).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f'{name} cannot be read ({error})') from None
        if not isinstance(content, dict):
            raise InputError(f'{name} holds no JSON object')
        return content


def read(path: str | Path) -> TensorFile:
    """Open a file and find its tensors.

    Raises:
        InputError: it is missing, damaged or of another kind, holds no tensors, or is not the file whose
            SHA-256 its name (`deit_tiny_patch16_224-a1311bcf.pth`) or `FILE.sha256` gives.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f'{path}: not a regular file')
    try:
        with contextlib.ExitStack() as opened:  # closes the file if what follows fails
            file = opened.enter_context(open(path, 'rb'))
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
            has_hash = _check_hash(path, digest)
            tensors, about = _find_tensors(file)
            if not tensors:
                raise InputError(f'{path}: has no tensors')
            file.seek(0)
            is_zip = file.read(2) == b'PK'  # zip files have CRCs
            note = '' if has_hash or is_zip else _note_hash(path, digest)
            opened.pop_all()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    return TensorFile(path, tensors, about, digest, file.close, note)


def _find_tensors(file: BinaryIO) -> tuple[dict, dict]:
    """The tensors of an open file, and what else it says."""
    file.seek(0)
    start = file.read(9)
    if start == b'version h':  # tps://git-lfs.github.com/spec/v1
        raise InputError(f'{file.name}: a pointer of Git LFS; `git lfs pull` fetches the weights')
    if start[8:9] == b'{':  # safetensors: the length of a header, then JSON
        return _read_safetensors(file), {}
    if start.startswith(b'PK') and (arrays := _read_npz(file)):
        return arrays, {}
    return _read_torch(file)


def summary(names: Iterable[str]) -> str:
    """Names of tensors in a line, numbered ones once."""
    return ', '.join(dict.fromkeys(re.sub(r'(?<=[._])\d+(?=[./])', '*', name) for name in names))


def write_hash(path: Path, *others: Path, digest: str | None = None) -> None:
    """Write `path`.sha256, as sha256sum does: the hashes that are compared when `path` is read.

    digest: the one of `path`, if it is known.
    """
    hashes = [digest or files.sha256(path), *map(files.sha256, others)]
    lines = [f'{value}  {file.name}\n' for value, file in zip(hashes, (path, *others), strict=True)]
    files.write(path.with_name(path.name + SIDECAR), ''.join(lines).encode())


def _check_hash(path: Path, digest: str) -> bool:
    """Raises InputError if the file does not match its hashes; returns whether it has any."""
    in_name = _HASH_IN_NAME.search(path.name)
    expected = []  # (who says it, of which file, how the hash begins)
    if in_name and not (in_name[1].isdigit() and len(in_name[1]) < 64):  # digits alone: a date, or a count
        expected.append((path.name, path, in_name[1]))
    # Hugging Face's cache names files by their hash
    blob = path.resolve().name if path.is_symlink() else ''
    if re.fullmatch(r'[0-9a-f]{64}', blob):
        expected.append(("Hugging Face's hub", path, blob))
    sidecar = path.with_name(path.name + SIDECAR)
    if sidecar.exists():
        for line in sidecar.read_text()[:10_000].strip().splitlines() or ['nothing']:
            start, _, name = line.partition(' ')
            # sha256sum -b writes a * before the name
            file = path.with_name(Path(name.strip().removeprefix('*')).name or path.name)
            expected.append((sidecar.name, file, start.lower()))
    for source, file, start in expected:
        actual = digest if file == path else files.sha256(file) if file.exists() else 'none'
        if not actual.startswith(start):
            advice = f'if you saved it anew, remove {source}; else ' if source == sidecar.name else ''
            raise InputError(  # the advice first, for long messages are cut
                f'{file}: damaged, or another file: {advice}fetch it again (its SHA-256 is {actual}, and '
                f'{source} says {start[:64]})'
            )
    return bool(expected)


def _note_hash(path: Path, digest: str) -> str:
    """Write the hashes of a file without checksums of its own, for the next time; says what was done."""
    beside = [path.with_name(name) for name in BESIDE if path.with_name(name).is_file()]
    try:
        write_hash(path, *(beside if path.name in WITH_CONFIG else []), digest=digest)
    except (OSError, StorageError):
        return 'has no checksum, and none can be written beside it: damage would not be noticed'
    return f'had no checksum: {path.name}{SIDECAR} was written, and is compared from now on'


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
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
            if entry['dtype'] not in SAFETENSORS_TYPES:
                raise InputError(f'{file.name}: {name} is of type {entry["dtype"]}, which is not read')
            dtype, shape = np.dtype(SAFETENSORS_TYPES[entry['dtype']]), tuple(entry['shape'])
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


def _read_npz(file: BinaryIO) -> dict[str, Tensor]:
    """The arrays of an .npz; nothing if it is another zip archive."""
    try:
        archive = zipfile.ZipFile(file)
        members = [m for m in archive.infolist() if m.filename.endswith('.npy')]
        if sum(m.file_size for m in members) > MOST_PACKED * os.fstat(file.fileno()).st_size:
            raise ValueError(f'it unpacks to more than {MOST_PACKED} times its size, as no weights do')
        headers = {m.filename: _npy_header(archive, m) for m in members}
    except NPZ_DAMAGED as error:
        raise InputError(f'{file.name}: damaged ({error})') from None
    return {
        name.removesuffix('.npy'): Tensor(shape, functools.partial(_npy_values, archive, name, dtype))
        for name, (shape, dtype) in headers.items()
    }


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple, np.dtype]:
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


def _npy_values(archive: zipfile.ZipFile, member: str, dtype: np.dtype) -> np.ndarray:
    try:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False).view(dtype)
    except NPZ_DAMAGED as error:
        raise InputError(f'{archive.filename}: damaged at {member} ({error})') from None


def _read_torch(file: BinaryIO) -> tuple[dict, dict]:
    content = torchfile.read(file)
    if not isinstance(content, dict):
        raise InputError(f'{file.name}: holds a {type(content).__name__}, not weights')
    about = {}
    for _ in range(len(INNER)):  # a dict may hold itself
        inner = next((key for key in INNER if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        about |= {key: value for key, value in content.items() if key != inner}
        content = content[inner]
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        has = shown(content) or 'nothing'
        raise InputError(f'{file.name}: has no tensors, nor do its {", ".join(INNER)}; it has {has}')
    return tensors, about


def write_safetensors(path: str | Path, tensors: dict) -> None:
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
