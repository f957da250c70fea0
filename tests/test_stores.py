"""Section 9: one contract, and both forms of a bucket keep it."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import fetched

import s3napback
from s3napback import Access, Failure, Store, TransientFailure

AWKWARD = [
    "/etc-3-FULL:0000000000000", "/some//path-5-DIFF:00000000000000000001",
    "MySQL/--all-databases-0:0000000000000", "MySQL//var/run/mysqld.sock/db-3:0000000000000",
    "PostgreSQL/-0:0000000000000", "/home/my docs-0-FULL:0", "/home/*-1-DIFF:0", "/100%-0:0",
    "/pct/a%20b%2Fc-0:0", "/plus/a+b c+d-0:0", "/utf8/żółć-日本-😀-0:0", "/q/a?b=c&d#e;f,g-0:0",
    "/quote/it's \"x\"<&>-0:0", "/br/[a-z]{b}!~^`|\\-0:0", "//-0-FULL:1", "///tri-0:0",
    "/trail/slash/", " lead-space", ".hidden", "/" + "k" * 900,
]


@pytest.fixture(params=["folder", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        store = s3napback.open_store("dev.example.com.b1", Access(f"file://{tmp_path}"), time.time)
    else:
        server = request.getfixturevalue("s3_server")
        access = Access(server.endpoint, "us-east-1", server.key, server.secret)
        store = s3napback.open_store("dev.example.com.b1", access, time.time)
    yield store


@pytest.fixture
def bucket(store: Store) -> Store:
    store.create()
    return store


def keys(store: Store, prefix: str = "") -> list[str]:
    return [item.key for item in s3napback.iter_objects(store, prefix)]


def test_a_bucket_is_made_once_and_removed(store: Store) -> None:
    assert not store.exists()
    store.create()
    assert store.exists()
    store.remove()
    assert not store.exists()


def test_what_is_put_is_got(bucket: Store) -> None:
    data = bytes(range(256)) * 100
    assert bucket.put("/k:1", data, {"s3napback-archive": "id"}) == hashlib.md5(data).hexdigest()
    assert fetched(bucket, "/k:1") == (data, {"s3napback-archive": "id"})
    assert bucket.head("/k:1") == {"s3napback-archive": "id"}
    assert bucket.peek("/k:1", 5) == data[:5]
    (item,) = s3napback.iter_objects(bucket)
    assert (item.size, item.etag) == (len(data), hashlib.md5(data).hexdigest())
    assert abs(item.modified - time.time()) < 60


def test_a_put_replaces_data_and_metadata(bucket: Store) -> None:
    bucket.put("k", b"old", {"a": "1"})
    bucket.put("k", b"new", {"b": "2"})
    assert fetched(bucket, "k") == (b"new", {"b": "2"})
    bucket.put("k", bytearray(), {})
    assert fetched(bucket, "k") == (b"", {})


@pytest.mark.parametrize("key", AWKWARD)
def test_awkward_keys(bucket: Store, key: str) -> None:
    bucket.put(key, key.encode(), {"n": "v"})
    assert fetched(bucket, key) == (key.encode(), {"n": "v"})
    assert bucket.head(key) == {"n": "v"}
    assert keys(bucket, key) == [key]
    bucket.delete([key])
    assert bucket.head(key) is None
    assert keys(bucket) == []


def test_listing_is_sorted_and_filtered_and_goes_on(bucket: Store) -> None:
    for key in AWKWARD:
        bucket.put(key, b"x", {})
    assert keys(bucket) == sorted(AWKWARD, key=str.encode)
    assert keys(bucket, "/home/") == ["/home/*-1-DIFF:0", "/home/my docs-0-FULL:0"]
    middle = sorted(AWKWARD, key=str.encode)[7]
    objects, more = bucket.list_page("", middle)
    assert [item.key for item in objects] == sorted(AWKWARD, key=str.encode)[8:]
    assert not more


def test_more_than_a_page_and_more_than_a_batch(bucket: Store) -> None:
    names = [f"/n-0-FULL:{n:013d}" for n in range(1005)]
    for name in names:
        bucket.put(name, b"", {})
    assert keys(bucket, "/n-0-FULL:") == names
    bucket.delete(names)
    assert keys(bucket) == []


def test_deleting_what_is_not_there_is_no_error(bucket: Store) -> None:
    bucket.delete(["nothing"])
    bucket.delete([])


def test_a_bucket_that_is_not_empty_is_not_removed(bucket: Store) -> None:
    bucket.put("/" + "k" * 900, b"x", {})
    with pytest.raises(Failure):
        bucket.remove()
    bucket.delete(["/" + "k" * 900])
    bucket.remove()
    assert not bucket.exists()


def test_a_missing_key_and_a_missing_bucket_are_failures(store: Store) -> None:
    with pytest.raises(Failure):
        store.put("k", b"", {})
    store.create()
    with pytest.raises(Failure):
        fetched(store, "k")


def test_a_key_that_is_too_long_is_a_failure(bucket: Store) -> None:
    with pytest.raises(Failure, match="too long"):
        bucket.put("k" * 1025, b"", {})


def test_buckets_of_the_account(store: Store, tmp_path: Path, request: Any) -> None:
    store.create()
    endpoint = request.getfixturevalue("s3_server").endpoint if isinstance(
        store, s3napback.S3Store
    ) else f"file://{tmp_path}"
    server = request.getfixturevalue("s3_server")
    found = s3napback.list_buckets(Access(endpoint, "us-east-1", server.key, server.secret))
    assert [name for name, _ in found] == ["dev.example.com.b1"]


# ---- folders ----


def folder(tmp_path: Path) -> s3napback.FolderStore:
    store = s3napback.FolderStore(str(tmp_path), "b", time.time)
    store.create()
    return store


def test_folder_objects_are_plain_private_files(tmp_path: Path) -> None:
    folder(tmp_path).put("/etc-0-FULL:0000000000000", b"data", {})
    file = tmp_path / "b" / "%2Fetc-0-FULL%3A0000000000000"
    assert file.read_bytes() == b"data"
    assert file.stat().st_mode & 0o777 == 0o600


def test_folder_damage_is_noticed(tmp_path: Path) -> None:
    store = folder(tmp_path)
    store.put("k", b"data", {})
    file = tmp_path / "b" / "k"
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"dat\0")
    os.utime(file, ns=(stamp, stamp))
    with pytest.raises(Failure, match="damaged"):
        fetched(store, "k")
    for notes in (tmp_path / "b" / ".meta").iterdir():
        notes.write_text("{")
    with pytest.raises(Failure, match="damaged"):
        store.head("k")


def test_folder_files_that_were_copied_there_are_unmarked_objects(tmp_path: Path) -> None:
    store = folder(tmp_path)
    (tmp_path / "b" / "%2Fx-0-FULL%3A00000000000000000000").write_bytes(b"hi")
    (item,) = s3napback.iter_objects(store)
    assert (item.key, item.etag) == ("/x-0-FULL:" + "0" * 20, hashlib.md5(b"hi").hexdigest())
    assert fetched(store, item.key) == (b"hi", {})


def test_folder_notes_do_not_pile_up(tmp_path: Path) -> None:
    store = folder(tmp_path)
    for n in range(3):
        store.put("k", b"%d" % n, {})
    assert len(list((tmp_path / "b" / ".meta").iterdir())) == 1
    store.delete(["k"])
    assert not list((tmp_path / "b" / ".meta").iterdir())


def test_folder_root_that_is_not_mounted_is_not_made(tmp_path: Path) -> None:
    store = s3napback.FolderStore(str(tmp_path / "not-mounted"), "b", time.time)
    with pytest.raises(Failure, match="does not exist"):
        store.exists()
    with pytest.raises(Failure):
        store.create()
    assert not (tmp_path / "not-mounted").exists()


# ---- S3 ----


@pytest.fixture
def s3_store(s3_server: Any) -> Callable[..., Store]:
    def make(bucket: str = "bkt", **access: Any) -> Store:
        given = {"endpoint": s3_server.endpoint, "region": "us-east-1", "key": s3_server.key,
                 "secret": s3_server.secret, **access}
        return s3napback.S3Store(bucket, Access(**given))

    return make


@pytest.mark.parametrize(
    ("access", "bucket", "message"),
    [
        ({"secret": "wrong"}, "bkt", "the secret in S3Keyfile is wrong"),
        ({"key": "AKIDNOBODY"}, "bkt", "the key in S3Keyfile is unknown there"),
        ({}, "denied-bucket", "someone else's"),
    ],
)
def test_who_may_not_is_told_why(
    s3_store: Callable[..., Store], access: dict[str, str], bucket: str, message: str
) -> None:
    store = s3_store(bucket, **access)
    for attempt in (lambda: store.list_page(""), lambda: store.put("k", b"", {}),
                    lambda: fetched(store, "k"), lambda: store.delete(["k"])):
        with pytest.raises(Failure, match=message) as caught:
            attempt()
        assert not isinstance(caught.value, TransientFailure)
        assert "wrong" not in repr(access) or "wrong" not in str(caught.value).split("(")[0]


def test_storage_class_and_any_region(s3_store: Callable[..., Store], s3_server: Any) -> None:
    store = s3_store("there", region="eu-central-1", storage_class="STANDARD_IA")
    store.create()
    store.put("k", b"x", {})
    client = s3_server.client()
    assert client.get_bucket_location(Bucket="there")["LocationConstraint"] == "eu-central-1"
    assert client.head_object(Bucket="there", Key="k")["StorageClass"] == "STANDARD_IA"
    (item,) = s3napback.iter_objects(store)
    assert item.storage_class == "STANDARD_IA"


def test_clock_skew_tells_the_seconds(s3_store: Callable[..., Store], s3_server: Any) -> None:
    s3_server.fail = lambda *_: (403, "RequestTimeTooSkewed", "The difference is too large")
    with pytest.raises(Failure, match=r"clock is [+-]\d+ seconds off .*set the clock"):
        s3_store().list_page("")


@pytest.mark.parametrize(
    "answer", [(500, "InternalError", ""), (503, "SlowDown", ""), (429, "TooManyRequests", "")]
)
def test_what_may_pass_is_told_from_what_may_not(
    s3_store: Callable[..., Store], s3_server: Any, answer: tuple[int, str, str]
) -> None:
    s3_server.fail = lambda *_: answer
    with pytest.raises(TransientFailure):
        s3_store().put("k", b"x", {})


def test_a_dead_connection_may_pass(s3_store: Callable[..., Store], s3_server: Any) -> None:
    with pytest.raises(TransientFailure):
        s3_store(endpoint="http://127.0.0.1:9").list_page("")

    def cut(*_: Any) -> None:
        raise ConnectionAbortedError

    s3_server.fail = cut
    with pytest.raises(TransientFailure):
        s3_store().list_page("")


def test_data_damaged_in_the_store_is_noticed(
    s3_store: Callable[..., Store], s3_server: Any
) -> None:
    store = s3_store()
    store.create()
    store.put("k", b"data", {})
    s3_server.stored("bkt", "k").value = b"dat\0"
    s3_server.stored("bkt", "k")._etag = hashlib.md5(b"data").hexdigest()
    with pytest.raises(TransientFailure, match="damaged"):
        fetched(store, "k")


def test_missing_credentials_are_a_sentence(
    s3_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failure, match=r"no S3 credentials.*S3Keyfile") as caught:
        s3_store(key=None, secret=None).list_page("")
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no line key=…"), ("key=A\n", "no line secret=…"), ("key=\nsecret=b", "no line key=…"),
     ("#key=A\nsecret=b", "no line key=…")],
)
def test_key_files_that_lack_something(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "key.txt"
    path.write_text(text)
    with pytest.raises(Failure, match=message) as caught:
        s3napback.read_key_file(str(path))
    assert caught.value.status == 2
    with pytest.raises(Failure, match="cannot read S3Keyfile"):
        s3napback.read_key_file(str(tmp_path / "absent"))


def test_key_files_are_java_properties(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    path.write_text("! mine\n key = AKIA \r\nsecret: a/b+c=d\\=\n")
    assert s3napback.read_key_file(str(path)) == ("AKIA", "a/b+c=d=")


class Deleting:
    """A client to which each key that it deletes is an error."""

    def __init__(self, code: str) -> None:
        self.code = code

    def delete_objects(self, **_: Any) -> dict[str, Any]:
        return {"Errors": [{"Key": "k", "Code": self.code, "Message": "said"}]}


@pytest.mark.parametrize("code", ["InternalError", "SlowDown", "ServiceUnavailable"])
def test_single_keys_that_were_not_deleted_may_pass(
    s3_store: Callable[..., Store], code: str
) -> None:
    store: Any = s3_store()
    store._made = Deleting(code)
    with pytest.raises(TransientFailure, match=code):
        store.delete(["k"])


def test_a_key_that_a_service_calls_absent_is_deleted(s3_store: Callable[..., Store]) -> None:
    store: Any = s3_store()
    store._made = Deleting("NoSuchKey")
    store.delete(["k"])


# ---- patience ----


class Flaky:
    """A store whose `exists` fails some times before it answers."""

    bucket = "b"

    def __init__(
        self, failures: list[Failure], hours: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.failures, self.pauses = failures, list[float]()
        self.retries = s3napback.Retries(hours, s3napback.log)
        monkeypatch.setattr(self.retries.stop, "wait", self.pauses.append)

    @s3napback.retried
    def exists(self) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        return True


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky([TransientFailure("busy") for _ in range(12)], 1, monkeypatch)
    assert store.exists()
    assert len(store.pauses) == 12
    assert all(0.25 * 2**n <= pause <= min(0.5 * 2**n, 600) or pause >= 300
               for n, pause in enumerate(store.pauses))
    assert max(store.pauses) <= 600


def test_three_tries_at_least_and_no_more_without_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky([TransientFailure("busy") for _ in range(12)], 0, monkeypatch)
    with pytest.raises(TransientFailure, match="busy"):
        store.exists()
    assert len(store.pauses) == 2


def test_what_may_not_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky([Failure("denied"), Failure("denied")], 1, monkeypatch)
    with pytest.raises(Failure, match="denied"):
        store.exists()
    assert not store.pauses


@pytest.mark.parametrize("hours", [None, 20])
def test_the_clean_up_tries_once(hours: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky([TransientFailure("busy") for _ in range(12)], hours, monkeypatch)
    with pytest.raises(TransientFailure, match="busy"), store.retries.once():
        store.exists()
    assert len(store.failures) == 11 and not store.pauses
    assert not store.retries.stop.is_set()


def test_whoever_waits_is_told_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Flaky([TransientFailure("busy") for _ in range(12)], 20, monkeypatch)
    told: list[float] = []
    with store.retries.watched(told.append):
        store.exists()
    assert len(told) == 12
    assert all(0 <= seconds - pause < 20 for seconds, pause in zip(told, store.pauses, strict=True))
