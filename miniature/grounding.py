"""Grounding: heads that read off a caption's embeddings what its picture will show, as a Flux will have to, blind to the tokens' order.

A question (which shape stands at the left edge? what is the second letter of the upper line?) weighs the tokens by one vector, and another
matrix reads the answer from their weighted sum. A Flux gives text tokens no places either, so what it needs to know must be told by single
tokens: whose colour a word names, where the thing stands, how a word is spelt. The heads are thrown away after pretraining.
"""

# B captions, L text tokens, M width, Q questions, A answers

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import cross_entropy

from ..world.font import GLYPHS
from ..world.pictures import BACKGROUNDS, COLOURS, LETTERS_IN_A_WORD, LINES, PLACES, SHAPES, Scene

NOTHING = 0
COLOUR_NUMBERS, SHAPE_NUMBERS, LETTER_NUMBERS = (
    {name: 1 + number for number, name in enumerate(names)} for names in (COLOURS, SHAPES, GLYPHS)
)
ANSWERS = 1 + len(GLYPHS)
# A line of a sign: how many lines it has, and which of them it is.
SIGN_LINES = [(count, line) for count in LINES for line in range(count)]
QUESTIONS = 2 + 2 * len(PLACES) + LETTERS_IN_A_WORD * len(SIGN_LINES)


def answers(scene: Scene) -> list[int]:
    """The background, the colour of letters, colour and shape at each place, the letters of each line; NOTHING where nothing is."""
    things = {thing.place: thing for thing in scene.things}
    found = [list(BACKGROUNDS).index(scene.background), COLOUR_NUMBERS.get(scene.ink, NOTHING)]
    found += [COLOUR_NUMBERS[things[place].colour] if place in things else NOTHING for place in PLACES]
    found += [SHAPE_NUMBERS[things[place].shape] if place in things else NOTHING for place in PLACES]
    for count, line in SIGN_LINES:
        word = scene.words[line] if len(scene.words) == count else None
        found += [NOTHING if word is None else LETTER_NUMBERS[word[column]] for column in range(LETTERS_IN_A_WORD)]
    return found


class Grounding(Module):
    """The heads, for embeddings of width M."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.looked_for = Parameter(0.02 * torch.randn(QUESTIONS, width))
        self.read = Parameter(torch.zeros(QUESTIONS, ANSWERS, width))

    def forward(self, text_BLM: Tensor) -> Tensor:
        """Logits [B, Q, A] of the answers."""
        weights_BQL = (self.looked_for @ text_BLM.mT).softmax(dim=-1)
        return torch.einsum("bqm,qam->bqa", weights_BQL @ text_BLM, self.read)

    def loss(self, text_BLM: Tensor, answers_BQ: Tensor) -> Tensor:
        """Cross entropy in nats, summed over a caption's questions, mean over captions."""
        return cross_entropy(self(text_BLM).flatten(0, 1), answers_BQ.flatten(), reduction="sum") / len(text_BLM)
