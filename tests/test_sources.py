import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from helpers import TINY, annotated, coco_content, tiny_config, to_yolo
from PIL import Image

from yolos_jax import class_matching, evaluation
from yolos_jax.data import annotations, loader, overlap, records, sources
from yolos_jax.data.batches import EvalBatches, start_image
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import detection_data
from yolos_jax.weights import Pretrained

SPLITS = {'train2017': 30, 'val2017': 15}


def roboflow(coco, root):
    for split, name in (('train2017', 'train'), ('val2017', 'valid')):
        shutil.copytree(coco / split, root / name)
        (root / name / '_annotations.coco.json').write_text(json.dumps(annotated(coco, split)))


def cvat(coco, root):
    (root / 'annotations').mkdir(parents=True)
    for split, name in (('train2017', 'train'), ('val2017', 'validation')):
        shutil.copytree(coco / split, root / 'images' / name)
        part = annotated(coco, split)
        part['annotations'] = [
            a | {'id': float(a['id']), 'iscrowd': a['iscrowd'] or None} for a in part['annotations']
        ]
        text = '\ufeff' + json.dumps(part)
        (root / 'annotations' / f'instances_{name}.json').write_text(text, encoding='utf-8')


def label_studio(coco, root):
    """Numbered from 0, with backslashes, and the splits apart, since it knows none."""
    for split, name in (('train2017', 'train'), ('val2017', 'val')):
        part = annotated(coco, split)
        for image in part['images']:
            new = f'{split}-{image["file_name"]}'
            (root / 'images').mkdir(parents=True, exist_ok=True)
            shutil.copy(coco / split / image['file_name'], root / 'images' / new)
            image['file_name'] = f'images\\{new}'
        for i, annotation in enumerate(part['annotations']):
            annotation['id'] = str(i)
            del annotation['area']
        (root / f'{name}.json').write_text(json.dumps(part))


def fiftyone(coco, root):
    for split, name in (('train2017', 'train'), ('val2017', 'validation')):
        shutil.copytree(coco / split, root / name / 'data')
        (root / name / 'labels.json').write_text(json.dumps(annotated(coco, split)))


def from_a_mac(coco, root):
    """On a disk of another file system, where macOS adds a hidden file to each file."""
    label_studio(coco, root)
    for file in [*root.rglob('*.j*')]:
        file.with_name(f'._{file.name}').write_bytes(b'\0\5\x16\7')


@pytest.mark.parametrize('place', ['model', '.cache'])
def test_a_labels_json_without_images_is_no_data_set(place, coco, tmp_path):
    label_studio(coco, tmp_path)
    (tmp_path / place).mkdir()
    (tmp_path / place / 'labels.json').write_text('["circle", "square"]')
    assert sources.splits(tmp_path) == ['train', 'val']


def test_a_folder_with_fiftyones_only_split_is_read(coco, tmp_path):
    fiftyone(coco, tmp_path)
    only, one_of_two = records.read(tmp_path / 'train', 'labels'), records.read(tmp_path, 'train')
    assert only.start_read(0)() == one_of_two.start_read(0)()


def test_hidden_files_are_no_splits(coco, tmp_path):
    from_a_mac(coco, tmp_path)
    assert sources.splits(tmp_path) == ['train', 'val']


def objects(data):
    """{content of the image: its objects' names and boxes}."""
    result = {}
    for i in range(len(data)):
        boxes, labels = data.objects(i)
        names = [data.classes[label] for label in labels.tolist()]
        order = sorted(range(len(boxes)), key=lambda k: (names[k], *boxes[k].round(1).tolist()))
        result[data.start_read(i)()] = [names[k] for k in order], boxes[order]
    return result


