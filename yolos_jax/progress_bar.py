"""The progress bar of commands, on stderr."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar; where stderr is no terminal (a file, a notebook), it is only drawn every ten seconds."""
    return tqdm(items, mininterval=0.1 if is_terminal() else 10, **options)


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again.

    It may be closed, or None in a process without a console. With TERM=dumb it cannot draw.
    """
    is_open = sys.stderr is not None and not sys.stderr.closed
    return is_open and sys.stderr.isatty() and os.environ.get('TERM') != 'dumb'
