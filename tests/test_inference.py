import dataclasses
import functools
import json
import pickle

import jax
import numpy as np
import pytest
import torch
from helpers import CLASSES, TINY, forward, make_hf, noise, read_detector
from PIL import Image

from yolos_jax import evaluation, steps
from yolos_jax.data import annotations, geometry, records
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError
from yolos_jax.inference import Detector
from yolos_jax.patches import patchify
from yolos_jax.prepared import sequence_lengths
from yolos_jax.run import mesh as meshes
from yolos_jax.tools import evaluate
from yolos_jax.weights import integrity


def test_detections_are_those_of_evaluation(saved, coco_folder):
    """The same boxes, in pixels of the image given, whether through Detector or eval.py's path."""
    data = records.read(coco_folder, 'val2017')
    pretrained = read_detector(saved)
    mesh = meshes.make_mesh(jax.devices()[:1])
    batches = EvalBatches(data, size=pretrained.size, max_size=pretrained.max_size, batch_size=4)
    predict = meshes.make_predictor(steps.make_predict_step(pretrained.model), mesh)
    outputs = evaluation.detect(functools.partial(predict, pretrained.params), batches)
    results = evaluation.to_results(outputs, data, {i: i for i in range(4)})
    detections = Detector(pretrained)([data.name(i) for i in range(len(data))], threshold=0)
    for image_id, one in zip(data.ids, detections, strict=True):
        expected = sorted((r for r in results if r['image_id'] == image_id), key=lambda r: -r['score'])
        np.testing.assert_allclose(one.scores, [r['score'] for r in expected], atol=1e-6)
        x, y, w, h = np.array([r['bbox'] for r in expected]).T
        np.testing.assert_allclose(one.boxes, np.stack([x, y, x + w, y + h], 1), atol=1e-3)
        assert one.labels.tolist() == [r['category_id'] for r in expected]


def test_a_panorama_gets_a_sequence_long_enough_for_its_positions(saved):
    """Its positions are those of a long sequence, in a `Detector` and in an evaluation."""
    pretrained = read_detector(saved)
    image, long = noise(32, 16 * 150), 150 * 75
    patches, grid = patchify([image], long)
    expected = forward(pretrained.model, pretrained.params, patches, grid)['pred_boxes'][0]
    detector = Detector(dataclasses.replace(pretrained, size=32, max_size=4000))
    (one,) = detector([image], threshold=0)
    centres = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2 / (16 * 150, 32)
    nearest = np.abs(centres[:, None] - np.asarray(expected)[None, :, :2]).max(-1).min(1)
    assert len(centres) and nearest.max() < 1e-4
    assert geometry.fixed([32], [16 * 150], 32, 4000).lengths == [75**2]


def test_arrays_pictures_and_paths_give_the_same_detections(saved, tmp_path):
    image = noise(60, 80)
    Image.fromarray(image).save(tmp_path / 'x.png')
    detector = Detector.from_pretrained(saved)
    path = tmp_path / 'x.png'
    for other in detector([Image.fromarray(image), path, str(path), path.read_bytes()], 0):
        np.testing.assert_array_equal(detector(image, 0).boxes, other.boxes)


def test_the_threshold_is_the_least_score_and_the_best_come_first(saved):
    detector = Detector.from_pretrained(saved)
    (every,) = detector([noise(60, 80)], 0)
    assert (np.diff(every.scores) <= 0).all() and len(every.names) == TINY['num_det_tokens']
    (some,) = detector([noise(60, 80)], float(every.scores[2]))
    np.testing.assert_array_equal(some.scores, every.scores[:3])
    default = [len(one) for one in (detector(noise(60, 80)), *detector.stream([noise(60, 80)]))]
    assert default == [np.sum(every.scores >= 0.5)] * 2 and default[0] < len(every)


@pytest.mark.parametrize('image', [noise(5, 5).astype(float), noise(5, 5)[:0], noise(5, 5)[..., :2], 7])
def test_an_argument_that_is_not_an_image_is_named(image, saved):
    with pytest.raises(InputError, match='an image is'):
        Detector.from_pretrained(saved)(image)


def test_one_image_gives_one_result_and_a_list_gives_a_list(saved):
    detector = Detector.from_pretrained(saved)
    np.testing.assert_array_equal(detector(noise(60, 80), 0).boxes, detector([noise(60, 80)], 0)[0].boxes)
    assert detector([]) == [] and len(detector((noise(60, 80),) * 3)) == 3


