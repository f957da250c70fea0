"""Archives: what chunks make up, and which archives make up a moment."""

import time
from typing import Any

import pytest
from conftest import Memory, Site, content, entry, send, stored
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import META, CatalogEntry, Failure, Store, StoredObject

# ---- what chunks make up ----


def objects(*sizes: int, digits: int = 20, start: int = 0) -> list[StoredObject]:
    return [
        StoredObject(f"a:{n:0{digits}d}", size, f"{n:032x}", 1.0)
        for n, size in enumerate(sizes, start)
    ]


def no_head(key: str) -> dict[str, str]:
    return {}


@pytest.mark.parametrize("other", ["/a-b", "/a-0", "/a-1-FULL"])
def test_a_source_whose_name_begins_alike_is_another(store: Store, other: str) -> None:
    for name in ("/a", other):
        send(store, b"x", f"{name}-1-FULL")
    start = s3napback.source_start("Directory", "/a", "")
    assert [name for name, _, _ in s3napback.archives_of(store, start, "")] == ["/a-1-FULL"]


@pytest.mark.parametrize(
    ("items", "chunk_size", "fault"),
    [
        (objects(10, 10, 3), None, ""),
        (objects(10, 10, 0), None, ""),
        (objects(3), None, ""),
        (objects(0), None, ""),
        (objects(10), 10, "it was cut off"),
        (objects(10, 10), None, "it was cut off"),
        (objects(10, 3, start=1), None, "chunk 0 is missing"),
        (objects(10, 10, 10, 3)[::2], None, "chunk 1 is missing"),
        (objects(10, 9, 3), None, "its chunks are of different sizes"),
        (objects(10, 10) + objects(3, start=5), None, "chunk 2 and 2 more is missing"),
    ],
)
def test_archives_of_the_original_are_judged_by_their_sizes(
    items: list[StoredObject], chunk_size: int | None, fault: str
) -> None:
    archive = s3napback.resolve_archive("a", items, no_head, chunk_size)
    assert archive is not None
    assert archive.fault.startswith(fault)
    assert archive.complete == (not fault)


def test_archives_of_the_original_are_whole_under_a_key_of_kms() -> None:
    """Their ETags are no MD5, which is no mark of theirs."""
    for sizes, fault in (((10, 10, 3), ""), ((10, 10), "it was cut off")):
        archive = s3napback.resolve_archive(
            "a", objects(*sizes), lambda key: {s3napback.ETAG_IS_NOT_MD5: "yes", "tag": "x"})
        assert archive and archive.fault.startswith(fault)
        assert archive.complete == (not fault)
        assert not archive.metadata


def test_nothing_is_no_archive() -> None:
    assert s3napback.resolve_archive("a", [], no_head) is None


def test_of_two_widths_of_numbers_the_complete_archive_counts(store: Store) -> None:
    memory = Memory()
    send(memory, b"n" * 2500)
    torn = dict(memory.objects)
    del torn["a:0000000000002"]
    original: Any = {f"a:{n:020d}": (b"o" * size, {}) for n, size in enumerate((1000, 1000, 20))}
    memory.objects = {**torn, **original}
    assert content(memory) == b"o" * 2020
    send(memory, b"n" * 2500)
    memory.objects |= original
    assert content(memory) == b"n" * 2500


def test_a_longer_old_tail_does_not_hide_the_new_archive() -> None:
    store = Memory()
    send(store, b"o" * 4500)
    tail = {key: value for key, value in store.objects.items() if key > "a:0000000000000"}
    send(store, b"new")
    store.objects |= tail
    assert content(store) == b"new"


def test_a_larger_chunk_size_does_not_hide_the_new_archive() -> None:
    store = Memory()
    send(store, b"o" * 4500)
    tail = {key: value for key, value in store.objects.items() if key > "a:0000000000000"}
    send(store, b"n" * 5000, size=9000)
    store.objects |= tail
    assert content(store) == b"n" * 5000


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_every_mixture_of_two_uploads_is_torn(chunks: int) -> None:
    """Whatever a kill leaves of two uploads of one length, it is never taken for a whole one."""
    first, second = Memory(), Memory()
    send(first, b"1" * (1000 * (chunks - 1) + 5))
    send(second, b"2" * (1000 * (chunks - 1) + 5))
    names = sorted(first.objects)
    for mask in range(1, 2 ** len(names) - 1):
        mixed = Memory()
        for n, name in enumerate(names):
            mixed.objects[name] = (second if mask >> n & 1 else first).objects[name]
        assert not stored(mixed).complete


