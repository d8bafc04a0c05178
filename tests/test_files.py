import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from yolos_jax import file_names, files
from yolos_jax.errors import InputError, StorageError


def test_a_killed_writer_leaves_no_folder_of_that_name(tmp_path):
    script = (
        'import sys\nfrom yolos_jax import files\n'
        'with files.new_folder(sys.argv[1]) as part:\n'
        '    (part / "x").write_text("x")\n    print(part, flush=True)\n    sys.stdin.read()'
    )
    command = [sys.executable, '-c', script, tmp_path / 'out']
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    part = writer.stdout.readline().strip()
    assert os.listdir(part) == ['x']
    writer.kill()
    writer.communicate()
    assert not (tmp_path / 'out').exists()
    with files.new_folder(tmp_path / 'out'):  # what it left goes at the next start
        assert not os.path.exists(part)


def test_a_folder_is_written_through_a_link(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'out').symlink_to(tmp_path / 'disk')
    with files.new_folder(tmp_path / 'out') as part:
        (part / 'x').touch()
    assert (tmp_path / 'out').is_symlink() and os.listdir(tmp_path / 'disk') == ['x']


def test_a_cache_drops_what_was_used_least_recently(tmp_path):
    for hours in (0, 1, 100, 200, 300):
        (tmp_path / str(hours) / 'inside').mkdir(parents=True)
        (tmp_path / str(hours) / 'inside' / 'file').write_bytes(bytes(10))
        os.utime(tmp_path / str(hours), (time.time() - 3600 * hours,) * 2)
    files.prune(tmp_path, most=30)
    assert sorted(os.listdir(tmp_path)) == ['0', '1', '100']
    files.prune(tmp_path, most=0)
    assert sorted(os.listdir(tmp_path)) == ['0', '1']  # may be in use


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match='cannot write there .No space left'):
        with files.new_folder(tmp_path / 'out') as part:
            (part / 'x').write_text('x')
            raise OSError(28, 'No space left on device')
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / 'file') as file:
        file.write(b'x')
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('folder', ['file', 'file/in/it', 'closed/in/it'])
def test_an_unwritable_path_is_named_as_it_was_given(folder, tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'closed').mkdir(0o500)
    if folder.startswith('file') or os.geteuid():  # root may write anywhere
        with pytest.raises(InputError, match=f'{folder}: cannot be written to'):
            files.check_folder(tmp_path / folder)
        with pytest.raises(StorageError, match=f'{folder}/page: cannot be written .'):
            with files.replacing(tmp_path / folder / 'page'):
                raise AssertionError
    with pytest.raises(InputError, match='closed: is a folder; name a file in it'):
        files.check_file(tmp_path / 'closed', 'html', '.html')
    (tmp_path / 'data.json').touch()
    with pytest.raises(InputError, match='data.json: does not end in .html; choose another name'):
        files.check_file(tmp_path / 'data.json', 'html', '.html')


def test_a_full_disk_names_the_file_and_a_fault_of_another_file_stays(tmp_path):
    with pytest.raises(StorageError, match=r'/file: cannot be written \(No space left'):
        with files.replacing(tmp_path / 'file'):
            raise OSError(28, 'No space left on device')
    with pytest.raises(FileNotFoundError, match='/other'), files.replacing(tmp_path / 'file'):
        (tmp_path / 'other').read_text()
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_whole_and_readable_by_others(tmp_path):
    with files.new_folder(tmp_path / 'a' / 'out') as part:
        (part / 'x').write_text('x')
    assert (tmp_path / 'a' / 'out' / 'x').read_text() == 'x'
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / 'a' / 'out').stat().st_mode & 0o777 == 0o777 & ~umask
    with pytest.raises(InputError, match='exists and is not empty') as error:
        with files.new_folder(tmp_path / 'a' / 'out'):
            raise AssertionError
    assert error.value.argument == 'output'


def test_bytes_are_read_at_a_place_without_moving_the_file(tmp_path):
    (tmp_path / 'x').write_bytes(bytes(range(100)))
    with open(tmp_path / 'x', 'rb') as file:
        np.testing.assert_array_equal(files.read_at(file, 10, 5), range(10, 15))
        assert file.tell() == 0
        with pytest.raises(InputError, match='x: ends before'):
            files.read_at(file, 90, 11)


