"""The files for schedulers: each is parsed, its commands are accepted, and its scripts run with stand-ins for what only a cluster has."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from elastic.cli.main import app
from tests.conftest import Leftovers
from tests.etcd_cluster import cluster

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
TARGET = f"{ROOT / 'examples' / 'plain.py'}:main"
PODS = ("kubernetes-statefulset.yaml", "kubernetes-jobset.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def agent_options(text: str) -> dict[str, Any]:
    """The options of the one `elastic agent` in a command or script, as the command reads them. Raises if it does not."""
    line = text.replace("\\\n", " ")
    (command,) = [part for part in line.splitlines() if "elastic agent " in part]
    words = shlex.split(command.split("elastic agent ", 1)[1].rstrip(" &"))
    agent = typer.main.get_command(app).get_command(None, "agent")
    return agent.make_context("agent", words).params


def pod_specs(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What makes pods, and the pods' specification."""
    for each in documents(name):
        if each["kind"] == "StatefulSet":
            yield each, each["spec"]["template"]["spec"]
        elif each["kind"] == "JobSet":
            for job in each["spec"]["replicatedJobs"]:
                yield job, job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", PODS)
def test_pods_have_the_volumes_that_they_mount_and_commands_that_are_accepted(name: str) -> None:
    agents = []
    for _, pod in pod_specs(name):
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert all(isinstance(word, str) for word in container["command"])
        if container["name"] == "agent":
            (mount,) = container["volumeMounts"]
            (secret,) = (volume["secret"] for volume in pod["volumes"])
            assert secret["defaultMode"] & 0o077 == 0, "the agent refuses a secret that others can read"
            words = container["command"]
            agents.append(agent_options(words[-1] if words[0] == "bash" else shlex.join(words)))
            assert str(agents[-1]["secret_file"]).startswith(mount["mountPath"] + "/")
    (options,) = agents
    assert options["target"] == "train.py:train"


def test_a_stateful_set_and_its_services_fit_each_other() -> None:
    found = documents("kubernetes-statefulset.yaml")
    services = {each["metadata"]["name"]: each["spec"] for each in found if each["kind"] == "Service"}
    for each in (each for each in found if each["kind"] == "StatefulSet"):
        spec = each["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert services[spec["serviceName"]]["selector"] == labels
    hosts, etcd = found[3]["spec"], found[1]["spec"]
    options = agent_options(hosts["template"]["spec"]["containers"][0]["command"][-1])
    assert options["hosts_min"] == hosts["replicas"]
    assert options["etcd"] == f"{found[1]['metadata']['name']}-0.{etcd['serviceName']}:2379"
    assert f"--advertise-client-urls=http://{options['etcd']}" in etcd["template"]["spec"]["containers"][0]["command"]


def test_a_job_set_names_what_it_has() -> None:
    (found,) = documents("kubernetes-jobset.yaml")
    jobs = {job["name"]: job["template"]["spec"] for job in found["spec"]["replicatedJobs"]}
    assert set(found["spec"]["successPolicy"]["targetReplicatedJobs"]) <= set(jobs)
    (container,) = jobs["hosts"]["template"]["spec"]["containers"]
    options = agent_options(shlex.join(container["command"]))
    assert options["hosts_min"] == jobs["hosts"]["parallelism"] == jobs["hosts"]["completions"]
    assert options["etcd"] == f"{found['metadata']['name']}-etcd-0-0.{found['metadata']['name']}:2379"
    rules = jobs["hosts"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule] == [container["name"]]


def test_skypilot_has_what_its_script_reads() -> None:
    (task,) = documents("skypilot.yaml")
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "file_mounts", "setup", "run"}
    options = agent_options(task["run"].replace('"$SKYPILOT_NUM_NODES"', str(task["num_nodes"])))
    assert options["hosts_min"] == task["num_nodes"]
    assert str(options["secret_file"]) in task["file_mounts"]


