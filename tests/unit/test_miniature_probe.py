"""What the probe says of embeddings made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from distilled_t5.miniature.probe import CAPTIONS, TRAINED_ON, linear_probe


def test_a_linear_probe_reads_what_lies_in_the_embedding_and_nothing_else():
    random = np.random.RandomState(0)
    labels = [str(number) for number in random.randint(4, size=CAPTIONS)]
    noise_ND = random.standard_normal((CAPTIONS, 16))
    told_ND = noise_ND.copy()
    told_ND[:, :4] += 6 * np.eye(4)[[int(label) for label in labels]]
    assert linear_probe(told_ND, labels) > 0.97
    assert linear_probe(noise_ND, labels) == pytest.approx(0.25, abs=0.1)


def test_what_the_probe_learnt_from_is_not_what_it_is_judged_on():
    labels = [str(number % 2) for number in range(CAPTIONS)]
    told_ND = np.array([[float(label) if number < TRAINED_ON else 1.0 - float(label)] for number, label in enumerate(labels)])
    assert linear_probe(told_ND, labels) == 0.0
