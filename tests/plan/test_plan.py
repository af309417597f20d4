"""Plans: the step they compile is the one that trains, and what they say of it adds up."""

import json
import math

import jax
import numpy as np
import pytest

from aa_jax import config
from aa_jax.errors import ConfigError
from aa_jax.plan import command, presets, program, sharding_view, tables, targets
from aa_jax.plan.measure import measure

CONFIG = "configs/ti2t/llava_dpo.py"


def tiny(tmp_path, **text):
    """A LLaVA of a few thousand parameters, as a config.json."""
    hf = presets.model_config("llava-1.5-7b")
    hf["image_token_index"] = 5
    hf["text_config"] |= dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    ) | text  # fmt: skip
    hf["vision_config"] |= dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=28,
    )  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(hf))
    return str(file)


def resolved(name=CONFIG, *overrides, model="llava-1.5-7b"):
    cfg = config.load(name, list(overrides))
    return command.resolve(cfg, command.Wishes(model, "cpu:8"))[0]


@pytest.mark.parametrize(
    ("name", "billions"),
    # Parameters as Hugging Face counts them in the published checkpoints.
    [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("qwen2-vl-7b", 8.29),
     ("qwen2-vl-2b", 2.21), ("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("qwen2.5-7b", 7.62)],
)  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, billions):
    from aa_jax import models

    leaves = jax.tree.leaves(models.build(presets.model_config(name)).abstract())
    assert abs(sum(math.prod(x.shape) for x in leaves) / 1e9 - billions) < 0.006


def test_a_model_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="llava-1.5-7b.*Give a name"):
        presets.model_config("lava")
    with pytest.raises(ConfigError, match="no model was named"):
        command.resolve(config.load(CONFIG, []), command.Wishes(None, "cpu:8"))


@pytest.mark.parametrize("name", ["v5p", "h300:8", "v5p:4x4x4x4", "cpu:"])
def test_a_topology_that_is_none_lists_those_there_are(name):
    with pytest.raises(ConfigError, match="write <chip>:<size>.*v5e.*h200"):
        targets.open_slice(name)


def test_more_devices_than_started_with_say_how_to_start():
    with pytest.raises(ConfigError, match="device_count=4096"):
        targets.open_slice("cpu:4096")


def test_memory_of_a_small_step_adds_up(tmp_path):
    cfg = resolved(CONFIG, "--config.train.batch_rows=16")
    place = targets.open_slice("cpu:8")
    with place.tracing():
        made = program.build(cfg, tiny(tmp_path), place.devices, layout=program.Layout(64, 16))
        found = measure(made, place, "full")
    # Weights in bfloat16 on 8 devices; the optimizer holds master, first and second moment.
    weights = jax.tree.leaves(made.state["params"])
    divided = sum(x.size for x in weights if "fsdp" in x.sharding.spec) * 2 / 8
    whole = sum(x.size for x in weights if "fsdp" not in x.sharding.spec) * 2
    assert found.memory["parameters"] == divided + whole
    trained = sum(x.size for x in jax.tree.leaves(made.trainable()))
    bare = sum(x.size for x in jax.tree.leaves(made.state["opt_state"]))
    assert trained * 3 == pytest.approx(bare, abs=8)
    assert 0 < found.memory["batch"] < 200_000  # what the compiler's arguments hold beside them
    assert found.total == sum(found.memory.values()) and found.fits is None
    assert found.traffic["all-gather"].bytes > 0
    text = tables.describe(found)
    assert "parameters" in text and "all-gather" in text
    assert tables.markdown([{"what": "tiny", "figures": found.as_dict()}]).count("\n") == 3


