"""Lets all processes meet at the coordinator's address, before JAX joins them.

JAX would wait for them silently, without handling signals, and without noticing that one has died. Here
process 0 listens at the address until all others have connected; every ten seconds each process prints whom
it waits for, and if one dies, all end. Then JAX takes over the address.
"""

import contextlib
import os
import selectors
import socket
import struct
import sys
import time

from yolos_jax.errors import InputError, shown

LIMIT = 300  # seconds until all must have come, as in JAX
TELL = 10  # seconds between lines that say who is missing
POLL = 0.2
HELLO = struct.Struct('!8sI')  # a greeting, which a port scanner would not send, and the process's id
GREETING = b'yolosjax'
GO = b'go'


def meet(coordinator: str, num_processes: int, process_id: int, heartbeat: int) -> None:
    """Return when all processes are here.

    heartbeat: seconds after which a machine that does not answer counts as dead.

    Raises:
        InputError: the address is invalid or in use; a process ended meanwhile, did not connect
            within 300 seconds, or has the id of another one.
    """
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or int(port) not in range(1, 65_536):
        raise InputError(f'coordinator {coordinator}: give host:port', 'coordinator')
    if not 0 <= process_id < num_processes:
        raise InputError(f'process_id is {process_id}, not in 0..{num_processes - 1}', 'process_id')
    if process_id:
        _join(host.strip('[]'), int(port), process_id, heartbeat)
    else:
        _gather(coordinator, int(port), num_processes, heartbeat)


class _Waiting:
    """A timer that prints whom this process waits for, and gives up after `LIMIT` seconds."""

    def __init__(self) -> None:
        self._start = self._told = time.monotonic()

    def check(self, missing: str) -> None:
        """Print who is missing, every `TELL` seconds; raises InputError after `LIMIT` seconds."""
        now = time.monotonic()
        if now - self._start > LIMIT:
            raise InputError(f'{missing} did not connect within {LIMIT} seconds', 'num_processes')
        if now - self._told > TELL:
            self._told = now
            print(f'waiting for {missing}', file=sys.stderr, flush=True)


def _gather(coordinator: str, port: int, num_processes: int, heartbeat: int) -> None:
    """Process 0: wait for all others, then let them go."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        message = f'coordinator {coordinator}: cannot listen there ({os.strerror(error.errno)})'
        raise InputError(message, 'coordinator') from None
    connections: dict[int, socket.socket] = {}
    waiting, selector = _Waiting(), selectors.DefaultSelector()
    with server, selector, contextlib.ExitStack() as stack:
        selector.register(server, selectors.EVENT_READ)
        try:
            while len(connections) < num_processes - 1:
                for key, _ in selector.select(POLL):
                    if key.data is not None:  # a greeted process sends nothing more: it ended
                        raise InputError(f'process {key.data} ended before all processes had joined')
                    connection, _ = server.accept()
                    stack.enter_context(connection)
                    if (number := _greeted(connection)) is None:
                        continue
                    if number in connections or not 0 < number < num_processes:
                        connections[-1] = connection  # so that it gets the error too
                        raise InputError(
                            f'two processes have the id {number}, or the id is too large', 'process_id'
                        )
                    _keep_alive(connection, heartbeat)
                    connections[number] = connection
                    selector.register(connection, selectors.EVENT_READ, number)
                missing = [number for number in range(1, num_processes) if number not in connections]
                waiting.check(f'process{"es" * (len(missing) > 1)} {shown(missing, 8)}')
        except InputError as error:
            _tell(connections, str(error).encode())
            raise
        _tell(connections, GO)
        for connection in connections.values():  # who closes first blocks the address for a while
            with contextlib.suppress(OSError):
                connection.settimeout(POLL)
                connection.recv(1)


def _join(host: str, port: int, process_id: int, heartbeat: int) -> None:
    """Any other process: connect to process 0, and wait for its answer."""
    waiting = _Waiting()
    while True:
        waiting.check(f'process 0 at {host}:{port}')
        with contextlib.suppress(OSError):  # not started yet, or its name is not known yet
            with socket.create_connection((host, port), timeout=5) as connection:
                _keep_alive(connection, heartbeat)
                connection.sendall(HELLO.pack(GREETING, process_id))
                answer = _answer(connection, waiting)
            if answer == GO:
                return
            if answer is not None:
                raise InputError(answer.decode(errors='replace'))
        time.sleep(POLL)


def _answer(connection: socket.socket, waiting: _Waiting) -> bytes | None:
    """What process 0 says; None if another program listens there, such as an earlier run that is ending."""
    connection.settimeout(POLL)
    while True:
        waiting.check('the other processes (process 0 lists them)')
        try:
            word = connection.recv(1000)
        except TimeoutError:
            continue
        except OSError as error:
            raise InputError(f'process 0 ended before all processes had joined ({error})') from None
        if not word:
            raise InputError('process 0 ended before all processes had joined')
        return word.removeprefix(GREETING) if word.startswith(GREETING) else None


def _greeted(connection: socket.socket) -> int | None:
    """The process id in a greeting; None if it is not from one of our processes."""
    connection.settimeout(2)
    with contextlib.suppress(OSError):
        hello = connection.recv(HELLO.size)
        if len(hello) == HELLO.size and hello.startswith(GREETING):
            return HELLO.unpack(hello)[1]
    return None


def _keep_alive(connection: socket.socket, heartbeat: int) -> None:
    """Let the system find out that the machine at the other end is gone."""
    every = max(heartbeat // 4, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, 'TCP_KEEPIDLE'):  # Linux
        for option, value in (('TCP_KEEPIDLE', every), ('TCP_KEEPINTVL', every), ('TCP_KEEPCNT', 3)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _tell(connections: dict[int, socket.socket], word: bytes) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(GREETING + word)
