import numba
import numpy as np
import pytest
from helpers import noise
from PIL import Image

from yolos_jax.data import geometry, mixer, pixels
from yolos_jax.data.resize import resize as resize_rgbx

RANDOM = np.random.default_rng(0)


def resize(image, *args, **options):
    return resize_rgbx(pixels.to_rgbx(image), *args, **options)[..., :3]


def pillow(image, height, width):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))


def test_pixels_are_pillows_on_500_images_and_scales():
    for i in range(500):
        height, width = RANDOM.integers(20, 300, 2)
        image = noise(height, width, i)
        size = int(RANDOM.integers(32, 400))
        shape = geometry.resize_shape(int(height), int(width), size, 2 * size)
        np.testing.assert_array_equal(resize(image, *shape), pillow(image, *shape))


@pytest.mark.parametrize('shape', [(480, 640), (800, 1056), (480, 320), (960, 640), (48, 1280), (640, 48)])
def test_pixels_are_pillows_at_coco_sizes(shape):
    image = noise(480, 640)
    np.testing.assert_array_equal(resize(image, *shape), pillow(image, *shape))


def test_cubic_pixels_are_pillows_on_200_images_and_scales():
    clipped = 0
    for i in range(200):
        height, width, new_height, new_width = RANDOM.integers(8, 300, 4).tolist()
        image = noise(height, width, i)
        ours = resize(image, new_height, new_width, cubic=True)[..., :3]
        picture = Image.fromarray(image[..., :3])
        theirs = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(ours, np.asarray(theirs))
        clipped += (ours == 0).any() and (ours == 255).any()
    assert clipped > 50  # the cubic reaches beyond 0 and 255


def test_resizing_into_a_box_gives_that_part_of_the_whole_output():
    image = noise(120, 160)
    for _ in range(50):
        height, width = RANDOM.integers(20, 300, 2).tolist()
        top, left = RANDOM.integers(0, [height, width])
        h, w = RANDOM.integers(1, [height - top + 1, width - left + 1])
        whole = resize(image, height, width)
        np.testing.assert_array_equal(
            resize(image, height, width, box=(top, left, h, w)), whole[top : top + h, left : left + w]
        )


@pytest.mark.parametrize('shape', [(64, 80), (96, 64), (33, 47)])
def test_mirrored_pixels_are_those_of_the_mirrored_image(shape):
    image = noise(64, 64)
    np.testing.assert_array_equal(resize(image, *shape, flip=True), pillow(image[:, ::-1].copy(), *shape))


def plain_mix(data, at, step, weights, taps, out, to, kept):
    """What `mixer.make_mix` writes in LLVM's language, in numpy."""
    runs = np.stack([data[at + k * step : at + k * step + 64] for k in range(taps)]).astype(np.int32)
    total = (runs * weights[:taps, None]).sum(axis=0, dtype=np.int32) + np.int32(1 << (mixer.BITS - 1))
    out[to : to + len(kept)] = np.clip(total >> mixer.BITS, 0, 255).astype(np.uint8)[kept]


@pytest.mark.parametrize('taps', [1, 2, 3, 9])
@pytest.mark.parametrize('kept', [list(range(64)), [i for i in range(64) if i % 4 != 3]])
def test_the_vector_loop_sums_as_a_plain_one(taps, kept):
    mix = mixer.make_mix(64, kept)

    @numba.njit
    def call(data, at, step, weights, taps, out, to):
        mix(data, at, step, weights, taps, out, to)

    data = RANDOM.integers(0, 256, 5000, dtype=np.uint8)
    weights = (RANDOM.normal(0.2, 0.3, 9)[:taps] * (1 << mixer.BITS)).astype(np.int32)  # some are negative
    fast, plain = np.zeros((2, 200), np.uint8)
    call(data, 130, 71, weights, taps, fast, 20)
    plain_mix(data, 130, 71, weights, taps, plain, 20, kept)
    np.testing.assert_array_equal(fast, plain)
