"""The property of a restore: PATH, as of any night, is what the whole restore has there, and what
`list --files` and `find` tell of it, with an index and without.

Random trees, changes, nights and PATHs, through real tar. S3NAPBACK_PATHS is the number of them;
what runs with every test run is a sample.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from conftest import NIGHT, Site, inventory, require_tool
from hypothesis import strategies as st

import s3napback

CASES = int(os.environ.get("S3NAPBACK_PATHS", "15"))
# Shrinking what fails takes minutes: only by hand.
PHASES = (
    tuple(hypothesis.Phase) if os.environ.get("S3NAPBACK_SHRINK") else (hypothesis.Phase.generate,)
)
NAMES = ["a", "a2", "b", "ü", "c d"]

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("file"), paths, st.text("xyz", max_size=3)),
        st.tuples(st.just("folder"), paths, st.just("")),
        st.tuples(st.just("delete"), paths, st.just("")),
        st.tuples(st.just("rename"), paths, paths),
        st.tuples(st.just("hard link"), paths, paths),
        st.tuples(st.just("symbolic link"), paths, paths),
        st.tuples(st.just("mode"), paths, st.sampled_from(["500", "640", "755"])),
    ),
    min_size=1, max_size=8,
)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def leads_away(root: Path, folder: Path) -> bool:
    """Whether a symbolic link is on the way to a folder."""
    return os.path.realpath(folder) != os.path.join(
        os.path.realpath(root), folder.relative_to(root)).rstrip("/.")


def apply(root: Path, change: tuple[str, str, str]) -> None:
    """Does one change to a tree, whatever stands in its way."""
    what, name, other = change
    path = root / name
    if what in ("file", "folder"):
        for parent in reversed(path.relative_to(root).parents[:-1]):
            if not (root / parent).is_dir() or (root / parent).is_symlink():
                remove(root / parent)
                (root / parent).mkdir()
        if what == "file":
            remove(path)
            path.write_text(other)
        elif not path.is_dir():
            remove(path)
            path.mkdir()
    elif not os.path.lexists(path) or leads_away(root, path.parent):
        return
    elif what == "delete":
        remove(path)
    elif what == "mode":
        if not path.is_symlink():
            path.chmod(int(other, 8) | 0o100 * path.is_dir())
    elif what in ("rename", "hard link"):
        target = root / other
        if leads_away(root, target.parent) or not target.parent.is_dir():
            return
        if f"{other}/".startswith(f"{name}/") or f"{name}/".startswith(f"{other}/"):
            return
        if what == "rename":
            remove(target)
            path.rename(target)
        elif not path.is_dir() and not path.is_symlink():
            remove(target)
            os.link(path, target)
    elif what == "symbolic link":
        remove(path)
        path.symlink_to(other)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A fast folder."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


def backed_up_by_the_port(site: Site, night: int) -> None:
    status = site.run("-f", now=NIGHT.replace(day=21) + timedelta(days=night))
    assert status == 0 or (status == 3 and "*" in site.jobs)  # a name is a link, or empty by now


def backed_up_by_tar(site: Site, night: int) -> None:
    """As the Perl script did: with the renames of directories in it."""
    archive = subprocess.run(
        [require_tool("tar"), "-f", "-", "-g", f"{site.folder}/snapshot", "-C", "/", "-czp",
         str(site.data)], capture_output=True,
    )
    assert archive.returncode == 0, archive.stderr
    store = site.store()
    if not night:
        store.create()
    name = f"{site.data}-{night}-{'DIFF' if night else 'FULL'}:{0:020d}"
    store.put(name, archive.stdout, {})
    at = (NIGHT + timedelta(days=night)).timestamp()
    (file,) = (site.folder / "buckets" / "bkt").glob(f"*-{night}-*")
    os.utime(file, (at, at))


def told(capsys: Any, *words: str) -> str:
    """What a command prints: nothing that it finds, if it fails."""
    capsys.readouterr()
    status = s3napback.main(words)
    text = str(capsys.readouterr().out)
    assert status == 0 or (status, text) == (1, "")
    return text


def as_listed(whole: Path, data: Path) -> dict[str, tuple[str, int, str]]:
    """Mode, size and link of all that a restore brought."""
    found = {}
    for path in Path(f"{whole}{data}").rglob("*"):
        info = path.lstat()
        found[str(path).removeprefix(str(whole))] = (
            stat.filemode(info.st_mode), info.st_size if stat.S_ISREG(info.st_mode) else 0,
            os.readlink(path) if path.is_symlink() else "",
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backed_up", [backed_up_by_the_port, backed_up_by_tar])
def test_a_path_is_what_the_whole_restore_has_there(
    backed_up: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    by_tar = backed_up is backed_up_by_tar
    unit = 10**9 if by_tar else 1  # tar's plain format has no fractions of a second
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    @hypothesis.settings(
        max_examples=CASES, deadline=None, database=None, phases=PHASES,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(changes, min_size=2, max_size=4), st.integers(0, 3),
        st.lists(paths, min_size=1, max_size=2), st.sampled_from(["", "", "/*", "/[af]*"]),
    )
    def holds(
        nights: list[list[tuple[str, str, str]]], wanted: int, names: list[str], given: str
    ) -> None:
        shutil.rmtree(place)
        place.mkdir()
        site = Site(place)
        site.settings["ChunkSize"] = "100000"
        source = f"{site.data}{'' if by_tar else given}"
        site.jobs = f"Directory {source}"
        wanted = min(wanted, len(nights) - 1)
        for night, of_night in enumerate(nights):
            for change in of_night:
                apply(site.data, change)
            backed_up(site, night)
            if night == wanted:
                kept = inventory(site.data, links=False, unit=unit)
        start, config = NIGHT if by_tar else NIGHT.replace(day=21), ["-c", str(site.write())]
        days = [f"{start + timedelta(days=night):%Y-%m-%d}" for night in range(len(nights))]
        words = ["restore", *config, source, "--at", days[wanted]]
        whole, part = place / "whole", place / "part"
        status = s3napback.main([*words, "--to", str(whole)])
        assert status == 0, capsys.readouterr().err
        back = inventory(Path(f"{whole}{site.data}"), links=False, unit=unit)
        if "*" in source:  # the folder above was made, and the names may be but some
            del back["."], kept["."]
            kept = {path: one for path, one in kept.items() if given == "/*" or path[0] in "af"}
        assert back == kept
        members = [f"{site.data}/{name}" for name in names]
        status = s3napback.main([*words, "--to", str(part), *members])
        there = [m for m in members if os.path.lexists(f"{whole}{m}")]
        assert status == (0 if len(there) == len(members) else 1)
        for member in members:
            alone, among = Path(f"{part}{member}"), Path(f"{whole}{member}")
            assert inventory(alone, links=False) == inventory(among, links=False)
        beside = {p for p in part.rglob("*") if not any(
            p == Path(f"{part}{m}") or Path(f"{part}{m}") in p.parents
            or p in Path(f"{part}{m}").parents for m in members)}
        assert not beside
        lists = [told(capsys, "list", *config, source, "--files", "--json", "--at", day)
                 for day in days]
        find = ["find", *config, f"{site.data}/*", "--in", source]
        text = told(capsys, *find)
        shutil.rmtree(site.folder / "diffs")
        assert told(capsys, *find) == text
        assert told(capsys, "list", *words[1:], "--files", "--json") == lists[wanted]
        moments = Counter[str]()
        for files in lists:
            moments.update(one["path"] for one in json.loads(files)["files"])
        found = Counter[str]()
        for path, spans in re.findall(r"^(/.*)\n((?:  .*\n)+)", text, re.MULTILINE):
            for line in spans.splitlines()[::2]:
                match = re.search(r"(\d+) moments", line)
                found[path] += int(match[1]) if match else 1
        del moments[str(site.data)]
        assert found == moments
        assert as_listed(whole, site.data) == {
            one["path"]: (one["mode"], one["size"] * (one["mode"][0] == "-"), one["link"])
            for one in json.loads(lists[wanted])["files"] if one["path"] != str(site.data)}

    holds()
