"""Stories: plots with a state that is kept, told in sentences that vary."""

from __future__ import annotations

from collections.abc import Callable

from base.dice import Dice
from base.teller import Teller
from base.world import (
    BEASTS,
    COLOURS,
    ELDERS,
    FOODS,
    GIRLS,
    GOALS,
    GOODS,
    JOBS,
    LOOKS,
    NUMBERS,
    PETS,
    PLACES,
    SEASONS,
    TOWNS,
    TRAITS,
    TREASURES,
    WEATHER,
    counted,
    listed,
    plural,
    two_people,
)  # fmt: skip


def _teller(dice: Dice, **facts: object) -> Teller:
    hero, friend = two_people(dice)
    elder = dice.one(ELDERS)
    season = dice.one(SEASONS)
    trait, other_trait = dice.some(TRAITS, 2)
    return Teller(
        dice, {"A": hero, "B": friend, "E": elder}, season=season, weather=dice.one(WEATHER[season]), town=dice.one(TOWNS),
        daypart=dice.one(("morning", "morning", "afternoon", "evening")), trait=trait, othertrait=other_trait, job=dice.one(JOBS), beast=dice.one(BEASTS),
        child="girl" if hero.name in GIRLS else "boy", look=dice.one(LOOKS), thing=dice.one(TREASURES), food=dice.one(FOODS), colour=dice.one(COLOURS),
        **facts,
    )  # fmt: skip


def _open(t: Teller) -> None:
    """When, where and who; then something about the day or the hero."""
    t.say(
        "[One|On a] {weather} {season} {daypart} {A} [was sitting|was walking|stood|was playing alone] {place}.",
        "{A} was a {trait} {child} who lived [with {A.his} family |with {A.his} aunt |]in {town}. [One {daypart}|On a {weather} {daypart} in {season}|One {weather} day] {A.he} went [out early|for a walk|to look at the river|outside].",
        "It was a {weather} {daypart} in {town}. {A} [sat by the window|was sweeping the step|had just finished breakfast|was helping {E.name} in the kitchen|looked out at the street].",
        "There was once a {trait} {child} called {A.name}. {A.He} lived [in a {look} house|in a small house|above the shop of a {job}] [near the river|at the end of the lane|not far from the mill|beside the church].",
        "In {town} [everyone knew|people liked|nobody forgot] {A.name}, the {trait} {child} [of the {job}|from the house by the well|who lived next to the {job}].",
        "[Every|Almost every] {daypart} {A} [went|walked|ran] past the {job}'s house. [But this {daypart} was different|One {weather} {daypart}, though, everything changed|On this {weather} day the door was open].",
        "{A} and {B} were [friends|neighbours|cousins] in {town}. {A} was {trait}, and {B.name} was {othertrait}.",
        "[Last {season}|Many years ago|A long time ago|Not long ago], a {trait} {child} named {A.name} lived {place}.",
        place=t.dice.one(PLACES),
    )
    t.maybe(0.35, *ASIDES)


ASIDES = (
    "The [sky|air] was [grey|clear|still|full of birds], and [the wind smelled of rain|smoke rose from the chimneys|somebody was singing far away|the bells rang slowly].",
    "A {colour} [cat|bird|butterfly|leaf] [crossed|came over] the path, and {A} [watched it|smiled|stopped for a moment].",
    "\"[Good {daypart}|Hello|You are up early|What a day],\" said the {job}[| with a nod| from the doorway| and lifted a hand].",
    "{A} [hummed a tune|whistled|counted the steps|thought about supper] [on the way|to pass the time].",
    "{A} had [a piece of {food}|a little bread and cheese|two apples] in {A.his} [pocket|bag].",
    "[It had rained all night, so the road was muddy|It had not rained for weeks, so the path was dusty|There had been a heavy dew, so the grass was wet|A cart had lost its load of straw, so the road was yellow|The bakery door stood open, so the whole street smelled of bread].",
    "[Nobody else was about|The street was full of carts|Only an old dog lay there|Children were shouting somewhere|The market was already noisy].",
    "{A.his} {look} [boots|shoes] [felt too big|kept {A.him} warm|were {A.his} favourite].",
    "{A} was [a little tired|hungry|a bit worried], but the {daypart} was [still long|only beginning|too fine to complain].",
    "Somewhere a {beast} [called|rustled|moved] in the [bushes|reeds|hedge].",
    "That {season} had been [long|strange|kind|hard] [for everyone|for the farmers|for the people of {town}].",
)  # fmt: skip

ENDINGS = (
    "[From that day on|After that|From then on], {A} was [a little wiser|always ready to help|known for it in all of {town}].",
    "And [that night|that evening|when the lamps were lit], {A} [slept well|fell asleep smiling|told the whole story twice|was too happy to sleep].",
    "{A} never forgot that {weather} {daypart}.",
    "\"[What a day|That was enough for one day|Tomorrow we will do it again|I would not have missed it],\" said {B.name}[|, and {A.name} agreed|, yawning|, and they both laughed].",
    "They [walked home|went home] together [in the dark|under the stars|while the sun went down|as it began to rain].",
    "[It had been a good day after all|So all was well again in {town}|That is how it ended|And that was that].",
    "[Even now|Years later|To this day], people in {town} [tell the story|smile when they hear of it|remember it].",
    "{E} [only shook {E.his} head and smiled|made tea for all of them|said that {E.he} had known it all along|was proud, though {E.he} did not say so].",
)  # fmt: skip

THANKS = (
    "\"[Thank you|Thank you so much|I do not know how to thank you|You are a true friend],\" said {A.name}.",
    "{A} [thanked {B.him}|shook {B.his} hand|hugged {B.him}|could hardly speak], and {B.name} [smiled|turned red|said it was nothing].",
)  # fmt: skip


