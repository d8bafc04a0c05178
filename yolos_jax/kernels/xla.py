"""Lets XLA's programs call functions that Numba compiles, and XLA's threads share the work of a call.

XLA passes the address of a frame, which names the arrays, and wants 0 back if all went well. The frame and
what it points to are C structs (xla/ffi/api/c_api.h, in jaxlib's include folder); here they are read as
64-bit words.

A call divides its work into units. It schedules a task for each other thread, works itself, and waits until
the last unit is finished, but not for tasks that have not begun: these may be queued behind this very call.
So the state of a call lives until its last user releases it, and the frame only while units are left.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from yolos_jax.numba_cache import renamed

EXTENSION, API, CONTEXT, ARGUMENTS, RESULTS = 1, 2, 3, 9, 14  # words of a frame
DATA, RANK, DIMS = 3, 4, 5  # of an array
VERSION, SCHEDULE, COUNT_THREADS = 4, 17, 18  # of the table of functions
METADATA, TRAITS = 3, 4  # of the extension that asks, and of its answer, whose word 3 is the version
NEXT, FINISHED, USERS, UNITS, FRAME, SCRATCH = range(6)  # of the state of a call
MOST = 20  # words of a struct that are read
WORD = ir.IntType(64)


def entry(function: Callable) -> Callable:
    """A function of one word, compiled, that C can call."""
    return cfunc('int64(int64)', cache=True)(renamed(function))


def _pointer_to(kind: types.Type) -> Callable:
    @intrinsic
    def pointer(typing, address):  # noqa: ARG001  Numba's interface, here and below
        def build(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), build

    return pointer


_words_at, _floats_at, _ints_at = (_pointer_to(kind) for kind in (types.int64, types.float32, types.int32))


@intrinsic
def _add(typing, address, value):  # noqa: ARG001
    """Add to a word that threads share; what it was before."""

    def build(context, builder, signature, values):  # noqa: ARG001
        place = builder.inttoptr(values[0], WORD.as_pointer())
        return builder.atomic_rmw('add', place, values[1], 'seq_cst')

    return types.int64(types.int64, types.int64), build


_allocate = types.ExternalFunction('malloc', types.int64(types.int64))
_free = types.ExternalFunction('free', types.void(types.int64))
_let_others_run = types.ExternalFunction('sched_yield', types.int32())


@intrinsic
def _call(typing, function, argument):  # noqa: ARG001
    """Call a C function of one word by its address."""

    def build(context, builder, signature, values):  # noqa: ARG001
        kind = ir.FunctionType(WORD, [WORD]).as_pointer()
        return builder.call(builder.inttoptr(values[0], kind), [values[1]])

    return types.int64(types.int64, types.int64), build


def address_of(symbol: str) -> Callable:
    """A function for Numba: the address of what `llvmlite.binding.add_symbol` gave this name.

    An address as such must not stand in a function that Numba caches: it is another one in each process.
    """

    @intrinsic
    def address(typing):  # noqa: ARG001
        def build(context, builder, signature, values):  # noqa: ARG001
            kind = ir.FunctionType(WORD, [WORD])
            return builder.ptrtoint(cgutils.get_or_insert_function(builder.module, kind, symbol), WORD)

        return types.int64(), build

    return address


@njit
def words(address: int) -> np.ndarray:
    """The 64-bit words from an address on."""
    return carray(_words_at(address), MOST)


@njit
def arguments(frame: int) -> np.ndarray:
    """The descriptions of a call's arguments, for `shape`, `floats` and `ints`."""
    return words(words(frame)[ARGUMENTS])


@njit
def results(frame: int) -> np.ndarray:
    """The descriptions of a call's results, likewise."""
    return words(words(frame)[RESULTS])


@njit
def shape(array: int) -> np.ndarray:
    """The shape of an argument or result; as many words as it has dimensions count."""
    return words(words(array)[DIMS])


@njit
def _size(array: int) -> int:
    size = 1
    for i in range(words(array)[RANK]):
        size *= shape(array)[i]
    return size


@njit
def floats(array: int) -> np.ndarray:
    """A float32 argument or result, in one dimension."""
    return carray(_floats_at(words(array)[DATA]), _size(array))


@njit
def ints(array: int) -> np.ndarray:
    """An int32 argument or result, in one dimension."""
    return carray(_ints_at(words(array)[DATA]), _size(array))


@njit
def scratch(state: int, size: int) -> np.ndarray:
    """The `size` floats of a call's scratch."""
    return carray(_floats_at(words(state)[SCRATCH]), size)


@njit
def answers_query(frame: int) -> bool:
    """Whether XLA only asks which version of the interface a function is for; then this answers it."""
    extension = words(frame)[EXTENSION]
    if extension == 0:
        return False
    metadata = words(words(extension)[METADATA])
    # 32 bits each: minor and major. The structs are those of major 0, so XLA refuses if its own is another
    metadata[METADATA] = words(words(frame)[API])[VERSION] >> 32 << 32
    metadata[TRAITS] = 0
    return True


@njit
def take(state: int) -> int:
    """The number of the next unit, or at least their number when none is left."""
    return _add(state + 8 * NEXT, 1)


@njit
def finish(state: int) -> None:
    """Report that a unit is finished; when all are, the frame must not be read again."""
    _add(state + 8 * FINISHED, 1)


@njit
def release(state: int) -> None:
    """The end of a task, or of a call."""
    if _add(state + 8 * USERS, -1) == 1:
        _free(state)


@njit
def run(frame: int, units: int, task: int, scratch: int) -> None:
    """Do a call's `units` in this thread and those of XLA's that are free.

    task: the address of a function of the state, which works on units until `take` finds none left and then
    releases the state. scratch: the address of floats for the units.
    """
    state = _allocate(8 * (SCRATCH + 1))
    shared = words(state)
    shared[NEXT], shared[FINISHED], shared[UNITS] = 0, 0, units
    shared[USERS] = 2  # this and its task
    shared[FRAME], shared[SCRATCH] = frame, scratch
    context, functions = words(frame)[CONTEXT], words(words(frame)[API])
    # size, extension, context, where to write the number, the number; then size, .., .., task, its argument
    request = _allocate(8 * 5)
    fields = words(request)
    fields[0], fields[1], fields[2], fields[3], fields[4] = 8 * 4, 0, context, request + 8 * 4, 1
    _call(functions[COUNT_THREADS], request)
    threads = min(fields[4], units)
    fields[0], fields[3], fields[4] = 8 * 5, task, state
    for _ in range(1, threads):
        _add(state + 8 * USERS, 1)
        if _call(functions[SCHEDULE], request) != 0:  # an error: fewer threads do it
            _add(state + 8 * USERS, -1)
    _free(request)
    _call(task, state)
    while _add(state + 8 * FINISHED, 0) < units:
        _let_others_run()
    release(state)
