"""How the scripts of examples/ start a run: other programs are replaced by what prints its
arguments, but Slurm's are its own where it is installed."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import free_port
from tests.tiny import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
RECIPE = "examples/tiny/opdlm.yaml"
PAGES = [
    REPOSITORY / "README.md",
    EXAMPLES / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
PRINTS = 'printf "%s\\n" "${0##*/}" "$@"'
"""A program that prints its name and arguments, one a line."""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that print how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("torchrun", "sbatch", "srun", "docker", "podman"):
        program(folder / name, PRINTS)
    program(folder / "scontrol", "echo node1; echo node2")
    return folder


def program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


def run(
    programs: Path, *command: object, folder: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with the programs found first, and only these variables."""
    return subprocess.run(
        ["bash", *map(str, command)],
        cwd=folder,
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def launched(programs: Path, *flags: str, **environment: str) -> list[str]:
    """What launch.sh starts, on a node of two processes unless the variables say otherwise."""
    environment = {"NPROC_PER_NODE": "2", **environment}
    done = run(programs, "examples/launch.sh", RECIPE, *flags, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def value(arguments: list[str], option: str) -> str:
    """The argument after an option, which is there once."""
    assert arguments.count(option) == 1, arguments
    return arguments[arguments.index(option) + 1]


def test_one_node_meets_at_a_free_port_of_its_own(programs: Path) -> None:
    arguments = launched(programs, "--seed", "7", SLURM_NODEID="1")  # by srun, each for itself
    assert arguments[0] == "torchrun"
    assert value(arguments, "--nnodes") == "1"
    assert value(arguments, "--nproc-per-node") == "2"
    assert value(arguments, "--max-restarts") == "3"
    assert value(arguments, "--rdzv-backend") == "c10d"
    assert value(arguments, "--rdzv-endpoint") == "127.0.0.1:0"
    assert value(arguments, "--local-addr") == "127.0.0.1"
    assert arguments[-4:] == ["--config", RECIPE, "--seed", "7"]


@pytest.mark.parametrize(("variable", "number"), [("NODE_RANK", "0"), ("SLURM_NODEID", "1")])
def test_several_nodes_meet_at_the_first(programs: Path, variable: str, number: str) -> None:
    node = {"NNODES": "2", "MASTER_ADDR": "node1", variable: number}
    place = {"MASTER_PORT": str(free_port()), "RUN_ID": "17.0", "JOIN_SECONDS": "60"}
    arguments = launched(programs, MAX_RESTARTS="1", **node, **place)
    assert value(arguments, "--rdzv-endpoint") == f"node1:{place['MASTER_PORT']}"
    assert value(arguments, "--rdzv-id") == "17.0"
    is_host = int(number == "0")
    assert value(arguments, "--rdzv-conf") == f"join_timeout=60,read_timeout=60,is_host={is_host}"
    assert "--local-addr" not in arguments


def test_nodes_can_be_numbered(programs: Path) -> None:
    node = {"NNODES": "2", "MASTER_ADDR": "node1", "NODE_RANK": "1"}
    arguments = launched(programs, RDZV_BACKEND="static", **node)
    assert value(arguments, "--node-rank") == "1"
    assert value(arguments, "--rdzv-conf") == "timeout=600"


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3a,GPU-4b", "SLURM_GPUS_ON_NODE": "8"}, "2"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "4"),
        ({}, "6"),
        ({"NPROC_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, "1"),
    ],
)
def test_gpus_of_a_node_are_counted(programs: Path, variables: dict[str, str], gpus: str) -> None:
    program(programs / "nvidia-smi", "for i in {0..5}; do echo GPU $i: NVIDIA B200; done")
    variables = {"NPROC_PER_NODE": "", **variables}
    assert value(launched(programs, **variables), "--nproc-per-node") == gpus


def test_interfaces_are_those_of_nccl_and_gloo(programs: Path) -> None:
    program(programs / "torchrun", "echo $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME")
    assert launched(programs, SOCKET_IFNAME="lo") == ["lo lo"]
    assert launched(programs, SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="=ib0") == ["=ib0 lo"]
    assert launched(programs) == [""]


def test_ranks_have_logs_of_their_own(programs: Path, tmp_path: Path) -> None:
    arguments = launched(programs, NPROC_PER_NODE="3", LOG_DIR=str(tmp_path / "logs"))
    assert value(arguments, "--log-dir") == str(tmp_path / "logs" / os.uname().nodename)
    assert value(arguments, "--redirects") == "3"
    assert value(arguments, "--tee") == "0:3,1:2,2:2"
    assert "--log-dir" not in launched(programs)


def test_software_of_the_user_comes_first(programs: Path, tmp_path: Path) -> None:
    """A file that reads variables which are not set, and a real virtual environment's script."""
    (programs / "torchrun").unlink()
    setup, environment = tmp_path / "setup.sh", tmp_path / "venv"
    setup.write_text('[ -z "$UNSET" ] && export MODEL=models/of-the-module\n')
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    program(environment / "bin" / "torchrun", PRINTS)
    arguments = launched(programs, SETUP_SCRIPT=str(setup), VENV=str(environment))
    assert value(arguments, "--load") == "models/of-the-module"


def test_a_container_gets_devices_folders_and_variables(programs: Path, tmp_path: Path) -> None:
    image = {"CONTAINER_IMAGE": "megatron-dlm", "CONTAINER_MOUNTS": "/data:/data,/opt:/opt:ro"}
    program(programs / "nvidia-smi", "")
    key = {"MEGATRON_DLM_API_KEY": "secret"}
    arguments = launched(programs, "--seed", "7", MODEL="m", HOME="/root", **image, **key)
    assert arguments[:2] == ["docker", "run"]
    given = {name: arguments[i + 1] for i, name in enumerate(arguments) if name.startswith("--")}
    assert (given["--gpus"], given["--network"], given["--ipc"]) == ("all", "host", "host")
    assert given["--workdir"] == str(REPOSITORY)
    mounts = [arguments[i + 1] for i, name in enumerate(arguments) if name == "--volume"]
    assert mounts == [f"{REPOSITORY}:{REPOSITORY}", "/data:/data", "/opt:/opt:ro"]
    variables = [arguments[i + 1] for i, name in enumerate(arguments) if name == "--env"]
    assert sorted(variables) == ["MEGATRON_DLM_API_KEY", "MODEL", "NPROC_PER_NODE"]
    inside = ["megatron-dlm", "bash", str(EXAMPLES / "launch.sh"), RECIPE, "--seed", "7"]
    assert arguments[-6:] == inside
    (programs / "nvidia-smi").unlink()
    arguments = launched(programs, CONTAINER_RUNTIME="podman", CONTAINER_IMAGE="megatron-dlm")
    assert arguments[0] == "podman"
    assert arguments.count("--volume") == 1
    assert "--gpus" not in arguments


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "tiny-opdlm",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


def test_a_slurm_job_starts_the_launcher_on_each_node(programs: Path) -> None:
    names = "NNODES MASTER_ADDR MASTER_PORT RUN_ID LOG_DIR CONTAINER_IMAGE"
    values = " ".join(f"${{{name}-}}" for name in names.split())
    program(programs / "srun", f'echo "{values}"; {PRINTS}')
    done = run(programs, "examples/train.slurm", RECIPE, "--seed", "7", **SLURM)
    variables, *command = done.stdout.splitlines()
    assert variables.split() == ["2", "node1", "20017", "17.0", "logs/tiny-opdlm-17"]
    assert command[-5:] == ["bash", "examples/launch.sh", RECIPE, "--seed", "7"]
    assert command[1:-5] == ["--kill-on-bad-exit=1", "--cpu-bind=none"]

    image = {"CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch", "CONTAINER_MOUNTS": "/data:/data"}
    done = run(programs, "examples/train.slurm", RECIPE, **SLURM, **image)
    variables, *command = done.stdout.splitlines()
    assert len(variables.split()) == 5
    assert value(command, "--container-image") == image["CONTAINER_IMAGE"]
    assert value(command, "--container-workdir") == str(REPOSITORY)
    assert value(command, "--container-mounts") == f"{REPOSITORY}:{REPOSITORY},/data:/data"

    # Without pyxis each node starts a container by itself.
    docker = {**image, "CONTAINER_RUNTIME": "docker"}
    done = run(programs, "examples/train.slurm", RECIPE, **SLURM, **docker)
    variables, *command = done.stdout.splitlines()
    assert variables.split()[-1] == image["CONTAINER_IMAGE"]
    assert "--container-image" not in command


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, ["--nodes", "1", "--gpus-per-node", "8"]),
        ({"GPU": "b200", "NODES": "64"}, ["--nodes", "64", "--gpus-per-node", "8"]),
        (
            {"GPU": "gb200", "NODES": "32", "SEGMENT": "16", "SBATCH_OPTIONS": "--qos high"},
            ["--nodes", "32", "--gpus-per-node", "4", "--segment", "16", "--qos", "high"],
        ),
        ({"GPUS_PER_NODE": "2"}, ["--nodes", "1", "--gpus-per-node", "2"]),
    ],
)
def test_a_job_asks_for_the_gpus_of_its_kind(
    programs: Path, variables: dict[str, str], options: list[str]
) -> None:
    done = run(programs, "examples/submit.sh", RECIPE, "--seed", "7", **variables)
    job = ["sbatch", "--job-name", "tiny-opdlm", *options]
    assert done.stdout.splitlines() == [*job, "examples/train.slurm", RECIPE, "--seed", "7"]


