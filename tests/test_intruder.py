"""Whoever may write to the bucket: what they put there ends in a sentence, and in `--to`.

test_hostile.py has the archives, keys and metadata of one attack each; here are those that need
two archives, numbers of thousands of digits, and a folder bucket that others write in.
"""

import base64
import gzip
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, require_tool, tmpfs

import s3napback
from s3napback import META, CatalogEntry, Failure, StoredObject

DIGITS = "9" * 5000  # int() takes 4300 (Python's limit for conversions from text)


# ---- numbers ----


@pytest.mark.parametrize("key", [f"a-0-FULL:{DIGITS}", f"a-0-FULL:{'9' * 21}"])
def test_a_number_of_any_length_makes_a_foreign_key(key: str) -> None:
    assert s3napback.parse_chunk_key(key) is None


@pytest.mark.parametrize("name", [f"a-{DIGITS}-FULL", f"a--{DIGITS}-DIFF", f"MySQL/a-{DIGITS}"])
def test_a_slot_of_any_length_makes_a_foreign_name(name: str) -> None:
    assert s3napback.parse_archive_name(name) is None


@pytest.mark.parametrize("number", ["²", "٣", DIGITS, "-1", " 1"])
def test_a_revision_that_is_none_is_followed_by_nothing(number: str) -> None:
    def one(made: float, mode: str, before: str, after: str) -> CatalogEntry:
        return CatalogEntry(
            f"/svn-{made}", "Subversion", "/svn", 0, mode, made, 1, 1, "", before, after
        )

    found = [one(1.0, "FULL", "0", "4"), one(2.0, "DIFF", number, "9")]
    with pytest.raises(Failure, match="continues an archive that is no longer there"):
        s3napback.choose_chain(found, 3.0)


@pytest.mark.parametrize("words", [["-z", DIGITS], ["--parallel", DIGITS]])
def test_an_option_of_any_length(
    words: list[str], site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    place = ["-b", "bkt:a", "--endpoint", site.settings["S3Endpoint"]]
    assert s3napback.main(["js3tream", "-i", *words, *place]) == 2
    assert "is not a whole number from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("archive", "kind", "shown"),
    [
        ("/x-0-FULL", "Directory", "Directory"), ("/x-0-FULL", "Subversion", "Subversion"),
        ("/x-0-FULL", "Everything is fine", None), ("/x-0-FULL", "MySQL", None),
        ("MySQL/x-0", "Directory", "MySQL"), ("PostgreSQL/x-0", "MySQL", "PostgreSQL"),
    ],
)
def test_a_kind_is_one_that_fits_the_name(
    site: Site, archive: str, kind: str, shown: str | None
) -> None:
    store = site.store()
    store.create()
    store.put(f"{archive}:0000000000000", b"x", {f"{META}chunks": "1", f"{META}kind": kind})
    ((_, found),) = s3napback.catalogue(store)
    assert found.kind == shown


# ---- two archives, one after the other ----


