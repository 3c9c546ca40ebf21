"""Talk and paper of every day: dialogues, letters, notices, recipes, weather, ways to go."""

from __future__ import annotations

import json

from base.dice import Dice, tidy
from base.world import (
    COLOURS,
    DAYS,
    ELDERS,
    FOODS,
    GOODS,
    NUMBERS,
    PEOPLE,
    PLACES,
    SEASONS,
    STREETS,
    TOWNS,
    TREASURES,
    WEATHER,
    counted,
    listed,
)


def dialogue(dice: Dice) -> str:
    """A conversation of two, as a script."""
    first, second = (person.name for person in dice.some(PEOPLE, 2))
    return "\n".join(
        f"{first if index % 2 == 0 else second}: {line}"
        for index, line in enumerate(_meeting(dice) if dice.chance(0.5) else _bargain(dice))
    )


def _meeting(dice: Dice) -> list[str]:
    day, place = dice.one(DAYS), dice.one(PLACES)
    other = dice.one([name for name in DAYS if name != day])
    plan = dice.one(
        (
            "go fishing",
            "paint the boat",
            "pick cherries",
            "visit Grandmother",
            "fly the kite",
            "see the play",
            "look for mushrooms",
            "mend the fence",
        )
    )
    time = dice.one(("nine", "ten", "two", "four", "noon"))
    return [
        dice.say("[Shall we|Would you like to|Do you want to] {plan} on {day}?", plan=plan, day=day),
        dice.say(
            "[I cannot on {day}|{day} is no good|On {day} I must help at home]. [How about|What about|Can we do it on] {other}?",
            day=day,
            other=other,
        ),
        dice.say("[{other} is fine|Good, {other} then|Yes, {other} suits me]. [Where shall we meet|And where]?", other=other),
        dice.say("[Let us meet|We can meet|I shall wait] {place} at {time}.", place=place, time=time),
        dice.say(
            "[Good|Fine|Agreed]: {other} at {time}, {place}. [Shall I bring anything|What should I bring]?",
            other=other,
            time=time,
            place=place,
        ),
        dice.say(
            "[Bring|Just bring|Please bring] {food}[| and a blanket| and good boots]. [See you then|Until {other}|Do not be late]!",
            food=dice.one(FOODS),
            other=other,
        ),
    ][: dice.one((4, 6, 6))]


def _bargain(dice: Dice) -> list[str]:
    thing, colour = dice.one(TREASURES), dice.one(COLOURS)
    price = dice.number(6, 19)
    offer = dice.number(2, price - 3)
    middle = (price + offer) // 2
    return [
        dice.say("[How much is|What do you want for|What does it cost,] the {colour} {thing}?", colour=colour, thing=thing),
        dice.say(
            "[{price} coins|I ask {price} coins|For you, {price} coins]. It is [very old|almost new|the only one|well made].",
            price=NUMBERS[price],
        ),
        dice.say(
            "[That is too much|{price}! You are joking|I have not got so much]. I can give you {offer}.",
            price=NUMBERS[price],
            offer=NUMBERS[offer],
        ),
        dice.say(
            "[Look at it|Feel how heavy it is|My father made it]. {middle}, [and it is yours|and not a coin less].", middle=NUMBERS[middle]
        ),
        dice.say(
            "[All right|Very well|Agreed], {middle}. [But you must wrap it|Here is the money|I will take the {thing}].",
            middle=NUMBERS[middle],
            thing=thing,
        ),
        dice.say("[Thank you|A pleasure|You will not be sorry]. [Take good care of the {thing}|Good day].", thing=thing),
    ]


