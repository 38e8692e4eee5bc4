"""The benchmarks: the documents show the committed results, whatever the machine; peers, reports, plots and comparisons work."""

import json
from pathlib import Path

import pytest
import torch
from helpers import modules_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def benchmarks():
    threads = torch.get_num_threads()
    with modules_of(ROOT / "benchmarks"):
        yield
    torch.set_num_threads(threads)


def test_the_documents_show_the_committed_results():
    import cases
    import end_to_end
    import largest
    import plots
    import readme
    import report
    import scaling

    folder = readme.shown()
    for file in readme.FILES:
        assert file.read_text() == readme.with_results(file, folder.name)
        assert f"begin {folder.name} -->" in file.read_text()
    results, scaled, training, sizes = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("results", "scaling", "end_to_end", "largest")
    )
    assert (folder / "table.md").read_text() == report.details(results)
    later = ("log_probs ", "linear_log_probs ")  # added after the committed run: the next one has them
    entries = [entry.name for entry in cases.CPU_ENTRIES if not entry.name.startswith(later)]
    assert [case["name"] for case in results["cases"] if not case["name"].startswith(later)] == entries
    assert not [case["name"] for case in results["cases"] if "failed" in case]
    wanted = {(name, size) for name, (_, values, _) in scaling.SERIES.items() for size in values}
    assert {(p["series"], p["size"]) for p in scaled["points"]} == wanted
    few_words = {title for title in end_to_end.OPT["cpu"] if "2048)" in title}  # later, too
    assert set(training["models"]) | few_words == {*end_to_end.MLPS, *end_to_end.OPT["cpu"]}
    assert {(r["operation"], r["variant"]) for r in sizes["results"]} == set(largest.ROWS)
    for name in plots.PLOTS:
        for kind in ("png", "svg"):
            assert (folder / f"{name}.{kind}").stat().st_size > 10_000


def times(least):
    return {"min": least, "p20": 1.05 * least, "median": 1.1 * least, "p80": 1.2 * least, "rounds": 5}


def result(name, fastllm, eager=2.0, dtype="fp32", **others):
    """A case of which ``fastllm`` took that many seconds; None: it failed."""
    ours = {"failed": "why"} if fastllm is None else {"both": times(fastllm), "no_grad": times(fastllm / 2)}
    return {
        "name": name,
        "op": name,
        "shape": "4 x 4",
        "dtype": dtype,
        "aim": 3.0,
        "bytes": 10**9,
        "flops": 0,
        "seconds": {"eager": {"both": times(eager), "no_grad": times(eager / 2)}, "fastllm": ours, **others},
    }


def results(*cases):
    machine = {
        "device": "cpu",
        "processor": "P",
        "instruction_set": "AVX2",
        "threads": 2,
        "load": 0.1,
        "torch": "2.13.0",
        "float32_gemm": "BLAS",
        "date": "2026-01-01",
        "commit": "x",
        "limits": {"copy": 2e9, "in_place": 2e9, "gemm_fp32": 1e9, "gemm_bf16": 1e9, "eager_fp32": 1, "eager_bf16": 1},
    }
    return {
        "machine": machine,
        "peers": ["compile", "CCE"],
        "missing": {"Quack": "not there"},
        "cases": list(cases),
        "warm_malloc": {"won": 1.5},
    }


def test_losses_failures_and_missing_peers_are_lines():
    import report

    skipped = {k: v for k, v in result("slow", 1.0).items() if k != "seconds"} | {"skipped": "too slow"}
    lost = result("lost", 2.5, compile={"both": times(2.0)}, CCE={"failed": "no | GPU"})
    text = report.details(
        results(result("won", 0.5, floor={"both": times(0.45)}), lost, result("broken", None), skipped)
    )
    assert "| **4.00** | 3 | 1.50 |" in text and "2 GB/s, 100%; 0.90 of the bare products |" in text
    assert "**0.80** (loses) | 3 (missed)" in text and "2000 (0.80, **loses**)" in text
    assert "failed: no / GPU" in text and "fastllm failed: why" in text and "skipped: too slow" in text
    assert "Not measured: Quack (not there)" in text
    assert "Slower than eager: lost 4 x 4 fp32 (0.80) (of 2 cases)" in text
    assert "Slower than compile: lost 4 x 4 fp32 (0.80) (of 1 cases)" in text
    assert "## Forward under no_grad" in text and "250 · 275 [262, 300]" in text and "CUDA graph" not in text


def test_short_tables_keep_losses_failures_and_missing_peers():
    import report

    lost = result("linear_relu", 2.5) | {"extra_peak": {"eager": 10**8, "fastllm": 5 * 10**7}}
    report_ = results(lost, result("linear_relu", 0.5), result("mse_loss", None))
    text = report.by_operation(report_)
    assert "### linear_relu\n" in text and "| 4 x 4 | fp32 | 2000 | 2500 | **0.80** (loses) | 20% |" in text
    assert "| fastllm failed: why |" in text and "Not measured: Quack (not there)" in text
    text = report.overview(report_)
    assert "| `linear_relu` | `F.relu(F.linear(...))` | 0.80 to 4.00 | 0.50 |" in text
    assert "| `mse_loss` | `F.mse_loss` |  |  |" in text


