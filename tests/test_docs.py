"""Every command of the documentation runs as it is written there, or is listed here with the reason."""

import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from absl import flags
from helpers import (
    ROOT,
    TINY,
    forward,
    launch,
    make_hf,
    make_vit,
    noise,
    read_detector,
    saved_flags,
    torches,
)
from PIL import Image

import yolos_jax
from yolos_jax.data import records
from yolos_jax.patches import patchify
from yolos_jax.run import config_files
from yolos_jax.tools import command as tools_command
from yolos_jax.tools import evaluate, train
from yolos_jax.weights import checkpoint, hf, reference

PAGES = [*(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'demo/README.md'))]
PAGES += sorted((ROOT / 'docs').glob('*.md'))
# training commands run as written, but with a smaller model, for one epoch, from an existing file
SMALLER = (
    '--config.model.width=32 --config.model.depth=2 --config.model.heads=2 --config.model.num_det_tokens=6 '
    '--config.model.pos_grid=(4,6) --config.epochs=1 --config.batch_size=8 --config.num_lengths=1 '
    '--config.augment.sizes=(96,) --config.augment.max_size=176 --config.eval_size=96 '
    '--config.eval_max_size=176'
).split()
NOT_RUN = {
    r'make (quickstart|test|lint|trials|docs)': 'this is make test, and the others take long or write here',
    r'TRIALS=\d+ make trials': 'long failure trials',
    r'(\.venv/bin/)?pip install': 'installs what is installed',
    r'python3 -m venv': 'makes another environment',
    r'hf (down|up)load': 'needs a network',
    r'yolos verify': 'needs the published weights; tests/test_verify.py runs its parts',
    r'python demo/app\.py': 'serves until it is stopped; tests/test_demo.py opens its page',
    r'yolos pretrain': 'takes minutes and more; tests/test_pretraining.py runs it',
    r'python benchmarks/': 'measures for minutes; tests/test_benchmarks.py starts it',
    r'python train\.py \.\.\. --coordinator': 'one of four; tests/test_cluster.py runs two',
}


def commands(page):
    """The commands of a page: indented lines that begin with a program, without their comments."""
    text = page.read_text().replace('\\\n', ' ')
    programs = r'python|make|yolos|hf|\.venv/bin/\w+|pip|TRIALS=\d+|python3'
    for match in re.finditer(rf'^    ((?:{programs}) .*?)(?:\s+#.*)?$', text, re.M):
        yield re.sub(r'\s+', ' ', match[1]).removesuffix(' ...')


@pytest.fixture(scope='module')
def workplace(coco_folder, tmp_path_factory):
    """A folder with all files and folders that the documentation names."""
    place = tmp_path_factory.mktemp('docs')
    for name in ('configs', 'train.py', 'benchmarks'):
        (place / name).symlink_to(ROOT / name)
    (place / 'runs').mkdir()
    for name in ('COCO', 'FOLDER', 'COCO_FOLDER', 'DATA', 'runs/shapes'):
        (place / name).symlink_to(coco_folder)
    (place / 'IMAGE_OR_FOLDER').symlink_to(coco_folder / 'val2017')
    make_hf(TINY, num_classes=4).save_pretrained(place / 'hf')
    pretrained = read_detector(place / 'hf')
    classes = {1: 'circle', 2: 'square', 3: 'triangle'}
    pretrained = dataclasses.replace(pretrained, classes=classes, size=96, max_size=176)
    reference.write(pretrained, place / 'pth')
    for name in ('yolos_s.pth', 'yolos_s_300_pre.pth'):
        os.link(place / 'pth' / 'yolos.pth', place / name)
    (place / 'hustvl').mkdir()  # a path that is there wins over the name of a repository
    for name in ('yolos-tiny', 'yolos-small-300'):
        hf.write(pretrained, place / 'hustvl' / name)
    for name in ('runs/quickstart', 'runs/ti', 'runs/mine'):
        checkpoint.write(pretrained, place / name / 'checkpoints')  # as a run's workdir has them
    line = {'step': 10, 'epoch': 1, 'AP': 0.4}
    (place / 'runs/quickstart/metrics.jsonl').write_text(json.dumps(line) + '\n')
    (place / 'runs/pretrained').mkdir()
    for name in ('vit.pth', 'runs/pretrained/deit.pth'):
        torch.save({'model': torches(make_vit())}, place / name)
    return place


