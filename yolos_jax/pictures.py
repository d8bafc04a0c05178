"""What an image given to a `Detector` may be: a path, a link, an open file, a PIL image or an array."""

import contextlib
import http.client
import string
import urllib.parse
import urllib.request
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from yolos_jax.data import pixels
from yolos_jax.errors import InputError, StorageError

# what an array of another library raises that numpy cannot read (torch's bfloat16, or with a gradient)
NO_ARRAY = TypeError, ValueError, RuntimeError
Picture = np.ndarray | Image.Image | str | Path | bytes | bytearray | BinaryIO
LINK_SECONDS = 30  # to wait for an answer


def opened(image: Picture) -> Picture:
    """The bytes behind an http(s) link or in a file object; other images as they are.

    Raises:
        InputError: they cannot be read (a link: `StorageError`).
    """
    if isinstance(image, str) and image.startswith(('http://', 'https://')):
        try:
            link = urllib.parse.quote(image, safe=string.punctuation)  # spaces, letters that are not ASCII
            with urllib.request.urlopen(link, timeout=LINK_SECONDS) as response:
                return response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise StorageError(f'{image}: cannot be fetched ({error})') from None
    if isinstance(image, bytearray):
        return bytes(image)
    if not isinstance(image, Image.Image) and hasattr(image, 'read'):
        try:
            content = image.read()
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f'an image in an open file cannot be read ({error})') from None
        if isinstance(content, str):
            raise InputError("an image in an open file is text; open the file with 'rb'")
        return content
    return image


def to_rgbx(image: Picture) -> np.ndarray:
    """The pixels of a picture turned upright, RGBX (`data.pixels`); raises InputError as `Detector`."""
    if isinstance(image, str) and '://' in image:
        raise InputError(f'{image}: images are read from files and http(s) links; copy it first')
    if isinstance(image, str | Path):
        return pixels.read_image(Path(image), upright=True)
    if isinstance(image, bytes):
        return pixels.decode(image, 'an image in memory', upright=True)
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
