"""Data sets in YOLO's form: a data.yaml, and a text file of boxes for each image."""

import codecs
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers import tiny_config, to_yolo
from PIL import Image, ImageOps

from yolos_jax.data import pixels, records, sources, yolo
from yolos_jax.data.batches import start_image
from yolos_jax.errors import InputError
from yolos_jax.run import detection, detection_data, train, workdir
from yolos_jax.run.mesh import make_mesh


@pytest.mark.parametrize(
    ('labels', 'says'),
    [
        ('0 0.5 0.5 0.1', 'line 1'),
        ('0 .1 .1 .2 .2 .3', 'line 1 is not a class with a box or polygon .a sixth number'),
        ('0 0.5 0.5 0.1 0.1\nx', 'line 2'),
        ('0 .5 .5 .1 .1\n9 .5 .5 .1 .1', 'line 2 has class 9, which data.yaml'),
        ('0 30 30 20 20', 'line 1 has 30, .* are they pixels'),
        ('0 .5 nan .1 .1', 'line 1 is not a class'),
    ],
)
def test_rows_of_labels_that_are_no_boxes_are_named(labels, says, coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'labels' / 'val' / '000000000003.txt').write_text(labels)
    with pytest.raises(InputError, match=says):
        records.read(tmp_path, 'val')


def test_boxes_that_leave_their_image_are_cut(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'labels' / 'val' / '000000000003.txt').write_text('0 0.5 0.5 1.9 0.5\n')
    data = records.read(tmp_path, 'val')
    i = [name.endswith('003.jpg') for name in data.files.tolist()].index(True)
    h, w = data.heights[i], data.widths[i]
    np.testing.assert_allclose(data.objects(i)[0], [[0, 0.25 * h, w, 0.75 * h]])


@pytest.mark.parametrize(
    'content',
    [b'names:\n\t0: cup\n', 'names: [café]'.encode('cp1252'), b'a: &a [x, x]\nnames: [*a, *a]\n'],
    ids=['tab', 'encoding', 'alias'],
)
def test_a_description_that_cannot_be_read_is_named(content, coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'data.yaml').write_bytes(content)
    with pytest.raises(InputError, match=r'data\.yaml: cannot be read \('):
        records.read(tmp_path, 'val')


@pytest.mark.parametrize('number', ['3000000000', '1' * 5000])
@pytest.mark.parametrize('content', ['nc: {}', 'names:\n  {}: cup', 'names: [cup]\nkpt_shape: [{}]'])
def test_huge_numbers_in_a_description_are_refused_at_once(content, number, coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'data.yaml').write_text('train: images/train\n' + content.format(number))
    with pytest.raises(InputError, match=r'data\.yaml: (its |cannot be read)'):
        records.read(tmp_path, 'train')


