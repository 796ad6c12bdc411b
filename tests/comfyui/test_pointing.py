"""The attention map of a thing's word points at the thing: the pointing game on the trained miniature."""

from __future__ import annotations

import pytest
from distilled_t5.devtools.pointing import cases, pointing, tokens_of
from distilled_t5.evaluate.attention import positions_of
from distilled_t5.miniature.files import TEACHER_FILE, place
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.world.pictures import Thing

AT_LEAST = 0.8


def test_a_thing_covers_three_by_three_of_six_by_six_tokens_at_its_place():
    top_left, bottom_right = (tokens_of(Thing("red", "heart", where)) for where in ("top left", "bottom right"))
    assert top_left.shape == (6, 6)
    assert top_left[:3, :3].all()
    assert bottom_right[3:, 3:].all()
    assert top_left.sum() == bottom_right.sum() == 9


def test_each_case_asks_for_a_thing_of_its_scene_by_a_word_of_its_caption():
    asked = list(cases(100))
    assert len(asked) == 100
    assert len({caption for _, caption, _, _ in asked}) > 90
    for scene, caption, thing, word in asked:
        assert thing in scene.things
        assert positions_of([caption], word) == [0], "as a whole word"
    assert len({thing.place for _, _, thing, _ in asked}) == 9


@pytest.mark.full
def test_four_of_five_maps_point_at_the_thing():
    found = pointing(SHIPPED, place(SHIPPED, TEACHER_FILE), 100)
    assert found.n == 100
    assert found.n_right >= 90, "the Flux draws what it is asked for"
    assert found.hits >= AT_LEAST * found.n, f"{found.hits} of {found.n}; of {found.n_right} right pictures {found.hits_in_right}"
