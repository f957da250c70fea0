"""What README.md and example.conf say is so."""

import re
import shutil
import subprocess
import sys
from dataclasses import MISSING
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import Capture, GpgHome, Site

import s3napback
from s3napback import Outcome, RunReport

ROOT = Path(s3napback.__file__).parent
README = (ROOT / "README.md").read_text()

CALENDAR = """\
<Directory /home>
Diffs 3
Fulls 2
</Directory>
<Directory /opt>
Frequency 7
Diffs 3
Fulls 2
</Directory>
<Directory /srv/photos>
CycleType HanoiCycle
Discs 4
</Directory>
<MySQL all>
Fulls 2
</MySQL>
"""


def test_the_calendar_is_what_plan_shows(site: Site, capsys: Capture) -> None:
    site.jobs = CALENDAR
    noon = datetime(2026, 12, 24, 12, tzinfo=ZoneInfo("UTC"))
    assert site.run("plan", "--days", "16", now=noon) == 0
    shown = capsys.readouterr().out.partition("Size then")[0]
    section = README.partition("<!-- calendar")[2].partition("\n```\n")[2].partition("```")[0]
    assert section == shown
    for directive in re.findall(r"^[A-Z].*", CALENDAR, re.MULTILINE):
        assert directive in README.partition("<!-- calendar")[0].rpartition("## How rotation")[2]


def test_every_python_name_in_the_table_is_there() -> None:
    table = README.partition("## From Perl to Python")[2]
    names = {
        name
        for row in table.splitlines()
        if row.startswith("| `") or row.startswith("| js3")
        for name in re.findall(r"`([A-Za-z_.]+)`", row.split("|")[2])
    }
    assert len(names) > 20
    for name in names:
        found: Any = s3napback
        for part in name.split("."):
            found = getattr(found, part)


def test_every_directive_of_the_example_is_in_the_readme_and_back() -> None:
    example = (ROOT / "example.conf").read_text()
    shown = set(re.findall(r"^#?\s*<?([A-Z][A-Za-z0-9]+) [^ ]", example, re.MULTILINE))
    known = {
        name
        for line in README.partition("## Configuration")[2].partition("## How rotation")[0]
        .splitlines()
        if line.startswith("| `")
        for name in re.findall(r"^\| `([A-Z]\w+)", line)
    }
    assert known == shown & known
    assert known > {"DiffDir", "Directory", "Exclude", "SafeReplace", "UseTempFile"}