def test_compare_tells_what_moved_beyond_its_noise(tmp_path, capsys):
    import compare

    def of(**seconds):
        return results(*(result(name, value) for name, value in seconds.items()))

    old = of(same=1.0, noisy=1.0, slower=1.0, faster=1.0, breaks=1.0, gone=1.0)
    new = of(same=1.0, noisy=1.08, slower=1.3, faster=0.5, breaks=None, new=1.0)
    lines = {name: (text, worse) for name, text, worse in compare.moved(old, new, 0.05)}
    moved = {f"{name}, {mode}" for name in ("slower", "faster") for mode in ("both", "no_grad")}
    assert set(lines) == {*moved, "breaks", "gone", "new"}
    assert lines["slower, both"] == ("1.1e+03 -> 1.43e+03 ms, 1.30 times", True) and not lines["faster, both"][1]
    assert lines["breaks"] == ("fails now", True)
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, report in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(report))
    assert compare.main([str(f) for f in files]) == 1
    assert "SLOWER: slower, both" in capsys.readouterr().out
    assert compare.main([str(files[0]), str(files[0])]) == 0
    assert "nothing moved" in capsys.readouterr().out


def test_run_chooses_cases_and_measures(tmp_path, monkeypatch, capsys):
    import harness
    import run

    limits = {"copy": 1e9, "in_place": 1e9, "gemm_fp32": 1e9, "gemm_bf16": 1e9, "eager_fp32": 1e9, "eager_bf16": 1.0}
    monkeypatch.setattr(harness, "machine_limits", lambda device: limits)
    chosen = ["--ops", "linear_cross_entropy", "--shapes", "small", "--budget", "0.1", "--peers", "torch's own,CCE"]
    assert run.main([*chosen, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    fp32, bf16 = report["cases"]
    assert (fp32["dtype"], bf16["dtype"]) == ("fp32", "bf16") and "would take" in bf16["skipped"]
    assert set(fp32["seconds"]) - {"CCE"} == {"eager", "fastllm", "torch's own", "floor"}
    for name in ("eager", "fastllm"):
        assert set(fp32["seconds"][name]) == set(harness.MODES)
        t = fp32["seconds"][name]["both"]
        assert 0 < t["min"] <= t["p20"] <= t["median"] <= t["p80"] and t["rounds"] >= 3
        assert 0 < max(fp32["error"][name].values()) < 1e-4
    assert set(report["warm_malloc"]) == {fp32["name"]}
    assert "skipped" in (tmp_path / "table.md").read_text() and "linear_cross_entropy" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--ops", "x"], ["--shapes", "x"], ["--peers", "x"], ["--dtypes", "x"]])
def test_run_refuses_unknown_names(arguments, capsys):
    import run

    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "unknown x; known:" in capsys.readouterr().err


def test_a_peer_that_takes_the_process_down_leaves_the_others(monkeypatch):
    import run

    def fake(command, **kwargs):
        peers = command[command.index("--peers") + 1]
        ok = peers == "none"
        out = json.dumps({"seconds": {"eager": {}, "fastllm": {"both": times(1.0)}}}) if ok else ""
        return run.subprocess.CompletedProcess(command, 0 if ok else -11, out, "" if ok else "illegal address\n")

    monkeypatch.setattr(run.subprocess, "run", fake)
    options = run._parser().parse_args([])
    found = run._in_a_process(0, options, ["CCE"])
    assert found["seconds"]["CCE"] == {"failed": "in the process of all peers: illegal address"}
    assert "both" in found["seconds"]["fastllm"]


def test_missing_peers_are_named(monkeypatch):
    import peers

    def broken():
        raise OSError("libcuda\nis not there")

    monkeypatch.setitem(peers.PEERS, "Quack", broken)
    assert peers.missing({"Quack", "compile"}) == {"Quack": "OSError: libcuda"}


def test_every_case_computes_what_eager_does():
    import cases
    import harness

    small = cases.Sizes(6, 10, 50)
    for entry in {(e.op, str(e.options)): e for e in cases.CPU_ENTRIES + cases.CUDA_ENTRIES}.values():
        case = entry.make(9, small, "fp32", **entry.options)
        assert case.bytes or case.flops
        found = harness.errors(case, {"ours": case.ours})["ours"]
        assert max(found.values()) < 1e-5, entry.name


def test_a_wrong_kernel_shows_as_an_error_and_a_failing_one_as_its_reason():
    import cases
    import harness

    case = cases.linear_relu(4, cases.Sizes(3, 5, 7), "fp32")

    def wrong(x, w, b):
        return 1.01 * case.eager(x, w, b)

    def failing(*_):
        raise RuntimeError("first line\nsecond")

    assert 0.005 < min(harness.errors(case, {"wrong": wrong})["wrong"].values()) < 0.02
    found = harness.measure(case, {"eager": case.eager, "failing": failing}, "cpu", 3, 1.0)
    assert found["failing"] == {"failed": "first line"} and found["eager"]["both"]["rounds"] == 3


def test_rotation_moves_the_inputs_and_brings_them_back():
    import cases
    import harness

    case = cases.mse_loss(3, cases.Sizes(1, 1, 5), "fp32")
    first = [t.data_ptr() for t in case.arguments]
    rotation = harness.Rotation(case, "cpu", copies=2)
    values = [t.detach().clone() for t in case.arguments]
    rotation.turn(1)
    assert all(t.data_ptr() != p for t, p in zip(case.arguments, first, strict=True))
    assert all(torch.equal(t, v) for t, v in zip(case.arguments, values, strict=True))
    rotation.turn(2)
    assert [t.data_ptr() for t in case.arguments] == first


def test_plots_show_every_case_and_point():
    pytest.importorskip("matplotlib")
    import plots
    import scaling

    report = results(result("a", 1.0, compile={"both": times(4.0)}), result("b", 4.0), result("c", None))
    names, values = plots.speedups(report, "fp32")
    assert names == ["a\n4 x 4", "b\n4 x 4"] and values == {"fastllm": [2.0, 0.5], "compile": [0.5, None]}
    bars = plots.draw_speedup(report).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([1.0, -0.5, -0.5])

    name = next(iter(scaling.SERIES))
    points = [
        {"series": name, "size": n, "bytes": 10**6 * n, "flops": 10**9, "dtype": "fp32",
         "seconds": {str(t): {"eager": times(n / t), "fastllm": times(n / t / 2)} for t in (1, 2)},
         "extra_peak": {"eager": 10**7 * n, "fastllm": 0}}
        for n in (1, 4, 16)
    ]  # fmt: skip
    limits = {"copy": 1e9, "gemm_fp32": 1e11}
    assert scaling.floor(points[0], limits) == pytest.approx(1e-3 + 1e-2)
    time, memory = plots.draw_scaling({"machine": report["machine"] | {"limits": limits}, "points": points}).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in time.get_lines()}
    assert lines["fastllm, 1 thread"] == [500, 2000, 8000] and lines["eager, 2 threads"] == [500, 2000, 8000]
    assert lines["floor"] == pytest.approx([11, 14, 26])
    assert {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}["eager"] == [10, 40, 160]
    gains = plots.draw_threads({"machine": report["machine"], "points": points}).axes[0].patches
    assert [bar.get_width() for bar in gains] == [2, 2]


def test_the_largest_size_is_read_from_a_line():
    import largest

    fit = largest.fitted([10, 20, 40], [1100, 1200, 1400], limit=2000)
    assert fit["bytes_per_row"] == 10 and fit["largest"] == 100 and fit["miss"] == 0
    assert largest.fitted([10, 20, 40], [100, 100, 100])["largest"] is None
    rows = [{"operation": "o", "variant": v, **fit, "largest": n} for v, n in (("eager", 100), ("fastllm", 250))]
    assert "| o | fastllm | 250 | 1.3e+07 | 2.5 | 10, 20, 40 | +0.0% |" in largest.table({"results": rows})


def test_training_is_measured():
    import end_to_end

    found = end_to_end.train_named(next(iter(end_to_end.MLPS)), 1, "cpu", 0.01, ["eager", "fastllm"])
    losses = [found[name]["first_loss"] for name in ("eager", "fastllm")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found["fastllm"]["tokens_per_second"] > 0 and end_to_end.warm_ratio(found) > 0
    one = {v: {"tokens_per_second": 1000.0 * (i + 1), "extra_peak": 2e6} for i, v in enumerate(end_to_end.VARIANTS)}
    one["compile"], one["fastllm"]["tokens_per_second"] = {"failed": "no | compiler"}, 500.0
    text = end_to_end.table({"models": {"one": one, "two": {"failed": "no module"}}, "warm_malloc": {"one": 1.25}})
    assert (
        "| one | 1,000 (1.00), 2 MB | failed: no / compiler | 500 (0.50 loses), 2 MB | 4,000 (4.00), 2 MB | 1.25 |"
        in text
    )
    assert "| two | failed: no module |" in text


def test_opt_with_fastllm_computes_the_same():
    pytest.importorskip("transformers")
    import end_to_end

    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    sizes = end_to_end.GPT2 | width | {"vocab_size": 90, "num_hidden_layers": 2, "num_attention_heads": 2}
    losses, ids = end_to_end.opt_losses((sizes, 2, 9, "float32"), "cpu")
    norms = {}
    for name in ("eager", "fastllm"):
        model, loss = losses[name]
        value = loss(ids)
        value.backward()
        norms[name] = [value.item(), *sorted(p.grad.norm().item() for p in model.parameters())]
    assert norms["fastllm"] == pytest.approx(norms["eager"], rel=1e-4, abs=1e-6)
    model, _ = losses["fastllm"]
    assert type(model.model.decoder.embed_tokens).__module__.startswith("fastllm")
    assert model.model.decoder.embed_tokens.weight is model.lm_head.weight
