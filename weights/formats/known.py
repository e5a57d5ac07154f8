"""The formats that are read. Data only: what the words mean stands in table.py."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from engine.config import ModelConfig
from weights.formats.table import ROPE_FIELDS, Format, Limit, Setting

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
}
"""Hugging Face's names and ours."""

NORMS = {
    "layernorm": "layernorm",
    "LayerNorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "RMSNorm": "rmsnorm",
}

SCALING = "scaled frequencies are not converted: the model would be rotated wrongly"
ROPE_TYPE = (None, "default")

UNSUPPORTED = {
    r"(.*\.)?value_embeds\..*|.*\.ve_gate\..*|.*value_embeddings.*": (
        "value embeddings, as nanochat and later modded-nanogpt have them, are not supported"
    ),
    r".*(attn|mlp|qkv|qkvo|qk|vo)_bank(\..*)?": (
        "weights in banks, as modded-nanogpt has them since 2025, are not supported"
    ),
    r".*\b(resid_lambdas|x0_lambdas|lambdas|skip_weights|scalars|smear_gate.*)": (
        "learned mixing of earlier streams, as nanochat and later modded-nanogpt have it, "
        "is not supported"
    ),
    r".*\b(wpe|position_embeddings?|pos_emb(edding)?)\.weight": (
        "this model has learned absolute positions, not rotary ones; Ropeway serves RoPE models"
    ),
    r".*\b(experts?|router|gate_proj|w3|fc_2)\b.*": (
        "gated or expert MLPs are not those of a GPT-2 and are not supported"
    ),
}
"""Refused in every format, by name."""

UNSUPPORTED_CODE = {
    r"\battn_scale\b": "its trainer scales what attention adds, which is not supported",
    r"\bwte\(\w+\)[^\n]*\n\s*x = F\.rms_norm": (
        "its trainer normalises the embedding, which is not supported"
    ),
    r"\btanh\(\s*logits": "its trainer caps the logits, which is not supported",
}
"""Refused where a file brings its trainer's code along."""

MASKS = (
    r".*attn\.(bias|masked_bias|mask)",
    r".*attention\.(bias|masked_bias)",
    r".*\b(cos|sin)(_cached)?",
    r".*\bcached_(freqs|scales)|.*\bdummy|.*rotary.*\.scale",
    r".*attn\.embed_positions",
)

GPT2_LAYER = "transformer.h.{}."
GPT2_MODULES = {
    "embedding": "transformer.wte",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "norm1": GPT2_LAYER + "ln_1",
    "qkv": GPT2_LAYER + "attn.c_attn",
    "out": GPT2_LAYER + "attn.c_proj",
    "norm2": GPT2_LAYER + "ln_2",
    "mlp.up": GPT2_LAYER + "mlp.c_fc",
    "mlp.down": GPT2_LAYER + "mlp.c_proj",
}
GPTJ_MODULES = {
    "embedding": "transformer.wte",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "norm1": GPT2_LAYER + "ln_1",
    "norm2": GPT2_LAYER + "ln_1",  # one norm feeds both
    "out": GPT2_LAYER + "attn.out_proj",
    "mlp.up": GPT2_LAYER + "mlp.fc_in",
    "mlp.down": GPT2_LAYER + "mlp.fc_out",
}
NEOX_LAYER = "gpt_neox.layers.{}."

