"""Signals that ask a run to stop, and those that do not."""

import contextlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from yolos_jax.run.stop import StopSignal, interrupts_held

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


ASKED = """
import signal, sys
from yolos_jax.run.stop import StopSignal

stop = StopSignal()
if sys.argv[1] == 'training':
    stop.hold()
signal.raise_signal(signal.SIGTERM)
print('saving', flush=True)
signal.raise_signal(signal.SIGINT)
print('on')
"""


@pytest.mark.parametrize(
    ('when', 'printed', 'number'),
    [('starting', '', signal.SIGTERM), ('training', 'saving\n', signal.SIGINT)],
)
def test_a_start_ends_at_the_first_request_and_training_at_the_second(when, printed, number):
    done = subprocess.run([sys.executable, '-c', ASKED, when], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (printed, 128 + number)


def test_a_released_signal_has_its_earlier_handler():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    stop = StopSignal()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    stop.release()
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_interrupt_waits_for_the_end_of_the_block_and_a_second_one_does_not():
    done = []
    with contextlib.ExitStack() as stack:
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, handler)
        for count in (1, 2):
            with pytest.raises(KeyboardInterrupt), interrupts_held():
                for _ in range(count):
                    signal.raise_signal(signal.SIGINT)
                done.append(count)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == [1]


def test_interrupts_are_held_in_the_main_thread_alone():
    with ThreadPoolExecutor(1) as pool:  # signal.signal would raise there
        pool.submit(interrupts_held().__enter__).result()
