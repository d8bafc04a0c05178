"""Reads the pickle of a torch.save file without running it.

A pickle is a program. Here its instructions are read one by one by a small interpreter that knows
containers, numbers, strings and tensors; any other name (such as os.system) ends the reading
with an error. Nothing from the file is ever imported or called. `argparse.Namespace`, which training
checkpoints carry, becomes a plain dict.
"""

import math
import pickletools
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.weights.tensor import Tensor

STORAGES = {
    'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}  # fmt: skip
MOST_DIMENSIONS = 8
MOST_COPIED = 1 << 20  # items that go from one container into another; a few bytes could ask for any number
KEYS = (str, int, float, bool, type(None))


class Storage:
    """A run of numbers in the file; `place` is known once the pickle has been read."""

    def __init__(self, file: BinaryIO, dtype: type, key: str, count: int) -> None:
        if type(key) is not str or type(count) is not int or count < 0:
            raise InputError('a storage is not described as torch does')
        self.dtype, self.key, self.count = np.dtype(dtype), key, count
        self.size = count * self.dtype.itemsize
        self._file, self.place = file, None

    def read(self) -> np.ndarray:
        """Its numbers, flat."""
        return files.read_at(self._file, self.place, self.size).view(self.dtype)


class Namespace(dict):
    """An argparse.Namespace of the file, as the dict it holds."""

    def __init__(self) -> None:
        """Empty, since its content follows as a state."""


class _Inert:
    """A value of the file that is of no use here (a path, a numpy scalar); nothing is made of it."""

    def __init__(self, *_: object) -> None: ...


class Interpreter:
    """Runs the instructions that torch.save writes, and no other."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.storages = file, {}  # by their keys
        self.copied = 0

    def run(self, file: BinaryIO) -> Any:
        """The object pickled at the file's position, which moves behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == 'STOP':
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _TUPLES:
                self.stack.append(tuple(self._pop(_TUPLES[name])))
            elif handler := getattr(self, f'_do_{name.lower()}', None):
                handler(argument)
            elif name not in ('PROTO', 'FRAME'):
                raise InputError(f'refused: its pickle uses the instruction {name}')
        raise InputError('cut short')

    def _to_mark(self):
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _pop(self, count):
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise InputError('damaged: its pickle takes more than it gave')
        del self.stack[-count:]
        return items

    def _do_mark(self, _):
        self.marks.append(len(self.stack))

    def _do_pop(self, _):
        self._pop(1)

    def _do_tuple(self, _):
        self.stack.append(tuple(self._to_mark()))

    def _do_append(self, _):
        self._extend(self._pop(1))

    def _do_appends(self, _):
        self._extend(self._to_mark())

    def _extend(self, items):
        if type(self.stack[-1]) is not list:
            raise InputError('damaged: its pickle appends to something that is no list')
        self.stack[-1].extend(items)

    def _do_additems(self, _):
        self._to_mark()  # of a set, which is inert

    def _do_setitem(self, _):
        self._update(self._pop(2))

    def _do_setitems(self, _):
        self._update(self._to_mark())

    def _update(self, items):
        _fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _do_binput(self, argument):
        self.memo[argument] = self.stack[-1]

    _do_put = _do_long_binput = _do_binput

    def _do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_binget(self, argument):
        self.stack.append(self.memo[argument])

    _do_get = _do_long_binget = _do_binget

    def _do_global(self, argument):
        module, name = argument.split(' ', 1)
        self.stack.append(_known(module, name))

    def _do_stack_global(self, _):
        self.stack.append(_known(*self._pop(2)))

    def _do_reduce(self, _):
        function, arguments = self._pop(2)
        if function not in _MAKERS.values() or type(arguments) is not tuple:
            raise InputError('refused: its pickle calls something that is no tensor or container')
        if function is _ordered:
            self._count_copied(*arguments)
        self.stack.append(function(*arguments))

    _do_newobj = _do_reduce

    def _do_build(self, _):
        (state,) = self._pop(1)
        if type(self.stack[-1]) is Namespace and isinstance(state, dict):
            self._count_copied(state)
            self.stack[-1].update(state)  # the state of others (a state_dict's _metadata) is ignored

    def _count_copied(self, *containers):
        self.copied += sum(map(len, containers))
        if self.copied > MOST_COPIED:
            raise InputError('refused: its pickle copies more than any weights need')

    def _do_binpersid(self, _):
        (identity,) = self._pop(1)
        kind, dtype, key, _, count, *view = identity
        if kind != 'storage' or dtype not in STORAGES.values() or any(view):
            raise InputError('refused: its pickle refers to something that is no storage')
        fresh = Storage(self.file, dtype, key, count)
        known = self.storages.setdefault(key, fresh)
        if (known.dtype, known.count) != (fresh.dtype, fresh.count):
            raise InputError('a storage is described in two ways')
        self.stack.append(known)


def _known(module, name):
    if module in ('torch', 'torch.storage') and name in STORAGES:
        return STORAGES[name]
    maker = _MAKERS.get((module, name))
    if maker is None:
        raise InputError(
            f'refused: it asks to import {module}.{name}, which weights do not need (nothing was run)'
        )
    return maker


def _tensor(storage, offset, shape, stride, *_):
    if type(storage) is not Storage:
        raise InputError('refused: a tensor of something that is no storage')
    shape, stride = tuple(shape), tuple(stride)
    if (
        len(shape) != len(stride)
        or len(shape) > MOST_DIMENSIONS
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *shape, *stride))
    ):
        raise InputError('a tensor has an impossible shape')
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    # a view may repeat elements by a stride of 0, and so claim any size: no weight does
    elements = math.prod(shape)
    if elements and (last >= storage.count or elements > storage.count):
        raise InputError('a tensor reaches outside its data')

    def read():
        if not elements:
            return np.empty(shape, storage.dtype)
        flat = storage.read()[offset:]
        strides = [s * flat.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(flat, shape, strides)
        return np.ascontiguousarray(view).reshape(shape)

    return Tensor(shape, read)


def _fill(target, items):
    for key, value in items:
        if not isinstance(target, dict) or not isinstance(key, KEYS):
            raise InputError('refused: a dict with keys that are neither text nor numbers')
        target[key] = value
    return target


def _ordered(items=()):
    return _fill({}, items)


def _first(value, *_):
    return value


_CONSTANTS = {
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict, 'EMPTY_SET': _Inert,
}  # fmt: skip
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_VALUES = set(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING '
    'UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8'.split()
)
_MAKERS = {
    ('collections', 'OrderedDict'): _ordered,
    ('argparse', 'Namespace'): Namespace,
    ('torch._utils', '_rebuild_tensor'): _tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _first,
    ('torch', 'Size'): _first,
}
# met in training checkpoints, beside the weights
_MAKERS |= dict.fromkeys(
    [
        ('pathlib', 'PosixPath'), ('pathlib', 'WindowsPath'),
        ('pathlib._local', 'PosixPath'), ('pathlib._local', 'WindowsPath'),  # as Python 3.13 names them
        ('torch', 'device'), ('collections', 'Counter'), ('collections', 'defaultdict'),
        ('builtins', 'set'), ('__builtin__', 'set'), ('numpy', 'dtype'),
        ('numpy.core.multiarray', 'scalar'), ('numpy._core.multiarray', 'scalar'), ('_codecs', 'encode'),
        ('numpy.core.multiarray', '_reconstruct'), ('numpy._core.multiarray', '_reconstruct'),
        ('numpy', 'ndarray'), ('torch', 'float32'), ('torch', 'float16'), ('torch', 'bfloat16'),
    ],
    _Inert,
)  # fmt: skip
