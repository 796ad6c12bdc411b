"""The teacher: a small T5 pretrained on text alone. Its encoder is kept.

It reads a text with spans missing and predicts the complete text (the "MASS-style" and "BERT-style" variants of arXiv:1910.10683, table 4):
with the spans alone as targets the embeddings collapsed, see README.md. Each token also predicts its neighbours. As T5 mixes supervised
tasks into its pretraining (3.5.3 there), the embeddings of a caption also predict what its image shows.

Texts are padded and read without a mask, as Flux runs its text encoder.
"""

# B batch, L input tokens, T target tokens, M width

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.functional import cross_entropy, linear
from transformers import T5Config, T5ForConditionalGeneration

from ..encoder.files import open_student, write_student
from ..encoder.metadata import StudentMetadata
from ..students.t5 import T5
from ..students.t5.layout import StudentLayout
from ..students.t5.trained import transformers_config
from ..world.captions import TOKEN_LENGTH, draw_prompt
from ..world.scenes import random_of
from .corpus import draw_text
from .corruption import corrupt, noise_spans
from .grounding import Grounding, answers

LAYOUT = StudentLayout(d_model=128, d_ff=384, num_layers=6, num_heads=4, d_kv=32)
# The decoder is discarded after pretraining; a shallow one leaves more of the work to the encoder.
DECODER_LAYERS = 2
IGNORED = -100
# Texts of a step, as a share of its captions, of which there are `batch`.
TEXT_SHARE = 3 / 8
# Offsets of the tokens that each embedding predicts.
NEIGHBOURS = (-2, -1, 1, 2)


