"""The training loop: it learns, saves, and goes on as if it had never stopped."""

import math

import pytest
import torch

from fastllm.lm import training
from fastllm.lm.tokenizer import Tokenizer
from fastllm.models import MLPLanguageModel

TEXT = "one two three four five six seven eight nine ten. " * 60


def trainer(steps=40, dropout=0.1):
    tokenizer = Tokenizer.train(TEXT, 290)
    ids = torch.tensor(tokenizer.encode(TEXT))
    torch.manual_seed(0)
    model = MLPLanguageModel(tokenizer.vocab_size, 8, 16, context_length=2, dropout=dropout)
    options = training.TrainingOptions(steps=steps, batch_size=4, sequence_length=8, warmup_steps=5, learning_rate=0.02)
    return training.Trainer(model, tokenizer, ids[:-100], options, ids[-100:])


def test_learns():
    run = trainer(150, dropout=0.0)
    before = training.perplexity(run.model, run.test_ids, 10)
    seen = []
    run.run(callback=lambda step, loss: seen.append((step, loss)))
    assert [s for s, _ in seen] == list(range(1, 151))
    assert training.perplexity(run.model, run.test_ids, 10) < 0.1 * before


def test_perplexity_is_exp_of_the_mean_loss():
    run = trainer()
    ids = run.test_ids[:13]
    expected = math.exp(run.model.eval().loss(ids[:12].view(3, 4), ids[1:13].view(3, 4)).item())
    assert training.perplexity(run.model, ids, length=4) == pytest.approx(expected, rel=1e-5)


def test_resumed_run_is_the_same_run(tmp_path):
    whole = trainer()
    whole.run()
    first = trainer()
    first.run(until=17)
    first.save(tmp_path / "c.pt")
    torch.manual_seed(99)
    second = training.Trainer.load(tmp_path / "c.pt")
    assert second.step == 17
    second.run()
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_generation_from_a_checkpoint(tmp_path):
    run = trainer(5)
    run.run()
    run.save(tmp_path / "deep" / "c.pt")
    model, tokenizer = training.load_model(tmp_path / "deep" / "c.pt")
    assert tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT) and not model.training
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["c.pt"]


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        training.load_state(tmp_path / "absent")
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        training.load_state(tmp_path / "text")
    torch.save({"a": 1}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a checkpoint"):
        training.load_state(tmp_path / "other")


def test_short_text():
    run = trainer()
    with pytest.raises(ValueError, match="tokens to train on"):
        training.Trainer(run.model, run.tokenizer, run.train_ids[:5], run.options, run.test_ids)


def test_schedule():
    options = training.TrainingOptions(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [options.learning_rate_at(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_comparison_with_eager_leaves_the_model_alone():
    run = trainer()
    before = [p.clone() for p in run.model.parameters()]
    times = training.compare_with_eager(run, rounds=2)
    assert set(times) == {"fastllm", "eager"} and all(0 < low <= mid for low, mid in times.values())
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
