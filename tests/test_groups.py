"""The parts of a split in a report, and the analyses of a few detections made for them."""

import dataclasses

import numpy as np
import pytest
from helpers import coco_content, write_coco

from yolos_jax import evaluation
from yolos_jax.analysis import confidence, groups, outcomes, precision
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data import records
from yolos_jax.data.annotations import Annotations
from yolos_jax.errors import InputError

CLASSES = [(k, f'class {k}') for k in range(1, 5)]


def scene(objects, detected=(), images=8, crowds=0):
    """A split of objects (image, class, box), the last ones crowds, and detections with a score as well."""
    owners, labels, boxes = zip(*objects, strict=True) if objects else ([], [], [])
    m, sides = len(owners), np.full(images, 1000)
    truth = Annotations(
        path=None, ids=np.arange(images), files=np.arange(images).astype(str), heights=sides, widths=sides,
        annotation_ids=np.arange(m), owners=np.array(owners, int), labels=np.array(labels, int),
        crowd=np.arange(m) >= m - crowds, areas=np.full(m, np.nan),
        boxes=np.array(boxes, float).reshape(-1, 4), categories=CLASSES,
    )  # fmt: skip
    results = [dict(image_id=i, category_id=k, bbox=box, score=score) for i, k, box, score in detected]
    return outcomes.columns(truth, results)


def detections_of(objects, score=0.5):
    return [(*x, score) for x in objects]


def square(image, label=1, side=40):
    return image, label, [100, 100, side, side]


