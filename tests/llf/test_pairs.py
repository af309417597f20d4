import pytest
from PIL import Image

from aa_jax.data import llf_prompts
from aa_jax.data.example import Example, Part, message
from aa_jax.data.sources import open_source
from aa_jax.data.templates import TEMPLATES
from aa_jax.llf.pairs import form_pairs, write_pairs
from aa_jax.llf.prompts import critique_prompts, refine_prompts


def said(*texts, finished=True):
    return [{"text": text, "finished": finished} for text in texts]


def test_pairs_that_say_nothing_are_dropped_and_counted():
    first = said("a b", "same  text", "", "x", "cut") + said("y")
    second = said("a c", "same text", "z", " ", "more") + said("z")
    first[4]["finished"] = False
    pairs, counts = form_pairs(first, second)
    assert counts == {"kept": 2, "identical": 1, "empty": 2, "cut": 1}
    assert pairs == [
        {"index": 0, "response": "a b", "refinement": "a c"},
        {"index": 5, "response": "y", "refinement": "z"},
    ]


@pytest.fixture
def prompt():
    return Example(
        messages=(message("user", "How many?", (Part("image", index=0),)),),
        media=(Image.new("RGB", (4, 4), (9, 8, 7)),),
    )


def test_written_pairs_are_read_by_the_real_template(prompt, tmp_path):
    pairs, _ = form_pairs(said("two"), said("three"))
    write_pairs(tmp_path / "pairs.parquet", pairs, [prompt])
    example = TEMPLATES["AA_TI2T_LLF"].preference(open_source(str(tmp_path / "pairs.parquet"))[0])
    assert [r.text for r in example.responses] == ["three", "two"]
    assert example.messages[-1].text == "How many?"
    assert example.media[0].getpixel((0, 0)) == (9, 8, 7)


def test_critique_prompt_shows_x_and_y_and_refine_prompt_x_y_c_in_order(prompt):
    feedback = said("##Critique: too low\n##Refinement: count again")
    asked = critique_prompts([prompt], said("two"))[0].messages
    assert len(asked) == 1 and asked[0].media == prompt.messages[0].media
    assert asked[0].text.index("How many?") < asked[0].text.index("two")
    turns = refine_prompts([prompt], said("two"), feedback)[0].messages
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].text == "How many?" and turns[1].text == "two"
    assert "count again" in turns[2].text and "too low" not in turns[2].text
    whole = refine_prompts([prompt], said("two"), feedback, part="all")[0].messages
    assert "too low" in whole[2].text


def test_feedback_without_marks_is_shown_whole(prompt):
    turns = refine_prompts([prompt], said("two"), said("look at the corner"))[0].messages
    assert "look at the corner" in turns[2].text
    assert llf_prompts.split_feedback("look at the corner")[1] == ""