def _close(t: Teller) -> None:
    t.maybe(0.85, *(ending for ending in ENDINGS if t.has_met(ending)))


def _aside(t: Teller, probability: float = 0.3) -> None:
    t.maybe(probability, *ASIDES)


def _paragraph(t: Teller, probability: float = 0.7) -> None:
    if t.dice.chance(probability):
        t.paragraph()


def lost_thing(dice: Dice) -> Teller:
    """Something is lost, looked for in several places, and found where it was all the time."""
    t = _teller(dice)
    places = dice.some(PLACES, dice.number(3, 4))
    last = places[-1]
    _open(t)
    t.say(
        "[Suddenly|Then|A moment later] {A} noticed that {A.his} {look} {thing} was [gone|missing|not in {A.his} pocket any more].",
        "{A} reached into {A.his} [bag|pocket] for the {look} {thing}, but [it was not there|the pocket was empty].",
        '"Where is my {thing}?" {A.name} [asked|cried|said aloud]. The {look} {thing} had been a present from {E.name}.',
    )
    t.maybe(0.6, "It was [a gift from {E.name}|the only one {A.he} had|not worth much, but {A.he} loved it|older than {A.he} was].")
    _paragraph(t)
    t.say(
        '{A} [ran|went] to {B.name} and asked for help. "[When did you last have it|Where were you this {daypart}|Where have you been]?" {B.name} asked.',
        '{B} saw {A.name} [searching|looking under the bench|close to tears] and asked, "[What is the matter|What have you lost|Can I help you]?"',
    )
    t.say('"I was {place}," {A.name} [said|answered|remembered], "and {second} before that."', place=places[0], second=places[1])
    for position, place in enumerate(places[:-1]):
        order = ("First", "Then", "After that", "Next")[position]
        t.say(
            "{order} they looked {place}, but [there was nothing|they found only {find}|nobody had seen a {thing}|the {thing} was not there].",
            "{order} they [searched|tried] {place}. They found {find}, but no {thing}.",
            "{order} {B.name} wanted to look {place}. [They turned over every stone|They looked for a long time|They asked everyone there], but it was [no use|all for nothing].",
            order=order, place=place, find=dice.one(("a button", "an old shoe", "a broken cup", "some string", "a rusty nail", "two walnuts")),
        )  # fmt: skip
    _aside(t)
    _paragraph(t)
    thief = dice.one(("a crow", "a magpie", "a puppy", "a little mouse", "a squirrel"))
    t.say(
        "At last {B.name} [pointed|looked] up. {last}, something [shone|glittered|caught the light]: it was the {thing}! [{thief} had carried it there|It must have slipped out through a hole in the pocket|Somebody had picked it up and put it where it could be seen].",
        "[Only one place was left|There was one more place to look]. {last}, [under some leaves|between two stones|behind a box|next to {thief}'s nest], lay the {look} {thing}.",
        "In the end it was {A.name} who remembered: {A.he} had [taken off {A.his} coat|sat down to rest|stopped to tie {A.his} shoe] {last}. And there the {thing} was, [just as {A.he} had left it|wet but whole|safe and dry].",
        last=last, thief=thief,
    )  # fmt: skip
    t.say(*THANKS)
    t.maybe(
        0.5,
        "{A} [sewed up the hole in {A.his} pocket that very evening|tied the {thing} to a string|never let the {thing} out of {A.his} sight again].",
    )
    _close(t)
    return t


def errand(dice: Dice) -> Teller:
    """Someone is sent for goods, meets an obstacle on the way, and comes back with exactly those goods."""
    goods = dice.some(GOODS, dice.number(2, 3))
    t = _teller(
        dice,
        goods=listed(goods),
        first=goods[0],
        last=goods[-1],
        goal=dice.one(("the market", "the shop", "the village shop", "the mill shop")),
    )
    coins = dice.number(6, 18)
    spent = dice.number(3, coins - 1)
    t.facts.update(coins=NUMBERS[coins], spent=NUMBERS[spent], left=counted(coins - spent, "coin"))
    t.facts.update(were="were" if coins - spent > 1 else "was", are="are" if coins - spent > 1 else "is")
    _open(t)
    t.say(
        '"[Please go|I want you to go|Run] to {goal} and [buy|bring me|fetch] {goods}," said {E.name}. {E} gave {A.name} {coins} coins[| and a basket| in a little bag].',
        "{E} [was baking|was busy|had hurt {E.his} foot] and needed {goods}. So {A} [took|was given] {coins} coins and [a basket|a bag] and set off for {goal}.",
    )
    t.say(
        '"And do not forget the {last}!" {E.name} called.',
        "On the way {A} [said the list again and again|repeated]: {goods}.",
        "It was [a long way|not far|half an hour on foot].",
    )
    _paragraph(t)
    t.say(
        "[But the bridge was broken|The river had risen and the bridge was under water]. {A} [thought for a while|looked left and right] and then [went round by the mill|crossed on the stones, one by one|asked the ferryman to take {A.him} over].",
        "Halfway there an angry goose stood in the road. {A} [took one step, and the goose hissed|did not dare to pass]. [In the end {A.he} threw it a piece of bread and slipped by|Then {B.name} came along and chased it away].",
        "Then the rain began. {A} [waited under an oak|pulled {A.his} hat down and ran|hid in a barn] until [it was over|the clouds had gone|the sun came back].",
        "At the crossroads {A} met {B.name}, who [had fallen and hurt {B.his} knee|was pushing a cart that was much too heavy|was crying because {B.he} had lost {B.his} way]. {A.name} [helped {B.him}|could not simply walk on], although it [cost time|was late].",
    )
    _aside(t)
    t.say(
        "[At the shop|When {A.name} came to {goal}], {A.he} bought {goods} and paid {spent} coins. {A.He} had {left} left.",
        '"That makes {spent} coins," said [the shopkeeper|the woman behind the counter|the old man]. {A} counted them out and put {goods} into the [basket|bag]. There {were} {left} left.',
    )
    t.maybe(0.4, '"[Carry it carefully|Greet {E.name} from me|Here is an apple for the way]," the shopkeeper [said|added].')
    _paragraph(t)
    t.say(
        'When {A} came home, {E.name} [looked into the basket|unpacked the basket]. There were the {goods}. "And here {are} {left}," {A.name} said.',
        '[It was nearly dark|The clock struck six|Supper was almost ready] when {A} [came home|put the basket on the table]. "{goods}," {E.name} [counted|said]. "[You have forgotten nothing|Well done|Everything is there]!"',
        "At home {A} set the {goods} on the table. {E} [was pleased|laughed with joy|kissed {A.him}] and let {A.him} keep {left}.",
    )
    _close(t)
    return t


