"""Writes the model card of a detector, README.md: what is known of it, and what is not."""

import re
from pathlib import PurePath
from typing import Any

import jax

from yolos_jax.patches import MEAN, PATCH, STD
from yolos_jax.weights.pretrained import Pretrained

RECIPE = (  # (what a reader calls it, key of the config)
    ('epochs', 'epochs'),
    ('global batch size', 'batch_size'),
    ('learning rate', 'learning_rate'),
    ('learning rate of heads and [DET] tokens', 'fresh_learning_rate'),
    ('weight decay', 'weight_decay'),
    ('gradient clipping, norm', 'clip_norm'),
    ('moving average of the weights', 'ema'),
    ('frozen', 'freeze'),
    ('type of numbers', 'model.dtype'),
    ('shorter sides in training', 'augment.sizes'),
    ('longest side in training', 'augment.max_size'),
    ('part of the training split that validates', 'val_fraction'),
    ('seed', 'seed'),
)
USE = """
Finding objects of these classes in photographs like those it was trained on, and as a start for training
on other objects.

Not for decisions about people (who somebody is, what they may have or do), for surveillance, or where a
missed or a wrong object can hurt somebody, unless it was evaluated for just that, on images of that place
and those people.
"""
CITATION = """
```bibtex
@inproceedings{fang2021yolos,
  title = {You Only Look at One Sequence: Rethinking Transformer in Vision through Object Detection},
  author = {Fang, Yuxin and Liao, Bencheng and Wang, Xinggang and Fang, Jiemin and Qi, Jiyang and
            Wu, Rui and Niu, Jianwei and Liu, Wenyu},
  booktitle = {NeurIPS},
  year = {2021}
}
```
"""


def text(
    pretrained: Pretrained,
    metrics: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
    library: str = 'yolos_jax',
) -> str:
    """The card as Markdown, with the metadata that Hugging Face reads.

    metrics, report: the content of metrics.json and report.json of `yolos eval`; speed: that of speed.json
    of `yolos speed`. library: what loads the weights beside the card: 'yolos_jax', or 'transformers' too.
    """
    sections = {
        'The model': _model(pretrained),
        'Input and output': _input_and_output(pretrained, library),
        'Use': [USE.strip()],
        'Limits': _limits(pretrained, report),
        'Training': _training(pretrained.about),
        'Evaluation': _evaluation(pretrained, metrics, report),
        'Speed': _speed(speed),
        'Licence': [
            'That of the weights it was trained from, and what the owners of the images ask; the code that '
            'wrote it, yolos_jax, is under Apache-2.0.'
        ],
        'Citation': [CITATION.strip()],
    }
    body = [f'---\n{_metadata(pretrained, metrics, library)}\n---', '# YOLOS detector']
    body.append(
        'You Only Look at One Sequence ([arXiv 2106.00666](https://arxiv.org/abs/2106.00666)): a plain ViT '
        'with [DET] tokens, written by yolos_jax.'
    )
    for title, lines in sections.items():
        body += [f'## {title}', '\n'.join(lines)]
    return '\n\n'.join(body) + '\n'


def _metadata(pretrained: Pretrained, metrics: dict[str, Any] | None, library: str) -> str:
    """YAML, with results as a model-index where there are any."""
    from huggingface_hub import EvalResult, ModelCardData  # here, since it takes half a second

    results, dataset = None, _dataset(pretrained.about)
    measured = (metrics or {}).get('about', {}).get('dataset') or (not metrics and dataset) or 'not known'
    ap = (metrics or pretrained.about).get('AP')
    if ap is not None and ap >= 0:  # -1: of a split without objects
        split = (metrics or {}).get('about', {}).get('split') or _val_split(pretrained.about)
        results = [
            EvalResult(
                task_type='object-detection',
                dataset_type=measured,
                dataset_name=measured,
                dataset_split=split,
                metric_type='AP',
                metric_name='COCO AP',
                metric_value=round(ap, 4),
            )
        ]
    return ModelCardData(
        library_name=library,
        pipeline_tag='object-detection',
        tags=['object-detection', 'yolos', 'vision', 'jax'],
        datasets=[dataset] if dataset else None,
        model_name='YOLOS detector' if results else None,
        eval_results=results,
    ).to_yaml()


