"""Prefix NAME: many machines on one bucket, and services that refuse a leading slash."""

import json
import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool

import s3napback

# A FULL is due on FULL_DAY, a DIFF on the day after.
FULL_DAY = NIGHT - timedelta(days=4)


def command(site: Site, *words: str, now: datetime = NIGHT) -> int:
    return s3napback.main([words[0], "-c", str(site.write()), *words[1:]], now=now)


def bucket(site: Site) -> list[str]:
    return site.bucket


def restored(site: Site, *words: str) -> dict[str, str]:
    """The files, by their place, that `restore WORDS` brings back."""
    place = site.folder / "back"
    subprocess.run(["rm", "-rf", str(place)], check=True)
    assert s3napback.main(["restore", *words, "--to", str(place)], now=NIGHT) == 0
    return {
        str(path.relative_to(place)): path.read_text()
        for path in place.rglob("*") if path.is_file()
    }


def test_every_archive_has_the_prefix_and_chains_as_ever(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run(now=FULL_DAY) == 0
    (site.data / "new").write_text("two")
    assert site.run(now=FULL_DAY + timedelta(days=1)) == 0
    found = site.archives()
    assert set(found) == {f"web1{site.data}-14-FULL", f"web1{site.data}-15-DIFF"}
    marks = [archive.metadata for archive in found.values()]
    assert {m["prefix"] for m in marks} == {"web1"}
    full, diff = sorted(marks, key=lambda m: m["made"])
    assert diff["state"].split(":")[0] == full["state"].split(":")[1]
    assert f"Directory {site.data} -> bkt:web1{site.data}-15" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["{data}", "{data}/", "web1{data}"])
def test_a_source_is_found_by_its_own_name_and_by_its_whole_one(site: Site, given: str) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run(now=FULL_DAY) == 0
    name = given.format(data=site.data)
    file = f"{str(site.data).lstrip('/')}/file"
    assert restored(site, "-c", str(site.write()), name)[file] == "one"
    assert restored(site, *bucket(site), "--prefix", "web1", name)[file] == "one"
    assert restored(site, *bucket(site), f"web1{site.data}")[file] == "one"
    (archive,) = site.archives()
    assert restored(site, *bucket(site), archive)[file] == "one"
    assert command(site, "verify", name, "--deep") == 0


@pytest.mark.parametrize("slash", ["", "/"])
def test_relative_names_and_home_are_found_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, slash: str
) -> None:
    monkeypatch.setenv("HOME", str(site.folder))
    relative = str(site.data).lstrip("/")
    site.settings["Prefix"] = "web1"
    site.jobs = f"Directory {relative}{slash}\nDirectory ~/temp{slash}"
    (site.folder / "temp" / "mail").write_text("m")
    for day in range(2):
        assert site.run(now=FULL_DAY + timedelta(days=day)) == 0
    conf = str(site.write())
    for name in (relative, f"/{relative}"):
        assert restored(site, "-c", conf, name) == {f"{relative}/file": "one"}
    assert restored(site, "-c", conf, "~/temp") == {
        f"{str(site.folder).lstrip('/')}/temp/mail": "m"
    }


def test_machines_share_a_bucket_without_seeing_each_other(site: Site, capsys: Capture) -> None:
    for machine in ("web1", "web10", "site/web1", ""):
        site.settings["Prefix"] = machine
        site.settings["DiffDir"] = f"{site.folder}/diffs{machine.replace('/', '-')}"
        os.makedirs(site.settings["DiffDir"], exist_ok=True)
        (site.data / "file").write_text(machine)
        assert site.run(now=FULL_DAY) == 0
    assert len(site.archives()) == 4
    capsys.readouterr()
    assert s3napback.main(["list", *bucket(site), "--json"], now=NIGHT) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert [(s["prefix"], s["name"]) for s in sources] == [
        (p, str(site.data)) for p in ("", "site/web1", "web1", "web10")
    ]
    assert s3napback.main(["list", *bucket(site)], now=NIGHT) == 0
    assert f"Directory {site.data} (Prefix site/web1)\n" in capsys.readouterr().out
    file = f"{str(site.data).lstrip('/')}/file"
    for machine in ("web1", "web10", "site/web1"):
        site.settings["Prefix"] = machine
        assert command(site, "list", "--json") == 0
        assert [s["prefix"] for s in json.loads(capsys.readouterr().out)["sources"]] == [machine]
        assert restored(site, "-c", str(site.write()), str(site.data))[file] == machine
        assert restored(site, *bucket(site), f"{machine}{site.data}")[file] == machine
    assert restored(site, *bucket(site), str(site.data))[file] == ""


def test_a_folder_called_as_the_prefix_is_not_taken_for_it(site: Site, capsys: Capture) -> None:
    (site.folder / "web1" / "etc").mkdir(parents=True)
    (site.folder / "web1" / "etc" / "f").write_text("mine")
    name = f"{site.folder}/web1/etc"
    site.jobs = f"Directory {name}\nDirectory {name[1:]}"
    assert site.run(now=FULL_DAY) == 0
    capsys.readouterr()
    assert s3napback.main(["list", *bucket(site), "--json"], now=NIGHT) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert [(s["prefix"], s["name"]) for s in sources] == [("", name), ("", name[1:])]
    first = name[1:].partition("/")[0]
    assert s3napback.main(["list", *bucket(site), "--prefix", first, "--json"], now=NIGHT) == 0
    assert json.loads(capsys.readouterr().out)["sources"] == []


