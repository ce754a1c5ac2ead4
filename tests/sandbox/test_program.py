"""Programs that mean no harm: their output, status, stdin and files; limits to the byte; machines that refuse."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support import sandbox_users
from tokensieve import sandbox
from tokensieve.config import UserError
from tokensieve.sandbox import Limits, Program, launch, messages, namespaces, seccomp


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not yet found out which isolation there is."""
    launch.isolation.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    launch.isolation.cache_clear()


def test_a_program_gives_its_output_and_status() -> None:
    done = sandbox.python(
        "import sys\nprint(sys.stdin.read()[::-1])\nprint('no', file=sys.stderr)\nsys.exit(7)", stdin=b"abc"
    )
    assert (done.out, done.err, done.status, done.ended) == (b"cba\n", b"no\n", 7, "exit")
    assert not done.succeeded and 0 < done.seconds < 10
    assert sandbox.python("").succeeded


def test_a_signal_is_a_negative_status() -> None:
    done = sandbox.python("import os; os.kill(os.getpid(), 11)")
    assert (done.ended, done.status) == ("signal", -11)


def test_files_stand_in_the_folder_where_it_starts() -> None:
    files = {"run.sh": "#!/bin/sh\necho $1 $#; cat data/in.bin; pwd\n", "data/in.bin": b"\0\xff", "a\nname": ""}
    done = sandbox.run(["./run.sh", "one two", ""], files=files)
    assert done.out == b"one two 2\n\0\xff/tmp/work\n", done
    names = sandbox.run(["ls"], files=files).out
    assert names == b"a\nname\ndata\nrun.sh\n"


def test_programs_of_the_system_run() -> None:
    done = sandbox.run(["sh", "-c", "seq 3 | sort -r | tee copy; sh -c 'exit 4'"])
    assert (done.out, done.status) == (b"3\n2\n1\n", 4)
    assert sandbox.run(["env"]).out.count(b"\n") == len(("PATH", "HOME", "TMPDIR", "USER", "LANG"))


def test_parallel_python_works() -> None:
    source = """
    import asyncio, multiprocessing, sqlite3, subprocess, tempfile, threading
    def square(x): return x * x
    async def main(): return await asyncio.to_thread(square, 3)
    if __name__ == "__main__":
        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(pool.map(square, range(4)), asyncio.run(main()), multiprocessing.Value("i", 5).value)
        print(tempfile.TemporaryFile().fileno() > 2, subprocess.run(["true"]).returncode)
        print(sqlite3.connect("x.db").execute("select 1").fetchone())
    """
    done = sandbox.python(textwrap.dedent(source))
    assert done.out == b"[0, 1, 4, 9] 9 5\nTrue 0\n(1,)\n", done.err.decode()


@pytest.mark.parametrize(("command", "status"), [("no-such-program", 127), ("/etc/ld.so.cache", 126)])
def test_what_cannot_be_run_ends_as_in_a_shell(command: str, status: int) -> None:
    done = sandbox.run([command])
    assert (done.ended, done.status) == ("exit", status)
    assert done.err.startswith(f"sandbox: cannot run {command}: ".encode())


def test_many_run_side_by_side_in_order() -> None:
    programs = [Program(["sh", "-c", "sleep 0.$1; echo $0", str(n), str(5 - n)]) for n in range(5)]
    assert [done.out for done in sandbox.run_many(programs, workers=3)] == [b"%d\n" % n for n in range(5)]


def test_output_up_to_the_limit_is_kept() -> None:
    for extra, ended in ((0, "exit"), (1, "output")):
        source = f"import os\nos.write(1, bytes(1000))\nos.write(2, bytes({1000 + extra}))"
        done = sandbox.python(source, limits=Limits(output_bytes=1000))
        assert (len(done.out), len(done.err), done.ended) == (1000, 1000, ended)


def test_as_many_processes_as_allowed() -> None:
    """The supervisor does not count, as which user the program may ever run."""
    source = """
    import os, time
    count = 1
    try:
        while count < 50:
            if os.fork() == 0: time.sleep(60)
            count += 1
    except OSError: print(count)
    """
    assert sandbox.python(textwrap.dedent(source), limits=Limits(processes=7)).out == b"7\n"


def test_pages_shared_after_a_fork_count_once() -> None:
    source = """
    import os, time
    kept = bytearray(os.urandom(1)) * (100 << 20)
    children = [os.fork() or time.sleep(0.3) or os._exit(0) for _ in range(6)]
    for child in children: os.waitpid(child, 0)
    print("done")
    """
    done = sandbox.python(textwrap.dedent(source), limits=Limits(memory_bytes=256 << 20))
    assert (done.out, done.ended) == (b"done\n", "exit")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a//b", "a/", "nul\0", ".."])
