"""The helpers that tests rely on: processes of their own end as they would without help."""

import signal
import subprocess

import pytest
from helpers import run_python


def test_processes_of_their_own():
    first = run_python("import os, sys; print(os.environ['FASTLLM_X']); kept = 1", {"FASTLLM_X": "here"})
    assert (first.returncode, first.stdout, first.stderr) == (0, "here\n", "")
    second = run_python("import os, sys; print('FASTLLM_X' in os.environ, 'fastllm' in sys.modules); print(kept)")
    assert second.returncode == 1 and second.stdout.startswith("False") and "NameError" in second.stderr
    assert run_python("raise SystemExit(3)").returncode == 3
    assert run_python("import os; os.abort()").returncode == -signal.SIGABRT
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("import time; time.sleep(60)", timeout=1)
    assert run_python("print(1)").stdout == "1\n"
