"""Section 15 and its commands: from a bucket and a key to the data again."""

import base64
import gzip
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, NIGHT, START, Capture, Site, fetched, program, require_tool
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import Failure, Stage

ARCHIVES = GOLDEN / "perl-archives"
EXPECTED = json.loads((ARCHIVES / "expected.json").read_text())
RESTORES = EXPECTED["restores"]


def command(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return program(*words, env={"TZ": "UTC", **(env or {})})


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded buckets as folders, with their dates."""
    folder = tmp_path_factory.mktemp("buckets")
    for name in ("plain-day4", "gpg-day4"):
        index = json.loads((ARCHIVES / name / "index.json").read_text())
        for bucket, about in index["buckets"].items():
            shutil.copytree(ARCHIVES / name / "objects" / bucket, folder / bucket)
            for entry in about["objects"].values():
                at = datetime.fromisoformat(entry["last_modified"].replace("Z", "+00:00"))
                os.utime(folder / bucket / entry["file"], (at.timestamp(), at.timestamp()))
    return folder


def given_name(restore: dict[str, Any]) -> str:
    kind, name = restore["kind"], restore["name"]
    return f"{kind}/{name}" if kind in ("MySQL", "PostgreSQL") else name


def last_moment(restore: dict[str, Any]) -> str:
    return str(EXPECTED["days"][str(restore["day"])])


def unpacked(archive: Path) -> dict[str, tuple[Any, ...]]:
    """What is expected: kind and mode, owner, link, content."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            content: Any = None
            if member.isfile() or member.islnk():
                file = tar.extractfile(member)
                content = file.read() if file else None
            elif member.issym():
                content = member.linkname
            kind = "file" if member.islnk() or member.isfile() else member.type
            owner = (member.uid, member.gid) if os.geteuid() == 0 else None
            mode = None if member.issym() else member.mode
            found[member.name] = (kind, mode, owner, content)
    return found


TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
         stat.S_IFIFO: tarfile.FIFOTYPE}


def on_disk(root: Path, below: str) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in [root / below, *(root / below).rglob("*")]:
        info = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        owner = (info.st_uid, info.st_gid) if os.geteuid() == 0 else None
        mode = None if path.is_symlink() else stat.S_IMODE(info.st_mode)
        found[str(path.relative_to(root))] = (
            TYPES[stat.S_IFMT(info.st_mode)], mode, owner, content
        )
    return found


def restore_and_compare(restore: dict[str, Any], options: list[str], folder: Path) -> None:
    """Runs `restore` as of the end of the day, and compares what came out."""
    place = folder / "back"
    if restore["encrypted"]:
        options = [*options, "--secret-key", str(ARCHIVES / "gpg-secret-key.asc")]
    at = ["--at", last_moment(restore)]
    done = command("restore", *options, given_name(restore), *at, "--to", str(place))
    assert done.returncode == 0, done.stderr.decode()
    used = done.stderr.decode().rpartition(": ")[2].strip().split(", ")
    assert used == restore["archives"]
    if restore["kind"] == "Directory":
        expected = unpacked(ARCHIVES / restore["expected"])
        below = restore["name"][1:]
        wanted = {name: entry for name, entry in expected.items()
                  if name == below or name.startswith(f"{below}/")}
        excluded = re.compile(r"(^|/)cache(/|$)|\.bak$") if below.endswith("tree") else None
        wanted = {n: e for n, e in wanted.items() if not (excluded and excluded.search(n))}
        assert on_disk(place, below) == wanted
    elif restore["kind"] == "Subversion":
        dump = subprocess.run(["svnadmin", "dump", "-q", str(place)], capture_output=True)
        youngest = subprocess.run(["svnlook", "youngest", str(place)], capture_output=True)
        assert int(youngest.stdout) == restore["revision"]
        assert dump.returncode == 0
    else:
        assert hashlib.md5(place.read_bytes()).hexdigest() == restore["text_md5"]


def ids(restore: dict[str, Any]) -> str:
    return f"{restore['store']}-{restore['kind']}-{restore['name']}-{restore['day']}"


@pytest.mark.parametrize("restore", RESTORES, ids=ids)
def test_every_recorded_restore_from_the_bucket_alone(
    restore: dict[str, Any], buckets: Path, tmp_path: Path
) -> None:
    options = ["-b", restore["bucket"], "--endpoint", f"file://{buckets}"]
    restore_and_compare(restore, options, tmp_path)


