"""What a model card says, and that what cannot be known is said to be so."""

import dataclasses
import json
import os

import pytest
from helpers import TINY, make_hf, read_detector
from huggingface_hub import ModelCard

from yolos_jax.errors import InputError
from yolos_jax.run.energy import Energy
from yolos_jax.tools import card
from yolos_jax.weights import hf, model_card, native
from yolos_jax.weights.pretrained import Pretrained

CONFIG = {
    'epochs': 7, 'learning_rate': 0.1, 'augment.sizes': [96, 112], 'val_split': 'val2017',
    'data': '/home/me/cats',
}  # fmt: skip
METRICS = {
    'AP': 0.4321, 'AP_large': -1.0, 'classes': {'cat': 0.5, 'a|b\n# dog': 0.25, '<b>': 0.1},
    'about': {'data': '/home/me/cats', 'split': 'val2017'},
}  # fmt: skip
GROUP = {'name': 'night', 'images': 3, 'objects': 9, 'ap': 0.123, 'interval': [0.1, 0.2]}
REPORT = {
    'calibration': {'error': 0.25},
    'groups': {'images.light': [GROUP]},
    'corrupted': {'fog': [0.3, 0.2, 0.1]},
}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf')
    make_hf(dict(TINY, depth=2), num_classes=4).save_pretrained(folder)
    return read_detector(folder)


def known(pretrained, **about):
    fields = {
        name: getattr(pretrained, name) for name in ('model', 'params', 'classes', 'size', 'max_size')
    }
    return Pretrained(**fields, about=about)


def test_nothing_is_invented_where_nothing_is_known(pretrained):
    text = model_card.text(known(pretrained))
    assert 'Not known: the weights were converted' in text and 'Not measured.' in text
    assert 'None' not in text and 'nan' not in text
    assert ModelCard(text).data.eval_results is None


def test_a_run_says_how_it_was_trained_but_not_where_its_data_lie(pretrained):
    goodput = {'wall_s': 7200.0, 'training_s': 3600.0, 'starts': 2, 'steps_lost': 5}
    training = {'hardware': '8 x TPU v5 lite', 'training_images': '45, with 90 objects'}
    about = dict(config=CONFIG, AP=0.31234, step=70, goodput=goodput, training=training, energy=7.2e6)
    text = model_card.text(known(pretrained, **about))
    for row in (
        '| epochs | 7 |', '| shorter sides in training | [96, 112] |',
        '| hours | 2.00, of which 1.00 training |',
        '| hardware | 8 x TPU v5 lite |', '| training images | 45, with 90 objects |', '| data | cats |',
        '| energy | 2.000 kWh, of the first machine |', 'AP 0.312 on val2017',
    ):  # fmt: skip
        assert row in text, row
    assert '/home/me' not in text
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == 0.3123 and result.dataset_split == 'val2017'


def test_measurements_are_in_tables_that_special_characters_cannot_break(pretrained):
    text = model_card.text(known(pretrained, config=CONFIG), METRICS, REPORT)
    assert 'yolos eval --weights=PATH --data=FOLDER --split=val2017 --output=DIR' in text
    of_file = METRICS | {'about': METRICS['about'] | {'split': 'val.json'}}
    assert '--json=val.json --images=FOLDER' in model_card.text(known(pretrained, config=CONFIG), of_file)
    own = {'size': [pretrained.size, pretrained.max_size], 'dtype': 'float32'}
    other = {'size': [64, 96], 'dtype': 'bfloat16'}
    for about, options in ((own, ''), (other, ' --size=64 --max_size=96 --dtype=bfloat16')):
        measured = METRICS | {'about': METRICS['about'] | about}
        of_run = model_card.text(known(pretrained, config=CONFIG), measured)
        assert f'--split=val2017{options} --output=DIR' in of_run
    assert '| cat | 0.500 |' in text and '| a/b # dog | 0.250 |' in text
    assert r'| \<b> | 0.100 |' in text
    assert '| night | 3 | 9 | 0.123 | 0.100 to 0.200 |' in text
    assert 'Under fog, weak to strong: AP 0.300, 0.200, 0.100.' in text
    assert 'calibration error (ECE) 0.250' in text and 'not examined' not in text and '-1.000' not in text
    assert ModelCard(text).data.eval_results[0].metric_value == 0.4321


