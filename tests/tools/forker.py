"""Runs the program again and again, each time as a process of its own, without its start-up cost.

`Forker` starts this file, which loads everything, as another process, and forks it for each call. A
call is a line of JSON: the words (of which each byte is a letter), the moment that it is, the files
for what it says, and its environment, unless it is the one that was started with. The answer are
its PID and, at its end, its status as subprocess gives it, a line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any


class Forker:
    """folder: where s3napback.py, forker.py and libraries.py are, and notes may be made; or only
    the latter, with the rest in the environment's PYTHONPATH
    env: the environment of all calls, from Python's start on
    wrapped: what stands before the command line
    hasty: the program loses patience soon, and does without a logconfig
    """

    def __init__(
        self, folder: Path, env: Mapping[str, str], *, script: str = "", hasty: bool = False,
        wrapped: Sequence[str] = (),
    ) -> None:
        argv = [*wrapped, sys.executable, script or str(folder / "forker.py"), str(folder)]
        self._process = subprocess.Popen(
            [*argv, *["hasty"] * hasty], env=env, cwd="/", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )

    def start(
        self, words: Sequence[str], now: datetime, out: Path, err: Path,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Starts the program; the PID. Its moment is that of a datetime with a zone, or local."""
        call = {
            "words": [os.fsencode(word).decode("latin-1") for word in words],
            "now": now.timestamp() if now.tzinfo else now.isoformat(),
            "out": str(out), "err": str(err), "env": env and dict(env),
        }
        assert self._process.stdin
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The status of what was started."""
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())


def child(call: dict[str, Any]) -> int:
    import s3napback

    os.setsid()
    if call["env"] is not None:
        os.environ.clear()
        os.environ.update(call["env"])
        time.tzset()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(call["out"], flags, 0o600), 1)
    same = call["err"] == call["out"]
    os.dup2(1 if same else os.open(call["err"], flags, 0o600), 2)
    now = call["now"]
    moment = datetime.fromisoformat(now) if isinstance(now, str) else now
    status = s3napback.main(
        [os.fsdecode(word.encode("latin-1")) for word in call["words"]], now=moment)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def serve(calls: IO[str]) -> None:
    for line in calls:
        pid = os.fork()
        if not pid:
            status = 70
            try:
                status = child(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def main() -> None:
    import boto3
    from libraries import calculate_once

    import s3napback

    calculate_once(setattr, Path(sys.argv[1]))
    boto3.session.Session().client("s3", region_name="us-east-1")  # what it reads stays cached
    if "hasty" in sys.argv:
        s3napback._FIRST_PAUSE, s3napback._MAX_PAUSE = 0.005, 0.1
        s3napback._CONNECT_TIMEOUT, s3napback._READ_TIMEOUT = 2.0, 0.4
        s3napback.read_logconfig = lambda: s3napback.LogConfig("", "")
    serve(sys.stdin)


if __name__ == "__main__":
    main()
