"""The same prompts continued by the original and by the result, always with the likeliest token, and where the two
differ first."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.evaluate.page.data import FileText, Generation, Generations, Token
from mobe_gguf.evaluate.server import Server, serving

#: Number of prompts, words of each, and tokens that are generated.
PROMPTS, WORDS, TOKENS = 3, 16, 80
#: How many of the likeliest tokens are shown at the first difference.
CHOICES = 3


@dataclass(frozen=True)
class Step:
    """A generated token and the likeliest ones there, ``(text, probability)``."""

    id: int
    text: str
    likeliest: tuple[tuple[str, float], ...]


def prompts(text: Path) -> list[str]:
    """PROMPTS passages of a text, evenly spread, each of WORDS words; they begin with a sentence if possible."""
    words = text.read_text(encoding="utf-8", errors="replace").split()
    found = []
    for i in range(PROMPTS):
        begin = i * len(words) // PROMPTS
        ends = (k + 1 for k in range(begin, min(begin + 200, len(words))) if words[k].endswith("."))
        begin = next(ends, begin)
        found.append(" ".join(words[begin : begin + WORDS]))
    return [prompt for prompt in dict.fromkeys(found) if prompt]


def generate(
    original: Path, result: Path, asked: Sequence[str], threads: int | None, options: Sequence[str] = ()
) -> Generations:
    """Both files' continuations, from one server after the other.  MobeError if one does not run."""
    more = ("-np", "1", "-c", "1024", *(() if threads is None else ("-t", str(threads))), *options)
    runs = []
    for file in (original, result):
        with serving(file, *more) as server:
            runs.append([_continue(server, prompt) for prompt in asked])
    names = (original.name, result.name)
    return Generations(
        [pair(prompt, names, left, right) for prompt, left, right in zip(asked, *runs, strict=True)]
    )


def _continue(server: Server, prompt: str) -> list[Step]:
    wanted = {
        "prompt": prompt,
        "n_predict": TOKENS,
        "temperature": 0,
        "n_probs": CHOICES,
        "cache_prompt": False,
    }
    answer = server.ask("/completion", wanted)
    steps = []
    try:
        for each in answer["completion_probabilities"]:
            likeliest = tuple((str(t["token"]), math.exp(float(t["logprob"]))) for t in each["top_logprobs"])
            steps.append(Step(int(each["id"]), str(each["token"]), likeliest))
    except (KeyError, TypeError, ValueError) as e:
        raise MobeError(
            f"llama-server -m {server.file} answered without probabilities ({e}); is the runtime older than this mobe-gguf? "
            "Run mobe-gguf build"
        ) from e
    return steps


def visible(text: str) -> str:
    """A token with visible white space."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def pair(prompt: str, names: tuple[str, str], left: Sequence[Step], right: Sequence[Step]) -> Generation:
    """Two continuations, with tokens marked at the first difference, and after it if only one of them has them."""
    steps = zip(left, right, strict=False)
    same = next((i for i, (a, b) in enumerate(steps) if a.id != b.id), min(len(left), len(right)))
    matcher = difflib.SequenceMatcher(None, [s.id for s in left], [s.id for s in right], autojunk=False)
    common: tuple[set[int], set[int]] = (set(), set())
    for block in matcher.get_matching_blocks():
        common[0].update(range(block.a, block.a + block.size))
        common[1].update(range(block.b, block.b + block.size))

    def one(name: str, steps: Sequence[Step], shared: set[int]) -> FileText:
        def kind(i: int) -> str:
            return "" if i < same else "part" if i == same else "" if i in shared else "own"

        tokens = [Token(step.text, kind(i)) for i, step in enumerate(steps)]
        choices = steps[same].likeliest if same < len(steps) else ()
        return FileText(name, tokens, [(visible(text), share) for text, share in choices])

    return Generation(prompt, one(names[0], left, common[0]), one(names[1], right, common[1]), same)
