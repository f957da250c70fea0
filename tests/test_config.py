"""Section 4: a config means what it meant to the original."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, cycle_of
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import Block, Failure, Line

CASES = {case["name"]: case for case in json.loads((GOLDEN / "configs.json").read_text())}

# Where the port differs on purpose: the recording's name, and why.
DIFFERENCES = {
    "dup_blocks_same_name": "blocks of one name each stand for themselves",
    "dup_blocks_same_name_dir": "blocks of one name each stand for themselves",
    "mixed_dir_line_then_block": "a line and a block side by side work",
    "mixed_dir_in_cycle_line_then_block": "a line and a block side by side work",
    "mixed_block_first_after_close": "a line and a block side by side work",
    "case_values_kept": "a line and a block side by side work",
    "mixed_dir_block_then_line": "a line and a block side by side work",
    "mixed_dir_in_cycle_block_then_line": "a line and a block side by side work",
    "cycle_as_directive": "a Cycle line is ignored",
    "cycle_directive_then_block": "a Cycle line is ignored",
    "cycle_directive_names_block_type": "a Cycle line is ignored; a job block needs a name",
    "block_name_zero": "a job block needs a name",
}


def write_case(case: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> str:
    """The config's path; the current folder is the one that the recording had."""
    conf = folder / "confdir"
    conf.mkdir()
    (folder / "elsewhere").mkdir()
    path = conf / "test.conf"
    path.write_bytes(case["text"].encode(case["encoding"]))
    for name, text in case.get("files", {}).items():
        (conf / name).parent.mkdir(exist_ok=True)
        (conf / name).write_text(text)
    patch.chdir(conf if case.get("cwd") == "confdir" else folder / "elsewhere")
    return str(path)


