"""Loads a taskset of the verifiers library (0.4) and scores answers, as a process.

verifiers_adapter.py starts this file with the interpreter of an environment that has verifiers. It
ends when its standard input closes. One JSON line in, one out; any reply may be {"failed": why}:

    in:   {"taskset": "gsm8k", "config": {...}, "limit": 100}         out: {"tasks": [[{"role": ..., "content": ...}, ...], ...]}
    in:   {"task": 3, "answer": "..."}                                out: {"reward": 0.9, "rewards": {...}, "metrics": {...}}
"""

# pyright: reportMissingImports=false
# (verifiers is not installed where this project is checked)

import asyncio
import inspect
import json
import sys
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.graph import MessageNode
from verifiers.v1.state import state_cls
from verifiers.v1.utils.generic import concrete_type
from verifiers.v1.utils.loaders import environment_class, taskset_class


def load(taskset_id: str, config: dict[str, Any], limit: int) -> list[vf.Task]:
    cls = taskset_class(taskset_id)
    if environment_class(taskset_id) is not vf.SingleAgentEnv:
        raise ValueError("it has an Env class of its own: several agents, or a user that answers")
    config_class = concrete_type(cls, vf.TasksetConfig) or vf.TasksetConfig
    taskset = cls(config_class.model_validate({**config, "id": taskset_id}))
    if taskset.toolsets(taskset.config):
        raise ValueError("its tasks share tools")
    tasks = list(taskset.take(limit))
    for task in tasks:
        if why := why_not(task):
            raise ValueError(f"task {task.data.idx} {why}")
    return tasks


def why_not(task: vf.Task) -> str:
    """The reason why one answer in text does not suffice for a task, or ""."""
    hooks = [*task.hooks("reward"), *task.hooks("metric"), *(judge.score for judge in task.plugged_judges())]
    needs_runtime = [hook.__name__ for hook in hooks if "runtime" in inspect.signature(hook).parameters]
    reasons = {
        "needs a container": task.NEEDS_CONTAINER or task.data.image,
        "has tools": task.toolsets(task.config),
        "prepares a runtime": type(task).setup is not vf.Task.setup or type(task).finalize is not vf.Task.finalize,
        f"is scored in a runtime ({', '.join(needs_runtime)})": needs_runtime,
        "has no prompt": not task.data.prompt,
        "has a prompt that is not text": not all(isinstance(message["content"], str) for message in messages(task)),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def messages(task: vf.Task) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt else []
    prompt = task.data.prompt or []
    if isinstance(prompt, str):
        return [*system, {"role": "user", "content": prompt}]
    return [*system, *({"role": message.role, "content": message.content} for message in prompt)]


async def score(task: vf.Task, answer: str) -> dict[str, Any]:
    """Rewards and metrics of a conversation that ends with the answer, as the library records it."""
    conversation = [*messages(task), {"role": "assistant", "content": answer}]
    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    trace = vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        state=state_cls(type(task))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=[
            MessageNode(
                parent=i - 1 if i else None,
                message=kinds[message["role"]](content=message["content"]),
                sampled=i == len(conversation) - 1,
            )
            for i, message in enumerate(conversation)
        ],
    )
    trace.stop("agent_completed")
    await task.score(trace)
    rewards = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    metrics = {name: value for name, value in trace.metrics.items() if value is not None}
    return {"reward": trace.reward, "rewards": rewards, "metrics": metrics}


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # a task's prints are no replies
    tasks: list[vf.Task] = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "taskset" in request:
                tasks = load(request["taskset"], request["config"], request["limit"])
                reply = {"tasks": [messages(task) for task in tasks]}
            else:
                reply = asyncio.run(score(tasks[request["task"]], request["answer"]))
        except Exception as error:  # another project's code may raise anything
            reply = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
