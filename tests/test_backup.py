"""Section 12 for real: real tools, real S3 over HTTP, and what happens when something goes wrong.

Only time is made up (`now`), and failures (a stage that dies is a real process that dies).
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, bad_compressor, fake_tool, require_tool, tmpfs

import s3napback


def files(tar: bytes) -> list[str]:
    done = subprocess.run(["tar", "tz"], input=tar, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def name_of(site: Site, end: str) -> str:
    return f"{site.data}-{end}"


# ---- what is stored ----


def test_a_directory_full_then_diff(site: Site) -> None:
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


@pytest.mark.parametrize("how", ["onto a deleted one", "swapped", "in a row"])
def test_directories_that_took_anothers_name_come_back(site: Site, how: str) -> None:
    for name in ("a", "b", "c"):
        (site.data / name / "sub").mkdir(parents=True)
        (site.data / name / "sub" / name).write_text(name)
    assert site.run() == 0
    a, b, c = (site.data / name for name in ("a", "b", "c"))
    if how == "onto a deleted one":
        shutil.rmtree(a)
        b.rename(a)
    else:
        a.rename(site.data / "x")
        b.rename(a)
        if how == "in a row":
            c.rename(b)
        else:
            (site.data / "x").rename(b)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    back = site.folder / "back"
    back.mkdir()
    for archive in sorted(site.archives().values(), key=lambda x: x.modified):
        done = subprocess.run(
            ["tar", "xz", "--listed-incremental=/dev/null", "-C", str(back)],
            input=site.content(archive.name), capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    assert subprocess.run(["diff", "-r", str(site.data), f"{back}{site.data}"]).returncode == 0


@pytest.mark.parametrize("temp", [False, True])
@pytest.mark.parametrize("where", ["folder", "S3"])
def test_encrypted_with_and_without_a_temp_file(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch, temp: bool, where: str,
    request: pytest.FixtureRequest,
) -> None:
    if where == "S3":
        request.getfixturevalue("s3_site")
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    (site.data / "big").write_bytes(os.urandom(5000))
    site.settings["GpgRecipient"] = gpg_home.recipient
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    assert site.run() == 0
    ((name, archive),) = site.archives().items()
    assert len(archive.chunks) > 5
    plain = subprocess.run(
        ["gpg", "--batch", "-q", "-d"], input=site.content(name), capture_output=True, check=True
    ).stdout
    assert len(files(plain)) == 3
    assert not list((site.folder / "temp").iterdir())


@pytest.mark.parametrize("compressor", ["gzip", "pigz", '"zstd -3"', "cat", ""])
def test_compressors(site: Site, compressor: str) -> None:
    if compressor:
        require_tool(compressor.strip('"').split()[0])
    site.settings["Compressor"] = compressor
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    start = {'"zstd -3"': b"\x28\xb5\x2f\xfd", "cat": str(site.data)[1:].encode()[:4]}
    assert site.content(name).startswith(start.get(compressor, b"\x1f\x8b"))


def test_awkward_names_and_excludes(site: Site) -> None:
    awkward = site.folder / "a b; $(touch x) 'q' \"d\" *"
    awkward.mkdir()
    for name in ("keep", "drop.o", "*.o"):
        (awkward / name).write_text("x")
    quoted = str(awkward).replace('"', '\\"')
    site.jobs = f'<Directory "{quoted}">\nExclude *.o\n</Directory>'
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    assert name.startswith(f"{awkward}-")
    assert [f.rpartition("/")[2] for f in files(site.content(name))] == ["", "keep"]


def test_wildcards_and_home_as_the_shell_had_them(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(site.folder))
    (site.data / "sub1").mkdir()
    (site.data / "sub2").mkdir()
    site.jobs = "<Directory ~/data/sub*>\nExclude ~/data/sub2/x\n</Directory>"
    (site.data / "sub2" / "x").write_text("")
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    assert name.startswith("~/data/sub*-")
    assert [f.rpartition("data/")[2] for f in files(site.content(name))] == ["sub1/", "sub2/"]


def test_names_that_are_not_utf8(site: Site) -> None:
    raw = os.fsencode(str(site.folder)) + b"/J\xfcrgen"
    os.mkdir(raw)
    site.jobs = ""
    with open(site.write(), "ab") as conf:
        conf.write(b"Directory " + raw + b"\n")
    # In a process of its own: the tests' reports cannot hold such names.
    done = subprocess.run([sys.executable, s3napback.__file__, "-c", str(site.conf)],
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Directory " + raw + b" -> " in done.stderr or b"J\\udcfcrgen" in done.stderr
    ((name, _),) = site.archives().items()
    assert "/J\\xfcrgen-" in name


def test_mysql_and_postgresql(
    site: Site, mariadb: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    mariadb.run("CREATE DATABASE IF NOT EXISTS shop; CREATE OR REPLACE TABLE shop.t (n INT);"
                "INSERT INTO shop.t VALUES (42);")
    postgres.run("postgres", "DROP DATABASE IF EXISTS crm")
    postgres.run("postgres", "CREATE DATABASE crm")
    postgres.run("crm", "CREATE TABLE t (n int); INSERT INTO t VALUES (43)")
    monkeypatch.setenv("PGHOST", str(postgres.socket_dir))
    monkeypatch.setenv("PGUSER", postgres.user)
    site.jobs = (
        f"<MySQL {mariadb.socket}:shop>\nMySQLOptions --single-transaction --skip-comments\n"
        f"</MySQL>\n<MySQL {mariadb.socket}:all>\nUseTempFile yes\n</MySQL>\n"
        f"PostgreSQL {postgres.user}@crm all"
    )
    assert site.run() == 0
    found = site.archives()
    sock = str(mariadb.socket)
    assert set(found) == {
        f"MySQL/{sock}/shop-2", f"MySQL/{sock}/--all-databases-2", "PostgreSQL/crm-2",
        "PostgreSQL/-2",
    }
    for name in found:
        sql = gzip.decompress(site.content(name)).decode()
        assert ("43" if name.startswith("P") else "(42)") in sql
    assert "Dump completed" not in gzip.decompress(site.content(f"MySQL/{sock}/shop-2")).decode()


def test_subversion_full_diff_nothing_new(site: Site, svn_repo_factory: Any) -> None:
    repo = svn_repo_factory(site.folder / "repo", 3)
    site.jobs = f"Subversion {repo}"
    assert site.run() == 0
    svn_repo_factory(repo, 2)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert site.run(now=NIGHT + timedelta(days=2)) == 0  # nothing new
    states = {a.metadata["state"] for a in site.archives().values()}
    assert states == {"0:3", "4:5"}
    assert sorted(name[-4:] for name in site.archives()) == ["DIFF", "FULL"]
    assert (site.folder / "diffs").joinpath(
        s3napback.diff_file_name(str(repo))
    ).read_text() == "5\n"


def test_a_repository_that_was_replaced_is_saved_whole(
    site: Site, svn_repo_factory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = svn_repo_factory(site.folder / "repo", 3)
    site.jobs = f"Subversion {repo}"
    site.run()
    shutil.rmtree(repo)
    svn_repo_factory(repo, 1)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert "it was replaced; all of it is saved" in capsys.readouterr().err
    assert {a.metadata["state"] for a in site.archives().values()} == {"0:3", "0:1"}


def test_a_subversion_dir(
    site: Site, svn_repo_factory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = site.folder / "svnroot"
    root.mkdir()
    svn_repo_factory(root / "good", 1)
    broken = svn_repo_factory(root / "broken", 2)
    (root / "not-a-repository").mkdir()
    (broken / "db" / "revs" / "0" / "1").write_bytes(b"garbage")
    site.jobs = f"<SubversionDir {root}>\n</SubversionDir>"
    assert site.run() == 1
    assert [name.rpartition("/")[2] for name in site.archives()] == ["good-18-FULL"]
    said = capsys.readouterr().err
    assert f"the repository {root}/broken does not verify" in said
    assert "not-a-repository" not in said
    site.jobs = f"<SubversionDir {root}/absent>\n</SubversionDir>"
    assert site.run() == 1
    assert f"Cannot open directory: {root}/absent" in capsys.readouterr().err


# ---- done today ----


def test_a_second_run_of_the_day_does_nothing(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.run()
    before = site.state()
    assert site.run(now=NIGHT + timedelta(hours=3)) == 0
    assert site.state() == before
    said = capsys.readouterr().err
    assert f"Skipping {site.data}; diff was already performed today" in said
    assert "Finished: 0 stored, 1 skipped, 0 failed" in said


def test_done_today_asks_for_a_complete_archive(site: Site, mariadb: Any) -> None:
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


def test_forced(site: Site) -> None:
    site.run()
    ((name, archive),) = site.archives().items()
    assert site.run("-f") == 0
    assert site.archives()[name].metadata["archive"] != archive.metadata["archive"]


def test_two_configs_and_the_worst_status(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.folder / "etc").mkdir()
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder / "etc"))
    (site.folder / "etc" / "bad.conf").write_text("nonsense: 1\n")
    assert s3napback.main(["-c", str(site.write()), "bad"], now=NIGHT) == 2
    assert len(site.archives()) == 1
    assert "unable to parse line" in capsys.readouterr().err


# ---- things that go wrong ----


DYING = {
    "at once": "exit 9",
    "in the middle": 'head -c 2500 <("$REAL" "$@"); exit 9',
    "at the end": '"$REAL" "$@"; exit 9',
    "by a signal": '"$REAL" "$@"; kill -KILL $$',
    "quietly cut, then fails": '"$REAL" "$@" | head -c 1700; exit 9',
}


@pytest.mark.parametrize("temp", [False, True])
@pytest.mark.parametrize("how", DYING)
@pytest.mark.parametrize("tool", ["tar", "gzip", "gpg"])
def test_a_stage_that_dies_stores_nothing(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tool: str, how: str, temp: bool,
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    (site.data / "big").write_bytes(os.urandom(9000))
    site.settings |= {"GpgRecipient": gpg_home.recipient, "Compressor": "gzip"}
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    assert site.run() == 0
    before = site.state()
    (site.data / "big").write_bytes(os.urandom(9000))
    script = DYING[how]
    if tool == "gzip":
        script = script.replace('"$REAL" "$@"', "gzip")
        site.settings["Compressor"] = bad_compressor(site.folder, script)
    elif tool == "gpg":  # the check of the key must still pass
        script = f'[ "$(head -c 1 | wc -c)" = 0 ] && exec "$REAL" "$@" </dev/null\n{script}'
    if tool != "gzip":
        fake_tool(site, monkeypatch, tool, script)
    capsys.readouterr()
    later = NIGHT + timedelta(days=1)
    assert site.run(now=later) == 1
    said = capsys.readouterr().err
    assert "failed: " in said
    assert ("bad-compressor" if tool == "gzip" else tool) in said.split("failed: ")[1]
    assert "Finished: 0 stored, 0 skipped, 1 failed" in said
    assert site.state() == before  # the archive of another slot, and what DiffDir describes
    monkeypatch.undo()
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["Compressor"] = "gzip"
    assert site.run(now=later) == 0
    assert len(site.archives()) == 2


def test_one_job_fails_and_the_others_still_run(site: Site) -> None:
    site.jobs = f"Directory {site.folder}/absent {site.data}"
    assert site.run() == 1
    assert [a.complete for a in site.archives().values()] == [True]


def test_a_directory_that_is_not_there_stores_nothing(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.jobs = f"Directory {site.folder}/absent"
    assert site.run() == 1
    assert f"directory {site.folder}/absent does not exist (mount it" in capsys.readouterr().err
    assert not site.archives()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('"$REAL" "$@"; echo "tar: x: file changed as we read it" >&2; exit 1', "x: file changed"),
        ('"$REAL" "$@"; echo "tar: y: Cannot open: Permission denied" >&2; exit 2', "y: Cannot op"),
    ],
)
def test_tars_warnings_are_stored_and_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str,
    said: str,
) -> None:
    fake_tool(site, monkeypatch, "tar", script)
    assert site.run() == 3
    ((_, archive),) = site.archives().items()
    assert archive.complete
    assert archive.metadata["status"] == "warnings"
    captured = capsys.readouterr().err
    assert said in captured
    assert "1 stored (1 with warnings)" in captured
    assert len(site.diff_files()) == 1


def test_tar_that_gives_up_stores_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    script = '"$REAL" "$@"; echo "tar: Error is not recoverable: exiting now" >&2; exit 2'
    fake_tool(site, monkeypatch, "tar", script)
    assert site.run() == 1
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


@pytest.mark.parametrize("status", [1, 2])
def test_a_source_that_ended_with_a_warning_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """tar is through, and the compressor holds more than a pipe takes: it is read on, not waited
    for."""
    (site.data / "big").write_bytes(os.urandom(6_000_000))
    fake_tool(site, monkeypatch, "tar", f'"$REAL" "$@"; exit {status}')
    holding = bad_compressor(site.folder, "d=$(base64); echo $d")
    site.settings |= {"Compressor": holding, "ChunkSize": "100000"}
    assert site.run() == 3
    ((_, archive),) = site.archives().items()
    assert archive.complete
    assert archive.size > 6_000_000


def test_a_tar_that_wrote_nothing_stores_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.run() == 0
    before = site.state()
    fake_tool(site, monkeypatch, "tar", "echo 'tar: unrecognized option' >&2; exit 1")
    assert site.run("-f", now=NIGHT.replace(month=12, day=1)) == 1
    assert "tar wrote no snapshot file (install GNU tar as tar)" in capsys.readouterr().err
    assert site.state() == before


def test_a_replacement_that_cannot_be_stored_leaves_the_old_archive(
    s3_site: Site, s3_server: Any
) -> None:
    s3_site.settings["ChunkSize"] = "100000"
    assert s3_site.run() == 0
    ((name, _),) = s3_site.archives().items()
    old = s3_site.content(name)
    (s3_site.data / "file").write_text("two")
    s3_server.fail = lambda method, *_: (503, "SlowDown", "") if method == "PUT" else None
    assert s3_site.run("-f") == 1
    s3_server.fail = None
    assert s3_site.content(name) == old


def test_a_name_too_long_for_a_diff_file_fails_alone(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = site.folder / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    site.jobs = f"Directory {deep} {site.data}"
    assert site.run() == 1
    assert "cannot use the diff file: " in capsys.readouterr().err
    assert [name.rpartition("/")[2].split("-")[0] for name in site.archives()] == ["data"]


@pytest.mark.parametrize("line", ["CycleType HanoiCycle\nDiscs 1500", "Frequency 1e-310"])
def test_numbers_that_make_no_rotation(
    site: Site, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    site.jobs = f"<Directory {site.data}>\n{line}\n</Directory>"
    assert site.run("-f") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not site.archives()


def test_a_folder_that_cannot_be_locked_is_no_end(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(s3napback.fcntl, "flock", no_locks)
    assert site.run() == 0
    assert "cannot lock DiffDir" in capsys.readouterr().err


def test_many_messages_are_counted_not_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3napback, "_MAX_MESSAGES", 10)
    fake_tool(site, monkeypatch, "tar", '"$REAL" "$@"; seq 1 100 >&2; exit 1')
    assert site.run() == 3
    said = capsys.readouterr().err
    assert "WARN 10\n" in said
    assert "WARN 11\n" not in said
    assert "90 more messages of tar, the last of them:" in said
    assert "WARN 100\n" in said


def test_ended_by_a_signal_while_the_network_is_down(site: Site) -> None:
    site.settings |= {"S3Endpoint": "http://127.0.0.1:9", "RetryHours": "20"}
    site.settings["S3Keyfile"] = str(site.folder / "key")
    (site.folder / "key").write_text("key=a\nsecret=b\n")
    process = subprocess.Popen(
        [sys.executable, s3napback.__file__, "-c", str(site.write())], stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while "trying again" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("tool", ["tar", "gzip", "gpg", "mysqldump", "svnlook"])
def test_tools_that_are_not_on_path(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], svn_repo_factory: Any, tool: str,
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["GpgRecipient"] = gpg_home.recipient
    repo = svn_repo_factory(site.folder / "repo", 1)
    site.jobs = {"mysqldump": "MySQL all", "svnlook": f"Subversion {repo}"}.get(tool, site.jobs)
    folder = site.folder / "bin"
    folder.mkdir()
    for name in {"tar", "gzip", "gpg", "svnlook", "svnadmin"} - {tool}:
        (folder / name).symlink_to(require_tool(name))
    monkeypatch.setenv("PATH", str(folder))
    assert site.run() == 1
    assert f"{tool} is not on PATH (install it, or set PATH in the crontab)" in (
        capsys.readouterr().err
    )
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


def test_a_full_temp_dir(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(site.folder / "temp", "size=64k") as place:
        (site.data / "big").write_bytes(os.urandom(500_000))
        site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
        assert site.run() == 1
        assert not list(place.iterdir())
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "(free some room there)" in said
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


def test_a_read_only_diff_dir(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(site.folder / "diffs", "ro") as diffs:
        assert site.run() == 2
    assert f"cannot write in DiffDir {diffs}/: Read-only file system" in capsys.readouterr().err
    assert not site.archives()


def test_a_full_bucket_disk(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(site.folder / "buckets", "size=64k"):
        (site.data / "big").write_bytes(os.urandom(500_000))
        assert site.run() == 1
        assert not site.archives()
    assert "No space left on device (free some room there)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        ({"secret": "wrong"}, "the secret in S3Keyfile is wrong", 1),
        ({"key": "AKIANOBODY"}, "the key in S3Keyfile is unknown there", 1),
        ({"bucket": "denied-bucket"}, "or the bucket is someone else's", 1),
        ({"keyfile": "secret=x\n"}, "has no line key=…", 2),
        ({"keyfile": "key=x\n"}, "has no line secret=…", 2),
        ({"keyfile": None}, "cannot read S3Keyfile", 2),
    ],
)
def test_s3_says_no(
    s3_site: Site, s3_server: Any, capsys: pytest.CaptureFixture[str],
    change: dict[str, str | None], message: str, status: int,
) -> None:
    keyfile = Path(s3_site.settings["S3Keyfile"])
    if "keyfile" in change:
        keyfile.unlink()
        if change["keyfile"] is not None:
            keyfile.write_text(change["keyfile"])
    else:
        keyfile.write_text(
            f"key={change.get('key', s3_server.key)}\n"
            f"secret={change.get('secret', s3_server.secret)}\n"
        )
    s3_site.settings["Bucket"] = change.get("bucket") or "bkt"
    assert s3_site.run() == status
    said = capsys.readouterr().err
    assert message in said
    assert s3_server.secret not in said
    assert "Traceback" not in said
    assert not list((s3_site.folder / "diffs").iterdir())


def test_a_key_file_that_others_can_read_gets_a_warning(
    s3_site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chmod(s3_site.settings["S3Keyfile"], 0o644)
    assert s3_site.run() == 0
    assert "can be read by others; run: chmod 600 " in capsys.readouterr().err


def test_another_run_at_work(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with s3napback.State(f"{site.folder}/diffs/", s3napback.Moment(0)).lock():
        assert site.run() == 75
        assert site.run("-t") == 0  # looks, and waits for no one
    assert f"another run is at work in DiffDir {site.folder}/diffs/" in capsys.readouterr().err
    assert not site.archives()
    assert site.run() == 0


def test_what_a_killed_run_left_in_diff_dir_is_cleared(site: Site) -> None:
    left = site.folder / "diffs" / f"{s3napback._DRAFT_START}xyz{s3napback._DRAFT_END}"
    left.write_text("half")
    assert site.run() == 0
    assert not left.exists()


def has_data(pid: int, folder: Path) -> bool:
    """Whether 1,000 bytes are in a file of the folder, or in one without a name that is open."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(descriptor).startswith(f"{folder}/"):
                paths.append(descriptor)
    return any(path.stat().st_size >= 1000 for path in paths)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("temp", [False, True])
