"""The command lines on tiny models: train, then graft; what they write, say, and do not do twice."""

import json

import numpy as np
import pytest

from ft_jax import train, tree
from ft_jax.io import hf
from ft_jax.weights import graft
from tests import folders

SPARSITY = 0.05


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(folders.ROOT))
        yield


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return folders.Scripts(tmp_path_factory.mktemp("said"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model ``base`` with a frozen head of its own, and a finished run whose layers alone were trained."""
    home = tmp_path_factory.mktemp("home")
    folders.make_model_folder(home / "base", head="classification")
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 300))
    done = folders.run_script(
        "train.py", f"--workdir={home / 'run'}",
        f"--config=configs/train.py:model={home / 'base'},data={home / 'reviews.jsonl'},method=layers",
        "--config.steps=80", "--config.data.max_length=16", "--config.data.validation_fraction=0.3", "--config.mesh.data=1",
        "--config.optimizer.learning_rate=3e-3", "--config.eval.every=20")  # fmt: skip
    assert done.status == 0, done.stderr
    home.joinpath("said.json").write_text(done.stdout)
    home.joinpath("said.err").write_text(done.stderr)
    return home


@pytest.fixture(scope="module")
def grafted(home, script):
    """(graft.json, folder) of a learnt graft with its model."""
    done = script("graft.py", f"--workdir={home / 'run'}", "--which=last", f"--sparsity={SPARSITY}", "--examples=64",
                  f"--out={home / 'graft'}", "--save-model")  # fmt: skip
    assert done.status == 0, done.stderr
    return json.loads((home / "graft" / "graft.json").read_text()), home / "graft"


@pytest.mark.slow
def test_train_prints_the_summary_and_no_library_logs(home):
    summary = json.loads((home / "said.json").read_text())
    assert summary == json.loads((home / "run" / "DONE").read_text())
    base = tree.count(hf.load(home / "base")[1]["layers"])
    assert summary["trainable_parameters"] == base and summary["best_accuracy"] > 0.8
    said = [line for line in (home / "said.err").read_text().replace("\r", "\n").splitlines() if line.strip()]
    assert said and all(line.lstrip().startswith(("train:", "tokenise", "reading")) for line in said), said


@pytest.mark.slow
def test_graft_keeps_the_skill_with_few_parameters(grafted):
    report, _ = grafted
    base, tuned, kept, chance = (report[n]["accuracy"] for n in ("base", "tuned", "grafted", "random"))
    assert base < 0.65 and tuned > 0.8
    assert kept > base + 0.5 * (tuned - base) and kept > chance + 0.1
    assert report["grafted"]["agreement"] > report["random"]["agreement"] + 0.1
    assert report["tuned"]["agreement"] == 1.0
    assert all(0 <= report[n]["ece"] <= 1 and report[n]["loss"] > 0 for n in ("base", "tuned", "grafted", "random"))
    assert len(report["history"]) == 11 and report["history"][0]["step"] == 0


@pytest.mark.slow
def test_graft_counts_its_mask(grafted, home):
    report, folder = grafted
    mask = graft.load_mask(folder / "mask.safetensors")
    layers = hf.load(home / "base")[1]["layers"]
    assert sorted(mask) == sorted(f"layers/{p}" for p in tree.flatten(layers))
    assert report["eligible_parameters"] == tree.count(layers)
    assert report["parameters"] == sum(int(m.sum()) for m in mask.values())
    assert report["sparsity_reached"] == report["parameters"] / report["eligible_parameters"]
    assert 0.5 * SPARSITY < report["sparsity_reached"] < 2 * SPARSITY
    for table in ("layer", "matrix"):
        assert sum(row["parameters"] for row in report["where"][table]) == report["parameters"]
    for row in report["where"]["layer"]:
        chosen = [m[row["layer"]] for m in mask.values()]
        assert row["share"] == pytest.approx(sum(m.sum() for m in chosen) / sum(m.size for m in chosen))
    assert report["head"] == "the base's own" and report["left_at_base"] == []


@pytest.mark.slow
def test_grafted_model_is_base_outside_and_tuned_inside_the_mask(grafted, home, script):
    _, folder = grafted
    mask = graft.load_mask(folder / "mask.safetensors")
    assert script("export.py", f"--workdir={home / 'run'}", "--which=last", f"--out={home / 'tuned'}").status == 0
    base, tuned, mixed = (tree.flatten(hf.load(home / n)[1]) for n in ("base", "tuned", "graft/model"))
    assert (folder / "model" / "tokenizer.json").is_file()
    for path, leaf in mixed.items():
        expected = np.where(mask[path], tuned[path], base[path]) if path in mask else base[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


@pytest.mark.slow
def test_graft_of_two_folders_is_the_same(grafted, home, script):
    """From exported checkpoints and a data source: the same mask and numbers as from the run."""
    report, folder = grafted
    assert script("export.py", f"--workdir={home / 'run'}", "--which=last", f"--out={home / 'tuned'}").status == 0
    settings = json.dumps({"max_length": 16, "validation_fraction": 0.3})
    done = script("graft.py", f"--base={home / 'base'}", f"--tuned={home / 'tuned'}", f"--data={home / 'reviews.jsonl'}",
                  f"--settings={settings}", f"--sparsity={SPARSITY}", "--examples=64", f"--out={home / 'pair'}")  # fmt: skip
    assert done.status == 0, done.stderr
    other = json.loads((home / "pair" / "graft.json").read_text())
    assert {k: v for k, v in other.items() if k != "settings"} == {k: v for k, v in report.items() if k != "settings"}
    mask = graft.load_mask(folder / "mask.safetensors")
    for path, m in graft.load_mask(home / "pair" / "mask.safetensors").items():
        np.testing.assert_array_equal(m, mask[path])
    assert not (home / "pair" / "model").exists()


@pytest.mark.slow
def test_finished_graft_is_not_computed_again(grafted, home, script):
    _, folder = grafted
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    args = [f"--workdir={home / 'run'}", "--which=last", "--examples=64", f"--out={folder}"]
    done = script("graft.py", *args, f"--sparsity={SPARSITY}", "--save-model")
    assert done.status == 0 and "grafted" in done.stdout and "step" not in done.stderr
    other = script("graft.py", *args, "--sparsity=0.1")
    assert other.status == 2 and "settings.sparsity is 0.05 there and 0.1 here" in other.errors[0]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.slow
def test_graft_of_a_language_model_under_a_lora_run(home, script, tmp_path):
    """LoRA is merged first; with every parameter grafted the model answers as the tuned one does."""
    folders.make_model_folder(tmp_path / "llama", "llama", "lm")
    folders.write_rows(tmp_path / "letters.jsonl", folders.alphabets(np.random.default_rng(0), 150))
    cfg = {
        "steps": 30, "batch_size": 16, "objective": "causal_lm", "model": {"path": str(tmp_path / "llama"), "head": "lm"},
        "data": {"source": str(tmp_path / "letters.jsonl"), "max_length": 32, "prompt_field": "prompt",
                 "completion_field": "completion"},
        "method": {"kernels": ((r"layers/(attn|mlp)/\w+/kernel", "lora(rank=4, alpha=8)"),)},
        "optimizer": {"learning_rate": 2e-2}, "mesh": {"data": 1}, "eval": {"every": 0}, "log": {"tensorboard": False},
    }  # fmt: skip
    train.train(cfg, tmp_path / "run")
    done = script("graft.py", f"--workdir={tmp_path / 'run'}", "--sparsity=1", "--steps=0", f"--out={tmp_path / 'all'}")
    assert done.status == 0, done.stderr
    report = json.loads((tmp_path / "all" / "graft.json").read_text())
    assert report["parameters"] == report["eligible_parameters"]
    assert report["grafted"] == report["tuned"] and report["tuned"]["loss"] < 0.5 * report["base"]["loss"]
