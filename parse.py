"""A rule-based parser for image captions, and the hierarchy of texts that HIST cuts from them.

    caption      "An orange cat laying on a white and brown cat in a bed."
    phrases      an orange cat · a white and brown cat · a bed
    subjects     cat · cat · bed
    composites   an orange cat and a white and brown cat · an orange cat and a bed · …

Part (a) makes the hierarchy: tokens -> tags -> noun phrases -> subjects -> composites. Part (b)
hangs the same tokens into a dependency tree, part (c) is the command line (--help). No trained
model, no download. The levels: HIST, arXiv 2412.08110; the tree: Universal Dependencies, version 2.
"""

import argparse
import html
import io
import json
import os
import re
import sys
import unicodedata
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
CONJ, SUB, REL = "KLW"  # cats *and* dogs, *while* a dog runs, a man *who* runs
COMMA, MARK, START = ",.^"  # any other sign is a MARK; START stands before the first word
ANY = "".join(map(chr, range(33, 127)))
# Classes of words whose tag depends on their neighbours, each named by one of its words: where no
# rule fits *ride* is a noun, *rides* a verb, *lights* a plural; see USUALLY.
RIDE, RIDES, LIGHTS, RIDING, PARKED, PAINTING, ORANGE = "yszgeij"
UP, NEARBY, BACK, RIGHT, HAS, CAN, ALL, ONE, THAT, HER, TO, GENITIVE_S, QUOTE = "pwbrdnlothumv"

# Words by class: those of 20,012 COCO captions and the most frequent of a general list (wordfreq),
# where ENDINGS err and it matters. Of verbs: the class of the word and of its form in -s; a word
# that is in WORDS too has its class from there.
VERBS = {
    (VERB, VERB): """accept accuse add adjust admire allow ambush announce appear applaud apply
    approach arrange arrive ascend assemble assist attempt attend avoid bake bathe become beg belch
    believe belong billow blame bring build bury buy carry carve celebrate chew choose chop clash
    clean clear collapse collect collide come commemorate compare compete conceal confirm connect
    consist contain continue crawl create crouch declare decorate defend deliver demolish
    demonstrate depart depict descend describe destroy detain dig dine discover discuss dismantle
    distribute dodge dominate don donate douse doze drape dribble drift eat embrace engage engulf
    enjoy ensure enter entertain evacuate examine excavate expect explain explore expose extend
    extinguish fail fill find fix flee flow follow forgive gallop gather gaze gesture get give glide
    go grab grapple graze grow hang happen haul heal hear herd hide hike hold hover huddle ignite
    ignore include indicate inject insert inspect install interact interrogate invade investigate
    invite irrigate jog join juggle jut keep knead kneel know laugh launch lay lean learn let
    liberate lick lie listen locate lose love make march mean meander melt mention merge mingle
    mourn mow munch navigate nibble nod observe occupy occur operate overlook pass pay peck peer
    perch perform pluck plunge portray pour pray prepare produce protect protrude prove provide put
    raise react read rebuild receive recover recycle reflect relax remain remove replace require
    resemble respond restore retrieve reveal rinse roam rotate say scatter scramble scrub sculpt see
    seek seem sell send sew shave shear sing sip sit snuggle soar socialize sow speak spend splash
    sprint squeeze stay steal steer stir strum submit suck surround survive sway swerve swim take
    teach tell tend terminate thank think throw topple trawl try tumble unearth unfurl unload untie
    unveil unwrap vaccinate vandalize wade wander want wear weave weld wrestle write""",
    (RIDE, RIDES): """arrest attack balance bark battle beat bend bite blow bounce brace brush bump
    burn capture cast catch change chant chase chat cheer claim clap climb combine cook crash cross
    cut dance display dive drag draw drive dunk escape escort exhibit exit face fall feature feed
    fight finish flap flip float fly gain glance greet grin growl guide harvest heat help hit hoist
    honor hop hug hunt hurt interview joust jump kick kiss lead leap lift look lounge lunge maneuver
    measure meet move nap parade patrol pause peek photograph pick play plow point poke pose
    practice pull punch punt push race raid reach release repair rescue rest return ride rip rise
    roast rub run salute scan scratch search serve shake shine shoot shout show slap sleep slide
    smash smell smile snap sniff sort span spill spin squat stand stare start stretch strike stroll
    struggle support surf suspect sweep swing tackle talk taste tear tilt toss touch tow travel trot
    turn use vie visit vote wait walk wash watch welcome whisper wipe work yawn""",
    (RIDE, LIGHTS): """bat block board comb cover crowd dart dress drill drink drop fence film fry
    glow grill guard hammer knot land leave light line load mirror mop mount pack paddle paint park
    pet pitch place plant post pump rake rally roll row sail sample share shop shovel shred signal
    skate sketch ski slice sling smoke sport spray spread sprinkle stack stalk step stick stitch
    stop tie trail train trap trek trick trim tug type vacuum view wave whisk""",
}
WORDS = {
    ADJ: """able accurate adjacent afghan african ajar alert alive alpine amber american amish
    artisan asian asleep awake aware awkward bad bald bare barefoot baroque barren beige best better
    big bitter bizarre black bland blank bleak blind blond blonde blue blunt bottom brave brief
    bright broad bronze brown brunette buddhist byzantine calico calm casual center certain cheap
    chic clean clear clever close closed coarse cobalt cold common compact complete complex
    confederate cool copper corporate correct crimson crisp crude cuban cute cyan cypriot czech damp
    dark dead decent deep delicate dense desolate desperate different diverse drab dual dull dumb
    dutch early eastern elaborate elderly electric elegant emo enough entire equestrian etruscan
    european exact exquisite external extreme faint fair fake familiar fancy far fast fat favorite
    feminine feral fertile few fierce fiery final fine first flat flowery foreign formal former
    fragile frantic free french fresh front full gay gentle german gilt glad gold golden good
    gourmet grand gray great greek green grey grim gross handheld handicap handmade hard high hind
    hollow homemade hot huge humane humid hyperdense hypodense icy idle immature immense important
    indian indoor inner intact intense intricate inverted iraqi irish israeli jewish jolly jumbo
    juvenile khaki korean large last late latin lavender lightweight little live lone long loose
    loud low lumbar lunar lush magenta main major makeshift manual maroon masculine mature medium
    mellow metropolitan mexican middle mild mini minor mixed mobile modern modest moist much multi
    multiple muslim mute naked narrow nearest neat neon new next nice northeastern northwestern
    nubian odd old only opaque open opposite optic oral ornate other outdoor outer overcast overripe
    overweight own pakistani pale parallel pastel peculiar perfect petite pink pinkish plush poor
    posh pristine private prominent proper proud public pure purple quaint quick quiet rare raw real
    recent red retro rich ripe roman rotten rough round rundown sad safe same secluded second
    separate seperate several severe shallow sharp sheer shorn short sick silent silver silvery
    similar simple single sleek slender slick slight slim slow small smart smiley smooth soft solar
    solemn solid somber sore southeastern spare sparse spicy squat stale stark steep sterling stiff
    straight strange stray striped strong subtle suburban such sudden superb sure sweet swift swiss
    swollen syrian tall tan teal teenage tender thick thin third tibetan tight top trim triple true
    turquoise twin ugly underglaze uneven unfinished unique unisex unknown unmade unripe upper
    upscale upside urban vast victorian vintage vivid warm weak weird western wet white whole
    wholesale wicker wide wild wooden woolen wrong yellow young""",
    NOUN: """academy animal army assembly baby balcony beijing belly biopsy blinder body boeing
    boundary buddy buggy bunny butterfly canal candy canvas cathedral cereal ceremony charcoal
    cherry chevy christmas cleaner colony comedy comic company cooler coral corral county crystal
    curry daddy dairy daisy deputy diary dinghy doggy duckling dumpling dynasty economy elephant
    embassy enemy evening fairy family ferry fondant foreigner galaxy garlic garnish gas germany
    goldfish gravy herring holly hospital hungary husky infant italy ivy jelly king kitty lady lens
    liberty library lily liver lobby locomotive mandible medal memorial metal morning mosaic mummy
    mural music numeral opener owner paddy party patty pendant penny picnic piggy plastic plateful
    plenty politician pony poppy president priest property puppy quarry rally restaurant ruby
    sapling seedling shed shelving sibling sky sled spring spy stable student study supply tabby
    teddy teenager terminal thing topper traffic trolly vegetable viking warmer whisky""",
    PLURAL: """bison buffalo cattle children deer feet geese men mice people personnel police sheep
    teeth women""",
    VERB: """ate became began blew broke came chose drank drove fell felt flew gave got grew meant
    met ran rang rode said sang sank sat saw shook slept slid spent spoke stole stood struck swam
    swore threw took tore went withdrew woke wore wrote""",
    PARKED: """beaten bent bitten blown born bought bound broken brought built burnt caught chosen
    clad cut dealt done drawn driven dug eaten fallen fed flown forgotten found frozen given gone
    grown held hidden hung inlaid kept knit known laden laid led lit lost made overgrown paid proven
    put rebuilt redone ridden seen sent set shaken shot shown shut slain sold split sprung spun
    stolen strewn strung stuck sunk swept taken taught thrown told torn won worn woven written""",
    PAINTING: """awning bedding building bunting carving ceiling clothing covering crossing decking
    drawing dressing dwelling earring etching filling flooring frosting icing landing lettering
    lighting lightning lining molding netting opening painting paneling piping plumbing pudding
    railing ring scaffolding seating serving setting siding stocking string stuffing topping
    trimming wedding wing wiring writing""",
    ORANGE: """adult antique female giant half human light male miniature newborn orange oval plaid
    plain rear square""",
    DET: "a an another any each either every neither some the these this those",
    POSS: "his its my our their whose your",
    PRON: """anyone eachother everyone everything he herself him himself i it itself me nobody
    nothing ones others she someone something them themselves theres they us we what whats you""",
    NUM: "eight eleven five four hundred nine seven six ten thousand three twelve two",
    PREP: """above across after against along alongside amid amidst among amongst at atop before
    behind below beneath beside besides between beyond circa despite during except for in into like
    near on onto past per than through throughout thru til till toward towards under underneath
    unlike until upon versus via w/ w/o with within without""",
    UP: "aboard about around by down inside off out outside over up",
    ADV: """abroad afar again ago ahead airborne alone also altogether always anywhere apart ashore
    aside away backstage downhill downstairs downward downwards else elsewhere even ever everywhere
    farther further halfway here how indoors instead just maybe meanwhile never not now often once
    online onstage outdoors outward overnight perhaps possibly probably rather sideways sometimes
    somewhere soon still then there together too twice uphill upright upstairs upward upwards
    yet""",
    NEARBY: "backward backwards forward nearby overhead underwater upside-down",
    DEGREE: "almost extra less more most no otherwise pretty quite so somewhat super very well",
    BE: "am are aren't be been being is isn't was wasn't were weren't",
    AUX: "can't cannot could didn't doesn't don't may might must should will won't would",
    CONJ: "& / and and/or but nor or",
    SUB: "although as because if since though unless when where whether while whilst",
    HAS: "did do does had has have having",
    REL: "which who whom",
}
LEXICON = {"can": CAN, "her": HER, "one": ONE, "that": THAT, "to": TO, "back": BACK, "all": ALL}
LEXICON |= {"both": ALL, "left": RIGHT, "right": RIGHT, "from": LINK, "of": LINK}
LEXICON |= {"'s": GENITIVE_S, "'": QUOTE, ",": COMMA}


