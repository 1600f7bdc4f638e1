"""Classic environments of the verifiers library (0.1), as packages write them. Skipped where the later
library is installed, or none (docs/verifiers.md says how to install 0.1)."""

import asyncio
from pathlib import Path

import pytest

from envs.problem import GraderError
from posttrain.backend.errors import ConfigError
from posttrain.renderers import get_renderer
from rl.rollouts import RolloutLimits
from tests.test_verifiers_adapter import LIBRARY, TOKENIZER, builder, groups, play

pytestmark = pytest.mark.skipif(not LIBRARY.startswith("0.1."), reason="verifiers 0.1 is not installed")

MODULES = {
    "pt_single": """
import verifiers as vf
from datasets import Dataset

def load_environment(words=("ant", "bee")):
    def exact(completion, answer, **kwargs):
        said = completion[-1]["content"]
        if said == "raise":
            raise KeyError("x")
        return float(said == answer)

    async def length(completion):
        if completion[-1]["content"] == "raise later":
            raise KeyError("y")
        return len(completion[-1]["content"])

    rubric = vf.Rubric(funcs=[exact, length], weights=[2.0, 0.0])
    rows = Dataset.from_list([{"question": word, "answer": word[::-1]} for word in words])
    return vf.SingleTurnEnv(dataset=rows, system_prompt="Reverse.", rubric=rubric)
""",
    "pt_hints": """
import verifiers as vf
from datasets import Dataset

class Hints(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["turns"] = 0

    async def env_response(self, messages, state, **kwargs):
        state["turns"] += 1
        if messages[-1]["content"] == "crash":
            raise vf.ToolError("the world is broken")
        return [{"role": "user", "content": f"hint {state['turns']}"}]

    @vf.stop
    async def found(self, state):
        return bool(state["trajectory"]) and state["trajectory"][-1]["completion"][-1]["content"] == "found"

def load_environment():
    def turns(state):
        return float(len(state["trajectory"]))
    return Hints(dataset=Dataset.from_list([{"question": "?", "answer": ""}]), rubric=vf.Rubric(funcs=[turns]))
""",
    "pt_tool": '''
import verifiers as vf
from datasets import Dataset

async def stamp(message: str) -> str:
    """Says the message again, with a stamp.

    Args:
        message: what is said
    """
    return f"{message} [ok-7f3]"

def load_environment():
    def stamped(completion):
        return float(any("ok-7f3" in str(message["content"]) for message in completion if message["role"] == "tool"))
    rows = Dataset.from_list([{"question": "Call the tool.", "answer": ""}])
    return vf.ToolEnv(dataset=rows, tools=[stamp], rubric=vf.Rubric(funcs=[stamped]))
''',
    "pt_group": """
import verifiers as vf
from datasets import Dataset

def load_environment():
    def ranked(completions):
        return [0.0 for _ in completions]
    return vf.SingleTurnEnv(dataset=Dataset.from_list([{"question": "?", "answer": ""}]), rubric=vf.Rubric([ranked]))
""",
}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_rewards_and_metrics_are_the_librarys():
    """As the hub writes its names: owner/name@version."""
    totals = {play(builder("me/pt-single@1.0", seed=1), said).get_total_rewards()[0] for said in ("tna", "eeb")}
    assert totals == {2.0, 0.0}
    transition = play(builder("pt-single"), "tna").trajectories_G[0].transitions[0]
    assert transition.metrics["length"] == 3.0 and transition.metrics["num_turns"] == 1.0
    assert "Reverse." in TOKENIZER.decode(transition.ob.to_ints())
    assert len(asyncio.run(groups(builder("pt-single", env_config='{"words": ["a", "b", "c"]}')))) == 3


# Trap: the library scores a reward that raises as 0.
@pytest.mark.parametrize("said, error", [("raise", "the reward exact: KeyError"), ("raise later", "the reward length")])
def test_a_reward_that_raises_is_a_failed_rollout(said, error):
    group = play(builder("pt-single"), said)
    assert group.trajectories_G == [] and isinstance(group.errors[0], GraderError) and error in str(group.errors[0])


def test_several_turns_keep_the_sampled_tokens():
    first, second, third = play(builder("pt-hints"), "a", "b", "found").trajectories_G[0].transitions
    assert second.ob.to_ints()[: first.ob.length + len(first.ac.tokens)] == first.ob.to_ints() + first.ac.tokens
    assert "hint 2" in TOKENIZER.decode(third.ob.to_ints()) and third.reward == 3.0
    limited = play(builder("pt-hints"), "a", "b", limits=RolloutLimits(max_turns=2))
    assert limited.trajectories_G[0].stop_reason == "max_turns" and limited.get_total_rewards() == [2.0]
    assert "the world is broken" in str(play(builder("pt-hints"), "crash").errors[0])


def test_tools_are_called():
    called = '<tool_call>\n{"name": "stamp", "arguments": {"message": "hi"}}\n</tool_call>'
    group = play(builder("pt-tool"), called, "done", renderer=get_renderer("chat_template", TOKENIZER))
    first, second = group.trajectories_G[0].transitions
    assert group.get_total_rewards() == [1.0] and "stamp" in TOKENIZER.decode(first.ob.to_ints())
    assert "hi [ok-7f3]" in TOKENIZER.decode(second.ob.to_ints())


@pytest.mark.parametrize(
    "name, error", [("pt-nothing", "install its package first"), ("pt-group", "it scores a group as a whole")]
)
def test_what_cannot_be_used_is_refused(name, error):
    with pytest.raises(ConfigError, match=error):
        asyncio.run(groups(builder(name)))
