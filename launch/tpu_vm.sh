#!/usr/bin/env bash
# Runs an experiment on a TPU VM, or on all workers of a TPU slice, with Google Cloud's command line (gcloud).
#
#   launch/tpu_vm.sh [--dry-run] SUBCOMMAND [-- ARGUMENTS OF sapr_jax.main]
#
#   create   makes the TPU VM
#   setup    on all workers: copies this checkout, installs it, mounts NFS_SHARE
#   run      starts the experiment on all workers, detached
#   status   prints the state of the node, and of the run on each worker: none, running, exit N
#   logs     follows the log of worker 0 (WORKER=3 for another)
#   resume   does what is missing for the run to go on: create and setup if the node is gone or was preempted, then run
#   watch    resumes again and again, until the run is finished (0), or fails in a way that another try does not fix
#   fetch    copies the work directory without its checkpoints to RESULTS, on this machine
#   delete   deletes the TPU VM, and with it all that is not on NFS_SHARE
#
#   TPU_NAME=r50 TPU_ZONE=us-west4-a launch/tpu_vm.sh watch -- --config.model.dtype=bfloat16
#
# Give run, resume and watch the same arguments each time: the run goes on only with the configuration it began with.
#
# The work directory must be a directory of a POSIX file system that all workers see and that outlives the VM, such as a
# Filestore instance or another NFS server in the network of the VM (NFS_SHARE). A name such as gs://bucket/run does not
# do: records, configuration and lock are plain files. A bucket mounted by gcsfuse does half: on a bucket without
# hierarchical namespace it renames directories in many steps, so that a checkpoint is not written in one piece, and
# its locks hold on one worker only. Without NFS_SHARE a single-host VM keeps its run on its own disk, until it is
# deleted or preempted. Data may well come from a bucket: SETUP_COMMAND can mount one, on all workers.
#
# For a slice of several workers run `ssh-add ~/.ssh/google_compute_engine` before: gcloud asks for it.

set -euo pipefail

# Edit here, or set these in the environment.
TPU_NAME=${TPU_NAME:-}                               # name of the node
TPU_ZONE=${TPU_ZONE:-}                               # such as us-west4-a
TPU_PROJECT=${TPU_PROJECT:-}                         # unset: the project that gcloud is set to
TPU_TYPE=${TPU_TYPE:-v5litepod-8}                    # see gcloud compute tpus accelerator-types list
TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5-lite}      # software of the VM; it depends on the type
TPU_SPOT=${TPU_SPOT:-1}                              # 1: spot capacity, cheap and preemptible; 0: on demand
CONFIG=${CONFIG:-configs/resnet50_imagenet.py}       # the experiment
NFS_SHARE=${NFS_SHARE:-}                             # such as 10.0.0.2:/share; unset: nothing is mounted
MOUNT=${MOUNT:-/mnt/sapr_jax}                        # where it is mounted
WORKDIR=${WORKDIR:-}                                 # on the workers; unset: $MOUNT/runs/<config>
RESULTS=${RESULTS:-}                                 # for fetch, on this machine; unset: runs/<TPU_NAME>
EXTRAS=${EXTRAS:-tfds,imagenet}                      # of the package
PYTHON_VERSION=${PYTHON_VERSION:-3.12}               # fetched by uv: the VMs' own may be older than 3.11
SETUP_COMMAND=${SETUP_COMMAND:-}                     # a shell command for all workers, at the end of setup
POLL_SECONDS=${POLL_SECONDS:-60}                     # how often watch looks
MAX_FAULTS=${MAX_FAULTS:-3}                          # watch gives up after as many faults one after the other
WORKER=${WORKER:-0}                                  # for logs

SCRIPT=launch/tpu_vm.sh
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$CHECKOUT/launch/common.sh"

tpu() {
  local action=$1
  shift
  run gcloud compute tpus tpu-vm "$action" "$@" "--zone=$TPU_ZONE" ${TPU_PROJECT:+"--project=$TPU_PROJECT"}
}

# on_workers WHICH COMMAND: runs a shell command on all workers, or on one.
on_workers() {
  tpu ssh "$TPU_NAME" "--worker=$1" "--command=$2"
}

create() {
  local spot=
  [[ $TPU_SPOT == 0 ]] || spot=--spot
  tpu create "$TPU_NAME" "--accelerator-type=$TPU_TYPE" "--version=$TPU_VERSION" ${spot:+"$spot"}
}

