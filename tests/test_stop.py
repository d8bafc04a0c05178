"""Signals that ask a run to stop, and those that do not."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from yolos_jax.run.stop import interrupts_held

HANGUPS = """
import signal, sys
from yolos_jax.run.stop import StopSignal

signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == 'ignored' else signal.SIG_DFL)
stop = StopSignal()
stop.hold()
for _ in range(2):
    signal.raise_signal(signal.SIGHUP)
print(stop.number)
"""


@pytest.mark.parametrize(('before', 'number'), [('ignored', None), ('default', signal.SIGHUP.value)])
def test_hangups_that_come_twice_stop_a_run_once_and_not_one_that_ignores_them(before, number):
    """The shell and the kernel both send SIGHUP; nohup ignores it."""
    command = [sys.executable, '-c', HANGUPS, before]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(number)


def test_interrupts_are_held_in_the_main_thread_alone():
    with ThreadPoolExecutor(1) as pool:  # signal.signal would raise there
        pool.submit(interrupts_held().__enter__).result()
