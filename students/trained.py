"""A student as it is trained, whatever its kind."""

# B batch, L text tokens, D text width

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import Module

from .kind import Layout
from .projection import PROJECTION


class TrainedStudent(Module):
    """A network with its projection: token ids [B, L] to text embeddings [B, L, D]. Its state dict has the published names.

    duplicates: names in the state dict of tensors that a file holds once -> their published name. attends_to_padding: as Flux's text
    encoder does; where it does not, a prompt's rows do not depend on the length to which its batch is padded.
    """

    duplicates: ClassVar[Mapping[str, str]] = {}

    def __init__(self, layout: Layout, attends_to_padding: bool = True) -> None:
        super().__init__()
        self.layout, self.attends_to_padding = layout, attends_to_padding

    def freeze_trunk(self) -> None:
        """Train the projection alone."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(name.startswith(PROJECTION))

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all tensors, by published name. RuntimeError lists missing and unexpected ones."""
        self.load_state_dict({**tensors, **{twin: tensors[name] for twin, name in self.duplicates.items()}}, strict=True)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by published name, as `write_student` takes them."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self.duplicates}
