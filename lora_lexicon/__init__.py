"""lora-lexicon: definition modelling with a mixture of domain experts.

`import lora_lexicon` costs nothing: the public names below are imported on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Entry": "lora_lexicon.data.entry",
    "load_entries": "lora_lexicon.data.store",
    "load_router": "lora_lexicon.domains.router",
    "load_system": "lora_lexicon.compose.system",
    "define": "lora_lexicon.inference.engine",
    "LexiconError": "lora_lexicon.errors",
}
__all__ = ["Entry", "LexiconError", "__version__", "define", "load_entries", "load_router", "load_system"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
