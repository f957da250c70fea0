"""Whatever Compressor writes must be readable by a restore, by verify and by the restore script."""

import shlex
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, require_tool

import s3napback

FULL_DAY = NIGHT - timedelta(days=4)
COMPRESSORS = (
    "gzip", "pigz -1", "nice gzip -9", "bzip2", "xz", "xz -T0 -6", "lz4", "lz4 -l", "zstd -3",
    "zstd --long=31", "pzstd", "cat",
)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_known_format_comes_back(
    site: Site, compressor: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any, tmp_path: Path
) -> None:
    for tool in compressor.split():
        if not tool.startswith("-"):
            require_tool(tool)
    fake_tool(site, monkeypatch, "mysqldump",
              "echo '-- MySQL dump'; echo 'SELECT 1;'; echo '-- Dump completed'")
    site.settings["Compressor"] = f'"{compressor}"'
    site.jobs = f"Directory {site.data}\nMySQL shop"
    assert site.run(now=FULL_DAY) == 0
    (site.data / "new").write_text("two" * 5000)
    assert site.run(now=FULL_DAY + timedelta(days=1)) == 0
    conf = str(site.conf)
    assert s3napback.main(["verify", "-c", conf, "--deep"]) == 0
    assert s3napback.main(["restore", "-c", conf, str(site.data), "--to", f"{tmp_path}/b"]) == 0
    capfdbinary.readouterr()
    assert s3napback.main(["restore", "-c", conf, "MySQL/shop", "--stdout"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"-- MySQL dump\nSELECT 1;")
    # The script takes nothing that is only here.
    for name, place in ((str(site.data), "s"), ("MySQL/shop", "s.sql")):
        assert s3napback.main(["restore-script", "-c", conf, name]) == 0
        script = tmp_path / "restore.sh"
        script.write_bytes(capfdbinary.readouterr().out)
        subprocess.run(["sh", str(script), str(tmp_path / place)], check=True, capture_output=True)
    assert (tmp_path / "s.sql").read_text().startswith("-- MySQL dump\nSELECT 1;")
    for top in ("b", "s"):
        folder = tmp_path / top / str(site.data).lstrip("/")
        assert (folder / "file").read_text() == "one"
        assert (folder / "new").read_text() == "two" * 5000
    assert s3napback.main(["check", "-c", conf]) != 1
    assert b"can be read back" in capfdbinary.readouterr().out


@pytest.mark.parametrize(
    ("compressor", "told"),
    [
        ("base64", "what it writes cannot be read back (these can be read: pigz, gzip, bzip2, xz"),
        ("tr a b", "what it writes cannot be read back"),
        ("xz --format=lzma", "what it writes cannot be read back"),
        ("/bin/true", "what it writes cannot be read back"),
        ("/usr/bin/yes", "what it writes cannot be read back"),
        ("/bin/false", "false ended with status 1"),
        ("gzip | cat", "it is one command with its options, and no line for a shell"),
        ("no-such-tool", "no-such-tool is not on PATH"),
        ("head -c 100", "cannot be read back"),
    ],
)
def test_a_compressor_that_cannot_be_read_is_refused(
    site: Site, compressor: str, told: str, capsys: Capture
) -> None:
    site.settings["Compressor"] = f'"{compressor}"'
    assert site.run() == 2
    (line,) = [t for t in capsys.readouterr().err.splitlines() if " FATAL " in t]
    assert f"Compressor {compressor} cannot be used: " in line and told in line
    assert site.archives() == {}
    assert s3napback.main(["check", "-c", str(site.conf)], now=NIGHT) == 1
    assert shlex.split(compressor)[0] in capsys.readouterr().out


def test_a_compressor_that_dies_on_the_way_stores_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake_tool(site, monkeypatch, "xz",
              'head -c 70000 | "$REAL" "$@"; if [ "$(head -c 1 | wc -c)" = 1 ]; then exit 7; fi')
    (site.data / "long").write_bytes(bytes(200_000))
    site.settings["Compressor"] = "xz"
    assert site.run() == 1
    assert "xz ended with status 7" in capsys.readouterr().err
    assert site.archives() == {}


def test_a_dump_in_an_unknown_format_is_no_sql(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """As an older version, which did not try the Compressor, may have stored it."""
    monkeypatch.setattr(s3napback, "check_compressor", lambda *_: None)
    fake_tool(site, monkeypatch, "mysqldump", "echo '-- MySQL dump'; echo '-- Dump completed'")
    site.jobs = "MySQL shop"
    site.settings["Compressor"] = '"xz --format=lzma"'
    assert site.run() == 0
    conf = str(site.conf)
    assert s3napback.main(["restore", "-c", conf, "MySQL/shop", "--stdout"]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "compressed in a way that is not known here" in said.err
    assert s3napback.main(["verify", "-c", conf, "--deep"]) == 1
    assert "compressed in a way that is not known here" in capfd.readouterr().out


def test_where_the_decoder_is_missing_it_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    site.settings["Compressor"] = "xz"
    assert site.run() == 0
    folder = tmp_path / "path"
    folder.mkdir()
    tar = shutil.which("tar")
    assert tar
    (folder / "tar").symlink_to(tar)
    monkeypatch.setenv("PATH", str(folder))
    words = ["restore", *site.bucket, str(site.data)]
    assert s3napback.main([*words, "--to", f"{tmp_path}/back"]) == 1
    assert "xz is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["igzip", "pigz", "gzip"])
@pytest.mark.parametrize("fault", ["cut", "changed"])
def test_each_decoder_of_gzip_notices_what_is_not_whole(
    site: Site, tool: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """decoded takes the first that is there, so each of them must be strict."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / tool).symlink_to(require_tool(tool))
    import gzip
    import random

    data = bytearray(gzip.compress(random.Random(1).randbytes(300_000)))
    if fault == "cut":
        del data[-3:]
    else:
        data[200_000] ^= 1
    env = {"PATH": str(folder)}
    with (
        pytest.raises(s3napback.Failure, match=f"{tool} ended with status"),
        s3napback.decoded(iter([bytes(data)]), env) as content,
    ):
        for _ in content:
            pass
