"""What is true in the small world: fixed facts, told in prose and asked for in questions."""

from __future__ import annotations

from dataclasses import dataclass

from base.dice import Dice
from base.world import PEOPLE, STREETS, TOWNS, listed

ANIMALS = {
    "fox": ("red fur and a bushy tail", "mice and berries", "a den", "hunts at night", "a cub"),
    "hare": ("long ears and strong legs", "grass and herbs", "a hollow in the field", "runs faster than a dog", "a leveret"),
    "hedgehog": ("a coat of spines", "snails and beetles", "a heap of leaves", "sleeps all winter", "a hoglet"),
    "owl": ("round eyes and soft feathers", "mice", "a hollow tree", "flies without a sound", "an owlet"),
    "otter": ("thick brown fur", "fish", "a hole in the bank", "swims very well", "a pup"),
    "badger": ("a striped face", "worms and roots", "a burrow", "digs with its claws", "a cub"),
    "goose": ("white feathers and a long neck", "grass and grain", "a pen by the pond", "guards the yard", "a gosling"),
    "frog": ("smooth green skin", "flies", "a pond", "jumps a long way", "a tadpole"),
    "mole": ("black velvet fur", "worms", "a tunnel", "sees very little", "a pup"),
    "squirrel": ("a long red tail", "nuts and seeds", "a nest of twigs", "hides its food in autumn", "a kit"),
    "deer": ("thin legs and a brown coat", "leaves and bark", "the forest", "listens before it moves", "a fawn"),
    "wolf": ("grey fur and yellow eyes", "deer and hares", "a cave", "lives in a pack", "a cub"),
    "cow": ("a heavy body and two horns", "grass and hay", "a stable", "gives milk", "a calf"),
    "sheep": ("thick wool", "grass", "a fold", "follows the others", "a lamb"),
    "horse": ("a long mane", "hay and oats", "a stable", "pulls the cart", "a foal"),
    "bee": ("two pairs of wings", "nectar", "a hive", "makes honey", "a grub"),
    "duck": ("a flat bill", "water plants", "a nest in the reeds", "dives for food", "a duckling"),
    "goat": ("a beard and curved horns", "almost anything", "a shed", "climbs on rocks", "a kid"),
}
TRADES = {
    "baker": ("bakes bread", "an oven", "a bakery"), "miller": ("grinds grain into flour", "a millstone", "a mill"),
    "fisher": ("catches fish", "a net", "a boat"), "teacher": ("teaches children", "a blackboard", "a school"),
    "doctor": ("helps the sick", "a bag of medicine", "a surgery"), "farmer": ("grows wheat and keeps cows", "a plough", "a farm"),
    "tailor": ("sews coats", "a needle", "a workshop"), "blacksmith": ("makes horseshoes", "a hammer", "a smithy"),
    "carpenter": ("builds tables and chairs", "a saw", "a workshop"), "postman": ("brings the letters", "a bicycle", "a post office"),
    "shepherd": ("looks after the sheep", "a crook", "a hut on the hill"), "weaver": ("makes cloth", "a loom", "a weaving room"),
    "potter": ("makes jugs and bowls", "a wheel", "a pottery"), "beekeeper": ("keeps bees", "a veil", "a garden full of hives"),
    "ferryman": ("rows people across the river", "a boat", "a hut on the bank"), "clockmaker": ("mends clocks", "tiny screws", "a shop in the square"),
}  # fmt: skip
STUFF = {
    "table": ("wood", "eat and work at"), "window": ("glass", "look through"), "knife": ("steel", "cut bread with"), "rope": ("hemp", "tie things with"),
    "candle": ("wax", "light a room with"), "coat": ("wool", "keep warm with"), "jug": ("clay", "pour water from"), "basket": ("willow", "carry apples in"),
    "book": ("paper", "read"), "boot": ("leather", "walk in the mud with"), "bell": ("bronze", "call people with"), "key": ("iron", "open a lock with"),
    "boat": ("planks", "cross the water in"), "pillow": ("feathers and cloth", "sleep on"), "nail": ("iron", "fix boards with"), "broom": ("twigs", "sweep the floor with"),
}  # fmt: skip
RULES = (
    ("water freezes", "it is very cold", "water is liquid", "it is warm"), ("the grass turns brown", "there is no rain", "the grass is green", "there is enough rain"),
    ("the lamp goes out", "the oil is used up", "the lamp burns", "there is oil in it"), ("bread rises", "there is yeast in the dough", "bread stays flat", "the yeast is forgotten"),
    ("iron rusts", "it gets wet", "iron stays bright", "it is kept dry"), ("snow melts", "the sun is warm", "snow stays", "the frost holds"),
    ("milk turns sour", "it stands in the sun", "milk stays fresh", "it is kept in the cellar"), ("a boat sinks", "water comes through a hole", "a boat floats", "its planks are tight"),
    ("the fire grows", "wood is put on it", "the fire dies", "nobody looks after it"), ("leaves fall", "autumn comes", "leaves open", "spring comes"),
)  # fmt: skip
KINDS = {
    "animal": tuple(ANIMALS),
    "trade": tuple(TRADES),
    "fruit": ("apple", "pear", "plum", "cherry", "lemon"),
    "tool": ("hammer", "saw", "needle", "plough", "broom"),
}


