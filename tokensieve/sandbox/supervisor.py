"""The supervisor of one program: process 1 of its namespace, where it starts the program, watches it and reports.

The program cannot signal process 1 (the kernel discards what it has no handler for), nor trace it or open its files
(it is not dumpable). When process 1 ends, the kernel kills everything else in the namespace.

Standard library only, see `tokensieve.sandbox.messages`.
"""

import errno
import os
import resource
import select
import sys
import time

from tokensieve.sandbox import messages, seccomp, syscalls
from tokensieve.sandbox.messages import Report, Request

WORK = "/tmp/work"
USER = 1000  # the program's user and group, inside
TICK_MS = 10  # between two looks at memory and processor time
OPEN_FILES = 128  # each may be a socket, with up to 0.2 MB in the kernel that no limit of memory counts
STACK_BYTES = 8 << 20  # as most systems have; a program may raise it up to its memory
ADDRESS_BYTES = 4 << 30  # what may be mapped beyond the memory limit: files, and ranges that are only reserved
MOST_INODES = 16384  # of the work folder: an empty file costs memory too
PIPE_READ = 1 << 16
CANNOT_RUN, NOT_FOUND = 126, 127  # exit status, as in a shell
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": WORK,
    "TMPDIR": "/tmp",
    "USER": "sandbox",
    "LANG": "C.UTF-8",
}
PAGE_BYTES = resource.getpagesize()
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The entry under bubblewrap, which has made namespaces and mounts: the request comes on stdin."""
    request = messages.decode_request(sys.stdin.buffer.read())
    volunteer()
    supervise(request, beside=1)  # process 1 itself


def volunteer() -> None:
    """Let the kernel kill this process, and all that it starts, before any other if the machine is out of memory."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def supervise(request: Request, beside: int) -> None:
    """Run the program, write the report to stdout and exit. `beside` other processes of its user count as its own."""
    report_fd = os.dup(1)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.set_signal(
        syscalls.SIGINT, syscalls.IGNORE
    )  # Python's own handler would let the program's signals through
    try:
        stdin = _write_files(request)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "files and stdin do not fit into disk_bytes" if full else f"files: {error.strerror}: {error.filename}"
        report = Report("invalid", err=reason.encode())
    else:
        report = _run(request, stdin, beside)
    with open(report_fd, "wb") as pipe:
        pipe.write(messages.encode_report(report))
    os._exit(0)  # nothing is left for the interpreter to end in order


def _write_files(request: Request) -> int:
    """Write the program's files into the work folder; returns a descriptor of its stdin. Nothing hostile runs yet."""
    os.umask(0o022)
    os.mkdir(WORK)
    os.chdir(WORK)
    for name, content in request.files:
        os.makedirs(os.path.dirname(os.path.join(WORK, name)), exist_ok=True)
        with open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
            file.write(content)
    path = "/tmp/stdin"
    with open(path, "wb") as file:
        file.write(request.stdin)
    stdin = os.open(path, os.O_RDONLY)
    os.unlink(path)
    if os.getuid() != USER:
        for folder, _, names in os.walk(WORK):
            for path in [folder, *(os.path.join(folder, name) for name in names)]:
                os.chown(path, USER, USER)
    return stdin


def _run(request: Request, stdin: int, beside: int) -> Report:
    code = seccomp.program_filter()
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    began = time.monotonic()
    program = os.fork()
    if program == 0:
        _become(request, code, (stdin, out_end, err_end), beside)
    for fd in (stdin, out_end, err_end):
        os.close(fd)
    output = {out: bytearray(), err: bytearray()}
    ended, status = _watch(program, request, output)
    micros = int((time.monotonic() - began) * 1e6)
    return Report(ended, status, micros, bytes(output[out]), bytes(output[err]))


def _become(request: Request, code: bytes, streams: tuple[int, int, int], beside: int) -> None:
    """Turn this process into the program."""
    status = CANNOT_RUN
    try:
        os.setsid()
        for place, fd in enumerate(streams):
            os.dup2(fd, place)
        syscalls.close_from(3)
        for number in (syscalls.SIGINT, syscalls.SIGPIPE, syscalls.SIGXFSZ):  # which Python changes
            syscalls.set_signal(number, syscalls.DEFAULT)
        _limit(request, beside)
        syscalls.empty_bounding_set()
        if os.getuid() != USER:
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
        syscalls.drop_capabilities()
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.install_filter(code)
        os.execvpe(request.command[0], list(request.command), ENVIRONMENT)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        status = NOT_FOUND if missing else CANNOT_RUN
        reason = f"sandbox: cannot run {request.command[0]}: {error.strerror}\n"
        os.write(2, reason.encode("utf-8", "surrogateescape"))
    finally:
        os._exit(status)


