"""A shop's assistant, an agent as anyone writes it with the `openai` package: it asks the model, runs
the tools the model calls, and returns the model's last words. Nothing here knows of training.
"""

import json
from typing import Any

import openai

from envs.problem import Problem
from rl.agent_endpoint import Endpoint

ITEMS = ("tea", "oil", "rice", "salt", "milk", "corn", "soap", "wool", "coal", "silk", "iron", "wine")
SHOP = {
    "price": {item: str(13 + 7 * n) for n, item in enumerate(ITEMS)},
    "stock": {item: str(96 - 5 * n) for n, item in enumerate(ITEMS)},
}
MOST_CALLS = 3


def use_tool(name: str, arguments: str) -> str:
    """The price or the stock of an item; a text for the model where the call is wrong."""
    try:
        return SHOP[name][json.loads(arguments)["item"]]
    except (KeyError, TypeError, ValueError):
        return "there is no such tool or item"


async def assistant(problem: Problem, endpoint: Endpoint) -> str:
    http = openai.DefaultAsyncHttpxClient(verify=False)  # loopback: reading the certificates takes 17 ms
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=http) as client:
        messages: list[Any] = [{"role": "user", "content": problem.question}]
        for _ in range(MOST_CALLS):
            answer = await client.chat.completions.create(model=endpoint.model, messages=messages)
            message = answer.choices[0].message
            if not message.tool_calls:
                return message.content or ""
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                result = use_tool(call.function.name, call.function.arguments)  # type: ignore[union-attr]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        return ""
