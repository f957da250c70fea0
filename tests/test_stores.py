"""Stores: one contract, and both forms of a bucket keep it."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, NOWHERE, START, Capture, Site, fetched, tmpfs
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

import s3napback
from s3napback import Access, Buffer, Failure, Store, TransientFailure

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
    return [item.key for item in store.iter_objects(prefix)]


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
    (item,) = bucket.iter_objects()
    assert (item.size, item.etag) == (len(data), hashlib.md5(data).hexdigest())
    assert abs(item.modified - time.time()) < 60


def test_a_put_replaces_data_and_metadata(bucket: Store) -> None:
    bucket.put("k", b"old", {"a": "1"})
    bucket.put("k", b"new", {"b": "2"})
    assert fetched(bucket, "k") == (b"new", {"b": "2"})
    bucket.put("k", b"", {})
    assert fetched(bucket, "k") == (b"", {})


@pytest.mark.parametrize("key", AWKWARD)
def test_awkward_keys_come_back_as_they_were(bucket: Store, key: str) -> None:
    bucket.put(key, key.encode(), {"n": "v"})
    assert fetched(bucket, key) == (key.encode(), {"n": "v"})
    assert bucket.head(key) == {"n": "v"}
    assert keys(bucket, key) == [key]
    bucket.delete([key])
    assert bucket.head(key) is None
    assert keys(bucket) == []


def test_listing_is_sorted_and_filtered(bucket: Store) -> None:
    for key in AWKWARD:
        bucket.put(key, b"x", {})
    assert keys(bucket) == sorted(AWKWARD, key=str.encode)
    assert keys(bucket, "/home/") == ["/home/*-1-DIFF:0", "/home/my docs-0-FULL:0"]


def test_more_than_a_page_and_more_than_a_batch(
    bucket: Store, request: pytest.FixtureRequest
) -> None:
    names = [f"/n-0-FULL:{n:013d}" for n in range(1005)]
    if isinstance(bucket, s3napback.FolderStore):
        for name in names:
            bucket.put(name, b"", {})
    else:
        request.getfixturevalue("s3_session").fill(bucket.bucket, names)
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


def test_the_buckets_of_the_account_are_listed(store: Store, tmp_path: Path, request: Any) -> None:
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
    for sidecar in (tmp_path / "b" / ".meta").iterdir():
        sidecar.write_text("{")
    with pytest.raises(Failure, match="damaged"):
        store.head("k")


def test_folder_files_that_were_copied_there_are_unmarked_objects(tmp_path: Path) -> None:
    store = folder(tmp_path)
    (tmp_path / "b" / "%2Fx-0-FULL%3A00000000000000000000").write_bytes(b"hi")
    (item,) = store.iter_objects()
    assert (item.key, item.etag) == ("/x-0-FULL:" + "0" * 20, hashlib.md5(b"hi").hexdigest())
    assert fetched(store, item.key) == (b"hi", {})


def test_folder_sidecars_do_not_pile_up(tmp_path: Path) -> None:
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
    for attempt in (lambda: keys(store), lambda: store.put("k", b"", {}),
                    lambda: fetched(store, "k"), lambda: store.delete(["k"])):
        with pytest.raises(Failure, match=message) as caught:
            attempt()
        assert not isinstance(caught.value, TransientFailure)
        assert "wrong" not in repr(access) or "wrong" not in str(caught.value).split("(")[0]


def test_a_storage_class_is_kept_in_any_region(
    s3_store: Callable[..., Store], s3_server: Any
) -> None:
    store = s3_store("there", region="eu-central-1", storage_class="STANDARD_IA")
    store.create()
    store.put("k", b"x", {})
    client = s3_server.client()
    assert client.get_bucket_location(Bucket="there")["LocationConstraint"] == "eu-central-1"
    assert client.head_object(Bucket="there", Key="k")["StorageClass"] == "STANDARD_IA"
    (item,) = store.iter_objects()
    assert item.storage_class == "STANDARD_IA"


KEY_ARN = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.mark.parametrize(
    ("lines", "headers"),
    [
        ({"ServerSideEncryption": "AES256"}, {"": "AES256"}),
        pytest.param({"ServerSideEncryption": "aws:kms"}, {"": "aws:kms"}, marks=pytest.mark.slow),
        ({"ServerSideEncryption": "aws:kms", "KmsKey": KEY_ARN},
         {"": "aws:kms", "-aws-kms-key-id": KEY_ARN}),
        pytest.param({"ServerSideEncryption": "aws:kms:dsse", "KmsKey": "alias/backups"},
                     {"": "aws:kms:dsse", "-aws-kms-key-id": "alias/backups"},
                     marks=pytest.mark.slow),
    ],
)
def test_all_that_is_stored_asks_for_the_encryption_of_the_config(
    s3_site: Site, s3_server: Any, lines: dict[str, str], headers: dict[str, str], capsys: Capture
) -> None:
    """Where the bucket refuses all else: uploads of one chunk and of several, and copies."""
    s3_server.client().create_bucket(Bucket="bkt")
    s3_server.encryption = {
        f"x-amz-server-side-encryption{name}": value for name, value in headers.items()
    }
    s3_site.settings |= lines | {"SafeReplace": "On"}
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 0\nFulls 1\n</Directory>"
    for night in range(2):
        (s3_site.data / "file").write_bytes(data := os.urandom(5000))
        assert s3_site.run(now=NIGHT + timedelta(days=night)) == 0, capsys.readouterr().err
    assert any("x-amz-copy-source" in one for one in s3_server.headers)
    assert s3_site.run("check") in (0, 3)
    assert s3_site.run("verify", "--deep") == 0
    assert (s3_site.restored() / "file").read_bytes() == data
    ((_, archive),) = s3_site.archives().items()
    assert archive.complete and archive.count > 1
    assert ("opaque" in archive.metadata) == ("kms" in lines["ServerSideEncryption"])


def test_a_bucket_that_wants_another_encryption_is_told(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    s3_server.client().create_bucket(Bucket="bkt")
    s3_server.encryption = {"x-amz-server-side-encryption": "aws:kms"}
    assert s3_site.run() == 1
    assert "lacks the right s3:PutObject" in (said := capsys.readouterr().err)
    assert "or its policy wants another ServerSideEncryption" in said


def test_the_right_that_an_answer_names_is_told(
    s3_store: Callable[..., Store], s3_server: Any
) -> None:
    s3_server.fail = lambda *_: (403, "AccessDenied", "User: x is not authorized to perform:"
                                 " kms:GenerateDataKey on the resource associated with it")
    with pytest.raises(Failure, match="lacks the right kms:GenerateDataKey"):
        s3_store().put("k", b"", {})
    s3_server.fail = lambda *_: (400, "KMS.DisabledException", "it is disabled")
    with pytest.raises(Failure, match="check KmsKey"):
        s3_store().put("k", b"", {})


def test_a_chunk_under_kms_that_was_damaged_is_noticed_by_the_whole(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    s3_site.settings["ServerSideEncryption"] = "aws:kms"
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    assert s3_site.run("verify", "--deep") == 0
    ((_, archive),) = s3_site.archives().items()
    chunk = s3_server.stored("bkt", archive.chunks[1].key)
    chunk.value = bytes(len(chunk.value))
    capsys.readouterr()
    assert s3_site.run("verify", "--deep") == 1
    assert "the digest of the whole is another" in "".join(capsys.readouterr())


def test_clock_skew_tells_the_seconds(s3_store: Callable[..., Store], s3_server: Any) -> None:
    s3_server.fail = lambda *_: (403, "RequestTimeTooSkewed", "The difference is too large")
    with pytest.raises(Failure, match=r"clock is [+-]\d+ seconds off .*set the clock"):
        keys(s3_store())


@pytest.mark.parametrize(
    "answer", [(500, "InternalError", ""), (503, "SlowDown", ""), (429, "TooManyRequests", "")]
)
def test_a_busy_service_is_a_transient_failure(
    s3_store: Callable[..., Store], s3_server: Any, answer: tuple[int, str, str]
) -> None:
    s3_server.fail = lambda *_: answer
    with pytest.raises(TransientFailure):
        s3_store().put("k", b"x", {})


def test_a_dead_connection_is_transient(s3_store: Callable[..., Store], s3_server: Any) -> None:
    with pytest.raises(TransientFailure):
        keys(s3_store(endpoint="http://127.0.0.1:9"))

    def cut(*_: Any) -> None:
        raise ConnectionAbortedError

    s3_server.fail = cut
    with pytest.raises(TransientFailure):
        keys(s3_store())


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


def test_data_that_arrived_otherwise_than_they_were_sent_is_a_transient_failure(
    s3_store: Callable[..., Store], s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3_store()
    store.create()
    store.put("k", b"data", {})
    monkeypatch.setattr(type(s3_server.stored("bkt", "k")), "etag", f'"{"0" * 32}"')
    with pytest.raises(TransientFailure, match="confirmed another MD5 for k than was sent"):
        store.put("k", b"data", {})


def test_missing_credentials_are_a_sentence(
    s3_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failure, match=r"no S3 credentials.*S3Keyfile") as caught:
        keys(s3_store(key=None, secret=None))
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no line key=…"), ("key=A\n", "no line secret=…"), ("key=\nsecret=b", "no line key=…"),
     ("#key=A\nsecret=b", "no line key=…")],
)
def test_a_key_file_that_lacks_something_is_told(tmp_path: Path, text: str, message: str) -> None:
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
def test_single_keys_that_were_not_deleted_are_a_transient_failure(
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


# ---- retries ----


class Flaky:
    """A store whose `exists` fails some times before it answers."""

    bucket = "b"

    def __init__(
        self, failures: list[Failure], hours: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.failures, self.pauses = failures, list[float]()
        self.retries = s3napback.Retries(hours, s3napback.log)
        monkeypatch.setattr(self.retries, "wait", self.pauses.append)

    @s3napback.retried
    def exists(self) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        return True


def test_a_transient_failure_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_any_other_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
# ---- a folder that others write in ----


def test_a_folder_with_more_in_it_than_chunks(site: Site, capsys: Any) -> None:
    assert site.run() == 0
    bucket = site.folder / "buckets" / "bkt"
    (bucket / "README").write_text("not ours")
    (bucket / "sub").mkdir()
    (bucket / "sub" / "x").write_text("x")
    (bucket / "etc-0-FULL:0000000000000").write_text("made by aws s3 sync")
    (bucket / "link").symlink_to("/etc/passwd")
    (bucket / "dangling").symlink_to("/nowhere")
    os.mkfifo(bucket / "fifo")
    words = site.bucket
    assert s3napback.main(["list", *words]) == 0
    assert f"{site.data}-" in capsys.readouterr().out
    assert s3napback.main(["verify", "--deep", *words]) == 0
    assert site.run("-f") == 0


def bucket_of(site: Site) -> tuple[Path, list[str]]:
    """A bucket with one good archive: its folder, and the options that name it."""
    assert site.run() == 0
    return site.folder / "buckets" / "bkt", [
        *site.bucket
    ]


def test_links_in_a_bucket_are_not_followed(site: Site, capsys: Any) -> None:
    folder, words = bucket_of(site)
    (site.folder / "far+").mkdir()
    (site.folder / "far+" / "stolen-0-FULL%3A0000000000000").write_text("x")
    (folder / "far+").symlink_to(site.folder / "far+")
    (folder / "again+").symlink_to(folder)
    (folder / "once+").symlink_to(folder)
    (folder / "passwd-0-FULL%3A0000000000000").symlink_to("/etc/passwd")
    started = time.monotonic()
    assert s3napback.main(["list", *words]) == 0
    assert time.monotonic() - started < 5  # two links in a circle are 2^40 paths
    said = capsys.readouterr().out
    assert "stolen" not in said and "passwd" not in said
    assert f"{site.data}-" in said


@pytest.mark.parametrize("what", ["a folder", "a link", "a FIFO"])
def test_a_bucket_is_not_removed_with_what_is_not_ours(site: Site, what: str, capsys: Any) -> None:
    folder, words = bucket_of(site)
    foreign = folder / "foreign"
    if what == "a folder":
        foreign.mkdir()
        (foreign / "precious").write_text("kept")
    elif what == "a link":
        foreign.symlink_to("/etc")
    else:
        os.mkfifo(foreign)
    assert s3napback.main(["js3tream", "-d", *words]) == 1
    assert "bucket bkt holds what is not ours: foreign" in capsys.readouterr().err
    assert os.path.lexists(foreign)
    assert what != "a folder" or (foreign / "precious").read_text() == "kept"


def test_a_file_that_may_not_be_read_hides_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, words = bucket_of(site)
    locked = folder / "locked-0-FULL%3A0000000000000"
    locked.write_text("x")
    locked.chmod(0)
    if os.geteuid() == 0:  # who may read everything
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(locked))
    etags = {item.key: item.etag for item in site.store().iter_objects()}
    assert etags.pop("locked-0-FULL:0000000000000") == ""
    assert all(etags.values())
    assert s3napback.main(["list", str(site.data), *words]) == 0
    assert f"{site.data}-" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["list"], ["verify", "--deep"],
                                   ["restore", "/huge", "--to", "TO"]], ids=" ".join)
def test_a_file_larger_than_memory_is_refused(site: Site, words: list[str], capsys: Any) -> None:
    folder, place = bucket_of(site)
    with open(folder / "%2Fhuge-0-FULL%3A0000000000000", "wb") as file:
        file.truncate(10**13)  # bytes, none of them on the disk
    words = [str(site.folder / "to") if word == "TO" else word for word in words]
    started = time.monotonic()
    status = s3napback.main([*words, *place])
    assert time.monotonic() - started < 20
    said = capsys.readouterr()
    assert status == (0 if words == ["list"] else 1)
    assert status == 0 or "more than a chunk can have" in said.out + said.err


def test_a_full_disk_of_the_bucket_fails_the_job(site: Site, capsys: Capture) -> None:
    with tmpfs(site.folder / "buckets", "size=64k"):
        (site.data / "big").write_bytes(os.urandom(500_000))
        assert site.run() == 1
        assert not site.archives()
    assert "No space left on device (free some room there)" in capsys.readouterr().err


# ---- keys and credentials ----


@given(st.binary(max_size=200))
def test_no_key_file_breaks_the_reader(content: bytes) -> None:
    path = Path(f"/tmp/s3nb-key-{os.getpid()}")
    path.write_bytes(content)
    try:
        key, secret = s3napback.read_key_file(str(path))
        assert key and secret
    except Failure as failure:
        assert failure.status == 2
        assert str(path) in str(failure)
    finally:
        path.unlink()


def test_a_key_file_that_others_can_read_gets_a_warning(s3_site: Site, capsys: Capture) -> None:
    os.chmod(s3_site.settings["S3Keyfile"], 0o644)
    assert s3_site.run() == 0
    assert "can be read by others; run: chmod 600 " in capsys.readouterr().err


def test_credentials_that_expire_are_fetched_anew(
    s3_site: Site, s3_server: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls = s3_site.folder / "calls"
    keys = {"Version": 1, "AccessKeyId": s3_server.key, "SecretAccessKey": s3_server.secret}
    process = s3_site.folder / "credentials.sh"
    process.write_text(f"echo call >> {calls}\necho '{json.dumps(keys)}'\n")
    config = s3_site.folder / "aws-config"
    config.write_text(f"[default]\ncredential_process = sh {process}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setattr(s3napback, "_FIRST_PAUSE", 0.05)
    s3_site.settings |= {"S3Keyfile": "", "RetryHours": "1"}

    def fail(method: str, *_: Any) -> tuple[int, str, str] | None:
        old = calls.read_text().count("call") < 2
        return (400, "ExpiredToken", "the token has expired") if method == "PUT" and old else None

    s3_server.fail = fail
    assert s3_site.run() == 0
    assert calls.read_text().count("call") == 2
    assert "ExpiredToken" in capsys.readouterr().err


def test_a_role_of_the_aws_configuration_is_taken_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without S3Keyfile botocore finds the key, and may have to ask another service for it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    (tmp_path / "config").write_text(
        "[profile backup]\nrole_arn = arn:aws:iam::123456789012:role/backup\n"
        "source_profile = own\nregion = us-east-1\n[profile own]\nregion = us-east-1\n"
    )
    (tmp_path / "own").write_text("[own]\naws_access_key_id = a\naws_secret_access_key = b\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_CONFIG_FILE": tmp_path / "config", "AWS_SHARED_CREDENTIALS_FILE": tmp_path / "own",
        "AWS_PROFILE": "backup", "AWS_ENDPOINT_URL_STS": endpoint,
    }.items():
        monkeypatch.setenv(name, str(value))
    try:
        store = s3napback.S3Store("bkt", Access(endpoint))
        store.create()
        assert store.exists()
        assert store._client._request_signer._credentials.method == "assume-role"
    finally:
        server.stop()


# ---- what S3 answers ----


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        ({"secret": "wrong"}, "the secret in S3Keyfile is wrong", 1),
        ({"key": "AKIANOBODY"}, "the key in S3Keyfile is unknown there", 1),
        ({"bucket": "denied-bucket"}, "or the bucket is someone else's", 1),
        ({"keyfile": "secret=x\n"}, "has no line key=…", 2),
        ({"keyfile": "key=x\n"}, "has no line secret=…", 2),
        ({"keyfile": None}, "cannot read S3Keyfile", 2),
    ],
)
def test_a_refusal_of_s3_comes_with_a_hint(
    s3_site: Site, s3_server: Any, capsys: Capture,
    change: dict[str, str | None], message: str, status: int,
) -> None:
    keyfile = Path(s3_site.settings["S3Keyfile"])
    if "keyfile" in change:
        keyfile.unlink()
        if change["keyfile"] is not None:
            keyfile.write_text(change["keyfile"])
    else:
        keyfile.write_text(
            f"key={change.get('key', s3_server.key)}\n"
            f"secret={change.get('secret', s3_server.secret)}\n"
        )
    s3_site.settings["Bucket"] = change.get("bucket") or "bkt"
    assert s3_site.run() == status
    said = capsys.readouterr().err
    assert message in said
    assert s3_server.secret not in said
    assert "Traceback" not in said
    assert not list((s3_site.folder / "diffs").iterdir())


def test_the_buckets_of_an_account_need_a_right_of_their_own(s3_server: Any) -> None:
    s3_server.fail = lambda *_: (403, "AccessDenied", "no")
    with pytest.raises(Failure, match="cannot list the buckets of the account") as caught:
        s3napback.list_buckets(Access(s3_server.endpoint, "us-east-1", "key", "secret"))
    assert "s3:ListAllMyBuckets" in caught.value.hint


def test_a_bucket_elsewhere_ends_at_once(s3_site: Site, s3_server: Any, capsys: Capture) -> None:
    s3_site.settings["RetryHours"] = "1"
    s3_server.fail = lambda *_: (301, "PermanentRedirect", "use the endpoint of the bucket")
    assert s3_site.run() == 1
    assert "the bucket is in another region: set S3Region" in capsys.readouterr().err


def test_a_server_that_speaks_no_tls_is_told(s3_server: Any) -> None:
    endpoint = s3_server.endpoint.replace("http:", "https:")
    store = s3napback.S3Store("bkt", Access(endpoint, "us-east-1", "key", "secret"))
    with pytest.raises(Failure, match="SSL") as failure:
        store.exists()
    assert not isinstance(failure.value, s3napback.TransientFailure)


def test_a_bucket_of_no_possible_name_is_a_failure() -> None:
    with pytest.raises(Failure, match="Invalid bucket name"):
        s3napback.S3Store("no bucket!", NOWHERE).exists()


def test_dates_of_another_kind_are_understood(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3napback.S3Store("bkt", Access(s3_server.endpoint, None, "key", "secret"))
    for headers in ({}, {"date": "yesterday"}):
        answer = {"ResponseMetadata": {"HTTPHeaders": headers}}
        monkeypatch.setattr(store._client, "list_objects_v2", lambda told=answer, **_: told)
        assert store.skew() is None


class _Objects(BaseHTTPRequestHandler):
    """A service whose objects are 3,000,000 bytes; what is odd about them is in the key."""

    protocol_version = "HTTP/1.1"
    data = os.urandom(3_000_000)
    connections = itertools.count()

    def setup(self) -> None:
        next(_Objects.connections)
        super().setup()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.md5(self.data).hexdigest()}"')
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b" % (len(self.data), self.data[:2_000_000]))
            if "cut" not in self.path:
                self.wfile.write(self.data[2_000_000:] + b"\r\n0\r\n\r\n")
            self.close_connection = "cut" in self.path
            return
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data[:2_000_000] if "cut" in self.path else self.data)
        self.close_connection = "cut" in self.path

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def objects() -> Iterator[s3napback.S3Store]:
    _Objects.connections = itertools.count()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Objects) as server:
        threading.Thread(target=server.serve_forever).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        store = s3napback.S3Store("b", Access(endpoint, "us-east-1", "k", "s"))
        yield store
        store._client.close()
        server.shutdown()


@pytest.mark.parametrize("key", ["plain", "chunked"])
def test_one_connection_serves_many_fetches(objects: s3napback.S3Store, key: str) -> None:
    buffer = Buffer(3_000_000)
    for _ in range(3):
        objects.fetch(key, buffer)
        assert bytes(buffer) == _Objects.data
    assert next(_Objects.connections) == 1


@pytest.mark.parametrize("key, said", [
    ("cut", "2000000 read, but total bytes expected is 3000000"),
    ("chunked-cut", "cannot fetch chunked-cut"),
])
def test_a_body_that_is_cut_off_is_a_transient_failure(
    objects: s3napback.S3Store, key: str, said: str
) -> None:
    with pytest.raises(s3napback.TransientFailure, match=said):
        objects.fetch(key, Buffer(3_000_000))
    objects.fetch("plain", Buffer(3_000_000))  # and the next one is a new connection's


@pytest.mark.parametrize("key", ["plain", "chunked"])
def test_a_body_larger_than_its_room_is_a_failure(objects: s3napback.S3Store, key: str) -> None:
    with pytest.raises(Failure, match=f"{key} is larger than listed"):
        objects.fetch(key, Buffer(2_999_999))


# ---- slow lines, and the limit ----


TOOLS = Path(__file__).parent / "tools"


@pytest.fixture
def slow_service() -> Iterator[str]:
    """The endpoint of a service that takes 5 MB a second, and has the bucket "b"."""
    argv = [sys.executable, str(TOOLS / "sink.py"), "--drop", "--conn-mbps", "40"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            endpoint = process.stdout.readline().strip()
            s3napback.S3Store("b", Access(endpoint, "us-east-1", "k", "s")).create()
            yield endpoint
        finally:
            process.kill()


@pytest.mark.slow
def test_a_chunk_may_take_longer_than_any_timeout(
    slow_service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service gets its time for every piece of a chunk, not for the whole of it."""
    monkeypatch.setattr(s3napback, "_CONNECT_TIMEOUT", 1.0)
    monkeypatch.setattr(s3napback, "_READ_TIMEOUT", 2.0)
    store = s3napback.S3Store("b", Access(slow_service, "us-east-1", "k", "s"))
    data = bytes(16_000_000)
    start = time.monotonic()
    assert store.put("k", data, {}) == hashlib.md5(data).hexdigest()
    assert time.monotonic() - start > 2


