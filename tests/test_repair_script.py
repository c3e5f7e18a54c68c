"""`scripts/analyse.py --repair` on tiny folders: full models, sharded bfloat16 ones, and PEFT adapters."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft as hf_peft
import pytest
import safetensors.numpy
import torch
import transformers

from ft_jax import kernels, tree
from ft_jax.io import hf, peft, safetensors
from ft_jax.io.adapted import Adapted
from ft_jax.weights import repair
from tests import folders

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
K = 4
PLANTED = {"layers/attn/q/kernel": (1,), "layers/mlp/down/kernel": (0, 2)}
FACTOR = 0.25
IDS = np.random.default_rng(0).integers(7, 30, (2, 9))


def script():
    spec = importlib.util.spec_from_file_location("analyse", folders.ROOT / "scripts" / "analyse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


ANALYSE = script()


def intruder(w, size=12.0):
    """A rank-one change ``(v, size · u)`` whose output side is as far from every base direction as it can be."""
    left, _, right = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return left.sum(1) / np.sqrt(left.shape[1]), size * right.sum(0) / np.sqrt(right.shape[0])


def plant(params):
    """The tree with an intruder in the matrices of PLANTED, and a slightly moved norm."""
    flat = tree.flatten(params)
    for path, layers in PLANTED.items():
        flat[path] = np.array(flat[path])
        for i in layers:
            flat[path][i] += np.outer(*intruder(flat[path][i]))
    flat["layers/attn_norm/scale"] = flat["layers/attn_norm/scale"] * 1.01
    return tree.nest(flat)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """llama: base, tuned (planted) and adapter; bert: the same as a classifier; data files."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for family, head in (("llama", "lm"), ("bert", "classification")):
        folders.make_model_folder(home / family / "base", family, head)
        model, base = hf.load(home / family / "base")
        hf.save(home / family / "tuned", model, plant(base), home / family / "base")
        params = kernels.adapt(base, [(r"layers/(attn/q|mlp/down)/kernel", "lora(rank=2, alpha=6)")], jax.random.key(0))
        flat = tree.flatten(params, is_leaf=kernels.is_kernel)
        for path, layers in PLANTED.items():
            leaf = flat[path]
            a, b = np.array(leaf.a), 0.03 * rng.standard_normal(leaf.b.shape).astype(np.float32)
            for i in layers:
                a[i, :, 0], b[i, 0] = intruder(leaf.base[i], 4.0)
            flat[path] = leaf.replace(a=jnp.asarray(a), b=jnp.asarray(b))
        peft.save_adapter(home / family / "adapter", model, tree.nest(flat), str(home / family / "base"), base=base)
    folders.write_rows(home / "reviews.jsonl", folders.reviews(rng, 80))
    folders.write_rows(home / "letters.jsonl", folders.alphabets(rng, 80))
    return home


def run(home, out, *options, tuned="tuned", family="llama"):
    ANALYSE([f"--base={home / family / 'base'}", f"--tuned={home / family / tuned}", f"--out={out}", f"--k={K}",
             "--eps=0.4", *options])  # fmt: skip
    repaired = out / "repair.json"
    return json.loads(repaired.read_text()) if repaired.exists() else None


def planted_names(found):
    return sorted(row["name"] for row in found["rows"])


def torch_logits(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter:
        model = hf_peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


NAMES = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight",
         "model.layers.2.mlp.down_proj.weight"]  # fmt: skip


