"""Signs of a reward that is exploited, from figures made for the purpose."""

import pytest

from aa_jax.errors import ConfigError
from aa_jax.rl.alarms import Alarms


def line(reward=0.0, truth=0.0, length=10.0, kl=1.0):
    return {"response_length": length, "kl": kl, "reward/mean": reward, "reward/std": 1.0,
            "reward/part/oracle": truth, "reward/std/oracle": 2.0}  # fmt: skip


def test_each_alarm_and_its_end(caplog):
    alarms = Alarms(length=1.5, kl=5.0, truth="oracle", margin=0.5, start=2)
    calm = {"alarm/length": 0, "alarm/kl": 0, "alarm/truth": 0}
    assert alarms.check(0, line()) == calm and alarms.check(1, line()) == calm
    assert alarms.check(2, line(length=16))["alarm/length"] == 1
    assert alarms.check(3, line(length=6))["alarm/length"] == 1
    assert alarms.check(4, line(kl=5.5))["alarm/kl"] == 1
    # The truth falls by 0.6 of its deviation while the reward rises: overoptimised.
    assert alarms.check(5, line(reward=1, truth=-1.2))["alarm/truth"] == 1
    assert alarms.check(6, line(reward=1, truth=-0.8)) == calm
    assert alarms.check(7, line(reward=0.2, truth=-5)) == calm
    said = [r.getMessage() for r in caplog.records]
    assert [s.split(":")[0] for s in said] == [
        "iteration 2, alarm length", "iteration 4, alarm kl", "iteration 5, alarm truth"
    ]  # fmt: skip


def test_a_saved_state_goes_on():
    first, second = Alarms(start=2), Alarms(start=2)
    first.check(0, line())
    first.check(1, line(length=30))
    second.set_state(first.get_state())
    assert second.check(2, line(length=30)) == first.check(2, line(length=30))
    assert second.check(3, line(length=41))["alarm/length"] == 1


def test_what_is_not_known_raises_no_alarm():
    alarms = Alarms(truth="oracle", start=1)
    figures = {"response_length": 3.0}
    assert alarms.check(0, figures) == {"alarm/length": 0}
    with pytest.raises(ConfigError, match="length=1"):
        Alarms(length=1)
