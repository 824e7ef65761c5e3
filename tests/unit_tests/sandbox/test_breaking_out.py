"""Programs that try to get out of the sandbox, or to bring down the machine."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from tests.sandboxed import SMALL, isolated, run

# Each line prints what the attempt came to; a caught error is a refusal.
ATTEMPTS = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
KEYS, CLONE = (248, 56) if os.uname().machine == "x86_64" else (217, 220)

def attempt(name, act):
    try:
        result = act()
    except BaseException as error:
        result = "refused"
    print(name, "refused" if result == "refused" else f"DONE {result!r}")

def errno(result):
    if result == -1:
        raise OSError(ctypes.get_errno())
    return result

def connect(family, address):
    with socket.socket(family) as opened:
        opened.settimeout(1)
        opened.connect(address)

SECRET, PORT, PARENT, ABSTRACT = sys.stdin.read().split("\\n")
attempt("read a file outside", lambda: open(SECRET).read())
attempt("read passwords", lambda: open("/etc/passwd").read())
attempt("list homes", lambda: os.listdir("/home") or os.listdir(os.path.dirname(SECRET)))
attempt("write outside", lambda: open(SECRET, "w"))
attempt("write to the system", lambda: open("/usr/new", "w"))
attempt("write to the interpreter", lambda: open(sys.executable, "ab"))
attempt("write to the root", lambda: open("/new", "w"))
attempt("write to shared memory", lambda: open("/dev/shm/new", "w"))
attempt("make a device", lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(254, 0)))
os.symlink(SECRET, "/tmp/link")
attempt("read through a link", lambda: open("/tmp/link").read())
attempt("read through the root of another", lambda: open("/proc/1/root" + SECRET).read())
attempt("climb out", lambda: open("/tmp/" + "../" * 20 + SECRET.lstrip("/")).read())
attempt("change the root", lambda: os.chroot("/tmp"))
attempt("mount", lambda: errno(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None)))
attempt("unmount", lambda: errno(libc.umount2(b"/proc", 2)))
attempt("make the system writable", lambda: errno(libc.mount(None, b"/usr", None, 32 | 4096, None)))
attempt("new user namespace", lambda: errno(libc.unshare(0x10000000)))
attempt("join the first namespace", lambda: errno(libc.setns(os.open("/proc/1/ns/mnt", 0), 0)))
attempt("become root", lambda: os.setuid(0))
attempt("use the network", lambda: connect(socket.AF_INET, ("127.0.0.1", int(PORT))))
attempt("reach an address", lambda: connect(socket.AF_INET, ("1.1.1.1", 53)))
attempt("ask for a name", lambda: socket.getaddrinfo("example.org", 80))
attempt("use a socket by name", lambda: connect(socket.AF_UNIX, "\\0" + ABSTRACT))
attempt("see the parent", lambda: os.kill(int(PARENT), 0))
attempt("kill the first process", lambda: os.kill(1, 9) or "refused")  # ignored by the kernel
attempt("trace the first process", lambda: errno(libc.ptrace(16, 1, 0, 0)))
attempt("read its memory", lambda: open("/proc/1/mem", "rb").read(1))
attempt("read its files", lambda: os.listdir("/proc/1/fd"))
attempt("open the keyboard", lambda: open("/dev/tty"))
attempt("change the host name", lambda: socket.sethostname("x"))
attempt("raise a limit", lambda: __import__("resource").setrlimit(0, (-1, -1)))
attempt("raise the priority", lambda: os.nice(-5))
attempt("memory of no process", lambda: errno(libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600)))
attempt("a file of no folder", lambda: os.memfd_create("x"))
attempt("messages of no process", lambda: errno(libc.msgget(0, 0o1600)))
attempt("semaphores of no process", lambda: errno(libc.semget(0, 1, 0o1600)))
attempt("keep a key", lambda: errno(libc.syscall(KEYS, b"user", b"name", b"secret", 6, -3)))
attempt("the host of the machine", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("the kernel's cryptography", lambda: socket.socket(38, socket.SOCK_SEQPACKET))
attempt("a ring of calls", lambda: errno(libc.syscall(425, 8, ctypes.create_string_buffer(200))))
attempt("a clone in a namespace", lambda: errno(libc.syscall(CLONE, 0x20000000 | 17, 0, 0, 0, 0)))
numbers = {int(name) for name in os.listdir("/proc") if name.isdigit()}
print("processes", sorted(numbers) == [1, os.getpid()])
files = sorted(os.listdir("/proc/self/fd"))
print("files", files[:3] == ["0", "1", "2"], len(files))
print("environment", sorted(os.environ))
"""


def test_no_attempt_gets_out(tmp_path: Path) -> None:
    isolated()
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == secret.owner() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        abstract = f"attempt-{os.getpid()}"
        named.bind("\0" + abstract)
        named.listen()
        port = server.getsockname()[1]
        outcome = run(ATTEMPTS, stdin=f"{secret}\n{port}\n{os.getpid()}\n{abstract}")
    lines = outcome.stdout.decode().splitlines()
    assert outcome.end == "exit", outcome
    attempts, facts = lines[:-3], lines[-3:]
    assert len(attempts) == ATTEMPTS.count("\nattempt(")
    assert [line for line in attempts if not line.endswith(" refused")] == []
    assert facts[0] == "processes True"
    assert facts[1].startswith("files True 4")  # the fourth lists them
    assert "'HOME'" in facts[2]
    assert len(facts[2].split(",")) == 7
    assert secret.read_text() == "the secret"
    assert not Path("/usr/new").exists()


