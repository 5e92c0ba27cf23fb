"""The table of the zoo: for every mixture-of-experts family of transformers, what its tiny config needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

VOCAB_SIZE = 96
NUM_TOKENS = 12

# Every config takes those it has a field for. F is 22: ragged for any vector width.
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=44,
    moe_intermediate_size=22,
    shared_expert_intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    num_local_experts=6,
    n_routed_experts=6,
    moe_num_experts=6,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    mlp_layer_types=["sparse", "sparse"],
    first_k_dense_replace=0,
    num_dense_layers=0,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_head_dim=8,
    linear_num_heads=4,
    max_position_embeddings=128,
    # sub-configs of other modalities, never run: as small as their constructors allow
    depth=1,
    num_heads=2,
    out_hidden_size=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_layers=1,
    d_model=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
SAM = dict(sam_config=dict(output_channels=16, downsample_channels=[16, 32]))
MLA = dict(num_key_value_heads=4)  # latent attention has no grouped heads
HYBRID = dict(layer_types=["linear_attention", "full_attention"])


@dataclass(frozen=True)
class Animal:
    """One tiny model. `kind` is "decoder", "encoder_decoder", "encoder" or "block_diffusion".

    `config` overrides TINY; for a composite config it holds one dict per sub-config.
    `since`: the transformers release that brought the family, where not all tested ones have it.
    """

    family: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"
    since: str = "5.17"

    @property
    def is_available(self) -> bool:
        return release(transformers.__version__) >= release(self.since)


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


ON_EXPERTS_INTERFACE: tuple[Animal, ...] = (
    Animal("afmoe", "AfmoeForCausalLM"),
    Animal("axk1", "AXK1ForCausalLM", MLA),
    Animal("axk2", "AXK2ForCausalLM", MLA),
    Animal("bailing_hybrid", "BailingHybridForCausalLM", MLA | HYBRID, since="5.23"),
    Animal("beam", "BeamForCausalLM", since="5.23"),
    Animal("cohere2_moe", "Cohere2MoeForCausalLM"),
    Animal("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", dict(vision_config=SAM)),
    Animal("deepseek_v2", "DeepseekV2ForCausalLM", MLA),
    Animal("deepseek_v3", "DeepseekV3ForCausalLM", MLA | dict(n_group=2, topk_group=1)),
    Animal("deepseek_v32", "DeepseekV32ForCausalLM", MLA),
    Animal(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        dict(
            mlp_layer_types=["hash_moe", "moe"],
            num_key_value_heads=1,
            o_groups=2,
            o_lora_rank=8,
            swiglu_limit=1.0,
        ),
    ),
    Animal(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        dict(
            canvas_length=NUM_TOKENS,
            text_config=dict(top_k_experts=2),
            vision_config=dict(model_type="gemma4_vision", position_embedding_size=64, **TOWER),
        ),
        kind="block_diffusion",
    ),
    Animal("dots1", "Dots1ForCausalLM", dict(n_shared_experts=1)),
    Animal("dots3_note", "Dots3NoteForCausalLM", MLA, since="5.23"),
    Animal("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", dict(moe_layer_start_index=0)),
    Animal(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        dict(
            text_config=dict(
                moe_intermediate_size=[22, 14],
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
            )
        ),
    ),
    Animal("exaone_moe", "ExaoneMoeForCausalLM"),
    Animal("flex_olmo", "FlexOlmoForCausalLM"),
    Animal("flint", "FlintForCausalLM", dict(mlp_only_layers=[]), since="5.23"),
    Animal(
        "gemma4",
        "Gemma4ForCausalLM",
        dict(
            enable_moe_block=True,
            top_k_experts=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
        ),
    ),
    Animal("glm4_moe", "Glm4MoeForCausalLM"),
    Animal("glm4_moe_lite", "Glm4MoeLiteForCausalLM", MLA),
    Animal(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        dict(
            text_config=dict(
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[0, 1, 1])
            )
        ),
    ),
    Animal(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        dict(text_config=MLA | HYBRID | dict(swiglu_limit=1.0, qk_rope_head_dim=0)),
    ),
    Animal("glm_moe_dsa", "GlmMoeDsaForCausalLM", MLA),
    Animal("gpt_oss", "GptOssForCausalLM", dict(swiglu_limit=1.0)),
    Animal("granitemoe", "GraniteMoeForCausalLM"),
    Animal("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Animal(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_state=8),
    ),
    Animal("granitemoeshared", "GraniteMoeSharedForCausalLM", dict(shared_intermediate_size=20)),
    Animal("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Animal("hy_v3", "HYV3ForCausalLM"),
    Animal("hy_v4", "HYV4ForCausalLM", dict(swiglu_limit=1.0)),
    Animal(
        "inkling",
        "InklingForCausalLM",
        dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, rel_extent=16),
    ),
    Animal(
        "inkling2",
        "Inkling2ForCausalLM",
        dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, rel_extent=16),
        since="5.23",
    ),
    Animal(
        "jamba",
        "JambaForCausalLM",
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=1,
            expert_layer_offset=0,
            mamba_d_state=4,
        ),
    ),
    Animal("kimi_linear", "KimiLinearForCausalLM", MLA | HYBRID),
    Animal("kolibri1", "Kolibri1ForCausalLM", since="5.23"),
    Animal("laguna", "LagunaForCausalLM"),
    Animal("lfm2_moe", "Lfm2MoeForCausalLM", dict(layer_types=["conv", "full_attention"])),
    Animal("mellum", "MellumForCausalLM"),
    Animal("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    Animal("minimax", "MiniMaxForCausalLM", HYBRID),
    Animal("minimax_m2", "MiniMaxM2ForCausalLM"),
    Animal(
        "minimax_m3_vl",
        "MiniMaxM3VLForCausalLM",
        dict(dense_intermediate_size=20, shared_intermediate_size=20, rotary_dim=8, swiglu_limit=1.0),
    ),
    Animal("mistral4", "Mistral4ForCausalLM", MLA),
    Animal(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        dict(text_config=MLA, vision_config=dict(model_type="pixtral", **TOWER)),
        since="5.23",
    ),
    Animal("mixtral", "MixtralForCausalLM"),
    Animal(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        dict(
            text_config=dict(moe_hidden_size=24),
            audio_config=dict(num_hidden_layers=1, patch_sizes=[4], hidden_sizes=[16], depths=[1]),
            out_hidden_size=32,
            projector_hidden_size=16,
        ),
        since="5.23",
    ),
    Animal(
        "nemotron_h",
        "NemotronHForCausalLM",
        dict(
            layers_block_type=["mamba", "moe", "attention", "moe"],
            num_hidden_layers=4,
            moe_latent_size=24,
            moe_shared_expert_intermediate_size=20,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
        ),
    ),
    Animal("olmoe", "OlmoeForCausalLM"),
    Animal(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterForTokenClassification",
        dict(swiglu_limit=1.0),
        kind="encoder",
    ),
    Animal("phimoe", "PhimoeForCausalLM"),
    Animal("qwen2_moe", "Qwen2MoeForCausalLM"),
    Animal("qwen3_5_moe", "Qwen3_5MoeForCausalLM", HYBRID),
    Animal("qwen3_moe", "Qwen3MoeForCausalLM"),
    Animal("qwen3_next", "Qwen3NextForCausalLM", HYBRID),
    Animal(
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        dict(vision_start_token_id=95, audio_config=dict(downsample_hidden_size=8)),
    ),
    Animal("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    Animal(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        HYBRID
        | dict(
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=64,
            indexer_compress_ratio=4,
        ),
    ),
    Animal("solar_open", "SolarOpenForCausalLM"),
    Animal("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", dict(vision_config=SAM), since="5.23"),
    Animal("zaya", "ZayaForCausalLM", dict(num_experts_per_tok=1, router_hidden_size=16)),
)

# Off the interface, in some release at least: each has an adapter of its own.
WITH_OWN_ADAPTER: tuple[Animal, ...] = (
    Animal("aria", "AriaTextForCausalLM"),
    Animal(
        "dbrx",
        "DbrxForCausalLM",
        dict(
            n_heads=4,
            n_layers=2,
            max_seq_len=128,
            ffn_config=dict(moe_top_k=2, ffn_hidden_size=22),
            attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ),
    ),
    Animal("jetmoe", "JetMoeForCausalLM", dict(kv_channels=8)),
    Animal("llama4", "Llama4ForCausalLM", dict(intermediate_size_mlp=40)),
    Animal(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        MLA | dict(num_layers=2, zero_expert_num=2, expert_ffn_hidden_size=22, ffn_hidden_size=44),
    ),
    Animal(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        dict(
            encoder_layers=2,
            decoder_layers=2,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            decoder_ffn_dim=22,
            encoder_ffn_dim=22,
            decoder_attention_heads=2,
        ),
        kind="encoder_decoder",
    ),
    Animal(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        dict(text_config=dict(swiglu_limits=[0.0, 0.5], share_expert_dim=20, sliding_window=64)),
    ),
    Animal(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        dict(
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            d_ff=44,
            d_kv=8,
        ),
        kind="encoder_decoder",
    ),
)

ANIMALS = ON_EXPERTS_INTERFACE + WITH_OWN_ADAPTER
