"""The suite itself: every test is run by some job, no dtype or backend falls out in silence, and a failure is reported."""

import ast
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import operations
import pytest
import run
import torch
from helpers import DTYPES

TESTS = Path(__file__).resolve().parent
# test_gpu.py runs on a machine with a GPU (make gpu-check). What is not installed leaves no test to run.
NEEDED = {
    "triton": ("test_triton.py", "test_triton_aot.py"),
    "transformers": ("test_accelerate_families.py",),
    "tokenizers": (
        "test_tokenizer.py",
        "test_training.py",
        "test_checkpoint.py",
        "test_train.py",
        "test_train_processes.py",
    ),
}
ABSENT = (file for package, files in NEEDED.items() if importlib.util.find_spec(package) is None for file in files)
ELSEWHERE = ("test_gpu.py", "test_gpu_streams.py", *ABSENT)
COLLECT = """
import json, sys, pytest
class Collected:
    def pytest_collection_finish(self, session):
        tests = [(item.nodeid, sorted({mark.name for mark in item.iter_markers()})) for item in session.items]
        json.dump(tests, open(sys.argv[1], "w"))
sys.exit(pytest.main(["tests", "--collect-only", "-qq", "-p", "no:cacheprovider"], plugins=[Collected()]))
"""


def file_of(test: str) -> str:
    return test.split("::")[0].split("/")[-1]


def function_of(test: str) -> str:
    return test.split("[")[0]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """What pytest collects in the environment of each job: tests and their markers."""
    folder = tmp_path_factory.mktemp("collected")
    kinds = {kind(job): job for job in run.jobs(False, [])}

    def collect(item):
        name, job = item
        out = folder / "-".join(("tests", *name))
        command = [sys.executable, "-c", COLLECT, out]
        env = {**os.environ, "PYTHONPATH": f"{TESTS.parent}", **job.env}
        result = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return name, json.loads(out.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(collect, kinds.items()))


def kind(job: run.Job) -> tuple[str, ...]:
    """What decides which tests pytest finds: neither instruction set nor number of cases does."""
    return tuple(name for name in ("FASTLLM_CUDA_HOST", "TRITON_INTERPRET") if name in job.env)


def selected(job: run.Job, collected) -> list[str]:
    """By pytest's rules of -m, which are Python's."""
    names = ("numbers", "contract", "slow")
    tests = collected[kind(job)]
    return [test for test, marks in tests if eval(job.select, {name: name in marks for name in names})]


def written() -> set[str]:
    """Every test function in the files of the suite."""
    found = set()
    for path in TESTS.glob("test_*.py"):
        if path.name in ELSEWHERE:
            continue
        tree = ast.parse(path.read_text())
        scopes = [(f"tests/{path.name}", tree.body)]
        scopes += [(f"tests/{path.name}::{c.name}", c.body) for c in tree.body if isinstance(c, ast.ClassDef)]
        for scope, body in scopes:
            if "::" in scope and not scope.split("::")[1].startswith("Test"):
                continue
            found |= {
                f"{scope}::{f.name}" for f in body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
            }
    return found


def test_every_test_function_is_run_by_a_job(collected):
    ran = {function_of(test) for job in run.jobs(True, ["default"]) for test in selected(job, collected)}
    assert written() - ran == set()


def test_only_slow_tests_are_left_out_of_make_test(collected):
    ran = {test for job in run.jobs(False, ["default"]) for test in selected(job, collected)}
    everything = {test: marks for job in run.jobs(False, ["default"]) for test, marks in collected[kind(job)]}
    left = {test for test, marks in everything.items() if "slow" not in marks and file_of(test) not in ELSEWHERE}
    assert left - ran == set()
    assert not [test for test in ran if "slow" in everything[test]]


@pytest.mark.parametrize("everything", [False, True])
def test_the_cpu_runs_each_test_once(collected, everything):
    first, second = (set(selected(job, collected)) for job in run.jobs(everything, [])[:2])
    assert not first & second
    assert {test for test, marks in collected[()] if everything or "slow" not in marks} == first | second


KERNEL_JOBS = [
    job
    for everything in (False, True)
    for job in run.jobs(everything, ["default"])
    if "all else" not in job.title and "FASTLLM_TEST_NODES" not in job.env and "FASTLLM_TEST_NATIVE" not in job.env
]
KERNEL_JOB = pytest.mark.parametrize(
    "job", KERNEL_JOBS, ids=lambda job: f"{job.title}{job.env.get('FASTLLM_TESTS', '')}"
)
# The least number of tests of a file in every job that runs kernels, and how many of them are in float16.
LEAST = {
    "test_contract.py": (150, 0),
    "test_cross_entropy.py": (80, 10),
    "test_embedding.py": (80, 16),
    "test_linear_cross_entropy.py": (50, 1),
    "test_linear_relu.py": (10, 2),
    "test_log_probs.py": (40, 6),
    "test_log_probs_rows.py": (80, 20),
    "test_mse_loss.py": (12, 1),
    "test_opinfo.py": (12, 3),
    "test_relu_mlp.py": (4, 1),
}
LEAST_OF_CUDA = {
    "test_cuda_cross_entropy.py": (180, 14),
    "test_cuda_embedding.py": (190, 31),
    "test_cuda_host.py": (14, 0),
    "test_cuda_linear.py": (95, 30),
}


