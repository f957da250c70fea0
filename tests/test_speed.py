"""What makes transfers fast and small: buffers in memory and on disk, slow lines, start-up."""

import fcntl
import gzip
import hashlib
import io
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, downloaded, tmpfs
from moto.server import ThreadedMotoServer

import s3napback
from s3napback import Access, Buffer, Failure, Store, StoredObject

LOG = logging.getLogger("test")
HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "s3napback.py"


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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "buckets").mkdir()
    store = s3napback.open_store("b", Access(f"file://{tmp_path}/buckets"), time.time)
    store.create()
    return store


@pytest.fixture
def spooling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of more than 1,000 bytes go through a file."""
    monkeypatch.setattr(s3napback, "_MAX_IN_MEMORY", 1000)


def send(store: Any, data: bytes, chunk_size: int, folder: Path, parallel: int = 3) -> Any:
    stream = s3napback.FileStream(io.BytesIO(data))
    return s3napback.upload(stream, store, "a", chunk_size=chunk_size, parallel=parallel,
                            folder=str(folder), log=LOG)


def whole(store: Store) -> s3napback.Archive:
    archive = s3napback.resolve_archive("a", s3napback.archive_objects(store, "a"), store.head)
    assert archive and archive.complete
    return archive


# ---- buffers ----


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


def test_a_folder_that_is_not_there(spooling: None, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"cannot keep a chunk on its way in {tmp_path}"):
        Buffer(2000, str(tmp_path / "no"))


def test_a_file_that_cannot_be_read_back(spooling: None, tmp_path: Path) -> None:
    buffer = Buffer(2000, str(tmp_path))
    buffer.fill(io.BytesIO(b"x").readinto)
    buffer._file.close()  # type: ignore[union-attr]
    buffer._file = open(tmp_path / "write-only", "wb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
    with pytest.raises(Failure, match=f"cannot keep a chunk on its way in {tmp_path}"):
        bytes(buffer)
    buffer.close()


# ---- large chunks ----


@pytest.mark.parametrize("size", [0, 1999, 2000, 2001, 19_000, 20_000])
def test_large_chunks_go_through_files(
    size: int, store: Store, spooling: None, tmp_path: Path
) -> None:
    data = os.urandom(size)
    stored = send(store, data, 2000, tmp_path)
    assert (stored.size, stored.chunks) == (size, size // 2000 + 1)
    assert downloaded(whole(store), store, 3) == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["buckets"]


def test_a_disk_for_one_chunk_holds_one_at_a_time(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        data = os.urandom(3_100_000)
        slow = Slow(store, temp)
        slow.free.set()
        assert send(slow, data, 700_000, temp).chunks == 5
        assert 650_000 < slow.most < 1_000_000
        assert downloaded(whole(store), store, 3) == data
    with tmpfs(tmp_path / "temp", "size=8m") as temp:  # and one with room for more holds more
        slow = Slow(store, temp)
        threading.Timer(0.3, slow.free.set).start()
        send(slow, data, 700_000, temp)
        assert slow.most > 2_000_000


def test_a_disk_that_others_fill_meanwhile(
    store: Store, spooling: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There seems to be room; there is none in the middle of a chunk, until another is sent."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(s3napback, "has_room", lambda *_: True)
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        data = os.urandom(3_100_000)
        slow = Slow(store, temp)
        threading.Timer(0.3, slow.free.set).start()
        assert send(slow, data, 700_000, temp).chunks == 5
        assert downloaded(whole(store), store, 3) == data


def test_a_disk_that_is_too_small_for_a_chunk(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    with tmpfs(tmp_path / "temp", "size=100k") as temp:
        with pytest.raises(Failure, match=rf"in {temp}: No space left .*\(300000 bytes.*TempDir"):
            send(store, os.urandom(400_000), 300_000, temp)
        assert not s3napback.archive_objects(store, "a")
        send(store, b"x" * 250_000, 150_000, tmp_path)
        with pytest.raises(Failure, match=rf"in {temp}: No space left .*\(150000 bytes.*TempDir"):
            list(s3napback.download(whole(store), store, 3, folder=str(temp)))


def test_what_is_downloaded_waits_for_room_on_the_disk(
    store: Store, spooling: None, tmp_path: Path
) -> None:
    (tmp_path / "temp").mkdir()
    data = os.urandom(3_100_000)
    send(store, data, 300_000, tmp_path)
    with tmpfs(tmp_path / "temp", "size=1m") as temp:
        most, received = 0, b""
        for piece in s3napback.download(whole(store), store, 8, folder=str(temp)):
            received += piece
            time.sleep(0.02)
            disk = os.statvfs(temp)
            most = max(most, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)
    assert received == data
    assert 300_000 < most < 1_000_000


def test_an_object_that_has_grown_since_the_listing(store: Store) -> None:
    send(store, b"x" * 1500, 1000, Path())
    archive = whole(store)
    store.put("a:0000000000001", b"x" * 2000, {})
    with pytest.raises(Failure, match="is larger than listed: it was replaced"):
        list(s3napback.download(archive, store, 2))


def test_an_object_that_has_grown_on_s3(s3_server: Any) -> None:
    store = s3napback.S3Store(
        "bkt", Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    )
    store.create()
    store.put("k", b"x" * 2000, {})
    with pytest.raises(Failure, match="k is larger than listed"):
        store.fetch("k", Buffer(1999))


# ---- slow lines ----


@pytest.fixture
def slow_service() -> Iterator[str]:
    """The endpoint of a service that takes 5 MB a second, and has the bucket "b"."""
    argv = [sys.executable, str(HERE / "tools" / "sink.py"), "--drop", "--conn-mbps", "40"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            endpoint = process.stdout.readline().strip()
            s3napback.S3Store("b", Access(endpoint, "us-east-1", "k", "s")).create()
            yield endpoint
        finally:
            process.kill()


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


# ---- pipes ----


def test_the_pipes_between_stages_are_wide() -> None:
    stages = [s3napback.Stage(("cat", "/dev/zero")), s3napback.Stage(("cat",))]
    pipeline = s3napback.Pipeline(stages, dict(os.environ))
    try:
        for process in pipeline._processes:
            if process.stdout and not process.stdout.closed:
                assert fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ) == 1 << 20
    finally:
        pipeline.kill()


# ---- the way back ----


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
def test_a_body_that_is_cut_off_may_pass(
    objects: s3napback.S3Store, key: str, said: str
) -> None:
    with pytest.raises(s3napback.TransientFailure, match=said):
        objects.fetch(key, Buffer(3_000_000))
    objects.fetch("plain", Buffer(3_000_000))  # and the next one is a new connection's


@pytest.mark.parametrize("key", ["plain", "chunked"])
def test_a_body_larger_than_its_room(objects: s3napback.S3Store, key: str) -> None:
    with pytest.raises(Failure, match=f"{key} is larger than listed"):
        objects.fetch(key, Buffer(2_999_999))


def test_a_disk_that_takes_a_part_of_the_last_piece(store: Store, tmp_path: Path) -> None:
    """Unbuffered standard output (python -u) says how much a write took, and is not asked twice."""
    send(store, os.urandom(300_000), 400_000, tmp_path)
    (tmp_path / "small").mkdir()
    with tmpfs(tmp_path / "small", "size=100k") as small, open(small / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-u", str(SCRIPT), "js3tream", "-o", "-b", "b:a",
             "--endpoint", f"file://{tmp_path}/buckets"], stdout=out, stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert b"cannot write to standard output: No space left on device" in done.stderr


def test_the_end_that_tar_does_not_need_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    tar = subprocess.run(["tar", "-C", str(tmp_path), "-cf", "-", "file"], check=True,
                         capture_output=True).stdout
    whole = gzip.compress(tar + bytes(20_000_000), 1)  # as with a large blocking factor
    env = dict(os.environ)
    for data in (whole, whole[:-1]):
        (tmp_path / f"out{len(data)}").mkdir()
        blocks = s3napback.decoded(iter([data]), env)
        if data is whole:
            s3napback.run_tar(blocks, str(tmp_path / f"out{len(data)}"), env)
        else:
            with pytest.raises(Failure, match="ended with status 1"):
                s3napback.run_tar(blocks, str(tmp_path / f"out{len(data)}"), env)
        assert (tmp_path / f"out{len(data)}" / "file").read_text() == "one"


# ---- the end ----


def test_what_came_before_a_failure_is_written(store: Store, tmp_path: Path) -> None:
    send(store, b"0123456789" * 25, 100, tmp_path)
    store.delete(["a:0000000000001"])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "js3tream", "-o", "-b", "b:a",
         "--endpoint", f"file://{tmp_path}/buckets"], capture_output=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stdout) == (1, b"0123456789" * 10)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["js3tream", "-h"], ["demo"]])
def test_output_that_goes_nowhere_is_told(words: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, str(SCRIPT), *words], stdout=full,
                              stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr.startswith(b"s3napback: cannot write to standard output: No space left on")
    assert done.stderr.count(b"\n") == 1


def test_output_is_whole_when_the_program_ends(tmp_path: Path) -> None:
    """It ends without Python's own tidying up."""
    done = subprocess.run([sys.executable, str(SCRIPT), "js3tream", "-h"], capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, s3napback.JS3TREAM_USAGE)


