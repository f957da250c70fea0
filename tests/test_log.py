"""Section 13: log4perl's property files on Python's logging."""

import logging
import os
import re
import socket
import socketserver
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
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
    return s3napback.open_log(s3napback.parse_logconfig(text, "log.conf"), debug=debug)


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
        ("%F %L %M", r"\S+test_log\.py \d+ test_patterns"),
        ("%l", r"test_patterns test_log\.py \(\d+\)"),
        ("%H %P %r", r"HOST PID \d+"),
        ("%x %X{k} %T %% %m{chomp}", r"\[undef\] \[undef\] .*test_log\.py line \d+ % a b"),
        ("%q and %", "%q and %"),
    ],
)
def test_patterns(pattern: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not opened(SCREEN + f"log4perl.appender.S.layout = PatternLayout\n"
                               f"log4perl.appender.S.layout.ConversionPattern = {pattern}\n")
    directory.warning("a %s", "b")
    expected = expected.replace("HOST", re.escape(socket.gethostname()))
    expected = expected.replace("PID", str(os.getpid()))
    assert re.fullmatch(expected, capsys.readouterr().err)


def test_simple_layout_and_level_names(capsys: pytest.CaptureFixture[str]) -> None:
    opened(SCREEN + "log4perl.appender.S.layout = Log::Log4perl::Layout::SimpleLayout\n", True)
    for level in (5, 10, 20, 30, 40, 50):
        log.log(level, "m")
    said = capsys.readouterr().err.split("\n")
    assert said == ["DEBUG - m", "INFO - m", "WARN - m", "ERROR - m", "FATAL - m", ""]


def test_a_file_as_users_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    for handler in s3napback._open_handlers:
        handler.handle(record)
    logging.getLogger("botocore").warning("not ours")
    assert capsys.readouterr().err == "INFO yes\nWARN ż \\udcfc\n"
    assert (tmp_path / "my.log").read_bytes() == (
        "before\nBackup.S3napback yes\nBackup.S3napback.Directory ż ".encode() + b"\xfc\n"
    )


def test_the_stock_file_is_good() -> None:
    path = Path(s3napback.__file__).parent / "s3napback.logconfig"
    text = path.read_text()
    assert s3napback.parse_logconfig(text, str(path)).problems == ()
    uncommented = re.sub(r"^#(log4perl)", r"\1", text, flags=re.MULTILINE)
    config = s3napback.parse_logconfig(uncommented, str(path))
    assert config.problems == ()
    assert set(config.appenders) == {"Screen", "Logfile", "Email", "Syslog"}


def test_additivity_and_threshold(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_debug_wins(capsys: pytest.CaptureFixture[str]) -> None:
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
    text: str, problem: str, capsys: pytest.CaptureFixture[str]
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
    kind: str, options: dict[str, str], problem: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {k: v.replace("{}", str(tmp_path)) for k, v in options.items()}
    (only,) = opened("log4perl.rootLogger = INFO, X\n" + appender("X", kind, **options))
    assert problem in only
    log.info("on the screen")
    assert "on the screen" in capsys.readouterr().err


def test_a_disk_that_fills_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_file_modes_and_umask(tmp_path: Path) -> None:
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


def test_rotation_by_size(tmp_path: Path) -> None:
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


def test_rotation_by_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.log"
    file.write_text("yesterday's\n")
    os.utime(file, (time.time() - 86400,) * 2)
    opened("log4perl.rootLogger = INFO, F\n" + appender(
        "F", ROTATE, filename=str(file), DatePattern="yyyy-ww;yyyy-MM-dd", TZ="UTC", max="3"))
    log.info("today")
    log.info("today, too")
    assert (tmp_path / "x.log.1").read_text() == "yesterday's\n"
    assert len(file.read_text().splitlines()) == 2
    record = log.makeRecord(log.name, 20, "", 0, "tomorrow", (), None)
    record.created += 86400
    log.handle(record)
    assert "today, too" in (tmp_path / "x.log.1").read_text()
    assert "yesterday" in (tmp_path / "x.log.2").read_text()


class Smtp(socketserver.StreamRequestHandler):
    """As much of a mail server as a client needs."""

    mails: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            if line.upper().startswith(b"DATA"):
                self.wfile.write(b"354 go on\r\n")
                text = b""
                while (part := self.rfile.readline()) != b".\r\n":
                    text += part
                self.mails.append(text.decode())
            elif line.upper().startswith(b"QUIT"):
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 well\r\n")


def test_one_mail_at_the_end() -> None:
    Smtp.mails.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = "log4perl.rootLogger = INFO, M\n" + appender(
            "M", "Log::Dispatch::Email::MailSender", to="a@example.com, b@example.com",
            subject="the log", smtp=f"127.0.0.1:{server.server_address[1]}", min_level="warning",
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
    (mail,) = Smtp.mails
    assert "Subject: the log" in mail
    assert "To: a@example.com, b@example.com" in mail
    assert "ERROR second" in mail


def test_a_mail_that_cannot_be_sent_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    opened("log4perl.rootLogger = INFO, M\n" + appender(
        "M", "Log::Dispatch::Email::MailSender", to="a@example.com", smtp="127.0.0.1:9"))
    log.info("x")
    s3napback.close_log()
    said = capsys.readouterr().err
    assert said.startswith("s3napback: cannot send the log to a@example.com: ")
    assert len(said.splitlines()) == 1


def test_syslog(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "log"))
        assert not opened("log4perl.rootLogger = INFO, S\n" + appender(
            "S", "Log::Dispatch::Syslog", socket=str(tmp_path / "log"), facility="daemon",
            ident="me", layout="PatternLayout", layout__ConversionPattern="%m"))
        log.warning("hello")
        assert server.recv(999) == b"<28>me: hello"


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
    config = s3napback.parse_logconfig(text, "x")
    assert config.appenders


@given(st.text(max_size=40))
def test_no_pattern_breaks_the_formatter(pattern: str) -> None:
    record = logging.LogRecord("a.b", 20, "x.py", 1, "m", (), None)
    s3napback.PatternFormatter(f"%d{{{pattern}}} {pattern}").format(record)
