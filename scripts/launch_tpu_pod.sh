#!/usr/bin/env bash
# Trains on a TPU VM or a whole slice; the same command again goes on where it stands.
usage='bash scripts/launch_tpu_pod.sh --name=N --zone=Z --type=v6e-16 --version=RUNTIME [options] -- --config=… --workdir=… […]

  --name --zone --type --version   the TPU VM: made if there is none, used if there is (gcloud compute tpus …)
  --project=P     the project, if it is not that of the gcloud configuration
  --queued        ask for it as a queued resource, which waits for capacity
  --spot          ask for capacity that may be taken away; with --follow it is asked for again and the run resumes
  --follow        stay: show the log of worker 0 and keep it, start again after a preemption, until the training ends
  --delete        delete the machine: after a training that was followed to its good end; now, if no training is given
  --prepare=CMD   a shell command on every worker before each start, such as mounting the disk of --workdir
  --logs=DIR      where logs and the packed code go (runs/launch/NAME)
  --attempts=20   how often the machine is asked for before giving up
  --dry-run       print every command of a launch without a mishap, do none

What stands after -- goes to scripts/train.py --distributed on every worker. Needs gcloud, logged in.'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch/common.sh
source scripts/launch/common.sh

poll=${LAUNCH_POLL:-15} # seconds between two looks at a machine
state=''                # of the machine: READY, MISSING, UNKNOWN (gcloud failed) or what the cloud calls it
made=0                  # how often it was asked for
ended=''                # exit status of the training; empty while nobody knows

say() {
  printf '# %s\n' "$*" >&3
}

pause() {
  [ -n "${opt[dry-run]:-}" ] || sleep "$poll"
}

tpu() { # tpu KIND VERB WORD…
  run gcloud compute tpus "$1" "$2" "${@:3}" "${where[@]}"
}

# ask KIND FIELD: sets `state`.
ask() {
  if state=$(tpu "$1" describe "${opt[name]}" "--format=value($2)" 2> "$errors"); then
    if [ -n "${opt[dry-run]:-}" ]; then state=$assumed; fi
  elif grep -qi 'not[_ ]found' "$errors"; then
    state=MISSING
  else
    state=UNKNOWN
  fi
}

look() {
  if [ -n "${opt[queued]:-}" ]; then
    ask queued-resources state.state
    if [ "$state" != ACTIVE ] && [ "$state" != READY ]; then return; fi
    ask tpu-vm state
    if [ "$state" = MISSING ]; then state=GONE; fi # the request stands, its machine does not
  else
    ask tpu-vm state
  fi
}

create() {
  made=$((made + 1))
  if [ "$made" -gt "${opt[attempts]}" ]; then die "asked ${opt[attempts]} times for ${opt[name]} and never kept it; --attempts=N asks more often"; fi
  local spot=()
  if [ -n "${opt[spot]:-}" ]; then spot=(--spot); fi
  if [ -n "${opt[queued]:-}" ]; then
    tpu queued-resources create "${opt[name]}" "--node-id=${opt[name]}" "--accelerator-type=${opt[type]}" "--runtime-version=${opt[version]}" "${spot[@]}"
  else
    tpu tpu-vm create "${opt[name]}" "--accelerator-type=${opt[type]}" "--version=${opt[version]}" "${spot[@]}"
  fi 2> "$errors" || {
    grep -qiE 'exhausted|capacity|unavailable|stockout|internal error' "$errors" || die "gcloud could not make ${opt[name]}: $(tail -n 1 "$errors")"
    say "no capacity: $(tail -n 1 "$errors")"
  }
  assumed=READY
}

remove() {
  if [ -n "${opt[queued]:-}" ]; then
    tpu queued-resources delete "${opt[name]}" --force
  else
    tpu tpu-vm delete "${opt[name]}"
  fi || die "gcloud could not delete ${opt[name]}; see above"
}

bring_up() {
  local failed=0 shown=''
  while :; do
    look
    if [ "$state" != "$shown" ]; then say "${opt[name]} is $state"; fi
    shown=$state
    case $state in
      READY) return ;;
      MISSING) create ;;
      STOPPED) tpu tpu-vm start "${opt[name]}" ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED | GONE) remove; continue ;;
      UNKNOWN)
        failed=$((failed + 1))
        if [ "$failed" -gt 5 ]; then die "gcloud cannot say how ${opt[name]} is: $(tail -n 1 "$errors")"; fi
        ;;
    esac
    pause
  done
}

# lost: whether the machine is going away. A worker may die of it before the state says so, hence more than one look.
lost() {
  local looks
  for looks in 1 2 3 4; do
    look
    if [ "$state" != READY ] && [ "$state" != UNKNOWN ]; then return 0; fi
    if [ "$looks" -lt 4 ]; then pause; fi
  done
  return 1
}

on_workers() { # on_workers all|0 COMMAND
  tpu tpu-vm ssh "${opt[name]}" "--worker=$1" "--command=$2" < /dev/null
}

