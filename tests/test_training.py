"""The training loop: it learns, its parts add up, and it goes on after a checkpoint as if it had never stopped."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("safetensors", reason="the package safetensors is not installed")

from fastllm.lm import checkpoint, costs, data, records
from fastllm.lm.options import Options
from fastllm.lm.training import Trainer, compare_with_eager, mean_loss
from fastllm.models import MLPLanguageModel

IDS = np.tile(np.arange(30, dtype=np.uint16), 60)
SIZES = {
    "mlp": {"layers": 1, "width": 8, "hidden": 16, "context_length": 2},
    "transformer": {"layers": 2, "width": 16, "hidden": 32, "heads": 2},
}


def trainer(model="mlp", **options):
    given = {"steps": 40, "batch_size": 4, "sequence_length": 8, "warmup": 5, "learning_rate": 0.02, **SIZES[model]}
    resolved = Options(model=model, **{**given, **options}).resolved()
    train, test = (data.Windows(IDS, part, 8) for part in data.split(len(IDS)))
    torch.manual_seed(0)
    return Trainer(checkpoint.MODELS[model](**resolved.model_config(30)), train, test, resolved)


def run(one, steps):
    return [one.train_step()[0].item() for _ in range(steps)]


def parameters(one):
    return {name: p.detach().clone() for name, p in one.model.named_parameters()}


LEARNERS = [{}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0}]


@pytest.mark.parametrize("options", LEARNERS, ids=str)
@pytest.mark.parametrize("model", SIZES)
def test_learns(model, options):
    losses = run(trainer(model, dropout=0.0, steps=150, **options), 150)
    assert losses[0] > 3 and sum(losses[-20:]) / 20 < 0.75 * losses[0]


@pytest.mark.parametrize("model", SIZES)
def test_accumulation_is_the_whole_batch(model):
    """Also in parts of unequal size."""
    whole, parts = (trainer(model, batch_size=5, accumulation=n, dropout=0.0, optimizer="sgd") for n in (1, 3))
    for _ in range(3):
        (a, norm), (b, other) = whole.train_step(), parts.train_step()
        torch.testing.assert_close((a, norm), (b, other))
    torch.testing.assert_close(parameters(whole), parameters(parts))


def test_clipping():
    free, clipped = trainer(clip=0.0, optimizer="sgd", momentum=0.0), trainer(clip=0.01, optimizer="sgd", momentum=0.0)
    before = parameters(free)
    norms = [one.train_step()[1].item() for one in (free, clipped)]
    assert norms[0] == norms[1] > 0.02
    ratio = [
        torch.cat([(p - before[n]).flatten() for n, p in parameters(one).items() if p.dim() == 1]).norm()
        for one in (free, clipped)
    ]
    assert ratio[1] / ratio[0] == pytest.approx(0.01 / norms[0], rel=1e-4)


def test_biases_do_not_decay():
    one = trainer("transformer", learning_rate=0.1, weight_decay=0.5, warmup=0, schedule="constant")
    decay = {id(p): group["weight_decay"] for group in one.optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (0.5 if p.dim() > 1 else 0.0) for p in one.model.parameters())
    assert len(decay) == len(list(one.model.parameters()))


def test_mean_loss():
    one = trainer()
    ids = torch.from_numpy(IDS[:13].astype(np.int64))
    windows = data.Windows(IDS, [(0, 13)], 4)
    expected = one.model.eval().loss(ids[:12].view(3, 4), ids[1:13].view(3, 4)).item()
    loss, count = mean_loss(one.model.train(), one.model.loss, windows.in_order(2))
    assert loss == pytest.approx(expected, rel=1e-5) and count == 12 and one.model.training
    assert math.isnan(mean_loss(one.model, one.model.loss, [])[0])


OPTIONS = [
    {},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.0},
    {"dtype": "bf16"},
    {"dtype": "fp16"},
    {"accumulation": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model", SIZES)
def test_a_resumed_run_is_the_same_run(model, options, tmp_path):
    whole, first = trainer(model, dropout=0.2, **options), trainer(model, dropout=0.2, **options)
    run(whole, 20)
    run(first, 9)
    first.note(first.evaluate())
    checkpoint.write(tmp_path / "c.safetensors", first.checkpoint(None, {}))
    torch.manual_seed(99)
    state = checkpoint.read(tmp_path / "c.safetensors")
    second = trainer(model, dropout=0.2, **options)
    second.model.load_state_dict(state.build_model("c").state_dict())
    second.restore(state, "c")
    assert (second.step, second.best_loss) == (9, first.best_loss)
    run(second, 11)
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(second)[name]), name
    assert whole.scaler.state_dict() == second.scaler.state_dict()


def test_evaluation_changes_nothing():
    one, other = trainer(dropout=0.3), trainer(dropout=0.3)
    run(one, 5)
    for _ in range(5):
        run(other, 1)
        other.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(parameters(one).values(), parameters(other).values(), strict=True))


def test_batches_depend_on_seed_and_step():
    one, other = trainer(seed=2**64 - 1), trainer(seed=1)
    assert not np.array_equal(one.starts(), other.starts())
    before = one.starts()
    assert np.array_equal(before, one.starts())
    one.train_step()
    assert not np.array_equal(before, one.starts())


def test_what_is_not_finite_is_not_saved():
    one = trainer()
    with torch.no_grad():
        one.model.output.bias[3] = math.nan
    with pytest.raises(ValueError, match=r"output\.bias is not finite at step 0"):
        one.checkpoint(None, {})


def test_too_little_data():
    one = trainer()
    with pytest.raises(ValueError, match="8 words to train on; sequences of 8 need more"):
        Trainer(one.model, data.Windows(IDS, [(0, 8)], 8), one.test, one.options)


def test_schedule():
    options = Options(steps=100, warmup=10, learning_rate=1.0)
    rates = [options.learning_rate_at(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = Options(steps=100, warmup=10, learning_rate=1.0, schedule="constant")
    assert [constant.learning_rate_at(s) for s in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    assert Options(warmup=0, learning_rate=1.0).learning_rate_at(0) == 1.0


def test_options():
    assert Options(model="mlp").resolved().heads is None
    transformer = Options(width=60, heads=3, sequence_length=32).resolved()
    assert (transformer.hidden, transformer.context_length) == (240, 32)
    for options, message in (
        ({"model": "mlp", "heads": 2}, "--heads"),
        ({"context_length": 4}, "--context-length, 4, must be at least --sequence-length, 128"),
        ({"accumulation": 17}, "--accumulation, 17, must be at most --batch-size, 16"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**options).resolved()


@pytest.mark.parametrize("model", SIZES)
def test_costs_are_those_of_the_model(model):
    from torch.utils.flop_counter import FlopCounterMode

    options = Options(model=model, **{**SIZES[model], "layers": 5}, sequence_length=8, batch_size=3).resolved()
    config = options.model_config(30)
    lm = checkpoint.MODELS[model](**config)
    ids = torch.zeros(3, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        lm.loss(ids, ids).backward()
    found = costs.of(options, config)
    assert found.parameters == sum(p.numel() for p in lm.parameters())
    assert found.flops == counter.get_total_flops() // 24
    assert found.memory > 16 * found.parameters


def test_a_size_beyond_all_memory_is_counted():
    options = Options(layers=10**9, width=1 << 20, heads=4).resolved()
    assert costs.of(options, options.model_config(4096)).memory > 1e20


def test_log_forgets_what_was_not_saved(tmp_path):
    path = tmp_path / "log.jsonl"
    log = records.Log(path, None, 0)
    for step in (10, 20, 30):
        log.write(step, loss=1.0 / step, other=math.inf)
    log.close()
    path.write_text(path.read_text() + '{"step": 40, "lo')
    log = records.Log(path, None, 20)
    log.write(30, loss=0.5)
    log.close()
    assert records.read(path) == [
        {"step": 10, "loss": 0.1},
        {"step": 20, "loss": 0.05},
        {"step": 30, "loss": 0.5},
    ]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = records.Log(tmp_path / "log.jsonl", tmp_path / "events", 0)
    for step in (10, 20):
        log.write(step, loss=step / 40)
    log.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.25), (20, 0.5)]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    log = records.Log(tmp_path / "log.jsonl", None, 0)
    for step in (10, 20):
        log.write(step, loss=step / 40)
    log.write(20, validation_loss=0.3)
    log.close()
    records.plot(tmp_path / "log.jsonl", tmp_path / "deep" / "plot.png")
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_with_eager_leaves_the_model_alone():
    one = trainer()
    before = parameters(one)
    times = compare_with_eager(one, rounds=2)
    assert set(times) == {"fastllm", "eager"} and all(0 < low <= mid for low, mid in times.values())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), parameters(one).values(), strict=True))


def test_compiled():
    """The traced graph trains as the calls do."""
    plain, compiled = trainer(dropout=0.0), trainer(dropout=0.0)
    compiled.loss = torch.compile(compiled.loss, backend="aot_eager")
    assert run(plain, 5) == pytest.approx(run(compiled, 5), rel=1e-5)
    assert compiled.evaluate() == pytest.approx(plain.evaluate(), rel=1e-4)
    assert isinstance(plain.model, MLPLanguageModel)
