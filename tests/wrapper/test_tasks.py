"""What is trained: parts of the model fully, several tasks on one W0, groups for an optimizer; merging in place."""

import copy
import filecmp
import warnings

import pytest
import torch
from models import IDS, bert, mlp, moved, normed, same, snapshot
from torch import nn

from hsaid_kernels import HSAID

LABELS = torch.tensor([0, 1])


def train(hsaid: HSAID, steps: int = 3, **groups) -> list[float]:
    optimizer = torch.optim.AdamW(hsaid.parameter_groups(**groups), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = hsaid(IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- trained fully


def test_tensors_are_trained_fully():
    model = bert().eval()
    before = snapshot(model)
    hsaid = HSAID(model, 60, train_fully="classifier")
    assert list(hsaid.full) == ["classifier.weight", "classifier.bias"] and "classifier.weight" not in hsaid.plan.names
    assert [name for name, _ in hsaid.named_parameters()][2:] == ["full/classifier/weight", "full/classifier/bias"]
    assert torch.equal(hsaid.full["classifier.weight"], model.classifier.weight)
    plain = copy.deepcopy(model)
    losses = train(hsaid)
    assert losses[-1] < losses[0] and same(model.state_dict(), before)

    # the gradients of the head are those of the model on the same weights
    merged = hsaid.merge()
    assert torch.equal(merged.classifier.weight, hsaid.full["classifier.weight"])
    assert not torch.equal(merged.classifier.weight, plain.classifier.weight)
    hsaid.zero_grad()
    for module in (hsaid, merged):
        module(IDS, labels=LABELS).loss.backward()
    assert torch.equal(hsaid.full["classifier.bias"].grad, merged.classifier.bias.grad)
    assert torch.equal(hsaid(IDS).logits, merged(IDS).logits)


def test_checkpoints_have_what_is_trained_fully(tmp_path):
    hsaid = HSAID(bert().eval(), 60, train_fully=["classifier", "pooler.*bias"])
    train(hsaid)
    hsaid.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8000
    other = HSAID.from_pretrained(tmp_path, copy.deepcopy(hsaid.model))
    assert same(dict(other.named_parameters()), dict(hsaid.named_parameters()))
    assert torch.equal(other(IDS).logits, hsaid(IDS).logits)
    with pytest.raises(ValueError, match=r"'classifier.weight' has shape \(3, 16\) in place of \(2, 16\)"):
        HSAID.from_pretrained(tmp_path, bert(num_labels=3))


def test_what_is_trained_fully_follows_the_models_dtype():
    hsaid = HSAID(bert(), 60, train_fully="classifier").to(torch.bfloat16)
    assert {p.dtype for p in hsaid.full.values()} == {torch.bfloat16} and hsaid.theta.dtype == torch.float32
    hsaid(IDS, labels=LABELS).loss.backward()
    hsaid.to(torch.float32)
    assert hsaid.theta.grad.dtype == hsaid.full["classifier.bias"].grad.dtype == torch.float32


def test_the_rest_is_frozen():
    hsaid = HSAID(mlp(), 24, include="0.weight", train_fully="0.bias")
    hsaid(torch.randn(5, 4)).sum().backward()
    seen = {name: getattr(hsaid.model[int(name[0])], name[2:]) for name, _ in hsaid.model.named_parameters()}
    assert {name for name, tensor in seen.items() if tensor.requires_grad} == {"0.weight", "0.bias"}
    assert all(p.grad is not None for p in hsaid.parameters()) and all(p.grad is None for p in hsaid.model.parameters())


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(train_fully="nothing"), "train_fully: 'nothing' matches none of the 25 tensors"),
        (dict(train_fully="["), r"train_fully: expected a regular expression, got '\['"),
        (dict(train_fully="."), "expected them to leave a tensor to project, got None, None, '.'"),
        (dict(include="classifier", train_fully="classifier"), "leave a tensor to project"),
    ],
)
def test_bad_choices(options, reason):
    with pytest.raises(ValueError, match=reason):
        HSAID(bert(), 60, **options)


# --- groups for an optimizer


def test_parameter_groups():
    hsaid = HSAID(bert(), 60, train_fully="classifier")
    groups = hsaid.parameter_groups(lr_theta=0.1, lr_multipliers=0.01, weight_decay=0.5)
    own = dict(hsaid.named_parameters())
    assert [group["name"] for group in groups] == ["theta", "multipliers", "full"]
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(own["theta"])],
        [id(own["multipliers"])],
        [id(own["full/classifier/weight"]), id(own["full/classifier/bias"])],
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.5),
        (0.01, 0.0),
        (0.005, 0.5),
    ]
    left = hsaid.parameter_groups(lr_theta=None, lr_multipliers=None, lr_full=None)
    assert {group["lr"] for group in torch.optim.AdamW(left, lr=1e-3).param_groups} == {1e-3}
    with pytest.raises(ValueError, match="lr_full: expected a number, 'auto' or None, got 'fast'"):
        hsaid.parameter_groups(lr_full="fast")
    assert [group["name"] for group in HSAID(bert(), 60, "did").parameter_groups()] == ["theta"]
    with pytest.raises(ValueError, match="task: expected one of 'default', got 'other'"):
        hsaid.parameter_groups(task="other")


