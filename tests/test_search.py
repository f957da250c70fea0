"""Section 16 and its commands: what is in the archives, from DiffDir's indexes or without them."""

import errno
import gzip
import io
import itertools
import json
import os
import random
import re
import secrets
import shutil
import stat
import subprocess
import tarfile
import time
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ESC,
    NIGHT,
    Capture,
    Site,
    bad_compressor,
    fake_tool,
    nights,
    run_as_nobody,
    send,
    tmpfs,
)

import s3napback
from s3napback import Member

# What makes a name hard to write down.
AWKWARD = [
    b"a b", b" first", b"tab\t", b"new\nline", b"back\\slash", b"a\\nb", b"del\x7f", b"\xff\x80",
    "é€".encode(), "nel\u0085".encode(), b"a -> b", b"a link to b", b"quo'te\"", b"-rf", b"*?[x]",
    b"col:on", ESC.encode(),
]


def indexes(site: Site) -> list[Path]:
    return sorted((site.folder / "diffs").glob(".s3napback-*.files"))


def call(site: Site, capsys: Capture, *words: str, status: int = 0) -> tuple[str, str]:
    """What one of our commands prints, to standard output and error."""
    capsys.readouterr()
    assert site.run(*words, now=NIGHT + timedelta(days=99)) == status
    return capsys.readouterr()


def listed(site: Site, capsys: Capture, *words: str) -> dict[str, dict[str, Any]]:
    """What `list --files --json` says of each path, without and with the index."""
    given = [call(site, capsys, "list", str(site.data), "--files", "--json", *words)[0]]
    hidden = site.folder / "hidden"
    (site.folder / "diffs").rename(hidden)
    given.append(call(site, capsys, "list", str(site.data), "--files", "--json", *words)[0])
    hidden.rename(site.folder / "diffs")
    assert given[0] == given[1]
    return {one.pop("path"): one for one in json.loads(given[0])["files"]}


def on_disk(top: Path) -> dict[str, tuple[str, int, int, str]]:
    """Mode, size, time and link of all that is at and below a path."""
    found = {}
    for path in [top, *top.rglob("*")]:
        info = path.lstat()
        found[str(path)] = (
            stat.filemode(info.st_mode), info.st_size if stat.S_ISREG(info.st_mode) else 0,
            int(info.st_mtime), os.readlink(path) if path.is_symlink() else "",
        )
    return found


def plain(files: dict[str, dict[str, Any]]) -> dict[str, tuple[str, int, int, str]]:
    return {path: (one["mode"], one["size"], one["mtime"], one["link"])
            for path, one in files.items()}


def test_a_list_is_what_is_there_whatever_it_is_called(site: Site, capsys: Capture) -> None:
    for name in AWKWARD:
        (site.data / os.fsdecode(name)).write_bytes(name)
        (site.data / os.fsdecode(b"to " + name)).symlink_to(os.fsdecode(name))
    os.link(site.data / "a b", site.data / "hard")
    os.mkfifo(site.data / "fifo")
    with open(site.data / "sparse", "wb") as file:
        file.truncate(10**6)
    (site.data / "sub" / "deeper").mkdir(parents=True)
    (site.data / "sub").chmod(0o3711)
    os.utime(site.data / "col:on", (0, 1e9 + 0.75))
    assert site.run() == 0
    assert plain(listed(site, capsys)) == on_disk(site.data)


@pytest.mark.slow
def test_any_nights_are_listed_as_they_were(site: Site, capsys: Capture) -> None:
    """Files, folders and links that come, go and take each other's place."""
    chance = random.Random(14)
    names = ["a", "b", "c/d", "c/e", "c/d/f", "g/h", "g/h/i"]
    states = []
    for night in range(8):
        for name in names:
            path = site.data / name
            fate = chance.random()
            if fate < 0.5:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.parent.is_dir():
                path.unlink(missing_ok=True)
            if fate < 0.7 or not (path.parent.is_dir() or not path.parent.exists()):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if fate < 0.8:
                path.mkdir()
            elif fate < 0.85:
                path.symlink_to("nowhere")
            else:
                path.write_bytes(chance.randbytes(chance.randrange(99)))
        at = NIGHT + timedelta(days=night)
        assert site.run(now=at) == 0
        states.append((at, on_disk(site.data)))
    for at, state in states:
        assert plain(listed(site, capsys, "--at", f"{at:%Y-%m-%d %H:%M}")) == state


