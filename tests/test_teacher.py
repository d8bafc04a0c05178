"""What is learnt from and started from in a pre-training: classifiers of a file, and logits."""

import jax
import numpy as np
import pytest
import torch
from helpers import read_deit
from torch.nn import functional

from yolos_jax import classifier
from yolos_jax.classifier import Classifier
from yolos_jax.errors import InputError
from yolos_jax.run.pretraining import start_params
from yolos_jax.run.teacher import read_logits
from yolos_jax.weights import deit

MODEL = Classifier(width=64, depth=3, heads=2, num_classes=20, size=64)


def test_a_distilled_classifier_comes_back_from_its_file_and_is_called_as_in_timm(tmp_path):
    distilled = MODEL.clone(distilled=True)
    params = classifier.init_params(distilled, jax.random.key(0))
    deit.write(params, distilled, tmp_path / 'deit.pth')
    content = torch.load(tmp_path / 'deit.pth', weights_only=True)['model']
    token = params['backbone']['det_token']
    np.testing.assert_array_equal(content['dist_token'], token)
    np.testing.assert_array_equal(content['pos_embed'][:, 1], params['backbone']['pos_embed'][:, -1])
    assert content['head_dist.weight'].shape == (20, 64)
    back, same = read_deit(tmp_path / 'deit.pth')
    assert back == distilled
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_run_goes_on_from_a_classifier_at_another_size(tmp_path):
    student = MODEL.clone(distilled=True)
    params = jax.device_get(classifier.init_params(student, jax.random.key(0)))
    deit.write(params, student, tmp_path / 'deit.pth')
    larger = student.clone(size=96)
    started, _ = start_params(
        tmp_path, larger, jax.device_get(classifier.init_params(larger, jax.random.key(1)))
    )
    old, new = (torch.from_numpy(p['backbone']['pos_embed'].copy()) for p in (params, started))
    square = old[0, 1:17].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = functional.interpolate(square, (6, 6), mode='bicubic').permute(0, 2, 3, 1).reshape(36, -1)
    np.testing.assert_allclose(new[0, 1:37], expected, atol=1e-6)
    np.testing.assert_array_equal(new[0, [0, -1]], old[0, [0, -1]])
    jax.tree.map(np.testing.assert_array_equal, started['head_dist'], params['head_dist'])
    fresh = jax.device_get(classifier.init_params(student.clone(num_classes=7), jax.random.key(1)))
    of_seven, notes = start_params(tmp_path, student.clone(num_classes=7), fresh)
    jax.tree.map(np.testing.assert_array_equal, of_seven['head'], fresh['head'])
    jax.tree.map(np.testing.assert_array_equal, of_seven['backbone'], params['backbone'])
    assert 'of 20 classes and not 7: heads are fresh' in notes
    with pytest.raises(InputError, match='a classifier of heads 2, and not 4'):
        start_params(tmp_path, student.clone(heads=4), params)


@pytest.mark.parametrize('content', ['empty', 'npz', 'nan'])
def test_logits_that_are_none_are_named(content, tmp_path):
    path = tmp_path / 'logits.npy'
    with open(path, 'wb') as file:
        if content == 'npz':
            np.savez(file, a=np.zeros(2), b=np.zeros(3))
        elif content == 'nan':
            np.save(file, np.full((6, 3), np.nan))
    with pytest.raises(InputError, match='logits.npy'):
        read_logits(path, 6, 3)
