"""What the file of a companion must hold, by its header."""

from __future__ import annotations

import pytest
from distilled_t5.encoder.needed_tensors import CLIPS, NAMINGS, Naming, check_companion
from distilled_t5.runtime.errors import StudentFileError

EVERY_NAMING = [pytest.param(name, naming, id=f"{name}, {naming.layer}") for name, namings in NAMINGS.items() for naming in namings]


@pytest.mark.parametrize(("name", "naming"), EVERY_NAMING)
def test_a_pooled_vector_that_is_projected_needs_the_projection(name: str, naming: Naming) -> None:
    shapes = naming.needed({naming.positions: (77, CLIPS[name].width)})
    assert check_companion(shapes, "clip.safetensors", name) is naming
    without = {tensor: shape for tensor, shape in shapes.items() if tensor != naming.projection}
    if name == "clip_l":
        assert without == shapes
    else:
        with pytest.raises(StudentFileError, match=r"(?s)1 tensors of CLIP-G are missing.*text_projection"):
            check_companion(without, "clip.safetensors", name)
