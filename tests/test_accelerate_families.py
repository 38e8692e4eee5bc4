"""fastllm.accelerate on Hugging Face models: random tiny configurations, nothing is downloaded.

What compiles, and what starts processes, takes minutes and is marked ``slow``.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

VOCABULARY = 100
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opt(**changes):
    sizes = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, **changes}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def gpt2():
    config = transformers.GPT2Config(
        **TOKENS, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, **changes}))


def gemma(generation: int, **changes):
    sizes = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, **changes}
    if generation == 2:
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    sizes["final_logit_softcapping"] = 5.0
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


def t5(activation: str = "relu", **changes):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**{**special, **sizes, "feed_forward_proj": activation, **changes})
    return transformers.T5ForConditionalGeneration(config)


def bart():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = transformers.BartConfig(
        **TOKENS,
        **sizes,
        **heads,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.copy_(torch.randn(1, VOCABULARY))  # the bias that fine-tuned checkpoints have
    return model


def bert(**changes):
    config = transformers.BertConfig(**{**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return transformers.BertForMaskedLM(config)


FAMILIES = {
    "opt": opt,
    "opt-untied": lambda: opt(tie_word_embeddings=False),
    "gpt2": gpt2,
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gemma2": lambda: gemma(2, final_logit_softcapping=5.0),
    "gemma2-cap30": lambda: gemma(2),
    "gemma3": lambda: gemma(3),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**GROUPED, logits_scaling=3.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.3)),
    "t5": t5,
    "t5-gated": lambda: t5("gated-gelu", tie_word_embeddings=False, initializer_factor=0.3),
    "bart": bart,
    "bert": bert,
}
ENCODER_DECODER = {"t5", "t5-gated", "bart"}


def made(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family]()


def batch(seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Ids, and the same as labels with a few of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) < 0.2, -100)
    return {"input_ids": ids, "labels": labels}


def losses_of(model: nn.Module, steps: int = 20) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        loss = model(**batch(step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module) -> dict:
    """Everything that undo has to bring back: classes, attributes, and what is in their dictionaries."""
    state = {}
    for name, module in model.named_modules():
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        state[name] = (type(module), values)
    return state


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, (kind, values) in before.items():
        assert after[name][0] is kind, name
        assert after[name][1].keys() == values.keys(), name
        for key, value in values.items():
            now = after[name][1][key]
            if isinstance(value, dict):
                assert value.keys() == now.keys() and all(value[k] is now[k] for k in value), (name, key)
            else:
                assert now is value or now == value, (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_twenty_steps_agree(family):
    model = made(family)
    expected = losses_of(copy.deepcopy(model))
    report = fastllm.accelerate(model)
    assert any("without logits" in row.became for row in report.replaced), report
    assert not any("head" in row.reason for row in report.left), report
    losses = losses_of(model)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 0.1


class LargestOutput(TorchDispatchMode):
    """Records the largest number of rows among tensors with a column for each word of the vocabulary."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.rows = classes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 0 and tensor.shape[-1] == self.classes:
                self.rows = max(self.rows, tensor.numel() // self.classes)
        return output


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logits_are_held(family):
    model = made(family).train()
    inputs = batch(rows=8, length=11)
    rows = []
    for _ in range(2):
        with LargestOutput(VOCABULARY) as largest:
            model(**inputs).loss.backward()
        rows.append(largest.rows)
        fastllm.accelerate(model)
    assert rows[0] >= 8 * 10  # the logits
    assert rows[1] <= 32, rows  # at most a table transposed, of 32 features, or a bias


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs(family):
    """None in training with labels; logits in evaluation, without labels, and where skip_logits is False."""
    reference, inputs = made(family), batch()
    model = copy.deepcopy(reference)
    fastllm.accelerate(model)
    is_seq2seq = family in ENCODER_DECODER
    for mode in (True, False):
        model.train(mode), reference.train(mode)
        expected = reference(**inputs)
        for skip in (None, True, False):
            output = model(**inputs, **({} if skip is None else {"skip_logits": skip}))
            torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
            assert (output.logits is None) == (mode if skip is None else skip)
            if output.logits is not None:
                assert type(output.logits) is torch.Tensor
                torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
        output, expected_tuple = (each(**inputs, return_dict=False) for each in (model, reference))
        torch.testing.assert_close(output[0], expected.loss, rtol=1e-5, atol=0)
        at = 2 if family == "mixtral" else 1  # after the loss of the experts
        assert len(output) == len(expected_tuple) and (output[at] is None) == mode  # the positions stay
        if not is_seq2seq:
            ids = inputs["input_ids"]
            torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.train()(**inputs).keys() == set(reference.train()(**inputs).keys()) - {"logits"}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_stays(family, tmp_path):
    model = made(family).eval()
    inputs = batch()["input_ids"]
    generated = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    if family != "bert":
        expected = model.generate(inputs, **generated)
    keys, before, parameters = list(model.state_dict()), snapshot(model), dict(model.named_parameters())
    signature, kind = inspect.signature(model.forward), type(model)

    report = fastllm.accelerate(model)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert all(value is parameters[name] for name, value in model.named_parameters())
    if family != "bert":
        assert torch.equal(model.generate(inputs, **generated), expected)

    changed = snapshot(model)
    again = fastllm.accelerate(model)
    assert again.replaced == [] and again.left == report.left
    assert_same(changed, snapshot(model))
    again.undo()
    assert_same(changed, snapshot(model))

    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.config.architectures == [kind.__name__]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert type(type(model).from_pretrained(tmp_path)(**batch()).logits) is torch.Tensor

    model.train()(**batch()).loss.backward()
    model.eval()
    report.undo()
    model.zero_grad()
    assert_same(before, snapshot(model))
    report.undo()


def test_strict():
    model = opt()
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"embed_positions .*OPTLearnedPositionalEmbedding.*: a subclass of Embedding"
    ):
        fastllm.accelerate(model, strict=True)
    assert_same(before, snapshot(model))
    assert fastllm.accelerate(model, embedding=False, strict=True).left == []
    assert fastllm.accelerate(llama(), strict=True).left == []


