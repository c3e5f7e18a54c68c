"""Nothing that is read can run code, and nothing lands outside its folder.

Index files, archive members and chat templates have tests of their own: tests/io/test_{safetensors,assets,sdist,tokenizer}.py.
"""

import ast
import contextlib
import io
import json
import pathlib
import pickle
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from ft_jax import kernels
from ft_jax.data import tokenise
from ft_jax.errors import UserError
from ft_jax.io import assets, hf, peft, safetensors, tokenizer
from tests import folders, gguf_files

SOURCES = sorted(p for d in ("ft_jax", "scripts", "experiments", "configs") for p in (folders.ROOT / d).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def _faults(tree):
    """What in a module's syntax tree unpickles, evaluates, or asks for code from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name.partition(".")[0] for a in node.names} if isinstance(node, ast.Import) else {(node.module or "").partition(".")[0]}
            yield from (f"imports {name}" for name in names & UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in RUNNERS or called in ("torch.load", "os.system", "os.popen"):
            yield f"calls {called}"
        for word in node.keywords:
            if word.arg in ("trust_remote_code", "allow_pickle", "shell") and not (isinstance(word.value, ast.Constant) and word.value.value is False):
                yield f"says {word.arg}={ast.unparse(word.value)}"


def test_no_source_unpickles_or_evaluates():
    assert len(SOURCES) > 100
    assert {str(p): f for p in SOURCES if (f := list(_faults(ast.parse(p.read_text()))))} == {}


def test_the_look_for_it_finds_it():
    for text in ("import pickle", "from joblib import load", "eval('1')", "np.load(f, allow_pickle=True)", "f(trust_remote_code=x)", "torch.load(f)"):
        assert list(_faults(ast.parse(text)))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "training_args.bin"])
def test_a_folder_with_a_pickle_alone_is_refused_unread(name, tmp_path):
    folders.make_model_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=f"{name} but no model.safetensors; pickled weights are never read") as error:
        hf.load(tmp_path / "m")
    assert "\n" not in str(error.value) and not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "m" / name).read_bytes()).close()
    assert (tmp_path / "sprung").exists(), "the trap is one"


def test_a_pickle_under_a_safe_name_is_refused_unread(tmp_path):
    folders.make_model_folder(tmp_path / "m")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (tmp_path / "m" / "model.safetensors").write_bytes(trap)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        hf.load(tmp_path / "m")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (tmp_path / "a" / "adapter_model.bin").write_bytes(trap)
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        peft.open_adapter(tmp_path / "a")
    assert not (tmp_path / "sprung").exists()


def test_kept_tokens_are_never_unpickled(tmp_path):
    """Arrays in the cache that hold Python objects are made again."""
    made = {"ids": np.arange(4)}
    tokenise.cached(tmp_path, {"a": 1}, lambda: (made, {}))
    (file,) = tmp_path.rglob("ids.npy")
    np.save(file, np.asarray([Trap(tmp_path / "sprung")] * 4, dtype=object), allow_pickle=True)
    arrays, _ = tokenise.cached(tmp_path, {"a": 1}, lambda: (made, {}))
    np.testing.assert_array_equal(arrays["ids"], made["ids"])
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_model_is_neither_fetched_nor_run(tmp_path):
    assert not any(pathlib.PurePath(name).match(pattern) for pattern in hf.PATTERNS for name in ("modeling_x.py", "pytorch_model.bin", "model.pt", "x.so"))
    folders.make_model_folder(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    (tmp_path / "m" / "modeling_x.py").write_text(trap)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.Model"}, "trust_remote_code": True}))
    hf.load(tmp_path / "m", head="none")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "modeling_x", "auto_map": {"AutoModel": "modeling_x.Model"}}))
    with pytest.raises(UserError, match="model_type 'modeling_x' is not supported"):
        hf.load(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("text", ["__import__('os').system('x')", "lora(rank=__import__('os').getpid())", "lora(rank=(lambda: 4)())", "lora(**{'rank': 4})",
                                  "lora(rank=[x for x in (4,)][0])", "lora.__class__(rank=4)"])  # fmt: skip
def test_methods_are_read_and_not_evaluated(text):
    """Refused, or taken as the text that it is, which no kernel takes for a number."""
    with contextlib.suppress(UserError):
        assert kernels.parse_rule(text) == ("lora", {"rank": text.removeprefix("lora(rank=").removesuffix(")")})
    with pytest.raises(UserError):
        kernels.adapt({"w": np.ones((4, 4), np.float32)}, [("w", text)], jax.random.key(0))


def test_a_template_out_of_a_gguf_file_runs_in_the_sandbox(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    gguf_files.write(tmp_path / "a.gguf", change_meta={"tokenizer.chat_template": "{{ cycler.__init__.__globals__.os.popen('true').read() }}"})
    made = tokenizer.load(hf.resolve(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match="chat template: "):
        made.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("member", ["../out", "/tmp/out", "data/../../out"])
def test_members_of_source_archives_are_read_and_never_written(member, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    file = tmp_path / "cache" / "a.tar.gz"
    file.parent.mkdir()
    file.write_bytes(packed.getvalue())
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": assets.Package("tiny", "1", assets.sha256(file), "data", 1, "", source="tiny.tar.gz")})
    monkeypatch.setattr(assets, "archive", lambda name: file)
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    assert assets.members("tiny") == [member] and assets.read("tiny", member) == b"x"
    with pytest.raises(UserError, match="holds no 'data/link'"):
        assets.read("tiny", "data/link")
    assert sorted(p for p in tmp_path.parent.rglob("*")) == before


def test_a_link_in_an_archive_becomes_no_link(tmp_path, monkeypatch):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as zipped:
        info = zipfile.ZipInfo("data/link")
        info.external_attr = 0o120777 << 16
        zipped.writestr(info, "/etc/hostname")
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": assets.Package("tiny", "1", assets.sha256(file), "data", 1, "")})
    monkeypatch.setattr(assets, "archive", lambda name: file)
    made = assets.extract("tiny", "data") / "link"
    assert not made.is_symlink() and made.read_text() == "/etc/hostname"


def test_shards_that_are_links_or_folders_are_no_way_out(tmp_path):
    """An index names files of its folder alone; a folder under such a name is none."""
    safetensors.save(tmp_path, [("a", np.ones(40, np.float32)), ("b", np.ones(40, np.float32))], max_shard_bytes=100)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").mkdir()
    with pytest.raises(UserError, match="shard model-00002-of-00002.safetensors is missing"):
        safetensors.Checkpoint(tmp_path)
