"""Every metric by name: libraries and recorded originals as oracles, then what must be true of any of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk.translate.meteor_score
import nltk.translate.nist_score
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import make_bert

from lora_lexicon.data.overlap import words
from lora_lexicon.data.predictions import Prediction
from lora_lexicon.errors import DataError, MissingExtraError
from lora_lexicon.evaluation import bootstrap, library, scores
from lora_lexicon.evaluation.encoded import Encoder, bertscore, bertscore_baseline, mauve, moverscore
from lora_lexicon.evaluation.metrics import bleu, rouge_l
from lora_lexicon.evaluation.protocol import counted, references_of
from lora_lexicon.evaluation.registry import METRICS, check, names_of
from lora_lexicon.evaluation.scores import difference, figure, score

TEXT = st.lists(st.sampled_from(["a", "kind", "of", "river", "rivers", "is", "bright."]), min_size=1, max_size=8)
ROWS = st.lists(
    st.tuples(TEXT.map(" ".join), st.lists(TEXT.map(" ".join), min_size=1, max_size=3, unique=True).map(tuple)),
    min_size=1,
    max_size=6,
)
PLAIN = [name for name, metric in METRICS.items() if not metric.encoder and name != "meteor"]
GUESSES = ["a kind of river", "green stones, in winter.", "a", "the bright garden"]
DEFINITIONS = [
    ("the river that is bright",),
    ("a stone in the garden",),
    ("gardener is green",),
    ("the bright garden",),
]
PAIRS = list(zip(GUESSES, DEFINITIONS, strict=True))


def value(name: str, rows: list[tuple[str, tuple[str, ...]]], **options: Any) -> float | None:
    """The figure of rows that are a group each."""
    run = score([guess for guess, _ in rows], [wanted for _, wanted in rows], [name], protocol="given", **options)
    return figure([run], name, np.arange(len(rows)), samples=0)["value"]


@given(ROWS)
def test_figures_are_those_of_the_libraries(rows: list[tuple[str, tuple[str, ...]]]) -> None:
    guesses, split = [g for g, _ in rows], [[r.split() for r in wanted] for _, wanted in rows]
    streams = [[w[i] if i < len(w) else None for _, w in rows] for i in range(max(len(w) for _, w in rows))]
    assert value("sacrebleu", rows) == pytest.approx(sacrebleu.corpus_bleu(guesses, streams, force=True).score)
    assert value("chrf", rows) == pytest.approx(sacrebleu.corpus_chrf(guesses, streams).score)
    each = [sacrebleu.sentence_bleu(g, list(w)).score for g, w in rows]
    assert value("sacrebleu-sentence", rows) == pytest.approx(np.mean(each))
    if max(map(len, map(str.split, guesses))) >= 5:  # else NLTK divides by 0
        found = nltk.translate.nist_score.corpus_nist(split, [g.split() for g in guesses])
        assert value("nist", rows) == pytest.approx(found)
    assert value("bleu", rows) == pytest.approx(np.mean([bleu(*row) for row in rows]))
    assert value("rouge-l", rows) == pytest.approx(np.mean([rouge_l(*row) for row in rows]))


@given(ROWS)
def test_any_rows_have_figures_in_bounds_and_the_order_of_references_is_nothing(
    rows: list[tuple[str, tuple[str, ...]]],
) -> None:
    turned = [(guess, wanted[::-1]) for guess, wanted in rows]
    for name in PLAIN:
        found = value(name, rows)
        if name.startswith("distinct") and found is None:
            continue  # no prediction has two words
        assert found is not None
        if not name.startswith(("length", "nist")):
            assert -1e-9 <= found <= 100 + 1e-9, name
        if name not in ("chrf", "nist"):  # which take the counts of the first of equally good references
            assert found == pytest.approx(value(name, turned)), name


@given(ROWS)
def test_the_best_reference_is_the_best_of_each_alone(rows: list[tuple[str, tuple[str, ...]]]) -> None:
    for name in ("bleu", "nltk-bleu-1"):
        alone = [[value(name, [(guess, (reference,))]) or 0 for reference in wanted] for guess, wanted in rows]
        assert value(name, rows, combine="best") == pytest.approx(np.mean(list(map(max, alone))))


def test_figures_by_hand() -> None:
    rows = [("a b", ("a b",)), ("a b", ("A  B!",)), ("a", ("c d",))]
    assert value("exact", rows) == pytest.approx(200 / 3)
    assert value("distinct", rows) == pytest.approx(50)  # "a b" twice
    assert value("distinct-1", rows) == pytest.approx(40)
    assert value("length", rows) == pytest.approx(5 / 3)
    assert value("length-ratio", rows) == pytest.approx(100 * 5 / 6)
    assert value("sacrebleu", rows[:1]) == 0  # two words have no trigram
    assert value("sacrebleu-sentence", rows[:1]) == pytest.approx(100)
    assert value("distinct", [("a", ("a",))]) is None


def test_zeros_are_dropped_under_their_own_name() -> None:
    rows = [("river", ("river",)), ("stone", ("x",))]
    assert value("rouge-l", rows) == 50
    assert value("rouge-l", rows, drop_zeros=True) == 100
    assert value("rouge-l", rows[1:], drop_zeros=True) is None
    run = score(["stone"], [("x",)], ["rouge-l"], drop_zeros=True)
    assert run.signatures["rouge-l"].endswith("|refs:1|zeros:dropped")
    with pytest.raises(DataError, match="which sacrebleu is not"):
        value("sacrebleu", rows, drop_zeros=True)


class Synonyms:
    """As much of NLTK's WordNet as METEOR asks for: stone and rock are synonyms."""

    def synsets(self, word: str) -> list[Any]:
        lemmas = [SimpleNamespace(name=lambda lemma=lemma: lemma) for lemma in ("stone", "rock")]
        return [SimpleNamespace(lemmas=lambda: lemmas)] if word in ("stone", "rock") else []

    def ensure_loaded(self) -> None: ...

    def get_version(self) -> str:
        return "3.0"


