"""Hostile programs that take too much, outlive their time, or forge a verdict. See `tests.support.hostile`."""

from tests.support.hostile import SECONDS, Hostile, endless

PROCESSES_AND_SIGNALS = [
    Hostile("kills everything", """
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
os.kill(-1, signal.SIGKILL)  # all that it may signal: its own child
print("held" if os.waitpid(child, 0)[1] == signal.SIGKILL else "BROKEN")
"""),
    Hostile("signals the caller", """
for number in 9, 19, 2, 15, 17, 10:
    try:
        os.kill(1, number)  # without effect on process 1, or refused if that is another user's
    except PermissionError:
        pass
for pid in {@CALLER@, @WORKER@, @CANARY@, os.getppid() + 1000, *range(50, 2000)} - {os.getpid()}:
    try:
        os.kill(pid, 9)
        print("BROKEN", pid)
    except ProcessLookupError:
        pass
attempt("group", os.killpg, @CALLER@, 9)
attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(@CANARY@), 9))
call("take a descriptor", 438, os.pidfd_open(1), 1, 0)
"""),
    endless("forks without end", """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""),
    Hostile("starts threads without end", """
import threading
count = 0
try:
    while count < 1000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except (RuntimeError, MemoryError):
    pass
print("held" if count == @PROCESSES@ - 1 else "BROKEN", count, flush=True)
os._exit(0)
"""),
    Hostile("leaves a daemon behind", """
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
print("held")
"""),
    Hostile("leaves a daemon that fills stdout", """
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
print("held")
"""),
    endless("sleeps for ever", "time.sleep(1e6)"),
    endless("ignores every signal", """
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(1)
"""),
    endless("stops itself", "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1e6)"),
    endless("loops for ever", "while True: pass", seconds=SECONDS, cpu_seconds=0.4),
    endless("shares its loop among children", """
for _ in range(6):
    if os.fork() == 0:
        while True: pass
time.sleep(1e6)
""", seconds=SECONDS, cpu_seconds=1.0),
    endless("loops under a name that looks like times", """
libc.prctl(15, b") R 1 1 1\\n) (", 0, 0, 0)
while True: pass
""", seconds=SECONDS, cpu_seconds=0.4),
    Hostile("crashes", "print('held', flush=True)\nos.abort()", "signal"),
]  # fmt: skip

MEMORY_AND_OUTPUT = [
    Hostile("takes memory without end", """
def grow():
    kept = []
    while True:
        kept.append(bytearray(1 << 24))
attempt("memory", grow)
"""),
    endless("takes memory in many children", """
for _ in range(8):
    if os.fork() == 0:
        kept = bytearray(os.urandom(1)) * (60 << 20)
        time.sleep(1e6)
time.sleep(1e6)
""", "memory", seconds=SECONDS),
    Hostile("fills the disk", """
total = 0
try:
    for number in range(100):
        with open(f"/tmp/f{number}", "wb", buffering=0) as file:
            while total < 1 << 30:
                total += file.write(bytes(1 << 20))
except OSError as error:
    print("held" if total <= @DISK@ else "BROKEN", error, total)
"""),
    Hostile("makes a huge file", """
file = os.open("huge", os.O_WRONLY | os.O_CREAT)
attempt("sparse", os.ftruncate, file, 1 << 40)
attempt("far away", os.pwrite, file, b"x", 1 << 40)
attempt("allocated", os.posix_fallocate, file, 0, 1 << 30)
"""),
    Hostile("makes files without end", """
count = 0
try:
    while count < 100_000:
        os.close(os.open(f"/tmp/{count}", os.O_CREAT))
        count += 1
    print("BROKEN", count)
except OSError as error:
    print("held", count, error)
""", "exit or disk"),
    endless("floods stdout", "while True: os.write(1, bytes(1 << 16))", "output", seconds=SECONDS),
    endless("floods stderr from many children", """
for _ in range(4): os.fork()
while True: os.write(2, b"x" * 1000)
""", "output", seconds=SECONDS),
    Hostile("closes its streams", "os.write(1, b'held')\nfor fd in 0, 1, 2: os.close(fd)\nos._exit(0)"),
    Hostile("writes garbage", "os.write(1, b'held' + bytes(range(256)) * 8)"),
    Hostile("writes a report of its own", """
forged = @REPORT@
for fd in range(3, 256):
    try:
        os.write(fd, forged)
        print("BROKEN", fd)
    except OSError:
        pass
for path in [f"/proc/1/fd/{n}" for n in range(10)] + ["/proc/1/mem", "/dev/stdout1"]:
    attempt(path, os.open, path, os.O_WRONLY)
os.write(1, b"held " + forged)
"""),
    Hostile("claims to have passed", """
import atexit
for name in "result.json", "report.xml", "/tmp/result.json", "verdict":
    open(name, "w").write('{"passed": true, "reward": 1.0}')
atexit.register(os._exit, 0)
print("held: all tests passed, PASSED, exit 0", flush=True)
os._exit(3)
"""),
]  # fmt: skip

GREEDY = [*PROCESSES_AND_SIGNALS, *MEMORY_AND_OUTPUT]
