"""Done today: a complete archive of today's run, of this host, in this config's bucket."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, files, leave_out

import s3napback

MIDNIGHT = datetime(2026, 11, 20, 23, 59, 59)
DUMP = "<MySQL db>\nFulls 1\n</MySQL>"


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(s3napback.__file__).parent)}


def run_at(site: Site, now: datetime, *words: str) -> list[str]:
    """The command of a run in a process of its own."""
    code = (
        "import sys; from datetime import datetime; import s3napback;"
        "sys.exit(s3napback.main(sys.argv[2:], now=datetime.fromisoformat(sys.argv[1])))"
    )
    return [sys.executable, "-c", code, now.isoformat(), *words, "-c", str(site.write())]


def on_host(site: Site, host: str, now: datetime, *words: str) -> subprocess.CompletedProcess[str]:
    """A run on another machine: a real host name of its own."""
    argv = ["sh", "-c", f'hostname {host} && exec "$@"', "sh", *run_at(site, now, *words)]
    done = subprocess.run(["unshare", "--uts", *argv], env=env(), capture_output=True, text=True)
    if "unshare failed" in done.stderr:
        leave_out("another host name needs root")
    return done


def second_machine(site: Site) -> Site:
    """Another machine with the same names and the same bucket."""
    other = site.folder / "second"
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    machine = Site(other)
    machine.data, machine.jobs = site.data, site.jobs
    shutil.rmtree(other / "data")
    for name in ("S3Endpoint", "ChunkSize"):
        machine.settings[name] = site.settings[name]
    return machine


def dump(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mysqldump", "mariadb-dump"):
        fake_tool(site, monkeypatch, name, "date +%N; echo '-- Dump completed'")


@pytest.mark.slow
def test_a_second_machine_on_the_bucket_is_told_who_the_first_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(site, monkeypatch)
    site.jobs = f"Directory {site.data}\n{DUMP}"
    assert on_host(site, "web1", NIGHT).returncode == 0
    before = site.state()
    second = second_machine(site)
    done = on_host(second, "web2", NIGHT + timedelta(hours=1))
    assert done.returncode == 1
    assert done.stderr.count("the host web1 stored an archive of this name today") == 2
    assert done.stderr.count("a Bucket of its own, or a Prefix") == 2
    assert "-- already done" not in done.stderr
    assert {name: data for name, data in site.state().items() if name in before} == before
    check = on_host(second, "web2", NIGHT + timedelta(hours=1), "check")
    assert check.returncode == 1
    assert "is of the host web1, which stores in this bucket, too" in check.stdout
    # The first one is done, as ever.
    assert "already done today" in on_host(site, "web1", NIGHT + timedelta(hours=2)).stderr
    # With a Prefix, or -f.
    second.settings["Prefix"] = "web2"
    assert on_host(second, "web2", NIGHT + timedelta(hours=1)).returncode == 0
    second = second_machine(site)
    done = on_host(second, "web2", NIGHT + timedelta(hours=1), "-f")
    assert done.returncode == 0, done.stderr
    assert {a.metadata["host"] for n, a in site.archives().items() if "web2" not in n} == {"web2"}


@pytest.mark.slow
def test_another_hosts_archive_of_an_earlier_day_is_replaced_with_a_warning(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(site, monkeypatch)
    site.jobs = DUMP
    assert on_host(site, "web1", NIGHT).returncode == 0
    second = second_machine(site)
    check = on_host(second, "web2", NIGHT + timedelta(days=1), "check")
    assert "warning  MySQL db: MySQL/db-0 is of the host web1" in check.stdout
    done = on_host(second, "web2", NIGHT + timedelta(days=1))
    assert done.returncode == 3
    assert done.stderr.count("replaces an archive of the host web1") == 1
    assert done.stderr.count(" WARN") == 1
    assert site.archives()["MySQL/db-0"].metadata["host"] == "web2"
    assert on_host(second, "web2", NIGHT + timedelta(days=2)).returncode == 0


def test_another_hosts_archive_stays_an_error_where_run_before_is_to_run(site: Site) -> None:
    """RunBefore may bring a source; it does not take another machine out of the bucket."""
    assert on_host(site, "web1", NIGHT).returncode == 0
    second = second_machine(site)
    second.jobs = f"<Directory {site.data}>\nRunBefore true\n</Directory>"
    check = on_host(second, "web2", NIGHT + timedelta(hours=1), "check")
    assert check.returncode == 1
    assert f"error    Directory {site.data}: " in check.stdout


@pytest.mark.slow
def test_a_dump_that_starts_before_midnight_is_made_every_night(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("mysqldump", "mariadb-dump"):  # the job before it takes some seconds
        fake_tool(site, monkeypatch, name, "sleep 1.2; date +%N")
    site.jobs = "<MySQL first>\nFulls 1\n</MySQL>\n" + DUMP
    contents = []
    for n in range(3):
        assert site.run(now=MIDNIGHT + timedelta(days=n)) == 0
        contents.append(site.content("MySQL/db-0"))
        day = site.archives()["MySQL/db-0"].metadata["day"]
        assert day == (MIDNIGHT + timedelta(days=n)).date().isoformat()
    assert len(set(contents)) == 3
    assert "-- already done" not in capsys.readouterr().err
    assert site.run(now=MIDNIGHT + timedelta(days=2, milliseconds=500)) == 0  # done on that day
    assert "already done today" in capsys.readouterr().err


def test_a_directory_that_starts_before_midnight_is_made_every_night(site: Site) -> None:
    for n in range(3):
        (site.data / "file").write_text(f"{n}")
        assert site.run(now=MIDNIGHT + timedelta(days=n)) == 0
    assert len(site.archives()) == 3


@pytest.mark.parametrize("job", ["Directory", "MySQL"])
def test_a_frequency_of_a_year_is_due_every_year(
    site: Site, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(site, monkeypatch)
    name = site.data if job == "Directory" else "db"
    site.jobs = f"<{job} {name}>\nFrequency 365\nFulls 1\nDiffs 0\n</{job}>"
    made = []
    for year in (2026, 2027):
        assert site.run(now=datetime(year, 1, 1, 3)) == 0
        ((_, archive),) = site.archives().items()
        made.append(archive.metadata["made"][:4])
    assert made == ["2026", "2027"]


@pytest.mark.parametrize("phase", [-1, 1])
def test_a_phase_makes_every_day_a_backup_day(site: Site, phase: int) -> None:
    """The original compares the diff file's day of the year with today's plus Phase."""
    site.jobs = f"<Directory {site.data}>\nPhase {phase}\n</Directory>"
    for n in range(4):
        assert site.run(now=NIGHT + timedelta(days=n)) == 0
    assert len(site.archives()) == 4


def test_only_an_archive_in_the_bucket_makes_a_day_done(site: Site, capsys: Capture) -> None:
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    assert site.run() == 0
    name = f"{site.data}-18-DIFF"
    assert site.run(now=NIGHT + timedelta(hours=1)) == 0
    assert "diff was already performed today" in capsys.readouterr().err
    site.store().delete([item.key for item in site.archives()[name].chunks])  # a lifecycle rule
    assert site.run(now=NIGHT + timedelta(hours=15)) == 3
    said = capsys.readouterr().err
    assert "already performed" not in said
    assert f"{name}, which it continues, is not whole in the bucket" in said
    assert any(path.endswith("/file") for path in files(site.content(name)))


def test_a_repository_without_new_revisions_is_stored_if_the_bucket_lost_it(
    site: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    repository = svn_repo_factory(site.folder / "repo", 2)
    site.jobs = f"Subversion {repository}"
    assert site.run() == 0
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert "has no new revisions" in capsys.readouterr().err
    (archive,) = site.archives().values()
    site.store().delete([item.key for item in archive.chunks])
    assert site.run(now=NIGHT + timedelta(days=2)) == 3
    assert "not whole in the bucket" in capsys.readouterr().err
    (archive,) = site.archives().values()
    assert archive.metadata["state"] == "0:2"


# ---- the names of diff files, and whose they are ----


def two_names(site: Site) -> tuple[Path, Path]:
    first, second = site.folder / "web" / "logs", site.folder / "web_logs"
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    site.jobs = f"Directory {first}\nDirectory {second}"
    return first, second


def restored(site: Site, name: Path) -> dict[str, str]:
    back = site.folder / "back"
    shutil.rmtree(back, ignore_errors=True)
    words = ["restore", "-c", str(site.write()), str(name), "--to", str(back)]
    assert s3napback.main(words) == 0
    return {p.name: p.read_text() for p in (back / str(name)[1:]).iterdir()}


def test_two_names_of_one_diff_file_have_each_its_own(site: Site) -> None:
    first, second = two_names(site)
    for n in range(3):
        for folder in (first, second):
            (folder / f"night{n}").write_text(f"{n}")
        assert site.run(now=NIGHT + timedelta(days=n)) == 0
    assert len(site.diff_files()) == 2
    for folder in (first, second):
        assert restored(site, folder) == {p.name: p.read_text() for p in folder.iterdir()}
    # The name of the Perl script goes on for the one that has it, whatever the order.
    owned = site.folder / "diffs" / s3napback.diff_file_name(str(first))
    before = owned.read_bytes()
    site.jobs = f"Directory {second}"
    assert site.run(now=NIGHT + timedelta(days=3)) == 0
    assert owned.read_bytes() == before


def test_a_diff_file_of_another_bucket_is_not_continued(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    # A copy of the bucket under another name.
    shutil.copytree(site.folder / "buckets" / "bkt", site.folder / "buckets" / "other")
    site.settings["Bucket"] = "other"
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert "what it continues is in another bucket (" in capsys.readouterr().err
    assert site.run(now=NIGHT + timedelta(days=2)) == 0
    names = os.listdir(site.folder / "buckets" / "other")
    assert len([name for name in names if "DIFF" in name]) == 3


@pytest.mark.parametrize("change", ["Bucket", "disk", "Prefix"])
def test_a_bucket_that_is_not_there_any_more_is_told(
    site: Site, change: str, capsys: Capture
) -> None:
    assert site.run() == 0
    if change == "disk":
        shutil.rmtree(site.folder / "buckets" / "bkt")
    else:
        site.settings[change] = "other"
    (site.data / "new").write_text("new")
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert "everything is stored in it" in capsys.readouterr().err
    if change != "Bucket":
        ((_, archive), *_) = sorted(site.archives().items(), key=lambda one: -one[1].modified)
        assert archive.metadata["state"].startswith("-:")


def test_a_bucket_that_is_gone_is_told_on_the_night_of_a_full_too(
    site: Site, capsys: Capture
) -> None:
    full = datetime(2026, 11, 26, 3)
    assert site.run(now=full - timedelta(days=1)) == 0
    shutil.rmtree(site.folder / "buckets" / "bkt")
    assert site.run(now=full) == 3
    assert "the bucket was there before" in capsys.readouterr().err


def test_one_passing_404_breaks_no_chain(s3_site: Site, s3_server: Any) -> None:
    assert s3_site.run() == 0
    answered: list[str] = []

    def once(method: str, path: str, query: dict[str, str], body: bytes | None) -> Any:
        if path.strip("/") == "bkt" and not answered:
            answered.append(method)
            return 404, "NoSuchBucket", "The specified bucket does not exist"
        return None

    s3_server.fail = once
    assert s3_site.run(now=NIGHT + timedelta(days=1)) == 0
    s3_server.fail = None
    assert answered
    states = [a.metadata["state"] for a in s3_site.archives().values()]
    assert len([state for state in states if state.startswith("-:")]) == 1


def test_what_a_diff_continues_is_known_by_its_uploads_id(site: Site, capsys: Capture) -> None:
    """Another config stores the same bytes in the same slot, from its own diff file."""
    site.settings["Compressor"] = '"gzip -n"'
    # Read once, a file and a folder keep their access times, which tar stores as well.
    subprocess.run(["tar", "-cf", "-", site.data], capture_output=True)
    assert site.run() == 0
    second = second_machine(site)
    second.settings["Compressor"] = '"gzip -n"'
    before = site.content(f"{site.data}-18-DIFF")
    assert second.run("-f") == 0
    assert site.content(f"{site.data}-18-DIFF") == before
    capsys.readouterr()
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert "is not whole in the bucket" in capsys.readouterr().err
    assert restored(site, site.data) == {"file": "one"}


def test_a_snapshot_from_the_future_is_not_continued(site: Site, capsys: Capture) -> None:
    """The clock was two days ahead when the FULL was made."""
    fake = shutil.which("faketime") or leave_out("faketime is not installed")
    first = subprocess.run([str(fake), "+2 days", *run_at(site, NIGHT)], env=env(),
                           capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    (site.data / "file").write_text("changed")
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert "made when the clock was ahead" in capsys.readouterr().err
    assert restored(site, site.data) == {"file": "changed"}
    assert site.run(now=NIGHT + timedelta(days=2)) == 0


def test_one_directory_in_two_cycles_is_told(site: Site, capsys: Capture) -> None:
    other = site.folder / "other"
    other.mkdir()
    site.jobs = (
        f"<Cycle a>\nDirectory {site.data}\nDirectory {other}\n</Cycle>\n"
        f"<Cycle b>\nFrequency 9\nPhase 1\nDirectory {site.data}\n</Cycle>"
    )
    assert site.run() == 3
    said = capsys.readouterr().err
    assert said.count("writes to the same archives") == 1
    lines = [n for n, line in enumerate(site.conf.read_text().splitlines(), 1)
             if line == f"Directory {site.data}"]
    assert f"{site.conf}:{lines[1]}: the job at {site.conf}:{lines[0]} writes" in said
    assert s3napback.main(["check", "-c", str(site.write())], now=NIGHT) == 1


def test_this_hosts_name_is_on_every_archive(site: Site) -> None:
    assert site.run() == 0
    ((_, archive),) = site.archives().items()
    assert archive.metadata["host"] == socket.gethostname()
    assert archive.metadata["day"] == "2026-11-23"
