import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from yolos_jax.data import build_tfds, check


@pytest.fixture
def faulty(coco_folder, tmp_path):
    """A COCO folder whose val2017 has one of each fault that does not end the examination."""
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    image = lambda number: root / 'val2017' / f'{number:012d}.jpg'
    image(1).write_bytes(b'<html>')
    image(2).unlink()
    Image.open(image(3)).resize((50, 50)).save(image(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image(4)).save(image(4), exif=exif, quality=95)
    turned = Image.open(image(5)).transpose(Image.ROTATE_90)
    turned.save(image(5), exif=exif, quality=95)
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    first = content['annotations'][0]
    content['images'][4]['width'], content['images'][4]['height'] = turned.height, turned.width
    content['annotations'] += [
        first | {'id': 900, 'image_id': 6, 'bbox': [5, 5, 0, 9]},
        first | {'id': 901, 'image_id': 6, 'bbox': [80, 80, 500, 9]},
        *(first | {'id': 1000 + i, 'image_id': 7, 'bbox': [i % 50, i % 40, 9, 9]} for i in range(120)),
    ]
    path.write_text(json.dumps(content))
    return root


def run(*args):
    command = [sys.executable, '-m', 'yolos_jax.data.check', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_fault_is_reported_with_its_file(faulty, tmp_path):
    done = run(faulty, '--html', tmp_path / 'report.html', '--config', 'configs/quickstart.py')
    assert done.returncode == 1
    train, val = done.stdout.split('== val2017 ==')
    assert 'STOPS' not in train and 'note' not in train
    for line in (
        r'STOPS A RUN: 1 images missing: .*000000000002.jpg',
        r'STOPS A RUN: 1 images unreadable: .*000000000001.jpg: not a readable image',
        r'STOPS A RUN: 1 images of another size than annotated: .*000000000003.jpg is 50x50, annotated',
        r'note: 1 images turned by EXIF, annotated and used as stored: .*000000000004.jpg',
        r'note: 1 images turned by EXIF, annotated and used upright: .*000000000005.jpg',
        r'note: 1 boxes without an area \(dropped\): annotation id 900',
        r'note: 1 boxes that leave the image by more than a pixel \(cut\): annotation id 901',
        r'with more than 100 objects +1 \(10.0%\)',
        r'without an area, left out +1\b',
    ):
        assert re.search(line, val), line
    page = (tmp_path / 'report.html').read_text()
    pictures = len(re.findall('<img src="data:image/jpeg;base64,', page))
    assert pictures > 16, pictures
    assert 'Boxes that leave the image' in page and 'A batch as the model sees it' in page


def test_annotations_that_stop_a_run_are_all_listed(coco_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][1]['category_id'] = 50
    content['annotations'][2]['id'] = content['annotations'][3]['id']
    path.write_text(json.dumps(content))
    done = run(root, '--split', 'val2017')
    assert done.returncode == 1 and done.stdout.count('STOPS A RUN') == 2


def test_counts_are_those_of_the_annotations(coco_folder):
    found = check.examine(coco_folder, 'train2017', batch_size=4)
    content = json.loads((coco_folder / 'annotations' / 'instances_train2017.json').read_text())
    objects = [a for a in content['annotations'] if not a['iscrowd']]
    shown = dict(row for _, rows in found.tables for row in rows)
    assert shown['in all'] == '24' and shown['to train on'] == str(len(objects))
    for number, name in ((1, 'circle'), (2, 'square'), (3, 'triangle')):
        mine = [a['image_id'] for a in objects if a['category_id'] == number]
        assert shown[f'{number} {name}'] == f'{len(mine)} in {len(set(mine))} images'
    assert found.problems == []


def test_a_data_set_of_tfds_is_checked_too(coco_folder, tmp_path):
    done = run(build_tfds.build(coco_folder, tmp_path))
    assert done.returncode == 0 and '== train2017 ==' in done.stdout and '== val2017 ==' in done.stdout


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and f'error: {tmp_path}: no annotations/' in done.stderr


def test_the_batch_shown_is_the_one_trained_on(coco_folder):
    found = check.examine(coco_folder, 'train2017', batch_size=4)
    assert found.batches.records.json.name == 'instances_train2017.json'
    assert np.unique(found.batches.rows(0)[0]).size == 4