def scored(data):
    """The AP of detections that are the objects of every other image, moved by a tenth of their size."""
    detector = class_matching.match(detector_of(data.classes), data)[0]
    results = []
    for i in np.argsort([data.start_read(i)() for i in range(len(data))]):
        boxes, labels = data.objects(i)
        size = np.tile([data.widths[i], data.heights[i]], 2)
        moved = boxes + 0.1 * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        detections = {'scores': np.linspace(0.9, 0.5, len(boxes)), 'labels': labels, 'boxes': moved / size}
        results += evaluation.to_coco(data.ids[i], detections, (data.heights[i], data.widths[i]), detector)
    return evaluation.score(data.truth(), results)


def detector_of(classes):
    return Pretrained(Yolos(**TINY, num_classes=max(classes) + 1), {}, classes, 64, 96)


@pytest.mark.parametrize(
    'export', [roboflow, cvat, label_studio, fiftyone, from_a_mac, to_yolo], ids=lambda f: f.__name__
)
@pytest.mark.parametrize('split', SPLITS)
def test_every_layout_gives_the_same_records_and_ap(export, split, coco, tmp_path):
    export(coco, tmp_path)
    expected, actual = records.read(coco, split), records.read(tmp_path, split)
    ours, theirs = objects(expected), objects(actual)
    assert ours.keys() == theirs.keys() and len(ours) == SPLITS[split]
    for image, (names, boxes) in ours.items():
        assert theirs[image][0] == names
        np.testing.assert_allclose(theirs[image][1], boxes, atol=0.01)
    numbers, classes = scored(actual)
    expected_numbers, expected_classes = scored(expected)
    assert numbers == pytest.approx(expected_numbers, abs=1e-12) and 0 < numbers['AP'] < 1
    assert classes == pytest.approx(expected_classes, abs=1e-12)


@pytest.mark.parametrize('export', [roboflow, cvat, label_studio, to_yolo], ids=lambda f: f.__name__)
def test_the_validation_images_of_a_run_can_be_evaluated_again(export, coco, tmp_path):
    export(coco, tmp_path / 'data')
    config = tiny_config(data=tmp_path / 'data', train_split='train', val_fraction=0.2)
    train, val = detection_data.read(config, tmp_path / 'run', resumes=False)
    assert 'the part of train to validate on: only' in ' '.join(detection_data.notes(train, val))
    detection_data.write_truth(config, val, tmp_path / 'run')
    again = records.from_source(sources.of_files(tmp_path / 'run' / 'val.json', tmp_path / 'data'))
    assert again.ids.tolist() == val.ids.tolist()
    for i in range(len(val)):
        np.testing.assert_array_equal(start_image(again, i)(), start_image(val, i)())


def test_deviations_from_the_coco_format_are_noted(coco, tmp_path):
    cvat(coco, tmp_path / 'cvat')
    notes = ' '.join(records.read(tmp_path / 'cvat', 'val').notes)
    assert 'byte order mark' in notes and 'written as text or with a point' in notes
    label_studio(coco, tmp_path / 'ls')
    assert 'backslashes' in ' '.join(records.read(tmp_path / 'ls', 'val').notes)
    assert records.read(coco, 'val2017').notes == []


def test_a_missing_split_is_an_error_that_lists_the_existing_splits(coco, tmp_path):
    for export in (roboflow, to_yolo):
        export(coco, tmp_path / export.__name__)
        with pytest.raises(InputError, match=r'no split test; it has train, val') as error:
            records.read(tmp_path / export.__name__, 'test')
        assert error.value.argument == 'split'


