"""Isolation by Linux namespaces without bubblewrap: the process that makes them, and outlives everything in them.

Every program has a launcher of its own, which makes user, mount, pid, network, IPC, host-name and cgroup namespaces and
a root folder of read-only binds, and starts process 1, which is `tokensieve.sandbox.supervisor`. If the caller dies,
the kernel kills the launcher, then process 1, then the rest.

An ordinary user is mapped to one user inside. Root is not: the kernel counts no processes of the real root, who may
also read every file that root owns. So the program of root gets a user number that nobody has outside.

Standard library only, see `tokensieve.sandbox.messages`.
"""

import os
import sys

from tokensieve.sandbox import messages, supervisor, syscalls
from tokensieve.sandbox.messages import Report, Request
from tokensieve.sandbox.supervisor import MOST_INODES, USER

SPARE_USERS = 2_000_000_000  # above what distributions, systemd and containers hand out; plus the process number
NOBODY = 65534
ALL_IDS = 1 << 32
HOST = "/host"
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")  # not zero, whose shared mappings are memory without a limit
NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


def main() -> None:
    """The entry: the request comes on stdin, the report goes to stdout."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, syscalls.SIGKILL)
    request = messages.decode_request(sys.stdin.buffer.read())
    os.umask(0o022)
    try:
        supervisor.volunteer()
        _enter_namespaces()
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, syscalls.SIGKILL)  # which a change of credentials clears
        _make_root(request)
        first = os.fork()
    except OSError as error:
        _refuse(error)
        return
    if first == 0:
        _first(request)
    else:
        os.waitpid(first, 0)
        os._exit(0)


def _refuse(error: OSError) -> None:
    report = Report("refused", err=str(error.strerror).encode())
    sys.stdout.buffer.write(messages.encode_report(report))


def _first(request: Request) -> None:
    """Process 1."""
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, syscalls.SIGKILL)
        flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        # While the host's /proc can still be seen: the kernel mounts no fresh one for whoever has none in full.
        syscalls.mount("proc", "/proc", "proc", flags, "subset=pid")
        syscalls.unmount(HOST)
        os.rmdir(HOST)
        syscalls.set_mount_attributes("/", syscalls.MOUNT_ATTR_RDONLY, recursive=False)
    except OSError as error:
        _refuse(error)
        return
    supervisor.supervise(request, beside=2)  # this process and its parent


def _spare_id(table: str) -> int | None:
    """A user or group number that nobody has, if the caller may map one; `table` is the caller's own map."""
    for line in table.splitlines():
        first, _, count = map(int, line.split())
        for number in (SPARE_USERS + os.getpid(), NOBODY):
            if first <= number < first + count and (count >= ALL_IDS - 1 or number == NOBODY):
                return number
    return None


def _read_text(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    spare_user = _spare_id(_read_text("/proc/self/uid_map")) if user == 0 else None
    spare_group = _spare_id(_read_text("/proc/self/gid_map")) if user == 0 else None
    if spare_user is None or spare_group is None:
        syscalls.unshare(NAMESPACES)
        _map_ids("self", f"{USER} {user} 1", f"{USER} {group} 1")
        return
    os.setgroups([])
    _unshare_as_mapped_by_child(f"0 {user} 1\n{USER} {spare_user} 1", f"0 {group} 1\n{USER} {spare_group} 1")


def _map_ids(process: int | str, users: str, groups: str) -> None:
    _write_text(f"/proc/{process}/setgroups", "deny")
    _write_text(f"/proc/{process}/uid_map", users)
    _write_text(f"/proc/{process}/gid_map", groups)


def _unshare_as_mapped_by_child(users: str, groups: str) -> None:
    """More than one user can only be mapped from outside of the new namespace: by a child that stays there."""
    ready, go = os.pipe()
    here = os.getpid()
    helper = os.fork()
    if helper == 0:
        number = 0
        os.close(go)  # or it would wait for itself
        try:
            if os.read(ready, 1):
                _map_ids(here, users, groups)
        except OSError as error:
            number = error.errno or 1
        finally:
            os._exit(number)
    try:
        syscalls.unshare(NAMESPACES)
        os.write(go, b"1")
    finally:
        os.close(go)
        os.close(ready)
        number = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if number:
        raise OSError(number, f"uid_map: {os.strerror(number)}")


def _bind(path: str, attributes: int) -> None:
    source = HOST + path
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(path):
            _write_text(path, "")
    syscalls.mount(source, path, None, syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.set_mount_attributes(path, attributes | syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID)


def _make_root(request: Request) -> None:
    """A new root folder: binds of the host to read, a work folder in memory; the host's own stays at HOST for now."""
    plain = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("root", "/tmp", "tmpfs", plain, "size=1m,nr_inodes=1024,mode=755")
    os.chdir("/tmp")
    os.mkdir("." + HOST)
    syscalls.pivot_root(".", "." + HOST)
    os.chdir("/")
    for path in request.binds:
        _bind(path, syscalls.MOUNT_ATTR_NODEV)
    for path in request.hidden:
        syscalls.mount("hidden", path, "tmpfs", plain | syscalls.MS_RDONLY, "size=4k,nr_inodes=2,mode=755")
    os.mkdir("/dev")
    for path in DEVICES:
        _bind(path, syscalls.MOUNT_ATTR_NOEXEC)
    for target, path in zip(request.links[::2], request.links[1::2]):
        os.symlink(target, path)
    for folder in ("/proc", "/tmp"):
        os.mkdir(folder)
    options = f"size={request.disk_bytes},nr_inodes={MOST_INODES},mode=1777"
    syscalls.mount("work", "/tmp", "tmpfs", plain, options)
    syscalls.set_host_name("sandbox")
