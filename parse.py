"""A rule-based parser for image captions, and the hierarchy of texts that HIST cuts from them.

    caption      "An orange cat laying on a white and brown cat in a bed."
    phrases      an orange cat · a white and brown cat · a bed
    subjects     cat · cat · bed
    composites   an orange cat and a white and brown cat · an orange cat and a bed · …

    python parse.py "a man riding a horse"      the tree and the hierarchy; --draw: the tree alone
    python parse.py --json --file captions.txt  one JSON object a line ("-" reads standard input)
    python parse.py --score GOLD.jsonl          precision, recall and F1, and every error

Part (a) makes the hierarchy: tokens -> tags -> noun phrases -> subjects -> composites. Part (b)
hangs the same tokens into a dependency tree, part (c) is the command line. No trained model, no
download. The levels: HIST, arXiv 2412.08110; the tree: Universal Dependencies, version 2.
"""

import argparse
import json
import os
import re
import string
import sys
from collections import Counter, namedtuple
from functools import lru_cache
from itertools import chain

# ==== (a) The hierarchy: tags, lexicon, rules, noun phrases, subjects, composites ================

# A tag is one character, so that the tags of a caption are a string and a noun phrase is a
# regular expression over it. The word between the stars is an example.
DET, POSS, NUM = "DPC"  # *a* dog, *his* dog, *two* dogs
ADJ, PARTICIPLE, DEGREE = "JZQ"  # *red* cars, *parked* cars, *very* tall men
NOUN, PLURAL, COMPOUND = "NSU"  # a *dog*, two *dogs*, a *living* room
OWNER, GENITIVE, PRON = "YMR"  # a *mans* hat, a man *'s* hat, *it*
VERB, ING, PAST = "VGE"  # a dog *runs*, a man *riding* a horse, a car *parked* in a street
BE, AUX, INF = "BHT"  # a dog *is* wet, a dog *can* swim, ready *to* go
ADV, PREP, LINK = "AIO"  # run *away*, *on* a bed, two *of* them
CONJ, SUB = "KL"  # cats *and* dogs, *while* a dog runs
REL = "W"  # a man *who* runs
COMMA, MARK, START = ",.^"  # any other sign is a MARK; START stands before the first word
ANY = string.ascii_letters + ",.^"
# Classes of words whose tag depends on their neighbours, each named by one of its words: *ride*,
# *rides* are mostly verbs, *lights* is mostly a noun, all may be the other. APOSTROPHE_S: 's.
RIDE, RIDES, LIGHTS, RIDING, PARKED, PAINTING, ORANGE = "yszgeij"
UP, NEARBY, BACK, RIGHT, HAS, CAN, ALL, ONE, THAT, HER, TO, APOSTROPHE_S = "pwbrdnlothum"

# Words by class, alphabetically; of verbs: the class of the word and of its form in -s.
VERBS = {
    (VERB, VERB): """accept add adorn allow appear approach argue arrive ask assemble attach attempt
    await bake bathe beg begin boil bring browse build buy carry carve celebrate chat chew chop
    clutch come compete connect consist contain converse crawl create crouch cuddle decorate deliver
    depart depict descend describe dig dine discuss dodge don drag drape draw dribble drill eat
    emerge enjoy enter examine extend fill fix flee float follow forage frolic gain gallop gather
    gaze get give glide go grab grapple graze greet grow guide hang hear herd hike hold hover huddle
    include indicate inflate inspect jog juggle keep knead kneel knit know laugh lay lean let lick
    lie listen love make maneuver march meet melt mix mow munch navigate observe operate overlook
    participate pass pay peek peer perform pluck poke portray pour prepare raise read receive recite
    recline reflect relax remove resemble roam rub say scale scoop scramble scratch scream sculpt
    see seem select sell send sew shave shear shovel sing sip sit skid sniff snuggle soar socialize
    speak splash sprint squeeze stare stay steer stir strum surround sweep swim tackle take tell
    think throw trot try tumble unload vault wade wander want wear weld whisper wrestle write yawn
    yell""",
    (RIDE, RIDES): """balance bend bite blow bounce brush buck capture catch chase cheer clap climb
    cook cross cruise cut display dive drive face fall feature feed finish flip fly glance grind
    help hide hit hug hunt jump kick lead leap lift look lounge move pause pedal photograph pick
    play plow point pose practice pull push race reach repair rest return ride rise run serve shake
    shine shout show sleep slide spin squat stand start stretch strike stroll surf sway swing talk
    toss touch tow travel turn use wait wake walk wash watch wipe work""",
    (RIDE, LIGHTS): """bark bat blend board bow burn camp comb cover crowd dress drink drop fight
    film fish fry gesture glow grill groom hammer host kiss land leave light line load mount nap
    pack paddle paint park peel pet pile pitch place plant post roast roll row sail scrub share shop
    sign signal skate skateboard sketch ski slice smile snowboard sport spray spread state stick
    stop taste text tie trail train trick trim type wave wrap""",
}
WORDS = {
    ADJ: """able adjacent african alpine amber american ancient aqua arab arabic asian asleep
    assorted australian awake bad bald bare barefoot barren basic beige best better big black blond
    blonde blue bored bottom brazilian bright british bronze brown brunette bubbly calico calm
    canadian casual caucasian center central ceramic checkered chilly chinese classic clean clear
    close closed cluttered cold compact complete complex contemporary cool copper cramped crimson
    crisp crowded curly current curved cute cyan damp dark dead decadent deep dense different
    digital dilapidated dim distant dreary dual dull dutch early eastern egyptian elaborate elderly
    electric electronic elegant english entire european excited fake fancy far fast fat favorite
    feathery few fifth final fine first flat floral foreign forested formal fourth fragile french
    fresh front full future german gigantic gold golden good googly gothic gourmet grand gray great
    greek green grey gross handicap handicapped handmade handsome hard high hilly hispanic historic
    homemade hot huge human icy idle important indian indigo indoor inner inverted irish italian
    japanese juicy jumbo junior khaki korean large last late latin lavender little live local lone
    lonely long loose loud low lush magenta main major manual maroon medieval medium metallic
    metropolitan mexican middle middle-aged military mini miniature minimal minor mixed mobile
    modern multi-colored multicolored multiple naked narrow natural naval nearest neat neon new next
    nice normal nude odd old only open opposite ornate other outdoor outer overcast oversized own
    pale panoramic parallel pastel pink pinkish plain poor pregnant private public purple quaint
    quick quiet rare raw real red reddish retro rich ripe roman rotten rough round rundown rural
    russian sad same scarlet scary scattered scenic scottish second senior separate serene several
    shallow sharp shorn short sick silly silver similar simple single slim slippery slow small
    smiley smooth snow-covered soft solemn solitary spanish sparse spicy spotted stationary steep
    straight strange stray striped strong stylish suburban such sweet swiss tall tan teal teenage
    tender thai thick thin third tight tired top transparent triple turkish turquoise twin ugly
    unattended unfinished unique unmade unopened unripe unused unusual upper upscale upside
    upside-down urban vast vibrant victorian vietnamese vintage violet warm weathered western wet
    white whole wicker wide wild wooded wooden woolen woolly yellow young""",
    NOUN: """army assembly baby balcony beauty belly body buddy buggy bully bunny butterfly candy
    canopy canvas ceremony cherry christmas cleaner company cooler copy curry daddy dairy daisy
    dinghy doggy dummy dwelling evening fairy family ferry foreigner gas gravy gypsy handful hobby
    holly husky italy ivy jelly kitty lady lens lightning lily lobby locomotive loner material moped
    morning mummy novelty opener owner party passerby passersby patty penny ping plastic plenty pony
    potty poverty priest property puppy rally reed rugby seed shed shelving sky sled speed spring
    stable sting stranger study tabby table teddy teenager thanksgiving thing trolly vegetable
    weed""",
    PLURAL: "buffalo cattle children deer elk feet geese men mice people police sheep teeth women",
    VERB: """ate came drove fell flew gave got grew laid ran rode sat saw stood swam swung threw
    took went wore wrote""",
    PARKED: """bent bitten blown bought broken built caught clad cut done drawn driven drunk dug
    eaten fallen fed flown frozen gone grown held hidden hung kept laden laid led lit lost made
    overgrown put ridden seen set shown shut sold split strung stuck taken thrown torn worn woven
    written""",
    PAINTING: """awning bedding boxing building carving ceiling clothing covering crossing drawing
    dressing earring filling flooring frosting icing king landing lettering lighting lining marking
    meeting netting offering opening painting plumbing pudding railing ring seating serving setting
    string stuffing topping wedding wing writing""",
    ORANGE: "adult antique female giant half light male orange oval plaid rear square",
    DET: "a an another any each either every neither no some the these this those",
    POSS: "his its my our their whose your",
    PRON: """anybody anyone eachother everybody everyone everything he herself him himself i it
    itself me nobody nothing ones others she somebody someone something them themselves they they're
    us we what you""",
    NUM: """eight eleven fifteen fifty five forty four fourteen hundred nine seven six ten thirteen
    thirty thousand three twelve twenty two""",
    PREP: """above across after against along alongside amid among at atop before behind below
    beneath beside between beyond during except for in into like near on onto past than through
    throughout thru toward towards under underneath until upon via with within without""",
    UP: "aboard about around by down inside off out outside over up",
    ADV: """afar again ahead airborne alone already also apart away didn't doesn't don't downhill
    downstairs downward downwards else even ever everywhere here how indoors instead just maybe n't
    never not now onstage outdoors outward rather sideways somewhere still then there together too
    uphill upright upstairs upward upwards why yet""",
    NEARBY: "backward backwards forward nearby overhead underwater",
    DEGREE: "almost extra less more most otherwise pretty quite so somewhat super very well",
    BE: "am are aren't be been being is isn't was were",
    AUX: "can't cannot could may might must should will would",
    CONJ: "& and but nor or",
    SUB: "although as because if since though when where whether while",
    HAS: "did do does had has have having",
    REL: "which who whom",
    LINK: "from of",
    RIGHT: "left right",
}


