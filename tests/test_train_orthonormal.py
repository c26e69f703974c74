"""The callback that keeps factors orthonormal in a Trainer."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_retraction import adapted, factors, make_batches

from florapeft.retraction import is_orthonormal
from florapeft.train import OrthonormalFactors
from florapeft.train.orthonormal import starts_from_gradients

batches = pytest.fixture(make_batches)


class Trainer(transformers.Trainer):
    def compute_loss(self, model, inputs, *_, **__):
        return model(inputs["ids"]).square().mean()


def fit(model, rows, tmp_path, **options):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", use_cpu=True, save_strategy="no", learning_rate=0.01, **options
    )
    data = [{"ids": row} for batch in rows for row in batch]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[OrthonormalFactors()])
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adafactor"}, {"bf16": True}])
def test_factors_stay_orthonormal(options, batches, tmp_path):
    model = adapted(batches)
    trainer = fit(model, batches, tmp_path, **options)
    assert all(map(is_orthonormal, factors(model)))
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks, "the callback is to leave nothing behind"


def test_what_cannot_be_kept_is_said_and_trained(batches, tmp_path, caplog):
    model = adapted(batches)
    with torch.no_grad():
        for factor in factors(model):
            factor.mul_(2)
    before = factors(model)[0].clone()
    fit(model, batches, tmp_path)
    assert "not kept orthonormal in this training: adapter 'default' has no weight" in caplog.text
    assert not torch.equal(before, factors(model)[0])


def test_a_second_training_has_one_hook(batches):
    model = adapted(batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    callback = OrthonormalFactors()
    callback.on_train_end()  # nothing has begun
    for _ in range(2):  # the first is broken off
        callback.on_train_begin(model=model, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    callback.on_train_end()
    assert not optimizer._optimizer_step_post_hooks


def test_a_model_that_is_not_pefts_is_said(batches, caplog):
    model = torch.nn.Linear(2, 2)
    OrthonormalFactors().on_train_begin(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert "not kept orthonormal in this training: this needs the PeftModel itself, not a Linear" in caplog.text


def test_which_models_it_is_for(batches):
    model = adapted(batches)
    assert starts_from_gradients(model)
    assert not starts_from_gradients(model.get_base_model())
    assert not starts_from_gradients(
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    )
