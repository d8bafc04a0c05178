"""Decodes image files, and writes their pixels as the model's patches.

Pixels are RGBX, uint8 [height, width, 4]; the fourth byte is ignored: `resize` works on whole vectors.
"""

import contextlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from yolos_jax import file_names, files
from yolos_jax.data.geometry import Geometry
from yolos_jax.data.resize import resize, resize_to_patches
from yolos_jax.errors import InputError

EXIF_ORIENTATION, END_OF_JPEG = 0x0112, b'\xff\xd9'
# endings of image files
ENDINGS = tuple('.jpg .jpeg .jfif .png .webp .avif .bmp .tif .tiff .gif .ppm .pgm'.split())
# Pillow's readers of these; others start programs (EPS: Ghostscript), or raise any error for damage (QOI)
FORMATS = 'JPEG', 'PNG', 'WEBP', 'AVIF', 'BMP', 'TIFF', 'GIF', 'PPM', 'JPEG2000'
# by EXIF orientation: what undoes the turning of a TIFF by Pillow
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# what Pillow and simplejpeg raise, SyntaxError for a broken PNG and RuntimeError for an AVIF
UNREADABLE = ValueError, OSError, SyntaxError, RuntimeError, Image.DecompressionBombError


def is_image(name: str) -> bool:
    """Whether a file in a folder is an image, by its name there; hidden files and folders do not count."""
    return name.lower().endswith(ENDINGS) and not file_names.is_hidden(name)


def read_image(path: Path, upright: bool = False) -> np.ndarray:
    """The pixels of an image file, RGBX.

    upright: turn a photograph the way its camera was held (EXIF).

    Raises:
        InputError: the file is missing, empty, cut short, no image, or larger than Pillow's limit.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f'{path}: {getattr(error, "strerror", error)}') from None
    return decode(data, path, upright)


def size(data: bytes, name: str | Path) -> tuple[int, int]:
    """The (height, width) of encoded bytes as they are stored, from their header alone."""
    with _naming(name):
        if _is_jpeg(data):
            with _left_to_pillow():
                return simplejpeg.decode_jpeg_header(data)[:2]
        with _opened(data) as image:
            return image.size if _pillow_turns(image) in range(5, 9) else (image.height, image.width)


def upright_size(path: Path) -> tuple[int, int]:
    """The (height, width) of an image file turned upright as its EXIF says, from its header alone."""
    with _naming(path), open(path, 'rb', opener=files.without_waiting) as file:
        image = Image.open(file, formats=FORMATS)
        turned = not _pillow_turns(image) and _orientation(image) in range(5, 9)
        return image.size if turned else (image.height, image.width)


def _pillow_turns(image: Image.Image) -> int:
    """The EXIF orientation of an image that Pillow turns upright as it loads it, a TIFF; else 0."""
    value = image.tag_v2.get(EXIF_ORIENTATION) if image.format == 'TIFF' else 0
    return value if value in STORED else 0


def decode(data: bytes, name: str | Path, upright: bool = False) -> np.ndarray:
    """As `read_image`, of encoded bytes; `name` is for the message."""
    with _naming(name):
        if _is_jpeg(data):
            with _left_to_pillow():
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                _check_size(height, width)
                if colours not in ('CMYK', 'YCCK'):
                    return _turned(_decode_jpeg(data), orientation(data) if upright else 1)
        with _opened(data) as image:
            return from_pillow(image, upright)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise InputError('not a readable image (empty)')
    return Image.open(BytesIO(data), formats=FORMATS)


def from_pillow(image: Image.Image, upright: bool = False) -> np.ndarray:
    """The pixels of an image of Pillow, RGBX; upright: as for `read_image`.

    Raises:
        InputError: it is larger than Pillow's limit, or its pixels have 32 bits.
    """
    _check_size(image.height, image.width)
    if image.mode == 'I' and image.format == 'PPM':  # Pillow's mode for a PGM of 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if not upright and (turn := _pillow_turns(image)):
        image = image.transpose(STORED[turn])
    if upright:
        image.load()  # raises for damaged pixels; Pillow reads them as black once an error was ignored
        with contextlib.suppress(*UNREADABLE):  # unreadable EXIF data are ignored
            image = ImageOps.exif_transpose(image)
    if image.mode in ('F', 'I'):
        raise InputError('its pixels have 32 bits; save it with 8 or 16')
    if image.mode.startswith('I;16'):  # Pillow would clip 16 bits to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return to_rgbx(image.convert('RGB'))


def from_array(image: np.ndarray) -> np.ndarray:
    """The pixels of an array, RGBX: uint8 or uint16, [height, width] or with 1, 3 or 4 channels.

    Gray, transparent and 16-bit arrays are converted like files with these pixels.

    Raises:
        InputError: it has another type or shape.
    """
    channels, image = image.shape[2:], np.asarray(image, image.dtype.newbyteorder('='))
    shaped = image.ndim > 1 and channels in ((), (1,), (3,), (4,))
    if image.dtype not in (np.uint8, np.uint16) or not shaped or not image.size:
        first = image.ndim == 3 and len(image) in (1, 3, 4) and channels not in ((1,), (3,), (4,))
        advice = ' (channels come last: x.transpose(1, 2, 0), or permute)' if first else ''
        raise InputError(
            f'an image is {image.dtype} {list(image.shape)}{advice}; give uint8 or uint16 '
            '[height, width] or [height, width, 1, 3 or 4] (of values in 0..1: '
            '(255 * x).round().astype(np.uint8)), a PIL image or a path; several as a list'
        )
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    image = image[..., 0] if channels == (1,) else image
    return to_rgbx(Image.fromarray(image).convert('RGB'))


def decode_sized(data: bytes, name: str, size: tuple[int, int], upright: bool = False) -> np.ndarray:
    """As `decode`, for an image with the (height, width) given in the annotations.

    Boxes refer to the stored pixels, as COCO's do, or to the photograph turned upright if only that has the
    annotated size. upright: they always refer to the photograph turned upright.

    Raises:
        InputError: as `decode`, and where the image has another size.
    """
    height, width = size
    image = decode(data, name, upright)
    if not upright and image.shape[:2] != (height, width) and image.shape[1::-1] == (height, width):
        image = decode(data, name, upright=True)
    if image.shape[:2] != (height, width):
        actual = f'{image.shape[0]}x{image.shape[1]}'
        raise InputError(f'{name}: is {actual}, but {height}x{width} in the annotations')
    return image


@contextlib.contextmanager
def _naming(name: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f'{name}: {error}') from None
    except UnidentifiedImageError:
        raise InputError(f'{name}: not a readable image (none of {", ".join(FORMATS)})') from None
    except UNREADABLE as error:
        raise InputError(f'{name}: not a readable image ({error})') from None


@contextlib.contextmanager
def _left_to_pillow() -> Iterator[None]:
    """Ignores simplejpeg's error for rare chroma subsamplings, which Pillow can decode."""
    try:
        yield
    except ValueError as error:
        if 'subsampling' not in str(error):
            raise


