"""Benchmarks of a GPU, rehearsed on the CPU: one process for all cases, and what becomes of variants that end or hang it."""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import modules_of
from torch.overrides import TorchFunctionMode

import fastllm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    threads, backend = torch.get_num_threads(), fastllm.backends.get_backend()
    with modules_of(ROOT / "benchmarks"):
        yield
    torch.set_num_threads(threads)
    fastllm.set_backend(backend)


LIMITS = {"copy": 1e9, "in_place": 1e9, "gemm_fp32": 1e9, "gemm_bf16": 1e9, "eager_fp32": 1e9, "eager_bf16": 1e9}


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU lie on the CPU."""

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*arguments, **kwargs)


class Event:
    """Of a device that runs what is enqueued at once, but sleeps for nothing."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return False

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Graph:
    def replay(self):
        pass


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def device(monkeypatch):
    """torch.cuda as far as the benchmarks use it; ``calls`` names what was called, in order."""
    calls = []

    def called(name, result=None):
        return lambda *_, **__: calls.append(name) or result

    for name, result in {
        "_sleep": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 300,
        "get_device_name": "NVIDIA H0",
        "is_available": True,
        "current_stream": Stream(),
        "stream": contextlib.nullcontext(),
        "graph": contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, called(name, result))
    for name, kind in {"Event": Event, "Stream": Stream, "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, kind)
    with OnTheCpu():
        yield calls


def options_of(run, *arguments):
    return run._options(["--rehearse", "--budget", "0.05", "--peers", "none", *arguments])


def plan(**changes):
    return {"cases": [], "dropped": {}, "excluded": {}, "machine": None, "seconds": 100.0, "prepare": False} | changes


def test_every_case_of_a_gpu_is_measured(device, monkeypatch):
    import cases
    import harness
    import report
    import run
    import together

    monkeypatch.setattr(harness, "machine_limits", lambda device: LIMITS)
    monkeypatch.setattr(together, "SMALL", 60.0)
    options, indices = options_of(run, "--device", "cuda", "--peers", "torch's own")
    assert options.together and len(indices) == len(cases.CUDA_ENTRIES)
    told = []
    together.Measuring(plan(cases=indices), options, told.append).run()
    head = next(t for t in told if "machine" in t)
    assert head["machine"]["device"] == "NVIDIA H0" and head["machine"]["limits"] == LIMITS
    results = {t["case"]: t["result"] for t in told if "case" in t}
    assert list(results) == indices
    for index, result in results.items():
        name = cases.CUDA_ENTRIES[index].name
        assert "failed" not in result, (name, result)
        assert {"eager", "fastllm", "fastllm cpu"} <= set(result["seconds"]), name
        for variant, times in result["seconds"].items():
            assert "both" in times, (name, variant, times)
        assert result["from_eager"]["fastllm cpu"] < 0.05 and result["extra_peak"]["fastllm"] == 200, name
        assert max(result["error"]["fastllm"].values()) < 0.05, name
        assert set(result["graph"]) >= {"eager", "fastllm"}, name
    head["missing"] |= {"Quack": "not there"}
    facts = [run.facts_of(cases.CUDA_ENTRIES[i]) | results[i] for i in indices]
    whole = head | {"peers": ["torch's own"], "backends": ["fastllm cpu"], "cases": facts, "warm_malloc": {}}
    text = report.short(json.loads(json.dumps(whole)))
    assert all(f"| {entry.name} |" in text for entry in cases.CUDA_ENTRIES) and "| cpu ms |" in text
    assert "torch's own |" in text and "replayed as a CUDA graph" in report.details(whole)
    # Inputs come from memory, and the device waits before the first mark.
    assert device.count("_sleep") > len(indices) * 8


def test_a_clock_waits_for_the_host_and_tells_when_it_did_not(device, monkeypatch):
    import cases
    import harness

    case = cases.mse_loss(3, cases.Sizes(1, 1, 5), "fp32")
    clock = harness.Clock("cuda")
    assert clock.cycles > 0
    assert harness.sample(case, case.eager, clock, harness.MODES)["late"] is False
    monkeypatch.setattr(Event, "query", lambda self: True)
    for _ in range(5):
        assert harness.sample(case, case.eager, clock, harness.MODES)["late"] is True
    assert clock.leads == {case.eager: clock.MOST_LEAD}
    found = harness.measure(case, {"eager": case.eager}, "cuda", 4, 0.0)
    assert found["eager"]["both"]["late"] == found["eager"]["both"]["rounds"] == harness.LEAST
    assert "late" not in found["eager"]["no_grad"]


def test_a_variant_runs_on_its_backend(monkeypatch):
    import cases
    import harness

    import fastllm

    seen = []
    monkeypatch.setattr(fastllm, "set_backend", seen.append)
    case = cases.mse_loss(3, cases.Sizes(1, 1, 5), "fp32")
    pair = {name: harness.OfBackend(case.ours, name) for name in ("a", "b")}
    harness.measure(case, pair, "cpu", 3, 0.0, ("both",))
    assert seen[:4] == ["a", "b", "b", "a"]


def test_failures_are_results_and_a_lost_device_ends_the_process(device, monkeypatch):
    import peers
    import run
    import together

    def failing(*_):
        raise RuntimeError("illegal address\nsecond line")

    def slow(*_):
        time.sleep(5)

    def wrong(x, y):
        return 2 * torch.nn.functional.cross_entropy(x, y)

    made = {"Liger": failing, "CCE": slow, "Quack": wrong}
    for name, function in made.items():
        monkeypatch.setitem(peers.PEERS, name, lambda f=function: {"cross_entropy": f})
    chosen = ["--device", "cuda", "--ops", "cross_entropy", "--shapes", "small", "--first", "0.2"]
    options, indices = options_of(run, *chosen, "--peers", "Liger,CCE,Quack")
    told = []
    measuring = together.Measuring(plan(cases=indices, machine={"limits": LIMITS}), options, told.append)
    measuring.run()
    result = told[-1]["result"]
    assert result["seconds"]["Liger"] == {"failed": "illegal address"}
    assert result["seconds"]["CCE"] == {"failed": "its first call took more than 0 s"}
    assert 0.9 < result["from_eager"]["Quack"] < 1.1 and "both" in result["seconds"]["Quack"]
    assert told[-2]["at"] == [indices[0], "", "errors"]

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(together.Lost, match="illegal memory"):
        together.Measuring(plan(cases=indices, machine={"limits": LIMITS}), options, told.append).run()


def test_every_backend_is_timed_in_every_case(device, monkeypatch):
    """The backend that served the last variant is not the one that was asked for."""
    import run
    import together

    from fastllm import backends

    everywhere = dataclasses.replace(backends.TABLE["triton"], device_types=(), missing=None)
    monkeypatch.setitem(backends.TABLE, "triton", everywhere)
    options, indices = options_of(run, "--device", "cuda", "--ops", "mse_loss")
    told = []
    together.Measuring(plan(cases=indices, machine={"limits": LIMITS}), options, told.append).run()
    results = [t["result"] for t in told if "case" in t]
    assert len(results) == 2
    for result in results:
        assert {"fastllm cpu", "fastllm triton"} <= set(result["seconds"])
        assert {"eager", "fastllm cpu", "fastllm"} <= set(result["error"])


def test_errors_of_large_cases_are_those_of_fewer_rows(monkeypatch):
    import cases
    import run
    import together
    from torch._subclasses.fake_tensor import FakeTensorMode

    options, _ = options_of(run, "--together")
    options.rehearse, options.device = False, "cuda"
    measuring = together.Measuring(plan(), options, print)
    for index, entry in enumerate(cases.CUDA_ENTRIES):
        with FakeTensorMode():
            case = entry.case()
        rows = measuring._rows_for_errors(index, case)
        assert min(64, entry.n) <= rows <= entry.n, entry.name
        if rows < entry.n:
            assert rows % 64 == 0 and case.flops * rows / entry.n <= together.ERROR_FLOPS, entry.name
    llama = next(i for i, e in enumerate(cases.CUDA_ENTRIES) if e.name == "cross_entropy llama 8192 bf16")
    with FakeTensorMode():
        assert measuring._rows_for_errors(llama, cases.CUDA_ENTRIES[llama].case()) == 2048


class Script:
    """Processes that tell what ``lines`` say, one list for each: a number ends one with that status, None hangs."""

    def __init__(self, lines):
        self.lines, self.plans, self.ended = lines, [], 0

    def __call__(self, options, log):
        told = iter(self.lines.pop(0))
        script = self

        class Process:
            status = 0

            def go(self, **plan):
                script.plans.append(json.loads(json.dumps(plan)))

            def receive(self, seconds):
                line = next(told, None)
                if line == "hangs":
                    raise TimeoutError(f"nothing for {seconds:.0f} s")
                if isinstance(line, int):
                    self.status = line
                    return None
                return line

            def end(self, seconds=0):
                script.ended += 1
                return self.status

            def last_words(self):
                return "segmentation fault"

        return Process()


HEAD = {"machine": {"limits": LIMITS}, "missing": {}}
GOOD = {"seconds": {}}


@pytest.mark.parametrize(
    ("first", "dropped", "excluded", "failed"),
    [
        ([{"at": [7, "Liger", "its first call"]}, -11], {"Liger"}, set(), set()),
        ([{"at": [7, "CCE", "its first call"]}, "hangs"], {"CCE"}, set(), set()),
        ([{"at": [7, "fastllm cuda", "its first call"]}, {"lost": "illegal"}, 3], set(), {"fastllm cuda"}, set()),
        ([{"at": [7, "", "timing"]}, -11], set(), set(), {7}),
        ([{"at": [7, "eager", "its first call"]}, -6], set(), set(), {7}),
    ],
)
def test_a_lost_process_costs_what_was_running(monkeypatch, first, dropped, excluded, failed):
    import run
    import together

    options, _ = options_of(run, "--together", "--prepare", "0")
    rest = [{"case": i, "result": GOOD} for i in (7, 5) if i not in failed]
    script = Script([[HEAD, {"case": 3, "result": GOOD}, *first], [HEAD, *rest]])
    monkeypatch.setattr(together, "Process", script)
    report, found = {}, {}
    together.drive(options, [3, 7, 5], report, found.__setitem__)
    assert set(found) == {3, 7, 5} and {i for i, r in found.items() if "failed" in r} == failed
    assert script.ended == report["processes"] == 2
    again = script.plans[1]
    assert again["cases"] == [i for i in (7, 5) if i not in failed] and again["machine"] == HEAD["machine"]
    assert set(again["dropped"]) == dropped
    assert set(again["excluded"].get("7", {})) == excluded


def test_a_process_that_never_starts_ends_the_run(monkeypatch):
    import run
    import together

    options, _ = options_of(run, "--together", "--prepare", "0")
    monkeypatch.setattr(together, "Process", Script([[1], [1]]))
    report, found = {}, {}
    together.drive(options, [3, 7], report, found.__setitem__)
    assert all(r["failed"] == "status 1: segmentation fault" for r in found.values()) and set(found) == {3, 7}


def test_what_does_not_fit_in_the_time_is_skipped(monkeypatch):
    import run
    import together

    options, _ = options_of(run, "--together", "--prepare", "0", "--seconds", "1")
    monkeypatch.setattr(together, "Process", Script([[HEAD, {"case": 3, "result": GOOD}]]))
    report, found = {}, {}
    together.drive(options, [3, 7], report, found.__setitem__)
    assert found == {3: GOOD, 7: {"skipped": "no time left of 1 s"}}


STUBS = {  # of the peers: one ends the process, one hangs where no signal reaches it
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops.py": "LigerEmbeddingFunction = None",
    "liger_kernel/transformers/__init__.py": "",
    "liger_kernel/transformers/functional.py": """
import os
def liger_cross_entropy(x, y): os.kill(os.getpid(), 11)
def liger_fused_linear_cross_entropy(x, w, y): os.kill(os.getpid(), 11)
""",
    "cut_cross_entropy.py": """
import signal, time
def linear_cross_entropy(x, w, y):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(600)
""",
}


@pytest.mark.slow
def test_real_processes_end_and_hang_and_the_rest_is_measured(tmp_path, monkeypatch, capfd):
    import harness
    import run

    for name, text in STUBS.items():
        file = tmp_path / "stubs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stubs"), str(ROOT)]))
    chosen = ["--together", "--rehearse", "--ops", "linear_cross_entropy,mse_loss", "--shapes", "small,aim"]
    chosen += ["--peers", "Liger,CCE", "--budget", "0.05", "--first", "5", "--silence", "25", "--prepare", "1"]
    assert run.main([*chosen, "--seconds", "400", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["processes"] == 3 and report["backends"][0] == "fastllm cpu"
    for case in report["cases"]:
        assert set(case["seconds"]["fastllm"]) == set(harness.MODES)
        if case["op"] == "mse_loss":
            assert not {"Liger", "CCE"} & set(case["seconds"])
        else:
            assert "lost the process at its first call: status -11" in case["seconds"]["Liger"]["failed"]
            assert "nothing for 25 s" in case["seconds"]["CCE"]["failed"]
    assert "| of floor |" in capfd.readouterr().out
