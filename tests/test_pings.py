"""Section 18: what is told of a run to those who watch, and what where they do not listen.

PingURL against a real server that plays healthchecks, MetricsFile against Prometheus' own parser.
"""

import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, program, require_tool, tmpfs, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from ping_server import BODY_LIMIT, Healthchecks
from prometheus_client.parser import text_string_to_metric_families

import s3napback
from s3napback import Outcome, RunReport


@pytest.fixture
def pinged(site: Site, watcher: Healthchecks) -> Site:
    site.settings["PingURL"] = f"{watcher.url}/5f3c-secret"
    return site


# ---------------------------------------------------------------------------------------------
# Pings
# ---------------------------------------------------------------------------------------------

URL = "https://hc.example.com/5f"


@pytest.mark.parametrize(
    ("url", "start", "success", "fail"),
    [
        (URL, f"{URL}/start?rid=7", f"{URL}?rid=7", f"{URL}/fail?rid=7"),
        (f"{URL}/", f"{URL}/start?rid=7", f"{URL}/?rid=7", f"{URL}/fail?rid=7"),
        (f"{URL}?create=1", f"{URL}/start?create=1&rid=7", f"{URL}?create=1&rid=7",
         f"{URL}/fail?create=1&rid=7"),
        ("https://k.example.com/p/t?status=%s&msg=%s&ping=", "",
         "https://k.example.com/p/t?status=up&msg=up&ping=",
         "https://k.example.com/p/t?status=down&msg=down&ping="),
    ],
)
def test_a_signal_goes_into_the_path_or_where_the_url_wants_it(
    url: str, start: str, success: str, fail: str
) -> None:
    targets = [s3napback.ping_target(url, one, "7") for one in ("/start", "", "/fail")]
    assert targets == [start, success, fail]


def test_a_night_is_told_from_its_start_to_its_end(pinged: Site, watcher: Healthchecks) -> None:
    (pinged.folder / "é").mkdir()
    pinged.jobs = f"Directory {pinged.folder}/é"
    assert pinged.run() == 0
    start, end = watcher.pings
    assert (start.check, start.signal, start.body) == ("/5f3c-secret", "start", b"")
    assert (end.check, end.signal, end.method) == ("/5f3c-secret", "success", "POST")
    assert start.run_id == end.run_id != ""
    lines = end.body.decode("utf-8").splitlines()
    assert re.fullmatch(r"\d{4}/\S+ \S+ Backup.S3napback INFO Starting s3napback", lines[0])
    assert "INFO Finished: 1 stored, 0 skipped, 0 failed" in lines[-1]
    assert f"Directory {pinged.folder}/é -> bkt:" in end.body.decode()
    assert pinged.run() == 0  # nothing is left to do
    assert watcher.signals == ["start", "success"] * 2
    assert watcher.pings[-1].run_id != end.run_id


