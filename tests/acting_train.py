"""train.py that also writes the image ids of its rows, and can be made to stop, fail or wait.

python acting_train.py FOLDER WHAT ...: WHAT is 'run'; or 'term:3', 'raise:3', 'wait:3' or 'full:3' (no file
can be written), which happens after step 3 in process 1, or in the only process; or 'unreadable': process 1
cannot read the newest checkpoint; or 'elsewhere': each process runs in FOLDER/ID. Process 1 always makes
other initial parameters, as another kind of CPU does. The other arguments are those of train.py.
"""

import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from yolos_jax.run import cli

train = cli.imported('train')
folder, (what, _, when) = Path(sys.argv[1]), sys.argv[2].partition(':')
failed, restore = [], ocp.PyTreeCheckpointHandler.restore


def on_step(step):
    with open(folder / f'ids-{jax.process_count()}-{jax.process_index()}.jsonl', 'a') as file:
        file.write(json.dumps([step.number, step.image_ids.tolist()]) + '\n')
    if when and jax.process_index() == min(1, jax.process_count() - 1):
        if step.number == int(when):
            act()
        elif what == 'term' and step.number > int(when) and jax.process_count() > 1:
            time.sleep(1)  # JAX looks for the signal once a second, and a small step takes milliseconds


def act():
    if what == 'term':
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == 'raise':
        raise RuntimeError('a fault of the test')
    elif what == 'full':
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    else:
        (folder / 'waiting').touch()
        threading.Event().wait()


def unreadable(self, path, args):
    if jax.process_index() == 1 and not failed:
        failed.append(path)
        raise OSError('a fault of the test')
    return restore(self, path, args=args)


if what == 'elsewhere':
    os.chdir(folder / sys.argv[-1].removeprefix('--process_id='))
if '--process_id=1' in sys.argv:
    jax.config.update('jax_default_prng_impl', 'rbg')
if what == 'unreadable':
    ocp.PyTreeCheckpointHandler.restore = unreadable
del sys.argv[1:3]
main = functools.update_wrapper(functools.partial(train.main, on_step=on_step), train.main)
cli.run_with_flags(main, train.KEYS)