def _decode_jpeg(data: bytes) -> np.ndarray:
    """RGBX pixels; libjpeg gives one warning for damage and for the padding that some cameras write."""
    try:
        return simplejpeg.decode_jpeg(data, 'RGBX')
    except ValueError as error:
        if 'extraneous bytes' not in str(error) or not data.endswith(END_OF_JPEG):
            raise
        whole = data.removesuffix(END_OF_JPEG).rstrip(b'\x00\xff') + END_OF_JPEG
        return simplejpeg.decode_jpeg(whole, 'RGBX')


def _turned(image: np.ndarray, turn: int) -> np.ndarray:
    """Stored pixels turned upright; turn: their EXIF orientation."""
    image = image.swapaxes(0, 1) if turn > 4 else image
    image = image[::-1] if turn in (3, 4, 7, 8) else image
    return np.ascontiguousarray(image[:, ::-1] if turn in (2, 3, 6, 7) else image)


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b'\xff\xd8\xff'


def _check_size(height: int, width: int) -> None:
    if not height or not width:
        raise InputError(f'not a readable image ({height}x{width} pixels)')
    if height * width > (Image.MAX_IMAGE_PIXELS or np.inf):  # 89 million; Pillow itself only warns
        raise InputError(f'not a readable image ({height}x{width} pixels: could be a decompression bomb)')


def orientation(data: bytes) -> int:
    """The EXIF orientation of encoded bytes: 1 for an image that is stored upright, or does not say."""
    try:
        with _opened(data) as image:
            return _orientation(image)
    except (InputError, *UNREADABLE):
        return 1


def _orientation(image: Image.Image) -> int:
    """As `orientation`; EXIF data that cannot be read say nothing."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except UNREADABLE:
        return 1
    return value if value in range(1, 9) else 1


def to_rgbx(image: np.ndarray | Image.Image) -> np.ndarray:
    """An RGB image, uint8 [height, width, 3] or of Pillow, as RGBX."""
    return np.asarray(Image.fromarray(np.asarray(image)).convert('RGBX'))


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An RGBX image as RGB, uint8 [height, width, 3]."""
    return np.ascontiguousarray(image[..., :3])


def place(image: np.ndarray, geometry: Geometry, out: np.ndarray) -> None:
    """Write an RGBX image's patches under its geometry into out [N, 768]."""
    flip = bool(geometry.flip)
    if geometry.crop:
        image = resize(image, *geometry.before.tolist(), box=geometry.box.tolist(), flip=flip)
        flip = False
    height, width = geometry.shape.tolist()
    resize_to_patches(image, height, width, flip=flip, out=out[: geometry.counts])
