"""Dumps of real servers: options that must be first, errors that --force goes on after, and what
no dump of one database holds."""

import gzip
from collections.abc import Iterator

import pytest
from conftest import NIGHT, Capture, MariaDb, Postgres, Site, fake_tool

import s3napback


@pytest.fixture
def shop(mariadb: MariaDb) -> Iterator[str]:
    """A job's name: a database with a view whose table is gone."""
    mariadb.run(
        "CREATE OR REPLACE DATABASE shop; USE shop;"
        "CREATE TABLE goods (x INT); INSERT INTO goods VALUES (4711);"
        "CREATE TABLE gone (x INT); CREATE VIEW broken AS SELECT x FROM gone; DROP TABLE gone;"
        "CREATE TABLE z (x INT); INSERT INTO z VALUES (4712)"
    )
    yield f"{mariadb.socket}:shop"
    mariadb.run("DROP DATABASE IF EXISTS shop")  # it would fail the dump of all


def job(name: str, options: str) -> str:
    return f"<MySQL {name}>\nMySQLOptions {options}\n</MySQL>"


def dump(site: Site) -> str:
    (name,) = site.archives()
    return gzip.decompress(site.content(name)).decode()


def check(site: Site, capsys: Capture) -> str:
    capsys.readouterr()
    s3napback.main(["check", "-c", str(site.write())], now=NIGHT)
    return capsys.readouterr().out


@pytest.mark.parametrize("option", ["--defaults-extra-file={}", "--defaults-file={}"])
def test_options_that_must_be_first_are_first(
    site: Site, shop: str, option: str, capsys: Capture
) -> None:
    options = site.folder / "my.cnf"
    options.write_text("[mysqldump]\nno-data\nforce\n")
    site.jobs = job(shop, f"--user=root --force {option.format(options)}")
    assert site.run() == 3
    assert "CREATE TABLE `goods`" in dump(site) and "4711" not in dump(site)
    site.run("-t", "-f")
    assert f"mysqldump {option.format(options)} --opt --socket" in capsys.readouterr().err


def test_no_defaults_stays_first(site: Site, mariadb: MariaDb) -> None:
    site.jobs = job(f"{mariadb.socket}:mysql", "--user=root --no-defaults --no-data")
    assert site.run() == 0


@pytest.mark.parametrize("options", ["--force", "-f", "--force --skip-comments"])
def test_a_whole_dump_with_errors_is_stored_with_warnings(
    site: Site, shop: str, options: str, capsys: Capture
) -> None:
    site.jobs = job(shop, f"--user=root {options}")
    assert site.run() == 3
    assert "View 'shop.broken' references invalid table" in capsys.readouterr().err
    assert "4711" in dump(site) and "4712" in dump(site)
    (archive,) = site.archives().values()
    assert archive.metadata["status"] == "warnings"
    assert s3napback.main(["verify", "-c", str(site.conf), "--deep"]) == 0
    assert "warning  MySQL" in check(site, capsys)


@pytest.mark.parametrize("options", ["", "--force --compact"])
def test_a_dump_that_is_not_known_to_be_whole_is_not_stored(
    site: Site, shop: str, options: str, capsys: Capture
) -> None:
    site.jobs = job(shop, f"--user=root {options}")
    assert site.run() == 1
    assert "mysqldump ended with status 2" in capsys.readouterr().err
    assert site.archives() == {}


def test_with_force_no_empty_dump_takes_the_place_of_a_good_one(
    site: Site, shop: str, mariadb: MariaDb, capsys: Capture
) -> None:
    """mysqldump --force writes its closing lines for a database that is not there, too."""
    site.jobs = job(shop, "--user=root --force")
    assert site.run() == 3
    before = site.content("".join(site.archives()))
    mariadb.run("DROP DATABASE shop")
    assert site.run("-f") == 1
    assert "Unknown database 'shop'" in capsys.readouterr().err
    assert site.content("".join(site.archives())) == before


def test_with_force_a_server_that_is_lost_is_a_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It goes on without its server, to the closing line (as MariaDB 10.11 was seen to do)."""
    fake_tool(site, monkeypatch, "mysqldump", """
echo '-- MariaDB dump'; echo 'INSERT INTO a VALUES (1);'; echo '-- Dump completed on 2026-11-23'
echo 'mysqldump: Error 2013: Lost connection to server during query when dumping table `c`' >&2
echo "mysqldump: Couldn't execute 'UNLOCK TABLES': Server has gone away (2006)" >&2
exit 2""")
    site.jobs = job("shop", "--force")
    assert site.run() == 1
    assert site.archives() == {}
    assert "Server has gone away" in capsys.readouterr().err


def test_a_large_dump_is_watched_without_harm(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(site, monkeypatch, "mysqldump",
              "seq 1 1000000; echo '-- Dump completed'; echo 'a view (1356)' >&2; exit 2")
    site.settings["ChunkSize"] = "100000"
    site.jobs = job("shop", "--force")
    assert site.run() == 3
    lines = dump(site).splitlines()
    assert len(lines) == 1_000_001 and lines[-2] == "1000000"


@pytest.mark.parametrize(
    "option",
    ["--result-file=/x", "--result_file=/x", "--resu=/x", "--tab=/x", "-r/x", "--print-defaults"],
)
def test_options_that_leave_no_dump_are_told(site: Site, option: str, capsys: Capture) -> None:
    site.jobs += "\n" + job("shop", option)
    assert site.run() == 1
    assert f"with {option} in MySQLOptions there is no dump" in capsys.readouterr().err
    assert len(site.archives()) == 1  # the directory's
    assert f"with {option} in MySQLOptions there is no dump" in check(site, capsys)


def test_check_says_what_no_dump_of_one_database_holds(
    site: Site, postgres: Postgres, mariadb: MariaDb, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    for name, value in postgres.env.items():
        monkeypatch.setenv(name, value)
    one = f"PostgreSQL {postgres.user}@postgres\nMySQL {mariadb.socket}:shop"
    site.jobs = one
    out = check(site, capsys)
    assert "warning  PostgreSQL: roles and tablespaces are in no backup" in out
    assert "warning  MySQL: users and their rights are in no backup" in out
    site.jobs = f"{one}\nPostgreSQL all\n<Cycle c>\nMySQL {mariadb.socket}:all\n</Cycle>"
    assert "are in no backup" not in check(site, capsys)
