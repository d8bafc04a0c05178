import contextlib
import functools
import io
import json
import sys

import jax
import numpy as np
import pytest
from helpers import TINY, annotated, coco_content, forward, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolos_jax import evaluation, losses, steps
from yolos_jax.data import annotations, loader, records
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import mesh as meshes
from yolos_jax.tools import evaluate, predict


def noisy_truth(path, seed=0):
    """Results that are the truth, moved a little, some with a wrong class, some missing."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in json.loads(path.read_text())['annotations']:
        if rng.random() < 0.8:
            results.append(
                {
                    'image_id': annotation['image_id'],
                    'category_id': annotation['category_id'] if rng.random() < 0.8 else 1,
                    'bbox': [float(x + rng.normal(0, 2)) for x in annotation['bbox']],
                    'score': float(rng.random()),
                }
            )
    return results


def test_the_numbers_are_cocoevals_to_the_last_digit(coco_folder, tmp_path):
    path, content = tmp_path / 'with_crowds.json', annotated(coco_folder, 'val2017')
    for annotation in content['annotations'][::4]:
        annotation['iscrowd'] = 1
    path.write_text(json.dumps(content))
    results = noisy_truth(path)
    numbers, _ = evaluation.score(annotations.read(path), results)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        expected = COCOeval(truth, truth.loadRes(results), 'bbox')
        for stage in (expected.evaluate, expected.accumulate, expected.summarize):
            stage()
    assert list(numbers.values()) == expected.stats.tolist()
    assert 0.1 < numbers['AP'] < 0.9


def test_the_ap_of_all_classes_is_the_mean_of_each(coco_folder):
    path = coco_folder / 'annotations' / 'instances_val2017.json'
    results = noisy_truth(path)
    before = [r | {'bbox': [0, 0, 1, 1], 'score': 2.0} for r in results for _ in range(10)]
    numbers, classes = evaluation.score(annotations.read(path), results + before)
    assert set(classes) == {'circle', 'square', 'triangle'}
    assert np.mean(list(classes.values())) == pytest.approx(numbers['AP']) and numbers['AP'] > 0


def test_a_negative_area_counts_as_a_missing_one(tmp_path):
    content = coco_content()
    content['annotations'][0]['area'], content['annotations'][1]['area'] = -3, 0
    truth = records.read(write_coco(tmp_path, content), 'val').truth()
    areas = [a['area'] for a in evaluation.coco_content(truth)['annotations']]
    assert areas == [30 * 40, 0, 81, 0]


def test_no_detections_are_an_ap_of_zero(coco_folder):
    path = coco_folder / 'annotations' / 'instances_val2017.json'
    numbers, _ = evaluation.score(annotations.read(path), [])
    assert numbers['AP'] == 0 and numbers['AR100'] == 0


def test_classes_that_coco_does_not_have_cannot_count(coco_folder):
    """COCO ids have gaps; a detection whose id lies in a gap counts for no class."""
    path = coco_folder / 'annotations' / 'instances_val2017.json'
    results = noisy_truth(path)
    extra = [dict(r, category_id=99) for r in results]
    assert evaluation.score(annotations.read(path), results + extra) == evaluation.score(
        annotations.read(path), results
    )


def test_boxes_are_written_in_pixels_of_the_original_image():
    detections = {'scores': [0.5], 'labels': [3], 'boxes': [[0.25, 0.5, 0.75, 1.0]]}
    assert evaluation.to_coco(9, detections, (200, 400), {3: 3}) == [
        {'image_id': 9, 'category_id': 3, 'bbox': [100.0, 100.0, 200.0, 100.0], 'score': 0.5}
    ]
    detections = {'scores': [0.123456789], 'labels': [3], 'boxes': [[0, 0, 1 / 3, 1 / 7]]}
    (result,) = evaluation.to_coco(9, detections, (200, 400), {3: 3})
    assert result['bbox'] == [0, 0, 133.3333, 28.5714] and result['score'] == 0.12345679


def test_every_image_is_detected_once_on_any_number_of_devices(coco_folder):
    data = records.read(coco_folder, 'val2017')
    yolos = Yolos(**TINY, num_classes=4)
    params = init_params(yolos, jax.random.key(0))
    predict = steps.make_predict_step(yolos)
    runs = []
    for devices, batch_size in ((1, 3), (8, 8)):
        mesh = meshes.make_mesh(jax.devices()[:devices])
        batches = EvalBatches(data, size=64, max_size=128, batch_size=batch_size)
        step = meshes.make_predictor(predict, mesh)
        detect = functools.partial(step, meshes.replicate(params, mesh))
        outputs = evaluation.detect(detect, batches)
        results = evaluation.to_results(outputs, data, {i: i for i in range(4)})
        assert len(results) == 10 * TINY['num_det_tokens']
        runs.append(sorted(results, key=lambda r: (r['image_id'], -r['score'])))
    for one, other in zip(*runs, strict=True):
        assert (one['image_id'], one['category_id']) == (other['image_id'], other['category_id'])
        np.testing.assert_allclose(one['bbox'], other['bbox'], atol=1e-3)


def test_validation_losses_are_those_of_training_over_the_whole_split(coco_folder):
    """Of batches with rows that have no image, against the set loss of all images at once."""
    data, yolos = records.read(coco_folder, 'val2017'), Yolos(**TINY, num_classes=4)
    params = init_params(yolos, jax.random.key(0))
    mesh = meshes.make_mesh(jax.devices()[:1])
    options = dict(size=64, max_size=128, max_targets=6)
    values = []
    for batch_size in (4, 10):
        batches = EvalBatches(data, batch_size=batch_size, **options)
        step = meshes.make_predictor(steps.make_evaluation_step(yolos), mesh)
        values.append(evaluation.mean_losses(evaluation.detect(functools.partial(step, params), batches)))
    ((_, batch, _),) = loader.load(batches, [0])
    outputs = forward(yolos, params, batch['patches'], batch['grid'])
    total, parts = jax.jit(losses.set_loss)(outputs, batch)
    for value in values:
        assert value['val_loss'] == pytest.approx(float(total), rel=1e-5)
        for name in ('loss_ce', 'loss_bbox', 'loss_giou'):
            assert value[f'val_{name}'] == pytest.approx(float(parts[name]), rel=1e-5)


def test_a_split_without_objects_has_losses():
    outputs = {name: np.zeros(3) for name in ('objects', 'loss_bbox', 'loss_giou')}
    values = evaluation.mean_losses(outputs | {'loss_ce': np.full(3, 0.5)})
    assert values['val_loss_ce'] == 0.5 and values['val_loss_bbox'] == values['val_loss_giou'] == 0


def test_losses_of_few_objects_in_many_images_are_divided_as_in_training():
    one = np.array([1, 0, 0, 0])
    outputs = {'objects': one, 'loss_bbox': 0.4 * one, 'loss_giou': 0.8 * one, 'loss_ce': one}
    values = evaluation.mean_losses(outputs)
    assert values['val_loss_bbox'] == pytest.approx(0.1) and values['val_loss_giou'] == pytest.approx(0.2)


def test_an_evaluation_and_predictions_are_in_different_folders(tmp_path):
    for module, name in ((evaluate, 'predictions.jsonl'), (predict, 'metrics.json')):
        folder = tmp_path / name.partition('.')[0]
        folder.mkdir()
        (folder / name).touch()
        arguments = ['--weights=/nowhere', f'--output={folder}']
        arguments += ['--num_processes=1'] if module is evaluate else [str(tmp_path / 'x.jpg')]
        (tmp_path / 'x.jpg').touch()
        with pytest.raises(InputError, match=r'of which predictions\.json would be replaced') as error:
            module.main(arguments)
        assert error.value.argument == 'output'


def test_a_score_leaves_stdout_to_other_threads_and_pycocotools_as_it_was(coco, capsys):
    class Results(list):
        def __iter__(self):
            assert sys.stdout is stdout  # what another thread prints at this moment is not lost
            return super().__iter__()

    truth, stdout = records.read(coco, 'val').truth(), sys.stdout
    evaluation.score(truth, Results())
    assert not capsys.readouterr().out
    COCO().createIndex()
    assert 'creating index' in capsys.readouterr().out
