import io

import numpy as np
import pytest
from helpers import noise
from PIL import Image, ImageOps

from yolos_jax.data import geometry, pixels
from yolos_jax.errors import InputError
from yolos_jax.patches import unpatchify


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(mode='RGB'):
    return Image.fromarray(noise(6, 8)).resize((80, 60), Image.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ('mode', 'kind'),
    [('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGB', 'PNG'), ('L', 'PNG'), ('P', 'PNG'),
     ('1', 'PNG'), ('LA', 'PNG'), ('RGBA', 'PNG')],
)  # fmt: skip
def test_every_mode_becomes_rgb_as_pillow_makes_it(mode, kind):
    data = encode(smooth(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    np.testing.assert_array_equal(pixels.decode(data, 'x')[..., :3], expected)


@pytest.mark.parametrize('kind', ['PNG', 'PPM'])
def test_sixteen_bits_become_eight(kind):
    grey = np.arange(0, 65536, 16, np.uint16).reshape(64, 64)
    decoded = pixels.decode(encode(Image.fromarray(grey), kind), 'x')[..., :3]
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None] >> 8, 3, axis=2))


def test_images_of_any_size_are_read_where_pillow_has_no_limit(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert pixels.decode(encode(smooth(), 'PNG'), 'x').shape == (*smooth().size[::-1], 4)


def test_the_bytes_of_a_file_as_an_array_are_no_image():
    data = np.frombuffer(encode(smooth(), 'PNG'), np.uint8)
    with pytest.raises(InputError, match=rf'uint8 \[{data.size}\]; give'):
        pixels.from_array(data)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_is_turned_upright_where_that_is_asked_for(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth().save(tmp_path / 'x.jpg', exif=exif)
    stored = Image.open(tmp_path / 'x.jpg')
    np.testing.assert_array_equal(pixels.read_image(tmp_path / 'x.jpg')[..., :3], np.asarray(stored))
    upright = pixels.read_image(tmp_path / 'x.jpg', upright=True)[..., :3]
    np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(stored)))
    assert (upright.shape[:2] == (80, 60)) == (orientation > 4)


def test_a_huge_image_is_read(tmp_path):
    """73 million pixels, just below the limit."""
    Image.fromarray(np.full((8000, 9100), 77, np.uint8)).save(tmp_path / 'x.png')
    image = pixels.read_image(tmp_path / 'x.png')
    assert image.shape == (8000, 9100, 4) and (image[::500, ::500, :3] == 77).all()


@pytest.mark.row('damaged images', count=500)
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'AVIF'])
def test_damaged_files_are_named_or_decode_and_never_crash(kind):
    """Bits flipped, cut short, and filled with noise, 500 of each kind of file."""
    rng, refused = np.random.default_rng(0), 0
    whole = encode(smooth(), kind)
    for i in range(500):
        data = bytearray(whole)
        if i % 3 == 0:
            data = data[: rng.integers(len(data))]
        elif i % 3 == 1:
            for place in rng.integers(len(data), size=rng.integers(1, 20)):
                data[place] ^= 1 << rng.integers(8)
        else:
            begin = rng.integers(len(data))
            data[begin : begin + 40] = rng.bytes(40)
        try:
            image = pixels.decode(bytes(data), 'the file')
        except InputError as error:
            refused += 1
            assert str(error).startswith('the file: ') and '\n' not in str(error)
        else:
            assert 1 <= pixels.orientation(bytes(data)) <= 8
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 4
    assert refused > 200


@pytest.mark.parametrize('upright', [False, True])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_a_damaged_photograph_is_refused_whether_it_is_turned_or_not(kind, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.fromarray(noise(96, 128)), kind, exif=exif))
    middle = len(data) // 2
    data[middle : middle + 999] = bytes(999)
    with pytest.raises(InputError):
        pixels.decode(bytes(data), 'x', upright)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('upright', [False, True])
