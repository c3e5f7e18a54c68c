"""Bad input through the real command lines: one line that says what, where and the nearest right thing; no damage."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ft_jax import errors, train
from ft_jax.io import runs
from tests import folders
from tests.test_train import assert_same_run


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(folders.ROOT))
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return folders.Scripts(tmp_path_factory.mktemp("said"))


def broken(home, name, change, source="bert"):
    """A copy of a model folder after ``change(folder)``."""
    shutil.copytree(home / source, home / name)
    change(home / name)


def change_json(file, **values):
    def change(folder):
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**held, **values}))

    return change


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def poison(tensors):
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = np.nan


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Good and broken models and data, a finished run ``run``, and ``adapted``: a LoRA run whose base changed later."""
    home = tmp_path_factory.mktemp("home")
    for name, made in {"bert": {"head": "classification"}, "old": {"seed": 7}, "no_mask": {"head": "mlm", "mask": False}, "small": {"vocab_size": 20},
                       "llama": {"family": "llama", "head": "lm"}}.items():  # fmt: skip
        folders.make_model_folder(home / name, **made)
    broken(home, "cut", lambda f: os.truncate(f / "model.safetensors", 5000))
    broken(home, "lacking", change_tensors(lambda t: t.pop("bert.encoder.layer.1.output.dense.weight")))
    broken(home, "poisoned", change_tensors(poison))
    broken(home, "gpt", change_json("config.json", model_type="gpt_neox"))
    broken(home, "torn_config", lambda f: os.truncate(f / "config.json", 40))
    broken(home, "torn_tokenizer", lambda f: os.truncate(f / "tokenizer.json", 40))
    broken(home, "no_tokenizer", lambda f: (f / "tokenizer.json").unlink())
    good = folders.reviews(np.random.default_rng(0), 60)
    folders.write_rows(home / "good.jsonl", good)
    folders.write_rows(home / "labels.jsonl", [*good[:6], {**good[6], "label": 7}, *good[7:]])
    folders.write_rows(home / "textless.jsonl", [*good[:4], {"label": 1}, *good[5:]])
    folders.write_rows(home / "renamed.jsonl", [{"texts": row["text"], "label": row["label"]} for row in good])
    folders.write_rows(home / "empty.jsonl", [])
    (home / "torn.jsonl").write_text('{"text": "good film", "label": 1}\n{"text": "bad')
    (home / "file").write_text("no folder")
    cfg = {
        "steps": 2, "batch_size": 8, "model": {"path": str(home / "bert"), "head": "classification"},
        "data": {"source": str(home / "good.jsonl"), "num_labels": 2, "max_length": 16}, "mesh": {"data": 1},
    }  # fmt: skip
    train.train(cfg, home / "run")
    rules = {"kernels": (("layers/attn/q/kernel", "lora(rank=2)"),)}
    train.train({**cfg, "model": {**cfg["model"], "path": str(home / "old")}, "method": rules}, home / "adapted")
    folders.make_model_folder(home / "old", seed=8)
    return home


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


def options(home, *, model="bert", data="good.jsonl", method="full", objective="", workdir="new", **keys):
    """The training command's options; keys with ``__`` for the dots."""
    choice = f"model={home / model},data={home / data},method={method}" + (f",objective={objective}" if objective else "")
    given = {"steps": 2, "batch_size": 8, "data__max_length": 16, "mesh__data": 1, "log__tensorboard": False, **keys}
    return [f"--config=configs/train.py:{choice}", f"--workdir={home / workdir}",
            *(f"--config.{k.replace('__', '.')}={v}" for k, v in given.items())]  # fmt: skip


