"""Jobs: reading and checking them, their data and batches, and what is written to disk."""

import errno
import json
import runpy
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from florapeft import FloraConfig
from florapeft.train import data, job, merge, model, run, save
from florapeft.train.evaluate import adapter_folder

ROOT = Path(__file__).parent.parent
GOOD = {"task": "text-classification", "model": "m", "data": "d.csv", "output": "o"}
TINY = runpy.run_path(str(ROOT / "examples" / "tiny.py"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TINY["write_tokenizer"](folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


# --- the job file -----------------------------------------------------------------------------------------------------


def test_defaults_of_a_job():
    parsed = job.parse_job(GOOD)
    assert parsed.data == job.DataSpec("d.csv", columns={"text": "text", "label": "label"})
    assert parsed.train == {
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "epoch",
        "disable_tqdm": True,
    }
    assert job.parse_job(yaml.safe_load(parsed.to_yaml())) == parsed  # YAML 1.1 reads it too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["task=text-clasification"],
            "unknown task 'text-clasification'; did you mean 'text-classification'? (known: ",
        ),
        (
            ["task=regression"],
            "unknown task 'regression' (known: image-classification, text-classification, causal-lm)",
        ),
        (["modle=x"], "unknown key 'modle'; did you mean 'model'?"),
        (["model=null"], "'model' is missing"),
        (["model=3"], "model must be a text, got 3"),
        (["output=null"], "'output' is missing"),
        (["data=null"], "'data' is missing"),
        (["data=[a]"], "data must be a group of keys, got ['a']"),
        (["data={subset: x}"], "data: 'path' is missing"),
        (["data={path: x, colums: {}}"], "data: unknown key 'colums'; did you mean 'columns'?"),
        (["data={path: x, columns: {txt: y}}"], "data.columns: unknown key 'txt'; did you mean 'text'?"),
        (["data={path: x, splits: {valid: y}}"], "data.splits: unknown key 'valid'; did you mean 'validation'?"),
        (["data={path: x, holdout: 2}"], "data: holdout must be a share between 0 and 1, got 2"),
        (["data={path: x, max_length: 0}"], "data: max_length must be a positive whole number, got 0"),
        (["train.learning_rat=1"], "TrainingArguments has no field 'learning_rat'; did you mean 'learning_rate'?"),
        (["train.learning_rate=fast"], "train: learning_rate must be a number, got 'fast'"),
        (["train.max_steps=1.5"], "train: max_steps must be a whole number, got 1.5"),
        (["train.bf16=1"], "train: bf16 must be true or false, got 1"),
        (["train.output_dir=x"], "train: 'output_dir' cannot be set here: use the job's own `output`"),
        (["adapter.rank=4"], "adapter: FloraConfig has no field 'rank'; did you mean 'ranks'?"),
        (["adapter.task_type=CAUSAL_LM"], "adapter: 'task_type' cannot be set here: it follows from the job"),
        (["adapter.r=8", "adapter.budget=0.3"], "adapter: budget=0.3 and r=8 contradict each other: a budget chooses"),
        (["adapter={budget: 9, rank_pattern: {a: 2}}"], "adapter: budget=9 and rank_pattern={'a': 2} contradict each"),
        (
            ["adapter.lora_alpha=16"],
            "adapter: 'lora_alpha' cannot be set here: FLoRA has `scale`, which is not",
        ),
        (["adapter.lora_dropout=0.1"], "adapter: 'lora_dropout' cannot be set here: use `flora_dropout`"),
        (["learning_rate=1e-3"], "unknown key 'learning_rate'; say train.learning_rate"),
        (["seed=1"], "unknown key 'seed'; say train.seed"),
        (["r=4"], "unknown key 'r'; say adapter.r"),
        (["max_length=4"], "unknown key 'max_length'; say data.max_length"),
        (["output_dir=x"], "unknown key 'output_dir'; did you mean 'output'?"),
        (["adapter.rnk=null"], "adapter: FloraConfig has no field 'rnk'"),
        (["adapter.budget=0", "adapter.r=4"], "adapter: budget as a count must be at least 1, got 0"),
        (["labels=pos"], "labels must be a list of class names, got 'pos'"),
        (["adapter=8"], "adapter must be a group of keys, got 8"),
    ],
)
def test_job_errors(changes, message):
    with pytest.raises(ValueError, match=r"^job") as error:
        job.parse_job(job.apply_overrides(dict(GOOD), changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "changes", "expected"),
    [
        ({"r": 16, "rank_pattern": {"a": 2}, "scale": 2.0}, ["adapter.budget=0.3"], {"scale": 2.0, "budget": 0.3}),
        ({"r": 8}, ["adapter.budget=0.3"], {"budget": 0.3}),
        ({"ranks": {"a": [1, 1]}}, ["adapter.budget=900"], {"budget": 900}),
        ({"budget": 0.3, "allocation": "spectrum"}, ["adapter.r=4"], {"r": 4}),
        ({"ranks": {"a": [1, 1]}}, ["adapter.r=4"], {"r": 4}),
        ({"r": 4, "budget": None}, ["adapter.rank_pattern={a: 2}"], {"r": 4, "rank_pattern": {"a": 2}}),
        ({"budget": 0.3}, ["adapter.rank_pattern={a: 2}"], {"rank_pattern": {"a": 2}}),
        ({"r": 4, "budget": 9}, ["adapter.ranks={a: [1, 1]}"], {"ranks": {"a": [1, 1]}}),
        ({"r": 16}, ["adapter.budget=0.3", "adapter.r=null"], {"budget": 0.3}),
        ({"r": 16}, ["adapter.r=null"], {"budget": 0.01}),
        ({"r": 16, "kernel_r": 2}, ["adapter={budget: 0.3}"], {"budget": 0.3}),
        ({"budget": 0.3}, ["adapter.scale=2.0"], {"budget": 0.3, "scale": 2.0}),
        ({"r": 16, "modules_to_save": None}, ["adapter.budget=null"], {"r": 16}),
    ],
)
def test_ranks_on_the_command_line_replace_those_of_the_file(adapter, changes, expected, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**GOOD, "adapter": adapter}))
    assert job.load_job(tmp_path / "job.yaml", changes).adapter == expected


