"""Whoever may write to the bucket: what they put there ends in a sentence, and in `--to`."""

import gzip
import io
import json
import os
import re
import resource
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ESC, NIGHT, START, Site, inventory, leave_out, program, tmpfs

import s3napback
from s3napback import META

# ---- archives that attack a restore ----


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def link(name: str, target: str) -> Member:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def plain(name: str) -> Member:
    return member(name, b"planted")


def dumpdir(name: str, *entries: str) -> Member:
    """What GNU tar writes for a directory in an incremental archive: the names that were in it."""
    content = b"".join(entry.encode() + b"\0" for entry in entries) + b"\0"
    return member(name, content, type=b"D", mode=0o755)


def packed(*members: Member) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(content.getvalue())


def put_chain(site: Site, *archives: bytes) -> list[str]:
    """Stores the archives as the Perl script would have, and gives the words that restore them."""
    store = site.store()
    store.create()
    for slot, data in enumerate(archives):
        mode = "DIFF" if slot else "FULL"
        store.put(f"/data-{slot}-{mode}:0000000000000", data, {})
        time.sleep(0.01)
    return ["restore", *site.bucket, "/data", "--to", str(site.folder / "to")]


def attack(site: Site, *members: Member) -> list[str]:
    """The words that restore an archive of these members, and something for them to attack."""
    (site.folder / "outside").mkdir()
    (site.folder / "outside" / "kept").write_text("kept")
    return put_chain(site, packed(*members))


def outside(site: Site) -> dict[str, str]:
    """Everything that is not where the restore was to go."""
    return {
        str(path): path.read_text() if path.is_file() else ""
        for path in [*(site.folder / "outside").rglob("*"), *site.folder.glob("*")]
        if path.name != "to"
    }


ATTACKS: dict[str, Callable[[str], list[Member]]] = {
    "an absolute name": lambda out: [member(f"{out}/new", b"bad")],
    "..": lambda out: [member("../outside/new", b"bad"), member("a/../../outside/new", b"bad")],
    "through a symbolic link": lambda out: [
        link("link", out), member("link/new", b"bad"),
    ],
    "over a symbolic link": lambda out: [
        link("link", f"{out}/kept"), member("link", b"bad"),
    ],
    "a relative symbolic link": lambda out: [
        member("a", type=tarfile.DIRTYPE, mode=0o755),
        link("a/link", "../../outside"),
        member("a/link/new", b"bad"),
    ],
    "a hard link": lambda out: [
        member("hard", type=tarfile.LNKTYPE, linkname=f"{out}/kept"), member("hard", b"bad"),
    ],
    "a hard link by ..": lambda out: [
        member("hard", type=tarfile.LNKTYPE, linkname="../outside/kept"), member("hard", b"bad"),
    ],
    "a directory that is emptied": lambda out: [
        link("link", out), dumpdir("link/", "Yother"),
    ],
    "a directory that is emptied by ..": lambda out: [dumpdir("../outside/", "Yother")],
    "a renaming to outside": lambda out: [
        member("mine", b"bad"), dumpdir("./", "Ymine", "Rmine", f"T{out}/new"),
    ],
    "a renaming from outside": lambda out: [
        dumpdir("./", f"R{out}/kept", "Tmine"), member("x", b"x"),
    ],
    "a renaming by ..": lambda out: [
        member("mine", b"bad"), dumpdir("./", "Ymine", "Rmine", "T../outside/new"),
    ],
    "a temporary directory outside": lambda out: [
        dumpdir("./", f"X{out}/tmp", f"R{out}/kept", "T"), member("x", b"x"),
    ],
}


@pytest.mark.parametrize("how", list(ATTACKS))
def test_a_restore_stays_in_its_folder(site: Site, how: str, capsys: Any) -> None:
    words = attack(site, *ATTACKS[how](str(site.folder / "outside")))
    before = outside(site)
    status = s3napback.main(words)
    said = capsys.readouterr().err
    assert outside(site) == before
    assert status in (0, 1, 3)  # 3: what tar would not do is told, and the rest comes back
    assert status != 1 or said.startswith("s3napback: /data-0-FULL: tar ended with status 2")
    assert "Traceback" not in said


