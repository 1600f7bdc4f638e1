"""Simple stories from a seed, after TinyStories (Eldan & Li 2023), and a checker of their
consistency.

A story is a sequence of stages, each filled from one of three templates. Facts drawn once (hero,
place, thing, helper, tool) fill all slots, so that the end determines much of the middle: infilling
takes planning, and `mistakes` checks it exactly.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np

# --- values of each fact, and templates of each stage in order -----------------------------------

VALUES = {
    "hero": (
        "Ada, Adam, Amy, Anna, Ben, Bella, Beth, Carl, Cara, Clara, Cleo, Dan, Dora, Drew, Ed, Emil, Emma, Eva, Finn, "
        "Fay, Flora, Gus, Grace, Greta, Hugo, Hana, Hope, Ian, Ida, Iris, Jack, Jon, Jill, June, Karl, Kate, Kim, "
        "Leo, Lily, Luke, Mark, Max, Mia, Nick, Nina, Nora, Otto, Olga, Owen, Paul, Pia, Rob, Rosa, Ruth, Sam, Sara, "
        "Sue, Tim, Tess, Tom, Uma, Vera, Will, Zoe"
    ),
    "child": "girl, boy, child",
    "trait": "little, kind, shy, brave, clever, curious, funny, gentle, happy, quiet, playful, polite, cheerful, "
    "careful, honest, lively",
    "color": "red, blue, green, yellow, pink, purple, orange, white, silver, golden, brown, striped",
    "thing": "ball, kite, hat, doll, boat, drum, book, toy, balloon, scarf, car, shoe, ring, key, cup, robot, puzzle",
    "weather": "sunny, windy, cold, warm, bright, cloudy, snowy, rainy",
    "place": "park, beach, forest, garden, farm, lake, hill, river, market, meadow, zoo, playground",
    "spot": (
        "under a big rock, on the roof, in a tall tree, behind the wall, in a deep hole, at the bottom of the pond, "
        "inside a thorny bush, on a high branch, between two logs, across the stream"
    ),
    "animal": "dog, cat, bird, frog, rabbit, fox, mouse, duck, squirrel, bear, goat, pony, turtle, owl, hedgehog, "
    "beaver",
    "friend": (
        "Bibi, Coco, Dodo, Fuzzy, Gigi, Hoppy, Jumpy, Kiki, Lulu, Momo, Nibbles, Pip, Rusty, Snowy, Titi, Toto, "
        "Peanut, Button, Muffy, Sparky, Daisy, Oscar, Dusty, Ginger, Waffles, Ziggy, Bubbles"
    ),
    "tool": "ladder, rope, net, stick, bucket, shovel, broom, basket, hook, pole",
    "food": "cookie, apple, cake, banana, sandwich, carrot, pie, muffin, pear, candy, cheese, cherry",
    "game": "tag, catch, hopscotch, chess, cards, pirates",
}
FACTS = {name: tuple(values.split(", ")) for name, values in VALUES.items()}

STAGES: tuple[tuple[str, ...], ...] = (
    (
        "Once upon a time, there was a {trait} {child} named {hero}.",
        "There once was a {trait} {child} whose name was {hero}.",
        "{hero} was a {trait} {child} who lived near the {place}.",
    ),
    (
        "One {weather} day, {hero} took a {color} {thing} to the {place}.",
        "One {weather} morning, {hero} went to the {place} with a {color} {thing}.",
        "It was {weather}, so {hero} played with a {color} {thing} at the {place}.",
    ),
    (
        "But then the {thing} fell and got stuck {spot}.",
        "Suddenly, the {thing} was gone. It was {spot}!",
        "Oh no! The {color} {thing} landed {spot}.",
    ),
    (
        "A {animal} named {friend} came by and saw {hero}.",
        "Just then, {friend} the {animal} walked past the {place}.",
        "A {animal} heard the noise. The name of the {animal} was {friend}.",
    ),
    (
        '"My {thing} is {spot}," said {hero}.',
        '"Please help me get my {thing}!" said {hero}.',
        "{hero} asked {friend} for help.",
    ),
    (
        "Then {friend} had an idea and ran to get a {tool}.",
        '"I know what we need," said {friend}. "A {tool}!"',
        "{hero} saw a {tool} and gave it to {friend}.",
    ),
    (
        "With the {tool}, {friend} got the {thing} back.",
        "{hero} and {friend} used the {tool}, and soon the {thing} was safe.",
        "The {tool} was just right, and the {animal} picked up the {thing}.",
    ),
    (
        '"Thank you, {friend}!" said {hero} and gave the {animal} a {food}.',
        "{hero} was so happy that the {animal} got a {food} and a hug.",
        "{hero} shared a {food} with {friend} and thanked the {animal} for the {tool}.",
    ),
    (
        "They ate the {food} and played {game} until it was dark.",
        "Then {hero} and {friend} played {game} with the {color} {thing}.",
        "Then they played {game} at the {place} all day.",
    ),
    (
        "From that day on, {hero} and the {animal} were best friends.",
        "{hero} never forgot {friend} the {animal} and the {tool}.",
        "{hero} went home with the {thing} and told everyone about {friend}.",
    ),
)
OPTIONAL = (4, 8)  # stages that a story may omit


def generate(count: int, seed: int) -> list[str]:
    """Story i is a function of (seed, i)."""
    return [_story(np.random.default_rng([seed, i])) for i in range(count)]


def _story(rng: np.random.Generator) -> str:
    facts = {name: values[rng.integers(len(values))] for name, values in FACTS.items()}
    stages = [stage for stage in range(len(STAGES)) if stage not in OPTIONAL or rng.random() < 0.5]
    return " ".join(STAGES[stage][rng.integers(len(STAGES[stage]))].format(**facts) for stage in stages)


# --- consistency of a story ---------------------------------------------------------------------


def mistakes(story: str) -> list[str]:
    """The faults of a text, a line each: text that no template matches, contradicted facts, stages
    that are missing, repeated or out of order. [] for every story of `generate`. Templates are
    matched from left to right, the longest first.
    """
    faults, known, order = [], {}, []
    for stage, text, facts in _sentences(story.strip()):
        if stage is None:
            faults.append(f"no sentence of these stories: {text!r}")
            continue
        order.append(stage)
        for name, value in facts.items():
            if known.setdefault(name, value) != value:
                faults.append(f"the {name} is {known[name]!r}, then {value!r}")
    faults += [f"stage {stage} is missing" for stage in range(len(STAGES)) if stage not in (*order, *OPTIONAL)]
    return faults + [f"stage {later} after stage {sooner}" for sooner, later in pairwise(order) if later <= sooner]


def _sentences(story: str) -> Iterator[tuple[int | None, str, dict[str, str]]]:
    """Stage, text and facts of each matched template; stage None for text that none matches."""
    position = unread = 0
    while position < len(story):
        matches = [(stage, match) for stage, pattern in _patterns() if (match := pattern.match(story, position))]
        if not matches:
            position += 1
            continue
        stage, match = max(matches, key=lambda stage_and_match: stage_and_match[1].end())
        if lost := story[unread:position].strip():
            yield None, lost, {}
        yield stage, match[0].strip(), match.groupdict()
        position = unread = match.end()
    if lost := story[unread:].strip():
        yield None, lost, {}


@cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    return [(stage, _pattern(template)) for stage, templates in enumerate(STAGES) for template in templates]


def _pattern(template: str) -> re.Pattern[str]:
    """The template as an expression: a slot's first use captures any value of its fact, later uses
    the same value.
    """
    seen: set[str] = set()

    def slot(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(map(re.escape, FACTS[name]))})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", slot, re.escape(template)) + r"(?: |$)")