# The parts are chained, as bash forgets `set -e` in what is called from a condition.
setup() {
  local archive=$CHECKOUT/build/sapr_jax_$TPU_NAME.tar.gz
  run mkdir -p "$CHECKOUT/build" &&
    run tar -C "$CHECKOUT" --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs -czf "$archive" . &&
    tpu scp "$archive" "$TPU_NAME:sapr_jax.tar.gz" --worker=all &&
    run rm "$archive" &&
    on_workers all "$(setup_command)"
}

# The shell command that sets up one worker; doing it again does no harm.
setup_command() {
  # shellcheck disable=SC2016  # the worker's home
  local uv='"$HOME/.local/bin/uv"' steps=(
    "set -e"
    "mkdir -p sapr_jax && tar -xzf sapr_jax.tar.gz -C sapr_jax"
    "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv"
  )
  steps+=("$uv venv --quiet --allow-existing --python $(quote "$PYTHON_VERSION") sapr_jax/.venv")
  steps+=("$uv pip install --quiet --python sapr_jax/.venv/bin/python -e $(quote "./sapr_jax[$EXTRAS]") 'jax[tpu]'")
  if [[ -n $NFS_SHARE ]]; then
    local mount share
    mount=$(quote "$MOUNT") share=$(quote "$NFS_SHARE")
    steps+=("command -v mount.nfs >/dev/null || sudo apt-get -qq install -y nfs-common")
    steps+=("sudo mkdir -p $mount")
    steps+=("mountpoint -q $mount || sudo mount -t nfs -o hard $share $mount")
    steps+=("test -w $mount || sudo chmod a+rwx $mount")
  fi
  [[ -z $SETUP_COMMAND ]] || steps+=("$SETUP_COMMAND")
  local step separator=''
  for step in "${steps[@]}"; do
    printf '%s%s' "$separator" "$step"
    separator=$'\n'
  done
}

start_run() {
  local command=(.venv/bin/python -u -m sapr_jax.main --distributed --config "$CONFIG" --workdir "$WORKDIR" "$@")
  [[ -n $NFS_SHARE ]] || echo "note: without NFS_SHARE the run is lost with the VM, and a slice cannot share it." >&2
  on_workers all "cd sapr_jax && launch/worker.sh start $(quote "${command[@]}")"
}

# Prints the state of the node, GONE if there is none; fails if Google Cloud does not answer.
node_state() {
  local answer
  if answer=$(tpu describe "$TPU_NAME" '--format=value(state)' 2>&1); then
    printf '%s\n' "${answer##*$'\n'}" # warnings come before it
  elif [[ $answer == *NOT_FOUND* || $answer == *"was not found"* ]]; then
    echo GONE
  else
    printf '%s\n' "$answer" >&2
    return 1
  fi
}

# Prints a line for each worker: none, running, or exit N.
run_states() {
  on_workers all 'if [ -x sapr_jax/launch/worker.sh ]; then sapr_jax/launch/worker.sh state; else echo none; fi'
}

# Sums the workers up: running, none, or the exit status that counts most: what must not be tried again, a fault, 75, 0.
summary() {
  local line found=' ' status=
  while read -r line; do
    line=${line//$'\r'/}
    case $line in
      none | running) found+="$line " ;;
      'exit '[0-9]*)
        line=${line#exit }
        found+="$line "
        case $line in
          0 | 2 | 3 | 75 | 130) ;;
          *) status=$line ;;
        esac
        ;;
    esac
  done
  case $found in
    ' ') echo unknown ;;
    *' running '*) echo running ;;
    *' 2 '*) echo 2 ;;
    *' 3 '*) echo 3 ;;
    *' 130 '*) echo 130 ;;
    *' none '*) echo none ;;
    *) if [[ -n $status ]]; then echo "$status"; elif [[ $found == *' 75 '* ]]; then echo 75; else echo 0; fi ;;
  esac
}

# Makes the node and starts the run; deletes first what is left of an earlier node in state $1.
renew() {
  local state=$1
  shift
  { [[ $state == GONE ]] || remove; } && create && setup && start_run "$@"
}

remove() {
  tpu delete "$TPU_NAME" --quiet
}

