"""`Detector`: runs a detector on an image, a list or a stream of images."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from yolos_jax import attention, cpus, forks, pictures, steps, weights
from yolos_jax.detections import Detections, best_first
from yolos_jax.errors import InputError
from yolos_jax.pictures import Picture
from yolos_jax.prepared import Prepared, in_batches, prepare, sequence_lengths

DTYPES = 'float32', 'bfloat16'  # of the activations
WINDOW = 4  # batches that are read ahead, so that images of one length share a batch


class Detector:
    """A detector ready for use: `Detector.from_pretrained(path)(image)`."""

    def __init__(
        self,
        pretrained: weights.Pretrained,
        device: jax.Device | None = None,
        batch_size: int | None = None,
        dtype: str | None = None,
    ) -> None:
        """A detector on one device.

        device: where to compute; None: JAX's first device. batch_size: how many images of equal
            sequence length are computed together; None: 8, or 1 on a CPU, where more are no faster.
            dtype: of the activations; when None the model's, which is float32 in all files; 'bfloat16'
            is faster on a GPU or TPU and less exact.

        Raises:
            InputError: an argument has a wrong type or value.
            RuntimeError: the process was forked after weights were read, which JAX does not survive.
        """
        forks.check()
        if not isinstance(pretrained, weights.Pretrained):
            raise InputError(
                f'a Detector takes a Pretrained, not {type(pretrained).__name__}; for a path use '
                'Detector.from_pretrained'
            )
        if batch_size is not None and not (isinstance(batch_size, numbers.Integral) and batch_size > 0):
            raise InputError(f'batch_size is {batch_size!r}, not a positive integer', 'batch_size')
        if not isinstance(device, jax.Device | None):
            raise InputError(f'device is {device!r}, not one of jax.devices()', 'device')
        if dtype not in (None, *DTYPES):
            raise InputError(f'dtype is {dtype!r}, not {" or ".join(map(repr, DTYPES))}', 'dtype')
        device, dtype = device or jax.devices()[0], jnp.dtype(dtype or pretrained.model.dtype)
        kernel = attention.for_platform(attention.platform_of(device), dtype)
        self.model = model = pretrained.model.clone(attention_kernel=kernel, dtype=dtype)
        self._names, self.size, self.max_size = pretrained.classes, pretrained.size, pretrained.max_size
        self._ids = pretrained.category_ids
        self.classes = {self._ids[label]: name for label, name in self._names.items()}
        self._lengths = sequence_lengths(self.size, self.max_size)
        self.batch_size = batch_size or (1 if device.platform == 'cpu' else 8)
        self.params = jax.device_put(pretrained.params, device)
        self._step = steps.make_predict_step(model)
        self._pretrained = dataclasses.replace(pretrained, params={})

    def __repr__(self) -> str:
        model, classes = self.model, len(self.classes)
        size = f'width={model.width}, depth={model.depth}, classes={classes}, size={self.size}'
        return f'Detector({size}, dtype={model.dtype.name})'

    def __reduce__(self) -> tuple:
        """Support pickling: in the other process the detector computes on JAX's first device."""
        return Detector, (self.pretrained, None, self.batch_size, self.model.dtype.name)

    @property
    def pretrained(self) -> weights.Pretrained:
        """The detector as `weights.read` returns it, with parameters in the memory of this process."""
        return dataclasses.replace(self._pretrained, params=jax.device_get(self.params))

    def fingerprint(self) -> str:
        """A hash of everything that detections depend on."""
        fields = [getattr(self.model, name) for name in weights.checkpoint.MODEL_FIELDS]
        settings = fields, self.size, self.max_size, self.classes, str(jnp.dtype(self.model.dtype))
        digest = hashlib.sha256(repr(settings).encode())
        for array in jax.tree.leaves(self.params):
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        step: int | None = None,
        log: Callable | None = None,
        *,
        device: jax.Device | None = None,
        batch_size: int | None = None,
        dtype: str | None = None,
        **hints: Any,
    ) -> 'Detector':
        """A detector from any file, folder or name with a detector that `weights.open` takes.

        step: as for `weights.open`. log, and of hints heads, pos_grid and mid_pos_grid: as for
        `Source.detector`. device, batch_size, dtype: as for the constructor.
        """
        if unknown := sorted(hints.keys() - {*weights.HINTS}):  # before anything is downloaded
            raise TypeError(f'from_pretrained() got an unexpected keyword argument {unknown[0]!r}')
        pretrained = weights.read(path, step, log=log, **hints)
        return cls(pretrained, device, batch_size, dtype)

    @overload
    def __call__(self, images: Picture, threshold: float = 0.5) -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], threshold: float = 0.5) -> list[Detections]: ...

    def __call__(
        self, images: Picture | Sequence[Picture], threshold: float = 0.5
    ) -> Detections | list[Detections]:
        """The objects in an image, or in each of a list, with a score of at least `threshold`.

        images: a path or http(s) link (photographs are turned upright by their EXIF), an open file or the
            bytes of one, a PIL image, or an RGB array [height, width, 3]; gray, RGBA and 16-bit arrays are
            converted as image files are. One image gives `Detections`, a list or tuple gives a list.
            Each image is resized as for evaluation; its result does not depend on the others.

        Raises:
            InputError: an image cannot be read or has a wrong type, or the threshold is not a score.
            RuntimeError: the process was forked after the detector was made.
        """
        if isinstance(images, list | tuple):
            results = []
            for i, item in enumerate(self._stream(map(pictures.loaded, images), threshold, errors=True)):
                if isinstance(item, InputError):
                    raise type(item)(f'images[{i}]: {item}')
                results.append(item)
            return results
        (detections,) = self._stream(iter([images]), threshold)
        return detections

    @overload
    def stream(
        self,
        images: Iterable[Picture],
        threshold: float = 0.5,
        *,
        errors: Literal[False] = False,
        pixels: bool = False,
    ) -> Iterator[Detections]: ...

    @overload
    def stream(
        self, images: Iterable[Picture], threshold: float = 0.5, *, errors: bool, pixels: bool = False
    ) -> Iterator[Detections | InputError]: ...

    def stream(
        self,
        images: Iterable[Picture],
        threshold: float = 0.5,
        *,
        errors: bool = False,
        pixels: bool = False,
    ) -> Iterator[Detections | InputError]:
        """The objects in each of any number of images, in order, as `__call__`.

        Threads read some images ahead, and the device computes on one batch while the next is prepared.
        Arrays, PIL images and open files are copied on arrival, so that a camera's buffer can be reused.
        errors: yield the `InputError` of an unreadable image in its place instead of raising it.
        pixels: set `Detections.image` to the image's RGB array, and not to what was given.

        Raises:
            InputError: `images` is one image, or as for `__call__`.
        """
        one = str | bytes | bytearray | os.PathLike | Image.Image
        if isinstance(images, one) or hasattr(images, 'read') or getattr(images, 'ndim', 4) in (2, 3):
            raise InputError('stream takes an iterable of images; for one image give [image]')
        return self._stream(map(pictures.copied, images), threshold, errors=errors, keep=pixels)

    def _stream(
        self, images: Iterator[Picture], threshold: float, *, errors: bool = False, keep: bool = False
    ) -> Iterator[Detections | InputError]:
        forks.check()
        least_score, size = _least_score(threshold), WINDOW * self.batch_size
        failed: list[Exception] = []  # what `images` raised: the results of those before it come first
        with concurrent.futures.ThreadPoolExecutor(cpus.usable()) as pool:

            def read() -> list[concurrent.futures.Future]:
                jobs = []
                try:
                    for image in itertools.islice(images, 0 if failed else size):
                        jobs.append(pool.submit(self._read, image, keep))
                except Exception as error:
                    failed.append(error)
                return jobs

            ahead, computing = read(), []
            try:
                while ahead or computing:
                    now = ahead
                    ahead = read() if now else []  # before those of now are waited for
                    done, computing = computing, self._compute([job.result() for job in now])
                    for item in done:
                        if not isinstance(item, InputError):
                            yield self._best(*item, least_score)
                        elif errors:
                            yield item
                        else:
                            raise item
                if failed:
                    raise failed[0]
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, image: Picture, keep: bool) -> Prepared | InputError:
        try:
            return self.prepare(image, keep)
        except InputError as error:
            return error

    def prepare(self, image: Picture, keep: bool = False) -> Prepared:
        """An image as patches in one of few sequence lengths; raises InputError as `__call__`.

        keep: set `image` of the result to its RGB array, and not to the argument.
        """
        return prepare(image, self.size, self.max_size, self._lengths, keep=keep)

    def outputs(self, batch: dict) -> dict:
        """The outputs of `steps.make_predict_step` for a batch of 'patches' and 'grid', as numpy arrays."""
        forks.check()
        return jax.device_get(self._step(self.params, batch))

    def _compute(self, images: list) -> list:
        """Start to compute; returns (image, outputs of its batch, its row) for each, or its error."""
        items = list(images)
        for members, batch in in_batches(images, self.batch_size):
            outputs = self._step(self.params, batch)
            for row, i in enumerate(members):
                items[i] = images[i]._replace(patches=None), outputs, row
        return items

    def _best(self, prepared: Prepared, outputs: dict, row: int, threshold: float) -> Detections:
        of_image = {name: np.asarray(values)[row] for name, values in outputs.items()}
        return self.detections(prepared, of_image, best_first(of_image['scores'], threshold))

    def detections(self, prepared: Prepared, outputs: dict, tokens: np.ndarray) -> Detections:
        """The detections of some tokens from the outputs for an image (`Detections.of_tokens`)."""
        options = dict(ids=self._ids, image=prepared.image)
        return Detections.of_tokens(outputs, tokens, self._names, prepared.size, **options)


def _least_score(threshold: object) -> float:
    """A threshold as a number; raises InputError if it is none, or above all scores."""
    try:
        score = float(threshold)
    except (TypeError, ValueError):
        score = np.nan
    if not score <= 1:
        raise InputError(f'threshold is {threshold!r}, not a number of at most 1', 'threshold')
    return score