# What forks of nanoGPT and of GPT-2 with RoPE call these, where they say them at all.
ROPE_SETTINGS = {
    "rope_base": Setting(
        ("rope_base", "rope_theta", "rotary_base", "rotary_emb_base", "rope_parameters.rope_theta")
    ),
    "rotary_dim": Setting(("rotary_dim", "rope_dim", "n_rot")),
    "rotary_fraction": Setting(
        ("rotary_pct", "rotary_percentage", "rope_parameters.partial_rotary_factor")
    ),
    "pairing": Setting(
        ("pairing", "rope_interleaved", "rotary_interleaved"),
        values={
            "half": "half",
            "interleaved": "interleaved",
            True: "interleaved",
            False: "half",
        },
    ),
    "rope_sign": Setting(("rope_sign",)),
    "norm": Setting(("norm", "norm_type"), values=NORMS),
}
NANOGPT_SETTINGS = {
    "num_heads": Setting(("n_head",)),
    "max_position": Setting(("block_size", "sequence_length", "n_positions")),
    "vocab_size": Setting(("vocab_size",)),
    "activation": Setting(("activation", "activation_function"), "gelu", ACTIVATIONS),
    "norm_eps": Setting(("norm_eps", "layer_norm_epsilon"), 1e-5),
    "eos_token_id": Setting(("eos_token_id",)),
    **ROPE_SETTINGS,
}
HF_GPT2_SETTINGS = {
    "num_heads": Setting(("n_head", "num_attention_heads")),
    "max_position": Setting(("n_positions", "max_position_embeddings", "n_ctx")),
    "vocab_size": Setting(("vocab_size",)),
    "activation": Setting(("activation_function",), "gelu_new", ACTIVATIONS),
    "norm_eps": Setting(("layer_norm_epsilon",), 1e-5),
    "tie_embeddings": Setting(("tie_word_embeddings",)),
    "eos_token_id": Setting(("eos_token_id",)),
}
GPTJ_SETTINGS = HF_GPT2_SETTINGS | {"rotary_dim": Setting(("rotary_dim",))}
GPTJ_FIXED = {
    "parallel_residual": True,
    "pairing": "interleaved",
    "rope_sign": 1,
    "rope_base": 10_000.0,
}
HF_LIMITS = (
    Limit("scale_attn_by_inverse_layer_idx", (None, False), "scores scaled by layer"),
    Limit("scale_attn_weights", (None, True), "unscaled scores"),
    Limit("add_cross_attention", (None, False), "cross attention"),
    Limit("rope_scaling", (None,), SCALING),
    Limit("rope_parameters.rope_type", ROPE_TYPE, SCALING),
)


def _default(name: str, default: Any) -> Any:
    """Of a field of ModelConfig; nothing where a checkpoint must say it."""
    return None if default is MISSING or name in ROPE_FIELDS else default