# Looks once and does what follows. Sets `verdict`: under_way, retry, or the exit status to end with.
faults=0
step() {
  local node states ended
  verdict=retry
  node=$(node_state) || return 0
  case $node in
    GONE | PREEMPTED | TERMINATED | STOPPED)
      echo "the node is $node: making it again"
      faults=0
      if renew "$node" "$@"; then verdict=under_way; else echo "the node could not be made or set up"; fi
      return
      ;;
    READY) ;;
    *)
      echo "the node is $node: waiting"
      return
      ;;
  esac
  if ! states=$(run_states 2>&1); then
    echo "the workers cannot be reached"
    return
  fi
  ended=$(summary <<<"$states")
  case $ended in
    unknown) ;;
    running) verdict=under_way ;;
    0)
      echo "the run is finished"
      verdict=0
      ;;
    2 | 3 | 130)
      echo "the run ended with exit status $ended, which another try does not fix; see logs"
      verdict=$ended
      ;;
    none)
      echo "the node has no run: setting it up"
      if setup && start_run "$@"; then
        verdict=under_way
      else
        faults=$((faults + 1))
        echo "it could not be set up or started, fault $faults of $MAX_FAULTS on this node"
        ((faults < MAX_FAULTS)) || verdict=1
      fi
      ;;
    75)
      echo "the run was interrupted with all saved: going on"
      faults=0
      if start_run "$@"; then verdict=under_way; else echo "it could not be started"; fi
      ;;
    *)
      faults=$((faults + 1))
      echo "the run ended with exit status $ended, fault $faults of $MAX_FAULTS on this node"
      if ((faults >= MAX_FAULTS)); then
        verdict=$ended
      elif start_run "$@"; then
        verdict=under_way
      else
        echo "it could not be started"
      fi
      ;;
  esac
}

resume() {
  if [[ $DRY_RUN == 1 ]]; then
    show_resume "$@"
    return
  fi
  step "$@"
  case $verdict in
    under_way) ;;
    retry) return 1 ;;
    *) return "$verdict" ;;
  esac
}

watch() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '# every %s seconds, until the run is finished:\n' "$POLL_SECONDS"
    show_resume "$@"
    return
  fi
  while :; do
    step "$@"
    [[ $verdict == under_way || $verdict == retry ]] || return "$verdict"
    sleep "$POLL_SECONDS"
  done
}

show_resume() {
  tpu describe "$TPU_NAME" '--format=value(state)'
  echo "# if it was preempted:"
  remove
  echo "# then, or if it is gone:"
  create
  setup
  start_run "$@"
  echo "# if it is there:"
  run_states
  echo "# if the run was interrupted (75), or had a fault:"
  start_run "$@"
}

status() {
  if [[ $DRY_RUN == 1 ]]; then
    tpu describe "$TPU_NAME" '--format=value(state)'
    run_states
    return
  fi
  local node
  node=$(node_state)
  echo "node: $node"
  [[ $node != READY ]] || run_states
}

fetch() {
  local archive=sapr_jax_run/results.tar.gz
  run mkdir -p "$RESULTS"
  on_workers 0 "tar -C $(quote "$WORKDIR") --exclude=./checkpoints -czf $archive ."
  tpu scp "$TPU_NAME:$archive" "$RESULTS/results.tar.gz" --worker=0
  run tar -C "$RESULTS" -xzf "$RESULTS/results.tar.gz"
  run rm "$RESULTS/results.tar.gz"
}

subcommand=
while (($#)); do
  case $1 in
    --help | -h) print_help "$0" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    create | setup | run | status | logs | resume | watch | fetch | delete)
      [[ -z $subcommand ]] || fail "two subcommands, $subcommand and $1; arguments of sapr_jax.main come after --."
      subcommand=$1
      ;;
    -*) fail "unknown argument '$1'; arguments of sapr_jax.main come after --, and --help says more." ;;
    *) fail "unknown subcommand '$1'; expected create, setup, run, status, logs, resume, watch, fetch or delete." ;;
  esac
  shift
done
[[ -n $subcommand ]] || fail "a subcommand is missing; --help lists them."
case $subcommand in
  run | resume | watch) require_config "$CHECKOUT" ;;
  *) (($# == 0)) || fail "$subcommand takes no arguments of sapr_jax.main; run, resume and watch do." ;;
esac
require_variables TPU_NAME TPU_ZONE TPU_TYPE TPU_VERSION CONFIG MOUNT
for number in MAX_FAULTS POLL_SECONDS; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "$number=${!number} is not a number."
done
require_tools gcloud tar
name=$(basename "${CONFIG%%:*}" .py)
WORKDIR=${WORKDIR:-$MOUNT/runs/$name}
RESULTS=${RESULTS:-$CHECKOUT/runs/$TPU_NAME}
case $WORKDIR in
  *://*) fail "WORKDIR=$WORKDIR is not a directory; it must lie on a file system that the workers mount (--help)." ;;
esac

case $subcommand in
  create) create ;;
  setup) setup ;;
  run) start_run "$@" ;;
  status) status ;;
  logs) on_workers "$WORKER" "sapr_jax/launch/worker.sh log" ;;
  resume) resume "$@" ;;
  watch) watch "$@" ;;
  fetch) fetch ;;
  delete) remove ;;
esac
