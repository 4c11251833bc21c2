"""Definitions as dictionary entries: TEI Lex-0, OntoLex-Lemon, JSON Lines, Markdown. Knows nothing of how they came.

Every format says of each definition what wrote it: model, base, expert, the router's similarity, the score it was
chosen by. Each is a stream of texts, of which no more than one headword is in memory. Definitions that follow each
other and have the same term are senses of one entry.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from lora_lexicon.inference.engine import Definition

Answers = Iterable["Definition"]
# What XML 1.0 has no way to write (section 2.2, Char), and halves of characters; none of it is part of a language.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Provenance:
    """What all definitions of a run have in common.

    Attributes:
        base, base_fingerprint: "" where they are not known.
        decoding: how texts were drawn, such as "greedy".
        chosen_by: what chose among candidates; "" where there was one.
        version: of lora-lexicon.
        date: of the run, as ISO 8601 has it.
        language: a BCP 47 tag of terms and definitions.
    """

    model: str
    base: str
    base_fingerprint: str
    decoding: str
    chosen_by: str
    version: str
    date: str
    language: str = "en"


def record_of(answer: "Definition") -> dict[str, Any]:
    """A definition as a JSON object; candidates where it was chosen from several."""
    record = {
        "term": answer.term,
        "context": answer.context,
        "definition": answer.text,
        "domain": answer.domain,
        "similarity": answer.similarity,
        "margin": finite(answer.margin),
    }
    if not answer.candidates:
        return record
    candidates = [
        {"definition": c.text, "domain": c.domain, "count": c.count, "score": c.score} for c in answer.candidates
    ]
    return {**record, "score": answer.score, "candidates": candidates}


def finite(number: float | None) -> float | None:
    """A number for JSON: one domain alone leads by infinity, which JSON does not have."""
    return None if number is None or not isfinite(number) else float(number)


def jsonl(answers: Answers, made: Provenance) -> Iterator[str]:
    """A line a definition: its record, with `provenance`."""
    for answer in answers:
        record = {**record_of(answer), "provenance": asdict(made)}
        yield json.dumps(record, ensure_ascii=False).encode(errors="replace").decode() + "\n"


def markdown(answers: Answers, made: Provenance) -> Iterator[str]:
    """A heading a term and a numbered item a sense, in CommonMark."""
    by = f", chosen by {made.chosen_by}" if made.chosen_by else ""
    base = f" on the base {made.base}" if made.base else ""
    known = f" ({made.base_fingerprint[:16]})" if made.base_fingerprint else ""
    written = f"Written by {made.model}{base}{known}, {made.decoding}{by}, with lora-lexicon {made.version}"
    yield f"# Definitions\n\n{_md(f'{written} on {made.date}; no lexicographer has read them.')}\n"
    for term, senses in _entries(answers):
        yield f"\n## {_md(term)}\n\n"
        for number, sense in enumerate(senses, 1):
            indent = " " * len(f"{number}. ")
            yield f"{number}. {_md(sense.text) or '(empty)'}\n\n"
            if sense.context:
                yield f"{indent}> {_md(sense.context)}\n\n"
            yield f"{indent}*{'; '.join(f'{name} {_md(value)}' for name, value in _facts(sense))}*\n"


def tei(answers: Answers, made: Provenance) -> Iterator[str]:
    """A TEI document after TEI Lex-0 (DARIAH, lex-0.org): `entry`, `form`, `sense`, `def`, `cit`, `usg`.

    The expert stands as `usg` of type domain, and with similarity and score in a `note` of type provenance.
    """
    yield _tei_head(made)
    for number, (term, senses) in enumerate(_entries(answers), 1):
        yield f'<entry xml:id="e{number}" xml:lang={_attribute(made.language)}>\n'
        yield f'<form type="lemma"><orth>{_xml(term)}</orth></form>\n'
        for i, sense in enumerate(senses, 1):
            yield f'<sense xml:id="e{number}.s{i}">\n<usg type="domain">{_xml(sense.domain)}</usg>\n'
            yield f'<def resp="#model">{_xml(sense.text)}</def>\n'
            if sense.context:
                yield f'<cit type="example"><quote>{_xml(sense.context)}</quote></cit>\n'
            yield f"{_tei_note(sense, made)}\n</sense>\n"
        yield "</entry>\n"
    yield "</body></text>\n</TEI>\n"


def _tei_head(made: Provenance) -> str:
    base = f"on the base {made.base} {f'(fingerprint {made.base_fingerprint})' if made.base_fingerprint else ''}"
    how = f"{made.decoding}{f', chosen by {made.chosen_by}' if made.chosen_by else ''}"
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<TEI xmlns="http://www.tei-c.org/ns/1.0" type="lex-0">
<teiHeader>
<fileDesc>
<titleStmt><title>Definitions written by {_xml(made.model)}</title>
<respStmt xml:id="model"><resp>wrote the definitions, which no lexicographer has read</resp>\
<name type="model">{_xml(made.model)}</name></respStmt></titleStmt>
<publicationStmt><p>Not published.</p></publicationStmt>
<sourceDesc><p>Born digital: terms and contexts as they were given, definitions as a language model wrote them.</p>\
</sourceDesc>
</fileDesc>
<encodingDesc><appInfo><application ident="lora-lexicon" version={_attribute(made.version)} \
when={_attribute(made.date)}><label>lora-lexicon</label>\
<desc>{_xml(f"{made.model} {base}; {how}")}</desc></application></appInfo></encodingDesc>
<profileDesc><langUsage><language ident={_attribute(made.language)}/></langUsage></profileDesc>
</teiHeader>
<text><body>
"""


