"""The prompts of learning from language feedback, as conversations.

A conversation is a list of (role, text) with roles "user" and "assistant", up to the answer to be
written; ``<image>`` marks where the media stand. The skeletons are those of the Align-Anything
LLF scripts (answer; prompt + response -> critique; three turns prompt / response / refinement),
in fewer words: on a CPU every prompt token costs.
"""

MEDIA_MARKER = "<image>"
# In the shape aa_jax.data.llf_prompts takes as ``wording``; {critique} is what the refine prompt
# is given of the feedback, in this world the refinement alone.
WORDING = {
    "answer": "{prompt}",
    "critique": "{prompt} ##Response: {response} critique this answer .",
    "refine": "##Refinement: {critique} . revise the answer .",
}

Conversation = list[tuple[str, str]]


def answer(question: str) -> Conversation:
    """x -> y."""
    return [("user", f"{MEDIA_MARKER}\n{WORDING['answer'].format(prompt=question)}")]


def critique(question: str, response: str) -> Conversation:
    """(x, y) -> critique and refinement, in one user turn."""
    text = WORDING["critique"].format(prompt=question, response=response)
    return [("user", f"{MEDIA_MARKER}\n{text}")]


def refine(question: str, response: str, refinement: str) -> Conversation:
    """(x, y, refinement) -> y*, in three turns.

    Args:
        question: x, without media marker.
        response: y.
        refinement: the refinement without its marker; the critique does not enter the prompt.
    """
    turns = [("assistant", response), ("user", WORDING["refine"].format(critique=refinement))]
    return answer(question) + turns


def messages(conversation: Conversation, response: str | None = None) -> list[dict]:
    """The conversation as Hugging Face chat messages (content parts), media parts in place.

    Args:
        conversation: from the functions above.
        response: if given, closes the conversation as the assistant's turn.
    """
    turns = list(conversation)
    if response is not None:
        turns.append(("assistant", response))
    result = []
    for role, text in turns:
        media, text = split_media(text)
        content: list[dict] = [{"type": "image"}] * media
        result.append({"role": role, "content": content + [{"type": "text", "text": text}]})
    return result


def split_media(text: str) -> tuple[int, str]:
    """Number of media markers in front of a turn, and the text behind them."""
    media = 0
    while text.startswith(MEDIA_MARKER):
        media += 1
        text = text.removeprefix(MEDIA_MARKER).lstrip("\n")
    return media, text
