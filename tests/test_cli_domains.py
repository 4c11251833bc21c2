"""`domains fit` and `domains show` on a real folder of entries."""

import json

import pytest


@pytest.fixture(scope="module")
def entries(tmp_path_factory, cli):
    folder = tmp_path_factory.mktemp("cli-domains")
    lines = [
        {"term": f"{kind}{n}", "context": f"a {kind}{n} by the {kind}", "definition": f"some {kind}", "source": "s"}
        for n in range(20)
        for kind in ("river", "stone")
    ]
    file = folder / "in.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert cli("data", "prepare", file, "--out", folder / "entries").exit_code == 0
    return folder / "entries"


def test_fit_then_show(cli, entries, tiny_base, tmp_path):
    out = tmp_path / "domains"
    options = ("--base", tiny_base, "--domains", 2, "--layers", 2, "--out", out, "--cache", tmp_path / "cache")
    made = cli("domains", "fit", entries, *options, "--json", "--set", "pool=mean")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["recipe"]["pool"] == "mean"
    assert (
        sum(record["sizes"]["train"].values()) == json.loads((entries / "entries.json").read_text())["splits"]["train"]
    )
    again = cli("domains", "fit", entries, *options)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert cli("domains", "fit", entries, *options, "--overwrite").exit_code == 0

    shown = cli("domains", "show", out, entries, "--map", tmp_path / "map.png")
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.stdout for name in json.loads((out / "router.json").read_text())["names"])
    assert (tmp_path / "map.png").is_file()
    assert json.loads(cli("domains", "show", out, "--json").stdout)["distance"] == "cosine"


@pytest.mark.parametrize("router", ["projection", "linear"])
def test_fit_learns_the_router_that_is_asked_for(cli, entries, tiny_base, tmp_path, router):
    out = tmp_path / "domains"
    options = ("--base", tiny_base, "--domains", 2, "--layers", 2, "--out", out, "--cache", tmp_path / "cache")
    made = cli("domains", "fit", entries, *options, "--router", router, "--json")
    assert made.exit_code == 0, made.output
    record, written = json.loads(made.stdout), json.loads((out / "router.json").read_text())
    assert record["recipe"]["router"] == written["method"] == router
    assert 0 <= record["router_agreement"] <= 1
    assert cli("domains", "show", out).exit_code == 0
    swept = ("--domains", "2", "--set", f"router={router}", "--method", "balanced", "--json")
    rows = cli(
        "domains", "sweep", entries, *options[:2], *options[4:6], "--out", tmp_path / "sweep", *options[8:], *swept
    )
    assert json.loads(rows.stdout)["rows"][0]["router_agreement"] == record["router_agreement"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "balnced"), "method"),
        (("--set", "domain=3"), "domains"),
        (("--embedder", "bert"), "unknown embedder"),
        (("--recipe", "missing.yaml"), "missing.yaml"),
        (("--base", "tinny"), "no base at 'tinny'"),
        (("--embedder", "hf:./missing"), "no folder ./missing"),
        (("--cache", __file__), "give another --cache"),
        (("--method", "lexical", "--domains", "500"), "500"),
        (("--method", "random", "--set", "top_k=9"), "top_k is 9"),
        (("--method", "random", "--set", "tolerance=-1"), "tolerance is -1"),
        (("--router", "mlp"), "router"),
        (("--router", "linear", "--domains", "1"), "there is but one"),
    ],
)
def test_fit_refuses_in_one_line_and_leaves_nothing(cli, entries, tmp_path, options, message):
    options = options if "--cache" in options else ("--cache", tmp_path / "cache", *options)
    result = cli("domains", "fit", entries, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_sweep_compares_numbers_of_domains(cli, entries, tiny_base, tmp_path):
    options = ("--base", tiny_base, "--cache", tmp_path / "cache", "--layers", 2, "--out", tmp_path / "sweep")
    made = cli("domains", "sweep", entries, *options, "--domains", "4,2,2", "--json")
    assert made.exit_code == 0, made.output
    assert [row["domains"] for row in json.loads(made.stdout)["rows"]] == [2, 4]
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    shown = cli("domains", "sweep", entries, *options, "--domains", "2,3", "--overwrite")
    assert shown.exit_code == 0, shown.output
    assert "silhouette" in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--domains", "2,four"), "write it like 2,4,8"),
        (("--domains", "1,2"), "cannot compare 1 domains"),
        (("--domains", "500"), "cannot compare 500 domains"),
        (("--method", "none"), "choose another --method"),
    ],
)
def test_sweep_refuses_in_one_line_and_leaves_nothing(cli, entries, tiny_base, tmp_path, options, message):
    result = cli("domains", "sweep", entries, "--base", tiny_base, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["entries", "nothing"])
def test_show_refuses_what_is_no_domains_folder(cli, entries, tmp_path, what):
    result = cli("domains", "show", entries if what == "entries" else tmp_path / "nothing")
    assert result.exit_code == 1
    assert "domains folder" in result.stderr
