import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from yolos_jax import optim, steps, weights
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.run import checkpoints
from yolos_jax.run import mesh as meshes
from yolos_jax.run.checkpoints import Checkpoints
from yolos_jax.weights import checkpoint, integrity, step_ap

# Orbax leaves tasks behind where a file is damaged
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def state():
    params = init_params(Yolos(**TINY, num_classes=3), jax.random.key(0))
    return steps.init_state(params, optim.make_optimizer(params, 1e-3))


# what `checkpoint.describe` says of the model, as every checkpoint of a run does
MODEL = Yolos(**TINY, num_classes=3)
ABOUT = checkpoint.describe(weights.Pretrained(MODEL, {}, {1: 'cat'}, 64, 128))


def at(state, step):
    """The state of a step, told apart from others by its parameters."""
    params = jax.tree.map(lambda x: x + step, state['params'])
    return state | {'params': params, 'step': jnp.int32(step)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(folder, state, aps):
    saved = Checkpoints(folder)
    for step, ap in aps.items():
        saved.save(at(state, step), ABOUT | {'note': step})
        if ap is not None:
            saved.note_ap(step, ap)
    saved.close()


def test_a_saved_state_is_restored_bit_for_bit(state, tmp_path):
    save(tmp_path, state, {5: None, 8: 0.3})
    restored, meta = Checkpoints(tmp_path).restore(state)
    same(restored, at(state, 8))
    assert meta['note'] == 8


def test_a_save_in_a_thread_succeeds_while_another_error_is_handled(state, tmp_path):
    def save_again():
        try:
            raise OSError('no network')
        except OSError:
            save(tmp_path, state, {5: None, 8: 0.3})

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(save_again).result()
    assert checkpoint.steps(tmp_path) == [5, 8]


def test_a_checkpoint_without_permission_is_named_and_not_taken_for_damaged(state, tmp_path, monkeypatch):
    save(tmp_path, state, {1: None, 2: None})
    secret = next(path for path in (tmp_path / '2' / 'state').rglob('*') if path.is_file())
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: access(path, mode) and path != secret)
    with pytest.raises(InputError, match=f'{secret}: cannot be read'):
        Checkpoints(tmp_path).restore(state)
    assert secret.exists()
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(InputError, match='cannot write to it'):
        Checkpoints(tmp_path)


def test_a_link_to_nothing_is_no_folder_for_checkpoints(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'disk that is not mounted')
    with pytest.raises(InputError, match='/link: cannot write to it .a link to nothing'):
        Checkpoints(tmp_path / 'link')
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='/file: cannot write to it .File exists'):
        Checkpoints(tmp_path / 'file')


@pytest.mark.parametrize('name', ['a[b', 'a\\b', 'caf\udce9'])
def test_folders_that_orbax_cannot_use_are_refused(name, tmp_path):
    with pytest.raises(InputError, match='checkpoints cannot be in a folder'):
        checkpoint.check_path(tmp_path / name)


def test_an_empty_folder_restores_nothing(state, tmp_path):
    (tmp_path / '\u00b2').mkdir()  # isdigit, and no number
    assert not checkpoint.steps(tmp_path)
    assert Checkpoints(tmp_path / 'new').restore(state) is None


def test_the_newest_two_and_the_best_are_kept(state, tmp_path):
    save(tmp_path, state, {1: 0.1, 2: 0.5, 3: None})
    save(tmp_path, state, {4: 0.3, 5: float('nan'), 6: 0.2})  # resumed
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert not (tmp_path / checkpoints.TRASH).exists()  # the others are gone from the disk
    params, _ = checkpoint.read_params(tmp_path)
    same(params, jax.device_get(at(state, 2)['params']))  # the best, for use; a run resumes from 6


def test_the_first_of_equally_good_steps_is_the_best(tmp_path):
    for step, ap in enumerate((0.1, 0.3, 0.3, -1.0), 1):
        (tmp_path / str(step) / 'state').mkdir(parents=True)
        (tmp_path / str(step) / 'meta').mkdir()
        (tmp_path / str(step) / checkpoint.COMMITTED).touch()
        step_ap.write(tmp_path / str(step), ap)
    assert Checkpoints(tmp_path).best() == 2


