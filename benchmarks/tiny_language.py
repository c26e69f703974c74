"""Tiny random models of sound, of text, and of images with text; see tiny_models.py."""

from __future__ import annotations

import torch
import transformers as tf
from tiny_parts import GROUPED, TEXT, VISION, Built, images, tokens

# Sound


def wav2vec2() -> Built:
    config = tf.Wav2Vec2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        conv_dim=[8, 8],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,  # else a layer may be skipped, and has no gradient
        apply_spec_augment=False,  # needs more frames than this batch has
    )
    return tf.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 400)}


def whisper() -> Built:
    config = tf.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        use_cache=False,
    )
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens(8)}
    return tf.WhisperForConditionalGeneration(config), inputs


# Text


def bert() -> Built:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT)), {"input_ids": tokens()}


def deberta_v2() -> Built:
    # as the released checkpoints, but for sizes
    config = tf.DebertaV2Config(
        **TEXT,
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        conv_kernel_size=3,
        conv_act="gelu",
        pooler_hidden_size=16,
    )
    return tf.DebertaV2ForSequenceClassification(config), {"input_ids": tokens()}


def gpt2() -> Built:
    config = tf.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3, use_cache=False
    )
    return tf.GPT2LMHeadModel(config), {"input_ids": tokens()}


def llama() -> Built:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), {"input_ids": tokens()}


def qwen3() -> Built:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)), {"input_ids": tokens()}


def qwen3_moe() -> Built:
    config = tf.Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return tf.Qwen3MoeForCausalLM(config), {"input_ids": tokens()}


def mixtral() -> Built:
    config = tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return tf.MixtralForCausalLM(config), {"input_ids": tokens()}


def gpt_oss() -> Built:
    config = tf.GptOssConfig(
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return tf.GptOssForCausalLM(config), {"input_ids": tokens()}


def llama4() -> Built:
    config = tf.Llama4TextConfig(
        **GROUPED,
        intermediate_size_mlp=24,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        output_router_logits=True,
    )
    return tf.Llama4ForCausalLM(config), {"input_ids": tokens()}


def deepseek_v3() -> Built:
    config = tf.DeepseekV3Config(
        **TEXT,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        use_cache=False,
    )
    return tf.DeepseekV3ForCausalLM(config), {"input_ids": tokens()}


def mamba() -> Built:
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
    return tf.MambaForCausalLM(config), {"input_ids": tokens()}


def t5() -> Built:
    config = tf.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return tf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(6)}


# Images and text


def llava() -> Built:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**GROUPED),
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    ids = torch.cat([torch.full((2, 16), 3), tokens(8)], dim=1)
    return tf.LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": images(16)}


def qwen2_5_vl() -> Built:
    config = tf.Qwen2_5_VLConfig(
        text_config=GROUPED
        | {"bos_token_id": 2, "eos_token_id": 3}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 16,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=3,
        vision_start_token_id=2,
        video_token_id=1,
    )
    # one image per row, of 4 x 4 patches, merged two by two into four tokens
    ids = torch.cat([torch.full((2, 1), 2), torch.full((2, 4), 3), tokens(8)], dim=1)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 3).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }
    return tf.Qwen2_5_VLForConditionalGeneration(config), inputs
