"""The command line: `js3tream` as the Java program was, `main`, and the demo."""

import base64
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, START, Capture, Site, program, require_tool, send, stored, tmpfs
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import Access, Store


def js3tream(
    *words: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return program("js3tream", *words, stdin=stdin, env=env)


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

    manifest = json.loads((golden / "perl-archives" / "edge" / "manifest.json").read_text())
    for archive in manifest["archives"]:
        where = archive["bucket"] + (f":{archive['prefix']}" if archive["prefix"] else "")
        done = js3tream("-o", "-b", where, "--endpoint", f"file://{edge}")
        assert (done.returncode, done.stderr) == (0, b""), where
        assert len(done.stdout) == archive["size"], where
        assert hashlib.md5(done.stdout).hexdigest() == archive["md5"], where


@pytest.mark.slow
def test_every_recorded_listing_is_printed_as_the_original_did(
    s3_server: Any, golden: Path, tmp_path: Path
) -> None:
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


def test_the_recovery_line_of_the_manual_brings_an_archive_back(
    s3_server: Any, gpg_home: Any, tmp_path: Path
) -> None:
    """tar | gpg | js3tream -i, and back with the manual's own options."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("hello\n" * 9999)
    s3_server.write_keyfile(tmp_path / "key.txt")
    env = {
        **os.environ, **gpg_home.env, "E": f"--endpoint {s3_server.endpoint}",
        "J": f"{sys.executable} {START} js3tream", "R": gpg_home.recipient,
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


def test_js3tream_sends_lists_fetches_and_deletes(tmp_path: Path) -> None:
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
    line = f"{sys.executable} {START} js3tream -o -b b:x --endpoint file://{tmp_path}"
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
    line = f"{sys.executable} {START} js3tream -i -b b:x --endpoint file://{tmp_path} <&-"
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
        (("-o", "-b", "b:x", "-z", "5M"), 2, "-z 5M is not a whole number"),
        (("-l", "-z", "5M"), 2, "-z 5M is not a whole number"),
        (("-i", "-b", "b:x", "-t", "ż"), 2, "tag must be printable ASCII"),
        (("-i", "-b", "b:x", "-k", "KEY"), 2, "-k and -s go together"),
        (("-o", "-b", "b:nothing"), 1, "there is no archive b:nothing"),
        (("-l", "-b", "nothing"), 1, "nothing"),
    ],
)
def test_js3tream_tells_a_bad_call_in_a_sentence(
    tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
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
    link.symlink_to(s3napback.__file__)
    done = subprocess.run([sys.executable, str(link), "-V"], capture_output=True, text=True)
    assert done.stdout == f"s3napback {s3napback.__version__}\n"


# ---- js3tream: standard input and output ----


def test_what_came_before_a_failure_is_written(store: Store, tmp_path: Path) -> None:
    send(store, b"0123456789" * 25, size=100, folder=str(tmp_path))
    store.delete(["a:0000000000001"])
    done = subprocess.run(
        [sys.executable, START, "js3tream", "-o", "-b", "b:a",
         "--endpoint", f"file://{tmp_path}/buckets"], capture_output=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stdout) == (1, b"0123456789" * 10)


def test_a_disk_that_takes_a_part_of_the_last_piece(store: Store, tmp_path: Path) -> None:
    """Unbuffered standard output (python -u) says how much a write took, and is not asked twice."""
    send(store, os.urandom(300_000), size=400_000, folder=str(tmp_path))
    (tmp_path / "small").mkdir()
    with tmpfs(tmp_path / "small", "size=100k") as small, open(small / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-u", START, "js3tream", "-o", "-b", "b:a",
             "--endpoint", f"file://{tmp_path}/buckets"], stdout=out, stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert b"cannot write to standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["js3tream", "-h"], ["demo"]])
def test_output_that_goes_nowhere_is_told(words: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, START, *words], stdout=full,
                              stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr.startswith(b"s3napback: cannot write to standard output: No space left on")
    assert done.stderr.count(b"\n") == 1


def test_output_is_whole_when_the_program_ends(tmp_path: Path) -> None:
    """It ends without Python's own tidying up."""
    done = js3tream("-h")
    assert (done.returncode, done.stdout.decode()) == (0, s3napback.JS3TREAM_USAGE)


def sending(endpoint: str, **options: Any) -> "subprocess.Popen[bytes]":
    words = ["js3tream", "-i", "-b", "b:a", "--endpoint", endpoint]
    options = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, START, *words], **options)


