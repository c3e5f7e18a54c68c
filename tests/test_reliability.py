"""What a process that was killed at an awkward moment leaves behind, and a few kills for real (scripts/reliability.py does many)."""

import errno
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from ft_jax import population, search
from ft_jax.errors import UserError
from ft_jax.io import files, runs
from tests import folders

MADE = {"config": "c", "space": {}, "sampler": "tpe", "seed": 0}
SPREAD = search.distributions({"rank": [1, 2, 4], "layers": {"subset": 2}})


def row_of(trial):
    return {"parameters": dict(trial.params), "settings": {}, "run": "runs/a", "size": trial.params["rank"], "score": 0.25 * trial.params["rank"]}


def ran(study, count, tell=lambda number: True):
    """The parameters that ``count`` further trials drew."""
    drawn = []
    for _ in range(count):
        study.sampler = search.SAMPLERS["tpe"](len([t for t in study.trials if "row" in t.user_attrs]))
        trial = study.ask(SPREAD)
        drawn.append(dict(trial.params))
        trial.set_user_attr("row", row_of(trial))
        if tell(trial.number):
            search._tell(study, trial.number, row_of(trial))
    return drawn


def test_a_run_that_was_killed_before_its_config_was_there_begins_anew(tmp_path):
    folder = tmp_path / "run"
    half = [folder / "LOCK", folder / ".tmp-1-ab-config.json", folder / "checkpoints/4.orbax-checkpoint-tmp-1/x", folder / "best/2.orbax-checkpoint-tmp/x"]
    for file in half:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    (folder / "config.json").write_text('{"a": 1}')
    run = runs.Run(folder, {"a": 1}, tensorboard=False)
    run.begin()
    assert not any(file.exists() for file in half[1:]) and not list(folder.rglob("*.orbax-checkpoint-tmp*"))
    run.close()
    assert not (folder / "LOCK").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".tmp-1-ab-config.json").write_text("half")
    run = runs.Run(tmp_path / "new", {"a": 1}, tensorboard=False)
    run.begin()
    run.close()
    assert files.entries(tmp_path / "new") == ["config.json"]


def test_a_start_that_a_kill_prevented_is_written_by_the_next(tmp_path, monkeypatch):
    start = {"layers/a": np.arange(3, dtype=np.float32)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.safetensors, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        runs.Run(tmp_path / "run", {"a": 1}, tensorboard=False).begin(start)
    run = runs.Run(tmp_path / "run", {"a": 1}, tensorboard=False)
    assert run.start == {}
    run.begin(start)
    np.testing.assert_array_equal(run.start["layers/a"], start["layers/a"])
    run.close()


@pytest.mark.parametrize("left", ["a line cut short", "Optuna's lock", "a result that was not told"])
def test_a_search_draws_on_as_if_it_had_not_been_killed(left, tmp_path):
    with search.opened(tmp_path / "whole", MADE) as folder:
        wanted = ran(search._study(folder, "accuracy"), 8)
    with search.opened(tmp_path / "cut", MADE) as folder:
        drawn = ran(search._study(folder, "accuracy"), 6, lambda number: left != "a result that was not told" or number != 5)
    journal = tmp_path / "cut" / "journal.jsonl"
    if left == "a line cut short":
        whole = journal.read_bytes()
        study = search._study(tmp_path / "cut", "accuracy")
        study.ask(SPREAD)
        journal.write_bytes(whole + journal.read_bytes()[len(whole) : -3])
    if left == "Optuna's lock":
        (tmp_path / "cut" / "journal.jsonl.lock").symlink_to(journal)
    with search.opened(tmp_path / "cut", MADE) as folder:
        study = search._study(folder, "accuracy")
        assert len(search.write(study, folder, "accuracy")) == 6
        drawn += ran(study, 2)
    assert drawn == wanted
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_folder_is_one_process_at_a_time(tmp_path):
    with search.opened(tmp_path / "search", MADE), pytest.raises(UserError, match="search is in use by process"), search.opened(tmp_path / "search", MADE):
        pytest.fail("it was taken twice")
    with search.opened(tmp_path / "search", MADE):
        assert files.strangers(tmp_path / "search") == ["search.json"]
    saved = tmp_path / "one" / "checkpoints" / "4"
    saved.mkdir(parents=True)
    (saved.parents[1] / "config.json").write_text("{}")
    held = files.lock(tmp_path / "one")
    member = types.SimpleNamespace(name="one", run=runs.Run(tmp_path / "one", {}, tensorboard=False))
    with pytest.raises(UserError, match="one: workdir .*one is in use by process"):
        population._resume_at([member])
    files.unlock(tmp_path / "one", held)
    assert saved.exists()


def test_members_that_were_killed_while_they_began_begin_together(tmp_path):
    """The first of three knows with whom it began, the others do not yet; one that has trained is not asked for it."""
    members = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        members.append(types.SimpleNamespace(name=name, run=types.SimpleNamespace(path=tmp_path / name)))
    files.write_json(tmp_path / "a" / "population.json", {"members": ["c", "a", "b"]})
    assert [[m.name for m in group] for group in population._groups(members, 8)] == [["c", "a", "b"]]
    (tmp_path / "a" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(AttributeError):  # b and c are put together by what they are, which these have not
        population._groups(members, 8)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_turned_read_only_is_one_line(number, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")

    def refuse(*_, **__):
        raise OSError(number, "no")

    run = runs.Run(tmp_path / "run", {}, tensorboard=False)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="run: may not be written; name another folder"):
        run.begin()


@pytest.mark.slow
def test_kills_for_real(tmp_path):
    """Three, one of each way, of a fine-tune: the script finds them equal and says where they landed."""
    command = [sys.executable, "scripts/reliability.py", "--kills=3", "--only=finetune", "--fuzz=0", "--seed=1", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(command, cwd=folders.ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["kills"]["finetune"]["kills"] == made["kills"]["finetune"]["equal"] == 3
    assert len({row["way"] for row in made["rows"]}) == 3
