"""The workflows that measure encoders, in a real server on an untrained miniature: they show results of the current run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from distilled_t5.devtools.comfyui.server import ComfyServer, PromptFailed
from distilled_t5.devtools.comfyui.workflow import set_inputs, to_api_prompt
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.miniature.autoencoder import vae_tensors
from distilled_t5.miniature.files import FLUX_FILE, TEACHER_FILE, VAE_FILE
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.workflows import ATTENTION_MAP, ENCODER_MAP, ENCODER_REPORT, MINIATURE_STUDENT, WRITTEN_TEXT, example
from PIL import Image

WIDTH = 128
# The files of the miniature, and the untrained ones in their place.
UNTRAINED = {name: f"untrained_{name}" for name in (FLUX_FILE, VAE_FILE, TEACHER_FILE, MINIATURE_STUDENT)}
TEACHER = StudentLayout(d_model=WIDTH, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
STUDENT = StudentLayout(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, hidden_width=32, projected_width=WIDTH)


def untrained_miniature(models: Path) -> list[Path]:
    """Write files of the types of the miniature's with random weights into ComfyUI's folder of models."""
    flux = FluxLayout(width=128, double=1, single=1, text_width=WIDTH)
    safetensors.torch.save_file(drawn(flux.tensors(), seed=3), models / "diffusion_models" / UNTRAINED[FLUX_FILE])
    safetensors.torch.save_file(vae_tensors(), models / "vae" / UNTRAINED[VAE_FILE])
    for number, (name, layout) in enumerate(((TEACHER_FILE, TEACHER), (MINIATURE_STUDENT, STUDENT))):
        projection = "mlp" if layout.projected_width else "none"
        metadata = StudentMetadata(token_length=40, pooled="zero", projection=projection, text_width=WIDTH)
        write_student(models / "text_encoders" / UNTRAINED[name], drawn(layout.tensors(), seed=number), metadata)
    return list(models.rglob("untrained_*"))


@pytest.fixture(scope="module")
def host(server: ComfyServer) -> Iterator[ComfyServer]:
    files = untrained_miniature(server.base / "models")
    yield server
    server.free()
    for path in files:
        path.unlink()


def prompt_of(host: ComfyServer, name: str) -> dict[str, Any]:
    prompt = to_api_prompt(example(name), host.object_info())
    for node in prompt.values():
        node["inputs"] |= {key: UNTRAINED[value] for key, value in node["inputs"].items() if isinstance(value, str) and value in UNTRAINED}
    return prompt


def shown(host: ComfyServer, prompt: dict[str, Any], entry: dict[str, Any], node_type: str) -> Image.Image:
    """The image that the node of a type shows."""
    by_node = host.images_by_node(entry)
    [image] = [image for node_id, images in by_node.items() if prompt[node_id]["class_type"] == node_type for image in images]
    return image


def said(prompt: dict[str, Any], entry: dict[str, Any]) -> str:
    [node_id] = [node_id for node_id, node in prompt.items() if node["class_type"] == "PreviewAny"]
    return "".join(entry["outputs"][node_id]["text"])


def test_the_attention_map_covers_the_image_and_is_described_in_numbers(host: ComfyServer) -> None:
    prompt = prompt_of(host, ATTENTION_MAP)
    entry = host.run(prompt)
    assert shown(host, prompt, entry, "DistilledT5AttentionMapImage").size == (768, 768)
    assert shown(host, prompt, entry, "PreviewImage").size == (768, 768)
    assert said(prompt, entry).startswith("attention to 'heart' (")
    assert "mean of 20 steps, 1 images" in said(prompt, entry)


def attention(host: ComfyServer, seed: int, step: int = 0, **of_the_map: str) -> np.ndarray:
    """The map of a sampling."""
    prompt = prompt_of(host, ATTENTION_MAP)
    set_inputs(prompt, "KSampler", seed=seed, steps=3)
    set_inputs(prompt, "DistilledT5AttentionMapImage", step=step, opacity=1.0)
    if of_the_map:
        set_inputs(prompt, "DistilledT5CrossAttentionMap", **of_the_map)
    return np.asarray(shown(host, prompt, host.run(prompt), "DistilledT5AttentionMapImage").convert("RGB"), dtype=np.int16)


def test_comfyuis_cache_gives_neither_an_old_nor_an_empty_map(host: ComfyServer) -> None:
    first = attention(host, seed=1)
    other_seed = attention(host, seed=2)
    assert np.abs(other_seed - first).mean() > 0.5
    of_step = attention(host, seed=2, step=3)
    assert np.abs(of_step - other_seed).mean() > 0.5
    assert np.array_equal(attention(host, seed=1), first), "back to the first seed"
    other_word = attention(host, seed=1, word="ring")
    assert np.abs(other_word - first).mean() > 0.5
    host.free()
    assert np.array_equal(attention(host, seed=1), first), "after all was dropped"


def test_another_step_needs_no_new_sampling(host: ComfyServer) -> None:
    attention(host, seed=5)
    prompt = prompt_of(host, ATTENTION_MAP)
    set_inputs(prompt, "KSampler", seed=5, steps=3)
    set_inputs(prompt, "DistilledT5AttentionMapImage", step=2, opacity=1.0)
    messages = dict(host.run(prompt)["status"]["messages"])
    kept = {prompt[node_id]["class_type"] for node_id in messages["execution_cached"]["nodes"]}
    assert {"KSampler", "DistilledT5CrossAttentionMap"} <= kept
    assert "DistilledT5AttentionMapImage" not in kept


def test_two_samplers_on_one_model_get_separate_maps(host: ComfyServer) -> None:
    alone = [attention(host, seed) for seed in (1, 2)]
    prompt = prompt_of(host, ATTENTION_MAP)
    set_inputs(prompt, "KSampler", seed=1, steps=3)
    set_inputs(prompt, "DistilledT5AttentionMapImage", opacity=1.0)
    ids = {prompt[node_id]["class_type"]: node_id for node_id in prompt}
    sampler, drawer = ids["KSampler"], ids["DistilledT5AttentionMapImage"]
    prompt["s2"] = {"class_type": "KSampler", "inputs": {**prompt[sampler]["inputs"], "seed": 2}, "_meta": {"title": "second"}}
    drawn_again = {**prompt[drawer]["inputs"], "samples": ["s2", 0]}
    prompt["d2"] = {"class_type": "DistilledT5AttentionMapImage", "inputs": drawn_again, "_meta": {"title": "second"}}
    pictures = host.images_by_node(host.run(prompt))
    for node_id, expected in zip((drawer, "d2"), alone, strict=True):
        assert np.array_equal(np.asarray(pictures[node_id][0].convert("RGB"), dtype=np.int16), expected)


def test_a_word_that_is_not_in_the_prompt_is_an_error_with_what_to_do(host: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match=r"The word 'foxes' is not in the prompt(?s:.*)What to do: give a word") as failure:
        attention(host, seed=1, word="foxes")
    prompt = prompt_of(host, ATTENTION_MAP)
    assert prompt[failure.value.node_id]["class_type"] == "DistilledT5CrossAttentionMap"


def test_the_report_has_a_line_for_each_encoder(host: ComfyServer) -> None:
    prompt = prompt_of(host, ENCODER_REPORT)
    entry = host.run(prompt)
    [report] = [output["text"] for node_id, output in entry["outputs"].items() if "EncoderReport" in prompt[node_id]["class_type"]]
    lines = [line for line in "".join(report).splitlines() if line.startswith("| T5")]
    assert [line.split(" | ")[0] for line in lines] == ["| T5 of width 128, 1 layers", "| T5 of width 32, 1 layers"]
    assert shown(host, prompt, entry, "DistilledT5EncoderReport").width > 500


def test_the_map_has_both_encoders(host: ComfyServer) -> None:
    prompt = prompt_of(host, ENCODER_MAP)
    entry = host.run(prompt)
    assert shown(host, prompt, entry, "DistilledT5EncoderMap").size == (768, 768)
    assert said(prompt, entry).count("of 60 prompts") == 2


def test_the_text_in_the_image_is_read_back_and_the_node_for_flux_waits_unconnected(host: ComfyServer) -> None:
    prompt = prompt_of(host, WRITTEN_TEXT)
    set_inputs(prompt, "DistilledT5OCRAccuracy", reader="tesseract")
    entry = host.run(prompt)
    assert shown(host, prompt, entry, "DistilledT5OCRAccuracy").size == (768, 768)
    assert said(prompt, entry).startswith("expected: cat")
    assert "DistilledT5CommonTextPrompt" not in {prompt[node_id]["class_type"] for node_id in entry["outputs"]}


def test_the_prompt_for_a_text_asks_for_that_text(host: ComfyServer) -> None:
    prompt = {
        "1": {"class_type": "DistilledT5CommonTextPrompt", "inputs": {"seed": 7, "split": "validation"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }
    outputs = host.run(prompt)["outputs"]
    asked, text = ("".join(outputs[node_id]["text"]) for node_id in ("2", "3"))
    assert text in asked != text
