"""Published weights by name: repositories of Hugging Face, and files of the projects that made them.

An existing path always takes precedence over a name.
"""

import contextlib
import fcntl
import os
import re
import urllib.error
import urllib.request
from pathlib import Path, PurePath

from yolos_jax import bucket, files
from yolos_jax.errors import InputError
from yolos_jax.progress_bar import progress_bar
from yolos_jax.weights import checkpoint, deit
from yolos_jax.weights.tensors import BESIDE, WITH_CONFIG

REPOSITORY = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')  # NAME or NAME@REVISION
CHUNK = 1 << 20  # bytes
STEP = re.compile(rf'({checkpoint.FOLDER}/)?\d+/{bucket.COMMITTED}')  # marks a complete step
SUFFIXES = '.json', '.safetensors', '.bin', '.pth', '.sha256', '.npz'
ELSEWHERE = 'hf download {} --local-dir FOLDER'  # the hub's own command

DETECTORS = {  # repositories at Hugging Face: the paper's AP on COCO val2017, of 100, and its shorter side
    'hustvl/yolos-tiny': (28.7, 512), 'hustvl/yolos-small': (36.1, 800), 'hustvl/yolos-base': (42.0, 800),
    'hustvl/yolos-small-300': (36.1, 800), 'hustvl/yolos-small-dwr': (37.6, 800),
}  # fmt: skip
_META = 'https://dl.fbaipublicfiles.com/'
FILES = {  # names of files: the links of their folders
    'deit_tiny_patch16_224-a1311bcf.pth': f'{_META}deit/',
    'deit_small_patch16_224-cd65a155.pth': f'{_META}deit/',
    'deit_base_distilled_patch16_384-d0272ac0.pth': f'{_META}deit/',
    'dino_deitsmall16_pretrain.pth': f'{_META}dino/dino_deitsmall16_pretrain/',
    'dino_vitbase16_pretrain.pth': f'{_META}dino/dino_vitbase16_pretrain/',
    'dinov2_vits14_reg4_pretrain.pth': f'{_META}dinov2/dinov2_vits14/',
    'dinov2_vitb14_reg4_pretrain.pth': f'{_META}dinov2/dinov2_vitb14/',
    'dinov2_vitl14_reg4_pretrain.pth': f'{_META}dinov2/dinov2_vitl14/',
}


def local(name: str | Path) -> Path:
    """The path of weights: an existing path, or else a download by name in a cache.

    Raises:
        InputError: it is a name, and its files are neither in the cache nor can be fetched.
    """
    if bucket.is_url(name):
        return from_bucket(name)
    path, name = Path(name), str(name)
    if path.exists():
        return path
    if name in FILES:
        return fetch(name, FILES[name], files.cache())
    if match := REPOSITORY.fullmatch(name):
        return snapshot(*match.groups())
    if '://' in name:
        raise InputError(f'{name}: weights are not read from a link; give a name such as hustvl/yolos-tiny')
    return path


def from_bucket(url: str) -> Path:
    """A copy of a file or folder of weights in a bucket, in the cache.

    Of a workdir or a folder of checkpoints the complete steps and deit.pth are fetched, of a step's folder
    all files, of any other the files of weights directly in it. Unchanged copies are not fetched again.

    Raises:
        InputError: there is no such object, or it cannot be fetched.
    """
    parent, _, name = url.rstrip('/').rpartition('/')
    folder = bucket.Bucket(url)
    names = folder.names()
    if not names and not bucket.is_url(parent):
        raise InputError(f'{url}: no such file or folder in the bucket')
    if not names:
        return bucket.Bucket(parent).copy([name], files.cache()) / name
    if bucket.COMMITTED in names and name.isdecimal():  # a step, which is read from the folder of all steps
        return bucket.Bucket(parent).copy([f'{name}/{n}' for n in names], files.cache()) / name
    if steps := [PurePath(n).parent.parent for n in names if STEP.fullmatch(n)]:
        wanted = [n for n in names if n == deit.FILE or any(step in PurePath(n).parents for step in steps)]
    else:
        wanted = [n for n in names if '/' not in n and Path(n).suffix in SUFFIXES]
    return folder.copy(wanted, files.cache())


def snapshot(repository: str, revision: str | None = None) -> Path:
    """The folder of a repository's detector in Hugging Face's cache, where it is fetched to if missing.

    The hub's client resumes interrupted downloads, and heeds HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME.

    Raises:
        InputError: it is neither in the cache nor can be fetched.
    """
    import huggingface_hub  # here, since it takes half a second

    name = f'{repository}@{revision}' if revision else repository
    try:
        for weights in WITH_CONFIG:  # the second if the first does not exist
            wanted = [*BESIDE, weights]
            folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
            if Path(folder, weights).exists():
                return Path(folder)
    except Exception as error:  # the client has no common error, and its HTTP library others
        option = f' --revision {revision}' if revision else ''
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise InputError(
            f'{name}: no such file or folder, and no repository of this name can be fetched ({reason}); '
            f'on a machine with a network: {ELSEWHERE.format(repository + option)}'
        ) from None
    raise InputError(f'{name}: this repository has neither {" nor ".join(WITH_CONFIG)}')


def fetch(name: str, link: str, folder: Path) -> Path:
    """A file in a cache folder, fetched from below a link if it is missing.

    An interrupted download is resumed. The hash that is part of a name is compared when the file is read.

    Raises:
        InputError: it cannot be fetched.
    """
    path, part = folder / name, folder / f'{name}.part'
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f'{name}.lock', 'w') as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process fetches, and the others wait
            if not path.exists():
                _download(link + name, part)
                os.replace(part, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'reason', None) or error
        raise InputError(
            f'{name}: no such file, and {link}{name} cannot be fetched ({reason}); where there is a '
            f'network: curl -LO {link}{name}'
        ) from None
    return path


def _download(link: str, part: Path) -> None:
    """Append what is missing of a file; raises OSError if it ends too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(link, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get('Content-Range') == f'bytes */{have}':  # there is nothing after what we have
            return
        part.unlink()  # not a part of this file
        _download(link, part)
        return
    with response, open(part, 'ab') as out:
        if response.status != 206:  # the server sends it from the beginning
            have = out.seek(0)  # else `tell` counts from where the part ended
            out.truncate()
        total = have + int(response.headers.get('Content-Length') or 0)
        with progress_bar(total=total, initial=have, unit='B', unit_scale=True, desc=part.stem) as bar:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
        if out.tell() != total:
            raise OSError(f'it ended after {out.tell()} of {total} bytes')
