"""TensorBoard's files in a run's folder."""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """Writes TensorBoard's files, from the first thing there is to write.

    What cannot be written is left out.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """first: the step the run starts from."""
        self._folder, self._first = folder, first
        self.config: dict[str, Any] = {}  # shown as hyper-parameters

    @functools.cached_property
    def _writer(self) -> Any:
        with _left_out('torch', 'boto3'):
            from tensorboardX import SummaryWriter
            from tensorboardX.summary import hparams

        writer = SummaryWriter(str(self._folder), purge_step=self._first + 1)
        plain = {
            k: x if isinstance(x, bool | int | float | str) else str(x) for k, x in self.config.items()
        }
        experiment, session, _ = hparams(plain, {'AP': None})
        for summary in (experiment, session):
            writer.file_writer.add_summary(summary)
        return writer

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        with contextlib.suppress(OSError):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, images: Iterable[np.ndarray]) -> None:
        """Pictures, uint8 [height, width, 3]."""
        with contextlib.suppress(OSError):
            for i, image in enumerate(images):
                self._writer.add_image(f'validation/{i}', image, step, dataformats='HWC')

    def flush(self) -> None:
        """Write what is kept back."""
        if '_writer' in vars(self):
            with contextlib.suppress(OSError):
                self._writer.flush()

    def close(self) -> None:
        """Write what is kept back, and close the files."""
        if '_writer' in vars(self):
            with contextlib.suppress(OSError):
                self._writer.close()


@contextlib.contextmanager
def _left_out(*modules: str) -> Iterator[None]:
    """Within the block, modules that are not loaded yet are as if they were not installed.

    tensorboardX loads PyTorch and boto3 where they are, for tensors of the one and buckets of the other,
    which no run gives it: 1.6 s of a start, and 0.1 without them (2 cores of an AMD EPYC).
    """
    absent = {name: None for name in modules if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
