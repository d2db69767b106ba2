"""Tiny models of every type that transformers has: small numbers in place of those of its default configurations.

A configuration is made anew with each field that says a size replaced by a small one that fits the others; fields of
which no general rule knows what fits are in OVERRIDES.
"""

import copy
import dataclasses
import re

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

WIDTH, HEADS, LAYERS, IMAGE = 64, 4, 2, 32
MOST_PARAMETERS = 80_000_000

# What the whole name of an integer field matches, and its number; the first that matches counts. A number is never
# raised. Strings are keys of the options of `tiny_config`.
RULES: list[tuple[str, object]] = [
    (r"mamba_(num_heads|head_dim|n_heads|d_state)|n_mamba_heads_", 8), (r"mamba_(d_head|headdim)", 16),
    (r"(num|n)_?(hidden_|self_attends_per_|encoder_|decoder_|transformer_|predictor_|pred_|adapter_|resnet_)?"
     r"(layers?|blocks?|self_attends_per_block)", LAYERS),
    (r"(en|de)coder_(num_)?(hidden_)?(layers|depth)|depth|layers|(vision|text|speech_encoder|speech_decoder|attention|"
     r"perceiver|prelude|coda|memory_attention_num|fusion_num|detr_encoder|detr_decoder|l|r|x)_layers|"
     r"(en|de)coder_num_hidden_layers|num_(en|de)coder_layers|n_(en|de)coder_layers|predictor_depth|resampler_depth|"
     r"memory_attention_num_layers|(predictor|pred)_num_hidden_layers|num_(text|vision|kv|context)_layers", LAYERS),
    (r"(\w+_)?num_(key_value|kv|global_key_value)_heads?|n_kv_heads|multi_query_group_num", "groups"),
    (r".*(num|n)_(self_|cross_|encoder_|decoder_|query_|attn_|attention_)*(attention_)?heads?|n_head|"
     r"((en|de)coder|speech_encoder|speech_decoder|text_encoder|vision|text|predictor)_(attention_)?heads|attention_heads|"
     r"resampler_n_heads", HEADS),
    (r"(global_|local_|swa_|cross_|swa_v_)?head_dim|kv_channels|d_kv|d_head|attention_(head_dim|dim_head)|(attention_)?head_size",
     "size"),
    (r"qk_rope_head_dim", 4), (r"qk_nope_head_dim|v_head_dim|index_head_dim|linear_\w+_head_dim", 8),
    (r"qk_head_dim|kv_lora_rank", 12), (r"q_lora_rank|o_lora_rank|router_hidden_size", 16), (r"index_n_heads", 2),
    (r"linear_num_key_heads", 2), (r"linear_num_value_heads", 4), (r"index_topk", 4),
    (r"mamba_num_heads|mamba_head_dim|mamba_n_heads|ssm_state_size|(mamba_)?(d_)?state(_size)?|(mamba_)?chunk_size|"
     r"attention_chunk_size|mamba_d_state|lora_rank", 8),
    (r"mamba_d_head|mamba_headdim", 16), (r"mamba_(n|d)_?groups|n_groups|n_mamba_heads|n_group|topk_group", 1),
    (r"mamba_(dt_rank|d_conv)|time_step_rank", 4), (r"mamba_d_ssm", 64),
    (r"(decay|gate)_low_rank_dim|laurel_rank|mla_rank|hidden_size_per_layer_input", 8),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_expert)", 4),
    (r"num_experts_per_(tok|token)|moe_k|moe_topk|moe_top_k|top_k_experts", 2),
    (r"first_k_dense_replace|\w*num_shared_experts|n_shared_experts|moe_layer_start_index|num_kv_shared_layers", 1),
    (r"(moe_|shared_expert_|shared_|expert_ffn_|moe_shared_expert_)\w*(intermediate|hidden)_size", 24),
    (r"\w*(intermediate|ffn|feedforward|feed_forward|mlp_hidden)\w*|mlp_dim|d_ff|d_inner|n_inner|dim_feedforward|"
     r"block_ff_dim|prefix_decoder_dim", 48),
    (r"num_queries", 6), (r"num_(query|image)_tokens|mm_tokens_per_image|query_length|num_special_tokens", 4),
    (r"num_latents|num_buckets|relative_attention_num_buckets|max_relative_position|sliding_window|window|"
     r"num_codevectors_per_group", 8),
    (r"attention_window", 4), (r"num_hash", 2), (r"num_feature_levels", 4), (r"(en|de)coder_n_points", 2),
    (r"max_source_positions|max_target_positions", 40), (r"max_2d_position_embeddings", 128),
    (r"max_position_embeddings?|n_positions|n_ctx|max_seq_len(gth)?|max_text_len", 64),
    (r"type_vocab_size", 4), (r"\w*vocab_size\w*|d_vocab", 120), (r"codebook_size|vq_codebook_size|vocab_embed", 32),
    (r"codebook_dim", 8), (r"num_codebooks", 2), (r"number_of_embeddings|n_codes", 24), (r"num_labels", 3),
    (r"num_mel_bins|num_conv_pos_embeddings|(proj_)?codevector_dim", 16), (r"num_conv_pos_embedding_groups", 2),
    (r"emb_hidden", 32), (r"embedding_group", 4), (r"depth_mult", 1), (r"audio_tokens", 20), (r"hash_ngram_size", 2),
    (r"num_(nextn_predict|mtp)_layers", 0), (r"num_hash_layers|num_global_tokens", 1), (r"hc_mult|o_groups", 2),
    (r"num_frames|compress_rate|max_span_length", 4), (r"tubelet_size|spatial_merge_size|temporal_patch_size", 2),
    (r"image_size|input_size|img_size", IMAGE), (r"patch_size|encoder_stride", 8), (r"window_size", 4),
    (r"(\w+_)?(hidden|embed|emb|model|projection|proj|out|output|feature|latents|lru|text|context|adaptor|decoder|encoder)"
     r"_?(size|dim|dims|width|hidden_size|hidden_dim|channels|feature_dim)|d_(model|embed|latents|out)|n_embd?|width|dim|"
     r"(vision|lru)_width|\w*_embed_dim|hidden_channels|output_channels|conv_dim|embedding_size", WIDTH),
]  # fmt: skip
RULES = [(re.compile(f"({pattern})"), number) for pattern, number in RULES]
SKIPPED = ("transformers_version architectures id2label label2id dtype return_dict output_hidden_states problem_type "
           "chunk_size_feed_forward is_encoder_decoder").split()  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TIMES = dict(prediction_length=4, context_length=8, lags_sequence=[1, 2, 3])
