"""What docs/determinism.md says of a whole HSAID: its weights, and the gradients of theta and the multipliers."""

import pytest
import torch
from helpers import ISAS, assert_same_bits, cpu_isa, sequence, threads
from models import bert
from torch import Tensor

from hsaid_kernels import HSAID


def weights_and_gradients(backend: str, memory: str) -> dict[str, Tensor]:
    """For the same gradients of the weights, whatever makes them in a model."""
    torch.manual_seed(0)
    hsaid = HSAID(bert(num_hidden_layers=3), 80, backend=backend, memory=memory)
    with torch.no_grad():
        hsaid.theta.copy_(sequence(len(hsaid.theta)))
        hsaid.multipliers.copy_(1 + sequence(len(hsaid.multipliers), 29))
    weights = hsaid.weights()
    grads = [sequence(weight.numel(), 53).view(weight.shape) for weight in weights.values()]
    torch.autograd.backward(list(weights.values()), grads)
    return {name: weight.detach() for name, weight in weights.items()} | {
        "theta": hsaid.theta.grad,
        "multipliers": hsaid.multipliers.grad,
    }


@pytest.mark.parametrize("memory", ["step", "block"])
def test_every_instruction_set_and_number_of_threads(memory):
    expected = weights_and_gradients("reference", memory)
    assert expected["theta"].any() and expected["multipliers"].any()
    for isa in ISAS:
        for count in (1, 2, 3):
            with cpu_isa(isa), threads(count):
                got = weights_and_gradients("cpu", memory)
            for name, value in expected.items():
                assert_same_bits(got[name], value, f"{isa}, {count} threads, {name}")
