"""Images that a detector takes besides arrays and paths: links, open files, bytes."""

import functools
import http.server
import io
import threading

import numpy as np
import pytest
from helpers import noise
from PIL import Image

from yolos_jax.detections import opened, to_rgbx
from yolos_jax.errors import InputError, StorageError


@pytest.fixture
def site(tmp_path):
    """A folder with a photograph, and the address where a server offers it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    Image.fromarray(noise(60, 80)).save(tmp_path / 'photo.png')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_open_files_links_and_bytearrays_are_images(site):
    folder, address = site
    content = (folder / 'photo.png').read_bytes()
    with open(folder / 'photo.png', 'rb') as file:
        for image in (file, io.BytesIO(content), bytearray(content), f'{address}/photo.png'):
            assert opened(image) == content
    np.testing.assert_array_equal(to_rgbx(content)[..., :3], noise(60, 80))


def test_links_and_files_that_cannot_be_read_are_named(site):
    _, address = site
    with pytest.raises(StorageError, match=f'{address}/none.png: cannot be fetched .*404'):
        opened(f'{address}/none.png')
    with pytest.raises(StorageError, match='http://: cannot be fetched'):
        opened('http://')
    file = io.BytesIO(b'')
    file.close()
    with pytest.raises(InputError, match='an image in an open file cannot be read'):
        opened(file)


def test_an_array_with_its_channels_first_is_told_so():
    with pytest.raises(InputError, match=r'uint8 \[3, 60, 80\] \(channels come last'):
        to_rgbx(noise(60, 80).transpose(2, 0, 1))
