"""S3 for the tests: moto behind a layer of ours that is stricter than moto, and that can fail."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import io
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

import boto3
from botocore.config import Config
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import FakeDeleteMarker, FakeKey, s3_backends
from moto.server import ThreadedMotoServer

KEY_MAX = 1024  # bytes of a key's UTF-8: S3 User Guide, "Naming Amazon S3 objects"
DELETE_MAX = 1000  # keys of one DeleteObjects: S3 API Reference
FOREIGN_BUCKET = "denied-bucket"

# Where nothing can be read at once: S3 User Guide, "Working with archived objects".
FROZEN = ("GLACIER", "DEEP_ARCHIVE", "ARCHIVE_ACCESS", "DEEP_ARCHIVE_ACCESS")


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
    lag: listings that a new key is not shown in;
    knows_no_versions: a listing of versions is answered by one of objects;
    encryption: what a policy of the bucket wants every upload and copy to ask for.

    As at Amazon's, ETags of what is encrypted by KMS are no MD5.
    page: entries of a listing of versions, at most.
    tiers: keys of the class INTELLIGENT_TIERING that are in an archive tier, and in which.
    asked: (key, version id) of what was asked to be thawed, and how: retrieval option, days;
    `thawed` has all of it there.
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
        self.encryption: Mapping[str, str] = {}
        self.knows_no_versions = False
        self.lag, self.page = 0, 1000
        self.tiers: dict[str, str] = {}
        self.asked: dict[tuple[str, str], tuple[str, int | None]] = {}
        self._thawed: set[tuple[str, str]] = set()
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
        """Makes all objects of BUCKET whose keys begin with PREFIX older by BY, in all versions."""
        keys = self._backend.buckets[bucket].keys
        for key in keys:
            if key.startswith(prefix):
                for entry in keys.getlist(key):
                    entry.last_modified -= by

    def set_versions(
        self, bucket: str, key: str, versions: Iterable[tuple[float, bytes | None, str]]
    ) -> None:
        """Gives a key its history, the oldest version first: epoch seconds, data (None: a delete
        marker), id ("null": of a time without versions)."""
        entries: list[Any] = []
        for at, data, version in versions:
            entry: Any = FakeKey(key, data or b"", DEFAULT_ACCOUNT_ID, "us-east-1",
                                 is_versioned=True, version_id=version)
            entry.bucket_name = bucket
            if data is None:
                entry = FakeDeleteMarker(entry)
                entry._version_id = version
            entry.last_modified = datetime.fromtimestamp(at, timezone.utc).replace(tzinfo=None)
            entries.append(entry)
        self._backend.buckets[bucket].keys.setlist(key, entries)

    def thawed(self) -> None:
        """Has all that was asked for there."""
        for key, version in self.asked:
            self._thawed.add((key, version))
            self.tiers.pop(key, None)
            for bucket in self._backend.buckets.values():
                for entry in bucket.keys.getlist(key) or ():
                    if str(entry.version_id) == version and entry.storage_class in FROZEN:
                        entry.set_expiry(datetime(2099, 1, 1))

    def _entry(self, request: Request) -> Any:
        """moto's record of the object, or version of it, that a request is for; None for none."""
        bucket = self._backend.buckets.get(request.bucket)
        entries = (bucket.keys.getlist(request.key) if bucket else None) or [None]
        version = request.parameters.get("versionId")
        if version is None:
            return entries[-1]
        return next((one for one in entries if str(one.version_id) == version), None)

    def _frozen_in(self, request: Request) -> str:
        """The class or tier in which the object of a request waits, "" where it can be read."""
        entry = self._entry(request)
        place = self.tiers.get(request.key) or getattr(entry, "storage_class", "") or ""
        if place not in FROZEN or (request.key, str(entry.version_id)) in self._thawed:
            return ""
        return place

    def _check_frozen(self, request: Request) -> None:
        if request.method == "GET" and request.key and self._frozen_in(request):
            raise Refusal(403, "InvalidObjectState",
                          "The operation is not valid for the object's storage class")

    def _told_of(self, request: Request) -> list[tuple[str, str]]:
        """What a HEAD says of a frozen object, and moto does not."""
        place, entry = self._frozen_in(request), self._entry(request)
        told = [("x-amz-archive-status", place)] if place and request.key in self.tiers else []
        if place and (request.key, str(entry.version_id)) in self.asked:
            told.append(("x-amz-restore", 'ongoing-request="true"'))
        return told

    def _thaw(self, request: Request) -> int:
        """RestoreObject (S3 API Reference): the status of its answer."""
        entry = self._entry(request)
        if entry is None:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
        identity = request.key, str(entry.version_id)
        tier = re.search(b"<Tier>(.*)</Tier>", request.body)
        days = re.search(b"<Days>(.*)</Days>", request.body)
        place = self._frozen_in(request)
        if identity in self._thawed and days:
            return 200
        if not place:
            raise Refusal(403, "InvalidObjectState",
                          "Restore is not allowed for the object's current storage class")
        if identity in self.asked:
            raise Refusal(409, "RestoreAlreadyInProgress",
                          "Object restore is already in progress")
        if not tier or bool(days) == (request.key in self.tiers):
            raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed")
        if tier[1] == b"Expedited" and place.startswith("DEEP"):
            raise Refusal(400, "InvalidArgument",
                          "Retrieval option is not supported by this storage class")
        self.asked[identity] = tier[1].decode(), int(days[1]) if days else None
        return 202

    def _list_versions(self, request: Request) -> bytes:
        """ListObjectVersions as S3 answers it, where moto does otherwise: the newest first in the
        order in which they were stored, keys by their bytes, whole seconds, keys encoded, and of a
        key-marker alone what is behind that key."""
        bucket = self._backend.buckets.get(request.bucket)
        if bucket is None:
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist")
        asked, found, start = request.parameters, [], 0
        marker = asked.get("key-marker", "")
        for key in sorted(bucket.keys, key=str.encode):
            if not key.startswith(asked.get("prefix", "")):
                continue
            for number, entry in enumerate(reversed(bucket.keys.getlist(key))):
                version = str(entry.version_id or "null")
                found.append((key, version, entry, number == 0))
                passed = (key, version) == (marker, asked.get("version-id-marker"))
                behind = "version-id-marker" not in asked and key.encode() <= marker.encode()
                if marker and (passed or behind):
                    start = len(found)
        page = found[start : start + min(self.page, int(asked.get("max-keys", 1000)))]
        is_truncated = start + len(page) < len(found)

        def named(key: str) -> str:
            return escape(quote(key) if asked.get("encoding-type") == "url" else key)

        lines = [f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>"]
        if "encoding-type" in asked:
            lines.append(f"<EncodingType>{asked['encoding-type']}</EncodingType>")
        if is_truncated:
            lines.append(f"<NextKeyMarker>{named(page[-1][0])}</NextKeyMarker>"
                         f"<NextVersionIdMarker>{page[-1][1]}</NextVersionIdMarker>")
        for key, version, entry, is_latest in page:
            is_marker = isinstance(entry, FakeDeleteMarker)
            name = "DeleteMarker" if is_marker else "Version"
            about = "" if is_marker else (
                f"<ETag>{escape(entry.etag)}</ETag><Size>{entry.size}</Size>"
                f"<StorageClass>{entry.storage_class}</StorageClass>")
            lines.append(
                f"<{name}><Key>{named(key)}</Key><VersionId>{version}</VersionId>"
                f"<IsLatest>{str(is_latest).lower()}</IsLatest>"
                f"<LastModified>{entry.last_modified:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>"
                f"{about}</{name}>")
        return ('<?xml version="1.0" encoding="UTF-8"?>\n<ListVersionsResult>'
                f"{''.join(lines)}</ListVersionsResult>").encode()

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
            if request.method == "PUT" and request.key and not (
                self.encryption.items() <= request.headers.items()
            ):
                raise Refusal(403, "AccessDenied", "User: x is not authorized to perform:"
                              f" s3:PutObject on resource: {request.key} with an explicit deny in a"
                              " resource-based policy")
            check_content(request)
            self._check_frozen(request)
            if "restore" in request.parameters:
                start_response(f"{self._thaw(request)} OK", [("Content-Length", "0")])
                return []
            if "versions" in request.parameters and not self.knows_no_versions:
                listing = self._list_versions(request)
                start_response("200 OK", [("Content-Type", "application/xml"),
                                          ("Content-Length", str(len(listing)))])
                return [listing]
        except Refusal as refusal:
            text = error_document(refusal) if request.method != "HEAD" else b""
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
        if self.knows_no_versions and "versions" in request.parameters:
            environ["QUERY_STRING"] = "list-type=2"
        if self.strips_slash:
            for name in ("RAW_URI", "REQUEST_URI", "PATH_INFO"):
                environ[name] = re.sub(r"^(/[^/?]+)(?:/|%2F)+(?=[^/?])", r"\1/", environ[name])
        if self.capitals:
            ordinary = start_response

            def start_response(status: str, headers: Any, *more: Any) -> Any:
                return ordinary(status, [(name.title(), value) for name, value in headers], *more)

        if request.method == "HEAD" and (told := self._told_of(request)):
            plain = start_response

            def start_response(status: str, headers: Any, *more: Any) -> Any:
                return plain(status, [*headers, *told], *more)

        if request.method == "PUT" and self.lag:
            self._unlisted.setdefault(request.key, self.lag)
        if request.method == "GET" and not request.key and self._unlisted:
            return self._list_late(environ, start_response)
        if request.headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
            return self._encrypt(request, environ, start_response)
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def _encrypt(
        self, request: Request, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        started: list[Any] = []
        answer: Iterable[bytes] = self._app(environ, lambda *given: started.append(given))
        status, headers, *more = started[0]
        if status.startswith("200"):
            etag = self.stored(request.bucket, request.key)._etag = secrets.token_hex(16)
            headers = [(n, f'"{etag}"' if n.lower() == "etag" else v) for n, v in headers]
        start_response(status, headers, *more)
        return answer

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


def error_document(refusal: Refusal) -> bytes:
    code, message = escape(refusal.code), escape(refusal.message)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    ).encode()
