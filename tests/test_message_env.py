"""Environments in messages: sampled tokens are kept, conversations go on from them, and unreadable
responses follow the policy.
"""

import asyncio
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import Message, Renderer
from rl.data_processing import trajectory_rows
from rl.frozen_policy import FrozenPolicy, FrozenPolicyError, MessageCompleter
from rl.message_env import (
    EnvFromMessageEnv,
    MessageEnd,
    MessageEnv,
    MessageEnvGroupBuilder,
    MessageStep,
    ParseError,
    ParsePolicy,
)
from rl.rollouts import Policy, RolloutLimits, do_single_rollout
from rl.types import MalformedStep, Metrics, RolloutError, Trajectory
from tests.conftest import Scripted

TOKENIZER = character_tokenizer(512)


def scripted(answers: Sequence[list[int]]) -> Scripted:
    """A policy that answers with given tokens, one list after the other."""
    left = list(answers)
    return Scripted(lambda _: left.pop(0), max_length=512)


class Echo(MessageEnv):
    """Says back what it hears, `turns` times; "?" cannot be read."""

    def __init__(self, turns: int = 3, role: str = "user"):
        self.turns, self.role, self.heard, self.closed = turns, role, [], False

    async def initial_messages(self) -> list[Message]:
        return [Message(role="user", content="Say something.")]

    async def step(self, message: Message) -> MessageStep:
        if "?" in message["content"]:
            raise ParseError("No questions.")
        self.heard.append(message["content"])
        if len(self.heard) == self.turns:
            return MessageStep(1.0, True, metrics={"words": len(self.heard)})
        return MessageStep(0.0, False, [Message(role=self.role, content=f"you said {message['content']}")])

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        return -0.25, {"words": len(self.heard)}

    async def close(self) -> None:
        self.closed = True


def roll_out(
    renderer: Renderer, env: Echo, answers: Sequence[list[int]], parse: ParsePolicy | None = None, **limits
) -> Trajectory:
    policy = Policy(scripted(answers), max_tokens=50)
    return asyncio.run(
        do_single_rollout(policy, EnvFromMessageEnv(renderer, env, parse), (0,), RolloutLimits(**limits))
    )


def one_sequence(trajectory: Trajectory) -> list[int]:
    """The tokens of an episode whose observations each begin with all that came before them."""
    for turn, following in zip(trajectory.transitions, trajectory.transitions[1:], strict=False):
        so_far = turn.ob.to_ints() + turn.ac.tokens
        assert following.ob.to_ints()[: len(so_far)] == so_far
    assert len(trajectory_rows(trajectory)) == 1
    last = trajectory.transitions[-1]
    return last.ob.to_ints() + last.ac.tokens


@pytest.mark.parametrize(
    ("renderer", "stop", "expected"),
    [
        (
            PlainRenderer(TOKENIZER),
            "<|endoftext|>",
            "Say something.a<|endoftext|>you said a b <|endoftext|>you said  b c<|endoftext|>",
        ),
        (
            RoleColonRenderer(TOKENIZER),
            "\n\nUser:",
            "User: Say something.\n\nAssistant:a\n\nUser: you said a\n\nAssistant: b \n\nUser: you said b "
            "\n\nAssistant:c\n\nUser:",
        ),
        (
            ChatTemplateRenderer(TOKENIZER),
            "<|im_end|>",
            "<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nyou "
            "said a<|im_end|>\n"
            "<|im_start|>assistant\n b <|im_end|>\n<|im_start|>user\nyou said  b "
            "<|im_end|>\n<|im_start|>assistant\nc<|im_end|>",
        ),
    ],
    ids=["plain", "role_colon", "chat_template"],
)
def test_an_episode_is_one_sequence_of_what_was_said(renderer: Renderer, stop: str, expected: str):
    trajectory = roll_out(renderer, Echo(), [encode(TOKENIZER, text + stop) for text in ("a", " b ", "c")])
    assert decode(TOKENIZER, one_sequence(trajectory)) == expected
    assert trajectory.reward == 1 and trajectory.transitions[-1].metrics == {
        "parse_error": 0,
        "truncated": 0,
        "words": 3,
    }


