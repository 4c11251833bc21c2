"""The one family of errors a user can cause. Imports nothing of ours.

Every message is one line that says what is wrong, where, and what to do about it.
The command line prints it and exits 1; a library caller can catch the family.
"""

from pathlib import Path

_STANDS_FOR: dict[str, str] = {}


def show_as(path: Path, name: object) -> None:
    """From now on messages say `name` for a path of ours, such as the folder where the user's file was unpacked."""
    _STANDS_FOR[str(path)] = str(name)


def shown(text: object) -> str:
    """A text as the user should see it: see `show_as`."""
    found = str(text)
    for path, name in tuple(_STANDS_FOR.items()):
        found = found.replace(path, name)
    return found


class LexiconError(Exception):
    """Something the user can mend; the message says how."""

    def __str__(self) -> str:
        return shown(super().__str__())


class RecipeError(LexiconError):
    """A recipe or an option holds an unknown key or an impossible value."""


class DataError(LexiconError):
    """Dictionary data, or an entries folder, cannot be read."""


class RouterError(LexiconError):
    """A router is missing, damaged, or asked to use an embedder that is not its own."""


class ExpertError(LexiconError):
    """A base or an expert is damaged, or does not fit the other parts."""


class DivergedError(ExpertError):
    """Training came to no finite numbers, and would again."""


class PackError(LexiconError):
    """A pack, a mixture or a merged model is damaged or does not fit."""


class ConflictError(PackError):
    """A pack is whole, but does not fit the model that it is to join."""


class TrustError(PackError):
    """No key that is trusted signed a pack as it lies there."""


class MissingExtraError(LexiconError):
    """An optional dependency is not installed; the message holds the command that installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(what, package, extra)  # as they came, so that it travels between processes
        self.message = (
            f"{what} needs the package {package!r}, which is not installed: run pip install 'lora-lexicon[{extra}]'"
        )

    def __str__(self) -> str:
        return self.message
