"""Every shell script of the project is clean by shellcheck and stops at the first failure."""

import shutil
import subprocess

import pytest

from tests.launchers.stubs import ROOT

SOURCED = ("setup.sh", "common.sh")  # they take the settings of the script that reads them


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh"))
    assert len(files) >= 9
    done = subprocess.run(["shellcheck", "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_stop_at_the_first_failure():
    for path in (ROOT / "scripts").rglob("*.sh"):
        assert ("\nset -euo pipefail\n" in path.read_text()) != (path.name in SOURCED), path
