"""The wording of the arithmetic problems: scenes with sentence templates and small word lists.

Templates name the slots they use: ``{n}`` is the number of the sentence, every other slot is drawn
once per problem. No noun follows an operand directly, so that "1" needs no singular form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Words = Mapping[str, str]
"""Slot values that belong together, such as a name and its pronouns."""


@dataclass(frozen=True)
class Scene:
    """One situation that numbers can change in.

    Attributes:
        slots: Word choices; an entry is a mapping because a choice can fill several slots at once.
        opening: Sentences that give the starting number.
        plus: Sentences that add ``{n}``.
        minus: Sentences that take ``{n}`` away.
        question: Sentences that ask for the final number.
        multiply: Sentences that multiply by ``{n}``.
        double: Sentences that multiply by 2 without saying the number.
        triple: Sentences that multiply by 3 without saying the number.
    """

    slots: Mapping[str, Sequence[Words]]
    opening: Sequence[str]
    plus: Sequence[str]
    minus: Sequence[str]
    question: Sequence[str]
    multiply: Sequence[str] = ("Soon there are {n} times as many.",)
    double: Sequence[str] = ("Then the number doubles.",)
    triple: Sequence[str] = ("Then the number triples.",)

    def templates(self, symbol: str, operand: int) -> Sequence[str]:
        """Return the sentences that can tell the operation ``symbol operand``."""
        if symbol == "+":
            return self.plus
        if symbol == "-":
            return self.minus
        return [*self.multiply, *{2: self.double, 3: self.triple}.get(operand, ())]


def render(template: str, words: Mapping[str, Words], number: int | None = None) -> str:
    """Fill the slots of a sentence and start it with a capital letter."""
    slots = {slot: word for entry in words.values() for slot, word in entry.items()}
    text = template.format(n=number, **slots)
    return text[0].upper() + text[1:]


def _each(slot: str, words: str, **others: str) -> list[Words]:
    return [{slot: word, **others} for word in words.split()]


_NAMES = [
    *_each("name", "Tom Sam Ben Max Leo", they="he", them="him"),
    *_each("name", "Ann Mia Eva Lily Kim", they="she", them="her"),
]
_FRIENDS = _each("friend", "Bob Jack Paul Sue Rose")
_THINGS = _each("things", "books pens cards coins stamps toys balls")
_FOOD = _each("things", "apples pears eggs nuts plums cakes")

SCENES: tuple[Scene, ...] = (
    Scene(
        slots={"name": _NAMES, "friend": _FRIENDS, "things": _THINGS},
        opening=("{name} has {n} {things}.", "{name} starts with {n} {things}."),
        plus=(
            "{they} buys {n} more.",
            "{they} gets {n} from {friend}.",
            "{friend} gives {them} {n} more.",
        ),
        minus=(
            "{they} gives {n} to {friend}.",
            "{they} loses {n}.",
            "{they} sells {n}.",
            "{friend} takes {n} of them.",
        ),
        multiply=("Soon {they} has {n} times as many.",),
        question=(
            "How many {things} does {name} have now?",
            "How many {things} does {they} have in the end?",
            "How many does {they} have now?",
        ),
    ),
    Scene(
        slots={"name": _NAMES, "friend": _FRIENDS, "things": _FOOD},
        opening=("{name} has {n} {things}.", "{name} buys {n} {things}."),
        plus=(
            "{they} buys {n} more.",
            "{they} gets {n} from {friend}.",
            "{friend} gives {them} {n} more.",
        ),
        minus=(
            "{they} eats {n}.",
            "{they} gives {n} to {friend}.",
            "{friend} eats {n} of them.",
        ),
        multiply=("Soon {they} has {n} times as many.",),
        question=(
            "How many {things} does {name} have now?",
            "How many {things} are left?",
            "How many does {they} have now?",
        ),
    ),
    Scene(
        slots={
            "name": _NAMES,
            "things": [*_THINGS, *_FOOD],
            "place": _each("place", "box bag jar"),
        },
        opening=("There are {n} {things} in a {place}.", "A {place} holds {n} {things}."),
        plus=("{name} puts in {n} more.", "{name} adds {n}."),
        minus=("{name} takes out {n}.", "{name} takes {n} of them."),
        question=("How many {things} are in the {place} now?", "How many {things} are left?"),
    ),
    Scene(
        slots={"vehicle": _each("vehicle", "bus train boat")},
        opening=("There are {n} people on a {vehicle}.", "A {vehicle} starts with {n} people."),
        plus=("The driver lets {n} more on.", "It stops to let {n} more on."),
        minus=("The driver lets {n} off.", "It stops to let {n} off."),
        question=("How many people are on the {vehicle} now?", "How many people are left?"),
    ),
    Scene(
        slots={"animals": _each("animals", "cows hens pigs sheep ducks")},
        opening=("A farmer has {n} {animals}.", "There are {n} {animals} on a farm."),
        plus=("The farmer buys {n} more.", "The farmer gets {n} more."),
        minus=("The farmer sells {n}.", "The farmer loses {n}."),
        question=("How many {animals} are there now?", "How many {animals} are left?"),
    ),
    Scene(
        slots={"name": _NAMES},
        opening=("{name} has {n} points in a game.", "{name} starts a game with {n} points."),
        plus=("{they} wins {n}.", "{they} gets {n} more."),
        minus=("{they} loses {n}.", "{they} gives up {n}."),
        multiply=("Soon {they} has {n} times as many.",),
        question=("How many points does {name} have now?", "What is the score in the end?"),
    ),
)
