"""Coverage-guided fuzzing of everything that reads what others wrote; by hand, with atheris:

    pip install atheris
    python tests/tools/fuzz.py TARGET [CORPUS] -max_total_time=120 -max_len=8000

It starts from SEEDS, which are written to the folder CORPUS; what it finds is kept there. Numbers
have to be allowed more than 4300 digits, where int() gives up: hence -max_len.

A target may raise Failure (or what its docstring names), nothing else.
"""

import contextlib
import getopt
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports():
    import dateutil.parser  # noqa: F401 - what s3napback would only load later

    import s3napback

from s3napback import META, Failure, Moment, StoredObject

PATH = os.path.join(tempfile.mkdtemp(), "input")


def through_a_file(reader: Callable[[str], object]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        with open(PATH, "wb") as file:
            file.write(data)
        with contextlib.suppress(Failure):
            reader(PATH)

    return target


def read_all_of_a_config(path: str) -> None:
    config = s3napback.read_config(path)
    with contextlib.suppress(Failure):
        s3napback.settings_of(config)
    jobs = s3napback.jobs_of(config)
    for job in jobs:
        cycle = job.cycle
        with contextlib.suppress(Failure):
            s3napback.slot_and_mode(cycle, Moment(1.8e9).day, dumps=False)


def logconfig(data: bytes) -> None:
    s3napback.LogConfig(data.decode("utf-8", "surrogateescape"), "fuzz")


def key(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parsed = s3napback.parse_chunk_key(text)
    if parsed:
        s3napback.parse_archive_name(parsed[0])
    s3napback.key_text(data.decode("utf-8", "surrogateescape").replace("\0", ""))


def metadata(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    chunks = []
    for _ in range(provider.ConsumeIntInRange(1, 5)):
        staged = ":s3napback-new" if provider.ConsumeBool() else ""
        number = provider.ConsumeIntInRange(0, 10**14)
        etag = provider.ConsumeUnicodeNoSurrogates(33)
        size = provider.ConsumeIntInRange(0, 9)
        chunks.append(StoredObject(f"a-0-DIFF{staged}:{number:013d}", size, etag, float(size)))
    names = ("archive", "chunks", "bytes", "md5", "made", "kind", "status", "state", "opaque")
    marks = {
        META + name: provider.ConsumeUnicodeNoSurrogates(30)
        for name in names if provider.ConsumeBool()
    }
    unique = list({item.key: item for item in chunks}.values())
    archive = s3napback.resolve_archive("a-0-DIFF", unique, lambda key: marks, 3)
    assert archive
    one = s3napback.CatalogEntry(archive, None, "a", 0, "DIFF")
    with contextlib.suppress(Failure):
        s3napback.choose_chain([one], 1e12)
    s3napback.ArchiveRef(archive.name, archive.metadata.get("archive", "")).find(
        unique, lambda key: marks
    )


def js3tream(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\0")
    with contextlib.suppress(Failure, getopt.GetoptError):
        options = s3napback.js3tream_options(words)
        s3napback.option_value("-z", options.get("size", "1"),
                               partial(s3napback.read_number, largest=100))


def snapshot(data: bytes) -> None:
    """May raise ValueError."""
    with contextlib.suppress(ValueError):
        list(s3napback.Snapshot.read(io.BytesIO(b"GNU tar-1.34-2\n1\0002\0" + data)).folders)


def when(data: bytes) -> None:
    with contextlib.suppress(Failure):
        s3napback.parse_when(data.decode("utf-8", "replace"), Moment(1.8e9))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": through_a_file(read_all_of_a_config),
    "keyfile": through_a_file(s3napback.read_key_file),
    "logconfig": logconfig, "key": key, "metadata": metadata, "js3tream": js3tream,
    "snapshot": snapshot, "when": when,
}

TESTS = Path(__file__).parents[1]


def config_seeds() -> list[bytes]:
    """Every config that was recorded of the original."""
    cases = json.loads((TESTS / "golden" / "configs.json").read_text())
    return [case["text"].encode("utf-8", "surrogateescape") for case in cases]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "config": config_seeds,
    "keyfile": lambda: [b"key=AKIA\nsecret=a\\=b\n", b"#c\n key : x\nsecret y"],
    "logconfig": lambda: [(TESTS.parent / "s3napback.logconfig").read_bytes()],
    "key": lambda: [b"/etc-3-DIFF:0000000000000", b"MySQL/x-1:1", b"a-" + b"9" * 5000 + b"-FULL:1",
                    b"a-0-FULL:" + b"9" * 5000, b"/x-0-FULL:s3napback-new:0000000000001"],
    "metadata": lambda: [bytes(range(256)) * 3],
    "js3tream": lambda: [b"-i\0-b\0b:a\0-z\0005", b"-z\0" + b"9" * 5000, b"--stdout\0--parallel=2"],
    "snapshot": lambda: [
        b"1700000000\0001\000" + b"0\0001700000000\0001\0002049\00012\0./a\0Yb\0Dc\0\0\0" * 3,
    ],
    "when": lambda: [b"3 days ago", b"2026-11-20 03:00 +01:00", b"yesterday", b"9" * 5000],
}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    for folder in [word for word in sys.argv[1:] if not word.startswith("-")]:
        os.makedirs(folder, exist_ok=True)
        for number, seed in enumerate(SEEDS[name]()):
            Path(folder, f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
