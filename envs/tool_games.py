"""Games whose player has tools: a TextGame with the tools in its prompts. `use_tools=false` is the
same game without them, to compare with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chz

from envs.text_games import TextGame, TextGameBuilder, TextGameExamplesBuilder
from posttrain.renderers import with_tools
from posttrain.renderers.types import Message, Part, Renderer
from rl.tool_env import ToolLimits
from rl.tools import Tool, tools_by_name
from rl.types import RLDataset
from supervised.types import SupervisedDataset


@chz.chz
class ToolGame(TextGame):
    """Tasks and tools, for both builders of a game."""

    use_tools: bool = chz.field(default=True, doc="offer the tools; false = the same tasks, answered from memory")
    list_tools: bool = chz.field(
        default=True, doc="list the tools in every prompt; false = the model learns what there is by its training"
    )

    def tools(self) -> Sequence[Tool | Callable[..., Any]]:
        """The tools of the game, or functions to make them of; read only if `use_tools`."""
        raise NotImplementedError

    def offered(self) -> list[Tool]:
        return list(tools_by_name(self.tools()).values()) if self.use_tools else []

    def offer(self, renderer: Renderer) -> Renderer:
        """The renderer with the tools."""
        tools = self.offered()
        return with_tools(renderer, [tool.spec for tool in tools], self.list_tools) if tools else renderer


@chz.chz
class ToolGameBuilder(ToolGame, TextGameBuilder):
    """A game with tools to play by RL. Every episode is a rl.tool_env.ToolEnv."""

    limits: ToolLimits = chz.field(default_factory=ToolLimits, doc="what an episode may do before it has to answer")

    def recommended_max_tokens(self) -> int:
        return 128

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        return await super().__call__(self.offer(renderer))


@chz.chz
class ToolGameExamplesBuilder(ToolGame, TextGameExamplesBuilder):
    """Episodes to imitate."""

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        return super().__call__(self.offer(renderer))


def called(name: str, answer: str, **arguments: object) -> list[Message]:
    """A call and its answer, for demonstrations."""
    call: Part = {"type": "tool_call", "id": "call00001", "name": name, "arguments": dict(arguments)}
    return [
        Message(role="assistant", content="", parts=[call]),
        Message(role="tool", content=answer, name=name, tool_call_id="call00001"),
    ]
