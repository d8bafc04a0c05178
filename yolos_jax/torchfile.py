"""Reads what torch.save writes, without torch and without running its pickle.

A .pth file is a pickle, and a pickle is a program. Here its instructions are read one by one by a small
interpreter that knows containers, numbers, strings and tensors; a name that is none of these (os.system,
or anything else) ends the reading. Nothing from the file is ever imported or called. `argparse.Namespace`,
which training checkpoints carry, becomes a plain dict.

Both formats are read: the zip archive (torch 1.6 and later; its CRCs are checked) and the older stream.
Tensors are views of the mapped file, made when asked for, so memory is not a concern.
"""

import mmap
import pickletools
import struct
import zipfile
import zlib
from io import BytesIO

import ml_dtypes
import numpy as np

from yolos_jax.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}
KEYS = (str, int, float, bool, type(None))


class Tensor:
    """A tensor of the file: `shape`, `dtype`, and `numpy()` for its values."""

    def __init__(self, storage, offset, shape, stride):
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise InputError('a tensor has an impossible shape')
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.dtype = storage.dtype
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        empty = 0 in shape
        # a view may repeat elements by a stride of 0, and so claim any size: none of ours does
        if not empty and (last >= storage.count or np.prod(shape, dtype=object) > storage.count):
            raise InputError('a tensor reaches outside its data')

    def numpy(self):
        """The values as a contiguous array."""
        flat = np.frombuffer(self.storage.data, self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        strides = [s * flat.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)
        return np.ascontiguousarray(view).reshape(self.shape)


class _Storage:
    def __init__(self, dtype, key, count):
        if type(key) is not str or type(count) is not int or count < 0:
            raise InputError('a storage is not described as torch does')
        self.dtype, self.key, self.count = np.dtype(dtype), key, count
        self.data = None


class Namespace(dict):
    """An argparse.Namespace of the file, as the dict it holds."""


class _Inert:
    """A value of the file that is of no use here (a path, a numpy scalar); nothing is made of it."""


def read(path):
    """The object in a .pth file: dicts, lists, numbers, strings, and `Tensor` for its tensors.

    Raises:
        InputError: the file is missing, damaged or of another kind, or names something to import
            that is not a tensor or container.
    """
    try:
        with open(path, 'rb') as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except ValueError:
        raise InputError(f'{path}: is empty') from None
    try:
        return _read_zip(path, data) if data[:4] == b'PK\x03\x04' else _read_stream(data)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
    ) as error:
        raise InputError(f'{path}: damaged, or no file of torch.save ({error})') from None


def _read_zip(path, data):
    members = {}
    with zipfile.ZipFile(path) as archive:  # for the directory only
        for info in archive.infolist():
            members[info.filename] = _member(data, info)
    pickles = [name for name in members if name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise InputError('a zip archive, but not one of torch.save (no data.pkl)')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}constants.pkl' in members:
        raise InputError('a TorchScript archive; save the state_dict() of the model instead')
    if bytes(members.get(f'{root}byteorder', b'little')) != b'little':
        raise InputError('written on a big-endian machine')
    storages = {}
    result, _ = _Interpreter(storages).run(bytes(members[pickles[0]]))
    for storage in storages.values():
        _attach(storage, members.get(f'{root}data/{storage.key}'))
    return result


def _member(data, info):
    """The bytes of a stored archive member, as a view, checked against its CRC."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(f'{info.filename!r} is compressed or encrypted; torch stores plain data')
    header = struct.unpack_from('<4s22xHH', data, info.header_offset)
    signature, name_length, extra_length = header
    start = info.header_offset + 30 + name_length + extra_length
    view = memoryview(data)[start : start + info.file_size]
    if signature != b'PK\x03\x04' or len(view) != info.file_size:
        raise InputError(f'cut short at {info.filename!r}')
    if zlib.crc32(view) != info.CRC:
        raise InputError(f'damaged: checksum of {info.filename!r} does not match')
    return view


def _read_stream(data):
    """The format before torch 1.6: five pickles, then each storage's count and raw data."""
    storages = {}
    run = _Interpreter(storages).run
    magic, place = run(data, 0)
    if magic != LEGACY_MAGIC:
        raise InputError('no file of torch.save')
    _, place = run(data, place)  # protocol version
    system, place = run(data, place)
    if not system.get('little_endian', True):
        raise InputError('written on a big-endian machine')
    result, place = run(data, place)
    keys, place = run(data, place)
    for key in keys:
        storage = storages[key]
        count = struct.unpack_from('<q', data, place)[0]
        size = storage.count * storage.dtype.itemsize
        if count != storage.count:
            raise InputError('a storage is not as long as its tensors say')
        _attach(storage, memoryview(data)[place + 8 : place + 8 + size])
        place += 8 + size
    if any(storage.data is None for storage in storages.values()):
        raise InputError('cut short: data of some tensors is missing')
    return result


