"""The validation AP of a checkpoint: a file in its step's folder, since it is measured after the save."""

import json
import math
from pathlib import Path

from yolos_jax import files
from yolos_jax.weights import integrity

FILE = 'AP.json'
OLD_FILE = 'metrics/metrics'  # of version 0.1, written by Orbax


def rank(ap: float | None) -> float:
    """The key to order steps by: their AP; those without one, or with that of no objects, -1, are last."""
    return ap if ap is not None and 0 <= ap < math.inf else -math.inf


def write(path: Path, ap: float) -> None:
    """Write the AP of a step to its folder, with a hash of it."""
    files.write_json(path / FILE, {'AP': ap, 'sha256': integrity.hash_of(ap)})


def read(path: Path) -> float | None:
    """The AP of a step's folder; None if it was not measured. Damage counts as not measured."""
    return _read(path)[0]


def is_damaged(path: Path) -> bool:
    """Whether a step's folder has an AP that cannot be read: such a step may be the best."""
    return _read(path)[1]


def _read(path: Path) -> tuple[float | None, bool]:
    """The AP of a step's folder, and whether it is damaged."""
    try:
        file = path / FILE if (path / FILE).exists() else path / OLD_FILE
        content = json.loads(file.read_text())
        ap = content['AP']
        # version 0.1 had no hash
        whole = 'sha256' not in content or content['sha256'] == integrity.hash_of(ap)
        whole &= (ap is None or isinstance(ap, float | int)) and content.keys() <= {'AP', 'sha256'}
        return (ap, False) if whole else (None, True)
    except FileNotFoundError:
        return None, False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, True
