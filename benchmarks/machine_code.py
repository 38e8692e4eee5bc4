"""What the CUDA kernels' machine code allows on an H100 and an H200, without either: ``python benchmarks/machine_code.py``.

Of each kernel that a benchmark's case spends its time in: the instructions that one thread issues on the path that moves
the most bytes (the body of the main loop, or the whole kernel where it holds a row in registers), what they are, and the
bytes that they move. From these

- issue slots: the share of a multiprocessor's slots (4 warps a clock) that the path takes at the memory's full speed.
  Above about 60% a kernel that loads, waits and stores falls well short of that speed; above 100% none reaches it;
- bandwidth by Little's law: bytes that are under way in all resident threads, over the memory's latency, with what is
  written counted beside what is read. Below the memory's speed there are too few of them;
- a forecast for the benchmark's cases, beside what is aimed at and what was measured.

The path is the shortest of those that move all bytes: a lower bound. It writes benchmarks/results/cuda/machine_code.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda-nvidia-h100-80gb-hbm3" / "results.json"
REPORT = ROOT / "benchmarks" / "results" / "cuda" / "machine_code.md"

CLOCK = 1.755e9  # a second: what an H100 or H200 SXM keeps under load; both boost to 1.98e9
MULTIPROCESSORS, REGISTERS, THREADS, BLOCKS, WARP = 132, 65536, 2048, 32, 32
LATENCY = 700e-9  # seconds from a load to its value while the memory is busy
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second
REACHED = {"H100": 3.03e12, "H200": 4.3e12}  # of a copy, measured
WIDE = 16  # bytes of the widest access

KINDS = {  # of instructions, by the first word of their names
    "memory": r"LDG|STG|LD|ST|LDGSTS|ATOMG|RED|ATOM|UTMA\w+",
    "shared": r"LDS|STS|LDSM|SHFL|BAR|SYNCS|MEMBAR|UCGABAR\w*|DEPBAR|LDGDEPBAR|CCTL|ERRBAR|REDUX|VOTE|FENCE",
    "exp, log": r"MUFU",
    "float": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FCHK|FSET|D\w+|HADD2|HMUL2|HFMA2|HMNMX2|HSETP2|HMMA|HGMMA",
    "convert": r"F2FP?|I2FP?|F2I|I2I|PRMT|F2F",
    "control": r"BRA|BSSY|BSYNC|EXIT|RET|CALL|NOP|WARPSYNC|BREAK|BMOV|YIELD|BRX|JMP|ACQBULK|NANOSLEEP|BPT|RPCMOV",
}
INDEX = "index"  # all others: integers, predicates, moves, uniform registers
CLUSTER = "UCGABAR_WAIT"


@dataclass(frozen=True)
class Main:
    """A kernel and the case it serves; ``item`` is what memory moves for each item, in bytes."""

    file: str
    kernel: str  # as c++filt shows it, without the anonymous namespace
    what: str
    item: float
    budget: float  # share of an H100's issue slots, at most
    again: float = 1.0  # bytes that the path moves for each byte of memory: a second read comes from the L2 cache
    loop: bool = True
    through: str = ""  # an instruction that the path must pass, where it is not the shortest


# Budgets are what the kernels take now, and a little more; held_rows<bf16, false> is to be under 0.60.
MAINS = [
    Main(
        "cross_entropy",
        "held_rows<bf16, false>",
        "cross_entropy, loss and gradient, bf16",
        4,
        0.60,
        loop=False,
        through=CLUSTER,
    ),
    Main(
        "cross_entropy",
        "held_rows<float, false>",
        "cross_entropy, loss and gradient, fp32",
        8,
        0.55,
        loop=False,
        through=CLUSTER,
    ),
    Main("cross_entropy", "streamed_rows<bf16, false, false>", "cross_entropy, loss alone, bf16", 2, 0.6),
    Main("cross_entropy", "streamed_rows<float, false, false>", "cross_entropy, loss alone, fp32", 4, 0.5),
    Main("cross_entropy", "streamed_rows<bf16, false, true>", "cross_entropy, two passes, bf16", 4, 0.9, again=1.5),
    Main("cross_entropy", "backward_rows<bf16, false>", "cross_entropy, backward alone, bf16", 4, 0.6),
    Main("mse_loss", "elements<bf16, (Pass)1, false>", "mse_loss, loss and gradient, bf16", 6, 0.5),
    Main("mse_loss", "elements<float, (Pass)1, false>", "mse_loss, loss and gradient, fp32", 12, 0.5),
    Main("linear_relu", "bias_relu_rows<bf16, 8>", "linear_relu, bias and ReLU, bf16", 4, 0.6),
    Main("linear_relu", "mask_rows<bf16, 8, true, true>", "linear_relu, backward's pass, bf16", 6, 0.6),
    Main("embedding", "gather<8, long>", "embedding, forward, bf16", 4, 0.5),
]


@dataclass
class Instruction:
    at: int
    guard: str  # "@P0", "@!P0", "" or with a uniform predicate
    name: str  # with its modifiers
    operands: str

    @property
    def word(self) -> str:
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        """Of a load from or a store to global memory."""
        if self.word not in ("LDG", "STG", "LDGSTS"):
            return 0
        width = re.search(r"\.(128|64|U16|S16|U8|S8|16)\b", self.name)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4

    @property
    def kind(self) -> str:
        return next((kind for kind, words in KINDS.items() if re.fullmatch(words, self.word)), INDEX)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)\b", self.operands) if self.word == "BRA" else None
        return int(found[1], 16) if found else None


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def functions(sass: str) -> dict[str, list[Instruction]]:
    """Instructions of each function in what ``cuobjdump -sass`` prints, by readable names."""
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)[1:]
    mangled, bodies = parts[::2], parts[1::2]
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {
        readable(name): [
            Instruction(int(at, 16), guard.strip(), opcode, operands.strip())
            for at, guard, opcode, operands in LINE.findall(body)
        ]
        for name, body in zip(names.splitlines(), bodies, strict=True)
    }


def readable(name: str) -> str:
    """A demangled name without its namespaces, return type and arguments."""
    short = re.sub(r"\(anonymous namespace\)::|fastllm::cuda::|fastllm::|^void ", "", name)
    depth = 0
    for i, letter in enumerate(short):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return short[:i]
    return short


Edges = dict[int, list[int]]


def graph(code: Sequence[Instruction]) -> tuple[list[list[Instruction]], Edges]:
    """Basic blocks in the order of their addresses, and which follows which."""
    place = {instruction.at: i for i, instruction in enumerate(code)}
    ends = ("BRA", "EXIT", "RET", "BRX", "JMP")
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.target in place:
            starts.add(place[instruction.target])
        if instruction.word in ends and i + 1 < len(code):
            starts.add(i + 1)
    order = sorted(starts)
    block_at = {start: number for number, start in enumerate(order)}
    blocks = [list(code[a:b]) for a, b in zip(order, [*order[1:], len(code)], strict=True)]
    edges: Edges = defaultdict(list)
    for number, block in enumerate(blocks):
        last = block[-1]
        if last.target in place:
            edges[number].append(block_at[place[last.target]])
        # With a predicate, or a condition among its operands, a branch may not be taken.
        conditional = bool(last.guard) or (last.word == "BRA" and "," in last.operands)
        if (last.word not in ends or conditional) and number + 1 < len(blocks):
            edges[number].append(number + 1)
    return blocks, edges


def walk(edges: Edges, begin: int = 0) -> tuple[list[int], set[tuple[int, int]]]:
    """Blocks that are reached, each after all that follow it, and the jumps backwards."""
    done: list[int] = []
    open_, seen, backwards = {begin}, {begin}, set()
    waiting = [(begin, iter(edges[begin]))]
    while waiting:
        block, following = waiting[-1]
        for after in following:
            if after in open_:
                backwards.add((block, after))
            elif after not in seen:
                seen.add(after)
                open_.add(after)
                waiting.append((after, iter(edges[after])))
                break
        else:
            waiting.pop()
            open_.remove(block)
            done.append(block)
    return done, backwards


def loops(edges: Edges) -> list[tuple[int, set[int]]]:
    """Loops as (header, blocks): those of each jump backwards."""
    into: Edges = defaultdict(list)
    for a, following in list(edges.items()):
        for b in following:
            into[b].append(a)
    found: dict[int, set[int]] = {}
    reached, backwards = walk(edges)
    for a, header in backwards:
        body, waiting = {header}, [a]
        while waiting:
            block = waiting.pop()
            if block not in body and block in reached:
                body.add(block)
                waiting += into[block]
        found[header] = found.get(header, set()) | body
    return list(found.items())


@dataclass
class Route:
    """Instructions that a thread issues one after another; bytes are those of 16-byte accesses."""

    code: list[Instruction]

    @property
    def loads(self) -> int:
        return sum(WIDE for i in self.code if i.bytes == WIDE and i.word != "STG")

    @property
    def stores(self) -> int:
        return sum(WIDE for i in self.code if i.bytes == WIDE and i.word == "STG")

    def in_flight(self) -> int:
        """Bytes of loads that are under way, at most, before the first of them is used."""
        pending: dict[str, int] = {}
        most = 0
        for instruction in self.code:
            numbers = [int(n) for n in re.findall(r"\bR(\d+)\b", instruction.operands)]
            loads = instruction.word == "LDG"
            if any(f"R{n}" in pending for n in (numbers[1:] if loads else numbers)):
                pending.clear()
            if loads and numbers:
                words = max(1, instruction.bytes // 4)
                pending |= {f"R{numbers[0] + k}": 0 for k in range(words)}
                pending[f"R{numbers[0]}"] = instruction.bytes if instruction.bytes == WIDE else 0
                most = max(most, sum(pending.values()))
        return most


def heaviest(
    blocks: list[list[Instruction]], edges: Edges, header: int | None, within: set[int], through: str = ""
) -> Route:
    """The way that moves the most bytes in 16-byte accesses; of those one that takes the most exponentials and maxima, for a
    row's end may come between any two groups; of those one with the fewest instructions.

    From the header of a loop back to it, or, with None, from the kernel's begin to an end; no other jump backwards.
    """
    done, backwards = walk(edges)
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for number in done:
        if number not in within:
            continue
        options: list[tuple[tuple[int, int, int], int | None]] = [
            (best[b][0], b) for b in edges[number] if b in best and (number, b) not in backwards
        ]
        if header in edges[number] or (header is None and not edges[number]):
            options.append(((0, 0, 0), None))
        if options:
            rest, following = max(options, key=lambda option: option[0])
            wide = sum(i.bytes for i in blocks[number] if i.bytes == WIDE)
            wide += 10**6 * any(i.word == through for i in blocks[number])
            work = sum(i.name.startswith(("MUFU.EX2", "HMNMX2", "FMNMX")) for i in blocks[number])
            best[number] = ((wide + rest[0], work + rest[1], rest[2] - len(blocks[number])), following)
    code: list[Instruction] = []
    at = header or 0
    while at is not None and at in best:
        code += blocks[at]
        at = best[at][1]
    return Route(code)


def main_path(code: Sequence[Instruction], loop: bool = True, through: str = "") -> Route:
    """Of a kernel: one round of each loop whose accesses are all of 16 bytes, the shortest of its kind; or the whole."""
    blocks, edges = graph(code)
    if not loop:
        return heaviest(blocks, edges, None, set(range(len(blocks))), through)
    kinds: dict[bool, Route] = {}
    for header, body in loops(edges):
        path = heaviest(blocks, edges, header, body)
        if path.loads == 0:  # zeros
            continue
        # Beside them only what is done where a condition holds, as for the column of the class.
        if {i.bytes for i in path.code if i.bytes and not (i.guard and i.bytes < WIDE)} != {WIDE}:
            continue

        def rate(p: Route) -> float:
            return len(p.code) / (p.loads + p.stores)

        writes = path.stores > 0
        if writes not in kinds or rate(path) < rate(kinds[writes]):
            kinds[writes] = path
    return Route([i for path in kinds.values() for i in path.code])


@dataclass
class Measured:
    """What the machine code says of one kernel."""

    main: Main
    path: Route
    registers: int
    threads: int  # of a block

    @property
    def blocks(self) -> int:
        """Of a multiprocessor, side by side: registers are handed out by 256 to a warp."""
        of_warp = -(-self.registers * WARP // 256) * 256
        return min(REGISTERS // (of_warp * self.threads // WARP), THREADS // self.threads, BLOCKS)

    @property
    def bytes(self) -> float:
        """That a thread moves from and to memory."""
        return (self.path.loads + self.path.stores) / self.main.again

    @property
    def items(self) -> float:
        return self.bytes / self.main.item

    def slots(self, memory: float) -> float:
        """Share of the issue slots that are needed at this speed of the memory."""
        instructions = memory / self.bytes * len(self.path.code) / WARP  # of warps, a second
        return instructions / (MULTIPROCESSORS * 4 * CLOCK)

    def little(self) -> float:
        """Bytes a second, read and written, that the loads in flight allow."""
        flying = self.path.in_flight() * self.threads * self.blocks * MULTIPROCESSORS
        return flying / LATENCY * (self.path.loads + self.path.stores) / self.path.loads

    def reached(self, device: str) -> float:
        """Forecast of bytes a second, by mean value analysis: the blocks of a multiprocessor wait for its share of the
        memory (at a copy's speed), for issue slots, and, without a queue, for the latency of their first load."""
        moved = self.bytes * self.threads  # by a block, in one round
        memory = moved * MULTIPROCESSORS / REACHED[device]
        issue = len(self.path.code) * self.threads / WARP / (4 * CLOCK)
        at_memory = at_issue = seconds = 0.0
        for blocks in range(1, self.blocks + 1):
            in_memory, in_issue = memory * (1 + at_memory), issue * (1 + at_issue)
            seconds = (in_memory + in_issue + LATENCY) / blocks  # from one block's end to the next
            at_memory, at_issue = in_memory / seconds, in_issue / seconds
        return MULTIPROCESSORS * moved / seconds

    def kinds(self) -> dict[str, float]:
        count = Counter(i.kind for i in self.path.code)
        return {kind: count[kind] / self.items for kind in (*KINDS, INDEX)}


def _aot():
    """tests/cuda_aot.py, which compiles the kernels and finds a disassembler."""
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_aot

    return cuda_aot


def _disassembled(file: Path, *what: str) -> str:
    found = _aot().disassembler()
    if found is None:
        raise FileNotFoundError("cuobjdump: neither CUDA's toolkit nor Triton is here")
    return subprocess.run([found, *what, str(file)], capture_output=True, text=True, check=True).stdout


def of_objects(folder: Path, mains: Sequence[Main] = tuple(MAINS)) -> list[Measured]:
    """The kernels in the objects for sm_90a that tests/cuda_aot.py has made in ``folder``."""
    found = []
    for file in dict.fromkeys(m.file for m in mains):
        code = functions(_disassembled(folder / f"{file}.o", "-sass", "-arch", "sm_90a"))
        registers, threads = _resources(folder / f"{file}.o")
        for main in mains:
            if main.file == file:
                if main.kernel not in code:
                    raise KeyError(f"{file}.o has no {main.kernel}; it has {', '.join(sorted(code))}")
                path = main_path(code[main.kernel], main.loop, main.through)
                found.append(Measured(main, path, registers[main.kernel], threads[main.kernel]))
    return found


def _resources(file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Registers and threads of a block, at most, by kernel."""
    text = _disassembled(file, "-elf")
    registers = dict(re.findall(r"function: (\w+)\(0x[0-9a-f]+\)\s+register count: (\d+)", text))
    threads = {}
    for section in re.split(r"\n\.nv\.info\.(?=_Z)", text)[1:]:
        most = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x([0-9a-f]+)", section.split("\n\n\n")[0]
        )
        threads[section.split()[0]] = int(most[1], 16) if most else 1024
    names = list({*registers, *threads})
    clear = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = dict(zip(names, map(readable, clear.splitlines()), strict=True))
    return {short[n]: int(v) for n, v in registers.items()}, {short[n]: v for n, v in threads.items()}


# Cases of the benchmarks: bytes moved, the kernel, and the most milliseconds aimed at on an H200.
FORECASTS = [
    ("cross_entropy llama 8192 bf16", 2 * 2 * 8192 * 128256, "held_rows<bf16, false>", 1.09),
    ("cross_entropy llama 2048 bf16", 2 * 2 * 2048 * 128256, "held_rows<bf16, false>", None),
    ("cross_entropy llama 8192 fp32", 2 * 4 * 8192 * 128256, "held_rows<float, false>", 2.13),
    ("cross_entropy llama 8192 bf16, no gradient", 2 * 8192 * 128256, "streamed_rows<bf16, false, false>", 0.52),
    ("cross_entropy gemma 4096 bf16", 2 * 2 * 4096 * 262144, "held_rows<bf16, false>", None),
    ("mse_loss aim 16384 fp32", 3 * 4 * 16384 * 16384, "elements<float, (Pass)1, false>", 0.81),
    ("mse_loss aim 16384 bf16", 3 * 2 * 16384 * 16384, "elements<bf16, (Pass)1, false>", 0.41),
]


def _timed() -> dict[str, str]:
    """Milliseconds of the cuda backend in the committed results of an H100, by case."""
    cases = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    found = {}
    for case in cases:
        times = case.get("seconds", {}).get("fastllm cuda", {})
        if "both" in times:
            found[case["name"]] = f"{1e3 * times['both']['min']:.2f}"
            found[f"{case['name']}, no gradient"] = f"{1e3 * times['no_grad']['min']:.2f}"
    return found


def table(kernels: Sequence[Measured]) -> str:
    text = f"""What the machine code of the CUDA kernels allows (sm_90a): `python benchmarks/machine_code.py`.

Instructions that a thread issues for each item on the path that moves the most bytes, by kind; the bytes that memory
moves for an item; the share of the issue slots at {CLOCK / 1e9:g} GHz that this takes at the memory's full speed (H100
3.35 TB/s, H200 4.8 TB/s); and the bandwidth that the loads in flight allow at a latency of {LATENCY * 1e9:.0f} ns.

"""
    columns = ["kernel", "instructions an item", *KINDS, INDEX, "bytes an item", "registers", "threads", "blocks an SM"]
    columns += ["KB in flight an SM", "slots, H100", "slots, H200", "Little's law, TB/s"]
    rows = []
    for k in kernels:
        flying = k.path.in_flight() * k.threads * k.blocks
        rows.append(
            [
                f"{k.main.what}: `{k.main.kernel}`",
                f"{len(k.path.code) / k.items:.1f}",
                *(f"{v:.1f}" for v in k.kinds().values()),
                f"{k.main.item:g}",
                *map(str, (k.registers, k.threads, k.blocks)),
                f"{flying / 1024:.0f}",
                *(f"{100 * k.slots(speed):.0f}%" for speed in MEMORY.values()),
                f"{k.little() / 1e12:.1f}",
            ]
        )
    text += _markdown(columns, rows)
    text += """
Forecast, by mean value analysis: the blocks of a multiprocessor wait in turn for memory (at a copy's measured speed, H100
3.03 TB/s, H200 4.3 TB/s), for issue slots, and for the latency of a load. Targets are those for an H200.
Measured: in the committed results of an H100, by the kernels of their commit.

"""
    known = {k.main.kernel: k for k in kernels}
    timed = _timed()
    rows = [
        [
            name,
            timed.get(name, ""),
            *(f"{1e3 * moved / known[kernel].reached(device):.2f}" for device in MEMORY),
            "" if aim is None else f"{aim:g}",
        ]
        for name, moved, kernel, aim in FORECASTS
        if kernel in known
    ]
    return text + _markdown(["case", "measured, H100 ms", "H100 ms", "H200 ms", "target ms"], rows)


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, help="folder of objects for sm_90a; without it they are compiled")
    folder = parser.parse_args().build
    if folder is None:
        folder = ROOT / "build" / "machine_code"
        if reason := _aot().why_not() or _aot().compile_all(folder, ["sm_90a"], layer=False):
            print(reason)
            return 1
    text = table(of_objects(folder))
    REPORT.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
