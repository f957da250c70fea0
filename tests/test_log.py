"""Section 19: log4perl's property files on Python's logging."""

import base64
import logging
import os
import re
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ESC, Capture, Site, leave_out, require_tool
from hypothesis import given
from hypothesis import strategies as st

import s3napback

log = logging.getLogger("Backup.S3napback")
directory = logging.getLogger("Backup.S3napback.Directory")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    s3napback.close_log()


def opened(text: str, debug: bool = False) -> list[str]:
    return s3napback.open_log(s3napback.LogConfig(text, "log.conf"), debug=debug)


def appender(name: str, kind: str, **options: str) -> str:
    lines = [f"log4perl.appender.{name} = {kind}"]
    lines += [f"log4perl.appender.{name}.{k.replace('__', '.')} = {v}" for k, v in options.items()]
    return "\n".join(lines) + "\n"


SCREEN = "log4perl.rootLogger = INFO, S\n" + appender("S", "Log::Log4perl::Appender::Screen")
DATE = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("%d %c %p %m%n", DATE + r" Backup\.S3napback\.Directory WARN a b\n"),
        ("%-7p|%7p|%.2p|%-6.3p|", r"WARN   \|   WARN\|WA\|WAR   \|"),
        ("%c{1} %c{2} %c{9} %C", r"Directory S3napback\.Directory Backup\.S3napback\.Directory "
                                 r"Backup::S3napback::Directory"),
        ("%d{HH:mm:ss,SSS} %d{yyyy-MM-dd}", r"\d\d:\d\d:\d\d,\d{3} \d{4}-\d\d-\d\d"),
        ("%d{ISO8601}", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"),
        ("%d{EEE, dd MMM yy, h a %e}", r"\w{3}, \d\d \w{3} \d\d, \d+ [AP]M %\d+"),
        ("%F %L %M", r"\S+test_log\.py \d+ test_each_\w+"),
        ("%l", r"test_each_\w+ test_log\.py \(\d+\)"),
        ("%H %P %r", r"HOST PID \d+"),
        ("%x %X{k} %T %% %m{chomp}", r"\[undef\] \[undef\] .*test_log\.py line \d+ % a b"),
        ("%q and %", "%q and %"),
    ],
)
def test_each_conversion_of_a_pattern_is_that_of_log4perl(
    pattern: str, expected: str, capsys: Capture
) -> None:
    problems = opened(SCREEN + "log4perl.appender.S.layout = PatternLayout\n"
                               f"log4perl.appender.S.layout.ConversionPattern = {pattern}\n")
    assert bool(problems) == ("%q" in pattern)
    directory.warning("a %s", "b")
    expected = expected.replace("HOST", re.escape(socket.gethostname()))
    expected = expected.replace("PID", str(os.getpid()))
    assert re.fullmatch(expected, capsys.readouterr().err)


def test_the_simple_layout_shows_level_and_message(capsys: Capture) -> None:
    opened(SCREEN + "log4perl.appender.S.layout = Log::Log4perl::Layout::SimpleLayout\n", True)
    for level in (5, 10, 20, 30, 40, 50):
        log.log(level, "m")
    said = capsys.readouterr().err.split("\n")
    assert said == ["DEBUG - m", "INFO - m", "WARN - m", "ERROR - m", "FATAL - m", ""]