@pytest.mark.parametrize("drop", range(4))
def test_every_missing_chunk_is_seen(drop: int) -> None:
    store = Memory()
    send(store, b"x" * 3500)
    del store.objects[f"a:{drop:013d}"]
    assert not stored(store).complete


def test_thousands_of_ends_take_no_thousands_of_requests() -> None:
    items = [StoredObject(f"a-0-FULL:{n:013d}", 9000 - n, "f" * 32, 1.0) for n in range(5000)]
    asked: list[str] = []

    def head(key: str) -> dict[str, str]:
        asked.append(key)
        return {f"{META}chunks": "1"}

    started = time.monotonic()
    archive = s3napback.resolve_archive("a-0-FULL", items, head)
    assert archive and not archive.complete
    assert len(asked) <= 60
    assert time.monotonic() - started < 20  # all of them: two minutes


# ---- marks ----


def test_an_etag_that_is_no_md5_is_not_taken_for_one(s3_server: Any) -> None:
    """Objects under a KMS key have ETags of 32 hex digits that are no MD5."""
    digits = ["0" * 32, "1" * 32]
    objects = [StoredObject(f"a:{n:013d}", 10, digits[n], 0.0) for n in range(2)]
    marks = {"archive": "x", "chunks": "2", "bytes": "20", "md5": "f" * 32}
    metadata = {s3napback.META + name: value for name, value in marks.items()}
    torn = s3napback.resolve_archive("a", objects, lambda key: metadata)
    assert torn and "not those that were uploaded together" in torn.fault
    told = {**metadata, s3napback.ETAG_IS_NOT_MD5: "yes"}
    whole = s3napback.resolve_archive("a", objects, lambda key: told)
    assert whole and whole.complete
    link = s3napback.ArchiveRef("a", "x")
    assert link.find(objects, lambda key: {**metadata, s3napback.ETAG_IS_NOT_MD5: "yes"})
    assert not s3napback.ArchiveRef("a", "y").find(objects, lambda key: metadata)


DIGITS = "9" * 5000  # int() takes 4300 (Python's limit for conversions from text)


@pytest.mark.parametrize("number", ["²", "٣", DIGITS, "-1", " 1"])
def test_a_revision_that_is_none_is_followed_by_nothing(number: str) -> None:
    def one(made: float, mode: str, before: str, after: str) -> CatalogEntry:
        return entry("/svn", 0, mode, made, f"{before}:{after}", kind="Subversion")

    found = [one(1.0, "FULL", "0", "4"), one(2.0, "DIFF", number, "9")]
    with pytest.raises(Failure, match="continues an archive that is no longer there"):
        s3napback.choose_chain(found, 3.0)


@pytest.mark.parametrize(
    ("archive", "kind", "shown"),
    [
        ("/x-0-FULL", "Directory", "Directory"), ("/x-0-FULL", "Subversion", "Subversion"),
        ("/x-0-FULL", "Everything is fine", None), ("/x-0-FULL", "MySQL", None),
        ("MySQL/x-0", "Directory", "MySQL"), ("PostgreSQL/x-0", "MySQL", "PostgreSQL"),
        ("Command/x-0", "", "Command"),
    ],
)
def test_a_kind_is_one_that_fits_the_name(
    site: Site, archive: str, kind: str, shown: str | None
) -> None:
    store = site.store()
    store.create()
    store.put(f"{archive}:0000000000000", b"x", {f"{META}chunks": "1", f"{META}kind": kind})
    (found,) = s3napback.catalogue(store)
    assert found.kind == shown


random_marks = st.dictionaries(
    st.sampled_from(["archive", "chunks", "bytes", "md5", "made", "kind", "status", "state"]),
    st.text(max_size=40) | st.integers().map(str),
)


random_objects = st.lists(
    st.tuples(
        st.sampled_from(["", ":s3napback-new"]), st.integers(0, 10**13), st.integers(1, 20),
        st.integers(0, 3), st.sampled_from(["0" * 32, "f" * 32, "x-2", ""]), st.integers(0, 5),
    ),
    min_size=1, max_size=8,
)


@given(random_objects, random_marks)
def test_no_listing_and_no_metadata_break_the_judgement(
    found: list[tuple[str, int, int, int, str, int]], said: dict[str, str]
) -> None:
    items = {
        f"a-0-FULL{staged}:{number:0{width}d}": (size, etag, float(at))
        for staged, number, width, size, etag, at in found
    }
    chunks = [StoredObject(key, *about) for key, about in items.items()]
    metadata = {META + name: value for name, value in said.items()}
    archive = s3napback.resolve_archive("a-0-FULL", chunks, lambda key: metadata, 2)
    assert archive is not None
    one = s3napback.CatalogEntry(archive, None, "a", 0, "FULL")
    s3napback.History([one]).restorable()
    try:
        chain = s3napback.choose_chain([one], float("inf"))
    except Failure:
        return
    assert archive.complete
    assert [str(link) for link in chain.archives] == ["a-0-FULL"]


