"""Detect objects in images and videos.

    yolos predict --weights=PATH --output=DIR IMAGE_OR_FOLDER_OR_VIDEO ...

Writes each image and video with its detections drawn on it to the output folder. predictions.jsonl there
has a line for each image, written when its picture is, and predictions.json all lines, at the end. The
same command resumes where the last one stopped. /dev/video0 is a camera; Ctrl-C ends the recording.
"""

import argparse
import collections
import concurrent.futures
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from yolos_jax import Detector, file_names, files, visualize
from yolos_jax.data import pixels
from yolos_jax.detections import Detections
from yolos_jax.errors import InputError, StorageError
from yolos_jax.progress_bar import progress_bar
from yolos_jax.run import cli, workdir
from yolos_jax.run.mirror import Mirror
from yolos_jax.tools import flags, video
from yolos_jax.tools.prediction_files import EVALUATION, LIST, MADE_BY, Predictions, as_coco, named

WRITERS = 2  # threads that draw and write, beside those that read
LONGEST_JPEG = 65_500  # pixels of a side, in libjpeg


def find_images(paths: Sequence[str], output: Path) -> list[Path]:
    """The image and video files among files and folders; files in the output folder are not inputs.

    Raises:
        InputError: a file does not exist, a folder has no images, or the output is one of the inputs or
            has the name of an image or a video.
    """
    if (pixels.is_image(output.name) or video.is_video(output)) and not output.is_dir():
        raise InputError(f'{output}: names a file; results are written to a folder', 'output')
    images, output = [], output.resolve()
    is_output = lambda path: Path(os.path.realpath(path)).is_relative_to(output)  # even of loops of links
    if urls := [path for path in paths if '://' in path]:
        raise InputError(f'{urls[0]}: images are read from files here; copy it first (curl, gcloud, aws)')
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f'{path}: no such file or folder')
        if path.resolve() == output or not path.is_dir() and path.resolve().parent == output:
            raise InputError(f'{path}: is both input and output; choose another output', 'output')
        if not path.is_dir():
            images.append(path)
            continue
        inside = [
            p
            for p in sorted(path / name for name in files.walk(path))
            if pixels.is_image(p.name) or p.suffix.lower() in video.ENDINGS
            if not file_names.is_hidden(p.relative_to(path).as_posix())
            if not p.is_fifo()  # its reader would wait for a writer
            if not is_output(p) or is_output(path)
        ]
        if not inside:
            raise InputError(f'{path}: no images in this folder')
        images += inside
    return list(dict.fromkeys(images))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = flags.parser(__doc__)
    flags.add_weights(parser)
    parser.add_argument('--output', required=True, help='a folder, or its URL in a bucket, for the results')
    parser.add_argument('--threshold', type=float, default=0.5, help='minimum score of a detection (0.5)')
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='only these classes; give the images before it'
    )
    parser.add_argument('--max_detections', type=int, help='at most this many per image, the best')
    parser.add_argument('--format', choices=('list', 'coco'), default='list', help='for predictions.json')
    parser.add_argument('--overwrite', action='store_true', help='start from scratch, do not resume')
    parser.add_argument('--batch_size', type=int, help='images computed together (8; 1 on a CPU)')
    drawing = parser.add_argument_group('pictures')
    drawing.add_argument('--no-pictures', action='store_true', help='write no pictures')
    hidden = 'hide what overlaps a better detection of its class by more (0.7; 1: nothing)'
    drawing.add_argument('--nms', type=float, default=visualize.DUPLICATE, metavar='IOU', help=hidden)
    flags.add_font(drawing)
    parser.add_argument('images', nargs='+', help='image files, videos, folders of them, or cameras')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and detect."""
    args = parse(arguments)
    paths = find_images(args.images, Path(args.output))
    flags.check_threshold(args.threshold)
    for name, least in (('max_detections', 0), ('batch_size', 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f'{name} is {getattr(args, name)}, less than {least}', name)
    if not 0 <= args.nms <= 1:
        raise InputError(f'nms is {args.nms}, not between 0 and 1', 'nms')
    visualize.load_font(args.font, 13)  # raises before any work is done
    args.classes = args.classes and sorted(set(args.classes))
    with workdir.opened(args.output, removes=True) as work:
        args.output = work.folder
        if (args.output / EVALUATION).exists():
            raise InputError(
                f'{work.name}: holds an evaluation, of which {LIST} would be replaced', 'output'
            )
        options = dict(log=print, batch_size=args.batch_size, **flags.hints(args))
        detector = Detector.from_pretrained(args.weights, args.step, **options)
        if unknown := set(args.classes or ()) - set(detector.classes.values()):
            known = ', '.join(sorted(detector.classes.values()))
            raise InputError(f'no class {", ".join(sorted(unknown))}; the model has {known}', 'classes')
        bad = predict(detector, paths, args, work.mirror)
        print(f'results: {work.name}')
    if bad:
        print(f'{bad} of {len(paths)} could not be read', file=sys.stderr)
        sys.exit(1)


def predict(
    detector: Detector, paths: list[Path], args: argparse.Namespace, mirror: Mirror | None = None
) -> int:
    """Detect in every file and write; returns how many could not be read."""
    settings = {
        'weights': detector.fingerprint(), 'threshold': args.threshold, 'classes': args.classes,
        'max_detections': args.max_detections, 'pictures': not args.no_pictures, 'nms': args.nms,
        'font': args.font and str(args.font),
    }  # fmt: skip
    predictions = Predictions(args.output, settings, overwrite=args.overwrite)
    videos = [path for path in paths if video.is_video(path)]
    is_done = lambda path: os.path.abspath(path) in predictions.done
    left = [path for path in paths if not video.is_video(path) and not is_done(path)]
    with predictions, concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        entries = _entries(detector, left, args, predictions, pool)
        for entry in progress_bar(entries, total=len(left), unit='image'):
            predictions.add(entry)
            if mirror:
                mirror.push_now_and_then()
    if args.format == 'coco':
        content = as_coco(list(predictions.read()), detector.classes)
        files.write_json(args.output / LIST, content)
    else:
        predictions.write_list()
    count, bad = predictions.counts(paths)
    bad_videos = _annotate(detector, videos, args, predictions)
    counts = {'images': len(paths) - len(videos) - bad, 'objects': count} if paths != videos else {}
    counts |= {'videos': len(videos) - bad_videos} if videos else {}
    print(', '.join(f'{name}: {number}' for name, number in counts.items()))
    return bad + bad_videos


def _annotate(
    detector: Detector, videos: list[Path], args: argparse.Namespace, predictions: Predictions
) -> int:
    """Write the videos with their detections; returns how many could not be read."""
    drawn, bad = functools.partial(_drawn, args=args), 0
    for path, target in predictions.new_videos(videos):
        entry = named(path)
        try:
            problem = video.annotate(detector, path, target, args.threshold, drawn)
        except StorageError:
            raise  # not the fault of the video
        except InputError as error:
            print(f'left out: {error}', file=sys.stderr)
            bad += 1
        else:
            predictions.add_video(entry, target)
            if problem:
                print(f'{path}: seems to be cut off: {problem}', file=sys.stderr)
    return bad


def _entries(
    detector: Detector,
    paths: list[Path],
    args: argparse.Namespace,
    predictions: Predictions,
    pool: concurrent.futures.Executor,
) -> Iterator[dict]:
    """The entry of every file in order; pictures are drawn and written by threads meanwhile."""
    writing, entries = collections.deque(), [named(path) for path in paths]  # before they are read
    results = detector.stream(paths, args.threshold, errors=True, pixels=not args.no_pictures)
    for path, entry, detections in zip(paths, entries, results, strict=True):
        if isinstance(detections, InputError):
            print(f'left out: {detections}', file=sys.stderr)
            writing.append(pool.submit(dict, entry, error=str(detections)))
        else:
            name = None if args.no_pictures else predictions.free_name(path.stem)
            writing.append(pool.submit(_write, entry, detections, name, args))
        while len(writing) > 2 * WRITERS:
            yield writing.popleft().result()
    yield from (job.result() for job in writing)


def _drawn(detections: Detections, args: argparse.Namespace) -> tuple[Detections, Image.Image | None]:
    """The detections that were asked for, and a picture of them."""
    names = args.classes or set(detections.names)
    rows = [i for i, name in enumerate(detections.names) if name in names][: args.max_detections]
    detections = detections.select(rows)
    picture = None if args.no_pictures else detections.draw(font=args.font, duplicates=args.nms)
    return detections, picture


def _write(entry: dict, detections: Detections, name: str | None, args: argparse.Namespace) -> dict:
    """Draw and write a picture; returns the entry of the image, completed."""
    (height, width), (detections, picture) = detections.size, _drawn(detections, args)
    if picture:
        picture.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
        files.write(args.output / name, visualize.encoded(picture, 'jpeg', quality=92, comment=MADE_BY))
    size = {'width': width, 'height': height}
    return {**entry, 'picture': name, **size, 'detections': detections.to_list()}


if __name__ == '__main__':
    cli.run(main)
