"""From an image file to the model's patches."""

from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from yolos_jax.data.resize import resize, resize_to_patches
from yolos_jax.errors import InputError
from yolos_jax.model import PATCH


def read_image(path, upright=False):
    """The pixels of an image file, RGBX uint8 [height, width, 4]; X is anything.

    upright: turn a photograph the way its camera was held (EXIF). Not for data sets: COCO's boxes are
    those of the pixels as they are stored.

    Raises:
        InputError: the file is missing, empty, cut short or no image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    return decode(data, path, upright)


def decode(data, name, upright=False):
    """The pixels of encoded bytes; `name` is for the message."""
    try:
        turned = upright and _orientation(data) != 1
        if data[:3] == b'\xff\xd8\xff' and not turned:
            _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours != 'CMYK' and colours != 'YCCK':
                return simplejpeg.decode_jpeg(data, 'RGBX')
        with Image.open(BytesIO(data)) as image:
            image = ImageOps.exif_transpose(image) if turned else image
            if image.mode.startswith('I;16'):  # Pillow would clip 16 bits to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return rgbx(image.convert('RGB'))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f'{name}: not a readable image ({error})') from None


def _orientation(data):
    with Image.open(BytesIO(data)) as image:
        return image.getexif().get(0x0112, 1)


def rgbx(image):
    """An RGB image, uint8 [height, width, 3] or of Pillow, as RGBX."""
    return np.asarray(Image.fromarray(np.asarray(image)).convert('RGBX'))


def place(image, geometry, out):
    """Write an RGBX image's patches under its geometry (one row of `geometry.draw`) into out [N, 768]."""
    flip = bool(geometry['flip'])
    if geometry['crop']:
        image = resize(image, *geometry['before'].tolist(), geometry['box'].tolist(), flip)
        flip = False
    height, width = geometry['shape'].tolist()
    resize_to_patches(image, height, width, flip, out[: height * width // PATCH**2])