def run(command):
    words = [word for word in shlex.split(command) if word != '...']
    program, *arguments = words[1:] if words[0].endswith(('python', 'yolos')) else words
    if words[0].endswith('yolos'):
        name = tools_command.COMMANDS[program][0]
        program = {'train': 'train.py', 'evaluate': 'eval.py'}.get(name, name)
    if program == 'train.py':
        workdir = next(word for word in arguments if word.startswith('--workdir='))
        fresh = workdir.replace('runs/', 'new/')
        # the published file's name has its hash, which no other file has
        start = ['--config.init_from=vit.pth'] if any('deit' in word for word in arguments) else []
        finetunes = {'--config=configs/finetune.py', '--config=finetune'} & set(arguments)
        small = SMALLER[5:] if finetunes else SMALLER
        arguments = [fresh if word == workdir else word for word in arguments]
        with pytest.MonkeyPatch.context() as m, saved_flags():
            m.setattr(sys, 'argv', config_files.resolved([program, *arguments, *small, *start]))
            assert flags.FLAGS(sys.argv) == [program]
            assert launch(train.CONFIG.value, train.WORKDIR.value) is None
    elif program == '-m':
        importlib.import_module(arguments[0]).main(arguments[1:])
    elif program == 'eval.py':
        evaluate.main([*arguments, '--num_processes=1'])
    else:
        scripts = {'predict.py': 'predict', 'convert_torch_weights.py': 'convert'}
        importlib.import_module(f'yolos_jax.tools.{scripts.get(program, program)}').main(arguments)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_command_runs_as_it_is_written(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for name in ('DIR', 'OTHER', 'out', 'detections', 'pictures', 'attention'):  # made by each page
        subprocess.run(['rm', '-rf', workplace / name], check=True)
    for command in commands(page):
        if command.startswith('python -c'):
            continue  # over several lines, and on a published model
        if any(re.match(pattern, command) for pattern in NOT_RUN):
            continue
        if '--to=' in command:  # writes where the line before did
            subprocess.run(['rm', '-rf', workplace / 'OTHER'], check=True)
        run(command)


def test_the_readme_shows_python_that_runs(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)
    assert blocks
    for number, block in enumerate(blocks):
        (workplace / f'{number}.py').write_text(block)
        outputs = runpy.run_path(f'{number}.py')
        assert 'pred_boxes' in outputs['outputs']


def test_the_page_on_training_shows_python_that_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs/training.md').read_text(), re.M | re.S)
    made = 'config = quickstart.get_config()\n'
    assert made in blocks[0]
    smaller = made + 'config.model.width, config.model.depth, config.num_lengths = 32, 2, 1\n'
    (workplace / 'training.py').write_text(''.join(blocks).replace(made, smaller))
    names = runpy.run_path('training.py')
    assert names['features'].shape[:2] == names['maps'].shape[::2][:2]  # B, Q
    assert len(names['history']) and names['number'] == 9
    assert len(names['detector']([np.zeros((96, 128, 3), np.uint8)], 0)[0])


def test_the_page_on_weights_shows_python_that_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs/weights.md').read_text(), re.M | re.S)
    small = 'dict(width=32, depth=2, heads=2, pos_grid=(4, 6))'
    text = ''.join(blocks).replace('yolos_jax.YOLOS_TI', small).replace('.vit()', '.vit(heads=2)')
    (workplace / 'of_weights.py').write_text(re.sub("'deit_.*?.pth'", "'vit.pth'", text))
    names = runpy.run_path('of_weights.py')
    assert names['model'].num_classes == 21 and names['pretrained'].classes
    assert names['features']['patches'].shape == (1, 14 * 14, 32)


def test_the_page_on_evaluations_shows_python_that_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (block,) = re.findall(
        r'^```python\n(.*?)^```', (ROOT / 'docs/understanding.md').read_text(), re.M | re.S
    )
    content = json.loads((workplace / 'runs/shapes/annotations/instances_val2017.json').read_text())
    results = [one | {'score': 0.5} for one in content['annotations']]
    (workplace / 'out').mkdir(exist_ok=True)
    (workplace / 'out' / 'predictions.json').write_text(json.dumps(results))
    (workplace / 'analysis_of_it.py').write_text(block)
    assert set(runpy.run_path('analysis_of_it.py')['analysed'].errors.counts.values()) == {0}


def test_the_page_on_data_reads_pascal_voc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'VOC' / 'Annotations').mkdir(parents=True)
    (tmp_path / 'VOC' / 'JPEGImages').mkdir()
    Image.fromarray(noise(30, 40)).save(tmp_path / 'VOC' / 'JPEGImages' / 'x.jpg')
    (tmp_path / 'VOC' / 'Annotations' / 'x.xml').write_text(
        '<annotation><filename>x.jpg</filename><size><width>40</width><height>30</height></size><object>'
        '<name>cup</name><bndbox><xmin>5</xmin><ymin>7</ymin><xmax>25</xmax><ymax>17</ymax></bndbox>'
        '</object></annotation>'
    )
    (block,) = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs/data.md').read_text(), re.M | re.S)
    (tmp_path / 'voc.py').write_text(block)
    runpy.run_path('voc.py')
    split = records.read('FOLDER', 'train2017')
    assert [*split.classes.values()] == ['cup'] and split.boxes.shape == (1, 4)