@KERNEL_JOB
def test_no_file_and_no_float16_falls_out(collected, job):
    tests = selected(job, collected)
    least = LEAST | (LEAST_OF_CUDA if "FASTLLM_CUDA_HOST" in job.env else {})
    least |= {"test_triton.py": (35, 0)} if "TRITON_INTERPRET" in job.env else {}
    for file, (all_of_it, in_float16) in least.items():
        those = [test for test in tests if file_of(test) == file]
        assert len(those) >= all_of_it, file
        assert len([test for test in those if "torch.float16" in test]) >= in_float16, file


@KERNEL_JOB
def test_every_operation_in_every_dtype(collected, job):
    tests = selected(job, collected)
    for op, dtype in itertools.product(
        ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy"), DTYPES
    ):
        assert f"tests/test_{op}.py::test_error_against_float64[{dtype}]" in tests


def test_every_test_of_the_cuda_kernels_is_run(collected):
    """The mma and wgmma kernels in float16 and the tests of repeated bits once ran nowhere."""
    job = next(job for job in run.jobs(False, []) if "FASTLLM_CUDA_HOST" in job.env)
    tests = selected(job, collected)
    there = [(t, m) for t, m in collected[kind(job)] if file_of(t).startswith("test_cuda_") and "aot" not in t]
    assert {test for test, marks in there if "slow" not in marks} <= set(tests)
    for part in ("test_mma[", "test_wgmma[", "test_repeats_bit_for_bit[wgmma", "test_repeats_give_the_same_bits["):
        assert [test for test in tests if part in test], part
    assert [test for test in tests if "test_wgmma[" in test and "float16" in test]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_meet_in_pairs(dtype, monkeypatch):
    options = [range(4), "abc", [None, 1.5], range(5)]

    def allowed(a, b, c, d):
        return not (b == "c" and d == 4)

    monkeypatch.setattr(operations, "EVERYTHING", True)
    every = operations.combinations(*options, dtype=dtype, allowed=allowed)
    assert len(every) == 4 * 2 * (3 * 5 - 1)
    monkeypatch.setattr(operations, "EVERYTHING", False)
    few = operations.combinations(*options, dtype=dtype, allowed=allowed)
    assert set(few) <= set(every) and len(set(few)) == len(few) <= 26
    pairs = [{pair for c in cases for pair in itertools.combinations(enumerate(c), 2)} for cases in (every, few)]
    assert pairs[0] == pairs[1]


def test_how_many_cases(monkeypatch):
    wanted = {"mse_loss": (15, 30), "embedding": (18, 36), "linear": (42, 84), "cross_entropy": (24, 252)}
    wanted["linear_cross_entropy"] = (16, 120)
    for family, (few, every) in wanted.items():
        monkeypatch.setattr(operations, "EVERYTHING", False)
        assert len(operations.ALL[family](torch.float32)) == few
        monkeypatch.setattr(operations, "EVERYTHING", True)
        assert len(operations.ALL[family](torch.float32)) == every


# How the jobs end.
FILES = {
    "good": "def test_a(): pass\ndef test_b(): pass",
    "bad": "import pytest\ndef test_a(): assert 'this' == 'that'\ndef test_b(): pytest.skip('a reason')",
    "absent": "import pytest\npytest.skip('a whole file', allow_module_level=True)",
    "dead": "import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGSEGV)",
    "broken": "import no_such_module",
    "endless": "import pathlib, time\ndef test_a():\n pathlib.Path('begun').touch()\n time.sleep(100)",
}
RUN = """
import sys
sys.path.insert(0, {tests!r})
import run
from pathlib import Path
run.OUT = Path("out")
jobs = [run.Job(name, "", {{}}, 1, arguments=[f"{{name}}.py"], cwd=Path.cwd()) for name in {names!r}]
run.jobs, run.build_emulator, run.other_instruction_sets = lambda *_: jobs, lambda: None, lambda: []
sys.argv = ["run.py", *{arguments!r}]
sys.exit(run.main())
"""


def started(folder, names, *arguments):
    for name in names:
        (folder / f"{name}.py").write_text(FILES[name] + "\n")
    code = RUN.format(tests=str(TESTS), names=names, arguments=arguments)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(folder, names, *arguments):
    process = started(folder, names, *arguments)
    return process.communicate(timeout=120)[0], process.returncode


def test_what_the_jobs_end_with_is_reported(tmp_path):
    said, status = ended(tmp_path, ["good", "bad", "absent", "dead", "broken"])
    assert status == 1
    assert "this" in said and "that" in said  # a failure is shown
    assert "a whole file" in said and "a reason" in said
    assert "ended by signal 11 (SIGSEGV)" in said and "no_such_module" in said
    assert said.splitlines()[-1] == "2 passed, 4 failed, 2 skipped"  # absent has run no test
    said, status = ended(tmp_path, ["good"])
    assert status == 0 and said.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"


def test_arguments_choose_tests_and_show_the_output(tmp_path):
    said, status = ended(tmp_path, ["good", "absent"], "-v", "-k", "test_a")
    assert status == 0 and "good.py::test_a PASSED" in said and said.splitlines()[-1].startswith("1 passed, 0 failed")
    assert ended(tmp_path, ["good"], "-k", "no_such_test")[1] == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process(tmp_path, how):
    process = started(tmp_path, ["endless"])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.send_signal(how)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in said
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert left == ""
