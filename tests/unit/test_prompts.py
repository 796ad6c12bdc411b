"""The mix of prompts: a pure function of the index, shared out among ranks without overlap, and nothing held out is ever in it."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest
from distilled_t5.prompts.corpora import Corpus, Prompt, PromptError
from distilled_t5.prompts.mix import PromptMix, hold_out, read_corpus


def prompts(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name} number {index}") for index in range(count)]


def random_corpora(seed: int) -> list[tuple[list[Prompt], int]]:
    """One to four corpora of 3 to 40 prompts, repeated up to 10 times; now and then two share prompts, or one holds a prompt twice."""
    chance = random.Random(seed)
    corpora = [(prompts(chance.choice("abc"), chance.randint(3, 40)), chance.randint(1, 10)) for _ in range(chance.randint(1, 4))]
    corpora[0][0].extend(corpora[0][0][: chance.randint(0, 2)])
    return corpora


def sequence(mix: PromptMix, count: int) -> list[Prompt]:
    return mix.batch(0, count)


@pytest.mark.parametrize("seed", range(20))
def test_every_epoch_holds_each_prompt_exactly_repeat_times(seed):
    corpora = random_corpora(seed)
    mix = PromptMix(corpora, seed)
    expected = Counter(prompt for some, repeat in corpora for prompt in some * repeat)
    every = sequence(mix, 3 * mix.epoch_length)
    for epoch in range(3):
        assert Counter(every[epoch * mix.epoch_length : (epoch + 1) * mix.epoch_length]) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_ranks_share_out_the_batch_of_one_process_in_order(ranks, batch):
    corpora = random_corpora(ranks)
    alone, together = PromptMix(corpora, 5), PromptMix(corpora, 5)
    for index in range(60):
        parts = [prompt for rank in range(ranks) for prompt in together.batch(index, batch, rank, ranks)]
        assert parts == alone.batch(index, batch * ranks)


def test_one_process_with_batch_8_sees_what_two_ranks_with_batch_4_see():
    mix = PromptMix([(prompts("a", 100), 1), (prompts("b", 9), 10)], 1)
    for index in range(50):
        assert mix.batch(index, 8) == mix.batch(index, 4, 0, 2) + mix.batch(index, 4, 1, 2)


def test_accumulating_two_batches_sees_what_two_ranks_see():
    mix = PromptMix([(prompts("a", 50), 2)], 1)
    for step in range(40):
        assert mix.batch(2 * step, 4) + mix.batch(2 * step + 1, 4) == mix.batch(step, 4, 0, 2) + mix.batch(step, 4, 1, 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_overlap_within_an_epoch(ranks):
    mix = PromptMix([(prompts("a", 240), 1)], 3)
    of_ranks = [{prompt for index in range(240 // (5 * ranks)) for prompt in mix.batch(index, 5, rank, ranks)} for rank in range(ranks)]
    assert sum(map(len, of_ranks)) == 240 == len(set().union(*of_ranks))


@pytest.mark.parametrize("seed", range(10))
def test_resuming_at_any_index_goes_on_with_the_very_sequence(seed):
    corpora = random_corpora(seed)
    mix = PromptMix(corpora, seed, held_out=2)
    batches = [mix.batch(index, 5) for index in range(100)]
    for start in random.Random(seed).sample(range(100), 12):
        resumed = PromptMix(corpora, seed, held_out=2)
        assert [resumed.batch(index, 5) for index in range(start, 100)] == batches[start:]


def test_asking_out_of_order_changes_nothing():
    mix = PromptMix(random_corpora(4), 4)
    batches = {index: mix.batch(index, 6) for index in range(80)}
    order = random.Random(0).sample(range(80), 80)
    assert {index: mix.batch(index, 6) for index in order} == batches


def test_last_partial_batch_is_filled_from_the_next_epoch():
    mix = PromptMix([(prompts("a", 10), 1)], 0)
    every = sequence(mix, 30)
    assert mix.batch(3, 3) == every[9:12]
    assert set(every[:10]) == set(every[10:20]) == set(every[20:]) == set(prompts("a", 10))


def test_batch_larger_than_an_epoch_goes_through_several():
    mix = PromptMix([(prompts("a", 3), 1)], 0)
    assert Counter(mix.batch(0, 9)) == dict.fromkeys(prompts("a", 3), 3)


def test_epochs_and_seeds_have_orders_of_their_own():
    mix = PromptMix([(prompts("a", 100), 1)], 0)
    every = sequence(mix, 200)
    assert every[:100] != every[100:]
    assert every[:100] != sequence(PromptMix([(prompts("a", 100), 1)], 1), 100)
    assert every[:100] != prompts("a", 100)


def test_order_is_the_same_on_every_machine_and_for_every_integer_as_seed():
    """Frozen: a change here makes every resumed run go on with other prompts."""
    mix = PromptMix([(prompts("a", 20), 1)], 2024)
    assert [int(prompt.text.split()[-1]) for prompt in mix.batch(0, 8)] == [16, 0, 12, 17, 7, 1, 13, 15]
    for seed in (-1, 0, 2**64):
        assert Counter(PromptMix([(prompts("a", 20), 1)], seed).batch(0, 20)) == Counter(prompts("a", 20))


def test_shuffle_puts_every_prompt_everywhere_equally_often():
    places = Counter(int(prompt.text.split()[-1]) for seed in range(400) for prompt in PromptMix([(prompts("a", 20), 1)], seed).batch(0, 5))
    assert min(places.values()) > 60  # 100 expected, 8.7 standard deviation
    assert max(places.values()) < 140


@pytest.mark.parametrize("seed", range(10))
def test_what_is_held_out_is_never_trained_on_even_if_another_corpus_has_it_too(seed):
    corpora = random_corpora(seed)
    mix = PromptMix(corpora, seed, held_out=2)
    held_out = {prompt.text for prompt in mix.held_out}
    trained = {prompt.text for prompt in sequence(mix, 4 * mix.epoch_length)}
    assert len(held_out) == 2
    assert held_out.isdisjoint(trained)
    assert held_out | trained == {prompt.text for some, _ in corpora for prompt in some}


def test_every_corpus_gives_its_share_of_an_epoch_to_what_is_held_out():
    corpora = [(prompts("a", 600), 1), (prompts("b", 40), 10)]
    held_out = PromptMix(corpora, 0, held_out=50).held_out
    assert Counter(prompt.text[0] for prompt in held_out) == {"a": 30, "b": 20}
    assert len(set(held_out)) == 50


def test_one_held_out_part_serves_every_stage():
    first, second = [(prompts("a", 100), 1)], [(prompts("a", 100), 10), (prompts("b", 100), 1)]
    held_out = hold_out([*first, *second], 40, seed=7)
    for stage in (first, second):
        mix = PromptMix(stage, 7, held_out)
        assert mix.held_out == held_out
        assert not set(held_out) & set(sequence(mix, 2 * mix.epoch_length))


def test_held_out_part_depends_on_the_seed_and_not_on_the_order_of_a_file():
    some = prompts("a", 200)
    assert hold_out([(some, 1)], 20, 0) == hold_out([(some[::-1], 1)], 20, 0)
    assert hold_out([(some, 1)], 20, 0) != hold_out([(some, 1)], 20, 1)
    assert hold_out([(some, 1)], 0, 0) == []


def test_targets_go_with_their_prompts():
    mix = PromptMix([([Prompt("a mug printed with hello", "hello"), Prompt("a dog")], 1)], 0)
    assert {prompt.text: prompt.target for prompt in mix.batch(0, 2)} == {"a mug printed with hello": "hello", "a dog": None}


def test_a_million_prompts_cost_a_few_bytes_each_beyond_themselves():
    some = prompts("a", 100_000)
    tracemalloc.start()
    mix = PromptMix([(some, 10)], 0, held_out=500)
    mix.batch(0, 8)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mix.epoch_length == 995_000
    assert kept < 6_000_000  # 8 bytes a prompt, 4 bytes a place in the epoch
    assert peak < 60_000_000


@pytest.mark.parametrize(
    ("corpora", "held_out", "message"),
    [
        ([], 0, "There is no corpus"),
        ([(prompts("a", 3), 1), ([], 1)], 0, "Corpus 2 of 2 is empty"),
        ([(prompts("a", 3), 0)], 0, "repeated 0 times"),
        ([(prompts("a", 3), 1)], 3, "3 prompts cannot be held out: 3 of them would come from a corpus with 3 different prompts"),
        ([(prompts("a", 3), 1)], 7, "7 prompts cannot be held out"),
        ([(prompts("a", 3) * 5, 1)], 4, "4 of them would come from a corpus with 3 different prompts"),
        ([(prompts("a", 3), 1)], prompts("a", 3), "Corpus 1 of 1 is empty"),
    ],
)
def test_mix_with_nothing_to_train_on_is_refused(corpora, held_out, message):
    with pytest.raises(PromptError, match=message) as caught:
        PromptMix(corpora, 0, held_out)
    assert "What to do: " in str(caught.value)


def test_corpus_of_a_recipe_is_read_with_its_limit(tmp_path):
    (tmp_path / "captions.csv").write_text("id,caption\n1,a red fox\n2,\n3,a grey owl\n4,a blue whale\n")
    corpus = Corpus(kind="csv", path=str(tmp_path / "captions.csv"), column="caption", limit=2)
    assert read_corpus(corpus) == [Prompt("a red fox"), Prompt("a grey owl")]


def test_common_text_of_a_recipe_takes_limit_seed_and_split():
    corpus = Corpus(kind="common_text", limit=30)
    train, validation = read_corpus(corpus), read_corpus(corpus, "validation")
    assert len(train) == len(validation) == 30
    assert not set(train) & set(validation)
    assert train != read_corpus(corpus, seed=1)
    assert all(prompt.target for prompt in train)


def test_common_text_has_50000_prompts_for_training_and_1000_for_validation_unless_told_otherwise():
    corpus = Corpus(kind="common_text")
    assert len(set(read_corpus(corpus))) == 50_000
    assert len(set(read_corpus(corpus, "validation"))) == 1_000


def test_compbench_of_a_recipe_reads_the_files_of_the_split(tmp_path):
    for category in ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy"):
        (tmp_path / f"{category}_train.txt").write_text(f"{category} one\n{category} two\n")
        (tmp_path / f"{category}_val.txt").write_text(f"{category} three\n")
    corpus = Corpus(kind="compbench", path=str(tmp_path), limit=7)
    assert [prompt.text for prompt in read_corpus(corpus)][5:] == ["numeracy one", "color two"]
    assert {prompt.text.split()[1] for prompt in read_corpus(corpus, "validation")} == {"three"}
