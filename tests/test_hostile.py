"""Malicious files: each is refused quickly, in one short line, without using the memory it claims."""

import io
import json
import os
import re
import resource
import struct
import zipfile

import jax
import numpy as np
import pytest
import torch
from helpers import TINY, coco_content, make_hf, write_coco

from yolos_jax import evaluation, weights
from yolos_jax.data import records
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.weights import checkpoint


def refused(path, **hints):
    """The message with which a file is refused: one line of plain text."""
    with pytest.raises(InputError) as error:
        with weights.open(path) as source:
            source.detector(**hints)
    text = str(error.value)
    assert text.isprintable() and len(text) <= len(str(path)) + 300
    return text


def zip_of(pickled, members=()):
    def write(path):
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', pickled)
            for name, data in members:
                archive.writestr(name, data)

    return write


def overlapping(path):
    """20,000 entries of a directory over one member."""
    zip_of(b'N.', [('archive/data/0', b'\0' * 100_000)])(path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b'PK\x05\x06')
    start = struct.unpack_from('<I', data, end + 16)[0]
    last = data.rindex(b'PK\x01\x02')
    entries = bytes(data[start:last]) + bytes(data[last:end]) * 20_000
    tail = struct.pack('<4sHHHHIIH', b'PK\x05\x06', 0, 0, 20_001, 20_001, len(entries), start, 0)
    path.write_bytes(bytes(data[:start]) + entries + tail)


