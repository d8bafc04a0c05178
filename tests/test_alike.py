"""Near duplicates by their names; `test_sources` has their effect on a validation part."""

import numpy as np

from yolos_jax.data import alike


def test_copies_of_a_photograph_are_told_from_numbered_photographs():
    none = np.zeros(0, int)
    count = lambda files, fraction: len(
        set(alike.groups(files, none, np.zeros(len(files) + 1, int), fraction))
    )
    copies = ['cat.jpg', 'cat_flip.jpg', 'cat_rot90.jpg', 'cat - Copy (2).jpg']
    assert count([*copies, 'dog.jpg', 'owl.jpg'], 0.1) == 3
    photographs = [f'photo ({i}).jpg' for i in range(30)] + ['x' * i + '.jpg' for i in range(1, 31)]
    assert count(photographs, 0.9) == 60  # as many are no versions of one
