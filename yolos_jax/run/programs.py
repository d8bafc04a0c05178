"""Compiles the training step for each sequence length, before the first batch of that length."""

import concurrent.futures
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from yolos_jax.run import mesh as meshes


class Programs:
    """Programs of a training step by the length of their sequences.

    A thread compiles them one after the other while the first batch is loaded and finished programs run.
    It also leaves the caller free to handle signals: XLA does not return to Python before a program is
    compiled.
    """

    def __init__(
        self,
        step: Callable,
        mesh: Mesh,
        *,
        state: dict,
        empty: Callable[[int], dict],
        lengths: np.ndarray,
        log: Callable[[str], None],
    ) -> None:
        """Begins to compile.

        step: jitted, (state, batch) -> (state, metrics). state: the first one. empty: gives the arrays of a
        whole batch of a length, of all processes. lengths: of the next steps, to compile for in the order
        in which they come. log: receives a line at the start, and one for each program.
        """
        self._step, self._mesh, self._empty, self._log = step, mesh, empty, log
        # with the layout in memory (`mesh.in_memory`), which for 4-D arrays is not a TPU's default
        describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.format)
        self._state = jax.tree.map(describe, state)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'compile')
        lengths = list(dict.fromkeys(lengths.tolist()))
        if lengths:
            log(f'compiling for sequences of {", ".join(map(str, lengths))} patches ...')
        self._jobs = {n: self._thread.submit(self._compile, n) for n in lengths}

    def of(self, length: int, on_wait: Callable[[], None]) -> Callable:
        """The program for a length; until it is compiled `on_wait` is called several times a second.

        Raises:
            Exception: what the compiler or `on_wait` raised.
        """
        if length not in self._jobs:
            self._jobs[length] = self._thread.submit(self._compile, length)
        job = self._jobs[length]
        while not job.done():
            concurrent.futures.wait([job], 0.2)
            on_wait()
        return job.result()

    def close(self) -> None:
        """Cancel the compilations that have not begun; does not wait for the current one."""
        self._log = lambda _: None  # its end would be logged in a later run of a notebook
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, length: int) -> Callable:
        clock, batch = time.monotonic(), meshes.shapes(self._empty(length), self._mesh)
        with jax.set_mesh(self._mesh):
            program = self._step.lower(self._state, batch).compile()
        count, seconds = batch['patches'].shape[0], time.monotonic() - clock
        self._log(f'compiled for {count} sequences of {length} patches in {seconds:.0f} s')
        return program