def birthday(dice: Dice) -> Teller:
    """A present is made; something is missing; a neighbour lends it for a favour."""
    t = _teller(
        dice,
        good=dice.one(("flour", "sugar", "butter", "honey", "milk", "salt")),
        gift=dice.one(("cake", "pie", "loaf of sweet bread", "tart")),
    )
    t.facts["favour"] = dice.one(
        ("feed the hens", "carry in the wood", "water the beans", "sweep the yard", "hold the ladder", "find the cat")
    )
    _open(t)
    t.say(
        "[Tomorrow was|It was nearly|The next day would be] {B.name}'s birthday, and {A} wanted to bake a {gift}.",
        '{A} had [forgotten|almost forgotten] that it was {B.name}\'s birthday. "I will bake a {gift}," {A.he} [thought|decided].',
    )
    t.say(
        "{A} [lit the oven|put on an apron|washed {A.his} hands] and [set out everything|took down the big bowl]. But the {good} jar was empty.",
        "But when {A} opened the cupboard, there was no {good} [left|at all]. And the shop was closed.",
    )
    _aside(t)
    _paragraph(t)
    t.say(
        'So {A} [knocked at {E.name}\'s door|went next door to {E.name}]. "Have you got some {good}?" {A.he} asked. "[I have|Certainly|Plenty]," said {E.name}, "[but first you must|but first please|if you will] {favour}[| for me]."',
        '{E} had {good}. "You may have a cup of it," {E.he} said, "if you {favour}."',
    )
    t.say(
        "{A} did not mind. {A.He} [hurried to {favour}|went to {favour} at once|began to {favour}], and [a short time later|half an hour later|soon] {A.he} came home with a cup of {good}.",
        "It took [longer than {A.he} thought|a whole hour|no time at all] to {favour}, but in the end {A.name} [had|got] the {good}.",
    )
    _paragraph(t, 0.5)
    t.say(
        "{A} [mixed|stirred] and [tasted|waited], and [the whole house smelled wonderful|the kitchen grew warm|flour flew everywhere]. The {gift} was [a little crooked|golden brown|slightly burnt at one side|higher than {A.his} hat].",
        "The first {gift} [burned|fell on the floor|did not rise]. {A} [sighed and began again|almost gave up|started over], and the second one was [perfect|good enough|better].",
    )
    t.say(
        '{B} [opened the door and could not believe {B.his} eyes|was so surprised that {B.he} sat down|clapped {B.his} hands]. "[For me|Did you make this yourself|Is that a {gift}]?" {B.he} asked.',
        'When {B.name} [saw it|came in|blew out the candles], {B.he} [laughed out loud|said nothing for a moment|smiled from ear to ear]. "[It is the best {gift} I ever had|You remembered|Nobody ever baked me a {gift} before]," {B.he} said.',
    )
    t.maybe(0.6, "They [ate half of it at once|shared it with {E.name}|kept a piece for {E.name}].")
    _close(t)
    return t


def quarrel(dice: Dice) -> Teller:
    """Two want the same thing, quarrel, are sorry, and share."""
    t = _teller(dice)
    _open(t)
    t.say(
        '{A} and {B} [found|saw] a {look} {thing} {place}. "[I saw it first|It is mine|Give it to me]!" {A.name} [cried|said]. "No, [I did|it is mine|I picked it up]," said {B.name}.',
        '{B} had a new {thing}, and {A} wanted [to try it|one just like it]. "[Only for a minute|Please let me|You never share]," {A.he} said. But {B} [shook {B.his} head|held it tight|said no].',
        place=dice.one(PLACES),
    )
    t.say(
        "[They pulled and pulled|They shouted at each other|They both held on], until [the {thing} fell into the mud|the {thing} broke in two|{B.name} began to cry|an old dog barked at them].",
        '"Then I will not [play with you|talk to you|be your friend] any more!" {A.name} [cried|said], and [ran home|walked away|slammed the gate].',
    )
    _paragraph(t)
    t.say(
        'At home {A} [sat on the stairs|could not eat|looked at the rain]. [It was very quiet|The house felt empty|Being angry was no fun]. "What is wrong?" asked {E.name}. {A} told {E.him} everything.',
        "For [two days|a whole day|three days] they did not [speak|say a word to each other]. {A} [missed {B.name}|was bored|played alone], and {B.name} [was sad, too|looked over the fence now and then].",
    )
    t.maybe(
        0.7,
        '"A {thing} can be [mended|replaced|bought]," said {E.name}. "[A friend cannot|Friends are harder to find|But a friend is another matter]."',
    )
    _aside(t)
    t.say(
        'So {A} [went to {B.name}\'s house|knocked at {B.name}\'s door|took a deep breath and crossed the street]. "I am sorry," {A.he} said. "[I was wrong|I should have asked|It was my fault]." "[I am sorry, too|So am I|Let us forget it]," said {B.name}.',
        'The next {daypart} {B} [stood at the door|was waiting at the gate] with [half of {B.his} {food}|two apples|a small box]. "[Are we still friends|Shall we stop this|Will you come out again]?" {B.he} asked. {A} [nodded|laughed with relief|did not have to think].',
    )
    t.say(
        "They [mended the {thing} with glue and string|decided to share it, one week each|gave the {thing} to a small child who had none|built a box for it and kept it there together]."
    )
    _close(t)
    return t


