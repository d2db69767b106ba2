"""How attention modules arrange their heads, as data: a row for each layout. `attention.py` reads the rows.

The *order* of a layer says which of its outputs belong to which head:

    "q", "k", "v"   those of the first head, then those of the second, ...: a band of the size of a head for each
    "q k v"         all queries, then all keys, then all values
    "(q k v)"       for each group of heads: its queries, its key, its value
    "4(q v k)"      four parts, each with the queries, values and keys of a quarter of the heads
    "q*"            a band for each head, of equal size, whatever this is: query and gate, or [nope, rope]

A path leads from the attention module to a layer, or to a parameter of its own: "q_proj", "experts.input_linear",
"../output.dense" in the module that holds it. A "?" at the end means that the layer may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The layer whose inputs are the results of all heads. OUTPUT[1]: the names that version 1 knew.
OUTPUT: dict[int, tuple[str, ...]] = {}
OUTPUT[1] = ("o_proj", "out_proj", "dense", "out_lin", "o", "c_proj", "Wo", "proj", "projection", "../output.dense")
OUTPUT[2] = (
    *OUTPUT[1],
    *("projection_layer", "output", "output_proj", "linear_out", "linear_o", "attention_out", "post", "post_proj"),
    "output_projection.o_proj",
    *("to_out", "to_out.0", "../output", "../post", "../post_attention.conv1d"),
)
# Attributes of an attention module: the number of its heads, and their size.
COUNT = (
    *("num_attention_heads", "num_heads", "n_heads", "num_attn_heads", "attention_heads", "n_head", "heads"),
    "no_heads",
)
SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size", "dim_head")
# Norms of queries, keys or results. If they have a scale for each value of all heads, no head is on its own.
NORM_OF_ALL = re.compile("(q|k|query|key)_?(layer)?_?norm|attn_sub_norm|inner_attn_ln")
# What belongs to heads besides query, key, value and output: a pattern for the name of a layer or parameter in the
# attention module, the dimension that is divided (of a layer: its outputs), and whether among the heads or the groups.
OTHERS = (
    ("(query|key|value)_global|(w2e|e2w|e2e)_query|layout_(query|key|value)", 0, "heads"),
    ("pos_(key_|query_|q_)?proj|relative_k_proj|linear_pos|relative_position_embedding.pos_proj", 0, "heads"),
    ("(pos_)?bias_[uv]|r_[rws]_bias|[qv]_bias|attention_biases", 0, "heads"),
    ("output_projection.gate_proj|exclusive_self_attention", 0, "heads"),
    ("gate_proj|g_proj|g_b_proj|gate_bias|linear_g|sinks|sink_proj", 0, "heads"),
    (r"linear_q_adapter_list\.\d+\.1", 0, "heads"),
    (r"linear_[kv]_adapter_list\.\d+\.1", 0, "groups"),
    (r"(queries|keys|queries_keys|keys_values|queries_keys_values)\.batch_norm", 0, "heads"),
    ("seg_embed|r_kernel", 1, "heads"),
    ("cls_token", 2, "heads"),
)
# Classes with an attention of their own, and endings of names that mean something else.
OWN_ATTENTION = re.compile(r"\w*(Attention|Attn|Multi[Hh]ead|SelfAtt|MLA|DeltaNet)\w*|\w+Mixer")
NO_ATTENTION = re.compile(
    r"\w*(Output|Residual|RepMixer|Bias|MLP|Norm|Layer|Block|Embeddings?|Projection|Adapter\w*|GRUCell|Map|Merger|"
    r"Decoder|Encoder|Model|Pooler|AttnBlock)"
)


@dataclass(frozen=True)
class Layout:
    """How the attention modules of one kind arrange their heads.

    layers  {path: order} of the layers that compute query, key and value; a module without one of them is another kind
    output  paths of the output layer, of which the first that exists counts; empty means any of `OUTPUT`
    more    paths of further output layers, whose inputs are divided like those of the first
    kinds   regular expression for the name of the module's class
    when    name of an attribute of the module that must be true
    heads   the module's attribute, or path of attributes, with the number of heads; "" means any of `COUNT`
    norms   whether norms of query and key can make a head depend on the others; False if they precede the layers
    whole   why the heads of these modules are not divided; "" if they are
    since   the version of the layouts that has this row first
    """

    layers: Mapping[str, str]
    output: Sequence[str] = ()
    more: Sequence[str] = ()
    kinds: str = r"\w+"
    when: str = ""
    heads: str = ""
    norms: bool = True
    whole: str = ""
    since: int = 2

    def __str__(self) -> str:
        return ", ".join(f"{path.rstrip('?')}: {order}" for path, order in self.layers.items())


def _each(*paths: str, order: str = "{}") -> dict[str, str]:
    return {path: order.format(role) for path, role in zip(paths, "qkv")}


GATED = r"Qwen3Next\w*|Qwen3_5\w*|Qwen4Exp\w*"
# The first row that fits a module counts.
LAYOUTS: list[Layout] = [
    # Heads that are not on their own, and what would fit a row below by its names.
    Layout({"in_proj": "q", "head_logits_proj": "q"}, whole="talking heads are mixed with each other"),
    Layout(_each("query", "key", "value"), kinds="ConvBert.*", whole="a convolution adds to the heads' results"),
    Layout(_each("q_proj", "k_proj", "v_proj"), kinds="DiffLlama.*", whole="the results of two heads are subtracted"),
    Layout(_each("q_proj", "k_proj", "v_proj"), kinds="Doge.*", whole="the mask of a head is made of all values"),
    Layout({"qkv_proj": "q"}, kinds="MiniMaxLightning.*", whole="a norm divides the results of all heads"),
    Layout({"q_proj": "q"}, kinds="FunAsrNano.*", whole="values also go around the output layer"),
    Layout({"q_proj": "q"}, kinds="AutoformerAttention", whole="all heads choose the delays of each"),
    Layout({"q_b_proj": "q", "o_a_proj": "q"}, kinds="DeepseekV4.*", whole="its output layer is one of each group"),
    Layout({"in_proj": "q", "x_proj": "q"}, kinds=r"\w*Mixer", whole="it has channels, but no heads"),  # Mamba
    Layout(
        {"in_proj": "q"},
        kinds=r"(Bamba|FalconH1|Zamba2Mamba|\w*Mamba2)Mixer",
        whole="its heads share B and C, and a norm",
    ),
    # Multi-head latent attention: DeepSeek, Kimi, MiniCPM3, Mistral 4.
    Layout({"q_b_proj": "q*", "kv_b_proj": "k*"}),
    Layout({"q_gate_proj": "q*", "kv_b_proj": "k*"}),
    Layout({"q_proj": "q*", "kv_b_proj": "k*"}),
    # Keys and values that several layers read belong to none of them: Gemma 3n, Gemma 4.
    Layout({"q_proj": "q"}, when="is_kv_shared_layer"),
    Layout({"q_proj": "q"}, when="store_full_length_kv"),
    Layout(_each("q_proj", "k_proj"), kinds="Gemma4.*", when="use_alternative_attention"),
    # A class that uses names of below in another way.
    Layout({"q_proj": "q*", "k_proj": "k", "v_proj": "v"}, kinds=f"({GATED})Attention"),
    Layout(_each("q_proj", "k_proj", "v_proj"), kinds="BltCrossAttention", norms=False),
    Layout(_each("query", "key", "value"), kinds="Lilt.*", more=["../layout_output.dense"]),
    Layout(_each("query", "key", "value", order="{}*"), kinds="Perceiver.*"),
    Layout({"qkv": "q k v"}, kinds="Florence2VisionChannelAttention", heads="groups"),
    Layout({"qkv_proj": "4(q v k)"}, kinds="CodeGen.*"),
    Layout({"c_attn": "(q k v)"}, kinds="GPTBigCode.*"),
    Layout({"q_attn": "q", "c_attn": "(k v)"}, kinds="GPTBigCode.*"),
    Layout(_each("q", "k", "v", order="{}*") | {"r": "q*"}, kinds="XLNet.*"),
    Layout({"k_proj": "k", "v_proj": "v"}, kinds="Aimv2AttentionPoolingHead"),
    Layout({"experts.input_linear": "q", "kv_proj": "k v"}, ["experts.output_linear"], heads="num_key_value_heads"),
    Layout({"proj": "q*"}, kinds="EsmFoldSelfAttention"),
    # A layer each.
    Layout(_each("query", "key", "value"), since=1),  # BERT, RoBERTa, ELECTRA, ALBERT
    Layout(_each("q_proj", "k_proj", "v_proj"), since=1),  # Llama, Mistral, Qwen, Gemma, ViT, BART, OPT, Whisper
    Layout(_each("q_lin", "k_lin", "v_lin"), since=1),  # DistilBERT, XLM
    Layout(_each("q", "k", "v"), since=1),  # T5, MPNet
    Layout(_each("query_proj", "key_proj", "value_proj"), since=1),  # DeBERTa v2 and v3
    Layout(_each("linear_q", "linear_k", "linear_v")),  # Conformers
    Layout(_each("project_q", "project_k", "project_v")),  # CPM-Ant
    Layout(_each("projection_query", "projection_key", "projection_value")),  # CvT
    Layout(_each("Wq", "Wk", "Wv")),  # CTRL
    Layout(_each("to_q", "to_k", "to_v")),
    Layout(_each("q_head", "k_head", "v_head"), heads="config.n_head"),  # Funnel
    Layout({"query_key": "q", "value": "v"}),  # Reformer's LSH attention
    # Several layers for a role.
    Layout(
        {"q_content_proj": "q", "k_content_proj": "k", "v_proj": "v", "q_pos_proj?": "q", "k_pos_proj": "k"}
        | {"q_pos_sine_proj?": "q"}
    ),  # Conditional DETR
    Layout(
        {f"../self_attn_{name}": f"{name[0]}*" for name in ("query_content_proj", "query_pos_proj")}
        | {f"../self_attn_{name}": f"{name[0]}*" for name in ("key_content_proj", "key_pos_proj", "value_proj")},
        kinds="DabDetrAttention",
    ),  # DAB-DETR
    Layout(
        {f"../cross_attn_{name}": f"{name[0]}*" for name in ("query_content_proj", "query_pos_proj?")}
        | {f"../cross_attn_{name}": f"{name[0]}*" for name in ("key_content_proj", "key_pos_proj", "value_proj")}
        | {"../cross_attn_query_pos_sine_proj": "q*"},
        kinds="DabDetrAttention",
    ),
    Layout(
        {"query": "q", "key_protein": "k", "value_protein": "v", "key_structure?": "k", "value_structure?": "v"}
        | {"key_msa?": "k", "value_msa?": "v"}
    ),  # Evolla
    Layout(
        {"vision_proj": "q", "text_proj": "k", "values_vision_proj": "v", "values_text_proj": "v"},
        ["out_vision_proj"],
        ["out_text_proj"],
    ),  # Grounding DINO, both ways
    Layout({"sampling_offsets": "q*", "attention_weights": "q*", "value_proj": "v*"}),  # deformable attention
    # One layer for all three.
    Layout({"q_attn": "q", "c_attn": "k v"}, since=1),  # GPT-2's cross-attention
    Layout({"c_attn": "q k v"}, since=1),  # GPT-2
    Layout({"Wqkv": "q k v"}, since=1),  # ModernBERT, MPT, DBRX
    Layout({"qkv_proj": "q k v"}, since=1),  # Phi-3
    Layout({"qkv": "q k v"}, since=1),  # BLIP, Swin's kin, SAM
    Layout({"query_key_value": "(q k v)"}, since=1),  # GPT-NeoX, BLOOM, Persimmon, Falcon
    Layout({"in_proj_": "q k v"}, kinds="MultiheadAttention", since=1),  # torch's
    Layout({"to_q": "q", "to_kv": "k v"}),  # Granite Speech
    Layout({"att_proj": "q k v"}),  # Bark
    Layout({"qkv_linear": "q k v"}),  # LayoutLM v2
    Layout({"in_proj": "(q k v)"}, kinds="DisentangledSelfAttention"),  # DeBERTa
    Layout({"queries_keys_values.linear": "q*"}, ["projection.linear"]),  # LeViT
    Layout({"keys_values.linear": "k*", "queries.linear": "q*"}, ["projection.linear"]),
]
LATEST = 2


def register_attention(
    layers: Mapping[str, str],
    output: str | Sequence[str] = (),
    *,
    kinds: str = r"\w+",
    heads: str = "",
    whole: str = "",
) -> None:
    """Makes the heads of a kind of attention module known, before all other layouts.

    Args:
        layers: {path: order} of the layers that compute query, key and value, such as {"qkv": "q k v"}. A path leads
            from the attention module to a layer ("q_proj", "../mixer.q"); orders are those of `layouts.py`: "q", "k",
            "v", "q k v", "(q k v)" for each group of heads, "4(q k v)" for each quarter of them, and "q*", a band of
            equal size for each head.
        output: path of the layer whose inputs are the results of all heads, or several, of which the first that exists
            counts. By default, the usual names.
        kinds: a regular expression that the name of the module's class must match as a whole.
        heads: the module's attribute with the number of heads. By default the usual names, or a head's size.
        whole: why the heads of these modules are not on their own. They are then left whole, and named with this.

    `hsaid_kernels.heads.check` shows whether what is registered is right. Registrations are not part of checkpoints:
    register before `HSAID.from_pretrained`, too.

    Raises TypeError if an argument has another type, ValueError for an order or regular expression that is none.
    """
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(key, str) for key in layers):
        raise TypeError(f"layers: expected {{path: order}}, got {layers!r}")
    for path, order in layers.items():
        if not isinstance(order, str) or not re.fullmatch(ORDER, order):
            raise ValueError(
                f"layers: expected an order such as 'q', 'q k v', '(q k v)' or 'q*' for {path!r}, got {order!r}"
            )
    try:
        re.compile(kinds)
    except (re.error, TypeError) as error:
        raise ValueError(f"kinds: expected a regular expression, got {kinds!r} ({error})") from None
    places = (output,) if isinstance(output, str) else tuple(output)
    LAYOUTS.insert(0, Layout(dict(layers), places, kinds=kinds, heads=heads, whole=whole, since=1))


ORDER = r"[qkv]\*|[qkv]( [qkv])*|\d*\([qkv]( [qkv])*\)"