# ---- standard input ----


def js3tream(endpoint: str, **options: Any) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, str(SCRIPT), "js3tream", "-i", "-b", "b:a", "--endpoint", endpoint]
    options = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(argv, **options)


def test_who_may_not_store_is_told_before_the_input_ends(store: Store, tmp_path: Path) -> None:
    store.put("a:0000000000000", b"x", {})
    with js3tream(f"file://{tmp_path}/buckets") as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"so far")
        process.stdin.flush()
        assert process.wait(20) == 1
        assert b"b:a exists already (delete it first" in process.stderr.read()
    assert s3napback.archive_objects(store, "a")[0].size == 1


def test_nothing_is_stored_before_the_bucket_was_looked_at(store: Store) -> None:
    order: list[str] = []
    leave = threading.Event()

    def ready() -> None:
        assert leave.wait(20)
        order.append("ready")

    class Told(s3napback.FolderStore):
        def put(self, key: str, data: bytes | Buffer, metadata: Any) -> str:
            order.append("put")
            return super().put(key, data, metadata)

    told = Told(os.path.dirname(store._folder), "b", time.time)  # type: ignore[attr-defined]
    threading.Timer(0.2, leave.set).start()
    s3napback.upload(s3napback.FileStream(io.BytesIO(b"x" * 250)), told, "a", chunk_size=100,
                     parallel=2, ready=ready, log=LOG)
    assert order[0] == "ready" and order.count("put") == 3