@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_list_is_computed_in_batches_with_equal_results(batch_size, saved):
    pretrained = read_detector(saved)
    detector, alone = Detector(pretrained, batch_size=batch_size), Detector(pretrained)
    images = [noise(30 + 7 * i, 90 - 3 * i, i) for i in range(20)]
    for image, one in zip(images, detector(images, 0), strict=True):
        expected = alone(image, 0)
        np.testing.assert_allclose(one.boxes, expected.boxes, atol=2e-4)
        np.testing.assert_allclose(one.scores, expected.scores, atol=2e-6)
        assert one.image is image


def test_images_that_change_after_they_were_given_are_detected_as_they_were(saved, tmp_path):
    detector, pictures = Detector.from_pretrained(saved), [noise(60, 80, i) for i in range(9)]
    expected = [detector(picture, 0).scores for picture in pictures]

    def refilled():
        buffer = np.zeros((60, 80, 3), np.uint8)
        for picture in pictures:
            buffer[:] = picture
            yield buffer
        buffer[:] = 0

    def closed():
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / f'{i}.png')
            with Image.open(tmp_path / f'{i}.png') as image:
                yield image

    for images in (refilled(), closed()):
        for one, scores, picture in zip(detector.stream(images, 0), expected, pictures, strict=True):
            np.testing.assert_allclose(one.scores, scores, atol=2e-6)
            np.testing.assert_array_equal(np.asarray(one.image), picture)
    (one,) = detector.stream([tmp_path / '3.png'], pixels=True)
    np.testing.assert_array_equal(one.image, pictures[3])
    lazy = Image.open(tmp_path / '3.png')
    for one in detector([lazy] * 8, 0):
        np.testing.assert_allclose(one.scores, expected[3], atol=2e-6)


def test_gray_rgba_and_16_bit_arrays_give_the_detections_of_their_files(saved, tmp_path):
    detector, rng = Detector.from_pretrained(saved), np.random.default_rng(0)
    deep = rng.integers(0, 65536, (60, 80), dtype=np.uint16)
    for name, array in {
        'gray.png': noise(60, 80)[..., 0],
        'rgba.png': np.concatenate([noise(60, 80), noise(60, 80, 1)[..., :1]], axis=2),
        'deep.png': deep,
        'deep.pgm': deep,
    }.items():
        file = tmp_path / name
        Image.fromarray(array).save(file)
        forms = [file, str(file), array, Image.open(file), array[..., None] if array.ndim == 2 else array]
        forms.append(array.astype(array.dtype.newbyteorder('>')))
        expected, *others = detector(forms, 0)
        for other in [*others, *detector.stream([Image.open(file)], 0)]:
            np.testing.assert_array_equal(other.boxes, expected.boxes)


def test_a_photograph_of_pillow_is_turned_upright_as_its_file_is(saved, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(60, 80)).save(tmp_path / 'x.png', exif=exif)
    file = tmp_path / 'x.png'
    path, *others = Detector.from_pretrained(saved)([file, Image.open(file), file.read_bytes()], 0)
    for other in others:
        assert path.size == other.size == (80, 60)
        np.testing.assert_array_equal(path.boxes, other.boxes)


def test_a_stream_is_read_no_further_than_a_few_batches_ahead(saved):
    detector, asked = Detector.from_pretrained(saved), []

    def images():
        for i in range(1000):
            asked.append(i)
            yield noise(60, 80)

    results = detector.stream(images())
    for _ in range(5):
        next(results)
    assert len(asked) < 40


def test_the_results_of_images_before_an_error_of_the_caller_come_first(saved):
    def images():
        yield from [noise(60, 80)] * 9
        raise OSError('unplugged')

    results = Detector.from_pretrained(saved).stream(images())
    assert len([next(results) for _ in range(9)]) == 9
    with pytest.raises(OSError, match='unplugged'):
        next(results)


def test_one_image_is_no_stream(saved, tmp_path):
    detector, image = Detector.from_pretrained(saved), noise(60, 80)
    for one in (image, image[..., 0], Image.fromarray(image), tmp_path / 'x.jpg', 'x.jpg'):
        with pytest.raises(InputError, match=r'for one image give \[image\]'):
            next(detector.stream(one))
    assert len(list(detector.stream(np.stack([image, image])))) == 2


def test_a_bad_image_raises_its_error_or_yields_it_in_its_place(saved, tmp_path):
    (tmp_path / 'bad.jpg').write_bytes(b'<html>')
    images = [noise(60, 80), tmp_path / 'bad.jpg', noise(60, 90)]
    detector = Detector.from_pretrained(saved)
    first, error, last = detector.stream(images, errors=True)
    assert isinstance(error, InputError) and 'bad.jpg' in str(error) and first.size != last.size
    with pytest.raises(InputError, match='bad.jpg'):
        detector(images)
    others = torch.zeros(60, 80, 3, dtype=torch.bfloat16), torch.zeros(60, 80, 3, requires_grad=True), '\0'
    assert all(isinstance(error, InputError) for error in detector.stream(others, errors=True))


