"""Empty and negative prompts among the training prompts."""

from __future__ import annotations

from distilled_t5.prompts.negatives import NEGATIVES, some_replaced
from distilled_t5.train.batches import Schedule
from distilled_t5.train.recipe import load_recipe

PROMPTS = [f"prompt {number}" for number in range(50)]


def test_without_a_share_no_prompt_is_replaced():
    assert some_replaced(PROMPTS, 0.0, seed=0, batch=3) == tuple(PROMPTS)


def test_a_share_of_the_prompts_is_replaced_half_of_it_by_the_empty_prompt():
    batches = [some_replaced(PROMPTS, 0.1, seed=0, batch=number) for number in range(100)]
    replaced = [prompt for batch in batches for prompt, asked in zip(batch, PROMPTS, strict=True) if prompt != asked]
    assert 430 < len(replaced) < 570
    assert 0.4 < sum(prompt == "" for prompt in replaced) / len(replaced) < 0.6
    assert set(replaced) == {"", *NEGATIVES}


def test_the_replacements_depend_on_seed_and_batch_alone():
    assert some_replaced(PROMPTS, 0.5, 0, 7) == some_replaced(PROMPTS, 0.5, 0, 7)
    assert len({some_replaced(PROMPTS, 0.5, seed, batch) for seed in (0, 1) for batch in (0, 1)}) == 4


def test_only_training_prompts_are_replaced_and_nothing_else_of_a_batch_changes():
    plain, mixed = (Schedule(load_recipe("smoke", [f"sampling.negatives={share}"])) for share in (0.0, 0.9))
    assert [batch.prompts for batch in plain.held_out_batches()] == [batch.prompts for batch in mixed.held_out_batches()]
    pairs = list(zip(plain.batches(1, 0), mixed.batches(1, 0), strict=True))
    assert all((one.drawn.noise == other.drawn.noise).all() for one, other in pairs)
    assert any(one.prompts != other.prompts for one, other in pairs)


def test_a_recipe_without_cfg_and_negatives_keeps_its_digest():
    recipe = load_recipe("smoke")
    text = recipe.to_toml()
    assert "cfg" not in text and "negatives" not in text and "clip_g" not in text
    assert load_recipe("smoke", ["sampling.cfg=[4.5]"]).sha256 != recipe.sha256
