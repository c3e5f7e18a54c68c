#!/usr/bin/env bash
# What launch_tpu_pod.sh has each worker do, in the copy of the code there.
#   setup EXTRA COMMAND   the code out of ../ft_jax.tar.gz, .venv with requirements.txt and jax[EXTRA], then COMMAND
#   start ARGUMENT…       scripts/train.py --distributed in the background; nothing where it runs already
#   run ARGUMENT…         the same in the foreground, its exit status in log/status
#   follow BYTE           its log from that byte on, until it ends; the last line is the status
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p log
poll=${LAUNCH_POLL:-1}

running() { # the training and its children hold the lock: no stale number of a process is taken for it
  ! flock -n log/lock true
}

unpack() { # what is gone from the code since the last time goes here too
  if [ -e log/code.tar.gz ]; then
    tar -tzf log/code.tar.gz --quoting-style=literal | tr '\n' '\0' | xargs -0 rm -f --
  fi
  tar -xzf ../ft_jax.tar.gz
  mv ../ft_jax.tar.gz log/code.tar.gz
}

install() {
  local extra=$1 version stamp
  # shellcheck source=scripts/setup.sh
  source scripts/setup.sh
  if ! find_python > /dev/null 2>&1; then # Ubuntu 22.04 of the TPU images has 3.10
    sudo apt-get update -q
    sudo apt-get install -y -q python3.11 python3.11-venv
  fi
  setup requirements.txt
  version=$(sed -n 's/^jax==//p' requirements.txt)
  stamp=.venv/jax-$extra-$version
  if [ ! -e "$stamp" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "jax[$extra]==$version"
    touch "$stamp"
  fi
}

case $1 in
  setup)
    if running; then
      echo "a training runs here already: code and packages stay as they are"
      exit
    fi
    unpack
    install "$2"
    bash -c "${3:-true}"
    ;;
  start)
    exec 9> log/lock
    if ! flock -n 9; then
      echo "a training runs here already: it is not started again"
      exit
    fi
    rm -f log/status
    setsid nohup bash scripts/launch/worker.sh run "${@:2}" > log/train.log 2>&1 < /dev/null &
    echo $! > log/pid
    ;;
  run)
    status=0
    .venv/bin/python scripts/train.py --distributed --stopped_status=75 "${@:2}" || status=$?
    echo "$status" > log/status.new
    mv log/status.new log/status
    ;;
  follow)
    if running; then
      tail -c "+$2" -s "$poll" -f --pid="$(cat log/pid)" log/train.log
    else
      tail -c "+$2" log/train.log
    fi
    printf '\nft_jax: training ended with status %s\n' "$(cat log/status 2> /dev/null || echo 137)"
    ;;
esac
