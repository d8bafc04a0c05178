import concurrent.futures
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import ROOT, TINY, make_hf, read_detector

from yolos_jax.errors import InputError
from yolos_jax.weights import zoo

COMMIT = 'c' * 40


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A detector of Hugging Face with random weights."""
    path = tmp_path_factory.mktemp('hub') / 'tiny'
    make_hf(TINY, num_classes=4).save_pretrained(path)
    size = {'size': {'shortest_edge': 64, 'longest_edge': 96}}
    (path / 'preprocessor_config.json').write_text(json.dumps(size))
    (path / 'README.md').write_text('not asked for')
    return path


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of Hugging Face's protocol as its client asks for, and plain files under /files/."""

    files, asked, cut, wrong, knows_ranges = {}, [], None, None, True

    def log_message(self, *_):
        pass

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        hub, path = type(self), self.path.partition('?')[0]
        hub.asked.append((self.command, path))
        if path.startswith('/files/'):
            return self.plain(path.removeprefix('/files/'))
        if match := re.fullmatch(r'/api/models/test/tiny/revision/(main|v1)', path):
            siblings = [{'rfilename': name} for name in hub.files]
            return self.json({'id': 'test/tiny', 'sha': COMMIT, 'siblings': siblings})
        if path == f'/api/models/test/tiny/tree/{COMMIT}':
            return self.json([self.entry(name) for name in hub.files])
        if match := re.fullmatch(f'/test/tiny/resolve/{COMMIT}/(.+)', path):
            return self.file(match[1])
        return self.json({'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'}, 404)

    def json(self, content, headers=(), status=200):
        headers = {'Content-Type': 'application/json'} | dict(headers)
        self.send_with(json.dumps(content).encode(), headers, status)

    def send_with(self, body, headers, status=200):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def entry(self, name):
        data = self.files[name]
        entry = {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
        if name.endswith(('.safetensors', '.bin')):
            entry['lfs'] = {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 130}
        return entry

    def file(self, name):
        data, entry = self.files[name], self.entry(name)
        etag = entry.get('lfs', entry)['oid']
        headers = {'ETag': f'"{etag}"', 'X-Repo-Commit': COMMIT, 'X-Linked-Size': str(len(data))}
        if 'lfs' in entry:
            headers['X-Linked-Etag'] = f'"{etag}"'
            data = type(self).wrong or data
        self.part(data, headers, type(self).cut if 'lfs' in entry else None)

    def plain(self, name):
        self.part(self.files[name], {}, type(self).cut)

    def part(self, data, headers, cut):
        asked = self.headers.get('Range') if self.knows_ranges else None
        start = int((re.match(r'bytes=(\d+)-', asked or '') or [0, 0])[1])
        if start and start >= len(data):
            return self.send_with(b'', headers | {'Content-Range': f'bytes */{len(data)}'}, 416)
        body = data[start:]
        self.send_response(206 if start else 200)
        for key, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body[:cut])
            type(self).cut = None  # the next request is answered whole
        return None


@pytest.fixture
def hub(folder):
    """A server, and its handler class to change what it does."""
    handler = type(
        'Handler', (Hub,), {'files': {p.name: p.read_bytes() for p in folder.iterdir()}, 'asked': []}
    )
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f'http://127.0.0.1:{server.server_port}'
    yield handler
    server.shutdown()
    server.server_close()


LOAD = """
import sys, yolos_jax
from yolos_jax.errors import InputError
for name in sys.argv[1:]:
    try:
        detector = yolos_jax.Detector.from_pretrained(name)
        print(detector.size, detector.max_size)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
"""