NANOGPT = Format(
    name="nanogpt",
    title="nanoGPT and its forks with RoPE",
    marks=(r"transformer\.h\.0\.attn\.c_attn\.weight", r"transformer\.wte\.weight"),
    modules=GPT2_MODULES,
    settings=NANOGPT_SETTINGS,
    layout=None,
    ignored=MASKS,
    limits=(Limit("rope_scaling", (None,), SCALING),),
)
HF_GPT2 = Format(
    name="hf-gpt2",
    title="Hugging Face GPT-2 with RoPE",
    marks=NANOGPT.marks,
    modules=GPT2_MODULES,
    settings=HF_GPT2_SETTINGS | ROPE_SETTINGS,
    layout=None,
    transposed=("qkv", "out", "mlp.up", "mlp.down"),
    ignored=MASKS,
    limits=HF_LIMITS,
)
GPT_NEOX = Format(
    name="gpt-neox",
    title="Hugging Face GPT-NeoX, Pythia",
    model_types=("gpt_neox",),
    marks=(r"gpt_neox\.layers\.0\.attention\.query_key_value\.weight",),
    modules={
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "norm1": NEOX_LAYER + "input_layernorm",
        "qkv": NEOX_LAYER + "attention.query_key_value",
        "out": NEOX_LAYER + "attention.dense",
        "norm2": NEOX_LAYER + "post_attention_layernorm",
        "mlp.up": NEOX_LAYER + "mlp.dense_h_to_4h",
        "mlp.down": NEOX_LAYER + "mlp.dense_4h_to_h",
    },
    settings={
        "num_heads": Setting(("num_attention_heads",)),
        "max_position": Setting(("max_position_embeddings",), 2048),
        "vocab_size": Setting(("ropeway.vocab_size", "vocab_size")),
        **{
            name: Setting((f"ropeway.{name}",))
            for name in ("bias", "attention_bias", "mlp_bias", "norm_bias", "norm_weight")
        },
        "activation": Setting(("hidden_act",), "gelu", ACTIVATIONS),
        "norm_eps": Setting(("layer_norm_eps",), 1e-5),
        "parallel_residual": Setting(("use_parallel_residual",), True),
        "rope_base": Setting(("rope_parameters.rope_theta", "rotary_emb_base"), 10_000.0),
        "rotary_fraction": Setting(("rope_parameters.partial_rotary_factor", "rotary_pct"), 0.25),
        "tie_embeddings": Setting(("tie_word_embeddings",)),
        "eos_token_id": Setting(("eos_token_id",)),
    },
    fixed={"pairing": "half", "rope_sign": 1},
    settings_name="config.json",
    layout="per_head",
    ignored=(*MASKS, r".*rotary_emb\.inv_freq"),
    limits=(
        Limit("rope_scaling", (None,), SCALING),
        Limit("rope_parameters.rope_type", ROPE_TYPE, SCALING),
    ),
)
GPTJ = Format(
    name="gpt-j",
    title="Hugging Face GPT-J",
    model_types=("gptj",),
    marks=(r"transformer\.h\.0\.attn\.q_proj\.weight", r"transformer\.h\.0\.mlp\.fc_in\.weight"),
    modules=GPTJ_MODULES
    | {
        "qkv": (
            GPT2_LAYER + "attn.q_proj",
            GPT2_LAYER + "attn.k_proj",
            GPT2_LAYER + "attn.v_proj",
        )
    },
    settings=GPTJ_SETTINGS,
    settings_name="config.json",
    fixed=GPTJ_FIXED,
    ignored=MASKS,
    limits=HF_LIMITS,
)
CODEGEN = Format(
    name="codegen",
    title="Hugging Face CodeGen",
    model_types=("codegen",),
    marks=(r"transformer\.h\.0\.attn\.qkv_proj\.weight",),
    modules=GPTJ_MODULES | {"qkv": GPT2_LAYER + "attn.qkv_proj"},
    settings=GPTJ_SETTINGS,
    settings_name="config.json",
    fixed=GPTJ_FIXED,
    layout="codegen",
    ignored=(*MASKS, r".*attn\.causal_mask"),
    limits=HF_LIMITS,
)
_LITGPT_MODULES = {
    "embedding": "transformer.wte",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "norm1": GPT2_LAYER + "norm_1",
    "qkv": GPT2_LAYER + "attn.qkv",
    "out": GPT2_LAYER + "attn.proj",
    "norm2": GPT2_LAYER + "norm_2",
    "mlp.up": GPT2_LAYER + "mlp.fc",
    "mlp.down": GPT2_LAYER + "mlp.proj",
}
_LITGPT_LIMITS = (
    Limit("mlp_class_name", (None, "GptNeoxMLP"), "an MLP that is not a GPT-2's"),
    Limit("norm_qk", (None, False), "LitGPT's QK-norm"),
    Limit("n_query_groups", (None, "n_head"), "grouped queries"),
    Limit("rope_condense_ratio", (None, 1), SCALING),
    Limit("rope_adjustments", (None,), SCALING),
    Limit("rope_local_base_freq", (None,), "two bases in one model"),
    Limit("sliding_window_size", (None,), "sliding windows"),
    Limit("attention_logit_softcapping", (None,), "capped scores"),
    Limit("final_logit_softcapping", (None,), "capped logits"),
    Limit("attention_scores_scalar", (None,), "another scale of the scores"),
    Limit("scale_embeddings", (None, False), "scaled embeddings"),
    Limit("post_attention_norm", (None, False), "norms after attention"),
    Limit("post_mlp_norm", (None, False), "norms after the MLP"),
    Limit("latent_attention", (None,), "latent attention"),
    Limit("n_expert", (None, 0), "experts"),
)
_LITGPT_SETTINGS = {
    "num_heads": Setting(("n_head",), 32),
    "head_dim": Setting(("head_size",)),
    "max_position": Setting(("block_size",), 4096),
    "vocab_size": Setting(("vocab_size",), 50_254),
    "activation": Setting(("gelu_approximate",), "none", {"none": "gelu", "tanh": "gelu_tanh"}),
    "norm": Setting(("norm_class_name",), "LayerNorm", NORMS),
    "norm_eps": Setting(("norm_eps",), 1e-5),
    "parallel_residual": Setting(("parallel_residual",), True),
    "rope_base": Setting(("rope_base",), 10_000.0),
    "rotary_fraction": Setting(("rotary_percentage",), 0.25),
}
LITGPT = Format(
    name="litgpt",
    title="LitGPT (lit_model.pth and model_config.yaml)",
    marks=(r"transformer\.h\.0\.attn\.qkv\.weight", r"transformer\.h\.0\.norm_2\.weight"),
    modules=_LITGPT_MODULES,
    settings=_LITGPT_SETTINGS,
    settings_name="model_config.yaml",
    fixed={"pairing": "half", "rope_sign": 1},
    ignored=MASKS,
    limits=(*_LITGPT_LIMITS, Limit("shared_attention_norm", (None, False), "a shared norm")),
)
LITGPT_SHARED = Format(
    name="litgpt-shared-norm",
    title="LitGPT, one norm for attention and MLP",
    marks=(r"transformer\.h\.0\.attn\.qkv\.weight",),
    modules=_LITGPT_MODULES | {"norm2": GPT2_LAYER + "norm_1"},
    settings=_LITGPT_SETTINGS,
    settings_name="model_config.yaml",
    fixed=LITGPT.fixed,
    ignored=MASKS,
    limits=(*_LITGPT_LIMITS, Limit("shared_attention_norm", (True,), "norm_2 is missing")),
)
LITGPT_OLD = Format(
    name="litgpt-2024",
    title="LitGPT before 2025 (q, k, v by head)",
    marks=(r"transformer\.h\.0\.attn\.attn\.weight", r"transformer\.h\.0\.norm_2\.weight"),
    modules=_LITGPT_MODULES | {"qkv": GPT2_LAYER + "attn.attn"},
    settings=_LITGPT_SETTINGS,
    settings_name="model_config.yaml",
    fixed=LITGPT.fixed,
    layout="per_head",
    ignored=MASKS,
    limits=LITGPT.limits,
)
MODDED = Format(
    name="modded-nanogpt",
    title="modded-nanogpt of October 2024",
    marks=(r"transformer\.h\.0\.attn\.c_q\.weight", r"transformer\.h\.0\.mlp\.c_fc\.weight"),
    modules=GPT2_MODULES
    | {"qkv": (GPT2_LAYER + "attn.c_q", GPT2_LAYER + "attn.c_k", GPT2_LAYER + "attn.c_v")},
    settings=NANOGPT_SETTINGS
    | {
        "max_position": Setting(("sequence_length", "block_size"), 1024),
        "activation": Setting(("activation",), "relu2", ACTIVATIONS),
        "norm_eps": Setting(("norm_eps",), 2.0**-23),  # F.rms_norm's for float32
        "rope_base": Setting(("rope_base",), 10_000.0),
    },
    fixed={
        "norm": "rmsnorm",
        "norm_weight": False,
        "qk_norm": "before",
        "pairing": "half",
        "rope_sign": -1,
        "rotary_fraction": 1.0,
        "tie_embeddings": True,
    },
    ignored=MASKS,
    limits=(Limit("n_kv_head", (None, "n_head"), "grouped queries"),),
)
_OWN_LAYER = "blocks.{}."
ROPEWAY = Format(
    name="ropeway",
    title="Ropeway's model directory",
    marks=(r"blocks\.0\.qkv\.weight", r"embedding\.weight"),
    modules={
        "embedding": "embedding",
        "norm": "norm",
        "head": "head",
        "norm1": _OWN_LAYER + "norm1",
        "qkv": _OWN_LAYER + "qkv",
        "qk_norm.query": _OWN_LAYER + "qk_norm.query",
        "qk_norm.key": _OWN_LAYER + "qk_norm.key",
        "out": _OWN_LAYER + "out",
        "norm2": _OWN_LAYER + "norm2",
        "mlp.up": _OWN_LAYER + "mlp.up",
        "mlp.down": _OWN_LAYER + "mlp.down",
    },
    settings={
        each.name: Setting((each.name,), _default(each.name, each.default))
        for each in fields(ModelConfig)
    },
    complete_with="rotary_dim",
)
FORMATS = (
    ROPEWAY,
    GPT_NEOX,
    GPTJ,
    CODEGEN,
    LITGPT,
    LITGPT_SHARED,
    LITGPT_OLD,
    MODDED,
    HF_GPT2,
    NANOGPT,
)
"""In the order in which they are tried."""
