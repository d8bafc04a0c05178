"""The report of an evaluation: its numbers against other implementations, and its page."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import supervision
from browser import needs_browser, opened
from helpers import TINY, make_hf
from pycocotools.cocoeval import COCOeval

from yolos_jax import evaluation
from yolos_jax.analysis import confidence, groups, outcomes, precision, tide
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data import corruptions, pixels, records
from yolos_jax.data.annotations import Annotations, of_images
from yolos_jax.data.batches import start_image
from yolos_jax.errors import InputError
from yolos_jax.tools import evaluate

COLUMNS = 'files heights widths annotation_ids labels crowd areas boxes'.split()
CLASSES = [(1, 'circle'), (2, 'square'), (5, 'triangle'), (7, 'never there')]


def make(seed=0, images=60, crowds=0.06):
    """Annotations and detections with all kinds of errors, several a class and image."""
    random = np.random.default_rng(seed)
    ids = random.permutation(1000)[:images]
    owners = random.choice(ids[: images - 3], 5 * images)  # three images without objects
    sizes = random.uniform(4, 160, (len(owners), 2))
    boxes = np.concatenate([random.uniform(0, 300, (len(owners), 2)), sizes], axis=1)
    truth = Annotations(
        path=None,
        ids=ids,
        files=np.array([f'{number}.jpg' for number in ids]),
        heights=np.full(images, 480),
        widths=np.full(images, 640),
        annotation_ids=np.arange(len(owners)),
        owners=owners,
        labels=random.choice([1, 2, 5], len(owners), p=[0.6, 0.3, 0.1]),
        crowd=random.random(len(owners)) < crowds,
        areas=sizes.prod(axis=1) * random.uniform(0.5, 1, len(owners)),
        boxes=boxes,
        categories=CLASSES,
    )
    results = []
    for owner, label, box in zip(owners, truth.labels, boxes, strict=True):
        for _ in range(random.integers(0, 4)):
            moved = box + random.normal(0, 6, 4)
            other = random.random() < 0.2
            results.append((owner, random.choice([1, 2, 5]) if other else label, moved))
    for owner in random.choice(ids, 2 * images):
        results.append((owner, random.choice([1, 2, 5]), random.uniform(5, 200, 4)))
    return truth, [
        {
            'image_id': int(i),
            'category_id': int(k),
            'bbox': np.maximum(b, 1).tolist(),
            'score': random.random(),
        }
        for i, k, b in results
    ]


def coco(truth, results, image_ids=None):
    """pycocotools' evaluation."""
    ground = evaluation.ground_truth(truth)
    run = COCOeval(ground, ground.loadRes([dict(x) for x in results]), 'bbox')
    if image_ids is not None:
        run.params.imgIds = image_ids
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run


@pytest.mark.parametrize('seed', range(3))
def test_ap_is_that_of_pycocotools_to_the_last_digit(seed):
    truth, results = make(seed)
    split = outcomes.columns(truth, results)
    reference = coco(truth, results)
    found = precision.curves(outcomes.match(split))
    np.testing.assert_array_equal(found.precision, reference.eval['precision'][:, :, :, 0, 2])
    np.testing.assert_array_equal(found.recall, reference.eval['recall'][:, :, 0, 2])
    assert found.ap() == reference.stats[0] and found.ap(0) == reference.stats[1]
    assert found.ar() == reference.stats[8]


def test_ap_of_small_medium_and_large_objects_is_that_of_pycocotools():
    truth, results = make()
    split = outcomes.columns(truth, results)
    reference = coco(truth, results).stats
    areas = split.detected_boxes[:, 2] * split.detected_boxes[:, 3]
    for (low, high), ap, ar in zip(
        ((0, 32**2), (32**2, 96**2), (96**2, 1e10)), reference[3:6], reference[9:12], strict=True
    ):
        inside = lambda x, low=low, high=high: (x >= low) & (x <= high)
        found = precision.curves(outcomes.match(split, inside(split.areas), inside(areas)))
        assert found.ap() == ap and found.ar() == ar


