import dataclasses
import unicodedata

import jax
import numpy as np
import pytest
import torch
from helpers import TINY, forward, noise

from yolos_jax import weights
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import patchify
from yolos_jax.weights import adapt

CLASSES = {1: 'cat', 2: 'dog', 4: 'bird'}


@pytest.fixture(scope='module')
def pretrained():
    yolos = Yolos(**TINY, num_classes=5)
    params = jax.device_get(init_params(yolos, jax.random.key(0)))
    return weights.Pretrained(yolos, params, CLASSES, 64, 128)


def detect(pretrained, image):
    return forward(pretrained.model, pretrained.params, *patchify([image]))


def test_classes_of_the_same_name_keep_their_logits(pretrained):
    changed, report = adapt.with_classes(pretrained, {0: 'Bird', 3: 'fish', 7: 'cat'}, 0)
    assert report == 'class head: 3 classes, 2 of them kept (bird, cat), 1 fresh'
    adapt.check_classes(changed, {0: 'bird', 7: 'CAT'}, 'data')  # as a run takes them, in any case
    composed, decomposed = ({0: unicodedata.normalize(form, 'Café')} for form in ('NFC', 'NFD'))
    adapt.check_classes(adapt.with_classes(pretrained, composed, 0)[0], decomposed, 'data')
    image = noise(64, 96)
    old, new = (detect(w, image)['pred_logits'] for w in (pretrained, changed))
    assert new.shape[-1] == 9
    for new_class, old_class in ((0, 4), (7, 1), (8, 5)):  # the last: "no object"
        np.testing.assert_allclose(new[..., new_class], old[..., old_class], atol=1e-6)
    np.testing.assert_array_equal(
        detect(changed, image)['pred_boxes'], detect(pretrained, image)['pred_boxes']
    )


def test_fresh_rows_and_tokens_are_small_and_drawn_by_the_seed(pretrained):
    fish, token = [], []
    for seed in (0, 0, 1):
        head = adapt.with_classes(pretrained, {1: 'cat', 2: 'fish'}, seed)[0].params['class_embed']
        fish.append(head['layers_2']['kernel'][:, 2])
        token.append(adapt.with_det_tokens(pretrained, 8, seed)[0].params['backbone']['det_token'][0, -1])
    bound = TINY['width'] ** -0.5  # torch's, of a dense layer
    assert 0.8 * bound < np.abs(fish[0]).max() <= bound
    for first, again, other in (fish, token):
        assert np.array_equal(first, again) and not (first == other).any()


def test_unused_class_numbers_score_below_the_kept_classes(pretrained):
    moved = {number + 40: name for number, name in CLASSES.items()}
    changed, _ = adapt.with_classes(pretrained, moved, 0)
    logits = np.asarray(detect(changed, noise(64, 96))['pred_logits'])
    unused = sorted({*range(45)} - {*moved})
    assert logits[..., unused].max() < logits[..., [*moved]].min() - 5


def test_of_classes_with_one_name_those_without_objects_are_never_detected(pretrained):
    classes = {0: 'cat', 1: 'cat', 2: 'fish'}  # as Roboflow writes a supercategory
    changed, report = adapt.with_classes(pretrained, classes, 0, seen={1, 2})
    assert (
        report == 'class head: 3 classes, 1 of them kept (cat), 1 fresh, 1 unused: others have their names'
    )
    image = noise(64, 96)
    old, new = (np.asarray(detect(w, image)['pred_logits']) for w in (pretrained, changed))
    np.testing.assert_allclose(new[..., 1], old[..., 1], atol=1e-6)
    assert new[..., 0].max() < new[..., 1:].min() - 5


def test_a_changed_detector_is_not_the_one_that_was_measured(pretrained):
    about = {'source': 'x', 'AP': 0.4, 'step': 5, 'config': {}, 'category_ids': {'1': 10_001}}
    pretrained = dataclasses.replace(pretrained, about=about)
    other_classes, _ = adapt.with_classes(pretrained, {1: 'cat'}, 0)
    assert other_classes.about == {'source': 'x'}
    for changed, _ in (adapt.with_det_tokens(pretrained, 9, 0), adapt.with_pos_grid(pretrained, (5, 5))):
        assert changed.about == {'source': 'x', 'category_ids': {'1': 10_001}}
    assert pretrained.about == about


def test_a_change_that_gives_no_model_is_refused(pretrained):
    model = pretrained.model.clone(pos_grid=None, mid_pos_grid=None, rope=True)
    rotary = dataclasses.replace(pretrained, model=model)
    for change, says in (
        (lambda: adapt.with_classes(pretrained, {100_000: 'cat'}, 0), 'not a number from 1 to'),
        (lambda: adapt.with_det_tokens(pretrained, -2, 0), 'not a number from 1 to'),
        (lambda: adapt.with_pos_grid(pretrained, (0, 0)), 'not rows and columns'),
        (lambda: adapt.with_pos_grid(rotary, (5, 5)), 'no table to resample'),
    ):
        with pytest.raises(InputError, match=says):
            change()


def test_more_tokens_keep_the_first_and_fewer_drop_the_last(pretrained):
    more, report = adapt.with_det_tokens(pretrained, 10, 0)
    assert report == '[DET] tokens: 7 of 7 kept, 3 fresh' and more.model.num_det_tokens == 10
    backbone = more.params['backbone']
    assert backbone['pos_embed'].shape == (1, 1 + 24 + 10, 32)
    assert backbone['mid_pos_embed'].shape == (2, 1, 1 + 24 + 10, 32)
    assert 0.01 < np.std(backbone['det_token'][0, 7:]) < 0.03
    assert detect(more, noise(64, 96))['pred_logits'].shape == (1, 10, 6)
    back, report = adapt.with_det_tokens(more, 7, 0)
    assert report == '[DET] tokens: 7 of 10 kept, 0 fresh'
    jax.tree.map(np.testing.assert_array_equal, back.params, pretrained.params)


def test_position_tables_are_resampled_as_torch_does(pretrained):
    changed, report = adapt.with_pos_grid(pretrained, (7, 5))
    assert report == 'pos_embed 4x6 -> 7x5, mid_pos_embed 4x6 -> 7x5'
    assert changed.model.pos_grid == changed.model.mid_pos_grid == (7, 5)
    for name in ('pos_embed', 'mid_pos_embed'):
        old = pretrained.params['backbone'][name].reshape(-1, 32, 32)
        new = changed.params['backbone'][name].reshape(-1, 43, 32)
        for before, after in zip(old, new, strict=True):
            table = torch.tensor(before[1:25].reshape(1, 4, 6, 32)).permute(0, 3, 1, 2)
            wanted = torch.nn.functional.interpolate(table, (7, 5), mode='bicubic').permute(0, 2, 3, 1)
            np.testing.assert_allclose(after[1:36], wanted.reshape(35, 32), atol=1e-6)
            np.testing.assert_array_equal(after[[0, *range(36, 43)]], before[[0, *range(25, 32)]])
