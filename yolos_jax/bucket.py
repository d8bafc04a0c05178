"""Folders in a bucket of Google Cloud Storage (gs://) or S3 (s3://), read and written by TensorStore.

TensorStore finds the credentials where Google's and Amazon's own tools do, and retries failed requests up
to `RETRIES` times, after growing random pauses. For another storage with S3's protocol, AWS_ENDPOINT_URL
and AWS_REGION give its address, as for Amazon's tools.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from yolos_jax import files
from yolos_jax.errors import InputError, StorageError

URL = re.compile(r'(gs|s3)://([^/]+)/*(.*?)/*')
RETRIES = 8
PAUSES = {'max_retries': RETRIES, 'initial_delay': '200ms', 'max_delay': '20s'}
TOGETHER = 128  # requests in flight: at 80 ms each, 1,600 a second
FILES = 16  # read or written at a time, each as a whole in memory
COMMITTED = 'meta/metadata'  # the file of a checkpoint that is written last
KEPT = 20 * 10**9  # bytes of copies in the cache; the least recently used are removed first
WAIT = 600  # seconds for one request with all its retries


def is_url(location: str | Path) -> bool:
    """Whether a location is the URL of something in a bucket."""
    return isinstance(location, str) and URL.fullmatch(location) is not None


def retries() -> int:
    """How many requests this process has had to repeat, in all buckets."""
    import tensorstore

    metrics = tensorstore.experimental_collect_matching_metrics('/tensorstore/kvstore/')
    return sum(m['values'][0]['value'] for m in metrics if m['name'].endswith('/retries') and m['values'])


class Version(NamedTuple):
    """An object's content, None if it does not exist, and the identifier of this version."""

    content: bytes | None
    generation: bytes


