import argparse
import collections
import os
import pickle
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from yolos_jax.errors import InputError
from yolos_jax.weights import torchfile
from yolos_jax.weights.tensor import Tensor

FORMATS = {'zip': True, 'legacy': False}


def read(path):
    """The object in a file, which stays open while its tensors are read."""
    return torchfile.read(open(path, 'rb'))  # noqa: SIM115


def content():
    """One tensor of every kind that a training file holds."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        'model': collections.OrderedDict(
            f32=torch.randn(3, 4),
            f16=torch.randn(5).half(),
            bf16=torch.randn(2, 3).bfloat16(),
            i64=torch.arange(7),
            u8=torch.arange(9, dtype=torch.uint8),
            flag=torch.tensor([True, False]),
            scalar=torch.tensor(2.5),
            empty=torch.empty(0, 4),
            turned=base.t(),
            part=base[2:5, 1:7:2],
            shared=base,
            parameter=torch.nn.Parameter(torch.randn(4)),
        ),
        'args': argparse.Namespace(
            lr=1e-4, init_pe_size=[800, 1344], eval=False, output=Path('x'), of={1, 2}
        ),
        'history': [np.zeros(3), torch.float32, np.float64(2)],
        'epoch': 3,
    }


def save(path, obj, form):
    torch.save(obj, path, _use_new_zipfile_serialization=FORMATS[form])
    return path


@pytest.mark.parametrize('form', FORMATS)
def test_tensors_are_those_torch_reads(form, tmp_path):
    path = save(tmp_path / 'x.pth', content(), form)
    expected, content_read = content()['model'], read(path)
    assert content_read['epoch'] == 3 and content_read['model'].keys() == expected.keys()
    for name, tensor in expected.items():
        ours = content_read['model'][name]
        assert ours.shape == tuple(tensor.shape)
        as_bits = lambda x: np.ascontiguousarray(x).view(np.uint8)
        value = tensor.detach()
        value = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        np.testing.assert_array_equal(as_bits(ours.numpy()), as_bits(value.numpy()))


@pytest.mark.parametrize('module', ['pathlib', 'pathlib._local'])
@pytest.mark.parametrize('name', ['PosixPath', 'WindowsPath'])
def test_a_path_of_any_system_and_python_is_read_past(module, name, tmp_path):
    path = save(tmp_path / 'x.pth', {'output': Path('x'), 'epoch': 3}, 'legacy')
    path.write_bytes(re.sub(rb'cpathlib.*\n.*Path\n', f'c{module}\n{name}\n'.encode(), path.read_bytes()))
    assert read(path)['epoch'] == 3


@pytest.mark.parametrize('form', FORMATS)
def test_a_namespace_is_a_plain_dict(form, tmp_path):
    content_read = read(save(tmp_path / 'x.pth', content(), form))['args']
    assert (
        content_read['lr'] == 1e-4
        and content_read['init_pe_size'] == [800, 1344]
        and content_read['eval'] is False
    )


class Call:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Build(collections.UserDict):
    """Pickles as an object of a class of the file's own."""

    def __setstate__(self, state):
        raise AssertionError


def raw(path, pickled, members=(), compress=zipfile.ZIP_STORED):
    """A file in torch's zip format around any pickle."""
    with zipfile.ZipFile(path, 'w', compress) as archive:
        archive.writestr('archive/data.pkl', pickled)
        for name, data in members:
            archive.writestr(name, data)


def view(offset, shape, stride, count=4, dtype='FloatStorage'):
    """The pickle of a tensor with such a view on a storage of `count` elements."""
    number = lambda n: b'\x8a\x08' + struct.pack('<q', n)
    numbers = lambda values: b'(' + b''.join(map(number, values)) + b't'
    head = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n' + dtype.encode()
    head += b'\nX\x01\0\0\x000X\x03\0\0\0cpuJ' + struct.pack('<i', count) + b'tQ'
    tail = b'\x89ccollections\nOrderedDict\n)RtR.'
    return head + b'J' + struct.pack('<i', offset) + numbers(shape) + numbers(stride) + tail