def rescue(dice: Dice) -> Teller:
    """An animal is stuck; the first way fails for a reason, the second works."""
    pet = dice.one(PETS)
    t = _teller(
        dice,
        pet=pet,
        trap=dice.one(
            (
                "in the mud",
                "in a thorn bush",
                "at the bottom of a pit",
                "on a branch",
                "between two rocks",
                "on a piece of ice",
                "in an old net",
                "in the well bucket",
            )
        ),
    )
    _open(t)
    t.say(
        "[Then|Suddenly|All at once] {A.he} heard a [thin|small|strange|sad] [sound|cry|voice]. {A} [followed it|listened|went nearer] and found a [little|young|frightened] {pet}. It was stuck {trap}.",
        "{place} {A} [found|saw] a {pet} that was stuck {trap}. It [trembled|looked at {A.him} with dark eyes|cried softly].",
        place=dice.one(PLACES),
    )
    t.maybe(0.5, '"[Do not be afraid|Wait, I will help you|You poor thing]," {A} [whispered|said].')
    _paragraph(t)
    t.say(
        "First {A.he} [tried to reach it with {A.his} hand|stretched out {A.his} arm], but {A.his} arm was too short.",
        "{A} [pulled|tugged] as hard as {A.he} could, but the {pet} [was held fast|only slipped back|was too frightened to move].",
        "First {A.he} used a stick, but the stick broke [in two|at once].",
        "{A} called for help, but [nobody was near|the wind was too loud|only a {beast} answered].",
    )
    t.say(
        'So {A.he} ran to {B.name}, who had a [rope|ladder|long board|net]. "[Quick|Come with me|There is a {pet} in trouble]!" {A.he} [cried|said]. [Together|Side by side] they [pulled it out|set it free|brought it down], slowly and gently.',
        "Then {A} had an idea. {A.He} [took off {A.his} scarf and made a loop|laid a board across|fetched a rope from the barn|piled up stones like steps], and [after a while|at last|inch by inch] the {pet} was free.",
    )
    _aside(t)
    t.say(
        "The {pet} [shook itself|was wet and cold|could hardly stand], so {A} [wrapped it in {A.his} coat|carried it home|gave it some milk|laid it near the stove].",
        "It had [a cut on one leg|a thorn in its foot|lost its mother]. {A} [washed the leg|took care of it] for [three days|a week|many days].",
    )
    _paragraph(t)
    t.say(
        "[When it was strong again|A week later], {A} [opened the door|took it back to the {place2}] and let it go. The {pet} [looked back once|ran a few steps and came back|did not want to leave].",
        "The {pet} stayed. It [followed {A.name} everywhere|slept at the foot of {A.his} bed|waited at the gate every {daypart}], and {A} called it {petname}.",
        place2=dice.one(("meadow", "forest", "river", "hill")), petname=dice.one(("Button", "Pepper", "Star", "Biscuit", "Shadow", "Clover", "Moss", "Pip")),
    )  # fmt: skip
    _close(t)
    return t


def storm(dice: Dice) -> Teller:
    """A warning about the weather is heeded or not, and the end follows from it."""
    heeded = dice.chance(0.5)
    t = _teller(dice, goal=dice.one(("the island", "the lighthouse", "the mountain hut", "the far bank", "the castle", "the next village")))
    _open(t)
    t.say("{A} and {B} wanted to go to {goal}.", "It was the day on which {A.name} and {B.name} had planned to go to {goal}.")
    t.say(
        '"[The swallows fly low|The clouds are black in the west|My knee hurts, and that means rain|The wind is turning]," said {E.name}. "[Stay here today|Wait until tomorrow|There will be a storm]."'
    )
    _paragraph(t, 0.5)
    if heeded:
        t.say(
            '{B} [wanted to go all the same|was disappointed|grumbled], but {A} said, "[{E.name} has never been wrong|Let us wait|Tomorrow is a day, too]." So they stayed [and played cards|and helped in the kitchen|by the fire].',
            "They [looked at the sky|talked it over] and decided to wait.",
        )
        t.say(
            "An hour later the storm came. [Thunder rolled over the roofs|The rain fell like a wall|A tree came down across the road], and [waves as high as houses beat against the shore|the river carried away a boat|the lights went out]."
        )
        _aside(t, 0.2)
        t.say(
            '"[Imagine we had gone|We would be out there now|Good that we listened]," {B.name} [whispered|said]. The next morning the air was clear, and they reached {goal} [before noon|without getting wet|in good time].'
        )
    else:
        t.say(
            '"[It is only a little wind|We are fast|We shall be back before that]," {A.name} [laughed|said], and they set off.',
            "But {A} and {B} [did not listen|laughed|thought they knew better] and left.",
        )
        t.say(
            '[Halfway|Before they were halfway], the sky turned [black|dark green]. [The rain hit their faces|The wind tore at their coats|They could not see their own feet]. "[I want to go home|Hold on to me|I cannot see the path]!" {B.name} [shouted|cried].'
        )
        _aside(t, 0.2)
        t.say(
            "They [crept under a rock|hid in a hollow tree|turned the boat over and lay under it|found an old hut] and waited, [cold and wet|hand in hand|without a word], until [it was over|morning came|they heard {E.name} call their names]."
        )
        t.say('{E} [did not scold them|gave them dry clothes and hot soup|only said, "Now you know the wind"].')
        t.say(
            "{A} [sneezed for a week|was in bed for three days], and [from then on {A.he} listened|after that {A.he} always looked at the sky first]."
        )
    _close(t)
    return t