def test_a_file_as_users_have_it(tmp_path: Path, capsys: Capture) -> None:
    """Levels, two appenders, a min_level under another spelling of a name, comments, blanks."""
    text = f"""
log4perl.rootLogger    =   DEBUG, Screen,  Logfile

! a comment of Java's
log4perl.appender.Screen        = Log::Log4perl::Appender::Screen
log4perl.appender.Screen.min_level=info
log4perl.appender.Screen.layout = Log::Log4perl::Layout::PatternLayout
log4perl.appender.Screen.layout.ConversionPattern = %p %m%n
dir = {tmp_path}
log4perl.appender.Logfile = Log::Log4perl::Appender::File
log4perl.appender.LogFile.min_level=info
log4perl.appender.Logfile.filename = \\
    ${{dir}}/my.log
log4perl.appender.Logfile.mode = append
log4perl.appender.Logfile.layout = Log::Log4perl::Layout::PatternLayout
log4perl.appender.Logfile.layout.ConversionPattern = %c %m%n
log4perl.logger.Backup.S3napback = INFO
log4perl.logger.Backup::S3napback::Directory = WARN
"""
    (tmp_path / "my.log").write_text("before\n")
    assert opened(text) == []
    log.debug("no")
    log.info("yes")
    directory.info("no")
    # Past the logger: pytest's own capture cannot pass such a name on.
    record = directory.makeRecord(directory.name, 30, "", 0, "ż \udcfc", (), None)
    for handler in logging.getLogger("Backup").handlers:
        if isinstance(handler.formatter, s3napback.PatternFormatter):
            handler.handle(record)
    logging.getLogger("botocore").warning("not ours")
    assert capsys.readouterr().err == "INFO yes\nWARN ż \\udcfc\n"
    assert (tmp_path / "my.log").read_bytes() == (
        "before\nBackup.S3napback yes\nBackup.S3napback.Directory ż ".encode() + b"\xfc\n"
    )


def test_the_stock_file_is_good() -> None:
    path = Path(s3napback.__file__).parent / "s3napback.logconfig"
    text = path.read_text()
    assert s3napback.LogConfig(text, str(path)).problems == []
    uncommented = re.sub(r"^#(log4perl)", r"\1", text, flags=re.MULTILINE)
    config = s3napback.LogConfig(uncommented, str(path))
    assert config.problems == []
    assert set(config.appenders) == {"Screen", "Logfile", "Detail", "Email", "Syslog"}


def test_additivity_and_threshold_are_heeded(capsys: Capture) -> None:
    opened(
        SCREEN + appender("D", "Log::Log4perl::Appender::Screen", stderr="0", Threshold="ERROR")
        + "log4perl.logger.Backup.S3napback.Directory = INFO, D\n"
        "log4perl.additivity.Backup.S3napback.Directory = 0\n"
    )
    directory.warning("below the threshold")
    directory.error("to standard output only")
    log.info("to standard error")
    out, err = capsys.readouterr()
    assert out.endswith("ERROR to standard output only\n")
    assert len(out.splitlines()) == 1
    assert err.endswith("INFO to standard error\n")
    assert len(err.splitlines()) == 1


def test_debug_on_the_command_line_wins(capsys: Capture) -> None:
    opened(SCREEN + "log4perl.logger.Backup.S3napback.Directory = ERROR\n", debug=True)
    directory.debug("detail")
    assert "DEBUG detail" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("log4perl.rootLogger = LOUD, S\n" + appender("S", "Log::Log4perl::Appender::Screen"),
         "log.conf:1: level LOUD is unknown"),
        ("log4perl.rootLogger = INFO, S, T\n" + appender("S", "Log::Log4perl::Appender::Screen"),
         "appender T is used and not defined"),
        (SCREEN + appender("X", "Log::Log4perl::Appender::DBI"),
         "appender class Log::Log4perl::Appender::DBI is unknown; X is left out"),
        (SCREEN + appender("X", "Log::Log4perl::Appender::File"), "appender X has no filename"),
        (SCREEN + appender("X", "Log::Dispatch::Email::MailSend"), "appender X has no to"),
        (SCREEN + "log4perl.appender.S.layout = My::Layout\n", "layout My::Layout of S is unknown"),
        (SCREEN + "log4perl.appender.S.x = sub { die }\n", "Perl code in appender.S.x is not run"),
        ("nonsense", "no appender can be used; logging to the screen only"),
    ],
)
def test_what_is_wrong_is_told_and_the_rest_is_used(
    text: str, problem: str, capsys: Capture
) -> None:
    problems = opened(text)
    assert any(problem in p for p in problems)
    log.info("still here")
    assert "still here" in capsys.readouterr().err


