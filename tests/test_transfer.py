"""Section 10: a stream becomes an archive, or nothing; an archive is told from a torn one."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import downloaded
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import Access, Archive, Buffer, Failure, Store, StoredObject, TransientFailure

LOG = logging.getLogger("test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = s3napback.open_store("b", Access(f"file://{tmp_path}"), time.time)
    store.create()
    return store


class Source(io.BytesIO):
    """Bytes, and a failure once `fails_at` of them have been read."""

    def __init__(self, data: bytes, fails_at: int | None = None) -> None:
        super().__init__(data)
        self.fails_at = fails_at

    def check(self) -> None:
        if self.fails_at is not None and self.tell() >= self.fails_at:
            raise Failure("the source died")


def send(store: Store, data: bytes, name: str = "a", size: int = 1000, **options: Any) -> Any:
    source = options.pop("source", None) or Source(data)
    options = {"parallel": 3, "log": LOG, "replaced": s3napback.archive_objects(store, name),
               **options}
    return s3napback.upload(source, store, name, chunk_size=size, **options)


def whole(store: Store, name: str = "a", chunk_size: int | None = None) -> Archive:
    archive = s3napback.resolve_archive(
        name, s3napback.archive_objects(store, name), store.head, chunk_size
    )
    assert archive is not None
    return archive


def content(store: Store, name: str = "a") -> bytes:
    archive = whole(store, name)
    assert archive.complete, archive.fault
    return downloaded(archive, store, 3)


def keys(store: Store) -> list[str]:
    return [item.key for item in s3napback.iter_objects(store)]


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
    send(store, b"x" * 2500, metadata={"tag": "t"}, closing=lambda: {"s3napback-kind": "MySQL"})
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


class Memory:
    """A store that remembers in which order it was asked to do what."""

    bucket = "m"

    def __init__(self) -> None:
        self.retries = s3napback.Retries()
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.history: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], None] = lambda verb, key: None

    def put(self, key: str, data: bytes | Buffer, metadata: Mapping[str, str]) -> str:
        self.fail("put", key)
        self.objects[key] = bytes(data), dict(metadata)
        self.history.append(("put", key))
        return hashlib.md5(bytes(data)).hexdigest()

    def fetch(self, key: str, into: Buffer) -> dict[str, str]:
        data, metadata = self.objects[key]
        into.fill(io.BytesIO(data).readinto)
        return metadata

    def peek(self, key: str, count: int) -> bytes:
        return self.objects[key][0][:count]

    def head(self, key: str) -> dict[str, str] | None:
        return self.objects[key][1]

    def list_page(self, prefix: str, after: str = "") -> tuple[list[StoredObject], bool]:
        return [
            StoredObject(key, len(data), hashlib.md5(data).hexdigest(), 0.0)
            for key, (data, _) in sorted(self.objects.items())
            if key.startswith(prefix) and key > after
        ], False

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.fail("delete", key)
            self.objects.pop(key, None)
            self.history.append(("delete", key))

    def exists(self) -> bool:
        return True

    create = remove = exists  # type: ignore[assignment]

    def prepare(self, key: str) -> None:
        pass


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


def test_a_tail_that_will_not_go_is_told_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    store = Memory()
    old_archive(store, 3)

    def fail(verb: str, key: str) -> None:
        if verb == "delete":
            raise Failure("denied")

    store.fail = fail
    stored = send(store, b"new")
    assert not stored.tidy
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

    def closing() -> dict[str, str]:
        raise Failure("gpg ended with status 2")

    with pytest.raises(Failure, match="gpg"):
        send(store, b"n" * size, closing=closing)
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
    assert not whole(store).complete


def test_memory_is_bounded() -> None:
    store = Memory()
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
            return super().readinto(view)

    send(store, b"", source=Counting(b"n" * 30_500), parallel=3)
    assert max(held) <= 3 + 1  # chunks under way while another is read: parallel + 2 in all
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
    store.retries = s3napback.Retries(20, LOG)

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
        send(store, b"", source=Ended(b"n" * 9000), replaced=())
    assert time.monotonic() - started < 5
    assert not store.retries.stop.is_set()


# ---- assembling ----


def objects(*sizes: int, digits: int = 20, start: int = 0) -> list[StoredObject]:
    return [
        StoredObject(f"a:{n:0{digits}d}", size, f"{n:032x}", 1.0)
        for n, size in enumerate(sizes, start)
    ]


def no_head(key: str) -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    ("items", "chunk_size", "fault"),
    [
        (objects(10, 10, 3), None, ""),
        (objects(10, 10, 0), None, ""),
        (objects(3), None, ""),
        (objects(0), None, ""),
        (objects(10), 10, "it was cut off"),
        (objects(10, 10), None, "it was cut off"),
        (objects(10, 3, start=1), None, "chunk 0 is missing"),
        (objects(10, 10, 10, 3)[::2], None, "chunk 1 is missing"),
        (objects(10, 9, 3), None, "its chunks are of different sizes"),
        (objects(10, 10) + objects(3, start=5), None, "chunk 2 and 2 more is missing"),
    ],
)
def test_archives_of_the_original(
    items: list[StoredObject], chunk_size: int | None, fault: str
) -> None:
    archive = s3napback.resolve_archive("a", items, no_head, chunk_size)
    assert archive is not None
    assert archive.fault.startswith(fault)
    assert archive.complete == (not fault)


def test_nothing_is_no_archive() -> None:
    assert s3napback.resolve_archive("a", [], no_head) is None


def test_both_widths_the_complete_one_counts(store: Store) -> None:
    memory = Memory()
    send(memory, b"n" * 2500)
    torn = dict(memory.objects)
    del torn["a:0000000000002"]
    original = {f"a:{n:020d}": (b"o" * size, {}) for n, size in enumerate((1000, 1000, 20))}
    memory.objects = {**torn, **original}
    assert content(memory) == b"o" * 2020
    send(memory, b"n" * 2500)
    memory.objects |= original
    assert content(memory) == b"n" * 2500


def test_a_longer_old_tail_does_not_hide_the_new_archive() -> None:
    store = Memory()
    send(store, b"o" * 4500)
    tail = {key: value for key, value in store.objects.items() if key > "a:0000000000000"}
    send(store, b"new")
    store.objects |= tail
    assert content(store) == b"new"


def test_a_larger_chunk_size_does_not_hide_the_new_archive() -> None:
    store = Memory()
    send(store, b"o" * 4500)
    tail = {key: value for key, value in store.objects.items() if key > "a:0000000000000"}
    send(store, b"n" * 5000, size=9000)
    store.objects |= tail
    assert content(store) == b"n" * 5000


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_every_mixture_of_two_uploads_is_torn(chunks: int) -> None:
    """Whatever a kill leaves of two uploads of one length, it is never taken for a whole one."""
    first, second = Memory(), Memory()
    send(first, b"1" * (1000 * (chunks - 1) + 5))
    send(second, b"2" * (1000 * (chunks - 1) + 5))
    names = sorted(first.objects)
    for mask in range(1, 2 ** len(names) - 1):
        mixed = Memory()
        for n, name in enumerate(names):
            mixed.objects[name] = (second if mask >> n & 1 else first).objects[name]
        assert not whole(mixed).complete


@pytest.mark.parametrize("drop", range(4))
def test_every_missing_chunk_is_seen(drop: int) -> None:
    store = Memory()
    send(store, b"x" * 3500)
    del store.objects[f"a:{drop:013d}"]
    assert not whole(store).complete


# ---- downloading ----


def test_a_chunk_that_changed_since_the_listing_is_refused() -> None:
    store = Memory()
    send(store, b"x" * 3500)
    archive = whole(store)
    store.objects["a:0000000000002"] = (b"y" * 1000, {"s3napback-archive": "another"})
    received = map(bytes, s3napback.download(archive, store, 2))
    assert next(received) == b"x" * 1000
    assert next(received) == b"x" * 1000
    with pytest.raises(Failure, match=r"a:0000000000002 belongs to another upload"):
        next(received)
    store.objects["a:0000000000002"] = (b"y", {})
    with pytest.raises(Failure, match="has 1 bytes, not 1000"):
        list(s3napback.download(archive, store, 2))
