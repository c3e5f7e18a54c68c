# shellcheck shell=bash
# Sourced by demo.sh and test.sh: `setup requirements.txt` makes .venv (Python 3.11 or 3.12) and installs into it once.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -z "$candidate" ] || ! command -v "$candidate" >/dev/null 2>&1; then continue; fi
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 is needed and was not found; set PYTHON=/path/to/python" >&2
  return 1
}

setup() {
  local file=$1 python stamp
  python=$(find_python) || exit 2
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || { echo "error: could not make .venv (is the venv module installed?)" >&2; exit 2; }
  fi
  stamp=.venv/$(basename "$file").$(cat requirements*.txt | cksum | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    echo "installing $file (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar on -r "$file" ||
      { echo "error: installing $file failed; see above" >&2; exit 2; }
    touch "$stamp"
  fi
}
