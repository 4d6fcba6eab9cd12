"""What every section of the configuration schema is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

OPERATIONAL: dict[str, Any] = {"operational": True}


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change between two attempts of the same run."""
    return Field(default, json_schema_extra=OPERATIONAL, **constraints)


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
