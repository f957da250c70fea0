"""Directories that move: an archive holds no renames, and every night comes back as it was."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import NIGHT, Site

import s3napback

FIRST = NIGHT - timedelta(days=2)  # the night of a FULL; six DIFFs follow


class Life:
    """Nights of one Directory, a plain copy of each, and what a restore of each must be."""

    def __init__(self, site: Site, name: str = "") -> None:
        self.site, self.nights = site, 0
        self.name = name or str(site.data)
        site.jobs = f"Directory {self.name}"

    def night(self, *words: str, status: int = 0) -> None:
        now = FIRST + timedelta(days=self.nights)
        assert self.site.run(*words, now=now) == status
        copy = self.site.folder / f"copy{self.nights}"
        subprocess.run(["cp", "-a", self.site.data, copy], check=True)
        self.nights += 1

    def check(self) -> None:
        for night in range(self.nights):
            back = self.site.folder / f"back{night}"
            back.mkdir()
            at = (FIRST + timedelta(days=night, minutes=1)).isoformat(" ")
            words = ["restore", "-c", str(self.site.conf), self.name]
            now = FIRST + timedelta(days=night + 1)
            assert s3napback.main([*words, "--at", at, "--to", str(back)], now=now) == 0
            came = f"{back}{self.site.data}"
            wanted = str(self.site.folder / f"copy{night}")
            done = subprocess.run(
                ["diff", "-r", "--no-dereference", wanted, came], capture_output=True, text=True
            )
            assert not done.stdout + done.stderr, f"night {night}"
        for name in self.site.archives():
            assert renames(self.site.content(name)) == []


def renames(content: bytes) -> list[str]:
    """Records of renames that tar's listing of an archive shows."""
    done = subprocess.run(
        ["tar", "-tzvvf", "-", "--incremental"], input=content, capture_output=True, check=True
    )
    return [line for line in done.stdout.decode().splitlines() if line[:2] in ("R ", "T ", "X ")]


def tree(site: Site) -> Path:
    data = site.data
    for name in ("release", "old", "v1/data", "d/sub"):
        (data / name).mkdir(parents=True)
        (data / name / "inside").write_text(name)
    (data / "current").symlink_to("release")
    (data / "x").write_text("a file")
    return data


def link_replaced(data: Path) -> None:
    (data / "current").unlink()
    (data / "release").rename(data / "current")


def file_replaced(data: Path) -> None:
    (data / "x").unlink()
    (data / "d").rename(data / "x")


def up_and_back(data: Path) -> None:
    shutil.rmtree(data / "old")
    (data / "v1").rename(data / "old")
    (data / "old/data").rename(data / "data")


def down(data: Path) -> None:
    (data / "v1/new").mkdir()
    (data / "d").rename(data / "v1/new/d")


def swapped(data: Path) -> None:
    (data / "v1").rename(data / "t")
    (data / "d").rename(data / "v1")
    (data / "t").rename(data / "d")


def same_name_again(data: Path) -> None:
    (data / "v1").rename(data / "v1.old")
    (data / "v1").mkdir()
    (data / "v1.old/data").rename(data / "v1/data")


def child_takes_its_parents_place(data: Path) -> None:
    (data / "d/sub").rename(data / "t")
    shutil.rmtree(data / "d")
    (data / "t").rename(data / "d")


def number_used_again(data: Path) -> None:
    """On ext4 the new directory gets the inode number of one of the deleted."""
    shutil.rmtree(data / "d")
    (data / "x").unlink()
    (data / "x").mkdir()


@pytest.mark.parametrize("change", [
    link_replaced, file_replaced, up_and_back, down, swapped, same_name_again,
    child_takes_its_parents_place, number_used_again,
])
def test_a_directory_that_moved_comes_back_and_so_does_every_later_night(
    site: Site, change: Callable[[Path], None]
) -> None:
    life = Life(site)
    data = tree(site)
    life.night()
    change(data)
    life.night()
    (data / "later").write_text("later")
    life.night()
    life.check()


