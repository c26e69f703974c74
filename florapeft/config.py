"""FloraConfig: what PEFT's LoraConfig has and makes sense here keeps LoRA's name."""

from __future__ import annotations

import math
import re
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig

from florapeft._peft_type import FLORA
from florapeft.rank import validate_rank

FORMAT_VERSION = 1
STARTS = ("released", "variance", "zero_output", "gradient")
ALLOCATIONS = ("uniform", "spectrum")
BIASES = ("none", "all", "flora_only")
ALL_WEIGHTS = "all-weights"
_LISTS = (list, tuple, set)


@dataclass
class FloraConfig(PeftConfig):
    """Configuration of FLoRA: an update `dW = scale · G ×₀ U₀ … ×ₙ₋₁ Uₙ₋₁` for weights of any order.

    The method: Si et al., "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning",
    ICLR 2025, arXiv 2405.14739.

    Args:
        r: rank of every channel mode (an int), or one rank per mode in the weight's own axis order, which needs all
            targets to have that order. Capped at each mode's size.
        kernel_r: rank of each spatial mode of a convolution; None keeps the kernel whole, or, with a budget, leaves
            it to the solver.
        budget: adapter parameters over all targets, as a count (int) or a share of the base model's parameters
            (float in (0, 1)); replaces `r`. Met from below, within 1% where the targets allow it. Heads and
            `modules_to_save` are not counted.
        allocation: how a budget is spread without data: "uniform" gives all modes of all targets the same share of
            their size as rank, as nearly as the budget allows; "spectrum" is what `florapeft.allocate` does.
        ranks: resolved ranks, `{full module name: [r_0, …]}`. Written when a budget is solved; targets that are not
            listed are not adapted. Where it is set, `budget` is only a record.
        scale: the paper's s, a plain multiplier of the update (never divided by a rank).
        flora_dropout: probability of dropping an entry of the adapter's input while training.
        init_weights: True for the default start, an update of exactly zero; False for a random small update; or the
            name of a start, one of "released", "variance", "zero_output" (see `florapeft.init`), or "gradient": the
            default start until `florapeft.initialize_from_gradients` is called.
        target_modules: list of names or suffixes (`^` begins what is a full name only), a regular expression over full
            names, "all-linear" or "all-weights"; None takes PEFT's table for models it knows, or nothing where there
            are `target_parameters`.
        target_parameters: list of names or suffixes of bare parameters of any order: stacks of experts, norm gains,
            biases, matrices that no layer holds. A vector's update is a vector. "all-weights" adds stacks of experts.
        exclude_modules: list of names or suffixes, or a regular expression, of modules to leave alone.
        rank_pattern: `{name, suffix or regular expression of a module: rank}`, which overrides `r`.
        scale_pattern: the same for `scale`.
        bias: which biases are trained and saved too: "none", "all", or "flora_only" (those of adapted layers).
        layers_to_transform: index or indices of the layers to adapt, where `target_modules` is a list.
        layers_pattern: name of the module list that `layers_to_transform` counts in.
        modules_to_save: modules that are trained and saved in full, such as a new head.
        trainable_token_indices: rows of the input embedding to train in full, as in PEFT's LoraConfig; it is not
            adapted then.
        ensure_weight_tying: keep input and output embedding tied where `modules_to_save` has one of them, as PEFT does
            for LoRA. Adapters of tied embeddings cannot be tied; "all-weights" leaves them out.
        save_batch_norm: keep a set of running statistics per adapter for every batch norm, and save it with the
            adapter. Without it, what training changes in them is lost, as in every adapter of PEFT's.
        format_version: of the saved adapter; a newer one than this release knows is refused.

    Raises:
        TypeError, ValueError: a value is of the wrong kind, out of range, or contradicts another.
    """

    r: int | list[int] = field(default=8, metadata={"help": "Rank of every channel mode, or one rank per mode."})
    kernel_r: int | None = field(
        default=None, metadata={"help": "Rank of each spatial mode; None keeps it whole, or leaves it to a budget."}
    )
    budget: int | float | None = field(
        default=None, metadata={"help": "Adapter parameters: a count, or a share of the base model's; replaces r."}
    )
    allocation: str = field(default="uniform", metadata={"help": "How a budget is spread without data."})
    ranks: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Resolved ranks by full module name; only these modules are adapted."}
    )
    scale: float = field(default=1.0, metadata={"help": "Multiplier of the update."})
    flora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    init_weights: bool | str = field(
        default=True, metadata={"help": f"True, False, or the name of a start: {', '.join(STARTS)}."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, 'all-linear' or 'all-weights'."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of bare parameters, such as stacks of experts."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave alone."}
    )
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict, metadata={"help": "Rank by module name or regular expression; overrides r."}
    )
    scale_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Scale by module name or regular expression; overrides scale."}
    )
    bias: str = field(default="none", metadata={"help": f"Biases to train too, one of {', '.join(BIASES)}."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved in full, such as a new head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the input embedding to train in full."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep tied embeddings tied that are in modules_to_save."}
    )
    save_batch_norm: bool = field(
        default=False, metadata={"help": "Keep the batch norms' running statistics with the adapter."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved adapter's format."})

    # Not fields: what `florapeft.allocate` hands to the adapter that is attached with this configuration next, and how
    # far its batches agreed.
    gradient_bases = None
    gradient_agreement = None
    # Nor this: whether an adapter that is attached with it has yet to get its values, from the file this was read from.
    awaits_values = False
    # Nor this: fields that attaching has written, each with what was given and what it became.
    resolved: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FLORA
        self._validate_kinds()
        self._validate_entries()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.target_parameters is not None:
            self.target_parameters = sorted(self.target_parameters)
        for name in ("save_batch_norm", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._validate_ranks()
        self._validate_budget()
        self._validate_numbers()
        self._validate_targets()
        if not isinstance(self.init_weights, bool) and self.init_weights not in STARTS:
            raise ValueError(f"init_weights must be True, False or one of {list(STARTS)}, got {self.init_weights!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {list(BIASES)}, got {self.bias!r}")
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"this adapter was saved in format version {self.format_version}; this florapeft reads 1 to "
                f"{FORMAT_VERSION}: upgrade florapeft to load it"
            )

    def _validate_kinds(self) -> None:
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("rank_pattern", "scale_pattern"), (dict,)),
            "ranks": (dict, type(None)),
            **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (*_LISTS, str, type(None))),
            **dict.fromkeys(("target_parameters", "modules_to_save"), (*_LISTS, type(None))),
            "trainable_token_indices": (list, tuple, dict, type(None)),
            "layers_to_transform": (list, tuple, int, type(None)),
            "format_version": (int,),
        }
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, allowed) or isinstance(value, bool):
                needed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
                raise TypeError(f"{name} must be of type {needed}, got {value!r}")

    def _validate_entries(self) -> None:
        """Check what the lists hold, and the keys of the dicts: names, which are texts, or indices."""
        named = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern")
        for name in (*named, "rank_pattern", "scale_pattern", "ranks"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else value or ()
            if wrong := [entry for entry in names if not isinstance(entry, str) or not entry]:
                raise TypeError(f"{name} must hold names, got {wrong[0]!r}")
        tokens = self.trainable_token_indices
        by_name = tokens if isinstance(tokens, dict) else {"": tokens or ()}
        if wrong := [entry for entry in by_name if not isinstance(entry, str)]:
            raise TypeError(f"trainable_token_indices must hold names as keys, got {wrong[0]!r}")
        layers = self.layers_to_transform
        indices = [("trainable_token_indices", rows) for rows in by_name.values()]
        for name, given in (*indices, ("layers_to_transform", [] if isinstance(layers, int) else layers or ())):
            if not isinstance(given, _LISTS):
                raise TypeError(f"{name} must hold lists of indices, got {given!r}")
            if wrong := [entry for entry in given if not isinstance(entry, int) or isinstance(entry, bool)]:
                raise TypeError(f"{name} must hold indices, got {wrong[0]!r}")

    def _validate_ranks(self) -> None:
        validate_rank(self.r, "r")
        if self.kernel_r is not None and not isinstance(self.kernel_r, int):
            raise TypeError(f"kernel_r must be a positive integer or None, got {self.kernel_r!r}")
        if self.kernel_r is not None:
            validate_rank(self.kernel_r, "kernel_r")
        for pattern, rank in self.rank_pattern.items():
            validate_rank(rank, f"rank_pattern[{pattern!r}]")
        for name, rank in (self.ranks or {}).items():
            validate_rank(rank, f"ranks[{name!r}]")

    def _validate_budget(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {list(ALLOCATIONS)}, got {self.allocation!r}")
        budget = self.budget
        if budget is None:
            return
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budget must be a parameter count (int) or a share (float), got {budget!r}")
        if isinstance(budget, int) and budget < 1:
            raise ValueError(f"budget as a count must be at least 1, got {budget}")
        if isinstance(budget, float) and not 0.0 < budget < 1.0:
            raise ValueError(f"budget as a share of the base model must be between 0 and 1, got {budget}")
        if self.ranks is None and (self.r != type(self).r or self.rank_pattern):
            given = f"r={self.r}" if self.r != type(self).r else f"rank_pattern={self.rank_pattern}"
            raise ValueError(f"budget={budget} and {given} contradict each other: a budget chooses the ranks, give one")

    def _validate_numbers(self) -> None:
        scales = {"scale": self.scale, **{f"scale_pattern[{k!r}]": v for k, v in self.scale_pattern.items()}}
        for name, value in scales.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        dropout = self.flora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"flora_dropout must be a number in [0, 1), got {dropout!r}")

    def _validate_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} works with target_modules as a list of names; "
                        f"here target_modules is the string {self.target_modules!r}"
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")
        named = ((name, getattr(self, name)) for name in ("target_modules", "exclude_modules"))
        expressions = [(name, value) for name, value in named if isinstance(value, str)]
        for name in ("rank_pattern", "scale_pattern", "modules_to_save"):
            expressions += [(name, str(key)) for key in getattr(self, name) or ()]
        for name, value in expressions:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name}: {value!r} is no regular expression: {error}") from None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> FloraConfig:
        """As PEFT's; an adapter that is attached with the result waits for its values."""
        config = super().from_pretrained(*args, **kwargs)
        config.awaits_values = True
        return config

    def as_given(self) -> FloraConfig:
        """A copy for another model, without what attaching to one has written into this; later changes are kept."""
        given = copy(self)
        for name, (before, after) in self.resolved.items():
            if getattr(self, name) is after:
                setattr(given, name, before)
        given.resolved = {}
        return given

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets as sorted lists, so that equal configurations are saved as equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
