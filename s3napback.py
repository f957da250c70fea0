#!/usr/bin/env python3
"""s3napback: rotating, incremental, compressed, encrypted backups on S3.

Takes the place of s3napback.pl: the same crontab line, the same config file, the same names in
the bucket. It backs up directories, MySQL, PostgreSQL, Subversion and what commands write, and
reads every archive that the Perl script wrote.

    s3napback.py [-c FILE] [-t] [-f] [-d] [NAME...]     back up
    s3napback.py list|find|diff|restore|verify ...      what is in the bucket, and back again
    s3napback.py check|status|plan|policy ...           will it work tonight, did it, and what then
    s3napback.py js3tream -i|-o|-l|-d -b BUCKET[:NAME]  one stream to the bucket, or back
    s3napback.py demo                                   see it work, without an account

NAME stands for /etc/s3napback/NAME.conf or /etc/s3napback/NAME. README.md is the whole manual.

How the data flows; the numbers are the sections below:

    config line -4-> Job -5-> slot, FULL|DIFF -6-> archive name
            job -7-> stages -8-> byte stream -12-> chunks -10-> keys  name-3-FULL:0000000000000 ...
    bucket listing -6-> archives -11-> chain -12-> byte stream -8-> gpg -d | tar x -15-> files

Sections: 1 this manual, 2 Vocabulary, 3 Errors, 4 Config, 5 Cycles and slots, 6 Names, 7 Sources,
8 Processes, 9 Buffers, 10 Stores, 11 Archives, 12 Transfer, 13 DiffDir, 14 Backup, 15 Recovery,
16 Search, 17 Watch, 18 Check, 19 Log, 20 Command line. Nothing uses a section below its own;
main is last.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import copy
import ctypes
import difflib
import errno
import fcntl
import fnmatch
import gc
import getopt
import glob
import hashlib
import io
import itertools
import json
import logging
import logging.handlers
import math
import mmap
import os
import pwd
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache, partial, wraps
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, AnyStr, NamedTuple, NoReturn, Protocol, TypeVar
from warnings import catch_warnings, simplefilter

if TYPE_CHECKING:
    from typing import TypeAlias

__version__ = "2.0.0"

T = TypeVar("T")
Operation = TypeVar("Operation", bound=Callable[..., Any])
Piece: TypeAlias = "bytes | memoryview"

# ==================================================================================================
# 2. Vocabulary
# ==================================================================================================

FULL, DIFF = "FULL", "DIFF"

# The kinds of job, in the order in which a level of the config is worked through: the original's.
DIRECTORY, SUBVERSION, SUBVERSION_DIR, MYSQL, POSTGRESQL, COMMAND = KINDS = (
    "Directory", "Subversion", "SubversionDir", "MySQL", "PostgreSQL", "Command",
)
DUMPS = (MYSQL, POSTGRESQL, COMMAND)  # every archive is a FULL

# What js3tream stored under a name of another shape: a stream that came in, and goes out, as it is.
STREAM = "js3tream"
RETRY_HOURS = 20.0  # js3tream's, with -n

JS3TREAM_CHUNK_SIZE = 5_000_000  # bytes, where -z is not given (its manual)

# Digits of a chunk's number in its key. The manual of js3tream 0.6 shows 13, its program wrote 20;
# we write the manual's and read up to the program's.
CHUNK_DIGITS, MAX_DIGITS = 13, 20

# Limits of S3: bytes of an object of a single PUT, bytes of a key in UTF-8 (Amazon S3 User Guide,
# "Uploading objects", "Naming objects"), keys of a DeleteObjects request and of a listing's page
# (its API Reference).
MAX_CHUNK = 5 * 1024**3
MAX_KEY = 1024
DELETE_BATCH = PAGE = 1000
MAX_PREFIX = 200  # bytes; ours: it leaves a path most of a key

# User metadata on our chunks, without the prefix that S3 puts before them.
META = "s3napback-"

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_WARNINGS = 3
EXIT_LOCKED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_SIGNAL = 128  # plus the signal's number, as shells count it

# Where a NAME on the command line is looked up.
CONFIG_DIR = "/etc/s3napback"

# The original's log categories: of a run, of each kind of job (SubversionDir speaks as Subversion),
# and of the program that it called, which all our commands but the backup use.
log = logging.getLogger("Backup.S3napback")
_LOGS = {kind: log.getChild(kind.removesuffix("Dir")) for kind in KINDS}
_TOOL_LOG = log.getChild("js3tream")


def worst_status(statuses: Iterable[int]) -> int:
    """The exit status that stands for several: that of the worst thing that happened."""
    worst_first = (EXIT_USAGE, EXIT_FAILED, EXIT_LOCKED, EXIT_WARNINGS, EXIT_OK)
    return min(statuses, key=worst_first.index, default=EXIT_OK)


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def without_controls(text: str, keep: str = "\n\t") -> str:
    """The text without escape sequences: names in a bucket, and on a disk, are whatever someone
    wrote there. keep: control characters that stay.

    >>> print(without_controls("/etc" + chr(27)))
    /etc\\x1b
    """
    if text.isprintable():  # nearly always
        return text
    return "".join(
        f"\\x{ord(c):02x}" if c not in keep and (c < " " or "\x7f" <= c < "\xa0") else c
        for c in text
    )


def printable(text: str, keep: str = "\n\t") -> str:
    """The text as a terminal may see it: no escape sequences, no bytes that are not UTF-8."""
    return without_controls(text, keep).encode("utf-8", "backslashreplace").decode()


def shell_word(text: str) -> str:
    """The text as a shell reads it, and a terminal may see it: bash, zsh and ksh know `$'…'`."""
    if printable(text, "") == text:
        return shlex.quote(text)
    letters = (chr(code) if 32 <= code < 127 and code not in b"\\'" else f"\\{code:03o}"
               for code in os.fsencode(text))
    return f"$'{''.join(letters)}'"


def key_text(name: str) -> str:
    """The name as an S3 key can hold it: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def size_text(size: float) -> str:
    """A number of bytes for people, in powers of 1000.

    >>> size_text(999), size_text(1_234_567)
    ('999 bytes', '1.2 MB')
    """
    if size < 1000:
        return f"{size:.0f} bytes"
    power = min(4, int(math.log10(size)) // 3)
    return f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"


def duration_text(seconds: float) -> str:
    """A duration for people.

    >>> duration_text(7.25), duration_text(7384), duration_text(205_860)
    ('7.2 s', '2 h 03 min', '2 d 09 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


# ==================================================================================================
# 3. Errors
# ==================================================================================================


class Failure(Exception):
    """Something the user must know, and never a bug; caught in `main` and around each job.

    message: what happened, lower case unless the original worded it
    hint: what to do
    where: "FILE:LINE", a directive or an archive
    status: the exit status it asks for
    code: S3's, of an answer that refuses
    """

    def __init__(
        self, message: str, hint: str = "", *, where: str = "", status: int = EXIT_FAILED,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.where, self.status = message, hint, where, status
        self.code = code

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text

    def at(self, where: str = "", hint: str = "") -> Failure:
        """A copy of it; what is given takes the place of what it had."""
        copied = copy.copy(self)
        copied.where, copied.hint = where or self.where, hint or self.hint
        return copied


class UsageFailure(Failure):
    """The command line or the config is wrong, or a file that they name: exit status 2."""

    def __init__(self, message: str, hint: str = "", where: str = "") -> None:
        super().__init__(message, hint, where=where, status=EXIT_USAGE)


class TransientFailure(Failure):
    """A transient error; retrying may help."""


class NotFound(Failure):
    """A bucket or a key is not there."""


class Interrupted(BaseException):
    """A signal asked the program to end; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum, self.status = signum, EXIT_SIGNAL + signum


# Within `signals_held`: the signal that came meanwhile, or 0; None outside.
_held_signal: int | None = None

# Whether a signal has asked for the end: then no thread waits for a service any more.
_is_ending = False


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Puts off an `Interrupted` of the main thread until the block ends: for a few short steps that
    belong together, such as starting a process and noting that it has to be ended."""
    global _held_signal
    if threading.current_thread() is not threading.main_thread() or _held_signal is not None:
        yield
        return
    _held_signal = 0
    try:
        yield
    finally:
        signum, _held_signal = _held_signal, None
        if signum:
            raise Interrupted(signum)


@contextlib.contextmanager
def failures_at(where: str) -> Iterator[None]:
    """Gives a Failure that is raised within it a place, if it has none; see `Failure`."""
    try:
        yield
    except Failure as failure:
        raise failure.at(failure.where or where) from failure


def os_failure(error: OSError, doing: str, hint: str = "", *, status: int = EXIT_FAILED) -> Failure:
    """The Failure for an operating system error met while `doing` something (a verb phrase)."""
    if error.errno == errno.ENOSPC and not hint:
        hint = "free some room there"
    name = os.fsdecode(error.filename) if error.filename else ""
    named = f": {name}" if name not in doing else ""
    return Failure(f"cannot {doing}{named}: {error.strerror or error}", hint, status=status)


@contextlib.contextmanager
def os_failures(doing: str, hint: str = "", *, status: int = EXIT_FAILED) -> Iterator[None]:
    """Turns an operating system error into a Failure; see `os_failure`."""
    try:
        yield
    except OSError as error:
        raise os_failure(error, doing, hint, status=status) from error


# --------------------------------------------------------------------------------------------------
# Python and its libraries
# --------------------------------------------------------------------------------------------------

# The lowest release of each that will do; requirements.txt says why.
LIBRARIES = {"boto3": "1.39", "apacheconfig": "0.3.2", "python-dateutil": "2.8.2",
             "python-gnupg": "0.5.0", "tqdm": "4.64"}


@lru_cache
def library_fault(name: str) -> str:
    """Why one of LIBRARIES cannot be used, "" where it can."""
    from importlib import metadata

    try:
        found, least = metadata.version(name), LIBRARIES[name]
    except metadata.PackageNotFoundError:
        return f"the Python library {name} is missing"
    first, needed = ([int(n) for n in re.findall(r"\d+", text)] for text in (found, least))
    return "" if first >= needed else f"the Python library {name} {found} is older than {least}"


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """A block that imports one of LIBRARIES. Raises Failure (status 2) where it cannot be used, or
    another one is in its place."""
    folder = os.path.dirname(os.path.realpath(__file__))
    hint = (f"run: python3 -m venv {folder}/.venv &&"
            f" {folder}/.venv/bin/pip install -r {folder}/requirements.txt")
    if fault := library_fault(name):
        raise UsageFailure(fault, hint)
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        why = f"cannot be used: {error}"
        if isinstance(error, ModuleNotFoundError):
            name, why = error.name or name, "is missing"
        raise UsageFailure(f"the Python library {name} {why}", hint) from error


def start_over_in_venv() -> None:
    """Starts over in a `.venv` beside the script, if there is one and it is not where we are.

    So a crontab line can name the script itself, whatever python3 is on cron's PATH.
    """
    venv = os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(__file__)), ".venv"))
    python = os.path.join(venv, "bin", "python")
    if os.path.realpath(sys.prefix) != venv and os.access(python, os.X_OK):
        os.execv(python, [python, os.path.abspath(sys.argv[0]), *sys.argv[1:]])


if sys.version_info < (3, 10):  # noqa: UP036 - of RHEL 9 and its like; it ends at what follows
    start_over_in_venv()
    sys.exit("s3napback: Python 3.10 or later is needed, and this is"
             f" {sys.version.split()[0]} (make the .venv beside the script with a later one)")


# ==================================================================================================
# 4. Config
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Directives
# --------------------------------------------------------------------------------------------------


def setting(
    directive: str, read: Callable[[str], Any], default: Any = MISSING, *, must: str = "",
    kinds: Sequence[str] = KINDS, joined: bool = False,
) -> Any:
    """A field that a directive fills; one whose default is () is a list, of all its lines.

    read: makes the value of its text ("1" or "0" for yes or no); a ValueError says why it cannot
    default: the value where the config has no such line; without one, there has to be a line
    must: what to write where the text is what Perl takes for false
    kinds: those of the jobs for which it counts
    joined: all that stands in a line is one text, a command line
    """
    metadata = {"directive": directive, "read": read, "must": must, "kinds": kinds,
                "joined": joined}
    return field(default=default, metadata=metadata)


def is_true(text: str) -> bool:
    """As Perl takes it."""
    return text not in ("", "0")


_PERL_NUMBER = re.compile(r"[ \t\n\r\f\v]*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)


def perl_number(text: str) -> float:
    """The value that Perl gives a string in arithmetic: its leading decimal number, else 0.

    >>> perl_number("07"), perl_number("1.5x"), perl_number("weekly")
    (7.0, 1.5, 0.0)
    """
    match = _PERL_NUMBER.match(text)
    number = float(match[1]) if match else 0.0
    return number if math.isfinite(number) else 0.0


def read_text(text: str) -> str | None:
    return text if is_true(text) else None


def read_number(text: str, largest: int) -> int:
    """A number from 1. Raises ValueError for another text."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or not 1 <= int(text) <= largest:
        raise ValueError(f"is not a whole number from 1 to {largest}")
    return int(text)


_DURATION = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def read_duration(text: str, least: float = 0.0) -> float:
    """Seconds. Raises ValueError for another text, and for less than the least.

    >>> read_duration("90s"), read_duration("1h30m"), read_duration("2d")
    (90.0, 5400.0, 172800.0)
    """
    match = _DURATION.fullmatch(text[:30])
    units = zip(match.groups("0"), (86400, 3600, 60, 1), strict=True) if match else ()
    seconds = float(sum(int(number) * unit for number, unit in units))
    if not match or seconds < least:
        raise ValueError("is not a duration such as 90s, 15m, 26h, 2d or 1h30m")
    return seconds


def matching(pattern: str, meaning: str, make: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A reader of texts of a pattern."""

    def read(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {meaning}")
        return make(text)

    return read


read_switch = matching("[01]", "yes or no", is_true)


def read_folder(text: str) -> str | None:
    """The folder with a slash at its end."""
    return os.path.join(text, "") if is_true(text) else None


_URL = r"(?i:file):///.*|(?i:https?)://[A-Za-z0-9._\[][A-Za-z0-9._:\[\]-]*(/[^?#]*)?"


def read_url(text: str) -> str | None:
    if text and (not re.fullmatch(_URL, text) or urllib.parse.urlsplit(text).port == 0):
        raise ValueError("is not a URL: https://HOST, http://HOST or file:///PATH")
    return text or None


_PING_URL = (r"(?i:https?)://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
             r"(?:[/?][!$-&(-~]*)?")


def is_ping_url(text: str) -> bool:
    with contextlib.suppress(ValueError):  # of a port that is too large
        return bool(re.fullmatch(_PING_URL, text)) and urllib.parse.urlsplit(text).port != 0
    return False


def read_ping_url(text: str) -> str:
    if not is_ping_url(text):  # which is not shown: there may be a password in it
        raise UsageFailure("PingURL is not a URL that can be used",
                           "write https://HOST/PATH or http://HOST/PATH, with no password")
    return text


def read_words(text: str) -> list[str]:
    """The words of a command line, by the shell's quoting rules."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from error


def read_command(text: str) -> str:
    if not read_words(text):
        raise ValueError("is no command")
    return text


def read_prefix(prefix: str) -> str:
    """The Prefix as a key can hold it. Raises Failure (status 2) for one that makes bad keys."""
    prefix = key_text(prefix)
    parts = set(prefix.split("/"))
    why = ""
    if re.search("[\0-\x1f\x7f:]", prefix):
        why = "it holds a colon or a control character"
    elif parts & {"", ".", ".."}:
        why = "it is empty, or has a slash at an end, an empty part, or a part . or .."
    elif parts & {*DUMPS}:
        why = f"a part of it is one of {', '.join(DUMPS)}, which begin the names of dumps"
    elif len(prefix.encode()) > MAX_PREFIX:
        why = f"it is longer than {MAX_PREFIX} bytes"
    if not why:
        return prefix
    shown = without_controls(prefix, "")
    raise UsageFailure(f"Prefix {shown} cannot be used: {why}", "choose a name such as web1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a config says once, for all of its jobs, in the order in which it is looked at: the
    directives of its main level, whose meaning README tells."""

    path: str  # of the config file
    diff_dir: str = setting("DiffDir", read_folder, must="write DiffDir /path, a folder of its own")
    temp_dir: str | None = setting("TempDir", read_folder, None)
    bucket: str = setting(
        "Bucket", matching(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,255}", "a bucket's name"),
        must="write Bucket NAME")
    s3_keyfile: str | None = setting("S3Keyfile", read_text, None, must="name a file, or none")
    chunk_size: int = setting("ChunkSize", partial(read_number, largest=MAX_CHUNK),
                              must="write ChunkSize BYTES")
    gpg_keyring: str | None = setting("GpgKeyring", read_text, None)
    gpg_recipients: tuple[str, ...] = setting(
        "GpgRecipient", str, (), must="name a key, or leave it out for no encryption")
    s3_endpoint: str | None = setting("S3Endpoint", read_url, None)
    s3_region: str | None = setting("S3Region", matching("[A-Za-z0-9._-]+", "a region"), None)
    storage_class: str | None = setting("StorageClass", matching("[A-Z_]+", "a class of S3"), None)
    parallel: int = setting("Parallel", partial(read_number, largest=64), 4)
    compressor: str | None = setting("Compressor", read_command, None, joined=True)
    bandwidth_limit: int | None = setting(
        "BandwidthLimit", partial(read_number, largest=10**15), None)
    retry_hours: float = setting("RetryHours", matching(
        r"[0-9]{1,6}(\.[0-9]{1,6})?", "a number of hours", float), RETRY_HOURS)
    safe_replace: bool = setting("SafeReplace", read_switch, False)
    prefix: str = setting("Prefix", read_prefix, "")
    server_side_encryption: str | None = setting("ServerSideEncryption", matching(
        "AES256|aws:kms(:dsse)?", "AES256, aws:kms or aws:kms:dsse"), None)
    kms_key: str | None = setting("KmsKey", matching("[!-~]{1,2048}", "a key of KMS"), None)
    ping_urls: tuple[str, ...] = setting("PingURL", read_ping_url, ())
    metrics_file: str | None = setting("MetricsFile", read_text, None)
    hook_timeout: float = setting("HookTimeout", partial(read_duration, least=1.0), 3600.0)
    hooks: tuple[tuple[str, Line], ...] = ()  # (directive, its line) of each


@dataclass(frozen=True)
class CycleSpec:
    """How one job rotates; the defaults are the original's."""

    cycle_type: str = setting("CycleType", str, "SimpleCycle")
    frequency: float = setting("Frequency", perl_number, 1.0)
    phase: float = setting("Phase", perl_number, 0.0)
    diffs: float = setting("Diffs", perl_number, 6.0)
    fulls: float = setting("Fulls", perl_number, 4.0)
    discs: float = setting("Discs", perl_number, 5.0)
    archive_oldest_disc: bool = setting("ArchiveOldestDisc", is_true, False)

    @property
    def keeps_several_fulls(self) -> bool:
        return (self.discs if self.cycle_type == "HanoiCycle" else self.fulls) > 1


@dataclass(frozen=True)
class Job:
    """One thing to be backed up."""

    kind: str
    name: str
    where: str  # FILE:LINE
    is_block: bool  # else it stands in a line, and its directives beside it
    cycle: CycleSpec
    use_temp_file: bool = setting("UseTempFile", lambda text: perl_number(text) == 1, False)
    excludes: tuple[str, ...] = setting("Exclude", str, (), kinds=(DIRECTORY,))
    exclude_caches: bool = setting("ExcludeCaches", read_switch, False, kinds=(DIRECTORY,))
    one_file_system: bool = setting("OneFileSystem", read_switch, False, kinds=(DIRECTORY,))
    exclude_tags: tuple[str, ...] = setting(
        "ExcludeIfPresent", matching(r"(?!\.{1,2}$)[^/]+", "the name of a file"), (),
        kinds=(DIRECTORY,))
    mysql_options: tuple[str, ...] = setting(
        "MySQLOptions", read_words, (), kinds=(MYSQL,), joined=True)
    command: str = setting("Run", str, "", kinds=(COMMAND,))
    exclude_files: tuple[Line, ...] = ()  # the lines of ExcludeFrom
    patterns_read: tuple[str, ...] = ()  # what stands in their files, once these are read
    hooks: tuple[tuple[str, Line], ...] = ()  # (directive, its line) of each

    @property
    def tar_options(self) -> tuple[str, ...]:
        """tar's words for what is left out besides Exclude and ExcludeFrom. A directory with a tag
        in it is stored, and the tag: restored, it is a cache to the next backup again."""
        caches = ("--exclude-caches",) if self.exclude_caches else ()
        mounts = ("--one-file-system",) if self.one_file_system else ()
        return (*caches, *mounts, *(f"--exclude-tag={tag}" for tag in self.exclude_tags))

    @property
    def left_out(self) -> tuple[str, ...]:
        """All that says what is left out: the next archive continues no other one's."""
        return (*self.excludes, *self.tar_options, *self.patterns_read)


# Directive → the field that it fills: of the main level, of a job's rotation, of a job.
SETTINGS, TIMING, _OF_JOBS = (
    {row.metadata["directive"]: row for row in fields(filled) if row.metadata}
    for filled in (Settings, CycleSpec, Job)
)
_FIELDS = {**SETTINGS, **TIMING, **_OF_JOBS}

# Directives whose value is a shell command: of a job, or at the main level of the whole run.
RUN_BEFORE, RUN_AFTER, ON_FAILURE = HOOKS = ("RunBefore", "RunAfter", "OnFailure")

# Directive of a job, in its block or beside its line → the kinds of job that it counts for.
JOB_DIRECTIVES = {
    **dict.fromkeys((*TIMING, *HOOKS), KINDS),
    **{name: row.metadata["kinds"] for name, row in _OF_JOBS.items()},
    "ExcludeFrom": (DIRECTORY,),
}

_JOBS_AND_CYCLES = ("Cycle", *KINDS)  # what is a job or holds some
_LISTS = {*KINDS, *HOOKS, "ExcludeFrom",
          *(name for name, row in _FIELDS.items() if row.default == ())}
_SWITCHES = {name for name, row in _FIELDS.items() if isinstance(row.default, bool)}
_SHELL_COMMANDS = ("Run", *HOOKS)

# All directives, by lower case.
_KNOWN = {
    name.lower(): name for name in (*_JOBS_AND_CYCLES, "Include", *SETTINGS, *JOB_DIRECTIVES)
}


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A directive with its values."""

    values: tuple[str, ...]
    where: str  # "FILE:LINE", its last physical line

    @property
    def text(self) -> str:
        return self.values[0]

    @property
    def listed(self) -> tuple[str, ...]:
        """The values of a list: a `#` ends it, since what follows is meant as a comment."""
        return tuple(itertools.takewhile(lambda text: not text.startswith("#"), self.values))


@dataclass(frozen=True)
class Block:
    """A block of the config, or its main level."""

    tag: str  # in lower case, "" for the main level
    arguments: tuple[str, ...]  # the words after it
    where: str  # "FILE:LINE", or the file
    by_name: Mapping[str, Sequence[Line | Block]]  # by names in lower case, mixed as in the file
    warnings: tuple[str, ...] = ()  # what the reader noticed, on the main level only

    @property
    def name(self) -> str | None:
        return self.arguments[0] if self.arguments else None

    def lines(self, name: str) -> list[Line]:
        return [e for e in self.by_name.get(name.lower(), ()) if isinstance(e, Line)]

    def blocks(self, name: str) -> list[Block]:
        return [e for e in self.by_name.get(name.lower(), ()) if isinstance(e, Block)]

    def listed(self, name: str) -> list[str]:
        """The values of a directive that is a list, of all its lines."""
        return [text for line in self.lines(name) for text in line.listed]


# What Perl's \s is for bytes (perlrecharclass, "Whitespace"); re.ASCII makes Python's the same.
_BLANKS = " \t\n\r\f\v"

_CLOSE = re.compile(r"</(\w+)>", re.ASCII)
_OPEN = re.compile(r"<(\w+)\s*(.*)>", re.ASCII)
_DIRECTIVE = re.compile(r"(\w+)(?:\s+(.+))?", re.ASCII)
_BARE_WORD = re.compile(r"(\S+)\s*", re.ASCII)

# A backslash protects whatever follows it, another backslash too (Text::Balanced).
_QUOTED_WORD = re.compile(r"""("[^\\"]*(?:\\.[^\\"]*)*"|'[^\\']*(?:\\.[^\\']*)*')\s*""", re.ASCII)

_BOOLEANS = {"yes": "1", "on": "1", "true": "1", "no": "0", "off": "0", "false": "0"}

# Bytes: it only keeps a mistake (a device as config file) from filling the memory.
_MAX_CONFIG = 16 * 1024**2


def split_words(text: str) -> list[str]:
    """The values in what follows a directive's name or a block's tag.

    Raises Failure for a quote that does not end, and for blanks only.

    >>> split_words("/a 'b c'd --w='x y'")
    ['/a', 'b c', 'd', "--w='x", "y'"]
    """
    if not re.search("[\"']", text):
        words = re.findall(r"\S+", text, re.ASCII)
        if not words:  # behind the name a backslash joined the line to an empty one
            raise UsageFailure("no value found for directive")
        return words
    words = []
    position = 0
    # Kept quirk: Perl takes a rest of "0" for false, and it is lost.
    while position < len(text) and not (text[position] == "0" and position == len(text) - 1):
        quoted = text[position] in "\"'"
        match = (_QUOTED_WORD if quoted else _BARE_WORD).match(text, position)
        if not match:
            raise UsageFailure(f"value string '{text[position:]}' not properly formatted")
        words.append(re.sub(r"""\\(["'])""", r"\1", match[1][1:-1]) if quoted else match[1])
        position = match.end()
    return words


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that says something; one that ends with a backslash goes on in
    the next one, and has the number of its last."""
    logical = ""
    for number, line in enumerate(f"{text}\n".split("\n"), 1):
        line = line.strip(_BLANKS)
        if line.startswith("#"):
            logical = ""  # kept quirk: what was joined so far goes with the comment
            continue
        logical += line
        if logical.endswith("\\"):
            logical = logical.removesuffix("\\")
            continue
        if logical:
            yield number, logical
        logical = ""


@dataclass
class ConfigFile:
    """A config file that is being read."""

    name: str  # as it was given
    lines: Iterator[tuple[int, str]]  # those that are left of it, see `logical_lines`
    inside: frozenset[tuple[int, int]]  # the identities of the file and of those that include it
    line: int = 0  # the number of the last one that was read

    @staticmethod
    def open(path: str) -> ConfigFile:
        """Reads a file whole. Raises OSError, or Failure for one that cannot be a config."""
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_CONFIG + 1)
        if len(data) > _MAX_CONFIG:
            raise UsageFailure(f"more than {_MAX_CONFIG} bytes", "is this a config file?", path)
        lines = logical_lines(data.decode("utf-8", "surrogateescape"))
        return ConfigFile(path, lines, frozenset([(status.st_dev, status.st_ino)]))

    @property
    def place(self) -> str:
        return f"{self.name}:{self.line}"

    def next_line(self) -> str | None:
        """The text of the next line, None at the end."""
        self.line, text = next(self.lines, (self.line, None))
        return text

    def error(self, message: str) -> Failure:
        return UsageFailure(f"Error in config file {self.name}, line {self.line}: {message}")


def _brace_alternatives(pattern: str) -> list[str]:
    """What a pattern with {a,b} stands for, in csh's order."""
    match = re.fullmatch(r"([^{]*)\{([^{}]*)\}(.*)", pattern)
    if not match:
        return [pattern]
    tails = _brace_alternatives(match[3])
    return [match[1] + part + tail for part in match[2].split(",") for tail in tails]


def _glob_files(pattern: str) -> list[str]:
    """The files that Perl's `glob` gives for a pattern: csh's rules (File::Glob, "csh_glob")."""
    files = []
    for word in re.findall(r"\S+", pattern, re.ASCII):  # kept quirk: blanks separate patterns
        for alternative in _brace_alternatives(os.path.expanduser(word)):
            found = glob.glob(alternative) if re.search(r"[*?\[]", alternative) else [alternative]
            files += sorted(found, key=lambda name: (os.fsencode(name).lower(), os.fsencode(name)))
    return files


class _Reader:
    """Follows the lines of a config and its included files, in the original's order.

    It leaves `canonical`: the same config in a plain form, one directive a line, every word
    percent-encoded, PLACE:WORD:WORD, every block closed; see `read_config`.

    Perl's Config::ApacheFormat has one stack of open files, and each level of blocks goes on with
    the file that it has in its hands. Where b.conf says `<Cycle x>` and ends, and a.conf says

        Include b.conf
        </Cycle>
        Bucket b

    the level of <Cycle> goes back to a.conf and ends there, but the one around it still has b.conf
    in its hands, which is at its end, and no file is open below it: Bucket is never read.
    """

    def __init__(self, path: str) -> None:
        try:
            self.sources = [ConfigFile.open(path)]
        except OSError as error:
            hint = f"-c takes a config file, or a NAME in {CONFIG_DIR}"
            if isinstance(error, PermissionError):
                hint = "make it readable for the user that runs this"
            message = f"Unable to open file '{path}': {error.strerror}"
            raise UsageFailure(message, hint) from error
        self.canonical: list[str] = ["#"]  # without any line the library finds nothing to parse
        self.warnings: list[str] = []
        # Kept quirk: a block that opens in one file and ends in another leaves each level with
        # the file that it was reading, and what remains of another one is skipped.
        self._stack = list(self.sources)
        self._read_level(None)
        for source in self.sources:
            if source.next_line():
                self._warn(source, "not read from here on, because a block begins in one file and"
                                   " ends in another")

    def _read_level(self, tag: str | None) -> None:
        """Reads to the end of the block `tag`, or of the config."""
        source = self._stack[-1]
        while True:
            while (line := source.next_line()) is None:
                if len(self._stack) == 1:
                    if tag:
                        self._warn(source, f"<{tag}> is not closed")
                    return
                self._stack.pop()
                source = self._stack[-1]
            if "\0" in line:
                raise source.error("a NUL byte")
            if match := _CLOSE.fullmatch(line):
                if match[1].lower() != tag:
                    waiting = f"\nI was waiting for </{tag}>" if tag else ""
                    raise source.error(f"Unexpected end to block '{match[1]}' found{waiting}")
                return
            if match := _OPEN.fullmatch(line):
                self._read_block(match[1], match[2], source)
            elif match := _DIRECTIVE.fullmatch(line):
                source = self._read_directive(match[1], match[2], source)
            else:
                raise source.error("unable to parse line")

    def _read_block(self, tag: str, text: str, source: ConfigFile) -> None:
        self._check_name(tag, source)
        with failures_at(source.place):
            arguments = [] if text in ("", "0") else split_words(text)
        # The comment is there because the library gives an empty block no list of nodes.
        self.canonical += [f"<{tag.lower()} {_encode(source.place, *arguments)}>", "#"]
        self._read_level(tag.lower())
        self.canonical.append(f"</{tag.lower()}>")

    def _read_directive(self, name: str, text: str | None, source: ConfigFile) -> ConfigFile:
        """Takes one directive in; the source to go on with."""
        known = _KNOWN.get(name.lower(), name)
        if known in _SHELL_COMMANDS:  # the shell reads it, not we, but for quotes around all of it
            command = text or ""
            if _QUOTED_WORD.fullmatch(command):
                command = split_words(command)[0]
            if not command.strip() or command.startswith("#"):
                raise source.error(f"{known} has no command")
            self.canonical.append(f"{name.lower()} {_encode(source.place, command)}")
            return source
        try:
            words = ["1"] if text is None else split_words(text)
        except Failure as failure:
            message = "a quote is not closed" if name.lower() == "pingurl" else failure.message
            raise source.error(message) from failure
        if name.lower() == "include":
            return self._include(words, source)
        self._check_name(name, source)
        values = [_BOOLEANS.get(word.lower(), word) for word in words]
        for word, value in zip(words, values, strict=True):
            if known not in _SWITCHES and (text is None or value != word):
                given = "without a value" if text is None else word
                self._warn(source, f"{known} {given} is read as {value}")
        self.canonical.append(f"{name.lower()} {_encode(source.place, *values)}")
        return source

    def _include(self, words: list[str], source: ConfigFile) -> ConfigFile:
        """Opens the files of an Include, so that the first of them is read next."""
        includer, place = source.name, f"{source.name} line {source.line}"
        going_on = source
        for word in reversed(words):
            files = _included_files(word, place)
            if not files:
                self._warn(source, f"no file to Include in {word}")
            for path in reversed(files):
                going_on = self._open_included(path, includer, place, source)
                self._stack.append(going_on)
                self.sources.append(going_on)
                # Kept quirk: after the last file of an Include, the others are looked for beside
                # that file, by the path that the config gave it.
                includer, place = path, f"{path} line "
        return going_on

    def _open_included(
        self, path: str, includer: str, place: str, source: ConfigFile
    ) -> ConfigFile:
        for attempt in (path, includer[: includer.rfind("/") + 1] + path):
            try:
                opened = ConfigFile.open(attempt)
                if opened.inside <= source.inside:
                    raise source.error(f"{path} includes itself")
                return replace(opened, name=path, inside=opened.inside | source.inside)
            except IsADirectoryError:
                # Kept quirk: a folder counts only as seen from the current one; to Perl, one
                # beside the config is a file without lines.
                self._warn(source, f"Include {path}: a folder; give its whole path")
                return ConfigFile(path, iter(()), source.inside)
            except OSError as error:
                reason = error.strerror
        raise UsageFailure(
            f"Unable to open include file '{path}' at {place}: {reason}",
            "files are looked for in the current folder, then beside the config",
        )

    def _check_name(self, name: str, source: ConfigFile) -> None:
        """Warns of an unknown name, which the original ignores."""
        if name.lower() not in _KNOWN:
            near = difflib.get_close_matches(name.lower(), _KNOWN, n=1, cutoff=0.8)
            meant = f" (did you mean {_KNOWN[near[0]]}?)" if near else "; it is ignored"
            self._warn(source, f'unknown directive "{name}"{meant}')

    def _warn(self, source: ConfigFile, text: str) -> None:
        self.warnings.append(f"{source.place}: {text}")


def _included_files(word: str, place: str) -> list[str]:
    """The files that a word of an Include stands for."""
    if not os.path.isdir(word):
        return _glob_files(word) if "*" in word else [word]
    try:
        names = sorted(os.listdir(word), key=os.fsencode)
    except OSError as error:
        message = f"Cannot open include directory '{word}' at {place}: {error.strerror}"
        raise UsageFailure(message) from error
    return [f"{word}/{name}" for name in names if os.path.isfile(f"{word}/{name}")]


def _encode(*words: str) -> str:
    return ":".join(urllib.parse.quote(word, safe="", errors="surrogateescape") for word in words)


def _decode(words: str) -> list[str]:
    return [urllib.parse.unquote(word, errors="surrogateescape") for word in words.split(":")]


def _entries(nodes: Any) -> dict[str, list[Line | Block]]:
    """The canonical config as blocks and lines, by name; nodes: those of apacheconfig."""
    by_name: dict[str, list[Line | Block]] = {}
    for node in nodes:
        if node.typestring == "block":
            where, *words = _decode(node.arguments)
            entry = Block(node.tag, tuple(words), where, _entries(node))
            by_name.setdefault(node.tag, []).append(entry)
        elif node.typestring == "statement":
            where, *words = _decode(node.value)
            by_name.setdefault(node.name, []).append(Line(tuple(words), where))
    return by_name


def read_config(path: str) -> Block:
    """The main level of a config file.

    Raises Failure (status 2), worded as by the original, for a file that cannot be read or parsed.
    """
    if __doc__ is None:  # apacheconfig's grammar stands in docstrings
        raise UsageFailure("without docstrings no config can be read",
                           "unset PYTHONOPTIMIZE, and call python3 without -OO")
    reader = _Reader(path)
    # Imported here: it takes longer than all the rest of `-h`.
    with library("apacheconfig"):
        from apacheconfig import make_loader

    # apacheconfig parses what `_Reader` leaves, blocks and statements, and no more. Its rules for
    # quotes, backslashes, comments and includes are not those of Perl's Config::ApacheFormat, which
    # `_Reader` has followed: in the canonical form there is nothing that the two read differently.
    with make_loader(
        writable=True, preservewhitespace=True, ccomments=False, useapacheinclude=False,
        disableemptyelementtags=True,
    ) as loader:
        by_name = _entries(loader.loads("\n".join(reader.canonical) + "\n"))
    return Block("", (), path, by_name, tuple(reader.warnings))


# --------------------------------------------------------------------------------------------------
# Settings and jobs
# --------------------------------------------------------------------------------------------------


def settings_of(config: Block, *, needs_diff_dir: bool = True) -> Settings:
    """The settings of a config. Raises Failure (status 2) in the original's order and words.

    needs_diff_dir: whether DiffDir must be there, as for a backup.
    """
    found: dict[str, Any] = {"path": config.where, "hooks": hooks_of(config)}
    for name, row in SETTINGS.items():
        with failures_at(next((line.where for line in config.lines(name)), config.where)):
            value = found[row.name] = _value(config, row)
            if name == "DiffDir" and needs_diff_dir and not os.path.isdir(value):
                if os.path.exists(value):
                    raise UsageFailure(f"DiffDir {value} is no folder")
                raise UsageFailure(f"DiffDir does not exist, please create: {value}",
                                   f"run: mkdir -m 700 {shlex.quote(value)}")
            if name == "ServerSideEncryption" and value and re.match(
                "(?i)file:", found["s3_endpoint"] or ""
            ):
                raise UsageFailure("ServerSideEncryption is nothing that a folder can do",
                                   "take it out; GpgRecipient encrypts before it is stored")
            if name == "KmsKey" and value and "kms" not in (found["server_side_encryption"] or ""):
                raise UsageFailure("KmsKey counts only with ServerSideEncryption aws:kms", "add it")
            if name == "MetricsFile" and needs_diff_dir and value:
                folder = os.path.dirname(os.path.abspath(value))
                if value == "1" or os.path.isdir(value):  # 1: there was no value
                    raise UsageFailure(f"MetricsFile {value} names no file", "write its path")
                if not os.path.isdir(folder):
                    raise UsageFailure(f"MetricsFile {value} is in a folder that does not exist",
                                       f"run: mkdir {shlex.quote(folder)}")
    return Settings(**found)


def _value(block: Block, row: Field[Any]) -> Any:
    """What a block gives a field; see `setting`. Raises Failure (status 2)."""
    name, must, joined = (row.metadata[key] for key in ("directive", "must", "joined"))
    lines, is_list = block.lines(name), name in _LISTS
    if not lines and row.default is not MISSING:
        return row.default
    given: list[tuple[str, str]] = []  # (text, where)
    for line in lines if is_list else lines[:1]:
        texts = line.listed if is_list or joined else line.values[:1]
        given += [(text, line.where) for text in ([" ".join(texts)] if joined else texts)]
    if must and not (given and all(is_true(text.strip()) for text, _ in given)):
        raise UsageFailure(f"{name} must be defined.", must)
    values = []
    for text, where in given:
        with failures_at(where):
            try:
                values.append(row.metadata["read"](text))
            except ValueError as error:
                raise UsageFailure(f"{name} {text} {error}") from error
    if not is_list:
        return values[0]
    return tuple(itertools.chain(*values) if joined else dict.fromkeys(values))


def hooks_of(block: Block) -> tuple[tuple[str, Line], ...]:
    """(directive, its line) of each hook."""
    return tuple((name, line) for name in HOOKS for line in block.lines(name))


def jobs_of(config: Block) -> list[Job]:
    """The jobs in the order in which they run. Raises Failure for one that cannot be."""
    jobs = []
    for level in (config, *config.blocks("Cycle")):
        for kind in KINDS:
            for entry in level.by_name.get(kind.lower(), ()):
                if isinstance(entry, Block):
                    jobs.append(_job(kind, entry.name, entry, entry))
                else:
                    jobs += [_job(kind, name, entry, level) for name in entry.listed]
    return jobs


def _job(kind: str, name: str | None, entry: Line | Block, block: Block) -> Job:
    """A job; entry: names it; block: holds its directives."""
    where, is_block = entry.where, isinstance(entry, Block)
    if not name:
        wanted = f"<{kind} NAME>" if is_block else f"{kind} NAME"
        raise UsageFailure(f"this {kind} has no name", f"write {wanted}", where)
    if kind == COMMAND:
        runs = block.lines("Run") if is_block else []
        if not re.fullmatch(r"[A-Za-z0-9][\w.@+-]*", name, re.ASCII):
            raise UsageFailure(f"{name} is no name for a Command", "use letters, digits, ._-@+",
                               where)
        if len(runs) != 1:
            raise UsageFailure(f"Command {name} needs one Run, and has {len(runs)}",
                               f'write <Command {name}>, Run "COMMAND" and </Command>, a line each',
                               runs[1].where if runs else where)
    timing = {row.name: _value(block, row) for row in TIMING.values()}
    own = {row.name: _value(block, row) for row in _OF_JOBS.values()
           if kind in row.metadata["kinds"]}
    return Job(
        kind, name, where, is_block, CycleSpec(**timing), **own,
        exclude_files=tuple(block.lines("ExcludeFrom")) if kind == DIRECTORY else (),
        hooks=hooks_of(block) if block.tag else (),
    )


# --------------------------------------------------------------------------------------------------
# What a run passes over
# --------------------------------------------------------------------------------------------------


def config_warnings(config: Block) -> list[str]:
    """What a config says that is not used, or not as it looks: sentences that name their place."""
    return [*config.warnings, *_sentences(config, _not_as_it_looks)]


_Remarks: TypeAlias = "Iterator[tuple[Line | Block, str]]"


def _read_in(block: Block) -> Sequence[str]:
    """The jobs and cycles that a run reads in a block."""
    return {"": _JOBS_AND_CYCLES, "cycle": KINDS}.get(block.tag, ())


def _sentences(block: Block, rule: Callable[[Block, str], _Remarks]) -> Iterator[str]:
    """What a rule says of each directive of a block, and of the blocks that are read in it."""
    for name in block.by_name:
        known = _KNOWN.get(name, "")
        for entry, text in rule(block, known) if known else ():
            yield f"{entry.where}: {known}{text}"
        if known in _read_in(block) or known not in _JOBS_AND_CYCLES:
            for inner in block.blocks(name):
                yield from _sentences(inner, rule)


def _never_run(block: Block, name: str) -> _Remarks:
    """Jobs and cycles that no run reads."""
    for entry in block.by_name[name.lower()]:
        what = entry.text if isinstance(entry, Line) else entry.name or ""
        if name in _JOBS_AND_CYCLES and name not in _read_in(block):
            yield entry, (f" {what} inside <{block.tag}> is never backed up: move it out of the"
                          f" <{block.tag}>")
        elif name in KINDS and isinstance(entry, Block) and len(entry.arguments) > 1:
            yield entry, (f" {entry.arguments[1]} is never backed up: a block has one name; one"
                          " with blanks stands in quotes")


def _not_as_it_looks(block: Block, name: str) -> _Remarks:
    """Directives that are not used, or not as they look."""
    lines = block.lines(name)
    if lines and (why := _why_unused(block, name)):
        yield lines[0], why
    elif name in _LISTS:
        yield from _list_remarks(name, lines)
    elif lines and name in _FIELDS:
        yield from _value_remarks(name, lines)
    if name in _JOBS_AND_CYCLES:
        yield from _job_remarks(name, lines, block.blocks(name))


def _why_unused(block: Block, name: str) -> str:
    """Why a directive counts for nothing where it stands, "" if it counts."""
    kinds, own = JOB_DIRECTIVES.get(name, ()), _KNOWN.get(block.tag)
    wanted = kinds[0] if len(kinds) == 1 else "job"
    if name in SETTINGS and block.tag:
        return f" inside <{block.tag}> is ignored: it belongs to the main level"
    if not kinds or own in kinds or (name in HOOKS and not block.tag):
        return ""
    if own in KINDS:
        return f" is not used: <{block.tag}> is no {wanted}"
    if any(map(block.lines, kinds)):
        return ""
    return f" is not used: there is no {wanted} line beside it, and a block has its own"


def _value_remarks(name: str, lines: Sequence[Line]) -> _Remarks:
    """A directive that has one value."""
    first, text = lines[0], lines[0].text
    rest = f" has one value, and the first counts, {text}: "
    if len(first.values) > 1 and name != "Compressor":
        hint = "a value with blanks stands in quotes"
        if first.values[1].startswith("#"):
            hint = "a comment has a line of its own"
        yield first, f"{rest}{first.values[1]} is not used; {hint}"
    elif len(lines) > 1:
        yield lines[1], f"{rest}{lines[1].text} is not used"
    plain = "[01]" if name in _SWITCHES else "-?[0-9]+"
    if name in {*TIMING, "UseTempFile"} - {"CycleType"} and not re.fullmatch(plain, text):
        value = _FIELDS[name].metadata["read"](text)
        shown = {True: "yes", False: "no"}[value] if name in _SWITCHES else f"{value:g}"
        yield first, f" {text} is read as {shown}"


def _list_remarks(name: str, lines: Sequence[Line]) -> _Remarks:
    """A directive that has many values."""
    for line in lines:
        for comment in line.values[len(line.listed) :][:1]:
            yield line, f": the list of names ends at {comment}; a comment has a line of its own"
        for text in line.listed if name == "Exclude" else ():
            if plain := usable_pattern(text):
                yield line, f" {text} excludes nothing; write {plain}"
    if name == "MySQLOptions" and sum(len(line.listed) for line in lines) > 1:
        yield lines[0], ": all words are used; the Perl script used the first"


def usable_pattern(pattern: str) -> str:
    """What to write for a pattern that can match no name of tar's, "" for any other."""
    # They have no slash at the end, no two in a row, and no "." for a part.
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    plain = "/" * pattern.startswith("/") + "/".join(parts)
    return plain if parts and pattern != plain else ""


def _job_remarks(name: str, lines: Sequence[Line], blocks: Sequence[Block]) -> _Remarks:
    """Jobs and cycles that the Perl script read in another way, or not at all."""
    for line in lines if name == "Cycle" else ():
        yield line, f" {line.text} is no block and is ignored: <Cycle NAME> ... </Cycle>"
    if lines and blocks and name in KINDS:
        yield blocks[0], (f" lines and <{name}> blocks at one level are jobs alike; the Perl script"
                          " could not read that")
    seen = set()
    for inner in blocks:
        if inner.arguments in seen:
            yield inner, (f": a second <{' '.join((name, *inner.arguments))}> stands for itself;"
                          " the Perl script ran the first one twice")
        seen.add(inner.arguments)


# ==================================================================================================
# 5. Cycles and slots
# ==================================================================================================


@dataclass(frozen=True)
class Day:
    """The two day counts that rotation is made of."""

    yday: int  # local day of the year, from 0
    epoch_days: int  # whole days since 1970-01-01 UTC


@dataclass(frozen=True)
class Moment:
    """A point in time, and what the local clock shows."""

    epoch: float  # seconds since 1970-01-01 UTC
    zone: tzinfo | None = None  # what counts as local; None is the zone of the process

    @staticmethod
    def of(now: datetime | float) -> Moment:
        """From a datetime (a naive one is local time) or from epoch seconds."""
        if isinstance(now, datetime):
            return Moment(now.timestamp(), now.tzinfo)
        return Moment(float(now))

    def local(self, epoch: float | None = None) -> datetime:
        """This moment, or another one given in epoch seconds, on the local clock."""
        at = self.epoch if epoch is None else epoch
        return datetime.fromtimestamp(at, timezone.utc).astimezone(self.zone)

    def epoch_of(self, wall: datetime) -> float:
        """Epoch seconds at which the local clock shows `wall`, which has no zone: the second time
        where it shows an hour twice; in place of one that it leaves out, the hour before it."""
        return wall.replace(tzinfo=self.zone, fold=1).timestamp()

    def date(self, epoch: float | None = None) -> date:
        """Local date."""
        return self.local(epoch).date()

    def utc_text(self) -> str:
        """UTC in ISO 8601, to the second: 2026-11-24T03:00:00Z."""
        return datetime.fromtimestamp(self.epoch, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def day(self) -> Day:
        return Day(self.local().timetuple().tm_yday - 1, int(self.epoch // 86400))


# What to do where perl_modulo fails, or a number grows beyond all bounds.
ROTATION_HINT = "correct Frequency, Fulls, Diffs or Discs"


def perl_modulo(left: float, right: float) -> int:
    """Perl's `%`: both sides lose their fraction, the result has the right side's sign.

    Raises Failure where the right side is 0 without its fraction (perlop, "Illegal modulus zero").
    """
    if int(right) == 0:
        raise UsageFailure("Illegal modulus zero", ROTATION_HINT)
    return int(left) % int(right)


CYCLE_TYPES = ("SimpleCycle", "HanoiCycle")


def is_backup_day(cycle: CycleSpec, day: Day) -> bool:
    """Whether the cycle asks for a backup on that day. Raises Failure for a Frequency of 0."""
    if cycle.cycle_type == "SimpleCycle":
        return perl_modulo(day.yday + cycle.phase, cycle.frequency) == 0
    if cycle.cycle_type == "HanoiCycle":
        return perl_modulo(day.epoch_days, cycle.frequency) == 0
    return False


def slot_and_mode(cycle: CycleSpec, day: Day, dumps: bool) -> tuple[int, str]:
    """(the slot of the rotation that the day's archive goes to, from 0; FULL or DIFF).

    dumps: all are FULL, and rotate so. Raises Failure (status 2) where the directives make no
    rotation, or for a CycleType that is none.
    """
    if cycle.cycle_type not in CYCLE_TYPES:
        raise UsageFailure(
            f'CycleType "{cycle.cycle_type}" is unknown', f"use {' or '.join(CYCLE_TYPES)}"
        )
    try:
        if cycle.cycle_type == "SimpleCycle":
            chain = 1 if dumps else cycle.diffs + 1  # a FULL and its DIFFs
            slot = perl_modulo((day.yday + cycle.phase) / cycle.frequency, cycle.fulls * chain)
            return slot, FULL if dumps or perl_modulo(slot, chain) == 0 else DIFF
        days = 2.0 ** (cycle.discs - 1)
        day_of_cycle = perl_modulo(day.epoch_days / cycle.frequency, days) + 1
        slot = (day_of_cycle & -day_of_cycle).bit_length() - 1  # position of the lowest set bit
        if cycle.archive_oldest_disc:
            slot += int(day.epoch_days / (days * cycle.frequency))
        return slot, FULL
    except (OverflowError, ZeroDivisionError) as error:
        raise UsageFailure("its numbers make no rotation", ROTATION_HINT) from error


def backup_days(cycle: CycleSpec, start: Moment, step: int) -> Iterator[Moment]:
    """A moment, and the same hour of the days before it (step -1) or after it (1), of those days on
    which the cycle asks for a backup. It looks at eight years, since 2100 has no 366th day."""
    wall = start.local().replace(tzinfo=start.zone)  # days are not all of 24 hours
    for days in range(8 * 366):
        at = Moment((wall + timedelta(days=days * step)).timestamp(), start.zone)
        if is_backup_day(cycle, at.day):
            yield at


def slot_of_full_before(cycle: CycleSpec, now: Moment, dumps: bool) -> int | None:
    """The slot of the last FULL that was due before today; None if there was none."""
    for at in backup_days(cycle, now, -1):
        slot, mode = slot_and_mode(cycle, at.day, dumps)
        if mode == FULL and at.date() != now.date():
            return slot
    return None


def not_backed_up(config: Block, jobs: Sequence[Job]) -> list[str]:
    """What the config names and no run ever backs up: one sentence each."""
    told = list(_sentences(config, _never_run))
    if not jobs and not told:
        told = [f"{config.where}: nothing is backed up: the config names nothing to back up"]
    for job in jobs:
        cycle, why = job.cycle, ""
        if cycle.cycle_type not in CYCLE_TYPES:
            types = " or ".join(CYCLE_TYPES)
            why = f'its CycleType "{cycle.cycle_type}" is unknown; use {types}'
        elif abs(cycle.frequency) > 366 and cycle.cycle_type == "SimpleCycle" and not any(
            is_backup_day(cycle, Day(yday, 0)) for yday in range(366)
        ):
            why = "by its Frequency and Phase no day of the year is its day"
        if why:
            told.append(f"{job.where}: {job.kind} {job.name} is never backed up: {why}")
    return told


def new_year_loss(cycle: CycleSpec, year: int, dumps: bool) -> tuple[int, int] | None:
    """(fewest restore points else, fewest after New Year) where the turn costs more than half.

    year: the one that ends; dumps: whether all archives are FULL. SimpleCycle counts days of the
    year, so that on January 1st it goes on in slot 0, wherever it was.
    """
    if cycle.cycle_type != "SimpleCycle":
        return None
    first, turn = date(year - 1, 1, 1), (date(year + 1, 1, 1) - date(year - 1, 1, 1)).days
    dates = [first + timedelta(days=n) for n in range(turn + 90)]
    days = [Day(at.timetuple().tm_yday - 1, (at - date(1970, 1, 1)).days) for at in dates]
    counts = [len(restorable_nights(held)) for held in rotation(cycle, days, dumps)]
    usual, after = min(counts[turn - 180 : turn]), min(counts[turn:])
    return (usual, after) if after * 2 < usual else None


class Night(NamedTuple):
    """A backup of a rotation."""

    number: int  # of its day
    slot: int
    mode: str
    needs: frozenset[int]  # the numbers of its chain, its own too


def rotation(cycle: CycleSpec, days: Sequence[Day], dumps: bool) -> Iterator[list[Night]]:
    """What is in the slots after each of the days, oldest first, if no night fails."""
    held: list[Night] = []
    for number, day in enumerate(days):
        if is_backup_day(cycle, day):
            slot, mode = slot_and_mode(cycle, day, dumps)
            needs = held[-1].needs if held and mode == DIFF else frozenset()
            held = [night for night in held if night.slot != slot]
            if not needs <= {night.number for night in held}:
                needs = frozenset()  # what is gone, or replaced by it, a DIFF does not continue
            held.append(Night(number, slot, mode, needs | {number}))
        yield held


def restorable_nights(held: Sequence[Night]) -> list[Night]:
    """Those of the nights that can be restored."""
    there = {night.number for night in held}
    return [night for night in held if night.needs <= there]


def days_until(last: date, count: int, at: str, moment: Moment) -> dict[str, Day]:
    """The days up to the last one, each as a run sees it that begins at that local time."""
    walls = [datetime.fromisoformat(f"{last - timedelta(days=back)} {at}")
             for back in reversed(range(count))]
    return {f"{wall.date()}": replace(moment, epoch=moment.epoch_of(wall)).day for wall in walls}


class Forecast(NamedTuple):
    """What a job makes on each day, and what is there of it after the run of one."""

    kind: str
    name: str
    due: Mapping[str, str]  # day in ISO 8601 → "SLOT-MODE" of it
    kept: Mapping[str, str]  # the same, of what is there then
    restorable: Sequence[str]  # the days of it that can be restored
    bytes: int | None = None  # see `size_of`


def forecast(job: Job, shown: Mapping[str, Day], followed: Mapping[str, Day]) -> Forecast:
    """The forecast by the calendar, as if no night failed, for the last of the days that are
    followed. Raises Failure (status 2) for what is no rotation."""
    cycle, dumps, days = job.cycle, job.kind in DUMPS, [*followed]
    with failures_at(job.where):
        due = {at: "{}-{}".format(*slot_and_mode(cycle, day, dumps))
               for at, day in shown.items() if is_backup_day(cycle, day)}
        held = deque(rotation(cycle, [*followed.values()], dumps), 1).pop()
    kept = {days[night.number]: f"{night.slot}-{night.mode}" for night in held}
    good = [days[night.number] for night in restorable_nights(held)]
    return Forecast(job.kind, job.name, due, kept, good)


# ==================================================================================================
# 6. Names
# ==================================================================================================


def archive_start(kind: str, name: str, prefix: str = "") -> str:
    """What the names of all archives of a source begin with; `name` is as for `archive_name`.

    >>> archive_start("Directory", "/etc"), archive_start("MySQL", "shop", "web1")
    ('/etc-', 'web1/MySQL/shop-')
    """
    start = f"{kind}/{name}-" if kind in DUMPS else f"{name}-"
    return key_text(f"{prefix}/{start.removeprefix('/')}" if prefix else start)


def archive_name(kind: str, name: str, slot: int, mode: str, prefix: str = "") -> str:
    """The archive of a job's slot; `name` is as `stored_name` gives it, letter by letter.

    prefix: stands before it, and a slash between the two, whether or not the name begins with one.

    >>> archive_name("Directory", "/etc", 3, "DIFF"), archive_name("MySQL", "shop", 0, "FULL")
    ('/etc-3-DIFF', 'MySQL/shop-0')
    >>> archive_name("Directory", "/etc", 3, "DIFF", "web1")
    'web1/etc-3-DIFF'
    """
    end = f"{slot}" if kind in DUMPS else f"{slot}-{mode}"
    return archive_start(kind, name, prefix) + end


_ARCHIVE = re.compile(r"(?P<name>.*)-(?P<slot>-?[0-9]{1,20})-(?P<mode>FULL|DIFF)", re.DOTALL)
_DUMP_KINDS = "|".join(DUMPS)
_DUMP = re.compile(rf"(?P<kind>{_DUMP_KINDS})/(?P<name>.*)-(?P<slot>[0-9]{{1,20}})", re.DOTALL)


def parse_archive_name(archive: str, prefix: str = "") -> tuple[str | None, str, int, str] | None:
    """(kind, name, slot, mode) of an archive name, or None for a name of another shape or prefix.

    The kind is None for "NAME-SLOT-MODE": the name does not tell a directory from a repository.
    With a prefix, such a name begins with a slash, whether the config's did or not.

    >>> parse_archive_name("/etc-3-DIFF"), parse_archive_name("MySQL/shop-0")
    ((None, '/etc', 3, 'DIFF'), ('MySQL', 'shop', 0, 'FULL'))
    >>> parse_archive_name("web1/etc-3-DIFF", "web1"), parse_archive_name("/etc-3-DIFF", "web1")
    ((None, '/etc', 3, 'DIFF'), None)
    """
    if prefix:
        if not archive.startswith(f"{prefix}/"):
            return None
        archive = archive[len(prefix) + 1 :]
    if match := _ARCHIVE.fullmatch(archive):
        name = f"/{match['name']}" if prefix else match["name"]
        return None, name, int(match["slot"]), match["mode"]
    if match := _DUMP.fullmatch(archive):
        return match["kind"], match["name"], int(match["slot"]), FULL
    return None


_PREFIXED_DUMP = re.compile(rf"(?P<prefix>[^/].*?)/(?:{_DUMP_KINDS})/", re.DOTALL)


def shown_prefix(name: str) -> str:
    """The Prefix that the name of an archive, or of a source, shows by itself: that of a dump has
    one before its kind; of all others only their marks can tell.

    >>> shown_prefix("web1/MySQL/shop-0"), shown_prefix("/srv/MySQL/data-0-FULL")
    ('web1', '')
    """
    if _ARCHIVE.fullmatch(name) or name.startswith(tuple(f"{kind}/" for kind in DUMPS)):
        return ""
    match = _PREFIXED_DUMP.match(name)
    return match["prefix"] if match else ""


def starts_meant(given: str, prefix: str = "") -> dict[str, int]:
    """What the names of a source's archives begin with that a user means by a name, with its Prefix
    or without it → how near it is: 0 for what was typed, 1 but for a slash at each end; 2 and 3
    are these again, if the name itself begins as its Prefix does.

    >>> starts_meant("/etc")
    {'/etc-': 0, 'etc-': 1, 'etc/-': 1, '/etc/-': 1}
    """
    starts: dict[str, int] = {}
    # With a Prefix nothing outside it is listed: the access key may not be allowed to.
    shown = prefix or shown_prefix(given)
    name = given.removeprefix(f"{shown}/") if shown else given
    for far, own, spelled in ((0, shown, name), (2, prefix, given)):
        bare = spelled.removeprefix("/").removesuffix("/")  # people type it either way
        for way in (spelled, bare, f"{bare}/", f"/{bare}", f"/{bare}/"):
            kind, _, rest = way.partition("/")
            stored = f"{kind}/{stored_name(kind, rest)}" if kind in DUMPS else way
            for start in (way, stored):
                starts.setdefault(archive_start(DIRECTORY, start, own), far + (way != spelled))
    return starts


def chunk_prefix(archive: str) -> str:
    """What the keys of an archive's chunks begin with; "" names all of a bucket without names."""
    return f"{archive}:" if archive else ""


def chunk_key(archive: str, number: int) -> str:
    """The key of a chunk, counted from 0."""
    return f"{chunk_prefix(archive)}{number:0{CHUNK_DIGITS}d}"


# Between archive and number in the keys of chunks that wait to take their archive's place.
_STAGED = ":s3napback-new"


def staged_key(archive: str, number: int) -> str:
    """The key of a chunk that waits to take its place (SafeReplace)."""
    return chunk_key(f"{archive}{_STAGED}", number)


class ChunkKey(NamedTuple):
    """What a chunk's key says; a staged chunk's archive is the one whose place it is to take."""

    archive: str
    number: int
    width: int  # digits of the number
    staged: bool


def is_staged(key: str) -> bool:
    """Whether a chunk's key is as `staged_key` gives it."""
    return key.rpartition(":")[0].endswith(_STAGED)


def parse_chunk_key(key: str) -> ChunkKey | None:
    """What a chunk's key with up to 20 digits says, None for a foreign key.

    >>> parse_chunk_key("/etc-3-DIFF:00000000000000000007")
    ChunkKey(archive='/etc-3-DIFF', number=7, width=20, staged=False)
    """
    archive, colon, digits = key.rpartition(":")
    known = digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS
    if not known or (colon and not archive):
        return None
    return ChunkKey(archive.removesuffix(_STAGED), int(digits), len(digits), is_staged(key))


def probe_key(archive: str) -> str:
    """The key that shows whether the bucket would take an archive, without making one."""
    return f"{archive}:s3napback-probe"


def diff_file_name(name: str, mark: str = "") -> str:
    """The file in DiffDir that holds what the last backup of a name saw; mark: tells two names
    apart whose files would be the same."""
    return f"{name}{mark}.diff".replace("/", "_")


def index_file_name(place: str, archive: str) -> str:
    """The file in DiffDir with the index of an archive; place: the bucket, see `bucket_place`."""
    return f".s3napback-{hashlib.sha256(os.fsencode(f'{place}/{archive}')).hexdigest()[:32]}.files"


def temp_file_name(bucket: str, archive: str) -> str:
    """The original's name for an archive's temp file; ours adds unguessable letters to it."""
    return f"{bucket}:{archive}.temp".replace("/", "_")


def mysql_parts(name: str) -> tuple[str, str]:
    """(socket, database) of a MySQL job's name; the socket may be empty, "all" is all databases.

    >>> mysql_parts("/run/my.sock:shop"), mysql_parts("all")
    (('/run/my.sock', 'shop'), ('', '--all-databases'))
    """
    sock, _, database = name.rpartition(":")
    return sock, "--all-databases" if database == "all" else database


def postgresql_parts(name: str) -> tuple[str, str]:
    """(user, database) of a PostgreSQL job's name; "all" is the empty database name.

    >>> postgresql_parts("alice@crm"), postgresql_parts("all")
    (('alice', 'crm'), ('', ''))
    """
    user, _, database = name.rpartition("@")
    return user, "" if database == "all" else database


def stored_name(kind: str, name: str) -> str:
    """The name under which a job's archives are kept: what `archive_name` wants."""
    if kind == MYSQL:
        sock, database = mysql_parts(name)
        return f"{sock}/{database}" if sock else database
    if kind == POSTGRESQL:
        return postgresql_parts(name)[1]
    return name


def source_start(kind: str, name: str, prefix: str) -> str:
    """What the names of all archives of a source begin with; `name` is as in a config."""
    return archive_start(kind, stored_name(kind, name), prefix)


# ==================================================================================================
# 7. Sources
# ==================================================================================================


@dataclass(frozen=True)
class Stage:
    """One process of a pipeline."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()  # what its environment adds
    watched: bool = False  # its last bytes are kept, because they tell whether it wrote all
    descriptors: tuple[int, ...] = ()  # of ours that it may use
    shell: bool = False  # a command of the config: it has a session of its own, and has to write

    @property
    def tool(self) -> str:
        return os.path.basename(self.argv[0])

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The environment that it runs in, within ours."""
        result = dict(env)
        if self.env and "LC_ALL" in result:
            # It would win over the LC_MESSAGES that a stage asks for; LANG says the rest of it.
            result["LANG"] = result.pop("LC_ALL")
        return result | dict(self.env)

    def __str__(self) -> str:
        return shlex.join(self.argv)


# For programs whose messages decide something (gettext manual, "Locale Environment Variables").
IN_ENGLISH = (("LC_MESSAGES", "C"), ("LANGUAGE", "C"))


def find_tool(names: Sequence[str], env: Mapping[str, str]) -> str | None:
    """The first of the names that is a program on the environment's PATH."""
    return next((name for name in names if shutil.which(name, path=env.get("PATH"))), None)


# --------------------------------------------------------------------------------------------------
# Directories
# --------------------------------------------------------------------------------------------------

# What tar keeps only when it is told to (its manual, "Extended File Attributes").
TAR_ATTRIBUTES = ("--acls", "--xattrs")

# On the way back it leaves out all but `user.…`, capabilities too, unless it is told otherwise.
# A time in the future is brought back like any other: no cause for a warning.
TAR_RESTORES = (*TAR_ATTRIBUTES, "--xattrs-include=*", "--warning=no-timestamp")

# tar takes names for letters of its locale and stores their UTF-8 (pax(1), "path"): under de_DE,
# which is ISO 8859-1, names of other bytes would come back. Names are UTF-8 to us anyway.
# The times that it lists are in UTC. TAR_OPTIONS could make of an archive what nothing reads.
TAR_ENVIRONMENT = (("LC_CTYPE", "C.UTF-8"), ("TZ", "UTC0"), ("TAR_OPTIONS", ""), *IN_ENGLISH)


# How a comment begins in which an archive says what names it was asked for; readers pass over it
# (POSIX pax(1), "comment"). Longest word of a command line, bytes (execve(2)), with a margin.
ASKED_FOR = "s3napback:"

_MAX_WORD = 120_000

# How tar is to write names, so that they can be read back.
TAR_QUOTING = ("--quoting-style=escape", "--quote-chars=>")

# How tar is to compare with what it remembers, and to say what it met. Devices are compared before,
# by `Draft.prepare`: not to compare them at all would take another disk at the same place, or
# another night's snapshot of a file system, for the one that is stored, since their inode numbers
# are the same. A rename that tar sees nevertheless is told, what is left out is not.
TAR_MEMORY = ("--no-check-device", "--warning=rename-directory", "--warning=no-xdev",
              "--warning=no-cachedir", *TAR_QUOTING)

# How it is to list what it stores, beside its messages: as `ls -l` does. A `>` in a name is `\>`,
# so that the arrow behind a symbolic link is none of its name's. Times are in UTC by TZ, since with
# the option for it tar remarks on the date that it is given.
TAR_LISTING = ("-vv", "--warning=no-new-directory", "--full-time")


def expand_home(name: str, env: Mapping[str, str]) -> str:
    """`~` and `~/…` with the environment's HOME, `~user` from the user database."""
    if name == "~" or name.startswith("~/"):
        return env.get("HOME", "/") + name[1:]
    return os.path.expanduser(name)


def with_patterns_read(job: Job) -> Job:
    """The job with what the files of its ExcludeFrom say, as tar reads them: a pattern a line,
    blanks at its end are none of it, and there are no comments. Raises Failure (status 2)."""
    patterns: list[str] = []
    for line in job.exclude_files:
        for path in line.listed:
            if not path.startswith("/"):
                raise UsageFailure(f"ExcludeFrom {path} is not a whole path", where=line.where)
            with (
                failures_at(line.where),
                os_failures(f"read ExcludeFrom {path}", status=EXIT_USAGE),
                open(path, "rb") as file,
            ):
                patterns += filter(None, (os.fsdecode(one.rstrip()) for one in file))
    return replace(job, patterns_read=tuple(patterns))


def exclude_options(job: Job, env: Mapping[str, str]) -> list[str]:
    """tar's words for what the config leaves out."""
    words = list[str]()
    for pattern in job.excludes:
        words += ["--exclude", expand_home(pattern, env)]
    for line in job.exclude_files:
        words += [f"--exclude-from={path}" for path in line.listed]
    return [*words, *job.tar_options]


def tar_stage(
    names: Sequence[str], options: Sequence[str], snapshot: str, *,
    left_out: Sequence[str] = (), sparse: bool = True, shown: bool = False, listing: int = -1,
) -> Stage:
    """GNU tar writing what changed since `snapshot`, which it brings up to date as it goes.

    options: as `exclude_options` gives them
    left_out: paths, which are no patterns
    sparse: holes are stored as such
    shown: as the original's line, for test mode
    listing: the descriptor to which it writes a line for each member, -1 for none
    """
    words = ["tar", "-f", "-", *options]
    if left_out:
        # They also apply to later options; --no-anchored behind them would make tar skip
        # directories.
        words += ["--anchored", "--no-wildcards", *(f"--exclude={path}" for path in left_out)]
    words += ["-g", snapshot, "-C", "/", "-cp"]
    if not shown:
        words += [*TAR_ATTRIBUTES, *TAR_MEMORY]
        if sparse:
            words.append("--sparse")
        # A file that is given by name is stored only when it has changed.
        asked = base64.b64encode(b"\0".join(map(os.fsencode, names))).decode()
        if len(asked) < _MAX_WORD:
            # Without the time of day, so that the same content is the same bytes.
            dateless = "globexthdr.mtime={2000-01-01 00:00:00}"
            words.append(f"--pax-option={dateless},comment={ASKED_FOR}{asked}")
        if listing >= 0:
            words += [*TAR_LISTING, f"--index-file=/dev/fd/{listing}"]
    if any("\\" in name for name in names):
        words.append("--no-unquote")  # else tar takes a backslash and an n for a newline
    if any(name.startswith("-") for name in names):
        words.append("--")
    descriptors = (listing,) if listing >= 0 else ()
    # Its messages decide what a status of 2 means.
    return Stage((*words, *names), TAR_ENVIRONMENT, descriptors=descriptors)


# A message of tar on a name: a colon in the name is `\:` (quotearg_colon of gnulib).
_TAR_MESSAGE = re.compile(r"[^:]+: ((?:[^\\:]|\\.)+): (.*)")

# tar's messages that are about no name.
_TAR_CLOSING = re.compile(r"[^:]+: (Exiting with failure status|Error is not recoverable)")

# A directory with this message is in the archive without what is in it, or not at all.
_TAR_LOST_FOLDER = re.compile(
    r"(File|Directory) removed before|Cannot (?!.*(xattr|acl|filecon)|(readlink|close|utime))"
)

_TAR_RENAMED = "Directory has been renamed from "

# Messages of one stage that are kept, to be logged: memory for some megabytes of them.
_MAX_MESSAGES = 20_000


@dataclass
class Losses:
    """What an archive lacks of what its snapshot tells."""

    everything: bool = False  # it cannot be told, or is too much
    entries: dict[bytes, set[bytes]] = field(default_factory=dict)  # of directories, by their name
    folders: set[bytes] = field(default_factory=set)  # directories with all below them


def unescaped(name: bytes) -> bytes:
    """A name as it is, from tar's quoting style `escape`: that of Python but for the `>`, as is
    `backslashreplace`."""
    if b"\\" not in name:
        return name
    return name.replace(b"\\>", b">").decode("unicode_escape").encode("latin-1")


def losses_told_by(messages: Sequence[str]) -> Losses:
    """What tar's messages say of files and directories that it could not read as they were."""
    result = Losses(everything=len(messages) > _MAX_MESSAGES)
    for text in messages:
        match = _TAR_MESSAGE.fullmatch(text)
        if not match or match[2].startswith(_TAR_RENAMED):
            result.everything |= not _TAR_CLOSING.match(text)
            continue
        path = unescaped(match[1].replace("\\:", ":").encode()).rstrip(b"/")
        folder, _, entry = path.rpartition(b"/")
        result.entries.setdefault(folder or b"/", set()).add(entry)
        if _TAR_LOST_FOLDER.match(match[2]):
            result.folders.add(path or b"/")
    return result


# --------------------------------------------------------------------------------------------------
# What a Directory line leads to
# --------------------------------------------------------------------------------------------------


def expand_name(name: str, env: Mapping[str, str]) -> list[str]:
    """The names that a Directory line stands for: itself, or what the shell made of it.

    A name that exists is taken as it stands; `~` and wildcards are tried only if it does not.
    Relative names are looked up in `/`, where tar looks. Raises Failure where nothing exists.
    """
    if os.path.lexists(os.path.join("/", name)):
        return [name]
    pattern = expand_home(name, env)
    found = sorted(glob.glob(pattern, root_dir="/")) if pattern else []
    if not found:
        raise Failure(f"directory {name} does not exist", "mount it, or take it out of the config")
    return found


def path_of(name: str) -> str:
    """The path of a Directory's name, as tar takes it: without a slash at its end."""
    return os.path.join("/", name).rstrip("/") or "/"


def access_fault(name: str) -> str:
    """Why tar could read nothing at all of what a name leads to, "" where it can."""
    path = path_of(name)
    if os.path.islink(path):
        return ""
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            return f"directory {path} cannot be opened: {error.strerror}"
        return "" if os.access(path, os.X_OK) else f"nothing in directory {path} can be opened"
    return f"{path} cannot be read" if os.path.isfile(path) and not os.access(path, os.R_OK) else ""


def is_empty_folder(path: str) -> bool:
    """Whether it is a directory with nothing in it but what mkfs.ext4 puts into each."""
    try:
        return not os.path.islink(path) and set(os.listdir(path)) <= {"lost+found"}
    except OSError:
        return False


def links_among(names: Sequence[str]) -> Iterator[str]:
    """A sentence for each of a job's names that is a symbolic link, and leads to none of them."""
    paths = [path_of(name) for name in names]
    stored = [os.path.realpath(path) for path in paths if not os.path.islink(path)]
    for link in filter(os.path.islink, paths):
        target = os.path.realpath(link)
        if all(name_in(target, place) is None for place in stored):
            yield (f"{link} is a symbolic link: nothing of {target}, to which it leads, is stored;"
                   f" name {target} in the config")


# How a CACHEDIR.TAG begins; tar passes over one that does not (bford.info/cachedir).
_CACHE = b"Signature: 8a477f597d28d172789f06886806bc55"


def tags_among(names: Sequence[str], job: Job) -> Iterator[str]:
    """A sentence for each tag that one of a job's names leads to; see `Job.tar_options`."""
    for folder in (path for path in map(path_of, names) if not os.path.islink(path)):
        tags = [tag for tag in job.exclude_tags if os.path.exists(os.path.join(folder, tag))]
        if job.exclude_caches:
            cache = os.path.join(folder, "CACHEDIR.TAG")
            with contextlib.suppress(OSError), open(cache, "rb") as file:
                if file.read(len(_CACHE)) == _CACHE:
                    tags.append("CACHEDIR.TAG")
        for tag in tags:
            yield f"nothing of {folder} is stored but {tag}, by which all else is left out"


def name_in(path: str, folder: str) -> str | None:
    """What a path is called in a folder, "" for the folder itself; None where it is not in it."""
    start = folder.rstrip("/") + "/"
    return path[len(start) :] if f"{path}/".startswith(start) else None


def is_within(path: AnyStr, folders: set[AnyStr]) -> bool:
    """Whether a path is one of the folders, or in one of them; "" is the folder of all."""
    slash = b"/" if isinstance(path, bytes) else "/"
    while path not in folders:
        if not path:
            return False
        path = path.rpartition(slash)[0]
    return True


def names_within(names: Sequence[str], path: str) -> list[str]:
    """What tar calls a path that lies in one of a job's names, however either is written."""
    real = os.path.realpath(path)
    return [f"{name.rstrip('/')}/{rest}" for name in names
            if (rest := name_in(real, os.path.realpath(path_of(name))))]


class Mount(NamedTuple):
    """A mounted file system."""

    device: str  # MAJOR:MINOR
    place: str  # its mount point
    kind: str


def mounts() -> list[Mount]:
    """All of this process's, none where that is not known (proc(5), /proc/PID/mountinfo)."""
    found: dict[str, Mount] = {}
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            place = os.fsdecode(fields[4].decode("unicode_escape").encode("latin-1"))
            kind = fields[fields.index(b"-") + 1].decode()
            found[place] = Mount(fields[2].decode(), place, kind)  # the last one hides the others
    return list(found.values())


def mounts_of(names: Sequence[str], one_file_system: bool = False) -> list[tuple[str, Mount]]:
    """(what tar calls the place, mount) of the file systems that a job's names lie on, and of
    those within them that it reads, too: first those that begin outside."""
    known = sorted(mounts(), key=lambda mount: len(mount.place))
    outside: list[tuple[str, Mount]] = []
    within: list[tuple[str, Mount]] = []
    for name in names:
        real = os.path.realpath(path_of(name))
        home = [one for one in known if name_in(real, one.place) is not None][-1:]
        for mount in home:
            (within if mount.place == real else outside).append((name, mount))
        devices = [mount.device for mount in home]  # none is known in a chroot without a mount
        read = [one for one in known if not one_file_system or one.device in devices]
        within += [(f"{name.rstrip('/')}/{rest}", mount) for mount in read
                   if (rest := name_in(mount.place, real))]
    return outside + within


def twins_in(places: Sequence[tuple[str, Mount]]) -> Iterator[tuple[bytes, os.stat_result]]:
    """(name, status) of directories that a job may meet twice, by a second way: bind mounts.

    No directory of Linux has two names but by mounts of one file system.
    """
    seen = set()
    for name, mount in places:
        if mount.device in seen and mount.place == os.path.realpath(path_of(name)):
            top = os.fsencode(os.path.join("/", name)).rstrip(b"/")
            for folder, _, _ in os.walk(top):
                with contextlib.suppress(OSError):
                    yield os.fsencode(name).rstrip(b"/") + folder[len(top) :], os.lstat(folder)
        seen.add(mount.device)


# --------------------------------------------------------------------------------------------------
# Databases and repositories
# --------------------------------------------------------------------------------------------------

# Options that count only as the first ones (mysqldump's manual, "Option Files").
_FIRST_OPTIONS = re.compile(
    "--(no-defaults|print-defaults|no-login-paths)$"
    "|--(defaults-file|defaults-extra-file|defaults-group-suffix|login-path)="
)

# Options that leave nothing to be stored; `--result_file` and `--result` are the same to mysqldump.
_NO_OUTPUT = re.compile("--(res[a-z_-]*|tab|print.defaults|help|version)(=|$)|-[rTV?]")

# The two names of one program, which dumps MySQL and MariaDB.
MYSQL_TOOLS = ("mysqldump", "mariadb-dump")


def mysql_stage(name: str, options: Sequence[str], env: Mapping[str, str]) -> Stage:
    """The dump of a MySQL job; `name` as in the config, `options` one word each.

    With --force it goes on after an error, and only what it says and its end tell what it is worth.
    Raises Failure for options that send the dump elsewhere.
    """
    for option in options:
        if _NO_OUTPUT.match(option):
            raise Failure(f"with {option} in MySQLOptions there is no dump to be stored",
                          "take it out")
    sock, database = mysql_parts(name)
    first = [option for option in options if _FIRST_OPTIONS.match(option)]
    others = [option for option in options if option not in first]
    tool = find_tool(MYSQL_TOOLS, env) or MYSQL_TOOLS[0]
    argv = (tool, *first, "--opt", *(("--socket", sock) if sock else ()), *others, database)
    return Stage(argv, watched=bool({"--force", "-f"} & set(others)))


def postgresql_stage(name: str) -> Stage:
    """The dump of a PostgreSQL job; `name` as in the config."""
    user, database = postgresql_parts(name)
    login = ("-U", user) if user else ()
    return Stage(("pg_dump", *login, database) if database else ("pg_dumpall", *login))


def repositories_in(folder: str) -> list[str]:
    """The Subversion repositories in a folder, by name. Raises Failure if it cannot be read."""
    try:
        names = [f"{folder}/{entry}" for entry in sorted(os.listdir(folder))]
    except OSError as error:
        raise Failure(f"Cannot open directory: {folder}: {error.strerror}") from error
    # What svnadmin leaves in every repository; other entries are nobody's failure.
    return [name for name in names
            if os.path.isfile(f"{name}/format") and os.path.isdir(f"{name}/db")]


def subversion_stage(repository: str, first: int, last: int) -> Stage:
    """The dump of a repository's revisions first to last, both included."""
    revisions = f"-r{first}:{last}"
    return Stage(("svnadmin", "dump", "-q", revisions, "--incremental", repository))


# How a dump begins.
SVN_DUMP = b"SVN-fs-dump-format"

# Old repositories hold log messages with a CR, which svnadmin loads only unchecked (E125005).
SVN_LOAD = ("-q", "--bypass-prop-validation")


# --------------------------------------------------------------------------------------------------
# Compression and encryption
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """A format of compression."""

    commands: tuple[str, ...]  # programs that write it
    starts: tuple[bytes, ...]  # what it begins with
    decoders: tuple[tuple[str, ...], ...]  # readers, the fastest first, the usual one last

    def decoder(self, env: Mapping[str, str]) -> Stage:
        """The fastest that is here."""
        found = (argv for argv in self.decoders if find_tool(argv[:1], env))
        return Stage(next(found, self.decoders[-1]))


# What a Compressor may write and a restore can read: RFC 1952; the file formats of bzip2 and xz;
# LZ4's frame format and its legacy one; RFC 8878, whose skippable frames pzstd puts first, with
# windows as long as `zstd --long=31` makes them. rapidgzip 0.16 is not among them: it ends with 0
# where a stream is cut off, and reads no faster from a pipe (0.7 s for 120 MB, igzip 0.3 s).
CODECS = (
    Codec(("pigz", "gzip"), (b"\x1f\x8b",), (("igzip", "-dc"), ("pigz", "-dc"), ("gzip", "-dc"))),
    Codec(("bzip2",), (b"BZh",), (("lbzip2", "-dc"), ("bzip2", "-dc"))),
    Codec(("xz",), (b"\xfd7zXZ\0",), (("xz", "-dc"),)),
    Codec(("lz4",), (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"), (("lz4", "-dc"),)),
    Codec(
        ("zstd",), (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"), (("zstd", "-dcq", "--long=31"),)
    ),
)


# How encrypted data begins: a packet, old or new, with the tag 1, 3, 9 or 18 (RFC 4880, 4.2).
_OPENPGP = re.compile(rb"-----BEGIN PGP|[\x84-\x87\x8c-\x8f\xa4-\xa7\xc1\xc3\xc9\xd2]")


def is_openpgp(start: bytes) -> bool:
    """Whether data that starts so is encrypted with OpenPGP."""
    return bool(_OPENPGP.match(start))


def ring_words(keyring: str | None) -> tuple[str, ...]:
    """gpg's words for a keyring besides its own."""
    return ("--keyring", keyring) if keyring else ()


def gpg_stage(recipients: Sequence[str], keyring: str | None, *, shown: bool = False) -> Stage:
    """Encryption for the recipients: the secret key of any of them opens it. The data is compressed
    already, so gpg does not do it again; gpg.conf may say that all is text, which spoils it.
    shown: as the original's line, for test mode."""
    words = ["gpg", "--batch", *ring_words(keyring)]
    words += [] if shown else ["-z", "0", "--no-textmode"]
    for recipient in recipients:
        words += ["-r", recipient]
    return Stage((*words, "-e"))


def shown_pipeline(source: Stage, kind: str, compressor: str | None, recipients: Sequence[str],
                   keyring: str | None) -> str:
    """A pipeline as test mode shows it: the original's line, safe to paste into a shell.

    Where no Compressor is set the line says gzip in the original's words, whatever faster
    program of the same format the run itself would take.
    """
    stages = [source, Stage(tuple(shlex.split(compressor or "gzip")))]
    if kind == DIRECTORY and not compressor:
        at = source.argv.index("-cp")
        stages = [Stage((*source.argv[:at], "-czp", *source.argv[at + 1 :]))]
    if recipients:
        stages.append(gpg_stage(recipients, keyring, shown=True))
    return " | ".join(map(str, stages))


# ==================================================================================================
# 8. Processes
# ==================================================================================================

# What tar says of every absolute name; no one needs it in the log of each night.
_TAR_CHATTER = re.compile(rb"Removing leading `.*' from ")

# What mysqldump writes last; with --skip-comments, and that of MariaDB 11.
_CLOSING = re.compile(
    rb"-- Dump completed|SET (SQL_NOTES=@OLD_SQL_NOTES|NOTE_VERBOSITY=@OLD_NOTE_VERBOSITY)"
)

# With --force, what leaves a dump empty or cut: errors of the client (2000 to 2999: MariaDB's
# manual, "Error Codes"), and a database that cannot be had at all.
_NO_DUMP = re.compile(
    r"[Ee]rror:? 2\d{3}\b|\(2\d{3}\)$|when (selecting the database|trying to connect)"
)

# What to do about messages that match, in small letters or not. gpg calls a key "No secret key"
# that is locked where nobody was asked for the passphrase, or nobody answered.
_TOOL_HINTS = (
    ("no space left", "free some room there"),
    ("access denied|authentication failed",
     "let the user that runs this log in, with ~/.my.cnf, ~/.pgpass or the job's options"),
    ("bad passphrase|bad session key",
     "the passphrase is wrong: --passphrase-file FILE names the file that holds it"),
    ("key decryption failed: (no passphrase|no pinentry|inappropriate ioctl|operation cancelled"
     "|timeout|end of file|no such device)",
     "the secret key has a passphrase, and none was given: use --passphrase-file FILE"),
    ("ignore-mdc-error", "an old gpg encrypted it without integrity protection: write"
     " ignore-mdc-error into gpg.conf, restore, and take it out again"),
)

# Bytes of one message: PATH_MAX (4096), each byte of it in octal, and what is said of it.
_MAX_MESSAGE = 20_000

# Bytes that are kept of what a stage wrote last.
_TAIL = 4096

# Kernel buffer between two stages, bytes: Linux's limit for ordinary users (pipe(7)).
_PIPE_BYTES = 1 << 20

# Bytes that go through a pipe at once.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. status: as subprocess gives it, -N for signal N; stderr_lines: its
    messages; tail: the last bytes of a watched stage."""

    stage: Stage
    status: int
    stderr_lines: tuple[str, ...]
    tail: bytes = b""

    @classmethod
    def read(cls, stage: Stage, status: int, errors: IO[bytes], tail: bytes) -> StageResult:
        """Of a stage that has ended. errors: the file that holds its messages."""
        errors.seek(0)
        lines: list[str] = []
        left_out = 0
        while line := errors.readline(_MAX_MESSAGE):
            text = line.decode("utf-8", "backslashreplace").rstrip()
            if text and not _TAR_CHATTER.search(line):
                if len(lines) > _MAX_MESSAGES:
                    lines.pop()
                    left_out += 1
                lines.append(text)
        if left_out:
            lines.insert(-1, f"{left_out + 1} more messages of {stage.tool}, the last of them:")
        return cls(stage, status, tuple(lines), tail)

    @property
    def messages(self) -> list[str]:
        """Those of its lines that say something: tar's last one is that there were errors."""
        return [line for line in self.stderr_lines if "due to previous errors" not in line]

    @property
    def unrecoverable(self) -> bool:
        """Whether tar says that it gave up in the middle (its manual, "Exit status of tar")."""
        return any("Error is not recoverable" in text for text in self.stderr_lines)

    @property
    def is_whole(self) -> bool:
        """Whether what it wrote can be used; see `check_exit_statuses`."""
        if self.stage.tool == "tar" and self.status in (1, 2):
            return not self.unrecoverable
        if self.stage.watched and self.status == 2:
            cut = any(map(_NO_DUMP.search, self.stderr_lines))
            return bool(_CLOSING.search(self.tail)) and not cut
        return self.status == 0

    @property
    def hint(self) -> str:
        """What to do about a stage that failed, "" if that is not known."""
        text = "\n".join(self.stderr_lines)
        for pattern, hint in _TOOL_HINTS:
            if re.search(pattern, text, re.IGNORECASE):
                return hint
        if self.stage.watched and self.status == 2:
            return "mend what it names; its closing lines tell whether such a dump is whole"
        if not re.search("[Nn]o secret key|decryption failed", text):
            return ""
        keys = " or ".join(dict.fromkeys(re.findall(r"ID ([0-9A-F]{8,})", text)))
        wanted = f"it wants the secret key {keys}" if keys else "the secret key is not here"
        return f"{wanted}: gpg --import it, or use --secret-key FILE"

    def __str__(self) -> str:
        how = f"ended with status {self.status}"
        if self.status < 0:
            how = f"was ended by {signal.Signals(-self.status).name}"
        # A line that begins with a blank goes on with the one before it.
        said = [line for line in self.messages if not line[:1].isspace()] or self.messages
        return ": ".join([f"{self.stage.tool} {how}", *said[-1:]])


def check_exit_statuses(results: Sequence[StageResult]) -> list[str]:
    """What the ends of a pipeline's stages mean: the warnings to log, none if all went well.

    Raises Failure where the stream cannot be trusted. GNU tar ends with 1 where a file changed
    as it was read, with 2 where something could not be read; the stream is whole all the same,
    unless tar says that it gave up (GNU tar manual, "Synopsis"). mysqldump --force ends with 2
    where it could not dump something; all the rest is there if it wrote its closing lines, unless
    it lost its server, for then it writes them, too.
    """
    # The first dead stage takes its neighbours along (SIGPIPE), so it is the one to be named.
    broken = [result for result in results if not result.is_whole]
    if broken:
        cause = next((one for one in broken if one.status != -signal.SIGPIPE), broken[0])
        raise Failure(str(cause), cause.hint)
    warnings: list[str] = []
    for result in results:
        if result.status:
            warnings += result.stderr_lines or (str(result),)
        elif result.stage.tool == "tar":
            warnings += [text for text in result.stderr_lines if _TAR_RENAMED in text]
    return warnings


# --------------------------------------------------------------------------------------------------
# Pipelines and filters
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _starting(argv: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        hint = "install it, or set PATH in the crontab"
        raise Failure(f"{argv[0]} is not on PATH", hint) from error
    except OSError as error:
        raise os_failure(error, f"start {os.path.basename(argv[0])}") from error


def widen_pipe(pipe: IO[bytes] | io.RawIOBase) -> None:
    """Makes room in a pipe, so that its two ends wait for each other less often."""
    with contextlib.suppress(OSError):  # a small pipe is slower, not wrong, and a file is none
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def write_all(output: IO[bytes], data: Piece) -> None:
    """Writes all of it; an unbuffered file may take less at once. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[output.write(view) :]


def temp_file() -> IO[bytes]:
    """An unnamed file in the system's folder for such. Raises Failure."""
    folder = temp_folder()
    with os_failures(f"make a temporary file in {folder}"):
        return tempfile.TemporaryFile(dir=folder)


def temp_folder() -> str:
    """The system's folder for temporary files. Raises Failure where there is none."""
    hint = "make room in one of them, or set TMPDIR in the crontab to one that can be written"
    with os_failures("find a place for temporary files", hint):
        return tempfile.gettempdir()


class Pipeline:
    """Stages that run, each reading what the one before it writes; the end is read from here.

    A context: they run within it, and what still runs when it is left is killed.
    stages: at least one; env: the environment of all of them; feed: what the first one reads,
    written by a thread, None for nothing; output: where the last one writes, None for `readinto`
    and `blocks`. What they say on standard error goes to unnamed files, read at the end.
    """

    def __init__(
        self, stages: Sequence[Stage], env: Mapping[str, str], *,
        feed: Iterable[Piece] | None = None, output: IO[bytes] | None = None,
    ) -> None:
        self._stages, self._env, self._input, self._output = stages, env, feed, output
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors: list[IO[bytes]] = []
        self._tails = [b""] * len(stages)
        self._feeders: dict[int, threading.Thread] = {}  # by the stage that is fed
        self._fault: BaseException | None = None

    def __enter__(self) -> Pipeline:
        try:
            for number, stage in enumerate(self._stages):
                with signals_held():
                    self._start(number)
                if stage.shell:
                    self._require_output(number)
            for feeder in self._feeders.values():  # one that is at work has to be waited for
                with signals_held():
                    feeder.start()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, kind: object = BaseException, *_: object) -> None:
        for stage, process in zip(self._stages, self._processes, strict=False):
            is_at_work = process.poll() is None
            if stage.shell and (is_at_work or kind):  # what it has started may outlive it
                end_session(process)
            elif is_at_work:
                process.kill()
            process.wait()
        for feeder in self._feeders.values():
            if feeder.ident:
                feeder.join()
        for process in self._processes:
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        for errors in self._errors:
            errors.close()

    def _start(self, number: int) -> None:
        stage, is_last = self._stages[number], number == len(self._stages) - 1
        feed, source = self._input, None
        if number:
            is_watched = self._stages[number - 1].watched
            feed = self._output_of(number - 1) if is_watched else None
            source = None if is_watched else self._processes[-1].stdout
        self._errors.append(temp_file())
        with _starting(stage.argv):
            process = subprocess.Popen(
                stage.argv, env=stage.environment(self._env), bufsize=0,
                stdin=source or (subprocess.DEVNULL if feed is None else subprocess.PIPE),
                stdout=self._output if is_last and self._output else subprocess.PIPE,
                stderr=self._errors[-1], pass_fds=stage.descriptors,
                start_new_session=stage.shell,
            )
        self._processes.append(process)
        if source:
            source.close()
        for pipe in filter(None, (process.stdin, process.stdout)):
            widen_pipe(pipe)
        if feed is not None:
            feeder = threading.Thread(target=self._feed, args=(number, feed), daemon=True)
            self._feeders[number] = feeder

    def _require_output(self, number: int) -> None:
        """Waits for a stage's first byte. Raises Failure where it ends without one."""
        output = select.poll()
        output.register(self._processes[number].stdout, select.POLLIN)  # type: ignore[arg-type]
        if not output.poll()[0][1] & select.POLLIN:
            result = self._result(number)
            check_exit_statuses([result])
            raise Failure(f"the command wrote nothing: {result}", "try it by hand")

    def _feed(self, number: int, blocks: Iterable[Piece]) -> None:
        process = self._processes[number]
        assert process.stdin
        try:
            for block in blocks:
                try:
                    write_all(process.stdin, block)
                except BrokenPipeError:
                    if number:
                        break  # the statuses of the stages tell why
                    if process.wait():
                        break  # this status tells why
                    # It needs no more, but whether the rest of the feed is whole is to be seen.
        except BaseException as error:
            self._fault = error
            process.kill()  # it must not take the cut stream for a whole one
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            if number:  # the watched stage ends, too, when nobody reads it any more
                self._processes[number - 1].stdout.close()  # type: ignore[union-attr]

    def _output_of(self, number: int) -> Iterator[bytes]:
        output = self._processes[number].stdout
        assert output
        while data := output.read(_BLOCK):
            self._tails[number] = (self._tails[number] + data[-_TAIL:])[-_TAIL:]
            yield data

    def blocks(self) -> Iterator[bytes]:
        """What the last stage writes, to its end."""
        return self._output_of(len(self._stages) - 1)

    def readinto(self, view: memoryview) -> int:
        """Bytes read into the view, 0 at the end of the stream."""
        count: int = self._processes[-1].stdout.readinto(view)  # type: ignore[union-attr]
        return count

    def check(self) -> None:
        """Raises Failure if a stage has already failed; waits for none, since nobody reads now."""
        read_here = {number - 1 for number, one in self._feeders.items() if one.is_alive()}
        # An exception within `poll` may leave its lock locked, on which `__exit__` would wait for
        # ever.
        with signals_held():
            ended = [self._result(n) for n, process in enumerate(self._processes)
                     if process.poll() and n not in read_here]
        # A stage that lost its reader is not the cause; the end of the stream is near, and tells.
        check_exit_statuses([one for one in ended if one.status != -signal.SIGPIPE])

    def finish(self) -> list[str]:
        """Waits for all stages; the warnings, or Failure as `check_exit_statuses` says."""
        return check_exit_statuses(self.results())

    def results(self) -> list[StageResult]:
        """Waits for all stages, and tells how each of them ended. Raises what `blocks` raised."""
        for feeder in self._feeders.values():
            feeder.join()
        if self._fault:
            raise self._fault
        return [self._result(number) for number in range(len(self._processes))]

    def _result(self, number: int) -> StageResult:
        status = self._processes[number].wait()
        return StageResult.read(
            self._stages[number], status, self._errors[number], self._tails[number]
        )


@contextlib.contextmanager
def run_filter(
    stage: Stage, blocks: Iterable[Piece], env: Mapping[str, str]
) -> Iterator[Iterator[bytes]]:
    """A filter at work within the block; what it makes of a stream.

    That ends with a Failure unless the filter ends with 0, or with whatever the stream raised.
    Who leaves the block early kills the filter.
    """
    with Pipeline([stage], env, feed=blocks) as pipeline:
        yield _checked_output(pipeline)


def _checked_output(pipeline: Pipeline) -> Iterator[bytes]:
    yield from pipeline.blocks()
    for result in pipeline.results():
        if result.status:
            raise Failure(str(result), result.hint)


@contextlib.contextmanager
def decoded(
    blocks: Iterator[Piece], env: Mapping[str, str], gpg: Sequence[str] = ("gpg", "--batch")
) -> Iterator[Iterator[Piece]]:
    """What was backed up, from an archive's bytes: decrypted and decompressed within the block, as
    their first bytes ask for (RFC 4880, `CODECS`). gpg: how to call it."""
    with contextlib.ExitStack() as stack:
        start, blocks = split_head(blocks)
        if is_openpgp(start):
            decrypt = Stage((*gpg, "-d"), IN_ENGLISH)
            start, blocks = split_head(stack.enter_context(run_filter(decrypt, blocks, env)))
        for codec in CODECS:
            if start.startswith(codec.starts):
                blocks = stack.enter_context(run_filter(codec.decoder(env), blocks, env))
        yield blocks


def split_head(blocks: Iterator[Piece]) -> tuple[bytes, Iterator[Piece]]:
    """The first 32 bytes, and all of the stream, these included."""
    first = b""
    for block in blocks:
        first += block
        if len(first) >= 32:
            break
    return first[:32], itertools.chain([first], blocks)


def check_compressor(compressor: str, env: Mapping[str, str]) -> None:
    """Raises Failure (status 2) unless a restore gives back what this command compresses."""
    words = shlex.split(compressor)
    sample = b"s3napback tries the Compressor\n" * 200
    known = ", ".join(name for codec in CODECS for name in codec.commands)
    hint = f"these can be read: {known}, or cat for none"
    if {"|", ">", "<", "&&", ";"} & set(words):
        hint = "it is one command with its options, and no line for a shell"
    back = b""
    try:
        with (
            run_filter(Stage(tuple(words)), [sample], env) as compressed,
            decoded(compressed, env) as content,
        ):
            for block in content:
                back += block
                if len(back) > len(sample):
                    break
        why = "" if back == sample else "what it writes cannot be read back"
    except Failure as failure:
        why = failure.message
    if why:
        raise Failure(f"Compressor {compressor} cannot be used: {why}", hint, status=EXIT_USAGE)


# --------------------------------------------------------------------------------------------------
# Short commands
# --------------------------------------------------------------------------------------------------

# What proves who we are to AWS (its command line's manual, "Environment variables").
_AWS_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")


def tool_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for tools: ours, without the secrets that only we need."""
    return {name: value for name, value in env.items() if name not in _AWS_SECRETS}


@dataclass(frozen=True)
class ToolResult:
    """What a short command left. status: as subprocess gives it; output and errors: what it wrote
    to standard output and to standard error."""

    status: int
    output: str
    errors: str

    def required(self, doing: str) -> str:
        """The output. Raises Failure, what it was `doing` and its first message, unless its status
        is 0."""
        if self.status:
            why = (self.errors.strip().splitlines() or [f"status {self.status}"])[0]
            raise Failure(f"{doing}: {why}")
        return self.output


def run_tool(
    argv: Sequence[str], env: Mapping[str, str], *, input: bytes = b"", cwd: str | None = None,
    timeout: float | None = None, new_session: bool = False,
) -> ToolResult:
    """Runs a short command to its end. input: what it reads; cwd: the folder where it starts;
    timeout: seconds, after which it is killed; new_session: it has no terminal.

    Raises Failure where it cannot be started, or does not end in time.
    """
    try:
        with _starting(argv):
            done = subprocess.run(
                argv, env=dict(env), input=input, cwd=cwd, timeout=timeout, capture_output=True,
                start_new_session=new_session, check=False,
            )
    except subprocess.TimeoutExpired as error:
        tool = os.path.basename(argv[0])
        raise Failure(f"{tool} does not answer within {timeout} s", "try it by hand") from error
    errors = done.stderr.decode("utf-8", "backslashreplace")
    return ToolResult(done.returncode, os.fsdecode(done.stdout), errors)


# How long a hook may go on, and what is to be tidied, once a signal asks for the end; how long a
# process may take to end when it is told to; what is kept of its output. Seconds; bytes, and lines,
# of which a log takes a thousand a second.
LAST_SECONDS, _END_SECONDS, _MAX_OUTPUT, _MAX_LINES = 30.0, 5.0, 1 << 16, 1000


def run_hook(
    name: str, command: str, env: Mapping[str, str], tool_log: logging.Logger, seconds: float,
    last_seconds: float,
) -> None:
    """Runs a shell command, which a directive names, and logs the end of what it prints.

    It has a session of its own. What is in it is ended after so many seconds, and last_seconds
    after a signal asked for our end. What it leaves in the background goes on.
    Raises Failure unless it ends with 0: with the status EXIT_LOCKED, where it ends with that.
    """
    with signals_held():
        with _starting(("/bin/sh",)):
            process = subprocess.Popen(
                ("/bin/sh", "-c", command), env=dict(env), bufsize=0, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        started = time.monotonic()
        end = started + seconds
        pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe]
        printed, poll = {pipe.fileno(): b"" for pipe in pipes}, select.poll()
        for number in printed:
            poll.register(number, select.POLLIN)

        def read(milliseconds: int) -> None:
            for number, _ in poll.poll(milliseconds):
                block = os.read(number, _MAX_OUTPUT)
                printed[number] = (printed[number] + block)[-_MAX_OUTPUT:]
                if not block:
                    poll.unregister(number)

        while process.poll() is None and time.monotonic() < end:
            read(20)
            if _held_signal:
                end = min(end, time.monotonic() + last_seconds)
        took, is_late = time.monotonic() - started, process.returncode is None
        if is_late:
            end_session(process)
        read(0)
        for pipe in pipes:
            pipe.close()
        output, errors = (text.decode("utf-8", "backslashreplace") for text in printed.values())
        for text, level in ((output, logging.INFO), (errors, logging.WARNING)):
            for line in text.splitlines()[-_MAX_LINES:]:
                tool_log.log(level, "%s", line)
    if is_late:
        hint = "HookTimeout gives it more time" if took >= seconds else ""
        raise Failure(f"{name} did not end within {duration_text(took)}", hint)
    if process.returncode:
        status = EXIT_LOCKED if process.returncode == EXIT_LOCKED else EXIT_FAILED
        last = " ".join(errors.split())[-500:]
        why = StageResult(Stage((name,)), process.returncode, (last,) if last else ())
        raise Failure(str(why), status=status)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the session that a process began, or at least tells them to."""
    if process.poll() is not None and os.path.exists(f"/proc/{process.pid}"):
        return  # nothing is left of the session: its number is another process's by now
    for signum in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + _END_SECONDS
        for group in {process.pid, *_groups_of(process.pid)}:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left, or ours
                os.killpg(group, signum)
        while time.monotonic() < end and (
            process.poll() is None or any(_groups_of(process.pid))
        ):
            time.sleep(0.02)


def _groups_of(session: int) -> Iterator[int]:
    """The process group of each process of a session; timeout(1) makes one for itself."""
    for pid in map(int, glob.glob("[0-9]*", root_dir="/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                yield os.getpgid(pid)


# --------------------------------------------------------------------------------------------------
# What Subversion and gpg are asked
# --------------------------------------------------------------------------------------------------


def youngest_revision(repository: str, env: Mapping[str, str]) -> int:
    """The last revision of a Subversion repository. Raises Failure if there is none to be had."""
    result = run_tool(("svnlook", "youngest", repository), env)
    return int(result.required(f"svnlook cannot read the repository {repository}"))


def revision_identity(repository: str, revision: int, env: Mapping[str, str]) -> str:
    """The repository's UUID and the revision's date, without those that svnlook does not tell.

    Another repository at its path, or itself brought back from an older copy, differs in them.
    """
    at = ("propget", "--revprop", "-r", str(revision), repository, "svn:date")
    results = [run_tool(("svnlook", *words), env) for words in (("uuid", repository), at)]
    return " ".join(result.output.strip() for result in results if not result.status)


def with_further_keyring(settings: Settings, env: Mapping[str, str]) -> Settings:
    """The settings without a GpgKeyring that gpg opens anyway: given twice, a keybox is an error to
    it ("File exists"), and what it encrypted comes with a status of 2."""
    home = env.get("GNUPGHOME") or expand_home("~/.gnupg", env)
    own, ring = os.path.join(home, "pubring.kbx"), expand_home(settings.gpg_keyring or "", env)
    place = ring if "/" in ring else os.path.join(home, ring)
    is_own = os.path.realpath(place) == os.path.realpath(own)
    return replace(settings, gpg_keyring=None) if is_own else settings


# How a key or subkey ended, by its validity (doc/DETAILS of GnuPG, field 2).
_ENDED = {"e": "expired", "r": "is revoked", "d": "is disabled", "i": "is invalid"}


def check_recipient(recipient: str, keyring: str | None, env: Mapping[str, str]) -> None:
    """Raises Failure, with how to mend it, unless gpg can encrypt for the recipient.

    gpg itself decides, by encrypting nothing; the key list is read to say what is wrong.
    """
    stage = replace(gpg_stage([recipient], keyring), env=IN_ENGLISH)
    result = run_tool(stage.argv, stage.environment(env))
    if "keyrings are ignored" in result.errors:  # GnuPG 2.4 with use-keyboxd in common.conf
        why = f"gpg ignores GpgKeyring {keyring}: this GnuPG keeps its keys in keyboxd"
        hint = ("take use-keyboxd out of common.conf in gpg's home, or import the key there and"
                " leave GpgKeyring out")
    elif result.status == 0:
        return
    elif keyring and "/" in keyring and not os.path.exists(expand_home(keyring, env)):
        why, hint = f"GpgKeyring {keyring} does not exist", "correct it"
        if not keyring.startswith(("/", "~")):
            hint = f"write the whole path: a relative one begins in {os.getcwd()}"
    elif keys := _public_keys(recipient, keyring, env):
        why, hint = _key_fault(recipient, keyring, keys, _last_line(result.errors))
    else:
        listing = run_tool(("gpg", "--batch", *ring_words(keyring), "--list-public-keys"), env)
        known = listing.output.strip() or "an empty keyring"
        why, hint = f"GPG recipient {recipient} not found in {known}", (
            "gpg --import the public key as the user that runs this; a name with blanks stands in"
            " quotes")
        if listing.status:  # its folder may be read-only, and a trust database due for an update
            why = f"gpg cannot list its keys: {_last_line(listing.errors)}"
            hint = "as the user that runs this: gpg --check-trustdb"
            if keyring and "Invalid packet" in listing.errors:
                hint = f"is {keyring} a keyring? gpg --import makes one of a file with a key"
    raise Failure(why, hint, status=EXIT_USAGE)


def _last_line(messages: str) -> str:
    return (messages.strip().splitlines() or ["gpg gives no reason"])[-1]


def _key_fault(
    recipient: str, keyring: str | None, keys: Sequence[Mapping[str, Any]], reason: str
) -> tuple[str, str]:
    """Why gpg does not encrypt with a recipient's keys, and what to do. reason: gpg's own words."""
    key = next(filter(encryption_keys, keys), keys[0])
    name, trust = f"the key {key['keyid']} of GPG recipient {recipient}", key.get("trust", "")
    edit = f"run: {edit_key(key, keyring)}"
    if trust == "e":
        return f"{name} expired on {_day_of(key)}", f"{edit} expire"
    if trust == "r":
        return f"{name} is revoked", "set GpgRecipient to a valid one"
    if trust == "d" or "D" in key.get("cap", ""):  # doc/DETAILS of GnuPG, fields 2 and 12
        return f"{name} is disabled", f"{edit} enable"
    if encryption_keys(key) and trust not in "mfu":
        return f"{name} is not trusted", f"{edit} trust"
    if encryption_keys(key):
        return f"gpg cannot encrypt for {recipient}: {reason}", ""
    ends = ", ".join(
        f"{sub['keyid']} {_ENDED.get(sub['trust'], 'cannot be used')}"
        + (f" on {_day_of(sub)}" if sub["trust"] == "e" else "")
        for sub in key.get("subkey_info", {}).values() if "e" in sub["cap"]
    )
    return (f"{name} has no subkey for encryption" + (f" that is valid: {ends}" if ends else ""),
            f"where the secret key is: gpg --quick-add-key {key['fingerprint']}; then import the"
            " public key here again")


def edit_key(key: Mapping[str, str], keyring: str | None) -> str:
    """The command in which a key is changed, but for its last word."""
    return shlex.join(("gpg", *ring_words(keyring), "--edit-key", key["keyid"]))


def encryption_keys(key: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The key itself and its subkeys, as far as gpg would encrypt with them."""
    if key.get("trust") in _ENDED:
        return []
    # Of the key itself small letters tell, of the whole capitals (doc/DETAILS, field 12).
    return [one for one in (key, *key.get("subkey_info", {}).values())
            if "e" in one.get("cap", "") and one.get("trust") not in _ENDED]


def _end_of(key: Mapping[str, str]) -> float:
    """Epoch seconds at which a key or subkey expires; for ever without."""
    return float(key.get("expires") or math.inf)


def _day_of(key: Mapping[str, str]) -> str:
    return date.fromtimestamp(_end_of(key)).isoformat()


def _public_keys(
    recipient: str, keyring: str | None, env: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    try:
        with library("python-gnupg"):
            import gnupg

            gpg = gnupg.GPG(
                gpgbinary=shutil.which("gpg", path=env.get("PATH")) or "gpg",
                options=list(ring_words(keyring)),
                env=dict(env),
            )
        return list(gpg.list_keys(keys=recipient))
    except (OSError, ValueError) as error:  # it is there, and does not even tell its version
        raise Failure(
            f"gpg does not work: {' '.join(str(error).split()).rstrip(': ')}",
            "see what this says: gpg --version", status=EXIT_USAGE,
        ) from error


# ==================================================================================================
# 9. Buffers
# ==================================================================================================

# Bytes that are read, hashed and handed on at a time.
_PIECE = 1 << 20

# Buffers of more bytes than this are files.
_MAX_IN_MEMORY = 64_000_000

# Fraction of the spool disk to keep free.
_KEEP_FREE = 0.05


# Reads into a view: how many bytes, 0 at the end of the source.
ReadInto: TypeAlias = "Callable[[memoryview], int | None]"


class DiskFull(Failure):
    """The file of a buffer takes no more bytes; see `Buffer.extend`."""


class Buffer:
    """The bytes of one object on their way: in memory, or in an unlinked file where they are many.

    room: the most bytes that it can hold
    folder: where the file is, None for the system's temporary folder
    """

    def __init__(self, room: int, folder: str | None = None) -> None:
        self._room = room
        self._file: io.FileIO | None = None
        if room > _MAX_IN_MEMORY:
            self._doing = f"keep a chunk on its way in {folder or temp_folder()}"
            with os_failures(self._doing):
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `close`
                    buffering=0, dir=folder
                )
            self._memory = memoryview(bytearray(_PIECE))
        else:
            # Unlike a bytearray's, these pages cost nothing until something is in them. Large ones
            # save a quarter of an upload's time.
            memory = mmap.mmap(-1, room or 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without large pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = memoryview(memory)
        self.clear()

    @staticmethod
    def of(data: bytes | bytearray | Buffer) -> Buffer:
        """The data in a buffer; a buffer itself."""
        if isinstance(data, Buffer):
            return data
        buffer = Buffer(len(data))
        buffer.extend(io.BytesIO(data).readinto)
        return buffer

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces())

    def fill(self, readinto: ReadInto) -> None:
        """Takes the next bytes of a source in place of its own; see `extend`."""
        self.clear()
        self.extend(readinto)

    def extend(self, readinto: ReadInto) -> None:
        """Takes the next bytes of a source, up to the source's end or its own room.

        Raises DiskFull where the file takes no more. Nothing of the source is lost then: called
        again when there is room, it goes on.
        """
        while True:
            self._write()
            start = 0 if self._file else self._size
            view = self._memory[start : start + max(0, self._room - self._size)]
            count = readinto(view) if view else 0
            if not count:
                break
            self._size += count
            if self._file:  # hashed here, so that it need not be read back for that
                self._unwritten = view[:count]
                self._hash.update(self._unwritten)

    def _write(self) -> None:
        try:
            while self._unwritten and self._file:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            raise DiskFull(
                os_failure(error, self._doing).message,
                f"{self._room} bytes may be needed there: set TempDir to a larger disk"
                " (without a config, the variable TMPDIR), or a smaller ChunkSize",
            ) from error

    def clear(self) -> None:
        """Empties it, and gives a file's room back."""
        self._size = 0
        self._unwritten = memoryview(b"")  # read from the source, and not yet in the file
        self._hash, self._hashed = hashlib.md5(usedforsecurity=False), 0  # of its first bytes
        if self._file:
            self._file.seek(0)
            self._file.truncate()

    def give_up(self) -> None:
        """Ends an `extend` that is at work in another thread, after what it is reading."""
        self._room = 0

    def piece(self, start: int, count: int = _PIECE) -> memoryview:
        """Its bytes from `start` on, at most `count`; valid until it is filled or cleared."""
        end = min(start + count, self._size)
        if not self._file:
            return self._memory[start:end]
        with os_failures(self._doing):
            return memoryview(os.pread(self._file.fileno(), max(0, end - start), start))

    def pieces(self) -> Iterator[memoryview]:
        """All of it, see `piece`."""
        return map(self.piece, range(0, self._size, _PIECE))

    def md5(self) -> str:
        """The hex MD5 of all of it."""
        if not self._file:  # only when asked for: by the thread that sends it, beside others
            self._hash.update(self._memory[self._hashed : self._size])
            self._hashed = self._size
        return self._hash.hexdigest()

    def close(self) -> None:
        """Gives its room back; it is not used any more."""
        self._memory = memoryview(b"")
        if self._file:
            self._file.close()


def file_digest(path: str, algorithm: str) -> str:
    """The hex digest of a file, which may be large."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(_PIECE):
            digest.update(block)
    return digest.hexdigest()


def has_room(size: int, folder: str | None, count: int = 1) -> bool:
    """Whether `count` more buffers of that size, bytes, fit where they would be."""
    if size <= _MAX_IN_MEMORY:
        return True
    disk = shutil.disk_usage(folder or temp_folder())
    return disk.free - size * count >= disk.total * _KEEP_FREE


# ==================================================================================================
# 10. Stores
# ==================================================================================================


@dataclass(frozen=True)
class StoredObject:
    """One object as a listing shows it."""

    key: str
    size: int  # bytes
    etag: str  # hex, the MD5 of a plain upload
    modified: float  # epoch seconds
    storage_class: str = "STANDARD"
    version: str = ""  # the id of this version of it, "" where the newest is meant


# Stands among an object's metadata where its ETag is no MD5: encryption with a key of AWS's KMS.
ETAG_IS_NOT_MD5 = f"{META}opaque"


class Store(Protocol):
    """One bucket. What the rest of the program assumes of it, and what happens where that is wrong:

    1. `put` is atomic: after a failure, its key holds what it held before, or all of the new
       object. An object that is torn all the same has another MD5 than its ETag, or another size
       than its archive's last chunk counts; `fetch` or `resolve_archive` notices it.
    2. What was put is listed from then on. Where listings lag, `confirm_or_undo` asks again
       for half a minute; then the job fails, and leaves in the bucket what it stored.
    3. User metadata comes back as it was given. Where it is lost, archives count as the Perl
       script's, which have none, and SafeReplace refuses to work.
    4. Nobody else writes to the same archive at the same time. Where somebody does,
       `confirm_or_undo` sees chunks of two uploads, and the job fails; what is mixed is not called
       complete.
    5. Listings are in the order of the keys' bytes. In another order some objects would be left
       out, of which `verify` says that they are missing.

    Every operation raises TransientFailure where retrying may help, NotFound where the bucket or
    the key is not there, and Failure for the rest.
    """

    bucket: str
    retries: Retries

    def put(self, key: str, data: bytes | Buffer, metadata: Mapping[str, str]) -> str:
        """Stores an object and returns its ETag as a listing will show it: the hex MD5 of its data,
        which the store confirmed. Where ETags are no MD5, it is what the store said, or ""."""

    def fetch(self, key: str, into: Buffer) -> dict[str, str]:
        """Fills the buffer with an object's data, compared with its MD5 where the store knows it,
        and returns what `head` does. Raises Failure for more data than there is room for."""

    def peek(self, key: str, count: int) -> bytes:
        """The first bytes of an object, at most `count`; unchecked."""

    def head(self, key: str) -> dict[str, str] | None:
        """The object's user metadata, None where there is no such key; with
        ETAG_IS_NOT_MD5 where that is so."""

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects whose key starts with the prefix, in the order of their keys' bytes; as many
        as `PAGE` are one request."""

    def copy(self, source: str, target: str) -> None:
        """Makes the object `target` of another of the bucket: the same data and metadata."""

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; absent ones are no error."""

    def try_to_store(self, key: str) -> None:
        """Stores and deletes an object of that key, once: raises Failure where objects would be
        refused, because of their storage class for example."""

    def exists(self) -> bool:
        """Whether the bucket is there; True where the access key is not told."""

    def create(self) -> None:
        """Makes the bucket."""

    def remove(self) -> None:
        """Removes the bucket, which must be empty."""


def is_known_to_be_there(store: Store, key: str) -> bool:
    """Whether an object is in the bucket, whatever the listing says. Whose access key may not list
    all of the bucket is not told (S3 API Reference, HeadObject), and gets False."""
    try:
        return store.head(key) is not None
    except Failure as failure:
        if failure.code != "AccessDenied":
            raise
        return False


@contextlib.contextmanager
def workers(store: Store, count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that work for a store. Whoever leaves early does not wait for their retries."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    except BaseException:
        with store.retries.once():
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


# --------------------------------------------------------------------------------------------------
# Retries
# --------------------------------------------------------------------------------------------------

# Pauses between two tries, seconds: before the second, and the longest, js3tream's with -n.
_FIRST_PAUSE, _MAX_PAUSE = 0.5, 600.0

# Tries that an operation always gets: js3tream's.
_MIN_TRIES = 3


class Retries:
    """How the operations of a store are tried again while their failures are transient.

    hours: how long one operation is tried, at least three times; None: it is tried once
    log: where each further try is told
    stop: set by whoever does not want to wait: it ends all pauses, and nothing is tried again

    Pauses double from half a second to ten minutes, with jitter.
    """

    def __init__(self, hours: float | None = None, log: logging.Logger = log) -> None:
        self.stop = threading.Event()
        self._seconds = None if hours is None else hours * 3600
        self._log = log
        self._watch: Callable[[float], None] = lambda seconds: None

    def run(self, attempt: Callable[[], T]) -> T:
        """The result of the attempt. Raises its last TransientFailure, or the first other."""
        started, tries = time.monotonic(), 0
        while True:
            try:
                return attempt()
            except TransientFailure as failure:
                if self._seconds is None or self.stop.is_set() or _is_ending:
                    raise
                tries += 1
                pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _MAX_PAUSE) * random.uniform(0.5, 1.0)
                if tries >= _MIN_TRIES:
                    left = started + self._seconds - time.monotonic()
                    if left <= 0:
                        raise
                    pause = min(pause, left)
                gc.collect()  # botocore's errors hold on, in circles, to what was to be sent
                self._log.warning("%s; trying again in %s", failure, duration_text(pause))
                self._watch(time.monotonic() - started + pause)
                self.wait(pause)

    def wait(self, seconds: float) -> None:
        """A pause. A signal ends it, whose handler can set no event without a risk."""
        parts = math.ceil(seconds / 0.5)
        for _ in range(parts):
            if _is_ending or self.stop.wait(seconds / parts):
                return

    @contextlib.contextmanager
    def lasting(self, hours: float) -> Iterator[None]:
        """Within it one operation is tried for so many hours."""
        before, self._seconds = self._seconds, hours * 3600
        try:
            yield
        finally:
            self._seconds = before

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Within it nothing is tried again, and pauses end: after a timeout or a signal the
        clean-up is tried once."""
        before = self.stop.is_set()
        self.stop.set()
        try:
            yield
        finally:
            if not before:
                self.stop.clear()

    @contextlib.contextmanager
    def watched(self, watch: Callable[[float], None]) -> Iterator[None]:
        """Within it `watch` is told, before each pause, the seconds from an operation's first try
        to the end of that pause: a database that waits for us meanwhile may hang up."""
        self._watch, before = watch, self._watch
        try:
            yield
        finally:
            self._watch = before


def retried(operation: Operation) -> Operation:
    """An operation of a store, tried again as the store's `retries` say."""

    @wraps(operation)
    def persistent(store: Store, *args: Any) -> Any:
        return store.retries.run(lambda: operation(store, *args))

    return persistent  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------
# Access
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Access:
    """Where a bucket is, and the access key. Empty fields: AWS's usual sources and defaults."""

    endpoint: str | None = None
    region: str | None = None
    key: str | None = None
    secret: str | None = field(default=None, repr=False)  # never in a traceback or a log
    storage_class: str | None = None
    connections: int = 4
    limit: RateLimiter | None = None
    encryption: Mapping[str, str] = field(default_factory=dict)  # boto3's parameters


def read_key_file(path: str) -> tuple[str, str]:
    """(key, secret) from a file of the lines `key=…` and `secret=…`, Java properties as js3tream.

    Raises UsageFailure naming the file where it cannot be read or lacks one of them.
    """
    with (
        os_failures("read S3Keyfile", status=EXIT_USAGE),
        open(path, encoding="utf-8", errors="surrogateescape") as file,
    ):
        lines = file.read(65536).splitlines()
    found = {"key": "", "secret": ""}
    for line in lines:
        if match := re.match(r"\s*(key|secret)\s*[=:\s]\s*(.*?)\s*$", line):
            found[match[1]] = re.sub(r"\\(.)", r"\1", match[2])
    for name, value in found.items():
        if not value:
            raise UsageFailure(f"S3Keyfile {path} has no line {name}=…",
                               "it needs the lines key=… and secret=…")
    return found["key"], found["secret"]


def others_can_read(path: str) -> bool:
    """Whether a file is open to more than its owner."""
    return bool(os.stat(path).st_mode & 0o077)


def folder_root(endpoint: str | None) -> str | None:
    """The folder that a file: endpoint names, None for any other."""
    if endpoint and endpoint.lower().startswith("file:"):
        return urllib.parse.unquote(urllib.parse.urlsplit(endpoint).path, errors="surrogateescape")
    return None


def access_of(settings: Settings) -> Access:
    """How to reach the config's bucket. Raises Failure for a key file that is no good."""
    key = secret = None
    if settings.s3_keyfile and folder_root(settings.s3_endpoint) is None:
        key, secret = read_key_file(settings.s3_keyfile)
    limit = RateLimiter(settings.bandwidth_limit) if settings.bandwidth_limit else None
    encryption = {"ServerSideEncryption": settings.server_side_encryption,
                  "SSEKMSKeyId": settings.kms_key}
    return Access(settings.s3_endpoint, settings.s3_region, key, secret, settings.storage_class,
                  settings.parallel, limit, {k: text for k, text in encryption.items() if text})


# --------------------------------------------------------------------------------------------------
# A bucket as a folder
# --------------------------------------------------------------------------------------------------

# Longest piece of a file name, in bytes; ext4, xfs and zfs allow 255 with what we add.
_MAX_NAME_PIECE = 180

# Seconds without a write after which a half written file belongs to no run any more.
_ABANDONED = 86400.0


def bucket_folders(root: str, own: str) -> list[str]:
    """The folders of a bucket, and of all others that this program made beside it: backups leave
    them out, and restores keep them."""
    with contextlib.suppress(OSError):
        return [entry.path for entry in os.scandir(root)
                if entry.name == own or os.path.isdir(os.path.join(entry.path, ".meta"))]
    return []


class FolderStore:
    """A bucket as the folder ROOT/BUCKET: one plain file per object, named by its key as in a URL.

    An object's ETag and user metadata are in its sidecar, ROOT/BUCKET/.meta/DIGEST@SIZE-TIME.json:
    the digest stands for the file's name, size and time are those of the data, so that the one
    rename of the data switches both. In a copy that has not kept the times (`rsync -r`), size and
    content tell which sidecar it is, and the sidecar's name tells the time.
    """

    def __init__(self, root: str, bucket: str, clock: Callable[[], float]) -> None:
        self.bucket = bucket
        self.retries = Retries()  # no failure of a folder is transient
        self._root, self._clock = root, clock
        self._folder = os.path.join(root, bucket)
        self._sidecars = os.path.join(self._folder, ".meta")
        # How the names of half written files of this machine begin; the process's number follows.
        node = urllib.parse.quote(os.uname().nodename, safe="").replace("-", "%2D")
        self._temp_start = f".new-{node}-"
        self._swept = False

    def put(self, key: str, data: bytes | Buffer, metadata: Mapping[str, str]) -> str:
        data = Buffer.of(data)
        path = self.path_of(key)
        if not os.path.isdir(self._folder):
            raise Failure(f"bucket {self.bucket} does not exist in {self._root}")
        # Two files of the same microsecond differ in the rest, and so do their sidecars' names.
        stamp = int(self._clock() * 1e9) // 1000 * 1000 + random.randrange(1000)
        name = f"{self._temp_start}{os.getpid()}-{secrets.token_hex(8)}"
        temp = os.path.join(self._folder, name)
        marks = json.dumps({"etag": data.md5(), "metadata": dict(metadata)}).encode()
        with os_failures(f"store {path}"):
            self._sweep()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.makedirs(self._sidecars, exist_ok=True)
            old = self._sidecar_of(path)
            try:
                _write_durably(temp, data.pieces())
                os.utime(temp, ns=(stamp, stamp))
                sidecar = self._sidecar_name(path, os.stat(temp))
                _write_durably(sidecar, [marks])
                os.replace(temp, path)  # before it the old object is whole, after it the new one
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temp)
                raise
            if old and old != sidecar:
                with contextlib.suppress(OSError):
                    os.unlink(old)
        return data.md5()

    def _sweep(self) -> None:
        """Deletes, once, what killed runs left half written: those of this machine whose process
        is gone, and of any other what is a day old."""
        if self._swept:
            return
        self._swept = True
        for name in glob.glob(".new-*", root_dir=self._folder):
            path = os.path.join(self._folder, name)
            pid = name.removeprefix(self._temp_start).partition("-")[0]
            with contextlib.suppress(OSError):  # gone by now, or somebody else's
                if pid.isdecimal():  # its time says nothing: `put` sets it before it is done
                    abandoned = not os.path.exists(f"/proc/{pid}")
                else:
                    abandoned = time.time() - os.stat(path).st_mtime > _ABANDONED
                if abandoned:
                    os.unlink(path)

    def fetch(self, key: str, into: Buffer) -> dict[str, str]:
        path = self.path_of(key)
        with os_failures(f"read {path}"), open(path, "rb", buffering=0) as file:
            into.fill(file.readinto)
            if file.read(1):
                raise Failure(f"{path} is larger than listed: it was replaced")
        etag, metadata = _read_sidecar(self._sidecar_of(path))
        if etag and into.md5() != etag:
            raise Failure(f"{path} is damaged: its MD5 is not the stored one")
        return metadata

    def peek(self, key: str, count: int) -> bytes:
        path = self.path_of(key)
        with os_failures(f"read {path}"), open(path, "rb") as file:
            return file.read(count)

    def head(self, key: str) -> dict[str, str] | None:
        path = self.path_of(key)
        return _read_sidecar(self._sidecar_of(path))[1] if os.path.isfile(path) else None

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        if not self.exists():
            raise NotFound(f"bucket {self.bucket} does not exist in {self._root}")
        with os_failures(f"list {self._folder}"):
            for key, path in sorted(self._walk(self._folder, "")):
                # A file of another name for the key is none of ours (`aws s3 sync` made it, say).
                if not key.startswith(prefix) or path != self.path_of(key):
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    info = os.stat(path)
                    sidecar = self._sidecar_of(path)
                    etag = _read_sidecar(sidecar)[0] or _file_md5(path, info.st_size)
                    # A copy is younger than what it was made of.
                    time_put = re.search(r"-(\d+)\.json$", sidecar or "")
                    modified = min(info.st_mtime, int(time_put[1]) / 1e9 if time_put else math.inf)
                    yield StoredObject(key, info.st_size, etag, modified)

    def copy(self, source: str, target: str) -> None:
        path = self.path_of(source)
        with os_failures(f"read {path}"):
            size = os.stat(path).st_size
        with contextlib.closing(Buffer(size, self._folder)) as data:
            metadata = self.fetch(source, data)
            self.put(target, data, metadata)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self.path_of(key)
            with os_failures(f"delete {path}"), contextlib.suppress(FileNotFoundError):
                sidecar = self._sidecar_of(path)
                os.unlink(path)
                if sidecar:
                    os.unlink(sidecar)

    def try_to_store(self, key: str) -> None:
        """A folder takes what there is room for."""

    def exists(self) -> bool:
        if not os.path.isdir(self._root):
            raise Failure(
                f"folder {self._root} of S3Endpoint does not exist", "mount or make it, then retry"
            )
        with os_failures(f"look into {self._folder}"), contextlib.suppress(FileNotFoundError):
            return stat.S_ISDIR(os.stat(self._folder).st_mode)
        return False

    def create(self) -> None:
        with os_failures(f"make the bucket {self._folder}"):
            os.mkdir(self._folder, 0o700)

    def remove(self) -> None:
        with os_failures(f"remove the bucket {self._folder}"):
            if any(self._walk(self._folder, "")):
                raise Failure(f"bucket {self.bucket} is not empty")
            foreign = [name for name in os.listdir(self._folder)
                       if not name.startswith(".") and not name.endswith("+")]
            if foreign:
                raise Failure(
                    f"bucket {self.bucket} holds what is not ours: {min(foreign)}",
                    f"look at it, and delete it in {self._folder} if it may go",
                )
            shutil.rmtree(self._folder)  # sidecars, folders of long names, half written files

    def path_of(self, key: str) -> str:
        """The file of a key. Raises Failure for a key that S3 would not take either."""
        if len(key.encode()) > MAX_KEY:
            raise Failure(f"the key of {len(key.encode())} bytes is too long: {key[:60]}…",
                          f"S3 takes {MAX_KEY} bytes: shorten the name, or Prefix")
        name = urllib.parse.quote(key, safe="")
        if name.startswith("."):
            name = "%2E" + name[1:]
        # A long name goes into folders; their names end in "+", which quote() never leaves.
        starts = range(0, len(name), _MAX_NAME_PIECE)
        *folders, last = [name[at : at + _MAX_NAME_PIECE] for at in starts] or [""]
        return os.path.join(self._folder, *(f"{piece}+" for piece in folders), last)

    def _walk(self, folder: str, start: str) -> Iterator[tuple[str, str]]:
        """(key, path) of every object below a folder; start: what its own path stands for."""
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # Symlinks are not ours: they may lead out of the bucket, or in a circle.
                if entry.is_dir(follow_symlinks=False):
                    if entry.name.endswith("+"):
                        yield from self._walk(entry.path, start + entry.name[:-1])
                elif entry.is_file(follow_symlinks=False):
                    key = urllib.parse.unquote_to_bytes(os.fsencode(start + entry.name))
                    yield key.decode("utf-8", "backslashreplace"), entry.path

    def _sidecar_name(self, path: str, info: os.stat_result) -> str:
        relative = os.path.relpath(path, self._folder)
        digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:40]
        return os.path.join(self._sidecars, f"{digest}@{info.st_size}-{info.st_mtime_ns}.json")

    def _sidecar_of(self, path: str) -> str | None:
        """The sidecar of an object's file, None for a file that was not put here."""
        with os_failures(f"look at {path}"), contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
            exact = self._sidecar_name(path, info)
            if os.path.exists(exact):
                return exact
            changed = os.stat(self._sidecars).st_mtime_ns
            found = _sidecars_by_size(self._sidecars, changed).get(exact.rpartition("-")[0], [])
            if len(found) > 1:  # a put that was killed left one; the content decides
                etag = _file_md5(path, info.st_size)
                found = [one for one in found if _read_sidecar(one)[0] == etag]
            return max(found, default=None)
        return None


@lru_cache(maxsize=1)
def _sidecars_by_size(folder: str, _changed: int) -> dict[str, list[str]]:
    """The sidecars in a folder, by their paths up to the size; _changed: when it was changed."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        found.setdefault(path.rpartition("-")[0], []).append(path)
    return found


def _read_sidecar(path: str | None) -> tuple[str, dict[str, str]]:
    """(ETag, user metadata), of no sidecar ("", {})."""
    if path is None:
        return "", {}
    try:
        with open(path, encoding="utf-8") as file:
            marks = json.load(file)
        return str(marks["etag"]), {str(k): str(v) for k, v in marks["metadata"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{path} is damaged: {error}") from error


def _write_durably(path: str, pieces: Iterable[Piece]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _file_md5(path: str, size: int) -> str:
    """The hex MD5 of a file; "" for one that may not be read, or is larger than any chunk."""
    if size > MAX_CHUNK or not os.access(path, os.R_OK):
        return ""
    return file_digest(path, "md5")


# --------------------------------------------------------------------------------------------------
# S3
# --------------------------------------------------------------------------------------------------

# Seconds that a server may take to take a connection, and to send or take the next bytes.
_CONNECT_TIMEOUT, _READ_TIMEOUT = 20.0, 120.0


def _s3_client(access: Access) -> Any:
    """A boto3 client that asks for no more than older services and other makers' ones know."""
    with library("boto3"):
        import boto3.session
        from botocore.config import Config

    session = boto3.session.Session()
    client = session.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region or session.region_name or "us-east-1",
        aws_access_key_id=access.key,
        aws_secret_access_key=access.secret,
        config=Config(
            s3={
                "addressing_style": "path",  # dots in a bucket's name break TLS host names
                # What is sent is guarded by Content-MD5, which is signed; a second digest of it
                # costs a quarter of the whole work.
                "payload_signing_enabled": False,
            },
            # Older S3-compatible services refuse the checksum trailers that botocore adds.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},  # `Retries` is the only one that tries again
            max_pool_connections=access.connections + 1,
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
        ),
    )
    client.meta.events.register_last("before-call.s3", _adapt_request)
    if access.endpoint:
        client.meta.events.register("before-call.s3", _stay_here)
    # With wildcards it comes before botocore's own, which makes a busy service of what is no XML.
    client.meta.events.register_first("before-parse.*.*", _refuse_other_than_listings)
    return client


def _adapt_request(params: dict[str, Any], model: Any, **_: Any) -> None:
    # A service that does not answer "Expect: 100-continue" costs a second for each chunk.
    params["headers"].pop("Expect", None)
    # DeleteObjects wants a digest of its body; Content-MD5 is the one that every service knows.
    if model.name == "DeleteObjects":
        digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
        params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _stay_here(params: dict[str, Any], **_: Any) -> None:
    # Sent to another region, botocore asks for the bucket's, of the same endpoint, without end.
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


_NO_VERSIONS = "--versions-at needs a service, and a bucket, that keeps the versions of objects"
_WRONG_ENDPOINT = "S3Endpoint may be no S3 service, or already hold the bucket's name: remove it"


def _refuse_other_than_listings(
    response_dict: dict[str, Any], operation_model: Any, **_: Any
) -> None:
    # An empty object is parsed, too: as a listing of nothing.
    roots = {"ListObjectsV2": (b"ListBucketResult", _WRONG_ENDPOINT),
             "ListObjectVersions": (b"ListVersionsResult", _NO_VERSIONS)}
    if operation_model.name not in roots or response_dict["status_code"] != 200:
        return
    body, (root, hint) = response_dict["body"], roots[operation_model.name]
    cut = len(body) < int(response_dict["headers"].get("content-length") or 0)
    if not cut and root not in body[:2000]:
        raise Failure("what the service answers to a listing is no listing", hint)


_EXPIRED = ("ExpiredToken", "TokenRefreshRequired")

# Error codes after which the same request may succeed (Amazon S3 API Reference, "Error responses").
# The last three are those of single keys of a DeleteObjects, which come without a status.
_TRANSIENT_CODES = (
    *_EXPIRED, "RequestTimeout", "BadDigest", "IncompleteBody", "OperationAborted",
    "TemporaryRedirect", "InternalError", "SlowDown", "ServiceUnavailable",
)

# HTTP statuses that mean the same, whatever code a service gives with them (RFC 9110, RFC 6585);
# every 5xx but 501, "Not Implemented", does so, too.
_TRANSIENT_STATUSES = (408, 429)

# Where objects are frozen: a storage class, or an archive tier of INTELLIGENT_TIERING; and how long
# the retrieval options usually take, from the deep ones too (Amazon S3 User Guide, "Archive
# retrieval options").
_FROZEN = {"GLACIER", "ARCHIVE_ACCESS", "DEEP_ARCHIVE", "DEEP_ARCHIVE_ACCESS"}
THAW_TIMES = {"Bulk": ("5 to 12 hours", "48 hours"), "Standard": ("3 to 5 hours", "12 hours"),
              "Expedited": ("5 minutes", "")}

_HINTS = {
    "AccessDenied": "the access key lacks the right {right}, or the bucket is someone else's",
    "SignatureDoesNotMatch": "the secret in S3Keyfile is wrong",
    "InvalidAccessKeyId": "the key in S3Keyfile is unknown there",
    "NoSuchBucket": "check Bucket",
    "BucketAlreadyExists": "the name belongs to someone else: set Bucket to another",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "PermanentRedirect": "the bucket is in another region: set S3Region",
    "AuthorizationHeaderMalformed": "set S3Region to the region of the bucket",
    "IllegalLocationConstraintException": "set S3Region to the region that S3Endpoint belongs to",
    "InvalidLocationConstraint": "check S3Region",
    "TooManyBuckets": "the account may have no more buckets: delete one, or set Bucket to another",
    "InvalidStorageClass": "check StorageClass",
    "KMS": "check KmsKey: it has to be enabled, and in the region of the bucket",
    "InvalidObjectState": "it is frozen: s3napback.py restore --thaw asks for it",
}

# The right that a request needs (AWS Service Authorization Reference, "Actions defined by Amazon
# S3").
_RIGHTS = {
    "put_object": "s3:PutObject", "get_object": "s3:GetObject", "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket", "copy_object": "s3:GetObject and s3:PutObject",
    "delete_object": "s3:DeleteObject", "delete_objects": "s3:DeleteObject",
    "create_bucket": "s3:CreateBucket", "delete_bucket": "s3:DeleteBucket",
    "list_buckets": "s3:ListAllMyBuckets", "restore_object": "s3:RestoreObject",
    "list_object_versions": "s3:ListBucketVersions", "object_version": "s3:GetObjectVersion",
    "encrypt": "kms:GenerateDataKey", "decrypt": "kms:Decrypt",
}


def policy_of(settings: Settings, *, write_only: bool) -> Any:
    """The least rights of a backup's access key as an IAM policy. write_only: without reading what
    KMS encrypts. Raises UsageFailure."""
    bucket, key = f"arn:aws:s3:::{settings.bucket}", settings.kms_key or ""
    if folder_root(settings.s3_endpoint) is not None:
        raise UsageFailure("a bucket in a folder has no policy", "its modes say who may what")
    if key and ":key/" not in key:
        raise UsageFailure(f"a policy names a key of KMS by its ARN, and KmsKey is {key}",
                           f"set it to what this tells: aws kms describe-key --key-id {key}")
    if write_only and (not key or settings.safe_replace):
        raise UsageFailure("--write-only needs KmsKey, and no SafeReplace, which copies")
    # In a policy * and ? are wildcards, and $ begins a variable (IAM User Guide).
    prefix = re.sub(r"[*?$]", r"${\g<0>}", f"{settings.prefix}/" if settings.prefix else "")
    requests = {bucket: ["list_objects_v2"],
                f"{bucket}/{prefix}*": ["get_object", "put_object", "delete_object"],
                key: ["encrypt"] if write_only else ["encrypt", "decrypt"]}
    statements: list[dict[str, Any]] = [
        {"Effect": "Allow", "Action": [_RIGHTS[one] for one in wanted], "Resource": resource}
        for resource, wanted in requests.items() if resource
    ]
    if prefix:
        statements[0]["Condition"] = {"StringLike": {"s3:prefix": f"{prefix}*"}}
    return {"Version": "2012-10-17", "Statement": statements}


# What OpenSSL says where a further try cannot help, and what may. Everything else of TLS is a
# connection that broke: an end in the middle, of the handshake too, or bytes that were damaged.
_TLS_HINTS = {
    "CERTIFICATE_VERIFY_FAILED|NO_CERTIFICATE":
        "this machine does not trust the certificate, or it is for another host;"
        " AWS_CA_BUNDLE names a file of certificates to be trusted",
    "No such file|Permission denied":
        "correct AWS_CA_BUNDLE, or ca_bundle in AWS's config: the file of certificates to be"
        " trusted",
    "WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|PACKET_LENGTH|HTTP_REQUEST|UNKNOWN_PROTOCOL":
        "no TLS is spoken there: S3Endpoint may need http:// in place of https://, or another port",
    "UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|HANDSHAKE_FAILURE|UNRECOGNIZED_NAME|CERTIFICATE":
        "the service wants another version of TLS, another host name or a client certificate",
}


def _refusal(doing: str, operation: str, answer: Mapping[str, Any]) -> Failure:
    """The Failure for an answer with an error. doing: a verb phrase; operation: boto3's name."""
    error, about = answer.get("Error", {}), answer.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(about.get("HTTPStatusCode", 0))
    said = error.get("Message") or ""
    if code == "RequestTimeTooSkewed" and (skew := _skew(answer)) is not None:
        said = f"this machine's clock is {skew:+.0f} seconds off the server's"
    text = f"cannot {doing}: {code}" + (f", {said}" if said else "")
    code = "AccessDenied" if code == "403" else code  # the answer to a HEAD has no body
    # Amazon names the right, which may be one of KMS; other services say less.
    named = re.search(r"not authorized to perform: (\w+:\w+)", said)
    right = named[1] if named else _RIGHTS.get(operation, "for it")
    kind, hint = Failure, _HINTS.get(code.partition(".")[0], "").format(right=right)
    if code == "AccessDenied" and operation in ("put_object", "copy_object"):
        hint += ", or its policy wants another ServerSideEncryption"
    elif code == "AccessDenied" and operation == "create_bucket":
        hint = f"check Bucket, or make it by hand: {hint}"
    elif operation == "list_objects_v2" and code == "NoSuchKey":  # the request was for an object
        hint = _WRONG_ENDPOINT
    elif operation == "list_object_versions" and status in (400, 405, 501):
        hint = hint or _NO_VERSIONS
    elif code in ("404", "NoSuchKey", "NoSuchBucket"):
        kind = NotFound
    elif code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or (
        status >= 500 and status != 501
    ):
        kind, hint = TransientFailure, ""
    region = about.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region")
    if region and (300 <= status < 400 or code == "AuthorizationHeaderMalformed"):
        hint = f"the bucket is in another region: set S3Region {region}"
    return kind(text, hint, code=code)


def _unknown_host(host: str | None) -> str:
    """What is wrong with a host name, "" if it is known."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"the host name {host} is not known: {error.strerror}; check S3Endpoint"
    return ""


def _skew(answer: Mapping[str, Any]) -> float | None:
    """Seconds that this machine's clock is ahead of the Date of an answer; None without one."""
    import email.utils

    told = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        # The machine's own clock, not the run's: it is the one that signs requests.
        return time.time() - email.utils.parsedate_to_datetime(told).timestamp()
    except (TypeError, ValueError):
        return None


def _etag_as_md5(answer: Mapping[str, Any]) -> str:
    """The MD5 that an answer's ETag is, "" where it is none (multipart, SSE-KMS, SSE-C)."""
    etag = str(answer.get("ETag", "")).strip('"').lower()
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256"
    if encrypted or answer.get("SSECustomerAlgorithm") or not re.fullmatch("[0-9a-f]{32}", etag):
        return ""
    return etag


def _user_metadata(answer: Mapping[str, Any]) -> dict[str, str]:
    """The user metadata of an answer, as `Store.head` gives it. Its names are those of HTTP
    headers, whose case says nothing (RFC 9110, section 5.1): several services capitalize them."""
    metadata = {str(name).lower(): str(value) for name, value in answer["Metadata"].items()}
    return metadata if _etag_as_md5(answer) else {**metadata, ETAG_IS_NOT_MD5: "yes"}


def _listed(item: Mapping[str, Any]) -> StoredObject:
    """An object, or a version of one, of the answer to a listing."""
    return StoredObject(
        item["Key"], item["Size"], item.get("ETag", "").strip('"'),
        item["LastModified"].timestamp(), item.get("StorageClass", "STANDARD"),
        item.get("VersionId", ""))


class RateLimiter:
    """What all uploads of a run together may send. rate: bytes per second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = time.monotonic()  # when all that was reserved will have been sent
        self._lock = threading.Lock()

    def reserve(self, count: int) -> float:
        """The seconds to wait before so many bytes are sent."""
        with self._lock:
            now = time.monotonic()
            # Carries over at most 0.5 s of unused budget; without any the rate is never reached.
            start = max(self._free, now - 0.5)
            self._free = start + count / self._rate
            return max(0.0, start - now)


class UploadBody:
    """A buffer as the file that an HTTP client sends, no faster than a limit allows.

    stop: set by whoever does not want to wait for the rest, which ends in OSError
    """

    # Bytes that are sent at once, whatever the client asks for. Each piece has _CONNECT_TIMEOUT to
    # go: a whole chunk would not make it over a slow line. Under a limit the flow is to be even.
    _AT_ONCE, _LIMITED = 1 << 18, 1 << 14

    def __init__(self, data: Buffer, limit: RateLimiter | None, stop: threading.Event) -> None:
        self._data, self._limit, self._stop = data, limit, stop
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int) -> int:
        self._position = offset
        return offset

    def read(self, _count: int = -1) -> memoryview:
        piece = self._data.piece(self._position, self._LIMITED if self._limit else self._AT_ONCE)
        self._position += len(piece)
        if self._limit and piece and self._stop.wait(self._limit.reserve(len(piece))):
            raise OSError("the upload was given up")
        return piece


@dataclass(frozen=True)
class BucketFacts:
    """What is known of a bucket besides its objects."""

    region: str  # "" if unknown
    versioned: bool  # old versions are kept
    retention: str  # of object lock by default, in words, "" for none
    unknown: tuple[str, ...]  # what the service does not tell


class S3Client:
    """Requests about a bucket, through boto3. Its client is made at the first one: to import boto3
    takes its time."""

    def __init__(self, bucket: str, access: Access) -> None:
        self.bucket, self._access = bucket, access
        self._made: Any = None
        self._making = threading.Lock()

    @property
    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = _s3_client(self._access)
            return self._made

    def _request(self, doing: str, operation: str, **parameters: Any) -> Any:
        """The answer to a request; doing: what it does, to which the bucket's name is added."""
        with self._errors(f"{doing} bucket {self.bucket}", operation):
            return getattr(self._client, operation)(Bucket=self.bucket, **parameters)

    @contextlib.contextmanager
    def _errors(self, doing: str, operation: str) -> Iterator[None]:
        """Turns what boto3 raises within the block into Failures; see `_refusal`."""
        with library("boto3"):
            import botocore.exceptions as boto
            from urllib3.exceptions import HTTPError, SSLError
        try:
            yield
        except boto.ClientError as error:
            failure = _refusal(doing, operation, error.response)
            if failure.code in _EXPIRED:
                self._made = None  # whoever renews the access key has written the new one somewhere
            raise failure from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
            raise UsageFailure(
                f"no S3 credentials: {error}",
                "S3Keyfile, or -K, names a file with key=… and secret=…",
            ) from error
        except (boto.SSLError, SSLError) as error:
            text = f"cannot {doing}: {error}"
            for pattern, hint in _TLS_HINTS.items():
                if re.search(pattern, text):
                    raise Failure(text, hint) from error
            raise TransientFailure(text) from error
        except boto.EndpointConnectionError as error:
            url = urllib.parse.urlsplit(str(error.kwargs["endpoint_url"]))
            said = _unknown_host(url.hostname) or f"no answer from {url.scheme}://{url.netloc}"
            raise TransientFailure(f"cannot {doing}: {said}") from error
        except (HTTPError, boto.HTTPClientError, boto.IncompleteReadError, boto.ConnectionError,
                OSError) as error:
            raise TransientFailure(f"cannot {doing}: {error}") from error
        except (boto.BotoCoreError, ValueError) as error:
            raise Failure(f"cannot {doing}: {error}") from error

    def account_buckets(self) -> list[tuple[str, float]]:
        """See `list_buckets`."""
        with self._errors("list the buckets of the account", "list_buckets"):
            found = self._client.list_buckets()["Buckets"]
        return sorted((item["Name"], item["CreationDate"].timestamp()) for item in found)


class S3Store(S3Client):
    """A bucket of Amazon S3, or of a service that speaks its protocol."""

    def __init__(self, bucket: str, access: Access, retries: Retries | None = None) -> None:
        super().__init__(bucket, access)
        self.retries = retries or Retries()
        self._knows_batches, self._tried = True, False
        self._storage_class = {"StorageClass": access.storage_class} if access.storage_class else {}

    def _named(self, key: str) -> dict[str, str]:
        """What a request to read an object names it by."""
        return {"Key": key}

    @retried
    def put(self, key: str, data: bytes | Buffer, metadata: Mapping[str, str]) -> str:
        data = Buffer.of(data)
        digest = data.md5()
        answer = self._request(
            f"store {key} in", "put_object", Key=key, Metadata=dict(metadata),
            Body=UploadBody(data, self._access.limit, self.retries.stop),
            ContentMD5=base64.b64encode(bytes.fromhex(digest)).decode(),
            ContentType="application/octet-stream",
            # Other classes bill a minimum duration, or cannot be copied.
            **({} if is_staged(key) else self._storage_class), **self._access.encryption,
        )
        etag = _etag_as_md5(answer)
        if etag and etag != digest:
            raise TransientFailure(f"{self.bucket} confirmed another MD5 for {key} than was sent")
        return etag or str(answer.get("ETag", "")).strip('"')

    @retried
    def fetch(self, key: str, into: Buffer) -> dict[str, str]:
        with self._errors(f"fetch {key} from bucket {self.bucket}", "get_object"):
            answer = self._client.get_object(Bucket=self.bucket, **self._named(key))
            with contextlib.closing(answer["Body"]) as body:
                # urllib3 copies what it reads: in pieces, so that the copies stay small.
                into.fill(lambda view: body.readinto(view[:_PIECE]))
                if body.readinto(bytearray(1)):
                    raise Failure(f"{key} is larger than listed: it was replaced")
        etag = _etag_as_md5(answer)
        if etag and into.md5() != etag:
            raise TransientFailure(f"{key} arrived damaged: its MD5 is not the stored one")
        return _user_metadata(answer)

    @retried
    def peek(self, key: str, count: int) -> bytes:
        with self._errors(f"fetch {key} from bucket {self.bucket}", "get_object"):
            part = f"bytes=0-{count - 1}"
            answer = self._client.get_object(Bucket=self.bucket, **self._named(key), Range=part)
            data: bytes = answer["Body"].read(count)
        return data

    @retried
    def head(self, key: str) -> dict[str, str] | None:
        try:
            named = self._named(key)
            return _user_metadata(self._request(f"look up {key} in", "head_object", **named))
        except NotFound:
            return None

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        ask = partial(self._request, "list", "list_objects_v2", Prefix=prefix)
        while True:
            answer = self.retries.run(ask)
            found = answer.get("Contents", ())
            yield from map(_listed, found)
            if not found or not answer.get("IsTruncated"):
                return
            ask = partial(ask, StartAfter=found[-1]["Key"])

    @retried
    def frozen_in(self, item: StoredObject) -> tuple[str, bool]:
        """(where an object is frozen, "" if it can be read; whether it has been asked for)."""
        answer = self._request(f"look up {item.key} in", "head_object", **self._named(item.key))
        place = answer.get("ArchiveStatus") or answer.get("StorageClass", "")
        asked = answer.get("Restore", "")  # a thawed copy does not change the class
        is_there = place not in _FROZEN or 'ongoing-request="false"' in asked
        return "" if is_there else place, bool(asked)

    @retried
    def thaw(self, item: StoredObject, tier: str, days: int) -> None:
        """Asks for a frozen object by a retrieval option of THAW_TIMES, for so many days."""
        term = {} if item.storage_class == "INTELLIGENT_TIERING" else {"Days": days}  # it is moved
        try:
            self._request(f"thaw {item.key} in", "restore_object", **self._named(item.key),
                          RestoreRequest={**term, "GlacierJobParameters": {"Tier": tier}})
        except Failure as failure:
            if failure.code != "RestoreAlreadyInProgress":
                raise

    @retried
    def copy(self, source: str, target: str) -> None:
        self._request(
            f"copy {source} to {target} in", "copy_object", Key=target,
            CopySource={"Bucket": self.bucket, "Key": source}, **self._storage_class,
            **self._access.encryption,
        )

    @retried
    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            batch = keys[start : start + DELETE_BATCH]
            if self._knows_batches:
                try:
                    self._delete_batch(batch)
                    continue
                except (TransientFailure, NotFound):
                    raise
                except Failure:
                    # Some services do not know DeleteObjects, and each says that in its own way.
                    # Whether that is so, or something is not allowed, a plain DELETE tells.
                    self._delete_one(batch[0])
                    self._knows_batches = False
            for key in batch:
                self._delete_one(key)

    def _delete_batch(self, keys: Sequence[str]) -> None:
        batch = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = self._request("delete from", "delete_objects", Delete=batch)
        for error in answer.get("Errors", ()):
            if error.get("Code") != "NoSuchKey":  # it is gone, as it should be
                doing = f"delete {error.get('Key')} from bucket {self.bucket}"
                raise _refusal(doing, "delete_objects", {"Error": error})

    def _delete_one(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            self._request(f"delete {key} from", "delete_object", Key=key)

    def try_to_store(self, key: str) -> None:
        if not self._tried:
            self.put(key, b"", {})
            self.delete([key])
            self._tried = True

    @retried
    def exists(self) -> bool:
        try:
            # Not HeadBucket: its errors come without a code that says what is wrong.
            self._request("list", "list_objects_v2", MaxKeys=1)
        except NotFound:
            return False
        except Failure as failure:
            # Of a bucket that is not there everybody is told. A policy may allow only listings of
            # some prefix: what else it denies is told by the request that needs it.
            if failure.code != "AccessDenied":
                raise
        return True

    @retried
    def create(self) -> None:
        try:
            with self._errors(f"make bucket {self.bucket}", "create_bucket"):
                region = self._client.meta.region_name
                place = {} if region in ("us-east-1", "aws-global") else {
                    "CreateBucketConfiguration": {"LocationConstraint": region}
                }
                self._client.create_bucket(Bucket=self.bucket, **place)
        except Failure as failure:
            if failure.code != "BucketAlreadyOwnedByYou":  # another run was faster
                raise

    @retried
    def remove(self) -> None:
        self._request("remove", "delete_bucket")

    def _told(self, operation: str) -> dict[str, Any] | None:
        """The answer to a question about the bucket, None where the service does not tell."""
        try:
            return dict(self._request("ask about", operation))
        except Failure as failure:
            return {} if failure.code == "ObjectLockConfigurationNotFoundError" else None

    def about(self) -> BucketFacts:
        """What the service tells of the bucket."""
        answers = {
            "a region": self._told("get_bucket_location"),
            "versions": self._told("get_bucket_versioning"),
            "an object lock": self._told("get_object_lock_configuration"),
        }
        unknown = tuple(what for what, answer in answers.items() if answer is None)
        place, versions, lock = (answer or {} for answer in answers.values())
        region = "" if "a region" in unknown else place.get("LocationConstraint") or "us-east-1"
        rule = lock.get("ObjectLockConfiguration", {}).get("Rule", {}).get("DefaultRetention", {})
        kept = [f"{rule[unit]} {unit.lower()}" for unit in ("Days", "Years") if rule.get(unit)]
        return BucketFacts(region, versions.get("Status") == "Enabled", " ".join(kept), unknown)

    def skew(self) -> float | None:
        """Seconds that this machine's clock is ahead of the server's; None if that is not told."""
        with self._errors(f"reach bucket {self.bucket}", "list_objects_v2"):
            try:
                answer = self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
            except self._client.exceptions.ClientError as error:
                answer = error.response
        return _skew(answer)


class PastStore(S3Store):
    """A bucket as it was at a moment, by the versions of its objects that it keeps; only read.

    Of each key the version counts that was the newest then. A version's date is the whole second at
    which its upload began, by the service's clock. Of a version and a delete marker of one second
    it is the version: a backup deletes a chunk, and then stores another. at: epoch seconds.
    """

    def __init__(self, bucket: str, access: Access, retries: Retries, at: float) -> None:
        super().__init__(bucket, access, retries)
        if folder_root(access.endpoint):
            raise UsageFailure("a bucket in a folder keeps no older versions", _NO_VERSIONS)
        self._at = at
        self._known: dict[str, str] = {}  # version ids of what was listed

    def _errors(self, doing: str, operation: str) -> Any:
        reads = operation in ("get_object", "head_object")
        return super()._errors(doing, "object_version" if reads else operation)

    def _named(self, key: str) -> dict[str, str]:
        version = self._known.get(key) or next(
            (item.version for item in self.iter_objects(key) if item.key == key), None)
        if version is None:
            raise NotFound(f"{key} was not in bucket {self.bucket} then")
        return {"Key": key, "VersionId": version}

    def iter_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        for key, versions in itertools.groupby(self._versions(prefix), key=lambda one: one["Key"]):
            then = (one for one in versions if one["LastModified"].timestamp() <= self._at)
            if (one := next(then, None)) and "Size" in one:  # a delete marker has none
                if len(self._known) > 200_000:  # a bucket may hold millions; `_named` asks again
                    self._known = {}
                self._known[key] = one["VersionId"]
                yield _listed(one)

    def _versions(self, prefix: str) -> Iterator[dict[str, Any]]:
        """The versions and delete markers of each key, the newest first."""
        # Asked until something was found.
        versioning = None if self._known else self._told("get_bucket_versioning")
        if versioning is not None and not versioning.get("Status"):
            raise Failure(f"bucket {self.bucket} never kept older versions", _NO_VERSIONS)
        ask = partial(self._request, "list the versions in", "list_object_versions", Prefix=prefix)
        before: dict[str, str] | None = None
        start: dict[str, str] = {}
        while start != before:
            answer = self.retries.run(partial(ask, **start))
            found = [*answer.get("Versions", ()), *answer.get("DeleteMarkers", ())]
            found.sort(key=lambda one: (
                one["Key"].encode(), -one["LastModified"].timestamp(), not one.get("IsLatest")))
            yield from found
            if not answer.get("IsTruncated"):
                return
            before, start = start, {name: answer[f"Next{name}"] for name in (
                "KeyMarker", "VersionIdMarker") if answer.get(f"Next{name}")}
        raise Failure(f"the listing of the versions in bucket {self.bucket} does not go on")


# --------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------


def open_store(
    bucket: str, access: Access, clock: Callable[[], float], retries: Retries | None = None
) -> Store:
    """The store of a bucket.

    clock: gives epoch seconds, the stamps of a folder store
    retries: None: each operation is tried once
    """
    root = folder_root(access.endpoint)
    if root is not None:
        return FolderStore(root, bucket, clock)
    return S3Store(bucket, access, retries)


def list_buckets(access: Access) -> list[tuple[str, float]]:
    """(name, time of creation in epoch seconds) of every bucket of the account, by name."""
    root = folder_root(access.endpoint)
    if root is None:
        return S3Client("", access).account_buckets()
    with os_failures(f"list {root}"), os.scandir(root) as entries:
        return sorted((entry.name, entry.stat().st_mtime) for entry in entries if entry.is_dir())


# ==================================================================================================
# 11. Archives
# ==================================================================================================

# No archive is from later than that, epoch seconds: what local time can show, in any zone.
_LATEST = datetime(9999, 1, 1, tzinfo=timezone.utc).timestamp()


@dataclass(frozen=True)
class Archive:
    """The chunks of one name that belong together, and what the last one says."""

    name: str
    chunks: tuple[StoredObject, ...]  # in order; none where a bucket's millions are not wanted
    fault: str  # what is missing, "" if it is complete
    metadata: Mapping[str, str]  # of the last chunk, without our prefix; empty for the original's
    count: int  # of the chunks
    size: int  # bytes
    modified: float  # when the newest chunk was stored, epoch seconds
    storage_classes: tuple[str, ...]
    staged: bool  # it waits to take its place (SafeReplace)

    @staticmethod
    def of(
        name: str, chunks: Sequence[StoredObject], fault: str, metadata: Mapping[str, str]
    ) -> Archive:
        return Archive(
            name, tuple(chunks), fault, metadata,
            len(chunks), sum(item.size for item in chunks), max(item.modified for item in chunks),
            tuple(sorted({item.storage_class for item in chunks})), is_staged(chunks[0].key),
        )

    @property
    def complete(self) -> bool:
        return not self.fault

    @property
    def made(self) -> float:
        """When its backup began, epoch seconds; of an unmarked one, when it was stored."""
        with contextlib.suppress(ValueError):
            text = self.metadata.get("made", "")
            made = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
            if 0 <= made.timestamp() < _LATEST:
                return made.timestamp()
        return self.modified

    def made_on(self, moment: Moment) -> str:
        """The local day of the run that made it, in ISO 8601; `moment` has the zone."""
        return self.metadata.get("day") or moment.date(self.made).isoformat()


# Tells the user metadata of a key, None of one that is not there: `Store.head`.
Head: TypeAlias = "Callable[[str], Mapping[str, str] | None]"


@dataclass(frozen=True)
class ArchiveRef:
    """Identifies the archive that a DIFF depends on."""

    archive: str
    upload: str  # its random id (`s3napback-archive`), since another may have the same content
    md5: str = ""  # of its chunks' ETags, as `digest_of_digests`
    modified: float = 0.0  # of its newest chunk, epoch seconds, when it was last found

    def find(self, objects: Sequence[StoredObject], head: Head) -> Archive | None:
        """The archive, if it is intact among these objects, all that its name has."""
        now = resolve_archive(self.archive, objects, head)
        return now if now and now.complete and now.metadata.get("archive") == self.upload else None

    def refreshed(self, objects: Sequence[StoredObject], head: Head) -> ArchiveRef | None:
        """Itself, for the next time, None where the archive is not intact; see `find`. Nothing is
        asked where it is as it was last found."""
        for group in _group_by_place_and_width(objects):
            with contextlib.suppress(ValueError):  # ETags of another kind
                unchanged = max(item.modified for item in group) == self.modified
                if unchanged and digest_of_digests(item.etag for item in group) == self.md5:
                    return self
        found = self.find(objects, head)
        return replace(self, modified=found.modified) if found else None


def chunks_of(objects: Iterable[StoredObject], archive: str) -> list[StoredObject]:
    """Those of the objects that are chunks of just this archive, staged ones included."""
    return [item for item in objects
            if (key := parse_chunk_key(item.key)) and key.archive == archive]


def groupby_archive(objects: Iterable[StoredObject]) -> Iterator[tuple[str, list[StoredObject]]]:
    """(archive, its chunks) of a listing, one archive at a time; "" for what is no chunk."""

    def archive_of(item: StoredObject) -> str:
        key = parse_chunk_key(item.key)
        return key.archive if key else ""

    for archive, group in itertools.groupby(objects, key=archive_of):
        yield archive, list(group)


def archive_objects(store: Store, archive: str) -> list[StoredObject]:
    """The chunks of one archive, of every upload that left some."""
    return chunks_of(store.iter_objects(chunk_prefix(archive)), archive)


def archives_of(
    store: Store, start: str, prefix: str
) -> Iterator[tuple[str, str, list[StoredObject]]]:
    """(archive, mode, its chunks) of one source, whose names start as `archive_start` says."""
    for archive, objects in groupby_archive(store.iter_objects(start)):
        parts = parse_archive_name(archive, prefix)
        # Another name may begin like this one.
        if parts and start == archive_start(parts[0] or "", parts[1], prefix):
            yield archive, parts[3], objects


def size_of(one: Forecast, store: Store, prefix: str, today: str) -> int | None:
    """Bytes of what is there then, by one listing: an archive will be as large as it is, one that
    is made from today on and is not there yet as the newest of its mode; None without one."""
    start = source_start(one.kind, one.name, prefix)
    of_dump = f"-{FULL}" if one.kind in DUMPS else ""  # which their names do not have
    listed = sorted((max(item.modified for item in objects), mode, archive,
                     sum(item.size for item in objects))
                    for archive, mode, objects in archives_of(store, start, prefix))
    newest = {mode: size for _, mode, _, size in listed}
    sizes = {start + end.removesuffix(of_dump): newest.get(end[-4:])
             for day, end in one.kept.items() if day >= today}
    sizes |= {archive: size for _, _, archive, size in listed}
    return None if None in sizes.values() else sum(filter(None, sizes.values()))


def digest_of_digests(digests: Iterable[str]) -> str:
    """The hex MD5 over chunks' MD5s, which are given in hex: the metadata `md5`."""
    return hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False).hexdigest()


# Ends of uploads that are looked at among the chunks of one name. There are two or three where
# replacements were cut off; thousands, each a request and a walk over all chunks, are somebody's.
_MAX_ENDS = 50


def resolve_archive(
    name: str, objects: Iterable[StoredObject], head: Head, chunk_size: int | None = None
) -> Archive | None:
    """The archive that the chunks of one name hold, None where there are no chunks.

    Where chunks of several uploads lie together (staged ones, two widths of numbers after a
    replacement that was cut off, or the tail of a longer archive), the complete upload counts, a
    marked one before an unmarked one, a staged one before another, since it was made to replace
    that, the newer before the older. head: asked only for chunks that can be an upload's last;
    chunk_size: bytes, tells a single full chunk from a whole.
    """
    candidates: list[Archive | None] = []
    for items in _group_by_place_and_width(objects):
        largest = max(item.size for item in items)
        # Only an upload's last chunk is shorter than its others ...
        ends = [n for n, item in enumerate(items) if item.size < largest or item is items[-1]]
        ends = ends[-_MAX_ENDS:]
        found = [_upload_until(n, name, items, head, chunk_size) for n in ends]
        # ... and the first may be all of an upload with a larger ChunkSize.
        if 0 not in ends and not any(archive and archive.complete for archive in found):
            found.append(_upload_until(0, name, items, head, chunk_size))
        candidates += found
    return max(
        filter(None, candidates),
        key=lambda a: (a.complete, bool(a.metadata), a.staged, a.modified, a.count),
        default=None,
    )


def _group_by_place_and_width(objects: Iterable[StoredObject]) -> Iterable[list[StoredObject]]:
    """The chunks of one name, in groups of one place and one width of numbers, each in order."""
    groups: dict[tuple[bool, int], list[StoredObject]] = {}
    for item in objects:
        if key := parse_chunk_key(item.key):
            groups.setdefault((key.staged, key.width), []).append(item)
    for group in groups.values():
        group.sort(key=_number)
    return groups.values()


def _number(item: StoredObject) -> int:
    key = parse_chunk_key(item.key)
    assert key is not None
    return key.number


def _upload_until(
    last: int, name: str, items: Sequence[StoredObject], head: Head, chunk_size: int | None
) -> Archive | None:
    """The upload that ends with that one of the items, None where nothing says that one does."""
    metadata = head(items[last].key) or {}
    marks = {k[len(META) :]: v for k, v in metadata.items() if k.startswith(META)}
    if marks.keys() == {"opaque"}:  # the Perl script's, under a key of KMS, or copied in parts
        marks = {}
    if "chunks" in marks:
        items = items[: last + 1]
    elif last < len(items) - 1:
        return None
    return Archive.of(name, items, _fault(items, marks, chunk_size), marks)


def _fault(
    items: Sequence[StoredObject], marks: Mapping[str, str], chunk_size: int | None
) -> str:
    """What keeps the items from being all of one upload, "" for nothing. marks: of the last."""
    if marks and "chunks" not in marks:
        return "its last chunk is not there"
    numbers = [_number(item) for item in items]
    if absent := numbers[-1] + 1 - len(items):
        # A number may be anything that someone wrote into a key: nothing is counted up to it.
        first = next(n for n, number in enumerate(numbers) if n != number)
        return f"chunk {first}{f' and {absent - 1} more' if absent > 1 else ''} is missing"
    sizes = [item.size for item in items]
    if not marks:
        full = sizes[0] if len(sizes) > 1 else chunk_size
        if any(size != sizes[0] for size in sizes[:-1]):
            return "its chunks are of different sizes"
        if full is not None and sizes[-1] >= full:
            return "it was cut off: its last chunk is as long as the others"
        return ""
    for what, count in (("chunks", len(sizes)), ("bytes", sum(sizes))):
        if marks.get(what) != str(count):
            return f"it has {count} {what} where its last one counts {marks.get(what)}"
    etags = [item.etag for item in items]
    plain = "opaque" not in marks and all(re.fullmatch("[0-9a-f]{32}", etag) for etag in etags)
    if plain and "md5" in marks and digest_of_digests(etags) != marks["md5"]:
        return "its chunks are not those that were uploaded together"
    return ""


# --------------------------------------------------------------------------------------------------
# Chains
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatalogEntry:
    """One archive as the catalogue knows it."""

    archive: Archive
    kind: str | None  # None where only a config, or the content, tells directory from repository
    name: str  # of the source, without the Prefix
    slot: int
    mode: str
    prefix: str = ""
    leftovers: int = 0  # chunks of other uploads under its name
    encrypted: bool | None = None  # None where no one looked
    holds_all: bool = False  # a DIFF without marks was read, and holds everything

    def __str__(self) -> str:
        return self.archive.name

    @property
    def made(self) -> float:
        return self.archive.made

    @property
    def fault(self) -> str:
        return self.archive.fault

    @property
    def status(self) -> str:
        return self.archive.metadata.get("status", "")

    @property
    def before(self) -> str:
        """The state that it continues, "" where it says none; see `_marks`."""
        return self.archive.metadata.get("state", "").partition(":")[0]

    @property
    def after(self) -> str:
        """The state that it leads to, "" where it says none."""
        return self.archive.metadata.get("state", "").partition(":")[2]

    @property
    def self_contained(self) -> bool:
        """Whether it needs no other archive: a FULL, a dump, or a DIFF that had nothing before."""
        return self.mode == FULL or self.before in ("-", "0") or self.holds_all

    @property
    def marked(self) -> bool:
        """Whether this program made it: what the Perl script made says nothing of itself."""
        return bool(self.status or self.before)

    @property
    def continues(self) -> str:
        """The AFTER state of the archive that it continues, "" where it says none."""
        if self.kind == SUBVERSION and self.before:
            is_number = re.fullmatch("[0-9]{1,18}", self.before)
            return str(int(self.before) - 1) if is_number else f"none: {self.before}"
        return self.before

    def without_chunks(self) -> CatalogEntry:
        return replace(self, archive=replace(self.archive, chunks=()))

    def by_the_buckets_clock(self) -> CatalogEntry:
        """It without what its own clock said, which may have been wrong."""
        marks = {k: v for k, v in self.archive.metadata.items() if k not in ("made", "day")}
        return replace(self, archive=replace(self.archive, metadata=marks))


@dataclass(frozen=True)
class Chain:
    """Archives to be restored one upon the other, oldest first."""

    archives: tuple[CatalogEntry, ...]
    as_of: int  # the moment that they give, epoch seconds
    warnings: tuple[str, ...] = ()  # sentences
    lacking: str = ""  # what makes it less than was asked for, "" for nothing


class History:
    """The archives of one source in the order in which they were made, and what each continues.

    Pure. Archives that say what they continue are linked by that, whatever their dates; only what
    is unmarked is ordered by date.
    """

    def __init__(self, found: Iterable[CatalogEntry]) -> None:
        dated = sorted(found, key=lambda f: (f.made, f.slot, f.archive.name))
        previous, intact = _linked(dated)
        moments = _moments_of(dated, previous)
        order = sorted(range(len(dated)), key=lambda n: (moments[n], n))
        place = {n: at for at, n in enumerate(order)}
        self.archives = [dated[n] for n in order]  # oldest first
        self.moments = [moments[n] for n in order]  # epoch seconds as of which each stands
        self.intact = [n in intact for n in order]  # nothing is missing of it, or of what it needs
        self._previous = {place[n]: place[before] for n, before in previous.items()}

    def rows(self) -> Iterator[tuple[CatalogEntry, int, bool]]:
        """(archive, moment, whether it can be restored) of each."""
        return zip(self.archives, self.moments, self.intact, strict=True)

    def restorable(self) -> list[int]:
        """The moments, in epoch seconds, as of which the source can be restored, oldest first."""
        return [at for _, at, intact in self.rows() if intact]

    def newest(self, at: float) -> int | None:
        """The place of the newest archive that is not from after a moment, None for none.

        A moment that equals an archive's own mark means that archive, although its place among the
        others was corrected, unless another one stands at that moment.
        """
        after = bisect.bisect_right(self.moments, at)
        if math.isfinite(at) and self.moments[after - 1 : after] != [math.floor(at)]:
            for place, one in enumerate(self.archives):
                if math.floor(one.made) == math.floor(at):
                    return place
        return after - 1 if after else None

    def chain(self, place: int) -> list[CatalogEntry]:
        """The archive at a place after all that it continues, as far as they are there."""
        links = [self.archives[place]]
        while place in self._previous:
            place = self._previous[place]
            links.append(self.archives[place])
        return links[::-1]


def _linked(dated: Sequence[CatalogEntry]) -> tuple[dict[int, int], set[int]]:
    """(index → index of the archive that it continues, those that can be restored), from archives
    by date.

    One walk, from the archives that need no other to those that continue them, and so on. It comes
    to each archive once: a cycle of states cannot loop.
    """
    ends = {one.after for one in dated if one.after}
    by_date = _previous_by_date(dated)
    starts: set[int] = set()
    # Archives, by what they continue: a state that one of the others leads to, else the index of
    # an archive, else nothing.
    waiting: dict[int | str | None, list[int]] = defaultdict(list)
    previous: dict[int, int] = {}
    reached: set[int] = set()
    intact: set[int] = set()
    # What is broken has a place as well, so that it is not passed over for an older one.
    for is_broken in (False, True):
        for n, one in enumerate(dated):
            if bool(one.fault) != is_broken:
                continue
            if one.self_contained:
                starts.add(n)
            else:
                key = one.continues if one.continues in ends else by_date[n]
                waiting[key].append(n)
        if is_broken:
            intact = set(reached)
            starts.update(waiting.pop(None, []))
        level = starts | reached
        while level:
            reached |= level
            opened: dict[int | str, list[int]] = defaultdict(list)
            for n in sorted(level):
                opened[n].append(n)
                opened[dated[n].after].append(n)
            level = set()
            for key, group in opened.items():
                for n in waiting.pop(key, ()):
                    # Of several that end alike, the one that was last made before it.
                    previous[n] = group[max(0, bisect.bisect_left(group, n) - 1)]
                    level.add(n)
    return previous, intact


def _previous_by_date(dated: Sequence[CatalogEntry]) -> list[int | None]:
    """The index of what each archive continues if dates alone tell, as for the Perl script's."""
    slots = sorted(one.slot for one in dated if one.mode == FULL)
    found: list[int | None] = []
    last: int | None = None  # of those of an earlier date
    fulls: list[int | None] = []  # the slot of the newest FULL up to each
    for n, one in enumerate(dated):
        if n and dated[n - 1].made < one.made:
            last = n - 1
        fulls.append(one.slot if one.mode == FULL else fulls[n - 1] if n else None)
        if last is None or (one.before and dated[last].after):
            found.append(None)
            continue
        # A DIFF belongs to the FULL of the nearest lower slot; if another one stands before it by
        # date, its own was replaced (SimpleCycle starts anew at New Year), and it is stale.
        at = bisect.bisect_right(slots, one.slot)
        stale = not one.before and at and fulls[last] != slots[at - 1]
        found.append(None if stale else last)
    return found


# Amazon S3 began on 2006-03-14: a clock that showed less was wrong.
_S3_BEGAN = 1142294400


def _moments_of(dated: Sequence[CatalogEntry], previous: Mapping[int, int]) -> list[int]:
    """The whole epoch second as of which each archive stands: when it was made, by its own word.

    Along a chain they rise. Where a clock went back or ahead, as few archives as can be are not
    believed: each of them stands one second after the one that it continues. Dates of 10, 99, 20
    and 30 become 10, 11, 20 and 30.
    """
    moments: dict[int, int] = {}
    for end in sorted(set(range(len(dated))) - set(previous.values()), reverse=True):
        path: list[int] = []
        at: int | None = end
        while at is not None and at not in moments:
            path.append(at)
            at = previous.get(at)
        path.reverse()
        dates = [math.floor(dated[n].made) for n in path]
        if at is not None:
            before: float = moments[at]
        else:
            before = _S3_BEGAN if max(dates) > _S3_BEGAN else -math.inf
        believed = _rising([(n, date) for n, date in enumerate(dates) if date > before])
        # Those before the first that is believed stand in the seconds before it.
        last = moments[at] if at is not None else dates[min(believed)] - min(believed) - 1
        for n, index in enumerate(path):
            last = max(dates[n], last + 1) if n in believed else last + 1
            moments[index] = last
    return [moments[n] for n in range(len(dated))]


def _rising(dates: Iterable[tuple[int, int]]) -> set[int]:
    """The places of a longest choice of dates, given as (place, date), that rises throughout; of
    several such the one whose dates are earlier (patience sorting)."""
    tails: list[int] = []  # of the choices of each length, the one that ends earliest
    ends: list[int] = []
    before: dict[int, int] = {}
    for place, second in dates:
        at = bisect.bisect_left(tails, second)
        if at:
            before[place] = ends[at - 1]
        tails[at : at + 1], ends[at : at + 1] = [second], [place]
    chosen = set(ends[-1:])
    place = ends[-1] if ends else -1
    while place in before:
        place = before[place]
        chosen.add(place)
    return chosen


def choose_chain(found: Sequence[CatalogEntry], at: float, local: Moment | None = None) -> Chain:
    """The archives that give a source as it was at a moment: pure, from one source's archives.

    at: epoch seconds; the newest archive that is not from after it is wanted, see `History`.
    local: has the zone that hints are in.

    Raises Failure, with the last good moment in `hint`, where something that it continues is
    missing.
    """
    history = History(found)
    wanted = history.newest(at)
    if wanted is None:
        first = [_moment_text(local or Moment(0), at) for at in history.restorable()[:1]]
        raise Failure("nothing was backed up by then", f"the first moment is {first[0]}" if first
                      else "see what there is: s3napback.py list")
    links = history.chain(wanted)
    if not history.intact[wanted]:
        good = [m for m in history.restorable() if m < history.moments[wanted]]
        raise Failure(
            _why_broken(links, history.archives[:wanted]),
            f"the last good moment before it: --at '{_moment_text(local or Moment(0), good[-1])}'"
            if good else "there is nothing before it that could be restored",
        )
    warnings = []
    for earlier, link in itertools.pairwise(links):
        if not link.before and link.slot not in (earlier.slot, earlier.slot + 1):
            warnings.append(f"between {earlier} and {link} nights were missed, or archives are"
                            " gone; the Perl script left no mark that could tell")
        elif link.before and earlier.after != link.continues:
            warnings.append(f"{link} continues an archive that has no marks of its own; by the"
                            f" dates it is {earlier}")
    return Chain(tuple(links), history.moments[wanted], tuple(warnings))


def _why_broken(links: Sequence[CatalogEntry], earlier: Sequence[CatalogEntry]) -> str:
    """Why the last of the links cannot be restored, as a sentence."""
    *before, last = links
    if last.fault:
        return f"{last} cannot be used: {last.fault}"
    broken = [n for n, link in enumerate(before) if link.fault]
    # One that was cut may have lost the mark that would say where it ends.
    lost = [links[n] for n in broken] or [one for one in earlier if one.fault and not one.after]
    link = links[broken[-1] + 1 if broken else 0]
    lacking = f"is not whole: {lost[-1]}: {lost[-1].fault}" if lost else "is no longer there"
    return f"{link} continues an archive that {lacking}"


# Unmarked archives of one source are made in different nights. Where their dates are closer than
# that, seconds, they are those of a copy.
_COPIED_WITHIN = 3600

# A date so far from all others, seconds, may be that of a clock that was wrong.
_FAR_OFF = 300 * 86400


def date_doubts(found: Sequence[CatalogEntry], local: Moment) -> list[str]:
    """What the dates of a source's archives leave open, as sentences. local: has their zone."""
    doubts = []
    # One that was cut has lost its marks with its last chunk.
    unmarked = sorted((f for f in found if not f.marked and not f.fault),
                      key=lambda f: (f.made, f.archive.name))
    marked = min((f for f in found if f.marked), key=lambda f: f.made, default=None)
    unknown = "which state is the newest, and what continues what, is not known for sure"
    for one, other in itertools.pairwise(unmarked):
        if (apart := other.made - one.made) < _COPIED_WITHIN:
            doubts.append(f"{one} and {other} have no marks, and dates {apart:.0f} seconds apart,"
                          f" as in a copy of a bucket: {unknown}")
            break
    if unmarked and marked and unmarked[-1].made > marked.made:
        doubts.append(f"{unmarked[-1]} has no marks, but a later date than {marked}, which has: it"
                      f" lost them, or its date is that of a copy: {unknown}")
    # Of the Perl script's the last may well be from years ago: its uploads ended in 2025.
    dates = [(at, one) for one, at, _ in History(found).rows() if one.marked]
    for ends, side, age in ((dates[:2], "before", "newer"), (dates[:-3:-1], "after", "older")):
        if len(ends) > 1 and abs(ends[0][0] - ends[1][0]) > _FAR_OFF:
            at, one = ends[0]
            doubts.append(f"{one} is dated {_moment_text(local, at)}, long {side} all others,"
                          f" and may be {age}, if that clock was wrong")
    return doubts


def begun_with(found: Sequence[CatalogEntry]) -> CatalogEntry | None:
    """A DIFF of the Perl script before which there is nothing: it holds everything if the job began
    with it, in the middle of a round. Only its content tells."""
    first = History(found).archives[0]
    return None if first.self_contained or first.marked or first.fault else first


def _moment_text(local: Moment, at: float) -> str:
    return f"{local.local(at):%Y-%m-%d %H:%M:%S %z}"


# ==================================================================================================
# 12. Transfer
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# To the bucket
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadResult:
    """What an upload left in the bucket."""

    ref: ArchiveRef  # the archive, for the DIFF that continues it
    chunks: int  # number of them
    size: int  # bytes
    old_chunks_removed: bool = True  # whether it is in its place, and alone there


class Upload:
    """An archive on its way to the bucket, in place of the old chunks of its name.

        with Upload(store, archive, old_chunks, ...) as upload:
            for chunk in upload.chunks(readinto, check):
                upload.put(chunk)
            result = upload.commit(marks)

    Every chunk but the last has chunk_size bytes, the last has fewer, maybe none (as the original's
    js3tream). `parallel` threads send them; the first fault of one is raised by the next call.
    Whoever leaves the block before the last chunk is stored leaves nothing of the upload behind.
    Memory: chunk_size * (parallel + 2), unless chunks are so large that they go through the
    folder (see `Buffer`), which may have room for fewer.

    old_chunks: those now under the archive's name.
    metadata: user metadata of every chunk.
    safe: the old archive stays until the new one is complete, at the price of room for both.
    progress: told the bytes of each stored chunk.
    """

    def __init__(
        self, store: Store, archive: str, old_chunks: Sequence[StoredObject], *,
        chunk_size: int, parallel: int, log: logging.Logger, safe: bool = False,
        folder: str | None = None, metadata: Mapping[str, str] | None = None,
        progress: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._store, self._archive, self._old_chunks = store, archive, old_chunks
        self._chunk_size, self._parallel, self._folder = chunk_size, parallel, folder
        self._log, self._progress = log, progress
        self._id = secrets.token_hex(16)
        self._metadata = {f"{META}archive": self._id, **(metadata or {})}
        # An archive of one chunk takes the old one's place by a single PUT, which is safe as it is.
        self._staged = safe and bool(old_chunks)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="upload")
        self._running: set[Future[Buffer]] = set()
        self._buffers: list[Buffer] = []
        self._spare: list[Buffer] = []
        self._last: Buffer | None = None
        self._count = 0  # full chunks
        self._digests: dict[str, str] = {}  # hex MD5 by key, of all that may have been stored
        self._sent: dict[str, tuple[int, str]] = {}  # (size, ETag) by key, of all that was stored
        self._refused = False  # whether the store failed
        self._keeps = False  # whether an end that comes now undoes nothing

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if not self._keeps:
                self._roll_back(error)
        finally:
            self._pool.shutdown(cancel_futures=True)
            for buffer in self._buffers:
                buffer.close()

    def chunks(
        self, readinto: ReadInto, check: Callable[[], None] = lambda: None
    ) -> Iterator[Buffer]:
        """The full chunks of a source; what is left at its end is for `commit`. check: raises
        Failure if the source is known to have failed."""
        while True:
            chunk = self._fill(self._acquire_buffer(), readinto)
            check()
            if len(chunk) < self._chunk_size:
                self._last = chunk
                return
            yield chunk

    def put(self, chunk: Buffer) -> None:
        """Has a full chunk sent; the first one makes room for its archive.

        From here until the last chunk is stored the slot holds no archive: the price of a slot that
        is not kept twice. The other slots are untouched. A staged upload leaves the old one.
        """
        if self._count == 0 and not self._staged:
            placed = [item for item in self._old_chunks if not is_staged(item.key)]
            _make_room(self._store, self._archive, placed)
        # A thread that the pool did not get to note down is not waited for by `_roll_back`.
        with signals_held():
            self._running.add(self._pool.submit(self._send, self._count, chunk, self._metadata))
        self._count += 1

    def commit(self, marks: Mapping[str, str]) -> UploadResult:
        """Stores the last chunk, when all others are there, and sees to it that it is the archive.

        marks: what the last chunk says besides. Raises Failure where the bucket does not list what
        was stored, or lists what somebody else stored meanwhile.
        """
        while self._running:
            self._wait_for_one()
        assert self._last is not None
        number, chunk = self._count, self._last
        size = number * self._chunk_size + len(chunk)
        md5 = digest_of_digests([*(md5 for _, md5 in sorted(self._digests.items())), chunk.md5()])
        closing = {f"{META}chunks": str(number + 1), f"{META}bytes": str(size), f"{META}md5": md5}
        if number == 0:
            # A single PUT: whatever happens, the key holds the old archive or all of the new one.
            self._keeps, self._staged = True, False
        self._send(number, chunk, {**self._metadata, **closing, **marks})
        sent = dict(sorted(self._sent.items()))
        objects = confirm_or_undo(self._store, self._archive, sent, self._id)
        if self._staged and f"{META}chunks" not in (self._store.head([*sent][-1]) or {}):
            self._store.delete([*sent])  # the old archive is in its place
            raise Failure("the service keeps no user metadata (x-amz-meta-…), by which a new"
                          " archive is told from an old one",
                          "take SafeReplace out of the config, or use another service")
        strange = {item.key for item in objects} - sent.keys() - {i.key for i in self._old_chunks}
        if strange:
            raise Failure(f"another machine stores {self._archive} at the same time: {min(strange)}"
                          " is not from here", _ONE_SLOT_EACH)
        placed = self._remove_old_chunks(objects, sent)
        newest = max(item.modified for item in placed or objects)
        ref = ArchiveRef(self._archive, self._id, md5, newest)
        return UploadResult(ref, number + 1, size, placed is not None)

    def _remove_old_chunks(
        self, objects: Sequence[StoredObject], sent: Mapping[str, tuple[int, str]]
    ) -> Sequence[StoredObject] | None:
        """Makes the archive the only one under its name; what is listed then, None where it failed.

        It is complete already: what may be left of the old one is in nobody's way
        (`resolve_archive`), and the next upload removes it.
        """
        try:
            if self._staged:
                return finish_replacement(self._store, self._archive, objects, self._parallel)
            delete_chunks(self._store, [item for item in self._old_chunks if item.key not in sent
                                        and (self._count == 0 or is_staged(item.key))])
        except Failure as failure:
            what = "delete old backup"
            if self._staged:
                what = "put the new backup in its place; it waits beside it"
            self._log.error("Could not %s: %s", what, failure)
            return None
        return objects

    def _roll_back(self, error: BaseException | None) -> None:
        """Removes what was uploaded; what is on its way is waited for first.

        The clean-up is tried once after a signal, a refusal, or hours of waiting for the network.
        Whoever dies here leaves chunks without a last one, which the next upload replaces.
        """
        with self._store.retries.once():
            self._pool.shutdown(cancel_futures=True)
        if not self._digests:
            return
        if self._refused:  # what it says comes first: the clean-up may fail, and take its time
            self._log.error("%s", error)
        self._log.error("Deleting any partial backup")
        hurried = self._refused or not isinstance(error, Failure)
        try:
            with self._store.retries.once() if hurried else contextlib.nullcontext():
                self._store.delete(sorted(self._digests, reverse=True))
        except Failure as failure:
            self._log.error("Could not delete partial backup: %s", failure)

    def _acquire_buffer(self) -> Buffer:
        """A buffer to read the next chunk into; waits for one where all are being sent."""
        while len(self._running) > self._parallel or (
            self._running and not has_room(self._chunk_size, self._folder)
        ):
            self._wait_for_one()
        if self._spare:
            return self._spare.pop()
        self._buffers.append(Buffer(self._chunk_size, self._folder))
        return self._buffers[-1]

    def _fill(self, chunk: Buffer, readinto: ReadInto) -> Buffer:
        """The chunk with the source's next bytes. Where others fill the disk meanwhile, it waits
        for those that are on their way, one by one."""
        while True:
            try:
                with os_failures("read the data to be stored"):
                    chunk.extend(readinto)
                return chunk
            except DiskFull:
                if not self._running:
                    raise
                self._wait_for_one()

    def _wait_for_one(self) -> None:
        """Waits until a chunk has been sent, which gives its room back."""
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        self._spare += [future.result() for future in done]

    def _send(self, number: int, chunk: Buffer, metadata: Mapping[str, str]) -> Buffer:
        key = (staged_key if self._staged else chunk_key)(self._archive, number)
        self._digests[key] = chunk.md5()  # before the request: one that fails may have stored it
        try:
            etag = self._store.put(key, chunk, metadata)
        except Failure:
            self._refused = True
            raise
        self._sent[key] = len(chunk), etag
        if f"{META}chunks" in metadata:  # the last one: the archive is complete
            self._keeps = True
        self._progress(len(chunk))
        chunk.clear()
        return chunk


# Pauses before a listing that lacks something is asked again, seconds: half a minute in all. Amazon
# lists at once what was stored (S3 User Guide, "Data consistency model"); not everybody does.
_LISTING_PAUSES = (0.1, 0.3, 1.0, 3.0, 9.0, 17.0)

_ONE_SLOT_EACH = "give each machine a Bucket or a Prefix of its own, then back up again"


def confirm_or_undo(
    store: Store, archive: str, sent: Mapping[str, tuple[int, str]], identity: str
) -> list[StoredObject]:
    """All chunks of an archive's name, as listed once all of those that were sent are there.

    sent: (size, ETag) of each key, in order.
    identity: the upload's `s3napback-archive`.

    Raises Failure where not all of them come to be listed. Where chunks of another upload are among
    them, it deletes the last one, if that is ours: what is mixed must not be called complete.
    """
    for pause in (0.0, *_LISTING_PAUSES):
        time.sleep(pause)
        objects = archive_objects(store, archive)
        listed = {item.key: item for item in objects}
        absent = []
        for key, told in sent.items():
            item = listed.get(key)
            if item and (item.size, item.etag) == told:
                continue
            # ETags that differ although the chunk is ours: encryption with a key of AWS's KMS.
            mark = (store.head(key) or {}).get(f"{META}archive") if item else None
            if mark and mark != identity:
                last = list(sent)[-1]
                if (store.head(last) or {}).get(f"{META}archive") == identity:
                    store.delete([last])
                raise Failure(f"another machine stored {archive} at the same time: {key} is not"
                              " from here, and the backup is not whole", _ONE_SLOT_EACH)
            # Without a mark, the listing shows what was there before.
            if not item or (not mark and told[1] and item.etag):
                absent.append(key)
        if not absent:
            return objects
    raise _unlisted_failure(store, archive, sent, absent[0])


def _unlisted_failure(
    store: Store, archive: str, sent: Mapping[str, object], absent: str
) -> Failure:
    if not is_known_to_be_there(store, absent):
        return Failure(f"another machine stores {archive} at the same time: {absent} was stored"
                       " and is gone", _ONE_SLOT_EACH)
    text = f"{store.bucket} does not list what was stored in it: {absent}"
    bare = archive.lstrip("/")
    if bare != archive and any(f"/{i.key}" in sent for i in archive_objects(store, bare)):
        return Failure(f"{text}; the service strips the leading slash of keys",
                       "set Prefix to a word: it then comes before the slash")
    return Failure(text, "run verify: where the service lists late, it may be there by then")


def finish_replacement(
    store: Store, archive: str, objects: Sequence[StoredObject], parallel: int
) -> Sequence[StoredObject]:
    """Moves a complete staged archive to its place, and deletes what was staged (SafeReplace).

    objects: all chunks of the archive's name. Returns those that are there then. At every moment
    one complete archive is there, so that whoever is stopped in the middle lost nothing, and the
    next one goes on from there. What is staged but not complete is left to the next upload, which
    deletes it when it is complete itself. Raises Failure where the listing is known to be old.
    """
    staged = [item for item in objects if is_staged(item.key)]
    if not staged:
        return objects
    placed = [item for item in objects if not is_staged(item.key)]
    new = resolve_archive(archive, staged, store.head)
    old = resolve_archive(archive, placed, store.head)
    if not (new and new.complete and new.metadata):
        following = staged_key(archive, 1 + max(map(_number, staged)))
        if is_known_to_be_there(store, following):
            raise Failure(f"{store.bucket} does not list {following}, which is there",
                          "back up again when it does")
        return objects
    if not _supersedes(old, new):
        placed = _move(store, new, placed, parallel)
    delete_chunks(store, staged)
    return placed


def _move(
    store: Store, new: Archive, placed: Sequence[StoredObject], parallel: int
) -> list[StoredObject]:
    """Copies a staged archive to the place of another. Returns the chunks that are there then."""
    _make_room(store, new.name, placed)  # the staged one is complete, and counts
    *first, last = [(item.key, chunk_key(new.name, _number(item))) for item in new.chunks]
    with workers(store, parallel, "copy") as pool:
        for _ in pool.map(lambda keys: store.copy(*keys), first):
            pass
    store.copy(*last)
    sent = {chunk_key(new.name, _number(item)): (item.size, item.etag) for item in new.chunks}
    objects = confirm_or_undo(store, new.name, sent, new.metadata["archive"])
    placed = [item for item in objects if not is_staged(item.key)]
    if not _supersedes(resolve_archive(new.name, placed, store.head), new):
        raise Failure(f"{new.name} was not copied as it was stored", "look at it: verify")
    return placed


def _supersedes(placed: Archive | None, staged: Archive) -> bool:
    """Whether an archive is the staged one in its place, or a newer one."""
    return bool(
        placed and placed.complete and placed.metadata
        and (placed.metadata.get("archive") == staged.metadata.get("archive")
             or ("made" in placed.metadata and placed.made > staged.made))
    )


def _make_room(store: Store, archive: str, items: Sequence[StoredObject]) -> None:
    """Deletes an archive, if what is to take its place will not be refused."""
    if items:
        store.try_to_store(probe_key(archive))
        delete_chunks(store, items)


def delete_chunks(store: Store, items: Sequence[StoredObject]) -> None:
    """Deletes chunks, the last ones first, so that no rest of them looks complete."""
    if items:
        store.delete([item.key for item in sorted(items, key=_number, reverse=True)])


# --------------------------------------------------------------------------------------------------
# From the bucket
# --------------------------------------------------------------------------------------------------


def download(
    archive: Archive, store: Store, parallel: int,
    progress: Callable[[int], None] = lambda size: None, folder: str | None = None, *,
    to_the_end: bool = True,
) -> Generator[memoryview, None, None]:
    """The chunks' data in order, each chunk checked before a byte of it is handed on.

    What is handed on is valid until the next is asked for. Memory: chunk size * (parallel + 1),
    for large chunks room in the folder (see `Buffer`). progress: told the bytes of each chunk.
    to_the_end: else the first chunk comes alone, then two at a time, and so on, for whoever may
    need no more. Raises Failure for a chunk that is not the one listed. One that lost its mark (a
    copy in parts has no metadata), or whose ETag is no MD5, is proved by the archive's own digest,
    before the last chunk is handed on; where only some are asked for, by nothing.
    """
    whole = archive.complete and len(archive.chunks) == archive.count
    room = max((item.size for item in archive.chunks), default=0)
    if room > MAX_CHUNK:
        raise Failure(f"{archive.name}: one of {room} bytes is more than a chunk can have")
    waiting = deque(archive.chunks)
    running: deque[Future[tuple[Buffer, str]]] = deque()
    made, spare, digests, unproved = list[Buffer](), list[Buffer](), list[str](), ""
    # In this order: the buffers are closed when the threads that fill them have ended.
    with contextlib.ExitStack() as leaving, workers(store, parallel, "download") as pool:
        while waiting or running:
            # Besides these, one chunk is with the consumer. They have not all taken their room yet.
            at_once = parallel if to_the_end else min(parallel, 1 + len(digests))
            while waiting and len(running) < at_once and (
                not running or has_room(room, folder, 1 + len(running))
            ):
                if not spare:
                    spare.append(leaving.enter_context(contextlib.closing(Buffer(room, folder))))
                    made.append(spare[-1])
                item = waiting.popleft()
                running.append(pool.submit(_fetch_chunk, archive, item, store, spare.pop()))
            buffer, alone = running.popleft().result()
            digests.append(buffer.md5())
            unproved = unproved or alone
            if unproved and whole and len(digests) == archive.count and (
                digest_of_digests(digests) != archive.metadata.get("md5")
            ):
                raise Failure(f"{archive.name} is not what was stored: nothing proves {unproved},"
                              " and the digest of the whole is another")
            progress(len(buffer))
            try:
                yield from buffer.pieces()
            except GeneratorExit:
                for one in made:
                    one.give_up()
                raise
            spare.append(buffer)


def _fetch_chunk(
    archive: Archive, item: StoredObject, store: Store, buffer: Buffer
) -> tuple[Buffer, str]:
    """(the buffer with the chunk's data, the key of one that only the whole archive can prove)."""
    metadata = store.fetch(item.key, buffer)
    if len(buffer) != item.size:
        raise Failure(f"{item.key} has {len(buffer)} bytes, not {item.size}: it was replaced",
                      "somebody is writing this archive: try again when that is done")
    buffer.md5()  # here, beside others
    identity, mark = archive.metadata.get("archive"), metadata.get(f"{META}archive")
    if identity and mark and mark != identity:
        raise Failure(f"{item.key} belongs to another upload of {archive.name}")
    return buffer, item.key if identity and (not mark or ETAG_IS_NOT_MD5 in metadata) else ""


# ==================================================================================================
# 13. DiffDir
# ==================================================================================================

# Of each Directory and each repository DiffDir has a diff file: what the last stored backup saw.
# A position says where one stands: for a Directory the digest of tar's snapshot, for a repository
# the last revision stored. Its sidecar says which archives in the bucket lead to that position.
# An archive has the mark `s3napback-state`: of a Directory "FROM:TO", the position from which it
# goes on ("-" for nothing) and the one to which it leads; of a repository "FIRST:LAST", revisions.

# How the names of drafts and sidecars begin and end. Those of diff files begin with their job's.
_DRAFT_START, _DRAFT_END, _SIDECAR_END = ".s3napback-", ".draft", ".chain"

# What an index begins with, bytes: the id of its archive's upload, and a newline; see `IndexDraft`.
INDEX_HEAD = 33

_in_diff_dir = os_failures("write in DiffDir")  # as a decorator


@dataclass(frozen=True)
class Sidecar:
    """What is known of a diff file that we wrote; one without a sidecar is the Perl script's."""

    position: str  # where the diff file stands, as `DiffDir.position` gives it
    place: str  # the bucket, as `bucket_place` gives it
    archives: tuple[ArchiveRef, ...]  # oldest first; together they end where the diff file does
    excludes: tuple[str, ...] = ()  # what was left out of a directory
    identity: str = ""  # `revision_identity` of a repository's last revision
    boot: tuple[str, float] = ("", 0.0)  # `boot_clock` when the backup began

    def to_json(self) -> dict[str, object]:
        links = [[ref.archive, ref.upload, ref.md5, ref.modified] for ref in self.archives]
        return {
            "reached": self.position, "place": self.place, "links": links,
            "excludes": self.excludes, "identity": self.identity, "boot": self.boot,
        }

    @staticmethod
    def from_json(given: Any) -> Sidecar:
        """Raises LookupError, TypeError or ValueError for what is damaged."""
        archives = tuple(ArchiveRef(*link) for link in given["links"])
        boot, began = given.get("boot", ("", 0.0))
        return Sidecar(given["reached"], given["place"], archives, tuple(given["excludes"]),
                       given["identity"], (boot, began))

    def clock_loss(self, boot: tuple[str, float]) -> float:
        """Seconds by which the clock was set back since, if that was in this boot."""
        back = self.boot[1] - boot[1]
        # Less is the time between the readings of two clocks.
        return back if boot[0] == self.boot[0] != "" and back > 0.01 else 0.0


def boot_clock() -> tuple[str, float]:
    """(the id of this boot, the time at which it began, by the clock as it is set now): see
    random(4) and clock_gettime(2). NTP that slews the clock does not change it."""
    boot = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as file:
        boot = file.read().decode("ascii", "replace").strip()
    return boot, time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def bucket_place(endpoint: str | None, bucket: str, prefix: str = "") -> str:
    """The bucket and the prefix as sidecars name them: the same for http and https."""
    where = urllib.parse.urlsplit(endpoint or "")
    return "/".join(filter(None, ((where.netloc + where.path).rstrip("/"), bucket, prefix)))


@contextlib.contextmanager
def _new_file(folder: str) -> Iterator[str]:
    """A private empty file in DiffDir, which is gone afterwards unless it was renamed."""
    # Its name comes first: a signal may arrive when it has just been made.
    temp = os.path.join(folder, f"{_DRAFT_START}{secrets.token_hex(8)}{_DRAFT_END}")
    try:
        os.close(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield temp
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)


class DiffDir:
    """DiffDir: per name, what its last stored backup saw. Nothing else touches these files.
    folder: ends in a slash; moment: stamps what is written."""

    def __init__(self, folder: str, moment: Moment) -> None:
        self._folder, self._moment = folder, moment

    # ---- diff files ----

    def diff_file(self, name: str) -> str:
        """Its path: the Perl script's, unless that is another name's (`/a/b` and `/a_b`)."""
        file = self._read(self._sidecar_path(name)).get("file")
        if not file:
            file = diff_file_name(name)
            others = glob.glob(f"{glob.escape(self._folder)}{_DRAFT_START}*{_SIDECAR_END}")
            if file in [self._read(other).get("file") for other in others]:
                file = diff_file_name(name, f"-{self._digest(name)[:8]}")
        return f"{self._folder}{file}"

    def written_on(self, name: str) -> date | None:
        """The local day of the name's diff file; None without one."""
        path = self.diff_file(name)
        # A name may be too long for a file.
        with os_failures("use the diff file"), contextlib.suppress(FileNotFoundError):
            return self._moment.date(os.stat(path).st_mtime)
        return None

    def position(self, kind: str, name: str) -> str:
        """Where the diff file stands; "" for no backup. Raises Failure if it cannot be read."""
        path = self.diff_file(name)
        try:
            with os_failures("read the diff file"), contextlib.suppress(FileNotFoundError):
                if kind != SUBVERSION:
                    return _content_digest(path).removeprefix("-")
                with open(path, "rb") as file:
                    revision = int(file.readline(64))
                return str(revision) if revision >= 0 else ""
        except ValueError as error:
            raise Failure(f"cannot read the revision in {path}: {error}",
                          "delete the file for a full backup") from error
        return ""

    @_in_diff_dir
    def is_ahead(self, name: str) -> bool:
        """Whether tar's snapshot is from later than now: what changed since, tar would miss.

        Now is what the file system says, since tar compares with the times of files.
        """
        with (
            contextlib.suppress(ValueError, FileNotFoundError),
            open(self.diff_file(name), "rb") as file,
            tempfile.TemporaryFile(dir=self._folder) as new,
        ):
            return Snapshot.read(file).seconds > os.fstat(new.fileno()).st_mtime
        return False

    def last_seen(self, name: str) -> Iterator[Folder]:
        """What tar saw of each directory at the last backup; nothing where that is not known."""
        with contextlib.suppress(FileNotFoundError, ValueError), open(
            self.diff_file(name), "rb"
        ) as file:
            yield from Snapshot.read(file).folders

    def own_files(self, name: str) -> list[str]:
        """What of DiffDir is no one's data: all of it, or where it holds other things, too, our
        sidecars and the name's diff file."""
        entries = os.listdir(self._folder)
        ours = [entry for entry in entries if entry.startswith(_DRAFT_START)]
        if all(entry.endswith(".diff") for entry in set(entries) - set(ours)):
            return [self._folder]
        return [*(self._folder + entry for entry in ours), self.diff_file(name)]

    # ---- sidecars ----

    def sidecars(self, name: str) -> tuple[Sidecar, ...]:
        """Of the name, newest first: after a run that was ended between `commit` and
        `Draft.commit`, the next is the diff file's, after two the third."""
        try:
            states = self._read(self._sidecar_path(name))["states"]
            return tuple(map(Sidecar.from_json, states))
        except (LookupError, TypeError, ValueError):
            return ()

    @_in_diff_dir
    def commit(self, name: str, sidecar: Sidecar) -> None:
        """Writes what is true of the diff file from the next `Draft.commit` on."""
        states = [one.to_json() for one in (sidecar, *self.sidecars(name)[:2])]
        file = os.path.basename(self.diff_file(name))
        content = {"name": key_text(name), "file": file, "states": states}
        with _new_file(self._folder) as temp:
            _write_durably(temp, [json.dumps(content).encode()])
            os.replace(temp, self._sidecar_path(name))

    @staticmethod
    def _read(path: str) -> dict[str, Any]:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _sidecar_path(self, name: str) -> str:
        return f"{self._folder}{_DRAFT_START}{self._digest(name)}{_SIDECAR_END}"

    @staticmethod
    def _digest(name: str) -> str:
        return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]

    # ---- a run's own ----

    @contextlib.contextmanager
    def draft(self, name: str, *, empty: bool) -> Iterator[Draft]:
        """For one backup: a private copy of the name's diff file, if it is not to be empty.

        `Draft.commit` puts it in the diff file's place; otherwise it is gone afterwards.
        """
        path = self.diff_file(name)
        with contextlib.ExitStack() as stack:
            with os_failures("write in DiffDir"):
                temp = stack.enter_context(_new_file(self._folder))
                if not empty and os.path.exists(path):
                    shutil.copyfile(path, temp)
                index = IndexDraft(stack.enter_context(_new_file(self._folder)))
            stack.callback(index.close)
            yield Draft(temp, path, self._moment, index)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other runs off this DiffDir. Raises Failure (status 75) where one is at work."""
        with os_failures("open DiffDir"):
            handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Failure(f"another run is at work in DiffDir {self._folder}",
                              "it goes on undisturbed; nothing was done here",
                              status=EXIT_LOCKED) from error
            except OSError as error:  # some network file systems lock no folders
                log.warning("cannot lock DiffDir %s: %s; going on", self._folder, error.strerror)
            yield

    def clear(self) -> None:
        """Deletes what a killed run left. Raises Failure (2) where no diff file can be written."""
        try:
            for entry in os.listdir(self._folder):
                if entry.startswith(_DRAFT_START) and entry.endswith(_DRAFT_END):
                    os.unlink(self._folder + entry)  # a draft describes nothing that is stored
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise Failure(
                f"cannot write in DiffDir {self._folder}: {error.strerror}",
                "make it writable for the user that runs this", status=EXIT_USAGE,
            ) from error


# --------------------------------------------------------------------------------------------------
# Snapshots
# --------------------------------------------------------------------------------------------------

# What is added to device numbers while tar works on a draft; Linux's have 32 bits (its kdev_t.h).
_MASK = 1 << 62

# Seconds by which the clock of a file server, or what is known of it, may differ from ours.
_CLOCKS_DIFFER = 300

# The time of a directory, which tar does not look at, where names were taken from its entries that
# an archive before may have.
_TRIMMED = b"0"


class Folder(NamedTuple):
    """What tar saw of a directory."""

    nfs: bytes
    seconds: bytes
    nanoseconds: bytes
    device: int
    inode: int
    name: bytes
    entries: bytes = b""  # a letter and a name for each, NUL between them

    @property
    def path(self) -> str:
        return os.path.join("/", os.fsdecode(self.name))

    @property
    def names(self) -> bytes:
        """The entries' names, NUL between them."""
        return re.sub(rb"(?<![^\0]).", b"", self.entries, flags=re.DOTALL)

    def on_disk(self) -> tuple[int, int]:
        """(device, inode) of what its path leads to now, zeros for nothing."""
        with contextlib.suppress(OSError):
            info = os.lstat(self.path)
            return info.st_dev, info.st_ino
        return 0, 0

    def is_in_place(self) -> bool:
        """Whether its path leads to the same directory now."""
        return self.on_disk() == (self.device, self.inode)

    def changed(self) -> float:
        """When it got another time than tar saw, since 1970; inf where it is another, or did not.

        Some file systems keep even seconds, or ask their server but once a minute; one whose time
        of change lies before that of the content keeps another time there (FAT before Linux 5.19).
        """
        with contextlib.suppress(OSError):
            info = os.lstat(self.path)
            is_other = self.seconds != _TRIMMED and abs(info.st_mtime - int(self.seconds)) > 2
            if is_other and info.st_ctime > info.st_mtime - 2 and self.is_in_place():
                return info.st_ctime
        return math.inf

    def is_on_another(self) -> bool:
        """Whether it is another directory now, and on another file system that begins above it."""
        device, inode = self.on_disk()
        return (device not in (0, self.device) and inode != self.inode
                and not os.path.ismount(self.path))


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file of GNU tar (its manual, "Format of the Incremental Snapshot Files", 2)."""

    version: bytes
    seconds: int  # when its backup began, since 1970
    nanoseconds: int
    folders: Iterable[Folder]  # one at a time, since there may be millions

    @staticmethod
    def read(file: IO[bytes]) -> Snapshot:
        """Raises ValueError, perhaps as late as in the midst of the folders, for what is none."""
        version, _, rest = file.read(_PIECE).partition(b"\n")
        if not re.fullmatch(rb"GNU tar-[^-\0]+-2", version):
            raise ValueError("no snapshot of format 2")
        seconds, nanoseconds, rest = rest.split(b"\0", 2)
        return Snapshot(version, int(seconds), int(nanoseconds), _read_folders(rest, file))

    def write(self, file: IO[bytes]) -> None:
        """As tar reads it."""
        file.write(b"%s\n%d\0%d\0" % (self.version, self.seconds, self.nanoseconds))
        for folder in self.folders:
            fields = [folder.nfs, folder.seconds, folder.nanoseconds, b"%d" % folder.device,
                      b"%d" % folder.inode, folder.name]
            fields += [folder.entries] if folder.entries else []
            file.write(b"\0".join(fields) + b"\0\0\0")


def _read_folders(block: bytes, file: IO[bytes]) -> Iterator[Folder]:
    # A record ends with the NUL of its last string, that of the list, and one more.
    rest = b""
    while block:
        *records, rest = (rest + block).split(b"\0\0\0")
        for record in records:
            nfs, seconds, nanoseconds, device, inode, name, *entries = record.split(b"\0", 6)
            yield Folder(nfs, seconds, nanoseconds, int(device), int(inode), name, *entries)
        block = file.read(_PIECE)
    if rest:
        raise ValueError("cut short")


def _without_losses(folders: Iterable[Folder], lost: Losses) -> Iterator[Folder]:
    """What tar wrote, as the next backup is to find it: what the archive lacks is forgotten.

    tar stores what a snapshot does not name: a file that is not among its directory's entries, a
    directory without a record, with all below it.
    """
    for folder in folders if not lost.everything else ():
        if lost.folders and is_within(folder.name, lost.folders):
            continue
        if names := lost.entries.get(folder.name):
            kept = [e for e in folder.entries.split(b"\0") if e[1:] not in names]
            folder = folder._replace(entries=b"\0".join(kept), seconds=_TRIMMED)
        yield folder._replace(device=folder.device & ~_MASK)


def _in_place(folders: Iterable[Folder], twins: Mapping[bytes, Folder]) -> Iterator[Folder]:
    """Those that are where tar saw them, and the twins that it did not see, masked."""
    unseen = dict(twins)
    for folder in folders:
        if folder.is_in_place():
            unseen.pop(folder.name, None)
            yield folder._replace(device=folder.device | _MASK)
    for folder in unseen.values():
        yield folder._replace(device=folder.device | _MASK)


def _content_digest(path: str) -> str:
    return file_digest(path, "sha256") if os.path.getsize(path) else "-"


@dataclass(frozen=True)
class Draft:
    """A diff file in the making."""

    path: str  # where it is written
    target: str  # the diff file
    moment: Moment
    index: IndexDraft  # of the archive that leads to it

    @_in_diff_dir
    def write(self, text: str) -> None:
        """Gives it this content."""
        with open(self.path, "w", encoding="ascii") as file:
            file.write(text)

    @_in_diff_dir
    def prepare(
        self, twins: Iterable[tuple[bytes, os.stat_result]] = (), set_back: float = 0.0,
        changed: tuple[float, str] = (math.inf, ""),
    ) -> str:
        """Makes it fit for tar; returns the position that it had, "-" for an empty one.

        tar knows a directory again by device and inode, and stores one that has moved as a rename,
        which on the way back cannot be done where the name is still taken. So those that are not
        where tar saw them are forgotten, and the device numbers are masked: none is known again
        but in its place, and there by its inode, since tar does not look at the device
        (`TAR_MEMORY`). What it does not know, it stores whole.
        twins: (name, status) of what tar would take for another directory of this backup, renamed.
        set_back: seconds by which the clock was set back. What changed in them looks older than
        the snapshot, whose time is therefore set back as well.
        changed: see `Inspection`. What tar saw otherwise, and was not changed since, is of another
        disk, or an older state that was brought back: then all files count as changed.
        """
        before = _content_digest(self.path)
        known = {
            name: Folder(b"0", b"0", b"0", info.st_dev, info.st_ino, name) for name, info in twins
        }
        if known and before == "-":
            with open(self.path, "wb") as file:
                Snapshot(b"GNU tar-1.34-2", 0, 0, ()).write(file)
        self._rewrite(lambda folders: _in_place(folders, known), math.ceil(set_back), changed)
        os.utime(self.path, (0, 0))  # by which `finish` can tell whether tar wrote it
        return before

    @_in_diff_dir
    def finish(self, messages: Sequence[str], before: str) -> str:
        """Makes what tar wrote tell of no more than what is in the archive; returns its position.

        messages: tar's; before: the position that it had. Raises Failure where the next backup
        could not continue it.
        """
        if os.stat(self.path).st_mtime_ns == 0:  # GNU tar does it last, whatever it met
            raise Failure("tar wrote no snapshot file", "install GNU tar as tar")
        # One that is cut short is worse than none: the next night would fail, or lie. Of its path
        # tar may escape all but its name.
        if cut := [text for text in messages if os.path.basename(self.path) in text]:
            raise Failure(cut[0], "make room in DiffDir")
        lost = losses_told_by(messages)
        if not lost.everything:  # nor renames, of which an index tells nothing
            self.index.end(self._with_other_names() if before != "-" else ())
        self._rewrite(lambda folders: _without_losses(folders, lost))
        return _content_digest(self.path)

    def _with_other_names(self) -> Iterator[Folder]:
        """The directories in which a name may be gone that an archive before has."""
        with open(self.target, "rb") as old, open(self.path, "rb") as new:
            # Hashes only: there may be millions.
            names = {hash(one.name): hash(one.names) for one in Snapshot.read(old).folders
                     if one.seconds != _TRIMMED}
            for one in Snapshot.read(new).folders:
                if names.get(hash(one.name)) != hash(one.names):
                    yield one

    def _rewrite(
        self, change: Callable[[Iterable[Folder]], Iterator[Folder]], set_back: int = 0,
        changed: tuple[float, str] = (math.inf, ""),
    ) -> None:
        """Changes its folders, and sets its time back by whole seconds, to 1970 where `changed` is
        before it. Empties what is no snapshot of the known format: then everything is stored."""
        with _new_file(os.path.dirname(self.path)) as temp:
            with open(self.path, "rb") as old, open(temp, "wb") as new:
                try:
                    was = Snapshot.read(old)
                    seconds = was.seconds - set_back
                    if changed[0] < seconds - _CLOCKS_DIFFER:
                        log.info("%s is not as the last backup saw it, and was not changed since:"
                                 " another disk, or an older state, is there; all that was there"
                                 " is stored again", changed[1])
                        seconds = 0
                    replace(was, seconds=seconds, folders=change(was.folders)).write(new)
                except ValueError:
                    new.seek(0)
                    new.truncate()
            os.replace(temp, self.path)

    @_in_diff_dir
    def commit(self, index_path: str, upload: str) -> None:
        """Makes it the diff file: before the rename the old one stands whole, then this one.

        index_path: where the index goes; upload: the id of its archive's upload."""
        self.index.commit(index_path, upload)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.utime(self.path, (self.moment.epoch, self.moment.epoch))
        os.replace(self.path, self.target)


class IndexDraft:
    """The index of an archive in the making: what a search would have to fetch the archive for.

    After the id of the upload, which tells whether it is still the one in the bucket, compressed by
    zlib (RFC 1950): a line of JSON with the names that tar was given; tar's line for each member
    (`TAR_LISTING`) and an empty one; a line of JSON for each directory in which a name may be gone
    that an archive before has: its name and its entries.

    An aid, no part of the backup: whatever goes wrong, there is none, and tar is read to its end.
    path: of an empty file.
    """

    def __init__(self, path: str) -> None:
        self._path, self._zip = path, zlib.compressobj(1)
        self._file: IO[bytes] | None = None  # None where there is to be no index
        self._pipe = contextlib.ExitStack()  # closes our end, and waits until all is copied
        self._is_whole = False

    def begin(self, names: Sequence[str]) -> int:
        """The descriptor to which tar is to write its lines, -1 where there is to be no index.

        names: those that tar is given.
        """
        with contextlib.suppress(Exception), signals_held():
            self._file = open(self._path, "wb", 0)  # noqa: SIM115 - until `close`
            self._file.write(bytes(INDEX_HEAD))
            self._write(json.dumps(names).encode() + b"\n")
            # What the thread needs is made before it: it must not end before tar does.
            room = bytearray(_PIPE_BYTES)
            reader, writer = os.pipe()
            pipe = os.fdopen(reader, "rb", 0)
            widen_pipe(pipe)
            thread = threading.Thread(target=self._copy, args=(pipe, room), daemon=True)
            # The thread closes its end; where it could not be started, that is done here.
            self._pipe.callback(lambda: thread.join() if thread.ident else pipe.close())
            self._pipe.callback(os.close, writer)
            thread.start()
            if self._file and os.path.exists(f"/dev/fd/{writer}"):
                return writer
        self._give_up()
        return -1

    def _copy(self, pipe: io.FileIO, room: bytearray) -> None:
        with pipe:
            while count := pipe.readinto(room):
                self._write(memoryview(room)[:count])
                time.sleep(0.02)  # tar writes line by line; to be woken by each is more work

    def _write(self, data: Piece) -> None:
        try:
            if self._file:
                write_all(self._file, self._zip.compress(data))
                # tar's snapshot and our copy of it, as large, come to the same disk afterwards.
                if shutil.disk_usage(self._path).free < 4 * self._file.tell():
                    self._give_up()
        except Exception:  # no error of an aid may end the thread, on which tar would fail
            self._give_up()

    def _give_up(self) -> None:
        """There is to be no index; what it took of the disk is free again."""
        file, self._file = self._file, None
        if file:
            with contextlib.suppress(OSError), file:
                file.truncate(0)

    def end(self, folders: Iterable[Folder]) -> None:
        """Adds the directories, once tar has ended."""
        self._pipe.close()
        with contextlib.suppress(Exception):  # nor may one end the backup
            self._write(b"\n")
            for folder in folders:
                line = json.dumps([os.fsdecode(folder.name), os.fsdecode(folder.entries)])
                self._write(line.encode() + b"\n")
            if self._file:
                write_all(self._file, self._zip.flush())
                self._is_whole = True

    def commit(self, target: str, upload: str) -> None:
        """Puts it in its place, in that of the index of the archive that was there before."""
        with contextlib.suppress(OSError):
            os.unlink(target)
        if self._file and self._is_whole:
            with contextlib.suppress(OSError), self._file as file:
                os.pwrite(file.fileno(), f"{upload}\n".encode(), 0)
                os.fsync(file.fileno())
                os.replace(self._path, target)
            self._file = None

    def close(self) -> None:
        """Gives back what it holds."""
        self._pipe.close()
        self._give_up()


# --------------------------------------------------------------------------------------------------
# Directories as they were and are
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What is to be said of a Directory's names before tar reads them, beside what it saw last."""

    faults: list[str]  # why nothing is to be stored
    links: list[str]
    warnings: list[str]
    renumbered: list[str]  # paths that only their device number sets apart from what they were
    unknown: bool  # all are empty, and what they were is not known
    # The first `changed` of the directories that have another time than tar saw, and which it is.
    changed: tuple[float, str]


def inspect_names(names: Sequence[str], folders: Iterable[Folder]) -> Inspection:
    """Looks at the places that a Directory stands for; folders: as tar saw them last."""
    faults = [fault for name in names if (fault := access_fault(name))]
    warnings, renumbered, changed = list[str](), list[str](), (math.inf, "")
    tops = {os.fsencode(name.rstrip("/") or "/"): is_empty_folder(path_of(name)) for name in names}
    unknown = all(tops.values())
    for folder in folders:
        unknown = False
        path = folder.path
        changed = min(changed, (folder.changed(), path))
        if folder.name not in tops:
            if folder.entries and folder.is_on_another() and is_empty_folder(path):
                warnings.append(f"{path} was on another file system at the last backup, and is"
                                " empty: is it not mounted?")
        elif tops[folder.name] and folder.entries not in (b"", b"Dlost+found"):
            faults.append(f"directory {path} is empty, and was not at its last backup")
        elif folder.is_on_another():
            warnings.append(f"{path} was on another file system at the last backup: is that not"
                            " mounted?")
        elif folder.on_disk()[1] == folder.inode and not folder.is_in_place():
            renumbered.append(path)
    return Inspection(faults, [*links_among(names)], warnings, renumbered, unknown, changed)


# ==================================================================================================
# 14. Backup
# ==================================================================================================

# A run goes from facts (DiffDir, svnlook) to plans, which a survey of the bucket completes, by
# making the archives to outcomes, and from these to its closing line. Each step is done for all
# jobs before the next begins.


@dataclass(frozen=True)
class RunOptions:
    """What a run is told from outside."""

    now: Moment
    clock: Callable[[], float]  # epoch seconds as time goes by
    env: Mapping[str, str]  # of tools
    program: str  # how to call this program in a shell
    # Makes the progress display of one archive.
    progress: Callable[[str], contextlib.AbstractContextManager[Callable[[int], None]]]
    host: str = ""  # the name of this machine
    test: bool = False
    force: bool = False
    tells_jobs: bool = False  # each outcome is logged, as `job` of the record
    log_text: Callable[[], bytes] = bytes  # the end of what was logged of the config


@dataclass(frozen=True)
class Run:
    """The run of one config, which every step is given."""

    settings: Settings
    options: RunOptions
    diff_dir: DiffDir
    store: Store
    place: str  # the bucket, as `bucket_place` gives it

    @property
    def today(self) -> date:
        return self.options.now.date()

    def start_of(self, plan: Plan) -> str:
        """What the names of all archives of a plan's source begin with."""
        return source_start(plan.kind, plan.name, self.settings.prefix)

    def archives_of(self, plan: Plan) -> Iterator[tuple[str, str, list[StoredObject]]]:
        """(archive, mode, its chunks) of all that the bucket has of a plan's source."""
        return archives_of(self.store, self.start_of(plan), self.settings.prefix)


# --------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What DiffDir, and svnlook, say of a source."""

    sidecars: Sequence[Sidecar] = ()  # newest first
    written: date | None = None  # the day of its diff file
    position: str = ""  # where the diff file stands; empty for nowhere, and for a FULL
    is_ahead: bool = False  # the diff file is from later than now
    youngest: int = -1  # the repository's last revision
    is_other: bool = False  # the repository is not the one that was stored


@dataclass(frozen=True)
class Plan:
    """One archive that a job is to make now."""

    job: Job
    kind: str
    name: str  # of the source: of a SubversionDir, that of one of its repositories
    mode: str = FULL
    archive: str = ""  # empty where none is due, or its name cannot be known yet
    sidecar: Sidecar | None = None  # of the diff file, if all that it names has to be in the bucket
    holds_all: bool = False  # it continues nothing, although it is a DIFF
    notice: tuple[int, str] | None = None  # log level and text: why, to be told when it is made
    todays: ArchiveRef | None = None  # the archive that the diff file describes, if it is of today
    saved: int = -1  # the last revision that is stored, -1 for none
    youngest: int = -1  # the last revision that there is
    waits: bool = False  # its source is there to be looked at only after RunBefore
    failure: Exception | None = None  # why it cannot be made
    same_as: str = ""  # the place of an earlier job whose source has the same archives
    clash: str = ""  # the place of an earlier job that makes this very archive now
    replaced: str = ""  # an archive that it continues, and that is replaced now
    # What the survey finds in the bucket.
    existing_chunks: Sequence[StoredObject] = ()  # those now under the archive's name
    done: str = ""  # the archive that is there, complete and of today
    is_repeated: bool = False  # that is the one of the diff file
    foreign_host: str = ""  # the other host whose archive it replaces
    chain: tuple[ArchiveRef, ...] = ()  # what it continues, oldest first

    @property
    def log(self) -> logging.Logger:
        return _LOGS[self.kind]

    @property
    def self_contained(self) -> bool:
        """Whether the archive holds everything, and continues none."""
        return self.mode == FULL or self.holds_all

    @property
    def is_due(self) -> bool:
        return bool(self.archive) or self.waits

    @property
    def is_skipped(self) -> bool:
        """Whether there is nothing to be made."""
        return not self.is_due or self.is_repeated or self.has_nothing_new

    @property
    def revisions(self) -> tuple[int, int]:
        """The first and the last one that the archive is to hold."""
        return 0 if self.self_contained else self.saved + 1, self.youngest

    @property
    def has_nothing_new(self) -> bool:
        """Whether its repository is all in the archives that it continues."""
        return 0 <= self.saved == self.youngest and not self.holds_all

    def outcome(self, status: str, error: str = "", size: int = 0) -> Outcome:
        return Outcome(self.kind, self.name, self.archive, status, error, size)

    def holding_everything(self, level: int, why: str) -> Plan:
        """It without what it could have continued, and why."""
        notice = level, f"{why}; everything is stored in it"
        return replace(self, sidecar=None, holds_all=True, notice=notice)


def plans_of(run: Run, job: Job, *, is_ready: bool = False) -> list[Plan]:
    """What a job is to make now: one archive, but for a SubversionDir.

    is_ready: whether its RunBefore has run. Raises Failure where the config's numbers make no
    rotation.
    """
    day = run.options.now.day
    with failures_at(job.where):
        if not run.options.force and not is_backup_day(job.cycle, day):
            return [Plan(job, job.kind, job.name)]
        slot, mode = slot_and_mode(job.cycle, day, job.kind in DUMPS)
    one = Plan(job, SUBVERSION if job.kind == SUBVERSION_DIR else job.kind, job.name, mode)
    is_ready = is_ready or run.options.test or RUN_BEFORE not in dict(job.hooks)
    if one.kind == SUBVERSION and not is_ready:  # which is looked at to be planned
        return [replace(one, waits=True)]
    names = [job.name]
    if job.kind == SUBVERSION_DIR:
        try:
            names = repositories_in(job.name)
            if not names and not run.options.test:
                raise Failure(f"there is no repository in {job.name}",
                              "mount it, or correct the name")
        except Failure as failure:
            return [replace(one, failure=failure)]

    def planned(plan: Plan) -> Plan:
        return plan_archive(run, plan, slot, facts_of(run, plan))

    return [_attempt(planned, replace(one, name=name)) for name in names]


def _attempt(step: Callable[[Plan], Plan], plan: Plan) -> Plan:
    """What a step makes of a plan, or the plan with why it failed: a bug, too, is one job's."""
    try:
        return step(plan)
    except Exception as error:
        return replace(plan, failure=error)


def facts_of(run: Run, plan: Plan) -> Facts:
    """Asks DiffDir about a source, and svnlook about a repository. Raises Failure."""
    kind, name, diff_dir, env = plan.kind, plan.name, run.diff_dir, run.options.env
    if kind in DUMPS:
        return Facts()
    sidecars, written = diff_dir.sidecars(name), diff_dir.written_on(name)
    position = diff_dir.position(kind, name) if plan.mode == DIFF and sidecars else ""
    if kind == DIRECTORY:
        return Facts(sidecars, written, position, bool(position) and diff_dir.is_ahead(name))
    youngest, saved = youngest_revision(name, env), int(position or -1)
    noted = [one.identity for one in sidecars if one.position == position and one.identity]
    is_other = saved > youngest or bool(noted and revision_identity(name, saved, env) not in noted)
    return Facts(sidecars, written, position, False, youngest, is_other)


def plan_archive(run: Run, plan: Plan, slot: int, facts: Facts) -> Plan:
    """The plan of a source that is due, by what is known of it. Asks nobody."""
    plan = _with_sidecar(run, plan, facts)
    if facts.sidecars and facts.written == run.today and not run.options.force:
        plan = replace(plan, todays=facts.sidecars[0].archives[-1])
    if plan.kind == SUBVERSION:
        saved = int(facts.position) if plan.mode == DIFF and plan.sidecar else -1
        mode = FULL if saved < 0 else DIFF
        plan = replace(plan, mode=mode, saved=saved, youngest=facts.youngest)
    name, prefix = stored_name(plan.kind, plan.name), run.settings.prefix
    return replace(plan, archive=archive_name(plan.kind, name, slot, plan.mode, prefix))


def _with_sidecar(run: Run, plan: Plan, facts: Facts) -> Plan:
    """The plan with the sidecar of what it can continue, or with why it can continue nothing.

    A FULL continues nothing; by its sidecar a bucket is noticed that is not there any more.
    """
    if facts.written and not facts.sidecars:
        # The Perl script's moved on whether its archive arrived or not.
        why = "the diff file is the Perl script's: everything is stored in it, once"
        return replace(plan, holds_all=True, notice=(logging.INFO, why))
    if plan.mode == FULL:
        here = (one for one in facts.sidecars if one.place == run.place)
        return replace(plan, sidecar=next(here, None))
    if not facts.position:
        return plan
    sidecar = next((one for one in facts.sidecars if one.position == facts.position), None)
    level = logging.WARNING
    if facts.is_other:  # its archive is a FULL, which loses nothing
        plan.log.warning("%s, at revision %d, is not what the last backup saw at revision %s: it"
                         " was replaced; all of it is saved", plan.name, facts.youngest,
                         facts.position)
        return plan
    if sidecar is None:
        why = "the diff file is not the one that the last backup left"
    elif sidecar.place != run.place:
        why = f"what it continues is in another bucket ({sidecar.place})"
    elif facts.is_ahead:
        why = ("what it continues was made when the clock was ahead, and tar would miss what"
               " changed since")
    elif set(sidecar.excludes) != set(plan.job.left_out):
        # tar would take the files that an Exclude left out for files that it has stored.
        level, why = logging.INFO, "its Excludes are not those of the last backup"
    else:
        return replace(plan, sidecar=sidecar)
    return plan.holding_everything(level, why)


def paired(run: Run, plans: Sequence[Plan]) -> Iterator[Plan]:
    """The plans, with what each has to do with the others: `same_as`, `clash`, `replaced`.

    Of two that write now, the later does not continue the diff file that the earlier one moves on.
    """
    sources: dict[str, Plan] = {}
    archives: dict[str, Plan] = {}
    todays = {plan.archive for plan in plans}
    for plan in plans:
        # What a SubversionDir finds may well be named, too.
        start = run.start_of(plan) if plan.job.kind != SUBVERSION_DIR else ""
        source, other = sources.get(start), archives.get(plan.archive)
        if start:
            sources.setdefault(start, plan)
        if plan.archive:
            archives.setdefault(plan.archive, plan)
        chain = plan.sidecar.archives if plan.sidecar and plan.mode == DIFF else ()
        if source and source.archive and plan.kind == DIRECTORY and plan.mode == DIFF:
            why = "another job writes to the same archives tonight"
            plan = plan.holding_everything(logging.WARNING, why)
        yield replace(
            plan,
            same_as=source.job.where if source else "",
            clash=other.job.where if other else "",
            replaced=min((ref.archive for ref in chain if ref.archive in todays), default=""),
        )


# --------------------------------------------------------------------------------------------------
# Survey
# --------------------------------------------------------------------------------------------------


def survey_all(run: Run, plans: Sequence[Plan], *, is_new: bool = False) -> list[Plan]:
    """Looks for what is planned; see `survey`."""

    def look(plan: Plan) -> Plan:
        try:
            return survey(run, plan, is_new=is_new)
        except (Failure, OSError):  # the bucket, for all
            raise
        except Exception as error:
            return replace(plan, failure=error)

    with workers(run.store, run.settings.parallel, "look up") as pool:
        return list(pool.map(look, plans))


def survey(run: Run, plan: Plan, *, is_new: bool = False) -> Plan:
    """What the bucket has of a plan's archive, and of what it continues. Deletes nothing.

    It asks for one listing: of the archive, or where something has to be there, of its source.
    is_new: the bucket was not there a moment ago, of whose chain a FULL, too, tells what was lost.
    """
    if not plan.archive:
        return plan
    if plan.mode == FULL and not is_new:
        plan = replace(plan, sidecar=None)
    page, more = list[StoredObject](), True
    if plan.sidecar:
        page = list(itertools.islice(run.store.iter_objects(run.start_of(plan)), PAGE))
        more = len(page) == PAGE

    def chunks(archive: str) -> list[StoredObject]:
        return archive_objects(run.store, archive) if more else chunks_of(page, archive)

    plan = replace(plan, existing_chunks=chunks(plan.archive), done="", is_repeated=False,
                   foreign_host="", chain=())
    plan = _with_todays(run, plan, chunks)
    is_made = not plan.failure and (run.options.force or not plan.done)
    return _with_chain(run, plan, chunks) if is_made else plan


def _with_todays(run: Run, plan: Plan, chunks: Callable[[str], list[StoredObject]]) -> Plan:
    """The plan with whether the day is done: by an archive of today, of a run on this host."""
    now, head = run.options.now, run.store.head
    today = run.today.isoformat()
    there = resolve_archive(plan.archive, plan.existing_chunks, head, run.settings.chunk_size)
    if there and there.complete:
        # One that was staged may come to its place much later than it was made.
        host, is_todays = there.metadata.get("host", ""), there.made_on(now) == today
        if host in ("", run.options.host):
            plan = replace(plan, done=plan.archive if is_todays else "")
        elif is_todays and not run.options.force:
            plan = replace(plan, failure=Failure(
                f"the host {host} stored an archive of this name today",
                "give each machine a Bucket of its own, or a Prefix; -f replaces it",
            ))
        else:
            plan = replace(plan, foreign_host=host)
    if ref := plan.todays:
        stored = ref.find(chunks(ref.archive), head)
        if stored and stored.made_on(now) == today:
            plan = replace(plan, done=stored.name, is_repeated=True)
    return plan


def _with_chain(run: Run, plan: Plan, chunks: Callable[[str], list[StoredObject]]) -> Plan:
    """The plan with its chain; a DIFF whose chain is not whole is to hold everything."""
    chain = []
    for ref in plan.sidecar.archives if plan.sidecar else ():
        checked = ref.refreshed(chunks(ref.archive), run.store.head)
        if checked is None and plan.mode == FULL:
            why = f"the bucket was there before, and {ref.archive} is not in it any more"
            return replace(plan, notice=(logging.WARNING, why))
        if checked is None:
            why = f"{ref.archive}, which it continues, is not whole in the bucket"
            return plan.holding_everything(logging.WARNING, why)
        chain.append(checked)
    if plan.replaced and not plan.has_nothing_new:
        why = f"{plan.replaced}, which it continues, is replaced tonight"
        return plan.holding_everything(logging.INFO, why)
    return replace(plan, chain=() if plan.mode == FULL else tuple(chain))


def finish_staged(run: Run, plans: Iterable[Plan]) -> list[Plan]:
    """Puts each complete archive that waits beside its place into it (SafeReplace), since a run was
    ended before it could; and looks again: the plan stays what the first look made it."""

    def finish(plan: Plan) -> Plan:
        objects = archive_objects(run.store, plan.archive)
        finish_replacement(run.store, plan.archive, objects, run.settings.parallel)
        return survey(run, plan)

    # Where that fails, nothing is made: the only complete archive may be the staged one.
    return [_attempt(finish, plan) if any(is_staged(item.key) for item in plan.existing_chunks)
            else plan for plan in plans]


def has_full(run: Run, plan: Plan, *, besides: str = "") -> bool:
    """Whether a complete FULL of the source is in the bucket, besides that archive; True if it
    cannot be told."""
    with contextlib.suppress(Failure):
        for archive, mode, objects in run.archives_of(plan):
            if mode == FULL and archive != besides:
                full = resolve_archive(archive, objects, run.store.head)
                if full and full.complete:
                    return True
        return False
    return True


def size_of_full_before(run: Run, plan: Plan) -> int:
    """Bytes of the FULL before today's: in the slot whose turn was last, else in its own."""
    objects = plan.existing_chunks
    slot = slot_of_full_before(plan.job.cycle, run.options.now, plan.kind in DUMPS)
    if slot is not None:
        name = stored_name(plan.kind, plan.name)
        archive = archive_name(plan.kind, name, slot, FULL, run.settings.prefix)
        objects = archive_objects(run.store, archive) or objects
    return sum(item.size for item in objects)


# --------------------------------------------------------------------------------------------------
# Outcomes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a plan came to."""

    kind: str
    name: str
    archive: str  # empty where none was due, or could be planned
    status: str  # "ok", "warnings" (stored, with them), "failed", "skipped"; in test mode "shown"
    error: str = ""  # why it failed, or RunBefore wanted it skipped
    bytes: int = 0  # stored ones
    seconds: float = 0.0  # how long it took


@dataclass(frozen=True)
class RunReport:
    """What the run of one config came to."""

    status: int  # the exit status
    outcomes: tuple[Outcome, ...] = ()  # in the order of the jobs
    error: str = ""  # what kept the whole config from running
    seconds: float = 0.0  # how long it took

    @classmethod
    def of(cls, error: BaseException) -> RunReport:
        """Of what an error ended."""
        return cls(getattr(error, "status", EXIT_FAILED), error=str(error))

    def summed(self, what: Outcome) -> Outcome:
        """As hooks are told of it; what: names the job, or nothing for the whole run."""
        status = {EXIT_OK: "ok", EXIT_WARNINGS: "warnings"}.get(self.status, "failed")
        if not self.status and all(one.status == "skipped" for one in self.outcomes):
            status = "skipped"
        error = self.error or "; ".join(
            f"{one.kind} {one.name}: {one.error}" for one in self.outcomes
            if one.error and one.status in ("failed", status)
        )
        archives = "\n".join(one.archive for one in self.outcomes if what.kind and one.archive)
        size = sum(one.bytes for one in self.outcomes)
        return Outcome(what.kind, what.name, archives or what.archive, status, error, size,
                       self.seconds)


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------

# Characters of a fact in an environment, which can hold 128 kB (execve(2)).
_MAX_FACT = 4000


@dataclass(frozen=True)
class Hooks:
    """The hooks of a run, or of a job."""

    lines: Sequence[tuple[str, Line]]  # (directive, its line)
    path: str  # of the config
    options: RunOptions
    seconds: float  # what each may take
    log: logging.Logger  # where what it prints goes

    def around(self, what: Outcome, work: Callable[[Failure | None], RunReport]) -> RunReport:
        """Does the work between RunBefore and RunAfter. work: is given why RunBefore failed, or
        None; what: names the job. The report has a status of 3 at least where RunAfter failed."""
        try:
            report = work(self.run(RUN_BEFORE, what))
        except BaseException as error:
            self.after(RunReport.of(error), what)
            raise
        return self.after(report, what)

    def after(self, report: RunReport, what: Outcome) -> RunReport:
        """RunAfter and, where something failed, OnFailure. A signal waits until they have run."""
        told, hooks = report.summed(what), self
        if report.status > EXIT_SIGNAL:
            hooks = replace(self, seconds=min(self.seconds, LAST_SECONDS))
        with signals_held():
            failure = hooks.run(RUN_AFTER, told)
            if told.status == "failed" or (self.options.test and told.status != "skipped"):
                hooks.run(ON_FAILURE, told)
        return replace(report, status=report.status or EXIT_WARNINGS) if failure else report

    def run(self, directive: str, told: Outcome) -> Failure | None:
        """Runs the commands of a directive, in order. Returns a failure, which ends a RunBefore;
        those of others are logged. In test mode it shows them."""
        facts = vars(told) | {"config": self.path, "seconds": round(told.seconds),
                              "archive": printable(told.archive)[:_MAX_FACT],
                              "error": printable(told.error, "")[:_MAX_FACT]}
        if not told.status:
            facts |= {"bytes": "", "seconds": ""}
        env = {f"S3NAPBACK_{name.upper()}": str(text) for name, text in facts.items()}
        is_before, failure = directive == RUN_BEFORE, None
        for line in [line for name, line in self.lines if name == directive]:
            if self.options.test:
                self.log.info("%s: %s", directive, line.text)
                continue
            # There may be a password in it, and the log is sent to others.
            self.log.info("%s of %s", directive, line.where)
            self.log.debug("%s", line.text)
            try:
                run_hook(directive, line.text, {**self.options.env, **env}, self.log,
                         self.seconds, 0.0 if is_before else LAST_SECONDS)
            except Failure as error:
                failure = error.at(line.where)
                if is_before:
                    break
                self.log.warning("%s", failure)
        return failure


# --------------------------------------------------------------------------------------------------
# Archives in the making
# --------------------------------------------------------------------------------------------------

# How long a database server waits for a client that reads nothing, seconds, with a margin:
# net_write_timeout of MySQL and MariaDB is 60.
_PATIENCE_OF_SOURCES = 30.0

# Lines that are logged of what a Command writes to standard error, though it ends with 0.
_MAX_SAID = 100


def print_commands(run: Run, plan: Plan) -> Outcome:
    """Test mode: the commands, each line fit to be pasted into a shell."""
    settings = run.settings
    options = {
        "-K": settings.s3_keyfile, "--endpoint": settings.s3_endpoint,
        "--region": settings.s3_region, "--storage-class": settings.storage_class,
    }
    where = "".join(
        f" {option} {shlex.quote(value)}" for option, value in options.items() if value
    )
    program, target = f"{run.options.program} js3tream", f"{settings.bucket}:{plan.archive}"
    send = f"{program} --debug -z {settings.chunk_size} -n -f -v{where} -i -b {shlex.quote(target)}"
    pipeline = shown_pipeline(
        dump_stage(run, plan),
        plan.kind, compressor_of(run, plan), settings.gpg_recipients, settings.gpg_keyring,
    )
    plan.log.info("%s", f"{program} -v{where} -d -b {shlex.quote(target)}")
    if plan.job.use_temp_file:
        temp = f"{settings.temp_dir}{temp_file_name(settings.bucket, plan.archive)}"
        plan.log.info("Using temp file to buffer before streaming[ %s ]...", temp)
        temp = shlex.quote(temp)
        for line in (f"{pipeline} > {temp}", f"{send} < {temp}", f"rm {temp}"):
            plan.log.info("%s", line)
    else:
        plan.log.info("%s", f"{pipeline} | {send}")
    return plan.outcome("shown")


def compressor_of(run: Run, plan: Plan) -> str | None:
    """The config's Compressor, None for the default. What a Command writes may be compressed
    already: stored as it is, a restore, which goes by the first bytes, would take that off."""
    compressor = run.settings.compressor
    is_none = os.path.basename(shlex.split(compressor or "x")[0]) == "cat"
    return None if is_none and plan.kind == COMMAND else compressor


def dump_stage(run: Run, plan: Plan) -> Stage:
    """The command whose output is the backup; for a Directory as test mode shows it."""
    env, names = run.options.env, [plan.name]
    if plan.kind == SUBVERSION:
        return subversion_stage(plan.name, *plan.revisions)
    if plan.kind == MYSQL:
        return mysql_stage(plan.name, plan.job.mysql_options, env)
    if plan.kind == POSTGRESQL:
        return postgresql_stage(plan.name)
    if plan.kind == COMMAND:
        return Stage(("/bin/sh", "-c", plan.job.command), shell=True)
    with contextlib.suppress(Failure):
        names = expand_name(plan.name, env)
    options = exclude_options(plan.job, env)
    return tar_stage(names, options, run.diff_dir.diff_file(plan.name), shown=True)


def store_archive(run: Run, plan: Plan) -> Outcome:
    """Makes the archive, stores it, and brings DiffDir up to date. Raises Failure."""
    settings, options = run.settings, run.options
    _announce(run, plan)
    size_before = size_of_full_before(run, plan) if plan.mode == FULL else 0
    boot, before, warnings, draft = boot_clock(), "", list[str](), None
    with contextlib.ExitStack() as stack:
        if plan.kind not in DUMPS:
            draft = stack.enter_context(run.diff_dir.draft(plan.name, empty=plan.self_contained))
        if draft and plan.kind == DIRECTORY:
            source, before, warnings = _directory(run, plan, draft, boot)
        else:
            source = dump_stage(run, plan)
        began = Moment(options.clock()).utc_text()
        progress = stack.enter_context(options.progress(plan.archive))
        with _running(run, plan, source) as (pipeline, readinto):
            # All that UseTempFile stores is there already, and is judged before it is sent.
            state = None
            if plan.job.use_temp_file:
                state = _finish_draft(plan, draft, before, pipeline)
            with Upload(
                run.store, plan.archive, plan.existing_chunks,
                chunk_size=settings.chunk_size, parallel=settings.parallel, progress=progress,
                safe=settings.safe_replace, folder=settings.temp_dir, log=plan.log,
            ) as upload:
                for chunk in upload.chunks(readinto, pipeline.check):
                    upload.put(chunk)
                if state is None:
                    state = _finish_draft(plan, draft, before, pipeline)
                warnings += pipeline.finish()
                stored = upload.commit(_marks(run, plan, began, state, warnings))
            said = pipeline.results()[0].stderr_lines if plan.kind == COMMAND else ()
            for text in said[-_MAX_SAID:]:
                plan.log.info("%s", text)
        if draft:
            # Before: the archive is there, DiffDir still describes the one before it, and the next
            # DIFF repeats this one's changes. After: the next DIFF continues this one.
            identity = "" if plan.kind == DIRECTORY else (
                revision_identity(plan.name, plan.youngest, options.env)
            )
            run.diff_dir.commit(plan.name, Sidecar(
                state.partition(":")[2], run.place, (*plan.chain, stored.ref), plan.job.left_out,
                identity, boot,
            ))
            index = settings.diff_dir + index_file_name(run.place, plan.archive)
            draft.commit(index, stored.ref.upload)
    if stored.size * 10 < size_before:
        warnings.append(f"it has {size_text(stored.size)}, the full backup before it"
                        f" {size_text(size_before)}: is all of it there?")
    return _account(run, plan, stored, warnings)


@contextlib.contextmanager
def _running(run: Run, plan: Plan, source: Stage) -> Iterator[tuple[Pipeline, ReadInto]]:
    """What compresses and encrypts a source; and how to read what is to be stored: what it writes,
    or with UseTempFile the file in which all of that is."""
    settings, env = run.settings, run.options.env
    compressor = shlex.split(compressor_of(run, plan) or "") or [
        find_tool(CODECS[0].commands, env) or "gzip"
    ]
    stages = [source, Stage(tuple(compressor))]
    if settings.gpg_recipients:
        stages.append(gpg_stage(settings.gpg_recipients, settings.gpg_keyring))
    plan.log.debug("%s", " | ".join(map(str, stages)))
    if not plan.job.use_temp_file:
        watch = _patience(plan) if plan.kind in DUMPS else lambda seconds: None
        with Pipeline(stages, env) as pipeline, run.store.retries.watched(watch):
            yield pipeline, pipeline.readinto
        return
    with os_failures("write in TempDir"):
        # It has no name: no one else can open it, and whatever ends this run, nothing is left.
        file = tempfile.TemporaryFile(buffering=0, dir=settings.temp_dir)  # noqa: SIM115
    with file:
        plan.log.info("Using temp file in %s to buffer before streaming...", settings.temp_dir)
        with Pipeline(stages, env, output=file) as pipeline:
            pipeline.finish()
            file.seek(0)
            yield pipeline, file.readinto


def _finish_draft(plan: Plan, draft: Draft | None, before: str, pipeline: Pipeline) -> str:
    """Waits for the pipeline, and brings the draft up to date: the archive's `s3napback-state`.

    before: the draft's position. Raises Failure where the stream is not to be trusted, or the next
    backup could not continue it.
    """
    messages = pipeline.finish()
    if draft and plan.kind == DIRECTORY:
        return f"{before}:{draft.finish(messages, before)}"
    if draft:
        draft.write(f"{plan.youngest}\n")
    return "{}:{}".format(*plan.revisions) if draft else ""


def _marks(
    run: Run, plan: Plan, began: str, state: str, warnings: Sequence[str]
) -> dict[str, str]:
    """What the last chunk of an archive says of it."""
    marks = {
        "made": began, "status": "warnings" if warnings else "ok", "day": run.today.isoformat(),
        "host": run.options.host, "kind": plan.kind, "state": state,
        "prefix": urllib.parse.quote(run.settings.prefix),
    }
    return {META + name: text for name, text in marks.items() if text}


def _announce(run: Run, plan: Plan) -> None:
    """Says what is special about an archive before it is made."""
    if (
        plan.mode == FULL and len(plan.existing_chunks) > 1 and not run.settings.safe_replace
        and plan.job.cycle.keeps_several_fulls and not has_full(run, plan, besides=plan.archive)
    ):
        plan.log.warning(
            "%s is the last complete full backup of %s, and makes room now: if tonight's fails,"
            " there is none; SafeReplace On avoids that", plan.archive, plan.name,
        )
    if plan.notice:
        level, why = plan.notice
        plan.log.log(level, "%s: %s", plan.archive, why)
    if plan.foreign_host:
        plan.log.warning(
            "%s: it replaces an archive of the host %s; give each machine a Bucket of its own,"
            " or a Prefix", plan.archive, plan.foreign_host,
        )


def _directory(
    run: Run, plan: Plan, draft: Draft, boot: tuple[str, float]
) -> tuple[Stage, str, list[str]]:
    """(the command that reads a Directory, the position that the draft had, warnings).

    Makes the draft fit to it. Raises Failure where there is nothing, and was something: a file
    system that is not mounted is not to be stored.
    """
    env = run.options.env
    names = expand_name(plan.name, env)
    found = inspect_names(names, run.diff_dir.last_seen(plan.name))
    faults = found.faults
    if found.unknown and not faults and any(run.archives_of(plan)):
        faults = [f"directory {plan.name} is empty, and archives of it are in the bucket"]
    if faults and not run.options.force:
        raise Failure(faults[0], "mount it, or see who may read it; -f stores it as it is")
    for path in () if plan.self_contained else found.renumbered:
        plan.log.info("the device of %s has another number: everything that was there is stored"
                      " again", path)
    places = mounts_of(names, plan.job.one_file_system)
    set_back = plan.sidecar.clock_loss(boot) if plan.sidecar else 0.0
    before = draft.prepare(twins_in(places), set_back, found.changed)
    # Our own files: backups of backups grow without end.
    own, left_out = run.diff_dir.own_files(plan.name), list[str]()
    if root := folder_root(run.settings.s3_endpoint):
        own += bucket_folders(root, run.settings.bucket)
    for path in own:
        if within := names_within(names, path):
            plan.log.info("%s lies in %s, and is left out of the archive", path, plan.name)
            left_out += within
    stage = tar_stage(
        names, exclude_options(plan.job, env), draft.path, left_out=left_out,
        sparse=not any(mount.kind.startswith("fuse") for _, mount in places),
        listing=draft.index.begin(names),
    )
    tags = tags_among(names, plan.job)
    return stage, before, [*found.links, *found.warnings, *tags, *faults]


def _patience(plan: Plan) -> Callable[[float], None]:
    """Tells once that a database waits for too long; given the seconds of each wait."""
    told = threading.Event()

    def watch(seconds: float) -> None:
        if seconds > _PATIENCE_OF_SOURCES and not told.is_set():
            told.set()
            plan.log.warning(
                "%s waits meanwhile, and the database server may hang up on it:"
                " UseTempFile for this job avoids that", plan.name,
            )

    return watch


def _account(run: Run, plan: Plan, stored: UploadResult, warnings: Sequence[str]) -> Outcome:
    """Tells the warnings of an archive that is stored."""
    for warning in warnings:
        plan.log.warning("%s", warning)
    if warnings:
        plan.log.warning("%s:%s is stored, with the warnings above", run.settings.bucket,
                         plan.archive)
    is_foreign = bool(plan.foreign_host) and not run.options.force  # with it, it was meant
    is_warned = bool(warnings or is_foreign or not stored.old_chunks_removed
                     or (plan.notice and plan.notice[0] >= logging.WARNING))
    return plan.outcome("warnings" if is_warned else "ok", size=stored.size)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def run_config(config: Block, settings: Settings, options: RunOptions) -> RunReport:
    """Makes the backups that one config, of these settings, asks for now.

    Raises Failure for what keeps the whole config from running; a job that fails is logged and
    counted, and the others still run.
    """
    settings = with_further_keyring(settings, options.env)
    jobs = list(map(with_patterns_read, jobs_of(config)))
    unserved = not_backed_up(config, jobs)
    for warning in (*config_warnings(config), *unserved):
        log.warning("%s", warning)
    for recipient in settings.gpg_recipients:
        check_recipient(recipient, settings.gpg_keyring, options.env)
    if settings.compressor:
        check_compressor(settings.compressor, options.env)
    access = access_of(settings)
    if access.key and settings.s3_keyfile and others_can_read(settings.s3_keyfile):
        log.warning(
            "S3Keyfile %s can be read by others; run: chmod 600 %s",
            settings.s3_keyfile, shlex.quote(settings.s3_keyfile),
        )
    check_temp_dir(settings, jobs)
    if options.env.get("TAR_OPTIONS"):
        log.warning("TAR_OPTIONS is not used: the config says what tar is to do")
    diff_dir = DiffDir(settings.diff_dir, options.now)
    store = open_store(settings.bucket, access, options.clock, Retries(settings.retry_hours, log))
    place = bucket_place(settings.s3_endpoint, settings.bucket, settings.prefix)
    run = Run(settings, options, diff_dir, store, place)
    with contextlib.ExitStack() as stack:
        if not options.test:
            stack.enter_context(diff_dir.lock())
            diff_dir.clear()

        def work(refused: Failure | None) -> RunReport:
            if not refused:
                return run_jobs(run, jobs, EXIT_WARNINGS if unserved else EXIT_OK)
            if refused.status != EXIT_LOCKED:
                raise refused
            log.info("Skipping %s: %s", settings.path, refused)
            return RunReport(EXIT_OK, error=str(refused))

        lines = [hook for hook in settings.hooks if hook[0] != ON_FAILURE]  # see `run_watched`
        hooks = Hooks(lines, settings.path, options, settings.hook_timeout, log)
        return hooks.around(Outcome("", "", "", ""), work)


def check_temp_dir(settings: Settings, jobs: Sequence[Job]) -> None:
    """Raises Failure (status 2) where a job has no folder for its UseTempFile."""
    for job in jobs:
        if job.use_temp_file and not settings.temp_dir:
            raise UsageFailure("TempDir must be defined in order to UseTempFile.",
                               "add a line TempDir /path", where=job.where)
        if job.use_temp_file and not os.path.isdir(settings.temp_dir or ""):
            raise UsageFailure(f"TempDir {settings.temp_dir} does not exist", "create it",
                               where=settings.path)


def run_jobs(run: Run, jobs: Sequence[Job], least: int) -> RunReport:
    """All that is due now, in order, or in test mode what that would be. least: exit status."""
    started, bucket = time.monotonic(), run.settings.bucket
    # Planning first: a config that cannot be worked through stores nothing.
    plans = list(paired(run, [plan for job in jobs for plan in plans_of(run, job)]))
    log.info("Getting current contents of bucket %s modified on %s...", bucket, run.today)
    is_there = run.store.exists()
    if run.options.test:
        surveyed = survey_all(run, plans) if is_there else plans
    else:
        if not is_there and any(plan.is_due for plan in plans):
            log.info("Creating bucket %s", bucket)
            run.store.create()
        # A bucket that is not there any more, or for a moment, is looked at for what was in it.
        surveyed = finish_staged(run, survey_all(run, plans, is_new=not is_there))
    log.info("Buckets already done today:")
    for archive in sorted({plan.done for plan in surveyed if plan.done}):
        log.info("%s:%s", bucket, archive)
    doubles = [plan for plan in surveyed
               if plan.same_as and (plan.is_skipped or not plan.clash)]
    for plan in doubles:
        plan.log.warning("%s: the job at %s writes to the same archives; take one of them out",
                         plan.job.where, plan.same_as)
    reports: list[RunReport] = []
    for job, of_job in itertools.groupby(surveyed, key=lambda plan: plan.job):
        if job.is_block:
            log.info("%s => %s", job.kind.lower(), job.name)
        reports.append(run_job(run, job, list(of_job)))
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    seconds = time.monotonic() - started
    text, _ = summary(outcomes, seconds)
    log.info("Finished: %s", "test mode, nothing was done" if run.options.test else text)
    statuses = [one.status for one in reports] + [EXIT_WARNINGS if doubles else least]
    return RunReport(worst_status(statuses), tuple(outcomes), seconds=seconds)


def run_job(run: Run, job: Job, of_job: Sequence[Plan]) -> RunReport:
    """Makes the archives of a job, within its hooks where one of them is to be made really."""
    due = [plan for plan in of_job if not (plan.is_skipped or plan.failure or plan.clash
                                           or (plan.done and not run.options.force))]

    def work(refused: Failure | None) -> RunReport:
        now = [replace(plan, failure=refused) if refused and plan in due else plan
               for plan in of_job]
        if not refused and any(plan.waits for plan in of_job):
            plans = [*paired(run, plans_of(run, job, is_ready=True))]
            now = finish_staged(run, survey_all(run, plans))
        outcomes = [run_task(run, plan) for plan in now]
        seconds = sum(one.seconds for one in outcomes)
        return RunReport(summary(outcomes, seconds)[1], tuple(outcomes), seconds=seconds)

    lines = [hook for hook in job.hooks if due or hook[0] == ON_FAILURE]
    hooks = Hooks(lines, run.settings.path, run.options, run.settings.hook_timeout, _LOGS[job.kind])
    archives = "\n".join(plan.archive for plan in due)
    return hooks.around(Outcome(job.kind, job.name, archives, ""), work)


def run_task(run: Run, plan: Plan) -> Outcome:
    """Makes one archive, or tells why not. Whatever goes wrong, the other jobs still run."""
    started = time.monotonic()
    try:
        outcome = _make_or_skip(run, plan)
    except Exception as error:
        outcome = _fail(run, plan, error)
    outcome = replace(outcome, seconds=round(time.monotonic() - started, 3))
    if run.options.tells_jobs:
        plan.log.info("%s %s: %s", outcome.kind, outcome.name, outcome.status,
                           extra={"job": vars(outcome)})
    return outcome


def _make_or_skip(run: Run, plan: Plan) -> Outcome:
    path = f"{run.settings.bucket}:{plan.archive}"
    is_done = bool(plan.done) and not run.options.force
    if plan.failure:
        raise plan.failure
    if not plan.is_due:
        log.warning("Skipping %s %s", plan.kind, plan.name)
    elif plan.is_repeated and plan.kind == DIRECTORY:
        plan.log.warning("Skipping %s; diff was already performed today", plan.name)
    elif plan.is_repeated:
        plan.log.warning("Skipping %s -- was already backed up today", plan.name)
    elif plan.has_nothing_new:
        plan.log.info("%s has no new revisions since last backup; skipping", plan.name)
    else:
        if plan.job.kind == SUBVERSION_DIR and not plan.clash and not is_done:  # it may take hours
            verified = run_tool(("svnadmin", "verify", "-q", plan.name), run.options.env)
            verified.required(f"the repository {plan.name} does not verify")
        plan.log.info("%s %s -> %s", plan.kind, stored_name(plan.kind, plan.name), path)
        if plan.clash:
            raise Failure(f"the job at {plan.clash} writes to the same archive",
                          "give one of them another name or timing", where=plan.job.where)
        if not is_done:
            return print_commands(run, plan) if run.options.test else store_archive(run, plan)
        plan.log.warning("Skipping %s -- already done today", path)
    return plan.outcome("skipped")


def _fail(run: Run, plan: Plan, error: Exception) -> Outcome:
    where = f"{run.settings.bucket}:{plan.archive}" if plan.archive else plan.name
    if isinstance(error, OSError):
        error = os_failure(error, "go on")
    text = str(error)
    if isinstance(error, Failure) and error.status == EXIT_LOCKED:  # as RunBefore wants it
        plan.log.info("Skipping %s %s: %s", plan.kind, plan.name, text)
        return plan.outcome("skipped", text)
    if isinstance(error, Failure):
        plan.log.error("Backup to %s failed: %s", where, text)
    else:
        text = f"{type(error).__name__}: {error}"
        plan.log.error("Backup to %s failed, by a fault of this program: %s", where, text,
                       exc_info=error)
    if plan.mode == FULL and plan.existing_chunks:  # gone if the upload failed half-way
        with run.store.retries.once():
            is_lost = not has_full(run, plan)
        if is_lost:
            plan.log.error(
                "No complete full backup of %s is left in the bucket: run this again, with -f,"
                " as soon as the cause is gone; SafeReplace On keeps the old one till then",
                plan.name,
            )
    return plan.outcome("failed", text)


def summary(outcomes: Sequence[Outcome], seconds: float) -> tuple[str, int]:
    """(what the closing line says, the exit status) of a run that took so long."""
    statuses = [one.status for one in outcomes]
    warned = statuses.count("warnings")
    size = sum(one.bytes for one in outcomes)
    text = (
        f"{statuses.count('ok') + warned} stored{f' ({warned} with warnings)' if warned else ''},"
        f" {statuses.count('skipped')} skipped, {statuses.count('failed')} failed;"
        f" {size_text(size)} in {duration_text(seconds)}"
    )
    if "failed" in statuses:
        return text, EXIT_FAILED
    return text, EXIT_WARNINGS if warned else EXIT_OK


# ==================================================================================================
# 15. Recovery
# ==================================================================================================


@dataclass(frozen=True)
class Recovery:
    """What the recovery commands work with.

    store: where the archives are; parallel: connections to it.
    endpoint: of another service than Amazon's.
    env: of the tools; gpg: how to call it.
    prefix: the config's, "" for all that there are.
    temp_dir: for large chunks on their way.
    own: folders that backups leave out, and no restore may take away.
    progress: told the bytes of each chunk.
    diff_dir: where indexes of archives are, "" for nowhere; place: the bucket, by which they are
    named.
    jobs: the config's.
    retry_hours: how long the reading of contents is tried again; all else three times.
    """

    store: Store
    parallel: int
    endpoint: str | None
    env: Mapping[str, str]
    gpg: tuple[str, ...]
    prefix: str
    temp_dir: str | None
    own: tuple[str, ...]
    progress: Callable[[int], None] = lambda size: None
    diff_dir: str = ""
    place: str = ""
    jobs: Sequence[Job] = ()
    retry_hours: float = RETRY_HOURS

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds of the jobs, by names as `parse_archive_name` gives them; without those whose
        archives' names tell it."""
        return {f"/{job.name.removeprefix('/')}" if self.prefix else job.name: job.kind
                for job in self.jobs if job.kind not in DUMPS}

    @contextlib.contextmanager
    def content(
        self, one: CatalogEntry, *, to_the_end: bool = True
    ) -> Iterator[Iterator[Piece]]:
        """What was backed up, within the block; leaving that ends the download. to_the_end: see
        `download`."""
        with (
            failures_at(one.archive.name), self.store.retries.lasting(self.retry_hours),
            contextlib.ExitStack() as stack,
        ):
            blocks: Iterator[Piece] = stack.enter_context(contextlib.closing(download(
                one.archive, self.store, self.parallel, self.progress, self.temp_dir,
                to_the_end=to_the_end)))
            if one.kind != STREAM:
                blocks = stack.enter_context(decoded(blocks, self.env, self.gpg))
            yield blocks


@contextlib.contextmanager
def decryption(
    env: dict[str, str], secret_key: str | None, passphrase_file: str | None, *, terminal: bool
) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """(environment, command) with which gpg finds the secret key and its passphrase, within the
    block. terminal: there is one where it can be asked for."""
    gpg = ["gpg"]  # not -q: what it says of keys is wanted when it fails
    if passphrase_file is not None:
        if not os.access(passphrase_file, os.R_OK):
            raise UsageFailure(f"cannot read --passphrase-file {passphrase_file}")
        gpg += ["--batch", "--pinentry-mode", "loopback", "--passphrase-file", passphrase_file]
    elif not terminal:
        gpg.append("--batch")
    if secret_key is None:
        yield env, tuple(gpg)
        return
    # A short path, for the agent's socket, where that may be written.
    place = "/tmp" if os.access("/tmp", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="s3nap-", dir=place) as home:
        env = {**env, "GNUPGHOME": home}
        try:
            done = run_tool((*gpg, "--batch", "--import", secret_key), env)
            done.required(f"cannot import --secret-key {secret_key}")
            yield env, tuple(gpg)
        finally:
            run_tool(("gpgconf", "--kill", "all"), env)


# --------------------------------------------------------------------------------------------------
# Catalogue
# --------------------------------------------------------------------------------------------------

# Archives that the catalogue asks about at the same time.
_CATALOGUE_PARALLEL = 8


def catalogue(
    store: Store, start: str = "", *, prefix: str = "", look_inside: bool = False,
    head: Head | None = None,
) -> Iterator[CatalogEntry]:
    """Every archive of a bucket whose name begins so, by key.

    prefix: only those of that Prefix; "" for those of every one. look_inside: also whether it is
    encrypted. head: tells the marks in the store's place. One listing, and one or two requests for
    each archive, some at a time; memory holds the chunks of those few archives.
    """

    def look(name: str, objects: list[StoredObject]) -> CatalogEntry | None:
        archive = resolve_archive(name, objects, head or store.head)
        one = _entry_of(archive, prefix, len(objects) - archive.count) if archive else None
        if not one or not look_inside or _FROZEN.intersection(one.archive.storage_classes):
            return one
        try:
            return replace(one, encrypted=is_openpgp(store.peek(one.archive.chunks[0].key, 32)))
        except Failure as failure:
            if failure.code != "InvalidObjectState":  # an archive tier: no listing tells it
                raise
            return one

    with workers(store, _CATALOGUE_PARALLEL, "catalogue") as pool:
        running: deque[Future[CatalogEntry | None]] = deque()
        start = start or (f"{prefix}/" if prefix else "")
        for name, group in groupby_archive(store.iter_objects(start)):
            if not parse_archive_name(name, shown_prefix(name)):
                # Numbers that js3tream writes: of other keys that end in one nothing is known.
                group = [item for item in group if parse_chunk_key(item.key)
                         and len(item.key.rpartition(":")[2]) in (CHUNK_DIGITS, MAX_DIGITS)]
            if group:
                running.append(pool.submit(look, name, group))
            if len(running) > _CATALOGUE_PARALLEL and (one := running.popleft().result()):
                yield one
        while running:
            if one := running.popleft().result():
                yield one


def _entry_of(archive: Archive, prefix: str, leftovers: int) -> CatalogEntry | None:
    """An archive with what its name and its marks tell, None where it is of another Prefix."""
    name, marks, own = archive.name, archive.metadata, shown_prefix(archive.name)
    if "kind" in marks:
        own = urllib.parse.unquote(marks.get("prefix", ""))
    elif name.startswith(f"{prefix}/"):  # its marks are lost: it is believed to have this one
        own = prefix
    parts = parse_archive_name(name, own)
    if parts is None and not prefix:
        own, parts = "", (STREAM, name, 0, FULL)
    if parts is None or (prefix and own != prefix):
        return None
    kind, source, slot, mode = parts
    # Where the name tells the kind, nothing else is asked.
    if kind is None and marks.get("kind") in (DIRECTORY, SUBVERSION):
        kind = marks["kind"]
    return CatalogEntry(archive, kind, source, slot, mode, own, leftovers)


# --------------------------------------------------------------------------------------------------
# Sources and moments
# --------------------------------------------------------------------------------------------------


def parse_when(text: str, moment: Moment) -> float:
    """Epoch seconds of a moment as people write it, on the local clock of that time unless it names
    a zone.

    "now", "today", "yesterday", "3 days ago", "5 hours ago", "2026-11-20" (to its end),
    "2026-11-20 03:00" (to the end of that minute). Raises Failure (status 2) for another.
    """
    with library("python-dateutil"):
        from dateutil import parser
    words = text.strip().lower()
    wall = moment.local().replace(tzinfo=None, fold=0)
    end_of_day = wall.replace(hour=23, minute=59, second=59, microsecond=999999)
    try:
        if words == "now":
            return moment.epoch
        if ago := re.fullmatch(r"(\d{1,6}) (minute|hour|day|week)s? ago", words):
            back = timedelta(**{f"{ago[2]}s": int(ago[1])})
            if ago[2] in ("minute", "hour"):
                return moment.epoch - back.total_seconds()
            # days have 23 hours, or 25, where the clock is changed
            return moment.epoch_of(wall - back)
        if words in ("today", "yesterday"):
            return moment.epoch_of(end_of_day - timedelta(days=words == "yesterday"))
        with catch_warnings():
            # Of a zone that it does not know dateutil only warns, and takes local time.
            simplefilter("error", parser.UnknownTimezoneWarning)
            at = parser.parse(text, default=end_of_day)
            others: list[dict[str, Any]] = []
            if not re.fullmatch(r"\d\d?(:\d\d){1,2}", words):
                # Of "Sunday" (the next one, to dateutil) or 2026-10 today would tell the rest.
                others = [{"default": end_of_day.replace(
                    year=wall.year - 1, month=1 + wall.month % 2, day=1 + wall.day % 2)}]
            if not re.match(r"\d{4}", words):
                # 11.12.2026 has its month first for some, its day for others, 26-11-20 its year.
                others += [{"dayfirst": True}, {"yearfirst": True}]
            if any(parser.parse(text, **{"default": end_of_day, **how}) != at for how in others):
                raise ValueError
        return at.timestamp() if at.tzinfo else moment.epoch_of(at)
    except (ValueError, ArithmeticError, TypeError, parser.UnknownTimezoneWarning) as error:
        raise UsageFailure(f"cannot read the moment {text!r}",
                           'write "2026-11-20 03:00", or "3 days ago"') from error


class Source(NamedTuple):
    """What was backed up. kind: "" where nothing tells a directory from a repository; name: as
    archives have it, without the Prefix."""

    kind: str
    name: str
    prefix: str


def group_by_source(
    found: Iterable[CatalogEntry], kinds: Mapping[str, str]
) -> dict[Source, list[CatalogEntry]]:
    """The archives of each source. kinds: names in the config → their kind."""
    sources: dict[Source, list[CatalogEntry]] = {}
    for one in found:
        kind = one.kind
        if kind is None:
            kind = kinds.get(one.name, SUBVERSION_DIR)
            if kind == SUBVERSION_DIR:  # whose archives are those of the repositories in it
                above = kinds.get(os.path.dirname(one.name))
                kind = SUBVERSION if above == SUBVERSION_DIR else ""
        sources.setdefault(Source(kind, one.name, one.prefix), []).append(one)
    # An unmarked archive beside marked ones of its name is of their kind.
    for source in [source for source in sources if not source.kind]:
        for known in (source._replace(kind=kind) for kind in (DIRECTORY, SUBVERSION)):
            if known in sources and source in sources:
                sources[known] += sources.pop(source)
    return sources


def meant_by(
    recovery: Recovery, given: str, *, look_inside: bool = False
) -> tuple[CatalogEntry | None, dict[Source, list[CatalogEntry]]]:
    """(the archive, if it is that of one, the sources) that a NAME of the command line means, as
    archives have it, or as configs do; with its Prefix or without it.

    An archive's own name comes first; then the sources that are nearest to what was typed, see
    `starts_meant`. Beside an archive stands its whole source. look_inside: see `catalogue`.
    """
    given, prefix, kinds = key_text(given), recovery.prefix, recovery.kinds
    names = [f"{prefix}/{given.removeprefix('/')}"] if prefix else [given]
    if prefix and given.startswith(f"{prefix}/"):
        names.insert(0, given)

    def listed(start: str) -> Iterator[CatalogEntry]:
        return catalogue(recovery.store, start, prefix=prefix, look_inside=look_inside)

    exact = [one for name in names for one in listed(f"{name}:") if str(one) == name]
    named, starts = next(iter(exact), None), starts_meant(given, prefix)
    if named and named.kind == STREAM:
        return named, group_by_source([named], kinds)
    if named:
        starts = {archive_start(named.kind or DIRECTORY, named.name, named.prefix): 0}
    found = {str(one): one for start in starts for one in listed(start)}
    sources = group_by_source(found.values(), kinds)
    far = {source: starts[start] for source in sources
           if (start := archive_start(*source)) in starts}
    nearest = min(far.values(), default=0)
    return named, {
        source: sources[source] for source, distance in far.items()
        if distance == nearest and (named is None or str(named) in map(str, sources[source]))
    }


def nothing_found(recovery: Recovery, names: Sequence[str]) -> Failure:
    what = f"there is no backup of {names[0]}" if names else "there are no archives"
    where = f" with the Prefix {recovery.prefix}" if recovery.prefix else ""
    return Failure(f"{what}{where} in {recovery.store.bucket}",
                   "see what there is: s3napback.py list")


def find_chain(
    recovery: Recovery, given: str, at: float, moment: Moment, *, partial: bool
) -> tuple[str, Chain]:
    """(kind, chain) of what a NAME means, as of a moment: of a source, or one archive by its name.

    partial: less than was asked for will do.
    """
    named, sources = meant_by(recovery, given)
    if not sources:
        raise nothing_found(recovery, [given])
    if len(sources) > 1:
        kinds = " and ".join(sorted(f"{one.kind or 'the source'} {one.name}" for one in sources))
        raise Failure(f"{given} may be {kinds}", "write it as list shows it, or name one archive")
    ((source, of_source),) = sources.items()
    if named:
        if math.isfinite(at):
            raise UsageFailure(f"{named} is one archive: --at chooses among those of a source",
                               "leave --at out, or name the source")
        if named.fault and not partial:
            raise Failure(f"{named} cannot be used: {named.fault}",
                          "--force-partial gives what is left of it")
        return source.kind, Chain((named,), math.floor(named.made), lacking=named.fault)
    for doubt in date_doubts(of_source, moment):
        _TOOL_LOG.warning("in doubt: %s", doubt)
    try:
        return source.kind, choose_chain(of_source, at, moment)
    except Failure as failure:
        return source.kind, _chain_after(failure, recovery, of_source, at, moment, partial)


def _chain_after(
    failure: Failure, recovery: Recovery, found: Sequence[CatalogEntry], at: float,
    moment: Moment, partial: bool,
) -> Chain:
    """What can be restored where the chain that is wanted is not whole. If the source begins with a
    DIFF, that is read to see whether it holds everything. Raises the failure where nothing can."""
    hint = lacking = ""
    if first := begun_with(found):
        try:
            if file := missing_file(recovery, first):
                lacking = f"{first} does not hold {file}"
                hint = (f"{lacking}, which was excluded then, or is in an archive that is gone;"
                        " --force-partial does without")
        except Failure as fault:
            hint = (f"{first} may hold everything, but cannot be read:"
                    f" {str(fault).removeprefix(f'{first}: ')}")
        if not hint or (lacking and partial):
            begun = [replace(one, holds_all=True) if one is first else one for one in found]
            with contextlib.suppress(Failure):
                return replace(choose_chain(begun, at, moment), lacking=lacking)
    good = [m for m in History(found).restorable() if m <= at]
    if not partial or not good:
        raise failure.at(hint=hint) from failure
    lacking = f"as of {_moment_text(moment, good[-1])}, the last good moment"
    return replace(choose_chain(found, good[-1]), lacking=lacking)


def missing_file(recovery: Recovery, one: CatalogEntry) -> str:
    """The first file that a directory's archive lists and does not hold, "" for none: GNU tar marks
    such with an N (its manual, "Dumpdir"): what was excluded, or is in an earlier archive."""
    with recovery.content(one) as stream:
        start, content = split_head(stream)
        if start.startswith(SVN_DUMP):
            return "its first revisions"
        rest, lacking = b"", b""
        listing = Stage(("tar", "-t", "-vv", "--incremental", "-f", "-"))
        with run_filter(listing, content, recovery.env) as blocks:
            for block in blocks:
                *lines, rest = (rest + block).split(b"\n")
                lacking = lacking or next((x[2:] for x in lines if x.startswith(b"N ")), b"")
    return os.fsdecode(lacking)


def require_thawed(
    recovery: Recovery, archives: Iterable[CatalogEntry], tier: str = "", days: int = 0
) -> None:
    """Raises Failure where objects of archives are frozen; with status 75 if they were asked for,
    by the retrieval option `tier` ("": they are not) for so many days."""
    store = recovery.store
    cold = [item for one in archives for item in one.archive.chunks
            if item.storage_class in {*_FROZEN, "INTELLIGENT_TIERING"}]
    if not cold or not isinstance(store, S3Store):
        return
    with workers(store, recovery.parallel, "thaw") as pool:
        states = zip(cold, pool.map(store.frozen_in, cold), strict=True)
        frozen = {item: state for item, state in states if state[0]}
        if not frozen:
            return
        places = sorted({place for place, _ in frozen.values()})
        text = (f"{len(frozen)} objects, {size_text(sum(item.size for item in frozen))}, are"
                f" frozen in {' and '.join(places)}")
        if not tier:
            raise Failure(text, "restore --thaw asks for them")
        times = sorted({THAW_TIMES[tier][place.startswith("DEEP")] for place in places})
        if "" in times:
            raise UsageFailure(f"{text}, from where nothing comes by --tier {tier}",
                               "use Standard or Bulk")
        new = [item for item, (_, asked) in frozen.items() if not asked]
        list(pool.map(lambda item: store.thaw(item, tier, days), new))
    raise Failure(f"{text}: {len(new)} were asked for now, which usually takes"
                  f" {' or '.join(times)}, {len(frozen) - len(new)} before",
                  "the same call restores once they are there", status=EXIT_LOCKED)


# --------------------------------------------------------------------------------------------------
# Tar streams
# --------------------------------------------------------------------------------------------------

# The archives of a directory's chain are unpacked one upon the other in a private folder, and moved
# to their place when all of them are good. tar itself would unpack the second into what the first
# has left, and so through its links to anywhere (CVE-2025-45582, tar up to 1.35); it fails on many
# renames, which it stores well; and it cannot tell what of a part is gone. So of each archive:
#
# 1. `TarStream` hands the wanted members on to tar, and ends when all of them have come. `Layer`
#    takes down on the way what the archive tells: what was given to tar by name, the names in each
#    directory (its dumpdir), renames.
# 2. tar unpacks that: the first archive into the private tree, a later one into an empty folder.
# 3. In the tree, `Unpacker` renames what was renamed, and takes away what is no longer named.
# 4. `Merger` moves the new folder into the tree, entry by entry, opening each folder by its handle.
#
# At the end the tree is merged into its place in the same way, which until then has not changed. It
# takes room for all that is restored beside what it replaces.

# Bytes: tar's block, and the largest header of it that is read (the names in a folder of millions).
_TAR_BLOCK = 512

_MAX_TAR_HEADER = 1 << 28

# Most extended headers have none of these: only times.
_PAX_OF_INTEREST = re.compile(rb" (?:path|linkpath|size|GNU\.[a-z.]+)=")


def parse_dumpdir(data: bytes) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """(name → Y, N or D of a directory's entries, renames of directories as (from, to)).

    GNU tar manual, "Dumpdir": Y is in the archive, N is not, D is a directory.
    """
    names: dict[str, str] = {}
    renames: list[tuple[str, str]] = []
    source = ""
    for entry in os.fsdecode(data).split("\0"):
        kind, name = entry[:1], entry[1:]
        if kind in ("Y", "N", "D"):
            names[name] = kind
        elif kind in ("R", "X"):
            source = name
        elif kind == "T":
            renames.append((source, name))
    return names, renames


def ways_to(path: str) -> Iterator[str]:
    """The folders that lead to a path, the outermost first, and itself."""
    return itertools.accumulate(path.split("/"), "{}/{}".format)


class NeedsMore(Exception):
    """What is wanted of a directory is not told by what was read: it needs the archives in their
    order, or all of what they hold."""


class Layer:
    """What one archive of a chain tells, gathered while it passes into tar.

    tops: directories that were given to tar by name; files: other members that were; names: those
    that tar was given, None where the archive does not tell; renames: of directories; gone: paths
    that the directory above them no longer names; lacking: members to which hard links lead in
    vain.
    """

    def __init__(
        self, paths: Sequence[str], extra: set[str], dumpdirs: IO[bytes] | None = None, *,
        alone: bool = False,
    ) -> None:
        """paths: what is wanted, () for all; extra: further members, to which hard links lead;
        dumpdirs: an unnamed file for them, None for the first archive, of which none is needed;
        alone: raise NeedsMore where that archive does not tell all of the paths."""
        self.paths, self._dumpdirs, self._alone = paths, dumpdirs, alone
        self._wanted, self._folders = {*paths, *extra}, tuple(f"{path}/" for path in paths)
        self._above = {""}  # the folders that have one of the paths in them
        for path in paths:
            self._above.update(ways_to(os.path.dirname(path)))
        self._places: dict[str, tuple[int, int]] = {}  # directory → its dumpdir in the file
        # Last names of paths that a file to be noted is at, and of those that it is in or at.
        self._ends = {os.fsencode(os.path.basename(path)) for path in self._above} | {b""}
        self._last_names = {os.fsencode(os.path.basename(path)) for path in self._wanted}
        self._untold, self._awaited = set(paths), set[str]()
        self._last: str | None = None  # a directory that is one of `tops`, or below one
        self.tops, self.files = set[str](), set[str]()
        self.names: set[str] | None = None
        self.renames: list[tuple[str, str]] = []
        self.gone, self.lacking = set[str](), set[str]()

    @property
    def is_plain(self) -> bool:
        """Whether nothing is left to be gathered: all is wanted, and `names` says the rest."""
        return not self.paths and self._dumpdirs is None and self.names is not None

    @property
    def is_done(self) -> bool:
        """Whether all that is wanted has come: dumpdirs told what that is, and each came."""
        return bool(self.paths) and not self._untold and not self._awaited

    @property
    def is_choosy(self) -> bool:
        """Whether files that are not wanted need not be noted: what was given to tar is told."""
        return bool(self.paths) and self.names is not None

    def is_foreign(self, name: bytes) -> bool:
        """Whether the name of a file alone tells that it need not be noted; quick."""
        parts = name.split(b"/")
        return parts[-1] not in self._ends and self._last_names.isdisjoint(parts)

    def wants(self, path: str) -> bool:
        """Whether a member is to be unpacked."""
        return not self.paths or path in self._wanted or path.startswith(self._folders)

    def note(self, path: str, dumpdir: bytes | None, *, folder: bool, link: str | None) -> bool:
        """Takes down a member; whether it is wanted. link: where a hard link leads."""
        above = path.rpartition("/")[0]
        if above != self._last and not is_within(path, self.tops):
            (self.tops if folder else self.files).add(path)
        elif not folder:
            self._last = above  # the next one is most likely in the same directory
        wanted = self.wants(path)
        below: list[str] = []
        if path in self._above:
            below = [p for p in self.paths if p != path and is_within(p, {path})]
        self._awaited.discard(path)
        if not folder:
            self.gone.update(below)
        elif dumpdir and (wanted or below or b"\0T" in dumpdir):  # renames may be of any directory
            self._note_folder(path, dumpdir, wanted, below)
        if wanted and link is not None and not self.wants(link):
            self.lacking.add(link)
        return wanted

    def _note_folder(self, path: str, dumpdir: bytes, wanted: bool, below: Sequence[str]) -> None:
        names, renames = parse_dumpdir(dumpdir)
        self.renames += renames
        if self._alone and (wanted or renames):
            raise NeedsMore
        start = f"{path}/" if path else ""
        for wanted_below in below:
            inner = start + wanted_below[len(start) :].partition("/")[0]
            kind = names.get(inner[len(start) :])
            if kind is None:
                self.gone.add(wanted_below)
            elif kind != "N":  # what takes the place of a folder may have been unreadable
                self._awaited.add(inner)
            if inner == wanted_below or kind != "D":
                self._untold.discard(wanted_below)
        if not wanted:
            return
        if self._dumpdirs is not None:
            self._places[path] = (self._dumpdirs.tell(), len(dumpdir))
            self._dumpdirs.write(dumpdir)
        if self.paths:
            self._untold.discard(path)
            self._awaited.update(start + name for name, kind in names.items() if kind != "N")

    def note_names(self, comment: bytes) -> None:
        """Takes down which names tar was given; see `ASKED_FOR`."""
        if comment.startswith(ASKED_FOR.encode()):
            with contextlib.suppress(ValueError):
                names = base64.b64decode(comment[len(ASKED_FOR) :]).split(b"\0")
                self.names = {path for path in map(member_path, names) if path is not None}

    def names_in(self, path: str) -> set[str] | None:
        """The names in a directory, None where they are not told."""
        if self._dumpdirs is None or path not in self._places:
            return None
        place, size = self._places[path]
        self._dumpdirs.seek(place)
        return set(parse_dumpdir(self._dumpdirs.read(size))[0])


class Given:
    """What tar was given by name, up to an archive of a chain: `tops`, `files` as in `Layer`."""

    def __init__(self) -> None:
        self.tops, self.files = set[str](), set[str]()

    def add(self, layer: Layer) -> set[str]:
        """Takes the next archive in; the paths that it takes away, since they are not given to tar
        any more, nor is anything else in them.

        A file that was given is not in an archive if it has not changed, nor is a directory that
        could not be read. Where the archive does not tell the names, only such files are kept.
        """
        given = self.tops | self.files
        kept = self.files if layer.names is None else given & layer.names
        gone = {path for path in given - kept - layer.files if not is_within(path, layer.tops)}
        self.tops = layer.tops | (self.tops & kept)
        self.files = (self.files | layer.files) - gone
        left = {way for path in self.tops | self.files for way in ways_to(path)} if gone else ()
        return {next((way for way in ways_to(path) if way not in left), path) for path in gone}


def rename_origins(
    renames: Sequence[tuple[str, str]], is_there: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """(where it was before all, its new path) of directories that an archive says are renamed.
    is_there: whether there was a directory of that path before."""
    pairs: list[tuple[str, str]] = []
    aside = ""
    for given in renames:
        source, target = (member_path(os.fsencode(name)) for name in given)
        if not target:  # "": aside, so that two can change their names
            aside = source or ""
        elif source is not None:
            pairs.append((source or aside, target))
    found = []
    for source, target in pairs:
        origin, known = source, is_there(source)
        for before, after in pairs:  # else named by the new name of a folder above it
            if not known and source != after and is_within(source, {after}):
                origin = before + source[len(after) :]
        found.append((origin, target))
    return found


def tar_number(text: bytes) -> int:
    """A number of a tar header: octal, or GNU's base 256; below 0 if it is none."""
    if text[:1] >= b"\x80":
        return int.from_bytes(text, "big") & ~(0x80 << 8 * (len(text) - 1))
    try:
        return int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def is_tar_header(block: bytes) -> bool:
    """Whether a block is the header of a member: the sum of its bytes tells, its own field blank.

    The lower half of Adler-32 is one more than the sum of all, modulo 65521 (RFC 1950), and takes a
    twentieth of the time of `sum`.
    """
    own = block[148:156]
    seen = (zlib.adler32(block) & 0xFFFF) - (zlib.adler32(own) & 0xFFFF) + 8 * ord(" ")
    return len(block) == _TAR_BLOCK and seen % 65521 == tar_number(own) % 65521


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """keyword → value of an extended header (POSIX pax(1), "pax Extended Header")."""
    found: dict[bytes, bytes] = {}
    at = 0
    while (blank := data.find(b" ", at, at + 20)) > 0 and data[at:blank].isdigit():
        end = at + int(data[at:blank])
        keyword, _, found_value = data[blank + 1 : end - 1].partition(b"=")
        found[keyword] = found_value
        if end <= blank:
            break
        at = end
    return found


def member_path(name: bytes) -> str | None:
    """A member's name as a path below the folder; None where `..` leads out of it."""
    if name[:1] not in b"./" and b"/." not in name and b"//" not in name:  # most, and faster
        return os.fsdecode(name.rstrip(b"/"))
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return None if b".." in parts else os.fsdecode(b"/".join(parts))


class TarStream:
    """An archive's content on its way to tar: the members that are wanted, as they are.

    layer: takes down what each member tells; once all that is wanted has come, the stream ends.
    From a block on that should be a header and is none (the end, or damage) everything is handed
    on: what is wrong with it, tar says. Of a million members a microsecond each is felt.
    """

    def __init__(self, blocks: Iterable[Piece], layer: Layer) -> None:
        self._blocks, self._layer = iter(blocks), layer
        self._block, self._at = b"", 0
        self._headers: list[bytes] = []

    def __iter__(self) -> Iterator[Piece]:
        out = bytearray()  # tar is not to be written to for each header
        while not self._layer.is_plain:
            if self._layer.is_choosy:
                self._pass_over()
            if (member := self._member()) is None:
                break
            size, wanted = member
            if wanted:
                out += b"".join(self._headers)
            self._headers.clear()
            for piece in self._pieces(-(-size // _TAR_BLOCK) * _TAR_BLOCK):
                if wanted:
                    out += piece
                if len(out) >= _BLOCK:
                    yield memoryview(out)
                    out = bytearray()
            if self._layer.is_done:
                yield bytes(out) + bytes(2 * _TAR_BLOCK)  # the end of an archive (tar(5))
                return
        yield bytes(out) + b"".join(self._headers)
        yield self._block[self._at :]
        yield from self._blocks

    def _pass_over(self) -> None:
        """Goes to the next member that may have to be noted, or is no plain file, or whose headers
        are not as usual, or not all in the block at hand. Nearly all members are passed over so
        where one file is wanted: it takes a third of the time of `_member`."""
        while True:
            block, at = self._block, self._at
            try:
                if block[at + 156 : at + 157] == b"x":
                    size = int(block[at + 124 : at + 135], 8)
                    at += _TAR_BLOCK
                    if _PAX_OF_INTEREST.search(block, at, at + size):
                        return
                    at += -(-size // _TAR_BLOCK) * _TAR_BLOCK
                header = block[at : at + _TAR_BLOCK]
                end = at + _TAR_BLOCK + -(-int(header[124:135], 8) // _TAR_BLOCK) * _TAR_BLOCK
            except ValueError:
                return
            if (header[156:157] != b"0" or header[257:265] != b"ustar\x0000" or header[345]
                    or end <= self._at
                    or not self._layer.is_foreign(header[:100].partition(b"\0")[0])):
                return
            if end <= len(block):
                self._at = end
            else:
                for _ in self._pieces(end - self._at):
                    pass

    def _member(self) -> tuple[int, bool] | None:
        """(bytes of its data, whether it is wanted) of the next member; None at the end."""
        fields: dict[bytes, bytes] = {}
        while is_tar_header(header := self._take(_TAR_BLOCK)) and (
            size := tar_number(header[124:136])
        ) >= 0:
            kind = header[156:157]
            if kind not in (b"x", b"g", b"L", b"K", b"D"):
                break
            if size > _MAX_TAR_HEADER:
                raise Failure(f"a header of {size_text(size)}: not an archive of a directory")
            data = self._take(-(-size // _TAR_BLOCK) * _TAR_BLOCK)[:size]
            if kind == b"D":
                fields[b"GNU.dumpdir"] = data
                size = 0
                break
            if kind in (b"L", b"K"):
                fields[b"path" if kind == b"L" else b"linkpath"] = data.rstrip(b"\0")
            elif kind == b"g":
                self._layer.note_names(pax_records(data).get(b"comment", b""))
            elif _PAX_OF_INTEREST.search(data):
                fields.update(pax_records(data))
        else:
            return None
        if kind == b"1":
            size = 0
        elif fields.get(b"size", b"").isdigit():
            size = int(fields[b"size"])
        return size, self._is_wanted(header, fields)

    def _is_wanted(self, header: bytes, fields: Mapping[bytes, bytes]) -> bool:
        """Has a member taken down. fields: what its extended headers say."""
        kind = header[156:157]
        name = header[:100].partition(b"\0")[0]
        if header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        name = fields.get(b"GNU.sparse.name", fields.get(b"path", name))
        path = member_path(name)
        if path is None:
            return not self._layer.paths  # tar knows how to deal with ".."
        link = None
        if kind == b"1":
            link = member_path(fields.get(b"linkpath", header[157:257].partition(b"\0")[0]))
        return self._layer.note(path, fields.get(b"GNU.dumpdir"), link=link,
                                folder=kind in (b"5", b"D") or name.endswith(b"/"))

    def _take(self, size: int) -> bytes:
        """So many bytes of headers, fewer at the end of the stream."""
        taken = b"".join(self._pieces(size))
        self._headers.append(taken)
        return taken

    def _pieces(self, size: int) -> Iterable[bytes]:
        """So many bytes; nearly always they are in the block that is at hand."""
        end = self._at + size
        if end > len(self._block):
            return self._pieces_of_more(size)
        piece = self._block[self._at : end]
        self._at = end
        return (piece,)

    def _pieces_of_more(self, size: int) -> Iterator[bytes]:
        while size > 0:
            if self._at == len(self._block):
                # Its memory is used again for the next one.
                self._block, self._at = bytes(next(self._blocks, b"")), 0
                if not self._block:
                    return
            piece = self._block[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece


# --------------------------------------------------------------------------------------------------
# Folders that are held open
# --------------------------------------------------------------------------------------------------


class Tree:
    """A folder and all that is below it, opened name by name, so that links lead nowhere.

    A folder that its owner may not use is unlocked; modes: of those, before; `lock` gives them
    back.
    """

    def __init__(self, top: str) -> None:
        self.top = top
        self.modes: dict[str, int] = {}

    @contextlib.contextmanager
    def opened(self, path: str, *, make: bool = False, follow: bool = False
               ) -> Iterator[int | None]:
        """The folder of a path, open; None where it is none.

        make: makes those that are not there; follow: goes through symbolic links below the top.
        """
        handle: int | None = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY)
        done = ""
        for name in path.split("/") if path else ():
            done = f"{done}/{name}" if done else name
            if handle is not None:
                handle = self._step(handle, name, done, make, follow)
        try:
            yield handle
        finally:
            if handle is not None:
                os.close(handle)

    def _step(self, above: int, name: str, path: str, make: bool, follow: bool) -> int | None:
        """A folder in an open one, which is closed; it is open, and its owner may write in it."""
        flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        try:
            if make and not mode_of(name, above):
                os.mkdir(name, dir_fd=above)
            try:
                handle = os.open(name, flags, dir_fd=above)
            except PermissionError:
                mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    raise
                os.chmod(name, 0o700, dir_fd=above)
                self.modes.setdefault(path, stat.S_IMODE(mode))
                return os.open(name, flags, dir_fd=above)
        except (FileNotFoundError, NotADirectoryError):
            return None
        finally:
            os.close(above)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        if mode & 0o300 != 0o300 and not os.access(
            ".", os.W_OK | os.X_OK, dir_fd=handle, effective_ids=True
        ):
            os.fchmod(handle, mode | 0o700)
            self.modes.setdefault(path, mode)
        return handle

    def lock(self) -> None:
        """Gives the folders that were unlocked their modes back."""
        for path, mode in sorted(self.modes.items(), reverse=True):
            with self.opened(path) as handle:
                if handle is not None:
                    os.fchmod(handle, mode)
        self.modes.clear()


def entries_of(folder: int) -> dict[str, bool]:
    """The names in an open folder; whether each is that of a folder."""
    with os.scandir(folder) as found:
        return {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}


def mode_of(name: str, folder: int, *, follow: bool = False) -> int:
    """The type and mode of an entry of an open folder, 0 where there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return 0


def is_folder(name: str, folder: int, *, follow: bool = False) -> bool:
    """Whether an open folder has a folder of that name."""
    return stat.S_ISDIR(mode_of(name, folder, follow=follow))


def move_entry(name: str, source: int, target: int, as_name: str = "") -> None:
    """Renames an entry of one open folder into another, over what is no folder there."""
    as_name = as_name or name
    try:
        os.rename(name, as_name, src_dir_fd=source, dst_dir_fd=target)
    except PermissionError:
        # A folder that may not be written cannot be told its new parent (rename(2)).
        mode = os.stat(name, dir_fd=source, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode) or mode & 0o200:
            raise
        os.chmod(name, stat.S_IMODE(mode) | 0o700, dir_fd=source)
        os.rename(name, as_name, src_dir_fd=source, dst_dir_fd=target)
        os.chmod(as_name, stat.S_IMODE(mode), dir_fd=target)


def exchange_entries(name: str, one: int, other: int) -> None:
    """Changes the entries of that name in two open folders for each other, in one step.

    Raises OSError where the system or the file system cannot (renameat2(2)).
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.renameat2(one, os.fsencode(name), other, os.fsencode(name), 2)
    except (AttributeError, OSError) as error:
        raise OSError(errno.ENOSYS, str(error)) from error
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def copy_attributes(source: int, target: int, info: os.stat_result, mode: int) -> None:
    """Gives an open folder the owner, attributes, mode and times of another, which had these two
    when nothing had been moved out of it."""
    if os.geteuid() == 0:
        os.chown(target, info.st_uid, info.st_gid)
    with contextlib.suppress(OSError):  # where the file system has none, or only root may
        names = os.listxattr(source)
        for name in set(os.listxattr(target)).difference(names):
            os.removexattr(target, name)
        for name in names:
            os.setxattr(target, name, os.getxattr(source, name))
    os.fchmod(target, mode)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def remove_tree(path: str) -> None:
    """Removes a folder and all in it, however deep, whatever may not be written in there. What is
    mounted in it stays."""
    plain = {"PATH": os.defpath}
    remove = ("rm", "-rf", "--one-file-system", "--", path)
    if run_tool(remove, plain).status:
        run_tool(("chmod", "-R", "u+rwX", "--", path), plain)
        run_tool(remove, plain)


# --------------------------------------------------------------------------------------------------
# Unpacking
# --------------------------------------------------------------------------------------------------

# What tar could not do, and goes on: attributes, and single entries, unless the reason is one after
# which the rest does not come out either (strerror(3)).
_TAR_PASSED_OVER = re.compile(
    ": Cannot set |more messages of tar|: Cannot (?!.*(No space left on device|Disk quota exceeded"
    "|Input/output error|Read-only file system|Cannot allocate memory|Too many open files)$)"
)

# Where a file system has no ACLs tar says so of each file, also of the many that have none; of one
# that has, it says that the attribute of that name cannot be set.
_TAR_NO_ACLS = re.compile("tar: acl_(set|delete_def)_file_at: .*: Operation not supported$")


def run_tar(pieces: Iterable[Piece], folder: str, env: Mapping[str, str]) -> list[str]:
    """Lets tar unpack a stream into a folder; what it could not do, a sentence each.

    Raises Failure where the stream is damaged, tar is ended, or nothing more can be written.
    """
    words = ["tar", "-x", "-f", "-", "-p", "--delay-directory-restore", *TAR_RESTORES]
    if os.geteuid() == 0:
        words.append("--same-owner")
    # English, since it decides; names are bytes, but shown as UTF-8.
    stage = Stage((*words, "-C", folder), TAR_ENVIRONMENT)
    with Pipeline([stage], env, feed=pieces) as unpacking:
        for _ in unpacking.blocks():
            pass
        (end,) = unpacking.results()
    said = [line for line in end.messages if not _TAR_NO_ACLS.match(line)]
    fatal = [line for line in said if not _TAR_PASSED_OVER.search(line)]
    if end.status and (end.status not in (1, 2) or end.unrecoverable or fatal or not said):
        why = tuple((fatal or said)[:1])
        # tar's words for a disk that is full in the middle of its block.
        hint = "free some room there" if ": Wrote only " in "".join(why) else end.hint
        raise Failure(str(replace(end, stderr_lines=why)), hint)
    return [line.removeprefix("tar: ") for line in said]


# How the names of private folders of restores begin, and of what `Merger` copies.
_OURS = ".s3napback-restore-"


class Workspace:
    """The private folder of a restore: on the file system where things go, so that each gets there
    by one rename; with what was taken away from there it goes at the end.

    folder: where things go; near: a path in it, on whose file system it is to be.
    """

    def __init__(self, folder: str, near: str) -> None:
        self.path = os.path.join(self._home(folder, near), _OURS + secrets.token_hex(8))
        os.mkdir(self.path, 0o700)
        self.handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._spares = 0
        with contextlib.suppress(OSError):  # where the file system has no locks
            fcntl.flock(self.handle, fcntl.LOCK_EX)  # as long as it is held, we are at work

    def close(self) -> None:
        """Removes it."""
        remove_tree(self.path)
        os.close(self.handle)

    def _home(self, folder: str, near: str) -> str:
        """The folder for the private one: where a rename leads to where things go."""
        found = [folder]
        for name in near.split("/"):
            inner = os.path.join(found[-1], name)
            if not name or os.path.islink(inner) or not os.path.isdir(inner):
                break
            found.append(inner)
        for folder in found:
            with contextlib.suppress(PermissionError):
                for name in os.listdir(folder):
                    if name.startswith(_OURS):
                        self.remove_if_dead(os.path.join(folder, name))
        *above, last = found
        if above and os.access(above[-1], os.W_OK) and not os.path.ismount(last):
            return above[-1]
        return last

    @staticmethod
    def remove_if_dead(path: str) -> None:
        """Takes away what a killed restore left, unless that cannot be known, or done."""
        with contextlib.suppress(OSError):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except NotADirectoryError:
                return os.unlink(path)  # of `Merger`
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(path)
            finally:
                os.close(handle)

    def put_aside(self, name: str, folder: int) -> str:
        """Moves an entry to the private folder; the name that it has there."""
        self._spares += 1
        spare = f"aside-{self._spares}"
        move_entry(name, folder, self.handle, spare)
        return spare


# What keeps a `Merger` from one entry, and from no other: a right that is lacking, a mount, what a
# program that works in the folder has made or taken away since it was listed.
_PASSED_OVER = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY,
                errno.ENOTDIR, errno.EISDIR)


class Merger:
    """Moves entries from tree to tree, each by one rename: it is at any moment the old one or the
    new one.

    place: the tree that others use, too; kept: folders that are never taken away there, as what is
    mounted is not; warnings: what could not be done.
    """

    def __init__(
        self, workspace: Workspace, place: Tree, kept: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self._workspace, self._place, self._env = workspace, place, env
        self._kept = [*(mount.place for mount in mounts()), *map(os.path.realpath, kept)]
        self.warnings: list[str] = []

    def merge(
        self, source: Tree, target: Tree, start: str, names_in: Callable[[str], set[str] | None]
    ) -> None:
        """Moves a path from one tree into another, entry by entry where both have a folder.

        names_in: of a folder, what may stay in it beside the entries that the source has, and then
        it takes the source's attributes; None: everything may, and they stay as they are.
        """
        todo = [os.path.split(start)]
        while todo:
            path, only = todo.pop()  # of the start, one entry of the folder above it
            names = names_in(path)
            # In `/` links above what was backed up are the machine's own: /var/run, /bin.
            own_links = target.top == "/" and names is None
            with (
                self._or_told(path), source.opened(path) as new,
                target.opened(path, make=bool(only), follow=own_links) as there,
            ):
                if only and there is None:
                    raise self._in_the_way(path)
                if new is None or there is None:  # somebody took it away meanwhile
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                info, coming, present = os.fstat(new), entries_of(new), entries_of(there)
                kept = self._kept_in(path) if target is self._place else set()
                for name in [only] if only else coming:
                    inner = f"{path}/{name}" if path else name
                    is_met = coming[name] and name in present
                    if is_met and not present[name] and target is self._place and (
                        names_in(inner) is None
                    ):
                        if not (own_links and is_folder(name, there, follow=True)):
                            raise self._in_the_way(inner)
                        todo.append((inner, ""))
                    elif is_met and present[name]:
                        todo.append((inner, ""))
                    elif name in kept:
                        self._leave(inner)
                    else:
                        with self._or_told(inner):
                            self._put(name, new, there, f"{source.top}/{inner}")
                if only or names is None:
                    continue
                for name in present.keys() - coming.keys() - names:
                    inner = f"{path}/{name}" if path else name
                    with self._or_told(inner), contextlib.suppress(FileNotFoundError):
                        self._discard(name, there, target, inner, name in kept)
                mode = source.modes.get(path, stat.S_IMODE(info.st_mode))
                copy_attributes(new, there, info, mode)
                target.modes.pop(path, None)

    def _put(self, name: str, new: int, there: int, path: str) -> None:
        """Gives an entry its place; what was there goes to the private folder. path: the new's."""
        try:
            old = mode_of(name, there)
            if old and (stat.S_ISDIR(old) or is_folder(name, new)):
                try:
                    exchange_entries(name, new, there)
                except OSError:
                    spare = self._workspace.put_aside(name, there)
                    try:
                        move_entry(name, new, there)
                    except BaseException:  # else it went with the private folder
                        move_entry(spare, self._workspace.handle, there, name)
                        raise
            else:
                move_entry(name, new, there)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy(name, there, path)

    def _copy(self, name: str, there: int, path: str) -> None:
        """`_put` into another file system below the folder: a copy beside it, then a rename."""
        copy = f"{_OURS}{secrets.token_hex(8)}"
        folder = os.readlink(f"/proc/self/fd/{there}")
        result = run_tool(("cp", "-a", "--", path, f"{folder}/{copy}"), self._env)
        if result.status:
            remove_tree(f"{folder}/{copy}")
            raise Failure(f"cannot copy to {folder}: {result.errors.strip()}")
        if is_folder(name, there) or is_folder(copy, there):
            remove_tree(f"{folder}/{name}")
        os.rename(copy, name, src_dir_fd=there, dst_dir_fd=there)

    def _discard(self, name: str, there: int, tree: Tree, path: str, is_kept: bool) -> None:
        """Takes away what was not backed up."""
        device = os.stat(name, dir_fd=there, follow_symlinks=False).st_dev
        if name.startswith(_OURS):
            self._workspace.remove_if_dead(f"{tree.top}/{path}")
        elif is_kept or device != os.fstat(there).st_dev:  # another file system, or a subvolume
            self._leave(path)
        else:
            try:
                self._workspace.put_aside(name, there)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                remove_tree(f"{tree.top}/{path}")

    def _kept_in(self, path: str) -> set[str]:
        """The entries of a folder that stay: something is mounted there or below, or is our own."""
        start = os.path.realpath(os.path.join(self._place.top, path)).rstrip("/") + "/"
        return {one[len(start) :].partition("/")[0] for one in self._kept if one.startswith(start)}

    def _in_the_way(self, path: str) -> Failure:
        return Failure(
            f"{os.path.join(self._place.top, path)} is no folder, and what is to be restored lies"
            " in it", "move it away, or restore into an empty folder",
        )

    def _leave(self, path: str) -> None:
        self.warnings.append(f"{os.path.join(self._place.top, path)} is left as it is: another file"
                             " system, the bucket or DiffDir is there, or in it")

    @contextlib.contextmanager
    def _or_told(self, path: str) -> Iterator[None]:
        """What this user may not do, and what others changed meanwhile, is told, and the rest goes
        on."""
        try:
            yield
        except OSError as error:
            if error.errno not in _PASSED_OVER:
                raise
            place = os.path.join(self._place.top, path)
            self.warnings.append(f"{place} could not be brought back whole: {error.strerror}")


class Unpacker:
    """The archives of a chain, unpacked one upon the other in a private folder, then moved; the
    banner "Tar streams" tells the steps, and why."""

    def __init__(
        self, folder: str, near: str, paths: Sequence[str], env: Mapping[str, str], *, whole: bool,
        kept: Sequence[str],
    ) -> None:
        """folder: where it goes; near: see `Workspace`; paths: what is wanted, () for all; whole:
        unpack all, whatever is wanted of it; kept: see `Merger`. Like all methods, it raises
        Failure."""
        self._env = env
        self._paths, self.taken = tuple(paths), () if whole else tuple(paths)
        self._given = Given()
        self._count = 0
        self._torn = False  # whether the tree is between two archives
        with os_failures("make a folder to unpack in"):
            self._workspace = Workspace(folder, near)
        self._place, self._tree = Tree(folder), Tree(f"{self._workspace.path}/tree")
        self._merger = Merger(self._workspace, self._place, kept, env)
        self.warnings = self._merger.warnings

    def __enter__(self) -> Unpacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._workspace.close()

    def add(
        self, content: Callable[[], contextlib.AbstractContextManager[Iterator[Piece]]]
    ) -> None:
        """Unpacks the next archive; content: opens its bytes, at their start at each call."""
        new = Tree(f"{self._workspace.path}/{self._count}") if self._count else self._tree
        extra = set[str]()
        with os_failures("unpack"), contextlib.ExitStack() as stack:
            while True:
                os.mkdir(new.top, 0o700)
                dumpdirs = None
                if self._count:
                    dumpdirs = stack.enter_context(
                        tempfile.TemporaryFile(dir=self._workspace.path))
                layer = Layer(self.taken, extra, dumpdirs)
                with content() as blocks:
                    warnings = run_tar(TarStream(blocks, layer), new.top, self._env)
                if not layer.lacking:
                    break
                extra |= layer.lacking  # hard links, and what they lead to was passed over
                remove_tree(new.top)
            if self._count and self.taken and layer.renames:
                raise NeedsMore
            for path in layer.names or () if layer.is_plain else ():
                with new.opened(path) as folder:  # nothing else was looked at
                    (layer.files if folder is None else layer.tops).add(path)
            self._torn = self._count > 0
            self._rename(layer.renames)
            for path in self._given.add(layer) | layer.gone:  # what is named no longer
                self._put_aside(path)
            if self._count:
                self._merger.merge(new, self._tree, "", layer.names_in)
                remove_tree(new.top)
            self._tree.lock()
            self._torn = False
        self.warnings += warnings
        self._count += 1

    def add_older(
        self, content: Callable[[], contextlib.AbstractContextManager[Iterator[Piece]]]
    ) -> bool:
        """Unpacks from the next older archive the files that are wanted and that the newer ones
        neither have nor tell to be gone; whether older ones may have further ones.

        Raises NeedsMore where one of them is a folder, or is not told of.
        """
        new = Tree(f"{self._workspace.path}/{self._count}")
        layer = Layer(self.taken, set(), alone=True)
        with os_failures("unpack"):
            os.mkdir(new.top, 0o700)
            os.makedirs(self._tree.top, 0o700, exist_ok=True)
            with content() as blocks:
                self.warnings += run_tar(TarStream(blocks, layer), new.top, self._env)
            if not layer.is_done or layer.lacking:
                raise NeedsMore
            came = {path for path in self.taken if os.path.lexists(f"{new.top}/{path}")}
            for path in came:
                self._merger.merge(new, self._tree, path, lambda folder: None)
        self._count += 1
        self._given.add(layer)
        self.taken = tuple(path for path in self.taken if path not in came | layer.gone)
        return bool(self.taken)

    def _rename(self, renames: Sequence[tuple[str, str]]) -> None:
        """Does what an archive says of renamed directories, all of it at once.

        One after the other, as tar does it, often fails: a name that is taken still, a folder that
        has moved along with the one above it. So each is put aside, the inner ones first, and
        then given its new name, the outer ones first, in the place of whatever has it.
        """
        moved: list[tuple[str, str]] = []
        for source, target in sorted(rename_origins(renames, self._is_there), reverse=True):
            above, name = os.path.split(source)
            with self._tree.opened(above) as there:
                if there is None or not is_folder(name, there):
                    self.warnings.append(f"cannot rename {source} to {target}: it is not there")
                    continue
                moved.append((target, self._workspace.put_aside(name, there)))
            self._tree.lock()  # as long as the paths are the same
        for target, spare in sorted(moved):
            *outer, name = target.split("/")
            for depth, inner in enumerate(outer):
                with self._tree.opened("/".join(outer[:depth])) as here:
                    if here is not None and mode_of(inner, here) and not is_folder(inner, here):
                        self._workspace.put_aside(inner, here)
            self._put_aside(target)
            with self._tree.opened("/".join(outer), make=True) as here:
                assert here is not None
                move_entry(spare, self._workspace.handle, here, name)

    def _is_there(self, path: str) -> bool:
        with self._tree.opened(path) as there:
            return there is not None

    def _put_aside(self, path: str) -> None:
        above, name = os.path.split(path)
        with self._tree.opened(above) as folder:
            if folder is not None and mode_of(name, folder):
                self._workspace.put_aside(name, folder)

    def place(self) -> list[str]:
        """Moves what is wanted to where it goes; the paths that are not there."""
        def is_there(path: str) -> bool:
            above, name = os.path.split(path)
            with self._tree.opened(above) as folder:
                return folder is not None and mode_of(name, folder) != 0

        def names_in(path: str) -> set[str] | None:
            return set() if is_within(path, self._given.tops) else None

        with os_failures("put in place what was unpacked"):
            absent = [path for path in self._paths if not is_there(path)]
            self._tree.lock()
            found = set(self._paths).difference(absent) if self._paths else {""}
            for path in found:
                if not is_within(path, found - {path}):
                    self._merger.merge(self._tree, self._place, path, names_in)
            self._place.lock()
        return absent

    def salvage(self) -> bool:
        """After a failure of `add`: puts in place what there is, if it is of one moment or all of
        the first archive that could be read; whether it did."""
        if self._torn or not os.path.isdir(self._tree.top) or not os.listdir(self._tree.top):
            return False
        self.place()
        return True


# --------------------------------------------------------------------------------------------------
# Restoring
# --------------------------------------------------------------------------------------------------


def kind_by_content(recovery: Recovery, one: CatalogEntry) -> str:
    """Subversion or Directory, as the first bytes of an archive tell."""
    with recovery.content(one) as content:
        start, _ = split_head(content)
    return SUBVERSION if start.startswith(SVN_DUMP) else DIRECTORY


def member_paths(members: Sequence[str]) -> list[str]:
    """The paths that PATHs of the command line mean, none for all."""
    paths = sorted({os.path.normpath(f"/{member}").lstrip("/") for member in members})
    return [] if "" in paths else paths


def check_place(
    kind: str, place: str | None, members: Sequence[str], *, overwrite: bool
) -> None:
    """Raises Failure where a backup, or members of it, cannot go to a place; None is standard
    output. Nothing is looked at where the kind is "", not known yet."""
    if kind == DIRECTORY:
        if place is None:
            raise UsageFailure("a directory needs --to DIR")
        if os.path.realpath(place) == "/" and place != "/":
            raise UsageFailure(f"{place} is the root folder", "write --to / to mean it")
        # A file in its place is told even with --overwrite, before anything is thawed.
        if os.path.exists(place) and not is_fresh(place) and not overwrite:
            raise UsageFailure(f"{place} is not empty", "restore into an empty folder; --overwrite"
                               " deletes there what was not backed up")
    elif kind:
        if members:
            raise UsageFailure(f"{members[0]}: only a directory has parts")
        if place and kind != SUBVERSION and os.path.exists(place) and not os.path.isfile(place):
            raise UsageFailure(f"{place} is no file", "name a new file, or use --stdout")
        if place and os.path.exists(place) and (kind == SUBVERSION or not overwrite):
            hint = "name a new place" if kind == SUBVERSION else "--overwrite replaces it"
            raise UsageFailure(f"{place} exists already", hint)


def is_fresh(folder: str) -> bool:
    """Whether a folder is empty, but for what a restore left that was killed. Raises Failure."""
    with os_failures("read the folder"):
        return all(name.startswith(_OURS) for name in os.listdir(folder))


def restore_directory(
    recovery: Recovery, chain: Chain, folder: str, members: Sequence[str], as_of: str
) -> Iterator[str]:
    """Brings back a directory, or members of it; what could not be done, a sentence each, also
    where it then raises Failure. as_of: the moment, as text."""
    with os_failures("make the folder"):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    fresh = is_fresh(folder)
    paths = member_paths(members)
    near = (paths[0] if paths else chain.archives[-1].name).lstrip("/")
    for way in ("newest first", "in order", "whole") if paths else ("whole",):
        failure: Failure | None = None
        with Unpacker(
            folder, near, paths, recovery.env, whole=way == "whole", kept=recovery.own
        ) as unpacker:
            try:
                if way == "newest first":
                    _unpack_files(recovery, chain, unpacker)
                else:
                    _unpack_chain(recovery, chain, unpacker, folder, fresh=fresh)
                if absent := unpacker.place():
                    raise Failure(f"not in the backup as of {as_of}: {', '.join(sorted(absent))}")
            except NeedsMore:
                continue
            except Failure as raised:
                failure = raised
        yield from unpacker.warnings
        if failure:
            raise failure
        return


def _unpack_files(recovery: Recovery, chain: Chain, unpacker: Unpacker) -> None:
    """Of each file the newest archive that has it is enough. Raises NeedsMore where something is no
    file, or an archive is bad: unpacked in order, they tell what is wrong, and what is left."""
    try:
        for one in reversed(chain.archives):
            if not unpacker.add_older(partial(recovery.content, one, to_the_end=False)):
                return
    except Failure as failure:
        raise NeedsMore from failure


def _unpack_chain(
    recovery: Recovery, chain: Chain, unpacker: Unpacker, folder: str, *, fresh: bool
) -> None:
    """fresh: nothing was in the folder before; then it may hold what could be read."""
    for one in chain.archives:
        try:
            unpacker.add(partial(recovery.content, one, to_the_end=not unpacker.taken))
        except Failure as failure:
            saved = f"{folder} holds what came before" if fresh and unpacker.salvage() else ""
            raise failure.at(one.archive.name, failure.hint or saved) from failure


def restore_repository(recovery: Recovery, chain: Chain, place: str) -> None:
    """Makes a repository, and loads into it what the archives hold."""
    made = run_tool(("svnadmin", "create", place), recovery.env)
    made.required(f"svnadmin cannot make {place}")
    load = Stage(("svnadmin", "load", *SVN_LOAD, place))
    for one in chain.archives:
        try:
            with recovery.content(one) as dump, run_filter(load, dump, recovery.env) as output:
                for _ in output:
                    pass
        except Failure as failure:
            left = f"{place} holds the revisions that came before"
            raise failure.at(one.archive.name, failure.hint or left) from failure


def restore_file(recovery: Recovery, chain: Chain, place: str) -> None:
    """Writes a dump to a file, which is there when all of it is."""
    temp = f"{place}.{secrets.token_hex(4)}.part"
    try:
        with os_failures("write the dump"):
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                write_dump(recovery, chain, file)
            os.replace(temp, place)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temp)


def write_dump(recovery: Recovery, chain: Chain, output: IO[bytes]) -> None:
    """Writes what the archives hold, one after the other."""
    for one in chain.archives:
        with recovery.content(one) as content, os_failures("write the dump"):
            start, blocks = split_head(content)
            if one.kind not in (STREAM, COMMAND):  # any bytes may be what was backed up
                _refuse_unreadable(start)
            for block in blocks:
                write_all(output, block)
            output.flush()


def _refuse_unreadable(start: bytes) -> None:
    """Raises Failure for a dump that is empty, or begins as no text does."""
    if not start:
        raise Failure("the dump is empty: the program that should have made it failed",
                      "restore an older one: --at")
    if re.search(rb"[\0-\x08\x0e-\x1f\x7f]", start):
        raise Failure("it is compressed in a way that is not known here",
                      "js3tream -o gives its bytes as they are stored")


# Told by the first bytes, as gpg and gzip leave no other way.
_SCRIPT_DECODERS = "\n".join(
    f"  {'|'.join(f'{start.hex()}*' for start in codec.starts)}) {shlex.join(codec.decoders[-1])}"
    ' < "$1";;' for codec in CODECS
)
_SCRIPT = rf"""set -eu
to=${{1:?usage: sh restore.sh PLACE}}
plain() {{ case $(head -c 6 "$1" | od -An -tx1 | tr -d " ") in
{_SCRIPT_DECODERS}
  8[4-7c-e]*|c1*|c3*|d2*|2d2d2d2d2d42*) gpg -d "$1" > "$1.dec"
    plain "$1.dec"; rm "$1.dec";;
  *) cat "$1";; esac; }}
unpack() {{ case $(head -c {len(SVN_DUMP)} "$work/b" | tr -d '\0') in
  {SVN_DUMP.decode()}) [ -e "$to" ] || svnadmin create "$to"
    svnadmin load {shlex.join(SVN_LOAD)} "$to" < "$work/b";;
  *) mkdir -p "$to"
    LC_ALL=C tar -xpf "$work/b" {shlex.join(TAR_RESTORES)} --listed-incremental=/dev/null \
      -C "$to" || {{ [ $? = 2 ] || exit 1; bad=3; }};; esac; }}
bad=0 TAR_OPTIONS=
work=$(mktemp -d 2>/dev/null || mktemp -d "$PWD/restore.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM"""


def restore_script(name: str, kind: str, chain: Chain, recovery: Recovery) -> str:
    """A POSIX shell script with the aws command line (or cat, for a folder), gpg and tar."""
    root, bucket = folder_root(recovery.endpoint), recovery.store.bucket
    endpoint = f" --endpoint-url {shlex.quote(recovery.endpoint)}" if recovery.endpoint else ""
    lines = [
        "#!/bin/sh",
        f"# Restores {name!r} into the folder, file or repository given as the first argument.",
        f"# Needs: {'cat' if root else 'aws (with its credentials set)'}, gpg (with the secret key,"
        " if encrypted), what decompresses it (see below), and GNU tar, or svnadmin.",
        _SCRIPT,
    ]
    for one in chain.archives:
        # Not echo, which makes escape sequences of backslashes in some shells.
        shown = shlex.quote(printable(one.archive.name, ""))
        lines.append(f"printf '%s\\n' {shown} >&2; : > \"$work/a\"")
        for item in one.archive.chunks:
            fetch = f"aws s3 cp{endpoint} {shlex.quote(f's3://{bucket}/{item.key}')} -"
            if item.version:
                what = shlex.join(("--bucket", bucket, "--key", item.key, "--version-id",
                                   item.version))
                fetch = f'aws s3api get-object{endpoint} {what} "$work/c" >/dev/null; cat "$work/c"'
            if root:
                path = FolderStore(root, bucket, time.time).path_of(item.key)
                fetch = f"cat {shlex.quote(path)}"
            lines.append(f'{fetch} >> "$work/a"')
        if kind == STREAM:
            lines.append('cat "$work/a" > "$to"')
        elif kind in DUMPS:
            lines.append('plain "$work/a" > "$to"')
        else:
            lines.append('plain "$work/a" > "$work/b"; unpack')
    return "\n".join([*lines, "exit $bad", ""])


# --------------------------------------------------------------------------------------------------
# Verifying
# --------------------------------------------------------------------------------------------------


def chain_faults(
    name: str, found: Sequence[CatalogEntry], moment: Moment
) -> Iterator[str]:
    """A sentence for each archive of a source that is whole, but not what it continues."""
    first = begun_with(found)
    for one, at, whole in History(found).rows():
        if not one.fault and not whole:
            yield f"{one}: " + (
                "no FULL is before it: whether it holds everything is found out by restore, which"
                " reads it" if one is first else
                f"what it continues is not there any more ({name} as of {_moment_text(moment, at)}"
                " cannot be restored)"
            )


def read_to_the_end(recovery: Recovery, one: CatalogEntry) -> None:
    """Raises Failure for an archive that does not hold what it should, to its end."""
    with recovery.content(one) as content:
        start, blocks = split_head(content)
        if one.kind in (STREAM, COMMAND):
            for _ in blocks:
                pass
        elif start.startswith(SVN_DUMP):
            mark, tail, seen = f"\nRevision-number: {one.after}\n".encode(), b"", not one.after
            for block in blocks:
                tail = tail[-len(mark) :] + block
                seen = seen or mark in tail
            if not seen:
                raise Failure(f"the dump lacks revision {one.after}")
        elif one.kind in (MYSQL, POSTGRESQL):
            _refuse_unreadable(start)
            tail = b""
            for block in blocks:
                tail = (tail + block)[-4096:]
            # What the dump programs write last, unless their comments are switched off.
            comments = re.match(rb"(/\*.*?\*/\s*)?-- (MySQL|MariaDB|$|\s*PostgreSQL)", start)
            if comments and b"ump complete" not in tail:
                raise Failure("the dump has no closing line: it was cut before it was stored")
        else:
            listing = Stage(("tar", "-t", "-f", "-"))
            with run_filter(listing, blocks, recovery.env) as names:
                for _ in names:
                    pass


# ==================================================================================================
# 16. Search
# ==================================================================================================

# What is in the archives of a directory, by name only: of each archive a listing as tar makes it,
# from its index in DiffDir or from itself. `FileList` makes of them what `Unpacker` makes on disk.


class Member(NamedTuple):
    """A file, directory or other entry as an archive has it.

    mode: as `ls -l` shows it; owner: "USER/GROUP", numbers where they have no names.
    size: bytes; mtime: seconds since 1970; link: where a link leads, else empty.
    archive: the one that holds it.
    """

    mode: str
    owner: str
    size: int
    mtime: int
    link: str
    archive: str

    @property
    def is_folder(self) -> bool:
        return self.mode[0] == "d"


# A line of a listing (`TAR_LISTING`): behind the mode a mark of further attributes, for the size of
# a device two numbers. By the letters of links, what stands behind their names.
_LISTED = re.compile(
    rb"(\S{10}).? (.*?) +(\d+)(?:,\d+)? (\S+ \S{8}|-?\d+)(?:\.\d+)? +(.*)"
)
_ARROWS = {b"l": b" -> ", b"h": b" link to "}


def listed_member(
    line: bytes, archive: str, there: Container[str] = ()
) -> tuple[str, Member]:
    """(path, member) of a line of a listing. Raises Failure for another line.

    there: paths in the archive, by which a hard link is read whose names have words of its arrow.
    """
    if not (match := _LISTED.fullmatch(line)):
        raise Failure(f"a line that is not tar's: {line[:99]!r}")
    mode, owner, size, when, name = match.groups()
    name, _, link = name.partition(_ARROWS.get(mode[:1], b"\n"))
    if mode[:1] == b"h":
        ways = _hard_link_ways(match[5])
        name, link = next((way for way in ways if _path_of(way[1]) in there), (name, link))
    try:
        mtime = int(datetime.fromisoformat(f"{when.decode()}+00:00").timestamp())
    except ValueError:
        mtime = int(_LATEST)  # a year that has no four digits
    return _path_of(name), Member(
        mode.decode(), os.fsdecode(owner), int(size), mtime, os.fsdecode(unescaped(link)), archive)


def _path_of(name: bytes) -> str:
    return member_path(unescaped(name)) or ""


def _hard_link_ways(text: bytes) -> list[tuple[bytes, bytes]]:
    """(name, what it leads to), as often as the arrow between them may be meant."""
    arrows = re.finditer(b"(?=%s)" % _ARROWS[b"h"], text)  # they may overlap
    return [(text[: one.start()], text[one.start() + len(_ARROWS[b"h"]) :]) for one in arrows]


_LIST = Stage(("tar", "-t", "-f", "-", *TAR_LISTING, *TAR_QUOTING), TAR_ENVIRONMENT)


def index_of(recovery: Recovery, one: CatalogEntry) -> str:
    """The path of an archive's index in DiffDir; "" where there is none of just this upload."""
    if not recovery.diff_dir:
        return ""
    path = recovery.diff_dir + index_file_name(recovery.place, one.archive.name)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(INDEX_HEAD) == f"{one.archive.metadata.get('archive')}\n".encode():
            return path
    return ""


def contents(
    recovery: Recovery, one: CatalogEntry, words: Sequence[bytes] = ()
) -> tuple[Layer, dict[str, Member]]:
    """(what an archive tells, its members by path). Raises Failure.

    words: an index gives only the members with one of these in their lines, and of an archive that
    continues another one all that are no directories: they may have taken the place of one.
    """
    layer = Layer((), set(), io.BytesIO())
    path = index_of(recovery, one)
    try:
        listing = _from_index(path, layer) if path else _from_archive(recovery, one, layer)
        lines = [*_lines_with(words, listing)] if words else listing.splitlines()
        if words and not one.self_contained:
            lines += re.findall(rb"^[^d\n].*", listing, re.MULTILINE)
        if words:
            links = [line for line in lines if line.startswith(b"h")]
            targets = {target for line in links for _, target in _hard_link_ways(line)}
            lines += _lines_with(targets, listing)
        members: dict[str, Member] = {}
        for line in sorted(dict.fromkeys(lines), key=lambda line: line.startswith(b"h")):
            where, member = listed_member(line, one.archive.name, members)
            members[where] = member
        return layer, members
    except (Failure, OSError, LookupError, TypeError, ValueError, zlib.error) as error:
        if not path:
            raise
        raise Failure(f"the index {path} cannot be read: {error}",
                      "delete it: then the archive is fetched") from error


def _from_index(path: str, layer: Layer) -> bytes:
    """The listing in an index; the rest of it is taken down in the layer."""
    with open(path, "rb") as file:
        file.seek(INDEX_HEAD)
        given, _, text = zlib.decompress(file.read()).partition(b"\n")
    listing, _, folders = (b"\n" + text).partition(b"\n\n")
    layer.tops = layer.names = {member_path(os.fsencode(name)) or "" for name in json.loads(given)}
    for folder in folders.splitlines():
        name, entries = map(os.fsencode, json.loads(folder))
        layer.note(member_path(name) or "", entries + b"\0", folder=True, link=None)
    return (listing + b"\n")[1:]


def _from_archive(recovery: Recovery, one: CatalogEntry, layer: Layer) -> bytes:
    with recovery.content(one) as content:
        start, blocks = split_head(content)
        if start.startswith(SVN_DUMP):
            raise Failure("it holds the revisions of a repository, and no files")
        with run_filter(_LIST, TarStream(blocks, layer), recovery.env) as output:
            return b"".join(output)


def _lines_with(words: Iterable[bytes], listing: bytes) -> Iterator[bytes]:
    for word in words:
        at = listing.find(word)
        while at >= 0:
            end = listing.index(b"\n", at)
            yield listing[listing.rfind(b"\n", 0, at) + 1 : end]
            at = listing.find(word, end)


def by_folder(entries: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Path of a folder → name → what stands at that path."""
    folders: dict[str, dict[str, T]] = {}
    for path, one in entries.items():
        above, _, name = path.rpartition("/")
        folders.setdefault(above, {})[name] = one
    return folders


class FileList:
    """The files of a directory, as the archives of its chain give them: by the same steps as those
    of `Unpacker` and `Merger`. given: to tar by name, up to the last archive."""

    def __init__(self, folders: dict[str, dict[str, Member]], given: Given) -> None:
        self._folders, self._given = folders, given

    @property
    def files(self) -> dict[str, Member]:
        """By path."""
        return {f"{above}/{name}".removeprefix("/"): one
                for above, there in self._folders.items() for name, one in there.items()}

    def and_then(self, layer: Layer, members: Mapping[str, Member]) -> FileList:
        """With the next archive, as `contents` gives it."""
        given, folders = copy.deepcopy(self._given), self._renamed(layer.renames)
        gone = given.add(layer)
        # A search may know a file without the folders that it is in.
        outer = by_folder(dict.fromkeys(
            path for above in folders for path in ways_to(above) if path))
        for above in folders.keys() | outer.keys():
            if (names := layer.names_in(above)) is not None:
                known = folders.get(above, {}).keys() | outer.get(above, {}).keys()
                paths = (f"{above}/{name}".removeprefix("/") for name in known - names)
                gone.update(path for path in paths if path not in members)
        if folders:  # with what was in a folder, where a file is now
            gone.update(path for path, one in members.items() if not one.is_folder)
        after = {above: there for above, there in folders.items() if not is_within(above, gone)}
        for above, changed in by_folder({**dict.fromkeys(gone), **members}).items():
            now = {**after.get(above, {}), **changed}
            after[above] = {name: one for name, one in now.items() if one}
        for path in [path for path, one in members.items() if one.mode[0] == "h"]:
            above, _, name = path.rpartition("/")
            folder, _, target = members[path].link.rpartition("/")
            after[above][name] = after.get(folder, {}).get(target, members[path])
        return FileList(after, given)

    def _renamed(self, renames: Sequence[tuple[str, str]]) -> dict[str, dict[str, Member]]:
        if not renames:
            return self._folders
        files, moved = self.files, dict[str, dict[str, Member]]()
        for source, target in sorted(rename_origins(renames, files.__contains__), reverse=True):
            inside = [path for path in files if is_within(path, {source})]
            moved[target] = {target + path[len(source) :]: files.pop(path) for path in inside}
        for target, inside_now in sorted(moved.items()):
            in_the_way = [path for path in files if inside_now and is_within(path, {target})]
            files = {path: files[path] for path in files.keys() - in_the_way} | inside_now
        return by_folder(files)


def files_of(recovery: Recovery, chain: Chain) -> dict[str, Member]:
    """What a chain gives, by path. Raises Failure."""
    result = FileList({}, Given())
    for one in chain.archives:
        with failures_at(one.archive.name):
            result = result.and_then(*contents(recovery, one))
    return result.files


def pattern_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Tells whether a path matches one of some shell patterns: one with a slash the path, from its
    beginning if the pattern begins with one, else from any directory on; another one the last name
    in it. As in find(1), `*` matches a slash, too. A slash at the end says nothing."""
    patterns = [one.rstrip("/") or one for one in patterns]
    names = [fnmatch.translate(one) for one in patterns if "/" not in one]
    paths = [fnmatch.translate(one if one[0] == "/" else f"*/{one}")
             for one in patterns if "/" in one]
    of_name, of_path = (re.compile("|".join(some) or r"(?!)") for some in (names, paths))
    return lambda path: bool(of_name.match(path.rpartition("/")[2]) or of_path.match(f"/{path}"))


def words_of(patterns: Sequence[str]) -> tuple[bytes, ...]:
    """Of each pattern the longest word that is in the line of whatever matches it; nothing where
    one pattern has none."""
    plain = [re.sub(r"\[!?\]?[^]]*\]", "*", pattern) for pattern in patterns]
    words = [max(re.findall(r"[\w.,=+@%-]+", one, re.ASCII), key=len, default="") for one in plain]
    return tuple(word.encode() for word in words) if all(words) else ()


class Version(NamedTuple):
    """How a path was at some moments, in epoch seconds, the oldest first; archives: that hold it
    so."""

    path: str
    member: Member
    archives: list[str]
    moments: list[int]


def find_versions(
    recovery: Recovery, history: History, patterns: Sequence[str]
) -> tuple[list[Version], list[str]]:
    """(what matches in a directory's archives, a sentence for each that could not be searched)."""
    matches, unread = pattern_matcher(patterns), list[str]()
    versions: dict[tuple[object, ...], Version] = {}
    # What was renamed has other names in the archives before, and then there is no index.
    is_plain = all(index_of(recovery, one) for one in history.archives)
    words = words_of(patterns) if is_plain else ()
    lists: dict[str, FileList] = {}
    for place, (one, at, intact) in enumerate(history.rows()):
        before = history.chain(place)[:-1]
        try:
            if not intact or (before and str(before[-1]) not in lists):
                raise Failure("it, or what it continues, cannot be read")
            start = lists[str(before[-1])] if before else FileList({}, Given())
            lists[str(one)] = start.and_then(*contents(recovery, one, words))
        except Failure as failure:
            unread.append(f"{one} is not searched: {failure}")
            continue
        for path, member in lists[str(one)].files.items():
            if matches(path):
                how = path, *member[:-1]  # whichever archive has it
                version = versions.setdefault(how, Version(path, member, [], []))
                version.moments.append(at)
                if member.archive not in version.archives:
                    version.archives.append(member.archive)
    return list(versions.values()), unread


def differences(
    old: Mapping[str, Member], new: Mapping[str, Member]
) -> list[tuple[str, str, str]]:
    """(path, "new", "gone", "changed" or "renamed", new path of what is renamed), by path.

    Changed: type, mode, owner, size, time or target of a link; of a directory type, mode or owner.
    Renamed: of just one file that is gone, not empty, and one that is new, type, mode, owner, size
    and time are the same, the last name, too, if there are several.
    """
    gone, come = old.keys() - new.keys(), new.keys() - old.keys()
    renamed: dict[str, str] = {}
    for by_name in (True, False):
        groups: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
        for side, (paths, files) in enumerate(((gone, old), (come, new))):
            for path in paths - renamed.keys() - set(renamed.values()):
                if files[path].size and files[path].mode[0] == "-":
                    key = files[path][:4], path.rpartition("/")[2] if by_name else ""
                    groups.setdefault(key, ([], []))[side].append(path)
        renamed.update((a[0], b[0]) for a, b in groups.values() if len(a) == len(b) == 1)
    found = [(path, "renamed", target) for path, target in renamed.items()]
    found += [(path, "gone", "") for path in gone - renamed.keys()]
    found += [(path, "new", "") for path in come - set(renamed.values())]
    for path in old.keys() & new.keys():
        compared = 2 if old[path].is_folder and new[path].is_folder else 5
        if old[path][:compared] != new[path][:compared]:
            found.append((path, "changed", ""))
    return sorted(found)


# ==================================================================================================
# 17. Watch
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Pings and metrics
# --------------------------------------------------------------------------------------------------

# Seconds that those who watch have for an answer, however slowly they send it.
_WATCH_TIMEOUT = 10.0


def in_time(call: Callable[..., T], *args: Any) -> T:
    """What a call returns. Raises what it raises, and TimeoutError where it takes too long."""
    future = ThreadPoolExecutor(1).submit(call, *args)
    if not wait([future], _WATCH_TIMEOUT).done:  # the program's end waits for no thread
        raise TimeoutError(f"no answer within {_WATCH_TIMEOUT:.0f} s")
    return future.result()


def send_request(url: str, body: bytes | None, method: str | None = None) -> None:
    """Sends a POST, or without a body a GET. Raises OSError or HTTPException where nobody answers,
    and HTTPError, which has a code, where the answer is no success."""
    from urllib import request

    headers = {"User-Agent": f"s3napback/{__version__}", "Content-Type": "text/plain"}
    opener = request.OpenerDirector()  # what build_opener makes follows redirects to ftp:
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.UnknownHandler,
        request.HTTPRedirectHandler, request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    opener.open(request.Request(url, body, headers, method=method), timeout=_WATCH_TIMEOUT).close()


def no_answer(error: Exception) -> str:
    """Why `send_request` had none, or none that is good, in one line."""
    reason = getattr(error, "reason", error)
    return " ".join(str(getattr(reason, "strerror", "") or reason).split())


# What a signal adds to the path of a PingURL (healthchecks, "Pinging API").
_START, _SUCCESS, _FAIL = "/start", "", "/fail"

_PING_PAUSES = (0.0, 1.0, 3.0)  # seconds before each try


def ping_target(url: str, signal: str, run_id: str) -> str:
    """Where a signal goes; "" for a start and a URL with %s, which stands for up or down.

    >>> ping_target("https://hc.example.com/5f?create=1", "/fail", "7")
    'https://hc.example.com/5f/fail?create=1&rid=7'
    """
    if "%s" in url:
        return "" if signal == _START else url.replace("%s", "down" if signal == _FAIL else "up")
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/") + signal if signal else parts.path
    return parts._replace(path=path, query=f"{parts.query}&rid={run_id}".lstrip("&")).geturl()


def ping(url: str, signal: str, run_id: str, body: bytes = b"") -> None:
    """Sends a signal, by three tries; that it did not arrive is a warning."""
    target, why = ping_target(url, signal, run_id), ""
    for pause in _PING_PAUSES if target else ():
        time.sleep(pause)
        try:
            return in_time(send_request, target, None if "%s" in url else body)
        except Exception as error:
            why = f"{getattr(error, 'code', '')} {no_answer(error)}".strip()
    if why:  # only the host is shown: whoever knows the whole URL can send signals
        log.warning("PingURL at %s: the ping%s did not arrive: %s",
                    urllib.parse.urlsplit(url).netloc, signal and f" {signal}", why)


# All are gauges, named by Prometheus' "Metric and label naming".
_METRICS = {
    "job_last_success_timestamp_seconds": "When all of it was last known to be stored.",
    "job_last_run_timestamp_seconds": "When it was last stored, or that failed.",
    "job_status": "What came of that: 0 stored, 3 stored with warnings, 1 failed.",
    "job_bytes": "How much was stored then.",
    "job_duration_seconds": "How long that took.",
    "run_timestamp_seconds": "When the last run of the config ended.",
    "run_status": "Its exit status.",
    "run_jobs": "How many of its jobs came to that.",
}
_STATUSES = {"ok": EXIT_OK, "warnings": EXIT_WARNINGS, "failed": EXIT_FAILED}
_SAMPLE = re.compile(r's3napback_(\w+)\{(config="(?:[^"\\]|\\.)*".*)\} ([0-9.e+-]+)')


def labels_text(**labels: str) -> str:
    """As they stand between the braces (Prometheus, "Exposition formats")."""
    escaped = partial(re.sub, r'["\\]', r"\\\g<0>")
    return ",".join(f'{name}="{escaped(printable(text, ""))}"' for name, text in labels.items())


def metrics_text(old: str, config: str, report: RunReport, now: float) -> str:
    """What a MetricsFile says after a run of one config. What was not run keeps its values, and
    what the config does not name any more goes. Raises ValueError where the old text is none."""
    samples: dict[tuple[str, str], float] = {}
    for line in old.split("\n"):
        if match := _SAMPLE.fullmatch(line):
            samples[match[1], match[2]] = float(match[3])
        elif line and not line.startswith("# "):
            raise ValueError(line)
    own = labels_text(config=config)
    jobs = {labels_text(config=config, kind=one.kind, name=one.name): one
            for one in report.outcomes}
    # A SubversionDir that cannot be read stands for its repositories, whose names are not known.
    unread = {labels for labels, one in jobs.items()
              if one.kind == SUBVERSION and one.status == "failed" and not one.archive}
    for name, labels in list(samples):
        is_kept = labels in jobs or labels.rpartition("/")[0] + '"' in unread
        if jobs and labels.startswith(f"{own},kind=") and not is_kept:
            del samples[name, labels]
    samples["run_timestamp_seconds", own] = now = round(now, 3)
    samples["run_status", own] = report.status
    for status in (*_STATUSES, "skipped"):
        count = sum(one.status == status for one in report.outcomes)
        samples["run_jobs", labels_text(config=config, status=status)] = count
    for labels, one in jobs.items():
        # Due, and skipped without a reason: it was stored today already, or nothing is new.
        is_there = one.status == "skipped" and bool(one.archive) and not one.error
        if is_there or one.status in ("ok", "warnings"):
            samples["job_last_success_timestamp_seconds", labels] = now
        if one.status in _STATUSES:
            samples["job_last_run_timestamp_seconds", labels] = now
            samples["job_status", labels] = _STATUSES[one.status]
            samples["job_bytes", labels] = one.bytes
            samples["job_duration_seconds", labels] = one.seconds
    text = ""
    for metric, meaning in _METRICS.items():
        text += f"# HELP s3napback_{metric} {meaning}\n# TYPE s3napback_{metric} gauge\n"
        text += "".join(f"s3napback_{name}{{{labels}}} {value:.15g}\n"
                        for (name, labels), value in sorted(samples.items()) if name == metric)
    return text


def write_metrics(path: str, config: str, report: RunReport, now: float) -> None:
    """Brings a MetricsFile up to date. Raises OSError, and leaves it as it was."""
    folder, old, config = os.path.dirname(os.path.abspath(path)), "", os.path.abspath(config)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the run of another config may be at it
        with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
            old = file.read()
        try:
            text = metrics_text(old, config, report, now)
        except ValueError:
            log.warning("MetricsFile %s is damaged: it is begun anew", path)
            text = metrics_text("", config, report, now)
        with _new_file(folder) as temp:
            _write_durably(temp, [text.encode()])
            os.chmod(temp, 0o644)  # node_exporter is another user
            os.replace(temp, path)
    finally:
        os.close(handle)


def run_watched(path: str, options: RunOptions) -> RunReport:
    """The run of a config as `run_config`, and what is told of it to those who watch.

    Raises no Failure: what keeps one config from running is logged, and keeps no other back.
    """
    import uuid

    started, run_id, pool = time.monotonic(), str(uuid.uuid4()), ThreadPoolExecutor(100)
    config, settings, urls, pings, end = None, None, list[str](), list[Future[None]](), b""

    def send(signal: str, body: bytes = b"") -> list[Future[None]]:
        return [pool.submit(ping, url, signal, run_id, body) for url in urls if not options.test]

    try:
        with contextlib.suppress(OSError, Failure):  # perhaps it cannot be parsed
            urls = [url for _, line in ConfigFile.open(path).lines
                    if re.match(r"(?i)\s*PingURL\s", line) for url in re.findall(_PING_URL, line)]
        config = read_config(path)
        urls = [url for url in config.listed("PingURL") if is_ping_url(url)]
        settings = settings_of(config)
        pings = send(_START)
        report = run_config(config, settings, options)
    except Failure as failure:
        log.critical("%s", failure)
        report = RunReport.of(failure)
    except BaseException as error:
        report = RunReport.of(error)
        end = f"{report.error}\n".encode()
        raise
    finally:
        report = replace(report, seconds=time.monotonic() - started)
        with signals_held():
            if config:
                lines = [(ON_FAILURE, line) for line in config.lines(ON_FAILURE)]
                seconds = settings.hook_timeout if settings else Settings.hook_timeout
                Hooks(lines, path, options, seconds, log).after(report, Outcome("", "", "", ""))
            file = settings.metrics_file if settings else None
            if file and options.test:
                log.info("MetricsFile %s: would be written", file)
            elif file and report.status != EXIT_LOCKED:  # the run at work writes its own
                try:
                    in_time(write_metrics, file, path, report, options.clock())
                except OSError as error:
                    log.warning("%s", os_failure(error, f"write MetricsFile {file}"))
            for url in urls if options.test else ():
                log.info("PingURL at %s: would be told", urllib.parse.urlsplit(url).netloc)
            wait(pings)
            signal = _SUCCESS if report.status in (EXIT_OK, EXIT_WARNINGS) else _FAIL
            wait(send(signal, options.log_text() + end))
    return report


# --------------------------------------------------------------------------------------------------
# Verdicts
# --------------------------------------------------------------------------------------------------

# What `status` says of a source → the exit status that it asks for; the worst last, where a screen
# ends. "unnamed" is in a bucket, and no job's.
VERDICTS = {"unnamed": EXIT_OK, "ok": EXIT_OK, "warnings": EXIT_OK, "late": EXIT_WARNINGS,
            "broken": EXIT_FAILED, "never": EXIT_FAILED}


class Standing(NamedTuple):
    """How a source stands."""

    kind: str
    name: str
    where: str
    bytes: int
    verdict: str = "never"
    why: str = ""
    archive: str = ""  # the newest that can be restored
    host: str = ""  # that made it
    age: int | None = None  # seconds since it began
    due_last: date | None = None  # local days
    due_next: date | None = None
    unfinished: tuple[str, ...] = ()  # what is not whole, and why


def judge(
    source: Standing, cycle: CycleSpec, found: Sequence[CatalogEntry], now: Moment, grace: float,
    max_age: float = math.inf, unstored: float | None = None,
) -> Standing:
    """A source with its verdict, by its archives. Raises Failure for a cycle without rotation.

    It is late when its cycle asked for a run after its newest archive, and since the same hour of
    that day `grace` seconds have passed. max_age: seconds. unstored: when the first revision of a
    repository was committed that is in no archive, epoch seconds, inf for none. Where that is not
    known only FULLs are asked for: there is no DIFF without a revision.
    """
    history = History(one if one.made <= now.epoch else one.by_the_buckets_clock() for one in found)
    whole = [n for n, one in enumerate(history.archives) if not one.fault]
    good = [n for n in whole if history.intact[n]]
    newest = history.archives[good[-1]] if good else None
    since = newest.made if newest else now.epoch if unstored is None else unstored
    day = newest.archive.made_on(now) if newest else ""
    # A run may come to it after midnight: then the next one does so a day after its own.
    delay = grace + 86400 * (day < now.date(since).isoformat())
    missed = next((
        at for at in backup_days(cycle, Moment(since, now.zone), 1)
        if at.date().isoformat() > day and (
            source.kind != SUBVERSION or (unstored is not None and unstored <= at.epoch)
            or slot_and_mode(cycle, at.day, dumps=False)[1] == FULL)
    ), None)
    is_late = missed is not None and missed.epoch + delay < now.epoch
    last, following = (
        next((at.date() for at in backup_days(cycle, Moment(at, now.zone), step)), None)
        for at, step in ((now.epoch, -1), (now.epoch + 86400, 1))
    )
    verdict, why = "ok", ""
    if not found:
        verdict = "never" if is_late or unstored is None else "ok"
    elif not newest or good[-1] != whole[-1]:
        place = whole[-1] if whole else len(found) - 1
        verdict, why = "broken", _why_broken(history.chain(place), history.archives[:place])
    elif newest.made - now.epoch > 3600:  # by the bucket's clock, too; they differ a little
        verdict, why = "late", "its newest is dated in the future: a machine's clock is wrong"
    elif is_late or now.epoch - newest.made > max_age:
        verdict = "late"
    elif newest.status == "warnings":
        verdict = "warnings"
    if not last and not following:
        verdict, why = max("late", verdict, key=[*VERDICTS].index), "no day is its cycle's"
    return source._replace(
        verdict=verdict, why=why, due_last=last, due_next=following, archive=str(newest or ""),
        host=newest.archive.metadata.get("host", "") if newest else "",
        age=round(now.epoch - newest.made) if newest else None,
    )


def first_unstored(repository: str, after: str, env: Mapping[str, str]) -> float | None:
    """When the revision behind that one ("": the first) was committed, epoch seconds; inf where
    there is none yet, None where the repository does not tell."""
    with contextlib.suppress(Failure, ValueError):
        revision = int(after or -1) + 1
        if youngest_revision(repository, env) < revision:
            return math.inf
        text = revision_identity(repository, revision, env).rpartition(" ")[2]
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
    return None


def _names_of(job: Job, listed: Iterable[Source]) -> list[str]:
    """Names of a job's sources: of a SubversionDir also those that only the bucket has any more."""
    if job.kind != SUBVERSION_DIR:
        return [job.name]
    names = [one.name for one in listed
             if one.kind == SUBVERSION and os.path.dirname(one.name) == job.name]
    with contextlib.suppress(Failure):
        names += repositories_in(job.name)
    return names or [job.name]


def standings(
    recovery: Recovery, now: Moment, grace: float, max_age: float
) -> Iterator[tuple[str, Standing]]:
    """(what its archives' names begin with, how it stands) of each source of the jobs, and of what
    else is in the bucket. Raises Failure: for a bucket that is gone, at the end. One listing, and
    one HEAD for each archive that looks cut off, and of each source from its newest on, till all
    is well.
    """
    store, prefix = recovery.store, recovery.prefix
    listed = catalogue(store, prefix=prefix, head=lambda key: {})  # as if they had no marks
    fault, sources = None, dict[Source, list[CatalogEntry]]()
    try:
        sources = group_by_source(listed, recovery.kinds)
    except NotFound as failure:
        fault = failure
    there = {archive_start(*source): found for source, found in sources.items()}
    named = {source_start(job.kind, name, prefix): (job, name)
             for job in recovery.jobs for name in _names_of(job, sources)}

    def ask(one: CatalogEntry, kind: str) -> CatalogEntry:
        objects = archive_objects(store, str(one)) if one.leftovers else one.archive.chunks
        archive = resolve_archive(str(one), objects, store.head) or one.archive
        return replace(one, archive=archive, kind=kind or one.kind)

    def look(start: str) -> Standing:
        by_age = sorted(there.get(start, ()), key=lambda one: -one.archive.modified)
        job, name = named.get(start, (None, start.removesuffix("-")))
        kind, where = (job.kind.removesuffix("Dir"), job.where) if job else ("", store.bucket)
        size = sum(one.archive.size for one in by_age)
        standing = Standing(kind, name, where, size, "unnamed", f"{len(by_age)} archive(s)")
        found = [ask(one, kind) for one in by_age if one.fault]
        if job:
            verdict = partial(judge, standing, job.cycle, now=now, grace=grace, max_age=max_age)
            with failures_at(where):
                standing = verdict(found)
            for one in by_age:
                if VERDICTS[standing.verdict] != EXIT_OK and not one.fault:
                    found.append(ask(one, kind))
                    standing = verdict(found)
            after = next((one.after for one in found if str(one) == standing.archive), "")
            if kind == SUBVERSION and (after or not found):
                standing = verdict(found, unstored=first_unstored(name, after, recovery.env))
        cut = tuple(f"{one}: {one.fault}" for one in found if one.fault)
        return standing._replace(unfinished=cut)

    with workers(store, _CATALOGUE_PARALLEL, "status") as pool:
        starts = {**there, **named}
        yield from zip(starts, pool.map(look, starts), strict=True)
    if fault:
        raise fault


# ==================================================================================================
# 18. Check
# ==================================================================================================

# What cron gives a job (Debian's cron, crontab(5)); a PATH in the crontab is not known here.
_CRON_PATH = "/usr/bin:/bin"

# Room that is little, bytes: for diff files, and for a dump on its way.
_LITTLE_ROOM, _LITTLE_TEMP_ROOM = 100_000_000, 1_000_000_000

# A key that is about to expire, days; a clock that is about to be refused, and is, seconds (S3
# refuses what is signed 15 minutes off its own clock).
_SOON, _SKEW_WARNING, _SKEW_ERROR = 30, 60, 900

# How long a database may take for the structure of its tables, seconds.
_DUMP_TIMEOUT = 60

# Programs, each by the names of which the first that is there is taken, and the kinds they are for.
_TOOLS = {
    ("tar",): (DIRECTORY,), ("svnadmin",): (SUBVERSION, SUBVERSION_DIR),
    ("svnlook",): (SUBVERSION, SUBVERSION_DIR), MYSQL_TOOLS: (MYSQL,),
    ("pg_dump",): (POSTGRESQL,), ("pg_dumpall",): (POSTGRESQL,),
}


@dataclass(frozen=True)
class Finding:
    """One line of `check`. level: "ok", "warning" or "error"; hint: what to do, "" for nothing."""

    level: str
    text: str
    hint: str = ""
    subject: str = ""


_ok, _warning, _error = (partial(Finding, level) for level in ("ok", "warning", "error"))


def findings_of(subject: str, check: Iterable[Finding]) -> Iterator[Finding]:
    """What a check finds, of this subject where it names no other. What ends it is a finding, too:
    no check keeps the others back."""
    try:
        with os_failures("check it"):
            for one in check:
                yield replace(one, subject=one.subject or subject)
    except Failure as failure:
        where = f"{failure.where}: " if failure.where else ""
        yield _error(f"{where}{failure.message}", failure.hint, subject)
    except Exception as error:
        yield _error("could not be checked, by a fault of this program:"
                     f" {type(error).__name__}: {error}", "please report it", subject)


def check_config(path: str, run: RunOptions, retries: Retries) -> Iterator[Finding]:
    """The rehearsal of one config, in the order in which a run would meet what is wrong.

    It makes no archive. It fills files in DiffDir and TempDir that have no name; stores objects
    under a key that begins like a Directory's, and deletes them; makes a bucket that is not there,
    and removes it again. All of that is left only where the right to delete is missing.
    """
    config = read_config(path)
    # First: a directive that is missing is often there, with a typo in it.
    for warning in config_warnings(config):
        yield _warning(warning)
    env = run.env
    settings, jobs = with_further_keyring(settings_of(config), env), jobs_of(config)
    for sentence in not_backed_up(config, jobs):
        yield _error(sentence)
    yield _ok(f"{path} asks for {len(jobs)} job{'s' * (len(jobs) != 1)}")
    diff_dir, is_usable = DiffDir(settings.diff_dir, run.now), True
    for subject, findings in (
        ("jobs", _jobs(settings, jobs, run.now)), ("TZ", _time_zone(env.get("TZ", ""))),
        ("tools", _tools(settings, jobs, env)), ("databases", _roles(jobs)),
        ("Compressor", _compressor(settings.compressor, env)),
        ("DiffDir", _room_in_diff_dir(settings.diff_dir, diff_dir)),
        ("TempDir", _room_in_temp_dir(settings, jobs)), ("hooks", _hooks(settings, jobs, env)),
        ("S3Keyfile", _key_file(settings)),
        ("bucket", _bucket(settings, run.clock, retries)),
        ("PingURL", _ping_urls(settings.ping_urls)),
        ("MetricsFile", _metrics_file(settings.metrics_file)),
        *(("GpgRecipient", _recipient(one, settings.gpg_keyring, run))
          for one in settings.gpg_recipients or [None]),
    ):
        for one in findings_of(subject, findings):
            is_usable = is_usable and (subject, one.level) != ("bucket", "error")
            yield one
    store = is_usable and open_store(settings.bucket, access_of(settings), run.clock, retries)
    for job in jobs:
        for one in findings_of(f"{job.kind} {job.name}", _source(job, diff_dir, env)):
            if one.level == "error" and RUN_BEFORE in dict((*settings.hooks, *job.hooks)):
                one = _ok(f"before RunBefore has run: {one.text}", subject=one.subject)
            yield one
        if store:
            yield from _history(Run(settings, run, diff_dir, store, ""), job)


def _jobs(settings: Settings, jobs: Sequence[Job], now: Moment) -> Iterator[Finding]:
    first: dict[str, Job] = {}
    due = 0
    for job in jobs:
        subject = f"{job.kind} {job.name}"
        start = source_start(job.kind, job.name, settings.prefix)
        other = first.setdefault(start, job)
        if other is not job:
            yield _error(f"{job.where}: the job at {other.where} writes to the same archives",
                         "take one of them out", subject)
        yield from findings_of(subject, _rotation(job, now))
        with contextlib.suppress(Failure):  # told already
            due += is_backup_day(job.cycle, now.day)
    yield _ok(f"due today: {due} of {len(jobs)}")


def _rotation(job: Job, now: Moment) -> Iterator[Finding]:
    slot_and_mode(job.cycle, now.day, job.kind in DUMPS)
    loss = new_year_loss(job.cycle, now.local().year, job.kind in DUMPS)
    if loss:
        yield _warning(
            f"{job.where}: at New Year the rotation starts anew, and only {loss[1]} restore points"
            f" are left, of {loss[0]} at the least before it",
            "choose Fulls and Diffs so that (Diffs + 1) × Fulls × Frequency divides 365 with a"
            " small rest, or HanoiCycle",
        )


def _time_zone(zone: str) -> Iterator[Finding]:
    if zone and not re.match(r":?(<[^>]+>|[A-Za-z]{3,})[+-]?\d", zone):  # tzset(3)
        with library("python-dateutil"):
            from dateutil import tz
        if tz.gettz(zone) is None:
            yield _warning(f"{zone} is not known here: days are those of UTC",
                           "correct the variable TZ, or install tzdata")


def _tools(settings: Settings, jobs: Sequence[Job], env: Mapping[str, str]) -> Iterator[Finding]:
    try:
        temp_file().close()
    except Failure as failure:
        yield _error(failure.message, failure.hint, "TMPDIR")
    kinds, compressor = {job.kind for job in jobs}, settings.compressor
    needed = [(shlex.split(compressor)[0],) if compressor else CODECS[0].commands]
    needed += [names for names, users in _TOOLS.items() if kinds.intersection(users)]
    needed += [("gpg",)] if settings.gpg_recipients else []
    for names in dict.fromkeys(needed):
        path = shutil.which(find_tool(names, env) or "", path=env.get("PATH"))
        if path is None:
            yield _error(f"is not on PATH ({env.get('PATH', '')})",
                         "install it, or set PATH in the crontab", names[0])
        elif names == ("tar",) and "GNU tar" not in run_tool((path, "--version"), env).output:
            yield _error(f"{path} is not GNU tar", "install GNU tar as tar", "tar")
        else:
            yield _ok(path, subject=names[0])


def _compressor(compressor: str | None, env: Mapping[str, str]) -> Iterator[Finding]:
    if not compressor:
        # README.md, Performance, has the figures.
        faster = [f'"{one}"' for one in ("igzip -3", "zstd -3") if find_tool(one.split()[:1], env)]
        if faster:
            yield _ok(f"none is set: {' or '.join(faster)} takes a tenth of gzip's time, a quarter"
                      " of pigz's on two processors")
    elif find_tool(shlex.split(compressor)[:1], env):  # else it is told
        check_compressor(compressor, env)
        yield _ok(f"what {compressor} writes can be read back")


def _roles(jobs: Sequence[Job]) -> Iterator[Finding]:
    """What a dump of one database lacks of its server."""
    for kind, parts, what, whole in (
        (POSTGRESQL, postgresql_parts, "roles and tablespaces", {""}),
        (MYSQL, mysql_parts, "users and their rights", {"--all-databases", "mysql"}),
    ):
        dumped = {parts(job.name)[1] for job in jobs if job.kind == kind}
        if dumped and not whole & dumped:
            yield _warning(f"{what} are in no backup: a dump of one database holds none",
                           f"add a line {kind} all", kind)


def _room_in_diff_dir(folder: str, diff_dir: DiffDir) -> Iterator[Finding]:
    try:
        with diff_dir.lock():
            pass
    except Failure as failure:
        if failure.status != EXIT_LOCKED:
            raise
        yield _warning(failure.message)
    largest = max((size_of_tree(entry.path) for entry in os.scandir(folder)), default=0)
    yield _room(folder, max(_LITTLE_ROOM, 2 * largest))


def _room_in_temp_dir(settings: Settings, jobs: Sequence[Job]) -> Iterator[Finding]:
    check_temp_dir(settings, jobs)
    if settings.temp_dir and any(job.use_temp_file for job in jobs):
        yield _room(settings.temp_dir, _LITTLE_TEMP_ROOM)


def _room(folder: str, little: int) -> Finding:
    """Raises Failure unless a file can be made and filled there; little: bytes."""
    hint = "it has to be there, with room, and writable for the user that runs this"
    with os_failures(f"write in {folder}", hint), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
    free = shutil.disk_usage(folder).free
    text = f"{folder} can be written, {size_text(free)} are free"
    return _warning(text, "make room there") if free < little else _ok(text)


def size_of_tree(path: str) -> int:
    """Bytes of all that is in a folder, or of a file; what cannot be read counts for nothing."""
    size, top = 0, os.path.join("/", path)
    files = (os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)
    for file in itertools.chain([top], files):
        with contextlib.suppress(OSError):
            size += os.lstat(file).st_size
    return size


def _hooks(settings: Settings, jobs: Sequence[Job], env: Mapping[str, str]) -> Iterator[Finding]:
    hooks = (*settings.hooks, *(hook for job in jobs for hook in job.hooks))
    for name, line in dict.fromkeys(hooks):
        yield replace(_shell_command(line.text, line.where, env), subject=name)


def _shell_command(command: str, where: str, env: Mapping[str, str]) -> Finding:
    """Whether the shell can read a command, and has its first program; it is not run."""
    read = run_tool(("/bin/sh", "-n", "-c", command), env)
    if read.status:
        return _error(f"{where}: {read.errors.strip()}", "correct the command")
    lexer = shlex.shlex(command, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    word = next((word for word in lexer if not re.match(r"\w+=", word)), ":")
    found = run_tool(("/bin/sh", "-c", 'command -v "$1"', "sh", word), env)
    if found.status and not re.search(r"[][$`*?(){};|&<>~=!]", word):
        return _error(f"{where}: {word} is not on PATH ({env.get('PATH', '')})",
                      "install it, or write its whole path")
    return _ok(command)


def _key_file(settings: Settings) -> Iterator[Finding]:
    path = settings.s3_keyfile
    if folder_root(settings.s3_endpoint) is not None:
        return
    if path is None:
        yield _ok("none: AWS's usual sources give the key")
        return
    read_key_file(path)
    is_open, hint = others_can_read(path), f"chmod 600 {shlex.quote(path)}"
    yield _warning(f"{path} can be read by others", hint) if is_open else _ok(f"{path} is private")


def _bucket(
    settings: Settings, clock: Callable[[], float], retries: Retries
) -> Iterator[Finding]:
    store = open_store(settings.bucket, access_of(settings), clock, retries)
    is_there = store.exists()
    if isinstance(store, S3Store) and (skew := store.skew()) is not None:
        yield _clock(skew)
    if not is_there:  # to know that it can be made, it is made and taken away again
        store.create()
        yield from findings_of("", _probe(store, settings.prefix, settings.safe_replace))
        with contextlib.suppress(Failure):  # without the right to remove it, it stays
            store.remove()
        now = "was not there, and is there now" if store.exists() else "is not there"
        yield _ok(f"{store.bucket} {now}; it can be made: the first run makes it")
    elif isinstance(store, S3Store):
        yield from _bucket_facts(store.bucket, store.about())
    else:
        yield _ok(f"{store.bucket} is a folder of {settings.s3_endpoint}")
        root = folder_root(settings.s3_endpoint) or ""
        yield _room(os.path.join(root, store.bucket), _LITTLE_TEMP_ROOM)
    if is_there:
        yield from _probe(store, settings.prefix, settings.safe_replace)


def _clock(skew: float) -> Finding:
    """skew: seconds that the clock of this machine is ahead of the server's."""
    text = f"{abs(skew):.0f} seconds {'ahead of' if skew > 0 else 'behind'} the server's"
    if abs(skew) < _SKEW_WARNING:
        return _ok(text, subject="clock")
    tell = _error if abs(skew) >= _SKEW_ERROR else _warning
    return tell(text, "set the clock of this machine", "clock")


def _bucket_facts(bucket: str, facts: BucketFacts) -> Iterator[Finding]:
    yield _ok(f"{bucket} is in {facts.region or 'an unknown region'}")
    if facts.versioned:
        yield _warning("it keeps old versions, which cost as much as new ones",
                       "let a lifecycle rule expire noncurrent versions")
    if facts.retention:
        yield _warning(f"object lock keeps what is stored ({facts.retention}): until then an"
                       " archive that is replaced or deleted stays, as an old version",
                       "plan room for it")
    if facts.unknown:
        yield _ok(f"the service does not say whether it has {' and '.join(facts.unknown)}")


def _probe(store: Store, prefix: str, copied: bool) -> Iterator[Finding]:
    """An object under as awkward a key as names can make, there and away again."""
    name = f"/s3napback-check//a b%41+?&=é:{secrets.token_hex(4)}"
    try:
        _store_and_fetch(store, archive_start(DIRECTORY, name, prefix), copied)
    except Failure as failure:
        fault = failure
        with contextlib.suppress(Failure):  # else the slash is not at fault
            if not prefix:
                _store_and_fetch(store, archive_start(DIRECTORY, name[1:]), copied)
                fault = Failure(
                    f"the service does not keep keys that begin with a slash: {failure.message}",
                    "set Prefix, to the name of this machine for example",
                )
        raise fault from None
    yield _ok(f"a probe object was stored{', copied' if copied else ''}, read, listed and deleted")


def _store_and_fetch(store: Store, archive: str, copied: bool) -> None:
    """Raises Failure unless an object comes back from the store as it went there."""
    keys = [chunk_key(archive, n) for n in range(2 if copied else 1)]
    data, mark, back = secrets.token_bytes(1000), secrets.token_hex(8), Buffer(1000)
    try:
        store.put(keys[0], data, {f"{META}archive": mark})
        if copied:
            store.copy(*keys)
        found = [store.fetch(keys[0], back), *(store.head(key) for key in keys)]
        if bytes(back) != data:
            raise Failure("a probe object came back other than it was stored",
                          "this service cannot be trusted with backups")
        if any((one or {}).get(f"{META}archive") != mark for one in found):
            raise Failure("the service does not keep the metadata of a probe object",
                          "use another one: without metadata no archive is known to be complete")
        if [item.key for item in store.iter_objects(chunk_prefix(archive))] != keys:
            raise Failure("a probe object was stored, and is not listed",
                          "this service cannot be trusted with backups")
    except BaseException:
        with contextlib.suppress(Failure), store.retries.once():  # the first fault is to be told
            store.delete(keys)
        raise
    store.delete(keys)
    if is_known_to_be_there(store, keys[0]):
        raise Failure(f"the probe object {keys[0]} could not be deleted", "delete it by hand")


def _sources_of(job: Job) -> list[tuple[str, str]]:
    """(kind, name) of what a job backs up. Raises Failure where that cannot be read."""
    if job.kind == SUBVERSION_DIR:
        return [(SUBVERSION, name) for name in repositories_in(job.name)]
    return [(job.kind, job.name)]


def _history(run: Run, job: Job) -> Iterator[Finding]:
    with contextlib.suppress(Failure):  # what is not there to be read is told of the source
        for kind, name in _sources_of(job):
            yield from findings_of(f"{kind} {name}", _found_in_bucket(run, Plan(job, kind, name)))


def _found_in_bucket(run: Run, plan: Plan) -> Iterator[Finding]:
    """What the bucket has of a source from another host; a diff file of the Perl script."""
    found = list[tuple[str, str, list[StoredObject]]]()
    with contextlib.suppress(NotFound):  # the first run makes the bucket
        found += run.archives_of(plan)
    by_date = sorted(found, key=lambda one: max(item.modified for item in one[2]))
    for archive, _, objects in by_date[-1:]:
        last = resolve_archive(archive, objects, run.store.head)
        own = run.options.host
        if last and (host := last.metadata.get("host", own)) != own:
            is_todays = last.made_on(run.options.now) == run.today.isoformat()
            yield (_error if is_todays else _warning)(
                f"{archive} is of the host {host}, which stores in this bucket, too",
                "give each machine a Bucket of its own, or a Prefix",
            )
    with contextlib.suppress(Failure):  # of a source that is not there, which is told of it
        facts = facts_of(run, replace(plan, mode=FULL))
        if facts.written and not facts.sidecars:
            fulls = [objects for _, mode, objects in by_date if mode == FULL]
            size = sum(item.size for item in fulls[-1]) if fulls else (
                sum(map(size_of_tree, expand_name(plan.name, run.options.env)))
            )
            yield _ok("the diff file is the Perl script's: the next archive holds everything, once:"
                      f" about {size_text(size)}")


def _ping_urls(urls: Sequence[str]) -> Iterator[Finding]:
    for url in urls:
        # Not the URL itself: to healthchecks any request for it is a signal, a HEAD, too.
        server = urllib.parse.urlsplit(url)._replace(path="/", query="")
        try:
            in_time(send_request, server.geturl(), None, "HEAD")
        except Exception as error:
            if not hasattr(error, "code"):  # of an answer, whatever it is
                yield _warning(f"{server.netloc} does not answer: {no_answer(error)}")
                continue
        yield _ok(f"{server.netloc} answers")


def _metrics_file(path: str | None) -> Iterator[Finding]:
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    yield _room(folder, _LITTLE_ROOM)
    mode = os.stat(folder).st_mode
    for is_wrong, text in (
        (not path.endswith(".prom"), f"{path}: node_exporter reads no file but *.prom"),
        (mode & stat.S_IWOTH, f"{folder} can be written by everybody"),
        (not mode & (stat.S_IXGRP | stat.S_IXOTH), f"{folder} is closed to node_exporter"),
    ):
        if is_wrong:
            yield _warning(text)


def _recipient(recipient: str | None, keyring: str | None, run: RunOptions) -> Iterator[Finding]:
    if recipient is None:
        yield _ok("none: archives are not encrypted")
        return
    check_recipient(recipient, keyring, run.env)
    with run_filter(gpg_stage([recipient], keyring), [b"probe"], run.env) as output:
        sealed = b"".join(output)
    if not is_openpgp(sealed) or b"probe" in sealed:
        raise Failure(f"gpg does not encrypt for {recipient}", "try it by hand: gpg -r … -e")
    # (what ends first, what gpg encrypts with), of all keys that it could take
    usable = [(min(key, sub, key=_end_of), key)
              for key in _public_keys(recipient, keyring, run.env) for sub in encryption_keys(key)]
    if not usable:  # it is a group of gpg.conf
        yield _ok(f"gpg encrypts for {recipient}")
        return
    ending, key = max(usable, key=lambda one: _end_of(one[0]))
    if _end_of(ending) - run.now.epoch < _SOON * 86400:
        what = "key" if ending is key else "subkey"
        yield _warning(f"the {what} {ending['keyid']} of {recipient} expires on"
                       f" {_day_of(ending)}", f"run: {edit_key(key, keyring)} expire")
    else:
        yield _ok(f"gpg encrypts for {recipient} with {key['keyid']}")


def _source(job: Job, diff_dir: DiffDir, env: Mapping[str, str]) -> Iterator[Finding]:
    if job.kind == DIRECTORY:
        yield from _directory_source(job, diff_dir, env)
    elif job.kind == COMMAND:
        yield _shell_command(job.command, job.where, env)
        bare = re.sub(r"""'[^']*'|"(?:\\.|[^"\\])*\"""", "", job.command)
        if re.search(r"(?<![|>])\|(?!\|)", bare) and "pipefail" not in job.command:
            yield _warning("of a pipe in it only the last status counts: half a backup may pass for"
                           " a whole one", "write bash -o pipefail -c '…'")
    elif job.kind in (MYSQL, POSTGRESQL):
        yield _database_source(job, env)
    else:
        sources = _sources_of(job)
        for kind, name in sources:
            yield _ok(f"answers, at revision {youngest_revision(name, env)}",
                      subject=f"{kind} {name}")
        if not sources:
            yield _warning("there is no repository in it", "correct the name")


def _directory_source(job: Job, diff_dir: DiffDir, env: Mapping[str, str]) -> Iterator[Finding]:
    for pattern in with_patterns_read(job).patterns_read:
        if plain := usable_pattern(pattern):
            yield _warning(f"ExcludeFrom: {pattern} excludes nothing", f"write {plain}")
    names = expand_name(job.name, env)
    survey = inspect_names(names, diff_dir.last_seen(job.name))
    read = mounts_of(names, job.one_file_system)
    others = [place for place, mount in mounts_of(names) if (place, mount) not in read]
    if outer := [p for p in others if not any(name_in(p, o) for o in others)]:
        yield _ok(f"by OneFileSystem what is in {', '.join(outer)} is left out")
    for text in survey.faults:
        yield _error(text, "mount it, or see who may read it")
    yield from map(_error, survey.links)
    yield from map(_warning, [*survey.warnings, *tags_among(names, job)])
    if not survey.faults and not survey.links:
        yield _ok("can be read")


def _database_source(job: Job, env: Mapping[str, str]) -> Finding:
    """A dump of the structure alone: the login, the rights and the server, in little time."""
    if job.kind == MYSQL:
        stage = mysql_stage(job.name, (*job.mysql_options, "--no-data"), env)
    else:
        stage = postgresql_stage(job.name)
        stage = Stage((stage.argv[0], "--schema-only", *stage.argv[1:]))
    done = run_tool(stage.argv, env, timeout=_DUMP_TIMEOUT)
    tail = done.output[-_TAIL:].encode("utf-8", "surrogateescape")
    end = StageResult(stage, done.status, tuple(done.errors.strip().splitlines()), tail=tail)
    if not end.is_whole:
        raise Failure(str(end), end.hint or "try the command by hand")
    if done.status:
        return _warning(f"with --force, {end}", "mend what it names: it is not in the dump")
    return _ok("answers")


def check_as_cron(script: str, file: str, names: Sequence[str]) -> Iterator[Finding]:
    """What the script says when it is called as cron calls it (crontab(5)): by its first line, by
    sh, in the home folder. Raises Failure for a wrong call, or where cron runs nothing."""
    try:
        user = pwd.getpwuid(os.geteuid())
    except KeyError as error:
        why = f"user {os.geteuid()} has no entry in /etc/passwd: cron runs nothing for such a user"
        raise Failure(why, "run this as the user whose crontab it is") from error
    env = {"PATH": _CRON_PATH, "HOME": user.pw_dir, "LOGNAME": user.pw_name, "SHELL": "/bin/sh"}
    call = shlex.join([script, "check", "--json", *(["-c", file] if file else []), *names])
    with os_failures(f"run anything in {user.pw_dir}, the home of {user.pw_name}, as cron does"):
        os.stat(os.path.join(user.pw_dir, "."))
    # cron has no terminal on which a password could be typed.
    done = run_tool(("/bin/sh", "-c", call), env, cwd=user.pw_dir, new_session=True)
    last = (done.errors.strip().splitlines() or [f"it ended with status {done.status}"])[-1]
    if done.status == EXIT_USAGE and not done.output:
        raise Failure(last.removeprefix("s3napback: "), status=EXIT_USAGE)
    try:
        findings = [Finding(**finding) for finding in json.loads(done.output)]
    except ValueError:
        hint = f"try by hand: cd; env -i PATH={_CRON_PATH} HOME={user.pw_dir} {call}"
        if done.status == 126:  # of a shell: found, and not executable
            hint = f"chmod +x {shlex.quote(script)}"
        yield _error(f"{script} does not run: {last}", hint, "cron")
        return
    if file and not os.path.isabs(file):
        yield _warning(f"{file} is not a whole path, and cron starts in {user.pw_dir}",
                       f"in the crontab, write {os.path.abspath(file)}", "cron")
    yield from findings


# ==================================================================================================
# 19. Log
# ==================================================================================================

# log4perl's names for Python's numbers; the numbers of all level names: those of Log::Dispatch
# (min_level, max_level) between them are its own ("notice" lets no INFO through).
_LEVEL_NAMES = {1: "ALL", 5: "TRACE", 10: "DEBUG", 20: "INFO", 30: "WARN", 40: "ERROR",
                50: "FATAL", 1000: "OFF"}
_LEVELS = {name: number for number, name in _LEVEL_NAMES.items()} | {
    "NOTICE": 25, "WARNING": 30, "ERR": 40, "CRIT": 45, "CRITICAL": 45, "ALERT": 46,
    "EMERG": 50, "EMERGENCY": 50,
}

# The Python logger that stands for log4perl's root: everything of ours is below it, and nothing of
# boto3's.
_LOG_ROOT = "Backup"


def print_stderr(text: str, keep: str = "") -> None:
    """A line to standard error, which may be closed. keep: control characters that are meant."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(printable(text, keep) + "\n")
        sys.stderr.flush()


def tell(*sentences: object) -> None:
    """What the user has to know, to standard error."""
    for sentence in sentences:
        print_stderr(f"s3napback: {sentence}")


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------

# The pattern of each layout; Simple and Noop have no other.
_DEFAULT_PATTERN = "%d %c %p %m%n"
_LAYOUTS = {"": _DEFAULT_PATTERN, "PatternLayout": "%m%n", "PatternLayout::Multiline": "%m%n",
            "SimpleLayout": "%p - %m\n", "NoopLayout": "%m"}

_CONVERSION = re.compile(r"%(-?)(\d{0,5})(?:\.(\d{1,5}))?([a-zA-Z%])(?:\{([^}]*)\})*")

# SimpleDateFormat's quotes and letters (Java), those that log4perl knows. Of each letter, what
# strftime calls it.
_DATE_PART = re.compile(r"'((?:''|[^'])*)'|(([GyMdhHmsSeEDazZ])\3*)|(.)", re.DOTALL)
_DATE_CODES = {"y": "%y", "M": "%m", "d": "%d", "h": "%I", "H": "%H", "m": "%M", "s": "%S",
               "D": "%j", "a": "%p", "Z": "%z", "z": "%Z", "G": "AD"}
_DATE_NAMES = {"": "yyyy/MM/dd HH:mm:ss", "ABSOLUTE": "HH:mm:ss,SSS",
               "DATE": "dd MMM yyyy HH:mm:ss,SSS", "ISO8601": "yyyy-MM-dd HH:mm:ss,SSS",
               "APACHE": "[EEE MMM dd HH:mm:ss yyyy]"}
_PROGRAM_START = time.time()


class PatternFormatter(logging.Formatter):
    """log4perl's PatternLayout; the line it makes carries its own end (%n).

    multiline: the pattern is that of each line of a message; utc: of dates.
    unknown: the parts of the pattern that are not understood. They are shown as they stand.
    """

    def __init__(
        self, pattern: str = _DEFAULT_PATTERN, *, multiline: bool = False, utc: bool = False
    ) -> None:
        super().__init__()
        self._pattern = pattern.replace("\\n", "\n").replace("\\r", "\r")
        self._multiline, self._zone = multiline, timezone.utc if utc else None
        self._last = _PROGRAM_START
        self.unknown = []
        for match in _CONVERSION.finditer(self._pattern):
            if match[4] not in "cCdFHlLmMnpPrRtTxX%":
                self.unknown.append(match[0])

    def format(self, record: logging.LogRecord) -> str:
        message = without_controls(record.getMessage())
        if "%m%n" in self._pattern:
            message = message.removesuffix("\n")
        lines = message.splitlines() if self._multiline else [message]
        text = "".join(self._line(record, line) for line in lines)
        if record.exc_info:
            text = text.rstrip("\n") + "\n" + self.formatException(record.exc_info) + "\n"
        self._last = record.created
        return text

    def _line(self, record: logging.LogRecord, message: str) -> str:
        made, end = "", 0
        for match in _CONVERSION.finditer(self._pattern):
            left, width, limit, letter, argument = match.groups("")
            made += self._pattern[end : match.start()]
            end = match.end()
            fields = self._fields(record, argument)
            fields["m"] = _message(message, argument, len(made) - made.rfind("\n") - 1)
            text = fields.get(letter, match[0])[: int(limit) if limit else None]
            made += text.ljust(int(width or 0)) if left else text.rjust(int(width or 0))
        return made + self._pattern[end:]

    def _fields(self, record: logging.LogRecord, argument: str) -> dict[str, str]:
        at = datetime.fromtimestamp(record.created, self._zone).astimezone(self._zone)
        parts, line = record.name.split("."), str(record.lineno)
        count = int(argument) if re.fullmatch("[0-9]{1,3}", argument) else 0
        return {
            "d": _DATE_PART.sub(partial(_date_part, at), _DATE_NAMES.get(argument, argument)),
            "c": ".".join(parts[-count:]), "C": "::".join(parts[-count:]),
            "F": "/".join(record.pathname.split("/")[-count:]), "L": line,
            "M": record.funcName or "", "l": f"{record.funcName} {record.filename} ({line})",
            "T": f"{record.funcName}() called at {record.pathname} line {line}",
            "p": _LEVEL_NAMES.get(record.levelno, record.levelname)[: count or None],
            "r": str(int((record.created - _PROGRAM_START) * 1000)),
            "R": str(int((record.created - self._last) * 1000)),
            "H": socket.gethostname(), "P": str(record.process), "n": "\n", "%": "%",
            "t": "N/A", "x": "[undef]", "X": "[undef]",
        }


def _message(message: str, argument: str, column: int) -> str:
    """%m{chomp}, %m{indent=2}, %m{indent} (to the column where the message begins), or both."""
    wanted = dict(part.partition("=")[::2] for part in argument.replace(" ", "").split(","))
    if "chomp" in wanted:
        message = message.rstrip("\n")
    if "indent" in wanted:
        fixed = re.fullmatch("[0-9]{1,3}", wanted["indent"])
        message = message.replace("\n", "\n" + " " * (int(fixed[0]) if fixed else column))
    return message


def _date_part(at: datetime, part: re.Match[str]) -> str:
    quoted, run, letter, other = part.groups("")
    if not letter:
        return other or quoted.replace("''", "'")
    if letter == "E" or run.startswith("MMM"):
        name = at.strftime("%A" if letter == "E" else "%B")
        return name if len(run) >= 4 else name[:3]
    if letter == "S":
        return at.strftime("%f")[: len(run)]
    if letter == "e":
        text = str(int(at.timestamp()))
    else:
        text = at.strftime("%Y" if run.startswith("yyyy") else _DATE_CODES.get(letter, run))
    return str(int(text)).zfill(2 if run == "y" else len(run)) if text.isdecimal() else text


# --------------------------------------------------------------------------------------------------
# Appenders
# --------------------------------------------------------------------------------------------------


def _is_on(text: str) -> bool:
    """Perl's truth, but for log4perl's "false"."""
    return is_true(text) and text.lower() != "false"


def _perl_integer(text: str) -> int:
    """0… is octal, and 10_000_000 is one number. Raises ValueError."""
    return int(text, 8 if text.startswith("0") else 10)


def _reason(error: BaseException | None) -> str:
    return str(getattr(error, "strerror", None) or error)


class _Appender(logging.Handler):
    """A handler whose own failures are told once, on standard error, and never raised."""

    terminator = ""  # the formatter makes whole lines
    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._tell(f"write to the log {self.get_name()}")

    def _tell(self, doing: str) -> None:
        """Tells of the error that is handled just now."""
        if not self._told:
            self._told = True
            tell(f"cannot {doing}: {_reason(sys.exc_info()[1])}")

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # told above
            super().close()


class _Screen(_Appender):
    """Writes above a progress bar, to whatever standard error or output is just then."""

    def __init__(self, options: Mapping[str, str], colors: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self._is_stderr = _is_on(options.get("stderr", "1"))
        self._colors = colors or {}

    def emit(self, record: logging.LogRecord) -> None:
        level = _LEVEL_NAMES.get(record.levelno, "INFO")
        stream = sys.stderr if self._is_stderr else sys.stdout
        if stream is None:
            return
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # closed: there is no one to tell
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            if level in self._colors and stream.isatty():
                text = f"\x1b[{self._colors[level]}m{text}\x1b[0m"
            bars = sys.modules.get("tqdm")
            if bars and stream.isatty():
                bars.tqdm.write(text, file=stream, end="")
            else:
                stream.write(text)
                stream.flush()


# How Log::Dispatch::File opens a file, by its `mode`.
_FILE_MODES = {"append": "a", ">>": "a", "write": "w", "clobber": "w", ">": "w"}

# When Log::Dispatch::FileRotate begins a new file: its DatePattern, in lower case, as the pattern
# of strftime whose value changes then.
_PERIODS = {"yyyy-mm": "%Y-%m", "yyyy-ww": "%G-%V"} | {
    day + hours: "%Y-%m-%d" + value
    for day in ("yyyy-dd", "yyyy-mm-dd")
    for hours, value in (("", ""), ("-a", "%p"), ("-hh", "%H"), ("-hh-mm", "%H:%M"))
}


class LogTail(_Appender):
    """Keeps the last records of the log."""

    # Bytes: what healthchecks takes ("Attaching logs"); records, of 45 bytes and more.
    _MAX_BYTES, _MAX_RECORDS = 100_000, 2500

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=self._MAX_RECORDS)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def text(self) -> bytes:
        """The last whole lines of them, in UTF-8."""
        text = "".join(["\n", *map(PatternFormatter().format, self.records)])
        data = text.encode("utf-8", "backslashreplace")
        return data[-self._MAX_BYTES - 1 :].partition(b"\n")[2]


class JsonFormatter(logging.Formatter):
    """An object a line; the outcome of a job is a part of it."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone()
        return json.dumps({
            "time": at.isoformat(timespec="milliseconds"),
            "level": _LEVEL_NAMES.get(record.levelno, record.levelname), "category": record.name,
            "message": printable(super().format(record)), **getattr(record, "job", {}),
        }) + "\n"


class _LogFile(
    _Appender, logging.handlers.RotatingFileHandler, logging.handlers.WatchedFileHandler
):
    """Made anew where it was moved; rotated before it grows over `size` bytes (0: never), and where
    the value of its DatePattern changes.

    The library's rotating handler would not call the watching one's __init__; what it would have
    set besides are the two numbers at the end.
    """

    def __init__(self, options: Mapping[str, str], size: str = "0") -> None:
        path, mode = options["filename"], options.get("mode", "append")
        if mode not in _FILE_MODES:
            raise ValueError(f"mode {mode} is unknown")
        if _is_on(options.get("mkpath", "")):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        is_new = not os.path.exists(path)
        with open(path, _FILE_MODES[mode], encoding="utf-8", errors="replace") as file:
            if options.get("umask") and is_new:
                os.chmod(path, 0o666 & ~_perl_integer(options["umask"]))
            if options.get("header_text"):
                file.write(options["header_text"] + "\n")
        patterns = [re.sub("[-:. ]+", "-", pattern.strip()).lower()
                    for pattern in options.get("DatePattern", "").split(";") if pattern.strip()]
        if unknown := set(patterns) - set(_PERIODS):
            raise ValueError(f"DatePattern {unknown.pop()} is unknown")
        self._periods = " ".join(_PERIODS[pattern] for pattern in patterns)
        logging.handlers.WatchedFileHandler.__init__(
            self, path, encoding="utf-8", errors="surrogateescape"
        )
        self.maxBytes = _perl_integer(options.get("size", size))
        self.backupCount = max(1, _perl_integer(options.get("max", "1")))

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        self.reopenIfNeeded()  # another run, or logrotate, has moved it
        self.stream = self.stream or self._open()  # its folder was away, and is back
        file = os.stat(self.baseFilename)
        periods = {datetime.fromtimestamp(at).strftime(self._periods)
                   for at in (file.st_mtime, record.created)}
        return len(periods) > 1 or bool(super().shouldRollover(record))

    def doRollover(self) -> None:
        try:
            super().doRollover()
        except OSError:  # a folder of root's; lines are worth more than a small file
            self.maxBytes = 0
            self._tell(f"rotate the log {self.get_name()}")


class _Mail(_Appender, logging.handlers.BufferingHandler):
    """Keeps its lines, and sends them as one mail when it is closed."""

    # Longest that a mail keeps the program from ending, seconds.
    _TIMEOUT = 30

    def __init__(self, options: Mapping[str, str], server: str = "") -> None:
        super().__init__(capacity=sys.maxsize)
        self._options, self._server = options, options.get("smtp", server)

    def flush(self) -> None:
        records, self.buffer = self.buffer, []
        text = "".join(map(self.format, records))
        try:
            if text:
                self._send(text.encode("utf-8", "backslashreplace").decode())
        except (OSError, ValueError, Failure):  # smtplib's errors are OSErrors
            self._tell(f"send the log to {self._options['to']}")

    def _send(self, text: str) -> None:
        import smtplib
        from email.message import EmailMessage

        options, mail = self._options, EmailMessage()
        to = re.sub(r"[\[\]'\"\r\n]", " ", options["to"])
        mail["To"] = ", ".join(part for part in re.split(r"[,;\s]+", to) if part)
        mail["From"] = options.get("from", "").strip() or f"root@{socket.gethostname()}"
        mail["Subject"] = " ".join(options.get("subject", "s3napback").split())
        mail.set_content(text)
        sendmail = shutil.which("sendmail", path="/usr/sbin:/usr/lib:/usr/bin")
        if sendmail and not self._server:
            words = (sendmail, "-t", "-oi")
            done = run_tool(words, os.environ, input=mail.as_bytes(), timeout=self._TIMEOUT)
            done.required(sendmail)
            return
        host, _, port = (self._server or "localhost").partition(":")
        port = port or options.get("port", "25")
        with smtplib.SMTP(host, int(port), timeout=self._TIMEOUT) as smtp:
            if _is_on(options.get("tls_required", "")):
                smtp.starttls()
            if "authid" in options:
                smtp.login(options["authid"], options.get("authpwd", ""))
            smtp.send_message(mail)


class _Syslog(_Appender, logging.handlers.SysLogHandler):
    append_nul = False

    def __init__(self, options: Mapping[str, str]) -> None:
        facility, where = options.get("facility", "user"), options.get("socket", "unix")
        if facility not in self.facility_names:
            raise ValueError(f"facility {facility} is unknown")
        where = "/dev/log" if where == "unix" else where
        if where.startswith("/") and not os.path.exists(where):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
        super().__init__(where if where.startswith("/") else ("localhost", 514), facility)
        self.ident = options.get("ident", "s3napback") + ": "


# Log::Log4perl::Appender::ScreenColoredLevels, its defaults, as ANSI's numbers.
_COLORS = {"TRACE": 33, "INFO": 32, "WARN": 34, "ERROR": 35, "FATAL": 31}

# Of each class of appenders, what makes one of its options (it may raise OSError or ValueError),
# and the options that it uses.
AppenderMaker: TypeAlias = "Callable[[Mapping[str, str]], logging.Handler]"
_ON_SCREEN, _TO_FILE = ("stderr",), ("filename", "mode", "umask", "header_text", "mkpath")
_BY_MAIL = ("to", "from", "subject")
_CLASSES: Mapping[str, tuple[AppenderMaker, Sequence[str]]] = {
    "Log::Log4perl::Appender::Screen": (_Screen, _ON_SCREEN),
    "Log::Log4perl::Appender::ScreenColoredLevels": (partial(_Screen, colors=_COLORS), _ON_SCREEN),
    "Log::Dispatch::Screen": (_Screen, _ON_SCREEN),
    "Log::Log4perl::Appender::File": (_LogFile, _TO_FILE),
    "Log::Dispatch::File": (_LogFile, _TO_FILE),
    "Log::Dispatch::FileRotate": (
        partial(_LogFile, size="10_000_000"),
        ("filename", "mode", "umask", "size", "max", "DatePattern"),
    ),
    "Log::Dispatch::Email::MailSender": (
        partial(_Mail, server="localhost"),
        (*_BY_MAIL, "smtp", "port", "authid", "authpwd", "tls_required"),
    ),
    "Log::Dispatch::Email::MailSend": (_Mail, _BY_MAIL),
    "Log::Dispatch::Syslog": (_Syslog, ("ident", "facility", "socket")),
}

# Those that ask for what is done anyway: lines are UTF-8, written at once, and a file that was
# moved is made anew. log4perl's own appenders pass min_level over.
_GRANTED = {"name", "autoflush", "syswrite", "utf8", "binmode", "recreate", "lock", "min_level",
            "recreate_check_interval", "close_after_write"}


# --------------------------------------------------------------------------------------------------
# The logconfig
# --------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """A filter for messages whose level lies between these two, or for all others."""

    first: int = _LEVELS["ALL"]
    last: int = _LEVELS["OFF"]
    accept: bool = True

    def filter(self, record: logging.LogRecord) -> bool:
        return (self.first <= record.levelno <= self.last) == self.accept


class Appender(NamedTuple):
    """Of its options, `make` makes a handler."""

    make: AppenderMaker
    where: str  # FILE:LINE
    options: Mapping[str, str]
    formatter: PatternFormatter
    filters: Sequence[Levels]  # which its messages must pass


# How properties begin that need no `log4perl.` before them.
_BARE = ("rootLogger", "logger.", "category.", "appender.")


class LogConfig:
    """What a logconfig says. name: of the file, for the problems; env: of `${VARIABLE}`s that the
    file gives no value. Whatever the text is, it raises nothing."""

    def __init__(self, text: str = "", name: str = "", env: Mapping[str, str] = {}) -> None:
        self._name = name
        # What is understood is taken out of the entries; what is left in them at the end was not.
        self._entries: dict[str, str] = {}  # by their names without `log4perl.`
        self._lines: dict[str, int] = {}  # where they stand
        # Dotted name ("" for the root) → (level, names of appenders), both as far as given.
        self.loggers: dict[str, tuple[int | None, Sequence[str]]] = {}
        self.closed: set[str] = set()  # whose messages do not go on to their parents
        self.appenders: dict[str, Appender] = {}  # those that can be used, by name
        self.problems: list[str] = []  # sentences
        self._read_properties(text, dict(env))
        self._read_loggers()
        self._threshold = self._levels("threshold", "")
        self._utc = _is_on(self._entries.pop("utcDateTimes", ""))
        self._filters = {key.partition(".")[2]: self._filter(key) for key in self._keys("filter")}
        for key in self._keys("appender"):
            self._read_appender(key)
        for key in self._entries:
            if not key.endswith(".min_level"):  # of an appender that is not there
                self._wrong(key, f"{key} is not understood; it is passed over")
        used = {appender for _, names in self.loggers.values() for appender in names}
        if not used & set(self.appenders) and (self.loggers or self.appenders or self.problems):
            self.problems.append(f"{name}: no appender can be used; logging to the screen only")

    def _wrong(self, key: str, problem: str) -> None:
        self.problems.append(f"{self._name}:{self._lines[key]}: {problem}")

    def _read_properties(self, text: str, variables: dict[str, str]) -> None:
        joined = ""
        for number, line in enumerate(text.splitlines(), 1):
            joined += "" if line.strip().startswith(("#", ";", "!")) else line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            match = re.fullmatch(r"([^=\s]+)\s*=\s*(.*)", joined)
            name, value = match.groups() if match else (joined, "")
            key = re.sub(r"^(log4perl|log4j|l4p)\.", "", name).replace("::", ".")
            self._lines[key] = number
            if joined and not match:
                self._wrong(key, "this line is no NAME = VALUE")
            for variable in re.findall(r"\$\{([^}]*)\}", value):
                known = variables.get(variable.strip())
                if known is None:
                    self._wrong(key, f"the variable {variable} has no value, neither in this file"
                                     " nor in the environment")
                value = value.replace(f"${{{variable}}}", known or "")
            variables[name] = value
            if match and (key != name or key.startswith(_BARE)):  # else it is a variable
                self._add(key, value)
            joined = ""

    def _add(self, key: str, value: str) -> None:
        if re.match(r"sub\s*\{", value):
            self._wrong(key, f"Perl code in {key} is not run")
            return
        if key in self._entries and key.endswith(".to"):
            value = f"{self._entries[key]}, {value}"
        elif key in self._entries and key.count(".") != 1:
            self._wrong(key, f"{key} is given again; the last value counts")
        self._entries[key] = value

    def _keys(self, head: str) -> list[str]:
        return [key for key in self._entries if re.fullmatch(rf"{head}\.[^.]+", key)]

    def _below(self, key: str) -> list[str]:
        return [entry for entry in self._entries if entry.startswith(f"{key}.")]

    def _drop(self, key: str, problem: str) -> None:
        """Something of an unknown class, with all that is below it."""
        self._wrong(key, problem)
        for entry in self._below(key):
            del self._entries[entry]

    def _level(self, key: str, word: str) -> int | None:
        number = _LEVELS.get(word.upper())
        if number is None and word:
            self._wrong(key, f"level {word} is unknown")
        return number

    def _levels(self, first: str, last: str, accept: bool = True) -> Levels:
        """Those between the ones that two properties give; "" for a property that there is not."""
        least, most = (self._level(key, self._entries.pop(key, "")) for key in (first, last))
        return Levels(least or _LEVELS["ALL"], most or _LEVELS["OFF"], accept)

    def _read_loggers(self) -> None:
        for key in list(self._entries):
            head, _, tail = key.partition(".")
            if head in ("logger", "category") or key.lower() in ("rootlogger", "rootcategory"):
                level, *names = (word.strip() for word in self._entries.pop(key).split(","))
                self.loggers[tail] = (self._level(key, level), [name for name in names if name])
                for name in self.loggers[tail][1]:
                    if f"appender.{name}" not in self._entries:
                        self._wrong(key, f"appender {name} is used and not defined")
            elif head == "additivity" and not _is_on(self._entries.pop(key)):
                self.closed.add(tail)

    def _filter(self, key: str) -> Levels:
        kind = self._entries.pop(key)
        accept = _is_on(self._entries.pop(f"{key}.AcceptOnMatch", "1"))
        if kind.endswith("::LevelRange"):
            return self._levels(f"{key}.LevelMin", f"{key}.LevelMax", accept)
        if kind.endswith("::LevelMatch"):
            level = self._levels(f"{key}.LevelToMatch", "").first
            return Levels(level, level, accept)
        self._drop(key, f"filter class {kind} is unknown; it lets everything pass")
        return Levels()

    def _read_appender(self, key: str) -> None:
        kind, name = self._entries.pop(key), key.partition(".")[2]
        if kind not in _CLASSES:
            self._drop(key, f"appender class {kind} is unknown; {name} is left out")
            return
        make, used = _CLASSES[kind]
        filters = [self._threshold, self._levels(f"{key}.Threshold", "")]
        if kind.startswith("Log::Dispatch"):
            filters.append(self._levels(f"{key}.min_level", f"{key}.max_level"))
        chosen = self._entries.pop(f"{key}.Filter", "")
        if chosen and chosen not in self._filters:
            self._wrong(f"{key}.Filter", f"filter {chosen} is not defined; everything passes")
        filters.append(self._filters.get(chosen, Levels()))
        formatter = self._formatter(key)
        options = {}
        for entry in self._below(key):
            option = entry.removeprefix(f"{key}.")
            if option in used:
                options[option] = self._entries.pop(entry)
            elif option in _GRANTED:
                del self._entries[entry]
        if used[0] in ("filename", "to") and not options.get(used[0]):
            self._wrong(key, f"appender {name} has no {used[0]}; it is left out")
        else:
            where = f"{self._name}:{self._lines[key]}"
            self.appenders[name] = Appender(make, where, options, formatter, filters)

    def _formatter(self, key: str) -> PatternFormatter:
        layout = self._entries.pop(f"{key}.layout", "")
        pattern = self._entries.pop(f"{key}.layout.ConversionPattern", None)
        layout = layout.removeprefix("Log::Log4perl::Layout::").removeprefix("org.apache.log4j.")
        if layout not in _LAYOUTS:
            self._wrong(f"{key}.layout", f"layout {layout} of {key.partition('.')[2]} is unknown")
        if pattern is None or layout in ("SimpleLayout", "NoopLayout"):
            pattern = _LAYOUTS.get(layout, _DEFAULT_PATTERN)
        formatter = PatternFormatter(pattern, multiline=layout.endswith("Multiline"),
                                     utc=self._utc)
        for part in formatter.unknown:
            self._wrong(f"{key}.layout.ConversionPattern",
                        f"{part} in the pattern is not understood")
        return formatter


def read_logconfig() -> LogConfig:
    """The s3napback.logconfig beside the script; where there is none, the screen at INFO."""
    config = LogConfig()
    for script in (os.path.abspath(__file__), os.path.realpath(__file__)):
        path = os.path.join(os.path.dirname(script), "s3napback.logconfig")
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                return LogConfig(file.read(), path, os.environ)
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"cannot read {path}: {error.strerror}; logging to the screen only"
            config.problems = [why]
            break
    return config


def open_log(
    config: LogConfig, *, debug: bool = False, changed: bool = True,
    others: Sequence[logging.Handler] = (), as_json: bool = False,
) -> list[str]:
    """Sets the log up; the sentences to be logged about what is wrong with it.

    debug: everything is logged, whatever levels the config gives
    changed: False to see only whether the log can be opened: no file is emptied or gets its header
    others: handlers of all messages, besides the config's; as_json: instead of those to the screen
    """
    close_log()
    problems = list(config.problems)
    loggers = {name or _LOG_ROOT: asked for name, asked in config.loggers.items()
               if f"{name or _LOG_ROOT}.".startswith(f"{_LOG_ROOT}.")}
    handlers: dict[str, logging.Handler] = {}
    used = {name for _, names in loggers.values() for name in names}
    for name in [name for name in config.appenders if name in used]:
        make, where, options, formatter, filters = config.appenders[name]
        if not changed and options.get("mode", "append") in _FILE_MODES:
            options = {**options, "mode": "append", "header_text": ""}
        try:
            handler = make(options)
        except (OSError, ValueError) as error:
            target = options.get("filename")
            what = f"cannot write log file {target}" if target else f"cannot log to {name}"
            problems.append(f"{where}: {what}: {_reason(error)}; going on without it")
            continue
        handler.set_name(name)
        handler.setFormatter(formatter)
        handler.filters += filters
        if not (as_json and isinstance(handler, _Screen)):
            handlers[name] = handler
    if as_json or not handlers:
        screen = _Screen({"stderr": "0"} if as_json else {})
        screen.setFormatter(JsonFormatter() if as_json else PatternFormatter())
        others = *others, screen
    for logger in _our_loggers():
        logger.propagate = logger.name != _LOG_ROOT and logger.name not in config.closed
        logger.setLevel(logging.NOTSET)
        for handler in others if not logger.propagate else ():
            logger.addHandler(handler)
    logging.getLogger(_LOG_ROOT).setLevel(logging.DEBUG if debug else logging.INFO)
    for name, (level, names) in loggers.items():
        if level is not None and not debug:
            logging.getLogger(name).setLevel(level)
        for appender in names:
            if appender in handlers:
                logging.getLogger(name).addHandler(handlers[appender])
    return problems


def close_log() -> None:
    """Closes what `open_log` opened; buffered mail is sent here."""
    for logger in _our_loggers():
        for handler in [one for one in logger.handlers if isinstance(one, _Appender)]:
            logger.removeHandler(handler)
            handler.close()


def _our_loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in [_LOG_ROOT, *logging.root.manager.loggerDict]
            if f"{name}.".startswith(f"{_LOG_ROOT}.")]


# ==================================================================================================
# 20. Command line
# ==================================================================================================

USAGE = """\
usage: s3napback.py [-t] [-f] [-d] [-c FILE] [NAME...]
         make the backups that are due; NAME stands for /etc/s3napback/NAME.conf
         -c FILE  the config file          -t  show what would be done, change nothing
         -f       do it even if not due    -d  log every command and detail
         --log-json  the log to standard output, a JSON object a line
       s3napback.py {list|restore|restore-script|verify} -h
         what is in the bucket, and back again; whether it is whole
       s3napback.py {find|diff} -h
         in which archives a file is; what changed between two moments
       s3napback.py {check|status|plan|policy} -h
         does it work tonight? did it last night? what is there in three weeks? the key's rights
       s3napback.py js3tream -h
         one stream to the bucket, or back: recovery by hand
       s3napback.py demo
         back up, change, back up again, restore, compare; needs no account
"""

JS3TREAM_USAGE = """\
usage: s3napback.py js3tream {-i|-o|-l|-d} [-K FILE | -k KEY -s SECRET] [-b BUCKET[:PREFIX]]
  -i, --stdin          send standard input to the bucket, as chunks PREFIX:0000000000000, ...
  -o, --stdout         fetch the chunks, check them, and write them to standard output
  -l, --list           list archives; without -b, the buckets
  -d, --delete         delete an archive; without PREFIX, the whole bucket
  -b, --bucket B[:P]   the bucket and, behind the first colon, the archive's name
  -K, --keyfile FILE   file with the lines key=... and secret=...
  -k, --key KEY        -s, --secret SECRET   the same here, where others can see it
  -z, --size BYTES     size of a chunk (5000000)
  -t, --tag TEXT       note kept with each chunk, shown by -l
  -n, --neverdie       try again for 20 hours where something may pass
  -p, --pretend        say what would be done, change nothing
  -f, --file           accepted for old calls; memory is bounded without it
  -v, --verbose        say what is done     --debug  say more
  -V, --version        -h, --help
  --endpoint URL       another service than Amazon's, or file:///PATH    --region NAME
  --storage-class C    of what is stored    --parallel N   chunks at once (4)
"""

# What stands behind the command's name, and the present; the exit status.
Command: TypeAlias = "Callable[[Sequence[str], Moment], int]"


def main(argv: Sequence[str] | None = None, *, now: datetime | float | None = None) -> int:
    """Runs the command line and returns the exit status.

    argv: the words behind the program's name, default sys.argv's; now: stands for the present in
    everything that is decided or stamped, default the real time.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    start = Moment.of(time.time() if now is None else now)
    _prepare_process()
    command: Command = cmd_backup
    if argv is None and os.path.basename(sys.argv[0]) == "js3tream":
        command = cmd_js3tream
    elif args and args[0] in COMMANDS:
        command = COMMANDS[args.pop(0)]
    status = EXIT_OK
    try:
        with _signals():
            with contextlib.suppress(SystemExit):  # argparse has shown a help
                status = command(args, start)
            if sys.stdout:
                sys.stdout.flush()  # here, where it can still be told that it went nowhere
            return status
    except (Failure, Interrupted) as error:
        tell(error)
        return error.status
    except BrokenPipeError:
        return status or EXIT_FAILED
    except OSError as error:
        # Of files we say the name; without one it is what was printed that had no room.
        printing = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO)
        doing = "write to standard output" if printing else "go on"
        tell(os_failure(error, doing))
        return status or EXIT_FAILED


def clock_from(now: Moment) -> Callable[[], float]:
    """A clock that shows this moment now: epoch seconds as time goes by."""
    started = time.monotonic()
    return lambda: now.epoch + time.monotonic() - started


def _prepare_process() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: what is opened next must not be the standard error of a tool
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # A core dump would hold the secret key.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it cannot show is no error
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns the first of the signals that ask for an end into `Interrupted`."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    global _is_ending
    _is_ending = False

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        global _held_signal, _is_ending
        _is_ending = True
        for one in wanted:  # a second signal must not cut the tidying short, nor hooks ignore it
            signal.signal(one, lambda *_: None)
        if _held_signal is None:
            raise Interrupted(signum)
        _held_signal = signum

    before = {signum: signal.getsignal(signum) for signum in wanted}
    for signum, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def host_name() -> str:
    """The name of this machine, in letters that metadata can hold."""
    return re.sub("[^!-~]", "?", socket.gethostname()) or "?"


def _script() -> str:
    """The file to call. Installed by pip, the command is another one than the module."""
    installed = os.path.basename(sys.argv[0]) == "s3napback"
    return os.path.abspath(sys.argv[0] if installed else __file__)


def _program() -> str:
    """How to call this program in a shell."""
    return shlex.quote(_script())


@contextlib.contextmanager
def progress_bar(archive: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """On a terminal a bar of bytes (of a total, where it is known), rate and chunks; what is logged
    meanwhile is written above it."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no terminal
        yield lambda size: None
        return
    with library("tqdm"):
        from tqdm import tqdm
    lock, chunks = threading.Lock(), itertools.count(1)
    shown = printable(archive, "")
    shown = shown if len(shown) <= 40 else f"…{shown[-39:]}"  # leaves room for the bar
    with tqdm(
        desc=shown, total=total, unit="B", unit_scale=True, leave=False, file=sys.stderr,
        ncols=None if columns else 80, nrows=None if rows else 24,  # some do not know their size
    ) as bar:

        def stored(size: int) -> None:
            with lock:
                bar.set_postfix_str(f"{next(chunks)} chunks", refresh=False)
                bar.update(size)

        yield stored


# --------------------------------------------------------------------------------------------------
# Backup, the original's call
# --------------------------------------------------------------------------------------------------


def cmd_backup(args: Sequence[str], now: Moment) -> int:
    """`s3napback.py [-t] [-f] [-d] [-c FILE] [NAME…]`"""
    try:
        options, names = getopt.getopt(list(args), "c:fthd", ["help", "version", "log-json"])
    except getopt.GetoptError as error:
        print_stderr(f"Unknown option: {error.opt}" if "not recognized" in error.msg else error.msg)
        print_stderr(USAGE.rstrip(), keep="\n")
        return EXIT_USAGE
    given = dict(options)
    if "-h" in given or "--help" in given:
        print(USAGE, end="")
        return EXIT_USAGE if "-h" in given else EXIT_OK  # -h: the original's status
    if "--version" in given:
        print(f"s3napback {__version__}")
        return EXIT_OK
    as_json, tail = "--log-json" in given, LogTail()
    problems = open_log(read_logconfig(), debug="-d" in given, others=[tail], as_json=as_json)
    try:
        for problem in problems:
            log.warning("%s", problem)
        log.info("Starting s3napback")
        if "-t" in given:
            log.warning("TEST MODE ONLY, NO REAL ACTIONS WILL BE TAKEN")
        if "-f" in given:
            log.warning("FORCE MODE; DATA MAY BE OVERWRITTEN")
        run = RunOptions(
            now, clock_from(now), tool_environment(os.environ), _program(), progress_bar,
            host_name(), test="-t" in given, force="-f" in given,
            tells_jobs=as_json, log_text=tail.text,
        )
        statuses = []
        for lost in {file for option, file in options if option == "-c"} - {given.get("-c")}:
            log.warning("-c is given twice, and %s is not run: the last one counts", lost)
            statuses.append(EXIT_WARNINGS)
        for path in _config_paths(given.get("-c", ""), names):
            statuses.append(run_watched(path, run).status)
            tail.records.clear()
        return worst_status(statuses)
    except Failure as failure:
        log.critical("%s", failure)
        return failure.status
    except Interrupted as interrupted:
        log.critical("Ended by %s", signal.Signals(interrupted.signum).name)
        return interrupted.status
    finally:
        close_log()


def _named_configs(name: str) -> list[str]:
    return [os.path.join(CONFIG_DIR, f"{name}.conf"), os.path.join(CONFIG_DIR, name)]


def _config_paths(file: str, names: Sequence[str]) -> list[str]:
    """The config files of a call, in the original's order; what -c gives may be a NAME, too.
    Raises Failure for an unknown NAME."""
    paths = [file] if file else []
    if "/" not in file and not os.path.exists(file):
        paths = list(filter(os.path.isfile, _named_configs(file)))[:1] or paths
    for name in names:
        tried = _named_configs(name)
        found = list(filter(os.path.isfile, tried))
        if not found:
            meant = difflib.get_close_matches(name.lower(), COMMANDS, 1)
            hint = "give the path of a config file with -c"
            if name in COMMANDS:
                hint = f"{name} is a command if it is the first word: s3napback.py {name} ..."
            elif meant:
                hint = f"did you mean the command {meant[0]}? Else give the path of a file with -c"
            raise UsageFailure(f"no config for {name}: neither {tried[0]} nor {tried[1]} is there",
                               hint)
        paths.append(found[0])
    if not paths:
        raise UsageFailure("Unable to open file '': No such file or directory",
                           "give a config with -c FILE, or a NAME")
    return paths


# --------------------------------------------------------------------------------------------------
# Options of our commands
# --------------------------------------------------------------------------------------------------

# An option's name, its value ("" for a switch), its meaning; a title, and the options below it.
Option: TypeAlias = "tuple[str, str, str]"
OptionGroup: TypeAlias = "tuple[str, Sequence[Option]]"

_CONFIG: Option = ("-c", "CONFIG", "a config file, or the NAME of one")
_BUCKET_OPTIONS: OptionGroup = ("where the archives are: -c, or -b with what it needs", (
    _CONFIG,
    ("-b", "BUCKET", "the bucket, where there is no config"),
    ("-K", "FILE", "file with the lines key=... and secret=..."),
    ("--endpoint", "URL", "another service than Amazon's, or file:///PATH"),
    ("--region", "NAME", "where the bucket is"),
    ("--prefix", "NAME", "the Prefix of the config that made the archives; without it those of"
     " every one are meant, and NAME is as list shows it: web1/etc"),
    ("--versions-at", "WHEN", "from the older versions of a versioned bucket, as it was then"),
))
_PARTIAL = ("--force-partial", "", "from what is left of a chain that is not whole")
_STATE_OPTIONS: OptionGroup = ("which state", (
    ("--at", "WHEN", '"2026-11-20" (its end), "2026-11-20 03:00", "yesterday", "3 days ago", as'
     " the local clock showed it then; without it the newest"),
    _PARTIAL,
))
_KEY_OPTIONS: OptionGroup = ("decryption", (
    ("--secret-key", "FILE", "with this key, in a throwaway keyring"),
    ("--passphrase-file", "FILE", "the secret key's passphrase"),
))
_JSON = ("--json", "", "for programs; README.md has the form")
_A_NAME = "NAME is /etc, MySQL/shop, PostgreSQL/crm, Command/ldap, or one archive: /etc-3-DIFF."


class Syntax(NamedTuple):
    """A command of ours. Of its words, a NAME that is not in brackets is needed; where no "..." is,
    one is the most."""

    run: Command
    words: str  # what stands behind its options
    about: str
    options: Sequence[Option] = ()  # its own
    groups: Sequence[OptionGroup] = ()  # those that others have, too


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are a Failure (status 2)."""

    def error(self, message: str) -> NoReturn:
        raise UsageFailure(message, f"see: {self.prog} -h")


class _Once(argparse.Action):
    """Of an option that is given again argparse would forget the first value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"option {option_string} is given twice")
        setattr(namespace, self.dest, values)


def read_args(command: str, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the options that were given, by name; the other words) of a call of one of our commands.

    An option whose value ends in "..." in its syntax may be given again: its value is a list.
    Raises Failure for what the command does not know, and SystemExit when it has shown a help.
    """
    _, words, about, own, groups = _SYNTAX[command]
    prog = f"s3napback.py {command}"
    parser = _Parser(
        prog, f"{prog} [options] {words}".rstrip(), about, argument_default=argparse.SUPPRESS
    )
    known: list[str] = []
    for title, options in (("", own), *groups):
        group = parser.add_argument_group(title) if title else parser
        for option, value, meaning in options:
            how: dict[str, Any] = {"metavar": value, "action": _Once}
            if not value:
                how = {"action": "store_true"}
            if value.endswith("..."):
                how = {"metavar": value.rstrip("."), "action": "append"}
            group.add_argument(option, dest=option.lstrip("-"), help=meaning, **how)
            known.append(option)
    end = args.index("--") if "--" in args else len(args)
    given, names = parser.parse_known_args(args[:end])
    for word in names:
        if word.startswith("-") and word != "-":
            unknown = word.partition("=")[0]
            meant = difflib.get_close_matches(unknown, known, 1)
            parser.error(f"option {unknown} not recognized"
                         + (f"; did you mean {meant[0]}?" if meant else ""))
    names += args[end + 1 :]
    if words[0:1] not in ("", "[") and not names:
        parser.error(f"no {words.split()[0].rstrip('.')} given")
    if names and not words:
        parser.error(f"no NAME is taken: {names[0]}")
    if "..." not in words and len(names) > 1:
        parser.error(f"one NAME at a time, not {names[1]}")
    return vars(given), names


def option_value(option: str, text: str, read: Callable[[str], T]) -> T:
    """What `read` makes of an option's value. Raises Failure where that raises ValueError."""
    try:
        return read(text)
    except ValueError as error:
        raise UsageFailure(f"{option} {text} {error}") from error


def show(options: Mapping[str, Any], value: Any, lines: Iterable[str]) -> None:
    """Prints what was found: with --json the value, else the lines as a terminal may see them."""
    if "json" in options:
        print(json.dumps(value, indent=1, default=str))
        return
    for line in lines:
        print(printable(line, ""))


# --------------------------------------------------------------------------------------------------
# js3tream
# --------------------------------------------------------------------------------------------------

# Long name → letter, "" without one; those with "=" have a value.
_JS3TREAM_OPTIONS = {
    "stdin": "i", "stdout": "o", "list": "l", "delete": "d", "file": "f", "neverdie": "n",
    "pretend": "p", "verbose": "v", "debug": "", "version": "V", "help": "h",
    "keyfile=": "K", "key=": "k", "secret=": "s", "bucket=": "b", "size=": "z", "tag=": "t",
    "endpoint=": "", "region=": "", "storage-class=": "", "parallel=": "",
}
_JS3TREAM_TIME = "%Y-%m-%d %I:%M:%S"  # its clock has 12 hours and no am or pm


def cmd_js3tream(args: Sequence[str], now: Moment) -> int:
    """`js3tream`: its options, its listing, its chunks; its exit status tells the truth."""
    try:
        options = js3tream_options(args)
    except getopt.GetoptError as error:
        print_stderr(f"js3tream: {error.msg}")
        print_stderr(JS3TREAM_USAGE.rstrip(), keep="\n")
        return EXIT_USAGE
    if "help" in options or not args:
        print(JS3TREAM_USAGE, end="")
        return EXIT_OK if args else EXIT_USAGE
    if "version" in options:
        print(f"s3napback {__version__}")
        return EXIT_OK
    modes = [mode for mode in ("stdin", "stdout", "list", "delete") if mode in options]
    if len(modes) != 1:
        raise UsageFailure("give one of -i, -o, -l and -d", "see: js3tream -h")
    bucket, _, name = key_text(options.get("bucket", "")).partition(":")
    if not bucket and modes != ["list"]:
        raise UsageFailure("no bucket given", "use -b BUCKET:PREFIX")
    _open_tool_log(logging.DEBUG if "debug" in options
                   else logging.INFO if "verbose" in options else logging.WARNING)
    access = _access_by_options(options)
    # As the original: a wrong size is refused even where none is needed.
    chunk_size = option_value("-z", options.get("size", str(JS3TREAM_CHUNK_SIZE)),
                              partial(read_number, largest=MAX_CHUNK))
    if bucket:
        retries = Retries(RETRY_HOURS if "neverdie" in options else 0.0, _TOOL_LOG)
        store = open_store(bucket, access, clock_from(now), retries)
        work = _Js3tream(store, name, f"{bucket}:{name}", options, chunk_size,
                         access.connections, now)
        {"stdin": work.send, "stdout": work.fetch,
         "list": work.list_archives, "delete": work.delete}[modes[0]]()
    else:
        found = list_buckets(access)
        print_stderr("Bucket List")
        for bucket, created in found:
            print_stderr(f"{now.local(created):{_JS3TREAM_TIME}} - {bucket}")
        print_stderr(f"total: {len(found)}")
    return EXIT_OK


def js3tream_options(args: Sequence[str]) -> dict[str, str]:
    """Long name → value ("" for a switch). Raises getopt.GetoptError."""
    letters = "".join(letter + ":" * name.endswith("=")
                      for name, letter in _JS3TREAM_OPTIONS.items() if letter)
    found, rest = getopt.gnu_getopt(list(args), letters, list(_JS3TREAM_OPTIONS))
    if rest:
        raise getopt.GetoptError(f"unexpected argument {rest[0]}")
    names = {f"-{letter}": name.rstrip("=") for name, letter in _JS3TREAM_OPTIONS.items()}
    return {names.get(option, option.lstrip("-")): value for option, value in found}


def _access_by_options(options: Mapping[str, str]) -> Access:
    key, secret = options.get("key"), options.get("secret")
    endpoint = options.get("endpoint") or None
    if "keyfile" in options and folder_root(endpoint) is None:
        key, secret = read_key_file(options["keyfile"])
    if bool(key) != bool(secret):
        raise UsageFailure("-k and -s go together", "or use -K FILE")
    return Access(
        endpoint, options.get("region"), key, secret, options.get("storage-class"),
        option_value("--parallel", options.get("parallel", "4"), partial(read_number, largest=64)),
    )


def _open_tool_log(level: int = logging.WARNING) -> None:
    """Messages of all commands but the backup go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PatternFormatter("%m"))
    _TOOL_LOG.handlers[:] = [handler]
    _TOOL_LOG.propagate = False
    _TOOL_LOG.setLevel(level)


@dataclass(frozen=True)
class _Js3tream:
    """What `js3tream` does with a bucket, or with the archive NAME in it."""

    store: Store
    name: str
    where: str
    options: Mapping[str, str]
    chunk_size: int
    parallel: int
    now: Moment

    def pretends(self, text: str) -> bool:
        """Whether nothing is to be done, of which the text tells."""
        if "pretend" in self.options:
            _TOOL_LOG.warning("Pretending: %s", text)
        return "pretend" in self.options

    def send(self) -> None:
        """-i: standard input becomes an archive, of a name that is free."""
        bucket, tag = self.store.bucket, self.options.get("tag", "")
        if not tag.isascii() or not tag.isprintable():
            raise UsageFailure("the tag must be printable ASCII: S3 keeps no other")
        _TOOL_LOG.info("Sending standard input to bucket %s, prefix %s", bucket, self.name)
        if sys.stdin is None:
            raise UsageFailure("standard input is closed: there is nothing to send")
        try:  # one request tells both
            is_there = any(archive_objects(self.store, self.name)) if self.name else False
            is_bucket = bool(self.name) or self.store.exists()
        except NotFound:
            is_there = is_bucket = False
        if is_bucket and not self.name:
            raise Failure(f"bucket {bucket} exists already", "give a prefix: -b BUCKET:PREFIX")
        if is_there:
            raise Failure(f"{self.where} exists already", "delete it first, with js3tream -d")
        if self.pretends("nothing is stored"):
            return
        if not is_bucket:
            _TOOL_LOG.info("Creating bucket %s", bucket)
            self.store.create()
        source: io.RawIOBase = sys.stdin.buffer.raw  # type: ignore[union-attr]
        _prepare_stream(source)
        with Upload(
            self.store, self.name, (), chunk_size=self.chunk_size, parallel=self.parallel,
            metadata={"tag": tag} if tag else {}, log=_TOOL_LOG,
            progress=lambda size: _TOOL_LOG.debug("Stored a chunk of %d bytes", size),
        ) as upload:
            for chunk in upload.chunks(source.readinto):
                upload.put(chunk)
            made = self.now.utc_text()
            stored = upload.commit({f"{META}made": made, f"{META}status": "ok"})
        _TOOL_LOG.info("%d bytes stored in %d chunks", stored.size, stored.chunks)

    def fetch(self) -> None:
        """-o: the archive goes to standard output, of a torn one what comes before its gap."""
        objects = archive_objects(self.store, self.name)
        archive = resolve_archive(self.name, objects, self.store.head)
        if archive is None:
            raise Failure(f"there is no archive {self.where}", "see: js3tream -l")
        if self.pretends(f"{archive.size} bytes would be written"):
            return
        chunks = tuple(item for n, item in enumerate(archive.chunks) if n == _number(item))
        output = _standard_output()
        try:
            for data in download(
                replace(archive, chunks=chunks), self.store, self.parallel,
                lambda size: _TOOL_LOG.debug("Fetched a chunk of %d bytes", size),
            ):
                write_all(output, data)
            output.flush()
        except BrokenPipeError as error:
            raise Failure("standard output was closed before the end of the archive") from error
        except OSError as error:
            raise os_failure(error, "write to standard output") from error
        if not archive.complete:
            raise Failure(f"{self.where} is not complete: {archive.fault}",
                          "what was written is its beginning")
        _TOOL_LOG.info("%d bytes written", archive.size)

    def delete(self) -> None:
        """-d: the archive goes, or the whole bucket."""
        store = self.store
        if self.name and not store.exists():
            _TOOL_LOG.info("There is no bucket %s: nothing to delete", store.bucket)
            return
        objects = archive_objects(store, self.name) if self.name else list(store.iter_objects())
        what = self.where if self.name else f"the whole bucket {store.bucket}"
        _TOOL_LOG.info("Deleting %s: %d objects", what, len(objects))
        if self.pretends(f"{what} is kept"):
            return
        if sys.stderr.isatty() and objects:
            print_stderr(f"Deleting {what}, {len(objects)} objects; Ctrl-C keeps them")
            for second in range(10, 0, -1):
                print_stderr(f"{second}...")
                time.sleep(1)
        # Whoever is stopped here leaves an archive that is seen to be torn, or a smaller bucket.
        if self.name:
            delete_chunks(store, objects)
        else:
            store.delete([item.key for item in objects])
            store.remove()

    def list_archives(self) -> None:
        """-l: a line for each archive."""
        groups: dict[str, list[StoredObject]] = {}
        for item in self.store.iter_objects(chunk_prefix(self.name)):
            # js3tream takes what stands before the first colon for the prefix.
            name, colon, _ = item.key.partition(":")
            groups.setdefault(name if colon else "", []).append(item)
        groups = dict(sorted(groups.items()))
        with workers(self.store, 8, "list") as pool:
            heads = pool.map(lambda items: self.store.head(items[0].key) or {}, groups.values())
            for (name, items), metadata in zip(groups.items(), heads, strict=True):
                where = f"{self.store.bucket}:{name}".rstrip(":")
                newest = self.now.local(max(item.modified for item in items))
                size = sum(item.size for item in items)
                amount = f"{size / 1e6:.2f}M" if size / 1000 > 10000 else f"{size / 1000:.2f}k"
                print_stderr(f"{newest:{_JS3TREAM_TIME}} - {where} - {amount} in {len(items)}"
                             " data blocks")
                if metadata.get("tag"):
                    print_stderr(f"\tTAG: {printable(metadata['tag'], '')}", keep="\t")
        print_stderr(f"total: {len(groups)}")


def _prepare_stream(file: IO[bytes] | io.RawIOBase) -> None:
    """Makes standard input or output wide, and blocking: others may have made it otherwise, and
    "nothing yet" would be taken for the end, "no room yet" for an error."""
    widen_pipe(file)
    with contextlib.suppress(OSError):  # it may be no file
        os.set_blocking(file.fileno(), True)


def _standard_output() -> IO[bytes]:
    """Where data goes. Raises Failure where there is none."""
    if sys.stdout is None:
        raise UsageFailure("standard output is closed: there is nowhere to write to")
    _prepare_stream(sys.stdout.buffer)
    return sys.stdout.buffer


# --------------------------------------------------------------------------------------------------
# Recovery: list, find, diff, restore, restore-script, verify
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recovery(options: Mapping[str, str], now: Moment) -> Iterator[Recovery]:
    """What -c, or -b with what it needs, and the keys' options say, within the block."""
    _open_tool_log()
    prefix = read_prefix(options["prefix"]) if "prefix" in options else ""
    jobs, own, place, diff_dir, temp_dir = list[Job](), list[str](), "", "", ""
    hours = RETRY_HOURS
    if "c" in options:
        for option in ("-b", "-K", "--endpoint", "--region"):
            if option.lstrip("-") in options:
                raise UsageFailure(f"{option} cannot be given with -c: the config says it",
                                   "leave one of them out")
        config = read_config(_config_paths(options["c"], ())[0])
        settings, jobs = settings_of(config, needs_diff_dir=False), jobs_of(config)
        bucket, access = settings.bucket, access_of(settings)
        place = bucket_place(settings.s3_endpoint, bucket, settings.prefix)
        prefix = prefix or settings.prefix
        diff_dir, temp_dir = settings.diff_dir, settings.temp_dir or ""
        hours = settings.retry_hours
        own.append(diff_dir)
    elif "b" in options:
        keyfile = {"keyfile": options["K"]} if "K" in options else {}
        bucket, access = options["b"], _access_by_options({**options, **keyfile})
    else:
        raise UsageFailure("no bucket given", "use -c CONFIG or -b BUCKET")
    store = open_store(bucket, access, clock_from(now), Retries(0.0, _TOOL_LOG))
    if "versions-at" in options:
        store = PastStore(bucket, access, store.retries, parse_when(options["versions-at"], now))
    if root := folder_root(access.endpoint):
        own += bucket_folders(root, bucket)
    with decryption(
        tool_environment(os.environ), options.get("secret-key"), options.get("passphrase-file"),
        terminal=bool(sys.stdin and sys.stdin.isatty()),
    ) as (env, gpg):
        # The TempDir of a config may not be there, on a new machine.
        yield Recovery(store, access.connections, access.endpoint, env, gpg, prefix,
                       temp_dir if os.path.isdir(temp_dir) else None, tuple(own),
                       diff_dir=diff_dir, place=place, jobs=jobs, retry_hours=hours)


def cmd_list(args: Sequence[str], now: Moment) -> int:
    """`list [NAME]`: the archives in a bucket, and the moments that can be restored."""
    options, names = read_args("list", args)
    if "files" in options:
        return _list_files(options, names, now)
    if names[1:] or options.keys() & {"at", "force-partial"}:
        raise UsageFailure("a PATH, --at and --force-partial need --files")
    named = None
    with _recovery(options, now) as recovery:
        if names:
            named, sources = meant_by(recovery, names[0], look_inside=True)
            if not sources:
                raise nothing_found(recovery, names)
        else:
            seen = catalogue(recovery.store, prefix=recovery.prefix, look_inside=True)
            sources = group_by_source((one.without_chunks() for one in seen), recovery.kinds)
    if not sources and "json" not in options:
        tell(nothing_found(recovery, names).message)
    lines, rows_of_json = list[str](), list[dict[str, Any]]()
    for source, found in sorted(sources.items()):
        rows = [row for row in History(found).rows()
                if named is None or row[0].archive.name == named.archive.name]
        lines += _catalogue_lines(source, found, rows, now)
        rows_of_json.append(_catalogue_json(source, found, rows, now))
    shown = {"format": 1, "bucket": recovery.store.bucket, "sources": rows_of_json}
    show(options, shown, lines)
    return EXIT_OK


# What `list` shows of an archive; see `History.rows`.
CatalogRow: TypeAlias = "tuple[CatalogEntry, int, bool]"


def _catalogue_lines(
    source: Source, found: Sequence[CatalogEntry], rows: Sequence[CatalogRow], now: Moment
) -> Iterator[str]:
    of_prefix = f" (Prefix {source.prefix})" if source.prefix else ""
    yield f"{source.kind or 'Directory or Subversion'} {source.name or '(all)'}{of_prefix}"
    for one, at, whole in rows:
        remarks = [one.fault or "complete", *(text for text, is_so in (
            ("stale: what it continues is gone", not one.fault and not whole),
            (f"by a clock that said {_moment_text(now, one.made)}", at != math.floor(one.made)),
            ("with warnings", one.status == "warnings"),
            ("needs no FULL", one.mode == DIFF and one.self_contained),
            ("encrypted", one.encrypted),
            ("not yet in its place", one.archive.staged),
            (f"and {one.leftovers} chunks left over from another upload", one.leftovers),
        ) if is_so), *(name for name in one.archive.storage_classes if name != "STANDARD")]
        yield (f"  {_moment_text(now, at)}  {one}  {size_text(one.archive.size)} in"
               f" {one.archive.count} chunks  {', '.join(remarks)}")
    shown = ", ".join(_moment_text(now, at) for _, at, whole in rows if whole) or "none"
    yield f"  can be restored as of: {shown}"
    for doubt in date_doubts(found, now):
        yield f"  in doubt: {doubt}"
    if first := begun_with(found):
        yield (f"  in doubt: no FULL is before {first}; it holds everything if the job began with"
               " it, which restore finds out by reading it")


def _catalogue_json(
    source: Source, found: Sequence[CatalogEntry], rows: Sequence[CatalogRow], now: Moment
) -> dict[str, Any]:
    return {
        "kind": source.kind or None,
        "name": source.name,
        "prefix": source.prefix,
        "restorable": [Moment(at).utc_text() for _, at, whole in rows if whole],
        "doubts": date_doubts(found, now),
        "archives": [
            {
                "archive": one.archive.name, "slot": one.slot, "mode": one.mode,
                "made": Moment(one.made).utc_text(), "as_of": Moment(at).utc_text(),
                "bytes": one.archive.size, "chunks": one.archive.count,
                "complete": not one.fault, "fault": one.fault or None,
                "status": one.status or None,
                "storage_classes": list(one.archive.storage_classes),
                "encrypted": one.encrypted, "leftovers": one.leftovers,
                "staged": one.archive.staged, "stale": not one.fault and not whole,
            }
            for one, at, whole in rows
        ],
    }


def _list_files(options: Mapping[str, Any], names: Sequence[str], now: Moment) -> int:
    """`list NAME --files`: what `restore` would bring back."""
    if not names:
        raise UsageFailure("--files needs a NAME")
    with _recovery(options, now) as recovery:
        chain, files = _files_at(recovery, names[0], options, now)
    paths = set(member_paths(names[1:]))
    if absent := [path for path in sorted(paths) if not any(is_within(f, {path}) for f in files)]:
        as_of = _moment_text(now, chain.as_of)
        raise Failure(f"not in the backup as of {as_of}: {', '.join(absent)}")
    shown = [(path, files[path]) for path in sorted(files) if not paths or is_within(path, paths)]
    value = {
        "format": 1, "as_of": Moment(chain.as_of).utc_text(), "archives": chain.archives,
        "files": [_file_json(path, one) for path, one in shown],
    }
    show(options, value, (
        f"{one.mode} {one.owner:16} {one.size:12} {_time_of(one, now)} /{path}"
        + (f" -> {one.link}" if one.link else "") for path, one in shown
    ))
    return EXIT_WARNINGS if chain.lacking else EXIT_OK


def _time_of(one: Member, now: Moment) -> str:
    try:
        return f"{now.local(one.mtime):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError):
        return str(one.mtime)


def _file_json(path: str, one: Member) -> dict[str, Any]:
    return {"path": f"/{path}", **one._asdict()}


def _shown(one: Member, now: Moment) -> str:
    return f"{size_text(one.size)} of {_time_of(one, now)}"


def _change_text(old: Member, new: Member, now: Moment) -> str:
    """What a file was, and is; of its mode, owner and link what is not the same."""
    both = [(one, _shown(one, now)) for one in (old, new)]
    if old[:2] != new[:2]:
        both = [(one, f"{one.mode} {one.owner} {text}") for one, text in both]
    if old.link != new.link:
        both = [(one, f"{text} -> {one.link}" if one.link else text) for one, text in both]
    return ", then ".join(text for _, text in both)


def _files_at(
    recovery: Recovery, name: str, options: Mapping[str, Any], now: Moment
) -> tuple[Chain, dict[str, Member]]:
    """(chain, its files) of a directory as of --at. Raises Failure for what has no files."""
    kind, chain = _chain_of(recovery, name, options, now)
    if kind not in (DIRECTORY, ""):
        raise UsageFailure(f"{name} is of the kind {kind}: there are no files in it",
                           "restore gives back all of it")
    require_thawed(recovery, (one for one in chain.archives if not index_of(recovery, one)))
    with _fetching(recovery, chain.archives) as recovery:
        return chain, files_of(recovery, chain)


@contextlib.contextmanager
def _fetching(recovery: Recovery, archives: Iterable[CatalogEntry]) -> Iterator[Recovery]:
    """Tells how much of the bucket is read, having no index of it, and shows how it goes."""
    fetched = [one for one in archives if not index_of(recovery, one)]
    if not fetched:
        yield recovery
        return
    size, started = sum(one.archive.size for one in fetched), time.monotonic()
    what = f"{len(fetched)} archives, {size_text(size)},"
    tell(f"{what} are fetched: there is no index of them here")
    with progress_bar("reading", size) as progress:
        yield replace(recovery, progress=progress)
    tell(f"{what} were read in {duration_text(time.monotonic() - started)}")


def cmd_find(args: Sequence[str], now: Moment) -> int:
    """`find PATTERN… [NAME]`: in which archives, and as of which moments, a file is there."""
    options, patterns = read_args("find", args)
    name = options.get("in", patterns[-1] if len(patterns) > 1 else "")
    unread, found = list[str](), list[tuple[Version, str]]()
    with _recovery(options, now) as recovery:
        sources = meant_by(recovery, name)[1] if name else {}
        if sources and "in" not in options:
            patterns.pop()
        elif not sources and "in" in options:
            raise nothing_found(recovery, [name])
        elif not sources:
            sources = group_by_source(
                (one.without_chunks() if index_of(recovery, one) else one
                 for one in catalogue(recovery.store, prefix=recovery.prefix)), recovery.kinds)
        histories = {source: History(entries) for source, entries in sources.items()
                     if source.kind in (DIRECTORY, "")}
        if sources and not histories:
            raise UsageFailure("there are no files in dumps and repositories",
                               "restore gives back all of one")
        searched = [one for history in histories.values()
                    for one, _, intact in history.rows() if intact]
        with _fetching(recovery, searched) as recovery:
            for source, history in histories.items():
                versions, faults = find_versions(recovery, history, patterns)
                unread += faults
                for one in versions:
                    at = _moment_text(now, one.moments[-1])
                    found.append((one, _restore_call(options, source, at, one.path)))
    tell(*unread)
    if not found:
        raise Failure(f"none of the {len(searched)} archives searched has {' or '.join(patterns)}",
                      "a pattern with wildcards is put in quotes: '*.tex'")
    found.sort(key=lambda row: (-row[0].moments[-1], row[0].path))
    value = {"format": 1, "versions": [
        {**_file_json(one.path, one.member), "archives": one.archives,
         "moments": [Moment(at).utc_text() for at in one.moments], "restore": call}
        for one, call in found
    ]}
    show(options, value, (line for row in found for line in _version_lines(*row, now)))
    return EXIT_WARNINGS if unread else EXIT_OK


def _version_lines(one: Version, call: str, now: Moment) -> Iterator[str]:
    first, last = (_moment_text(now, one.moments[n]) for n in (0, -1))
    count = len(one.moments)
    span = f"{first} to {last}, {count} moments" if count > 1 else last
    yield f"/{one.path}"
    yield f"  {_shown(one.member, now)}, as of {span}, in {', '.join(one.archives)}"
    yield f"  {call}"


def _restore_call(options: Mapping[str, Any], source: Source, at: str, path: str) -> str:
    """The command line that restores a path, for a search that was called with these options."""
    words = ["restore"]
    for option, _, _ in (*_BUCKET_OPTIONS[1], *_KEY_OPTIONS[1]):
        if option.lstrip("-") in options:
            words += [option, options[option.lstrip("-")]]
    name = source.name
    if source.prefix:
        name = f"{source.prefix}/{name.removeprefix('/')}"
    words += ["--at", at, "--to", "restored", name, f"/{path}"]
    return " ".join([_program(), *map(shell_word, words)])


def cmd_diff(args: Sequence[str], now: Moment) -> int:
    """`diff NAME --at A --at B`: what is new, gone, changed or renamed."""
    options, (name,) = read_args("diff", args)
    moments = options.pop("at", [])
    if len(moments) not in (1, 2):
        raise UsageFailure("give two moments: --at WHEN --at WHEN")
    given: list[dict[str, Any]] = [{**options, "at": at} for at in moments] + [options]
    with _recovery(options, now) as recovery:
        (chain, old), (other, new) = (_files_at(recovery, name, one, now) for one in given[:2])
    found = differences(old, new)
    value = {
        "format": 1, "from": Moment(chain.as_of).utc_text(), "to": Moment(other.as_of).utc_text(),
        "changes": [
            {"change": what, "before": _file_json(path, old[path]) if path in old else None,
             "after": None if what == "gone" else _file_json(target or path, new[target or path])}
            for path, what, target in found
        ],
    }
    show(options, value, (
        f"{what:8} /{path}" + (
            f" -> /{target}" if what == "renamed" else
            f", {_change_text(old[path], new[path], now)}" if what == "changed" else
            ""
        ) for path, what, target in found
    ))
    return EXIT_WARNINGS if chain.lacking or other.lacking else EXIT_OK


# Of what tar could not do, lines on the screen: in a container it is the owner of every file.
_MAX_SHOWN = 100


def _chain_of(
    recovery: Recovery, name: str, options: Mapping[str, str], now: Moment
) -> tuple[str, Chain]:
    """(kind, chain) of what is to be restored; tells what is to be said of it."""
    at = parse_when(options["at"], now) if "at" in options else math.inf
    kind, chain = find_chain(recovery, name, at, now, partial="force-partial" in options)
    tell(*chain.warnings, *([f"partial: {chain.lacking}"] if chain.lacking else []))
    return kind, chain


def _thawing(options: Mapping[str, str]) -> tuple[str, int]:
    """(retrieval option, "" for none; days) of --thaw."""
    tier = options.get("tier", "Standard").capitalize()
    if tier not in THAW_TIMES:
        raise UsageFailure(f"--tier {tier} is none of {', '.join(THAW_TIMES)}")
    days = option_value("--days", options.get("days", "7"), partial(read_number, largest=3650))
    if "thaw" not in options and options.keys() & {"tier", "days"}:
        raise UsageFailure("--tier and --days say how to thaw", "add --thaw")
    return tier if "thaw" in options else "", days


def cmd_restore(args: Sequence[str], now: Moment) -> int:
    """`restore NAME`: a directory, a dump or a repository as it was."""
    options, (name, *members) = read_args("restore", args)
    place, overwrite = options.get("to"), "overwrite" in options
    if (place is None) == ("stdout" not in options):
        raise UsageFailure("give one of --to PLACE and --stdout")
    tier, days = _thawing(options)
    warnings: list[str] = []
    try:
        with _recovery(options, now) as recovery:
            kind, chain = _chain_of(recovery, name, options, now)
            # First: what is thawed costs money and hours.
            check_place(kind, place, members, overwrite=overwrite)
            require_thawed(recovery, chain.archives, tier, days)
            as_of = _moment_text(now, chain.as_of)
            size = sum(one.archive.size for one in chain.archives)
            with progress_bar(name, size) as progress:
                recovery = replace(recovery, progress=progress)
                if not kind:
                    kind = kind_by_content(recovery, chain.archives[0])
                    check_place(kind, place, members, overwrite=overwrite)
                if place is None:
                    write_dump(recovery, chain, _standard_output())
                elif kind == DIRECTORY:
                    for warning in restore_directory(recovery, chain, place, members, as_of):
                        warnings.append(warning)  # told when the progress bar is gone
                elif kind == SUBVERSION:
                    restore_repository(recovery, chain, place)
                else:
                    restore_file(recovery, chain, place)
    finally:
        tell(*warnings[:_MAX_SHOWN])
        if len(warnings) > _MAX_SHOWN:
            tell(f"and {len(warnings) - _MAX_SHOWN} things more like these")
    done = ", ".join(map(str, chain.archives))
    print_stderr(f"{name} as of {as_of} is in {place or 'standard output'}: {done}")
    return EXIT_WARNINGS if warnings or chain.lacking else EXIT_OK


def cmd_restore_script(args: Sequence[str], now: Moment) -> int:
    """`restore-script NAME`: a shell script that restores it without this program."""
    options, (name,) = read_args("restore-script", args)
    with _recovery(options, now) as recovery:
        kind, chain = _chain_of(recovery, name, options, now)
        require_thawed(recovery, chain.archives)
    # The keys in it are UTF-8, whatever the terminal is.
    output = _standard_output()
    output.write(restore_script(name, kind, chain, recovery).encode("utf-8", "surrogateescape"))
    output.flush()
    return EXIT_WARNINGS if chain.lacking else EXIT_OK


def cmd_verify(args: Sequence[str], now: Moment) -> int:
    """`verify [NAME]`: one sentence for each fault, and status 1 if there is any."""
    options, names = read_args("verify", args)
    sample = options.get("sample", "0").removesuffix("%")
    if not re.fullmatch(r"\d{1,2}(\.\d{1,9})?|100", sample):
        raise UsageFailure(f"--sample {sample} is not a number of percents")
    named = None
    faults: list[str] = []
    found: list[CatalogEntry] = []
    with _recovery(options, now) as recovery:
        asked_for: Iterable[CatalogEntry] = catalogue(recovery.store, prefix=recovery.prefix)
        if names:
            named, sources = meant_by(recovery, names[0])
            asked_for = [named] if named else itertools.chain(*sources.values())
        for one in asked_for:
            found.append(one.without_chunks())
            try:
                if one.fault:
                    raise Failure(one.fault)
                if "deep" in options:
                    read_to_the_end(recovery, one)
                else:
                    chosen = tuple(item for item in one.archive.chunks
                                   if random.uniform(0, 100) < float(sample))
                    read_to_the_end(recovery, replace(
                        one, kind=STREAM, archive=replace(one.archive, chunks=chosen)))
            except Failure as failure:
                faults.append(str(failure.at(one.archive.name)))
    if not found:
        raise nothing_found(recovery, names)
    for source, of_source in sorted(group_by_source(found, recovery.kinds).items()):
        if not named:  # what it continues was not asked for
            faults += chain_faults(source.name, of_source, now)
        tell(*(f"in doubt: {doubt}" for doubt in date_doubts(of_source, now)))
    for fault in faults:
        print(printable(fault, ""))
    print_stderr(f"{len(found)} archives checked, {len(faults)} faults")
    return EXIT_FAILED if faults else EXIT_OK


# --------------------------------------------------------------------------------------------------
# Tonight and after: check, plan
# --------------------------------------------------------------------------------------------------


def cmd_check(args: Sequence[str], now: Moment) -> int:
    """`check`: tonight's run rehearsed; see `check_config` for what it stores and makes."""
    options, names = read_args("check", args)
    if "cron" in options:
        findings = [*check_as_cron(_script(), options.get("c", ""), names)]
    else:
        problems = open_log(read_logconfig(), changed=False)
        close_log()
        findings = [Finding("warning", problem, "correct s3napback.logconfig", "log")
                    for problem in problems] or [Finding("ok", "can be written", subject="log")]
        _open_tool_log()
        run = RunOptions(now, clock_from(now), tool_environment(os.environ), _program(),
                         progress_bar, host_name())
        for path in _config_paths(options.get("c", ""), names):
            check = check_config(path, run, Retries(0.0, _TOOL_LOG))
            findings += findings_of("config", check)
    rows = [{"level": one.level, "subject": one.subject, "text": one.text, "hint": one.hint}
            for one in findings]
    show(options, rows, (
        f"{one.level:8} {one.subject}: "
        + (f"{one.text.removesuffix('.')}: {one.hint}" if one.hint else one.text)
        for one in findings
    ))
    levels = {finding.level for finding in findings}
    return EXIT_FAILED if "error" in levels else EXIT_WARNINGS if "warning" in levels else EXIT_OK


def cmd_plan(args: Sequence[str], now: Moment) -> int:
    """`plan`: the calendar of a config's jobs, and what it leaves in the bucket."""
    options, names = read_args("plan", args)
    count = option_value("--days", options.get("days", "14"), partial(read_number, largest=3660))
    today, at = now.date(), options.get("time", "03:00")
    last = today + timedelta(days=count - 1)
    try:
        on = date.fromisoformat(options.get("on", f"{last}"))
        # A slot may be that of December 31st of leap years alone.
        shown, followed = days_until(last, count, at, now), days_until(on, 4 * 366, at, now)
    except (ValueError, OverflowError, TypeError) as error:
        raise UsageFailure(f"no day, or no time: {error}", "see: s3napback.py plan -h") from error
    found = []
    for path in _config_paths(options.get("c", ""), names):
        config = read_config(path)
        settings = settings_of(config, needs_diff_dir=False)
        plan = [forecast(job, shown, followed) for job in jobs_of(config)]
        lines = [*map(str.rstrip, _plan_lines(plan, [*shown], on))]
        try:
            store = open_store(settings.bucket, access_of(settings), clock_from(now))
            plan = [one._replace(bytes=size_of(one, store, settings.prefix, f"{today}"))
                    for one in plan]
            known = [one.bytes for one in plan if one.bytes is not None]
            rest = f"; {len(plan) - len(known)} sources not known" if plan[len(known) :] else ""
            lines.append(f"Size then: {size_text(sum(known))} if archives stay as large{rest}")
        except Failure as failure:
            tell(f"the size then is not known: {failure}")
        found += [{"config": path, **one._asdict()} for one in plan]
        if "json" not in options:  # at once: the next config may not be readable
            show(options, None, lines)
    show(options, {"format": 1, "on": on, "sources": found}, ())
    return EXIT_OK


def _plan_lines(plan: Sequence[Forecast], shown: Sequence[str], on: date) -> Iterator[str]:
    """In 80 columns the calendar, with one for each rotation, and the picture."""
    columns: dict[tuple[str, ...], str] = {}
    heads = [columns.setdefault(tuple(one.due.get(at, "-") for at in shown), f"#{len(columns) + 1}")
             for one in plan]
    dates = (f"{at} {date.fromisoformat(at):%a}" for at in shown)
    rows = [("", *columns.values()), *zip(dates, *columns, strict=True)]
    width = 2 + max((len(cell) for row in rows for cell in row[1:]), default=0)
    beside = (80 - 16) // width
    for start in range(1, len(columns) + 1, beside):
        for day, *cells in (row[:1] + row[start : start + beside] for row in rows):
            yield f"{day:16}{''.join(f'{cell:{width}}' for cell in cells)}"
        yield ""
    days = [f"{on - timedelta(days=back)}" for back in reversed(range(50))]
    yield f"What can be restored after the run of {on} (F: a FULL, d: a DIFF):"
    yield f"    {days[0]}{days[-1]:>40}"
    for head, one in zip(heads, plan, strict=True):
        marks = {at: "d" if DIFF in one.kept[at] else "F" for at in one.restorable}
        yield f"{head:4}{one.kind} {one.name}"
        reach = f", from {min(marks)}" if marks else ""
        yield f"    {''.join(marks.get(at, '.') for at in days)}  {len(marks)}{reach}"
        if older := [at for at in marks if at < days[0]]:
            yield f"    and of {', '.join(older[-5:])}{' and before' if older[5:] else ''}"


# --------------------------------------------------------------------------------------------------
# Who watches, and who grants: status, policy
# --------------------------------------------------------------------------------------------------

# Exit status → that of a plugin, and its word (Monitoring Plugins Development Guidelines).
_NAGIOS = {EXIT_OK: (0, "OK"), EXIT_WARNINGS: (1, "WARNING"), EXIT_FAILED: (2, "CRITICAL")}


def cmd_status(args: Sequence[str], now: Moment) -> int:
    """`status`: whether each source has a backup as young as its cycle asks for."""
    options, found, problems = dict[str, str](), dict[tuple[str, str], Standing](), list[Failure]()
    try:
        if {"-b", "-K"} & set(args):
            raise UsageFailure("a bucket alone does not say what is due", "give -c FILE, or a NAME")
        options, names = read_args("status", args)
        # A FULL takes hours longer than the DIFF before it; 400 years are no limit.
        grace = option_value("--grace", options.get("grace", "12h"), read_duration)
        max_age = option_value("--max-age", options.get("max-age", "146000d"), read_duration)
        for path in _config_paths(options.get("c", ""), names):
            try:
                with _recovery({"c": path}, now) as recovery:
                    place = bucket_place(recovery.endpoint, recovery.store.bucket)
                    for start, one in standings(recovery, now, grace, max_age):
                        if one.kind or (place, start) not in found:  # another config may name it
                            found[place, start] = one
            except Failure as failure:  # it keeps no other config back
                problems.append(failure)
    except Failure as failure:
        problems.append(failure)
    shown = sorted(found.values(), key=lambda one: [*VERDICTS].index(one.verdict))
    status = worst_status(VERDICTS[one.verdict] for one in shown)
    if "nagios" in options or "--nagios" in args:
        is_known = not problems or status == EXIT_FAILED  # than which nothing is worse
        status, word = _NAGIOS[status] if is_known else (3, "UNKNOWN")
        print(f"S3NAPBACK {word}: {_nagios_text(shown, problems)}")
        return status
    rows = [one._asdict() for one in shown]
    value = {"format": 1, "sources": rows, "problems": problems}
    show(options, value, _standing_lines(shown) if shown else ())
    if "json" not in options:
        tell(*problems)
    return worst_status([status, *(problem.status for problem in problems)])


def _standing_lines(shown: Sequence[Standing]) -> Iterator[str]:
    row = "{:8} {:>12}  {!s:10}  {!s:10}  {:>9}  {}".format
    yield row("VERDICT", "AGE", "DUE LAST", "DUE NEXT", "SIZE", "WHAT")
    for one in shown:
        age = "-" if one.age is None or one.age < 0 else duration_text(one.age)
        who = f" (by {one.host})" if one.host not in ("", host_name()) else ""
        why = f": {one.why}" if one.why else ""
        yield row(one.verdict, age, one.due_last or "-", one.due_next or "-",
                  size_text(one.bytes), f"{one.kind} {one.name}{who}{why}".strip())
        yield from (f"         not whole: {text}" for text in one.unfinished)


def _nagios_text(shown: Sequence[Standing], problems: Sequence[Failure]) -> str:
    """What a plugin says: the worst first, then its performance data."""
    verdicts = [one.verdict for one in shown]
    said = [str(problem) for problem in problems]
    said += [f"{verdicts.count(one)} {one}" for one in reversed(VERDICTS) if one in verdicts]
    data = []
    for one in reversed(shown):
        name = re.sub("['=|]", "_", f"{one.kind} {one.name}".strip())  # what no label may hold
        if VERDICTS[one.verdict] != EXIT_OK:
            said.append(f"{name} {one.verdict}")
        if one.age is not None:
            data.append(f"'{name} age'={one.age}s")
        data.append(f"'{name} size'={one.bytes}B")
    return printable(", ".join(said).replace("|", "/") + " | " * bool(data) + " ".join(data), "")


def cmd_policy(args: Sequence[str], now: Moment) -> int:
    """`policy`: what the access key of a config's backups must be allowed."""
    options, names = read_args("policy", args)
    for path in _config_paths(options.get("c", ""), names):
        settings = settings_of(read_config(path), needs_diff_dir=False)
        print(json.dumps(policy_of(settings, write_only="write-only" in options), indent=1))
    return EXIT_OK


# --------------------------------------------------------------------------------------------------
# Demo
# --------------------------------------------------------------------------------------------------

# What the demo backs up, and how; what happens to it on the second day.
_DEMO_START = """\
mkdir -m 700 gnupg diffs buckets back
mkdir -p home/letters
echo 'Dear diary, today I was backed up.' > home/letters/first.txt
echo 'I shall be gone tomorrow.' > home/letters/old.txt
seq 2000 > home/numbers.csv
cat > demo.conf <<END
DiffDir $PWD/diffs
S3Endpoint file://$PWD/buckets
Bucket demo
ChunkSize 20000
GpgRecipient demo@example.com
Directory $PWD/home
END
"""
_DEMO_CHANGE = """\
echo 'Dear diary, today I was changed.' > home/letters/first.txt
echo 'I am new here.' > home/letters/new.txt
rm home/letters/old.txt
"""


def cmd_demo(args: Sequence[str], now: Moment) -> int:
    """`demo`: the life of a backup in a throwaway folder. Raises Failure where it does not pass."""
    read_args("demo", args)
    _standard_output()  # without one there is nothing to see
    # A short path: gpg's agent listens on a socket in it, whose path has a limit of 108 bytes.
    with tempfile.TemporaryDirectory(prefix="s3nap-", dir="/tmp") as folder:
        env = {**os.environ, "GNUPGHOME": f"{folder}/gnupg"}
        try:
            _play(folder, env, now)
        finally:
            with contextlib.suppress(Failure):  # the agent that gpg started for the throwaway key
                run_tool(("gpgconf", "--kill", "all"), env)
    return EXIT_OK


def _play(folder: str, env: Mapping[str, str], now: Moment) -> None:
    """The scenes of the demo. Raises Failure where one does not pass."""
    days = [replace(now, epoch=now.epoch + 86400 * n) for n in range(10)]
    slots = [slot_and_mode(CycleSpec(), day.day, dumps=False) for day in days]
    first = next(n for n in range(9) if [slots[n][1], slots[n + 1][1]] == [FULL, DIFF])
    program = f"{shlex.quote(sys.executable)} {_program()}"
    js3tream = f"{program} js3tream --endpoint file://{folder}/buckets"
    shell = partial(_demo_shell, folder, env)

    print(f"A throwaway folder for everything: {folder}")
    shell(_DEMO_START, shown=False)
    shell("gpg --batch -q --passphrase '' --quick-generate-key demo@example.com default default\n"
          "cat demo.conf")
    print("\n-- The first day: a FULL backup")
    _demo_backup(folder, env, days[first])
    print("\n-- The next day: one file changed, one deleted, one new; a DIFF holds just that")
    shell(_DEMO_CHANGE)
    _demo_backup(folder, env, days[first + 1])
    print("\n-- What is in the bucket, now that the disk is lost")
    shell(f"{js3tream} -l -b demo")
    print("\n-- Recovery by hand: the FULL, then the DIFF")
    for n in (first, first + 1):
        name = archive_name(DIRECTORY, f"{folder}/home", *slots[n])
        shell(f"{js3tream} -o -b {shlex.quote(f'demo:{name}')}"
              " | gpg --batch -q -d | tar xzp --listed-incremental=/dev/null -C back")
    shell(f"diff -r home back{folder}/home")
    print(
        "\nPASS: what came back is what was there on the second day, the deleted file gone.\n"
        "Nothing of this is left on your disk. Where to go from here:\n"
        "  example.conf   a config to start from; README.md explains every line of it\n"
        f"  {program} -t -c YOUR.conf   shows what a run would do, and changes nothing"
    )


def _demo_shell(folder: str, env: Mapping[str, str], script: str, shown: bool = True) -> None:
    for line in script.splitlines() if shown else ():
        print(f"$ {line}", flush=True)
    done = run_tool(("bash", "-eo", "pipefail", "-c", f"exec 2>&1\n{script}"), env, cwd=folder)
    print(printable(done.output, "\n"), end="")
    if done.status:
        raise Failure(f"the demo's command ended with status {done.status}: {script}")


def _demo_backup(folder: str, env: Mapping[str, str], day: Moment) -> None:
    print(f"$ {_program()} -c {folder}/demo.conf    # on {day.date()}", flush=True)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    run = RunOptions(day, clock_from(day), env, _program(), progress_bar, host_name())
    try:
        config = read_config(f"{folder}/demo.conf")
        status = run_config(config, settings_of(config), run).status
    finally:
        log.removeHandler(handler)
    if status != EXIT_OK:
        raise Failure(f"the demo's backup ended with status {status}")


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

_SYNTAX: Mapping[str, Syntax] = {
    "list": Syntax(
        cmd_list,
        "[NAME [--files [PATH...]]]",
        f"What is in the bucket, and the moments that can be restored. {_A_NAME}",
        (("--files", "", "the files of NAME, or the PATHs in it, as a restore would give them"),
         _JSON),
        (_STATE_OPTIONS, _KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "find": Syntax(
        cmd_find,
        "PATTERN... [NAME]",
        "In which archives, and as of which moments, a file is there, and the call that restores"
        " it. PATTERN is as in a shell: \"*.tex\", or with a slash for the whole path:"
        " \"/home/*/thesis.tex\". The last word is NAME if it is a source, as list shows it.",
        (("--in", "NAME", "in this source; then every word is a PATTERN"), _JSON),
        (_KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "diff": Syntax(
        cmd_diff,
        "NAME --at WHEN [--at WHEN]", f"What is new, gone, changed or renamed. {_A_NAME}",
        (("--at", "WHEN...", "as of these two moments; given once: of that one and the newest"),
         _PARTIAL, _JSON),
        (_KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "restore": Syntax(
        cmd_restore,
        "NAME {--to PLACE | --stdout} [PATH...]",
        f"Brings back NAME, or the PATHs of a directory, as it was. {_A_NAME}",
        (("--to", "PLACE", "a folder; for a dump a file; for a repository a place for a new one"),
         ("--stdout", "", "the SQL, what a Command wrote, or the dump of the repository, to"
          " standard output"),
         ("--overwrite", "", "into a folder that is not empty: what was not backed up is DELETED"
          " there"),
         ("--thaw", "", "ask for what is frozen (Glacier); status 75 until it is there"),
         ("--tier", "NAME", "how: Bulk, Standard (unless given) or Expedited"),
         ("--days", "N", "for how long the thawed copies stay (7)")),
        (_STATE_OPTIONS, _KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "restore-script": Syntax(
        cmd_restore_script,
        "NAME", f"Prints a shell script that restores NAME without this program. {_A_NAME}",
        # A key, since a DIFF with no FULL before it is read, to see whether it holds everything.
        groups=(_STATE_OPTIONS, _KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "verify": Syntax(
        cmd_verify,
        "[NAME]", f"One sentence for each fault, and status 1 if there is any. {_A_NAME}",
        (("--deep", "", "read every archive to its end, and store nothing"),
         ("--sample", "N%", "fetch and check N percent of the chunks, chosen by chance")),
        (_KEY_OPTIONS, _BUCKET_OPTIONS),
    ),
    "check": Syntax(
        cmd_check,
        "[NAME...]",
        "Rehearses tonight's run: config, tools, folders, keys, bucket, sources. It makes no"
        " archive. It stores a probe object in the bucket and deletes it, makes a bucket that is"
        " not there and removes it again, writes to DiffDir and TempDir, and dumps the structure of"
        " each database to nowhere. NAME is as in a backup. Exit status: 0 all is well, 3 with"
        " warnings, 1 with errors.",
        (_CONFIG,
         ("--cron", "", "as cron runs it: by the first line of the script, in the home folder,"
          " with cron's PATH and HOME and nothing else"),
         ("--json", "", "for programs: a list of {level, subject, text, hint}")),
    ),
    "plan": Syntax(
        cmd_plan,
        "[NAME...]", "What is due on which day, and what can be restored after the last one: by the"
        " calendar, as if no night failed. NAME is as in a backup.",
        (_CONFIG,
         ("--days", "N", "the days from today on (14)"),
         ("--on", "DATE", "what can be restored after the run of that day: 2026-12-31"),
         ("--time", "HH:MM", "of the runs (03:00): HanoiCycle counts days of UTC"),
         _JSON),
    ),
    "status": Syntax(
        cmd_status,
        "[NAME...]",
        "Whether each source of the configs has a backup that can be restored, and is as young as"
        " its cycle asks for. It changes nothing. NAME is as in a backup. Exit status: 0 well,"
        " 3 something is late, 1 there is nothing that could be restored.",
        (_CONFIG,
         ("--grace", "DURATION", "how long after the hour of the run before it a backup may come"
          " (12h)"),
         ("--max-age", "DURATION", "what is older is late, whatever its cycle"),
         _JSON,
         ("--nagios", "", "one line, and the status of a plugin of Nagios or Icinga")),
    ),
    "policy": Syntax(
        cmd_policy,
        "[NAME]", "The least rights of the access key of a config's backups, as an IAM policy. NAME"
        " is as in a backup.",
        (_CONFIG, ("--write-only", "", "leave out reading what KMS encrypts")),
    ),
    "demo": Syntax(
        cmd_demo,
        "", "Backs up, changes, backs up again, restores and compares, in a folder of its own that"
        " is gone afterwards. It needs no account, no config and no network.",
    ),
}

COMMANDS: Mapping[str, Command] = {
    "js3tream": cmd_js3tream, **{name: syntax.run for name, syntax in _SYNTAX.items()},
}


# --------------------------------------------------------------------------------------------------
# Start
# --------------------------------------------------------------------------------------------------


def _with_utf8() -> None:
    """Starts over in UTF-8 where Python takes names for another encoding (LANG=en_US).

    Configs and keys are UTF-8, and to Linux a name is bytes, whatever the locale (PEP 540).
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run_as_script() -> NoReturn:
    """`main` as a process of its own, which ends without taking itself apart."""
    _with_utf8()
    # What is made is mostly there to stay; to search it for garbage every 700 objects, Python's
    # default, is a tenth of a short call's time ...
    gc.set_threshold(10_000)
    status = main()
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()  # what came before a failure
    os._exit(status)  # ... and to give all of it back one by one is a fifth


if __name__ == "__main__":
    # Help needs no library, and should be there at once.
    if not {"-h", "--help"} & set(sys.argv) and any(map(library_fault, LIBRARIES)):
        start_over_in_venv()
    run_as_script()