def _limit(request: Request, beside: int) -> None:
    """Set the limits of one process. `_watch` bounds what all of them take together."""
    seconds = request.cpu_ms // 1000 + 2  # the watch comes first; this holds if it is late
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_DATA: request.memory_bytes,
        resource.RLIMIT_AS: request.memory_bytes + ADDRESS_BYTES,
        resource.RLIMIT_FSIZE: request.disk_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: request.processes + (beside if os.getuid() == USER else 0),
        resource.RLIMIT_CORE: 1,  # not 0, with which a core_pattern that pipes into a program still calls it
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: OPEN_FILES,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_STACK: request.memory_bytes,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        soft = min(most, STACK_BYTES) if kind == resource.RLIMIT_STACK else most
        resource.setrlimit(kind, (soft, most))


def _watch(program: int, request: Request, output: dict[int, bytearray]) -> tuple[str, int]:
    """Wait for the program's end, or end it once it takes more than it may: how it ended, and its exit status."""
    ending = syscalls.pidfd_open(program)
    events = select.poll()
    for fd in (ending, *output):
        events.register(fd, select.POLLIN)
    for fd in output:
        os.set_blocking(fd, False)
    now = look = time.monotonic()
    deadline = now + request.wall_ms / 1000
    ended, status = "", None
    while not ended:
        for fd, _ in events.poll(TICK_MS):
            if fd == ending:
                ended = "exit"
            elif not _read(fd, output[fd], request.output_bytes):
                events.unregister(fd)
        now = time.monotonic()
        if not ended and now >= look:
            look = now + TICK_MS / 1000
            status = _reap(program, os.WNOHANG)
            ended = "exit" if status is not None else _excess(request)
        if not ended and now >= deadline:
            ended = "time"
        if any(len(kept) > request.output_bytes for kept in output.values()):
            ended = "output"
    _kill_all()
    last = _reap(program, 0)
    status = last if status is None else status
    for fd, kept in output.items():
        while _read(fd, kept, request.output_bytes):
            pass
        if len(kept) > request.output_bytes:
            ended = "output"
            del kept[request.output_bytes :]
    code = -syscalls.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    return "signal" if ended == "exit" and code < 0 else ended, code


def _kill_all() -> None:
    try:
        os.kill(-1, syscalls.SIGKILL)
    except ProcessLookupError:
        return  # the program was the last


def _read(fd: int, kept: bytearray, limit: int) -> bool:
    """Read what a pipe holds, up to a byte over the limit. False if nothing is left, for now or for good."""
    try:
        part = os.read(fd, min(PIPE_READ, limit + 1 - len(kept))) if len(kept) <= limit else b""
    except BlockingIOError:
        return False
    kept += part
    return bool(part)


def _reap(program: int, options: int) -> int | None:
    """Reap processes that have ended, or without WNOHANG all of them; the program's wait status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, options)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == program:
            found = status


def _excess(request: Request) -> str:
    """The limit that all processes together exceed: "memory", "time" (of processors), "disk", or "" for none."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    resident = 0
    others = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    for name in others:
        resident += _resident_bytes(name)
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name in parentheses is the program's choice. User and system time, its own and of reaped children:
                times = file.read().rpartition(b")")[2].split()[11:15]
                seconds += sum(map(int, times)) / CLOCK_TICKS
        except (FileNotFoundError, ProcessLookupError):
            pass
    if resident > request.memory_bytes and sum(map(_own_bytes, others)) > request.memory_bytes:
        return "memory"
    if seconds * 1000 > request.cpu_ms:
        return "time"
    tree = os.statvfs("/tmp")
    return "disk" if tree.f_files - tree.f_ffree > MOST_INODES else ""


def _resident_bytes(process: str) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended


def _own_bytes(process: str) -> int:
    """Resident bytes, where pages that several processes share count once in all; where that is secret, in each."""
    try:
        with open(f"/proc/{process}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0
    except PermissionError:
        return _resident_bytes(process)
