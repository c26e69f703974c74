"""Tiny random models of images and videos; see tiny_models.py."""

from __future__ import annotations

import torch
import transformers as tf
from tiny_parts import TEXT, VISION, Built, images, tokens


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