@pytest.mark.parametrize("control", repair.CONTROLS)
def test_full_model(home, tmp_path, control, capsys):
    found = run(home, tmp_path, f"--repair={FACTOR}", f"--control={control}")
    folder = tmp_path / "repaired"
    assert found["kind"] == "model" and found["mended"] == 3 and planted_names(found) == NAMES
    old, new = (safetensors.Checkpoint(f) for f in (home / "llama" / "tuned", folder))
    assert old.names == new.names
    for name in old.names:
        assert np.array_equal(old.read(name), new.read(name)) == (name not in NAMES), name
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (home / "llama" / "tuned" / file).read_bytes()
    base, tuned, mended = (hf.load(f)[1] for f in (home / "llama" / "base", home / "llama" / "tuned", folder))
    wanted = repair.apply(tuned, repair.find(base, tuned, k=K, eps=0.4), FACTOR, control)
    for path, leaf in tree.flatten(mended).items():
        np.testing.assert_allclose(leaf, tree.flatten(wanted)[path], atol=1e-6, err_msg=path)
    assert np.isfinite(torch_logits(folder)).all()
    assert found["lost"] == 0 and found["before"]["intruders"] == 3
    if control == "none":
        assert found["after"]["delta_norm"] < 0.5 * found["before"]["delta_norm"]
    moved = np.sqrt(sum(np.sum((np.asarray(x) - y) ** 2) for x, y in zip(jax.tree.leaves(mended), jax.tree.leaves(tuned))))
    assert found["change"] == pytest.approx(float(moved), rel=1e-4)
    assert "<h2>Repair</h2>" in (tmp_path / "spectral.html").read_text("utf-8")
    said = capsys.readouterr().out
    assert "repaired 3 of 21 matrices: intruders 3 →" in said and "kept its rank" not in said


def test_removal_is_counted_from_the_written_file_and_not_done_twice(home, tmp_path):
    found = run(home, tmp_path, "--repair=0")
    assert found["before"]["intruders"] == 3 and found["after"]["intruders"] == 0
    assert all(row["after"]["intruders"] == 0 and row["before"]["intruders"] == 1 for row in found["rows"])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "repaired").iterdir()}
    assert run(home, tmp_path, "--repair=0") == found
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "repaired").iterdir()} == stamps
    other = run(home, tmp_path, "--repair=0.5")
    assert other["settings"]["factor"] == 0.5 and {p.name for p in stamps} == {p.name for p in (tmp_path / "repaired").iterdir()}
    shutil.rmtree(tmp_path / "repaired")
    again = run(home, tmp_path, "--repair=0.5")
    assert again["rows"] == other["rows"] and (tmp_path / "repaired" / "model.safetensors").is_file()