def in_s(word):
    """Its form in -s: dogs, watches, carries."""
    return re.sub("(s|x|z|^go|^do|[sc]h)$", r"\1e", re.sub("(?<![aeou])y$", "ie", word)) + "s"


def with_plurals(words):
    """The set of the words of a text and of their forms in -s."""
    return {form for word in words.split() for form in (word, in_s(word))}


for (verb_class, class_in_s), members in VERBS.items():
    LEXICON |= {in_s(verb): class_in_s for verb in members.split()}
    LEXICON |= dict.fromkeys(members.split(), verb_class)
for word_class, members in WORDS.items():
    LEXICON |= dict.fromkeys(members.split(), word_class)
# For other words the first ending that fits decides; a guessed adjective may be a noun (ORANGE).
ENDINGS = (
    (r"x?[\d.,/:]*\d[\d.,/:'-]*[a-z]{0,3}$", NUM),
    (r"(?:thir|for|four|fif|six|seven|eigh|nine)(?:teen|ty)$", NUM),
    (r".+(?:ing|in')$", RIDING),
    (r".*[stwp]eed$", NOUN),
    (r".+ify$", VERB),
    (r".{2,}ed$", PARKED),
    (r".{2,}ly$", DEGREE),
    (r".*(?:[aeou]y|[ei]ty|[eou]ry|[snlue]try|lry|ndry|[cn]opy|rapy|phy|[lor]gy|cy|berry)$", NOUN),
    (r".{2,}(?:y|iest|ous|less|ful|[aeiou]ble|[wh]ern|(?<!e)ese|esque|proof|like|some)$", ADJ),
    (r".{3,}(?:al|ic|ive|[^m]ent|ant|[ou]lar|lear|near|ish|[^r]ian|id|ior|[st]ile|ary)$", ORANGE),
    (r".+(?:(?<!s|u|i)s|(?<![iou])men)$", PLURAL),
    (r"[^\W_]", NOUN),
    (r"", MARK),
)
# smaller -> small, nicer -> nice, bigger -> big, uglier -> ugly, adjectives of the lexicon
DEGREES = ("(er|est)$", ""), ("(?<=e)(r|st)$", ""), (r"(.)\1(er|est)$", r"\1"), ("i(er|est)$", "y")

# -ing words that belong to the noun after them wherever they stand ("and parking lots"), and those
# that describe it ("running water"); any other does the first inside a noun phrase ("a rocking
# chair") and after a preposition of place ("near loading dock").
ING_ALWAYS = """baking charging cutting dining fishing frying gaming hiking living parking roasting
    rowing sewing shopping steering swimming vending""".split()
ING_STATE = """amazing appearing arriving barking billowing bleeding blinking blooming blossoming
    boiling bouncing breaking burning cheering communicating crashing crawling crumbling crying
    curving dangling disturbing drifting dripping drooping dying eating fading falling flaming
    flashing flickering floating flowing flying galloping gleaming glistening glowing grinning
    hanging hovering incoming interesting jumping kneeling laughing leaning leaping looking lounging
    lurking matching melting moving oncoming passing peeling pouncing rising roaring rolling rotting
    running rushing screaming setting shining sinking sitting sizzling smiling smoking soaring
    sparkling standing staring steaming striking surrounding towering trailing twisting wagging
    walking weeping wilting winding working yawning""".split()
LAYERS = ("layer", "level", "story", "tier", "way")  # a two *way* street
WEARING = ("in", "wearing", "wears")  # a woman in red *smiles* at
AS_SOLD = ("free", "friendly", "proof", "ready", "resistant", "safe", "washable")  # powder *free*
FORMS = "down fit length neck out proof size sleeve story style through".split()
PLACING = ("by", "near", "beside", "at", "on", "in", "under", "behind")
DISHES = with_plurals("""casserole curry dish dressing omelet pie pizza salad sandwich soup stew
    topping""")
ACTIVITIES = """biking boarding climbing diving fishing sailing shopping skating skiing
    surfing""".split()
# Words that belong to the noun after them: "hot dog" is a subject.
FIXED = with_plurals("""advertising-sign back-ground bedroom-set big-ben big-rig boarding-pass
    brief-case brush-set chess-set chop-stick close-up clothes-line cookware-set dinner-set
    double-decker drum-set flat-screen french-fries german-shepherd gift-set gold-leaf golden-gate
    golden-retriever grizzly-bear half-pipe hash-brown high-chair high-rise hot-air hot-dog hot-rod
    jumbo-jet knife-set light-bulb light-fixture light-house light-pole light-post light-switch
    little-league measuring-cup mixing-bowl mobile-home mountain-pass new-york orange-juice
    orange-peel orange-slice polar-bear police-officer pork-chop rear-view red-panda rolling-pin
    running-shoe sheet-set shipping-container sitting-room smart-phone stainless-steel swim-trunk
    swing-set tea-set teddy-bear television-set third-base throw-blanket throw-pillow tool-set
    tooth-brush top-hat towel-set train-set wet-suit whole-wheat wild-flower wrestling-ring""")
