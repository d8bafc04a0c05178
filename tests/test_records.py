import json
import os
import subprocess
import sys

import numpy as np
import pytest

from yolos_jax.data.records import read_coco
from yolos_jax.errors import InputError


def write(root, content, images=True):
    """A COCO folder with this annotation content and empty image files of the names in it."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / 'val').mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'annotations' / 'instances_val.json').write_text(text)
    if images and not isinstance(content, str):
        for image in content['images']:
            (root / 'val' / image['file_name']).touch()
    return root


def good():
    return {
        'info': {'year': 2017},
        'images': [
            {'id': 7, 'file_name': 'b.jpg', 'height': 100, 'width': 200, 'license': 1},
            {'id': 3, 'file_name': 'a.jpg', 'height': 50, 'width': 60},
        ],
        'annotations': [
            {'id': 1, 'image_id': 7, 'category_id': 2, 'bbox': [10, 20, 30, 40], 'iscrowd': 0, 'area': 9.5,
             'segmentation': [[1, 2, 3]]},
            {'id': 2, 'image_id': 7, 'category_id': 5, 'bbox': [150.5, -5, 100, 50]},
            {'id': 3, 'image_id': 7, 'category_id': 5, 'bbox': [0, 0, 9, 9], 'iscrowd': 1},
            {'id': 4, 'image_id': 7, 'category_id': 5, 'bbox': [50, 50, 0, 10]},
        ],
        'categories': [{'id': 2, 'name': 'cat', 'supercategory': 'animal'}, {'id': 5, 'name': 'dog'}],
    }  # fmt: skip


def test_objects_are_clamped_and_crowds_and_flat_boxes_dropped(tmp_path):
    records = read_coco(write(tmp_path, good()), 'val')
    assert records.ids.tolist() == [3, 7] and records.files == ['a.jpg', 'b.jpg']
    boxes, labels = records.objects(1)
    np.testing.assert_allclose(boxes, [[10, 20, 40, 60], [150.5, 0, 200, 45]])
    assert labels.tolist() == [2, 5]
    assert len(records.objects(0)[0]) == 0  # an image without objects stays
    assert records.classes == {2: 'cat', 5: 'dog'} and records.num_classes == 6
    assert records.dropped == {'crowd': 1, 'no area': 1}


def change(**keys):
    content = good()
    for key, value in keys.items():
        where, index, field = key.split('__')
        content[where][int(index)][field] = value
    return content


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ('', 'is empty'),
        ('[1, 2', 'not a COCO detection file'),
        ('<html>', 'not a COCO detection file'),
        ('[]', 'not a COCO detection file'),
        ({'images': [], 'annotations': [], 'categories': []}, 'lists no images'),
        (good() | {'categories': []}, 'lists no categories'),
        (change(images__1__id=7), r'image ids stand twice: \[7\]'),
        (change(annotations__1__id=1), r'annotation ids stand twice: \[1\]'),
        (change(annotations__1__category_id=4), 'unknown category.* annotation id 2 with category_id 4'),
        (change(annotations__0__image_id=8), 'unknown image.* annotation id 1 with image_id 8'),
        (change(annotations__0__bbox=[1, 2, 3]), r'annotations\[0\].bbox'),
        (change(annotations__0__bbox=[1, 2, 3, 'x']), r'annotations\[0\].bbox'),
        (change(annotations__0__bbox=[1, 2, 3, float('nan')]), 'not a COCO detection file'),
        (change(images__0__height=0), 'image id 7 is 0x200'),
        (change(categories__1__id=70000), 'renumber'),
    ],
)
def test_a_bad_annotation_file_is_named_with_what_is_wrong(content, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        read_coco(write(tmp_path, content), 'val')
    assert 'instances_val.json' in str(error.value) and '\n' not in str(error.value)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError, match='no such data folder'):
        read_coco(tmp_path / 'nowhere', 'val')
    with pytest.raises(InputError, match='no such annotation file'):
        read_coco(tmp_path, 'val')
    write(tmp_path, good())
    (tmp_path / 'val').rename(tmp_path / 'images')
    with pytest.raises(InputError, match='no such image folder'):
        read_coco(tmp_path, 'val')


def test_missing_images_are_counted(tmp_path):
    with pytest.raises(InputError, match='1 of 2 images.* the first is b.jpg'):
        root = write(tmp_path, good())
        os.unlink(root / 'val' / 'b.jpg')
        read_coco(root, 'val')


@pytest.mark.parametrize('name', ['../a.jpg', '/etc/passwd', 'x/../../a.jpg'])
def test_images_outside_the_folder_are_refused(name, tmp_path):
    content = good()
    content['images'][1]['file_name'] = name
    root = write(tmp_path, content, images=False)
    (root / 'val' / 'b.jpg').touch()
    with pytest.raises(InputError, match='outside'):
        read_coco(root, 'val')


def test_images_may_lie_in_subfolders(tmp_path):
    content = good()
    content['images'][1]['file_name'] = 'sub/a.jpg'
    (tmp_path / 'val' / 'sub').mkdir(parents=True)
    assert read_coco(write(tmp_path, content), 'val').files[0] == 'sub/a.jpg'


def test_a_large_annotation_file_needs_less_than_a_gigabyte(tmp_path):
    """100,000 images with 7 objects each, with outlines as COCO's: 270 MB of JSON."""
    outline = ','.join(['123.45'] * 40)
    with open(write(tmp_path, good()) / 'annotations' / 'instances_val.json', 'w') as file:
        image = '{"id":%d,"file_name":"%d.jpg","height":480,"width":640}'
        file.write('{"images":[' + ','.join(image % (i, i) for i in range(100_000)) + '],"annotations":[')
        for i in range(700_000):
            file.write(
                f'{"," if i else ""}{{"id":{i},"image_id":{i // 7},"category_id":{i % 80},'
                f'"bbox":[{i % 600},2.5,30.25,40],"iscrowd":0,"area":99.5,"segmentation":[[{outline}]]}}'
            )
        names = ','.join(f'{{"id":{i},"name":"c{i}"}}' for i in range(80))
        file.write(f'],"categories":[{names}]}}')
    for i in range(100_000):
        (tmp_path / 'val' / f'{i}.jpg').touch()
    script = (
        'import re, sys\n'
        'from yolos_jax.data import geometry, loader, records\n'
        'found = records.read_coco(sys.argv[1], "val")\n'
        'assert len(found.boxes) == 700_000\n'
        'recipe = geometry.Recipe((480, 800), 1333, (400, 500, 600), 384, 600)\n'
        'batches = loader.TrainBatches(found, recipe, [4200], 8, 100, 0)\n'
        'assert len(batches.plan(0)[1]) == 12_500\n'
        'print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', script, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) * 1024 < 1e9
