"""Dialled digits: the telephone's dual tones, made and read.

Each key is the sum of one low and one high tone. Source: ITU-T Recommendation Q.23 (frequencies)
and Q.24 (a receiver takes tones of 40 ms and more with pauses of 40 ms and more). Reading is by
Goertzel's recurrence (G. Goertzel, 1958), which asks for the power at the eight frequencies only.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from aa_jax.errors import DataError

RATE = 16000  # Hz, what speech towers hear
LOW = (697, 770, 852, 941)
HIGH = (1209, 1336, 1477)
TONE, PAUSE = 0.08, 0.05  # seconds
_KEYS = ("123", "456", "789", "*0#")
FREQUENCIES = {
    int(key): (LOW[row], HIGH[column])
    for row, keys in enumerate(_KEYS)
    for column, key in enumerate(keys)
    if key.isdigit()
}
_WINDOW = 320  # samples, 20 ms
_TWIST = 10 ** (8 / 10)  # Q.24: the two tones may differ by up to 8 dB
_FLOOR = 1e-4  # mean power of a window that holds a tone


def dial(
    digits: Sequence[int],
    rng: np.random.Generator | None = None,
    *,
    tone: float = TONE,
    pause: float = PAUSE,
    noise: float = 0.01,
) -> Float[np.ndarray, " samples"]:
    """The sound of dialling ``digits``, at 16 kHz in [-1, 1].

    Args:
        digits: keys 0-9.
        rng: draws level (0.2 to 0.4 per tone), phases and noise; None dials cleanly.
        tone: seconds per key.
        pause: seconds after each key.
        noise: standard deviation of the line's noise.

    Raises:
        DataError: nothing to dial, or not a digit.
    """
    if not len(digits) or any(digit not in FREQUENCIES for digit in digits):
        raise DataError(f"one or more digits 0-9 can be dialled, got {tuple(digits)}.")
    time = np.arange(round(tone * RATE)) / RATE
    gap = np.zeros(round(pause * RATE))
    pieces = [gap]
    for digit in digits:
        level, phase = np.full(2, 0.3), np.zeros(2)
        if rng is not None:
            level, phase = rng.uniform(0.2, 0.4, 2), rng.uniform(0, 2 * np.pi, 2)
        parts = [
            gain * np.sin(2 * np.pi * hertz * time + start)
            for gain, hertz, start in zip(level, FREQUENCIES[digit], phase, strict=True)
        ]
        pieces += [sum(parts), gap]
    samples = np.concatenate(pieces)
    if rng is not None:
        samples = samples + noise * rng.standard_normal(len(samples))
    return np.clip(samples, -1, 1).astype(np.float32)


def goertzel(samples: Float[np.ndarray, " samples"], hertz: float | int, rate: int = RATE) -> float:
    """Power at one frequency: ``|sum_n x[n] exp(-2 pi i f n / rate)|^2 (2 / N)^2 / 2``, so that a
    sine of amplitude a has power a^2 / 2."""
    turn = 2 * np.cos(2 * np.pi * hertz / rate)
    one = two = 0.0
    for sample in np.asarray(samples, np.float64):
        one, two = sample + turn * one - two, one
    power = one * one + two * two - turn * one * two
    return float(2 * power / max(len(samples), 1) ** 2)


def listen(samples: Float[np.ndarray, " samples"]) -> tuple[int, ...]:
    """The digits dialled in a recording at 16 kHz; what is no valid key is not heard."""
    heard, last = [], None
    for start in range(0, len(samples) - _WINDOW + 1, _WINDOW // 2):
        key = _key(samples[start : start + _WINDOW])
        if key is not None and key != last:
            heard.append(key)
        last = key
    return tuple(heard)


def _key(window: Float[np.ndarray, " samples"]) -> int | None:
    total = float(np.mean(np.square(window, dtype=np.float64)))
    if total < _FLOOR:
        return None
    low, high = ([goertzel(window, hertz) for hertz in band] for band in (LOW, HIGH))
    strongest = max(low), max(high)
    if max(strongest) > _TWIST * min(strongest) or sum(strongest) < 0.6 * total:
        return None
    row, column = int(np.argmax(low)), int(np.argmax(high))
    key = _KEYS[row][column]
    return int(key) if key.isdigit() else None


def wav_bytes(samples: Float[np.ndarray, " samples"]) -> bytes:
    """A 16-bit mono WAV file in memory."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()
