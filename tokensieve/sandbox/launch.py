"""The isolation that this machine offers for untrusted programs: bubblewrap, namespaces, or none, and why."""

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from tokensieve.config import UserError
from tokensieve.sandbox import messages, namespaces
from tokensieve.sandbox.messages import Report, Request

OLDEST_LINUX = (5, 14)  # processes are counted in each user namespace
OLDEST_BUBBLEWRAP = (0, 8)
GRACE_SECONDS = 10.0  # beyond the program's own limit, until the supervisor itself is given up
SUPERVISOR_MODULES = ("messages", "syscalls", "seccomp", "supervisor")
SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
LINKS = (
    "/tmp",
    "/dev/shm",
    "/proc/self/fd",
    "/dev/fd",
    "fd/0",
    "/dev/stdin",
    "fd/1",
    "/dev/stdout",
    "fd/2",
    "/dev/stderr",
)

# The supervisor without the package's __init__ files, which load much more. Its modules are found in a folder, or
# follow in front of the request: inside bubblewrap the folder is out of sight.
BOOT = """
import sys
kind, modules = type(sys), sys.modules
for name, folder in ("tokensieve", sys.argv[2]), ("tokensieve.sandbox", sys.argv[2] + "/sandbox"):
    modules[name] = kind(name)
    modules[name].__path__ = [folder]
read = sys.stdin.buffer.read
for _ in range(int(sys.argv[3])):
    name, code = (read(int.from_bytes(read(8), "big")).decode() for _ in range(2))
    modules[name] = kind(name)
    setattr(modules["tokensieve.sandbox"], name.rpartition(".")[2], modules[name])
    exec(code, modules[name].__dict__)
__import__(sys.argv[1], fromlist=["main"]).main()
"""


