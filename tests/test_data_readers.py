"""Readers: every format gives the rows that went in, and a broken row costs that row alone."""

import base64
import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.data.clean import clean
from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers import read, recognise
from lora_lexicon.data.readers.delimited import listed
from lora_lexicon.data.readers.dictd import number_of
from lora_lexicon.data.readers.dictd_entry import parse_entry, sentences
from lora_lexicon.data.terms import contains_term, find_term
from lora_lexicon.errors import DataError

CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\0"), max_size=30)


def rows_of(path: Path, **options: str) -> list[Row]:
    return list(read([str(path)], **options))  # type: ignore[arg-type]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8), st.sampled_from([",", "\t"]))
def test_any_table_is_read_back(tmp_path_factory, cells, delimiter):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["Word", "Definition", "Context"])
    writer.writerows(cells)
    path = write(tmp_path_factory.mktemp("csv") / "words.csv", buffer.getvalue())
    rows = rows_of(path)
    assert [(r.term, r.definition, *r.contexts) for r in rows] == cells
    assert {r.source for r in rows} == {"words"}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_after_a_good_row_leave_it_whole(tmp_path_factory, junk):
    """Whatever follows, the first row is read, nothing is raised, and each row is clean or has a reason."""
    for name, head in (
        ("a.csv", b"term,definition,context\na,b,c\n"),
        ("a.jsonl", b'{"term":"a","definition":"b","context":"c"}\n'),
    ):
        path = write(tmp_path_factory.mktemp("junk") / name, head + junk)
        rows = rows_of(path)
        assert (rows[0].term, rows[0].definition, rows[0].contexts) == ("a", "b", ("c",))
        for row in rows:
            result = clean(row)
            assert result
            if isinstance(result, list):
                json.dumps([e.term + e.context + e.definition for e in result]).encode()


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=8), st.lists, max_leaves=8)
)
def test_listed_flattens_what_repr_writes(value):
    def flat(item):
        return [item] if isinstance(item, str) else [x for each in item for x in flat(each)]

    if isinstance(value, list):
        assert listed(repr(value), strict=True) == flat(value)


@pytest.mark.parametrize(
    "text", ["[__import__('os').getcwd()]", "[1+1]", "[" * 5000 + "]", "['a'", "[f'{x}']", "[lambda: 0]"]
)
def test_listed_evaluates_nothing(text):
    assert listed(text, strict=True) in (None, [text])
    assert listed(text, strict=False) == [text]


def test_listed_reads_missing_values():
    assert listed("[nan, 'a', None]", strict=True) == [None, "a", None]
    assert listed("nan", strict=True) == listed("", strict=True) == listed("[]", strict=True) == []
    assert listed("[see] this", strict=True) == ["[see] this"]


def test_an_unclosed_quotation_mark_costs_one_row(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "term,definition,context\n"
        + "".join(f'w{i},"d{i}, first\nsecond",c{i}\n' for i in range(3))
        + 'bad,"never closed,c\n'
        + "".join(f'v{i},"d{i}",c{i}\n' for i in range(3))
        + "short,row\n"
        + "last,d,c\n",
    )
    rows = rows_of(path)
    assert [r.term for r in rows if not r.error] == ["w0", "w1", "w2", "v0", "v1", "v2", "last"]
    assert [(r.line, r.error) for r in rows if r.error] == [(8, "broken row"), (12, "broken row")]


def test_a_csv_may_be_separated_by_semicolons(tmp_path):
    rows = rows_of(write(tmp_path / "a.csv", 'term;definition;context\na;"one; two";c, d\nshort;row\n'))
    assert [(r.term, r.definition, r.contexts) for r in rows if not r.error] == [("a", "one; two", ("c, d",))]
    assert [r.error for r in rows] == [None, "broken row"]


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_without_a_name_is_refused(name):
    with pytest.raises(DataError, match="holds neither"):
        list(read([name]))


def test_bytes_that_are_no_text_cost_one_row(tmp_path):
    path = write(
        tmp_path / "a.csv", b"\xef\xbb\xbfterm,definition,context\ng\xff,d,c\nn\0,d,c\n\xc3\xa9t\xc3\xa9,d,c\n"
    )
    results = [clean(row) for row in rows_of(path)]
    assert results[:2] == ["invalid UTF-8", "NUL character"]
    assert results[2][0].term == "été"


def test_gzip_is_transparent_and_a_cut_stream_is_an_error(tmp_path):
    packed = gzip.compress(
        b"".join(json.dumps({"term": f"w{i}", "definition": "d"}).encode() + b"\n" for i in range(999))
    )
    assert len(rows_of(write(tmp_path / "a.jsonl.gz", packed))) == 999
    with pytest.raises(DataError, match="damaged gzip"):
        rows_of(write(tmp_path / "b.jsonl.gz", packed[:-200]))
    with pytest.raises(DataError, match="no gzip file"):
        rows_of(write(tmp_path / "c.jsonl.gz", b'{"term": "a", "definition": "d"}\n'))


