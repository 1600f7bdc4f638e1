"""Questions over a local corpus, with a search tool: BM25 (Robertson and Zaragoza 2009) by the
library bm25s. reward = 1 if the answer is one of the accepted ones, compared as SQuAD does, else 0.
Corpus: JSONL of {"title": ..., "text": ...}; questions: JSONL of {"question": ..., "answer": a text
or a list}. Without files, an invented country whose facts no model has read.
"""

import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import chz
import numpy as np

from envs.tool_games import ToolGame, ToolGameBuilder, ToolGameExamplesBuilder, called
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.extras import need
from posttrain.backend.ranges import COUNT, SEED
from posttrain.renderers.types import Message
from rl.tool_env import ToolEnv, ToolLimits
from rl.tools import Tool, tool
from supervised.rows import Fields, read_rows, text_of


class Question(NamedTuple):
    """`queries` find the answer, one search after the other, for demonstrations."""

    question: str
    answers: tuple[str, ...]
    queries: tuple[str, ...]


class Library(NamedTuple):
    passages: tuple[str, ...]
    questions: tuple[Question, ...]


class Index:
    """BM25 over passages, with k1 = 1.5 and b = 0.75. A word is a run of letters or digits."""

    def __init__(self, passages: Sequence[str], most: int):
        need("bm25s", "env=retrieval")
        import bm25s

        self.passages, self.most = list(passages), min(most, len(passages))
        self.bm25 = bm25s.BM25(k1=1.5, b=0.75, backend="numpy")
        self.bm25.index([words(passage) for passage in self.passages], show_progress=False)

    def find(self, query: str) -> list[str]:
        """The best passages, best first; none that shares no word with the query."""
        known = [word for word in words(query) if word in self.bm25.vocab_dict]
        if not known:
            return []
        indices, scores = self.bm25.retrieve([known], k=self.most, show_progress=False)
        return [self.passages[i] for i, score in zip(indices[0], scores[0], strict=True) if score > 0]

    def search(self, query: str) -> str:
        """Passages of the library that fit a query, best first.

        Args:
            query: names and words that the passage should have
        """
        return "\n".join(self.find(query)) or "nothing was found"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def normalized(answer: str) -> str:
    """Lower case without punctuation, articles and extra spaces, as in SQuAD's evaluation; but "A", of which
    nothing would be left, stays: an empty answer is not equal to it."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or answer.lower().strip()


def score(answer: str, answers: Sequence[str]) -> float:
    return float(normalized(answer) in [normalized(accepted) for accepted in answers])


def invented(seed: int, people: int) -> Library:
    """Passages about people and their towns, and questions that need one search or two."""
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]

    def names(count: int, length: int) -> list[str]:
        made: dict[str, None] = {}
        while len(made) < count:
            made["".join(rng.choice(syllables, length)).capitalize()] = None
        return list(made)

    towns, rivers = names(40, 3), names(40, 2)
    passages = [f"{town} lies on the river {river}." for town, river in zip(towns, rivers, strict=True)]
    trades = ["baker", "smith", "painter", "sailor", "judge", "tailor", "miller", "potter"]
    questions = []
    for first, last in zip(names(people, 2), names(people, 3), strict=True):
        name, trade, year = f"{first} {last}", rng.choice(trades), int(rng.integers(1800, 2000))
        home = int(rng.integers(len(towns)))
        passages.append(f"{name}, a {trade}, was born in {towns[home]} in {year}.")
        questions += [
            Question(f"What was {name} by trade?", (str(trade),), (name,)),
            Question(f"When was {name} born?", (str(year),), (name,)),
            Question(f"On which river was {name} born?", (rivers[home],), (name, towns[home])),
        ]
    return Library(tuple(passages), tuple(questions))


@lru_cache(maxsize=4)
def library_of(corpus: str | None, questions: str | None, seed: int, people: int) -> Library:
    """The files' passages and questions, or invented ones. DataError with the line for a bad row."""
    if corpus is None or questions is None:
        return invented(seed, people)
    passages = [_passage(where, row) for where, row in read_rows(corpus)]
    return Library(tuple(passages), tuple(_question(where, row) for where, row in read_rows(questions)))


@lru_cache(maxsize=4)
def index_of(library: Library, most: int) -> Index:
    return Index(library.passages, most)


def _passage(where: str, row: Fields) -> str:
    title = text_of(where, row, "title") + ": " if row.get("title") else ""
    return title + text_of(where, row, "text")


def _question(where: str, row: Fields) -> Question:
    question, answers = text_of(where, row, "question"), row.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise DataError(f"{where}: the field 'answer' must be a text or a list of texts, not {str(answers)[:80]}")
    return Question(question, tuple(answers), (question,))


@chz.chz
class Retrieval(ToolGame):
    """Questions and the corpus that answers them."""

    corpus: str | None = chz.field(default=None, doc="JSONL file of passages, {title, text}; None = invented ones")
    questions: str | None = chz.field(default=None, doc="JSONL file of {question, answer}; None = invented ones")
    num_people: int = chz.field(default=300, validator=COUNT, doc="people of the invented corpus, each in 3 questions")
    corpus_seed: int = chz.field(default=0, validator=SEED, doc="seed of the invented corpus")
    num_passages: int = chz.field(default=3, validator=COUNT, doc="most passages that one search returns")
    prompt: str = chz.field(
        default="{question} Search, then reply with the answer alone.", doc="first message of an episode"
    )

    @chz.validate
    def _check(self) -> None:
        if (self.corpus is None) != (self.questions is None):
            raise ConfigError("corpus and questions are two files that belong together: give both or none")

    def library(self) -> Library:
        return library_of(self.corpus, self.questions, self.corpus_seed, self.num_people)

    def index(self) -> Index:
        return index_of(self.library(), self.num_passages)

    def tools(self) -> list[Tool]:
        return [tool(self.index().search)]

    def tasks(self) -> Sequence[Question]:
        return self.library().questions

    def split(self) -> tuple[list[Question], list[Question]]:
        """A question that is held out is not trained on where a file has it again."""
        train, test = super().split()
        held_out = {task.question for task in test}
        return [task for task in train if task.question not in held_out], test

    def demonstration(self, task: Question, rng: np.random.Generator) -> list[Message]:
        """The searches that find the answer, then the answer."""
        queries = task.queries if self.use_tools else ()
        calls = [message for query in queries for message in called("search", self.index().search(query), query=query)]
        return [asked(task, self.prompt), *calls, Message(role="assistant", content=task.answers[0])]


def asked(task: Question, prompt: str) -> Message:
    return Message(role="user", content=prompt.replace("{question}", task.question))


def open_question(task: Question, prompt: str, tools: list[Tool], limits: ToolLimits) -> ToolEnv:
    return ToolEnv([asked(task, prompt)], tools, partial(score, answers=task.answers), limits)


@chz.chz
class RetrievalBuilder(Retrieval, ToolGameBuilder):
    """Questions to answer by searching, by reinforcement learning."""

    tag: str = chz.field(default="retrieval", doc="name under which metrics are logged too")

    def open_env(self) -> Callable[[Question], ToolEnv]:
        return partial(open_question, prompt=self.prompt, tools=self.offered(), limits=self.limits)


@chz.chz
class RetrievalExamplesBuilder(Retrieval, ToolGameExamplesBuilder):
    """Searches and answers to imitate."""
