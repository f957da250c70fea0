"""Months of nights in which something goes wrong, and what must hold all the same.

A `World` is a machine with two directories and a repository, a config and a bucket: real processes,
real tar, gzip, gpg and Subversion, and S3 over HTTP with a layer that fails as networks and
services do (`FaultyS3`). Every run of the program is disturbed in one way; after it, bucket,
DiffDir, TempDir, processes, log and exit status are looked at. Then comes a run that nobody
disturbs. All chance comes from one seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import forker
from conftest import START, GpgHome
from forker import Forker
from s3_server import Refusal, S3Server, error_document

import s3napback
from s3napback import CatalogEntry, StoredObject

BUCKET = "faults.example.com"

# ---- S3 that fails ----

# Faults of one request that may pass, and those that do not: their answers.
REFUSALS = {
    "500": (500, "InternalError", "We encountered an internal error"),
    "503": (503, "SlowDown", "Please reduce your request rate"),
    "307": (307, "TemporaryRedirect", "Please re-send this request"),
    "expired": (400, "ExpiredToken", "The provided token has expired"),
    "denied": (403, "AccessDenied", "Access Denied"),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the times is too large"),
    "bad key": (403, "SignatureDoesNotMatch", "The signature does not match"),
    "301": (301, "PermanentRedirect", "The bucket is somewhere else"),
}
FINAL = ("denied", "skewed", "bad key", "301")
PASSING = (
    "500", "503", "307", "expired", "reset", "time-out", "cut request", "cut response",
    "lost response", "late response", "wrong ETag", "stored damaged",
)
# Longer than the program waits for an answer (forker.py).
TOO_LONG = 0.7


class FaultyS3(S3Server):
    """The tests' S3 server, with faults, and with hooks between the requests.

    choose: (method, path) → the name of a fault, or None; hook: called with the number of the
    request and "before" or "after" it was carried out; now: the date of what is stored.
    """

    def __init__(self) -> None:
        super().__init__()
        # A request that is refused in the middle leaves a rest that is no request.
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.choose: Callable[[str, str], str | None] = lambda method, path: None
        self.hook: Callable[[int, str], None] = lambda number, when: None
        self.count = 0
        self.injected: Counter[str] = Counter()
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)
        self._started = time.monotonic()
        self._numbers = threading.Lock()
        self._busy = 0

    def calm(self, now: datetime) -> None:
        """No faults from here on; it is now that moment."""
        self.choose, self.hook = lambda method, path: None, lambda number, when: None
        self.count, self.now, self._started = 0, now, time.monotonic()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._numbers:
            self._busy += 1
        try:
            return self._disturbed_answer(environ, start_response)
        finally:
            with self._numbers:
                self._busy -= 1

    def wait_idle(self) -> None:
        """Returns when no request is being carried out: one who is killed leaves some behind."""
        while self._busy:
            time.sleep(0.001)

    def _disturbed_answer(
        self, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["RAW_URI"].partition("?")[0]
        with self._numbers:
            self.count += 1
            number = self.count
        self.hook(number, "before")
        fault = self.choose(method, path)
        if fault in ("wrong ETag", "stored damaged") and (method != "PUT" or path.count("/") < 2):
            fault = "500"
        if fault:
            with self._numbers:
                self.injected[fault] += 1
        if fault in REFUSALS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            refusal = Refusal(*REFUSALS[fault])
            text = error_document(refusal) if method != "HEAD" else b""
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            start_response(f"{refusal.status} {refusal.code}", headers)
            return [text]
        if fault == "cut request":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        if fault == "time-out":
            time.sleep(TOO_LONG)
        if fault == "reset":
            # Linger of 0 s: the kernel sends RST instead of FIN (socket(7)).
            environ["werkzeug.socket"].setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        if fault in ("cut request", "time-out", "reset"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError(fault)
        answer: list[Any] = []
        body = b"".join(super()._answer(environ, lambda *words: answer.extend(words)))
        if fault == "stored damaged" and answer[0].startswith("200"):
            answer[1][:] = self._damage(path, answer[1])
        self._stamp()
        self.hook(number, "after")
        status, headers = answer[0], list(answer[1])
        if fault == "late response":
            time.sleep(TOO_LONG)
        if fault in ("lost response", "late response"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError(fault)
        if fault == "wrong ETag":
            headers = [(n, f'"{"0" * 32}"' if n.lower() == "etag" else v) for n, v in headers]
        start_response(status, headers)
        if fault == "cut response":
            return self._cut(environ, body)
        return [body]

    def _cut(self, environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("cut response")

    def _damage(self, path: str, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Changes a byte of what was stored, beneath all checksums; the answer tells its MD5."""
        entry = self.stored(BUCKET, unquote(path)[1:].partition("/")[2])
        entry.value = entry.value[:-1] + bytes([entry.value[-1] ^ 1]) if entry.value else b"x"
        entry._etag = None
        return [(n, entry.etag if n.lower() == "etag" else v) for n, v in headers]

    def _stamp(self) -> None:
        """Gives what was stored just now the date that it is."""
        bucket = self._backend.buckets.get(BUCKET)
        moment = self.now + timedelta(seconds=time.monotonic() - self._started)
        for entry in list(bucket.keys.values()) if bucket else ():
            if not hasattr(entry, "stamped") or entry.stamped != id(entry):
                entry.stamped = id(entry)
                entry.last_modified = moment.astimezone(timezone.utc).replace(tzinfo=None)


