
"""What keeps a stored backup from being lost: SafeReplace, the guard of chains, and warnings in
time. Kills and faults at random are in tests/scenarios/test_faults.py."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from conftest import NIGHT, Site, fake_tool, fetched, run
from test_backup import files

import s3napback
from s3napback import Archive, StoredObject


def stage(site: Site, name: str) -> Archive:
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


# ---- SafeReplace ----


@pytest.fixture
def safe_site(site: Site) -> Site:
    """A site whose one slot holds an archive of several chunks."""
    site.settings["SafeReplace"] = "On"
    (site.data / "big").write_bytes(os.urandom(5000))
    assert site.run() == 0
    return site


def test_the_old_archive_stays_until_the_new_one_is_there(
    safe_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ((name, _),) = safe_site.archives().items()
    content = safe_site.content(name)
    fake_tool(safe_site, monkeypatch, "pigz", '"$REAL" "$@"; exit 1')
    assert safe_site.run("-f") == 1
    assert safe_site.content(name) == content
    assert not [p for p in (safe_site.folder / "buckets/bkt").iterdir() if "new" in p.name]
    assert "No complete full backup" not in caplog.text


def test_a_replacement_leaves_one_archive(safe_site: Site) -> None:
    ((name, old),) = safe_site.archives().items()
    assert safe_site.run("-f") == 0
    ((again, new),) = safe_site.archives().items()
    assert again == name
    assert new.metadata["archive"] != old.metadata["archive"]
    assert not new.staged
    keys = [item.key for item in s3napback.iter_objects(safe_site.store())]
    assert keys == [s3napback.chunk_key(name, n) for n in range(len(new.chunks))]


@pytest.mark.parametrize("placed", ["whole", "half", "none", "older", "torn"])
def test_whoever_finds_a_staged_archive_finishes_the_move(safe_site: Site, placed: str) -> None:
    store = safe_site.store()
    ((name, _),) = safe_site.archives().items()
    if placed == "older":  # the copying has not begun
        old = [(item.key, *fetched(store, item.key)) for item in safe_site.archives()[name].chunks]
        assert safe_site.run("-f", now=NIGHT + timedelta(seconds=1)) == 0
    content = safe_site.content(name)
    archive = stage(safe_site, name)
    for path in safe_site.diff_files():
        path.unlink()  # the run ended before it came to that
    if placed == "older":
        for item in archive.chunks:
            store.delete([item.key])
        for key, data, metadata in old:
            store.put(key, data, metadata)
            os.utime(store.path_of(key), (1e9, 1e9))  # type: ignore[attr-defined]
    gone = {"half": 2, "none": 0, "torn": 1}.get(placed)
    if gone is not None:
        store.delete([item.key for item in archive.chunks[gone:]])
    if placed == "torn":  # an upload under way has no last chunk, and nothing says that it is whole
        store.delete([s3napback.staged_key(name, len(archive.chunks) - 1)])
        assert safe_site.run() == 0
        assert [i for i in s3napback.iter_objects(store) if s3napback.is_staged(i.key)] == []
        assert safe_site.archives()[name].complete
        return
    assert safe_site.run(now=NIGHT + timedelta(minutes=1)) == 0  # done today
    assert safe_site.content(name) == content
    assert [i.key for i in s3napback.iter_objects(store)] == [i.key for i in archive.chunks]


def test_a_staged_archive_of_another_night_is_not_done_today(safe_site: Site) -> None:
    """It comes to its place today, and is as old as it is."""
    name = stage_only(safe_site)
    for path in safe_site.diff_files():
        path.unlink()
    turn = NIGHT + timedelta(days=28)  # of the same slot
    assert safe_site.run(now=turn) == 0
    made = safe_site.archives()[name].made
    assert datetime.fromtimestamp(made).date() == turn.date()


def test_a_restore_reads_a_staged_archive_where_it_waits(
    safe_site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command that reads moves or deletes an object: the next run does."""
    name = stage_only(safe_site)
    endpoint = safe_site.settings["S3Endpoint"]
    for where in (["-b", "bkt", "--endpoint", endpoint], ["-c", str(safe_site.write())]):
        before = safe_site.state()
        target = safe_site.folder / "back"
        words = ["restore", *where, str(safe_site.data), "--to", str(target)]
        assert s3napback.main(words) == 0
        assert (target / str(safe_site.data)[1:] / "file").read_text() == "one"
        shutil.rmtree(target)
        assert s3napback.main(["list", *where]) == 0
        assert "not yet in its place" in capsys.readouterr().out
        assert safe_site.archives()[name].staged
        assert safe_site.state() == before


