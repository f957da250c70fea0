"""What the tests stand on: the recordings, and real servers and tools, each of them throwaway.

The sections are Tools, S3 (its server is in tools/s3_server.py), GnuPG, Databases, Subversion, and
a machine that is backed up. Every server is private to the process that runs the tests (so each
xdist worker has its own) and is started when the first test asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import glob
import hashlib
import io
import logging
import os
import pwd
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hypothesis
import pytest
from libraries import calculate_once
from ping_server import Healthchecks

import s3napback
from s3napback import Access, CycleSpec

if TYPE_CHECKING:
    from s3_server import S3Server

GOLDEN = Path(__file__).parent / "golden"
START = str(Path(__file__).parent / "tools" / "start.py")  # the program, for a python

# A slow machine is not a defect of the code under test.
hypothesis.settings.register_profile(
    "s3napback", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("s3napback")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: many tests wait for a program, or for time to pass."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What a test uses says what it needs. The longest come first, so that nobody waits for them
    at the end, each with a shorter one, since xdist gives two at once."""
    for item in items:
        used = {*item.fixturenames, *item.function.__code__.co_names}
        if used & {"mariadb", "postgres", "redis"}:
            item.add_marker("db")
        if used & {"tmpfs", "nobodys", "small_disk", "make_world"}:
            item.add_marker("root")
    longest = "test_month.py", "test_year.py"
    items.sort(key=lambda item: item.name.partition("[")[2] if item.path.name in longest else "~")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the recordings of the original."""
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def calculated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Saves what libraries would calculate anew for each run of the program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        calculate_once(patch.setattr, tmp_path_factory.mktemp("calculated"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_account() -> Iterator[None]:
    """Keeps every test away from the AWS account, and the proxies, of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        yield


# ---------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------

