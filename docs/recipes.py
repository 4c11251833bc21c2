"""Writes docs/recipes.md from the recipes' own fields and the headers of those that ship: `make docs`."""

import dataclasses
import inspect
import json
import re
import typing
from typing import Any

from lora_lexicon.experts.pretrain import PretrainRecipe
from lora_lexicon.recipe import DomainsRecipe, ExperimentRecipe, LoopRecipe, RewardRecipe, RouterRecipe, TrainRecipe
from lora_lexicon.resources import recipes

TITLES = {
    DomainsRecipe: "Domains: `domains fit`, `domains sweep`",
    LoopRecipe: "Any training on definitions: `train`, `train router`, `train reward`",
    TrainRecipe: "Experts: `train`, with the keys of any training",
    RouterRecipe: "What chooses experts: `train router`, with the keys of any training",
    RewardRecipe: "What chooses among samples: `train reward`, with the keys of any training",
    PretrainRecipe: "The embedded base: `train base`",
    ExperimentRecipe: "The paper's tables and figures: `experiment`",
}
HEAD = """# Recipes

Made by `make docs` from the source; do not edit.

A recipe is a YAML file of keys and values. `--recipe` takes a file of yours or the name of one that ships;
`--set KEY=VALUE`, given as often as needed, overrides single keys of it, and so does an option of the command's own
(`--kind`, `--quantize`, `--domains` ...), which `--set` overrides in turn. A key that none of them gives has the
default below. Without `--recipe`, `train` takes `tiny/lora` (with `--kind ffn`, `tiny/ffn`), and another command its
own of `tiny`. An unknown key, a value of the wrong type, or an alias of YAML (`*name`) is refused.

A value is YAML too. A map stands in braces, with a space after each colon, and is given whole: a second `--set` of the
same key replaces it. The shell wants quotes around it:

```console
$ lora-lexicon train --set rank=8 --set 'rank_of={make-cause: 32, act-quality: 4}' --set optimizer=adamw_bnb_8bit ...
```

In a file:

```yaml
rank: 8
rank_of:
  make-cause: 32
  act-quality: 4
optimizer: adamw_bnb_8bit
```

`optimizer` is one of transformers' `OptimizerNames`. `adamw_torch_fused` and `adamw_torch` need nothing more;
`adamw_bnb_8bit`, which is also called `adamw_8bit`, and `paged_adamw_8bit` keep AdamW's states in 8 bits, and need
bitsandbytes (`pip install 'lora-lexicon[quantize]'`).

## What ships
"""


def page() -> str:
    """The whole file."""
    shipped = [f"- `{name}`: {_header(path.read_text(encoding='utf-8'))}" for name, path in recipes().items()]
    return "\n".join([HEAD, *shipped, *(_table(kind, title) for kind, title in TITLES.items())]) + "\n"


def _header(text: str) -> str:
    """The comment that a recipe begins with."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:first])


def _table(kind: type[Any], title: str) -> str:
    said, hints = _comments(kind), typing.get_type_hints(kind)
    rows = [
        f"| `{field.name}` | {_values(hints[field.name])} | `{_default(field)}` | {said[field.name]} |"
        for field in dataclasses.fields(kind)
        if field.name in said
    ]
    return "\n".join([f"\n## {title}\n", "| key | value | default | meaning |", "|---|---|---|---|", *rows])


def _comments(kind: type[Any]) -> dict[str, str]:
    """What is said of each field of the class's own, behind it or in the line above."""
    found, above = {}, ""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.strip().partition("# ")
        if name := re.match(r"(\w+): .+ = ", code):
            found[name[1]] = " ".join(filter(None, (above, comment)))
        above = "" if code else comment
    return found


def _values(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return "map of names to whole numbers"
    if typing.get_origin(hint) is tuple:
        return f"list of {_values(options[0])}s"
    if options:
        return ", ".join(f"`{option}`" for option in options)
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[hint]


def _default(field: "dataclasses.Field[Any]") -> str:
    """As YAML writes it."""
    value = field.default if field.default is not dataclasses.MISSING else typing.cast(Any, field.default_factory)()
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    print(page(), end="")