def test_devices_and_set_user_id_stay_what_they_are_inside(site: Site) -> None:
    """They may be a rightful part of a backup; the folder of the restore is private."""
    words = attack(
        site, member("fifo", type=tarfile.FIFOTYPE), member("su", b"x", mode=0o4755),
        member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    )
    if os.geteuid():
        leave_out("devices need root")
    assert s3napback.main(words) == 0
    target = site.folder / "to"
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert stat.S_ISFIFO((target / "fifo").stat().st_mode)
    assert stat.S_ISCHR((target / "null").stat().st_mode)


@pytest.fixture
def trap(site: Site) -> Site:
    (site.folder / "outside" / "sub").mkdir(parents=True)
    (site.folder / "outside" / "sub" / "kept").write_text("kept")
    os.chmod(site.folder / "outside" / "sub", 0o700)
    return site


SECOND = {
    "a file": [plain("link/new")], "over a file": [plain("link/sub/kept")],
    "a folder": [dumpdir("link/new/")], "a folder's mode": [dumpdir("link/sub/")],
    "a folder's content": [dumpdir("link/sub/"), plain("x")],
    "a hard link": [member("hard", type=tarfile.LNKTYPE, linkname="link/sub/kept"),
                    plain("hard")],
    "a renaming": [dumpdir("./", "Rlink/sub", "Tmine")],
}


@pytest.mark.parametrize("target", ["absolute", "..", "by another link"])
@pytest.mark.parametrize("what", list(SECOND))
def test_a_link_of_one_archive_is_no_way_out_for_the_next(
    trap: Site, what: str, target: str, capsys: Any
) -> None:
    outside = trap.folder / "outside"
    first = {
        "absolute": [link("link", str(outside))], "..": [link("link", "../outside")],
        "by another link": [link("other", str(outside)), link("link", "other")],
    }[target]
    words = put_chain(trap, packed(*first), packed(*SECOND[what]))
    before = inventory(outside, links=False)
    status = s3napback.main(words)
    assert inventory(outside, links=False) == before
    assert status in (0, 1, 3)  # 3: what tar would not do is told, and the rest comes back
    said = capsys.readouterr().err
    assert status != 1 or said.startswith("s3napback: /data-1-DIFF: tar ended with status 2")


def test_a_link_from_an_earlier_restore_is_no_way_out(trap: Site, capsys: Any) -> None:
    outside = trap.folder / "outside"
    words = put_chain(trap, packed(plain("link/new")))
    (trap.folder / "to").mkdir()
    (trap.folder / "to" / "link").symlink_to(outside)
    before = inventory(outside, links=False)
    assert s3napback.main([*words, "--overwrite"]) == 1
    assert "to/link is no folder" in capsys.readouterr().err
    assert inventory(outside, links=False) == before
    assert os.readlink(trap.folder / "to" / "link") == str(outside)


def change(data: Path) -> None:
    """All that can happen to links from one night to the next."""
    (data / "gone").unlink()
    (data / "to file").unlink()
    (data / "to file").write_text("file")
    (data / "to folder").unlink()
    (data / "to folder").mkdir()
    (data / "to folder" / "in").write_text("in")
    (data / "elsewhere").unlink()
    (data / "elsewhere").symlink_to("/new/place")
    (data / "moved").rename(data / "renamed")
    os.link(data / "stays", data / "second name", follow_symlinks=False)
    (data / "new").symlink_to("../../new")


