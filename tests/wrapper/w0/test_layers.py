"""Layers that keep, copy, mask or derive something from their weights."""

import copy
import pickle

import pytest
import torch
from models import change, gradient, moved, same, snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

from hsaid_kernels import HSAID

LAYERS = {
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2, batch_first=True),
    "gru": lambda: nn.GRU(4, 5),
    "rnn cell": lambda: nn.RNNCell(4, 4),
    "attention": lambda: SelfAttention(),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), 2),
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(),
    "new weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.3),
    "list": lambda: Listed(),
}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": torch.ones(4)})

    def forward(self, x):
        for matrix in self.matrices:
            x = x @ matrix
        return x * self.named["scale"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_keep_weights(kind, mode):
    torch.manual_seed(0)
    model, x = LAYERS[kind](), torch.randn(2, 3, 4)
    if kind == "rnn cell":
        x = x[0]
    model.train(mode == "train" and kind != "spectral norm")
    with torch.no_grad():
        untouched = model(x)
    plain = copy.deepcopy(model) if "norm" not in kind or "new" in kind else None
    untouched = untouched[0] if isinstance(untouched, tuple) else untouched
    hsaid = moved(HSAID(model, 60))

    def first(module):
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    for _ in range(2):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for run in (hsaid, model):
                    assert torch.allclose(first(run), first(hsaid.merge()), atol=1e-6), (grad, run is model)
                    assert not torch.allclose(first(run), untouched, atol=1e-4)
        assert gradient(hsaid, lambda: first(model)).any()
        change(hsaid)
    model = hsaid.unwrap()
    with torch.no_grad():
        assert torch.equal(first(model), untouched)
    if plain is not None:
        assert type(model) is type(plain) or kind in ("new weight norm", "orthogonal")


@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if "norm" not in kind and kind not in ("orthogonal", "pruned")]
)
def test_layers_that_keep_weights_are_copied(kind):
    hsaid, x = (
        moved(HSAID(nn.Sequential(LAYERS[kind]()), 60).eval()),
        torch.randn(2, 4) if "cell" in kind else torch.randn(2, 3, 4),
    )
    with torch.no_grad():
        expected = hsaid(x)
        for copied in (
            copy.deepcopy(hsaid),
            pickle.loads(pickle.dumps(hsaid)),
            copy.deepcopy(hsaid.model),
            pickle.loads(pickle.dumps(hsaid.model)),
            hsaid.merge(),
        ):
            out = copied(x)
            pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
            for a, b in pairs:
                a, b = (torch.cat([t.flatten() for t in c]) if isinstance(c, tuple) else c for c in (a, b))
                assert torch.allclose(a, b, atol=1e-6)


class Caching(nn.Module):
    """As LeViT: derives a tensor from its weight at the first evaluation, and forgets it when training begins."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.randn(4)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return x * self.weight[[3, 2, 1, 0]]
        if x.device not in self.cache:
            self.cache[x.device] = self.weight[[3, 2, 1, 0]]
        return x * self.cache[x.device]


@torch.no_grad()
def test_what_modules_derive_from_their_weights(tmp_path):
    model, x = nn.Sequential(Caching(), nn.Linear(4, 4)).eval(), torch.ones(1, 4)
    plain = model(x)

    def truth(hsaid):
        return torch.func.functional_call(copy.deepcopy(hsaid).train().model, hsaid.weights(), (x,))

    hsaid = HSAID(model, 24, task="a")
    hsaid.add_task("b")
    for alter in (
        lambda: hsaid.theta.normal_(),
        lambda: hsaid.set_task("b"),
        lambda: hsaid.theta.normal_(),
        lambda: hsaid.set_task("a"),
        lambda: hsaid.load_state_dict(copy.deepcopy(hsaid.state_dict()) | {"theta": torch.ones(len(hsaid.theta))}),
    ):
        alter()
        assert torch.allclose(hsaid(x), truth(hsaid), atol=1e-6) and torch.allclose(
            hsaid.merge()(x), hsaid(x), atol=1e-6
        )
        assert not model.training and not model[0].training
    expected = hsaid(x)
    assert torch.allclose(hsaid.merge(inplace=True)(x), expected, atol=1e-6)
    hsaid.unmerge()
    assert torch.allclose(hsaid(x), expected, atol=1e-6)
    hsaid.save_pretrained(tmp_path)
    assert torch.equal(hsaid.unwrap()(x), plain)
    assert torch.allclose(HSAID.from_pretrained(tmp_path, model)(x), expected, atol=1e-6)


def test_masks_stay_while_the_model_is_wrapped():
    with torch.no_grad():  # or what prune stores could not be copied
        model = nn.Sequential(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.3))
    plain, x = copy.deepcopy(model), torch.ones(1, 8)
    hsaid = moved(HSAID(model, 40))
    assert (model[0].weight == 0).sum() == 19 and torch.equal(model[0].weight, hsaid.merge()[0].weight)
    with pytest.raises(RuntimeError, match=r"the mask of 'weight' to stay .* unwrap\(\) before prune.remove\(\)"):
        prune.remove(model[0], "weight")
    assert torch.equal(hsaid(x), hsaid.merge()(x)) and same(snapshot(model), snapshot(plain))
    prune.remove(hsaid.unwrap()[0], "weight")
    assert torch.equal(model(x), plain(x))


class Copying(nn.Linear):
    def __deepcopy__(self, memo):
        made = Copying(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


class Reducing(nn.Linear):
    def __reduce__(self):
        return nn.Linear, (self.in_features, self.out_features), self.__dict__


@pytest.mark.parametrize("kind", [Copying, Reducing])
def test_modules_with_copies_of_their_own(kind):
    hsaid, x = moved(HSAID(nn.Sequential(kind(4, 4)), 24)), torch.ones(1, 4)
    for copied in (hsaid, hsaid.model):
        with pytest.raises(RuntimeError, match=f"got a {kind.__name__} with copies of its own"):
            copy.deepcopy(copied)
    assert torch.equal(hsaid.merge()(x), hsaid(x)) and torch.equal(copy.deepcopy(hsaid.model[0])(x), hsaid(x))
    assert copy.deepcopy(hsaid.unwrap())(x).shape == (1, 4)
