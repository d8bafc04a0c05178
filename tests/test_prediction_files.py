"""Which files `yolos predict` takes from folders, and how its results are named."""

import json
import os

import pytest
from helpers import noise
from PIL import Image

from yolos_jax.data import folders
from yolos_jax.errors import InputError
from yolos_jax.tools.predict import find_images
from yolos_jax.tools.prediction_files import Predictions, as_coco, named

SETTINGS = {'pictures': True}


def test_pipes_and_loops_of_links_among_images_stop_nothing(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'loop.jpg').symlink_to('loop.jpg')
    Image.fromarray(noise(60, 80)).save(tmp_path / 'image.png')
    images = find_images([str(tmp_path)], tmp_path / 'output')
    assert sorted(path.name for path in images) == ['image.png', 'loop.jpg']  # which cannot be read
    assert folders.Folder(tmp_path).start_read('pipe.jpg', 0)() == b''


def test_images_of_one_name_are_told_apart_in_a_coco_file():
    entries = [
        {'image': image, 'file': file, 'width': 8, 'height': 6, 'detections': []}
        for image, file in (('a.jpg', '/x/a.jpg'), ('a.jpg', '/y/a.jpg'), ('b.jpg', '/y/b.jpg'))
    ]
    names = [image['file_name'] for image in as_coco(entries, {})['images']]
    assert names == ['/x/a.jpg', '/y/a.jpg', 'b.jpg']
    without_files = [{key: x for key, x in entry.items() if key != 'file'} for entry in entries[:2]]
    assert len(as_coco(without_files, {})['images']) == 2  # as version 0.2.0 wrote them


def test_an_image_or_video_whose_picture_was_removed_is_predicted_again(tmp_path):
    output, photograph, video = tmp_path / 'output', tmp_path / 'a.png', tmp_path / 'v.mov'
    output.mkdir()
    Image.fromarray(noise(60, 80)).save(photograph)
    video.write_bytes(b'frames')
    with Predictions(output, SETTINGS, overwrite=False) as predictions:
        predictions.add(named(photograph) | {'picture': 'a.jpg', 'detections': []})
        predictions.add_video(named(video), output / 'v.mp4')
    for name in ('a.jpg', 'v.mp4', 'v.jsonl'):
        (output / name).touch()
    with Predictions(output, SETTINGS, overwrite=False) as predictions:
        assert predictions.done == {str(photograph)}
        assert not list(predictions.new_videos([video]))
    for name in ('a.jpg', 'v.mp4'):
        (output / name).unlink()
    with Predictions(output, SETTINGS, overwrite=False) as predictions:
        assert not predictions.done
        assert list(predictions.new_videos([video])) == [(video, output / 'v.mp4')]


def test_lines_after_a_damaged_line_are_kept(tmp_path):
    entry = {'picture': None, 'detections': []}
    with Predictions(tmp_path, SETTINGS, overwrite=False) as predictions:
        for name in 'abc':
            predictions.add({'image': name, 'file': f'/{name}'} | entry)
    lines = (tmp_path / 'predictions.jsonl').read_bytes().splitlines(True)
    (tmp_path / 'predictions.jsonl').write_bytes(
        lines[0] + b'\xff' + lines[1] + b'[]\n' + lines[2] + b'{"ima'
    )
    with Predictions(tmp_path, SETTINGS, overwrite=False) as predictions:
        assert predictions.done == {'/a', '/c'}
    assert (tmp_path / 'predictions.jsonl').read_bytes() == lines[0] + lines[2]


@pytest.mark.parametrize('entry', [{}, {'picture': 7}, {'picture': '..'}, {'picture': '../a.jpg'}])
def test_lines_that_name_no_picture_of_the_folder_are_damaged(entry, tmp_path):
    with Predictions(tmp_path / 'output', SETTINGS, overwrite=False):
        pass
    (tmp_path / 'a.jpg').touch()
    line = {'image': 'a.jpg', 'detections': []} | entry
    (tmp_path / 'output' / 'predictions.jsonl').write_text(json.dumps(line))
    with Predictions(tmp_path / 'output', SETTINGS, overwrite=False) as predictions:
        assert not predictions.done and (tmp_path / 'a.jpg').exists()


def test_a_damaged_list_of_videos_is_named(tmp_path):
    for name in ('videos.json', 'predictions.jsonl'):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match='videos.json: damaged .* remove it'):
        Predictions(tmp_path, SETTINGS, overwrite=True)
    out, other = tmp_path / 'out', tmp_path / 'holiday.mp4'
    out.mkdir()
    other.touch()
    (out / 'predictions.jsonl').touch()
    (out / 'videos.json').write_text('{"../holiday": {"file": "/x/v.mp4"}}')
    with pytest.raises(InputError, match='videos.json: damaged .a video named ../holiday.; remove it'):
        Predictions(out, SETTINGS, overwrite=True)
    assert other.exists()


def test_hidden_files_and_folders_are_no_inputs(tmp_path):
    """macOS puts ._NAME beside every file on other disks."""
    (tmp_path / '.cache').mkdir()
    for name in ('a.jpg', '._a.jpg', 'v.mp4', '._v.mp4', '.cache/w.mp4'):
        (tmp_path / name).touch()
    images = find_images([str(tmp_path)], tmp_path / 'output')
    assert sorted(path.name for path in images) == ['a.jpg', 'v.mp4']


def test_overwriting_replaces_no_file_that_predictions_did_not_write(tmp_path):
    for name in ('clip.mp4', 'clip.jsonl'):
        (tmp_path / name).write_text('of the user')
    with Predictions(tmp_path, SETTINGS, overwrite=True) as predictions:
        ((_, target),) = predictions.new_videos([tmp_path / 'videos' / 'clip.mp4'])
    assert target == tmp_path / 'clip-2.mp4'


def test_a_call_that_ended_before_its_settings_were_written_is_repeated(tmp_path):
    (tmp_path / 'predictions.jsonl').touch()
    with Predictions(tmp_path, SETTINGS, overwrite=False) as predictions:
        assert not predictions.done and (tmp_path / 'settings.json').exists()


def test_lines_of_other_programs_are_not_replaced(tmp_path):
    (tmp_path / 'predictions.jsonl').write_text('{"prompt": "x", "answer": "y"}\n')
    with pytest.raises(InputError, match='holds predictions made with other settings'):
        Predictions(tmp_path, SETTINGS, overwrite=False)


@pytest.mark.parametrize('name', ['predictions.json', 'settings.json', 'videos.json'])
def test_files_of_these_names_that_are_no_predictions_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text('{"of": "the user"}')
    with pytest.raises(InputError, match=f'has {name}, but no predictions; choose another'):
        Predictions(tmp_path, SETTINGS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
