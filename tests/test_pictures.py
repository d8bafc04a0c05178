"""Images that a detector takes besides arrays and paths: links, open files, bytes."""

import functools
import http.server
import io
import threading
import types

import jax
import numpy as np
import pytest
from helpers import TINY, noise
from PIL import Image

from yolos_jax import pictures, weights
from yolos_jax.errors import InputError, StorageError
from yolos_jax.inference import Detector
from yolos_jax.model import Yolos, init_params
from yolos_jax.pictures import decoded, opened


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a photograph, and the address where a server offers it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):  # noqa: N802
            if self.path == '/moved':
                self.send_response(302)
                self.send_header('Location', 'ftp://127.0.0.1:9/x')
                self.end_headers()
            elif self.path == '/cut':
                self.send_response(200)
                self.send_header('Content-Length', '100')
                self.end_headers()
                self.wfile.write(b'a part')
            else:
                super().do_GET()

    monkeypatch.setenv('no_proxy', '*')
    Image.fromarray(noise(60, 80)).save(tmp_path / 'photo 1.png')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield tmp_path, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture
def detector():
    """A small detector that answers anything."""
    model = Yolos(**TINY, num_classes=4)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    return Detector(weights.Pretrained(model, zeros, {1: 'cat'}, 64, 96))


def test_open_files_links_and_bytearrays_are_images(site):
    folder, address = site
    content = (folder / 'photo 1.png').read_bytes()
    with open(folder / 'photo 1.png', 'rb') as file:
        for image in (file, io.BytesIO(content), bytearray(content), f'{address}/photo 1.png'):
            assert opened(image) == content
    np.testing.assert_array_equal(decoded(content)[..., :3], noise(60, 80))


def test_links_and_files_that_cannot_be_read_are_named(site):
    _, address = site
    with pytest.raises(StorageError, match=f'{address}/none.png: cannot be fetched .*404'):
        opened(f'{address}/none.png')
    with pytest.raises(StorageError, match='http://: cannot be fetched'):
        opened('http://')
    with pytest.raises(InputError, match="open the file with 'rb'"):
        opened(io.StringIO('/etc/hostname'))
    file = io.BytesIO(b'')
    file.close()
    with pytest.raises(InputError, match='an image in an open file cannot be read'):
        opened(file)
    with pytest.raises(InputError, match=r'has no bytes left; seek\(0\)'):
        opened(io.BytesIO())

    class Upload:
        async def read(self):
            pass

    with pytest.raises(InputError, match='read by await'):
        opened(Upload())


def test_a_link_is_read_whole_and_not_without_bound(site, monkeypatch):
    folder, address = site
    with pytest.raises(StorageError, match=f'{address}/cut: cannot be fetched .*6 bytes read, 94 more'):
        opened(f'{address}/cut')
    monkeypatch.setattr(pictures, 'LINK_BYTES', (folder / 'photo 1.png').stat().st_size - 1)
    with pytest.raises(StorageError, match='it has more than 0 MiB'):
        opened(f'{address}/photo 1.png')


def test_a_link_that_leads_to_another_protocol_is_named(site):
    with pytest.raises(StorageError, match=f'{site[1]}/moved: cannot be fetched'):
        opened(f'{site[1]}/moved')


def test_what_cannot_be_read_is_named_by_its_link_or_place_in_the_list(detector, site):
    folder, address = site
    (folder / 'page.html').write_text('<html>')
    with pytest.raises(InputError, match=f'^{address}/page.html: not a readable image'):
        detector(f'{address}/page.html')
    with pytest.raises(InputError, match=r'^images\[2\]: an image in memory: not a readable image'):
        detector([noise(60, 80), noise(60, 80), b'<html>', b'<html>'])


def test_an_open_reader_of_pixels_is_an_image(detector):
    reader = types.SimpleNamespace(read=lambda: noise(60, 80))
    (detections,) = detector.stream([reader], threshold=0)
    assert len(detections) == len(detector(reader, threshold=0)) > 0


def test_an_array_with_its_channels_first_is_told_so():
    with pytest.raises(InputError, match=r'uint8 \[3, 60, 80\] \(channels come last'):
        decoded(noise(60, 80).transpose(2, 0, 1))


def test_open_files_and_buffers_may_be_reused_while_a_stream_is_read(detector):
    """The generator is ahead of the threads that decode."""
    content = [Image.fromarray(np.full((60, 80, 3), 20 * i, np.uint8)) for i in range(12)]

    def images(make):
        buffer = io.BytesIO()
        for image in content:
            buffer.seek(0)
            buffer.truncate()
            image.save(buffer, 'png')
            buffer.seek(0)
            yield make(buffer)

    for make in (lambda buffer: buffer, lambda buffer: bytearray(buffer.getbuffer())):
        results = detector.stream(images(make), pixels=True)
        assert [int(one.image[0, 0, 0]) for one in results] == [20 * i for i in range(12)]