def test_the_same_program_gets_at_everything_without_the_sandbox(tmp_path: Path) -> None:
    """The attempts would work: it is the sandbox that refuses them."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        abstract = f"attempt-{os.getpid()}"
        named.bind("\0" + abstract)
        named.listen()
        port = server.getsockname()[1]
        safe = [
            line
            for line in ATTEMPTS.splitlines()
            if not line.startswith("attempt(")
            or any(
                f'"{name}"' in line
                for name in (
                    "read a file outside",
                    "use the network",
                    "use a socket by name",
                    "see the parent",
                    "read passwords",
                )
            )
        ]
        source = "\n".join(safe).replace('os.symlink(SECRET, "/tmp/link")', "")
        done = subprocess.run(
            [sys.executable, "-c", source],
            input=f"{secret}\n{port}\n{os.getpid()}\n{abstract}",
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    assert done.count("DONE") == 5, done


def test_a_fork_bomb_ends() -> None:
    outcome = run("import os\nwhile True:\n    os.fork()", replace(SMALL, wall_seconds=4))
    # Each fork beyond the limit fails, in all of them; what is left ends with the first process.
    assert outcome.end in ("exit", "processes", "time")
    assert b"Resource temporarily unavailable" in outcome.stderr or outcome.end == "processes"


def test_threads_count_as_processes() -> None:
    source = "import threading, time\nfor _ in range(50):\n"
    source += "    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()"
    outcome = run(source)
    assert outcome.end == "exit"
    assert b"can't start new thread" in outcome.stderr


def test_memory_has_a_limit_in_one_process_and_in_all() -> None:
    assert b"MemoryError" in run("x = bytearray(1 << 29)").stderr
    source = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if os.fork() == 0:\n"
        "        break\n"
        "x = b'x' * (100 << 20)\n"
        "time.sleep(50)"
    )
    assert run(source).end == "memory"


def test_endless_work_and_endless_waiting_end() -> None:
    assert run("while True: pass", replace(SMALL, cpu_seconds=1)).end == "time"
    assert run("import time; time.sleep(99)", replace(SMALL, wall_seconds=1)).end == "time"
    ignoring = "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    ignoring += "    except OSError: pass\nwhile True: pass"
    assert run(ignoring, replace(SMALL, cpu_seconds=1)).end == "time"


def test_a_flood_of_output_ends() -> None:
    for stream in ("stdout", "stderr"):
        outcome = run(f"import sys\nwhile True: sys.{stream}.write('x' * 100000)")
        assert outcome.end == "output"
        assert len(getattr(outcome, stream)) == SMALL.output_bytes


def test_a_program_that_kills_its_group_ends_alone() -> None:
    outcome = run("import os; os.kill(0, 9)")
    assert (outcome.end, outcome.code) in (("stopped", None), ("time", -9))
    assert run("print(7)").stdout == b"7\n"


def test_what_keeps_a_program_from_starting_is_said() -> None:
    outcome = run("", stdin="x" * (SMALL.disk_bytes + 1))
    assert outcome.code == 127
    assert b"the sandbox: [Errno 28] No space left on device" in outcome.stderr


def test_files_have_a_limit() -> None:
    one = run("open('big', 'wb').write(bytes(32 << 20))")
    assert one.code != 0
    many = "for i in range(8): open(f'{i}', 'wb').write(bytes(2 << 20))"
    assert b"No space left on device" in run(many).stderr
    count = "for i in range(9999): open(f'{i}', 'wb')"
    assert b"No space left on device" in run(count).stderr


def test_no_process_outlives_its_program() -> None:
    marker = f"outlives-{os.getpid()}"
    source = (
        "import os, sys, time\n"
        "for number in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            sleep = 'import time; time.sleep(60)'\n"
        f"            os.execv(sys.executable, [sys.executable, '-c', sleep, {marker!r}])\n"
        "        os._exit(0)\n"
        "for _ in range(500):\n"
        "    time.sleep(0.02)\n"
        "    waiting = [n for n in os.listdir('/proc') if n.isdigit()\n"
        f"        and {marker!r} in open(f'/proc/{{n}}/cmdline').read()]\n"
        "    if len(waiting) == 3: break\n"
        "print(len(waiting))"
    )
    outcome = run(source)
    assert outcome.end == "exit"
    assert int(outcome.stdout) == 3, outcome
    alive = [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]
    assert alive == []


def test_a_program_ends_with_the_process_that_started_it() -> None:
    isolated()
    marker = f"orphan-{os.getpid()}"
    source = (
        "from megatron_dlm.sandbox.process import Limits, Program, run_programs\n"
        f"program = Program({{}}, ['-c', 'import time; time.sleep(60)', {marker!r}])\n"
        "run_programs([program], Limits(), isolated=True)\n"
    )

    def alive() -> list[psutil.Process]:
        # The last part alone: the starting process has the text in its source.
        return [
            p for p in psutil.process_iter(["cmdline"]) if marker == (p.info["cmdline"] or [""])[-1]
        ]

    starting = subprocess.Popen([sys.executable, "-c", source])
    deadline = time.monotonic() + 60
    while not alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive()
    starting.kill()
    starting.wait()
    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == []


def test_programs_do_not_see_each_other() -> None:
    source = "open('mine', 'w'); import os; print(sorted(os.listdir('/tmp')))"
    first, second = run(source), run(source)
    assert first.stdout == second.stdout == b"['mine', 'program.py']\n"
