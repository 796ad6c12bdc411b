"""What a kind of student network is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..config.parts import Part
    from .trained import TrainedStudent

Shape = tuple[int, ...]


class Layout(Protocol):
    """Every size of a network and of its projection, read off its tensors: a frozen dataclass of each kind."""

    kind: ClassVar[str]

    @property
    def num_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        ...

    @property
    def output_width(self) -> int:
        """Channels of the embedding that reaches the diffusion model."""
        ...

    @property
    def has_projection(self) -> bool: ...

    @property
    def size_name(self) -> str:
        """What people call a network of these sizes, such as T5-Base."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers a file holds, projection included."""
        ...

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of a file, by its published name, with its shape."""
        ...


@dataclass(frozen=True)
class StudentKind:
    """Everything that encoder/ and train/ know about a kind of student network.

    name: its id. display_name: what people call it. signs: endings of tensor names that tell it from other kinds. table: the published
    name of its token table. projection: the beginning of the published names of its projection. tokens: how many tokens its tokenizer
    produces. end, pad: the tokens at the end of a prompt and after it. lora_keys: matches the keys of LoRAs that are made for the network
    that the student replaces. small: sizes of the network that ComfyUI builds where the student goes, and that is dropped at once.

    published_names: published name -> name in the file, and the name of a duplicate of the token table. refuse_relatives: raises
    StudentFileError for networks of this kind that are not students. read_layout: the layout of tensor shapes by published name. width_in:
    channels of its output, judged by few of these shapes; None where they are missing.

    named: the layout of a published size, with a projection of some width or without. sizes: those that a recipe can train. layout_table:
    the recipe's table for any other size, imported when called. planned: the layout of a size or such a table, with a projection of some
    hidden width and output width. stand_in: a small layout of some output width, for a teacher without a file.

    sources: where its published files can be downloaded, by the name of the file or folder in recipes.

    In ComfyUI: module, the attribute of the text model, prefix, what published names have before the served module's own, and served, a
    function (layout, dtype, device, operations) that builds it. In training: trained, a function (layout, dropout, attends_to_padding)
    that builds it, and read_pretrained, the tensors of a published model of this layout. These three import ComfyUI or transformers when
    they are called.
    """

    name: str
    display_name: str
    signs: tuple[str, ...]
    table: str
    projection: str
    tokens: int
    end: int
    pad: int
    lora_keys: str
    small: Mapping[str, int]
    published_names: Callable[[Iterable[str]], tuple[dict[str, str], str | None]]
    refuse_relatives: Callable[[Mapping[str, Shape], str, bool], None]
    read_layout: Callable[[Mapping[str, Shape], str], Layout]
    width_in: Callable[[Mapping[str, Shape]], int | None]
    named: Callable[[str, int | None], Layout]
    sizes: tuple[str, ...]
    layout_table: Callable[[], type[Part]]
    planned: Callable[[str | Part, int, int], Layout]
    stand_in: Callable[[int], Layout]
    sources: Mapping[str, str]
    module: str
    prefix: str
    served: Callable[[Any, Any, Any, Any], Any]
    trained: Callable[[Any, float, bool], TrainedStudent]
    read_pretrained: Callable[[Path, Any], dict[str, Tensor]]

    def fit(self, token_ids: list[int], length: int, ending: Sequence[int] = ()) -> list[int]:
        """Token ids cut or padded to exactly `length`; what is cut still ends with the end token, or with the `ending` of a template."""
        if len(token_ids) > length:
            last = [*(ending or (self.end,))]
            return [*token_ids[: max(0, length - len(last))], *last][-length:]
        return token_ids + [self.pad] * (length - len(token_ids))
