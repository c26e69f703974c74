"""FLoRA for every weight tensor of a PyTorch model, as a method of Hugging Face PEFT.

    import florapeft                                     # registers the method FLORA with PEFT
    model = peft.get_peft_model(model, florapeft.FloraConfig(r=16, target_modules="all-weights"))

Import it before PEFT loads an adapter: PEFT finds methods only after they have registered.
"""

from importlib.metadata import version

from florapeft._register import register
from florapeft.config import FloraConfig
from florapeft.extraction import extract
from florapeft.gradients import allocate, initialize_from_gradients
from florapeft.layer import FloraLayer
from florapeft.model import FloraModel
from florapeft.planning import plan
from florapeft.retraction import keep_orthonormal
from florapeft.tucker import Tucker, hooi, hosvd

__version__ = version("florapeft")
__all__ = [
    "FloraConfig",
    "FloraLayer",
    "FloraModel",
    "Tucker",
    "allocate",
    "extract",
    "hooi",
    "hosvd",
    "initialize_from_gradients",
    "keep_orthonormal",
    "plan",
]

register()