def safetensors(header, data=b'', length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(
        struct.pack('<Q', len(text) if length is None else length) + text + data
    )


def one_tensor(dtype='F32', shape=(1,), offsets=(0, 4), data=b'\0' * 4, name='x'):
    return safetensors({name: {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}}, data)


def huge_array(path):
    header = io.BytesIO()
    shape = {'descr': '<f4', 'fortran_order': False, 'shape': (2**40,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('det_token.npy', header.getvalue())


def packed_by_lzma(path):
    array = io.BytesIO()
    np.save(array, np.zeros(100, np.float32))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_LZMA) as archive:
        archive.writestr('det_token.npy', array.getvalue())


SELF = b'\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.'  # d = {}; d['model'] = d
FILES = {
    'a dict that holds itself': zip_of(SELF),
    'a dict that holds itself, as a stream': lambda path: path.write_bytes(
        b'\x80\x02\x8a\x0alI\xf9\x84\x9c\x20\x6a\xf5\x70\xa2\x01.' + SELF
    ),
    'members over each other': overlapping,
    'lists in lists': zip_of(b'\x80\x02' + b'(' * 100_000 + b'l' * 100_000 + b'.'),
    'tuples in tuples': zip_of(b'\x80\x02N' + b'\x85' * 200_000 + b'.'),
    'a name of a megabyte': zip_of(b'\x80\x02cevil' + b'x' * 1_000_000 + b'\nname\n.'),
    'a name with escapes': zip_of(b'\x80\x02cevil\x1b[31m\x07\nname\n.'),
    'a number of 100,000 digits': zip_of(b'I' + b'9' * 100_000 + b'\n.'),
    'a header longer than the file': safetensors({}, length=2**40),
    'a header of nothing but brackets': safetensors(b'{"a":' + b'[' * 200_000),
    'a header that is broken': safetensors(b'{"a"]'),
    'a tensor of 2^60 elements': one_tensor(shape=[2**60]),
    'a tensor of 2^100 elements': one_tensor(shape=[2**50, 2**50]),
    'a negative size': one_tensor(shape=[-1]),
    'a size that is true': one_tensor(shape=[True]),
    'a size that is a text': one_tensor(shape=['1']),
    '50,000 sizes': one_tensor(shape=[1] * 50_000, offsets=(0, 8), data=bytes(8)),
    'offsets before the data': one_tensor(offsets=(-4, 0)),
    'offsets behind the data': one_tensor(offsets=(4, 8)),
    'an unknown type': one_tensor(dtype='F4'),
    'a type that is a list': one_tensor(dtype=['F32']),
    'a tensor with an escape in its name': one_tensor(dtype='F4', name='y\x1b[2J'),
    'a tensor of a long name': one_tensor(dtype='F4', name='det_token' * 100_000),
    'an array of 2^40 elements': huge_array,
    'an array packed by LZMA': packed_by_lzma,
    'nothing': lambda path: path.write_bytes(b''),
    'noise': lambda path: path.write_bytes(np.random.default_rng(0).bytes(10_000)),
    'HTML': lambda path: path.write_bytes(b'<html><body>404</body></html>'),
}


@pytest.mark.row('hostile weights')
@pytest.mark.parametrize('name', FILES)
def test_a_hostile_file_of_weights_is_refused_in_one_line(name, tmp_path):
    FILES[name](tmp_path / 'x.pth')
    assert 'no YOLOS detector' not in refused(tmp_path / 'x.pth')  # which any small file is


def test_a_type_of_safetensors_that_is_not_read_is_no_damage(tmp_path):
    one_tensor(dtype='F8_E4M3')(tmp_path / 'x.safetensors')
    assert refused(tmp_path / 'x.safetensors').endswith('x is of type F8_E4M3, which is not read')


@pytest.mark.row('hostile weights')
@pytest.mark.parametrize('kind', ['pipe', 'device', 'socket'])
def test_weights_come_from_regular_files_alone(kind, tmp_path):
    path = {'device': '/dev/zero'}.get(kind, tmp_path / 'x')
    if kind == 'pipe':
        os.mkfifo(path)
    if kind == 'socket':
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
    assert 'not a regular file' in refused(path)


CONFIGS = [
    ('num_hidden_layers', 10**9), ('num_hidden_layers', '3'), ('num_hidden_layers', None),
    ('num_hidden_layers', [3]), ('hidden_size', 2**60), ('hidden_size', -32), ('hidden_size', 32.5),
    ('num_attention_heads', 0), ('num_attention_heads', 5), ('num_attention_heads', 10**400),
    ('num_detection_tokens', 10**12), ('num_detection_tokens', True), ('image_size', 64),
    ('image_size', [10**9, 10**9]), ('image_size', ['a', 'b']), ('image_size', []), ('layer_norm_eps', 'x'),
    ('layer_norm_eps', -1.0), ('layer_norm_eps', float('nan')), ('id2label', [1]),
    ('id2label', {'x': 'cat'}), ('id2label', {'0': 'cat', '9': 'dog'}),
]  # fmt: skip


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf')
    make_hf(TINY, num_classes=5).save_pretrained(folder)
    return folder


@pytest.mark.row('hostile weights')
@pytest.mark.parametrize(('key', 'value'), CONFIGS)
def test_a_hostile_config_is_refused_in_one_line(key, value, hf, tmp_path):
    config = json.loads((hf / 'config.json').read_text())
    (tmp_path / 'model.safetensors').write_bytes((hf / 'model.safetensors').read_bytes())
    (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
    refused(tmp_path)


@pytest.mark.parametrize(
    'text', ['', '[]', '7', '"x"', '{"a":' * 100_000, '\x1b[31m', '{"model_type": "yolos"}']
)
def test_a_config_that_is_no_config_is_refused_in_one_line(text, hf, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes((hf / 'model.safetensors').read_bytes())
    (tmp_path / 'config.json').write_text(text)
    refused(tmp_path)


METAS = [
    ('depth', 10**9), ('width', 0), ('pos_grid', [10**9, 1]), ('pos_grid', 'x'), ('mid_pos_grid', [1]),
    ('heads', 'x'), ('eps', None), ('num_classes', 10**12), ('unknown', 1), ('depth', 4),
]  # fmt: skip


@pytest.mark.row('hostile weights')
@pytest.mark.parametrize(('key', 'value'), METAS)
def test_a_hostile_meta_of_a_checkpoint_is_refused_in_one_line(key, value, tmp_path):
    """With a hash that fits: whoever made it can compute one."""
    model = Yolos(**TINY, num_classes=5)
    params = init_params(model, jax.random.key(0))
    checkpoint.write(weights.Pretrained(model, params, {1: 'cat'}, 64, 96), tmp_path / 'x')
    path = tmp_path / 'x' / '0' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    meta['model'][key] = value
    path.write_text(json.dumps(checkpoint.sealed(meta)))
    with pytest.raises(InputError) as error:
        weights.load(tmp_path / 'x')
    assert str(error.value).isprintable() and len(str(error.value)) < 2 * len(str(tmp_path)) + 300


def test_a_file_without_a_checksum_gets_one_that_is_compared(hf, tmp_path, capsys):
    for name in ('model.safetensors', 'config.json'):
        (tmp_path / name).write_bytes((hf / name).read_bytes())
    weights.load(tmp_path)
    assert 'model.safetensors.sha256 was written' in capsys.readouterr().err
    weights.load(tmp_path)
    assert 'sha256' not in capsys.readouterr().err
    config = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(config.replace('1e-12', '1e-05'))
    assert 'config.json: damaged, or another file' in refused(tmp_path)
    (tmp_path / 'config.json').write_text(config)
    data = bytearray((tmp_path / 'model.safetensors').read_bytes())
    data[-5] ^= 1
    (tmp_path / 'model.safetensors').write_bytes(data)
    assert 'model.safetensors: damaged, or another file' in refused(tmp_path)


def test_a_file_without_a_checksum_is_read_where_none_can_be_written(hf, tmp_path, capsys):
    for name in ('model.safetensors', 'config.json'):
        (tmp_path / name).write_bytes((hf / name).read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # root may write to every folder
    try:
        weights.load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'none can be written beside it' in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {'model.safetensors', 'config.json'}


def test_an_old_torch_file_gets_a_checksum_and_a_zip_has_its_own(hf, tmp_path, capsys):
    tensors = make_hf(TINY, num_classes=5).state_dict()
    for name, new in (('zip.pth', True), ('old.pth', False)):
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=new)
        weights.load(tmp_path / name, heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6))
    assert [path.name for path in tmp_path.glob('*.sha256')] == ['old.pth.sha256']


def change(where, index, **fields):
    content = coco_content()
    content[where][index] |= fields
    return content


def drop(where, index, field):
    content = coco_content()
    content[where][index].pop(field, None)
    return content


NUMBERS = [0, -1, 1.0, 1.5, True, None, '7', [], {}, 10**6, 2**31, 2**62, 2**63, 2**70, 10**1000, 1e400]
VARIANTS = {
    **{f'{kind} {field}={str(value)[:8]}': change(kind, 0, **{field: value})
       for value in NUMBERS
       for kind, field in (('annotations', 'id'), ('annotations', 'iscrowd'), ('annotations', 'area'),
                           ('images', 'id'), ('categories', 'id'), ('images', 'height'))},
    **{f'without {field}': drop(kind, 0, field)
       for kind, field in (('annotations', 'id'), ('annotations', 'iscrowd'), ('annotations', 'area'),
                           ('annotations', 'bbox'), ('images', 'file_name'), ('images', 'width'),
                           ('categories', 'name'), ('annotations', 'segmentation'))},
    'without any id': coco_content() | {'annotations': [{k: v for k, v in a.items() if k != 'id'}
                                                        for a in coco_content()['annotations']]},
    'no annotations': coco_content() | {'annotations': []},
    'no info': {k: v for k, v in coco_content().items() if k != 'info'},
    'a name of a megabyte': change('images', 0, file_name='x' * 1_000_000),
    'a class of a megabyte': change('categories', 0, name='x' * 1_000_000),
    'NUL in a name': change('images', 0, file_name='a\0b'),
    'an escape in a name': change('images', 0, file_name='a\x1b[31mb'),
    'an escape in a class': change('categories', 0, name='a\x1b[31mb'),
    'an empty name': change('images', 0, file_name=''),
    'deep': '{"images": ' + '[' * 200_000,
    'deep beside': json.dumps(coco_content())[:-1] + ', "x": ' + '[' * 100_000 + ']' * 100_000 + '}',
    'digits': json.dumps(coco_content()).replace('9.5', '9' * 100_000),
    'a byte order mark': '\ufeff' + json.dumps(coco_content()),
}  # fmt: skip


ACCEPTED = {
    'without id', 'without iscrowd', 'without area', 'without segmentation', 'without any id',
    'no annotations', 'no info', 'a byte order mark', 'annotations id=0', 'annotations area=None',
    'annotations iscrowd=True', 'images id=7',
}  # fmt: skip


@pytest.mark.row('odd annotation files')
@pytest.mark.parametrize('name', VARIANTS)
def test_annotations_that_are_accepted_can_be_scored(name, tmp_path):
    """And the others are refused in one line."""
    content = VARIANTS[name]
    if isinstance(content, dict):
        root = write_coco(tmp_path, content, images=False)
        for image in content['images']:
            file = image.get('file_name') or 'x'
            if file.isprintable() and len(file) < 100:
                (root / 'val' / file).touch()
    else:
        root = write_coco(tmp_path, coco_content())  # for the images
        write_coco(root, content)
    try:
        data = records.read(root, 'val')
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < len(str(root)) + 400
        assert name not in ACCEPTED
        return
    boxes, labels = data.objects(len(data) - 1)
    results = [
        {'image_id': int(data.ids[-1]), 'category_id': int(label), 'score': 0.5}
        | {'bbox': [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]}
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
    ]
    numbers, classes = evaluation.score(data.truth(), results)
    assert all(np.isfinite(value) for value in [*numbers.values(), *classes.values()])


def test_a_perfect_detection_of_annotation_number_0_is_no_miss(tmp_path):
    content = coco_content()
    for number, annotation in enumerate(content['annotations']):
        annotation['id'] = number
    root = write_coco(tmp_path, content)
    results = [
        {'image_id': a['image_id'], 'category_id': a['category_id'], 'bbox': a['bbox'], 'score': 1.0}
        for a in content['annotations']
        if not a.get('iscrowd') and a['bbox'][2]
    ]
    numbers, _ = evaluation.score(records.read(root, 'val').truth(), results)
    assert numbers['AP50'] == pytest.approx(numbers['AP']) and numbers['AR100'] > 0.7
    assert not re.search('nan', str(numbers))
