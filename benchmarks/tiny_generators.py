"""Tiny random models of diffusers and MONAI, which are imported where they are used; see tiny_models.py.

Together with transformers they take seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import Built, images
from torch import Tensor


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
