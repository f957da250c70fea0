"""Backups for real: real tools, real S3 over HTTP, and what happens when something goes wrong.

Only time is made up (`now`), and failures (a stage that dies is a real process that dies).
"""

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    NIGHT,
    START,
    Capture,
    Site,
    bad_compressor,
    fake_tool,
    files,
    newest,
    nights,
    run,
)

import s3napback
from s3napback import Buffer, Failure, StoredObject


def name_of(site: Site, end: str) -> str:
    return f"{site.data}-{end}"


# ---- what is stored ----


def test_a_directory_is_stored_full_and_then_as_a_diff(site: Site) -> None:
    assert site.run(now=NIGHT - timedelta(days=2)) == 0
    (site.data / "new").write_text("two")
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    full, diff = name_of(site, "16-FULL"), name_of(site, "17-DIFF")
    assert set(site.archives()) == {full, diff} or set(site.archives()) == set(site.archives())
    archives = sorted(site.archives().values(), key=lambda a: a.modified)
    assert [a.metadata["kind"] for a in archives] == ["Directory"] * 2
    assert [a.metadata["status"] for a in archives] == ["ok"] * 2
    before, _, after = archives[0].metadata["state"].partition(":")
    assert before == "-"
    assert archives[1].metadata["state"].partition(":")[0] == after
    (diff_file,) = site.diff_files()
    digest = hashlib.sha256(diff_file.read_bytes()).hexdigest()
    assert archives[1].metadata["state"].endswith(f":{digest}")
    assert diff_file.stat().st_mtime == (NIGHT - timedelta(days=1)).timestamp()
    assert stat.S_IMODE(diff_file.stat().st_mode) == 0o600
    assert archives[0].metadata["made"] == s3napback.Moment.of(NIGHT - timedelta(days=2)).utc_text()
    names = files(site.content(archives[1].name))
    assert any(name.endswith("/new") for name in names)
    assert not any(name.endswith("/file") for name in names)