def test_every_recorded_restore_is_looked_at() -> None:
    assert len(RESTORES) == 53


@pytest.mark.slow
@pytest.mark.parametrize("store", ["plain-day4", "gpg-day4"])
def test_recorded_restores_come_back_over_http_with_the_config(
    store: str, s3_server: Any, tmp_path: Path
) -> None:
    s3_server.load(ARCHIVES / store)
    keyfile = s3_server.write_keyfile(tmp_path / "key")
    (tmp_path / "diffs").mkdir()
    (recorded,) = (ARCHIVES / store).glob("*conf*")
    text = recorded.read_text()
    text = re.sub(r"(?m)^DiffDir .*", f"DiffDir {tmp_path}/diffs", text)
    text = re.sub(r"(?m)^S3Keyfile .*", f"S3Keyfile {keyfile}", text)
    conf = tmp_path / "my.conf"
    conf.write_text(f"S3Endpoint {s3_server.endpoint}\n{text}")
    wanted = [r for r in RESTORES if r["store"] == store][::3]  # of a folder all of them
    for n, restore in enumerate(wanted):
        folder = tmp_path / str(n)
        folder.mkdir()
        restore_and_compare(restore, ["-c", str(conf)], folder)


# ---- choosing ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-11-24T12:00:00"), ("today", "2026-11-24T23:59:59"),
        ("yesterday", "2026-11-23T23:59:59"), ("3 days ago", "2026-11-21T12:00:00"),
        ("1 hour ago", "2026-11-24T11:00:00"), ("2026-11-20", "2026-11-20T23:59:59"),
        ("2026-11-20 03:00", "2026-11-20T03:00:59"), ("2026-11-20T03:00Z", "2026-11-20T03:00:59"),
        ("2026-11-20 03:00:00+02:00", "2026-11-20T01:00:00"),
        ("20.11.2026", "2026-11-20T23:59:59"), ("12 Nov 2026 3:00", "2026-11-12T03:00:59"),
        ("11.11.2026", "2026-11-11T23:59:59"), ("3:00", "2026-11-24T03:00:59"),
        ("20261120", "2026-11-20T23:59:59"), ("Fri, 20 Nov 2026 3:00", "2026-11-20T03:00:59"),
    ],
)
def test_moments_are_read_as_people_write_them(text: str, expected: str) -> None:
    moment = s3napback.Moment.of(datetime(2026, 11, 24, 12, tzinfo=timezone.utc))
    at = datetime.fromtimestamp(s3napback.parse_when(text, moment), timezone.utc)
    assert at.replace(microsecond=0, tzinfo=None).isoformat() == expected


@pytest.mark.parametrize("text", ["soon", "", "2026-13-45", "9" * 400, "11.12.2026", "11/12/26"])
def test_moments_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(text, s3napback.Moment(0))


@pytest.mark.parametrize("text", [
    "Sunday", "tue", "Mon 3:00", "2026-10", "October", "2026", "Oct 5", "24 December", "26-11-20"
])
@pytest.mark.parametrize("today", ["2026-11-24", "2026-01-01", "2028-02-29", "2026-10-02"])
def test_of_a_date_that_is_not_whole_nothing_is_guessed(text: str, today: str) -> None:
    """dateutil takes the coming Sunday, and the rest from today's date."""
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(text, s3napback.Moment.of(datetime.fromisoformat(today)))


# ---- the commands ----