def test_a_key_that_is_null_counts_as_not_given():
    changes = ["train.learning_rate=null", "train.seed=null", "labels=null", "data.holdout="]
    assert job.parse_job(job.apply_overrides({**GOOD, "data": {"path": "d.csv"}}, changes)) == job.parse_job(GOOD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path.test=new.csv"], "it began with data.path.test = c.csv, now data.path.test = new.csv"),
        (["data.path=d.csv"], "it began with data.path = {'train': 'a.csv', 'test': 'c.csv'}, now data.path = d.csv"),
        (["data.subset=x"], "it began with data.subset = None, now data.subset = x"),
        (["adapter.r=4"], "it began with adapter.r = 16, now adapter.r = 4"),
        (["adapter.r=null", "adapter.budget=9"], "it began with adapter.r = 16, now adapter.r = None"),
        (["model=n"], "it began with model = m, now model = n"),
    ],
)
def test_a_run_of_another_job_is_not_resumed(changes, message, tmp_path):
    began = {**GOOD, "data": {"path": {"train": "a.csv", "test": "c.csv"}}, "adapter": {"r": 16}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(began, sort_keys=False))
    now = job.load_job(tmp_path / "job.yaml", changes)
    with pytest.raises(ValueError, match="cannot resume") as error:
        run.check_same_job(now, tmp_path)
    assert str(error.value) == f"cannot resume {tmp_path}: {message}"


