"""Which references a prediction is held against. Knows rows, nothing of metrics.

`given`             the row's own `references`, all of them
`one-to-one`        the row's own definition
`one-to-many`       the definitions of all rows with its term and context
`one-to-many-term`  the definitions of all rows with its term, whatever the context: Huang et al. (2021), "Definition
                    modelling for appropriate specificity", and the LM-Lexicon paper
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from lora_lexicon.data.predictions import Prediction
from lora_lexicon.errors import DataError

Protocol = Literal["given", "one-to-one", "one-to-many", "one-to-many-term"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def references_of(
    rows: Sequence[Prediction], protocol: Protocol, pool: Sequence[Prediction] = ()
) -> list[tuple[str, ...]]:
    """The references of each row; of equal ones one is kept.

    Args:
        pool: further rows whose definitions count too where rows share them (the paper's code reads those of valid and
            test).

    Raises:
        DataError: `one-to-one` of a row with several references and no `definition`; it names the line.
    """
    if protocol == "given":
        return [tuple(dict.fromkeys(row.references)) for row in rows]
    if protocol == "one-to-one":
        return [(_own(row),) for row in rows]

    def key(row: Prediction) -> tuple[str, ...]:
        return (row.term, row.context) if protocol == "one-to-many" else (row.term,)

    shared: dict[tuple[str, ...], dict[str, None]] = {}
    for row in (*rows, *pool):
        shared.setdefault(key(row), {}).update(dict.fromkeys(row.references))
    whole = {name: tuple(found) for name, found in shared.items()}
    return [whole[key(row)] for row in rows]


def counted(references: Sequence[tuple[str, ...]]) -> str:
    """How many references a row has, for a signature: `1`, or `1-12,mean:3.4`."""
    sizes = Counter(map(len, references))
    if len(sizes) == 1:
        return str(next(iter(sizes)))
    mean = sum(size * rows for size, rows in sizes.items()) / len(references)
    return f"{min(sizes)}-{max(sizes)},mean:{mean:.2f}"


def _own(row: Prediction) -> str:
    if row.definition is None:
        raise DataError(
            f"line {row.line}: {len(row.references)} references, and no 'definition' that is the row's own: "
            "choose another protocol, such as given"
        )
    return row.definition
