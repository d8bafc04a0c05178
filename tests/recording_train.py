"""train.py that also writes the image ids of its rows, and can be made to stop, fail or wait.

python recording_train.py FOLDER WHAT ...: WHAT is 'run', or 'term:3', 'raise:3' or 'wait:3' after step 3 in
process 1 (of one: 0), or 'unreadable': that process cannot read the newest checkpoint. The other arguments
are those of train.py.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

import train
from yolos_jax import cli
from yolos_jax.data import loader

folder, (what, _, when) = Path(sys.argv[1]), sys.argv[2].partition(':')
load = loader.load


def recorded(source, steps, part=slice(None)):
    with open(folder / f'ids-{jax.process_count()}-{jax.process_index()}.jsonl', 'a') as file:
        for step, batch, indices in load(source, steps, part):
            if isinstance(source, loader.TrainBatches):
                ids = source.records.ids[indices].tolist()
                file.write(json.dumps([step, ids]) + '\n')
                file.flush()
                if when and step == int(when) and jax.process_index() == min(1, jax.process_count() - 1):
                    act()
            yield step, batch, indices


def act():
    if what == 'term':
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == 'raise':
        raise RuntimeError('a fault of the test')
    else:
        (folder / 'waiting').touch()
        time.sleep(3600)


def unreadable(self, path, args):
    if jax.process_index() == 1 and not failed:
        failed.append(path)
        raise OSError('a fault of the test')
    return restore(self, path, args=args)


loader.load = recorded
if what == 'unreadable':
    failed, restore = [], ocp.PyTreeCheckpointHandler.restore
    ocp.PyTreeCheckpointHandler.restore = unreadable
del sys.argv[1:3]
cli.run_with_flags(train.main)
