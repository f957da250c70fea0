"""What a Directory leads to: nothing, less than there was, links, mounts, our own files."""

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path

import pytest
from conftest import (
    NIGHT,
    Capture,
    Site,
    differences,
    leave_out,
    require_tool,
    run,
    run_as_nobody,
    tmpfs,
)

import s3napback

FIRST = NIGHT - timedelta(days=2)  # the night of a FULL; six DIFFs follow
Bind = Callable[[Path, Path], None]


def night(number: int) -> datetime:
    return FIRST + timedelta(days=number)


def members(site: Site, archive: str) -> list[str]:
    listed = subprocess.run(
        ["tar", "-tzf", "-"], input=site.content(archive), capture_output=True, check=True
    )
    return listed.stdout.decode().splitlines()


@pytest.fixture
def bind() -> Iterator[Bind]:
    """Mounts one directory at another; undone afterwards."""
    mounted: list[Path] = []

    def mount(source: Path, place: Path) -> None:
        done = subprocess.run(["mount", "--bind", source, place], capture_output=True)
        if done.returncode:
            leave_out("a bind mount needs root")
        mounted.append(place)

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


# ---- nothing there ----


@pytest.mark.parametrize("mode", ["DIFF", "FULL"])
@pytest.mark.parametrize("notes", [True, False])
def test_a_directory_that_is_empty_and_was_not_fails(
    site: Site, mode: str, notes: bool, capsys: Capture
) -> None:
    site.jobs = f"<Directory {site.data}>\nDiffs {6 if mode == 'DIFF' else 0}\n</Directory>"
    assert site.run(now=FIRST) == 0
    before = site.archives()
    (site.data / "file").unlink()
    if not notes:
        for path in (site.folder / "diffs").iterdir():
            path.unlink()
    for number in (1, 2):
        assert site.run(now=night(number)) == 1
        assert "is empty" in capsys.readouterr().err
    assert site.archives() == before
    assert site.run("-f", now=night(3)) == 3
    assert len(site.archives()) == 2
    assert not list(site.restored(after=night(3)).iterdir())
    assert site.run(now=night(4)) == 0  # it was empty at its last backup, too


def test_a_directory_that_was_always_empty_is_stored(site: Site) -> None:
    (site.data / "file").unlink()
    for number in range(3):
        assert site.run(now=night(number)) == 0
    assert len(site.archives()) == 3


def test_a_file_system_that_is_not_mounted_replaces_no_backup(site: Site, capsys: Capture) -> None:
    site.jobs = f"<Directory {site.data}>\nDiffs 1\nFulls 2\n</Directory>"
    with tmpfs(site.data, "size=1m"):
        (site.data / "photo").write_text("precious")
        (site.data / "lost+found").mkdir()
        for number in range(4):
            site.run(now=night(number))
        before = site.archives()
        assert len(before) == 4
    (site.data / "file").unlink()
    for number in range(4, 8):
        assert site.run(now=night(number)) == 1
    (site.data / "lost+found").mkdir()  # a new disk, say
    for number in range(8, 10):
        assert site.run(now=night(number)) == 1
    assert site.archives() == before
    assert s3napback.main(["check", "-c", str(site.write())], now=night(10)) == 1
    assert "was not at its last backup" in capsys.readouterr().out
    (site.data / "lost+found").rmdir()
    (site.data / "note").write_text("mount the disk here")
    assert site.run(now=night(10)) == 3
    assert "was on another file system" in capsys.readouterr().err


def test_one_of_several_names_that_is_empty_and_was_not_fails(site: Site, capsys: Capture) -> None:
    for name in ("one", "two", "three"):
        (site.data / name).mkdir()
    (site.data / "one/file").touch()
    (site.data / "two/file").touch()
    (site.data / "file").unlink()
    site.jobs = f"Directory {site.data}/*"
    assert site.run(now=FIRST) == 0
    (site.data / "two/file").unlink()
    (site.data / "four").mkdir()
    assert site.run(now=night(1)) == 1
    assert f"directory {site.data}/two is empty" in capsys.readouterr().err
    shutil.rmtree(site.data / "two")
    assert site.run(now=night(2)) == 0