SWIN = dict(image_size=64, patch_size=4, embed_dim=32, depths=(2, 1, 1), num_heads=(2, 4, 8), window_size=4)


def _resnet(*stages: str) -> PreTrainedConfig:
    sizes = dict(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1])
    return transformers.ResNetConfig(**sizes, out_features=list(stages))


DETR = dict(backbone_config=_resnet("stage4"), num_queries=6)
OVERRIDES = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), TIMES | {"d_model": 64}),
    **dict.fromkeys(("swin", "donut-swin", "maskformer-swin"), SWIN),
    **dict.fromkeys(("detr", "conditional_detr", "table-transformer", "dab-detr"), DETR),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), {"rope_parameters": ROPE}),
    **dict.fromkeys(("granite_speech5_encoder", "granite_speech5_ctc"), {"context_size": 16}),
    "bit": dict(embedding_size=32, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 1, 1], num_groups=8),
    "canine": dict(num_hash_buckets=64, max_position_embeddings=128),
    "chameleon": dict(vocabulary_map={"<image>": 5, "IMGIMGAA": 6}),
    "clap_audio_model": dict(spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=16, hidden_size=128, window_size=4,
                             depths=(1, 1, 1, 1), num_attention_heads=(2, 2, 4, 8), patch_size=4, patch_stride=(4, 4)),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"]),
    "deepseek_v2": dict(topk_method="greedy", num_experts_per_tok=2, n_group=1, topk_group=1),
    "deformable_detr": dict(backbone_config=_resnet("stage2", "stage3", "stage4"), num_queries=6, num_feature_levels=4),
    "emu3": dict(vocabulary_map={"<image>": 5}),
    "esm": dict(vocab_size=40, pad_token_id=1, mask_token_id=5, emb_layer_norm_before=True),
    "gemma3n_text": dict(num_kv_shared_layers=2, num_hidden_layers=4, intermediate_size=[48] * 4,
                         layer_types=["sliding_attention", "full_attention"] * 2,
                         activation_sparsity_pattern=[0.0] * 4),
    "gemma4_text": dict(num_kv_shared_layers=2, num_hidden_layers=4,
                        layer_types=["sliding_attention", "full_attention"] * 2),
    "glm5_next_text": dict(index_topk=16),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lilt": dict(hidden_size=96),
    "llama4_text": dict(no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"], moe_layers=[1],
                        interleave_moe_layer_step=2),
    **dict.fromkeys(("mimi", "mimi_decoder", "pocket_tts_audio_tokenizer"), {"upsample_groups": 64}),
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64},
    "sapiens2": dict(num_key_value_attention_heads=2, num_key_value_heads_per_layer=[4, 2]),
    "mimo_v2_flash": dict(v_head_dim=8, swa_v_head_dim=8, swa_num_key_value_heads=2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp", "attention"], num_hidden_layers=4),
    "reformer": dict(axial_pos_embds=False, attention_head_size=16, attn_layers=["local", "lsh"], num_buckets=4,
                     lsh_attn_chunk_length=4, local_attn_chunk_length=4),
    "segformer": dict(num_attention_heads=[1, 2, 2, 4], hidden_sizes=[16, 32, 32, 64], sr_ratios=[4, 2, 2, 1]),
    "swin2sr": dict(image_size=64, embed_dim=32, depths=(2,), num_heads=(4,), window_size=4),
    "swinv2": dict(image_size=64, patch_size=4, embed_dim=32, depths=(1, 1, 1), num_heads=(2, 4, 8), window_size=4,
                   pretrained_window_sizes=(0, 0, 0)),
    "xlnet": dict(d_model=64, n_head=4, d_head=16, d_inner=48, n_layer=2, vocab_size=120),
    "yoso": dict(use_expectation=False, hash_code_len=3, num_hash=4),
    "zamba": dict(num_hidden_layers=6, layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
                  attention_head_dim=32, attention_hidden_size=128, n_mamba_heads=2, mamba_expand=2),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, num_mem_blocks=1,
                   mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=16, num_attention_heads=4, num_key_value_heads=4,
                   attention_head_dim=32, attention_hidden_size=128, use_shared_attention_adapter=True, adapter_rank=4),
}  # fmt: skip


