"""Compares mathematical answers with math-verify; a program of its own, see `Pool`.

Reads ``{"gold": text, "answer": text}`` per line. Says ``{"progress": "gold"}`` once the gold
answer is understood, and ends with ``{"result": "right" | "wrong" | "no answer" | "no gold"}``: so
the caller knows whose fault a time-out is.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space: a tower of powers must not fill the machine
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin\{")
COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
NAMES = {"pi", "inf", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt"}


def is_prose(text):
    """Words that are no formula: a run of three letters outside of LaTeX commands."""
    words = re.findall(r"[A-Za-z]{3,}", COMMAND.sub(" ", text))
    return any(word not in NAMES for word in words)


def formula(text):
    """What is to be parsed, as delimited LaTeX; None if it is no formula.

    A bare formula is wrapped. Prose is read only if it holds exactly one number: several numbers
    are several guesses.
    """
    text = text.strip().rstrip(".")
    if not text:
        return None
    if DELIMITED.search(text):
        return text
    if is_prose(text):
        numbers = set(NUMBER.findall(text))
        return f"${numbers.pop()}$".replace("%", "\\%") if len(numbers) == 1 else None
    return "$" + re.sub(r"(?<!\\)%", r"\\%", text) + "$"


def plain(text):
    """For comparing as text: without delimiters and white space."""
    text = re.sub(r"\$|\\[()\[\]]|\s", "", text.strip())
    return re.sub(r"^\\boxed\{(.*)\}$", r"\1", text)


class Judge:
    """math-verify without its own alarms: the parent process holds the clock."""

    def __init__(self):
        import math_verify

        self._math = math_verify

    def parse(self, text):
        """Expressions of a text; those that stayed text are not understood."""
        if text is None:
            return []
        found = self._math.parse(text, parsing_timeout=None)
        return found if any(not isinstance(item, str) for item in found) else []

    def __call__(self, task, tell):
        gold, answer = task["gold"], task["answer"]
        # Words alone would be read as a product of letters, equal to any of their anagrams.
        truth = [] if is_prose(gold) and not DELIMITED.search(gold) else self.parse(formula(gold))
        if not truth:
            return "no gold"
        tell("gold")
        if plain(gold) == plain(answer):
            return "right"
        stated = self.parse(formula(answer))
        if not stated:
            return "no answer"
        good = self._math.verify(truth, stated, timeout_seconds=None)
        return "right" if good else "wrong"


def main():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # end with the parent
        if os.getppid() != int(sys.argv[1]):
            return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not answer

    def say(**what):
        out.write(json.dumps(what) + "\n")
        out.flush()

    logging.disable(logging.CRITICAL)
    try:
        judge = Judge()
    except ImportError as error:
        say(error=f"maths rewards need math-verify ({error}): pip install "
                  "'math-verify[antlr4_13_2]'")  # fmt: skip
        return
    say(ready=True)
    for line in sys.stdin:
        understood = []

        def tell(stage, understood=understood):
            understood.append(stage)
            say(progress=stage)

        try:
            said = judge(json.loads(line), tell)
        except MemoryError:
            os._exit(1)  # what is left of the memory is anybody's guess: a new worker is cheaper
        except Exception:  # a parser of other people's text raises anything
            said = "no answer" if understood else "no gold"
        say(result=said)


if __name__ == "__main__":
    main()