def test_local_paths_are_saved_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").touch()
    (tmp_path / "m").mkdir()
    parsed = job.parse_job(GOOD)
    assert (parsed.model, parsed.data.path) == (str(tmp_path / "m"), str(tmp_path / "d.csv"))
    parsed = job.parse_job({**GOOD, "model": "hub/id", "data": {"path": {"train": "d.csv", "test": "no.csv"}}})
    assert (parsed.model, parsed.data.path) == ("hub/id", {"train": str(tmp_path / "d.csv"), "test": "no.csv"})


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("train.learning_rate=1e-3", ["train", "learning_rate"], 0.001),
        ("a=-2E+5", ["a"], -200000.0),
        ("a=1.5", ["a"], 1.5),
        ("a=7", ["a"], 7),
        ("a=1e", ["a"], "1e"),
        ("a=true", ["a"], True),
        ("a=no", ["a"], "no"),
        ("a=on", ["a"], "on"),
        ("a=010", ["a"], 10),
        ("a=-0o14", ["a"], "-0o14"),
        ("a=0o14", ["a"], 12),
        ("a=0xff", ["a"], 255),
        ("a=0b1", ["a"], "0b1"),
        ("a=1_000", ["a"], "1_000"),
        ("a=1:30", ["a"], "1:30"),
        ("a=1:30.5", ["a"], "1:30.5"),
        ("a=2024-01-01", ["a"], "2024-01-01"),
        ("a==", ["a"], "="),
        ("a=1.", ["a"], 1.0),
        ("a=.5", ["a"], 0.5),
        ("a=1e3", ["a"], 1000.0),
        ("a=-.inf", ["a"], -float("inf")),
        ("a=~", ["a"], None),
        ("a=", ["a"], None),
        ("a=[x, 1]", ["a"], ["x", 1]),
        ("a={b: 1e-1}", ["a"], {"b": 0.1}),
        ("a=b=c", ["a"], "b=c"),
    ],
)
def test_overrides_are_yaml(override, keys, value):
    read = job.split_override(override)
    assert read == (keys, value)
    assert type(read[1]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not valid YAML at line 1"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("a: 1\n? [b, c]\n: 2", "line 2: a key is a text, here it is a sequence"),
        ("a: {{b: 1}: 2}", "line 1: a key is a text, here it is a mapping"),
        ("- a", "it holds ['a']"),
        ("", "it holds nothing"),
    ],
)
def test_job_file_errors(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"job\.yaml") as error:
        job.load_job(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_that_look_like_numbers_stay_texts_in_the_saved_job():
    texts = [
        "010",
        "0o14",
        "0xff",
        "1e3",
        "1e-05",
        "1:30",
        "1_0",
        "2024-01-01",
        "no",
        "true",
        ".5",
        ".inf",
        "=",
        "~",
        "",
    ]
    parsed = job.parse_job({**GOOD, "labels": texts, "train": {"learning_rate": 1e-5, "weight_decay": 0.0, "seed": 8}})
    assert job.parse_job(job.parse_yaml(parsed.to_yaml(), "job")) == parsed


def test_overrides_nest_and_do_not_enter_values():
    assert job.apply_overrides({"train": None}, ["train.a.b=1", "train.c=2"]) == {"train": {"a": {"b": 1}, "c": 2}}
    with pytest.raises(ValueError, match=r"override 'model\.x=1': 'model' holds a value, not a group of keys"):
        job.apply_overrides({"model": "m"}, ["model.x=1"])
    with pytest.raises(ValueError, match="override 'abc' is not of the form key=value"):
        job.split_override("abc")


# --- data -------------------------------------------------------------------------------------------------------------


def examples_of(tmp_path, text, roles=("train",), name="x.csv", **changes):
    (tmp_path / name).write_text(text)
    mapping = {**GOOD, "data": {"path": str(tmp_path / name), **changes.pop("data", {})}, **changes}
    return data.load_examples(job.parse_job(mapping), roles, roles[:1])


@pytest.mark.parametrize(
    ("rows", "labels", "numbers"),
    [
        ("text,label\na,pos\nb,neg\nc,pos\n", ["neg", "pos"], [1, 0, 1]),
        ("text,label\na,10\nb,9\nc,10\n", ["9", "10"], [1, 0, 1]),
        ("text,label\na,-1\nb,1\n", ["-1", "1"], [0, 1]),
        ("text,label\na,True\nb,False\n", ["False", "True"], [1, 0]),
    ],
)
def test_labels_become_numbers(tmp_path, rows, labels, numbers):
    examples = examples_of(tmp_path, rows)
    assert examples.labels == labels
    assert list(examples.splits["train"][data.LABEL_ID]) == numbers


def test_labels_of_the_job_come_first(tmp_path):
    examples = examples_of(tmp_path, "text,label\na,pos\nb,neg\n", labels=["pos", "other", "neg"])
    assert list(examples.splits["train"][data.LABEL_ID]) == [0, 2]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "is empty: no examples"),
        ("text,label\n", {}, "is empty: no examples"),
        ("txt,label\na,b\n", {}, "has no column 'text' (data.columns.text); it has: txt, label; did you mean 'txt'?"),
        ("text,label\na,b\nc,b\n", {}, "column 'label' has the one label 'b'; classification needs at least two"),
        ("text,label\na,b\nc,\n", {}, "column 'label' has 1 empty values"),
        ("text,label\n,b\nc,d\n", {}, "column 'text' has 1 empty values"),
        ("text,label\n1,b\n2,d\n", {}, "column 'text' holds int64, not text"),
        ("text,label\na,0.5\nb,1.5\n", {}, "holds decimal numbers; class names or whole numbers are needed"),
        (
            "text,label\na,x\nb,y\n",
            {"labels": ["x", "z"]},
            "label 'y' (split train, row 1) is not one of the 2 labels: x, z",
        ),
        (
            "text,label\na,x\nb,y\n",
            {"data": {"splits": {"train": "dev"}}},
            "has no split 'dev' (it has: train); say which one to use with data.splits.train",
        ),
    ],
)
def test_data_errors(tmp_path, text, changes, message):
    with pytest.raises(ValueError, match=r"label|data|split") as error:
        examples_of(tmp_path, text, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("/none/x.csv", FileNotFoundError, "data file not found: /none/x.csv"),
        ("/none/images", FileNotFoundError, "data folder not found: /none/images"),
        ({"trian": "x.csv"}, ValueError, "data.path: unknown split 'trian'; did you mean 'train'?"),
    ],
)
def test_data_that_is_not_there(path, kind, message):
    with pytest.raises(kind) as error:
        data.load_examples(job.parse_job({**GOOD, "data": {"path": path}}), ("train",), ("train",))
    assert str(error.value) == message