def tiny_model(kind: str, groups: int = HEADS, size: int = WIDTH // HEADS) -> nn.Module:
    """A model of a type of transformers, with random weights large enough that all matter.

    `groups` are its key-value heads, `size` is that of a head, where the configuration says one. Raises whatever
    transformers does where no tiny configuration fits.
    """
    options = {"groups": groups, "size": size}
    config = SPECIAL[kind](options) if kind in SPECIAL else tiny_config(CONFIG_MAPPING[kind](), options)
    torch.manual_seed(1)
    try:
        model = AutoModel.from_config(config)
    except (ValueError, TypeError) as error:  # a type without an automatic class, or with several
        if "Unrecognized configuration" not in str(error) and "NoneType" not in str(error):
            raise
        names = MODEL_MAPPING_NAMES[kind]
        model = getattr(transformers, names if isinstance(names, str) else names[0])(config)
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        raise MemoryError("not a tiny model")
    for module in model.modules():  # the sections of rotary embeddings, which must fit the size of a head
        sections, frequencies = getattr(module, "mrope_section", None), getattr(module, "inv_freq", None)
        if (
            isinstance(sections, list)
            and len(sections) == 3
            and torch.is_tensor(frequencies)
            and frequencies.dim() == 1
        ):
            third = frequencies.numel() // 3
            module.mrope_section = [frequencies.numel() - 2 * third, third, third]
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 2 else 0.03)).nan_to_num_(0)
        for buffer in filter(torch.is_floating_point, model.buffers()):
            buffer.nan_to_num_(0)
    return model.eval()


