"""The shipped PPO and GRPO configs of every family, on tiny checkpoints and a rule for a reward."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from aa_jax import config, models, rl
from aa_jax.data import arithmetic
from aa_jax.training.metrics import read_metrics, series

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder, architecture):
    """(checkpoint of an architecture that reads arithmetic, prompts, their columns)."""
    arithmetic.write_processor(folder / "processor")
    model = models.build(architecture)
    params = jax.jit(model.init)(jax.random.key(0))
    models.save(folder / "model", model, params, extra_files_from=folder / "processor")
    rows = [{"q": p.question, "gold": p.answer} for p in arithmetic.problems(12, 0, "train")]
    return folder / "model", rows, {"prompt": "q", "reference": "gold"}


def llama(folder):
    return written(folder, arithmetic.model_config(dim=16, layers=1, heads=2, mlp_dim=24))


def qwen2_vl(folder):
    world, vl = load(TESTS / "models/world.py"), load(TESTS / "models/vl_world.py")
    return written(folder, vl.config(world, "qwen2_vl", text=dict(max_position_embeddings=256)))


def chameleon(folder):
    world, tests = load(TESTS / "models/world.py"), load(TESTS / "models/test_chameleon.py")
    return written(folder, tests.chameleon_config(world, max_position_embeddings=256))


def qwen2_audio(folder):
    tests = load(TESTS / "test_audio_recipes.py")

    class Folders:
        def mktemp(self, name):
            (folder / name).mkdir()
            return folder / name

    path, rows = tests.folder.__wrapped__(Folders()), []
    for n, example in enumerate(tests.examples(()) * 3):
        (folder / f"{n}.wav").write_bytes(example.media[0].data)
        rows.append({"q": "what digit is it", "gold": "three", "sound": f"{n}.wav"})
    return path, rows, {"prompt": "q", "reference": "gold", "audio": "sound"}


CASES = [
    ("t2t/llama_ppo", llama), ("t2t/llama_grpo", llama), ("t2t/llama_ppo_lagrangian", llama),
    ("tv2t/qwen2_vl_ppo", qwen2_vl), ("tv2t/qwen2_vl_grpo", qwen2_vl),
    ("ta2t/qwen2_audio_ppo", qwen2_audio), ("ta2t/qwen2_audio_grpo", qwen2_audio),
    ("ti2t/chameleon_ppo", chameleon), ("ti2t/chameleon_grpo", chameleon),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), CASES, ids=[name for name, _ in CASES])
def test_a_family_trains_on_its_own_rollouts(name, make, tmp_path):
    path, rows, columns = make(tmp_path)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Replaced below, but a config with a required value left open cannot be changed.
    open_ = ["prompts", "reward", *(["cost"] if "lagrangian" in name else [])]
    cfg = config.load(
        ROOT / f"configs/{name}.py",
        [*(f"--config.{section}.path=x" for section in open_),
         f"--config.model.path={path}", "--config.model.dtype=float32",
         "--config.model.param_dtype=float32", "--config.mesh.fsdp=2", "--config.mesh.data=-1",
         "--config.optim.lr=1e-2", "--config.optim.warmup_ratio=0.0",
         "--config.rollout.prompts=8", "--config.rollout.iterations=2",
         "--config.sampling.max_new_tokens=6", "--config.sampling.batch_rows=8"],
    )  # fmt: skip
    with cfg.unlocked():
        del cfg.prompts, cfg.reward
        cfg.prompts = {"path": str(data), "columns": columns}
        cfg.reference = columns["reference"]
        cfg.reward = {"terms": {"length": {"weight": 0.1}, "exact": {"where": "text"}}}
        cfg.rollout.samples = 2
        cfg.accumulation = 1
        if "cost" in cfg:
            del cfg.cost
            cfg.cost = {"terms": {"price": {"kind": "length", "weight": 0.1}}}
    run, settings = rl.select(cfg)
    figures = config.bind(run, settings, path="config", workdir=tmp_path / "run")()
    assert figures["updates"] == 2 and figures["prompts"] == 12
    lines = read_metrics(tmp_path / "run", stage="rl.rollout")
    assert max(series(lines, "sampler_gap")[1]) < 1e-4
    assert all(line["reward/valid"] == 16 for line in lines)
    assert {"reward/part/length", "reward/part/exact", "alarm/length"} <= lines[0].keys()
    trees = (jax.tree.leaves(models.load(p)[1]) for p in (path, tmp_path / "run/model"))
    pairs = zip(*trees, strict=True)
    moved = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
    assert max(moved) > 1e-3 and min(moved) >= 0