def night_thief(dice: Dice) -> Teller:
    """Food disappears every night; someone keeps watch and learns who takes it and why."""
    t = _teller(
        dice,
        thief=dice.one(("hedgehog", "badger", "fox", "mouse", "raccoon", "goat", "crow")),
        snack=dice.one(("cheese", "bread", "jam tarts", "eggs", "sausages", "apples", "carrots")),
    )
    _open(t)
    t.say(
        "Something [strange|odd] was going on [in the house|at the {job}'s]. Every night some of the {snack} disappeared.",
        '"Who has taken the {snack}?" asked {E.name} one morning. Nobody knew. The next morning [it had happened again].',
    )
    t.say(
        '"It was {B.name}," [people said|somebody said]. But {A} [did not believe it|knew that {B.name} would never steal].',
        "{A} looked for [tracks|crumbs|signs] and found [a small footprint|a bit of fur|a hole behind the shelf|a broken window].",
    )
    _paragraph(t)
    t.say(
        "That night {A} [hid behind the curtain|sat under the table|did not go to bed] with [a lantern|a candle|a blanket]. The clock struck [eleven|twelve|one]. [Nothing moved|{A.his} eyes grew heavy|An owl called]."
    )
    t.say(
        "Then [there was a scratching sound|something bumped against a pot|a shadow crossed the floor]. {A} [held up the light|lifted the lantern|jumped up]: it was a [small|thin|fat] {thief} with some of the {snack} in its mouth!"
    )
    t.say(
        "{A} followed it [across the yard|into the garden|through the hedge] and saw [three hungry young ones|a nest full of little ones|its sick mate] waiting [under the shed|in a hollow tree|behind the woodpile].",
        "The {thief} was [so thin that its ribs showed|lame in one leg|hardly bigger than a shoe]. No wonder it [was hungry|could not hunt].",
    )
    _paragraph(t, 0.5)
    t.say(
        'In the morning {A} told everyone. {E} [scratched {E.his} head|laughed|thought for a while] and said, "[Then we shall put out a bowl every evening|Well, it has to eat, too|Let us give it what we do not need]."'
    )
    t.say(
        "After that nothing [was stolen|disappeared] any more, and {B.name} [was glad, too|got an apology|heard many kind words].",
        "From then on [the bowl by the door was empty every morning|a bowl stood by the door every night].",
    )
    _close(t)
    return t


SKILLS = (
    ("swim", "swimming", "the river"), ("skate", "skating", "the frozen pond"), ("play the flute", "playing the flute", "the attic"), ("ride", "riding", "the meadow"),
    ("climb", "climbing", "the hill"), ("row", "rowing", "the lake"), ("dance", "dancing", "the hall"), ("juggle", "juggling", "the yard"), ("sew", "sewing", "the kitchen"),
    ("bake bread", "baking bread", "the kitchen"), ("whistle", "whistling", "the garden"), ("sail", "sailing", "the harbour"),
)  # fmt: skip


def learning(dice: Dice) -> Teller:
    """A skill is tried, failed, taught and in the end shown."""
    verb, verbing, place = dice.one(SKILLS)
    t = _teller(dice, verb=verb, verbing=verbing, place=place)
    _open(t)
    t.say(
        "{A} could not {verb}. [All the others could|{B.name} could, and very well|Everybody in {town} could].",
        "More than anything else {A} wanted to [learn to {verb}|{verb} like {B.name}].",
    )
    t.say(
        "{A.He} tried [once|it alone], and [it went wrong|everyone laughed|{A.he} hurt {A.his} hand]. {A.He} tried again, and [it was even worse|nothing got better|it was no better].",
        "At [the first try|first] {A.he} [gave up after a minute|was much too fast|forgot everything]. At the second {A.he} [fell|lost heart|almost cried].",
    )
    _paragraph(t)
    t.say(
        '"[I will never learn it|I am no good at {verbing}|It is too hard]," {A.name} [said|sighed]. {E} [heard it|sat down beside {A.him}]. "[How often have you tried|Do you think I could do it at once]?" {E.he} asked. "[I needed a whole year|Nobody is born {verbing}|You are in too much of a hurry]."',
        '{B} [watched {A.him} for a while|came by one {daypart}]. "[You are too stiff|You must breathe slowly|Start with something smaller|Do not look at your feet]," {B.he} said. "[Watch me|Let me show you|Like this]."',
    )
    _aside(t)
    t.say(
        "So they went to {place} [every {daypart}|after school|day after day]. [After a week|In the second week|Little by little] it [went better|became easier], and [one day|on a {weather} {daypart}] {A.he} suddenly [could do it|knew how]."
    )
    _paragraph(t, 0.5)
    t.say(
        "At the [{season} fair|village feast|school feast], {A.name} [stepped forward|was asked to show it|took {A.his} turn]. {A.his} heart [beat fast|was in {A.his} mouth]. But [everything went well|{A.he} made only one mistake|{A.he} thought of {E.name} and smiled].",
        "Then somebody needed help: [a small child had fallen into the water|the old teacher was ill|there was no one else]. Because {A} could {verb}, {A.he} [was there in time|knew what to do].",
    )
    t.say('[People clapped|Everybody cheered|There was loud applause]. "[You see|I knew it|Not bad]!" {B.name} [called|said].')
    _close(t)
    return t


