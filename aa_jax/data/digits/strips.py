"""Strips of digits as pixels: what the image tokenizer of this world is trained on."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from aa_jax.data.digits.scenes import Scene, sample_scene


def pixels_of(scene: Scene) -> Float[np.ndarray, "3 H W"]:
    """A scene's image in [-1, 1], channels first."""
    image = np.asarray(scene.render(), np.float32)
    return image.transpose(2, 0, 1) / 127.5 - 1.0


def sample_strips(
    split: str, count: int, seed: int, max_digits: int = 3
) -> tuple[Float[np.ndarray, "N 3 H W"], list[tuple[int, ...]]]:
    """Random strips of a split and the digits they show; strip i depends on (seed, i) only."""
    drawn = [
        sample_scene(split, np.random.default_rng((31, seed, index)), max_digits)
        for index in range(count)
    ]
    return np.stack([pixels_of(scene) for _, scene in drawn]), [labels for labels, _ in drawn]


def cells(
    pixels: Float[np.ndarray, "N 3 H W"], labels: list[tuple[int, ...]], max_digits: int = 3
) -> tuple[Float[np.ndarray, "D 64"], Int[np.ndarray, "D"]]:
    """The 8 x 8 cells of strips that show a digit, in grey, and which digit."""
    top = 8 * ((max_digits - 1) // 2)
    found, shown = [], []
    for image, digits in zip(pixels, labels, strict=True):
        for column, digit in enumerate(digits):
            cell = image[:, top : top + 8, 8 * column : 8 * column + 8]
            found.append(cell.mean(axis=0).reshape(-1))
            shown.append(digit)
    return np.stack(found), np.asarray(shown)


class StripBatches(Iterator[dict[str, np.ndarray]]):
    """Batches {"pixels" [B,3,H,W], "row_mask" [B]} of training strips, for ever, resumable."""

    def __init__(self, batch_rows: int, seed: int, max_digits: int = 3):
        self.batch_rows, self.seed, self.max_digits, self.step = batch_rows, seed, max_digits, 0

    def __next__(self) -> dict[str, np.ndarray]:
        key = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0])
        pixels, _ = sample_strips("train", self.batch_rows, key, self.max_digits)
        self.step += 1
        return {"pixels": pixels, "row_mask": np.ones(self.batch_rows, np.float32)}

    def get_state(self) -> dict[str, int]:
        """The next batch's number."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a saved position."""
        self.step = int(state["step"])
