"""The loss of pre-training and what an evaluation counts."""

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import classification, classifier
from yolos_jax.classifier import Classifier

MODEL = Classifier(width=64, depth=3, heads=2, num_classes=20, size=64)


def test_equal_or_nan_likelihoods_are_not_all_counted_as_correct():
    params = jax.tree.map(jnp.zeros_like, classifier.init_params(MODEL, jax.random.key(0)))
    batch = {'patches': np.zeros((20, 16, 768), np.uint8), 'labels': np.arange(20)}
    step = classification.make_evaluation_step(MODEL)
    counts = step(params, batch)
    assert counts['top1'].sum() == 1 and counts['top5'].sum() == 5
    broken = params | {'head': jax.tree.map(lambda x: x + jnp.nan, params['head'])}
    assert not step(broken, batch)['top5'].any()


def test_teacher_labels_are_mixed_with_those_of_the_partner_image():
    batch = {'teacher': jnp.arange(4), 'share': jnp.full(4, 0.3)}
    taught = classification.of_labels(5, 4)(None, batch, {})
    assert taught.argmax(axis=1).tolist() == [3, 2, 1, 0]  # the partner's, of which there is more