def test_labels_are_the_category_ids_of_the_training_data(saved):
    pretrained, ids = read_detector(saved), {'1': 700_000_123, '2': 41, '3': 5, '0': 0}
    others = dataclasses.replace(pretrained, about={'category_ids': ids})
    plain, mapped = Detector(pretrained)(noise(60, 80), 0), Detector(others)(noise(60, 80), 0)
    assert mapped.labels.tolist() == [ids[str(label)] for label in plain.labels]
    assert mapped.names == plain.names
    assert Detector(others).classes == {700_000_123: 'circle', 41: 'square', 5: 'triangle'}


def test_detections_can_be_counted_looked_at_and_passed_on(saved):
    detections = Detector.from_pretrained(saved)(noise(60, 80), 0)
    assert len(detections) == TINY['num_det_tokens'] and repr(detections).startswith('<7 detections: ')
    first = next(iter(detections))
    assert (first.score, first.name) == (float(detections.scores[0]), detections.names[0])
    assert [one['name'] for one in detections.to_list()] == detections.names
    others = detections.to_supervision()
    np.testing.assert_array_equal(others.xyxy, detections.boxes)
    np.testing.assert_array_equal(others.confidence, detections.scores)
    assert others.data['class_name'].tolist() == detections.names
    assert detections.draw().size == (480, 360)
    assert detections._repr_png_().startswith(b'\x89PNG')
    with pytest.raises(InputError, match='a mask has to be an array'):
        detections[detections.names == 'cat']
    nothing = dataclasses.replace(detections, image=None)
    assert nothing._repr_png_() is None and nothing.draw(noise(60, 80)).size == (480, 360)
    with pytest.raises(InputError, match='no image to draw on'):
        nothing.draw()


def test_detections_are_drawn_on_the_image_at_another_size(saved):
    image = Image.fromarray(np.full((480, 640, 3), 128, np.uint8))
    detections = Detector.from_pretrained(saved)(image, 0)[:1]
    for scale in (1, 2):
        picture = np.array(detections.draw(image.resize((640 * scale, 480 * scale))))
        rows, columns = np.nonzero(picture.std(axis=2) > 0)
        x0, _, _, y1 = np.clip(detections.boxes[0], 0, [640, 480, 640, 480]) * scale
        assert abs(columns.min() - x0) < 8 * scale and abs(rows.max() - y1) < 8 * scale


def test_detections_are_indexed_and_are_results_of_coco(saved):
    detections = Detector.from_pretrained(saved)(noise(60, 80), 0)
    assert detections[0].score == detections.scores[0] and detections[-1].label == detections.labels[-1]
    assert len(detections[:2]) == 2 and len(detections[detections.scores > 2]) == 0
    first = json.loads(json.dumps(detections.to_coco(7)))[0]
    x0, y0, x1, y1 = detections.boxes[0]
    np.testing.assert_allclose(first.pop('bbox'), [x0, y0, x1 - x0, y1 - y0], rtol=1e-5)
    score, label = detections.scores[0], detections.labels[0]
    assert first == {'image_id': 7, 'category_id': label, 'score': pytest.approx(score)}


def test_arrays_of_other_libraries_are_images(saved):
    detector, image = Detector.from_pretrained(saved), noise(60, 80)
    numpy, jax_, torch_ = detector([image, jax.numpy.asarray(image), torch.tensor(image)], 0)
    np.testing.assert_array_equal(numpy.boxes, jax_.boxes)
    np.testing.assert_array_equal(numpy.boxes, torch_.boxes)


def test_a_detector_computes_in_the_type_asked_for(saved):
    half = Detector.from_pretrained(saved, dtype='bfloat16', device=jax.devices()[3])
    assert half.model.dtype == pickle.loads(pickle.dumps(half)).model.dtype == 'bfloat16'
    assert {x.device for x in jax.tree.leaves(half.params)} == {jax.devices()[3]}
    exact = Detector.from_pretrained(saved)
    a, b = (d.outputs({k: v[None] for k, v in d.prepare(noise(60, 80))._asdict().items()
                       if k in ('patches', 'grid')})['scores'] for d in (half, exact))  # fmt: skip
    assert 0 < np.abs(a - b).max() < 0.05


