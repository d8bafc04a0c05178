"""Which files of a run's folder are uploaded to its bucket, and which are removed there."""

import concurrent.futures
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


def test_a_step_is_on_the_disk_before_the_error_of_the_last_upload_is_raised(pulled):
    store, mirror = pulled
    shutil.rmtree(mirror.folder)
    checkpoints = Checkpoints(mirror.folder / 'checkpoints', mirror)
    store.fails = True
    state = lambda step: {'step': jnp.int32(step), 'params': {'x': jnp.ones(3)}}
    checkpoints.save(state(1), {})
    concurrent.futures.wait([mirror._push])
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
