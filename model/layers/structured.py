"""What every replacement of a weight matrix offers: a product, the dense matrix it stands for, cost and tags.

`StructuredLinear` computes y = xW + b for a W that may never be formed. Subclasses hold the factors, multiply
with them and form W; which of the two happens, and when a formed W is kept, is decided here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Cost, Matrix, ModelError
from model.layers.choice import CostModel, Way

Mode = Literal["auto", "factored", "materialize", "cached"]
"""`factored` never forms W, `materialize` forms it per call, `cached` keeps it in inference, `auto` picks."""

Group = Literal["factor_big", "factor_small", "embedding", "dense"]
"""Parameters that may want their own learning rate."""


@dataclass(frozen=True, slots=True)
class ParameterTag:
    """How an optimizer should treat one parameter."""

    group: Group
    decay: bool
    """Whether weight decay acts on it; never on biases, scales and LayerNorm."""


class Tagged(nn.Module):
    """A module that knows how its own parameters want to be trained."""

    def tags(self) -> Mapping[str, ParameterTag]:
        """Tag of each parameter that the module itself holds, by local name."""
        return {
            name: ParameterTag("dense", decay=p.ndim > 1) for name, p in self.named_parameters(recurse=False)
        }


class StructuredLinear(Tagged, ABC):
    """y = xW + b, with W (n_in, n_out) held as `matrix` says; the first `n_bias` outputs have a bias.

    `mode` and `order` are how, not what: they are not saved and change no result beyond rounding.
    """

    cost_model: CostModel
    """What the product costs beside the dense one; `auto` picks by it."""

    def __init__(self, matrix: Matrix, n_in: int, n_out: int, *, n_bias: int) -> None:
        super().__init__()
        self.matrix, self.n_in, self.n_out, self.n_bias = matrix, n_in, n_out, n_bias
        self.cost: Cost = matrix.cost(n_in, n_out)
        self.bias = nn.Parameter(torch.zeros(n_bias)) if n_bias else None
        self.mode: Mode = "auto"
        self.share = self.cost.macs / (n_in * n_out)
        self._cached: tuple[tuple[object, ...], Tensor] | None = None

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """xW without forming W: (..., n_in) -> (..., n_out)."""

    @abstractmethod
    def weight_matrix(self) -> Tensor:
        """W (n_in, n_out), differentiable in the factors."""

    @abstractmethod
    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """Draw the factors so that the entries of W have standard deviation `std`; biases become 0."""

    def to_dense(self) -> tuple[Tensor, Tensor]:
        """W (n_in, n_out) and b (n_out,), detached copies; absent biases are 0."""
        weight = self.weight_matrix().detach().clone()
        bias = self.full_bias()
        return weight, weight.new_zeros(self.n_out) if bias is None else bias.detach().clone()

    def full_bias(self) -> Tensor | None:
        """The bias of all outputs (n_out,), or None where none has one."""
        if self.bias is None or self.n_bias == self.n_out:
            return self.bias
        return F.pad(self.bias, (0, self.n_out - self.n_bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        mode, bias = self.resolve_mode(x.numel() // self.n_in), self.full_bias()
        if mode == "factored":
            y = self.product(x)
            return y if bias is None else y + bias.to(y.dtype)  # as `F.linear` does under autocast
        weight = self._cached_weight() if mode == "cached" else self.weight_matrix()
        return F.linear(x, weight.mT, bias)

    def resolve_mode(self, tokens: int) -> Way:
        """What `forward` does with so many tokens, here and now."""
        inference = not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.mode == "auto":
            model = self.cost_model
            return model.in_inference(tokens, few=self._read()) if inference else model.in_training(tokens)
        if self.mode == "cached":  # a kept W would hide the factors from autograd and from the compiler
            return "cached" if inference else "materialize"
        return self.mode

    def _read(self) -> Literal["fp32", "bf16"] | None:
        """The type of the numbers that a product reads; None away from CPUs, where nothing is known of it."""
        weight = next(self.parameters())
        if weight.device.type != "cpu":
            return None
        half = torch.is_autocast_enabled("cpu") or weight.dtype in {torch.bfloat16, torch.float16}
        return "bf16" if half else "fp32"

    def _cached_weight(self) -> Tensor:
        """W, formed anew only if a factor has changed since."""
        half = torch.is_autocast_enabled(next(self.parameters()).device.type)  # W may be formed in bf16 then
        key, kept = (half, self._state()), self._cached
        if kept is None or kept[0] != key or key[1] is None:
            kept = self._cached = (key, self.weight_matrix().detach())
        return kept[1]

    def _state(self) -> tuple[object, ...] | None:
        """Differs after every change of a parameter or buffer; None if torch does not count their changes."""
        if self._modules:  # parametrizations, which hold the parameters themselves
            return None
        state: list[object] = []
        for held in (self._parameters, self._buffers):
            for tensor in held.values():
                if tensor is not None:
                    if tensor.is_inference():  # made in inference mode
                        return None
                    state += (tensor.data_ptr(), tensor._version, tensor.dtype)  # noqa: SLF001
        return tuple(state)

    def train(self, mode: bool = True) -> "StructuredLinear":  # noqa: FBT001, FBT002 - torch's signature
        """As in torch; a kept W is dropped."""
        self._cached = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.n_in}, {self.n_out}, {self.matrix.describe()}, mode={self.mode}"


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Choose how every structured layer of a model multiplies."""
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            module.mode = mode


def parameter_tags(model: nn.Module) -> dict[str, ParameterTag]:
    """Tag of every unique parameter, by its name in `model.named_parameters()`."""
    tags: dict[str, ParameterTag] = {}
    for prefix, module in model.named_modules():
        known = module.tags() if isinstance(module, Tagged) else {}
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            tags[full] = known.get(name, ParameterTag("dense", decay=False))  # LayerNorm
    names = {name for name, _ in model.named_parameters()}
    if missing := names - set(tags):
        raise ModelError(f"parameters without a tag: {', '.join(sorted(missing))}")
    return {name: tag for name, tag in tags.items() if name in names}


def normal_(parameter: nn.Parameter, *, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers drawn on the CPU, so that a seed means the same on every device."""
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
