"""Buffers: a chunk on its way, in memory or on a disk with little room."""

import hashlib
import io
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Capture, Site, content, send, stored, tmpfs

import s3napback
from s3napback import Buffer, Failure, Store

# ---- a buffer ----


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2500, 2_000_000])
@pytest.mark.parametrize("room", [2_000_000, 3_000_000])
@pytest.mark.parametrize("largest", [1000, 10_000_000])
def test_a_buffer_holds_what_it_was_filled_with(
    size: int, room: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "_MAX_IN_MEMORY", largest)
    data = os.urandom(size)
    buffer = Buffer(room, str(tmp_path))
    buffer.fill(io.BytesIO(b"what was there before").readinto)
    source = io.BytesIO(data + b"more" * (size == room))
    buffer.fill(source.readinto)
    assert (len(buffer), bytes(buffer)) == (size, data)
    assert buffer.md5() == hashlib.md5(data).hexdigest()
    assert bytes(buffer.piece(7, 5)) == data[7:12]
    assert source.read() == b"more" * (size == room)  # not a byte more than there is room for
    assert not list(tmp_path.iterdir())  # its file has no name
    buffer.clear()
    assert (bytes(buffer), buffer.md5()) == (b"", hashlib.md5(b"").hexdigest())


@pytest.fixture
def spooling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of more than 1,000 bytes go through a file."""
    monkeypatch.setattr(s3napback, "_MAX_IN_MEMORY", 1000)


def test_a_buffer_that_was_full_goes_on_where_it_stopped(spooling: None, tmp_path: Path) -> None:
    source = io.BytesIO(data := os.urandom(3_000_000))
    buffer = Buffer(len(data), str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(s3napback.DiskFull, match="3000000 bytes may be needed there"):
                buffer.extend(source.readinto)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    buffer.extend(source.readinto)
    assert bytes(buffer) == data
    assert buffer.md5() == hashlib.md5(data).hexdigest()


def test_a_folder_that_is_not_there_is_a_failure(spooling: None, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"cannot keep a chunk on its way in {tmp_path}"):
        Buffer(2000, str(tmp_path / "no"))


def test_a_buffer_that_cannot_be_read_back_is_a_failure(spooling: None, tmp_path: Path) -> None:
    buffer = Buffer(2000, str(tmp_path))
    buffer.fill(io.BytesIO(b"x").readinto)
    buffer._file.close()  # type: ignore[union-attr]
    buffer._file = open(tmp_path / "write-only", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(Failure, match=f"cannot keep a chunk on its way in {tmp_path}"):
        bytes(buffer)
    buffer.close()


# ---- large chunks ----


@pytest.mark.parametrize("size", [0, 1999, 2000, 2001, 19_000, 20_000])
def test_large_chunks_go_through_files(
    size: int, store: Store, spooling: None, tmp_path: Path
) -> None:
    data = os.urandom(size)
    result = send(store, data, size=2000, folder=str(tmp_path))
    assert (result.size, result.chunks) == (size, size // 2000 + 1)
    assert content(store) == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["buckets"]


class Slow:
    """A folder store whose uploads wait for leave, and tell how many wait."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self.free = threading.Event()
        self.most = 0  # bytes that lay on the disk at once, in chunks on their way

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: bytes | Buffer, metadata: Any) -> str:
        assert self.free.wait(20)
        disk = os.statvfs(self._folder)
        self.most = max(self.most, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)
        return self._store.put(key, data, metadata)


def test_a_disk_for_one_chunk_holds_one_at_a_time(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        data = os.urandom(3_100_000)
        slow = Slow(store, temp)
        slow.free.set()
        assert send(slow, data, size=700_000, folder=str(temp)).chunks == 5
        assert 650_000 < slow.most < 1_000_000
        assert content(store) == data
    with tmpfs(tmp_path / "temp", "size=8m") as temp:  # and one with room for more holds more
        slow = Slow(store, temp)
        threading.Timer(0.3, slow.free.set).start()
        send(slow, data, size=700_000, folder=str(temp))
        assert slow.most > 2_000_000


def test_a_disk_that_others_fill_meanwhile_only_slows_an_upload(
    store: Store, spooling: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There seems to be room; there is none in the middle of a chunk, until another is sent."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(s3napback, "has_room", lambda *_: True)
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        data = os.urandom(3_100_000)
        slow = Slow(store, temp)
        threading.Timer(0.3, slow.free.set).start()
        assert send(slow, data, size=700_000, folder=str(temp)).chunks == 5
        assert content(store) == data


def test_a_disk_that_is_too_small_for_a_chunk_is_a_failure(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    with tmpfs(tmp_path / "temp", "size=100k") as temp:
        with pytest.raises(Failure, match=rf"in {temp}: No space left .*\(300000 bytes.*TempDir"):
            send(store, os.urandom(400_000), size=300_000, folder=str(temp))
        assert not s3napback.archive_objects(store, "a")
        send(store, b"x" * 250_000, size=150_000, folder=str(tmp_path))
        with pytest.raises(Failure, match=rf"in {temp}: No space left .*\(150000 bytes.*TempDir"):
            list(s3napback.download(stored(store), store, 3, folder=str(temp)))


def test_what_is_downloaded_waits_for_room_on_the_disk(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    data = os.urandom(3_100_000)
    send(store, data, size=300_000, folder=str(tmp_path))
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        most, received = 0, b""
        for piece in s3napback.download(stored(store), store, 8, folder=str(temp)):
            received += piece
            time.sleep(0.02)
            disk = os.statvfs(temp)
            most = max(most, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)
    assert received == data
    assert 300_000 < most < 1_000_000


# ---- TempDir ----


def test_a_full_temp_dir_fails_the_job_and_not_the_run(site: Site, capsys: Capture) -> None:
    with tmpfs(site.folder / "temp", "size=64k") as place:
        (site.data / "big").write_bytes(os.urandom(500_000))
        site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
        assert site.run() == 1
        assert not list(place.iterdir())
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "(free some room there)" in said
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


def test_a_temp_dir_that_cannot_be_written_is_told(site: Site, capsys: Capture) -> None:
    site.settings["TempDir"] = "/proc"
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    assert site.run() == 1
    assert "cannot write in TempDir" in capsys.readouterr().err
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert "cannot write in /proc" in capsys.readouterr().out