# name -> (script, options from the home folder, what the one line must say)
CASES = {
    # the model
    "model path": ("train.py", lambda h: options(h, model="bertt"), ["no model", "bertt", "nearest", "bert'"]),
    "truncated weights": ("train.py", lambda h: options(h, model="cut"), ["cut/model.safetensors", "5000 bytes"]),
    "missing tensor": ("train.py", lambda h: options(h, model="lacking"),
                       ["lacking", "no tensor", "layer.1.output.dense.weight", "nearest"]),
    "NaN in the base": ("train.py", lambda h: options(h, model="poisoned"), ["poisoned", "layers/mlp/down/kernel", "NaN"]),
    "vocabulary": ("train.py", lambda h: options(h, model="small"), ["good.jsonl, line", "token id", "vocabulary of 20"]),
    "model type": ("train.py", lambda h: options(h, model="gpt"),
                   ["gpt/config.json", "gpt_neox", "supported: bert, roberta, llama, mistral, qwen2, qwen3"]),
    "torn config.json": ("train.py", lambda h: options(h, model="torn_config"), ["torn_config/config.json", "JSON"]),
    "torn tokenizer": ("train.py", lambda h: options(h, model="torn_tokenizer"), ["torn_tokenizer/tokenizer.json"]),
    "no tokenizer": ("train.py", lambda h: options(h, model="no_tokenizer"), ["no tokenizer.json", "tokenizer_config.json"]),
    "no mask token": ("train.py", lambda h: options(h, model="no_mask", objective="mlm", eval__metric="loss"),
                      ["mlm", "mask token"]),
    "length": ("train.py", lambda h: options(h, data__max_length=100), ["data.max_length 100", "64 positions"]),
    "objective for another model": ("train.py", lambda h: options(h, objective="causal_lm"), ["head 'lm'", "nearest"]),
    # the method
    "trainable rule": ("train.py", lambda h: options(h, **{"method__trainable": '(("layrs/.*", True),)'}),
                       ["trainable rule 'layrs/.*'", "matches no leaf", "nearest: 'layers'"]),
    "kernel rule": ("train.py", lambda h: options(h, **{"method__kernels": '(("layers/atn/q/kernel", "lora(rank=2)"),)'}),
                    ["kernel rule", "layers/atn/q/kernel", "nearest: 'layers/attn/q/kernel'"]),
    "rank": ("train.py", lambda h: options(h, method="lora(rank=99)"), ["layers/attn/", "rank 99", "32x32", "largest: 32"]),
    "hyper-parameter": ("train.py", lambda h: options(h, method="lora(rnak=2)"), ["'lora'", "'rnak'", "nearest: 'rank'"]),
    "method": ("train.py", lambda h: options(h, method="lorra"), ["no method called 'lorra'", "nearest: 'lora'"]),
    "frozen layers": ("train.py", lambda h: options(h, method__freeze_layers=3), ["lowest 3 of 3 layers", "at most 2"]),
    # the config
    "config key": ("train.py", lambda h: options(h, optimizer__learning_rat=1),
                   ["unknown config key 'optimizer.learning_rat'", "nearest: 'optimizer.learning_rate'"]),
    "config type": ("train.py", lambda h: options(h, steps="many"), ["steps", "many"]),
    "config value": ("train.py", lambda h: options(h, steps=0), ["'steps' is 0", "at least 1"]),
    "config file": ("train.py", lambda h: ["--config=configs/trian.py", f"--workdir={h / 'new'}"], ["configs/trian.py", "nearest: 'configs/train.py'"]),
    "config string": ("train.py", lambda h: ["--config=configs/train.py:modle=bert", f"--workdir={h / 'new'}"],
                      ["modle=bert", "nearest: 'model'"]),
    "optimizer": ("train.py", lambda h: options(h, optimizer__name="adanw"), ["adanw", "nearest: 'adamw'"]),
    "schedule": ("train.py", lambda h: options(h, optimizer__schedule="liner"), ["'liner'", "nearest: 'linear'"]),
    "metric": ("train.py", lambda h: options(h, eval__metric="acuracy"), ["eval.metric 'acuracy'", "nearest: 'accuracy'"]),
    "accumulation": ("train.py", lambda h: options(h, accumulate=3), ["batch_size 8", "accumulate 3"]),
    "mesh": ("train.py", lambda h: options(h, mesh__tensor=64), ["mesh", "64", "devices"]),
    "no workdir": ("train.py", lambda h: options(h)[:1], ["--workdir is missing"]),
    # the data
    "labels": ("train.py", lambda h: options(h, data="labels.jsonl"), ["labels.jsonl, line 7", "label 7", "0 to 1"]),
    "empty data": ("train.py", lambda h: options(h, data="empty.jsonl"), ["empty.jsonl", "holds no rows"]),
    "row without text": ("train.py", lambda h: options(h, data="textless.jsonl"), ["textless.jsonl, line 5", "'text'"]),
    "text field": ("train.py", lambda h: options(h, data="renamed.jsonl"), ["line 1", "no field 'text'", "nearest: 'texts'"]),
    "torn data": ("train.py", lambda h: options(h, data="torn.jsonl"), ["torn.jsonl, line 2", "not JSON"]),
    "data path": ("train.py", lambda h: options(h, data="goood.jsonl"), ["goood.jsonl", "nearest: 'good.jsonl'"]),
    # the workdir
    "another config": ("train.py", lambda h: options(h, workdir="run"), ["holds a run with another config", "config.", "here"]),
    "workdir is a file": ("train.py", lambda h: options(h, workdir="file"), ["is a file"]),
    "workdir of something else": ("train.py", lambda h: options(h, workdir="bert"), ["another config", "config."]),
    "workdir under a file": ("train.py", lambda h: options(h, workdir="file/new"), ["file"]),
    # after training
    "export of no run": ("export.py", lambda h: [f"--workdir={h / 'bertt'}", f"--out={h / 'new'}"], ["bertt", "no run"]),
    "adapter for another base": ("export.py", lambda h: [f"--workdir={h / 'adapted'}", f"--out={h / 'new'}", "--format=peft"],
                                 ["old", "not the one this run was trained on", "fingerprint"]),
    "adapter of a full run": ("export.py", lambda h: [f"--workdir={h / 'run'}", f"--out={h / 'new'}", "--format=peft"],
                              ["no LoRA kernel", "export the merged model"]),
    "export format": ("export.py", lambda h: [f"--workdir={h / 'run'}", f"--out={h / 'new'}", "--format=petf"],
                      ["petf", "peft"]),
    "export over the run": ("export.py", lambda h: [f"--workdir={h / 'run'}", f"--out={h / 'run'}"], ["run's own folder"]),
    "analyse path": ("analyse.py", lambda h: [f"--base={h / 'bert'}", f"--tuned={h / 'bertt'}", f"--out={h / 'new'}"],
                     ["bertt", "nearest"]),
    "analyse truncated": ("analyse.py", lambda h: [f"--base={h / 'bert'}", f"--tuned={h / 'cut'}", f"--out={h / 'new'}"],
                          ["cut/model.safetensors", "not a whole"]),
    "analyse two architectures": ("analyse.py", lambda h: [f"--base={h / 'bert'}", f"--tuned={h / 'llama'}",
                                                           f"--out={h / 'new'}"], ["llama"]),
    "graft of no run": ("graft.py", lambda h: [f"--workdir={h / 'nothing'}", f"--out={h / 'new'}"], ["nothing", "no run"]),
    "graft of what": ("graft.py", lambda h: [f"--out={h / 'new'}"], ["--workdir", "--tuned"]),
    "graft sparsity": ("graft.py", lambda h: [f"--workdir={h / 'run'}", f"--out={h / 'new'}", "--sparsity=1.5"], ["1.5"]),
    "graft on another base": ("graft.py", lambda h: [f"--workdir={h / 'adapted'}", f"--out={h / 'new'}"], ["fingerprint"]),
    "graft data": ("graft.py", lambda h: [f"--base={h / 'bert'}", f"--tuned={h / 'no_mask'}", "--data=imdb",
                                          f"--out={h / 'new'}"], ["head", "'mlm'"]),
}  # fmt: skip