def swaps(dice: Dice) -> Teller:
    """A chain of swaps leads from a small thing to the one that was wanted."""
    things = dice.some(TREASURES, dice.number(4, 5))
    t = _teller(dice, wanted=things[-1])
    jobs = dice.some(JOBS, len(things) - 1)
    _open(t)
    t.say(
        "{A} [wished for|wanted] a {wanted} [more than anything|like {B.name}'s|for the feast], but {A.he} had no money. {A.He} had only a {start}.",
        start=things[0],
    )
    _paragraph(t, 0.5)
    for position, (have, get, job) in enumerate(zip(things, things[1:], jobs, strict=False)):
        t.say(
            "[First|Soon|On the road|At the corner] {A.he} met a {who} who [needed|was looking for|had lost] a {have}. \"I will give you my {get} for it,\" said the {who}. So {A} [swapped|gave away] the {have} and [had|went on with] a {get}.",
            "The {who} [saw the {have}|looked at the {have}] and [sighed|smiled]. \"[If only I had a {have}|That is just what I need]! [Will you take this {get} for it|Would you swap it for a {get}]?\" {A.name} [agreed|said yes|did not think long].",
            "[Next|Later|Then] a {who} [stopped {A.him}|called to {A.him}] and offered a {get} for the {have}. {A} [took the {get}|nodded], and they [shook hands|both were content].",
            who=job, have=have, get=get,
        )  # fmt: skip
        if position == 1:
            _aside(t, 0.4)
    t.paragraph()
    t.say(
        "So in the end {A} had [{A.his} {wanted}|the {wanted} {A.he} had wanted], and [it had cost {A.him} nothing but a {start}|all for one {start}].",
        "{A} [looked at the {wanted} in {A.his} hand|could not believe it]: that morning {A.he} had [had|owned] only a {start}.",
        start=things[0],
    )
    t.maybe(0.7, '"[And what will you swap it for|What is next]?" asked {B.name}. "[Nothing|This I keep]," said {A.name}.')
    _close(t)
    return t


def contest(dice: Dice) -> Teller:
    """A proud one loses a contest to a patient one, or they finish together."""
    first, second = dice.some(BEASTS, 2)
    proud, humble = dice.one(("proud", "boastful", "vain")), dice.one(("slow", "quiet", "small", "patient", "old"))
    t = _teller(dice, x=first, y=second, proud=proud, humble=humble, goal=dice.one(GOALS))
    t.say(
        "A {proud} {x} and a {humble} {y} lived [{place}|in the same wood|on the same hill].",
        "[Once|Long ago] there was a {x} who was so {proud} that [nobody could bear it|the other animals ran away]. Only the {humble} {y} stayed.",
        place=dice.one(PLACES),
    )
    t.say(
        '"[Nobody is as fast as I am|I am the cleverest animal of all|I could beat any of you]," said the {x} [every day|again and again].'
    )
    t.say(
        '"[We shall see|Then let us race to {goal}]," said the {y}[| quietly| without looking up].',
        'One day the {y} had heard enough. "Let us race to {goal}," {it} said.',
        it="it",
    )
    _paragraph(t)
    t.say(
        "The [owl|crow|old toad] [gave the sign|counted to three], and they were off. The {x} [was soon far ahead|ran like the wind|did not even look back]."
    )
    t.say(
        '[Halfway|Near the bridge] the {x} [lay down for a nap|stopped to eat berries|stopped to admire itself in the pond]. "[I have plenty of time|The {y} is still far behind]," it thought. [Meanwhile|But] the {y} [went on, step by step|did not stop once].',
        "But the {x} was so busy [boasting|waving to the crowd] that it [took the wrong path|ran into a thorn bush|fell into a ditch]. The {y} [came along|heard it cry] and [stopped|turned round].",
    )
    t.say(
        "When the {x} [woke up|remembered the race], it was too late: the {y} [sat at {goal}|was already there] [and smiled|and ate an apple|fast asleep].",
        '"[Hold on to my tail|Come, give me your paw]," said the {y}, and pulled the {x} out. So they reached {goal} [side by side|at the same time].',
    )
    t.paragraph()
    t.say('The {x} [hung its head|was ashamed|said nothing for a long time]. "[You have won|I was a fool|I am sorry]," it said at last.')
    t.say(
        "[Those who boast should not sleep|Slow and steady is a kind of fast|It is better to arrive than to be admired|Pride is a heavy bag to run with].",
        "After that the {x} [was a better neighbour|boasted only on Sundays|never laughed at the {y} again].",
    )
    return t