ROTATE = "Log::Dispatch::FileRotate"


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("Log::Log4perl::Appender::File", {"filename": "/nowhere/x.log"},
         "cannot write log file /nowhere/x.log: No such file or directory"),
        (ROTATE, {"filename": "{}/x", "size": "big"}, "cannot write log file"),
        (ROTATE, {"filename": "{}/x", "DatePattern": "weekly"}, "DatePattern weekly is unknown"),
        ("Log::Dispatch::Syslog", {"socket": "/nowhere/log"}, "cannot log to X"),
        ("Log::Dispatch::Syslog", {"facility": "beer"}, "facility beer is unknown"),
    ],
)
def test_a_log_that_cannot_be_opened_is_a_warning(
    kind: str, options: dict[str, str], problem: str, tmp_path: Path, capsys: Capture
) -> None:
    options = {k: v.replace("{}", str(tmp_path)) for k, v in options.items()}
    (only,) = opened("log4perl.rootLogger = INFO, X\n" + appender("X", kind, **options))
    assert problem in only
    log.info("on the screen")
    assert "on the screen" in capsys.readouterr().err


def test_a_disk_that_fills_is_told_once(capsys: Capture) -> None:
    opened("log4perl.rootLogger = INFO, F\n"
           + appender("F", "Log::Log4perl::Appender::File", filename="/dev/full"))
    for _ in range(3):
        log.info("x" * 100)
    said = capsys.readouterr().err
    assert said.count("cannot write to the log F") == 1
    assert "Traceback" not in said


def test_a_closed_screen_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    opened(SCREEN)
    monkeypatch.setattr(sys, "stderr", None)
    log.info("to nobody")


