"""What is adapted, what is left out and why; after an error the model is as it was."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

import florapeft
from florapeft import FloraConfig, FloraLayer
from florapeft.target_ranks import count_base_parameters
from florapeft.targets import find_targets, why_not


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.q(x) + self.k(x))


class Net(nn.Module):
    """Every kind of layer that is adapted, and some that are not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.stored = Conv1D(4, 4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.stored(self.up(self.conv(x.mT)).mT))


class Attention(nn.Module):
    """The last name is also the end of another one, which cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.out_proj, self.lin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.out_proj(self.lin(self.attn(x, x, x)[0]))


BLOCKS = [f"blocks.{n}.{name}" for n in range(3) for name in "qk"]
PLAIN = {"embed", *BLOCKS, "conv", "up", "stored", "head"}


def adapted(model, **config):
    """Names of the adapted modules."""
    model = get_peft_model(model, FloraConfig(r=2, **config)).base_model.model
    return {name for name, module in model.named_modules() if isinstance(module, FloraLayer)}


def snapshot(model):
    types = {name: type(module) for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    return types, grads, {key: value.clone() for key, value in model.state_dict().items()}


def assert_refused(model, message, works=("q",), **config):
    """The error, that nothing has changed in the model, and that it can be adapted afterwards."""
    types, grads, state = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, FloraConfig(r=2, **config))
    types_after, grads_after, state_after = snapshot(model)
    assert types_after == types
    assert grads_after == grads
    assert list(state_after) == list(state)
    assert all(torch.equal(state[key], state_after[key]) for key in state)
    assert not hasattr(model, "peft_config")
    if works:
        assert adapted(model, target_modules=list(works))


class TestSelection:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"target_modules": ["q"]}, {"blocks.0.q", "blocks.1.q", "blocks.2.q"}),
            ({"target_modules": ["blocks.1.q", "conv"]}, {"blocks.1.q", "conv"}),
            ({"target_modules": ["1.q"]}, {"blocks.1.q"}),
            ({"target_modules": "q"}, None),  # as a regular expression it is no full name
            ({"target_modules": r"blocks\.[12]\.(q|k)"}, {"blocks.1.q", "blocks.1.k", "blocks.2.q", "blocks.2.k"}),
            ({"target_modules": r".*\.q|head"}, {"blocks.0.q", "blocks.1.q", "blocks.2.q", "head"}),
            ({"target_modules": "all-weights"}, PLAIN),
            ({"target_modules": "ALL-Weights"}, PLAIN),
            ({"target_modules": "all-linear"}, {*BLOCKS, "stored", "head"}),
            ({"target_modules": "all-weights", "exclude_modules": ["q", "embed"]},
             {"blocks.0.k", "blocks.1.k", "blocks.2.k", "conv", "up", "stored", "head"}),
            ({"target_modules": "all-weights", "exclude_modules": r"blocks\..*|up"},
             {"embed", "conv", "stored", "head"}),
            ({"target_modules": "all-linear", "exclude_modules": r".*\.q"},
             {"blocks.0.k", "blocks.1.k", "blocks.2.k", "stored", "head"}),
            ({"target_modules": ["q", "k"], "exclude_modules": ["blocks.1.q"]}, {*BLOCKS} - {"blocks.1.q"}),
            ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "blocks"}, {"blocks.0.q"}),
            ({"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
             {"blocks.0.q", "blocks.2.q"}),
            ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}, {"blocks.1.q"}),
            ({"target_modules": "all-weights", "modules_to_save": ["head"]}, PLAIN - {"head"}),
            ({"target_modules": ["q", "head"], "modules_to_save": ["head"]},
             {"blocks.0.q", "blocks.1.q", "blocks.2.q"}),
            ({"target_modules": ["q", "k"], "ranks": {"blocks.0.q": [2, 2], "blocks.2.k": [1, 1]}},
             {"blocks.0.q", "blocks.2.k"}),
        ],
    )  # fmt: skip
    def test_of_a_plain_module(self, config, expected):
        if expected is None:
            assert_refused(Net(), r"Target modules 'q' not found in the base model", **config)
        else:
            assert adapted(Net(), **config) == expected

    @pytest.mark.parametrize(("layers", "expected"), [(0, {0}), ([0, 2], {0, 2})])
    def test_layers_without_a_pattern(self, layers, expected):
        """PEFT finds the number of a layer by itself where the list of layers is inside another module."""
        names = adapted(nn.ModuleDict({"model": Net()}), target_modules=["q"], layers_to_transform=layers)
        assert names == {f"model.blocks.{n}.q" for n in expected}

    def test_find_targets_changes_nothing_and_says_the_same(self):
        model = Net()
        types, _, state = snapshot(model)
        targets = find_targets(model, FloraConfig(target_modules="all-weights"))
        assert {target.name for target in targets} == PLAIN
        assert [target.shape for target in targets if target.name in ("up", "stored", "embed")] == [
            (9, 4), (4, 4, 2), (4, 4)
        ]  # fmt: skip
        assert snapshot(model)[0] == types
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "model_and_pattern", [("all-weights", Net), ("all-linear", Net), ("all-weights", Attention)]
    )
    def test_shorthands_are_saved_as_names(self, model_and_pattern, tmp_path):
        shorthand, build = model_and_pattern
        model = get_peft_model(build(), FloraConfig(r=2, target_modules=shorthand))
        model.save_pretrained(tmp_path)
        saved = FloraConfig.from_pretrained(tmp_path)
        assert saved.target_modules != shorthand
        assert adapted(build(), target_modules=saved.target_modules) == {
            name for name, module in model.base_model.model.named_modules() if isinstance(module, FloraLayer)
        }

    def test_many_names(self):
        """PEFT condenses long lists of names to suffixes; the same modules must be meant."""
        model = nn.ModuleDict({f"m{n}": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LayerNorm(2)}) for n in range(30)})
        assert adapted(model, target_modules="all-weights") == {f"m{n}.a" for n in range(30)}

    @pytest.mark.parametrize("layers", [1, 3])  # of three layers there are so many names that PEFT condenses them
    @pytest.mark.parametrize("is_whole", [False, True])
    @pytest.mark.parametrize("shorthand", ["all-weights", "all-linear"])
    def test_the_base_embedding_is_not_saved_along(self, layers, is_whole, shorthand, tmp_path):
        """Issue: PEFT saves the embedding in full where it finds its name, in a list or as what a text matches."""

        def build():
            torch.manual_seed(0)
            model = llama() if is_whole else llama().model
            config = copy.deepcopy(model.config)
            config.num_hidden_layers = layers
            model = type(model)(config)
            model.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "embed_tokens": nn.LayerNorm(8)})
            model.q_proj = nn.Linear(8, 8)  # other names end with this one
            return model

        model = get_peft_model(build(), FloraConfig(r=2, target_modules=shorthand, init_weights=False))
        name = "base_model.model.model.embed_tokens" if is_whole else "base_model.model.embed_tokens"
        assert isinstance(model.get_submodule(name), FloraLayer) is (shorthand == "all-weights")
        model.save_pretrained(tmp_path)
        assert all(".flora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        loaded, ids = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True), torch.tensor([[1, 2, 3]])
        assert torch.equal(loaded(ids)[0], model(ids)[0])
        loaded.save_pretrained(tmp_path / "again")
        assert all(".flora_" in key for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))

    def test_subclasses_that_compute_the_same_are_adapted(self):
        class Named(nn.Linear):
            pass

        assert adapted(nn.Sequential(Named(3, 3)), target_modules="all-weights") == {"0"}

    def test_one_module_in_two_places_is_one_target(self, tmp_path):
        def build():
            torch.manual_seed(0)
            twice, block = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))
            return nn.Sequential(twice, block, nn.ReLU(), twice, block).eval()

        x = torch.randn(2, 3)
        model = get_peft_model(build(), FloraConfig(r=2, target_modules="all-weights", init_weights=False))
        base = model.base_model.model
        assert base[0] is base[3]
        assert {name for name, module in base.named_modules() if isinstance(module, FloraLayer)} == {"0", "1.0"}
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(build(), tmp_path)(x), expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected)
        assert merged[0] is merged[3]
        assert type(merged[3]) is nn.Linear

    def test_shared_weights_are_left_out_by_shorthands_and_warned_of_by_name(self):
        def build():
            first, second = nn.Linear(3, 3), nn.Linear(3, 3)
            second.weight = first.weight
            return nn.Sequential(first, nn.ReLU(), second, nn.Linear(3, 3))

        assert adapted(build(), target_modules="all-weights") == {"3"}
        with pytest.warns(RuntimeWarning, match="a weight that another module has too, as 0 and 2"):
            assert adapted(build(), target_modules=["0"]) == {"0"}

    def test_a_misspelt_name_beside_a_head_gets_a_suggestion(self):
        model = nn.ModuleDict({"query": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
        with pytest.raises(ValueError, match=r"Target modules \['qery'\] not found .* Did you mean 'query'"):
            get_peft_model(model, FloraConfig(r=2, target_modules=["qery"], modules_to_save=["head"]))

    @pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
    def test_a_misspelt_name_beside_a_right_one_is_warned_of(self, field):
        model = nn.ModuleDict({"query": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
        fields = {"target_modules": ["query"], "modules_to_save": ["head"]}
        fields[field] = [*fields[field], "heda"]
        with pytest.warns(RuntimeWarning, match=f"{field} has names that no module has: heda. Did you mean 'head'"):
            get_peft_model(model, FloraConfig(r=2, **fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rank_pattern": {"qery": 1}}, r"rank_pattern has keys that match no target: \['qery'\]"),
            ({"scale_pattern": {"qery": 1.0}}, r"scale_pattern has keys that match no target: \['qery'\]"),
            ({"exclude_modules": ["qery", "classifier"]},
             r"exclude_modules has names that no module has: qery\. Did you mean 'query'\?"),
            ({"exclude_modules": "quer"},
             "exclude_modules='quer' matches no module: a string is a regular expression over full names"),
        ],
    )  # fmt: skip
    def test_what_matches_nothing_is_warned_of(self, fields, message, tmp_path):
        """By this package, whose warnings `flora` shows, and once; not when the adapter is loaded."""

        def build():
            return nn.ModuleDict({"query": nn.Linear(3, 3), "classifier": nn.Linear(3, 3)})

        config = FloraConfig(r=2, target_modules="all-weights", modules_to_save=["classifier"], **fields)
        with pytest.warns(RuntimeWarning, match=message) as found:
            model = get_peft_model(build(), config)
        assert [Path(warning.filename).parent for warning in found] == [Path(florapeft.__file__).parent]
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(build(), tmp_path)

    def test_excluding_parameters_is_no_mistake(self):
        model = nn.ModuleDict({"norm": nn.LayerNorm(3), "lin": nn.Linear(3, 3)})
        fields = {"target_modules": ["lin"], "target_parameters": ["norm.weight", "norm.bias"]}
        model = get_peft_model(model, FloraConfig(r=2, exclude_modules=["norm.bias"], **fields))
        model.add_adapter("other", FloraConfig(r=2, exclude_modules=r"norm\.bias", **fields))


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TOKENS = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert():
    config = transformers.BertConfig(**TINY, vocab_size=20, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def masked_bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, vocab_size=20, max_position_embeddings=16))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **TOKENS)
    )


def llama(tied=False):
    config = transformers.LlamaConfig(**TINY, **TOKENS, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def resnet():
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def convnext():
    config = transformers.ConvNextV2Config(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2)
    return transformers.ConvNextV2ForImageClassification(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, image_size=8, patch_size=4))


BERT_LAYER = {
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
}  # fmt: skip
BERT_LINEAR = {f"bert.encoder.layer.0.{name}" for name in BERT_LAYER}
GPT2_LINEAR = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
LLAMA_NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_NAMES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA_LINEAR = {f"model.layers.0.{name}" for name in LLAMA_NAMES}
RESNET = {
    "resnet.embedder.embedder.convolution",
    "resnet.encoder.stages.0.layers.0.layer.0.convolution",
    "resnet.encoder.stages.0.layers.0.layer.1.convolution",
    "resnet.encoder.stages.1.layers.0.shortcut.convolution",
    "resnet.encoder.stages.1.layers.0.layer.0.convolution",
    "resnet.encoder.stages.1.layers.0.layer.1.convolution",
}
CONVNEXT = {
    "convnextv2.embeddings.patch_embeddings",
    "convnextv2.encoder.stages.0.layers.0.dwconv",
    "convnextv2.encoder.stages.0.layers.0.pwconv1",
    "convnextv2.encoder.stages.0.layers.0.pwconv2",
    "convnextv2.encoder.stages.1.downsampling_layer.1",
    "convnextv2.encoder.stages.1.layers.0.dwconv",
    "convnextv2.encoder.stages.1.layers.0.pwconv1",
    "convnextv2.encoder.stages.1.layers.0.pwconv2",
}
VIT = {
    "vit.embeddings.patch_embeddings.projection",
    "vit.layers.0.attention.q_proj",
    "vit.layers.0.attention.k_proj",
    "vit.layers.0.attention.v_proj",
    "vit.layers.0.attention.o_proj",
    "vit.layers.0.mlp.fc1",
    "vit.layers.0.mlp.fc2",
}
BERT_EMBEDDINGS = {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"}


class TestTransformers:
    """Left out by "all-weights": norms, classifier heads, the output embedding and what is tied to it."""

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (bert, {*BERT_LINEAR, *BERT_EMBEDDINGS, "bert.embeddings.word_embeddings", "bert.pooler.dense"}),
            (masked_bert, {*BERT_LINEAR, *BERT_EMBEDDINGS, "cls.predictions.transform.dense"}),
            (gpt2, {*GPT2_LINEAR, "transformer.wpe"}),
            (llama, {*LLAMA_LINEAR, "model.embed_tokens"}),
            (lambda: llama(tied=True), LLAMA_LINEAR),
            (resnet, RESNET),
            (convnext, CONVNEXT),
            (vit, VIT),
        ],
        ids=["bert", "masked bert", "gpt2", "llama", "tied llama", "resnet", "convnext", "vit"],
    )
    def test_all_weights(self, build, expected):
        assert adapted(build(), target_modules="all-weights") == expected

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (bert, {*BERT_LINEAR, "bert.pooler.dense"}),
            (gpt2, GPT2_LINEAR),
            (llama, LLAMA_LINEAR),
            (resnet, None),
        ],
    )
    def test_all_linear(self, build, expected):
        if expected is None:  # no linear layer but the head, which PEFT leaves out for this task
            with pytest.raises(ValueError, match="No modules were targeted for adaptation"):
                adapted(build(), target_modules="all-linear", task_type="SEQ_CLS")
        else:
            assert adapted(build(), target_modules="all-linear", task_type="SEQ_CLS") == expected

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (bert, {"bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.value"}),
            (gpt2, {"transformer.h.0.attn.c_attn"}),
            (llama, {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}),
        ],
    )
    def test_none_is_pefts_table(self, build, expected):
        assert adapted(build()) == expected

    def test_none_for_a_model_that_peft_does_not_know(self):
        message = (
            "Please specify `target_modules`: it is None, and PEFT has no default for models of type 'resnet'. "
            "target_modules='all-weights' adapts every supported layer"
        )
        assert_refused(resnet(), message, works=["convolution"])

    def test_none_for_a_plain_module(self):
        assert_refused(Net(), "Please specify `target_modules`")

    @pytest.mark.parametrize(("build", "head"), [(bert, "classifier"), (vit, "classifier"), (resnet, "classifier")])
    def test_heads_are_for_modules_to_save(self, build, head):
        model = get_peft_model(build(), FloraConfig(r=2, target_modules="all-weights", modules_to_save=[head]))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any(f"{head}.modules_to_save" in name for name in trainable)
        assert not any("flora_" in name for name in trainable if head in name)

    @pytest.mark.parametrize("tokens", [[1], {"embed_tokens": [1]}])
    def test_an_embedding_whose_rows_are_trained_is_left_out(self, tokens):
        assert adapted(llama(), target_modules="all-weights", trainable_token_indices=tokens) == LLAMA_LINEAR

    def test_linear_layers_whose_rows_are_trained_are_left_out(self):
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        assert adapted(model, target_modules="all-linear", trainable_token_indices={"b": [1]}) == {"a"}

    def test_an_embedding_whose_rows_are_trained_is_refused_by_name(self):
        message = "trainable_token_indices: model.embed_tokens has an adapter, by target_modules or another adapter's"
        fields = {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": [1]}
        assert_refused(llama(), message, ["q_proj"], **fields)

    def test_rows_of_an_embedding_that_another_adapter_has_are_refused(self):
        model = get_peft_model(llama(), FloraConfig(r=2, target_modules=["embed_tokens"]))
        before = snapshot(model)[:2]
        with pytest.raises(ValueError, match=r"trainable_token_indices: model.embed_tokens has an adapter"):
            model.add_adapter("other", FloraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]))
        assert snapshot(model)[:2] == before


REFUSED = {
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm rewrites the base weight in forward"),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 4)), r"computed from other parameters \(a parametrization\)"),
    "spectral norm": (
        lambda: spectral_norm(nn.Conv2d(4, 4, 3)),
        r"computed from other parameters \(a parametrization\)",
    ),
    "lazy": (lambda: nn.LazyLinear(4), "its weight is not initialised yet: run the model once before"),
    "empty": (lambda: nn.Embedding(0, 4), r"its weight is empty \(shape \(0, 4\)\)"),
    "empty attention": (
        lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=0),
        r"its v_proj_weight is empty \(shape \(4, 0\)\)",
    ),
    "norm": (lambda: nn.LayerNorm(4), "a LayerNorm is not a supported kind"),
    "recurrent": (lambda: nn.LSTM(4, 4), "a LSTM is not a supported kind"),
    "container": (lambda: nn.Sequential(nn.Linear(4, 4)), "a Sequential is not a supported kind"),
}


def beside(module):
    return nn.ModuleDict({"q": nn.Linear(4, 4), "odd": module})


class TestRefused:
    @pytest.mark.parametrize("name", [name for name in REFUSED if name != "lazy"])
    def test_by_name(self, name):
        build, reason = REFUSED[name]
        message = (
            rf"target_modules=\['odd', 'q'\] matches 1 target that FLoRA cannot adapt: odd \(.*{reason}.*\)\. "
            "Supported kinds: Linear, Conv1D, Conv1d, Conv2d, Conv3d, ConvTranspose1d, .*, Embedding"
        )
        assert_refused(beside(build()), message, target_modules=["q", "odd"])

    @pytest.mark.parametrize("shorthand", ["all-weights", "all-linear"])
    @pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("lazy", "container", "empty attention")])
    def test_shorthands_leave_it_out(self, name, shorthand):
        assert adapted(beside(REFUSED[name][0]()), target_modules=shorthand) == {"q"}

    def test_lazy(self):
        module = nn.LazyLinear(4)
        assert why_not("odd", module, beside(module)) == REFUSED["lazy"][1]

    def test_multihead_attention(self):
        """Its projection is read, never called; here its name also ends like that of a layer that is adapted."""
        assert adapted(Attention(), target_modules="all-linear") == {"out_proj", "lin", "attn.out_proj"}
        assert adapted(Attention(), target_modules="all-weights") == {"out_proj", "lin", "attn"}
        message = r"1 target that FLoRA cannot adapt: attn.out_proj \(it is a part of attn, which is adapted as a whole"
        assert_refused(Attention(), message, ["lin"], target_modules=["attn", "attn.out_proj"])

    def test_several(self):
        message = r"matches 3 targets that FLoRA cannot adapt: .*norm \(a LayerNorm is not a supported kind\)"
        assert_refused(Net(), message, target_modules=["norm", "q"])

    def test_another_adapter_for_a_refused_layer(self):
        model = get_peft_model(Attention(), FloraConfig(r=2, target_modules=["lin"]))
        with pytest.raises(ValueError, match=r"matches 1 target that FLoRA cannot adapt: attn.out_proj"):
            model.add_adapter("other", FloraConfig(r=2, target_modules=["attn.out_proj", "attn"]))
        assert list(model.peft_config) == ["default"]
        model.add_adapter("other", FloraConfig(r=2, target_modules=["lin"]))


class TestTensorParallel:
    @pytest.mark.parametrize("how", ["transformers", "megatron", "mesh"])
    def test_is_refused(self, how):
        model = Net()
        if how == "transformers":
            model.head._hf_tp_plan = "colwise"
        elif how == "megatron":
            model.head.weight.tensor_model_parallel = True
        else:
            model.head.weight.device_mesh = SimpleNamespace(mesh_dim_names=("dp", "tp"))
        message = (
            r"head \(its weight is cut over several processes \(tensor parallelism\), which FLoRA does not support\)"
        )
        assert_refused(model, message, target_modules=["head"])

    def test_fsdp_alone_is_none(self):
        model = Net()
        model.head.weight.device_mesh = SimpleNamespace(mesh_dim_names=("dp",))
        assert adapted(model, target_modules=["head"]) == {"head"}


class TestNothingMatches:
    @pytest.mark.parametrize(
        ("targets", "hint"),
        [
            (["haed"], r"Target modules \['haed'\] not found in the base model\. Did you mean 'head'"),
            (["blocks.0.qq"], r"\['blocks.0.qq'\] not found in the base model\. Did you mean 'blocks.0.q'"),
            (["convv"], r"Did you mean 'conv'"),
            (["decoder.embed"], r"Did you mean 'embed'"),
            ("stord", r"'stord' not found in the base model: a string is a .* over full names\. Did you mean 'stored'"),
            ("q", r"'q' not found in the base model: a string is a regular expression over full names; for a name give "
             r"a list: \['q'\]$"),
            ([f"m{n:02}" for n in range(20)], r"Target modules \['m00', .*, 'm07'\] and 12 more not found in the base"),
            ("|".join(f"m{n:02}" for n in range(80)), r"Target modules 'm00.*m49… \(121 more characters\) not found"),
            (["zzzzzz"], r"Target modules \['zzzzzz'\] not found in the base model$"),
            ([], r"Target modules \[\] not found in the base model$"),
        ],
    )  # fmt: skip
    def test_suggestions(self, targets, hint):
        assert_refused(Net(), hint, target_modules=targets)

    def test_layers_that_do_not_exist(self):
        message = r"\['q'\] not found in the base model with layers_to_transform=\[7\]"
        assert_refused(Net(), message, target_modules=["q"], layers_to_transform=[7])

    @pytest.mark.parametrize("targets", [["0"], "all-weights", "all-linear"])
    def test_only_unsupported_layers(self, targets):
        model = nn.Sequential(nn.LayerNorm(4), nn.LSTM(4, 4), nn.ReLU())
        message = "LayerNorm.*Supported(?: kinds)?: Linear, Conv1D, Conv1d, Conv2d, Conv3d, .*, Embedding"
        assert_refused(model, message, works=(), target_modules=targets)

    def test_everything_is_excluded(self):
        assert_refused(Net(), "No modules were targeted for adaptation", target_modules=["q"], exclude_modules=["q"])

    def test_ranks_that_name_an_unknown_module(self):
        message = r"ranks names 1 module that this model does not have, .*: blocks.0.w\. Did you mean 'blocks.0.q'"
        assert_refused(Net(), message, target_modules=["q", "k"], ranks={"blocks.0.w": [1, 1]})

    def test_adding_an_adapter_that_matches_nothing(self):
        model = get_peft_model(Net(), FloraConfig(r=2, target_modules=["q"]))
        before = snapshot(model)[:2]
        with pytest.raises(ValueError, match="Did you mean 'head'"):
            model.add_adapter("other", FloraConfig(r=2, target_modules=["haed"]))
        assert snapshot(model)[:2] == before
        assert list(model.peft_config) == ["default"]


class TestCount:
    def test_of_a_base_without_its_adapters(self):
        model = Net()
        count = sum(p.numel() for p in model.parameters())
        assert count_base_parameters(model) == count
        get_peft_model(model, FloraConfig(r=2, target_modules="all-weights"))
        assert count_base_parameters(model) == count

    def test_of_tied_weights(self):
        assert count_base_parameters(gpt2()) == sum({id(p): p.numel() for p in gpt2().parameters()}.values())
        tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        tied[1].weight = tied[0].weight
        assert count_base_parameters(tied) == 9
