"""A benchmark, run by hand: s3napback.py beside other programs that do the same work.

    python tests/tools/bench.py [--rounds N] [--size BYTES] [--only NAME,NAME] [--json FILE]
                                [--port FILE]

--size is that of the big input, 10^9 bytes if not given; the others shrink and grow with it.
--only takes names of works (the keys of WORKS). --port is another copy of the module, measured
beside this one in the works `upload`, `tls`, `download`, `fixed` and `life`. Its folders are in
/dev/shm where there is one: on a disk the making of many files is what would be measured. Programs
that are not on PATH are named as absent. The service is tests/tools/sink.py, on this machine: what
it uses up of the processors is missing to the programs, to each the same. Rounds are interleaved
(A B C A B C ...), what is printed are medians.

wall: seconds from the start of the program to its end. CPU: seconds of user and system time of
the program and of all its children. peak: of the memory in use, the sum over the program and its
children, looked at every 20 ms; pages that several share count for each. Standard input comes
through a pipe from a program that is in none of these. Transfers have 4 connections and pieces of
25 MB with every program, so that what differs is the program.

Sections: Measuring, The service, Inputs, Programs, Tables, Works, Command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MB = 10**6
CONNECTIONS = 4  # the port's default for Parallel
PIECE = 25 * MB  # bytes; the ChunkSize of example.conf
PIECE_MIB = 24  # the same for programs that count in MiB
SAMPLING = 0.02  # seconds
KEY, SECRET = "AKIDBENCH", "bench-secret"
RECIPIENT = "bench@example.com"

# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One program at one work.

    feeder: the command whose output is its standard input; statuses: those of success; prepare:
    called before each run, outside the measured time; fault: told the service's counters after
    the run, says what is wrong with them or "".
    """

    name: str
    argv: Sequence[str]
    feeder: Sequence[str] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    statuses: Sequence[int] = (0,)
    prepare: Callable[[], None] = lambda: None
    fault: Callable[[Mapping[str, Any]], str] = lambda stats: ""


@dataclass
class Result:
    """What one run took. wall, cpu: seconds; peak, received, sent: bytes."""

    work: str
    name: str
    round: int
    wall: float
    cpu: float
    peak: int
    requests: dict[str, int]
    received: int
    sent: int
    service_cpu: float
    fault: str
    said: str


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants that live now."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from family(int(child))


def memory(pid: int) -> int:
    """Bytes of memory in use by a process and its descendants."""
    pages = 0
    for member in family(pid):
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


