"""What an image given to a `Detector` may be: a path, a link, an open file, a PIL image or an array."""

import contextlib
import http.client
import string
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from yolos_jax.data import pixels
from yolos_jax.errors import InputError, StorageError

# what an array of another library raises that numpy cannot read (torch's bfloat16, or with a gradient)
NO_ARRAY = TypeError, ValueError, RuntimeError


class Array(Protocol):
    """An array of numpy, JAX or torch."""

    def __array__(self) -> Any:
        """The array as numpy's."""


Picture = Array | Image.Image | str | Path | bytes | bytearray | BinaryIO
NAME = 'an image in memory'  # in messages
LINK_SECONDS, LINK_BYTES = 30, 1 << 28  # to wait for an answer, and the most that is read


def opened(image: Picture) -> Picture:
    """The bytes behind an http(s) link or in a file object; other images as they are.

    Raises:
        InputError: they cannot be read (a link: `StorageError`).
    """
    if isinstance(image, str) and image.startswith(('http://', 'https://')):
        return _fetched(image)
    if isinstance(image, bytearray):
        return bytes(image)
    if isinstance(image, Image.Image) or not hasattr(image, 'read'):
        return image
    try:
        content = image.read()
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f'an image in an open file cannot be read ({error})') from None
    if isinstance(content, str):
        raise InputError("an image in an open file is text; open the file with 'rb'")
    if hasattr(content, '__await__'):  # FastAPI's UploadFile
        content.close()
        raise InputError('an image in an open file is read by await; give the bytes, or upload.file')
    if isinstance(content, bytes) and not content:
        raise InputError('an open file has no bytes left; seek(0) if it was read before')
    return content


def _fetched(link: str) -> bytes:
    """What is behind a link; raises StorageError."""
    try:
        quoted = urllib.parse.quote(link, safe=string.punctuation)  # spaces, letters that are not ASCII
        with urllib.request.urlopen(quoted, timeout=LINK_SECONDS) as response:
            content = response.read(LINK_BYTES + 1)
        if len(content) > LINK_BYTES:
            raise ValueError(f'it has more than {LINK_BYTES >> 20} MiB')
        if missing := getattr(response, 'length', None):  # a link may lead to FTP, which has none
            raise http.client.IncompleteRead(content, missing)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise StorageError(f'{link}: cannot be fetched ({error})') from None
    return content


def decoded(image: Picture, name: str = NAME) -> np.ndarray:
    """The pixels of a picture turned upright, RGBX (`data.pixels`).

    name: of bytes, for the message.

    Raises:
        InputError: as `Detector`.
    """
    if isinstance(image, str) and '://' in image:
        raise InputError(f'{image}: images are read from files and http(s) links; copy it first')
    if isinstance(image, str | Path):
        return pixels.read_image(Path(image), upright=True)
    if isinstance(image, bytes):
        return pixels.decode(image, name, upright=True)
    if isinstance(image, Image.Image):
        try:
            return pixels.from_pillow(image, upright=True)
        except pixels.UNREADABLE as error:
            raise InputError(f'an image cannot be read ({error})') from None
    if hasattr(image, '__array__'):  # of JAX or torch too
        try:
            array = np.asarray(image)
        except NO_ARRAY as error:
            raise InputError(f'an image is no array that numpy can read ({error})') from None
        return pixels.from_array(array)
    raise InputError(
        f'an image is {type(image).__name__}; give an array, a PIL image, a path or the bytes of a file, '
        'or a list of them; many go through `stream`'
    )


def in_memory(image: Picture) -> Picture:
    """The bytes of an open file or bytearray; links are fetched later, by the threads."""
    if not isinstance(image, str):
        with contextlib.suppress(InputError):  # reading it raises the error
            return opened(image)
    return image


def copied(image: Picture) -> Picture:
    """A copy of an image in memory, so that the caller may change the original; a path as it is."""
    image = in_memory(image)
    if isinstance(image, Image.Image):
        try:
            copy = image.copy()
        except pixels.UNREADABLE:
            return image  # reading it raises the error
        copy.format = image.format
        return copy
    if hasattr(image, '__array__'):
        with contextlib.suppress(*NO_ARRAY):  # reading it raises the error
            return np.array(image)
    return image


def loaded(image: Picture) -> Picture:
    """The image, loaded now: Pillow reads a file at its first use, which is not thread-safe."""
    image = in_memory(image)
    if isinstance(image, Image.Image):
        with contextlib.suppress(*pixels.UNREADABLE):
            image.load()
    return image