# ---- chains ----


def found(slot: int, mode: str, made: float, state: str = "", fault: str = "") -> CatalogEntry:
    kind = "Directory" if state else None
    return entry("/d", slot, mode, made, state, kind=kind, fault=fault)


def chain(archives: list[CatalogEntry], at: float = 1e9) -> list[float]:
    return [link.made for link in s3napback.choose_chain(archives, at).archives]


PORT = [found(0, "FULL", 1, "-:a"), found(1, "DIFF", 2, "a:b"), found(2, "DIFF", 3, "b:c"),
        found(3, "FULL", 4, "-:d"), found(4, "DIFF", 5, "d:e")]


PERL = [found(f.slot, f.mode, f.made) for f in PORT]


@pytest.mark.parametrize("archives", [PORT, PERL])
def test_chains_follow_the_states_or_else_the_dates(archives: list[CatalogEntry]) -> None:
    assert [chain(archives, at) for at in (1, 2.5, 3, 4, 99)] == [
        [1], [1, 2], [1, 2, 3], [4], [4, 5]
    ]
    assert s3napback.History(archives).restorable() == [1, 2, 3, 4, 5]
    with pytest.raises(Failure, match="nothing was backed up by then") as caught:
        chain(archives, 0.5)
    assert "the first moment is 1970-01-01 00:00:01" in str(caught.value)


@pytest.mark.parametrize("archives", [PORT, PERL])
def test_a_missing_full_makes_its_diffs_stale(archives: list[CatalogEntry]) -> None:
    with pytest.raises(Failure, match="no longer there") as caught:
        chain(archives[1:], 3)
    assert "nothing before it" in caught.value.hint
    assert s3napback.History(archives[1:]).restorable() == [4, 5]


def test_a_missing_link_is_named_with_the_last_good_moment() -> None:
    with pytest.raises(Failure, match="/d-2-DIFF continues an archive") as caught:
        chain([PORT[0], PORT[2]])
    assert "the last good moment before it: --at '1970-01-01" in caught.value.hint


def test_a_cut_link_is_named() -> None:
    archives = [PORT[0], found(1, "DIFF", 2, "a:b", "chunk 1 is missing"), PORT[2]]
    named = "/d-2-DIFF continues an archive that is not whole: /d-1-DIFF: chunk 1 is missing"
    with pytest.raises(Failure, match=named):
        chain(archives)
    with pytest.raises(Failure, match="/d-1-DIFF cannot be used: chunk 1 is missing"):
        chain(archives, 2)


def test_a_diff_that_repeats_another_follows_what_it_continues() -> None:
    """After a kill between the upload and DiffDir, the next DIFF starts from the state before."""
    archives = [PORT[0], PORT[1], found(2, "DIFF", 3, "a:c"), found(3, "DIFF", 4, "c:d")]
    assert chain(archives, 2) == [1, 2]
    assert chain(archives) == [1, 3, 4]


def test_a_self_contained_diff_needs_no_full() -> None:
    archives = [found(5, "DIFF", 1, "-:a"), found(6, "DIFF", 2, "a:b")]
    assert chain(archives) == [1, 2]


def test_a_chain_goes_on_from_the_perl_script_to_the_port() -> None:
    archives = [PERL[0], PERL[1], found(2, "DIFF", 3, "x:y"), found(3, "DIFF", 4, "y:z")]
    assert chain(archives) == [1, 2, 3, 4]


def test_new_year_leaves_stale_diffs_that_are_not_applied() -> None:
    """FULL 3 was replaced after New Year; its DIFF 4 must not follow FULL 0 of the round before."""
    archives = [PERL[0], PERL[1], PERL[2], found(4, "DIFF", 5), found(3, "FULL", 9)]
    with pytest.raises(Failure, match="/d-4-DIFF"):
        chain(archives, 5)
    assert s3napback.History(archives).restorable() == [1, 2, 3, 9]


def test_nights_that_were_missed_are_a_doubt() -> None:
    archives = [PERL[0], found(2, "DIFF", 3)]
    assert s3napback.choose_chain(archives, 9).warnings
    assert not s3napback.choose_chain(PERL, 9).warnings