class Shelf:
    """The bucket's content, read from the server's memory: a `Store` that cannot fail."""

    def __init__(self, server: FaultyS3) -> None:
        self.bucket = BUCKET
        self._server = server

    @property
    def _keys(self) -> Any:
        bucket = self._server._backend.buckets.get(BUCKET)
        return bucket.keys if bucket else {}

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        return iter([
            StoredObject(
                key, len(entry.value), entry.etag.strip('"'),
                entry.last_modified.replace(tzinfo=timezone.utc).timestamp(),
            )
            for key, entry in sorted(self._keys.items()) if key.startswith(prefix)
        ])

    def head(self, key: str) -> dict[str, str] | None:
        entry = self._keys.get(key)
        return _user_metadata(entry) if entry else None

    def get(self, key: str) -> tuple[bytes, dict[str, str]]:
        entry = self._keys[key]
        return entry.value, _user_metadata(entry)


def _user_metadata(entry: Any) -> dict[str, str]:
    return {name.lower().removeprefix("x-amz-meta-"): v for name, v in entry.metadata.items()}


# ---- what a run can be disturbed with ----


@dataclasses.dataclass(frozen=True)
class Fault:
    """One disturbance. kind: "kill", "request", "requests", "stage", "room", "read-only"; the
    rest says which one exactly, in words that also name it in a report."""

    kind: str
    what: str = ""
    at: int = 0  # the number of a request, or milliseconds
    rate: float = 0.0

    def __str__(self) -> str:
        rate = f" at {self.rate:.0%}" if self.rate else ""
        return f"{self.kind} {self.what}{rate}" + (f" at {self.at}" if self.at else "")


TOOLS = ("tar", "pigz", "gpg", "svnadmin")
DYING = {
    "at once": "exit 9",
    "in the middle": 'head -c 2500 <("$REAL" "$@"); exit 9',
    "before the last byte": '"$REAL" "$@" | head -c -1; exit 9',
    "at the end": '"$REAL" "$@"; exit 9',
    "by SIGKILL": '"$REAL" "$@" | head -c 1000; kill -KILL $$',
    "by SIGTERM": '"$REAL" "$@"; kill -TERM $$',
}


def random_fault(chance: random.Random, requests: int, gpg: bool, temp: bool) -> Fault:
    """Any disturbance but a kill, of a run that has about so many requests."""
    kinds = ["request", "requests", "requests", "final", "stage", "room", "read-only"]
    kind = chance.choice(kinds)
    if kind == "request":
        return Fault("request", chance.choice(PASSING), chance.randint(1, requests))
    if kind == "requests":
        return Fault("requests", rate=chance.choice((0.01, 0.03, 0.1, 0.2, 0.3)))
    if kind == "final":
        return Fault("request", chance.choice(FINAL), chance.randint(1, requests))
    if kind == "stage":
        tool = chance.choice([tool for tool in TOOLS if gpg or tool != "gpg"])
        return Fault("stage", f"{tool} {chance.choice(list(DYING))}")
    if kind == "room":
        places = ("temp", "diffs") if temp else ("diffs",)
        return Fault("room", chance.choice(places), chance.choice((0, 1, 2)))
    return Fault("read-only")


