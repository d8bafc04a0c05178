import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import CLASSES, ROOT, TINY, make_video, run_predict
from PIL import Image

from yolos_jax import visualize, weights
from yolos_jax.data import annotations
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.tools import prediction_files
from yolos_jax.weights import checkpoint


def lines(out):
    return [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]


def test_pictures_and_json_are_written(saved, coco_folder, tmp_path):
    out = tmp_path / 'out'
    image = coco_folder / 'train2017' / '000000000001.jpg'
    content = run_predict(saved, out, image, coco_folder / 'val2017')
    assert len(content) == 11 and len({entry['picture'] for entry in content}) == 11
    assert content == lines(out)
    for entry in content:
        width, height = Image.open(entry['image']).size
        assert (width, height) == (entry['width'], entry['height'])
        scale = -(-320 // min(width, height))
        assert Image.open(out / entry['picture']).size == (scale * width, scale * height)
        assert set(entry['detections'][0]) == {'box', 'score', 'label', 'name'}


def test_photographs_are_never_replaced(saved, photographs):
    before = {path: path.read_bytes() for path in photographs.iterdir()}
    inputs = [photographs], [photographs / '000000000001.jpg'], [photographs.parent / '.' / 'photographs']
    for paths in inputs:
        with pytest.raises(InputError, match='is both input and output') as error:
            run_predict(saved, photographs, *paths)
        assert error.value.argument == 'output'
    assert {path: path.read_bytes() for path in photographs.iterdir()} == before
    with pytest.raises(InputError, match='names a file'):
        run_predict(saved, photographs / 'out.jpg', photographs)


def test_files_that_are_in_the_output_already_are_never_replaced(saved, photographs, tmp_path):
    """Photographs, videos and pages of others, whose names a call would take."""
    inside, frames = photographs / 'sub', [np.zeros((96, 128, 3), np.uint8)]
    inside.mkdir()
    names = [f'{i:012}.jpg' for i in (1, 2)]
    for name in names:
        shutil.copy(photographs / name, inside / name)
    make_video(inside / 'film.mp4', frames)
    make_video(photographs / 'film.mp4', 2 * frames)
    theirs = {path: path.read_bytes() for path in photographs.iterdir() if path.is_file()}
    for _ in range(2):
        run_predict(saved, photographs, inside, '--threshold=0.05')
        assert all(path.read_bytes() == content for path, content in theirs.items())
    pictures = [entry['picture'] for entry in json.loads((photographs / 'predictions.json').read_text())]
    assert pictures == [f'{i:012}-2.jpg' for i in (1, 2)]
    assert (photographs / 'film-2.mp4').exists() and not (photographs / 'film-3.mp4').exists()
    run_predict(saved, photographs, inside, '--threshold=0.1', '--overwrite')
    assert all(path.read_bytes() == content for path, content in theirs.items())
    assert not (photographs / f'{1:012}-3.jpg').exists()


def test_an_output_within_the_input_is_no_input(saved, photographs):
    for _ in range(2):
        content = run_predict(saved, photographs / 'out', photographs, '--overwrite')
        assert len(content) == 10


def test_a_bad_image_gives_an_error_entry_a_message_and_exit_status_1(saved, photographs, tmp_path, capsys):
    (photographs / '000000000003.jpg').write_bytes(b'<html>')
    with pytest.raises(SystemExit) as end:
        run_predict(saved, tmp_path / 'out', photographs)
    assert end.value.code == 1
    errors = [entry for entry in lines(tmp_path / 'out') if 'error' in entry]
    assert (
        len(lines(tmp_path / 'out')) == 10 and '000000000003.jpg' in errors[0]['error'] and len(errors) == 1
    )
    assert capsys.readouterr().err.count('left out: ') == 1


def test_a_call_counts_its_own_images(saved, photographs, tmp_path, capsys):
    first, *others = sorted(photographs.iterdir())
    run_predict(saved, tmp_path / 'out', *others)
    run_predict(saved, tmp_path / 'out', first)
    assert f'images: 1, objects: {TINY["num_det_tokens"]}\n' in capsys.readouterr().out


def test_a_rerun_continues_where_the_last_one_stopped(saved, photographs, tmp_path):
    """After a kill in the middle of a line; a picture that was done is not made again."""
    out = tmp_path / 'out'
    expected = run_predict(saved, out, photographs)
    written = (out / 'predictions.jsonl').read_bytes()
    at = [i for i, byte in enumerate(written) if byte == ord('\n')][4] + 30
    (out / 'predictions.jsonl').write_bytes(written[:at])
    times = {path.name: path.stat().st_mtime_ns for path in out.glob('*.jpg')}
    assert run_predict(saved, out, photographs) == expected
    assert (out / 'predictions.jsonl').read_bytes() == written
    same = [name for name, at in times.items() if (out / name).stat().st_mtime_ns == at]
    assert len(same) == 5


def test_predictions_with_other_settings_are_not_mixed(saved, photographs, tmp_path):
    run_predict(saved, tmp_path / 'out', photographs)
    with pytest.raises(InputError, match=r'other settings \(font\)'):
        run_predict(saved, tmp_path / 'out', photographs, f'--font={visualize.default_font()}')
    with pytest.raises(InputError, match=r'other settings \(max_detections\).*overwrite') as error:
        run_predict(saved, tmp_path / 'out', photographs, '--max_detections=1')
    assert error.value.argument == 'output'
    content = run_predict(saved, tmp_path / 'out', photographs, '--max_detections=1', '--overwrite')
    assert {len(entry['detections']) for entry in content} == {1}


def test_predictions_of_other_weights_at_the_same_path_are_not_mixed(saved, photographs, tmp_path):
    out, folder = tmp_path / 'out', tmp_path / 'weights'
    shutil.copytree(saved, folder)
    run_predict(folder, out, photographs)
    run_predict(saved, out, photographs)  # the same weights elsewhere
    shutil.rmtree(folder)
    yolos = Yolos(**TINY, num_classes=4)
    trained = weights.Pretrained(yolos, init_params(yolos, jax.random.key(1)), CLASSES, 64, 128)
    checkpoint.write(trained, folder)
    with pytest.raises(InputError, match=r'other settings .weights.'):
        run_predict(folder, out, photographs)


@pytest.mark.parametrize('count', [400, pytest.param(10_000, marks=pytest.mark.trials)])
def test_a_killed_prediction_is_completed_with_every_image_once(count, saved, coco_folder, tmp_path):
    """One is corrupt; memory does not grow with the number of images."""
    photographs, out = tmp_path / 'photographs', tmp_path / 'out'
    photographs.mkdir()
    for i in range(count):
        os.link(coco_folder / 'val2017' / f'{i % 10 + 1:012d}.jpg', photographs / f'{i:05d}.jpg')
    (photographs / '00007.jpg').unlink()
    (photographs / '00007.jpg').write_bytes(b'<html>')
    command = [sys.executable, 'predict.py', f'--weights={saved}', f'--output={out}', '--threshold=0']
    start = lambda: subprocess.Popen([*command, photographs], cwd=ROOT, stderr=subprocess.DEVNULL)
    killed = start()
    while not (out / 'predictions.jsonl').exists() or len(done_lines(out)) < count // 20:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    before = len(done_lines(out))
    again, peak = start(), 0
    while again.poll() is None:  # the peak that the system counts for a child begins with its parent's
        with contextlib.suppress(OSError, TypeError):
            status = Path(f'/proc/{again.pid}/status').read_text()
            peak = int(re.search(r'VmHWM:\s+(\d+) kB', status)[1])
        time.sleep(0.05)
    assert again.returncode == 1 and 100_000 < peak < 1_000_000
    content = json.loads((out / 'predictions.json').read_text())
    assert count // 20 <= before < count
    assert len({entry['image'] for entry in content}) == len(content) == count
    assert [entry['image'][-9:] for entry in content if 'error' in entry] == ['00007.jpg']
    for entry in content:
        if 'error' not in entry:
            Image.open(out / entry['picture']).load()
    assert not list(out.glob('.*.part'))


def done_lines(out):
    return (out / 'predictions.jsonl').read_text().splitlines()


def test_classes_pictures_and_format_can_be_chosen(saved, photographs, tmp_path):
    out = tmp_path / 'out'
    content = run_predict(saved, out, photographs, '--classes', 'circle', '--no-pictures', '--format=coco')
    assert not list(out.glob('*.jpg')) and len(content['images']) == 10
    assert {a['category_id'] for a in content['annotations']} <= {1}
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    a = annotations.read(tmp_path / 'coco.json')
    assert len(a.ids) == 10 and dict(a.categories) == CLASSES
    with pytest.raises(InputError, match='no class dog; the model has circle, square, triangle'):
        run_predict(saved, out, photographs, '--classes', 'dog', 'circle')


def test_a_coco_file_has_the_category_of_every_detection():
    one = {'box': [0, 0, 4, 4], 'score': 1.0, 'label': 7, 'name': 'class 7'}
    entry = {'image': 'a.jpg', 'width': 9, 'height': 9, 'detections': [one]}
    content = prediction_files.as_coco([entry], {1: 'cat'})
    assert content['categories'] == [{'id': 1, 'name': 'cat'}, {'id': 7, 'name': 'class 7'}]


def test_images_of_one_name_are_told_apart_by_where_they_are(saved, photographs, tmp_path, monkeypatch):
    for folder, path in zip('ab', sorted(photographs.iterdir()), strict=False):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(shutil.copy(path, tmp_path / folder / 'x.jpg').parent)
        content = run_predict(saved, tmp_path / 'out', 'x.jpg')
    assert [Path(entry['file']).parent.name for entry in content] == ['a', 'b']
    assert content[0]['picture'] != content[1]['picture']


def test_an_image_that_was_replaced_is_done_again(saved, photographs, tmp_path):
    first, second, *_ = sorted(photographs.iterdir())
    before, stat = run_predict(saved, tmp_path / 'out', first, second), first.stat()
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(first)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some tools leave it
    after = run_predict(saved, tmp_path / 'out', first, second)
    (changed,) = (entry for entry in after if entry['image'] == str(first))
    assert changed['width'] == 70 and len(after) == 2 and before[1] in after
    assert (tmp_path / 'out' / changed['picture']).exists()


def test_linked_folders_are_searched_and_overwriting_removes_old_pictures(saved, photographs, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'linked').symlink_to(photographs)
    assert len(run_predict(saved, tmp_path / 'out', tmp_path / 'in')) == 10
    run_predict(saved, tmp_path / 'out', sorted(photographs.iterdir())[0], '--overwrite')
    assert len([*(tmp_path / 'out').glob('*.jpg')]) == 1


def test_links_to_nowhere_and_in_a_circle_stop_nothing(saved, photographs, tmp_path):
    (photographs / 'nowhere.jpg').symlink_to(tmp_path / 'gone.jpg')
    (photographs / 'latest').symlink_to(photographs)
    with pytest.raises(SystemExit):
        run_predict(saved, tmp_path / 'out', photographs)
    content = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert len(content) == 11 and [entry['image'][-11:] for entry in content if 'error' in entry] == [
        'nowhere.jpg'
    ]


def test_names_may_be_long_and_hidden_files_are_no_images(saved, photographs, tmp_path):
    path = tmp_path / 'in' / f'{"写" * 83}.jpg'
    path.parent.mkdir()
    shutil.copy(next(photographs.iterdir()), path)
    (path.parent / '._x.jpg').write_bytes(b'of macOS')
    (entry,) = run_predict(saved, tmp_path / 'out', path.parent)
    assert (tmp_path / 'out' / entry['picture']).exists()
    assert len(run_predict(saved, tmp_path, path.parent)) == 1  # the output is above the input