def test_ended_by_a_signal(site: Site, signum: int, temp: bool) -> None:
    (site.data / "big").write_bytes(os.urandom(100_000))
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    site.settings["Compressor"] = bad_compressor(site.folder, "head -c 3000; sleep 60")
    script = Path(s3napback.__file__)
    process = subprocess.Popen(
        [sys.executable, str(script), "-d", "-c", str(site.write())],
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


def recipient_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("GNUPGHOME", str(home))
    before = site.state()
    assert site.run() == 2
    assert site.state() == before
    return capsys.readouterr().err


def key_maker(home: Path, recipient: str, expiry: str = "0") -> None:
    env = {**os.environ, "GNUPGHOME": str(home)}
    subprocess.run(
        ["gpg", "--batch", "-q", "--passphrase", "", "--quick-generate-key", recipient,
         "future-default", "default", expiry],
        env=env, check=True, capture_output=True,
    )


def test_gpg_recipient_absent_expired_untrusted_revoked_disabled(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    short_folder: Callable[[str], Path], gpg_home: Any,
) -> None:
    home = short_folder("")
    env = {**os.environ, "GNUPGHOME": str(home)}
    site.settings["GpgRecipient"] = "who@example.com"
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "GPG recipient who@example.com not found in " in said
    assert "gpg --import" in said
    # expired: made in the past
    faketime = require_tool("faketime")
    subprocess.run(
        [faketime, "2020-01-01", "gpg", "--batch", "-q", "--passphrase", "",
         "--quick-generate-key", "old@example.com", "future-default", "default", "1y"],
        env=env, check=True, capture_output=True,
    )
    site.settings["GpgRecipient"] = "old@example.com"
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "expired on 2020-12-31" in said
    assert "gpg --edit-key" in said
    # not trusted: someone else's public key
    public = gpg_home.run("--armor", "--export", gpg_home.recipient)
    subprocess.run(["gpg", "--batch", "-q", "--import"], input=public, text=True, env=env,
                   check=True, capture_output=True)
    site.settings["GpgRecipient"] = gpg_home.recipient
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "is not trusted" in said
    assert "trust" in said.rpartition("gpg --edit-key ")[2]
    # disabled
    key_maker(home, "off@example.com")
    subprocess.run(["gpg", "--no-tty", "--command-fd", "0", "--edit-key", "off@example.com"],
                   input="disable\nsave\n", text=True, env=env, capture_output=True)
    site.settings["GpgRecipient"] = "off@example.com"
    assert "is disabled" in recipient_failure(site, monkeypatch, home, capsys)
    # revoked
    key_maker(home, "gone@example.com")
    listing = subprocess.run(["gpg", "--list-keys", "--with-colons", "gone@example.com"],
                             env=env, capture_output=True, text=True).stdout
    fingerprint = next(x.split(":")[9] for x in listing.splitlines() if x.startswith("fpr"))
    revocation = (home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text()
    subprocess.run(["gpg", "--batch", "--import"], env=env, text=True, capture_output=True,
                   input=revocation.replace(":-----BEGIN", "-----BEGIN"))
    site.settings["GpgRecipient"] = "gone@example.com"
    assert "is revoked" in recipient_failure(site, monkeypatch, home, capsys)
    subprocess.run(["gpgconf", "--kill", "all"], env=env)


def test_a_keyring_of_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    short_folder: Callable[[str], Path], gpg_home: Any,
) -> None:
    home, ring = short_folder(""), site.folder / "backup.gpg"
    env = {**os.environ, "GNUPGHOME": str(home)}
    public = gpg_home.run("--armor", "--export", gpg_home.recipient)
    subprocess.run(
        ["gpg", "--batch", "-q", "--no-default-keyring", "--keyring", str(ring), "--import"],
        input=public, text=True, env=env, check=True, capture_output=True,
    )
    (home / "gpg.conf").write_text("trust-model always\n")
    monkeypatch.setenv("GNUPGHOME", str(home))
    site.settings |= {"GpgRecipient": gpg_home.recipient, "GpgKeyring": str(ring)}
    assert site.run() == 0
    site.settings["GpgKeyring"] = str(site.folder / "absent.gpg")
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "absent.gpg does not exist" in said


def test_a_keyring_that_gnupg_ignores(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    gpg_home: Any,
) -> None:
    # GnuPG 2.4 with use-keyboxd says so, and goes on with its own keys.
    note = 'gpg: Note: Specified keyrings are ignored due to option "use-keyboxd"'
    fake_tool(site, monkeypatch, "gpg", f"echo '{note}' >&2; exec \"$REAL\" \"$@\"")
    site.settings |= {"GpgRecipient": gpg_home.recipient, "GpgKeyring": "/x.gpg"}
    said = recipient_failure(site, monkeypatch, gpg_home.home, capsys)
    assert "gpg ignores GpgKeyring /x.gpg" in said
    assert "take use-keyboxd out of common.conf" in said


# ---- the call ----


def test_from_cron(site: Site) -> None:
    """The README's call, in the environment that cron gives."""
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", f"HOME={site.folder}", sys.executable,
         s3napback.__file__, "-c", str(site.write())],
        capture_output=True, text=True, cwd=site.folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Finished: 1 stored, 0 skipped, 0 failed" in done.stderr + done.stdout
    assert len(site.archives()) == 1