def directives_of(heading: str) -> dict[str, str]:
    """Directive → its default, of the table that follows a line of the README."""
    _, _, section = README.partition("## Configuration")
    _, _, table = section.partition(f"\n{heading}")[2].partition("\n\n|")
    rows = re.findall(r"^\| `(\w+)[^`]*` \| ([^|]+) \|", table.partition("\n\n")[0], re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize(
    ("heading", "rows", "others"),
    [
        ("At the main level:", s3napback.SETTINGS, {*s3napback.HOOKS}),
        ("A block, and a `<Cycle>`", s3napback.TIMING, {
            "Exclude", "ExcludeCaches", "ExcludeIfPresent", "ExcludeFrom", "OneFileSystem",
            "MySQLOptions", "Run", "UseTempFile", *s3napback.HOOKS,
        }),
    ],
)
def test_the_tables_of_directives_are_those_of_the_program(
    heading: str, rows: dict[str, Any], others: set[str]
) -> None:
    shown = directives_of(heading)
    assert set(shown) == {*rows, *others}
    for name, row in rows.items():
        if row.default is MISSING:
            assert shown[name] == "required"
        elif row.default in (None, "", ()):
            assert not re.fullmatch("required|yes|no|[0-9.]+", shown[name])
        elif isinstance(row.default, bool):
            assert shown[name] == ("yes" if row.default else "no")
        else:
            assert row.metadata["read"](shown[name]) == row.default
    assert {*s3napback.SETTINGS, *s3napback.JOB_DIRECTIVES} >= {*rows, *others}


def test_the_example_is_a_good_config(tmp_path: Path, capsys: Capture) -> None:
    text = (ROOT / "example.conf").read_text()
    text = text.replace("/var/lib/s3napback", str(tmp_path))
    conf = tmp_path / "example.conf"
    conf.write_text(text)
    config = s3napback.read_config(str(conf))
    settings = s3napback.settings_of(config)
    jobs = s3napback.jobs_of(config)
    assert settings.gpg_recipients == ("backup@example.com",)
    assert len(jobs) == 12
    assert {job.kind for job in jobs} == set(s3napback.KINDS)
    assert not s3napback.config_warnings(config)


def test_the_glossary_has_every_heading_noun() -> None:
    for word in ("archive", "chunk", "cycle", "diff file", "draft", "slot", "stage", "task"):
        assert f"| {word} |" in README


def blocks(start: str) -> list[str]:
    """The README's blocks of code that begin so."""
    found = re.findall(r"^```\w*\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    return [one for one in found if one.startswith(start)]


def units(folder: Path) -> list[Path]:
    """The units of systemd, for the program where it is."""
    made = []
    for text in blocks("# /etc/systemd/system/"):
        first, _, rest = text.partition("\n")
        path = folder / Path(first[2:]).name
        path.write_text(rest.replace("/opt/s3napback/s3napback.py", str(ROOT / "s3napback.py")))
        made.append(path)
    return made


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd is not installed")
    made = units(tmp_path)
    assert [path.suffix for path in made] == [".service", ".timer", ".service"]
    done = subprocess.run([analyze, "verify", *made], capture_output=True, text=True)
    about = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert (done.returncode, about) == (0, [])


def test_a_run_works_where_it_can_write_only_what_its_unit_names(
    nobodys: Site, gpg_home: GpgHome
) -> None:
    """The unit's name spaces by hand: what it has for read-only is, `/tmp` is another one."""
    unit = units(nobodys.folder)[0].read_text()
    assert {"ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes"} <= set(
        unit.splitlines())
    wanted = {"/var/lib/s3napback", "/var/log", "/root/.gnupg",
              "/var/lib/prometheus/node-exporter"}
    writable = re.search("^ReadWritePaths=(.*)$", unit, re.MULTILINE)
    state = re.search("^StateDirectory=(.*)$", unit, re.MULTILINE)
    assert writable and state
    named = {path.lstrip("-") for path in writable[1].split()} | {f"/var/lib/{state[1]}"}
    assert named == wanted
    top = Path("/media")  # where the site is in there
    shutil.copytree(gpg_home.home, nobodys.folder / ".gnupg", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("S.*"))
    nobodys.settings |= {
        "DiffDir": f"{top}/diffs", "S3Endpoint": f"file://{top}/buckets", "TempDir": "/var/tmp",
        "MetricsFile": f"{top}/prom/x.prom", "GpgRecipient": gpg_home.recipient,
    }
    nobodys.jobs = f"<Directory {top}/data>\nUseTempFile Yes\n</Directory>"
    nobodys.write()
    for name in ("prom", "log"):
        (nobodys.folder / name).mkdir()
    shutil.copy(ROOT / "s3napback.logconfig", nobodys.folder)
    logconfig = nobodys.folder / "s3napback.logconfig"
    logconfig.write_text(logconfig.read_text().replace("/var/log/", f"{top}/log/"))
    kept = " ".join(f"{top}/{name}" for name in ("diffs", "log", ".gnupg", "prom", "buckets"))
    script = f"""set -e
        mount --bind "$1" {top}
        mount --bind "$2" /mnt  # the environment may be in /tmp
        for path in {kept}; do mount --bind $path $path; done
        mount -o remount,bind,ro {top}; mount -o remount,bind,ro /
        mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /var/tmp
        for path in {top}/x /root/x /etc/x; do touch $path 2>/dev/null && exit 9; done
        exec env -i PATH=/usr/bin:/bin HOME={top} setpriv --no-new-privs \
            /mnt/bin/python {top}/s3napback.py -c {top}/my.conf"""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = subprocess.run([*words, str(nobodys.folder), sys.prefix], capture_output=True,
                          text=True)
    assert done.returncode == 0, done
    assert "Finished: 1 stored, 0 skipped, 0 failed" in done.stderr
    assert "Finished: 1 stored" in (nobodys.folder / "log" / "s3napback.log").read_text()
    assert 'run_status{config="/media/my.conf"} 0' in (nobodys.folder / "prom/x.prom").read_text()


def test_prometheus_understands_the_rules_and_we_have_the_metrics(tmp_path: Path) -> None:
    (rules,) = blocks("groups:")
    path = tmp_path / "rules.yml"
    path.write_text(rules + "\n")
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
        assert done.returncode == 0, done
    text = s3napback.metrics_text("", "/c", RunReport(0, (Outcome("a", "b", "c", "ok"),)), 1.0)
    made = set(re.findall(r"^# TYPE (\w+) gauge$", text, re.MULTILINE))
    assert set(re.findall(r"s3napback_\w+", rules)) <= made
    table = README.partition("### Metrics")[2].partition("###")[0]
    assert set(re.findall(r"`(s3napback_\w+)`", table)) == made
    assert {f"{name}{{" for name in made} <= {line.partition("{")[0] + "{"
                                              for line in text.splitlines()}


def test_the_config_that_tells_of_nights_is_a_good_one(tmp_path: Path) -> None:
    (shown,) = blocks("# healthchecks.io")
    conf = tmp_path / "my.conf"
    conf.write_text(f"DiffDir {tmp_path}\nBucket b\nChunkSize 1000\n{shown}\n")
    config = s3napback.read_config(str(conf))
    settings = s3napback.settings_of(config, needs_diff_dir=False)
    assert len(settings.ping_urls) == 2
    assert s3napback.ping_target(settings.ping_urls[1], "/fail", "7").endswith(
        "?status=down&msg=down")
    assert str(settings.metrics_file).endswith("/node-exporter/s3napback.prom")
    assert not s3napback.config_warnings(config)