def test_a_file_outside_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="give a plain path below"):
        sandbox.run(["true"], files={name: "x"})


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match="do not fit into disk_bytes"):
        sandbox.run(["true"], stdin=bytes(1 << 20), limits=Limits(disk_bytes=1 << 16))
    with pytest.raises(UserError, match="files: "):
        sandbox.run(["true"], files={"a": "", "a/b": ""})
    with pytest.raises(UserError, match="limit seconds is 0"):
        sandbox.run(["true"], limits=Limits(seconds=0))
    for command in ([], ["a\0b"]):
        with pytest.raises(UserError, match="a command needs"):
            sandbox.run(command)


def sleepers(mark: str) -> list[psutil.Process]:
    """Processes with the mark in their command line. The program's own, not those that start it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[-1] == mark:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def test_a_program_dies_with_its_caller(tmp_path: Path) -> None:
    mark = f"86{os.getpid()}1"
    code = f"from tokensieve import sandbox; sandbox.run(['sleep', '{mark}'])"
    environment = os.environ | {"PYTHONPATH": str(sandbox_users.ROOT)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert wait_for(lambda: sleepers(mark), 30)
    caller.kill()
    caller.wait()
    assert wait_for(lambda: not sleepers(mark))


def test_a_lost_supervisor_is_a_result() -> None:
    """The kernel may kill it if memory is short; training goes on."""
    mark = f"86{os.getpid()}2"
    results: list[sandbox.Result] = []
    thread = threading.Thread(target=lambda: results.append(sandbox.run(["sleep", mark])))
    thread.start()
    assert wait_for(lambda: sleepers(mark), 30)
    for process in psutil.Process().children():
        if launch.BOOT in process.cmdline():
            process.kill()
    thread.join()
    assert (results[0].ended, results[0].succeeded) == ("lost", False)
    assert wait_for(lambda: not sleepers(mark))


def test_a_system_without_namespaces_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(launch.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match=r"not run without isolation.*Darwin has no namespaces.*use a Linux machine"):
        sandbox.python("print(1)")


def test_an_old_kernel_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(launch.platform, "release", lambda: "5.4.0-generic")
    assert "use Linux 5.14 or newer" in (sandbox.why_not() or "")


def test_a_process_that_may_not_make_namespaces_is_refused() -> None:
    """For real: under the filter that programs get, which forbids unshare."""
    code = """
    from tokensieve import sandbox
    from tokensieve.sandbox import seccomp, syscalls
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.install_filter(seccomp.program_filter())
    try:
        sandbox.python("print(1)")
    except sandbox.program.UserError as refused:
        print(refused)
    """
    environment = os.environ | {"PYTHONPATH": str(sandbox_users.ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "there is none here (unshare: Operation not permitted): " in done.stdout, done
    assert done.stdout.count("\n") == 1


def test_the_remedy_fits_the_reason(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(launch, "_why_not", lambda kind: "unshare: Operation not permitted")
    fresh.setattr(launch.Path, "is_file", lambda path: path.name == "unprivileged_userns_clone")
    fresh.setattr(launch.Path, "read_text", lambda path: "0\n")
    assert (sandbox.why_not() or "").endswith("as root, sysctl kernel.unprivileged_userns_clone=1")


def test_an_old_bubblewrap_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for said, path in (("0.6.1", None), ("0.11.0", str(tmp_path / "bwrap"))):
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho bubblewrap {said}\n")
        (tmp_path / "bwrap").chmod(0o755)
        launch._bubblewrap.cache_clear()
        assert launch._bubblewrap() == path
    launch._bubblewrap.cache_clear()


def test_messages_survive_the_pipe() -> None:
    files = [("a\nb", b"\0"), ("c", b"")]
    sent = messages.Request([1, 2, 3, 4, 5, 6], ["x", "", "\udcff"], b"\n", ["/usr"], [], ["/y"], files)
    assert vars(messages.decode_request(messages.encode_request(sent))) == vars(sent)
    report = messages.encode_report(messages.Report("signal", -9, 12, b"out", b""))
    assert vars(messages.decode_report(report) or sent)["status"] == -9
    assert all(messages.decode_report(report[:end]) is None for end in range(len(report)))


def test_a_filter_for_both_processors_and_no_other() -> None:
    for machine in seccomp.AUDIT_ARCH:
        code = seccomp.program_filter(machine)
        assert len(code) % 8 == 0 and len(code) // 8 < 4096
    with pytest.raises(OSError, match="no seccomp filter for the processor riscv64"):
        seccomp.program_filter("riscv64")


def test_a_spare_user_is_one_that_may_be_mapped() -> None:
    assert namespaces._spare_id("0 0 4294967295\n") == namespaces.SPARE_USERS + os.getpid()
    assert namespaces._spare_id("0 1000 1\n1 100000 65536\n") == namespaces.NOBODY
    assert namespaces._spare_id("0 1000 1\n") is None
