#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: submits scripts/launch/slurm_job.sh, which goes back to the queue before its time is up.
usage='bash scripts/launch_slurm.sh --nodes=2 --gpus=8 [options] -- --config=… --workdir=… […]

  --nodes=1 --gpus=8    how many nodes, and how many GPUs of each
  --per=gpu             a process for each GPU, or for each node (--per=node)
  --time=4:00:00        the time limit; 120 s before it the training is stopped and the job queued again
  --partition --account --cpus    as sbatch has them; cpus for each process
  --name=ft_jax         the name of the job
  --python=.venv/bin/python       as the nodes see it, from this checkout
  --logs=DIR            where JOB.log goes (runs/launch)
  --dry-run             print every command, do none

What stands after -- goes to scripts/train.py --distributed in every process. Code, Python and --workdir lie on a disk that all
nodes see. For any other option of sbatch set its variable, such as SBATCH_CONSTRAINT or SBATCH_QOS.'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch/common.sh
source scripts/launch/common.sh

parse "nodes gpus per time partition account cpus name python logs" "dry-run" "$@"
check_training "${rest[@]}"
: "${opt[nodes]:=1}" "${opt[gpus]:=8}" "${opt[per]:=gpu}" "${opt[time]:=4:00:00}" "${opt[name]:=ft_jax}"
: "${opt[python]:=.venv/bin/python}" "${opt[logs]:=runs/launch}"
positive nodes
positive gpus
case ${opt[per]} in
  gpu) processes=${opt[gpus]} ;;
  node) processes=1 ;;
  *) die "--per is '${opt[per]}'; it is gpu or node$(nearest "${opt[per]}" gpu node)" ;;
esac

asked=("--nodes=${opt[nodes]}" "--ntasks-per-node=$processes" "--gpus-per-node=${opt[gpus]}" "--time=${opt[time]}")
if [ -n "${opt[cpus]:-}" ]; then
  positive cpus
  asked+=("--cpus-per-task=${opt[cpus]}")
fi
for name in partition account; do
  if [ -n "${opt[$name]:-}" ]; then asked+=("--$name=${opt[$name]}"); fi
done
job=(scripts/launch/slurm_job.sh "${opt[python]}" "${opt[per]}" "${opt[gpus]}" "${rest[@]}")
if [ -z "${opt[dry-run]:-}" ]; then
  command -v sbatch > /dev/null || die "sbatch was not found; run this on a login node of the cluster, or see the commands with --dry-run"
  mkdir -p "${opt[logs]}"
fi
run sbatch "--job-name=${opt[name]}" "${asked[@]}" "--chdir=$PWD" "--output=${opt[logs]}/%j.log" "${job[@]}"
if [ -n "${opt[dry-run]:-}" ]; then
  echo "# and in the job:"
  LAUNCH_DRY_RUN=1 bash "${job[@]}"
fi
