"""`lora-lexicon demo`, whole, on a small base and a few rows of the data that ships."""

import json
import math

import pytest

KEYS = {
    "name",
    "trained_parameters",
    "ship_megabytes",
    "memory_megabytes",
    "loss",
    "bleu",
    "rouge_l",
    "tokens_per_second",
}


@pytest.fixture(scope="module")
def demo(cli, six_layers, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    made = cli("demo", "--base", six_layers, "--limit", 120, "--out", out, "--json")
    assert made.exit_code == 0, made.stderr
    return out, json.loads(made.stdout), made.stderr


def test_results_hold_every_system_and_comparison(demo):
    out, printed, _ = demo
    results = json.loads((out / "results.json").read_text())
    assert results == printed
    systems = {system["name"]: system for system in results["systems"]}
    assert {"base", "dense adapter", "mixture of adapters", "mixture, random routing", "merged MoE"} <= set(systems)
    for system in systems.values():
        assert set(system) >= KEYS
        assert all(math.isfinite(system[key]) for key in KEYS - {"name"})
    assert systems["base"]["trained_parameters"] == 0
    assert systems["dense adapter"]["trained_parameters"] * 4 == systems["mixture of adapters"]["trained_parameters"]
    pairs = {(each["a"], each["b"]) for each in results["comparisons"]}
    assert {("mixture of adapters", other) for other in ("base", "dense adapter", "mixture, random routing")} <= pairs
    for each in results["comparisons"]:
        assert each["low"] <= each["difference"] <= each["high"]
        assert 0 < each["p"] <= 1


def test_the_comparisons_are_those_of_the_systems(demo):
    results = demo[1]
    loss = {system["name"]: system["loss"] for system in results["systems"]}
    for each in results["comparisons"]:
        if each["metric"] == "loss" and each["a"] in loss and each["b"] in loss:
            assert each["difference"] == pytest.approx(loss[each["a"]] - loss[each["b"]])


def test_a_fifth_domain_joins_and_the_others_stay_as_they_were(demo):
    results = demo[1]
    assert results["hot_add"]["unchanged"] == results["hot_add"]["kept"]
    assert len(results["domains"]) == 4
    assert (
        sum(results["domains"].values())
        == json.loads((demo[0] / "entries" / "entries.json").read_text())["splits"]["train"]
    )


def test_pictures_and_artefacts_lie_in_the_folder(demo, cli):
    out = demo[0]
    for name in ("domains.png", "footprint-fidelity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert cli("pack", "verify", out / "mixture-5").exit_code == 0
    assert not list(out.rglob(".*.training"))


def test_going_on_keeps_what_is_there_and_other_settings_are_refused(demo, cli, six_layers):
    out, first, _ = demo
    again = cli("demo", "--base", six_layers, "--limit", 120, "--out", out, "--json")
    assert again.exit_code == 0, again.stderr
    assert "Training" not in again.stderr
    losses = [[system["loss"] for system in run["systems"]] for run in (first, json.loads(again.stdout))]
    assert losses[0] == pytest.approx(losses[1])
    other = cli("demo", "--base", six_layers, "--limit", 121, "--out", out)
    assert (other.exit_code, other.stderr.count("\n")) == (1, 1)
    assert "--overwrite" in other.stderr
