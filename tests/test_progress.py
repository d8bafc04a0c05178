import json

import numpy as np
import pytest

from yolos_jax.errors import InputError
from yolos_jax.progress import Progress, Tally


def metrics(loss, finite=True):
    return {'loss': np.float32(loss), 'finite': np.bool_(finite)}


def test_means_are_over_the_window_and_over_the_epoch():
    tally = Tally()
    for step, loss in enumerate((1, 2)):
        tally.add(step, metrics(loss))
    assert tally.take('window') == {'loss': 1.5}
    tally.add(2, metrics(6))
    assert tally.take('window') == {'loss': 6} and tally.take('epoch') == {'loss': 3}


def test_a_saved_tally_goes_on_where_it_was():
    values = np.random.default_rng(0).random(20).astype(np.float32)
    whole, part = Tally(), Tally()
    for step, value in enumerate(values):
        whole.add(step, metrics(value))
        part.add(step, metrics(value))
        if step == 9:
            part = Tally(json.loads(json.dumps(part.state())))
    assert whole.take('epoch') == part.take('epoch')


def test_steps_that_are_not_finite_stay_out_of_the_means():
    tally = Tally()
    tally.add(0, metrics(1))
    tally.add(1, metrics(np.nan, finite=False))
    assert tally.take('window') == {'loss': 1}


def test_ten_steps_in_a_row_without_a_finite_loss_end_the_run():
    tally = Tally()
    for step in range(9):
        tally.add(step, metrics(np.inf, finite=False))
    tally.add(9, metrics(1))
    for step in range(10, 20):
        tally.add(step, metrics(np.nan, finite=False))
    with pytest.raises(InputError, match='10 steps up to 19'):
        tally.take('window')


def test_a_resumed_runs_file_is_that_of_an_unbroken_one(tmp_path):
    first = Progress(tmp_path, 0, 30)
    for step in (10, 20):
        first.write(step, {'loss': step / 7})
    first.close()
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 21, "lo')  # killed while writing
    again = Progress(tmp_path, 10, 30)  # the checkpoint was of step 10
    for step in (20, 30):
        again.write(step, {'loss': step / 7})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines == [{'step': step, 'loss': step / 7} for step in (10, 20, 30)]
    assert list(tmp_path.glob('events.out.tfevents.*'))