# "a group of people" is one phrase, and people is its subject.
QUANTITY = with_plurals("""abundance amount array assortment batch bit bite brood bunch bundle chunk
    cluster clutch collection colony convoy couple crowd dash dollop dozen drove expanse fleet
    flight flock fragment gaggle gang gathering group grouping half halve handful heap herd host
    hundred kind line litter load lot million mob mound multitude number pack pair parade part party
    patch piece pile pinch plenty pod portion pride procession rest row sampling scattering school
    scoop scrap section selection series serving set shower slice sort splash sprig squad stack
    strand stretch string strip swarm swirl tangle team thousand ton trio troop type variety wealth
    wedge""")
SITES = ("line", "lot", "school", "section", "team")  # but not compounds: a parking *lot* of
# A picture of a dog shows a dog: the dog is a phrase, the picture is none.
VIEWS = with_plurals("close close-up closeup footage screenshot selfie shot up view")
PICTURES = VIEWS | with_plurals("image photo photograph pic picture portrait snapshot")
AMONG = ("and", "beside", "between", "near", "some", "under", "with")  # a clock and a *photo*
# One cannot point at times, events, abstractions, nor at what ends as they do, but for CONCRETE.
NOT_THINGS = with_plurals("""a.d. access accident adventure advice afternoon age ages agreement aid
    aim air airstrike altitude am amazement anger angle anniversary appetite approach apr april
    arrival attack attempt aug august b.c. backflip backhand badminton baseline battle bc bce
    behavior benefit birth bit blast break breath budget bunt c ca call campaign career carnival
    cartwheel cause century ceremony change chase choice christmas cm color comment concept concern
    concert confinement confusion contact contest contrast cost count crash crime danger dawn death
    debate dec december decision decrease defeat delay delight demand departure desire detour
    development diameter disaster discussion disrepair dozen drought dunk dusk dynasty earthquake
    easter effect effort employment entertainment era escape evening event example excitement
    exercise explosion expression extension fashion fear feb february feel festival fight final
    flight focus forehand freedom ft fun funeral future gallon game gb golf grace growth guilt
    haircut halloween handstand harm health height help heritage history hockey homework hope hour
    humor hunger hurricane hurry idea illusion impact inch incident increase interest internet
    interview invasion issue jan january job joke journey joy july jump june justice kg kind kingdom
    kiss knowledge l labor lack language laugh laughter launch lbs leisure length lesson level life
    liter look loss luck m magic magnification maneuver mar marathon march marriage match matter mb
    memory midair midst mind mission mistake ml mm mode moment month mood morning move movement mph
    music nap nature need news noise noon notice nov november occasion oct october ollie olympic
    opinion order origin outbreak outskirts oz pace pain pandemic panic parade party passion past
    pcs peace penalty percent period pickup picnic play pleasure pm politics possession poverty
    practice praise prayer premiere pressure pride problem proceedings process progress promise
    proof protest prowess purpose quarantine race rally rate reason recovery rehearsal research rest
    result retirement rhythm ride role rule safety scent schedule search season sense sept september
    serve session shipment shock show size skill sleep smell solitude somersault sort speech speed
    spirit sprint strength stress strike struggle stunt style success summer surgery surprise
    takeoff talk tantrum task taste tb temperature tennis tension theme thought threat thrill topic
    touch touchdown tour tournament transit transport travel treatment trial trick trip trot trouble
    turn twilight type unison use variety victory videogame vigil vision visit volley vote wait wake
    war wealth weather wedding week weekend wheelie will wind winter wish wonder work x xl year
    yoga""")
ABSTRACT = re.compile(
    r".*(?:ness|ism|[ae]nc(?:e|y|ie)|it(?:y|ie)|(?<!ic)ation|[^a]tion|(?:er|nd|on)ship|day|time"
    r"|(?<!k)night)s?$"
)
CONCRETE = with_plurals("""ambulance amenity appliance audience business city collection community
    construction contraption creation decoration entrance facility fence formation foundation
    guinness harness installation institution intersection junction location protection reflection
    residence section station substance university vanity vegetation wilderness witness""")
# Nor at words that place things, but at "his back"; nor, alone, at ball sports and, after a
# preposition, at BARE ("on display"); nor at arrays ("in a row"), and what is taken ("a swing").
LOCATIONS = with_plurals("""back bottom center centre distance edge end front inside left middle
    outside rear right side top way world""")
BALL_SPORTS = with_plurals("baseball basketball football soccer softball volleyball")
BARE = """bat bloom board business class construction dinner display duty fire formation guard half
    hand horseback lunch place row sale seating service sunrise sunset tow town""".split()
ARRAYS = with_plurals("row line circle group pile")
TAKEN = PICTURES | with_plurals("""bath bite bow catch charge cut drink flip grip guard hit hug kiss
    landing leap look pitch place pose ride shot sip spill spin step swing thumb walk way""")
DATE = re.compile(r"[12]\d{3}|\d+(st|nd|rd|th)|(about|ca?\.?|circa|early|late) \d")
TAKING = re.compile(
    "(?:attempt|do|gett?|giv|ha|hav|los|mak|perform|play|stand|strik|tak)(?:e?s|e|ing)?$"
    "|did|gave|got|took"
)
# What most often does what a verb says: in "a man in a hat riding a horse" the man rides. After
# "the", the first alone; after "a", any noun, but for words of MANY ("a few street signs").
PEOPLE = """activist actor artist athlete barber bartender batter bear bicyclist biker bishop boy
    bride brother bull candidate captain cat catcher champion chancellor chef child clown coach
    conductor cook cop couple cow cowboy crew crowd customer cyclist dad dancer daughter doctor dog
    driver duck elephant engineer family fan farmer father firefighter fisherman friend giraffe girl
    goalkeeper goat grandfather grandmother groom guy hiker horse hound husband king kitten lady
    leader lifeguard lion man mayor mechanic minister model mom monk monkey mother musician nurse
    officer owner passenger patient person photographer pilot pitcher player policeman politician
    pope premier president prince princess protester puppy queen referee reporter rider sailor
    senator sheep shopper singer sister skater skier soldier son student surfer surgeon swimmer
    teacher team technician tenant toddler tourist trainer umpire vendor waiter waitress wife woman
    worker zebra""".split()
MOVERS = with_plurals(
    "airplane bird boat bus children men people plane train truck women " + " ".join(PEOPLE)
)
OWNERS = ("kids", "boys", "girls", "ladies", "womens", "mens")
SINGULAR = ("a", "an", "one", "another", "each", "every", "this")
SEVERAL = {"few", "several", "many", "various"}
MANY = QUANTITY | SEVERAL

# A word or a sign, caption[start:end], and its tag. A noun phrase and its subject, the head noun
# with its compounds; a span is (start, end). A caption with its `Token`s and `Phrase`s, in order.
Token = namedtuple("Token", "text start end tag")
Phrase = namedtuple("Phrase", "text span subject subject_span")
Parse = namedtuple("Parse", "caption tokens phrases")

# A word with hyphens, apostrophes, decimals; an abbreviation; 's; any sign; with `fold`'s fillers.
WORD = "[^\\W_]+(?:\u200b+[^\\W_]+)*"
TOKEN = re.compile(
    rf"(?:(?:and/or|w/o?)(?![^\W_])|{WORD}(?:\u200b*[-']\u200b*(?!s\b){WORD}|[.,:/](?=\d)\d+"
    r"|\.(?:(?<=\b(?:[SsMm]t|[DdMm]r)\.)|(?<=\b(?:Gen|Gov|Mrs|Rep|Sen|Sgt)\.))"
    r"|(?<=\b[A-Za-z])\.(?:[A-Za-z]\.)+)*|'\u200b*s\b|\S)"
    "\u200b*"
)
ENTITY_OR_SIGN = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|[A-Za-z]\w{1,30});|.", re.S)
SAME = str.maketrans("’‘ʼ´`‐‑", "'" * 5 + "--")


@lru_cache(maxsize=1 << 16)
def fold(sign):
    """A letter without its accent; U+200B for what is not seen, and to fill an entity up."""
    if len(sign) > 1:
        seen = html.unescape(sign)[:1].strip()  # nothing for a space, or for no character
        return fold(seen).ljust(len(sign), "\u200b") if seen else " " * len(sign)
    unseen = unicodedata.category(sign) in ("Mn", "Me", "Cf")
    return "\u200b" if unseen else unicodedata.normalize("NFD", sign)[0].translate(SAME)