def message(dice: Dice) -> Teller:
    """A note leads from place to place to something hidden."""
    stops = dice.some(PLACES, 3)
    t = _teller(
        dice,
        prize=dice.one(
            (
                "a box of old coins",
                "a letter from the old captain",
                "a {look} {thing}",
                "a photograph",
                "a bag of sweets",
                "a tiny painted ship",
            )
        ),
    )
    _open(t)
    t.say(
        '[Between the pages of an old book|In a bottle on the shore|Under a loose board|In the pocket of an old coat] {A} found a [note|piece of paper|message]. It said: "[Look|Search|Go and look] {one}."',
        one=stops[0],
    )
    t.say(
        '{A} [showed it to {B.name}|ran straight to {B.name}]. "[Who wrote it|What can it mean|Shall we go]?" asked {B.name}. [They did not wait a minute|They put on their boots|They took a lantern and left].'
    )
    _paragraph(t)
    t.say(
        '{one} they [dug|searched|looked everywhere] until {B.name} [found a second note|saw a second note under a stone]. "[Well done|You are close|Do not give up]. [Now look|Now go and look] {two}," it said.',
        one=stops[0],
        two=stops[1],
    )
    _aside(t, 0.4)
    t.say(
        '{two} there was [nothing at first|only a {beast}|nobody]. But then {A} [felt something hard under the leaves|saw an arrow scratched into the wall|noticed that one stone was loose], and behind it [was a third note|lay another piece of paper]: "{three}."',
        two=stops[1],
        three=stops[2],
    )
    _paragraph(t)
    t.say(
        "It was [getting dark|late] when they [came to the last place|reached the end of the trail]. {three}, [in a small hole|in a rusty tin|wrapped in cloth], they found {prize}.",
        three=stops[2],
    )
    t.say(
        '"[I wondered when somebody would find it|I hid it when I was your age|So you can read my writing]," said a voice. It was {E.name}.',
        "Nobody ever learned who [had written the notes|had hidden it there].",
        "{E} [laughed until tears came|turned red]. It had been {E.name} all along.",
    )
    _close(t)
    return t


def newcomer(dice: Dice) -> Teller:
    """Someone new is shy; a small kindness begins a friendship."""
    t = _teller(dice)
    t.facts["heir"] = "daughter" if t.cast["B"].he == "she" else "son"
    _open(t)
    t.say(
        "A new family had moved into the {look} house[| next door| near the church]. They had a {heir} called {B.name}.",
        "There was a new child at school: {B.name}, who came from [far away|the mountains|another country|the city].",
    )
    t.say(
        '{B} [never said a word|always stood alone|looked at the ground|sat by the window]. "[{B.He} is proud|{B.He} is strange|Leave {B.him} alone]," the others said.'
    )
    t.say("But {A} [was {trait} and thought about it|remembered {A.his} own first day|was not so sure].")
    _paragraph(t)
    t.say(
        '[One {daypart}|The next day] {A} [put {food} on a plate|picked some flowers|took {A.his} {thing}] and [rang the bell|knocked at the door]. {B} opened it [just a little|slowly]. "[This is for you|I live over there]," said {A.name}.',
        '[One {daypart}|On {A.his} way home] {A} saw that {B.name} had dropped {B.his} {thing}. {A.He} picked it up and [ran after {B.him}|gave it back]. "[Thank you|You are the first who speaks to me]," said {B.name}.',
    )
    _aside(t)
    t.say(
        "It turned out that {B.name} [could draw|knew all the stars|could talk like a {beast}|had sailed across the sea|played the flute|kept bees]. {A} [listened with open mouth|wanted to know everything|had never heard anything like it]."
    )
    t.say('"Will you come again tomorrow?" {B.name} asked. "[Of course|Every day, if I may|And I will bring the others]," said {A.name}.')
    t.maybe(
        0.6, "[A month later|By the end of {season}], {B} [had more friends than anybody|was no longer shy|laughed as loudly as the rest]."
    )
    _close(t)
    return t


def garden(dice: Dice) -> Teller:
    """Seeds are sown, something threatens them, there is a harvest, and it is divided."""
    crop = dice.one(("pumpkin", "cabbage", "carrot", "turnip", "sunflower", "melon", "bean plant"))
    sharers = dice.number(2, 5)
    each = dice.number(2, 4)
    t = _teller(dice, crop=plural(crop), one=crop, total=NUMBERS[sharers * each], sharers=NUMBERS[sharers], each=NUMBERS[each])
    _open(t)
    t.say(
        '{E} gave {A.name} a [small bag|handful|paper] of seeds. "[Plant them|Put them in the ground] [and be patient|and wait and see]," {E.he} said.',
        "{A} [found|bought] a bag of seeds [at the market|in the shed] and decided to grow {crop}.",
    )
    t.say(
        "{A} [dug a bed|pulled out the weeds] [behind the house|near the wall], [planted the seeds in straight rows|made {total} small holes] and [watered them|waited]."
    )
    _paragraph(t, 0.5)
    t.say(
        '[For two weeks nothing happened|Day after day {A.he} looked, and saw only earth]. "[Perhaps they are dead|They will never grow]," {A} [said|sighed]. "[Wait|Give them time]," said {E.name}. And then, [one {daypart}|after a warm rain], the first green [leaf|tip] came up.'
    )
    t.say(
        "But [snails came in the night|a {beast} got into the garden|no rain fell for a month|a late frost came]. {A} [went out with a lantern|built a fence of sticks|carried water from the well every evening|covered the plants with straw], and {B.name} helped."
    )
    _aside(t)
    _paragraph(t)
    t.say(
        "At the end of [summer|the season] there were {total} {crop}. {A} [counted them twice|could not carry them all]. There were {sharers} people to share with, so each got {each}."
    )
    t.say(
        '"[They taste of work|I never had better ones|Next year we plant more]," said {B.name}.',
        "{E} [kept the seeds of the biggest one|tied a ribbon round the biggest one] [for the next year|and put it in the window].",
    )
    _close(t)
    return t