def test_a_closed_standard_error_does_not_end_a_backup(site: Site) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {s3napback.__file__} -c {site.write()} 2>&- >&-"]
    )
    assert done.returncode == 0
    assert len(site.archives()) == 1


def test_debug_logs_every_command(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.run("-d") == 0
    assert "DEBUG tar -f - -g " in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert s3napback.main(["-h"]) == 2
    assert s3napback.main(["--help"]) == 0
    assert s3napback.main(["--version"]) == 0
    assert s3napback.__version__ in capsys.readouterr().out
    assert s3napback.main(["-c"]) == 2
    assert "option -c requires argument" in capsys.readouterr().err


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


def test_the_progress_bar_on_a_terminal(site: Site) -> None:
    (site.data / "big").write_bytes(os.urandom(50_000))
    line = f"{sys.executable} {s3napback.__file__} -c {site.write()}"
    done = subprocess.run(
        [require_tool("script"), "-qec", line, "/dev/null"], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )
    assert done.returncode == 0
    assert re.search(r"[\r\n]…\S*/data-\d+-(FULL|DIFF): .*B/s", done.stdout)
    assert "Finished: 1 stored" in done.stdout


def test_an_unexpected_error_is_not_hidden(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(s3napback, "run_config", bug)
    with pytest.raises(ZeroDivisionError):
        site.run()
    logging.getLogger("Backup").handlers.clear()