def packed(*members: tuple[str, dict[str, Any], bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(content.getvalue())


def link(name: str, target: str) -> tuple[str, dict[str, Any], bytes]:
    return name, {"type": tarfile.SYMTYPE, "linkname": target}, b""


def plain(name: str) -> tuple[str, dict[str, Any], bytes]:
    return name, {}, b"planted"


def emptied(name: str) -> tuple[str, dict[str, Any], bytes]:
    """A directory of an incremental archive in which nothing was."""
    return name, {"type": b"D", "mode": 0o777}, b"\0"


@pytest.fixture
def trap(site: Site) -> Site:
    (site.folder / "outside" / "sub").mkdir(parents=True)
    (site.folder / "outside" / "sub" / "kept").write_text("kept")
    os.chmod(site.folder / "outside" / "sub", 0o700)
    return site


def put_chain(site: Site, *archives: bytes) -> list[str]:
    """Stores the archives as the Perl script would have, and gives the words that restore them."""
    store = site.store()
    store.create()
    for slot, data in enumerate(archives):
        mode = "DIFF" if slot else "FULL"
        store.put(f"/data-{slot}-{mode}:0000000000000", data, {})
        time.sleep(0.01)
    return ["restore", "-b", "bkt", "--endpoint", site.settings["S3Endpoint"], "/data", "--to",
            str(site.folder / "to")]


def seen(folder: Path) -> dict[str, Any]:
    """What is in a folder, with everything that a restore could change of it."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
            *(getattr(path.lstat(), name) for name in ("st_mode", "st_uid", "st_mtime_ns")),
        )
        for path in [folder, *folder.rglob("*")]
    }


SECOND = {
    "a file": [plain("link/new")], "over a file": [plain("link/sub/kept")],
    "a folder": [emptied("link/new/")], "a folder's mode": [emptied("link/sub/")],
    "a folder's content": [emptied("link/sub/"), plain("x")],
    "a hard link": [("hard", {"type": tarfile.LNKTYPE, "linkname": "link/sub/kept"}, b""),
                    plain("hard")],
    "a renaming": [("./", {"type": b"D", "mode": 0o755}, b"Rlink/sub\0Tmine\0\0")],
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
    before = seen(outside)
    status = s3napback.main(words)
    assert seen(outside) == before
    assert status in (0, 1, 3)  # 3: what tar would not do is told, and the rest comes back
    said = capsys.readouterr().err
    assert status != 1 or said.startswith("s3napback: /data-1-DIFF: tar ended with status 2")


def test_a_link_from_an_earlier_restore_is_no_way_out(trap: Site, capsys: Any) -> None:
    outside = trap.folder / "outside"
    words = put_chain(trap, packed(plain("link/new")))
    (trap.folder / "to").mkdir()
    (trap.folder / "to" / "link").symlink_to(outside)
    before = seen(outside)
    assert s3napback.main([*words, "--overwrite"]) == 1
    assert "to/link is no folder" in capsys.readouterr().err
    assert seen(outside) == before
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
    target = site.folder / "back"
    words = ["restore", "-c", str(site.write()), str(data), "--to", str(target)]
    assert s3napback.main(words) == 0
    assert seen(Path(f"{target}{data}")) == seen(data)
    links = (f"{target}{data}/stays", f"{target}{data}/second name")
    assert os.lstat(links[0]).st_ino == os.lstat(links[1]).st_ino


# ---- a folder bucket that others write in ----


def bucket_of(site: Site) -> tuple[Path, list[str]]:
    """A bucket with one good archive: its folder, and the options that name it."""
    assert site.run() == 0
    return site.folder / "buckets" / "bkt", [
        "-b", "bkt", "--endpoint", site.settings["S3Endpoint"]
    ]


def test_links_in_a_bucket_are_not_followed(site: Site, capsys: Any) -> None:
    folder, words = bucket_of(site)
    (site.folder / "far+").mkdir()
    (site.folder / "far+" / "stolen-0-FULL%3A0000000000000").write_text("x")
    (folder / "far+").symlink_to(site.folder / "far+")
    (folder / "again+").symlink_to(folder)
    (folder / "once+").symlink_to(folder)
    (folder / "passwd-0-FULL%3A0000000000000").symlink_to("/etc/passwd")
    started = time.monotonic()
    assert s3napback.main(["list", *words]) == 0
    assert time.monotonic() - started < 5  # two links in a circle are 2^40 paths
    said = capsys.readouterr().out
    assert "stolen" not in said and "passwd" not in said
    assert f"{site.data}-" in said


@pytest.mark.parametrize("what", ["a folder", "a link", "a FIFO"])
def test_a_bucket_is_not_removed_with_what_is_not_ours(
    site: Site, what: str, capsys: Any
) -> None:
    folder, words = bucket_of(site)
    foreign = folder / "foreign"
    if what == "a folder":
        foreign.mkdir()
        (foreign / "precious").write_text("kept")
    elif what == "a link":
        foreign.symlink_to("/etc")
    else:
        os.mkfifo(foreign)
    assert s3napback.main(["js3tream", "-d", *words]) == 1
    assert "bucket bkt holds what is not ours: foreign" in capsys.readouterr().err
    assert os.path.lexists(foreign)
    assert what != "a folder" or (foreign / "precious").read_text() == "kept"


def test_a_file_that_may_not_be_read_hides_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, words = bucket_of(site)
    locked = folder / "locked-0-FULL%3A0000000000000"
    locked.write_text("x")
    locked.chmod(0)
    if os.geteuid() == 0:  # who may read everything
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(locked))
    etags = {item.key: item.etag for item in s3napback.iter_objects(site.store())}
    assert etags.pop("locked-0-FULL:0000000000000") == ""
    assert all(etags.values())
    assert s3napback.main(["list", str(site.data), *words]) == 0
    assert f"{site.data}-" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["list"], ["verify", "--deep"],
                                   ["restore", "/huge", "--to", "TO"]], ids=" ".join)
def test_a_file_larger_than_memory(site: Site, words: list[str], capsys: Any) -> None:
    folder, place = bucket_of(site)
    with open(folder / "%2Fhuge-0-FULL%3A0000000000000", "wb") as file:
        file.truncate(10**13)  # bytes, none of them on the disk
    words = [str(site.folder / "to") if word == "TO" else word for word in words]
    started = time.monotonic()
    status = s3napback.main([*words, *place])
    assert time.monotonic() - started < 20
    said = capsys.readouterr()
    assert status == (0 if words == ["list"] else 1)
    assert status == 0 or "more than a chunk can have" in said.out + said.err


# ---- what reaches the terminal ----

ESC = "\x1b]0;owned\x07"
FORGED = f"/a\ns3napback: all is well{ESC}\x9b2J"


def put_forged(site: Site) -> list[str]:
    store = site.store()
    store.create()
    store.put(f"{FORGED}-0-FULL:0000000000000", gzip.compress(b""), {"tag": f"x\ny{ESC}"})
    store.put("/€-0-FULL:0000000000000", packed(plain("file")), {})
    store.put("/€-1-DIFF:0000000000001", gzip.compress(b""), {})
    return ["-b", "bkt", "--endpoint", site.settings["S3Endpoint"]]


@pytest.mark.parametrize(
    "words",
    [["list"], ["verify"], ["verify", "--deep"], ["js3tream", "-l"], ["restore", f"{FORGED}x"],
     ["restore", FORGED], ["restore-script", f"{FORGED}x"], ["js3tream", "-o"]], ids=repr,
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_names_forge_no_line_and_move_no_cursor(
    site: Site, words: list[str], encoding: str
) -> None:
    place = put_forged(site)
    if words == ["js3tream", "-o"]:
        place[1] += f":{FORGED}x"
    if words[0] == "restore":
        place += ["--to", str(site.folder / "to")]
    done = subprocess.run(
        [sys.executable, s3napback.__file__, *words, *place], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode in (0, 1)
    assert "Traceback" not in said
    assert not [c for c in said if c != "\n" and c != "\t" and (c < " " or "\x7f" <= c < "\xa0")]
    assert not [line for line in said.splitlines() if line.startswith("s3napback: all is well")]


def test_the_log_moves_no_cursor_either(
    site: Site, svn_repo_factory: Any, capsys: Any
) -> None:
    """The names of a SubversionDir's repositories are their owners' choice."""
    (site.folder / "svn").mkdir()
    svn_repo_factory(site.folder / "svn" / f"x{ESC}", 1)
    site.jobs = f"SubversionDir {site.folder}/svn"
    assert site.run() == 0
    said = capsys.readouterr().err
    assert "x\\x1b]0;owned\\x07" in said
    assert "\x1b" not in said


def test_the_script_moves_no_cursor_and_runs_in_any_locale(site: Site) -> None:
    place = put_forged(site)
    done = subprocess.run(
        [sys.executable, s3napback.__file__, "restore-script", "/€-0-FULL", *place],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    store = site.store()
    store.put("/\\033[2J-0-FULL:0000000000000", packed(plain("file")), {})
    for script in (done.stdout, subprocess.run(
        [sys.executable, s3napback.__file__, "restore-script", "/\\033[2J", *place],
        capture_output=True, check=True,
    ).stdout):
        assert b"\x1b" not in script
        path = site.folder / "script"
        path.write_bytes(script)
        ran = subprocess.run(["sh", path, site.folder / "to"], capture_output=True)
        assert ran.returncode == 0, ran.stderr
        assert b"\x1b" not in ran.stdout + ran.stderr
    assert (site.folder / "to" / "file").read_text() == "planted"


# ---- the secret ----


def forms_of(secret: str) -> set[bytes]:
    """How a secret may be written: as it is, in a URL, in base64 at each of three offsets."""
    plain_text = secret.encode()
    coded = {base64.b64encode(b"x" * n + plain_text)[4:-4] for n in (1, 2, 3)}
    return {plain_text, urllib.parse.quote(secret, safe="").encode(), *coded}


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in
                Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.parametrize("where", ["key file", "environment"])
@pytest.mark.parametrize("end", ["", "SIGTERM", "SIGABRT", "SIGSEGV", "403"])
def test_the_secret_is_nowhere_when_it_ends_badly(
    site: Site, s3_server: Any, end: str, where: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In no tool's command line or environment, file, core dump or message; with -d."""
    secret = s3_server.secret
    forms = forms_of(secret)
    env = {**os.environ, "TMPDIR": str(site.folder / "temp")}
    site.settings["S3Endpoint"] = s3_server.endpoint
    if where == "environment":
        env |= {"AWS_ACCESS_KEY_ID": s3_server.key, "AWS_SECRET_ACCESS_KEY": secret}
    else:
        keys = tmp_path_factory.mktemp("keys") / "key.txt"
        site.settings["S3Keyfile"] = str(s3_server.write_keyfile(keys))
    slow = site.folder / "slow-gzip"  # to be seen at work
    slow.write_text(f"#!/bin/sh\nsleep 0.3\nexec {require_tool('gzip')}\n")
    slow.chmod(0o755)
    site.settings["Compressor"] = str(slow)
    (site.data / "big").write_bytes(os.urandom(40_000))
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    s3_server.latency = 0.05
    if end == "403":
        s3_server.fail = lambda method, path, *_: (  # of objects, not of the bucket
            (403, "SignatureDoesNotMatch", "no") if method == "PUT" and path != "/bkt" else None
        )
    with open(site.folder / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, s3napback.__file__, "-d", "-c", str(site.write())], env=env,
            stdout=said, stderr=said, cwd=site.folder, preexec_fn=cores_allowed,
        )
    tools = 0
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            for what in ("cmdline", "environ"):
                try:
                    # Asked first: a child is we until its exec.
                    own = os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
                    content = Path(f"/proc/{pid}/{what}").read_bytes()
                except OSError:  # it has ended
                    continue
                tools += bool(content) and not own
                if not own or what == "cmdline" or where == "key file":
                    assert not [form for form in forms if form in content], (pid, what)
        if end.startswith("SIG") and tools:
            process.send_signal(getattr(signal, end))
            process.wait(60)
        time.sleep(0.001)
    s3_server.latency, s3_server.fail = 0.0, None
    expected = {"": 0, "403": 1, "SIGTERM": 128 + signal.SIGTERM}
    assert process.returncode == expected.get(end, -getattr(signal, end, 0))
    assert tools
    looked = 0
    for path in site.folder.rglob("*"):
        if path.is_file() and path != site.conf:
            looked += 1
            assert not [form for form in forms if form in path.read_bytes()], path
    assert looked > 2
    assert not list(site.folder.rglob("core*"))


def cores_allowed() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


# ---- bombs, and the other format of tar ----


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    place = site.folder / "small"
    place.mkdir()
    with tmpfs(place, "size=1m"):
        yield place


def header(name: str, size: int, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


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
def test_what_a_pax_header_can_say(trap: Site, what: str, capsys: Any) -> None:
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
    before = seen(outside)
    status = s3napback.main(words)
    err = capsys.readouterr().err
    assert seen(outside) == before
    assert status in (0, 3) or (status, err.count("\n")) == (1, 1), err
    assert "\x1b" not in err


def test_thousands_of_ends_take_no_thousands_of_requests() -> None:
    items = [StoredObject(f"a-0-FULL:{n:013d}", 9000 - n, "f" * 32, 1.0) for n in range(5000)]
    asked: list[str] = []

    def head(key: str) -> dict[str, str]:
        asked.append(key)
        return {f"{META}chunks": "1"}

    started = time.monotonic()
    archive = s3napback.resolve_archive("a-0-FULL", items, head)
    assert archive and not archive.complete
    assert len(asked) <= 60
    assert time.monotonic() - started < 20  # all of them: two minutes


@pytest.mark.parametrize(
    "text", ["44:444444444444444444444444444444", "1" * 3000, "2026-11-20 03:00 XYZ", "1.1e9999"]
)
def test_a_moment_that_is_none(text: str) -> None:
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(text, s3napback.Moment.of(NIGHT))