# --- heads that are left alone


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 3


def with_lora_head():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"])), "peft.tuners"


def with_custom_head():
    model = llama()
    model.lm_head = Scaled(32, VOCABULARY, bias=False)
    return model, "subclass of Linear"


def with_sequential_head():
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, VOCABULARY))
    return model, "Sequential, not a torch.nn.Linear"


def with_parametrised_head():
    model = llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model, "parametrised"


def with_old_weight_norm():
    model = llama()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.lm_head)
    return model, "computed before each call"


def with_hook():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    return model, "hook on lm_head"


def with_hook_on_the_way():
    model = bert()
    model.cls.predictions.register_forward_hook(lambda module, args, output: output * 3)
    return model, "hook on predictions"


def with_replaced_forward():
    model = llama()
    model.lm_head.forward = lambda input: nn.functional.linear(input, model.lm_head.weight) * 3
    return model, "replaced on the instance"


CUSTOM = [
    with_custom_head,
    with_sequential_head,
    with_parametrised_head,
    with_old_weight_norm,
    with_hook,
    with_hook_on_the_way,
    with_replaced_forward,
    with_lora_head,
]


@pytest.mark.parametrize("make", CUSTOM)
def test_other_heads_are_left_with_the_reason(make):
    torch.manual_seed(0)
    model, why = make()
    model.train()
    expected = model(**batch())
    report = fastllm.accelerate(model)
    assert any(why in row.reason for row in report.left), report
    assert not any("logits" in row.became for row in report.replaced)
    output = model(**batch())
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    with pytest.raises(RuntimeError, match="strict=True"):
        fastllm.accelerate(model, strict=True)


def test_a_probe_finds_a_layer_that_was_patched(monkeypatch):
    model = llama()
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: original(self, input) + 1)
    report = fastllm.accelerate(model)
    assert [row.reason for row in report.left] == ["its output is not x W^T + b on a probe"]


