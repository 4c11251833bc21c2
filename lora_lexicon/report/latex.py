r"""A table as LaTeX, for \input: booktabs, the caption above, a column's best number bold."""

import re

from lora_lexicon.report.document import Cell, Figure, Table, is_numeric, plain, shown

WIDE = 40  # characters: a longer text gets a column of a width of its own, in which it is broken
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "$": r"\$", "#": r"\#", "&": r"\&", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "\n": " ", "\t": " ",
    "[": "{[}", "]": "{]}", "*": "{*}",  # which would be read as an option of the \\ before them
}  # fmt: skip
_LIGATURES = re.compile(r"-(?=-)|,(?=,)")  # that would make one character of two


def escape(text: str) -> str:
    """A text that LaTeX shows as it is."""
    text = _LIGATURES.sub(lambda found: f"{found[0]}\0", plain(text))
    return "".join("{}" if c == "\0" else _ESCAPES.get(c, c) for c in text)


def table(table: Table, name: str) -> str:
    """The table as a float; `name` is its label's."""
    best = table.best()
    head = " & ".join(escape(column) for column in table.columns)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)}}}",
        rf"\label{{tab:{name}}}",
        rf"\begin{{tabular}}{{{''.join(_column(table, at) for at in range(len(table.columns)))}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
    ]
    for i, row in enumerate(table.rows):
        cells = [_cell(cell) for cell in row]
        cells = [rf"\textbf{{{cell}}}" if (i, at) in best else cell for at, cell in enumerate(cells)]
        lines.append(rf"{' & '.join(cells)} \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.note:
        lines.append(rf"\par\smallskip\footnotesize {escape(table.note)}")
    return "\n".join([*lines, r"\end{table}", ""])


def _column(table: Table, at: int) -> str:
    if is_numeric(table, at):
        return "r"
    longest = max((len(shown(row[at])) for row in table.rows), default=0)
    return "l" if longest <= WIDE else r"p{0.3\textwidth}"


def _cell(cell: Cell) -> str:
    if cell is None or (isinstance(cell, Figure) and cell.value is None):
        return "--"
    text = escape(shown(cell))
    if isinstance(cell, str):
        return text
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", text).replace("±", r"$\pm$")