def _val_split(about: dict[str, Any]) -> str:
    config = about.get('config', {})
    if config.get('val_fraction'):
        return f'a part of {_training_split(about)}'
    return about.get('training', {}).get('validation_split') or config.get('val_split', '')


def _training_split(about: dict[str, Any]) -> str:
    return about.get('training', {}).get('training_split') or about['config'].get('train_split', '')


def _dataset(about: dict[str, Any]) -> str:
    """The name of the data folder; its path is private."""
    config = about.get('config', {})
    return PurePath(str(config.get('train_json') or config.get('data') or '')).name


def _escaped(name: str) -> str:
    """The name of a class or group without Markdown of its own: a link, a picture, HTML or code."""
    return re.sub(r'([\\`\[<&])', r'\\\1', name)


def _table(rows: list[tuple], head: tuple[str, ...] = ('', '')) -> list[str]:
    """A Markdown table; a text cannot leave its cell."""
    line = lambda cells: (
        '| ' + ' | '.join(str(x).replace('|', '/').replace('\n', ' ') for x in cells) + ' |'
    )
    return [line(head), '|' + '---|' * len(head), *map(line, rows)]


def _model(pretrained: Pretrained) -> list[str]:
    model, about = pretrained.model, pretrained.about
    start = about.get('config', {}).get('init_from')
    source = 'not known' if start is None else PurePath(start).name or 'no other weights'
    if 'source' in about:
        source = f'{about["source"]}, SHA-256 {about["sha256"]}'
    tables = 'rotary' if model.rope else ''
    if model.pos_grid:
        tables += f'{model.pos_grid[0]}x{model.pos_grid[1]} patches of {PATCH} pixels'
    if model.mid_pos_grid:
        tables += f'; before each block but the first {model.mid_pos_grid[0]}x{model.mid_pos_grid[1]}'
    return _table(
        [
            ('parameters', f'{sum(x.size for x in jax.tree.leaves(pretrained.params)):,}'),
            ('width, depth, heads', f'{model.width}, {model.depth}, {model.heads}'),
            ('[DET] tokens', model.num_det_tokens),
            *([('registers', model.registers)] if model.registers else []),
            ('positions', tables),
            ('from', source),
        ]
    )


def _input_and_output(pretrained: Pretrained, library: str) -> list[str]:
    model, classes = pretrained.model, pretrained.classes
    numbers = lambda values: ', '.join(f'{x:.3f}' for x in values)
    one_by_one = (
        " Give one image at a time to transformers' YOLOS: the padding of a batch changes its detections; "
        'yolos_jax masks it.'
    )
    return [
        f'An RGB image of any size. Its shorter side is resized to {pretrained.size} pixels, bilinear with '
        f'antialiasing, the longer one to at most {pretrained.max_size}; values in 0..1 lose a mean of '
        f'{numbers(MEAN.tolist())} and are divided by {numbers(STD.tolist())}.'
        + one_by_one
        * (library == 'transformers'),
        '',
        f'`logits` [B, {model.num_det_tokens}, {model.num_classes + 1}], the last "no object", and '
        f'`pred_boxes` [B, {model.num_det_tokens}, 4], cxcywh in 0..1 of the image.',
        '',
        f'{len(classes)} classes: {", ".join(_escaped(name) for _, name in sorted(classes.items()))}.',
    ]


def _limits(pretrained: Pretrained, report: dict[str, Any] | None) -> list[str]:
    lines = [
        f'* At most {pretrained.model.num_det_tokens} objects in an image are found.',
        f'* Objects much smaller than a patch of {PATCH} pixels, after resizing, are mostly missed.',
        '* Image sizes and shapes far from those in training are untested.',
        '* What the training images show seldom, of places, times or people, it finds less well.',
    ]
    if not report:
        return [*lines, '* How well scores are calibrated and which groups it fails for were not examined.']
    ece = report['calibration']['error']
    lines.append(f'* Scores: calibration error (ECE) {ece:.3f} of detections with a score of at least 0.1.')
    fields = [title for title in report['groups'] if title.startswith(('images.', 'annotations.'))]
    if not fields:
        lines.append('* Groups by fields of the annotations were not examined.')
    return lines