class Peak:
    """Watches the memory of a process and its descendants while the block runs."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory(self._pid))
            if self._done.wait(SAMPLING):
                return

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(work: str, number: int, case: Case, env: Mapping[str, str], sink: Sink | None,
            ) -> Result:
    """Runs a case once. number: which round it is."""
    case.prepare()
    if sink:
        sink.call("/__reset")
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        feeder = None
        if case.feeder:
            feeder = stack.enter_context(subprocess.Popen(case.feeder, stdout=subprocess.PIPE))
        start = time.monotonic()
        process = subprocess.Popen(
            case.argv, env={**env, **case.env}, stderr=errors, stdout=subprocess.DEVNULL,
            stdin=feeder.stdout if feeder else subprocess.DEVNULL,
        )
        if feeder and feeder.stdout:
            feeder.stdout.close()  # so that it ends when the program does
        with Peak(process.pid) as peak:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    stats: Mapping[str, Any] = sink.call("/__stats") if sink else {}
    fault = case.fault(stats)
    if process.returncode not in case.statuses:
        fault = f"status {process.returncode}: {said[-300:]}"
    return Result(
        work, case.name, number, wall, usage.ru_utime + usage.ru_stime, peak.bytes,
        stats.get("requests", {}), stats.get("received", 0), stats.get("sent", 0),
        stats.get("processor", 0.0), fault, said[-2000:],
    )


# --------------------------------------------------------------------------------------------------
# The service
# --------------------------------------------------------------------------------------------------


class Sink:
    """A running tests/tools/sink.py. ca: the certificate that checks it, None for http."""

    def __init__(self, url: str, ca: Path | None) -> None:
        self.url, self.ca = url, ca
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if ca:
            context = ssl.create_default_context(cafile=str(ca))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, path: str, method: str = "GET", data: Any = None, size: int = 0) -> Any:
        """The answer to a request, from its JSON. data: bytes or a file of `size` bytes."""
        headers = {"Content-Length": str(size)} if size else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with self._opener.open(request) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def empty(self) -> None:
        """Leaves nothing but the bucket `bench`, without an object."""
        self.call("/__reset?objects")
        self.call("/bench", "PUT")

    def env(self) -> dict[str, str]:
        """What the programs need to find it."""
        found = {"S3_ENDPOINT_URL": self.url, "RCLONE_S3_ENDPOINT": self.url,
                 "BENCH_ENDPOINT": self.url}
        if self.ca:
            found.update({"AWS_CA_BUNDLE": str(self.ca), "RCLONE_CA_CERT": str(self.ca)})
        return found


@contextlib.contextmanager
def running_sink(folder: Path, *options: str, tls: bool = False) -> Iterator[Sink]:
    """A service of its own, with an empty bucket `bench`."""
    argv = [sys.executable, str(HERE / "sink.py"), *options]
    argv += ["--tls-dir", str(folder)] if tls else []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                raise SystemExit("bench: tests/tools/sink.py did not start")
            sink = Sink(url, folder / "cert.pem" if tls else None)
            sink.empty()
            yield sink
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


def make_random(path: Path, size: int) -> None:
    """A file that nothing compresses."""
    with open(path, "wb") as file:
        for start in range(0, size, PIECE):
            file.write(os.urandom(min(PIECE, size - start)))


def source_text(draw: random.Random, size: int) -> bytes:
    """`size` bytes that look, and compress (about 4:1), like source code."""
    letters = "etaoinshrdlucmfwygpbvk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 11))) for _ in range(6000)]
    words += ["_".join(draw.choices(words, k=2)) for _ in range(6000)]
    ends = [" ", " ", " ", "(", ") ", ", ", " = ", ";\n", ";\n    ", " {\n        ", "\n}\n\n"]
    tokens = [word + draw.choice(ends) for word in words for _ in range(3)]
    draw.shuffle(tokens)
    # Words of a text come about as often as 1 / their rank (Zipf's law).
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(tokens))))
    text = bytearray()
    while len(text) < size:
        text += "".join(draw.choices(tokens, cum_weights=weights, k=100_000)).encode()
    return bytes(text[:size])


def make_tree(folder: Path, files: int, size: int) -> None:
    """The same tree every time: folders of about 25 files, ten at the top, `size` bytes in all."""
    draw = random.Random(655)
    # A pool that is larger than the windows of the compressors, so that they find no file twice.
    pool = source_text(draw, min(size, 64 * MB) + MB)
    shares = [draw.lognormvariate(0, 1.2) for _ in range(files)]  # many small files, few big ones
    scale = size / sum(shares)
    place = folder
    for number, share in enumerate(shares):
        if number % 25 == 0:
            top, middle, low = number // 25 % 10, number // 250 % 20, number // 5000
            place = folder / f"part{top}" / f"module{middle:02}" / f"unit{low:02}"
            place.mkdir(parents=True, exist_ok=True)
        length = min(int(share * scale), MB)
        start = draw.randrange(len(pool) - length)
        (place / f"file{number:05}.c").write_bytes(pool[start : start + length])


# --------------------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------------------

# boto3's own ways of doing what the port does; the configuration is that of all others.
_BOTO3 = f"""
import os, sys, boto3
from boto3.s3.transfer import TransferConfig
client = boto3.client("s3", endpoint_url=os.environ["BENCH_ENDPOINT"])
config = TransferConfig(multipart_threshold={PIECE}, multipart_chunksize={PIECE},
                        max_concurrency={CONNECTIONS})
"""
_BOTO3_PUT = """
import os, sys, boto3
client = boto3.client("s3", endpoint_url=os.environ["BENCH_ENDPOINT"])
client.put_object(Bucket="bench", Key="archive", Body=sys.stdin.buffer.read())
"""

_AWS_CONFIG = f"""[default]
s3 =
    max_concurrent_requests = {CONNECTIONS}
    multipart_chunksize = {PIECE}
    multipart_threshold = {PIECE}
    addressing_style = path
