"""Twenty questions: "Is it alive?" "yes" ... "Is it a frog?" The answerer is a rule over a table,
or a second policy (`answerer=rl.frozen_policy:FrozenPolicy answerer.base_model=...`).

reward = 1 - question_cost * (questions - 1) for the right thing, 0 when the questions are used up.
A question that names one thing is a guess. Left out: things outside the table, negation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import chz
import numpy as np

from envs.text_games import TextGame, TextGameBuilder, TextGameExamplesBuilder
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, WHOLE
from posttrain.renderers.types import Message
from rl.frozen_policy import FrozenPolicy, FrozenPolicyError, MessageCompleter
from rl.message_env import MessageEnd, MessageEnv, MessageStep, ParseError
from rl.types import Metrics

# a word of the table: the question of the demonstrations
QUESTIONS = {
    "alive": "Is it alive?",
    "animal": "Is it an animal?",
    "wild": "Is it wild?",
    "fly": "Can it fly?",
    "swim": "Can it swim?",
    "legs": "Has it legs?",
    "eat": "Can I eat it?",
    "sweet": "Is it sweet?",
    "big": "Is it bigger than me?",
    "inside": "Is it found inside?",
    "metal": "Is it made of metal?",
    "wheels": "Has it wheels?",
    "motor": "Has it a motor?",
    "sound": "Does it make a sound?",
    "round": "Is it round?",
    "cold": "Is it cold?",
}
KNOWN_AS = {"bigger": "big", "sing": "sound"}
THINGS = {
    "dog": "alive animal legs inside sound",
    "cow": "alive animal legs eat big sound",
    "wolf": "alive animal wild legs sound",
    "bear": "alive animal wild legs big sound swim",
    "snake": "alive animal wild swim",
    "frog": "alive animal wild legs swim sound",
    "eagle": "alive animal wild fly legs sound",
    "duck": "alive animal fly swim legs eat sound",
    "bee": "alive animal wild fly legs sound sweet",
    "ant": "alive animal wild legs",
    "salmon": "alive animal wild swim eat",
    "whale": "alive animal wild swim big sound",
    "oak": "alive wild big",
    "grass": "alive wild",
    "rose": "alive sweet",
    "apple": "alive eat sweet round",
    "carrot": "alive eat",
    "bread": "eat inside",
    "cake": "eat sweet inside round",
    "ice": "eat cold",
    "car": "wheels motor metal big sound",
    "bicycle": "wheels metal",
    "train": "wheels motor metal big sound inside",
    "airplane": "fly wheels motor metal big sound",
    "ship": "swim motor metal big sound",
    "kite": "fly",
    "drum": "sound round inside",
    "bell": "sound round metal",
    "table": "legs inside",
    "bed": "legs inside big",
    "spoon": "metal inside",
    "fridge": "metal motor inside cold big",
    "coin": "metal round",
    "ball": "round",
    "moon": "round big cold",
    "snow": "cold",
}
UNSURE = ("not", "or", "and", "neither")  # a question with these is unclear


def rules(max_questions: int) -> Message:
    text = f"I think of a thing. Ask at most {max_questions} questions that yes or no can answer. Find out what it is."
    return Message(role="user", content=text)


def words_of(text: str) -> list[str]:
    words: list[str] = re.findall(r"[a-z]+", text.lower())
    return [KNOWN_AS.get(word, word) for word in words]


def answer_from_table(thing: str, question: str) -> str:
    """ "yes" or "no" where the question has exactly one word of the table, else "unclear"."""
    words = words_of(question)
    known = {word for word in words if word in QUESTIONS}
    if len(known) != 1 or any(word in UNSURE for word in words):
        return "unclear"
    return "yes" if known.pop() in THINGS[thing].split() else "no"


@dataclass(frozen=True)
class PolicyAnswerer:
    """Asks a second policy."""

    completer: MessageCompleter

    async def __call__(self, thing: str, question: str) -> str:
        """Raises FrozenPolicyError unless the reply begins with yes or no."""
        ask = f"Answer yes or no. The question is about this: {thing}.\n{question}"
        reply = (await self.completer([Message(role="user", content=ask)]))["content"]
        answer = re.match(r"\W*(yes|no)\b", reply.lower())
        if answer is None:
            raise FrozenPolicyError(
                f"the answerer was asked {question[:60]!r} and said {reply[:60]!r}, neither yes nor no"
            )
        return answer[1]


class TwentyQuestionsEnv(MessageEnv):
    """Metrics: `unclear` of each question (0 or 1); `solved` and `turns` of every episode."""

    def __init__(self, thing: str, max_questions: int, question_cost: float, answerer: PolicyAnswerer | None = None):
        self.thing, self.max_questions = thing, max_questions
        self.question_cost, self.answerer = question_cost, answerer
        self.questions = 0

    async def initial_messages(self) -> list[Message]:
        return [rules(self.max_questions)]

    async def step(self, message: Message) -> MessageStep:
        question = message["content"].strip()
        if not words_of(question):
            raise ParseError("Ask a question in words.")
        answer = await self._answer(question)
        self.questions += 1
        logs = {"thing": self.thing}
        metrics = {"unclear": float(answer == "unclear")}
        if answer == "right":
            return MessageStep(
                1 - self.question_cost * (self.questions - 1), True, (), metrics | self._episode(True), logs
            )
        if self.questions == self.max_questions:
            return MessageStep(0.0, True, (), metrics | self._episode(False), logs)
        return MessageStep(0.0, False, [Message(role="user", content=answer)], metrics, logs)

    async def _answer(self, question: str) -> str:
        """ "right", "yes", "no" or "unclear"."""
        named = {word for word in words_of(question) if word in THINGS}
        if named:
            return "unclear" if len(named) > 1 else "right" if named == {self.thing} else "no"
        return await self.answerer(self.thing, question) if self.answerer else answer_from_table(self.thing, question)

    def _episode(self, solved: bool) -> Metrics:
        return {"solved": float(solved), "turns": float(self.questions)}

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        return 0.0, self._episode(solved=False)


@chz.chz
class TwentyQuestions(TextGame):
    """Held-out things are never right in training: a policy may learn that of a small table."""

    num_test: int = chz.field(default=6, validator=WHOLE, doc="held-out things")
    max_questions: int = chz.field(default=20, validator=COUNT, doc="questions after which an episode is lost")

    def tasks(self) -> Sequence[str]:
        return list(THINGS)

    def demonstration(self, task: str, rng: np.random.Generator) -> list[Message]:
        """Questions that tell the remaining things apart, in a random order, then the guess."""
        messages = [rules(self.max_questions)]
        possible = list(THINGS)
        for word in rng.permutation(list(QUESTIONS)):
            answers = {thing: answer_from_table(thing, word) for thing in possible}
            if len(set(answers.values())) > 1:
                messages.append(Message(role="assistant", content=QUESTIONS[word]))
                messages.append(Message(role="user", content=answers[task]))
                possible = [thing for thing in possible if answers[thing] == answers[task]]
        return [*messages, Message(role="assistant", content=f"Is it a {task}?")]


@chz.chz
class TwentyQuestionsBuilder(TwentyQuestions, TextGameBuilder):
    """Things to find out by reinforcement learning."""

    question_cost: float = chz.field(
        default=0.02, validator=NON_NEGATIVE, doc="subtracted from the reward for every question after the first"
    )
    answerer: FrozenPolicy | None = chz.field(default=None, doc="a second policy that answers; None = the table")
    tag: str = chz.field(default="twenty_questions", doc="name under which metrics are logged too")

    def recommended_max_tokens(self) -> int:
        return 32

    def open_env(self) -> Callable[[str], TwentyQuestionsEnv]:
        answerer = PolicyAnswerer(self.answerer.open_completer()) if self.answerer else None
        return partial(
            TwentyQuestionsEnv, max_questions=self.max_questions, question_cost=self.question_cost, answerer=answerer
        )


@chz.chz
class TwentyQuestionsExamplesBuilder(TwentyQuestions, TextGameExamplesBuilder):
    """Questions to imitate, and the guess when one thing is left."""