def as_read(caption):
    """The caption as its reader sees it, place by place: plain letters and signs, no entities."""
    if caption.isascii() and "&" not in caption and "`" not in caption:
        return caption
    return ENTITY_OR_SIGN.sub(lambda sign: fold(sign[0]), caption)


def tokenize(caption):
    """Offsets [(start, end), …] of the words and signs of a caption; [] when there are none."""
    return [match.span() for match in TOKEN.finditer(as_read(caption))]


def split_words(caption, spans=None):
    """Its words and signs (those at the spans) as the rules read them: small, plain letters."""
    plain = as_read(caption)
    words = [plain[start:end].lower() for start, end in spans or tokenize(caption)]
    return words if plain is caption else [word.replace("\u200b", "") for word in words]


@lru_cache(maxsize=1 << 16)
def classify(word):
    """The class of a lower-cased word seen alone: by lexicon, last part, degree, then ending."""
    if word in LEXICON:
        return LEXICON[word]
    first, last = word.partition("-")[0], word.rpartition("-")[2]
    if last != word and last.isalpha():  # black-and-white, snow-covered; two-story; t-shirts
        found = classify(last)
        if found in (ADJ, PARKED, RIDING):
            return found
        if last.endswith("s"):
            return PLURAL
        whole = last in FORMS or first == "non" or classify(first) in (ADJ, NUM, ONE, PREP, UP)
        return ORANGE if whole else NOUN
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
NOUNISH = NEXT + VERB + RIGHT + BACK  # may go on a noun phrase
ARTICLES = DET + POSS + ALL
OPENERS = ARTICLES + HER  # starts a noun phrase and cannot go on one
INSIDE = ARTICLES + ADJ + PARTICIPLE + NUM + GENITIVE  # stands in one, before its noun
PREPS = PREP + LINK
BETWEEN = START + JOINTS + PREPS  # stands before one
AMID = INSIDE + DEGREE + COMPOUND + BETWEEN + NOUN
PLACES = PREPS + UP + ADV
FOLLOWS = PLACES + TO + SUB + JOINTS + MARK + OPENERS + NEARBY + PRON + THAT  # follows a verb

# What a test of a rule sees: all words and tags (the caption begins at 2; from index on they are
# still classes), and the five around it.
Near = namedtuple(
    "Near", "words tags index before2 before word after after2 left2 left tag right right2"
)


def is_person(word):
    return word in MOVERS or re.match(".{2,}(?:[eo]r|man|ist|ward)$", word)


def after_one(at):
    """The noun before is one of its kind, so no plural follows it: a bird *perches* on."""
    near = "".join(at.tags[max(2, at.index - 8) : at.index])
    phrase = re.search("[DCP](?:[JZNSU]|(?<=[JZ])(?:,|,?K)(?=J))*$", near)
    before = at.words[at.index - len(phrase[0]) : at.index] if phrase else [""]
    if before[0] in ("the", "his", "her", "its", "their"):
        return at.before in PEOPLE
    return before[0] in SINGULAR and at.word[-1] == "s" and not MANY.intersection(before)


def feeds(at):
    """A person, and what is no person: a keeper *feeds* giraffes, but a tennis *players* hat."""
    if at.right != PLURAL:
        return at.before in PEOPLE and after_one(at)
    return is_person(at.before) and not is_person(at.word[:-1])


def acts(at):
    """Some who act as one, or one with a word that is mostly a verb: see a child *stand* on it."""
    verb = LEXICON.get(at.word + "s") == RIDES and at.right in PLACES + SUB
    return at.before in ("family", "team", "crowd", "couple") or verb and at.before in PEOPLE


def after_two(at):
    """Two things or more came before, and no verb: a man and a woman *ride* on."""
    some = "".join(at.tags[max(2, at.index - 6) : at.index])
    several = PLURAL in at.tags[2:6] or CONJ in some[-4:]
    return several and LEXICON.get(at.word + "s") == RIDES and not re.search("[VGEB]", some)


def in_clothes(at):
    """The first verb: a man in the snow *waves* to, two men in gear *ride* horses."""
    start = re.match("[DPJZCNSU]*([NS])I[DPJZCNSUK]*$", "".join(at.tags[2:12][: at.index - 2]))
    if not start or at.words[start.end(1) + 2] != "in":
        return False
    some = start[1] == PLURAL
    return some == (at.tag == RIDE) and is_person(at.words[start.end(1) + 1])


def compounds(at):
    """A *cutting* board, but a *riding* man; between phrases only ING_ALWAYS: *parking* lots."""
    if at.left == NOUN and at.after[-1:] == "s" and at.word != "parking":
        return False  # a man in a kitchen cutting vegetables
    if at.word in ING_ALWAYS:
        return at.before not in MOVERS
    placed = at.left in INSIDE + COMPOUND or at.before in PLACING
    placed = placed and (at.before, at.left2) != ("by", PAST)
    return placed and at.word not in ING_STATE and at.after not in MOVERS


def forms(at):
    """With an adjective, it says how a thing is made: long *sleeve*, deep *dish*."""
    return at.word in FORMS or f"{at.before} {at.word}" in ("deep dish", "high speed", "open air")


def latest(at):
    """The tags before, nine at most."""
    return at.tags[max(0, at.index - 9) : at.index]


def eats(at):
    """One who did something else before: a man cutting and *eating* pizza."""
    return at.word in ("eating", "flying", "smoking") and ING in latest(at)


def resembles(at):
    return at.word == "like" and at.before not in ("bit", "look")


def is_unknown(at):
    """Known by ENDINGS alone: a noun may end as an adjective does, a *guppy*."""
    return at.word[-1] in "yl" and at.word not in LEXICON


def owns(at):
    """A person, and the apostrophe is missing: a *persons* back."""
    always = at.word in ("mans", "mens", "someones")
    return always or at.before in ("a", "an") and is_person(at.word[:-1])


