"""What a bucket held before: --versions-at; and what it holds frozen: restore --thaw."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fetched, program

import s3napback
from s3napback import Access, Failure, NotFound, PastStore

KEYS = ["/e-0-FULL:0", "/e//é 0%2B+:0", "a", "a:1", "a:10", "\U0001f511:0", "￡:0"]


@pytest.fixture
def versioned(s3_server: Any) -> Callable[..., PastStore]:
    """A versioned bucket; gives it as of a moment."""
    client = s3_server.client()
    client.create_bucket(Bucket="bkt")
    client.put_bucket_versioning(Bucket="bkt", VersioningConfiguration={"Status": "Enabled"})

    def at(moment: float, **access: Any) -> PastStore:
        given = {"key": s3_server.key, "secret": s3_server.secret, **access}
        access_to = Access(s3_server.endpoint, "us-east-1", **given)
        return PastStore("bkt", access_to, s3napback.Retries(), moment)

    return at


def listed(store: s3napback.Store, prefix: str = "") -> dict[str, bytes]:
    """Key → data of all that a store lists."""
    found = [item.key for item in store.iter_objects(prefix)]
    assert found == sorted(found, key=str.encode)
    return {key: fetched(store, key)[0] for key in found}


# ---- the store ----


@pytest.mark.parametrize("page", [
    pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_bucket_of_any_moment_is_what_was_put_and_deleted_by_then(
    versioned: Callable[..., PastStore], s3_server: Any, page: int
) -> None:
    """Whatever the pages of the listing cut apart, and whether versions were kept yet (the id is
    null then, and again where versioning is suspended)."""
    chance = random.Random(page)
    s3_server.page = page
    history: dict[str, list[tuple[float, bytes | None, str]]] = {}
    for key in KEYS:
        times = sorted(chance.sample(range(1_700_000_000, 1_700_000_020), chance.randint(1, 6)))
        null = chance.randrange(len(times))
        history[key] = [
            (at, None if chance.random() < 0.3 else f"{key} {at}".encode(),
             "null" if n == null else f"v{n}")
            for n, at in enumerate(times)
        ]
        s3_server.set_versions("bkt", key, history[key])
    for at in range(1_699_999_999, 1_700_000_021, 3 if page == 1000 else 7):
        then = {}
        for key, versions in history.items():
            by_then = [data for made, data, _ in versions if made <= at]
            if by_then and by_then[-1] is not None:
                then[key] = by_then[-1]
        store = versioned(at + 0.5)
        key = chance.choice(KEYS)
        assert (store.head(key) is None) == (key not in then)  # without a listing before
        assert listed(store) == then
        narrow = {key: data for key, data in then.items() if key.startswith("a:1")}
        assert listed(store, "a:1") == narrow


def test_of_one_second_the_later_version_counts_and_a_marker_only_where_it_is_the_newest(
    versioned: Callable[..., PastStore], s3_server: Any
) -> None:
    s3_server.set_versions("bkt", "two", [(1e9, b"old", "a"), (1e9, b"new", "b")])
    s3_server.set_versions("bkt", "replaced", [
        (1e9 - 9, b"old", "a"), (1e9, None, "b"), (1e9, b"new", "c"), (1e9 + 9, None, "d")])
    s3_server.set_versions("bkt", "gone", [(1e9, b"old", "a"), (1e9, None, "b")])
    assert listed(versioned(1e9)) == {"two": b"new", "replaced": b"new"}


@pytest.mark.slow
def test_a_long_listing_goes_on_where_it_stopped(
    versioned: Callable[..., PastStore], s3_server: Any
) -> None:
    names = [f"/n-0-FULL:{n:013d}" for n in range(2100)]
    s3_server.fill("bkt", names)
    store = versioned(time.time() + 1)
    s3_server.requests.clear()
    assert [item.key for item in store.iter_objects("/n-0-FULL:")] == names
    assert len(s3_server.requests) == 4  # whether there are versions, and three pages


def test_a_listing_that_does_not_go_on_is_told(
    versioned: Callable[..., PastStore], s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.fill("bkt", ["a", "b"])
    s3_server.page = 1
    same = b"<IsTruncated>true</IsTruncated><NextKeyMarker>a</NextKeyMarker>"
    monkeypatch.setattr(type(s3_server), "_list_versions", lambda *_: (
        b"<ListVersionsResult>" + same + b"</ListVersionsResult>"))
    with pytest.raises(Failure, match="versions in bucket bkt does not go on"):
        listed(versioned(1e12))


def test_what_was_not_there_then_is_not_found(
    versioned: Callable[..., PastStore], s3_server: Any
) -> None:
    s3_server.set_versions("bkt", "k", [(1e9, b"x", "v")])
    with pytest.raises(NotFound, match="k was not in bucket bkt then"):
        versioned(1e9 - 1).peek("k", 1)


# ---- buckets and keys that cannot ----


def test_a_bucket_that_never_kept_versions_is_called_that(s3_site: Site, capsys: Capture) -> None:
    assert s3_site.run() == 0
    assert s3_site.run("list", "--versions-at", "now") == 1
    assert "bucket bkt never kept older versions (--versions-at needs" in capsys.readouterr().err


def test_a_bucket_in_a_folder_has_no_versions(site: Site, capsys: Capture) -> None:
    assert site.run("list", "--versions-at", "yesterday") == 2
    assert capsys.readouterr().err == (
        "s3napback: a bucket in a folder keeps no older versions (--versions-at needs a service,"
        " and a bucket, that keeps the versions of objects)\n")


def test_a_moment_that_cannot_be_read_is_refused(site: Site, capsys: Capture) -> None:
    assert site.run("list", "--versions-at", "whenever") == 2
    assert "cannot read the moment 'whenever'" in capsys.readouterr().err


@pytest.mark.parametrize("status, code, hint", [
    (501, "NotImplemented", "--versions-at needs a service"),
    (405, "MethodNotAllowed", "--versions-at needs a service"),
    (403, "AccessDenied", "the access key lacks the right s3:ListBucketVersions"),
])
def test_a_service_that_lists_no_versions_is_told(
    versioned: Callable[..., PastStore], s3_server: Any, status: int, code: str, hint: str
) -> None:
    """Whatever it says when it is asked whether there are any."""
    s3_server.fail = lambda method, path, query, body: (
        (status, code, "") if {"versions", "versioning"} & set(query) else None)
    with pytest.raises(Failure, match=f"cannot list the versions in bucket bkt: {code}.*{hint}"):
        listed(versioned(1e12))


def test_a_service_that_lists_objects_instead_is_told(
    versioned: Callable[..., PastStore], s3_server: Any
) -> None:
    s3_server.knows_no_versions = True
    with pytest.raises(Failure, match=r"no listing \(--versions-at needs a service"):
        listed(versioned(1e12))


@pytest.mark.parametrize("read", [
    lambda store: store.head("k"), lambda store: store.peek("k", 1),
    lambda store: store.fetch("k", s3napback.Buffer(9)),
])
def test_a_key_that_may_not_read_versions_is_told_which_right_it_lacks(
    versioned: Callable[..., PastStore], s3_server: Any, read: Callable[[PastStore], Any]
) -> None:
    s3_server.set_versions("bkt", "k", [(1e9, b"x", "v")])
    s3_server.fail = lambda method, path, query, body: (
        (403, "AccessDenied", "") if "versionId" in query else None)
    with pytest.raises(Failure, match="lacks the right s3:GetObjectVersion"):
        read(versioned(1e12))


# ---- after an attack ----


@pytest.fixture
def attacked(s3_site: Site, versioned: Any, s3_server: Any, capsys: Capture) -> Site:
    """Two nights, four and two hours ago; now one chunk is overwritten, and all are deleted."""
    for day in range(2):
        (s3_site.data / "file").write_text(f"day {day} " * 999)
        assert s3_site.run(now=NIGHT + timedelta(days=day)) == 0
        s3_server.backdate("bkt", timedelta(hours=2))
    store = s3_site.store()
    keys = [item.key for item in store.iter_objects()]
    store.put(keys[0], b"pay up", {})
    store.delete(keys)
    store.put("README", b"pay up", {})
    assert s3_site.run("list") == 0
    assert "there are no archives" in capsys.readouterr().err
    return s3_site


def test_restore_brings_back_what_the_bucket_held_at_that_moment(
    attacked: Site, capsys: Capture
) -> None:
    back = attacked.restored("--versions-at", "1 hour ago")
    assert (back / "file").read_text() == "day 1 " * 999
    back = attacked.restored("--versions-at", "3 hours ago")
    assert (back / "file").read_text() == "day 0 " * 999
    back = attacked.restored("--versions-at", "1 hour ago", after=NIGHT)
    assert (back / "file").read_text() == "day 0 " * 999
    assert attacked.run("restore", str(attacked.data), "--to", "/x", "--versions-at", "now") == 1
    assert "there is no backup of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rights_of_the_readme_are_enough_to_read_versions(
    attacked: Site, s3_server: Any
) -> None:
    """s3:ListBucketVersions and s3:GetObjectVersion; of what lies there now nothing is asked."""
    s3_server.fail = lambda method, path, query, body: (
        None if method in ("GET", "HEAD") and {"versions", "versionId"} & set(query)
        else (403, "AccessDenied", ""))
    back = attacked.restored("--versions-at", "1 hour ago")
    assert (back / "file").read_text() == "day 1 " * 999


@pytest.mark.slow
def test_list_and_verify_look_at_that_moment_too(attacked: Site, capsys: Capture) -> None:
    now = datetime.now()
    assert attacked.run("list", "--json", "--versions-at", "1 hour ago", now=now) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert [one["complete"] for one in source["archives"]] == [True, True]
    assert attacked.run("verify", "--deep", "--versions-at", "1 hour ago", now=now) == 0
    assert "2 archives checked, 0 faults" in capsys.readouterr().err


@pytest.mark.slow
def test_a_restore_script_fetches_the_versions(
    attacked: Site, s3_server: Any
) -> None:
    """`aws s3api get-object` is played by a few lines."""
    words = "-c", str(attacked.conf), str(attacked.data), "--versions-at", "1 hour ago"
    script = attacked.folder / "restore.sh"
    script.write_bytes(program("restore-script", *words).stdout)
    aws = attacked.folder / "aws"
    aws.write_text(
        f"#!{sys.executable}\nimport sys, boto3\n"
        "assert sys.argv[1:3] == ['s3api', 'get-object'], sys.argv\n"
        "options = dict(zip(sys.argv[3:-1:2], sys.argv[4:-1:2]))\n"
        "client = boto3.client('s3', endpoint_url=options['--endpoint-url'],"
        f" region_name='us-east-1', aws_access_key_id={s3_server.key!r},"
        f" aws_secret_access_key={s3_server.secret!r})\n"
        "answer = client.get_object(Bucket=options['--bucket'], Key=options['--key'],"
        " VersionId=options['--version-id'])\n"
        "open(sys.argv[-1], 'wb').write(answer['Body'].read())\nprint('{}')\n")
    aws.chmod(0o755)
    subprocess.run(["sh", str(script), str(attacked.folder / "out")], check=True,
                   env={"PATH": f"{attacked.folder}:/usr/bin:/bin"})
    restored = attacked.folder / "out" / str(attacked.data).lstrip("/") / "file"
    assert restored.read_text() == "day 1 " * 999


# ---- frozen objects ----


@pytest.fixture
def frozen(s3_site: Site, s3_server: Any) -> Callable[..., Site]:
    """A site whose archive is in a storage class."""

    def make(storage_class: str = "GLACIER") -> Site:
        s3_site.settings["StorageClass"] = storage_class
        (s3_site.data / "file").write_bytes(random.Random(1).randbytes(1500))
        assert s3_site.run() == 0
        s3_server.requests.clear()
        return s3_site

    return make


def count(s3_server: Any, method: str) -> int:
    """Requests of a method for objects since the last count."""
    found: int = sum(one == method and path != "/bkt" for one, path in s3_server.requests)
    s3_server.requests.clear()
    return found


def test_what_is_frozen_fails_before_anything_is_fetched(
    frozen: Callable[..., Site], s3_server: Any, capsys: Capture
) -> None:
    site = frozen()
    assert site.restore(site.folder / "out") == 1
    assert re.search(r"s3napback: 3 objects, 2\.\d kB, are frozen in GLACIER"
                     r" \(restore --thaw asks for them\)\n$", capsys.readouterr().err)
    assert count(s3_server, "GET") == count(s3_server, "POST") == 0


@pytest.mark.parametrize("storage_class, words, asked, told", [
    ("GLACIER", [], ("Standard", 7), "which usually takes 3 to 5 hours"),
    pytest.param("GLACIER", ["--tier", "bulk", "--days", "3"], ("Bulk", 3), "5 to 12 hours",
                 marks=pytest.mark.slow),
    pytest.param("GLACIER", ["--tier", "Expedited"], ("Expedited", 7), "5 minutes",
                 marks=pytest.mark.slow),
    pytest.param("DEEP_ARCHIVE", ["--tier", "Bulk"], ("Bulk", 7), "48 hours",
                 marks=pytest.mark.slow),
    pytest.param("INTELLIGENT_TIERING", [], ("Standard", None), "12 hours",
                 marks=pytest.mark.slow),
])
def test_thaw_asks_and_ends_with_75_until_the_same_call_restores(
    frozen: Callable[..., Site], s3_server: Any, storage_class: str, words: list[str],
    asked: tuple[str, int | None], told: str, capsys: Capture
) -> None:
    site = frozen(storage_class)
    out = site.folder / "out"
    keys = [item.key for item in site.store().iter_objects()]
    if storage_class == "INTELLIGENT_TIERING":
        s3_server.tiers = dict.fromkeys(keys, "DEEP_ARCHIVE_ACCESS")
    assert site.restore(out, "--thaw", *words) == 75
    said = capsys.readouterr().err
    assert "3 objects" in said and "3 were asked for now, " in said and told in said
    assert [*s3_server.asked.values()] == [asked] * 3
    assert count(s3_server, "POST") == 3
    assert site.restore(out, "--thaw", *words) == 75
    assert re.search("0 were asked for now, .* 3 before", capsys.readouterr().err)
    assert count(s3_server, "POST") == 0
    s3_server.thawed()
    assert site.restore(out, "--thaw", *words) == 0
    assert count(s3_server, "POST") == 0
    assert (out / str(site.data).lstrip("/") / "file").stat().st_size == 1500
    assert site.restore(site.folder / "again") == 0  # it is there for everybody


@pytest.mark.slow
def test_a_part_of_what_is_thawed_is_waited_for(
    frozen: Callable[..., Site], s3_server: Any, capsys: Capture
) -> None:
    """What another asks for in between is no error either."""
    site = frozen()
    first, second, _ = (item.key for item in site.store().iter_objects())
    client = s3_server.client()
    request = {"Days": 1, "GlacierJobParameters": {"Tier": "Bulk"}}
    client.restore_object(Bucket="bkt", Key=first, RestoreRequest=request)
    s3_server.thawed()

    def ask_too(method: str, path: str, query: dict[str, str], body: bytes | None) -> None:
        if method == "POST" and path.endswith(second):
            s3_server.fail = None
            client.restore_object(Bucket="bkt", Key=second, RestoreRequest=request)

    s3_server.fail = ask_too
    assert site.restore(site.folder / "out", "--thaw") == 75
    assert "2 objects" in capsys.readouterr().err
    assert len(s3_server.asked) == 3


@pytest.mark.slow
def test_versions_are_thawed_as_they_were(
    frozen: Callable[..., Site], versioned: Any, s3_server: Any
) -> None:
    site = frozen()
    s3_server.backdate("bkt", timedelta(hours=2))
    store = site.store()
    store.delete([item.key for item in store.iter_objects()])
    words = ["--thaw", "--versions-at", "1 hour ago"]
    assert site.restore(site.folder / "out", *words) == 75
    assert len(s3_server.asked) == 3
    s3_server.thawed()
    back = site.restored(*words)
    assert (back / "file").stat().st_size == 1500


@pytest.mark.slow
def test_expedited_is_refused_for_deep_archive_before_anything_is_asked_for(
    frozen: Callable[..., Site], s3_server: Any, capsys: Capture
) -> None:
    site = frozen("DEEP_ARCHIVE")
    assert site.restore(site.folder / "out", "--thaw", "--tier", "Expedited") == 2
    told = "from where nothing comes by --tier Expedited (use Standard or Bulk)"
    assert told in capsys.readouterr().err
    assert not s3_server.asked


@pytest.mark.parametrize("words, told", [
    (["--tier", "Fast"], "--tier Fast is none of Bulk, Standard, Expedited"),
    (["--days", "0"], "--days 0"), (["--days", "x"], "--days x"),
])
def test_a_tier_or_days_that_are_none_are_refused(
    site: Site, words: list[str], told: str, capsys: Capture
) -> None:
    assert site.restore(site.folder / "out", "--thaw", *words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["--tier", "Bulk"], "--tier and --days say how to thaw"), (["--days", "3"], "add --thaw"),
])
def test_how_to_thaw_is_refused_where_nothing_is_to_be_thawed(
    site: Site, words: list[str], told: str, capsys: Capture
) -> None:
    assert site.restore(site.folder / "out", *words) == 2
    assert told in capsys.readouterr().err


def test_nothing_is_thawed_for_a_place_to_which_it_cannot_go(
    frozen: Callable[..., Site], s3_server: Any, capsys: Capture
) -> None:
    site = frozen()
    (site.folder / "file").touch()
    assert site.restore(site.data, "--thaw") == 2
    assert f"{site.data} is not empty" in capsys.readouterr().err
    assert site.restore(site.folder / "file", "--thaw", "--overwrite") == 1
    assert "Not a directory" in capsys.readouterr().err
    done = program("restore", "-c", str(site.conf), "--thaw", "--stdout", str(site.data))
    assert done.returncode == 2 and b"a directory needs --to DIR" in done.stderr
    assert not s3_server.asked


@pytest.mark.slow
@pytest.mark.parametrize("code, told", [
    ((403, "AccessDenied", ""), "lacks the right s3:RestoreObject"),
    ((503, "GlacierExpeditedRetrievalNotAvailable", "try again"), "cannot thaw"),
])
def test_a_request_to_thaw_that_is_refused_is_told(
    frozen: Callable[..., Site], s3_server: Any, code: tuple[int, str, str], told: str,
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "_FIRST_PAUSE", 0.001)
    site = frozen()
    s3_server.fail = lambda method, *_: code if method == "POST" else None
    assert site.restore(site.folder / "out", "--thaw") == 1
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_instant_retrieval_needs_no_thaw(frozen: Callable[..., Site]) -> None:
    site = frozen("GLACIER_IR")
    assert site.restore(site.folder / "out") == 0


@pytest.mark.slow
@pytest.mark.parametrize("storage_class", ["GLACIER", "INTELLIGENT_TIERING"])
def test_list_shows_frozen_archives_and_verify_says_what_to_do(
    frozen: Callable[..., Site], s3_server: Any, storage_class: str, capsys: Capture
) -> None:
    site = frozen(storage_class)
    if storage_class == "INTELLIGENT_TIERING":
        keys = [item.key for item in site.store().iter_objects()]
        s3_server.tiers = dict.fromkeys(keys, "ARCHIVE_ACCESS")
    assert site.run("list") == 0
    assert storage_class in capsys.readouterr().out
    assert site.run("verify") == 0
    for words in (["--deep"], ["--sample", "100%"]):
        assert site.run("verify", *words) == 1
        shown = capsys.readouterr().out
        assert "it is frozen: s3napback.py restore --thaw asks for it" in shown
        assert shown.count("\n") == 1