def _tei_note(sense: "Definition", made: Provenance) -> str:
    base = f'<name type="base">{_xml(made.base)}</name> ' if made.base else ""
    numbers = [
        f' <measure type="{name}" quantity="{value}">{value}</measure>'
        for name, value in _facts(sense)
        if name != "expert"
    ]
    expert = f'<name type="expert">{_xml(sense.domain)}</name>'
    return f'<note type="provenance" resp="#model">{base}{expert}{"".join(numbers)}</note>'


def ontolex(answers: Answers, made: Provenance) -> Iterator[str]:
    """RDF in Turtle: OntoLex-Lemon with lime, its lexicography module (lexicog), and PROV-O.

    All names are relative to the document, so that they are those of the place where it is published.
    """
    yield _turtle_head(made)
    experts: set[str] = set()
    for number, (term, senses) in enumerate(_entries(answers), 1):
        yield f"\n<#lexicon> lime:entry <#e{number}> .\n<#dictionary> lexicog:entry <#e{number}-article> .\n"
        yield f"<#e{number}-article> a lexicog:Entry ; lexicog:describes <#e{number}> .\n"
        yield f"<#e{number}> a ontolex:LexicalEntry ;\n"
        yield f"  ontolex:canonicalForm [ a ontolex:Form ; ontolex:writtenRep {_literal(term, made)} ] .\n"
        for i, sense in enumerate(senses, 1):
            expert = f"<#expert-{quote(_writable(sense.domain), safe='')}>"
            if sense.domain not in experts:
                experts.add(sense.domain)
                yield f"{expert} a prov:SoftwareAgent ; rdfs:label {_literal(sense.domain)} ; "
                yield "prov:actedOnBehalfOf <#model> .\n"
            yield f"<#e{number}> ontolex:sense <#e{number}-s{i}> .\n"
            yield f"<#e{number}-s{i}> a ontolex:LexicalSense ;\n  skos:definition {_literal(sense.text, made)} ;\n"
            if sense.context:
                example = f"[ a lexicog:UsageExample ; rdf:value {_literal(sense.context, made)} ]"
                yield f"  lexicog:usageExample {example} ;\n"
            for name, value in _facts(sense):
                if name != "expert":
                    yield f'  <#{name}> "{value}"^^xsd:double ;\n'
            yield f"  prov:wasAttributedTo {expert} ; prov:wasGeneratedBy <#run> .\n"


def _turtle_head(made: Provenance) -> str:
    based = " ; prov:wasDerivedFrom <#base>" if made.base else ""
    known = f" ; dct:identifier {_literal(made.base_fingerprint)}" if made.base_fingerprint else ""
    base = f"<#base> a prov:Entity ; rdfs:label {_literal(made.base)}{known} .\n" if made.base else ""
    how = f"{made.decoding}{f', chosen by {made.chosen_by}' if made.chosen_by else ''}; lora-lexicon {made.version}"
    return f"""@prefix rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
@prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix dct: <http://purl.org/dc/terms/> .
@prefix prov: <http://www.w3.org/ns/prov#> .
@prefix ontolex: <http://www.w3.org/ns/lemon/ontolex#> .
@prefix lime: <http://www.w3.org/ns/lemon/lime#> .
@prefix lexicog: <http://www.w3.org/ns/lemon/lexicog#> .

<#lexicon> a lime:Lexicon ; lime:language {_literal(made.language)} .
<#dictionary> a lexicog:LexicographicResource ; dct:language {_literal(made.language)} ;
  rdfs:label {_literal(f"Definitions written by {made.model}, which no lexicographer has read")}@en .
<#model> a prov:SoftwareAgent, prov:Entity ; rdfs:label {_literal(made.model)}{based} .
{base}<#run> a prov:Activity ; prov:used <#model> ; rdfs:comment {_literal(how)} ;
  prov:endedAtTime {_literal(made.date)}^^xsd:dateTime .
<#similarity> a owl:DatatypeProperty ;
  rdfs:comment "The cosine of the prompt's vector and the centroid of the expert's domain."@en .
<#score> a owl:DatatypeProperty ;
  rdfs:comment "What the definition was chosen by among several candidates; higher is better."@en .
"""


FORMATS: dict[str, Callable[[Answers, Provenance], Iterator[str]]] = {
    "tei": tei,
    "ontolex": ontolex,
    "jsonl": jsonl,
    "markdown": markdown,
}


def _entries(answers: Answers) -> Iterator[tuple[str, Iterator["Definition"]]]:
    return groupby(answers, key=lambda answer: answer.term)


def _facts(sense: "Definition") -> list[tuple[str, str]]:
    """Expert, similarity and score, those that are known."""
    numbers = (("similarity", finite(sense.similarity)), ("score", finite(sense.score)))
    return [("expert", sense.domain), *((name, f"{number:.6g}") for name, number in numbers if number is not None)]


def _writable(text: str) -> str:
    """A text without what XML cannot hold: each such character as U+FFFD."""
    return _UNWRITABLE.sub(_REPLACEMENT, text)


def _xml(text: str) -> str:
    return escape(_writable(text), {"\r": "&#13;"})  # a bare one would be read as a line feed


def _attribute(text: str) -> str:
    return quoteattr(_writable(text))


def _literal(text: str, made: Provenance | None = None) -> str:
    """A Turtle string, in the language of the definitions where `made` is given."""
    quoted = _writable(text).replace("\\", "\\\\").replace('"', '\\"')
    quoted = quoted.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{quoted}"' + (f"@{made.language}" if made else "")


def _md(text: str) -> str:
    """A text that CommonMark shows as it is, on one line."""
    shown = re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", " ".join(_writable(text).split()))
    return re.sub(r"^(\d+)([.)])(?= |$)|^([-+=:])", lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[3]}", shown)