def with_plurals(words):
    """The set of the words of a text, and of each with an s behind it."""
    return {word + ending for word in words.split() for ending in ("", "s")}


# -ing words that belong to the noun after them ("cutting board"), the first even where a verb may
# stand ("and parking lots"); and those that describe it ("smiling people").
ING_ALWAYS = "baking cutting dining living parking roasting shopping swimming vending".split()
ING_COMPOUND = """baking bathing batting cooking cutting dining drinking feeding fishing folding
    frying gaming herding hunting ironing living loading mixing operating parking playing racing
    reading riding roasting running sewing shopping sitting skiing sleeping surfing swimming
    training vending waiting walking watering""".split()
ING_STATE = """flying hanging matching moving oncoming running sitting smiling standing towering
    walking""".split()
# Words that belong to the noun after them: "hot dog" is a subject.
FIXED = with_plurals("""big-ben big-rig close-up double-decker flat-screen french-fries half-pipe
    high-chair high-heel hot-dog light-bulb light-fixture light-house light-pole light-post
    light-switch orange-juice orange-peel orange-slice polar-bear rear-view smart-phone
    stainless-steel third-base top-hat wet-suit wild-flower""")
# "a group of people" is one phrase, and people is its subject.
QUANTITY = with_plurals("""amount array assortment batch bit bite bunch bunches bundle chunk cluster
    collection couple crowd dozen flock gang group half halves handful herd hundred kind line load
    lot mix multitude number pack pair part patch patches piece pile plenty portion row section
    selection series serving set slice sort stack string strip swirl team thousand ton trio type
    varieties variety""")
# A picture of a dog shows a dog: the dog is a phrase, the picture is none.
PICTURES = with_plurals("""close close-up closeup footage image photo photograph picture portrait
    selfie shot snapshot up view""")
# Times, events, manners, abstractions: one cannot point at them.
NOT_THINGS = with_plurals("""action adventure afternoon ages air attempt autumn backhand badminton
    break business call celebration ceremony color colour competition consumption contest contrast
    conversation dawn day daylight daytime direction discussion distance dozen dusk evening event
    example excitement experience fashion feel flight fun game golf haircut height help hockey hour
    journey jump kind lesson life look love marathon match matches midair midst moment morning
    motion movement nap need night noon order performance play position practice process progress
    race rest ride rugby season serve size skateboarding skiing snowboarding sort speech speed
    stillness stunt style summer surfing talk tennis time today tonight tournament transit trick
    trip turn type unison use variety visibility volley wait weather winter work year""")
# Nor at sports, but at "a soccer ball"; nor at words that place things, but at "his back";
# bare after a preposition ("on display"); in "in a row"; made, taken or had ("taking a swing").
BALL_SPORTS = with_plurals("baseball basketball football soccer softball volleyball")
SPORTS = ("skating", "boarding", "surfing", "skiing", "sailing")  # "is snow boarding"
LOCATIONS = with_plurals("""back bottom center centre distance edge end front inside left middle
    outside rear right side top way""")
BARE = """bat bloom board breakfast case christmas circles construction course dinner display duty
    fire foot formation front hand horseback line lines lunch pairs part place play row rows sale
    service shape stock sunrise sunset tow town""".split()
ARRAYS = ("row", "line", "circle", "group", "pile")
ACTS = with_plurals("bite bow drink hit place shot sip swing way")
TAKING = """do does doing get getting has have having make makes making take taken takes taking
    took""".split()
# What most often does what a verb says: in "a man in a hat riding a horse" the man rides. After
# "the", the second alone; after "a", any noun, but for words of MANY ("a few street signs").
MOVERS = with_plurals("""airplane baby batter bear biker bird boat boy bus cat catcher chef child
    children couple cow cyclist dog driver duck elephant giraffe girl goat group guy horse kid
    kitten lady man men monkey officer people person pitcher plane player puppy rider runner sheep
    skateboarder skater skier snowboarder surfer swimmer team toddler train truck woman women worker
    zebra""")
PEOPLE = """batter boy cat child dog girl guy lady man person pitcher player rider skateboarder
    skater skier surfer toddler woman""".split()
SINGULAR = ("a", "an", "one", "another", "each", "every")
MANY = QUANTITY | {"few", "several", "many"}

