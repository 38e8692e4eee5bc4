"""make gpu-check without a GPU: a command that hangs, a pytest that dies, and the page that says what failed."""

import signal
import sys
import time
from pathlib import Path

import gpu_check
from gpu_check import Command

TESTS = Path(__file__).resolve().parent


def run(tmp_path, command, seconds):
    return gpu_check.run(command, seconds, tmp_path / "log", tmp_path / "failures.txt")[0]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_command_at_its_limit_leaves_no_process(tmp_path, monkeypatch):
    """One that does not end when it is interrupted, and has started another."""
    monkeypatch.setattr(gpu_check, "WAIT", 0.2)
    code = f"""
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    assert run(tmp_path, Command("hangs", [sys.executable, "-c", code], 5), 5) == "FAILED (more than 5 s)"
    child, end = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def test_an_interrupted_command_may_report(tmp_path):
    code = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('what failed so far')"
    assert run(tmp_path, Command("reports", [sys.executable, "-c", code], 3), 3) == "FAILED (more than 3 s)"
    assert "what failed so far" in (tmp_path / "log").read_text()


def test_failures_are_kept_when_pytest_dies(tmp_path, monkeypatch):
    """A file that cannot be imported does not stop the others, and a failure is written before the process is gone."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "test_dies.py").write_text(
        f"import os\ndef test_fails(): assert 1 == 2\ndef test_dies(): os.kill(os.getpid(), {signal.SIGKILL.value})\n"
    )
    suite = gpu_check.commands(tmp_path, 1, "none")["suite"][0].arguments
    options = [o for o in suite[: suite.index("tests")] if o not in ("-n", "1")]
    command = Command("dies", [*options, "-p", "conftest", str(tmp_path)], 300)
    assert run(tmp_path, command, 300) == f"FAILED (status {-signal.SIGKILL})"
    failures = (tmp_path / "failures.txt").read_text()
    assert "test_broken.py (collection)" in failures and "a_module_that_is_not_there" in failures
    assert "test_fails (call): assert 1 == 2" in failures


def test_every_part_runs_something_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "is_built", lambda: False)
    parts = gpu_check.commands(tmp_path, 2, "none")
    assert all(parts.values())
    for command in (command for part in parts.values() for command in part):
        files = [a.removeprefix("--ignore=") for a in command.arguments if a.endswith(".py")]
        assert files and all((gpu_check.ROOT / file).exists() for file in files), (command.title, files)


def test_the_page_names_the_first_ten_failures(tmp_path):
    text = gpu_check.page(["| a | passed | 1 |"], [f"- failure {i}" for i in range(12)], tmp_path)
    assert "- failure 9\n... and 2 more failures" in text and "failure 10" not in text and "| a | passed | 1 |" in text
    assert "Nothing failed." in gpu_check.page([], [], tmp_path)