# The class of a word, the tag before it, the class after it -> its tag; then what else must hold.
# The first row that fits counts; where none does, USUALLY decides.
RULES = (
    (ALL, ANY, RIDING + PARKED, PRON),  # people, *all* wearing hats
    (ALL, ANY, DET, ADV, lambda at: at.word == "both" and at.after in SINGULAR),
    (ADV, DET + POSS, STARTS, ADJ),  # a *still* lake
    (ADJ, NOUNS, RIGHT, ADV, lambda at: at.word in LOCATIONS),  # zebra *bottom* left
    (ADJ, NOUN, ANY, NOUN, lambda at: at.word in LOCATIONS),  # a hill *top*
    # a pink *top*, a train with a yellow *front*
    (ADJ, ADJ + PARTICIPLE, FOLLOWS + RIDING, NOUN, lambda at: at.word in ("front", "top")),
    (ADJ, DET, RIDING, NOUN, lambda at: at.word in LOCATIONS),  # the *middle* holding a bat
    (ADJ, DET + POSS, PLACES + VERB + MARK, NOUN, is_unknown),  # a *guppy* in
    (ADJ, DET, ANY, PRON, lambda at: at.before == "each" and at.word == "other"),  # each *other*
    (ORANGE, NOUN, ADJ + PARKED, ADV, lambda at: at.word == "half"),  # a lot *half* full
    (ORANGE, COMMA, COMMA + MARK, ADJ, lambda at: at.word not in LEXICON),  # a coat, *flemish*
    (ORANGE, NOUN, ANY, NOUN),  # a street *light*
    (ORANGE, ANY, JOINTS, ADJ, lambda at: at.right2 == ADJ),  # an *orange* and red bus
    (ORANGE, ANY, RIDING, ADJ, lambda at: at.word not in LEXICON and at.right2 in THINGS),
    (ORANGE, ANY, PARKED, NOUN, lambda at: at.right2 in PREP + UP and at.word != "half"),
    # a *medic* checks a pulse
    (ORANGE, ARTICLES, PLURAL + LIGHTS, NOUN, lambda at: at.right2 in OPENERS),
    (ORANGE, ANY, THINGS + PAINTING + PARKED + ADJ + NUM + ONE + DEGREE, ADJ),  # an *orange* bus
    (ORANGE, BE + DEGREE, ANY, ADJ),  # is *orange*
    (NOUN, ADJ, THINGS, ADJ, forms),  # a long *sleeve* shirt
    (NOUN + ORANGE + RIDE, NOUNS + BE + VERB, RIDING, ADV, lambda at: at.after in ACTIVITIES),
    (NOUN, NUM, THINGS + PAINTING, ADJ, lambda at: at.before2 in SINGULAR or at.word in LAYERS),
    (NOUN, COMMA + MARK, ADJ, ADJ, lambda at: at.after in AS_SOLD),  # a bowl, *dishwasher* safe
    (NOUN, DET, PLURAL, NUM, lambda at: at.word in ("couple", "dozen")),  # a *couple* umbrellas
    (NOUN + ORANGE, PLURAL + INF, OPENERS, VERB),  # to *pedal* a bike, candles *light* a room
    # two men *camp* on
    (NOUN, PLURAL, PLACES + TO + SUB, VERB, lambda at: at.left2 in START + NUM),
    # a boy *pedals* his bike; but various yard decorations some of which
    (PLURAL + LIGHTS, NOUNS + DEGREE, OPENERS, VERB, lambda at: at.before2 not in SEVERAL),
    (PLURAL, CONJ, OPENERS, VERB, lambda at: VERB in latest(at)),  # sits and *pedals* his bike
    (PLURAL + LIGHTS, NOUN, NOUNS + ADJ, VERB, feeds),  # the teacher *quizzes* students
    (LIGHTS, NOUN, NOUNS + ADJ, VERB, after_one),  # a robot *slices* onions
    # a street *signs* on
    (PLURAL + LIGHTS, NOUN, FOLLOWS, PLURAL, lambda at: at.word in ("lights", "signs")),
    (PLURAL + LIGHTS, NOUN, FOLLOWS + RIDING, VERB, after_one),  # a bird *nests* on
    (PLURAL + LIGHTS, PRON, ANY, VERB),  # as she *pedals*
    (PLURAL, ANY, THINGS + ADJ + BACK, OWNER, owns),  # a *mans* hat
    (PLURAL, START, NOUN + ADJ + COMPOUND, OWNER, lambda at: at.word in OWNERS),
    (RIDE, REL + PRON + AUX + INF, ANY, VERB),  # to *ride*
    (RIDE, JOINTS, ANY, VERB, lambda at: at.left2 == VERB),  # sit and *ride*
    (RIDE, JOINTS, PRON + OPENERS, VERB),  # and *tilt* it
    (RIDE, PLURAL + BE, NEXT + FOLLOWS, VERB),  # people *ride* on
    (RIDE, NOUN, OPENERS + PRON, VERB, lambda at: is_person(at.before)),  # a man *beat* it
    (RIDE, NOUN, FOLLOWS, VERB, acts),  # the family *wave* from
    (RIDE, NOUN + COMMA, OPENERS + PLACES, VERB, after_two),  # a boy and a robot *ride* on
    (RIDE + LIGHTS + PLURAL, NOUN, PLACES + TO + OPENERS + THINGS, VERB, in_clothes),
    (PAINTING, PLURAL + BE + PRON + VERB, ANY, ING),  # people *painting*
    (PAINTING, NOUN + PREPS + CONJ + SUB, OPENERS, ING),  # a worker *painting* a wall
    (PAINTING, NOUN, ANY, ING, lambda at: at.before in MOVERS),  # a man *painting*
    # a *cutting* board; a *smiling* man; and *smiling* people, a glass of *running* water
    (RIDING, AMID, THINGS + PAINTING + CAN, COMPOUND, compounds),
    (RIDING, DEGREE + ADJ, ANY, ING, lambda at: at.left2 in BE),  # is busy *eating* pizza
    (RIDING, INSIDE + DEGREE, NOUNISH, PARTICIPLE),
    (RIDING, CONJ, NOUNISH, ING, eats),  # cutting and *eating* pizza
    (RIDING, BETWEEN + VERB + ING, NOUNISH, PARTICIPLE, lambda at: at.word in ING_STATE),
    (RIDING, PREPS, THINGS + PARKED + PAINTING, PARTICIPLE, lambda at: at.before in ("of", "with")),
    (RIDING, START + ARTICLES + ADJ, LINK, NOUN, lambda at: at.word in QUANTITY),
    (CONJ, NOUN, NOUN + ORANGE, COMPOUND, lambda at: at.after2 in DISHES),  # ham *and* egg pie
    (PARKED, ANY, THINGS, NOUN, lambda at: at.word == "led"),  # an *LED* lamp
    (PARKED, AMID + VERB + ING + SUB, NEXT, PARTICIPLE),  # *parked* cars
    (PARKED, BE, NEXT, PARTICIPLE, lambda at: at.before2 == "there"),  # there are *parked* cars
    (PARKED, ARTICLES, UP + PREP, PARTICIPLE, lambda at: at.right2 in NOUNS + ADJ),
    # an old *broken* down bus
    (PARKED, ADJ, UP, PARTICIPLE, lambda at: at.right2 in NOUNS and at.after != "by"),
    (PARKED, ARTICLES, CONJ, PARTICIPLE, lambda at: at.right2 in PARKED + ADJ),  # a *cut* and dried
    (PARKED, DEGREE, CONJ, PARTICIPLE, lambda at: at.left2 in ARTICLES),  # a partly *eaten* and
    (RIDE, ARTICLES + ADJ, UP, PARTICIPLE, lambda at: at.right2 in NOUNS),  # a *stand* up shower
    (UP, INSIDE + PREPS, NOUNS, ADJ, lambda at: at.word == "outside"),  # an *outside* wall
    (UP, ADJ, NOUNS, PARTICIPLE, lambda at: at.left2 in ARTICLES),  # a closed *off* pen
    (PREP + UP, PARTICIPLE, ANY, PARTICIPLE),  # a fenced *in* area
    (PARKED, ARTICLES, RIGHT, PARTICIPLE),  # a *broken* left wing
    (PARKED, ARTICLES, ANY, NOUN),  # a *set* of
    (PARKED, ADJ, VERB, NOUN),  # a small *dug* sits
    (PARKED, NOUN, COMMA + MARK, NOUN, lambda at: at.word == "set"),  # a bowl *set*
    (PARKED + VERB, START, LINK, NOUN, lambda at: at.word in QUANTITY),  # *set* of
    (DET, ANY, VERB + RIDES, PRON, lambda at: at.word in SINGULAR and at.after[-1] == "s"),
    (RIDES + VERB, ADJ, FOLLOWS, VERB, lambda at: at.before2 in WEARING and at.word[-1] == "s"),
    (VERB, INSIDE, ANY, NOUN),  # a *splash* in
    (RIDES, INSIDE + PREPS + START + COMPOUND, ANY, PLURAL),  # two *rides*
    # *tow* people: two, misspelt
    (TO + ADV + RIDE, START, PLURAL, NUM, lambda at: at.word in ("to", "too", "tow")),
    (TO, ANY, VERB + BE + RIDE + HAS, INF),  # *to* eat, *to* ride
    (TO, ANY, ORANGE, INF, lambda at: at.right2 in OPENERS),  # *to* pedal a bike
    (TO, ANY, NOUN, INF, lambda at: at.right2 in OPENERS + ADJ),
    (TO, ANY, PARKED, INF, lambda at: at.after in ("cut", "put", "set", "shut")),
    (BACK, ARTICLES + ADJ + GENITIVE + OWNER + PREPS + START, ANY, NOUN),  # the *back* of
    (NEARBY, ARTICLES + ADJ, ANY, ADJ),  # a *nearby* house
    (NEARBY, PREPS, NOUNS, ADJ),  # in *nearby* grass
    (RIGHT, ANY, STARTS + DEGREE, ADJ),  # the *right* hand
    (UP, ANY, STARTS + OPENERS + PRON + THAT + BACK, PREP),  # *up* a hill
    (PREP, NOUN, NOUN, PARTICIPLE, resembles),  # a mirror *like* object
    (UP, ANY, RIDING, PREP, lambda at: at.word == "by" and at.right2 in THINGS),
    (HER, ANY, NOUNISH, POSS),  # *her* hat
    (ONE, ANY, CAN, PRON, lambda at: at.right2 in VERB),  # *one* can see
    (ONE, ANY, THINGS + ADJ + CAN, NUM),  # *one* dog
    (THAT, NOUNS + PRON + ADJ, ANY, REL),  # a dog *that* runs
    (THAT, ANY, THINGS + ADJ, DET),  # *that* dog
    (CAN, NOUNS + PRON + REL, VERB + RIDE + BE + ADV, AUX),  # a dog *can* swim
    (QUOTE, PLURAL, NOUNISH, GENITIVE),  # two dogs *'* heads
    (GENITIVE_S, NOUNS, PREPS + JOINTS + MARK + THAT, PLURAL),  # two ski *'s* on
    (GENITIVE_S, NOUNS + PRON, RIDING, BE, lambda at: at.right2 not in THINGS),  # he *'s* running
    (GENITIVE_S, NOUNS + PRON, NOUNISH, GENITIVE),  # a dog *'s* head
)
USUALLY = {ALL: DET, LIGHTS: PLURAL, RIDES: VERB, HAS: VERB, RIDING: ING, PARKED: PAST, TO: LINK}
USUALLY |= {HER: PRON, ONE: PRON, THAT: SUB, GENITIVE_S: BE, QUOTE: MARK}
USUALLY |= dict.fromkeys(NEARBY + RIGHT + UP + BACK, ADV)
USUALLY |= dict.fromkeys(RIDE + PAINTING + ORANGE + CAN, NOUN)
RULES_OF = {}
for classes, *rule in RULES:
    for word_class in classes:
        RULES_OF.setdefault(word_class, []).append((*rule, None)[:4])