LEXICON = {"can": CAN, "her": HER, "one": ONE, "that": THAT, "to": TO}
LEXICON |= {"all": ALL, "both": ALL, "back": BACK, "side": BACK}
for (verb_class, s_class), verbs in VERBS.items():
    for verb in verbs.split():  # carry -> carries, watch -> watches, ride -> rides
        stem = re.sub("(s|x|z|o|[sc]h)$", r"\1e", re.sub("(?<![aeou])y$", "ie", verb))
        LEXICON[verb] = verb_class
        LEXICON[stem + "s"] = s_class
for word_class, members in WORDS.items():
    LEXICON.update(dict.fromkeys(members.split(), word_class))
# Words that are not in the lexicon: the first ending that fits decides.
ENDINGS = (
    (r"['’]s$", APOSTROPHE_S),
    (r"[\d.,/:]*\d[\d.,/:]*(?:st|nd|rd|th|s)?$", NUM),
    (r".+(?:ing|in')$", RIDING),
    (r".{2,}ed$", PARKED),
    (r".{2,}ly$", DEGREE),
    (r".*(?:[aeou]y|[ei]ty|[aeou]ry|[snlue]try|lry|ndry|phy|[lor]gy|cy|berry)$", NOUN),
    (r".{2,}(?:y|iest|mental|(?<!t)ous|less|ful|ular|ial|onal|ical|[st]ive)$", ADJ),
    (r".{2,}(?:[aeiou]ble|[wh]ern|[seoa]tic)$", ADJ),
    (r".+(?:ss|us|is)$", NOUN),
    (r".+s$", PLURAL),
    (r"[^\W_]", NOUN),
    (r",", COMMA),
    (r"", MARK),
)
# bigger -> big, nicer -> nice, tidiest -> tidy; small and nice are in the lexicon
DEGREES = ("(er|est)$", ""), ("(?<=e)(r|st)$", ""), (r"(.)\1(er|est)$", r"\1"), ("i(er|est)$", "y")


# A word or a sign, caption[start:end], and its tag. A noun phrase and its subject, the head noun
# with its compounds; a span is (start, end). A caption with its `Token`s and `Phrase`s, in order.
Token = namedtuple("Token", "text start end tag")
Phrase = namedtuple("Phrase", "text span subject subject_span")
Parse = namedtuple("Parse", "caption tokens phrases")

# A word with its hyphens, apostrophes and decimals; an abbreviation with its dots; 's; any sign.
TOKEN = re.compile(
    r"[^\W_]+(?:[-'’](?!s\b)[^\W_]+|[.,:/](?=\d)\d+|\.(?<=\b(?:[Ss]t|[DdMm]r)\.)"
    r"|(?<=\b[A-Za-z])\.(?:[A-Za-z]\.)+)*|['’]s\b|\S"
)


def tokenize(caption):
    """Offsets [(start, end), …] of the words and signs of a caption; [] when there are none."""
    return [match.span() for match in TOKEN.finditer(caption)]


@lru_cache(maxsize=1 << 16)
def classify(word):
    """The class of a lower-cased word seen alone: by lexicon, last part, degree, then ending."""
    if word in LEXICON:
        return LEXICON[word]
    last = word.rpartition("-")[2]
    if last != word and last.isalpha():  # black-and-white, snow-covered, t-shirts
        found = classify(last)
        plain = PLURAL if last.endswith("s") else NOUN
        return found if found in (ADJ, PARKED, RIDING) else plain
    if any(LEXICON.get(re.sub(pattern, base, word)) == ADJ for pattern, base in DEGREES):
        return ADJ
    return next(found for pattern, found in ENDINGS if re.match(pattern, word))


# Groups of tags and classes for the rules below, by where they stand.
NOUNS = NOUN + PLURAL
COMPOUNDS = NOUNS + COMPOUND
JOINTS = COMMA + CONJ
THINGS = NOUNS + ORANGE + RIDE + LIGHTS  # may be a noun
STARTS = THINGS + ADJ + NUM + COMPOUND + PARKED + PAINTING + RIDES + ONE  # starts a noun phrase
NEXT = STARTS + RIDING + DEGREE
NOUNISH = NEXT + VERB  # may go on a noun phrase
ARTICLES = DET + POSS + ALL
OPENERS = ARTICLES + HER  # starts a noun phrase and cannot go on one
INSIDE = ARTICLES + ADJ + PARTICIPLE + NUM + GENITIVE  # stands in one, before its noun
PREPS = PREP + LINK
BETWEEN = START + JOINTS + PREPS  # stands before one
PLACES = PREPS + UP + ADV
AFTER = PLACES + TO + SUB + NOUNS + ADJ  # may follow a verb that may be a noun
FOLLOWS = PLACES + TO + SUB + JOINTS + MARK + OPENERS + NEARBY + PRON + THAT + BE  # follows a verb

# words[index] between its neighbours: words, tags of the two to its left, classes of the two to
# its right; then all words and all tags, which are classes from index on.
Near = namedtuple("Near", "index words tags before word after left2 left right right2")


# Tests of what a rule asks for beside the two tags next to a word.
def is_place(near):
    return near.word in LOCATIONS


def after_mover(near):
    return near.before in MOVERS


def after_one(near):
    """The noun before is one of its kind, so no plural follows it: a bird *perches* on."""
    words, tags, start = near.words, near.tags, near.index - 1
    bound = max(1, start - 8)
    while start > bound and tags[start] in COMPOUNDS + ADJ + PARTICIPLE + JOINTS:
        if tags[start] in JOINTS and tags[start + 1] not in ADJ + CONJ:
            break  # a man, a woman
        start -= 1
    if near.word[-1] != "s" or f"{near.before}-{near.word}" in FIXED:
        return False
    if words[start] == "the":
        return near.before in PEOPLE
    return words[start] in SINGULAR and not MANY.intersection(words[start : near.index])


def after_two(near):
    """Two things or more came before, and no verb: a man and a woman *ride* on."""
    some = near.tags[max(2, near.index - 6) : near.index]
    verb = LEXICON.get(near.word + "s") == RIDES
    several = PLURAL in near.tags[2:6] or CONJ in some[-4:]
    return verb and several and not any(tag in VERB + ING + PAST + BE for tag in some)


def compounds(near):
    """A *cutting* board, but a *riding* man; between phrases only ING_ALWAYS: *parking* lots."""
    if near.left in JOINTS + START + NOUN and (near.word not in ING_ALWAYS or after_mover(near)):
        return False
    return near.word in ING_COMPOUND and near.after not in MOVERS


def owns(near):
    """A person, and the apostrophe is missing: a *persons* back."""
    return near.word == "mans" or near.before in ("a", "an") and near.word[:-1] in MOVERS


