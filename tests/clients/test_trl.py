"""TRL's SFTTrainer and DPOTrainer train an HSAID, whose forward they replace by one with a fused head."""

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
    arguments = trl.SFTConfig(**options(directory, **changes))
    data = dict(train_dataset=texts, eval_dataset=texts, processing_class=tokenizer())
    return trl.SFTTrainer(model, arguments, **data)


def dpo(model, directory: Path, **changes) -> "trl.DPOTrainer":
    pairs = {"prompt": ["a b", "b a"] * 16, "chosen": ["c d", "d c"] * 16, "rejected": ["e f", "f e"] * 16}
    arguments = trl.DPOConfig(**options(directory, **changes))
    data = dict(train_dataset=datasets.Dataset.from_dict(pairs), eval_dataset=datasets.Dataset.from_dict(pairs))
    reference = model.merge() if isinstance(model, HSAID) else llama()
    return trl.DPOTrainer(model, reference, arguments, processing_class=tokenizer(), **data)


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
