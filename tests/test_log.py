import io
import json
import os
import resource
import struct
import subprocess
import sys

import pytest
from helpers import ROOT
from tensorboardX.proto.event_pb2 import Event

from yolos_jax import progress_bar
from yolos_jax.errors import InputError
from yolos_jax.run.board import Board
from yolos_jax.run.log import Log


def test_a_resumed_runs_file_is_that_of_an_unbroken_one(tmp_path):
    first = Log(tmp_path, range(30), per_epoch=8)
    for step in (10, 20):
        first.write(step, {'loss': step / 7})
    first.close()
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 21, "lo')  # killed while writing
    again = Log(tmp_path, range(10, 30), per_epoch=8)  # the checkpoint was of step 10
    for step in (20, 30):
        again.write(step, {'loss': step / 7})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    times = [line.pop('time') for line in lines]
    assert lines == [{'step': step, 'epoch': step / 8, 'loss': step / 7} for step in (10, 20, 30)]
    assert times == sorted(times)
    assert list(tmp_path.glob('events.out.tfevents.*'))


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    lines = [b'{"step": 1}\n', b'\xff\xfe\n', b'{"step": "x"}\n', b'[]\n', b'{"step": 2, "loss": 3}\n']
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(lines))
    Log(tmp_path, range(5, 30)).close()
    assert '3 damaged lines were left out' in capsys.readouterr().out
    assert (tmp_path / 'metrics.jsonl').read_bytes() == lines[0] + lines[4]
    (tmp_path / 'metrics.jsonl').write_bytes(b'".\n' + lines[0] + b'{"step"')  # the last of a killed run
    Log(tmp_path, range(5, 30)).close()
    assert '1 damaged line was left out' in capsys.readouterr().out


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / 'metrics.jsonl').mkdir()
    with pytest.raises(InputError, match='metrics.jsonl: cannot be read .Is a directory'):
        Log(tmp_path, range(30))


def test_metrics_that_cannot_be_written_are_written_later(tmp_path, capsys):
    log = Log(tmp_path, range(30))
    log.write(1, {'loss': 1})
    (tmp_path / 'metrics.jsonl').rename(tmp_path / 'moved')
    (tmp_path / 'metrics.jsonl').mkdir()  # as good as a full disk
    for step in (2, 3):
        log.write(step, {'loss': step})
    (tmp_path / 'metrics.jsonl').rmdir()
    (tmp_path / 'moved').rename(tmp_path / 'metrics.jsonl')
    log.write(4, {'loss': 4})
    log.close()
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count('cannot be written now') == 1


def test_a_disk_that_is_full_within_a_line_leaves_no_part_of_it(tmp_path, capsys):
    log, path = Log(tmp_path, range(30)), tmp_path / 'metrics.jsonl'
    log.write(1, {'loss': 1})
    whole, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        log.write(2, {'loss': 2})
        assert path.read_bytes() == whole and 'cannot be written now' in capsys.readouterr().out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(3, {'loss': 3})
    log.close()
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_disk_that_is_full_for_a_while_does_not_stop_tensorboards_files(tmp_path):
    script = (
        'import pathlib, resource, sys\n'
        'from yolos_jax.run.board import Board\n'
        'board, folder = Board(pathlib.Path(sys.argv[1]), 0), pathlib.Path(sys.argv[1])\n'
        'size = resource.RLIMIT_FSIZE\n'
        'resource.setrlimit(size, (20_000, -1))\n'
        'for step in range(1000): board.scalars(step, {"loss": 1.0})\n'
        'resource.setrlimit(size, (-1, -1))\n'
        'board.scalars(1000, {"loss_at_the_end": 1.0})\n'
        'board.close()\n'
    )
    command = [sys.executable, '-c', script, tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    assert any(b'loss_at_the_end' in path.read_bytes() for path in tmp_path.glob('events.*'))


def test_tensorboard_and_curves_load_neither_pytorch_nor_pyplot(tmp_path):
    script = (
        'import importlib.util, pathlib, sys\nfrom yolos_jax.run import curves\n'
        'from yolos_jax.run.board import Board\n'
        'board = Board(pathlib.Path(sys.argv[1]), 0)\nboard.scalars(1, {"loss": 1.0})\n'
        'board.close()\ncurves.draw(sys.argv[1])\n'
        'print([name for name in ("torch", "boto3", "matplotlib.pyplot") if name in sys.modules])\n'
        'assert importlib.util.find_spec("torch") and importlib.util.find_spec("boto3")'
    )
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 1.0}\n')
    done = subprocess.run(
        [sys.executable, '-c', script, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == '[]\n' and done.returncode == 0, done.stderr
    assert {path.name[:6] for path in tmp_path.iterdir()} == {'events', 'curves', 'metric'}


def test_text_that_the_encoding_does_not_have_is_escaped_in_the_log(tmp_path):
    log = Log(tmp_path, range(1))
    log.print('note \udcff')
    log.close()
    assert (tmp_path / 'log.txt').read_text() == 'note \\udcff\n'


def test_tensorboard_hides_what_an_earlier_start_wrote_after_the_first_step(tmp_path):
    board, starts = Board(tmp_path, 7), []
    for step in (8, 9):
        board.scalars(step, {'loss': 1.0})
        board.close()  # as after an error: the next write opens another file
    for path in sorted(tmp_path.glob('events.*')):
        data = path.read_bytes()
        while data:
            size = struct.unpack('<Q', data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField('session_log'):
                starts.append(event.step)
    assert starts == [8]


@pytest.mark.parametrize('closed', [False, True])
def test_a_process_without_a_console_logs_to_the_file(closed, tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.close()
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, stream if closed else None)
    log = Log(tmp_path, range(2))
    log.print('a line')
    log.close()
    assert not progress_bar.is_terminal()
    assert (tmp_path / 'log.txt').read_text() == 'a line\n'


def test_a_dumb_terminal_is_none_on_which_a_bar_can_be_drawn(monkeypatch):
    keyboard, screen = os.openpty()
    with open(keyboard, 'rb'), open(screen, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        for name, draws in (('xterm', True), ('dumb', False)):
            monkeypatch.setenv('TERM', name)
            assert progress_bar.is_terminal() is draws
