import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import TINY, make_hf, make_targets, noise, reference_tensors, to_torch
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from yolos_jax import losses
from yolos_jax.model import Yolos
from yolos_jax.patches import patchify
from yolos_jax.run import mesh as meshes
from yolos_jax.weights import hf_names, names

C, Q, SLOTS = 5, 12, 9
set_loss = jax.jit(losses.set_loss, static_argnames='images_per_group')


def random_outputs(B, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'pred_logits': rng.normal(size=(B, Q, C + 1)).astype(np.float32),
        'pred_boxes': rng.uniform(0.1, 0.6, (B, Q, 4)).astype(np.float32),
    }


def transformers_loss(outputs, labels, hf_config):
    logits, boxes = (torch.from_numpy(outputs[k]).requires_grad_() for k in ('pred_logits', 'pred_boxes'))
    loss, parts, _ = ForObjectDetectionLoss(logits, labels, 'cpu', boxes, hf_config)
    loss.backward()
    zero = torch.zeros_like(boxes)  # no objects: no path from the boxes to the loss
    grads = {'pred_logits': logits.grad, 'pred_boxes': zero if boxes.grad is None else boxes.grad}
    return loss.item(), {k: v.item() for k, v in parts.items()}, grads


def test_the_loss_promotes_no_types():
    """For users with jax_numpy_dtype_promotion='strict'."""
    targets, _ = make_targets([2, 0], SLOTS, C)
    with jax.numpy_dtype_promotion('strict'):
        jax.eval_shape(losses.set_loss, random_outputs(2), targets)


@pytest.fixture(scope='module')
def hf():
    return make_hf(TINY, num_classes=C)


@pytest.mark.parametrize('counts', [(3, 1, 0, 9), (1,), (0, 0), (9, 9)])
def test_loss_and_gradients_are_those_of_transformers(counts, hf):
    B = len(counts)
    ours, theirs = make_targets(counts, SLOTS, C)
    outputs = random_outputs(B)
    expected, parts, grads = transformers_loss(outputs, theirs, hf.config)
    # transformers takes one mean over the batch, which is one group of all its images
    of = lambda o: set_loss(o, ours, images_per_group=B)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(of, has_aux=True))(outputs)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    for name in ('loss_ce', 'loss_bbox', 'loss_giou', 'cardinality_error'):
        assert float(metrics[name]) == pytest.approx(parts[name], rel=1e-5, abs=1e-7)
    for name, grad in grads.items():
        np.testing.assert_allclose(gradients[name], grad, rtol=1e-5, atol=1e-7)


def test_gradients_of_every_weight_are_those_of_transformers(hf):
    ours, theirs = make_targets((3, 0), SLOTS, C)
    images = [noise(64, 96, seed) for seed in (0, 1)]
    hf.zero_grad()
    hf(pixel_values=torch.cat([to_torch(image) for image in images]), labels=theirs).loss.backward()
    yolos = Yolos(**TINY, num_classes=C, eps=1e-12)
    params = names.to_params(reference_tensors(hf), yolos)
    patches, grid = patchify(images)

    def loss(params):
        return set_loss(yolos.apply({'params': params}, patches, grid), ours, 2)[0]

    gradients = hf_names.from_reference(names.from_params(jax.jit(jax.grad(loss))(params), yolos))
    expected = {k.replace('.interpolation.', '.'): v.grad for k, v in hf.named_parameters()}
    assert gradients.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        # that of the keys' bias is zero but for rounding: softmax does not see it
        scale = largest if name.endswith('key.bias') else float(grad.abs().max())
        np.testing.assert_allclose(
            gradients[name].numpy(), grad, atol=1e-5 * scale, rtol=1e-5, err_msg=name
        )