def test_four_roles_of_ppo_are_counted(tmp_path):
    cfg = resolved("configs/ti2t/llava_ppo.py")
    place = targets.open_slice("cpu:8")
    made = program.build(cfg, tiny(tmp_path), place.devices, layout=program.Layout(64, 16))
    assert set(made.state["params"]) == {"policy", "critic"}
    assert set(made.resident) == {"reward model", "initial parameters"}
    policy = made.state["params"]["policy"]
    reference = made.resident["initial parameters"]
    assert jax.tree.structure(reference["language_model"]) == jax.tree.structure(
        policy["language_model"]
    )
    # The frozen tower is shared, so it is not counted twice.
    assert "vision_tower" not in reference
    with place.tracing():
        made.step.trace(made.state, made.batch)


def test_where_arrays_lie_is_a_table_and_a_page(tmp_path):
    cfg = resolved() | {"mesh": {"fsdp": 4, "tensor": 2}}
    made = program.build(cfg, tiny(tmp_path), jax.devices(), layout=program.Layout(64, 16))
    found = sharding_view.rows(made)
    text = sharding_view.text(found, made.mesh)
    line = next(x for x in text.splitlines() if "params/language_model/layers/mlp/gate" in x)
    assert "[2, 32/fsdp, 64/tensor]" in line
    assert "opt_state" in text and "8 devices: data=1, fsdp=4, tensor=2" in text
    sharding_view.write_html(tmp_path, found, made.mesh, "a run")
    page = (tmp_path / "sharding.html").read_text()
    assert "64 / tensor" in page and page.count("<tr>") == page.count("</tr>") == len(found)
    assert "http" not in page  # self-contained


def test_every_array_is_in_the_table(tmp_path):
    made = program.build(resolved(), tiny(tmp_path), jax.devices(), layout=program.Layout(64, 16))
    found = sharding_view.rows(made)
    leaves = jax.tree.leaves((made.state["params"], made.state["opt_state"], made.resident))
    assert len(found) == len(leaves)
    assert all(np.prod(r.shard) * 8 >= np.prod(r.shape) for r in found)


def test_the_search_takes_what_fits_and_recomputes_least(tmp_path, monkeypatch):
    """The compiler's figures are stood in for: only what is chosen from them is looked at."""
    import dataclasses

    from aa_jax.plan import search

    cost = {"none": 3.0, "dots": 4.0, "full": 5.0}
    needs = {("none", 1): 9, ("dots", 1): 5, ("dots", 2): 9, ("full", 1): 1, ("full", 2): 2}
    place = targets.open_slice("cpu:8")
    cfg = resolved(CONFIG, "--config.train.batch_rows=32")
    real = program.build(cfg, tiny(tmp_path), place.devices, layout=program.Layout(64, 16))
    monkeypatch.setattr(search, "build", lambda *a, **k: k)

    def measured(made, place, remat):
        rows = 32 / 8 / made["accumulation"]
        total = needs.get((remat, int(rows)), 3)
        return search.Figures(
            place.name, "", 8, {}, rows, made["accumulation"], remat, 1, {}, total, 6.0,
            total <= 6, cost[remat], 1.0, {}, 0.0,
        )  # fmt: skip

    monkeypatch.setattr(search, "measure", measured)
    best, tried = search.search(cfg, "tiny", place)
    assert (best.remat, best.rows) == ("dots", 1)
    assert [(f.remat, f.rows) for f in tried] == [
        ("none", 1), ("dots", 1), ("dots", 2), ("full", 1), ("full", 2), ("full", 4),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="12 rows cannot be divided over 8 devices"):
        search.search(cfg, "tiny", place, total_rows=12)
    assert real.step.accumulation == 1 and dataclasses.is_dataclass(best)


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth(tmp_path):
    """32 layers against 4 at 7B's widths; CPU time, so that neighbours do not matter."""
    import time

    def seconds(layers):
        place = targets.open_slice("cpu:8")
        start = time.process_time()
        with place.tracing():
            made = program.build(
                resolved(), "llava-1.5-7b", place.devices, rows=8,
                layout=program.Layout(512, 64), layers=layers,
            )  # fmt: skip
            measure(made, place)
        return time.process_time() - start

    seconds(4)  # imports and first-time costs
    assert seconds(32) <= 1.3 * seconds(4)
