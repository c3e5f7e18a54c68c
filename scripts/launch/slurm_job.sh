#!/usr/bin/env bash
# The job of launch_slurm.sh: slurm_job.sh PYTHON gpu|node GPUS ARGUMENT…; the arguments are those of scripts/train.py.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
# shellcheck source=scripts/launch/common.sh
source scripts/launch/common.sh # sbatch --chdir: $0 is a copy elsewhere

opt[dry-run]=${LAUNCH_DRY_RUN:-}
python=$1 per=$2 gpus=$3
shift 3
# JAX gives process i of a node the GPU i, so each has to see all; one process a node takes them all.
if [ "$per" = node ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not take it over
step=(srun --kill-on-bad-exit=1 --gpu-bind=none "$python" scripts/train.py --distributed --stopped_status=75 "$@")
if [ -n "${opt[dry-run]}" ]; then
  if [ "$per" = node ]; then echo "export JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"; fi
  run "${step[@]}"
  exit
fi

caught=0 requeue=''
# shellcheck disable=SC2317,SC2329  # the trap calls it
stop() {
  caught=$((caught + 1))
  # Only a job that still counts as running met its limit or is preempted; one that was cancelled is to stay away.
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then requeue=1; fi
  kill -TERM "$training" 2> /dev/null || true
}
"${step[@]}" &
training=$!
trap stop TERM
before=-1
while [ "$before" != "$caught" ]; do # a caught signal ends `wait`, not the training
  before=$caught status=0
  wait "$training" || status=$?
done
if [ "$status" != 0 ] && [ -n "$requeue" ]; then
  echo "stopped before the time limit; queued again, the run resumes from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
