#!/usr/bin/env bash
# The main job on a fresh machine: fine-tune in full and with LoRA, open the weights, write runs/demo/report.html.
# bash scripts/demo.sh [--model=minilm|smollm2] [--workdir=DIR]; the same call again resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup requirements.txt
exec .venv/bin/python -m experiments.demo "$@"
