"""The lock on a run's folder in a bucket: an object that its owner renews and that expires otherwise."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid

from yolos_jax.bucket import Bucket, Version
from yolos_jax.errors import InputError

LOCK = '.lock'
HEARTBEAT = 5  # seconds between renewals
FORGOTTEN = 3 * HEARTBEAT  # seconds after which a lock that was not renewed may be taken over
SETTLES = 1  # seconds after which two runs that took the lock at the same moment have both written it


class Lease:
    """A lock that this process holds. The clocks of the hosts must agree to a few seconds."""

    def __init__(self, bucket: Bucket) -> None:
        """Take the lock; raises InputError if another run holds it."""
        self._bucket, self._token, self._lost = bucket, uuid.uuid4().hex, ''
        self._ended, self._turn = threading.Event(), threading.Lock()
        self._renewed = time.monotonic()
        before = bucket.version(LOCK)
        if owner := _owner(before):
            age = time.time() - owner['time']
            if age < FORGOTTEN:
                raise InputError(
                    f'{bucket.url}: in use by another run ({owner["name"]}, {max(age, 0):.0f} s ago); the '
                    f'lock of a killed run expires {FORGOTTEN} s after its last renewal'
                )
        self._generation = before.generation
        self._renew()
        if bucket.url.startswith('s3://'):  # storages that imitate S3 may ignore a write's condition
            time.sleep(SETTLES)
            self._renew()
        self.check()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises InputError if another run has taken the lock, or if this cannot be checked."""
        if time.monotonic() - self._renewed > FORGOTTEN - HEARTBEAT:  # was suspended or offline
            self._renew(after=FORGOTTEN - HEARTBEAT)
        if self._lost:
            raise InputError(f'{self._bucket.url}: another run has taken it over ({self._lost})')

    def release(self) -> None:
        """Release the lock."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(InputError):  # if the object stays, it expires
            now = self._bucket.version(LOCK)
            if (owner := _owner(now)) and owner['token'] == self._token:
                self._bucket.write_if(LOCK, None, now.generation)

    def _renew(self, after: float = 0) -> None:
        """Write the lock again if it is unchanged, or note who has taken it over.

        after: seconds that must have passed since the last time; many threads may ask at once.
        """
        with self._turn:
            start = time.monotonic()
            if start - self._renewed < after:
                return
            name = f'process {os.getpid()} on {socket.gethostname()}'
            content = json.dumps({'name': name, 'time': time.time(), 'token': self._token})
            generation = self._bucket.write_if(LOCK, content.encode(), self._generation)
            if generation is None:
                now = self._bucket.version(LOCK)
                if (owner := _owner(now)) and owner['token'] != self._token:
                    self._lost = owner['name']
                    return
                generation = now.generation  # our write's answer was lost, or somebody removed the lock
            self._generation, self._renewed = generation, start

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT) and not self._lost:
            with contextlib.suppress(InputError):  # no network now
                self._renew()


def _owner(version: Version) -> dict | None:
    """The owner of a lock; None if there is none or it cannot be read."""
    try:
        owner = json.loads(version.content or b'null')
        if owner is None:
            return None
        return {'name': owner['name'], 'time': float(owner['time']), 'token': owner['token']}
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
