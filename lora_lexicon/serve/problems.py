"""What can go wrong with a request: a status, and one line that says what to do. Imports nothing of ours."""

from collections.abc import Mapping
from typing import Any


class Problem(Exception):
    """An answer other than what was asked for.

    Attributes:
        status: of HTTP.
        kind: a word for programs.
        message: a line for a person, as in `LexiconError`.
        headers: that go with it.
    """

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, " ".join(message.split())
        self.headers = dict(headers or {})

    def body(self, openai: bool = False) -> dict[str, Any]:
        """As JSON; OpenAI's form has two fields more."""
        more = {"param": None, "code": self.kind} if openai else {}
        return {"error": {"type": self.kind, "message": self.message, **more}}
