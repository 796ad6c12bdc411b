"""ComfyUI's start: the pack brings nothing with it but its own few files."""

from __future__ import annotations

from pathlib import Path

from distilled_t5.devtools.start_cost import measured


def test_the_pack_pulls_no_module_into_comfyui_but_its_own(comfyui_path: Path, pack_root: Path, tmp_path: Path) -> None:
    found = measured(comfyui_path, pack_root, tmp_path)
    assert found["nodes"] == ["DistilledT5Loader", "DistilledT5Save", "DistilledT5TextEncode"]
    folders = [str(pack_root / part) for part in ("__init__.py", "nodes", "encoder")]
    foreign = {name: file for name, file in found["modules"].items() if not str(file).startswith(tuple(folders))}
    assert foreign == {}, "modules that ComfyUI had not imported itself"
    # The half of the encoder that is trained needs transformers' model code, which takes seconds.
    assert not any(name.endswith("encoder.student") for name in found["modules"])
    assert len(found["modules"]) > 10
