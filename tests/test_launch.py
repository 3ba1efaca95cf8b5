# SPDX-License-Identifier: Apache-2.0
"""The launchers: what they would do, with stand-ins for the programs that they call, and what they make of failures."""

import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import hypothesis
import jsonschema
import pytest
import yaml
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCHEMAS = ROOT / "tests" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = {"NAME": "mine", "ZONE": "here", "TYPE": "v5litepod-16", "BUCKET": "my bucket", "POLL": "0"}
GKE = {
    "NAME": "mine",
    "IMAGE": "registry/jft:1",
    "BUCKET": "my-bucket",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "SLICES": "2",
    "POLL": "0",
}
TRAIN = ["jft", "train", "--config=configs/sft.py:llama3.1-8b"]
# Letters, what shells read, what YAML and Kubernetes read, spaces, lines.
WORDS = st.lists(
    st.text(st.sampled_from("ab =:$(){}'\"\\!*#&;|<>~`%,-é🙂\n\t") | st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    max_size=4,
)  # fmt: skip


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XLA_FLAGS"))}
    return subprocess.run(
        ["bash", "-c", script], env=environ | variables, capture_output=True, text=True, timeout=60
    )


def launch(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    runner = f"{sys.executable} " if name.endswith(".py") else ""
    return bash(f"{runner}{shlex.quote(str(LAUNCH / name))} {shlex.join(arguments)}", **variables)


def calls(dry_run: str) -> list[list[str]]:
    """The programs and words that a dry run's output calls when a shell reads it, which it must be fit for."""
    tools = ("env", "sbatch", "srun", "gcloud", "git")
    show = "printf '%s\\0' $(($# + 1)) {0} \"$@\""
    stand_ins = "".join(f"{t}() {{ {show.format(t)}; }}\n" for t in tools)
    done = bash(f"set -e\n{stand_ins}{dry_run}")
    assert not done.returncode, done.stderr
    words, found = iter(done.stdout.split("\0")[:-1]), []
    for count in words:
        found.append([next(words) for _ in range(int(count))])
    return found


def manifest(dry_run: str) -> Any:
    """The manifest that a dry run hands to kubectl."""
    done = bash(f"kubectl() {{ cat; }}\n{dry_run}")
    return yaml.safe_load(done.stdout)


def dry_run(name: str, *arguments: str, **variables: str) -> str:
    done = launch(name, "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script: pathlib.Path) -> None:
    checker = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_command_the_example_is_shown(script: pathlib.Path) -> None:
    done = launch(script.name)
    assert done.returncode == 2
    assert f"launch/{script.name}" in done.stderr and "jft train --config=" in done.stderr


@hypothesis.settings(max_examples=3, deadline=None)
@hypothesis.given(WORDS)
@hypothesis.example(
    ["", "it's", 'say "x = $HOME"', "a  b", "--config.lora.targets=.*/(q|k)$", "$(date) $$"]
)
def test_the_command_comes_through_as_it_was(words: list[str]) -> None:
    """Word for word, in what each launcher would run."""
    command = [*TRAIN, *words]
    for call in calls(dry_run("local.py", "--processes=2", *command)):
        assert call[-len(command) :] == command
    assert calls(dry_run("gpu.sh", *command))[0][-len(command) :] == command
    submit, run = calls(dry_run("slurm.sh", "--nodes=2", "--comment=a b", *command))
    assert submit[1:3] == ["--nodes=2", "--comment=a b"]
    assert submit[-len(command) :] == run[-len(command) :] == command
    (pod,) = containers(manifest(dry_run("gke.sh", *command, **GKE)))
    assert [word.replace("$$", "$") for word in pod["command"]] == command
    start = calls(dry_run("tpu_vm.sh", *command, **TPU))[-2][-1]
    inner = start[start.index("nohup ") : start.index("; echo $? >code")]
    assert calls(inner.replace("nohup", "env", 1)) == [["env", *command]]


def containers(jobset: Any) -> list[Any]:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]["containers"]


def schema(name: str) -> Any:
    return yaml.safe_load((SCHEMAS / f"{name}_schema.yaml").read_text())


def test_the_jobset_is_one() -> None:
    found = manifest(dry_run("gke.sh", *TRAIN, **GKE))
    jsonschema.validate(found, schema("jobset"))
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 4, 4)
    assert "cloud.google.com/gke-spot" not in spec["template"]["spec"]["nodeSelector"]
    spot = manifest(dry_run("gke.sh", *TRAIN, **GKE, SPOT="1"))
    jsonschema.validate(spot, schema("jobset"))
    assert "gke-spot" in str(spot)
    # What ends the JobSet is what jft ends with for bad input, in the container that runs it.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "jft", "operator": "In", "values": [2]}
    assert containers(found)[0]["name"] == "jft"
    for key in ("backoffLimits", "template"):
        broken = yaml.safe_load(yaml.safe_dump(found))
        broken["spec"]["replicatedJobs"][0]["template"]["spec"][key] = 0
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema("jobset"))


