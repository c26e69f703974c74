"""benchmarks/expert_texts.py: what the network is trained on, adapted to and tested on; and what adapts it."""

import ast
from dataclasses import replace

import accuracy
import cases
import expert_texts
import gradient_lora
import pretrained
import pytest
import tasks
import torch

from florapeft.train.fitting import WITHIN, trainable

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 4}


class TestTexts:
    def test_no_paragraph_is_in_two_splits(self):
        splits = expert_texts.reference()
        paragraphs = {
            split: {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")} - {""}
            for split, texts in splits.items()
        }
        assert all(len(found) > 50 for found in paragraphs.values())
        train, validation, test = paragraphs.values()
        assert not train & validation
        assert not train & test
        assert not validation & test

    def test_splits_are_near_their_shares_and_always_the_same(self):
        splits = expert_texts.reference()
        assert splits == expert_texts.reference()
        lengths = {split: sum(map(len, texts)) for split, texts in splits.items()}
        for split, share in expert_texts.SHARES.items():
            assert lengths[split] / sum(lengths.values()) == pytest.approx(share, abs=0.02)

    def test_labels_are_the_next_bytes(self):
        task = expert_texts.experts(None)
        for part in (task.train, task.validation, task.test):
            assert part["input_ids"].shape == part["labels"].shape == (len(part["labels"]), expert_texts.LENGTH)
            assert torch.equal(part["input_ids"][:, 1:], part["labels"][:, :-1])
        first = expert_texts.reference()["test"][0].encode()
        assert bytes(task.test["labels"][0].tolist()) == first[1 : expert_texts.LENGTH + 1]

    def test_code_without_words(self):
        source = (
            b'"""Words."""\nimport os  # more\n\nclass A:\n    """Only words."""\n\ndef f():\n    "w"\n    return "w"\n'
        )
        expected = "import os\nclass A:\n    pass\ndef f():\n    return 'w'\n"
        assert ast.dump(ast.parse(expert_texts.bare(source))) == ast.dump(ast.parse(expected))


class TestPretrained:
    def load(self, recipe, seen):
        def pretrain(model):
            seen.append(model.weight.clone())
            with torch.no_grad():
                model.weight.copy_(torch.rand(2, 3))

        return pretrained.load(lambda: torch.nn.Linear(3, 2), pretrain, "tiny", recipe)

    def test_trained_once_for_a_recipe(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pretrained, "CACHE", tmp_path / "cache")
        seen, state = [], torch.get_rng_state()
        first, again = self.load("a", seen), self.load("a", seen)
        assert len(seen) == 1
        assert torch.equal(first.weight, again.weight)
        assert len(list((tmp_path / "cache").iterdir())) == 1
        self.load("b", seen)
        assert torch.equal(seen[0], seen[1])  # both began at seed 0
        assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def case():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_texts, "SIZES", SIZES)
        patch.setattr(pretrained, "load", untrained)
        case = cases.Case("experts", replace(cases.SETTINGS["experts"], share=0.15), None)
        few = {part: tasks.batches(getattr(case.task, part), 8)[0] for part in expert_texts.SHARES}
        case.task = replace(case.task, **few)
        yield case


def untrained(build, *others):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


class TestMethods:
    def test_no_byte_is_seen_before_its_turn(self, case):
        model, inputs = case.model(0).eval(), case.task.test["input_ids"][:2]
        changed = inputs.clone()
        changed[:, 60:] = 7
        before, after = (case.task.logits(model, {"input_ids": given}) for given in (inputs, changed))
        assert before.shape == (2, 256, expert_texts.LENGTH)
        torch.testing.assert_close(after[..., :60], before[..., :60])
        assert not torch.allclose(after[..., 60:], before[..., 60:])

    def test_attention_and_experts_are_adapted(self, case):
        names = {name.rpartition(".")[2] for name in case.layers}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}

    @pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoRA, gradient start, ranks by spectrum", accuracy.RECIPE])
    def test_equal_parameters_and_outputs_as_before(self, case, method):
        expected = case.task.logits(case.model(0).eval(), case.task.test)
        model, facts = accuracy.METHODS[method](case, case.model(0), 0)
        torch.testing.assert_close(case.task.logits(model.eval(), case.task.test), expected)
        assert abs(trainable(model) / case.goal - 1) <= WITHIN
        assert set(facts.get("left_out", {})) == (
            {"MixtralExperts, parameters of order 3"} if method == "DoRA" else set()
        )

    def test_loras_start_on_a_stack(self, case):
        found = gradient_lora.gradients(case.model(0), case.layers, case.batches(0), case.loss).sums
        name = next(name for name in found if name.endswith("down_proj"))
        assert found[name].shape == (4, 16, 24)
        model, _ = accuracy.METHODS["LoRA, gradient start"](case, case.model(0), 0)
        stacks = [module for module in model.modules() if getattr(module, "parameter_name", None) == "down_proj"]
        lhs, rhs, _ = stacks[0].get_delta_factors("default")
        assert not lhs.any()
        for expert, rows in enumerate(rhs):
            torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=1e-5, rtol=0)
            kept = torch.linalg.svdvals(found[name][expert])[: len(rows)]
            torch.testing.assert_close((found[name][expert] @ rows.mT).norm(), kept.norm())