@pytest.mark.parametrize("normalize", ["global", "tensor"])
def test_its_own_rates_learn(normalize):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)),
        torch.randn(64, 8),
    )
    labels = (x[:, 0] > 0).long()
    losses = {}
    for rates in ({}, dict(lr_theta=2e-5, lr_multipliers=2e-5)):  # those of full fine-tuning learn nothing
        with HSAID(model, 200, normalize=normalize) as hsaid:
            optimizer = torch.optim.AdamW(hsaid.parameter_groups(**rates))
            for _ in range(60):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(hsaid(x), labels)
                loss.backward()
                optimizer.step()
        losses[len(rates)] = loss.item()
    assert losses[0] < 0.3 and losses[2] > 0.6


# --- tasks


def test_tasks_share_w0_and_nothing_else(tmp_path):
    model = bert().eval()
    before = snapshot(model)
    hsaid = HSAID(model, 60, train_fully="classifier", task="a")
    train(hsaid)
    first, a = hsaid(IDS).logits, snapshot(hsaid)
    hsaid.add_task("b")
    assert hsaid.tasks == ("a", "b") and hsaid.task == "a" and torch.equal(hsaid(IDS).logits, first)
    hsaid.set_task("b")
    assert not hsaid.theta.any() and (hsaid.multipliers == 1).all()
    assert torch.equal(hsaid.full["classifier.bias"], model.classifier.bias)
    with torch.no_grad():
        assert torch.equal(hsaid(IDS).logits, model(IDS).logits)
    train(hsaid, 2)
    with torch.no_grad():
        second = hsaid(IDS).logits
        hsaid.set_task("a")
        assert torch.equal(hsaid(IDS).logits, first) and not torch.equal(first, second)
    assert same(
        {k: v for k, v in hsaid.state_dict().items() if k != "_extra_state"},
        {k: v for k, v in a.items() if k != "_extra_state"},
    )
    for task in hsaid.tasks:
        hsaid.set_task(task)
        hsaid.save_pretrained(tmp_path / task)
        assert sum(path.stat().st_size for path in (tmp_path / task).iterdir()) < 8000
    assert same(model.state_dict(), before)

    other = HSAID.from_pretrained(tmp_path / "b", copy.deepcopy(model))
    assert other.task == "b" and other.load_task(tmp_path / "a") == other.task == "a" and other.tasks == ("b", "a")
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, first)
        other.set_task("b")
        assert torch.equal(other(IDS).logits, second)


def test_a_task_is_removed():
    hsaid = moved(HSAID(bert(), 60))
    hsaid.add_task("other")
    with pytest.raises(ValueError, match="name: expected a task that is not set, got 'default': set_task"):
        hsaid.remove_task("default")
    with pytest.raises(ValueError, match="task: expected one of 'default', 'other', got 'third'"):
        hsaid.remove_task("third")
    hsaid.remove_task("other")
    assert hsaid.tasks == ("default",) and hsaid.theta.any()
    hsaid.add_task("other")
    hsaid.set_task("other")
    assert not hsaid.theta.any()
    hsaid.remove_task("default")
    assert hsaid.tasks == ("other",)


def test_a_task_that_is_removed_leaves_no_statistics():
    hsaid = HSAID(normed(), 40)
    hsaid.add_task("other")
    hsaid.set_task("other")
    hsaid.train()(torch.randn(4, 8))
    assert hsaid.buffers_changed()
    hsaid.set_task("default")
    hsaid.remove_task("other")
    hsaid.add_task("other")
    hsaid.set_task("other")
    assert not hsaid.buffers_changed()


def test_a_state_dict_of_another_task_is_refused():
    hsaid = moved(HSAID(mlp(), 24))
    hsaid.add_task("other")
    with hsaid.use_task("other"):
        state = copy.deepcopy(hsaid.state_dict())
    with pytest.raises(RuntimeError, match="state_dict: expected task 'default', which is set, got 'other'"):
        hsaid.load_state_dict(state)
    assert hsaid.theta.any()


def test_an_optimizer_stays_with_its_task():
    hsaid = HSAID(bert().eval(), 60, task="a")
    hsaid.add_task("b")
    optimizers = {
        task: torch.optim.SGD(hsaid.parameter_groups(lr_theta=0.1, lr_multipliers=0.1, task=task))
        for task in hsaid.tasks
    }
    theta = {}
    for step in range(4):
        task = "ab"[step % 2]
        hsaid.set_task(task)
        hsaid(IDS, labels=LABELS if task == "a" else 1 - LABELS).loss.backward()
        optimizers[task].step()
        optimizers[task].zero_grad()
        theta[task] = hsaid.theta
    alone = HSAID(copy.deepcopy(hsaid.model), 60)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        alone(IDS, labels=LABELS).loss.backward()
        optimizer.step()
    assert torch.equal(theta["a"], alone.theta) and not torch.equal(theta["b"], alone.theta) and theta["b"].any()


