"""The training step compiled for each length of sequences, ahead of the first batch that has it."""

import concurrent.futures
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh


class Programs:
    """Programs of a training step by the length of their sequences.

    A thread compiles them one after the other while steps of those that are done run. The thread also
    leaves the caller free to hear a signal: XLA does not return to Python before a program is done.
    """

    def __init__(self, step: Callable, mesh: Mesh, lengths: np.ndarray, log: Callable[[str], None]) -> None:
        """Nothing is compiled before the first call of `of`.

        step: jitted, (state, batch) -> (state, metrics). lengths: of the next steps, to compile for in the
        order in which they come. log: receives a line for each program.
        """
        self._step, self._mesh, self._log = step, mesh, log
        _, first = np.unique(lengths, return_index=True)
        self._ahead = lengths[np.sort(first)].tolist()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'compile')
        self._jobs: dict[int, concurrent.futures.Future] = {}

    def of(self, state: dict, batch: dict, on_wait: Callable[[], None]) -> Callable:
        """The program for a batch; until it is there `on_wait` is called several times a second.

        Raises:
            Exception: what the compiler or `on_wait` raised.
        """
        length = batch['patches'].shape[1]
        if length not in self._jobs:
            describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            shapes = jax.tree.map(describe, (state, batch))
            for each in [length, *self._ahead]:
                if each not in self._jobs:
                    self._jobs[each] = self._thread.submit(self._compile, *shapes, each)
        job = self._jobs[length]
        while not job.done():
            concurrent.futures.wait([job], 0.2)
            on_wait()
        return job.result()

    def close(self) -> None:
        """Give up what is not compiled yet; does not wait for the program in hand."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, state: dict, batch: dict, length: int) -> Callable:
        clock, patches = time.monotonic(), batch['patches']
        B, _, pixels = patches.shape
        patches = jax.ShapeDtypeStruct((B, length, pixels), patches.dtype, sharding=patches.sharding)
        with jax.set_mesh(self._mesh):
            program = self._step.lower(state, batch | {'patches': patches}).compile()
        self._log(f'compiled for {B} sequences of {length} patches in {time.monotonic() - clock:.0f} s')
        return program
