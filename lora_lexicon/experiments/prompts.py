"""How a model that was not trained for it is asked for a definition, and what of its answer is one. Pure functions.

A question is the house's own template (`data.prompt.PromptTemplate`). As text a demonstration is a question, then
`Definition: ` and its definition; in a chat it is a turn of the user and one of the assistant, after the instruction as
the system's message.
"""

import re
from collections.abc import Sequence

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.folders import CONTROL

INSTRUCTION = (
    "Define each term as a dictionary would, in the sense that it has in its sentence. "
    "Answer with the definition alone: one short phrase, without the term."
)
LABEL = "Definition:"
VERSION = "prompt:v1|clean:v1"  # to be raised with any change here that changes a prompt or an answer
MAX_ANSWER = 20_000  # characters of an answer that are looked at
_TEMPLATE = PromptTemplate()
_QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "**", "__")
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARK = re.compile(r"(?:[-*•>#]+|\d{1,2}[.)])\s+")


def messages(demonstrations: Sequence[Entry], asked: Entry) -> list[dict[str, str]]:
    """The messages of a chat."""
    found = [{"role": "system", "content": INSTRUCTION}]
    for entry in demonstrations:
        found.append({"role": "user", "content": _question(entry)})
        found.append({"role": "assistant", "content": entry.definition})
    return [*found, {"role": "user", "content": _question(asked)}]


def text(demonstrations: Sequence[Entry], asked: Entry) -> str:
    """The same as one text, which ends where the definition is to begin."""
    shots = [f"{_question(entry)}\n{LABEL} {entry.definition}" for entry in demonstrations]
    return "\n\n".join([INSTRUCTION, *shots, f"{_question(asked)}\n{LABEL}"])


def clean(answer: str, term: str) -> str:
    """The definition in an answer: its first line that says something, without what stands around it.

    Taken off are thoughts in `<think>`, headings (a line that ends in a colon, or is the term), marks of lists and of
    code, quotes and emphasis around the whole, and beginnings such as `Definition:`, `TERM:` and `In this context, TERM
    means`, unless they are all there is. Cleaning twice is cleaning once.
    """
    before, found = None, _THOUGHT.sub("", answer[:MAX_ANSWER], count=1)
    while found != before:
        before, found = found, _cleaner(found, term)
    return found


def _question(entry: Entry) -> str:
    return _TEMPLATE.text(entry.term, entry.context)


def _cleaner(answer: str, term: str) -> str:
    lines = [CONTROL.sub(" ", line).strip() for line in answer.splitlines()]
    lines = [line for line in lines if line and not line.startswith("```")]
    while len(lines) > 1 and _is_heading(lines[0], term):
        del lines[0]
    found = lines[0] if lines else ""
    for pattern in (_MARK, _label(term), _subject(term)):
        found = found[match.end() :] if (match := pattern.match(found)) and match.end() < len(found) else found
    for opens, closes in _QUOTES:
        inner = found[1:-1]
        whole = inner.strip() and not {opens, closes} & set(inner.strip("*_"))  # and not two quotes side by side
        if whole and (found[0], found[-1]) == (opens, closes):
            found = inner.strip()
    return found


def _is_heading(line: str, term: str) -> bool:
    bare = line.strip("*_#\"'“”` ")
    return line.rstrip("*_ ").endswith(":") or bare.casefold() == term.casefold()


def _named(term: str) -> str:
    return rf"[*_\"'“‘`]*{re.escape(term)}[*_\"'”’`]*"


def _label(term: str) -> re.Pattern[str]:
    """`Definition:`, `**Meaning:**`, `The definition of "kernel" is`."""
    what = r"(?:the\s+)?(?:definition|meaning|answer)"
    return re.compile(rf"[*_]*{what}(?:[*_]*\s*:|\s+of\s+{_named(term)}\s*(?::|is\b:?))[*_]*\s*", re.IGNORECASE)


def _subject(term: str) -> re.Pattern[str]:
    """`kernel:`, `"kernel" (noun): `, `In this sentence, the word kernel refers to`."""
    where = r"(?:in\s+this\s+(?:context|sentence|case|sense),?\s+)?(?:the\s+(?:term|word|phrase)\s+)?"
    verb = r"(?:is\s+defined\s+as|is|means|refers\s+to|denotes|describes)(?=[\s:]):?"
    return re.compile(rf"{where}{_named(term)}(?:\s*\([^()]{{1,30}}\))?(?:\s*[:—–]|\s+{verb})[*_]*\s*", re.IGNORECASE)
