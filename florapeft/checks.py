"""Whether a configuration, by itself sound, fits the model that it is attached to; nothing is changed."""

from __future__ import annotations

import re
import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from florapeft.batch_norm import has_statistics
from florapeft.checkpoint import CONTAINERS
from florapeft.config import FloraConfig
from florapeft.kinds import WeightLayer
from florapeft.layer import FloraWrapper
from florapeft.parameters import FloraParameters
from florapeft.targets import Target, candidates, own_parameters, token_modules, unmatched_names


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """An adapter's name becomes part of the names of modules and of the keys that adapters are saved under."""
    parts = {*CONTAINERS, "out_proj_weight", *(name.rpartition(".")[2] for name, _ in model.named_parameters())}
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter name {adapter_name!r} cannot be that of a module: choose one that is not empty, without dots, "
            "that no attribute of torch's modules has"
        )
    if adapter_name.isdecimal() or adapter_name in parts:
        raise ValueError(
            f"adapter name {adapter_name!r} can be a part of the keys that other adapters are saved under, and PEFT "
            f"would drop those: choose a name that is neither a number, nor that of a parameter, nor one of "
            f"{', '.join(CONTAINERS)}"
        )


def check_modules_to_save(config: FloraConfig, targets: list[Target]) -> None:
    """PEFT looks for names to save by their ends, also among an adapter's own modules, named by mode and weight."""
    keys = [target.weight.replace(".", "_") for target in targets if not issubclass(target.layer, WeightLayer)]
    for name in config.modules_to_save or ():
        if name.isdecimal() and any(int(name) < len(target.shape) for target in targets):
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save)}: PEFT matches ends of names, and {name!r} is also the "
                f"end of an adapter's factor {name}: give the full name, such as 'head.{name}'; a module at the top of "
                f"the model needs another name than {name!r}"
            )
        if ends := [key for key in keys if key.endswith(name)]:
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save)}: PEFT matches ends of names, and {name!r} is also the "
                f"end of what the adapter of {ends[0]!r} is called: give the full name"
            )


def check_tokens(model: nn.Module, targets: list[Target], config: FloraConfig) -> None:
    """PEFT finds that it cannot train rows of an adapted embedding only after everything has been adapted."""
    adapted = {target.module for target in targets}
    for name in token_modules(model, config):
        if name in adapted or isinstance(model.get_submodule(name), FloraWrapper):
            raise ValueError(
                f"trainable_token_indices: {name} has an adapter, by target_modules or another adapter's, and PEFT "
                "trains rows of layers without adapters only: leave it out of one of the two"
            )


def check_nesting(model: nn.Module, targets: list[Target], config: FloraConfig) -> None:
    """PEFT unloads the outer one of two nested layers, so that adapters have to agree on what they wrap."""
    for target in targets:
        module = model.get_submodule(target.module)
        inner = [name for name, inside in module.named_modules() if isinstance(inside, FloraWrapper)]
        if isinstance(module, FloraWrapper) and not isinstance(module, target.layer):
            kind = type(module).__name__
            raise ValueError(f"cannot adapt {target.name}: another adapter has {target.module} as a flora.{kind}")
        if inner and not isinstance(module, BaseTunerLayer):
            raise ValueError(f"cannot adapt {target.name}: another adapter is on {target.module}.{inner[0]}, inside it")
    for name, module in model.named_modules():
        if name.endswith(tuple(config.modules_to_save or ())) and not isinstance(module, AuxiliaryTrainingWrapper):
            inner = [inside for inside, other in module.named_modules() if isinstance(other, FloraWrapper)]
            if inner and inner != [""]:  # PEFT refuses those itself
                raise ValueError(f"modules_to_save: another adapter is on {name}.{inner[-1]}, inside {name}")
    if config.save_batch_norm:
        wrapped = {target.module for target in targets if issubclass(target.layer, FloraParameters)}
        wrapped |= {name for name, module in model.named_modules() if isinstance(module, FloraParameters)}
        for name, module in model.named_modules():
            outer = [other for other in wrapped if f"{name}.".startswith(f"{other}.")]
            if outer and has_statistics(module):
                raise ValueError(
                    f"save_batch_norm=True: the batch norm {name} is, or is inside, {outer[0]}, whose parameters are "
                    "adapted by name: PEFT would not find it again inside that wrapper"
                )


def warn_of_unmatched(config: FloraConfig, model: nn.Module) -> None:
    """PEFT passes over names that no module has, as long as another one matches; a misspelt head is not trained."""
    modules = [name for name, _ in model.named_modules()]
    excludable = [*modules, *own_parameters(dict(candidates(model)))]
    targets, excluded = ([] if isinstance(n, str) else n or [] for n in (config.target_modules, config.exclude_modules))
    heads = set(config.modules_to_save or ()) - set(SEQ_CLS_HEAD_NAMES)  # PEFT's task models add both usual names
    for field, names, known in (
        ("target_modules", targets, modules),
        ("modules_to_save", heads, modules),
        ("exclude_modules", excluded, excludable),
    ):
        unmatched = unmatched_names(names, known)
        if unmatched and (field != "target_modules" or len(unmatched) < len(names)):
            found = "; ".join(unmatched)
            warnings.warn(f"{field} has names that no module has: {found}", RuntimeWarning, stacklevel=2)
    pattern = config.exclude_modules
    if isinstance(pattern, str) and not any(re.fullmatch(pattern, name) for name in excludable):
        warnings.warn(
            f"exclude_modules={pattern!r} matches no module: a string is a regular expression over full names",
            RuntimeWarning,
            stacklevel=2,
        )
