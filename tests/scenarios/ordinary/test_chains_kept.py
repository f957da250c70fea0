"""A DIFF continues what it should: no more, no less, and at the price of few requests."""

import itertools
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, require_tool, stage_only

import s3napback

FULL_NIGHT = NIGHT + timedelta(days=3)


def ended(*_: Any) -> None:
    raise s3napback.Interrupted(15)


def fail_once(server: Any) -> list[str]:
    """Makes it say once that there is no bucket; what it was asked then."""
    answered: list[str] = []

    def once(method: str, path: str, query: dict[str, str], body: bytes | None) -> Any:
        if path.strip("/") == "bkt" and not answered:
            answered.append(method)
            return 404, "NoSuchBucket", "The specified bucket does not exist"
        return None

    server.fail = once
    return answered


def test_a_night_without_changes_costs_four_requests(s3_site: Site, s3_server: Any) -> None:
    assert s3_site.run() == 0
    for night in range(1, 6):
        s3_server.requests.clear()
        assert s3_site.run(now=NIGHT + timedelta(days=night)) == 0
        methods = [method for method, _ in s3_server.requests]
        full = night == 3  # its slot is looked at, and that of the FULL before it
        assert methods == (["GET"] * 3 + ["PUT", "GET"] if full else ["GET"] * 2 + ["PUT", "GET"])


def test_a_full_continues_nothing_though_the_bucket_seemed_gone(
    s3_site: Site, s3_server: Any
) -> None:
    """One passing 404 on the night of a FULL; then what was before the FULL is deleted."""
    assert s3_site.run(now=FULL_NIGHT - timedelta(days=1)) == 0
    (before,) = s3_site.archives()
    answered = fail_once(s3_server)
    assert s3_site.run(now=FULL_NIGHT) == 0
    s3_server.fail = None
    assert answered
    store = s3_site.store()
    store.delete([item.key for item in s3napback.archive_objects(store, before)])
    assert s3_site.run(now=FULL_NIGHT + timedelta(days=1)) == 0


def test_two_runs_that_end_between_the_notes_and_the_diff_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.run() == 0
    with monkeypatch.context() as patch:
        patch.setattr(s3napback.Draft, "commit", ended)
        assert site.run(now=NIGHT + timedelta(days=1)) == 143
        assert site.run(now=NIGHT + timedelta(days=2)) == 143
    assert site.run(now=FULL_NIGHT + timedelta(days=1)) == 0
    states = [archive.metadata["state"] for archive in site.archives().values()]
    assert len([state for state in states if state.startswith("-:")]) == 1


@pytest.mark.slow
def test_a_clock_that_is_set_back_hides_no_change(site: Site) -> None:
    """It was ahead by some seconds when the archive was made, and is right again before a file
    changes: which it does at a time that is still to come by tar's snapshot."""
    # Where libfaketime leaves out the monotonic clock, sleep(3) may end with EINVAL.
    code = "import select, sys, time; time.sleep = lambda s: select.select([], [], [], s);"
    code += "sys.path.insert(0, sys.argv.pop(1)); import s3napback as s;"
    code += f"sys.exit(s.main(sys.argv[1:], now={NIGHT.timestamp()}))"
    folder = os.path.dirname(s3napback.__file__)
    (site.data / "large").write_bytes(os.urandom(10_000))
    time.sleep(1.1)
    ahead = [require_tool("faketime"), "--exclude-monotonic", "-f", "+5s"]
    words = [*ahead, sys.executable, "-c", code, folder, "-c", str(site.write())]
    subprocess.run(words, check=True)
    right = time.time() + 5
    (site.data / "file").write_text("changed")
    time.sleep(max(0.0, right + 1 - time.time()))
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    sizes = [archive.size for archive in site.archives().values()]
    assert min(sizes) < max(sizes) - 9000  # the rest is not stored again
    assert (site.restored() / "file").read_text() == "changed"


def test_one_passing_404_before_a_dump_is_no_other_machine(
    s3_site: Site, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tonight's dump is shorter than the one whose place it takes."""
    fake_tool(s3_site, monkeypatch, "pg_dump", f"head -c $(cat {s3_site.folder}/size) /dev/urandom")
    s3_site.jobs = "<Cycle>\nFulls 1\nPostgreSQL shop\n</Cycle>"
    (s3_site.folder / "size").write_text("4500")
    assert s3_site.run() == 0
    (s3_site.folder / "size").write_text("2500")
    answered = fail_once(s3_server)
    assert s3_site.run(now=NIGHT + timedelta(days=1)) == 0
    assert answered
    (archive,) = s3_site.archives().values()
    assert len(archive.chunks) == 3


def test_what_another_job_replaces_tonight_is_not_continued(site: Site) -> None:
    """Two cycles with one directory; if one's upload fails, the other's archive stands."""
    job = "Fulls 1\nDiffs 2\nDirectory"
    site.jobs = (f"<Cycle a>\n{job} {site.data}\n</Cycle>\n"
                 f"<Cycle b>\nFrequency 2\n{job} {site.data}\n</Cycle>")
    for night in range(7):
        (site.data / "file").write_text(f"night {night}")
        site.run(now=NIGHT + timedelta(days=night))
        archives = site.archives()
        ends = {one.metadata["state"].partition(":")[2] for one in archives.values()}
        day = (NIGHT + timedelta(days=night)).date().isoformat()
        tonights = [one for one in archives.values() if one.metadata["day"] == day]
        assert {one.metadata["state"].partition(":")[0] for one in tonights} <= {"-", *ends}


def test_one_staged_archive_of_two_jobs_is_moved_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    site.settings["SafeReplace"] = "On"
    (site.data / "large").write_bytes(os.urandom(3000))
    assert site.run() == 0
    name = stage_only(site)
    staged = site.archives()[name].metadata["archive"]
    copy = s3napback.FolderStore.copy

    calls = itertools.count(1)

    def slow(*words: Any) -> None:
        time.sleep(next(calls) * 0.1)
        copy(*words)

    monkeypatch.setattr(s3napback.FolderStore, "copy", slow)
    site.jobs = f"Directory {site.data}\n<Cycle>\nDirectory {site.data}\n</Cycle>"
    capsys.readouterr()
    assert site.run() == 3
    assert "writes to the same archives" in capsys.readouterr().err
    archive = site.archives()[name]
    assert archive.complete and archive.metadata["archive"] == staged
