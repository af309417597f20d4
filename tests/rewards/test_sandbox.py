"""Programs that really try to get out, at every level this machine permits."""

import os
import socket
import threading
import time

import pytest

from aa_jax.errors import ConfigError
from aa_jax.rewards import sandbox
from aa_jax.rewards.base import RewardError
from aa_jax.rewards.sandbox import Jail, Limits, python_command

LIMITS = Limits(cpu_seconds=1, wall_seconds=60.0, memory_mb=256, disk_mb=4, output_kb=64)
CONTAINED = [level for level in ("namespaces", "landlock") if sandbox.problem(level) is None]


@pytest.fixture(params=CONTAINED)
def level(request):
    return request.param


def run(code, level, stdin="", **limits):
    limits = Limits(**{**vars(LIMITS), **limits})
    return sandbox.run(
        python_command("main.py"), {"main.py": code}, stdin=stdin, limits=limits, isolation=level
    )


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_this_machine_contains_programs():
    """The other tests run once per level found here: there must be one."""
    assert CONTAINED and sandbox.choose() == CONTAINED[0]


def test_an_honest_program_runs(level):
    code = (
        "import json, math, threading, tempfile, sys\n"
        "with tempfile.TemporaryFile('w+') as f: f.write('kept'); f.seek(0); assert f.read()\n"
        "t = threading.Thread(target=print, args=('from a thread',)); t.start(); t.join()\n"
        "print(int(input()) * 2, input())\n"
        "sys.stderr.write('note')\n"
    )
    outcome = run(code, level, stdin="21\nä\n")
    assert outcome.status == "ok", outcome.stderr
    assert outcome.stdout == "from a thread\n42 ä\n" and outcome.stderr == "note"
    assert run("import sys; sys.exit(3)", level).status == "exit 3"


def test_an_endless_loop_ends_by_processor_time(level):
    outcome = run("import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\n"
                  "while True: pass", level)  # fmt: skip
    assert outcome.status == "signal SIGKILL" and outcome.stdout == ""


def test_a_sleeper_ends_by_the_clock_and_is_gone():
    code = "import time\nprint(1, flush=True)\ntime.sleep(1e4)"
    with Jail(
        python_command("main.py"), {"main.py": code}, limits=LIMITS, isolation=CONTAINED[0],
    ) as jail:  # fmt: skip
        pid, scratch = jail.process.pid, jail._scratch
        assert jail.process.stdout.readline() == b"1\n" and is_alive(pid)
        streams = {jail.process.stdout: bytearray()}
        assert sandbox.pump(jail, b"", streams, Limits(wall_seconds=0.2)) == "timeout"
    assert not is_alive(pid) and not os.path.exists(scratch)


def test_no_process_can_be_made(level):
    code = (
        "import os, subprocess, sys\n"
        "made = 0\n"
        "for _ in range(100):\n"
        "    for make in (os.fork, lambda: subprocess.Popen([sys.executable]),\n"
        "                 lambda: os.posix_spawn(sys.executable, [sys.executable], {})):\n"
        "        try:\n"
        "            if make() == 0: os._exit(0)\n"
        "            made += 1\n"
        "        except OSError: pass\n"
        "print(made)\n"
    )
    assert run(code, level).stdout == "0\n"


def test_a_bomb_of_threads_goes_with_its_process(level):
    code = (
        "import threading, time\n"
        "threading.stack_size(1 << 20)\n"
        "n = 0\n"
        "try:\n"
        "    while True:\n"
        "        threading.Thread(target=time.sleep, args=(1e4,), daemon=True).start(); n += 1\n"
        "except (RuntimeError, MemoryError): print(n, flush=True)\n"
        "import os; os._exit(0)\n"
    )
    outcome = run(code, level, cpu_seconds=5)
    assert int(outcome.stdout or 0) < 300


def test_memory_is_limited(level):
    outcome = run("x = bytearray(1 << 30)", level)
    assert outcome.status == "exit 1" and "MemoryError" in outcome.stderr


def test_a_flood_of_output_is_cut_and_ends_the_program(level):
    outcome = run("while True: print('x' * 1000)", level)
    assert outcome.status == "output" and len(outcome.stdout) == 64 * 1024
    outcome = run("import sys\nwhile True: sys.stderr.write('x' * 1000)", level)
    assert outcome.status == "output" and len(outcome.stderr) == 64 * 1024


def test_files_are_limited(level):
    outcome = run("open('big', 'w').write('x' * (64 << 20))", level)
    assert outcome.status == "exit 1" and "OSError" in outcome.stderr


