"""A small real checkpoint and a parquet file in the real schema, as a user would have them."""

import jax
import pytest

from aa_jax import models
from aa_jax.data import digits
from aa_jax.llf.start import llava_config

TINY = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=2, heads=2, kv_heads=1,
            mlp_dim=48)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A LLaVA checkpoint folder with processor, random weights."""
    folder = tmp_path_factory.mktemp("ckpt")
    processor = digits.write_processor(folder / "processor", max_digits=3, patch=8)
    model = models.build(llava_config(3, **TINY))
    models.save(folder / "llava", model, model.init(jax.random.key(0)), extra_files_from=processor)
    return folder / "llava"


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """40 annotated pairs with the columns of align-anything, text-image-to-text."""
    path = tmp_path_factory.mktemp("data") / "preferences.parquet"
    rows = digits.preference_rows(40, 0, "train", annotator=digits.calibrated())
    return digits.write_parquet(rows, path)
