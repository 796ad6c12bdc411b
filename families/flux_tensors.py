"""The tensors of a Flux of any size, by their published names."""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]
HEAD_WIDTH = 128  # sum of Flux's fixed rotary axes 16 + 56 + 56
PATCH_VALUES, TIME_WIDTH = 64, 256


@dataclass(frozen=True)
class FluxLayout:
    """A Flux; the defaults are those of Flux dev. Widths in channels, depths in blocks; `guidance` as in dev, without as in schnell."""

    width: int = 3072
    double: int = 19
    single: int = 38
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True

    def tensors(self) -> Shapes:
        """Every tensor and its shape."""
        last = linear("final_layer.linear", PATCH_VALUES, self.width)
        return self.trunk() | last | linear("final_layer.adaLN_modulation.1", 2 * self.width, self.width)

    def trunk(self) -> Shapes:
        """Embedders and blocks, without the last layer: what a ControlNet copies."""
        shapes = linear("img_in", self.width, PATCH_VALUES) | linear("txt_in", self.width, self.text_width)
        for name, inputs in self.embedders().items():
            shapes |= linear(f"{name}.in_layer", self.width, inputs) | linear(f"{name}.out_layer", self.width, self.width)
        for index in range(self.double):
            shapes |= self._stream(f"double_blocks.{index}.img") | self._stream(f"double_blocks.{index}.txt")
        for index in range(self.single):
            shapes |= self._single(f"single_blocks.{index}")
        return shapes

    def embedders(self) -> dict[str, int]:
        """The embedders of time, pooled text and guidance, and what they take, in channels."""
        return {"time_in": TIME_WIDTH, "vector_in": self.pooled_width} | ({"guidance_in": TIME_WIDTH} if self.guidance else {})

    def _stream(self, name: str) -> Shapes:
        """One stream, of the image or of the text, in a double block."""
        width = self.width
        shapes = linear(f"{name}_mod.lin", 6 * width, width) | _head_norms(f"{name}_attn.norm")
        shapes |= linear(f"{name}_attn.qkv", 3 * width, width) | linear(f"{name}_attn.proj", width, width)
        return shapes | linear(f"{name}_mlp.0", 4 * width, width) | linear(f"{name}_mlp.2", width, 4 * width)

    def _single(self, name: str) -> Shapes:
        width = self.width
        shapes = linear(f"{name}.linear1", 7 * width, width) | linear(f"{name}.linear2", width, 5 * width)
        return shapes | linear(f"{name}.modulation.lin", 3 * width, width) | _head_norms(f"{name}.norm")


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    """Weight and bias of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _head_norms(name: str) -> Shapes:
    return {f"{name}.query_norm.scale": (HEAD_WIDTH,), f"{name}.key_norm.scale": (HEAD_WIDTH,)}
