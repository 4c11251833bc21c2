"""What must hold of definitions and losses, whatever the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_system import EXPERTS, SmallSystem

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import LexiconError
from lora_lexicon.inference import batch, engine
from lora_lexicon.inference.batch import Batch, Row
from lora_lexicon.inference.engine import define, losses, settle, text_of, write
from lora_lexicon.inference.sampling import Decoding

WORDS = ["apple", "river", "stone", "bright", "quickly", "hacker", "sorrow", "cloud paper", "Ünïcode", "x"]
PROMPTS = [
    (w, c) for w in WORDS for c in ("", f"the {w} is here", f"a long winter and then {w} came to the garden again")
]
SHORT = Decoding(max_new_tokens=10)
SAMPLED = Decoding(method="sample", max_new_tokens=10, temperature=1.5)
COLD = Decoding(method="sample", max_new_tokens=10, temperature=0.02)


@pytest.fixture(scope="module")
def system(tiny_base: Path) -> Any:
    return SmallSystem(tiny_base)


@pytest.fixture(scope="module")
def alone(system: Any) -> Any:
    """Each prompt's definition from a batch of its own."""
    return {d: [define(system, [p], d)[0] for p in PROMPTS] for d in (SHORT, SAMPLED, COLD)}


def row_of(system: Any, prompt: tuple[str, str], decoding: Decoding) -> Row:
    weights = system.route([prompt]).weights[0]
    return Row(system.encoder.prompt(*prompt), weights, decoding.uniforms(*prompt), decoding)