def test_there_is_no_network(level):
    """A server of this machine listens; the program cannot even make a socket to call it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        port = server.getsockname()[1]
        code = (
            f"import socket, urllib.request\nport = {port}\n"
            "for call in (lambda: socket.create_connection(('127.0.0.1', port), 2),\n"
            "             lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=2),\n"
            "             lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),\n"
            "             lambda: socket.socket(socket.AF_UNIX)):\n"
            "    try: call(); print('out')\n"
            "    except OSError: print('held')\n"
        )
        outcome = run(code, level)
        assert outcome.stdout.split() == ["held"] * 4, outcome
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_are_neither_read_nor_written_nor_deleted(level, tmp_path):
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret.txt"
    secret.write_text("key")
    secret.chmod(0o666)
    code = (
        f"import os, pathlib, shutil\np = pathlib.Path({str(tmp_path)!r})\n"
        "s = p / 'secret.txt'\n"
        "for act in (s.read_text, lambda: s.write_text('x'), s.unlink, lambda: s.chmod(0),\n"
        "            lambda: (p / 'new').write_text('x'), lambda: os.listdir(p),\n"
        "            lambda: os.rename(s, p / 'moved'), lambda: os.symlink(s, p / 'link'),\n"
        "            lambda: os.truncate(s, 0), lambda: os.link(s, 'mine'),\n"
        "            lambda: shutil.rmtree(p), lambda: os.utime(s, (0, 0)),\n"
        "            lambda: open('/usr/bin/aa_jax_t', 'w'), lambda: open('/etc/shadow').read(),\n"
        "            lambda: open('/proc/self/environ').read(), lambda: os.mkdir('/tmp/aa_jax')):\n"
        "    try: act(); print('out')\n"
        "    except OSError: print('held')\n"
    )
    before = secret.stat().st_mtime
    outcome = run(code, level)
    assert outcome.stdout.split() == ["held"] * 16, outcome
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]
    assert secret.read_text() == "key" and secret.stat().st_mtime == before
    assert secret.stat().st_mode & 0o777 == 0o666


def test_this_process_cannot_be_signalled_and_its_environment_is_not_passed_on(level, monkeypatch):
    monkeypatch.setenv("API_KEY", "very-secret")
    code = (
        f"import os, signal\nprint(dict(os.environ))\n"
        f"for pid in ({os.getpid()}, os.getppid(), -1):\n"
        "    try: os.kill(pid, signal.SIGTERM); print('out')\n"
        "    except OSError: print('held')\n"
    )
    outcome = run(code, level)
    assert outcome.stdout.split()[-3:] == ["held"] * 3
    assert "very-secret" not in outcome.stdout


def test_privileges_cannot_be_won(level):
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'none', b'/box', b'tmpfs', 0, None))\n"
        "print(libc.ptrace(16, 1, 0, 0), libc.syscall(101, 16, 1, 0, 0))\n"
        "try: os.setuid(0); os.chroot('/'); print('out')\n"
        "except OSError: print('held')\n"
    )
    assert run(code, level).stdout.split() == ["-1"] * 4 + ["held"]


def test_nothing_is_left_behind(level):
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for code in ("print(1)", "import os; os._exit(1)"):
        run(code, level)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_a_program_dies_with_the_process_that_asked(tmp_path):
    """The trainer is killed; what it was judging must not go on."""
    import subprocess
    import sys

    code = (
        "import sys, time\n"
        "from aa_jax.rewards.sandbox import Jail, Limits, choose, python_command\n"
        "jail = Jail(python_command('m.py'), {'m.py': 'import time\\nprint(1, flush=True)\\n'\n"
        "            'time.sleep(1e4)'}, limits=Limits(), isolation=choose())\n"
        "jail.process.stdout.readline()\n"
        "print(jail.process.pid, flush=True); time.sleep(1e4)\n"
    )
    # A killed process cannot remove its scratch folder; it goes with the test's.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as trainer:
        pid = int(trainer.stdout.readline())
        assert is_alive(pid)
        trainer.kill()
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def test_a_sandbox_that_cannot_be_built_says_what_is_missing(monkeypatch):
    with pytest.raises(RewardError, match="cannot be built: FileNotFoundError"):
        sandbox.run(["/no/such/program"], {}, isolation=CONTAINED[0])
    with pytest.raises(ConfigError, match="isolation='none' is not one of"):
        sandbox.choose("none")
    with pytest.raises(ConfigError, match="cpu_seconds must be above 0"):
        Limits(cpu_seconds=0)
    monkeypatch.setattr("aa_jax.rewards.sandbox.runner.problem", lambda level: f"no {level}.")
    with pytest.raises(RewardError, match="no namespaces. landlock: no landlock. Judge on"):
        sandbox.choose()


def test_less_isolation_is_never_taken_silently(monkeypatch, caplog):
    from aa_jax.rewards.sandbox import runner as module

    module._warn_limits.cache_clear()
    assert sandbox.choose("limits") == "limits"
    assert "read and write all files" in caplog.text
    outcome = run("import os\nos.fork()", "limits")
    assert outcome.status == "exit 1"
