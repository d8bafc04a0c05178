"""A run's folder: one run at a time, and what becomes of a run whose folder cannot be used any more."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest
from helpers import ROOT, launch, tiny_config

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.run import mesh as meshes
from yolos_jax.run import workdir
from yolos_jax.run.stop import StopSignal
from yolos_jax.run.train import train


@pytest.mark.parametrize(
    'location', ['S3://bucket/run', 'gcs://bucket/run', 'gs:/bucket/run', 'https://x/y']
)
def test_a_misspelt_url_is_no_folder(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match='not a local path'), workdir.opened(location):
        pass
    with pytest.raises(InputError, match='not a local path'):
        files.check_folder(Path(location))
    assert not os.listdir(tmp_path)


def test_a_lock_that_the_file_system_refuses_is_no_other_run(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with (
        pytest.raises(InputError, match='cannot write to it .No locks available'),
        workdir.opened(tmp_path),
    ):
        pass


def test_programs_of_another_user_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    user = os.getuid()
    for _ in range(2):
        assert workdir.local_copy('gs://bucket/run').parent == tmp_path / f'yolos_jax-{user}'
    assert (tmp_path / f'yolos_jax-{user}').stat().st_mode & 0o777 == 0o700
    (tmp_path / f'yolos_jax-{user + 1}').mkdir()
    monkeypatch.setattr(os, 'getuid', lambda: user + 1)
    with pytest.raises(InputError, match=f'yolos_jax-{user + 1}: belongs to another user'):
        workdir.local_copy('gs://bucket/run')
    (tmp_path / f'yolos_jax-{user + 1}').rmdir()
    (tmp_path / f'yolos_jax-{user + 1}').symlink_to('what the other user makes later')
    with pytest.raises(InputError, match='belongs to another user'):
        workdir.local_copy('gs://bucket/run')


def test_copies_of_killed_runs_are_removed_and_those_of_other_processes_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    copies = workdir.local_copy('gs://bucket/run')
    assert workdir.local_copy('gs://bucket/run/') == copies  # with its compiled programs
    killed, other = copies / 'process-4194304', copies / f'process-{os.getppid()}'
    for folder in (killed, other):
        folder.mkdir(parents=True)
    assert workdir.own_copy('gs://bucket/run') == copies / f'process-{os.getpid()}'
    assert other.exists() and not killed.exists()


def test_a_disk_that_does_not_answer_is_no_replaced_folder(tmp_path, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with workdir.opened(tmp_path) as work, monkeypatch.context() as m:
        m.setattr(os, 'stat', stale)
        work.check()


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    script = (
        'import sys\nfrom yolos_jax.run import workdir\n'
        'with workdir.opened(sys.argv[1]):\n    print(1, flush=True)\n    sys.stdin.read()'
    )
    command = [sys.executable, '-c', script, tmp_path]
    (tmp_path / '.lock').write_text('process 4194304 on the host of a run that ended')
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        says = rf'in use by another run \(process {other.pid} on {socket.gethostname()}\)$'
        with pytest.raises(InputError, match=says), workdir.opened(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with workdir.opened(tmp_path):  # a killed run's lock is no obstacle
        pass


@pytest.mark.parametrize('by', ['nothing', 'another run'])
def test_a_run_whose_folder_was_replaced_ends_and_writes_nothing_there(by, coco_folder, tmp_path):
    folder = tmp_path / 'run'

    def replace(step):
        if step.number == 1:
            shutil.rmtree(folder)
            if by != 'nothing':
                with workdir.opened(folder):
                    pass

    config = tiny_config(data=coco_folder, epochs=2, save_every=4)
    with pytest.raises(InputError, match='run: was removed or replaced while this run used it'):
        launch(config, folder, on_step=replace)
    assert not folder.exists() or [path.name for path in folder.iterdir()] == ['.lock']


def test_a_stopped_run_says_so_though_its_curves_cannot_be_written(coco_folder, tmp_path, capsys):
    block = lambda _: (tmp_path / 'curves.png').mkdir()
    assert launch(tiny_config(data=coco_folder), tmp_path, stop_after=1, on_step=block) == signal.SIGTERM
    assert 'curves.png: cannot be written' in capsys.readouterr().out


def test_a_run_whose_folder_was_replaced_while_it_evaluates_changes_nothing_in_the_other(
    coco_folder, tmp_path
):
    folder, other = tmp_path / 'run', tmp_path / 'other'
    mesh = meshes.make_mesh(jax.devices()[:1])
    train(tiny_config(data=coco_folder, epochs=1, batch_size=8), other, mesh)
    files = {path: path.read_bytes() for path in other.rglob('*') if path.is_file()}

    class Replace(StopSignal):
        asked = 0

        def together(self):
            self.asked += 1
            if self.asked == 4:  # after three steps, and the first batch of the evaluation
                while not (folder / 'checkpoints' / '3').exists():  # saved in the background
                    time.sleep(0.01)
                folder.rename(tmp_path / 'before')
                shutil.copytree(other, folder)
            return False

    stop = Replace()
    with contextlib.ExitStack() as stack, pytest.raises(InputError) as error:
        stack.callback(stop.release)
        train(tiny_config(data=coco_folder, epochs=1, batch_size=8, seed=5), folder, mesh, stop=stop)
    assert stop.asked >= 4 and 'run: was removed or replaced while this run used it' in str(error.value)
    assert {path: (folder / path.relative_to(other)).read_bytes() for path in files} == files
