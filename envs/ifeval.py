"""IFEval (Zhou et al. 2023): prompts with instructions that a program can check (instructions.py).
The four published accuracies: by prompt (all its instructions are followed) and by instruction
(share of all instructions), strict and loose. The reward is prompt_strict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import chz

from envs.benchmark import BenchmarkBuilder, list_of
from envs.instructions import LANGUAGE, check_instruction, follows, follows_loosely
from envs.problem import Grade, Grader, Problem
from posttrain.backend.errors import DataError
from supervised.rows import Fields, Row, text_of


@dataclass(frozen=True)
class InstructionGrader(Grader):
    """`instructions`: their names and arguments."""

    instructions: tuple[tuple[str, Mapping[str, Any]], ...]
    has_answer = False

    async def grade(self, text: str, gold: str) -> Grade:
        strict = [follows(text, *instruction) for instruction in self.instructions]
        loose = [follows_loosely(text, *instruction) for instruction in self.instructions]
        metrics = {
            "prompt_strict": float(all(strict)),
            "prompt_loose": float(all(loose)),
            "instructions": float(len(strict)),
            "followed_strict": float(sum(strict)),
            "followed_loose": float(sum(loose)),
        }
        names = [name for name, _ in self.instructions]
        verdicts = [f"{name}: {'yes' if kept else 'no'}" for name, kept in zip(names, strict, strict=True)]
        return Grade(text.strip() or None, all(strict), None, metrics, {"followed": "\n".join(verdicts)})


@chz.chz
class IfEval(BenchmarkBuilder):
    """Instructions that a program can check."""

    hub_name: str = chz.field(default="google/IFEval", doc="Hugging Face dataset")
    split: str = chz.field(default="train", doc="split to evaluate on; the hub has all prompts in train")
    without_language: bool = chz.field(
        default=False, doc="leave out the prompts whose language is to be checked, which needs langdetect"
    )

    def rows(self, split: str) -> Sequence[Row]:
        rows = super().rows(split)
        if not self.without_language:
            return rows
        kept = [(where, row) for where, row in rows if LANGUAGE not in list_of(where, row, "instruction_id_list")]
        print(f"ifeval: {len(rows) - len(kept)} of {len(rows)} prompts ask for a language; left out")
        return kept

    def problem(self, where: str, row: Fields) -> Problem:
        names, arguments = list_of(where, row, "instruction_id_list"), list_of(where, row, "kwargs", dict)
        if not names or len(names) != len(arguments):
            raise DataError(f"{where}: {len(names)} instructions and {len(arguments)} kwargs")
        pairs = zip(names, arguments, strict=True)
        instructions = tuple((name, check_instruction(where, name, given)) for name, given in pairs)
        return Problem(text_of(where, row, "prompt"), "", InstructionGrader(instructions), None, ("ifeval",), where)

    def recommended_max_tokens(self) -> int:
        return 1280

    def ratios(self) -> Mapping[str, tuple[str, str]]:
        kinds = ("strict", "loose")
        return {f"instruction_{kind}": (f"followed_{kind}", "instructions") for kind in kinds}
