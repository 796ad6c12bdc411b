"""Files that are not a valid distilled T5: each is refused with what was expected, what was found and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.runtime.weights import load_tensors, read_header
from distilled_t5.students.t5.layout import SHARED, Shape, StudentLayout
from distilled_t5.tests.support.tiny_students import TINY, joined, published_file, sparse_file, tensor_digest, tiny_tensors

TESTS = Path(__file__).resolve().parent.parent
Shapes = dict[str, Shape]


def refusal(path: Path) -> str:
    """The message with which a file is refused; its first line names the file and its last says what to do."""
    with pytest.raises(StudentFileError) as caught:
        open_student(path).load()
    message = str(caught.value)
    assert path.name in message.splitlines()[0]
    assert message.splitlines()[-1].startswith("What to do: ")
    return message


def prefixless(layout: StudentLayout) -> Shapes:
    """The tensors under the names that they have in a file of Hugging Face."""
    return {name.removeprefix("encoder."): shape for name, shape in layout.tensors().items()}


def t5(d_model: int, vocab_size: int = 32128) -> Shapes:
    """A T5 encoder without projection."""
    return prefixless(StudentLayout(d_model, d_model * 2, num_layers=4, num_heads=4, vocab_size=vocab_size))


def t5xxl() -> Shapes:
    return prefixless(StudentLayout.named("xxl", output_width=None))


def scaled_fp8(shapes: Shapes) -> Shapes:
    """As in t5xxl_fp8_e4m3fn_scaled.safetensors."""
    scales: Shapes = {f"{name.removesuffix('weight')}scale_weight": () for name in shapes if "SelfAttention" in name or "Dense" in name}
    return shapes | scales | {"scaled_fp8": (0,)}


def every_block_biased(shapes: Shapes) -> Shapes:
    blocks = {name.partition("block.")[2].partition(".")[0] for name in shapes if "block." in name}
    return shapes | {f"encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4) for block in blocks}


FOREIGN: dict[str, tuple[Shapes, str, str]] = {
    "CLIP-L": ({"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768), "logit_scale": ()}, "a CLIP text encoder", "clip_name1"),
    "open_clip": ({"transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280)}, "a CLIP text encoder", "clip_name1"),
    "CLIP vision": ({"vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "a CLIP vision model", "pick the distilled T5"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a diffusion model", "Load Diffusion Model"),
    "Flux in a checkpoint": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "diffusion model", "Load"),
    "Flux of diffusers": ({"single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "a diffusion model", "Load Diffusion Model"),
    "SD checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a checkpoint", "Load Checkpoint"),
    "LoRA of kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "a LoRA", "LoraLoader"),
    "LoRA of diffusers": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "a LoRA", "LoraLoader"),
    "LoRA of old diffusers": ({"unet.up_blocks.0.attn.processor.to_q_lora.down.weight": (4, 3072)}, "a LoRA", "LoraLoader"),
    "LoHa": ({"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": (4, 3072)}, "a LoRA", "LoraLoader"),
    "LoKr": ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": (4, 3072)}, "a LoRA", "LoraLoader"),
    "ControlNet for Flux": (
        {"controlnet_blocks.0.weight": (8, 8), "double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
        "a ControlNet",
        "Load ControlNet Model",
    ),
    "ControlNet for PixArt": ({"controlnet.0.copied_block.attn.qkv.weight": (3456, 1152)}, "a ControlNet", "Load ControlNet Model"),
    "VAE": ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "a VAE", "Load VAE"),
    "TAESD": ({"taesd_decoder.1.weight": (64, 16, 3, 3)}, "a VAE", "Load VAE"),
    "Llama": ({"model.layers.0.self_attn.q_proj.weight": (64, 64)}, "a language model", "pick the distilled T5"),
    "T5-XXL": (t5xxl(), "a plain T5-XXL", "TripleCLIPLoader"),
    "T5-XXL with its twin": (
        t5xxl() | {"encoder.embed_tokens.weight": (32128, 4096)},
        "a plain T5-XXL",
        "DualCLIPLoader or TripleCLIPLoader",
    ),
    "T5-XXL in scaled fp8": (scaled_fp8(t5xxl()), "a plain T5-XXL", "TripleCLIPLoader"),
    "plain T5-Base": (t5(768), "a T5 of width 768 without a projection", "distilled_t5.projection = none"),
    "plain T5-XL": (t5(2048), "a T5 of width 2048 without a projection", "was not trained for this diffusion model"),
    "T5 with its decoder": (
        t5(64) | {"decoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)},
        "a T5 with its decoder",
        "encoder",
    ),
    "umT5": (every_block_biased(t5(4096, vocab_size=256384)), "a umT5", "pick the distilled T5"),
    "Pile-T5": (every_block_biased(t5(2048)), "a Pile-T5, AuraFlow's encoder", "pick the distilled T5"),
    "mT5": (t5(4096, vocab_size=250112), "the vocabulary of mT5 (250,112 pieces)", "pick the distilled T5"),
    "ByT5": (t5(1472, vocab_size=384), "the vocabulary of ByT5", "pick the distilled T5"),
    "something else": ({f"layer.{number}.weight": (3, 3) for number in range(12)}, "It holds 12 tensors", "  layer.0.weight\n"),
}


@pytest.mark.parametrize(("shapes", "found", "advice"), FOREIGN.values(), ids=FOREIGN)
def test_file_of_another_kind_is_named_for_what_it_is(shapes, found, advice, tmp_path):
    message = refusal(sparse_file(tmp_path / "other.safetensors", shapes))
    assert found in message
    assert advice in message


def test_t5xxl_of_9_5_gigabytes_is_refused_without_being_read(tmp_path):
    path = sparse_file(tmp_path / "t5xxl_fp16.safetensors", t5xxl(), "F16")
    assert path.stat().st_size > 9_500_000_000
    start = time.process_time()
    refusal(path)
    assert time.process_time() - start < 5


def test_student_whose_projection_was_stripped(tmp_path):
    bare = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith("final_projection")}
    message = refusal(published_file(tmp_path / "stripped.safetensors", bare))
    assert "without a projection (final_projection.0 and .3)" in message


def test_student_whose_prefixes_were_stripped_twice(tmp_path):
    bare = {name.replace("encoder.encoder.", ""): tensor for name, tensor in tiny_tensors().items()}
    message = refusal(published_file(tmp_path / "stripped.safetensors", bare))
    assert "block.0.layer.0.SelfAttention.q.weight" in message


@pytest.mark.parametrize("width", [64, 768, 4095, 10240])
def test_projection_of_a_width_that_flux_does_not_take(width, tmp_path):
    layout = StudentLayout(8, 12, 1, 2, 4, vocab_size=40, hidden_width=10, projected_width=width)
    message = refusal(published_file(tmp_path / "wide.safetensors", tiny_tensors(layout)))
    assert f"width {width}" in message
    assert "4096" in message


def test_missing_and_extra_tensors_of_a_real_size_are_all_listed(tmp_path):
    shapes = StudentLayout.named("large").tensors()
    missing = [name for name in shapes if "wo.weight" in name or "SelfAttention.o" in name]
    extra: Shapes = {f"optimizer.state.{number}": (4,) for number in range(64)}
    message = refusal(sparse_file(tmp_path / "part.safetensors", {n: s for n, s in shapes.items() if n not in missing} | extra))
    assert f"{len(missing)} tensors missing, {len(extra)} unexpected" in message
    assert all(f"  {name}\n" in message for name in [*missing, *extra])


@pytest.mark.parametrize("dtype", ["I64", "I32", "I8", "F64"])
@pytest.mark.parametrize("names", [[SHARED], list(TINY.tensors())], ids=["one", "all"])
def test_tensors_of_an_unsupported_dtype_are_listed(dtype, names, tmp_path):
    kinds = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "F64": torch.float64}
    tensors = {name: tensor.to(kinds[dtype]) if name in names else tensor for name, tensor in tiny_tensors().items()}
    message = refusal(published_file(tmp_path / "integers.safetensors", tensors))
    assert all(f"  {name}: {dtype}\n" in message for name in names)
    assert "BF16" in message


@pytest.mark.parametrize("ending", [".safetensors", ".sft", ".pth", ".pt", ".gguf", ".bin"])
def test_empty_file(ending, tmp_path):
    path = tmp_path / f"file{ending}"
    path.touch()
    assert "is empty (0 bytes)" in refusal(path)


def test_gguf_file_by_ending_or_by_content(tmp_path):
    for name in ("model.gguf", "model.GGUF", "renamed.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(5000))
        message = refusal(tmp_path / name)
        assert "GGUF" in message
        assert ".safetensors" in message
        assert "ComfyUI-GGUF" in message


@pytest.mark.parametrize("name", ["notes.txt", "model", "model.onnx", "model.safetensors.index.json"])
def test_ending_that_cannot_be_an_encoder(name, tmp_path):
    (tmp_path / name).write_bytes(b"something")
    assert "expected .safetensors" in refusal(tmp_path / name)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".ckpt"])
def test_file_of_torch_save_is_refused_unread_with_the_command_that_converts_it(ending, tmp_path):
    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "the code ran"),)

    path = tmp_path / f"authors{ending}"
    torch.save(tiny_tensors() | {"hook": RunsCode()}, path)
    with pytest.raises(StudentFileError, match=r"is a file of torch.save; expected .safetensors(.|\n)*What to do: convert it") as caught:
        open_student(path)
    assert f"r'{path}'" in str(caught.value)
    assert str(path.with_suffix(".safetensors")) in str(caught.value)
    assert not (tmp_path / "the code ran").exists()


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 100, 0.5, 0.99, -1])
def test_truncated_file_is_called_incomplete(kept, tmp_path):
    content = published_file(tmp_path / "complete.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    message = refusal(path)
    assert "cut off" in message
    assert f"({path.stat().st_size:,} bytes)" in message


def with_scales(names: list[str], ending: str) -> Shapes:
    return {name.removesuffix(".weight") + ending: (1,) for name in names}


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        (".scale_weight", "scaled fp8"),
        (".weight_scale", "scaled fp8 or int8"),
        (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    ],
)
def test_quantised_student_is_refused_with_its_quantisation(ending, how, tmp_path):
    matrices = [name for name in TINY.tensors() if "SelfAttention.q" in name]
    path = sparse_file(tmp_path / "small.safetensors", TINY.tensors() | with_scales(matrices, ending), "F8_E4M3")
    message = refusal(path)
    assert f"is quantised ({how})" in message
    assert "dtype fp8_e4m3fn" in message.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_file_that_does_not_fit_into_memory_is_not_called_incomplete(tmp_path):
    path = sparse_file(tmp_path / "large.safetensors", {"a": (1 << 31,)}, "F32")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    try:
        with pytest.raises(MemoryError, match=r"Not enough memory to read large\.safetensors(.|\n)*What to do: "):
            read_header(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_name_that_is_not_valid_unicode_is_refused_in_a_message_that_can_be_printed(tmp_path):
    published_file(tmp_path / "good.safetensors")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.safetensors"))
    (tmp_path / "good.safetensors").rename(odd)
    with pytest.raises(StudentFileError, match=r"not valid Unicode(.|\n)*What to do: rename") as caught:
        open_student(odd)
    assert str(caught.value).encode()
    odd.write_bytes(b"")
    with pytest.raises(StudentFileError) as caught:
        open_student(odd)
    assert str(caught.value).encode()


def test_web_page_saved_as_a_model(tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html><body>Access to model is restricted</body></html>")
    assert "not a complete safetensors file" in refusal(path)


def test_file_that_is_not_there(tmp_path):
    message = refusal(tmp_path / "gone.safetensors")
    assert "does not exist" in message
    assert "refresh" in message


def test_file_that_vanishes_between_looking_and_loading(tmp_path):
    path = published_file(tmp_path / "file.safetensors")
    student = open_student(path)
    path.unlink()
    with pytest.raises(StudentFileError, match=r"(?s)does not exist.*What to do: "):
        student.load()


def test_file_that_becomes_another_one_between_looking_and_loading(tmp_path):
    path = published_file(tmp_path / "file.safetensors")
    student = open_student(path)
    other = StudentLayout(8, 12, 1, 3, 4, vocab_size=41, hidden_width=10, projected_width=4096)
    published_file(path, tiny_tensors(other))
    with pytest.raises(StudentFileError, match=r"(?s)file.safetensors changed.*What to do: "):
        student.load()


@pytest.mark.parametrize("progressed", [1, 3])
def test_file_that_is_overwritten_in_place_while_it_is_loaded(progressed, tmp_path):
    """A file that is mapped into memory would end the process."""
    path = sparse_file(tmp_path / "file.safetensors", {f"{number}": (1 << 16,) for number in range(4)})

    def overwrite(done: int, _total: int) -> None:
        if done == progressed:
            os.truncate(path, 8)

    with pytest.raises(StudentFileError, match=r"(?s)file.safetensors changed.*What to do: "):
        load_tensors(path, progress=overwrite)


def test_tensors_stay_as_they_were_loaded_when_their_file_is_overwritten_in_place(tmp_path):
    path = published_file(tmp_path / "file.safetensors")
    loaded = open_student(path).load()
    os.truncate(path, 8)
    assert tensor_digest(loaded) == tensor_digest(tiny_tensors())


@pytest.mark.parametrize("dtype", ["float64", "int64", "int32", "int16", "int8", "uint8", "bool", "bfloat16"])
def test_tensors_of_any_number_format_and_shape_are_read_bit_by_bit(dtype, tmp_path):
    dtype = getattr(torch, dtype)
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype), "a": torch.tensor(1).to(dtype), "empty": torch.zeros(2, 0, dtype=dtype)}
    loaded = load_tensors(published_file(tmp_path / "file.safetensors", tensors))
    assert {name: (each.dtype, each.tolist()) for name, each in loaded.items()} == {n: (t.dtype, t.tolist()) for n, t in tensors.items()}


def test_metadata_of_90_megabytes_is_refused_unread(tmp_path):
    path = published_file(tmp_path / "large.safetensors", metadata={"workflow": "x" * 90_000_000})
    start = time.process_time()
    assert "a header of 90,00" in refusal(path)
    assert "its metadata" in refusal(path).splitlines()[-1]
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(("tensors", "problem"), [(1_100_000, "a header of "), (100_000, "holds 100,000 tensors; expected at most 20,000")])
def test_a_million_empty_tensors_are_refused_before_they_are_parsed(tensors, problem, tmp_path):
    path = tmp_path / "many.safetensors"
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(joined(("{" + ",".join(f'"{number}":{entry}' for number in range(tensors)) + "}").encode(), b""))
    start = time.process_time()
    assert problem in refusal(path)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".gguf"])
def test_folder_with_the_name_of_a_file(ending, tmp_path):
    path = tmp_path / f"folder{ending}"
    path.mkdir()
    message = refusal(path)
    assert "is a folder" in message


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_links_that_lead_nowhere_or_in_a_circle(ending, tmp_path):
    (tmp_path / f"dangling{ending}").symlink_to(tmp_path / "nothing")
    (tmp_path / f"circle{ending}").symlink_to(tmp_path / f"circle{ending}")
    for name in ("dangling", "circle"):
        assert "does not exist" in refusal(tmp_path / f"{name}{ending}")


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300 + ".safetensors", "null\x00byte.safetensors"):
        with pytest.raises(StudentFileError, match="What to do: "):
            open_student(tmp_path / name)


FORBIDDEN = """
import os
from distilled_t5.runtime.errors import StudentFileError
from distilled_t5.encoder.files import open_student
if os.geteuid() == 0:
    os.seteuid(65534)
for path in sys.argv[1:]:
    try:
        open_student(path)
    except StudentFileError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_file_or_folder_that_may_not_be_read():
    # Root reads everything, so the process gives its rights up; then it cannot reach pytest's own folder either.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        locked = folder / "locked"
        locked.mkdir()
        paths = [published_file(folder / "secret.safetensors"), published_file(locked / "inside.safetensors")]
        for path in (paths[0], locked):
            path.chmod(0)
        done = run_without_rights(paths)
        locked.chmod(0o755)
    assert done.returncode == 0, done.stderr
    for path in paths:
        assert f"{path.name} could not be read: Permission denied" in done.stdout
    assert done.stdout.count("What to do: ") == len(paths)


def run_without_rights(paths: list[Path]) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest\n"
    return subprocess.run([sys.executable, "-c", start + FORBIDDEN, *map(str, paths)], capture_output=True, text=True, check=False)
