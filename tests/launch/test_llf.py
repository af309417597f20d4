"""What `launch/llf.py` does with a checkpoint folder and parquet in the real schema."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aa_jax import config, llf, models, runs
from aa_jax.data.example import Example, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.sources import open_source
from aa_jax.data.templates import TEMPLATES
from aa_jax.data.tokens import encode_example
from aa_jax.errors import ConfigError, DataError
from aa_jax.llf import dataset_run
from aa_jax.llf.pairs import write_pairs
from aa_jax.llf.prompts import critique_prompts, refine_prompts

ROOT = Path(__file__).parents[2]


def start(checkpoint, data, workdir, *overrides):
    """The shipped config with a user's two paths, and sizes for a test."""
    cfg = config.load(
        ROOT / "configs/ti2t/llava_llf.py",
        [
            f"--config.model.path={checkpoint}", f"--config.data.path={data}",
            "--config.model.dtype=float32", "--config.model.param_dtype=float32",
            "--config.mesh.fsdp=2", "--config.mesh.data=-1",
            "--config.lengths.answer=12", "--config.lengths.feedback=12",
            "--config.sampling.batch_rows=12",
            "--config.feedback.batch_rows=8", "--config.feedback.epochs=1",
            "--config.feedback.optim.lr=1e-3",
            "--config.dpo.batch_rows=8", "--config.dpo.epochs=1", "--config.dpo.lrs=(1e-3,)",
            *overrides,
        ],
    )  # fmt: skip
    run, settings = llf.select(cfg)
    return config.bind(run, settings, path="config", workdir=workdir)


@pytest.fixture
def finished_answers(monkeypatch):
    """An untrained model seldom ends an answer in time; without this no pair would be kept."""
    from aa_jax.llf import lab

    real = lab.respond

    def respond(*args, **kwargs):
        return [{**line, "finished": True, "text": line["text"] or "1"} for line in
                real(*args, **kwargs)]  # fmt: skip

    monkeypatch.setattr(lab, "respond", respond)


def test_from_a_checkpoint_and_a_dataset(checkpoint, preferences, tmp_path, finished_answers):
    go = start(checkpoint, preferences, tmp_path, "--config.baseline=True",
               "--config.prompts.size=24", "--config.pairs=16")  # fmt: skip
    held_out = {"size": 10}
    found = go(eval_data=held_out)
    assert list(found) == ["feedback", "improve", "dpo", "report"]
    counts = found["improve"]
    assert counts["kept"] + counts["identical"] + counts["empty"] + counts["cut"] == 24
    assert counts["used"] == found["dpo"]["pairs"] == min(16, counts["kept"])
    assert {cell["arm"] for cell in found["dpo"]["cells"]} == {"llf", "binary"}
    assert all(0 <= cell["accuracy"] <= 1 for cell in found["dpo"]["cells"])

    # The pairs hold the dataset's own images, byte for byte, and y* as the preferred one.
    rows, pairs = (
        open_source(str(preferences)),
        open_source(str(tmp_path / "improve/pairs.parquet")),
    )
    answers, refined = (
        [json.loads(line) for line in (tmp_path / f"improve/{name}.jsonl").read_text().splitlines()]
        for name in ("response", "refine")
    )
    for pair in (pairs[i] for i in range(len(pairs))):
        assert pair["image"]["bytes"] == rows[pair["index"]]["image"]["bytes"]
        assert pair["prompt"] == rows[pair["index"]]["question"]
        example = TEMPLATES["AA_TI2T_LLF"].preference(pair)
        chosen, rejected = (response.text for response in example.responses)
        assert chosen == " ".join((refined[pair["index"]]["text"] or "1").split())
        assert rejected == " ".join((answers[pair["index"]]["text"] or "1").split())

    model, params = models.load(tmp_path / "model")
    initial = models.load(checkpoint)[1]
    assert not np.array_equal(
        params["language_model"]["norm"]["scale"], initial["language_model"]["norm"]["scale"]
    )
    page = (tmp_path / "report.html").read_text()
    assert "data:image/" in page and "Accuracy on held-out preferences" in page

    before = (tmp_path / "model/model.safetensors").read_bytes()
    assert go(eval_data=held_out) == found
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


def test_several_learning_rates_need_something_to_choose_by(checkpoint, preferences, tmp_path):
    with pytest.raises(ConfigError, match="2 learning rates.*eval_data"):
        start(checkpoint, preferences, tmp_path, "--config.dpo.lrs=(1e-3,1e-4)")()


def test_lengths_that_exceed_the_context_are_refused_before_training(
    checkpoint, preferences, tmp_path
):
    go = start(checkpoint, preferences, tmp_path, "--config.lengths.feedback=4000")
    with pytest.raises(ConfigError, match="refinement of the longest.*context of.*lengths.answer"):
        go()
    assert not (tmp_path / "feedback/model").exists()
    with pytest.raises(ConfigError, match="lengths has answr; there are"):
        start(checkpoint, preferences, tmp_path)(lengths={"answr": 3})


def test_measured_lengths_hold_the_longest_answer_and_critique(checkpoint, preferences):
    processor = Processor.from_pretrained(checkpoint)
    prompts = runs.load_dataset("prompt", processor, path=str(preferences), template="AA_TI2T")
    lengths = dataset_run.measure_lengths(prompts, processor, None, answer=40, feedback=60)
    shown = dataset_run.decoded(prompts)
    words = processor.decode(list(encode_example(shown[0], processor).prompt[-1:])) or "1"
    y = [{"text": " ".join([words] * 40)}] * len(shown)
    c = [{"text": " ".join([words] * 60)}] * len(shown)
    for made, most in (
        (shown, lengths.answer_prompt),
        (critique_prompts(shown, y), lengths.critique_prompt),
        (refine_prompts(shown, y, c), lengths.refine_prompt),
    ):
        longest = max(len(encode_example(made[i], processor).prompt) for i in range(len(shown)))
        assert longest <= most


@pytest.mark.parametrize(
    "prompt",
    [
        Example((message("system", "Be brief."), message("user", "How many?"))),
        Example((message("user", "a"), message("assistant", "b"), message("user", "c"))),
        Example(
            (message("user", "?", (Part("image", index=0), Part("image", index=1))),),
            media=(Image.new("RGB", (4, 4)),) * 2,
        ),
    ],
)
def test_a_prompt_the_pair_columns_cannot_hold_is_refused(prompt, tmp_path):
    pair = {"index": 0, "response": "two", "refinement": "three"}
    with pytest.raises(DataError, match="one user turn with at most one image"):
        write_pairs(tmp_path / "pairs.parquet", [pair], [prompt])
    assert not list(tmp_path.iterdir())
