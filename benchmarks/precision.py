"""What smaller number formats of a distilled T5's weights cost: embeddings of the served encoder against those of fp32 weights.

T5-Base (with --quick T5-Small and one prompt) with T5's initialisation. The first row is the same weights in transformers' T5, in which
students are trained; it must agree with fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distilled_t5.benchmarks.support import measuring
from distilled_t5.benchmarks.support.random_files import draw_t5
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.devtools.docs.markdown import table
from distilled_t5.encoder.files import write_student
from distilled_t5.students.t5.layout import StudentLayout
from torch import Tensor

PROMPTS = (
    "a red fox on a green bench",
    "an oil painting of three sailing ships in a storm, waves as high as houses, a lighthouse far away, dramatic light from the left",
    "the word HELLO written with white chalk on a black board, above it a row of five paper stars, a wooden frame, soft light",
    "portrait of an old sailor, close-up, weathered face, grey beard, blue cap, harbour behind him out of focus, 85 mm",
)
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}
# Weights, and whether layer norms vary as after training.
WEIGHTS = (("T5's own initialisation", False), ("the same with layer norms spread as by training", True))
COLUMNS = ("relative_error", "cosine_mean", "cosine_min", "max_abs")


def compare(found_NLD: Tensor, expected_NLD: Tensor) -> dict[str, float]:
    """Errors of embeddings: norm of the error over norm of the expected ones, cosine over tokens, largest difference."""
    found, expected = found_NLD.double(), expected_NLD.double()
    cosine_NL = torch.cosine_similarity(found, expected, dim=-1)
    return {
        "relative_error": ((found - expected).norm() / expected.norm()).item(),
        "cosine_mean": cosine_NL.mean().item(),
        "cosine_min": cosine_NL.min().item(),
        "max_abs": (found - expected).abs().max().item(),
    }


def initial_weights(layout: StudentLayout, spread_norms: bool) -> dict[str, Tensor]:
    """Float32 weights with T5's initialisation; spread_norms: layer norms vary as after training, instead of being exactly 1."""
    draw, generator = draw_t5(layout), torch.Generator().manual_seed(1)
    tensors = {name: draw(name, shape) for name, shape in layout.tensors().items()}
    if spread_norms:
        for name in filter(lambda name: "norm" in name, tensors):
            tensors[name] = torch.empty_like(tensors[name]).log_normal_(0.0, 0.5, generator=generator)
    return tensors


def embed(clip: Any, prompts: tuple[str, ...]) -> Tensor:
    """Embeddings [N, L, D] of prompts in float32, each padded to 256 tokens."""
    return torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)).float().cpu() for prompt in prompts])


def serve(path: Path, dtype: torch.dtype) -> Any:
    """The encoder as the loader node makes it, without CLIP-L."""
    from distilled_t5.encoder.served import ServingOptions, load_encoder

    return load_encoder(str(path), {}, ServingOptions(dtype=dtype)).clip


def embed_as_trained(layout: StudentLayout, tensors: dict[str, Tensor], clip: Any, prompts: tuple[str, ...]) -> Tensor:
    """Embeddings of the training implementation for the same tokens."""
    from distilled_t5.students.t5.trained import DistilledT5

    student = DistilledT5(layout).eval()
    student.load_tensors(tensors)
    return student(torch.tensor([[pair[0] for pair in clip.tokenize(prompt)["t5xxl"][0]] for prompt in prompts]))


@torch.inference_mode()
def measure_formats(folder: Path, layout: StudentLayout, prompts: tuple[str, ...], spread_norms: bool) -> dict[str, dict[str, float]]:
    """A row for each format."""
    tensors = initial_weights(layout, spread_norms)
    path = write_student(folder / "student.safetensors", tensors)
    exact = serve(path, torch.float32)
    expected_NLD = embed(exact, prompts)
    rows = {"transformers, fp32": compare(embed_as_trained(layout, tensors, exact, prompts), expected_NLD)}
    for name, dtype in FORMATS.items():
        rows[name] = compare(embed(serve(path, dtype), prompts), expected_NLD) | {"mb": layout.parameters * dtype.itemsize / 1e6}
    return rows


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measuring.command_line(__doc__ or "").parse_args()
    start_comfyui("--cpu")
    size, prompts = ("small", PROMPTS[:1]) if options.quick else ("base", PROMPTS)
    layout, found = StudentLayout.named(size), {}
    with measuring.scratch_folder(2) as folder:
        for title, spread_norms in WEIGHTS[-1:] if options.quick else WEIGHTS:
            found[title] = measure_formats(folder, layout, prompts, spread_norms)
            print(f"\n{layout.size_name}, {title}; prompts: {len(prompts)}, of 256 tokens, against fp32")
            body = [[name, *(f"{row[key]:.6g}" for key in COLUMNS)] for name, row in found[title].items()]
            print(table(["weights", *COLUMNS], body))
    result = {"machine": measuring.machine(options.note), "size": size, "prompts": len(prompts), "rows": found}
    print(f"\nwritten: {measuring.save_result(result, measuring.result_path('precision', options))}")


if __name__ == "__main__":
    main()
