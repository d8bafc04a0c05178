"""Processes that meet before JAX joins them: threads here, with the sockets of processes."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT

from yolos_jax.errors import InputError
from yolos_jax.run import rendezvous


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{free.getsockname()[1]}'


def at(address, process_id, num_processes=3):
    """What a process is told: None if it may go on, else why not."""
    try:
        return rendezvous.meet(address, num_processes, process_id, 30)
    except InputError as error:
        return str(error)


def connect(address, message):
    """A connection that says something and stays open."""
    host, port = address.split(':')
    while True:
        try:
            connection = socket.create_connection((host, int(port)))
            break
        except OSError:
            time.sleep(0.05)
    connection.sendall(message)
    return connection


def test_processes_in_any_order_go_on_once_all_are_there_and_free_the_address(address):
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(at, address, i) for i in (2, 0)]
        stranger = connect(address, b'GET / HTTP/1.1\r\n\r\n')  # which counts for nobody
        time.sleep(0.5)
        assert not any(job.done() for job in jobs)
        jobs.append(pool.submit(at, address, 1))
        assert [job.result() for job in jobs] == [None] * 3
        stranger.close()
    socket.create_server(('127.0.0.1', int(address.split(':')[1]))).close()


def test_another_program_at_the_address_is_waited_for(address):
    host, port = address.split(':')
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server((host, int(port))) as earlier:
            job = pool.submit(at, address, 1, 2)
            connection, _ = earlier.accept()
            with connection:
                connection.sendall(b'\0\0\x18\4\0')  # how gRPC, of an earlier run's coordinator, begins
                connection.recv(100)
                assert not connection.recv(1)  # it goes, and comes again
        assert at(address, 0, 2) is None and job.result() is None


def test_one_that_dies_while_others_are_missing_is_named_to_all(address):
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(at, address, i, 4) for i in (0, 1)]
        dead = connect(address, rendezvous.HELLO.pack(rendezvous.GREETING, 2))
        time.sleep(0.5)
        assert not any(job.done() for job in jobs)
        dead.close()
        assert [job.result() for job in jobs] == ['process 2 ended before all processes had joined'] * 2


def test_the_end_of_process_0_ends_those_that_wait(address):
    host, port = address.split(':')
    with ThreadPoolExecutor(1) as pool, socket.create_server((host, int(port))) as first:
        job = pool.submit(at, address, 1, 2)
        connection, _ = first.accept()
        with connection:
            connection.recv(100)
        assert 'process 0 ended before all processes had joined' in job.result(20)


def test_a_stranger_that_says_nothing_delays_nobody_for_long(address):
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(at, address, 0, 2)]
        with connect(address, b''):  # as a probe of the port
            jobs.append(pool.submit(at, address, 1, 2))
            assert [job.result(20) for job in jobs] == [None] * 2


def test_one_that_is_missing_is_waited_for_five_minutes():
    waiting = rendezvous._Waiting()
    waiting.check('process 1')
    waiting._start -= rendezvous.LIMIT
    with pytest.raises(InputError, match='process 1 did not connect within 300 seconds'):
        waiting.check('process 1')


def test_an_id_that_is_too_large_for_process_0_is_refused(address):
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(at, [address] * 2, (0, 2), (2, 3)))
    assert all(text.startswith('two processes have the id 2, or the id is too large') for text in told)


def test_an_ipv6_address_may_be_in_brackets(address):
    try:
        socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip('no IPv6')
    address = f'[::1]:{address.split(":")[1]}'
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(at, [address] * 2, (0, 1), (2, 2))) == [None] * 2


def test_two_of_one_id_are_refused(address):
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(at, [address] * 3, (0, 1, 1)))
    assert all(text.startswith('two processes have the id 1') for text in told)


@pytest.mark.parametrize(
    ('coordinator', 'process_id', 'says'),
    [
        ('host', 0, 'give host:port'),
        (':80', 0, 'give host:port'),
        ('host:65536', 0, 'give host:port'),
        ('localhost:1', 3, 'process_id is 3, not in 0..2'),
    ],
)
def test_an_invalid_address_or_process_id_is_refused(coordinator, process_id, says):
    with pytest.raises(InputError, match=says):
        rendezvous.meet(coordinator, 3, process_id, 30)


def test_a_taken_address_is_refused(address):
    with socket.create_server(('127.0.0.1', int(address.split(':')[1]))):
        assert 'cannot listen there (Address already in use)' in at(address, 0)


def test_a_process_killed_before_the_cluster_forms_ends_the_rest(address):
    """Real processes: the leader, and one that is killed while both wait for a third."""
    script = 'import sys\nfrom yolos_jax.run import cli, cluster\n'
    script += f'cli.run(lambda: cluster.start({address!r}, 3, int(sys.argv[1]), 5))'
    start = lambda i: subprocess.Popen(
        [sys.executable, '-c', script, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    leader, other = start(0), start(1)
    waiting = leader.stderr.readline()  # after ten seconds at the earliest, when the other has come
    while 'process 2\n' not in waiting:
        waiting = leader.stderr.readline()
    other.kill()
    assert leader.stderr.read() == 'error: process 1 ended before all processes had joined\n'
    assert leader.wait() == 1
    other.communicate()