def decide(words, classes):
    """The tags of lower-cased words, from their classes, left to right; lists. Linear."""
    words = ["", "", *words, "", ""]
    tags = [START, START, *classes, MARK, MARK]
    for i in range(2, len(words) - 2):
        word, after = words[i], words[i + 1]
        if after in ("next", "close") and words[i + 2] == "to":
            tags[i + 1 : i + 3] = ADV, LINK
        if word == words[i + 2] and after in ("by", "in", "to"):
            tags[i] = tags[i + 2] = ADV  # hand in hand
        if f"{word}-{after}" in FIXED:
            tags[i : i + 2] = NOUN, PLURAL if after[-1] == "s" != after[-2] else NOUN
        for left, right, tag, test in RULES_OF.get(tags[i], ()):
            if tags[i - 1] not in left or tags[i + 1] not in right:
                continue
            if not test or test(Near(words, tags, i, *words[i - 2 : i + 3], *tags[i - 2 : i + 3])):
                tags[i] = tag
                break
        else:
            tags[i] = USUALLY.get(tags[i], tags[i])
    return tags[2:-2]


# A base noun phrase over the tags; k is a conjunction or a comma between adjectives of one noun.
# "red and white cups" is JkJS, "a dog 's head" DNMN; n is a noun that ends its phrase. In "apples
# pears and figs" a comma is missing: SSKS is three. Repetition is bounded: time is linear.
JOINED = re.compile(
    r"(?<=[JZ])(?:,?K|,)(?=Q?[JZ][JZ,KQ]{0,6}[JZNSU]{0,4}[NS])"
    r"|(?<=[DPC][JZ])K(?=N[NU]{0,2}[NS])"  # a white and stainless steel fridge
)
QUOTED = re.compile(r"(?<=[DPJZC])\.([NSJVGE]{1,5})\.(?=[JZ]{0,3}[NS])")  # a "stop" sign
FRONTED = re.compile(r"(^I[DPJZN]{0,6})N(?=S+V)")  # after the rain | puddles cover
NOUN_PHRASE = re.compile(
    r"D{0,3}P?(?:[JZCQkUMY]|N(?=[NSnZUM])|R(?=M)|S(?=[NM]|S(?!S{0,9}[K,]))){0,40}[NSn]|R"
)


def noun_phrases(tags):
    """[(first, last), …] of the base noun phrases and pronouns; last is the head."""
    code = JOINED.sub(lambda joint: "k" * len(joint[0]), "".join(tags))
    code = QUOTED.sub(lambda quoted: f"k{'U' * len(quoted[1])}k", code)
    code = FRONTED.sub(r"\1n", code)
    return [(match.start(), match.end() - 1) for match in NOUN_PHRASE.finditer(code)]


@lru_cache(maxsize=1 << 16)
def is_abstract(word):
    """A day, a party, happiness."""
    return word in NOT_THINGS or bool(ABSTRACT.match(word)) and word not in CONCRETE


def is_thing(words, tags, first, last, subject):
    """Whether one can point at what the noun phrase words[first : last + 1] names."""
    word, before, after = words[last], words[first - 1], words[last + 1]
    shown = after in ("on", "hanging", "hung", "above") and before != "for"
    shown = shown or after != "of" and before in AMONG and word not in VIEWS
    if word in PICTURES and not shown:
        return word == "view" and subject < last and after != "of"  # a lake view
    if tags[last] == PRON or is_abstract(word):
        return False
    if word in TAKEN:
        taken = TAKING.match(before) or before == "for" and tags[first] == DET
        if taken or words[first - 2 : first] == ["middle", "of"]:
            return False  # takes a bath, for a walk, in the middle of a swing
    if before in ("says", "saying") and tags[first] != DET:
        return False  # a sign saying stop
    if tags[first] == NUM and (word == "pack" or before in (",", "-") and word in QUANTITY):
        return False  # , 2 pack
    if before == "," == after and DATE.match(" ".join(words[last + 2 : last + 4])):
        return False  # a coat, Paris, about 1925
    credit = (before, after) in (("(", "/"), ("/", ")")) or "reuters" in (word, words[first - 2])
    if credit or (word, after) == ("file", "-"):
        return False  # FILE - A ship leaves. (Agency/Photographer)
    if word == "corner" and (words[last - 1] in LOCATIONS or words[last - 1] in ("lower", "upper")):
        return False  # top right corner
    row = word in ARRAYS and before == "in" and tags[first] != NUM
    if row or after == "of" and word in ("corner", "form", "point", "shades", "shape"):
        return False  # in a row, at the corner of
    if word in LOCATIONS and subject == last:
        worn = ADJ + PARTICIPLE if word in ("front", "top") else ""  # a pink top
        return any(tag in worn + POSS + GENITIVE + OWNER for tag in tags[first:last])
    bare = word in BARE and LEXICON.get(before) in (PREP, LINK)
    return first < last or not (bare or word in BALL_SPORTS)


def read_phrases(caption, spans, words, tags):
    """The `Phrase`s of a caption; "of" after a word of QUANTITY makes two noun phrases one."""
    words = words + ["", "", "", ""]  # words[-1] stands before the first
    phrases, quantity = [], None
    for first, last in noun_phrases(tags):
        subject = last
        while subject > first and tags[subject - 1] in COMPOUNDS:
            subject -= 1
        if subject > first and tags[subject - 1] == CONJ:
            subject = last  # a white and stainless steel fridge
        start, quantity = first if quantity is None else quantity, None
        more = words[last + 1] == "of" or words[last : last + 2] in (["half", "a"], ["half", "an"])
        more = more or words[last + 1 : last + 4] == ["and", words[last], "of"]
        site = subject < last and words[last] in SITES
        if more and not site and (words[last] in QUANTITY or words[last] == "body"):
            quantity = start
        elif is_thing(words, tags, first, last, subject):
            start, end = spans[start + (words[start] == "whose")][0], spans[last][1]
            at = spans[subject][0]
            phrases.append(Phrase(caption[start:end], (start, end), caption[at:end], (at, end)))
    return phrases


ARTICLE = re.compile(r"\b(?:an?|the|is|are)\b", re.I)


def is_title(caption, spans):
    """Most words begin with a capital, and there is no article, as in a product's title; a headline
    is taken for one, and loses its verbs."""
    capitals = sum(caption[start].isupper() for start, _ in spans)
    return 2 * capitals > len(spans) and not (caption.isupper() or ARTICLE.search(caption))


def classify_in_title(word):
    """No verbs there: Cat Scratching Post, Throw Pillow, Knife Set with Block."""
    found = classify(word)
    if found == RIDING and word not in ING_STATE:
        return COMPOUND
    return NOUN if found == VERB or word == "set" else found


