"""The critique prompt holds x and y; the refine prompt x, y, c, in that order."""

import pytest

from aa_jax.data import llf_prompts
from aa_jax.data.example import Part
from aa_jax.errors import DataError


def test_critique_prompt():
    (turn,) = llf_prompts.critique("X?", "Y!", [Part("image", index=0)])
    assert turn.role == "user" and turn.content[0].type == "image"
    assert turn.text.index("X?") < turn.text.index("Y!")


def test_refine_prompt():
    turns = llf_prompts.refine("X?", "Y!", "C.", [Part("image", index=0)])
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert all(t.text.startswith(s) for t, s in zip(turns, ("X?", "Y!", "C."), strict=True))
    assert [len(turn.media) for turn in turns] == [1, 0, 0]


def test_wording_replaces_one_prompt_only():
    wording = {"critique": "{prompt} / {response} ?"}
    assert llf_prompts.critique("x", "y", wording=wording)[0].text == "x / y ?"
    assert llf_prompts.answer("x", wording=wording)[0].text == "x"


def test_braces_in_the_data_stay():
    (turn,) = llf_prompts.critique("{response} {0}", "{prompt}")
    assert "{response} {0}" in turn.text and "{prompt}" in turn.text


def test_wording_must_show_everything():
    with pytest.raises(DataError, match=r"leaves out \{response\}"):
        llf_prompts.critique("x", "y", wording={"critique": "{prompt}"})
    with pytest.raises(DataError, match="Unknown wording judge"):
        llf_prompts.answer("x", wording={"judge": "{prompt}"})


def test_feedback_splits_and_joins():
    text = "##Critique: too short ##Refinement: add the sum"
    assert llf_prompts.split_feedback(text) == ("too short", "add the sum")
    assert llf_prompts.split_feedback("just words") == ("just words", "")
    joined = llf_prompts.join_feedback("a", "b")
    assert llf_prompts.split_feedback(joined) == ("a", "b")
    assert llf_prompts.join_feedback("a", "") == "##Critique: a"