def test_an_inode_number_that_is_used_again_is_no_rename(site: Site) -> None:
    """As after `rm -r d; rm x; mkdir x` on ext4: told to the program by its own diff file."""
    life = Life(site)
    data = tree(site)
    life.night()
    shutil.rmtree(data / "d")
    (data / "x").unlink()
    (data / "x").mkdir()
    (data / "x" / "new").write_text("new")
    (diff_file,) = site.diff_files()
    reuse_inode(site, diff_file, b"/d", (data / "x").stat().st_ino)
    life.night()
    (data / "x" / "newer").write_text("newer")
    life.night()
    life.check()


def reuse_inode(site: Site, diff_file: Path, end: bytes, inode: int) -> None:
    """Gives a directory another inode number, in the diff file and in what the bucket says."""
    stamp = diff_file.stat()
    old = s3napback.DiffDir(f"{diff_file.parent}/", s3napback.Moment.of(NIGHT))
    name = str(site.data)
    before = old.position("Directory", name)
    content = diff_file.read_bytes()
    records = content.split(b"\0\0\0")
    for n, record in enumerate(records):
        fields = record.split(b"\0")
        names = [f for f in fields if f == os.fsencode(site.data) + end]
        if names:
            fields[fields.index(names[0]) - 1] = b"%d" % inode
            records[n] = b"\0".join(fields)
    diff_file.write_bytes(b"\0\0\0".join(records))
    os.utime(diff_file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = old.position("Directory", name)
    for file in [*diff_file.parent.glob(".*"), *(site.folder / "buckets").rglob(".meta/*")]:
        content = file.read_bytes()
        if before.encode() in content:
            meta = file.stat()
            file.write_bytes(content.replace(before.encode(), after.encode()))
            os.utime(file, ns=(meta.st_atime_ns, meta.st_mtime_ns))


@pytest.mark.parametrize("name", ["{data}/", "{data}//", "/{data}", "{relative}", "{data}/[a-z]*"])
def test_renames_come_back_however_the_name_is_written(site: Site, name: str) -> None:
    data = tree(site)
    (data / "v1/file").touch()  # else `old` is empty where it was not, which is an error
    name = name.format(data=data, relative=str(data)[1:])
    life = Life(site, name)
    life.night()
    up_and_back(data)
    life.night()
    link_replaced(data)
    life.night()
    (data / "later").write_text("later")
    life.night()
    life.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_nights_of_random_moves_come_back(site: Site, seed: int) -> None:
    chance = random.Random(seed)
    life = Life(site)
    counter = iter(range(10**6))

    def places(kind: Callable[[Path], bool]) -> list[Path]:
        return [p for p in sorted(site.data.rglob("*")) if kind(p)]

    def folders() -> list[Path]:
        return [site.data, *places(lambda p: p.is_dir() and not p.is_symlink())]

    def step() -> None:
        what = chance.randrange(7)
        anything = places(lambda p: True)
        if what <= 1 or not anything:
            folder = chance.choice(folders()) / f"n{chance.randrange(6)}"
            if not os.path.lexists(folder):
                folder.mkdir()
                (folder / "f").write_text(str(next(counter)))
        elif what == 2:
            victim = chance.choice(anything)
            if victim.is_dir() and not victim.is_symlink():
                shutil.rmtree(victim)
            else:
                victim.unlink()
        elif what == 3:
            link = chance.choice(folders()) / f"n{chance.randrange(6)}"
            if not os.path.lexists(link):
                link.symlink_to("n1")
        else:
            source = chance.choice(anything)
            target = chance.choice(folders()) / f"n{chance.randrange(6)}"
            if target == source or source in target.parents:
                return
            if os.path.lexists(target):
                if target in source.parents:
                    return
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink()
            source.rename(target)

    for _ in range(6):
        for _ in range(12):
            step()
        life.night()
    life.check()
