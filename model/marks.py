"""Marks of config and recipe fields: which of them decide a result, and so the address of what is built.

A field without a mark does. They stand here because recipes of methods carry them like every other section;
`pipeline.config.identity` reads them. Loads nothing.
"""

from collections.abc import Mapping
from typing import Any

NOT_IDENTITY: Mapping[str, Any] = {"identity": False}
"""`field(metadata=NOT_IDENTITY)`: workers, intervals and places never fork an address."""

UNLESS_DEFAULT: Mapping[str, Any] = {"identity": "unless default"}
"""`field(default=…, metadata=UNLESS_DEFAULT)`: came later; at its default it forks no address."""
