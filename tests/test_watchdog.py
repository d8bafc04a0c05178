import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from yolos_jax.errors import InputError
from yolos_jax.run import watchdog


def test_a_process_that_is_stuck_ends_with_its_stacks():
    script = (
        'import threading\nfrom yolos_jax.run import watchdog\n'
        'def stuck():\n    with watchdog.started(1):\n        threading.Event().wait()\nstuck()'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'no progress in 1 seconds' in done.stderr and 'in stuck' in done.stderr
    with open('/dev/full', 'w') as full:  # as a log on a full disk
        assert subprocess.run([sys.executable, '-c', script], cwd=ROOT, stderr=full).returncode == 1


def test_a_process_is_stuck_from_its_last_progress_on_and_not_after_the_block():
    script = (
        'import threading, time\nfrom yolos_jax.run import watchdog\n'
        'with watchdog.started(1):\n    pass\n'
        'time.sleep(1.3)\n'
        'with watchdog.started(1) as progress:\n'
        '    for _ in range(30):\n        time.sleep(0.05)\n        progress()\n'
        '    print("on", flush=True)\n    threading.Event().wait()'
    )
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ('on\n', 1) and 'no progress in 1 seconds' in done.stderr


def test_a_process_that_was_suspended_is_not_taken_for_stuck():
    script = (
        'from yolos_jax.run import watchdog\n'
        'with watchdog.started(3) as progress:\n    print(flush=True)\n    input()\n    progress()\n'
        'print("on")'
    )
    command = [sys.executable, '-c', script]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.communicate('\n')[0] == 'on\n' and process.returncode == 0


def test_a_negative_time_is_refused():
    with pytest.raises(InputError, match='stuck is -5, less than 0'), watchdog.started(-5):
        pass
