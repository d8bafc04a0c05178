import json
import re

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, make_hf, noise, to_torch
from PIL import Image
from transformers import YolosImageProcessor

from yolos_jax.errors import InputError
from yolos_jax.tools import verify
from yolos_jax.weights import zoo


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A detector in the published form, and what transformers says of an image, as its own test does."""
    folder = tmp_path_factory.mktemp('published')
    hf = make_hf(TINY, num_classes=4)
    hf.config.id2label = {0: 'N/A', 1: 'circle', 2: 'square', 3: 'triangle'}
    hf.save_pretrained(folder / 'tiny')
    size = {'size': {'shortest_edge': 64, 'longest_edge': 128}}
    (folder / 'tiny' / 'preprocessor_config.json').write_text(json.dumps(size))
    image = Image.fromarray(noise(120, 190))
    image.save(folder / 'image.png')
    inputs = YolosImageProcessor.from_pretrained(folder / 'tiny')(image, return_tensors='pt', resample=2)
    assert inputs['pixel_values'].shape[2:] == (64, 96)  # of 64 x 101, both multiples of 16
    with torch.no_grad():
        outputs = hf(pixel_values=to_torch(np.asarray(image.resize((96, 64), Image.BILINEAR))))
    width, height = image.size
    best = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    kept = best.values > 0.3
    cx, cy, w, h = outputs.pred_boxes[0, kept][0].tolist()
    box = (cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height
    return folder, verify.Golden(
        outputs.logits[0, :3, :3].tolist(),
        outputs.pred_boxes[0, :3, :3].tolist(),
        best.values[kept].tolist(),
        best.indices[kept].tolist(),
        box,
    )


def test_published_values_pass_and_other_values_fail(published):
    folder, golden = published
    image = folder / 'image.png'
    assert len(golden.labels) > 1 and golden.scores != sorted(golden.scores, reverse=True)
    assert verify.check_golden(str(folder / 'tiny'), golden, image)['same']
    for what, value in golden._asdict().items():
        wrong = np.array(value)
        wrong.flat[0] += 1
        other = golden._replace(**{what: wrong.tolist()})
        assert not verify.check_golden(str(folder / 'tiny'), other, image)['same']
    fewer = golden._replace(labels=golden.labels[1:])
    assert not verify.check_golden(str(folder / 'tiny'), fewer, image)['same']


def test_ap_is_compared_and_a_finished_job_is_not_repeated(published, coco_folder, tmp_path, capsys):
    name, measured = str(published[0] / 'tiny'), []

    def check(*arguments):
        measured.append(arguments)
        return verify.check_ap(*arguments)

    jobs = {'tiny AP': (check, name, 0.0, str(coco_folder), tmp_path / 'tiny', 64)}
    for _ in range(2):
        different = verify.verify(jobs, tmp_path)
    assert len(measured) == 1 and capsys.readouterr().out.count('published 0.0, measured') == 2
    metrics = json.loads((tmp_path / 'tiny' / 'metrics.json').read_text())
    assert (different == []) == (100 * metrics['AP'] <= 0.1)
    assert metrics['about']['size'] == [64, 64 * 1333 // 800]  # as in the paper, not the 128 of the folder
    jobs = {'other AP': (check, name, 50.0, str(coco_folder), tmp_path / 'tiny', 64)}
    assert verify.verify(jobs, tmp_path) == ['other AP']


def test_another_image_is_measured_though_there_is_a_result_of_one(published, tmp_path, capsys):
    folder, golden = published
    Image.fromarray(noise(120, 190, 1)).save(tmp_path / 'other.png')
    failed = []
    for image in (tmp_path / 'other.png', tmp_path / 'other.png', folder / 'image.png'):
        jobs = {'tiny values': (verify.check_golden, str(folder / 'tiny'), golden, image)}
        failed.append(verify.verify(jobs, tmp_path))
    assert failed == [['tiny values'], ['tiny values'], []]
    assert capsys.readouterr().out.count('measured earlier') == 1


def test_verify_without_coco_and_image_says_what_it_needs():
    with pytest.raises(InputError, match='000000039769.jpg') as error:
        verify.main([])
    assert error.value.argument == 'data'


@pytest.mark.parametrize(
    ('name', 'says'), [('hustvl/yolos-tinny', 'not one of hustvl/'), ('hustvl/yolos-tiny', 'needs COCO')]
)
def test_a_name_that_cannot_be_checked_is_an_error(name, says, tmp_path):
    with pytest.raises(InputError, match=f'{name}: .*{says}'):
        verify.main([f'--image={tmp_path}/x.jpg', name])


@pytest.mark.parametrize('content', ['{"', '[]'])
def test_damaged_results_of_an_earlier_call_are_named(content, published, tmp_path):
    (tmp_path / 'verified.json').write_text(content)
    with pytest.raises(InputError, match='verified.json: damaged .* remove it'):
        verify.verify({}, tmp_path)


def test_the_detectors_of_the_readme_are_those_that_are_verified():
    """Names that do not exist at Hugging Face end the whole command; these five do."""
    readme = (ROOT / 'README.md').read_text()
    row = r'\| \[`(hustvl/[\w-]+)`\]\(https://huggingface.co/(hustvl/[\w-]+)\) \| ([\d.]+)'
    published = {name: float(ap) for name, link, ap in re.findall(row, readme) if name == link}
    assert published == {name: ap for name, (ap, _) in zoo.DETECTORS.items()}
    assert verify.GOLDEN.keys() <= zoo.DETECTORS.keys()
