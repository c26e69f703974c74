"""FloraModel: FLoRA as a PEFT tuner."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from florapeft.batch_norm import (
    FloraBatchNorm,
    forget_warning,
    has_statistics,
    norms_with_statistics,
    warn_at_first_step,
    warn_when_trained,
)
from florapeft.checkpoint import CONTAINERS, PREFIX, check_state_dict, under_other_names, where_they_stand
from florapeft.checks import check_adapter_name, check_modules_to_save, check_nesting, check_tokens, warn_of_unmatched
from florapeft.combine import check_combination, combined_config, combined_tuckers, compress, fill
from florapeft.config import FloraConfig
from florapeft.contract import ROUTES
from florapeft.init import start_from_bases
from florapeft.kinds import WeightLayer
from florapeft.layer import FloraLayer, FloraWrapper
from florapeft.mixed import mixed_batch
from florapeft.rank import cap_rank, resolve_rank
from florapeft.support import is_read, places, why_not
from florapeft.target_ranks import (
    budget_in_parameters,
    describe_caps,
    from_pattern,
    resolve_ranks,
    solve_budget,
    unmatched_patterns,
)
from florapeft.targets import (
    Target,
    adapted_targets,
    bare_parameters,
    describe,
    exact_targets,
    find_targets,
    is_selected,
    is_shorthand,
)
from florapeft.updated import loaded

logger = logging.getLogger("florapeft")


class FloraModel(BaseTuner):
    """A model with FLoRA adapters; made by `peft.get_peft_model` and `PeftModel.from_pretrained`.

    Args:
        model: the model to adapt; changed in place.
        peft_config: its `FloraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled from a checkpoint.
    """

    prefix = "flora_"
    tuner_layer_cls = FloraWrapper
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

    def set_recompute(self, recompute: bool) -> None:
        """Trade time for memory: with True, a layer keeps nothing of its update for the backward pass but its input."""
        for module in self.model.modules():
            if isinstance(module, FloraLayer):
                module.recompute = recompute

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, without its shortening of long `target_modules` to suffixes.

        Finding "embed_tokens" among those, PEFT would save the whole base embedding beside the adapter.
        """
        check_adapter_name(adapter_name, model)
        config = self.peft_config[adapter_name]
        if config.resolved and not config.inference_mode:  # attached before, and that adapter saves what it is
            config = self.peft_config[adapter_name] = config.as_given()
        given = {name: getattr(config, name) for name in ("target_modules", "target_parameters", "ranks")}
        if not config.inference_mode:
            warn_of_unmatched(config, model)
        try:
            with warnings.catch_warnings():
                # PEFT looks for rank patterns among modules alone, and is silent about one name to exclude beside
                # another.
                warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
                warnings.filterwarnings("ignore", message="You have passed exclude_modules=")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            vars(config).update(given)  # for another model, or another attempt
            raise
        config.target_modules = self._target_modules
        now = {name: (value, getattr(config, name)) for name, value in given.items()}
        config.resolved = {name: values for name, values in now.items() if values[0] != values[1]}
        if config.save_batch_norm:
            self._keep_statistics(model, adapter_name)
        elif not config.inference_mode:
            warn_when_trained(model)
        if config.init_weights == "gradient" and config.gradient_bases is None and not config.inference_mode:
            warn_at_first_step(
                (module for module in model.modules() if isinstance(module, FloraLayer)),
                f"adapter {adapter_name!r} has init_weights='gradient' and trains from the default start: "
                "florapeft.initialize_from_gradients was not called",
            )
        config.gradient_bases = None  # they have served

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for name, config in self.peft_config.items():
            if name in self.active_adapters and not inference_mode:
                config.awaits_values = False  # it can be trained from now on

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict[str, Any]) -> FloraConfig:
        if peft_config.target_modules is None:
            if peft_config.target_parameters:  # and no modules, as with LoRA
                return peft_config
            if model_config["model_type"] not in self.target_module_mapping:
                raise ValueError(
                    f"Please specify `target_modules`: it is None, and PEFT has no default for models of type "
                    f"{model_config['model_type']!r}. target_modules='all-weights' adapts every supported layer"
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _add_modules_to_save_to_tie(self, peft_config: FloraConfig, tied_weight_keys: list[str]) -> None:
        # There is nothing of LoRA in it.
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: FloraConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying: adapters of tied weights ({', '.join(sorted(tied_weight_keys))}) cannot be tied; "
            "leave the embedding out of target_modules, or train it in full by modules_to_save"
        )

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Check everything that can be wrong and resolve names and ranks, before PEFT changes the model."""
        targets = find_targets(model, peft_config)
        check_modules_to_save(peft_config, targets)
        check_tokens(model, targets, peft_config)
        check_nesting(model, targets, peft_config)
        if peft_config.budget is not None and peft_config.ranks is None:
            budget = budget_in_parameters(model, peft_config.budget)
            peft_config.ranks = solve_budget(targets, peft_config, budget)
            targets = [target for target in targets if target.name in peft_config.ranks]
        if is_shorthand(peft_config.target_modules):
            peft_config.target_modules = exact_targets(targets, model)
            peft_config.target_parameters = bare_parameters(targets) or None
        caps = describe_caps(targets, resolve_ranks(targets, peft_config))
        if caps and not peft_config.inference_mode:
            logger.warning(caps)
        for field in () if peft_config.inference_mode else ("rank_pattern", "scale_pattern"):
            if unmatched := unmatched_patterns(getattr(peft_config, field), targets):
                warnings.warn(f"{field} has keys that match no target: {unmatched}", RuntimeWarning, stacklevel=1)
        self._bare_targets = [target for target in targets if target.bare]
        self._target_modules = peft_config.target_modules
        self._places = places(model)

    @staticmethod
    def _check_target_module_exists(peft_config: FloraConfig, key: str) -> Any:
        match = is_selected(peft_config, key)
        if match and peft_config.ranks is not None:
            # A target of an attention module is one of its weights.
            return key in peft_config.ranks or any(name.startswith(f"{key}.") for name in peft_config.ranks)
        return match

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if has_statistics(base):  # in a state dict that PEFT takes the names from; `_keep_statistics` sees to them
            return
        reason = why_not(current_key, base, self.model)
        if reason:  # only when PEFT takes the names from a state dict, past `_prepare_model`
            raise ValueError(f"FLoRA cannot adapt {current_key}: {reason}")
        for described in describe(current_key, base):
            if peft_config.ranks is None or described.name in peft_config.ranks:
                target = self._adapt(described, target, target_name, parent, peft_config, adapter_name)

    def _inject_parameters(
        self, peft_config: FloraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        for described in self._bare_targets:
            parent_name, _, own_name = described.module.rpartition(".")
            parent, target = model.get_submodule(parent_name), model.get_submodule(described.module)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt(described, target, own_name, parent, peft_config, adapter_name)
        return [described.name for described in self._bare_targets]

    def _adapt(
        self,
        described: Target,
        target: nn.Module,
        own_name: str,
        parent: nn.Module,
        config: FloraConfig,
        adapter_name: str,
    ) -> nn.Module:
        """Give one weight an adapter, in the tuner layer that its module has or now gets, which is returned."""
        rank = cap_rank(resolve_ranks([described], config)[described.name], described.shape)
        scale = from_pattern(config.scale_pattern, described, config.scale)
        layer = target if isinstance(target, described.layer) else described.layer(target, adapter_name, self.model)
        layer.update_layer(adapter_name, described.weight, rank, config, scale)
        if bases := (config.gradient_bases or {}).get(described.name):
            start_from_bases(layer.tuckers(adapter_name)[described.weight], bases)
        if layer is not target:
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fused path for inference reads the weights and calls no layer, unless one has a hook.
                layer.register_forward_pre_hook(_no_op)
            if isinstance(layer, WeightLayer):
                layer.is_read = is_read(described.module, self.model)
            self._replace_module(parent, own_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        return layer

    def _keep_statistics(self, model: nn.Module, adapter_name: str) -> None:
        """Give every batch norm a set of running statistics for this adapter."""
        for name, norm in norms_with_statistics(model):
            layer = model.get_submodule(name.removesuffix(".base_layer"))
            if not isinstance(layer, FloraBatchNorm):
                parent_name, _, own_name = name.rpartition(".")
                layer = FloraBatchNorm(norm, adapter_name)
                layer.set_adapter(self.active_adapters)
                self._replace_module(model.get_submodule(parent_name), own_name, layer, norm)
            layer.update_layer(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """In every place where the child stands.

        PEFT's would move 8-bit layers whole, with adapters that are still on the meta device; and, when unloading,
        assign the weight to the layer that has it, also where that is a computed one.
        """
        if isinstance(child, FloraLayer) and not isinstance(new_module, BaseTunerLayer):
            child.release()
        for place, name in self._places.get(id(child), [(parent, child_name)]):
            setattr(place, name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; every layer is checked before the first one is merged."""
        self._check_merges(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merges(safe_merge, adapter_names)
        forget_warning(self.model.modules())
        self._places = places(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merges(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, FloraWrapper):
                with loaded(module.get_base_layer()):
                    module.check_merge(adapter_names, finite=safe_merge)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        r: int | list[int] | None = None,
    ) -> None:
        """Add an adapter whose update is the weighted sum of others', with their scales as they are now.

        Args:
            adapters: names of the adapters to combine.
            weights: one number per adapter, of any sign.
            adapter_name: name of the new adapter; it is not activated.
            combination_type: "cat" is exact, and its ranks are the sums of the parts' (at most the mode's size); "hooi"
                is the best approximation of rank `r` that higher-order orthogonal iteration finds.
            r: for "hooi", the rank of every channel mode, or one per mode.

        Raises:
            ValueError: unknown or taken names, weights that are not one finite number per adapter, an adapter that
                also trains something that does not add up (heads, tokens, biases, batch norms). Nothing is changed.
        """
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type, r)
        tuckers = combined_tuckers(self.model, adapters, weights)
        targets = [target for target in adapted_targets(self.model) if target.name in tuckers]
        if combination_type == "hooi":
            for name, shape, modes in ((t.name, t.shape, t.channel_modes) for t in targets):
                tuckers[name] = compress(tuckers[name], cap_rank(resolve_rank(shape, r, None, modes, name), shape))
        config = combined_config(
            self.peft_config[adapters[0]], tuckers, exact_targets(targets, self.model), bare_parameters(targets)
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._cast_adapter_dtype(adapter_name)
        fill(self.model, adapter_name, tuckers)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return mixed_batch(self.model, kwargs.pop("adapter_names", None), kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`….flora_factors.<adapter>.<mode>.weight` → `….flora_factors.<mode>.weight`, and so for all containers."""
        for container in CONTAINERS:
            start, marker, name = key.rpartition(f".{container}.{adapter_name}.")
            if marker:
                return f"{start}.{container}.{name}"
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after checking names, shapes, dtypes and finiteness; nothing has been copied yet.

        Raises:
            ValueError: the checkpoint does not fit the model, or is broken; the message says where.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict(keep_vars=True)
        own = tuple(
            f"{name}.{attribute}.{adapter_name}."
            for name, module in model.named_modules()
            if isinstance(module, FloraWrapper)
            for attribute in module.adapter_layer_names
        )
        expected = {key: value for key, value in state.items() if key.startswith(own)}
        others = {key.removeprefix(PREFIX): value for key, value in state.items()}
        remapped = where_they_stand(remapped, others)
        try:
            check_state_dict(remapped, expected, others, adapter_name)
        except ValueError:
            if config.awaits_values and isinstance(model, PeftModel):
                model.delete_adapter(adapter_name)  # or it would be there, untrained, and in the way of the right file
            raise
        config.awaits_values = False
        forget_warning(module for module in model.modules() if isinstance(module, FloraLayer))
        return remapped | under_other_names(remapped, model)


def _no_op(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A hook that does nothing; not a lambda, so that models pickle."""