def test_a_copy_that_is_refused_loses_nothing(
    s3_site: Site, s3_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_site.settings["SafeReplace"] = "On"
    (s3_site.data / "big").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    (s3_site.data / "big").write_bytes(os.urandom(5000))

    def fail(method: str, path: str, query: dict[str, str], body: bytes | None) -> Any:
        copying = method == "PUT" and body is None
        return (403, "AccessDenied", "no copies") if copying else None

    s3_server.fail = fail
    assert s3_site.run("-f") == 3
    said = capsys.readouterr().err
    assert "Could not put the new backup in its place; it waits beside it" in said
    assert "AccessDenied" in said
    ((name, archive),) = s3_site.archives().items()
    assert archive.complete and archive.staged
    # The next run cannot place it either, and must not write over the only one there is.
    assert s3_site.run("-f") == 1
    assert s3_site.archives()[name].metadata == archive.metadata
    s3_server.fail = None
    assert s3_site.run("-f") == 0
    assert s3_site.archives()[name].complete and not s3_site.archives()[name].staged


def test_a_bad_copy_is_found_out(
    safe_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(self: s3napback.FolderStore, source: str, target: str) -> None:
        data, metadata = fetched(self, source)
        self.put(target, bytes(reversed(data)), metadata)

    monkeypatch.setattr(s3napback.FolderStore, "copy", copy)
    assert safe_site.run("-f") == 3
    assert "was not copied as it was stored" in capsys.readouterr().err
    (archive,) = safe_site.archives().values()
    assert archive.complete and archive.staged


def test_staged_chunks_lie_in_the_standard_class(s3_site: Site, s3_server: Any) -> None:
    """Others cost for months what is there for minutes, or cannot be copied from."""
    s3_site.settings |= {"SafeReplace": "On", "StorageClass": "STANDARD_IA"}
    (s3_site.data / "big").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    classes: set[tuple[bool, str]] = set()

    def look(method: str, path: str, query: dict[str, str], body: bytes | None) -> None:
        for item in s3napback.iter_objects(s3_site.store()) if method == "POST" else ():
            classes.add((s3napback.is_staged(item.key), item.storage_class))

    s3_server.fail = look
    assert s3_site.run("-f") == 0
    s3_server.fail = None
    assert (True, "STANDARD") in classes and (True, "STANDARD_IA") not in classes
    assert {i.storage_class for i in s3napback.iter_objects(s3_site.store())} == {"STANDARD_IA"}


def test_etags_that_are_no_md5(s3_server: Any) -> None:
    """Objects under a KMS key have ETags of 32 hex digits that are no MD5."""
    digits = ["0" * 32, "1" * 32]
    objects = [StoredObject(f"a:{n:013d}", 10, digits[n], 0.0) for n in range(2)]
    marks = {"archive": "x", "chunks": "2", "bytes": "20", "md5": "f" * 32}
    metadata = {s3napback.META + name: value for name, value in marks.items()}
    torn = s3napback.resolve_archive("a", objects, lambda key: metadata)
    assert torn and "not those that were uploaded together" in torn.fault
    told = {**metadata, s3napback.ETAG_IS_NOT_MD5: "yes"}
    whole = s3napback.resolve_archive("a", objects, lambda key: told)
    assert whole and whole.complete
    link = s3napback.ArchiveRef("a", "x")
    assert link.find(objects, lambda key: {**metadata, s3napback.ETAG_IS_NOT_MD5: "yes"})
    assert not s3napback.ArchiveRef("a", "y").find(objects, lambda key: metadata)


# ---- chains ----


def nights(site: Site, count: int) -> datetime:
    """A FULL and DIFFs of the nights before; the night after them."""
    start = datetime(2026, 11, 20, 3, 0, tzinfo=timezone.utc)  # slot 15: with -f any mode will do
    site.settings["Phase"] = ""
    for n in range(count):
        (site.data / f"night{n}").write_text(str(n))
        assert site.run(now=start + timedelta(days=n)) == 0
    return start + timedelta(days=count)


def newest(site: Site) -> Archive:
    ours = [archive for archive in site.archives().values() if archive.metadata]
    return max(ours, key=lambda archive: archive.modified)


def test_a_diff_continues_what_is_whole(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    night = nights(site, 3)
    assert site.run(now=night) == 0
    assert not newest(site).metadata["state"].startswith("-:")
    assert "everything is stored" not in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["first", "middle", "last", "all", "chunk", "replaced"])
def test_a_diff_whose_chain_is_torn_is_self_contained(
    site: Site, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.data / "big").write_bytes(os.urandom(3000))  # the first archive has some chunks
    night = nights(site, 3)
    store = site.store()
    by_date = sorted(site.archives().values(), key=lambda archive: archive.modified)
    gone = {"first": by_date[:1], "middle": by_date[1:2], "last": by_date[2:], "all": by_date}
    for archive in gone.get(lost, ()):
        store.delete([item.key for item in archive.chunks])
    if lost == "chunk":
        store.delete([by_date[0].chunks[1].key])
    if lost == "replaced":  # another machine wrote there
        key = by_date[1].chunks[0].key
        root = s3napback.folder_root(site.settings["S3Endpoint"])
        s3napback.FolderStore(str(root), "bkt", lambda: 1e9).put(key, b"other", {})  # long ago
    assert site.run(now=night) == 3
    said = capsys.readouterr().err
    assert "is not whole in the bucket; everything is stored in it" in said
    archive = newest(site)
    assert archive.metadata["state"].startswith("-:")
    names = files(site.content(archive.name))
    assert {"file", "night0", "night1", "night2"} <= {os.path.basename(name) for name in names}
    # From here on there is a chain again.
    assert site.run(now=night + timedelta(days=1)) == 0
    back = site.folder / "back"
    words = ["restore", "-c", str(site.write()), str(site.data), "--to", str(back)]
    assert s3napback.main(words) == 0
    assert (back / str(site.data)[1:] / "file").read_text() == "one"


@pytest.mark.parametrize("notes", ["none", "damaged", "empty"])
def test_a_diff_file_without_notes_is_not_continued(
    site: Site, notes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the Perl script's, as far as anyone can tell."""
    night = nights(site, 3)
    (path,) = (site.folder / "diffs").glob(".s3napback-*.chain")
    if notes == "none":
        path.unlink()
    else:
        path.write_text('{"states": [{"links": [[1, 2]]' if notes == "damaged" else "{}")
    assert site.run(now=night) == 0
    assert "the diff file is the Perl script's: everything is stored in it, once" in (
        capsys.readouterr().err
    )
    assert newest(site).metadata["state"].startswith("-:")
    assert site.run(now=night + timedelta(days=1)) == 0
    assert not newest(site).metadata["state"].startswith("-:")


def test_a_diff_file_that_another_wrote_since_is_not_continued(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Perl script, for one night more."""
    night = nights(site, 3)
    (diff_file,) = site.diff_files()
    (site.data / "lost").write_text("in no archive")
    subprocess.run(["tar", "-g", diff_file, "-cf", "/dev/null", site.data], capture_output=True)
    assert site.run(now=night) == 3
    assert "not the one that the last backup left" in capsys.readouterr().err
    assert any(name.endswith("/lost") for name in files(site.content(newest(site).name)))


def test_a_run_that_ends_between_the_notes_and_the_diff_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes tell of both."""
    night = nights(site, 3)

    def ended(*_: Any) -> None:
        raise s3napback.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(s3napback.Draft, "keep", ended)
        assert site.run(now=night) == 143
    of_the_ended = newest(site)
    assert site.run(now=night) == 0  # done today
    assert site.run(now=night + timedelta(days=1)) == 0
    before = of_the_ended.metadata["state"].partition(":")[0]
    assert newest(site).metadata["state"].partition(":")[0] == before != "-"


def test_a_diff_in_the_place_of_its_predecessor_holds_everything(site: Site) -> None:
    night = nights(site, 2) - timedelta(days=1)
    before = newest(site).name
    assert site.run("-f", now=night + timedelta(hours=1)) == 0
    archive = newest(site)
    assert archive.name == before
    assert archive.metadata["state"].startswith("-:")


def test_a_forced_run_that_ends_before_its_state_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new archive may have the very bytes of the one that DiffDir still tells of."""
    site.settings["Compressor"] = '"gzip -n"'  # without the time of day
    # Read once, a file and a folder keep their access times, which tar stores as well.
    subprocess.run(["tar", "-cf", "-", site.data], capture_output=True)
    assert site.run(now=NIGHT) == 0
    night = NIGHT + timedelta(days=1)
    ((name, _),) = site.archives().items()
    before = site.content(name)

    def ended(*_: Any) -> None:
        raise s3napback.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(s3napback.State, "keep_chain", ended)
        assert site.run("-f", now=night - timedelta(hours=23)) == 143
    assert site.content(name) == before
    assert site.run(now=night) == 3  # what DiffDir tells of is gone, so all is stored
    back = site.folder / "back"
    words = ["restore", "-c", str(site.write()), str(site.data), "--to", str(back)]
    assert s3napback.main(words) == 0
    assert (back / str(site.data)[1:] / "file").read_text() == "one"


def test_a_snapshot_that_is_cut_short_is_not_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tool(
        site, monkeypatch, "tar",
        '"$REAL" "$@"; for word; do case "$word" in */.s3napback-*) '
        'echo "tar: $word: Cannot write: No space left on device" >&2;; esac; done; exit 2',
    )
    assert site.run() == 1
    assert "(make room in DiffDir)" in capsys.readouterr().err
    assert not site.archives()
    assert not site.diff_files()


def test_a_chain_among_more_keys_than_a_page(s3_site: Site, s3_server: Any) -> None:
    night = nights(s3_site, 2)
    first = min(s3_site.archives().values(), key=lambda archive: archive.modified).name
    for n in range(1100):  # another source whose name begins alike
        s3_server._backend.put_object("bkt", f"{s3_site.data}--{n}-FULL:{0:013d}", b"x")
    s3_server.requests.clear()
    assert s3_site.run(now=night) == 0
    assert len([path for method, path in s3_server.requests if method == "GET"]) == 6
    store = s3_site.store()
    store.delete([item.key for item in s3napback.archive_objects(store, first)])
    assert s3_site.run(now=night + timedelta(days=1)) == 3


def test_a_repository_whose_chain_is_torn(
    site: Site, svn_repo_factory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = svn_repo_factory(site.folder / "repo", 2)
    site.jobs = f"Subversion {repository}"
    night = NIGHT - timedelta(days=2)
    assert site.run(now=night) == 0
    svn_repo_factory(repository, 1)
    (archive,) = site.archives().values()
    site.store().delete([item.key for item in archive.chunks])
    capsys.readouterr()
    assert site.run(now=night + timedelta(days=1)) == 3
    assert "everything is stored in it" in capsys.readouterr().err
    (archive,) = site.archives().values()
    assert archive.metadata["state"] == "0:3"
    back = site.folder / "back"
    words = ["restore", "-c", str(site.write()), str(repository), "--to", str(back)]
    assert s3napback.main(words) == 0
    assert run(["svnlook", "youngest", str(back)]).strip() == "3"


# ---- the last FULL ----


def full_nights(site: Site) -> list[datetime]:
    """Two nights of two FULL slots, and the next one of the first slot."""
    site.jobs = f"<Directory {site.data}>\nFulls 2\nDiffs 0\n</Directory>"
    (site.data / "big").write_bytes(os.urandom(5000))
    start = datetime(2026, 11, 20, 3, 0, tzinfo=timezone.utc)
    return [start + timedelta(days=n) for n in range(3)]


def test_the_loss_of_the_last_full_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = full_nights(site)
    assert site.run(now=first) == 0
    assert site.run(now=second) == 0
    assert "last complete full backup" not in capsys.readouterr().err
    of_second = newest(site)
    site.store().delete([item.key for item in of_second.chunks[:1]])
    # Later than the first chunk is in hand: what is known to have failed before replaces nothing.
    fake_tool(site, monkeypatch, "pigz", '"$REAL" "$@"; sleep 1; exit 1')
    assert site.run(now=third) == 1
    said = capsys.readouterr().err
    assert "is the last complete full backup of" in said
    assert f"No complete full backup of {site.data} is left in the bucket" in said


def test_a_failing_night_with_another_full_is_just_that(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = full_nights(site)
    assert site.run(now=first) == 0
    assert site.run(now=second) == 0
    fake_tool(site, monkeypatch, "pigz", '"$REAL" "$@"; exit 1')
    assert site.run(now=third) == 1
    said = capsys.readouterr().err
    assert "complete full backup" not in said
    assert "Backup to" in said


# ---- waiting, and what it waits for ----


def test_a_dump_that_waits_for_the_bucket_is_named(
    s3_site: Site, s3_server: Any, mariadb: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(s3napback, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(s3napback, "_MAX_PAUSE", 0.1)
    monkeypatch.setattr(s3napback, "_PATIENCE_OF_SOURCES", 0.05)
    s3_site.settings["RetryHours"] = "1"
    job = f"<MySQL {mariadb.socket}:mysql>\nUseTempFile {{}}\n</MySQL>"
    for use, advised in (("0", 1), ("1", 0)):
        s3_site.jobs = job.format(use)
        left = [20]

        def fail(
            method: str, path: str, *_: Any, left: list[int] = left
        ) -> tuple[int, str, str] | None:
            storing = method == "PUT" and path.count("/") > 1
            left[0] -= storing
            return (503, "SlowDown", "") if storing and left[0] >= 0 else None

        s3_server.fail = fail
        assert s3_site.run("-f") == 0
        said = capsys.readouterr().err
        assert "trying again in" in said
        assert said.count("UseTempFile for this job avoids that") == advised


def test_credentials_that_expire_are_fetched_anew(
    s3_site: Site, s3_server: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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


def test_a_bucket_elsewhere_ends_at_once(
    s3_site: Site, s3_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_site.settings["RetryHours"] = "1"
    s3_server.fail = lambda *_: (301, "PermanentRedirect", "use the endpoint of the bucket")
    assert s3_site.run() == 1
    assert "the bucket is in another region: set S3Region" in capsys.readouterr().err


def test_a_gpg_that_does_not_work(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.settings["GpgRecipient"] = gpg_home.recipient
    fake_tool(site, monkeypatch, "gpg", "exit 9")
    assert site.run() == 2
    assert "gpg does not work: Error invoking gpg: 9" in capsys.readouterr().err


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
        [sys.executable, s3napback.__file__, "-c", str(s3_site.write())],
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
