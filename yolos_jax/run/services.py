"""The services that the training loop uses: checkpoints, metrics, log, watchdog and stop signal."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from yolos_jax import bucket
from yolos_jax.run import cluster, config_files, workdir
from yolos_jax.run.checkpoints import Checkpoints
from yolos_jax.run.energy import Energy
from yolos_jax.run.log import Log
from yolos_jax.run.meters import Goodput, Means, Throughput
from yolos_jax.run.setup import Setup
from yolos_jax.run.stop import StopRun, StopSignal
from yolos_jax.weights import checkpoint


class Run(NamedTuple):
    """The services of a run: checkpoints, metrics, log, watchdog and stop signal."""

    work: workdir.Workdir
    checkpoints: Checkpoints
    meta: dict  # the part that all checkpoints share
    means: Means
    goodput: Goodput
    energy: Energy
    throughput: Throughput
    log: Log
    progress: Callable[[], None]  # to be called at every progress (`watchdog.started`)
    stop: StopSignal | None

    def save(self, state: dict) -> bool:
        """Save the state unless the last step was not finite; returns whether it was saved."""
        self.means.settle()
        if not self.means.nonfinite_streak:
            counts = {'means': self.means.state(), 'goodput': self.goodput.state()}
            self.checkpoints.save(state, self.meta | counts | {'energy': self.energy.joules})
        return not self.means.nonfinite_streak

    def stops(self) -> bool:
        """Whether the run was asked to stop; every process calls it at the same places."""
        return self.stop is not None and self.stop.together()

    def after_batch(self) -> None:
        """Called after each batch of an evaluation: tells the watchdog; raises StopRun if asked to stop."""
        self.progress()
        if self.stops():
            raise StopRun

    def while_compiling(self) -> None:
        """Called several times a second while compiling: as `after_batch`, and restarts the throughput."""
        self.progress()
        # in a cluster, whose processes compile unequally long, the others would wait for it
        if self.stop and self.stop.number is not None and cluster.is_alone():
            raise StopRun
        self.throughput.restart()


def resume(
    setup: Setup, work: workdir.Workdir, progress: Callable[[], None], stop: StopSignal | None
) -> tuple[dict, Run]:
    """The state to continue from, and the `Run` that goes with it."""
    folder = work.folder
    checkpoints = Checkpoints(folder / checkpoint.FOLDER, work.mirror, work.check)
    meta = setup.describe() | {'config': config_files.flat(setup.config), 'data': setup.digests}
    restored = checkpoints.restore(setup.state)
    if restored:  # else the initial state would stay in the devices' memory for the whole run
        jax.tree.map(lambda x: x.delete(), setup.state)
    state, saved = restored or (setup.state, {})
    first = int(state['step'])
    evaluated = checkpoints.ap(first) is not None
    options = dict(per_epoch=setup.batches.steps_per_epoch, writes=cluster.is_first(), evaluated=evaluated)
    log = Log(folder, range(first, setup.total), check=work.check, **options)
    if cluster.is_first():
        log.config(meta['config'])
    # version 0.1 called the means a tally
    means = Means(saved.get('means') or saved.get('tally'), spike_factor=setup.config.spike_factor)
    goodput = Goodput(saved.get('goodput'), steps_lost=max(log.last_step - first, 0))
    log.print(setup.summary(first))
    return state, Run(
        work=work,
        checkpoints=checkpoints,
        meta=meta,
        means=means,
        goodput=goodput,
        energy=Energy(saved.get('energy')),
        throughput=Throughput(),
        log=log,
        progress=progress,
        stop=stop,
    )


def measurements(setup: Setup, run: Run, step: int) -> dict[str, float]:
    """The numbers in a log line beside the means of the steps' metrics."""
    memory = (setup.mesh.local_devices[0].memory_stats() or {}).get('peak_bytes_in_use')
    return (
        {
            'images_per_s': run.throughput.images_per_s(),
            'learning_rate': float(setup.rate(step)),
            'goodput': run.goodput.share(),
            'starts': run.goodput.starts,
            'steps_lost': run.goodput.steps_lost,
        }
        | ({} if memory is None else {'device_memory_gb': memory / 1e9})
        | ({'network_retries': float(bucket.retries())} if run.work.mirror else {})
    )
