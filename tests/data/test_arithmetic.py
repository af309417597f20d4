"""Written arithmetic: right without slips, wrong with them, and no test problem in training."""

import numpy as np
import pytest

from aa_jax.data import arithmetic
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, evaluate
from aa_jax.rewards.text import ExactMatch, well_formed


def right(problem, text):
    asked = [Request(problem.question, text, problem.answer)]
    return bool(evaluate(ExactMatch(where="answer"), asked).values[0])


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_a_solution_without_slips_is_right_and_with_them_often_wrong(digits):
    rng = np.random.default_rng(0)
    wrong = 0
    for problem in arithmetic.problems(200, 0, "train", digits=digits):
        sign = {"+": 1, "-": -1}[problem.operation]
        result = int(problem.answer.replace(" ", ""))
        assert result == problem.first + sign * problem.second >= 0
        text = problem.solution()
        assert well_formed(text) and right(problem, text)
        slipped = problem.solution(rng, slip=1.0)
        assert well_formed(slipped)
        wrong += not right(problem, slipped)
        carries = any(step.split("=")[1].split()[0] == "1" for step in text.split(" , "))
        assert right(problem, slipped) == (not carries)  # only a carry can be forgotten
    assert 20 < wrong < 190


def test_what_it_looks_like():
    problem = arithmetic.Problem(27, 45, "+", 2)
    assert problem.question == "2 7 + 4 5 = ?"
    assert problem.solution() == (
        "<think> 7 + 5 + 0 = 1 2 , 2 + 4 + 1 = 0 7 </think> <answer> 0 7 2 </answer>"
    )
    problem = arithmetic.Problem(42, 7, "-", 2)
    assert problem.solution() == (
        "<think> 2 - 7 - 0 = 1 5 , 4 - 0 - 1 = 0 3 </think> <answer> 0 3 5 </answer>"
    )


def test_splits_share_no_problem():
    train = set(arithmetic.problems(5000, 0, "train"))
    test = set(arithmetic.problems(1000, 0, "test"))
    assert not train & test and len(test) > 500
    assert arithmetic.problems(50, 1, "test") == arithmetic.problems(50, 1, "test")
    with pytest.raises(ConfigError, match="split is 'dev'"):
        arithmetic.problems(1, 0, "dev")


def test_every_word_has_a_token(tmp_path):
    processor = Processor.from_pretrained(arithmetic.write_processor(tmp_path))
    for problem in arithmetic.problems(20, 0, "train"):
        encoded = encode_example(problem.example(problem.solution()), processor)
        (tokens,) = encoded.responses
        assert tokens[-1] in processor.stop_ids and encoded.ended == (True,)
        assert processor.decode(tokens).strip() == problem.solution()
        assert problem.question in processor.decode(encoded.prompt)
