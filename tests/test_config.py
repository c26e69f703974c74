"""FloraConfig: defaults, bad input, and the file it is saved to."""

import json

import pytest
from peft import PeftConfig, PeftType, TaskType

from florapeft import FloraConfig

DEFAULTS = {
    "r": 8,
    "kernel_r": None,
    "budget": None,
    "allocation": "uniform",
    "ranks": None,
    "scale": 1.0,
    "flora_dropout": 0.0,
    "init_weights": True,
    "target_modules": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "scale_pattern": {},
    "bias": "none",
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "format_version": 1,
}


@pytest.mark.parametrize(("name", "default"), list(DEFAULTS.items()))
def test_defaults(name, default):
    value = getattr(FloraConfig(), name)
    assert value == default
    assert type(value) is type(default)


def test_type():
    config = FloraConfig()
    assert config.peft_type is PeftType.FLORA
    assert config.peft_type == "FLORA"
    assert isinstance(config, PeftConfig)


def test_patterns_are_not_shared():
    FloraConfig().rank_pattern["a"] = 1
    assert FloraConfig().rank_pattern == {}


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 1},
        {"r": [8, 8, 3, 3]},
        {"r": (8, 4)},
        {"kernel_r": 1},
        {"budget": 1},
        {"budget": 0.5},
        {"budget": 0.5, "r": 8},  # the default, spelt out
        {"budget": 0.5, "kernel_r": 2},
        {"budget": 1000, "r": 16, "ranks": {"a": [2, 2]}},  # with ranks, a budget is only a record
        {"ranks": {"a.b": [1, 2, 3]}},
        {"scale": 4},
        {"scale": -0.5},
        {"flora_dropout": 0.99},
        {"init_weights": False},
        {"init_weights": "released"},
        {"init_weights": "variance"},
        {"init_weights": "zero_output"},
        {"bias": "all"},
        {"bias": "flora_only"},
        {"target_modules": "all-weights"},
        {"target_modules": ["a", "b"], "layers_to_transform": 0},
        {"target_modules": ["a"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        {"target_modules": ["a"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"trainable_token_indices": [0, 3]},
        {"trainable_token_indices": {"embed": [0, 3]}},
        {"modules_to_save": []},
        {"layers_to_transform": [0]},  # with PEFT's table, which holds lists
    ],
)
def test_good_input(arguments):
    config = FloraConfig(**arguments)
    for name, value in arguments.items():
        assert getattr(config, name) == (set(value) if name == "target_modules" and isinstance(value, list) else value)


RANK = "must be a positive integer or one per mode, got "


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, f"r {RANK}0"),
        ({"r": -3}, ValueError, f"r {RANK}-3"),
        ({"r": []}, ValueError, rf"r {RANK}\[\]"),
        ({"r": [4, 0]}, ValueError, rf"r {RANK}\[4, 0\]"),
        ({"r": 2.0}, TypeError, f"r {RANK}2.0"),
        ({"r": True}, TypeError, f"r {RANK}True"),
        ({"r": "8"}, TypeError, f"r {RANK}'8'"),
        ({"r": None}, TypeError, f"r {RANK}None"),
        ({"r": [4, 2.5]}, TypeError, rf"r {RANK}\[4, 2.5\]"),
        ({"r": float("nan")}, TypeError, f"r {RANK}nan"),
        ({"kernel_r": 0}, ValueError, f"kernel_r {RANK}0"),
        ({"kernel_r": [3, 3]}, TypeError, r"kernel_r must be a positive integer or None, got \[3, 3\]"),
        ({"kernel_r": True}, TypeError, "kernel_r must be a positive integer"),
        ({"kernel_r": "3"}, TypeError, "kernel_r must be a positive integer or None, got '3'"),
        ({"rank_pattern": {"q": 0}}, ValueError, rf"rank_pattern\['q'\] {RANK}0"),
        ({"rank_pattern": {"q": "4"}}, TypeError, rf"rank_pattern\['q'\] {RANK}'4'"),
        ({"ranks": {"q": [2, -2]}}, ValueError, rf"ranks\['q'\] {RANK}\[2, -2\]"),
        ({"ranks": {"q": [2, 1.5]}}, TypeError, rf"ranks\['q'\] {RANK}\[2, 1.5\]"),
        ({"budget": 0}, ValueError, "budget as a count must be at least 1, got 0"),
        ({"budget": -5}, ValueError, "budget as a count must be at least 1, got -5"),
        ({"budget": 0.0}, ValueError, "budget as a share of the base model must be between 0 and 1, got 0.0"),
        ({"budget": 1.0}, ValueError, "budget as a share of the base model must be between 0 and 1, got 1.0"),
        ({"budget": float("nan")}, ValueError, "budget as a share of the base model must be between 0 and 1, got nan"),
        ({"budget": True}, TypeError, r"budget must be a parameter count \(int\) or a share \(float\), got True"),
        ({"budget": "10%"}, TypeError, r"budget must be a parameter count \(int\) or a share \(float\), got '10%'"),
        ({"budget": 0.1, "r": 16}, ValueError, "budget=0.1 and r=16 contradict each other"),
        ({"budget": 0.1, "r": [8, 8]}, ValueError, r"budget=0.1 and r=\[8, 8\] contradict each other"),
        ({"budget": 99, "rank_pattern": {"q": 2}}, ValueError, "budget=99 and rank_pattern={'q': 2} contradict each"),
        ({"allocation": "greedy"}, ValueError, r"allocation must be one of \['uniform', 'spectrum'\], got 'greedy'"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
        ({"scale": "1"}, ValueError, "scale must be a finite number, got '1'"),
        ({"scale": True}, ValueError, "scale must be a finite number, got True"),
        ({"scale": None}, ValueError, "scale must be a finite number, got None"),
        ({"scale_pattern": {"q": float("nan")}}, ValueError, r"scale_pattern\['q'\] must be a finite number, got nan"),
        ({"flora_dropout": 1.0}, ValueError, r"flora_dropout must be a number in \[0, 1\), got 1.0"),
        ({"flora_dropout": -0.1}, ValueError, r"flora_dropout must be a number in \[0, 1\), got -0.1"),
        ({"flora_dropout": float("nan")}, ValueError, r"flora_dropout must be a number in \[0, 1\), got nan"),
        ({"flora_dropout": "0.1"}, ValueError, r"flora_dropout must be a number in \[0, 1\), got '0.1'"),
        (
            {"init_weights": "pissa"},
            ValueError,
            r"init_weights must be True, False or one of \['released', 'variance', 'zero_output', 'gradient'\], got",
        ),
        ({"init_weights": None}, ValueError, "init_weights must be True, False or one of .*, got None"),
        ({"bias": "lora_only"}, ValueError, r"bias must be one of \['none', 'all', 'flora_only'\], got 'lora_only'"),
        (
            {"target_modules": "all-linear", "layers_to_transform": 0},
            ValueError,
            "layers_to_transform works with target_modules as a list of names; "
            "here target_modules is the string 'all-linear'",
        ),
        (
            {"target_modules": ".*q", "layers_to_transform": [1], "layers_pattern": "h"},
            ValueError,
            "layers_to_transform works with target_modules as a list",
        ),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            ValueError,
            "layers_pattern needs layers_to_transform, which is None",
        ),
        *(
            (arguments, ValueError, rf"{next(iter(arguments))}: '\*\.q' is no regular expression: nothing to repeat")
            for arguments in (
                {"target_modules": "*.q"},
                {"exclude_modules": "*.q"},
                {"rank_pattern": {"*.q": 2}},
                {"scale_pattern": {"*.q": 2.0}},
                {"modules_to_save": ["head", "*.q"]},
            )
        ),
        (
            {"format_version": 2},
            ValueError,
            "this adapter was saved in format version 2; this florapeft reads 1 to 1: upgrade florapeft to load it",
        ),
        ({"format_version": 0}, ValueError, "this adapter was saved in format version 0; this florapeft reads 1 to 1"),
        ({"format_version": "1"}, TypeError, "format_version must be of type int, got '1'"),
        ({"format_version": True}, TypeError, "format_version must be of type int, got True"),
        ({"rank_pattern": [4]}, TypeError, r"rank_pattern must be of type dict, got \[4\]"),
        ({"scale_pattern": 2.0}, TypeError, "scale_pattern must be of type dict, got 2.0"),
        ({"ranks": [("q", 2)]}, TypeError, "ranks must be of type dict or None, got "),
        ({"target_modules": 3}, TypeError, "target_modules must be of type list or .*, got 3"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must be of type list or .*, got 3"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be of type list or .*, got '1'"),
        ({"layers_to_transform": True}, TypeError, "layers_to_transform must be of type list or .*, got True"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be of type list or .* or None, got 'head'"),
        ({"modules_to_save": [0]}, TypeError, "modules_to_save must hold names, got 0"),
        ({"target_modules": ""}, TypeError, "target_modules must hold names, got ''"),
        ({"target_modules": ["q", 1]}, TypeError, "target_modules must hold names, got 1"),
        ({"exclude_modules": [None]}, TypeError, "exclude_modules must hold names, got None"),
        ({"target_parameters": [3]}, TypeError, "target_parameters must hold names, got 3"),
        ({"rank_pattern": {1: 2}}, TypeError, "rank_pattern must hold names, got 1"),
        ({"scale_pattern": {1: 2.0}}, TypeError, "scale_pattern must hold names, got 1"),
        ({"ranks": {1: [2]}}, TypeError, "ranks must hold names, got 1"),
        (
            {"layers_to_transform": [0], "layers_pattern": 3},
            TypeError,
            "layers_pattern must be of type list or tuple or set or str or None, got 3",
        ),
        ({"layers_to_transform": ["0"]}, TypeError, "layers_to_transform must hold indices, got '0'"),
        (
            {"trainable_token_indices": 3},
            TypeError,
            "trainable_token_indices must be of type list or tuple or dict or None, got 3",
        ),
        ({"trainable_token_indices": ["3"]}, TypeError, "trainable_token_indices must hold indices, got '3'"),
        ({"trainable_token_indices": {"e": 3}}, TypeError, "trainable_token_indices must hold lists of indices, got 3"),
        ({"trainable_token_indices": {0: [3]}}, TypeError, "trainable_token_indices must hold names as keys, got 0"),
        ({"init_weights": 0}, ValueError, "init_weights must be True, False or one of .*, got 0"),
        ({"init_weights": 1}, ValueError, "init_weights must be True, False or one of .*, got 1"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        FloraConfig(**arguments)


class TestFile:
    FULL = {
        "r": [8, 4],
        "kernel_r": 2,
        "ranks": {"a.b": [3, 2]},
        "scale": 0.5,
        "flora_dropout": 0.1,
        "init_weights": "released",
        "target_modules": ["q", "k"],
        "exclude_modules": ["v"],
        "rank_pattern": {"q": 2, "k": [3, 1]},
        "scale_pattern": {"k": 2.0},
        "bias": "flora_only",
        "layers_to_transform": [0],
        "layers_pattern": "blocks",
        "modules_to_save": ["head"],
        "task_type": TaskType.SEQ_CLS,
        "inference_mode": True,
    }

    @pytest.mark.parametrize("arguments", [{}, FULL, {"budget": 0.1}, {"budget": 500, "target_modules": "all-weights"}])
    @pytest.mark.parametrize("reader", [PeftConfig, FloraConfig])
    def test_round_trip(self, arguments, reader, tmp_path):
        config = FloraConfig(**arguments)
        config.save_pretrained(tmp_path)
        read = reader.from_pretrained(tmp_path)
        assert type(read) is FloraConfig
        assert read.to_dict() == config.to_dict()

    def test_is_plain_json(self, tmp_path):
        FloraConfig(**self.FULL).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["peft_type"] == "FLORA"
        assert saved["format_version"] == 1
        assert saved["target_modules"] == ["k", "q"]  # sorted: equal configs are equal files
        assert saved["ranks"] == {"a.b": [3, 2]}

    def test_equal_configs_are_equal_files(self, tmp_path):
        names = [f"layer{n}" for n in range(20)]
        for folder, order in (("a", names), ("b", names[::-1])):
            FloraConfig(target_modules=order).save_pretrained(tmp_path / folder)
        a, b = ((tmp_path / folder / "adapter_config.json").read_bytes() for folder in "ab")
        assert a == b

    def test_newer_format_is_refused(self, tmp_path):
        FloraConfig().save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
        with pytest.raises(ValueError, match="saved in format version 7; this florapeft reads 1 to 1"):
            PeftConfig.from_pretrained(tmp_path)
