"""TFRecord framing: length, its checksum, payload, its checksum.

    uint64 length | uint32 masked crc32c(length) | payload | uint32 masked crc32c(payload)      (little endian)

TensorBoard's own checksum walks byte by byte in Python (0.1 s for a picture) and its reader stops for ever at the first
damaged record; this one reads on behind it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

POLYNOMIAL = 0x82F63B78
"""CRC-32C (Castagnoli), bits reversed."""
MASK_DELTA = 0xA282EAD8
HEADER_BYTES = 12
FOOTER_BYTES = 4
BLOCK_BYTES = 256
CHUNK_BLOCKS = 4096
SCAN_BYTES = 1 << 20
ZERO_WORD = re.compile(rb"(?=\x00{4})")


def _table() -> Words:
    word = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        word = np.where(word & 1, (word >> 1) ^ np.uint32(POLYNOMIAL), word >> 1)
    return word


TABLE: list[int] = _table().tolist()


@lru_cache(maxsize=1)
def _block_table() -> Words:
    """(BLOCK_BYTES, 256): what a byte at a position adds to the checksum at the end of its block."""
    base = _table()
    rows = [base]
    for _ in range(BLOCK_BYTES - 1):
        rows.append(base[rows[-1] & 0xFF] ^ (rows[-1] >> 8))
    return np.stack(rows[::-1])


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`; long inputs go through numpy, 256 bytes at a time."""
    crc, done = 0xFFFFFFFF, 0
    if len(data) >= 2 * BLOCK_BYTES:
        crc, done = _crc_of_blocks(data, crc)
    for byte in memoryview(data)[done:]:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of_blocks(data: bytes, crc: int) -> tuple[int, int]:
    """Checksum state after all whole blocks of `data`, and how many bytes those are."""
    table = _block_table()
    first, second, third, fourth = (row.tolist() for row in table[:4])
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK_BYTES * BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
    position = np.arange(BLOCK_BYTES)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        parts = np.bitwise_xor.reduce(table[position, blocks[start : start + CHUNK_BLOCKS]], axis=1)
        for part in parts.tolist():
            # The state entering a block acts on the block's first four bytes.
            crc = part ^ first[crc & 0xFF] ^ second[crc >> 8 & 0xFF] ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24]
    return crc, blocks.size


def masked_crc32c(data: bytes) -> int:
    """The rotated checksum that TFRecord stores."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


@lru_cache(maxsize=4096)
def _header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc32c(packed))


def frame(payload: bytes) -> bytes:
    """`payload` as one record."""
    return b"".join((_header(len(payload)), payload, struct.pack("<I", masked_crc32c(payload))))


@dataclass(frozen=True, slots=True)
class Record:
    """One stretch of a file: a whole record, or bytes that are none."""

    start: int
    end: int
    payload: bytes | None
    """None where the bytes are damaged."""
    at_end: bool = False
    """Damaged up to the end of the file: a write that was cut, or one that goes on just now."""


def read_records(file: BinaryIO, start: int = 0) -> Iterator[Record]:
    """All records from byte `start` to the present end of a seekable file, damaged stretches among them."""
    size = file.seek(0, 2)
    position = file.seek(min(start, size))
    while position < size:
        record = _read_one(file, position, size)
        if record.payload is None:
            file.seek(record.end)
        position = record.end
        yield record


def _read_one(file: BinaryIO, start: int, size: int) -> Record:
    header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return Record(start, size, None, at_end=True)
    (length,) = struct.unpack_from("<Q", header)
    if header != _header(length):
        end = _next_record(file, start + 1, size)
        return Record(start, size if end is None else end, None, at_end=end is None)
    end = start + HEADER_BYTES + length + FOOTER_BYTES
    if end > size:
        return Record(start, size, None, at_end=True)
    payload = file.read(length)
    checksum = file.read(FOOTER_BYTES)
    if checksum != struct.pack("<I", masked_crc32c(payload)):
        return Record(start, end, None, at_end=end == size)
    return Record(start, end, payload)


def _next_record(file: BinaryIO, start: int, size: int) -> int | None:
    """Position of the first header at or after `start` that is intact and whose record fits into the file."""
    for position in _zero_words(file, start + 4, size):
        file.seek(position - 4)
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return None
        (length,) = struct.unpack_from("<Q", header)
        if header == _header(length) and position - 4 + HEADER_BYTES + length + FOOTER_BYTES <= size:
            return position - 4
    return None


def _zero_words(file: BinaryIO, start: int, size: int) -> Iterator[int]:
    """Positions at or after `start` where four zero bytes stand, as in the upper half of each length below 4 GiB."""
    while start < size:
        file.seek(start)
        window = file.read(SCAN_BYTES + 3)
        for match in ZERO_WORD.finditer(window):
            yield start + match.start()
        start += SCAN_BYTES