def test_every_task_moves_and_is_copied():
    hsaid = HSAID(bert(), 60, train_fully="classifier", task="a")
    hsaid.add_task("b")
    hsaid.to(torch.bfloat16)
    hsaid.set_task("b")
    assert hsaid.full["classifier.bias"].dtype == torch.bfloat16 and hsaid.theta.dtype == torch.float32
    moved(hsaid)
    other = copy.deepcopy(hsaid)
    assert other.tasks == hsaid.tasks and other.task == "b" and torch.equal(other.theta, hsaid.theta)
    other.set_task("a")
    assert not other.theta.any() and hsaid.theta.any()


def test_bad_tasks(tmp_path):
    hsaid = HSAID(bert(), 60, task="a")
    hsaid.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="name: expected a new task, got 'a', which is there already"):
        hsaid.add_task("a")
    with pytest.raises(ValueError, match="task: expected one of 'a', got 'b'"):
        hsaid.set_task("b")
    for bad in ("", 3, []):
        for call in (hsaid.add_task, hsaid.set_task):
            with pytest.raises(TypeError, match="task: expected a name"):
                call(bad)
    with pytest.raises(ValueError, match="got 'a', which is there already"):
        hsaid.load_task(tmp_path / "a")
    HSAID(copy.deepcopy(hsaid.model), 60, seed=1, task="b").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="directory: expected seed 0, as in this HSAID, got 1"):
        hsaid.load_task(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        hsaid.load_task(tmp_path / "c")
    assert hsaid.tasks == ("a",)


def test_a_task_of_another_w0_is_loaded_with_a_warning(tmp_path):
    HSAID(mlp(), 24, task="other").save_pretrained(tmp_path)
    hsaid = HSAID(mlp(), 24)
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        hsaid.load_task(tmp_path)


# --- merging in place


def test_merge_in_place_and_back():
    model = bert().eval()
    model.classifier.requires_grad_(False)
    before, objects = snapshot(model), dict(model.named_parameters())
    hsaid = moved(HSAID(model, 60, train_fully="classifier"))
    with torch.no_grad():
        expected = hsaid(IDS).logits
    assert not hsaid.merged and hsaid.merge(inplace=True) is model and hsaid.merged
    assert torch.equal(model(IDS).logits, expected) and torch.equal(hsaid(IDS).logits, expected)
    assert not same(model.state_dict(), before)
    assert all(p is objects[n] and type(p) is nn.Parameter for n, p in model.named_parameters())
    assert not model.classifier.weight.requires_grad and same(hsaid.w0(), {n: before[n] for n in hsaid.plan.names})
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert hsaid.full["classifier.weight"].any()
    hsaid.unmerge()
    assert not hsaid.merged and same(model.state_dict(), before) and torch.equal(hsaid(IDS).logits, expected)


def test_merged_weights_may_be_of_another_dtype():
    model = mlp()
    before = snapshot(model)
    hsaid = moved(HSAID(model, 24, dtype=torch.bfloat16))
    hsaid.merge(inplace=True)
    assert model(torch.randn(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    hsaid.unmerge()
    assert same(model.state_dict(), before)


def test_a_merged_model_is_saved_but_not_changed(tmp_path):
    hsaid = moved(HSAID(bert().eval(), 60))
    hsaid.save_pretrained(tmp_path / "before")
    state = hsaid.state_dict()
    hsaid.merge(inplace=True)
    hsaid.save_pretrained(tmp_path / "merged")
    assert filecmp.cmp(tmp_path / "before" / "hsaid_config.json", tmp_path / "merged" / "hsaid_config.json", False)
    with torch.no_grad():
        hsaid(IDS)
    assert not hsaid(IDS).logits.requires_grad  # nothing that an optimizer would train unseen
    embedded = torch.randn(2, 4, 16, requires_grad=True)
    hsaid(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.any() and all(p.grad is None for p in hsaid.model.parameters())
    with pytest.raises(RuntimeError, match="training: expected a model on its W0"):
        torch.compile(hsaid.train(), backend="aot_eager")(IDS)
    hsaid.eval()
    calls = {
        "training": lambda: hsaid.train()(IDS),
        r"merge\(\)": hsaid.merge,
        r"add_task\(\)": lambda: hsaid.add_task("b"),
        r"set_task\(\)": lambda: hsaid.set_task(hsaid.task),
        r"to\(\)": lambda: hsaid.to(torch.bfloat16),
        r"load_state_dict\(\)": lambda: hsaid.load_state_dict(state),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name}: expected a model on its W0.* unmerge\(\)"):
            call()
    other = copy.deepcopy(hsaid)
    for one in (hsaid, other):
        one.unmerge()
        with pytest.raises(RuntimeError, match=r"unmerge\(\): expected weights that merge\(inplace=True\) has merged"):
            one.unmerge()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.load_state_dict(state)
