"""Decoded images are cached bit for bit; if the disk is full, they are decoded again."""

import errno
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_config

from yolos_jax.data import cache, loader, records
from yolos_jax.errors import InputError
from yolos_jax.run import detection
from yolos_jax.run import mesh as meshes
from yolos_jax.run.starting_point import make_start

SHAPES = [(3, 5), (4, 2), (1, 7)]


def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 4), dtype=np.uint8) for shape in SHAPES]


def make(folder):
    return cache.DecodedImages(folder, *np.array(SHAPES).T)


def test_an_image_is_decoded_once_and_comes_back_as_it_was(tmp_path):
    kept, decoded = make(tmp_path / 'new'), []
    for _ in range(2):
        for index, image in reversed(list(enumerate(images()))):
            result = kept.start(index, lambda i=index, x=image: lambda: decoded.append(i) or x)()
            np.testing.assert_array_equal(result, image)
    assert decoded == [2, 1, 0] and not os.listdir(tmp_path / 'new')  # the file has no name


def test_an_image_that_cannot_be_decoded_is_not_kept(tmp_path):
    kept = make(tmp_path)

    def broken():
        raise InputError('a.jpg: cannot be read')

    for _ in range(2):
        with pytest.raises(InputError, match=r'a\.jpg'):
            kept.start(0, lambda: broken)()
    np.testing.assert_array_equal(kept.start(0, lambda: lambda: images()[0])(), images()[0])


def test_batches_are_the_same_bits_with_decoded_images(coco_folder, tmp_path):
    config = tiny_config(data=coco_folder)
    data = records.read(coco_folder, 'train2017')
    start = make_start(config, data, meshes.platform(meshes.make_mesh()))
    plain, cached = (detection.make_batches(config, data, start) for _ in range(2))
    cached.cache = cache.DecodedImages(tmp_path, data.heights, data.widths)
    steps = range(2 * plain.steps_per_epoch)  # the second epoch reads what the first kept
    pairs = zip(loader.load(plain, steps), loader.load(cached, steps), strict=True)
    for (_, batch, _), (_, again, _) in pairs:
        for name, values in batch.items():
            np.testing.assert_array_equal(values, again[name])


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is full')
def test_a_full_disk_is_reported_once_and_images_are_decoded_again(tmp_path, capsys):
    kept = make(tmp_path)
    full = os.open('/dev/full', os.O_WRONLY)
    os.dup2(full, kept._file.fileno())
    for image in images() * 2:
        index = [x.shape for x in images()].index(image.shape)
        np.testing.assert_array_equal(kept.start(index, lambda x=image: lambda: x)(), image)
    assert capsys.readouterr().err.count(os.strerror(errno.ENOSPC)) == 1


def test_a_disk_with_too_little_room_is_noted(tmp_path, monkeypatch):
    assert not make(tmp_path).note
    disk = SimpleNamespace(f_frsize=1, f_bavail=11 * 10**8, f_blocks=10**9)
    monkeypatch.setattr(os, 'fstatvfs', lambda _: disk)
    side = int((10**9 / 3.2) ** 0.5)  # images of 1.25 times what is free
    note = cache.DecodedImages(tmp_path, np.array([side]), np.array([side])).note
    assert 79 <= int(re.search(r'has room for (\d+)% of the decoded images', note)[1]) <= 81


def test_a_tenth_of_the_disk_is_left_for_checkpoints(tmp_path, monkeypatch, capsys):
    kept, image = make(tmp_path), images()[0]
    disk = SimpleNamespace(f_frsize=1, f_bavail=10**6, f_blocks=10**7)
    monkeypatch.setattr(os, 'fstatvfs', lambda _: disk)
    for _ in range(2):
        np.testing.assert_array_equal(kept.start(0, lambda: lambda: image)(), image)
    assert not kept._kept.any()
    assert capsys.readouterr().err.count('a tenth of the disk is left') == 1


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match=r'file/cache: cannot keep decoded images \(Not a directory\)'):
        make(tmp_path / 'file' / 'cache')
