"""What tar could not read one night is in the archive of the first night in which it can."""

import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import NIGHT, Capture, Site, differences, fake_tool, leave_out, run_as_nobody

pytestmark = pytest.mark.slow

NAMES = [b"plain", b"a b", b"c:d", b"e\nf", b"g\\h", b"\xff\xfe", "\u00fc".encode(), b"t\tq",
         b"'q'", b" lead", b"trail ", b"\x7f\x01", b"a: Cannot open: x", b"x\\303", b"\\", b"dir"]


def night(number: int) -> datetime:
    return NIGHT + timedelta(days=number)


def members(site: Site, end: str) -> list[str]:
    (name,) = [name for name in site.archives() if name.endswith(end)]
    argv = ["tar", "-tzf", "-", "--quoting-style=escape"]
    listed = subprocess.run(argv, input=site.content(name), capture_output=True, check=True)
    return [os.path.basename(line) for line in listed.stdout.decode().splitlines()]


def as_nobody(site: Site, number: int, locale: str = "C.UTF-8") -> int:
    return run_as_nobody(site, now=night(number), locale=locale).returncode


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_file_that_can_be_read_later_is_in_the_next_archive(nobodys: Site, locale: str) -> None:
    site = nobodys
    top = os.fsencode(site.data)
    for name in NAMES:
        os.mkdir(top + b"/" + name)
        for file in (b"closed", name, b"open"):
            Path(os.fsdecode(top + b"/" + name + b"/" + file)).write_bytes(name)
        os.chmod(top + b"/" + name + b"/closed", 0o600)
        os.chmod(top + b"/" + name + b"/" + name, 0o600)
    assert as_nobody(site, 0, locale) == 3
    assert as_nobody(site, 1, locale) == 3  # as long as it cannot be read, it is told
    assert "open" not in members(site, "-19-DIFF")  # and the others are not stored again
    assert site.run(now=night(2)) == 0  # as one who may read it, like a group that changed
    assert members(site, "-20-DIFF").count("closed") == len(NAMES)
    assert not differences(site.data, site.restored(after=night(2)))


def test_a_folder_that_can_be_read_later_is_in_the_next_archive(nobodys: Site) -> None:
    site = nobodys
    closed = site.data / "closed"
    (closed / "sub").mkdir(parents=True)
    (closed / "sub/file").touch()
    closed.chmod(0o700)
    assert as_nobody(site, 0) == 3
    assert as_nobody(site, 1) == 3
    assert site.run(now=night(2)) == 0
    assert not differences(site.data, site.restored(after=night(2)))


def test_a_folder_is_closed_for_a_night(nobodys: Site) -> None:
    site = nobodys
    folder = site.data / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").touch()
    assert as_nobody(site, 0) == 0
    folder.chmod(0o700)
    assert as_nobody(site, 1) == 3
    folder.chmod(0o755)
    assert as_nobody(site, 2) == 0
    assert not differences(site.data, site.restored(after=night(2)))


