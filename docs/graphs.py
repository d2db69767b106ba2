"""Makes docs/graphs/*.svg: hierarchies of well-known models, in their real sizes but without weights.

python docs/graphs.py [FOLDER] [SUFFIX]
"""

import sys
from pathlib import Path

import torch
import transformers

from hsaid_kernels.hierarchy import Hierarchy

FOLDER = Path(__file__).parent / "graphs"
XLM_R = dict(vocab_size=250002, type_vocab_size=1, max_position_embeddings=514)
LLAMA = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
MODELS = {
    "mbert": ("BertForSequenceClassification", dict(vocab_size=119547)),
    "xlm-r": ("XLMRobertaForSequenceClassification", XLM_R),
    "t5": ("T5ForSequenceClassification", {}),  # the defaults are those of t5-small
    "llama": ("LlamaForSequenceClassification", LLAMA),
}


def main(folder: Path = FOLDER, suffix: str = "svg") -> None:
    for name, (model_class, config) in MODELS.items():
        model_class = getattr(transformers, model_class)
        with torch.device("meta"):
            model = model_class(model_class.config_class(**config))
        Hierarchy.from_model(model).draw(Path(folder, f"{name}.{suffix}"), "L1+L2|L3|L4")
        if name == "mbert":
            Hierarchy.from_model(model, heads=True).draw(Path(folder, f"heads.{suffix}"), "L1+L5|L3|L4")


if __name__ == "__main__":
    main(*sys.argv[1:])
