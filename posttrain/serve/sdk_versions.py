"""Which versions of the tinker SDK talk to this server."""

from posttrain.backend.errors import ConfigError

OLDEST, NEWEST_TESTED = (0, 22, 7), (0, 38)


def check_version(version: str) -> list[str]:
    """Warns of a version newer than those tested. ConfigError for one that is too old."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if not numbers:
        return []
    if numbers < OLDEST:
        raise ConfigError(
            f"tinker {version[:40]} speaks an older protocol than this server: install one from "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST_TESTED))}"
        )
    if numbers[:2] > NEWEST_TESTED:
        return [
            f"tinker {version[:40]} is newer than {'.'.join(map(str, NEWEST_TESTED))}, the last tested with this server"
        ]
    return []
