"""W0 in few bits: the weights are those over its dequantized values."""

import copy

import pytest
import torch
from few_bits import Int8, quantized
from models import IDS, bert, moved
from torch import nn

from hsaid_kernels import HSAID

LABELS = torch.tensor([0, 1])


def pair(**options) -> tuple[HSAID, HSAID]:
    """An HSAID over quantized W0, and one over the same values as ordinary tensors."""
    torch.manual_seed(0)
    few, many = quantized(bert().eval()), bert().eval()
    values = {
        name: parameter.dequantize() if isinstance(parameter, Int8) else parameter
        for name, parameter in few.named_parameters()
    }
    many.load_state_dict(values, strict=False)
    found = []
    for model, memory in ((few, "block"), (many, "step")):
        torch.manual_seed(1)
        found.append(moved(HSAID(model, 80, memory=memory, **options)))
    return found[0], found[1]


@pytest.mark.parametrize("options", [{}, dict(partition="did"), dict(heads=True), dict(exclude="classifier")])
def test_as_over_the_dequantized_values(options):
    few, many = pair(**options)
    assert few.plan.names == many.plan.names and any(isinstance(p, Int8) for p in few.w0().values())
    losses = [hsaid(IDS, labels=LABELS).loss for hsaid in (few, many)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert torch.equal(few.theta.grad, many.theta.grad)


def test_checkpoints_and_merges(tmp_path):
    few, many = pair()
    few.save_pretrained(tmp_path)
    model = few.unwrap()
    assert isinstance(model.classifier.weight, Int8)
    again = HSAID.from_pretrained(tmp_path, model, memory="block")
    with torch.no_grad():
        expected = many(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        merged = again.merge()
        assert type(merged.classifier.weight) is nn.Parameter and torch.equal(merged(IDS).logits, expected)
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        torch.manual_seed(0)
        HSAID.from_pretrained(tmp_path, bert())


def test_the_row_of_padding_stays_its_dequantized_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=3), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(Int8.of(torch.randn(10, 8)), requires_grad=False)
    hsaid = moved(HSAID(model, 20, memory="block"))
    w0, ids = hsaid.w0()["0.weight"].dequantize(), torch.tensor([3, 4])
    with torch.no_grad():
        for rows in (hsaid.weights()["0.weight"][ids], model[0](ids), hsaid.merge()[0](ids)):
            assert torch.equal(rows[0], w0[3]) and not torch.equal(rows[1], w0[4])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r'memory: expected "block" for a quantized model.*query.weight'):
        HSAID(quantized(bert()), 80)


def test_what_a_quantized_matrix_cannot_hold():
    few, many = pair(train_fully="classifier")
    with pytest.raises(
        RuntimeError,
        match=r"merge\(\): expected plain parameters, which inplace=True can write to, got quantized ones: ",
    ):
        few.merge(inplace=True)
    assert not few.merged
    torch.compiler.reset()  # after many HSAIDs in a process torch gives up compiling, and this one runs as it is
    with pytest.raises(Exception, match="torch.compile: expected plain parameters"):
        torch.compile(few, backend="eager")(IDS)
    for hsaid in (few, many):  # what is trained fully is an ordinary copy
        optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.1)
        hsaid(IDS, labels=LABELS).loss.backward()
        optimizer.step()
    assert all(map(torch.equal, few.full.values(), many.full.values()))
    assert type(few.full["classifier.weight"]) is nn.Parameter


def test_values_that_change_are_noticed():
    torch.manual_seed(0)
    few = moved(HSAID(quantized(bert(num_hidden_layers=3).eval()), 80, memory="block"))
    name = "bert.encoder.layer.0.output.dense.weight"
    stored = few.w0()[name].values
    with torch.no_grad():
        before = few(IDS).logits
        stored.add_(1)
        assert not torch.equal(few(IDS).logits, before)
    loss = few(IDS, labels=LABELS).loss
    stored.add_(1)
    with pytest.raises(RuntimeError, match=f"'{name}' to stay as it is between forward and backward"):
        loss.backward()


def test_copies():
    few, _ = pair()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(few)(IDS).logits, few(IDS).logits)


class Failing(Int8):
    """As torchao's Int4OpaqueTensor."""

    def dequantize(self):
        raise NotImplementedError("Int4OpaqueTensor dispatch: unimplemented")