@dataclass(frozen=True)
class Citizen:
    name: str
    town: str
    street: str
    trade: str
    pet: str


def _citizens() -> tuple[Citizen, ...]:
    dice = Dice("citizens", 1)
    trades, pets = tuple(TRADES), ("cat", "dog", "goat", "horse", "parrot", "duck")
    return tuple(Citizen(person.name, dice.one(TOWNS), dice.one(STREETS), dice.one(trades), dice.one(pets)) for person in PEOPLE)


CITIZENS = _citizens()
Pair = tuple[str, str]


def _animal_pair(dice: Dice) -> Pair:
    name = dice.one(tuple(ANIMALS))
    looks, food, home, habit, young = ANIMALS[name]
    return dice.one((
        (f"What does a {name} look like?", f"A {name} has {looks}."), (f"What does a {name} eat?", f"A {name} eats {food}."),
        (f"Where does a {name} live?", f"A {name} lives in {home}."), (f"What is a young {name} called?", f"A young {name} is called {young}."),
        (f"Tell me something about the {name}.", f"The {name} has {looks}. It eats {food} and lives in {home}. It {habit}."),
    ))  # fmt: skip


def _trade_pair(dice: Dice) -> Pair:
    name = dice.one(tuple(TRADES))
    work, tool, place = TRADES[name]
    return dice.one((
        (f"What does a {name} do?", f"A {name} {work}."), (f"What does a {name} need?", f"A {name} needs {tool}."),
        (f"Where does a {name} work?", f"A {name} works in {place}."), (f"Who {work}?", f"The {name} {work}."),
        (f"Who works in {place}?" if "workshop" not in place else f"Who needs {tool}?", f"The {name}."),
    ))  # fmt: skip


def _thing_pair(dice: Dice) -> Pair:
    name = dice.one(tuple(STUFF))
    made_of, use = STUFF[name]
    return dice.one((
        (f"What is a {name} made of?", f"A {name} is made of {made_of}."), (f"What is a {name} for?", f"A {name} is something to {use}."),
        (f"Why do people need a {name}?", f"Because a {name} is something to {use}."),
    ))  # fmt: skip


def _rule_pair(dice: Dice) -> Pair:
    effect, cause, other, other_cause = dice.one(RULES)
    return dice.one((
        (f"Why is it that {effect}?", f"Because {cause}."), (f"What happens when {cause}?", f"When {cause}, {effect}."),
        (f"What happens when {other_cause}?", f"When {other_cause}, {other}."), (f"When is it that {other}?", f"When {other_cause}."),
    ))  # fmt: skip


def _citizen_pair(dice: Dice) -> Pair:
    who = dice.one(CITIZENS)
    return dice.one((
        (f"Where does {who.name} live?", f"{who.name} lives in {who.town}, in {who.street}."), (f"What is {who.name}'s trade?", f"{who.name} is a {who.trade} in {who.town}."),
        (f"What animal does {who.name} have?", f"{who.name} has a {who.pet}."),
        (f"Who is {who.name}?", f"{who.name} is the {who.trade} in {who.street}, {who.town}, and has a {who.pet}."),
    ))  # fmt: skip


def _kind_pair(dice: Dice) -> Pair:
    kind = dice.one(tuple(KINDS))
    other = dice.one([name for name in KINDS if name != kind])
    words = dice.some([*[(word, kind) for word in dice.some(KINDS[kind], 3)], (dice.one(KINDS[other]), other)], 4)
    odd = next(word for word, its_kind in words if its_kind == other)
    return (
        f"Which word does not belong: {listed([word for word, _ in words], 'or')}?",
        f"The word {odd} does not belong, because it is not a {kind}.",
    )


PAIRS = (_animal_pair, _trade_pair, _thing_pair, _rule_pair, _citizen_pair, _kind_pair)


def fact_question(dice: Dice) -> Pair:
    """A question about the world and its true answer."""
    return tuple(map(_articles, dice.one(PAIRS)(dice)))  # type: ignore[return-value]


def _articles(text: str) -> str:
    from base.dice import tidy

    return tidy(text)