def letter(dice: Dice) -> str:
    """A letter with news, a question and a plan."""
    writer, reader, other = dice.some(PEOPLE, 3)
    season = dice.one(SEASONS)
    return tidy(
        f"Dear {reader.name},\n\n"
        + dice.say(
            "[Thank you for your letter|How are you|I hope you are well|It is a long time since I wrote]. [Here in {town} it is {weather}|The {season} is {weather} here][, and the days are [long|short]|]. "
            "[Yesterday|Last {day}|A week ago] {other} [came to visit|fell off the ladder|found a {thing}|bought a boat|lost {his} hat in the river], and [we laughed a lot|it was quite a day|nobody has talked of anything else]. "
            "[Do you remember|Have you heard of|Did I tell you about] the [old mill|blue house|stone bridge]? [It has a new roof|They want to sell it|It was damaged in the storm|Somebody lives there again]. "
            "[Please come and see us|You must come|I hope to visit you] [in {next}|on {day}|for the feast]. [I shall bake {food}|There is a bed for you|Bring your {thing}|We can go down to the water].",
            town=dice.one(TOWNS),
            weather=dice.one(WEATHER[season]),
            season=season,
            other=other.name,
            his=other.his,
            day=dice.one(DAYS),
            next=dice.one(SEASONS),
            food=dice.one(FOODS),
            thing=dice.one(TREASURES),
        )
        + f"\n\n{dice.one(('Yours', 'With love', 'Your friend', 'Many greetings'))},\n{writer.name}"
    )


def notice(dice: Dice) -> str:
    """A notice on the board, a card of a thing, or a list to take along."""
    kind = dice.number(1, 6)
    if kind >= 5:
        return _record(dice)
    if kind == 1:
        return dice.say(
            "[LOST|FOUND]: a {colour} {thing}, {place}, on {day}. [Please ask for {who}|Tell {who}] in {street}.[| There is a reward of {n} coins.]",
            colour=dice.one(COLOURS), thing=dice.one(TREASURES), place=dice.one(PLACES), day=dice.one(DAYS), who=dice.one(PEOPLE).name, street=dice.one(STREETS),
            n=NUMBERS[dice.number(2, 12)],
        )  # fmt: skip
    if kind == 2:
        return (
            f"name: {dice.one(PEOPLE).name}\ntown: {dice.one(TOWNS)}\nstreet: {dice.one(STREETS)}\nday: {dice.one(DAYS)}\n"
            f"thing: {dice.one(TREASURES)}\ncolour: {dice.one(COLOURS)}\ncount: {dice.number(1, 9)}"
        )
    if kind == 3:
        return f"To buy on {dice.one(DAYS)}:\n" + "\n".join(
            f"- {good} ({dice.number(1, 9)})" for good in dice.some(GOODS, dice.number(3, 6))
        )
    rows = [f"| {person.name} | {dice.one(TOWNS)} | {dice.number(1, 9)} |" for person in dice.some(PEOPLE, dice.number(2, 4))]
    return "\n".join(["| name | town | points |", *rows])


def _record(dice: Dice) -> str:
    """A small JSON object, so that its brackets and quotes are known; none of these is an order."""
    who = dice.one(PEOPLE)
    record: dict[str, object] = {"name": who.name, "age": dice.number(3, 90), "town": dice.one(TOWNS)}
    if dice.chance(0.6):
        record["things"] = [{"thing": thing, "colour": dice.one(COLOURS)} for thing in dice.some(TREASURES, dice.number(1, 3))]
    if dice.chance(0.5):
        record["friends"] = [person.name for person in dice.some(PEOPLE, dice.number(1, 3))]
    return json.dumps(record)


HOWTO = (
    ("boil an egg", ("Fill a pot with water", "bring it to the boil", "put the egg in with a spoon", "wait for six minutes", "cool it under cold water")),
    ("light a fire", ("Clear the ground", "lay dry grass in the middle", "build a tent of small twigs", "light the grass", "add bigger wood when it burns")),
    ("bake bread", ("Mix flour, water, salt and yeast", "knead the dough", "let it rise for an hour", "shape a loaf", "bake it until it sounds hollow")),
    ("plant a tree", ("Dig a wide hole", "loosen the earth", "set the tree in straight", "fill the hole", "water it well")),
    ("mend a tyre", ("Take off the wheel", "pull out the tube", "find the hole in a bowl of water", "glue a patch on it", "pump it up again")),
    ("make tea", ("Boil fresh water", "warm the pot", "put in the leaves", "pour the water over them", "wait for four minutes")),
    ("wash a dog", ("Fill a tub with warm water", "close the door", "wet the dog", "rub in the soap", "rinse it and stand back")),
    ("send a letter", ("Write it", "fold it twice", "put it into an envelope", "write the address on the front", "take it to the post office")),
    ("paint a fence", ("Brush off the dirt", "stir the paint", "begin at the top", "paint along the wood", "let it dry for a day")),
    ("cross a stream", ("Look for a shallow place", "test the stones with a stick", "take off your shoes", "face the water", "go slowly, step by step")),
)  # fmt: skip


