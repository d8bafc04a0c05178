"""Near duplicates found by their names; `test_sources` tests their effect on a validation split."""

import dataclasses

import numpy as np
import pytest

from yolos_jax.data import alike, records
from yolos_jax.errors import InputError


def test_copies_of_a_photograph_are_told_from_numbered_photographs():
    none = np.zeros(0, int)
    count = lambda files, fraction: len(
        set(alike.groups(files, none, np.zeros(len(files) + 1, int), fraction))
    )
    copies = ['cat.jpg', 'cat_flip.jpg', 'cat_rot90.jpg', 'cat - Copy (2).jpg']
    assert count([*copies, 'dog.jpg', 'owl.jpg'], 0.1) == 3
    photographs = [f'photo ({i}).jpg' for i in range(30)] + ['x' * i + '.jpg' for i in range(1, 31)]
    assert count(photographs, 0.9) == 60  # as many are no versions of one


def test_a_part_has_an_image_and_not_all_of_them(coco):
    whole = records.read(coco, 'train2017')
    assert [len(part) for part in records.split_by_fraction(whole, 0.001, seed=0)] == [len(whole) - 1, 1]
    copies = np.array([f'a_jpg.rf.{i:032x}.jpg' for i in range(len(whole))])
    with pytest.raises(InputError, match='its images are all alike by name; no part can be taken'):
        records.split_by_fraction(dataclasses.replace(whole, files=copies), 0.1, seed=0)


def test_a_part_is_taken_wherever_the_images_are_of_two_groups(coco):
    whole = records.select(records.read(coco, 'train2017'), np.arange(6))
    files = np.array(['q.jpg', 'r.jpg', 'p.jpg', 'p copy.jpg', 'p copy 2.jpg', 'p copy 3.jpg'])
    for seed in range(12):
        train, val = records.split_by_fraction(dataclasses.replace(whole, files=files), 0.5, seed=seed)
        of_p = [file.startswith('p') for file in train.files], [file.startswith('p') for file in val.files]
        assert all(map(len, of_p)) and sorted(map(sum, of_p)) == [0, 4]