def test_an_input_that_has_nothing_yet_has_not_ended(store: Store, tmp_path: Path) -> None:
    """Whoever shares the pipe may have made it non-blocking."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with js3tream(f"file://{tmp_path}/buckets", stdin=reading):
        for _ in range(4):
            os.write(writing, b"x" * 1000)
            time.sleep(0.4)
        os.close(writing)
    os.close(reading)
    assert whole(store).size == 4000


# ---- credentials ----


def test_a_role_of_the_aws_configuration(
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


# ---- requests ----


def test_a_small_archive_costs_a_look_a_put_and_a_look(s3_server: Any, tmp_path: Path) -> None:
    s3napback.S3Store(
        "bkt", Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    ).create()
    s3_server.requests.clear()
    keyfile = str(s3_server.write_keyfile(tmp_path / "key"))
    argv = [sys.executable, str(SCRIPT), "js3tream", "-i", "-b", "bkt:a", "-K", keyfile,
            "--endpoint", s3_server.endpoint]
    subprocess.run(argv, input=b"x", check=True)
    assert s3_server.requests == [
        ("GET", "/bkt"), ("PUT", "/bkt/a:0000000000000"), ("GET", "/bkt")]


class Crowd(s3napback.FolderStore):
    """A bucket with a million objects besides its own, which exist when they are listed."""

    others = 0
    asked = 0

    def list_page(self, prefix: str, after: str = "") -> tuple[list[StoredObject], bool]:
        Crowd.asked += 1
        own, _ = super().list_page(prefix, after)
        start = int(after[7:14]) + 1 if after.startswith("/other-") else 0
        if not "/other-".startswith(prefix) or (own and own[0].key < "/other-"):
            return own, False
        found = [StoredObject(f"/other-{n:07}-0-FULL:0000000000000", 1, "0" * 32, 0.0)
                 for n in range(start, min(start + 1000, self.others))]
        return found, bool(found)

    def head(self, key: str) -> dict[str, str] | None:
        Crowd.asked += 1
        return super().head(key)

    def put(self, key: str, data: bytes | Buffer, metadata: Mapping[str, str]) -> str:
        Crowd.asked += 1
        return super().put(key, data, metadata)

    def delete(self, keys: Sequence[str]) -> None:
        Crowd.asked += 1
        super().delete(keys)

    def exists(self) -> bool:
        Crowd.asked += 1
        return super().exists()


def test_a_run_asks_the_same_of_a_bucket_of_a_million(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "FolderStore", Crowd)
    counts = []
    for day, others in enumerate((10, 10, 1_000_000)):
        monkeypatch.setattr(Crowd, "others", others)
        monkeypatch.setattr(Crowd, "asked", 0)
        assert site.run(now=NIGHT + timedelta(days=day)) == 0
        counts.append(Crowd.asked)
    assert counts[2] == counts[1] <= 12
    listed = sum(1 for _ in s3napback.iter_objects(site.store()))
    assert listed >= 1_000_000  # so the crowd is there for who asks for it