def test_a_path_is_listed_by_the_rules_of_a_restore(site: Site, capsys: Capture) -> None:
    (site.data / "sub").mkdir()
    (site.data / "sub" / "x").write_text("")
    assert site.run() == 0
    assert [*listed(site, capsys, f"{site.data}//sub/")] == [
        f"{site.data}/sub", f"{site.data}/sub/x"
    ]
    _, error = call(site, capsys, "list", str(site.data), "--files", "/no/such", status=1)
    assert re.search(r"not in the backup as of 2026-11-23 03:0\d:\d\d \+0000: no/such", error)


def test_hard_links_are_followed_whatever_they_are_called(site: Site, capsys: Capture) -> None:
    top = site.data
    for name in ("b link to c", "x link to link to ", "sub/to x"):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(name)
        os.link(top / name, top / f"{name} link to d")  # tar says which of them leads to which
        os.link(top / name, top / f"a link to {name.rpartition('/')[2]}")
    (top / "symbolic").symlink_to("file")
    os.link(top / "symbolic", top / "twin", follow_symlinks=False)
    assert site.run() == 0
    assert plain(listed(site, capsys)) == on_disk(top)
    (top / "plain").write_text("plain")
    os.link(top / "plain", top / "pair")
    at = NIGHT + timedelta(days=1)
    assert site.run(now=at) == 0
    for name, target in (("twin", "symbolic"), ("pair", "plain")):  # of its own from now on
        for path in (top / name, top / target):
            path.unlink()
    (top / "twin").symlink_to("file")
    (top / "pair").write_text("plain!")
    assert site.run(now=at + timedelta(days=1)) == 0
    for pattern in ("twin", "symbolic", "pair", "plain"):
        assert call(site, capsys, "find", pattern)[0] == _without_index(site, capsys, pattern)


def _without_index(site: Site, capsys: Capture, pattern: str) -> str:
    for path in indexes(site):
        path.rename(f"{path}.away")
    try:
        return call(site, capsys, "find", pattern)[0]
    finally:
        for path in (site.folder / "diffs").glob("*.away"):
            path.rename(str(path)[:-5])


def test_a_list_is_fit_for_a_terminal(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.data / ESC).write_text("")
    path = site.data / os.fsdecode(b"\xff")
    path.symlink_to(ESC)
    os.utime(path, (0, 1790000000), follow_symlinks=False)
    assert site.run() == 0
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        text, _ = call(site, capsys, "list", str(site.data), "--files")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "\x1b" not in text
    who = "/".join((path.owner(), path.group())) if not path.is_symlink() else "root/root"
    line = (f"lrwxrwxrwx {who:16} {0:12} 2026-09-21 10:13:20 {site.data}/\\udcff ->"
            " \\x1b]0;owned\\x07")
    assert line in text.splitlines()


@pytest.mark.parametrize("words, says", [
    (("list", "--files"), "--files needs a NAME"),
    (("list", "/x", "/y"), "a PATH, --at and --force-partial need --files"),
    (("list", "/x", "--at", "today"), "need --files"),
    (("find",), "no PATTERN given"),
    (("diff", "/x"), "give two moments"),
    (("diff", "/x", "--at", "1", "--at", "2", "--at", "3"), "give two moments"),
    (("diff", "/x", "--at", "rubbish"), "cannot read the moment 'rubbish'"),
    (("list", "Command/hello", "--files"), "of the kind Command: there are no files in it"),
    (("find", "x", "--in", "Command/hello"), "there are no files in dumps and repositories"),
])
def test_a_call_that_cannot_be_meant(
    site: Site, capsys: Capture, words: tuple[str, ...], says: str
) -> None:
    if "Command/hello" in words:
        site.jobs = "<Command hello>\nRun \"echo hello\"\n</Command>"
        assert site.run() == 0
    assert says in call(site, capsys, *words, status=2)[1]