def fact_page(dice: Dice) -> str:
    """A page of an encyclopedia of the small world."""
    topic = dice.one(("animal", "animal", "trade", "trade", "thing", "person", "rule"))
    if topic == "animal":
        name = dice.one(tuple(ANIMALS))
        looks, food, home, habit, young = ANIMALS[name]
        return dice.say(
            "{Name}. [The {name} is an animal with {looks}|The {name} has {looks}]. It [lives in|is at home in|makes its home in] {home} and [eats|feeds on|likes] {food}. "
            "[Everyone knows that it|The {name}] {habit}. [Its young is called {young}|A young {name} is called {young}][|, and stays with its mother for {months} months]. "
            "[|It is often seen near {town}.|In {town} people say that a {name} on the road brings luck.|In winter one sees it less often.|Farmers do not always like it.]",
            Name=name.capitalize(), name=name, looks=looks, food=food, home=home, habit=habit, young=young, town=dice.one(TOWNS),
            months=dice.one(("two", "three", "six", "nine")),
        )  # fmt: skip
    if topic == "trade":
        name = dice.one(tuple(TRADES))
        work, tool, place = TRADES[name]
        others = [citizen.name for citizen in CITIZENS if citizen.trade == name]
        return dice.say(
            "[The {name}|A {name}] {work}. [To do this|For this work] a {name} needs {tool}[| and a lot of patience| and good light| and strong hands]. "
            "[Most work in {place}|The work is done in {place}]. [|It takes {years} years to learn.|The day begins before sunrise.|Without the {name}, life in {town} would be hard.]{who}",
            name=name, work=work, tool=tool, place=place, years=dice.one(("two", "three", "five", "seven")), town=dice.one(TOWNS),
            who=f" {listed(others)} {'is a ' + name if len(others) == 1 else 'are such people'}." if others else "",
        )  # fmt: skip
    if topic == "thing":
        lines = []
        for name in dice.some(tuple(STUFF), 3):
            made_of, use = STUFF[name]
            lines.append(
                dice.say(
                    "[A {name} is made of {stuff}, and it is something to {use}|A {name} is something to {use}|The {name}: made of {stuff}, good to {use}].",
                    name=name,
                    stuff=made_of,
                    use=use,
                )
            )
        return " ".join(lines)
    if topic == "person":
        who = dice.one(CITIZENS)
        work, tool, place = TRADES[who.trade]
        return dice.say(
            "{name} [lives|has a house] in {street}[|, in the middle| at the end], in {town}, and is [a|the best] {trade}. [Like every {trade}, {name}|So {name}] {work} [and needs {tool}|in {place}]. "
            "{name} has a {pet}[, which follows {name} everywhere| that sleeps by the door| and would not give it away].",
            name=who.name, street=who.street, town=who.town, trade=who.trade, work=work, tool=tool, place=place, pet=who.pet,
        )  # fmt: skip
    parts = []
    for effect, cause, other, other_cause in dice.some(RULES, 2):
        parts.append(
            dice.say(
                "[When {cause}, {effect}|{effect} because {cause}|If {cause}, then {effect}][. But when {oc}, {other}|, but if {oc}, {other}|].",
                cause=cause,
                effect=effect,
                oc=other_cause,
                other=other,
            )
        )
    return " ".join(parts)


def reading_question(dice: Dice) -> Pair:
    """A short passage with a question that only the passage answers."""
    first, second = (person.name for person in dice.some(PEOPLE, 2))
    things = dice.some(("key", "book", "lamp", "cup", "rope", "letter", "map", "drum", "hat", "bell"), 2)
    spots = dice.some(
        (
            "on the table",
            "under the bed",
            "in the barn",
            "behind the door",
            "on the shelf",
            "in the boat",
            "near the well",
            "in the cellar",
        ),
        3,
    )
    passage = dice.say(
        "{first} [put|left] the {one} {a}. {second} [put|laid] the {two} {b}. [Later|In the evening|The next day] {mover} [took|moved] the {one} and put it {c}.",
        first=first, second=second, one=things[0], two=things[1], a=spots[0], b=spots[1], c=spots[2], mover=(mover := dice.one((first, second))),
    )  # fmt: skip
    return dice.one((
        (f"{passage}\nWhere is the {things[0]} now?", f"The {things[0]} is {spots[2]}."), (f"{passage}\nWhere is the {things[1]}?", f"The {things[1]} is {spots[1]}."),
        (f"{passage}\nWhere was the {things[0]} at first?", f"The {things[0]} was {spots[0]}."), (f"{passage}\nWho moved the {things[0]}?", f"{mover} moved the {things[0]}."),
    ))  # fmt: skip