# The class of a word, the tag before it, the class after it -> its tag; then what else must hold.
# The first row that fits counts; where none does, the class is a tag.
RULES = (
    (ALL, ANY, RIDING + PARKED, PRON),  # people, *all* wearing hats
    (ALL, ANY, ANY, DET),  # *all* people
    (ADJ, DET, ANY, PRON, lambda near: f"{near.before} {near.word}" == "each other"),
    (ADJ, DET, RIDING, PRON, lambda near: near.word == "other"),  # the *other* riding
    (ADJ, NOUN, ANY, NOUN, is_place),  # a hill *top*
    (ADJ, ANY, NOUNISH + RIGHT, ADJ),  # a *red* bus
    (ADJ, ANY, ANY, NOUN, is_place),  # on *top* of
    (ORANGE, ANY, JOINTS, ADJ, lambda near: near.right2 == ADJ),  # an *orange* and red bus
    (ORANGE, NOUN, ANY, NOUN),  # a street *light*
    (ORANGE, ANY, RIDES + RIDING + VERB, NOUN),  # an *orange* sits
    (ORANGE, ANY, NOUNISH, ADJ),  # an *orange* bus
    (NOUN, PLURAL + INF, OPENERS, VERB),  # to *pedal* a bike
    (NOUN, PLURAL, PLACES, VERB, lambda near: near.left2 in START + NUM),  # two men *grapple* on
    (PLURAL, NOUN + DEGREE, OPENERS, VERB),  # a boy *pedals* his bike
    # a man stands and *bends* his knees
    (PLURAL, CONJ, OPENERS, VERB, lambda near: VERB in near.tags[: near.index][-9:]),
    (PLURAL, PRON, ANY, VERB),  # as she *bends*
    (PLURAL, NOUN, FOLLOWS + RIDING, VERB, after_one),  # a bird *perches* on
    (PLURAL, ANY, NOUNISH + BACK, OWNER, owns),  # a *mans* hat
    (LIGHTS, PRON, ANY, VERB),  # as it *waves*
    (LIGHTS, NOUN + DEGREE, ARTICLES, VERB),  # a boy *waves* a flag
    (LIGHTS, NOUN, AFTER + JOINTS + MARK, VERB, after_mover),  # a boy *waves*
    (LIGHTS, NOUN, AFTER, VERB, after_one),  # a flag *waves* in
    (LIGHTS, ANY, ANY, PLURAL),  # two *lights*
    (RIDE, REL + PRON + AUX + INF, ANY, VERB),  # to *ride*
    (RIDE, JOINTS, ANY, VERB, lambda near: near.left2 == VERB),  # sit and *ride*
    (RIDE, PLURAL + BE, NOUNISH + FOLLOWS, VERB),  # people *ride* on
    (RIDE, NOUN + COMMA, OPENERS + PLACES, VERB, after_two),  # a man and a woman *ride* on
    # bride and groom *walk* hand in hand
    (RIDE, NOUN, NEXT, VERB, lambda near: near.left2 == CONJ and after_two(near)),
    (PAINTING, PLURAL + BE + PRON + VERB, ANY, ING),  # people *painting*
    (PAINTING, NOUN, OPENERS, ING),  # a worker *painting* a wall
    (PAINTING, NOUN, ANY, ING, after_mover),  # a man *painting*
    (RIDING, INSIDE + COMPOUND + BETWEEN + NOUN, THINGS, COMPOUND, compounds),  # a *cutting* board
    (RIDING, INSIDE + DEGREE, NOUNISH, PARTICIPLE),  # a *smiling* man
    # and *smiling* people; a glass of *running* water, but a game of *throwing* red balls
    (RIDING, BETWEEN + VERB + ING, NOUNISH, PARTICIPLE, lambda near: near.word in ING_STATE),
    (RIDING, PREPS, ADJ + RIDING + VERB, ING),
    (RIDING, PREPS, NOUNISH, PARTICIPLE, lambda near: near.before in ("of", "with")),
    (RIDING, ARTICLES, ANY, NOUN),  # the *landing*
    (RIDING, ANY, ANY, ING),  # a man *riding*
    (PARKED, INSIDE + BETWEEN + DEGREE + VERB + ING + NOUN, NEXT, PARTICIPLE),  # *parked* cars
    (PARKED, ARTICLES, ANY, NOUN),  # a *set* of
    (PARKED, ANY, ANY, PAST),  # cars *parked* on
    (VERB, ANY, OPENERS, VERB),  # the old *hold* their canes
    (VERB, INSIDE, ANY, NOUN),  # a *stare* at
    (RIDES, START + POSS + ADJ, OPENERS, VERB),  # the young *rides* a horse
    (RIDES, INSIDE + PREPS + START + COMPOUND, ANY, PLURAL),  # two *rides*
    (TO, ANY, VERB + BE, INF),  # *to* eat
    (TO, ANY, RIDE, INF, lambda near: near.before != "next"),  # *to* ride
    (TO, ANY, NOUN, INF, lambda near: near.right2 == DET),  # *to* pedal a bike
    (TO, ANY, ANY, LINK),  # next *to* it
    (BACK, NOUNS, ANY, ADV, lambda near: near.word == "side" and near.after == "by"),
    (BACK, ANY, ANY, NOUN, lambda near: near.word == "side"),  # the *side* of
    (BACK, ANY, NOUNS, ADJ, lambda near: near.after in MOVERS),  # the *back* man
    (BACK, ARTICLES + ADJ + GENITIVE + OWNER + PREPS, ANY, NOUN),  # the *back* of
    (BACK, ANY, NOUNISH, NOUN),  # *back* wheels
    (NEARBY, ARTICLES + ADJ, ANY, ADJ),  # a *nearby* house
    (RIGHT, ANY, NOUNISH + BACK, ADJ),  # the *right* hand
    (RIGHT, ARTICLES + ADJ + PREPS, ANY, NOUN),  # his *right*
    (UP, ANY, STARTS + OPENERS + PRON + THAT + BACK, PREP),  # *up* a hill
    (NEARBY + RIGHT + UP + BACK, ANY, ANY, ADV),  # looking *up*
    (HER, ANY, NOUNISH + RIGHT + BACK, POSS),  # *her* hat
    (ONE, ANY, THINGS + ADJ, NUM),  # *one* dog
    (HER + ONE, ANY, ANY, PRON),  # behind *her*
    (THAT, NOUNS + PRON + ADJ, ANY, REL),  # a dog *that* runs
    (THAT, ANY, THINGS + ADJ, DET),  # *that* dog
    (THAT, ANY, ANY, SUB),  # it seems *that*
    (CAN, NOUNS + PRON, VERB + RIDE + BE + ADV, AUX),  # a dog *can* swim
    (RIDE + PAINTING + ORANGE + CAN, ANY, ANY, NOUN),  # a *can* of
    (RIDES + HAS, ANY, ANY, VERB),  # a man *has*
    (APOSTROPHE_S, NOUNS + PRON, RIDING, BE),  # a dog *'s* running
    (APOSTROPHE_S, NOUNS + PRON, NOUNISH + RIGHT + BACK, GENITIVE),  # a dog *'s* head
    (APOSTROPHE_S, ANY, ANY, BE),  # it *'s* red
)
RULES_OF = {}
for classes, *rule in RULES:
    for word_class in classes:
        RULES_OF.setdefault(word_class, []).append(rule)


