"""Event files are read, cut and mended without losing a point that should stay."""

import io
import logging
import os
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as reference_crc
from tensorboard.summary.writer.record_writer import RecordWriter

from app.errors import MachineError
from app.ops.event_files import EventReader, newest_wall_time, next_file_name, rewind
from app.ops.tfrecord import HEADER_BYTES, crc32c, frame, masked_crc32c, read_records

NAME = "events.out.tfevents.0000000100.1"


def record(tag: str, step: int, value: float = 0.0) -> bytes:
    """One scalar, framed by TensorBoard's own writer."""
    file = io.BytesIO()
    event = Event(wall_time=step, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def points(folder: Path) -> list[tuple[str, int]]:
    """What stands in the folder's files."""
    return [(value.tag, event.step) for event in EventReader(folder).poll() for value in event.summary.value]


@pytest.mark.parametrize("size", [0, 1, 8, 255, 256, 511, 512, 513, 767, 70_001])
def test_checksum_agrees_with_tensorboards(size: int) -> None:
    """Both ways of computing it, byte by byte and by blocks, give the reference's value."""
    data = os.urandom(size)
    assert masked_crc32c(data) == reference_crc(data)


def test_checksum_of_the_standard_test_vector() -> None:
    """CRC-32C of "123456789" is 0xE3069283 (RFC 3720)."""
    assert crc32c(b"123456789") == 0xE3069283


def test_a_frame_is_what_tensorboard_writes() -> None:
    """The framing is TFRecord's, byte for byte."""
    file = io.BytesIO()
    RecordWriter(file).write(b"payload")
    assert frame(b"payload") == file.getvalue()


def test_rewind_drops_what_keep_rejects(tmp_path: Path) -> None:
    """Points go one by one, of all files; the rest keeps its bytes."""
    first, second = tmp_path / NAME, tmp_path / "events.out.tfevents.0000000200.2"
    first.write_bytes(b"".join(record("a", step) for step in range(10)))
    second.write_bytes(b"".join(record("b", step) for step in range(10)))
    report = rewind(tmp_path, lambda tag, step: tag == "a" or step < 3)
    assert (report.files, report.dropped, report.damaged) == (1, 7, 0)
    assert first.read_bytes() == b"".join(record("a", step) for step in range(10))
    assert second.read_bytes() == b"".join(record("b", step) for step in range(3))


def test_rewind_splits_an_event_with_points_of_several_tags(tmp_path: Path) -> None:
    """Only the rejected points of a shared event go."""
    values = [Summary.Value(tag=tag, simple_value=1.0) for tag in ("a", "b", "c")]
    (tmp_path / NAME).write_bytes(frame(Event(step=5, summary=Summary(value=values)).SerializeToString()))
    assert rewind(tmp_path, lambda tag, _: tag != "b").dropped == 1
    assert points(tmp_path) == [("a", 5), ("c", 5)]


def test_rewind_leaves_a_good_file_alone(tmp_path: Path) -> None:
    """A file with nothing to take out is the same file afterwards, and nothing else lies beside it."""
    path = tmp_path / NAME
    path.write_bytes(record("a", 1))
    before = path.stat()
    assert rewind(tmp_path, lambda *_: True).files == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_rewind_twice_changes_nothing_more(tmp_path: Path) -> None:
    """A rewind that was killed is repeated without harm."""
    path = tmp_path / NAME
    path.write_bytes(b"".join(record("a", step) for step in range(5)) + b"torn")
    rewind(tmp_path, lambda _, step: step < 3)
    content = path.read_bytes()
    (tmp_path / "rewound.bin").write_bytes(b"left by a killed rewind")
    assert rewind(tmp_path, lambda _, step: step < 3).files == 0
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_rewind_without_a_folder_does_nothing(tmp_path: Path) -> None:
    """The first start has no event files."""
    assert rewind(tmp_path / "missing", lambda *_: False).files == 0


def test_a_torn_last_record_is_cut_wherever_it_was_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every length that a kill may leave gives the same file, without a warning."""
    whole, last = record("a", 1), record("a", 2)
    for length in range(1, len(last)):
        (tmp_path / NAME).write_bytes(whole + last[:length])
        assert rewind(tmp_path, lambda *_: True).damaged == 1
        assert (tmp_path / NAME).read_bytes() == whole
    assert not caplog.records


@pytest.mark.parametrize("offset", [0, 9, HEADER_BYTES, -1], ids=["length", "length checksum", "payload", "checksum"])
def test_a_damaged_record_costs_only_itself(tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever part of a record is damaged, all records before and behind it stay, and the log says what is lost."""
    good = [record("a", step) for step in range(1, 6)]
    bad = bytearray(good[2])
    bad[offset] ^= 0x55
    path = tmp_path / NAME
    path.write_bytes(b"".join((*good[:2], bytes(bad), *good[3:])))
    with caplog.at_level(logging.WARNING):
        assert rewind(tmp_path, lambda *_: True).damaged == 1
    assert path.read_bytes() == b"".join((*good[:2], *good[3:]))
    start = 2 * len(good[0])
    assert f"{path}: bytes {start} to {start + len(bad)} are damaged; the points in them are lost" in caplog.text


def test_a_record_that_is_no_event_is_cut(tmp_path: Path) -> None:
    """A right checksum over nonsense is damage as well."""
    (tmp_path / NAME).write_bytes(record("a", 1) + frame(b"\xff\xff\xff") + record("a", 2))
    assert rewind(tmp_path, lambda *_: True).damaged == 1
    assert points(tmp_path) == [("a", 1), ("a", 2)]


def test_the_search_for_the_next_record_crosses_its_windows() -> None:
    """A stretch of zeros longer than the search window does not hide the records behind it."""
    data = record("a", 1) + bytes((1 << 20) + 5) + record("a", 2)
    found = [item.payload for item in read_records(io.BytesIO(data))]
    assert [item is None for item in found] == [False, True, False]


def test_rewind_names_the_file_that_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full volume ends with a message that says what to do, and the old file stays."""
    path = tmp_path / NAME
    path.write_bytes(record("a", 1) + record("a", 2))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.workspace.os.fsync", full)
    with pytest.raises(MachineError) as caught:
        rewind(tmp_path, lambda _, step: step < 2)
    assert str(caught.value) == (
        f"cannot rewrite the event file {path}: No space left on device. Make its volume writable and free some space, "
        f"or move the file away to go on without its curves"
    )
    assert path.read_bytes() == record("a", 1) + record("a", 2)


def test_a_reader_follows_a_growing_file(tmp_path: Path) -> None:
    """Each event comes once, a half-written one only when it is whole, and new files are found."""
    path = tmp_path / NAME
    reader = EventReader(tmp_path)
    data = record("a", 1) + record("a", 2)
    path.write_bytes(data[:-3])
    assert [event.step for event in reader.poll()] == [1]
    assert [event.step for event in reader.poll()] == []
    path.write_bytes(data)
    (tmp_path / "events.out.tfevents.0000000101.2").write_bytes(record("a", 3))
    assert [event.step for event in reader.poll()] == [2, 3]


def test_names_of_event_files_ascend_on_a_clock_that_goes_back(tmp_path: Path) -> None:
    """TensorBoard reads in path order, so each new name sorts behind all others."""
    for now in (1_700_000_000.9, 1_600_000_000.0, 1_700_000_000.0, 5.0, 1_800_000_000.0):
        (tmp_path / next_file_name(tmp_path, now)).write_bytes(record("a", 7))
        (tmp_path / "events.out.tfevents.1650000000.host.17.0").touch()
    times = [path.name.split(".")[3:] for path in sorted(tmp_path.iterdir()) if "host" not in path.name]
    assert times == [
        ["1700000000", "1"],
        ["1700000001", "2"],
        ["1700000002", "3"],
        ["1700000003", "4"],
        ["1800000000", "5"],
    ]
    assert newest_wall_time(tmp_path) == 7
