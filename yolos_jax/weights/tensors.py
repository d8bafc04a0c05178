"""Opens files of named tensors, safetensors, torch.save's and numpy's npz, and compares their hashes.

A file is opened once and stays open while tensors are read. No format's code is run, and no file is in
memory as a whole: a tensor is a shape and a function that reads its values.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from yolos_jax import files
from yolos_jax.errors import InputError, StorageError, shown
from yolos_jax.weights import npz, safetensors, torchfile
from yolos_jax.weights.tensor import Tensor

# where training scripts keep the weights, the outermost first
INNER = ('model', 'state_dict', 'teacher', 'module', 'model_ema', 'state_dict_ema', 'ema')
SIDECAR = '.sha256'
# files of a Hugging Face folder, and those beside them that must not change either
SAFETENSORS = 'model.safetensors'
WITH_CONFIG = SAFETENSORS, 'pytorch_model.bin'
CONFIG, PREPROCESSOR = 'config.json', 'preprocessor_config.json'
BESIDE = CONFIG, PREPROCESSOR
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
        return safetensors.read(file), {}
    if start.startswith(b'PK') and (arrays := npz.read(file)):
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
        for line in sidecar.read_text(errors='replace')[:10_000].strip().splitlines() or ['nothing']:
            start, _, name = line.partition(' ')
            # sha256sum -b writes a * before the name
            file = path.with_name(Path(name.strip().removeprefix('*')).name or path.name)
            # a part of a hash, as of a damaged file, would fit others too
            expected.append((sidecar.name, file, start.lower() if len(start) == 64 else 'nothing'))
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
