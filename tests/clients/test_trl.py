"""TRL's trainers train an HSAID, and an adapter by peft_config=. They replace `forward` by one with a fused head."""

import copy
import warnings
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers
from models import SPECIAL, relative, same, snapshot

from hsaid_kernels import HSAID

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
from hsaid_kernels.peft import HSAIDConfig  # noqa: E402

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop")
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.arange(4, 20).repeat(2, 1)
ROUNDINGS = 100 * 2.0**-24  # of float32: sums of some hundred terms in another order


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=2000, max_position_embeddings=32, **SIZES, **SPECIAL)
    return transformers.LlamaForCausalLM(config)


def wrapped(memory: str = "block") -> HSAID:
    hsaid = HSAID(llama(), 200, memory=memory)
    with torch.no_grad():
        hsaid.theta.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return hsaid


def options(directory: Path, **changes) -> dict:
    """Evaluates, saves, clips, logs, and loads the best. Activations are recomputed, as is TRL's default."""
    settings = dict(eval_strategy="steps", eval_steps=4, save_steps=4, logging_steps=1, load_best_model_at_end=True)
    settings |= dict(max_steps=12, per_device_train_batch_size=8, learning_rate=0.2, max_grad_norm=1.0, use_cpu=True)
    return dict(output_dir=str(directory), report_to=[], disable_tqdm=True) | settings | changes


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def sft(model, directory: Path, **changes) -> "trl.SFTTrainer":
    texts = datasets.Dataset.from_dict({"text": ["a b c d e f", "d e f a b c"] * 16})
    data = dict(train_dataset=texts, eval_dataset=texts)
    return started(trl.SFTTrainer, trl.SFTConfig, model, directory, data, **changes)


def dpo(model, directory: Path, reference: bool = True, **changes) -> "trl.DPOTrainer":
    pairs = {"prompt": ["a b", "b a"] * 16, "chosen": ["c d", "d c"] * 16, "rejected": ["e f", "f e"] * 16}
    data = dict(train_dataset=datasets.Dataset.from_dict(pairs), eval_dataset=datasets.Dataset.from_dict(pairs))
    if reference and "peft_config" not in changes:
        data["ref_model"] = model.merge() if isinstance(model, HSAID) else llama()
    return started(trl.DPOTrainer, trl.DPOConfig, model, directory, data, **changes)


def reward(model, directory: Path, **changes) -> "trl.RewardTrainer":
    pairs = {"chosen": ["a b c d", "b a d c"] * 16, "rejected": ["a b e f", "b a f e"] * 16}
    data = dict(train_dataset=datasets.Dataset.from_dict(pairs), eval_dataset=datasets.Dataset.from_dict(pairs))
    return started(trl.RewardTrainer, trl.RewardConfig, model, directory, data, **changes)


def grpo(model, directory: Path, **changes) -> "trl.GRPOTrainer":
    data = dict(train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "b a", "c d", "d c"] * 8}))
    data["reward_funcs"] = lambda completion_ids, **_: [sum(id < 1000 for id in ids) / 8 for ids in completion_ids]
    settings = dict(num_generations=4, max_completion_length=8, eval_strategy="no", load_best_model_at_end=False)
    return started(trl.GRPOTrainer, trl.GRPOConfig, model, directory, data, **settings | changes)


def started(trainer, config, model, directory: Path, data: dict, peft_config=None, **changes):
    arguments = config(**options(directory, **changes))
    return trainer(model, args=arguments, processing_class=tokenizer(), peft_config=peft_config, **data)


TRAINERS = {"sft": sft, "dpo": dpo}


@pytest.fixture
def said():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def of_ours(said) -> list[str]:
    return [str(one.message) for one in said if str(one.message).startswith("hsaid.model:")]


@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trains(kind, memory, tmp_path, said):
    hsaid = wrapped(memory)
    before, theta = snapshot(hsaid.model), hsaid.theta.detach().clone()
    run = TRAINERS[kind](hsaid, tmp_path)
    run.train()
    run.evaluate(), run.save_model()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0] and (hsaid.theta != theta).all()
    assert not of_ours(said)
    assert same(snapshot(hsaid.model), before)
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 10_000
    loaded = HSAID.from_pretrained(tmp_path, llama())
    assert same(loaded.merge().state_dict(), hsaid.merge().state_dict())