def test_a_repository_that_was_replaced_is_saved_whole(
    site: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    repo = svn_repo_factory(site.folder / "repo", 3)
    site.jobs = f"Subversion {repo}"
    site.run()
    shutil.rmtree(repo)
    svn_repo_factory(repo, 1)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert "it was replaced; all of it is saved" in capsys.readouterr().err
    assert {a.metadata["state"] for a in site.archives().values()} == {"0:3", "0:1"}


# ---- done today ----


def test_a_second_run_of_the_day_does_nothing(site: Site, capsys: Capture) -> None:
    site.run()
    before = site.state()
    assert site.run(now=NIGHT + timedelta(hours=3)) == 0
    assert site.state() == before
    said = capsys.readouterr().err
    assert f"Skipping {site.data}; diff was already performed today" in said
    assert "Finished: 0 stored, 1 skipped, 0 failed" in said


def test_only_a_complete_archive_makes_a_day_done(site: Site, mariadb: Any) -> None:
    site.settings["ChunkSize"] = "100000"
    site.jobs = f"MySQL {mariadb.socket}:mysql"
    now = datetime.now()
    assert site.run(now=now) == 0
    ((name, archive),) = site.archives().items()
    before = archive.metadata["archive"]
    assert site.run(now=now) == 0
    assert site.archives()[name].metadata["archive"] == before  # skipped
    site.store().delete([archive.chunks[1].key])
    assert not site.archives()[name].complete
    assert site.run(now=now) == 0
    assert site.archives()[name].complete  # made again


def test_a_forced_run_stores_what_is_done_already(site: Site) -> None:
    site.run()
    ((name, archive),) = site.archives().items()
    assert site.run("-f") == 0
    assert site.archives()[name].metadata["archive"] != archive.metadata["archive"]


# ---- things that go wrong ----


def test_one_job_fails_and_the_others_still_run(site: Site) -> None:
    site.jobs = f"Directory {site.folder}/absent {site.data}"
    assert site.run() == 1
    assert [a.complete for a in site.archives().values()] == [True]


def test_a_directory_that_is_not_there_stores_nothing(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.folder}/absent"
    assert site.run() == 1
    assert f"directory {site.folder}/absent does not exist (mount it" in capsys.readouterr().err
    assert not site.archives()


def has_data(pid: int, folder: Path) -> bool:
    """Whether 1,000 bytes are in a file of the folder, or in one without a name that is open."""
    for path in (*folder.rglob("*"), *Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(OSError):  # gone by now
            if folder in path.resolve().parents and path.is_file() and path.stat().st_size >= 1000:
                return True
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("temp", [False, True])
def test_a_signal_ends_a_run_and_leaves_nothing(site: Site, signum: int, temp: bool) -> None:
    (site.data / "big").write_bytes(os.urandom(100_000))
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    site.settings["Compressor"] = bad_compressor(site.folder, "head -c 3000; sleep 60")
    process = subprocess.Popen(
        [sys.executable, START, "-d", "-c", str(site.write())],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # What runs the tests in the background, or under nohup, may have it ignored.
        preexec_fn=partial(signal.signal, signum, signal.SIG_DFL),
    )
    wanted = "temp" if temp else "buckets"
    deadline = time.monotonic() + 30
    while not has_data(process.pid, site.folder / wanted):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, said
    assert f"Ended by {signal.Signals(signum).name}" in said
    assert "Traceback" not in said
    assert not site.archives()
    assert not list((site.folder / "temp").iterdir())
    assert not list((site.folder / "diffs").iterdir())
    left = subprocess.run(["pgrep", "-f", str(site.folder)], capture_output=True, text=True)
    assert left.stdout == ""


# ---- gpg ----


# ---- the call ----


def test_requests_grow_with_todays_jobs_only(s3_site: Site, s3_server: Any) -> None:
    """The same requests for a bucket of a few objects and of thousands."""
    counts = []
    for day, others in enumerate((0, 0, 2500)):
        for n in range(others):
            s3_server._backend.put_object("bkt", f"/other-{n}-FULL:{0:013d}", b"x")
        s3_server.requests.clear()
        assert s3_site.run(now=NIGHT + timedelta(days=day)) == 0
        counts.append(len(s3_server.requests))
    assert counts[2] == counts[1] <= 6


# ---- the last FULL ----


def full_nights(site: Site) -> list[datetime]:
    """Two nights of two FULL slots, and the next one of the first slot."""
    site.jobs = f"<Directory {site.data}>\nFulls 2\nDiffs 0\n</Directory>"
    (site.data / "big").write_bytes(os.urandom(5000))
    start = datetime(2026, 11, 20, 3, 0, tzinfo=timezone.utc)
    return [start + timedelta(days=n) for n in range(3)]


def test_the_loss_of_the_last_full_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
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
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    first, second, third = full_nights(site)
    assert site.run(now=first) == 0
    assert site.run(now=second) == 0
    fake_tool(site, monkeypatch, "pigz", '"$REAL" "$@"; exit 1')
    assert site.run(now=third) == 1
    said = capsys.readouterr().err
    assert "complete full backup" not in said
    assert "Backup to" in said


def test_a_bucket_that_cannot_be_asked_about_fulls(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not known is not told."""
    site.jobs = f"<Directory {site.data}>\nFulls 2\nDiffs 0\n</Directory>"
    (site.data / "big").write_bytes(os.urandom(5000))
    assert site.run() == 0
    real = s3napback.FolderStore.iter_objects

    def iter_objects(self: Any, prefix: str = "") -> Any:
        if prefix.endswith("-"):
            raise Failure("not now")
        return real(self, prefix)

    monkeypatch.setattr(s3napback.FolderStore, "iter_objects", iter_objects)
    assert site.run("-f") == 0
    assert "last complete full backup" not in caplog.text


# ---- what is asked of the bucket ----


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


def test_a_repository_whose_chain_is_torn_is_stored_whole(
    site: Site, svn_repo_factory: Any, capsys: Capture
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
    assert site.restore(back, name=repository) == 0
    assert run(["svnlook", "youngest", str(back)]).strip() == "3"


@pytest.mark.slow
def test_a_dump_that_waits_for_the_bucket_is_named(
    s3_site: Site, s3_server: Any, mariadb: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(s3napback, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(s3napback, "_MAX_PAUSE", 0.1)
    monkeypatch.setattr(s3napback, "_PATIENCE_OF_SOURCES", 0.05)
    s3_site.settings |= {"RetryHours": "1", "ChunkSize": "20000"}
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


class Crowd(s3napback.FolderStore):
    """A bucket with a million objects besides its own, which exist when they are listed."""

    others = 0
    asked = 0

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        Crowd.asked += 1
        own = list(super().iter_objects(prefix))
        if not "/other-".startswith(prefix) or (own and own[0].key < "/other-"):
            yield from own
            return
        for n in range(self.others):
            Crowd.asked += n % s3napback.PAGE == 0 and n > 0
            yield StoredObject(f"/other-{n:07}-0-FULL:0000000000000", 1, "0" * 32, 0.0)

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


@pytest.mark.slow
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
    listed = sum(1 for _ in site.store().iter_objects())
    assert listed >= 1_000_000  # so the crowd is there for who asks for it


# ---- plans and summaries ----

TODAY = NIGHT.date()
KNOWN = s3napback.Sidecar("p", "here", (s3napback.ArchiveRef("/a-3-DIFF", "x"),), ("*.o",))
RUN: Any = SimpleNamespace(
    place="here", today=TODAY, settings=SimpleNamespace(prefix=""),
    options=SimpleNamespace(force=False),
)


def planned(facts: s3napback.Facts, *, mode: str = "DIFF", kind: str = "Directory") -> Any:
    job = s3napback.Job(kind, "/a", "conf:1", False, s3napback.CycleSpec(), excludes=("*.o",))
    return s3napback.plan_archive(RUN, s3napback.Plan(job, kind, "/a", mode), 4, facts)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (s3napback.Facts((), TODAY), "the Perl script's"),
        (s3napback.Facts((KNOWN,), TODAY, "q"), "not the one that the last backup left"),
        (s3napback.Facts((replace(KNOWN, place="there"),), TODAY, "p"), "another bucket (there)"),
        (s3napback.Facts((KNOWN,), TODAY, "p", is_ahead=True), "the clock was ahead"),
        (s3napback.Facts((replace(KNOWN, excludes=()),), TODAY, "p"), "its Excludes are not"),
    ],
)
def test_what_a_diff_cannot_continue_makes_it_hold_everything(
    facts: s3napback.Facts, why: str
) -> None:
    plan = planned(facts)
    assert plan.archive == "/a-4-DIFF"
    assert plan.self_contained
    assert why in plan.notice[1]


def test_a_diff_continues_the_backup_whose_diff_file_is_there() -> None:
    older = replace(KNOWN, position="o")
    plan = planned(s3napback.Facts((KNOWN, older), TODAY - timedelta(days=1), "o"))
    assert plan.sidecar == older
    assert not plan.self_contained
    assert not plan.todays
    assert planned(s3napback.Facts((KNOWN,), TODAY, "p")).todays == KNOWN.archives[0]


def test_a_repository_is_stored_from_the_revision_after_the_last_one() -> None:
    known = replace(KNOWN, position="41")
    plan = planned(s3napback.Facts((known,), TODAY, "41", youngest=42), kind="Subversion")
    assert (plan.archive, plan.revisions) == ("/a-4-DIFF", (42, 42))
    plan = planned(s3napback.Facts((), None, "", youngest=42), kind="Subversion")
    assert (plan.archive, plan.revisions) == ("/a-4-FULL", (0, 42))
    plan = planned(s3napback.Facts((known,), TODAY, "41", youngest=41), kind="Subversion")
    assert plan.has_nothing_new


def outcome(status: str, size: int = 0) -> s3napback.Outcome:
    return s3napback.Outcome("Directory", "/a", "/a-0-FULL", status, bytes=size)


@pytest.mark.parametrize(
    ("outcomes", "text", "status"),
    [
        ([], "0 stored, 0 skipped, 0 failed; 0 bytes in 3.0 s", 0),
        ([outcome("ok", 7), outcome("skipped")],
         "1 stored, 1 skipped, 0 failed; 7 bytes in 3.0 s", 0),
        ([outcome("warnings", 7)],
         "1 stored (1 with warnings), 0 skipped, 0 failed; 7 bytes in 3.0 s", 3),
        ([outcome("warnings", 7), outcome("failed")],
         "1 stored (1 with warnings), 0 skipped, 1 failed; 7 bytes in 3.0 s", 1),
    ],
)
def test_the_closing_line_and_the_exit_status_follow_from_the_outcomes(
    outcomes: list[s3napback.Outcome], text: str, status: int
) -> None:
    assert s3napback.summary(outcomes, 3.0) == (text, status)



def test_a_run_reports_what_became_of_every_archive(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    run_watched = s3napback.run_watched

    def keep(path: str, options: s3napback.RunOptions) -> s3napback.RunReport:
        reports.append(run_watched(path, options))
        return reports[-1]

    monkeypatch.setattr(s3napback, "run_watched", keep)
    site.jobs = f"Directory {site.data}\nDirectory /nonexistent\nSubversion /nonexistent"
    assert site.run() == 1
    site.jobs = f"Directory {site.data}"
    assert site.run() == 0
    assert site.run("-f", "-t") == 0
    site.settings["Bucket"] = "no/bucket"
    assert site.run() == 2

    first, second, shown, bad = reports
    stored, absent, unreadable = first.outcomes
    assert (stored.kind, stored.name, stored.status) == ("Directory", str(site.data), "ok")
    assert stored.archive.startswith(f"{site.data}-")
    assert (stored.bytes > 0, stored.seconds > 0, stored.error) == (True, True, "")
    assert (absent.status, absent.bytes) == ("failed", 0)
    assert "directory /nonexistent does not exist" in absent.error
    assert (unreadable.kind, unreadable.archive, unreadable.status) == ("Subversion", "", "failed")
    assert (first.status, first.error) == (1, "")
    assert first.seconds >= sum(one.seconds for one in first.outcomes)
    assert [one.status for one in second.outcomes] == ["skipped"]
    assert [one.status for one in shown.outcomes] == ["shown"]
    assert (bad.status, bad.outcomes) == (2, ())
    assert "no/bucket is not a bucket's name" in bad.error
