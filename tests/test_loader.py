import numpy as np
import pytest

from yolos_jax.data import geometry, loader, plan, records
from yolos_jax.errors import InputError

RECIPE = geometry.Recipe((96, 112), 176, crop_from=(96, 112, 128), crop_min=80, crop_max=128)


@pytest.fixture(scope='module')
def train_set(coco_folder):
    return records.read_coco(coco_folder, 'train2017')


def make(train_set, seed=0, max_targets=6):
    return loader.TrainBatches(train_set, RECIPE, (51, 83), 4, max_targets, seed)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_a_function_of_its_step(train_set):
    """Reached by iterating, or asked for alone, in any order: the same bits."""
    walked = dict(loader.load(make(train_set), range(15)))  # past two epochs
    fresh = make(train_set)
    for step in (14, 0, 7):
        ((_, alone),) = loader.load(fresh, [step])
        same(alone, walked[step])
    ((_, other),) = loader.load(make(train_set, seed=1), [0])
    assert (other['grid'] != walked[0]['grid']).any()


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_processes_load_the_parts_of_one_batch(processes, train_set):
    size = 4 // processes
    parts = [
        dict(loader.load(make(train_set), range(3), slice(i * size, (i + 1) * size)))
        for i in range(processes)
    ]
    for step, whole in loader.load(make(train_set), range(3)):
        same({name: np.concatenate([part[step][name] for part in parts]) for name in whole}, whole)


def test_boxes_lie_on_their_objects(train_set):
    """The shapes are vivid on a grey ground: inside a box colours are strong, and stay so when moved."""
    inside, outside = [], []
    for _, batch in loader.load(make(train_set), range(6)):
        for patches, grid, boxes, valid in zip(
            *(batch[k] for k in ('patches', 'grid', 'boxes', 'valid')), strict=True
        ):
            rows, columns = grid
            cells = patches[: rows * columns].reshape(rows, columns, 16, 16, 3).swapaxes(1, 2)
            image = cells.reshape(rows * 16, columns * 16, 3).astype(int)
            vivid = image.max(axis=-1) - image.min(axis=-1)
            mask = np.zeros(vivid.shape, bool)
            for cx, cy, w, h in boxes[valid]:
                y, x = np.array([cy - h / 2, cy + h / 2]), np.array([cx - w / 2, cx + w / 2])
                (top, bottom), (left, right) = np.rint(y * rows * 16), np.rint(x * columns * 16)
                mask[int(top) : int(bottom), int(left) : int(right)] = True
            inside += vivid[mask].tolist()
            outside += vivid[~mask].tolist()
    assert np.median(inside) > 3 * np.median(outside)


def test_targets_beyond_the_slots_are_the_smallest(train_set):
    full = dict(loader.load(make(train_set), range(6)))
    dropped = 0
    for step, few in loader.load(make(train_set, max_targets=2), range(6)):
        for row in range(4):
            areas = np.prod(full[step]['boxes'][row][full[step]['valid'][row]][:, 2:], axis=1)
            kept = np.prod(few['boxes'][row][few['valid'][row]][:, 2:], axis=1)
            np.testing.assert_array_equal(np.sort(kept), np.sort(areas)[-2:])
            dropped += len(areas) - len(kept)
    assert dropped > 0


def test_an_unreadable_image_stops_the_loader_and_is_named(coco_folder, tmp_path):
    import shutil

    shutil.copytree(coco_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'train2017' / '000000000005.jpg').write_bytes(b'\xff\xd8\xffbroken')
    source = make(records.read_coco(tmp_path / 'data', 'train2017'))
    with pytest.raises(InputError, match='000000000005.jpg'):
        list(loader.load(source, range(6)))


def test_the_loader_stops_when_nobody_asks_on(train_set):
    import threading

    before = threading.active_count()
    batches = loader.load(make(train_set), range(1000))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_evaluation_rows_without_an_image_are_empty(coco_folder):
    source = loader.EvalBatches(records.read_coco(coco_folder, 'val2017'), 112, 176, 4)
    assert len(source) == 3
    batches = dict(loader.load(source, range(3)))
    assert source.rows(2)[0].tolist()[2:] == [-1, -1]
    assert batches[2]['grid'][2:].tolist() == [[1, 1], [1, 1]] and not batches[2]['patches'][2:].any()
    expected = plan.in_order(source.rows(0)[1]['shape'].prod(axis=1) // 256, (10**6,), 4)[0]
    assert sorted(expected[expected >= 0]) == list(range(10))
