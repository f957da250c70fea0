"""SIGTERM at any moment of a run, its first included, leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import Site, require_tool

import s3napback

# Runs the program in forked processes; in each, SIGTERM comes at another one of the lines of Python
# that a run goes through. Prints (status, session, what it said) of each as JSON.
DRIVER = """
import json, os, signal, sys
import s3napback
s3napback.read_logconfig = lambda: s3napback.LogConfig("", "")
conf, points, said = sys.argv[1], int(sys.argv[2]), sys.argv[3]
OURS = ("s3napback.py", "subprocess.py", "contextlib.py", "tempfile.py")

def run(at):
    os.setsid()
    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 2)
    os.dup2(file, 1)
    seen = 0
    def line(frame, event, argument):
        nonlocal seen
        # Python drops what is raised while it takes an object or a generator apart, and no signal
        # comes between a function's last bytecode and its caller.
        names = frame.f_code.co_name, frame.f_back and frame.f_back.f_code.co_name
        if names[0] != "<genexpr>" and "__del__" not in names and event != "return":
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return line
    sys.settrace(lambda frame, event, argument:
                 line(frame, event, argument) if frame.f_code.co_filename.endswith(OURS) else None)
    status = s3napback.main(["-f", "-c", conf])
    sys.settrace(None)
    with open(said + ".count", "w") as file:
        file.write(str(seen))
    return status

def child(at):
    pid = os.fork()
    if not pid:
        status = 70
        try:
            status = run(at)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(said, errors="replace") as file:
        print(json.dumps([at, status, pid, file.read()]), flush=True)

child(0)
child(0)
with open(said + ".count") as file:
    total = int(file.read())
for n in range(points):
    child(1 + total * n // points)
"""


def left_behind(site: Site) -> list[str]:
    """Drafts, files of a folder bucket that are not whole yet, temp files."""
    return [str(path) for path in site.folder.rglob("*")
            if path.name.startswith((".new-", "tmp")) or path.suffix == ".draft"]


def processes(sessions: Iterable[int]) -> str:
    """What still runs, of these sessions."""
    argv = [require_tool("pgrep"), "-l", "-s", ",".join(map(str, sessions))]
    return subprocess.run(argv, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"SafeReplace": "On"}, {"UseTempFile": "On"}], ids=str)
def test_a_signal_at_any_line_leaves_nothing(change: dict[str, str], site: Site) -> None:
    for n in range(5):
        (site.data / str(n)).write_bytes(bytes(range(256)) * 4)
    if "UseTempFile" in change:
        site.jobs = f"<Directory {site.data}>\nUseTempFile On\n</Directory>"
    else:
        site.settings |= change
    driver = site.folder / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(driver), str(site.write()), "24", str(site.folder / "said")],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(s3napback.__file__).parent)},
        capture_output=True, text=True,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == 26, done.stderr
    for at, status, _, said in ends:
        assert status in (0, 3, 143, -15), (at, said)
        assert "Traceback" not in said, (at, said)
    assert sum(status == 143 for _, status, _, _ in ends) > 15
    assert not left_behind(site)
    assert not processes(session for _, _, session, _ in ends)


@pytest.mark.slow
def test_a_signal_in_the_first_tenths_of_a_second(site: Site) -> None:
    script = site.folder / "s3napback.py"
    shutil.copy(s3napback.__file__, script)
    words = [sys.executable, str(script), "-f", "-c", str(site.write())]
    sessions = []
    for milliseconds in (10, 40, 70, 100, 150, 200, 250, 300):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)
        sessions.append(process.pid)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), said
        assert b"Traceback" not in said
    assert not left_behind(site)
    assert not processes(sessions)


def test_a_signal_while_a_stage_is_asked_how_it_does_waits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within `Popen.poll` it would leave a lock behind, on which the tidying up waits for ever."""
    (site.data / "big").write_bytes(bytes(range(256)) * 200)
    inside: list[bool] = []
    poll = subprocess.Popen.poll

    def asked(process: subprocess.Popen[bytes]) -> int | None:
        if not inside:
            inside.append(True)
            signal.raise_signal(signal.SIGTERM)
            for _ in range(10):  # bytecode, between which signals are delivered
                inside.append(True)
            inside[0] = False
        return poll(process)

    monkeypatch.setattr(subprocess.Popen, "poll", asked)
    assert site.run() == 128 + signal.SIGTERM
    assert inside and not inside[0]
