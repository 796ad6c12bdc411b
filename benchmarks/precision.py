"""What smaller number formats of a distilled T5's weights cost: embeddings of the served encoder against those of fp32 weights.

T5-Base (with --quick T5-Small and one prompt) with T5's own initialisation. Rows with a + keep some tensors in bf16, which the loader does
not: they show what that would be worth. The first row is the same weights in transformers' T5, in which students are trained; it must agree
with fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distilled_t5.benchmarks.support import measuring as measure
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.students.t5.layout import StudentLayout
from torch import Tensor, nn

PROMPTS = (
    "a red fox on a green bench",
    "an oil painting of three sailing ships in a storm, waves as high as houses, a lighthouse far away, dramatic light from the left",
    "the word HELLO written with white chalk on a black board, above it a row of five paper stars, a wooden frame, soft light",
    "portrait of an old sailor, close-up, weathered face, grey beard, blue cap, harbour behind him out of focus, 85 mm",
)
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}
# Which tensors stay in bf16 beside fp8.
SMALL = r"norm|relative_attention_bias"
KEPT = {
    "fp8 + norms, position bias": SMALL,
    "fp8 + norms, position bias, q": SMALL + r"|\.q\.",
    "fp8 + norms, position bias, token table": SMALL + r"|shared",
    "fp8 + norms, position bias, projection": SMALL + r"|final_projection",
    "fp8 + all but the feed-forward": SMALL + r"|SelfAttention|shared|final_projection",
}
SCALED = "fp8 scaled per tensor + norms, position bias"
# What it is, and whether layer norms are spread.
WEIGHTS = (("T5's own initialisation", False), ("the same with layer norms spread as by training", True))
LARGEST_FP8 = 448.0
Replacement = Callable[[str, Tensor], Tensor | None]
COLUMNS = ("relative_error", "cosine_mean", "cosine_min", "max_abs")


def compare(found_NLD: Tensor, wanted_NLD: Tensor) -> dict[str, float]:
    """How far embeddings are from the right ones: norm of the error by norm of the right ones, cosine over tokens, largest difference."""
    found, wanted = found_NLD.double(), wanted_NLD.double()
    cosine_NL = torch.cosine_similarity(found, wanted, dim=-1)
    return {
        "relative_error": ((found - wanted).norm() / wanted.norm()).item(),
        "cosine_mean": cosine_NL.mean().item(),
        "cosine_min": cosine_NL.min().item(),
        "max_abs": (found - wanted).abs().max().item(),
    }


def weights(layout: StudentLayout, spread_norms: bool) -> dict[str, Tensor]:
    """T5's own initialisation, in float32; spread_norms: layer norms vary as they do after training, and are not all exactly 1."""
    generator = torch.Generator().manual_seed(0)
    draw = measure.initial_weight(layout, generator)
    tensors = {name: draw(name, shape) for name, shape in layout.tensors().items()}
    if spread_norms:
        for name in filter(lambda name: "norm" in name, tensors):
            tensors[name] = torch.empty_like(tensors[name]).log_normal_(0.0, 0.5, generator=generator)
    return tensors


def embed(clip: Any, prompts: tuple[str, ...]) -> Tensor:
    """Embeddings of prompts, padded to 256 tokens each: [N, L, D] in float32."""
    return torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)).float().cpu() for prompt in prompts])


def serve(path: Path, dtype: torch.dtype) -> Any:
    """The encoder as the loader node makes it, without CLIP-L."""
    from distilled_t5.encoder.served import ServingOptions, load_encoder

    return load_encoder(str(path), None, ServingOptions(dtype=dtype)).clip


def in_bf16(pattern: str) -> Replacement:
    """Keeps the weights whose names fit in bf16."""
    return lambda name, weight: weight.bfloat16() if re.search(pattern, name) else None


def scaled_to_fp8(name: str, weight: Tensor) -> Tensor:
    """What fp8 with one scale per tensor would hold: a power of two, so that bf16 holds the products exactly."""
    if re.search(SMALL, name):
        return weight.bfloat16()
    scale = 2.0 ** torch.floor(torch.log2(LARGEST_FP8 / weight.abs().max()))
    return ((weight * scale).to(torch.float8_e4m3fn).float() / scale).bfloat16()