def test_who_may_not_store_is_told_before_the_input_ends(store: Store, tmp_path: Path) -> None:
    store.put("a:0000000000000", b"x", {})
    with sending(f"file://{tmp_path}/buckets") as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"so far")
        process.stdin.flush()
        assert process.wait(20) == 1
        assert b"b:a exists already (delete it first" in process.stderr.read()
    assert s3napback.archive_objects(store, "a")[0].size == 1


def test_an_input_that_has_nothing_yet_has_not_ended(store: Store, tmp_path: Path) -> None:
    """Whoever shares the pipe may have made it non-blocking."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with sending(f"file://{tmp_path}/buckets", stdin=reading):
        for _ in range(4):
            os.write(writing, b"x" * 1000)
            time.sleep(0.4)
        os.close(writing)
    os.close(reading)
    assert stored(store).size == 4000


@given(st.lists(st.sampled_from(["-i", "-o", "-z", "-z5", "--tag", "-K", "--", "-vn", "-x"])
                | st.text(max_size=5), max_size=5))
def test_no_words_for_js3tream_end_in_a_traceback(words: list[str]) -> None:
    import getopt

    try:
        options = s3napback.js3tream_options(words)
    except getopt.GetoptError:
        return
    assert all(f"--{name}" in s3napback.JS3TREAM_USAGE for name in options)


DIGITS = "9" * 5000  # int() takes 4300 (Python's limit for conversions from text)


@pytest.mark.parametrize("words", [["-z", DIGITS], ["--parallel", DIGITS]])
def test_a_number_of_any_length_in_an_option_is_refused(
    words: list[str], site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    place = ["-b", "bkt:a", "--endpoint", site.settings["S3Endpoint"]]
    assert s3napback.main(["js3tream", "-i", *words, *place]) == 2
    assert "is not a whole number from 1 to" in capsys.readouterr().err


# ---- main ----


def test_help_and_version_are_shown_with_status_0(capsys: Capture) -> None:
    assert s3napback.main(["-h"]) == 2
    assert s3napback.main(["--help"]) == 0
    assert s3napback.main(["--version"]) == 0
    assert s3napback.__version__ in capsys.readouterr().out
    assert s3napback.main(["-c"]) == 2
    assert "option -c requires argument" in capsys.readouterr().err


def test_of_two_configs_the_worst_status_counts(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (site.folder / "etc").mkdir()
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder / "etc"))
    (site.folder / "etc" / "bad.conf").write_text("nonsense: 1\n")
    assert s3napback.main(["-c", str(site.write()), "bad"], now=NIGHT) == 2
    assert len(site.archives()) == 1
    assert "unable to parse line" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("list",), ("status",), ("plan",)])
def test_what_c_gives_may_be_a_name(
    words: tuple[str, ...], site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder))
    assert site.run() == 0
    assert s3napback.main([*words, "-c", site.write().stem], now=NIGHT) == 0
    assert s3napback.main([*words, "-c", "nowhere"], now=NIGHT) != 0
    text = capsys.readouterr()
    assert "Unable to open file 'nowhere'" in text.out + text.err


def test_a_config_that_another_c_takes_the_place_of_is_told(site: Site, capsys: Capture) -> None:
    """The last one counts, as in the original; the other would be missed by nobody."""
    assert s3napback.main(["-c", "lost.conf", "-c", str(site.write())], now=NIGHT) == 3
    assert len(site.archives()) == 1
    assert "-c is given twice, and lost.conf is not run" in capsys.readouterr().err


def test_a_run_from_cron_needs_no_terminal_and_little_environment(site: Site) -> None:
    """The README's call, in the environment that cron gives."""
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", f"HOME={site.folder}", sys.executable,
         s3napback.__file__, "-c", str(site.write())],
        capture_output=True, text=True, cwd=site.folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Finished: 1 stored, 0 skipped, 0 failed" in done.stderr + done.stdout
    assert len(site.archives()) == 1