@pytest.mark.parametrize("kind", TRAINERS)
def test_hsaid_model_in_its_place(kind, tmp_path, said):
    hsaid = wrapped()
    theta = hsaid.theta.detach().clone()
    TRAINERS[kind](hsaid.model, tmp_path).train()
    (message,) = of_ours(said)
    assert "hand over the HSAID itself" in message and torch.equal(hsaid.theta, theta)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_fused_head_runs_inside_of_a_call(recomputes, tmp_path):
    """Of weights nothing is kept for backward with memory="block", and the gradient is that of the model's own head."""
    batch = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS.masked_fill(IDS == 9, -100))
    found = {}
    for fused in (False, True):
        hsaid, inside, kept = wrapped(), [], []
        if fused:
            sft(hsaid, tmp_path)
        (hsaid.activation_checkpointing_enable if recomputes else hsaid.activation_checkpointing_disable)()
        hsaid.model.model.register_forward_hook(
            lambda *_, to=inside, of=hsaid: to.append(of._source._thread.call is not None)
        )

        def keep(tensor: torch.Tensor, to=kept) -> torch.Tensor:
            to.append(tensor.untyped_storage())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = hsaid.train()(**batch, **dict(fused_lm_head=True) if fused else {}).loss
        loss.backward()
        assert inside == [True]
        found[fused] = loss.item(), hsaid.theta.grad, sum({s.data_ptr(): s.nbytes() for s in kept}.values())
    (loss, gradient, kept), (fused_loss, fused_gradient, fused_kept) = found[False], found[True]
    assert fused_loss == pytest.approx(loss, rel=ROUNDINGS) and relative(fused_gradient, gradient) <= ROUNDINGS
    assert 0 < fused_kept < kept < 4 * sum(piece.numel for piece in hsaid.plan.pieces) / 2


def test_a_copy_runs_itself_by_the_fused_head(tmp_path):
    hsaid = wrapped()
    sft(hsaid, tmp_path)
    copied = copy.deepcopy(hsaid)
    batch = dict(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        copied.theta.fill_(1.0)
        losses = [model(**batch, fused_lm_head=True).loss.item() for model in (copied, hsaid)]
        assert losses == pytest.approx([model.merge()(**batch).loss.item() for model in (copied, hsaid)], rel=ROUNDINGS)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_over_a_model_in_four_bits_as_over_the_float_model(tmp_path):
    layers = pytest.importorskip("bitsandbytes").nn
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            made = layers.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            made.load_state_dict(module.state_dict())
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, made.to("cpu"))
    model.is_quantized = True  # as transformers notes it
    few = HSAID(model, 200, memory="block")
    many = HSAID(few.merge(), 200, memory="block")
    found = []
    for hsaid in (few, many):
        trainer = sft(hsaid, tmp_path, max_steps=6)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1] and found[0][-1] < found[0][0]
    assert torch.equal(few.theta, many.theta)


# --- all four, step by step as a plain loop


def judge() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=2000, max_position_embeddings=32, num_labels=1, **SIZES, **SPECIAL)
    return transformers.LlamaForSequenceClassification(config)


def log_probs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each token but the first one, given those before it."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def sft_loss(model, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss


def dpo_loss(model, batch: dict, beta: float = 0.1) -> torch.Tensor:
    ids, mask, counted = batch["input_ids"], batch["attention_mask"], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        reference = (log_probs(llama(), ids, mask) * counted).sum(1)
    chosen, rejected = ((log_probs(model, ids, mask) * counted).sum(1) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def reward_loss(model, batch: dict) -> torch.Tensor:
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = scores.chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def grpo_loss(model, batch: dict, beta: float = 0.0) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    counted = batch["completion_mask"]
    own = log_probs(model, ids, mask)[:, -counted.shape[1] :]
    loss = -(own - own.detach()).exp() * batch["advantages"][:, None]
    if beta:
        with torch.no_grad():
            expected = log_probs(llama(), ids, mask)[:, -counted.shape[1] :]
        reference = batch["ref_per_token_logps"]
        assert apart(reference, expected) <= ROUNDINGS * expected.norm()
        loss = loss + beta * ((reference - own).exp() - (reference - own) - 1)
    return (loss * counted).sum() / batch["num_items_in_batch"]


def apart(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one - two).norm()


# The last is the difference that is allowed, relative to all values. The gradient of the divergence from a reference,
# which is almost where the model is, is a difference of almost equal numbers, and it is all where no reward differs.
KINDS = {
    "sft": (sft, llama, sft_loss, {}, 1e-5),
    "dpo": (dpo, llama, dpo_loss, {}, 1e-5),
    "reward": (reward, judge, reward_loss, {}, 1e-5),
    "grpo": (grpo, llama, grpo_loss, {}, 1e-5),
    "grpo with a reference": (grpo, llama, lambda *args: grpo_loss(*args, beta=0.1), {"beta": 0.1}, 1e-3),
}
ADAPTER = dict(intrinsic_dim=200, memory="block")


# For an HSAID, GRPO's reference would be a second model, by the name of the first one, which these do not have.
WAYS = [(way, kind) for way in ("HSAID", "peft_config") for kind in KINDS if way == "peft_config" or not KINDS[kind][3]]


@pytest.mark.parametrize("way, kind", WAYS)
def test_each_step_is_that_of_a_plain_loop(way, kind, tmp_path):
    begin, plain, loss_of, changes, allowed = KINDS[kind]
    rate = 2e-4 if way == "peft_config" else 0.1
    changes = changes | dict(
        learning_rate=rate, lr_scheduler_type="constant", max_steps=6, optim="adamw_torch", bf16=False
    )
    if way == "peft_config":
        changes["peft_config"] = HSAIDConfig(**ADAPTER)
    run = begin(plain() if way == "peft_config" else HSAID(plain(), **ADAPTER), tmp_path, **changes)
    steps, compute_loss = [], run.compute_loss  # (batch, loss, what is trained before the step)

    def recorded(model, inputs, *args, **kwargs):
        batch = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        found = compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            steps.append((batch, loss.item(), [p.detach().clone() for p in model.parameters() if p.requires_grad]))
        return found

    run.compute_loss = recorded
    run.train()
    if way == "peft_config":
        model = peft.get_peft_model(
            plain(), HSAIDConfig(**ADAPTER, task_type=run.model.peft_config["default"].task_type)
        )
    else:
        model = HSAID(plain(), **ADAPTER)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for number, (batch, found, before) in enumerate(steps):
        assert all(apart(one, two) <= allowed * two.norm() for one, two in zip(before, trained, strict=True)), number
        loss = loss_of(model, batch)
        assert found == pytest.approx(loss.item(), rel=allowed, abs=1e-6), number
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(steps) == 6 and all(apart(one, two) > 1e-4 for one, two in zip(steps[-1][2], steps[0][2], strict=True))
    assert max(path.stat().st_size for path in tmp_path.rglob("*model.safetensors")) < 20_000


def test_the_reference_is_the_plain_model_to_the_bit(tmp_path):
    """Without a second model: TRL disables the adapter for it."""
    run = dpo(llama(), tmp_path, learning_rate=2e-4, peft_config=HSAIDConfig(**ADAPTER), bf16=False)
    run.train()
    assert run.ref_model is None
    batch = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    with torch.no_grad():
        expected, tuned = llama()(**batch).logits, run.model(**batch).logits
        with run.model.disable_adapter():
            assert torch.equal(run.model(**batch).logits, expected)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    margins = [entry["rewards/margins"] for entry in run.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.1


def test_the_reference_of_a_trained_adapter_is_a_copy_of_it(tmp_path):
    model = peft.get_peft_model(llama(), HSAIDConfig(**ADAPTER, task_type="CAUSAL_LM"))
    adapters = model.base_model.model.hsaid.hsaid_adapters
    with torch.no_grad():
        adapters["default"].theta.normal_(0, 1e-3, generator=torch.Generator().manual_seed(1))
    before = snapshot(adapters["default"])
    with torch.no_grad():
        expected = model(IDS).logits
    run = dpo(model, tmp_path, learning_rate=2e-4, peft_config=None, bf16=False, reference=False, max_steps=3)
    run.train()
    assert run.ref_model is None and same(snapshot(adapters["ref"]), before)
    assert (adapters["default"].theta != before["theta"]).all() and model.active_adapter == "default"
    model.set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_new_tokens_of_a_chat_template_are_refused(tmp_path):
    """For which TRL sets `trainable_token_indices` in the configuration."""
    config = HSAIDConfig(**ADAPTER)
    assert config.trainable_token_indices is None
    config.trainable_token_indices = {"embed_tokens": [5]}
    with pytest.raises(ValueError, match="trainable_token_indices: expected None, because all rows of an embedding"):
        sft(llama(), tmp_path, peft_config=config)


def test_an_hsaid_with_a_peft_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a plain module, got one that is or holds an HSAID"):
        sft(wrapped(), tmp_path, peft_config=HSAIDConfig(**ADAPTER))
