"""Results of run.py as Markdown: README's table, the tables of docs/benchmarks.md, and everything that was measured."""

from __future__ import annotations

import machine

LARGE = 10_000_000  # bytes: below, the resident memory that is compared is mostly noise

TITLES = {
    "both": "Forward and backward",
    "forward": "Forward, with what backward needs",
    "backward": "Backward",
    "no_grad": "Forward under no_grad",
    "graph": "Forward and backward, replayed as a CUDA graph",
}


def milliseconds(seconds: float) -> str:
    """Three digits, without an exponent."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gigabytes_or_flops(case: dict, limits: dict) -> tuple[float, float, str]:
    """What fastllm reaches, the machine's limit for it, and the unit."""
    seconds = case["seconds"]["fastllm"]["both"]["min"]
    if case["bytes"]:
        return case["bytes"] / seconds, limits["copy"], "GB/s"
    return case["flops"] / seconds, limits[f"gemm_{case['dtype']}"], "GF/s"


def trouble(case: dict) -> str | None:
    """Why a case has no ratio, or None."""
    if "skipped" in case or "failed" in case:
        return next(f"{word}: {case[word]}" for word in ("skipped", "failed") if word in case)
    for name in ("fastllm", "eager"):
        if "failed" in case["seconds"][name]:
            return f"{name} failed: {case['seconds'][name]['failed']}"
    return None


def ratio(case: dict, name: str = "eager", mode: str = "both") -> float | None:
    """Minimum of a variant over that of fastllm; None where it has none."""
    times = case.get("seconds", {})
    if not all(mode in times.get(n, {}) for n in (name, "fastllm")):
        return None
    return times[name][mode]["min"] / times["fastllm"][mode]["min"]


def loses(value: float) -> bool:
    return round(value, 2) < 1


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _peer(case: dict, name: str) -> str:
    """A peer's milliseconds, and how many of fastllm's times they are."""
    times = case["seconds"].get(name)
    if times is None:
        return ""
    if "failed" in times:
        return _cell(f"failed: {times['failed'][:60]}")
    value = ratio(case, name)
    text = f"{value:.2f}, **loses**" if loses(value) else f"{value:.2f}"
    return f"{milliseconds(times['both']['min'])} ({text})"


def _worst(error: dict[str, float]) -> str:
    return f"{max(error.values()):.0e}"


def _of_floor(case: dict) -> str:
    """The rate that fastllm reaches, of its bare products' into memory that is there."""
    value = ratio(case, "floor")
    return "" if value is None else f"; {value:.2f} of the bare products"