class Absent(Synonyms):
    def ensure_loaded(self) -> None:
        raise LookupError("Resource wordnet not found.")


def test_meteor_is_nltks_and_its_data_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    guess, wanted = "Bright rivers of stone.", "a river of bright rock"
    theirs: Any = nltk.translate.meteor_score.meteor_score
    words_of = ([words(wanted)], words(guess))
    library.wordnet.cache_clear()
    monkeypatch.setattr("nltk.corpus.wordnet", Absent())
    with pytest.raises(DataError, match=r"nltk\.downloader wordnet, or ask for meteor-stem"):
        check(["meteor"], encoder=False)
    without = value("meteor-stem", [(guess, (wanted,))])
    monkeypatch.setattr("nltk.corpus.wordnet", Synonyms())
    found = value("meteor", [(guess, (wanted,))])
    assert found == pytest.approx(100 * theirs(*words_of, wordnet=Synonyms()))
    assert without is not None
    assert found > without > 0
    assert "exact,porter,wordnet-3.0|" in METRICS["meteor"].signature()
    library.wordnet.cache_clear()


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    library._sacrebleu.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(MissingExtraError, match=r"lora-lexicon\[scores\]"):
        check(["bleu", "chrf"], encoder=False)
    library._sacrebleu.cache_clear()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(str(make_bert(tmp_path_factory.mktemp("bert"))))


def test_bertscore_and_moverscore_are_the_originals(encoder: Encoder) -> None:
    """Recorded: bert-score 0.3.13, and the arithmetic of moverscore_v2.py with pyemd 1.1.0, on this BERT."""
    assert bertscore(encoder, PAIRS) == pytest.approx([74.26335, 80.302345, 64.1241, 100], abs=1e-3)
    assert moverscore(encoder, PAIRS) == pytest.approx([21.323195, 29.015163, 12.279886, 88.907373], abs=1e-3)


def test_encoded_scores_do_not_depend_on_other_rows_and_take_the_best_reference(encoder: Encoder) -> None:
    alone = [float(bertscore(encoder, [pair])[0]) for pair in PAIRS]
    assert bertscore(encoder, PAIRS) == pytest.approx(alone, abs=1e-4)
    both = [(GUESSES[0], (*DEFINITIONS[0], *DEFINITIONS[1]))]
    apart = bertscore(encoder, [(GUESSES[0], DEFINITIONS[0]), (GUESSES[0], DEFINITIONS[1])])
    assert bertscore(encoder, both)[0] == pytest.approx(apart.max(), abs=1e-4)
    assert bertscore(encoder, [("", ("a river",))]).tolist() == [0]
    assert moverscore(encoder, [("a river", (", .",)), ("green", ("green",))])[0] == 0


def test_rescaled_bertscore_is_0_for_unrelated_definitions_and_100_for_equal_ones(
    encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "baseline.tsv").write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.2,0.2\n2,0.5,0.5,0.25\n")
    folder = make_bert(tmp_path / "bert")
    told = Encoder(str(folder), baseline=tmp_path / "baseline.tsv")
    for which, baseline in ((encoder, bertscore_baseline(encoder, PAIRS)), (told, 0.25)):
        run = score(GUESSES, DEFINITIONS, ["bertscore", "bertscore-rescaled"], encoder=which)
        raw, rescaled = (run.statistics[name][:, 0] for name in run.statistics)
        assert rescaled == pytest.approx(100 * (raw / 100 - baseline) / (1 - baseline))
        assert rescaled[3] == pytest.approx(100, abs=1e-3)
    assert "rescaled:0.250000|" in run.signatures["bertscore-rescaled"]
    (tmp_path / "short.tsv").write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n")
    with pytest.raises(DataError, match="no baseline of layer 1"):
        Encoder(str(folder), 1, tmp_path / "short.tsv")
    with pytest.raises(DataError, match="layers 0 to 2"):
        Encoder(str(folder), 3)
    with pytest.raises(DataError, match="one text"):
        bertscore_baseline(encoder, [("a", ("b",))])


