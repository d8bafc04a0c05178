import json
import re
import shutil

import pytest
from helpers import ROOT, to_yolo
from PIL import Image
from yolos_jax.configs import finetune, yolos_dinov2_s

from yolos_jax.data import annotations
from yolos_jax.errors import InputError, StorageError
from yolos_jax.tools import build_tfds, check_data


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


def run(capsys, *args):
    """The exit status and what was printed."""
    try:
        check_data.main([*map(str, args)])
    except SystemExit as end:
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_every_fault_is_reported_with_its_file(faulty, tmp_path, capsys):
    config = ROOT / 'configs' / 'quickstart.py'
    code, printed = run(capsys, faulty, '--html', tmp_path / 'report.html', '--config', config)
    assert code == 1
    train, val = printed.split('== val2017 ==')
    assert 'STOPS' not in train and 'note' not in train
    for line in (
        r'STOPS A RUN: 1 images missing: .*000000000002.jpg',
        r'note: 1 images unreadable: .*000000000001.jpg: not a readable image',
        r'note: 1 images of another size than annotated: .*000000000003.jpg is 50 x 50, annotated',
        r'note: 1 images turned by EXIF, used as stored: their sizes do not say .*000000000004.jpg',
        r'note: 1 images turned by EXIF, annotated and used upright: .*000000000005.jpg',
        r'note: 1 boxes without an area in their image \(not trained on\): annotation id 900',
        r'note: 1 boxes that leave the image by more than a pixel \(cut\): annotation id 901',
        r'note: 1 images with more than \d+ objects, of which the largest are targets: 000000000007.jpg',
        r'without an area, left out +1\b',
    ):
        assert re.search(line, val), line
    page = (tmp_path / 'report.html').read_text()
    pictures = len(re.findall('<img [^>]*src="data:image/jpeg;base64,', page))
    assert pictures > 16, pictures
    assert 'Boxes that leave the image' in page and 'A batch as the model sees it' in page


def test_annotations_that_stop_a_run_are_all_listed(coco_folder, tmp_path, capsys):
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][1]['category_id'] = 50
    content['annotations'][2]['id'] = content['annotations'][3]['id']
    path.write_text(json.dumps(content))
    code, printed = run(capsys, root, '--split', 'val2017')
    assert code == 1 and printed.count('STOPS A RUN') == 2


def test_images_in_both_splits_are_reported(coco_folder, tmp_path, capsys):
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    shutil.copy(root / 'train2017' / '000000000009.jpg', root / 'val2017' / '000000000003.jpg')
    _, printed = run(capsys, root, '--config=quickstart', f'--html={tmp_path / "page.html"}')
    assert 'note: 1 images are in both splits' in printed
    assert '<p class="">Note: 1 images are in both splits' in (tmp_path / 'page.html').read_text()
    for name, of_cvat in (('train2017', 'Train'), ('val2017', 'Validation')):
        (root / name).rename(root / of_cvat)
        folder = root / 'annotations'
        (folder / f'instances_{name}.json').rename(folder / f'instances_{of_cvat}.json')
    assert 'note: 1 images are in both splits' in run(capsys, root, '--config=quickstart')[1]


def test_counts_are_those_of_the_annotations(coco_folder):
    findings = check_data.examine(coco_folder, 'train2017', batch_size=4)
    content = json.loads((coco_folder / 'annotations' / 'instances_train2017.json').read_text())
    objects = [a for a in content['annotations'] if not a['iscrowd']]
    shown = dict(row for _, rows in findings.tables for row in rows)
    assert shown['in all'] == '24' and shown['to train on'] == str(len(objects))
    for number, name in ((1, 'circle'), (2, 'square'), (3, 'triangle')):
        image_ids = [a['image_id'] for a in objects if a['category_id'] == number]
        assert shown[f'{number} {name}'] == f'{len(image_ids)} in {len(set(image_ids))} images'
    assert findings.problems == []


def test_a_data_set_of_tfds_is_checked_too(coco_folder, tmp_path, capsys):
    code, printed = run(capsys, build_tfds.build(coco_folder, tmp_path))
    assert code == 0 and '== train2017 ==' in printed and '== val2017 ==' in printed


def test_a_folder_that_is_no_data_set_is_named(tmp_path, capsys):
    with pytest.raises(InputError, match=f'{tmp_path}: not a known data set: no annotations/') as error:
        run(capsys, tmp_path)
    assert error.value.argument is None  # the command has no such flag


