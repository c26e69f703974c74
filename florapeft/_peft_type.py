"""Adds the member `FLORA` to PEFT's `PeftType`, which has no plug-in mechanism of its own.

`PeftType` is a `str` enum with members: it cannot be subclassed, and PEFT imports it by value everywhere, so it
cannot be swapped either. Extending it in place is the one way in that leaves lookups by value, by name, by iteration,
pickling and JSON working.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType


def ensure_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, adding the member first if PEFT does not have it. Idempotent."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # EnumMeta.__setattr__ guards members, so the attribute is set below it.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


FLORA = ensure_peft_type("FLORA")