def load(*names, hub, home, **environment):
    environment = os.environ | {'HF_ENDPOINT': hub.address, 'HF_HOME': str(home)} | environment
    environment |= {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_XET': '1'}
    command = [sys.executable, '-c', LOAD, *names]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_repository_is_fetched_once_and_then_read_without_a_network(hub, tmp_path):
    done = load('test/tiny', 'test/tiny@v1', hub=hub, home=tmp_path)
    assert done.stdout == '64 96\n' * 2, done.stderr
    fetched = {
        path.rpartition('/')[2] for method, path in hub.asked if method == 'GET' and 'resolve' in path
    }
    assert fetched == {'config.json', 'preprocessor_config.json', 'model.safetensors'}
    hub.asked.clear()
    offline = load('test/tiny', hub=hub, home=tmp_path, HF_HUB_OFFLINE='1')
    assert offline.stdout == '64 96\n' and not hub.asked, offline.stderr
    assert not list(tmp_path.rglob('*.safetensors.sha256'))  # the cache is not ours to write to


def test_a_file_that_was_cut_off_is_completed(hub, tmp_path):
    hub.cut = 10_000
    done = load('test/tiny', hub=hub, home=tmp_path)
    assert done.stdout == '64 96\n', done.stderr


def test_a_file_with_another_hash_is_refused(hub, tmp_path):
    data = hub.files['model.safetensors']
    hub.wrong = data[:-4] + bytes(4)
    done = load('test/tiny', hub=hub, home=tmp_path)
    assert not done.stdout and done.stderr.count('\n') - done.stderr.count('it/s') < 10
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: ') and 'SHA-256 is' in last and "Hugging Face's hub says" in last


@pytest.mark.parametrize(
    ('environment', 'commands'),
    [
        ({}, {'test/none': 'test/none --local-dir', 'test/tiny@v9': 'test/tiny --revision v9'}),
        ({'HF_HUB_OFFLINE': '1'}, {'test/tiny': 'test/tiny'}),
        ({'HF_ENDPOINT': 'http://127.0.0.1:9'}, {'test/tiny': 'test/tiny'}),
    ],
)
def test_a_failed_download_is_one_line_with_the_command_for_another_machine(
    environment, commands, hub, tmp_path
):
    done = load(*commands, hub=hub, home=tmp_path, **environment)
    assert not done.stdout and done.stderr.splitlines()[-1].startswith('error: ')
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    for line, (name, command) in zip(errors, commands.items(), strict=True):
        assert line.startswith(f'error: {name}: no such file') and f'hf download {command}' in line


def test_an_address_is_no_name():
    address = 'https://huggingface.co/hustvl/yolos-tiny'
    with pytest.raises(InputError, match=f'^{address}: .* name such as hustvl/yolos-tiny'):
        zoo.local(address)


def test_an_existing_path_takes_precedence_over_a_name(folder, tmp_path, monkeypatch):
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test' / 'tiny').symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert zoo.local('test/tiny') == (tmp_path / 'test' / 'tiny').relative_to(tmp_path)
    assert read_detector('test/tiny').size == 64


def test_a_file_of_the_table_is_fetched_resumed_and_its_hash_compared(hub, tmp_path):
    data = np.random.default_rng(0).bytes(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    name = f'vit-{digest[:8]}.pth'
    hub.files[name], hub.cut = data, 1_000_000
    entry = f'{hub.address}/files/'
    with pytest.raises(InputError, match=f'{name}: no such file, and .*curl -LO {entry}{name}'):
        zoo.fetch(name, entry, tmp_path)
    assert (tmp_path / f'{name}.part').stat().st_size == 1_000_000
    path = zoo.fetch(name, entry, tmp_path)
    assert path.read_bytes() == data and not (tmp_path / f'{name}.part').exists()
    hub.asked.clear()
    assert zoo.fetch(name, entry, tmp_path) == path and not hub.asked
    with pytest.raises(InputError, match=f'{name}: no such file, and .*Not a directory'):
        zoo.fetch(name, entry, path / 'cache')


def test_processes_that_fetch_one_file_fetch_it_once(hub, tmp_path):
    data = np.random.default_rng(0).bytes(3_000_000)
    hub.files['vit.pth'] = data
    entry = f'{hub.address}/files/'
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # each opens the lock, as a process does
        paths = [*pool.map(lambda _: zoo.fetch('vit.pth', entry, tmp_path), range(4))]
    assert len(set(paths)) == 1 and paths[0].read_bytes() == data and len(hub.asked) == 1


def test_a_partial_download_longer_than_the_file_is_discarded(hub, tmp_path):
    hub.files['vit.pth'], entry = b'short', f'{hub.address}/files/'
    (tmp_path / 'vit.pth.part').write_bytes(b'much longer')
    assert zoo.fetch('vit.pth', entry, tmp_path).read_bytes() == b'short'


def test_a_server_that_knows_no_ranges_sends_a_file_from_its_beginning(hub, tmp_path):
    hub.files['vit.pth'], hub.knows_ranges = b'the whole file', False
    (tmp_path / 'vit.pth.part').write_bytes(b'the wh')
    assert zoo.fetch('vit.pth', f'{hub.address}/files/', tmp_path).read_bytes() == b'the whole file'


def test_files_of_the_table_have_links():
    assert all(link.startswith('https://') and link.endswith('/') for link in zoo.FILES.values())
    assert len(zoo.DETECTORS) == 5
