"""A search on a tiny model: what is drawn, what is run, what a stop leaves, and the front."""

import json
import pathlib

import pytest

from ft_jax import search, train
from ft_jax.errors import UserError
from tests import folders

PARAMETERS = {"kind": ["lora", "dora"], "rank": {"low": 1, "high": 8, "log": True}, "layers": {"subset": 3}}
KERNELS = [["layers/attn/[qv]/kernel", "{kind}(rank={rank})"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 60) as home:
        yield home


def space(**more):
    settings = {"method.kernels": KERNELS, "method.mask": "only_layers(layers='{layers}')", "steps": 3, "batch_size": 8,
                "data.max_length": 16, "log.tensorboard": False, "mesh.data": 1}  # fmt: skip
    return {"parameters": PARAMETERS, "settings": settings} | more


def config(home):
    return f"configs/train.py:model={home / 'bert'},data={home / 'reviews.jsonl'}"


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_ends_as_one_that_was_not(home, monkeypatch):
    whole = search.search(config(home), space(), home / "whole", trials=7, seed=3)
    calls, real = [], train.train

    def stops(cfg, workdir, **options):
        calls.append(workdir)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(cfg, workdir, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", stops)
        search.search(config(home), space(), home / "cut", trials=7, seed=3)
    assert len((home / "cut" / "results.jsonl").read_text().splitlines()) == 3
    assert search.search(config(home), space(), home / "cut", trials=7, seed=3) == whole
    monkeypatch.setattr(train, "train", lambda *a, **k: pytest.fail("nothing is left to run"))
    assert search.search(config(home), space(), home / "cut", trials=7, seed=3) == whole
    assert [row["trial"] for row in whole] == list(range(7))
    assert len({json.dumps(row["parameters"]) for row in whole}) > 4
    for row in whole:
        kind, rank, layers = (row["parameters"][n] for n in ("kind", "rank", "layers"))
        assert row["settings"]["method.kernels"] == [["layers/attn/[qv]/kernel", f"{kind}(rank={rank})"]]
        chosen = 0 if layers == "none" else len(layers.split("-"))
        weights = 2 * (rank * (32 + 32) + (32 if kind == "dora" else 0))
        assert row["size"] == chosen * weights + 32 * 32 + 32 + 2 * 32 + 2, "chosen layers and the task head"
    assert "pickle" not in pathlib.Path(search.__file__).read_text()
    for line in (home / "cut" / "journal.jsonl").read_text().splitlines():
        json.loads(line)
    front = json.loads((home / "whole" / "pareto.json").read_text())["trials"]
    assert front == search.pareto(whole, 1) and 1 <= len(front) <= 7
    page = (home / "whole" / "index.html").read_text()
    assert "Pareto front" in page and "<svg" in page and page.count("<table") == 2


def test_the_front_is_what_no_other_beats():
    rows = [{"trial": i, "size": s, "score": v} for i, (s, v) in enumerate([(5, 0.5), (3, 0.5), (9, 0.9), (9, 0.8), (4, 0.7), (9, 0.9)])]
    assert [r["trial"] for r in search.pareto(rows, 1)] == [1, 4, 2]
    assert [r["trial"] for r in search.pareto(rows, -1)] == [1]
    assert search.pareto([], 1) == []


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_samplers_draw_alike_from_the_same_past(sampler, home):
    """Without runs: a score by formula, twice."""
    seen = []
    for _ in range(2):
        study = search.optuna.create_study(directions=["minimize", "maximize"])
        for number in range(14):
            study.sampler = search.SAMPLERS[sampler](number)
            trial = study.ask(search.distributions(PARAMETERS))
            study.tell(trial, [trial.params["rank"], -trial.params["rank"] + 3 * trial.params["layers.1"]])
        seen.append([t.params for t in study.trials])
    assert seen[0] == seen[1] and len({str(p) for p in seen[0]}) > 7


@pytest.mark.slow
def test_any_method_string_can_be_in_a_space_and_one_at_fault_is_a_row(home, monkeypatch):
    methods = {"parameters": {"method": ["bitfit", "lora(rank=64)"]}, "settings": space()["settings"] | {"method": "{method}"}}
    for key in ("method.kernels", "method.mask"):
        del methods["settings"][key]
    rows = search.search(config(home), methods, home / "methods", trials=5, sampler="random")
    failed = [row for row in rows if "failed" in row]
    assert 0 < len(failed) < 5 and all("rank 64 does not fit" in row["failed"] for row in failed)
    assert {row["parameters"]["method"] for row in rows if "size" in row} == {"bitfit"}
    assert "Failed trials" in (home / "methods" / "index.html").read_text()
    assert len({row["run"] for row in rows}) == 2, "a config is run once"


@pytest.mark.parametrize("wrong, words", [
    ({"parameters": {}}, "two objects that are not empty"),
    ({"params": {}}, "unknown key 'params'; nearest: 'parameters'"),
    ({"parameters": PARAMETERS | {"idle": [1, 2]}}, "no setting names the parameter 'idle'"),
    ({"parameters": PARAMETERS | {"kind": []}}, "parameter 'kind' is \\[\\]; it is a list of choices"),
    ({"parameters": PARAMETERS | {"rank": {"low": 8, "high": 1}}}, "parameter 'rank' is no range"),
    ({"parameters": PARAMETERS | {"rank": {"lo": 8, "high": 1}}}, "parameter 'rank' is"),
    ({"settings": {"method": "{kind}(rank={rnk},x={layers},y={rank})"}}, "names no parameter 'rnk'; nearest: 'rank'"),
    ({"settings": {"method": "{kind}(rank={rank})", "seed": "{layers}"}}, "config key 'seed' is 'none'; it takes a int"),
    ({"settings": {"methods.x": "{kind}{rank}{layers}"}}, "no config group 'methods' in 'methods.x'; nearest: 'method'"),
])  # fmt: skip
def test_a_wrong_space_is_one_line_before_any_run(wrong, words, home):
    with pytest.raises(UserError, match=words) as error:
        search.search(config(home), space(**wrong), home / "wrong", trials=1)
    assert "\n" not in str(error.value) and not (home / "wrong").exists()


def test_what_cannot_be_searched_is_said(home):
    for options, words in (({"sampler": "tpee"}, "no sampler called 'tpee'; nearest: 'tpe'"), ({"trials": 0}, "--trials is 0")):
        with pytest.raises(UserError, match=words):
            search.search(config(home), space(), home / "no", **options)
    with pytest.raises(UserError, match="no config file 'configs/trian.py'; nearest: 'configs/train.py'"):
        search.search("configs/trian.py", space(), home / "no")
    (home / "other").mkdir()
    (home / "other" / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no search"):
        search.search(config(home), space(), home / "other")
    (home / "held").mkdir()
    (home / "held" / "search.json").write_text(json.dumps({"config": config(home), "space": space(), "sampler": "tpe", "seed": 1}))
    with pytest.raises(UserError, match="holds another search: search.seed is 1 there and 0 here"):
        search.search(config(home), space(), home / "held")
