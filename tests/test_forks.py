import os

import pytest
from helpers import noise, read_detector, tiny_config

from yolos_jax.inference import Detector
from yolos_jax.run.train import train


def test_a_detector_and_a_run_say_that_they_do_not_survive_a_fork(saved):
    """Where JAX would hang without a message, also if the parent has only read the weights."""
    pretrained = read_detector(saved)
    detector, image = Detector(pretrained), noise(60, 80)
    calls = [lambda: detector(image), lambda: detector.outputs({})]
    calls += [lambda: Detector(pretrained), lambda: Detector.from_pretrained(saved)]
    calls.append(lambda: train(tiny_config(), 'run'))
    child = os.fork()
    if not child:
        try:
            for call in calls:
                with pytest.raises(RuntimeError, match='after a fork'):
                    call()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