# Debian keeps daemons, and PostgreSQL's own programs, out of the ordinary search path.
TOOL_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/sbin", *glob.glob("/usr/lib/postgresql/*/bin")]
)


def require_tool(name: str) -> str:
    """The path of the program NAME; without it the test is left out."""
    path = shutil.which(name, path=TOOL_PATH)
    if path is None:
        leave_out(f"{name} is not installed")
    return path


def fetched(store: s3napback.Store, key: str) -> tuple[bytes, dict[str, str]]:
    """(data, user metadata) of an object."""
    buffer = s3napback.Buffer(10**7)
    metadata = store.fetch(key, buffer)
    return bytes(buffer), metadata


def downloaded(archive: s3napback.Archive, store: s3napback.Store, parallel: int) -> bytes:
    """An archive's data."""
    return b"".join(map(bytes, s3napback.download(archive, store, parallel)))


def stored(
    store: s3napback.Store, name: str = "a", chunk_size: int | None = None
) -> s3napback.Archive:
    """The archive that the chunks of that name make up."""
    objects = s3napback.archive_objects(store, name)
    archive = s3napback.resolve_archive(name, objects, store.head, chunk_size)
    assert archive
    return archive


def content(store: s3napback.Store, name: str = "a") -> bytes:
    """The data of an archive, which is complete."""
    archive = stored(store, name)
    assert archive.complete, archive.fault
    return downloaded(archive, store, 3)


def send(
    store: s3napback.Store, data: bytes, name: str = "a", size: int = 1000, **options: Any
) -> s3napback.UploadResult:
    """Stores DATA as an archive in chunks of SIZE bytes, in place of what is there. marks: asked
    for what the last chunk is to say, when all others were handed on."""
    source = options.pop("source", None) or io.BytesIO(data)
    check = getattr(source, "check", lambda: None)
    marks = options.pop("marks", dict)
    options = {"parallel": 3, "log": logging.getLogger("test"),
               "old_chunks": s3napback.archive_objects(store, name), **options}
    with s3napback.Upload(store, name, chunk_size=size, **options) as upload:
        for chunk in upload.chunks(source.readinto, check):
            upload.put(chunk)
        return upload.commit(marks())


def entry(
    source: str, slot: int, mode: str, made: float, state: str = "", *,
    kind: str | None = None, fault: str = "", **marks: str,
) -> s3napback.CatalogEntry:
    """An archive of one byte in a catalogue. state: "BEFORE:AFTER", "" of one without marks."""
    if state:
        marks["state"] = state
    name = f"{source}-{slot}-{mode}"
    chunk = s3napback.StoredObject(s3napback.chunk_key(name, 0), 1, "", made)
    archive = s3napback.Archive.of(name, (chunk,), fault, marks)
    return s3napback.CatalogEntry(archive, kind, source, slot, mode)


@pytest.fixture
def store(tmp_path: Path) -> s3napback.Store:
    """A bucket in a folder."""
    (tmp_path / "buckets").mkdir()
    store = s3napback.open_store("b", Access(f"file://{tmp_path}/buckets"), time.time)
    store.create()
    return store


class Memory:
    """A store that remembers in which order it was asked to do what."""

    bucket = "m"

    def __init__(self) -> None:
        self.retries = s3napback.Retries()
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.history: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], None] = lambda verb, key: None

    def put(self, key: str, data: bytes | s3napback.Buffer, metadata: Mapping[str, str]) -> str:
        self.fail("put", key)
        self.objects[key] = bytes(data), dict(metadata)
        self.history.append(("put", key))
        return hashlib.md5(bytes(data)).hexdigest()

    def fetch(self, key: str, into: s3napback.Buffer) -> dict[str, str]:
        data, metadata = self.objects[key]
        into.fill(io.BytesIO(data).readinto)
        return metadata

    def peek(self, key: str, count: int) -> bytes:
        return self.objects[key][0][:count]

    def head(self, key: str) -> dict[str, str] | None:
        return self.objects[key][1]

    def iter_objects(self, prefix: str = "") -> Iterator[s3napback.StoredObject]:
        return iter([
            s3napback.StoredObject(key, len(data), hashlib.md5(data).hexdigest(), 0.0)
            for key, (data, _) in sorted(self.objects.items())
            if key.startswith(prefix)
        ])

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.fail("delete", key)
            self.objects.pop(key, None)
            self.history.append(("delete", key))

    def exists(self) -> bool:
        return True

    def create(self) -> None: ...

    def remove(self) -> None: ...

    def try_to_store(self, key: str) -> None: ...

    def copy(self, source: str, target: str) -> None:
        self.put(target, *self.objects[source])


def inventory(top: Path, *, links: bool = True, unit: int = 1) -> dict[str, tuple[Any, ...]]:
    """Everything at and below a path: mode, owner, time, attributes, content.

    links: also how many names a file has (tar keeps those that are in one archive)
    unit: nanoseconds to which times count, 0: they do not
    """
    found: dict[str, tuple[Any, ...]] = {}
    for path in [top, *sorted(top.rglob("*"))] if top.is_dir() and not top.is_symlink() else [top]:
        if not os.path.lexists(path):
            continue
        info = path.lstat()
        content: Any = info.st_rdev
        attributes = []
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
            attributes = [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
        found[str(path.relative_to(top))] = (
            oct(info.st_mode), info.st_uid, info.st_gid, unit and info.st_mtime_ns // unit,
            info.st_nlink if links and path.is_file() and not path.is_symlink() else 0,
            attributes, content,
        )
    return found


def differences(one: Path | str, other: Path | str) -> str:
    """What `diff` says of the contents of two folders."""
    argv = ["diff", "-r", "--no-dereference", str(one), str(other)]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
    return done.stdout + done.stderr


def files(tar: bytes) -> list[str]:
    done = subprocess.run(["tar", "tz"], input=tar, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def leave_out(reason: str) -> NoReturn:
    """Skips the test, or fails it where S3NAPBACK_TEST_ALL=1 says that nothing may be left out."""
    if os.environ.get("S3NAPBACK_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def tmpfs(place: Path, options: str, kind: str = "tmpfs") -> Iterator[Path]:
    """A small or otherwise limited file system at a folder, which is there already."""
    mount = ["mount", "-t", kind, "-o", options, kind, str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        leave_out(f"mounting a {kind} needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def run(argv: list[str], *, env: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """What ARGV writes to standard output; a failure shows what it wrote to standard error.

    It runs in `/`, since another user may not be allowed into the current folder.
    """
    done = subprocess.run(
        argv,
        input=stdin,
        env={**os.environ, **(env or {})},
        cwd="/",
        text=True,
        errors="surrogateescape",
        capture_output=True,
    )
    assert done.returncode == 0, f"{argv} exited with {done.returncode}: {done.stderr}"
    return done.stdout


STREAMS = "stdin", "stdout", "stderr"


def program(
    *words: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs s3napback as `subprocess.run` would, but in this process: its start takes half a second.

    It reads, writes and looks at the environment as in one of its own.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(time.tzset)  # once the environment is the old one again
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        time.tzset()
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(stdin)
        streams[0].seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, (name, mode) in enumerate(zip(STREAMS, "rww", strict=True)):
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(streams[descriptor].fileno(), descriptor)
            file = stack.enter_context(open(descriptor, mode, closefd=False))
            patch.setattr(sys, name, file)
        status = s3napback.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in streams[1:]:
            stream.seek(0)
        return subprocess.CompletedProcess(words, status, streams[1].read(), streams[2].read())


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Returns when READY says so; a WHAT that takes longer than SECONDS is an error."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} not ready after {seconds} s"
        time.sleep(0.05)


def service_user(name: str) -> str:
    """Whom a database server runs as: NAME for root (who is refused), else the present user."""
    return name if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Callable[[str], Path]]:
    """A maker of private folders owned by USER, below /tmp whatever TMPDIR says: the path of a
    socket has at most 107 bytes (unix(7)), and pytest's own folders can be longer."""
    made: list[Path] = []

    def make(user: str = "") -> Path:
        folder = Path(tempfile.mkdtemp(prefix="s3nb-", dir="/tmp"))
        made.append(folder)
        if user and os.geteuid() == 0:
            shutil.chown(folder, user)
        return folder

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)  # an agent may be removing its socket just now


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3Server]:
    """The S3 server itself, for fixtures that fill it once for many tests."""
    from s3_server import S3Server  # with moto, which takes seconds and not every test needs

    server = S3Server()
    server.client().list_buckets()  # has moto loaded
    gc.freeze()  # the program collects garbage before each retry: none of moto, which is large
    yield server
    server.stop()


@pytest.fixture
def s3_server(s3_session: S3Server) -> S3Server:
    """The S3 server, empty and free of faults."""
    s3_session.reset()
    return s3_session


# ---------------------------------------------------------------------------------------------
# Those who watch
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Healthchecks]:
    """A server that plays healthchecks, for a program that soon loses patience with it."""
    monkeypatch.setattr(s3napback, "_PING_PAUSES", (0.0, 0.02, 0.05))
    monkeypatch.setattr(s3napback, "_WATCH_TIMEOUT", 5.0)
    with Healthchecks.running() as server:
        yield server


# ---------------------------------------------------------------------------------------------
# GnuPG
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class GpgHome:
    """A throwaway GNUPGHOME with a secret key without passphrase for `recipient`."""

    home: Path
    recipient: str = "backup@example.com"

    @property
    def env(self) -> dict[str, str]:
        return {"GNUPGHOME": str(self.home)}

    def run(self, *argv: str, stdin: str = "") -> str:
        """What `gpg --batch ARGV…` prints, working in this home."""
        return run([require_tool("gpg"), "--batch", "-q", *argv], env=self.env, stdin=stdin)

    def import_golden(self) -> None:
        """Adds the secret key of the recorded archives, trusted."""
        self.run("--import", str(GOLDEN / "perl-archives" / "gpg-secret-key.asc"))
        listing = self.run("--list-secret-keys", "--with-colons").splitlines()
        prints = [line.split(":")[9] for line in listing if line.startswith("fpr:")]
        self.run("--import-ownertrust", stdin="".join(f"{p}:6:\n" for p in prints))


@pytest.fixture(scope="session")
def gpg_home(short_folder: Callable[[str], Path]) -> Iterator[GpgHome]:
    """Where gpg finds the key of `Backup <backup@example.com>`, ultimately trusted."""
    gpgconf = require_tool("gpgconf")
    gpg = GpgHome(short_folder(""))
    # "future-default" is an elliptic curve: made at once, where RSA takes seconds.
    user_id = f"Backup <{gpg.recipient}>"
    gpg.run("--passphrase", "", "--quick-generate-key", user_id, "future-default", "default", "0")
    yield gpg
    run([gpgconf, "--homedir", str(gpg.home), "--kill", "all"])


# ---------------------------------------------------------------------------------------------
# Databases
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MariaDb:
    """A private MariaDB, reached by its socket only; the present user may do all of it, without
    a password."""

    socket: Path

    def run(self, sql: str) -> str:
        """The rows that SQL yields: values between tabs, a row a line."""
        client = [require_tool("mariadb"), "--no-defaults", f"--socket={self.socket}"]
        return run([*client, "--user=root", "--batch", "--skip-column-names"], stdin=sql)


@pytest.fixture(scope="session")
def mariadb(short_folder: Callable[[str], Path]) -> Iterator[MariaDb]:
    """A real MariaDB server."""
    user = service_user("mysql")
    folder = short_folder(user)
    folder.chmod(0o755)  # clients of other users reach the socket
    common = ["--no-defaults", f"--user={user}", f"--datadir={folder}/data"]
    install = [require_tool("mariadb-install-db"), *common, "--skip-test-db"]
    # A server clears up its temporary folder when it starts: another's tables, too.
    temp = folder / "tmp"
    temp.mkdir()
    shutil.chown(temp, user)
    run([*install, "--auth-root-authentication-method=normal"], env={"TMPDIR": str(temp)})
    socket_path = folder / "my.sock"
    daemon = subprocess.Popen(
        [
            require_tool("mariadbd"),
            *common,
            f"--socket={socket_path}",
            f"--pid-file={folder}/pid",
            f"--log-error={folder}/log",
            "--skip-networking",
            "--innodb-buffer-pool-size=16M",
            "--innodb-flush-log-at-trx-commit=0",
        ],
        env={**os.environ, "TMPDIR": str(temp)},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: socket_path.exists() or daemon.poll() is not None, "mariadbd")
        assert daemon.poll() is None, (folder / "log").read_text()
        server = MariaDb(socket_path)
        if os.geteuid() != 0:  # the name that clients take by default
            server.run(f"CREATE USER `{user}`@localhost; GRANT ALL ON *.* TO `{user}`@localhost")
        yield server
    finally:
        daemon.kill()  # its data are thrown away: nothing to shut down in good order
        daemon.wait()


@dataclasses.dataclass
class Postgres:
    """A private PostgreSQL, reached by its socket only, which trusts everybody."""

    socket_dir: Path
    user: str

    @property
    def env(self) -> dict[str, str]:
        return {"PGHOST": str(self.socket_dir), "PGUSER": self.user}

    def run(self, db: str, sql: str) -> str:
        """The rows that SQL yields in the database DB: values between `|`, a row a line."""
        psql = [require_tool("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        return run([*psql, "-d", db], env=self.env, stdin=sql)


@pytest.fixture(scope="session")
def postgres(short_folder: Callable[[str], Path]) -> Iterator[Postgres]:
    """A real PostgreSQL server; its first database is `postgres`."""
    user = service_user("postgres")
    folder = short_folder(user)
    folder.chmod(0o755)  # clients of other users reach the socket
    prefix = [require_tool("runuser"), "-u", user, "--"] if os.geteuid() == 0 else []
    initdb = [require_tool("initdb"), "--no-sync", "-E", "UTF8", "--locale=C", "-A", "trust"]
    run([*prefix, *initdb, "-U", "postgres", "-D", f"{folder}/data"])
    pg_ctl = [*prefix, require_tool("pg_ctl"), "-D", f"{folder}/data", "-s", "-w"]
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run([*pg_ctl, "-l", f"{folder}/log", "-o", options, "start"])
    yield Postgres(folder, "postgres")
    run([*pg_ctl, "-m", "immediate", "stop"])


@dataclasses.dataclass
class Redis:
    """A private Redis, reached by its socket only."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    def run(self, *words: str) -> str:
        return run([require_tool("redis-cli"), "-s", str(self.socket), *words])

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[Redis]:
        """A server within the block, with what is in dump.rdb of the folder."""
        server = cls(folder)
        # It copies itself without a pause, and never to its folder.
        options = ["--port", "0", "--repl-diskless-sync-delay", "0", "--save", ""]
        daemon = subprocess.Popen(
            [require_tool("redis-server"), *options, "--dir", str(folder),
             "--unixsocket", str(server.socket)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: server.socket.exists() or daemon.poll() is not None, "redis-server")
            yield server
        finally:
            daemon.kill()
            daemon.wait()


@pytest.fixture
def redis(short_folder: Callable[[str], Path]) -> Iterator[Redis]:
    """A real Redis server without keys."""
    with Redis.started(short_folder("")) as server:
        yield server


# ---------------------------------------------------------------------------------------------
# Subversion
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def svn_repo_factory() -> Callable[[Path, int], Path]:
    """A maker of repositories: `make(path, revisions)` creates the repository PATH where there is
    none, and commits so many revisions more; revision N adds the file `fileN` with `revision N`
    in it. It returns PATH."""

    def make(path: Path, revisions: int = 1) -> Path:
        if not (path / "format").exists():
            run([require_tool("svnadmin"), "create", str(path)])
        first = int(run([require_tool("svnlook"), "youngest", str(path)])) + 1
        svnmucc = [require_tool("svnmucc"), "--non-interactive", "-U", path.as_uri()]
        for n in range(first, first + revisions):
            put = ["-m", f"commit {n}", "--", "put", "-", f"file{n}"]
            run([*svnmucc, *put], stdin=f"revision {n}\n")
        return path

    return make


# ---------------------------------------------------------------------------------------------
# A machine that is backed up
# ---------------------------------------------------------------------------------------------

Capture = pytest.CaptureFixture[str]
ESC = "\x1b]0;owned\x07"  # what a name must not send to a terminal
NOWHERE = Access("http://127.0.0.1:1", "us-east-1", "key", "secret")
NIGHT = datetime(2026, 11, 23, 3, 0)  # yday 326: with Diffs 6 a FULL is due on the 21st


class Site:
    """A machine with a config, a DiffDir, a TempDir and a bucket in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "my.conf"
        self.data = folder / "data"
        for name in ("diffs", "temp", "buckets", "data"):
            (folder / name).mkdir()
        (self.data / "file").write_text("one")
        self.settings = {
            "DiffDir": f"{folder}/diffs", "TempDir": f"{folder}/temp", "Bucket": "bkt",
            "ChunkSize": "1000", "S3Endpoint": f"file://{folder}/buckets", "RetryHours": "0",
        }
        self.jobs = f"Directory {self.data}"

    def write(self) -> Path:
        lines = [f"{name} {value}" for name, value in self.settings.items() if value]
        self.conf.write_text("\n".join([*lines, self.jobs, ""]))
        return self.conf

    def run(self, *words: str, now: datetime = NIGHT) -> int:
        return s3napback.main([*words, "-c", str(self.write())], now=now)

    def restore(self, place: Path | str, *words: str, name: Path | str = "") -> int:
        """Restores the data, or NAME, to PLACE. Returns the exit status."""
        source = str(name or self.data)
        return s3napback.main(["restore", "-c", str(self.write()), source, "--to", str(place),
                               *words])

    def restored(self, *words: str, name: Path | str = "", after: datetime | None = None) -> Path:
        """Where the data, or those of NAME, are once restored, as of the night AFTER."""
        place = self.folder / f"back{len(list(self.folder.glob('back*')))}"
        if after:
            words = *words, "--at", (after + timedelta(minutes=1)).isoformat(" ")
        assert self.restore(place, *words, name=name) == 0
        return Path(f"{place}{name or self.data}")

    @property
    def bucket(self) -> list[str]:
        """Words that name the bucket, for a command that is given no config."""
        return ["-b", "bkt", "--endpoint", self.settings["S3Endpoint"]]

    def store(self) -> s3napback.Store:
        endpoint = self.settings["S3Endpoint"]
        key = secret = None
        if self.settings.get("S3Keyfile"):
            key, secret = s3napback.read_key_file(self.settings["S3Keyfile"])
        return s3napback.open_store("bkt", Access(endpoint, "us-east-1", key, secret), time.time)

    def archives(self) -> dict[str, s3napback.Archive]:
        store = self.store()
        if not store.exists():
            return {}
        names = {s3napback.parse_chunk_key(i.key)[0] for i in store.iter_objects()}  # type: ignore[index]
        found = {}
        for name in names:
            objects = s3napback.archive_objects(store, name)
            archive = s3napback.resolve_archive(name, objects, store.head)
            assert archive
            found[name] = archive
        return found

    def content(self, name: str) -> bytes:
        archive = self.archives()[name]
        assert archive.complete, archive.fault
        return downloaded(archive, self.store(), 2)

    def diff_files(self) -> list[Path]:
        return [p for p in (self.folder / "diffs").iterdir() if not p.name.startswith(".")]

    def state(self) -> dict[str, bytes]:
        """Everything that a run may have changed."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for top in ("diffs", "temp", "buckets")
            for path in sorted((self.folder / top).rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    # The stock logconfig writes to /var/log; here the screen is enough.
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    return Site(tmp_path)


def stage(site: Site, name: str) -> s3napback.Archive:
    """Puts an archive back to where it waits before it takes its place."""
    store = site.store()
    archive = site.archives()[name]
    for number, item in enumerate(archive.chunks):
        store.copy(item.key, s3napback.staged_key(name, number))
    return archive


def stage_only(site: Site) -> str:
    """Leaves the site's one archive only where it waits; its name."""
    ((name, _),) = site.archives().items()
    archive = stage(site, name)
    site.store().delete([item.key for item in archive.chunks])
    return name


def nights(site: Site, count: int) -> datetime:
    """A FULL and DIFFs of the nights before; the night after them."""
    start = datetime(2026, 11, 20, 3, 0, tzinfo=timezone.utc)  # slot 15: with -f any mode will do
    site.settings["Phase"] = ""
    for n in range(count):
        (site.data / f"night{n}").write_text(str(n))
        assert site.run(now=start + timedelta(days=n)) == 0
    return start + timedelta(days=count)


def newest(site: Site) -> s3napback.Archive:
    ours = [archive for archive in site.archives().values() if archive.metadata]
    return max(ours, key=lambda archive: archive.modified)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it is installed, to be copied: compiled, without a logconfig, which would
    write to /var/log, and with `run`, which starts it."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copy2(s3napback.__file__, folder)
    (folder / "run").write_text("import s3napback\n\ns3napback.run_as_script()\n")
    py_compile.compile(str(folder / "s3napback.py"))
    return folder


NOBODY = 65534


def run_as_nobody(
    site: Site, *words: str, now: datetime = NIGHT, locale: str = "C.UTF-8", change: str = ""
) -> subprocess.CompletedProcess[str]:
    """A run of a site by an ordinary user, to whom all but what a test takes from him belongs.

    change: a statement of Python that changes the module before
    """
    code = (f"import s3napback, sys; {change}\n"
            "sys.exit(s3napback.main(sys.argv[2:], now=float(sys.argv[1])))")
    done = subprocess.run(
        [*_as_nobody(), "-c", code, str(now.timestamp()), *words, "-c", str(site.write())],
        capture_output=True, text=True, errors="replace", cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": "/", "LC_ALL": locale, "PYTHONUTF8": "1",
             "PYTHONPATH": str(site.folder)},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def _as_nobody() -> list[str]:
    who = f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"
    return [require_tool("setpriv"), *who, sys.executable]


@functools.cache
def _is_for_everybody() -> bool:
    trial = [*_as_nobody(), "-c", "import boto3"]
    return not subprocess.run(trial, cwd="/", capture_output=True).returncode


@pytest.fixture
def nobodys(site: Site, short_folder: Callable[[str], Path], compiled: Path) -> Site:
    """A site of an ordinary user, outside pytest's folders, which are root's alone."""
    if os.geteuid():
        leave_out("to be another user needs root")
    if not _is_for_everybody():
        leave_out("this Python is not for every user")
    folder = short_folder("")
    folder.chmod(0o755)
    shutil.copytree(compiled, folder, dirs_exist_ok=True)
    other = Site(folder)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    return other


@pytest.fixture
def s3_site(site: Site, s3_server: Any, tmp_path: Path) -> Site:
    site.settings["S3Endpoint"] = s3_server.endpoint
    site.settings["S3Keyfile"] = str(s3_server.write_keyfile(tmp_path / "key.txt"))
    return site


def cycle_of(timing: Mapping[str, str]) -> CycleSpec:
    """The rotation by directives as they stand in a config."""
    rows = [(name, row) for name, row in s3napback.TIMING.items() if name in timing]
    return CycleSpec(**{row.name: row.metadata["read"](timing[name]) for name, row in rows})


def fake_tool(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A tool that fails as the script says, found before the real one."""
    folder = site.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\nREAL={shutil.which(name)}\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def bad_compressor(folder: Path, script: str) -> str:
    """A Compressor that passes the trial at the start of a run, and then does what SCRIPT says
    with all but the first bytes."""
    path = folder / "bad-compressor"
    start = 'IFS= read -rn 9 start; [ "$start" = s3napback ] && { printf %s "$start"; exec cat; }'
    path.write_text(f"#!/bin/bash\n{start}\n{script}\n")
    path.chmod(0o755)
    return str(path)
