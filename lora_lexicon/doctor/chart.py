"""What a look at an artefact found. Knows of no artefact."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_lexicon.errors import LexiconError, shown
from lora_lexicon.folders import UNSHOWN, plain

Severity = Literal["error", "warning"]
MAX_FINDINGS = 100  # that are kept; more are counted
MAX_TEXT = 400
# What reading a file raises that says something else than what belongs there.
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError, OSError)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: an `error` keeps the artefact from being used, or from being right; a `warning` does not.
        where: the file, or the part, within the artefact.
        mend: the command that mends it; "" where none does.
    """

    severity: Severity
    what: str
    where: str
    mend: str


def copied(command: str) -> str:
    """A command that reads as it runs; "" for one with a name that cannot be shown: copied, it would mend another."""
    return "" if UNSHOWN.search(command) else command


@dataclass
class Chart:
    """An artefact under examination.

    Attributes:
        path: its folder.
        kind: what it is.
        facts: what else is known of it, to be shown.
        progress: called with the number of bytes just read.
    """

    path: Path
    kind: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    left_out: int = 0
    progress: Callable[[int], None] | None = None
    mend: str = ""

    def find(self, what: str, where: "str | Path" = "", mend: str | None = None, severity: Severity = "error") -> None:
        """Notes a finding; `mend` is by default what makes the artefact again."""
        if isinstance(where, Path) and where.is_relative_to(self.path):
            where = where.relative_to(self.path).as_posix()
        where = plain(shown(where))
        text = plain(" ".join(shown(what).replace(f"{self.name}/", "").split()))
        if len(text) > MAX_TEXT:
            text = f"{text[:MAX_TEXT]}..."
        found = Finding(
            severity, text, where if where not in ("", ".") else "", copied(self.mend if mend is None else mend)
        )
        if found in self.findings:
            return
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(found)
        else:
            self.left_out += 1

    def several(self, faults: list[str], where: "str | Path", mend: str | None = None) -> None:
        """Notes many findings of one kind as one: the first of them, and how many more there are."""
        if faults:
            more = f" (and {len(faults) - 1:,} more like it)" if len(faults) > 1 else ""
            self.find(f"{faults[0]}{more}", where, mend)

    @contextmanager
    def going_on(self, where: "str | Path", mend: str | None = None) -> Iterator[None]:
        """Notes what is refused inside, and goes on after it."""
        try:
            yield
        except LexiconError as error:
            self.find(str(error), where, mend)
        except OSError as error:
            self.find(f"cannot be read ({error.strerror or 'the system says no more'})", where, mend)
        except DAMAGED:
            self.find("is damaged: it holds something else than what belongs there", where, mend)

    @property
    def name(self) -> str:
        """What the user calls it: the folder, or the file that was unpacked there."""
        return shown(self.path)

    @property
    def healthy(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "path": self.name,
            "kind": self.kind,
            "healthy": self.healthy,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
            "left_out": self.left_out,
        }
