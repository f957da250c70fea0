"""Input made to do harm: names, objects in the bucket, archives that attack a restore."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, leave_out, require_tool, tmpfs
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import META, Failure, StoredObject

ESC = "\x1b]0;owned\x07"


# ---- archives that attack a restore ----


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def dumpdir(name: str, *entries: str) -> tuple[tarfile.TarInfo, bytes]:
    """What GNU tar writes for a directory in an incremental archive: the names that were in it."""
    content = b"".join(entry.encode() + b"\0" for entry in entries) + b"\0"
    return member(name, content, type=b"D", mode=0o755)


def attack(site: Site, *members: tuple[tarfile.TarInfo, bytes]) -> list[str]:
    """Puts an archive of these members into the bucket, as one who may write there would, and the
    words that restore it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    store = site.store()
    store.create()
    store.put("/data-0-FULL:0000000000000", gzip.compress(packed.getvalue()), {})
    target = site.folder / "to"
    (site.folder / "outside").mkdir()
    (site.folder / "outside" / "kept").write_text("kept")
    return ["restore", "-b", "bkt", "--endpoint", site.settings["S3Endpoint"], "/data", "--to",
            str(target)]


def outside(site: Site) -> dict[str, str]:
    """Everything that is not where the restore was to go."""
    return {
        str(path): path.read_text() if path.is_file() else ""
        for path in [*(site.folder / "outside").rglob("*"), *site.folder.glob("*")]
        if path.name != "to"
    }


