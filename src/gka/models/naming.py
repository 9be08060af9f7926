"""The two names of a cache: `past_key_values` until transformers 5.23, `cache` from 5.24 on.

The models take it under both in every version, and return it under the one that the version has.
"""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = (
    "cache"
    if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
    else "past_key_values"
)
"""What the installed transformers calls a cache, in its outputs and in what `generate` passes on."""


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache given under either name, or None.

    Raises:
        ValueError: under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "past_key_values and cache are two names of one argument: give one of the two"
        )
    return past_key_values if cache is None else cache
