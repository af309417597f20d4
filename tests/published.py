"""config.json of the published models the configs are for, as far as it decides the sizes.

Sources: the config.json of llava-hf/llava-1.5-7b-hf, meta-llama/Llama-3.1-8B-Instruct,
Qwen/Qwen2-Audio-7B-Instruct, Qwen/Qwen2-VL-7B-Instruct and facebook/chameleon-7b. ``COUNTS`` are
parameters in billions, from and to.
"""

LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 10000.0,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
}  # fmt: skip

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

QWEN2_AUDIO_7B = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "model_type": "qwen2_audio",
    "audio_token_index": 151646,
    "text_config": {
        "model_type": "qwen2", "vocab_size": 156032, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 10000, "tie_word_embeddings": False,
    },
    "audio_config": {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "d_model": 1280,
        "encoder_ffn_dim": 5120, "encoder_layers": 32, "encoder_attention_heads": 20,
        "max_source_positions": 1500,
    },
}  # fmt: skip

QWEN2_VL_7B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "spatial_patch_size": 14,
    },
}  # fmt: skip

_CODES = 8192
CHAMELEON_7B = {
    "architectures": ["ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "swin_norm": False, "rope_theta": 10000.0,
    "vocabulary_map": {"<image>": 8711, "<racm3:break>": 8197, "<eoss>": 8196}
    | {
        f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(code))}Z": 4 + code
        for code in range(_CODES)
    },
    "vq_config": {
        "embed_dim": 256, "num_embeddings": _CODES, "double_latent": False, "latent_channels": 256,
        "resolution": 512, "in_channels": 3, "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": None,
        "dropout": 0.0, "attn_type": "vanilla",
    },
}  # fmt: skip

# configs/<folder> -> the model it is for, its parameters in billions (from, to). LLaVA-1.5-7B: the
# text model's config rounds the vocabulary up.
MODELS = {
    "t2t": (LLAMA_8B, (8.02, 8.04)),
    "ti2t": (LLAVA_7B, (7.0, 7.1)),
    "ta2t": (QWEN2_AUDIO_7B, (8.3, 8.5)),
    "tv2t": (QWEN2_VL_7B, (8.2, 8.4)),
    "t2i": (CHAMELEON_7B, (7.0, 7.1)),
    "ti2ti": (CHAMELEON_7B, (7.0, 7.1)),
}
