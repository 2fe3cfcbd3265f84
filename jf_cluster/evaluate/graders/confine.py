"""Started by ``sandbox.py`` as a script of its own: gives up all rights, then runs one Python program.

Standard library only; no other module of the project is imported here or visible to the program. Usage:
``python confine.py SETTINGS FD COMMAND...``, SETTINGS being the JSON of a ``Confinement``. What became of the program
is written to the file descriptor FD, which the program does not have: ``ended STATUS``, ``late``, or ``refused REASON``
where the system does not allow the confinement asked for.

With namespaces there are four processes. This one leaves the namespaces of its parent and waits. Its child is process
1 of a new process namespace: it builds a root directory of read-only system directories and one small writable tmpfs,
gives up the user and its rights, and waits for the supervisor, whose child is the program. Whatever that does, it
sees three processes, no files of anybody's, and a network without interfaces; when process 1 ends, the kernel ends all.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn, TypedDict

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR = 442
"""The same on every architecture, as all system calls since Linux 5.1."""
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Confinement(TypedDict):
    """What the program may use."""

    namespaces: bool
    uid: int
    """User to become where this process is root; nobody else may have it, so that limits and signals meet no other."""
    root: str
    """An empty directory: the new root with namespaces, the program's working directory without."""
    readable: list[str]
    """Files and directories the program needs, in new roots only."""
    wall_s: float
    cpu_s: int
    memory_bytes: int
    processes: int
    file_bytes: int
    tmpfs_bytes: int


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    _checked(_libc.mount(*arguments), f"mounting {source} on {target}")


def _read_only(path: str) -> None:
    """Make a mount and all below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = _libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), size
    )  # fmt: skip
    _checked(done, f"making {path} read-only")


def _unshare(root: bool) -> None:
    """Leave the namespaces of the parent; without root's rights in a user namespace of our own that grants them."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _checked(_libc.unshare(flags if root else flags | CLONE_NEWUSER), "new namespaces")
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _new_root(settings: Confinement) -> None:
    root = settings["root"]
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    # A limit on inodes too: empty files take memory without taking space.
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={settings['tmpfs_bytes']},nr_inodes=4096,mode=755")
    for path in (*settings["readable"], *DEVICES):
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            target.symlink_to(Path(path).readlink())
            continue
        target.mkdir() if Path(path).is_dir() else target.touch()
        _mount(path, str(target), "", MS_BIND | MS_REC)
        if path not in DEVICES:
            _read_only(str(target))
    for writable in ("/tmp", "/dev/shm"):
        Path(root + writable).mkdir(exist_ok=True)  # there already where this environment lies below it
        Path(root + writable).chmod(0o1777)
    os.chroot(root)
    os.chdir("/tmp")


def _give_up_rights(settings: Confinement, root: bool) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, settings["cpu_s"]),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        # This process, and with namespaces the supervisor, are of the same user.
        (resource.RLIMIT_NPROC, settings["processes"] + 1 + settings["namespaces"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (wanted, wanted))
    if root:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")


def _die_with_parent() -> None:
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "dying with the parent")


def _wait_for(child: int) -> int:
    """Wait for ``child``, reaping whatever else ends meanwhile; its exit status, 128 + the signal that ended it."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _kill_user(uid: int) -> None:
    """End every process of ``uid`` in one call: killed one after the other, they could fork meanwhile."""
    killer = os.fork()
    if killer == 0:
        os.setresuid(uid, uid, uid)
        os.kill(-1, signal.SIGKILL)
        os._exit(0)
    # All of them are this process's children, whose parents were killed: when none is left, they have ended.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _supervise(command: list[str], settings: Confinement, root: bool, report: int) -> int:
    """Confine this process, run the program, give its exit status."""
    try:
        if settings["namespaces"]:
            _new_root(settings)
        else:
            os.chown(settings["root"], settings["uid"], settings["uid"])
            os.chdir(settings["root"])
        _give_up_rights(settings, root)
        _die_with_parent()  # after the change of user, which forgets it
    except OSError as error:
        _say(report, f"refused {error.strerror}")
        return 1
    if settings["namespaces"]:
        # Process 1 is immune to signals from inside. A program that kills its parent shall be seen to have done so.
        supervisor = os.fork()
        if supervisor != 0:
            return _wait_for(supervisor)
    program = os.fork()
    if program == 0:
        _die_with_parent()
        os.setsid()  # kill(0) is for its own group
        os.execv(command[0], command)
    return _wait_for(program)


def _say(report: int, what: str) -> None:
    os.write(report, f"{what}\n".encode())


def _time_is_up(*_: object) -> NoReturn:
    raise TimeoutError


def main() -> None:
    settings: Confinement = json.loads(sys.argv[1])
    report, command = int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(report, False)
    root = os.geteuid() == 0
    try:
        _die_with_parent()
        # Where memory runs out for the whole machine, this goes first.
        Path("/proc/self/oom_score_adj").write_text("1000")
        if settings["namespaces"]:
            _unshare(root)
        else:
            _checked(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "adopting orphans")
    except OSError as error:
        _say(report, f"refused {error.strerror}")
        return
    child = os.fork()
    if child == 0:
        os._exit(_supervise(command, settings, root, report))
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, settings["wall_s"])
    try:
        _say(report, f"ended {_wait_for(child)}")
    except TimeoutError:
        _say(report, "late")
    if settings["namespaces"]:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and everything in its namespace with it
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # returns when nothing of the namespace is left
    else:
        _kill_user(settings["uid"])


if __name__ == "__main__":
    main()
