"""Mixed batches in whole models: generation, heads and tokens of the adapters' own, and what is refused."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig

NAMES = ["two", "__base__", "one", "two", "all"]
X = torch.tensor([[1, 5, 0, 8], [3, 3, 2, 0], [7, 1, 6, 4], [2, 8, 8, 1], [4, 4, 1, 5]])
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 12, "max_position_embeddings": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def of(model_class, config_class, **arguments):
    def build():
        torch.manual_seed(0)
        return model_class(config_class(**arguments)).eval()

    return build


bert = of(transformers.BertForSequenceClassification, transformers.BertConfig, num_labels=3, **SMALL)
llama = of(transformers.LlamaForCausalLM, transformers.LlamaConfig, num_key_value_heads=1, **SMALL, **TOKENS)
gpt2 = of(transformers.GPT2LMHeadModel, transformers.GPT2Config, vocab_size=20, n_embd=8, n_layer=2, n_head=2, **TOKENS)
t5 = of(
    transformers.T5ForConditionalGeneration, transformers.T5Config, vocab_size=20, d_model=8, d_kv=4, d_ff=12,
    num_layers=2, num_heads=2, decoder_start_token_id=0,
)  # fmt: skip
bart = of(
    transformers.BartForConditionalGeneration, transformers.BartConfig, vocab_size=20, d_model=8, encoder_layers=1,
    decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12,
    max_position_embeddings=32, decoder_start_token_id=2, forced_eos_token_id=2, **TOKENS,
)  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lin = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(input=torch.relu(self.lin(self.embed(x))).mean(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


def config(**arguments):
    return FloraConfig(**{"r": 3, "target_modules": "all-weights", "init_weights": False, **arguments})


def attach(base, one=None, two=None, **every):
    """A model in evaluation with the adapters one, two and all, of different ranks and scales."""
    model = get_peft_model(base, config(**{**every, **(one or {})}), adapter_name="one")
    model.add_adapter("two", config(**{"r": 2, "scale": -1.5, **every, **(two or {})}))
    model.add_adapter("all", config(**{"r": 9, "scale": 0.5, **every}))
    return model.eval()


def out(model, x=X, **kwargs):
    with torch.no_grad():
        y = model(x, **kwargs)
    return y if isinstance(y, torch.Tensor) else y.logits


def one_by_one(model, run=out, names=NAMES):
    """Sample by sample, what `run(model)` gives with only that sample's adapter active."""
    active, rows = model.active_adapter, []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model)[i])
        else:
            model.set_adapter(name)
            rows.append(run(model)[i])
    model.set_adapter(active)
    return torch.stack(rows)


