"""The losses of all objectives, compared with numpy, and the variance that some are divided by."""

# B batch, L text tokens, D text width

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distilled_t5.encoder.rows import Rows
from distilled_t5.train.objectives import FLOOR, OBJECTIVES, Gap
from distilled_t5.train.variance import variance_of

B, L, D = 3, 5, 8
OWN = (5, 1, 3)
RANDOM = np.random.default_rng(3)
TEACHER, STUDENT = RANDOM.normal(size=(2, B, L, D)).astype(np.float32)
# One channel is constant, one varies much.
VARIANCE = np.array([0, 100, *RANDOM.uniform(0.5, 2, D - 2)], dtype=np.float32)
SCALE = np.sqrt(np.maximum(VARIANCE, FLOOR * np.sort(VARIANCE)[(D - 1) // 2]))


def of(name: str, own: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    student, teacher = (torch.from_numpy(each).to(dtype) for each in (STUDENT, TEACHER))
    return OBJECTIVES[name].loss(Gap(student, teacher, own=own, variance_D=torch.from_numpy(VARIANCE))).numpy()


def expected(name: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """Of one prompt, rows [own, D]."""
    plain, whitened = ((student - teacher) ** 2).mean(), (((student - teacher) / SCALE) ** 2).mean()
    products = (student * teacher).sum(axis=1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)
    return {
        "embedding": plain,
        "scaled": plain / VARIANCE.mean(),
        "projected": plain / VARIANCE.mean(),
        "whitened": whitened,
        "whitened_cosine": whitened + (1 - products).mean(),
    }[name]


@pytest.mark.parametrize("own", [None, OWN], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", ["embedding", "scaled", "projected", "whitened", "whitened_cosine"])
def test_imitation_is_numpys_over_the_rows_that_the_diffusion_model_attends_to(name, own):
    wanted = [expected(name, STUDENT[place, :count], TEACHER[place, :count]) for place, count in enumerate(own or [L] * B)]
    found = of(name, own)
    assert found.dtype == np.float32 and found.shape == (B,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["scaled", "whitened", "whitened_cosine"])
def test_imitation_of_bf16_embeddings_is_computed_in_float32(name):
    assert np.isfinite(of(name, OWN, torch.bfloat16)).all() and of(name, OWN, torch.bfloat16).dtype == np.float32


def test_what_is_seen_in_blocks_weighs_alike_whatever_its_scale():
    seen = RANDOM.normal(size=(2, B, L, D)).astype(np.float32)
    large = [1000 * each for each in seen]
    parts = [(torch.from_numpy(seen[0]), torch.from_numpy(large[0])), (torch.from_numpy(seen[1]), torch.from_numpy(large[1]))]
    text = torch.zeros(B, L, D)
    found = OBJECTIVES["early"].loss(Gap(text, text, student_seen=parts[0], teacher_seen=parts[1])).numpy()
    wanted = ((seen[0] - seen[1]) ** 2).mean(axis=(1, 2)) / seen[1].reshape(B, -1).var(axis=1, ddof=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_variance_is_numpys_of_the_own_rows_of_all_texts_around_each_channels_mean():
    shifted = TEACHER + 50 * np.arange(D, dtype=np.float32)
    rows = Rows(OWN, (torch.zeros(0, D),) * B)
    texts = [
        SimpleNamespace(text_BLD=torch.from_numpy(shifted), rows=rows),
        SimpleNamespace(text_BLD=torch.from_numpy(shifted[:1]), rows=None),
    ]
    found = variance_of(texts, lambda text_BLD: text_BLD, torch.device("cpu"))  # type: ignore[arg-type]
    own = [shifted[place, :count] for place, count in enumerate(OWN)]
    np.testing.assert_allclose(found.numpy(), np.concatenate([*own, shifted[0]]).var(axis=0), rtol=1e-4)
    assert found.dtype == torch.float32


def test_only_objectives_about_blocks_need_the_diffusion_model_and_only_two_walk_a_trajectory():
    assert {name for name, each in OBJECTIVES.items() if each.needs_model} == {"velocity", "early", "text_stream", "keys_values"}
    assert {name for name, each in OBJECTIVES.items() if each.needs_velocity} == {"velocity", "early"}
    assert {name for name, each in OBJECTIVES.items() if each.takes_blocks} == {"early", "text_stream"}


@pytest.mark.parametrize("name", ["scaled", "whitened", "whitened_cosine"])
@pytest.mark.parametrize("constant", [D // 2 + 1, D])
def test_constant_channels_of_the_teacher_leave_the_loss_finite(name, constant):
    variance_D = torch.from_numpy(VARIANCE.astype(np.float32)).clone()
    variance_D[:constant] = 0
    text = torch.ones(B, L, D)
    assert OBJECTIVES[name].loss(Gap(text, text, variance_D=variance_D)).isfinite().all()
