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


def test_each_token_learns_from_its_own_labels_and_they_predict_together():
    model, few = MODEL.clone(distilled=True, depth=1), MODEL.clone(num_classes=3)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), classifier.param_shapes(model))
    for name, label, logit in (('head', 3, 9), ('head_dist', 5, 10)):
        params[name] = params[name] | {'bias': logit * jax.nn.one_hot(label, 20)}
    part = {'patches': np.zeros((2, 16, 768), np.uint8), 'noise': np.zeros(2, np.uint32)}
    part |= {'box': np.zeros((2, 4), np.int32), 'weight': np.ones(2), 'share': np.ones(2)}
    part['labels'] = np.full(2, 3)  # the teacher's are 5
    options = dict(smoothing=0.0, drop_path=0.0, group=2, teach=classification.of_model(model))
    _, metrics = jax.jit(classification.make_loss(model, **options))(params, part, {'fixed': params})
    assert metrics['loss_true'] < 0.01 and metrics['loss_teacher'] < 0.01
    part['labels'] = np.full(2, 5)
    assert classification.make_evaluation_step(model)(params, part)['top1'].all()
    # of fewer than five classes
    jax.eval_shape(classification.make_evaluation_step(few), classifier.param_shapes(few), part)


def test_the_logits_of_a_bfloat16_classifier_are_float32():
    model = MODEL.clone(dtype=jnp.bfloat16, distilled=True)
    apply = lambda params: model.apply({'params': params}, np.zeros((2, 16, 768), np.uint8))
    logits = jax.eval_shape(apply, classifier.param_shapes(model))
    assert logits.shape == (2, 2, 20) and logits.dtype == jnp.float32


def test_teacher_labels_are_mixed_with_those_of_the_partner_image():
    batch = {'teacher': jnp.arange(4), 'share': jnp.full(4, 0.3)}
    taught = classification.of_labels(5, 4)(None, batch, {})
    assert taught.argmax(axis=1).tolist() == [3, 2, 1, 0]  # the partner's, of which there is more