def assert_one_line(done, says):
    assert done.status == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and len(done.errors) == 1, done.stderr[-3000:]
    for text in says:
        assert text in done.errors[0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if i % 4 else []) for i, n in enumerate(CASES)])
def test_one_line_before_compute(name, home, script):
    which, arguments, says = CASES[name]
    before = hashes(home)
    assert_one_line(script(which, *arguments(home)), says)
    assert not (home / "new").exists(), "something was written before the input was checked"
    assert hashes(home) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing tensor", "adapter for another base", "analyse path"])
def test_one_line_in_a_fresh_process(name, home):
    """As a user calls it; library logs, if any, are warnings."""
    which, arguments, says = CASES[name]
    done = folders.run_script(which, *arguments(home))
    assert_one_line(done, says)
    assert not any(line[:1] == "I" and line[1:5].isdigit() for line in done.stderr.splitlines())


def test_resume_on_another_base(home):
    """The base changes after the first checkpoint: the run refuses to go on, and goes on when it is back."""
    workdir = home / "adapted"
    (workdir / "DONE").rename(home / "DONE")
    before = hashes(workdir)
    with pytest.raises(errors.UserError, match="not the one this run was trained on"):
        train.train(json.loads((workdir / "config.json").read_text()), workdir)
    assert hashes(workdir) == before
    (home / "DONE").rename(workdir / "DONE")