def test_the_page_on_predicting_exports_what_the_model_computes(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs/predicting.md').read_text(), re.M | re.S)
    (workplace / 'export.py').write_text('\n'.join(blocks))
    names = runpy.run_path('export.py')
    images = [noise(96, 128), noise(160, 80)]
    exported = names['detect'](*patchify(images, length=300))
    for name, values in forward(names['model'], names['params'], *patchify(images)).items():
        np.testing.assert_allclose(exported[name], values, atol=2e-6)
    for name, values in zip(('patches', 'grid'), patchify([names['image']], length=300), strict=True):
        np.testing.assert_array_equal(names[name], values)
    detections = yolos_jax.Detector.from_pretrained('runs/quickstart')(names['image'], 0)
    order = np.argsort(-names['score'], kind='stable')
    np.testing.assert_array_equal(names['label'][order], detections.labels)
    np.testing.assert_allclose(names['score'][order], detections.scores, atol=2e-6)
    np.testing.assert_allclose(names['box'][order] * [128, 96, 128, 96], detections.boxes, atol=1e-3)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """In a process of its own, on fewer images; what a notebook would show is asked for."""
    notebook = json.loads((ROOT / 'docs' / 'quickstart.ipynb').read_text())
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert not any(cell.get('outputs') for cell in notebook['cells']) and len(cells) > 5
    assert "'train2017': 400" in cells[0]
    cells[0] = cells[0].replace('400', '80')
    script = '\n'.join(cells) + '\nassert results[0]._repr_png_() and losses[-1] < losses[0], losses\n'
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'}
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'notebook' / 'run' / 'curves.png').exists()


def test_every_excluded_command_is_still_in_the_documentation():
    every = [command for page in PAGES for command in commands(page)]
    assert len(every) > 20
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in every), pattern


def test_the_api_pages_have_the_classes_and_their_calls(tmp_path):
    command = [sys.executable, ROOT / 'docs' / 'api.py', tmp_path, 'yolos_jax', r'!yolos_jax\.']
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / 'yolos_jax.html').read_text()
    for name in ('Detector.stream', 'Detector.__call__', 'Detections.draw', 'Yolos.__call__', 'evaluate'):
        assert f'id="{name}"' in page, name
