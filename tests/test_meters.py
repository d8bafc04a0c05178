import json
import time

import numpy as np

from yolos_jax.run.meters import Goodput, Means, Throughput


def metrics(loss, finite=True):
    return {'loss': np.float32(loss), 'finite': np.bool_(finite)}


def settled(means, span):
    means.settle()
    return means.pop_mean(span)


def test_means_are_over_the_window_and_over_the_epoch():
    means = Means()
    for loss in (1, 2):
        means.add(metrics(loss))
    assert settled(means, 'window') == {'loss': 1.5}
    means.add(metrics(6))
    assert settled(means, 'window') == {'loss': 6} and settled(means, 'epoch') == {'loss': 3}


def test_a_steps_metrics_are_read_when_the_next_step_is_on_its_way():
    means = Means()
    means.add(metrics(1))
    assert means.pop_mean('window') == {}
    means.add(metrics(2))
    assert means.pop_mean('window') == {'loss': 1}


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


def test_a_streak_of_steps_that_are_not_finite_is_counted():
    means = Means()
    for _ in range(9):
        means.add(metrics(np.inf, finite=False))
    means.add(metrics(1))
    for count in range(5):
        means.add(metrics(np.nan, finite=False), [count])
    means.settle()
    assert means.nonfinite_streak == 5 and means.image_ids == [4]


def test_a_loss_far_above_its_median_is_a_spike():
    means = Means(spike_factor=10)
    for step in range(60):
        means.add(metrics(1 + step % 3))
        assert not means.pop_spikes()
    means.add(metrics(21), [7])
    means.add(metrics(2), [8])  # reads the one before
    means.settle()
    assert means.pop_spikes() == [('the loss is 21, 10.5 times its median of late', [7])]
    assert not means.pop_spikes()


def test_spikes_are_seen_after_fifty_losses_whatever_was_not_finite():
    for before, seen in ([1] * 49, False), ([1] * 50 + [np.nan, np.inf] * 20, True):
        means = Means(spike_factor=10)
        for loss in (*before, 100):
            means.pop_spikes()
            means.add(metrics(loss, finite=bool(np.isfinite(loss))))
        means.settle()
        assert bool(means.pop_spikes()) == seen


def test_images_per_second_are_counted_from_the_last_restart():
    before, speed = time.monotonic(), Throughput()
    speed.add(1_000_000)
    speed.restart()
    for _ in range(2):
        speed.add(8)
    time.sleep(0.02)
    rate = speed.images_per_s()
    assert 16 / (time.monotonic() - before) <= rate <= 16 / 0.02


def test_goodput_is_over_all_starts():
    first = Goodput()
    first.add(2)
    state = first.state() | {'wall_s': 4.0, 'steps_lost': 2}
    second = Goodput(state, steps_lost=3)
    second.add(1)
    assert 0 < second.share() <= 3 / 4  # more time has passed since
    assert str(second).endswith('% of the time was training, 2 starts, 5 steps lost')