def make_model(layout: StudentLayout, seed: int) -> T5ForConditionalGeneration:
    """An untrained T5 of this layout with a shallow decoder and, as in the pretraining of T5 v1.1, without dropout.

    The head is the token table, as in the original T5: transformers 5 ties them anyway, and AdamW has half as many weights to update.
    """
    values: dict[str, Any] = transformers_config(layout, dropout=0.0).to_dict()
    values |= {"num_decoder_layers": DECODER_LAYERS, "decoder_start_token_id": T5.pad, "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(T5Config(**values))


def example(text: str, tokenizer: Any, random: Any) -> tuple[list[int], list[int]]:
    """Inputs with spans missing and the complete text as targets, each cut or padded to TOKEN_LENGTH tokens."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: TOKEN_LENGTH - 1]
    inputs, _ = corrupt(tokens, noise_spans(len(tokens), random))
    return T5.fit(inputs, TOKEN_LENGTH), T5.fit([*tokens, T5.end], TOKEN_LENGTH)


def draw_batch(tokenizer: Any, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Inputs [B, L] and targets [B, T] of a step; padding in targets is IGNORED."""
    numbers = range(step * batch, (step + 1) * batch)
    drawn = [example(draw_text(seed, index), tokenizer, random_of("spans", seed, index)) for index in numbers]
    inputs_BL, targets_BT = (torch.tensor(part) for part in zip(*drawn, strict=True))
    return inputs_BL, targets_BT.masked_fill(targets_BT == T5.pad, IGNORED)


def draw_captions(tokenizer: Any, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] of a step's captions, the same as in the Flux's training, and the answers [B, Q] to what their images show."""
    prompts = [draw_prompt(seed, index, "train") for index in range(step * batch, (step + 1) * batch)]
    token_ids_BL = torch.tensor([T5.fit(tokenizer(caption)["input_ids"], TOKEN_LENGTH) for _, caption in prompts])
    return token_ids_BL, torch.tensor([answers(scene) for scene, _ in prompts])


class Pretraining(Module):
    """A T5 with heads, discarded later, that predict the neighbours of each token and what the image of a caption shows.

    Flux gives text tokens no positions, so each embedding must carry what its token belongs to. A decoder that copies needs only the order
    of the tokens: a Flux on an encoder pretrained for copying alone drew the right colours on the wrong things.
    """

    def __init__(self, layout: StudentLayout, seed: int) -> None:
        super().__init__()
        self.t5 = make_model(layout, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.neighbours = ModuleList(Linear(layout.d_model, layout.d_model, bias=False) for _ in NEIGHBOURS)
            self.grounding = Grounding(layout.d_model)

    def encode(self, token_ids_BL: Tensor) -> Tensor:
        """Embeddings [B, L, M]; padding is read too, as in Flux."""
        return self.t5.get_encoder()(input_ids=token_ids_BL, attention_mask=torch.ones_like(token_ids_BL)).last_hidden_state

    def caption_loss(self, token_ids_BL: Tensor, answers_BQ: Tensor) -> Tensor:
        """Cross entropy in nats of what the images of captions show (Grounding.loss)."""
        return self.grounding.loss(self.encode(token_ids_BL), answers_BQ)

    def loss(self, inputs_BL: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats per target token, plus the mean per neighbour."""
        encoded_BLM = self.encode(inputs_BL)
        hidden_BTM = self.t5.get_decoder()(
            input_ids=self.t5.prepare_decoder_input_ids_from_labels(targets_BT),
            encoder_hidden_states=encoded_BLM,
            encoder_attention_mask=torch.ones_like(inputs_BL),
        ).last_hidden_state
        known_BT = targets_BT != IGNORED
        return self._cross_entropy(hidden_BTM[known_BT], targets_BT[known_BT]) + self._neighbour_loss(encoded_BLM, inputs_BL)

    def _neighbour_loss(self, encoded_BLM: Tensor, inputs_BL: Tensor) -> Tensor:
        hidden, targets = [], []
        for head, offset in zip(self.neighbours, NEIGHBOURS, strict=True):
            ahead = max(offset, 0), max(-offset, 0)
            theirs_BL = inputs_BL[:, ahead[0] : inputs_BL.shape[1] - ahead[1]]
            read_BL = (theirs_BL != T5.pad) & (inputs_BL[:, ahead[1] : inputs_BL.shape[1] - ahead[0]] != T5.pad)
            hidden.append(head(encoded_BLM[:, ahead[1] : inputs_BL.shape[1] - ahead[0]][read_BL]))
            targets.append(theirs_BL[read_BL])
        return self._cross_entropy(torch.cat(hidden), torch.cat(targets))

    def _cross_entropy(self, hidden_NM: Tensor, target_N: Tensor) -> Tensor:
        """Mean cross entropy over the tokens that occur among the targets.

        The logits of all 32,128 tokens would be by far the widest layer, and a batch uses some hundreds of them (sampled softmax,
        Jean et al. 2015, arXiv:1412.2007, with the batch as samples).
        """
        tokens, indices = target_N.unique(return_inverse=True)
        logits = linear(hidden_NM * self.t5.config.d_model**-0.5, self.t5.lm_head.weight[tokens])
        return cross_entropy(logits.float(), indices)


def encoder_tensors(weights: Mapping[str, Tensor], layout: StudentLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    """The encoder's weights of a T5 by their published names, without decoder and head."""
    named = {"encoder." + name.removeprefix("t5."): tensor for name, tensor in weights.items()}
    return {name: named[name].to("cpu", dtype).contiguous() for name in layout.tensors()}


def save_teacher(path: Path, weights: Mapping[str, Tensor], layout: StudentLayout, facts: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write the teacher as an encoder file without projection, which Distilled Text Encoder Loader loads."""
    metadata = StudentMetadata(
        token_length=TOKEN_LENGTH,
        pooled="zero",
        projection="none",
        also_serves=("sd3",),
        text_width=layout.d_model,
        title="miniature teacher",
        facts=facts,
    )
    return write_student(path, encoder_tensors(weights, layout, dtype), metadata)


class FrozenTeacher:
    """The teacher's file as a function from captions to embeddings, for training the Flux; numerically equal to the loader's.

    The embeddings of each list of captions are cached: 1.3 MB for 64 captions.
    """

    def __init__(self, path: Path, tokenizer: Any, device: torch.device) -> None:
        file = open_student(path)
        self.width, self.tokenizer, self.device = file.layout.output_width, tokenizer, device
        self.encoder = T5.trained(file.layout, 0.0, True).requires_grad_(False)
        self.encoder.load_tensors({name: tensor.float() for name, tensor in file.load().items()})
        self.encoder.to(device)
        self._cache: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        """Embeddings [B, L, D] of captions padded to TOKEN_LENGTH."""
        key = tuple(captions)
        if key not in self._cache:
            self._cache[key] = self._embedded(captions)
        return self._cache[key]

    @torch.no_grad()
    def _embedded(self, captions: list[str]) -> Tensor:
        token_ids_BL = torch.tensor([T5.fit(self.tokenizer(text)["input_ids"], TOKEN_LENGTH) for text in captions])
        return self.encoder(token_ids_BL.to(self.device))