def after_names(caption, spans, classes):
    """The classes, with verbs after names of two words: Joe Biden *boards* a plane."""
    found, first = list(classes), [caption[start] for start, _ in spans]
    for i in range(2, len(found)):
        named = first[i - 2].isupper() and first[i - 1].isupper() and first[i].islower()
        named = named and found[i - 2] not in ARTICLES + NUM + ADJ
        several = found[i] == RIDE and CONJ in found[max(0, i - 8) : i]
        if named and (found[i] in RIDES + LIGHTS or several):
            found[i] = VERB
    return found


def parse(caption):
    """The `Parse` of a caption, whatever string it is. Linear in its length.

    Phrases are slices of the caption as given: one over an HTML entity has the entity in it.
    """
    spans = tokenize(caption)
    words = split_words(caption, spans)
    if caption[1:].islower():  # as most are: there is no title, and no name
        classes = [*map(classify, words)]
    else:
        sort = classify_in_title if is_title(caption, spans) else classify
        classes = after_names(caption, spans, map(sort, words))
    tags = decide(words, classes)
    tokens = [Token(caption[a:b], a, b, tag) for (a, b), tag in zip(spans, tags)]
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
    return [parsed.caption]


def phrase_texts(parsed):
    return [phrase.text for phrase in parsed.phrases]


def subject_texts(parsed):
    return [phrase.subject for phrase in parsed.phrases]


# ==== (b) The tree: it is built only when asked for, and changes no phrase and no subject =======

# Tags that only a tree asks for: *there* is a dog, *both* a cat and a dog, *ice* skating.
EXPLETIVE, BOTH, ICE = "XFa"
# Universal Dependencies: parts of speech with their tags; relations inside a noun phrase, where
# nouns are "compound"; relations of words that wait for a head to their right.
UPOS = dict(ADJ=ADJ, ADP=PREPS, ADV=ADV + DEGREE, AUX=BE + AUX, CCONJ=CONJ + BOTH, DET=DET, NUM=NUM)
UPOS |= dict(NOUN=COMPOUNDS + OWNER + ICE, PRON=POSS + PRON + REL + EXPLETIVE, SCONJ=SUB)
UPOS |= dict(PART=INF + GENITIVE, PUNCT=COMMA + MARK, VERB=VERB + ING + PAST + PARTICIPLE)
INNER = {DET: "det", POSS: "nmod:poss", OWNER: "nmod:poss", ADJ: "amod", PARTICIPLE: "amod"}
INNER |= {DEGREE: "advmod", NUM: "nummod"}
WAITS = {ADV: "advmod", DEGREE: "advmod", PREP: "case", LINK: "case", GENITIVE: "case", CONJ: "cc"}
WAITS |= {INF: "mark", SUB: "mark", BE: "aux", AUX: "aux", EXPLETIVE: "expl"}
WAITS |= {COMMA: "punct", MARK: "punct", BOTH: "cc:preconj", ICE: "compound"}
NOMINAL, PLACE, EXISTS = "n", "c", "b"  # a noun phrase; next *to*; there *is*
NONE = -1  # no word; the head of a word that is not yet hung, and in the end of the root alone
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
TOOLS = """knife fork spoon racket racquet bat hand hands brush scissors chopsticks stick
    hose""".split()

# A token in its tree: its universal part of speech, its head's index (-1: none), its relation.
Node = namedtuple("Node", "text start end tag head label")


def refine(words, tags):
    """The tags, with distinctions that only a tree asks for."""
    tags = [*tags, MARK]
    for i, (word, after) in enumerate(zip(words, [*words[1:], ""])):
        if word in ("has", "have", "having") and tags[i + 1] in (BE, PAST):
            tags[i] = AUX  # has been
        elif word == "there" and tags[i + 1] in (VERB, BE, AUX):
            tags[i] = EXPLETIVE
        elif word == "about" and after == "to":
            tags[i] = ADJ
        elif word == "both" and tags[i] == ADV:
            tags[i] = BOTH
        elif tags[i] == ADJ and tags[i - 1] == NUM and classify(word) == NOUN:
            tags[i] = NOUN  # a two story house
        elif tags[i] == ADV and after in ACTIVITIES:
            tags[i] = ICE
        elif word == "no":
            tags[i] = DET
        elif word == "and":
            tags[i] = CONJ  # ham and egg pie
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

    def __init__(self, words, tags, spans):
        self.words, self.tags, self.ends = words, tags, dict(spans)
        self.heads, self.labels = [NONE] * len(words), [""] * len(words)
        self.root = self.noun = self.verb = self.first_verb = NONE
        self.joined = self.joint = NONE  # a noun phrase joined to another, and its conjunction
        self.place = ""  # the latest preposition
        self.open_clause()

    def open_clause(self):
        """What waits for a noun phrase (cases: prepositions) and for a predicate: nothing yet."""
        self.subject = self.relative = self.conjunction = self.mark = self.auxiliary = NONE
        self.cases, self.waiting = [], []

    def hang(self, word, head, label):
        self.heads[word], self.labels[word] = head, label

    def hang_modifiers(self, first, last):
        """Words of a noun phrase hang on its head, or on a noun or an adjective inside it."""
        owner = adjective = last
        joined, chain = [], NONE  # adjectives that hang on the first of their chain
        for i in range(last - 1, first - 1, -1):
            tag, after, word = self.tags[i], self.tags[i + 1], self.words[i]
            if tag == GENITIVE:
                self.hang(i, i - 1, "case")
                self.hang(i - 1, owner, "nmod:poss")
                owner = i - 1
            elif tag == PARTICIPLE and word != "like" and classify(word) in PLACES:
                self.hang(i, i - 1, "compound:prt")  # a fenced in area
            elif tag == MARK:  # a "stop" sign
                closes = MARK in self.tags[first:i]
                self.hang(i, i - 1 if closes else i + 1, "punct")
            elif tag in JOINTS:
                self.hang(i, adjective, WAITS[tag])
                if tag == CONJ or after == CONJ or adjective == chain:
                    joined = [*joined, adjective] if adjective == chain else [adjective]
                    chain = i - 1  # red, white and blue; but a large, brown dog
                    for member in joined:
                        self.hang(member, chain, "conj")
            elif not self.labels[i]:
                inner = tag == DET and i > first or tag == NOUN and CONJ in self.tags[first:i][-1:]
                story = tag == NUM and i + 1 < last and self.words[i - 1] in SINGULAR
                near = tag == DEGREE or inner or tag == NOUN and after == PARTICIPLE
                near = near or story and word != "one"  # a three story house
                self.hang(i, i + 1 if near else owner, INNER.get(tag, "compound"))
            if tag in (ADJ, PARTICIPLE) or tag == NOUN and i == last - 1:
                adjective = i

    def grow(self):
        """Fills heads and labels."""
        for first, last in self.ends.items():
            self.hang_modifiers(first, last)
        start = 0
        while start < len(self.words):
            index, kind = self.kind(start)
            copula = self.auxiliary >= 0 and self.tags[self.auxiliary] == BE
            if kind in WAITS:
                self.wait(index, kind)
            elif kind == REL:  # hangs on its noun until a verb comes: a man who
                self.hang(index, self.noun, "nsubj")
                self.relative = index if self.subject < 0 else self.relative
            elif kind == NOMINAL and not copula:
                self.hang(index, *self.head_of_noun(index, start))
            else:
                self.hang(index, *self.head_of_predicate(index, kind, copula))
            start = index + 1
        self.finish()

    def kind(self, index):
        """The head of the noun phrase that begins at index and NOMINAL, or index and its kind."""
        tag = self.tags[index]
        in_red = tag in ADJ + PARTICIPLE and self.cases and self.auxiliary < 0
        if index in self.ends or in_red or tag in DET + POSS + NUM + COMPOUND:
            return self.ends.get(index, index), NOMINAL
        if tag == ADV and self.tags[index + 1 : index + 2] == [LINK] and not self.particle(index):
            return index, PLACE
        return index, EXISTS if tag == BE and self.tags[index - 1] == EXPLETIVE else tag

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

    def head_of_noun(self, index, start):
        """Head and label of a noun phrase that is no predicate; start is its first word."""
        noun, verb = self.noun, self.verb
        for case in self.cases:
            self.heads[case] = index
        head, label = NONE, ""
        if self.cases:
            head, label = self.head_of_place(index)
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

    def head_of_place(self, index):
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

    def head_of_predicate(self, index, kind, copula):
        """Head and label of a verb, a participle or another predicate; it takes what waits."""
        free = self.auxiliary < 0
        finite = not free or kind in (VERB, EXISTS)
        for word in self.cases + self.waiting:
            self.heads[word] = index
        if copula and kind not in VERB + ING:
            self.labels[self.auxiliary] = "aux:pass" if kind == PAST else "cop"
        nsubj = "nsubj:pass" if kind == PAST and not free else "nsubj"
        if self.relative >= 0:  # a man who rides; a horse that a man rides
            head, label = self.heads[self.relative], "acl:relcl"
            self.hang(self.relative, index, nsubj if self.subject < 0 else "obj")
        elif self.mark >= 0:
            head, label = self.head_of_marked()
        elif self.conjunction >= 0 and self.verb >= 0:  # sits and watches
            head, label = self.first_of(self.verb), "conj"
            self.heads[self.conjunction] = index
        elif finite:
            head, label = self.head_of_clause(index)
        else:
            head, label = self.head_of_participle(index, kind)
        if self.subject >= 0:
            self.hang(self.subject, index, nsubj)
        if kind == NOMINAL:
            self.noun = index
        else:
            self.verb = index
        self.open_clause()
        return head, label

    def head_of_marked(self):
        """While grazing; seems that it rains; ready to go; a man to watch."""
        noun, verb = self.noun, self.verb
        if self.tags[self.mark] == INF and self.subject < 0:
            if verb < 0:
                return noun, "acl"
            completes = verb > noun and COMPLETED.match(self.words[verb])
            return verb, "xcomp" if completes else "advcl"
        if self.words[self.mark] == "that" and self.mark == verb + 1:
            return verb, "ccomp"
        return self.root, "advcl"

    def head_of_clause(self, index):
        """A man | sits; a man sits and a dog | stands."""
        if self.first_verb < 0:
            self.subject, self.root, self.first_verb = self.root, index, index
            return NONE, ""
        if self.noun > self.verb and self.labels[self.noun] in ("conj", "parataxis"):
            self.subject = self.noun
        if self.noun != self.joined:
            return self.first_verb, "parataxis"
        self.heads[self.joint] = index
        return self.first_verb, "conj"

    def head_of_participle(self, index, kind):
        """A man in a hat | riding; holding a bat | standing; a man stands | riding."""
        noun, verb = self.noun, self.verb
        if self.root < 0:
            self.root = index
            return NONE, ""
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
        waiting = [i for i, head in enumerate(self.heads) if head == NONE]
        if self.root < 0:
            self.root = next((i for i in waiting if self.tags[i] not in WAITS), 0)
        for i in waiting:
            comma = self.tags[i : i + 2] == [COMMA, CONJ] and self.heads[i + 1] >= 0
            head = self.heads[i + 1] if comma else self.root  # ", and": with the conjunction
            self.hang(i, head, self.labels[i] or "dep")
        self.hang(self.root, NONE, "root")


