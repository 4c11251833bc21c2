"""Which rows become entries: the preprocessing rules of the LM-Lexicon paper, appendix A. Knows nothing of files."""

from lora_lexicon.data.entry import Entry, Row
from lora_lexicon.data.split import split_name

MAX_TEXT = 10_000  # characters of a term, a context or a definition


def clean(row: Row, *, keep_without_context: bool = False) -> list[Entry] | str:
    """A row's entries, one per context, or the reason why it has none.

    Term, definition and source must be strings that are not blank, and at least one context too. A
    context that breaks a rule falls away alone where the row has others.

    Args:
        keep_without_context: a row without any context gives one entry whose context is "".
    """
    if row.error:
        return row.error
    texts = (row.term, row.definition, row.source, row.language, row.domain, row.pos)
    for text, reason in zip(texts, ("no term", "no definition", "no source"), strict=False):
        if not isinstance(text, str) or not text.strip():
            return reason
    for text in texts:
        if problem := _problem(str(text)):
            return problem
    if row.split is not None and split_name(row.split) is None:
        return "unknown split"
    given = [c for c in row.contexts if isinstance(c, str) and c.strip()]
    contexts = [_one_line(c) for c in given if not _problem(c)]
    if not contexts:
        if given:
            return _problem(given[0])
        if not keep_without_context:
            return "no context"
        contexts = [""]
    term, definition, source = (_one_line(str(text)) for text in texts[:3])
    rest = (row.language, row.domain, row.pos)
    return [Entry(term, context, definition, source, *rest) for context in contexts]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _problem(text: str) -> str:
    """Why a text cannot be kept, or ""."""
    if len(text) > MAX_TEXT:
        return "overlong field"
    if "\0" in text:
        return "NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate: a byte that was no UTF-8, or half a JSON escape
            return "invalid UTF-8"
    return ""
