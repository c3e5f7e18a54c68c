"""The table of what the parity tests with PEFT reached: what is read of their report."""

import json
import subprocess

import pytest

from scripts import parity

REPORT = """<testsuites><testsuite>
<testcase name="test_theirs_here[dora-llama]"><system-out>dora llama: 2.0e-06 of 4.0 (the adapter moves them by 1.0e+00)
</system-out></testcase>
<testcase name="test_theirs_here[dora-bert]"><system-out>dora bert: 3.0e-07 of 1.0 (the adapter moves them by 1.0e+00)
</system-out></testcase>
<testcase name="test_ours_there_and_one_step[dora]"><system-out>dora: 1.0e-06 of 1.0 (the adapter moves them by 1.0e+00)
dora: a step moves the weights by 1.0e-02, ours differ by 4.0e-08
</system-out></testcase>
<testcase name="test_theirs_here[pissa-llama]"><system-out>pissa as LoRA: 7.0e-07 of 1.0 (the adapter moves them by 1.0e+00)
something else
</system-out></testcase>
<testcase name="test_silent"/>
</testsuite></testsuites>"""


def test_the_largest_error_of_each_kind(tmp_path, capsys):
    (tmp_path / "report.xml").write_text(REPORT)
    parity.main([f"--from={tmp_path / 'report.xml'}", f"--out={tmp_path / 'peft'}"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == ["| dora | bert, llama | 5e-07 | 1e-06 | 4e-08 |", "| pissa | llama | 7e-07 |  |  |"]
    assert (tmp_path / "peft.md").read_text().splitlines()[-2:] == lines
    assert len(json.loads((tmp_path / "peft.json").read_text())) == 5


def test_no_table_of_tests_that_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parity.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 1))
    with pytest.raises(SystemExit):
        parity.main([f"--out={tmp_path / 'peft'}"])
    assert "a parity test failed" in capsys.readouterr().err and not list(tmp_path.iterdir())