def decide(words, classes):
    """The tags of lower-cased words, from their classes, left to right; lists. Linear."""
    words = ["", "", *words, "", ""]
    tags = [START, START, *classes, MARK, MARK]
    for i in range(2, len(words) - 2):
        if words[i + 1] in ("next", "close") and words[i + 2] == "to":
            tags[i + 1] = ADV
        near = Near(i, words, tags, *words[i - 1 : i + 2], *tags[i - 2 : i], *tags[i + 1 : i + 3])
        if f"{near.word}-{near.after}" in FIXED:
            tags[i] = NOUN
            continue
        for left, right, tag, *tests in RULES_OF.get(tags[i], ()):
            if near.left in left and near.right in right and all(test(near) for test in tests):
                tags[i] = tag
                break
    return tags[2:-2]


# A base noun phrase over the tags; k is a conjunction or a comma between adjectives of one noun.
# "red and white cups" is JkJS, "a dog 's head" DNMN. Repetition is bounded: time is linear.
JOINED = re.compile(r"(?<=[JZ])(?:[,K]|,K)(?=Q?[JZ][JZ,KQ]{0,6}[JZNSU]{0,4}[NS])")
NOUN_PHRASE = re.compile(
    r"D{0,3}P?(?:[JZCkUMY]|Q(?=[QJZCNSU])|N(?=[NSZUM])|R(?=M)|S(?=[NSM])){0,40}[NS]|R"
)


def noun_phrases(tags):
    """[(first, last), …] of the base noun phrases and pronouns; last is the head."""
    code = JOINED.sub(lambda joint: "k" * len(joint.group()), "".join(tags))
    return [(match.start(), match.end() - 1) for match in NOUN_PHRASE.finditer(code)]


def is_thing(words, tags, first, last, subject):
    """Whether one can point at what the noun phrase words[first : last + 1] names."""
    word, before, after = words[last], words[first - 1], words[last + 1]
    taken = before in TAKING
    if tags[last] == PRON or word in NOT_THINGS or word in ACTS and taken:
        return False
    if word in PICTURES and (taken or after not in ("on", "hanging", "hung", "above")):
        return False
    if before in ("says", "saying") and tags[first] != DET:
        return False  # a sign saying stop
    if word == "corner" and after == "of" or word in ARRAYS and before == "in":
        return False  # at the corner of, in a row
    if word in LOCATIONS and subject == last:
        return not {POSS, GENITIVE, OWNER}.isdisjoint(tags[first:last])
    if first < last:
        return True
    sport = tags[first - 1] == BE and after in SPORTS
    bare = word in BARE and LEXICON.get(before) in (PREP, LINK)
    return not (sport or bare or word in BALL_SPORTS)


def read_phrases(caption, spans, words, tags):
    """The `Phrase`s of a caption; "of" after a word of QUANTITY makes two noun phrases one."""
    words = words + ["", ""]  # words[-1] stands before the first
    phrases, quantity = [], None
    for first, last in noun_phrases(tags):
        subject = last
        while subject > first and tags[subject - 1] in COMPOUNDS:
            subject -= 1
        start = first if quantity is None or words[first - 1] != "of" else quantity
        quantity = None
        if words[last + 1] == "of" and (words[last] in QUANTITY or words[last] == "body"):
            quantity = start
        elif is_thing(words, tags, first, last, subject):
            begin, end = spans[start + (words[start] == "whose")][0], spans[last][1]
            subject = spans[subject][0]
            phrases.append(
                Phrase(caption[begin:end], (begin, end), caption[subject:end], (subject, end))
            )
    return phrases


def parse(caption):
    """The `Parse` of a caption, whatever string it is. Linear in its length."""
    spans = tokenize(caption)
    texts = [caption[start:end] for start, end in spans]
    words = [text.lower() for text in texts]
    tags = decide(words, [classify(word) for word in words])
    tokens = [Token(text, *span, tag) for text, span, tag in zip(texts, spans, tags)]
    return Parse(caption, tokens, read_phrases(caption, spans, words, tags))


def compose(a, b):
    """The text of the composite of two phrases."""
    return f"{a.text} and {b.text}"


def composites(phrases, reach=8):
    """Pairs of phrases of different text, at most `reach` phrases apart, so that time is linear."""
    pairs = [(a, b) for n, a in enumerate(phrases) for b in phrases[n + 1 : n + 1 + reach]]
    return [(a, b) for a, b in pairs if a.text.lower() != b.text.lower()]


# The texts of a `Parse` at three levels; phrase and subject of one place belong together.
def caption_texts(parsed):
    """[the caption]."""
    return [parsed.caption]


def phrase_texts(parsed):
    """The phrases, in the order of the caption."""
    return [phrase.text for phrase in parsed.phrases]


def subject_texts(parsed):
    """The subjects of the phrases."""
    return [phrase.subject for phrase in parsed.phrases]


# ==== (b) The tree: it is built only when asked for, and changes no phrase and no subject =======

# Universal Dependencies: parts of speech with their tags; relations inside a noun phrase, where
# nouns are "compound"; relations of words that wait for a head to their right.
EXPLETIVE = "X"  # *there* is a dog: a tag that only a tree asks for
UPOS = {
    "ADJ": ADJ,
    "ADP": PREPS,
    "ADV": ADV + DEGREE,
    "AUX": BE + AUX,
    "CCONJ": CONJ,
    "DET": DET,
    "NOUN": COMPOUNDS + OWNER,
    "NUM": NUM,
    "PART": INF + GENITIVE,
    "PRON": POSS + PRON + REL + EXPLETIVE,
    "PUNCT": COMMA + MARK,
    "SCONJ": SUB,
    "VERB": VERB + ING + PAST + PARTICIPLE,
}
INNER = {DET: "det", POSS: "nmod:poss", OWNER: "nmod:poss", ADJ: "amod", PARTICIPLE: "amod"}
INNER |= {DEGREE: "advmod", NUM: "nummod"}
WAITS = {ADV: "advmod", DEGREE: "advmod", PREP: "case", LINK: "case", GENITIVE: "case", CONJ: "cc"}
WAITS |= {INF: "mark", SUB: "mark", BE: "aux", AUX: "aux", EXPLETIVE: "expl"}
WAITS |= {COMMA: "punct", MARK: "punct"}
HAVE = ("has", "have", "having")
NOMINAL, PLACE, EXISTS = "n", "a", "b"  # a noun phrase; next *to*; there *is*
NONE, WAITING = -1, -2  # no word; the head of a word that has none yet
# "picks up a box": up belongs to picks; "tries to", "starts": what follows completes it; "gives a
# boy a ball"; "cuts it with a knife": the knife belongs to cuts.
PARTICLE = re.compile(
    r"(?:pick|tak|took|wak|wok|hold|held|lift|put|cut|set|stick|stuck|blow|throw|fill|get|roll|fold"
    r"|turn|pull|try)[a-z]* (?:up|off|out|down|away)$"
)
COMPLETED = re.compile(
    "tr[yi]|want|beg[iau]|start|gett?|got|ready|about|prepar|attempt|learn|lik|lov|seem|appear|need"
    "|continu|keep|able|wait|enjoy"
)
GIVES = re.compile("giv|gave|show|feed|fed|hand|offer|serv|toss|throw")
TOOLS = (
    "knife fork spoon racket racquet bat hand hands brush scissors chopsticks stick hose".split()
)

# A token in its tree: tag is its universal part of speech, head the index of its head (-1: it is
# the root), label its relation to the head.
Node = namedtuple("Node", "text start end tag head label")