@pytest.mark.slow
def test_nan_loss(home, script, tmp_path):
    """Training that blows up says so; the checkpoint before it is whole, and the same command fails the same way."""
    given = options(home, workdir=tmp_path / "hot", steps=60, save__every=1, log__every=1, optimizer__name="sgd",
                    optimizer__learning_rate=1e18, optimizer__clip=0.0, optimizer__schedule="constant",
                    optimizer__warmup=50, save__keep=5)  # fmt: skip
    assert_one_line(script("train.py", *given), ["stopped being finite", "hot", "is intact", "optimizer.learning_rate"])
    workdir = tmp_path / "hot"
    assert not (workdir / "DONE").exists()
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    _, params, _ = runs.load_run(workdir, "last")
    assert all(np.isfinite(x).all() for x in [params["head"]["kernel"], params["layers"]["attn"]["q"]["kernel"]])
    before = hashes(workdir / "checkpoints")
    again = script("train.py", *given)
    assert_one_line(again, [f"step {steps[-1]} is intact"])
    assert hashes(workdir / "checkpoints") == before


def training(home, workdir, **keys):
    return options(home, workdir=workdir, **{"steps": 60, "save__every": 10, "save__keep": 1, "log__every": 10,
                                             "optimizer__learning_rate": 1e-3, **keys})  # fmt: skip


@pytest.mark.slow
def test_file_size_limit(home, tmp_path):
    """The first checkpoint does not fit; without the limit the same command goes on."""
    given = training(home, tmp_path / "run", steps=12)
    done = folders.run_script("train.py", *given, limit=300_000, env={"JAX_COMPILATION_CACHE_DIR": ""})
    assert_one_line(done, ["no space left", "is intact"])
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())
    assert train.train(cfg, tmp_path / "run")["steps"] == 12


@pytest.fixture
def disk(tmp_path):
    """A 4 MB file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system; test_file_size_limit covers the rest")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(path, leave):
    """Takes all of a disk but ``leave`` bytes."""
    size = shutil.disk_usage(path).free - leave
    with open(path / "ballast", "wb") as file:
        file.write(b"\0" * max(size, 0))


@pytest.mark.slow
def test_disk_full_before_the_run(home, disk, script):
    fill(disk, leave=100_000)
    assert_one_line(script("train.py", *training(home, disk / "run")), ["no space", "checkpoints", "MB"])
    assert not list(disk.glob("run/checkpoints/*"))
    (disk / "ballast").unlink()
    assert script("train.py", *training(home, disk / "run")).status == 0


@pytest.mark.slow
def test_disk_full_in_the_middle(home, disk, tmp_path):
    """The disk fills up while a run writes: one line, the last checkpoint loads, and the run resumes bit for bit."""
    workdir = disk / "run"
    given = training(home, workdir, steps=150, log__every=1)
    process = subprocess.Popen([sys.executable, "scripts/train.py", *given], cwd=folders.ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    end = time.monotonic() + 120
    while not (workdir / "checkpoints" / "20").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    fill(disk, leave=0)
    stderr = process.communicate(timeout=120)[1]
    assert_one_line(folders.Finished(process.returncode, "", stderr), ["no space left", "is intact"])
    assert not (workdir / "DONE").exists()
    (disk / "ballast").unlink()
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved >= 20
    runs.load_run(workdir, "last")
    cfg = json.loads((workdir / "config.json").read_text())
    assert train.train(cfg, workdir)["steps"] == 150
    train.train(cfg, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", workdir)