def copies(maker, container, make):
    """The pickle of 2,000 dicts, each made of one container by `make`; 1 is the container, 2 the maker."""
    return b'\x80\x02' + container + b'q\x010' + maker + b'q\x020](' + make * 2_000 + b'e.'


ITEMS = b'](' + b'(K\x00Nt' * 1_000 + b'e'
STATE = b'}(' + b''.join(b'M' + struct.pack('<H', i) + b'N' for i in range(1_000)) + b'u'
DATA = [('archive/data/0', b'\0' * 16)]
SHELL = b'cposix\nsystem\n(X\x05\0\0\0touchtR.'


def hostile(path, mark):
    """Files that would run something, or reach where they should not: {name: function that writes it}."""
    touch = Call(os.system, f'touch {mark}')
    saved = lambda obj, form: lambda: save(path, obj, form)
    bomb = ('archive/data/0', b'\0' * 50_000_000)
    inst = b'(X\x05\0\0\0touchiposix\nsystem\n.'
    stack = b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85R.'
    return {
        'a call': saved(touch, 'zip'),
        'a call, old format': saved(touch, 'legacy'),
        'a call among the weights': saved({'model': {'x': torch.ones(2), 'y': touch}}, 'zip'),
        'a call in a namespace': saved({'args': argparse.Namespace(x=touch)}, 'legacy'),
        'eval': saved(Call(eval, f'open({str(mark)!r}, "w")'), 'zip'),
        'a call as a key': saved({'model': {Call(os.system, 'true'): 1}}, 'zip'),
        'a class of its own': saved(Build(x=1), 'zip'),
        'getattr': saved(Call(getattr, str, 'join'), 'zip'),
        'an instruction INST': lambda: raw(path, inst),
        'a name from the stack': lambda: raw(path, stack),
        'a global, called': lambda: raw(path, SHELL),
        'a call of a tensor type': lambda: raw(path, b'ctorch\nFloatStorage\n)R.'),
        'a view outside': lambda: raw(path, view(0, [5], [1]), DATA),
        'a view outside by its stride': lambda: raw(path, view(2, [2], [3]), DATA),
        'a view before': lambda: raw(path, view(-1, [2], [1]), DATA),
        'a negative stride': lambda: raw(path, view(3, [4], [-1]), DATA),
        'a view of exabytes': lambda: raw(path, view(0, [1 << 60], [0]), DATA),
        'a storage cut short': lambda: raw(path, view(0, [9], [1], 9), DATA),
        'a zip bomb': lambda: raw(path, view(0, [4], [1]), [bomb], zipfile.ZIP_DEFLATED),
        'two programs': lambda: raw(path, b'N.', [('other/data.pkl', b'N.')]),
        'copies of one list': lambda: raw(
            path, copies(b'ccollections\nOrderedDict\n', ITEMS, b'h\x02h\x01\x85R')
        ),
        'copies of one state': lambda: raw(
            path, copies(b'cargparse\nNamespace\n', STATE, b'h\x02)Rh\x01b')
        ),
        'a namespace with arguments': lambda: raw(path, b'cargparse\nNamespace\n}\x85R.'),
        'a text of 2^45 bytes': lambda: path.write_bytes(
            b'\x80\x04\x8e' + struct.pack('<Q', 1 << 45) + b'x'
        ),
        'a plain pickle': lambda: path.write_bytes(pickle.dumps({'x': touch})),
        'a storage elsewhere': lambda: raw(
            path, view(0, [4], [1]), [('archive/data/../../etc/0', b'\0' * 16)]
        ),
    }


