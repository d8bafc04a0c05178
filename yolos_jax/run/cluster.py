"""Multi-process start-up, agreement and shutdown.

It builds on jax.distributed and its collectives; a single process waits for nothing.
"""

import contextlib
import hashlib
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import yolos_jax
from yolos_jax import cpus, files
from yolos_jax.errors import InputError
from yolos_jax.run import rendezvous, watchdog

# variables of Open MPI, MPICH and Kubernetes' indexed jobs, and their largest value for one process
LAUNCHERS = {'OMPI_COMM_WORLD_SIZE': 1, 'PMI_SIZE': 1, 'JOB_COMPLETION_INDEX': 0}
_heartbeat = 30  # seconds, set by `start`


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 30,
) -> None:
    """Join the other processes of this run, before any device is used.

    jax.distributed detects TPU pods, Slurm, Open MPI 4 and Kubernetes; without one of them, and without
    arguments, the process is alone.

    Args:
        coordinator: 'host:port' of process 0, where no scheduler lists the hosts; then num_processes and
            process_id (0, 1, ...) are needed too. num_processes: 1 always runs alone.
        heartbeat: seconds after which a silent process counts as dead, and the others end.

    Raises:
        InputError: the arguments do not describe a cluster, the heartbeat is below 1, or a process did not
            connect or died before all had joined.
    """
    if heartbeat < 1:
        raise InputError(f'heartbeat is {heartbeat}, less than a second', 'heartbeat')
    given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    global _heartbeat
    _heartbeat = heartbeat
    if num_processes == 1:
        return
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise InputError(
            f'several processes without a scheduler need {" and ".join(missing)} too', missing[0]
        )
    if not missing:
        rendezvous.meet(coordinator, num_processes, process_id, heartbeat)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, _own_devices(),
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=watchdog.STUCK,  # process 0 scores and uploads after the others
        )  # fmt: skip
    except ValueError as error:
        if not missing:
            raise InputError(f'coordinator {coordinator}: {error}', 'coordinator') from None
        _check_alone()
    except RuntimeError as error:
        where = coordinator or 'the cluster (num_processes 1 always runs alone)'
        raise InputError(f'cannot join {where}: {error}', 'num_processes') from None


def _own_devices() -> list | None:
    """Which GPUs of its machine are this process's: [] for all that it sees, None for JAX's choice.

    Under Slurm and Open MPI JAX chooses the one with the process's number on the machine. That is wrong for
    the only process of a machine, and for one that sees a single GPU.
    """
    if os.environ.get('JAX_LOCAL_DEVICE_IDS'):
        return None
    is_alone = re.fullmatch(r'1(\(x\d+\))?', os.environ.get('SLURM_STEP_TASKS_PER_NODE', ''))
    is_alone = is_alone or os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
    sees_one = re.fullmatch(r'[^,]+', os.environ.get('CUDA_VISIBLE_DEVICES', ''))
    return [] if is_alone or sees_one else None


