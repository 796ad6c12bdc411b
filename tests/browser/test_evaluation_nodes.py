"""The nodes that measure encoders show their images, their texts and their errors."""

from __future__ import annotations

import pytest
from distilled_t5.tests.support.comfy_tab import ComfyTab
from playwright.sync_api import expect

SHOWN = """(text) => app.graph.nodes.some(node => node.type === 'PreviewAny'
    && node.widgets?.some(widget => String(widget.value).startsWith(text)))"""
SQUARE_PX = 768


@pytest.mark.parametrize(
    ("template", "node", "text"),
    [
        ("attention-map", "DistilledT5AttentionMapImage", "attention to 'heart' ("),
        ("encoder-map", "DistilledT5EncoderMap", "T5 of width 128, 6 layers: mean distance"),
    ],
)
def test_a_node_shows_its_image_and_its_text(comfy: ComfyTab, nodes_2: bool, template: str, node: str, text: str) -> None:
    comfy.open_template(template, nodes_2=nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for_picture(node, SQUARE_PX)
    comfy.wait_for_picture("SaveImage", SQUARE_PX)
    comfy.wait_for(SHOWN, text)


def test_the_report_is_a_table(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open_template("encoder-report", nodes_2=nodes_2)
    assert comfy.run() == "execution_success"
    comfy.wait_for(SHOWN, "| encoder | parameters | weights |")


def test_a_word_that_is_not_in_the_prompt_is_an_error_with_what_to_do(comfy: ComfyTab, nodes_2: bool) -> None:
    comfy.open_template("attention-map", nodes_2=nodes_2)
    comfy.set_widgets("DistilledT5CrossAttentionMap", word="foxes")
    assert comfy.run() == "execution_error"
    details = comfy.error_details()
    expect(details).to_contain_text("The word 'foxes' is not in the prompt.")
    expect(details).to_contain_text("What to do: give a word")