def test_the_class_loss_is_a_mean_over_groups_of_images(hf):
    """As on 4 GPUs with 2 images each: every GPU takes its own weighted mean."""
    counts = (3, 1, 0, 9, 0, 0, 2, 1)
    ours, theirs = make_targets(counts, SLOTS, C)
    outputs = random_outputs(8)
    each = []
    for i in range(0, 8, 2):
        part = {name: value[i : i + 2] for name, value in outputs.items()}
        each.append(transformers_loss(part, theirs[i : i + 2], hf.config)[1]['loss_ce'])
    _, metrics = set_loss(outputs, ours, images_per_group=2)
    assert float(metrics['loss_ce']) == pytest.approx(np.mean(each), rel=1e-5)
    assert float(metrics['loss_ce']) != pytest.approx(
        float(set_loss(outputs, ours, 8)[1]['loss_ce']), rel=1e-3
    )


@pytest.mark.parametrize(
    ('counts', 'images_per_group', 'divisor'),
    [
        ((1, 0, 2, 0, 1, 0, 1, 0), 1, 8),  # fewer objects than groups
        ((0,) * 8, 1, 8),
        ((1, 0, 0, 0, 1, 0, 0, 0), 2, 4),  # fewer than groups of two
        ((1, 0, 2, 0, 1, 0, 1, 0), 2, 5),
        ((3, 1, 0, 9, 0, 0, 2, 1), 1, 16),
    ],
)
def test_box_losses_are_divided_by_the_objects_and_at_least_by_the_groups(
    counts, images_per_group, divisor, hf
):
    """The reference: num_boxes = clamp(objects / GPUs, min=1), then a mean over the GPUs' gradients."""
    ours, theirs = make_targets(counts, SLOTS, C)
    outputs = random_outputs(8)
    gpus, sums = 8 // images_per_group, {'loss_bbox': 0.0, 'loss_giou': 0.0}
    for i in range(0, 8, images_per_group):  # a GPU's loss, times its own divisor: the sum over its boxes
        part = {name: value[i : i + images_per_group] for name, value in outputs.items()}
        labels = theirs[i : i + images_per_group]
        own = max(sum(len(label['boxes']) for label in labels), 1)
        parts = transformers_loss(part, labels, hf.config)[1]
        sums = {name: total + own * parts[name] for name, total in sums.items()}
    clamped = max(sum(counts) / gpus, 1)
    _, metrics = set_loss(outputs, ours, images_per_group)
    for name, total in sums.items():
        assert float(metrics[name]) == pytest.approx(total / clamped / gpus, rel=1e-5, abs=1e-7)
        assert float(metrics[name]) == pytest.approx(total / divisor, rel=1e-5, abs=1e-7)


def test_values_at_padded_targets_are_ignored():
    ours, _ = make_targets((3, 1), SLOTS, C)
    outputs = random_outputs(2)
    grad = jax.grad(lambda o, t: set_loss(o, t)[0])
    clean = grad(outputs, ours)
    for bad in (np.nan, 0.0, -1.0):
        dirty = dict(ours, boxes=np.where(ours['valid'][..., None], ours['boxes'], np.float32(bad)))
        dirty['labels'] = np.where(ours['valid'], ours['labels'], -7)
        for name, value in grad(outputs, dirty).items():
            np.testing.assert_array_equal(value, clean[name])


def test_more_slots_never_change_the_loss():
    few, _ = make_targets((3, 1), 4, C)
    many = {k: np.pad(v, [(0, 0), (0, 36)] + [(0, 0)] * (v.ndim - 2)) for k, v in few.items()}
    outputs = random_outputs(2)
    assert float(set_loss(outputs, few)[0]) == float(losses.set_loss(outputs, many)[0])