def test_the_single_split_of_an_export_is_the_one_to_train_on(coco, tmp_path):
    label_studio(coco, tmp_path)
    (tmp_path / 'val.json').unlink()
    (tmp_path / 'train.json').rename(tmp_path / 'result.json')
    config = tiny_config(data=tmp_path, val_fraction=0.2)
    train, val = detection_data.read(config, tmp_path / 'run', resumes=False)
    detection_data.write_truth(config, val, tmp_path / 'run')
    assert (len(train), len(val)) == (24, 6)
    written = annotations.read(tmp_path / 'run' / 'val.json')
    assert written.ids.tolist() == val.ids.tolist()
    np.testing.assert_allclose(written.boxes, val.truth().boxes)
    with pytest.raises(InputError, match='no split val2017; it has result; a part') as error:
        detection_data.read(tiny_config(data=tmp_path), tmp_path / 'run', resumes=False)
    assert error.value.argument == 'val_fraction'
    with pytest.raises(InputError, match='no split vla; it has result') as error:
        detection_data.read(tiny_config(data=tmp_path, val_split='vla'), tmp_path / 'run', resumes=False)
    assert error.value.argument == 'val_split'
    moved = tiny_config(data=tmp_path, train_json=str(tmp_path / 'result.json'), train_images=str(coco))
    with pytest.raises(InputError, match='the images it names') as error:
        detection_data.read(moved, tmp_path / 'run', resumes=False)
    assert error.value.argument == 'train_images'
    config = tiny_config(data=coco)
    detection_data.write_truth(
        config, detection_data.read(config, tmp_path / 'other', resumes=False)[1], tmp_path / 'other'
    )
    assert not (tmp_path / 'other' / 'val.json').exists()  # its own file describes it


def test_a_part_of_the_images_can_validate(coco):
    whole = records.read(coco, 'train2017')
    train, val = records.split_by_fraction(whole, 0.2, seed=0)
    assert len(val) == 6 and len(train) == 24 and not set(train.ids) & set(val.ids)
    for part in (train, val):
        for i in range(len(part)):
            j = int(np.flatnonzero(whole.ids == part.ids[i])[0])
            for x, y in zip(part.objects(i), whole.objects(j), strict=True):
                np.testing.assert_array_equal(x, y)
            assert part.start_read(i)() == whole.start_read(j)()
    assert set(val.truth().ids) == set(val.ids) and set(val.truth().owners) <= set(val.ids)
    again, other = (records.split_by_fraction(whole, 0.2, seed)[1] for seed in (0, 1))
    np.testing.assert_array_equal(again.ids, val.ids)
    assert other.ids.tolist() != val.ids.tolist()
    with pytest.raises(InputError, match='has only one image; no part can be taken'):
        records.split_by_fraction(records.select(whole, np.array([0])), 0.2, seed=0)


