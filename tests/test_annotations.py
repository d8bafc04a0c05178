import codecs
import json

import pytest
from helpers import coco_content, write_coco
from pycocotools.cocoeval import Params

from yolos_jax.data import annotations
from yolos_jax.data.problems import check_annotations, find_problems
from yolos_jax.errors import InputError


def change(**keys):
    content = coco_content()
    for key, value in keys.items():
        where, index, field = key.split('__')
        content[where][int(index)][field] = value
    return content


def text(value, **keys):
    """The content as JSON with a number that json cannot write."""
    return json.dumps(change(**keys)).replace('12345', value)


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ('', 'is empty'),
        ('[1, 2', 'not a COCO detection file'),
        ('<html>', 'not a COCO detection file'),
        (json.dumps(coco_content())[:-40], 'not a COCO detection file: Input data was truncated'),
        ('[]', 'not a COCO detection file: Expected `object`'),
        ({'images': []}, 'missing required field `annotations`'),
        (coco_content() | {'images': []}, '0 images: the list is empty'),
        (coco_content() | {'categories': []}, '0 categories: the list is empty'),
        (change(images__1__id=7), '1 image ids that occur twice: 7'),
        (change(annotations__1__id=1), '1 annotation ids that occur twice: 1'),
        (change(categories__0__id=5), '1 category ids that occur twice: 5'),
        (change(annotations__1__category_id=4), r'unknown category: annotation id 2 \(category_id 4\)'),
        (change(annotations__0__image_id=8), r'unknown image: annotation id 1 \(image_id 8\)'),
        (change(annotations__1__bbox=[1, 2, 3]), r'annotations\[1\].bbox`, in the object with id 2'),
        (change(annotations__1__bbox=[1, 2, 3, 'x']), r'annotations\[1\].bbox.*in the object with id 2'),
        (change(annotations__1__bbox=[1, 2, 3, None]), r'annotations\[1\].bbox.*in the object with id 2'),
        (text('NaN', annotations__1__bbox=[1, 2, 3, 12345]), 'malformed.* in the object with id 2'),
        (text('Infinity', annotations__1__bbox=[1, 2, 3, 12345]), 'malformed.* in the object with id 2'),
        (text('1e999', annotations__1__bbox=[1, 2, 3, 12345]), 'out of range.* in the object with id 2'),
        (change(annotations__1__bbox=[1, 2, 3, 1e60]), '1 boxes that are not finite: annotation id 2'),
        (change(images__0__height=0), 'image id 7 is 200 x 0'),
        (change(images__0__width=0), 'image id 7 is 0 x 100'),
        (change(images__1__height='x'), r'images\[1\].height`, in the object with id 3'),
        (change(categories__1__id=-3), 'category ids below 0: -3'),
        (change(annotations__1__id=1.5), r'annotations\[1\].id`, in the object with id 1.5'),
        (json.dumps(coco_content()) + 'x', r'trailing characters \(byte \d+\)$'),
        (change(categories__0__name='a\nb'), r'control characters in their name: category id \d+ .a.+nb'),
        (change(images__0__file_name='a\tb.jpg'), 'control characters in it: image id 7 .a.*tb.jpg'),
    ],
)
def test_a_problem_that_stops_a_run_is_named_with_the_file_and_the_id(content, says, tmp_path):
    path = write_coco(tmp_path, content, images=False) / 'annotations' / 'instances_val.json'
    with pytest.raises(InputError, match=says) as error:
        check_annotations(annotations.read(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_boxes_that_are_dropped_or_cut_are_noted(tmp_path):
    content = change(annotations__0__bbox=[10, 10, -5, 5])
    first = content['annotations'][0]
    content['annotations'].append(first | {'id': 5, 'bbox': [-5, 10, 20, 20]})
    content['annotations'].append(first | {'id': 6, 'bbox': [-50, 10, 20, 20]})
    content['annotations'].append(first | {'id': 7, 'bbox': [-0.9, 10, 20, 90.9]})  # by less than a pixel
    for left in (-51, -6):  # crowds are not trained on
        content['annotations'].append(first | {'id': 90 - left, 'bbox': [left, 10, 20, 20], 'iscrowd': 1})
    path = write_coco(tmp_path, content) / 'annotations' / 'instances_val.json'
    problems = find_problems(annotations.read(path))
    assert [str(problem) for problem in problems] == [
        '3 boxes without an area in their image (not trained on): annotation id 1 in b.jpg, '
        'annotation id 4 in b.jpg, annotation id 6 in b.jpg',
        '2 boxes that leave the image by more than a pixel (cut): annotation id 2 in b.jpg, '
        'annotation id 5 in b.jpg',
    ]
    assert not any(problem.stops for problem in problems)


@pytest.mark.parametrize(('leaving', 'hint'), [(6, ''), (9, 'are they x, y, x, y')])
def test_only_many_odd_boxes_are_suspicious(leaving, hint, tmp_path):
    """More than a fifth that leave the image; all within 0..1, where one is a small object."""
    content = coco_content()
    boxes = [[150, 10, 60, 20]] * leaving + [[0.1, 0.1, 0.5, 0.5]] + [[5, 5, 20, 20]] * (39 - leaving)
    rows = [{'id': i, 'image_id': 7, 'category_id': 2, 'bbox': [x + i / 99, *rest]} for i, (x, *rest) in
            enumerate(boxes)]  # fmt: skip
    path = write_coco(tmp_path, content | {'annotations': rows}) / 'annotations' / 'instances_val.json'
    (problem,) = find_problems(annotations.read(path))
    assert str(problem).startswith(f'{leaving} boxes that leave the image') and hint in str(problem)
    assert bool(hint) == ('x, y, x, y' in str(problem))


def test_a_missing_or_negative_area_is_that_of_the_box(tmp_path):
    content = change(annotations__1__area=-1, annotations__2__area=0, annotations__3__bbox=[9, 9, -3, 4])
    path = write_coco(tmp_path, content) / 'annotations' / 'instances_val.json'
    assert annotations.read(path).known_areas().tolist() == [9.5, 5000, 0, 0]


def test_annotations_need_no_ids(tmp_path):
    content = coco_content()
    for annotation in content['annotations']:
        del annotation['id']
    path = write_coco(tmp_path, content) / 'annotations' / 'instances_val.json'
    assert not any(problem.stops for problem in find_problems(annotations.read(path)))


def test_an_object_under_two_ids_is_noted(tmp_path):
    content = coco_content()
    first, second, *_ = content['annotations']
    content['annotations'] += [first | {'id': 8}, second | {'id': 9, 'category_id': first['category_id']}]
    path = write_coco(tmp_path, content) / 'annotations' / 'instances_val.json'
    (problem,) = (p for p in find_problems(annotations.read(path)) if 'another id' in p.what)
    assert problem.examples == ['annotation id 8 in b.jpg'] and not problem.stops


def test_a_field_is_read_from_every_file_that_is_taken(tmp_path):
    """With a byte order mark, numbers as text, and not in every image."""
    path = write_coco(tmp_path, change(images__0__id='7', images__0__time='day')) / 'annotations'
    path = path / 'instances_val.json'
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert annotations.read_field(path, 'images', 'time') == ([7, 3], ['day', None])


def test_every_problem_is_found_not_only_the_first(tmp_path):
    content = change(images__1__id=7, annotations__1__id=1, annotations__2__category_id=4)
    path = write_coco(tmp_path, content) / 'annotations' / 'instances_val.json'
    problems = find_problems(annotations.read(path))
    assert len(problems) == 3 and all(problem.stops for problem in problems)


def test_objects_are_small_and_large_as_they_are_for_coco():
    small, large = annotations.SMALL, annotations.LARGE
    assert Params(iouType='bbox').areaRng[1:] == [[0, small], [small, large], [large, 1e10]]


NAMES = '写真\u30001.png', 'Screenshot 1.00\u202fPM.png', 'a\u00a0b.png', '👨\u200d👩.jpg'


@pytest.mark.parametrize('name', NAMES)
def test_spaces_of_other_scripts_are_no_control_characters(name, tmp_path):
    path = write_coco(tmp_path, change(images__0__file_name=name), images=False)
    check_annotations(annotations.read(path / 'annotations' / 'instances_val.json'))
