"""Data in a bucket, at servers that speak the protocols of Google and of S3."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import storage
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from yolos_jax.bucket import Bucket
from yolos_jax.data import geometry, labelled, loader, record_ranges, records, sources
from yolos_jax.data.batches import EvalBatches, TrainBatches
from yolos_jax.errors import InputError, StorageError
from yolos_jax.tools import build_tfds, check_data, make_classes

RECIPE = geometry.Recipe((96, 112), 176, crop_from=(96, 112, 128), crop_min=80, crop_max=128)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of fetched files."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def same(root, url, split='train2017'):
    """That records and batches are equal."""
    local, remote = records.read(root, split), records.read(url, split)
    assert remote.digests == local.digests and remote.rows.tolist() == local.rows.tolist()
    options = dict(lengths=(51, 83), batch_size=5, max_targets=6, seed=0)
    batches = [loader.load(TrainBatches(r, RECIPE, **options), range(7)) for r in (local, remote)]
    for (_, a, _), (_, b, _) in zip(*batches, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert remote.truth().boxes.tolist() == local.truth().boxes.tolist()


def test_a_coco_folder_gives_the_same_batches(data_url, coco_folder, bad_network):
    same(coco_folder, data_url)
    assert sources.splits(data_url) == sources.splits(coco_folder)


def test_a_folder_of_roboflow_gives_the_same_batches(place, coco_folder, tmp_path):
    for split, name in (('train2017', 'train'), ('val2017', 'valid')):
        shutil.copytree(coco_folder / split, tmp_path / 'data' / name)
        file = coco_folder / 'annotations' / f'instances_{split}.json'
        shutil.copy(file, tmp_path / 'data' / name / sources.ROBOFLOW)
    same(tmp_path / 'data', storage.upload(tmp_path / 'data', f'{place[0]}/roboflow'))


def test_a_data_set_of_array_records_gives_the_same_batches(place, coco_folder, bad_network, tmp_path):
    folder, url = build_tfds.build(coco_folder, tmp_path), f'{place[0]}/tfds'
    for name in ('tfds/', 'tfds/_SUCCESS'):  # as consoles and other tools leave them, without a byte
        Bucket(place[0]).write(name, b'')
    same(folder, storage.upload(folder, url))


def test_folders_of_classes_give_the_same_images(place, tmp_path):
    make_classes.write(tmp_path / 'forms', {'train': 1, 'val': 1})
    url = storage.upload(tmp_path / 'forms', f'{place[0]}/forms')
    local, remote = (labelled.read(root, 'train') for root in (tmp_path / 'forms', url))
    assert remote.classes == local.classes and remote.digests == local.digests
    assert [remote.start_read(i)() for i in range(20)] == [local.start_read(i)() for i in range(20)]


def test_a_json_and_a_folder_of_images_may_be_apart(data_url, coco_folder):
    file = coco_folder / 'annotations' / 'instances_val2017.json'
    data = records.from_source(sources.of_files(file, f'{data_url}/val2017'))
    again = records.from_source(
        sources.of_files(f'{data_url}/annotations/{file.name}', f'{data_url}/val2017')
    )
    assert len(data.start_read(0)()) > 100 and data.digests == again.digests


def test_errors_in_bucket_data_are_reported_before_any_image_is_read(
    place, data_url, coco_folder, tmp_path
):
    url = f'{place[0]}/wrong'
    storage.upload(coco_folder, url)
    Bucket(url).remove('val2017/000000000003.jpg')
    with pytest.raises(InputError, match=r'1 of 10 images .* the first is .*000000000003.jpg'):
        records.read(url, 'val2017')
    with pytest.raises(InputError, match='nowhere: no such data folder'):
        records.read(f'{place[0]}/nowhere', 'val2017')
    with pytest.raises(InputError, match='has no split test; it has train2017, val2017'):
        records.read(data_url, 'test')
    Bucket(f'{place[0]}/yolo').write('data.yaml', b'names: [a]')
    with pytest.raises(InputError, match='YOLO.* not read from a bucket'):
        records.read(f'{place[0]}/yolo', 'train')


def test_data_are_checked_in_a_bucket_as_in_a_folder(data_url, coco_folder):
    local, remote = (check_data.examine(root, 'val2017') for root in (coco_folder, data_url))
    assert remote.problems == local.problems and remote.tables == local.tables


def test_a_storage_that_fails_is_no_bad_image(coco_folder):
    class Failing:
        upright = False

        def name(self, file):
            return file

        def start_read(self, file, row):
            def wait():
                raise StorageError('gs://bucket: no answer')

            return wait

    data = dataclasses.replace(records.read(coco_folder, 'val2017'), images=Failing())
    batches = EvalBatches(data, size=112, max_size=176, batch_size=4)
    with pytest.raises(StorageError, match='no answer'):
        list(loader.load(batches, range(2)))


@pytest.mark.parametrize('options', ['group_size:1', 'group_size:7', 'group_size:3,uncompressed'])
@pytest.mark.parametrize('count', [0, 1, 60])
def test_records_are_those_that_were_written(place, options, count, tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.choice([0, 1, 50, 3_000, 70_000, 200_000], count)  # blocks have 65,536 bytes
    written = [os.urandom(size) + b'a' * 100 for size in sizes]
    writer = ArrayRecordWriter(str(tmp_path / 'x'), options)
    for record in written:
        writer.write(record)
    writer.close()
    bucket = Bucket(f'{place[0]}/records')
    bucket.upload({'x': tmp_path / 'x'})
    ranges = record_ranges.RecordRanges(bucket, ['x', 'x'])
    assert [read() for read in map(ranges.start_read, range(len(ranges)))] == 2 * written


@pytest.mark.parametrize('options', ['group_size:1,transpose', 'group_size:1,brotli:3'])
def test_records_of_another_form_are_refused(place, options, tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / 'x'), options)
    writer.write(b'record')
    writer.close()
    bucket = Bucket(f'{place[0]}/records')
    bucket.upload({'x': tmp_path / 'x'})
    with pytest.raises(InputError, match='x: not an array_record file, or damaged .*not by zstd'):
        record_ranges.RecordRanges(bucket, ['x']).start_read(0)()
    bucket.write('x', bytes(70_000))
    with pytest.raises(InputError, match='x: not an array_record file'):
        record_ranges.RecordRanges(bucket, ['x'])


def test_a_chunk_that_claims_gigabytes_is_not_unpacked():
    gigabytes = bytes([0x80, 0x80, 0x80, 0x80, 0x10])  # 2^32, as a varint
    with pytest.raises(ValueError, match='claims 4294967296 bytes'):
        record_ranges._decompress(gigabytes + zstandard.compress(b'x'))
