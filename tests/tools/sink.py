"""A fast S3 service for benchmarks: what it takes from a client's time is little and measured.

    python tests/tools/sink.py [--port N] [--tls-dir FOLDER] [--drop] [--latency-ms N]
                               [--conn-mbps N]

It listens on 127.0.0.1 and prints its URL. Any key is let in: no signature is checked. Objects,
with their user metadata, are kept in memory; --drop keeps all but their bodies. It knows objects
(PUT, GET with Range, HEAD, DELETE), ListObjects in both versions, DeleteObjects, buckets and
multipart uploads; anything else is answered by NotImplemented. An ETag is the MD5 of what arrived;
a body that is shorter than announced, or is not what its Content-MD5 says, is not stored.

GET /__stats answers counters as JSON, GET /__reset sets them to zero, GET /__reset?objects forgets
all buckets as well. --latency-ms is waited before every answer, --conn-mbps (megabits per second)
is what one connection carries in either direction.

Sections: Bodies, Objects, Answers, Connections, Server.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

PIECE = 1 << 20  # bytes that are received, hashed and sent at a time
PACED_PIECE = 1 << 16  # the same where a rate is kept: small enough for an even flow
LISTED = 1000  # largest number of keys in one answer (Amazon S3 API Reference, ListObjectsV2)

# --------------------------------------------------------------------------------------------------
# Bodies: layers over a connection, each of which knows where its data ends
# --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where bytes come from."""

    def into(self, view: memoryview) -> int:
        """Puts bytes into the view; how many, 0 at the end."""

    def line(self) -> bytes:
        """The next line without its end; b"" at the end, too."""


class Pace:
    """Keeps one direction of a connection at a rate, by waiting."""

    def __init__(self, mbps: float) -> None:
        self._rate = mbps * 1e6 / 8  # bytes per second; 0: as fast as it goes
        self._start = self._carried = 0.0
        self.piece = PACED_PIECE if mbps else PIECE

    def begin(self) -> None:
        self._start, self._carried = time.monotonic(), 0.0

    def carried(self, count: int) -> None:
        if self._rate:
            self._carried += count
            time.sleep(max(0.0, self._start + self._carried / self._rate - time.monotonic()))


class Wire:
    """The bytes of a socket, with those that were read ahead in search of a line's end."""

    def __init__(self, sock: socket.socket, pace: Pace) -> None:
        self._sock, self._pace = sock, pace
        self._ahead = b""

    def into(self, view: memoryview) -> int:
        if self._ahead:
            count = min(len(view), len(self._ahead))
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        else:
            count = self._sock.recv_into(view[: self._pace.piece])
        self._pace.carried(count)
        return count

    def line(self) -> bytes:
        return self.until(b"\n").removesuffix(b"\r")

    def until(self, mark: bytes) -> bytes:
        """What comes before the next mark, which is taken, too; b"" where there is none."""
        while mark not in self._ahead:
            more = self._sock.recv(PACED_PIECE)
            if not more:
                return b""
            self._ahead += more
        found, _, self._ahead = self._ahead.partition(mark)
        return found


class Sized:
    """The next `length` bytes of a wire (Content-Length)."""

    def __init__(self, wire: Wire, length: int) -> None:
        self._wire, self._left = wire, length

    def into(self, view: memoryview) -> int:
        if not self._left:
            return 0
        count = self._wire.into(view[: self._left])
        if not count:
            raise ConnectionError("the body is shorter than its Content-Length")
        self._left -= count
        return count

    def line(self) -> bytes:
        if not self._left:
            return b""
        found = self._wire.until(b"\n")
        self._left -= len(found) + 1
        return found.removesuffix(b"\r")