def as_recorded(text: str) -> str:
    """Bytes that are not UTF-8 are recorded as the characters of Latin-1."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError:
        return os.fsencode(text).decode("latin-1")


def compare(block: Block, recorded: dict[str, Any]) -> None:
    """The directives and blocks of one level. The recording has only names that the script knows;
    a block beside a line is an object to it, and a second block of a name the first one again."""
    names = {name.lower(): entry for name, entry in recorded.get("directives", {}).items()}
    known = {name.lower() for name in s3napback._KNOWN.values()} - {"include"}
    assert {*block.by_name} & known == set(names)
    for name, entry in names.items():
        ours: list[Any] = []
        for found in block.by_name[name]:
            if isinstance(found, Line):
                ours += map(as_recorded, found.values)
            else:
                ours.append({"block_spec": [found.tag, *found.arguments]})
        if "list" not in entry:  # asking for it made the original die
            continue
        assert len(ours) == len(entry["list"])
        for mine, theirs in zip(ours, entry["list"], strict=True):
            assert mine == theirs or theirs == {"object": "Config::ApacheFormat"}
    for name, items in recorded.get("blocks", {}).items():
        for mine, theirs in zip(block.blocks(name), items, strict=True):
            assert [mine.tag, *map(as_recorded, mine.arguments)] == theirs["spec"]
            if "content" in theirs:
                compare(mine, theirs["content"])


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_read_as_the_original_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    path = write_case(case, tmp_path, monkeypatch)
    if "error" in case:
        with pytest.raises(Failure) as caught:
            s3napback.read_config(path)
        assert caught.value.message == case["error"].replace("FILE", path).strip()
        assert caught.value.status == 2
        return
    config = s3napback.read_config(path)
    compare(config, case["perl"]["main"])
    if name in DIFFERENCES:
        return
    check_script(config, case["perl"]["script"], tmp_path)


def check_script(config: Block, script: dict[str, Any], folder: Path) -> None:
    """Settings and jobs as the script takes them from the file."""
    for directive, value in script["settings"].items():
        ours = config.lines(directive)
        assert (ours[0].text if ours else None) == value
    died = script.get("settings_die")
    if died and not died.startswith("DiffDir"):
        here = [Line((str(folder),), "x")]  # the recording did not look for the folder
        with pytest.raises(Failure) as caught:
            s3napback.settings_of(replace(config, by_name={**config.by_name, "diffdir": here}))
        assert caught.value.message == died
    jobs = s3napback.jobs_of(config)
    assert len(jobs) == len(script["jobs"])
    for job, recorded in zip(jobs, script["jobs"], strict=True):
        assert (job.kind, as_recorded(job.name)) == (recorded["directive"], recorded["name"])
        temp = recorded["cycle"].pop("UseTempFile", None)
        assert job.use_temp_file == (temp == "1")
        assert job.cycle == cycle_of(recorded["cycle"])
        if recorded["directive"] == "Directory":
            assert [as_recorded(e) for e in job.excludes] == recorded["excludes"]
        if recorded["directive"] == "MySQL":
            first = recorded["mysqloptions"]
            assert " ".join(job.mysql_options).startswith((first or "").replace("'", ""))


def test_every_recording_of_a_config_is_looked_at() -> None:
    assert len(CASES) == 189
    assert set(DIFFERENCES) < set(CASES)


def parse(text: str, folder: Path) -> Block:
    path = folder / "x.conf"
    path.write_text(text)
    return s3napback.read_config(str(path))


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("mixed_dir_block_then_line", [("/b", 2), ("/a", 4)]),
        ("mixed_dir_in_cycle_block_then_line", [("/b", 2), ("/a", 4), ("/z", 4)]),
        ("dup_blocks_same_name", [("/a", 1), ("/b", 2)]),
        ("case_values_kept", [("/Home/Foo", 4), ("/Home/Bar", 4)]),
        ("mixed_block_first_after_close", [("/b", 4), ("/c", 4), ("/a", 4)]),
        ("cycle_as_directive", [("/a", 4)]),
        ("cycle_directive_then_block", [("/a", 4)]),
    ],
)
def test_what_differs_from_the_original_is_in_a_table(
    name: str, jobs: list[tuple[str, float]], tmp_path: Path
) -> None:
    config = parse(CASES[name]["text"], tmp_path)
    found = s3napback.jobs_of(config)
    assert [(job.name, job.cycle.fulls) for job in found] == jobs
    assert s3napback.config_warnings(config)


@pytest.mark.parametrize("name", ["block_name_zero", "cycle_directive_names_block_type"])
def test_a_job_block_needs_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="has no name") as caught:
        s3napback.jobs_of(parse(CASES[name]["text"], tmp_path))
    assert caught.value.where.startswith(f"{tmp_path}/x.conf:")


@pytest.mark.parametrize(
    ("text", "names", "warning"),
    [
        ("Directory /a # not /b\nDirectory /c\n", ["/a", "/c"], "ends at #"),
        ("Directory /a\n<Directory /a>\n</Directory>\n", ["/a", "/a"], "jobs alike"),
        ("<Directory /a>\n</Directory>\n<Directory /a>\n</Directory>", ["/a", "/a"], "second"),
        ("<Cycle x>\nDirectory /a\n</Cycle>\n<Cycle x>\nDirectory /b\n</Cycle>", ["/a", "/b"],
         "a second <Cycle x>"),
        ("Directory /a /b\nExclude x # y\n", ["/a", "/b"], "Exclude: the list of names ends at #"),
        ("Direktory /a\n", [], "did you mean Directory?"),
        ("Directory /a\nMariaDB all\n", ["/a"], 'unknown directive "MariaDB"; it is ignored'),
        ("Directory /a\nFrequency weekly\n", ["/a"], "Frequency weekly is read as 0"),
        ("Directory /a\nArchiveOldestDisc so\n", ["/a"], "ArchiveOldestDisc so is read as yes"),
        ("Directory /a\n", ["/a"], ""),
    ],
)
def test_warnings_name_their_place(
    text: str, names: list[str], warning: str, tmp_path: Path
) -> None:
    config = parse(text, tmp_path)
    warnings = s3napback.config_warnings(config)
    assert [job.name for job in s3napback.jobs_of(config)] == names
    assert len(warnings) == bool(warning)
    if warning:
        assert warning in warnings[0]
        assert warnings[0].startswith(f"{tmp_path}/x.conf:")


def test_every_word_of_mysqloptions_is_kept(tmp_path: Path) -> None:
    text = "<MySQL a>\nMySQLOptions \"--where='a b' -x\" --quick\n</MySQL>\n"
    config = parse(text, tmp_path)
    (job,) = s3napback.jobs_of(config)
    assert job.mysql_options == ("--where=a b", "-x", "--quick")
    assert len(s3napback.config_warnings(config)) == 1
    text = "<MySQL a>\nMySQLOptions --where=\"a b\" -x # not these\n</MySQL>\n"
    (job,) = s3napback.jobs_of(parse(text, tmp_path))
    assert job.mysql_options == ("--where=a b", "-x")
    with pytest.raises(Failure, match="MySQLOptions"):
        s3napback.jobs_of(parse("<MySQL a>\nMySQLOptions \"it's\"\n</MySQL>\n", tmp_path))


@pytest.mark.parametrize("text", ['Directory ""', '<MySQL "">', "<PostgreSQL>"])
def test_an_empty_name_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="has no name") as caught:
        s3napback.jobs_of(parse(text, tmp_path))
    assert caught.value.where == f"{tmp_path}/x.conf:1"


@pytest.mark.slow
def test_a_long_config_takes_time_in_proportion(tmp_path: Path) -> None:
    text = "".join(f"Directory /d{number}\n" for number in range(8000)) + "Foo" + ' "a"' * 40000
    before = time.process_time()
    config = parse(text, tmp_path)
    assert len(s3napback.jobs_of(config)) == 8000
    s3napback.config_warnings(config)
    assert time.process_time() - before < 10  # s; it is 0.5, and 30 where each job walks all lines


GOOD = {"DiffDir": "{}", "Bucket": "b", "ChunkSize": "1000"}


def config_with(folder: Path, **directives: str) -> Block:
    lines = {**GOOD, **directives}
    text = "".join(f"{k} {v}\n" for k, v in lines.items() if v)
    return parse(text.replace("{}", str(folder)), folder)


@pytest.mark.parametrize("name", ["DiffDir", "Bucket", "ChunkSize"])
def test_each_required_directive_that_is_missing_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=rf"{name} must be defined\.") as caught:
        s3napback.settings_of(config_with(tmp_path, **{name: ""}))
    assert caught.value.status == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DiffDir", "/nonexistent/diffs"), ("DiffDir", "{}/x.conf"), ("Bucket", "a:b"),
        ("Bucket", "a/b"), ("Bucket", ".."), ("ChunkSize", "5M"), ("ChunkSize", "-5"),
        ("ChunkSize", "1.5"), ("ChunkSize", "5368709121"), ("ChunkSize", "9" * 30),
        ("Parallel", "0"), ("Parallel", "65"), ("Parallel", "four"), ("RetryHours", "long"),
        ("RetryHours", "-1"), ("BandwidthLimit", "1M"), ("BandwidthLimit", "0"),
        ("SafeReplace", "maybe"), ("StorageClass", "standard"), ("S3Endpoint", "s3.example.com"),
        ("S3Endpoint", "file://host/x"), ("S3Endpoint", "https://"), ("S3Endpoint", "ftp://x"),
        ("S3Endpoint", "http://[x"), ("S3Endpoint", "http://h:99999"),
        ("S3Endpoint", "http://\u2100x"), ("S3Endpoint", "http://h?x"),
        ("S3Endpoint", '"http://a b"'), ("S3Region", '"a b"'), ("S3Keyfile", '""'),
        ("GpgRecipient", '" "'), ("Compressor", "\"'\""), ("Compressor", '""'),
        ("GpgRecipient", '""'), ("ServerSideEncryption", "aes256"),
        ("ServerSideEncryption", "kms"), ("KmsKey", '"a b"'), ("KmsKey", "alias/x"),
    ],
)
def test_each_malformed_directive_is_told(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        s3napback.settings_of(config_with(tmp_path, **{name: value}))
    assert name in caught.value.message
    assert caught.value.status == 2
    assert f"{tmp_path}/x.conf:" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ({"ServerSideEncryption": "AES256", "KmsKey": "alias/x"},
         "x.conf:5: KmsKey counts only with ServerSideEncryption aws:kms"),
        ({"S3Endpoint": "file:///x", "ServerSideEncryption": "aws:kms"},
         "x.conf:5: ServerSideEncryption is nothing that a folder can do"),
    ],
)
def test_an_encryption_that_would_not_be_is_refused(
    tmp_path: Path, lines: dict[str, str], why: str
) -> None:
    with pytest.raises(Failure, match=why) as caught:
        s3napback.settings_of(config_with(tmp_path, **lines))
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("26h", 93600), ("2d", 172800), ("1h30m", 5400), ("0h", 0),
     ("1d1h1m1s", 90061)],
)
def test_a_duration_is_read_with_its_units(text: str, seconds: int) -> None:
    assert s3napback.read_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "h", "1.5h", "-1h", "1h 30m", "30m1h", "1w", "1H", "١h", "1h\n", "9" * 40]
)
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration such as 90s, 15m, 26h, 2d or 1h30m"):
        s3napback.read_duration(text)


def test_a_duration_may_have_a_least() -> None:
    assert s3napback.read_duration("1s", least=1) == 1
    with pytest.raises(ValueError, match="is not a duration"):
        s3napback.read_duration("0s", least=1)


def test_good_settings_are_read(tmp_path: Path) -> None:
    settings = s3napback.settings_of(
        config_with(
            tmp_path, TempDir="/tmp", S3Endpoint="file:///x", Parallel="8", SafeReplace="On",
            RetryHours="0.5", Compressor="zstd -3", StorageClass="GLACIER_IR", S3Region="eu-west-1",
            BandwidthLimit="1000000",
        )
    )
    assert settings == s3napback.Settings(
        path=f"{tmp_path}/x.conf", diff_dir=f"{tmp_path}/", bucket="b", chunk_size=1000,
        temp_dir="/tmp/", s3_endpoint="file:///x", s3_region="eu-west-1",
        storage_class="GLACIER_IR", parallel=8, compressor="zstd -3", bandwidth_limit=1000000,
        retry_hours=0.5, safe_replace=True,
    )


def test_a_comment_behind_a_compressor_is_none_of_its_words(tmp_path: Path) -> None:
    settings = s3napback.settings_of(config_with(tmp_path, Compressor="zstd -3 # fast"))
    assert settings.compressor == "zstd -3"


@pytest.mark.parametrize("path", ["", "/nonexistent.conf", "/"])
def test_a_config_that_cannot_be_read_is_a_failure(path: str) -> None:
    with pytest.raises(Failure, match="Unable to open file") as caught:
        s3napback.read_config(path)
    assert caught.value.status == 2


def test_an_include_that_includes_itself_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"x\.conf, line 2: .*includes itself"):
        parse(f"# me\nInclude {tmp_path}/x.conf\n", tmp_path)


@pytest.mark.parametrize("line", ["Fulls", "Bucket", "Exclude", "Include"])
def test_a_line_that_a_backslash_leaves_with_blanks_alone_is_a_failure(
    line: str, tmp_path: Path
) -> None:
    with pytest.raises(Failure, match=r"x\.conf, line 2: no value found for directive") as caught:
        parse(f"{line} \t\\\n\nDirectory /x\n", tmp_path)
    assert caught.value.status == 2


def test_what_is_not_read_is_told_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "b.conf").write_text("<Cycle x>\n")
    config = parse(f"Include {tmp_path}/b.conf\n</Cycle>\n\n# all of it\nBucket b\n", tmp_path)
    assert not config.lines("Bucket")
    (warning,) = s3napback.config_warnings(config)
    assert warning.startswith(f"{tmp_path}/x.conf:5: not read from here on")


def test_includes_are_read_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("b1.inc", "a1.inc", "d/2", "d/10", "x.inc"):
        (tmp_path / name).write_text(f"Directory /{name}\n")
    config = parse("Directory /0\nInclude {b,a}*.inc d\nInclude x.inc\nDirectory /9", tmp_path)
    names = config.listed("Directory")
    assert names == ["/0", "/b1.inc", "/a1.inc", "/d/10", "/d/2", "/x.inc", "/9"]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [  # seen by running File::Glob
        ("{b,a}*.inc", ["b1.inc", "a1.inc"]),
        ("*.{inc,txt}", ["a1.inc", "b1.inc", "c.txt"]),
        ("{}b*", ["b1.inc"]),
        ("{a*,zz}", ["a1.inc", "zz"]),
        ("a1* c.txt", ["a1.inc", "c.txt"]),
        ("{b,a}1.{inc,x}*", ["b1.inc", "a1.inc"]),
        ("n*", []),
    ],
)
def test_a_glob_names_the_files_that_perls_would(
    pattern: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a1.inc", "b1.inc", "c.txt", ".hidden.inc"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert s3napback._glob_files(pattern) == files


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            ["<Cycle x>", "</Cycle>", "<Directory /a>", "</Directory>", "Directory /a", "Fulls 0",
             "Exclude 'a b' \"c", "# x", "X \\", "<MySQL \"a>\">", "Include y", "MySQLOptions 'a"]
        ),
        st.text(max_size=30),
    )
)


@given(st.one_of(st.binary(max_size=200), LINES.map(lambda x: "\n".join(x).encode("utf-8"))))
def test_no_text_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.conf"
    path.write_bytes(data)
    try:
        config = s3napback.read_config(str(path))
        s3napback.config_warnings(config)
        s3napback.jobs_of(config)
        s3napback.settings_of(config)
    except Failure as failure:
        assert failure.status == 2
        assert str(failure)