@pytest.fixture
def two_nights(tmp_path: Path) -> Callable[..., Path]:
    """Two nights of a directory; the folder with the bucket `b` is returned."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "kept").write_text("kept")
    (data / "sub" / "gone").write_text("gone")
    (data / "big").write_bytes(os.urandom(30_000))
    for name in ("diffs", "buckets"):
        (tmp_path / name).mkdir()
    (tmp_path / "c").write_text(
        f"DiffDir {tmp_path}/diffs\nS3Endpoint file://{tmp_path}/buckets\nBucket b\n"
        f"ChunkSize 4000\nDirectory {data}\n"
    )

    def make() -> Path:
        for day in range(2):
            assert s3napback.main(
                ["-c", str(tmp_path / "c")], now=datetime(2026, 11, 22, 3) + timedelta(days=day)
            ) == 0
            if not day:
                (data / "sub" / "gone").unlink()
                (data / "new").write_text("new")
        return tmp_path

    return make


def test_each_night_comes_back(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    data, conf = folder / "data", str(folder / "c")
    done = command("restore", "-c", conf, str(data), "--to", str(folder / "now"))
    assert done.returncode == 0, done.stderr
    assert not subprocess.run(["diff", "-r", str(data), f"{folder}/now{data}"]).returncode
    done = command("restore", "-c", conf, str(data), "--at", "2026-11-22", "--to", f"{folder}/then")
    assert done.returncode == 0, done.stderr
    assert (folder / f"then{data}" / "sub" / "gone").read_text() == "gone"
    assert not (folder / f"then{data}" / "new").exists()


def test_acls_and_extended_attributes_come_back(
    two_nights: Callable[..., Path], tmp_path: Path
) -> None:
    setfacl, getfacl = require_tool("setfacl"), require_tool("getfacl")
    setfattr, getfattr = require_tool("setfattr"), require_tool("getfattr")
    data = tmp_path / "data"
    kept = f"{data}/kept"
    subprocess.run([setfacl, "-m", "u:12345:rw", kept], check=True)
    subprocess.run([setfattr, "-n", "user.note", "-v", "hello", kept], check=True)
    folder = two_nights()
    done = command("restore", "-c", str(folder / "c"), str(data), "--to", str(folder / "a"))
    assert done.returncode == 0, done.stderr
    for tool in ([getfacl, "-pcn"], [getfattr, "--absolute-names", "-d"]):
        was, now = (
            subprocess.run([*tool, path], capture_output=True, check=True).stdout.replace(
                path.encode(), b"")
            for path in (kept, f"{folder}/a{kept}")
        )
        assert now == was
        assert b"12345" in was or b"hello" in was


def test_one_file_comes_back_alone(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    data, conf = folder / "data", str(folder / "c")
    done = command("restore", "-c", conf, str(data), "--to", f"{folder}/one", f"{data}/kept")
    assert done.returncode == 0, done.stderr
    files = [p.name for p in (folder / "one").rglob("*") if p.is_file()]
    assert files == ["kept"]
    done = command("restore", "-c", conf, str(data), "--to", f"{folder}/two", f"{data}/none")
    assert done.returncode == 1
    assert b"not in the backup as of 20" in done.stderr


def test_restore_refuses_what_it_cannot_do(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    data, conf = str(folder / "data"), str(folder / "c")
    for words, status, message in [
        ((data, "--to", data), 2, "is not empty"),
        ((data,), 2, "give one of --to PLACE and --stdout"),
        ((data, "--stdout"), 2, "a directory needs --to DIR"),
        (("/nothing", "--to", f"{folder}/x"), 1, "there is no backup of /nothing in b"),
        ((data, "--at", "2020-01-01", "--to", f"{folder}/x"), 1, "nothing was backed up by then"),
        ((data, "--at", "soon", "--to", f"{folder}/x"), 2, "cannot read the moment"),
        ((data, "--nonsense"), 2, "option --nonsense not recognized"),
    ]:
        done = command("restore", "-c", conf, *words)
        assert done.returncode == status, (words, done.stderr)
        assert message in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
    done = command("restore", data, "--to", f"{folder}/x")
    assert done.returncode == 2
    assert b"no bucket given" in done.stderr


def test_list_says_the_same_in_json(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    text = command("list", "-c", str(folder / "c")).stdout.decode()
    assert text.startswith(f"Directory {folder}/data\n")
    assert "needs no FULL" in text
    assert "can be restored as of: 2026-11-22 03:00:00 +0000, 2026-11-23 03:00:00 +0000" in text
    answer = json.loads(command("list", "-c", str(folder / "c"), "--json").stdout)
    assert answer["format"] == 1
    (source,) = answer["sources"]
    assert source["restorable"] == ["2026-11-22T03:00:00Z", "2026-11-23T03:00:00Z"]
    assert [a["complete"] for a in source["archives"]] == [True, True]
    assert command("list", "-c", str(folder / "c"), "/none").returncode == 1


def run_script(script: bytes, place: Path, env: dict[str, str]) -> None:
    """Runs a restore script with a PATH of tools only: nothing of ours is on it."""
    file = place.parent / f"{place.name}.sh"
    file.write_bytes(script)
    done = subprocess.run(["sh", str(file), str(place)], capture_output=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(place.parent), **env})
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True])
def test_restore_scripts_need_nothing_of_ours(
    encrypted: bool, buckets: Path, tmp_path: Path, gpg_home: Any
) -> None:
    gpg_home.import_golden()
    tried = 0
    for restore in RESTORES:
        if restore["encrypted"] != encrypted or restore["day"] != 4:
            continue
        done = command("restore-script", "-b", restore["bucket"], "--endpoint",
                       f"file://{buckets}", given_name(restore), "--at", last_moment(restore))
        assert done.returncode == 0, done.stderr
        place = tmp_path / str(tried)
        run_script(done.stdout, place, gpg_home.env)
        if restore["kind"] == "Directory":
            below = restore["name"][1:]
            wanted = {n for n in unpacked(ARCHIVES / restore["expected"])
                      if (n == below or n.startswith(f"{below}/")) and not n.endswith(".bak")
                      and "cache" not in n.split("/")}
            assert set(on_disk(place, below)) == wanted
        elif restore["kind"] == "Subversion":
            youngest = subprocess.run(["svnlook", "youngest", str(place)], capture_output=True)
            assert int(youngest.stdout) == restore["revision"]
        else:
            assert hashlib.md5(place.read_bytes()).hexdigest() == restore["text_md5"]
        tried += 1
    assert tried >= 4


def test_a_restore_script_for_s3_needs_aws_alone(s3_server: Any, tmp_path: Path) -> None:
    """`aws s3 cp` is played by a few lines that fetch the same URL from the same server."""
    s3_server.load(ARCHIVES / "plain-day4")
    keyfile = s3_server.write_keyfile(tmp_path / "key")
    restore = next(r for r in RESTORES if r["kind"] == "MySQL" and r["name"] == "mydb"
                   and r["day"] == 4)
    done = command("restore-script", "-b", restore["bucket"], "-K", str(keyfile), "--endpoint",
                   s3_server.endpoint, "MySQL/mydb")
    assert done.returncode == 0, done.stderr
    aws = tmp_path / "aws"
    aws.write_text(
        f"#!{sys.executable}\nimport sys, boto3\nfrom botocore.config import Config\n"
        "s3, cp, option, endpoint, url, dash = sys.argv[1:]\n"
        "assert (s3, cp, option, dash) == ('s3', 'cp', '--endpoint-url', '-')\n"
        "bucket, _, key = url.removeprefix('s3://').partition('/')\n"
        "client = boto3.client('s3', endpoint_url=endpoint, region_name='us-east-1',"
        f" aws_access_key_id={s3_server.key!r}, aws_secret_access_key={s3_server.secret!r},"
        " config=Config(s3={'addressing_style': 'path'}))\n"
        "sys.stdout.buffer.write(client.get_object(Bucket=bucket, Key=key)['Body'].read())\n"
    )
    aws.chmod(0o755)
    run_script(done.stdout, tmp_path / "out.sql", {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    text = (tmp_path / "out.sql").read_bytes()
    assert hashlib.md5(text).hexdigest() == restore["text_md5"]


def test_foreign_chunks_are_never_given_out(two_nights: Callable[..., Path]) -> None:
    """Swapped, from another upload, one too many, both widths of numbers."""
    folder = two_nights()
    store = s3napback.open_store("b", s3napback.Access(f"file://{folder}/buckets"), lambda: 1e9)
    keys = [item.key for item in store.iter_objects() if "-17-DIFF" in item.key]
    kept = {key: fetched(store, key) for key in keys}

    def put_back() -> None:
        for key in [item.key for item in store.iter_objects() if "-17-DIFF" in item.key]:
            if key not in kept:
                store.delete([key])
        for key, (data, metadata) in kept.items():
            store.put(key, data, metadata)

    def outcome() -> int:
        return command("restore", "-c", str(folder / "c"), str(folder / "data"), "--at",
                       "2026-11-22", "--to", str(folder / "r")).returncode

    first, second = kept[keys[1]], kept[keys[2]]
    store.put(keys[1], *second)
    store.put(keys[2], *first)
    assert outcome() == 1  # swapped
    put_back()
    store.put(keys[1], first[0], {**first[1], "s3napback-archive": "0" * 32})
    assert outcome() == 1  # the right bytes, of another upload
    put_back()
    shutil.rmtree(folder / "r", ignore_errors=True)
    store.put(f"{keys[0].rpartition(':')[0]}:{len(keys):013d}", b"more", {})
    assert outcome() == 0  # a leftover tail: the complete archive counts
    put_back()
    shutil.rmtree(folder / "r")
    for n, key in enumerate(keys[:3]):
        store.put(f"{key.rpartition(':')[0]}:{n:020d}", b"x" * 4000, {})
    assert outcome() == 0  # both widths: the marked and complete one counts
    assert (folder / f"r{folder}/data" / "kept").read_text() == "kept"


def test_verify_reads_a_sample(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    assert command("verify", "-c", str(folder / "c"), "--sample", "100%").returncode == 0
    flip(chunks(folder)[1])
    assert command("verify", "-c", str(folder / "c")).returncode == 0  # nothing is fetched
    done = command("verify", "-c", str(folder / "c"), "--sample", "100%")
    assert done.returncode == 1
    assert b"is damaged: its MD5 is not the stored one" in done.stdout
    assert command("verify", "-c", str(folder / "c"), "--sample", "lots").returncode == 2


def test_a_dump_that_was_cut_before_it_was_stored(tmp_path: Path) -> None:
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}"), lambda: 1e9)
    store.create()
    sql = b"-- MariaDB dump 10.19\nCREATE TABLE t (n INT);\n"
    for name, text in (("cut", sql), ("whole", sql + b"-- Dump completed\n"), ("empty", b"")):
        store.put(f"MySQL/{name}-0:{0:020d}", gzip.compress(text), {})
    done = command("verify", "-b", "b", "--endpoint", f"file://{tmp_path}", "--deep")
    assert done.returncode == 1
    assert done.stdout == (
        b"MySQL/cut-0: the dump has no closing line: it was cut before it was stored\n"
        b"MySQL/empty-0: the dump is empty: the program that should have made it failed"
        b" (restore an older one: --at)\n"
    )
    done = command("restore", "MySQL/empty", "-b", "b", "--endpoint", f"file://{tmp_path}", "--to",
                   f"{tmp_path}/sql")
    assert (done.returncode, b"the dump is empty" in done.stderr) == (1, True)
    assert not (tmp_path / "sql").exists()


def test_a_dump_takes_the_place_of_a_file_alone(site: Site, capsys: Capture) -> None:
    """As root, --overwrite would make a file of /dev/null."""
    site.jobs = '<Command dump>\nRun "echo data"\n</Command>'
    assert site.run() == 0
    os.mkfifo(site.folder / "pipe")
    for place in (site.folder / "pipe", site.data, f"{site.data}/"):
        before = os.stat(place)
        for words in ([], ["--overwrite"]):
            assert site.restore(place, *words, name="Command/dump") == 2
            said = capsys.readouterr().err
            assert f"{place} is no file (name a new file, or use --stdout)" in said
        assert os.path.samestat(before, os.stat(place))
    assert site.restore(site.data / "file", "--overwrite", name="Command/dump") == 0
    assert (site.data / "file").read_text() == "data\n"


# By `gpg --rfc2440 --disable-mdc --cipher-algo 3DES -z 0 -c`, with the passphrase "sesame".
_WITHOUT_MDC = ("jA0EAgMCagJkYbNXiez/yS8nVJl0SvsXPH3aCRyHOp+he9tlU6av5Eu89Vn7LSG6jAfSUfND"
                "yW6bOD+wsQFoeQ==")


def test_what_an_old_gpg_encrypted_without_integrity_protection_can_be_read(
    site: Site, short_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    home = short_folder("")
    monkeypatch.setenv("GNUPGHOME", str(home))
    store = site.store()
    store.create()
    store.put(f"MySQL/shop-0:{0:020d}", base64.b64decode(_WITHOUT_MDC), {})
    (site.folder / "pass").write_text("sesame")
    back, words = site.folder / "back", ["--passphrase-file", str(site.folder / "pass")]
    assert site.restore(back, *words, name="MySQL/shop") == 1
    assert "write ignore-mdc-error into gpg.conf" in capsys.readouterr().err
    (home / "gpg.conf").write_text("ignore-mdc-error\n")
    assert site.restore(back, *words, name="MySQL/shop") == 0
    assert back.read_text() == "SELECT 1;"


def test_why_tar_cannot_read_an_archive_is_told(site: Site, capsys: Capture) -> None:
    store = site.store()
    store.create()
    store.put(f"/etc-0-FULL:{0:020d}", gzip.compress(b"no tar archive"), {})
    assert s3napback.main(["verify", "--deep", *site.bucket]) == 1
    assert "tar: This does not look like a tar archive" in capsys.readouterr().out


class Many:
    """A bucket of 200,000 objects that exist only when they are listed."""

    bucket = "many"
    requests = 0

    def iter_objects(self, prefix: str = "") -> Iterator[s3napback.StoredObject]:
        for n in range(200_000):
            self.requests += n % s3napback.PAGE == 0
            yield s3napback.StoredObject(f"/{n // 20000:05d}-0-FULL:{n % 20000:013d}",
                                         10 if n % 20000 < 19999 else 3, f"{n:032x}", 1.0)

    def head(self, key: str) -> dict[str, str]:
        self.requests += 1
        return {}

    def peek(self, key: str, count: int) -> bytes:
        self.requests += 1
        return b"\x85"


@pytest.mark.slow
def test_many_objects_are_listed_in_bounded_memory() -> None:
    store: Any = Many()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [one.without_chunks() for one in s3napback.catalogue(store, look_inside=True)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(found) == 10
    assert all(not one.fault and one.archive.count == 20000 for one in found)
    assert store.requests <= 220
    assert grown < 100_000  # kB; all at once would be several times as much


def chunks(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "buckets" / "b").iterdir() if p.is_file())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    info = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip], ids=["missing", "cut", "flipped"])
def test_no_damaged_chunk_is_given_out(two_nights: Callable[..., Path], damage: Any) -> None:
    folder = two_nights()
    whole = [path for path in chunks(folder) if "-DIFF" in path.name]
    kept = {path: (path.read_bytes(), path.stat()) for path in whole}
    for n, path in enumerate(whole):
        damage(path)
        done = command("restore", "-c", str(folder / "c"), str(folder / "data"),
                       "--to", str(folder / f"r{n}"))
        if damage is Path.unlink and "-18-DIFF" in path.name:
            # All of it is gone, and nothing knows that it was there: the night before is newest.
            assert b"as of 2026-11-22 03:00:00" in done.stderr
            path.write_bytes(kept[path][0])
            os.utime(path, ns=(kept[path][1].st_atime_ns, kept[path][1].st_mtime_ns))
            continue
        assert done.returncode == 1, path
        # In a folder, a file that was written anew has lost its notes, the archive's state too.
        named = path.name.partition("%3A")[0].replace("%2F", "/")
        assert named[:-7 if damage is cut else None] in done.stderr.decode()
        deep = command("verify", "-c", str(folder / "c"), "--deep")
        assert deep.returncode == 1, path
        assert deep.stdout
        data, info = kept[path]
        path.write_bytes(data)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    done = command("verify", "-c", str(folder / "c"), "--deep")
    assert (done.returncode, done.stdout) == (0, b"")


def test_verify_names_what_is_wrong_without_downloading(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    assert command("verify", "-c", str(folder / "c")).returncode == 0
    for path in chunks(folder):
        if path.name.endswith("-DIFF%3A0000000000001"):
            path.unlink()
            break
    done = command("verify", "-c", str(folder / "c"))
    assert done.returncode == 1
    assert b"chunk 1 is missing" in done.stdout


def test_restore_with_a_wrong_key_says_which_is_wanted(
    buckets: Path, tmp_path: Path, short_folder: Callable[[str], Path]
) -> None:
    empty = {"GNUPGHOME": str(short_folder(""))}
    restore = next(r for r in RESTORES if r["encrypted"] and r["kind"] == "Directory")
    done = command(
        "restore", "-b", restore["bucket"], "--endpoint", f"file://{buckets}",
        restore["name"], "--to", str(tmp_path / "x"), env=empty,
    )
    assert done.returncode == 1
    assert re.search(rb"wants the secret key [0-9A-F]{8}", done.stderr), done.stderr


def test_frozen_objects_are_named(s3_server: Any, tmp_path: Path) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="cold")
    client.put_object(Bucket="cold", Key="/d-0-FULL:" + "0" * 20, Body=b"x",
                      StorageClass="DEEP_ARCHIVE")
    done = command("restore", "-b", "cold", "-K", str(s3_server.write_keyfile(tmp_path / "k")),
                   "--endpoint", s3_server.endpoint, "/d", "--to", str(tmp_path / "x"))
    assert done.returncode == 1
    assert b"frozen in DEEP_ARCHIVE (restore --thaw asks for them)" in done.stderr


def test_force_partial_gives_the_last_good_moment(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    last = [path for path in chunks(folder) if "-18-DIFF" in path.name]
    last[0].unlink()
    words = ["restore", "-c", str(folder / "c"), str(folder / "data"), "--to", f"{folder}/p"]
    done = command(*words)
    if done.returncode == 1:  # all of a one-chunk archive is gone: the night before is the newest
        assert b"--at '2026-11-22" in done.stderr
        done = command(*words, "--force-partial")
        assert b"partial: as of 2026-11-22" in done.stderr
        assert done.returncode == 3  # less than was asked for
    else:
        assert done.returncode == 0
    assert (folder / f"p{folder}/data" / "sub" / "gone").exists()


def test_list_tells_stale_cut_left_over_and_encrypted(tmp_path: Path) -> None:
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}"), lambda: 1e9)
    store.create()
    for key, data in (
        (f"/a-0-FULL:{0:020d}", b"x"), (f"/b-3-DIFF:{0:020d}", b"\x85\x01"),
        (f"/c-0-FULL:{0:020d}", b"12"), (f"/c-0-FULL:{1:020d}", b"12"),
        (f"/c-1-FULL:{0:013d}", b"new"), (f"/c-1-FULL:{0:020d}", b"old"), ("foreign", b"x"),
    ):
        store.put(key, data, {})
    done = command("list", "-b", "b", "--endpoint", f"file://{tmp_path}")
    lines = {line.split()[3]: line for line in done.stdout.decode().splitlines()
             if line.startswith("  2001")}
    assert lines["/a-0-FULL"].endswith("1 chunks  complete")
    assert lines["/b-3-DIFF"].endswith("complete, stale: what it continues is gone, encrypted")
    assert "it was cut off: its last chunk is as long as the others" in lines["/c-0-FULL"]
    assert lines["/c-1-FULL"].endswith("and 1 chunks left over from another upload")


@pytest.mark.slow
def test_a_secret_key_may_have_a_passphrase(
    tmp_path: Path, short_folder: Callable[[str], Path]
) -> None:
    home, bare = short_folder(""), short_folder("")
    env = {**os.environ, "GNUPGHOME": str(home)}
    gpg = ["gpg", "--batch", "-q", "--pinentry-mode", "loopback", "--passphrase", "open sesame"]
    subprocess.run([*gpg, "--quick-generate-key", "p@example.com", "future-default", "default"],
                   env=env, check=True)
    secret = tmp_path / "secret.asc"
    secret.write_bytes(subprocess.run([*gpg, "--armor", "--export-secret-keys"], env=env,
                                      check=True, capture_output=True).stdout)
    (tmp_path / "pass").write_text("open sesame\n")
    (tmp_path / "wrong").write_text("open barley\n")
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}"), lambda: 1e9)
    store.create()
    sql = subprocess.run(["gpg", "--batch", "-q", "-r", "p@example.com", "-e"], env=env, check=True,
                         input=gzip.compress(b"SELECT 1;"), capture_output=True).stdout
    store.put(f"PostgreSQL/-0:{0:020d}", sql, {})
    words = ["restore", "-b", "b", "--endpoint", f"file://{tmp_path}", "PostgreSQL/all",
             "--secret-key", str(secret), "--stdout", "--passphrase-file"]
    done = command(*words, str(tmp_path / "pass"), env={"GNUPGHOME": str(bare)})
    assert (done.returncode, done.stdout) == (0, b"SELECT 1;"), done.stderr
    done = command(*words, str(tmp_path / "wrong"), env={"GNUPGHOME": str(bare)})
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the passphrase is wrong: --passphrase-file FILE" in done.stderr
    # Without one, in any language.
    done = command(*words[:-1], env={"GNUPGHOME": str(bare), "LANGUAGE": "de"})
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the secret key has a passphrase, and none was given" in done.stderr
    assert command(*words, str(tmp_path / "none"), env={"GNUPGHOME": str(bare)}).returncode == 2
    assert b"Traceback" not in done.stderr
    assert not list(bare.glob("*.kbx"))
    subprocess.run(["gpgconf", "--kill", "all"], env=env)


def test_the_root_folder_is_restored_only_by_its_name(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    words = ["restore", "-c", str(folder / "c"), str(folder / "data"), "--to"]
    done = command(*words, "/tmp/..", "--overwrite")
    assert done.returncode == 2
    assert b"is the root folder (write --to / to mean it)" in done.stderr
    assert b"is not empty" in command(*words, "/").stderr


def test_a_repositorys_dump_that_lacks_its_last_revision(
    tmp_path: Path, svn_repo_factory: Callable[[Path, int], Path]
) -> None:
    repo = svn_repo_factory(tmp_path / "repo", 3)
    dump = subprocess.run(["svnadmin", "dump", "-q", str(repo)], capture_output=True).stdout
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}"), lambda: 1e9)
    store.create()
    for name, last in (("good", 3), ("bad", 4)):
        data = gzip.compress(dump)
        digest = s3napback.digest_of_digests([hashlib.md5(data).hexdigest()])
        marks = {"archive": "i", "chunks": "1", "bytes": str(len(data)), "md5": digest,
                 "kind": "Subversion", "made": "2026-11-24T00:00:00Z", "state": f"0:{last}"}
        store.put(f"/{name}-0-FULL:{0:013d}", data,
                  {f"s3napback-{key}": value for key, value in marks.items()})
    done = command("verify", "-b", "b", "--endpoint", f"file://{tmp_path}", "--deep")
    assert done.stdout == b"/bad-0-FULL: the dump lacks revision 4\n"
    assert done.returncode == 1


def test_what_is_left_of_a_repository_that_cannot_be_restored_is_told(
    site: Site, capsys: Capture
) -> None:
    require_tool("svnadmin")
    store, place = site.store(), site.folder / "again"
    store.create()
    store.put(f"/svn-0-FULL:{0:020d}", b"SVN-fs-dump-format-version: 2\n\nrubbish\n", {})
    assert site.restore(place, name="/svn") == 1
    said = capsys.readouterr().err
    assert "/svn-0-FULL: svnadmin ended with status 1" in said
    assert said.endswith(f"({place} holds the revisions that came before)\n")
    assert (place / "format").exists()


def test_restore_shows_its_progress_on_a_terminal(two_nights: Callable[..., Path]) -> None:
    folder = two_nights()
    line = (f"{sys.executable} {START} restore -c {folder}/c {folder}/data"
            f" --to {folder}/seen")
    done = subprocess.run([require_tool("script"), "-qec", line, "/dev/null"],
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    assert b"%|" in done.stdout
    assert b"is in " in done.stdout


def test_sql_is_restored_to_standard_output(buckets: Path) -> None:
    done = command("restore", "-b", "oracle.plain", "--endpoint", f"file://{buckets}",
                   "MySQL/all", "--stdout")
    assert done.returncode == 0
    raw = buckets / "oracle.plain"
    (last,) = [r for r in RESTORES if r["store"] == "plain-day4" and r["kind"] == "MySQL"
               and r["name"] == "all" and r["day"] == 4]
    file = raw / (last["archives"][0].replace("/", "%2F") + "%3A" + "0" * 20)
    assert done.stdout == gzip.decompress(file.read_bytes())


# ---- moments ----


@given(st.text(max_size=40))
def test_no_text_breaks_the_reader_of_moments(text: str) -> None:
    try:
        assert isinstance(s3napback.parse_when(text, s3napback.Moment.of(NIGHT)), float)
    except Failure as failure:
        assert failure.status == 2


def test_a_moment_of_digits_alone_is_refused() -> None:
    """Found by fuzzing: dateutil raises decimal.InvalidOperation."""
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(f"\n{'2' * 20}:{'2' * 29}", s3napback.Moment.of(NIGHT))


@pytest.mark.parametrize(
    "text", ["44:444444444444444444444444444444", "1" * 3000, "2026-11-20 03:00 XYZ", "1.1e9999"]
)
def test_a_moment_of_thousands_of_digits_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="cannot read the moment"):
        s3napback.parse_when(text, s3napback.Moment.of(NIGHT))


# ---- where nothing can be restored ----


def test_a_tool_that_a_restore_needs_is_named(tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path)}
    with pytest.raises(Failure, match="no-such is not on PATH"):
        s3napback.run_filter(Stage(("no-such",)), [b"x"], bare).__enter__()
    before = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path)
    try:
        with pytest.raises(Failure, match="tar is not on PATH"):
            s3napback.run_tar(iter([b"x"]), str(tmp_path), bare)
    finally:
        os.environ["PATH"] = before


def test_a_place_where_nothing_can_be_restored_to_is_refused(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    words = ["restore", "-c", str(site.write()), str(site.data), "--to"]
    assert s3napback.main([*words, "/proc/new"]) == 1
    assert "cannot make the folder" in capsys.readouterr().err
    store = site.store()
    store.put("MySQL/shop-0:0000000000000", b"dump", {})
    words[3] = "MySQL/shop"
    assert s3napback.main([*words, "/nowhere/dump"]) == 1
    assert "cannot write the dump" in capsys.readouterr().err