def interpreter() -> str:
    """The Python that runs this, at the path that it has inside too; never the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def visible() -> tuple[list[str], list[str], list[str]]:
    """Paths that a program may read: (binds, links as target, path, ..., hidden folders below binds).

    The system's programs and libraries and this interpreter; no packages of any Python, so that nothing of a project
    that is installed there is seen, nor the folder of this package, nor the caller's home.
    """
    binds, links = ["/usr"], list(LINKS)
    for path in SYSTEM_FOLDERS:
        if os.path.islink(path):
            links = [*links, os.readlink(path), path]
        elif os.path.isdir(path):
            binds.append(path)
    binds += [path for path in SYSTEM_FILES if os.path.exists(path)]
    library = os.path.dirname(sysconfig.get_path("stdlib"))
    for path in (library, interpreter()):
        if not _below(path, binds):
            binds.append(path)
    pattern = "/python3*/*-packages"
    hidden = [path for folder in {"/usr/lib", "/usr/local/lib", library} for path in glob.glob(folder + pattern)]
    own = (str(Path(__file__).resolve().parents[2]), os.path.realpath(os.path.expanduser("~")))
    hidden += [path for path in own if _below(path, binds) and not any(_below(bind, [path]) for bind in binds)]
    return binds, links, sorted({os.path.realpath(path) for path in hidden})


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


@cache
def _bubblewrap() -> str | None:
    """The path of a bubblewrap that can do what is needed."""
    path = shutil.which("bwrap")
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return path if tuple(map(int, re.findall(r"\d+", said)[:2])) >= OLDEST_BUBBLEWRAP else None


def _bubblewrap_command(path: str, request: Request) -> list[str]:
    user = str(namespaces.USER)
    command = [path, "--unshare-user", "--unshare-all", "--uid", user, "--gid", user, "--hostname", "sandbox"]
    command += ["--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for bind in request.binds:
        command += ["--ro-bind", bind, bind]
    for folder in request.hidden:
        command += ["--tmpfs", folder, "--remount-ro", folder]
    for device in namespaces.DEVICES:
        command += ["--dev-bind", device, device]
    for target, link in zip(request.links[::2], request.links[1::2]):
        command += ["--symlink", target, link]
    command += ["--proc", "/proc", "--perms", "1777", "--size", str(request.disk_bytes), "--tmpfs", "/tmp"]
    return [*command, "--chdir", "/tmp", "--remount-ro", "/", "--"]


def launch(kind: str, request: Request) -> tuple[Report | None, str]:
    """Run a request under "bubblewrap" or "namespaces": its report, None if the supervisor died, and its messages."""
    package = Path(__file__).parents[1]
    sources = b""
    if kind == "bubblewrap":
        for name in SUPERVISOR_MODULES:
            sources += messages.join(
                [f"tokensieve.sandbox.{name}".encode(), (package / "sandbox" / f"{name}.py").read_bytes()]
            )
        command = _bubblewrap_command(_bubblewrap() or "bwrap", request)
        entry, folder, count = "supervisor", "", len(SUPERVISOR_MODULES)
    else:
        command, entry, folder, count = [], "namespaces", str(package), 0
    command += [interpreter(), "-I", "-S", "-c", BOOT, f"tokensieve.sandbox.{entry}", folder, str(count)]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={}
    )
    try:
        out, err = started.communicate(
            sources + messages.encode_request(request), timeout=request.wall_ms / 1000 + GRACE_SECONDS
        )
    except subprocess.TimeoutExpired:
        out, err = b"", b"the supervisor did not answer in time"
    finally:
        started.kill()
        started.wait()
    return messages.decode_report(out), err.decode(errors="replace").strip()


def _why_not(kind: str) -> str | None:
    """The reason why a kind of isolation does not work here, or None, by running a program that does nothing."""
    binds, links, hidden = visible()
    nothing = [interpreter(), "-I", "-S", "-c", "pass"]
    request = Request([10_000, 10_000, 1 << 28, 1 << 20, 8, 1 << 10], nothing, b"", binds, links, hidden, [])
    try:
        report, said = launch(kind, request)
    except OSError as error:
        return str(error)
    if report is None:
        return said.splitlines()[-1] if said else "the supervisor died"
    if (report.ended, report.status) == ("exit", 0):
        return None
    return (report.err or report.out).decode(errors="replace").strip() or f"a program ended by {report.ended}"


def _remedy() -> str:
    def setting(name: str) -> str:
        path = Path("/proc/sys") / name
        return path.read_text().strip() if path.is_file() else ""

    if setting("user/max_user_namespaces") == "0":
        return "as root, sysctl user.max_user_namespaces=10000"
    if setting("kernel/unprivileged_userns_clone") == "0":
        return "as root, sysctl kernel.unprivileged_userns_clone=1"
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return "start the container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    if setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "as root, sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    return "run it outside of containers, on a kernel that lets ordinary users make user namespaces"


@cache
def isolation() -> str:
    """The isolation in use: "bubblewrap", or "namespaces" without it, and for root, whom bubblewrap cannot map.

    Raises UserError if there is none, with the reason and the remedy. Found out once in a process.
    """
    refusal = "untrusted programs are not run without isolation, and there is none here"
    if platform.system() != "Linux":
        raise UserError(f"{refusal} ({platform.system()} has no namespaces): use a Linux machine")
    if _kernel() < OLDEST_LINUX:
        needed = ".".join(map(str, OLDEST_LINUX))
        raise UserError(f"{refusal} (Linux {platform.release()}): use Linux {needed} or newer")
    if os.geteuid() != 0 and _bubblewrap() and _why_not("bubblewrap") is None:
        return "bubblewrap"
    reason = _why_not("namespaces")
    if reason is not None:
        raise UserError(f"{refusal} ({reason}): {_remedy()}")
    return "namespaces"


def why_not() -> str | None:
    """The reason why programs cannot be run here, with the remedy, or None."""
    try:
        isolation()
    except UserError as refused:
        return str(refused)
    return None
