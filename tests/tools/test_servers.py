"""The fixtures themselves: the S3 server refuses what it should, and every other one answers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError
from conftest import GpgHome, MariaDb, Postgres, require_tool, run
from s3_server import S3Server, content_md5

BUCKET = "dev.example.com.backup1"


@pytest.fixture
def s3(s3_server: S3Server) -> Any:
    client = s3_server.client()
    client.create_bucket(Bucket=BUCKET)
    return client


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    """Status and code of the error that CALL ends with."""
    with pytest.raises(ClientError) as caught:
        call()
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def keys(client: Any, prefix: str = "") -> list[str]:
    listing = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for entry in listing.get("Contents", [])]


# ---------------------------------------------------------------------------------------------
# S3: what is refused
# ---------------------------------------------------------------------------------------------


def test_put_needs_a_right_content_md5(s3: Any, s3_server: S3Server) -> None:
    plain = s3_server.client(add_md5=False)
    put = {"Bucket": BUCKET, "Key": "k", "Body": b"good"}
    assert refusal(lambda: plain.put_object(**put)) == (400, "InvalidRequest")
    wrong = content_md5(b"evil")
    assert refusal(lambda: plain.put_object(**put, ContentMD5=wrong)) == (400, "BadDigest")
    assert keys(s3) == []
    plain.put_object(**put, ContentMD5=content_md5(b"good"))
    assert keys(s3) == ["k"]


def test_deletion_needs_content_md5(s3: Any, s3_server: S3Server) -> None:
    s3.put_object(Bucket=BUCKET, Key="k", Body=b"")
    call = {"Bucket": BUCKET, "Delete": {"Objects": [{"Key": "k"}]}}
    plain = s3_server.client(add_md5=False)
    assert refusal(lambda: plain.delete_objects(**call)) == (400, "InvalidRequest")
    assert keys(s3) == ["k"]
    s3.delete_objects(**call)
    assert keys(s3) == []


def test_a_deletion_has_at_most_1000_keys(s3: Any) -> None:
    objects = [{"Key": f"k{n}"} for n in range(1001)]
    call = {"Bucket": BUCKET, "Delete": {"Objects": objects}}
    assert refusal(lambda: s3.delete_objects(**call)) == (400, "MalformedXML")


def test_a_key_has_at_most_1024_bytes(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="ü" * 512, Body=b"")
    put = {"Bucket": BUCKET, "Key": "ü" * 512 + "x", "Body": b""}
    assert refusal(lambda: s3.put_object(**put)) == (400, "KeyTooLongError")


@pytest.mark.parametrize(
    ("credentials", "code"),
    [
        ({"secret": "wrong"}, "SignatureDoesNotMatch"),
        ({"key": "AKIANOBODY"}, "InvalidAccessKeyId"),
    ],
)
def test_requests_of_strangers_are_refused(
    s3: Any, s3_server: S3Server, credentials: dict[str, Any], code: str
) -> None:
    stranger = s3_server.client(**credentials)
    put = {"Bucket": BUCKET, "Key": "k", "Body": b"x"}
    assert refusal(lambda: stranger.put_object(**put)) == (403, code)
    assert refusal(lambda: stranger.list_objects_v2(Bucket=BUCKET)) == (403, code)
    assert refusal(lambda: stranger.head_bucket(Bucket=BUCKET))[0] == 403
    assert keys(s3) == []


def test_the_bucket_of_someone_else_is_denied(s3_server: S3Server) -> None:
    client, bucket = s3_server.client(), "denied-bucket"
    denied = (403, "AccessDenied")
    assert refusal(lambda: client.list_objects_v2(Bucket=bucket)) == denied
    assert refusal(lambda: client.put_object(Bucket=bucket, Key="k", Body=b"")) == denied
    assert refusal(lambda: client.create_bucket(Bucket=bucket)) == denied


@pytest.mark.parametrize(
    "header",
    [
        {"Content-Encoding": "aws-chunked"},
        {"x-amz-trailer": "x-amz-checksum-crc32"},
    ],
)
def test_trailers_are_refused(s3: Any, header: dict[str, str]) -> None:
    s3.meta.events.register(
        "before-call.s3.PutObject", lambda params, **_: params["headers"].update(header)
    )
    put = {"Bucket": BUCKET, "Key": "k", "Body": b"x"}
    assert refusal(lambda: s3.put_object(**put)) == (501, "NotImplemented")


# ---------------------------------------------------------------------------------------------
# S3: what works
# ---------------------------------------------------------------------------------------------

AWKWARD = [
    "/etc-3-FULL:0000000000000",
    "//-0-FULL:1",
    "///tri-0:0",
    "/some//path/-5-DIFF:00000000000000000001",
    "MySQL//var/run/my.sock/db-3:0000000000000",
    "PostgreSQL/-0:0",
    " /my docs ",
    "/a/../b/./c",
    "/100%/a%20b%2Fc+d?e=f&g#h;i,j",
    '/it\'s "x"<&>[a-z]{b}!~^`|\\*',
    "/żółć-日本-😀-e\u0301",
    "/" + "k" * 900,
    "slash/",
]


@pytest.mark.parametrize("key", AWKWARD)
def test_awkward_keys_survive(s3: Any, s3_server: S3Server, key: str) -> None:
    body = key.encode()
    s3.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata={"k": "v"})
    assert ("PUT", f"/{BUCKET}/{key}") in s3_server.requests
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == body
    assert s3.head_object(Bucket=BUCKET, Key=key)["Metadata"] == {"k": "v"}
    assert keys(s3) == keys(s3, prefix=key) == [key]
    s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": key}]})
    assert keys(s3) == []


def test_slashes_are_not_merged(s3: Any) -> None:
    variants = sorted(["a/b", "a//b", "/a/b", "//a/b", "a/b/"])
    for key in variants:
        s3.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    assert keys(s3) == variants


def test_a_fault_is_answered_as_told(s3: Any, s3_server: S3Server) -> None:
    def fail(
        method: str, path: str, query: dict[str, str], body: bytes | None
    ) -> tuple[int, str, str] | None:
        return (503, "SlowDown", "Please <wait>") if body == b"two" else None

    s3_server.fail = fail
    s3.put_object(Bucket=BUCKET, Key="1", Body=b"one")
    put = {"Bucket": BUCKET, "Key": "2", "Body": b"two"}
    assert refusal(lambda: s3.put_object(**put)) == (503, "SlowDown")
    assert keys(s3) == ["1"]


def test_a_connection_can_be_dropped(s3: Any, s3_server: S3Server) -> None:
    def fail(*_: object) -> None:
        raise ConnectionAbortedError

    s3_server.fail = fail
    with pytest.raises((ConnectionError, HTTPClientError)):
        keys(s3)


def test_dates_can_be_set(s3: Any, s3_server: S3Server) -> None:
    def dates(key: str) -> set[datetime]:
        listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["Contents"][0]["LastModified"]
        return {listed, s3.head_object(Bucket=BUCKET, Key=key)["LastModified"]}

    moment = datetime(2025, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    for key in ("a:0", "b:0"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"")
        s3_server.set_modified(BUCKET, key, moment)
    s3_server.backdate(BUCKET, timedelta(days=1), prefix="b:")
    assert dates("a:0") == {moment}
    assert dates("b:0") == {moment - timedelta(days=1)}


def test_recorded_buckets_can_be_loaded(s3_server: S3Server, golden: Path) -> None:
    s3_server.load(golden / "perl-archives" / "edge")
    listing = s3_server.client().list_objects_v2(Bucket="oracle.edge", Prefix="len10500:")
    assert [entry["Size"] for entry in listing["Contents"]] == [1000] * 10 + [500]
    assert {entry["LastModified"].year for entry in listing["Contents"]} == {2025}


# ---------------------------------------------------------------------------------------------
# The other servers and tools
# ---------------------------------------------------------------------------------------------


def test_a_missing_tool_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3NAPBACK_TEST_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is not installed"):
        require_tool("no-such-tool")
    monkeypatch.setenv("S3NAPBACK_TEST_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not installed"):
        require_tool("no-such-tool")


def test_gpg_encrypts_for_its_key(gpg_home: GpgHome, golden: Path) -> None:
    secret = gpg_home.run("-a", "-r", gpg_home.recipient, "-e", stdin="text")
    assert gpg_home.run("-d", stdin=secret) == "text"
    gpg_home.import_golden()
    day4 = golden / "perl-archives" / "gpg-day4" / "objects" / "oracle.gpg"
    chunk = day4 / "PostgreSQL%2Fpgdb-0%3A00000000000000000000"
    dump = subprocess.run(
        ["gpg", "--batch", "-q", "-d", str(chunk)],
        env={**gpg_home.env, "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
    )
    assert dump.stdout[:2] == b"\x1f\x8b"  # gzip


def test_mariadb_answers(mariadb: MariaDb) -> None:
    mariadb.run("CREATE DATABASE fixture; CREATE TABLE fixture.t (n INT)")
    mariadb.run("INSERT INTO fixture.t VALUES (1), (2)")
    assert mariadb.run("SELECT n, n * n FROM fixture.t ORDER BY n") == "1\t1\n2\t4\n"
    dump = run([require_tool("mariadb-dump"), f"--socket={mariadb.socket}", "--opt", "fixture"])
    assert "VALUES\n(1),\n(2)" in dump


def test_postgres_answers(postgres: Postgres) -> None:
    postgres.run("postgres", "CREATE DATABASE fixture")
    postgres.run("fixture", "CREATE TABLE t AS SELECT generate_series(1, 2) AS n")
    assert postgres.run("fixture", "SELECT n, n * n FROM t ORDER BY n") == "1|1\n2|4\n"
    assert "COPY public.t (n)" in run([require_tool("pg_dump"), "fixture"], env=postgres.env)


def test_svn_commits(svn_repo_factory: Callable[[Path, int], Path], tmp_path: Path) -> None:
    repo = svn_repo_factory(tmp_path / "my repo", 2)
    svn_repo_factory(repo, 1)
    assert run([require_tool("svnlook"), "youngest", str(repo)]) == "3\n"
    assert run([require_tool("svnlook"), "cat", str(repo), "file3"]) == "revision 3\n"