def test_a_long_run_does_not_pile_up_what_it_replaced(state, tmp_path):
    saved = Checkpoints(tmp_path)
    for step in range(1, 8):
        saved.save(at(state, step), ABOUT)
        saved.note_ap(step, 0.1)
    trash = tmp_path / checkpoints.TRASH
    assert len(list(trash.glob('*'))) <= 1  # of the four that are gone
    saved.close()


def test_what_a_killed_run_was_saving_is_removed_and_a_step_is_saved_once(state, tmp_path):
    save(tmp_path, state, {5: None})
    cut = tmp_path / '7.orbax-checkpoint-tmp'
    (cut / 'state').mkdir(parents=True)
    saved = Checkpoints(tmp_path)
    saved.save(at(state, 5), ABOUT | {'note': 'again'})  # as a run that stops where it resumed
    saved.save(at(state, 8), ABOUT)
    saved.close()
    assert checkpoint.steps(tmp_path) == [5, 8] and not cut.exists()
    assert checkpoint.read_meta(tmp_path / '5')['note'] == 5


def test_nothing_changes_in_a_folder_that_is_not_the_runs_any_more(state, tmp_path):
    def check():
        raise InputError('was replaced')

    save(tmp_path, state, {1: 0.1, 2: 0.2})
    saved = Checkpoints(tmp_path, check=check)
    for act in (lambda: saved.save(at(state, 3), ABOUT), lambda: saved.note_ap(2, 0.9), saved.close):
        with pytest.raises(InputError, match='was replaced'):
            act()
    assert checkpoint.steps(tmp_path) == [1, 2] and saved.ap(2) == 0.2


def test_an_ap_is_noted_of_saved_steps_alone(state, tmp_path):
    save(tmp_path, state, {5: 0.1})
    saved = Checkpoints(tmp_path)
    saved.note_ap(10, 0.2)  # of a step that was not saved, for its loss was not finite
    saved.close()
    assert checkpoint.steps(tmp_path) == [5] and not (tmp_path / '10').exists()


def test_a_sharded_reader_gets_the_same_values(state, tmp_path):
    save(tmp_path, state, {1: None})
    mesh = meshes.make_mesh()
    restored, _ = Checkpoints(tmp_path).restore(meshes.replicate(state, mesh))
    same(jax.device_get(restored), jax.device_get(at(state, 1)))
    assert len(restored['params']['backbone']['cls_token'].sharding.device_set) == 8


def test_a_checkpoint_of_another_model_is_named(state, tmp_path):
    save(tmp_path, state, {1: None})
    other = Yolos(**TINY, num_classes=9)
    params = init_params(other, jax.random.key(0))
    like = steps.init_state(params, optim.make_optimizer(params, 1e-3))
    with pytest.raises(InputError, match=r'another model.*class_embed.*\[32, 4\].*\[32, 10\]'):
        Checkpoints(tmp_path).restore(like)
    assert checkpoint.steps(tmp_path) == [1]


def test_other_types_are_not_cast_silently(state, tmp_path):
    save(tmp_path, state, {1: None})
    half = dict(state, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state['params']))
    with pytest.raises(InputError, match='float32'):
        Checkpoints(tmp_path).restore(half)


