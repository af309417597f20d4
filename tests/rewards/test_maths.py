"""Mathematical equality, and expressions made to hang the judge."""

import os
import textwrap
import time

import pytest

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import RewardError, Weighted, evaluate
from aa_jax.rewards.maths import Maths
from aa_jax.rewards.text import Format
from aa_jax.rewards.workers import Died, Pool, Worker


@pytest.fixture(scope="module")
def maths():
    reward = Maths(workers=1, seconds=60.0)
    yield reward
    reward.close()


def value(maths, ask, gold, answer):
    (result,) = maths([ask(f"<think>x</think><answer>{answer}</answer>", gold)])
    assert result.valid, result
    return result.value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("1/2", r"\frac{1}{2}"), (r"\frac{1}{2}", "0.5"), ("0.5", "1/2"), ("$0.5$", r"\(1/2\)"),
     ("42", "42"), (42, "42.0"), ("42", r"\boxed{42}"), ("1000", "1,000"), ("x=3", "3"),
     ("3", "$x = 3$"), (r"3\sqrt{2}", r"\sqrt{18}"), ("x^2-1", "(x-1)(x+1)"), (r"50\%", "0.5"),
     ("50%", r"\frac12"), (r"\{1,2\}", r"\{2,1\}"), ("(1,2)", r"\left(1,2\right)"),
     ("first 6*7 is 42\n#### 42", "42"), ("7", "The answer is 7."), ("-3", "-3"),
     (r"2\pi", r"\pi+\pi")],
)  # fmt: skip
def test_equal(maths, ask, gold, answer):
    assert value(maths, ask, gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("1/2", "1/3"), ("7", "7 or 8"), ("7", "it is 7 or 8"), ("7", "$7$ or $8$"), ("7", ""),
     ("7", r"\{7, 8\}"), ("7", r"\boxed{7} \boxed{8}"), ("7", "seven"), ("7", r"\frac{"),
     ("(1,2)", "(2,1)"), ("7", "x"), ("x^2", "x^3"), ("7", "7" * 3000), ("3", "x = 4")],
)  # fmt: skip
def test_different_or_hedged(maths, ask, gold, answer):
    assert value(maths, ask, gold, answer) == 0.0


@pytest.mark.parametrize(
    "gold",
    [None, "", "  ", "see the solution", "nonsense", r"\text{Evelyn}", r"\frac{1", "$$", "####"],
)
def test_an_unreadable_gold_masks_the_sample_whatever_was_answered(maths, ask, gold):
    for response in (f"<answer>{gold}</answer>", "<answer>1</answer>", ""):
        (result,) = maths([ask(response, gold)])
        assert not result.valid and result.reason in ("no reference", "unreadable gold")


def test_the_weights_of_the_usual_rule_based_reward(maths, ask):
    """0.5 for the form and 1 for the answer, as in the system this one reimplements."""
    reward = Weighted({"format": Format(), "accuracy": maths}, {"format": 0.5})
    texts = ["<think>a</think><answer>4</answer>", "<think>a</think><answer>5</answer>",
             "so <answer>4</answer> it is", "4", "<think>a</think>"]  # fmt: skip
    scores = evaluate(reward, [ask(text, "4") for text in texts])
    assert scores.values.tolist() == [1.5, 0.5, 1.0, 0.0, 0.0]
    assert scores.valid.all()


def test_answers_in_plain_text(ask):
    reward = Maths(where="text", workers=1, seconds=60.0)
    results = reward([ask(r"So we get $\boxed{\frac{3}{4}}$.", "0.75"), ask("0.75", "3/4")])
    assert [result.value for result in results] == [1.0, 1.0]
    reward.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_tower_of_powers_is_stopped_and_its_worker_replaced(ask):
    reward = Maths(workers=1, seconds=60.0)
    good = ask("<answer>4</answer>", "4")
    assert reward([good])[0].value == 1.0
    worker = reward._pool._idle.get()
    reward._pool._idle.put(worker)
    reward._pool.seconds = 1.0
    begun = time.monotonic()
    (result,) = reward([ask("<answer>$10^{10^{10^{10}}}$</answer>", "4")])
    assert result.valid and result.value == 0.0  # wrong, not masked: hanging must not pay
    if reward._pool.replaced:
        assert result.parts["stopped"] == 1.0 and not is_alive(worker.process.pid)
    assert time.monotonic() - begun < 60
    reward._pool.seconds = 60.0
    assert reward([good])[0].value == 1.0
    reward.close()


def script(folder, body):
    """A worker that answers as `body` says, so that hanging does not depend on a parser."""
    path = folder / "worker.py"
    path.write_text(
        "import json, os, sys, time\n"
        "def say(**what): print(json.dumps(what), flush=True)\n"
        "say(ready=True)\n"
        "for line in sys.stdin:\n"
        "    task = json.loads(line)\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return path


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path):
    path = script(
        tmp_path,
        """
        say(progress="begun")
        if task == "hang": time.sleep(1e4)
        if task == "die": os._exit(1)
        say(result=[task, os.getpid()])
        """,
    )
    pool = Pool(path, workers=1, seconds=30.0)
    (first,) = pool.map(["a"])
    assert pool.map(["b"]) == [["b", first[1]]]  # the same process
    pool.seconds = 1.0
    (hung,) = pool.map(["hang"])
    pool.seconds = 30.0
    assert isinstance(hung, Died) and hung.progress == "begun" and "time-out" in str(hung)
    assert not is_alive(first[1])
    died, after = pool.map(["die", "c"])
    assert isinstance(died, Died) and after[0] == "c" and pool.replaced == 2
    pool.close()
    assert not is_alive(after[1])


def test_a_gold_that_hangs_masks_and_an_answer_that_hangs_is_wrong(tmp_path, ask):
    reward = Maths(workers=1)
    reward._pool = Pool(
        script(
            tmp_path,
            """
            if task["gold"] == "1": say(progress="gold")
            time.sleep(1e4)
            """,
        ),
        workers=1, seconds=0.5,
    )  # fmt: skip
    answer, gold = reward([ask("<answer>3</answer>", "1"), ask("<answer>3</answer>", "2")])
    assert (answer.valid, answer.value, answer.parts) == (True, 0.0, {"stopped": 1.0})
    assert (gold.valid, gold.reason) == (False, "unreadable gold")
    reward.close()


def test_a_worker_that_does_not_start_says_why(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text("import sys; sys.exit(1)")
    with pytest.raises(RewardError, match="worker.py does not start: it died"):
        Worker(path)
    path.write_text('print(\'{"error": "install it"}\')')
    with pytest.raises(RewardError, match="install it"):
        Worker(path)


def test_bad_setups():
    with pytest.raises(ConfigError, match="where='tail'"):
        Maths(where="tail")
    with pytest.raises(ConfigError, match="seconds=0"):
        Maths(seconds=0)
