"""GELU in its tanh form as x sigmoid(k x + K x^3): the same function, with one exponential and no tanh.

On CPUs it takes a third of the time of torch's, where a compiler makes one loop of its steps or they stay in
cache. Step by step over a large tensor it takes more.
"""

from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = 2 * sqrt(2 / pi)
"""k."""

CUBIC = 0.044715 * LINEAR
"""K."""


def gelu(x: Tensor, *, approximate: str) -> Tensor:
    """GELU of any shape; `approximate` is torch's name of the form."""
    if approximate == "tanh" and x.device.type == "cpu" and torch.compiler.is_compiling():
        wide = x.float() if x.dtype == torch.bfloat16 else x
        return (wide * torch.sigmoid(wide * (LINEAR + CUBIC * wide * wide))).to(x.dtype)
    return F.gelu(x, approximate=approximate)
