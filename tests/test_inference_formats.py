"""Dictionary output: whatever was written is read back, by libraries of each format, with what wrote it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rdflib import RDF, Graph, Literal, Namespace, URIRef
from rdflib.namespace import PROV, SKOS

from lora_lexicon.errors import LexiconError
from lora_lexicon.folders import new_file
from lora_lexicon.inference.engine import Candidate, Definition
from lora_lexicon.inference.formats import FORMATS, Provenance, finite, jsonl, markdown, ontolex, tei
from lora_lexicon.resources import packs

TEI = {"t": "http://www.tei-c.org/ns/1.0"}
XML = "{http://www.w3.org/XML/1998/namespace}"
ONTOLEX = Namespace("http://www.w3.org/ns/lemon/ontolex#")
LEXICOG = Namespace("http://www.w3.org/ns/lemon/lexicog#")
LIME = Namespace("http://www.w3.org/ns/lemon/lime#")
DOCUMENT = "http://example.org/d"
MADE = Provenance("tiny", "owner/base", "ab" * 32, "greedy", "", "0.1.0", "2026-01-02T03:04:05+00:00", "en")
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)  # any code point, also half a character
TERM = TEXT.filter(str.strip)
NUMBER = st.none() | st.floats()
ANSWER = st.builds(Definition, TERM, TEXT, TEXT, TEXT, NUMBER, NUMBER, st.just(3), NUMBER)
ANSWERS = st.lists(ANSWER, max_size=5)


def whole(text: str) -> str:
    """A text as XML can hold it (section 2.2 of XML 1.0)."""
    fine = (0x9, 0xA, 0xD, *range(0x20, 0xD800), *range(0xE000, 0xFFFE))
    return "".join(c if ord(c) in fine or ord(c) > 0xFFFF else "\ufffd" for c in text)


def grouped(answers: list[Definition]) -> list[list[Definition]]:
    found: list[list[Definition]] = []
    for answer in answers:
        if found and found[-1][0].term == answer.term:
            found[-1].append(answer)
        else:
            found.append([answer])
    return found


@settings(deadline=None)
@given(ANSWERS)
def test_tei_is_read_back(answers: list[Definition]) -> None:
    root = ElementTree.fromstring("".join(tei(answers, MADE)).encode())
    assert (root.tag, root.get("type")) == (f"{{{TEI['t']}}}TEI", "lex-0")
    entries = root.findall(".//t:entry", TEI)
    assert len(entries) == len(grouped(answers))
    for entry, senses in zip(entries, grouped(answers), strict=True):
        assert entry.get(f"{XML}lang") == "en"
        assert entry.findtext("t:form[@type='lemma']/t:orth", None, TEI) == whole(senses[0].term)
        for found, sense in zip(entry.findall("t:sense", TEI), senses, strict=True):
            assert found.findtext("t:def", None, TEI) == whole(sense.text)
            assert found.findtext("t:usg[@type='domain']", None, TEI) == whole(sense.domain)
            assert found.findtext("t:cit[@type='example']/t:quote", "", TEI) == whole(sense.context)
            for name, number in (("similarity", sense.similarity), ("score", sense.score)):
                shown = found.find(f"t:note/t:measure[@type='{name}']", TEI)
                assert (shown is None) == (finite(number) is None)
                if shown is not None:
                    assert float(shown.get("quantity", "")) == pytest.approx(number, rel=1e-5)
            assert found.findtext("t:note[@type='provenance']/t:name[@type='base']", None, TEI) == "owner/base"
    ids = [element.get(f"{XML}id") for element in root.iter() if element.get(f"{XML}id")]
    assert len(ids) == len(set(ids)) == 1 + len(entries) + len(answers)


@settings(deadline=None, max_examples=60)
@given(ANSWERS)
def test_turtle_is_read_back(answers: list[Definition]) -> None:
    graph = Graph().parse(data="".join(ontolex(answers, MADE)), format="turtle", publicID=DOCUMENT)
    groups = grouped(answers)
    assert len(set(graph.objects(URIRef(f"{DOCUMENT}#lexicon"), LIME.entry))) == len(groups)
    for number, senses in enumerate(groups, 1):
        entry = URIRef(f"{DOCUMENT}#e{number}")
        assert graph.value(predicate=LEXICOG.describes, object=entry) is not None
        form = graph.value(entry, ONTOLEX.canonicalForm)
        assert graph.value(form, ONTOLEX.writtenRep) == Literal(whole(senses[0].term), lang="en")
        for i, sense in enumerate(senses, 1):
            node = URIRef(f"{DOCUMENT}#e{number}-s{i}")
            assert (entry, ONTOLEX.sense, node) in graph
            assert graph.value(node, SKOS.definition) == Literal(whole(sense.text), lang="en")
            example = graph.value(node, LEXICOG.usageExample)
            assert (example is None) == (not sense.context)
            if example is not None:
                assert graph.value(example, RDF.value) == Literal(whole(sense.context), lang="en")
            expert = graph.value(node, PROV.wasAttributedTo)
            assert str(graph.value(expert, URIRef("http://www.w3.org/2000/01/rdf-schema#label"))) == whole(sense.domain)
            assert (expert, PROV.actedOnBehalfOf, URIRef(f"{DOCUMENT}#model")) in graph
            similarity = graph.value(node, URIRef(f"{DOCUMENT}#similarity"))
            assert (similarity is None) == (finite(sense.similarity) is None)


@settings(deadline=None)
@given(ANSWERS)
def test_json_lines_are_read_back(answers: list[Definition]) -> None:
    rows = [json.loads(line) for line in "".join(jsonl(answers, MADE)).split("\n")[:-1]]
    assert len(rows) == len(answers)
    for row, answer in zip(rows, answers, strict=True):
        assert row["term"] == answer.term.encode(errors="replace").decode()
        assert row["definition"] == answer.text.encode(errors="replace").decode()
        assert row["provenance"]["base"] == "owner/base"


ASCII = st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=20).filter(str.strip)


@settings(deadline=None)
@given(st.lists(st.builds(Definition, ASCII, ASCII, ASCII, st.just("d"), NUMBER, NUMBER, st.just(3)), max_size=4))
def test_markdown_shows_what_was_written(answers: list[Definition]) -> None:
    tokens = MarkdownIt("commonmark").parse("".join(markdown(answers, MADE)))
    assert not [token for token in tokens if token.type in ("html_block", "fence", "code_block", "hr")]
    inline = [token.children or [] for token in tokens if token.type == "inline"][2:]  # after the title and its line
    shown = ["".join(child.content for child in children) for children in inline]
    expected = []
    for senses in grouped(answers):
        expected.append(senses[0].term)
        for sense in senses:
            expected += [sense.text, sense.context, None]  # and the line that says what wrote it
    assert len(shown) == len(expected)
    for text, wanted in zip(shown, expected, strict=True):
        assert text.startswith("expert d") if wanted is None else text == " ".join(wanted.split())


def test_what_chose_and_its_score_are_told() -> None:
    candidates = (Candidate("a rock", "stone", 2, 4, True, 0.5), Candidate("a roc", "stone", 1, 4, True, 0.25))
    answer = Definition("rock", "", "a rock", "stone", 0.5, float("inf"), 4, 0.5, candidates)
    made = Provenance("tiny", "", "", "sampled, seed 42", "mbr among 3", "0.1.0", MADE.date)
    texts = {name: "".join(write([answer], made)) for name, write in FORMATS.items()}
    assert all("mbr among 3" in text for text in texts.values())
    row = json.loads(texts["jsonl"])
    assert (row["margin"], row["score"], len(row["candidates"])) == (None, 0.5, 2)
    assert '<measure type="score" quantity="0.5">' in texts["tei"]
    assert '<#score> "0.5"' in texts["ontolex"]
    assert "prov:wasDerivedFrom" not in texts["ontolex"]


def test_entries_are_written_as_they_come() -> None:
    def endless():
        while True:
            yield Definition("rock", "", "a rock", "stone", 0.5, 1.0, 4)

    for write in FORMATS.values():
        pieces = write(endless(), MADE)
        assert len("".join(next(pieces) for _ in range(40))) > 100


@pytest.mark.skipif("tiny" not in packs(), reason="the shipped pack `tiny` is not there")
def test_the_command_writes_a_whole_file_or_none(cli, tmp_path: Path) -> None:
    file = tmp_path / "d" / "entries.xml"
    words = ("define", "kernel", "stone", "--max-tokens", "3", "--format", "tei", "--out", file)
    done = cli(*words, "--language", "en-GB")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    root = ElementTree.parse(file).getroot()
    assert [entry.get(f"{XML}lang") for entry in root.iter(f"{{{TEI['t']}}}entry")] == ["en-GB"] * 2
    assert str(packs()["tiny"].parent) not in file.read_text()
    assert [path.name for path in file.parent.iterdir()] == ["entries.xml"]
    again = cli(*words)
    assert (again.exit_code, "exists" in again.stderr) == (1, True)
    printed = cli("define", "kernel", "--max-tokens", "3", "--format", "jsonl")
    assert json.loads(printed.stdout)["provenance"]["model"] == "tiny"


@pytest.mark.parametrize(
    "options", [("--out", "f"), ("--language", "en"), ("--overwrite",), ("--format", "tei", "--json"),
                ("--format", "tei", "--overwrite"), ("--format", "tei", "--language", "e n")],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(cli, options: tuple[str, ...]) -> None:
    assert cli("define", "kernel", *options).exit_code == 2


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "f.txt"
    with pytest.raises(TypeError), new_file(file) as out:
        out.writelines(["half", 2])  # type: ignore[list-item]
    assert not file.parent.exists()
    with new_file(file) as out:
        out.write("whole\r\n")
        assert not file.exists()
    assert file.read_bytes() == b"whole\r\n"
    with pytest.raises(LexiconError, match="exists"), new_file(file):
        pass
    with new_file(file, replace=True) as out:
        out.write("more")
    assert file.read_text() == "more"
    with pytest.raises(LexiconError, match="folder"), new_file(tmp_path):
        pass
