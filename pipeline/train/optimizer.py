"""AdamW over the tagged parameters of a model.

Groups are the product of tag and decay, in a fixed order; each keeps the factor that its learning rate has
over `train.lr`. The state travels by parameter *name*, so it depends on no order, no device and no world
size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.layers.structured import parameter_tags
from pipeline.config.training import TrainConfig
from pipeline.errors import TrainError

_FUSED = ("cpu", "cuda")


def build_optimizer(model: nn.Module, config: TrainConfig, *, device: torch.device) -> torch.optim.AdamW:
    """AdamW with one group per (tag, decay) that occurs, sorted; fused where the device knows it."""
    tags = parameter_tags(model)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        tag = tags[name]
        members.setdefault((tag.group, tag.decay), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "multiplier": float(getattr(config.lr_multipliers, group)),
        }
        for (group, decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type in _FUSED
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: `rate` times the multiplier of the group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as flat tensors named `<moment>/<parameter>`."""
    found = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            found[f"{moment}/{name}"] = torch.as_tensor(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; raises TrainError where names differ."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        states.setdefault(name, {})[moment] = value
    if differ := sorted(set(names.values()) ^ set(states)):
        raise TrainError(
            f"optimizer state and model disagree about {differ[0]!r} ({len(differ)} names in all)"
        )
    packed = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {index: states[names[id(parameter)]] for index, parameter in enumerate(ordered)}
    optimizer.load_state_dict(packed)
