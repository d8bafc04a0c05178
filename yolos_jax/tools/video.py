"""Detects objects in videos and camera streams, and writes a video with the detections drawn on it.

It uses PyAV (`pip install 'yolos_jax[video]'`), whose wheel has FFmpeg. Unlike OpenCV it gives every frame
its time, for videos without a constant rate, and brings no window system.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from yolos_jax import Detector, files
from yolos_jax.detections import Detections
from yolos_jax.errors import InputError
from yolos_jax.progress_bar import progress_bar

ENDINGS = {'.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg'}
TIME_BASE = Fraction(1, 90_000)  # of the video that is written, in seconds


def is_video(path: Path) -> bool:
    """Whether a path is a video or a camera."""
    return path.suffix.lower() in ENDINGS or path.is_char_device()


def annotate(
    detector: Detector,
    path: Path,
    target: Path,
    threshold: float,
    drawn: Callable[[Detections], tuple[Detections, Image.Image | None]],
) -> str:
    """Write an .mp4 with the detections drawn on it, and beside it a .jsonl with a line for each frame.

    Ctrl-C ends a recording from a camera.

    drawn: a frame's detections -> those to keep, and their picture; if it is None, no video is written.

    Returns:
        In words, where the video ends too early, or ''.

    Raises:
        InputError: PyAV is missing, or the video cannot be read.
    """
    lines_file, stack = target.with_suffix('.jsonl'), contextlib.ExitStack()
    with _opened(path) as source, files.replacing(lines_file) as lines, stack:
        source.streams.video[0].thread_type = 'AUTO'
        writer, ends = None, []
        try:
            for time, frame, detections in _frames(source, ends, detector, threshold):
                detections, picture = drawn(detections)
                line = {'frame': frame, 'seconds': round(time, 4), 'detections': detections.to_list()}
                lines.write(json.dumps(line).encode() + b'\n')
                if picture:
                    writer = writer or stack.enter_context(
                        _writer(target, source.streams.video[0], picture)
                    )
                    writer(time, picture)
        except KeyboardInterrupt:
            if not path.is_char_device():
                raise
        if not lines.tell():
            raise InputError(f'{path}: ' + (f'cannot be read ({ends[0]})' if ends else 'has no frames'))
        return ends[0] if ends else ''


@contextlib.contextmanager
def _writer(
    target: Path, source: Any, first: Image.Image
) -> Iterator[Callable[[float, Image.Image], None]]:
    """A function that adds a picture at a time to a video of the first picture's size."""
    import av

    with files.replacing(target) as file, av.open(file, 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=source.average_rate or 30)
        stream.width, stream.height = (side // 2 * 2 for side in first.size)  # as the codec needs
        stream.pix_fmt, stream.codec_context.time_base = 'yuv420p', TIME_BASE

        times = [-1]  # mp4 needs strictly rising times

        def write(time: float, picture: Image.Image) -> None:
            frame = av.VideoFrame.from_image(picture.crop((0, 0, stream.width, stream.height)))
            times.append(max(round(time / TIME_BASE), times[-1] + 1))
            frame.pts, frame.time_base = times[-1], TIME_BASE
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode())


def _frames(
    source: Any, ends: list[str], detector: Detector, threshold: float
) -> Iterator[tuple[float, int, Detections]]:
    """(seconds, number, detections) of every frame, rotated as the video asks.

    ends: receives the reason if the video is damaged or cut off.
    """
    import av

    times, stream = [], source.streams.video[0]

    def read() -> Iterator[np.ndarray]:
        packets = 0
        try:
            for packet in source.demux(video=0):
                packets += packet.size > 0
                for frame in packet.decode():
                    times.append(frame.time if frame.time is not None else len(times) / 30)
                    quarters = round(frame.rotation / 90)  # of a phone that was held upright
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format='rgb24'), quarters))
        except av.error.FFmpegError as error:
            ends.append(f'after {len(times)} frames it cannot be read ({error})')
        else:
            seconds = 0.0
            with contextlib.suppress(ValueError):  # Matroska's tag may hold any text
                hours, minutes, rest = map(float, stream.metadata.get('DURATION', '').split(':'))
                seconds = rest + 60 * minutes + 3600 * hours
            if source.format.name == 'avi' and stream.average_rate:  # its frames include gaps between them
                seconds = float(stream.frames / stream.average_rate)
            elif packets < stream.frames:
                ends.append(f'it ends after {packets} of {stream.frames} frames')
            if not ends and times and times[-1] < 0.9 * seconds - 1:  # Matroska's includes a late start
                ends.append(f'it ends after {times[-1]:.1f} of {seconds:.1f} seconds')

    with progress_bar(total=stream.frames or None, unit='frame', desc=Path(source.name).name) as bar:
        for number, detections in enumerate(detector.stream(read(), threshold)):
            yield times[number] - times[0], number, detections
            bar.update()


def _opened(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise InputError("videos need PyAV: pip install 'yolos_jax[video]'") from None
    try:
        container = av.open(str(path), format='v4l2' if path.is_char_device() else None)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f'{path}: no video that can be read ({error})') from None
    if not container.streams.video:
        raise InputError(f'{path}: has no video in it')
    return container