def test_ap_of_some_images_is_that_of_an_evaluation_of_those():
    truth, results = make()
    split = outcomes.columns(truth, results)
    values = np.where(split.image_ids % 3 == 0, 'night', 'day')
    by_name = {x.name: x for x in groups.by_image_field(outcomes.match(split), values.tolist())}
    for name in ('night', 'day'):
        reference = coco(truth, results, split.image_ids[values == name].tolist())
        low, high = by_name[name].interval
        assert by_name[name].ap == reference.stats[0] and by_name[name].ar == reference.stats[8]
        assert low < by_name[name].ap < high


def test_the_whole_split_as_one_group_has_the_ap_of_the_evaluation():
    truth, results = make()
    split = outcomes.columns(truth, results)
    matched = outcomes.match(split)
    (by_image,) = groups.by_image_field(matched, ['all'] * len(split.image_ids))
    (by_object,) = groups.by_object_field(split, ['all'] * len(split.images))
    numbers, _ = evaluation.score(truth, results)
    assert by_image.ap == numbers['AP'] and by_image.ar == numbers['AR100']
    assert by_object.ap == numbers['AP'] and by_object.ar == numbers['AR100']


def test_a_weight_counts_an_image_as_often():
    """Detections of copies have equal scores in an arbitrary order: recall is equal, AP almost equal."""
    truth, results = make(images=8)
    split = outcomes.columns(truth, results)
    weights = np.array([0, 1, 2, 1, 0, 3, 1, 1])
    copies = [
        number for number, weight in zip(split.image_ids, weights, strict=True) for _ in range(weight)
    ]
    parts = [of_images(truth, [number]) for number in copies]
    again = dataclasses.replace(
        truth,
        **{name: np.concatenate([getattr(x, name) for x in parts]) for name in COLUMNS},
        ids=np.arange(len(copies)),
        owners=np.repeat(np.arange(len(copies)), [len(x.owners) for x in parts]),
    )
    more = [x | {'image_id': k} for k, old in enumerate(copies) for x in results if x['image_id'] == old]
    plain = precision.curves(outcomes.match(outcomes.columns(again, more)))
    weighted = precision.curves(outcomes.match(split), weights)
    np.testing.assert_allclose(weighted.recall, plain.recall, rtol=1e-12)
    assert weighted.ap() == pytest.approx(plain.ap(), abs=0.01)


# tidecv 1.0.1 on `make(seed)`: it needs OpenCV, seaborn and pandas, which is too much to install for a test
TIDE = {
    0: {
        'CLASS': (48, 0.043929749), 'PLACE': (81, 0.101372002), 'BOTH': (34, 0.010398329),
        'DUPLICATE': (116, 0.025896793), 'BACKGROUND': (120, 0.055027138), 'MISSED': (78, 0.096711185),
    },
    1: {
        'CLASS': (43, 0.026796619), 'PLACE': (95, 0.150307993), 'BOTH': (53, 0.026700228),
        'DUPLICATE': (108, 0.026031684), 'BACKGROUND': (108, 0.052715912), 'MISSED': (63, 0.070170782),
    },
    2: {
        'CLASS': (52, 0.047499535), 'PLACE': (90, 0.110818505), 'BOTH': (48, 0.027619617),
        'DUPLICATE': (105, 0.025024657), 'BACKGROUND': (86, 0.040724954), 'MISSED': (74, 0.074594605),
    },
}  # fmt: skip


@pytest.mark.parametrize('seed', TIDE)
def test_errors_by_kind_are_those_of_tide(seed):
    found = tide.errors(outcomes.match(outcomes.columns(*make(seed))))
    for name, (count, cost) in TIDE[seed].items():
        kind = tide.Kind[name]
        assert found.counts[kind] == count, name
        assert found.costs[kind] == pytest.approx(cost, abs=1e-9), name


