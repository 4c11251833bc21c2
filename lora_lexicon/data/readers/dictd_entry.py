"""From the text of one dictd entry to its term, senses and examples. Knows nothing of files.

The format lays nothing down about an entry's inside, so this reads the layouts in use: a headword
line with a pronunciation below (Jargon File), `HEADWORD, n.  text` (Bierce), `Headword \\pron\\, n.`
(Webster), `n 1: text` (WordNet), a bare headword line (most others). A sense's definition is its
first sentence without labels and etymology; its examples are the quotations, further sentences and
verses of that sense which contain the term.
"""

import re
from dataclasses import dataclass, field

from lora_lexicon.data.terms import contains_term

MIN_EXAMPLE_WORDS = 4
_POS = {"n": "noun"} | dict.fromkeys(("v", "vt", "vi"), "verb")
_POS |= dict.fromkeys(("adj", "a", "s"), "adj") | dict.fromkeys(("adv", "r"), "adv")
_POS_LABEL = r"(?:(?:n|v|vt|vi|adj|adv|a|t|i|p|pp|pl|pron|prep|conj|interj|imp|suff|pref|x|abbrev)\.,?\s*(?:&\s*)?)+"
_WEBSTER = re.compile(r"^(?P<term>[^\\\n]+?)\s*\\[^\\]*\\(?P<rest>.*)$", re.DOTALL)
_COMMA = re.compile(rf"^(?P<term>[^a-z\n]{{1,60}}?), (?P<pos>{_POS_LABEL})\s*(?P<rest>\S.*)$")
_FACT = re.compile(r"^[A-Z][\w ]{1,30}:(?: \S.{0,30})?$")
_SENSE_POS = re.compile(rf"^(?P<pos>{_POS_LABEL})\s*(?=[\[(\"“A-Z])")
_EMPHASIS = re.compile(r"(?<!\w)_([^_]+)_(?!\w)")
_SENSE = re.compile(r"^\s*(?:(?P<pos>n|v|adj|adv|a|r|s)\s)?\s*(?P<number>\d{1,2})(?:\.\s|:\s|\)\s)")
_FIRST_POS = re.compile(r"^\s*(?:/[^/]*/,?\s*)*(n|v|vt|vi|adj|adv|a)\b\.?")
_LABEL = re.compile(r"^(?:\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>)[,;:.]?\s*")
_REFERENCE = re.compile(r"^(?:See|See also|Cf\.|Compare|Syn:|Syn\.|Note:|Same as)\s", re.IGNORECASE)
_BRACKETS_ONLY = re.compile(r"^(?:\[[^\]]*\]\s*)+$")
_AUTHOR = re.compile(r"\s+--[A-Z][\w'.&]*(?: [A-Z][\w'.&]*){0,4}(?=\s|$)")  # Webster's "--Bp. Hall."
_ATTRIBUTION = re.compile(r"\s*--\s?[A-Z][^-]{0,60}$")
_QUOTE = re.compile(r"“([^“”]+)”|(?<!\w)\"([^\"]+)\"(?!\w)")
_SHORT = re.compile(
    r"(?:^|[\s(\[“\"'‘])(?:[A-Za-z]|[A-Za-z]\.[A-Za-z]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Rev|esp|usu|orig|poss|prob|syn|pron|vs|cf|"
    r"viz|etc|approx|abbr|fr|e\.g|i\.e|p\.m|a\.m|U\.S|Fig|Vol|No|pl|Am|Fr|Gr|L|Lat|ca)\.$"
)


@dataclass(frozen=True)
class Sense:
    """A definition and the examples that go with it."""

    definition: str
    contexts: tuple[str, ...] = ()
    pos: str = ""


@dataclass(frozen=True)
class DictEntry:
    """What an entry's text holds; `error` says why it has no sense."""

    term: str
    pos: str = ""
    senses: list[Sense] = field(default_factory=list)
    error: str = "no definition"


def parse_entry(indexed: str, text: str) -> DictEntry:
    """Reads one entry. `indexed` is its headword in the index, often folded; the text's own spelling wins."""
    term, pos, body = _head(indexed, text)
    senses: list[Sense] = []
    references = 0
    for block in _blocks(body):
        sense = _sense(term, block)
        if sense is None:
            continue
        if _REFERENCE.match(sense.definition):
            references += 1
        else:
            senses.append(sense)
    return DictEntry(term, pos, senses, "cross-reference only" if references else "no definition")


def _head(indexed: str, text: str) -> tuple[str, str, list[str]]:
    """(term, part of speech, lines of the body) of an entry."""
    lines = [line.rstrip() for line in text.expandtabs().split("\n")]
    while lines and not lines[0]:
        lines.pop(0)
    if not lines:
        return indexed, "", []
    if comma := _COMMA.match(lines[0]):
        # Such dictionaries print headwords in capitals, which say nothing of the word's own spelling.
        return comma["term"].strip(" ,").lower(), _pos(comma["pos"]), [comma["rest"], *lines[1:]]
    if "\\" in lines[0]:
        head, used = lines[0], 1
        while used < min(len(lines), 15) and (head.count("\\") % 2 or _open(head)):
            head, used = f"{head} {lines[used].strip()}", used + 1
        if webster := _WEBSTER.match(head):
            return webster["term"].strip(), _pos(webster["rest"].lstrip(" ,")), lines[used:]
    body, pos = lines[1:], ""
    if body and re.match(r"^ \S", body[0]):  # a line of pronunciation and part of speech
        while body and body[0].strip():
            pos = pos or _pos(body.pop(0))
    while body and (not body[0] or _FACT.match(body[0])):
        body = body[1:]
    return " ".join(lines[0].split()), pos, body


