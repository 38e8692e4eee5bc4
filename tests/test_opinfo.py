"""PyTorch's own samples (OpInfo, ModuleInfo) through our functions and layers, errors included.

PyTorch's lists are imported by the tests that read them: that takes seconds, and every job collects this file.
"""

import functools

import pytest
import torch
from helpers import DEVICE, check_against_float64

import fastllm
import fastllm.functional as F

FUNCTIONS = {
    "nn.functional.embedding": F.embedding,
    "nn.functional.mse_loss": F.mse_loss,
    "nn.functional.cross_entropy": F.cross_entropy,
}


@functools.cache
def opinfo(name):
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = (info for info in op_db if info.name == name and not info.variant_test_name)
    return found


def _call(function, name, sample):
    def run(*tensors):
        args = list(tensors)
        first, rest = args[0], args[1:]
        # OpInfo gives embedding's table first.
        if name == "nn.functional.embedding":
            return function(rest[0], first, *rest[1:], **sample.kwargs)
        kwargs = {k: v.to(first.dtype) if k == "weight" and v is not None else v for k, v in sample.kwargs.items()}
        return function(first, *rest, **kwargs)

    return run


@pytest.mark.numbers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_opinfo_samples(name, dtype):
    info, count = opinfo(name), 0
    for sample in info.sample_inputs(DEVICE, dtype, requires_grad=True):
        count += 1
        inputs = [sample.input, *sample.args]
        ours, theirs = _call(FUNCTIONS[name], name, sample), _call(info.op, name, sample)
        if name == "nn.functional.embedding":
            # PyTorch sums these gradients in the table's dtype, and max_norm changes the table: compare on copies.
            table = sample.input.detach().clone().requires_grad_()
            if sample.kwargs.get("sparse") or sample.kwargs.get("max_norm"):
                a = ours(table.detach().clone(), *sample.args)
                b = info.op(table.detach().clone(), *sample.args, **sample.kwargs)
                assert torch.equal(a, b)
                continue
            theirs = lambda w, ids, s=sample: info.op(w, ids, **s.kwargs)  # noqa: E731
            inputs[0] = table
        check_against_float64(ours, theirs, inputs)
    assert count > 2


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_opinfo_error_inputs(name):
    info = opinfo(name)
    if info.error_inputs_func is None:
        pytest.skip("PyTorch lists no error inputs for it")
    for error in info.error_inputs(torch.device(DEVICE)):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            _call(FUNCTIONS[name], name, sample)(sample.input, *sample.args)


LAYERS = {
    "Embedding": fastllm.Embedding,
    "Linear": fastllm.LinearReLU,
    "MSELoss": fastllm.MSELoss,
    "CrossEntropyLoss": fastllm.CrossEntropyLoss,
}


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_moduleinfo_samples(name, dtype, training):
    from torch.testing._internal.common_modules import module_db

    (info,), count = (info for info in module_db if info.module_cls.__name__ == name), 0
    for sample in info.module_inputs_func(info, DEVICE, dtype, requires_grad=True, training=training):
        arguments, call = sample.constructor_input, sample.forward_input
        theirs = info.module_cls(*arguments.args, **arguments.kwargs).to(dtype)
        ours = LAYERS[name](*arguments.args, **arguments.kwargs).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        expected = theirs(*call.args, **call.kwargs)
        if name == "Linear":
            expected = torch.relu(expected)
        torch.testing.assert_close(ours(*call.args, **call.kwargs), expected, equal_nan=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        count += 1
    assert count > 1