def test_classifier_has_no_language_model_loss():
    torch.manual_seed(0)
    sizes = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "num_labels": 3}
    model = transformers.OPTForSequenceClassification(transformers.OPTConfig(**sizes)).train()
    reference = copy.deepcopy(model)
    report = fastllm.accelerate(model)
    assert not any("logits" in row.became for row in report.replaced)
    assert [row.kind.rpartition(".")[2] for row in report.left] == ["OPTLearnedPositionalEmbedding"]
    ids, labels = batch()["input_ids"], torch.tensor([0, 2, 1])
    for _ in range(3):
        a, b = model(ids, labels=labels), reference(ids, labels=labels)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
        a.loss.backward(), b.loss.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


# --- what comes between the head and the loss


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "t5", "bert", "opt"])
def test_hooks_that_come_later_see_tensors(family):
    model = made(family).train()
    fastllm.accelerate(model)
    head = model.get_output_embeddings()
    seen = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    assert type(model(**batch()).logits) is torch.Tensor and type(seen[0]) is torch.Tensor
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    model(**batch())
    handle.remove()
    assert not any("Deferred" in type(item).__name__ for item in seen)
    assert model(**batch()).logits is None


def test_normaliser_shifted_labels_and_ignored_index():
    torch.manual_seed(0)
    model = llama().train()
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    inputs = batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for options in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": shifted},
        {"ignore_index": int(inputs["input_ids"][0, 1])},
        {"logits_to_keep": 0},
    ):
        values = dict(inputs, labels=inputs["input_ids"]) if "ignore_index" in options else inputs
        output, expected = model(**values, **options), reference(**values, **options)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
        assert output.logits is None
    for labels in (torch.full_like(inputs["labels"], -100), torch.full_like(inputs["labels"], VOCABULARY)):
        if labels[0, 0] < 0:
            assert model(inputs["input_ids"], labels=labels).loss.isnan()
        else:
            with pytest.raises(IndexError, match="100"):
                model(inputs["input_ids"], labels=labels)
    positional = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    assert positional.logits is None and positional.loss is not None


