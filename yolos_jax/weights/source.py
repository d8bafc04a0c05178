"""Opens, hashes and recognises a file or folder of weights, once."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from yolos_jax import forks
from yolos_jax.errors import InputError, shown
from yolos_jax.model import Vit, Yolos
from yolos_jax.weights import backbones, checkpoint, deit, hf, native, reference, tensors, zoo
from yolos_jax.weights.pretrained import Pretrained

LONGEST_MESSAGE = 300  # characters, beside the path
HINTS = 'heads', 'pos_grid', 'mid_pos_grid'  # arguments of `Source.detector` for a .pth
DET_TOKENS = ('det_token', 'detection_tokens')  # ends the name of a tensor that only detectors have


def load(path: str | Path, step: int | None = None, **hints: Any) -> tuple[Yolos, dict]:
    """The model and parameters of a detector, as `read`."""
    pretrained = read(path, step, **hints)
    return pretrained.model, pretrained.params


def read(path: str | Path, step: int | None = None, **options: Any) -> Pretrained:
    """The detector in a file or folder, read into memory.

    path, step: as for `open_source`; options: those of `Source.detector`. Raises as they do.
    """
    with open_source(path, step) as source:
        return source.detector(**options)


def init_from_backbone(path: str | Path, model: Yolos, rng: jax.Array) -> dict:
    """Parameters of a detector with the ViT in `path`, as `Source.backbone`; the report is printed."""
    with open_source(path) as source:
        return source.backbone(model, rng, log=print)


def open_source(path: str | Path, step: int | None = None) -> 'Source':
    """Open a file or folder of weights.

    path: a folder of our checkpoints (a run's workdir too, or one step's folder), a Hugging Face folder,
        one of `native` or a file of either, a .pth of the reference, any of the backbones that `backbones`
        lists, or a name that `zoo` knows or Hugging Face does ("hustvl/yolos-tiny", "...@REVISION"). No
        pickle is run.
    step: of a run's checkpoints, the one to read; the best by AP, else the newest, when None.

    Raises:
        InputError: there is no such file, it is damaged, or it has no weights.
    """
    try:
        return _open(zoo.local(path), step)
    except OSError as error:  # of a folder that another user may not look into
        raise InputError(f'{error.filename or path}: cannot be read ({error.strerror or error})') from None


def _open(path: Path, step: int | None) -> 'Source':
    """As `open_source`, of what is on this machine."""
    if path.name.isdecimal() and path.is_dir() and int(path.name) in checkpoint.steps(path.parent):
        if step not in (None, int(path.name)):
            raise InputError(f'{path}: is step {path.name}, not {step}', 'step')
        return Source(path, None, path.parent, int(path.name))
    if step is None and (path / deit.FILE).is_file():  # of a pre-training
        path = path / deit.FILE
    for folder in (path, path / checkpoint.FOLDER):
        if folder.is_dir() and (steps := checkpoint.steps(folder)):
            if step is not None and step not in steps:
                raise InputError(f'{path}: has no step {step}; it has {", ".join(map(str, steps))}', 'step')
            return Source(path, None, folder, step)
    if step is not None:
        raise InputError(f'{path}: no checkpoints of a run, so there is no step to choose', 'step')
    with _naming(path):
        file = tensors.read(_find_file(path))
    if file.note:
        print(f'{file.path} {file.note}', file=sys.stderr)
    return Source(path, file, None)


@dataclasses.dataclass(frozen=True)
class Source(contextlib.AbstractContextManager['Source']):
    """An open file of tensors, or a folder of our checkpoints; a context manager that closes it."""

    path: Path
    file: tensors.TensorFile | None
    checkpoints: Path | None
    step: int | None = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read from it stays."""
        if self.file:
            self.file.close()

    @property
    def is_detector(self) -> bool:
        """Whether `detector` can read it; else it may be a backbone."""
        return self.checkpoints is not None or any(n.endswith(DET_TOKENS) for n in self.file.tensors)

    @property
    def about(self) -> dict:
        """The name of the file and its SHA-256; empty for a folder of our checkpoints."""
        if not self.file:
            return {}
        path = self.file.path  # the name of a folder says more than model.safetensors
        name = f'{path.parent.name}/{path.name}' if path.name in tensors.WITH_CONFIG else path.name
        return {'source': name, 'sha256': self.file.sha256}

    def detector(
        self,
        heads: int | None = None,
        pos_grid: tuple[int, int] | None = None,
        mid_pos_grid: tuple[int, int] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> Pretrained:
        """The detector, read into memory.

        heads, pos_grid, mid_pos_grid: needed for a .pth of an unpublished model that does not give them.
        log: called with each line about the file.

        Raises:
            InputError: there is no detector, or the file lacks a required value.
            RuntimeError: the process was forked after another had read weights.
        """
        forks.check()
        hints = {'heads': heads, 'pos_grid': pos_grid, 'mid_pos_grid': mid_pos_grid}
        if self.checkpoints:
            check_unused(hints, self.path)
            pretrained = checkpoint.read(self.checkpoints, self.step)
            if log:
                step, ap = pretrained.about.get('step'), pretrained.about.get('AP')
                log(f'{self.path}: step {step}' + ('' if ap is None else f', AP {ap:.3f}'))
            return pretrained
        if not self.is_detector:
            raise InputError(
                f'{self.file.path}: no YOLOS detector (no [DET] tokens in it), but perhaps a backbone to '
                'train one from'
            )
        with _naming(self.file.path):
            if native.is_native(self.file):
                check_unused(hints, self.path)
                pretrained = native.read(self.file)
            elif hf.has_config(self.file):
                check_unused(hints, self.path)
                pretrained = hf.read(self.file)
            else:
                pretrained = reference.read(self.file, **hints)
        if log:
            others = [key for key in tensors.INNER if isinstance(self.file.about.get(key), dict)]
            ignored = ', '.join(str(key) for key in self.file.about if key not in others) or 'nothing'
            log(f'{self.file.path}: SHA-256 {self.file.sha256}')
            log(f'  used {len(self.file.tensors)} tensors; ignored, as they are no weights: {ignored}')
            if others:
                log(f'  not read, as only one of a file is: the weights in {", ".join(others)}')
        return dataclasses.replace(pretrained, about=pretrained.about | self.about)

    def backbone_fields(self) -> dict:
        """The fields of a `Yolos` with this ViT that its file says; raises InputError as `backbone`."""
        with _naming(self._backbone_file().path):
            return backbones.fields(self.file)

    def backbone(self, model: Yolos, rng: jax.Array, log: Callable[[str], None] = print) -> dict:
        """Parameters of `model` with this ViT, fresh [DET] tokens and fresh heads (`backbones.start`).

        rng: a jax random key. log: called with each line of the report.

        Raises:
            InputError: this is not a ViT, is a detector, or is a ViT of another shape.
        """
        forks.check()
        with _naming(self._backbone_file().path):
            params, report = backbones.start(self.file, model, rng)
        log(f'{self.file.path}: SHA-256 {self.file.sha256}')
        for line in report:
            log(f'  {line}')
        return params

    def vit(self, heads: int | None = None) -> tuple[Vit, dict]:
        """This ViT alone, and its parameters: a backbone's features, before any detector starts from it.

        heads: needed if neither the file nor its width tells how many there are. The distillation token of
        a distilled ViT is left out, with its position.

        Raises:
            InputError: this is not a ViT, is a detector, or its heads are unknown.
        """
        forks.check()
        with _naming(self._backbone_file().path):
            return backbones.features(self.file, heads)

    def _backbone_file(self) -> tensors.TensorFile:
        if self.checkpoints:
            checkpoint.check_detector(self.checkpoints)
        if self.is_detector:
            raise InputError(f'{self.path}: a YOLOS detector, not a backbone')
        return self.file


def check_unused(hints: dict, path: Path) -> None:
    """Raises InputError if a hint is given."""
    if given := [name for name, value in hints.items() if value is not None]:
        raise InputError(
            f'{path}: describes its model itself; {given[0]} is for a .pth of a detector', given[0]
        )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes errors within the block name this file, and shortens them."""
    try:
        yield
    except InputError as error:
        raise _named(error, path) from None
    # of shapes that no model has, or values in a JSON beside it
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        text = f'its tensors, or the JSON beside it, cannot be used ({type(error).__name__}: {error})'
        raise _named(InputError(text), path) from error


def _named(error: InputError, path: Path) -> InputError:
    text, most = str(error), len(str(path)) + LONGEST_MESSAGE
    text = text if str(path) in text else f'{path}: {text}'
    return InputError(text if len(text) <= most else f'{text[: most - 3]}...', error.argument)


def _find_file(path: Path) -> Path:
    """The file of tensors at `path`: itself, or the one in a Hugging Face folder or beside a model card."""
    if not path.exists():
        raise InputError(f'{path}: no such file or folder')
    if not path.is_dir():
        return path
    for name in tensors.WITH_CONFIG:
        if (path / name).exists() and (path / tensors.CONFIG).exists():
            return path / name
    if any((path / f'{name}.index.json').exists() for name in tensors.WITH_CONFIG):
        raise InputError(
            f'{path}: its weights are in several files; save them again as one, in transformers by '
            "`save_pretrained(folder, max_shard_size='100GB')`"
        )
    if (path / 'adapter_config.json').exists():
        raise InputError(
            f'{path}: a PEFT adapter without its base model; merge them, in peft by '
            '`merge_and_unload().save_pretrained(folder)`'
        )
    # what `yolos convert` wrote, with a model card; Trainer's rng_state.pth has no weights
    torch_files = [file for file in path.glob('*.pth') if not file.name.startswith('rng_state')]
    if len(torch_files) == 1:
        return torch_files[0]
    levels = '*', 'snapshots/*'  # such as checkpoints of Trainer, and the hub's cache
    inside = sorted(
        str(folder)
        for level in levels
        for folder in path.glob(level)
        if any((folder / name).exists() for name in tensors.WITH_CONFIG)
    )
    raise InputError(
        f'{path}: neither a checkpoint folder of yolos_jax nor a Hugging Face folder (config.json with '
        f'{" or ".join(tensors.WITH_CONFIG)})'
        + (f'; name one of those in it: {shown(inside)}' if inside else '')
    )
