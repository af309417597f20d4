"""A tiny LLaVA with random weights, and prompts of the digits world."""

import jax
import pytest

from aa_jax import models
from aa_jax.data import digits
from aa_jax.data.processor import Processor
from aa_jax.llf.prompts import Lazy
from aa_jax.llf.start import llava_config
from aa_jax.rewards.base import Result

TINY = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=2, heads=2, kv_heads=1,
            mlp_dim=48)  # fmt: skip


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """(model, params, processor, prompts)."""
    folder = digits.write_processor(tmp_path_factory.mktemp("rl") / "p", max_digits=2, patch=8)
    model = models.build(llava_config(2, **TINY))
    params = model.init(jax.random.key(0))
    # Random weights predict almost uniformly; a wider head makes the choice of token matter.
    params["language_model"]["head"]["weight"] *= 8.0
    records = digits.evaluation_prompts(12, 0, "train", max_digits=2)
    prompts = Lazy(12, lambda i: records[i].to_data_example(()).replace(meta={"index": i}))
    return model, params, Processor.from_pretrained(folder), prompts


@pytest.fixture
def count_ones():
    """Pays for every word "1"; without an answer there is nothing to judge."""

    def reward(requests):
        return [
            Result(
                float(request.response.split().count("1")),
                parts={"characters": float(len(request.response))},
            )
            if request.response.strip()
            else None
            for request in requests
        ]

    return reward