class Chunked:
    """Data in chunks, each behind a line with its size: HTTP's (RFC 9112, 7.1), and aws-chunked
    (Amazon S3 API Reference, "Signature calculations: chunked upload"), which may lie in it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._first, self._ended = True, False

    def into(self, view: memoryview) -> int:
        if not self._left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        count = self._source.into(view[: self._left])
        if not count:
            raise ConnectionError("the body ends inside a chunk")
        self._left -= count
        return count

    def line(self) -> bytes:
        found, byte = bytearray(), bytearray(1)
        with memoryview(byte) as view:
            while self.into(view) and byte != b"\n":
                found += byte
        return bytes(found).removesuffix(b"\r")

    def _next_chunk(self) -> None:
        if not self._first:
            self._source.line()  # the end of the line after a chunk's data
        self._first = False
        size = self._source.line().partition(b";")[0]
        if not size:
            raise ConnectionError("the body ends before its last chunk")
        self._left = int(size, 16)
        if not self._left:
            self._ended = True
            while self._source.line():  # trailers
                pass


@dataclass
class Body:
    """What a request brought. data: None where it was not kept."""

    size: int
    md5: bytes
    data: bytearray | None


def read_body(source: Source, expected: int, scratch: bytearray, *, keep: bool) -> Body:
    """Reads a source to its end, hashing what comes; expected: how many bytes, 0 if not known.

    scratch: where bytes go that are not kept, PIECE long.
    """
    digest = hashlib.md5(usedforsecurity=False)
    # One byte more than expected is room for the read that finds the end.
    target = bytearray(expected + 1) if keep else scratch
    size = 0
    while True:
        start = size if keep else 0
        if start == len(target):
            target.extend(bytes(PIECE))
        with memoryview(target) as whole, whole[start : start + PIECE] as view:
            count = source.into(view)
            digest.update(view[:count])
        if not count:
            break
        size += count
    if keep:
        del target[size:]
    return Body(size, digest.digest(), target if keep else None)


# --------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """An object, or a part of one on its way. data: None where it was dropped."""

    size: int
    etag: str  # without quotes
    data: bytes | bytearray | None
    headers: Mapping[str, str]
    stored: float  # epoch seconds


@dataclass
class Upload:
    """A multipart upload that is not complete."""

    headers: Mapping[str, str]
    parts: dict[int, Item] = field(default_factory=dict)


@dataclass
class Service:
    """All that the connections share; `lock` is held for a moment only, never while data flows."""

    drop: bool = False
    latency: float = 0.0  # seconds
    conn_mbps: float = 0.0
    buckets: dict[str, dict[str, Item]] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    received: int = 0  # bytes of bodies of objects and parts
    sent: int = 0  # bytes of bodies of objects
    processor: float = 0.0  # seconds that were used up before the last reset
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stats(self) -> dict[str, object]:
        with self.lock:
            items = [item for bucket in self.buckets.values() for item in bucket.values()]
            return {
                "requests": dict(self.requests),
                "received": self.received,
                "sent": self.sent,
                "objects": len(items),
                "bytes": sum(item.size for item in items),
                "processor": time.process_time() - self.processor,
            }

    def reset(self, *, objects: bool) -> None:
        with self.lock:
            self.requests.clear()
            self.received = self.sent = 0
            self.processor = time.process_time()
            if objects:
                self.buckets.clear()
                self.uploads.clear()


def joined(upload: Upload, numbers: list[int]) -> Item:
    """The object that the parts make; its ETag is S3's for such: MD5 of the MD5s, and a count."""
    parts = [upload.parts[number] for number in numbers]
    digests = b"".join(bytes.fromhex(part.etag) for part in parts)
    etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
    pieces = [part.data for part in parts if part.data is not None]
    data = b"".join(pieces) if len(pieces) == len(parts) else None
    return Item(sum(part.size for part in parts), etag, data, upload.headers, time.time())


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of an upload that a download gets back."""
    kept = {name: value for name, value in headers.items()
            if name.startswith("x-amz-meta-") or name in ("content-type", "x-amz-storage-class")}
    codings = [word.strip() for word in headers.get("content-encoding", "").split(",")]
    if others := [word for word in codings if word not in ("", "aws-chunked")]:
        kept["content-encoding"] = ", ".join(others)
    return kept


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """(first, end) that a Range header asks for, None for one that lies outside."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if not match or not (match[1] or match[2]):
        return 0, size
    if not match[1]:
        return max(0, size - int(match[2])), size
    first = int(match[1])
    return (first, min(int(match[2] or size) + 1, size)) if first < size else None


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------

_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@dataclass
class Answer:
    """data: what is sent; a HEAD gets its length alone."""

    status: int = 200
    data: bytes | bytearray | memoryview = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that is answered by an error of S3. code: its name there; status: HTTP's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.code, self.status = code, status


