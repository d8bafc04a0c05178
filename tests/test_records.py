import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import coco_content, write_coco

from yolos_jax.data import folders, sources
from yolos_jax.data.records import from_source, read, select
from yolos_jax.errors import InputError


def test_objects_are_clamped_and_crowds_and_flat_boxes_dropped(tmp_path):
    records = read(write_coco(tmp_path, coco_content()), 'val')
    assert records.ids.tolist() == [3, 7] and records.files.tolist() == ['a.jpg', 'b.jpg']
    boxes, labels = records.objects(1)
    np.testing.assert_allclose(boxes, [[10, 20, 40, 60], [150.5, 0, 200, 45]])
    assert labels.tolist() == [2, 5]
    assert len(records.objects(0)[0]) == 0  # an image without objects stays
    assert records.classes == {2: 'cat', 5: 'dog'} and records.num_classes == 6
    assert records.dropped == {'crowd': 1, 'no area': 1}


def test_no_image_may_be_bad_where_that_is_asked_for(tmp_path):
    source = sources.find(write_coco(tmp_path, coco_content()), 'val')
    assert [from_source(source, bad_images=most).bad_images for most in (0, 5, None)] == [0, 5, 3]


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError, match='no such data folder'):
        read(tmp_path / 'nowhere', 'val')
    with pytest.raises(InputError, match='not a known data set'):
        read(tmp_path, 'val')
    write_coco(tmp_path, coco_content())
    (tmp_path / 'val').rename(tmp_path / 'pictures')
    with pytest.raises(InputError, match='the images it names .*are not in .*val'):
        read(tmp_path, 'val')


