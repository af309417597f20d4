"""What `launch/rl.py` does with a checkpoint, a reward model and a dataset on disk."""

from pathlib import Path

import numpy as np
import pytest

from aa_jax import config, models, rl, runs
from aa_jax.errors import CheckpointError, ConfigError
from aa_jax.training.metrics import read_metrics, series

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reward_model(checkpoint, preferences, tmp_path_factory):
    """As `launch/train.py` writes one with the recipe "reward"."""
    folder = tmp_path_factory.mktemp("reward")
    runs.run(
        folder, recipe="reward", model={"path": str(checkpoint)},
        data={"path": str(preferences), "template": "AA_TI2T"}, optim={"lr": 1e-3},
        train={"batch_rows": 16, "epochs": 1},
    )  # fmt: skip
    return folder / "model"


def start(name, checkpoint, preferences, reward_model, workdir, *overrides):
    """The shipped config with a user's paths, and sizes for a test."""
    cfg = config.load(
        ROOT / f"configs/ti2t/{name}.py",
        [
            f"--config.model.path={checkpoint}", f"--config.prompts.path={preferences}",
            f"--config.reward.path={reward_model}", "--config.reward.dtype=float32",
            "--config.model.dtype=float32", "--config.model.param_dtype=float32",
            "--config.mesh.fsdp=2", "--config.mesh.data=-1", "--config.optim.lr=1e-3",
            "--config.rollout.prompts=8", "--config.rollout.iterations=2",
            "--config.sampling.max_new_tokens=8", "--config.sampling.batch_rows=8",
            "--config.reward.batch_rows=8", *overrides,
        ],
    )  # fmt: skip
    run, settings = rl.select(cfg)
    return config.bind(run, settings, path="config", workdir=workdir)


@pytest.mark.parametrize("name", ["llava_ppo", "llava_grpo"])
def test_from_a_checkpoint_a_reward_model_and_a_dataset(
    name, checkpoint, preferences, reward_model, tmp_path
):
    extra = ["--config.rollout.samples=2"] if name == "llava_grpo" else [
        f"--config.critic.path={reward_model}"
    ]  # fmt: skip
    figures = start(name, checkpoint, preferences, reward_model, tmp_path, *extra)()
    assert figures["updates"] == 2 and figures["prompts"] == 40
    lines = read_metrics(tmp_path, stage="rl.rollout")
    assert len(lines) == 2 and max(series(lines, "sampler_gap")[1]) < 1e-4
    assert all(line["reward/valid"] == line["reward/requests"] for line in lines)
    model, params = models.load(tmp_path / "model")
    initial = models.load(checkpoint)[1]
    moved = np.abs(np.asarray(params["projector"]["linear_1"]["kernel"])
                   - np.asarray(initial["projector"]["linear_1"]["kernel"]))  # fmt: skip
    assert moved.max() > 0
    assert "sampler_gap per iteration" in (tmp_path / "report.html").read_text()


def test_mistakes(checkpoint, preferences, reward_model, tmp_path):
    with pytest.raises(CheckpointError, match="not a score model"):
        start("llava_grpo", checkpoint, preferences, checkpoint, tmp_path)()
    with pytest.raises(ConfigError, match="grpo has no critic"):
        start("llava_grpo", checkpoint, preferences, reward_model, tmp_path)(
            critic={"lr_scale": 2.0}
        )
    with pytest.raises(ConfigError, match="rollout.prompts = 8.*= 3"):
        start("llava_ppo", checkpoint, preferences, reward_model, tmp_path,
              "--config.rollout.minibatches=3")()  # fmt: skip
