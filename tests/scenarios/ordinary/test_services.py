"""Services that speak S3 in their own way, and the libraries that speak it for us."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest
import pytest
from conftest import NIGHT, Capture, Site, downloaded, require_tool, run, wait_until

import s3napback
from s3napback import Access, Failure, Store

LOG = logging.getLogger("test")


@pytest.fixture
def service(s3_server: Any) -> s3napback.S3Store:
    """The S3 server with the bucket of `Site`."""
    access = Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    store = s3napback.S3Store("bkt", access)
    store.create()
    return store


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3napback, "_LISTING_PAUSES", (0.0,) * 4)


# ---- boto3 ----


def test_service_models_of_ones_own_do_no_harm(
    s3_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path / "models"))
    assert s3_site.run() == 0
    assert all(archive.complete for archive in s3_site.archives().values())


def test_no_upload_waits_for_leave(s3_server: Any, service: s3napback.S3Store) -> None:
    """Without `Expect: 100-continue`, which many services never answer: a second each time."""
    service.put("k", b"x" * 2_000_000, {})
    assert ("PUT", "/bkt/k") in s3_server.requests
    assert not any("expect" in headers for headers in s3_server.headers)


# ---- what is called stored is in the bucket ----


def send(store: Store, data: bytes, name: str = "a", **options: Any) -> s3napback.UploadResult:
    """An upload of DATA in chunks of 1000 bytes."""
    return conftest.send(store, data, name, **{"parallel": 2, "old_chunks": (), **options})


def found(store: Store, name: str = "a") -> s3napback.Archive | None:
    objects = s3napback.archive_objects(store, name)
    return s3napback.resolve_archive(name, objects, store.head)


@pytest.fixture(params=["folder", "S3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "S3":
        store: Store = request.getfixturevalue("service")
        return store
    (tmp_path / "bkt").mkdir()
    return s3napback.FolderStore(str(tmp_path), "bkt", lambda: NIGHT.timestamp())


class Intruded:
    """A store in which somebody else does something after a number of PUTs."""

    def __init__(self, store: Store, puts: int, act: Callable[[], object]) -> None:
        self._store, self._left, self._act = store, puts, act

    def put(self, key: str, data: Any, metadata: Mapping[str, str]) -> str:
        etag = self._store.put(key, data, metadata)
        self._left -= 1
        if self._left == 0:
            self._act()
        return etag

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.slow
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("puts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("bucket", "others"), [("folder", 1500), ("folder", 2500), ("folder", 4500), ("S3", 2500)],
    indirect=["bucket"],
)
def test_two_machines_in_one_slot_are_not_both_well(
    bucket: Store, puts: int, others: int, safe: bool
) -> None:
    """One stores all of its archive while the other is in the middle of its own."""
    old = os.urandom(2500)
    send(bucket, old)
    present = s3napback.archive_objects(bucket, "a")
    mine, theirs = os.urandom(3500), os.urandom(others)
    ends: list[str] = []

    def other() -> None:
        try:
            now = s3napback.archive_objects(bucket, "a")
            send(bucket, theirs, old_chunks=now, safe=safe)
            ends.append("0")
        except Failure as failure:
            ends.append(str(failure))

    store: Any = Intruded(bucket, puts, other)
    try:
        send(store, mine, old_chunks=present, safe=safe, parallel=1)
        ends.append("0")
    except Failure as failure:
        ends.append(str(failure))
    assert any("another machine" in end for end in ends), ends
    archive = found(bucket)
    if archive and archive.complete:
        assert downloaded(archive, bucket, 2) in (old, mine, theirs)


def test_what_is_mixed_says_so(bucket: Store) -> None:
    def other() -> None:
        send(bucket, os.urandom(3500))

    store: Any = Intruded(bucket, 1, other)
    with pytest.raises(Failure, match="another machine stored a at the same time"):
        send(store, os.urandom(3500), parallel=1)
    archive = found(bucket)
    assert archive and not archive.complete


@pytest.mark.slow
@pytest.mark.parametrize("safe", ["", "On"])
def test_a_listing_that_lags_is_waited_for(s3_site: Site, s3_server: Any, safe: str) -> None:
    """It is asked again; nothing new is thrown away, and what is stored can be restored."""
    s3_site.settings["SafeReplace"] = safe
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 0\nFulls 1\n</Directory>"
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    s3_server.lag = 2
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run(now=NIGHT + timedelta(days=1)) == 0
    s3_server.lag = 0
    for _ in range(3):
        archives = s3_site.archives()
    (archive,) = archives.values()
    assert archive.complete and not archive.staged
    assert archive.made > NIGHT.timestamp()


def test_an_upload_that_is_never_listed_is_a_failure(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    assert s3_site.run() == 0
    s3_server.lag = 100
    s3_site.settings["ChunkSize"] = "200"
    assert s3_site.run(now=NIGHT + timedelta(days=1)) == 1
    assert "bkt does not list what was stored in it" in capsys.readouterr().err


def test_staged_chunks_that_are_half_listed_are_kept(bucket: Store) -> None:
    """SafeReplace, the next run: only the listing's first chunks of a whole staged archive."""
    send(bucket, os.urandom(2500))
    objects = s3napback.archive_objects(bucket, "a")
    data = os.urandom(3500)
    store: Any = Intruded(bucket, 0, lambda: None)
    store.copy = lambda source, target: (_ for _ in ()).throw(Failure("no copies"))
    assert not send(store, data, old_chunks=objects, safe=True).old_chunks_removed
    staged = [i for i in s3napback.archive_objects(bucket, "a") if s3napback.is_staged(i.key)]
    assert len(staged) == 4
    with pytest.raises(Failure, match=r"does not list a:s3napback-new:0+2, which"):
        s3napback.finish_replacement(bucket, "a", staged[:2], 2)
    s3napback.finish_replacement(bucket, "a", s3napback.archive_objects(bucket, "a"), 2)
    archive = found(bucket)
    assert archive and archive.complete and not archive.staged
    assert downloaded(archive, bucket, 2) == data


