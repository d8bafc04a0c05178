import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from yolos_jax.data import annotations, array_records, coco_classes, geometry, loader, records
from yolos_jax.data.batches import EvalBatches, TrainBatches, start_image
from yolos_jax.data.folders import Folder
from yolos_jax.errors import InputError
from yolos_jax.tools import build_tfds, tfds_builder


@pytest.fixture(scope='module')
def data_set(coco_folder, tmp_path_factory):
    return build_tfds.build(coco_folder, tmp_path_factory.mktemp('tfds'))


@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_both_sources_give_equal_records_and_batches(split, coco_folder, data_set):
    folder, tfds = (records.read(root, split) for root in (coco_folder, data_set))
    for name in ('ids', 'files', 'heights', 'widths', 'boxes', 'labels', 'first', 'classes', 'dropped'):
        np.testing.assert_equal(getattr(tfds, name), getattr(folder, name))
    recipe = geometry.Recipe((96, 112), 176, crop_from=(96, 112, 128), crop_min=80, crop_max=128)
    options = dict(lengths=(51, 83), batch_size=5, max_targets=6, seed=0)
    batches = [TrainBatches(r, recipe, **options) for r in (folder, tfds)]
    for (_, a, _), (_, b, _) in zip(*(loader.load(x, range(4)) for x in batches), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_boxes_of_two_decimals_come_back_exactly(data_set):
    """float32 over the image's size and back, for boxes and sizes like COCO's."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(200, 641, 2)
        corner = rng.uniform(0, [width - 3, height - 3], (20, 2)).round(2)
        size = rng.uniform(1, [width, height] - corner, (20, 2)).round(2)
        boxes = np.concatenate([corner, size], axis=1).astype(np.float32)
        a = annotations.Annotations(
            None,
            None,
            None,
            None,
            None,
            np.arange(20),
            None,
            np.full(20, 7),
            np.zeros(20, bool),
            None,
            boxes,
            [],
        )
        objects = [tfds_builder._object(a, k, {7: 0}, height, width) for k in range(20)]
        stored = {
            'id': [o['id'] for o in objects],
            'label': [o['label'] for o in objects],
            'is_crowd': [o['is_crowd'] for o in objects],
            'area': [o['area'] for o in objects],
            'bbox': np.array([o['bbox'] for o in objects], np.float32),
        }
        image = io.BytesIO()
        Image.new('1', (int(width), int(height))).save(image, 'PNG')
        example = {'image': image.getvalue(), 'image/filename': b'x', 'image/id': 1, 'objects': stored}
        np.testing.assert_array_equal(array_records._row('', example)[-1].astype(np.float32), boxes)


@pytest.mark.parametrize('box', [(8, 23, -5, 64), (8, 23, 5, -64)])
def test_a_box_of_negative_width_is_stored_without_an_area(box, coco_folder, tmp_path):
    """As training takes it: it is dropped and counted."""
    data = shutil.copytree(coco_folder, tmp_path / 'data')
    path = data / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'] = box
    path.write_text(json.dumps(content))
    build_tfds.build(data, tmp_path / 'out')
    expected = records.read(data, 'val2017')
    stored = records.read(tmp_path / 'out' / 'coco' / '2017' / '1.1.0', 'val2017')
    assert stored.dropped == expected.dropped and len(stored.boxes) == len(expected.boxes)


def test_tensorflow_is_not_imported(data_set):
    script = (
        'import sys\nfrom yolos_jax.data import records\n'
        'data = records.read(sys.argv[1], "val2017")\nassert len(data.start_read(0)()) > 100\n'
        'assert "tensorflow" not in sys.modules and "tensorflow_datasets" in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', script, data_set], check=True)


def test_an_index_spares_reading_the_data_set(data_set, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(data_set, copy)
    first = records.read(copy, 'val2017', tmp_path / 'index')
    for path in copy.glob('*.array_record*'):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = records.read(copy, 'val2017', tmp_path / 'index')
    np.testing.assert_array_equal(again.boxes, first.boxes)


def test_corrected_labels_are_read_though_an_index_is_there(data_set, coco_folder, tmp_path):
    copy, corrected = tmp_path / 'copy', tmp_path / 'corrected'
    shutil.copytree(data_set, copy)
    records.read(copy, 'val2017', tmp_path / 'index')
    shutil.copytree(coco_folder, corrected)
    file = corrected / 'annotations' / 'instances_val2017.json'
    content = json.loads(file.read_text())
    for annotation in content['annotations']:
        annotation['category_id'] = content['categories'][0]['id']
    file.write_text(json.dumps(content))
    shutil.copytree(build_tfds.build(corrected, tmp_path / 'anew'), copy, dirs_exist_ok=True)
    again = records.read(copy, 'val2017', tmp_path / 'index')
    assert set(again.labels.tolist()) == {content['categories'][0]['id']}
    names = copy / array_records.CATEGORIES
    names.write_text(names.read_text().replace('circle', 'disc'))
    assert records.read(copy, 'val2017', tmp_path / 'index').classes[1] == 'disc'


def test_a_data_set_without_our_category_file_must_have_the_classes_of_coco(data_set, tmp_path):
    names = list(coco_classes.COCO.values())
    assert array_records._categories(Folder(tmp_path), names)[-1] == (90, 'toothbrush')
    with pytest.raises(InputError, match='not those of COCO'):
        array_records._categories(Folder(tmp_path), names[:5])


@pytest.mark.parametrize('change', [lambda data: b'', lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json', 'categories.json', '-train.'])
def test_a_damaged_file_of_a_data_set_is_named(name, change, data_set, tmp_path):
    shutil.copytree(data_set, tmp_path / 'copy')
    (damaged,) = (tmp_path / 'copy').glob(f'*{name}*')
    damaged.write_bytes(change(damaged.read_bytes()))
    with pytest.raises(InputError, match=f'{name}.*damaged or incomplete .*; copy it again'):
        records.read(tmp_path / 'copy', 'train2017')


def test_an_unknown_split_is_named_with_those_there_are(data_set):
    with pytest.raises(InputError, match='no split test; it has train2017, val2017'):
        records.read(data_set, 'test')


def test_a_split_may_be_stored_under_the_name_that_coco_gives_it(data_set, tmp_path):
    folder = shutil.copytree(data_set, tmp_path / 'copy')
    for file in folder.glob('*-train.array_record*'):
        file.rename(folder / file.name.replace('-train.', '-train2017.'))
    info = folder / 'dataset_info.json'
    info.write_text(info.read_text().replace('"train"', '"train2017"'))
    first, second = (records.read(path, 'train2017') for path in (data_set, folder))
    np.testing.assert_array_equal(first.boxes, second.boxes)
    assert first.start_read(0)() == second.start_read(0)()


def test_evaluation_asks_for_the_official_file(data_set):
    data = records.read(data_set, 'val2017')
    truth = data.source.truth
    moved = truth.rename(truth.with_suffix('.away'))
    try:
        for of_split in (data, records.read(data_set, 'val2017')):
            with pytest.raises(InputError, match='instances_val2017.json: no such file'):
                EvalBatches(of_split, size=112, max_size=176, batch_size=4)
    finally:
        moved.rename(truth)


def test_splits_of_other_categories_are_refused(coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / 'data')
    path = tmp_path / 'data' / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'][0]['name'] = 'disc'
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match='categories of train2017 and val2017 are not the same'):
        build_tfds.build(tmp_path / 'data', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_the_command_builds_a_data_set(coco_folder, tmp_path):
    command = [sys.executable, '-m', 'yolos_jax.tools.build_tfds', coco_folder, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(records.read(tmp_path / 'coco' / '2017' / '1.1.0', 'val2017')) == 10


def test_a_split_called_validation_is_packed_and_evaluated(coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / 'data')
    annotations = tmp_path / 'data' / 'annotations'
    (annotations / 'instances_val2017.json').rename(annotations / 'instances_validation.json')
    (tmp_path / 'data' / 'val2017').rename(tmp_path / 'data' / 'validation')
    folder = build_tfds.build(tmp_path / 'data', tmp_path / 'out')
    part = records.read(folder, 'val2017')
    assert len(part) == 10 and part.source.truth.exists()


@pytest.mark.parametrize('orientation', [1, 3, 6])
def test_photographs_annotated_upright_are_stored_upright(orientation, tmp_path):
    """YOLO's are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ('train', 'val'):
        image, labels = (tmp_path / 'yolo' / kind / split for kind in ('images', 'labels'))
        for folder in (image, labels):
            folder.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(image / 'x.jpg', exif=exif)
        (labels / 'x.txt').write_text('0 .25 .5 .25 .5\n')
    (tmp_path / 'yolo' / 'data.yaml').write_text('names: [thing]\ntrain: images/train\nval: images/val\n')
    folder, stored = tmp_path / 'yolo', build_tfds.build(tmp_path / 'yolo', tmp_path)
    yolo, tfds = (records.read(root, 'train') for root in (folder, stored))
    np.testing.assert_array_equal(tfds.boxes, yolo.boxes)
    images = [start_image(data, 0)()[..., :3] for data in (yolo, tfds)]
    np.testing.assert_array_equal(*images)


def test_a_data_set_with_a_bad_image_is_built_whole_and_read(coco_folder, tmp_path):
    source = shutil.copytree(coco_folder, tmp_path / 'data')
    (source / 'val2017' / '000000000003.jpg').write_bytes(b'<html>')
    folder = build_tfds.build(source, tmp_path / 'out')
    assert len(records.read(folder, 'val2017')) == len(records.read(source, 'val2017'))
    assert [path.name for path in folder.parent.iterdir()] == ['1.1.0']


def test_a_data_set_is_not_built_over_another(data_set, coco_folder):
    with pytest.raises(InputError, match=f'{data_set}: has a data set already'):
        build_tfds.build(coco_folder, data_set.parent.parent.parent)


OTHER = 'handler_of_data.FeaturesDict'
LEGACY = json.dumps({'feature': {'type': OTHER, 'content': {}}})


@pytest.mark.parametrize(
    'features',
    [
        {'pythonClassName': OTHER},
        {'python_class_name': OTHER},
        {'type': OTHER, 'content': {}},
        {'pythonClassName': f'{array_records.FEATURES}sequence_feature.Sequence', 'json': {'json': LEGACY}},
    ],
    ids=['as written now', 'as protobuf takes it too', 'of earlier versions', 'in a string'],
)
def test_a_data_set_does_not_name_a_module_to_import(features, data_set, tmp_path, monkeypatch):
    root = shutil.copytree(data_set, tmp_path / 'copy')
    (tmp_path / 'handler_of_data.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'handler_of_data', raising=False)
    (root / 'features.json').write_text(json.dumps(features))
    with pytest.raises(InputError, match=r"features.json: 'handler_of_data.FeaturesDict' is no feature of"):
        records.read(root, 'val2017')
    assert 'handler_of_data' not in sys.modules