def refine(words, tags):
    """The tags, with distinctions that only a tree asks for."""
    tags = [*tags, MARK]
    for i, (word, after) in enumerate(zip(words, [*words[1:], ""])):
        if word in HAVE and tags[i + 1] in (BE, PAST):
            tags[i] = AUX  # has been
        elif word in ("all", "both"):
            tags[i] = DET
        elif word == "there" and tags[i + 1] in (VERB, BE, AUX):
            tags[i] = EXPLETIVE
        elif word == "about" and after == "to":
            tags[i] = ADJ
        elif word in ("after", "before") and after in ("he", "she", "they", "we"):
            tags[i] = SUB
        elif tags[i] == PREP and tags[i - 1] in VERB + ING + PAST:
            tags[i] = ADV if PARTICLE.match(f"{words[i - 1]} {word}") else PREP
    return tags[:-1]


class Grower:
    """Hangs the words of a caption together in one pass, left to right.

    A word is hung on one to its left, or waits until one to its right, or at last the root,
    takes it. The attributes are indices of words: the latest of each kind.
    """

    def __init__(self, words, tags):
        self.words, self.tags, self.ends = words, tags, dict(noun_phrases(tags))
        self.heads, self.labels = [WAITING] * len(words), [""] * len(words)
        self.root = self.noun = self.verb = self.first_verb = NONE
        self.joined = self.joint = NONE  # a noun phrase joined to another, and its conjunction
        self.place = ""  # the latest preposition
        self.cases = []  # prepositions that wait for a noun phrase
        self.open_clause()

    def open_clause(self):
        """What waits for a predicate: nothing yet."""
        self.subject = self.relative = self.conjunction = self.mark = self.auxiliary = NONE
        self.waiting = []

    def hang(self, word, head, label):
        self.heads[word], self.labels[word] = head, label

    def hang_modifiers(self, first, last):
        """Words of a noun phrase hang on its head, or on a noun or an adjective inside it."""
        owner = adjective = last
        joined, chain = [], NONE  # adjectives that hang on the first of their chain
        for i in range(last - 1, first - 1, -1):
            tag, after = self.tags[i], self.tags[i + 1]
            if tag == GENITIVE:
                self.hang(i, i - 1, "case")
                self.hang(i - 1, owner, "nmod:poss")
                owner = i - 1
            elif tag in JOINTS:
                self.hang(i, adjective, WAITS[tag])
                if tag == CONJ or after == CONJ or adjective == chain:
                    joined = [*joined, adjective] if adjective == chain else [adjective]
                    chain = i - 1  # red, white and blue; but a large, brown dog
                    for member in joined:
                        self.hang(member, chain, "conj")
            elif not self.labels[i]:
                story = tag == NUM and "".join(self.tags[i + 1 : last + 1]) == NOUN * 2
                near = tag == DEGREE or tag == NOUN and after == PARTICIPLE
                near = near or story and self.words[i] != "one"  # a three story house
                self.hang(i, i + 1 if near else owner, INNER.get(tag, "compound"))
            if tag in (ADJ, PARTICIPLE):
                adjective = i

    def grow(self):
        """Fills heads and labels."""
        for first, last in self.ends.items():
            self.hang_modifiers(first, last)
        index = -1
        while index + 1 < len(self.words):
            start = index + 1
            index, kind = self.kind(start)
            copula = self.auxiliary >= 0 and self.tags[self.auxiliary] == BE
            if kind in WAITS:
                self.wait(index, kind)
                continue
            if kind == REL:
                head, label = self.hang_relative(index)
            elif kind == NOMINAL and not copula:
                head, label = self.hang_noun(index, start)
            else:
                head, label = self.hang_predicate(index, kind, copula)
            self.hang(index, head if head >= 0 else WAITING, label)
        self.finish()

    def kind(self, index):
        """The head of the noun phrase that begins at index and NOMINAL, or index and its kind."""
        tag, before = self.tags[index], self.tags[index - 1 : index]
        in_red = tag in ADJ + PARTICIPLE and self.cases and self.auxiliary < 0
        if index in self.ends or in_red or tag in DET + POSS + NUM + COMPOUND:
            return self.ends.get(index, index), NOMINAL
        if tag == ADV and self.tags[index + 1 : index + 2] == [LINK] and not self.particle(index):
            return index, PLACE
        return index, EXISTS if tag == BE and before == [EXPLETIVE] else tag

    def particle(self, index):
        return self.verb >= 0 and PARTICLE.match(f"{self.words[self.verb]} {self.words[index]}")

    def wait(self, index, tag):
        """A function word waits for what it belongs to, or hangs on the verb before it."""
        self.labels[index] = WAITS[tag]
        if tag == ADV and self.particle(index):
            self.hang(index, self.verb, "compound:prt")
        elif tag in (ADV, DEGREE) and self.verb > self.noun:
            self.heads[index] = self.verb
        elif tag in PREPS:
            self.cases.append(index)
        elif tag in JOINTS:
            self.conjunction = index
        elif tag not in MARK + GENITIVE:
            self.waiting.append(index)
        if tag in (AUX, BE):
            self.auxiliary = index
        if tag in (INF, SUB) and self.mark < 0:
            self.mark = index

    def hang_relative(self, index):
        """Who hangs on its noun until a verb comes: a man in a hat who; a man who."""
        head, noun = self.heads[self.noun], self.noun
        if self.subject < 0:
            self.relative = index
        if self.words[index] == "who" and self.words[noun] not in MOVERS and head >= 0:
            noun = head if self.words[head] in MOVERS else noun
        return noun, "nsubj"

    def hang_noun(self, index, start):
        """Head and label of a noun phrase that is no predicate; start is its first word."""
        noun, verb = self.noun, self.verb
        for case in self.cases:
            self.heads[case] = index
        head, label = WAITING, ""
        if self.cases:
            head, label = self.hang_place(index)
        elif self.conjunction >= 0 and self.root < 0 <= verb:  # while he rides, a dog | runs
            self.heads[self.conjunction], self.root = verb, index
        elif self.conjunction >= 0 and noun >= 0:  # a cat and a dog
            head, label = self.first_of(noun), "conj"
            self.heads[self.conjunction] = index
            self.joined, self.joint = index, self.conjunction
        elif self.subject < 0 and (self.relative >= 0 or self.mark >= 0):
            self.subject = index  # waits for its verb: as an airplane | flies
        elif verb > noun:
            head, label = verb, "nsubj" if self.tags[verb] == BE else "obj"
        elif self.root < 0:
            self.root = index
        elif self.labels[noun] == "obj" and GIVES.match(self.words[verb]):
            head, label, self.labels[noun] = verb, "obj", "iobj"  # gives a boy a ball
        else:
            head, label = self.root, "parataxis"
            if start == noun + 1 and self.tags[start] in DET + POSS:  # the toy the baby | holds
                head, self.relative, self.subject = noun, index, index
        self.noun, self.cases, self.conjunction = index, [], NONE
        return head, label

    def first_of(self, word):
        """What a word is joined to, if it is: the head of the next one that is joined."""
        return self.heads[word] if self.labels[word] == "conj" else word

    def hang_place(self, index):
        """A noun phrase after a preposition hangs on the noun or on the verb before it."""
        noun, word = self.noun, self.words[index]
        self.place = self.words[self.cases[0]]
        near = self.verb < 0 or noun == self.subject or self.place == "of"
        near = near or word in ("it", "them", "him") or self.place == "with" and word not in TOOLS
        if noun <= self.verb or not near:
            return self.verb, "obl"
        head = self.heads[noun]
        if self.place != "of" and self.labels[noun] == "nmod" and self.words[head] in QUANTITY:
            return head, "nmod"  # a slice of pizza | on a plate
        return noun, "nmod"

    def hang_predicate(self, index, kind, copula):
        """Head and label of a verb, a participle or another predicate; it takes what waits."""
        free = self.auxiliary < 0
        finite = not free or kind in (VERB, EXISTS)
        for word in self.cases + self.waiting:
            self.heads[word] = index
            if word in self.cases and free and kind in VERB + ING:
                self.labels[word] = "mark"  # for cutting
        if copula and kind not in VERB + ING:
            self.labels[self.auxiliary] = "aux:pass" if kind == PAST else "cop"
        if self.relative >= 0 and self.tags[self.relative] != REL and not finite:
            self.relative = self.subject = NONE
        nsubj = "nsubj:pass" if kind == PAST and not free else "nsubj"
        if self.relative >= 0:  # a man who rides; a horse that a man rides
            head, label = self.heads[self.relative], "acl:relcl"
            self.hang(self.relative, index, nsubj if self.subject < 0 else "obj")
        elif self.mark >= 0:
            head, label = self.hang_marked()
        elif self.conjunction >= 0 and self.verb >= 0:  # sits and watches
            head, label = self.first_of(self.verb), "conj"
            self.heads[self.conjunction] = index
        elif finite:
            head, label = self.hang_clause(index)
        else:
            head, label = self.hang_participle(index, kind)
        if self.subject >= 0:
            self.hang(self.subject, index, nsubj)
        if kind == NOMINAL:
            self.noun = index
        else:
            self.verb = index
        self.cases = []
        self.open_clause()
        return head, label

    def hang_marked(self):
        """While grazing; seems that it rains; ready to go; a man to watch."""
        noun, verb = self.noun, self.verb
        if self.tags[self.mark] == INF and self.subject < 0:
            has = verb >= 0 and (self.words[verb] in HAVE or self.tags[verb] == BE)
            if verb < 0 or noun > verb and has:
                return noun, "acl"
            completes = verb > noun and COMPLETED.match(self.words[verb])
            return verb, "xcomp" if completes else "advcl"
        if self.words[self.mark] == "that" and self.mark == verb + 1:
            return verb, "ccomp"
        return self.root, "advcl"

    def hang_clause(self, index):
        """A man | sits; a man sits and a dog | stands."""
        if self.first_verb < 0:
            self.subject, self.root, self.first_verb = self.root, index, index
            return WAITING, ""
        if self.noun > self.verb and self.labels[self.noun] in ("conj", "parataxis"):
            self.subject = self.noun
        if self.noun != self.joined:
            return self.first_verb, "parataxis"
        self.heads[self.joint] = index
        return self.first_verb, "conj"

    def hang_participle(self, index, kind):
        """A man in a hat | riding; holding a bat | standing; a man stands | riding."""
        noun, verb = self.noun, self.verb
        if self.root < 0:
            self.root = index
            return WAITING, ""
        before = max(verb, self.root)
        if noun > verb:
            moves = self.words[noun] in MOVERS or self.labels[noun] == "nsubj"
            alone = verb < 0 and (self.place == "with" or self.words[self.root] not in MOVERS)
            head = noun if kind != ING or moves or alone else before
            usual = "advcl" if head == verb else "acl"
            return head, {ADJ: "amod", PLACE: "advmod"}.get(kind, usual)
        if kind == PLACE:
            return before, "advmod"
        completes = kind != ING or COMPLETED.match(self.words[verb])
        return before, "xcomp" if completes else "advcl"

    def finish(self):
        """What still waits hangs on the root, which is the first word that can be one."""
        able = [
            i for i, tag in enumerate(self.tags) if self.heads[i] == WAITING and tag not in WAITS
        ]
        if self.root < 0:
            self.root = able[0] if able else 0
        for i, head in enumerate(self.heads):
            if head == WAITING:
                comma = self.tags[i : i + 2] == [COMMA, CONJ] and self.heads[i + 1] >= 0
                head = self.heads[i + 1] if comma else self.root  # ", and": with the conjunction
                self.hang(i, head, self.labels[i] or "dep")
        self.hang(self.root, NONE, "root")