@pytest.mark.parametrize(
    'name',
    [
        'street{}_jpg.rf.{}a{}.jpg',
        'cat{}_png.rf.{}b{}.jpg',
        'cat{} ({}).png',
        'cat{} - Copy ({}).png',
        'photo{}_aug{}.jpg',
        'film{}_{:06d}.png',
        'film{}/frame_{:06d}.png',
    ],
)
def test_images_of_nearly_one_name_stay_together(name, coco):
    whole = records.select(records.read(coco, 'train2017'), np.arange(30))
    files = [name.format(i // 3, i, i) for i in range(30)]
    train, val = records.split_by_fraction(_renamed(whole, files), 0.3, seed=0)
    groups = [{re.match(r'\D+\d+', file)[0] for file in part.files.tolist()} for part in (train, val)]
    assert not groups[0] & groups[1] and len(val) == 9


def test_long_films_are_parted_by_frames_in_a_row(coco):
    whole = records.read(coco, 'train2017')
    whole = records.select(whole, np.arange(1000) % len(whole))
    files = [f'film{i // 200}/frame_{i % 200}.jpg' for i in range(1000)]
    parts = records.split_by_fraction(_renamed(whole, files), 0.1, seed=0)
    train, val = (set(part.files.tolist()) for part in parts)
    beside = lambda file: re.sub(r'\d+(?=\.jpg)', lambda x: str(int(x[0]) + 1), file)
    assert len(val) == 100 and sum(beside(file) in train for file in val) <= 2


def test_images_numbered_by_their_class_are_no_frames(coco):
    whole = records.read(coco, 'train2017')
    single = np.flatnonzero(np.diff(whole.first) == 1)
    whole = records.select(whole, single[np.arange(300) % len(single)])
    files = [f'{whole.classes[label]}_{i}.jpg' for i, label in enumerate(whole.labels.tolist())]
    train, val = records.split_by_fraction(_renamed(whole, files), 0.7, seed=0)
    assert set(train.labels.tolist()) == set(val.labels.tolist()) == {1, 2, 3}


def test_any_number_of_versions_that_roboflow_made_stay_together(coco):
    whole = records.select(records.read(coco, 'train2017'), np.arange(30))
    files = [f'{"ab"[i // 15]}_jpg.rf.{i:032x}.jpg' for i in range(30)]
    _, val = records.split_by_fraction(_renamed(whole, files), 0.1, seed=0)
    assert len(val) == 15


def _renamed(data, files):
    return dataclasses.replace(data, files=np.array(files))


def test_numbered_photographs_of_one_camera_are_no_series(coco):
    whole = records.read(coco, 'train2017')
    for name in ('IMG_{:04d}.JPG', 'photo ({}).jpg', 'carrot_{}.jpg', 'parrot{}.jpg', 'scan_copy{}.jpg'):
        files = [name.format(i) for i in range(len(whole))]
        _, val = records.split_by_fraction(_renamed(whole, files), 0.1, seed=0)
        assert len(val) == round(len(whole) * 0.1)


def test_large_category_ids_are_numbered_in_their_order(tmp_path):
    data = coco_content()
    for where in ('annotations', 'categories'):
        for x in data[where]:
            key = 'category_id' if where == 'annotations' else 'id'
            x[key] = {2: 700_000_123, 5: 41}[x[key]]
    _write(tmp_path, data)
    r = records.read(tmp_path, 'val')
    assert r.classes == {0: 'dog', 1: 'cat'} and r.category_ids == {0: 41, 1: 700_000_123}
    assert r.labels.tolist() == [1, 0] and 'numbered in their order' in ' '.join(r.notes)
    ids, _ = class_matching.match(detector_of(r.classes), r)
    assert ids == r.category_ids


def _write(root, data, image=True):
    (root / 'annotations').mkdir()
    (root / 'val').mkdir()
    (root / 'annotations' / 'instances_val.json').write_text(json.dumps(data))
    for x in data['images']:
        Image.new('RGB', (x['width'], x['height'])).save(root / 'val' / x['file_name'])


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'bbox': [0.1, 0.2, 0.3, 0.4]}, 'all within 0..1 .are they normalised'),
        ({'bbox': [150, 50, 180, 90]}, 'cut; are they x, y, x, y'),
    ],
)
def test_boxes_of_another_form_are_noted(change, says, tmp_path):
    data = coco_content()
    data['annotations'] = [
        {'id': i, 'image_id': 7, 'category_id': 2, 'bbox': [1, 2, 3, 4]} | change for i in range(10)
    ]
    _write(tmp_path, data)
    assert re.search(says, ' '.join(records.read(tmp_path, 'val').notes))


def test_duplicate_names_are_noted(tmp_path):
    data = coco_content()
    data['images'].append(data['images'][0] | {'id': 99})
    data['categories'].append({'id': 9, 'name': 'Cat'})
    _write(tmp_path, data)
    notes = ' '.join(records.read(tmp_path, 'val').notes)
    assert 'categories with the same name: cat' in notes and 'image files under two ids: b.jpg' in notes


def test_images_in_both_splits_are_found_by_their_bytes(coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'coco')
    same = tmp_path / 'coco' / 'val2017' / '000000000003.jpg'
    shutil.copy(tmp_path / 'coco' / 'train2017' / '000000000009.jpg', same)
    train, val = (records.read(tmp_path / 'coco', split) for split in SPLITS)
    ((ours, theirs),) = overlap.in_both(train, val)
    assert ours.endswith('train2017/000000000009.jpg') and theirs == str(same)
    assert '1 images are in both splits' in ' '.join(overlap.notes(train, val))
    clean = [records.read(coco, split) for split in SPLITS]
    assert overlap.in_both(*clean) == []
    long = bytearray(9000)  # of equal ends
    same.write_bytes(long)
    long[4500] = 1
    (tmp_path / 'coco' / 'train2017' / '000000000009.jpg').write_bytes(long)
    assert overlap.in_both(train, val) == []


