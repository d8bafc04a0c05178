"""What `yolos predict` takes from folders and how its results are called."""

import os

from helpers import noise
from PIL import Image

from yolos_jax.data import folders
from yolos_jax.tools.predict import find_images
from yolos_jax.tools.prediction_files import as_coco


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