def test_arguments_of_another_kind_are_named(saved):
    detector = Detector.from_pretrained(saved)
    for threshold in (50, np.nan, 'x.jpg'):
        with pytest.raises(InputError, match='not a number of at most 1'):
            detector(noise(60, 80), threshold)
    with pytest.raises(InputError, match='from_pretrained'):
        Detector(str(saved))
    for size in (-1, 0, '4'):
        with pytest.raises(InputError, match=f'batch_size is {size!r}'):
            Detector.from_pretrained(saved, batch_size=size)
    with pytest.raises(InputError, match="dtype is 'float16'"):
        Detector.from_pretrained(saved, dtype='float16')
    with pytest.raises(InputError, match="device is 'cpu', not one of jax.devices"):
        Detector.from_pretrained(saved, device='cpu')
    with pytest.raises(TypeError, match="argument 'batchsize'"):
        Detector.from_pretrained('a name whose download takes a minute', batchsize=3)
    with pytest.raises(InputError, match='a class has the number 4, and the model 4 classes'):
        dataclasses.replace(read_detector(saved), classes={1: 'cat', 4: 'dog'})


def test_a_detector_is_pickled_for_other_processes(saved):
    detector = Detector.from_pretrained(saved, batch_size=3)
    copy = pickle.loads(pickle.dumps(detector))
    assert (copy.batch_size, copy.classes) == (3, detector.classes)
    assert repr(copy) == repr(detector) == 'Detector(width=32, depth=3, classes=3, size=64, dtype=float32)'
    assert copy.fingerprint() == detector.fingerprint()
    expected, detections = detector(noise(60, 80), threshold=0), copy(noise(60, 80), threshold=0)
    np.testing.assert_array_equal(detections.boxes, expected.boxes)


def test_a_fingerprint_changes_with_all_that_detections_depend_on(saved):
    pretrained = read_detector(saved)
    doubled = jax.tree.map(lambda x: 2 * x, pretrained.params)
    changes = {'size': 80}, {'max_size': 96}, {'classes': {1: 'circle'}}, {'params': doubled}
    detectors = [Detector(dataclasses.replace(pretrained, **change)) for change in ({}, *changes)]
    detectors.append(Detector(pretrained, dtype='bfloat16'))
    assert len({detector.fingerprint() for detector in detectors}) == 6


def test_eval_takes_flags_for_what_the_file_of_a_custom_model_lacks(coco_folder, tmp_path, capsys):
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
    assert 'replaces the class names' not in capsys.readouterr().out
    about = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['about']
    assert about['size'] == [64, 96] and len(about['sha256']) == 64 and about['split'] == 'val2017'


def test_eval_at_another_size_bounds_the_longer_side_in_proportion(saved, coco_folder, tmp_path):
    options = [f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--num_processes=1']
    evaluate.main([*options, '--size=96'])
    about = json.loads((tmp_path / 'metrics.json').read_text())['about']
    assert about['size'] == [96, 192] and about['dtype'] == 'float32'
    assert about['fingerprint'] == integrity.fingerprint(read_detector(saved).params)


@pytest.mark.parametrize(
    ('extra', 'says'),
    [
        (['--data=/nowhere', '--images=/nowhere'], 'images is /nowhere, which has no effect without json'),
        (['--data=/nowhere', '--json=/nowhere.json'], 'data and json are both given'),
        (
            ['--data={data}', '--classes={tmp}/large.json'],
            'large.json: has a class 4, and the model 4 classes',
        ),
        (['--data={data}', '--size=0'], 'size is 0, less than a patch'),
    ],
)
def test_unused_or_invalid_options_of_eval_are_refused(extra, says, saved, coco_folder, tmp_path):
    categories = [{'id': 10_000 + i, 'name': str(i)} for i in range(5)]
    content = {'images': [], 'annotations': [], 'categories': categories}
    (tmp_path / 'large.json').write_text(json.dumps(content))
    extra = [x.format(data=coco_folder, tmp=tmp_path) for x in extra]
    with pytest.raises(InputError, match=says):
        evaluate.main([f'--weights={saved}', f'--output={tmp_path / "out"}', '--num_processes=1', *extra])


def test_names_of_classes_with_large_ids_are_those_of_the_file(saved, tmp_path):
    categories = [{'id': 10_000 + i, 'name': str(i)} for i in range(4)]
    content = {'images': [], 'annotations': [], 'categories': categories}
    (tmp_path / 'large.json').write_text(json.dumps(content))
    pretrained = evaluate.with_names(read_detector(saved), str(tmp_path / 'large.json'))
    assert pretrained.classes == {i: str(i) for i in range(4)}
    assert pretrained.category_ids == {i: 10_000 + i for i in range(4)}


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


def test_photographs_of_common_shapes_are_computed_without_padding(saved):
    assert len(Detector.from_pretrained(saved).prepare(noise(48, 64)).patches) == 4 * 5
    lengths = sequence_lengths(512, 853)
    assert lengths == [32 * 32, 32 * 42, 32 * 48, 32 * 53]
    assert len(sequence_lengths(800, 1333)) == 4 and sequence_lengths(16, 16) == [1]
