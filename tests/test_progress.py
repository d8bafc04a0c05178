import json

import numpy as np
import pytest

from yolos_jax.errors import InputError
from yolos_jax.run import train
from yolos_jax.run.progress import Log, Means


def metrics(loss, finite=True):
    return {'loss': np.float32(loss), 'finite': np.bool_(finite)}


def settled(means, span):
    means.settle()
    return means.mean(span)


def test_means_are_over_the_window_and_over_the_epoch():
    means = Means()
    for loss in (1, 2):
        means.add(metrics(loss))
    assert settled(means, 'window') == {'loss': 1.5}
    means.restart('window')
    means.add(metrics(6))
    assert settled(means, 'window') == {'loss': 6} and settled(means, 'epoch') == {'loss': 3}


def test_a_steps_metrics_are_read_when_the_next_step_is_on_its_way():
    means = Means()
    means.add(metrics(1))
    assert means.mean('window') == {}
    means.add(metrics(2))
    assert means.mean('window') == {'loss': 1}


def test_saved_means_continue_where_they_were():
    values = np.random.default_rng(0).random(20).astype(np.float32)
    whole, part = Means(), Means()
    for step, value in enumerate(values):
        whole.add(metrics(value))
        part.add(metrics(value))
        if step == 9:
            part.settle()
            part = Means(json.loads(json.dumps(part.state())))
    assert settled(whole, 'epoch') == settled(part, 'epoch')


def test_steps_that_are_not_finite_stay_out_of_the_means():
    means = Means()
    means.add(metrics(1))
    means.add(metrics(np.nan, finite=False))
    assert settled(means, 'window') == {'loss': 1}


def test_ten_steps_in_a_row_without_a_finite_loss_end_the_run():
    means = Means()
    for _ in range(9):
        means.add(metrics(np.inf, finite=False))
    means.add(metrics(1))
    for _ in range(9):
        means.add(metrics(np.nan, finite=False))
        train.check_finite(means, 18)
    means.add(metrics(np.nan, finite=False))
    means.settle()
    with pytest.raises(InputError, match='10 steps up to step 20'):
        train.check_finite(means, 20)


def test_a_resumed_runs_file_is_that_of_an_unbroken_one(tmp_path):
    first = Log(tmp_path, 0, 30)
    for step in (10, 20):
        first.write(step, {'loss': step / 7})
    first.close()
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 21, "lo')  # killed while writing
    again = Log(tmp_path, 10, 30)  # the checkpoint was of step 10
    for step in (20, 30):
        again.write(step, {'loss': step / 7})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines == [{'step': step, 'loss': step / 7} for step in (10, 20, 30)]
    assert list(tmp_path.glob('events.out.tfevents.*'))
