"""The nodes that measure encoders show their images, their texts and their errors."""

from __future__ import annotations

import pytest
from distilled_t5.tests.support.comfy_tab import ComfyTab
from distilled_t5.tests.support.renderers import ONE_IN_NODES_2, ONE_ON_THE_CANVAS
from distilled_t5.tests.support.workflows import ATTENTION_MAP, ENCODER_MAP, ENCODER_REPORT
from playwright.sync_api import expect

SHOWN = """(text) => app.graph.nodes.some(node => node.type === 'PreviewAny'
    && node.widgets?.some(widget => String(widget.value).startsWith(text)))"""
WIDE_IMAGE = """([type, nodes2]) => {
    const [node] = app.graph.nodes.filter(node => node.type === type)
    const images = nodes2 ? [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)] : node.imgs ?? []
    return images.some(image => image.complete && image.naturalWidth > 2 * image.naturalHeight)
}"""
SQUARE_PX = 768


@pytest.mark.parametrize(
    ("template", "node", "text"),
    [
        (ATTENTION_MAP, "DistilledT5AttentionMapImage", "attention to 'heart' ("),
        (ENCODER_MAP, "DistilledT5EncoderMap", "T5 of width 128, 6 layers: mean distance"),
    ],
)
@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_a_node_shows_its_image_and_its_text(comfy: ComfyTab, nodes_2: bool, template: str, node: str, text: str) -> None:
    comfy.open_template(template, nodes_2=nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for_picture(node, SQUARE_PX)
    comfy.wait_for(SHOWN, text)


@pytest.mark.parametrize("nodes_2", ONE_ON_THE_CANVAS)
def test_the_report_is_a_table(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open_template(ENCODER_REPORT, nodes_2=nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for(WIDE_IMAGE, ["DistilledT5EncoderReport", nodes_2])


@pytest.mark.parametrize("nodes_2", ONE_IN_NODES_2)
def test_a_word_that_is_not_in_the_prompt_is_an_error_with_what_to_do(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open_template(ATTENTION_MAP, nodes_2=nodes_2)
    comfy.set_widgets("DistilledT5CrossAttentionMap", word="foxes")
    assert comfy.run() == "execution_error"
    details = comfy.error_details()
    expect(details).to_contain_text("The word 'foxes' is not in the prompt.")
    expect(details).to_contain_text("What to do: give a word")
