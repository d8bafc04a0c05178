import hashlib
import json
import random
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from yolos_jax.errors import InputError
from yolos_jax.weights import safetensors, source, tensors
from yolos_jax.weights.tensor import Tensor

ARRAYS = {
    'a': np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    'b/c': np.arange(5, dtype=np.float32),
    'scalar': np.array(2.5, np.float32),
}


def check(tensors_read, expected=ARRAYS):
    assert tensors_read.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors_read[name].shape == value.shape
        np.testing.assert_array_equal(tensors_read[name].numpy(), value)


def test_safetensors_are_read(tmp_path):
    save_file(ARRAYS, tmp_path / 'x.safetensors')
    check(tensors.read(tmp_path / 'x.safetensors').tensors)


def test_safetensors_are_written_as_the_package_reads_them(tmp_path):
    lazy = {k: Tensor(v.shape, lambda v=v: v) for k, v in ARRAYS.items()}
    safetensors.write(tmp_path / 'x', lazy)
    tensors_read = load_file(tmp_path / 'x')
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(tensors_read[name], value)


def test_safetensors_that_share_bytes_or_leave_some_are_refused(tmp_path):
    one = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
    for header, size, says in (
        ({'a': one, 'b': one}, 4, 'b is not as long as its shape says'),
        ({'a': one}, 5, 'it is not as long as its header says'),
    ):
        text = json.dumps(header).encode()
        (tmp_path / 'x').write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
        with pytest.raises(InputError, match=says):
            tensors.read(tmp_path / 'x')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_is_read_with_bfloat16_as_numpy_saves_it(save, tmp_path):
    half = ARRAYS['a'].astype(ml_dtypes.bfloat16)
    save(tmp_path / 'x.npz', **ARRAYS, half=half)
    check(tensors.read(tmp_path / 'x.npz').tensors, ARRAYS | {'half': half})


def test_a_pickle_in_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / 'x.npz', a=np.array([{}, 1], object))
    with pytest.raises(InputError, match='x.npz'):
        tensors.read(tmp_path / 'x.npz')


@pytest.mark.parametrize('flip', [(b'}', 0, 8), (b'PK\x01\x02', 8, 1)])
def test_an_npz_with_a_damaged_header_is_refused(flip, tmp_path):
    np.savez(tmp_path / 'x.npz', a=np.zeros((40, 70), np.float32))  # longer than zipfile reads at once
    whole, (word, after, bit) = bytearray((tmp_path / 'x.npz').read_bytes()), flip
    whole[whole.index(word) + after] ^= bit
    (tmp_path / 'x.npz').write_bytes(whole)
    with pytest.raises(InputError, match='x.npz: damaged'):
        tensors.read(tmp_path / 'x.npz')


def test_an_npz_bomb_is_refused(tmp_path):
    np.savez_compressed(tmp_path / 'x.npz', a=np.zeros(10_000_000, np.float32))
    with pytest.raises(InputError, match='unpacks to more than'):
        tensors.read(tmp_path / 'x.npz')


def test_the_hash_in_a_files_name_is_checked(tmp_path):
    save_file(ARRAYS, tmp_path / 'x')
    digest = hashlib.sha256((tmp_path / 'x').read_bytes()).hexdigest()
    data = (tmp_path / 'x').read_bytes()
    for name, good in {
        f'deit-{digest[:8]}.pth': True,
        f'deit-{digest}.safetensors': True,
        'deit-a1311bcf.pth': False,
        'deit-20260131.pth': True,  # a date
        'deit.pth': True,
    }.items():
        (tmp_path / name).write_bytes(data)
        if good:
            assert tensors.read(tmp_path / name).sha256 == digest
        else:
            with pytest.raises(InputError, match=f'{name}.*SHA-256 is {digest}.*a1311bcf'):
                tensors.read(tmp_path / name)
    for text in ('', '\n', ' \n', digest[:9], '  deit.pth\n'):  # cut short
        (tmp_path / 'deit.pth.sha256').write_text(text)
        with pytest.raises(InputError, match=f'SHA-256 is {digest}, and deit.pth.sha256 says nothing'):
            tensors.read(tmp_path / 'deit.pth')
    (tmp_path / 'deit.pth.sha256').write_text(f'{digest} *deit.pth\n')  # as sha256sum -b writes it
    assert tensors.read(tmp_path / 'deit.pth').sha256 == digest


def test_any_flipped_bit_is_refused_where_a_sidecar_has_the_hash(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_file(ARRAYS, path)
    whole, rng = path.read_bytes(), random.Random(0)
    (tmp_path / 'x.safetensors.sha256').write_text(f'{hashlib.sha256(whole).hexdigest()}  x.safetensors\n')
    check(tensors.read(path).tensors)
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(InputError, match='damaged, or another file'):
            tensors.read(path)


def test_weights_that_were_saved_again_are_an_error_that_says_which_file_to_remove(tmp_path):
    path = tmp_path / 'model.safetensors'
    (tmp_path / 'config.json').write_text('{}')
    save_file(ARRAYS, path)
    tensors.write_hash(path)
    save_file({'other': ARRAYS['a']} | ARRAYS, path)
    with pytest.raises(InputError, match=re.escape(f'saved it anew, remove {path.name}.sha256;')):
        source.open_source(tmp_path)


def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path):
    path = tmp_path / 'model.safetensors'
    path.write_text(f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 26000000\n')
    with pytest.raises(InputError, match='Git LFS'):
        tensors.read(path)


@pytest.mark.parametrize('form', ['safetensors', 'npz'])
def test_a_damaged_file_is_an_error_or_reads_as_values(form, tmp_path):
    path = tmp_path / f'x.{form}'
    save_file(ARRAYS, path) if form == 'safetensors' else np.savez(path, **ARRAYS)
    whole, rng = path.read_bytes(), random.Random(0)

    def read():
        return {name: tensor.numpy() for name, tensor in tensors.read(path).tensors.items()}

    for length in (0, 5, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match='x.'):
            read()
    seen = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            read()
        except InputError:
            seen += 1
    assert seen > 50
