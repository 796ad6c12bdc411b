"""A file that is not a distilled T5: the message with what to do is shown on the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.workflows import FLUX_DEV
from playwright.sync_api import expect

CASES = {
    "vae": "is a VAE, not a distilled T5",
    "truncated": "is not a complete safetensors file",
    "clip_l": "is a CLIP text encoder, not a distilled T5",
}


@pytest.fixture(scope="module")
def broken_files(server: ComfyServer) -> Iterator[None]:
    """A VAE and an incomplete download, in text_encoders."""
    folder = server.base / "models" / "text_encoders"
    vae, truncated = folder / "vae.safetensors", folder / "truncated.safetensors"
    shutil.copyfile(server.base / "models" / "vae" / "ae.safetensors", vae)
    with (folder / "distilled_t5_base.safetensors").open("rb") as complete:
        truncated.write_bytes(complete.read(1_000_000))
    yield
    vae.unlink()
    truncated.unlink()


@pytest.mark.usefixtures("broken_files")
@pytest.mark.parametrize(
    ("case", "nodes_2"),
    [("vae", False), ("vae", True), *(pytest.param(case, False, marks=pytest.mark.full) for case in ("truncated", "clip_l"))],
)
def test_a_wrong_file_is_explained_under_view_details(comfy: ComfyTab, case: str, nodes_2: bool) -> None:
    comfy.open_template(FLUX_DEV, nodes_2=nodes_2)
    comfy.set_widgets("DistilledT5Loader", clip_name2=f"{case}.safetensors")
    assert comfy.run() == "execution_error"
    expect(comfy.page.get_by_test_id("error-overlay")).to_contain_text("Distilled Text Encoder Loader")
    panel = comfy.error_details()
    expect(panel).to_contain_text(f"{case}.safetensors {CASES[case]}")
    expect(panel).to_contain_text("What to do: ")