def test_the_skypilot_task_is_one() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, schema("skypilot"))
    for part in ("setup", "run"):
        done = subprocess.run(
            [pathlib.Path(sys.executable).with_name("shellcheck"), "-s", "bash", "-"],
            input=task[part],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"nodes": 2}, schema("skypilot"))


def test_the_skypilot_task_runs_the_command_on_its_node() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    command = [*TRAIN, '--config.data.system=it\'s $5 = "five"']
    stand_in = "jft() { printf '%s\\0' jft \"$@\"; env | grep ^JFT_ | sort; exit 3; }\n"
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    two = node | {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = bash(stand_in + task["run"], COMMAND=shlex.join(command), **two)
    assert done.returncode == 3
    *words, variables = done.stdout.split("\0")
    assert words == command
    place = ["JFT_COORDINATOR=10.0.0.1:8476", "JFT_PROCESS=1", "JFT_PROCESSES=2"]
    assert variables.split() == place
    # One node, or a TPU pod, which jax finds by itself.
    for alone in ({"SKYPILOT_NUM_NODES": "1"}, two | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}):
        done = bash(stand_in + task["run"], COMMAND=shlex.join(command), **(node | alone))
        assert done.stdout.split("\0")[-1] == ""


def tools(folder: pathlib.Path, **scripts: str) -> dict[str, str]:
    """Programs that stand in for real ones; each appends its words to `calls` first."""
    for name, script in scripts.items():
        path = folder / "tools" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{folder}/calls\n{script}\n')
        path.chmod(0o755)
    return {"PATH": f"{folder}/tools{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder)}


def next_of(path: pathlib.Path) -> str:
    """Shell: the next line of a file, in $next; the last one stays."""
    return f"next=$(head -n1 {path}); if [[ $(wc -l <{path}) -gt 1 ]]; then sed -i 1d {path}; fi"


def called(folder: pathlib.Path) -> str:
    return (folder / "calls").read_text()


def pod(folder: pathlib.Path, states: str, endings: str) -> dict[str, str]:
    """A gcloud whose queued resource goes through `states`; its one host runs what is sent, and jft ends with `endings`."""
    for name, lines in {"states": states, "endings": endings}.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines.split(",")))
    venv = folder / "jft" / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "jft").write_text(
        f'#!/usr/bin/env bash\necho "jft $*" >>{folder}/calls\n{next_of(folder / "endings")}\nexit $next\n'
    )
    (venv / "jft").chmod(0o755)
    gcloud = f"""
case "$*" in
  *"queued-resources describe"*) {next_of(folder / "states")}; echo "$next" ;;
  *jft-ended-with*) cd {folder}; last="${{!#}}"; bash -c "${{last#--command=}}" ;;
esac
exit 0"""
    return TPU | tools(folder, gcloud=gcloud, git="exit 0")


def test_a_preempted_pod_is_made_again_and_gone_on_with(tmp_path: pathlib.Path) -> None:
    states = ",WAITING_FOR_RESOURCES,ACTIVE,SUSPENDED,,PROVISIONING,ACTIVE"
    done = launch("tpu_vm.sh", *TRAIN, "--x=a b", **pod(tmp_path, states, "130,0"))
    assert done.returncode == 0, done.stderr
    order = [
        line.split()[4] if "queued" in line else "jft"
        for line in called(tmp_path).splitlines()
        if line.startswith("jft ") or ("queued" in line and "describe" not in line)
    ]
    assert order == ["create", "jft", "delete", "create", "jft", "delete"]
    assert called(tmp_path).count(f"\njft {shlex.join(TRAIN[1:])} --x=a b") == 2


@pytest.mark.parametrize(
    ("endings", "code", "runs"), [("2", 2, 1), ("75,0", 0, 2), ("134", 134, 2)]
)
def test_a_pod_is_retried_except_after_bad_input(
    endings: str, code: int, runs: int, tmp_path: pathlib.Path
) -> None:
    done = launch("tpu_vm.sh", *TRAIN, **pod(tmp_path, "ACTIVE", endings), RETRIES="1")
    assert done.returncode == code, done.stderr
    assert called(tmp_path).count("\njft train") == runs
    assert (
        called(tmp_path).splitlines()[-1].startswith("gcloud compute tpus queued-resources delete")
    )