def confession(dice: Dice) -> Teller:
    """Something is broken and hidden; the truth is told and is lighter than the secret."""
    t = _teller(dice, treasure=dice.one(("blue cup", "clock", "vase", "teapot", "window", "picture frame", "lamp", "chess set")))
    _open(t)
    t.say(
        "{A} [was playing with a ball|was chasing the cat|ran through the room|wanted to dust the shelf] when [it happened|there was a crash]: {E.name}'s {treasure} [fell and broke|lay on the floor in pieces]."
    )
    t.say(
        "{A.his} heart [stood still|sank]. {E} [loved that {treasure}|had had it for forty years]. Quickly {A.he} [swept up the pieces|hid it all] and [told nobody]."
    )
    _paragraph(t)
    t.say(
        '"Have you seen my {treasure}?" {E.name} asked at supper. {A} [shook {A.his} head|looked at {A.his} plate]. "Perhaps it was the [cat|wind]," {A.he} said.'
    )
    t.say(
        '[But that night {A.he} could not sleep|The soup tasted of nothing|The lie sat in {A.his} stomach like a stone]. [When {A.he} told {B.name}, {B.he} said|{B.name} knew it at once and said], "[You must tell {E.him}|It will not get better by waiting]."'
    )
    _aside(t, 0.2)
    _paragraph(t, 0.5)
    t.say(
        'In the morning {A} [went to {E.name}|stood in front of {E.name}]. "It was me," {A.he} said. "I broke the {treasure}[, and then I lied|. I am so sorry]."'
    )
    t.say(
        '{E} [was silent for a moment|looked at {A.him} for a long time|sat down]. "[I knew it|Thank you for telling me|That was harder than breaking it]," {E.he} said. "[We will glue it together|Now help me with the pieces|Once I broke my mother\'s, too]."'
    )
    t.say(
        "The {treasure} [was never quite the same|had a crack from then on], but [{A.name} felt light again|when {A.name} saw the crack, {A.he} smiled]."
    )
    _close(t)
    return t


def ghost(dice: Dice) -> Teller:
    """A frightening noise has a plain cause."""
    t = _teller(
        dice,
        house=dice.one(("the old mill", "the tower", "the empty house", "the castle", "the boathouse", "the attic")),
        cause=dice.one(
            (
                "an owl with a broken wing",
                "a loose shutter",
                "a kettle that swung in the wind",
                "a family of bats",
                "{E.name}, who was looking for {E.his} glasses",
                "a cat with a bell",
                "the rope of an old bell",
                "a goat that had eaten a sheet",
            )
        ),
    )
    _open(t)
    t.say(
        "[People said|Everybody knew|It was said] that there was a ghost in {house}. [At night one could hear it|Something moaned there at night|Lights had been seen]."
    )
    t.say('"[There are no ghosts|I do not believe it]," said {A.name}. "[Then go in|Prove it]!" said {B.name}.')
    _paragraph(t)
    t.say(
        "[So that evening|When it was dark] they [took a lantern and went|crept out of bed and ran] to {house}. The door [creaked|was not locked|hung on one hinge]. [The steps were steep|It smelled of dust|Something ran over {A.name}'s foot]."
    )
    t.say(
        "[Then they heard it|There it was]: [a long, low moan|a knocking, three times|a rustling overhead|footsteps]. {B} [grabbed {A.name}'s sleeve|wanted to run|turned as white as chalk]. {A} was [afraid, too|not so brave any more], but [{A.he} went on|held the lantern higher]."
    )
    _aside(t, 0.2)
    t.say("[Behind the last door|Up under the roof|In the corner] they [found|saw] what it was: {cause}.")
    t.say(
        '[They laughed until their sides hurt|They sat down on the floor and laughed|First nobody spoke, and then they all laughed]. "[A fine ghost|So that is our ghost|Do not tell anyone how I shook]," said {B.name}.'
    )
    t.maybe(0.5, "But [the people of {town}|others] still [walk faster|cross the street] when they pass {house}.")
    _close(t)
    return t


def lost_child(dice: Dice) -> Teller:
    """Someone is lost and finds home by noticing things on the way."""
    signs = dice.some(
        (
            "a white gate",
            "a fallen tree",
            "three tall poplars",
            "a broken cart",
            "a stone shaped like a dog",
            "a mill wheel",
            "a red roof",
            "a field of sheep",
        ),
        3,
    )
    t = _teller(dice, one=signs[0], two=signs[1], three=signs[2], goal=dice.one(GOALS))
    _open(t)
    t.say(
        "{A} followed a {beast} [into the forest|along the stream|over the fields], further and further, past {one}, past {two} and past {three}. When [it disappeared|{A.he} looked up], {A.he} did not know [where {A.he} was|the way home].",
        "On the way to {goal} {A} [took a short cut|left the road], past {one}, past {two} and past {three}. [Soon nothing looked familiar|Then the fog came down], and {A.he} was lost.",
    )
    t.say(
        '"[Do not panic|Think]," {A.he} told {A.self}. {E} had always said: "[When you are lost, remember what you passed|Turn round and look back, for the way home looks different]."'
    )
    _aside(t)
    _paragraph(t)
    t.say(
        "What had {A.he} passed last? {three}. {A} [searched|walked in a circle] until {A.he} saw it. [From there|Beyond it] {A.he} looked for {two}, and [there it was|at last it stood before {A.him}]. Then only {one} was missing."
    )
    t.say(
        "[It grew dark|The wind was cold|{A.his} feet hurt], but [in the last light|between the trees] {A} [recognised|found] {one}. And behind it [shone the lamps of {town}|somebody was calling {A.his} name: it was {B.name}]."
    )
    t.say(
        '"[Where have you been|We looked everywhere|Thank goodness]!" cried {E.name}. "How did you find the way?" "{three}, {two}, {one}," {A.name} [counted|said]. "[Just backwards|The same way, only the other way round]."'
    )
    _close(t)
    return t


PLOTS: tuple[Callable[[Dice], Teller], ...] = (
    lost_thing, errand, birthday, quarrel, rescue, storm, night_thief, learning, swaps, contest, message, newcomer, garden, confession, ghost, lost_child,
)  # fmt: skip


def story(dice: Dice) -> str:
    """One story of 80 to 300 words."""
    return dice.one(PLOTS)(dice).text()
