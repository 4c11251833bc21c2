"""cli/console.py: the rates and the times left of progress bars."""

import io
from typing import Any

from lora_lexicon.cli.console import progress
from rich.console import Console


def shown(bar: Any) -> list[str]:
    """The words of what is on the screen."""
    screen = Console(file=io.StringIO(), width=120)
    screen.print(bar.get_renderable())
    return screen.file.getvalue().split()  # type: ignore[attr-defined]


def test_a_run_s_own_clock_decides_its_rate_however_its_reports_come() -> None:
    with progress(shown=False) as bar:
        task = bar.add_task("act", total=None)
        assert not any("/s" in word for word in shown(bar))
        bar.update(task, completed=90_000, total=100_000, seconds=100.0)  # goes on from a checkpoint
        assert not any("/s" in word for word in shown(bar))
        bar.update(task, completed=90_500, total=100_000, seconds=101.0)  # at once, as from Ray
        bar.update(task, completed=91_000, total=100_000, seconds=104.0)
        assert {"250/s", "0:00:36"} <= set(shown(bar))  # 1,000 in 4 s, and 9,000 to go
        bar.update(task, completed=80_000, total=100_000, seconds=70.0)  # its process died, an older checkpoint goes on
        bar.update(task, completed=80_200, total=100_000, seconds=70.5)
        assert {"400/s", "0:00:50"} <= set(shown(bar))
        bar.update(task, completed=100_000, total=100_000, seconds=110.0)
        assert shown(bar)[-1] == "500/s"


def test_others_are_timed_by_when_they_report() -> None:
    with progress(shown=False) as bar:
        bar.get_time = iter(range(1000)).__next__  # a second from one look at the clock to the next
        task = bar.add_task("bytes", total=100)
        for done in (0, 10, 20, 30):
            bar.update(task, completed=done)
        assert "10/s" in shown(bar)
        assert "0:00:07" in shown(bar)