def test_a_class_whose_objects_are_all_missed_stays_in_the_mean_of_tide():
    """tidecv drops a class with neither objects nor detections, so its misses would cost nothing."""
    truth, _ = make(crowds=0)
    objects = dict(
        annotation_ids=np.arange(2), owners=truth.ids[[0, 0]],
        crowd=np.zeros(2, bool), areas=np.full(2, 2500.0),
        labels=np.array([number for number, _ in truth.categories[:2]]),
        boxes=np.array([[0, 0, 50, 50], [200, 200, 50, 50]], float),
    )  # fmt: skip
    truth = dataclasses.replace(truth, **objects)
    detected = [(0, [0, 0, 50, 50], 0.9), (1, [400, 300, 40, 40], 0.8)]
    results = [
        {'image_id': int(truth.ids[0]), 'category_id': int(truth.labels[k]), 'bbox': box, 'score': score}
        for k, box, score in detected
    ]
    for kept, cost in ((2, 0.0), (1, 0.5)):
        errors = tide.errors(outcomes.match(outcomes.columns(truth, results[:kept])))
        assert errors.costs[tide.Kind.MISSED] == pytest.approx(cost)


def test_the_confusion_matrix_equals_that_of_supervision():
    truth, results = make(crowds=0)
    split = outcomes.columns(truth, results)
    of = lambda boxes, classes, scores=None: supervision.Detections(
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).reshape(-1, 4),
        class_id=classes,
        confidence=scores,
    )
    predictions, targets = [], []
    for image in range(len(split.image_ids)):
        rows, objects = split.detected_images == image, split.objects_of(image)
        predictions.append(of(split.detected_boxes[rows], split.detected_classes[rows], split.scores[rows]))
        targets.append(of(split.boxes[objects], split.classes[objects]))
    reference = supervision.ConfusionMatrix.from_detections(
        predictions, targets, [name for _, name in CLASSES], conf_threshold=0.4, iou_threshold=0.5
    )
    ours = confidence.confusion(outcomes.match(split), np.full(4, 0.4))
    np.testing.assert_array_equal(ours, reference.matrix)


def few(crowd, boxes, detections, categories=((1, 'dog'),)):
    """Annotations of one image, and detections (category, box, score) in it."""
    m = len(boxes)
    truth = Annotations(
        path=None,
        ids=np.array([1]),
        files=np.array(['1.jpg']),
        heights=np.array([480]),
        widths=np.array([640]),
        annotation_ids=np.arange(m),
        owners=np.ones(m, int),
        labels=np.resize([number for number, _ in categories], m).astype(int),
        crowd=np.array(crowd, bool),
        areas=np.full(m, np.nan),
        boxes=np.array(boxes, float).reshape(-1, 4),
        categories=list(categories),
    )
    results = [dict(image_id=1, category_id=k, bbox=box, score=score) for k, box, score in detections]
    return truth, results


def test_detections_on_crowds_do_not_count_as_false_positives():
    boxes = [[0, 0, 50, 50], [200, 200, 200, 200]]
    inside = [(1, [200 + 30 * i, 200, 30, 30], 0.9) for i in range(2)]
    truth, results = few([False, True], boxes, [(1, boxes[0], 0.9), *inside, (1, [100, 0, 9, 9], 0.9)])
    matched = outcomes.match(outcomes.columns(truth, results))
    np.testing.assert_array_equal(confidence.confusion(matched, np.array([0.5])), [[1, 0], [1, 0]])


def test_a_threshold_keeps_or_drops_all_detections_of_equal_score():
    box = [0, 0, 50, 50]
    detections = [(1, box, 1.0), (1, [300, 300, 9, 9], 1.0), (1, [0, 300, 9, 9], 0.1)]
    truth, results = few([False], [box], detections)
    (best,) = confidence.best_thresholds(outcomes.match(outcomes.columns(truth, results)))
    assert (best.score, best.precision, best.recall) == (1, 0.5, 1)


def test_a_split_without_objects_is_analysed():
    truth, results = few([], [], [(1, [0, 0, 9, 9], 0.9)])
    numbers = analyse(outcomes.columns(truth, results)).numbers()
    assert numbers['errors']['background']['count'] == 1 and numbers['confusion'] == [[0, 0], [0, 0]]


