"""Cross-Attention Map on every family: it changes no bit, shows what a full softmax gives, and points where a hand-made model attends."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.text_encoders.sd3_clip import SD3Tokenizer, sd3_clip
from distilled_t5.encoder.served import ServingOptions, load_encoder
from distilled_t5.evaluate.attention import t5_pieces, word_positions
from distilled_t5.evaluate.attention_recorder import OVERRIDE, map_of
from distilled_t5.families import FAMILIES
from distilled_t5.families.family import Family
from distilled_t5.nodes.attention_map import DistilledT5CrossAttentionMap
from distilled_t5.tests.support.small_encoders import student_file
from distilled_t5.tests.support.small_models import SmallModel
from torch import Tensor

import nodes

PROMPT, WORD, STEPS = "a red fox left of a tree", "fox", 2
SIDE = 16
FOLLOWED = {name: family for name, family in FAMILIES.items() if family.network}
every_family = pytest.mark.parametrize("family", FOLLOWED.values(), ids=FOLLOWED)


def side(family: Family) -> int:
    return max(SIDE, family.least_side_px // family.cell_px)


def latent(family: Family, images: int = 2) -> dict[str, Tensor]:
    return {"samples": torch.zeros(images, family.latent_channels, side(family), side(family) + 2)}


def small(family: Family) -> Any:
    return SmallModel(*family.small, (), 0, 0.7).patcher()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


def clip_of(family: Family, folder: Path, stand_ins: Path) -> Any:
    """A student of the family, with CLIP-L where it can have one: in SD3, its rows stand before T5's."""
    path = student_file(folder, name=f"{family.name}.safetensors", family=family.name, token_length=family.token_length, pooled="zero")
    clip_l = {"clip_l": str(stand_ins / "models" / "text_encoders" / "clip_l.safetensors")}
    companions = clip_l if "clip_l" in family.companions else {}
    return load_encoder(str(path), companions, ServingOptions(family.name, dtype=torch.float32)).clip


def sample(model: Any, positive: Any, negative: Any, start: Any) -> Tensor:
    return nodes.KSampler().sample(model, 5, STEPS, 4.0, "euler", "simple", positive, negative, start)[0]["samples"]


def mapped(model: Any, clip: Any) -> tuple[Any, Any, Any]:
    return DistilledT5CrossAttentionMap.execute(model, clip, PROMPT, WORD, 3.5).args


def full_softmax(network: Any, found: list[Tensor]) -> ExitStack:
    """Keeps the complete matrix [B, A, Q, K] of each block's cross-attention while it is open."""
    handles, outputs = ExitStack(), {}

    def keep_weights(attention: Any, _inputs: Any, _output: Tensor) -> None:
        query, both = (outputs[layer] for layer in (attention.q_linear, attention.kv_linear))
        key = both.reshape(len(query), -1, 2, attention.num_heads, attention.head_dim)[:, :, 0].transpose(1, 2)
        found.append(weights_of(query.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2), key))

    for block in network.blocks:
        for layer in (block.cross_attn.q_linear, block.cross_attn.kv_linear):
            handles.callback(layer.register_forward_hook(lambda layer, _inputs, output: outputs.update({layer: output})).remove)
        handles.callback(block.cross_attn.register_forward_hook(keep_weights).remove)
    return handles


def weights_of(query: Tensor, key: Tensor) -> Tensor:
    return (query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)


