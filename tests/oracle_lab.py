"""To hold our algebra against the NumPy references: arrays as tensors, what is equal, how much is drawn."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same numbers."""
    return torch.from_numpy(np.ascontiguousarray(array))


def close(ours: torch.Tensor | float, theirs: np.ndarray | float, *, rtol: float = 1e-8) -> None:
    """Equal up to `rtol` of each entry and of the largest, at least of 1."""
    ours = ours.numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * max(1.0, float(np.abs(theirs).max())))
