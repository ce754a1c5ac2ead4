"""The system calls that a sandboxed program may not make, as a seccomp filter in classic BPF.

Namespaces, capabilities and the file tree already forbid most of these. The filter is the second lock, it spares the
kernel's less used parts, and it closes what namespaces leave open: memory that no process maps (memfd, shared anonymous
memory, System V), AF_VSOCK, which reaches the host of a virtual machine past every network namespace, io_uring, whose
calls no filter sees, and calls of other processors' numbering. Calls newer than LAST get ENOSYS, as on an older kernel.

Standard library only, see `tokensieve.sandbox.messages`. Numbers: Linux's asm/unistd_64.h and asm-generic/unistd.h.
"""

import errno
import os
import struct

LAST = 462  # mseal, Linux 6.10
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Columns: name, number on x86_64, number on aarch64; -1 if there is none.
DENIED = """
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, msgget 68 186
mq_open 240 180, add_key 248 217, request_key 249 218, keyctl 250 219, userfaultfd 323 282, perf_event_open 298 241
bpf 321 280, fanotify_init 300 262, quotactl 179 60, quotactl_fd 443 443, acct 163 89, swapon 167 224, swapoff 168 225
reboot 169 142, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273
delete_module 176 106, iopl 172 -1, ioperm 173 -1, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51
unshare 272 97, setns 308 268, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272
pidfd_getfd 438 438, process_madvise 440 440, open_by_handle_at 304 265, name_to_handle_at 303 264
settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161
setdomainname 171 162, syslog 103 116, vhangup 153 58, fsopen 430 430, fsconfig 431 431, fsmount 432 432
fspick 433 433, open_tree 428 428, move_mount 429 429, mount_setattr 442 442, modify_ldt 154 -1, uselib 134 -1
ioprio_set 251 30
"""
# Calls that may name no process but the caller: the arguments in the last columns have to be 0. The supervisor may be
# of the same user, and would watch late with less of the processors, or not at all with other limits.
OWN = """
prlimit64 302 261 0, sched_setparam 142 118 0, sched_setscheduler 144 119 0, sched_setaffinity 203 122 0
sched_setattr 314 274 0, setpriority 141 140 0 1
"""
ABSENT = "clone3 435 435, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427"
NUMBERS = {"socket": (41, 198), "clone": (56, 220), "ioctl": (16, 29), "mmap": (9, 222)}

ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, AND, EQUAL, GREATER, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # byte offsets in struct seccomp_data

AF_UNIX = 1
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone
SHARED_ANONYMOUS = 0x21  # MAP_SHARED (or MAP_SHARED_VALIDATE) | MAP_ANONYMOUS
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def numbers(table: str, machine: str) -> list[list[int]]:
    """The rows of a table for one processor, without names: the call's number and what follows in the last columns."""
    column = list(AUDIT_ARCH).index(machine)
    rows = [row.split() for row in table.replace("\n", ",").split(",") if row.strip()]
    found = [[int(row[1 + column]), *map(int, row[3:])] for row in rows]
    return [row for row in found if row[0] >= 0]


def _fail(number: int) -> bytes:
    return _instruction(RETURN, ERROR | number)


def _on(number: int, body: list[bytes]) -> list[bytes]:
    """The body for one system call. It must return."""
    return [_instruction(EQUAL, number, 0, len(body)), *body]


def _load(argument: int) -> bytes:
    return _instruction(LOAD, ARGUMENTS + 8 * argument)  # its lower half, on little-endian machines


def program_filter(machine: str | None = None) -> bytes:
    """The filter for this machine's processor, or for the one named. OSError for one that has no numbers above."""
    machine = machine or os.uname().machine
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"there is no seccomp filter for the processor {machine}")
    number = {name: pair[list(AUDIT_ARCH).index(machine)] for name, pair in NUMBERS.items()}
    allow = _instruction(RETURN, ALLOW)
    code = [
        _instruction(LOAD, ARCH),
        _instruction(EQUAL, AUDIT_ARCH[machine], 1, 0),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(GREATER, LAST, 0, 1),
        _fail(errno.ENOSYS),
    ]
    code += _on(number["mmap"], [
        _load(3), _instruction(AND, SHARED_ANONYMOUS), _instruction(EQUAL, SHARED_ANONYMOUS, 1, 0), allow,
        _fail(errno.EPERM),
    ])  # fmt: skip
    code += _on(number["socket"], [_load(0), _instruction(EQUAL, AF_UNIX, 0, 1), allow, _fail(errno.EAFNOSUPPORT)])
    code += _on(number["clone"], [
        _load(0), _instruction(AND, NEW_NAMESPACES), _instruction(EQUAL, 0, 0, 1), allow, _fail(errno.EPERM),
    ])  # fmt: skip
    first, second = TERMINAL_INPUT
    code += _on(number["ioctl"], [
        _load(1), _instruction(EQUAL, first, 2, 0), _instruction(EQUAL, second, 1, 0), allow, _fail(errno.EPERM),
    ])  # fmt: skip
    for call, *places in numbers(OWN, machine):
        zero = [part for place in places for part in (_load(place), _instruction(EQUAL, 0, 1, 0), _fail(errno.EPERM))]
        code += _on(call, [*zero, allow])
    for table, error in ((DENIED, errno.EPERM), (ABSENT, errno.ENOSYS)):
        for (call,) in numbers(table, machine):
            code += _on(call, [_fail(error)])
    return b"".join([*code, allow])
