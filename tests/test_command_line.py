"""`js3tream`: the options, the listing and the objects of the Java program, from the shell."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import s3napback
from s3napback import Access

SCRIPT = s3napback.__file__


def js3tream(
    *words: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, SCRIPT, "js3tream", *words],
        input=stdin, capture_output=True, env={**os.environ, **(env or {})},
    )


@pytest.fixture
def edge(golden: Path, tmp_path: Path) -> Path:
    """The recorded buckets as folders, with their dates."""
    recorded = golden / "perl-archives" / "edge"
    for bucket, about in json.loads((recorded / "index.json").read_text())["buckets"].items():
        shutil.copytree(recorded / "objects" / bucket, tmp_path / bucket)
        store = s3napback.open_store(bucket, Access(f"file://{tmp_path}"), lambda: 0.0)
        for key, entry in about["objects"].items():
            file = tmp_path / bucket / entry["file"]
            if entry["metadata"]:
                store.put(key, file.read_bytes(), entry["metadata"])
                continue
            at = datetime.fromisoformat(entry["last_modified"].replace("Z", "+00:00")).timestamp()
            os.utime(file, (at, at))
    return tmp_path


def test_every_recorded_archive_comes_back(edge: Path, golden: Path) -> None:
    import hashlib

    manifest = json.loads((golden / "perl-archives" / "edge" / "manifest.json").read_text())
    for archive in manifest["archives"]:
        where = archive["bucket"] + (f":{archive['prefix']}" if archive["prefix"] else "")
        done = js3tream("-o", "-b", where, "--endpoint", f"file://{edge}")
        assert (done.returncode, done.stderr) == (0, b""), where
        assert len(done.stdout) == archive["size"], where
        assert hashlib.md5(done.stdout).hexdigest() == archive["md5"], where


def test_every_recorded_listing_over_http(s3_server: Any, golden: Path, tmp_path: Path) -> None:
    s3_server.load(golden / "perl-archives" / "edge")
    keyfile = str(s3_server.write_keyfile(tmp_path / "key"))
    manifest = json.loads((golden / "perl-archives" / "edge" / "manifest.json").read_text())
    compared = 0
    for name, recorded in manifest["lists"].items():
        zone, _, where = name.partition("|")
        bucket = () if where == "buckets" else ("-b", where)
        done = js3tream(
            "-v", "-K", keyfile, "-l", *bucket, "--endpoint", s3_server.endpoint, env={"TZ": zone}
        )
        text = done.stderr.decode()
        if where == "oracle.missing":  # the original prints a stack of SOAP, and ends with 0
            assert "NoSuchBucket" in text
            assert done.returncode == 1
        elif where == "buckets":
            # moto gives buckets today's date, which the recording cannot have.
            expected = recorded if isinstance(recorded, str) else recorded["stderr"]
            assert [line.partition(" - ")[2] for line in text.splitlines()] == [
                line.partition(" - ")[2] for line in expected.splitlines()
            ]
        else:
            assert text == recorded["stderr"]
            assert done.returncode == 0
        assert done.stdout == b""
        compared += 1
    assert compared == 18


def test_the_manuals_recovery_line(s3_server: Any, gpg_home: Any, tmp_path: Path) -> None:
    """tar | gpg | js3tream -i, and back with the manual's own options."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("hello\n" * 9999)
    s3_server.write_keyfile(tmp_path / "key.txt")
    env = {
        **os.environ, **gpg_home.env, "E": f"--endpoint {s3_server.endpoint}",
        "J": f"{sys.executable} {SCRIPT} js3tream", "R": gpg_home.recipient,
    }
    script = """
        set -e -o pipefail
        tar -cz tree | gpg --batch -r $R -e |
            $J --debug -z 250 -n -f -v -K key.txt -i -b dev.example.com.b:/tree-0-FULL $E
        rm -r tree
        $J --debug -n -f -v -K key.txt -o -b dev.example.com.b:/tree-0-FULL $E | gpg -d | tar xvz
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tree" / "file").read_text() == "hello\n" * 9999


def at(folder: Path) -> tuple[str, str]:
    return ("--endpoint", f"file://{folder}")


def test_send_list_fetch_delete(tmp_path: Path) -> None:
    done = js3tream("-i", "-b", "b:x", "-z", "3", "-t", "a note", *at(tmp_path), stdin=b"1234567")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = js3tream("--list", "--bucket", "b", *at(tmp_path))
    assert b"b:x - 0.01k in 3 data blocks\n\tTAG: a note\ntotal: 1\n" in done.stderr
    assert js3tream("-ob", "b:x", *at(tmp_path)).stdout == b"1234567"
    done = js3tream("-p", "-d", "-b", "b:x", *at(tmp_path))
    assert b"b:x is kept" in done.stderr
    assert js3tream("-d", "-b", "b:x", *at(tmp_path)).returncode == 0
    assert b"total: 0" in js3tream("-l", "-b", "b", *at(tmp_path)).stderr
    assert js3tream("-d", "-b", "b", *at(tmp_path)).returncode == 0
    assert not (tmp_path / "b").exists()


def test_pretending_stores_nothing(tmp_path: Path) -> None:
    done = js3tream("-p", "-i", "-b", "b:x", *at(tmp_path), stdin=b"1")
    assert done.returncode == 0
    assert b"Pretending" in done.stderr
    assert not list(tmp_path.iterdir())
    js3tream("-i", "-b", "b:x", *at(tmp_path), stdin=b"1")
    done = js3tream("-p", "-o", "-b", "b:x", *at(tmp_path))
    assert done.stdout == b""
    assert b"1 bytes would be written" in done.stderr


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    js3tream("-i", "-b", "b:x", *at(tmp_path), stdin=b"1")
    done = js3tream("-i", "-b", "b:x", *at(tmp_path), stdin=b"2")
    assert done.returncode == 1
    assert b"b:x exists already" in done.stderr
    done = js3tream("-i", "-b", "b", *at(tmp_path), stdin=b"2")
    assert b"bucket b exists already" in done.stderr
    assert js3tream("-ob", "b:x", *at(tmp_path)).stdout == b"1"


def test_a_torn_archive_gives_its_beginning_and_an_error(tmp_path: Path) -> None:
    js3tream("-i", "-b", "b:x", "-z", "3", *at(tmp_path), stdin=b"123456789A")
    (tmp_path / "b" / "x%3A0000000000001").unlink()
    done = js3tream("-o", "-b", "b:x", *at(tmp_path))
    assert done.returncode == 1
    assert done.stdout == b"123"
    assert b"b:x is not complete: chunk 1 is missing" in done.stderr


def test_a_closed_output_is_an_error(tmp_path: Path) -> None:
    js3tream("-i", "-b", "b:x", *at(tmp_path), stdin=b"x" * 1_000_000)
    line = f"{sys.executable} {SCRIPT} js3tream -o -b b:x --endpoint file://{tmp_path}"
    done = subprocess.run(
        ["bash", "-c", f"{line} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"standard output was closed" in done.stderr
    assert b"Traceback" not in done.stderr
    done = subprocess.run(["bash", "-c", f"{line} > /dev/full"], capture_output=True)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_closed_input_is_an_error(tmp_path: Path) -> None:
    line = f"{sys.executable} {SCRIPT} js3tream -i -b b:x --endpoint file://{tmp_path} <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert done.returncode == 2
    assert b"standard input is closed" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, ""),
        (("-h",), 0, ""),
        (("-V",), 0, ""),
        (("-x",), 2, "option -x not recognized"),
        (("-i", "-o", "-b", "b:x"), 2, "give one of -i, -o, -l and -d"),
        (("-b", "b:x"), 2, "give one of -i, -o, -l and -d"),
        (("-i",), 2, "no bucket given"),
        (("-o", "-b", "b:x", "extra"), 2, "unexpected argument extra"),
        (("-i", "-b", "b:x", "-z", "0"), 2, "-z 0 is not a whole number from 1"),
        (("-i", "-b", "b:x", "-z", "5M"), 2, "-z 5M is not a whole number"),
        (("-i", "-b", "b:x", "-t", "ż"), 2, "tag must be printable ASCII"),
        (("-i", "-b", "b:x", "-k", "KEY"), 2, "-k and -s go together"),
        (("-o", "-b", "b:nothing"), 1, "there is no archive b:nothing"),
        (("-l", "-b", "nothing"), 1, "nothing"),
    ],
)
def test_bad_calls(tmp_path: Path, words: tuple[str, ...], status: int, message: str) -> None:
    (tmp_path / "b").mkdir()
    done = js3tream(*words, *(at(tmp_path) if words else ()))
    assert done.returncode == status, done.stderr
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_the_secret_is_in_no_output(s3_server: Any, tmp_path: Path) -> None:
    done = js3tream(
        "--debug", "-v", "-l", "-b", "denied-bucket", "-k", s3_server.key, "-s", s3_server.secret,
        "--endpoint", s3_server.endpoint,
    )
    assert done.returncode == 1
    assert b"AccessDenied" in done.stderr
    assert s3_server.secret.encode() not in done.stdout + done.stderr


def test_called_by_the_name_js3tream(tmp_path: Path) -> None:
    link = tmp_path / "js3tream"
    link.symlink_to(SCRIPT)
    done = subprocess.run([sys.executable, str(link), "-V"], capture_output=True, text=True)
    assert done.stdout == f"s3napback {s3napback.__version__}\n"
