"""What README.md and example.conf say is so."""

import re
from dataclasses import MISSING
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import Capture, Site

import s3napback

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