def test_what_more_messages_than_are_kept_tell_of_is_stored_again(nobodys: Site) -> None:
    site = nobodys
    for n in range(210):
        handle = os.open(site.data / f"f{n}", os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(handle)
    few = "s3napback._MAX_MESSAGES = 200"
    assert run_as_nobody(site, now=night(0), change=few).returncode == 3
    assert site.run(now=night(1)) == 0
    assert len(members(site, "-19-DIFF")) == 212
    assert not differences(site.data, site.restored(after=night(1)))


def compressor(site: Site, script: str) -> None:
    """While tar waits for the pipe, with its list made and the first file half read: a script."""
    file = site.folder / "compress"
    file.write_text(
        f"#!/bin/bash\ncd {site.data}\nhead -c 100000 > ../start\n"
        f"if [ $(stat -c %s ../start) = 100000 ]; then\n{script}\nfi\n"  # not for a mere trial
        "cat ../start - | gzip -1\n"
    )
    file.chmod(0o755)
    site.settings["Compressor"] = str(file)


def away(site: Site) -> None:
    compressor(site, "mv d ../away")


def replaced(site: Site) -> None:
    compressor(site, "mv d ../away; mkdir d; echo other > d/other")


def gone(site: Site) -> None:
    compressor(site, "mv d/file d/sub ..")


def bring_back(site: Site) -> None:
    for name, place in (("away", "d"), ("file", "d/file"), ("sub", "d/sub")):
        if (site.folder / name).exists():
            shutil.rmtree(site.data / "d/other", ignore_errors=True)
            if (site.data / place).is_dir():
                shutil.rmtree(site.data / place)
            (site.folder / name).rename(site.data / place)


@pytest.mark.parametrize("how", [away, replaced, gone])
@pytest.mark.parametrize("mode", ["FULL", "DIFF"])
def test_what_moves_away_and_back_while_tar_reads(
    site: Site, how: Callable[[Site], None], mode: str
) -> None:
    (site.data / "a big one").write_bytes(os.urandom(4_000_000))
    (site.data / "d/sub/deep").mkdir(parents=True)
    for path in ("d/file", "d/sub/file", "d/sub/deep/file", "z"):
        (site.data / path).write_text(path)
    site.settings["ChunkSize"] = "10000000"
    number = 0
    if mode == "DIFF":
        assert site.run(now=night(0)) == 0
        (site.data / "a big one").write_bytes(os.urandom(4_000_000))
        (site.data / "d/sub/deep/file").write_text("new")
        (site.data / "d/file").write_text("new")
        number = 1
    how(site)
    assert site.run(now=night(number)) == 3
    site.settings["Compressor"] = "gzip"
    bring_back(site)
    assert site.run(now=night(number + 1)) == 0
    assert not differences(site.data, site.restored(after=night(number + 1)))
    assert site.run(now=night(number + 2)) == 0
    assert not differences(site.data, site.restored(after=night(number + 2)))
    last = members(site, f"-{18 + number + 2}-DIFF" if number < 1 else "-FULL")
    assert mode == "DIFF" or "file" not in last


def test_a_new_directory_that_moves_while_tar_makes_its_list(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen under both names, tar calls it renamed; the next archive holds all of it."""
    (site.data / "a").mkdir()
    (site.data / "a/file").touch()
    (site.data / "b").mkdir()
    fake_tool(site, monkeypatch, "tar",
              f'mount --bind {site.data}/a {site.data}/b && trap "umount {site.data}/b" EXIT\n'
              '"$REAL" "$@"')
    if os.geteuid():
        leave_out("a bind mount needs root")
    assert site.run(now=night(0)) == 3
    assert "has been renamed from" in capsys.readouterr().err
    (site.folder / "bin/tar").unlink()
    (site.data / "b/file").touch()
    assert site.run(now=night(1)) == 0
    assert members(site, "-19-DIFF").count("file") == 3


@pytest.mark.parametrize(
    "change", [("*.tmp", ""), ("", "*.tmp"), ("*.tmp", "*.tmp x"), ("~/x", "")]
)
def test_a_changed_list_of_excludes_stores_everything_once(
    site: Site, change: tuple[str, str], capsys: Capture
) -> None:
    (site.data / "left.tmp").write_text("left out at first")
    for number, patterns in enumerate((change[0], change[0], change[1], change[1])):
        site.jobs = f"Directory {site.data}" + (f"\nExclude {patterns}" if patterns else "")
        assert site.run(now=night(number)) == 0
        said = capsys.readouterr().err
        assert said.count("everything is stored in it") == (1 if number == 2 else 0)
        end = f"-{18 + number}-" + ("FULL" if number == 3 else "DIFF")
        assert ("file" in members(site, end)) == (number in (0, 2, 3))
        if "tmp" not in patterns:
            assert not differences(site.data, site.restored(after=night(number)))
