"""Reinforcement learning (GRPO) with a hundred trained values. Needs TRL: pip install trl "hsaid_kernels[peft]".

A small language model writes words, and is rewarded for each that names a number. What is special to HSAID is
`peft_config=HSAIDConfig(...)`; data, rewards, generation and loss are TRL's. Rewards tell a model much less than labels
do, and so need fewer values: TinyLoRA (arXiv 2602.04118) changes a large model's answers by training tens or hundreds.

    python examples/grpo.py                                     # 100 values; a minute and a half on two CPU cores
    python examples/grpo.py --intrinsic-dim 30 --partition did
    python examples/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct  # from the Hugging Face hub

The first one's reward goes from 0.26 to 0.99, and leaves an adapter of 2 KB.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from hsaid_kernels.peft import HSAIDConfig

NUMBERS = "one two three four five six seven eight nine ten".split()
OTHERS = "the a red green small large house tree river road sun moon day night bird fish cat dog hand foot".split()
OTHERS += "north south east west run walk sing write read think".split()
SPECIAL = ["<pad>", "<unk>"]


def reward(completions, **_):
    """The share of words that name a number."""
    texts = [text.lower().split() for text in completions]
    return [sum(word.strip(".,;:!?") in NUMBERS for word in words) / max(len(words), 1) for words in texts]


def small_model():
    """A language model with random weights, which writes every word equally often; and its tokenizer."""
    words = SPECIAL + NUMBERS + OTHERS
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    names = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)  # it ends when it has written enough
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **names))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")
    return model, fast


def main(argv=None):
    args = parse(argv)
    if args.model is None:
        model, tokenizer = small_model()
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    prompts = [f"the {word}" for word in OTHERS]
    settings = GRPOConfig(
        output_dir=args.out,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        logging_steps=args.log_every,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        bf16=torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=HSAIDConfig(intrinsic_dim=args.intrinsic_dim, partition=args.partition, seed=args.seed),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(args.out)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    size = Path(args.out, "adapter_model.safetensors").stat().st_size
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; {size:,} bytes in {args.out}")
    return rewards


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name or directory of a causal language model (default: a small one with random weights)")
    add("--intrinsic-dim", type=int, default=100, metavar="D", help="trained values in all (%(default)s)")
    add("--partition", default="L1+L2|L3|L4", help="hsaid-3, said, did or which levels share multipliers (%(default)s)")
    add("--lr", type=float, default=2e-4, help="in PEFT's units: see HSAIDConfig(lr_scale=) (%(default)s)")
    add("--steps", type=int, default=40, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the basis and of the generation (%(default)s)")
    add("--out", default="runs/grpo", metavar="DIR", help="(%(default)s)")
    add("--log-every", type=int, default=5, metavar="N", help="steps (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
