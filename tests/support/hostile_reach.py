"""Hostile programs that reach for what is not theirs: the network, files, the kernel. See `tests.support.hostile`."""

from tests.support.hostile import Hostile

NETWORK = [
    Hostile("connects to the host's loopback", """
def connect(family, address):
    with socket.socket(family) as s:
        s.settimeout(1)
        s.connect(address)
attempt("ipv4", connect, socket.AF_INET, ("127.0.0.1", @PORT@))
attempt("ipv6", connect, socket.AF_INET6, ("::1", @PORT@))
"""),
    Hostile("connects to the outside", """
def connect(address):
    with socket.socket() as s:
        s.settimeout(1)
        s.connect(address)
def send(address):
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.sendto(b"x", address)
attempt("tcp", connect, ("192.0.2.1", 80))
attempt("udp", send, ("192.0.2.1", 53))
attempt("name", socket.getaddrinfo, "example.com", 80)
"""),
    Hostile("opens sockets of other kinds", """
for name in "AF_VSOCK AF_NETLINK AF_PACKET AF_ALG AF_CAN AF_TIPC AF_BLUETOOTH AF_QIPCRTR".split():
    if hasattr(socket, name):
        attempt(name, socket.socket, getattr(socket, name), socket.SOCK_DGRAM if name != "AF_ALG" else 5)
attempt("raw", socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
"""),
    Hostile("connects to an abstract Unix socket", """
with socket.socket(socket.AF_UNIX) as s:
    attempt("abstract", s.connect, "\\0@ABSTRACT@")
    attempt("path", s.connect, "@PLANTED@/socket")
"""),
]  # fmt: skip

