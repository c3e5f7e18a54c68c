"""Every shell script of the project is clean by shellcheck and stops at the first failure."""

import pathlib
import subprocess
import sys

from tests.launchers.stubs import ROOT

SOURCED = ("setup.sh", "common.sh")  # they take the settings of the script that reads them


def test_shellcheck():
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh"))
    assert len(files) >= 9
    done = subprocess.run([pathlib.Path(sys.executable).with_name("shellcheck"), "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_stop_at_the_first_failure():
    for path in (ROOT / "scripts").rglob("*.sh"):
        assert ("\nset -euo pipefail\n" in path.read_text()) != (path.name in SOURCED), path