@pytest.mark.row('hostile weights')
@pytest.mark.parametrize('name', hostile(Path(), Path()))
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, mark = tmp_path / 'x.pth', tmp_path / 'mark'
    hostile(path, mark)[name]()
    with pytest.raises(InputError, match='x.pth: ') as error:
        read(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300
    assert not mark.exists() and [p.name for p in tmp_path.iterdir()] == ['x.pth']


def test_hostile_files_do_run_something_in_torch(tmp_path):
    path, mark = tmp_path / 'x.pth', tmp_path / 'mark'
    for name in ('a call', 'a call, old format', 'a call in a namespace'):
        hostile(path, mark)[name]()
        torch.load(path, weights_only=False)
        assert mark.exists()
        mark.unlink()


def values(content_read):
    return [t.numpy().tobytes() for t in content_read['model'].values() if isinstance(t, Tensor)]


@pytest.mark.row('damaged weights', count=64)
@pytest.mark.parametrize('form', FORMATS)
def test_a_file_cut_short_is_refused(form, tmp_path):
    path = save(tmp_path / 'x.pth', content(), form)
    whole, rng = path.read_bytes(), random.Random(0)
    for length in [0, 1, 4, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match='x.pth'):
            values(read(path))


@pytest.mark.row('damaged weights', count=200)
@pytest.mark.parametrize('form', FORMATS)
def test_a_flipped_bit_is_seen_or_harmless(form, tmp_path):
    """A zip file has checksums. The old format has none: there damage must not crash, no more."""
    path = save(tmp_path / 'x.pth', content(), form)
    whole, rng, seen = path.read_bytes(), random.Random(0), 0
    expected = values(read(path))
    anywhere = [rng.randrange(len(whole)) for _ in range(200)]
    for place in [
        *anywhere,
        *range(len(whole) - 30, len(whole)),
    ]:  # at the end a zip says where its list is
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            content_read = values(read(path))
        except InputError:
            seen += 1
        except (KeyError, AttributeError, TypeError):
            assert form == 'legacy'  # 'model' is called otherwise, or holds something else
        else:
            assert content_read == expected or form == 'legacy'
    assert seen > 20


def test_torch_reads_the_tensors_that_were_written(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        n: rng.normal(size=s).astype(np.float32) for n, s in (('a', (3, 4)), ('b', ()), ('c', (0, 2)))
    }
    rest = {
        'args': {'size': [800, 1344], 'none': None, 'flag': True, 'rate': 0.5},
        'names': {1: 'é', -128: '', 2**31: 'a'},
    }
    as_tensors = {n: Tensor(value.shape, lambda value=value: value) for n, value in tensors.items()}
    torchfile.write(tmp_path / 'x.pth', {'model': as_tensors} | rest)
    content_read = torch.load(tmp_path / 'x.pth', weights_only=True)
    assert {k: v for k, v in content_read.items() if k != 'model'} == rest
    for name, value in tensors.items():
        np.testing.assert_array_equal(content_read['model'][name].numpy(), value)
    again = read(tmp_path / 'x.pth')
    assert again['args'] == rest['args'] and again['model']['a'].numpy().tobytes() == tensors['a'].tobytes()


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path):
    old = save(tmp_path / 'old', content(), 'legacy')
    old.write_bytes(re.sub(rb'(little_endianq.)\x88', b'\\1\x89', old.read_bytes(), count=1))
    raw(tmp_path / 'new', pickle.dumps({}, 2), [('archive/byteorder', b'big')])
    for path in (old, tmp_path / 'new'):
        with pytest.raises(InputError, match='big-endian'):
            read(path)


def test_a_file_of_another_kind_is_named(tmp_path):
    for name, data in {'text': b'hello', 'json': b'{"a": 1}', 'empty': b''}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / 'zip', 'w') as archive:
        archive.writestr('x', 'y')
    with pytest.raises(InputError, match='not one of torch.save'):
        read(tmp_path / 'zip')
    raw(tmp_path / 'script.pt', b'N.', [('archive/constants.pkl', b'N.')])
    with pytest.raises(InputError, match='TorchScript'):
        read(tmp_path / 'script.pt')