def test_draws_without_an_object_are_not_in_an_interval():
    truth, results = make(images=30)
    alone = truth.ids[np.isin(truth.ids, truth.owners)][:1]
    without = truth.ids[~np.isin(truth.ids, truth.owners)]
    part = of_images(truth, np.concatenate([alone, without]))
    low, high = precision.bootstrap(outcomes.match(outcomes.columns(part, results)), np.ones(4))
    assert 0 <= low <= high <= 1


def test_classes_of_one_name_are_told_apart():
    boxes = [[0, 0, 50, 50], [200, 200, 50, 50]]
    truth, results = few([False] * 2, boxes, [(1, boxes[0], 0.9)], [(1, 'dog'), (2, 'dog')])
    _, by_name = evaluation.score(truth, results)
    assert by_name == pytest.approx({'dog (id 1)': 1, 'dog (id 2)': 0})
    assert outcomes.columns(truth, results).class_names == list(by_name)


def test_an_evaluation_leaves_no_report_of_another(evaluated, coco_folder, tmp_path):
    out = shutil.copytree(evaluated, tmp_path / 'out')
    evaluate.main([
        f'--weights={evaluated.parent}/hf', f'--data={coco_folder}', f'--output={out}', '--batch_size=8',
        '--num_processes=1', f'--classes={evaluated.parent}/truth.json',
    ])  # fmt: skip
    assert not (out / 'report.html').exists() and not (out / 'report.json').exists()
    assert (out / 'predictions.json').stat().st_mtime_ns <= (out / 'metrics.json').stat().st_mtime_ns


def test_a_threshold_has_the_largest_f1_of_all():
    truth, results = make()
    matched = outcomes.match(outcomes.columns(truth, results))
    split = matched.split
    for k, best in enumerate(confidence.best_thresholds(matched)[:3]):
        objects = (matched.counted & (split.classes == k)).sum()
        here = (split.detected_classes == k) & ~matched.ignored[:, 0]
        f1 = []
        for score in split.scores[here]:
            shown = here & (split.scores >= score)
            f1.append(2 * (matched.matched[shown, 0] >= 0).sum() / (shown.sum() + objects))
        assert best.f1 == pytest.approx(max(f1))
        assert best.f1 == pytest.approx(2 * best.precision * best.recall / (best.precision + best.recall))
        assert best.score == split.scores[here][int(np.argmax(f1))]


def test_calibration_of_scores_that_are_right_as_often_as_they_say():
    random = np.random.default_rng(0)
    n = 20_000
    scores = random.uniform(0.1, 1, n)
    scores[0] = 1  # in the last bin
    right = random.random(n) < scores
    split = outcomes.columns(*make(images=4))
    fields = {name: getattr(split, name) for name in split.__dataclass_fields__}
    split = outcomes.Split(**fields | {'scores': scores})
    matched = outcomes.Outcomes(split, np.where(right, 0, -1)[:, None], np.zeros((n, 1), bool), split.crowd)
    calibration = confidence.calibration(matched)
    assert calibration.error < 0.02 and len(calibration.count) == confidence.BINS
    overconfident = outcomes.Outcomes(split, np.full((n, 1), -1), np.zeros((n, 1), bool), split.crowd)
    assert confidence.calibration(overconfident).error == pytest.approx(scores.mean())


HOSTILE = '<script>document.title = "taken"</script>'