def howto(dice: Dice) -> str:
    """Steps in their order, as a list or as prose."""
    what, steps = dice.one(HOWTO)
    opening = dice.say("[How to {what}|This is how to {what}|To {what}, do this]", what=what)
    if dice.chance(0.5):
        return f"{opening}:\n" + "\n".join(f"{number}. {step[0].upper()}{step[1:]}." for number, step in enumerate(steps, 1))
    words = ("First", dice.one(("Then", "Next")), "After that", dice.one(("Then", "Now")), dice.one(("Finally", "Last of all")))
    told = " ".join(f"{word}, {step[0].lower()}{step[1:]}." for word, step in zip(words, steps, strict=True))
    return f"{opening}. {told}" + dice.expand("[| Take your time.| Children should not do this alone.| It is not hard.]")


def howto_question(dice: Dice) -> tuple[str, str]:
    what, steps = dice.one(HOWTO)
    step = dice.number(0, len(steps) - 2)
    if dice.chance(0.4):
        return f"How do I {what}?", f"{steps[0]}, {', '.join(steps[1:-1])}, and {steps[-1]}."
    this, following = steps[step], steps[step + 1]
    return f"I want to {what}. What comes after this: {this[0].lower()}{this[1:]}?", f"{following[0].upper()}{following[1:]}."


def report(dice: Dice) -> str:
    """Weather, harbour or market report of a day."""
    season = dice.one(SEASONS)
    kind = dice.number(1, 3)
    if kind == 1:
        return dice.say(
            "Weather for {town} on {day}: {weather} [in the morning|at first], {later} [later|towards evening]. [Wind from the {side}|Light wind|No wind]. "
            "[Highest temperature|Up to] {n} degrees[|, colder at night]. [Take an umbrella|Farmers should bring in the hay|Boats may sail].",
            town=dice.one(TOWNS), day=dice.one(DAYS), weather=dice.one(WEATHER[season]), later=dice.one(WEATHER[season]), side=dice.one(("north", "south", "east", "west")),
            n=dice.number(2, 9) if season == "winter" else dice.number(10, 29),
        )  # fmt: skip
    if kind == 2:
        first, second = dice.some(GOODS, 2)
        x, y = dice.number(2, 9), dice.number(2, 9)
        return dice.say(
            "Market report, {town}, {day}. The price of {a} {moved} from {x} to {y} coins. There was [plenty of|little|no] {b}. [{n} carts came in|Only {n} stalls were open]. [The next market is on {other}|Trade was slow|Everything was sold by noon].",
            moved="rose" if x < y else "fell" if y < x else "went",
            town=dice.one(TOWNS), day=dice.one(DAYS), a=first, b=second, x=NUMBERS[x], y=NUMBERS[y], n=NUMBERS[dice.number(3, 20)], other=dice.one(DAYS),
        )  # fmt: skip
    start, middle, end = dice.some(STREETS, 3)
    return dice.say(
        "[The way from {start} to {end}|How to get from {start} to {end}]: [go|walk] [straight on|down the hill|past the well] [to|as far as] {middle}, turn {side}, [cross the bridge|pass the church|go by the school], "
        "and [after {n} steps|at the {k} house] you are in {end}. [It takes {m} minutes|A child can do it|You cannot miss it].",
        start=start, middle=middle, end=end, side=dice.one(("left", "right")), n=dice.number(2, 9) * 100, k=dice.one(("second", "third", "last", "red")), m=NUMBERS[dice.number(4, 20)],
    )  # fmt: skip