def left_behind(model):
    """Hooks, and attributes that stand in for methods."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return hooks + [module for module in model.modules() if "forward" in vars(module)]


def generate(model, **arguments):
    given = {"input_ids": X, "attention_mask": torch.ones_like(X), "max_new_tokens": 5, "min_new_tokens": 5}
    return model.generate(**{**given, "do_sample": False, "pad_token_id": 0, **arguments}).unflatten(0, (len(X), -1))


class TestTransformers:
    @pytest.mark.parametrize("base", [bert, gpt2, llama])
    def test_forward(self, base):
        model = attach(base())
        expected = one_by_one(model)
        assert_close(out(model, adapter_names=NAMES), expected)
        assert not torch.allclose(expected, out(model))

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"num_beams": 4},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_beams": 3, "use_cache": False},
            {"generation_config": transformers.GenerationConfig(num_beams=3, max_new_tokens=5, **TOKENS)},
        ],
        ids=["greedy", "beams", "several sequences", "no cache", "config"],
    )
    @pytest.mark.parametrize("base", [gpt2, llama, t5, bart])
    def test_generate(self, base, arguments):
        targets = r".*\.(q|k|v|o|wi|wo)" if base is t5 else "all-weights"
        model = attach(base(), target_modules=targets, scale=3.0)
        expected = one_by_one(model, lambda m: generate(m, **arguments))
        assert torch.equal(generate(model, adapter_names=NAMES, **arguments), expected)
        assert not torch.equal(expected, generate(model, **arguments))
        assert left_behind(model) == []

    def test_several_samples_of_each(self):
        model = attach(llama(), scale=3.0)
        arguments = {"do_sample": True, "num_return_sequences": 3, "top_k": 1, "top_p": 1.0}
        expected = one_by_one(model, lambda m: generate(m, **arguments))
        assert torch.equal(generate(model, adapter_names=NAMES, **arguments), expected)

    @pytest.mark.parametrize("count", [4, 5])
    def test_not_with_adapted_distances(self, count):
        """T5 looks up one bias for all samples, by (query, key): with as many queries as samples it would fit."""
        model, x = attach(t5()), X[:count]
        with pytest.raises(
            NotImplementedError, match=r"adapted .*relative_attention_bias: what it looks up is the same"
        ):
            model(x, decoder_input_ids=x, adapter_names=NAMES[:count])
        assert left_behind(model) == []

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_torch_encoder_layers(self, batch_first):
        """Where the samples are on the second axis, there may be as many positions as samples."""
        block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        model, x = attach(nn.Sequential(block)), torch.randn(5, 5, 8)
        if batch_first:
            assert_close(out(model, x, adapter_names=NAMES), one_by_one(model, lambda m: out(m, x)))
        else:
            with pytest.raises(NotImplementedError, match=r"linear1: its block, without batch_first, has"):
                model(x, adapter_names=NAMES)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    @pytest.mark.parametrize("targets", ["all-weights", ["linear1", "linear2"]])
    def test_torch_encoder_with_padding(self, targets):
        """Which torch would cut out, by nesting the samples."""
        base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2)
        model, x = attach(base, target_modules=targets), torch.randn(5, 4, 8)
        padding = torch.arange(4) >= torch.tensor([[4], [2], [3], [1], [4]])
        expected = one_by_one(model, lambda m: out(m, x, src_key_padding_mask=padding))
        mixed = out(model, x, src_key_padding_mask=padding, adapter_names=NAMES)
        assert_close(mixed[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
        assert base.use_nested_tensor


class TestDifferentTargets:
    @pytest.mark.parametrize("names", [NAMES, ["one"] * 5, ["two", "one", "two", "one", "__base__"]])
    def test_on_some_layers_only(self, names):
        model = attach(bert(), one={"target_modules": ["query"]}, two={"target_modules": ["value", "word_embeddings"]})
        assert_close(out(model, adapter_names=names), one_by_one(model, names=names))

    def test_after_set_scale_and_with_several_active(self):
        model = attach(net())
        model.base_model.model.lin.set_scale("one", 3)
        expected = one_by_one(model)
        model.base_model.set_adapter(["one", "all"])
        assert_close(out(model, adapter_names=NAMES), expected)

    def test_on_no_gradient_and_on_some(self):
        model = attach(net())
        expected = out(model, adapter_names=NAMES)
        with torch.inference_mode():
            assert torch.equal(model(X, adapter_names=NAMES), expected)
        output = model(X, adapter_names=tuple(NAMES))
        assert torch.equal(output, expected)
        output[2].sum().backward()
        assert model.base_model.model.lin.tucker("one").core.grad.any()
        assert model.base_model.model.lin.tucker("two").core.grad is None


def with_own_heads(model):
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    return model


class TestBeside:
    HEAD = {"modules_to_save": ["head"], "target_modules": ["lin"]}

    @pytest.mark.parametrize("active", ["one", "two", "all"])
    @pytest.mark.parametrize("without", [{}, {"two": {"modules_to_save": None}}, {"one": {"modules_to_save": None}}])
    def test_heads(self, active, without):
        """A sample whose adapter has no head of its own gets the base's, whichever adapter is active."""
        model = with_own_heads(attach(net(), **self.HEAD, **without))
        expected = one_by_one(model)
        model.set_adapter(active)
        assert_close(out(model, adapter_names=NAMES), expected)
        assert left_behind(model) == []

    def test_a_head_of_a_transformers_model(self):
        model = with_own_heads(attach(bert(), modules_to_save=["classifier"]))
        assert_close(out(model, adapter_names=NAMES), one_by_one(model))

    @pytest.mark.parametrize("active", ["one", "two"])
    @pytest.mark.parametrize("base", [bert, gpt2])
    def test_tokens(self, base, active):
        every = {"target_modules": "all-linear", "trainable_token_indices": [3, 5]}
        model = with_own_heads(attach(base(), two={"trainable_token_indices": None}, **every))
        expected = one_by_one(model)
        model.set_adapter(active)
        assert_close(out(model, adapter_names=NAMES), expected)

    def test_another_length(self):
        model = attach(net(), modules_to_save=["head"], target_modules=["lin"])
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            model.base_model.model.head(torch.ones(3, 6), adapter_names=NAMES)
        with pytest.raises(ValueError, match=r"got 3 and 5 respectively"):
            out(model, adapter_names=NAMES[:3])


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "error", "message"),
        [
            (["zwei", "one", "eins", "one", "one"], ValueError, r"non-existing adapter\(s\): eins, zwei$"),
            ("one", TypeError, "adapter_names must be a list of one name per sample, got 'one'"),
            ({"one": 5}, TypeError, "adapter_names must be a list of one name per sample, got "),
            (["one", None, "two", "one", "one"], TypeError, "adapter_names must be a list of one name per sample"),
            (["one", "two"], ValueError, "Length of `adapter_names` .* got 2 and 5 respectively"),
            (["one"] * 6, ValueError, "Length of `adapter_names` .* got 6 and 5 respectively"),
            ([], ValueError, "Length of `adapter_names` .* got 0 and 5 respectively"),
            (["__base__"] * 4, ValueError, "Length of `adapter_names` .* got 4 and 5 respectively"),
        ],
    )
    def test_names(self, names, error, message):
        model = attach(net())
        expected = out(model)
        with pytest.raises(error, match=message):
            model(X, adapter_names=names)
        assert left_behind(model) == []
        assert torch.equal(out(model), expected)

    @pytest.mark.parametrize("names", [NAMES, ["__base__"] * 2])
    @pytest.mark.parametrize(
        ("base", "task", "run"),
        [
            (net, None, out),
            (gpt2, None, out),
            (bert, "SEQ_CLS", out),
            (llama, "CAUSAL_LM", out),
            (llama, "CAUSAL_LM", generate),
            (t5, None, generate),
        ],
    )
    def test_one_sample_for_several_adapters(self, base, task, run, names):
        """Inside of a model one sample stands for all where it is the same for all, as positions are."""
        model = attach(base(), task_type=task, target_modules=r".*\.(q|v)" if base is t5 else "all-weights")
        given = {"x": X[:1]} if run is out else {"input_ids": X[:1], "attention_mask": torch.ones_like(X[:1])}
        with pytest.raises(ValueError, match=rf"Length of `adapter_names` .* got {len(names)} and 1 respectively"):
            run(model, adapter_names=names, **given)
        assert left_behind(model) == []

    def test_in_train_mode(self):
        model = attach(net()).train()
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
            model(X, adapter_names=NAMES)
        assert_close(out(model.eval(), adapter_names=NAMES), one_by_one(model))

    def test_merged(self):
        model = attach(net(), two={"target_modules": ["lin"]})
        expected = one_by_one(model)
        model.merge_adapter(["two"])
        merged = out(model)
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
            model(X, adapter_names=NAMES)
        assert left_behind(model) == []
        assert torch.equal(out(model), merged)
        with pytest.warns(UserWarning, match="Already unmerged"):  # of the layers that "two" is not on
            model.unmerge_adapter()
        assert_close(out(model, adapter_names=NAMES), expected)

    @pytest.mark.parametrize("names", [NAMES, ["__base__"] * 5])
    def test_disabled(self, names):
        model = attach(net())
        with model.disable_adapter():
            assert torch.equal(out(model, adapter_names=names), out(net()))
        model.base_model.disable_adapter_layers()
        assert torch.equal(out(model, adapter_names=names), out(net()))

    def test_an_error_inside_leaves_nothing_behind(self):
        model = with_own_heads(attach(net(), modules_to_save=["head"], target_modules=["lin"]))
        expected = out(model)
        model.base_model.model.lin.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(X, adapter_names=NAMES)
        assert left_behind(model) == []
        model.base_model.model.lin._forward_hooks.clear()
        assert torch.equal(out(model), expected)
