"""A teacher's answers to training questions, as conversations to imitate: a stage that writes JSONL."""

from functools import partial
from pathlib import Path

from envs.arithmetic import ArithmeticTask
from envs.problem import Problem
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message
from posttrain.tracking.jsonl import write_jsonl
from posttrain.tracking.stages import Stage
from recipes.distillation.teacher import Config


def answers_stage(config: Config, path: Path, teacher: Stage, number: int, context: str | None = None) -> Stage:
    """Answers sampled at temperature 1; truncated ones are left out. `context`: a system message that
    the file does not show."""
    settings = {"number": number, "context": context, "seed": config.seed, "renderer_name": config.renderer_name}
    return Stage(path.stem, path, settings, partial(_write, config, path, teacher, number, context), [teacher])


async def _write(config: Config, path: Path, teacher: Stage, number: int, context: str | None) -> None:
    problems = ArithmeticTask(num_digits=2).draw(number, [config.seed, 0])
    lines = await _answers(config, str(teacher.result), problems, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, ({"messages": line} for line in lines))


async def _answers(config: Config, teacher: str, problems: list[Problem], context: str | None) -> list[list[Message]]:
    renderer = get_renderer(config.renderer_name, load_tokenizer(teacher))
    system = [Message(role="system", content=context)] if context else []
    with ServiceClient(config.backend) as service:
        client, lines = service.create_sampling_client(teacher), []
        questions = [Message(role="user", content=problem.question) for problem in problems]
        futures = [
            client.sample(
                renderer.build_generation_prompt([*system, question]),
                1,
                SamplingParams(max_tokens=8, seed=config.seed + i, stop=renderer.get_stop_sequences()),
            )
            for i, question in enumerate(questions)
        ]
        for question, future in zip(questions, futures, strict=True):
            message, ended = renderer.parse_response((await future).sequences[0].tokens)
            lines += [[question, message]] if ended else []
    return lines
