import contextlib
import dataclasses
import shutil
import threading

import numpy as np
import pytest
from helpers import coco_content, write_coco

from yolos_jax.data import geometry, loader, plan, records
from yolos_jax.data.batches import EvalBatches, TrainBatches
from yolos_jax.errors import InputError
from yolos_jax.patches import unpatchify
from yolos_jax.tools import make_shapes

RECIPE = geometry.Recipe((96, 112), 176, crop_from=(96, 112, 128), crop_min=80, crop_max=128)


@pytest.fixture(scope='module')
def train_set(coco_folder):
    return records.read(coco_folder, 'train2017')


def make(train_set, seed=0, max_targets=6, batch_size=4):
    options = dict(lengths=(51, 83), batch_size=batch_size, max_targets=max_targets, seed=seed)
    return TrainBatches(train_set, RECIPE, **options)


def planned_of(source, step):
    """The record that the plan has in each row of a batch."""
    return np.array([candidates[0] for candidates in source.rows(step).candidates])


def batches_of(loaded):
    return {step: batch for step, batch, _ in loaded}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_a_function_of_its_step(train_set):
    """Reached by iterating, or asked for alone, in any order: the same bits."""
    walked = batches_of(loader.load(make(train_set), range(15)))  # past two epochs
    fresh = make(train_set)
    for step in (14, 0, 7):
        ((_, alone, _),) = loader.load(fresh, [step])
        same(alone, walked[step])
    ((_, other, _),) = loader.load(make(train_set, seed=1), [0])
    assert (other['grid'] != walked[0]['grid']).any()


def test_a_seed_and_an_epoch_each_have_their_own_order_and_geometry(train_set):
    options = dict(lengths=(83,), batch_size=4, max_targets=6)
    plans = [
        TrainBatches(train_set, RECIPE, seed=s, **options).plan(e) for s, e in ((0, 0), (1, 0), (0, 1))
    ]
    for other in plans[1:]:
        assert (other.indices != plans[0].indices).any()
        assert (other.geometry.shape != plans[0].geometry.shape).any()


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_processes_load_the_parts_of_one_batch(processes, train_set):
    size = 4 // processes
    parts = [
        batches_of(loader.load(make(train_set), range(3), slice(i * size, (i + 1) * size)))
        for i in range(processes)
    ]
    for step, whole, _ in loader.load(make(train_set), range(3)):
        same({name: np.concatenate([part[step][name] for part in parts]) for name in whole}, whole)


def test_objects_beyond_the_slots_are_counted(train_set):
    few = make(train_set, max_targets=1)
    for (_, batch, _), (_, whole, _) in zip(
        loader.load(few, range(3)), loader.load(make(train_set), range(3)), strict=True
    ):
        np.testing.assert_array_equal(batch['dropped'], np.maximum(whole['valid'].sum(1) - 1, 0))
        assert not whole['dropped'].any()


def test_boxes_lie_on_their_objects(train_set):
    """The shapes are vivid on a grey ground: inside a box colours are strong, and stay so when moved."""
    inside, outside = [], []
    for _, batch, _ in loader.load(make(train_set), range(6)):
        for patches, grid, boxes, valid in zip(
            *(batch[k] for k in ('patches', 'grid', 'boxes', 'valid')), strict=True
        ):
            rows, columns = grid
            image = unpatchify(patches, grid).astype(int)
            vivid = image.max(axis=-1) - image.min(axis=-1)
            mask = np.zeros(vivid.shape, bool)
            for cx, cy, w, h in boxes[valid]:
                y, x = np.array([cy - h / 2, cy + h / 2]), np.array([cx - w / 2, cx + w / 2])
                (top, bottom), (left, right) = np.rint(y * rows * 16), np.rint(x * columns * 16)
                mask[int(top) : int(bottom), int(left) : int(right)] = True
            inside += vivid[mask].tolist()
            outside += vivid[~mask].tolist()
    assert np.median(inside) > 3 * np.median(outside)


def test_objects_keep_their_labels_where_a_crop_removes_others(train_set):
    source, removed = make(train_set), 0
    drawn = source.plan(0).geometry
    for _, batch, indices in loader.load(source, range(6)):
        for i, labels, valid in zip(indices, batch['labels'], batch['valid'], strict=True):
            boxes, of_image = train_set.objects(i)
            size = train_set.heights[i], train_set.widths[i]
            _, kept = geometry.move_boxes(boxes, *size, drawn[i])
            assert labels[valid].tolist() == of_image[kept].tolist()
            removed += of_image[kept].tolist() != of_image[: len(kept)].tolist()
    assert removed > 0