def scripts() -> dict[str, str]:
    found = {"slurm": (DEPLOY / "slurm.sbatch").read_text(), "skypilot": documents("skypilot.yaml")[0]["run"]}
    found["stateful set"] = documents("kubernetes-statefulset.yaml")[3]["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    return found


@pytest.mark.parametrize("name", scripts())
def test_a_script_is_one_of_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def standins(folder: Path, **commands: str) -> dict[str, str]:
    """The environment of a script, in which these commands are found first: `elastic` of this checkout, and stand-ins."""
    folder.mkdir()
    elastic = f'exec {sys.executable} -m elastic.cli.main "$@"'
    for name, body in {"elastic": elastic, **commands}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


SRUN = """
while [[ $1 == --* ]]; do echo "$1" >> srun-options; shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & done
code=0
for each in $(jobs -p); do wait "$each" || code=$?; done
exit $code
"""


@pytest.mark.long
def test_the_slurm_script_runs_a_job(tmp_path: Path, leftovers: Leftovers) -> None:
    """With a stand-in for srun, which starts the nodes' parts here."""
    environment = standins(tmp_path / "bin", srun=SRUN)
    nodes = {"SLURM_JOB_NAME": "gpt", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "WORKERS": "1", "ETCD_ADDRESS": "127.19.4.1"}
    done = subprocess.run(
        ["bash", DEPLOY / "slurm.sbatch", TARGET],
        cwd=tmp_path,
        env=environment | nodes,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    digests = [line for line in done.stdout.splitlines() if line.startswith('"')]
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert (tmp_path / "runs" / "gpt" / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.long
def test_the_slurm_script_queues_a_job_again_that_lost_nodes(tmp_path: Path, leftovers: Leftovers) -> None:
    environment = standins(tmp_path / "bin", srun="exit 75", scontrol='echo "$@"')
    nodes = {"SLURM_JOB_NAME": "gpt", "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "ETCD_ADDRESS": "127.19.4.2"}
    command = ["bash", DEPLOY / "slurm.sbatch", TARGET]
    done = subprocess.run(command, cwd=tmp_path, env=environment | nodes, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (75, "requeue 17\n")


@pytest.mark.long
def test_the_skypilot_script_runs_a_job(tmp_path: Path, leftovers: Leftovers) -> None:
    (task,) = documents("skypilot.yaml")
    script = task["run"].replace("train.py:train", shlex.quote(TARGET)).replace("--workers 4", "--workers 1")
    (tmp_path / "elastic-secret").write_text("a" * 64)
    machines = {"HOME": str(tmp_path), "SKYPILOT_NODE_IPS": "127.19.4.3\n127.19.4.4", "SKYPILOT_NUM_NODES": "2"}
    environment = standins(tmp_path / "bin") | machines
    started = [
        subprocess.Popen(
            ["bash", "-c", script],
            env=environment | {"SKYPILOT_NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [each.communicate(timeout=200) for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [0, 0], said
    digests = [line for out, _ in said for line in out.splitlines() if line.startswith('"')]
    assert len(digests) == 2
    assert len(set(digests)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("code", "stays"), [(0, True), (2, True), (75, False), (143, False)])
def test_a_pod_of_the_stateful_set_ends_if_it_should_be_started_again(tmp_path: Path, code: int, stays: bool) -> None:
    pod = subprocess.Popen(
        ["bash", "-c", scripts()["stateful set"]],
        env=standins(tmp_path / "bin", elastic=f"exit {code}"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if not stays:
            assert pod.wait(30) == code
            return
        assert pod.stdout is not None
        assert pod.stdout.readline() == f"the agent has ended with {code}\n"
        assert pod.poll() is None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)
        pod.communicate()


@pytest.mark.slow
def test_a_pod_that_is_deleted_waits_until_its_agent_has_left(tmp_path: Path) -> None:
    agent = "trap 'echo leaves; exit 143' TERM; echo ready; while true; do sleep 0.05; done"
    pod = subprocess.Popen(
        ["bash", "-c", scripts()["stateful set"]],
        env=standins(tmp_path / "bin", elastic=agent),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    killer = threading.Timer(30, lambda: os.killpg(pod.pid, signal.SIGKILL))
    killer.start()
    try:
        assert pod.stdout is not None
        assert pod.stdout.readline() == "ready\n"
        pod.terminate()
        assert pod.stdout.readline() == "leaves\n"
        assert pod.wait(30) == 143
    finally:
        killer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)  # its agent too, which would keep the pipe open
        pod.communicate()


@pytest.mark.long
def test_ray_runs_a_job(tmp_path: Path, leftovers: Leftovers) -> None:
    pytest.importorskip("ray")
    words = [TARGET, "--nodes", "2", "--workers", "1", "--strategy", "PACK"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with cluster(tmp_path / "etcd") as etcd, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as short:  # it has sockets in it
        done = subprocess.run(
            [sys.executable, str(DEPLOY / "ray_hosts.py"), *words, "--etcd", etcd.addresses],
            env=os.environ | {"PYTHONPATH": path, "RAY_TMPDIR": short},
            capture_output=True,
            text=True,
            timeout=230,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "exit codes of the hosts: [0, 0]" in done.stdout
