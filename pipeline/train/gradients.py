"""All gradients of a model in one flat tensor, so that a step of any world size is one sum.

`p.grad` of every parameter is a view into the buffer; backward adds into it. After the last micro-batch one
all-reduce *sums* the buffer over ranks, and the loss rides along in its last element. That is the data
parallelism of `DistributedDataParallel` minus its averaging: a rank with more rows than another, with fewer
micro-batches, or with no rows at all needs nothing special, and because the layout never changes, a restarted
run repeats the sums of an undisturbed one to the bit (torch's class re-orders its buckets after the first
step). The cost: the sum starts after backward, not during it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.errors import TrainError
from pipeline.train.topology import Topology

_ALIGN = 32
"""Elements; fused optimizer kernels read 16 bytes at once, and slower where a tensor starts between."""


class GradientBuffer:
    """Gradients of `parameters`, and the loss that they belong to."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Allocate the buffer beside the parameters and point every `grad` into it."""
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        offsets, end = [], 0
        for parameter in self._parameters:
            if parameter.dtype != torch.float32:
                raise TrainError(f"a parameter is {parameter.dtype}; weights in training are float32")
            offsets.append(end)
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        if not self._parameters:
            raise TrainError("the model has no trainable parameter, so there is nothing to train")
        device = self._parameters[0].device
        self._flat = torch.zeros(end + 1, dtype=torch.float32, device=device)
        self._gradients = self._flat[:end]
        self._loss = self._flat[end:]  # (1,)
        for parameter, start in zip(self._parameters, offsets, strict=True):
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)

    def zero_(self) -> None:
        """Begin a step."""
        self._flat.zero_()

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch: `loss` is its share of the global mean, a scalar."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._loss.add_(loss.detach())

    def is_finite(self) -> Tensor:
        """Whether loss and gradients are finite so far, on this rank alone; stays on the device."""
        return torch.isfinite(self._flat.sum())

    def reduce_(self, topology: Topology) -> Tensor:
        """Sum gradients and loss over ranks; returns the global loss, a scalar that stays on the device."""
        topology.sum_(self._flat)
        return self._loss.clone().squeeze(0)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm` (0: leave them); returns the norm before.

        It is a scalar on the device: nothing here waits for it.
        """
        norm: Tensor = torch.linalg.vector_norm(self._gradients)
        if max_norm > 0:
            self._gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def release(self) -> None:
        """Give the parameters back without gradients."""
        for parameter in self._parameters:
            parameter.grad = None