@given(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_definition_does_not_depend_on_its_neighbours(system: Any, alone: Any, chosen: list[int], size: int) -> None:
    for decoding in (SHORT, SAMPLED, COLD):
        together = define(system, [PROMPTS[i] for i in chosen], decoding, batch_size=size)
        assert [d.text for d in together] == [alone[decoding][i].text for i in chosen]
        assert [(d.domain, d.tokens) for d in together] == [
            (alone[decoding][i].domain, alone[decoding][i].tokens) for i in chosen
        ]


def test_a_choice_that_rounding_could_turn_is_made_again_alone(system: Any) -> None:
    rows = [row_of(system, prompt, Decoding(max_new_tokens=4)) for prompt in PROMPTS[:4]]
    write(system, rows)
    right, rows[1].margin = list(rows[1].written), 0.0
    rows[1].written[0] += 1
    assert [settle(system, row) for row in rows] == [False, True, False, False]
    assert rows[1].written == right
    assert rows[1].alone
    assert not settle(system, rows[1])


def test_greedy_text_is_that_of_transformers_generate(system: Any) -> None:
    base = SmallSystem.__new__(SmallSystem)
    base.__dict__ |= {**system.__dict__, "experts": (), "active": None, "kind": "base"}
    model = type(system.model).from_pretrained(system.model.name_or_path).eval()
    base.model = model
    for prompt, found in zip(PROMPTS, define(base, PROMPTS, SHORT), strict=True):
        ids = torch.tensor([system.encoder.prompt(*prompt)])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        new = out[0, ids.shape[1] :]
        assert found.text == system.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (found.domain, found.similarity, found.margin) == ("base", None, None)


def test_rows_end_at_eos_and_the_others_go_on(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any token may end a definition: rows then end right after its first occurrence, and no other row changes."""

    def written() -> list[list[int]]:
        rows = [row_of(system, prompt, SHORT) for prompt in PROMPTS]
        write(system, rows)
        return [row.written for row in rows]

    free = written()
    end = max({t for row in free for t in row[:-1]}, key=lambda t: sum(t in row[:-1] for row in free))
    monkeypatch.setattr(batch, "end_tokens", lambda _: {end, system.tokenizer.eos_token_id})
    stopped = written()
    assert stopped == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert sum(end in row for row in free) > 0


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_that_come_and_go_at_any_step_do_not_change_the_others(
    system: Any, alone: Any, data: st.DataObject
) -> None:
    """Rows of three decodings join at random steps, the same ones perhaps twice; some leave before they are done."""
    running, seen, gone = Batch(system), [], []
    for _ in range(data.draw(st.integers(1, 4))):
        places = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=0, max_size=5))
        decodings = [data.draw(st.sampled_from([SHORT, SAMPLED, COLD])) for _ in places]
        rows = [row_of(system, PROMPTS[i], decoding) for i, decoding in zip(places, decodings, strict=True)]
        seen += zip(rows, places, strict=True)
        running.join(rows)
        for _ in range(data.draw(st.integers(0, 4))):
            running.step()
        if running.rows and data.draw(st.booleans()):
            gone.append(data.draw(st.sampled_from(running.rows)))
            running.leave(gone[-1:])
            assert gone[-1] not in running.rows
    while running.rows:
        running.step()
    for row, place in seen:
        if row not in gone:
            settle(system, row)
            assert text_of(system, row.written) == alone[row.decoding][place].text


def test_rows_of_one_prompt_read_it_once(system: Any) -> None:
    read = []
    watch = system.model.model.register_forward_hook(lambda *_: read.append(_[-1].last_hidden_state.shape[:2]))
    rows = [row_of(system, PROMPTS[1], SHORT) for _ in range(5)]
    Batch(system).join(rows)
    watch.remove()
    assert read == [(1, len(rows[0].prompt))]
    assert len({row.written[0] for row in rows}) == 1


def test_a_score_is_the_log_probability_of_what_was_written(system: Any) -> None:
    rows = [row_of(system, prompt, d) for prompt in PROMPTS[:6] for d in (SHORT, SAMPLED)]
    write(system, rows, batch_size=5, scored=True)
    for row in rows:
        with torch.no_grad(), system.routed(torch.from_numpy(row.weights)[None]):
            logits = system.model(torch.tensor([row.prompt + row.written])).logits[0, len(row.prompt) - 1 : -1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(row.written)[:, None]).sum().item()
        assert row.score == pytest.approx(expected, abs=1e-4)


def test_a_request_that_is_asked_twice_is_decoded_once(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Row] = []
    join = Batch.join
    monkeypatch.setattr(Batch, "join", lambda self, rows: (joined.extend(rows), join(self, rows)))
    told: list[int] = []
    found = define(system, [*PROMPTS[:3], *PROMPTS[:3]], SHORT, progress=told.append)
    assert found[:3] == found[3:]
    assert len([row for row in joined if not row.alone]) <= 3
    assert sum(told) == 6


def test_seeds_change_samples_and_repeat_them(system: Any) -> None:
    def texts(seed: int) -> list[str]:
        return [d.text for d in define(system, PROMPTS, Decoding("sample", 1.5, max_new_tokens=8, seed=seed))]

    assert texts(1) == texts(1) != texts(2)


def test_the_routing_reaches_the_model_and_the_answer(system: Any) -> None:
    one_each = np.eye(3, dtype=np.float32)
    found = define(system, [PROMPTS[0]] * 3, SHORT, weights=one_each)
    assert [d.domain for d in found] == list(EXPERTS)
    assert len({d.text for d in found}) > 1
    assert define(system, [PROMPTS[0]], SHORT, weights=np.zeros((1, 3), np.float32))[0].domain == "base"


def test_losses_are_those_of_transformers(system: Any, tiny_base: Path) -> None:
    base = SmallSystem(tiny_base, routed=False)
    entries = [Entry(t, c, f"a kind of {t} {'that is bright ' * (i % 4)}", "s") for i, (t, c) in enumerate(PROMPTS)]
    nll, tokens = losses(base, entries, batch_size=7)  # type: ignore[arg-type]
    for entry, total, count in zip(entries, nll, tokens, strict=True):
        ids, start, _ = base.encoder.row(entry.term, entry.context, entry.definition)
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            mean = base.model(torch.tensor([ids]), labels=labels).loss.item()
        assert count == len(ids) - start
        assert total == pytest.approx(mean * count, rel=1e-5)


def test_losses_do_not_depend_on_the_batch_or_the_head_s_portions(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(t, c, f"something {t}", "s") for t, c in PROMPTS]
    whole = losses(system, entries)
    monkeypatch.setattr(engine, "LOGITS_AT_ONCE", 2000)
    parts = losses(system, entries, batch_size=2)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    np.testing.assert_array_equal(whole[1], parts[1])


def test_progress_counts_every_row(system: Any) -> None:
    told: list[int] = []
    define(system, PROMPTS, Decoding(max_new_tokens=1), batch_size=7, progress=told.append)
    assert sum(told) == len(PROMPTS)


def test_nothing_asked_is_nothing_answered(system: Any) -> None:
    assert define(system, []) == []
    assert [len(part) for part in losses(system, [])] == [0, 0]


def test_an_empty_term_and_foreign_weights_are_refused(system: Any) -> None:
    with pytest.raises(LexiconError, match="term is empty"):
        define(system, [("apple", ""), (" ", "a context")])
    with pytest.raises(LexiconError, match=r"\(1, 2\).*\(1, 3\)"):
        define(system, [("apple", "")], weights=np.ones((1, 2), np.float32))