def random_kill(chance: random.Random, requests: int) -> Fault:
    """SIGKILL or SIGTERM around one of the requests, or at any instant."""
    name = chance.choice(("SIGKILL", "SIGKILL", "SIGTERM"))
    when = chance.choice(("before", "after", "after", "instant"))
    limit = 400 if when == "instant" else requests
    return Fault("kill", f"{name} {when}", chance.randint(1, limit))


# ---- the machine ----


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a month is lived with."""

    cycle: str
    gpg: bool
    safe: bool
    temp: bool

    def __str__(self) -> str:
        words = [name for name in ("gpg", "safe", "temp") if getattr(self, name)]
        return " ".join([self.cycle, *words])


CYCLES = {
    "SimpleCycle": "CycleType SimpleCycle\nFulls 2\nDiffs 3",
    "HanoiCycle": "CycleType HanoiCycle\nDiscs 3",
}
SETTINGS = [
    Setting(cycle, gpg, safe, temp)
    for cycle in CYCLES for gpg in (False, True) for safe in (False, True)
    for temp in (False, True)
]

# (upload's id, what is missing, its chunks' ETags, when it was made) of an archive.
Seen = tuple[str, str, tuple[str, ...], float]


class Violation(AssertionError):
    """Something that must hold does not."""


class World:
    """A machine, its bucket, and all that is known of what was backed up."""

    def __init__(
        self, folder: Path, server: FaultyS3, gpg: GpgHome, setting: Setting, seed: str
    ) -> None:
        self.folder, self.server, self.gpg, self.setting = folder, server, gpg, setting
        self.seed, self.chance = seed, random.Random(f"{seed} {setting}")
        self.tree, self.small, self.repo = (folder / n for n in ("tree", "small", "repo"))
        self.count: Counter[str] = Counter()  # of runs, by what disturbed them
        self.done = False  # whether tonight's backups are there
        self.injected: Counter[str] = Counter()
        self.said = ""
        self._trail: list[str] = []
        self._requests = 30  # of an undisturbed run, as far as we know
        self._truth: dict[str, dict[str, bytes]] = {}  # of tonight: source → its files
        self._proved: dict[tuple[str, str], dict[str, bytes]] = {}  # (archive, id) → its content
        self._home: dict[str, str] = {}  # source → the archive that DiffDir tells of
        self._lost: set[str] = set()  # sources whose own was rewritten, and is lost
        self._undone: list[list[str]] = []
        self._prepare()

    def _prepare(self) -> None:
        for name in ("tree", "small", "diffs", "temp"):
            (self.folder / name).mkdir()
        for name, size in (("diffs", "256k"), ("temp", "1m")):
            words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
            subprocess.run([*words, self.folder / name], check=True)
            self._undone.append(["umount", "-l", str(self.folder / name)])
        for tool in TOOLS:
            for how, script in DYING.items():
                place = self.folder / "bin" / f"{tool} {how}" / tool
                place.parent.mkdir(parents=True)
                # Of gpg's calls only the one in a pipe.
                calm = '[ -p /dev/stdin ] || exec "$REAL" "$@"' if tool == "gpg" else ""
                place.write_text(f"#!/bin/bash\nREAL={shutil.which(tool)}\n{calm}\n{script}\n")
                place.chmod(0o755)
        subprocess.run(["svnadmin", "create", self.repo], check=True)
        self.keyfile = self.server.write_keyfile(self.folder / "key.txt")
        self.conf = self.folder / "my.conf"
        temp = f"UseTempFile {int(self.setting.temp)}\n{CYCLES[self.setting.cycle]}"
        lines = [
            f"DiffDir {self.folder}/diffs", f"TempDir {self.folder}/temp", f"Bucket {BUCKET}",
            f"S3Keyfile {self.keyfile}", f"S3Endpoint {self.server.endpoint}", "ChunkSize 2000",
            "RetryHours 0.001", "Parallel 2",
            "SafeReplace On" if self.setting.safe else "",
            f"GpgRecipient {self.gpg.recipient}" if self.setting.gpg else "",
            f"<Directory {self.tree}>\n{temp}\n</Directory>",
            f"<Directory {self.small}>\n{temp}\n</Directory>",
            f"<Subversion {self.repo}>\n{temp}\n</Subversion>",
        ]
        self.conf.write_text("\n".join([*lines, ""]))
        self._forker = Forker(
            self.folder, {**os.environ, "PYTHONPATH": str(Path(s3napback.__file__).parent)},
            script=forker.__file__, hasty=True,
        )

    def close(self) -> None:
        """Ends what was started and unmounts what was mounted."""
        self._forker.close()
        for words in self._undone:
            subprocess.run(words, check=False)

    # ---- a night ----

    def live(self, night: datetime) -> None:
        """What changes in a day."""
        self.night, self.done = night, False
        chance = self.chance
        files = [path for path in self.tree.rglob("*") if path.is_file()]
        for path in chance.sample(files, max(0, len(files) - 4)):
            path.unlink()
        for n in range(2):
            path = self.tree / f"dir{chance.randrange(3)}" / f"file {night:%d} {n}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(chance.randbytes(chance.randrange(200, 4000)))
        (self.small / "note").write_text(f"{night} {chance.random()}")
        if night.day % 3:
            revision = int(self._shell("svnlook", "youngest", str(self.repo)))
            with tempfile.NamedTemporaryFile() as file:
                file.write(chance.randbytes(2500))
                file.flush()
                self._shell(
                    "svnmucc", "--non-interactive", "-U", self.repo.as_uri(), "-m", "commit",
                    "--", "put", file.name, f"file{revision}",
                )
        self.revision = int(self._shell("svnlook", "youngest", str(self.repo)))
        self._truth = {str(place): files_of(place) for place in (self.tree, self.small)}

    def disturbed(self, fault: Fault, *words: str) -> None:
        """A run with a fault, and the look at what it left."""
        before = self.seen()
        self.night += timedelta(minutes=1)
        self._hit = 0
        status = self._run(fault, *words)
        self._check(fault, before, status)
        hit = {
            "kill": status in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM),
            "request": self._hit, "requests": self._hit, "stage": status == 1,
        }.get(fault.kind, True)
        self.count[fault.kind if hit else "without effect"] += 1
        self.done = status in (0, 3)

    def undisturbed(self) -> None:
        """A run without a fault: afterwards all is well."""
        before = self.seen()
        self.night += timedelta(minutes=1)
        fault = Fault("none")
        status = self._run(fault)
        self._check(fault, before, status)
        told = "everything is stored in it" in self.said
        self._require(status == 0 or (status == 3 and told), f"ends with {status}")
        left = [p.name for p in (self.folder / "diffs").iterdir() if p.name.endswith(".draft")]
        self._require(not left, f"drafts are left: {left}")
        own = self._own()  # other slots are left alone till their next turn
        staged = [
            item.key for item in Shelf(self.server).iter_objects()
            if s3napback.is_staged(item.key) and item.key.partition(":")[0] in own
        ]
        self._require(not staged, f"staged chunks are left: {staged}")
        found = self._found()
        for source, truth in self._truth.items():
            latest = max(self._of(found, source), key=lambda one: one.made)
            content = self._restored(found, latest)
            self._require(content == truth, f"{latest} does not restore to tonight's data")
        of_repo = self._of(found, str(self.repo))
        ends = [int(one.after) for one in of_repo if not one.fault]
        self._require(max(ends) == self.revision, "the last revision is not in the bucket")

    def proved_again(self) -> int:
        """Restores every moment that can be restored, the directories and the repository; how many.
        """
        found = self._found()
        moments = 0
        for source in (str(self.tree), str(self.small)):
            for one in self._of(found, source):
                if one.made in s3napback.History(self._of(found, source)).restorable():
                    proved = self._proved[str(one), self._upload(one)]
                    self._require(self._restored(found, one) == proved, f"{one} changed")
                    moments += 1
        back = self.folder / "back-repo"
        words = ["restore", "-c", str(self.conf), str(self.repo), "--to", str(back)]
        env = {"GNUPGHOME": str(self.gpg.home), "PATH": os.environ["PATH"], "HOME": "/root"}
        self.server.calm(self.night)
        done = subprocess.run(
            [sys.executable, START, *words], env=env, capture_output=True, text=True
        )
        self._require(done.returncode == 0, f"the repository is not restored: {done.stderr}")
        self._require(
            int(self._shell("svnlook", "youngest", str(back))) == self.revision,
            "the repository lacks revisions",
        )
        return moments + 1

    # ---- a run ----

    def _run(self, fault: Fault, *words: str) -> int:
        env = {
            "PATH": os.environ["PATH"], "HOME": "/root", "TZ": "UTC",
            "GNUPGHOME": str(self.gpg.home), "NO_PROXY": "127.0.0.1",
        }
        said = self.folder / "said"
        said.write_text("")
        self.server.calm(self.night)
        pids: list[int] = []
        self._disturb(fault, env, pids)
        with self._scarce(fault):
            argv = ["-c", str(self.conf), *words]
            pids.append(self._forker.start(argv, self.night, said, said, env))
            if fault.kind == "kill" and fault.what.endswith("instant"):
                time.sleep(fault.at / 1000)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[0], signal.Signals[fault.what.split()[0]])
            status = self._forker.wait()
            deadline = time.monotonic() + 60
            while (left := processes_of(pids[0])) and time.monotonic() < deadline:
                time.sleep(0.01)
        self.server.wait_idle()
        self.said = said.read_text()
        self._hit = self.server.injected.total()
        self.injected += self.server.injected
        self._trail.append(f"{self.night:%d %H:%M} {fault} {' '.join(words)} -> {status}")
        self.server.injected.clear()
        if fault.kind == "none" and not words and "0 stored" not in self.said:
            self._requests = self.server.count
        self.server.calm(self.night)
        self._require(not left, f"processes are left: {left}", fault)
        return status

    def _disturb(self, fault: Fault, env: dict[str, str], pids: list[int]) -> None:
        if fault.kind == "kill" and not fault.what.endswith("instant"):
            name, when = fault.what.split()

            def hook(number: int, now: str) -> None:
                if (number, now) == (fault.at, when):
                    os.kill(pids[0], signal.Signals[name])
                    deadline = time.monotonic() + 60
                    while name == "SIGKILL" and processes_of(pids[0], alone=True):
                        assert time.monotonic() < deadline
                        time.sleep(0.002)
                    if name == "SIGKILL" and when == "before":
                        raise ConnectionAbortedError("it never came")

            self.server.hook = hook
        elif fault.kind == "request":
            numbers = iter(range(1, 1 << 30))
            self.server.choose = lambda *_: fault.what if next(numbers) == fault.at else None
        elif fault.kind == "requests":
            chance = random.Random(self.chance.random())
            self.server.choose = lambda *_: (
                chance.choice(PASSING) if chance.random() < fault.rate else None
            )
        elif fault.kind == "stage":
            env["PATH"] = f"{self.folder}/bin/{fault.what}:{env['PATH']}"

    @contextlib.contextmanager
    def _scarce(self, fault: Fault) -> Iterator[None]:
        """No room, or no writing, where the fault says so."""
        ballast = self.folder / fault.what / "ballast" if fault.kind == "room" else None
        if ballast:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(ballast, max(0, ballast.stat().st_size - 4096 * fault.at))
        if fault.kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.folder / "diffs"], check=True)
        try:
            yield
        finally:
            if ballast:
                ballast.unlink()
            if fault.kind == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", self.folder / "diffs"], check=True)

    # ---- what must hold ----

    def _check(self, fault: Fault, before: dict[str, Seen], status: int) -> None:
        def require(holds: bool, what: str) -> None:
            self._require(holds, what, fault)

        after = self.seen()
        found = self._found()
        own = self._own()
        for name, (upload, torn, etags, _) in before.items():
            whole = name in after and not after[name][1]
            if torn:
                continue
            if name not in own:
                require(whole and after[name][::2] == (upload, etags), f"{name} was touched")
            elif self.setting.safe or name.startswith(f"{self.small}-") or (
                fault.kind == "stage" and fault.what.endswith("at once")
            ):
                require(whole, f"{name} is lost: {after.get(name, 'gone')}")
        self._check_contents(found, require)
        self._check_state(found, own, require)
        self._check_status(fault, status, found, require)
        require(not list((self.folder / "temp").iterdir()), "temp files are left")
        require("Traceback" not in self.said, "it shows a traceback")

    def _own(self) -> set[str]:
        """The archives that the last run was to make."""
        return set(re.findall(rf" -> {re.escape(BUCKET)}:(.+)$", self.said, re.MULTILINE))

    def _check_contents(
        self, found: list[CatalogEntry], require: Callable[[bool, str], None]
    ) -> None:
        """Whatever calls itself complete was made of what there was."""
        for one in found:
            if one.fault or (str(one), self._upload(one)) in self._proved:
                continue
            if one.name == str(self.repo):
                content = {"dump": self._content(str(one))}
                numbers = re.findall(rb"^Revision-number: (\d+)$", content["dump"], re.MULTILINE)
                first, last = int(one.before), int(one.after)
                require([int(n) for n in numbers] == list(range(first, last + 1)),
                        f"{one} holds other revisions than it says")
            else:
                content = self._restored(found, one)
                require(content == self._truth[one.name], f"{one} is called complete,"
                        " and restores to something else")
                listed = self._indexed(found, one)
                require(listed in (None, {name: len(data) for name, data in content.items()}),
                        f"the index of {one}, or of what it continues, tells something else")
            self._proved[str(one), self._upload(one)] = content

    def _check_state(
        self, found: list[CatalogEntry], own: set[str], require: Callable[[bool, str], None]
    ) -> None:
        """DiffDir tells of archives that are there, unless their own slot was being rewritten."""
        for source in (self.tree, self.small, self.repo):
            path = self.folder / "diffs" / s3napback.diff_file_name(str(source))
            if not path.exists():
                continue
            content = path.read_bytes()
            state = content.decode().strip() if source == self.repo else (
                hashlib.sha256(content).hexdigest()
            )
            of_source = self._of(found, str(source))
            there = any(one.after == state and not one.fault for one in of_source)
            if there:
                self._home[str(source)] = next(
                    str(one) for one in of_source if one.after == state and not one.fault
                )
            require(
                there or self._home.get(str(source)) in own or str(source) in self._lost,
                f"DiffDir tells of a backup of {source} that is not there",
            )
            if there:
                self._lost.discard(str(source))
            else:
                self._lost.add(str(source))

    def _check_status(
        self, fault: Fault, status: int, found: list[CatalogEntry],
        require: Callable[[bool, str], None],
    ) -> None:
        lines = self.said.splitlines()
        wrong = [line for line in lines if " ERROR " in line or " FATAL " in line]
        if status == -signal.SIGKILL:
            require(fault.kind == "kill", "it was killed by someone else")
        elif status == -signal.SIGTERM:  # before the program could begin
            require(fault.kind == "kill" and not lines, "it was ended like one who does not listen")
        elif status == 128 + signal.SIGTERM:
            require(fault.what.startswith("SIGTERM"), "it ended as by SIGTERM")
            require("nded by SIGTERM" in self.said, "nothing is said of the signal")
        elif status in (1, 2):
            require(bool(wrong), f"it ends with {status}, and does not say why")
        else:
            require(status in (0, 3), f"it ends with {status}")
            require(status == 3 or not wrong, f"it ends with 0 in spite of {wrong}")
            for source in (str(self.tree), str(self.small)):
                made = [one.made for one in self._of(found, source) if not one.fault]
                age = self.night.timestamp() - max(made, default=0.0)
                require(age < 12 * 3600, f"it ends with {status}, and {source} is not stored")

    # ---- the bucket as it is ----

    def seen(self) -> dict[str, Seen]:
        shelf: Any = Shelf(self.server)
        return {
            str(one): (
                one.archive.metadata.get("archive", ""), one.fault,
                tuple(item.etag for item in one.archive.chunks), one.made,
            )
            for one in s3napback.catalogue(shelf)
        }

    def _found(self) -> list[CatalogEntry]:
        shelf: Any = Shelf(self.server)
        return list(s3napback.catalogue(shelf))

    def _archive(self, name: str) -> s3napback.Archive:
        shelf: Any = Shelf(self.server)
        objects = s3napback.archive_objects(shelf, name)
        archive = s3napback.resolve_archive(name, objects, shelf.head)
        assert archive
        return archive

    def _upload(self, one: CatalogEntry) -> str:
        return self._archive(str(one)).metadata["archive"]

    @staticmethod
    def _of(found: Sequence[CatalogEntry], source: str) -> list[CatalogEntry]:
        return [one for one in found if one.name == source]

    def _plain(self, name: str) -> contextlib.AbstractContextManager[Iterator[Any]]:
        shelf: Any = Shelf(self.server)
        blocks: Any = iter([b"".join(shelf.get(i.key)[0] for i in self._archive(name).chunks)])
        return s3napback.decoded(
            blocks, {**os.environ, "GNUPGHOME": str(self.gpg.home)}, ("gpg", "--batch", "-q")
        )

    def _content(self, name: str) -> bytes:
        with self._plain(name) as blocks:
            return b"".join(blocks)

    def _restored(self, found: Sequence[CatalogEntry], one: CatalogEntry) -> dict[str, bytes]:
        """The files of a directory as of one of its archives."""
        of_source = self._of(found, one.name)
        try:
            chain = s3napback.choose_chain(of_source, one.made)
        except s3napback.Failure as failure:
            known = "\n".join(map(str, sorted(of_source, key=lambda f: f.made)))
            raise Violation(f"{one}: {failure}\n{known}\n{self.trail()}") from failure
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            with s3napback.Unpacker(
                place, "", (), dict(os.environ), whole=True, kept=()
            ) as unpacker:
                for link in chain.archives:
                    unpacker.add(partial(self._plain, str(link)))
                unpacker.place()
            return files_of(Path(place + one.name))

    def _indexed(
        self, found: Sequence[CatalogEntry], one: CatalogEntry
    ) -> dict[str, int] | None:
        """The files of a directory, and their sizes, as of one of its archives, by the indexes in
        DiffDir; None where one is missing."""
        shelf: Any = Shelf(self.server)
        recovery = s3napback.Recovery(
            shelf, 1, None, {}, (), "", None, (), diff_dir=f"{self.folder}/diffs/",
            place=s3napback.bucket_place(self.server.endpoint, BUCKET),
        )
        chain = s3napback.choose_chain(self._of(found, one.name), one.made)
        if not all(s3napback.index_of(recovery, link) for link in chain.archives):
            return None
        self.count["indexed"] += 1
        listed = s3napback.files_of(recovery, chain)
        return {os.path.relpath(f"/{path}", one.name): 1 if file.is_folder else file.size
                for path, file in listed.items() if f"/{path}" != one.name}

    def trail(self) -> str:
        """How we came here: the last runs, each with its fault and its status."""
        return "\n".join(self._trail[-14:])

    def _shell(self, *words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def _require(self, holds: bool, what: str, fault: Fault | None = None) -> None:
        if not holds:
            raise Violation(
                f"{what}\n[seed {self.seed!r}, {self.setting}, night {self.night:%d %H:%M},"
                f" {fault or 'undisturbed'}]\n{self.trail()}\n{self.said}"
            )


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder: path → content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"/"
        for path in folder.rglob("*")
    }


def processes_of(session: int, *, alone: bool = False) -> list[str]:
    """The processes of a session that have not ended; alone: only its leader."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (not alone or folder.name == str(session)):
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[3] == str(session) and fields[0] not in "ZX":
                    found.append((folder / "comm").read_text().strip())
    return found


def live_a_month(
    world: World, nights: int, kills: int, faults: int, start: datetime
) -> int:
    """So many nights, each with so many kills and faults; how many moments were restored."""
    chance = world.chance
    for n in range(nights):
        world.live(start + timedelta(days=n))
        plans = [random_kill(chance, world._requests) for _ in range(kills)]
        plans += [
            random_fault(chance, world._requests, world.setting.gpg, world.setting.temp)
            for _ in range(faults)
        ]
        chance.shuffle(plans)
        for fault in plans:
            # A night that is done is done again with -f, else nothing would be under way.
            world.disturbed(fault, *(["-f"] if world.done or chance.random() < 0.3 else []))
        world.undisturbed()
    return world.proved_again()
