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
from helpers import ROOT, TINY, launch, tiny_config
from ml_collections import ConfigDict
from yolos_jax.configs import common

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import config_checks, config_files, resumption, workdir
from yolos_jax.run.stop import StopSignal
from yolos_jax.run.train import train
from yolos_jax.weights import Pretrained, checkpoint


def test_a_new_run_writes_over_nothing(coco_folder, tmp_path):
    (tmp_path / 'README.md').write_text('notes')
    (tmp_path / 'config.json').write_text('{"model_type": "yolos"}')
    with pytest.raises(InputError, match='holds no run, but config.json, README.md, which') as error:
        launch(tiny_config(data=coco_folder), tmp_path)
    assert error.value.argument == 'workdir' and (tmp_path / 'README.md').read_text() == 'notes'
    for name in ('val.json', 'curves.png'):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f'README.md, .*{name}'):
            resumption.check_new(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / 'index').mkdir()  # of a run that ended before its first checkpoint
    resumption.check_new(tmp_path)
    (tmp_path / 'index').rmdir()
    (tmp_path / 'config.json').write_text(
        '{"learning_rate": 1, "init_from": "", "val_split": "val"}'
    )  # of a run whose other folders were removed
    resumption.check_new(tmp_path)


@pytest.mark.parametrize(
    ('changed', 'says'),
    [
        ({'epochs': 2.0}, 'epochs is 2.0, of type float and not int'),
        ({'freeze': 6}, 'freeze is 6, of type int and not str'),
        ({'eval_size': '96'}, "eval_size is '96', of type str and not int"),
        ({'freeze': None}, 'freeze is None, of type NoneType and not str'),
        ({'seed': True}, 'seed is True, of type bool and not int'),
        ({'bad_images': '5'}, "bad_images is '5', no number"),
        ({'model.mid_pos_grid': (6, '8')}, r"model.mid_pos_grid is \[6, '8'\], not all whole numbers"),
    ],
)
def test_a_config_made_by_hand_has_the_known_types(changed, says, tmp_path):
    work = workdir.Workdir('', tmp_path, None, None)
    config = ConfigDict(tiny_config().to_dict() | {'learning_rate': 1})  # which may stand for 1.0
    for name, value in changed.items():
        of_model, _, key = name.rpartition('.')
        with (part := config.model if of_model else config).ignore_type():
            part[key] = value
    with pytest.raises(InputError, match=says) as error:
        config, _, _ = resumption.resumed(config, common.get_config(), work)
        config_checks.check_numbers(config)
    assert error.value.argument in changed


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
    (tmp_path / f'yolos_jax-{user}').mkdir()
    assert workdir.local_copy('gs://bucket/run').parent == tmp_path / f'yolos_jax-{user}'
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


def test_a_run_of_a_version_that_noted_fewer_digests_resumes(tmp_path):
    saved, current = (
        {'train': {'boxes': '1'}},
        {'train': {'boxes': '1', 'sizes': '2'}, 'val': {'boxes': '3'}},
    )
    resumption.check_same_data(saved, current, tmp_path)
    with pytest.raises(InputError, match='other data .boxes of train differ'):
        resumption.check_same_data({'train': {'boxes': '4'}}, current, tmp_path)


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


FREE = (
    'accumulate_steps bad_images data data_cache eval_every init_from log_every model.remat patience '
    'save_every shard_params spike_factor train_images train_json val_images val_json'
).split()


def test_only_values_that_change_no_computation_may_differ_when_a_run_resumes(tmp_path):
    saved, accepted = config_files.flat(common.get_config()), []
    for key in saved:
        with contextlib.suppress(InputError):
            resumption.check_same(saved, saved | {key: -1}, tmp_path)
            accepted.append(key)
    assert sorted(accepted) == FREE
    older = {key: value for key, value in saved.items() if key != 'ema'}
    assert resumption.check_same(older, saved, tmp_path) == []  # it is off
    for before, now in (older, saved | {'ema': 0.9}), (saved | {'gone': 1}, saved):
        with pytest.raises(InputError, match='(ema: None then, 0.9|gone: 1 then, None) now'):
            resumption.check_same(before, now, tmp_path)


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
    train(tiny_config(data=coco_folder, epochs=1, batch_size=8), other)
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
        train(tiny_config(data=coco_folder, epochs=1, batch_size=8, seed=5), folder, stop=stop)
    assert stop.asked >= 4 and 'run: was removed or replaced while this run used it' in str(error.value)
    assert {path: (folder / path.relative_to(other)).read_bytes() for path in files} == files


def test_a_run_does_not_resume_from_checkpoints_of_a_conversion(tmp_path):
    model = Yolos(**TINY, num_classes=3)
    params = jax.device_get(init_params(model, jax.random.key(0)))
    checkpoint.write(Pretrained(model, params, {1: 'cat'}, 64, 96), tmp_path / 'checkpoints')
    work = workdir.Workdir('', tmp_path, None, None)
    with pytest.raises(InputError, match='its checkpoints are not from a run') as error:
        resumption.resumed(tiny_config(), common.get_config(), work)
    assert error.value.argument == 'workdir'
