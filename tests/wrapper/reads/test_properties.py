"""A model on its projected weights behaves as the plain model does, and has W0 back afterwards."""

import copy
import inspect
import threading
import time

import pytest
import torch
from models import BACKENDS, IDS, bert, mlp, moved, reads, same, snapshot, tied_models
from torch import nn

from hsaid_kernels.wrapper.hsaid import HSAID


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("kind", tied_models())
def test_tied_and_shared_weights_stay_so(kind, backend):
    model = tied_models()[kind]().eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hsaid = moved(HSAID(model, 80, backend=backend))
    ties = {}  # parameter -> all the names it has
    for name, parameter in parameters.items():
        ties.setdefault(parameter, []).append(name)
    seen = {}
    model.register_forward_hook(lambda module, *_: seen.update(reads(module)))
    batch = dict(input_ids=IDS, labels=IDS)
    loss = hsaid(**batch).loss
    assert any(len(names) > 1 for names in ties.values()) and seen.keys() == parameters.keys()
    for names in ties.values():
        assert len({id(seen[name]) for name in names}) == 1
        assert not torch.equal(seen[names[0]], parameters[names[0]])
    assert torch.equal(loss, hsaid.merge()(**batch).loss)
    loss.backward()
    assert hsaid.theta.grad.any()
    assert all(p is parameters[n] for n, p in model.named_parameters(remove_duplicate=False))


def test_arguments_and_outputs_are_the_models(backend):
    model = bert().eval()
    hsaid = HSAID(model, 60, backend=backend)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = model(IDS, mask)
    assert torch.equal(hsaid(IDS, mask).logits, expected.logits)
    out = hsaid(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
    assert type(out) is type(expected) and torch.equal(out["logits"], expected["logits"])
    assert len(out.hidden_states) == 2
    out = hsaid(IDS, attention_mask=mask, return_dict=False)
    assert type(out) is tuple and torch.equal(out[0], expected.logits)
    with pytest.raises(TypeError, match="unexpected keyword"):
        HSAID(mlp(), 20, backend=backend)(nonsense=1)


def test_train_and_eval_reach_dropout(backend):
    model = bert(hidden_dropout_prob=0.5).eval()
    hsaid = HSAID(model, 60, backend=backend)
    assert not hsaid.training
    assert torch.equal(hsaid(IDS).logits, hsaid(IDS).logits)
    assert hsaid.train() is hsaid and hsaid.training and all(module.training for module in model.modules())
    assert not torch.equal(hsaid(IDS).logits, hsaid(IDS).logits)
    assert hsaid.eval() is hsaid and not any(module.training for module in model.modules())


def test_buffers_are_the_models_own(backend):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    plain, hsaid = copy.deepcopy(model), HSAID(model, 24, backend=backend)
    x = torch.randn(4, 2, 5, 5)
    assert torch.equal(hsaid(x), plain(x))
    assert same(model.state_dict(), plain.state_dict()) and model[1].num_batches_tracked == 1


def test_rnn_runs_on_the_projected_weights_and_lets_them_go(backend):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5)

        def forward(self, x):
            return self.rnn(x)[0]

    model, x = Tagger(), torch.randn(3, 2, 4)
    plain = copy.deepcopy(model)
    hsaid = moved(HSAID(model, 24, backend=backend))
    out = hsaid(x)
    assert torch.equal(out, hsaid.merge()(x)) and not torch.equal(out, plain(x))
    out.sum().backward()
    gradient = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    model(x).sum().backward()  # by itself, too
    assert gradient.any() and torch.equal(hsaid.theta.grad, gradient)
    hsaid.unwrap()
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert torch.equal(model(x), plain(x))


def test_channels_last_and_non_contiguous_weights(backend):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    model[2].weight = nn.Parameter(torch.randn(27, 2).t())
    expected = moved(HSAID(copy.deepcopy(model), 24, backend=backend))
    hsaid = HSAID(model.to(memory_format=torch.channels_last), 24, backend=backend)
    hsaid.load_state_dict(expected.state_dict())
    x = torch.randn(4, 2, 5, 5)
    assert same(hsaid.weights(), expected.weights()) and torch.allclose(hsaid(x), expected(x))
    hsaid(x).sum().backward()
    assert hsaid.theta.grad.any()


def test_an_error_in_the_model_puts_w0_back():
    model = mlp()
    hsaid = moved(HSAID(model, 24, backend="reference"))
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="shapes"):
        hsaid(torch.randn(5, 7))
    assert all(p is before[name] for name, p in model.named_parameters())
    assert torch.equal(hsaid(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_other_attributes_are_the_models():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.note = nn.Linear(4, 2), "kept"

        def encode(self, x):
            """Encodes."""
            return self.layer(x)

        def forward(self, x):
            return self.encode(x)

        def __len__(self):
            return 7

    model, x = Encoder(), torch.randn(3, 4)
    hsaid = moved(HSAID(model, 20, backend="reference"))
    assert hsaid.note == "kept" and hsaid.layer is model.layer and hsaid.model is model
    assert torch.equal(hsaid.encode(x), hsaid(x)) and torch.equal(model.encode(x), hsaid(x))
    assert hsaid.encode.__doc__ == "Encodes." and inspect.signature(hsaid.encode) == inspect.signature(model.encode)
    assert not hasattr(hsaid, "__len__")
    with pytest.raises(AttributeError, match="'Encoder' object has no attribute 'nothing'"):
        _ = hsaid.nothing


def test_transformers_interface():
    model = bert()
    hsaid = HSAID(model, 60, backend="reference")
    assert hsaid.config is model.config and hsaid.device == model.device and hsaid.dtype == torch.float32
    assert hsaid.get_input_embeddings() is model.bert.embeddings.word_embeddings
    assert hsaid.num_parameters() == sum(p.numel() for p in model.parameters())


def test_generate_uses_the_projected_weights(backend):
    hsaid = moved(HSAID(tied_models()["gpt2"]().eval(), 80, backend=backend))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    made = hsaid.generate(IDS, **options)
    assert torch.equal(made, hsaid.merge().generate(IDS, **options))
    assert torch.equal(made, hsaid.model.generate(IDS, **options))
    with hsaid.unwrapped() as plain:
        assert not torch.equal(made, plain.generate(IDS, **options))
    assert torch.equal(made, hsaid.generate(IDS, **options))


def test_calling_back_from_within_the_model(backend):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def twice(self, call, x):
            return call(call(x))

        def forward(self, x):
            return self.layer(x)

    hsaid = moved(HSAID(Outer(), 20, backend=backend))
    x = torch.randn(2, 4)
    assert torch.equal(hsaid.twice(hsaid, x), hsaid(hsaid(x)))


def test_threads_do_not_meet():
    model = mlp()
    hsaid = moved(HSAID(model, 24, backend="reference"))
    before, x = snapshot(model), torch.randn(64, 4)
    with torch.no_grad():
        expected = hsaid(x)
    wrong = []

    def run(seed: int) -> None:
        with torch.no_grad():
            for i in range(4):
                hsaid.train(bool((i + seed) % 2))  # drops the cache
                wrong.extend([] if torch.equal(hsaid(x), expected) else [i])

    model[0].register_forward_pre_hook(lambda *_: time.sleep(0.005))  # in which the others could come in

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and same(model.state_dict(), before)
