"""A SLURM cluster on this machine: Debian's slurmctld, and a slurmd per node in a network namespace of its own.

Every node has its own address behind a bridge, its own host name, hosts file and link, which a test may cut; they share
the machine's file system, as the nodes of a cluster share one. Names, addresses and ports are the lab's own, so that
several labs may run side by side. Needs root, and `apt-get install slurmctld slurmd slurm-client munge iproute2`.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "nsenter", "unshare")

_CONF = """\
ClusterName=lab
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
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
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PropagateResourceLimits=NONE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
BatchStartTimeout=10
MaxArraySize=9
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr={net}.[11-{last}] Port=6818 CPUs=8 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
"""


def unavailable() -> str | None:
    """Why there can be no lab on this machine; None where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM cluster of network namespaces needs root"
    if missing:
        return (
            f"a SLURM cluster needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    links = "ip link add name probe type bridge && ip link add name ends type veth peer name b"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "sh", "-c", links], capture_output=True, text=True)
    return f"no network namespaces with bridges here: {probe.stderr.strip()}" if probe.returncode else None


class Lab:
    """The cluster; `close` ends every process that it started.

    Args:
        folder: for its state and logs; short, for a socket lies in it.
        nodes: node1, node2, ...
    """

    def __init__(self, folder: Path, nodes: int = 4):
        self.folder, self.nodes = folder, nodes
        self._tag = f"mr{os.getpid()}"
        self._net = f"10.{130 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.environment = {"SLURM_CONF": f"{folder}/slurm.conf"}
        for left in {path.name.partition("-")[0] for path in Path("/run/netns").glob("mr*-*")}:
            if not Path(f"/proc/{left.removeprefix('mr')}").exists():  # a lab whose tests were killed
                _take_down(left)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for i in range(4):  # pretended GPUs: /dev/null under another name
            os.mknod(self.folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gpus = f"NodeName=node[1-{self.nodes}] Name=gpu File={self.folder}/gpu[0-3]"
        self._write("gres.conf", f"AutoDetect=off\n{gpus}\n")
        settings = {"host": socket.gethostname(), "net": self._net, "port": _free_port(), "folder": self.folder}
        self._write("slurm.conf", _CONF.format(**settings, nodes=self.nodes, last=10 + self.nodes))
        names = "".join(f"{self._net}.{10 + i} node{i}\n" for i in range(1, self.nodes + 1))
        self._write("hosts", f"127.0.0.1 localhost\n{names}")
        # No look-ups that wait for a network.
        self._write("nsswitch.conf", "hosts: files\npasswd: files\ngroup: files\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        paths = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/{file}" for name, file in paths.items()]
        _do("munged", "--force", f"--key-file={key}", *options)
        _do("ip", "link", "add", self._tag, "type", "bridge")
        _do("ip", "addr", "add", f"{self._net}.1/24", "dev", self._tag)
        _do("ip", "link", "set", self._tag, "up")
        for i in range(1, self.nodes + 1):
            space = f"{self._tag}-{i}"
            _do("ip", "netns", "add", space)
            _do("ip", "link", "add", f"{self._tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _do("ip", "link", "set", f"{self._tag}v{i}", "master", self._tag, "up")
            _do("ip", "-n", space, "link", "set", "lo", "up")
            _do("ip", "-n", space, "addr", "add", f"{self._net}.{10 + i}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")
            (self.folder / f"spool-node{i}").mkdir()
        _do("slurmctld", "-f", self.environment["SLURM_CONF"])
        for i in range(1, self.nodes + 1):
            self.start_slurmd(i)
        wait_for(
            lambda: self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == str(self.nodes),
            30,
            self.log,
        )

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def run(self, *command: str) -> str:
        """What a SLURM command prints; raises CalledProcessError where it fails."""
        return _do(*command, environment=self.environment)

    def start_slurmd(self, node: int) -> None:
        """Start a node's daemon: at first, and after `kill_node`."""
        script = (
            f"hostname node{node} && mount --bind {self.folder}/hosts /etc/hosts"
            f" && mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf && exec slurmd -N node{node}"
        )
        space = f"--net=/run/netns/{self._tag}-{node}"
        _do("nsenter", space, "unshare", "--uts", "--mount", "sh", "-c", script, environment=self.environment)

    def kill_node(self, node: int) -> None:
        """Kill a node's daemon and all that runs on the node: what the loss of a machine is to the others."""
        _kill_all_in(f"{self._tag}-{node}")

    def on_node(self, node: int, *command: str) -> None:
        """Run a command as root in a node's namespaces."""
        daemon = (self.folder / f"slurmd-node{node}.pid").read_text().strip()
        _do("nsenter", f"--target={daemon}", "--net", "--mount", *command)

    def cut(self, node: int) -> None:
        """Cut a node's link; what runs there goes on."""
        _do("ip", "link", "set", f"{self._tag}v{node}", "down")

    def mend(self, node: int) -> None:
        """Undo `cut`."""
        _do("ip", "link", "set", f"{self._tag}v{node}", "up")

    def state(self, job: str) -> str:
        """A job's state in SLURM's words."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split()[0]

    def log(self) -> str:
        """The end of what the daemons wrote, for a test that fails."""
        return "".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End the nodes with all that runs on them, the controller and munge, and take the network down."""
        _take_down(self._tag)
        for name in ("slurmctld.pid", "munged.pid"):
            if (self.folder / name).exists():
                os.kill(int((self.folder / name).read_text()), signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float, told: Callable[[], str] = str) -> None:
    """Until a condition holds; fails with what `told` says after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def _do(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=60
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def _take_down(tag: str) -> None:
    """End all that runs in a lab's namespaces, and remove them and the bridge."""
    for space in Path("/run/netns").glob(f"{tag}-*"):
        _kill_all_in(space.name)
        subprocess.run(["ip", "netns", "del", space.name], check=False)
    subprocess.run(["ip", "link", "del", tag], check=False, capture_output=True)


def _kill_all_in(space: str) -> None:
    inode = Path(f"/run/netns/{space}").stat().st_ino
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _namespace(process) == inode:
            os.kill(int(process.name), signal.SIGKILL)


def _namespace(process: Path) -> int | None:
    try:
        return (process / "ns" / "net").stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended meanwhile; it is not ours
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
