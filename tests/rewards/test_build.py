"""Rewards from a config: what it can name, and what is said when it cannot."""

import json
import sys

import jax
import pytest

from aa_jax import models
from aa_jax.data import digits
from aa_jax.errors import CheckpointError, ConfigError
from aa_jax.llf.start import llava_config
from aa_jax.models import heads
from aa_jax.rewards.base import close, evaluate
from aa_jax.rewards.build import REWARDS, make_reward
from aa_jax.sharding import make_mesh

GOOD = "<think> sum </think><answer> 4 </answer>"


def values(section, requests, **options):
    return evaluate(make_reward(section, **options), requests).values.tolist()


def test_one_reward_and_a_weighted_sum(ask):
    asked = [ask(GOOD, "4", response_tokens=12), ask("4", "4", response_tokens=3)]
    assert values({"kind": "format", "value": 2.0}, asked) == [2, 0]
    section = {
        "terms": {
            "exact": {"where": "answer"},
            "form": {"kind": "format", "weight": 0.5},
            "length": {"weight": -0.01},
            "watched": {"kind": "exact", "weight": 0},
        },
        "high": 1.3,
    }
    assert values(section, asked) == pytest.approx([1.3, -0.03])
    scores = evaluate(make_reward(section), asked)
    assert scores.parts["unclipped"].tolist() == pytest.approx([1.38, -0.03])
    assert scores.parts["watched"].tolist() == [0, 1]
    assert json.dumps(section)  # a section is plain JSON: it stands in the run directory


def test_every_kind_is_there_and_described():
    assert set(REWARDS) >= {"model", "cost", "http", "maths", "code", "exact", "format", "overlong",
                            "length", "oracle"}  # fmt: skip
    for make in REWARDS.values():
        assert make.__doc__


def test_overlong_and_oracle(ask):
    asked = [ask("a", response_tokens=n) for n in (80, 95, 101)]
    section = {"kind": "overlong", "max_length": 100, "cache": 10}
    assert values(section, asked) == pytest.approx([0, -0.5, -1])
    record = digits.evaluation_prompts(1, 0, "train", max_digits=2)[0]
    perfect = digits.render(digits.perfect_response(record.task))
    graded = values({"kind": "oracle"}, [ask(perfect, record.task), ask("", record.task)])
    assert graded[0] == 3 and graded[1] < 3


@pytest.mark.parametrize("kind", ["model", "cost"])
def test_a_learned_one_and_what_silence_is_worth(ask, tmp_path, kind):
    small = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=1, heads=2,
                 kv_heads=1, mlp_dim=48)  # fmt: skip
    processor = digits.write_processor(tmp_path / "p", max_digits=2, patch=8)
    model = models.build(llava_config(2, **small))
    tree = {"model": model.init(jax.random.key(0)),
            "score_head": heads.init_score_head(model, jax.random.key(1))}  # fmt: skip
    heads.save(tmp_path / "reward", model, tree, extra_files_from=processor)
    judge = make_reward(
        {"kind": kind, "path": str(tmp_path / "reward"), "batch_rows": 8}, mesh=make_mesh()
    )
    got = evaluate(judge, [ask("1 2 3"), ask("the sum is 4"), ask(" ")]).values
    assert got[0] != got[1]
    assert got[2] == (min(got[:2]) if kind == "model" else max(got[:2]))
    with pytest.raises(CheckpointError, match="not a score model"):
        make_reward({"path": str(tmp_path)}, mesh=make_mesh())  # the kind is "model" if unsaid


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shout(requests, times=1):\n"
        "    return [times * r.response.count('!') for r in requests]\n"
        "class Ends:\n"
        "    def __init__(self, with_: str):\n        self.with_ = with_\n"
        "    def __call__(self, requests):\n"
        "        return [r.response.endswith(self.with_) for r in requests]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_functions_of_ones_own_are_imported_only_when_allowed(ask, module):
    section = {"kind": "function", "function": "my_rewards:shout"}
    with pytest.raises(ConfigError, match="Allow it by name.*my_rewards:shout"):
        make_reward(section)
    assert "my_rewards" not in sys.modules
    asked = [ask("no!"), ask("yes!!")]
    assert values(section, asked, allowed=["my_rewards:shout"]) == [1, 2]
    more = section | {"options": {"times": 3}}
    assert values({"terms": {"loud": more}}, asked, allowed=["my_rewards:shout"]) == [3, 6]
    ends = {"kind": "function", "function": "my_rewards:Ends", "options": {"with_": "!!"}}
    assert values(ends, asked, allowed=["my_rewards:Ends"]) == [0, 1]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "math"}, "kind is 'math'; there are model, cost, http, maths"),
        ({"terms": {"good": {}}}, "terms.good.kind is 'good'"),
        ({"terms": {}}, "at least one"),
        ({"terms": {"format": {}}, "path": "x"}, "not path"),
        ({"kind": "overlong", "max_length": 3}, "overlong.*missing.*cache"),
        ({"kind": "exact", "were": "text"}, "no 'were'.*did you mean 'where'"),
        ({"kind": "format", "value": "big"}, "value of Format.*'big'"),
        ({"kind": "function", "function": "nowhere_at_all:f"}, "cannot be imported"),
        ({"kind": "function", "function": "my_rewards:g"}, "my_rewards has no 'g'"),
        ({"kind": "function", "function": "my_rewards:number"}, "is no function"),
        ({"kind": "function", "function": "my_rewards"}, "package.module:name"),
        ({"kind": "function", "function": "my_rewards:shout", "options": {"time": 2}}, "'time'"),
    ],
)
def test_mistakes_are_named(module, section, words):
    named = [section["function"]] if "function" in section else []
    with pytest.raises(ConfigError, match=words):
        make_reward(section, allowed=named)


def test_closing_reaches_every_term(ask):
    ended = []

    class Busy:
        def __call__(self, requests):
            return [1.0 for _ in requests]

        def close(self):
            ended.append(1)

    from aa_jax.rewards.base import Clipped, Weighted

    close(Clipped(Weighted({"a": Busy(), "b": Busy()}), low=0))
    assert ended == [1, 1]
