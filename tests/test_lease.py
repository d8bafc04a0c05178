"""The lock of a run in a bucket: when it is free, and what it survives; at servers in test_bucket."""

import contextlib
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from yolos_jax.bucket import Version
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run import lease


class Memory:
    """A bucket in memory that holds a lock; counts and fails writes."""

    url = 'gs://memory'

    def __init__(self, content=None):
        self.now, self.writes, self.failing = Version(content, b'0'), 0, 0
        self._numbers = itertools.count(1)

    def version(self, name):
        return self.now

    def write_if(self, name, content, generation):
        self.writes += 1
        if self.failing:
            self.failing -= 1
            raise StorageError('no answer')
        if generation != self.now.generation:
            return None
        self.now = now = Version(content, b'%d' % next(self._numbers))
        return now.generation


def test_a_lock_is_free_when_it_is_old_or_no_lock():
    late = {'name': 'a slow network', 'time': time.time() - lease.FORGOTTEN + 5, 'token': 'other'}
    with pytest.raises(InputError, match='in use by another run .a slow network, 1. s ago'):
        lease.Lease(Memory(json.dumps(late).encode()))
    for damaged in (b'[1]', b'{"name": "x"}', b'{"name'):
        lease.Lease(Memory(damaged)).release()


def test_a_lock_stays_with_its_run_where_an_answer_is_lost_or_somebody_removes_it():
    bucket = Memory()
    held = lease.Lease(bucket)
    bucket.write_if(lease.LOCK, bucket.now.content, bucket.now.generation)  # whose answer is lost
    held._renew()
    held.check()
    bucket.now = Version(None, b'100')
    for _ in range(2):
        held._renew()
    assert json.loads(bucket.now.content)['token'] == held._token
    held._renewed -= lease.FORGOTTEN
    held.check()
    writes = bucket.writes
    held.check()  # as before each file of an upload
    assert bucket.writes == writes
    held.release()
    assert bucket.now.content is None


def test_a_lock_is_renewed_though_a_renewal_failed():
    bucket = Memory()
    held = lease.Lease(bucket)
    taken, bucket.failing = bucket.now, 1
    end = time.monotonic() + 4 * lease.HEARTBEAT
    while bucket.now == taken and time.monotonic() < end:
        time.sleep(0.1)
    assert bucket.now != taken and not bucket.failing
    held.release()


def test_of_two_runs_that_find_no_lock_in_a_storage_without_conditions_one_gets_it():
    class Careless(Memory):
        url = 's3://memory'
        both = threading.Barrier(2)

        def version(self, name):
            before = self.now
            if before.content is None:
                self.both.wait(60)
            return before

        def write_if(self, name, content, generation):
            return super().write_if(
                name, content, self.now.generation if generation == b'0' else generation
            )

    def take(bucket):
        with contextlib.suppress(InputError):
            return lease.Lease(bucket)

    bucket = Careless()
    with ThreadPoolExecutor(2) as pool:
        (held,) = filter(None, pool.map(take, [bucket] * 2))
    held.release()