FILES = [
    Hostile("reads the system's secrets", """
for path in "/etc/shadow /etc/passwd /etc/hostname /var/log /var/lib /boot /run /mnt /opt /srv".split():
    attempt(path, os.listdir if not path.startswith("/etc") else read, path)
"""),
    Hostile("reads the home folder", """
for path in "@HOME@/secret", "/root/.bashrc", "/root/.ssh", "/root/.profile", "/home":
    attempt(path, read, path)
for path in ("@HOME@", "/home"):
    attempt(path, os.listdir, path)
"""),
    Hostile("reads the repository", """
for path in "pyproject.toml", "tokensieve/__init__.py", "tokensieve/sandbox/supervisor.py", "tests/conftest.py":
    attempt(path, read, "@REPOSITORY@/" + path)
import importlib.util
sys.path += ["@REPOSITORY@", "@SITE@"]
for name in "tokensieve", "torch":
    attempt(name, importlib.import_module, name) if importlib.util.find_spec(name) else print("held", name)
"""),
    Hostile("reads what the host keeps in /tmp", """
for path in "@PLANTED@/secret", "@PLANTED@":
    attempt(path, read, path)
print("BROKEN" if set(os.listdir("/tmp")) - {"work"} else "held", os.listdir("/tmp"))
"""),
    Hostile("reads the supervisor's /proc", """
for name in "environ", "mem", "maps", "root/etc/shadow", "cwd/main.py", "fd/0", "fd/1", "fd/2", "fd/3":
    attempt(name, read, "/proc/1/" + name)
attempt("fd", os.listdir, "/proc/1/fd")
attempt("mem", os.open, "/proc/1/mem", os.O_RDWR)
numbers = {name for name in os.listdir("/proc") if name.isdigit()}
print("held" if numbers == {"1", str(os.getpid())} else "BROKEN", numbers)
for name in numbers:
    for what in "environ", "cmdline":
        try:
            if b"@SECRET@"[::-1] in read(f"/proc/{name}/{what}"):
                print("BROKEN", name, what)
        except OSError:
            pass
"""),
    Hostile("reads the caller's environment", """
left = set(os.environ) - set("PATH HOME TMPDIR USER LANG LC_CTYPE".split())
print("BROKEN" if left or "@SECRET@"[::-1] in str(os.environ) else "held", left)
"""),
    Hostile("uses the caller's open files", """
numbers = set(os.listdir("/proc/self/fd"))
for number in map(int, numbers):
    try:
        os.lseek(number, 0, 0)
        print("BROKEN" if b"@SECRET@"[::-1] in os.read(number, 1000) else "held", number)
    except OSError:
        pass
for number in range(3, 4096):
    try:
        print("BROKEN", number, os.fstat(number))
    except OSError:
        pass
"""),
    Hostile("writes to the system", """
for folder in "/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/bin", "/lib":
    attempt(folder, write, folder + "/escaped")
attempt("replace", os.rename, "/usr/bin/env", "/usr/bin/env2")
attempt("chmod", os.chmod, "/usr", 0o777)
attempt("python", os.open, sys.executable, os.O_WRONLY)
"""),
    Hostile("writes where the host would see it", """
for path in "/tmp/@MARK@", "/dev/shm/@MARK@", "@MARK@":  # allowed, in a folder of its own
    write(path)
for path in "/var/tmp/@MARK@", "@PLANTED@/@MARK@", "@HOME@/@MARK@":
    attempt(path, write, path)
"""),
    Hostile("writes to /sys and control groups", """
for path in "/sys", "/sys/fs/cgroup", "/sys/kernel":
    attempt(path, os.listdir, path)
for path in ("/sys/fs/cgroup/cgroup.procs", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
             "/proc/sys/vm/drop_caches", "/proc/sys/user/max_user_namespaces", "/proc/self/uid_map",
             "/proc/self/oom_score_adj"):
    try:
        old = read(path)
    except OSError:
        old = b""
    attempt(path, lambda: open(path, "wb", buffering=0).write(b"-999" if "oom" in path else old))
"""),
    Hostile("leaves links out of its folder", """
for number, target in enumerate(("/etc/shadow", "@PLANTED@/secret", "/proc/1/environ", "../../../../etc/passwd", "/")):
    os.symlink(target, f"link{number}")
    attempt(target, read, f"link{number}") if target != "/" else None
os.rename("main.py", "old.py")
os.symlink("@PLANTED@/secret", "main.py")
attempt("through a link", write, "main.py")
attempt("hard link", os.link, "/usr/bin/env", "env")
"""),
    Hostile("makes device files", """
attempt("disk", os.mknod, "disk", stat.S_IFBLK | 0o666, os.makedev(254, 0))
attempt("memory", os.mknod, "memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
devices = set(os.listdir("/dev"))
print("BROKEN" if devices - set("null random urandom shm fd stdin stdout stderr".split()) else "held", devices)
for path in "/dev/vda", "/dev/sda", "/dev/mem", "/dev/kvm", "/dev/tty", "/dev/ptmx", "/dev/nvidia0", "/dev/fuse":
    attempt(path, read, path)
"""),
    Hostile("chooses strange names", r"""
for name in b"a\nb", b"\xff\xfe", b"-rf", b"$(reboot)", b"x" * 255, b"\r\x1b[2J":
    open(name, "wb").write(name)
for _ in range(300):
    os.mkdir("d")
    os.chdir("d")
print("held")
os.write(1, b"\0\xff\n")
"""),
]  # fmt: skip