def replace_weights(clip: Any, replacement: Replacement, tensors: dict[str, Tensor]) -> None:
    """Put other weights into a served encoder, made from the float32 ones; None leaves a weight as it is."""
    transformer = clip.cond_stage_model.t5base.transformer
    for name, weight in list(transformer.named_parameters()):
        wanted = replacement(name, tensors[name if name.startswith("final_projection") else "encoder." + name])
        if wanted is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, nn.Parameter(wanted.to(weight.device), requires_grad=False))


def resident_mb(clip: Any) -> float:
    """Megabytes of the student's weights in memory."""
    return sum(weight.nbytes for weight in clip.cond_stage_model.t5base.parameters()) / 1e6


def as_trained(layout: StudentLayout, tensors: dict[str, Tensor], clip: Any, prompts: tuple[str, ...]) -> Tensor:
    """Embeddings of the training implementation for the same tokens."""
    from distilled_t5.students.t5.trained import DistilledT5

    student = DistilledT5(layout).eval()
    student.load_tensors(tensors)
    tokens_NL = torch.tensor([[pair[0] for pair in clip.tokenize(prompt)["t5xxl"][0]] for prompt in prompts])
    return student(tokens_NL)


@torch.inference_mode()
def measure_formats(folder: Path, layout: StudentLayout, prompts: tuple[str, ...], spread_norms: bool) -> dict[str, dict[str, float]]:
    """A row for each format."""
    tensors = weights(layout, spread_norms)
    path = folder / "student.safetensors"
    measure.write_streamed(path, layout.tensors(), torch.float32, lambda name, _: tensors[name])
    exact = serve(path, torch.float32)
    wanted = embed(exact, prompts)
    rows = {"transformers, fp32": {"mb": resident_mb(exact), **compare(as_trained(layout, tensors, exact, prompts), wanted)}}
    for name, dtype in FORMATS.items():
        clip = serve(path, dtype)
        rows[name] = {"mb": resident_mb(clip), **compare(embed(clip, prompts), wanted)}
    for name, replacement in [*((name, in_bf16(pattern)) for name, pattern in KEPT.items()), (SCALED, scaled_to_fp8)]:
        clip = serve(path, torch.float8_e4m3fn)
        replace_weights(clip, replacement, tensors)
        rows[name] = {"mb": resident_mb(clip), **compare(embed(clip, prompts), wanted)}
    # In a real file those would be fp8 numbers and a few scales.
    rows[SCALED]["mb"] = rows["fp8 + norms, position bias"]["mb"]
    return rows


def shown(value: float, column: str) -> str:
    """Cosines with enough digits to see what is missing to 1, others with three."""
    return f"{value:.6f}" if column.startswith("cosine") else f"{value:.2g}"


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measure.command_line(__doc__ or "").parse_args()
    comfyui = start_comfyui(options.gpu)
    size, prompts = ("small", PROMPTS[:1]) if options.quick else ("base", PROMPTS)
    layout = StudentLayout.named(size)
    result: dict[str, Any] = {
        "machine": measure.machine(comfyui, options.gpu, options.note),
        "size": size,
        "prompts": len(prompts),
        "rows": {},
    }
    with measure.scratch_folder(2) as folder:
        for title, spread_norms in WEIGHTS[-1:] if options.quick else WEIGHTS:
            rows = result["rows"][title] = measure_formats(folder, layout, prompts, spread_norms)
            print(f"\n{layout.size_name}, {title}; prompts: {len(prompts)}, of 256 tokens, against fp32")
            body = [[name, round(row["mb"]), *(shown(row[column], column) for column in COLUMNS)] for name, row in rows.items()]
            print(measure.table(["weights", "MB", *COLUMNS], body))
    print(f"\nwritten: {measure.save_result(result, 'precision', options)}")


if __name__ == "__main__":
    main()
