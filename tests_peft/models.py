"""The models that PEFT's tests run on, tiny and random, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig
from torch import nn

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "vocab_size": 1000, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
BERT = {**SIZES, "vocab_size": 1000, "max_position_embeddings": 128}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}
BART = {
    "d_model": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # where the usual ones are outside of the small vocabulary

# Under the names that they have on the hub: a folder of that name in the working directory takes precedence.
HUB = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, tf.OPTConfig, OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, tf.GPT2Config, {**GPT2, **ENDS}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        tf.GPTJForCausalLM,
        tf.GPTJConfig,
        {**GPT2, **ENDS, "n_embd": 32, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config,
        {**LLAMA, **ENDS, "tie_word_embeddings": True},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        {**LLAMA, "head_dim": 8},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig,
        {**LLAMA, "intermediate_size_mlp": 32, "head_dim": 4, "num_local_experts": 4, "pad_token_id": 0, **ENDS},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        {**LLAMA, "head_dim": 4, "num_local_experts": 4, "pad_token_id": 0, **ENDS},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4, "vocab_size": 1000}
        | {"decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": (tf.BertModel, tf.BertConfig, BERT),
    "peft-internal-testing/tiny-random-RobertaModel": (tf.RobertaModel, tf.RobertaConfig, BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (tf.DebertaModel, tf.DebertaConfig, DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (tf.DebertaV2Model, tf.DebertaV2Config, DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        tf.BertForSequenceClassification,
        tf.BertConfig,
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig,
        BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig,
        {**LLAMA, "pad_token_id": 0},
    ),
}


def write_models(folder: Path) -> None:
    """Save the models of `HUB`, and the adapter that PEFT's tests of configurations read, under `folder`."""
    tf.utils.logging.disable_progress_bar()
    for name, (model, config, settings) in HUB.items():
        torch.manual_seed(0)
        model(config(**settings)).save_pretrained(folder / name)
    LoraConfig(base_model_name_or_path="tiny").save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")


class OneLayer(nn.Module):
    """A layer of a kind that PEFT's own models lack, between a reshape of PEFT's input (9, 10) and a classifier."""

    def __init__(self, shape: tuple[int, ...], layer: nn.Module, features: int) -> None:
        super().__init__()
        self.shape = shape
        self.conv = layer
        self.lin0 = nn.Linear(features, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = X.to(self.dtype).reshape(self.shape) / 45 - 1  # PEFT's inputs go up to 89
        return self.lin0(self.conv(X).relu().flatten(1)).log_softmax(dim=-1)


def _image(layer: nn.Module, features: int) -> OneLayer:
    return OneLayer((-1, 10, 3, 3), layer, features)


ONE_LAYER: dict[str, Callable[[], OneLayer]] = {
    "ConvTranspose1d": lambda: OneLayer((-1, 5, 2), nn.ConvTranspose1d(5, 6, 3, stride=2, output_padding=1), 36),
    "ConvTranspose2d": lambda: _image(nn.ConvTranspose2d(10, 6, 3, stride=2, padding=1), 150),
    "ConvTranspose2d of groups": lambda: _image(nn.ConvTranspose2d(10, 6, 3, groups=2), 150),
    "ConvTranspose3d": lambda: OneLayer((-1, 10, 1, 3, 3), nn.ConvTranspose3d(10, 4, (1, 2, 2)), 64),
    "dilated Conv2d": lambda: _image(nn.Conv2d(10, 6, 2, dilation=2, padding=1, padding_mode="reflect"), 54),
    "circular Conv2d": lambda: _image(nn.Conv2d(10, 6, 3, padding="same", padding_mode="circular"), 54),
    "depthwise Conv2d": lambda: _image(nn.Conv2d(10, 10, 3, padding=1, groups=10), 90),
    "strided Conv2d": lambda: _image(nn.Conv2d(10, 12, 3, stride=2, padding=1, bias=False), 48),
    "pointwise Conv3d": lambda: OneLayer((-1, 10, 1, 3, 3), nn.Conv3d(10, 6, 1), 54),
    "pointwise Conv1d": lambda: OneLayer((-1, 3, 10), nn.Conv1d(3, 10, 1), 100),
}
