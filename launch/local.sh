#!/usr/bin/env bash
# Runs an experiment on this machine: one process drives all its GPUs (or its TPU chips, or its CPU).
#
#   launch/local.sh [--restart] [--dry-run] [-- ARGUMENTS OF sapr_jax.main]
#
#   launch/local.sh -- --config.seed=1
#   CONFIG=configs/resnet50_imagenet.py WORKDIR=runs/r50 GPUS=0,1 launch/local.sh --restart
#
# Running it again resumes the run where it was. Ctrl-C or SIGTERM saves and stops. Output is also appended to LOG.
#
#   --restart   start again when the process was interrupted from elsewhere with all saved (exit status 75)
#   --dry-run   print the command, run nothing
#
# The exit status is that of sapr_jax.main: 0 finished, 75 interrupted with all saved, 2 bad input, 3 divergence.

set -euo pipefail

# Edit here, or set these in the environment.
CONFIG=${CONFIG:-configs/resnet56_cifar10.py} # the experiment
WORKDIR=${WORKDIR:-}                          # its work directory; unset: runs/<name of the config>
PYTHON=${PYTHON:-}                            # unset: .venv/bin/python of the checkout if it is there, else python3
GPUS=${GPUS:-}                                # which, such as 0,1; unset: all
LOG=${LOG:-}                                  # unset: <work directory>.log, beside it

SCRIPT=launch/local.sh
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$CHECKOUT/launch/common.sh"

restart=0
while (($#)); do
  case $1 in
    --help | -h) print_help "$0" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --restart) restart=1 ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument '$1'; arguments of sapr_jax.main come after --, and --help says more." ;;
  esac
  shift
done

require_config "$CHECKOUT"
name=$(basename "${CONFIG%%:*}" .py)
WORKDIR=${WORKDIR:-$CHECKOUT/runs/$name}
LOG=${LOG:-${WORKDIR%/}.log}
if [[ -z $PYTHON ]]; then
  PYTHON=python3
  [[ ! -x $CHECKOUT/.venv/bin/python ]] || PYTHON=$CHECKOUT/.venv/bin/python
fi
# Relative names are the caller's; the command runs in the checkout, where CONFIG is.
[[ $WORKDIR == /* ]] || WORKDIR=$PWD/$WORKDIR
[[ $LOG == /* ]] || LOG=$PWD/$LOG
[[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
require_tools "$PYTHON" tee

environment=(PYTHONUNBUFFERED=1)
[[ -z $GPUS ]] || environment+=("CUDA_VISIBLE_DEVICES=$GPUS")
command=(env "${environment[@]}" "$PYTHON" -m sapr_jax.main --config "$CONFIG" --workdir "$WORKDIR" "$@")

if [[ $DRY_RUN == 1 ]]; then
  run cd "$CHECKOUT"
  run mkdir -p "$(dirname "$LOG")"
  printf '%s 2>&1 | tee -i -a %s\n' "$(quote "${command[@]}")" "$(quote "$LOG")"
  [[ $restart == 0 ]] || printf '# and again as long as the exit status is 75\n'
  exit
fi

cd "$CHECKOUT"
mkdir -p "$(dirname "$LOG")"
exec 3>&1 4>&2 > >(exec tee -i -a "$LOG") 2>&1
tee=$!

# The process gets a group of its own, so that Ctrl-C reaches it once, by the traps.
set -m
stopping=0
signalled=0
child=
# shellcheck disable=SC2329  # the traps call it
forward() {
  stopping=1
  signalled=1
  [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'forward INT' INT
trap 'forward TERM' TERM

while :; do
  printf '%s\n' "\$ $(quote "${command[@]}")"
  "${command[@]}" </dev/null &
  child=$!
  [[ $stopping == 0 ]] || kill -TERM "$child" # the signal came before there was a process
  while :; do # a signal ends `wait` early
    signalled=0 status=0
    wait "$child" || status=$?
    [[ $signalled == 1 ]] || break
  done
  child=
  printf 'exit status %s\n' "$status"
  [[ $status == 75 && $restart == 1 && $stopping == 0 ]] || break
  sleep 1 # whoever interrupts it at once cannot make this spin
done

exec >&3 2>&4 3>&- 4>&-
wait "$tee" || true
exit "$status"