def test_parts_of_files_whose_writer_was_killed_are_removed(tmp_path):
    script = (
        'import os, sys\nfrom yolos_jax import files\n'
        'with files.replacing(sys.argv[1]) as file:\n    file.write(b"half")\n    os._exit(1)'
    )
    subprocess.run([sys.executable, '-c', script, tmp_path / 'x'], cwd=ROOT)
    assert [path.suffix for path in tmp_path.iterdir()] == ['.part']
    files.write(tmp_path / 'y', b'whole')
    assert [path.name for path in tmp_path.iterdir()] == ['y']


CONTAINER = 'unshare', '--user', '--map-root-user', '--pid', '--fork', '--mount-proc'


@pytest.mark.parametrize('container', [(), CONTAINER], ids=['', 'in a container of the same host name'])
def test_files_that_a_running_process_writes_are_left_alone(container, tmp_path):
    if container and subprocess.run([*container, 'true'], capture_output=True).returncode:
        pytest.skip('this user may not make namespaces')
    script = 'import sys\nfrom yolos_jax import files\nfiles.write(sys.argv[1], b"whole")'
    with files.replacing(tmp_path / 'x') as file:
        command = [*container, sys.executable, '-c', script, tmp_path / 'y']
        subprocess.run(command, cwd=ROOT, check=True)
        file.write(b'all')
    assert (tmp_path / 'x').read_bytes() == b'all' and (tmp_path / 'y').exists()
    with files.new_folder(tmp_path / 'out') as first, files.new_folder(tmp_path / 'out'):
        assert first.exists()


def test_a_process_is_running_until_it_ends():
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    assert files.is_running(str(os.getpid())) and files.is_running('1') and files.is_running('no id')
    assert not files.is_running(str(ended.pid)) and not files.is_running(str(1 << 80))


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Or it would be empty after a power cut."""
    calls = []
    for name in ('fsync', 'replace'):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, name=name, call=call: calls.append(name) or call(*x))
    files.write(tmp_path / 'x', b'x')
    assert calls == ['fsync', 'replace']


def test_an_error_in_a_new_folder_names_the_file_as_it_would_be_called(tmp_path):
    with pytest.raises(StorageError, match=f'{tmp_path}/out/x: cannot be written'):
        with files.new_folder(tmp_path / 'out') as part:
            (part / 'x').mkdir()
            files.write(part / 'x', b'')


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / 'x.json').write_text('[]')
    with pytest.raises(InputError, match='x.json: damaged .not a JSON object'):
        files.read_json(tmp_path / 'x.json')


def test_a_folder_comes_before_links_to_it(tmp_path):
    """On every file system, or labels that lie beside the folder would be looked for beside a link."""
    (tmp_path / 'real').mkdir()
    (tmp_path / 'real' / 'x').touch()
    for i in range(9):
        (tmp_path / f'link{i}').symlink_to('real')
    assert [*files.walk(tmp_path)] == ['real/x']


def test_names_of_outputs_differ_in_more_than_their_case():
    """On the disks of macOS and Windows Cat.jpg is cat.jpg."""
    paths = [Path('a/Cat.png'), Path('b/cat.png'), Path('c/CAT.png')]
    assert [*file_names.for_output(paths).values()] == ['Cat', 'cat-2', 'CAT-3']


def test_names_of_outputs_are_utf8_and_leave_room_for_a_suffix(tmp_path):
    """As a bucket needs them, and a file system."""
    (tmp_path / f'{file_names.free("é" * 200, set())}.jpg').touch()
    assert file_names.free('caf\udce9', set()) == 'caf\ufffd'


def test_two_writers_of_one_file_both_end_and_the_last_one_stays(tmp_path):
    with files.replacing(tmp_path / 'x') as first:
        first.write(b'first')
        with files.replacing(tmp_path / 'x') as second:
            second.write(b'second')
        assert (tmp_path / 'x').read_bytes() == b'second'
    assert (tmp_path / 'x').read_bytes() == b'first' and len(list(tmp_path.iterdir())) == 1


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    def no_home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(Path, 'home', no_home)
    with pytest.raises(InputError, match='no home folder; set XDG_CACHE_HOME'):
        files.cache()