def test_links_come_back_as_they_were(site: Site) -> None:
    """Through three archives: unchanged, deleted, replaced, moved, doubled and new ones."""
    data = site.data
    (data / "moved").mkdir()
    (data / "shut").mkdir()
    for name in ("stays", "gone", "to file", "to folder", "elsewhere", "moved/in", "shut/in"):
        (data / name).symlink_to(f"../outside/{name}")
    (data / os.fsdecode(b"caf\xe9")).symlink_to(b"/caf\xe9/" + b"x" * 3000)
    (data / "inner").symlink_to("stays")
    (data / "like one").write_bytes(b"x" * 40)
    (data / "like one").chmod(0o400)
    if os.geteuid() == 0:
        os.chown(data / "stays", 1234, 1235, follow_symlinks=False)
    os.utime(data / "stays", ns=(10**18, 10**18), follow_symlinks=False)
    (data / "shut").chmod(0o555)
    site.settings["ChunkSize"] = "100000"
    for night in range(3):
        if night == 1:
            change(data)
        if night == 2:
            (data / "later").symlink_to("/later")
        assert site.run("-f", now=NIGHT.replace(day=21 + night)) == 0
    assert len(site.archives()) == 3
    back = site.restored()
    assert inventory(back, links=False) == inventory(data, links=False)
    links = back / "stays", back / "second name"
    assert os.lstat(links[0]).st_ino == os.lstat(links[1]).st_ino


def header(name: str, size: int, **fields: Any) -> bytes:
    info, _ = member(name, **fields)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


PAX: dict[str, dict[str, str]] = {
    "path": {"path": "OUT/new"}, "..": {"path": "../outside/new"},
    "a link's target": {"linkpath": "OUT/sub/kept"},
    "a sparse file's name": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                             "GNU.sparse.name": "OUT/new", "GNU.sparse.realsize": "1"},
    "a renaming": {"GNU.dumpdir": "ROUT/sub/kept\0Tmine\0"},
    "an attribute": {"SCHILY.xattr.security.capability": "x" * 20},
    "a size": {"size": "999999999999999999999"}, "a date": {"mtime": "9" * 30},
    "an owner": {"uid": "-1", "uname": "root\n"},
    "a charset": {"charset": "BINARY", "path": "\x1b"},
}


@pytest.mark.parametrize("what", list(PAX))
def test_what_a_pax_header_says_leads_to_nowhere_else(trap: Site, what: str, capsys: Any) -> None:
    outside = trap.folder / "outside"
    said = {name: value.replace("OUT", str(outside)) for name, value in PAX[what].items()}
    records = b""
    for name, value in said.items():
        body = b" %s=%s\n" % (name.encode(), value.encode())
        size = len(body) + len(str(len(body) + 3))
        records += str(size).encode() + body
    form = {"a link's target": b"1", "a renaming": b"5"}.get(what, b"0")
    data = b"" if form != b"0" else b"x"
    archive = (
        header("pax", len(records), type=b"x") + records + bytes(-len(records) % 512)
        + header("mine", len(data), type=form, linkname="x") + data + bytes(-len(data) % 512)
        + bytes(1024)
    )
    words = put_chain(trap, gzip.compress(archive))
    before = inventory(outside, links=False)
    status = s3napback.main(words)
    err = capsys.readouterr().err
    assert inventory(outside, links=False) == before
    assert status in (0, 3) or (status, err.count("\n")) == (1, 1), err
    assert "\x1b" not in err


# ---- bombs ----


def bomb(site: Site, gigabytes: int) -> list[str]:
    """Words that restore an archive of so many blanks, which are a thousandth of that in gzip."""
    store = site.store()
    store.create()
    blanks = gzip.compress(b" " * 100_000_000, 9)
    store.put("MySQL/bomb-0:0000000000000", blanks * (gigabytes * 10), {})
    return ["restore", *site.bucket, "MySQL/bomb"]


@pytest.mark.slow
def test_a_bomb_fills_no_memory(site: Site) -> None:
    words = [sys.executable, START, *bomb(site, 4), "--stdout"]
    most = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            # Not ru_maxrss: that of a child begins with what its parent had.
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max([most, *(int(n) for n in re.findall(r"VmHWM:\s+(\d+)", status))])
            time.sleep(0.05)
    assert process.returncode == 0
    assert 10_000 < most < 150_000  # KiB; 4 GB came out