def test_what_is_stored_with_warnings_is_a_success_and_the_log_tells_them(
    pinged: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "tar: /x: file changed as we read it"
    fake_tool(pinged, monkeypatch, "tar", f'$REAL "$@"; echo "{said}" >&2; exit 1')
    assert pinged.run() == 3
    assert watcher.signals == ["start", "success"]
    assert b" WARN " in watcher.pings[-1].body


def test_what_failed_is_told(pinged: Site, watcher: Healthchecks) -> None:
    pinged.jobs += "\nDirectory /absent"
    assert pinged.run() == 1
    assert watcher.signals == ["start", "fail"]
    assert b"directory /absent does not exist" in watcher.pings[-1].body


def test_a_run_that_is_locked_out_is_told(pinged: Site, watcher: Healthchecks) -> None:
    pinged.write()
    with s3napback.DiffDir(f"{pinged.folder}/diffs/", s3napback.Moment.of(NIGHT)).lock():
        assert pinged.run() == 75
    assert watcher.signals[-1] == "fail"
    assert b"another run is at work" in watcher.pings[-1].body


@pytest.mark.parametrize(
    "jobs", ["</Cycle>", "Include /absent", "DiffDir", "Parallel many", "Directory \"/a"]
)
def test_a_bad_config_is_told_to_the_urls_that_can_be_read_in_it(
    pinged: Site, watcher: Healthchecks, jobs: str
) -> None:
    pinged.settings["Bucket"] = "" if jobs == "DiffDir" else "bkt"
    pinged.jobs = f'PingURL "{watcher.url}/second"\n{jobs}\n'
    assert pinged.run() == 2
    assert sorted(watcher.requests)[0].startswith("POST /5f3c-secret/fail?rid=")
    assert {(one.check, one.signal) for one in watcher.pings} == {
        ("/5f3c-secret", "fail"), ("/second", "fail")}


@pytest.mark.parametrize(
    "url", ["hc-ping.com/uuid", "file:///etc/passwd", "ftp://h/x", "http://", "https://h/x#y",
            "https://me:hunter2@h/x", "http://h/\u00e9", "http://h:port/hunter2",
            "http://h:99999/hunter2", "http://h:0/hunter2", "http://[::1::2::3/hunter2"],
)
def test_a_url_that_is_none_is_found_before_anything_runs_and_not_shown(
    pinged: Site, watcher: Healthchecks, url: str, capsys: Capture
) -> None:
    pinged.jobs = f"PingURL {url}\n{pinged.jobs}"
    assert pinged.run() == 2
    said = capsys.readouterr().err
    assert "my.conf:8: PingURL is not a URL that can be used (write https://HOST" in said
    assert "hunter2" not in said
    assert not pinged.archives()
    assert watcher.signals == ["fail"]


def test_several_urls_and_those_who_want_it_in_the_query(
    pinged: Site, watcher: Healthchecks
) -> None:
    pinged.jobs += f"\nPingURL {watcher.url}/a '{watcher.url}/kuma?status=%s&msg=%s'"
    assert pinged.run() == 0
    assert sorted((one.check, one.signal, one.method) for one in watcher.pings) == [
        ("/5f3c-secret", "start", "POST"), ("/5f3c-secret", "success", "POST"),
        ("/a", "start", "POST"), ("/a", "success", "POST"), ("/kuma", "up", "GET"),
    ]
    assert len({one.run_id for one in watcher.pings if one.check != "/kuma"}) == 1


def test_each_config_tells_of_itself_alone(
    pinged: Site, watcher: Healthchecks, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(pinged.folder))
    (pinged.folder / "silent.conf").write_text("Bucket b\n")
    assert s3napback.main(["-c", str(pinged.write()), "silent", "my"], now=NIGHT) == 2
    bodies = [one.body for one in watcher.pings if one.signal == "success"]
    assert b"INFO Starting" in bodies[0]
    assert b"INFO Starting" not in bodies[1]
    assert b"silent.conf" not in bodies[1]
    assert b"already performed today" in bodies[1]


def test_in_test_mode_nobody_is_told(pinged: Site, watcher: Healthchecks, capsys: Capture) -> None:
    pinged.settings["MetricsFile"] = f"{pinged.folder}/m.prom"
    assert pinged.run("-t") == 0
    said = capsys.readouterr().err
    assert f"PingURL at {watcher.url[7:]}: would be told" in said
    assert f"MetricsFile {pinged.folder}/m.prom: would be written" in said
    assert "secret" not in said
    assert not watcher.requests
    assert not (pinged.folder / "m.prom").exists()


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [("500", "500 Internal Server Error"), ("404", "404 Not Found"),
     ("dead", "no answer within|timed out"),
     ("drip", "no answer within|timed out"),
     ("redirect ftp://127.0.0.1/x", "unknown url type: ftp"), ("redirect file:///x", "302"),
     ("redirect /5f3c-secret", "302")],
)
def test_a_ping_that_does_not_arrive_is_a_warning_after_three_tries(
    pinged: Site, watcher: Healthchecks, behaviour: str, why: str, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watcher.behaviour = behaviour
    if behaviour in ("dead", "drip"):
        monkeypatch.setattr(s3napback, "_WATCH_TIMEOUT", 0.1)
    began = time.monotonic()
    assert pinged.run() == 0
    assert time.monotonic() - began < 3
    said = capsys.readouterr().err
    for signal_name in (" /start", ""):
        assert re.search(f"WARN PingURL at {watcher.url[7:]}: the ping{signal_name} did not arrive:"
                         f".*({why})", said)
    assert "secret" not in said.replace("-> bkt", "")
    assert all(re.match(r"[0-9/]{10} ", line) for line in said.splitlines())
    tries = [count for target, count in watcher.tries().items() if target.startswith("POST")]
    assert tries == [3, 3]


def test_many_servers_that_are_dead_are_waited_for_at_once(
    pinged: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher.behaviour = "dead"
    monkeypatch.setattr(s3napback, "_WATCH_TIMEOUT", 0.2)
    pinged.settings["PingURL"] = " ".join(f"{watcher.url}/{number}" for number in range(40))
    began = time.monotonic()
    assert pinged.run() == 0
    assert time.monotonic() - began < 5  # one after the other: 48 seconds


def test_a_quote_that_is_not_closed_does_not_show_the_url(
    site: Site, watcher: Healthchecks, capsys: Capture
) -> None:
    site.settings["PingURL"] = f'"{watcher.url}/5f3c-secret'
    assert site.run() == 2
    said = capsys.readouterr().err
    assert "line 7: a quote is not closed" in said
    assert "secret" not in said


def test_a_proxy_of_the_environment_is_used(
    site: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", watcher.url)
    site.settings["PingURL"] = "http://hc.example.com/5f"
    assert site.run() == 0
    assert watcher.signals == ["start", "success"]
    assert watcher.requests[0].startswith("POST http://hc.example.com/5f/start?rid=")


def test_a_server_whose_certificate_is_nobodys_is_told_nothing(
    site: Site, watcher: Healthchecks, capsys: Capture
) -> None:
    pem = site.folder / "pem"
    subprocess.run(
        [require_tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", f"{pem}.crt"],
        check=True, capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{pem}.crt", pem)
    with Healthchecks.running(context) as secret:
        site.settings["PingURL"] = f"{secret.url}/5f"
        assert site.run() == 0
        assert not secret.requests
    assert "the ping did not arrive: [SSL: CERTIFICATE_VERIFY_FAILED]" in capsys.readouterr().err


def test_nobody_at_all_is_a_warning(site: Site, watcher: Healthchecks, capsys: Capture) -> None:
    watcher.stop()
    site.settings["PingURL"] = f"{watcher.url}/x http://no.such.host.invalid/y"
    assert site.run() == 0
    said = capsys.readouterr().err
    assert "did not arrive: Connection refused\n" in said
    assert "WARN PingURL at no.such.host.invalid: the ping did not arrive: Name or" in said


def test_a_redirect_to_another_page_is_followed(pinged: Site, watcher: Healthchecks) -> None:
    pinged.settings["PingURL"] = f"{watcher.url}/old"
    watcher.behaviour = f"redirect {watcher.url}/new"
    moved = watcher.handle

    def handle(request: Any, body: bytes) -> None:
        if request.path == "/new":
            watcher.behaviour = ""
        moved(request, body)

    watcher.handle = handle  # type: ignore[method-assign]
    assert pinged.run() == 0
    assert watcher.pings[0].check == "/new"


def test_no_backup_waits_for_its_start_to_be_taken(
    pinged: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher.behaviour, watcher.seconds = "slow", 0.6
    stored: list[float] = []
    store_archive = s3napback.store_archive

    def store(*args: Any) -> Outcome:
        outcome = store_archive(*args)
        stored.append(time.monotonic())
        watcher.behaviour = ""
        return outcome

    monkeypatch.setattr(s3napback, "store_archive", store)
    began = time.monotonic()
    assert pinged.run() == 0
    assert stored[0] - began < 0.5 < time.monotonic() - began
    assert watcher.signals == ["start", "success"]  # in this order all the same


def test_of_a_long_log_the_last_lines_are_sent() -> None:
    tail = s3napback.LogTail()

    def say(text: str) -> None:
        tail.handle(logging.LogRecord("Backup.S3napback", 20, "", 0, text, (), None))

    for number in range(3000):
        say(f"é{number}")
    text = tail.text()
    assert BODY_LIMIT - 200 < len(text) <= BODY_LIMIT
    lines = text.decode("utf-8").splitlines()
    assert lines[-1].endswith("INFO é2999")
    assert all(re.fullmatch(r"\d{4}/\S+ \S+ Backup.S3napback INFO é\d+", line) for line in lines)
    say("\udcff" * 30_000)
    say("the end")
    assert re.fullmatch(rb"\S+ \S+ Backup.S3napback INFO the end\n", tail.text())


def test_a_run_that_is_ended_by_a_signal_tells_so(site: Site, watcher: Healthchecks) -> None:
    slow = site.folder / "slow"
    slow.write_text("#!/bin/sh\nread -r start; case $start in s3napback) echo s3napback;; esac\n"
                    "exec cat\n")
    site.settings |= {"PingURL": f"{watcher.url}/x", "Compressor": "gzip",
                      "MetricsFile": f"{site.folder}/m.prom"}
    os.mkfifo(site.data / "pipe")
    site.jobs = f"MySQL {site.folder}/none.sock:x"
    tool = site.folder / "bin" / "mysqldump"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    shutil.copy(s3napback.__file__, site.folder)
    process = subprocess.Popen(
        [sys.executable, f"{site.folder}/s3napback.py", "-c", str(site.write())],
        env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}, stderr=subprocess.PIPE,
    )
    wait_until(lambda: bool(watcher.pings), "the start")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1].count(b"Traceback") == 0
    assert process.returncode == 143
    assert watcher.signals == ["start", "fail"]
    assert watcher.pings[-1].body.endswith(b"\nended by SIGTERM\n")
    assert 's3napback_run_status{config="' in (site.folder / "m.prom").read_text()


def test_a_fault_of_the_program_is_told(
    pinged: Site, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> RunReport:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(s3napback, "run_config", bug)
    with pytest.raises(ZeroDivisionError):
        pinged.run()
    assert watcher.signals == ["start", "fail"]
    assert watcher.pings[-1].body.endswith(b"\na bug\n")


def test_the_hooks_have_run_when_the_end_is_told(pinged: Site, watcher: Healthchecks) -> None:
    pinged.jobs = "OnFailure echo so it is\nDirectory /absent"
    assert pinged.run() == 1
    assert b"INFO so it is\n" in watcher.pings[-1].body


def test_the_server_s_verdicts_are_those_of_healthchecks() -> None:
    """What the tests of nights rely on."""
    server = Healthchecks()
    server.stop()
    hour, day = timedelta(hours=1), timedelta(days=1)

    def verdict(after: timedelta) -> str:
        return server.verdict("/x", NIGHT + after, day, hour)

    def take(one: str, run: str, after: timedelta) -> None:
        from ping_server import Ping

        server.pings.append(Ping("/x", one, run, "POST", b"", NIGHT + after))

    assert verdict(hour) == "new"
    take("start", "1", 0 * hour)
    assert verdict(hour / 2) == "started"
    assert verdict(2 * hour) == "down"
    take("success", "1", hour / 2)
    assert verdict(hour) == "up"
    assert verdict(day + hour) == "late"
    assert verdict(day + 2 * hour) == "down"
    take("start", "2", day)
    assert verdict(day + hour / 2) == "up"
    assert verdict(day + 2 * hour) == "down"
    take("fail", "2", day + hour / 2)
    assert verdict(day + hour) == "down"


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------

Values = dict[tuple[str, str, str], float]


def measured(path: Path) -> Values:
    """(metric without its first word, kind or status, name) → value, as Prometheus reads them."""
    promtool = shutil.which("promtool")
    if promtool:
        done = subprocess.run([promtool, "check", "metrics"], input=path.read_bytes(),
                              capture_output=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    values = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge" and family.documentation.endswith(".")
        for one in family.samples:
            labels = dict(one.labels)
            assert labels.pop("config").startswith("/")
            first, second, *_ = *labels.values(), "", ""
            values[one.name.removeprefix("s3napback_"), first, second] = one.value
    return values


@pytest.fixture
def metrics(site: Site) -> Path:
    path = site.folder / "prom" / "s3napback.prom"
    path.parent.mkdir()
    site.settings["MetricsFile"] = str(path)
    return path


def test_metrics_tell_of_each_job_and_of_the_run(site: Site, metrics: Path) -> None:
    site.jobs += f"\nDirectory /absent\n<Directory {site.folder}/temp>\nFrequency 9\n</Directory>"
    umask = os.umask(0o077)
    try:
        assert site.run() == 1
    finally:
        os.umask(umask)
    assert metrics.stat().st_mode & 0o7777 == 0o644
    assert os.listdir(metrics.parent) == [metrics.name]
    values, data, at = measured(metrics), str(site.data), NIGHT.timestamp()
    archive = next(iter(site.archives().values()))
    assert at <= values["job_last_success_timestamp_seconds", "Directory", data] < at + 30
    assert at <= values["job_last_run_timestamp_seconds", "Directory", "/absent"] < at + 30
    assert values["job_bytes", "Directory", data] == archive.size
    assert 0 < values["job_duration_seconds", "Directory", data] < 30
    assert [values["job_status", "Directory", one] for one in (data, "/absent")] == [0, 1]
    assert ("job_last_success_timestamp_seconds", "Directory", "/absent") not in values
    assert not [key for key in values if key[2].endswith("temp")]  # not due yet
    assert values["run_status", "", ""] == 1
    counts = [values["run_jobs", one, ""] for one in ("ok", "warnings", "failed", "skipped")]
    assert counts == [1, 0, 1, 1]


def test_what_was_not_run_keeps_its_values_and_what_is_gone_goes(
    site: Site, metrics: Path
) -> None:
    due = f"Directory {site.folder}/temp"
    site.jobs = f"<Directory {site.data}>\nFrequency 2\n</Directory>\n{due}\n{due}d"
    (site.folder / "tempd").mkdir()
    assert site.run() == 0  # NIGHT is an even day
    before = measured(metrics)
    site.jobs = f"<Directory {site.data}>\nFrequency 2\n</Directory>\n{due}"
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    after = measured(metrics)
    kept = [key for key in before if key[2] == str(site.data)]
    assert len(kept) == 5
    assert [before[key] for key in kept] == [after[key] for key in kept]
    later = ("job_last_success_timestamp_seconds", "Directory", f"{site.folder}/temp")
    assert after[later] - before[later] > 80_000
    assert {key[2] for key in before} - {key[2] for key in after} == {f"{site.folder}/tempd"}


def report(*outcomes: Outcome, status: int = 0) -> RunReport:
    return RunReport(status, outcomes)


def test_what_is_skipped_since_it_is_there_is_a_success() -> None:
    done = Outcome("Subversion", "/r", "/r-1-DIFF", "skipped")
    text = s3napback.metrics_text("", "/c", report(done), 5.0)
    assert 'job_last_success_timestamp_seconds{config="/c",kind="Subversion",name="/r"} 5\n' in text
    assert "job_status{" not in text
    not_due = Outcome("Subversion", "/r", "", "skipped")
    assert s3napback.metrics_text(text, "/c", report(not_due), 9.0).count(" 5\n") == 1


def test_what_a_hook_skipped_is_no_success(site: Site, metrics: Path) -> None:
    site.jobs = f"<Directory {site.data}>\nRunBefore exit 75\n</Directory>"
    assert site.run() == 0
    values = measured(metrics)
    assert values["run_jobs", "skipped", ""] == 1
    assert not [key for key in values if key[0].startswith("job_")]


def test_a_run_that_did_not_come_to_its_jobs_keeps_them_all() -> None:
    one = Outcome("MySQL", "all", "MySQL/all-1", "ok", "", 7, 0.00004)
    text = s3napback.metrics_text("", "/c", report(one), 5.0)
    after = s3napback.metrics_text(text, "/c", RunReport(2), 6.0)
    assert [line for line in after.splitlines() if "job_" in line] == [
        line for line in text.splitlines() if "job_" in line]
    assert 'run_status{config="/c"} 2\n' in after


@settings(max_examples=40)
@given(st.lists(st.text(), min_size=3, max_size=3))
def test_whatever_a_name_is_the_metrics_can_be_read(names: list[str]) -> None:
    config, kind, name = names
    name = name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    one = Outcome(kind, name, "a", "ok", "", 1, 1e-7)
    text = s3napback.metrics_text("", config, report(one), 5.0)
    text.encode()
    samples = [sample for family in text_string_to_metric_families(text)
               for sample in family.samples]
    assert len(samples) == 5 + 2 + 4
    assert s3napback.metrics_text(text, config, report(one), 5.0) == text


def test_names_reach_the_metrics_as_they_are_but_for_controls(site: Site, metrics: Path) -> None:
    odd = site.folder / 'a "quoted\\ nämé'
    odd.mkdir()
    site.jobs = f"Directory '{odd}' '{site.folder}/\x1b[2J'"
    assert site.run() == 1
    names = {key[2] for key in measured(metrics) if key[1] == "Directory"}
    assert names == {str(odd), f"{site.folder}/\\x1b[2J"}


def test_configs_with_one_file_keep_each_others_metrics(site: Site, metrics: Path) -> None:
    assert site.run() == 0
    first = metrics.read_text()
    other = site.folder / "other.conf"
    shutil.copy(site.conf, other)
    assert s3napback.main(["-c", str(other)], now=NIGHT + timedelta(days=1)) == 0
    both = metrics.read_text()
    assert [line for line in both.splitlines() if "my.conf" in line] == [
        line for line in first.splitlines() if "my.conf" in line]
    assert f'run_status{{config="{other}"}} 0\n' in both


@pytest.mark.parametrize(
    "damage", ["cut here", 's3napback_run_status{config="/a', "other_metric 1", "\0\xff"],
)
def test_a_damaged_file_is_begun_anew(
    site: Site, metrics: Path, damage: str, capsys: Capture
) -> None:
    metrics.write_bytes(damage.encode("latin-1"))
    assert site.run() == 0
    assert f"MetricsFile {metrics} is damaged: it is begun anew" in capsys.readouterr().err
    assert measured(metrics)["run_status", "", ""] == 0


def test_a_folder_that_is_not_there_is_found_before_anything_runs(
    site: Site, capsys: Capture
) -> None:
    assert site.run() == 0
    site.settings["MetricsFile"] = f"{site.folder}/absent/x.prom"
    before = site.state()
    assert site.run("-f") == 2
    assert ("my.conf:7: MetricsFile " f"{site.folder}/absent/x.prom is in a folder that does not"
            f" exist (run: mkdir {site.folder}/absent)") in capsys.readouterr().err
    assert site.state() == before
    assert site.restored().is_dir()  # on another machine there is no such folder


def test_repositories_that_cannot_be_found_keep_their_values(site: Site, metrics: Path) -> None:
    folder = site.folder / "svn"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        subprocess.run([require_tool("svnadmin"), "create", f"{folder}/{name}"], check=True)
    site.jobs = f"SubversionDir {folder}"
    assert site.run() == 0
    folder.rename(site.folder / "away")
    assert site.run() == 1
    kept = {name: value for (metric, _, name), value in measured(metrics).items()
            if metric == "job_status"}
    assert kept == {f"{folder}/a": 0, f"{folder}/b": 0, f"{folder}": 1}
    shutil.rmtree(site.folder / "away" / "b")
    (site.folder / "away").rename(folder)
    assert site.run("-f") == 0
    names = {name for metric, _, name in measured(metrics) if metric == "job_status"}
    assert names == {f"{folder}/a"}


@pytest.mark.parametrize("value", ["", "data"])
def test_what_names_no_file_is_found_before_anything_runs(
    site: Site, value: str, capsys: Capture
) -> None:
    site.jobs += f"\nMetricsFile {value and site.data}"
    assert site.run() == 2
    assert f"MetricsFile {site.data if value else 1} names no file" in capsys.readouterr().err
    assert not site.archives()


def test_a_run_that_is_locked_out_leaves_the_metrics_to_the_one_at_work(
    site: Site, metrics: Path
) -> None:
    assert site.run() == 0
    before = metrics.read_text()
    with s3napback.DiffDir(f"{site.folder}/diffs/", s3napback.Moment.of(NIGHT)).lock():
        assert site.run() == 75
    assert metrics.read_text() == before


def test_metrics_that_cannot_be_written_are_a_warning(site: Site, capsys: Capture) -> None:
    site.settings["MetricsFile"] = "/proc/m.prom"
    assert site.run() == 0
    assert "WARN cannot write MetricsFile /proc/m.prom: " in capsys.readouterr().err


def test_on_a_full_disk_the_old_metrics_stay(site: Site, metrics: Path, capsys: Capture) -> None:
    with tmpfs(metrics.parent, "size=8k"):
        assert site.run() == 0
        before = metrics.read_text()
        (metrics.parent / "filler").write_bytes(bytes(4096))
        assert site.run("-f") == 0
        assert metrics.read_text() == before
        assert len(os.listdir(metrics.parent)) == 2
    said = capsys.readouterr().err
    assert f"WARN cannot write MetricsFile {metrics}: No space left on device" in said


# ---------------------------------------------------------------------------------------------
# --log-json
# ---------------------------------------------------------------------------------------------


def test_the_log_is_an_object_a_line(site: Site, metrics: Path) -> None:
    site.jobs += "\nDirectory /absent\x1b"
    done = program("--log-json", "-c", str(site.write()))
    assert done.returncode == 1
    assert done.stderr == b""
    records = [json.loads(line) for line in done.stdout.decode("ascii").splitlines()]
    assert {"time", "level", "category", "message"} <= set(records[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", records[0]["time"])
    assert records[0]["message"] == "Starting s3napback"
    jobs = [one for one in records if "archive" in one]
    assert [(one["name"], one["status"], one["level"]) for one in jobs] == [
        (str(site.data), "ok", "INFO"), ("/absent\x1b", "failed", "INFO")]
    archive = site.archives()[jobs[0]["archive"]]
    assert jobs[0]["bytes"] == archive.size and 0 < jobs[0]["seconds"] < 30
    assert jobs[0]["category"] == "Backup.S3napback.Directory"
    assert "does not exist" in jobs[1]["error"]


def test_a_logconfig_s_files_go_on_and_its_screens_do_not_mix_in(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "log4perl.rootLogger = INFO, S, F\n"
        "log4perl.logger.Backup.S3napback.Directory = INFO, S\n"
        "log4perl.additivity.Backup.S3napback.Directory = 0\n"
        "log4perl.appender.S = Log::Log4perl::Appender::Screen\n"
        "log4perl.appender.S.stderr = 0\n"
        "log4perl.appender.F = Log::Log4perl::Appender::File\n"
        f"log4perl.appender.F.filename = {site.folder}/log\n"
    )
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig(text, "log"))
    done = program("--log-json", "-c", str(site.write()))
    assert (done.returncode, done.stderr) == (0, b"")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    messages = [one["message"] for one in records]
    assert len(messages) == len(set(messages))
    assert f"Directory {site.data}: ok" in messages  # of a category that is closed, too
    assert "INFO Starting s3napback" in (site.folder / "log").read_text()


def test_a_crash_is_part_of_its_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> Outcome:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(s3napback, "store_archive", bug)
    done = program("--log-json", "-c", str(site.write()))
    assert done.returncode == 1
    messages = [json.loads(line)["message"] for line in done.stdout.splitlines()]
    assert any("fault of this program" in one and "Traceback" in one for one in messages)


def test_without_log_json_no_line_of_it_is_logged(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"Directory {site.data}: ok" not in said.err
