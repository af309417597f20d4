"""Drops before batching, orders, sharding, and bit-exact resume."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest

from aa_jax.data.collate import collate
from aa_jax.data.dataset import Dataset
from aa_jax.data.example import InvalidRow
from aa_jax.data.loader import Loader, pack
from aa_jax.data.sources import rows_source
from aa_jax.data.tokens import Limits
from aa_jax.errors import DataError, MediaError
from aa_jax.sharding import Share

N = 11


def rows(kit, n=N, image=False):
    made = []
    for i in range(n):
        row = {
            "question": f"what is {i}?",
            "response_1": f"it is {i}",
            "response_2": f"no, {i} it is not",
            "overall_response": 1 + i % 2,
            "text_critique_1": f"##Critique: {i}",
            "text_critique_2": "" if i % 2 else "##Critique: b",
        }
        if image:
            row["image"] = {"bytes": kit.image_bytes(kit.random_image(i)), "path": None}
        made.append(row)
    return made


def simple(items, batch_rows):
    """Numbers -> a padded array."""
    out = np.full(batch_rows, -1)
    out[: len(items)] = items
    return {"tokens": out}


def masked(items, batch_rows):
    """The same as columns of a batch, with the mask that tells padding."""
    out = {
        "tokens": np.zeros(batch_rows, np.int32),
        "feature_index": np.full((batch_rows, 2), -1, np.int32),
        "sequence_mask": np.zeros(batch_rows, np.float32),
        "media": {"pixel_values": np.zeros((batch_rows, 3), np.float32)},
    }
    for row, item in enumerate(items):
        out["tokens"][row], out["sequence_mask"][row] = item, 1.0
        out["feature_index"][row], out["media"]["pixel_values"][row] = 0, item
    return out


def numbers(loader):
    return [[int(i) for i in batch["tokens"] if i >= 0] for batch in loader]


def test_every_example_once_per_epoch_in_a_new_order():
    loader = Loader(range(10), simple, 4, epochs=3, seed=5)
    assert loader.steps_per_epoch == 3 and len(loader) == 9
    batches = numbers(loader)
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[3 * e : 3 * e + 3], []) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(loader) == batches
    assert numbers(Loader(range(10), simple, 4, epochs=3, seed=6)) != batches


def test_unshuffled_and_drop_remainder():
    loader = Loader(range(10), simple, 4, epochs=2, shuffle=False, drop_remainder=True)
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_partial_batch_is_padded():
    *_, last = Loader(range(10), simple, 4, shuffle=False)
    np.testing.assert_array_equal(last["tokens"], [8, 9, -1, -1])


def halves(processes, copies=1):
    """Shares of processes that each hold one piece, or `copies` processes the same one."""
    pieces = processes // copies
    return [
        Share(pieces, (p // copies,), (p // copies,) if p % copies == 0 else ())
        for p in range(processes)
    ]


@pytest.mark.parametrize("shares", [halves(2), halves(4), halves(4, copies=2)], ids=len)
@pytest.mark.parametrize("multiple", [4, 8])
def test_processes_make_the_single_process_batches(shares, multiple):
    """The same rows in the same places, whatever the processes; what fills up is empty."""
    for n in (7, 8, 9):
        whole = list(Loader(range(n), masked, 4, epochs=2, multiple_of=multiple))
        parts = [
            list(Loader(range(n), masked, 4, epochs=2, share=share, multiple_of=multiple))
            for share in shares
        ]
        assert all(len(part) == len(whole) for part in parts)
        for step, batch in enumerate(whole):
            placed = jax.tree.map(lambda x: np.full_like(x, -7), batch)
            for share, part in zip(shares, parts, strict=True):
                for x, own in zip(*map(jax.tree.leaves, (placed, part[step])), strict=True):
                    x[share.rows(len(x))] = own
            jax.tree.map(np.testing.assert_array_equal, placed, batch)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_no_example_is_lost_or_repeated_by_a_restart_with_other_processes(before, after, at):
    """Ids are counted over two epochs; the restart is within the first, at its end, and later."""
    ids, n = [], 13

    def read(processes, start, stop, state):
        steps = [[] for _ in range(processes)]
        for number, share in enumerate(halves(processes)):
            loader = Loader(range(n), masked, 4, epochs=2, seed=3, share=share, multiple_of=4)
            batches = iter(loader)
            if state is not None:
                batches.set_state(state)
            for batch in itertools.islice(batches, stop - start):
                steps[number].append(batch["tokens"][batch["sequence_mask"] > 0].tolist())
            positions.append(json.dumps(batches.get_state()))
        for step in range(len(steps[0])):
            ids.append([i for process in steps for i in process[step]])

    positions = []
    read(before, 0, at, None)
    assert len(set(positions)) == 1  # the state does not know of processes
    read(after, at, 8, json.loads(positions[0]))
    whole = Loader(range(n), masked, 4, epochs=2, seed=3)
    expected = [b["tokens"][b["sequence_mask"] > 0].tolist() for b in whole]
    assert ids == expected
    for epoch in (ids[:4], ids[4:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(n))


def test_each_process_reads_only_its_own_rows():
    """The point of a share: what a process does not own it does not decode."""

    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    found = []
    for share in halves(4):
        data = Counted(range(32))
        list(Loader(data, masked, 8, share=share, multiple_of=8))
        found.append(data.read)
    assert found == [8, 8, 8, 8]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_resume_is_bit_exact(kit, threads, at):
    dataset = Dataset(
        rows_source(rows(kit, image=True)), "AA_TI2T", "preference", processor=kit.llava
    )
    make = functools.partial(collate, shapes=dataset.shapes("preference"), layout="preference")
    loader = Loader(dataset, make, 4, epochs=2, seed=3, threads=threads)
    straight = list(loader)
    first = iter(loader)
    for _ in range(at):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = iter(Loader(dataset, make, 4, epochs=2, seed=3))
    again.set_state(state)
    rest = list(again)
    assert len(rest) == len(straight) - at == 6 - at
    for a, b in zip(straight[at:], rest, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            one, two = (x["pixel_values"] if key == "media" else x for x in (a[key], b[key]))
            np.testing.assert_array_equal(one, two)


def test_endless_loader():
    loader = Loader(range(3), simple, 2, epochs=None)
    batches = iter(loader)
    seen = [next(batches) for _ in range(7)]
    assert len(seen) == 7
    with pytest.raises(DataError, match="no length"):
        len(loader)


def test_state_of_another_run_is_refused():
    state = iter(Loader(range(10), simple, 4)).get_state()
    for other in (Loader(range(11), simple, 4), Loader(range(10), simple, 2)):
        with pytest.raises(DataError, match="belongs to another run: (rows|batch_rows)"):
            iter(other).set_state(state)
    with pytest.raises(DataError, match="seed 0 -> 1"):
        iter(Loader(range(10), simple, 4, seed=1)).set_state(state)


def test_loader_errors():
    with pytest.raises(DataError, match="multiple_of=3 a multiple of the 2 pieces"):
        Loader(range(4), simple, 3, share=halves(2)[0], multiple_of=3)
    with pytest.raises(DataError, match="make no batch of 8"):
        Loader(range(4), simple, 8, drop_remainder=True)


def test_packed_rows_hold_every_example(kit):
    dataset = Dataset(rows_source(rows(kit)), "AA_T2T", "supervised", processor=kit.chatml)
    alone = dataset.shapes("supervised")
    shapes = type(alone)(3 * alone.length, 3 * alone.response_length)
    groups = pack(dataset.sizes, shapes)
    make = functools.partial(collate, shapes=shapes, layout="supervised")
    loader = Loader(dataset, make, 2, groups=groups, epochs=2)
    assert len(groups) < N and loader.steps_per_epoch == -(-len(groups) // 2)
    trained = sum(batch["loss_mask"].sum() for batch in loader)
    assert trained == 2 * sum(sum(size.responses) for size in dataset.sizes)


def test_invalid_rows_are_dropped_before_batching_and_counted(kit, caplog):
    made = rows(kit)
    made[1]["overall_response"] = 0
    made[2]["overall_response"] = 3
    made[3]["response_1"] = made[3]["response_2"]
    made[4]["response_2"] = ""
    made[5]["question"] = "long " * 50
    made[6]["response_1"] = "long " * 50
    source = rows_source(made, "train.parquet")
    limits = Limits(max_prompt_length=40, max_response_length=40)
    with caplog.at_level("INFO"):
        dataset = Dataset(source, "AA_T2T", "preference", processor=kit.chatml, limits=limits)
    reasons = {
        "invalid label": 2,
        "identical responses": 1,
        "empty response": 1,
        "prompt too long": 1,
        "response too long": 1,
    }
    assert dataset.report.dropped == reasons and len(dataset) == 5 == dataset.report.kept
    assert "2 invalid label" in caplog.text and "train.parquet:1" in caplog.text
    make = functools.partial(collate, shapes=dataset.shapes("preference"), layout="preference")
    loader = Loader(dataset, make, 3)
    assert loader.report is dataset.report and loader.steps_per_epoch == 2
    assert sum(batch["sequence_mask"].sum() for batch in loader) == 2 * 5
    with pytest.raises(InvalidRow, match=r"train\.parquet:1"):
        Dataset(source, "AA_T2T", "preference", strict=True)


def test_strict_raises_the_length_error(kit):
    source = rows_source(rows(kit), "t")
    with pytest.raises(InvalidRow, match="t:0.*raise max_prompt_length"):
        limits = Limits(max_prompt_length=4)
        Dataset(source, "AA_T2T", "prompt", processor=kit.chatml, limits=limits, strict=True)


def test_nothing_left(kit):
    made = [{**row, "overall_response": 0} for row in rows(kit)]
    with pytest.raises(DataError, match="No example is left.*11 invalid label"):
        Dataset(rows_source(made), "AA_T2T", "preference")


def test_tasks(kit):
    source = rows_source(rows(kit), "t")
    assert len(Dataset(source, "AA_T2T", "feedback")) == N + (N + 1) // 2
    assert len(Dataset(source, "AA_T2T", "unpaired")) == 2 * N
    assert len(Dataset(source, "AA_T2T", "prompt", size=4)) == 4
    feedback = Dataset(source, "AA_T2T", "feedback", wording={"critique": "{response}? {prompt}"})
    assert feedback[0].messages[-1].text == "it is 0? what is 0?"
    columns = {"prompt": "question", "chosen": "response_1", "rejected": "response_2"}
    own = Dataset(source, None, "preference", columns=columns)
    assert [r.text for r in own[1].responses] == ["it is 1", "no, 1 it is not"]
    with pytest.raises(DataError, match="give the dataset a processor"):
        own.shapes("preference")


def test_same_question_with_another_image_is_kept(kit):
    made = [{**row, "question": "what?"} for row in rows(kit, 4, image=True)]
    dataset = Dataset(rows_source(made), "AA_TI2T", "prompt", processor=kit.llava)
    assert len(dataset) == 4
    pixels = np.stack([dataset[i].media["pixel_values"] for i in range(4)])
    assert len(np.unique(pixels.reshape(4, -1), axis=0)) == 4


def test_unreadable_images_raise_or_are_dropped(kit):
    made = rows(kit, 4, image=True)
    made[2]["image"]["bytes"] = made[2]["image"]["bytes"][:100]
    source = rows_source(made, "train.parquet")
    dataset = Dataset(source, "AA_TI2T", "preference", processor=kit.llava)
    make = functools.partial(collate, shapes=dataset.shapes("preference"), layout="preference")
    for threads in (0, 2):
        with pytest.raises(MediaError, match=r"train\.parquet:2: cannot decode"):
            list(Loader(dataset, make, 2, threads=threads))
    checked = Dataset(source, "AA_TI2T", "preference", check_media=True)
    assert checked.report.dropped == {"unreadable media": 1} and len(checked) == 3


def test_lengths_from_the_header_when_sizes_vary(kit, tmp_path):
    """Without a crop the number of features depends on the image."""
    from aa_jax.data.images import ImageProcessor
    from aa_jax.data.processor import Processor

    loose = ImageProcessor(size={"shortest_edge": 14})
    names = dict(image_processor=loose, patch_size=7, chat_template=kit.LLAVA_TEMPLATE)
    processor = Processor(kit.spm_tokenizer(), **names)
    dataset = Dataset(
        rows_source(rows(kit, 2, image=True)), "AA_TI2T", "prompt", processor=processor
    )
    assert processor.fixed_feature_count is None
    assert dataset.sizes[0].prompt == len(dataset[0].prompt)
    assert (dataset[0].feature_index >= 0).sum() == 2 * 3
    assert dataset.sizes[0].image_size == (14, 21) == dataset.shapes("prompt").image_size


def test_images_of_different_sizes_cannot_share_a_batch(kit):
    from aa_jax.data.example import Example, Part, message
    from aa_jax.data.images import ImageProcessor
    from aa_jax.data.processor import Processor
    from aa_jax.data.tokens import encode_example

    loose = ImageProcessor(size={"shortest_edge": 14})
    names = dict(image_processor=loose, patch_size=7, chat_template=kit.LLAVA_TEMPLATE)
    processor = Processor(kit.spm_tokenizer(), **names)
    parts = (Part("image", index=0), Part("image", index=1))
    images = (kit.random_image(0), kit.random_image(0, 40, 40))
    item = Example((message("user", "x", parts),), (), images, "t:8")
    with pytest.raises(MediaError, match="t:8: its images have different sizes.*do_center_crop"):
        encode_example(item, processor)
