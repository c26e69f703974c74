"""Tiny random models of real architectures, each with a batch; nothing is downloaded.

`MODELS` maps a row's name to a function that returns the model and the keyword arguments of its forward. Layers are few
and narrow, but of every kind that the full-size model has; what a configuration sets beyond sizes is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import tiny_generators
import tiny_images
import tiny_language
from tiny_parts import Built

MODELS: dict[str, Callable[[], Built]] = {
    "ConvNeXt V2": tiny_images.convnextv2,
    "ResNet": tiny_images.resnet,
    "MobileNetV2": tiny_images.mobilenetv2,
    "EfficientNet": tiny_images.efficientnet,
    "RegNet": tiny_images.regnet,
    "BiT": tiny_images.bit,
    "ViT": tiny_images.vit,
    "Swin V2": tiny_images.swinv2,
    "SegFormer": tiny_images.segformer,
    "DETR": tiny_images.detr,
    "RT-DETR": tiny_images.rt_detr,
    "SAM": tiny_images.sam,
    "DINOv2": tiny_images.dinov2,
    "CLIP": tiny_images.clip,
    "SigLIP": tiny_images.siglip,
    "VideoMAE": tiny_images.videomae,
    "Wav2Vec2": tiny_language.wav2vec2,
    "Whisper": tiny_language.whisper,
    "BERT": tiny_language.bert,
    "DeBERTa-v2": tiny_language.deberta_v2,
    "GPT-2": tiny_language.gpt2,
    "Llama": tiny_language.llama,
    "Qwen3": tiny_language.qwen3,
    "Mamba": tiny_language.mamba,
    "T5": tiny_language.t5,
    "Qwen3-MoE": tiny_language.qwen3_moe,
    "Mixtral": tiny_language.mixtral,
    "GPT-OSS": tiny_language.gpt_oss,
    "Llama 4": tiny_language.llama4,
    "DeepSeek-V3": tiny_language.deepseek_v3,
    "LLaVA": tiny_language.llava,
    "Qwen2.5-VL": tiny_language.qwen2_5_vl,
    "UNet, 2-D": tiny_generators.unet_2d,
    "UNet, 3-D": tiny_generators.unet_3d,
    "AutoencoderKL": tiny_generators.autoencoder_kl,
    "Wan VAE": tiny_generators.autoencoder_wan,
    "CogVideoX VAE": tiny_generators.autoencoder_cogvideox,
    "HunyuanVideo VAE": tiny_generators.autoencoder_hunyuan,
    "MONAI UNet, 3-D": tiny_generators.monai_unet,
    "MONAI DynUNet, 3-D": tiny_generators.monai_dynunet,
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
