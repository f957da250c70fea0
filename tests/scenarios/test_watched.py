"""A month of nights before the eyes of a server that plays healthchecks: some nights are missed,
fail, are locked out, killed or warned of, and the server is slow, dead or out of order. At each
noon the server's verdict, and that of `status`, is what happened."""

import json
import os
import random
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from conftest import Capture, Site, fake_tool, wait_until
from ping_server import Healthchecks, Ping

import s3napback

FIRST = datetime(2026, 12, 18, 3, 0)  # over New Year, where the rotation starts anew
PERIOD, GRACE = timedelta(days=1), timedelta(hours=2)

STORED = {"ok": 0, "warnings": 3}
FATES = {**STORED, "failed": 1, "locked": 75, "bad config": 2, "terminated": 143, "killed": -9}
PROCESSES = ("terminated", "killed")  # that have to be of their own

# tar as the fate of the night has it.
TAR = """\
case $FATE in
warnings) $REAL "$@"; echo "tar: /x: file changed as we read it" >&2; exit 1 ;;
terminated | killed) exec sleep 60 ;;
esac
exec $REAL "$@"
"""


class Month:
    def __init__(self, site: Site, server: Healthchecks) -> None:
        self.site, self.server = site, server
        self.site.settings["PingURL"] = f"{server.url}/nights"
        self.chance = random.Random(13)

    def fates(self) -> list[str]:
        nights = [*FATES, "missed"] * 2 + ["ok"] * 14
        self.chance.shuffle(nights)
        return nights

    def behaviour(self, fate: str) -> str:
        others = ("slow",) if fate in PROCESSES else ("slow", "dead", "500")
        return str(self.chance.choice(["", "", *others]))

    def run(self, fate: str, now: datetime) -> int:
        """The exit status of a night."""
        site = self.site
        (site.data / "file").write_text(f"{now}")
        if fate == "failed":
            site.data.rename(site.folder / "away")
        if fate == "bad config":
            site.jobs += "\n</Cycle>"
        try:
            if fate in PROCESSES:
                return self.process(fate, now)
            if fate == "locked":
                moment = s3napback.Moment.of(now)
                with s3napback.DiffDir(f"{site.folder}/diffs/", moment).lock():
                    return site.run(now=now)
            return site.run(now=now)
        finally:
            site.jobs = f"Directory {site.data}"
            if fate == "failed":
                (site.folder / "away").rename(site.data)

    def process(self, fate: str, now: datetime) -> int:
        code = ("import s3napback, sys\ns3napback.read_logconfig = s3napback.LogConfig\n"
                "sys.exit(s3napback.main(sys.argv[2:], now=float(sys.argv[1])))")
        words = [sys.executable, "-c", code, str(now.timestamp()), "-c", str(self.site.write())]
        before = len(self.server.pings)
        process = subprocess.Popen(
            words, start_new_session=True, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.path.dirname(s3napback.__file__)},
        )
        wait_until(lambda: len(self.server.pings) > before, "the start")
        if fate == "killed":
            os.killpg(process.pid, signal.SIGKILL)
        process.terminate()
        return process.wait(30)


def check_pings(pings: list[Ping], fate: str) -> None:
    """What the server heard of a night."""
    end = ["success"] if fate in STORED else ["fail"] if fate != "killed" else []
    start = [] if fate in ("bad config", "missed") else ["start"]
    assert [one.signal for one in pings] == (start + end if fate != "missed" else []), fate
    assert len({one.run_id for one in pings}) == (fate != "missed"), fate
    said = {"warnings": b" WARN ", "failed": b"does not exist", "locked": b"another run is at work",
            "bad config": b"Unexpected end to block", "ok": b"Finished: 1 stored",
            "terminated": b"ended by SIGTERM"}
    if pings and fate != "killed":
        assert said[fate] in pings[-1].body


@pytest.mark.slow
def test_every_night_is_known_for_what_it_was(
    site: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake_tool(site, monkeypatch, "tar", TAR)
    month, was_heard, last = Month(site, watcher), False, ""
    watcher.seconds = 0.1
    seen: set[tuple[str, str]] = set()
    for number, fate in enumerate(month.fates()):
        now = FIRST + timedelta(days=number)
        noon = now + timedelta(hours=9)
        watcher.pings, before = [], watcher.pings
        watcher.now, watcher.behaviour = now, month.behaviour(fate)
        is_heard = watcher.behaviour in ("", "slow") and fate != "missed"
        monkeypatch.setenv("FATE", fate)
        monkeypatch.setattr(s3napback, "_WATCH_TIMEOUT",
                            0.1 if watcher.behaviour == "dead" else 5.0)
        if fate != "missed":
            assert month.run(fate, now) == FATES[fate], fate
        check_pings(watcher.pings, fate if is_heard else "missed")
        watcher.pings = before + watcher.pings

        was_heard = was_heard or is_heard
        verdict = "down" if was_heard else "new"
        if is_heard and fate in STORED:
            verdict = "up"
        assert watcher.verdict("/nights", noon, PERIOD, GRACE) == verdict, (number, fate)

        last = fate if fate in STORED else "late" if last else ""
        capsys.readouterr()
        status = s3napback.main(
            ["status", "--json", "--grace", "6h", "-c", str(site.write())], now=noon)
        (source,) = json.loads(capsys.readouterr().out)["sources"]
        assert source["verdict"] == (last or "never"), (number, fate)
        assert status == {"late": 3, "": 1}.get(last, 0)
        seen.add((fate, watcher.behaviour))
    assert {fate for fate, _ in seen} == {*FATES, "missed"}
    assert {behaviour for _, behaviour in seen} == {"", "slow", "dead", "500"}
