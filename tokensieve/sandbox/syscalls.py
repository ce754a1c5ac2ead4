"""The system calls of Linux that Python's library lacks, through libc.

Standard library only, see `tokensieve.sandbox.messages`. Every function raises OSError, with the call's name in front.
"""

import ctypes
import os

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 24, 38, 22
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
SECCOMP_MODE_FILTER = 2
SIGINT, SIGKILL, SIGPIPE, SIGXFSZ = 2, 9, 13, 25
DEFAULT, IGNORE = 0, 1  # actions of a signal
CAPABILITY_VERSION_3 = 0x20080522
LAST_CAPABILITY = 63

# Newer than some C libraries; since 2019 a call has one number on all processors.
NR_PIDFD_OPEN, NR_CLOSE_RANGE, NR_MOUNT_SETATTR = 434, 436, 442

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    done = getattr(_libc, name)(*arguments)
    if done == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return done


def _syscall(name: str, number: int, *arguments: object) -> int:
    # libc's syscall() takes longs. ctypes would pass a Python int as an int, whose upper half is undefined.
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    done = _libc.syscall(ctypes.c_long(number), *wide)
    if done == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return done


def prctl(option: int, *arguments: int | ctypes.c_void_p) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _call("prctl", option, *(ctypes.c_ulong(value) if isinstance(value, int) else value for value in padded))


def set_signal(number: int, action: int) -> None:
    """Set a signal's action past Python, so that a handler of its own no longer runs."""
    _libc.signal(number, ctypes.c_void_p(action))


def unshare(flags: int) -> None:
    _call("unshare", flags)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    try:
        _call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or source} on {target})") from None


def unmount(target: str) -> None:
    """Detach the mount, and those below it."""
    _call("umount2", os.fsencode(target), MNT_DETACH)


def pivot_root(new: str, old: str) -> None:
    _call("pivot_root", os.fsencode(new), os.fsencode(old))


def set_mount_attributes(target: str, attributes: int, recursive: bool = True) -> None:
    """Set MOUNT_ATTR_ bits of a mount, and of those below it. Linux 5.12 and newer."""
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # set, clear, propagation, user namespace
    flags = AT_RECURSIVE if recursive else 0
    path = ctypes.c_char_p(os.fsencode(target))
    _syscall("mount_setattr", NR_MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(values), ctypes.sizeof(values))


def set_host_name(name: str) -> None:
    text = name.encode()
    _call("sethostname", text, ctypes.c_size_t(len(text)))


def close_from(fd: int) -> None:
    """Close all descriptors from this one on."""
    _syscall("close_range", NR_CLOSE_RANGE, fd, (1 << 32) - 1, 0)


def pidfd_open(pid: int) -> int:
    """A descriptor that can be read once the process has ended."""
    return _syscall("pidfd_open", NR_PIDFD_OPEN, pid, 0)


def empty_bounding_set() -> None:
    """Drop every capability from the bounding set, so that no exec gives one back; without CAP_SETPCAP, nothing."""
    for capability in range(LAST_CAPABILITY + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return  # past the kernel's last capability, or bubblewrap has dropped them


def drop_capabilities() -> None:
    """Drop the ambient, permitted, effective and inheritable sets."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def install_filter(code: bytes) -> None:
    """Install a seccomp filter of classic BPF. It holds for this process and all that it starts."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    buffer = ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.cast(ctypes.byref(program), ctypes.c_void_p))