def test_3dex_in_both_shapes(tmp_path):
    merged = write(
        tmp_path / "m.csv",
        "TERM,DEFINITION,EXAMPLE,DATASET_NAME\n"
        "bank,a slope,\"[['the river bank'], ['a \"\"bank\"\"', nan]]\",\"['WordNet', ['Urban', 'WordNet']]\"\n"
        "bank,a slope,[],['WordNet']\n"
        "bank,a slope,['x y'],[]\n"
        "bank,nan,['x y'],['A']\n"
        "bank,a slope,\"['x y\",['A']\n"
        "bank,a slope,\"['x' y]\",['A']\n"
        "bank,a slope,[['x y']],\"[\"\"['Urban', 'WordNet']\"\"]\"\n",  # as its authors' script writes it
    )
    rows = rows_of(merged)
    assert rows[0].contexts == ("the river bank", 'a "bank"', None)
    assert (rows[0].source, rows[-1].source) == ("WordNet; Urban", "Urban; WordNet")
    assert [r if isinstance(r, str) else len(r) for r in map(clean, rows)] == [
        2,
        "no context",
        "no source",
        "no definition",
        1,
        "unreadable list of examples",
        1,
    ]
    component = write(
        tmp_path / "c.csv",
        "WORD,DEFINITION,EXAMPLE,DATASET_NAME,SPLIT_TYPE\n"
        "yeet,to throw,[yeet] it [now],Urban,validation\nyeet,to throw,x,,test\n",
    )
    rows = rows_of(component)
    assert rows[0].contexts == ("[yeet] it [now]",)
    assert (rows[0].source, rows[0].split) == ("Urban", "validation")
    assert clean(rows[1]) == "no source"
    assert [i.format for i in recognise([str(merged), str(component)])] == ["3dex", "3dex"]


def test_columns_by_alias_by_name_and_never_by_guess(tmp_path):
    path = write(tmp_path / "a.tsv", 'LEXEME\tGloss\tExamples\tPOS\n"it\tsaid "so"\tc\tnoun\n')
    (row,) = rows_of(path, columns={"term": "lexeme"})  # type: ignore[arg-type]
    assert (row.term, row.definition, row.contexts, row.pos) == ('"it', 'said "so"', ("c",), "noun")
    with pytest.raises(DataError, match=r"no column for the term among LEXEME, Gloss.*--column term=NAME"):
        rows_of(path)
    with pytest.raises(DataError, match="no column 'nope'"):
        rows_of(path, columns={"term": "nope"})  # type: ignore[arg-type]


def test_a_source_column_is_never_filled_in(tmp_path):
    without = write(tmp_path / "mine.v2.jsonl", '{"term":"a","definition":"b","context":"c"}\n')
    having = write(
        tmp_path / "b.jsonl",
        '{"term":"a","definition":"b","context":["c"],"source":"S"}\n{"term":"a","definition":"b"}\n',
    )
    assert [r.source for r in read([str(without), str(having)])] == ["mine", "S", None]
    assert [r.source for r in read([str(without), str(having)], source="X")] == ["X", "S", None]


def test_naacl2019_pairs_either_file_or_folder(tmp_path):
    write(
        tmp_path / "valid.txt", "book%oxford.1\tn\toxford\ta printed work\t[]\t[]\nlone%1\tn\tox\td\t[]\t[]\nbroken\n"
    )
    write(tmp_path / "valid.eg", "book%oxford.1\tread a <TRG>\nother%1\tan <TRG>\n")
    for given_path in (tmp_path, tmp_path / "valid.txt", tmp_path / "valid.eg"):
        rows = rows_of(given_path)
        assert (rows[0].term, rows[0].contexts, rows[0].source, rows[0].split) == (
            "book",
            ("read a book",),
            "oxford",
            "valid",
        )
        assert [r.error for r in rows] == [None, None, "broken row", "example without an entry"]
    assert len(recognise([str(tmp_path / "valid.txt"), str(tmp_path / "valid.eg")])) == 1
    (tmp_path / "valid.eg").unlink()
    with pytest.raises(DataError, match=r"NAME\.txt and NAME\.eg"):
        rows_of(tmp_path / "valid.txt")


def dictd(folder: Path, name: str, entries: list[tuple[str, str]], packed: bool = True) -> Path:
    """Writes a dictd pair; the index spells numbers as dictd does."""
    content, index = b"", []
    for word, text in entries:
        index.append(f"{word}\t{b64(len(content))}\t{b64(len(text.encode()))}")
        content += text.encode()
    write(
        folder / f"{name}.index", "\n".join([*index, index[-1].replace(entries[-1][0], "alias"), "x\t9999\tB"]) + "\n"
    )
    write(folder / (f"{name}.dict.dz" if packed else f"{name}.dict"), gzip.compress(content) if packed else content)
    return folder / f"{name}.index"