def custom_loss(kind):
    cross_entropy = nn.functional.cross_entropy

    def loss(logits, labels, vocab_size, **kwargs):
        flat, target = logits.view(-1, vocab_size), labels.view(-1)
        if kind == "z-loss":
            return cross_entropy(flat, target) + 1e-3 * torch.logsumexp(logits, -1).pow(2).mean()
        if kind == "smoothed":
            return cross_entropy(flat.float(), target, label_smoothing=0.1, reduction="none").mean()
        if kind == "weighted":
            return cross_entropy(flat, target, weight=torch.linspace(0.5, 2, vocab_size))
        if kind == "log-softmax":
            return nn.functional.nll_loss(flat.log_softmax(-1), target)
        if kind == "transposed":
            return cross_entropy(logits.transpose(1, 2), labels)
        if kind == "masked":
            keep = labels != -100
            return cross_entropy(logits[keep], labels[keep])
        if kind == "sliced":
            return cross_entropy(logits[..., :-1, :].flatten(0, 1), labels[:, 1:].flatten())
        if kind == "last":
            return cross_entropy(logits[:, -1], labels[:, 0].clamp(min=0))
        if kind == "in place":
            scaled = logits * 2
            logits[..., 3] = -5.0
            scaled.div_(3)
            return cross_entropy(flat, target) + cross_entropy(scaled.view(-1, vocab_size), target)
        if kind == "views in place":
            logits.view(-1, vocab_size)[:, 5].fill_(2.0)
            return cross_entropy(flat, target)
        if kind == "capped by another way":
            return cross_entropy((torch.tanh(flat / 3) * 4 * 2 + 1) / 2, target)
        if kind == "tanh alone":
            return cross_entropy(torch.tanh(flat * 2), target)
        if kind == "negative cap":
            return cross_entropy(flat.tanh() * -2.0, target)
        if kind == "probabilities":
            return cross_entropy(flat, torch.softmax(torch.arange(flat.shape[0] * vocab_size).view_as(flat) % 7.0, -1))
        if kind == "bias and scale":
            bias = torch.linspace(-1, 1, vocab_size)
            return cross_entropy(((flat + bias) * 2 + bias) / 3, target)
        if kind == "by class":
            return cross_entropy(input=flat[:, : vocab_size // 2], target=target.clamp(0, vocab_size // 2 - 1))
        if kind == "by name":
            return cross_entropy(input=flat, target=target)
        raise AssertionError(kind)

    return loss


KINDS = [
    "z-loss",
    "smoothed",
    "weighted",
    "log-softmax",
    "transposed",
    "masked",
    "sliced",
    "last",
    "in place",
    "views in place",
    "capped by another way",
    "tanh alone",
    "negative cap",
    "probabilities",
    "bias and scale",
    "by class",
    "by name",
]
WITHOUT_LOGITS = {"smoothed", "masked", "sliced", "last", "bias and scale", "by name"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_ones_own(kind):
    """Whatever a loss does to logits is right; what it does as usual needs no logits."""
    torch.manual_seed(0)
    model = llama().train()
    reference = copy.deepcopy(model)
    model.loss_function = reference.loss_function = custom_loss(kind)
    fastllm.accelerate(model)
    inputs = batch()
    with LargestOutput(VOCABULARY) as largest:
        loss = model(**inputs).loss
        loss.backward()
    expected = reference(**inputs).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert (largest.rows <= 1) == (kind in WITHOUT_LOGITS), largest.rows


# --- precision


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bart", "t5", "opt"])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision_is_at_least_as_accurate(family, kind):
    truth = made(family).double().train()
    model = copy.deepcopy(truth).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    inputs = batch(rows=8, length=17)
    if kind == "bfloat16":  # one truth for both: the rounded weights
        truth.load_state_dict(reference.state_dict())

    def gradients(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast" and model is not truth):
            loss = model(**inputs).loss
        loss.backward()
        grads = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        return loss.detach(), grads

    true_loss, true_grads = gradients(truth)
    loss, grads = gradients(reference)
    our_loss, our_grads = gradients(model)
    assert our_loss.dtype == loss.dtype
    assert abs(our_loss - true_loss) <= 2 * abs(loss - true_loss) + 2e-3 * abs(true_loss)
    assert (our_grads - true_grads).norm() <= 1.2 * (grads - true_grads).norm()


def test_float16_sum_over_tokens_stays_finite():
    torch.manual_seed(0)
    model = llama().to(torch.float16).train()
    fastllm.accelerate(model)
    ids = torch.randint(3, VOCABULARY, (300, 60))
    loss = model(ids, labels=ids, num_items_in_batch=300 * 59).loss
    assert loss.dtype == torch.float32 and loss.isfinite() and loss < 10


# --- other tools


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "t5", "bart", "bert", "granite"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compile(family, fullgraph):
    torch._dynamo.reset()
    model = made(family).train()
    reference = copy.deepcopy(model)
    try:
        torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=fullgraph)(**batch())
    except torch._dynamo.exc.Unsupported:
        pytest.skip("the model itself does not compile")
    fastllm.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for step in range(2):
        loss, expected = compiled(**batch(step)).loss, reference(**batch(step)).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward(), expected.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert model.get_output_embeddings().deferring is None
    assert model.eval()(**batch()).logits is not None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_gradient_checkpointing(family, reentrant):
    model = made(family).train()
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, expected = model(**batch()).loss, reference(**batch()).loss
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("family", ["opt", "t5", "gemma2"])
def test_copies_are_accelerated_and_independent(family):
    model = made(family).train()
    report = fastllm.accelerate(model)
    expected = model(**batch()).loss
    made_copies = list(copies(model))
    report.undo()
    for other in made_copies:
        assert other(**batch()).logits is None
        torch.testing.assert_close(other(**batch()).loss, expected)
        other(**batch()).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        modules = list(other.modules())
        places = [vars(module)["_fastllm_place"] for module in modules if "_fastllm_place" in vars(module)]
        assert all(any(place.block() is module for module in modules) for place in places)
        assert bool(places) == (family != "gemma2")
    assert model(**batch()).logits is not None


def test_meta_device_then_to_empty():
    torch.manual_seed(0)
    reference = opt().train()
    with torch.device("meta"):
        model = opt().train()
    report = fastllm.accelerate(model)
    assert any("without logits" in row.became for row in report.replaced)
    assert {row.backend for row in report.replaced} == {"its device's"}
    assert model(**{k: v.to("meta") for k, v in batch().items()}).loss.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    model.tie_weights()
    output = model(**batch())
    torch.testing.assert_close(output.loss, reference(**batch()).loss, rtol=1e-5, atol=0)
    assert output.logits is None


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1"], ["fc2"], ["fc1", "fc2", "lm_head"]])
def test_peft(order, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    torch.manual_seed(0)
    plain = opt(tie_word_embeddings=False)
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).train()

    model, reference = copy.deepcopy(plain), adapted(plain)
    if order == "before":
        report = fastllm.accelerate(model)
        model = adapted(model)
    else:
        model = adapted(model)
        report = fastllm.accelerate(model)
    output = model(**batch())
    assert (output.logits is None) == ("lm_head" not in targets), report
    assert losses_of(model) == pytest.approx(losses_of(reference), rel=1e-4)
    model.eval(), reference.eval()
    ids = batch()["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    merged, expected = model.merge_and_unload(), reference.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


def test_data_parallel_replicas_do_not_share_state():
    model = opt().train()
    fastllm.accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    assert replica._fastllm_head == ("lm_head",)


def test_resized_embeddings():
    model = opt().train()
    fastllm.accelerate(model)
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model(**batch()).logits is None


def test_a_new_head_is_accelerated_by_the_next_call():
    model = opt(tie_word_embeddings=False).train()
    first = fastllm.accelerate(model)
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    assert model(**batch()).logits is not None
    second = fastllm.accelerate(model)
    assert [row.name for row in second.replaced] == ["lm_head"]
    assert model(**batch()).logits is None
    second.undo()
    assert model(**batch()).logits is not None
    first.undo()
    assert type(model) is transformers.OPTForCausalLM


@pytest.mark.parametrize("family", ["opt", "gemma2", "t5"])
def test_nothing_is_kept_alive(family):
    """Neither a step's tensors nor the model wait for the garbage collector."""
    model = made(family).train()
    report = fastllm.accelerate(model)
    gc.collect()
    gc.disable()
    try:
        output = model(**batch())
        output.loss.backward()
        del output
        assert [item for item in gc.get_objects() if "Deferred" in type(item).__name__] == []
        layer = weakref.ref(model.get_output_embeddings())
        blocks = [weakref.ref(module) for module in model.modules()]
        del model
        assert layer() is None and not any(block() for block in blocks)
        report.undo()
    finally:
        gc.enable()


# --- training programs


def trained(model: nn.Module, tmp_path, **options) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """Losses, parameters and evaluation of a short run of Trainer on sequences with unequal numbers of labels."""
    examples = [
        {"input_ids": one["input_ids"][0], "labels": one["labels"][0]} for one in (batch(seed) for seed in range(16))
    ]
    for at, example in enumerate(examples):
        example["labels"][: at % 7] = -100
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"mean": float(prediction.predictions.mean())}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples, eval_dataset=examples[:4], compute_metrics=metrics
    )
    trainer.train()
    evaluation = trainer.evaluate()
    assert seen == [(4, 9, VOCABULARY)]  # evaluation has its logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, model.state_dict(), evaluation


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_trainer(options, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    torch.manual_seed(0)
    reference = opt()
    model = copy.deepcopy(reference)
    report = fastllm.accelerate(model)
    losses, state, evaluation = trained(model, tmp_path, **options)
    report.undo()
    assert model.train()(**batch()).logits is not None  # also where Trainer has wrapped the forward that it found
    expected, expected_state, expected_evaluation = trained(reference, tmp_path, **options)
    rel = 5e-3 if options.get("bf16") else 1e-4
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=rel)
    assert evaluation["eval_loss"] == pytest.approx(expected_evaluation["eval_loss"], rel=rel)
    assert evaluation["eval_mean"] == pytest.approx(expected_evaluation["eval_mean"], rel=1e-2, abs=1e-4)
    for name, value in expected_state.items():
        if not options.get("bf16"):
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, inputs, index):
            output = self.model(**inputs)
            assert (output.logits is None) == (self.model.get_output_embeddings().__class__ is not nn.Linear)
            self.losses.append(output.loss.item())
            return output.loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    losses = []
    for accelerate in (False, True):
        torch.manual_seed(0)
        module = Module(opt().train())
        if accelerate:
            report = fastllm.accelerate(module)
            assert any(row.name == "model.lm_head" for row in report.replaced)
        trainer = lightning.Trainer(
            max_steps=6,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
        )
        data = torch.utils.data.DataLoader([batch(seed) for seed in range(12)], batch_size=None)
        trainer.fit(module, data)
        losses.append(module.losses)
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-4)


