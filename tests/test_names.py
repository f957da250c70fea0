"""Section 6: names are built and parsed in one place, and the two agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import DIFF, FULL

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize(
    ("kind", "name", "slot", "mode", "archive"),
    [
        ("Directory", "/", 46, DIFF, "/-46-DIFF"),
        ("Directory", "/home//x/", 0, FULL, "/home//x/-0-FULL"),
        ("Subversion", "/svn/p", 6, FULL, "/svn/p-6-FULL"),
        ("MySQL", "all", 4, FULL, "MySQL/--all-databases-4"),
        ("MySQL", "/run/m.sock:all", 2, FULL, "MySQL//run/m.sock/--all-databases-2"),
        ("MySQL", "/run/m.sock:shop", 2, FULL, "MySQL//run/m.sock/shop-2"),
        ("PostgreSQL", "all", 1, FULL, "PostgreSQL/-1"),
        ("PostgreSQL", "alice@crm", 1, FULL, "PostgreSQL/crm-1"),
    ],
)
def test_archives_are_named_as_the_original_names_them(
    kind: str, name: str, slot: int, mode: str, archive: str
) -> None:
    assert s3napback.archive_name(kind, s3napback.stored_name(kind, name), slot, mode) == archive


@given(names, st.integers(0, 9999), st.sampled_from([FULL, DIFF]))
def test_directory_archive_names_parse_back(name: str, slot: int, mode: str) -> None:
    archive = s3napback.archive_name("Directory", name, slot, mode)
    assert s3napback.parse_archive_name(archive) == (None, name, slot, mode)


@given(st.sampled_from(["MySQL", "PostgreSQL", "Command"]), names, st.integers(0, 9999))
def test_dump_archive_names_parse_back(kind: str, name: str, slot: int) -> None:
    archive = s3napback.archive_name(kind, name, slot, FULL)
    # A database called x-3-FULL gives a name that no one can tell from a directory's.
    if not archive.endswith(("-FULL", "-DIFF")):
        assert s3napback.parse_archive_name(archive) == (kind, name, slot, FULL)


prefixes = st.lists(st.text("abW1. -é", min_size=1, max_size=9), min_size=1, max_size=3).map(
    "/".join
).filter(lambda text: not {".", ".."} & set(text.split("/")))


@given(prefixes, names, st.integers(0, 9999), st.sampled_from([FULL, DIFF]))
def test_names_with_a_prefix_parse_back(prefix: str, name: str, slot: int, mode: str) -> None:
    assert s3napback.read_prefix(prefix) == prefix
    archive = s3napback.archive_name("Directory", f"/{name}", slot, mode, prefix)
    assert archive.startswith(f"{prefix}/")
    assert s3napback.parse_archive_name(archive, prefix) == (None, f"/{name}", slot, mode)
    assert s3napback.parse_archive_name(f"/{archive}", prefix) is None
    assert s3napback.parse_archive_name(archive, f"{prefix}x") is None


@given(st.just("") | prefixes, names,
       st.sampled_from(["Directory", "MySQL", "PostgreSQL", "Command"]))
def test_what_a_user_types_is_looked_for_where_it_is(prefix: str, name: str, kind: str) -> None:
    """By its name, by its name with the Prefix, with a slash more or less."""
    stored = s3napback.stored_name(kind, name)
    start = s3napback.archive_start(kind, stored, prefix)
    shown = name if kind == "Directory" else f"{kind}/{name}"
    typed = [shown]
    typed += [f"{prefix}/{shown.removeprefix('/')}"] if prefix else []
    typed += [f"/{name}/"] if kind == "Directory" else []
    for given_name in typed:
        assert start in s3napback.starts_meant(given_name, prefix), (given_name, start)
    assert s3napback.starts_meant(typed[-1 if prefix and len(typed) == 2 else 0], prefix)[start] < 3


@given(names.filter(bool), st.integers(0, 10**13 - 1))
def test_chunk_keys_parse_back(archive: str, number: int) -> None:
    key = s3napback.chunk_key(archive, number)
    assert s3napback.parse_chunk_key(key) == (archive, number, 13, False)
    staged = s3napback.staged_key(archive, number)
    assert s3napback.parse_chunk_key(staged) == (archive, number, 13, True)
    assert key.startswith(s3napback.chunk_prefix(archive))
    assert staged.startswith(s3napback.chunk_prefix(archive))


@given(st.text(max_size=30))
def test_no_key_or_name_breaks_the_parsers(text: str) -> None:
    s3napback.parse_chunk_key(text)
    s3napback.parse_archive_name(text)


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("/etc-5-FULL:0000000000000", ("/etc-5-FULL", 0)),
        ("/etc-5-FULL:00000000000000000012", ("/etc-5-FULL", 12)),
        ("a:b:3", ("a:b", 3)),
        ("00000000000000000001", ("", 1)),
        (":1", None),
        ("/etc-5-FULL", None),
        ("/etc-5-FULL:", None),
        ("/etc-5-FULL:1x", None),
        ("/etc-5-FULL:٣", None),
    ],
)
def test_a_chunk_key_is_an_archive_and_a_number(key: str, parsed: tuple[str, int] | None) -> None:
    found = s3napback.parse_chunk_key(key)
    assert (found and found[:2]) == parsed


def test_diff_and_temp_files_are_named_as_the_original_names_them() -> None:
    assert s3napback.diff_file_name("/srv//www/") == "_srv__www_.diff"
    assert s3napback.diff_file_name("/srv", "-1a") == "_srv-1a.diff"
    assert s3napback.temp_file_name("b", "MySQL/x-1") == "b:MySQL_x-1.temp"
    assert s3napback.key_text("/home/J\udcfcrgen") == "/home/J\\xfcrgen"


@given(st.text(max_size=60))
def test_no_key_breaks_what_reads_keys(key: str) -> None:
    parsed = s3napback.parse_chunk_key(key)
    if parsed:
        archive, number, *_ = parsed
        assert number >= 0
        assert key.endswith(key.rpartition(":")[2]) and key.startswith(archive)
        s3napback.parse_archive_name(archive)


DIGITS = "9" * 5000  # int() takes 4300 (Python's limit for conversions from text)


@pytest.mark.parametrize("key", [f"a-0-FULL:{DIGITS}", f"a-0-FULL:{'9' * 21}"])
def test_a_number_of_any_length_makes_a_foreign_key(key: str) -> None:
    assert s3napback.parse_chunk_key(key) is None


@pytest.mark.parametrize("name", [f"a-{DIGITS}-FULL", f"a--{DIGITS}-DIFF", f"MySQL/a-{DIGITS}"])
def test_a_slot_of_any_length_makes_a_foreign_name(name: str) -> None:
    assert s3napback.parse_archive_name(name) is None