def test_targets_beyond_the_slots_are_the_smallest(train_set):
    full = batches_of(loader.load(make(train_set), range(6)))
    dropped = 0
    for step, few, _ in loader.load(make(train_set, max_targets=2), range(6)):
        for row in range(4):
            areas = np.prod(full[step]['boxes'][row][full[step]['valid'][row]][:, 2:], axis=1)
            kept = np.prod(few['boxes'][row][few['valid'][row]][:, 2:], axis=1)
            np.testing.assert_array_equal(np.sort(kept), np.sort(areas)[-2:])
            dropped += len(areas) - len(kept)
    assert dropped > 0


def test_of_a_wide_a_square_and_a_tall_target_the_square_is_the_largest(tmp_path):
    content, boxes = coco_content(), [[0, 0, 90, 2], [0, 0, 20, 20], [0, 0, 2, 90]]
    content['annotations'] = [
        {'id': i, 'image_id': 7, 'category_id': category, 'bbox': box}
        for i, (category, box) in enumerate(zip((5, 2, 5), boxes, strict=True))
    ]
    data = records.read(write_coco(tmp_path, content), 'val')
    source = EvalBatches(data, size=96, max_size=192, batch_size=1, max_targets=1)
    index = data.ids.tolist().index(7)
    row = {name: values[0, ...] for name, values in source.empty(1, 99).items()}
    source.rows(0).fill(0, index, np.zeros((100, 200, 4), np.uint8), row)
    np.testing.assert_allclose(row['boxes'], [[0.05, 0.1, 0.1, 0.2]], rtol=1e-6)
    assert row['labels'].tolist() == [2]


def test_a_batch_with_a_panorama_is_as_long_as_its_positions_need(tmp_path):
    content = coco_content()
    content['images'][0] |= {'height': 32, 'width': 16 * 150}
    data, needed = records.read(write_coco(tmp_path, content), 'val'), 75**2
    assert EvalBatches(data, size=32, max_size=4000, batch_size=2).rows(0).length >= needed
    options = dict(lengths=(400, 6000), batch_size=2, max_targets=3, seed=0)
    source = TrainBatches(data, dataclasses.replace(RECIPE, sizes=(32,), max_size=4000), **options)
    lengths = {(bool(source.plan(step).geometry.crop[1]), source.rows(step).length) for step in range(8)}
    assert lengths == {(False, 6000), (True, 400)}  # a crop is no panorama


@pytest.fixture(scope='module')
def large_folder(tmp_path_factory):
    """Enough images for one in a thousand to be one."""
    root = tmp_path_factory.mktemp('large') / 'shapes'
    make_shapes.write(root, {'train2017': 1000, 'val2017': 1})
    return root


@contextlib.contextmanager
def damage(root, split, numbers, content=b'\xff\xd8\xffbroken'):
    """Records of the folder whose images of these numbers have another content, while the block runs."""
    paths = [root / split / f'{number:012d}.jpg' for number in numbers]
    stored = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(content)
    try:
        yield records.read(root, split)
    finally:
        for path, data in zip(paths, stored, strict=True):
            path.write_bytes(data)


def test_a_bad_image_is_named_once_and_replaced_by_the_next_of_its_batch(large_folder, capsys):
    good = make(records.read(large_folder, 'train2017'))
    bad = 4
    epochs = [epoch * 250 + np.argwhere(good.plan(epoch).indices == bad)[0][0] for epoch in range(3)]
    batches = batches_of(loader.load(good, epochs))
    with damage(large_folder, 'train2017', [bad + 1]) as damaged:
        for part in slice(None), slice(1, 3):
            for step, batch, indices in loader.load(make(damaged), epochs, part):
                planned = planned_of(good, step)
                row = int(np.flatnonzero(planned == bad)[0])
                other = (row + 1) % 4
                expected = {name: values.copy() for name, values in batches[step].items()}
                for values in expected.values():
                    values[row] = values[other]
                same(batch, {name: values[part] for name, values in expected.items()})
                assert indices.tolist() == np.where(planned == bad, planned[other], planned)[part].tolist()
    printed = capsys.readouterr().err
    assert printed.count('000000000005.jpg: not a readable image') in (
        1,
        2,
    )  # once for each loader that met it


