"""What the page of an evaluation's report shows of known detections: its tables and its pictures."""

import base64
import io
import re

import numpy as np
import pytest
from helpers import write_coco
from PIL import Image

from yolos_jax import evaluation
from yolos_jax.analysis import outcomes
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data import records
from yolos_jax.tools import report

SIDE = 400
HERE, THERE, NOWHERE = ([40, 40, 120, 120], [240, 240, 120, 120], [40, 280, 90, 90])  # xywh


def annotation(number, image, box, crowd=0):
    return {
        'id': number, 'image_id': image, 'category_id': 1, 'bbox': box, 'area': 14400, 'iscrowd': crowd
    }  # fmt: skip


def detection(image, box, score):
    return {'image_id': image, 'category_id': 1, 'bbox': box, 'score': score}


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """A report of four images: found, half found with a wrong detection, missed, and a crowd alone."""
    folder = tmp_path_factory.mktemp('report')
    names = ['found', 'half', 'missed', 'crowd']
    content = {
        'images': [
            {'id': i, 'file_name': f'{name}.png', 'height': SIDE, 'width': SIDE}
            for i, name in enumerate(names)
        ],
        'annotations': [
            annotation(1, 0, HERE),
            annotation(2, 1, HERE),
            annotation(3, 1, THERE),
            annotation(4, 2, THERE),
            annotation(5, 3, HERE, crowd=1),
        ],
        'categories': [{'id': 1, 'name': 'cat'}],
    }
    write_coco(folder, content)
    for name in names:
        Image.new('L', (SIDE, SIDE), 128).save(folder / 'val' / f'{name}.png')
    loose = [68, 40, 120, 120]  # IoU 0.62 with HERE: right at three of the ten thresholds
    results = [detection(0, loose, 0.9), detection(1, HERE, 0.8), detection(1, NOWHERE, 0.7)]
    data = records.read(folder, 'val')
    truth = data.truth()
    numbers, _ = evaluation.score(truth, results)
    report.write(folder, analyse(outcomes.columns(truth, results)), data, numbers, {'weights': 'none'})
    return (folder / 'report.html').read_text()


def section(page, title):
    """What stands below a heading."""
    return page.split(f'<h2>{title}</h2>')[1].split('<h2>')[0]


def pictures(text):
    """{caption: (the objects' picture, the detections' picture)}, float [400, 400, 3]."""
    by_caption = {}
    for alt, data in re.findall(r'<img alt="([^"]*)" src="data:image/jpeg;base64,([^"]*)"', text):
        pair = np.float32(Image.open(io.BytesIO(base64.b64decode(data))))
        assert pair.shape == (SIDE, 2 * SIDE + 8, 3)
        by_caption[alt] = pair[:, :SIDE], pair[:, -SIDE:]
    return by_caption


def is_drawn(picture, box):
    """Whether the left edge of a box is coloured in a gray picture."""
    x, y, _, height = box
    edge = picture[y + 40 : y + height - 10, x - 1 : x + 3]
    return bool((edge.max(axis=-1) - edge.min(axis=-1)).max() > 60)


def test_a_class_has_its_numbers_in_the_columns_that_say_so(page):
    text = section(page, 'Classes')
    heads = re.findall(r'<th[^>]*class="sorts">([^<]*)</th>', text)
    row = dict(zip(heads, re.findall(r'<td[^>]*>([^<]*)</td>', text), strict=True))
    assert [row[name] for name in ('class', 'objects', 'images')] == ['cat', '4', '3']
    assert float(row['AP50']) == pytest.approx(
        51 / 101, abs=1e-3
    )  # two of four found, both before the error
    assert float(row['AP']) == pytest.approx((3 * 51 + 7 * 26 / 2) / 101 / 10, abs=1e-3)
    assert float(row['AR100']) == pytest.approx((3 * 2 + 7 * 1) / 10 / 4, abs=1e-3)
    assert [row[name] for name in ('threshold', 'precision', 'recall')] == ['0.800', '1.000', '0.500']


def test_the_worst_images_come_with_their_objects_and_detections(page):
    worst = pictures(section(page, 'The worst images'))
    assert [*worst] == [
        'missed.png: 0 of 1 objects found, 0 wrong detections',
        'half.png: 1 of 2 objects found, 0 wrong detections',  # of those above the threshold
    ]
    (truth, none), (objects, detected) = worst.values()
    assert is_drawn(truth, THERE) and not is_drawn(none, THERE)
    assert is_drawn(objects, HERE) and is_drawn(objects, THERE)
    assert is_drawn(detected, HERE)
    assert not is_drawn(detected, THERE) and not is_drawn(detected, NOWHERE)


def test_the_most_confident_mistakes_are_named_by_their_kind(page):
    mistakes = pictures(section(page, 'The most confident mistakes'))
    assert [*mistakes] == ['half.png: cat 0.70: background']
    ((_, detected),) = mistakes.values()
    assert is_drawn(detected, NOWHERE)  # though it is below the threshold of its class
