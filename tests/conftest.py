"""What the tests stand on: the recordings, and real servers and tools, each of them throwaway.

The sections are Tools, S3 (moto behind a layer that is stricter than moto), GnuPG, Databases,
Subversion, and a machine that is backed up. Every server is private to the process that runs the
tests (so each xdist worker has its own) and is started when the first test asks for it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import gc
import glob
import hashlib
import hmac
import io
import json
import logging
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

import boto3
import botocore.session
import hypothesis
import pytest
from botocore.config import Config
from botocore.loaders import create_loader
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

import s3napback
from s3napback import Access

GOLDEN = Path(__file__).parent / "golden"

# A slow machine is not a defect of the code under test.
hypothesis.settings.register_profile("s3napback", deadline=None)
hypothesis.settings.load_profile("s3napback")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no processor waits for them at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_month.py", "test_year.py"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the recordings of the original."""
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """Has botocore's description of S3 read once, not for each client, which takes 0.12 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(create_loader))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_account() -> Iterator[None]:
    """Keeps every test away from the AWS account, and the proxies, of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        yield


# ---------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------

# Debian keeps daemons, and PostgreSQL's own programs, out of the ordinary search path.
TOOL_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/sbin", *glob.glob("/usr/lib/postgresql/*/bin")]
)


def require_tool(name: str) -> str:
    """The path of the program NAME; without it the test is left out."""
    path = shutil.which(name, path=TOOL_PATH)
    if path is None:
        leave_out(f"{name} is not installed")
    return path


def fetched(store: s3napback.Store, key: str) -> tuple[bytes, dict[str, str]]:
    """(data, user metadata) of an object."""
    buffer = s3napback.Buffer(10**7)
    metadata = store.fetch(key, buffer)
    return bytes(buffer), metadata


def downloaded(archive: s3napback.Archive, store: s3napback.Store, parallel: int) -> bytes:
    """An archive's data."""
    return b"".join(map(bytes, s3napback.download(archive, store, parallel)))


def stored(
    store: s3napback.Store, name: str = "a", chunk_size: int | None = None
) -> s3napback.Archive:
    """The archive that the chunks of that name make up."""
    objects = s3napback.archive_objects(store, name)
    archive = s3napback.resolve_archive(name, objects, store.head, chunk_size)
    assert archive
    return archive


def content(store: s3napback.Store, name: str = "a") -> bytes:
    """The data of an archive, which is complete."""
    archive = stored(store, name)
    assert archive.complete, archive.fault
    return downloaded(archive, store, 3)


def send(
    store: s3napback.Store, data: bytes, name: str = "a", size: int = 1000, **options: Any
) -> s3napback.UploadResult:
    """Stores DATA as an archive in chunks of SIZE bytes, in place of what is there. marks: asked
    for what the last chunk is to say, when all others were handed on."""
    stream = options.pop("source", None) or s3napback.FileStream(io.BytesIO(data))
    marks = options.pop("marks", dict)
    options = {"parallel": 3, "log": logging.getLogger("test"),
               "old_chunks": s3napback.archive_objects(store, name), **options}
    with s3napback.Upload(store, name, chunk_size=size, **options) as upload:
        for chunk in upload.chunks(stream):
            upload.put(chunk)
        return upload.commit(marks())


def entry(
    source: str, slot: int, mode: str, made: float, state: str = "", *,
    kind: str | None = None, fault: str = "", **marks: str,
) -> s3napback.CatalogEntry:
    """An archive of one byte in a catalogue. state: "BEFORE:AFTER", "" of one without marks."""
    if state:
        marks["state"] = state
    name = f"{source}-{slot}-{mode}"
    chunk = s3napback.StoredObject(s3napback.chunk_key(name, 0), 1, "", made)
    archive = s3napback.Archive.of(name, (chunk,), fault, marks)
    return s3napback.CatalogEntry(archive, kind, source, slot, mode)


@pytest.fixture
def store(tmp_path: Path) -> s3napback.Store:
    """A bucket in a folder."""
    (tmp_path / "buckets").mkdir()
    store = s3napback.open_store("b", Access(f"file://{tmp_path}/buckets"), time.time)
    store.create()
    return store


class Memory:
    """A store that remembers in which order it was asked to do what."""

    bucket = "m"

    def __init__(self) -> None:
        self.retries = s3napback.Retries()
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.history: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], None] = lambda verb, key: None

    def put(self, key: str, data: bytes | s3napback.Buffer, metadata: Mapping[str, str]) -> str:
        self.fail("put", key)
        self.objects[key] = bytes(data), dict(metadata)
        self.history.append(("put", key))
        return hashlib.md5(bytes(data)).hexdigest()

    def fetch(self, key: str, into: s3napback.Buffer) -> dict[str, str]:
        data, metadata = self.objects[key]
        into.fill(io.BytesIO(data).readinto)
        return metadata

    def peek(self, key: str, count: int) -> bytes:
        return self.objects[key][0][:count]

    def head(self, key: str) -> dict[str, str] | None:
        return self.objects[key][1]

    def list_page(
        self, prefix: str, after: str = ""
    ) -> tuple[list[s3napback.StoredObject], bool]:
        return [
            s3napback.StoredObject(key, len(data), hashlib.md5(data).hexdigest(), 0.0)
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

    def create(self) -> None: ...

    def remove(self) -> None: ...

    def prepare(self, key: str) -> None: ...

    def copy(self, source: str, target: str) -> None:
        self.put(target, *self.objects[source])


def files(tar: bytes) -> list[str]:
    done = subprocess.run(["tar", "tz"], input=tar, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def leave_out(reason: str) -> NoReturn:
    """Skips the test, or fails it where S3NAPBACK_TEST_ALL=1 says that nothing may be left out."""
    if os.environ.get("S3NAPBACK_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """A small or otherwise limited file system at a folder, which is there already."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        leave_out("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def run(argv: list[str], *, env: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """What ARGV writes to standard output; a failure shows what it wrote to standard error.

    It runs in `/`, since another user may not be allowed into the current folder.
    """
    done = subprocess.run(
        argv,
        input=stdin,
        env={**os.environ, **(env or {})},
        cwd="/",
        text=True,
        errors="surrogateescape",
        capture_output=True,
    )
    assert done.returncode == 0, f"{argv} exited with {done.returncode}: {done.stderr}"
    return done.stdout


STREAMS = "stdin", "stdout", "stderr"


def program(
    *words: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs s3napback as `subprocess.run` would, but in this process: its start takes half a second.

    It reads, writes and looks at the environment as in one of its own.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(time.tzset)  # once the environment is the old one again
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        time.tzset()
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(stdin)
        streams[0].seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, (name, mode) in enumerate(zip(STREAMS, "rww", strict=True)):
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(streams[descriptor].fileno(), descriptor)
            file = stack.enter_context(open(descriptor, mode, closefd=False))
            patch.setattr(sys, name, file)
        status = s3napback.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in streams[1:]:
            stream.seek(0)
        return subprocess.CompletedProcess(words, status, streams[1].read(), streams[2].read())


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Returns when READY says so; a WHAT that takes longer than SECONDS is an error."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} not ready after {seconds} s"
        time.sleep(0.05)


def service_user(name: str) -> str:
    """Whom a database server runs as: NAME for root (who is refused), else the present user."""
    return name if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Callable[[str], Path]]:
    """A maker of private folders owned by USER, below /tmp whatever TMPDIR says: the path of a
    socket has at most 107 bytes (unix(7)), and pytest's own folders can be longer."""
    made: list[Path] = []

    def make(user: str = "") -> Path:
        folder = Path(tempfile.mkdtemp(prefix="s3nb-", dir="/tmp"))
        made.append(folder)
        if user and os.geteuid() == 0:
            shutil.chown(folder, user)
        return folder

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)  # an agent may be removing its socket just now


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------

KEY_MAX = 1024  # bytes of a key's UTF-8: S3 User Guide, "Naming Amazon S3 objects"
DELETE_MAX = 1000  # keys of one DeleteObjects: S3 API Reference
FOREIGN_BUCKET = "denied-bucket"


class Refusal(Exception):
    """An S3 error answer: status, code, message."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclasses.dataclass
class Request:
    """One request as it came over the wire."""

    method: str
    target: str  # the path, percent-encoded as sent: what was signed
    query: str  # likewise
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(self.target, errors="surrogateescape")

    @property
    def bucket(self) -> str:
        return self.path.lstrip("/").partition("/")[0]

    @property
    def key(self) -> str:
        return self.path[1:].partition("/")[2]

    @property
    def parameters(self) -> dict[str, str]:
        return dict(parse_qsl(self.query, keep_blank_values=True))


# (method, path, query, body or None) -> (status, code, message), or None: nothing happens.
Fault = Callable[[str, str, dict[str, str], bytes | None], tuple[int, str, str] | None]


def hmac_sha256(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), "sha256").digest()


def signature(request: Request, secret: str, scope: str, signed_headers: str) -> str:
    """What the request's signature has to be: Signature Version 4, "Create a signed request" of
    the IAM User Guide. S3 signs the path as it was sent, without encoding it again."""
    query = sorted((part + "=").split("=")[:2] for part in request.query.split("&") if part)
    # A server sees the names of headers without the difference between - and _.
    values = {n: request.headers.get(n.replace("_", "-"), "") for n in signed_headers.split(";")}
    canonical = [
        request.method,
        request.target,
        "&".join("=".join(pair) for pair in query),
        *(f"{name}:{' '.join(value.split())}" for name, value in values.items()),
        "",
        signed_headers,
        request.headers.get("x-amz-content-sha256", ""),
    ]
    digest = hashlib.sha256("\n".join(canonical).encode("latin-1")).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac_sha256(key, part)
    moment = request.headers.get("x-amz-date", "")
    return hmac_sha256(key, "\n".join(["AWS4-HMAC-SHA256", moment, scope, digest])).hex()


def check_identity(request: Request, key: str, secret: str) -> None:
    """Refuses whoever is not KEY, or does not know SECRET, or changed the request on its way."""
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\S+), ?SignedHeaders=(\S+), ?Signature=(\w+)",
        request.headers.get("authorization", ""),
    )
    if not match:
        raise Refusal(403, "AccessDenied", "Anonymous access is forbidden for this operation")
    if match[1] != key:
        raise Refusal(403, "InvalidAccessKeyId", "The AWS Access Key Id does not exist")
    if not hmac.compare_digest(signature(request, secret, match[2], match[3]), match[4]):
        raise Refusal(403, "SignatureDoesNotMatch", "The request signature does not match")
    promised = request.headers.get("x-amz-content-sha256", "")
    if promised not in ("UNSIGNED-PAYLOAD", hashlib.sha256(request.body).hexdigest()):
        raise Refusal(400, "XAmzContentSHA256Mismatch", "The body is not the one that was signed")


def check_transfer(headers: Mapping[str, str]) -> None:
    """Refuses uploads in pieces with trailers, as several S3-compatible services do."""
    if (
        "chunked" in headers.get("transfer-encoding", "")
        or "aws-chunked" in headers.get("content-encoding", "")
        or headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
        or "x-amz-trailer" in headers
    ):
        raise Refusal(501, "NotImplemented", "Chunked and trailing checksums are not implemented")


def check_content(request: Request) -> None:
    """Refuses what S3 would, or could, and moto does not: no or a wrong Content-MD5, keys that
    are too long, deletions that are too many."""
    parameters = request.parameters
    is_upload = bool(
        request.method == "PUT" and request.key and "x-amz-copy-source" not in request.headers
    )
    is_deletion = request.method == "POST" and "delete" in parameters
    if len(request.key.encode("utf-8", "surrogateescape")) > KEY_MAX:
        raise Refusal(400, "KeyTooLongError", "Your key is too long")
    if is_deletion and request.body.count(b"<Key>") > DELETE_MAX:
        raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed")
    if not (is_upload or is_deletion):
        return
    promised = request.headers.get("content-md5")
    if promised is None:
        raise Refusal(400, "InvalidRequest", "Missing required header: Content-MD5")
    if promised != content_md5(request.body):
        raise Refusal(400, "BadDigest", "The Content-MD5 does not match what was received")


def content_md5(body: bytes) -> str:
    """The value of the header Content-MD5 (RFC 1864)."""
    return base64.b64encode(hashlib.md5(body).digest()).decode()


class S3Server:
    """moto's S3 with real signatures and real checks: a WSGI layer around moto's application,
    and what tests want to know of it and to do to it.

    requests: (method, path) of everything that came in, the path decoded, without its query;
    headers: those of each, their names in lower case.
    fail: a `Fault`, asked before anything else happens; it may also raise ConnectionAbortedError,
        which closes the connection without an answer.
    latency: seconds before each answer.

    Services have their own ways, which are off until they are set:
    capitals: the names of headers come back as `X-Amz-Meta-Like-This`;
    forgets_metadata: user metadata is not kept;
    strips_slash: `/` at the start of a key is dropped;
    lag: listings that a new key is not shown in.
    """

    def __init__(self) -> None:
        self.key, self.secret = "AKIATESTTESTTESTTEST", "test/secret+with=signs"
        self.requests: list[tuple[str, str]] = []
        self.headers: list[Mapping[str, str]] = []
        self.fail: Fault | None = None
        self.latency = 0.0
        self._be_ordinary()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        server = self._moto._server
        assert server is not None
        self._app, server.app = server.app, self._answer
        self.endpoint = "http://{}:{}".format(*self._moto.get_host_and_port())

    def stop(self) -> None:
        self._moto.stop()

    def reset(self) -> None:
        """Forgets buckets, requests, faults and latency."""
        self.fail, self.latency = None, 0.0
        self._be_ordinary()
        self.requests.clear()
        self.headers.clear()
        self._backend.reset()

    def _be_ordinary(self) -> None:
        self.capitals = self.forgets_metadata = self.strips_slash = False
        self.lag = 0
        self._unlisted: dict[str, int] = {}  # keys, and in how many listings they are not shown

    def client(
        self, *, key: str = "", secret: str = "", add_md5: bool = True, **config: Any
    ) -> Any:
        """A boto3 client of this server. It sends Content-MD5 with everything, unless ADD_MD5 is
        false; CONFIG goes to botocore's Config."""
        defaults: dict[str, Any] = {
            "s3": {"addressing_style": "path"},
            "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key or self.key,
            aws_secret_access_key=secret or self.secret,
            config=Config(**{**defaults, **config}),
        )
        if add_md5:
            client.meta.events.register("before-call.s3", _add_md5)
        return client

    def write_keyfile(self, path: Path) -> Path:
        """Writes an S3Keyfile that fits this server; private, as it should be."""
        path.write_text(f"key={self.key}\nsecret={self.secret}\n")
        path.chmod(0o600)
        return path

    def load(self, folder: Path) -> None:
        """Puts the buckets recorded in FOLDER (its index.json, its objects/) in place, with the
        dates that they had."""
        client = self.client()
        for bucket, recorded in json.loads((folder / "index.json").read_text())["buckets"].items():
            client.create_bucket(Bucket=bucket)
            for key, entry in recorded["objects"].items():
                client.put_object(
                    Bucket=bucket,
                    Key=key,
                    Body=(folder / "objects" / bucket / entry["file"]).read_bytes(),
                    ContentType=entry["content_type"],
                    Metadata=entry["metadata"],
                    StorageClass=entry["storage_class"],
                )
                made = datetime.fromisoformat(entry["last_modified"].replace("Z", "+00:00"))
                self.set_modified(bucket, key, made)

    def fill(self, bucket: str, keys: Iterable[str]) -> None:
        """Puts empty objects into BUCKET, at once."""
        for key in keys:
            self._backend.put_object(bucket, key, b"")

    def stored(self, bucket: str, key: str) -> Any:
        """moto's own record of an object; its `value` and `metadata` may be changed."""
        return self._backend.buckets[bucket].keys[key]

    def set_modified(self, bucket: str, key: str, moment: datetime) -> None:
        """Gives an object the date MOMENT (with its zone), in HEAD and in listings."""
        assert moment.tzinfo, "a moment without a time zone"
        # moto keeps naive UTC.
        self.stored(bucket, key).last_modified = moment.astimezone(timezone.utc).replace(
            tzinfo=None
        )

    def backdate(self, bucket: str, by: timedelta, prefix: str = "") -> None:
        """Makes all objects of BUCKET whose keys begin with PREFIX older by BY."""
        for key, entry in self._backend.buckets[bucket].keys.items():
            if key.startswith(prefix):
                entry.last_modified -= by

    @property
    def _backend(self) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The WSGI application: checks of ours first, then moto."""
        request = _request_head(environ)
        self.requests.append((request.method, request.path))
        self.headers.append(request.headers)
        time.sleep(self.latency)
        try:
            check_transfer(request.headers)
            request.body = _read_body(environ)
            if self.fail:
                fault = self.fail(
                    request.method, request.path, request.parameters, request.body or None
                )
                if fault:
                    raise Refusal(*fault)
            check_identity(request, self.key, self.secret)
            if request.bucket == FOREIGN_BUCKET:
                raise Refusal(403, "AccessDenied", "Access Denied")
            check_content(request)
        except Refusal as refusal:
            text = _error_document(refusal) if request.method != "HEAD" else b""
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            start_response(f"{refusal.status} {refusal.code}", headers)
            return [text]
        except ConnectionAbortedError:
            # Else the server waits for the next request, and the client for an answer.
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise
        environ["wsgi.input"] = io.BytesIO(request.body)
        return self._answer_in_its_way(request, environ, start_response)

    def _answer_in_its_way(
        self, request: Request, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        """moto's answer, as a service with the ways that are set would give it."""
        if self.forgets_metadata:
            for name in [n for n in environ if n.startswith("HTTP_X_AMZ_META_")]:
                del environ[name]
        if self.strips_slash:
            for name in ("RAW_URI", "REQUEST_URI", "PATH_INFO"):
                environ[name] = re.sub(r"^(/[^/?]+)(?:/|%2F)+(?=[^/?])", r"\1/", environ[name])
        if self.capitals:
            ordinary = start_response

            def start_response(status: str, headers: Any, *more: Any) -> Any:
                return ordinary(status, [(name.title(), value) for name, value in headers], *more)

        if request.method == "PUT" and self.lag:
            self._unlisted.setdefault(request.key, self.lag)
        if request.method != "GET" or request.key or not self._unlisted:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        return self._list_late(environ, start_response)

    def _list_late(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        started: list[Any] = []
        text = b"".join(self._app(environ, lambda *given: started.append(given)))

        def shown(match: re.Match[bytes]) -> bytes:
            name = re.search(b"<Key>(.*?)</Key>", match[0])
            assert name
            key = unquote(name[1].decode())
            self._unlisted[key] = self._unlisted.get(key, 0) - 1
            return match[0] if self._unlisted[key] < 0 else b""

        text = re.sub(b"<Contents>.*?</Contents>", shown, text, flags=re.S)
        status, headers, *more = started[0]
        headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
        start_response(status, [*headers, ("Content-Length", str(len(text)))], *more)
        return [text]


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    body = params["body"]
    if hasattr(body, "read"):
        body = params["body"] = body.read()
    params["headers"].setdefault("Content-MD5", content_md5(body))


def _request_head(environ: Mapping[str, Any]) -> Request:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH")
    }
    # RAW_URI is the path as sent; PATH_INFO is decoded, and cannot be encoded back.
    target, _, query = environ["RAW_URI"].partition("?")
    return Request(environ["REQUEST_METHOD"], target, query, headers)


def _read_body(environ: Mapping[str, Any]) -> bytes:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body: bytes = environ["wsgi.input"].read(length)
    if len(body) < length:
        raise ConnectionAbortedError("the client left in the middle of its upload")
    return body


def _error_document(refusal: Refusal) -> bytes:
    code, message = escape(refusal.code), escape(refusal.message)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    ).encode()


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3Server]:
    """The S3 server itself, for fixtures that fill it once for many tests."""
    server = S3Server()
    server.client().list_buckets()  # has moto loaded
    gc.freeze()  # the program collects garbage before each retry: none of moto, which is large
    yield server
    server.stop()


@pytest.fixture
def s3_server(s3_session: S3Server) -> S3Server:
    """The S3 server, empty and free of faults."""
    s3_session.reset()
    return s3_session


# ---------------------------------------------------------------------------------------------
# GnuPG
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class GpgHome:
    """A throwaway GNUPGHOME with a secret key without passphrase for `recipient`."""

    home: Path
    recipient: str = "backup@example.com"

    @property
    def env(self) -> dict[str, str]:
        return {"GNUPGHOME": str(self.home)}

    def run(self, *argv: str, stdin: str = "") -> str:
        """What `gpg --batch ARGV…` prints, working in this home."""
        return run([require_tool("gpg"), "--batch", "-q", *argv], env=self.env, stdin=stdin)

    def import_golden(self) -> None:
        """Adds the secret key of the recorded archives, trusted."""
        self.run("--import", str(GOLDEN / "perl-archives" / "gpg-secret-key.asc"))
        listing = self.run("--list-secret-keys", "--with-colons").splitlines()
        prints = [line.split(":")[9] for line in listing if line.startswith("fpr:")]
        self.run("--import-ownertrust", stdin="".join(f"{p}:6:\n" for p in prints))


@pytest.fixture(scope="session")
def gpg_home(short_folder: Callable[[str], Path]) -> Iterator[GpgHome]:
    """Where gpg finds the key of `Backup <backup@example.com>`, ultimately trusted."""
    gpgconf = require_tool("gpgconf")
    gpg = GpgHome(short_folder(""))
    # "future-default" is an elliptic curve: made at once, where RSA takes seconds.
    user_id = f"Backup <{gpg.recipient}>"
    gpg.run("--passphrase", "", "--quick-generate-key", user_id, "future-default", "default", "0")
    yield gpg
    run([gpgconf, "--homedir", str(gpg.home), "--kill", "all"])


# ---------------------------------------------------------------------------------------------
# Databases
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MariaDb:
    """A private MariaDB, reached by its socket only; the present user may do all of it, without
    a password."""

    socket: Path

    def run(self, sql: str) -> str:
        """The rows that SQL yields: values between tabs, a row a line."""
        client = [require_tool("mariadb"), "--no-defaults", f"--socket={self.socket}"]
        return run([*client, "--user=root", "--batch", "--skip-column-names"], stdin=sql)


@pytest.fixture(scope="session")
def mariadb(short_folder: Callable[[str], Path]) -> Iterator[MariaDb]:
    """A real MariaDB server."""
    user = service_user("mysql")
    folder = short_folder(user)
    folder.chmod(0o755)  # clients of other users reach the socket
    common = ["--no-defaults", f"--user={user}", f"--datadir={folder}/data"]
    install = [require_tool("mariadb-install-db"), *common, "--skip-test-db"]
    run([*install, "--auth-root-authentication-method=normal"])
    socket_path = folder / "my.sock"
    daemon = subprocess.Popen(
        [
            require_tool("mariadbd"),
            *common,
            f"--socket={socket_path}",
            f"--pid-file={folder}/pid",
            f"--log-error={folder}/log",
            "--skip-networking",
            "--innodb-buffer-pool-size=16M",
            "--innodb-flush-log-at-trx-commit=0",
        ],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: socket_path.exists() or daemon.poll() is not None, "mariadbd")
        assert daemon.poll() is None, (folder / "log").read_text()
        server = MariaDb(socket_path)
        if os.geteuid() != 0:  # the name that clients take by default
            server.run(f"CREATE USER `{user}`@localhost; GRANT ALL ON *.* TO `{user}`@localhost")
        yield server
    finally:
        daemon.kill()  # its data are thrown away: nothing to shut down in good order
        daemon.wait()


@dataclasses.dataclass
class Postgres:
    """A private PostgreSQL, reached by its socket only, which trusts everybody."""

    socket_dir: Path
    user: str

    @property
    def env(self) -> dict[str, str]:
        return {"PGHOST": str(self.socket_dir), "PGUSER": self.user}

    def run(self, db: str, sql: str) -> str:
        """The rows that SQL yields in the database DB: values between `|`, a row a line."""
        psql = [require_tool("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        return run([*psql, "-d", db], env=self.env, stdin=sql)


@pytest.fixture(scope="session")
def postgres(short_folder: Callable[[str], Path]) -> Iterator[Postgres]:
    """A real PostgreSQL server; its first database is `postgres`."""
    user = service_user("postgres")
    folder = short_folder(user)
    folder.chmod(0o755)  # clients of other users reach the socket
    prefix = [require_tool("runuser"), "-u", user, "--"] if os.geteuid() == 0 else []
    initdb = [require_tool("initdb"), "--no-sync", "-E", "UTF8", "--locale=C", "-A", "trust"]
    run([*prefix, *initdb, "-U", "postgres", "-D", f"{folder}/data"])
    pg_ctl = [*prefix, require_tool("pg_ctl"), "-D", f"{folder}/data", "-s", "-w"]
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run([*pg_ctl, "-l", f"{folder}/log", "-o", options, "start"])
    yield Postgres(folder, "postgres")
    run([*pg_ctl, "-m", "immediate", "stop"])


# ---------------------------------------------------------------------------------------------
# Subversion
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def svn_repo_factory() -> Callable[[Path, int], Path]:
    """A maker of repositories: `make(path, revisions)` creates the repository PATH where there is
    none, and commits so many revisions more; revision N adds the file `fileN` with `revision N`
    in it. It returns PATH."""

    def make(path: Path, revisions: int = 1) -> Path:
        if not (path / "format").exists():
            run([require_tool("svnadmin"), "create", str(path)])
        first = int(run([require_tool("svnlook"), "youngest", str(path)])) + 1
        svnmucc = [require_tool("svnmucc"), "--non-interactive", "-U", path.as_uri()]
        for n in range(first, first + revisions):
            put = ["-m", f"commit {n}", "--", "put", "-", f"file{n}"]
            run([*svnmucc, *put], stdin=f"revision {n}\n")
        return path

    return make


# ---------------------------------------------------------------------------------------------
# A machine that is backed up
# ---------------------------------------------------------------------------------------------

Capture = pytest.CaptureFixture[str]
ESC = "\x1b]0;owned\x07"  # what a name must not send to a terminal
NOWHERE = Access("http://127.0.0.1:1", "us-east-1", "key", "secret")
NIGHT = datetime(2026, 11, 23, 3, 0)  # yday 326: with Diffs 6 a FULL is due on the 21st


class Site:
    """A machine with a config, a DiffDir, a TempDir and a bucket in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "my.conf"
        self.data = folder / "data"
        for name in ("diffs", "temp", "buckets", "data"):
            (folder / name).mkdir()
        (self.data / "file").write_text("one")
        self.settings = {
            "DiffDir": f"{folder}/diffs", "TempDir": f"{folder}/temp", "Bucket": "bkt",
            "ChunkSize": "1000", "S3Endpoint": f"file://{folder}/buckets", "RetryHours": "0",
        }
        self.jobs = f"Directory {self.data}"

    def write(self) -> Path:
        lines = [f"{name} {value}" for name, value in self.settings.items() if value]
        self.conf.write_text("\n".join([*lines, self.jobs, ""]))
        return self.conf

    def run(self, *words: str, now: datetime = NIGHT) -> int:
        return s3napback.main([*words, "-c", str(self.write())], now=now)

    def store(self) -> s3napback.Store:
        endpoint = self.settings["S3Endpoint"]
        key = secret = None
        if self.settings.get("S3Keyfile"):
            key, secret = s3napback.read_key_file(self.settings["S3Keyfile"])
        return s3napback.open_store("bkt", Access(endpoint, "us-east-1", key, secret), time.time)

    def archives(self) -> dict[str, s3napback.Archive]:
        store = self.store()
        if not store.exists():
            return {}
        names = {s3napback.parse_chunk_key(i.key)[0] for i in s3napback.iter_objects(store)}  # type: ignore[index]
        found = {}
        for name in names:
            objects = s3napback.archive_objects(store, name)
            archive = s3napback.resolve_archive(name, objects, store.head)
            assert archive
            found[name] = archive
        return found

    def content(self, name: str) -> bytes:
        archive = self.archives()[name]
        assert archive.complete, archive.fault
        return downloaded(archive, self.store(), 2)

    def diff_files(self) -> list[Path]:
        return [p for p in (self.folder / "diffs").iterdir() if not p.name.startswith(".")]

    def state(self) -> dict[str, bytes]:
        """Everything that a run may have changed."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for top in ("diffs", "temp", "buckets")
            for path in sorted((self.folder / top).rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    # The stock logconfig writes to /var/log; here the screen is enough.
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    return Site(tmp_path)


def stage(site: Site, name: str) -> s3napback.Archive:
    """Puts an archive back to where it waits before it takes its place."""
    store = site.store()
    archive = site.archives()[name]
    for number, item in enumerate(archive.chunks):
        store.copy(item.key, s3napback.staged_key(name, number))
    return archive


def stage_only(site: Site) -> str:
    """Leaves the site's one archive only where it waits; its name."""
    ((name, _),) = site.archives().items()
    archive = stage(site, name)
    site.store().delete([item.key for item in archive.chunks])
    return name


def nights(site: Site, count: int) -> datetime:
    """A FULL and DIFFs of the nights before; the night after them."""
    start = datetime(2026, 11, 20, 3, 0, tzinfo=timezone.utc)  # slot 15: with -f any mode will do
    site.settings["Phase"] = ""
    for n in range(count):
        (site.data / f"night{n}").write_text(str(n))
        assert site.run(now=start + timedelta(days=n)) == 0
    return start + timedelta(days=count)


def newest(site: Site) -> s3napback.Archive:
    ours = [archive for archive in site.archives().values() if archive.metadata]
    return max(ours, key=lambda archive: archive.modified)


NOBODY = 65534


def run_as_nobody(
    site: Site, *words: str, now: datetime = NIGHT, locale: str = "C.UTF-8"
) -> subprocess.CompletedProcess[str]:
    """A run of a site by an ordinary user, to whom all but what a test takes from him belongs."""
    code = "import s3napback, sys; sys.exit(s3napback.main(sys.argv[2:], now=float(sys.argv[1])))"
    done = subprocess.run(
        [*_as_nobody(), "-c", code, str(now.timestamp()), *words, "-c", str(site.write())],
        capture_output=True, text=True, errors="replace", cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": "/", "LC_ALL": locale, "PYTHONUTF8": "1",
             "PYTHONPATH": str(site.folder)},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def _as_nobody() -> list[str]:
    who = f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"
    return [require_tool("setpriv"), *who, sys.executable]


@pytest.fixture
def nobodys(site: Site, short_folder: Callable[[str], Path]) -> Site:
    """A site of an ordinary user, outside pytest's folders, which are root's alone."""
    if os.geteuid():
        leave_out("to be another user needs root")
    trial = [*_as_nobody(), "-c", "import boto3"]
    if subprocess.run(trial, cwd="/", capture_output=True).returncode:
        leave_out("this Python is not for every user")
    folder = short_folder("")
    folder.chmod(0o755)
    shutil.copy(s3napback.__file__, folder)
    other = Site(folder)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    return other


@pytest.fixture
def s3_site(site: Site, s3_server: Any, tmp_path: Path) -> Site:
    site.settings["S3Endpoint"] = s3_server.endpoint
    site.settings["S3Keyfile"] = str(s3_server.write_keyfile(tmp_path / "key.txt"))
    return site


def fake_tool(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A tool that fails as the script says, found before the real one."""
    folder = site.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\nREAL={shutil.which(name)}\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def bad_compressor(folder: Path, script: str) -> str:
    """A Compressor that passes the trial at the start of a run, and then does what SCRIPT says
    with all but the first bytes."""
    path = folder / "bad-compressor"
    start = 'IFS= read -rn 9 start; [ "$start" = s3napback ] && { printf %s "$start"; exec cat; }'
    path.write_text(f"#!/bin/bash\n{start}\n{script}\n")
    path.chmod(0o755)
    return str(path)