class Static(Int8):
    """As torchao's NF4Tensor."""

    @staticmethod
    def dequantize(value, table):
        return table[value]


class Codes(Int8):
    def dequantize(self):
        return self.values


class Halves(Int8):
    def dequantize(self):
        return self.values[:, ::2].float()


WRONG = {Failing: "fails", Static: "fails", Codes: r"gives \(2, 16\) in torch.int8", Halves: r"gives \(2, 8\) in torch"}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_do_not_give_their_values_are_refused(kind):
    model = bert()
    model.classifier.weight = nn.Parameter(kind.of(model.classifier.weight.detach()), requires_grad=False)
    expected = rf"got 'classifier.weight', a {kind.__name__} of shape \(2, 16\) whose dequantize\(\) {WRONG[kind]}"
    for memory in ("block", "step"):
        with pytest.raises(TypeError, match=expected + ".*: quantize the model by another configuration"):
            HSAID(model, 80, memory=memory)


def test_a_dtype_that_does_not_reach_the_quantized_tensors():
    model = quantized(bert().eval()).to(torch.bfloat16)
    assert model.classifier.weight.dtype == torch.float32 and model.classifier.bias.dtype == torch.bfloat16
    found = []
    for dtype in (torch.bfloat16, None):
        torch.manual_seed(0)
        with HSAID(model, 80, memory="block", dtype=dtype) as hsaid:
            output = moved(hsaid)(IDS, labels=LABELS)
            output.loss.backward()
            assert hsaid.theta.grad.all() and {w.dtype for w in hsaid.weights().values()} == {torch.bfloat16}
            assert torch.equal(hsaid.merge()(IDS).logits, output.logits)
            found.append(output.logits)
    assert torch.equal(*found)
    hsaid = HSAID(model, 80, memory="block", train_fully="query")
    hsaid(IDS, labels=LABELS).loss.backward()
    assert {full.dtype for full in hsaid.full.values()} == {torch.bfloat16}


def test_a_dtype_that_does_not_reach_them_later():
    few, _ = pair()
    expected = few(IDS).logits
    assert few.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    assert torch.allclose(few.to(torch.float32)(IDS).logits, expected, atol=0.1)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return Int8.of(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Times(torch.autograd.Function):
    """Keeps the quantized weight for backward, as optimum-quanto does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.dequantize().t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.dequantize(), grad.t() @ x


class QLinear(nn.Linear):
    """As optimum-quanto's: quantizes its weight at each call, also one that stands for a quantized one."""

    @property
    def qweight(self):
        return self.weight if isinstance(self.weight, Int8) else Rounded.apply(self.weight)

    def forward(self, x):
        return Times.apply(x, self.qweight) + self.bias


def with_qlinear(frozen: bool) -> nn.Module:
    torch.manual_seed(0)
    model = bert().eval()
    model.classifier = QLinear(16, 2)
    if frozen:
        model.classifier.weight = nn.Parameter(Int8.of(model.classifier.weight.detach()), requires_grad=False)
    return model


def test_layers_that_would_quantize_once_more_are_refused():
    model = with_qlinear(frozen=True)
    for memory in ("block", "step"):
        with pytest.raises(
            TypeError, match=r"got 'classifier', a QLinear, which would quantize the projected.*exclude="
        ):
            HSAID(model, 80, memory=memory)
    expected = model(IDS).logits
    hsaid = HSAID(model, 80, memory="block", exclude=r"classifier\.weight")
    assert torch.equal(hsaid(IDS).logits, expected)
    hsaid(IDS, labels=LABELS).loss.backward()
    assert hsaid.theta.grad.all()


def test_quantization_aware_training_quantizes_the_projected_weights():
    gradients = []
    for memory in ("step", "block"):
        hsaid = moved(HSAID(with_qlinear(frozen=False), 80, memory=memory))
        output = hsaid(IDS, labels=LABELS)
        output.loss.backward()
        gradients.append(hsaid.theta.grad)
        merged = hsaid.merge()
        assert isinstance(merged.classifier, QLinear) and torch.equal(merged(IDS).logits, output.logits)
    assert gradients[0].all() and torch.equal(*gradients)
