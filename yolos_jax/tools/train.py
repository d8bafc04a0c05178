"""Train a detector.

    yolos train --config=yolos_ti --workdir=DIR --config.data=FOLDER

--config is a file, or the name of an installed config. Any value of the config can be set by
--config.key=value. The workdir receives metrics.jsonl, TensorBoard files, curves.png and checkpoints/; the
same command in the same workdir resumes where the last one stopped. It also receives compiled/, the
programs that XLA compiled, for later starts. JAX_COMPILATION_CACHE_DIR names another folder for them.
"""

from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from yolos_jax.configs import common
from yolos_jax.run import cli, cluster, watchdog, workdir
from yolos_jax.run.compiled import CompiledPrograms
from yolos_jax.run.stop import StopSignal
from yolos_jax.run.train import Step, train

KEYS = common.get_config  # the keys that a config may have
CONFIG = config_flags.DEFINE_config_file('config', None, 'A file, or the name of an installed config.')
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'The folder, or gs:// or s3:// URL, the run writes to and resumes from.'
)
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'host:port of process 0, if no scheduler lists the hosts.'
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes; 1 always runs alone.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process: 0, 1, ...')
HEARTBEAT = flags.DEFINE_integer('heartbeat', 30, 'Seconds until a silent process is dead.')
STUCK = flags.DEFINE_integer(
    'stuck', watchdog.STUCK, 'Seconds without a step until the process ends; 0: never.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(
    on_step: Callable[[Step], bool | None] | None = None, start: Callable[..., int | None] = train
) -> None:
    """Parse the flags and train; on_step: as for `yolos_jax.train`; start: that function or `pretrain`."""
    stop, lengths = StopSignal(), set()
    cli.keep_memory()
    cluster.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, HEARTBEAT.value)
    programs = CompiledPrograms(workdir.programs_folder(WORKDIR.value))

    def after_step(step: Step) -> bool | None:
        if step.length not in lengths or step.number % 100 == 0:  # a new program, or another that was new
            lengths.add(step.length)
            programs.note()
        return on_step(step) if on_step else None

    number = start(CONFIG.value, WORKDIR.value, on_step=after_step, stuck=STUCK.value, stop=stop)
    programs.note()
    if number:
        cli.leave(128 + number)


if __name__ == '__main__':
    cli.run_with_flags(main, KEYS)
