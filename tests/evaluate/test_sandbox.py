"""Code that nobody has read: whatever it tries, it does not pass, it reaches nothing, and nothing of it is left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jf_cluster.config import SandboxConfig
from jf_cluster.evaluate.graders import sandbox
from jf_cluster.evaluate.graders.sandbox import SandboxError, run

LIMITS = SandboxConfig(seconds=30)
BRIEF = SandboxConfig(seconds=1)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def _possible() -> bool:
    try:
        sandbox.check(LIMITS)
    except SandboxError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _possible(), reason="namespaces are not allowed on this system")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    left = [p for p in psutil.process_iter(["cmdline"]) if sandbox._PROGRAM in (p.info["cmdline"] or [])]
    # Tests beside these run programs too, which end by themselves.
    _, alive = psutil.wait_procs(left, timeout=40)
    assert not alive


def test_a_program_that_ends_passes_and_one_that_raises_does_not() -> None:
    assert run("import math, json\nassert math.prod([2, 3]) == 6", LIMITS).passed
    outcome = run("x = 1\nassert x == 2, 'no'", LIMITS)
    assert not outcome.passed and outcome.reason == "AssertionError: no"
    assert not run("def broken(:", LIMITS).passed


def test_installed_packages_can_be_imported() -> None:
    assert run("import numpy\nassert numpy.arange(3).sum() == 3", LIMITS).passed


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_ending_early_is_not_passing(program: str) -> None:
    assert not run(program, LIMITS).passed


@pytest.mark.parametrize("who", ["kill(os.getppid(), 9)", "killpg(os.getppid(), 9)", "kill(0, 9)", "kill(-1, 9)"])
def test_killing_the_parent_or_everybody_hurts_nobody_and_does_not_pass(who: str) -> None:
    """The program goes on to its end if it can: that must not count."""
    assert not run(f"import os\nos.{who}", LIMITS).passed


def test_time_is_limited_however_it_is_spent() -> None:
    for program in (
        "while True: pass",
        "import time; time.sleep(600)",
        "import sys\nwhile True: sys.stdout.write('x')",
    ):
        assert not run(program, BRIEF).passed


def test_memory_is_limited() -> None:
    assert run("bytearray(4 << 30)", LIMITS).reason == "MemoryError"
    kept = SandboxConfig(seconds=30, memory_bytes=256 << 20)
    assert run("held = []\nwhile True: held.append(bytearray(1 << 20))", kept).reason == "MemoryError"


def test_a_burst_of_processes_is_bounded_and_gone_afterwards() -> None:
    burst = """
import os, time
made = 0
for _ in range(100):
    try:
        if os.fork() == 0:
            os.setsid()  # away from the group that a plain kill would reach
            if os.fork() == 0:
                time.sleep(600)
            time.sleep(600)
        made += 1
    except OSError:
        raise SystemExit(f"stopped after {made}")
"""
    reason = run(burst, LIMITS).reason
    assert reason.startswith("stopped after ") and int(reason.split()[-1]) < LIMITS.processes


def test_threads_and_processes_left_behind_do_not_outlive_a_program_that_passes() -> None:
    program = """
import os, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
"""
    assert run(program, LIMITS).passed


def test_files_are_limited_in_size_and_altogether() -> None:
    assert "File too large" in run(f"with open('a', 'wb') as f: f.write(bytes({LIMITS.file_bytes + 1}))", LIMITS).reason
    several = f"""
for i in range(3):
    with open(str(i), 'wb') as f: f.write(bytes({LIMITS.file_bytes}))