@pytest.mark.parametrize(
    ('files', 'says'),
    [
        (['1.jpg', '1.json', '2.png', '2.json'], 'a JSON file for each image, .*; labelme2coco joins'),
        (['Annotations/1.xml', 'JPEGImages/1.jpg'], r"VOC's XML is not read; docs/data\.md shows how"),
        (['classes.txt', 'images/1.jpg', 'labels/1.txt'], r'`train: images`.* those in classes\.txt'),
    ],
)
def test_for_a_layout_that_is_not_read_the_way_to_one_is_named(files, says, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{}')
    with pytest.raises(InputError, match=says):
        read(tmp_path, 'train')


def test_missing_images_are_counted(tmp_path):
    with pytest.raises(InputError, match='1 of 2 images.* the first is b.jpg'):
        root = write_coco(tmp_path, coco_content())
        os.unlink(root / 'val' / 'b.jpg')
        read(root, 'val')


def test_images_may_lie_in_subfolders(tmp_path):
    content = coco_content()
    content['images'][1]['file_name'] = 'sub/a.jpg'
    (tmp_path / 'val' / 'sub').mkdir(parents=True)
    assert read(write_coco(tmp_path, content), 'val').files[0] == 'sub/a.jpg'


def coco_in_subfolders(root, names):
    """`coco_content` with these names of images, below `export/`, which is missing on disk."""
    content = coco_content()
    for image, name in zip(content['images'], names, strict=True):
        image['file_name'] = f'export/{name}'
        (root / 'val' / name).parent.mkdir(parents=True, exist_ok=True)
        (root / 'val' / name).touch()
    return write_coco(root, content, images=False)


@pytest.mark.parametrize('names', [['cam/b.jpg', 'cam/a.jpg'], ['cam/left/b.jpg', 'cam/left/a.jpg']])
def test_a_leading_folder_may_be_missing_where_all_images_share_another_too(names, tmp_path):
    assert read(coco_in_subfolders(tmp_path, names), 'val').files.tolist() == sorted(names)


def test_a_part_of_a_data_set_has_its_images_where_the_whole_has_them(tmp_path):
    root = coco_in_subfolders(tmp_path, ['cam/a.jpg', 'a.jpg'])  # of the first alone, cam/ could be missing
    assert select(read(root, 'val'), [1]).truth_in(root).files.tolist() == ['val/cam/a.jpg']


@pytest.mark.parametrize('before', ['..\\..\\label-studio\\media\\', '/data/upload/1/', 'C:\\pictures\\'])
def test_images_that_a_tool_kept_elsewhere_are_found_by_their_names(before, tmp_path):
    content, root = coco_content(), write_coco(tmp_path, coco_content())
    for image in content['images']:
        image['file_name'] = before + image['file_name']
    write_coco(root, content, images=False)
    assert read(root, 'val').files.tolist() == ['a.jpg', 'b.jpg']


@pytest.mark.parametrize('name', ['../c.jpg', '/etc/passwd', 'x/../../c.jpg'])
def test_no_image_outside_its_folder_is_opened(name, tmp_path):
    content, root = coco_content(), write_coco(tmp_path, coco_content())
    (root / 'c.jpg').touch()
    content['images'][1]['file_name'] = name
    write_coco(root, content, images=False)
    with pytest.raises(InputError, match=f'instances_val.json: names files outside the folder .*: {name}'):
        read(root, 'val')


def test_images_are_selected_by_index_from_either_end_or_by_a_mask(tmp_path):
    records = read(write_coco(tmp_path, coco_content()), 'val')
    for rows in ([1], [-1], np.array([False, True])):
        part = select(records, rows)
        assert part.ids.tolist() == [7] and part.rows.tolist() == [0]  # of the file, which begins with it
        assert (*part.files, *part.heights, *part.widths) == ('b.jpg', 100, 200)
        for selected, all_of_it in zip(part.objects(0), records.objects(-1), strict=True):
            np.testing.assert_array_equal(selected, all_of_it)
            assert len(selected) == 2


def test_data_differ_where_an_object_is_of_another_image(tmp_path):
    content = coco_content()
    content['annotations'][0] |= {'bbox': [10, 10, 20, 20]}
    first = read(write_coco(tmp_path, content), 'val').digests
    content['annotations'][0] |= {'image_id': 3}  # still the first object, and its box is as before
    second = read(write_coco(tmp_path, content), 'val').digests
    assert {name for name in first if first[name] != second[name]} == {'boxes'}


def test_data_whose_categories_have_another_order_are_the_same(tmp_path):
    content = coco_content()
    first = read(write_coco(tmp_path, content), 'val').digests
    content['categories'].reverse()
    assert read(write_coco(tmp_path, content), 'val').digests == first


def same(a, b):
    for name in ('ids', 'files', 'heights', 'widths', 'boxes', 'labels', 'first', 'classes', 'dropped'):
        x, y = getattr(a, name), getattr(b, name)
        assert type(x) is type(y)
        np.testing.assert_equal(x, y)
        assert not isinstance(x, np.ndarray) or x.dtype == y.dtype


def test_an_index_gives_the_same_records_without_the_json(tmp_path):
    path = write_coco(tmp_path, coco_content()) / 'annotations' / 'instances_val.json'
    first = read(tmp_path, 'val', tmp_path / 'index')
    made = os.stat(tmp_path / 'index' / 'val.npz')
    for _ in range(2):
        same(read(tmp_path, 'val', tmp_path / 'index'), first)
        os.utime(path, (2, 2))  # copied elsewhere, say
    assert os.stat(tmp_path / 'index' / 'val.npz').st_ino == made.st_ino  # not made anew


@pytest.mark.parametrize(('name', 'moment'), [('cow', 0), ('cow', 1), ('cows', 0)])
def test_an_index_follows_the_json(name, moment, tmp_path):
    """Another content of the same size, as it may be at the same time, and another size."""
    path = write_coco(tmp_path, coco_content()) / 'annotations' / 'instances_val.json'
    os.utime(path, (0, 0))
    read(tmp_path, 'val', tmp_path / 'index')
    write_coco(tmp_path, json.loads(json.dumps(coco_content()).replace('dog', name)))
    os.utime(path, (moment, moment))
    assert read(tmp_path, 'val', tmp_path / 'index').classes == {2: 'cat', 5: name}


@pytest.mark.parametrize('key', ['version', 'data'])
def test_an_index_of_another_version_is_made_again(key, tmp_path):
    root, index = write_coco(tmp_path, coco_content()), tmp_path / 'index' / 'val.npz'
    first = read(root, 'val', tmp_path / 'index')
    with np.load(index) as stored:
        arrays, about = dict(stored), json.loads(stored['about'].item())
    about['stamp'][key] = 'other'
    np.savez(index, **arrays | {'labels': arrays['labels'] + 1, 'about': json.dumps(about)})
    same(read(root, 'val', tmp_path / 'index'), first)


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', None])
def test_a_damaged_index_is_made_again(content, tmp_path):
    root = write_coco(tmp_path, coco_content())
    first = read(root, 'val', tmp_path / 'index')
    index = tmp_path / 'index' / 'val.npz'
    index.write_bytes(index.read_bytes()[:-50] if content is None else content)
    same(read(root, 'val', tmp_path / 'index'), first)
    for word in (b'boxes', b'PK\x03\x04'):  # a bit in a name, and in the way an array is packed
        whole = index.read_bytes()
        at = whole.index(word) + (8 if word.startswith(b'PK') else 1)
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        same(read(root, 'val', tmp_path / 'index'), first)
    assert os.listdir(tmp_path / 'index') == ['val.npz']


@pytest.mark.parametrize('flip', [(b'}', 0, 8), (b'(1202, 4)', 2, 2)])  # else 1002: silently shorter
def test_a_bit_in_the_header_of_a_long_array_is_noticed(flip, tmp_path):
    content = coco_content()
    content['annotations'] += [dict(content['annotations'][0], id=10 + i) for i in range(1200)]
    root, index = write_coco(tmp_path, content), tmp_path / 'index' / 'val.npz'
    first = read(root, 'val', index.parent)
    whole, (word, after, bit) = bytearray(index.read_bytes()), flip
    whole[whole.index(word, whole.index(b'boxes.npy')) + after] ^= bit
    index.write_bytes(whole)
    same(read(root, 'val', index.parent), first)


def test_a_large_annotation_file_is_read_once_in_less_than_three_times_its_size(tmp_path):
    """20,000 images with 7 objects each, with outlines as COCO's: 57 MB of JSON."""
    outline = ','.join(['123.45'] * 40)
    with open(write_coco(tmp_path, coco_content()) / 'annotations' / 'instances_val.json', 'w') as file:
        image = '{"id":%d,"file_name":"%d.jpg","height":480,"width":640}'
        file.write('{"images":[' + ','.join(image % (i, i) for i in range(20_000)) + '],"annotations":[')
        for i in range(140_000):
            file.write(
                f'{"," if i else ""}{{"id":{i},"image_id":{i // 7},"category_id":{i % 80},'
                f'"bbox":[{i % 600},2.5,30.25,40],"iscrowd":0,"area":99.5,"segmentation":[[{outline}]]}}'
            )
        names = ','.join(f'{{"id":{i},"name":"c{i}"}}' for i in range(80))
        file.write(f'],"categories":[{names}]}}')
    for i in range(20_000):
        (tmp_path / 'val' / f'{i}.jpg').touch()
    script = (
        'import re, sys\n'
        'from yolos_jax.data import geometry, records\n'
        'from yolos_jax.data.batches import TrainBatches\n'
        'peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]\n'
        'before = peak()\n'
        'data = records.read(sys.argv[1], "val", sys.argv[2])\n'
        'assert len(data.boxes) == 140_000\n'
        'after = peak()\n'
        'recipe = geometry.Recipe((480, 800), 1333, (400, 500, 600), 384, 600)\n'
        'batches = TrainBatches(\n'
        '    data, recipe, lengths=[4200], batch_size=8, max_targets=100, seed=0)\n'
        'assert len(batches.plan(0).indices) == 2_500\n'
        'print(before, after)\n'
    )
    command = [sys.executable, '-c', script, tmp_path, tmp_path / 'index']
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    (before, first), (_, again) = (map(float, run.stdout.split()) for run in runs)
    size = (tmp_path / 'annotations' / 'instances_val.json').stat().st_size / 1024  # kB, as VmHWM
    assert first - before < 3 * size and again - before < 0.5 * size


def test_one_split_of_several_is_not_taken_for_the_whole(tmp_path):
    for split in ('train', 'valid'):
        (tmp_path / split).mkdir()
        (tmp_path / split / '_annotations.coco.json').touch()
    with pytest.raises(InputError, match=f'one split of a data set; name its parent, {tmp_path}'):
        sources.find(tmp_path / 'train', 'train')
    (tmp_path / 'train').rename(tmp_path / 'cars')  # another data set beside one
    assert sources.find(tmp_path / 'cars', 'train').split == '_annotations'
    (tmp_path / 'cars').rename(tmp_path / 'train')
    (tmp_path / 'valid' / '_annotations.coco.json').unlink()
    assert sources.find(tmp_path / 'train', 'train').split == '_annotations'  # the only one there is


def test_two_annotation_files_of_nearly_one_name_are_two_splits(tmp_path):
    for name in ('train.json', 'train.coco.json', 'val.coco.json'):
        (tmp_path / name).touch()
    expected = {'train': 'train.json', 'train.coco': 'train.coco.json', 'val.coco': 'val.coco.json'}
    assert sources.coco_files(folders.open_folder(tmp_path)) == expected
    (tmp_path / 'train.json').unlink()
    assert {*sources.coco_files(folders.open_folder(tmp_path))} == {'train', 'val'}


def test_a_file_that_is_replaced_while_it_is_read_leaves_no_index(tmp_path):
    source = sources.find(write_coco(tmp_path, coco_content()), 'val')

    def load():
        annotations = source.load()
        source.stamped.write_text(source.stamped.read_text().replace('dog', 'fox'))
        return annotations

    index = tmp_path / 'index' / 'val.npz'
    assert from_source(dataclasses.replace(source, load=load), index).classes == {2: 'cat', 5: 'dog'}
    assert from_source(source, index).classes == {2: 'cat', 5: 'fox'}
