"""Starts the program again and again, each time as a process of its own, without its start-up cost.

A line of JSON on standard input is one call: its words, environment, the night that it is, and
the file for what it says. It is forked from this process, which has loaded everything already, and
leads a session of its own. Standard output gets its PID, and at its end its status as subprocess
gives it. Only time is made up: the date, and how long pauses and time-outs last.
"""

import json
import os
import sys
import time
from datetime import datetime
from typing import Any

import boto3
import botocore.session

import s3napback


def child(call: dict[str, Any]) -> int:
    os.setsid()
    os.environ.clear()
    os.environ.update(call["env"])
    time.tzset()
    said = os.open(call["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    s3napback._FIRST_PAUSE, s3napback._MAX_PAUSE = 0.005, 0.1
    s3napback._CONNECT_TIMEOUT, s3napback._READ_TIMEOUT = 2.0, 0.4
    s3napback.read_logconfig = lambda: s3napback.LogConfig("", "")
    return s3napback.main(call["argv"], now=datetime.fromisoformat(call["now"]))


def main() -> None:
    boto3.session.Session().client("s3", region_name="us-east-1")  # what it reads stays cached
    botocore.session.get_session()
    for line in sys.stdin:
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


if __name__ == "__main__":
    main()
