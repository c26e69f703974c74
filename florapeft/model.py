"""FloraModel: FLoRA as a PEFT tuner."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from florapeft.config import FloraConfig
from florapeft.contract import ROUTES
from florapeft.layer import FloraLayer
from florapeft.rank import cap_rank
from florapeft.support import why_not
from florapeft.targets import (
    Target,
    describe,
    describe_caps,
    exact_targets,
    find_targets,
    is_shorthand,
    resolve_ranks,
    solve_budget,
    unmatched_names,
)

logger = logging.getLogger("florapeft")

_PREFIX = "base_model.model."  # of the keys of a PeftModel; a model with injected layers alone has none
_KEY_PARTS = ("flora_core", "flora_factors", "weight")
_ADAPTER_KEY = re.compile(r"\.flora_(core|factors)\.")


class FloraModel(BaseTuner):
    """A model with FLoRA adapters; made by `peft.get_peft_model` and `PeftModel.from_pretrained`.

    Args:
        model: the model to adapt; changed in place.
        peft_config: its `FloraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled from a checkpoint.
    """

    prefix = "flora_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def set_route(self, route: str) -> None:
        """Force the route of every adapted layer, or leave the choice to each with "auto".

        Raises:
            ValueError: an unknown route; nothing is changed.
        """
        if route not in ("auto", *ROUTES):
            raise ValueError(f"route must be 'auto' or one of {list(ROUTES)}, got {route!r}")
        for module in self.model.modules():
            if isinstance(module, FloraLayer):
                module.route = route

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, without its shortening of long `target_modules` to suffixes.

        Finding "embed_tokens" among those, PEFT would save the whole base embedding beside the adapter.
        """
        if adapter_name.isdecimal() or adapter_name in _KEY_PARTS:
            raise ValueError(
                f"adapter name {adapter_name!r} is a part of the keys that other adapters are saved under, and PEFT "
                "would drop those: choose a name that is neither a number nor one of " + ", ".join(_KEY_PARTS)
            )
        config = self.peft_config[adapter_name]
        given = config.target_modules
        if not config.inference_mode:
            _warn_of_unmatched(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if isinstance(given, set):
            config.target_modules = given
        elif is_shorthand(given) and isinstance(config.target_modules, set):
            config.target_modules = {
                name
                for name, module in model.named_modules()
                if isinstance(module, FloraLayer) and adapter_name in module.flora_core
            }

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict[str, Any]) -> FloraConfig:
        if peft_config.target_modules is None and model_config["model_type"] not in self.target_module_mapping:
            raise ValueError(
                f"Please specify `target_modules`: it is None, and PEFT has no default for models of type "
                f"{model_config['model_type']!r}. target_modules='all-weights' adapts every supported layer"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Check everything that can be wrong and resolve names and ranks, before PEFT changes the model."""
        targets = find_targets(model, peft_config)
        _check_modules_to_save(peft_config, targets)
        if is_shorthand(peft_config.target_modules):
            peft_config.target_modules = exact_targets(targets, model)
        if peft_config.budget is not None and peft_config.ranks is None:
            peft_config.ranks = solve_budget(model, targets, peft_config)
        caps = describe_caps(targets, resolve_ranks(targets, peft_config))
        if not peft_config.inference_mode:
            _note_what_to_know(caps, model)
        keys = peft_config.scale_pattern.keys()
        if unmatched := set(keys) - {get_pattern_key(keys, target.name) for target in targets}:
            found = sorted(unmatched)
            warnings.warn(f"scale_pattern has keys that match no target: {found}", RuntimeWarning, stacklevel=2)

    @staticmethod
    def _check_target_module_exists(peft_config: FloraConfig, key: str) -> Any:
        match = check_target_module_exists(peft_config, key)
        if match and peft_config.ranks is not None:
            return key in peft_config.ranks
        return match

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        reason = why_not(current_key, base, self.model)
        if reason:  # only when PEFT takes the names from a state dict, past `_prepare_model`
            raise ValueError(f"FLoRA cannot adapt {current_key}: {reason}")
        described = describe(current_key, base)
        rank = cap_rank(resolve_ranks([described], peft_config)[current_key], described.shape)
        scale_key = get_pattern_key(peft_config.scale_pattern.keys(), current_key)
        scale = peft_config.scale_pattern.get(scale_key, peft_config.scale)
        if isinstance(target, FloraLayer):
            target.update_layer(adapter_name, rank, peft_config, scale)
            return
        layer = described.layer(target, adapter_name, rank, peft_config, scale)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused path for inference reads the weights and calls no layer, unless one has a hook.
            layer.register_forward_pre_hook(_no_op)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # Unloading trainable tokens: PEFT's own way would assign the wrapper's computed weight as a parameter.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; with `safe_merge`, every layer is checked before the first one is merged."""
        self._check_merges(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_merges(merge and safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merges(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        if safe_merge:
            for module in self.model.modules():
                if isinstance(module, FloraLayer):
                    module.check_merge(adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops `adapter_names` silently where this method is missing.
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError("FLoRA does not support `adapter_names` (one adapter per sample of a batch) yet")
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`….flora_factors.<adapter>.<mode>.weight` → `….flora_factors.<mode>.weight`, and the core's key likewise."""
        start, marker, name = key.rpartition(f".flora_factors.{adapter_name}.")
        if not marker:
            start, marker, name = key.rpartition(f".flora_core.{adapter_name}.")
        return f"{start}{marker.removesuffix(f'{adapter_name}.')}{name}" if marker else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after checking names, shapes, dtypes and finiteness; nothing has been copied yet.

        Raises:
            ValueError: the checkpoint does not fit the model, or is broken; the message says where.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict()
        own = tuple(
            f"{name}.{attribute}.{adapter_name}."
            for name, module in model.named_modules()
            if isinstance(module, FloraLayer)
            for attribute in module.adapter_layer_names
        )
        expected = {key: value for key, value in state.items() if key.startswith(own)}
        others = {key.removeprefix(_PREFIX): value for key, value in state.items()}
        check_state_dict(remapped, expected, others, adapter_name)
        return remapped


def _check_modules_to_save(config: FloraConfig, targets: list[Target]) -> None:
    """PEFT looks for names to save by their ends, also among an adapter's own modules, which are named by mode."""
    for name in config.modules_to_save or ():
        if name.isdecimal() and any(int(name) < len(target.shape) for target in targets):
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save)}: PEFT matches ends of names, and {name!r} is also the "
                f"end of an adapter's factor {name}: give the full name, such as 'head.{name}'; a module at the top of "
                f"the model needs another name than {name!r}"
            )


def _note_what_to_know(caps: str | None, model: nn.Module) -> None:
    """Logs, once per attached adapter, what its user should know."""
    if caps:
        logger.warning(caps)
    norms = sum(isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in model.modules())
    if norms:
        logger.warning(
            f"This model has {norms} batch norms, whose running statistics change in train mode and are not saved "
            "with an adapter: keep them in eval mode while training, or save the merged model"
        )


def _warn_of_unmatched(config: FloraConfig, model: nn.Module) -> None:
    """PEFT passes over names that no module has, as long as another one matches; a misspelt head is not trained."""
    targets = config.target_modules if isinstance(config.target_modules, set) else set()
    heads = set(config.modules_to_save or ()) - set(SEQ_CLS_HEAD_NAMES)  # PEFT's task models add both usual names
    for field, names in (("target_modules", targets), ("modules_to_save", heads)):
        unmatched = unmatched_names(names, model)
        if unmatched and (field == "modules_to_save" or len(unmatched) < len(names)):
            found = "; ".join(unmatched)
            warnings.warn(f"{field} has names that no module has: {found}", RuntimeWarning, stacklevel=2)


def _no_op(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A hook that does nothing; not a lambda, so that models pickle."""


def check_state_dict(
    given: dict[str, Tensor], expected: dict[str, Tensor], others: dict[str, Tensor], adapter_name: str
) -> None:
    """Check a checkpoint's tensors against the ones they are to be loaded into.

    Args:
        given: tensors by key.
        expected: the model's own tensors of this adapter, by key; only their shapes matter.
        others: what else of the model a checkpoint may hold (a new head, biases, embeddings), by key without PEFT's
            prefix. Their shapes are for PEFT to check, which can be told to pass over those that differ.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, not floating point, or not finite.
    """

    def fail(problem: str, keys: list[str]) -> None:
        first = keys[0] + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
        raise ValueError(f"adapter {adapter_name!r} does not fit this model: {problem.format(key=first)}")

    own = {key: value for key, value in given.items() if _ADAPTER_KEY.search(key)}
    if missing := sorted(expected.keys() - own.keys()):
        fail("the checkpoint lacks {key}; is it for another base model?", missing)
    unknown = {key for key in given.keys() - own.keys() if key.removeprefix(_PREFIX) not in others}
    if extra := sorted((own.keys() - expected.keys()) | unknown):
        fail("the checkpoint has {key}, for which the model has no place; is it for another base model?", extra)
    if wrong := [key for key in own if own[key].shape != expected[key].shape]:
        # A factor's rows are the base weight's; everything else is rank.
        other_base = [k for k in wrong if ".flora_factors." in k and own[k].shape[:1] != expected[k].shape[:1]]
        first = sorted(other_base or wrong)[0]
        shapes = f"{tuple(own[first].shape)} in the checkpoint and {tuple(expected[first].shape)} in the model"
        hint = "is it for another base model?" if other_base else "was it saved with other ranks than its config says?"
        fail(f"{{key}} has shape {shapes}; {hint}", [first, *(k for k in wrong if k != first)])
    floating = [key for key in given if others[key.removeprefix(_PREFIX)].is_floating_point()]
    if integer := [key for key in floating if not given[key].is_floating_point()]:
        fail(f"{{key}} has dtype {given[integer[0]].dtype}, which is not floating point", integer)
    if broken := [key for key, value in given.items() if not value.is_meta and not torch.isfinite(value).all()]:
        fail("{key} has values that are not finite", broken)
