"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path


def write_json(path, content):
    """Write JSON beside `path`, then move it there."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.part')
    with open(part, 'w') as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