def test_unreadable_images_are_in_no_other_split(coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'coco')
    train = tmp_path / 'coco' / 'train2017' / '000000000009.jpg'
    val = tmp_path / 'coco' / 'val2017' / '000000000003.jpg'
    train.unlink()
    train.symlink_to('/proc/self/mem')  # opens, has no bytes, and reading fails
    val.write_bytes(b'')
    assert overlap.in_both(*(records.read(tmp_path / 'coco', split) for split in SPLITS)) == []


def test_a_file_name_that_is_too_long_is_one_that_does_not_exist(tmp_path):
    data = coco_content()
    _write(tmp_path, data)
    data['images'][0]['file_name'] = 900 * 'x' + '.jpg'
    (tmp_path / 'annotations' / 'instances_val.json').write_text(json.dumps(data))
    with pytest.raises(InputError, match=r'do not exist, the first is x+\.jpg'):
        records.read(tmp_path, 'val')
    with pytest.raises(InputError, match='no such data folder'):
        records.read(tmp_path / (900 * 'x'), 'val')


def test_classes_of_one_split_only_are_noted(coco):
    train, val = (records.read(coco, split) for split in SPLITS)
    without = records.select(val, np.array([0]))
    shown = {val.classes[label] for label in without.labels.tolist()}
    assert len(shown) < 3
    (note,) = overlap.notes(train, without)
    assert f'{3 - len(shown)} classes have objects to train on but none to evaluate' in note
    (note,) = overlap.notes(without, train)
    assert f'{3 - len(shown)} classes have objects to evaluate but none to train on' in note
    capital = {label: name.upper() for label, name in val.classes.items()}
    assert not overlap.notes(train, dataclasses.replace(val, classes=capital))


def test_a_json_file_and_a_folder_of_images_are_enough(coco):
    file = coco / 'annotations' / 'instances_val2017.json'
    data = records.from_source(sources.of_files(file, coco / 'val2017'))
    assert (
        len(data) == 15
        and len(list(loader.load(EvalBatches(data, size=64, max_size=96, batch_size=5), range(3)))) == 3
    )
    with pytest.raises(InputError, match='train9: no such data folder'):
        sources.of_files(file, coco / 'train9')
    with pytest.raises(InputError, match='are not in .*annotations'):
        records.from_source(sources.of_files(file, coco / 'annotations'))
    with pytest.raises(InputError, match='no.json: no such annotation file'):
        sources.of_files(coco / 'no.json')


def test_splits_that_cvat_writes_with_a_capital_are_known(coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'data')
    annotated = tmp_path / 'data' / 'annotations'
    (tmp_path / 'data' / 'images').mkdir()
    for split, name in ('train2017', 'Train'), ('val2017', 'Validation'):
        (annotated / f'instances_{split}.json').rename(annotated / f'instances_{name}.json')
        shutil.move(tmp_path / 'data' / split, tmp_path / 'data' / 'images' / name)
    for split in ('train2017', 'val2017'):
        np.testing.assert_array_equal(
            records.read(tmp_path / 'data', split).ids, records.read(coco, split).ids
        )


def test_images_that_would_be_one_file_are_refused(tmp_path):
    data = coco_content()
    _write(tmp_path, data)
    for image, folder in zip(data['images'], ('cam1', 'cam2'), strict=True):
        image['file_name'] = f'{folder}/a.jpg'
    (tmp_path / 'annotations' / 'instances_val.json').write_text(json.dumps(data))
    with pytest.raises(InputError, match='several images that would be .*val/a.jpg'):
        records.read(tmp_path, 'val')