DISTRIBUTED = """
import copy, sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import fastllm, test_accelerate_families as t
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


def layers(model):
    base = model.base_model
    return base.decoder.layers if hasattr(base, "decoder") else base.layers


def shard(model, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    options = dict(mesh=mesh)
    if "bf16" in kind:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers(model):
        if "parts" in kind:  # a layer of a block, alone
            fully_shard(layer.fc2, **options)
        fully_shard(layer, **options)
    if "head" in kind:  # resharded when its own forward ends
        fully_shard(model.get_output_embeddings(), reshard_after_forward=True, **options)
    return fully_shard(model, **options)


def run(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, logits = [], None
    for step in range(3):
        output = model(**t.batch(2 * step + rank))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        logits = output.logits
    return losses, logits


for kind, family in t.PROCESSES:
    reference = t.made(family).train()
    model = copy.deepcopy(reference)
    report = fastllm.accelerate(model)
    expected, _ = run(shard(reference, kind))
    losses, logits = run(shard(model, kind))
    tolerance = 2e-2 if "bf16" in kind else 1e-4
    problems = [] if all(abs(a / b - 1) < tolerance for a, b in zip(losses, expected)) else [(losses, expected)]
    if (logits is None) != ("head" not in kind):
        problems.append("logits: " + str(logits))
    try:
        report.undo()
        undone = "undone"
    except RuntimeError as error:
        undone = str(error)
    if ("after accelerate" in undone) != (kind != "ddp"):
        problems.append(undone)
    print(kind, family, problems or "agree", sep="|", flush=True)
dist.destroy_process_group()
"""
PROCESSES = [
    ("ddp", "opt"),
    ("fsdp2", "opt"),
    ("fsdp2", "gemma2"),
    ("fsdp2 bf16", "llama"),
    ("fsdp2 head", "llama"),
    ("fsdp2 parts", "opt"),
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[str]:
    """The output of both, which run all cases after one another."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(DISTRIBUTED.format(here=str(Path(__file__).parent), store=folder / "store"))
    both = [
        subprocess.Popen([sys.executable, str(script), rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=1800) for process in both]
    finally:
        for process in both:
            process.kill()
    return [out + "\n" + error[-3000:] for out, error in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), PROCESSES)
def test_two_processes(kind, family, two_processes):
    for output in two_processes:
        assert f"{kind}|{family}|agree" in output, output


def test_documented_report():
    text = (Path(__file__).parent.parent / "docs" / "accelerate.md").read_text()
    code = text.split("```python\nimport transformers\n")[1].split("```")[0]
    expected = text.split("<!-- report: begin -->\n```\n")[1].split("\n```\n<!-- report: end -->")[0]
    printed = []
    exec(
        code,
        {"transformers": transformers, "fastllm": fastllm, "print": lambda x: printed.append(str(x))},
    )
    assert printed == [expected]