KERNEL = [
    Hostile("traces the supervisor", """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(64)
vector = ctypes.byref(Vector(ctypes.addressof(buffer), 64))
for pid in (1, os.getppid(), @CALLER@):
    call("attach", "ptrace", 16, pid, 0, 0)
    call("seize", "ptrace", 0x4206, pid, 0, 0)
    call("read", "process_vm_readv", pid, vector, 1, vector, 1, 0)
    call("write", "process_vm_writev", pid, vector, 1, vector, 1, 0)
"""),
    Hostile("mounts", """
call("tmpfs", "mount", b"x", b"/tmp", b"tmpfs", 0, None)
call("remount", "mount", None, b"/usr", None, 32 | 4096, None)
call("proc", "mount", b"proc", b"/proc", b"proc", 0, None)
call("unmount", "umount2", b"/proc", 2)
call("unmount", "umount2", b"/usr", 2)
call("pivot", "pivot_root", b".", b".")
call("fsopen", 430, b"tmpfs", 0)
call("open_tree", 428, -100, b"/usr", 1)
"""),
    Hostile("makes new namespaces", """
for bit in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x10020000):
    call(hex(bit), "unshare", bit)
    call(hex(bit), @NR_clone@, bit | 17, 0, 0, 0, 0)
call("clone3", 435, ctypes.byref((ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)), 88)
call("setns", "setns", os.open("/proc/self/ns/user", os.O_RDONLY), 0)
"""),
    Hostile("leaves its root by chroot", """
os.mkdir("cell")
attempt("chroot", os.chroot, "cell")
for _ in range(50):
    os.chdir("..")
print("BROKEN" if os.path.exists("host") or os.path.exists("old_root") or os.path.exists("home") else "held")
call("handle", "name_to_handle_at", -100, b"/", ctypes.create_string_buffer(256), ctypes.byref(ctypes.c_int()), 0)
"""),
    Hostile("becomes root", """
import subprocess
for action in os.setuid, os.setgid, os.seteuid:
    attempt(action.__name__, action, 0)
attempt("groups", os.setgroups, [0])
status = open("/proc/self/status").read()
for name, value in ("CapEff", 0), ("CapPrm", 0), ("CapBnd", 0), ("CapAmb", 0), ("NoNewPrivs", 1), ("Seccomp", 2):
    found = int(status.partition(name + ":")[2].split()[0], 16)
    print("held" if found == value else "BROKEN", name, found)
os.makedirs("x", exist_ok=True)
for program in "su", "mount", "newgrp", "passwd":
    done = subprocess.run(["sh", "-c", f"{program} </dev/null; id -u"], capture_output=True, text=True)
    print("BROKEN" if done.stdout.strip().endswith("\\n0") or done.stdout.strip() == "0" else "held", program)
"""),
    Hostile("asks for the kernel's odd parts", """
for number in @DENIED@:
    call(number, number, 0, 0, 0, 0, 0)
call("a call that is not there yet", 1000)
import mmap
attempt("shared memory", mmap.mmap, -1, 1 << 20)
attempt("memfd", os.memfd_create, "x")
"""),
    Hostile("calls the kernel by other numbers", """
if os.uname().machine == "x86_64":  # int 0x80 is the table of 32-bit programs; there the filter kills
    import mmap
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
    page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    child = os.fork()
    if child == 0:
        print("BROKEN", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))(), flush=True)
        os._exit(0)
    print("held" if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else "BROKEN")
    call("x32", 0x40000000 + 39)
else:
    print("held")
"""),
    Hostile("sets the clock", """
attempt("clock", time.clock_settime, time.CLOCK_REALTIME, 0)
call("settimeofday", "settimeofday", ctypes.byref((ctypes.c_long * 2)(0, 0)), None)
call("adjtimex", "adjtimex", ctypes.byref((ctypes.c_long * 64)(1)))
call("name", "sethostname", b"escaped", 7)
"""),
    Hostile("types into a terminal", """
import fcntl, termios
attempt("tty", os.open, "/dev/tty", os.O_RDWR)
for fd in 0, 1, 2:
    attempt("TIOCSTI", fcntl.ioctl, fd, termios.TIOCSTI, b"x")
    attempt("TIOCSCTTY", fcntl.ioctl, fd, termios.TIOCSCTTY, 1)
    attempt("tty", os.ttyname, fd)
"""),
    Hostile("takes priority", """
attempt("realtime", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
attempt("nice", os.nice, -5)
for pid in 1, @CALLER@:
    attempt("idle", os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
    attempt("affinity", os.sched_setaffinity, pid, [0])
    attempt("priority", os.setpriority, os.PRIO_PROCESS, pid, 19)
attempt("all of the user", os.setpriority, os.PRIO_USER, 0, 19)
"""),
    Hostile("raises its own limits", """
import resource
for name in "CPU DATA AS FSIZE NOFILE NPROC CORE MEMLOCK STACK".split():
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    print("BROKEN" if hard == resource.RLIM_INFINITY else "held", name, hard)
    attempt(name, resource.setrlimit, kind, (hard, hard + 1))
    attempt(name, resource.setrlimit, kind, (-1, -1))
    attempt(name, resource.prlimit, 1, kind, (hard, hard))
"""),
]  # fmt: skip

REACHING = [*NETWORK, *FILES, *KERNEL]