def chat(dice: Dice) -> list[dict[str, str]]:
    """Small talk with an assistant: greetings, advice, words, lists; one or two turns."""
    topics = (_word_turn, _list_turn, _advice_turn, _who_turn)
    turns = [dice.one(topics)(dice) for _ in range(dice.one((1, 1, 2)))]
    return [message for ask, answer in turns for message in ({"role": "user", "content": ask}, {"role": "assistant", "content": answer})]


def _word_turn(dice: Dice) -> tuple[str, str]:
    word, other = dice.one(
        (
            ("hot", "cold"),
            ("big", "small"),
            ("old", "young"),
            ("early", "late"),
            ("full", "empty"),
            ("dark", "light"),
            ("wet", "dry"),
            ("open", "closed"),
            ("quick", "slow"),
            ("glad", "sad"),
            ("loud", "quiet"),
            ("rich", "poor"),
        )
    )
    return dice.one(
        (
            (f"What is the opposite of {word}?", f"The opposite of {word} is {other}."),
            (f"Give me the opposite of {other}.", f"The opposite of {other} is {word}."),
        )
    )


def _list_turn(dice: Dice) -> tuple[str, str]:
    kind, words = dice.one(
        (
            ("foods", FOODS),
            ("goods of the market", GOODS),
            ("colours", COLOURS),
            ("towns", TOWNS),
            ("streets", STREETS),
            ("things one can lose", TREASURES),
        )
    )
    count = dice.number(2, 5)
    return f"Name {NUMBERS[count]} {kind}.", tidy(listed(dice.some(words, count)) + ".")


def _advice_turn(dice: Dice) -> tuple[str, str]:
    return dice.one((
        ("I cannot sleep. What can I do?", dice.say("[Drink warm milk|Open the window|Read a quiet book] and [think of the sea|count sheep|do not look at the clock].")),
        ("I have quarrelled with my friend.", dice.say("[I am sorry to hear that|That is sad]. [Say that you are sorry|Go and talk to your friend|Wait a day], and [it will get better|listen well].")),
        ("It is raining and I am bored.", dice.say("[You could bake {food}|You could write a letter|Why not read a story|You could mend your {thing}].", food=dice.one(FOODS), thing=dice.one(TREASURES))),
        (dice.say("[Hello|Good morning|Good evening]!"), dice.say("[Hello|Good day]! [How can I help you|What can I do for you]?")),
        (dice.say("[Thank you|Thanks|Thank you very much]!"), dice.say("[You are welcome|My pleasure|Not at all].")),
    ))  # fmt: skip


def copy_chat(dice: Dice) -> list[dict[str, str]]:
    """Words without a sense, to be said again: nothing teaches a small model to copy as fast as text that can only be copied."""
    words = dice.some((*TREASURES, *COLOURS, *GOODS, *STREETS, *TOWNS, *NUMBERS, *FOODS), dice.number(2, 10))
    ask, answer = dice.one(
        (
            ("Say after me: {words}", ", ".join(words)),
            ("Say this in quotes: {words}", ", ".join(f'"{word}"' for word in words)),
            ("Write this as a list: {words}", "\n".join(f"- {word}" for word in words)),
            ("Write in reverse order: {words}", ", ".join(reversed(words))),
            ("How many words are these: {words}?", counted(len(words), "word").capitalize() + "."),
        )
    )
    return [{"role": "user", "content": ask.replace("{words}", ", ".join(words))}, {"role": "assistant", "content": answer}]


def _who_turn(dice: Dice) -> tuple[str, str]:
    who, elder = dice.one(PEOPLE), dice.one(ELDERS)
    thing, place = dice.one(TREASURES), dice.one(PLACES)
    return f"{who.name} got a {thing} from {elder.name} {place}. Who gave it?", f"{elder.name} gave {who.name} the {thing}."