def tree(parsed):
    """The `Node`s of a `Parse`, one a token, in order; exactly one is the root. Linear."""
    words = [token.text.lower() for token in parsed.tokens]
    given = [token.tag for token in parsed.tokens]
    tags = refine(words, given)
    grower = Grower(words, tags, noun_phrases(given))
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


def read_lines(path):
    """Yields number and text of each line: UTF-8, or UTF-16 by its mark; "-" is standard input.

    What is neither is read as Latin-1, and that is said once.
    """
    with open(0 if path == "-" else path, "rb") as file:
        wide = file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        how = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
        said = False
        for number, line in enumerate(io.TextIOWrapper(file, *how), 1):
            if not line.isascii() and re.search("[\udc80-\udcff]", line):
                line = line.encode("utf-8", "surrogateescape").decode("latin-1")
                if not said:
                    print(f"{path}:{number}: this is no UTF-8; read as Latin-1", file=sys.stderr)
                said = True
            yield number, line.rstrip("\n")


def read_text(path):
    """The lines of `read_lines` as one text."""
    return "\n".join(line for _, line in read_lines(path))


def read_captions(path):
    """Yields the captions of COCO's .json, of .jsonl records or of a text's lines."""
    name, lines = str(path), read_lines(path)
    try:
        if name.endswith(".json"):
            rows = json.loads(read_text(path))["annotations"]
        elif name.endswith(".jsonl"):
            rows = (json.loads(line) for _, line in lines if line.strip())
        else:
            rows = ({"caption": line} for _, line in lines)
        for row in rows:
            captions = row["captions"] if "captions" in row else [row["caption"]]
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise TypeError(f"{captions!r} are no captions")
            yield from captions
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
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            parses[row["caption"]] = locate(row["caption"], row["phrases"])
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"caption": …, "phrases": [{"text": …, "subject": …}, …]}'
            raise ValueError(f"{path}:{number}: a line is {wanted} ({error})") from error
    return parses


def plain(phrase):
    """A phrase as a score compares it: small letters, no first article, single spaces, no place."""
    text = re.sub(r"^(an?|the) ", "", " ".join(phrase.text.lower().split()))
    return Phrase(text, None, phrase.subject.lower(), None)


def score(gold, parses):
    """Text: precision, recall and F1 of parses, of multisets, then each caption's errors.

    Both are {caption: [`Phrase`, …]}. A caption is right when all its subjects are, in order.
    """
    views = {
        "phrases": lambda phrase: phrase.text,
        "subjects": lambda phrase: phrase.subject,
        "heads": lambda phrase: phrase.subject.split()[-1],
    }
    wanted = found = right = 0
    hits, errors = Counter(), []
    for caption, phrases in gold.items():
        theirs, mine = [*map(plain, phrases)], [*map(plain, parses.get(caption, []))]
        wanted, found = wanted + len(theirs), found + len(mine)
        right += [phrase.subject for phrase in theirs] == [phrase.subject for phrase in mine]
        for name, view in views.items():
            hits[name] += (Counter(map(view, theirs)) & Counter(map(view, mine))).total()
        missed, wrong = Counter(theirs) - Counter(mine), Counter(mine) - Counter(theirs)
        errors += [f"\n{caption}"] if missed or wrong else []
        errors += [f"  missed {p.text}  (subject: {p.subject})" for p in missed.elements()]
        errors += [f"  wrong  {p.text}  (subject: {p.subject})" for p in wrong.elements()]
    lines = [f"{'':10}{'precision':>10}{'recall':>10}{'F1':>10}"]
    for name in views:
        precision, recall = hits[name] / max(1, found), hits[name] / max(1, wanted)
        f1 = 2 * hits[name] / max(1, found + wanted)
        lines.append(f"{name:10}{precision:10.4f}{recall:10.4f}{f1:10.4f}")
    share, missing = right / max(1, len(gold)), len(gold.keys() - parses.keys())
    lines.append(f"captions right: {right} of {len(gold)}, {share:.4f}; without a parse: {missing}")
    return "\n".join(lines + errors)


def run():
    """Prints what the options ask for; OSError and ValueError say what is wrong with them."""
    parser = argparse.ArgumentParser(description="Parse captions into trees and hierarchies.")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help="a caption to parse")
    add("--file", help="parse each line of FILE, COCO's .json or .jsonl records; -: standard input")
    add("--json", action="store_true", help="print one JSON object a caption instead of text")
    add("--score", metavar="GOLD", help="rate the rules, or --parses, on gold captions")
    add("--parses", metavar="FILE", help="with --score: rate these parses (.jsonl)")
    options = parser.parse_args()
    if options.score:
        gold = read_parses(options.score)
        if options.parses:
            parses = read_parses(options.parses)
        else:
            parses = {caption: parse(caption).phrases for caption in gold}
        print(score(gold, parses))
        return
    if options.parses:
        raise ValueError("--parses is rated: say --score GOLD too")
    if not options.captions and not options.file:
        raise ValueError("nothing to parse: give a caption in quotes, or --file FILE (- is stdin)")
    for name in options.captions:
        if " " not in name and "." in name and os.path.isfile(name):
            raise ValueError(f"{name} is a file: --file {name} parses each of its lines")
    lines = read_captions(options.file) if options.file else ()
    for parsed in map(parse, chain(options.captions, lines)):
        print(json.dumps(to_json(parsed), ensure_ascii=False) if options.json else show(parsed))


def main():
    """The command line; returns the exit status."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        run()
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