ATTACKS: dict[str, Callable[[str], list[tuple[tarfile.TarInfo, bytes]]]] = {
    "an absolute name": lambda out: [member(f"{out}/new", b"bad")],
    "..": lambda out: [member("../outside/new", b"bad"), member("a/../../outside/new", b"bad")],
    "through a symbolic link": lambda out: [
        member("link", type=tarfile.SYMTYPE, linkname=out), member("link/new", b"bad"),
    ],
    "over a symbolic link": lambda out: [
        member("link", type=tarfile.SYMTYPE, linkname=f"{out}/kept"), member("link", b"bad"),
    ],
    "a relative symbolic link": lambda out: [
        member("a", type=tarfile.DIRTYPE, mode=0o755),
        member("a/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        member("a/link/new", b"bad"),
    ],
    "a hard link": lambda out: [
        member("hard", type=tarfile.LNKTYPE, linkname=f"{out}/kept"), member("hard", b"bad"),
    ],
    "a hard link by ..": lambda out: [
        member("hard", type=tarfile.LNKTYPE, linkname="../outside/kept"), member("hard", b"bad"),
    ],
    "a directory that is emptied": lambda out: [
        member("link", type=tarfile.SYMTYPE, linkname=out), dumpdir("link/", "Yother"),
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


def bomb(site: Site, gigabytes: int) -> list[str]:
    """Words that restore an archive of so many blanks, which are a thousandth of that in gzip."""
    store = site.store()
    store.create()
    blanks = gzip.compress(b" " * 100_000_000, 9)
    store.put("MySQL/bomb-0:0000000000000", blanks * (gigabytes * 10), {})
    return ["restore", "-b", "bkt", "--endpoint", site.settings["S3Endpoint"], "MySQL/bomb"]


def test_a_bomb_fills_no_memory(site: Site) -> None:
    words = [sys.executable, s3napback.__file__, *bomb(site, 4), "--stdout"]
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
    place = ["-b", "bkt", "--endpoint", site.settings["S3Endpoint"]]
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


def test_a_folder_with_more_in_it_than_chunks(site: Site, capsys: Any) -> None:
    assert site.run() == 0
    bucket = site.folder / "buckets" / "bkt"
    (bucket / "README").write_text("not ours")
    (bucket / "sub").mkdir()
    (bucket / "sub" / "x").write_text("x")
    (bucket / "link").symlink_to("/etc/passwd")
    (bucket / "dangling").symlink_to("/nowhere")
    os.mkfifo(bucket / "fifo")
    words = ["-b", "bkt", "--endpoint", site.settings["S3Endpoint"]]
    assert s3napback.main(["list", *words]) == 0
    assert f"{site.data}-" in capsys.readouterr().out
    assert s3napback.main(["verify", "--deep", *words]) == 0
    assert site.run("-f") == 0


marks = st.dictionaries(
    st.sampled_from(["archive", "chunks", "bytes", "md5", "made", "kind", "status", "state"]),
    st.text(max_size=40) | st.integers().map(str),
)
objects = st.lists(
    st.tuples(
        st.sampled_from(["", ":s3napback-new"]), st.integers(0, 10**13), st.integers(1, 20),
        st.integers(0, 3), st.sampled_from(["0" * 32, "f" * 32, "x-2", ""]), st.integers(0, 5),
    ),
    min_size=1, max_size=8,
)


@given(objects, marks)
def test_any_listing_and_any_metadata(
    found: list[tuple[str, int, int, int, str, int]], said: dict[str, str]
) -> None:
    items = {
        f"a-0-FULL{staged}:{number:0{width}d}": (size, etag, float(at))
        for staged, number, width, size, etag, at in found
    }
    chunks = [StoredObject(key, *about) for key, about in items.items()]
    metadata = {META + name: value for name, value in said.items()}
    archive = s3napback.resolve_archive("a-0-FULL", chunks, lambda key: metadata, 2)
    assert archive is not None
    one = s3napback._found(archive, None, "a", 0, "FULL")
    s3napback.restorable_moments([one])
    try:
        chain = s3napback.choose_chain([one], float("inf"))
    except Failure:
        return
    assert archive.complete
    assert [link.archive for link in chain.links] == ["a-0-FULL"]


@given(st.text(max_size=60))
def test_any_key(key: str) -> None:
    parsed = s3napback.parse_chunk_key(key)
    if parsed:
        archive, number = parsed
        assert number >= 0
        assert key.endswith(key.rpartition(":")[2]) and key.startswith(archive)
        s3napback.parse_archive_name(archive)


@given(st.text(max_size=40))
def test_any_moment(text: str) -> None:
    try:
        assert isinstance(s3napback.parse_when(text, s3napback.Moment.of(NIGHT)), float)
    except Failure as failure:
        assert failure.status == 2


def test_a_moment_of_digits_alone() -> None:
    """Found by fuzzing: dateutil raises decimal.InvalidOperation."""
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(f"\n{'2' * 20}:{'2' * 29}", s3napback.Moment.of(NIGHT))


@given(st.binary(max_size=200))
def test_any_key_file(content: bytes) -> None:
    path = Path(f"/tmp/s3nb-key-{os.getpid()}")
    path.write_bytes(content)
    try:
        key, secret = s3napback.read_key_file(str(path))
        assert key and secret
    except Failure as failure:
        assert failure.status == 2
        assert str(path) in str(failure)
    finally:
        path.unlink()


@given(st.lists(st.sampled_from(["-i", "-o", "-z", "-z5", "--tag", "-K", "--", "-vn", "-x"])
                | st.text(max_size=5), max_size=5))
def test_any_words_for_js3tream(words: list[str]) -> None:
    import getopt

    try:
        options = s3napback._js3tream_options(words)
    except getopt.GetoptError:
        return
    assert set(options) <= {
        *s3napback._JS3TREAM_OPTIONS.values(), *s3napback._JS3TREAM_VALUES.values(),
        *s3napback._JS3TREAM_LONG, "debug",
    }


@given(st.binary(max_size=300))
def test_any_snapshot_file(content: bytes) -> None:
    for text in (content, b"GNU tar-1.34-2\n" + content, b"GNU tar-1.34-2\n1\0002\0" + content):
        try:
            snapshot = s3napback.Snapshot.read(io.BytesIO(text))
            folders = list(snapshot.folders)
        except ValueError:
            continue
        written = io.BytesIO()
        s3napback.Snapshot(snapshot.start, folders).write(written)
        again = s3napback.Snapshot.read(io.BytesIO(written.getvalue()))
        assert (again.start, list(again.folders)) == (snapshot.start, folders)


# ---- names of sources ----

NAMES = {
    "newline": "a\nb", "quotes": "it's \"q\"", "command": "$(touch pwned);`touch pwned`",
    "dash": "-rf", "semicolon": "; touch pwned #", "stars": "*?[a]{b}", "space": " a  b ",
    "not UTF-8": os.fsdecode(b"caf\xe9"), "backslash": "a\\nb", "percent": "%s%n%d",
    "escape": ESC,
}


@pytest.mark.parametrize("gpg", [False, True])
def test_files_of_any_name_come_back(site: Site, gpg_home: Any, gpg: bool) -> None:
    os.environ["GNUPGHOME"] = str(gpg_home.home)
    try:
        if gpg:
            site.settings["GpgRecipient"] = gpg_home.recipient
        for name in NAMES.values():
            (site.data / name).mkdir()
            (site.data / name / name).write_text(name, errors="surrogateescape")
        deep = site.data
        for _ in range(5):
            deep = deep / ("long" * 50)
        deep.mkdir(parents=True)
        (deep / "file").write_text("deep")
        assert site.run() == 0
        words = ["restore", "-c", str(site.write()), str(site.data), "--to", str(site.folder / "b")]
        assert s3napback.main(words) == 0
    finally:
        del os.environ["GNUPGHOME"]
    done = subprocess.run(
        [require_tool("diff"), "-r", site.data, f"{site.folder}/b{site.data}"], capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert not list(site.folder.rglob("pwned"))


# The others cannot stand in a config, or are in test_backup.py.
@pytest.mark.parametrize("name", ["command", "dash", "semicolon", "stars", "space", "backslash",
                                  "percent"])
def test_directories_of_any_name(
    site: Site, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.folder)
    place = site.data / NAMES[name]
    place.mkdir()
    (place / "file").write_text("here")
    site.jobs = ""
    quote = "'" if '"' in str(place) else '"'
    line = f"Directory {quote}{place}{quote}\n"
    site.conf.write_bytes(site.write().read_bytes() + os.fsencode(line))
    assert s3napback.main(["-t", "-c", str(site.conf)], now=NIGHT) == 0
    # What -t shows can be pasted into a shell, and does what is meant, no more.
    shown = capsys.readouterr().err
    (line,) = [line.partition("INFO ")[2] for line in shown.splitlines() if "/bin/tar " in line
               or "INFO tar " in line]
    safe = line.partition(" | ")[0] + " | tar -tz > listed"
    subprocess.run(["sh", "-c", safe], cwd=site.folder, capture_output=True)
    assert not list(site.folder.rglob("pwned"))
    for path in site.diff_files():
        path.unlink()
    assert s3napback.main(["-c", str(site.conf)], now=NIGHT) == 0, capsys.readouterr().err
    ((stored, archive),) = site.archives().items()
    assert archive.complete
    target = site.folder / "back"
    assert s3napback.main(
        ["restore", "-b", "bkt", "--endpoint", site.settings["S3Endpoint"], "--to", str(target),
         stored]
    ) == 0
    assert (Path(str(target) + str(place)) / "file").read_text() == "here"
    assert not list(site.folder.rglob("pwned"))


# ---- the secret ----


def test_the_secret_is_nowhere_to_be_seen(s3_site: Site, s3_server: Any) -> None:
    """While it runs: in no command line, no environment, no file; and not in what it says."""
    import base64
    import urllib.parse

    secret = s3_server.secret
    forms = {secret.encode(), urllib.parse.quote(secret, safe="").encode(),
             base64.b64encode(secret.encode())}
    (s3_site.data / "big").write_bytes(os.urandom(60_000))
    s3_site.jobs = f"<Directory {s3_site.data}>\nUseTempFile 1\n</Directory>"
    assert s3_site.run() == 0  # so that the bucket and the state are there
    s3_server.latency = 0.1
    log = s3_site.folder / "log"
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [sys.executable, s3napback.__file__, "-f", "-d", "-c", str(s3_site.write())],
            stdout=said, stderr=said,
        )
    looked = 0
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            for what in ("cmdline", "environ"):
                try:
                    content = Path(f"/proc/{pid}/{what}").read_bytes()
                except OSError:
                    continue
                looked += 1
                assert not [form for form in forms if form in content], (pid, what)
        time.sleep(0.01)
    assert looked > 20
    assert process.returncode == 0, log.read_text()
    s3_server.latency = 0
    s3_server.fail = lambda *_: (403, "SignatureDoesNotMatch", "no")
    with open(log, "ab") as said:
        subprocess.run(
            [sys.executable, s3napback.__file__, "-f", "-d", "-c", str(s3_site.conf)],
            stdout=said, stderr=said,
        )
    s3_server.fail = None
    for folder in ("diffs", "temp"):
        for path in (s3_site.folder / folder).rglob("*"):
            assert not [form for form in forms if form in path.read_bytes()]
    assert not [form for form in forms if form in log.read_bytes()]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


def test_a_crash_leaves_no_core(site: Site) -> None:
    """A core dump would hold the secret."""
    (site.folder / "buckets" / "bkt").mkdir()
    site.settings["Compressor"] = f'"{require_tool("bash")} -c \\"sleep 20\\""'
    process = subprocess.Popen(
        [sys.executable, s3napback.__file__, "-c", str(site.write())], cwd=site.folder,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30)),
    )
    deadline = time.monotonic() + 20
    while not children(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if "core file" in line]
    process.terminate()
    process.wait()
    assert line.split()[4] == "0"


def test_json_is_json(site: Site, capsys: Any) -> None:
    fill(site)
    place = ["-b", "bkt", "--endpoint", site.settings["S3Endpoint"]]
    assert s3napback.main(["list", "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["bucket"] == "bkt"