def test_broken_jsonl_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read data '.*x\.jsonl': JSON parse error"):
        examples_of(tmp_path, '{"text": "a"', name="x.jsonl")


def test_holdout_slices_and_an_unseen_label(tmp_path):
    rows = "text,label\n" + "".join(f"t{n},{'xy'[n % 2]}\n" for n in range(10))
    kept = examples_of(tmp_path, rows, ("train", "validation"), data={"holdout": 0.2})
    assert {role: len(split) for role, split in kept.splits.items()} == {"train": 8, "validation": 2}
    assert set(kept.splits["train"]["text"]).isdisjoint(kept.splits["validation"]["text"])
    spec = {"splits": {"train": "train[:60%]", "validation": "train[60%:]"}}
    sliced = examples_of(tmp_path, rows, ("train", "validation"), data=spec)
    assert list(sliced.splits["validation"]["text"]) == ["t6", "t7", "t8", "t9"]
    with pytest.raises(ValueError, match=r"label 'z' \(split validation, row 3\) is not one of the 2 labels: x, y"):
        examples_of(tmp_path, rows + "t,z\n", ("train", "validation"), data=spec)


def test_images_by_path_in_a_csv(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    mapping = {"columns": {"image": "file"}}
    text = "file,label\na.png,x\na.png,y\n"
    changes = {"task": "image-classification", "data": mapping}
    examples = examples_of(tmp_path, text, **changes)
    spec = job.parse_job({**GOOD, **changes, "data": {"path": str(tmp_path / "x.csv"), **mapping}})
    assert data.with_images(spec, examples.splits["train"])[0]["file"].size == (4, 4)
    examples = examples_of(tmp_path, text.replace("a.png,y", "b.png,y"), **changes)
    with pytest.raises(FileNotFoundError, match=r"image file not found: .*b\.png \(column 'file' of data "):
        data.with_images(spec, examples.splits["train"])


def test_every_split_has_the_images_beside_its_own_file(tmp_path):
    colours = {"train": "red", "validation": "blue"}
    for role, colour in colours.items():
        (tmp_path / role).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / role / "a.png")
        (tmp_path / role / "rows.csv").write_text("image,label_id\na.png,x\na.png,y\n")
    files = {role: str(tmp_path / role / "rows.csv") for role in colours}
    columns = {"label": "label_id"}
    for given in ({"path": files}, {"path": files, "splits": {"validation": "validation[:50%]"}}):
        spec = {**GOOD, "task": "image-classification", "data": {**given, "columns": columns}}
        this = job.parse_job(spec)
        found = data.load_examples(this, tuple(colours), ("train",)).splits
        for role, colour in colours.items():
            image = data.with_images(this, found[role])[0]["image"]
            assert image.getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