def test_more_objects_than_queries_are_counted():
    ours, _ = make_targets((15, 2), 15, C)
    outputs = random_outputs(2)
    loss, metrics = set_loss(outputs, ours)
    assert int(metrics['dropped_targets']) == 3
    assert np.isfinite(loss)
    _, metrics = set_loss(outputs, ours | {'dropped': np.array([4, 0], np.int32)})  # before they came here
    assert int(metrics['dropped_targets']) == 3 + 4
    outputs['pred_logits'] = np.eye(C + 1, dtype=np.float32)[np.full((2, Q), C)]  # "no object" everywhere
    assert float(set_loss(outputs, ours)[1]['class_error']) == 100


def test_a_label_outside_the_classes_makes_the_loss_nan():
    ours, _ = make_targets((2, 1), SLOTS, C)
    for label in (C, C + 1, -1):
        labels = ours['labels'].copy()
        labels[0, 1] = label
        assert np.isnan(set_loss(random_outputs(2), ours | {'labels': labels})[0])
        labels = ours['labels'].copy()
        labels[0, 2] = label  # padding
        assert np.isfinite(set_loss(random_outputs(2), ours | {'labels': labels})[0])


def test_images_without_a_slot_for_an_object_have_a_loss():
    none = {'labels': np.zeros((2, 0), np.int32), 'boxes': np.zeros((2, 0, 4), np.float32)}
    none |= {'valid': np.zeros((2, 0), bool)}
    ours, _ = make_targets((0, 0), SLOTS, C)
    expected = float(set_loss(random_outputs(2), ours)[0])
    assert float(set_loss(random_outputs(2), none)[0]) == pytest.approx(expected, rel=1e-6)


def test_class_error_is_the_share_of_matched_queries_with_a_wrong_class():
    ours, _ = make_targets((4,), SLOTS, C)
    outputs = random_outputs(1)
    outputs['pred_boxes'] = np.pad(ours['boxes'][:, :4], [(0, 0), (0, Q - 4), (0, 0)], 'edge')
    logits = np.zeros((1, Q, C + 1), np.float32)
    for i, label in enumerate(ours['labels'][0, :4]):
        logits[0, i, label if i else (label + 1) % C] = 5
    logits[0, 4:, C] = 5
    logits[0, 4, (ours['labels'][0, 3] + 1) % C] = 9  # of no object: not an error of the matched ones
    outputs['pred_logits'] = logits
    _, metrics = set_loss(outputs, ours)
    assert float(metrics['class_error']) == 25
    none, _ = make_targets((0,), SLOTS, C)
    assert float(set_loss(outputs, none)[1]['class_error']) == 100


def test_the_loss_of_a_sharded_batch_is_the_same():
    ours, _ = make_targets((3, 1, 0, 9, 0, 0, 2, 1), SLOTS, C)
    outputs = random_outputs(8)
    alone, _ = set_loss(outputs, ours, 1)
    mesh = meshes.make_mesh()
    with jax.set_mesh(mesh):
        spread = [meshes.shard(x, mesh) for x in (outputs, ours)]
        together, _ = jax.jit(losses.set_loss, static_argnums=2)(*spread, 1)
    assert float(together) == pytest.approx(float(alone), rel=1e-6)


def test_groups_must_divide_the_batch():
    ours, _ = make_targets((3, 1, 1), SLOTS, C)
    with pytest.raises(ValueError, match='groups of 2'):
        set_loss(jax.tree.map(jnp.asarray, random_outputs(3)), ours, 2)


def test_a_group_on_two_devices_is_refused_in_parts_of_a_batch():
    outputs, (targets, _) = random_outputs(2), make_targets((1, 2), SLOTS, C)
    whole = {name: np.concatenate([x, x]) for name, x in targets.items()}
    loss = lambda: losses.set_loss(outputs, targets, images_per_group=2, whole=whole)
    with jax.set_mesh(meshes.make_mesh(jax.devices()[:2])):
        with pytest.raises(ValueError, match="a device's rows of a part"):
            jax.eval_shape(loss)
        jax.eval_shape(lambda: losses.set_loss(outputs, targets, images_per_group=2))  # not in parts
    jax.eval_shape(loss)  # on one device
