"""What every section of the configuration shares: the mark of a field that cannot change a result."""

from collections.abc import Mapping
from typing import Any

NOT_IDENTITY: Mapping[str, Any] = {"identity": False}
"""`field(metadata=NOT_IDENTITY)`: workers, intervals and places never fork an address."""

UNLESS_DEFAULT: Mapping[str, Any] = {"identity": "unless default"}
"""`field(default=…, metadata=UNLESS_DEFAULT)`: came later; at its default it forks no address."""