def test_dumps_have_the_prefix_too(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake_tool(site, monkeypatch, "mysqldump", "echo SQL of ${!#}; echo '-- Dump completed'")
    fake_tool(site, monkeypatch, "pg_dumpall", "echo roles")
    site.settings["Prefix"] = "web1"
    site.jobs = "MySQL shop\nPostgreSQL all"
    assert site.run(now=FULL_DAY) == 0
    assert {name.rstrip("0123456789") for name in site.archives()} == {
        "web1/MySQL/shop-", "web1/PostgreSQL/-"
    }
    capsys.readouterr()
    for words in (["-c", str(site.conf), "MySQL/shop"], [*bucket(site), "web1/MySQL/shop"]):
        assert s3napback.main(["restore", *words, "--stdout"], now=NIGHT) == 0
        assert "SQL of shop" in capsys.readouterr().out
    # Another machine's dump of that name is another source.
    site.settings["Prefix"] = "web2"
    site.settings["DiffDir"] = f"{site.folder}/diffs2"
    os.mkdir(site.settings["DiffDir"])
    assert site.run(now=FULL_DAY) == 0
    capsys.readouterr()
    assert s3napback.main(["list", *bucket(site)], now=NIGHT) == 0
    out = capsys.readouterr().out
    assert "MySQL shop (Prefix web1)\n" in out and "MySQL shop (Prefix web2)\n" in out
    assert command(site, "verify", "MySQL/shop") == 0


@pytest.mark.parametrize(
    "prefix",
    ["/web1", "web1/", "a//b", "a:b", "a/../b", ".", "MySQL", "a/PostgreSQL", '""', "x" * 201,
     '"a\tb"'],
)
def test_a_bad_prefix_is_one_sentence(site: Site, prefix: str, capsys: Capture) -> None:
    site.settings["Prefix"] = prefix
    assert site.run() == 2
    (line,) = [t for t in capsys.readouterr().err.splitlines() if " FATAL " in t]
    assert "Prefix" in line and "my.conf:7" in line and "\t" not in line
    assert site.archives() == {}
    assert s3napback.main(["list", *bucket(site), "--prefix", prefix.strip('"')], now=NIGHT) == 2
    assert "Prefix" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ['"büro 1"', "a.b_c-3-FULL", "50%+x"])
def test_an_awkward_prefix_works_over_http(s3_site: Site, prefix: str, capsys: Capture) -> None:
    s3_site.settings["Prefix"] = prefix
    assert s3_site.run(now=FULL_DAY) == 0
    assert s3_site.run(now=FULL_DAY + timedelta(days=1)) == 0
    assert sorted(n.rpartition("-")[2] for n in s3_site.archives()) == ["DIFF", "FULL"]
    capsys.readouterr()
    assert command(s3_site, "list", "--json") == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert (source["prefix"], source["name"]) == (prefix.strip('"'), str(s3_site.data))
    assert len(source["restorable"]) == 2
    assert restored(s3_site, "-c", str(s3_site.conf), str(s3_site.data))


def test_a_prefix_is_found_where_a_copy_lost_the_marks(s3_site: Site, s3_server: Any) -> None:
    s3_site.settings["Prefix"] = "web1"
    assert s3_site.run(now=FULL_DAY) == 0
    for key in list(s3_server._backend.buckets["bkt"].keys):
        s3_server.stored("bkt", key).metadata.clear()
    file = f"{str(s3_site.data).lstrip('/')}/file"
    assert restored(s3_site, "-c", str(s3_site.conf), str(s3_site.data))[file] == "one"


def test_test_mode_shows_the_whole_name(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run("-t", now=FULL_DAY) == 0
    shown = capsys.readouterr().err
    assert f"-i -b bkt:web1{site.data}-" in shown
    assert f"Directory {site.data} -> bkt:web1{site.data}-" in shown


def test_two_names_for_one_archive_are_told(site: Site, capsys: Capture) -> None:
    """Without the leading slash, /data and data are one archive."""
    site.settings["Prefix"] = "web1"
    site.jobs = f"Directory {site.data}\nDirectory {str(site.data)[1:]}"
    assert site.run(now=FULL_DAY) == 1
    assert "writes to the same archive" in capsys.readouterr().err
    assert command(site, "check") == 1
    assert "writes to the same archives" in capsys.readouterr().out


def test_a_restore_script_names_the_prefix(site: Site, capfdbinary: Any, tmp_path: Path) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run(now=FULL_DAY) == 0
    capfdbinary.readouterr()
    assert command(site, "restore-script", str(site.data)) == 0
    script = tmp_path / "restore.sh"
    script.write_bytes(capfdbinary.readouterr().out)
    assert b"web1" in script.read_bytes()
    subprocess.run(["sh", str(script), str(tmp_path / "out")], check=True, capture_output=True)
    assert (tmp_path / "out" / str(site.data).lstrip("/") / "file").read_text() == "one"


def test_a_name_that_begins_as_its_prefix_does(site: Site) -> None:
    first = str(site.data)[1:].partition("/")[0]
    site.settings["Prefix"] = first
    relative = str(site.data)[1:]
    site.jobs = f"Directory {relative}"
    assert site.run(now=FULL_DAY) == 0
    conf = str(site.write())
    for name in (relative, f"/{relative}", f"{first}/{relative}"):
        assert restored(site, "-c", conf, name) == {f"{relative}/file": "one"}
