"""Start one program in namespaces of its own; runs as a script and needs the standard library only.

python -s -P launcher.py STATUS < job.json

The job has `files` (text by name), `python` and its `arguments`, `stdin`, `limits`, `prefixes`
(folders of the interpreter), and `folder`: null, or where the program runs without isolation. One
line of JSON goes to the file descriptor STATUS: how the program ended, or why it could not start.

    launcher   new user, mount, PID, network, IPC, UTS and cgroup namespaces
    └ PID 1    mounts the private file system, counts memory and processes, reports how it ended
      └ PID 2  limits set, capabilities dropped, system calls filtered: the program

When PID 1 ends, the kernel kills everything in its namespace; it dies with the launcher, and the
launcher with the process that started it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

# linux/sched.h
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
# linux/mount.h
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, AT_RECURSIVE, DETACH = 1, 2, 0x8000, 2
# The number of the call on every architecture; it came with Linux 5.12.
MOUNT_SETATTR = 442
# linux/prctl.h
PDEATHSIG, DUMPABLE, CAPBSET_DROP, NO_NEW_PRIVS, CAP_AMBIENT, CLEAR_ALL = 1, 4, 24, 38, 47, 4
SECCOMP, FILTER = 22, 2

# linux/audit.h
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}
# Numbers of system calls on x86_64, and on the other two (asm-generic/unistd.h).
REFUSED_CALLS = {
    # Memory that belongs to no process, so that no limit counts it.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Keyrings, which namespaces do not separate: a store that outlives the program.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Other namespaces, and large parts of the kernel that no program needs.
    "unshare": (272, 97),
    "setns": (308, 268),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
CLONE, CLONE3, SOCKETS = (56, 220), (435, 435), ((41, 198), (53, 199))
FAMILIES = (1, 2, 10, 16)
"""Sockets that the network namespace isolates: by name, IPv4, IPv6, and netlink, which resolvers
ask. One of another kind may reach outside (AF_VSOCK: the host of a virtual machine)."""

NOBODY = 65534
INSIDE = 1000
"""User and group of the program, inside."""
HOME = "/tmp"  # a file system of the sandbox's own
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
"""What an interpreter and its shared libraries are made of; read-only, where it exists."""
DEVICES = ("null", "zero", "full", "random", "urandom")
POLL_SECONDS = 0.02

libc = ctypes.CDLL(None, use_errno=True)


class CannotIsolate(Exception):
    """A step that the system refuses."""


def main() -> NoReturn:
    """Read the job, start it, wait for it."""
    status = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    try:
        if job["folder"] is None:
            _run_isolated(job, status)
        _run_in_folder(job, status)
    except (CannotIsolate, OSError) as error:
        _report(status, failure=str(error))
        os._exit(1)


def _report(status: int, **outcome: Any) -> None:
    os.write(status, json.dumps(outcome).encode() + b"\n")


def _call(what: str, result: int) -> None:
    if result != 0:
        raise CannotIsolate(f"{what}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags: int) -> None:
    _call("new namespaces", libc.unshare(flags))


def _mount(
    source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None
) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    data = None if options is None else options.encode()
    result = libc.mount(*arguments, ctypes.c_ulong(flags), data)
    _call(f"mount {kind or source} at {target}", result)


def _run_isolated(job: dict[str, Any], status: int) -> NoReturn:
    """Set up the namespaces, and wait for PID 1."""
    others = NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
    if os.geteuid() == 0 and libc.unshare(NEWNS) == 0:
        # Root's own processes are exempt from the limit of processes, and root reads everything:
        # mount as root, then become somebody else.
        _build_root(job)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(DUMPABLE, 1)  # or /proc/self belongs to root
        _new_user(others | NEWNS)
    else:
        _new_user(NEWNS)
        _build_root(job)
        _unshare(others)
    libc.prctl(PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it
    first = os.fork()
    if first == 0:
        try:
            _be_first(job, status)
        except (CannotIsolate, OSError) as error:
            _report(status, failure=str(error))
        finally:
            os._exit(1)
    os.close(status)
    os.waitpid(first, 0)
    os._exit(0)


def _new_user(flags: int) -> None:
    user, group = os.geteuid(), os.getegid()
    _unshare(NEWUSER | flags)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{INSIDE} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{INSIDE} {group} 1")


def _build_root(job: dict[str, Any]) -> None:
    """A root folder that holds the system's programs and libraries, read-only, and nothing else."""
    _mount("none", "/", flags=REC | PRIVATE)
    # The old root stays at hand, below the new one, until everything is bound.
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
    Path("/tmp/old").mkdir()
    Path("/tmp/new").mkdir()
    _mount("/tmp/new", "/tmp/new", flags=BIND)
    _call("pivot_root", libc.syscall(_pivot_root(), b"/tmp", b"/tmp/old"))
    os.chdir("/")
    for path in dict.fromkeys((*SYSTEM, *job["prefixes"])):
        _bind(path)
    Path("/new/dev").mkdir()
    for name in DEVICES:
        _bind(f"/dev/{name}")
    for name in ("proc", "tmp"):
        Path("/new", name).mkdir()
    _set_read_only("/new")
    _mount("/old/proc", "/new/proc", flags=BIND | REC)  # a new one may be mounted only beside it
    size = job["limits"]["disk_bytes"]
    _mount("tmpfs", "/new/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,size={size},nr_inodes=4096")
    os.chdir("/new")
    _call("pivot_root", libc.syscall(_pivot_root(), b".", b"."))
    _call("leave the old root", libc.umount2(b".", DETACH))
    os.chdir("/")