def test_a_closed_standard_error_does_not_end_a_backup(site: Site) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {START} -c {site.write()} 2>&- >&-"]
    )
    assert done.returncode == 0
    assert len(site.archives()) == 1


def test_with_debug_every_command_is_logged(site: Site, capsys: Capture) -> None:
    assert site.run("-d") == 0
    assert "DEBUG tar -f - -g " in capsys.readouterr().err


def test_on_a_terminal_a_progress_bar_is_shown(site: Site) -> None:
    (site.data / "big").write_bytes(os.urandom(50_000))
    line = f"{sys.executable} {START} -c {site.write()}"
    done = subprocess.run(
        [require_tool("script"), "-qec", line, "/dev/null"], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )
    assert done.returncode == 0
    assert re.search(r"[\r\n]…\S*/data-\d+-(FULL|DIFF): .*B/s", done.stdout)
    assert "Finished: 1 stored" in done.stdout


def test_an_unexpected_error_is_not_hidden(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(s3napback, "run_config", bug)
    with pytest.raises(ZeroDivisionError):
        site.run()
    logging.getLogger("Backup").handlers.clear()


def test_a_command_that_is_ended_by_a_signal_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def command(*_: Any) -> int:
        raise s3napback.Interrupted(15)

    monkeypatch.setitem(s3napback.COMMANDS, "list", command)
    assert s3napback.main(["list"]) == 143
    assert "ended by SIGTERM" in capsys.readouterr().err


@pytest.mark.slow
def test_a_closed_output_of_list_ends_without_a_traceback(site: Site) -> None:
    for n in range(60):
        (site.folder / f"d{n}").mkdir()
    site.jobs = "\n".join(f"Directory {site.folder}/d{n}" for n in range(60))
    assert site.run() == 0
    words = [sys.executable, START, "list", "-c", str(site.write())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert b"Traceback" not in said


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


@pytest.mark.slow
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
    (site.data / "big").write_bytes(os.urandom(15_000))
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    s3_server.latency = 0.05
    if end == "403":
        s3_server.fail = lambda method, path, *_: (  # of objects, not of the bucket
            (403, "SignatureDoesNotMatch", "no") if method == "PUT" and path != "/bkt" else None
        )
    with open(site.folder / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, START, "-d", "-c", str(site.write())], env=env,
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


def test_a_crash_leaves_no_core(site: Site) -> None:
    """A core dump would hold the secret."""
    (site.folder / "buckets" / "bkt").mkdir()
    site.settings["Compressor"] = f'"{require_tool("bash")} -c \\"sleep 20\\""'
    process = subprocess.Popen(
        [sys.executable, START, "-c", str(site.write())], cwd=site.folder,
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


# ---- demo ----


def test_the_demo_backs_up_and_restores(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert s3napback.main(["demo"]) == 0
    assert "A throwaway folder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_demo_has_a_help_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert s3napback.main(["demo", "-h"]) == 0
    assert "needs no account" in " ".join(capsys.readouterr().out.split())
    assert s3napback.main(["demo", "word"]) == 2
    assert "no NAME is taken: word" in capsys.readouterr().err


def test_an_endpoint_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--endpoint", "http://127.0.0.1:9", "-k", "a", "-s", "b"]  # discard (RFC 863): closed
    assert s3napback.main(["js3tream", "-l", "-b", "b", *where]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "s3napback: cannot list bucket b: no answer from http://127.0.0.1:9"
