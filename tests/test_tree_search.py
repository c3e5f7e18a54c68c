"""A search down a tree of places to train: what is visited, what a stop leaves, what the scores are, which trees are refused."""

import json

import numpy as np
import pytest

from ft_jax import search, train, tree, tree_search
from ft_jax.analysis import forgetting
from ft_jax.errors import UserError
from ft_jax.io import files, hf, runs, tokenizer
from tests import folders

BRANCHES = {
    "layers": {"low": {"low": 0.0, "high": 0.6, "then": "module"}, "top": {"low": 0.6, "high": 1.0, "then": "module"}},
    "module": {"MHA": {"modules": "attn", "then": "half"}, "FFN": {"modules": "mlp", "then": "half"}},
    "half": {"lower": {"high": 0.3}, "upper": {"low": 0.65, "high": 1.0}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 60) as home:
        folders.make_model_folder(home / "llama", "llama", "lm")
        folders.write_rows(home / "general.jsonl", folders.recited(np.random.default_rng(1), 24))
        yield home


def made(home, **more):
    settings = {"method.mask": "cofitune(modules={modules},low={low},high={high})", "steps": 3, "batch_size": 8, "data.max_length": 16,
                "eval.batch_size": 8, "log.tensorboard": False, "mesh.data": 1}  # fmt: skip
    general = {"source": str(home / "general.jsonl"), "splits": {"validation": str(home / "general.jsonl")}, "max_length": 12, "eval_limit": 16}
    return {"settings": settings, "parameters": {"modules": "attn+mlp"}, "versatility": general, "start": "layers", "branches": BRANCHES} | more


def config(home, more=""):
    return f"configs/train.py:model={home / 'bert'},data={home / 'reviews.jsonl'}{more}"


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_scores_are_what_was_learnt_and_forgotten(home, monkeypatch):
    given = made(home, branches={"layers": BRANCHES["layers"], "module": {"FFN": {"modules": "mlp"}}}, weight=0.5)
    calls, real = [], train.train

    def stops(cfg, workdir, **options):
        calls.append(options["label"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(cfg, workdir, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", stops)
        tree_search.search_tree(config(home), given, home / "cut")
    begun = [json.loads(line) for line in (home / "cut" / "results.jsonl").read_text().splitlines()]
    assert [row["node"] for row in begun] == ["low", "top"]
    rows = tree_search.search_tree(config(home), given, home / "cut")
    assert [{k: v for k, v in row.items() if k != "kept"} for row in rows[:2]] == [{k: v for k, v in b.items() if k != "kept"} for b in begun]
    monkeypatch.setattr(train, "make_step", lambda *_: pytest.fail("nothing is left to run"))
    assert tree_search.search_tree(config(home), given, home / "cut") == rows
    best = max(rows[:2], key=lambda r: r["score"])["node"]
    assert [row["node"] for row in rows] == ["low", "top", f"{best}/FFN"] == calls

    layers = {"low": 2, "top": 1}
    matrices = {"attn+mlp": 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32, "mlp": 2 * 32 * 48 + 48 + 32}
    model, base = hf.load(home / "bert", head="pooled")
    tok = tokenizer.load(home / "bert")
    texts = [json.loads(line)["text"] for line in (home / "general.jsonl").read_text().splitlines()]
    kept = [texts[i] for i in np.sort(np.random.RandomState(0).permutation(24)[:16])]
    pairs = forgetting.pair_batches(kept, lambda t: tok.encode_batch(t, max_length=12), batch_size=8, length=12, pad_id=tok.pad_id)
    before = forgetting.contrastive_loss(model.apply, base, pairs)["loss"]
    for row in rows:
        assert row["size"] == layers[row["node"].split("/")[0]] * matrices[row["values"]["modules"]] + 32 * 32 + 32 + 2 * 32 + 2
        params = runs.load_run(home / "cut" / row["run"])[1]
        after = forgetting.contrastive_loss(model.apply, params, pairs)["loss"]
        held = files.read_json(home / "cut" / row["run"] / "DONE")
        assert row["forgetting"] == pytest.approx(after - before, abs=1e-6) and row["speciality"] == held["best_accuracy"]
        assert row["score"] == pytest.approx(row["speciality"] - 0.5 * row["forgetting"])
        moved = {p.split("/")[2] for p, x in tree.flatten(params).items() if p.startswith("layers/") and (x != tree.flatten(base)[p]).any()}
        assert moved == {"up", "down"} | (set() if row["values"]["modules"] == "mlp" else {"q", "k", "v", "out"})
    chosen = files.read_json(home / "cut" / "chosen.json")
    top = max(rows, key=lambda r: r["score"])["node"]
    assert chosen["path"][-1] == top and chosen["base_loss"] == pytest.approx(before, abs=1e-6)
    page = (home / "cut" / "index.html").read_text()
    assert all(row["node"] in page for row in rows) and f"<b>{top}</b>" in page


def visits(home, monkeypatch, scores, **more):
    """The rows of a search whose runs give ``scores`` by the node's name, 0 where it has none, and fail where it is None."""

    def visit(node, *_):
        value = scores.get(node["node"], 0.0)
        return {"node": node["node"], "failed": "diverged"} if value is None else {"node": node["node"], "score": value}

    monkeypatch.setattr(tree_search, "_dry", lambda *_: "accuracy")
    monkeypatch.setattr(tree_search, "general", lambda *_: (lambda params: 1.0, {}))
    monkeypatch.setattr(tree_search, "_visit", visit)
    return tree_search.search_tree(config(home), made(home, **more), home / f"visits{len(files.entries(home))}")


def test_only_the_best_are_gone_down_from(home, monkeypatch):
    rows = visits(home, monkeypatch, {"top": 2.0, "top/MHA": 1.0, "top/FFN": 3.0, "top/FFN/lower": 1.0})
    assert [r["node"] for r in rows] == ["low", "top", "top/MHA", "top/FFN", "top/FFN/lower", "top/FFN/upper"]
    assert [r["node"] for r in rows if r.get("kept")] == ["top", "top/FFN", "top/FFN/lower"]
    both = visits(home, monkeypatch, {"top": 2.0, "top/MHA": 1.0, "top/FFN": 3.0, "low/FFN": 2.0}, keep=2)
    assert len(both) == 2 + 4 + 4 and [r["node"] for r in both if r.get("kept")][2:4] == ["low/FFN", "top/FFN"]
    failed = visits(home, monkeypatch, {"top": None, "low/MHA": None, "low/FFN": None})
    assert [r["node"] for r in failed] == ["low", "top", "low/MHA", "low/FFN"], "nothing lies below what failed"
    with pytest.raises(UserError, match="none of 2 nodes succeeded; the first: diverged"):
        visits(home, monkeypatch, {"top": None, "low": None})


@pytest.mark.slow
def test_a_decoders_versatility_is_its_next_token_loss(home):
    cfg = train.ready(search.config_of(f"configs/train.py:model={home / 'llama'},data={home / 'general.jsonl'},objective=causal_lm", {}))
    measure, base = tree_search.general(cfg, made(home)["versatility"])
    model, _ = hf.load(home / "llama", head="lm")
    tok = tokenizer.load(home / "llama")
    texts = [json.loads(line)["text"] for line in (home / "general.jsonl").read_text().splitlines()]
    total = count = 0
    for i in np.random.RandomState(0).permutation(24)[:16]:
        ids = np.asarray(tok.encode_batch([texts[i]])[0][:12])
        logits = np.asarray(model.apply(base, {"input_ids": ids[None]})[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total, count = total - log_p[np.arange(len(ids) - 1), ids[1:]].sum(), count + len(ids) - 1
    assert measure(base) == pytest.approx(total / count, rel=1e-5)
    untied = folders.make_model_folder(home / "untied", "llama", "lm", tie_word_embeddings=False)
    with pytest.raises(UserError, match="this run's head stands in place"):
        tree_search.general({**cfg, "objective": "classification", "model": {**cfg["model"], "path": str(untied)}}, made(home)["versatility"])


@pytest.mark.parametrize("wrong, words", [
    ({"brnches": {}}, "tree: unknown key 'brnches'; nearest: 'branches'"),
    ({"branches": {}}, "three objects that are not empty: branches, settings and versatility"),
    ({"branches": {"layers": {}}}, "branch 'layers' is empty"),
    ({"branches": []}, "branches is \\[\\]; it is a dict"),
    ({"start": "layer"}, "start names no branch 'layer'; nearest: 'layers'"),
    ({"keep": 0}, "keep is 0"),
    ({"branches": {**BRANCHES, "half": {"lower": {"hihg": 0.3}}}}, "node half.lower sets 'hihg', which no setting names; nearest: 'high'"),
    ({"branches": {**BRANCHES, "half": {"lower": {"high": 0.3, "then": "moduel"}}}}, "node half.lower names no branch 'moduel'"),
    ({"branches": {**BRANCHES, "half": {"lower": {"high": 0.3, "then": "module"}}}}, "branch 'module' leads back to itself"),
    ({"branches": {**BRANCHES, "idle": {"x": {}}}}, "no node leads to the branch 'idle'"),
    ({"branches": {**BRANCHES, "half": {"lower": 3}}}, "node half.lower is 3"),
    ({"parameters": {"modules": "mlp", "rate": 1}}, "no setting names the parameter 'rate'"),
    ({"parameters": {}, "branches": {"layers": {"low": {"low": 0.0, "high": 0.6}}}}, "names no parameter 'modules'"),
    ({"branches": {**BRANCHES, "half": {"none": {"low": 0.5, "high": 0.5}}}}, "node low/MHA/none: mask 'cofitune': no layer of 3 lies from 0.5 up to 0.5"),
    ({"branches": {**BRANCHES, "half": {"odd": {"modules": "mpl"}}}}, "node low/MHA/odd: mask 'cofitune': no module 'mpl'; nearest: 'mlp'"),
    ({"branches": {"layers": {"low": {"low": 0.0, "high": 0.6}}}, "versatility": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
])  # fmt: skip
def test_a_wrong_tree_is_one_line_before_any_run(wrong, words, home):
    with pytest.raises(UserError, match=words) as error:
        tree_search.search_tree(config(home), made(home, **wrong), home / "wrong")
    assert "\n" not in str(error.value) and not (home / "wrong").exists()


def test_the_script_takes_a_tree_or_a_space(home, monkeypatch, capsys):
    main = __import__("runpy").run_path("scripts/search.py")["main"]
    common = ["--config", config(home), "--workdir", str(home / "script")]
    for options, words in ((["--tree=a", "--space=b"], "give one of --space and --tree"), ([], "give one of --space and --tree"),
                           (["--tree=a", "--trials=3"], "--trials is for --space")):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*common, *options])
        assert words in capsys.readouterr().err
    monkeypatch.setattr(tree_search, "search_tree", lambda config, given, workdir: files.write_json(
        files.make_folder(home / "script") / "chosen.json", {"path": [tree_search.check(given)["start"]]}) or [1, 2])  # fmt: skip
    main([*common, "--tree=configs/spaces/cofitune.json"])
    assert json.loads(capsys.readouterr().out)["chosen"] == ["layers"]
