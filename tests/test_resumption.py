import contextlib
import shutil

import jax
import pytest
from helpers import TINY, launch, result, tiny_config
from ml_collections import ConfigDict
from yolos_jax.configs import common

from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import config_checks, config_files, resumption, workdir
from yolos_jax.weights import Pretrained, checkpoint


def test_a_new_run_writes_over_nothing(coco_folder, tmp_path):
    (tmp_path / 'README.md').write_text('notes')
    (tmp_path / 'config.json').write_text('{"model_type": "yolos"}')
    with pytest.raises(InputError, match='holds no run, but config.json, README.md, which') as error:
        launch(tiny_config(data=coco_folder), tmp_path)
    assert error.value.argument == 'workdir' and (tmp_path / 'README.md').read_text() == 'notes'
    for name in ('val.json', 'curves.png'):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f'README.md, .*{name}'):
            resumption.check_new(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / 'index').mkdir()  # of a run that ended before its first checkpoint
    resumption.check_new(tmp_path)
    (tmp_path / 'index').rmdir()
    (tmp_path / 'config.json').write_text(
        '{"learning_rate": 1, "init_from": "", "val_split": "val"}'
    )  # of a run whose other folders were removed
    resumption.check_new(tmp_path)


@pytest.mark.parametrize(
    ('changed', 'says'),
    [
        ({'epochs': 2.0}, 'epochs is 2.0, of type float and not int'),
        ({'freeze': 6}, 'freeze is 6, of type int and not str'),
        ({'eval_size': '96'}, "eval_size is '96', of type str and not int"),
        ({'freeze': None}, 'freeze is None, of type NoneType and not str'),
        ({'seed': True}, 'seed is True, of type bool and not int'),
        ({'bad_images': '5'}, "bad_images is '5', no number"),
        ({'model.mid_pos_grid': (6, '8')}, r"model.mid_pos_grid is \[6, '8'\], not all whole numbers"),
    ],
)
def test_a_config_made_by_hand_has_the_known_types(changed, says, tmp_path):
    work = workdir.Workdir('', tmp_path, None, None)
    config = ConfigDict(tiny_config().to_dict() | {'learning_rate': 1})  # which may stand for 1.0
    for name, value in changed.items():
        of_model, _, key = name.rpartition('.')
        with (part := config.model if of_model else config).ignore_type():
            part[key] = value
    with pytest.raises(InputError, match=says) as error:
        config, _, _ = resumption.resumed(config, common.get_config(), work)
        config_checks.check_numbers(config)
    assert error.value.argument in changed


def test_a_run_of_a_version_that_noted_fewer_digests_resumes(tmp_path):
    saved, current = (
        {'train': {'boxes': '1'}},
        {'train': {'boxes': '1', 'sizes': '2'}, 'val': {'boxes': '3'}},
    )
    resumption.check_same_data(saved, current, tmp_path)
    with pytest.raises(InputError, match='other data .boxes of train differ'):
        resumption.check_same_data({'train': {'boxes': '4'}}, current, tmp_path)


FREE = (
    'accumulate_steps bad_images data data_cache eval_every init_from log_every model.remat patience '
    'save_every shard_params spike_factor train_images train_json val_images val_json'
).split()


def test_only_values_that_change_no_computation_may_differ_when_a_run_resumes(tmp_path):
    saved, accepted = config_files.flat(common.get_config()), []
    for key in saved:
        with contextlib.suppress(InputError):
            resumption.check_same(saved, saved | {key: -1}, tmp_path)
            accepted.append(key)
    assert sorted(accepted) == FREE
    older = {key: value for key, value in saved.items() if key != 'ema'}
    assert resumption.check_same(older, saved, tmp_path) == []  # it is off
    for before, now in (older, saved | {'ema': 0.9}), (saved | {'gone': 1}, saved):
        with pytest.raises(InputError, match='(ema: None then, 0.9|gone: 1 then, None) now'):
            resumption.check_same(before, now, tmp_path)


def test_a_run_does_not_resume_from_checkpoints_of_a_conversion(tmp_path):
    model = Yolos(**TINY, num_classes=3)
    params = jax.device_get(init_params(model, jax.random.key(0)))
    checkpoint.write(Pretrained(model, params, {1: 'cat'}, 64, 96), tmp_path / 'checkpoints')
    work = workdir.Workdir('', tmp_path, None, None)
    with pytest.raises(InputError, match='its checkpoints are not from a run') as error:
        resumption.resumed(tiny_config(), common.get_config(), work)
    assert error.value.argument == 'workdir'


def test_a_run_evaluates_on_the_annotations_that_it_started_with(coco_folder, tmp_path):
    data = shutil.copytree(coco_folder, tmp_path / 'data')
    annotations = data / 'annotations' / 'instances_val2017.json'
    config = tiny_config(data=data, epochs=1, eval_every=1)
    launch(config, tmp_path / 'run', on_step=lambda _: annotations.write_bytes(b''))
    assert 'AP' in result(tmp_path / 'run')[2][-1]