def test_of_one_archive_there_is_one_moment(site: Site, capsys: Capture) -> None:
    """diff compared it with itself."""
    assert site.run() == 0
    (name,) = site.archives()
    for words in (["diff", name], ["list", name, "--files"], ["restore-script", name]):
        said = call(site, capsys, *words, "--at", "2026-11-24", status=2)[1]
        assert f"{name} is one archive: --at chooses among those of a source" in said


def test_what_is_found_comes_back_by_the_call_that_is_shown(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.folder)
    name = os.fsdecode(b"it's\n\\ \xff")
    (site.data / name).write_text("found")
    assert site.run() == 0
    (site.data / name).write_text("changed")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    (site.data / name).unlink()
    assert site.run(now=NIGHT + timedelta(days=2)) == 0
    text, error = call(site, capsys, "find", "it's*")
    assert not error
    newer, older = re.findall(r".* restore .*", text)
    for line, content in ((newer, "changed"), (older, "found")):
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True,
                               capture_output=True).stdout.split(b"\0")[:-1]
        assert os.access(words[0], os.X_OK)
        assert s3napback.main([os.fsdecode(word) for word in words[1:]]) == 0
        assert Path(f"{site.folder}/restored{site.data}/{name}").read_text() == content
        shutil.rmtree(site.folder / "restored")
    assert f"as of 2026-11-24 03:00:00 +0000, in {site.data}-19-DIFF" in text
    told = json.loads(call(site, capsys, "find", "it's*", "--json")[0])
    assert told["format"] == 1
    assert [one["restore"] for one in told["versions"]] == [newer.strip(), older.strip()]
    assert [one["path"] for one in told["versions"]] == [f"{site.data}/{name}"] * 2


def test_moments_and_archives_of_a_file(site: Site, capsys: Capture) -> None:
    at = nights(site, 3)
    (site.data / "night0").unlink()
    assert site.run(now=at) == 0
    text, _ = call(site, capsys, "find", "night[01]")
    assert re.findall(r"as of (.*)", text) == [
        f"2026-11-{first} 03:00:00 +0000 to 2026-11-{last} 03:00:00 +0000, 3 moments, in"
        f" {site.data}-{slot}-DIFF" for first, last, slot in ((21, 23, 16), (20, 22, 15))
    ]
    newer, older = json.loads(call(site, capsys, "find", "night[01]", "--json")[0])["versions"]
    assert newer["moments"] == [f"2026-11-{day}T03:00:00Z" for day in (21, 22, 23)]
    assert older["archives"] == [older["archive"]] == [f"{site.data}-15-DIFF"]
    files = listed(site, capsys, "--at", "2026-11-22")
    assert older == {"path": f"{site.data}/night0", **files[f"{site.data}/night0"],
                     **{name: older[name] for name in ("archives", "moments", "restore")}}


def test_what_is_in_a_folder_is_gone_with_it(site: Site, capsys: Capture) -> None:
    (site.data / "outer" / "inner").mkdir(parents=True)
    (site.data / "outer" / "inner" / "found").write_text("x")
    assert site.run() == 0
    shutil.rmtree(site.data / "outer")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    text, _ = call(site, capsys, "find", "found")
    assert "as of 2026-11-23 03:00:00 +0000, in" in text
    assert text == _without_index(site, capsys, "found")


