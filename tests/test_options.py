"""The options of commands reach the place that uses them."""

import dataclasses
import json
import shutil

import pytest
from helpers import TINY, annotated, make_hf, read_detector, run_predict
from PIL import Image

import yolos_jax
from yolos_jax import visualize
from yolos_jax.data import records
from yolos_jax.errors import InputError
from yolos_jax.tools import attention, card, check_data, convert, evaluate, predict, speed, tokens
from yolos_jax.weights import integrity

CONFIG = """
from yolos_jax.configs import quickstart

def get_config():
    c = quickstart.get_config()
    c.max_targets, c.val_split = 1, 'other'
    return c
"""


@pytest.mark.parametrize('module', [attention, card, convert, evaluate, predict, speed, tokens])
def test_every_command_reads_the_step_and_takes_the_hints_that_are_given(
    module, saved, coco_folder, tmp_path
):
    images = [str(coco_folder / 'val2017')] if module in (attention, predict) else []
    data = [f'--data={coco_folder}'] if module in (evaluate, speed, tokens) else []
    output = f'--output={tmp_path / "out"}' + ('.md' if module is card else '')
    command = [f'--{"input" if module is convert else "weights"}={saved}', output, *images, *data]
    command += ['--num_processes=1'] * (module is evaluate)
    with pytest.raises(InputError, match='has no step 5; it has 0') as error:
        module.main([*command, '--step=5'])
    assert error.value.argument == 'step'
    for hint, value in (('heads', '2'), ('pos_grid', '4 6'), ('mid_pos_grid', '4 6')):
        with pytest.raises(InputError, match=f'{hint} is for a .pth of a detector'):
            module.main([*command, f'--{hint}', *value.split()])