def b64(value: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return digits[value] if value < 64 else b64(value // 64) + digits[value % 64]


@given(st.integers(0, 2**40))
def test_dictd_numbers(value):
    assert number_of(b64(value)) == value
    assert number_of(base64.b64encode(value.to_bytes(6, "big")).decode()) == value


@pytest.mark.parametrize("packed", [True, False])
def test_dictd_accounts_for_every_index_line(tmp_path, packed):
    entries = [
        ("00-database-short", "00-database-short\n     The Test Book (version 2)\n"),
        (
            "kludge",
            "kludge\n /klooj/, n.\n\n    1. A clever trick. “He wrote a kludge to fix it.”\n\n"
            "    2. Something that works for the wrong reason.\n",
        ),
        ("ref", "ref\n\n   See {kludge}.\n"),
    ]
    rows = rows_of(dictd(tmp_path, "book", entries, packed))
    assert [(r.line, r.error or r.definition) for r in rows] == [
        (1, "dictionary header"),
        (2, "A clever trick"),
        (2, "Something that works for the wrong reason"),
        (3, "cross-reference only"),
        (4, "another headword of the same text"),
        (5, "broken row"),
    ]
    assert rows[1].source == "The Test Book"
    assert rows[1].contexts == ("He wrote a kludge to fix it.",)
    assert rows[1].pos == "noun"


def test_entry_layouts():
    bierce = parse_entry(
        "abasement",
        "ABASEMENT, n.  A decent attitude.  Peculiar.\n\n    In great abasement lay\n    The King.\n"
        + " " * 60
        + "G.J.\n",
    )
    assert (bierce.term, bierce.pos) == ("abasement", "noun")
    assert [(s.definition, s.contexts) for s in bierce.senses] == [
        ("A decent attitude", ("In great abasement lay The King.",))
    ]
    webster = parse_entry(
        "Cut",
        "Cut \\Cut\\, v. t. [imp. & p. p. {Cut};\n   p. pr. {Cutting}.]\n   1. To separate.\n      [1913 Webster]\n\n"
        "            You must cut this flesh.          --Shak.\n      [1913 Webster]\n\n   2. (Naut.) To sail.\n",
    )
    assert (webster.term, webster.pos) == ("Cut", "verb")
    assert [(s.definition, s.contexts) for s in webster.senses] == [
        ("To separate", ("You must cut this flesh.",)),
        ("To sail", ()),
    ]
    wordnet = parse_entry(
        "dog",
        'dog\n    n 1: a member of the genus Canis; "the dog barked all night" [syn: {dog}]\n'
        "    2: a dull girl\n    v 1: go after\n",
    )
    assert [s.definition for s in wordnet.senses] == ["a member of the genus Canis", "a dull girl", "go after"]
    assert wordnet.senses[0].contexts == ("the dog barked all night",)
    assert parse_entry("x", "").senses == []


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=200), st.text(min_size=1, max_size=10))
def test_any_entry_text_is_read_and_examples_hold_the_term(text, word):
    entry = parse_entry(word, text)
    assert bool(entry.senses) or entry.error
    for sense in entry.senses:
        assert all(contains_term(context, entry.term) for context in sense.contexts)


@given(st.text('ab.“”() A"', max_size=60))
def test_sentences_lose_nothing_but_space(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_wordnet_lines(tmp_path):
    licence = "  1 This software and database is being provided to you, the LICENSEE, by WordNet\n"
    line = '00001740 03 n 02 able_cat 0 dog 0 000 | a thing; "the dog ran"; "two able cats"\n'
    path = write(tmp_path / "data.noun", licence + line + "garbage\n")
    for given_path in (path, tmp_path):
        rows = rows_of(given_path)
        assert [(r.term, r.contexts, r.domain, r.error) for r in rows] == [
            ("able cat", ("two able cats",), "noun.Tops", None),
            ("dog", ("the dog ran",), "noun.Tops", None),
            (None, (), "", "broken row"),
        ]


def test_a_hub_data_set_keeps_its_splits(tmp_path):
    """A local folder stands for a data set's repository: the same loader reads both."""
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", json.dumps({"word": split, "gloss": "d", "example": "e"}) + "\n")
    rows = rows_of(tmp_path, format="hub")
    assert [(r.term, r.split, r.contexts) for r in rows] == [("train", "train", ("e",)), ("test", "test", ("e",))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", None, "does not exist"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n \n", "holds no text"),
        ("a.bin", bytes(range(256)) * 9, "no known format"),
        ("a.txt", b"just a line of prose\n", "no known format"),
        ("a.json", b"[1, 2]\n", "no column|no known format"),
        ("a.csv", b"alpha,beta\n1,2\n", "no column for the term"),
        ("a.index", b"word\tA\tB\n", "NAME.index"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(["bank", "Banks", "banking", "river bank", "-", "_", "é", " ", "\n", "'s"])), st.data())
def test_a_term_is_contained_where_it_is_found(pieces, data):
    term = data.draw(st.sampled_from(["bank", "river  bank", "BANK", "s", "é", "", " "]))
    assert contains_term("".join(pieces), term) == (find_term("".join(pieces), term) is not None)
