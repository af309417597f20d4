"""Responses that draw digits: what rewards see of them, and how drawings and falsehoods are judged.

Drawings are made of test handwriting, which the reader behind the rewards was not trained on.
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from aa_jax.data import digits
from aa_jax.data.digits import generation, makers
from aa_jax.data.example import Example, Part, message
from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, RewardError
from aa_jax.rewards.build import make_reward
from aa_jax.rewards.wire import request_from_json, request_to_json


def drawing(numbers, seed=0):
    """A picture that the independent reader reads as these digits."""
    for attempt in range(100):
        rng = np.random.default_rng((seed, attempt))
        picture = np.asarray(makers.MAKERS["image"].make(numbers, "test", rng, 3))
        if makers.read_picture(picture) == tuple(numbers):
            return picture
    raise AssertionError(numbers)


def value(reward, text="<image>", numbers=(3, 7), reference=None, prompt="p"):
    pictures = () if numbers is None else (drawing(numbers),)
    (result,) = reward([Request(prompt, text, reference, pictures=pictures)])
    return result


def test_a_drawing_is_paid_for_the_digits_it_shows():
    judge = make_reward({"kind": "drawing"})
    asked = "digits 7 3 . reverse the digits . draw ."
    for reference, prompt in (("3 7", "p"), ([3, 7], "p"), (None, asked)):
        assert value(judge, reference=reference, prompt=prompt).value == 3
        wrong = value(judge, reference=reference, prompt=prompt, numbers=(3, 5))
        assert wrong.parts == {"prompt_following": 3, "objective_rules": 2, "quality": 3,
                               "information_richness": 1}  # fmt: skip
        short = value(judge, reference=reference, prompt=prompt, numbers=(3,))
        assert 0 < short.value < wrong.value + 1e-6
        assert value(judge, "no", None, reference, prompt).value == 0
    for reference, prompt in (("", "p"), ("x", "p"), (None, "draw me a horse"), (3, "p")):
        result = value(judge, reference=reference, prompt=prompt)
        assert not result.valid and result.reason == "no digits ordered"


def test_orders_are_read_back_from_their_text():
    for seed in range(40):
        order = generation.sample_order("T2I", "train", np.random.default_rng(seed))
        assert generation.parse_order(order.question) == order.target


def test_what_is_said_must_be_what_is_drawn():
    order = generation.sample_order("TI2TI", "test", np.random.default_rng(0))
    right = order.target
    other = tuple((d + 1) % 10 for d in right)
    judge = make_reward({"kind": "oracle"})
    say = "the digits are {} . <image>".format
    good = value(judge, say(" ".join(map(str, right))), right, order)
    torn = value(judge, say(" ".join(map(str, other))), right, order)
    assert good.value == 3 and torn.value == 2.25 and torn.parts["quality"] == 0
    assert value(judge, say(" ".join(map(str, other))), other, order).value < 2
    quality = make_reward({"kind": "oracle", "dimensions": ("quality",)})
    assert value(quality, say("1"), right, order).value == 0


def test_the_oracles_dimensions():
    task = digits.Task((3, 7), ("sum", "largest"), "sentence")
    request = Request("p", "the sum is 1 1 and the largest is 7 .", task)
    whole, part = (make_reward({"kind": "oracle", **more}) for more in
                   ({}, {"dimensions": ("objective_rules",)}))  # fmt: skip
    assert whole([request])[0].value == digits.overall(task, request.response)
    assert part([request])[0].value == digits.grade(task, request.response).objective_rules
    with pytest.raises(ConfigError, match="'beauty'.*prompt_following.*quality"):
        make_reward({"kind": "oracle", "dimensions": ("beauty",)})
    with pytest.raises(RewardError, match="no grade for quality.*clarity"):
        make_reward({"kind": "oracle", "dimensions": ("quality",)})([request])


def test_a_falsehood_costs():
    judge = make_reward({"kind": "falsehood"})
    task = digits.Task((3, 7), ("sum", "largest"), "sentence")
    perfect = digits.perfect_response(task).text
    asked = {perfect: -1, perfect.replace("7", "6"): 1, "": -1, "the largest is 7 .": -1,
             perfect.replace(" .", " , the smallest is 9 ."): 1}  # fmt: skip
    for text, cost in asked.items():
        assert judge([Request("p", text, task)])[0].value == cost, text
    with pytest.raises(RewardError, match="reference is their task; this one is '3'"):
        judge([Request("p", "3", "3")])


def test_pictures_stand_where_the_text_says():
    shown = Example((message("user", "q", [Part("image", index=0)]),),
                    media=(Image.new("RGB", (8, 8)),))  # fmt: skip
    first, second = drawing((1,)), drawing((2,))
    request = Request(shown, "one <image> two <image>", pictures=(first, second))
    example = request.answered
    kinds = [(part.type, part.text, part.index) for part in example.responses[0].content]
    assert kinds == [("text", "one ", None), ("image", None, 1), ("text", " two ", None),
                     ("image", None, 2)]  # fmt: skip
    np.testing.assert_array_equal(example.media[2], second)
    again = request_from_json(request_to_json(request))
    assert again.response == request.response
    for ours, theirs in zip(again.pictures, request.pictures, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(RewardError, match="2 pictures has 1 places"):
        _ = dataclasses.replace(request, response="<image>").answered
    assert Request("p", "plain <image>").answered.responses[0].text == "plain <image>"