def test_a_service_that_strips_the_leading_slash_stores_nothing_unseen(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    s3_server.strips_slash = True
    assert s3_site.run() == 1
    assert "the service strips the leading slash of keys (set Prefix" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("list",), ("check",)])
def test_an_endpoint_that_holds_the_buckets_name_is_told(
    s3_site: Site, s3_server: Any, service: s3napback.S3Store, command: tuple[str, ...],
    capsys: Capture,
) -> None:
    s3_site.settings["S3Endpoint"] += "/bkt"
    assert s3_site.run(*command) == 1
    said = capsys.readouterr()
    assert "already hold the bucket's name" in said.err + said.out
    assert not [path for method, path in s3_server.requests[1:] if method == "PUT"]


@pytest.mark.parametrize("body", [
    b"", b"<html><body>hello</body></html>", b"<p>hello<br>", b"{}",
    b"<?xml version='1.0'?><ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
])
def test_an_answer_that_is_no_listing_is_refused(
    s3_site: Site, s3_server: Any, service: s3napback.S3Store, body: bytes,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:
    def answer(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    monkeypatch.setattr(s3_server, "_app", answer)
    with pytest.raises(Failure, match="what the service answers to a listing is no listing"):
        list(service.iter_objects())
    assert s3_site.run("list") == 1
    assert "S3Endpoint may be no S3 service" in capsys.readouterr().err


# ---- metadata ----


@pytest.mark.slow
@pytest.mark.parametrize("safe", ["", "On"])
def test_names_of_metadata_may_come_back_in_capitals(
    s3_site: Site, s3_server: Any, safe: str
) -> None:
    s3_server.capitals = True
    s3_site.settings["SafeReplace"] = safe
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 1\nFulls 1\n</Directory>"
    for day in range(4):
        (s3_site.data / "file").write_bytes(data := os.urandom(5000))
        assert s3_site.run(now=NIGHT + timedelta(days=day)) == 0
    assert all("md5" in archive.metadata for archive in s3_site.archives().values())
    out = s3_site.folder / "out"
    assert s3_site.run("restore", str(s3_site.data), "--to", str(out)) == 0
    assert (out / str(s3_site.data).lstrip("/") / "file").read_bytes() == data
    assert s3_site.run("verify", "--deep") == 0


@pytest.mark.slow
def test_safe_replace_is_refused_where_no_metadata_is_kept(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    """It is refused before anything old goes; `check` says it beforehand."""
    s3_server.forgets_metadata = True
    s3_site.settings["SafeReplace"] = "On"
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 0\nFulls 1\n</Directory>"
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    before = s3_site.content(f"{s3_site.data}-0-FULL")
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run(now=NIGHT + timedelta(days=1)) == 1
    assert "the service keeps no user metadata" in capsys.readouterr().err
    assert s3_site.content(f"{s3_site.data}-0-FULL") == before
    assert not any("s3napback-new" in item.key for item in s3_site.store().iter_objects())
    assert s3_site.run("check") == 1
    assert "does not keep the metadata" in capsys.readouterr().out


# ---- copies of a bucket ----


def copy_in_parts(service: Any, smallest: int) -> None:
    """What `aws s3 sync` makes of larger objects: other ETags, and no metadata."""
    client = service.client()
    for item in client.list_objects_v2(Bucket="bkt")["Contents"]:
        if item["Size"] < smallest:
            continue
        key, data = item["Key"], client.get_object(Bucket="bkt", Key=item["Key"])["Body"].read()
        stored = service.stored("bkt", key)
        stored.metadata.clear()
        stored._etag = hashlib.md5(hashlib.md5(data).digest()).hexdigest() + "-2"


@pytest.fixture
def two_nights(s3_site: Site, s3_server: Any) -> tuple[Site, list[bytes]]:
    """A FULL and a DIFF of several chunks, the last of which are the small ones."""
    contents = []
    s3_site.settings["ChunkSize"] = "3000"
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 6\nFulls 1\n</Directory>"
    for day in range(2):
        contents.append(os.urandom(7000))
        (s3_site.data / "file").write_bytes(contents[-1])
        assert s3_site.run(now=NIGHT + timedelta(days=day - 1)) == 0
    return s3_site, contents


def test_chunks_that_lost_their_marks_are_proved_by_the_whole(
    two_nights: tuple[Site, list[bytes]], s3_server: Any, capsys: Capture
) -> None:
    site, contents = two_nights
    copy_in_parts(s3_server, 3000)
    out = site.folder / "out"
    assert site.run("restore", str(site.data), "--to", str(out)) == 0
    assert (out / str(site.data).lstrip("/") / "file").read_bytes() == contents[1]
    assert site.run("verify", "--deep") == 0
    key = next(i.key for i in site.store().iter_objects() if i.size == 3000)
    value = s3_server.stored("bkt", key)
    value.value = bytes(3000)
    capsys.readouterr()
    assert site.run("verify", "--deep") == 1
    said = capsys.readouterr()
    assert "and the digest of the whole is another" in said.out + said.err


def test_a_folder_bucket_that_was_copied_without_its_times(site: Site, capsys: Capture) -> None:
    """`rsync -r`: every night comes back as it was, in the order in which they were made."""
    contents = []
    for day in range(4):
        contents.append(os.urandom(3000))
        (site.data / "file").write_bytes(contents[-1])
        assert site.run(now=NIGHT + timedelta(days=day)) == 0
    before = {name: archive.made for name, archive in site.archives().items()}
    for n, path in enumerate(sorted((site.folder / "buckets").rglob("*"), reverse=True)):
        os.utime(path, (2e9 + n, 2e9 + n))
    assert {name: archive.made for name, archive in site.archives().items()} == before
    for day, content in enumerate(contents):
        at = (NIGHT + timedelta(days=day, hours=1)).isoformat(" ")
        out = site.folder / f"out{day}"
        assert site.run("restore", str(site.data), "--at", at, "--to", str(out)) == 0
        assert (out / str(site.data).lstrip("/") / "file").read_bytes() == content
    assert site.run("verify", "--deep") == 0
    assert site.run(now=NIGHT + timedelta(days=4)) == 0  # and it goes on from there
    assert "everything is stored" not in capsys.readouterr().err


def test_a_copied_folder_bucket_after_a_killed_put(tmp_path: Path) -> None:
    """Two notes for data of one size: the content says which of them it is."""
    (tmp_path / "bkt").mkdir()
    store = s3napback.FolderStore(str(tmp_path), "bkt", lambda: NIGHT.timestamp())
    store.put("k", b"old", {"n": "old"})
    (old,) = (tmp_path / "bkt" / ".meta").iterdir()
    kept = old.read_bytes()
    store.put("k", b"new", {"n": "new"})
    old.write_bytes(kept)
    os.utime(tmp_path / "bkt" / "k", (1e9, 1e9))
    assert store.head("k") == {"n": "new"}
    (tmp_path / "bkt" / "k").write_bytes(b"old")
    assert store.head("k") == {"n": "old"}


# ---- TLS ----


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(certificate, key), self-made, for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    run([require_tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/key",
         "-out", f"{folder}/cert"])
    return f"{folder}/cert", f"{folder}/key"


class TlsServer(threading.Thread):
    """Takes connections, does something with each (its number is told), and closes it."""

    def __init__(self, act: Callable[[socket.socket, int], None]) -> None:
        super().__init__(daemon=True)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._act, self.connections = act, 0
        self.endpoint = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            with self._listening.accept()[0] as connection, contextlib.suppress(OSError):
                self.connections += 1
                self._act(connection, self.connections)


EMPTY = (b"<ListBucketResult><Name>bkt</Name><IsTruncated>false</IsTruncated></ListBucketResult>")
ANSWER = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"


@pytest.mark.parametrize("broken", ["handshake", "answer", "body", "damage"])
def test_a_tls_connection_that_breaks_is_tried_again(
    certificate: tuple[str, str], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def act(connection: socket.socket, number: int) -> None:
        if broken == "handshake" and number == 1:
            connection.recv(65536)  # all of it, so that what follows is an end and no reset
            return
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            if number > 1:
                tls.sendall(ANSWER % (len(EMPTY), EMPTY))
            elif broken == "answer":
                os.close(tls.detach())
            elif broken == "body":
                tls.sendall(ANSWER % (100_000, b"x" * 5000))
            else:
                tls.sendall(ANSWER % (100_000, b"x" * 5000))
                plain = tls.detach()
                os.write(plain, b"\x17\x03\x03\x00\x20" + bytes(32))
                os.close(plain)

    server = TlsServer(act)
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate[0])
    access = Access(server.endpoint, "us-east-1", "k", "s")
    retrying = s3napback.S3Store("bkt", access, s3napback.Retries(1, LOG))
    if broken == "damage":  # of an object: the answer itself has come
        with pytest.raises(s3napback.TransientFailure):
            s3napback.S3Store("bkt", access).fetch("k", s3napback.Buffer(100_000))
    assert retrying.exists()
    assert server.connections == 2


@pytest.mark.parametrize("fault, hint", [
    ("certificate", "AWS_CA_BUNDLE names a file of certificates"),
    ("ca file", "correct AWS_CA_BUNDLE"),
    ("no TLS", "S3Endpoint may need http:// in place of https://"),
])
def test_tls_that_no_further_try_can_mend_is_final(
    certificate: tuple[str, str], fault: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def act(connection: socket.socket, _: int) -> None:
        if fault == "no TLS":
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        else:
            context.wrap_socket(connection, server_side=True)

    server = TlsServer(act)
    if fault != "certificate":
        there = certificate[0] if fault == "no TLS" else "/nonexistent/ca"
        monkeypatch.setenv("AWS_CA_BUNDLE", there)
    access = Access(server.endpoint, "us-east-1", "k", "s")
    with pytest.raises(Failure) as failure:
        s3napback.S3Store("bkt", access, s3napback.Retries(20, LOG)).exists()
    assert hint in failure.value.hint
    wait_until(lambda: bool(server.connections), "the server's thread")
    assert server.connections == 1


def test_a_host_name_that_does_not_exist_is_told(
    site: Site, capsys: Capture, tmp_path: Path
) -> None:
    """It is said at once, with the name, and tried again: name servers come back."""
    site.settings["S3Endpoint"] = "https://s3.no-such-host.invalid"
    (tmp_path / "key").write_text("key=k\nsecret=s\n")
    (tmp_path / "key").chmod(0o600)
    site.settings["S3Keyfile"] = str(tmp_path / "key")
    assert site.run() == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "no-such-host" in line]
    assert "the host name s3.no-such-host.invalid is not known" in said[0]
    assert "trying again" in said[0]


# ---- what a service does not know, or refuses ----


@pytest.mark.parametrize("refusal", [
    (501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "MalformedXML"), (400, "Unknown"),
])
def test_where_delete_objects_is_missing_each_is_deleted_alone(
    service: s3napback.S3Store, s3_server: Any, refusal: tuple[int, str]
) -> None:
    def fault(method: str, _: str, query: dict[str, str], __: bytes | None) -> Any:
        return (*refusal, "unknown") if method == "POST" and "delete" in query else None

    s3_server.fail = fault
    send(service, os.urandom(3500))
    send(service, data := os.urandom(2500), old_chunks=s3napback.archive_objects(service, "a"))
    archive = found(service)
    assert archive and downloaded(archive, service, 2) == data
    service.delete([item.key for item in archive.chunks] + ["absent"])
    assert not list(service.iter_objects())
    assert sum(method == "POST" for method, _ in s3_server.requests) == 1


def test_a_key_without_the_right_to_delete_is_told(
    service: s3napback.S3Store, s3_server: Any
) -> None:
    s3_server.fail = lambda method, path, query, body: (
        (403, "AccessDenied", "no") if method == "DELETE" or "delete" in query else None
    )
    with pytest.raises(Failure, match="cannot delete k from bucket bkt: AccessDenied") as failure:
        service.delete(["k"])
    assert "lacks the right s3:DeleteObject" in failure.value.hint


def test_a_refused_upload_says_so_first(s3_site: Site, s3_server: Any, capsys: Capture) -> None:
    """And is not followed by hours of tidying up where that does not work either."""
    def fault(method: str, path: str, query: dict[str, str], _: bytes | None) -> Any:
        if method == "PUT" and path.endswith("02"):
            return 403, "AccessDenied", "no more"
        return (503, "SlowDown", "later") if method == "POST" else None

    s3_server.fail = fault
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    s3_site.settings["RetryHours"] = "1"
    assert s3_site.run() == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if " ERROR " in line]
    assert "AccessDenied, no more" in lines[0] and "lacks the right s3:PutObject" in lines[0]
    assert "Deleting any partial backup" in lines[1]
    assert "Could not delete partial backup" in lines[2]


@pytest.mark.parametrize("safe", ["", "On"])
def test_a_storage_class_that_is_unknown_costs_no_old_archive(
    s3_site: Site, safe: str, capsys: Capture
) -> None:
    s3_site.settings["SafeReplace"] = safe
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 0\nFulls 1\n</Directory>"
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    name = f"{s3_site.data}-0-FULL"
    before = [i.etag for i in s3_site.archives()[name].chunks]
    (s3_site.data / "file").write_bytes(os.urandom(5000))
    s3_site.settings["StorageClass"] = "GLACIAL"
    assert s3_site.run(now=NIGHT + timedelta(days=1)) in (1, 3)
    assert "check StorageClass" in capsys.readouterr().err
    placed = [i.etag for i in s3napback.archive_objects(s3_site.store(), name)
              if not s3napback.is_staged(i.key)]
    assert placed == before


@pytest.mark.parametrize("answer, hint", [
    ((400, "AuthorizationHeaderMalformed", "expecting 'eu-1'"), "set S3Region to the region"),
    ((400, "IllegalLocationConstraintException", ""), "set S3Region"),
    ((403, "AccessDenied", ""), "check Bucket, or make it by hand: the access key lacks the right"),
    ((400, "TooManyBuckets", ""), "set Bucket to another"),
    ((409, "BucketAlreadyExists", ""), "set Bucket to another"),
])
def test_a_bucket_that_cannot_be_made_is_told(
    s3_site: Site, s3_server: Any, answer: tuple[int, str, str], hint: str, capsys: Capture
) -> None:
    s3_server.fail = lambda method, path, query, body: (
        answer if method == "PUT" and path.strip("/") == "bkt" else None
    )
    assert s3_site.run() == 1
    assert hint in capsys.readouterr().err


# ---- what killed runs leave in a folder bucket ----


def test_half_written_files_of_killed_runs_go_with_the_next(site: Site) -> None:
    """This machine's at once, others' when they are old: those may be writing just now."""
    assert site.run() == 0
    folder = site.folder / "buckets" / "bkt"
    code = ("import os, signal, sys, s3napback\n"
            "s3napback.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"store = s3napback.FolderStore({str(folder.parent)!r}, 'bkt', lambda: 1e9)\n"
            "store.put('k', b'x', {})")
    root = str(Path(s3napback.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == -signal.SIGKILL
    left = {path.name for path in folder.glob(".new-*")}
    assert len(left) == 1
    for name, age in (("old", 2 * 86400), ("young", 60)):
        (folder / f".new-{name}").write_bytes(b"x")
        os.utime(folder / f".new-{name}", (time.time() - age,) * 2)
    assert site.run("list") == 0
    assert len(list(folder.glob(".new-*"))) == 3  # a command that reads deletes nothing
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert [path.name for path in folder.glob(".new-*")] == [".new-young"]


def test_what_another_run_is_just_writing_is_left_whatever_its_time(site: Site) -> None:
    """Just before its rename it has the time of the run's clock, which may be long ago."""
    assert site.run() == 0
    folder = site.folder / "buckets" / "bkt"
    node = os.uname().nodename.replace("-", "%2D")
    half = folder / f".new-{node}-{os.getpid()}-0123"
    half.write_bytes(b"x")
    os.utime(half, (1e9, 1e9))
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert half.exists()


@pytest.mark.parametrize("mixed", [False, True])
def test_chunks_whose_etags_say_nothing_are_known_by_their_marks(
    tmp_path: Path, mixed: bool
) -> None:
    """Encryption by KMS where listings and answers differ."""

    class Kms(s3napback.FolderStore):
        def iter_objects(self, prefix: str = "") -> Iterator[s3napback.StoredObject]:
            for one in super().iter_objects(prefix):
                yield dataclasses.replace(one, etag=os.urandom(16).hex())

        def head(self, key: str) -> dict[str, str] | None:
            told = super().head(key)
            return told and {**told, s3napback.ETAG_IS_NOT_MD5: "yes"}

    (tmp_path / "bkt").mkdir()
    bucket = Kms(str(tmp_path), "bkt", lambda: NIGHT.timestamp())
    if not mixed:
        send(bucket, os.urandom(2500), safe=True)
        present = s3napback.archive_objects(bucket, "a")
        assert send(bucket, os.urandom(3500), safe=True, old_chunks=present).old_chunks_removed
    else:
        store: Any = Intruded(bucket, 1, lambda: send(bucket, os.urandom(3500)))
        with pytest.raises(Failure, match="another machine stored a"):
            send(store, os.urandom(3500), parallel=1)
    archive = found(bucket)
    assert archive and archive.complete == (not mixed)
