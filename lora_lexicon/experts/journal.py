"""What a training run says of itself: a line on disk a step, and whoever else listens. Knows no model."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_lexicon.errors import MissingExtraError, RecipeError
from lora_lexicon.folders import read_record, write_record

ENERGY = "energy.json"
REPORTERS = {  # transformers' names, and ours of the extra that brings the package
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "codecarbon": "energy",
}


@dataclass(frozen=True)
class Step:
    """Where one expert is in its training.

    Attributes:
        tokens: read so far, of `all_tokens`.
        loss: the mean of the steps since the last report, nats a definition token.
        learning_rate: of the step to come.
        seconds: the whole run's so far, its parts before a stop included.
    """

    expert: str
    step: int
    steps: int
    tokens: int
    all_tokens: int
    loss: float
    learning_rate: float
    seconds: float


Report = Callable[[Step], None]


class Journal:
    """JSON Lines that grow while a run lasts; a resumed run drops what it will say again."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def go_on(self, step: int) -> None:
        """Keeps what was written up to a step, and no line that was cut off."""
        if self.file.is_file():
            kept = [line for line in self.lines() if line["step"] <= step]
            self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; it names its `expert` and its `step`."""
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, expert: str | None = None) -> Iterator[dict[str, Any]]:
        """What was written, of one expert or of all."""
        if self.file.is_file():
            for text in self.file.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # cut off by a kill
                if expert in (None, line["expert"]):
                    yield line

    def copy(self, expert: str, file: Path) -> None:
        """Writes one expert's lines to a file of their own."""
        file.write_text("".join(json.dumps(line) + "\n" for line in self.lines(expert)))


@contextmanager
def reporters(names: Sequence[str], out: Path, state: Path) -> Iterator[list[TrainerCallback]]:
    """transformers' own callbacks that report to TensorBoard, trackio or Weights & Biases, and codecarbon's meter.

    TensorBoard writes to `out`/runs unless its own variable TENSORBOARD_LOGGING_DIR says otherwise.
    """
    from transformers.integrations.integration_utils import TensorBoardCallback

    callbacks = [reporter(name, state) for name in names]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / "runs")
    try:
        yield callbacks
    finally:
        for callback in callbacks:
            if isinstance(callback, Meter):
                callback.stop()


def check_reporters(names: Sequence[str]) -> None:
    """Raises RecipeError for a name that none has."""
    for name in names:
        if name not in REPORTERS:
            raise RecipeError(f"--report-to {name!r} is not known: it is one of {', '.join(REPORTERS)}")


def reporter(name: str, state: Path = Path()) -> TrainerCallback:
    """One of REPORTERS, that has said nothing yet; `state` is the run's folder.

    Raises:
        MissingExtraError: its package is not installed.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        return Meter(state) if name == "codecarbon" else get_reporting_integration_callbacks([name])[0]()
    except (RuntimeError, ImportError) as error:
        raise MissingExtraError(f"--report-to {name}", name, REPORTERS[name]) from error


class Meter(TrainerCallback):
    """Energy and CO2 of a run, by codecarbon (table 6 of the paper), measured from checkpoint to checkpoint.

    Work after the last checkpoint before a kill is not counted. What codecarbon cannot measure it takes from the
    machine's type; the grid's carbon goes by CODECARBON_COUNTRY_ISO_CODE (DEU, say), or by where the network sees it.

    Attributes:
        found: kwh, co2_kg, and the country that codecarbon took.
    """

    def __init__(self, state: Path) -> None:
        import codecarbon

        self.codecarbon, self.file, self.tracker = codecarbon, state / ENERGY, None
        self.found: dict[str, Any] = {"kwh": 0.0, "co2_kg": 0.0, "country": ""}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step and self.file.is_file():
            self.found = read_record(self.file, RecipeError, "what codecarbon measured")
        self._start()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()
        write_record(self.file, self.found)
        self._start()

    def _start(self) -> None:
        settings: dict[str, Any] = {"save_to_file": False, "log_level": "error", "allow_multiple_runs": True}
        country = os.environ.get("CODECARBON_COUNTRY_ISO_CODE")
        self.tracker = cast(
            Any,
            self.codecarbon.OfflineEmissionsTracker(country_iso_code=country, **settings)
            if country
            else self.codecarbon.EmissionsTracker(**settings),
        )
        self.tracker.start()

    def stop(self) -> None:
        """Adds what was used since the last start, if it was not added yet."""
        if self.tracker is not None:
            self.tracker.stop()
            data, self.tracker = self.tracker.final_emissions_data, None
            self.found["kwh"] += data.energy_consumed
            self.found["co2_kg"] += data.emissions
            self.found["country"] = data.country_iso_code
