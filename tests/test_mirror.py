"""Which files of a run's folder are uploaded to its bucket, and which are removed there."""

import concurrent.futures
import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from yolos_jax.errors import StorageError
from yolos_jax.run.checkpoints import Checkpoints
from yolos_jax.run.mirror import Mirror
from yolos_jax.weights import checkpoint

WHOLE = {
    f'checkpoints/{step}/{file}' for step in (6, 9) for file in ('meta/metadata', 'state/a', 'AP.json')
}
CUT = {'checkpoints/12/state/a'}  # a killed run was uploading it
BROKEN = {'checkpoints/broken-3/meta/metadata', 'checkpoints/broken-3/state/a'}


class Store:
    """A bucket in memory that notes what was removed, in order."""

    def __init__(self, names):
        self.objects, self.removed, self.uploads, self.fails = set(names), [], [], False

    def names(self, prefix=''):
        return sorted(name for name in self.objects if name.startswith(prefix))

    def download(self, paths):
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def upload(self, paths, check):
        check()
        if self.fails:
            raise StorageError('no answer')
        self.objects |= set(paths)
        self.uploads.append(sorted(paths))

    def remove(self, name):
        self.removed.append(name)
        self.objects.discard(name)

    def remove_all(self, prefix):
        for name in self.names(prefix):
            self.remove(name)


@pytest.fixture
def pulled(tmp_path):
    """A bucket, and the mirror of its local copy."""
    store = Store(WHOLE | CUT | BROKEN)
    mirror = Mirror(store, tmp_path / 'run', tmp_path / 'programs', SimpleNamespace(check=lambda: None))
    mirror.pull()
    return store, mirror


def test_incomplete_steps_are_removed_and_broken_ones_kept(pulled):
    store, mirror = pulled
    steps = mirror.folder / 'checkpoints'
    assert sorted(path.name for path in steps.iterdir()) == ['6', '9']
    for name in ('15.orbax-checkpoint-tmp', '_trash'):  # being written, and being removed
        (steps / name / 'meta').mkdir(parents=True)
        (steps / name / 'meta' / 'metadata').touch()
    mirror.push()
    assert store.objects == WHOLE | BROKEN


def test_a_step_is_removed_where_the_run_did_so_its_meta_first(pulled):
    store, mirror = pulled
    for step in ('6', '9'):  # one by whatever cleans /tmp
        shutil.rmtree(mirror.folder / 'checkpoints' / step)
    mirror.remove('6')
    mirror.push()
    assert store.objects == {name for name in WHOLE if '/9/' in name} | BROKEN
    assert [name for name in store.removed if '/6/' in name][0] == 'checkpoints/6/meta/metadata'


def test_a_step_that_was_cut_short_and_is_saved_again_stays(pulled):
    store, mirror = pulled
    again = {'checkpoints/12/meta/metadata', *CUT}
    for name in again:
        (mirror.folder / name).parent.mkdir(parents=True)
        (mirror.folder / name).touch()
    mirror.push()
    assert store.objects == WHOLE | BROKEN | again
    shutil.rmtree(mirror.folder / 'checkpoints' / '12')  # by whatever cleans /tmp
    mirror.push()
    assert store.objects == WHOLE | BROKEN | again


def test_a_file_is_uploaded_when_it_changed_and_not_at_every_line_of_the_log(pulled):
    store, mirror = pulled
    log = mirror.folder / 'log.txt'
    for text, uploaded in (('1', ['log.txt']), ('1', []), ('2', ['log.txt'])):
        log.write_text(text)
        os.utime(log, ns=(0, 10**18 + int(text)))  # two lines of one length in one second
        store.uploads.clear()
        mirror.push()
        assert sum(store.uploads, []) == uploaded
    log.write_text('another')
    mirror._pushed -= 100
    mirror.push_now_and_then()
    mirror.finish_push()
    log.write_text('and one more')
    store.uploads.clear()
    mirror.push_now_and_then()
    mirror.finish_push()
    assert not store.uploads


def test_arrays_that_a_run_resumes_from_are_not_uploaded_again(pulled):
    store, mirror = pulled
    mirror.fetch(mirror.folder / 'checkpoints' / '9')
    assert (mirror.folder / 'checkpoints' / '9' / 'state' / 'a').exists()
    mirror.push()
    assert not any(store.uploads)


def test_compiled_programs_are_kept_in_the_bucket_for_a_start_on_another_host(pulled, tmp_path):
    store, mirror = pulled
    (tmp_path / 'programs').mkdir()
    (tmp_path / 'programs' / 'x-cache').touch()
    mirror.push()
    shutil.rmtree(tmp_path / 'programs')
    mirror.pull()
    assert (tmp_path / 'programs' / 'x-cache').exists()


def test_the_config_by_which_a_run_is_known_is_uploaded_first(pulled):
    store, mirror = pulled
    for name in (
        'config.json',
        'log.txt',
        '_trash_can.jpg',
        '.hidden.jpg',
        '.lock',
        '.log.txt.host-1.part',
    ):
        (mirror.folder / name).touch()
    mirror.push()
    assert store.uploads[:2] == [['config.json'], ['.hidden.jpg', '_trash_can.jpg', 'log.txt']]


def steps_of(store):
    return {name.split('/')[1] for name in store.objects if name.startswith('checkpoints/')}


def test_the_bucket_follows_what_becomes_of_the_checkpoints(pulled):
    store, mirror = pulled
    before = steps_of(store) - {'12'}
    shutil.rmtree(mirror.folder)
    folder = mirror.folder / 'checkpoints'
    state = lambda step: {'step': jnp.int32(step), 'params': {'x': jnp.ones(3)}}
    checkpoints = Checkpoints(folder, mirror)
    for step in (20, 21, 22):
        checkpoints.save(state(step), {})
        mirror.finish_push()
        assert f'checkpoints/{step}/meta/metadata' in store.objects  # and not only with the next
    checkpoints.note_ap(22, 0.5)
    mirror.finish_push()
    assert 'checkpoints/22/AP.json' in store.objects
    checkpoints.close()
    mirror.push()
    assert steps_of(store) == before | {'21', '22'}
    (folder / '22' / 'meta' / 'metadata').write_text('{}')
    assert Checkpoints(folder, mirror).restore(state(0))[0]['step'] == 21
    mirror.push()
    assert steps_of(store) == before | {'21', 'broken-22'}  # or the next start would find it damaged too


def test_a_step_is_on_the_disk_before_the_error_of_the_last_upload_is_raised(pulled):
    store, mirror = pulled
    shutil.rmtree(mirror.folder)
    checkpoints = Checkpoints(mirror.folder / 'checkpoints', mirror)
    store.fails = True
    state = lambda step: {'step': jnp.int32(step), 'params': {'x': jnp.ones(3)}}
    checkpoints.save(state(1), {})
    concurrent.futures.wait([mirror._pushing])
    mirror.push_now_and_then(every=0)  # as at a log line
    with pytest.raises(StorageError, match='no answer'):
        checkpoints.save(state(2), {})
    assert checkpoint.steps(mirror.folder / 'checkpoints') == [1, 2]


def test_an_upload_that_fails_between_checkpoints_is_tried_again(pulled):
    store, mirror = pulled
    (mirror.folder / 'metrics.jsonl').touch()
    store.fails = True
    mirror.push_now_and_then(every=0)
    mirror.finish_push()
    with pytest.raises(StorageError):
        mirror.push()
    store.fails = False
    mirror.push()
    assert 'metrics.jsonl' in store.objects
