"""PEFT's tests on transformers' models, and of configurations."""

import tests.test_config as configs
import tests.test_decoder_models as decoders
import tests.test_encoder_decoder_models as encoder_decoders
import tests.test_feature_extraction_models as features
import tests.test_seq_classifier as sequences
import tests.test_token_classification_qa as tokens
import tests.testing_common as common
from repoint import repoint
from tests.test_config import TestPeftConfig
from tests.test_decoder_models import TestDecoderModels
from tests.test_encoder_decoder_models import TestEncoderDecoderModels
from tests.test_feature_extraction_models import TestPeftFeatureExtractionModel
from tests.test_seq_classifier import TestSequenceClassificationModels
from tests.test_token_classification_qa import TestQuestionAnsweringModels, TestTokenClassificationModels  # noqa: F401

from florapeft import FloraConfig

BORROWED = [
    # Mixed batches and weighted combinations are for LoRA and another method or two, by name.
    ("test_mixed_adapter_batches", "test_decoder_models.LoraConfig"),
    ("test_mixed_adapter_batches", "testing_common.RoadConfig"),
    ("test_generate_with_mixed_adapter_batches", "test_decoder_models.LoraConfig"),
    ("test_generate_with_mixed_adapter_batches", "testing_common.LoraConfig"),
    ("test_weighted_combination_of_adapters", "testing_common.IA3Config"),
    # Without this it is attached and nothing is raised.
    ("test_adding_multiple_adapters_with_bias_raises", "testing_common.LoraConfig"),
]


def rows(task, **settings):
    """PEFT's default targets; every weight, with dropout; every linear layer, within a budget."""
    return [
        (FloraConfig, {"task_type": task, "target_modules": None, "r": 4}),
        (FloraConfig, {"task_type": task, "target_modules": "all-weights", "r": 3, "flora_dropout": 0.05, **settings}),
        (FloraConfig, {"task_type": task, "target_modules": "all-linear", "budget": 0.1, **settings}),
    ]


# pytest holds these very lists.
decoders.ALL_CONFIGS[:] = rows("CAUSAL_LM")
encoder_decoders.ALL_CONFIGS[:] = rows("SEQ_2_SEQ_LM")
# The pooler, after the output that these tests look at, would get no gradient. And DeBERTa's distances are handed to
# every layer: reentrant checkpointing cannot differentiate what was computed for that, such as W + dW (or their norm in
# DeBERTa-v3, where training in full fails, too).
features.ALL_CONFIGS[:] = rows("FEATURE_EXTRACTION", exclude_modules=r".*\b(pooler|rel_embeddings)\b.*")
sequences.ALL_CONFIGS[:] = rows("SEQ_CLS")
# For these two tasks PEFT's "all-linear" takes the new head too, which PEFT already trains in full.
tokens.TOKEN_CLS_CONFIGS[:] = rows("TOKEN_CLS", exclude_modules=["classifier"])
tokens.QA_CONFIGS[:] = rows("QUESTION_ANS", exclude_modules=["qa_outputs"])
configs.LAYER_INDEXING_CONFIG_CLASSES[:] = [(FloraConfig, {})]
repoint(TestPeftConfig, "test_", "config_class, mandatory_kwargs", [(FloraConfig, {})])

for cls, module in [
    (TestDecoderModels, decoders),
    (TestEncoderDecoderModels, encoder_decoders),
    (TestPeftFeatureExtractionModel, features),
    (TestSequenceClassificationModels, sequences),
]:
    default, every_weight, every_linear = module.ALL_CONFIGS
    # It asks that the embedding's output needs no gradient; "all-weights" adapts the embedding.
    repoint(cls, "test_prepare_for_training", "config_cls,config_kwargs", [default, every_linear])
    # layers_to_transform contradicts a shorthand, here as in LoraConfig.
    if cls is not TestSequenceClassificationModels:
        repoint(cls, "layer_indexing", "config_cls,config_kwargs", [default])
# OPT folds the sequence into the batch before its feed-forward layers, where samples can no longer be told apart.
for cls, (default, _, every_linear) in [
    (TestDecoderModels, decoders.ALL_CONFIGS),
    (TestEncoderDecoderModels, encoder_decoders.ALL_CONFIGS),
]:
    attention = (FloraConfig, {**every_linear[1], "exclude_modules": ["fc1", "fc2"]})
    repoint(cls, "mixed_adapter_batches", "config_cls,config_kwargs", [default, attention])


def skip_nothing(*arguments):
    """Instead of those of PEFT's helpers that skip models because of a part of a method's name or of the model's."""


common._skip_if_conv1d_not_supported = skip_nothing  # GPT-2's layers, for methods that are not in a list
features.skip_deberta_lora_tests = skip_nothing  # DeBERTa, for methods with "lora" in their name
decoders.check_beft_config = skip_nothing  # models without biases; means the method BEFT, but acts on all
