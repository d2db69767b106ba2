"""The tensors of the models that are measured, written out: no transformers needed where only kernels are."""

from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def _bert(
    prefix: str, vocabulary: int, positions: int, types: int, layers: int, hidden: int, inner: int, pooler: bool = True
) -> Shapes:
    """An encoder of the BERT family."""
    shapes: Shapes = {}

    def linear(name: str, rows: int, cols: int) -> None:
        shapes[f"{name}.weight"] = (rows, cols)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    for name, rows in (("word", vocabulary), ("position", positions), ("token_type", types)):
        shapes[f"{prefix}embeddings.{name}_embeddings.weight"] = (rows, hidden)
    norm(f"{prefix}embeddings.LayerNorm")
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    if pooler:
        linear(f"{prefix}pooler.dense", hidden, hidden)
    return shapes


def mbert() -> Shapes:
    """BertForSequenceClassification with mBERT's vocabulary and two labels: 201 tensors, 177,854,978 weights."""
    head = {"classifier.weight": (2, 768), "classifier.bias": (2,)}
    return _bert("bert.", 119547, 512, 2, 12, 768, 3072) | head


def minilm() -> Shapes:
    """BertModel of MiniLM-L6: 103 tensors, 22,713,216 weights."""
    return _bert("", 30522, 512, 2, 6, 384, 1536)


def xlm_roberta_base() -> Shapes:
    """XLMRobertaModel, base: 199 tensors, 278,043,648 weights."""
    return _bert("", 250002, 514, 1, 12, 768, 3072)


def llama(vocabulary: int, hidden: int, inner: int, kv: int, layers: int, tied: bool = False) -> Shapes:
    """LlamaForCausalLM. `kv`: hidden size of keys and values, that is heads for these times the size of a head."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (hidden, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, hidden))):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            shapes[f"{layer}.{name}_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, hidden)}


def llama_1b() -> Shapes:
    """Llama 3.2 1B, embeddings tied: 146 tensors, 1,235,814,400 weights."""
    return llama(128256, 2048, 8192, 512, 16, tied=True)


MODELS: dict[str, Callable[[], Shapes]] = {
    "MiniLM": minilm,
    "mBERT": mbert,
    "XLM-R base": xlm_roberta_base,
    "Llama 1B": llama_1b,
}


def matrices(weights: int) -> Shapes:
    """About so many weights, in matrices of 1,000 x 1,000."""
    return {f"matrix.{i}.weight": (1000, 1000) for i in range(weights // 10**6)}


def tensors(model: str) -> Shapes:
    """A model of MODELS, or "10^k weights" for `matrices`."""
    return MODELS[model]() if model in MODELS else matrices(10 ** int(model.removeprefix("10^").split()[0]))
