"""An adapter from a fine-tuned model: the best Tucker tensors for what fine-tuning changed.

    W_tuned − W_base ≈ s · G ×₀ U₀ … ×ₙ₋₁ Uₙ₋₁

per target, by HOSVD and sweeps of HOOI (`florapeft.tucker`), at the ranks of the configuration; or at those that keep
most of the whole change within a budget. First everything is read and checked, then decomposed one weight at a time,
and only then is a model touched.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from florapeft.budget import choices_from_energies, describe_spending, rank_grid, spend_on_energy
from florapeft.checkpoint import CONTAINERS, PREFIX
from florapeft.combine import fill
from florapeft.config import FloraConfig
from florapeft.extracted import Extraction, Store, WeightFit
from florapeft.kinds import Embedding
from florapeft.layer import FloraWrapper
from florapeft.rank import cap_rank
from florapeft.sources import Source, Weights, module_from_config, open_weights, read_config
from florapeft.survey import Progress, Survey, difference, read_all, read_kept
from florapeft.target_ranks import budget_in_parameters, from_pattern, resolve_ranks
from florapeft.targets import Target, find_targets
from florapeft.tucker import Tucker, captured_energy, hooi, hosvd_core

logger = logging.getLogger("florapeft")

# Sweeps stop when one raises ‖core‖ by less than this part of ‖dW‖.
_TOLERANCE = 1e-6
_SWEEPS = 50


@torch.no_grad()
def extract(
    base: Source,
    tuned: Source,
    config: FloraConfig,
    *,
    adapter_name: str = "default",
    device: str | torch.device | None = None,
    work: str | PathLike | None = None,
    progress: Progress | None = None,
) -> PeftModel:
    """The adapter of `config` on `base` that comes nearest to `tuned`.

    What changed is kept in targets (as well as the ranks can), in `modules_to_save`, with `bias` and with
    `save_batch_norm`; all else that changed is lost, and listed in the report with its norm. The report is the model's
    attribute `extraction`, an `Extraction`.

    Targets that did not change get no adapter. With `r`, `ranks` or `rank_pattern` every other target gets the rank
    that they say; with `budget`, the ranks that keep most of the whole change, so that matrices are in LoRA's form (one
    mode whole), which takes fewer parameters for the same error. The ranks are written to the configuration's `ranks`.

    Args:
        base: the model before fine-tuning. A module is wrapped in place, as by `peft.get_peft_model`, with its weights
            as they are; a folder (or file) of safetensors is read one tensor at a time, and the returned model then
            stands on the meta device but for the adapter: save it, and load it onto the base.
        tuned: the model after it, as a module or a folder. If both are folders, tuned's config.json says what the model
            is.
        config: what to adapt, and the ranks or the budget.
        adapter_name: name of the adapter.
        device: where to compute; by default where the base's tensors are.
        work: a folder for the decompositions of weights, made if missing. A second call finds them there and goes on
            where the first one was stopped; those of other weights or ranks are not used, but overwritten.
        progress: called as `progress(stage, done, count)`.

    Returns:
        `base` with the adapter, to be trained further, merged or saved.

    Raises:
        ValueError, OSError, TypeError: the two are not of one architecture, shapes differ, a tensor is missing,
            quantised or not finite, no target changed, or the configuration does not fit. Nothing has been changed.
    """
    device = None if device is None else torch.device(device)
    progress = progress or (lambda stage, done, count: None)
    if config.trainable_token_indices is not None:
        raise ValueError(
            "trainable_token_indices cannot be extracted: target the embedding, or put it in modules_to_save"
        )
    weights = {"tuned": open_weights(tuned, "tuned"), "base": open_weights(base, "base")}
    model = _structure(base, tuned)
    with warnings.catch_warnings():  # attaching the adapter will repeat them
        warnings.simplefilter("ignore")
        targets = find_targets(model, config)
        kept_names = _rehearse(model, config, adapter_name)
    budget = _check_ranks(model, targets, config)
    survey = read_all(model, targets, kept_names, weights, device, progress)
    changed = [target for target in targets if survey.norms[target.name] > 0]
    if not changed:
        raise ValueError(
            f"none of the {len(targets)} targets differs between base and tuned: there is nothing to extract"
        )

    updates, store = _Updates(model, config, survey, weights, device), Store(work)
    if budget is None:
        configured = resolve_ranks(changed, config)
        ranks = {target.name: cap_rank(configured[target.name], target.shape) for target in changed}
    else:
        ranks = _spend(budget, changed, config, updates, store, progress)
    adapted = [target for target in changed if target.name in ranks]
    tuckers, fits = _fit_all(adapted, ranks, updates, store, progress)
    kept = {key: read_kept(survey.places[name], weights, device) for key, name in kept_names.items()}
    final = replace(copy.deepcopy(config), ranks={name: list(tucker.rank) for name, tucker in tuckers.items()})
    result = _attach(model, final, adapter_name, tuckers, kept)
    lost = [*survey.lost, *(survey.as_lost(target) for target in changed if target.name not in ranks)]
    result.extraction = Extraction(
        weights=tuple(fits),
        unchanged=tuple(target.name for target in targets if survey.norms[target.name] == 0),
        kept=tuple(sorted(kept_names.values())),
        lost=tuple(sorted(lost, key=lambda one: -one.norm)),
    )
    return result


def _structure(base: Source, tuned: Source) -> nn.Module:
    """The model to adapt: `base` itself, or its structure on the meta device."""
    if isinstance(base, nn.Module):
        return base
    if isinstance(tuned, nn.Module):
        return _on_meta(tuned)
    before, after = (read_config(Path(folder).expanduser()) for folder in (base, tuned))
    types = [(given or {}).get("model_type") for given in (before, after)]
    if None not in types and types[0] != types[1]:
        raise ValueError(
            f"base is a {types[0]} and tuned a {types[1]} (by their config.json): one architecture is needed"
        )
    model = module_from_config(Path(tuned).expanduser())
    model.name_or_path = str(base)  # what the adapter says it is for
    return model


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without its weights."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def _rehearse(model: nn.Module, config: FloraConfig, adapter_name: str) -> dict[str, str]:
    """Attach the adapter to a copy without weights, which raises whatever attaching raises.

    Returns:
        What the adapter's file will hold besides core and factors: `{key: name in the base's state dict}`.
    """
    trial = replace(copy.deepcopy(config), budget=None, r=1, rank_pattern={})
    adapted = get_peft_model(_on_meta(model), trial, adapter_name, low_cpu_mem_usage=True)
    keys = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
    own = tuple(f".{container}." for container in CONTAINERS[:2])
    names = {key: key.removeprefix(PREFIX) for key in keys if not any(part in key for part in own)}
    inserted = rf"\.({CONTAINERS[2]}|base_layer|original_module|modules_to_save(\.{re.escape(adapter_name)})?)(?=\.)"
    return {key: re.sub(inserted, "", name) for key, name in names.items()}


class _Updates(NamedTuple):
    """Computes the change of a target when it is asked for."""

    model: nn.Module
    config: FloraConfig
    survey: Survey
    weights: dict[str, Weights]
    device: torch.device | None

    def __call__(self, target: Target) -> tuple[Tensor, float]:
        """What an adapter can learn of the change, and the norm of what it cannot: the padding row of an embedding."""
        before, after = self.survey.places[f"{target.module}.{target.weight}"]
        update = difference(
            self.weights["base"].read(before, self.device), self.weights["tuned"].read(after, self.device)
        )
        padding = self.model.get_submodule(target.module).padding_idx if target.layer is Embedding else None
        if padding is None:
            return update, 0.0
        missed = update[padding].norm().item()
        update[padding] = 0
        return update, missed

    def about(self, target: Target, **more: Any) -> dict[str, Any]:
        """What a result for this very change is kept under."""
        survey = self.survey
        named = {"name": target.name, "norm": survey.norms[target.name]}
        return {**named, "fingerprint": survey.fingerprints[target.name], **more}

    def scale(self, target: Target) -> float:
        return from_pattern(self.config.scale_pattern, target, self.config.scale)


def _check_ranks(model: nn.Module, targets: list[Target], config: FloraConfig) -> int | None:
    """Check what the configuration says of ranks and scales; the budget as a count, where it has to be spent."""
    if unscaled := [t.name for t in targets if from_pattern(config.scale_pattern, t, config.scale) == 0]:
        raise ValueError(f"the scale of {unscaled[0]} is 0, with which no adapter has an effect")
    if config.budget is not None and config.ranks is None:
        return budget_in_parameters(model, config.budget)
    resolve_ranks(targets, config)
    return None


def _spend(
    budget: int, targets: list[Target], config: FloraConfig, updates: _Updates, store: Store, progress: Progress
) -> dict[str, tuple[int, ...]]:
    """The ranks that keep most of these very updates, all targets together, within the budget."""
    choices = {}
    for count, target in enumerate(targets):
        progress("measuring", count, len(targets))
        grid, energies = rank_grid(target.shape), None
        about = updates.about(target, grid=grid)
        if (kept := store.get(target.name, "energies", about)) is not None:
            energies = kept["energies"]
        else:
            energies = captured_energy(hosvd_core(updates(target)[0]), grid).flatten().cpu()
            store.put(target.name, "energies", about, {"energies": energies})
        choices[target.name] = [
            choice
            for choice in choices_from_energies(target.shape, energies.tolist())
            if config.kernel_r is None
            or all(
                r == min(config.kernel_r, size)
                for mode, (r, size) in enumerate(zip(choice.rank, target.shape, strict=True))
                if mode not in target.channel_modes
            )
        ]
    progress("measuring", len(targets), len(targets))
    ranks = spend_on_energy(choices, budget)
    if note := describe_spending(choices, ranks, budget):
        logger.warning(note)
    return ranks


def _fit_all(
    targets: list[Target], ranks: dict[str, tuple[int, ...]], updates: _Updates, store: Store, progress: Progress
) -> tuple[dict[str, Tucker], list[WeightFit]]:
    """The Tucker tensors of all targets, and how well they fit."""
    tuckers, fits = {}, []
    for count, target in enumerate(targets):
        progress("fitting", count, len(targets))
        tucker, error = _fit(target, ranks[target.name], updates, store)
        tuckers[target.name] = tucker
        norm = updates.survey.norms[target.name]
        fits.append(WeightFit(target.name, target.shape, tucker.rank, tucker.parameters, norm, error))
    progress("fitting", len(targets), len(targets))
    return tuckers, fits


def _fit(target: Target, rank: tuple[int, ...], updates: _Updates, store: Store) -> tuple[Tucker, float]:
    """The best Tucker tensor of this rank, divided by the adapter's scale, and its relative error."""
    norm = updates.survey.norms[target.name]
    about = updates.about(target, shape=target.shape, rank=rank, scale=updates.scale(target))
    kept = store.get(target.name, "tucker", about)
    if kept is None:
        update, missed = updates(target)
        tucker = hooi(update, rank, iterations=_SWEEPS, tolerance=_TOLERANCE)
        error = math.hypot((update - tucker.to_tensor()).norm().item(), missed) / norm
        kept = {"core": (tucker.core / updates.scale(target)).cpu(), "error": torch.tensor(error, dtype=torch.float64)}
        kept |= {str(mode): factor.cpu() for mode, factor in enumerate(tucker.factors) if factor is not None}
        store.put(target.name, "tucker", about, kept)
    factors = tuple(kept.get(str(mode)) for mode in range(len(rank)))
    return Tucker(kept["core"], factors), kept["error"].item()


def _attach(
    model: nn.Module, config: FloraConfig, adapter_name: str, tuckers: dict[str, Tucker], kept: dict[str, Tensor]
) -> PeftModel:
    """Attach the adapter and fill it."""
    result = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=True)
    _materialize(result, adapter_name)
    fill(result.base_model.model, adapter_name, tuckers)
    own = get_peft_model_state_dict(result, adapter_name=adapter_name, save_embedding_layers=False)
    for key, value in kept.items():
        own[key].copy_(value)
    return result


def _materialize(model: PeftModel, adapter_name: str) -> None:
    """Give the adapter's tensors memory: on their base layer's device, on the CPU if that is on the meta device."""
    state = model.state_dict(keep_vars=True)
    own = get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=False).values()
    waiting = {id(tensor) for tensor in own if tensor.is_meta}
    for wrapper in model.modules():
        first = next(wrapper.get_base_layer().parameters(), None) if isinstance(wrapper, FloraWrapper) else None
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        dtype = None if first is None else torch.promote_types(first.dtype, torch.float32)
        for module in wrapper.modules() if isinstance(wrapper, FloraWrapper) else [wrapper]:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if id(tensor) in waiting:
                    real = torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, name, nn.Parameter(real, tensor.requires_grad) if is_parameter else real)
