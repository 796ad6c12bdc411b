"""T5-Base at its real size: the served encoder agrees with the trained one, and loading can be cancelled."""

from __future__ import annotations

import threading
from pathlib import Path

import comfy.model_management
import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.encoder.served import ServingOptions, load_encoder
from distilled_t5.nodes.progress import progress_bar
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.students.t5.trained import DistilledT5
from distilled_t5.tests.support.small_encoders import PROMPT, embedding, serve, student_file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5-Base in bf16 with weights drawn as T5 draws its own: without that, attention is saturated and magnifies rounding."""
    return student_file(tmp_path_factory.mktemp("base"), StudentLayout.named("base"), "base.safetensors", dtype=torch.bfloat16)


def test_published_T5_base_is_read_as_what_it_is(stand_ins):
    student = open_student(stand_ins / "models" / "text_encoders" / "distilled_t5_base.safetensors")
    assert (student.layout.size_name, student.layout.parameters, student.dtype) == ("T5-Base", 129_551_488, torch.bfloat16)
    assert student.metadata.token_length == 256


@pytest.mark.parametrize("prompt", [PROMPT, *(pytest.param(text, marks=pytest.mark.full) for text in ("", "word " * 598))])
def test_served_and_trained_agree_to_1e_4_in_fp32(base, prompt):
    clip = serve(base).clip
    student = open_student(base)
    trained = DistilledT5(student.layout)
    trained.load_tensors({name: tensor.float() for name, tensor in student.load().items()})
    token_ids = torch.tensor([[token for token, _ in clip.tokenize(prompt)["t5xxl"][0]]])
    with torch.no_grad():
        expected = trained.eval()(token_ids)
    assert expected.shape == (1, max(256, token_ids.shape[1]), 4096)
    assert (embedding(clip, prompt) - expected).abs().max() <= 1e-4


def test_loading_stops_when_the_user_cancels(base):
    show = progress_bar()
    seen = []

    def cancel_half_way(done: int, total: int) -> None:
        seen.append(done)
        if done == total // 2:
            canceller = threading.Thread(target=comfy.model_management.interrupt_current_processing)
            canceller.start()
            canceller.join()
        show(done, total)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load_encoder(str(base), {}, ServingOptions(), cancel_half_way)
    assert 0 < max(seen) < len(open_student(base).names)


def test_resident_memory_of_T5_base_in_bf16_is_a_quarter_of_a_gigabyte(base):
    served = load_encoder(str(base), {}, ServingOptions())
    resident = sum(weight.numel() * weight.element_size() for weight in served.clip.cond_stage_model.parameters())
    assert resident <= 0.27e9
    assert "259 MB as bf16" in served.info
