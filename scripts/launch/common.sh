# shellcheck shell=bash
# Sourced by the launchers: options with one-line errors, words quoted as a shell reads them back, commands done or only printed.

declare -A opt=() # what `parse` found: opt[zone]=us-east5-b, opt[spot]=1
rest=()           # what stood after --: the options of scripts/train.py
exec 3>&1         # where a dry run prints, wherever stdout goes

die() {
  echo "error: $*" >&2
  exit 2
}

# nearest NAME OPTION…: "; nearest: 'x'" by edit distance, or all that are known where none is near.
nearest() {
  WORD=$1 awk '
    function least(a, b) { return a < b ? a : b }
    function distance(a, b,    i, j, above, here) {
      for (j = 0; j <= length(b); j++) above[j] = j
      for (i = 1; i <= length(a); i++) {
        here[0] = i
        for (j = 1; j <= length(b); j++)
          here[j] = least(least(above[j], here[j - 1]) + 1, above[j - 1] + (substr(a, i, 1) != substr(b, j, 1)))
        for (j = 0; j <= length(b); j++) above[j] = here[j]
      }
      return above[length(b)]
    }
    { d = distance(ENVIRON["WORD"], $0); known = known (NR > 1 ? ", " : "") $0 }
    NR == 1 || d < best { best = d; name = $0 }
    END { if (best <= length(ENVIRON["WORD"]) / 2) print "; nearest: \047" name "\047"; else print "; known: " known }
  ' < <(printf '%s\n' "${@:2}")
}

# parse "NAMES WITH A VALUE" "SWITCHES" ARGUMENT…: fills `opt` and `rest`; --help prints the launcher's $usage.
parse() {
  local name values switches
  read -ra values <<< "$1"
  read -ra switches <<< "$2"
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --help) printf "%s\n" "${usage:?}"; exit ;;
      --) rest=("${@:2}"); return ;;
      --*) name=${1%%=*}; name=${name#--} ;;
      *) die "unexpected argument '$1'; options are written --name=value, those of scripts/train.py after --" ;;
    esac
    if [[ " ${switches[*]} " == *" $name "* ]]; then
      [ "$1" = "--$name" ] || die "--$name takes no value"
      opt[$name]=1
    elif [[ " ${values[*]} " == *" $name "* ]]; then
      [[ $1 == *=?* ]] || die "--$name needs a value: --$name=…"
      opt[$name]=${1#*=}
    else
      die "unknown option '--$name'$(nearest "--$name" "${values[@]/#/--}" "${switches[@]/#/--}")"
    fi
    shift
  done
}

# positive NAME: dies unless the option is a whole number from 1 on.
positive() {
  [[ ${opt[$1]} =~ ^[1-9][0-9]*$ ]] || die "--$1 is '${opt[$1]}'; it takes a whole number from 1 on"
}

# check_training ARGUMENT…: what can be known to be wrong with scripts/train.py's options before a machine is paid for.
check_training() {
  local arg before='' config='' workdir=''
  for arg in "$@"; do
    case $before in --config) config=$arg ;; --workdir) workdir=$arg ;; esac
    case $arg in --config=*) config=${arg#*=} ;; --workdir=*) workdir=${arg#*=} ;; esac
    before=$arg
  done
  [ -n "$config" ] || die "no --config=… for scripts/train.py; its options come after --"
  [ -n "$workdir" ] || die "no --workdir=… for scripts/train.py; its options come after --"
  if [[ $workdir =~ ^[A-Za-z][A-Za-z0-9+.-]*:/ ]]; then
    die "workdir '$workdir' is a URL; runs write local files: mount the bucket (gcsfuse) or a shared disk and give its folder, see docs/scale.md"
  fi
}

# quote WORD…: one line that a shell reads back as the same words.
quote() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# run WORD…: does a command, or prints it in a dry run.
run() {
  if [ -n "${opt[dry-run]:-}" ]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@" 3>&-
  fi
}