def test_a_log_file_has_the_mode_and_umask_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("old\n")
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", "Log::Log4perl::Appender::File", filename=str(file), mode="write"))
    log.info("new")
    assert "old" not in file.read_text()
    other = tmp_path / "y.log"
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", "Log::Log4perl::Appender::File", filename=str(other), umask="0077"))
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", ["append", ">>", ">", "write"])
def test_a_log_is_appended_to_written_anew_or_clobbered_as_told(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("old\n")
    assert not opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", "Log::Dispatch::File", filename=str(file), mode=mode))
    log.info("new")
    assert ("old" in file.read_text()) == (mode in ("append", ">>"))


def test_a_log_is_rotated_by_its_size(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", ROTATE, filename=str(file), size="1_00", max="2", layout="SimpleLayout"))
    for n in range(12):
        log.info("%d %s", n, "x" * 30)  # 40 bytes a line, two to a file
    files = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert set(files) == {"x.log", "x.log.1", "x.log.2"}
    assert "10 x" in files["x.log"]
    assert "8 x" in files["x.log.1"]
    assert "6 x" in files["x.log.2"]


def test_a_log_is_rotated_by_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.log"
    file.write_text("yesterday's\n")
    os.utime(file, (time.time() - 86400,) * 2)
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", ROTATE, filename=str(file), DatePattern="yyyy-ww;yyyy-MM-dd", max="3"))
    log.info("today")
    log.info("today, too")
    assert (tmp_path / "x.log.1").read_text() == "yesterday's\n"
    assert len(file.read_text().splitlines()) == 2
    record = log.makeRecord(log.name, 20, "", 0, "tomorrow", (), None)
    record.created += 86400
    log.handle(record)
    assert "today, too" in (tmp_path / "x.log.1").read_text()
    assert "yesterday" in (tmp_path / "x.log.2").read_text()


def test_a_log_that_cannot_be_rotated_goes_on(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "x.log"
    (tmp_path / "x.log.1" / "in the way").mkdir(parents=True)
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", ROTATE, filename=str(file), size="100", layout="SimpleLayout"))
    for n in range(12):
        log.info("%d %s", n, "x" * 30)
    assert len(file.read_text().splitlines()) == 12
    assert capsys.readouterr().err == "s3napback: cannot rotate the log F: Is a directory\n"


def test_a_rotating_log_that_was_moved_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    opened("log4perl.rootLogger = INFO, F\n" + appender("F", ROTATE, filename=str(file)))
    log.info("before")
    file.rename(tmp_path / "x.old")  # by logrotate, with nocreate
    log.info("behind")
    log.info("and on")
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", [ROTATE, "Log::Log4perl::Appender::File"])
def test_a_log_whose_folder_comes_back_goes_on(kind: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    opened("log4perl.rootLogger = INFO, F\n" + appender("F", kind, filename=f"{folder}/x.log"))
    log.info("before")
    folder.rename(tmp_path / "away")
    log.info("lost")
    log.info("lost, too")
    folder.mkdir()
    log.info("behind")
    log.info("and on")
    assert len((folder / "x.log").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("cannot write to the log F") == 1


def test_two_runs_rotate_one_log(tmp_path: Path) -> None:
    """Each goes on in the new file when the other one has rotated, and does not rotate again."""
    file = tmp_path / "x.log"
    file.write_text("yesterday's\n")
    os.utime(file, (time.time() - 86400,) * 2)
    config = s3napback.LogConfig("log4perl.rootLogger = INFO, F\n" + appender(
        "F", ROTATE, filename=str(file), DatePattern="yyyy-MM-dd", max="3"), "log.conf")
    wanted = config.appenders["F"]
    others = [wanted.make(wanted.options) for _ in range(2)]
    for n, handler in enumerate(others * 2):
        handler.setFormatter(s3napback.PatternFormatter("%m%n"))
        handler.handle(log.makeRecord(log.name, 20, "", 0, f"line {n}", (), None))
    for handler in others:
        handler.close()
    assert file.read_text() == "line 0\nline 1\nline 2\nline 3\n"
    assert (tmp_path / "x.log.1").read_text() == "yesterday's\n"
    assert not (tmp_path / "x.log.2").exists()


class Smtp(socketserver.StreamRequestHandler):
    """As much of a mail server as a client needs."""

    mails: ClassVar[list[str]] = []
    logins: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            if line.upper().startswith(b"EHLO"):
                self.wfile.write(b"250-here\r\n250-AUTH PLAIN\r\n")
            elif line.upper().startswith(b"AUTH"):
                self.logins.append(base64.b64decode(line.split()[-1]))
                self.wfile.write(b"235 welcome\r\n")
                continue
            elif line.upper().startswith(b"DATA"):
                self.wfile.write(b"354 go on\r\n")
                text = b""
                while (part := self.rfile.readline()) != b".\r\n":
                    text += part
                self.mails.append(text.decode())
            elif line.upper().startswith(b"QUIT"):
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 well\r\n")


def test_one_mail_is_sent_at_the_end_by_whom_the_server_knows() -> None:
    Smtp.mails.clear()
    Smtp.logins.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = "log4perl.rootLogger = INFO, M\n" + appender(
            "M", "Log::Dispatch::Email::MailSender", to="a@example.com, b@example.com",
            subject="the log", smtp=f"127.0.0.1:{server.server_address[1]}", min_level="warning",
            authid="me", authpwd="geheim",
            **{"from": "me@example.com"},
        )
        opened(config)
        log.info("too little")
        s3napback.close_log()
        assert Smtp.mails == []
        opened(config)
        log.warning("first ż")
        log.error("second")
        s3napback.close_log()
        server.shutdown()
    assert Smtp.logins == [b"\0me\0geheim"]
    (mail,) = Smtp.mails
    assert "Subject: the log" in mail
    assert "To: a@example.com, b@example.com" in mail
    assert "ERROR second" in mail


def test_a_mail_that_cannot_be_sent_is_one_line(capsys: Capture) -> None:
    opened("log4perl.rootLogger = INFO, M\n" + appender(
        "M", "Log::Dispatch::Email::MailSender", to="a@example.com", smtp="127.0.0.1:9"))
    log.info("x")
    s3napback.close_log()
    said = capsys.readouterr().err
    assert said.startswith("s3napback: cannot send the log to a@example.com: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("status", [0, 1])
def test_a_mail_by_sendmail(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sendmail = tmp_path / "sendmail"
    sendmail.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/mail; cat >> {tmp_path}/mail\n'
                        f'echo "queue is full" >&2\nexit {status}\n')
    sendmail.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name, path="": str(sendmail))
    opened("log4perl.rootLogger = INFO, M\n" + appender(
        "M", "Log::Dispatch::Email::MailSend", to="a@example.com"))
    log.info("żółć")
    s3napback.close_log()
    assert (tmp_path / "mail").read_text().startswith("-t -oi\nTo: a@example.com\nFrom: root@")
    failed = f"cannot send the log to a@example.com: {sendmail}: queue is full"
    assert (failed in capsys.readouterr().err) == bool(status)


def test_syslog_gets_its_facility_and_level(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "log"))
        assert not opened("log4perl.rootLogger = INFO, S\n" + appender(
            "S", "Log::Dispatch::Syslog", socket=str(tmp_path / "log"), facility="daemon",
            ident="me", layout="PatternLayout", layout__ConversionPattern="%m"))
        log.warning("hello")
        assert server.recv(999) == b"<28>me: hello"
    # What goes by UDP asks for no answer: nobody needs to listen.
    assert not opened("log4perl.rootLogger = INFO, S\n" + appender(
        "S", "Log::Dispatch::Syslog", socket="udp"))


# ---- side by side with log4perl itself ----

PERL = """
use Log::Log4perl;
Log::Log4perl->init($ARGV[0]);
for my $level (qw(debug info warn error fatal)) {
    for my $name ("Backup::S3napback", "Backup::S3napback::Directory") {
        Log::Log4perl::get_logger($name)->$level("$level\\nof $name\\n");
    }
}
"""
FILE = "log4perl.rootLogger = DEBUG, F\n" + appender(
    "F", "Log::Log4perl::Appender::File", filename="${OUT}")
PATTERN = "log4perl.appender.F.layout = PatternLayout\n" \
    "log4perl.appender.F.layout.ConversionPattern = %p|%m%n\n"
RANGE = FILE + PATTERN + "log4perl.appender.F.Filter = R\n" \
    "log4perl.filter.R = Log::Log4perl::Filter::LevelRange\n"
MATCH = FILE + PATTERN + "log4perl.appender.F.Filter = M\n" \
    "log4perl.filter.M = Log::Log4perl::Filter::LevelMatch\nlog4perl.filter.M.LevelToMatch = WARN\n"


def pattern(text: str) -> str:
    return FILE + PATTERN.replace("%p|%m%n", text)


@pytest.mark.parametrize(
    "text",
    [
        RANGE + "log4perl.filter.R.LevelMin = INFO\nlog4perl.filter.R.LevelMax = ERROR\n",
        RANGE + "log4perl.filter.R.LevelMin = WARN\nlog4perl.filter.R.AcceptOnMatch = false\n",
        RANGE + "log4perl.filter.R.LevelMax = WARN\nlog4perl.filter.R.AcceptOnMatch = true\n",
        MATCH,
        MATCH + "log4perl.filter.M.AcceptOnMatch = 0\n",
        FILE + PATTERN + "log4perl.threshold = WARN\n",
        FILE + PATTERN + "log4perl.threshold = INFO\nlog4perl.appender.F.Threshold = ERROR\n",
        FILE + PATTERN + "log4perl.threshold = ERROR\nlog4perl.appender.F.Threshold = INFO\n",
        FILE + PATTERN + "log4perl.appender.F.header_text = made by s3napback\n",
        FILE.replace("rootLogger = DEBUG", "logger = INFO") + PATTERN,
        FILE + PATTERN + "log4perl.logger.Backup::S3napback::Directory = WARN, F\n"
        "log4perl.additivity.Backup.S3napback.Directory = false\n",
        FILE + "; a comment\n" + PATTERN,
        FILE.replace("${OUT}", "${ OUT }") + "log4perl.appender.F.layout = SimpleLayout\n",
        FILE.replace("log4perl.", "l4p.") + "log4perl.appender.F.layout = NoopLayout\n",
        "level = WARN\n" + FILE.replace("DEBUG", "${level}")
        + "log4perl.appender.F.layout = PatternLayout\n",
        FILE + PATTERN.replace("Layout\n", "Layout::Multiline\n"),
        pattern("%p{1} %p{3} %5.2p %-7p| %c{1} %c{2} %c{7} %c %% %t %x %m{chomp}%n"),
        pattern("%p %m{indent}%n"),
        pattern("%c %m{indent=3}%n"),
        pattern("%c %p: %m{chomp,indent=2}\\n"),
        pattern("> %m{chomp, indent}%n"),
        pattern("%d{yyyy 'o''clock' yy y MMMM MMM MM M} %m%n"),
        pattern("%d{dd d EEEE EEE G DDD a '%H'} %p%n"),
        pattern("%d{'T'yyyy-MM-dd'Z'} %d{yyyy}%n"),
    ],
)
def test_a_log_is_the_same_as_log4perls(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tool("perl")
    if subprocess.run(["perl", "-MLog::Log4perl", "-e", "1"], capture_output=True).returncode:
        leave_out("Log::Log4perl is not installed")
    (tmp_path / "log.conf").write_text(text)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    env = {**os.environ, "OUT": str(theirs)}
    done = subprocess.run(["perl", "-e", PERL, str(tmp_path / "log.conf")], env=env,
                          capture_output=True, text=True)
    assert not done.stderr
    assert not s3napback.open_log(s3napback.LogConfig(text, "log.conf", {"OUT": str(ours)}))
    for level in (10, 20, 30, 40, 50):
        name = {10: "debug", 20: "info", 30: "warn", 40: "error", 50: "fatal"}[level]
        for logger in (log, directory):
            logger.log(level, "%s\nof %s\n", name, logger.name.replace(".", "::"))
    s3napback.close_log()
    assert ours.read_text() == theirs.read_text()
    assert ours.read_text()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("log4perl.appender.S.threshold = WARN", "appender.S.threshold is not understood"),
        ("log4perl.appender.S.trigger = now", "appender.S.trigger is not understood"),
        ("log4perl.oneMessagePerAppender = 1", "oneMessagePerAppender is not understood"),
        ("log4perl.rootLoger = WARN, S", "rootLoger is not understood"),
        ("log4perl.appender.Typo.filename = /x", "appender.Typo.filename is not understood"),
        ("log4perl.appender.S.layout.cspec.U = 1", "appender.S.layout.cspec.U is not understood"),
        ("log4perl.appender.S.x = sub{ die }", "Perl code in appender.S.x is not run"),
        ("log4perl.appender.S.stderr = ${NOWHERE}", "the variable NOWHERE has no value"),
        ("log4perl.appender.S.Filter = F", "filter F is not defined; everything passes"),
        ("log4perl.filter.B = Log::Log4perl::Filter::Boolean\nlog4perl.filter.B.logic = A || C",
         "filter class Log::Log4perl::Filter::Boolean is unknown; it lets everything pass"),
        ("log4perl.appender.S.Threshold = LOUD", "level LOUD is unknown"),
        ("what is this", "this line is no NAME = VALUE"),
        ("log4perl.appender.S.stderr = 1\nlog4perl.appender.S.stderr = 0",
         "appender.S.stderr is given again; the last value counts"),
        ("log4perl.appender.S.layout = PatternLayout\n"
         "log4perl.appender.S.layout.ConversionPattern = %d{'x} %I %d{WW} %m%n",
         "%I in the pattern is not understood"),
    ],
)
def test_what_is_not_understood_is_told_with_its_line(
    line: str, problem: str, capsys: Capture
) -> None:
    problems = opened(SCREEN + line + "\n")
    assert any(p.startswith("log.conf:") and problem in p for p in problems), problems
    log.info("still here")
    assert "still here" in "".join(capsys.readouterr())


def test_dates_may_be_in_utc(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert not opened(
            SCREEN + "log4perl.utcDateTimes = 1\nlog4perl.appender.S.layout = PatternLayout\n"
            "log4perl.appender.S.layout.ConversionPattern = %d{yyyy-MM-dd'T'HH:mm Z}%n\n"
        )
        log.info("x")
    finally:
        monkeypatch.undo()
        time.tzset()
    now = time.strftime("%Y-%m-%dT%H:%M +0000", time.gmtime())
    assert capsys.readouterr().err.strip()[:13] == now[:13]


def test_a_log_folder_is_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.log"
    assert not opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", "Log::Log4perl::Appender::File", filename=str(file), mkpath="1", syswrite="1"))
    log.info("x")
    assert "INFO x" in file.read_text()


def test_a_pattern_shows_the_milliseconds_since_the_line_before(capsys: Capture) -> None:
    opened(SCREEN + "log4perl.appender.S.layout = PatternLayout\n"
           "log4perl.appender.S.layout.ConversionPattern = %R%n\n")
    log.info("x")
    time.sleep(0.05)
    log.info("y")
    assert 40 <= int(capsys.readouterr().err.split()[-1]) < 5000


def test_a_log_that_was_moved_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", "Log::Log4perl::Appender::File", filename=str(file)))
    log.info("one")
    file.rename(tmp_path / "x.log.1")
    log.info("two")
    assert "two" in file.read_text()
    assert "two" not in (tmp_path / "x.log.1").read_text()


def test_the_least_and_highest_levels_of_log_dispatch_are_heeded(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    opened("log4perl.rootLogger = DEBUG, F\n" + appender(
        "F", "Log::Dispatch::File", filename=str(file), min_level="notice", max_level="critical",
        layout="SimpleLayout"))
    for level in (10, 20, 30, 40, 50):
        log.log(level, "m")
    assert file.read_text() == "WARN - m\nERROR - m\n"


@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.tuples(
                st.sampled_from(["rootLogger", "logger.A.B", "appender.X", "appender.X.layout",
                                 "appender.X.Threshold", "additivity.A", "appender.X.size"]),
                st.one_of(st.text(max_size=20), st.sampled_from(
                    ["INFO, X", ROTATE, "Log::Log4perl::Appender::Screen", "sub { 1 }", "${x}"])),
            )
        ).map(lambda pairs: "\n".join(f"log4perl.{k} = {v}" for k, v in pairs)),
    )
)
def test_no_text_breaks_the_parser(text: str) -> None:
    config = s3napback.LogConfig(text, "x")
    s3napback.open_log(config)
    assert logging.getLogger("Backup").handlers


@given(st.text(max_size=40))
def test_no_pattern_breaks_the_formatter(pattern: str) -> None:
    record = logging.LogRecord("a.b", 20, "x.py", 1, "m", (), None)
    s3napback.PatternFormatter(f"%d{{{pattern}}} {pattern}").format(record)


def test_a_log_config_that_is_a_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "__file__", str(tmp_path / "s3napback.py"))
    assert not s3napback.read_logconfig().problems
    (tmp_path / "s3napback.logconfig").mkdir()
    assert "logging to the screen only" in s3napback.read_logconfig().problems[0]


def test_the_log_moves_no_cursor_either(site: Site, svn_repo_factory: Any, capsys: Any) -> None:
    """The names of a SubversionDir's repositories are their owners' choice."""
    (site.folder / "svn").mkdir()
    svn_repo_factory(site.folder / "svn" / f"x{ESC}", 1)
    site.jobs = f"SubversionDir {site.folder}/svn"
    assert site.run() == 0
    said = capsys.readouterr().err
    assert "x\\x1b]0;owned\\x07" in said
    assert "\x1b" not in said
