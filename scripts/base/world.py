"""The small world: who lives there, what there is, and how its words bend."""

from __future__ import annotations

from dataclasses import dataclass

from base.dice import Dice


@dataclass(frozen=True)
class Person:
    name: str
    he: str
    him: str
    his: str
    self: str


def _person(name: str, is_female: bool) -> Person:
    return Person(name, *(("she", "her", "her", "herself") if is_female else ("he", "him", "his", "himself")))


GIRLS = (
    "Anna", "Bella", "Clara", "Dora", "Ella", "Fern", "Greta", "Hanna", "Iris", "Julia", "Katie", "Lena", "Mira", "Nora",
    "Olive", "Petra", "Rosa", "Sara", "Tilda", "Wilma",
)  # fmt: skip
BOYS = (
    "Adam", "Ben", "Carl", "Daniel", "Emil", "Felix", "George", "Hugo", "Ivan", "Jonas", "Kurt", "Leo", "Max", "Nils",
    "Oscar", "Peter", "Robin", "Samuel", "Tom", "Victor",
)  # fmt: skip
PEOPLE = tuple(_person(name, True) for name in GIRLS) + tuple(_person(name, False) for name in BOYS)
ELDERS = (
    *(_person(name, True) for name in ("Grandmother", "Mother", "Aunt Ruth", "Mrs Reed", "Mrs Holt", "Old Martha", "Mrs Vane")),
    *(_person(name, False) for name in ("Grandfather", "Father", "Uncle Bert", "Mr Dale", "Mr Finch", "Old Simon", "Mr Penn")),
)
BEASTS = (
    "fox",
    "hare",
    "hedgehog",
    "owl",
    "crow",
    "mouse",
    "badger",
    "frog",
    "goose",
    "otter",
    "squirrel",
    "mole",
    "wolf",
    "deer",
    "toad",
    "cat",
)
PETS = ("kitten", "puppy", "lamb", "duckling", "foal", "goat", "rabbit", "sparrow", "calf", "piglet", "hedgehog", "owl")

SEASONS = ("spring", "summer", "autumn", "winter")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYPARTS = ("morning", "afternoon", "evening")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "silver", "orange")
TOWNS = ("Elmbridge", "Port Hollow", "Ashby", "Thornfield", "Little Marsh", "Redwater", "Kingsford", "Stonebeck")
STREETS = (
    "Mill Lane", "Harbour Street", "Church Road", "Elm Street", "Market Square", "Bridge Street", "Park Road", "Castle Hill",
    "River Walk", "Station Road", "Garden Row", "King Street", "Rose Lane", "Tower Street", "Forge Lane", "Lake View",
    "Orchard Way", "School Lane", "Baker Street", "Queen Street", "Green Lane", "Well Street", "Abbey Road", "North Gate",
)  # fmt: skip
PLACES = (
    "in the orchard", "by the river", "at the old mill", "on the hill", "in the market square", "at the harbour", "behind the church",
    "in the forest", "by the pond", "at the edge of the village", "near the stone bridge", "in the barn", "in the meadow", "on the beach",
    "beside the well", "at the bakery", "in the library", "under the oak tree", "in the garden", "at the railway station", "in the attic",
    "near the lighthouse", "at the school gate", "in the blacksmith's yard", "on the ferry landing",
)  # fmt: skip
GOALS = (
    "the orchard", "the river", "the old mill", "the hill", "the market", "the harbour", "the church", "the forest", "the pond",
    "the village", "the stone bridge", "the barn", "the meadow", "the beach", "the well", "the bakery", "the library", "the lighthouse",
    "the school", "the smithy", "the ferry", "the castle", "the station", "the cave", "the mountain hut",
)  # fmt: skip
TREASURES = (
    "key", "ring", "watch", "book", "kite", "ball", "whistle", "lantern", "scarf", "drum", "flute", "hat", "basket", "coin", "brooch",
    "umbrella", "toy boat", "doll", "knife", "compass", "bell", "glove", "map", "pencil", "mirror", "spoon", "notebook", "feather",
)  # fmt: skip
LOOKS = ("old", "little", "silver", "wooden", "red", "blue", "green", "painted", "heavy", "shiny", "brass", "plain", "broken", "lovely")
FOODS = ("bread", "cheese", "soup", "honey", "apple pie", "plum cake", "porridge", "butter", "jam", "pears", "roast chestnuts", "pancakes")
GOODS = (
    "flour", "sugar", "butter", "milk", "eggs", "salt", "candles", "nails", "rope", "wool", "apples", "onions", "tea", "soap", "thread", "honey",
    "cheese", "lamp oil", "potatoes", "matches",
)  # fmt: skip
TRAITS = (
    "curious", "shy", "brave", "careful", "stubborn", "cheerful", "quiet", "clever", "patient", "proud", "kind", "restless", "dreamy",
    "honest", "forgetful", "lazy", "gentle", "bold",
)  # fmt: skip
JOBS = (
    "baker", "miller", "fisher", "teacher", "doctor", "farmer", "tailor", "blacksmith", "carpenter", "postman", "gardener", "shepherd", "cook",
    "sailor", "weaver", "potter", "librarian", "beekeeper", "ferryman", "clockmaker",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

WEATHER = {
    "spring": ("mild", "rainy", "fresh", "windy", "bright"),
    "summer": ("hot", "sunny", "warm", "still", "stormy"),
    "autumn": ("foggy", "windy", "cool", "golden", "rainy"),
    "winter": ("cold", "snowy", "frosty", "dark", "grey"),
}

_PLURALS = {"knife": "knives", "loaf": "loaves", "sheep": "sheep", "goose": "geese", "mouse": "mice", "deer": "deer", "fish": "fish"}


def plural(noun: str) -> str:
    """
    Example:
        >>> plural("box"), plural("berry"), plural("toy"), plural("toy boat")
        ('boxes', 'berries', 'toys', 'toy boats')
    """
    head, _, last = noun.rpartition(" ")
    if last in _PLURALS:
        last = _PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def counted(count: int, noun: str, in_words: bool = True) -> str:
    """`three apples`, `one apple`; with digits past twenty or where asked for."""
    number = NUMBERS[count] if in_words and count < len(NUMBERS) else str(count)
    return f"{number} {noun if count == 1 else plural(noun)}"


def listed(items: list[str], last: str = "and") -> str:
    """
    Example:
        >>> listed(["tea"]), listed(["tea", "milk", "jam"])
        ('tea', 'tea, milk and jam')
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def two_people(dice: Dice) -> tuple[Person, Person]:
    """Two people, more often of different gender, so that pronouns can be used."""
    first = dice.one(PEOPLE)
    if dice.chance(0.7):
        return first, dice.one([person for person in PEOPLE if person.he != first.he])
    return first, dice.one([person for person in PEOPLE if person.name != first.name])