def _row(case: dict, report: dict, peers: list[str]) -> list[str]:
    start = [case["op"], case["shape"], case["dtype"]]
    why = trouble(case)
    if why is not None:
        return [*start, _cell(why)]
    times, pairs = case["seconds"], ("eager", "fastllm")
    value, aim, warm = ratio(case), case["aim"], report["warm_malloc"].get(case["name"])
    rate, limit, unit = gigabytes_or_flops(case, report["machine"]["limits"])
    return [
        *start,
        *(" / ".join(milliseconds(times[n]["both"][k]) for k in ("min", "median")) for n in pairs),
        f"**{value:.2f}**" + (" (loses)" if loses(value) else ""),
        "" if aim is None else f"{aim:g}" + ("" if value >= aim else " (missed)"),
        "" if warm is None else f"{warm:.2f}" + (" (loses)" if loses(warm) else ""),
        *(_peer(case, name) for name in peers),
        f"{rate / 1e9:.3g} {unit}, {100 * rate / limit:.0f}%" + _of_floor(case),
        " / ".join(f"{max(case['extra_peak'][n], 0) / 1e6:.0f}" for n in pairs) if "extra_peak" in case else "",
        " / ".join(_worst(case["error"][n]) for n in pairs) if case.get("error") else "",
    ]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    full = [columns, ["---"] * len(columns), *(row + [""] * (len(columns) - len(row)) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in full) + "\n"


def head(report: dict) -> str:
    """Machine, versions, limits and peers that are not there."""
    m, limits = report["machine"], report["machine"]["limits"]
    products = f"float32 products by {m['float32_gemm']}; " if m["device"] == "cpu" else f"CUDA {m['cuda']}; "
    text = (
        f"{machine.where(m)}; torch {m['torch']}; {products}{m['date']}, commit {m['commit']}, "
        f"load average before {m['load']:g}. Measured in the same run: "
        f"copy {limits['copy'] / 1e9:.3g} GB/s, in place {limits['in_place'] / 1e9:.3g} GB/s; square products, PyTorch's "
        f"or ours: {limits['gemm_fp32'] / 1e9:.3g} GFLOP/s fp32, {limits['gemm_bf16'] / 1e9:.3g} bf16.\n"
    )
    if report["missing"]:
        text += f"\nNot measured: {'; '.join(f'{name} ({why})' for name, why in report['missing'].items())}.\n"
    return text


def losses(report: dict) -> str:
    """The cases in which another is faster, in one sentence for each of the others."""
    lines = []
    for name in ("eager", *report["peers"]):
        values = [(c, ratio(c, name)) for c in report["cases"]]
        lost = [f"{c['op']} {c['shape']} {c['dtype']} ({v:.2f})" for c, v in values if v is not None and loses(v)]
        count = sum(v is not None for _, v in values)
        if count:
            lines.append(f"Slower than {name}: {', '.join(lost) or 'nowhere'} (of {count} cases).")
    return "\n".join(lines) + "\n"


def measured_peers(report: dict) -> list[str]:
    return [n for n in report["peers"] if any(n in c.get("seconds", {}) for c in report["cases"])]


def by_operation(report: dict) -> str:
    """A table of six columns for each operation: what docs/benchmarks.md shows."""
    groups: dict[str, list[dict]] = {}
    for case in report["cases"]:
        groups.setdefault(case["op"].split()[0], []).append(case)
    text = f"{head(report)}\n"
    for operation, cases in groups.items():
        rows = [_short_row(case, operation, report["machine"]["limits"]) for case in cases]
        columns = ["shape", "dtype", "eager ms", "fastllm ms", "times as fast", "of the limit"]
        text += f"### {operation}\n\n{markdown(columns, rows)}\n"
    return text + losses(report)


def _short_row(case: dict, operation: str, limits: dict) -> list[str]:
    variant = case["op"].removeprefix(operation).strip()
    start = [f"{case['shape']}, {variant}" if variant else case["shape"], case["dtype"]]
    why = trouble(case)
    if why is not None:
        return [*start, _cell(why)]
    rate, limit, _ = gigabytes_or_flops(case, limits)
    return [
        *start,
        *(milliseconds(case["seconds"][n]["both"]["min"]) for n in ("eager", "fastllm")),
        f"**{ratio(case):.2f}**" + (" (loses)" if loses(ratio(case)) else ""),
        f"{100 * rate / limit:.0f}%",
    ]


# What README's table says of each kind of case: what PyTorch writes for it.
REPLACES = {
    "embedding": "`F.embedding`",
    "linear_relu": "`F.relu(F.linear(...))`",
    "relu_mlp": "two `F.linear` with a ReLU between",
    "mse_loss": "`F.mse_loss`",
    "cross_entropy": "`F.cross_entropy`",
    "cross_entropy in place": "the same, with `inplace_backward=True`",
    "linear_cross_entropy": "`F.cross_entropy(F.linear(...))`",
    "log_probs": "`log_softmax`, `gather`, and the entropy's sum",
    "linear_log_probs": "the same of `F.linear(...)`",
}


def overview(report: dict) -> str:
    """README's table: over all shapes and dtypes measured, the least and the most of each kind of case."""
    rows = []
    for operation, replaced in REPLACES.items():
        timed = [
            case
            for case in report["cases"]
            if case["op"] == operation or case["op"].split()[0] == operation == "embedding"
        ]
        if not timed:  # a report of before there was the operation
            continue
        cases = [case for case in timed if trouble(case) is None]
        speeds = sorted(ratio(case) for case in cases)
        memory = sorted(
            max(case["extra_peak"]["fastllm"], 0) / case["extra_peak"]["eager"]
            for case in cases
            if case.get("extra_peak", {}).get("eager", 0) >= LARGE
        )
        least_and_most = [
            " to ".join(dict.fromkeys(f"{v:.2f}" for v in (a[0], a[-1]))) if a else "" for a in (speeds, memory)
        ]
        rows.append(
            [f"`{operation.split()[0]}`" + operation.removeprefix(operation.split()[0]), replaced, *least_and_most]
        )
    return markdown(["operation", "replaces", "times as fast", "memory, of eager's"], rows)


def floor(case: dict, limits: dict) -> float:
    """Seconds that the bytes take at the copy's rate, or the products at the square product's."""
    return case["bytes"] / limits["copy"] if case["bytes"] else case["flops"] / limits[f"gemm_{case['dtype']}"]


def _best_peer(case: dict, report: dict) -> tuple[float, str] | None:
    """Of the peers but compile and our own backends: the least time, of fastllm's, and whose it is."""
    names = [n for n in report["peers"] if n != "compile" and n not in report["backends"]]
    return min(((r, n) for n in names if (r := ratio(case, n)) is not None), default=None)


def _ratio_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" + (" (loses)" if loses(value) else "")


def _late(times: dict) -> bool:
    """Whether the host's time counts in most rounds of a variant."""
    return "both" in times and 2 * times["both"].get("late", 0) > times["both"]["rounds"]


def line(case: dict, report: dict) -> str:
    """What came of one case, in a line."""
    why = trouble(case)
    if why is not None:
        return f"{case['name']}: {why}"
    both = ", ".join(
        f"{n} {'failed' if 'failed' in t else milliseconds(t['both']['min'])}"
        for n, t in case["seconds"].items()
        if n != "fastllm"
    )
    return f"{case['name']}: floor {milliseconds(floor(case, report['machine']['limits']))} ms; {both}"


def short(report: dict) -> str:
    """A line a case: its floor, each of our backends, and what the first is of the floor, eager, compile, the best peer."""
    mine, rows, failures = report["backends"], [], []
    limits = report["machine"]["limits"]
    for case in report["cases"]:
        why = trouble(case)
        if why is not None:
            rows.append([case["name"], _cell(why)])
            continue
        times, peer, least = case["seconds"], _best_peer(case, report), floor(case, limits)
        graphs = case.get("graph", {})
        graphed = [graphs[n]["graph"]["min"] for n in ("eager", "fastllm") if "graph" in graphs.get(n, {})]
        extra = case.get("extra_peak", {})
        rows.append(
            [
                case["name"],
                milliseconds(least),
                *(milliseconds(times[n]["both"]["min"]) if "both" in times.get(n, {}) else "failed" for n in mine),
                f"{100 * least / times['fastllm']['both']['min']:.0f}%",
                _ratio_cell(ratio(case)) + ("" if case["aim"] is None else f" of {case['aim']:g}"),
                _ratio_cell(ratio(case, "compile")),
                "" if peer is None else f"{_ratio_cell(peer[0])} {peer[1]}",
                f"{milliseconds(graphed[1])} ({graphed[0] / graphed[1]:.2f})" if len(graphed) == 2 else "",
                " / ".join(f"{max(extra[n], 0) / 1e6:.0f}" for n in ("fastllm", "eager") if n in extra),
                ", ".join(n for n, t in times.items() if _late(t)).replace("fastllm, ", ""),
            ]
        )
        failures += [
            f"{case['name']}, {n}: {t['failed']}"
            for part in (times, graphs)
            for n, t in part.items()
            if "failed" in t and n != "fastllm"
        ]
        far = {n: d for n, d in case.get("from_eager", {}).items() if not d < 0.1}
        failures += [f"{case['name']}, {n}: differs from eager by {d:.1g} of the largest" for n, d in far.items()]
    columns = ["case", "floor ms", *(f"{n.removeprefix('fastllm ')} ms" for n in mine), "of floor", "eager / ours"]
    columns += ["compile / ours", "best peer / ours", "graph ms (eager / ours)", "extra MB ours / eager", "late"]
    text = f"{head(report)}\n{markdown(columns, rows)}\n{losses(report)}"
    return text + "".join(f"\n- {_cell(failure)}" for failure in failures) + "\n"


def table(report: dict) -> str:
    """Every case in one table, with medians, peers, memory and errors."""
    peers = measured_peers(report)
    columns = [
        "operation",
        "shape",
        "dtype",
        "eager ms, min / median",
        "fastllm ms, min / median",
        "ratio",
        "aimed at",
        "ratio, warm malloc",
        *(f"{name} ms (ratio)" for name in peers),
        "achieved, of the limit",
        "extra MB eager / fastllm",
        "error eager / fastllm",
    ]
    rows = [_row(case, report, peers) for case in report["cases"]]
    return f"{head(report)}\n{markdown(columns, rows)}\n{losses(report)}"


def _times(times: dict | None, mode: str) -> str:
    if times is None or (mode not in times and "failed" not in times):
        return ""
    if "failed" in times:
        return _cell(f"failed: {times['failed']}")
    t = times[mode]
    return (
        f"{milliseconds(t['min'])} · {milliseconds(t['median'])} [{milliseconds(t['p20'])}, {milliseconds(t['p80'])}]"
    )


def _per_variant(report: dict, key: str, show) -> str:
    """A table with a column for each variant."""
    names = ["eager", "fastllm", *measured_peers(report)]
    rows = [
        [case["op"], case["shape"], case["dtype"], *(show(case[key].get(name)) for name in names)]
        for case in report["cases"]
        if case.get(key)
    ]
    return markdown(["operation", "shape", "dtype", *names], rows) if rows else ""


def details(report: dict) -> str:
    """Everything that was measured: each mode, memory, errors."""
    text = f"{table(report)}\nBelow: milliseconds, minimum · median [20th, 80th percentile].\n"
    for mode, title in TITLES.items():
        key = "graph" if mode == "graph" else "seconds"
        body = _per_variant(report, key, lambda times, mode=mode: _times(times, mode))
        if body:
            text += f"\n## {title}\n\n{body}"
    memory = _per_variant(report, "extra_peak", lambda b: "" if b is None else f"{max(b, 0) / 1e6:.1f}")
    error = _per_variant(report, "error", lambda e: "" if e is None else f"{e['output']:.1e} / {e['gradient']:.1e}")
    if memory:
        text += f"\n## Extra peak memory of forward and backward, MB\n\n{memory}"
    if error:
        text += f"\n## Largest error of the output / of a gradient, relative to its largest value, against float64\n\n{error}"
    return text
