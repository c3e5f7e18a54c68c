"""How close adapters come to PEFT's: runs the parity tests and writes what they reached, a row a method.

python scripts/parity.py [--out=docs/peft --select='lora or dora'] [--from=REPORT.xml]

Needs requirements-test.txt. OUT.json has every figure, OUT.md is the table: logits of the adapter that PEFT saved, loaded here, and of the one
that we wrote, loaded there (error over the larger of 1 and the largest logit, 1e-4 allowed), and one step of SGD from the same start
(largest difference of a weight, 1e-5 allowed). --from reads a report of pytest that exists.
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ft_jax import errors
from ft_jax.io import files

LOGITS = re.compile(r"^(.+?): ([\d.]+e[+-]\d+) of ([\d.]+) \(")
STEP = re.compile(r"^(.+?): a step moves the weights by ([\d.]+e[+-]\d+), ours differ by ([\d.]+e[+-]\d+)")
FAMILIES = ("llama", "bert", "roberta", "mistral", "qwen3")
NAMES = {"lstm": "P-tuning, LSTM", "mlp": "P-tuning, MLP", "prompt": "prompt tuning", "prefix": "prefix tuning", "projected": "prefix tuning, projected"}
KINDS = {"theirs": r"theirs|both_ways|ln_tuning", "ours": r"ours|written here|again"}  # of a test's name or of what it says, in this order


def report(select, path):
    """Runs the tests and leaves pytest's report at ``path``; UserError where one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", "-o", "junit_logging=system-out",
               *sorted(str(p) for p in (ROOT / "tests" / "parity").glob("test_peft*.py")), *(["-k", select] if select else [])]  # fmt: skip
    if subprocess.run(command, check=False, cwd=ROOT).returncode:
        raise errors.UserError("a parity test failed, so there is no table; its output is above")


def figures(path):
    """``[{method, family, what, error}]`` of what the tests printed; errors of logits over their scale."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        for line in (case.findtext("system-out") or "").splitlines():
            if step := STEP.match(line):
                rows.append({**_named(step[1]), "what": "step", "error": float(step[3]), "moved": float(step[2])})
            elif logits := LOGITS.match(line):
                what = "ours" if re.search(KINDS["ours"], f"{case.get('name')} {logits[1]}") else "theirs"
                rows.append({**_named(logits[1]), "what": what, "error": float(logits[2]) / max(1.0, float(logits[3]))})
    return rows


def _named(text):
    words = re.sub(r", written here| again| as LoRA| of one layer", "", text).split()
    family = next((w for w in words if w in FAMILIES), "llama")
    method = " ".join(w for w in words if w not in FAMILIES)
    return {"method": NAMES.get(method, method), "family": family}


def table(rows):
    """Markdown, a row a method: its families and the largest error of each kind."""
    methods, seen = collections.defaultdict(lambda: collections.defaultdict(list)), collections.defaultdict(set)
    for row in rows:
        methods[row["method"]][row["what"]].append(row["error"])
        seen[row["method"]].add(row["family"])
    yield "| method | models | theirs, loaded here | ours, loaded there | a step of SGD |\n|---|---|---|---|---|"
    for method in sorted(methods, key=str.lower):
        cells = [f"{max(found):.0e}" if (found := methods[method][what]) else "" for what in ("theirs", "ours", "step")]
        yield f"| {method} | {', '.join(sorted(seen[method]))} | {' | '.join(cells)} |"


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(prog="scripts/parity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/peft"), help="without suffix; .json and .md are added (docs/peft)")
    parser.add_argument("--select", default="", help="pytest's -k: only these tests")
    parser.add_argument("--from", dest="source", type=pathlib.Path, help="a junit report of these tests")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = args.source or pathlib.Path(folder) / "report.xml"
        if not args.source:
            report(args.select, path)
        rows = figures(path)
    files.write(args.out.with_suffix(".json"), json.dumps(rows, indent=1).encode() + b"\n")
    text = "\n".join(["# Adapters beside PEFT's", "", "Written by `python scripts/parity.py`; see there what the columns are.", "", *table(rows)])
    files.write(args.out.with_suffix(".md"), text.encode() + b"\n")
    print(text)


if __name__ == "__main__":
    main()
