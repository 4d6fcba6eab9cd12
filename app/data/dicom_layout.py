"""The bare structure of a DICOM file: its file meta group, and whether every element fits into the file.

GDCM believes the length that an element declares and allocates it: one damaged byte in a small file costs gigabytes.
So the lengths are checked first, in the encodings that are read here (little endian, not deflated).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

IMPLICIT = "1.2.840.10008.1.2"
LONG_VR = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
SHORT_VR = {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO",
    b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXEL_DATA = 0x7FE00010
OBJECT_CLASS, TRANSFER_SYNTAX = 0x00020002, 0x00020010
MAX_DEPTH = 32


class _Damaged(Exception):
    """An element does not fit into the file or is none."""


@dataclass(frozen=True)
class FileMeta:
    """The two UIDs that say what a file is and how it is encoded, and where the data set begins."""

    object_class: str
    transfer_syntax: str
    end: int


@dataclass(frozen=True)
class _Element:
    tag: int
    vr: bytes
    start: int
    length: int


def file_meta(path: Path) -> FileMeta | None:
    """The file meta group, which is never compressed, without UIDs where it is damaged; None if this is no DICOM."""
    with path.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return None
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            uids = {OBJECT_CLASS: "", TRANSFER_SYNTAX: ""}
            at = 132
            try:
                while raw[at : at + 2] == b"\2\0":
                    element = _element(raw, at, len(raw), explicit=True)
                    if element.length == UNDEFINED:
                        raise _Damaged
                    at = element.start + element.length
                    if element.tag in uids and element.length <= 64:
                        uids[element.tag] = raw[element.start : at].decode("latin-1").strip(" \0")
            except _Damaged:
                return FileMeta("", "", at)
            return FileMeta(uids[OBJECT_CLASS], uids[TRANSFER_SYNTAX], at)


def is_intact(path: Path, meta: FileMeta) -> bool:
    """Whether every element of the data set, sequences included, ends within the file."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        try:
            _data_set(raw, meta.end, len(raw), explicit=meta.transfer_syntax != IMPLICIT, depth=0)
        except _Damaged:
            return False
    return True


def _element(raw: mmap.mmap, at: int, end: int, *, explicit: bool) -> _Element:
    """The header of the element at `at`; its value lies before `end` unless its length is undefined."""
    if at + 8 > end:
        raise _Damaged
    group, number, vr, short = struct.unpack_from("<HH2sH", raw, at)
    tag, start = group << 16 | number, at + 8
    if group == 0xFFFE or not explicit:
        vr, length = b"", struct.unpack_from("<I", raw, at + 4)[0]
    elif vr in LONG_VR and at + 12 <= end:
        start, length = at + 12, struct.unpack_from("<I", raw, at + 8)[0]
    elif vr in SHORT_VR:
        length = short
    else:
        raise _Damaged
    if length != UNDEFINED and start + length > end:
        raise _Damaged
    return _Element(tag, vr, start, length)


def _data_set(raw: mmap.mmap, at: int, end: int, *, explicit: bool, depth: int) -> int:
    """Walk the elements of a data set up to `end` or to its delimiter; where the next one begins."""
    if depth > MAX_DEPTH:
        raise _Damaged
    pixels = False
    while at < end:
        if pixels and not any(raw[at : at + 2]):
            break  # some exporters pad the file with zeros
        element = _element(raw, at, end, explicit=explicit)
        if element.tag == ITEM_END:
            return element.start
        pixels = element.tag == PIXEL_DATA or pixels
        at = element.start + element.length
        if element.length == UNDEFINED or element.vr == b"SQ":
            stop = end if element.length == UNDEFINED else at
            # A sequence whose type is unknown (UN) is encoded implicitly, PS3.5 section 6.2.2.
            inner = explicit and element.vr != b"UN"
            fragments = element.tag == PIXEL_DATA
            at = _items(raw, element.start, stop, explicit=inner, depth=depth + 1, fragments=fragments)
    return at


def _items(raw: mmap.mmap, at: int, end: int, *, explicit: bool, depth: int, fragments: bool) -> int:
    """Walk the items of a sequence, or the fragments of compressed pixels; where the next element begins."""
    while at < end:
        item = _element(raw, at, end, explicit=explicit)
        if item.tag == SEQUENCE_END:
            return item.start
        if item.tag != ITEM:
            raise _Damaged
        if item.length == UNDEFINED:
            at = _data_set(raw, item.start, end, explicit=explicit, depth=depth)
            continue
        at = item.start + item.length
        if not fragments:
            _data_set(raw, item.start, at, explicit=explicit, depth=depth)
    return at
