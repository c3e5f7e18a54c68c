"""Stand-ins for gcloud, kubectl, sbatch and what runs on a worker: they note their words and act by scripted answers."""

import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIENTS = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "squeue", "scontrol", "sudo", "python3.12")
WORKERS = ("w0", "w1")

# Every stub: notes its words in `calls`; `next FILE` takes the first line of a script, whose last line stays. Trainings
# of several workers run side by side, so a note is written under a lock.
HEAD = """#!/usr/bin/env bash
note() { { if command -v flock > /dev/null; then flock 9; fi; printf '%s\\0' "${@:2}" $'\\036'; } 9>> "$STUBS/$1.lock" >> "$STUBS/$1"; }
note calls "${0##*/}" "$@"
next() {
  [ -e "$STUBS/$1" ] || return 0
  head -n 1 "$STUBS/$1"
  if [ "$(wc -l < "$STUBS/$1")" -gt 1 ]; then sed -i 1d "$STUBS/$1"; fi
}
status() {
  local status
  status=$(next "$1")
  echo "${status:-0}"
}
"""
BODIES = {
    # gcloud compute tpus KIND VERB …: machines are folders, and an ssh is a shell there
    "gcloud": """
case $4 in
  describe)
    state=$(next "$3")
    case $state in
      MISSING) echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1 ;;
      BROKEN) echo "ERROR: you are not logged in" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  create)
    trouble=$(next create)
    if [ -n "$trouble" ]; then echo "ERROR: $trouble" >&2; exit 1; fi
    rm -rf "$STUBS"/w?; mkdir "$STUBS/w0" "$STUBS/w1" ;;
  scp)
    [ -z "$(next scp)" ] || exit 1
    for worker in w0 w1; do cp "$5" "$STUBS/$worker/${6#*:}" || exit 1; done ;;
  ssh)
    all=$* command=${7#--command=} workers=w0
    if [[ $all == *--worker=all* ]]; then workers="w0 w1"; fi
    trouble=
    if [[ $all == *' follow '* ]]; then touch "$STUBS/go"; trouble=$(next follow); fi
    for worker in $workers; do
      cd "$STUBS/$worker" || exit 1
      if [ -n "$trouble" ]; then bash -c "$command" | head -c "$trouble"; exit 255; fi
      WORKER=$worker bash -c "$command" || exit 1
    done ;;
esac
""",
    # Python 3.12, and what it puts at .venv/bin/python: a training that waits for `go` where `wait` is
    "python3.12": """
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  scripts/train.py*)
    note trained "$WORKER" "$@"
    printf 'train: 1/2\\rtrain: 2/2\\n'
    while [ -e "$STUBS/wait" ] && [ ! -e "$STUBS/go" ]; do sleep 0.02; done
    exit "$(if [ "$WORKER" = w0 ]; then status status; else echo 0; fi)" ;;
esac
""",
    "srun": """
env | grep -E '^(JAX|SRUN)_' > "$STUBS/environment"
trap 'touch "$STUBS/stopped"; exit "$(status srun)"' TERM
touch "$STUBS/started"
while [ -e "$STUBS/wait" ]; do sleep 0.02; done
exit "$(status srun)"
""",
    "squeue": "next squeue\n",
    "kubectl": 'cat > "$STUBS/manifest"\nexit "$(status kubectl)"\n',
}


class Stubs:
    """A small checkout with the real scripts, the stubs in front of PATH, and what they were called with."""

    def __init__(self, home):
        self.home, self.repo = home / "stubs", home / "a checkout"
        (self.home / "bin").mkdir(parents=True)
        for name in CLIENTS:
            (self.home / "bin" / name).write_text(HEAD + BODIES.get(name, ""))
            (self.home / "bin" / name).chmod(0o755)
        ignored = shutil.ignore_patterns("__pycache__", "benches")
        shutil.copytree(ROOT / "scripts", self.repo / "scripts", ignore=ignored)
        shutil.copy(ROOT / "requirements.txt", self.repo)
        (self.repo / ".gitignore").write_text("runs/\n")
        subprocess.run(["git", "init", "--quiet", self.repo], check=True)
        for worker in WORKERS:
            (self.home / worker).mkdir()
        paths = f"{self.home / 'bin'}:{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "SRUN_"))}
        self.env = inherited | {"PATH": paths, "STUBS": str(self.home), "LAUNCH_POLL": "0.02", "PYTHONPATH": str(ROOT), "KUBECONFIG": "/dev/null"}

    def script(self, **answers):
        """Scripts a file of answers, one a call; the last one stays."""
        for name, lines in answers.items():
            (self.home / name.replace("_", "-")).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *command, **env):
        command = [str(word) for word in command]
        return subprocess.run(command, cwd=self.repo, env=self.env | env, capture_output=True, text=True, timeout=120)

    def calls(self, *names, file="calls"):
        """What the stubs called ``names`` (default: all) were given, as lists of words, and forgets it."""
        path = self.home / file
        texts = path.read_text().split("\036\0")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        found = [text.split("\0")[:-1] for text in texts]
        return [words for words in found if not names or words[0] in names]


def said(done):
    """The one line of an error, after a check that it is one and that the status is 2."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]
