"""One small life, lived on many ordinary machines.

A FULL and two DIFFs, each by a process of its own with cron's environment, of a folder in which
things are edited, made, deleted, renamed and replaced by others. Then every night comes back,
whole, by PATH and by the restore script, and is compared with what was there: kind, mode, owner,
time, links, content, attributes. A variation is a row of the table.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import forker
import libraries
import pytest
from conftest import inventory, leave_out, require_tool, run
from forker import Forker

import s3napback

PROGRAM = Path(s3napback.__file__)
ROOT = os.geteuid() == 0
USER = "nobody"

# What cron gives (Debian's cron, crontab(5)).
CRON_PATH = "/usr/bin:/bin"

@dataclass(frozen=True)
class Variation:
    """A machine. first: local time of its first night; name: of the Directory, as the config has
    it, where {top} is the folder that holds the data; folder: the data's own name there; more:
    lines of the config; configs: "one", "two" (with a DiffDir each) or "shared" (one DiffDir)."""

    title: str
    zone: str = "UTC"
    first: str = "2026-11-24 03:00"
    locale: Mapping[str, str] = field(default_factory=dict)
    name: str = "{top}/data"
    folder: str = "data"
    compressor: str = ""
    more: str = ""
    chunk_size: int = 5000
    configs: str = "one"
    gpg: bool = False
    s3: bool = False
    subversion: bool = False
    user: bool = False
    frozen_tmp: bool = False
    prefix: str = ""


UTF8, ASCII = {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}

VARIATIONS = [
    Variation("plain", subversion=True),
    Variation("autumn in Berlin", "Europe/Berlin", "2026-10-24 02:30", ASCII, "{top}/da*",
              compressor="bzip2", gpg=True),
    Variation("spring in Berlin", "Europe/Berlin", "2026-03-28 02:30", UTF8, compressor="zstd -3",
              more="SafeReplace On", prefix="web1", s3=True, subversion=True, chunk_size=20_000),
    Variation("spring in New York", "America/New_York", "2026-03-07 02:30", {"LANG": "C"},
              "{top}/data/", compressor="gzip", configs="two", subversion=True),
    Variation("New Year on Kiritimati", "Pacific/Kiritimati", "2026-12-30 00:30", UTF8,
              "{top}/two words", "two words", compressor="lz4", gpg=True),
    Variation("Kathmandu", "Asia/Kathmandu", "2026-06-01 23:50", name="{relative}/data",
              compressor="zstd --long=31", configs="shared"),
    Variation("home", name="~/data", compressor="igzip", chunk_size=512, prefix="web 1"),
    Variation("letters under C", "Europe/Berlin", locale=ASCII, name="{top}/zażółć €",
              folder="zażółć €", compressor="cat", gpg=True),
    Variation("letters that are none", name="{top}/caf\udce9 \udcff", folder="caf\udce9 \udcff",
              compressor="pigz", s3=True, chunk_size=20_000),
    Variation("quotes", locale=UTF8, name="{top}/it's \"so\" $HOME `x` \\t",
              folder="it's \"so\" $HOME `x` \\t", more="UseTempFile On\nSafeReplace On"),
    Variation("a newline", name="{top}/new?[a-l]ine", folder="new\nline", s3=True, gpg=True,
              more="SafeReplace On\nParallel 1", chunk_size=2_000_000),
    Variation("ordinary user", "America/New_York", "2026-10-31 01:30", {"LC_ALL": "de_DE"},
              user=True, compressor="xz"),
    Variation("frozen tmp", frozen_tmp=True, gpg=True),
]


# ---- what is on the machine ----

ODD_NAMES = [
    "two words", "it's", 'so "quoted"', "new\nline", "back\\slash", "\\n", "-dash", "--", "~tilde",
    "*star?[x]", "zażółć", "caf\udce9", "col:on-0-FULL", "per%41cent", "tab\t", " blank ", ".dot",
    "$HOME`id`",
]


def write(path: Path, content: str | bytes, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def first_day(data: Path, as_root: bool) -> None:
    data.mkdir()
    for name in ODD_NAMES:
        write(data / "odd" / name / name, f"in {name!r}")
    for n in range(4):
        write(data / f"d{n}" / "deep" / "file", f"deep {n}\n" * 300, 0o640)
        write(data / f"d{n}" / "top", f"top {n}\n")
    write(data / "edited", "as it was")
    write(data / "same size", "AAAA")
    write(data / "deleted", "goes")
    write(data / "moves", "a file that moves")
    write(data / "file then folder", "file")
    write(data / "folder then file" / "in it", "x")
    write(data / "goes whole" / "a" / "b", "x")
    write(data / "setuid", "s", 0o4755)
    write(data / "random", os.urandom(20_000))
    os.utime(write(data / "empty", "", 0o600), (0, 2**32))  # a clock that was ahead by far
    with open(data / "holes", "wb") as file:
        file.truncate(300_000)
        file.seek(150_000)
        file.write(b"not a hole")
    os.link(write(data / "one name", "linked"), data / "d0" / "other name")
    os.symlink("edited", data / "link")
    os.symlink("/nowhere/at/all", data / "link out")
    os.symlink("d3", data / "current")
    os.mkfifo(data / "fifo")
    (data / "no one in").mkdir()
    with contextlib.suppress(OSError):  # not every file system has them
        os.setxattr(data / "edited", "user.colour", b"green")
    os.utime(data / "edited", ns=(10**18, 1_234_567_891_123_456_789))
    if as_root:
        os.chown(data / "edited", 1234, 5678)
        os.lchown(data / "link", 1234, 5678)
        os.mknod(data / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def second_day(data: Path, _: bool) -> None:
    write(data / "edited", "as it is now, and longer")
    before = (data / "same size").stat()
    write(data / "same size", "BBBB")
    os.utime(data / "same size", ns=(before.st_atime_ns, before.st_mtime_ns))
    (data / "deleted").unlink()
    shutil.rmtree(data / "goes whole")
    (data / "moves").rename(data / "d1" / "moved")
    (data / "d1").rename(data / "d1 renamed")
    (data / "d2" / "deep").rename(data / "deep of d2")
    (data / "file then folder").unlink()
    write(data / "file then folder" / "now" / "in it", "y")
    shutil.rmtree(data / "folder then file")
    write(data / "folder then file", "now a file")
    (data / "current").unlink()
    (data / "d3").rename(data / "current")  # where a link was
    write(data / "new" / "file", "new")
    (data / "setuid").chmod(0o700)
    (data / "odd" / "new\nline").rename(data / "odd" / "new\nline 2")
    (data / "no one in").chmod(0o700)


def third_day(data: Path, _: bool) -> None:
    (data / "d1 renamed").rename(data / "d1")  # and back
    (data / "d0").rename(data / "swap")
    (data / "d2").rename(data / "d0")
    (data / "swap").rename(data / "d2")
    shutil.rmtree(data / "new")
    write(data / "new" / "file", "another of that name")
    write(data / "deleted", "there again")
    (data / "deep of d2").rename(data / "odd" / "deep")
    (data / "folder then file").unlink()
    (data / "folder then file").symlink_to("d0")
    write(data / "current" / "later", "z")
    (data / "edited").unlink()


Inventory = dict[str, tuple[Any, ...]]


# ---- the machine ----


class Machine:
    def __init__(self, folder: Path, variation: Variation, env: Mapping[str, str], s3: Any) -> None:
        self.folder, self.variation = folder, variation
        self.top, self.data = folder / "top", folder / "top" / variation.folder
        for name in ("diffs", "diffs2", "temp", "buckets", "top", "lib", "other"):
            (folder / name).mkdir()
        # A copy: it has no logconfig beside it, which would write to /var/log.
        for path in (PROGRAM, forker.__file__, libraries.__file__):
            shutil.copy(path, folder / "lib")
        self.env = {
            "PATH": CRON_PATH, "HOME": str(self.top), "SHELL": "/bin/sh", "TZ": variation.zone,
            **variation.locale, **env,
        }
        self.s3 = s3
        self.repository = folder / "repository"
        self.name = variation.name.format(top=self.top, relative=str(self.top)[1:])
        self.confs = [folder / "my.conf"]
        second = f'Directory "{folder}/other"'
        if variation.subversion:
            second += f"\nSubversion {self.repository}"
        quoted = self.name.replace('"', '\\"')
        self._write(self.confs[0], "diffs", f'Directory "{quoted}"'
                    + (f"\n{second}" if variation.configs == "one" else ""))
        if variation.configs != "one":
            self.confs.append(folder / "second.conf")
            diffs = "diffs2" if variation.configs == "two" else "diffs"
            self._write(self.confs[1], diffs, second)

    def _write(self, path: Path, diffs: str, jobs: str) -> None:
        v, folder = self.variation, self.folder
        rounds = self.nights()[0].timetuple().tm_yday - 1
        cycle = next((n for n in range(3, 366) if rounds % n == 0), 3)
        store = f"S3Endpoint file://{folder}/buckets"
        if v.s3:
            store = f"S3Endpoint {self.s3.endpoint}\n"
            store += f"S3Keyfile {self.s3.write_keyfile(folder / 'key')}"
        levels = [line for line in v.more.splitlines() if line.startswith("UseTempFile")]
        main = [line for line in v.more.splitlines() if line not in levels]
        text = "\n".join([
            f"DiffDir {folder}/{diffs}", f"TempDir {folder}/temp", "Bucket bkt", "RetryHours 0",
            f"ChunkSize {v.chunk_size}", store, *main,
            *([f'Compressor "{v.compressor}"'] if v.compressor else []),
            *(["GpgRecipient backup@example.com"] if v.gpg else []),
            *([f'Prefix "{v.prefix}"'] if v.prefix else []),
            f"<Cycle c>\nDiffs {cycle - 1}\nFulls 2", *levels, jobs, "</Cycle>", "",
        ])
        path.write_text(text, errors="surrogateescape", encoding="utf-8")

    def nights(self) -> list[datetime]:
        """The second run of an hour that comes twice, the time after one that is left out."""
        zone = ZoneInfo(self.variation.zone)
        first = datetime.fromisoformat(self.variation.first)
        return [(first + timedelta(days=n)).replace(tzinfo=zone, fold=1) for n in range(3)]

    @functools.cached_property
    def forker(self) -> Forker:
        """Starts the program: all of its processes, as everything is in place."""
        return Forker(self.folder / "lib", self.env, wrapped=self._wrapped())

    def call(
        self, *words: str, now: datetime, status: int | tuple[int, ...] = 0
    ) -> subprocess.CompletedProcess[bytes]:
        out, err = self.folder / "out", self.folder / "err"
        self.forker.start(words, now, out, err)
        done = subprocess.CompletedProcess(
            words, self.forker.wait(), out.read_bytes(), err.read_bytes())
        said = done.stderr.decode("utf-8", "replace")
        right = status if isinstance(status, tuple) else (status,)
        assert done.returncode in right, f"{words}: {done.returncode}\n{said}\n{done.stdout!r}"
        assert "Traceback" not in said
        return done

    def _wrapped(self) -> list[str]:
        """The start of a command line that makes the machine what the variation says."""
        v, steps, argv = self.variation, [], []
        if v.frozen_tmp:
            steps = ["mount --bind /tmp /tmp", f"mount --bind {self.folder} {self.folder}",
                     "mount -o remount,bind,ro /tmp"]
        if v.user and ROOT:
            argv = ["setpriv", f"--reuid={USER}", "--regid=nogroup", "--clear-groups"]
        if not steps:
            return argv
        script = " && ".join([*steps, 'exec "$@"'])
        return ["unshare", "-m", "sh", "-c", script, "sh", *argv]

    # ---- its nights, and back ----

    def back_up(self, night: int) -> None:
        for conf in self.confs:
            done = self.call("-c", str(conf), now=self.nights()[night])
            assert b"0 skipped, 0 failed" in done.stderr, done.stderr.decode()

    def restored(self, name: str, *words: str, status: int = 0, conf: int = 0) -> Path:
        place = self.folder / f"back{len(list(self.folder.glob('back*')))}"
        later = self.nights()[2] + timedelta(days=100)
        self.call("restore", "-c", str(self.confs[conf]), *self.secret(), "--to", str(place), name,
                  *words, now=later, status=status)
        return place

    def secret(self) -> list[str]:
        path = self.folder / "secret.asc"
        return ["--secret-key", str(path)] if self.variation.frozen_tmp else []

    def moments(self, name: str) -> list[str]:
        """What `list` says a source can be restored as of."""
        later = self.nights()[2] + timedelta(days=100)
        text = self.call("list", "-c", str(self.confs[0]), name, now=later).stdout.decode()
        assert "stale" not in text, text
        line = next(line for line in text.splitlines() if "can be restored as of: " in line)
        return line.partition(": ")[2].split(", ")

    def run_script(self, name: str) -> Path:
        """The newest night by the restore script; `aws s3 cp` is played by a few lines."""
        place, script = self.folder / "by script", self.folder / "restore.sh"
        done = self.call("restore-script", "-c", str(self.confs[0]), name, now=self.nights()[2])
        script.write_bytes(done.stdout)
        env = dict(self.env)
        if self.s3:
            (self.folder / "aws").write_text(
                f"#!{sys.executable}\nimport sys, boto3\nfrom botocore.config import Config\n"
                "url = next(word for word in sys.argv if word.startswith('s3://'))\n"
                "bucket, _, key = url.removeprefix('s3://').partition('/')\n"
                f"client = boto3.client('s3', endpoint_url={self.s3.endpoint!r},"
                f" region_name='us-east-1', aws_access_key_id={self.s3.key!r},"
                f" aws_secret_access_key={self.s3.secret!r},"
                " config=Config(s3={'addressing_style': 'path'}))\n"
                "body = client.get_object(Bucket=bucket, Key=key)['Body']\n"
                "sys.stdout.buffer.write(body.read())\n"
            )
            (self.folder / "aws").chmod(0o755)
            env["PATH"] = f"{self.folder}:{CRON_PATH}"
        done = subprocess.run(
            [*self._wrapped(), "sh", str(script), str(place)], env=env, cwd=self.folder,
            stdin=subprocess.DEVNULL, capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        return place


@pytest.fixture
def machine(
    request: pytest.FixtureRequest, short_folder: Callable[[str], Path]
) -> Iterator[Machine]:
    variation: Variation = request.param
    for tool in (variation.compressor.split() or ["tar"])[:1]:
        require_tool(tool)
    if variation.frozen_tmp and not ROOT:
        leave_out("a read-only /tmp needs root")
    folder = short_folder(USER if variation.user else "")
    env: dict[str, str] = {}
    gpg = request.getfixturevalue("gpg_home") if variation.gpg else None
    if gpg:
        env["GNUPGHOME"] = str(gpg.home)
        gpg.run("--check-trustdb")  # which is not to be written in a frozen /tmp
        (folder / "secret.asc").write_text(gpg.run("--armor", "--export-secret-keys"))
    s3 = request.getfixturevalue("s3_server") if variation.s3 else None
    machine = Machine(folder, variation, env, s3)
    if variation.subversion:
        request.getfixturevalue("svn_repo_factory")(machine.repository, 2)
    yield machine
    machine.forker.close()


@pytest.mark.slow
@pytest.mark.parametrize("machine", VARIATIONS, indirect=True, ids=lambda v: v.title)
def test_a_small_life_comes_back_on_every_machine(machine: Machine, svn_repo_factory: Any) -> None:
    v, data = machine.variation, machine.data
    nights: list[Inventory] = []
    wild = "*" in v.name
    for night, live in enumerate((first_day, second_day, third_day)):
        live(data, ROOT and not v.user)
        write(machine.folder / "other" / f"night{night}", f"{night}")
        if v.subversion:
            svn_repo_factory(machine.repository, 1)
        if wild and night == 1:
            write(machine.top / "data of a guest" / "file", "x")
        if wild and night == 2:
            shutil.rmtree(machine.top / "data of a guest")
        if v.user and ROOT:
            run(["chown", "-hR", f"{USER}:nogroup", str(machine.folder)])
        if night == 1 and v.configs == "one":
            machine.call("check", "-c", str(machine.confs[0]), now=machine.nights()[1],
                         status=(0, 3))
        machine.back_up(night)
        nights.append(inventory(data, links=night == 0))

    moments = machine.moments(machine.name)
    assert len(moments) == 3
    plainly = moments[0].rpartition(" ")[0]  # without the zone
    for night, at in enumerate((["--at", plainly], ["--at", moments[1]], [])):
        place = machine.restored(machine.name, *at)
        assert inventory(place / str(data)[1:], links=night == 0) == nights[night], f"night {night}"
        guests = [path.name for path in (place / str(machine.top)[1:]).iterdir()]
        assert len(guests) == 1 + (wild and night == 1), guests
        shutil.rmtree(place)

    paths = [f"odd/{path.name}" for path in (data / "odd").iterdir()]
    paths += ["d0", "current/later", "link out", "no one in", "holes"]
    place = machine.restored(machine.name, *(str(data / path) for path in paths))
    back = place / str(data)[1:]
    for path in paths:
        there = inventory(back / path, links=False)
        assert there == inventory(data / path, links=False), path
    files = {str(p.relative_to(back)) for p in back.rglob("*") if not p.is_dir()}
    assert all(name.startswith(tuple(paths)) for name in files), files
    machine.restored(machine.name, str(data / "d1 renamed"), status=1)
    place = machine.restored(machine.name, "--at", moments[1], str(data / "d1 renamed"))
    below = {k.removeprefix("d1 renamed").lstrip("/") or ".": value
             for k, value in nights[1].items() if k.split("/")[0] == "d1 renamed"}
    assert inventory(place / str(data)[1:] / "d1 renamed", links=False) == below

    place = machine.run_script(machine.name)
    assert inventory(place / str(data)[1:], links=False) == nights[2]

    for conf in machine.confs:
        done = machine.call("verify", "--deep", "-c", str(conf), *machine.secret(),
                            now=machine.nights()[2])
        assert b" 0 faults" in done.stderr, done.stderr
    last = len(machine.confs) - 1
    if last:
        place = machine.restored(f"{machine.folder}/other", conf=last)
        other = place / str(machine.folder)[1:] / "other"
        assert sorted(os.listdir(other)) == ["night0", "night1", "night2"]
    if v.subversion:
        place = machine.restored(str(machine.repository), conf=last)
        youngest = ["svnlook", "youngest"]
        assert run([*youngest, str(place)]) == run([*youngest, str(machine.repository)])
    left = [name for name in os.listdir(machine.folder / "temp")]
    left += [p.name for p in (machine.folder / "buckets").rglob(".new-*")]
    assert not left


@pytest.mark.slow
def test_runs_that_cross_midnight_store_everything_each_night(
    short_folder: Callable[[str], Path]
) -> None:
    """Three nights, each begun two seconds before midnight by the script itself: nothing is taken
    for done, whatever the clock says when its turn comes."""
    faketime = [require_tool("faketime"), "-f"]
    folder = short_folder("")
    for name in ("diffs", "temp", "buckets", "lib", "bin", "one", "two"):
        (folder / name).mkdir()
    shutil.copy(PROGRAM, folder / "lib")
    write(folder / "bin" / "mysqldump", "#!/bin/sh\necho '-- MySQL dump'\nsleep 1.5\n"
          f"cat {folder}/rows\necho '-- Dump completed'\n", 0o755)
    conf = write(folder / "my.conf", "\n".join([
        f"DiffDir {folder}/diffs", f"TempDir {folder}/temp", "Bucket b", "ChunkSize 1000",
        f"S3Endpoint file://{folder}/buckets", "SafeReplace On",
        f"<Cycle c>\nDiffs 2\nFulls 1\nDirectory {folder}/one\nDirectory {folder}/two",
        "MySQL first\nMySQL second\nMySQL third", "</Cycle>", ""]))
    env = {"PATH": f"{folder}/bin:{CRON_PATH}", "HOME": str(folder), "TZ": "Europe/Berlin",
           "NO_FAKE_STAT": "1"}

    def call(when: str, *words: str) -> str:
        done = subprocess.run(
            [*faketime, f"@{when}", sys.executable, str(folder / "lib" / PROGRAM.name), *words],
            env=env, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    for night in range(3):
        write(folder / "rows", f"night {night}\n")
        write(folder / "one" / f"file{night}", f"{night}")
        write(folder / "two" / f"file{night}", f"{night}")
        said = call(f"2025-03-{10 + night} 23:59:58", "-c", str(conf))
        assert "5 stored, 0 skipped, 0 failed" in said
        for name in ("first", "third"):
            place = folder / f"{name}{night}"
            call("2025-03-20 12:00:00", "restore", "-c", str(conf), f"MySQL/{name}", "--to",
                 str(place))
            assert f"night {night}\n" in place.read_text()
    for name in ("one", "two"):
        call("2025-03-20 12:00:00", "restore", "-c", str(conf), f"{folder}/{name}", "--to",
             f"{folder}/back-{name}")
        found = os.listdir(folder / f"back-{name}" / str(folder)[1:] / name)
        assert sorted(found) == ["file0", "file1", "file2"]
