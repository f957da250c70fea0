"""Transfer: a stream becomes an archive, or nothing."""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    NIGHT,
    START,
    Capture,
    Memory,
    Site,
    content,
    fake_tool,
    fetched,
    send,
    stage,
    stage_only,
    stored,
)
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import Access, Buffer, Failure, Store, TransientFailure


class Source(io.BytesIO):
    """Bytes, and a failure once `fails_at` of them have been read."""

    def __init__(self, data: bytes, fails_at: int | None = None) -> None:
        super().__init__(data)
        self.fails_at = fails_at

    def check(self) -> None:
        if self.fails_at is not None and self.tell() >= self.fails_at:
            raise Failure("the source died")


def keys(store: Store) -> list[str]:
    return [item.key for item in store.iter_objects()]


def test_the_objects_are_those_of_the_original(store: Store, golden: Path) -> None:
    edge = golden / "perl-archives" / "edge"
    recorded = json.loads((edge / "index.json").read_text())["buckets"]["oracle.edge"]["objects"]
    compared = 0
    for archive in json.loads((edge / "manifest.json").read_text())["archives"]:
        prefix = archive["prefix"]
        if prefix is None:
            continue
        theirs = {
            s3napback.parse_chunk_key(key)[1]: entry  # type: ignore[index]
            for key, entry in recorded.items()
            if key.rpartition(":")[0] == prefix
        }
        data = b"".join(
            (edge / "objects" / "oracle.edge" / theirs[n]["file"]).read_bytes()
            for n in sorted(theirs)
        )
        send(store, data, prefix)
        ours = s3napback.archive_objects(store, prefix)
        assert [item.key for item in ours] == [f"{prefix}:{n:013d}" for n in range(len(theirs))]
        assert [(i.size, i.etag) for i in ours] == [
            (theirs[n]["size"], theirs[n]["md5"]) for n in range(len(theirs))
        ]
        compared += 1
    assert compared == 23


