"""Digit images: the split, the strip; and the random-access sets made of them."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from aa_jax.data import digits, llf_prompts
from aa_jax.data.digits import images, oracle, prompts
from aa_jax.data.digits.tasks import Task
from aa_jax.data.example import Part
from aa_jax.errors import ConfigError, DataError

DATA = images.load_digits()


def test_images_are_scikit_learns():
    bunch = sklearn_digits()
    assert DATA.pixels.shape == (1797, 8, 8)
    assert (DATA.labels == bunch.target).all()
    # 16 is the brightest of the original grey levels, 255 here; 8 of 16 is 127.5, even-rounded.
    assert (DATA.pixels[bunch.images == 16] == 255).all()
    assert (DATA.pixels[bunch.images == 8] == 128).all()
    assert (DATA.pixels[bunch.images == 0] == 0).all()


def test_split_is_disjoint_complete_and_stratified():
    parts = [DATA.split(name) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1200, 200, 397]
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together) == 1797
    for part in parts:
        share = np.bincount(DATA.labels[part], minlength=10)
        expected = np.bincount(DATA.labels) * len(part) / 1797
        assert (np.abs(share - expected) <= 1.01).all()


def test_split_is_fixed_by_its_seed():
    again = images.split_by_label(DATA.labels, images.SPLITS, 0)
    assert all((again[name] == DATA.splits[name]).all() for name in again)
    other = images.split_by_label(DATA.labels, images.SPLITS, 1)
    assert set(other["test"]) != set(DATA.splits["test"])
    with pytest.raises(DataError, match="add up"):
        images.split_by_label(DATA.labels, {"train": 5}, 0)
    with pytest.raises(DataError, match="train, validation, test"):
        DATA.split("dev")


def test_no_test_image_in_training_examples():
    seen = {s for e in digits.sft_examples(2000, 0) for s in e.scene.sources}
    for split in ("validation", "test"):
        held = {s for e in digits.evaluation_prompts(800, 0, split) for s in e.scene.sources}
        assert held <= set(DATA.split(split).tolist())
        assert not held & seen
    assert seen <= set(DATA.split("train").tolist())


def test_shift_moves_by_one_pixel():
    image = np.zeros((8, 8), np.uint8)
    image[3, 4] = 200
    image[0, 0] = 100
    for index, (down, right) in enumerate(images.SHIFTS):
        moved = images.shift_image(image, index)
        assert moved[3 + down, 4 + right] == 200
        assert (moved == 100).sum() == (down >= 0 and right >= 0)
    assert images.SHIFTS[0] == (0, 0)
    assert len(set(images.SHIFTS)) == 9


@pytest.mark.parametrize(("max_digits", "row"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_strip_puts_one_digit_on_one_cell(max_digits, row):
    sources = list(range(max_digits))
    strip = images.render_strip(DATA, sources, max_digits)
    assert strip.mode == "RGB"
    assert strip.size == (8 * max_digits, 8 * max_digits)
    pixels = np.asarray(strip)
    cells = pixels[..., 0].reshape(max_digits, 8, max_digits, 8).swapaxes(1, 2)
    for column, source in enumerate(sources):
        assert (cells[row, column] == DATA.pixels[source]).all()
    assert not np.delete(cells, row, axis=0).any()
    assert (pixels == pixels[..., :1]).all()


def test_strip_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="1 to 3 digits, got 4"):
        images.render_strip(DATA, [0, 1, 2, 3], 3)
    with pytest.raises(DataError, match="1 to 3 digits, got 0"):
        images.render_strip(DATA, [], 3)
    with pytest.raises(DataError, match="max_digits is 1 to 5, got 6"):
        images.render_strip(DATA, [0], 6)


def test_png_is_lossless():
    strip = images.render_strip(DATA, [4, 7], 3)
    back = Image.open(io.BytesIO(images.png_bytes(strip)))
    assert (np.asarray(back) == np.asarray(strip)).all()


def test_examples_depend_on_seed_and_index_only():
    examples = digits.sft_examples(50, 7)
    assert [e for e in examples] == [digits.sft_examples(1000, 7)[i] for i in range(50)]
    assert examples[-1] == examples[49]
    assert examples[3] != digits.sft_examples(50, 8)[3]
    prompts_a, prompts_b = (digits.evaluation_prompts(20, 7, s) for s in ("train", "test"))
    assert [p.task for p in prompts_a] != [p.task for p in prompts_b]
    with pytest.raises(IndexError):
        examples[50]


def test_labels_are_those_of_the_images():
    for example in digits.sft_examples(100, 2):
        labels = tuple(DATA.labels[list(example.scene.sources)])
        assert example.task.digits == labels
        assert example.image.size == (24, 24)
    assert any(any(e.scene.shifts) for e in digits.sft_examples(20, 2))
    assert not any(any(e.scene.shifts) for e in digits.evaluation_prompts(50, 2, "test"))


def test_mix_and_kinds():
    examples = list(digits.sft_examples(3000, 3))
    shares = {k: sum(e.kind == k for e in examples) / 3000 for k in digits.MIX}
    assert abs(shares["answer"] - 0.65) < 0.035
    assert abs(shares["revise"] - 0.30) < 0.034
    assert abs(shares["feedback"] - 0.05) < 0.016
    by_kind = {e.kind: e for e in examples}
    assert [r for r, _ in by_kind["revise"].conversation] == ["user", "assistant", "user"]
    assert by_kind["feedback"].target.startswith("##Critique: ")
    assert "##Response:" in by_kind["feedback"].conversation[0][1]
    with pytest.raises(ConfigError, match="add up to 1"):
        digits.sft_examples(1, 0, mix={"answer": 0.5})
    with pytest.raises(ConfigError, match="answer, revise, feedback"):
        digits.sft_examples(1, 0, mix={"essay": 1.0})


def test_meta_is_enough_to_grade():
    for example in digits.evaluation_prompts(40, 5, "validation"):
        meta = json.loads(json.dumps(example.meta))
        assert Task.from_dict(meta["task"]) == example.task
        assert digits.Scene.from_dict(meta["scene"]) == example.scene
        assert oracle.overall(example.task, example.target) == 3.0


def test_advice_matters_in_revision_demonstrations():
    """Literal revisions win over the answer under true advice and lose under random advice."""
    wins = {}
    for true in (1.0, 0.0):
        examples = digits.sft_examples(600, 4, mix={"revise": 1.0}, true_refinements=true)
        prefers = [oracle.prefer(e.task, e.target, e.conversation[1][1]) for e in examples]
        wins[true] = np.mean([{1: 1.0, 0: 0.5, 2: 0.0}[p] for p in prefers])
    assert wins[1.0] > 0.75
    assert wins[0.0] < 0.5


def test_prompt_texts():
    question = "give the sum in short form ."
    assert prompts.answer(question) == [("user", f"<image>\n{question}")]
    assert prompts.critique(question, "1 1") == [
        ("user", f"<image>\n{question} ##Response: 1 1 critique this answer .")
    ]
    assert prompts.refine(question, "1 1", "fix the sum") == [
        ("user", f"<image>\n{question}"),
        ("assistant", "1 1"),
        ("user", "##Refinement: fix the sum . revise the answer ."),
    ]
    parts = prompts.messages(prompts.answer(question), "1 2")
    assert parts == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1 2"}]},
    ]


def test_conversion_to_the_common_example():
    revise = next(e for e in digits.sft_examples(50, 0) if e.kind == "revise")
    common = revise.to_data_example()
    assert [m.role for m in common.messages] == ["user", "assistant", "user"]
    assert common.messages[0].text == revise.task.question
    assert [part.type for part in common.messages[0].content] == ["image", "text"]
    assert [m.text for m in common.responses] == [revise.target]
    assert len(common.media) == 1
    prompt = digits.evaluation_prompts(1, 0, "test")[0]
    assert prompt.to_data_example().responses == ()
    assert [m.text for m in prompt.to_data_example(("a", "b")).responses] == ["a", "b"]


def test_wording_gives_the_same_prompts_through_the_common_functions():
    """llf_prompts with this world's wording and prompts.py write the same turns."""
    question, answer, advice = "give the sum in short form .", "1 2", "fix the sum"
    image = (Part("image", index=0),)
    for ours, theirs in (
        (prompts.answer(question), llf_prompts.answer(question, image, prompts.WORDING)),
        (
            prompts.critique(question, answer),
            llf_prompts.critique(question, answer, image, prompts.WORDING),
        ),
        (
            prompts.refine(question, answer, advice),
            llf_prompts.refine(question, answer, advice, image, prompts.WORDING),
        ),
    ):
        assert [(role, prompts.split_media(text)) for role, text in ours] == [
            (turn.role, ([part.type for part in turn.media], turn.text)) for turn in theirs
        ]
