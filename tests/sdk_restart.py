"""Runs in the Tinker SDK's own Python, against a server that is killed and started again:
`python sdk_restart.py train_and_save [PATH]` or `five_steps`. test_serve_sdk.py starts it.
"""

import json
import sys

from sdk_checks import datum, logprobs, model, service, step  # pyright: ignore[reportMissingImports]


def train_and_save(path: str = "") -> None:
    """Three steps and a checkpoint; prints its path, then goes on training without end. With a path: two
    steps from it; prints the logprobs."""
    if not path:
        client = model()
        for _ in range(3):
            step(client, [datum()])
        print(json.dumps(client.save_state("before").result().path), flush=True)
        while True:
            step(client, [datum()])
    client = service().create_training_client_from_state_with_optimizer(path)
    for _ in range(2):
        step(client, [datum()])
    print(json.dumps(logprobs(client, [datum()]).tolist()), flush=True)


def five_steps() -> None:
    client = model()
    for _ in range(5):
        step(client, [datum()])
    print(json.dumps(logprobs(client, [datum()]).tolist()), flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
