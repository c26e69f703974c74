"""Tiny random models of real architectures, each with a batch; nothing is downloaded.

`MODELS` maps a row's name to a function that returns the model and the keyword arguments of its forward. Layers are few
and narrow, but of every kind that the full-size model has; what a configuration sets beyond sizes is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]

# Sizes that most text configurations name alike.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "use_cache": False}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(length: int = 12, batch: int = 2) -> Tensor:
    """Token ids that occur in every configuration here; 0 to 3 are left to special tokens."""
    return torch.randint(4, 64, (batch, length))


# Images


def convnextv2() -> Built:
    config = tf.ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    return tf.ConvNextV2ForImageClassification(config), {"pixel_values": images(32)}


def _resnet_config() -> tf.ResNetConfig:
    return tf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def resnet() -> Built:
    return tf.ResNetForImageClassification(_resnet_config()), {"pixel_values": images(32)}


def mobilenetv2() -> Built:
    # 32 times smaller at its end: of one position, two images would make a batch norm's variance next to nothing.
    config = tf.MobileNetV2Config(image_size=96, depth_multiplier=0.25)
    return tf.MobileNetV2ForImageClassification(config), {"pixel_values": images(96)}


def efficientnet() -> Built:
    config = tf.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
        # the first three of seven stages: a depthwise one, one with stride 2, one with 5 x 5 kernels
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        depthwise_padding=[],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 6, 6],
    )
    return tf.EfficientNetForImageClassification(config), {"pixel_values": images(32)}


def regnet() -> Built:
    config = tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    return tf.RegNetForImageClassification(config), {"pixel_values": images(32)}


def vit() -> Built:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION)), {"pixel_values": images(16)}


def swinv2() -> Built:
    config = tf.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4)
    return tf.Swinv2ForImageClassification(config), {"pixel_values": images(16)}


def bit() -> Built:
    config = tf.BitConfig(
        embedding_size=8, num_groups=4, hidden_sizes=[16, 32], depths=[1, 1], layer_type="preactivation"
    )
    return tf.BitForImageClassification(config), {"pixel_values": images(32)}


def segformer() -> Built:
    config = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return tf.SegformerForSemanticSegmentation(config), {"pixel_values": images(32)}


def detr() -> Built:
    config = tf.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=_resnet_config(),
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_queries=5,
    )
    return tf.DetrForObjectDetection(config), {"pixel_values": images(64)}


def rt_detr() -> Built:
    config = tf.RTDetrConfig(
        backbone_config=tf.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 32],
        encoder_ffn_dim=24,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=24,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=4,
    )
    return tf.RTDetrForObjectDetection(config), {"pixel_values": images(64)}


def sam() -> Built:
    config = tf.SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_dim": 24,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    inputs = {
        "pixel_values": images(32),
        "input_points": torch.rand(2, 1, 2, 2) * 32,
        "input_labels": torch.tensor([[[1, 0]], [[1, 1]]]),
        "input_masks": torch.rand(2, 1, 16, 16),
    }
    return tf.SamModel(config), inputs


def dinov2() -> Built:
    config = tf.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    return tf.Dinov2ForImageClassification(config), {"pixel_values": images(16)}


def clip() -> Built:
    config = tf.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1},
        vision_config=VISION,
        projection_dim=16,
    )
    return tf.CLIPModel(config), {"pixel_values": images(16), "input_ids": tokens()}


def siglip() -> Built:
    config = tf.SiglipConfig(
        text_config=TEXT | {"projection_size": 16, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1},
        vision_config=VISION,
    )
    return tf.SiglipModel(config), {"pixel_values": images(16), "input_ids": tokens()}


def videomae() -> Built:
    config = tf.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2)
    return tf.VideoMAEForVideoClassification(config), {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


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


# diffusers and MONAI, imported where they are used: with transformers they take seconds


def unet_2d() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return model, _denoising(torch.randn(2, 4, 8, 8))


def unet_3d() -> Built:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return model, _denoising(torch.randn(2, 4, 2, 8, 8))


def _denoising(sample: Tensor) -> dict[str, Any]:
    states = torch.randn(2, 4, 16)
    return {"sample": sample, "timestep": torch.tensor([3, 7]), "encoder_hidden_states": states}


def autoencoder_kl() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return model, {"sample": images(16)}


def autoencoder_wan() -> Built:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    return model, {"sample": torch.randn(1, 3, 5, 16, 16)}


def autoencoder_cogvideox() -> Built:
    from diffusers import AutoencoderKLCogVideoX

    model = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )
    return model, {"sample": torch.randn(1, 3, 5, 16, 16)}


def autoencoder_hunyuan() -> Built:
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return model, {"sample": torch.randn(1, 3, 5, 16, 16)}


def monai_unet() -> Built:
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(4, 8, 16),
        strides=(2, 2),
        num_res_units=1,
        norm="batch",
    )
    return model, {"x": torch.randn(2, 1, 8, 8, 8)}


def monai_dynunet() -> Built:
    from monai.networks.nets import DynUNet

    model = DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 16],
    )
    return model, {"x": torch.randn(2, 1, 8, 8, 8)}


MODELS: dict[str, Callable[[], Built]] = {
    "ConvNeXt V2": convnextv2,
    "ResNet": resnet,
    "MobileNetV2": mobilenetv2,
    "EfficientNet": efficientnet,
    "RegNet": regnet,
    "BiT": bit,
    "ViT": vit,
    "Swin V2": swinv2,
    "SegFormer": segformer,
    "DETR": detr,
    "RT-DETR": rt_detr,
    "SAM": sam,
    "DINOv2": dinov2,
    "CLIP": clip,
    "SigLIP": siglip,
    "VideoMAE": videomae,
    "Wav2Vec2": wav2vec2,
    "Whisper": whisper,
    "BERT": bert,
    "DeBERTa-v2": deberta_v2,
    "GPT-2": gpt2,
    "Llama": llama,
    "Qwen3": qwen3,
    "Mamba": mamba,
    "T5": t5,
    "Qwen3-MoE": qwen3_moe,
    "Mixtral": mixtral,
    "GPT-OSS": gpt_oss,
    "Llama 4": llama4,
    "DeepSeek-V3": deepseek_v3,
    "LLaVA": llava,
    "Qwen2.5-VL": qwen2_5_vl,
    "UNet, 2-D": unet_2d,
    "UNet, 3-D": unet_3d,
    "AutoencoderKL": autoencoder_kl,
    "Wan VAE": autoencoder_wan,
    "CogVideoX VAE": autoencoder_cogvideox,
    "HunyuanVideo VAE": autoencoder_hunyuan,
    "MONAI UNet, 3-D": monai_unet,
    "MONAI DynUNet, 3-D": monai_dynunet,
}

# Adapters that no output depends on, however long one trains: a pattern of their names, and what they are.
UNUSED: dict[str, tuple[str, str]] = {
    "DETR": (
        r"model\.decoder\.layers\.0\.self_attn\.[qkv]_proj",
        "queries, keys and values of the decoder's first self-attention, which starts from zeros: all values are equal",
    ),
    "RT-DETR": (r"model\.denoising_class_embed", "the embedding of noisy labels, called only in training with labels"),
    "SAM": (
        r"mask_decoder\.output_hypernetworks_mlps\.0\.|prompt_encoder\.(no_mask_embed|point_embed\.[23])",
        "the first of the four mask heads, which is for `multimask_output=False`, and what stands for prompts that are "
        "not given (boxes, no mask)",
    ),
}