NODES = {"NPROC_PER_NODE": "1", "NNODES": "2"}
FIRST = {**NODES, "MASTER_ADDR": "node1"}


@pytest.mark.parametrize(
    ("script", "variables", "line"),
    [
        ("launch", {"NPROC_PER_NODE": "eight"}, "NPROC_PER_NODE = 'eight': is no whole number"),
        ("launch", {"CUDA_VISIBLE_DEVICES": ""}, "NPROC_PER_NODE = '': is not set, and "),
        ("launch", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "NPROC_PER_NODE = '': is not set"),
        ("launch", {"NNODES": "08"}, "NNODES = '08': is no whole number from 1"),
        ("launch", {"NNODES": "0"}, "NNODES = '0': is no whole number from 1"),
        ("launch", NODES, "MASTER_ADDR = '': is not set, of 2 nodes; set it to the name of the"),
        ("launch", {**FIRST, "NODE_RANK": "2"}, "NODE_RANK = '2': is no whole number from 0 to 1"),
        ("launch", {**FIRST, "MASTER_PORT": "70000"}, "MASTER_PORT = '70000': is no whole number"),
        ("launch", {**FIRST, "RDZV_BACKEND": "etcd"}, "RDZV_BACKEND = 'etcd': is unknown; choose"),
        ("launch", {**FIRST, "RDZV_BACKEND": "static"}, "NODE_RANK = '': is not set; number the"),
        ("launch", {**FIRST, "SOCKET_IFNAME": "lo,ib9"}, "SOCKET_IFNAME = 'lo,ib9': "),
        ("launch", {**NODES, "MAX_RESTARTS": "-1"}, "MAX_RESTARTS = '-1': is no whole number"),
        ("launch", {**NODES, "SAVE_SECONDS": "4m"}, "SAVE_SECONDS = '4m': is no whole number"),
        ("launch", {"VENV": "/no/venv"}, "VENV = '/no/venv': is no virtual environment on "),
        ("launch", {"SETUP_SCRIPT": "/no/file"}, "SETUP_SCRIPT = '/no/file': is no file on "),
        ("launch", {"NPROC_PER_NODE": "1", "LOG_DIR": "/proc/logs"}, "LOG_DIR = '/proc/logs/"),
        (
            "launch",
            {"CONTAINER_IMAGE": "a", "CONTAINER_RUNTIME": "lxc"},
            "CONTAINER_RUNTIME = 'lxc': is unknown; choose one of docker podman",
        ),
        ("submit", {"GPU": "b2000"}, "GPU = 'b2000': is unknown; choose one of h100 h200 b200"),
        ("submit", {"NODES": "many"}, "NODES = 'many': is no whole number from 1"),
        ("submit", {"NODES": "8", "SEGMENT": "3"}, "SEGMENT = '3': does not divide NODES = 8; "),
        ("submit", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE = '0': is no whole number from 1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_variable_that_cannot_work_is_named(
    programs: Path, script: str, variables: dict[str, str], line: str
) -> None:
    check_error(run(programs, f"examples/{script}.sh", RECIPE, **variables), line)


def check_error(done: subprocess.CompletedProcess[str], line: str) -> None:
    """One line with the field, its value and a remedy; nothing is started."""
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: {line}")
    assert "; " in said


def test_what_is_not_there_is_named(programs: Path, tmp_path: Path) -> None:
    done = run(programs, "examples/launch.sh", "none.yaml")
    check_error(done, "none.yaml: not a file; use: examples/launch.sh CONFIG.yaml")
    done = run(programs, EXAMPLES / "submit.sh", RECIPE, folder=tmp_path)
    check_error(done, f"PWD = '{tmp_path}': is not the repository's root; ")
    for name in ("torchrun", "sbatch", "docker"):
        (programs / name).unlink()
    system = {"PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin", "NPROC_PER_NODE": "1"}
    if shutil.which("torchrun", path=system["PATH"]) is None:
        done = run(programs, "examples/launch.sh", RECIPE, **system)
        check_error(done, f"PATH = '{system['PATH']}': has no torchrun; ")
    if shutil.which("sbatch", path=system["PATH"]) is None:
        done = run(programs, "examples/submit.sh", RECIPE, **system)
        check_error(done, f"PATH = '{system['PATH']}': has no sbatch; ")
    if shutil.which("docker", path=system["PATH"]) is None:
        done = run(programs, "examples/launch.sh", RECIPE, CONTAINER_IMAGE="a", **system)
        check_error(done, "CONTAINER_RUNTIME = 'docker': is not installed on ")


def test_a_port_in_use_is_named_on_the_node_that_needs_it(programs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        node = {**FIRST, "MASTER_PORT": str(taken.getsockname()[1])}
        done = run(programs, "examples/launch.sh", RECIPE, NODE_RANK="0", **node)
        check_error(done, f"MASTER_PORT = '{node['MASTER_PORT']}': another process of ")
        assert launched(programs, NODE_RANK="1", **node)


def test_a_node_says_that_the_first_one_is_gone(programs: Path) -> None:
    program(programs / "torchrun", "exit 1")
    with socket.create_server(("127.0.0.1", 0)) as first:
        node = {**FIRST, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first.getsockname()[1])}
        done = run(programs, "examples/launch.sh", RECIPE, NODE_RANK="1", **node)
        assert (done.returncode, done.stderr) == (1, "")
    done = run(programs, "examples/launch.sh", RECIPE, NODE_RANK="1", **node)
    assert done.returncode == 1
    assert done.stderr.startswith("error: MASTER_ADDR = '127.0.0.1': torchrun of that node has ")
    assert done.stderr.endswith("; look at its output, and start all nodes again\n")
    # One whose ranks have left a status knows better.
    program(programs / "torchrun", "echo 75 >$MEGATRON_DLM_STATUS_FILE; exit 1")
    done = run(programs, "examples/launch.sh", RECIPE, NODE_RANK="1", **node)
    assert (done.returncode, done.stderr) == (75, "")


def test_no_node_waits_for_others_once_its_ranks_have_stopped(programs: Path) -> None:
    program(programs / "torchrun", "echo 75 >$MEGATRON_DLM_STATUS_FILE; exec sleep 500")
    node = {**FIRST, "NODE_RANK": "0", "MASTER_PORT": str(free_port()), "JOIN_SECONDS": "1"}
    done = run(programs, "examples/launch.sh", RECIPE, **node)
    assert (done.returncode, done.stderr) == (75, "")


def commands() -> list[str]:
    """Commands of the documentation that start one of the scripts."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"examples/(\w+/train\.sh|launch\.sh|submit\.sh|train\.slurm)", line):
                    found.append(line)
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_documentation_start_what_they_say(
    programs: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    done = run(programs, "-c", command, folder=tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    assert (done.returncode, done.stderr) == (0, ""), command
    assert done.stdout.split("\n", 1)[0] in ("torchrun", "sbatch", "docker"), command
    assert re.search(r"examples/[\w/]+\.yaml\n", done.stdout), command


def test_the_documentation_has_commands_of_each_script() -> None:
    text = "\n".join(commands())
    for script in ("launch.sh", "submit.sh", "train.slurm", "train.sh"):
        assert script in text


CONTROLLER = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/pid
SlurmctldLogFile={folder}/log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
NodeName=b200-[1-64] CPUs=112 RealMemory=2000000 Gres=gpu:b200:8 State=CLOUD
NodeName=gb200-[1-64] CPUs=144 RealMemory=900000 Gres=gpu:gb200:4 State=CLOUD
PartitionName=b200 Nodes=b200-[1-64] State=UP
PartitionName=gb200 Nodes=gb200-[1-64] State=UP
"""
"""Of a cluster of 64 nodes of each kind, which are powered down: it plans jobs, and starts none."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster's users."""
    controller = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if controller is None or shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed (slurmctld and sbatch, of slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "gres.conf").touch()
    file = folder / "slurm.conf"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    file.write_text(CONTROLLER.format(port=free_port(), user=user, folder=folder))
    environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(file)}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [controller, "-D", "-f", str(file)], env=environment, stdout=output, stderr=output
        )
    try:
        while subprocess.run(["sinfo"], env=environment, capture_output=True).returncode:
            if process.poll() is not None:
                pytest.skip(f"slurmctld does not start: {(folder / 'output').read_text()}")
            time.sleep(0.1)
        yield environment
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(("gpu", "gpus", "cpus"), [("b200", 8, 112), ("gb200", 4, 144)])
def test_slurm_takes_jobs_of_one_to_64_nodes(
    cluster: dict[str, str], gpu: str, gpus: int, cpus: int
) -> None:
    def submitted(nodes: int, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**cluster, "GPU": gpu, "NODES": str(nodes), "SBATCH_PARTITION": gpu}
        variables |= {"SBATCH_OPTIONS": "--test-only", **environment}
        command = ["bash", "examples/submit.sh", RECIPE, "--seed", "7"]
        return subprocess.run(
            command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False
        )

    for nodes in (1, 2, 8, 16, 32, 64):
        done = submitted(nodes)
        assert done.returncode == 0, done.stderr
        assert f" using {nodes * cpus} processors on nodes {gpu}-" in done.stderr
    for cannot in (submitted(65), submitted(1, GPUS_PER_NODE=str(gpus + 1))):
        assert cannot.returncode == 1
        assert "Requested node configuration is not available" in cannot.stderr
