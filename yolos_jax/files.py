"""Files that are written whole or not at all."""

import contextlib
import json
import os
import socket
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A binary file that becomes `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{socket.gethostname()}-{os.getpid()}.part')
    try:
        with open(part, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    """Write JSON to `path`."""
    with replacing(path) as file:
        file.write(json.dumps(content).encode())
