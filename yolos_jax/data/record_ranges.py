"""Reads records of array_record files in a bucket, each with one request for its bytes.

The format's own library reads only local files. What matters here: a file is cut into blocks of
64 KiB, each with a header of 24 bytes. Between these headers lie chunks: 40 bytes of header, then records.
The last block is a chunk that locates the footer; the footer is a chunk that locates all chunks.
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import struct
from collections.abc import Callable, Sequence

import numpy as np
import zstandard

from yolos_jax.bucket import Bucket, Reading
from yolos_jax.errors import InputError

BLOCK, BLOCK_HEADER = 1 << 16, 24
HEADER = struct.Struct('<8xQ8xQ8x')  # of a chunk: size of data; type (lowest byte), number of records
SIMPLE = ord('r')  # the type of chunk that array_record writes unless it is told to transpose
COMPRESSED = {0: False, ord('z'): True}  # by the first byte of a chunk's data: no, or by zstd
LARGEST = 1 << 30  # bytes of a chunk's records: few bytes of zstd may claim any number
OFFSET = 1  # numbers of fields in the footer's messages; all are varints
COUNT = 3


class RecordRanges:
    """The records of several files, one after another, by their row."""

    def __init__(self, bucket: Bucket, names: Sequence[str]) -> None:
        """Read where the records are; raises InputError if a file is not one of this format."""
        self._bucket, self._names = bucket, names
        last_blocks = [bucket.start_read(name, slice(-BLOCK, None)) for name in names]
        # where the footers begin
        begins = [_fields(_records(block, 0)[0]).get(OFFSET, 0) for block in last_blocks]
        footers = [
            bucket.start_read(name, slice(begin, None)) for name, begin in zip(names, begins, strict=True)
        ]
        spans, counts = zip(*map(_chunks, footers, begins), strict=True)
        self._file = np.repeat(np.arange(len(names)), [len(of_file) for of_file in counts])
        self._span, self._starts = np.concatenate(spans), np.cumsum(np.concatenate([[0], *counts]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def start_read(self, row: int) -> Callable[[], bytes]:
        """Request a record; returns a function that waits for it, or raises InputError."""
        chunk = int(np.searchsorted(self._starts, row, 'right')) - 1
        within = row - int(self._starts[chunk])
        name, (begin, end) = self._names[self._file[chunk]], self._span[chunk].tolist()
        read = self._bucket.start_read(name, slice(begin, end))
        return lambda: _records(read, begin)[within]


def _chunks(footer: Reading, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each chunk of a file begins and ends, int64 [chunks, 2], and how many records it has."""
    _, *chunks = (_fields(record) for record in _records(footer, begin))  # the first is of the whole file
    starts = np.array([*(chunk.get(OFFSET, 0) for chunk in chunks), begin], np.int64)
    counts = np.array([chunk.get(COUNT, 0) for chunk in chunks], np.int64)
    return np.stack([starts[:-1], starts[1:]], axis=1), counts


def _records(read: Reading, begin: int) -> list[bytes]:
    """The records of the chunk that starts the read, at byte `begin` of its file."""
    data = read.result()
    try:
        data = _without_block_headers(data, begin)
        size, kind = HEADER.unpack_from(data)
        body = data[HEADER.size : HEADER.size + size]
        if kind & 255 != SIMPLE or len(body) != size or body[0] not in COMPRESSED:
            raise ValueError('of a form that is not read from a bucket (transposed, or not by zstd)')
        length, at = _varint(body, 1)
        sizes, values = body[at : at + length], body[at + length :]
        if COMPRESSED[body[0]]:
            sizes, values = _decompress(sizes), _decompress(values)
        return _split(sizes, values, kind >> 8)
    except (ValueError, IndexError, struct.error, zstandard.ZstdError) as error:
        raise InputError(
            f'{read.url}: not an array_record file, or damaged at byte {begin} ({error})'
        ) from None


def _without_block_headers(data: bytes, begin: int) -> bytes:
    first = -begin % BLOCK  # of the headers in `data`
    parts, at = [], 0
    for header in range(first, len(data), BLOCK):
        parts.append(data[at:header])
        at = header + BLOCK_HEADER
    return b''.join([*parts, data[at:]])


def _decompress(data: bytes) -> bytes:
    size, at = _varint(data, 0)
    if not size:
        return b''
    if max(size, zstandard.frame_content_size(data[at:])) > LARGEST:
        raise ValueError(f'a chunk that claims {size} bytes')
    return zstandard.ZstdDecompressor().decompress(data[at:], max_output_size=size)


def _split(sizes: bytes, values: bytes, count: int) -> list[bytes]:
    records, at, place = [], 0, 0
    for _ in range(count):
        size, at = _varint(sizes, at)
        records.append(values[place : place + size])
        place += size
    if place != len(values):
        raise ValueError('sizes of records and of their chunk differ')
    return records


def _fields(message: bytes) -> dict[int, int]:
    """{number: value} of a message's fields that are varints."""
    fields, at = {}, 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 2:  # bytes, not needed here
            size, at = _varint(message, at)
            at += size
        else:
            fields[key >> 3], at = _varint(message, at)
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The value of a varint (seven bits a byte), and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
