"""The transformer: what it computes, that it learns, that its cache changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as TF

from fastllm.models import MLPLanguageModel, TransformerLanguageModel, sampling

V, D, CONTEXT = 30, 16, 7


def model(seed=0, **kwargs):
    """Weights of 0.3: at those of 0.02 that training begins with, attention would hardly show in the logits."""
    torch.manual_seed(seed)
    lm = TransformerLanguageModel(V, D, **{"num_layers": 2, "num_heads": 4, "context_length": CONTEXT, **kwargs})
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lm.double()


ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
targets = torch.tensor([[2, 3, 4, 5, 6], [7, -100, 9, 10, 11]])


def logits_by_hand(lm, words):
    """Of one sequence, a word and a head at a time."""
    x = [lm.embedding.weight[word] for word in words]
    for block in lm.blocks:
        heads, size = block.attention.num_heads, D // block.attention.num_heads
        q, k, v = [], [], []
        for position, row in enumerate(x):
            projected = block.attention.input.weight @ block.attention_norm(row)
            parts = [part.view(heads, size) for part in projected.split(D)]
            for i in range(size // 2):
                turn = torch.polar(
                    torch.tensor(1.0).double(), torch.tensor(position * 10000.0 ** (-2 * i / size)).double()
                )
                for part in parts[:2]:
                    pair = torch.complex(part[:, i].clone(), part[:, i + size // 2].clone()) * turn
                    part[:, i], part[:, i + size // 2] = pair.real, pair.imag
            for rows, part in zip((q, k, v), parts, strict=True):
                rows.append(part)
        after = []
        for t, row in enumerate(x):
            mixed = []
            for h in range(heads):
                scores = torch.stack([q[t][h] @ k[s][h] / size**0.5 for s in range(t + 1)]).softmax(0)
                mixed.append(sum(scores[s] * v[s][h] for s in range(t + 1)))
            row = row + block.attention.output.weight @ torch.cat(mixed)
            up, down = block.feed_forward.up, block.feed_forward.down
            after.append(row + down(torch.relu(up(block.feed_forward_norm(row)))))
        x = after
    head = lm.embedding.weight if lm.output is None else lm.output.weight
    return torch.stack([head @ lm.norm(row) for row in x])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_by_hand(tied):
    lm = model(tie_weights=tied)
    logits = lm(ids)
    assert logits.shape == (2, 5, V)
    with torch.no_grad():
        torch.testing.assert_close(logits[1], logits_by_hand(lm, ids[1].tolist()))
    torch.testing.assert_close(lm(ids[0]), logits[0])
    torch.testing.assert_close(lm(ids.view(1, 2, 5).int()), logits[None])
    assert lm(ids[:0]).shape == (0, 5, V) and lm(ids[:, :0]).shape == (2, 0, V) and lm(ids[0, :0]).shape == (0, V)


def test_no_look_ahead():
    lm = model()
    changed = ids.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(lm(ids)[:, :3], lm(changed)[:, :3], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(lm(ids)[:, 3:], lm(changed)[:, 3:])
    changed = ids.clone()
    changed[:, 0] = 0
    assert not torch.allclose(lm(ids)[:, -1], lm(changed)[:, -1])  # and all of the past is seen


@pytest.mark.parametrize("tied", [True, False])
def test_losses_are_those_of_the_logits(tied):
    lm = model(tie_weights=tied)
    logits = lm(ids)
    cross_entropy = TF.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(lm.loss(ids, targets), cross_entropy)
    one_hot = TF.one_hot(targets.clamp(min=0), V).double()
    one_hot[targets == -100] = 0
    torch.testing.assert_close(lm.loss(ids, targets, "mse"), TF.mse_loss(logits, one_hot))
    torch.testing.assert_close(lm.loss(ids, one_hot, "mse"), TF.mse_loss(logits, one_hot))
    parameters = list(lm.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (lm.loss(ids, targets), cross_entropy))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_tied_gradient_is_the_sum_of_both_uses(kind):
    tied, untied = model(), model(tie_weights=False)
    assert "output.weight" not in tied.state_dict()
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.embedding.weight})
    for lm in (tied, untied):
        lm.loss(ids, targets, kind).backward()
    assert untied.embedding.weight.grad.any() and untied.output.weight.grad.any()
    torch.testing.assert_close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.output.weight.grad)
    with pytest.raises(RuntimeError, match=r"output\.weight"):
        tied.load_state_dict(untied.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_eager_backend_trains_alike(tied):
    """Losses of 50 steps of AdamW in float32."""
    torch.manual_seed(0)
    ours = TransformerLanguageModel(100, 32, 2, 4, context_length=16, tie_weights=tied)
    eager = TransformerLanguageModel(100, 32, 2, 4, context_length=16, tie_weights=tied, backend="eager")
    eager.load_state_dict(ours.state_dict())
    losses = []
    for lm in (ours, eager):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(50):
            text = torch.randint(100, (4, 17), generator=generator)
            loss = lm.loss(text[:, :-1], text[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert "fastllm" not in loss.grad_fn.name() and "Node" not in loss.grad_fn.name()


@pytest.mark.parametrize("context", [1, 2, 3, CONTEXT, 40])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.95}], ids=str)
def test_cache_changes_nothing(context, options):
    """Also beyond the context: there the window starts at the first multiple of half of it that leaves no more."""
    lm = model(context_length=context)

    def window(length):
        half = -(-context // 2)
        return next(start for start in range(0, length, half) if length - start <= context)

    def without_cache(words):
        return lm(words[:, window(words.shape[1]) :])[:, -1]

    for prompt in (ids[:, :1], ids, ids.repeat(1, 3)):
        cached = lm.generate(prompt, 20, **options, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            plain = sampling.generate(without_cache, prompt, 20, **options, generator=generator)
        assert torch.equal(cached, plain)


def test_cache_computes_each_word_once():
    lm = model(context_length=40)
    seen = []
    lm.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].shape[1]))
    lm.generate(ids, 6)
    assert seen == [5, 1, 1, 1, 1, 1]


def nucleus(logits, p):
    """The fewest most probable words that hold at least p, by a loop."""
    probabilities = logits.softmax(-1).tolist()
    kept, held = set(), 0.0
    for word in sorted(range(len(probabilities)), key=lambda w: -probabilities[w]):
        if held >= p:
            break
        kept.add(word)
        held += probabilities[word]
    return kept


@pytest.mark.parametrize("p", [0.01, 0.3, 0.75, 0.95, 0.999])
def test_top_p(p):
    logits = 3 * torch.randn(20, V, generator=torch.Generator().manual_seed(0)).double()
    filtered = sampling.filter_logits(logits, top_p=p)
    for row, result in zip(logits, filtered, strict=True):
        kept = result.isfinite()
        assert set(kept.nonzero().flatten().tolist()) == nucleus(row, p)
        assert torch.equal(result[kept], row[kept])


@pytest.mark.parametrize("lm", [model(), MLPLanguageModel(V, 8, 8, 2).double()], ids=lambda lm: type(lm).__name__)
def test_top_p_of_the_models(lm):
    """All that is drawn is in the nucleus, and all of the nucleus is drawn."""
    with torch.no_grad():
        allowed = nucleus(lm(ids[0])[-1], 0.6)
    drawn = lm.generate(ids[:1].expand(2000, -1), 1, top_p=0.6, generator=torch.Generator().manual_seed(0))[:, -1]
    assert 1 < len(allowed) < V and set(drawn.tolist()) == allowed


def test_generation_repeats_with_a_seed():
    lm = model()
    draws = [lm.generate(ids, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_batch_is_its_prompts():
    lm = model(dropout=0.5).train()
    batch = lm.generate(ids, 12, temperature=0.0)
    assert lm.training and batch.shape == (2, 17)
    for row, prompt in zip(batch, ids, strict=True):
        assert torch.equal(lm.generate(prompt, 12, temperature=0.0), row)
    one, alone = (lm.generate(p, 12, generator=torch.Generator().manual_seed(0)) for p in (ids[:1], ids[0]))
    assert torch.equal(one[0], alone)


@pytest.mark.parametrize("lm", [model(), MLPLanguageModel(V, 8, 8, 2).double()], ids=lambda lm: type(lm).__name__)
def test_stop_id(lm):
    whole = lm.generate(ids, 12, temperature=0.0)
    stop = whole[0, 8].item()
    ends = [(row[5:] == stop).nonzero().flatten().tolist() for row in whole]
    length = 5 + max(end[0] + 1 if end else 12 for end in ends)
    stopped = lm.generate(ids, 12, temperature=0.0, stop_id=stop)
    assert stopped.shape == (2, length) and ends[0]
    for row, before, end in zip(stopped, whole, ends, strict=True):
        at = 5 + (end[0] if end else 12)
        assert torch.equal(row[:at], before[:length][:at]) and (row[at:] == stop).all()
    assert len(lm.generate(ids[0], 12, temperature=0.0, stop_id=stop)) == 5 + ends[0][0] + 1
    for wrong in (-1, V):
        with pytest.raises(ValueError, match="stop_id"):
            lm.generate(ids, 1, stop_id=wrong)


@pytest.mark.parametrize("lm", [model(), MLPLanguageModel(V, 8, 8, 2).double()], ids=lambda lm: type(lm).__name__)
def test_stream(lm):
    """The same words as ``generate``, one at a time; between two of them the model is as the caller left it."""
    lm.train()
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    whole = lm.generate(ids[0], 20, **options, generator=torch.Generator().manual_seed(3))
    words = []
    for word in lm.stream(ids[0], 20, **options, generator=torch.Generator().manual_seed(3)):
        assert lm.training and torch.is_grad_enabled()
        words.append(word)
    assert words == whole[5:].tolist()
    assert (
        list(lm.stream(ids[0], 20, 0.0, stop_id=words[0]))
        == lm.generate(ids[0], 20, 0.0, stop_id=words[0])[5:].tolist()
    )
    for wrong, message in (
        ({"ids": ids}, "shape"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop_id": V}, "stop_id"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.stream(**{"ids": ids[0], "max_new_tokens": 1, **wrong})


def test_state_dict_round_trip(tmp_path):
    for tied in (True, False):
        lm = model(tie_weights=tied)
        torch.save(lm.state_dict(), tmp_path / "state.pt")
        other = TransformerLanguageModel(**lm.config).double()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(ids), lm(ids))
        assert torch.equal(copy.deepcopy(lm)(ids), lm(ids))


def test_compiles_whole():
    lm = model()
    compiled = torch.compile(lambda i, t: lm.loss(i, t), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(lm.loss(ids, targets), list(lm.parameters()))
    for a, b in zip(torch.autograd.grad(compiled(ids, targets), list(lm.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16():
    lm, low = model(), model().bfloat16()
    torch.testing.assert_close(low.loss(ids, targets), lm.loss(ids, targets).bfloat16(), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lm.float().loss(ids, targets)
    torch.testing.assert_close(loss.float(), lm.loss(ids, targets), rtol=0.05, atol=0.05)


def test_learns_a_repeated_text():
    torch.manual_seed(0)
    text = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]).repeat(20)  # what follows 1, 3 and 5 depends on the word before
    lm = TransformerLanguageModel(10, 32, 2, 2, context_length=12, dropout=0.1).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    windows = text.unfold(0, 13, 7)
    for _ in range(100):
        loss = lm.loss(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(lm.generate(text[:4], 60, temperature=0.0), text[:64])


def test_dropout_acts_in_training_only():
    lm = model(dropout=0.5)
    assert not torch.equal(lm.train()(ids), lm(ids))
    assert torch.equal(lm.eval()(ids), lm(ids)) and torch.equal(lm(ids), model().eval()(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide embedding_dim .* 3 and embedding_dim 16"),
        ({"num_heads": 16}, "num_heads must divide"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"context_length": 0}, "context_length"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
    ],
    ids=str,
)
def test_constructor_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerLanguageModel(V, D, **{"num_layers": 1, "num_heads": 2, **options})


def test_defaults():
    lm = TransformerLanguageModel(V, D, 1, 2)
    assert lm.blocks[0].feed_forward.up.out_features == 4 * D and lm.context_length == 256 and lm.output is None
    assert [name for name, _ in lm.blocks[0].attention.named_parameters()] == ["input.weight", "output.weight"]


def test_ids():
    lm = model()
    long = torch.zeros(2, CONTEXT + 1, dtype=torch.int64)
    for call in (lm, lambda words: lm.loss(words, words)):
        with pytest.raises(ValueError, match="at most context_length = 7 words a sequence, got 8"):
            call(long)
        with pytest.raises(ValueError, match="shape"):
            call(ids[0, 0])
    with pytest.raises(ValueError, match=r"targets must be of shape \(2, 5\)"):
        lm.loss(ids, targets.t())
    with pytest.raises(IndexError):
        lm(ids + V)