def merging_tokenizer(first: str = "a", second: str = "b") -> PreTrainedTokenizerFast:
    """Bytes, and one merge: "ab" is a single token whenever text is encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|end|>", *letters, first + second])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(first, second)]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=512)


# Trap: sampled tokens re-tokenized on the way into the next prompt.
@pytest.mark.parametrize("kind", [PlainRenderer, RoleColonRenderer])
def test_sampled_tokens_are_kept_where_their_text_is_tokenized_otherwise(
    kind: type[PlainRenderer] | type[RoleColonRenderer],
):
    tokenizer = merging_tokenizer()
    a, b = encode(tokenizer, "a") + encode(tokenizer, "b")
    assert len(encode(tokenizer, "ab")) == 1
    renderer = kind(tokenizer)
    stop = renderer.get_stop_sequences()[0]
    action = [a, b, *(encode(tokenizer, stop) if isinstance(stop, str) else [stop])]
    env = Echo()
    tokens = one_sequence(roll_out(renderer, env, [action] * 3))
    assert env.heard == ["ab"] * 3
    assert sum(pair == (a, b) for pair in zip(tokens, tokens[1:], strict=False)) == 3
    assert encode(tokenizer, "ab")[0] in tokens  # what the environment says is encoded as usual


# Trap: a reply's line break joins the prompt's, and the conversation is tokenized anew.
def test_a_reply_that_begins_with_a_line_break_is_kept():
    tokenizer = merging_tokenizer("Ċ", "Ċ")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    renderer = ChatTemplateRenderer(tokenizer)
    assert renderer.has_extension_property
    replies = ["\nab", "a", "\n\nb", "\n\na<tool_call>b</tool_call>", "\n\nb<think>a", "b"]
    trajectory = roll_out(renderer, Echo(len(replies)), [encode(tokenizer, text + "<|end|>") for text in replies])
    tokens = one_sequence(trajectory)
    assert trajectory.reward == 1 and len(trajectory.transitions) == len(replies)
    assert decode(tokenizer, tokens).count("assistant:\n\nab<|end|>user:\nyou said \nab<|end|>assistant:\na") == 1


def test_a_conversation_goes_on_from_a_stop_that_was_not_sampled():
    """A base model ends by EOS; a response that is cut off ends by nothing. The next speaker is
    announced all the same.
    """
    renderer = RoleColonRenderer(TOKENIZER)
    by_eos = [*encode(TOKENIZER, " a"), TOKENIZER.eos_token_id]
    trajectory = roll_out(renderer, Echo(2), [by_eos, encode(TOKENIZER, " b\n\nUser:")])
    expected = "User: Say something.\n\nAssistant: a<|endoftext|>\n\nUser: you said a\n\nAssistant: b\n\nUser:"
    assert decode(TOKENIZER, one_sequence(trajectory)) == expected
    cut_off = roll_out(
        PlainRenderer(TOKENIZER),
        Echo(1),
        [encode(TOKENIZER, "abc"), encode(TOKENIZER, "d<|endoftext|>")],
        ParsePolicy(retries=1),
    )
    assert decode(TOKENIZER, one_sequence(cut_off)).startswith("Say something.abc<|endoftext|>Your answer was too long")
    assert [turn.metrics["truncated"] for turn in cut_off.transitions] == [1, 0]
    assert [turn.metrics["parse_error"] for turn in cut_off.transitions] == [1, 0] and cut_off.reward == 1


# Trap: templates that rewrite history trained on as one sequence.
def test_templates_that_rewrite_what_was_said_are_rendered_anew():
    tokenizer = character_tokenizer(512)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = ChatTemplateRenderer(tokenizer)
    assert not renderer.has_extension_property
    trajectory = roll_out(renderer, Echo(2), [encode(tokenizer, f"<think>x</think>{text}<|im_end|>") for text in "ab"])
    assert "<think>" not in decode(tokenizer, trajectory.transitions[1].ob.to_ints())
    assert len(trajectory_rows(trajectory)) == 2  # each with the tokens that were sampled
    assert trajectory.transitions[1].ac.tokens == encode(tokenizer, "<think>x</think>b<|im_end|>")


def test_role_colon_is_rendered_anew_where_somebody_else_than_the_user_speaks():
    trajectory = roll_out(RoleColonRenderer(TOKENIZER), Echo(2, role="tool"), [encode(TOKENIZER, " a\n\nUser:")] * 2)
    expected = "User: Say something.\n\nAssistant: a\n\nTool: you said a\n\nAssistant:"
    assert decode(TOKENIZER, trajectory.transitions[1].ob.to_ints()) == expected


def say(text: str) -> list[int]:
    return encode(TOKENIZER, text + "<|endoftext|>")


def test_an_unreadable_response_ends_the_episode_with_its_reward_and_the_episodes_metrics():
    env = Echo()
    trajectory = roll_out(PlainRenderer(TOKENIZER), env, [say("a"), say("what?")])
    # the policy's -1, and what the environment adds
    assert [turn.reward for turn in trajectory.transitions] == [0, -1.25]
    assert trajectory.transitions[-1].metrics == {"parse_error": 1, "truncated": 0, "words": 1}
    assert trajectory.transitions[-1].logs == {"parse error": "No questions."} and env.heard == ["a"] and env.closed


def test_the_model_may_try_again_as_often_as_the_policy_says():
    answers = [say("?"), say("a"), say("??"), say("?")]
    parse = ParsePolicy(retries=2, failed_parse_reward=-0.5)
    trajectory = roll_out(PlainRenderer(TOKENIZER), Echo(), answers, parse)
    text = decode(TOKENIZER, one_sequence(trajectory))
    assert text.count("No questions.") == 2 and text.count("you said a") == 1
    assert [turn.reward for turn in trajectory.transitions] == [0, 0, 0, -0.75]
    assert [turn.metrics["parse_error"] for turn in trajectory.transitions] == [1, 0, 1, 1]


def test_an_environment_that_says_nothing_cannot_be_scored():
    class Silent(Echo):
        async def step(self, message: Message) -> MessageStep:
            return MessageStep(0.0, False)

    with pytest.raises(MalformedStep, match="Silent.step neither ended the episode nor said anything"):
        roll_out(PlainRenderer(TOKENIZER), Silent(), [say("a")])


@pytest.mark.parametrize(
    ("method", "returns", "error"),
    [
        ("initial_messages", "Hello", "what Careless.initial_messages returned is 'Hello', not a list of messages"),
        ("initial_messages", [{"role": "user"}], "a message has a 'role' and a 'content', both texts"),
        ("initial_messages", [{"role": "human", "content": "Hello"}], "has the role 'human'; roles are system"),
        ("step", None, "Careless.step returned None, not a MessageStep"),
        ("step", (1.0, True), r"Careless.step returned \(1.0, True\), not a MessageStep"),
        ("step", MessageStep(0.0, False, "Hello"), "next_messages of Careless.step is 'Hello', not a list of messages"),  # type: ignore[arg-type]
        ("step", MessageStep(None, True), "Careless.step: the reward is None, not a number"),  # type: ignore[arg-type]
        ("step", MessageStep(0.0, True, metrics=["won"]), "Careless.step: the metrics are .'won'., not a dict"),  # type: ignore[arg-type]
        ("cut_short", 0.5, "Careless.cut_short: 0.5 is not a reward and a dict of metrics"),
    ],
)
def test_what_a_message_env_returns_is_checked_under_its_own_name(method: str, returns: object, error: str):
    class Careless(Echo):
        pass

    async def careless(self, *_):
        return returns

    setattr(Careless, method, careless)
    with pytest.raises(RolloutError, match=error):
        roll_out(PlainRenderer(TOKENIZER), Careless(), [say("a"), say("b")], max_turns=1)


@pytest.mark.parametrize("method", ["initial_messages", "step", "cut_short", "close"])
def test_a_method_of_a_message_env_that_is_not_async_is_named(method: str):
    class Careless(Echo):
        pass

    setattr(Careless, method, lambda self, *_: "x")
    with pytest.raises(RolloutError, match=f"Careless.{method} returned 'x' without being an `async def`"):
        roll_out(PlainRenderer(TOKENIZER), Careless(), [say("a")], max_turns=1)


@pytest.mark.parametrize("method", ["initial_messages", "step", "cut_short", "close"])
def test_a_method_of_a_message_env_that_raises_is_named(method: str):
    class Careless(Echo):
        pass

    async def careless(self, *_):
        raise OSError("no disk")

    setattr(Careless, method, careless)
    with pytest.raises(RolloutError, match=f"Careless.{method} raised OSError: no disk"):
        roll_out(PlainRenderer(TOKENIZER), Careless(), [say("a"), say("b")], max_turns=1)


def test_each_member_of_a_group_needs_a_message_env_of_its_own():
    def error_of(thunk) -> str:
        with pytest.raises(MalformedStep) as raised:
            asyncio.run(MessageEnvGroupBuilder(thunk, 2, PlainRenderer(TOKENIZER)).make_envs())
        return str(raised.value)

    shared = Echo()
    assert "Echo: each member of a group needs an environment of its own" in error_of(lambda: shared)
    assert "in place of a MessageEnv there is 'an Echo'" in error_of(lambda: "an Echo")


def test_limits_of_the_run_reach_the_message_env():
    env = Echo()
    trajectory = roll_out(PlainRenderer(TOKENIZER), env, [say("a"), say("b")], max_turns=2)
    assert trajectory.stop_reason == "max_turns" and trajectory.reward == -0.25 and env.closed
    assert trajectory.transitions[-1].metrics["words"] == 2


def complete(client: SamplingClient, max_tokens: int = 8) -> str:
    completer = MessageCompleter(client, PlainRenderer(TOKENIZER), max_tokens)
    return asyncio.run(completer([Message(role="user", content="Yes?")]))["content"]


def test_a_frozen_policy_answers_in_messages_or_raises_a_rollout_error():
    assert complete(scripted([say("yes")])) == "yes"
    with pytest.raises(FrozenPolicyError, match="had not finished after 8 tokens: 'yes and'"):
        complete(scripted([encode(TOKENIZER, "yes and")]))
    with pytest.raises(ConfigError, match="one of the two"):
        FrozenPolicy()
    policy = FrozenPolicy(base_model="tiny", renderer_name="plain", max_tokens=4, backend=BackendConfig(engine="torch"))
    completer = policy.open_completer()
    # random weights do not know how to end
    with pytest.raises(FrozenPolicyError, match="had not finished"):
        asyncio.run(completer([Message(role="user", content="Yes?")]))
    with pytest.raises(FrozenPolicyError, match="ContextLengthError"):
        asyncio.run(completer([Message(role="user", content="long " * 200)]))
