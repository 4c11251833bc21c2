"""evaluation/fidelity.py against torch's own KL divergence, and `compose compare` on real models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import make_lora
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.store import EntriesWriter
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.fidelity import Reference

SPLITS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(recorded=SPLITS, cuts=st.integers(1, 4), seed=st.integers(0, 99))
def test_divergence_is_torchs_however_the_tokens_come(
    tmp_path: Path, recorded: list[int], cuts: int, seed: int
) -> None:
    torch.manual_seed(seed)
    theirs, ours = torch.randn(2, sum(recorded), 7)
    with Reference(tmp_path / "reference") as reference:
        for part in theirs.split(recorded):
            reference.record(part)
        itself, other = reference.compare(), reference.compare()
        for part in theirs.split(cuts):
            itself.observe(part)
        for part in ours.split(cuts):
            other.observe(part)
        expected = torch.nn.functional.kl_div(
            ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True
        )
        assert itself.summary() == {"kl": 0.0, "agreement": 1.0}
        assert other.summary()["kl"] == pytest.approx(float(expected), abs=1e-6)
        assert other.summary()["agreement"] == (theirs.argmax(1) == ours.argmax(1)).double().mean()
    assert not list(tmp_path.iterdir())


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    with Reference(tmp_path / "reference") as reference:
        reference.record(torch.randn(3, 7))
        for logits in (torch.randn(3, 8), torch.randn(4, 7)):
            with pytest.raises(DataError, match="one tokenizer"):
                reference.compare().observe(logits)
        with pytest.raises(DataError, match="0 tokens were compared, the reference has 3"):
            reference.compare().summary()


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    writer = EntriesWriter(folder)
    for term in ("apple", "river", "stone"):
        writer.add("test", Entry(term, f"the {term} is here", f"a kind of {term}", "test"))
    writer.finish({})
    return folder


def test_compare_measures_each_form_against_the_reference(
    cli: Callable[..., Any], tiny_base: Path, entries: Path, tmp_path: Path
) -> None:
    expert = make_lora(tiny_base, tmp_path / "mind", seed=1)
    arguments = ["compose", "compare", str(tiny_base), str(expert), "--data", str(entries), "--reference", str(expert)]
    done = cli(*arguments, "--quantize", "nf4", "--max-tokens", "4", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    systems = {system["name"]: system for system in report["systems"]}
    base = tiny_base.name
    assert list(systems) == ["mind", base, "mind-nf4", f"{base}-nf4"]
    assert (systems["mind"]["kl"], systems["mind"]["agreement"]) == (0, 1)
    assert systems[base]["kl"] > systems["mind-nf4"]["kl"] > 0
    assert systems["mind-nf4"]["memory_megabytes"] < systems["mind"]["memory_megabytes"]
    assert report["reference"] == str(expert)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == report
    assert (tmp_path / "out" / "footprint-fidelity.png").read_bytes().startswith(b"\x89PNG")