def tree(parsed):
    """The `Node`s of a `Parse`, one a token, in order; exactly one is the root. Linear."""
    words = [token.text.lower() for token in parsed.tokens]
    tags = refine(words, [token.tag for token in parsed.tokens])
    grower = Grower(words, tags)
    if words:
        grower.grow()
    upos = {tag: name for name, tags in UPOS.items() for tag in tags}
    nodes = zip(parsed.tokens, tags, grower.heads, grower.labels)
    return [Node(*token[:3], upos[tag], head, label) for token, tag, head, label in nodes]


def graph(parsed):
    """The tree as an nltk.parse.DependencyGraph: nodes 1 … n in caption order, 0 its TOP."""
    from nltk.parse import DependencyGraph  # here, for it takes a second to import

    rows = [f"{n.text}\t{n.tag}\t{n.head + 1}\t{n.label}" for n in tree(parsed)]
    return DependencyGraph("\n".join(rows), cell_separator="\t", top_relation_label="root")


# ==== (c) The command line: text, files and scores ==============================================


def to_json(parsed):
    """The hierarchy as dictionaries and lists: caption, phrases, texts of the composites."""
    return {
        "caption": parsed.caption,
        "phrases": [phrase._asdict() for phrase in parsed.phrases],
        "composites": [compose(a, b) for a, b in composites(parsed.phrases)],
    }


def show(parsed):
    """As text: a line a word (number, word, tag, relation, head), then phrases and composites."""
    nodes = tree(parsed)
    heads = [f"{i} {node.text}" for i, node in enumerate(nodes, 1)] + ["root"]  # head -1: the last
    lines = [parsed.caption]
    for i, node in enumerate(nodes, 1):
        lines.append(f"{i:>4} {node.text:<16} {node.tag:<6} {node.label:<11} <- {heads[node.head]}")
    lines += [f"  phrase     {p.text}  (subject: {p.subject})" for p in parsed.phrases]
    lines += [f"  composite  {compose(a, b)}" for a, b in composites(parsed.phrases)]
    return "\n".join(lines) + "\n"