def test_a_run_that_goes_on_is_followed_not_started_again(tmp_path: pathlib.Path) -> None:
    variables = pod(tmp_path, "ACTIVE", "0")
    (tmp_path / "jft" / "log").write_text("step 7\n")
    code = shlex.quote(str(tmp_path / "jft" / "code"))  # which a run writes when it ends
    running = bash(f"(sleep 2; echo 0 >{code}) >/dev/null 2>&1 & echo $!").stdout.strip()
    (tmp_path / "jft" / "pid").write_text(running)
    done = launch("tpu_vm.sh", *TRAIN, **variables)
    assert done.returncode == 0 and "step 7" in done.stdout
    assert "\njft train" not in called(tmp_path)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (130, 0, True), (75, 99, True), (75, 100, False), (1, 0, True)],
)
def test_a_slurm_job_goes_back_into_the_queue(
    code: int, restarts: int, requeued: bool, tmp_path: pathlib.Path
) -> None:
    variables = tools(tmp_path, srun=f"exit {code}", scontrol="exit 0", sbatch="exit 0")
    job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    done = launch("slurm.sh", *TRAIN, **variables, **job)
    assert ("scontrol requeue 17" in called(tmp_path)) == requeued
    assert done.returncode == (0 if requeued else code)
    assert f"srun --kill-on-bad-exit=1 {shlex.join(TRAIN)}" in called(tmp_path)


def test_outside_a_job_it_is_handed_to_slurm(tmp_path: pathlib.Path) -> None:
    launch("slurm.sh", "--nodes=2", *TRAIN, **tools(tmp_path, sbatch="exit 0", srun="exit 1"))
    (call,) = called(tmp_path).splitlines()
    assert call == f"sbatch --nodes=2 {LAUNCH}/slurm.sh {shlex.join(TRAIN)}"


@pytest.mark.parametrize(("endings", "code", "runs"), [("2", 2, 1), ("137,75,0", 0, 3), ("137", 137, 4), ("130", 130, 1)])  # fmt: skip
def test_a_killed_run_on_gpus_goes_on(
    endings: str, code: int, runs: int, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "endings").write_text("".join(f"{e}\n" for e in endings.split(",")))
    ending = f"{next_of(tmp_path / 'endings')}; exit $next"
    names = {"nvidia-smi": "exit 0", "jft": "exit 0", "run": ending}
    done = launch("gpu.sh", str(tmp_path / "tools" / "run"), "train", **tools(tmp_path, **names))
    assert done.returncode == code
    assert called(tmp_path).count("run train") == runs


@pytest.mark.parametrize(("states", "deleted"), [(",,Completed", 0), ("Failed,,Completed", 1), ("Completed", 0)])  # fmt: skip
def test_a_jobset_is_followed_to_its_end(states: str, deleted: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states.split(",")))
    kubectl = f"""
case "$*" in
  "get jobset"*) {next_of(tmp_path / "states")}; echo "$next" ;;
  "get pods"*) echo mine-slice-0-0-x ;;
  apply*) cat >/dev/null ;;
esac
exit 0"""
    done = launch("gke.sh", *TRAIN, **GKE, **tools(tmp_path, kubectl=kubectl))
    assert done.returncode == 0, done.stderr
    assert called(tmp_path).count("delete jobset mine") == deleted
    assert called(tmp_path).count("apply -f -") == 1


def local() -> Any:
    spec = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ended", "code", "told"),
    [
        ([(0, 0), (1, 0)], 0, ""),
        ([(0, -6), (1, -9)], 75, "process 1 was killed by SIGKILL"),  # jax aborted process 0
        ([(0, 75), (1, -11)], 75, "process 1 was killed by SIGSEGV"),
        ([(1, -6), (0, -6)], 75, "process 1 was killed by SIGABRT"),
        ([(0, 0), (1, 2)], 2, "exit code 2"),
    ],
)
def test_the_cause_is_told_and_the_code_says_what_to_do(
    ended: list[tuple[int, int]], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local().verdict(ended) == code
    assert told in capsys.readouterr().err


def test_exit_codes_and_signals_of_real_processes(tmp_path: pathlib.Path) -> None:
    """No jax in these: what the launcher itself does."""
    done = launch(
        "local.py", "--devices=3", "sh", "-c", "echo $JFT_PROCESS of $JFT_PROCESSES $XLA_FLAGS"
    )
    assert done.returncode == 0
    flags = "--xla_force_host_platform_device_count=3"
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i} of 2 {flags}" for i in (0, 1)]
    retried = f"if [ -e {tmp_path}/x ]; then exit 0; fi; touch {tmp_path}/x; kill -9 $$"
    done = launch("local.py", "--processes=1", "--retries=1", "sh", "-c", retried)
    assert done.returncode == 0 and "process 0 was killed by SIGKILL" in done.stderr
    assert launch("local.py", "no-such-program").returncode == 2


@pytest.mark.slow
def test_processes_end_with_one_that_dies_and_with_the_launcher() -> None:
    dies = "if [ $JFT_PROCESS = 1 ]; then kill -9 $$; fi; exec sleep 60"
    done = launch("local.py", "sh", "-c", dies)
    assert done.returncode == 75 and "process 1 was killed by SIGKILL" in done.stderr
    waits = "trap 'echo told; exit 130' TERM; echo ready; while true; do sleep 0.1; done"
    command = [sys.executable, LAUNCH / "local.py", "sh", "-c", waits]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert {running.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        running.terminate()
        rest = running.stdout.read().splitlines()
    assert sorted(rest) == ["[0] told", "[1] told"] and running.returncode == 130
