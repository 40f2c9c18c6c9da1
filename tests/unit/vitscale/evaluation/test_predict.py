from __future__ import annotations

import math

import pytest
import torch

from vitscale.evaluation.names import output_names
from vitscale.evaluation.predict import Guess, Prediction, most_likely

NAMES = ("cat", "dog", "owl")


def test_softmax_of_logits_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(6.0), math.log(3.0)]])
    (found,) = most_likely(logits, NAMES, "softmax", 2)
    assert [(g.label, g.name) for g in found] == [(1, "dog"), (2, "owl")]
    assert [g.probability for g in found] == pytest.approx([0.6, 0.3])


def test_sigmoid_takes_each_class_for_itself() -> None:
    logits = torch.tensor([[math.log(3.0), math.log(3.0), -100.0]])
    (found,) = most_likely(logits, NAMES, "sigmoid", 3)
    assert {g.name for g in found[:2]} == {"cat", "dog"}
    assert [g.probability for g in found] == pytest.approx([0.75, 0.75, 0], abs=1e-6)


def test_there_are_no_more_classes_than_there_are() -> None:
    found = list(most_likely(torch.randn(4, 3), NAMES, "softmax", 10))
    assert [len(guesses) for guesses in found] == [3] * 4
    assert sum(guess.probability for guess in found[0]) == pytest.approx(1)


def test_a_head_may_have_more_outputs_than_there_are_names() -> None:
    names = output_names(NAMES, 5)
    (found,) = most_likely(torch.arange(5.0)[None], names, "softmax", 9)
    assert [(g.label, g.name) for g in found] == [(4, "class 4"), (3, "class 3"), (2, "owl"), (1, "dog"), (0, "cat")]


def test_json_tells_guesses_or_the_error() -> None:
    good = Prediction("a.png", (Guess(1, "dog", 0.5),))
    assert good.to_json() == {"image": "a.png", "classes": [{"label": 1, "name": "dog", "probability": 0.5}]}
    assert Prediction("b.png", error="torn").to_json() == {"image": "b.png", "error": "torn"}
