"""A report of every kind of section, from synthetic data."""

import io
import wave

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from aa_jax import report


def make_sections():
    rng = np.random.default_rng(0)
    steps = np.arange(0, 2000)
    falling = 0.25 + 0.45 * np.exp(-steps / 400)
    noisy = falling + rng.normal(0, 0.04, steps.size)
    noisy[900:930] = np.nan
    evals = np.arange(0, 2001, 250)
    accuracy = 0.5 + 0.38 * (1 - np.exp(-evals / 500))
    return [
        report.Text(
            "Learning from language feedback on **the digits world**: a policy answers, a feedback "
            "model criticises and refines, and the pairs train DPO. See "
            "[the paper](https://arxiv.org/abs/2412.15838).\n\n"
            "- 1 797 real handwritten digits\n- one seed, `--config.seed=0`",
            title="What this is",
        ),
        report.Numbers(
            "Results",
            {
                "Win rate against SFT": ("63.1 %", "95 % interval 60.1 to 66.0"),
                "Accuracy": ("87.3 %", "+6.2 points over SFT"),
                "Feedback accuracy": 0.914,
                "Examples": 12_800,
            },
        ),
        report.Grid(
            "Training",
            [
                report.Curves(
                    "Loss", {"DPO": (steps, noisy)}, ylabel="loss", reference={"ln 2": 0.6931}
                ),
                report.Curves(
                    "Preference accuracy",
                    {
                        "LLF": (evals, accuracy, accuracy - 0.03, accuracy + 0.03),
                        "binary feedback": (evals, accuracy - 0.08),
                        "SFT": (evals, 0.52 + 0 * accuracy),
                    },
                    ylabel="accuracy on held-out pairs",
                    reference={"chance": 0.5},
                ),
                report.Curves(
                    "Learning rate",
                    {"lr": (steps, 1e-6 * np.minimum(1, (steps + 1) / 100) * np.cos(steps / 1400))},
                ),
                report.Curves(
                    "Gradient norm",
                    {
                        f"stage {i}": (
                            steps[1:],
                            10 ** (1 - i * 0.7 - steps[1:] / 1500 + rng.normal(0, 0.1, 1999)),
                        )
                        for i in range(5)
                    },
                    ylabel="norm, log scale",
                    log_y=True,
                    log_x=True,
                ),
            ],
            note="All quantities are means over 64 examples.",
        ),
        report.Bars(
            "Win rate by arm",
            [
                report.Bar.rate("LLF, text + image", 631, 1000, group="against SFT"),
                report.Bar.rate("binary feedback", 540, 1000, group="against SFT"),
                report.Bar.rate("random refinement", 492, 1000, group="against SFT"),
                report.Bar.rate("critique only", 415, 1000, group="against SFT"),
                report.Bar.rate("LLF with a deliberately long label", 88, 150, group="against DPO"),
            ],
            reference=0.5,
            percent=True,
            note="Ties count one half; judged by the oracle. Whiskers are 95 % Wilson intervals.",
        ),
        report.Bars(
            "Effect on reward",
            [report.Bar("helpful", 0.42, 0.31, 0.55), report.Bar("harmless", -0.12, -0.2, -0.04)],
            reference=0.0,
        ),
        report.Table(
            "Every arm",
            ["Arm", "Win rate", "Accuracy", "Tokens", "Converged"],
            [
                ["SFT", None, 0.811, 12034, True],
                ["DPO", 0.54, 0.842, 123456789, True],
                ["LLF", 0.631, 0.873, 13400, True],
                ["no critique <b>&", 0.415, 0.79, 2.5e-7, False],
            ],
            caption="Held-out split, greedy decoding.",
            highlight=[2],
        ),
        report.Samples(
            "Samples",
            ["image", "question", "y", "critique", "refinement", "y*", "reward y", "reward y*"],
            [
                [
                    strip([3, 14, 25]),
                    "List the digits from left to right, then give their sum.",
                    "The digits are 3, 4 and 5. The sum is 11.",
                    "The digits are read correctly, but 3 + 4 + 5 is 12, not 11. " * 3,
                    "Keep the list; correct the sum to 12.",
                    "The digits are 3, 4 and 5. Their sum is 12.",
                    1.25,
                    2.75,
                ],
                [
                    [strip([7]), strip([8]), report.Media(tone(), alt="the tones of 7 and 8")],
                    "Which is larger? <script>alert(1)</script>",
                    "They are equal.",
                    None,
                    "Name the larger digit.\nGive the difference.",
                    "8 is larger than 7, by 1.",
                    0.5,
                    3.0,
                ],
            ],
            caption="Chosen at random, not by hand.",
            tones={"y": "bad", "y*": "good"},
        ),
        report.Samples(
            "Text samples",
            ["prompt", "response"],
            [["List 3 7 1.", "3\n7\n1"], ["Say it at length.", "So it goes. " * 90]],
        ),
    ]


def strip(indices):
    """Handwritten digits side by side, an image of 8 x 8 pixels each."""
    images = load_digits().images[indices]
    return Image.fromarray((np.concatenate(images, axis=1) * 15.9).astype(np.uint8))


def tone():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        samples = np.sin(2 * np.pi * 852 * np.arange(1600) / 8000) * 12000
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture
def sections():
    return make_sections()
