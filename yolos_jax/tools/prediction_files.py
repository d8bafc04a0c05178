"""The files of `predict`: a line of JSON for each finished image, and a list of all at the end."""

import collections
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from yolos_jax import file_names, files
from yolos_jax.data import pixels
from yolos_jax.errors import InputError, StorageError
from yolos_jax.naming import has_controls

LINES, LIST, SETTINGS = 'predictions.jsonl', 'predictions.json', 'settings.json'
VIDEOS = 'videos.json'
EVALUATION = 'metrics.json'  # of `evaluate`, whose results have the name of LIST too
STAMP = 'modified', 'bytes'  # by which a replaced image is recognised
MADE_BY = b'drawn by yolos_jax'  # a comment in each picture


class Predictions(contextlib.AbstractContextManager):
    """The lines of a folder of predictions; a context manager that closes the file it appends to.

    What an earlier call left is kept if it was made with the same settings; images that could not be read
    then, or have changed, are tried again.
    """

    def __init__(self, folder: Path, settings: dict, overwrite: bool) -> None:
        """Open the folder.

        settings: what the entries depend on. overwrite: discard existing predictions.

        Raises:
            InputError: it holds predictions with other settings, or other files of these names.
        """
        self._folder, self._path = folder, folder / LINES
        others = [name for name in (LIST, SETTINGS, VIDEOS) if (folder / name).exists()]
        if others and not self._path.exists():  # which is written first
            raise InputError(
                f'{folder}: has {", ".join(others)}, but no predictions; choose another output', 'output'
            )
        entries = list(self.read())
        videos = files.read_json(folder / VIDEOS) if VIDEOS in others else {}  # that are done, by name
        if outside := [name for name in videos if Path(name).name != name]:
            raise InputError(f'{folder / VIDEOS}: damaged (a video named {outside[0]}); remove it')
        is_begun = self._path.exists() and self._path.stat().st_size
        if not overwrite and (is_begun or videos):  # an empty file may have no settings yet
            self._check_settings(settings)
        kept = [] if overwrite else [entry for entry in entries if self._is_done(entry)]
        left = {entry.get('picture') for entry in entries} - {entry['picture'] for entry in kept} - {None}
        if overwrite:
            left |= {f'{name}.{end}' for name in videos for end in ('mp4', 'jsonl')}
            videos = {}
        if VIDEOS in others:  # before the settings: none may be listed under new settings
            files.write_json(folder / VIDEOS, videos)
        with files.replacing(self._path) as file:
            file.writelines(_line(entry) for entry in kept)
        for name in left:  # after the lines that name them, so that none is taken for done
            (folder / name).unlink(missing_ok=True)
        files.write_json(folder / SETTINGS, settings)
        self.done = {_source(entry) for entry in kept}
        self._videos, self._pictures = videos, settings.get('pictures', False)
        pictures = {Path(entry['picture']).stem for entry in kept if entry['picture']}
        self._others = self._names_of_others({*pictures, *videos})
        self._names = {name.casefold() for name in pictures} | self._others
        self._file = open(self._path, 'ab')  # noqa: SIM115  closed by __exit__

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # `add` has raised it
            self._file.close()

    def add(self, entry: dict) -> None:
        """Append the entry of an image."""
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise StorageError(f'{self._path}: cannot be written ({error.strerror})') from None

    def new_videos(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
        """(path, the .mp4 to write) of the videos that are not done yet; a camera is always filmed anew."""
        done_names = {file.stem for file in self._folder.glob('*.jsonl')}
        for path in paths:
            names = {x['file']: name for name, x in self._videos.items() if not path.is_char_device()}
            name = names.get(os.path.abspath(path))
            drawn = not self._pictures or (self._folder / f'{name}.mp4').exists()
            if name is None or name not in done_names or not drawn or _has_changed(self._videos[name]):
                own = {*self._videos, *done_names, Path(LINES).stem}
                taken = {x.casefold() for x in own} | self._others
                yield path, self._folder / f'{name or file_names.free(path.stem, taken)}.mp4'

    def add_video(self, entry: dict, target: Path) -> None:
        """Note that a video is done; entry: `named`, before it was read."""
        self._videos[target.stem] = {key: entry[key] for key in ('file', *STAMP) if key in entry}
        files.write_json(self._folder / VIDEOS, self._videos)

    def free_name(self, stem: str) -> str:
        """The file name of a picture: that of its image, numbered where several images share it."""
        name = file_names.free(stem, self._names)
        self._names.add(name.casefold())
        return f'{name}.jpg'

    def read(self) -> Iterator[dict]:
        """The entries in the file, without damaged lines: a killed writer left one, or a disk."""
        if not self._path.exists():
            return
        with open(self._path, 'rb') as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if _is_entry(entry):
                        yield entry

    def counts(self, paths: Iterable[Path]) -> tuple[int, int]:
        """How many objects there are in some images, and how many of them could not be read."""
        objects, errors, images = 0, 0, set(map(os.path.abspath, paths))
        for entry in (entry for entry in self.read() if _source(entry) in images):
            objects += len(entry.get('detections', ()))
            errors += 'error' in entry
        return objects, errors

    def write_list(self) -> None:
        """Write all entries as one list; they are never in memory together."""
        with files.replacing(self._folder / LIST) as file:
            file.write(b'[')
            for i, entry in enumerate(self.read()):
                file.write((b',\n' if i else b'\n') + _line(entry).rstrip())
            file.write(b'\n]\n')

    def _is_done(self, entry: dict) -> bool:
        """Whether an image could be read, is the same still, and has its picture."""
        if 'error' in entry or _has_changed(entry):
            return False
        return not entry['picture'] or (self._folder / entry['picture']).exists()

    def _names_of_others(self, own: set[str]) -> set[str]:
        """The names, casefolded and without endings, of files in the folder that others wrote."""
        rest = [path for path in self._folder.iterdir() if path.is_file() and path.stem not in own]
        return {path.stem.casefold() for path in rest if not is_own(path)}

    def _check_settings(self, settings: dict) -> None:
        """Raises InputError if those of the predictions in the folder are others."""
        earlier = {}
        with contextlib.suppress(InputError):  # lost or damaged
            earlier = files.read_json(self._folder / SETTINGS)
        if differ := ', '.join(key for key, value in settings.items() if earlier.get(key) != value):
            raise InputError(
                f'{self._folder}: holds predictions made with other settings ({differ}); choose another '
                'output, or overwrite it',
                'output',
            )


def is_own(path: Path) -> bool:
    """Whether a picture in the output was drawn by yolos_jax, and is not a photograph of the user's."""
    try:
        with Image.open(path) as image:
            return image.info.get('comment') in (MADE_BY, MADE_BY.decode())
    except pixels.UNREADABLE:  # no picture
        return False


def _is_entry(entry: object) -> bool:
    """Whether a line of JSON is one of predict: of an error, or with the name of a picture or null."""
    if not isinstance(entry, dict) or not isinstance(entry.get('image'), str):
        return False
    picture = entry.get('picture', '')
    if not isinstance(picture, str):
        return picture is None
    is_name = picture == Path(picture).name and picture.endswith('.jpg') and not has_controls(picture)
    return is_name or 'picture' not in entry and 'error' in entry


def named(path: Path) -> dict:
    """The fields of an entry about its image: its path as given, its absolute path, time and size."""
    return {'image': str(path), 'file': os.path.abspath(path)} | _stamp(path)


def _stamp(path: str | Path) -> dict:
    """The `STAMP` of a file; {} of a link to nowhere."""
    try:
        stat = os.stat(path)
    except OSError:
        return {}
    return dict(zip(STAMP, (stat.st_mtime, stat.st_size), strict=True))


def _has_changed(entry: dict) -> bool:
    """Whether the image of an entry was replaced; a missing image counts as unchanged."""
    return any(entry.get(key, value) != value for key, value in _stamp(_source(entry)).items())


def _source(entry: dict) -> str:
    return entry.get('file') or os.path.abspath(entry['image'])  # version 0.2.0 wrote no 'file'


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + os.linesep.encode()


def as_coco(entries: Sequence[dict], classes: dict[int, str]) -> dict:
    """Entries as a COCO file with scores: images are numbered from 1, boxes are xywh."""
    images, annotations = [], []
    counts = collections.Counter(entry['image'] for entry in entries)
    for number, entry in enumerate((entry for entry in entries if 'error' not in entry), 1):
        size = {'width': entry['width'], 'height': entry['height']}
        name = entry['image'] if counts[entry['image']] == 1 else _source(entry)  # several calls, one name
        images.append({'id': number, 'file_name': name} | size)
        for one in entry['detections']:
            x0, y0, x1, y1 = one['box']
            box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            annotations.append(
                {'id': len(annotations) + 1, 'image_id': number, 'category_id': one['label'], 'bbox': box}
                | {'area': round(box[2] * box[3], 2), 'iscrowd': 0, 'score': one['score']}
            )
    # names of detections too: the weights may have none for a number
    detected = {one['label']: one['name'] for entry in entries for one in entry.get('detections', ())}
    categories = [{'id': number, 'name': name} for number, name in sorted((detected | classes).items())]
    return {'images': images, 'annotations': annotations, 'categories': categories}