def xml(name: str, content: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{name} {_NAMESPACE}>{content}</{name}>'
    return Answer(200, text.encode(), {"Content-Type": "application/xml"})


def refused(refusal: Refusal) -> Answer:
    text = f"<Error><Code>{refusal.code}</Code></Error>"  # in no namespace, unlike the others
    return Answer(refusal.status, text.encode(), {"Content-Type": "application/xml"})


def iso(epoch: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(epoch))


def list_objects(bucket: Mapping[str, Item], query: Mapping[str, str]) -> Answer:
    """ListObjectsV2 with list-type=2, else ListObjects."""
    second = query.get("list-type") == "2"
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("start-after", "") if second else query.get("marker", "")
    if token := query.get("continuation-token"):
        after = base64.urlsafe_b64decode(token).decode()
    limit = min(LISTED, int(query.get("max-keys", LISTED)))
    shown = quote if query.get("encoding-type") == "url" else escape
    found: dict[str, Item | None] = {}  # None: a common prefix
    truncated = False
    for key in sorted(bucket, key=str.encode):  # by bytes, as S3 sorts
        if not key.startswith(prefix):
            continue
        name, cut, _ = key[len(prefix):].partition(delimiter) if delimiter else (key, "", "")
        shared = f"{prefix}{name}{cut}" if cut else ""
        listed = shared or key
        if listed.encode() <= after.encode() or listed in found:
            continue
        if len(found) == limit:
            truncated = True
            break
        found[listed] = None if shared else bucket[key]
    parts = [f"<Prefix>{shown(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys>",
             f"<IsTruncated>{str(truncated).lower()}</IsTruncated>"]
    if query.get("encoding-type") == "url":
        parts.append("<EncodingType>url</EncodingType>")
    if second:
        parts.append(f"<KeyCount>{len(found)}</KeyCount>")
    if truncated and found:
        last = list(found)[-1]
        token = base64.urlsafe_b64encode(last.encode()).decode()
        parts.append(f"<NextContinuationToken>{token}</NextContinuationToken>" if second
                     else f"<NextMarker>{shown(last)}</NextMarker>")
    for listed, item in found.items():
        parts.append(
            f"<CommonPrefixes><Prefix>{shown(listed)}</Prefix></CommonPrefixes>" if item is None
            else f"<Contents><Key>{shown(listed)}</Key><Size>{item.size}</Size>"
            f"<LastModified>{iso(item.stored)}</LastModified><ETag>&quot;{item.etag}&quot;</ETag>"
            f"<StorageClass>{item.headers.get('x-amz-storage-class', 'STANDARD')}</StorageClass>"
            "</Contents>"
        )
    return xml("ListBucketResult", "".join(parts))


def texts(document: bytes | bytearray, name: str) -> list[str]:
    """What the elements of that name in an XML document say."""
    root = ET.fromstring(bytes(document))
    return [element.text or "" for element in root.iter() if element.tag.endswith(f"}}{name}")
            or element.tag == name]


# --------------------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------------------


@dataclass
class Request:
    method: str
    path: str  # with its escapes
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case

    @property
    def place(self) -> tuple[str, str]:
        """(bucket, key); "" for none."""
        bucket, _, key = unquote(self.path.lstrip("/")).partition("/")
        return bucket, key


# Requests for what this service does not have, by a word of their query.
_UNKNOWN = frozenset(("acl", "attributes", "cors", "encryption", "legal-hold", "lifecycle",
                      "object-lock", "policy", "retention", "tagging", "versioning", "versions"))


class Connection:
    """One client's connection: its requests, one after the other, in one thread."""

    def __init__(self, sock: socket.socket, service: Service) -> None:
        self._sock, self._service = sock, service
        self._pace = Pace(service.conn_mbps)
        self._wire = Wire(sock, self._pace)
        self._scratch = bytearray(PIECE)

    def serve(self) -> None:
        """Answers until the client goes, or sends what cannot be answered."""
        while request := self._request():
            if request.path in ("/__stats", "/__reset"):
                self._send(request, self._counters(request))
                continue
            with self._service.lock:
                self._service.requests[request.method] += 1
            try:
                answer = self._answer(request, self._body(request))
            except Refusal as refusal:
                answer = refused(refusal)
            if self._service.latency:
                time.sleep(self._service.latency)
            self._send(request, answer)

    def _request(self) -> Request | None:
        head = self._wire.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        if head == [""]:
            return None
        method, target, _ = head[0].split(" ", 2)
        path, _, query = target.partition("?")
        pairs = (line.partition(":") for line in head[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return Request(method, path, dict(parse_qsl(query, keep_blank_values=True)), headers)

    def _counters(self, request: Request) -> Answer:
        if request.path == "/__reset":
            self._service.reset(objects="objects" in request.query)
        return Answer(data=json.dumps(self._service.stats()).encode())

    def _body(self, request: Request) -> Body:
        """Reads what a request brings, to its end, whatever will be answered."""
        headers = request.headers
        if headers.get("expect", "").lower() == "100-continue":
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._pace.begin()
        expected = int(headers.get("content-length", 0))
        outer: Source = Sized(self._wire, expected)
        if "chunked" in headers.get("transfer-encoding", "").lower():
            outer = Chunked(self._wire)
        inner = outer
        if ("aws-chunked" in headers.get("content-encoding", "")
                or headers.get("x-amz-content-sha256", "").startswith("STREAMING-")):
            inner = Chunked(outer)
            expected = int(headers.get("x-amz-decoded-content-length", 0))
        is_object = request.method == "PUT" and request.place[1] != ""
        keep = not (is_object and self._service.drop)
        body = read_body(inner, expected, self._scratch, keep=keep)
        if inner is not outer:
            read_body(outer, 0, self._scratch, keep=False)  # the end of the outer layer
        if expected and body.size != expected:
            raise Refusal("IncompleteBody", 400)
        told = headers.get("content-md5")
        if told and base64.b64decode(told) != body.md5:
            raise Refusal("BadDigest", 400)
        if is_object:
            with self._service.lock:
                self._service.received += body.size
        return body

    def _answer(self, request: Request, body: Body) -> Answer:
        if _UNKNOWN & request.query.keys() or "x-amz-copy-source" in request.headers:
            raise Refusal("NotImplemented", 501)
        bucket, key = request.place
        if key:
            return self._answer_object(request, body)
        buckets = self._service.buckets
        if request.method == "PUT" and bucket:
            with self._service.lock:
                buckets.setdefault(bucket, {})
            return Answer(headers={"Location": f"/{bucket}"})
        if request.method == "GET" and not bucket:
            names = "".join(f"<Bucket><Name>{escape(name)}</Name><CreationDate>{iso(0)}"
                            "</CreationDate></Bucket>" for name in buckets)
            return xml("ListAllMyBucketsResult", f"<Buckets>{names}</Buckets>")
        with self._service.lock:
            objects = buckets.get(bucket)
            if objects is None:
                raise Refusal("NoSuchBucket", 404)
            if request.method == "HEAD":
                return Answer()
            if request.method == "GET" and "location" in request.query:
                return xml("LocationConstraint", "")
            if request.method == "GET":
                return list_objects(objects, request.query)
            if request.method == "POST" and "delete" in request.query:
                for name in texts(body.data or b"", "Key"):
                    objects.pop(name, None)
                return xml("DeleteResult", "")
            if request.method == "DELETE" and not objects:
                del buckets[bucket]
                return Answer(204)
        raise Refusal("NotImplemented", 501)

    def _answer_object(self, request: Request, body: Body) -> Answer:
        bucket, key = request.place
        with self._service.lock:
            objects = self._service.buckets.get(bucket)
            item = objects.get(key) if objects is not None else None
        if objects is None:
            raise Refusal("NoSuchBucket", 404)
        if "uploadId" in request.query or "uploads" in request.query:
            return self._answer_multipart(request, body, objects)
        if request.method == "PUT":
            item = Item(body.size, body.md5.hex(), body.data, kept_headers(request.headers),
                        time.time())
            with self._service.lock:
                objects[key] = item
            return Answer(headers={"ETag": f'"{item.etag}"'})
        if request.method == "DELETE":
            with self._service.lock:
                objects.pop(key, None)
            return Answer(204)
        if request.method not in ("GET", "HEAD"):
            raise Refusal("NotImplemented", 501)
        if item is None:
            raise Refusal("NoSuchKey", 404)
        return _download(item, request.headers.get("range", ""), request.method)

    def _answer_multipart(
        self, request: Request, body: Body, objects: dict[str, Item]
    ) -> Answer:
        bucket, key = request.place
        service, upload_id = self._service, request.query.get("uploadId", "")
        if request.method == "POST" and "uploads" in request.query:
            upload_id = secrets.token_hex(16)
            with service.lock:
                service.uploads[upload_id] = Upload(kept_headers(request.headers))
            return xml("InitiateMultipartUploadResult",
                       f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
                       f"<UploadId>{upload_id}</UploadId>")
        with service.lock:
            upload = service.uploads.get(upload_id)
        if upload is None:
            raise Refusal("NoSuchUpload", 404)
        if request.method == "PUT":
            part = Item(body.size, body.md5.hex(), body.data, {}, time.time())
            upload.parts[int(request.query["partNumber"])] = part
            return Answer(headers={"ETag": f'"{part.etag}"'})
        if request.method == "POST":
            numbers = [int(text) for text in texts(body.data or b"", "PartNumber")]
            if not numbers or set(numbers) - upload.parts.keys():
                raise Refusal("InvalidPart", 400)
            item = joined(upload, numbers)
            with service.lock:
                objects[key] = item
                service.uploads.pop(upload_id, None)
            return xml("CompleteMultipartUploadResult",
                       f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
                       f"<ETag>&quot;{item.etag}&quot;</ETag>")
        if request.method == "DELETE":
            with service.lock:
                service.uploads.pop(upload_id, None)
            return Answer(204)
        raise Refusal("NotImplemented", 501)

    def _send(self, request: Request, answer: Answer) -> None:
        headers = {"Content-Length": str(len(answer.data)), **answer.headers,
                   "Date": formatdate(usegmt=True), "x-amz-request-id": secrets.token_hex(8)}
        lines = [f"HTTP/1.1 {answer.status} -"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if request.method == "HEAD" or len(answer.data) < PACED_PIECE:
            self._sock.sendall(head + (b"" if request.method == "HEAD" else bytes(answer.data)))
        else:
            self._sock.sendall(head)
            self._pace.begin()
            with memoryview(answer.data) as view:
                for start in range(0, len(view), self._pace.piece):
                    piece = view[start : start + self._pace.piece]
                    self._sock.sendall(piece)
                    self._pace.carried(len(piece))
        if request.method == "GET" and request.place[1]:
            with self._service.lock:
                self._service.sent += len(answer.data)


def _download(item: Item, asked: str, method: str) -> Answer:
    """A GET's or HEAD's answer."""
    span = byte_range(asked, item.size)
    if span is None:
        raise Refusal("InvalidRange", 416)
    first, end = span
    headers = {**item.headers, "ETag": f'"{item.etag}"', "Accept-Ranges": "bytes",
               "Content-Length": str(end - first),
               "Last-Modified": formatdate(item.stored, usegmt=True)}
    if asked:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{item.size}"
    status = 206 if asked else 200
    if method == "HEAD":
        return Answer(status, b"", headers)
    if item.data is None:
        raise Refusal("InvalidObjectState", 403)  # its body was dropped
    return Answer(status, memoryview(item.data)[first:end], headers)


# --------------------------------------------------------------------------------------------------
# Server
# --------------------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) in a folder; made there, for 127.0.0.1, by openssl if they are missing."""
    made = folder / "cert.pem", folder / "key.pem"
    if not all(path.exists() for path in made):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "30", "-subj", "/CN=127.0.0.1",
             "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
             "-out", str(made[0]), "-keyout", str(made[1])],
            check=True, stderr=subprocess.DEVNULL,
        )
    return made


def serve_connection(
    sock: socket.socket, service: Service, context: ssl.SSLContext | None
) -> None:
    """One connection, to its end. Clients come and go as they like: that is no error here."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(sock, server_side=True) if context else sock as wire:
            Connection(wire, service).serve()
    except OSError:
        sock.close()


def main() -> None:
    options = argparse.ArgumentParser(description="A fast S3 service for benchmarks.")
    options.add_argument("--port", type=int, default=0, help="default: a free one")
    options.add_argument("--tls-dir", type=Path, help="https, with cert.pem and key.pem of a"
                         " folder; made there if they are missing")
    options.add_argument("--drop", action="store_true", help="do not keep bodies")
    options.add_argument("--latency-ms", type=float, default=0.0, help="before every answer")
    options.add_argument("--conn-mbps", type=float, default=0.0,
                         help="megabits per second that one connection carries")
    given = options.parse_args()
    context = None
    if given.tls_dir:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(os.fspath, certificate(given.tls_dir)))
    service = Service(given.drop, given.latency_ms / 1000, given.conn_mbps)
    server = socket.create_server(("127.0.0.1", given.port), backlog=256)
    scheme = "https" if context else "http"
    print(f"{scheme}://127.0.0.1:{server.getsockname()[1]}", flush=True)
    while True:
        sock, _ = server.accept()
        threading.Thread(
            target=serve_connection, args=(sock, service, context), daemon=True
        ).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
