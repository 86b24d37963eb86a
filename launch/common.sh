#!/usr/bin/env bash
# What the launch scripts share; they source this file, it does nothing by itself.
set -euo pipefail

DRY_RUN=0

# Ends with one line on standard error and exit status 2, as sapr_jax.main does for bad input.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Prints the comment at the head of a script: its help.
print_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

# Quotes words for a shell, as a person would.
quote() {
  local word separator='' mark="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word=$mark${word//$mark/$escaped}$mark ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs a command; with --dry-run prints it instead.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    quote "$@"
    printf '\n'
  else
    "$@"
  fi
}

# require_variables NAME...: each must be set and not empty.
require_variables() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set; edit it at the top of $SCRIPT, or set it in the environment."
  done
}

# require_tools NAME...: each must be on PATH; a dry run needs none of them.
require_tools() {
  local name
  [[ $DRY_RUN == 1 ]] && return
  for name in "$@"; do
    command -v "$name" >/dev/null || fail "$name is needed and not installed, or not on PATH."
  done
}

# require_config FOLDER: CONFIG must be a file there; a suffix after a colon is an argument of the file.
require_config() {
  local file=${CONFIG%%:*}
  [[ $file == /* ]] || file=$1/$file
  [[ -f $file ]] || fail "the configuration $file is not there; set CONFIG."
}
