"""The progress bar of commands, on stderr."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar; where stderr is no terminal (a file, a notebook), it is only drawn every ten seconds."""
    return tqdm(items, mininterval=0.1 if sys.stderr.isatty() else 10, **options)
