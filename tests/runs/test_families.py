from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.runs.data import corpus as data
from lensjax.runs.data import splits
from lensjax.runs.data.families import LONG, MOST_FILES, families


def lines(*numbers: int, width: int = 40) -> bytes:
    """Lines of one length, one for each number."""
    return b"".join(b"%0*d\n" % (width, number) for number in numbers)


def members(found: dict[str, str]) -> set[frozenset[str]]:
    return {frozenset(name for name in found if found[name] == family) for family in found.values()}


TEXTS = {
    "alone": lines(*range(100, 110)),
    "copy": lines(*range(10)),
    "one": lines(*range(10)),
    "nearly": lines(*range(5), *range(200, 205)),
    "part": lines(3),
}


def test_files_that_share_text_are_one_family_named_after_its_first():
    found = families(TEXTS)
    assert found == {"alone": "alone"} | dict.fromkeys(("copy", "one", "nearly", "part"), "copy")


def test_a_chain_of_files_is_one_family():
    found = families({"c": lines(*range(8)), "a": lines(*range(4, 12)), "b": lines(*range(9, 17))})
    assert set(found.values()) == {"a"}  # c and b share nothing


def test_how_much_must_be_shared_is_weighed_by_in_how_few_files_it_stands():
    # Of w = 40 characters a line: the shared line weighs w / 2, the n others w each; 1/2 is a tenth of n + 1/2 at 4.5.
    def pair(others: int) -> int:
        found = families({"a": lines(0, *range(10, 10 + others)), "b": lines(0, *range(50, 50 + others))})
        return len(members(found))

    assert (pair(4), pair(5)) == (1, 2)
    # The lighter of the two counts: a part belongs with the whole, however long that is.
    assert len(members(families({"a": lines(0), "b": lines(*range(500))}))) == 1
    # Where three files hold the line, it weighs a third: 1/3 is a tenth of n + 1/3 at 3.
    for others, expected in ((2, 1), (4, 3)):
        texts = {name: lines(0, *range(10 * k, 10 * k + others)) for k, name in enumerate("abc", start=1)}
        assert len(members(families(texts))) == expected


def test_short_lines_blanks_and_repetitions_say_nothing():
    short, long = (lines(*range(10), width=width) for width in (LONG - 1, LONG))
    unlike = lines(*range(50, 55))
    assert len(members(families({"a": short, "b": short + unlike}))) == 2
    assert len(members(families({"a": long, "b": long + unlike}))) == 1
    indented = b"".join(b"    " + line + b"\r\n" for line in long.splitlines())
    assert len(members(families({"a": long, "b": indented}))) == 1
    # Once a file: 5 of 6 lines of each are different, however often the sixth is said.
    repeated = {"a": lines(*[0] * 90, *range(10, 15)), "b": lines(*[0] * 90, *range(20, 25))}
    assert len(members(families(repeated))) == 2


def test_equal_files_are_one_family_whatever_is_in_them():
    texts = {"a": b"short\n", "b": b"short\n", "c": b"other\n", "d": b"", "e": b""}
    assert members(families(texts)) == {frozenset("ab"), frozenset("c"), frozenset("de")}


def test_a_line_of_very_many_files_joins_none():
    for count, expected in ((MOST_FILES, 1), (MOST_FILES + 1, MOST_FILES + 1)):
        assert len(members(families({f"{i:03d}": lines(0) + b"%d" % i for i in range(count)}))) == expected


texts_of_few_lines = st.dictionaries(
    st.text("abc/.", min_size=1, max_size=4),
    st.lists(st.integers(0, 12), max_size=6).map(lambda numbers: lines(*numbers)),
    max_size=8,
)


@settings(max_examples=100)
@given(texts=texts_of_few_lines, random=st.randoms(use_true_random=False))
def test_the_order_of_the_files_does_not_matter(texts, random):
    names = list(texts)
    random.shuffle(names)
    found = families({name: texts[name] for name in names})
    assert found == families(texts) and set(found) == set(texts)
    for family in members(found):
        assert {found[name] for name in family} == {min(family)}
    for one, other in combinations(texts, 2):
        assert found[one] == found[other] or texts[one] != texts[other]
    own = {one: set(text.splitlines()) for one, text in texts.items()}
    for one in texts:
        if all(own[one].isdisjoint(own[other]) and texts[one] != texts[other] for other in texts if other != one):
            assert list(found.values()).count(one) == 1


def test_the_standard_library_has_no_giant_family_and_keeps_code_pages_together():
    root, paths = data._stdlib_files()
    texts = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.stat().st_size}
    found = families(texts)
    largest = max(members(found), key=len)
    assert len(largest) < 0.1 * len(texts)
    assert sum(len(texts[name]) for name in largest) < 0.1 * sum(map(len, texts.values()))
    pages = ("cp1250", "cp1252", "cp1254", "iso8859_1", "iso8859_15")
    assert len({found[f"encodings/{page}.py"] for page in pages}) == 1
    assert len({found[f"encodings/{page}.py"] for page in ("cp437", "cp850", "cp866")}) == 1
    held_out = {name for name in texts if splits.split_of(found[name]) != "train"}
    trained = {line for name in texts.keys() - held_out for line in texts[name].splitlines()}
    mostly = [name for name in held_out if len(texts[name]) > 5000 and copied(texts[name], trained) > 0.5]
    assert mostly == []


def copied(text: bytes, trained: set[bytes]) -> float:
    """Share of the bytes of long lines that stand in `trained`."""
    long = [line for line in text.splitlines() if len(line) >= LONG]
    return sum(len(line) for line in long if line in trained) / max(1, sum(map(len, long)))
