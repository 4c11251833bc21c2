"""`lora-lexicon score`: a file in, figures out, and one line for whatever is wrong with the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import make_bert

from lora_lexicon.evaluation.metrics import bleu, rouge_l

ROWS = [
    {"term": "bank", "context": "by the bank", "prediction": "a slope by a river", "references": ["a slope"]},
    {"term": "bank", "context": "in the bank", "prediction": "a house", "references": ["a house of money"]},
    {"term": "tree", "context": "", "prediction": "a tall plant", "references": ["a plant", "a tall plant"]},
    {"term": "stone", "context": "a stone", "prediction": "a plant", "references": ["a hard piece of rock"]},
]
LABELLED = [{**row, "domain": domain} for row, domain in zip(ROWS, "xyxy", strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def scored(cli: Any):
    def run(*words: object) -> dict[str, Any]:
        result = cli("score", *words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_a_file_has_figures_signatures_and_intervals(scored: Any, tmp_path: Path) -> None:
    found = scored(write(tmp_path / "p.jsonl", ROWS), "--protocol", "given")
    assert (found["rows"], found["headwords"]) == (4, 3)
    for name, metric in (("bleu", bleu), ("rouge-l", rouge_l)):
        of = found["scores"][name]
        assert of["value"] == pytest.approx(np.mean([metric(row["prediction"], row["references"]) for row in ROWS]))
        assert of["interval"][0] <= of["value"] <= of["interval"][1]
        assert "|protocol:given|" in of["signature"]
        assert "refs:1-2,mean:1.25" in of["signature"]


def test_protocols_widen_the_references(scored: Any, tmp_path: Path) -> None:
    rows = [{**row, "definition": row["references"][-1]} for row in ROWS]
    file = write(tmp_path / "p.jsonl", rows)
    more = write(tmp_path / "more.jsonl", [{"term": "stone", "context": "", "definition": "a plant"}])

    def rouge(*words: object) -> float:
        return scored(file, "--metric", "rouge-l", *words)["scores"]["rouge-l"]["value"]

    one, many = rouge("--protocol", "one-to-one"), rouge("--protocol", "one-to-many")
    term = rouge("--protocol", "one-to-many-term", "--pool", more)
    assert one == pytest.approx(np.mean([rouge_l(row["prediction"], [row["definition"]]) for row in rows]))
    assert one <= many < term
    assert term > rouge("--protocol", "one-to-many-term")


def test_domains_are_told_apart(scored: Any, tmp_path: Path) -> None:
    found = scored(write(tmp_path / "p.jsonl", LABELLED), "--by", "domain", "--metric", "bleu,distinct")
    by = found["by"]["domain"]
    assert list(by) == ["x", "y"]
    parts = [by[name]["scores"]["bleu"]["value"] for name in by]
    assert np.mean(parts) == pytest.approx(found["scores"]["bleu"]["value"])
    assert parts[0] == pytest.approx(np.mean([bleu(r["prediction"], r["references"]) for r in ROWS[::2]]))


def test_seeds_have_a_mean_and_systems_are_tested(scored: Any, tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{seed}.jsonl", [{**row, "prediction": f"{row['prediction']} {seed}"} for row in ROWS])
        for seed in ("a", "b", "plant")
    ]
    poor = write(tmp_path / "poor.jsonl", [{**row, "prediction": "x"} for row in ROWS])
    found = scored(*files, *(word for _ in files for word in ("--against", poor)), "--metric", "bleu,chrf")
    for name, of in found["scores"].items():
        each = [scored(file, "--metric", name)["scores"][name]["value"] for file in files]
        assert of["runs"] == pytest.approx(each)
        assert of["value"] == pytest.approx(np.mean(each))
        assert of["deviation"] == pytest.approx(np.std(each, ddof=1))
    assert [row["metric"] for row in found["against"]] == ["bleu", "chrf"]
    for row in found["against"]:
        assert row["difference"] > 0
        for test in ("p_bootstrap", "p_randomisation"):
            assert row[test] <= row[f"{test}_holm"] <= min(1, 2 * row[test])


def test_an_encoder_scores(scored: Any, tmp_path: Path) -> None:
    bert = make_bert(tmp_path / "bert")
    names = "bertscore,bertscore-rescaled,moverscore,mauve"
    found = scored(write(tmp_path / "p.jsonl", ROWS), "--metric", names, "--encoder", bert, "--layer", 1)["scores"]
    assert list(found) == names.split(",")
    assert all("|layer:1|" in of["signature"] for of in found.values())
    assert found["bertscore"]["value"] > found["bertscore-rescaled"]["value"]
    assert (found["mauve"]["interval"], found["bertscore"]["interval"] is None) == (None, False)


def test_references_in_a_file_of_their_own(cli: Any, scored: Any, tmp_path: Path) -> None:
    gold = write(tmp_path / "gold.jsonl", [{k: v for k, v in row.items() if k != "prediction"} for row in ROWS])
    bare = [{"prediction": row["prediction"]} for row in ROWS]
    whole = scored(write(tmp_path / "p.jsonl", ROWS))["scores"]
    assert scored(write(tmp_path / "bare.jsonl", bare), "--references", gold)["scores"] == whole
    for rows, said in (
        (bare[:3], "ends after 3 rows, .* has 4: no prediction for .*gold.jsonl:4"),
        ([*bare, bare[0]], "long.jsonl:5: no row of .*gold.jsonl is left"),
        ([bare[0], ROWS[0], *bare[2:]], "long.jsonl:2: another context than .*gold.jsonl:2"),
    ):
        refused(cli("score", write(tmp_path / "long.jsonl", rows), "--references", gold), said)


def refused(result: Any, said: str) -> None:
    """One line, exit code 1, nothing on standard output."""
    import re

    assert (result.exit_code, result.stdout) == (1, ""), result.stderr
    assert result.stderr.count("\n") == 1
    assert re.search(said, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"term": "a", "references": ["b"]}', "p.jsonl:2: no column 'prediction', only references, term"),
        (b'{"prediction": "a", "references": ["b"]}', "p.jsonl:2: no column 'term'"),
        (b'{"term": "a", "prediction": "b"}', "p.jsonl:2: neither 'references' nor 'definition'"),
        (b'{"term": "a", "prediction": " ", "definition": "b"}', "p.jsonl:2: the prediction is empty: add --allow-em"),
        (b'{"term": "a", "prediction": "b", "definition": ""}', "p.jsonl:2: 'definition' is empty"),
        (b'{"term": "a", "prediction": 3, "definition": "b"}', "p.jsonl:2: 'prediction' is not a text, but int"),
        (b'{"term": "a", "prediction": "b", "references": "b"}', "p.jsonl:2: 'references' is not a list"),
        (b'{"term": "a", "prediction": "b", "references": []}', "p.jsonl:2: 'references' is not a list"),
        (b'{"term": "a", "prediction": "b", "references": [null]}', "p.jsonl:2: 'references' is not a text, but None"),
        (b'{"term": "a", "prediction": "\\ud800", "definition": "b"}', "p.jsonl:2: 'prediction' holds half of a char"),
        (b"[1]", "p.jsonl:2: list, not an object|p.jsonl:2: not an object, but list"),
        (b'{"term": ', "p.jsonl:2: not valid JSON"),
        (b"\xef\xbb\xbf{}", "p.jsonl:2: a byte order mark within the file"),
        (b'{"term": "\xe9"}', r"p.jsonl:2: not UTF-8 \(byte 10 of the line\)"),
        (b'{"term": "' + b"x" * 2**20 + b'"}', "p.jsonl:2: longer than 1,048,576 bytes"),
    ],
)
def test_faults_are_named_with_the_line(cli: Any, tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "p.jsonl"
    first = json.dumps(ROWS[0]).encode()
    file.write_bytes(b"\xef\xbb\xbf" + first + b"\n" + line + b"\n" + first + b"\n")  # a mark at the start is nothing
    refused(cli("score", file, "--json"), said)


def test_other_faults_are_said(cli: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", ROWS)
    (tmp_path / "none.jsonl").write_text("\n")
    other = write(tmp_path / "other.jsonl", [*ROWS[:2], {**ROWS[2], "term": "trees"}, ROWS[3]])
    refused(cli("score", tmp_path / "none.jsonl"), "holds no row")
    refused(cli("score", tmp_path / "absent.jsonl"), "does not exist")
    refused(cli("score", file, "--by", "domain"), "p.jsonl:1: no column 'domain', which --by domain reads")
    refused(cli("score", file, "--protocol", "one-to-one"), "p.jsonl: line 3: 2 references")
    refused(cli("score", file, "--metric", "blue"), "did you mean bleu")
    refused(cli("score", file, "--metric", "mauve"), "add --encoder")
    refused(cli("score", file, "--against", other), "other.jsonl:3: another term, context than .*p.jsonl:3")
    refused(
        cli("score", file, "--metric", "bertscore", "--encoder", tmp_path / "no"), "the encoder .* cannot be loaded"
    )
    for words in (
        ["--layer", 1],
        ["--pool", file],
        [file, file, "--against", file],
        ["--against", file, "--samples", 0],
    ):
        assert cli("score", file, *words).exit_code == 2


def test_empty_predictions_score_0_where_they_are_allowed(scored: Any, tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "prediction": ""}]
    found = scored(write(tmp_path / "p.jsonl", rows), "--allow-empty")
    assert found["empty"] == [1]
    assert found["scores"]["bleu"]["value"] == pytest.approx(bleu("a slope by a river", ["a slope"]) / 2)


def test_a_person_gets_tables_and_signatures(cli: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", LABELLED)
    result = cli("score", file, file, "--by", "domain", "--against", file, "--against", file)
    assert result.exit_code == 0, result.stderr
    for said in ("deviation", "by domain", "Differences"):
        assert said in result.stdout
    assert "bleu: bleu|moses-sentence-bleu|" in result.stderr
