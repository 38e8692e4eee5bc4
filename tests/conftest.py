"""Chooses what the kernels run on: the CPU, a GPU (FASTLLM_TEST_DEVICE=cuda), or CUDA kernels emulated on the CPU.

``FASTLLM_TEST_NODES=python`` puts the autograd nodes in Python, which serve without the compiled extension, in the place
of those in C++. ``FASTLLM_TEST_NATIVE=0`` hides the extension, as on a machine without a compiler. FASTLLM_TEST_FAILURES names
a file that gets a line for each failure at once, for runs that may be cut off.
"""

import importlib.util
import itertools
import os
import signal
import sys
import tempfile

import pytest
import torch

NEIGHBOURS = 16  # tests of a file that stay together when tests are shared out

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("FASTLLM_TEST_NATIVE") == "0":
    sys.modules["fastllm._build_info"] = None  # its import fails
    os.environ["FASTLLM_HOME"] = tempfile.mkdtemp()  # holds no build

if "1" in (os.environ.get("FASTLLM_CUDA_HOST"), os.environ.get("TRITON_INTERPRET")):
    collect_ignore = ["test_accelerate_families.py"]  # about models, not kernels; its imports take seconds

if os.environ.get("FASTLLM_CUDA_HOST") == "1":
    import cuda_host

    cuda_host.enable()

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreter

    interpreter.enable()

if os.environ.get("FASTLLM_TEST_DEVICE") == "cuda" and torch.cuda.is_available():
    torch.set_default_device("cuda")

if os.environ.get("FASTLLM_TEST_NODES") == "python":
    import fastllm

    fastllm.operations.implement_in_python(fastllm.operations.OPERATIONS, override=True)


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="k/n: a share of the selected tests; n such runs are all of them")


def _note_failure(report, when: str) -> None:
    file = os.environ.get("FASTLLM_TEST_FAILURES")
    if file and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker's reports reach its parent
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message[:300] if crash else str(report.longrepr)[-300:]  # a traceback ends in the error
        with open(file, "a") as out:
            out.write(f"{report.nodeid} ({when}): {' '.join(reason.split())}\n")


def pytest_collectreport(report):
    _note_failure(report, "collection")


def pytest_runtest_logreport(report):
    _note_failure(report, report.when)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """Runs of neighbours are dealt out like cards: what a file imports or compiles is often needed by one part alone."""
    part, parts = map(int, config.getoption("--part").split("/"))
    files = [list(tests) for _, tests in itertools.groupby(items, key=lambda item: item.path)]
    hands = [tests[i : i + NEIGHBOURS] for tests in files for i in range(0, len(tests), NEIGHBOURS)]
    kept = [item for i, hand in enumerate(hands) if i % parts == part - 1 for item in hand]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept] if parts > 1 else [])
    items[:] = kept