@given(st.binary(max_size=50), st.integers(1, 20))
def test_any_stream_comes_back(data: bytes, size: int) -> None:
    store = Memory()
    stored = send(store, data, size=size)
    assert stored.chunks == len(data) // size + 1
    assert stored.size == len(data)
    assert content(store) == data
    sizes = [item.size for item in s3napback.archive_objects(store, "a")]
    assert sizes == [size] * (len(data) // size) + [len(data) % size]


def test_the_metadata_says_what_the_archive_is(store: Store) -> None:
    send(store, b"x" * 2500, metadata={"tag": "t"}, marks=lambda: {"s3napback-kind": "MySQL"})
    heads = [store.head(key) for key in keys(store)]
    (upload_id,) = {head["s3napback-archive"] for head in heads if head}
    assert len(upload_id) == 32
    assert heads[0] == {"s3napback-archive": upload_id, "tag": "t"}
    digests = b"".join(hashlib.md5(b"x" * n).digest() for n in (1000, 1000, 500))
    assert heads[2] == {
        "s3napback-archive": upload_id, "tag": "t", "s3napback-kind": "MySQL",
        "s3napback-chunks": "3", "s3napback-bytes": "2500",
        "s3napback-md5": hashlib.md5(digests).hexdigest(),
    }


# ---- replacing ----


def old_archive(store: Memory, chunks: int, digits: int = 13) -> None:
    send(store, b"o" * (1000 * (chunks - 1) + 10))
    store.objects = {
        f"a:{int(key.rpartition(':')[2]):0{digits}d}": value
        for key, value in store.objects.items()
    }
    store.history.clear()


@pytest.mark.parametrize("digits", [13, 20])
def test_one_chunk_replaces_one_by_a_single_put(digits: int) -> None:
    store = Memory()
    old_archive(store, 1, digits)
    send(store, b"new")
    assert store.history[0] == ("put", "a:0000000000000")
    assert store.history[1:] == ([] if digits == 13 else [("delete", "a:" + "0" * 20)])
    assert content(store) == b"new"


def test_one_chunk_replaces_many_before_they_go(store: Store) -> None:
    memory = Memory()
    old_archive(memory, 3)
    states = []
    memory.fail = lambda verb, key: states.append(content(memory))
    send(memory, b"new")
    assert [state[:3] for state in states] == [b"ooo", b"new", b"new"]
    assert content(memory) == b"new"
    assert list(memory.objects) == ["a:0000000000000"]


@pytest.mark.parametrize("digits", [13, 20])
def test_many_replace_only_once_their_first_chunk_is_in_hand(digits: int) -> None:
    store = Memory()
    old_archive(store, 3, digits)

    class Slow(Source):
        def readinto(self, view: Any) -> int:
            if self.tell() < 1000:
                assert not store.history, "deleted before the first chunk was there"
            return super().readinto(view[:100])

    send(store, b"", source=Slow(b"n" * 4500))
    assert [verb for verb, _ in store.history[:3]] == ["delete"] * 3
    assert store.history[0][1].endswith("2")  # the last first
    assert content(store) == b"n" * 4500
    assert len(store.objects) == 5


@pytest.mark.parametrize("size", [500, 2500])
def test_what_a_cut_replacement_left_goes_with_the_next_archive(size: int) -> None:
    store = Memory()
    store.objects[s3napback.staged_key("a", 0)] = b"x", {}
    send(store, b"n" * size)
    assert content(store) == b"n" * size
    assert not any(map(s3napback.is_staged, store.objects))


def test_a_tail_that_will_not_go_is_told_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    store = Memory()
    old_archive(store, 3)

    def fail(verb: str, key: str) -> None:
        if verb == "delete":
            raise Failure("denied")

    store.fail = fail
    stored = send(store, b"new")
    assert not stored.old_chunks_removed
    assert "Could not delete old backup: denied" in caplog.text
    assert content(store) == b"new"


# ---- failing ----


@pytest.mark.parametrize("fails_at", [0, 1, 500, 999])
def test_a_source_that_dies_in_its_first_chunk_leaves_the_old_archive(fails_at: int) -> None:
    store = Memory()
    old_archive(store, 3)
    before = dict(store.objects)
    with pytest.raises(Failure, match="died"):
        send(store, b"", source=Source(b"n" * 999, fails_at))
    assert store.objects == before


@pytest.mark.parametrize("fails_at", [1000, 1001, 3500, 4000])
def test_a_source_that_dies_later_leaves_nothing_of_itself(
    fails_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = Memory()
    with pytest.raises(Failure, match="died"):
        send(store, b"", source=Source(b"n" * 4000, fails_at))
    assert not store.objects
    assert ("Deleting any partial backup" in caplog.text) == (fails_at > 1000)


@pytest.mark.parametrize("size", [0, 999, 1000, 4500])
def test_a_source_that_turns_out_bad_at_its_end_is_not_stored(size: int) -> None:
    store = Memory()

    def marks() -> dict[str, str]:
        raise Failure("gpg ended with status 2")

    with pytest.raises(Failure, match="gpg"):
        send(store, b"n" * size, marks=marks)
    assert not store.objects


@pytest.mark.parametrize("number", range(5))
def test_a_chunk_that_cannot_be_stored_ends_the_upload(number: int) -> None:
    store = Memory()

    def fail(verb: str, key: str) -> None:
        if (verb, key) == ("put", f"a:{number:013d}"):
            raise TransientFailure("no luck for hours")

    store.fail = fail
    with pytest.raises(TransientFailure):
        send(store, b"n" * 4500)
    assert not store.objects


def test_a_partial_backup_that_will_not_go_is_told(caplog: pytest.LogCaptureFixture) -> None:
    store = Memory()

    def fail(verb: str, key: str) -> None:
        if verb == "delete" or key.endswith("3"):
            raise Failure("denied")

    store.fail = fail
    with pytest.raises(Failure, match="denied"):
        send(store, b"n" * 4500)
    assert "Could not delete partial backup: denied" in caplog.text
    assert not stored(store).complete


def test_an_upload_holds_no_more_chunks_than_it_may() -> None:
    store, buffers = Memory(), set[int]()
    held: list[int] = []
    waiting: list[str] = []

    def slow(verb: str, key: str) -> None:
        waiting.append(key)
        time.sleep(0.01)
        waiting.remove(key)

    store.fail = slow

    class Counting(Source):
        def readinto(self, view: Any) -> int:
            held.append(self.tell() // 1000 - len(store.objects))
            buffers.add(view.obj and id(view.obj))
            return super().readinto(view)

    send(store, b"", source=Counting(b"n" * 30_500), parallel=3)
    assert max(held) <= 3 + 1  # chunks under way while another is read: parallel + 2 in all
    assert len(buffers) <= 3 + 2  # each is used again
    assert len(waiting) == 0


@pytest.mark.parametrize("error", [Failure("denied"), TransientFailure("no luck"),
                                   s3napback.Interrupted(15)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_single_put_that_fails_leaves_the_old_archive(chunks: int, error: BaseException) -> None:
    store = Memory()
    old_archive(store, chunks)
    before = dict(store.objects)

    def fail(verb: str, key: str) -> None:
        raise error

    store.fail = fail
    with pytest.raises(type(error)):
        send(store, b"new")
    assert store.objects == before


def test_an_interruption_after_the_last_chunk_does_not_undo_it() -> None:
    store = Memory()
    told: list[int] = []

    def progress(size: int) -> None:
        told.append(size)
        if size == 500:
            raise s3napback.Interrupted(15)

    with pytest.raises(s3napback.Interrupted):
        send(store, b"n" * 2500, progress=progress)
    assert content(store) == b"n" * 2500


def test_an_end_that_was_asked_for_comes_while_the_network_is_down() -> None:
    class Patient(Memory):
        put, delete = s3napback.retried(Memory.put), s3napback.retried(Memory.delete)

    store = Patient()
    store.retries = s3napback.Retries(20, logging.getLogger("test"))

    def fail(verb: str, key: str) -> None:
        if verb == "delete" or key.endswith("2"):
            raise TransientFailure("down")

    store.fail = fail

    class Ended(Source):
        def readinto(self, view: Any) -> int:
            if self.tell() >= 4000:
                raise s3napback.Interrupted(15)
            return super().readinto(view)

    started = time.monotonic()
    with pytest.raises(s3napback.Interrupted):
        send(store, b"", source=Ended(b"n" * 9000), old_chunks=())
    assert time.monotonic() - started < 5
    assert not store.retries.stop.is_set()


# ---- assembling ----


# ---- downloading ----


def test_a_chunk_that_changed_since_the_listing_is_refused() -> None:
    store = Memory()
    send(store, b"x" * 3500)
    archive = stored(store)
    store.objects["a:0000000000002"] = (b"y" * 1000, {"s3napback-archive": "another"})
    received = map(bytes, s3napback.download(archive, store, 2))
    assert next(received) == b"x" * 1000
    assert next(received) == b"x" * 1000
    with pytest.raises(Failure, match=r"a:0000000000002 belongs to another upload"):
        next(received)
    store.objects["a:0000000000002"] = (b"y", {})
    with pytest.raises(Failure, match="has 1 bytes, not 1000"):
        list(s3napback.download(archive, store, 2))


@pytest.mark.parametrize("asked_for", [(1,), (0, 1, 3), (0, 1, 2, 3)])
def test_a_chunk_without_its_mark_is_proved_by_the_whole_alone(asked_for: tuple[int, ...]) -> None:
    store = Memory()
    send(store, b"x" * 3500)
    store.objects["a:0000000000001"] = (b"x" * 1000, {})
    archive = stored(store)
    chosen = replace(archive, chunks=tuple(archive.chunks[n] for n in asked_for))
    for data in s3napback.download(chosen, store, 2):
        assert set(bytes(data)) == set(b"x")
    marks = {**archive.metadata, "md5": "0" * 32}
    received = s3napback.download(replace(chosen, metadata=marks), store, 2)
    whole = len(asked_for) == archive.count
    with pytest.raises(Failure, match="digest of the whole") if whole else contextlib.nullcontext():
        list(received)


def test_whoever_needs_no_more_does_not_wait_for_what_was_fetched_ahead() -> None:
    fetched: list[str] = []

    class Slow(Memory):
        def fetch(self, key: str, into: s3napback.Buffer) -> dict[str, str]:
            fetched.append(key)
            source = io.BytesIO(self.objects[key][0])

            def readinto(view: memoryview) -> int:
                if not key.endswith("0"):
                    time.sleep(0.05)
                return source.readinto(view[:1])

            into.fill(readinto)
            return self.objects[key][1]

    store = Slow()
    send(store, b"x" * 3500)
    archive = stored(store)
    started = time.monotonic()
    with contextlib.closing(s3napback.download(archive, store, 4)) as received:
        assert next(received) == b"x" * 1000
    assert time.monotonic() - started < 5  # 50 s each
    assert len(fetched) > 1
    fetched.clear()
    few = s3napback.download(archive, store, 4, to_the_end=False)
    with contextlib.closing(few) as received:
        assert next(received) == b"x" * 1000
    assert fetched == ["a:0000000000000"]


def test_an_object_that_has_grown_since_the_listing_is_refused(store: Store) -> None:
    send(store, b"x" * 1500, size=1000)
    archive = stored(store)
    store.put("a:0000000000001", b"x" * 2000, {})
    with pytest.raises(Failure, match="is larger than listed: it was replaced"):
        list(s3napback.download(archive, store, 2))


def test_an_object_that_has_grown_on_s3_is_refused(s3_server: Any) -> None:
    store = s3napback.S3Store(
        "bkt", Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    )
    store.create()
    store.put("k", b"x" * 2000, {})
    with pytest.raises(Failure, match="k is larger than listed"):
        store.fetch("k", Buffer(1999))


def test_the_end_that_tar_does_not_need_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    tar = subprocess.run(["tar", "-C", str(tmp_path), "-cf", "-", "file"], check=True,
                         capture_output=True).stdout
    whole = gzip.compress(tar + bytes(20_000_000), 1)  # as with a large blocking factor
    env = dict(os.environ)
    for data in (whole, whole[:-1]):
        (tmp_path / f"out{len(data)}").mkdir()
        with s3napback.decoded(iter([data]), env) as blocks:
            if data is whole:
                s3napback.run_tar(blocks, str(tmp_path / f"out{len(data)}"), env)
            else:
                with pytest.raises(Failure, match="ended with status 1"):
                    s3napback.run_tar(blocks, str(tmp_path / f"out{len(data)}"), env)
        assert (tmp_path / f"out{len(data)}" / "file").read_text() == "one"


# ---- the source, the bucket and the requests ----


def test_data_that_cannot_be_read_are_a_failure() -> None:
    failed = pytest.raises(Failure, match="read the data to be stored")
    with open("/proc/self/mem", "rb", buffering=0) as file, failed:
        send(Memory(), b"", source=file)


def test_a_replacement_that_cannot_be_stored_leaves_the_old_archive(
    s3_site: Site, s3_server: Any
) -> None:
    s3_site.settings["ChunkSize"] = "100000"
    assert s3_site.run() == 0
    ((name, _),) = s3_site.archives().items()
    old = s3_site.content(name)
    (s3_site.data / "file").write_text("two")
    s3_server.fail = lambda method, *_: (503, "SlowDown", "") if method == "PUT" else None
    assert s3_site.run("-f") == 1
    s3_server.fail = None
    assert s3_site.content(name) == old


def test_ended_by_a_signal_while_the_network_is_down(site: Site) -> None:
    site.settings |= {"S3Endpoint": "http://127.0.0.1:9", "RetryHours": "20"}
    site.settings["S3Keyfile"] = str(site.folder / "key")
    (site.folder / "key").write_text("key=a\nsecret=b\n")
    process = subprocess.Popen(
        [sys.executable, START, "-c", str(site.write())], stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while "trying again" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def of_chunks(method: str, path: str, *_: Any) -> tuple[int, str, str] | None:
    """A service that is out of order for whoever reads contents."""
    return (503, "ServiceUnavailable", "wait") if method == "GET" and ":000" in path else None


def test_a_restore_is_as_patient_as_a_backup(
    s3_site: Site, s3_server: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A line that breaks for a minute does not end the work of hours."""
    monkeypatch.setattr(s3napback, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(s3napback, "_MAX_PAUSE", 0.01)
    assert s3_site.run() == 0
    tries: list[str] = []

    def fail(method: str, path: str, *_: Any) -> Any:
        answer = of_chunks(method, path)
        tries.extend([path] if answer else [])
        return answer if len(tries) < 9 else None

    s3_server.fail = fail
    place = ["-b", "bkt", "--endpoint", s3_server.endpoint, "-K", s3_site.settings["S3Keyfile"]]
    for number, hours, words in ((3, "0", []), (9, "1", []), (9, "0", place)):
        tries.clear()
        s3_site.settings["RetryHours"] = hours
        words = words or ["-c", str(s3_site.write())]
        status = s3napback.main(["restore", *words, str(s3_site.data),
                                 "--to", f"{s3_site.folder}/{len(words)}-{hours}"])
        assert (status, len(tries)) == (number == 3, number)
    s3_server.fail = lambda *_: (503, "ServiceUnavailable", "wait")
    assert s3napback.main(["list", *place]) == 1  # at the beginning somebody is there to read it


def test_a_restore_that_waits_for_the_network_can_be_ended(s3_site: Site, s3_server: Any) -> None:
    (s3_site.data / "big").write_bytes(os.urandom(9000))
    assert s3_site.run() == 0
    # By then other threads feed the decompressor and tar.
    s3_server.fail = lambda method, path, *_: of_chunks(method, path) if path[-1] == "7" else None
    s3_site.settings["RetryHours"] = "20"
    process = subprocess.Popen(
        [sys.executable, s3napback.__file__, "restore", "-c", str(s3_site.write()),
         str(s3_site.data), "--to", s3_site.folder / "back"], stderr=subprocess.PIPE, text=True,
    )
    assert process.stderr
    for _ in range(3):
        while "trying again" not in process.stderr.readline():
            assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list((s3_site.folder / "back").iterdir())


def test_a_small_archive_costs_a_look_a_put_and_a_look(s3_server: Any, tmp_path: Path) -> None:
    s3napback.S3Store(
        "bkt", Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    ).create()
    s3_server.requests.clear()
    keyfile = str(s3_server.write_keyfile(tmp_path / "key"))
    argv = [sys.executable, START, "js3tream", "-i", "-b", "bkt:a", "-K", keyfile,
            "--endpoint", s3_server.endpoint]
    subprocess.run(argv, input=b"x", check=True)
    assert s3_server.requests == [
        ("GET", "/bkt"), ("PUT", "/bkt/a:0000000000000"), ("GET", "/bkt")]


# ---- SafeReplace ----


@pytest.fixture
def safe_site(site: Site) -> Site:
    """A site whose one slot holds an archive of several chunks."""
    site.settings["SafeReplace"] = "On"
    (site.data / "big").write_bytes(os.urandom(5000))
    assert site.run() == 0
    return site


def test_the_old_archive_stays_until_the_new_one_is_there(
    safe_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ((name, _),) = safe_site.archives().items()
    content = safe_site.content(name)
    fake_tool(safe_site, monkeypatch, "pigz", '"$REAL" "$@"; exit 1')
    assert safe_site.run("-f") == 1
    assert safe_site.content(name) == content
    assert not [p for p in (safe_site.folder / "buckets/bkt").iterdir() if "new" in p.name]
    assert "No complete full backup" not in caplog.text


def test_a_replacement_leaves_one_archive(safe_site: Site) -> None:
    ((name, old),) = safe_site.archives().items()
    assert safe_site.run("-f") == 0
    ((again, new),) = safe_site.archives().items()
    assert again == name
    assert new.metadata["archive"] != old.metadata["archive"]
    assert not new.staged
    keys = [item.key for item in safe_site.store().iter_objects()]
    assert keys == [s3napback.chunk_key(name, n) for n in range(len(new.chunks))]


@pytest.mark.parametrize("placed", ["whole", "half", "none", "older", "torn"])
def test_whoever_finds_a_staged_archive_finishes_the_move(safe_site: Site, placed: str) -> None:
    store = safe_site.store()
    ((name, _),) = safe_site.archives().items()
    if placed == "older":  # the copying has not begun
        old = [(item.key, *fetched(store, item.key)) for item in safe_site.archives()[name].chunks]
        assert safe_site.run("-f", now=NIGHT + timedelta(seconds=1)) == 0
    content = safe_site.content(name)
    archive = stage(safe_site, name)
    for path in safe_site.diff_files():
        path.unlink()  # the run ended before it came to that
    if placed == "older":
        for item in archive.chunks:
            store.delete([item.key])
        for key, data, metadata in old:
            store.put(key, data, metadata)
            os.utime(store.path_of(key), (1e9, 1e9))  # type: ignore[attr-defined]
    gone = {"half": 2, "none": 0, "torn": 1}.get(placed)
    if gone is not None:
        store.delete([item.key for item in archive.chunks[gone:]])
    if placed == "torn":  # an upload under way has no last chunk, and nothing says that it is whole
        store.delete([s3napback.staged_key(name, len(archive.chunks) - 1)])
        assert safe_site.run() == 0
        assert [i for i in store.iter_objects() if s3napback.is_staged(i.key)] == []
        assert safe_site.archives()[name].complete
        return
    assert safe_site.run(now=NIGHT + timedelta(minutes=1)) == 0  # done today
    assert safe_site.content(name) == content
    assert [i.key for i in store.iter_objects()] == [i.key for i in archive.chunks]


def test_a_staged_archive_of_another_night_is_not_done_today(safe_site: Site) -> None:
    """It comes to its place today, and is as old as it is."""
    name = stage_only(safe_site)
    for path in safe_site.diff_files():
        path.unlink()
    turn = NIGHT + timedelta(days=28)  # of the same slot
    assert safe_site.run(now=turn) == 0
    made = safe_site.archives()[name].made
    assert datetime.fromtimestamp(made).date() == turn.date()


def test_a_restore_reads_a_staged_archive_where_it_waits(safe_site: Site, capsys: Capture) -> None:
    """No command that reads moves or deletes an object: the next run does."""
    name = stage_only(safe_site)
    endpoint = safe_site.settings["S3Endpoint"]
    for where in (["-b", "bkt", "--endpoint", endpoint], ["-c", str(safe_site.write())]):
        before = safe_site.state()
        target = safe_site.folder / "back"
        words = ["restore", *where, str(safe_site.data), "--to", str(target)]
        assert s3napback.main(words) == 0
        assert (target / str(safe_site.data)[1:] / "file").read_text() == "one"
        shutil.rmtree(target)
        assert s3napback.main(["list", *where]) == 0
        assert "not yet in its place" in capsys.readouterr().out
        assert safe_site.archives()[name].staged
        assert safe_site.state() == before


def test_a_copy_that_is_refused_loses_nothing(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    s3_site.settings["SafeReplace"] = "On"
    (s3_site.data / "big").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    (s3_site.data / "big").write_bytes(os.urandom(5000))

    def fail(method: str, path: str, query: dict[str, str], body: bytes | None) -> Any:
        copying = method == "PUT" and body is None
        return (403, "AccessDenied", "no copies") if copying else None

    s3_server.fail = fail
    later = NIGHT + timedelta(minutes=1)  # what seems older does not take its place
    assert s3_site.run("-f", now=later) == 3
    said = capsys.readouterr().err
    assert "Could not put the new backup in its place; it waits beside it" in said
    assert "AccessDenied" in said
    ((name, archive),) = s3_site.archives().items()
    assert archive.complete and archive.staged
    # The next run cannot place it either, and must not write over the only one there is.
    assert s3_site.run("-f", now=later) == 1
    assert s3_site.archives()[name].metadata == archive.metadata
    s3_server.fail = None
    assert s3_site.run("-f", now=later) == 0
    assert s3_site.archives()[name].complete and not s3_site.archives()[name].staged


def test_a_bad_copy_is_found_out(
    safe_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def copy(self: s3napback.FolderStore, source: str, target: str) -> None:
        data, metadata = fetched(self, source)
        self.put(target, bytes(reversed(data)), metadata)

    monkeypatch.setattr(s3napback.FolderStore, "copy", copy)
    assert safe_site.run("-f") == 3
    assert "was not copied as it was stored" in capsys.readouterr().err
    (archive,) = safe_site.archives().values()
    assert archive.complete and archive.staged


def test_staged_chunks_lie_in_the_standard_class(s3_site: Site, s3_server: Any) -> None:
    """Others cost for months what is there for minutes, or cannot be copied from."""
    s3_site.settings |= {"SafeReplace": "On", "StorageClass": "STANDARD_IA"}
    (s3_site.data / "big").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    classes: set[tuple[bool, str]] = set()

    def look(method: str, path: str, query: dict[str, str], body: bytes | None) -> None:
        for item in s3_site.store().iter_objects() if method == "POST" else ():
            classes.add((s3napback.is_staged(item.key), item.storage_class))

    s3_server.fail = look
    assert s3_site.run("-f") == 0
    s3_server.fail = None
    assert (True, "STANDARD") in classes and (True, "STANDARD_IA") not in classes
    assert {i.storage_class for i in s3_site.store().iter_objects()} == {"STANDARD_IA"}
