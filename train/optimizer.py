"""The optimizer: AdamW alone, or Muon for the matrices inside the blocks and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.nn import Embedding, ModuleList
from torch.optim import AdamW, Optimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

RATE_SHARE = "rate_share"


class MuonAndAdamW:
    """Two optimizers with the part of torch's interface that the trainer, its checkpoints and GradScaler use."""

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        self._parts = {"muon": muon, "adamw": adamw}

    @property
    def parts(self) -> Iterable[Optimizer]:
        """Both optimizers."""
        return self._parts.values()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both, shared with their optimizer."""
        return [group for part in self._parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of each weight."""
        return {weight: state for part in self._parts.values() for weight, state in part.state.items()}

    def step(self) -> None:
        """Update every weight that has a gradient."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both states, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def make_optimizer(
    module: Module, learning_rate: float, betas: tuple[float, float], weight_decay: float, muon_learning_rate: float = 0.0
) -> Optimizer | MuonAndAdamW:
    """The optimizer of a module's parameters that are trained: AdamW, and torch's Muon if it has a learning rate and the module has blocks.

    Raises ValueError if Muon is wanted and this torch does not have it.
    """
    named = {name: weight for name, weight in module.named_parameters() if trained(weight)}
    inner = inner_weights(module)
    matrices = {name: weight for name, weight in named.items() if weight.ndim == 2 and id(weight) in inner}
    if not muon_learning_rate or not matrices:
        return AdamW(named.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    try:
        from torch.optim import Muon
    except ImportError as error:
        raise ValueError(
            "optimizer.muon_learning_rate needs torch 2.9 or newer.\nWhat to do: set it to 0, or install a newer torch."
        ) from error
    muon = Muon(matrices.values(), lr=muon_learning_rate, weight_decay=weight_decay)
    for group in muon.param_groups:
        group[RATE_SHARE] = muon_learning_rate / learning_rate
    rest = [weight for name, weight in named.items() if name not in matrices]
    return MuonAndAdamW(muon, AdamW(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay))


def trained(weight: Tensor) -> bool:
    """Whether a weight is trained: not in a frozen trunk."""
    return weight.requires_grad


def inner_weights(module: Module) -> set[int]:
    """The ids of the weights of layers inside a module's blocks, tables of positions excepted; its first and last layers are outside."""
    blocks = [block for blocks in module.modules() if isinstance(blocks, ModuleList) for block in blocks]
    layers = (layer for block in blocks for layer in block.modules() if layer is not block and not isinstance(layer, Embedding))
    return {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}


def restart(optimizer: Optimizer | MuonAndAdamW) -> None:
    """Discard the running means and step counts, so that the optimizer is as new."""
    for part in optimizer.parts if isinstance(optimizer, MuonAndAdamW) else (optimizer,):
        part.state.clear()


def set_rate(optimizer: Optimizer | MuonAndAdamW, learning_rate: float) -> None:
    """Set the learning rate of a step; Muon's is a fixed multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(RATE_SHARE, 1.0)