# launch: the code, the packages and the training onto every worker. Each step needs the one before; says which failed.
launch() {
  local worker='bash ft_jax/scripts/launch/worker.sh'
  step="packing the code"
  run bash scripts/launch/pack.sh "${opt[logs]}/code.tar.gz" || return
  step="copying the code"
  tpu tpu-vm scp "${opt[logs]}/code.tar.gz" "${opt[name]}:ft_jax.tar.gz" --worker=all || return
  step="setting up the workers"
  on_workers all "mkdir -p ft_jax && tar -xzf ft_jax.tar.gz -C ft_jax scripts/launch/worker.sh && $worker setup tpu $(quote "${opt[prepare]:-}")" || return
  step="starting the training"
  on_workers all "$worker start $(quote "${rest[@]}")" || return
}

# follow: shows and keeps the log of worker 0 until the training ends (`ended`) or the machine goes away (`ended` stays empty).
follow() {
  local log number=1 before=-1 broken=0
  while [ -e "${opt[logs]}/train.$number.log" ]; do number=$((number + 1)); done
  log=${opt[logs]}/train.$number.log
  ended=''
  if [ -z "${opt[dry-run]:-}" ]; then : > "$log"; fi
  while :; do
    local size=0
    if [ -e "$log" ]; then size=$(stat -c %s "$log"); fi
    if [ "$size" -gt "$before" ]; then broken=0; else broken=$((broken + 1)); fi
    before=$size
    if [ -n "${opt[dry-run]:-}" ]; then
      on_workers 0 "bash ft_jax/scripts/launch/worker.sh follow 1"
      ended=0
      return
    fi
    on_workers 0 "bash ft_jax/scripts/launch/worker.sh follow $((size + 1))" | tee -a "$log" || true
    if [[ $(tail -n 1 "$log" | tr -d '\0') =~ ^ft_jax:\ training\ ended\ with\ status\ ([0-9]+)$ ]]; then
      ended=${BASH_REMATCH[1]}
      return
    fi
    look
    if [ "$state" != READY ] && [ "$state" != UNKNOWN ]; then return; fi
    if [ "$broken" -ge 5 ]; then die "no connection to ${opt[name]}; the training goes on there, the same command follows it again"; fi
    say "the connection broke; following again"
    pause
  done
}

# tell_end: says how a training that failed on a machine that is still there ended, with the last lines of every worker.
tell_end() {
  on_workers all "tail -n 20 ft_jax/log/train.log" > "${opt[logs]}/workers.log" || true
  echo "error: the training ended with status $ended; the last lines of every worker are in ${opt[logs]}/workers.log" >&2
  exit "$ended"
}

train() {
  while :; do
    bring_up
    if ! launch; then
      lost || die "$step failed on ${opt[name]}; nothing was done after it"
    elif [ -z "${opt[follow]:-}" ]; then
      say "the training runs on ${opt[name]}; the same command with --follow shows it"
      return
    else
      follow
      if [ "$ended" = 0 ]; then break; fi
      # Status 2 is a mistake in the options, which a new machine would repeat.
      if [ "$ended" = 2 ] || { [ -n "$ended" ] && ! lost; }; then tell_end; fi
    fi
    say "${opt[name]} is $state: it is asked for again, and the run resumes from its last checkpoint"
  done
  if [ -n "${opt[delete]:-}" ]; then remove; fi
}

parse "name zone type version project prepare logs attempts" "queued spot follow delete dry-run" "$@"
needed=(name zone)
if [ "${#rest[@]}" -gt 0 ] || [ -z "${opt[delete]:-}" ]; then
  needed+=(type version)
  check_training "${rest[@]}"
  if [ -n "${opt[delete]:-}" ] && [ -z "${opt[follow]:-}" ]; then die "--delete with a training needs --follow: it deletes when the training has ended"; fi
fi
for name in "${needed[@]}"; do [ -n "${opt[$name]:-}" ] || die "--$name is missing"; done
: "${opt[logs]:=runs/launch/${opt[name]}}" "${opt[attempts]:=20}"
positive attempts
where=("--zone=${opt[zone]}" --quiet)
if [ -n "${opt[project]:-}" ]; then where+=("--project=${opt[project]}"); fi
errors=/dev/null assumed=MISSING
if [ -z "${opt[dry-run]:-}" ]; then
  command -v gcloud > /dev/null || die "gcloud was not found; install the Google Cloud CLI, or see the commands with --dry-run"
  if [ "${#rest[@]}" -gt 0 ]; then
    git rev-parse --is-inside-work-tree > /dev/null 2>&1 || die "$PWD is no git checkout; the launcher copies the files that git knows"
  fi
  mkdir -p "${opt[logs]}"
  errors=${opt[logs]}/gcloud.err
fi
trap 'echo "stopped; what was started goes on: the same command follows it again, --delete ends it" >&2; exit 130' INT
if [ "${#rest[@]}" -gt 0 ]; then train; else remove; fi