def test_a_bomb_on_a_small_disk_ends_with_a_sentence(site: Site, capsys: Any) -> None:
    place = site.folder / "small"
    place.mkdir()
    with tmpfs(place, "size=1m"):
        assert s3napback.main([*bomb(site, 1), "--to", str(place / "dump")]) == 1
        assert not list(place.iterdir())
    assert "No space left on device" in capsys.readouterr().err


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    place = site.folder / "small"
    place.mkdir()
    with tmpfs(place, "size=1m"):
        yield place


@pytest.mark.slow
def test_a_folder_that_fills_the_disk_ends_with_a_sentence(
    site: Site, small_disk: Path, capsys: Any
) -> None:
    zeros = gzip.compress(bytes(100_000_000), 9)
    words = put_chain(site, gzip.compress(header("bomb", 2 * 10**9)) + zeros * 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert s3napback.main([*words[:-1], str(small_disk / "to")]) == 1
    assert "(free some room there)" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


def test_a_sparse_file_takes_no_room(site: Site, small_disk: Path, capsys: Any) -> None:
    """8 TiB of hole: old GNU format, with one piece of a byte at its end."""
    hole = 8 * 2**40
    block = bytearray(header("hole", 512, type=b"S"))

    def number(value: int) -> bytes:  # base 256 (GNU tar manual, "Extensions")
        return bytes([0x80]) + value.to_bytes(11, "big")

    block[386:410] = number(hole - 512) + number(512)
    block[483:495] = number(hole)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    words = put_chain(site, gzip.compress(bytes(block) + b"x" * 512 + bytes(1024)))
    status = s3napback.main([*words[:-1], str(small_disk / "to")])
    assert status == 0, capsys.readouterr().err
    made = (small_disk / "to" / "hole").stat()
    assert (made.st_size, made.st_blocks * 512 <= 8192) == (hole, True)


# ---- objects that are not ours, and metadata that lies ----


FOREIGN = [
    "no-colon", ":", "::", ":0", "a:", "a:x", "a/../b", "dir/", "-1-FULL:0", "x-FULL:1",
    "a-0-FULL:9999999999999", "a-1-FULL:" + "9" * 900, f"{ESC}-0-FULL:0000000000000",
    "b-0-FULL:s3napback-new:0000000000005", "line\nbreak-0-FULL:0000000000000",
    "MySQL/:0", "MySQL/-0:0", "PostgreSQL/x-99999999999999999999:0",
]


LIES = [
    {"chunks": "1000000000000"}, {"chunks": "-1"}, {"chunks": "one"}, {"bytes": "7"},
    {"md5": "f" * 32}, {"md5": "no hex"}, {"state": ":"}, {"state": "a" * 500}, {"state": "5:3"},
    {"made": "9999-12-31T23:59:59Z"}, {"made": "99999-01-01"}, {"made": "soon"},
    {"made": "0001-01-01T00:00:00Z"}, {"kind": ESC}, {"kind": "Subversion"}, {"status": ESC},
    {"archive": ""},
]


def true_marks(data: bytes) -> dict[str, str]:
    import hashlib

    md5 = hashlib.md5(data).hexdigest()
    marks = {"archive": "x", "chunks": "1", "bytes": str(len(data)), "kind": "Directory",
             "md5": s3napback.digest_of_digests([md5]), "made": "2026-11-20T03:00:00Z",
             "state": f"-:{'0' * 64}", "status": "ok"}
    return marks


def fill(site: Site) -> None:
    store = site.store()
    store.create()
    for key in FOREIGN:
        store.put(key, b"foreign", {})
    data = gzip.compress(b"")
    for n, lie in enumerate(LIES):
        marks = {META + name: value for name, value in {**true_marks(data), **lie}.items()}
        store.put(f"/lies-{n}-FULL:0000000000000", data, marks)
        store.put(f"/diffs{n}-{n}-DIFF:0000000000000", data, marks)


@pytest.mark.parametrize(
    "words",
    [["list"], ["list", "--json"], ["verify"], ["verify", "--deep"], ["list", "/lies"],
     ["restore", "/lies", "--to", "TO"], ["restore", "/lies-5-FULL", "--to", "TO"],
     ["restore-script", "/diffs3"], ["js3tream", "-l"], ["js3tream", "-o"]],
    ids=" ".join,
)
def test_a_bucket_full_of_lies(site: Site, words: list[str], capsys: Any) -> None:
    fill(site)
    place = site.bucket
    if words == ["js3tream", "-o"]:
        place[1] = "bkt:a-0-FULL"
    words = [str(site.folder / "to") if word == "TO" else word for word in words]
    started = time.monotonic()
    status = s3napback.main([*words, *place])
    seen = capsys.readouterr()
    assert status in (0, 1)
    assert "Traceback" not in seen.err
    assert "\x1b" not in seen.out + seen.err, "it would reach the terminal"
    assert time.monotonic() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1_500_000
    if words == ["list"]:
        assert "/lies-0-FULL  " in seen.out
        assert "where its last one counts 1000000000000" in seen.out


def test_names_and_lies_do_not_break_json(site: Site, capsys: Any) -> None:
    fill(site)
    place = site.bucket
    assert s3napback.main(["list", "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["bucket"] == "bkt"


# ---- what reaches the terminal ----


FORGED = f"/a\ns3napback: all is well{ESC}\x9b2J"


def put_forged(site: Site) -> list[str]:
    store = site.store()
    store.create()
    store.put(f"{FORGED}-0-FULL:0000000000000", gzip.compress(b""), {"tag": f"x\ny{ESC}"})
    store.put("/€-0-FULL:0000000000000", packed(plain("file")), {})
    store.put("/€-1-DIFF:0000000000001", gzip.compress(b""), {})
    return site.bucket


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "words"),
    # latin-1 can write each of the letters that move a cursor, and has no €.
    [("utf-8", ["list"]), ("ascii", ["list"]), ("ascii", ["restore", f"{FORGED}x"]), *(
        ("latin-1", words) for words in (
            ["list"], ["verify"], ["verify", "--deep"], ["js3tream", "-l"],
            ["restore", f"{FORGED}x"], ["restore", FORGED], ["restore-script", f"{FORGED}x"],
            ["js3tream", "-o"]))], ids=repr,
)
def test_names_forge_no_line_and_move_no_cursor(
    site: Site, words: list[str], encoding: str
) -> None:
    place = put_forged(site)
    if words == ["js3tream", "-o"]:
        place[1] += f":{FORGED}x"
    if words[0] == "restore":
        place += ["--to", str(site.folder / "to")]
    done = subprocess.run(
        [sys.executable, START, *words, *place], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode in (0, 1)
    assert "Traceback" not in said
    assert not [c for c in said if c != "\n" and c != "\t" and (c < " " or "\x7f" <= c < "\xa0")]
    assert not [line for line in said.splitlines() if line.startswith("s3napback: all is well")]


def test_the_script_moves_no_cursor_and_runs_in_any_locale(site: Site) -> None:
    place = put_forged(site)
    done = subprocess.run(
        [sys.executable, START, "restore-script", "/€-0-FULL", *place],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    store = site.store()
    store.put("/\\033[2J-0-FULL:0000000000000", packed(plain("file")), {})
    for script in (done.stdout, program("restore-script", "/\\033[2J", *place).stdout):
        assert b"\x1b" not in script
        path = site.folder / "script"
        path.write_bytes(script)
        ran = subprocess.run(["sh", path, site.folder / "to"], capture_output=True)
        assert ran.returncode == 0, ran.stderr
        assert b"\x1b" not in ran.stdout + ran.stderr
    assert (site.folder / "to" / "file").read_text() == "planted"