"""
    assert "No space left" in run(several, LIMITS).reason
    assert "File too large" in run(f"print('x' * {LIMITS.file_bytes + 1}, flush=True)", LIMITS).reason
    assert run("open('a', 'w').write('x')\nassert open('a').read() == 'x'", LIMITS).passed


def test_files_outside_are_neither_read_nor_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o666)
    for program in (f"open({str(secret)!r})", f"open({str(tmp_path / 'new')!r}, 'w')", "open('/etc/hostname')"):
        assert run(program, LIMITS).reason.startswith("FileNotFoundError")
    # Not only by permissions: to whoever is not root, Python's own files may belong.
    for place in ("/usr", sys.base_prefix):
        assert run(f"import os\nassert os.statvfs({place!r}).f_flag & os.ST_RDONLY", LIMITS).passed
    where = Path(sys.base_prefix) / "written-by-a-test"
    assert run(f"open({str(where)!r}, 'w')", LIMITS).reason.startswith(("OSError", "PermissionError"))
    assert not where.exists() and secret.read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_there_is_no_network(tmp_path: Path) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        tcp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0test-{os.getpid()}")
        named.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o777)
        for listening in (tcp, abstract, named):
            listening.listen()
            listening.setblocking(False)
        for connect in (
            f"create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 2)",
            f"socket(socket.AF_UNIX).connect('\\0test-{os.getpid()}')",
            f"socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})",
            "create_connection(('192.0.2.1', 80), 2)",
        ):
            assert not run(f"import socket\nsocket.{connect}", LIMITS).passed
        for listening in (tcp, abstract, named):
            with pytest.raises(BlockingIOError):
                listening.accept()


def test_no_rights_are_left() -> None:
    attempts = """
import ctypes, os
assert os.getuid() != 0 and os.geteuid() != 0
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0
assert libc.unshare(0x10000000) != 0  # a user namespace would give rights again
for forbidden in (lambda: os.chroot("/tmp"), lambda: os.setuid(0), lambda: os.nice(-5)):
    try:
        forbidden()
    except OSError:
        continue
    raise AssertionError("allowed")
"""
    assert run(attempts, LIMITS) == sandbox.Outcome(True, "")


def test_programs_run_side_by_side_without_sharing_limits() -> None:
    passed = []
    program = f"""
import threading, time
for _ in range({LIMITS.processes - 1}):
    threading.Thread(target=time.sleep, args=(1,)).start()
"""
    threads = [threading.Thread(target=lambda: passed.append(run(program, LIMITS).passed)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [True] * 3


@needs_root
def test_without_root_a_user_namespace_does_the_same(tmp_path: Path) -> None:
    """The way of everybody who is not root, tried from a process that has given up being it."""
    tried = tmp_path / "tried.py"
    tried.write_text(
        """
import json, os, sys
from jf_cluster.config import SandboxConfig
from jf_cluster.evaluate.graders.sandbox import run
# Modules come first: what follows may be unreadable to this user.
os.setgroups([]), os.setresgid(54321, 54321, 54321), os.setresuid(54321, 54321, 54321)
limits = SandboxConfig(seconds=30)
programs = ["pass", "import os\\nassert os.getuid() == 54321\\nos.kill(os.getppid(), 9)", "open('/etc/hostname')",
            "import socket; socket.create_connection(('127.0.0.1', 9))", "bytearray(4 << 30)",
            "import os\\nfor _ in range(20):\\n  if os.fork() == 0: import time; time.sleep(600)"]
print(json.dumps([[o.passed, o.reason] for o in (run(p, limits) for p in programs)]))
"""
    )
    environment = {**os.environ, "TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, str(tried)], capture_output=True, text=True, env=environment, check=False)
    if "cannot be confined" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("user namespaces are not allowed here, or Python lies where only root can read it")
    outcomes = json.loads(done.stdout)
    assert [passed for passed, _ in outcomes] == [True, False, False, False, False, False]
    assert outcomes[2][1].startswith("FileNotFoundError") and "unreachable" in outcomes[3][1]
    assert "temporarily unavailable" in outcomes[5][1]


@needs_root
def test_limits_alone_where_there_are_no_namespaces() -> None:
    """Less is promised: a user of its own, limits, and that nothing is left."""
    alone = LIMITS.model_copy(update={"isolation": "limits"})
    try:
        sandbox.check(alone)
    except SandboxError:
        pytest.skip("Python lies where only root can read it")
    assert not run("import os\nos.kill(os.getppid(), 9)", alone).passed
    assert not run("open('/etc/written', 'w')", alone).passed
    assert run("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(600)", alone).passed
    assert not run("import time; time.sleep(600)", alone.model_copy(update={"seconds": 1})).passed


def test_what_the_system_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_readable", lambda _: ("/nowhere",))
    with pytest.raises(SandboxError, match="cannot be confined here"):
        run("pass", LIMITS)
