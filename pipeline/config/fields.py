"""What every section of the configuration shares: the mark of a field that cannot change a result."""

from collections.abc import Mapping
from typing import Any

NOT_IDENTITY: Mapping[str, Any] = {"identity": False}
"""`field(metadata=NOT_IDENTITY)`: workers, intervals and places never fork an address."""
