"""Writes TensorBoard's files to a run's folder."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg


class Board:
    """Writes TensorBoard's files; the first write opens one.

    Events that cannot be written are dropped, and later ones go to a new file. tensorboardX's own writer
    has a thread that dies on a full disk, after which its caller waits forever.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """first: the step the run starts from."""
        self._folder, self._first, self._is_purged = folder, first, False
        self._events: Any = None  # the open file
        self.config: dict[str, Any] = {}  # shown as hyper-parameters

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        self._write(step, [{'tag': name, 'simple_value': value} for name, value in values.items()])

    def pictures(self, step: int, images: Iterable[np.ndarray]) -> None:
        """Pictures, uint8 [height, width, 3]."""
        # eight photographs of 640 x 480 take 0.07 s and 0.5 MB as JPEG, and 0.84 s and 2.0 MB as PNG
        encode = lambda image: {
            'height': image.shape[0],
            'width': image.shape[1],
            'colorspace': 3,
            'encoded_image_string': simplejpeg.encode_jpeg(image, quality=85),
        }
        self._write(step, [{'tag': f'validation/{i}', 'image': encode(x)} for i, x in enumerate(images)])

    def _write(self, step: int, values: list[dict[str, Any]]) -> None:
        """values: of TensorBoard's Summary.Value."""
        with _left_out('torch', 'boto3'):
            from tensorboardX.proto.event_pb2 import Event

        try:
            if self._events is None:
                self._events = self._open()
            self._events.write_event(Event(wall_time=time.time(), step=step, summary={'value': values}))
            self._events.flush()
        except OSError:
            self._events = None

    def _open(self) -> Any:
        """Open a new file; its first events are the step that the run starts from, and the config."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import hparams

        suffix = f'.{os.getpid()}.{time.monotonic_ns()}'  # several files may be opened in one second
        plain = {
            k: x if isinstance(x, bool | int | float | str) else str(x) for k, x in self.config.items()
        }
        experiment, session, _ = hparams(plain, {'AP': None})
        first = [Event(wall_time=time.time(), summary=summary) for summary in (experiment, session)]
        if not self._is_purged:  # hides later steps that an earlier start wrote
            log = SessionLog(status=SessionLog.START)
            first.insert(0, Event(wall_time=time.time(), step=self._first + 1, session_log=log))
        try:
            events = EventsWriter(str(self._folder / 'events'), suffix)
            for event in first:
                events.write_event(event)
            events.flush()
        except OSError:
            for path in self._folder.glob(f'events.*{suffix}'):
                path.unlink()
            raise
        self._is_purged = True
        return events

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None


@contextlib.contextmanager
def _left_out(*modules: str) -> Iterator[None]:
    """Within the block, modules that are not loaded yet appear not to be installed.

    tensorboardX imports PyTorch and boto3 if they are installed, for tensors and buckets that no run gives
    it: 1.6 s of a start, and 0.1 s without them (2 cores of an AMD EPYC).
    """
    is_loaded = 'tensorboardX' in sys.modules  # then other threads may import them at any time
    absent = {} if is_loaded else {name: None for name in modules if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