def test_what_a_pattern_means(site: Site, capsys: Capture) -> None:
    for name in ("a/x.tex", "b/a/x.tex", "y.tex"):
        (site.data / name).parent.mkdir(parents=True, exist_ok=True)
        (site.data / name).write_text("")
    assert site.run() == 0
    for pattern, found in {
        "x.tex": ["a/x.tex", "b/a/x.tex"], "*.tex": ["a/x.tex", "b/a/x.tex", "y.tex"],
        "a/x.tex": ["a/x.tex", "b/a/x.tex"], "*/data/a/*": ["a/x.tex"], "[!x].tex": ["y.tex"],
        f"{site.data}/a/*": ["a/x.tex"], "a/": ["a", "b/a"], "b/a/": ["b/a"], "/": [],
        "a": ["a", "b/a"], "tex": [], "/a/x.tex": [], "?": ["a", "b", "b/a"], "[]x].tex": [
            "a/x.tex", "b/a/x.tex"],
    }.items():
        text, error = call(site, capsys, "find", pattern, status=0 if found else 1)
        assert re.findall(rf"^{site.data}/(.*)", text, re.M) == found, pattern
        if not found:
            assert f"none of the 1 archives searched has {pattern}" in error


def test_the_last_word_may_be_the_source(site: Site, capsys: Capture) -> None:
    other = site.folder / "other"
    other.mkdir()
    (other / "file").write_text("")
    site.jobs += f"\nDirectory {other}"
    assert site.run() == 0
    both = call(site, capsys, "find", "file")[0]
    assert str(other) in both and str(site.data) in both
    for words in (("file", str(other)), ("file", "--in", str(other))):
        text, _ = call(site, capsys, "find", *words)
        assert str(other) in text and f"{site.data}/" not in text
    text, _ = call(site, capsys, "find", "file", "/no/source")  # so it is a pattern
    assert str(site.data) in text
    _, error = call(site, capsys, "find", "file", "--in", "/no/source", status=1)
    assert "there is no backup of /no/source" in error