@pytest.fixture(scope='module')
def evaluated(coco_folder, tmp_path_factory):
    """An evaluation with everything a report can have; a class and a value of a field are hostile."""
    folder = tmp_path_factory.mktemp('report')
    content = json.loads((coco_folder / 'annotations' / 'instances_val2017.json').read_text())
    content['categories'][0]['name'] = HOSTILE
    for i, image in enumerate(content['images']):
        image['weather'] = HOSTILE if i % 2 else 'sun'
    for i, annotation in enumerate(content['annotations'][1:]):
        annotation['tone'] = i % 3
    truth = folder / 'truth.json'
    truth.write_text(json.dumps(content))
    hf = make_hf(dict(TINY, depth=2), num_classes=4)
    hf.config.id2label = {0: 'N/A'} | {x['id']: x['name'] for x in content['categories']}
    hf.save_pretrained(folder / 'hf')
    size = {'size': {'shortest_edge': 64, 'longest_edge': 96}}
    (folder / 'hf' / 'preprocessor_config.json').write_text(json.dumps(size))
    evaluate.main([
        f'--weights={folder}/hf', f'--json={truth}', f'--images={coco_folder}/val2017',
        f'--output={folder}/out', '--by=images.weather', '--by=annotations.tone', '--corruptions',
        '--batch_size=8', '--num_processes=1',
    ])  # fmt: skip
    return folder / 'out'


def test_the_numbers_of_a_report_are_those_of_the_evaluation(evaluated):
    numbers = json.loads((evaluated / 'metrics.json').read_text())
    text = (evaluated / 'report.json').read_text()
    report = json.loads(text)
    assert 'NaN' not in text  # which is no JSON
    assert numbers['about']['split'].endswith('.json')  # it was evaluated by a file
    assert {name: x['AP'] for name, x in report['classes'].items()} == pytest.approx(numbers['classes'])
    by_weather = {x['name']: x for x in report['groups']['images.weather']}
    assert by_weather['sun']['images'] == by_weather[HOSTILE]['images'] == 5
    by_tone = {x['name']: x['objects'] for x in report['groups']['annotations.tone']}
    assert set(by_tone) == {'0', '1', '2', 'not given'} and by_tone['not given'] <= 1
    assert set(report['corrupted']) == set(corruptions.CORRUPTIONS)


@needs_browser
@pytest.mark.parametrize('width, dark', [(1200, False), (500, True)])
def test_the_page_works_in_a_browser(evaluated, width, dark, tmp_path):
    path = evaluated / 'report.html'
    assert path.stat().st_size < 5e6
    assert not re.search(rb'(src|href)="?(https?:|//)', path.read_bytes())
    with opened(path.as_uri(), tmp_path / 'profile', width, dark) as page:
        assert page.title == 'Evaluation'
        run = page.execute_script
        assert run('return document.documentElement.scrollWidth <= document.documentElement.clientWidth')
        assert run('return [...document.images].every(x => x.naturalWidth > 0)')
        background = run('return getComputedStyle(document.body).backgroundColor')
        assert background == ('rgb(20, 23, 26)' if dark else 'rgb(255, 255, 255)')
        objects = 'return [...document.querySelectorAll("th.sorts")[1].closest("table").tBodies[0].rows]'
        objects += '.map(row => Number(row.children[1].dataset.value))'
        unsorted = run(objects)
        page.find_elements('css selector', 'th.sorts')[1].click()
        assert run(objects) == sorted(unsorted, reverse=True)
        page.find_elements('css selector', 'th.sorts')[1].click()
        assert run(objects) == sorted(unsorted)


@pytest.mark.parametrize(
    'field, message',
    [('images.nothing', 'none of its images has a field nothing'), ('weather', 'a field is images.NAME')],
)
def test_a_field_that_is_not_there_is_refused_before_any_work(coco_folder, field, message):
    data = records.read(coco_folder, 'val2017')
    with pytest.raises(InputError, match=message):
        groups.read_fields(data, data.truth(), [field])


@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_a_corruption_grows_with_its_strength_and_is_the_same_again(coco_folder, name):
    data = records.read(coco_folder, 'val2017')
    image = pixels.to_rgb(start_image(data, 0)())
    made = [corruptions.corrupt(image, name, strength, 7) for strength in corruptions.STRENGTHS]
    away = [np.abs(np.float32(x) - image).mean() for x in made]
    assert all(x.shape == image.shape and x.dtype == np.uint8 for x in made)
    assert 0.5 < away[0] < away[1] < away[2] < 128
    np.testing.assert_array_equal(made[1], corruptions.corrupt(image, name, corruptions.STRENGTHS[1], 7))