def test_a_chunk_is_sent_in_pieces_of_one_size() -> None:
    """Each piece has its time; those of a limit are small, so that the flow is even."""
    data = os.urandom(600_000)
    for limit, size in ((None, 256 << 10), (s3napback.RateLimiter(1e12), 16 << 10)):
        body = s3napback.UploadBody(Buffer.of(data), limit, threading.Event())
        pieces = list(iter(lambda: bytes(body.read()), b""))  # noqa: B023
        assert b"".join(pieces) == data
        assert {len(piece) for piece in pieces[:-1]} == {size}


def test_a_bandwidth_limit_holds_for_all_connections_together(s3_site: Site) -> None:
    (s3_site.data / "big").write_bytes(os.urandom(300_000))
    s3_site.settings |= {"BandwidthLimit": "300000", "ChunkSize": "20000"}
    started = time.monotonic()
    assert s3_site.run() == 0
    assert time.monotonic() - started > 0.95
    ((_, archive),) = s3_site.archives().items()
    assert archive.complete and archive.size > 300_000


def test_a_limited_upload_is_given_up_at_once(s3_site: Site) -> None:
    """Who is told to end does not first send what is left of a chunk, at so many bytes a second."""
    (s3_site.data / "big").write_bytes(os.urandom(300_000))
    s3_site.settings |= {"BandwidthLimit": "10000", "ChunkSize": "200000"}
    process = subprocess.Popen(
        [sys.executable, START, "-c", str(s3_site.write())],
        stderr=subprocess.PIPE, text=True,
    )
    store = s3_site.store()
    deadline = time.monotonic() + 20
    while not store.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert time.monotonic() - started < 10
    assert not s3_site.archives()
