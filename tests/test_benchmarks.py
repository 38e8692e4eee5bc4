"""README's table is the one that the committed results give."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    yield readme
    for name in ("readme", "run", "cases", "compare", "plots", "scaling", "end_to_end", "harness"):
        sys.modules.pop(name, None)


def test_readme_shows_the_committed_results(readme):
    text = (ROOT / "README.md").read_text()
    assert readme.with_results(text) == text
    folder = ROOT / "benchmarks" / "results" / "cpu"
    report = json.loads((folder / "results.json").read_text())
    assert len(report["cases"]) == len(sys.modules["cases"].CASES["cpu"])
    assert not any("failed" in case for case in report["cases"])
    points = json.loads((folder / "scaling.json").read_text())["points"]
    import scaling

    assert {(p["series"], p["size"]) for p in points} == {
        (s, n) for s, (_, ns, _) in scaling.SERIES.items() for n in ns
    }
    for name in ("speedup", "scaling"):
        for kind in ("png", "svg"):
            assert (folder / f"{name}.{kind}").stat().st_size > 10_000


def _report(**cases):
    """Results of cases with the given medians in seconds, a tenth of noise around each; None for a failure."""
    return {
        "machine": {"processor": "p", "device": "cpu", "threads": 2, "torch": "2.13.0", "date": "2026-01-01"},
        "peers": ["compile"],
        "cases": [
            {
                "op": name,
                "shape": "4 x 4",
                "dtype": "fp32",
                "seconds": {
                    "eager": {"min": 2.0},
                    "compile": {"failed": "no compiler"},
                    "fastllm": {"failed": "why"}
                    if median is None
                    else {"min": 0.9 * median, "p20": 0.95 * median, "median": median, "p80": 1.05 * median},
                },
            }
            for name, median in cases.items()
        ],
    }


def test_compare_tells_what_moved_beyond_its_noise(readme, tmp_path, capsys):
    import compare

    old = _report(same=1.0, noisy=1.0, slower=1.0, faster=1.0, breaks=1.0, gone=1.0)
    new = _report(same=1.0, noisy=1.08, slower=1.3, faster=0.5, breaks=None, new=1.0)
    lines = {name.split()[0]: (text, worse) for name, text, worse in compare.moved(old, new, 0.05)}
    assert set(lines) == {"slower", "faster", "breaks", "gone", "new"}
    assert lines["slower"] == ("1e+03 -> 1.3e+03 ms, 1.30 times", True) and not lines["faster"][1]
    assert lines["breaks"] == ("fails now", True)
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, report in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(report))
    assert compare.main([str(f) for f in files]) == 1
    assert "SLOWER: slower 4 x 4 fp32" in capsys.readouterr().out
    assert compare.main([str(files[0]), str(files[0])]) == 0
    assert "nothing moved" in capsys.readouterr().out


def test_plot_shows_every_case(readme):
    pytest.importorskip("matplotlib")
    import plots

    report = _report(a=1.0, b=4.0, c=None)
    names, values = plots.speedups(report)
    assert len(names) == 3 and values == {"fastllm": [2 / 0.9, 2 / 3.6, None]}
    figure = plots.draw(report)
    assert len(figure.axes[0].patches) == 2
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([2 / 0.9 - 1, 2 / 3.6 - 1])


def test_a_failed_peer_is_a_line(readme):
    report = _report(a=1.0)
    report["machine"] |= {"instruction_set": "AVX2", "float32_gemm": "oneDNN", "commit": "x"}
    report["machine"]["limits"] = {"copy": 1e9, "in_place": 1e9, "gemm_fp32": 1e9, "gemm_bf16": 1e9}
    report["warm_malloc"] = {}
    report["cases"][0] |= {"bytes": 100, "flops": 0, "target": 3.0}
    text = sys.modules["run"].table(report)
    assert "failed: no compiler" in text and "3 (missed)" in text


def test_scaling_plot_and_floor(readme):
    pytest.importorskip("matplotlib")
    import scaling

    series = next(iter(scaling.SERIES))
    limits = {"copy": 1e9, "gemm_fp32": 1e11}
    points = [
        {"series": series, "size": n, "threads": t, "bytes": 10**6 * n, "flops": 10**9, "dtype": "fp32",
         "seconds": {"eager": n / t, "fastllm": n / t / 2}, "extra_peak": {"eager": 10**7 * n, "fastllm": 0}}
        for n in (1, 4, 16)
        for t in (1, 2)
    ]  # fmt: skip
    assert scaling.floor(points[0], limits) == pytest.approx(1e-3 + 1e-2)
    time, memory = scaling.draw({"limits": limits, "points": points}).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in time.get_lines()}
    assert lines["fastllm, 1 thread"] == [500, 2000, 8000] and lines["eager, 2 threads"] == [500, 2000, 8000]
    assert lines["floor, 2 threads"] == pytest.approx([11, 14, 26])
    assert {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}["eager"] == [10, 40, 160]


def test_training_is_measured(readme):
    import end_to_end

    threads = torch.get_num_threads()
    try:
        result = end_to_end.train(next(iter(end_to_end.MODELS)), "fastllm", threads, "cpu", 0.01)
    finally:
        torch.set_num_threads(threads)
    assert result["tokens_per_second"] > 100 and result["extra_peak"] >= 0
    results = {v: {"tokens_per_second": 100.0 * (i + 1), "extra_peak": 2e6} for i, v in enumerate(end_to_end.VARIANTS)}
    results["eager, compiled"] = {"failed": "no | compiler"}
    text = end_to_end.table({"machine": "m", "threads": 2, "torch": "t", "models": {"one": results}})
    assert "| one | 100 (1.00), 2 MB | failed: no / compiler | 300 (3.00), 2 MB | 400 (4.00), 2 MB |" in text
