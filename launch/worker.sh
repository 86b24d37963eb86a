#!/usr/bin/env bash
# Runs a command on one worker of a TPU slice so that it outlives the connection; tpu_vm.sh calls it there.
#
#   launch/worker.sh start COMMAND...   starts it, with a log; refuses while an earlier one runs
#   launch/worker.sh state              prints one line: none, running, or exit N
#   launch/worker.sh log                prints the end of the log, and what is added to it
#   launch/worker.sh --dry-run ...      prints what it would do, does nothing
#
# The files lie in ~/sapr_jax_run.

set -euo pipefail

SCRIPT=launch/worker.sh
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$CHECKOUT/launch/common.sh"
FOLDER=$HOME/sapr_jax_run

# Holds the lock (descriptor 9) as long as the command runs: a stale process number cannot deceive.
supervise() {
  local status=0
  "$@" 9>&- || status=$?
  printf '%s\n' "$status" >"$FOLDER/status.new"
  mv "$FOLDER/status.new" "$FOLDER/status"
}

start() {
  (($#)) || fail "there is no command to start."
  if [[ $DRY_RUN == 1 ]]; then
    printf '%s >>%s 2>&1 &\n' "$(quote "$@")" "$(quote "$FOLDER/log")"
    return
  fi
  require_tools flock setsid
  mkdir -p "$FOLDER"
  exec 9>"$FOLDER/lock"
  flock -w "${LOCK_SECONDS:-5}" 9 || fail "a run is under way on this worker already."
  printf 'lost\n' >"$FOLDER/status" # until it ends; what a killed supervisor leaves behind
  printf '%s\n' "\$ $(quote "$@")" >>"$FOLDER/log"
  setsid "${BASH_SOURCE[0]}" supervise "$@" </dev/null >>"$FOLDER/log" 2>&1 &
}

state() {
  local status
  if [[ ! -f $FOLDER/status ]]; then
    echo "none"
  elif ! flock -n "$FOLDER/lock" true; then
    echo "running"
  else
    status=$(cat "$FOLDER/status")
    echo "exit ${status/lost/137}" # as if killed: it may be tried again
  fi
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in
  --help | -h) print_help "$0" ;;
  start) start "${@:2}" ;;
  supervise) supervise "${@:2}" ;;
  state) if [[ $DRY_RUN == 1 ]]; then run cat "$FOLDER/status"; else state; fi ;;
  log) run tail -n 100 -F "$FOLDER/log" ;;
  *) fail "unknown subcommand '${1:-}'; --help lists them." ;;
esac
