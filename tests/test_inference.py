import functools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, make_hf, noise, read_detector
from PIL import Image

import eval as evaluate
import predict
from yolos_jax import evaluation, steps, visualize, weights
from yolos_jax.data import annotations, loader, records
from yolos_jax.errors import InputError
from yolos_jax.inference import Detector
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import mesh as meshes
from yolos_jax.weights import checkpoint

CLASSES = {1: 'circle', 2: 'square', 3: 'triangle'}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """The folder of a small detector with random weights."""
    yolos = Yolos(**TINY, num_classes=4)
    params = init_params(yolos, jax.random.key(0))
    folder = tmp_path_factory.mktemp('weights') / 'x'
    checkpoint.write(weights.Pretrained(yolos, params, CLASSES, 64, 128), folder)
    return folder


def test_detections_are_those_of_evaluation(saved, coco_folder):
    """The same boxes, in pixels of the image given, whether through Detector or eval.py's path."""
    data = records.read(coco_folder, 'val2017')
    pretrained = read_detector(saved)
    mesh = meshes.make_mesh(jax.devices()[:1])
    batches = loader.EvalBatches(data, size=pretrained.size, max_size=pretrained.max_size, batch_size=4)
    predict = meshes.make_predictor(steps.make_predict_step(pretrained.model), mesh)
    results = evaluation.detect(
        functools.partial(predict, pretrained.params), batches, {i: i for i in range(4)}
    )
    detections = Detector(pretrained)([data.name(i) for i in range(len(data))], threshold=0)
    for image_id, one in zip(data.ids, detections, strict=True):
        expected = sorted((r for r in results if r['image_id'] == image_id), key=lambda r: -r['score'])
        np.testing.assert_allclose(one.scores, [r['score'] for r in expected], atol=1e-6)
        x, y, w, h = np.array([r['bbox'] for r in expected]).T
        np.testing.assert_allclose(one.boxes, np.stack([x, y, x + w, y + h], 1), atol=1e-3)
        assert one.labels.tolist() == [r['category_id'] for r in expected]


def test_detections_do_not_depend_on_the_other_images(saved):
    detector = Detector.from_pretrained(saved)
    images = [noise(50, 90), noise(200, 60, 1), noise(16, 300, 2)]
    together = detector(images, threshold=0)
    for image, one in zip(images, together, strict=True):
        (alone,) = detector([image], threshold=0)
        np.testing.assert_array_equal(alone.boxes, one.boxes)


def test_arrays_pictures_and_paths_are_one(saved, tmp_path):
    image = noise(60, 80)
    Image.fromarray(image).save(tmp_path / 'x.png')
    detector = Detector.from_pretrained(saved)
    forms = detector([image, Image.fromarray(image), tmp_path / 'x.png', str(tmp_path / 'x.png')], 0)
    for other in forms[1:]:
        np.testing.assert_array_equal(forms[0].boxes, other.boxes)


def test_the_threshold_is_the_least_score_and_the_best_come_first(saved):
    detector = Detector.from_pretrained(saved)
    (every,) = detector([noise(60, 80)], 0)
    assert (np.diff(every.scores) <= 0).all() and len(every.names) == TINY['num_det_tokens']
    (some,) = detector([noise(60, 80)], float(every.scores[2]))
    np.testing.assert_array_equal(some.scores, every.scores[:3])


@pytest.mark.parametrize('image', [noise(5, 5).astype(float), noise(5, 5)[..., 0], 7])
def test_a_file_that_is_no_image_is_named(image, saved):
    with pytest.raises(InputError, match='an image is'):
        Detector.from_pretrained(saved)([image])