def test_a_mount_point_below_that_is_empty_is_told(site: Site, capsys: Capture) -> None:
    (site.data / "disk").mkdir()
    with tmpfs(site.data / "disk", "size=1m"):
        (site.data / "disk/photo").touch()
        assert site.run(now=FIRST) == 0
    assert site.run(now=night(1)) == 3
    assert f"{site.data}/disk was on another file system" in capsys.readouterr().err
    assert site.run(now=night(2)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_top_folder_that_cannot_be_read_fails(nobodys: Site, mode: int) -> None:
    site = nobodys
    site.jobs = f"<Directory {site.data}>\nDiffs 0\n</Directory>"
    assert run_as_nobody(site, now=night(0)).returncode == 0
    before = site.archives()
    site.data.chmod(mode)
    assert run_as_nobody(site, now=night(1)).returncode == 1
    assert site.archives() == before
    assert run_as_nobody(site, "-f", now=night(2)).returncode == 3
    assert len(site.archives()) == 2


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.parametrize("seen", [2019, 2021], ids=["an older state", "another disk"])
def test_a_file_system_of_other_times_is_stored_whole(
    site: Site, seen: int, capsys: Capture
) -> None:
    """What is there by a snapshot that was brought back, or a disk that was changed, has the inode
    numbers that are known, often the device's too, and times before the last backup."""
    if os.geteuid():
        leave_out("mounting needs root")
    disks = {}
    for year, text in ((seen, "one"), (2020, "two")):
        disk, files = site.folder / f"{year}.img", site.folder / f"of {year}"
        (files / "in").mkdir(parents=True)
        (files / "in" / "file").write_text(text)
        run([require_tool("mkfs.ext4"), "-q", "-d", str(files), str(disk), "1M"])
        for name, field in product(("/", "/in", "/in/file"), ("mtime", "ctime")):
            change = f"set_inode_field {name} {field} {year}0101"
            run([require_tool("debugfs"), "-w", "-R", change, str(disk)])
        disks[year] = disk
    for number, disk in enumerate(disks.values()):
        if subprocess.run(["mount", "-o", "loop", disk, site.data], capture_output=True).returncode:
            leave_out("a loop device cannot be had")
        try:
            assert site.run(now=night(number)) == 0
            assert not differences(site.data, site.restored())
        finally:
            subprocess.run(["umount", site.data], check=True)
    assert "all that was there is stored again" in capsys.readouterr().err


def test_a_full_of_less_than_a_tenth_of_the_one_before_it_is_told(
    site: Site, capsys: Capture
) -> None:
    site.jobs = f"<Directory {site.data}>\nDiffs 1\nFulls 2\n</Directory>"
    for n in range(10):
        (site.data / f"big{n}").write_bytes(os.urandom(3000))
    assert [site.run(now=night(n)) for n in range(2)] == [0, 0]
    for n in range(10):
        (site.data / f"big{n}").unlink()
    # A DIFF may be as small as it likes.
    assert [site.run(now=night(n)) for n in range(2, 4)].count(3) == 1
    assert "the full backup before it" in capsys.readouterr().err


def test_the_full_before_is_the_one_that_is_replaced_where_there_is_one_slot(site: Site) -> None:
    site.jobs = f"<Directory {site.data}>\nDiffs 0\nFulls 1\n</Directory>"
    (site.data / "big").write_bytes(os.urandom(20000))
    assert site.run(now=night(0)) == 0
    (site.data / "big").unlink()
    assert site.run(now=night(1)) == 3
    assert site.run(now=night(2)) == 0


def test_a_folder_of_repositories_that_is_empty_fails(site: Site, capsys: Capture) -> None:
    (site.data / "file").unlink()
    site.jobs = f"SubversionDir {site.data}"
    assert site.run() == 1
    assert "no repository in" in capsys.readouterr().err
    assert site.run("-t") == 0


# ---- links ----


@pytest.mark.parametrize("end", ["", "/"])
def test_a_symbolic_link_as_directory_is_told(site: Site, end: str, capsys: Capture) -> None:
    link = site.folder / "link"
    link.symlink_to(site.data)
    site.jobs = f"Directory {link}{end}"
    assert site.run(now=FIRST) == 3
    assert str(site.data) in capsys.readouterr().err
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert f"nothing of {site.data}, to which it leads" in capsys.readouterr().out


def test_a_link_beside_its_target_is_stored_as_a_link(site: Site) -> None:
    (site.data / "v1").mkdir()
    (site.data / "v1/file").touch()
    (site.data / "current").symlink_to("v1")
    site.jobs = f"Directory {site.data}/*"
    assert site.run(now=FIRST) == 0


# ---- our own files ----


def test_the_bucket_and_diff_dir_within_a_source_are_left_out(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.folder}\nExclude *.o c[ab]che"
    (site.data / "file").write_bytes(os.urandom(50_000))
    for name in ("x.o", "cache", "kept"):
        (site.data / name).touch()
    for number in range(4):
        assert site.run(now=night(number)) == 0
        assert capsys.readouterr().err.count("is left out") == 2
    archives = site.archives()
    for name, archive in archives.items():
        assert not [m for m in members(site, name) if "/buckets/" in m and "bkt" in m]
        assert not [m for m in members(site, name) if "/diffs/" in m]
        assert archive.size < 60_000
    held = members(site, min(archives))
    assert sorted(os.path.basename(m) for m in held if "/data/" in m) == ["", "file", "kept"]


def test_a_diff_dir_that_holds_other_things_loses_ours_only(site: Site) -> None:
    (site.folder / "diffs" / "my.conf").write_text("mine")
    (site.folder / "diffs" / "fix.diff").write_text("a patch")
    site.jobs = f"Directory {site.folder}"
    for number in range(2):
        assert site.run(now=night(number)) == 0
    for name in site.archives():
        found = [os.path.basename(m) for m in members(site, name) if "/diffs/" in m]
        assert sorted(found) == (["", "fix.diff", "my.conf"] if "-16-" in name else [""])


def test_an_own_folder_with_wildcards_in_its_name_leaves_out_no_other(site: Site) -> None:
    odd, other = site.folder / "[a]*", site.folder / "ab"
    odd.mkdir()
    other.mkdir()
    (other / "file").touch()
    site.settings["S3Endpoint"] = f"file://{odd}"
    site.jobs = f"Directory {site.folder}"
    assert site.run(now=FIRST) == 0
    (name,) = site.archives()
    found = members(site, name)
    assert any(m.endswith("/ab/file") for m in found)
    assert any(m.endswith("/data/") for m in found)
    assert not any("bkt" in m for m in found)


@pytest.mark.parametrize("pattern", ["{data}/cache/", "./cache", "{data}//cache"])
def test_an_exclude_that_excludes_nothing_is_told(
    site: Site, pattern: str, capsys: Capture
) -> None:
    site.jobs += f"\nExclude {pattern.format(data=site.data)}"
    assert site.run(now=FIRST) == 0
    assert "excludes nothing" in capsys.readouterr().err


# ---- one directory under two names ----


def test_a_directory_under_two_names_comes_back_whole_under_both(site: Site, bind: Bind) -> None:
    one, two = site.data / "one", site.data / "two"
    for path in (one / "sub", two):
        path.mkdir(parents=True)
    (one / "file").write_text("1")
    (one / "sub/file").write_text("2")
    bind(one, two)
    for number in range(5):
        if number == 1:
            (one / "sub/more").write_text("3")
        if number == 2:
            (two / "new").mkdir()
            (two / "new/file").write_text("4")
        if number == 3:
            (one / "sub").rename(one / "moved")
        assert site.run(now=night(number)) == 0
        shutil.copytree(site.data, site.folder / f"copy{number}", symlinks=True)
    for number in range(5):
        back = site.restored(after=night(number))
        assert not differences(back, site.folder / f"copy{number}"), number
    last = max(site.archives().items(), key=lambda item: item[1].modified)
    assert not any(m.endswith("file") for m in members(site, last[0]))  # unchanged, so not stored


def test_a_name_mounted_at_another_comes_back_under_both(site: Site, bind: Bind) -> None:
    one, two = site.data / "one", site.data / "two"
    for path in (one / "sub", two):
        path.mkdir(parents=True)
    (one / "sub/file").write_text("2")
    bind(one, two)
    site.jobs = f"Directory {site.data}/*"
    for number in range(2):
        (one / f"file{number}").touch()
        assert site.run(now=night(number)) == 0
    back = site.folder / "back"
    assert site.restore(back, name=f"{site.data}/*") == 0
    assert not differences(f"{back}{site.data}", site.data)


# ---- holes ----


@pytest.mark.slow
def test_holes_take_no_room_and_come_back_as_holes(site: Site) -> None:
    image = site.data / "image"
    with open(image, "wb") as file:
        file.write(b"start")
        file.truncate(200_000_000)
        file.seek(150_000_000)
        file.write(b"middle")
    (site.data / "only a hole").touch()
    os.truncate(site.data / "only a hole", 10**6)
    assert image.stat().st_blocks < 1000
    assert site.run(now=FIRST) == 0
    ((name, archive),) = site.archives().items()
    assert archive.size < 5000
    back = site.restored(after=night(0)) / "image"
    assert subprocess.run(["cmp", back, image]).returncode == 0
    assert back.stat().st_blocks < 1000
    by_hand = site.folder / "by hand"
    by_hand.mkdir()
    subprocess.run(["tar", "xz", "-C", by_hand], input=site.content(name), check=True)
    assert not differences(Path(f"{by_hand}{site.data}"), site.data)


def test_on_fuse_no_hole_is_believed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file may tell of no blocks, and be full: tar would store zeros in its place."""
    fuse = s3napback.Mount("0:99", str(site.data), "fuse.sshfs")
    monkeypatch.setattr(s3napback, "mounts", lambda: [fuse])
    os.truncate(site.data / "file", 10**7)
    assert site.run(now=FIRST) == 0
    (name,) = site.archives()
    assert len(gzip.decompress(site.content(name))) > 10**7