def test_a_bad_image_alone_in_its_batch_is_replaced_from_the_next_batch_of_its_length(large_folder):
    bad = 4
    with damage(large_folder, 'train2017', [bad + 1]) as damaged:
        source = make(damaged, batch_size=1)
        _, planned, lengths = source.plan(0)
        step = int(np.flatnonzero(planned == bad)[0])
        later = [i for i in [*range(step + 1, 1000), *range(step)] if lengths[i] == lengths[step]]
        ((_, batch, indices),) = loader.load(source, [step])
        assert indices.tolist() == planned[later[0]].tolist() and batch['valid'].any()


def test_an_image_of_another_size_is_a_bad_image(large_folder, capsys):
    small = (large_folder / 'train2017' / '000000000001.jpg').read_bytes()
    sizes = records.read(large_folder, 'train2017')
    number = 1 + int(np.flatnonzero(sizes.heights != sizes.heights[0])[0])
    with damage(large_folder, 'train2017', [number], small) as damaged:
        list(loader.load(make(damaged), range(250)))
    assert f'{number:012d}.jpg: is ' in capsys.readouterr().err


@pytest.mark.parametrize(('tolerated', 'says'), [(None, 'more than 3 of 1000'), (1, 'more than 1 of 1000')])
def test_too_many_bad_images_stop_the_run(tolerated, says, large_folder):
    with damage(large_folder, 'train2017', [5, 6, 7, 8]) as damaged:
        if tolerated:
            damaged = dataclasses.replace(damaged, bad_images=tolerated)
        with pytest.raises(InputError, match=f'00000000000[5678].jpg.*{says}') as error:
            list(loader.load(make(damaged), range(250)))
        assert error.value.argument == 'bad_images'


def test_as_many_bad_images_as_are_tolerated_do_not_stop_a_run(train_set, capsys):
    bad = loader.BadImages(dataclasses.replace(train_set, bad_images=2))
    for index in (7, 9, 7):
        bad.note(index, InputError(f'image {index}'))
    assert capsys.readouterr().err == 'left out: image 7\nleft out: image 9\n'
    with pytest.raises(InputError, match='image 8; more than 2 of 24 images are bad'):
        bad.note(8, InputError('image 8'))


def test_a_batch_without_a_readable_image_is_not_trained_on(coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / 'data')
    for image in (tmp_path / 'data' / 'train2017').iterdir():
        image.write_bytes(b'')
    all_bad = dataclasses.replace(records.read(tmp_path / 'data', 'train2017'), bad_images=24)
    with pytest.raises(InputError, match='no image of batch 1 can be read'):
        list(loader.load(make(all_bad, batch_size=8), [1]))


def test_a_bad_image_of_an_evaluation_leaves_its_row_empty(coco_folder, capsys):
    with damage(coco_folder, 'val2017', [5]) as damaged:
        damaged = dataclasses.replace(damaged, bad_images=1)
        source = EvalBatches(damaged, size=112, max_size=176, batch_size=4)
        for _ in range(2):
            seen = []
            for step, batch, indices in loader.load(source, range(3)):
                planned = planned_of(source, step)
                assert indices.tolist() == np.where(planned == 4, -1, planned).tolist()
                assert (batch['grid'][planned == 4] == 1).all()
                seen += indices.tolist()
            assert sorted(set(seen)) == [-1, 0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert capsys.readouterr().err.count('000000000005.jpg') == 1


def test_the_loader_stops_when_its_iterator_is_closed(train_set):
    before = set(threading.enumerate())
    batches = loader.load(make(train_set), range(1000))
    next(batches)
    batches.close()
    assert not set(threading.enumerate()) - before


def test_evaluation_rows_without_an_image_are_empty(coco_folder):
    val_set = records.read(coco_folder, 'val2017')
    source = EvalBatches(val_set, size=112, max_size=176, batch_size=4)
    assert len(source) == 3
    batches = batches_of(loader.load(source, range(3)))
    assert planned_of(source, 2)[2:].tolist() == [-1, -1]
    assert batches[2]['grid'][2:].tolist() == [[1, 1], [1, 1]] and not batches[2]['patches'][2:].any()
    expected = plan.in_order(geometry.fixed(val_set.heights, val_set.widths, 112, 176).counts, (10**6,), 4)[
        0
    ]
    assert sorted(expected[expected >= 0]) == list(range(10))