@pytest.mark.parametrize('scale', [4, 1])
def test_boxes_are_drawn_where_they_are(scale):
    image = np.zeros((400 // scale, 480 // scale, 3), np.uint8)
    box = np.float32([[120, 160, 360, 320]]) / scale
    drawn = visualize.draw(image, box, [1], ['circle 0.90'])
    assert drawn.shape == (400, 480, 3)  # a small image is enlarged
    assert drawn[160, 240].any() and drawn[320, 240].any() and drawn[240, 120].any()
    assert not drawn[240, 240].any() and not image.any()  # neither filled, nor the original changed


def test_a_thin_image_is_not_enlarged_beyond_bounds():
    drawn = visualize.draw(np.zeros((1, 40_000, 3), np.uint8), np.zeros((0, 4)), [], [])
    assert drawn.shape == (1, 40_000, 3)
    assert max(visualize.draw(np.zeros((8, 900, 3), np.uint8), np.zeros((0, 4)), [], []).shape) <= 4096


def test_a_detector_says_that_it_does_not_survive_a_fork(saved):
    detector = Detector.from_pretrained(saved)
    detector._process += 1  # as in a child process; a real fork may hang in JAX
    with pytest.raises(RuntimeError, match='after a fork'):
        detector([noise(60, 80)])


def test_eval_takes_what_a_file_of_an_own_model_does_not_say(coco_folder, tmp_path):
    hf = make_hf(TINY, num_classes=4)
    torch.save(hf.state_dict(), tmp_path / 'own.pth')
    annotations = coco_folder / 'annotations' / 'instances_val2017.json'
    options = [f'--weights={tmp_path / "own.pth"}', f'--data={coco_folder}', f'--output={tmp_path / "out"}']
    options += ['--num_processes=1', '--size=64', '--max_size=96', '--batch_size=8']
    with pytest.raises(InputError, match='give heads'):
        evaluate.main(options)
    options += ['--heads=2', '--pos_grid', '4', '6', '--mid_pos_grid', '4', '6']
    with pytest.raises(InputError, match='none of its classes .circle, square') as error:
        evaluate.main(options)
    assert error.value.argument == 'classes'
    evaluate.main([*options, f'--classes={annotations}'])
    about = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['about']
    assert about['size'] == [64, 96] and len(about['sha256']) == 64 and about['split'] == 'val2017'


def test_predict_writes_pictures_and_json(saved, coco_folder, tmp_path):
    image = coco_folder / 'train2017' / '000000000001.jpg'
    folder = coco_folder / 'val2017'
    out = tmp_path / 'out'
    predict.main([f'--weights={saved}', f'--output={out}', '--threshold=0', str(image), str(folder)])
    content = json.loads((out / 'predictions.json').read_text())
    assert len(content) == 11 and len({entry['picture'] for entry in content}) == 11
    for entry in content:
        width, height = Image.open(entry['image']).size
        scale = -(-320 // min(width, height))
        assert Image.open(out / entry['picture']).size == (scale * width, scale * height)
        assert set(entry['detections'][0]) == {'box', 'score', 'label', 'name'}


def test_eval_writes_metrics_and_predictions(saved, coco_folder, tmp_path, capsys):
    options = [f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--num_processes=1']
    evaluate.main(options)
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    predictions = json.loads((tmp_path / 'predictions.json').read_text())
    assert set(metrics['classes']) == set(CLASSES.values()) and len(predictions) == 70
    path = coco_folder / 'annotations' / 'instances_val2017.json'
    numbers, _ = evaluation.score(annotations.read(path), predictions)
    assert {name: metrics[name] for name in numbers} == numbers
    printed = capsys.readouterr().out
    assert 'AP50' in printed and 'triangle' in printed


@pytest.mark.parametrize(
    ('name', 'arguments', 'says'),
    [
        ('predict.py', ['--weights=/nowhere', '--output=out', 'README.md'], '/nowhere: no such file'),
        ('predict.py', ['--weights=/nowhere', '--output=out', '/gone.jpg'], '/gone.jpg: no such file'),
        (
            'eval.py',
            ['--weights=README.md', '--data=.', '--output=out'],
            r'no data set is seen in it.* \(--data\)',
        ),
        (
            'convert_torch_weights.py',
            ['--input=README.md', '--output=configs'],
            r'not empty.* \(--output\)',
        ),
    ],
)
def test_scripts_say_what_is_wrong_in_one_line(name, arguments, says):
    command = [sys.executable, name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(says, done.stderr)
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
