"""The prompts of learning from language feedback, as conversations.

A conversation is a list of (role, text) with roles "user" and "assistant", up to the answer to be
written; ``<image>``, ``<audio>`` and ``<video>`` mark where the media stand. The skeletons are
those of the Align-Anything LLF scripts (answer; prompt + response -> critique; three turns prompt /
response / refinement), in fewer words: on a CPU every prompt token costs.
"""

MEDIA_MARKER = "<image>"
MARKERS = {"image": MEDIA_MARKER, "audio": "<audio>", "video": "<video>", "text": ""}
_KINDS = {marker: kind for kind, marker in MARKERS.items() if marker}
# In the shape aa_jax.data.llf_prompts takes as ``wording``; {critique} is what the refine prompt
# is given of the feedback, in this world the refinement alone.
WORDING = {
    "answer": "{prompt}",
    "critique": "{prompt} ##Response: {response} critique this answer .",
    "refine": "##Refinement: {critique} . revise the answer .",
}

Conversation = list[tuple[str, str]]


def answer(question: str, kind: str = "image") -> Conversation:
    """x -> y; ``kind`` is that of the medium in front of the question."""
    return [("user", _behind(kind, WORDING["answer"].format(prompt=question)))]


def critique(question: str, response: str, kind: str = "image") -> Conversation:
    """(x, y) -> critique and refinement, in one user turn."""
    text = WORDING["critique"].format(prompt=question, response=response)
    return [("user", _behind(kind, text))]


def refine(question: str, response: str, refinement: str, kind: str = "image") -> Conversation:
    """(x, y, refinement) -> y*, in three turns.

    Args:
        question: x, without media marker.
        response: y.
        refinement: the refinement without its marker; the critique does not enter the prompt.
        kind: of the medium in front of the question.
    """
    turns = [("assistant", response), ("user", WORDING["refine"].format(critique=refinement))]
    return answer(question, kind) + turns


def _behind(kind: str, text: str) -> str:
    return f"{MARKERS[kind]}\n{text}" if MARKERS[kind] else text


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
        content: list[dict] = [{"type": kind} for kind in media]
        result.append({"role": role, "content": content + [{"type": "text", "text": text}]})
    return result


def split_media(text: str) -> tuple[list[str], str]:
    """Kinds of the media in front of a turn, and the text behind their markers."""
    media: list[str] = []
    while marker := next((m for m in _KINDS if text.startswith(m)), None):
        media.append(_KINDS[marker])
        text = text.removeprefix(marker).lstrip("\n")
    return media, text