# --- heads, batches, loss ---------------------------------------------------------------------------------------------


class WithTimm(nn.Module):
    """Shaped like transformers' wrapper of timm models."""

    def __init__(self):
        super().__init__()
        self.timm_model = nn.ModuleDict({"stem": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
        self.timm_model.get_classifier = lambda: self.timm_model["fc"]


def test_heads_are_found():
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert model.find_heads(transformers.ViTForImageClassification(config)) == ["classifier"]
    config = transformers.DeiTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    heads = model.find_heads(transformers.DeiTForImageClassificationWithTeacher(config))
    assert heads == ["cls_classifier", "distillation_classifier"]
    assert model.find_heads(WithTimm()) == ["timm_model.fc"]
    with pytest.raises(
        ValueError, match=r"no classifier head found among 0, 1 of Sequential; name it with adapter\.mo"
    ):
        model.find_heads(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


@pytest.fixture
def without_pooler(tmp_path):
    """A text-classification job on a checkpoint of a language model: head and pooler are new."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "model")
    return {**GOOD, "model": str(tmp_path / "model"), "output": str(tmp_path / "out")}


@pytest.mark.parametrize("targets", ["all-weights", ["query"], ["query", "dense"]])
def test_what_a_checkpoint_lacks_is_saved_with_the_adapter(tmp_path, without_pooler, targets):
    this = job.parse_job({**without_pooler, "adapter": {"r": 2, "target_modules": targets}})
    base = model.load_base(this.task, this.model, ["a", "b"])
    assert base.new_modules == ["bert.pooler.dense", "classifier"]
    adapted = model.attach(this, base)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = model.load_base(this.task, this.model, ["a", "b"])  # another draw of head and pooler
    again = peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    model.check_is_whole(again)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(again.eval()(ids).logits, adapted.eval()(ids).logits)


def test_an_adapter_without_what_the_checkpoint_lacks_is_refused(tmp_path, without_pooler):
    base = model.load_base("text-classification", without_pooler["model"], ["a", "b"])
    adapted = peft.get_peft_model(base, FloraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"neither the checkpoint of '.*' nor the adapter has weights for bert.pooler"):
        model.check_is_whole(adapted)


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "BartForSequenceClassification"])
def test_a_classifier_that_reads_as_far_as_a_token_is_merged(tmp_path, tokenizer, name):
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"n_embd": 8, "n_layer": 1, "n_head": 1, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    cls = getattr(transformers, name)
    cls(cls.config_class(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    base = model.load_base("text-classification", str(tmp_path / "model"), ["a", "b"])
    config = FloraConfig(r=2, target_modules="all-weights", task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    merge.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").pad_token_id is not None


def test_causal_batch(tokenizer):
    ids = tokenizer.get_vocab()
    good, bad, film, first, last, pad = (ids[w] for w in ("good", "bad", "film", "[CLS]", "[SEP]", "[PAD]"))
    rows = [{"p": "good", "t": "bad film"}, {"p": "good", "t": "bad"}]
    batch = model.CausalCollator(tokenizer, "t", "p", 64)(rows)
    prompt = [first, good, last]
    assert batch["input_ids"].tolist() == [[*prompt, bad, film, last], [*prompt, bad, last, pad]]
    assert batch["labels"].tolist() == [[-100] * 3 + [bad, film, last], [-100] * 3 + [bad, last, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    cut = model.CausalCollator(tokenizer, "t", None, 2)(rows)
    assert cut["input_ids"].tolist() == cut["labels"].tolist() == [[first, bad], [first, bad]]
    cut = model.CausalCollator(tokenizer, "t", "p", 3)(rows)  # the prompts end in [SEP]
    assert cut["input_ids"].tolist() == [[last, bad, film], [last, bad, last]]
    assert cut["labels"].tolist() == [[-100, bad, film], [-100, bad, last]]


def test_text_batch_with_pairs(tokenizer):
    rows = [{"a": "good", "b": "bad", data.LABEL_ID: 1}, {"a": "good film", "b": "bad", data.LABEL_ID: 0}]
    batch = model.TextCollator(tokenizer, "a", "b", 64)(rows)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 6]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_image_batch_without_torchvision(mode, channels):
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    rows = [{"i": Image.new("RGB", (5, 9), "white"), data.LABEL_ID: 0}, {"i": Image.new("L", (9, 5)), data.LABEL_ID: 1}]
    batch = model.ImageCollator(processor, "i", mode)(rows)
    assert batch["pixel_values"].shape == (2, channels, 8, 8)
    torch.testing.assert_close(batch["pixel_values"].amax(dim=(1, 2, 3)), torch.tensor([1.0, -1.0]))


def test_classification_loss_adds_up_over_processes_and_accumulated_batches():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = run.classification_loss()
    whole = nn.functional.cross_entropy(logits, labels)
    parts = sum(loss({"logits": logits[s]}, labels[s], num_items_in_batch=6) for s in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(loss({"logits": logits}, labels), whole)
    smooth = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(run.classification_loss(0.1)({"logits": logits}, labels), smooth)


def test_a_diverged_adapter_is_not_saved():
    layer = nn.Linear(2, 2)
    run.check_finite(layer, Path("o"))
    layer.bias.data[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"training diverged: bias is not finite, so no adapter was saved; lower train\."
    ):
        run.check_finite(layer, Path("o"))
    layer.bias.requires_grad_(False)
    run.check_finite(layer, Path("o"))


# --- disk -------------------------------------------------------------------------------------------------------------

FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (SafetensorError("Error while serializing: IoError(Os { code: 28 })"), "Error while serializing: IoError"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_failed_save_changes_nothing(tmp_path, failure, reason, is_there):
    path = tmp_path / "adapter"
    if is_there:
        path.mkdir()
        (path / "weights").write_text("old")

    def write():
        with save.atomic_folder(path, replace=True) as folder:
            (folder / "weights").write_text("half")
            raise failure

    with pytest.raises(OSError, match="cannot write") as error:
        write()
    assert f"cannot write {path}: {reason}" in str(error.value)
    assert str(error.value).endswith(f"{path} was left as it was" if is_there else "nothing was written")
    assert [file.name for file in tmp_path.iterdir()] == (["adapter"] if is_there else [])
    assert not is_there or (path / "weights").read_text() == "old"


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "weights").write_text("old")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(OSError, match=r"Input/output error; .* was left as it was"),
        save.atomic_folder(path, replace=True),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    assert (path / "weights").read_text() == "old"


def test_a_save_replaces_only_if_asked_and_clears_what_a_kill_left(tmp_path):
    path = tmp_path / "adapter"
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / "stale").touch()
    for content in ("one", "two"):
        with save.atomic_folder(path, replace=True) as folder:
            assert not any(folder.iterdir())
            (folder / "weights").write_text(content)
        assert (path / "weights").read_text() == content
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(FileExistsError, match="is not overwritten unless --overwrite"), save.atomic_folder(path):
        pytest.fail("the body must not run")


def test_a_failed_text_file_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    save.write_json(path, {"a": float("nan"), "b": [1.5, float("inf")], 3: "ü"})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "3": "ü"}

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write .*results\.json: No space left on device"):
        save.write_json(path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert "ü" in path.read_text()


EXISTS = "exists; give another output, continue it with --resume, or replace it with --overwrite"


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (None, {}, None),
        ([], {}, None),
        (["job.yaml"], {}, EXISTS),
        (["job.yaml"], {"resume": True}, None),
        (["job.yaml", "w"], {"overwrite": True}, None),
        (["photo.png"], {}, "exists and was not written by flora train; give another output"),
        (["photo.png"], {"overwrite": True}, "exists and was not written by flora train; give another output"),
        (["photo.png"], {"resume": True}, "holds no job.yaml"),
        (None, {"resume": True}, "is empty or missing"),
        (None, {"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    ],
)
def test_output_folder(tmp_path, files, flags, message):
    output = tmp_path / "run"
    if files is not None:
        output.mkdir()
        for file in files:
            (output / file).touch()
    before = sorted(tmp_path.rglob("*"))
    if message:
        with pytest.raises((OSError, ValueError), match=message):
            save.prepare_output(output, **flags)
        assert sorted(tmp_path.rglob("*")) == before
        return
    note = save.prepare_output(output, **flags)
    assert output.is_dir()
    if flags.get("overwrite"):  # nothing is lost: the earlier run has another name
        assert note == f"the earlier run in {output} was renamed to {output}.old-1"
        assert not any(output.iterdir())
        assert sorted(file.name for file in (tmp_path / "run.old-1").iterdir()) == files
    else:
        assert note is None


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file; a folder is needed"):
        save.prepare_output(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write to output .*file/run: Not a directory"):
        save.prepare_output(tmp_path / "file" / "run")
    monkeypatch.setattr(
        Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(OSError, match=r"cannot write to output .*run: Permission denied"):
        save.prepare_output(tmp_path / "run")


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    assert save.last_checkpoint(tmp_path / "none") is None
    for name, state in {"2": "{}", "10": "{}", "12": None, "14": '{"glo', "best": "{}"}.items():
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert save.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_adapter_folder(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").touch()
    for given in ("run", "run/adapter"):
        assert adapter_folder(tmp_path / given) == tmp_path / "run" / "adapter"
    with pytest.raises(FileNotFoundError, match="adapter not found: "):
        adapter_folder(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"is not an adapter: it holds no adapter_config\.json"):
        adapter_folder(tmp_path)


@pytest.mark.parametrize(
    ("memory", "reloaded", "message"),
    [
        (1.0, 1.0, None),
        (1.00001, 1.00001, None),
        (1.0, 1.00001, "read back, gives other outputs than in memory"),
        (1.1, 1.1, r"differ from base plus adapter by 1\.0e-01 of the largest output \(allowed: 1e-04\)"),
        (float("nan"), float("nan"), "read back, gives other outputs"),
    ],
)
def test_merge_check(memory, reloaded, message):
    arguments = torch.ones(2), torch.full((2,), memory), torch.full((2,), reloaded)
    if message is None:
        assert merge._check(*arguments) < 1e-4
    else:
        with pytest.raises(ValueError, match=message):
            merge._check(*arguments)
