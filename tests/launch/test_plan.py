"""The step a plan compiles is, to the last instruction, the one that training runs."""

from pathlib import Path

import jax
import pytest

from aa_jax import config, recipes, runs
from aa_jax.plan import program
from aa_jax.training.state import as_abstract

ROOT = Path(__file__).parents[2]


def settings(recipe, checkpoint, data):
    cfg = config.load(
        ROOT / f"configs/ti2t/llava_{recipe}.py",
        [
            f"--config.model.path={checkpoint}", f"--config.data.path={data}",
            "--config.mesh.fsdp=1", "--config.mesh.data=-1", "--config.train.batch_rows=16",
        ],
    )  # fmt: skip
    return config.resolve(cfg)


class Seen(Exception):
    pass


@pytest.mark.parametrize("recipe", ["dpo", "reward", "sft"])
def test_the_planned_step_is_the_one_that_trains(
    recipe, checkpoint, preferences, tmp_path, monkeypatch
):
    seen = {}

    def fit(*, step, state, batches, **_):
        batch = next(batches)
        seen["text"] = step.lower(as_abstract(state), batch).as_text()
        seen["batch"] = jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch)
        raise Seen

    monkeypatch.setattr(recipes, "fit", fit)
    cfg = settings(recipe, checkpoint, preferences)
    # The schedule's length is a constant of the program.
    cfg["train"] |= {"steps": program._STEPS, "accumulation": 2}
    with pytest.raises(Seen):
        runs.run(tmp_path, **cfg)
    length = seen["batch"]["tokens"][0][1]
    response = seen["batch"]["targets"][0][2]
    made = program.build(
        cfg, str(checkpoint), jax.devices(), layout=program.Layout(length, response)
    )
    planned = jax.tree.map(lambda x: (x.shape, str(x.dtype)), made.batch)
    assert planned == seen["batch"]
    assert made.step.lower(made.state, made.batch).as_text() == seen["text"]
