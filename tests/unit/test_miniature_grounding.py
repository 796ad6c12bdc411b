"""The teacher's grounding: every question about a picture, and heads that see which tokens there are but not in which order."""

from __future__ import annotations

import torch
from distilled_t5.miniature.grounding import ANSWERS, NOTHING, QUESTIONS, Grounding, answers
from distilled_t5.miniature.teacher import Pretraining
from distilled_t5.miniature.training import Plan, Trainee
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.world.pictures import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, Thing
from distilled_t5.world.scenes import draw_scene
from torch.nn.functional import cross_entropy

TINY = StudentLayout(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16)
PLACE_NAMES, COLOUR_NAMES, SHAPE_NAMES = list(PLACES), list(COLOURS), list(SHAPES)


def test_things_are_asked_for_place_by_place() -> None:
    scene = Scene("position", "sea", things=(Thing("blue", "tree", "top"), Thing("red", "ring", "bottom")))
    found = answers(scene)
    assert len(found) == QUESTIONS
    assert found[:2] == [list(BACKGROUNDS).index("sea"), NOTHING]
    colours, shapes, letters = found[2:11], found[11:20], found[20:]
    assert {PLACE_NAMES[at]: COLOUR_NAMES[colour - 1] for at, colour in enumerate(colours) if colour} == {"top": "blue", "bottom": "red"}
    assert {PLACE_NAMES[at]: SHAPE_NAMES[shape - 1] for at, shape in enumerate(shapes) if shape} == {"top": "tree", "bottom": "ring"}
    assert letters == [NOTHING] * 9


def test_a_sign_is_asked_for_letter_by_letter_in_the_lines_that_it_has() -> None:
    one, two = (answers(Scene("word", words=words, ink="green")) for words in (("cat",), ("fox", "bed")))
    spelt = "".join(" abcdefghijklmnopqrstuvwxyz"[letter] for letter in one[20:])
    assert (spelt, one[1]) == ("cat      ", COLOUR_NAMES.index("green") + 1)
    assert "".join(" abcdefghijklmnopqrstuvwxyz"[letter] for letter in two[20:]) == "   foxbed"
    assert one[2:20] == two[2:20] == [NOTHING] * 18


def test_two_scenes_with_other_pictures_have_other_answers() -> None:
    scenes = {draw_scene(0, index, "train") for index in range(300)}
    pictures = {(scene.background, scene.things, scene.words, scene.ink) for scene in scenes}
    assert len({tuple(answers(scene)) for scene in scenes}) == len(pictures) > 200
    assert all(0 <= answer < ANSWERS for scene in scenes for answer in answers(scene))


def test_the_heads_are_blind_to_the_order_of_the_tokens_and_not_to_the_tokens() -> None:
    torch.manual_seed(0)
    heads = Grounding(8)
    torch.nn.init.normal_(heads.answer)
    text = torch.randn(2, 5, 8)
    torch.testing.assert_close(heads(text[:, [3, 1, 4, 0, 2]]), heads(text))
    assert heads(text).shape == (2, QUESTIONS, ANSWERS)
    assert (heads(text[:, :4]) - heads(text)).abs().max() > 0.01


def test_the_loss_is_summed_over_questions_and_a_teacher_learns_it() -> None:
    model = Pretraining(TINY, seed=0)
    token_ids = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    told = torch.tensor([answers(draw_scene(1, index, "train")) for index in range(4)])
    logits = model.grounding(model.encode(token_ids))
    each = [cross_entropy(logits[row, question], told[row, question]) for row in range(4) for question in range(QUESTIONS)]
    loss = model.caption_loss(token_ids, told)
    torch.testing.assert_close(loss, torch.stack(each).sum() / 4)
    trainee = Trainee(model, Plan(steps=60, warmup_steps=1, learning_rate=1e-2))
    for _ in range(40):
        trainee.advance(lambda _step: model.caption_loss(token_ids, told))
    assert model.caption_loss(token_ids, told) < loss / 4
