"""From an image file to the model's patches."""

from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from yolos_jax.data.resize import resize
from yolos_jax.errors import InputError
from yolos_jax.model import PATCH


def read_image(path):
    """The pixels of an image file, uint8 [height, width, 3], not rotated.

    Raises:
        InputError: the file is missing, empty, cut short or no image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    return decode(data, path)


def decode(data, name):
    """The pixels of encoded bytes; `name` is for the message."""
    try:
        if data[:3] == b'\xff\xd8\xff':
            _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours != 'CMYK' and colours != 'YCCK':
                return simplejpeg.decode_jpeg(data, 'RGB')
        with Image.open(BytesIO(data)) as image:
            return np.asarray(image.convert('RGB'))
    except (ValueError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise InputError(f'{name}: not a readable image ({error})') from None


def place(image, geometry, out):
    """Write an image's patches under its geometry (one row of `geometry.draw`) into out [N, 768]."""
    flip = bool(geometry['flip'])
    if geometry['crop']:
        image = resize(image, *geometry['before'].tolist(), geometry['box'].tolist(), flip)
        flip = False
    height, width = geometry['shape'].tolist()
    image = resize(image, height, width, flip=flip)
    rows, columns = height // PATCH, width // PATCH
    cells = image.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
    out[: rows * columns].reshape(rows, columns, PATCH, PATCH, 3)[...] = cells