def _open(text: str) -> bool:
    return text.count("[") > text.count("]") or text.count("(") > text.count(")")


def _pos(text: str) -> str:
    found = _FIRST_POS.match(re.sub(r"^\s*/.*/,?\s*", "", text))
    return _POS.get(found[1], "") if found else ""


def _blocks(body: list[str]) -> list[list[tuple[str, bool]]]:
    """The senses of a body, each a list of (paragraph, is a quotation set off by its indent)."""
    base = min((_indent(line) for line in body if line), default=0)
    blocks: list[list[tuple[str, bool]]] = [[]]
    paragraph: list[str] = []
    expected, numbered = 1, False

    def close() -> None:
        if found := _paragraph(paragraph, base + (7 if numbered else 3)):
            blocks[-1].append(found)
        paragraph.clear()

    for line in body:
        sense = _SENSE.match(line)
        if sense and int(sense["number"]) in (expected, 1):
            close()
            # What stands before the first number is a remark on all senses, never a definition.
            blocks = [[]] if not numbered else [*blocks, []]
            expected, numbered = int(sense["number"]) + 1, True
            line = " " * _indent(line) + line[sense.end() :]
        if not line:
            close()
        else:
            paragraph.append(line)
    close()
    return [block for block in blocks if block]


def _paragraph(lines: list[str], deep: int) -> tuple[str, bool] | None:
    """(text, is a quotation) of some lines; one whose every line is indented by `deep` is a quotation."""
    quoted = bool(lines) and min(_indent(line) for line in lines) >= deep
    if quoted:  # the author's name is set far to the right, or after a dash
        lines = [line for line in lines if _indent(line) < 30 and not re.match(r"^\s*--\s?[A-Z]", line)]
    text = " ".join(" ".join(lines).split())
    return (text, quoted) if text and not _BRACKETS_ONLY.match(text) else None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _sense(term: str, block: list[tuple[str, bool]]) -> Sense | None:
    prose = [text for text, quoted in block if not quoted]
    if not prose:
        return None
    label = _SENSE_POS.match(prose[0])
    text = prose[0][label.end() :] if label else prose[0]
    first, *others = sentences(_plain(text)) or [""]
    definition = _definition(first)
    if not definition:
        return None
    contexts = _quotes(first, term)
    for sentence in [*others, *(each for part in prose[1:] for each in sentences(_plain(part)))]:
        if not _REFERENCE.match(sentence):
            contexts += _quotes(sentence, term) or [sentence]
    for part, quoted in block:
        if quoted:
            contexts += sentences(_ATTRIBUTION.sub("", _plain(part)))
    examples = tuple(dict.fromkeys(c for c in map(_tidy, contexts) if _is_example(c, term)))
    return Sense(definition, examples, _pos(label["pos"]) if label else "")


def _plain(text: str) -> str:
    """Text without the braces of cross-references, source marks, and labels in front."""
    text = _EMPHASIS.sub(r"\1", re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text))
    text = re.sub(r"\s*\[(?:1913 Webster|WordNet[^\]]*|PJC|Webster[^\]]*|syn:[^\]]*|R\.|Obs\.)[^\]]*\]", "", text)
    text = _AUTHOR.sub("", text)
    text = re.sub(r"\s+([,;](?:\s|$))", r"\1", re.sub(r"([“(\[])\s+", r"\1", text))
    while (label := _LABEL.match(text)) and label.end() < len(text):
        text = text[label.end() :]
    return text.strip()


def _definition(sentence: str) -> str:
    text = _ATTRIBUTION.sub("", sentence)
    quote = re.search(r"\s[\"“][^\"”]*[\"”]?\s*$", text)  # an example after the definition proper
    if quote and text[: quote.start()].rstrip()[-1:] in ".;:":
        text = text[: quote.start()]
    return text.strip().rstrip(".;:,").strip()


def _quotes(text: str, term: str) -> list[str]:
    quotes = [a or b for a, b in _QUOTE.findall(text)]
    return [quote for quote in quotes if _is_example(quote, term)]


def _tidy(context: str) -> str:
    """An example without dashes in front, and without quotation marks that enclose all of it."""
    text = re.sub(r"^[\s—–-]+", "", context).strip()
    enclosed = re.fullmatch(r'"([^"]+?),?"|“([^“”]+?),?”', text)
    return (enclosed[1] or enclosed[2]) if enclosed else text


def _is_example(text: str, term: str) -> bool:
    return len(text.split()) >= MIN_EXAMPLE_WORDS and contains_term(text, term)


def sentences(text: str) -> list[str]:
    """Splits at sentence ends outside quotations and brackets, not after initials and common abbreviations."""
    parts: list[str] = []
    start, depth, straight = 0, 0, False
    for i, character in enumerate(text):
        if character in "“([":
            depth += 1
        elif character in "”)]":
            depth = max(depth - 1, 0)
        elif character == '"':
            straight = not straight
        ends = character in ".!?" or (character in '”)"' and text[i - 1 : i] in (".", "!", "?"))
        if not ends or depth or straight or not re.match(r"\s+[A-Z“\"'‘(\[0-9]", text[i + 1 : i + 5]):
            continue
        if not _SHORT.search(text, max(start, i - 14), i + 1):
            parts.append(text[start : i + 1].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts
