"""CommonText: deterministic, without overlap, of the stated proportions, with words that training never sees."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter

import pytest
from distilled_t5.prompts import common_text as module
from distilled_t5.prompts.common_text import COUNTS, MIXES, Split, common_text, common_words, own_list, subjects, unseen_words
from distilled_t5.prompts.corpora import Corpus, MixName, Prompt, PromptError
from distilled_t5.prompts.mix import read_corpus

TRIPWIRES = (
    *("os.environ", "os.getenv(", "subprocess.", "os.system(", "requests.", "urlopen(", "aiohttp.ClientSession", "socket."),
    *(".connect(", ".bind(", "eval(", "exec(", "pickle", "torch.load("),
)

# sha256 of the first 1,000 prompts of each split, seed 0, joined by line ends
FROZEN = {
    "train": "a1a1779f67036bd0b2a13e23907a1254aed180b569634a3b463229947597e4ff",
    "validation": "017539693f92d3f3cc94d83dd457d832722df1a176a2196658aaa55c5ee9b46e",
    "unseen_words": "44f90fda1e8877e00964a5fc699b05ba84d2147974a848a9d04530745bb605c5",
}


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return common_text("train", 50_000, seed=0)


@pytest.fixture(scope="module")
def validation() -> list[Prompt]:
    return common_text("validation", 1_000, seed=0)


@pytest.fixture(scope="module")
def unseen() -> list[Prompt]:
    return common_text("unseen_words", 1_000, seed=0)


def words_of(prompts: list[Prompt]) -> set[str]:
    return {word for prompt in prompts for word in re.findall("[a-z]+", prompt.text.lower())}


def kind_of(target: str) -> str:
    if target in own_list("sentences"):
        return "sentence"
    if any(character.isdigit() for character in target):
        return "number"
    if target != target.lower():
        return "case"
    return "words" if " " in target else "word"


def test_every_prompt_is_different_and_contains_its_target(train, validation, unseen):
    assert (len(set(train)), len(set(validation)), len(set(unseen))) == (50_000, 1_000, 1_000)
    for prompt in (*train, *validation, *unseen):
        assert prompt.target
        assert f'"{prompt.target}"' in prompt.text
        assert "{" not in prompt.text


def test_train_and_validation_do_not_overlap_whatever_their_seeds(train, validation):
    texts = {prompt.text for prompt in train}
    assert texts.isdisjoint(prompt.text for prompt in validation)
    assert texts.isdisjoint(prompt.text for seed in (1, 2, 3) for prompt in common_text("validation", 1_000, seed))


def test_unseen_words_never_appear_in_training_or_validation(train, validation, unseen):
    assert len(unseen_words()) > 200
    assert words_of(train).isdisjoint(unseen_words())
    assert words_of(validation).isdisjoint(unseen_words())
    assert len(words_of(unseen) & unseen_words()) > 200


def test_every_text_of_the_unseen_split_is_made_of_unseen_words_alone(unseen):
    for prompt in unseen:
        target = prompt.target or ""
        run_together = {word.lower() for word in re.findall("[A-Z][a-z]*", target)}
        assert set(target.lower().split()) <= unseen_words() or run_together <= unseen_words(), target


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("split", COUNTS)
def test_proportions_are_the_documented_ones(split, mix):
    count = 4_000
    found = Counter(kind_of(prompt.target or "") for prompt in common_text(split, count, 1, mix))
    assert set(found) == set(MIXES[mix][split])
    for kind, percent in MIXES[mix][split].items():
        assert abs(100 * found[kind] / count - percent) < 3, (kind, found)


def test_percentages_add_up():
    assert {sum(shares.values()) for mix in MIXES.values() for shares in mix.values()} == {100}


def test_the_papers_mix_is_of_words_and_sentences_and_overlaps_with_no_other_split_of_either_mix(train, validation):
    papers = common_text("train", 50_000, 0, "paper")
    texts = {prompt.text for prompt in papers}
    assert len(texts) == 50_000
    assert len({prompt.target for prompt in papers} & set(own_list("sentences"))) > 450
    assert len({prompt.target for prompt in papers} & set(common_words())) > 4_600
    assert words_of(papers).isdisjoint(unseen_words())
    held_out = common_text("validation", 1_000, 0, "paper")
    assert texts.isdisjoint(prompt.text for prompt in (*validation, *held_out))
    assert {prompt.text for prompt in train}.isdisjoint(prompt.text for prompt in held_out)


@pytest.mark.parametrize("mix", [None, *MIXES])
def test_a_corpus_names_its_mix_and_without_one_it_is_the_varied_mix(mix: MixName | None):
    assert read_corpus(Corpus(kind="common_text", limit=20, mix=mix)) == common_text("train", 20, 0, mix or "varied")
    with pytest.raises(ValueError, match="a corpus of kind lines is not generated: expected no mix"):
        Corpus(kind="lines", path="x.txt", mix="paper")


def test_same_seed_gives_the_same_prompts_and_another_seed_others():
    assert common_text("train", 500, 3) == common_text("train", 500, 3)
    assert len(set(common_text("train", 500, 3)) & set(common_text("train", 500, 4))) < 25


def test_smaller_count_is_the_beginning_of_a_larger_one():
    assert common_text("train", 700, 3)[:200] == common_text("train", 200, 3)


def test_prompts_are_the_same_on_every_machine():
    """Frozen: a change here gives every recipe another training set, and every published validation figure another meaning."""
    digest = {
        split: hashlib.sha256("\n".join(prompt.text for prompt in common_text(split, 1_000, 0)).encode()).hexdigest() for split in COUNTS
    }
    assert digest == FROZEN


def test_moving_the_global_random_state_changes_nothing_and_is_not_done():
    import random

    random.seed(1)
    state = random.getstate()
    first = common_text("train", 50, 0)
    assert random.getstate() == state
    random.seed(2)
    assert common_text("train", 50, 0) == first


def test_common_words_are_5000_of_letters_alone_and_none_is_offensive():
    words = common_words()
    assert len(words) == len(set(words)) == 5_000
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert not set(words) & set(own_list("left_out"))
    assert not [word for word in words if re.match("fuck|shit|bitch|porn|nigg|rape[ds]?$|nazi|terroris|suicid|murder|slave", word)]
    assert {"the", "house", "water", "music", "i", "a"} <= set(words)


def test_sentences_are_500_different_ones_of_two_to_six_words():
    sentences = own_list("sentences")
    assert len(sentences) == len({sentence.casefold() for sentence in sentences}) == 500
    assert all(2 <= len(sentence.split()) <= 6 for sentence in sentences)
    assert all(re.fullmatch("[A-Za-z][A-Za-z ,'-]+", sentence) for sentence in sentences)
    left_out = set(own_list("left_out"))
    assert not [sentence for sentence in sentences if left_out & set(re.findall("[a-z]+", sentence.lower()))]


def test_subjects_are_humans_animals_and_objects_and_every_kind_has_actions_that_fit():
    kinds = Counter(kind for kind, _ in subjects())
    assert set(kinds) == {"human", "animal", "object", "sign", "vehicle", "food"}
    assert min(kinds["human"], kinds["animal"]) >= 30
    assert len({subject for _, subject in subjects()}) == sum(kinds.values()) >= 60
    for kind in kinds:
        assert len(module.actions(kind)) >= 4
        assert all(action.count('"{text}"') == 1 for action in module.actions(kind))
    assert all(kind in kinds for line in own_list("actions") for kind in line.split(": ")[0].split(", "))
    assert all(re.match("an? |two ", subject) for _, subject in subjects())
    assert [subject for _, subject in subjects() if re.match("a [aeio]|an [^aeiou]", subject)] == []


def test_no_animal_writes_and_no_object_holds_a_sign(train):
    animals = tuple(subject for kind, subject in subjects() if kind == "animal")
    objects = tuple(subject for kind, subject in subjects() if kind not in ("animal", "human"))
    before_the_text = [prompt.text.partition('"')[0] for prompt in train]
    assert not [text for text in before_the_text if text.startswith(animals) and re.search("writing|spraying|reading", text)]
    assert not [text for text in before_the_text if text.startswith(objects) and re.search("holding|wearing", text)]


def test_what_a_text_is_called_fits_it(train):
    for prompt in train:
        called = re.search('with the (word|words|number) "', prompt.text)
        if called:
            target = prompt.target or ""
            expected = "number" if not re.search("[A-Za-z]", target) else "words" if " " in target else "word"
            assert called[1] == expected


def test_missing_wordfreq_is_an_error_that_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    module.common_words.cache_clear()
    with pytest.raises(ValueError, match="pip install") as caught:
        common_words()
    assert str(caught.value) == (
        f"CommonText needs the package wordfreq=={module.WORDFREQ}.\n"
        f'What to do: run "{sys.executable}" -m pip install wordfreq=={module.WORDFREQ}'
    )


def test_another_wordfreq_is_refused_because_its_prompts_would_differ(monkeypatch):
    import wordfreq

    of_this_one = wordfreq.top_n_list("en", module.FREQUENT)
    monkeypatch.setattr(wordfreq, "top_n_list", lambda *_, **__: of_this_one[::-1])
    module.common_words.cache_clear()
    with pytest.raises(PromptError, match="the installed version has different ones"):
        common_words()


def test_more_prompts_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda *_: Prompt("a mug printed with hello", "hello"))
    with pytest.raises(PromptError, match="split unseen_words: expected 10 different prompts, got 1"):
        common_text("unseen_words", 10, 0)


def test_no_list_of_wordfreq_is_shipped_and_no_list_trips_the_registrys_scanner(pack_root):
    files = {path.stem: path.read_text(encoding="utf-8") for path in (pack_root / "prompts" / "words").iterdir()}
    assert set(files) == {"subjects", "actions", "sentences", "left_out"}
    assert all(text.isascii() and text.endswith("\n") for text in files.values())
    assert not [tripwire for tripwire in TRIPWIRES for text in files.values() if tripwire in text]


def test_a_count_of_zero_gives_an_empty_list():
    for split in COUNTS:
        assert common_text(split, 0, 0) == []


SPLITS: tuple[Split, ...] = ("train", "validation", "unseen_words")


def test_splits_are_the_three_documented_ones():
    assert tuple(COUNTS) == SPLITS and all(tuple(mix) == SPLITS for mix in MIXES.values())