"""


class Bench:
    """What all works share: the inputs, the port, the environment, and what was measured."""

    def __init__(self, folder: Path, other: Path | None, size: int, rounds: int) -> None:
        self.folder, self.size, self.rounds = folder, size, rounds
        # Copies: without a log configuration beside it, the log goes to the screen alone.
        self.port = self.copied(HERE.parent.parent / "s3napback.py", folder)
        self.other = self.copied(other, folder / "other") if other else None
        self.results: list[Result] = []
        self.key_file = folder / "key.txt"
        self.key_file.write_text(f"key={KEY}\nsecret={SECRET}\n")
        self.key_file.chmod(0o600)
        (folder / "aws.config").write_text(_AWS_CONFIG)
        (folder / "home").mkdir()
        self.env = {
            **{name: value for name, value in os.environ.items()
               if not name.startswith(("AWS_", "RCLONE_", "RESTIC_"))},
            "HOME": str(folder / "home"), "TMPDIR": str(folder), "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(folder / "aws.config"),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "RCLONE_CONFIG": str(folder / "rclone.conf"),
            "RCLONE_S3_PROVIDER": "Other", "RCLONE_S3_ENV_AUTH": "true",
            "RCLONE_S3_REGION": "us-east-1", "RESTIC_PASSWORD": SECRET,
            "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
        }

    @staticmethod
    def copied(module: Path, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        return Path(shutil.copyfile(module, folder / "s3napback.py"))

    def ports(self) -> dict[str, Path]:
        """The module, and the other copy of it where there is one, by their names in tables."""
        return {"s3napback": self.port, **({OTHER: self.other} if self.other else {})}

    def scaled(self, amount: float) -> int:
        """What stands for an amount that belongs to a size of 10^9."""
        return max(1, round(amount * self.size / 1e9))

    def random_file(self) -> Path:
        path = self.folder / "random"
        if not path.exists():
            make_random(path, self.size)
        return path

    def tree(self) -> Path:
        path = self.folder / "tree"
        if not path.exists():
            make_tree(path, max(100, self.scaled(60_000)), self.scaled(655 * MB))
        return path

    def gpg(self) -> dict[str, str]:
        """The environment in which gpg has a key of RECIPIENT's, made at the first call."""
        home = self.folder / "gnupg"
        env = {"GNUPGHOME": str(home)}
        if not home.exists():
            home.mkdir(mode=0o700)
            # "future-default" is an elliptic curve: made at once, where RSA takes seconds.
            subprocess.run(
                ["gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key",
                 RECIPIENT, "future-default", "default", "0"],
                env={**self.env, **env}, check=True, stderr=subprocess.DEVNULL,
            )
        return env

    def python(self, script: str) -> list[str]:
        return [sys.executable, "-c", script]

    def js3tream(self, sink: Sink, mode: str, *options: str, port: Path | None = None
                 ) -> list[str]:
        return [sys.executable, str(port or self.port), "js3tream", mode, "-K", str(self.key_file),
                "-b", "bench:archive", "--endpoint", sink.url, *options]

    def port_on(self, moment: datetime, config: Path) -> list[str]:
        """The port's whole run, as if it were that moment. -B: compiled anew, as from cron."""
        script = (
            "import sys; from datetime import datetime; import s3napback;"
            " sys.exit(s3napback.main(sys.argv[2:], now=datetime.fromisoformat(sys.argv[1])))"
        )
        return [sys.executable, "-B", "-c", script, moment.isoformat(), "-c", str(config)]

    def config(self, name: str, sink: Sink, *lines: str) -> Path:
        """A config file of that name, with an empty DiffDir."""
        diffs = self.folder / f"{name}.diffs"
        shutil.rmtree(diffs, ignore_errors=True)
        diffs.mkdir()
        path = self.folder / f"{name}.conf"
        path.write_text("\n".join([
            "Bucket bench", f"S3Endpoint {sink.url}", f"S3Keyfile {self.key_file}",
            f"DiffDir {diffs}", f"ChunkSize {PIECE}", *lines, "",
        ]))
        return path

    def setting_up(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Runs what has to be done before a work, which must succeed."""
        done = subprocess.run(argv, env={**self.env, **env}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench: {argv[0]} failed: {done.stderr[-1000:]}")

    def run(self, title: str, cases: Sequence[Case], baseline: str, sink: Sink | None = None, *,
            rounds: int = 0, size: int = 0) -> list[Result]:
        """Measures the cases in turn and prints their table. size: bytes, for the rate."""
        found = []
        work = title.partition(":")[0]
        env = {**self.env, **(sink.env() if sink else {})}
        for number in range(rounds or self.rounds):
            for case in cases:
                print(f"{work}: round {number + 1}, {case.name}", file=sys.stderr, flush=True)
                found.append(measure(work, number, case, env, sink))
        self.results += found
        print_table(title, found, baseline, size)
        return found


ArgvBuilder = Callable[[Bench, Sink], list[str]]
OTHER = "s3napback of --port"

# Who stores standard input, and who writes what is stored to standard output.
UPLOADERS: dict[str, ArgvBuilder] = {
    "s3napback": lambda bench, sink: bench.js3tream(sink, "-i", "-z", str(PIECE)),
    OTHER: lambda bench, sink: bench.js3tream(sink, "-i", "-z", str(PIECE), port=bench.other),
    "s5cmd": lambda bench, sink: [
        "s5cmd", *(["--no-verify-ssl"] if sink.ca else []), "pipe", "-c", str(CONNECTIONS),
        "-p", str(PIECE_MIB), "s3://bench/archive"],
    "rclone": lambda bench, sink: [
        "rclone", "rcat", ":s3:bench/archive", "--s3-upload-concurrency", str(CONNECTIONS),
        "--s3-chunk-size", f"{PIECE}B"],
    "aws": lambda bench, sink: [
        "aws", "s3", "cp", "--endpoint-url", sink.url, "-", "s3://bench/archive"],
    "boto3": lambda bench, sink: bench.python(
        _BOTO3 + 'client.upload_fileobj(sys.stdin.buffer, "bench", "archive", Config=config)'),
}
DOWNLOADERS: dict[str, ArgvBuilder] = {
    "s3napback": lambda bench, sink: bench.js3tream(sink, "-o"),
    OTHER: lambda bench, sink: bench.js3tream(sink, "-o", port=bench.other),
    "s5cmd": lambda bench, sink: [
        "s5cmd", "cat", "-c", str(CONNECTIONS), "-p", str(PIECE_MIB), "s3://bench/whole"],
    "rclone": lambda bench, sink: ["rclone", "cat", ":s3:bench/whole"],
    "aws": lambda bench, sink: [
        "aws", "s3", "cp", "--endpoint-url", sink.url, "s3://bench/whole", "-"],
    "boto3": lambda bench, sink: bench.python(
        _BOTO3 + 'client.download_fileobj("bench", "whole", sys.stdout.buffer, Config=config)'),
}


def chosen_from(builders: Mapping[str, ArgvBuilder], bench: Bench) -> list[str]:
    """The names of the programs that are there."""
    return [name for name in builders if (bench.other if name == OTHER else is_there(name))]


def is_there(name: str) -> bool:
    if name in ("s3napback", "boto3"):
        return importlib.util.find_spec("boto3") is not None
    return shutil.which(name) is not None


def stored_exactly(size: int) -> Callable[[Mapping[str, Any]], str]:
    def fault(stats: Mapping[str, Any]) -> str:
        return "" if stats["bytes"] == size else f"{stats['bytes']} bytes stored, not {size}"

    return fault


def stored_something(stats: Mapping[str, Any]) -> str:
    return "" if stats["received"] else "nothing was stored"


def sent_at_least(size: int) -> Callable[[Mapping[str, Any]], str]:
    def fault(stats: Mapping[str, Any]) -> str:
        return "" if stats["sent"] >= size else f"{stats['sent']} bytes fetched, not {size}"

    return fault


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def print_table(title: str, results: Sequence[Result], baseline: str, size: int) -> None:
    """Medians by case, and their ratios to those of the baseline (of the first, if it is absent).

    A case that failed once has its fault in place of numbers.
    """
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(result.name, []).append(result)
    base = baseline if baseline in cases else next(iter(cases))

    def median(name: str, value: Callable[[Result], float]) -> float:
        return statistics.median(value(result) for result in cases[name])

    columns: list[tuple[str, Callable[[Result], float], int]] = [
        ("wall s", lambda result: result.wall, 2),
        ("CPU s", lambda result: result.cpu, 2),
        ("peak MB", lambda result: result.peak / MB, 0),
    ]
    rounds = max(len(found) for found in cases.values())
    print(f"\n{title}\n  medians of {rounds} rounds; ×: times {base}")
    head = "".join(f"{name:>9}{'×':>7}" for name, _, _ in columns)
    print(f"  {'':<34}{head}{'requests':>10}{'MB/s':>8}{'service CPU s':>15}")
    for name, found in cases.items():
        if faults := [result.fault for result in found if result.fault]:
            print(f"  {name:<34} FAILED: {faults[0]}")
            continue
        line = ""
        for _, value, digits in columns:
            here, there = median(name, value), median(base, value)
            line += f"{here:>9.{digits}f}{here / there if there else 0:>7.2f}"
        requests = median(name, lambda result: sum(result.requests.values()))
        rate = f"{size / MB / median(name, lambda result: result.wall):.0f}" if size else ""
        service = median(name, lambda result: result.service_cpu)
        print(f"  {name:<34}{line}{requests:>10.0f}{rate:>8}{service:>15.2f}", flush=True)


def say_absent(names: Iterable[str]) -> None:
    if absent := [name for name in names if name != OTHER and not is_there(name)]:
        print(f"  absent: {', '.join(absent)}")


# --------------------------------------------------------------------------------------------------
# Works
# --------------------------------------------------------------------------------------------------


def _uploads(bench: Bench, sink: Sink, size: int, names: Sequence[str] = ()) -> list[Case]:
    """The cases of storing the first `size` bytes of the big input."""
    feeder = ["head", "-c", str(size), str(bench.random_file())]
    return [
        Case(name, UPLOADERS[name](bench, sink), feeder, prepare=sink.empty,
             fault=stored_exactly(size))
        for name in names or chosen_from(UPLOADERS, bench)
    ]


def work_upload(bench: Bench) -> None:
    with running_sink(bench.folder, "--drop") as sink:
        bench.run("upload: standard input to the service, http", _uploads(bench, sink, bench.size),
                  "s5cmd", sink, size=bench.size)
    say_absent(UPLOADERS)


def work_tls(bench: Bench) -> None:
    with running_sink(bench.folder, "--drop", tls=True) as sink:
        bench.run("tls: standard input to the service, https", _uploads(bench, sink, bench.size),
                  "s5cmd", sink, size=bench.size)
    say_absent(UPLOADERS)


def work_download(bench: Bench) -> None:
    with running_sink(bench.folder) as sink:
        source = bench.random_file()
        with open(source, "rb") as file:
            sink.call("/bench/whole", "PUT", file, bench.size)
        with open(source, "rb") as file:
            subprocess.run(UPLOADERS["s3napback"](bench, sink), stdin=file, check=True,
                           env={**bench.env, **sink.env()})
        cases = [Case(name, build(bench, sink), fault=sent_at_least(bench.size))
                 for name, build in DOWNLOADERS.items()
                 if name in chosen_from(DOWNLOADERS, bench)]
        bench.run("download: from the service to /dev/null, http", cases, "s5cmd", sink,
                  size=bench.size)
        # The least that any use of it costs: what goes to /dev/null is not even copied.
        piped = ["bash", "-o", "pipefail", "-c", '"$0" "$@" | cat > /dev/null']
        bench.run("piped: from the service into a pipe, with its reader", [
            dataclasses.replace(case, argv=[*piped, *case.argv]) for case in cases
        ], "s5cmd", sink, size=bench.size)
    say_absent(DOWNLOADERS)


def work_tree(bench: Bench) -> None:
    tree, gpg = bench.tree(), bench.gpg()

    with running_sink(bench.folder) as sink:  # restic reads what it has stored

        def port(name: str, *lines: str) -> Case:
            def prepare() -> None:
                sink.empty()
                bench.config("tree", sink, f"GpgRecipient {RECIPIENT}", *lines,
                             f"<Directory {tree}>", "Diffs 0", "</Directory>")

            argv = [sys.executable, str(bench.port), "-c", str(bench.folder / "tree.conf")]
            return Case(name, argv, env=gpg, prepare=prepare, fault=stored_something)

        def pipe(compressor: str, asked: str = "") -> Case:
            script = f'tar {asked} -cf - "$0" | {compressor} | gpg --batch -z 0 -e -r {RECIPIENT}'
            name = f"tar{' -g ACLs' if asked else ''}|{compressor}|gpg, no upload"
            return Case(name, ["bash", "-o", "pipefail", "-c", script, str(tree)], env=gpg,
                        prepare=lambda: snapshot.unlink(missing_ok=True))

        # What a backup asks of tar besides; it has its price without any upload.
        snapshot = bench.folder / "tree.snapshot"
        asked = f"--acls --xattrs -g {snapshot}"
        cases = [port("s3napback, default"), port("s3napback, gzip", "Compressor gzip")]
        cases += [pipe(name) for name in ("pigz", "gzip") if is_there(name)]
        if is_there("pigz"):
            cases.append(pipe("pigz", asked))
        if is_there("zstd"):
            cases += [port("s3napback, zstd -3", 'Compressor "zstd -3"'), pipe("zstd -3"),
                      pipe("zstd -3", asked)]
        if is_there("restic"):
            env = {"RESTIC_REPOSITORY": f"s3:{sink.url}/bench"}

            def prepare() -> None:
                sink.empty()
                shutil.rmtree(bench.folder / "restic-cache", ignore_errors=True)
                bench.setting_up(["restic", "init"], env)

            cases.append(Case("restic", ["restic", "backup", "--quiet", str(tree)], env=env,
                              prepare=prepare))
        size = sum(path.stat().st_size for path in tree.rglob("*.c"))
        bench.run(f"tree: {size / MB:.0f} MB in {sum(1 for _ in tree.rglob('*.c'))} files,"
                  " encrypted", cases, "tar|pigz|gpg, no upload", sink, size=size)
    say_absent(["pigz", "gzip", "zstd", "restic"])


class _Days:
    """A case that is a day later in every round."""

    def __init__(self, argv: Callable[[datetime], list[str]]) -> None:
        self._argv = argv
        self._moment = datetime(2027, 1, 1, 3)  # slot 0, a FULL, of any SimpleCycle
        self.argv = argv(self._moment)

    def next(self) -> None:
        self._moment += timedelta(days=1)
        self.argv[:] = self._argv(self._moment)


def work_unchanged(bench: Bench) -> None:
    tree = bench.tree()
    module = {"PYTHONPATH": str(bench.folder)}
    snapshot, again = bench.folder / "snapshot", bench.folder / "snapshot.again"

    with running_sink(bench.folder) as sink:

        def port(name: str, file: str, directories: Sequence[Path]) -> Case:
            lines = [f"Directory {directory}" for directory in directories]
            config = bench.config(file, sink, "<Cycle daily>", "Diffs 300", "Fulls 1", *lines,
                                  "</Cycle>")
            days = _Days(lambda moment: bench.port_on(moment, config))
            bench.setting_up(days.argv, module)
            return Case(name, days.argv, env=module, prepare=days.next, fault=stored_something)

        cases = [port("s3napback, 1 directory", "one", [tree]),
                 port("s3napback, 10 directories", "ten", sorted(tree.iterdir()))]
        tar = ["tar", f"--listed-incremental={again}", "-cf", "-", str(tree)]
        bench.setting_up(["bash", "-c", '"$@" > /dev/null', "tar", *tar], {})
        again.rename(snapshot)
        cases.append(Case("tar alone", tar,
                          prepare=lambda: void(shutil.copyfile(snapshot, again))))
        if is_there("restic"):
            sink.call("/restic", "PUT")
            env = {"RESTIC_REPOSITORY": f"s3:{sink.url}/restic"}
            bench.setting_up(["restic", "init"], env)
            backup = ["restic", "backup", "--quiet", str(tree)]
            bench.setting_up(backup, env)
            cases.append(Case("restic", backup, env=env))
        bench.run("unchanged: a tree that is as it was the day before", cases, "tar alone", sink)
    say_absent(["restic"])


def void(_: object) -> None:
    """Turns a call with a result into one without."""


def work_fixed(bench: Bench) -> None:
    rounds = 3 * bench.rounds  # they are short, and the clock's noise is not
    bench.run(
        "help: what starting alone takes",
        [*[Case(f"{name} -h", [sys.executable, str(port), "-h"], statuses=(2,))
           for name, port in bench.ports().items()],
         Case("js3tream -h", [sys.executable, str(bench.port), "js3tream", "-h"]),
         Case("python", bench.python("pass")),
         Case("python, import boto3", bench.python("import boto3"))],
        "python", rounds=rounds,
    )
    with running_sink(bench.folder) as sink:
        feeder = ["printf", "hello world"]
        cases = [Case(case.name, case.argv, feeder, prepare=sink.empty, fault=stored_exactly(11))
                 for case in _uploads(bench, sink, 11)]
        cases.append(Case("boto3 put_object", bench.python(_BOTO3_PUT), feeder, prepare=sink.empty,
                          fault=stored_exactly(11)))
        bench.run("small: 11 bytes from standard input to the service, http", cases,
                  "boto3 put_object", sink, rounds=rounds)
    say_absent(UPLOADERS)


def work_wan(bench: Bench) -> None:
    size, latency, rate = bench.scaled(250 * MB), 40, 100
    ideal = size * 8 / (CONNECTIONS * rate * 1e6)
    with running_sink(bench.folder, "--drop", "--latency-ms", str(latency), "--conn-mbps",
                      str(rate)) as sink:
        bench.run(
            f"wan: {size / MB:.0f} MB, {latency} ms a request, {rate} Mbit/s a connection;"
            f" {CONNECTIONS} of them need {ideal:.2f} s at least",
            _uploads(bench, sink, size), "s5cmd", sink, size=size,
        )
    say_absent(UPLOADERS)


def work_large(bench: Bench) -> None:
    size, chunk = bench.scaled(2500 * MB), bench.scaled(1000 * MB)
    feeder = ["head", "-c", str(size), "/dev/zero"]
    with running_sink(bench.folder, "--drop") as sink:
        cases = [
            Case(f"s3napback, Parallel {parallel}",
                 bench.js3tream(sink, "-i", "-z", str(chunk), "--parallel", str(parallel)),
                 feeder, prepare=sink.empty, fault=stored_exactly(size))
            for parallel in (CONNECTIONS, 1)
        ]
        bench.run(f"large: {size / MB:.0f} MB in chunks of {chunk / MB:.0f} MB",
                  cases, cases[0].name, sink, size=size)


def work_limit(bench: Bench) -> None:
    rate = bench.scaled(10 * MB)  # bytes per second
    folder = bench.folder / "limited"
    folder.mkdir(exist_ok=True)
    make_random(folder / "random", 10 * rate)
    chunk = max(100_000, rate)
    with running_sink(bench.folder, "--drop") as sink:

        def prepare() -> None:
            sink.empty()
            config = bench.config("limit", sink, f"BandwidthLimit {rate}",
                                  f"<Directory {folder}>", "Diffs 0", "</Directory>")
            config.write_text(config.read_text().replace(f"ChunkSize {PIECE}",
                                                         f"ChunkSize {chunk}"))

        argv = [sys.executable, str(bench.port), "-c", str(bench.folder / "limit.conf")]
        found = bench.run(f"limit: BandwidthLimit {rate / MB:g} MB/s",
                          [Case("s3napback", argv, prepare=prepare)], "s3napback", sink,
                          rounds=1, size=10 * rate)[0]
    if "BandwidthLimit is not yet in effect" in found.said:
        print("  skipped: the run says that BandwidthLimit is not in effect")
    else:
        print(f"  measured rate / set rate: {found.received / found.wall / rate:.2f}")


@dataclass(frozen=True)
class Life:
    """A program that keeps backups of one tree, encrypted. begin: forgets all backups, and does
    what comes before the first; calls: stage → the command, given the folder that a restore
    fills."""

    name: str
    begin: Callable[[], None]
    calls: Mapping[str, Callable[[Path], Sequence[str]]]
    env: Mapping[str, str]


STAGES = {
    "full": "everything, into an empty bucket", "again": "nothing has changed",
    "changed": "1 % edited, 0.5 % new, 0.5 % deleted", "list": "what is there",
    "back": "all of it restored, and compared", "one": "one small file restored",
}


class LivingTree:
    """The tree that all programs keep, and its changes, which can be taken back."""

    def __init__(self, pristine: Path, place: Path) -> None:
        self._pristine, self.place = pristine, place
        shutil.copytree(pristine, place)
        names = sorted(path.relative_to(place) for path in place.rglob("*.c"))
        random.Random(1).shuffle(names)
        one_percent = max(2, len(names) // 100)
        self._edited, rest = names[:one_percent], names[one_percent:]
        self._deleted, rest = rest[: one_percent // 2], rest[one_percent // 2 :]
        self._new = [path.with_name(f"new-{path.name}") for path in rest[: one_percent // 2]]
        self.small = min(rest, key=lambda path: (place / path).stat().st_size)

    def change(self) -> None:
        for path in self._edited:
            with open(self.place / path, "ab") as file:
                file.write(b"edited\n")
        for path in self._deleted:
            (self.place / path).unlink()
        for path in self._new:
            (self.place / path).write_bytes(b"new\n" * 1000)

    def change_back(self) -> None:
        for path in (*self._edited, *self._deleted):
            shutil.copy2(self._pristine / path, self.place / path)
        for path in self._new:
            (self.place / path).unlink(missing_ok=True)


def _port_life(bench: Bench, sink: Sink, tree: LivingTree, name: str, module: Path,
               *lines: str) -> Life:
    moment = datetime(2027, 1, 1, 3)  # slot 0, a FULL, of any SimpleCycle
    file = name.replace(" ", "-")
    config = bench.folder / f"{file}.conf"

    def begin() -> None:
        sink.empty()
        bench.config(file, sink, f"GpgRecipient {RECIPIENT}", *lines, f"<Directory {tree.place}>",
                     "Diffs 300", "Fulls 1", "</Directory>")

    def on_day(day: int) -> Callable[[Path], Sequence[str]]:
        return lambda folder: bench.port_on(moment + timedelta(days=day), config)

    def command(word: str, *words: str) -> list[str]:
        return [sys.executable, str(module), word, "-c", str(config), *words]

    source = str(tree.place)
    return Life(name, begin, {
        "full": on_day(0), "again": on_day(1), "changed": on_day(2),
        "list": lambda folder: command("list"),
        "back": lambda folder: command("restore", source, "--to", str(folder)),
        "one": lambda folder: command("restore", source, "--to", str(folder),
                                      str(tree.place / tree.small)),
    }, {**bench.gpg(), "PYTHONPATH": str(module.parent)})


def _restic_life(bench: Bench, sink: Sink, tree: LivingTree) -> Life:
    env = {"RESTIC_REPOSITORY": f"s3:{sink.url}/bench"}

    def begin() -> None:
        sink.empty()
        shutil.rmtree(bench.folder / "restic-cache", ignore_errors=True)
        bench.setting_up(["restic", "init"], env)

    def back(*words: str) -> Callable[[Path], Sequence[str]]:
        return lambda folder: ["restic", "restore", "latest", "--quiet", "--target", str(folder),
                               *words]

    backup = ["restic", "backup", "--quiet", str(tree.place)]
    return Life("restic", begin, {
        "full": lambda folder: backup, "again": lambda folder: backup,
        "changed": lambda folder: backup, "list": lambda folder: ["restic", "snapshots"],
        "back": back(), "one": back("--include", str(tree.place / tree.small)),
    }, env)


def _duplicity_life(bench: Bench, sink: Sink, tree: LivingTree) -> Life:
    archives, url = bench.folder / "duplicity", "boto3+s3://bench/duplicity"
    options = ["--archive-dir", str(archives), "--s3-endpoint-url", sink.url,
               "--verbosity", "warning"]

    def begin() -> None:
        sink.empty()
        shutil.rmtree(archives, ignore_errors=True)

    def backup(word: str) -> Callable[[Path], Sequence[str]]:
        return lambda folder: ["duplicity", word, *options, "--encrypt-key", RECIPIENT,
                               "--volsize", str(PIECE_MIB), str(tree.place), url]

    def back(*words: str) -> Callable[[Path], Sequence[str]]:
        # It puts what was in the tree straight into the folder.
        return lambda folder: ["duplicity", "restore", "--force", *options, *words, url,
                               str(folder) + str(tree.place)
                               + (f"/{tree.small}" if words else "")]

    return Life("duplicity", begin, {
        "full": backup("full"), "again": backup("incr"), "changed": backup("incr"),
        "list": lambda folder: ["duplicity", "collection-status", *options, url],
        "back": back(), "one": back("--path-to-restore", str(tree.small)),
    }, {**bench.gpg(), "PASSPHRASE": ""})


def work_life(bench: Bench) -> None:
    tree = LivingTree(bench.tree(), bench.folder / "life")
    found: dict[str, list[Result]] = {stage: [] for stage in STAGES}
    back = bench.folder / "back"

    def restored(stage: str) -> str:
        """What is wrong with what a restore brought back, "" for nothing."""
        there = f"{back}{tree.place}"
        pair = (there, str(tree.place)) if stage == "back" else (
            f"{there}/{tree.small}", str(tree.place / tree.small))
        done = subprocess.run(["diff", "-rq", *pair], capture_output=True, text=True)
        return f"what came back is not what was there: {done.stdout[:200]}" * (done.returncode != 0)

    with running_sink(bench.folder) as sink:
        lives = [
            _port_life(bench, sink, tree, f"{name}{suffix}", module, *lines)
            for suffix, lines in (("", ()), (", zstd -3", ('Compressor "zstd -3"',)))
            for name, module in bench.ports().items()
        ]
        lives += [make(bench, sink, tree) for name, make in
                  (("restic", _restic_life), ("duplicity", _duplicity_life)) if is_there(name)]
        env = {**bench.env, **sink.env()}
        for number in range(bench.rounds):
            for life in lives:
                life.begin()
                for stage in STAGES:
                    print(f"life: round {number + 1}, {life.name}, {stage}", file=sys.stderr,
                          flush=True)
                    if stage == "changed":
                        tree.change()
                    shutil.rmtree(back, ignore_errors=True)
                    # duplicity does not make the folders above the one that it fills.
                    (Path(f"{back}{tree.place}/{tree.small}").parent if life.name == "duplicity"
                     and stage == "one" else back).mkdir(parents=True)
                    case = Case(life.name, life.calls[stage](back), env=life.env,
                                fault=lambda stats, stage=stage: (  # type: ignore[misc]
                                    restored(stage) if stage in ("back", "one") else ""))
                    found[stage].append(measure(f"life {stage}", number, case, env, sink))
                tree.change_back()
    for stage, text in STAGES.items():
        bench.results += found[stage]
        print_table(f"life {stage}: {text}", found[stage], "restic", 0)
    say_absent(["zstd", "restic", "duplicity"])


WORKS: dict[str, Callable[[Bench], None]] = {
    "upload": work_upload, "tls": work_tls, "download": work_download, "fixed": work_fixed,
    "wan": work_wan, "tree": work_tree, "unchanged": work_unchanged, "large": work_large,
    "limit": work_limit, "life": work_life,
}

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

_VERSION_CALLS = {"s5cmd": ["version"], "rclone": ["version"], "aws": ["--version"],
                  "duplicity": ["--version"], "restic": ["version"], "tar": ["--version"],
                  "gpg": ["--version"]}


def versions() -> dict[str, str]:
    """What each program that is there says of itself."""
    found = {"python": sys.version.split()[0]}
    for name, words in _VERSION_CALLS.items():
        if is_there(name):
            done = subprocess.run([name, *words], capture_output=True, text=True, check=False)
            found[name] = (done.stdout or done.stderr).strip().partition("\n")[0]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description="s3napback.py beside other programs.")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--size", type=float, default=1e9, help="bytes of the big input")
    options.add_argument("--only", default=",".join(WORKS), help="of: %(default)s")
    options.add_argument("--json", type=Path, help="where the numbers of every run go")
    options.add_argument("--port", type=Path, help="another copy of the module, measured beside")
    given = options.parse_args()
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in WORKS]:
        options.error(f"no such work: {', '.join(unknown)}; there are {', '.join(WORKS)}")
    if given.rounds < 1 or given.size < 1e6:
        options.error("--rounds is at least 1, --size at least 1000000")
    about = versions()
    print("\n".join(f"{name}: {text}" for name, text in about.items()))
    memory_disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="s3napback-bench-", dir=memory_disk) as name:
        bench = Bench(Path(name), given.port, int(given.size), given.rounds)
        try:
            for work in chosen:
                WORKS[work](bench)
        finally:
            if (bench.folder / "gnupg").exists():
                subprocess.run(["gpgconf", "--homedir", str(bench.folder / "gnupg"),
                                "--kill", "all"], check=False)
            if given.json:
                given.json.write_text(json.dumps({
                    "versions": about, "size": bench.size, "rounds": bench.rounds,
                    "results": [dataclasses.asdict(result) for result in bench.results],
                }, indent=1) + "\n")


if __name__ == "__main__":
    main()
