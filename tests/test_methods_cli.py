"""``python -m ft_jax.methods``: the registry as people and programs read it."""

import json
import pathlib
import runpy
import sys

import pytest

from ft_jax import methods, registry


def test_the_module_runs_and_both_forms_agree(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["methods", "--json"])
    monkeypatch.delitem(sys.modules, "ft_jax.methods")  # as ``python -m`` finds it
    runpy.run_module("ft_jax.methods", run_name="__main__")
    rows = json.loads(capsys.readouterr().out)
    assert [(r["kind"], r["name"]) for r in rows] == [(m.kind, m.name) for m in registry.methods()]
    methods.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line.split()[:2] == [row["kind"], row["name"]]
        assert row["source"] in line and line.endswith(row["summary"])


def test_an_unknown_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        methods.main(["--jsno"])
    assert stop.value.code == 2
    assert "--jsno" in capsys.readouterr().err


def test_the_committed_table_is_what_the_command_prints(capsys):
    methods.main(["--markdown"])
    held = (pathlib.Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    assert capsys.readouterr().out == held, "run: python -m ft_jax.methods --markdown > docs/methods.md"
