"""Guards against files that are larger than they say and links that lead out of the data folder."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from app.errors import DataError

GIB = 2**30
CHUNK_BYTES = 2**20


def inside(path: Path, root: Path) -> None:
    """Refuse `path` if it, or a folder on the way to it, is a link that leaves `root`.

    Raises:
        DataError: the message names the link.
    """
    base = root.resolve()
    if path.resolve().is_relative_to(base):
        return
    below = path.relative_to(root) if path.is_relative_to(root) else Path()
    steps = [root.joinpath(*below.parts[: depth + 1]) for depth in range(len(below.parts))]
    culprit = next((step for step in steps if not step.resolve().is_relative_to(base)), path)
    raise DataError(
        f"{culprit}: expected everything below {root}, found a link that leaves it; copy the data into the folder"
    )


def check_declared(path: Path, size: Iterable[int], bytes_per_voxel: int, max_gib: float) -> None:
    """Refuse a volume of `size` voxels, decoded as float32 or wider, that needs more than `max_gib`."""
    gib = math.prod(size) * max(bytes_per_voxel, 4) / GIB
    if gib > max_gib:
        raise DataError(f"{path}: declares {gib:.3g} GiB, the limit data.max_file_gib is {max_gib:g} GiB")


def check_file_size(path: Path, max_gib: float) -> None:
    """Refuse a file that takes more than `max_gib` on the disk."""
    gib = path.stat().st_size / GIB
    if gib > max_gib:
        raise DataError(f"{path}: the file has {gib:.3g} GiB, the limit data.max_file_gib is {max_gib:g} GiB")


def chunks(path: Path, max_gib: float) -> Iterator[bytes]:
    """The content of a file, a gzip file expanded as a stream that stops at `max_gib`; at least one chunk."""
    packed = path.name.lower().endswith(".gz")
    limit, total = int(max_gib * GIB), 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            while (chunk := stream.read(CHUNK_BYTES)) or total == 0:
                total += max(len(chunk), 1)
                if total > limit:
                    raise DataError(f"{path}: expands to more than {max_gib:g} GiB, the limit data.max_file_gib")
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: not a complete gzip file (truncated or damaged); copy it again") from None
