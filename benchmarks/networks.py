"""The networks that speed and memory are measured on, sized for one CPU core or for one large GPU.

All are random: no time depends on what a weight is. Every input is a float tensor that wants a gradient, also where
the model would begin with an embedding, so that a frozen network has the same backward pass as an adapted one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network, its input and what is adapted in it.

    Attributes:
        build: makes the model, with random weights.
        shape: of the input.
        rank: FLoRA's r; every other method gets the rank at which it has as many parameters.
        targets: regular expression of the full names of the adapted modules, among convolutions and linear layers.
        arguments: makes further keyword arguments of the forward.
        keyword: the name under which the forward takes the input; None passes it first.
        channels_last: whether weights (before an adapter is attached) and input are stored with the channels last.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    targets: str = ".*"
    arguments: Callable[[], dict[str, Any]] = dict
    keyword: str | None = None
    channels_last: bool = False

    def model(self) -> nn.Module:
        """The network with all its weights frozen."""
        torch.manual_seed(0)
        model = self.build().to(DEVICE, DTYPE).requires_grad_(False)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def loss(self) -> Callable[[nn.Module], Tensor]:
        """Mean square of the model's output for one fixed input."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        given = {key: v.to(DEVICE, DTYPE) if isinstance(v, Tensor) else v for key, v in self.arguments().items()}

        def loss(model: nn.Module) -> Tensor:
            x.grad = None
            out = model(x, **given) if self.keyword is None else model(**{self.keyword: x}, **given)
            return (out if isinstance(out, Tensor) else out[0]).float().square().mean()

        return loss

    def target_names(self, model: nn.Module) -> list[str]:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return [n for n, m in model.named_modules() if isinstance(m, kinds) and re.fullmatch(self.targets, n)]


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = None
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is added, as in ResNet-50."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        shapes = ((before, inner, 1, 1), (inner, inner, 3, stride), (inner, width, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        self.shortcut = None
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y, inplace=True) if i < 2 else y
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


def resnet(widths: tuple[int, ...], depths: tuple[int, ...], block: type[nn.Module], *, small: bool) -> nn.Module:
    """A ResNet; `small` is CIFAR's stem (3x3, stride 1), otherwise ImageNet's (7x7, stride 2, pooling)."""
    first = 64 if block is Bottleneck else widths[0]
    layers: list[tuple[str, nn.Module]] = [("stem", nn.Conv2d(3, first, 3, 1, 1, bias=False))]
    if not small:
        layers = [("stem", nn.Conv2d(3, first, 7, 2, 3, bias=False))]
    layers += [("norm", nn.BatchNorm2d(first)), ("relu", nn.ReLU(inplace=True))]
    layers += [] if small else [("pool", nn.MaxPool2d(3, 2, 1))]
    before = first
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            stride = 2 if stage and not i else 1
            layers.append((f"stage{stage}_{i}", block(before, width, stride)))
            before = width
    layers += [("mean", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(before, 100))]
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model


class UNet3d(nn.Module):
    """The 3-D U-Net of medical images: two convolutions per level, skips, upsampling by repetition."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._double(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(self._double(low + high, low) for high, low in pairwise(reversed(widths)))
        self.head = nn.Conv3d(widths[0], 4, 1)

    @staticmethod
    def _double(before: int, width: int) -> nn.Module:
        def one(fan_in: int) -> list[nn.Module]:
            return [nn.Conv3d(fan_in, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(0.01)]

        return nn.Sequential(*one(before), *one(width))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.max_pool3d(x, 2))
            kept.append(x)
        x = kept.pop()
        for level in self.up:
            x = level(torch.cat((F.interpolate(x, scale_factor=2), kept.pop()), 1))
        return self.head(x)


def convnextv2(depths: list[int], sizes: list[int], image: int) -> nn.Module:
    return tf.ConvNextV2Model(tf.ConvNextV2Config(depths=depths, hidden_sizes=sizes, image_size=image))


def bert(layers: int) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.BertModel(tf.BertConfig(num_hidden_layers=layers, vocab_size=1000, **dropout), add_pooling_layer=False)


def llama(layers: int, hidden: int, intermediate: int, heads: int, length: int) -> nn.Module:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    config = tf.LlamaConfig(
        num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=length, use_cache=False, **sizes
    )
    return tf.LlamaModel(config)


def diffusion(size: int, widths: tuple[int, ...], context: int, layers: int) -> nn.Module:
    """Attention over a context at every level but the last, as in Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * (len(widths) - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (len(widths) - 1)),
        layers_per_block=layers,
        cross_attention_dim=context,
    )


