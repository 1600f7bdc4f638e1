"""Transcripts of episodes with several turns, seats and failures, and the page that lists them."""

import json
from html.parser import HTMLParser

import numpy as np

from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.types import ModelInput
from posttrain.renderers.turns import encode
from rl.transcripts import write_rollouts
from rl.types import EnvGroupBuilder, EnvTimeout, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition

TOKENIZER = character_tokenizer(512)


class Game(EnvGroupBuilder):
    members_are_independent = False

    async def make_envs(self):
        return []


class Text(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.text, self.links = "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href"]

    def handle_data(self, data):
        self.text += data


def turn(prompt: str, said: str, reward: float = 0.0, token_advantages: list[float] | None = None) -> Transition:
    tokens = encode(TOKENIZER, said)
    action = TokensWithLogprobs(tokens, [-0.5] * len(tokens))
    ob = ModelInput.from_ints(encode(TOKENIZER, prompt))
    return Transition(ob, action, reward, False, logs={"said": said}, token_advantages=token_advantages)


def episode() -> Trajectory:
    turns = [turn("Guess 1 to 9:", "5"), turn("Guess 1 to 9:5 lower:", "2", 0.5, [0.25])]
    return Trajectory(turns, stop_reason="max_turns")


def test_a_later_turn_shows_what_is_new_and_token_advantages_are_added(tmp_path):
    group = TrajectoryGroup([episode()], [0.25], [{"solved": 0.0}], errors=[EnvTimeout("slow")], num_retries=3)
    page = write_rollouts(tmp_path, 4, [group], [np.array([0.5])], TOKENIZER)
    member, failed = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert [t["prompt_text"] for t in member["turns"]] == ["Guess 1 to 9:", " lower:"]
    assert [t["advantages"] for t in member["turns"]] == [[0.5], [0.75]]
    assert (member["total_reward"], member["final_reward"], member["stop_reason"]) == (0.75, 0.25, "max_turns")
    assert failed["error"] == "EnvTimeout: slow"
    text = Text(page.read_text()).text
    assert text.count("Guess 1 to 9:") == 2  # the turn itself, and the group's headline
    for shown in ("ended by max_turns", "3 retried", "EnvTimeout: slow", "turn 1", "solved 0", "of the group 0.25"):
        assert shown in text


def test_seats_are_side_by_side_and_repeated_text_is_folded(tmp_path):
    board = "The board is written anew every time, from the first line on, and it is a long one. " * 2
    seats = [Trajectory([turn(board + "X moves", "a1"), turn(board + "O at b2, X moves", "c3")]) for _ in range(2)]
    group = TrajectoryGroup(seats, [1.0, -1.0], [{}, {}], builder=Game())
    page = write_rollouts(tmp_path, 0, [group], None, TOKENIZER)
    html = page.read_text()
    assert 'class="seats"' in html and "seat 1" in html and "rollout 1" not in html
    assert f"{len(board)} characters as before" in html
    assert (
        json.loads(page.with_suffix(".jsonl").read_text().splitlines()[0])["turns"][1]["prompt_text"]
        == board + "O at b2, X moves"
    )


def test_the_index_lists_every_iteration_once(tmp_path):
    group = TrajectoryGroup([episode()], [0.0], [{}])
    write_rollouts(tmp_path / "test", 0, [group], None, TOKENIZER)
    for step in (10, 0, 10):  # a resumed run writes step 10 again
        write_rollouts(tmp_path, step, [group], [np.zeros(1)], TOKENIZER)
    write_rollouts(tmp_path, 20, [TrajectoryGroup([], [], [], errors=[EnvTimeout("slow")])], [np.zeros(0)], TOKENIZER)
    index = Text((tmp_path / "index.html").read_text())
    assert index.links == ["test/index.html", "000020.html", "000010.html", "000000.html"]
    assert all((tmp_path / link).exists() for link in index.links)
    records = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [record["mean_reward"] for record in records] == [0.5, 0.5, None]


def test_the_seats_of_a_game_stand_in_one_row(tmp_path):
    class TwoGames(Game):
        num_games = 2

    episodes = [Trajectory([turn("board:", f"move {n}")]) for n in range(4)]
    group = TrajectoryGroup(episodes, [1.0, -1.0, 0.0, 0.0], [{} for _ in episodes], builder=TwoGames())
    page = write_rollouts(tmp_path, 0, [group], None, TOKENIZER).read_text()
    text = Text(page).text
    rows = page.split('<div class="seats">')[1:]
    assert len(rows) == 2 and [row.count('<details class="member"') for row in rows] == [2, 2]
    assert text.count("seat 0") == text.count("seat 1") == 2 and "game 0" in text and "game 1" in text
