"""Grounding: heads that predict from a caption's embeddings what its image shows, without the order of the tokens.

Each question (which shape is at the left edge? what is the second letter of the upper line?) has a vector that weighs the tokens and a
matrix that maps their weighted sum to an answer. Flux gives text tokens no positions either, so single tokens must carry what it needs:
which thing a colour belongs to, where the thing is, how a word is spelt. The heads are discarded after pretraining.
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
# A line of a sign: the number of lines of the sign, and the index of the line.
SIGN_LINES = [(count, line) for count in LINES for line in range(count)]
QUESTIONS = 2 + 2 * len(PLACES) + LETTERS_IN_A_WORD * len(SIGN_LINES)


def answers(scene: Scene) -> list[int]:
    """The answers [Q]: background, colour of letters, colour and shape at each place, letters of each line; NOTHING where there is none."""
    things = {thing.place: thing for thing in scene.things}
    found = [list(BACKGROUNDS).index(scene.background), COLOUR_NUMBERS.get(scene.ink, NOTHING)]
    found += [COLOUR_NUMBERS[things[place].colour] if place in things else NOTHING for place in PLACES]
    found += [SHAPE_NUMBERS[things[place].shape] if place in things else NOTHING for place in PLACES]
    for count, line in SIGN_LINES:
        word = scene.words[line] if len(scene.words) == count else None
        found += [NOTHING if word is None else LETTER_NUMBERS[word[column]] for column in range(LETTERS_IN_A_WORD)]
    return found


class Grounding(Module):
    """The heads for embeddings of width M."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = Parameter(0.02 * torch.randn(QUESTIONS, width))
        self.answer = Parameter(torch.zeros(QUESTIONS, ANSWERS, width))

    def forward(self, text_BLM: Tensor) -> Tensor:
        """Logits [B, Q, A] of the answers."""
        weights_BQL = (self.query @ text_BLM.mT).softmax(dim=-1)
        return torch.einsum("bqm,qam->bqa", weights_BQL @ text_BLM, self.answer)

    def loss(self, text_BLM: Tensor, answers_BQ: Tensor) -> Tensor:
        """Cross entropy in nats, summed over the questions of a caption, averaged over captions."""
        return cross_entropy(self(text_BLM).flatten(0, 1), answers_BQ.flatten(), reduction="sum") / len(text_BLM)