def context(batch: int, width: int) -> dict[str, Any]:
    return {"timestep": 500, "encoder_hidden_states": torch.randn(batch, 77, width), "return_dict": False}


# Adapted is everything but what meets the image (an update of three channels is no smaller than they are) and heads.
INNER = r"(?!stem$|head$|.*patch_embeddings|.*conv_in$|.*conv_out$).*"
_18 = ((64, 128, 256, 512), (2, 2, 2, 2), Residual)
_50 = ((256, 512, 1024, 2048), (3, 4, 6, 3), Bottleneck)
_RESNET18 = Network(lambda: resnet(*_18, small=False), (8, 3, 96, 96), 16, INNER)

_CONVNEXT = Network(lambda: convnextv2([3, 3, 9, 3], [96, 192, 384, 768], 64), (8, 3, 64, 64), 8, INNER)


def _both(name: str, network: Network) -> dict[str, Network]:
    return {name: network, f"{name}-channels-last": replace(network, channels_last=True)}


CPU: dict[str, Network] = {
    "resnet20": Network(lambda: resnet((16, 32, 64), (3, 3, 3), Residual, small=True), (32, 3, 32, 32), 8, INNER),
    **_both("resnet18-32", Network(lambda: resnet(*_18, small=True), (32, 3, 32, 32), 16, INNER)),
    **_both("resnet18-96", _RESNET18),
    **_both("resnet18-128", replace(_RESNET18, shape=(4, 3, 128, 128))),
    "convnextv2": _CONVNEXT,
    "convnextv2-pointwise": replace(_CONVNEXT, targets=r".*\.pwconv[12]"),  # LoRA cannot adapt the depthwise 7x7
    "bert": Network(lambda: bert(4), (2, 128, 768), 8, keyword="inputs_embeds"),
    "llama": Network(lambda: llama(4, 1024, 2816, 16, 128), (2, 128, 1024), 8, keyword="inputs_embeds"),
    "unet3d": Network(UNet3d, (1, 1, 48, 48, 48), 8, INNER),
    "diffusion": Network(lambda: diffusion(32, (128, 256), 256, 1), (2, 4, 32, 32), 8, INNER, lambda: context(2, 256)),
}

# For a card with 80 GB or more, in bfloat16; what does not fit is recorded as the error that it raises.
GPU: dict[str, Network] = {
    **_both("resnet50", Network(lambda: resnet(*_50, small=False), (128, 3, 224, 224), 16, INNER)),
    "convnextv2-large": Network(
        lambda: convnextv2([3, 3, 27, 3], [192, 384, 768, 1536], 224), (64, 3, 224, 224), 16, INNER
    ),
    "bert": Network(lambda: bert(12), (64, 512, 768), 8, keyword="inputs_embeds"),
    "llama-7b-block": Network(lambda: llama(1, 4096, 11008, 32, 2048), (8, 2048, 4096), 16, keyword="inputs_embeds"),
    "unet3d": Network(lambda: UNet3d((32, 64, 128, 256)), (2, 1, 128, 128, 128), 8, INNER),
    "diffusion": Network(
        lambda: diffusion(64, (320, 640, 1280, 1280), 768, 2), (8, 4, 64, 64), 16, INNER, lambda: context(8, 768)
    ),
}

ON_GPU = torch.cuda.is_available()
NETWORKS, DEVICE, DTYPE = (GPU, "cuda", torch.bfloat16) if ON_GPU else (CPU, "cpu", torch.float32)
