"""Decoded images kept in a file on a local disk, so that later epochs need not decode them again.

Decoding JPEG is most of the work of loading: from the cache a core prepares 2.7 (YOLOS-S) to 3.3 times
(YOLOS-Ti) as many images a second (benchmarks/data.py), bit for bit the same.
"""

import errno
import functools
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from yolos_jax.errors import InputError

RESERVE = 0.1  # of the disk is left for checkpoints, which are larger than many images
CHANNELS = 4  # RGBX, as `pixels.decode` gives images


class DecodedImages:
    """A cache of decoded images, for n records.

    Its file has no name: it disappears with the process, however that ends, and never holds the images of
    other data. An image takes height x width x 4 bytes, all of COCO 145 GB; images that do not fit on the
    disk are decoded each time. On /dev/shm the cache is in memory.
    """

    def __init__(self, folder: str | Path, heights: np.ndarray, widths: np.ndarray) -> None:
        """An empty cache in a folder, which is created if it does not exist.

        Raises:
            InputError: the folder cannot be written to.
        """
        self._shapes = np.stack([heights, widths, np.full(len(heights), CHANNELS)], axis=1).astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._shapes.prod(axis=1))])
        size = int(self._starts[-1])
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as the cache
            os.truncate(self._file.fileno(), size)
            self._bytes = mmap.mmap(self._file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise InputError(
                f'{folder}: cannot keep decoded images ({error.strerror})', 'data_cache'
            ) from None
        self._kept, self._full, self._lock = np.zeros(len(heights), bool), False, threading.Lock()
        self.note = ''
        if size > (free := max(self._room(), 0)):
            self.note = (
                f'{folder} has room for {free / size:.0%} of the decoded images, {size / 1e9:.0f} GB'
            )

    def start(
        self, index: int, start_decode: Callable[[], Callable[[], np.ndarray]]
    ) -> Callable[[], np.ndarray]:
        """A function that returns the pixels of a record, uint8 [height, width, 4].

        They come from the file or, if it does not have them, from the function `start_decode` returns.
        """
        place = int(self._starts[index])
        if not self._kept[index]:
            return functools.partial(self._decode, index, place, start_decode())
        shape = self._shapes[index]
        return lambda: np.frombuffer(self._bytes, np.uint8, int(shape.prod()), place).reshape(shape)

    def _decode(self, index: int, place: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
        image = decode()
        if not (self._full or self._kept[index]):
            self._keep(index, place, image)
        return image

    def _room(self) -> int:
        """How many bytes may still be kept."""
        disk = os.fstatvfs(self._file.fileno())
        return disk.f_frsize * (disk.f_bavail - int(RESERVE * disk.f_blocks))

    def _keep(self, index: int, start: int, image: np.ndarray) -> None:
        """Write an image; unlike a store to the memory map, a write reports a full disk."""
        left = memoryview(np.ascontiguousarray(image)).cast('B')
        try:
            if self._room() < len(left):
                raise OSError(errno.ENOSPC, 'a tenth of the disk is left for other files')
            while left:
                written = os.pwrite(self._file.fileno(), left, start)
                left, start = left[written:], start + written
        except OSError as error:
            with self._lock:
                if not self._full:
                    self._full = True
                    line = f'note: no more decoded images are kept ({error.strerror})'
                    print(line, file=sys.stderr, flush=True)
            return
        self._kept[index] = True