def test_objects_are_grouped_by_their_size_with_the_detections_of_it():
    sides = {'tiny': [10, 15], 'small': [16, 31], 'medium': [32, 95], 'large': [96], 'huge': [288, 300]}
    objects = [square(i, 1, side) for of_size in sides.values() for i, side in enumerate(of_size)]
    objects = [(*x[:2], [300 * n % 900, 300 * n // 900 * 300, *x[2][2:]]) for n, x in enumerate(objects)]
    wrong = [(7, 1, [100, 100, 90, 2.5])]  # as large as a square of side 15
    parts = groups.by_size(scene(objects, detections_of(objects) + detections_of(wrong, 0.9)))
    assert {x.name.split(' (')[0]: x.objects for x in parts} == {name: len(x) for name, x in sides.items()}
    assert [x.ap for x in parts] == pytest.approx([2 / 3, 1, 1, 1, 1])


def test_objects_are_grouped_by_width_over_height():
    shapes = {'very tall': (10, 40), 'tall': (20, 40), 'square': (30, 30), 'wide': (40, 20)}
    shapes['very wide'] = (60, 20)
    objects = [(i, 1, [0, 0, *shape]) for i, shape in enumerate(shapes.values())]
    for i, name in enumerate(shapes):
        parts = groups.by_shape(scene(objects, detections_of(objects[i : i + 1])))
        assert [x.name.split(' (')[0] for x in parts if x.ap > 0.99] == [name]


def test_images_are_grouped_by_their_objects_without_crowds():
    objects = [
        (image, 1, [50 * k, 0, 40, 40]) for image, n in enumerate((1, 2, 4, 5, 20)) for k in range(n)
    ]
    parts = groups.by_crowding(outcomes.match(scene([*objects, square(0)], crowds=1, images=5)))
    assert [x.images for x in parts] == [1, 2, 1, 0, 1]
    assert [x.objects for x in parts] == [1, 6, 5, 0, 20]


def test_classes_are_grouped_by_how_often_they_occur():
    objects = [square(i, label) for label, n in ((4, 1), (1, 2), (2, 3)) for i in range(n)]
    parts = groups.by_frequency(outcomes.match(scene(objects, detections_of(objects[3:]))))
    names = [f'{name} ({n} objects a class)' for n, name in enumerate(('rare', 'common', 'frequent'), 1)]
    assert [(x.name, x.objects) for x in parts] == list(zip(names, (1, 2, 3), strict=True))
    assert [x.ap for x in parts] == pytest.approx([0, 0, 1])


def test_values_beyond_the_thirty_most_frequent_are_one_group():
    values = [str(number) for number in range(33)] + ['0', '0']
    parts = groups.by_image_field(outcomes.match(scene([], images=35)), values)
    assert [x.images for x in parts] == [3, *[1] * 29, 3] and parts[-1].name == '3 other values'


def test_a_group_of_few_images_or_few_objects_is_small():
    whole = groups.Group('x', images=20, objects=50, ap=0, ap50=0, ar=0)
    assert not whole.is_small
    assert dataclasses.replace(whole, images=19).is_small
    assert dataclasses.replace(whole, objects=49).is_small


def test_fields_are_read_for_the_images_and_objects_that_are_evaluated(tmp_path):
    content = coco_content()
    for i, image in enumerate(content['images']):
        image['weather'] = ('rain', 'sun')[i]
    for i, annotation in enumerate(content['annotations']):
        annotation['tone'] = i
    content['annotations'][1]['image_id'] = 3
    data = records.read(write_coco(tmp_path, content), 'val')
    names = 'images.weather', 'annotations.tone'
    fields = groups.read_fields(data, data.truth(), names)
    assert fields == {'images.weather': ['sun', 'rain'], 'annotations.tone': [0, 1, 2, 3]}
    second = records.select(data, [1])
    fields = groups.read_fields(second, second.truth(), names)
    assert fields == {'images.weather': ['rain'], 'annotations.tone': [0, 2, 3]}


def test_fields_in_a_mapping_are_read_as_cvat_writes_them(tmp_path):
    content = coco_content()
    for i, annotation in enumerate(content['annotations']):
        annotation['attributes'] = {'occluded': i > 1, 'weather': 'rain'}
    data = records.read(write_coco(tmp_path, content), 'val')
    name = 'annotations.attributes.occluded'
    assert groups.read_fields(data, data.truth(), [name]) == {name: [False, False, True, True]}
    for field, says in {
        'annotations.attributes': f'is a mapping; name a field in it: {name}, .*weather',
        'annotations.attributes.x': 'none of its annotations has a field attributes.x',
    }.items():
        with pytest.raises(InputError, match=says):
            groups.read_fields(data, data.truth(), [field])


def test_values_belong_to_the_objects_in_the_order_of_the_file():
    objects = [square(2), square(0), square(1)]  # another order than that of the images
    analysis = analyse(scene(objects, detections_of(objects[:1])), {'annotations.tone': ['a', 'b', 'c']})
    assert {x.name: x.ap50 for x in analysis.groups['annotations.tone']} == pytest.approx(
        {'a': 1, 'b': 0, 'c': 0}
    )


def test_the_ap_under_corruptions_is_relative_to_that_without():
    objects = [square(0), square(1)]
    analysis = analyse(
        scene(objects, detections_of(objects[:1])), corrupted={'x': [0.5, 0.1], 'y': [0.2, 0.2]}
    )
    assert analysis.relative_ap() == pytest.approx(0.25 / (51 / 101))


def test_an_interval_holds_the_ap_of_nineteen_in_twenty_draws():
    objects = [square(i) for i in range(40)]
    matched = outcomes.match(scene(objects, detections_of(objects[::2]), images=40))
    low, high = precision.bootstrap(matched, np.ones(40))
    deviation = (0.5 * 0.5 / 40) ** 0.5  # of the share of the objects that are found
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.2)
    assert (low + high) / 2 == pytest.approx(0.5, abs=deviation / 2)


def test_detections_on_crowds_are_neither_right_nor_wrong_in_a_calibration():
    objects = [square(0), (1, 1, [0, 0, 500, 500])]
    detected = [*detections_of(objects[:1], 0.85), (1, 1, [50, 50, 20, 20], 0.85)]
    calibration = confidence.calibration(outcomes.match(scene(objects, detected, crowds=1)))
    assert calibration.count.tolist() == [0] * 8 + [1, 0] and calibration.error == pytest.approx(0.15)


def test_of_objects_with_one_box_the_last_is_matched_first_as_by_pycocotools():
    objects = [square(0), square(0)]
    matched = outcomes.match(scene(objects, detections_of(objects))).matched
    assert matched[:, 0].tolist() == [1, 0]


def test_a_hundred_detections_of_a_class_in_an_image_count():
    for wrong, ap in ((99, 0.01), (100, 0)):
        detected = [(0, 1, [500, 500, 9, 9], 0.9)] * wrong + detections_of([square(0)])
        assert precision.curves(outcomes.match(scene([square(0)], detected))).ap() == pytest.approx(ap)


@pytest.mark.parametrize('box', [[100, 100, 2e5, 1e5], [100, 100, -3, 4]])
def test_odd_objects_count_in_a_report_as_in_the_evaluation(box):
    objects = [square(0), (1, 1, box)]
    split = scene(objects, detections_of(objects[:1]))
    a = Annotations(
        path=None, ids=split.image_ids, files=split.image_ids.astype(str), heights=np.full(8, 1000),
        widths=np.full(8, 1000), annotation_ids=np.arange(2), owners=split.image_ids[split.images],
        labels=np.ones(2, int), crowd=split.crowd, areas=np.full(2, np.nan), boxes=split.boxes,
        categories=CLASSES,
    )  # fmt: skip
    results = [dict(image_id=0, category_id=1, bbox=objects[0][2], score=0.5)]
    assert precision.curves(outcomes.match(split)).ap() == pytest.approx(
        evaluation.score(a, results)[0]['AP']
    )