class Bucket:
    """The objects below a URL, by their names relative to it ('checkpoints/5/AP.json')."""

    def __init__(self, url: str) -> None:
        """Open the folder without a network request."""
        import tensorstore  # here: it takes a third of a second, and most runs need no bucket

        scheme, bucket, path = URL.fullmatch(url).groups()
        self.url = f'{scheme}://{bucket}/{path}'.rstrip('/')
        kind = 'gcs' if scheme == 'gs' else 's3'
        spec = {'driver': kind, 'bucket': bucket, 'path': f'{path}/' * bool(path)}
        endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
        if scheme == 's3' and endpoint:
            region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'
            spec |= {'endpoint': endpoint, 'aws_region': region}
        limits = {f'{kind}_request_retries': PAUSES, f'{kind}_request_concurrency': {'limit': TOGETHER}}
        self._ranges = tensorstore.KvStore.KeyRange
        context = tensorstore.Context(limits)
        with self._errors(''):
            self._store = tensorstore.KvStore.open(spec, context=context).result(timeout=WAIT)

    def names(self, inside: str = '') -> list[str]:
        """The names of all objects, or of those that begin with `inside`; sorted.

        Left out are those of a console's folders, and those that would lead out of a folder.
        """
        with self._errors(inside):
            names = sorted(name.decode() for name in self._store.list(self._range(inside)).result(WAIT))
        is_file = lambda name: name.strip('/') == name != '' and '..' not in name.split('/')
        return list(filter(is_file, names))

    def start_read(self, name: str, span: slice | None = None) -> 'Reading':
        """Start to read an object, or its bytes in `span`."""
        return Reading(self, name, self._store.read(name, byte_range=span))

    def read(self, name: str) -> bytes:
        """The bytes of an object; raises as `Reading.result`."""
        return self.start_read(name).result()

    def version(self, name: str) -> Version:
        """An object as it is now."""
        with self._errors(name):
            result = self._store.read(name).result(WAIT)
        return Version(result.value if result.state == 'value' else None, result.stamp.generation)

    def write(self, name: str, content: bytes) -> None:
        """Write an object as a whole or, if that fails, not at all."""
        with self._errors(name):
            self._store.write(name, content).result(WAIT)

    def write_if(self, name: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Write an object if `generation` is still its version; content None removes it.

        Returns the new version, or None if the object has another version.
        """
        with self._errors(name):
            return self._store.write(name, content, if_equal=generation).result(WAIT).generation or None

    def upload(self, paths: dict[str, Path], check: Callable[[], None] = lambda: None) -> None:
        """Write {name: file}, several at a time; a missing file is skipped, `COMMITTED` files come last.

        check: called before each; what it raises ends the upload.
        """

        def put(name: str) -> None:
            check()
            with contextlib.suppress(FileNotFoundError):
                self.write(name, paths[name].read_bytes())

        for last in (False, True):
            with concurrent.futures.ThreadPoolExecutor(FILES) as pool:
                list(pool.map(put, [name for name in paths if name.endswith(COMMITTED) == last]))

    def download(self, paths: dict[str, Path]) -> None:
        """Read {name: file}, several at a time; each file appears whole or not at all."""

        def get(name: str) -> None:
            files.write(paths[name], self.read(name))

        with concurrent.futures.ThreadPoolExecutor(FILES) as pool:
            list(pool.map(get, paths))

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with self._errors(name):
            self._store.write(name, None).result(WAIT)

    def remove_all(self, inside: str) -> None:
        """Remove the objects whose names begin with `inside`."""
        with self._errors(inside):
            self._store.delete_range(self._range(inside)).result(WAIT)

    def versions(self, names: Iterable[str]) -> dict[str, bytes]:
        """{name: identifier of its current version} of objects, none of them empty."""
        starts = {name: self.start_read(name, slice(0, 1)) for name in names}
        return {name: start.generation() for name, start in starts.items()}

    def copy(self, names: Iterable[str], cache: Path) -> Path:
        """A folder in a cache with copies of these objects, downloaded if they are missing.

        Its name is a hash of all their versions, so a changed object leads to a new folder.
        """
        versions = self.versions(names)
        digest = hashlib.sha256(repr((self.url, sorted(versions.items()))).encode()).hexdigest()[:16]
        folder = cache / 'buckets' / digest
        if missing := {name: folder / name for name in versions if not (folder / name).exists()}:
            self.download(missing)
        if versions:
            os.utime(folder)  # used now
        if missing:
            files.prune(folder.parent, KEPT)
        return folder

    def _range(self, text: str) -> Any:
        """The range of the keys that begin with a text."""
        return self._ranges(text, text[:-1] + chr(ord(text[-1]) + 1)) if text else self._ranges()

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turns TensorStore's errors into a StorageError that names the object."""
        place = f'{self.url}/{name}'.rstrip('/')
        try:
            yield
        except TimeoutError:
            raise StorageError(f'{place}: no answer in {WAIT} seconds') from None
        # TypeError: of a name that is not UTF-8
        except (ValueError, OSError, RuntimeError, TypeError) as error:
            raise StorageError(f'{place}: {_reason(error)}') from None


@contextlib.contextmanager
def output_folder(location: str | Path) -> Iterator[Path]:
    """The path of a new folder to write to; if `location` is a URL, it is uploaded at the end.

    Raises:
        InputError: the location is not empty, or cannot be written to.
    """
    if not is_url(location):
        files.check_free(location)
        yield Path(location)
        return
    place = Bucket(location)
    if place.names():
        raise InputError(f'{location}: exists and is not empty; choose another output', 'output')
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, 'new')
        yield folder
        paths = (path for path in folder.rglob('*') if path.is_file())
        place.upload({path.relative_to(folder).as_posix(): path for path in paths})


class Reading(NamedTuple):
    """A read in progress."""

    bucket: Bucket
    name: str
    future: Any

    @property
    def url(self) -> str:
        """The object that is read."""
        return f'{self.bucket.url}/{self.name}'

    def result(self) -> bytes:
        """Wait for the bytes; raises InputError if there is no such object, or StorageError."""
        return self._wait().value

    def generation(self) -> bytes:
        """Wait for the answer; returns the identifier of the version that was read."""
        return self._wait().stamp.generation

    def _wait(self) -> Any:
        with self.bucket._errors(self.name):
            result = self.future.result(WAIT)
        if result.state != 'value':
            raise InputError(f'{self.url}: no such object')
        return result


def _reason(error: Exception) -> str:
    """The message of TensorStore's error, without the places in its source code."""
    places = r' ?\[[^\]]*\]|(Error (reading|writing|listing)|While) .*?: '
    return (re.sub(places, '', ' '.join(str(error).split())) or str(error))[:200]