def test_shards_of_bfloat16_keep_their_kind_and_every_other_byte(home, tmp_path):
    for name in ("base", "tuned"):
        folder = tmp_path / "llama" / name
        shutil.copytree(home / "llama" / name, folder)
        tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in safetensors.Checkpoint(folder).items()}
        where = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
        tensors["model.counter"], where["model.counter"] = np.arange(3), where[min(where)]  # a buffer of another kind
        (folder / "model.safetensors").unlink()
        for file in set(where.values()):
            safetensors.save_file({n: x for n, x in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = run(tmp_path, tmp_path / "out", "--repair=0")
    assert planted_names(found) == NAMES and 0 < found["lost"] < 0.05  # rounding to bfloat16, and nothing else
    assert found["after"]["intruders"] == 0
    folder = tmp_path / "out" / "repaired"
    assert not (folder / "model.safetensors").exists()
    for file in sorted((tmp_path / "llama" / "tuned").iterdir()):
        first, second = file.read_bytes(), (folder / file.name).read_bytes()
        assert len(first) == len(second)
        if file.suffix != ".safetensors":
            assert first == second
            continue
        old, new = (safetensors.safe_open(f, "np") for f in (file, folder / file.name))
        for name in old.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            same = old.get_tensor(name).tobytes() == new.get_tensor(name).tobytes()
            assert old.get_tensor(name).dtype == new.get_tensor(name).dtype and same == (name not in NAMES)


@pytest.mark.parametrize("control", repair.CONTROLS)
def test_adapter(home, tmp_path, control, capsys):
    found = run(home, tmp_path, f"--repair={FACTOR}", f"--control={control}", tuned="adapter")
    folder, adapter = tmp_path / "repaired", home / "llama" / "adapter"
    assert found["kind"] == "adapter" and found["mended"] == 3 and planted_names(found) == NAMES
    assert (folder / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model, base = hf.load(home / "llama" / "base")
    tuned, mended = (peft.load_adapter(f, model, base) for f in (adapter, folder))
    wanted, lost = repair.mend(tuned, repair.find(base, tuned, k=K, eps=0.4), FACTOR, control=control)
    got = tree.flatten(kernels.merge(mended))
    for path, leaf in tree.flatten(kernels.merge(wanted)).items():
        np.testing.assert_allclose(got[path], leaf, atol=3e-6, err_msg=path)
    assert found["lost"] == pytest.approx(max(x.max() for x in lost.values()), abs=1e-5)
    ours = np.asarray(model.apply(mended, {"input_ids": jnp.asarray(IDS, jnp.int32)}))
    np.testing.assert_allclose(ours, torch_logits(home / "llama" / "base", folder), atol=1e-4)
    assert "the adapter kept its rank" in capsys.readouterr().out
    for name in found["rows"]:
        assert name["after"]["effective_rank"] <= 2 + 1e-3


def test_an_adapter_is_analysed_as_the_merged_model(home, tmp_path):
    model, base = hf.load(home / "bert" / "base")
    merged = peft.load_adapter(home / "bert" / "adapter", model, base)
    hf.save(tmp_path / "bert" / "merged", model, merged, home / "bert" / "base")
    shutil.copytree(home / "bert" / "base", tmp_path / "bert" / "base")
    shutil.copytree(home / "bert" / "adapter", tmp_path / "bert" / "adapter")
    reports = []
    for tuned in ("merged", "adapter"):
        assert run(tmp_path, tmp_path / f"out_{tuned}", tuned=tuned, family="bert") is None
        reports.append(json.loads((tmp_path / f"out_{tuned}" / "spectral.json").read_text()))
    first, second = (r["matrices"] for r in reports)
    assert reports[0]["total_intruders"] == reports[1]["total_intruders"] == 3
    assert [m["name"] for m in first] == [m["name"] for m in second]
    for one, other in zip(first, second):
        assert one["delta_norm"] == pytest.approx(other["delta_norm"], rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(one["max_cosine"], other["max_cosine"], atol=1e-4)


def test_names_with_and_without_a_task_models_prefix(home, tmp_path):
    """An adapter made on the task model, analysed on the bare model, and the other way round."""
    model, params = hf.load(home / "bert" / "base")
    bare = hf.load(home / "bert" / "base", head="none")[0]
    hf.save(tmp_path / "bare", bare, {k: v for k, v in params.items() if k not in ("head", "pooler")})
    adapted = Adapted(tmp_path / "bare", home / "bert" / "adapter").checkpoint()
    own = Adapted(home / "bert" / "base", home / "bert" / "adapter").checkpoint()
    assert sorted("bert." + name for name in adapted.modules) == sorted(own.modules) and len(own.modules) == 6
    for name in adapted.modules:
        np.testing.assert_array_equal(adapted.read(name), own.read("bert." + name))
    assert adapted.shape("classifier.weight") == (2, 32)  # saved whole with the adapter


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_task_and_text_before_and_after(home, tmp_path, tuned):
    data = json.dumps({"source": str(home / "letters.jsonl"), "prompt_field": "prompt", "completion_field": "completion",
                       "max_length": 16})  # fmt: skip
    found = run(home, tmp_path, "--repair=0", f"--task={data}", f"--text={home / 'letters.jsonl'}", tuned=tuned)
    for name, key in (("task", "accuracy"), ("text", "perplexity")):
        row = found["measured"][name]
        assert all(np.isfinite(row[side][key]) for side in ("base", "before", "after"))
        assert abs(row["before"]["loss"] - row["after"]["loss"]) > 1e-3
    # With the intruders gone the model is nearly the base again.
    text = found["measured"]["text"]
    assert abs(text["after"]["loss"] - text["base"]["loss"]) < 0.3 * abs(text["before"]["loss"] - text["base"]["loss"])
    page = (tmp_path / "spectral.html").read_text("utf-8")
    assert "Text (" in page and "perplexity" in page and "<th scope=\"col\" class=n>Base</th>" in page


def test_a_classifiers_task_is_measured_where_there_is_a_head(home, tmp_path):
    data = f"--task={home / 'reviews.jsonl'}"
    found = run(home, tmp_path / "full", "--repair", data, family="bert")
    row = found["measured"]["task"]
    assert found["settings"]["factor"] == 0.7 and set(row) == {"source", "base", "before", "after"}
    bare = tmp_path / "bert" / "base"
    model, params = hf.load(home / "bert" / "base")
    hf.save(bare, hf.load(home / "bert" / "base", head="none")[0], {k: v for k, v in params.items() if k not in ("head", "pooler")},
            home / "bert" / "base")  # fmt: skip
    shutil.copytree(home / "bert" / "tuned", tmp_path / "bert" / "tuned")
    assert set(run(tmp_path, tmp_path / "out", "--repair", data, family="bert")["measured"]["task"]) == {"source", "before", "after"}


def test_nothing_to_repair_is_a_copy(home, tmp_path):
    found = run(home, tmp_path, "--repair=0.5", tuned="base")
    assert found["mended"] == 0 and found["rows"] == [] and found["change"] == 0
    assert (tmp_path / "repaired" / "model.safetensors").read_bytes() == (home / "llama" / "base" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_in_a_fresh_process(home, tmp_path):
    done = folders.run_script("analyse.py", f"--base={home / 'llama' / 'base'}", f"--tuned={home / 'llama' / 'adapter'}",
                              f"--out={tmp_path}", "--repair", "--which=all", "--eps=0.4")  # fmt: skip
    assert done.status == 0 and "repaired" in done.stdout, done.stderr


BAD = {
    "factor": (["--repair=-1"], "factor -1.0 cannot scale"),
    "no number": (["--repair=much"], "invalid float value: 'much'"),
    "control": (["--repair", "--control=neighbor"], "invalid choice: 'neighbor'"),
    "control of all": (["--repair", "--control=neighbour", "--which=all"], "belongs to which 'top'"),
    "control without repair": (["--control=shrink"], "--control belongs to a repair; add --repair"),
    "task without repair": (["--task=imdb"], "--task belongs to a repair"),
    "task data": (["--repair", "--task=reviws.jsonl"], "reviws.jsonl"),
    "task settings": (["--repair", '--task={"source": 1'], "is no JSON object"),
    "task setting": (["--repair", '--task={"sourc": "x"}'], "unknown data setting 'sourc'; nearest: 'source'"),
    "adapter as base": (["--base=ADAPTER"], "is an adapter, not a model"),
    "adapter of another base": (["--base=BERT", "--tuned=ADAPTER"], "has no module"),
    "over its input": (["--repair", "--tuned=OUT/repaired"], "is what is to be repaired; choose another --out"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_before_compute(home, tmp_path, name, capsys):
    options, message = BAD[name]
    shutil.copytree(home / "llama" / "tuned", tmp_path / "repaired")
    before = sorted(tmp_path.rglob("*"))
    places = {"ADAPTER": home / "llama" / "adapter", "BERT": home / "bert" / "base", "OUT": tmp_path}
    for word, place in places.items():
        options = [o.replace(word, str(place)) for o in options]
    with pytest.raises(SystemExit) as ended:
        run(home, tmp_path, *options)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len([line for line in said if line.startswith("error:")]) == 1
    assert message in said[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_answer_no_task_or_text(home, tmp_path, capsys):
    for option, message in (("--text", "next-token loss; this one has head 'classification'"),):
        with pytest.raises(SystemExit):
            run(home, tmp_path / "out", "--repair", f"{option}={home / 'reviews.jsonl'}", family="bert")
        assert message in capsys.readouterr().err
    model, params = hf.load(home / "bert" / "base", head="none")
    for name in ("base", "tuned"):
        hf.save(tmp_path / "bert" / name, model, params, home / "bert" / "base")
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", "--repair", f"--task={home / 'reviews.jsonl'}", family="bert")
    assert "a model with head 'none' answers no task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