@pytest.mark.parametrize(
    ('config', 'says'),
    [
        ([], 'STOPS A RUN: not one object is annotated'),
        (['--config=quickstart'], 'STOPS A RUN: 3 images are less than one batch of 8'),
        ([], 'note: 3 images are less than one batch of 8 (--config.batch_size)'),
        ([], 'has no split val2017; it has train); --config.val_fraction=0.1'),
        (['--split', 'train'], 'STOPS A RUN: not one object'),
    ],
)
def test_too_little_data_to_train_on_is_reported(config, says, tmp_path, capsys):
    images = [{'id': i, 'file_name': f'{i}.jpg', 'width': 40, 'height': 30} for i in range(3)]
    content = {'images': images, 'annotations': [], 'categories': [{'id': 1, 'name': 'cup'}]}
    (tmp_path / 'train.json').write_text(json.dumps(content))
    for i in range(3):
        Image.new('RGB', (40, 30)).save(tmp_path / f'{i}.jpg')
    status, printed = run(capsys, tmp_path, *config)
    assert status == 1 and says in printed, printed


def test_objects_that_are_all_crowds_are_counted_where_none_is_to_train_on(coco_folder, tmp_path, capsys):
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    path = root / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    for one in content['annotations']:
        one['iscrowd'] = 1
    path.write_text(json.dumps(content))
    code, printed = run(capsys, root, '--split', 'train2017')
    assert code == 1 and f'not one object to train on ({len(content["annotations"])} crowd)' in printed


def test_a_validation_folder_that_is_not_there_is_named(coco, tmp_path, capsys):
    to_yolo(coco, tmp_path)
    shutil.rmtree(tmp_path / 'images' / 'val')
    code, printed = run(capsys, tmp_path)
    assert code == 0 and 'images/val does not exist); --config.val_fraction=0.1' in printed


def test_a_split_to_evaluate_on_may_be_without_objects(coco_folder, tmp_path, capsys):
    root = tmp_path / 'data'
    shutil.copytree(coco_folder, root)
    path = root / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'annotations': []}))
    code, printed = run(capsys, root)
    assert code == 0 and 'note: not one object is annotated' in printed.split('== val2017 ==')[1]


def test_a_file_in_place_of_a_folder_is_named(coco_folder, capsys):
    with pytest.raises(InputError, match='json: a file; name the data folder that it is in'):
        run(capsys, coco_folder / 'annotations' / 'instances_val2017.json')


def test_a_config_without_a_largest_side_is_checked_with_the_published_one():
    config = finetune.get_config()
    config.augment.update(sizes=(480, 512), max_size=0)
    assert check_data.run_options(config, 'finetune')['recipe'].max_size == check_data.RECIPE.max_size


def test_batches_are_those_of_a_model_with_registers():
    assert check_data.run_options(yolos_dinov2_s.get_config(), '')['special'] == 1 + 4 + 100


def test_a_config_of_pre_training_is_refused(coco_folder):
    with pytest.raises(InputError, match='no boxes'):
        check_data.main([str(coco_folder), '--config=deit_ti'])


def test_the_command_takes_the_url_of_a_bucket(data_url, capsys):
    check_data.main([data_url, '--split', 'val2017'])
    assert '== val2017 ==' in capsys.readouterr().out


def test_an_unreadable_split_does_not_hide_the_others(coco_folder, tmp_path, capsys):
    shutil.copytree(coco_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'annotations' / 'instances_test2017.json').write_text('{"images": []}')
    status, printed = run(capsys, tmp_path / 'data', '--html', tmp_path / 'page.html')
    assert status == 1 and (tmp_path / 'page.html').exists()
    assert re.search(
        r'== test2017 ==\nSTOPS A RUN: .*instances_test2017.json: not a COCO detection file', printed
    )
    assert printed.count('STOPS A RUN') == 1 and '== val2017 ==' in printed
    (tmp_path / 'data' / 'train2017').rename(tmp_path / 'moved')
    status, printed = run(capsys, tmp_path / 'data')
    assert status == 1 and re.search(r'== train2017 ==\nSTOPS A RUN: .* are not in', printed)
    assert printed.count('STOPS A RUN') == 2 and '== val2017 ==' in printed


def test_a_storage_that_does_not_answer_is_no_unreadable_image(coco_folder):
    class Failing:
        upright, missing, name = False, staticmethod(lambda _: []), staticmethod(str)

        def start_read(self, *_):
            raise StorageError('gs://bucket: no answer')

    a = annotations.read(coco_folder / 'annotations' / 'instances_val2017.json')
    with pytest.raises(StorageError, match='no answer'):
        check_data.check_images(Failing(), a, 0)