def tiny_config(config: PreTrainedConfig, options: dict[str, int]) -> PreTrainedConfig:
    """A configuration of the same class with small numbers."""
    old = {}
    for field in dataclasses.fields(type(config)):
        if field.init and field.name not in SKIPPED:
            try:
                old[field.name] = copy.deepcopy(getattr(config, field.name))
            except Exception:  # one that has a value for each layer
                if field.name in vars(config):
                    old[field.name] = copy.deepcopy(vars(config)[field.name])
    depth = next(
        (old[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(old.get(key), int)), 0
    )
    new = {key: _tiny(key, value, options, depth, old) for key, value in old.items()}
    if "qk_rope_head_dim" in old:  # latent attention, whose other fields follow
        new |= {key: value for key, value in (("head_dim", 4), ("num_key_value_heads", HEADS)) if key in old}
    if isinstance(old.get("rotary_dim"), int):
        new["rotary_dim"] = 8
    if "attn_layer_indices" in old:
        new["attn_layer_indices"] = [1]
    kind = type(config).model_type
    if kind.split("_")[0] in ("gemma4", "embedding", "diffusion") and "layer_types" in old:
        new |= {"global_head_dim": options["size"] * 2, "num_global_key_value_heads": options["groups"]}
    new |= OVERRIDES.get(kind, {})
    vocabulary = new.get("vocab_size")
    for key, value in new.items():
        if key.endswith("token_id") and isinstance(value, int) and isinstance(vocabulary, int) and value >= vocabulary:
            new[key] = vocabulary - 1 - sum(map(ord, key)) % 10
    return type(config)(**new)


def _tiny(key, value, options, depth, others):
    if isinstance(value, PreTrainedConfig):
        return tiny_config(value, options)
    if isinstance(value, dict):
        if value and all(isinstance(part, PreTrainedConfig) for part in value.values()):
            return {name: tiny_config(part, options) for name, part in value.items()}
        return _tiny_rope(value, options, others) if key.startswith("rope") else value
    if isinstance(value, (list, tuple)) and value:
        return _tiny_list(key, value, options, depth)
    if value is None:
        return options["size"] if key == "head_dim" else options["groups"] if key == "num_key_value_heads" else None
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.search(r"token_(id|index|idx)$|_id$", key):
        return 100 + sum(map(ord, key)) % 18 if value >= 100 else value
    for pattern, number in RULES:
        if pattern.fullmatch(key):
            return options[number] if isinstance(number, str) else min(number, value)
    return 128 if value > 2048 else value


def _tiny_rope(value, options, others):
    size = options["size"] if "head_dim" in others else WIDTH // HEADS

    def shrink(part):
        for key, inner in part.items():
            if isinstance(inner, dict):
                shrink(inner)
            elif key == "mrope_section" and len(inner) == 3:
                half = int(size // 2 * part.get("partial_rotary_factor", 1.0))
                part[key] = [half - 2 * (half // 3), half // 3, half // 3]
            elif key == "original_max_position_embeddings":
                part[key] = 32
        return part

    return shrink(value)


def _tiny_list(key, value, options, depth):
    kind, numbers = type(value), all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    if len(value) == depth and re.search("types$|pattern$|layers?$|layer_|block_types", key):
        different = list(dict.fromkeys(map(str, value)))[:LAYERS]
        first = [next(each for each in value if str(each) == name) for name in different]
        return kind((first + list(value))[:LAYERS])
    if not numbers:
        return value
    if len(value) == depth:
        return kind([_tiny(key, value[0], options, depth, {})] * LAYERS)
    if re.search("depths?$|^layers$|num_layers$|num_blocks", key):
        return kind([1 if len(value) > 2 else 2] * len(value))
    if re.search("heads$|^num_head", key):
        grows = len(set(value)) > 1
        return kind([2 * 2**i if grows and value[-1] >= 2 * value[-2] else 2 * (i + 1) if grows else HEADS
                     for i in range(len(value))])  # fmt: skip
    if re.search("hidden_sizes$|embed_dims?$|encoder_hidden|^dims$|widths|^out_channels$|neck_hidden", key):
        return kind([16 * (i + 1) for i in range(len(value))] if len(set(value)) > 1 else [WIDTH] * len(value))
    if key in ("image_size", "input_size", "img_size"):
        return kind([IMAGE] * len(value))
    if key == "patch_size":
        return kind([8] * len(value))
    if key in ("conv_dim", "feature_extractor_dims"):
        return kind([16] * len(value))
    return value


def _dbrx(options):
    attention = dict(kv_n_heads=options["groups"], clip_qkv=8.0, rope_theta=1e4)
    experts = dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=64, ffn_act_fn={"name": "silu"})
    sizes = dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=120)
    return transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)


def _falcon(options):
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=120)
    if options["groups"] == 2:
        return transformers.FalconConfig(**sizes, num_kv_heads=2, new_decoder_architecture=True)
    many = options["groups"] != 1
    return transformers.FalconConfig(**sizes, multi_query=not many, alibi=many, bias=many)


def _gpt_bigcode(options):
    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=120, n_positions=64)
    return transformers.GPTBigCodeConfig(**sizes, multi_query=options["groups"] < 4)


def _funnel(options):
    sizes = dict(vocab_size=120, d_model=64, n_head=4, d_head=16, d_inner=48, num_decoder_layers=1)
    return transformers.FunnelConfig(**sizes, block_sizes=[1, 1])


def _cvt(options):
    return transformers.CvtConfig(embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3])


SPECIAL = {"cvt": _cvt, "dbrx": _dbrx, "funnel": _funnel, "falcon": _falcon, "gpt_bigcode": _gpt_bigcode}
