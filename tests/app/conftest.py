"""A model and data so small that the commands of `hsaid` take a second."""

import itertools

import pytest
import torch
from words import ANIMALS, FRUIT, WORDS


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A directory with a BERT of two layers and random weights, its vocabulary, and two files of data."""
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("files")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FRUIT, *ANIMALS]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Larger weights and less dropout than BERT's, so that so small a model learns; some dropout, so that seeds matter.
    random = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes, **random)
    BertModel(config).save_pretrained(directory / "model")
    (directory / "model" / "vocab.txt").write_text("\n".join(vocabulary))
    (directory / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    rows = [
        f"{first} {second},{label}\n" for label in WORDS for first, second in itertools.permutations(WORDS[label], 2)
    ]
    for name, chosen in (("train", rows[::2]), ("test", rows[1::2])):
        (directory / f"{name}.csv").write_text("text,label\n" + "".join(chosen))
    return directory