def _check_alone() -> None:
    """Raises InputError if this process was started as one of several that JAX does not see."""
    for name, of_one in LAUNCHERS.items():
        if os.environ.get(name, '').isdecimal() and int(os.environ[name]) > of_one:
            raise InputError(
                f'{name} is {os.environ[name]}, so there are several processes, but JAX cannot connect '
                'them; give host:port of process 0, or num_processes 1 to run each process alone',
                'coordinator',
            )


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints for all."""
    return jax.process_index() == 0


def agree(facts: dict[str, Any]) -> None:
    """Raises InputError if one of the facts {name: anything} is not the same in every process."""
    texts = [str(fact).encode(errors='replace') for fact in facts.values()]  # paths may not be UTF-8
    digests = [hashlib.sha256(text).digest() for text in texts]
    everyone = gather(np.frombuffer(b''.join(digests), np.uint8).reshape(1, len(facts), -1))
    same = (everyone == everyone[0]).all(axis=2)  # [process, fact]
    wrong = [
        f'{name} of process {", ".join(map(str, np.flatnonzero(~same[:, i])))}'
        for i, name in enumerate(facts)
        if not same[:, i].all()
    ]
    if wrong:
        raise InputError(f'the processes disagree: {"; ".join(wrong)} differs from process 0')


def facts_of_code() -> dict[str, Any]:
    """Facts for `agree`: the version of JAX, and the code of this package.

    Without its configs, which lie elsewhere in a clone than in a wheel.
    """
    root = Path(yolos_jax.__file__).parent
    own = [file for file in sorted(root.rglob('*.py')) if file.parent.name != 'configs']
    code = {str(file.relative_to(root)): files.sha256(file) for file in own}
    return {'the version of jax': jax.__version__, 'the code of yolos_jax': code}


def gather(x: np.ndarray) -> np.ndarray:
    """The rows of every process's array, [n, ...] each, in the order of processes; bit for bit."""
    x = np.ascontiguousarray(x)
    if jax.process_count() == 1:
        return x
    raw = x.reshape(-1).view(np.uint8)  # other types would be cast: JAX has no 64 bits
    return multihost_utils.process_allgather(raw).reshape(-1).view(x.dtype).reshape(-1, *x.shape[1:])


def from_first(tree: Any) -> Any:
    """Process 0's arrays of a tree, bit for bit; they have the same shapes in every process.

    Each process reads weights or makes parameters by itself: its copy of the file may be another one, and
    other kinds of CPUs round differently.
    """
    if jax.process_count() == 1:
        return tree

    def one(x: jax.Array | np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        bits = x.view(f'u{x.itemsize}')  # JAX adds zeros, after which -0.0 would be 0.0
        return multihost_utils.broadcast_one_to_all(bits).view(x.dtype)

    return jax.tree.map(one, tree)


def threads() -> int:
    """The number of loader threads of a process: its CPUs, divided among the processes that share them.

    A scheduler may give the processes of a host different CPUs, or all of them to each.
    """
    own_cpus = f'{socket.gethostname()} {cpus.affinity()}'
    digest = np.frombuffer(hashlib.sha256(own_cpus.encode()).digest(), np.uint8)[None]
    sharing = (gather(digest) == digest).all(axis=1).sum()
    return max(cpus.usable() // int(sharing), 1)


def fetch(tree: Any) -> Any:
    """Copies of the arrays of a tree in this process's memory; sharded ones are gathered one at a time."""
    is_here = lambda x: x.is_fully_addressable or x.is_fully_replicated
    whole = lambda x: x if is_here(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(lambda x: np.array(whole(x)), tree)


def broadcast(number: float | None) -> float:
    """A number that process 0 knows, in every process, NaN for None; the others' argument is ignored."""
    return float(gather(np.array([number], np.float64))[0])


def anywhere(fact: Any) -> bool:
    """Whether a fact is true in any process."""
    return bool(gather(np.array([bool(fact)])).any())


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_alone() -> bool:
    """Whether this process belongs to no cluster."""
    return not jax.distributed.is_initialized()


def is_of_gloo(error: BaseException) -> bool:
    """Whether an error is a ValueError of gloo, by which the processes of a CPU cluster send arrays."""
    return type(error) is ValueError and 'Gloo' in str(error)


def leave(status: int, text: str, error: BaseException) -> None:
    """End this process at once with a line on stderr, so that the others end too.

    A usual exit would first wait for them. A failed collective says only that some process is gone; then
    JAX's own service gets the time to find out which one, report it, and end this process.
    """
    with contextlib.suppress(OSError, ValueError):  # a full disk, or nobody reads it
        number, count = jax.process_index(), jax.process_count()
        print(f'process {number} of {count}: {text}', file=sys.stderr, flush=True)
    if isinstance(error, jax.errors.JaxRuntimeError) or is_of_gloo(error):
        time.sleep(_heartbeat + 5)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
