import dataclasses

import numpy as np
import pytest
from helpers import TINY, coco_content, write_coco

from yolos_jax import class_matching
from yolos_jax.data import records
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.weights.pretrained import Pretrained


def test_objects_get_the_labels_of_the_detector_and_unknown_classes_are_left_out(coco_folder):
    data = records.read(coco_folder, 'val2017')
    data = dataclasses.replace(data, category_ids={label: 10_000 + label for label in data.classes})
    changed = class_matching.relabelled(data, {7: 10_001, 0: 10_003})
    for i in range(len(data)):
        (boxes, labels), (new_boxes, new_labels) = data.objects(i), changed.objects(i)
        kept = labels != 2
        np.testing.assert_array_equal(new_boxes, boxes[kept])
        assert new_labels.tolist() == [{1: 7, 3: 0}[x] for x in labels[kept].tolist()]


def known(classes, **about):
    """A detector with these classes."""
    return Pretrained(Yolos(**TINY, num_classes=max(classes) + 1), {}, classes, 64, 96, about)


def test_classes_with_different_numbers_are_matched_by_name_with_a_note(tmp_path):
    data = records.read(write_coco(tmp_path, coco_content()), 'val')  # 2 cat, 5 dog
    same, notes = class_matching.match(known({2: 'cat', 5: 'dog', 7: 'bird'}), data)
    assert same == {label: label for label in range(8)} and notes == []
    assert class_matching.match(known({2: 'dog', 5: 'cat'}), data)[0] == {2: 5, 5: 2}
    labels, (note,) = class_matching.match(known({0: 'Dog', 1: 'cat', 3: 'bird'}), data)
    assert labels == {0: 5, 1: 2} and 'matched by name' in note
    data = dataclasses.replace(data, classes={2: 'Cat', 5: 'big Dog'})
    labels, notes = class_matching.match(known({2: 'cat', 5: 'bird'}), data)
    assert labels == {2: 2} and 'cannot be detected: big Dog' in ' '.join(notes)
    with pytest.raises(InputError, match='none of its classes .Cat, big Dog. is among the .* .bird.'):
        class_matching.match(known({2: 'bird'}), data)


def test_labels_are_mapped_back_to_the_category_ids_of_the_training_data(tmp_path):
    """Of names that differ in upper case alone too."""
    content = coco_content()
    content['categories'] = [{'id': 10_001, 'name': 'cat'}, {'id': 10_002, 'name': 'Cat'}]
    for one in content['annotations']:
        one['category_id'] += 9_999 if one['category_id'] == 2 else 9_997
    data = records.read(write_coco(tmp_path, content), 'val')
    detector = known(data.classes, category_ids={str(k): x for k, x in data.category_ids.items()})
    assert class_matching.match(detector, data) == ({0: 10_001, 1: 10_002}, [])
    assert class_matching.match(known({10_001: 'cat'}), data)[0] == {10_001: 10_001}
    labels, notes = class_matching.match(known({7: 'cat'}), data)
    assert labels == {7: 10_002} and 'one name, only the last with objects can be detected' in ' '.join(
        notes
    )


@pytest.mark.parametrize(
    ('own', 'data', 'expected'),
    [
        ({0: 'cat'}, [0, 1], {0: 1}),  # a detector from YOLO's labels, on an export with an unused category
        ({0: 'cat', 1: 'cat'}, [0], {0: 0, 1: 0}),  # the other way
        ({0: 'cat', 1: 'cat'}, [0, 1], {0: 0, 1: 1}),
    ],
)
def test_of_categories_with_one_name_the_used_one_counts(own, data, expected, tmp_path):
    content = coco_content() | {'categories': [{'id': i, 'name': 'cat'} for i in data]}
    for annotation in content['annotations']:
        annotation['category_id'] = data[-1]
    labels, notes = class_matching.match(known(own), records.read(write_coco(tmp_path, content), 'val'))
    assert labels == expected and 'cannot be detected' not in ' '.join(notes)
