"""The thirteen defects of the Perl script that its users lived with: each test fails on them."""

import gzip
import os
import shutil
import stat
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool

import s3napback


def shown(site: Site, capsys: Capture) -> str:
    """What -t says that would be done."""
    capsys.readouterr()
    assert s3napback.main(["-t", "-c", str(site.write())], now=NIGHT) in (0, 1)
    return capsys.readouterr().err


def test_1_the_status_tells_and_a_cut_archive_is_no_backup(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.environ["PATH"]
    fake_tool(site, monkeypatch, "pigz", '"$REAL" "$@" | head -c 60; exit 1')
    assert site.run() == 1
    assert not site.archives()
    monkeypatch.setenv("PATH", path)
    assert site.run() == 0  # and not "already done today"
    assert all(archive.complete for archive in site.archives().values())


def test_2_the_diff_file_stays_where_the_bucket_is(site: Site) -> None:
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    (diff_file,) = site.diff_files()
    before = diff_file.read_bytes()
    (site.data / "new").write_text("must not be lost")
    bucket = site.folder / "buckets"
    bucket.rename(site.folder / "away")
    assert site.run() == 1
    (site.folder / "away").rename(bucket)
    assert diff_file.read_bytes() == before
    assert site.run() == 0
    newest = max(site.archives().values(), key=lambda archive: archive.modified)
    listed = subprocess.run(["tar", "tz"], input=site.content(newest.name), capture_output=True)
    assert b"/new\n" in listed.stdout


def test_3_test_mode_changes_nothing(site: Site) -> None:
    site.jobs = f"<Directory {site.data}>\nDiffs 0\n</Directory>"  # a FULL every day
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    before = site.state()
    assert s3napback.main(["-t", "-c", str(site.write())], now=NIGHT) == 0
    assert site.state() == before


def test_4_the_old_archive_stays_until_new_data_flows(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.data / "big").write_bytes(os.urandom(5000))
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    content = site.content(name)
    fake_tool(site, monkeypatch, "tar", "exit 9")
    assert site.run("-f") == 1
    assert site.content(name) == content


def test_5_no_wait_for_a_delete_and_no_walk_through_the_bucket(
    s3_site: Site, s3_server: Any
) -> None:
    (s3_site.data / "big").write_bytes(os.urandom(5000))
    assert s3_site.run() == 0
    prefixes: list[str] = []

    def look(method: str, path: str, query: dict[str, str], body: bytes | None) -> None:
        if "list-type" in query and query.get("max-keys") != "1":
            prefixes.append(query.get("prefix", ""))

    s3_server.fail = look
    started = time.monotonic()
    assert s3_site.run("-f") == 0
    assert time.monotonic() - started < 10
    assert prefixes and all(prefix.startswith(f"{s3_site.data}-") for prefix in prefixes)


def test_6_each_config_is_a_run_of_its_own(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder))
    other = site.folder / "other"
    other.mkdir()
    site.settings["GpgRecipient"] = gpg_home.recipient
    shutil.copy(site.write(), site.folder / "first.conf")
    site.settings["GpgRecipient"], site.jobs = "", f"Directory {other}"
    shutil.copy(site.write(), site.folder / "second.conf")
    assert s3napback.main(["first", "second"], now=NIGHT) == 0
    for name in site.archives():
        assert s3napback.is_openpgp(site.content(name)) == name.startswith(str(site.data))


def test_7_lines_and_blocks_side_by_side(site: Site) -> None:
    places = [site.folder / name for name in ("line", "block", "twin")]
    for place in places:
        place.mkdir()
    line, block, _ = places
    site.jobs = (
        f"Directory {line}\n<Directory {block}>\nExclude a\n</Directory>\n"
        f"<Directory {places[2]}>\nDiffs 0\n</Directory>"
    )
    assert site.run() == 0
    stored = {s3napback.parse_archive_name(name)[1] for name in site.archives()}  # type: ignore[index]
    assert stored == {str(place) for place in places}


def test_8_every_word_of_mysql_options(site: Site, capsys: Capture) -> None:
    site.jobs = "<MySQL shop>\nMySQLOptions --single-transaction --skip-comments\n</MySQL>"
    assert "--single-transaction --skip-comments shop" in shown(site, capsys)


def test_9_a_comment_in_a_list_of_names(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.data} # the data"
    said = shown(site, capsys)
    assert "the list of names ends at #" in said
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    assert name.startswith(f"{site.data}-")
    assert gzip.decompress(site.content(name))


def test_10_temp_and_diff_files_are_private(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    listed = site.folder / "listed"
    fake_tool(site, monkeypatch, "pigz", f'ls {site.folder}/temp > {listed}; exec "$REAL" "$@"')
    before = os.umask(0)
    try:
        assert site.run() == 0
    finally:
        os.umask(before)
    assert listed.read_text() == ""  # while it is written the temp file has no name at all
    for path in (site.folder / "diffs").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_11_two_jobs_for_one_archive(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.data}\n<Cycle twin>\nDirectory {site.data}\n</Cycle>"
    assert site.run("-f") == 1
    assert "writes to the same archive" in capsys.readouterr().err
    assert len(site.archives()) == 1


def test_12_a_repository_that_does_not_verify(
    site: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    folder = site.folder / "repos"
    folder.mkdir()
    svn_repo_factory(folder / "good", 1)
    broken = svn_repo_factory(folder / "broken", 1)
    (revision,) = (broken / "db" / "revs" / "0").glob("1")
    revision.chmod(0o644)
    revision.write_bytes(b"damaged" + revision.read_bytes())
    site.jobs = f"SubversionDir {folder}"
    assert site.run() == 1
    said = capsys.readouterr().err
    assert f"{broken}" in said and "does not verify" in said
    assert "repos/." not in said
    ((name, _),) = site.archives().items()
    assert name.startswith(f"{folder}/good-")


def test_13_one_run_at_a_time(site: Site, capsys: Capture) -> None:
    state = s3napback.DiffDir(site.settings["DiffDir"] + "/", s3napback.Moment.of(NIGHT))
    before = site.state()
    with state.lock():
        assert site.run() == 75
    assert "another run is at work" in capsys.readouterr().err
    assert site.state() == before
    assert Path(site.settings["DiffDir"]).is_dir()
