"""LLaVA-NeXT from a config: pairs with images of different sizes, DPO with shared prefixes."""

import importlib.util
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aa_jax import models, runs
from aa_jax.data import digits
from aa_jax.llf.start import llava_config
from aa_jax.training.metrics import read_metrics, series

SPEC = importlib.util.spec_from_file_location(
    "launch_runs", Path(__file__).with_name("test_runs.py")
)
RUNS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(RUNS)

POINTS = [[24, 48], [48, 24], [48, 48]]
TINY = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=2, heads=2, kv_heads=1,
            mlp_dim=48)  # fmt: skip


@pytest.mark.slow
def test_dpo_on_images_of_different_sizes(tmp_path):
    processor = digits.write_processor(tmp_path / "processor", max_digits=3, patch=8)
    changes = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": POINTS,
            "crop_size": {"height": 24, "width": 24},
            "do_center_crop": True,
        },
        "processor_config.json": {"processor_class": "LlavaNextProcessor"},
    }
    for name, values in changes.items():
        file = processor / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    config = llava_config(3, **TINY) | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": POINTS,
    }
    model = models.build(config)
    folder = tmp_path / "model"
    models.save(folder, model, model.init(jax.random.key(0)), extra_files_from=processor)
    rows = list(digits.preference_rows(12, 0, "train", annotator=digits.calibrated()))
    for number, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        stream = io.BytesIO()
        image.resize([(24, 24), (70, 20), (30, 90)][number % 3]).save(stream, "PNG")
        row["image"]["bytes"] = stream.getvalue()
    data = digits.write_parquet(rows, tmp_path / "rows.parquet")
    losses = {}
    for name, extra in {"shared": {}, "rows": {"share_prefix": False, "accumulation": 1}}.items():
        cfg = RUNS.settings("dpo", folder, data)
        cfg["train"] |= {"steps": 2, "epochs": None, "batch_rows": 8, **extra}
        runs.run(tmp_path / name, **cfg)
        losses[name] = series(read_metrics(tmp_path / name, stage="train"), "loss")[1]
    assert losses["shared"][0] == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(losses["shared"], losses["rows"], rtol=1e-5)
    trained, initial = (models.load(p)[1] for p in (tmp_path / "shared/model", folder))
    assert not np.array_equal(trained["image_newline"], initial["image_newline"])