def test_the_names_of_classes_bring_no_markup_into_a_card(pretrained):
    classes = {0: '<img src=x>', 1: '[cat](http://x)', 2: 'R&D `x`'}
    named = dataclasses.replace(pretrained, classes=classes)
    assert r'3 classes: \<img src=x>, \[cat](http://x), R\&D \`x\`.' in model_card.text(named)
    with pytest.raises(InputError, match="the name of a class has control characters: 'cat"):
        dataclasses.replace(pretrained, classes={0: 'cat\n\n## Licence'})


def test_the_card_command_adds_measurements_and_refuses_those_of_other_weights(
    pretrained, tmp_path, capsys
):
    make_hf(dict(TINY, depth=2), num_classes=4).save_pretrained(tmp_path / 'hf')
    arguments = [f'--weights={tmp_path}/hf', f'--output={tmp_path}/README.md', f'--evaluation={tmp_path}']
    with pytest.raises(InputError, match=r'metrics\.json: cannot be read'):
        card.main(arguments)
    (tmp_path / 'metrics.json').write_text('{"AP": 1}')
    with pytest.raises(InputError, match=f'^{tmp_path}: one of its files is not of this version'):
        card.main(arguments)
    assert not (tmp_path / 'README.md').exists()
    (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
    card.main(arguments)
    assert '| cat | 0.500 |' in (tmp_path / 'README.md').read_text()
    for key in ('sha256', 'fingerprint'):
        (tmp_path / 'metrics.json').write_text(json.dumps(METRICS | {'about': {key: 'another'}}))
        with pytest.raises(InputError, match=f'measured other weights, with {key} another') as error:
            card.main(arguments)
        assert error.value.argument == 'evaluation'
    (tmp_path / 'speed.json').write_text(json.dumps({'fingerprint': 'another'}))
    with pytest.raises(InputError, match='measured other weights') as error:
        card.main([*arguments[:2], f'--speed={tmp_path}'])
    assert error.value.argument == 'speed'
    (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
    (tmp_path / 'speed.json').write_text('{"fps": 3}')
    with pytest.raises(
        InputError, match=f'^{tmp_path} or {tmp_path}: one of its files is not of this version'
    ):
        card.main([*arguments, f'--speed={tmp_path}'])


def test_a_card_names_the_library_that_loads_the_folder(pretrained, tmp_path):
    for write, library in ((hf.write, 'transformers'), (native.write, 'yolos_jax')):
        write(pretrained, tmp_path / library)
        path = tmp_path / library / 'README.md'
        cards = [path.read_text()]
        card.main([f'--weights={tmp_path / library}', f'--output={path}'])
        for text in (*cards, path.read_text()):
            assert ModelCard(text).data.library_name == library
            assert ("transformers' YOLOS" in text) == (library == 'transformers')


def counter(folder, package, joules, around=10):
    zone = folder / f'intel-rapl:{package}'
    zone.mkdir(exist_ok=True)
    (zone / 'energy_uj').write_text(f'{int(joules * 1e6)}\n')
    (zone / 'max_energy_range_uj').write_text(f'{int(around * 1e6)}\n')


def test_energy_is_what_the_counters_moved_also_where_one_starts_anew(tmp_path):
    counter(tmp_path, 0, 3)
    counter(tmp_path, 1, 9)
    (tmp_path / 'intel-rapl:0:0').mkdir()  # a part of the first, which counts it already
    energy = Energy(100.0, tmp_path, smi='no-such-command')
    counter(tmp_path, 0, 4)
    counter(tmp_path, 1, 1)  # 9 -> 10 -> 1
    energy.update()
    assert energy.joules == pytest.approx(103)


def test_energy_of_gpus_is_their_power_over_time(tmp_path):
    smi = tmp_path / 'smi'
    smi.write_text('#!/bin/sh\necho 100.5\necho 200\n')
    os.chmod(smi, 0o755)
    energy = Energy(None, tmp_path, smi=str(smi))
    energy._clock -= 10
    energy.update()
    assert 3005 <= energy.joules < 3305


def test_energy_that_no_one_counts_is_not_zero_but_unknown(tmp_path):
    energy = Energy(None, tmp_path, smi='no-such-command')
    energy.update()
    assert energy.joules is None
