"""Teachers and starting weights of pre-training: classifiers in a file, and logits."""

import io
import json

import jax
import numpy as np
import pytest
import torch
from helpers import read_deit
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch.nn import functional

from yolos_jax import classifier
from yolos_jax.classifier import Classifier
from yolos_jax.data.labelled import LabelledImages
from yolos_jax.errors import InputError
from yolos_jax.patches import MEAN, STD
from yolos_jax.run.pretraining import start_params
from yolos_jax.run.teacher import make_teacher, read_classifier, read_logits
from yolos_jax.weights import deit

CLASSES = [str(number) for number in range(20)]
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
    fresh = jax.device_get(classifier.init_params(larger, jax.random.key(1)))
    started, _ = start_params(tmp_path, larger, fresh, CLASSES)
    old, new = (torch.from_numpy(p['backbone']['pos_embed'].copy()) for p in (params, started))
    square = old[0, 1:17].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = functional.interpolate(square, (6, 6), mode='bicubic').permute(0, 2, 3, 1).reshape(36, -1)
    np.testing.assert_allclose(new[0, 1:37], expected, atol=1e-6)
    np.testing.assert_array_equal(new[0, [0, -1]], old[0, [0, -1]])
    jax.tree.map(np.testing.assert_array_equal, started['head_dist'], params['head_dist'])
    fresh = jax.device_get(classifier.init_params(student.clone(num_classes=7), jax.random.key(1)))
    of_seven, notes = start_params(tmp_path, student.clone(num_classes=7), fresh, CLASSES[:7])
    jax.tree.map(np.testing.assert_array_equal, of_seven['head'], fresh['head'])
    jax.tree.map(np.testing.assert_array_equal, of_seven['backbone'], params['backbone'])
    assert 'it has 20 classes, not 7: the heads start fresh' in notes
    with pytest.raises(InputError, match='a classifier with heads 2, not 4'):
        start_params(tmp_path, student.clone(heads=4), params, CLASSES)


def test_a_classifier_of_other_classes_is_no_teacher_and_gives_no_heads(tmp_path):
    params = jax.device_get(classifier.init_params(MODEL, jax.random.key(0)))
    deit.write(params, MODEL, tmp_path / 'deit.pth', {'classes': CLASSES})
    others = [*CLASSES[:-1], 'zebra']
    config = ConfigDict({'teacher': str(tmp_path)})
    says = 'it has other classes, such as 19, not zebra'
    with pytest.raises(InputError, match=says) as error:
        make_teacher(config, MODEL, LabelledImages('', others, *[None] * 3, 1, 0), 1)
    assert error.value.argument == 'teacher'
    known = LabelledImages('', CLASSES, *[None] * 3, 1, 0)
    teacher = make_teacher(config, MODEL.clone(size=96), known, 1)  # its positions are resampled
    assert teacher.params['backbone']['pos_embed'].shape == (1, 1 + 36, 64)
    started, notes = start_params(tmp_path, MODEL, jax.tree.map(np.zeros_like, params), others)
    assert not started['head']['kernel'].any() and 'such as 19, not zebra: the heads' in notes[1]
    started, notes = start_params(tmp_path, MODEL, params, CLASSES)
    assert len(notes) == 1


@pytest.mark.parametrize('heads', [None, 5, 0.5, '2', float('nan')])
def test_a_file_without_its_number_of_heads_is_named_with_the_flag(heads, tmp_path):
    model = MODEL.clone(width=36, heads=2)
    params = classifier.init_params(model, jax.random.key(0))
    deit.write(params, model, tmp_path / 'deit.pth', {'heads': heads})
    with pytest.raises(InputError, match='deit.pth: does not say how many heads a width of 36') as error:
        read_classifier(tmp_path, 'teacher')
    assert error.value.argument == 'teacher'


def test_the_pixel_statistics_of_timm_go_into_the_patch_projection(tmp_path):
    params = jax.device_get(classifier.init_params(MODEL, jax.random.key(0)))
    deit.write(params, MODEL, tmp_path / 'deit.pth')
    content = torch.load(tmp_path / 'deit.pth', weights_only=True)['model']
    save_file({name: x.contiguous() for name, x in content.items()}, tmp_path / 'model.safetensors')
    halves = {'mean': [0.5] * 3, 'std': [0.5] * 3}
    (tmp_path / 'config.json').write_text(json.dumps({'pretrained_cfg': halves}))
    _, folded = read_deit(tmp_path / 'model.safetensors')
    for name, content in ('preprocessor_config.json', halves), ('config.json', {'mean': [0.1] * 3}):
        (tmp_path / name).write_text(json.dumps(content))  # a preprocessor's come first
    (tmp_path / 'model.safetensors.sha256').unlink()
    _, again = read_deit(tmp_path / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, again, folded)
    pixels = np.random.default_rng(0).random((9, 256, 3))  # of patches
    ours, theirs = (((pixels - x) / y).reshape(9, 768) for x, y in ((MEAN, STD), (0.5, 0.5)))
    before, after = (p['backbone']['patch_embed']['proj'] for p in (params, folded))
    expected = theirs @ before['kernel'] + before['bias']
    np.testing.assert_allclose(ours @ after['kernel'] + after['bias'], expected, atol=1e-5)
    (tmp_path / 'preprocessor_config.json').write_text('{"do_normalize": false}')  # pixels in 0..1
    (tmp_path / 'model.safetensors.sha256').unlink()
    after = read_deit(tmp_path / 'model.safetensors')[1]['backbone']['patch_embed']['proj']
    expected = pixels.reshape(9, 768) @ before['kernel'] + before['bias']
    np.testing.assert_allclose(ours @ after['kernel'] + after['bias'], expected, atol=1e-5)


@pytest.mark.parametrize('content', ['empty', 'npz', 'nan', 'text', 'cut npz', 'header', 'few'])
def test_an_invalid_file_of_logits_is_named(content, tmp_path):
    path = tmp_path / 'logits.npy'
    with open(path, 'wb') as file:
        if content == 'npz':
            np.savez(file, a=np.zeros(2), b=np.zeros(3))
        elif content == 'nan':
            np.save(file, np.full((6, 3), np.nan))
        elif content == 'text':
            np.save(file, np.full((6, 3), 'x'))
        elif content == 'cut npz':
            file.write(b'PK\x03\x04')
        elif content == 'header':
            np.save(saved := io.BytesIO(), np.zeros((6, 3)))
            file.write(saved.getvalue().replace(b'}', b'u'))
        elif content == 'few':
            np.save(file, np.zeros((5, 3)))
    with pytest.raises(InputError, match='logits.npy'):
        read_logits(path, 6, 3)