def damage(path, kind, rng):
    data = bytearray(path.read_bytes())
    if kind == 'delete':
        path.unlink()
    elif kind == 'truncate':
        path.write_bytes(data[: len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def damaged_copies(state, tmp_path, kind):
    """A folder for each file of the newest of two steps, with that file damaged."""
    rng = random.Random(0)
    save(tmp_path / 'clean', state, {1: 0.1, 2: 0.2})
    newest = tmp_path / 'clean' / '2'
    names = [path.relative_to(newest.parent) for path in sorted(newest.rglob('*')) if path.is_file()]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / 'clean', folder)
        damage(folder / name, kind, rng)
        yield folder


DAMAGED = 'damaged checkpoints: files'
KINDS = ['flip', *(pytest.param(kind, marks=pytest.mark.trials) for kind in ('delete', 'truncate'))]


@pytest.mark.row(DAMAGED, count=0)  # it counts its files
@pytest.mark.parametrize('kind', KINDS)
def test_damage_is_never_resumed_from(state, tmp_path, kind, record_property):
    """If a file of the newest step is damaged, that step or the one before is restored intact."""
    fell_back = 0
    for folder in damaged_copies(state, tmp_path, kind):
        record_property('row', (DAMAGED, 1))
        saved = Checkpoints(folder)
        restored, meta = saved.restore(state)
        same(restored, at(state, meta['note']))
        fell_back += meta['note'] == 1
        saved.save(at(state, 2), ABOUT | {'note': 2})  # the run continues and reaches the step again
        saved.close()
        assert checkpoint.steps(folder)[-1] == 2
    assert fell_back > 0


@pytest.mark.row(DAMAGED, count=0)  # it counts its files
@pytest.mark.parametrize('kind', KINDS)
def test_a_detector_from_a_damaged_folder_is_intact_and_an_older_step_is_reported(
    state, tmp_path, kind, capsys, record_property
):
    for folder in damaged_copies(state, tmp_path, kind):
        record_property('row', (DAMAGED, 1))
        params, meta = checkpoint.read_params(folder)
        same(params, jax.device_get(at(state, meta['note'])['params']))
        printed = capsys.readouterr().err
        if meta['step'] == 1 and 2 in checkpoint.steps(folder) and step_ap.read(folder / '2'):
            assert 'damaged' in printed and 'step 1 is read instead' in printed


AP = step_ap.FILE


@pytest.mark.row('damaged checkpoints: bytes of the meta', count=800)
def test_every_byte_of_the_meta_is_under_a_hash(state, tmp_path):
    save(tmp_path, state, {1: None})
    path = tmp_path / '1' / 'meta' / 'metadata'
    whole = path.read_bytes()
    meta = checkpoint.read_meta(tmp_path / '1')
    for i in range(0, len(whole), 1 + len(whole) // 400):
        for bit in (0, 5):  # another digit, another case
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
            with contextlib.suppress(ValueError):  # or the same number, written otherwise
                assert checkpoint.read_meta(tmp_path / '1') == meta
    assert isinstance(meta['checksums'], dict)


def test_every_byte_of_an_ap_is_under_a_hash(state, tmp_path):
    save(tmp_path, state, {1: 0.25})
    path = tmp_path / '1' / AP
    whole = path.read_bytes()
    for i, bit in itertools.product(range(len(whole)), range(8)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
        assert step_ap.read(tmp_path / '1') in (None, 0.25)
    assert step_ap.is_damaged(tmp_path / '1')


def test_the_best_step_stays_where_its_ap_is_damaged(state, tmp_path):
    save(tmp_path, state, {1: 0.1, 2: 0.5, 3: 0.2})
    (tmp_path / '2' / AP).write_bytes(b'{"AP": 0.')
    save(tmp_path, state, {4: 0.3, 5: 0.1, 6: 0.1})
    assert 2 in checkpoint.steps(tmp_path)


def test_the_same_step_may_be_damaged_again_and_again(state, tmp_path):
    save(tmp_path, state, {1: None})
    for _ in range(4):
        saved = Checkpoints(tmp_path)
        saved.save(at(state, 2), ABOUT)
        saved.close()
        (tmp_path / '2' / 'meta' / 'metadata').write_text('{}')
        assert int(Checkpoints(tmp_path).restore(state)[0]['step']) == 1
    assert len([*tmp_path.glob('broken-2*')]) == 4


def test_arrays_that_are_not_those_of_the_model_are_refused(state, tmp_path):
    pretrained = weights.Pretrained(MODEL, state['params'], {1: 'cat'}, 64, 128)
    checkpoint.write(pretrained, tmp_path / 'x')
    path = tmp_path / 'x' / '0' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    meta['model']['depth'] += 1
    path.write_text(json.dumps(checkpoint.sealed(meta)))
    with pytest.raises(InputError, match='its arrays are not those of its model'):
        checkpoint.read(tmp_path / 'x')


def test_a_run_without_a_whole_checkpoint_does_not_restart(state, tmp_path):
    save(tmp_path, state, {1: None})
    for path in (tmp_path / '1' / 'state').rglob('*'):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b'')
    with pytest.raises(InputError, match='no checkpoint is (intact|complete)'):
        Checkpoints(tmp_path).restore(state)


def test_damaged_weights_are_refused(state, tmp_path):
    pretrained = weights.Pretrained(Yolos(**TINY, num_classes=3), state['params'], {1: 'cat'}, 64, 128)
    checkpoint.write(pretrained, tmp_path / 'x')
    same(checkpoint.read(tmp_path / 'x').params, jax.device_get(state['params']))
    largest = max((tmp_path / 'x' / '0' / 'state').rglob('d/*'), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(InputError, match='damaged'):
        checkpoint.read(tmp_path / 'x')


def test_a_step_that_its_run_has_just_removed_is_called_gone_and_not_damaged(state, tmp_path):
    save(tmp_path, state, {1: 0.1})
    with pytest.raises(InputError, match='5: is gone; a run keeps its newest'):
        checkpoint.read(tmp_path, 5)


def test_a_checksum_sees_every_bit_under_every_sharding():
    mesh = meshes.make_mesh()
    x = np.random.default_rng(0).normal(size=(8, 33)).astype(np.float32)
    whole = integrity.checksums({'x': x})
    assert integrity.checksums(meshes.shard({'x': x}, mesh)) == whole
    for y in (np.tile(x, (9, 99))[:, ::2], x.astype(jnp.bfloat16), np.int32(7)):  # on the host and a device
        assert integrity.checksums({'x': np.asarray(y)}) == integrity.checksums({'x': jnp.asarray(y)})
    bits = x.view(np.uint32)
    rng = random.Random(0)
    for _ in range(100):
        place = rng.randrange(8), rng.randrange(33)
        bits[place] ^= 1 << (bit := rng.randrange(32))
        assert integrity.checksums({'x': x}) != whole
        bits[place] ^= 1 << bit
    assert integrity.checksums({'x': x[:, ::-1].copy()}) != whole  # and every place


def test_metadata_is_readable_by_people(state, tmp_path):
    save(tmp_path, state, {1: None})
    assert json.loads((tmp_path / '1' / 'meta' / 'metadata').read_text())['note'] == 1


def test_a_model_of_a_later_version_is_refused():
    fields = {name: getattr(Yolos(**TINY), name) for name in checkpoint.MODEL_FIELDS}
    assert checkpoint.model_of(fields) == Yolos(**TINY)
    with pytest.raises(InputError, match='its model has swiglu, which a later version wrote'):
        checkpoint.model_of(fields | {'swiglu': True})


def test_the_reason_of_a_failed_save_is_that_of_the_system():
    text = (
        f'RESOURCE_EXHAUSTED: Error writing local file "{300 * "x"}": Failed to write 9 bytes to file 7: '
    )
    text += 'No space left on device '
    for details in ("[os_error_code='28'] [spec={'a': 1}]", "[spec={'a': true}] [os_error_code='28']"):
        assert checkpoint.reason_of(ValueError(text + details)) == 'No space left on device'
    assert checkpoint.reason_of(ValueError('no\n  path')) == 'no path'


def test_a_step_without_an_ap_is_worse_than_one_with_0():
    aps = [None, -1.0, math.nan, math.inf]  # -1: of a split without objects
    assert [step_ap.rank(ap) for ap in aps] == [-math.inf] * 4 and step_ap.rank(0.0) == 0