def _attach(storage, view):
    size = storage.count * storage.dtype.itemsize
    if view is None or len(view) < size:
        raise InputError('cut short: data of some tensors is missing')
    storage.data = view[:size]


class _Interpreter:
    """Runs the instructions that torch.save writes, and no other."""

    def __init__(self, storages):
        self.storages = storages

    def run(self, data, start=0):
        """The object pickled at `start` and the place after it."""
        source = BytesIO(data) if isinstance(data, bytes) else data
        source.seek(start)
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(source):
            name = opcode.name
            if name == 'STOP':
                return self.stack.pop(), source.tell()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _VALUES:
                self.stack.append(argument)
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

    def _do_tuple1(self, _):
        self.stack.append(tuple(self._pop(1)))

    def _do_tuple2(self, _):
        self.stack.append(tuple(self._pop(2)))

    def _do_tuple3(self, _):
        self.stack.append(tuple(self._pop(3)))

    def _do_append(self, _):
        self._extend(self._pop(1))

    def _do_appends(self, _):
        self._extend(self._to_mark())

    def _extend(self, items):
        if type(self.stack[-1]) is not list:
            raise InputError('damaged: its pickle appends to something that is no list')
        self.stack[-1].extend(items)

    def _do_setitem(self, _):
        self._update(self._pop(2))

    def _do_setitems(self, _):
        self._update(self._to_mark())

    def _update(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(k, KEYS) for k in items[::2]):
            raise InputError('refused: a dict with keys that are neither text nor numbers')
        target.update(zip(items[::2], items[1::2], strict=True))

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
        self.stack.append(function(*arguments))

    _do_newobj = _do_reduce

    def _do_build(self, _):
        (state,) = self._pop(1)
        if type(self.stack[-1]) is Namespace and isinstance(state, dict):
            self.stack[-1].update(state)  # what others are built with (a state_dict's _metadata) is left

    def _do_binpersid(self, _):
        (identity,) = self._pop(1)
        kind, dtype, key, _, count, *view = identity
        if kind != 'storage' or dtype not in STORAGES.values() or any(view):
            raise InputError('refused: its pickle refers to something that is no storage')
        fresh = _Storage(dtype, key, count)
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
            f'refused: it asks to import {module}.{name}, which weights have no need of (nothing was run)'
        )
    return maker


def _tensor(storage, offset, shape, stride, *_):
    if type(storage) is not _Storage:
        raise InputError('refused: a tensor of something that is no storage')
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _ordered_dict(items=()):
    result = {}
    for key, value in items:
        if not isinstance(key, KEYS):
            raise InputError('refused: a dict with keys that are neither text nor numbers')
        result[key] = value
    return result


def _first(value, *_):
    return value


def _inert(*_):
    return _Inert()


_CONSTANTS = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list,
    'EMPTY_DICT': dict,
    'EMPTY_SET': _Inert,
}
_VALUES = set(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING '
    'UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8'.split()
)
_MAKERS = {
    ('collections', 'OrderedDict'): _ordered_dict,
    ('argparse', 'Namespace'): Namespace,
    ('torch._utils', '_rebuild_tensor'): _tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _first,
    ('torch', 'Size'): _first,
}
# met in training checkpoints, beside the weights
_MAKERS |= dict.fromkeys(
    [
        ('torch', 'device'),
        ('pathlib', 'PosixPath'),
        ('collections', 'Counter'),
        ('collections', 'defaultdict'),
        ('builtins', 'set'),
        ('__builtin__', 'set'),
        ('numpy', 'dtype'),
        ('numpy.core.multiarray', 'scalar'),
        ('numpy._core.multiarray', 'scalar'),
        ('_codecs', 'encode'),
    ],
    _inert,
)
