"""How core and factors start.

Every start but `False` makes the update exactly zero. They differ in what is zero and in how large the rest is, which
sets the size of the first steps (Adam moves every entry that has a gradient by about the learning rate lr):

    released      core 0; factor n: normal of std √(1/2)/√r_n (kaiming_normal with a = √3 on a (d, r) matrix), as in
                  the code released with the paper. Only the core has a gradient at first.
    variance      core 0; factor n: normal of std 1/√r_n, for which an entry of dW moves by about lr whatever the order
                  and the rank. The *spectral norm* of that first step grows like lr · √(Π d_n), as in full
                  fine-tuning, so a rate that suits LoRA is too high on wide layers.
    zero_output   output factor 0; the other factors orthonormal, and the core's output unfolding too, times 1/√3: the
                  singular values of LoRA's A (kaiming_uniform with a = √5) on a wide layer. The first step on a linear
                  layer then has the spectral norm of LoRA's at alpha = r, ≈ lr · √(d_out r_out / 3), so that LoRA's
                  learning rates carry over at every width. Where the output mode is kept whole, there is no output
                  factor, and the core is zero instead.
    gradient      core 0; factor n: the leading left singular vectors of the mode-n unfolding of the gradient, which is
                  summed over some batches (`florapeft.initialize_from_gradients`). Until then as zero_output.

The rows of an embedding's input factor are looked up one at a time, so they, not its columns, are given the size that a
linear layer's `Uᵀx` has for an `x` of unit variance: orthonormal columns times `√num`.
What starts zero must receive a gradient from what does not: each function leaves exactly one zero among the tensors
that multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from florapeft.tucker import Tucker

DEFAULT_START = "zero_output"


@torch.no_grad()
def initialize(tucker: Tucker, start: bool | str, *, input_mode: int, output_mode: int, lookup: bool) -> None:
    """Fill core and factors in place. Tensors on the meta device are left alone.

    Args:
        tucker: the adapter's tensors.
        start: `FloraConfig.init_weights`.
        input_mode: the weight's input mode.
        output_mode: the weight's output mode.
        lookup: whether the input factor is looked up row by row (an embedding).
    """
    if tucker.core.is_meta:
        return
    if start is True or start == "gradient":
        start = DEFAULT_START
    if start in ("released", "variance"):
        gain = math.sqrt(0.5) if start == "released" else 1.0
        for factor in tucker.factors:
            if factor is not None:
                factor.normal_(std=gain / math.sqrt(factor.shape[1]))
        tucker.core.zero_()
        return

    for mode, factor in enumerate(tucker.factors):
        if factor is not None:
            _orthonormal_(factor)
            if lookup and mode == input_mode:
                factor.mul_(math.sqrt(factor.shape[0]))
    if start is False:
        # Small next to a pretrained weight, yet visible: each output moves by about _RANDOM_SIZE · |Uᵀx|.
        tucker.core.normal_(std=_RANDOM_SIZE / math.sqrt(tucker.core.numel() / tucker.core.shape[output_mode]))
        return
    output_factor = tucker.factors[output_mode]
    if output_factor is None:
        tucker.core.zero_()
    else:
        _orthonormal_(tucker.core.movedim(output_mode, 0))
        tucker.core.mul_(_LORA_GAIN)
        output_factor.zero_()


@torch.no_grad()
def start_from_bases(tucker: Tucker, bases: Sequence[Tensor | None]) -> None:
    """Fill in place: core zero, factors these bases, `None` for whole modes."""
    tucker.core.zero_()
    for factor, basis in zip(tucker.factors, bases, strict=True):
        if factor is not None:
            factor.copy_(basis)


_RANDOM_SIZE = 0.3
_LORA_GAIN = 3**-0.5


def _orthonormal_(tensor: Tensor) -> None:
    """Fill so that the unfolding of the first axis has orthonormal columns, or rows where it is wide.

    Computed in float32, for there is no QR in half precision; a view is written through.
    """
    filled = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    if tensor.ndim == 1:
        filled.normal_()
        filled /= filled.norm()
    else:
        nn.init.orthogonal_(filled)
    tensor.copy_(filled)