def test_classes_that_are_only_counted_are_called_by_number(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file = tmp_path / 'data.yaml'
    content = yaml.safe_load(file.read_text())
    count = len(content.pop('names'))
    file.write_text(yaml.safe_dump(content | {'nc': count}))
    assert records.read(tmp_path, 'val').classes == {i: f'class_{i}' for i in range(count)}


def test_names_of_classes_are_as_they_are_written(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file = tmp_path / 'data.yaml'
    rest = yaml.safe_dump({k: x for k, x in yaml.safe_load(file.read_text()).items() if k != 'names'})
    for names in ('[no, 010, 1.50]', '{0: no, 1: 010, "2": 1.50}'):
        file.write_text(f'{rest}\nnames: {names}\nnc: 3\ntest:\n')
        assert records.read(tmp_path, 'val').classes == {0: 'no', 1: '010', 2: '1.50'}
    for changed, says in (
        ('nc: 3', 'nc is 3, but it names 2 classes'),
        ('', 'the name of class 1 is None'),
    ):
        file.write_text(
            f'{rest}\nnames: [a, {"b" if changed else ""}]\n{changed}'.replace(', ]', ', null]')
        )
        with pytest.raises(InputError, match=says):
            records.read(tmp_path, 'val')


def test_an_unreadable_image_is_left_out_of_yolo_data(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'images' / 'val' / '000000000003.jpg').write_bytes(b'<html>')
    data = records.read(tmp_path, 'val')
    assert len(data) == 14 and not any(name.endswith('003.jpg') for name in data.files)
    assert any('left out: ' in note and '003.jpg' in note for note in data.notes)
    for number in (4, 5, 6):
        (tmp_path / 'images' / 'val' / f'{number:012d}.jpg').write_bytes(b'<html>')
    with pytest.raises(InputError, match=r'003\.jpg: .*; 4 of 15 images are bad'):
        records.read(tmp_path, 'val')


def test_a_duplicate_row_of_labels_is_one_object(coco, tmp_path):
    to_yolo(coco, tmp_path)
    before = records.read(tmp_path, 'val')
    file = tmp_path / 'labels' / 'val' / '000000000003.txt'
    rows = file.read_text().splitlines()
    file.write_text('\n'.join([rows[-1], *rows]))
    after = records.read(tmp_path, 'val')
    assert len(after.boxes) == len(before.boxes) and after.labels.sum() == before.labels.sum()
    assert 'left out: 1 duplicate rows of labels' in after.notes


def test_missing_label_files_are_reported_before_training(coco, tmp_path):
    to_yolo(coco, tmp_path)
    shutil.rmtree(tmp_path / 'labels')
    config = tiny_config(data=tmp_path, batch_size=8)
    with pytest.raises(InputError, match='not one object .*; no image has a file of labels, as .*/labels/'):
        train.train(config, tmp_path / 'run')


def test_a_validation_folder_that_is_not_there_is_no_split(coco, tmp_path):
    to_yolo(coco, tmp_path)
    shutil.rmtree(tmp_path / 'images' / 'val')
    assert 'val' not in sources.splits(tmp_path)
    with pytest.raises(InputError, match='images/val does not exist'):
        records.read(tmp_path, 'val')
    config = tiny_config(data=tmp_path, val_fraction=0.2, train_split='train')
    assert len(detection_data.read(config, tmp_path / 'run', resumes=False)[1])


def test_key_points_after_a_box_are_left_out(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file, labels = tmp_path / 'data.yaml', tmp_path / 'labels' / 'val' / '000000000003.txt'
    file.write_text(file.read_text() + 'kpt_shape: [2, 2]\n')
    for path in (tmp_path / 'labels').rglob('*.txt'):
        path.write_text('0 0.5 0.4 0.1 0.2 .1 .2 .3 .4\n1 0.5 0.5 0.5 0.5\n')
    data = records.read(tmp_path, 'val')
    size = np.array([data.widths[0], data.heights[0]])
    np.testing.assert_allclose(
        data.objects(0)[0][0].reshape(2, 2) / size, [[0.45, 0.3], [0.55, 0.5]], rtol=1e-5
    )
    labels.write_text('0 0.5 0.4 0.1 0.2 .1 .2\n')
    with pytest.raises(InputError, match='line 1'):
        records.read(tmp_path, 'val')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_yolos_boxes_lie_on_photographs_turned_upright(orientation, coco, tmp_path):
    to_yolo(coco, tmp_path)
    file, exif = tmp_path / 'images' / 'val' / '000000000003.jpg', Image.Exif()
    upright = np.full((64, 64, 3), 255, np.uint8)
    upright[8:24, 4:20] = 0
    exif[0x0112] = orientation
    back = {6: 8, 8: 6}.get(orientation, orientation)  # the others undo themselves
    turned = ImageOps.exif_transpose(_with_orientation(upright, back))
    turned.save(file, exif=exif, quality=95)
    (tmp_path / 'labels' / 'val' / '000000000003.txt').write_text('0 .1875 .25 .25 .25\n')
    data = records.read(tmp_path, 'val')
    i = [name.endswith('003.jpg') for name in data.files.tolist()].index(True)
    np.testing.assert_allclose(data.objects(i)[0], [[4, 8, 20, 24]])
    assert start_image(data, i)()[9:23, 5:19, :3].max() < 20


@pytest.mark.parametrize('form', ['jpeg', 'png', 'webp', 'tiff'])
@pytest.mark.parametrize('orientation', [1, 3, 5, 8])
def test_the_size_of_a_turned_image_is_that_of_its_pixels(orientation, form, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 30)).save(tmp_path / 'x', form, exif=exif)
    expected = pixels.read_image(tmp_path / 'x', upright=True).shape[:2]
    assert pixels.upright_size(tmp_path / 'x') == expected == ((40, 30) if orientation > 4 else (30, 40))


def test_a_pipe_among_the_images_is_no_image(tmp_path):
    os.mkfifo(tmp_path / 'x.jpg')
    with pytest.raises(InputError, match='x.jpg: not a readable image'):
        pixels.upright_size(tmp_path / 'x.jpg')


def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path):
    Image.new('RGB', (40, 30)).save(tmp_path / 'x', 'png', exif=b'Exif\0\0garbage!!')
    assert pixels.upright_size(tmp_path / 'x') == pixels.read_image(tmp_path / 'x', upright=True).shape[:2]


def test_the_validation_set_of_a_run_lies_on_upright_photographs_too(coco, tmp_path):
    """Half a turn leaves the size as it is."""
    to_yolo(coco, tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3
    for file in (tmp_path / 'images').rglob('*.jpg'):
        Image.open(file).rotate(180).save(file, exif=exif, quality=95)
    for root in (tmp_path, tmp_path / 'data.yaml'):
        config = tiny_config(data=root, val_fraction=0.3)
        _, val = detection_data.read(config, tmp_path / 'run', resumes=False)
        detection_data.write_truth(config, val, tmp_path / 'run')
        again = records.from_source(sources.of_files(tmp_path / 'run' / 'val.json', tmp_path))
        assert again.files.tolist() and len(again) == len(val)
        for i in range(len(val)):
            np.testing.assert_array_equal(start_image(again, i)(), start_image(val, i)())


def test_a_start_that_ended_before_its_first_step_is_repeated(coco, tmp_path):
    to_yolo(coco, tmp_path)  # a folder's index would show that it is a run's
    for _ in range(2):
        with workdir.opened(tmp_path / 'run') as work:
            config = tiny_config(data=tmp_path, val_fraction=0.3)
            setup = detection.prepare(config, make_mesh(jax.devices()[:1]), work)
        assert {'config.json', 'val.json'} <= {file.name for file in work.folder.iterdir()}
    assert 'steps in all: more epochs' in (notes := ' '.join(setup.notes)) and 'only 9 images' in notes


def test_a_byte_order_mark_is_no_part_of_a_file(coco, tmp_path):
    to_yolo(coco, tmp_path)
    expected = records.read(tmp_path, 'val')
    for file in (tmp_path / 'labels').rglob('*.txt'):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    names = sorted((tmp_path / 'images' / 'val').iterdir())
    (tmp_path / 'val.txt').write_text('\ufeff' + '\n'.join(map(str, names)))
    description = yaml.safe_load((tmp_path / 'data.yaml').read_text()) | {'val': 'val.txt'}
    (tmp_path / 'data.yaml').write_text(yaml.safe_dump(description))
    data = records.read(tmp_path, 'val')
    assert len(data) == len(expected)
    np.testing.assert_array_equal(data.boxes, expected.boxes)


def _with_orientation(image, orientation):
    image = Image.fromarray(image)
    image.getexif()[0x0112] = orientation
    return image


def test_a_description_elsewhere_names_the_images_of_a_validation_part_too(coco, tmp_path):
    to_yolo(coco, tmp_path / 'data')
    description = yaml.safe_load((tmp_path / 'data' / 'data.yaml').read_text())
    del description['val']
    (tmp_path / 'elsewhere').mkdir()
    file = tmp_path / 'elsewhere' / 'other.yaml'
    file.write_text(yaml.safe_dump(description))
    config = tiny_config(data=str(file), train_split='train', val_fraction=0.2)
    _, val = detection_data.read(config, tmp_path / 'run', resumes=False)
    detection_data.write_truth(config, val, tmp_path / 'run')
    for place in (file, file.parent):
        again = records.from_source(sources.of_files(tmp_path / 'run' / 'val.json', place))
        np.testing.assert_array_equal(again.boxes, val.boxes)


def test_several_descriptions_are_not_chosen_from(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'b.yaml').write_text((tmp_path / 'data.yaml').read_text())
    assert records.read(tmp_path, 'val').source.path.name == 'data.yaml'  # the usual name
    (tmp_path / 'data.yaml').rename(tmp_path / 'a.yaml')
    with pytest.raises(InputError, match=r'has several data set files \(a.yaml, b.yaml\)'):
        records.read(tmp_path, 'val')


@pytest.mark.parametrize('content', ['names: [cup]\ntrain: ../gone/images\n', 'names: [\n'])
def test_a_stray_description_among_the_images_of_a_coco_file_stops_nothing(content, coco, tmp_path):
    images = shutil.copytree(coco / 'val2017', tmp_path / 'images')
    (images / 'data.yaml').write_text(content)
    file = coco / 'annotations' / 'instances_val2017.json'
    assert len(records.from_source(sources.of_files(file, images))) == 15
    with pytest.raises(InputError, match=r'data\.yaml'):
        sources.of_files(file, images / 'data.yaml')


def test_the_description_of_a_model_beside_coco_annotations_is_not_one_of_data(coco, tmp_path):
    shutil.copytree(coco, tmp_path / 'coco')
    (tmp_path / 'coco' / 'yolov8n.yaml').write_text('nc: 80\nbackbone: []\n')
    assert records.read(tmp_path / 'coco', 'val').source.path.suffix == '.json'


@pytest.mark.parametrize(
    ('folders', 'entries'),
    [
        (('images', 'labels'), '`train: images`, '),
        (('images/train', 'images/valid', 'labels/train'), '`train: images/train`, `val: images/valid`, '),
        (('train/images', 'train/labels', 'test/images'), '`train: train/images`, `test: test/images`, '),
    ],
)
def test_labels_without_a_description_say_what_to_write(folders, entries, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'notes.json').write_text('{"categories": []}')  # as Label Studio writes
    says = f'labels and no data.yaml; write one: `path: .`, {entries}and'
    with pytest.raises(InputError, match=says):
        records.read(tmp_path, 'train')


def test_images_that_a_list_names_and_that_are_missing_are_counted(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'val.txt').write_text('images/val/000000000003.jpg\ndata/images/val/000000000004.jpg\n')
    file = tmp_path / 'data.yaml'
    file.write_text(file.read_text().replace('val: images/val', 'val: val.txt'))
    with pytest.raises(InputError, match='yaml: 1 of 2 images of val are missing, .*data/images/val/'):
        records.read(tmp_path, 'val')


def test_boxes_that_leave_their_image_are_named_by_the_file_alone(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'labels' / 'val' / '000000000003.txt').write_text('0 0.9 0.5 0.4 0.2\n')
    (note,) = (note for note in records.read(tmp_path, 'val').notes if 'leave the image' in note)
    assert note.endswith('(cut): val/000000000003.jpg')


def test_a_test_split_without_files_is_not_listed(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file = tmp_path / 'data.yaml'
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {'test': '../test/images'}))
    assert sources.splits(tmp_path) == ['train', 'val']


def test_splits_may_be_in_distant_folders(coco, tmp_path):
    to_yolo(coco, tmp_path / 'a')
    to_yolo(coco, tmp_path / 'b')
    file = tmp_path / 'a' / 'data.yaml'
    content = yaml.safe_load(file.read_text()) | {'train': '../b/images/train'}
    file.write_text(yaml.safe_dump(content))
    (tmp_path / 'loop').symlink_to(tmp_path)  # not walked, for no image is in it
    assert len(records.read(tmp_path / 'a', 'train')) == 30
    assert len(records.read(tmp_path / 'a', 'val')) == 15


def test_linked_folders_of_images_are_read(coco, tmp_path):
    to_yolo(coco, tmp_path / 'a')
    images, labels = (tmp_path / 'a' / kind / 'train' for kind in ('images', 'labels'))
    for folder in (images, labels):
        shutil.copytree(folder, tmp_path / folder.parent.name)
        (folder / 'more').symlink_to(tmp_path / folder.parent.name)
        (folder / 'loop').symlink_to(folder)
    assert len(records.read(tmp_path / 'a', 'train')) == 60


def test_paths_of_a_description_are_read_as_exporters_write_them(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file, lists = tmp_path / 'data.yaml', tmp_path / 'lists'
    content = yaml.safe_load(file.read_text())
    names = sorted(path.name for path in (tmp_path / 'images' / 'val').iterdir())
    lists.mkdir()
    (lists / 'val.txt').write_text(''.join(f'./../images/val/{name}\n' for name in names))
    (tmp_path / 'model.yaml').write_text(yaml.safe_dump({'nc': 3, 'backbone': []}))
    file = file.rename(tmp_path / 'other.yaml')
    (lists / 'windows.txt').write_text(''.join(f'images\\val\\{name}\n' for name in names))
    for change in (
        {'val': '../images/val'}, {'path': '/content/data'}, {'val': 'lists/val.txt'},
        {'val': '.\\images\\val'}, {'val': 'lists\\windows.txt'},
    ):  # fmt: skip
        file.write_text(yaml.safe_dump(content | change))
        assert len(records.read(tmp_path, 'val')) == 15
    file.write_text(yaml.safe_dump(content | {'train': 'images/nowhere'}))
    with pytest.raises(InputError, match=r'other.yaml: images/nowhere does not exist'):
        records.read(tmp_path, 'val')


def test_a_description_without_splits_is_named(coco, tmp_path):
    to_yolo(coco, tmp_path)
    (tmp_path / 'data.yaml').write_text('names: [cup]')  # as supervision writes it
    with pytest.raises(InputError, match='names no images; add where they are, such as `train: images`'):
        records.read(tmp_path, 'train')


def test_labels_are_beside_the_last_folder_of_images(coco, tmp_path):
    to_yolo(coco, tmp_path)
    data = yolo.read_description(tmp_path / 'data.yaml')
    assert data.labels_of(Path('/images/a/images/val/x.y.jpg')) == Path('/images/a/labels/val/x.y.txt')


def test_a_list_of_images_that_is_not_utf8_is_named(coco, tmp_path):
    to_yolo(coco, tmp_path)
    file = tmp_path / 'data.yaml'
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {'train': 'train.txt'}))
    (tmp_path / 'train.txt').write_bytes(b'./images/train/caf\xe9.jpg\n')
    with pytest.raises(InputError, match='train.txt: no list of images in UTF-8'):
        records.read(tmp_path, 'train')
    (tmp_path / 'train.txt').unlink()
    (tmp_path / 'train.txt').symlink_to('/proc/self/mem')  # opens, and reading fails
    with pytest.raises(InputError, match='train.txt: no list of images in UTF-8'):
        records.read(tmp_path, 'train')
