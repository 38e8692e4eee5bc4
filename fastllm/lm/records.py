"""What a run leaves to be read: a line of JSON every few steps, TensorBoard's events, a plot of the losses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from fastllm.lm.packages import need


class Log:
    """A file of JSON lines, and TensorBoard's events of the same numbers.

    Parameters
    ----------
    path
        The file; lines of steps after ``step``, which a run left that was ended before it could save, are dropped.
    folder
        Where TensorBoard's events go; None: nowhere.
    """

    def __init__(self, path: str | Path, folder: str | Path | None, step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(self.path) if line["step"] <= step] if step and self.path.exists() else []
        self.writer = None
        if folder is not None:
            summary = need("torch.utils.tensorboard", "--log-dir").SummaryWriter
            self.writer = summary(str(folder), purge_step=step + 1 if step else None)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, **numbers: float) -> None:
        """A line; a number that is not finite is left out."""
        line = {"step": step, **{name: value for name, value in numbers.items() if math.isfinite(value)}}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class Nothing:
    """The log of a process that writes none."""

    def write(self, step: int, **numbers: float) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: str | Path) -> list[dict]:
    """The lines of a log; the last may be cut off."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def plot(log: str | Path, out: str | Path) -> None:
    """Draw the losses of a log into a PNG file."""
    need("matplotlib", "--plot").use("Agg")
    from matplotlib import pyplot

    lines = read(log)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("loss", "training", {"color": "#4c78a8", "linewidth": 1.0}),
        ("validation_loss", "held out", {"color": "#e45756", "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss, nats a word")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    pyplot.close(figure)
