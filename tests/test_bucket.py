"""Runs and weights in a bucket, at servers that speak the protocols of Google and of S3."""

import concurrent.futures
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import storage
from helpers import ROOT, read_detector, result, tiny_config

from yolos_jax.bucket import Bucket, output_folder
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run import lease, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.train import train
from yolos_jax.tools import convert, evaluate, predict


@pytest.fixture(scope='module')
def unbroken(coco_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    train(tiny_config(data=coco_folder), folder, one_device())
    return folder


def one_device():
    return meshes.make_mesh(jax.devices()[:1])


def downloaded(url, folder):
    """What a run left in a bucket, as `result` gives it."""
    bucket = Bucket(url)
    bucket.download({name: folder / name for name in bucket.names()})
    params, checksums, lines = result(folder)
    for line in lines:
        line.pop('network_retries', None)
    return params, checksums, lines


def test_objects_are_written_read_listed_and_removed(place, bad_network):
    bucket = Bucket(f'{place[0]}/objects')
    contents = {f'a/{i}': os.urandom(2000 * i + 5) for i in range(30)}
    for name, content in contents.items():
        bucket.write(name, content)
    assert bucket.names() == sorted(contents) and bucket.names('a/2') == sorted(
        n for n in contents if n[2] == '2'
    )
    for name, content in contents.items():
        assert bucket.read(name) == content
        assert bucket.start_read(name, slice(2, 5)).result() == content[2:5]
    bucket.remove('a/0')
    bucket.remove_all('a/1')
    assert bucket.names() == sorted(n for n in contents if n[2] not in '01')
    with pytest.raises(InputError, match=f'{bucket.url}/none: no such object'):
        bucket.read('none')


def test_an_object_is_downloaded_to_the_cache_once_and_again_when_it_changes(place, tmp_path):
    url, network = place
    bucket = Bucket(f'{url}/copies')
    bucket.write('x.json', b'1')
    assert (bucket.copy(['x.json'], tmp_path) / 'x.json').read_text() == '1'
    before = network.requests
    assert (bucket.copy(['x.json'], tmp_path) / 'x.json').read_text() == '1'
    assert network.requests == before + 1
    bucket.write('x.json', b'2')
    assert (bucket.copy(['x.json'], tmp_path) / 'x.json').read_text() == '2'


def test_copies_that_are_not_used_any_more_are_removed_from_the_cache(place, tmp_path):
    bucket = Bucket(f'{place[0]}/pruned')
    for name in 'ab':
        bucket.write(name, b'x')
    in_use, old = bucket.copy(['a'], tmp_path), tmp_path / 'buckets' / 'old'
    old.mkdir()
    with open(old / 'sparse', 'wb') as file:
        file.truncate(30 * 10**9)
    os.utime(in_use, (0, 0))
    os.utime(old, (1000, 1000))
    bucket.copy(['a'], tmp_path)
    bucket.copy(['b'], tmp_path)
    assert in_use.exists() and not old.exists()


def test_a_download_that_the_disk_has_no_room_for_is_no_copy(place, tmp_path):
    bucket = Bucket(f'{place[0]}/large')
    bucket.write('x', content := os.urandom(20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match='x: cannot be written'):
            bucket.copy(['x'], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob('x'))
    assert (bucket.copy(['x'], tmp_path) / 'x').read_bytes() == content


def test_an_upload_skips_what_is_gone_and_ends_before_the_meta_where_the_lock_is_lost(place, tmp_path):
    bucket = Bucket(f'{place[0]}/uploaded')
    (tmp_path / 'x').touch()
    bucket.upload({'x': tmp_path / 'x', 'gone': tmp_path / 'gone'})
    checks = []

    def check():
        checks.append(1)
        if len(checks) == 2:
            raise InputError('another run has taken it over')

    step = {f'5/{name}': tmp_path / 'x' for name in ('meta/metadata', 'state/a')}
    with pytest.raises(InputError, match='taken it over'):
        bucket.upload(step, check)
    assert bucket.names() == ['5/state/a', 'x']


def test_an_address_for_s3_alone_is_used_before_that_of_all_services(place, monkeypatch):
    if address := os.environ.get('AWS_ENDPOINT_URL'):
        monkeypatch.setenv('AWS_ENDPOINT_URL_S3', address)
        monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:1')
    bucket = Bucket(f'{place[0]}/address')
    bucket.write('x', b'1')
    assert bucket.read('x') == b'1'


def test_a_folder_whose_writer_failed_is_not_uploaded(place):
    url = f'{place[0]}/new'
    with pytest.raises(ZeroDivisionError), output_folder(url) as folder:
        folder.mkdir()
        (folder / 'x').touch()
        raise ZeroDivisionError
    assert not Bucket(url).names()


def test_names_are_of_files_in_the_folder_alone(place):
    """Not of a console's folders, of what leads out of it, and of a folder whose name begins as its own."""
    bucket = Bucket(f'{place[0]}/names')
    Bucket(f'{place[0]}/names-of-others').write('x', b'x')
    for name in ('x', 'y..z', 'folder/', 'a/../../out'):
        bucket.write(name, b'x')
    assert bucket.names() == ['x', 'y..z']


def test_files_that_a_command_removes_are_removed_from_its_bucket(place):
    bucket = Bucket(f'{place[0]}/results')
    bucket.write('a', b'x')
    bucket.write('b', b'x')
    for removes, left in ((False, ['a', 'b']), (True, ['a'])):  # a run's copy may have lost old files
        with workdir.opened(bucket.url, removes=removes) as work:
            (work.folder / 'b').unlink()
        assert bucket.names() == left


def test_files_that_could_not_be_uploaded_at_the_end_are_kept(tmp_path):
    class Unreachable:
        folder = tmp_path / 'process-1'

        def push(self, removes):
            raise StorageError('gs://bucket: no answer')

    Unreachable.folder.mkdir()
    (Unreachable.folder / 'x').touch()
    with pytest.raises(StorageError, match='no answer; what was not uploaded is in .*/kept-'):
        workdir.push_last(Unreachable())
    (kept,) = tmp_path.glob('kept-*/x')


def test_a_run_that_fails_uploads_what_it_has_and_raises_its_own_error(place):
    bucket = Bucket(f'{place[0]}/failed')
    with pytest.raises(InputError, match=f'^{bucket.url}/x: damaged') as error:
        with workdir.opened(bucket.url) as work:
            (work.folder / 'log.txt').write_text('x: damaged')
            raise InputError(f'{work.folder}/x: damaged', 'workdir')
    assert error.value.argument == 'workdir' and bucket.names() == ['log.txt']
    with pytest.raises(ZeroDivisionError), workdir.opened(bucket.url) as work:
        now = {'name': 'process 1 on elsewhere', 'time': time.time(), 'token': 'other'}
        bucket.write(lease.LOCK, json.dumps(now).encode())
        work.mirror._lease._renew()
        raise ZeroDivisionError  # and not that the lock is lost


def test_a_run_stopped_in_a_bad_network_ends_as_a_local_one(
    place, data_url, bad_network, unbroken, tmp_path
):
    url, config = f'{place[0]}/run', tiny_config(data=data_url)

    def crash(step):
        if step.number == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, url, one_device(), crash)
    assert 'checkpoints/9/meta/metadata' in Bucket(url).names()
    train(config, url, one_device())
    assert downloaded(url, tmp_path)[1:] == result(unbroken)[1:]
    assert not [*workdir.local_copy(url).glob('process-*')]
    steps = {name.split('/')[1] for name in Bucket(url).names('checkpoints/')}
    assert len(steps) in (2, 3)  # as many as a local run keeps


def test_weights_and_data_in_a_bucket_evaluate_as_local_ones(
    place, data_url, unbroken, coco_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    url = f'{place[0]}/weights'
    storage.upload(unbroken, url)
    expected = read_detector(unbroken)
    for weights in (url, f'{url}/checkpoints/{expected.about["step"]}'):
        jax.tree.map(np.testing.assert_array_equal, read_detector(weights).params, expected.params)
    output = f'{place[0]}/eval'
    local = str(unbroken), str(coco_folder), str(tmp_path / 'eval')
    for weights, data, folder in ((url, data_url, output), local):
        evaluate.main([f'--weights={weights}', f'--data={data}', f'--output={folder}', '--num_processes=1'])
    local = json.loads((tmp_path / 'eval' / 'predictions.json').read_text())
    assert json.loads(Bucket(output).read('predictions.json')) == local
    with pytest.raises(InputError, match='no such object'):
        read_detector(f'{place[0]}/nothing.pth')


def test_predictions_and_conversions_are_written_to_a_bucket(
    place, unbroken, coco_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    images, url = [str(coco_folder / 'val2017')], f'{place[0]}/converted'
    for form, more in (('jax', []), ('hf', ['--to=hf'])):
        for output in (f'{url}/{form}', str(tmp_path / form)):
            convert.main([f'--input={unbroken}', f'--output={output}', *more])
        expected = read_detector(tmp_path / form)
        jax.tree.map(np.testing.assert_array_equal, read_detector(f'{url}/{form}').params, expected.params)
    with pytest.raises(InputError, match='exists and is not empty'):
        convert.main([f'--input={unbroken}', f'--output={url}/hf', '--to=hf'])
    weights, output = f'{url}/jax', f'{place[0]}/predicted'
    for folder in (output, str(tmp_path / 'predicted'), output):  # the third finds everything done
        predict.main([f'--weights={weights}', f'--output={folder}', '--threshold=0.01', *images])
    bucket, local = Bucket(output), tmp_path / 'predicted'
    names = sorted(path.name for path in local.iterdir() if path.name != lease.LOCK)
    assert bucket.names() == names and len(names) == 10 + 3
    expected = json.loads((local / 'predictions.json').read_text())
    assert json.loads(bucket.read('predictions.json')) == expected


def test_a_second_run_is_refused_at_once_but_a_stale_lock_is_taken_over(place):
    url = f'{place[0]}/locked'
    in_use = rf'{url}: in use by another run \(process {os.getpid()} on .* s ago'
    with workdir.opened(url):
        start = time.monotonic()
        with pytest.raises(InputError, match=in_use), workdir.opened(url):
            pass
        assert time.monotonic() - start < lease.FORGOTTEN
    assert lease.LOCK not in Bucket(url).names()
    old = {'name': 'process 1 on elsewhere', 'time': time.time() - lease.FORGOTTEN - 1, 'token': 'other'}
    Bucket(url).write(lease.LOCK, json.dumps(old).encode())
    with workdir.opened(url):
        owner = json.loads(Bucket(url).read(lease.LOCK))
        assert owner['name'].startswith(f'process {os.getpid()} ')


def test_only_one_of_several_simultaneous_starts_gets_the_lock(place):
    url, together = f'{place[0]}/raced', threading.Barrier(8)

    def take(_):
        bucket = Bucket(url)
        together.wait()
        with contextlib.suppress(InputError):
            return lease.Lease(bucket)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        leases = [held for held in pool.map(take, range(8)) if held]
    assert len(leases) == 1
    leases[0].release()


def test_a_run_whose_lock_was_taken_over_writes_no_more(place):
    url = f'{place[0]}/taken'
    with pytest.raises(InputError, match='another run has taken it over .process 1 on elsewhere'):
        with workdir.opened(url) as work:
            now = {'name': 'process 1 on elsewhere', 'time': time.time(), 'token': 'other'}
            Bucket(url).write(lease.LOCK, json.dumps(now).encode())
            (work.folder / 'metrics.jsonl').write_text('stale')
            work.mirror._lease._renew()
    assert Bucket(url).names() == [lease.LOCK]


def test_a_run_that_was_frozen_notices_a_lost_lock_and_does_not_remove_it(place):
    bucket = Bucket(f'{place[0]}/frozen')
    frozen = lease.Lease(bucket)
    other = json.dumps({'name': 'process 1 on elsewhere', 'time': time.time(), 'token': 'other'}).encode()
    bucket.write(lease.LOCK, other)
    frozen._renewed -= lease.FORGOTTEN
    with pytest.raises(InputError, match='another run has taken it over .process 1 on elsewhere'):
        frozen.check()
    frozen.release()
    assert bucket.read(lease.LOCK) == other
    bucket.remove(lease.LOCK)
    unaware = lease.Lease(bucket)
    bucket.write(lease.LOCK, other)
    unaware.release()
    assert bucket.read(lease.LOCK) == other


def test_between_checkpoints_changed_files_are_uploaded_now_and_then(place):
    bucket = Bucket(f'{place[0]}/metrics')
    with workdir.opened(bucket.url) as work:
        (work.folder / 'metrics.jsonl').write_text('one')
        for every, names in ((60, [lease.LOCK]), (0, [lease.LOCK, 'metrics.jsonl'])):
            work.mirror.push_now_and_then(every)
            work.mirror.finish_push()
            assert bucket.names() == names


@pytest.mark.trials
def test_an_unreachable_bucket_is_a_one_line_error(place):
    url, network = place
    network.fail = 1
    try:
        with pytest.raises(InputError, match=rf'{url}/no: .*retry'):
            Bucket(url).read('no')
    finally:
        network.fail = 0


KILLED = """
import os, sys, signal
sys.path.insert(0, sys.argv[1] + '/tests')
from helpers import tiny_config
from yolos_jax.run.train import train
import jax
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
train(tiny_config(data=sys.argv[2], save_every=1), sys.argv[3])
"""


@pytest.mark.trials
@pytest.mark.row('runs in a bucket killed (kill -9) while training and saving', count=25)
def test_a_run_killed_at_any_time_ends_as_an_unbroken_one(place, coco_folder, tmp_path):
    url, kills, code = f'{place[0]}/killed', 0, -signal.SIGKILL
    command = [sys.executable, '-c', KILLED, str(ROOT), str(coco_folder)]
    unbroken = tmp_path / 'unbroken'  # by the same command: sums differ between 1 and 8 devices of a CPU
    subprocess.run([*command, unbroken], check=True, stdout=subprocess.DEVNULL)
    command.append(url)
    while code:
        before = set(Bucket(url).names())
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and kills < 25:
            if set(Bucket(url).names()) - before - {lease.LOCK}:  # it writes
                time.sleep(0.02 * kills)
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
        _, errors = process.communicate()
        code = process.returncode
        assert code in (0, -signal.SIGKILL), errors[-1000:]
        Bucket(url).remove(lease.LOCK)  # not to wait until it is forgotten
    assert kills > 3
    assert downloaded(url, tmp_path)[1] == result(unbroken)[1]