def _pivot_root() -> int:
    numbers = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
    machine = os.uname().machine
    if machine not in numbers:
        raise CannotIsolate(f"pivot_root: unknown on {machine}")
    return numbers[machine]


def _bind(path: str) -> None:
    """Show a file or folder of the old root at the same place of the new one."""
    old, new = Path("/old" + path), Path("/new" + path)
    if old.is_symlink() and path in SYSTEM:  # /lib -> usr/lib
        new.symlink_to(old.readlink())
        return
    if not old.exists() or (new.exists() and any(new.iterdir())):
        return  # not there, or part of what is bound
    if old.is_dir():
        new.mkdir(parents=True, exist_ok=True)
    else:
        new.parent.mkdir(parents=True, exist_ok=True)
        new.touch()
    _mount(str(old), str(new), flags=BIND | REC)


def _set_read_only(path: str) -> None:
    # Devices stay usable: a read-only mount refuses new files, not writes to /dev/null.
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    result = libc.syscall(
        MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    _call("a read-only system (needs Linux 5.12)", result)


def _be_first(job: dict[str, Any], status: int) -> NoReturn:
    """PID 1: start the program, watch it, report how it ended."""
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    try:
        _mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
        counted = True
        # Or the program makes a user namespace in which it is root.
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    except (CannotIsolate, OSError):
        # A container that hides parts of /proc. The old one must not be seen.
        _mount("tmpfs", "/proc", "tmpfs", NOSUID | NODEV | NOEXEC, "size=0,mode=555")
        counted = False
    libc.prctl(DUMPABLE, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if program == 0:
        os.close(status)
        try:
            _drop_capabilities()
            _filter_system_calls()
            _become(job, HOME)
        except (CannotIsolate, OSError) as error:
            os.write(2, f"the sandbox: {error}\n".encode())
        finally:
            os._exit(127)
    while True:
        ended, code = os.waitpid(-1, os.WNOHANG)
        if ended == program:
            _report(status, code=os.waitstatus_to_exitcode(code))
            os._exit(0)
        if ended:
            continue
        excess = _excess(job["limits"]) if counted else None
        if excess is not None:
            _report(status, excess=excess)
            os._exit(0)
        signal.sigtimedwait({signal.SIGCHLD}, POLL_SECONDS)


def _excess(limits: dict[str, Any]) -> str | None:
    """What all processes together have too much of."""
    page = resource.getpagesize()
    resident = count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != "1":
            count += 1
            try:
                resident += int((folder / "statm").read_text().split()[1]) * page
            except (OSError, IndexError):
                continue  # it has ended
    if resident > limits["memory_bytes"]:
        return "memory"
    return "processes" if count > limits["processes"] else None


def _drop_capabilities() -> None:
    libc.prctl(CAP_AMBIENT, CLEAR_ALL, 0, 0, 0)
    capability = 0
    while libc.prctl(CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    _call("drop capabilities", libc.capset(header, (ctypes.c_uint32 * 6)()))
    _call("no new privileges", libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))


def _filter_system_calls() -> None:
    """Refuse what namespaces and limits do not cover, for this process and all it starts."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise CannotIsolate(f"a filter of system calls: unknown on {machine}")
    generic = machine != "x86_64"
    # Classic BPF (linux/filter.h) over struct seccomp_data: number at 0, architecture at 4, the
    # first argument at 16. Of each step: what it is, jumps if true and if false, a value.
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, ARCHITECTURES[machine]),  # not the calls of a 32-bit program
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # nor x32's, which have this bit
        (answer, 0, 0, kill),
    ]
    for numbers in REFUSED_CALLS.values():
        steps += [(equal, 0, 1, numbers[generic]), (answer, 0, 0, refuse | errno.EPERM)]
    # Its flags are in memory, out of a filter's sight; C libraries then take clone.
    steps += [(equal, 0, 1, CLONE3[generic]), (answer, 0, 0, refuse | errno.ENOSYS)]
    namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    steps += [
        (equal, 0, 4, CLONE[generic]),
        (load, 0, 0, 16),
        (any_bit, 0, 1, namespaces),
        (answer, 0, 0, refuse | errno.EPERM),
        (answer, 0, 0, allow),
    ]
    count = len(FAMILIES)
    steps += [(equal, 1, 0, SOCKETS[0][generic]), (equal, 0, count + 2, SOCKETS[1][generic])]
    steps += [(load, 0, 0, 16)]
    steps += [(equal, count - i, 0, family) for i, family in enumerate(FAMILIES)]
    steps += [(answer, 0, 0, refuse | errno.EAFNOSUPPORT), (answer, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(buffer))
    _call("a filter of system calls", libc.prctl(SECCOMP, FILTER, program, 0, 0))


def _become(job: dict[str, Any], home: str) -> NoReturn:
    """Turn this process into the program."""
    for name, text in job["files"].items():
        Path(home, name).write_bytes(text.encode("utf-8", "surrogatepass"))
    stdin_file = Path(home, ".stdin")
    stdin_file.write_bytes(job["stdin"].encode("utf-8", "surrogatepass"))
    stdin = os.open(stdin_file, os.O_RDONLY)
    stdin_file.unlink()
    os.dup2(stdin, 0)
    os.close(stdin)
    os.chdir(home)
    limits = job["limits"]
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # PID 1 counts too. Without a user namespace, so does every process of the user.
        *([(resource.RLIMIT_NPROC, limits["processes"] + 1)] if job["folder"] is None else []),
    ):
        resource.setrlimit(kind, (value, value))
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    python = job["python"]
    os.execve(python, [python, "-s", "-P", *job["arguments"]], environment)


def _run_in_folder(job: dict[str, Any], status: int) -> NoReturn:
    """Without isolation: limits of single processes, nothing else."""
    home = tempfile.mkdtemp(dir=job["folder"])
    program = os.fork()
    if program == 0:
        os.close(status)
        try:
            _become(job, home)
        except OSError as error:
            os.write(2, f"the sandbox: {error}\n".encode())
        finally:
            os._exit(127)
    _, code = os.waitpid(program, 0)
    _report(status, code=os.waitstatus_to_exitcode(code))
    os._exit(0)


if __name__ == "__main__":
    main()