def test_pixels_are_oriented_to_match_the_annotated_size(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(), 'JPEG', exif=exif)
    stored = Image.open(io.BytesIO(data))
    size = (80, 60) if upright else (60, 80)
    if upright and orientation < 5:
        with pytest.raises(InputError, match='x: is 60x80, but 80x60 in the annotations'):
            pixels.decode_sized(data, 'x', size)
    else:
        expected = ImageOps.exif_transpose(stored) if upright else stored
        decoded = pixels.decode_sized(data, 'x', size)[..., :3]
        np.testing.assert_array_equal(decoded, np.asarray(expected))


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_an_image_is_read_as_it_is_stored_or_upright_whatever_its_format(orientation, kind):
    exif = Image.Exif()
    exif[pixels.EXIF_ORIENTATION] = orientation
    stored = smooth()
    data = encode(stored, kind, exif=exif)
    turned = stored.copy()
    turned.getexif()[pixels.EXIF_ORIENTATION] = orientation
    for upright, expected in ((False, stored), (True, ImageOps.exif_transpose(turned))):
        np.testing.assert_array_equal(pixels.decode(data, 'x', upright)[..., :3], np.asarray(expected))
    assert pixels.size(data, 'x') == (60, 80)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_the_size_is_read_from_the_header(kind):
    data = encode(smooth(), kind)
    assert pixels.size(data[: len(data) // 2], 'x') == (60, 80)
    with pytest.raises(InputError, match='x: not a readable image'):
        pixels.size(data[:15], 'x')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_an_image_of_absurd_size_is_named(kind, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    with pytest.raises(InputError, match='x: not a readable image .*bomb'):
        pixels.decode(encode(smooth(), kind), 'x')


@pytest.mark.parametrize('options', [{'progressive': True}, {'subsampling': 0}, {'quality': 40}])
def test_jpeg_is_decoded_as_pillow_does(options):
    data = encode(smooth(), 'JPEG', **options)
    np.testing.assert_array_equal(
        pixels.decode(data, 'x')[..., :3], np.asarray(Image.open(io.BytesIO(data)))
    )


@pytest.mark.parametrize('kind', ['padding before the end', 'rare subsampling', 'YCCK'])
def test_unusual_jpegs_are_read_as_pillow_does(kind):
    data = bytearray(encode(smooth('CMYK' if kind == 'YCCK' else 'RGB'), 'JPEG', subsampling=0))
    if kind == 'YCCK':
        data[data.index(b'Adobe') + 11] = 2
    elif kind == 'rare subsampling':
        data[data.index(b'\xff\xc0') + 11] = 0x31  # of the brightness
    else:
        data[-2:-2] = b'\0' * 99
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    np.testing.assert_array_equal(pixels.decode(bytes(data), 'x')[..., :3], expected)
    assert pixels.size(bytes(data), 'x') == expected.shape[:2]


def test_a_jpeg_with_foreign_bytes_in_it_is_refused():
    data = bytearray(encode(Image.fromarray(noise(60, 80)), 'JPEG'))
    data[1000:1100] = data[2000:2100]
    Image.open(io.BytesIO(data)).load()  # no error
    with pytest.raises(InputError, match='not a readable image'):
        pixels.decode(bytes(data), 'x')


@pytest.mark.parametrize('data', [b'', b'<html>not decoded</html>', encode(smooth(), 'JPEG')[:300]])
def test_a_file_that_is_no_image_is_named(data, tmp_path):
    path = tmp_path / 'bad.jpg'
    path.write_bytes(data)
    with pytest.raises(InputError, match='bad.jpg') as error:
        pixels.read_image(path)
    assert ' at 0x' not in str(error.value)


@pytest.mark.parametrize('kind', ['EPS', 'QOI'])
def test_files_of_other_kinds_are_refused_and_start_no_program(kind):
    """Pillow gives EPS to Ghostscript, whatever the file is called; its reader of QOI raises IndexError."""
    with pytest.raises(InputError, match='^x: not a readable image .none of JPEG, PNG'):
        pixels.decode(encode(smooth(), kind), 'x')


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match='gone.jpg: No such file'):
        pixels.read_image(tmp_path / 'gone.jpg')


def reference_pixels(image, place):
    """Flip, resize, crop and resize by Pillow, as the reference's transforms do."""
    picture = Image.fromarray(image)
    if place.flip:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
    if place.crop:
        h, w = place.before.tolist()
        top, left, height, width = place.box.tolist()
        picture = picture.resize((w, h), Image.BILINEAR).crop((left, top, left + width, top + height))
    h, w = place.shape.tolist()
    return np.asarray(picture.resize((w, h), Image.BILINEAR))


def test_patches_are_the_references_pixels():
    recipe = geometry.Recipe((64, 96, 112), 200, crop_from=(80, 100, 120), crop_min=60, crop_max=100)
    count = 40
    heights, widths = np.random.default_rng(0).integers(50, 200, (2, count))
    drawn = geometry.draw(heights, widths, recipe, 0, 0)
    for i in range(count):
        place = drawn[i]
        image = noise(heights[i], widths[i], i)
        out = np.zeros((150, 768), np.uint8)
        pixels.place(pixels.to_rgbx(image), place, out)
        np.testing.assert_array_equal(unpatchify(out, place.grid), reference_pixels(image, place))
        assert not out[place.counts :].any()


@pytest.mark.parametrize('mode', ['F', 'I'])
def test_pixels_of_32_bits_are_refused_and_not_read_as_black(mode):
    picture = Image.fromarray(
        np.full((4, 4), 0.5 if mode == 'F' else 70_000, np.float32 if mode == 'F' else np.int32)
    )
    with pytest.raises(InputError, match='x: its pixels have 32 bits; save it with 8 or 16'):
        pixels.decode(encode(picture, 'TIFF'), 'x')