def test_mauve_is_high_for_the_same_texts_and_low_for_others(encoder: Encoder) -> None:
    texts = [f"the {a} {b} {c}" for a in ("green", "bright") for b in ("river", "stone") for c in ("winter", "garden")]
    same = mauve(encoder, [(text, (text,)) for text in texts])
    other = mauve(encoder, [(", . , .", (text,)) for text in texts])
    assert other < 50 < same


def test_protocols() -> None:
    rows = [
        Prediction(1, "bank", "river", "", ("a slope",), "a slope"),
        Prediction(2, "bank", "river", "", ("a side", "a slope"), "a side"),
        Prediction(3, "bank", "money", "", ("a house",), "a house"),
        Prediction(4, "tree", "", "", ("a plant",), "a plant"),
    ]
    pool = [Prediction(1, "tree", "shoe", "", ("a form",), "a form")]
    assert references_of(rows, "given")[1] == ("a side", "a slope")
    assert references_of(rows, "one-to-one") == [("a slope",), ("a side",), ("a house",), ("a plant",)]
    assert references_of(rows, "one-to-many", pool) == [("a slope", "a side")] * 2 + [("a house",), ("a plant",)]
    term = references_of(rows, "one-to-many-term", pool)
    assert term == [("a slope", "a side", "a house")] * 3 + [("a plant", "a form")]
    assert counted(term) == "2-3,mean:2.75"
    assert counted(references_of(rows, "one-to-one")) == "1"
    with pytest.raises(DataError, match="line 5: 2 references"):
        references_of([Prediction(5, "a", "", "", ("b", "c"))], "one-to-one")


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 7)
    told: dict[str, int] = {}
    alone, shared = (
        score(GUESSES * 10, DEFINITIONS * 10, ["bleu", "chrf"], workers=count,
              progress=lambda name, rows: told.update({name: told.get(name, 0) + rows}))
        for count in (1, 2)
    )  # fmt: skip
    for name in ("bleu", "chrf"):
        assert (alone.statistics[name] == shared.statistics[name]).all()
        assert told[name] == 80


def test_runs_have_a_mean_and_a_deviation_and_an_interval_around_it() -> None:
    runs = [score([guess] * 4, DEFINITIONS, ["rouge-l", "distinct"]) for guess in ("the bright", "a", "green stone")]
    found = figure(runs, "rouge-l", np.array([0, 0, 1, 2]))
    each = [figure([run], "rouge-l", np.arange(4))["value"] for run in runs]
    assert found["runs"] == pytest.approx(each)
    assert found["value"] == pytest.approx(np.mean(each))
    assert found["deviation"] == pytest.approx(np.std(each, ddof=1))
    low, high = found["interval"]
    assert low <= found["value"] <= high
    assert figure(runs, "distinct", np.arange(4))["interval"] is None
    part = figure(runs[:1], "rouge-l", np.arange(4), rows=np.array([3]))
    assert part["value"] == pytest.approx(rouge_l("the bright", DEFINITIONS[3]))


def test_a_difference_is_that_of_the_figures_and_tested_twice() -> None:
    names = ["bleu", "sacrebleu", "distinct"]
    good = score([d[0] for d in DEFINITIONS] * 10, DEFINITIONS * 10, names)
    poor = score(["x y z"] * 40, DEFINITIONS * 10, names)
    member = np.arange(40)
    for name in names[:2]:
        found = difference([good], [poor], name, member, samples=500)
        assert found is not None
        apart = [figure([run], name, member, samples=0)["value"] for run in (good, poor)]
        assert found["difference"] == pytest.approx(apart[0] - apart[1])
        assert max(found["p_bootstrap"], found["p_randomisation"]) <= 2 / 500
        equal = difference([good], [good], name, member, samples=500)
        assert equal is not None
        assert (equal["difference"], equal["p_bootstrap"], equal["p_randomisation"]) == (0, 1, 1)
    assert difference([good], [poor], "distinct", member) is None
    with pytest.raises(DataError, match="as many of both"):
        difference([good, good], [poor], "bleu", member)


def test_randomisation_counts_every_way_to_swap() -> None:
    """Three groups that differ by 1: two of the eight ways to swap differ as much."""

    def mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x[:, 0] / x[:, 1] - y[:, 0] / y[:, 1]

    a, b = np.array([[1.0, 1]] * 3), np.array([[0.0, 1]] * 3)
    assert bootstrap.randomised(a, b, mean, samples=20_000) == pytest.approx(2 / 8, abs=0.02)


def test_holm() -> None:
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bootstrap.holm([0.6, 0.9]) == [1, 1]
    assert bootstrap.holm([]) == []


def test_names_are_checked_and_help_is_near() -> None:
    assert names_of(["bleu,chrf", "bleu"]) == ["bleu", "chrf"]
    with pytest.raises(DataError, match="did you mean rouge-l"):
        names_of(["rouge"])
    with pytest.raises(DataError, match="add --encoder"):
        check(["mauve"], encoder=False)
    with pytest.raises(DataError, match="leave it out"):
        check(["bleu"], encoder=True)
    with pytest.raises(DataError, match="take sacrebleu-sentence"):
        check(["sacrebleu"], encoder=False, combine="best")