@pytest.mark.parametrize('module', [evaluate, speed, tokens])
def test_a_split_that_is_named_is_the_one_that_is_read(module, saved, coco_folder, tmp_path):
    command = [f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--split=other']
    with pytest.raises(InputError, match='has no split other; it has train2017, val2017'):
        module.main(command + ['--num_processes=1'] * (module is evaluate))


def test_options_of_an_evaluation_from_python_are_those_of_the_command(
    saved, coco_folder, tmp_path, capsys
):
    """Another split, and another type of numbers, which changes the result a little."""
    place = [f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--num_processes=1']
    evaluate.main([*place, '--split=train2017', '--dtype=bfloat16'])
    written = json.loads((tmp_path / 'metrics.json').read_text())
    about, notes = written.pop('about'), []
    assert (about['split'], about['dtype']) == ('train2017', 'bfloat16')
    options = {'dtype': 'bfloat16', 'log': notes.append}
    assert yolos_jax.evaluate(saved, coco_folder, 'train2017', **options) == written and not notes
    capsys.readouterr()
    without = dataclasses.replace(read_detector(saved), classes={1: 'circle', 2: 'square'})
    assert yolos_jax.evaluate(without, coco_folder, 'train2017', log=notes.append) != written
    assert len(notes) == 1 and notes[0].endswith('classes that cannot be detected: triangle')
    assert not capsys.readouterr().out
    data = records.read(coco_folder, 'train2017')
    with pytest.raises(InputError, match='no images are left to evaluate'):
        yolos_jax.evaluate(saved, records.select(data, data.heights > 5000))


@pytest.mark.parametrize(
    ('option', 'says'),
    [
        ('--max_detections=-1', 'less than 0'),
        ('--batch_size=0', 'less than 1'),
        ('--threshold=1.5', 'not between 0 and 1'),
        ('--threshold=nan', 'not between 0 and 1'),
        ('--nms=-0.1', 'not between 0 and 1'),
        ('--font=/nowhere.ttf', '/nowhere.ttf'),
    ],
)
def test_values_out_of_bounds_are_named_before_any_work(option, says, saved, photographs, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        run_predict(saved, tmp_path / 'out', photographs, option)
    assert f'--{error.value.argument}=' in option and not (tmp_path / 'out').exists()


def test_every_option_that_changes_what_is_written_is_a_setting(saved, photographs, tmp_path):
    one = sorted(photographs.iterdir())[0]
    run_predict(saved, tmp_path / 'out', one, one)
    assert len(json.loads((tmp_path / 'out' / 'predictions.json').read_text())) == 1  # named twice
    others = [
        ('threshold', ['--threshold=0.4']),
        ('classes', ['--classes', 'circle']),
        ('nms', ['--nms=0.5']),
        ('pictures', ['--no-pictures']),
    ]
    for name, options in others:
        with pytest.raises(InputError, match=rf'other settings \({name}\)'):
            run_predict(saved, tmp_path / 'out', one, *options)
    classes = ['--overwrite', '--classes', 'square', 'circle', 'square']
    run_predict(saved, tmp_path / 'out', one, *classes)
    run_predict(saved, tmp_path / 'out', one, '--classes', 'circle', 'square')  # the same in another order


def test_pictures_are_drawn_with_the_font_and_without_the_duplicates_that_were_asked_for(
    saved, photographs, tmp_path
):
    one, pictures = sorted(photographs.iterdir())[0], []
    serif = visualize.default_font().with_name('DejaVuSerif.ttf')
    for i, options in enumerate([['--nms=0'], ['--nms=1'], ['--nms=1', f'--font={serif}']]):
        (entry,) = run_predict(saved, tmp_path / f'{i}', one, *options)
        pictures.append((tmp_path / f'{i}' / entry['picture']).read_bytes())
    assert len({*pictures}) == 3


def test_pages_are_drawn_with_the_font_that_was_asked_for(saved, coco_folder, tmp_path):
    serif, image = visualize.default_font().with_name('DejaVuSerif.ttf'), '000000000001.jpg'
    pages = []
    for i, font in enumerate([[], [f'--font={serif}']]):
        (folder := tmp_path / f'{i}').mkdir()
        check_data.main([str(coco_folder), '--split=val2017', f'--html={folder}/check.html', *font])
        common = [f'--weights={saved}', f'--output={folder}', *font]
        attention.main([*common, '--threshold=0', str(coco_folder / 'val2017' / image)])
        evaluate.main([*common, f'--data={coco_folder}', '--report', '--num_processes=1'])
        pages.append(
            [(folder / name).read_bytes() for name in ('check.html', '000000000001.png', 'report.html')]
        )
    assert all(plain != serifed for plain, serifed in zip(*pages, strict=True))


def test_images_that_cannot_be_read_are_not_counted_as_seen(saved, photographs, tmp_path, capsys):
    (photographs / '000000000003.jpg').write_bytes(b'<html>')
    with pytest.raises(SystemExit):
        run_predict(saved, tmp_path / 'out', photographs)
    printed = capsys.readouterr()
    assert 'images: 9, objects: ' in printed.out and '1 of 10 could not be read' in printed.err


def test_a_picture_longer_than_a_jpeg_can_be_is_made_smaller(saved, tmp_path):
    Image.new('RGB', (66_000, 16)).save(tmp_path / 'long.png')
    (entry,) = run_predict(saved, tmp_path / 'out', tmp_path / 'long.png', '--threshold=1')
    assert entry['width'] == 66_000 and Image.open(tmp_path / 'out' / entry['picture']).width == 65_500


def test_the_splits_and_targets_are_those_of_the_config(coco_folder, tmp_path, capsys):
    shutil.copytree(coco_folder, tmp_path / 'data')
    content = annotated(coco_folder, 'train2017')
    content['annotations'] = [one for one in content['annotations'] if one['category_id'] != 1]
    (tmp_path / 'data' / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))
    check_data.main([str(tmp_path / 'data')])
    printed = capsys.readouterr().out
    assert 'note: 1 classes have objects to evaluate but none to train on: circle' in printed
    assert 'more than 1 objects' not in printed and 'no validation split' not in printed
    (tmp_path / 'config.py').write_text(CONFIG)
    check_data.main([str(tmp_path / 'data'), f'--config={tmp_path / "config.py"}'])
    printed = capsys.readouterr().out
    assert 'images with more than 1 objects, of which the largest are targets' in printed
    assert 'has no split other; it has train2017, val2017' in printed and 'to evaluate' not in printed
    with pytest.raises(InputError) as error:
        check_data.main([str(tmp_path / 'nothing'), f'--html={tmp_path}'])
    assert error.value.argument == 'html'


def test_a_seed_draws_what_is_new(coco_folder, tmp_path):
    make_hf(dict(TINY, depth=2), num_classes=5).save_pretrained(tmp_path / 'hf')
    new = [f'--new_classes={coco_folder / "annotations" / "instances_val2017.json"}', '--new_det_tokens=9']
    drawn = []
    for seed in (0, 1):
        folder = tmp_path / f'{len(drawn)}'
        convert.main([
            f'--input={tmp_path / "hf"}', f'--output={folder}', '--to=safetensors', f'--seed={seed}', *new,
        ])  # fmt: skip
        params = read_detector(folder).params
        tokens, head = params['backbone']['det_token'][0], params['class_embed']['layers_2']['kernel']
        drawn.append((tokens[7:], head[:, 1:4]))  # the other tokens and "no object" are kept
    for first, other in zip(*drawn, strict=True):
        assert first.shape == other.shape and (first != other).any(axis=0).all()


def test_values_out_of_bounds_are_named_and_a_bad_image_is_an_exit_status(saved, coco_folder, tmp_path):
    place = [f'--weights={saved}', f'--output={tmp_path / "out"}']
    with pytest.raises(InputError, match='not between 0 and 1'):
        attention.main([*place, '--threshold=1.5', str(coco_folder / 'val2017')])
    with pytest.raises(InputError, match='images is 0, less than 1'):
        speed.main([*place, f'--data={coco_folder}', '--images=0'])
    (tmp_path / 'bad.jpg').write_bytes(b'<html>')
    with pytest.raises(SystemExit) as end:
        attention.main([*place, str(tmp_path / 'bad.jpg')])
    assert end.value.code == 1


def test_speed_says_of_which_weights_it_is(saved, coco_folder, tmp_path):
    speed.main([f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}', '--images=1'])
    numbers = json.loads((tmp_path / 'speed.json').read_text())
    assert numbers['fingerprint'] == integrity.fingerprint(read_detector(saved).params)


def test_tokens_are_correlated_over_images_and_over_their_means(saved, coco_folder, tmp_path):
    tokens.main([f'--weights={saved}', f'--data={coco_folder}', f'--output={tmp_path}'])
    numbers = json.loads((tmp_path / 'tokens.json').read_text())
    for what in ('distance', 'classes'):
        assert numbers[f'rho with {what}'] != numbers[f'rho with {what}, images averaged first']