@every_family
def test_the_latent_is_the_same_to_the_bit_and_the_map_is_the_mean_of_the_full_softmax(family: Family, folder: Path, stand_ins: Path):
    model, clip = small(family), clip_of(family, folder, stand_ins)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "a blue cube"))
    if family.takes_guidance(model.model):
        positive = [[text, {**extras, "guidance": 3.5}] for text, extras in positive]
    plain = sample(model, positive, negative, latent(family))
    recording, conditioning, attention = mapped(model, clip)
    assert ("guidance" in conditioning[0][1]) == family.takes_guidance(model.model)
    watched = sample(recording, conditioning, negative, latent(family))
    assert torch.equal(watched, plain) and plain.std() > 0.1
    found = map_of(attention.run_of(watched))
    assert found.shape == (2, -(-side(family) // 2), -(-(side(family) + 2) // 2))

    seen: list[Tensor] = []
    text_tokens = conditioning[0][0].shape[1]
    first = 0 if family.cross_attention else text_tokens
    image_tokens = found[0].numel()

    def attend(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        query, key = args[:2]
        if not kwargs.get("skip_reshape"):
            query, key = (each.unflatten(-1, (kwargs["heads"], -1)).transpose(1, 2) for each in args[:2])
        if query.shape[2] == key.shape[2] == text_tokens + image_tokens:
            seen.append(weights_of(query, key))
        return original(*args, **kwargs)

    recording.model_options["transformer_options"][OVERRIDE] = attend
    with full_softmax(recording.model.diffusion_model, seen) if family.cross_attention else ExitStack():
        again = sample(recording, conditioning, conditioning, latent(family))
    same = map_of(attention.run_of(again))
    weights = torch.stack(seen)  # [blocks of all steps, rows, heads, queries, keys]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    shares = weights[:, -2:, :, first : first + image_tokens, positions(clip, text_tokens)].sum(dim=-1).mean(dim=(0, 2))
    torch.testing.assert_close(same.double().flatten(1), shares, rtol=1e-4, atol=1e-6)
    assert same.std() > 1e-6


def positions(clip: Any, text_tokens: int) -> list[int]:
    """The rows of the word in the text; T5's rows are the last ones."""
    before = text_tokens - len(t5_pieces(clip, PROMPT))
    return [before + place for place in word_positions(clip, PROMPT, WORD)]


def solve(weight: Tensor, rows: list[int], inputs_LD: Tensor, wanted_L: Tensor) -> None:
    """Make a linear layer give these numbers in some of its output channels for these inputs."""
    weight[rows] = torch.linalg.lstsq(inputs_LD.double(), wanted_L.double()[:, None], driver="gelsd").solution.T.to(weight)


def inputs_of(layer: torch.nn.Module, run: Any) -> Tensor:
    """The first sample's rows that enter a layer while `run` runs."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0][0].detach().clone()))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3"])
def test_the_map_points_to_the_left_half_where_a_hand_made_model_attends_to_the_word_there(name: str, folder: Path, stand_ins: Path):
    family = FAMILIES[name]
    model, clip = small(family), clip_of(family, folder, stand_ins)
    network, start = model.model.diffusion_model, latent(family, 1)
    recording, conditioning, attention = mapped(model, clip)
    block = network.joint_blocks[0] if name == "sd3" else network.blocks[0]
    joint = name == "sd3"
    # Image tokens are their positions alone, whatever is sampled.
    modulations = [part.adaLN_modulation[1] for part in (block.x_block, block.context_block)] if joint else [block.attn.proj]
    with torch.no_grad():
        for layer in (network.x_embedder.proj, *modulations):
            layer.weight.zero_()
            layer.bias.zero_()
        to_query = block.x_block.attn.qkv if joint else block.cross_attn.q_linear
        to_key = block.context_block.attn.qkv if joint else block.cross_attn.kv_linear
        image_QD, text_KD = (inputs_of(layer, lambda: sample(model, conditioning, conditioning, start)) for layer in (to_query, to_key))
        rows, columns = (-(-cells // 2) for cells in start["samples"].shape[-2:])
        left = (torch.arange(columns) < columns // 2).float().mul(2).sub(1).repeat(rows)
        word = torch.full((len(text_KD),), -1.0)
        word[positions(clip, len(word))] = 1
        for layer in (to_query, to_key):
            layer.weight.zero_()
            layer.bias.zero_()
        width, heads = network.hidden_size, network.num_heads
        channels = list(range(0, width, width // heads))
        solve(to_query.weight, channels, image_QD, 8 * left)
        solve(to_key.weight, [channel + (width if joint else 0) for channel in channels], text_KD, 8 * word)
    found = map_of(attention.run_of(sample(recording, conditioning, conditioning, start)))[0]
    half = columns // 2
    assert found[:, :half].mean() > 3 * found[:, half:].mean(), found


def test_a_clip_of_stable_diffusion_3_without_its_t5_is_refused():
    text_model = sd3_clip(clip_l=False, clip_g=False, t5=False)()
    other = SimpleNamespace(tokenize=SD3Tokenizer().tokenize_with_weights, tokenizer=SD3Tokenizer(), cond_stage_model=text_model)
    with pytest.raises(ValueError, match=r"This CLIP has no T5 or Qwen3 \(its tokens are for .*[\s\S]*What to do: connect"):
        t5_pieces(other, "x")