def _training(about: dict[str, Any]) -> list[str]:
    config, training, goodput = about.get('config'), about.get('training', {}), about.get('goodput')
    if not config:
        return ['Not known: the weights were converted, and their file does not say.']
    # 0 or empty means off, or as in the weights, except for the seed
    recipe = [(name, key, config[key]) for name, key in RECIPE if key in config]
    rows = [(name, value) for name, key, value in recipe if value or key == 'seed']
    rows.append(('optimiser', 'AdamW, betas 0.9 and 0.999; cosine decay by epoch'))
    splits = {'training_split': _training_split(about), 'validation_split': _val_split(about)}
    rows += [(name.replace('_', ' '), value) for name, value in (training | splits).items()]
    rows.append(('data', _dataset(about) or 'not known'))
    if 'step' in about:
        rows.append(('step of these weights', f'{about["step"]:,}'))
    if goodput:
        wall, steps = goodput['wall_s'] / 3600, goodput['training_s'] / 3600
        rows.append(('hours', f'{wall:.2f}, of which {steps:.2f} training'))
        rows.append(('starts, steps lost to stops', f'{goodput["starts"]}, {goodput["steps_lost"]}'))
    joules = about.get('energy')
    measured = f'{joules / 3.6e6:.3f} kWh, of the first machine' if joules else 'not measured'
    return _table([*rows, ('energy', measured)])


def _evaluation(
    pretrained: Pretrained, metrics: dict[str, Any] | None, report: dict[str, Any] | None
) -> list[str]:
    about = pretrained.about
    if not metrics:
        ap = about.get('AP', -1)  # -1: of a split without objects
        return [f'AP {ap:.3f} on {_val_split(about)}, by training.' if ap >= 0 else 'Not measured.']
    split = metrics['about']['split']
    is_file = split.endswith('.json')  # of a file and not of a data folder
    data = f'--json={split} --images=FOLDER' if is_file else f'--data=FOLDER --split={split}'
    own = [pretrained.size, pretrained.max_size]
    size, dtype = metrics['about'].get('size', own), metrics['about'].get('dtype', 'float32')
    options = '' if size == own else ' --size={} --max_size={}'.format(*size)
    if dtype != 'float32':
        options += f' --dtype={dtype}'
    command = f'yolos eval --weights=PATH {data}{options} --output=DIR'
    numbers = [(name, f'{x:.3f}') for name, x in metrics.items() if isinstance(x, float) and x > -1]
    dataset = metrics['about'].get('dataset')
    where = f' on {dataset}' if dataset else ''
    lines = [f'By pycocotools{where}:', '', f'    {command}', '', *_table(numbers, ('', split))]
    classes = [(_escaped(name), f'{ap:.3f}') for name, ap in metrics['classes'].items() if ap > -1]
    lines += ['', *_table(classes, ('class', 'AP'))]
    interval = lambda ends: '{:.3f} to {:.3f}'.format(*ends) if ends else ''
    for title, groups in (report or {}).get('groups', {}).items():
        rows = [
            (_escaped(x['name']), x['images'], x['objects'], f'{x["ap"]:.3f}', interval(x['interval']))
            for x in groups
            if x['objects']
        ]
        lines += ['', *_table(rows, (title, 'images', 'objects', 'AP', '95 %'))]
    for name, values in (report or {}).get('corrupted', {}).items():
        lines += ['', f'Under {name}, weak to strong: AP {", ".join(f"{x:.3f}" for x in values)}.']
    return lines


def _speed(speed: dict[str, Any] | None) -> list[str]:
    if not speed:
        return ['Not measured here; `yolos speed` measures it.']
    rows = [('GFLOPs, multiply-adds', f'{speed["gflops"]:.1f}'), *timings(speed)]
    return [*_table(rows), '', speed['method']]


def timings(speed: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) of what speed.json has that depends on the device."""
    rate = lambda x: f'{x["median"]:.2f} ({x["p10"]:.2f} to {x["p90"]:.2f})'
    return [
        ('images/s, model', rate(speed['fps'])),
        ('images/s, from file', rate(speed['fps_from_file'])),
        ('peak memory', f'{speed["peak_memory_gb"]:.2f} GB of {speed["peak_memory_of"]}'),
        ('device', f'{speed["device"]}, {speed["cpus"]} CPUs'),
    ]
