"""A Slurm cluster: a controller and two nodes on loopback, which claim more cores and GPUs than this machine has.

The nodes are called after addresses of loopback, so ranks find the first node by its name, as on any cluster. Nothing
is installed or changed outside of one folder. What runs is Slurm's own daemons and commands.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs


COMMANDS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
NODES = ("127.0.0.1", "127.0.0.2")
CONFIG = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits as long as its credential is valid.
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# A node may claim what the machine does not have.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
GresTypes=gpu
# A node that does not answer for so many seconds is down, and may come back.
SlurmdTimeout=10
ReturnToService=2
KillWait=30
MinJobAge=7200
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={nodes[0]} NodeAddr={nodes[0]} Port={first} CPUs=32 Gres=gpu:4
NodeName={nodes[1]} NodeAddr={nodes[1]} Port={second} CPUs=32 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CAME_UP_S, CHANGED_S, ENDED_S = 60.0, 600.0, 60.0
"""How long the cluster may take to come up, a job to get to its next state, and cancelled jobs to end. Seven imports of
torch take minutes on two cores."""


def missing() -> list[str]:
    """The commands of Slurm that are not installed here."""
    return [name for name in COMMANDS if not shutil.which(name)]


def await_that(what: str, holds: Callable[[], bool], limit_s: float = CHANGED_S) -> None:
    """Wait until something holds. Raises AssertionError after the limit."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)


@attrs.frozen
class Cluster:
    """Slurm in a folder. Its jobs run in `work`, with `mimogrid` of this checkout as the command."""

    folder: Path
    work: Path
    variables: Mapping[str, str]
    daemons: dict[str, "subprocess.Popen[bytes]"]

    def start(self, name: str, *command: str) -> None:
        """Start a daemon, by default the one of the node of that name."""
        command = command or ("slurmd", "-D", "-N", name)
        with (self.folder / f"{name}.said").open("ab") as said:
            self.daemons[name] = subprocess.Popen(
                command, env=self.variables, cwd=self.folder, stdout=said, stderr=said, start_new_session=True
            )

    def run(self, *command: str, **variables: str) -> str:
        """Run a command of Slurm; return what it says."""
        environment = {**self.variables, **variables}
        done = subprocess.run(
            command, env=environment, cwd=self.work, capture_output=True, text=True, check=False
        )
        assert 0 == done.returncode, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, **variables: str) -> str:
        """Submit the batch file; return the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, **variables).strip()

    def fact(self, job: str, key: str) -> str:
        """Return what `scontrol show job` says of a job, such as its JobState."""
        (value,) = re.findall(rf"\b{key}=(\S+)", self.run("scontrol", "show", "job", job, "--oneliner"))
        return str(value)

    def await_state(self, job: str, *states: str) -> None:
        """Wait until a job is in one of these states."""
        await_that(f"job {job} {states}", lambda: self.fact(job, "JobState") in states)

    def ranks(self, node: str) -> set[int]:
        """The ranks that run on a node."""
        variables = self._processes(node).values()
        return {int(mine["RANK"]) for mine in variables if "RANK" in mine}

    def lose(self, node: str) -> None:
        """Kill all that runs on a node: its daemon, the daemons of its steps, and their processes."""
        self.daemons[node].kill()
        mine = set(self._processes(node))
        steps = {step for one in mine for step in _step_of(one)}
        for process in steps | mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def _processes(self, node: str) -> dict[int, dict[str, str]]:
        """The processes of jobs on a node, each with its environment variables."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                variables = dict(word.split("=", 1) for word in words if "=" in word)
                here = (variables.get("SLURM_CONF"), variables.get("SLURMD_NODENAME"))
                if here == (self.variables["SLURM_CONF"], node):
                    found[int(process.name)] = variables
        return found

    def close(self) -> None:
        """Cancel all jobs, and end all that was started; the daemons of steps end with their jobs."""
        with contextlib.suppress(AssertionError):  # there may be no controller that answers
            self.run("scancel", "--user", getpass.getuser())
            await_that("no job is left", lambda: not self.run("squeue", "--noheader"), ENDED_S)
        for node in NODES:
            if node in self.daemons:
                self.lose(node)
        for daemon in self.daemons.values():
            daemon.terminate()
            daemon.wait()


def opened(folder: Path, root: Path) -> Iterator[Cluster]:
    """Open a cluster in an empty folder, with the examples of the checkout `root` to submit; close it at the end."""
    ports = _free_ports(3)
    named = {"controller": ports[0], "first": ports[1], "second": ports[2]}
    text = CONFIG.format(user=getpass.getuser(), folder=folder, nodes=NODES, **named)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    for number in range(4):
        (folder / f"gpu{number}").touch()
    (folder / "state").mkdir()
    work = folder / "work"
    shutil.copytree(root / "examples", work / "examples")
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root / "src"),
        "HOME": os.environ["HOME"],
        "SLURM_CONF": str(folder / "slurm.conf"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    cluster = Cluster(folder, work, variables, {})
    try:
        cluster.start("controller", "slurmctld", "-D")
        for node in NODES:
            cluster.start(node)
        await_that("all nodes are idle", lambda: _are_idle(cluster), CAME_UP_S)
        yield cluster
    finally:
        cluster.close()


def _are_idle(cluster: Cluster) -> bool:
    command = ("scontrol", "show", "nodes", "--oneliner")
    said = subprocess.run(command, env=cluster.variables, capture_output=True, text=True, check=False)
    return len(NODES) == len(re.findall(r"\bState=IDLE\b", said.stdout))


def _step_of(process: int) -> Iterator[int]:
    """Yield the daemon of the step that a process belongs to, if it is its parent."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
            yield parent


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
