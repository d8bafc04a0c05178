"""Data sets with Darknet's description, as CVAT exports them ("YOLO 1.1")."""

import numpy as np
import pytest
from helpers import annotated, to_yolo

from yolos_jax.data import records, sources
from yolos_jax.errors import InputError


@pytest.fixture
def darknet(coco, tmp_path):
    """obj.data, obj.names, a list of each split, and labels beside the images, in a folder named images."""
    to_yolo(coco, tmp_path / 'yolo')
    root = tmp_path / 'export'
    for split, name in (('train', 'train'), ('valid', 'val')):
        folder = root / f'obj_{split}_data' / 'images'
        folder.parent.mkdir(parents=True)
        (tmp_path / 'yolo' / 'images' / name).rename(folder)
        for labels in (tmp_path / 'yolo' / 'labels' / name).iterdir():
            labels.rename(folder / labels.name)
        images = [f'data/{image.relative_to(root)}\n' for image in sorted(folder.glob('*.jpg'))]
        (root / f'{split}.txt').write_text(''.join(images))
    names = [category['name'] for category in annotated(coco, 'train2017')['categories']]
    (root / 'obj.names').write_text('\n'.join(names) + '\n')
    (root / 'obj.data').write_text(
        f'classes = {len(names)}\ntrain = data/train.txt\nvalid = data/valid.txt\n'
        'names = data/obj.names\nbackup = backup/\n'
    )
    return root


@pytest.mark.parametrize('inside', ['.', 'data'], ids=['as exported', 'where Darknet has it'])
def test_a_data_set_of_darknet_is_read_as_the_same_one_of_coco(inside, darknet, coco, tmp_path):
    root = tmp_path / 'root' / inside
    root.parent.mkdir(parents=True, exist_ok=True)
    darknet.rename(root)
    for split, name in (('train', 'train2017'), ('val', 'val2017')):
        data, expected = records.read(root, split), records.read(coco, name)
        assert list(data.classes.values()) == list(expected.classes.values())
        np.testing.assert_array_equal(data.labels, expected.labels - 1)
        np.testing.assert_allclose(data.boxes, expected.boxes, atol=1e-3)
    assert sources.splits(root) == ['train', 'val']


def test_a_missing_file_of_class_names_is_named(darknet):
    (darknet / 'obj.names').unlink()
    with pytest.raises(InputError, match=r'obj\.names: no list of class names in UTF-8 .*No such file'):
        records.read(darknet, 'train')


def test_names_that_are_not_as_many_as_counted_are_an_error(darknet):
    (darknet / 'obj.names').write_text('cup\n\nplate\n\n')  # an empty line counts: it has a number too
    with pytest.raises(InputError, match=r'obj\.data: nc is \d, but it names 3 classes'):
        file = darknet / 'obj.data'
        file.write_text(file.read_text().replace('classes = 3', 'classes = 2'))
        records.read(darknet, 'train')


def test_another_file_of_this_suffix_describes_no_data_set(coco):
    for name, content in (('x.data', b'epochs = 3\n'), ('y.data', b'\xff\xfe')):
        (coco / name).write_bytes(content)
    assert len(records.read(coco, 'val2017')) == 15