def test_the_call_names_the_bucket_as_the_search_did(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run() == 0
    assert s3napback.main(["find", "file", *site.bucket]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()[2:]
    assert words[:4] == site.bucket
    assert words[-2:] == [f"web1{site.data}", f"{site.data}/file"]
    place = str(site.folder / "back")
    words[words.index("restored")] = place
    at = words.index("--at") + 1
    words[at : at + 3] = [" ".join(words[at : at + 3]).strip("'")]
    assert s3napback.main(["restore", *words]) == 0
    assert Path(f"{place}{site.data}/file").read_text() == "one"


def test_what_is_fetched_is_told_beforehand(site: Site, capsys: Capture) -> None:
    at = nights(site, 2)
    indexes(site)[0].unlink()
    size = s3napback.size_text(min(one.size for one in site.archives().values()))
    _, error = call(site, capsys, "find", "night0")
    told = re.findall(r"s3napback: 1 archives, (.*?), (?:are fetched: there|were read in )", error)
    assert told in ([size, size], [size_of(site, 0)] * 2, [size_of(site, 1)] * 2)
    assert site.run("-f", now=at) == 0


def size_of(site: Site, number: int) -> str:
    sizes = sorted((name, one.size) for name, one in site.archives().items())
    return s3napback.size_text(sizes[number][1])


def test_new_gone_changed_and_renamed(site: Site, capsys: Capture) -> None:
    for name in ("kept", "gone", "old name", "changed", "mode", "twin1", "twin2"):
        (site.data / name).write_text(name)
        os.utime(site.data / name, (1e9, 1e9))
    (site.data / "folder").mkdir()
    (site.data / "link").symlink_to("here")
    os.utime(site.data / "link", (1e9, 1e9), follow_symlinks=False)
    (site.data / "mode").chmod(0o644)
    assert site.run() == 0
    owner = (site.data / "mode").owner() + "/" + (site.data / "mode").group()
    (site.data / "link").unlink()
    (site.data / "link").symlink_to("there")
    os.utime(site.data / "link", (1e9, 1e9), follow_symlinks=False)
    (site.data / "gone").unlink()
    (site.data / "old name").rename(site.data / "folder" / "new name")
    for name in ("twin1", "twin2"):  # which is which is not known but by the name
        (site.data / name).rename(site.data / "folder" / name)
    (site.data / "changed").write_text("changed more")
    os.utime(site.data / "changed", (2e9, 2e9))
    (site.data / "mode").chmod(0o600)
    (site.data / "new").symlink_to("x")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    top = site.data
    text, _ = call(site, capsys, "diff", str(top), "--at", "2026-11-23", "--at", "2026-11-24")
    assert text.splitlines() == [
        f"changed  {top}/changed, 7 bytes of 2001-09-09 01:46:40, then 12 bytes of 2033-05-18"
        " 03:33:20",
        f"gone     {top}/gone",
        f"changed  {top}/link, 0 bytes of 2001-09-09 01:46:40 -> here,"
        " then 0 bytes of 2001-09-09 01:46:40 -> there",
        f"changed  {top}/mode, -rw-r--r-- {owner} 4 bytes of 2001-09-09 01:46:40,"
        f" then -rw------- {owner} 4 bytes of 2001-09-09 01:46:40",
        f"new      {top}/new",
        f"renamed  {top}/old name -> {top}/folder/new name",
        f"renamed  {top}/twin1 -> {top}/folder/twin1",
        f"renamed  {top}/twin2 -> {top}/folder/twin2",
    ]
    assert call(site, capsys, "diff", str(top), "--at", "2026-11-23")[0] == text
    assert not call(site, capsys, "diff", str(top), "--at", "2026-11-24")[0]
    told = json.loads(call(site, capsys, "diff", str(top), "--at", "2026-11-23", "--json")[0])
    assert (told["from"], told["to"]) == ("2026-11-23T03:00:00Z", "2026-11-24T03:00:00Z")
    changes = {(one["before"] or one["after"])["path"]: one for one in told["changes"]}
    assert [f"{one['change']:8} {path}" for path, one in changes.items()] == [
        line.partition(",")[0].partition(" -> ")[0] for line in text.splitlines()
    ]
    assert changes[f"{top}/gone"]["after"] is changes[f"{top}/new"]["before"] is None
    assert changes[f"{top}/old name"]["after"]["path"] == f"{top}/folder/new name"
    assert [changes[f"{top}/changed"][side]["size"] for side in ("before", "after")] == [7, 12]


def test_an_index_of_an_archive_without_a_member_is_read(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.data}/f*"  # files only, and none of them has changed
    assert site.run("-f", now=NIGHT) == 0
    assert site.run("-f", now=NIGHT + timedelta(days=1)) == 0
    assert len(indexes(site)) == 2
    words = "list", f"{site.data}/f*", "--files"
    assert f"{site.data}/file" in call(site, capsys, *words)[0]
    text, error = call(site, capsys, "find", "file")
    assert "2 moments" in text
    assert not error


def test_an_index_is_private_and_no_part_of_the_bucket(site: Site) -> None:
    assert site.run() == 0
    (path,) = indexes(site)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ((_, archive),) = site.archives().items()
    assert path.read_bytes()[:33].decode() == archive.metadata["archive"] + "\n"
    assert str(site.data).encode() in zlib.decompress(path.read_bytes()[33:])
    assert not list((site.folder / "buckets").rglob("*.files"))


def test_an_index_agrees_with_its_archive_after_whatever_night(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night that fails, one that is ended between archive and index, and one after both."""
    assert site.run() == 0
    (site.data / "second").write_text("2")
    site.settings["Compressor"] = bad_compressor(site.folder, "cat > /dev/null; exit 1")
    assert site.run(now=NIGHT + timedelta(days=1)) == 1
    assert len(indexes(site)) == 1
    del site.settings["Compressor"]
    with monkeypatch.context() as patch:
        patch.setattr(s3napback.DiffDir, "commit", lambda *_: os.kill(os.getpid(), 15))
        assert site.run(now=NIGHT + timedelta(days=1)) == 143
    assert [*listed(site, capsys)] == [f"{site.data}", f"{site.data}/file", f"{site.data}/second"]
    (site.data / "file").unlink()
    assert site.run("-f", now=NIGHT + timedelta(days=1)) == 0
    assert len(indexes(site)) == 2
    assert [*listed(site, capsys)] == [f"{site.data}", f"{site.data}/second"]


def test_an_index_of_another_archive_is_not_used(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    (path,) = indexes(site)
    before = path.read_bytes()
    (site.data / "file").rename(site.data / "file2")
    assert site.run("-f") == 0
    path.write_bytes(before)
    text, error = call(site, capsys, "list", str(site.data), "--files")
    assert "file2" in text
    assert "are fetched: there is no index of them here" in error


@pytest.mark.parametrize("content", [b"", b"rubbish", zlib.compress(b"[1]\nx\n\n"),
                                     zlib.compress(b"[]\nx y z\n\n"),
                                     zlib.compress(b"[]\n\n\n[1, 2]")])
def test_an_index_that_is_damaged_is_told(site: Site, capsys: Capture, content: bytes) -> None:
    assert site.run() == 0
    (path,) = indexes(site)
    path.write_bytes(path.read_bytes()[:33] + content)
    _, error = call(site, capsys, "list", str(site.data), "--files", status=1)
    assert f"the index {path} cannot be read" in error
    assert "delete it: then the archive is fetched" in error
    _, error = call(site, capsys, "find", "*", status=1)
    assert "is not searched" in error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError()])
@pytest.mark.parametrize("number", [0, 1, 99])
def test_an_error_costs_the_index_and_not_the_backup(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, number: int
) -> None:
    """At the names, at tar's first lines (a pipe does not hold all of them), or at the end."""
    for n in range(3000):
        (site.data / f"{'long' * 60}{n}").touch()

    compressor = zlib.compressobj

    class Failing:
        def __init__(self) -> None:
            self.calls, self.real = itertools.count(), compressor(1)

        def compress(self, data: bytes) -> bytes:
            if next(self.calls) == number:
                raise error
            return self.real.compress(data)

        def flush(self) -> bytes:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(zlib, "compressobj", lambda level: Failing())
        assert site.run() == 0
    assert indexes(site) == []
    assert f"{site.data}/file" in listed(site, capsys)


def test_an_index_leaves_the_room_that_the_diff_file_needs(site: Site) -> None:
    for n in range(2000):
        (site.data / f"{'long' * 20}{secrets.token_hex(40)}{n}").touch()
    with tmpfs(site.folder / "diffs", "size=700k"):
        assert site.run() == 0
        assert site.diff_files()


def test_a_last_snapshot_that_cannot_be_read_again_costs_the_index_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.run() == 0

    def unreadable(_: object) -> Iterator[s3napback.Folder]:
        yield from ()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(s3napback.Draft, "_with_other_names", unreadable)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert len(indexes(site)) == 1


@pytest.mark.parametrize("lacking", ["thread", "room"])
def test_a_run_without_an_index_asks_tar_for_no_lines_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "index"
    path.touch()
    with monkeypatch.context() as patch:
        if lacking == "thread":
            patch.setattr("threading.Thread.start", refused)
        else:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        before = os.listdir("/proc/self/fd")
        index = s3napback.IndexDraft(str(path))
        assert index.begin(["/etc"]) == -1
        index.close()
        assert len(os.listdir("/proc/self/fd")) == len(before)
    assert path.read_bytes() == b""


def test_where_tar_cannot_be_given_a_descriptor_there_is_no_index(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda p: "/dev/fd" not in str(p) and exists(p))
        assert site.run() == 0
    assert indexes(site) == []
    assert f"{site.data}/file" in listed(site, capsys)


def test_a_file_that_was_lost_one_night_and_gone_the_next(nobodys: Site, capsys: Capture) -> None:
    site = nobodys
    assert run_as_nobody(site).returncode == 0
    (site.data / "file").write_text("two")
    (site.data / "file").chmod(0)
    os.chown(site.data / "file", 0, 0)
    done = run_as_nobody(site, now=NIGHT + timedelta(days=1))
    assert done.returncode == 3, done.stderr
    assert f"{site.data}/file" in listed(site, capsys)  # as it was the night before
    (site.data / "file").unlink()
    assert run_as_nobody(site, now=NIGHT + timedelta(days=2)).returncode == 0
    assert [*listed(site, capsys)] == [str(site.data)]


def test_archives_of_the_perl_script_with_what_tar_renamed(site: Site, capsys: Capture) -> None:
    (site.data / "one").mkdir()
    (site.data / "one" / "x").write_text("x")
    for night, mode in enumerate(("FULL", "DIFF")):
        if night:
            (site.data / "one").rename(site.data / "two")
            (site.data / "file").unlink()
        snar = site.folder / "snar"
        data = subprocess.run(["tar", "-cz", "-f", "-", "-g", snar, "-C", "/", str(site.data)],
                              check=True, capture_output=True).stdout
        store = site.store()
        if not night:
            store.create()
        send(store, data, f"{site.data}-{night}-{mode}", 10**6)
        key = s3napback.chunk_key(f"{site.data}-{night}-{mode}", 0)
        for item in s3napback.archive_objects(store, f"{site.data}-{night}-{mode}"):
            folder = s3napback.FolderStore(f"{site.folder}/buckets", "bkt", time.time)
            os.utime(folder.path_of(item.key), (1e9 + 9e4 * night,) * 2)
            assert item.key == key
    text = call(site, capsys, "list", str(site.data), "--files")[0]
    assert {line.split()[-1] for line in text.splitlines()} == {*on_disk(site.data)}
    text = call(site, capsys, "find", "x")[0]
    assert f"{site.data}/two/x" in text and f"{site.data}/one/x" in text


def test_a_damaged_archive_is_not_taken_for_a_short_one(site: Site, capsys: Capture) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("etc/x")
        member.size = 9999
        tar.addfile(member, io.BytesIO(bytes(9999)))
    store = site.store()
    store.create()
    for number, data in enumerate((content.getvalue()[:1000], b"no tar at all " * 99)):
        send(store, gzip.compress(data), f"/damaged{number}-0-FULL", 10**6)
        call(site, capsys, "list", f"/damaged{number}", "--files", status=1)
        _, error = call(site, capsys, "find", "x", f"/damaged{number}", status=1)
        assert "-0-FULL is not searched" in error


def test_a_repository_has_no_files(site: Site, capsys: Capture) -> None:
    store = site.store()
    store.create()
    content = gzip.compress(b"SVN-fs-dump-format-version: 2\n\nUUID: 1\n" * 9)
    send(store, content, "/svn-0-FULL", 9999)
    _, error = call(site, capsys, "list", "/svn", "--files", status=1)
    assert "it holds the revisions of a repository, and no files" in error


def test_messages_of_tar_stay_what_they_are_though_it_lists(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(site, monkeypatch, "tar", 'echo "tar: $0: file changed as we read it" >&2;'
              ' "$REAL" "$@"; exit 1')
    _, error = call(site, capsys, status=3)
    assert len(re.findall("WARN ", error)) == 2  # tar's one, and that it is stored


def test_what_a_line_of_a_listing_says() -> None:
    line = rb"lrwxrwxrwx  a b/c d         0 2026-11-20 03:00:00.5       /x\n \-\> y -> z"
    line = line.replace(rb"\-", b"-")
    assert s3napback.listed_member(line, "A") == (
        "x\n -> y", Member("lrwxrwxrwx", "a b/c d", 0, 1795143600, "z", "A"))
    line = b"crw-------+ root/root       1,3 36812-02-20 00:36:16 dev/null"
    path, member = s3napback.listed_member(line, "A")
    assert (path, member.size) == ("dev/null", 1)
    with pytest.raises(s3napback.Failure, match="not tar's"):
        s3napback.listed_member(b"no line", "A")