def draw(parsed):
    """The tree in text, a line a word: what stands before its head is drawn above it."""
    nodes, lines = tree(parsed), [parsed.caption]
    children = [[] for _ in nodes] + [[]]
    for i, node in enumerate(nodes):
        children[node.head].append(i)  # the root's head is -1, the last of these
    # a word (NONE: only its line is left to write) and the branches above, at and below its line
    stack = [(i, "", "", "") for i in children[-1]]
    while stack:
        i, above, line, below = stack.pop()
        if i == NONE:
            lines.append(line)
            continue
        left = [child for child in children[i] if child < i]
        right = [child for child in children[i] if child > i]
        rows = [(child, above + "│  ", above + "├─ ", above + "│  ") for child in left]
        if left:
            rows[0] = (left[0], above + "   ", above + "┌─ ", above + "│  ")
        rows.append((NONE, "", f"{line + nodes[i].text:<34} {nodes[i].tag:<6}{nodes[i].label}", ""))
        rows += [(child, below + "│  ", below + "├─ ", below + "│  ") for child in right]
        if right:
            rows[-1] = (right[-1], below + "│  ", below + "└─ ", below + "   ")
        stack += reversed(rows)
    return "\n".join(lines) + "\n"


def read_captions(path):
    """Yields the captions of COCO's .json, of .jsonl records or of a text's lines; "-": stdin."""
    with open(0 if path == "-" else path, encoding="utf-8", errors="replace") as file:
        try:
            if str(path).endswith(".json"):
                yield from (row["caption"] for row in json.load(file)["annotations"])
            for line in file:
                row = {"caption": line.rstrip("\r\n")}
                if str(path).endswith(".jsonl"):
                    row = json.loads(line)
                yield from row["captions"] if "captions" in row else [row["caption"]]
        except (ValueError, KeyError, TypeError) as error:
            kinds = ".json must be COCO's captions, .jsonl records with a caption or captions"
            raise ValueError(f"{path}: {kinds} ({error!r})") from error


def find(text, caption, start=0, taken=()):
    """Spans of a text in a caption, whatever its spaces and capitals, outside the taken spans."""
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, text.split())) + r"(?!\w)"
    spans = [match.span() for match in re.compile(pattern, re.I).finditer(caption, start)]
    for start, end in taken:
        spans = [(a, b) for a, b in spans if b <= start or end <= a]
    return spans


def locate(caption, answer):
    """The `Phrase`s that [{"text": …, "subject": …}, …] names, in the order of the caption.

    A row may have the spans that `to_json` writes. ValueError where the caption has no such phrase.
    """
    found, last = [], 0
    for row in answer:
        texts = [row.get("text"), row.get("subject")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{row!r} is not a text and its subject")
        (a, b), (s, e) = row.get("span", (0, 0)), row.get("subject_span", (0, 0))
        written = caption[a:b] == row["text"] and caption[s:e] == row["subject"]
        if not (written and last <= a <= s < e <= b):
            a, b = next(iter(find(row["text"], caption, 0, [p.span for p in found])), (0, 0))
            subjects = find(row["subject"], caption[:b], a)
            if not subjects:
                raise ValueError(f"{row['text']!r}, {row['subject']!r} are not in {caption!r}")
            s, e = subjects[-1]
        found.append(Phrase(caption[a:b], (a, b), caption[s:e], (s, e)))
        last = b
    return sorted(found, key=lambda phrase: phrase.span)


def read_parses(path):
    """{caption: [`Phrase`, …]} of a file as --json writes it; ValueError names a bad line."""
    parses = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                parses[row["caption"]] = locate(row["caption"], row["phrases"])
            except (ValueError, KeyError, TypeError) as error:
                wanted = '{"caption": …, "phrases": [{"text": …, "subject": …}, …]}'
                raise ValueError(f"{path}:{number}: a line is {wanted} ({error})") from error
    return parses


def plain(phrase):
    """A phrase as a score compares it: small letters, no first article, single spaces."""
    text = re.sub(r"^(an?|the) ", "", " ".join(phrase.text.lower().split()))
    return phrase._replace(text=text, subject=phrase.subject.lower())


def score(gold, parses):
    """Text: precision, recall and F1 of parses, of multisets, then each caption's errors.

    Both are {caption: [`Phrase`, …]}. A caption is right when all its subjects are, in order.
    """
    pairs, right = [], 0  # of each caption the gold's phrases and the parse's
    for caption, phrases in gold.items():
        theirs, mine = [*map(plain, phrases)], [*map(plain, parses.get(caption, []))]
        right += [phrase.subject for phrase in theirs] == [phrase.subject for phrase in mine]
        pairs.append((theirs, mine))
    wanted = max(1, sum(len(theirs) for theirs, _ in pairs))
    found = max(1, sum(len(mine) for _, mine in pairs))
    lines = [f"{'':10}{'precision':>10}{'recall':>10}{'F1':>10}"]
    for name, view in (
        ("phrases", lambda phrase: phrase.text),
        ("subjects", lambda phrase: phrase.subject),
        ("heads", lambda phrase: phrase.subject.split()[-1]),
    ):
        both = [Counter(map(view, theirs)) & Counter(map(view, mine)) for theirs, mine in pairs]
        hits = sum(shared.total() for shared in both)
        f1 = 2 * hits / (found + wanted)
        lines.append(f"{name:10}{hits / found:10.4f}{hits / wanted:10.4f}{f1:10.4f}")
    share, missing = right / max(1, len(gold)), len(gold.keys() - parses.keys())
    lines.append(f"captions right: {right} of {len(gold)}, {share:.4f}; without a parse: {missing}")
    for caption, (theirs, mine) in zip(gold, pairs):
        wanted = Counter(f"{phrase.text}  (subject: {phrase.subject})" for phrase in theirs)
        found = Counter(f"{phrase.text}  (subject: {phrase.subject})" for phrase in mine)
        lines += [f"\n{caption}"] if wanted != found else []
        lines += [f"  missed {phrase}" for phrase in (wanted - found).elements()]
        lines += [f"  wrong  {phrase}" for phrase in (found - wanted).elements()]
    return "\n".join(lines)


def command_line():
    """The options, as argparse reads them."""
    parser = argparse.ArgumentParser(description="Parse captions into trees and hierarchies.")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help="a caption to parse")
    add("--file", help="parse each line of FILE, COCO's .json or .jsonl records; -: standard input")
    add("--json", action="store_true", help="print one JSON object a caption instead of text")
    add("--draw", action="store_true", help="draw the trees in text")
    add(
        "--score",
        metavar="GOLD",
        help="rate the rules, or --parses, on gold captions",
    )
    add("--parses", metavar="FILE", help="with --score: rate these parses (.jsonl)")
    return parser.parse_args()


def run(options):
    """Prints what the options ask for; OSError and ValueError say what is wrong with them."""
    if options.score:
        gold = read_parses(options.score)
        rules = {caption: parse(caption).phrases for caption in gold}
        print(score(gold, read_parses(options.parses) if options.parses else rules))
        return
    if not options.captions and options.file is None:
        raise ValueError("nothing to parse: give a caption in quotes, or --file FILE (- is stdin)")
    for name in options.captions:
        if " " not in name and "." in name and os.path.isfile(name):
            raise ValueError(f"{name} is a file: --file {name} parses each of its lines")
    lines = read_captions(options.file) if options.file else ()
    for parsed in map(parse, chain(options.captions, lines)):
        if options.json:
            print(json.dumps(to_json(parsed), ensure_ascii=False))
        else:
            print(draw(parsed) if options.draw else show(parsed))


def main():
    """The command line; returns the exit status."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(command_line())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("parse.py: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None)
        reason = f"cannot read {file}: {error.strerror}" if file else error
        print(f"parse.py: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
