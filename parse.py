"""A rule-based dependency parser for image captions, and the hierarchy that HIST cuts from its trees.

    caption      "An orange cat laying on a white and brown cat in a bed."
    phrases      an orange cat · a white and brown cat · a bed          subjects     cat · cat · bed
    composites   an orange cat and a white and brown cat · an orange cat and a bed · …

    python parse.py "a man riding a horse"        the tree and the hierarchy; --draw: the tree as a picture in text
    python parse.py --json --file captions.txt    one JSON object a line ("-" reads standard input)
    python parse.py --score GOLD.jsonl            precision, recall and F1 against annotated captions, and every error
    python parse.py --bench captions.txt          captions a second, beside NLTK's RegexpParser
    python parse.py --llm URL --model NAME captions.txt > parses.jsonl       the paper's way: a language model's parses

Tokens -> tags -> heads -> phrases -> composites, with no trained model and no download. The levels: HIST, arXiv
2412.08110; the relations: Universal Dependencies. A tag is one letter, so that the tags of a caption are a string and
a noun phrase is a regular expression over it; a small letter is a word that `disambiguate` decides by its neighbours.
"""
import argparse
import http.client
import json
import os
import re
import socket
import sys
import time
import urllib.request
import zlib
from collections import Counter
from functools import lru_cache
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# -------------------------------------------------------------------------------------------------------- lexicon
# Q: an adverb that may stand inside a noun phrase; O: to, of, from; U: an -ing noun before a noun ("living room"); Y: "a mans hat";
# Z: a participle before its noun ("parked cars"); G, E: participles elsewhere; H: an auxiliary other than be (B).
UPOS = dict(D="DET", P="PRON", J="ADJ", N="NOUN", S="NOUN", U="NOUN", R="PRON", A="ADV", Q="ADV", I="ADP", O="ADP",
            Y="NOUN", K="CCONJ", V="VERB", Z="VERB", G="VERB", E="VERB", B="AUX", H="AUX", T="PART", W="PRON", L="SCONJ",
            X="PRON", M="PART", **{"#": "NUM", ",": "PUNCT", ".": "PUNCT"})
# Tag -> words; a second letter: the tag of the verb's -s form. ys, yz: nouns too, the -s form mostly a verb (rides), a
# noun (lights); e: participles; i: things in -ing; j: adjectives before a noun, else nouns; N: the suffix rules err.
WORDS = {
    "J": """hispanic caucasian arab latin australian brazilian korean vietnamese thai greek turkish scottish nearest protective large big
        small little huge tall short long wide narrow high low deep shallow thick thin fat round flat straight curved curly old young new
        elderly ancient modern contemporary vintage fresh ripe hot cold warm cool wet clean full open close dark bright dim clear icy hilly
        steep smooth rough sharp hard soft bald loose tight plain simple fancy ornate elegant cute nice great good bad best strange odd
        unusual unique different similar same other own several few multiple single only whole sad tired calm quiet lone wild rural urban
        public electric electronic digital mobile wooden metallic golden dead live naked barefoot pregnant blonde blond asian african
        american chinese japanese european mexican english formal military historic floral outdoor indoor upper lower inner outer front top
        bottom middle center opposite adjacent far upside bare lush strong fast slow fake real natural homemade jumbo tan pale neon striped
        beige maroon turquoise lavender gold silver red green blue yellow purple pink brown black white gray grey cyan teal magenta first
        second third last next asleep teenage human mini raw neat rustic unmade bronze copper wicker gourmet scenic scary retro twin minor
        major gigantic slim classic unripe rotten damp closed overcast dull woolly elaborate handsome ugly better poor rich fine silly
        triple dual main entire complete multi-colored multicolored excited loud solemn lonely solitary stray domestic exotic suburban
        private local foreign automatic manual woolen rundown dilapidated sweet spicy juicy sick nude brunette italian british french german
        indian russian canadian roman swiss dutch irish spanish egyptian arabic casual stylish naval gothic medieval victorian patriotic
        artistic panoramic distant upside-down parallel dense barren vast cramped cluttered fragile quick able handmade normal rare favorite
        important assorted miniature oversized medium transparent vibrant pastel pinkish reddish checkered spotted violet khaki scarlet
        crimson aqua indigo bored gross decadent ceramic unopened unfinished unused fourth fifth final future current early late such
        unattended handicapped handicap shorn weathered awake separate grand upscale compact sparse scattered wooded forested chilly crisp
        slippery bubbly serene crowded inverted stationary minimal basic central eastern western junior senior middle-aged feathery smiley
        googly snow-covered metropolitan alpine mixed dreary calico quaint tender complex idle amber""",
    "VV": """sit eat wear hold carry graze lean hang throw lay lie make take give get go come see prepare contain include appear seem
        perform enjoy read let speak kneel stare peek enter pass put say know want try sell swim float herd grab gather glide laugh chop
        greet relax keep bring attempt approach overlook await sniff lick chew munch write ask listen hear crouch gaze peer dig fill sing
        tell think buy send pay meet grow compete participate celebrate examine inspect observe operate wander roam forage splash hover soar
        descend depict resemble adorn surround decorate consist follow raise drag poke sip pour stir mix bake add remove extend melt skid
        rub scratch sweep shave receive deliver unload fix build create draw carve attach connect arrive depart boil dribble steer pedal
        wade trot gallop drape don shear bathe scoop guide describe love gain accept select emerge yawn beg knit sew begin browse allow
        indicate chat dine reflect portray drill march scale stay juggle jog grapple frolic sprint tackle wrestle hike crawl scream yell
        whisper clutch assemble sculpt weld shovel mow sew pluck strum recite argue discuss dodge scramble tumble flee vault recline squeeze
        inflate converse socialize cuddle snuggle huddle navigate maneuver knead""",
    "V": "threw got swung laid sat stood rode took wore flew ate drove ran swam went came saw gave wrote fell grew",
    "ys": """swing hit kick pull push cross wait walk run ride look watch stand pose play jump reach show talk pick use point cut cook race
        surf work rest drive catch lead display feature feed fall fly hide sleep move face stretch climb travel shine rise blow capture help
        turn touch brush serve balance bite slide spin flip shake hug wash hunt lounge photograph strike lift practice dive start finish
        return repair buck toss glance chase wipe grind tow bend leap cruise plow stroll sway clap shout wake cheer bounce pause squat pedal""",
    "yz": """roll smile stop drink ski skate skateboard paddle sail bat land pet sign train type light park board line cover spread plant
        wave trick stick taste kiss comb share load roast grill fry blend snowboard row fish nap pack pitch fight paint sport host place
        text shop dress trail state peel glow leave film slice mount tie groom burn bow camp drop post signal pile crowd bark wrap trim
        spray hammer sketch scrub gesture""",
    "e": """worn eaten seen taken drawn made shown held hung ridden flown thrown caught kept lit built broken bent set written torn grown
        blown frozen fallen led fed split stuck strung woven cut put done gone lost laid laden clad drunk driven sold hidden bitten
        overgrown dug shut bought""",
    "i": """building clothing ceiling railing icing frosting topping string ring wing king wedding bedding awning crossing netting seating
        flooring plumbing lining earring pudding drawing painting writing lighting serving landing dressing covering opening setting
        stuffing filling offering carving marking meeting boxing lettering""",
    "j": "rear orange square oval light giant plaid antique half adult male female",
    "S": "people men women children sheep cattle deer police geese mice feet teeth kids elk buffalo",
    "N": """stable vegetable table family belly jelly butterfly assembly bed shed sled seed speed owner cooler dryer forest locomotive
        handful material thing spring evening morning dwelling shelving ping lightning thanksgiving sting lily italy bully holly rally
        trolly weed opener moped reed cleaner baby body lady teddy sky party puppy tabby army buggy pony ivy daisy candy bunny kitty ferry
        cherry curry lobby balcony canopy husky dairy hobby family penny study copy property company fairy buddy daddy dinghy trophy gypsy
        rental lens gas canvas christmas plastic teenager stranger foreigner loner passerby passersby priest novelty plenty gravy rugby
        beauty mummy poverty dummy ceremony doggy patty potty""",
    "D": "a an the this these those some any every each no another both all either neither",
    "R": """it they them he she him himself herself itself themselves i we us you me someone somebody something anyone everyone everything
        nothing others what eachother ones anybody everybody nobody they're""",
    "#": """two three four five six seven eight nine ten eleven twelve fifteen twenty hundred thousand thirteen fourteen thirty forty fifty""",
    "I": """in on at with into onto near under underneath beneath below above behind beside between among against along alongside across
        through throughout toward towards atop via without within during until upon past for amid thru beyond except than like""",
    "A": """not away together apart outdoors indoors here now still already also ahead upright alone else how why then just even downhill
        somewhere everywhere airborne too upward uphill instead downward sideways upwards downwards maybe again ever never yet outward
        upstairs downstairs onstage n't don't doesn't didn't rather afar""",
    "Q": "very so quite almost more most well pretty super less extra somewhat otherwise",
    "u": "to", "o": "one", "t": "that", "x": "there", "h": "her", "K": "and or & but nor", "P": "his their its my your our whose",
    "W": "which who whom", "O": "of from", "b": "back side", "r": "right left",
    "L": "while as when where because if since though although whether", "H": "will would could should might must may cannot can't",
    "B": "is are was were be been being am isn't aren't", "d": "has have had having do does did", "n": "can",
    "p": "up down off out over around by about inside outside aboard", "f": "after before",
    "w": "nearby backwards backward forward overhead underwater"}
# -ing words that make a compound with the noun after them ("cutting board"), the first even where a verb may stand;
# those that describe it ("smiling people"). Then the adjectives that belong to the noun: "hot dog" is the subject.
ING_ALWAYS = set("living dining parking cutting shopping swimming baking vending roasting".split())
ING_COMPOUND = ING_ALWAYS | set("""sitting riding playing walking waiting running skiing surfing drinking cooking reading feeding batting
        bathing folding operating ironing watering hunting herding fishing gaming training racing sleeping frying mixing sewing loading""".split())
ING_STATE = set("sitting standing walking running hanging smiling moving matching oncoming flying towering".split())
FIXED = {tuple((pair + s).split('-')) for s in ('', 's') for pair in """hot-dog stainless-steel big-ben french-fries flat-screen
        double-decker wet-suit half-pipe top-hat big-rig orange-juice orange-slice orange-peel high-chair high-heel third-base wild-flower
        polar-bear close-up rear-view light-switch light-pole light-post light-bulb light-fixture light-house smart-phone""".split()}
# "a group of people" is one phrase whose subject is people; what a picture shows is a phrase and the picture is not;
# times, events, manners and abstractions cannot be pointed at either; ball sports are things only in "a soccer ball".
QUANTITY = set("""group couple pair bunch lot number herd flock row line pile stack set series variety assortment bundle collection crowd
        piece slice bit part kind type sort portion serving half dozen array pack patch amount trio team bite section selection swirl halves
        bunches batch chunk cluster gang handful hundred load mix multitude patches plenty string strip thousand ton varieties""".split())
PICTURES = set("picture photo photograph image view up close closeup close-up shot selfie snapshot portrait footage".split())
NOT_THINGS = set("""day night time morning afternoon evening dusk dawn daytime year hour season today summer winter game match matches
        competition tournament contest event practice trip process action motion speed fun love style size color colour fashion position
        height air midair flight direction order need help conversation trick stunt jump ride nap break look distance weather progress
        unison stillness contrast life midst turn serve race talk tennis golf hockey badminton skiing type kind sort work business rest wait
        haircut play volley consumption ages dozen marathon ceremony lesson performance adventure attempt autumn backhand call celebration
        daylight discussion example excitement experience feel journey moment movement noon rugby skateboarding snowboarding speech surfing
        tonight transit use variety visibility""".split())
BALL_SPORTS = set("soccer baseball football basketball volleyball softball".split())
# Words that place one thing by another: phrases only with an owner or a noun before them ("his back", "hill side");
# adverbs when bare after a preposition ("on display"); acts when taken, made or had ("taking a swing").
LOCATIONS = set("way top front side back rear middle center centre edge end bottom left right inside outside distance".split())
BARE = set("""display sale line fire place tow board bat town sunset sunrise horseback formation hand dinner bloom breakfast case christmas
        circles construction course duty foot front lines lunch pairs part play row rows service shape stock""".split())
ACTS = set("way place swing bite sip drink hit bow shot".split())
TAKING = set("take takes taking make makes making has get do does doing getting have having taken took".split())
# What most often does what a participle says: in "a man in a hat riding …" the man rides.
MOVERS = set("""man men woman women boy girl child children person people guy lady player surfer skier skateboarder dog cat bird horse cow
        sheep elephant giraffe zebra couple group team train bus truck plane boat airplane kid baby toddler batter catcher pitcher skater
        biker cyclist runner rider driver worker chef snowboarder swimmer kitten puppy bear monkey duck goat officer""".split())
PEOPLE = set("man woman boy girl child person guy lady player surfer skier skateboarder dog cat toddler batter pitcher skater rider".split())
MANY = QUANTITY | {"few", "several", "many"}                     # "a few street signs": here a plural is no verb
# "picks up a box": the particle belongs to the verb; "tries to", "starts": what follows completes it; "gives a boy a ball".
PARTICLE = re.compile(r"(?:pick|tak|took|wak|wok|hold|held|lift|put|cut|set|stick|stuck|blow|throw|fill|get|roll|fold|turn|pull|try)"
                      r"[a-z]* (?:up|off|out|down|away)$")
XCOMP = re.compile("(?:tr[yi]|want|beg[iau]|start|gett?|got|ready|about|prepar|attempt|learn|lik|lov|seem|appear|need|continu|keep|able|wait|enjoy)")
GIVES = re.compile("(?:giv|gave|show|feed|fed|hand|offer|serv|toss|throw)")
TOOLS = set("knife fork spoon racket racquet bat hand hands brush scissors chopsticks stick hose".split())
for group in QUANTITY, PICTURES, NOT_THINGS, BALL_SPORTS, LOCATIONS, ACTS, MOVERS:   # and their plurals
    group.update([word + "s" for word in group])
LEXICON = {}
for tags, words in WORDS.items():
    LEXICON.update((word, tags[0]) for word in words.split())
    for word in words.split() if tags[1:] else ():                # watch -> watches, carry -> carries, ride -> rides
        LEXICON[re.sub("(s|x|z|o|[sc]h)$", r"\1e", re.sub("(?<![aeou])y$", "ie", word)) + "s"] = tags[1]
SUFFIXES = [(re.compile(pattern), tag) for pattern, tag in (      # for other words; the first match wins
    (r"['’]s$", "m"), (r"[\d.,/:]*\d[\d.,/:]*(?:st|nd|rd|th|s)?$", "#"), (r".+(?:ing|in')$", "g"), (r".{2,}ed$", "e"),
    (r".{2,}ly$", "Q"),
    (r".*(?:[aeou]y|[ei]ty|[aeou]ry|[snlue]try|lry|ndry|phy|[lor]gy|cy|berry)$", "N"), (r".{2,}(?:y|iest|mental)$", "J"),
    (r".{2,}(?:(?<!t)ous|less|ful|ular|ial|onal|ical|[st]ive|[aeiou]ble|[wh]ern|[seoa]tic)$", "J"),
    (r".+(?:ss|us|is)$", "N"), (r".+s$", "S"), (r"[^\W_]", "N"), (r",", ","))]
DEGREES = ("(er|est)$", ""), ("(?<=e)(r|st)$", ""), (r"(.)\1(er|est)$", r"\1"), ("i(er|est)$", "y")   # bigger, tidiest


# --------------------------------------------------------------------------------------------------- tokens, tags
class Token(NamedTuple):
    """A word or mark, caption[start:end], its universal part of speech, the index of its head (-1: it is the root), the relation to it."""
    text: str
    start: int
    end: int
    tag: str
    head: int
    label: str

class Phrase(NamedTuple):
    """A base noun phrase and its subject, the head noun with its compounds; spans: (start, end) in the caption."""
    text: str
    span: tuple
    subject: str
    subject_span: tuple

class Parse(NamedTuple):
    """A caption as given, its Tokens and its Phrases, lists in the order of the caption."""
    caption: str
    tokens: list
    phrases: list


# A word with its hyphens, apostrophes and decimals, or an abbreviation with its dots; 's; any other character by itself.
# NLTK's RegexpTokenizer gives the same spans from it, in twice the time.
TOKEN = re.compile(r"[^\W_]+(?:[-'’](?!s\b)[^\W_]+|[.,:/](?=\d)\d+|\.(?<=\b(?:[Ss]t|[DdMm]r)\.)|(?<=\b[A-Za-z])\.(?:[A-Za-z]\.)+)*"
                   r"|['’]s\b|\S")

def tokenize(caption):
    """Offsets [(start, end), …] of the words and punctuation marks of a caption; [] when there are none."""
    return [m.span() for m in TOKEN.finditer(caption)]

@lru_cache(maxsize=1 << 16)
def tag_word(word):
    """The tag letter of a lower-cased word seen alone: by lexicon, last part after a hyphen, degree, then suffix."""
    if word in LEXICON:
        return LEXICON[word]
    last = word.rpartition("-")[2]
    if last != word and last.isalpha():
        tag = tag_word(last)
        return tag if tag in "Jeg" else "S" if last[-1] == "s" else "N"
    if any(LEXICON.get(re.sub(pattern, base, word)) == "J" for pattern, base in DEGREES):
        return "J"
    return next((tag for pattern, tag in SUFFIXES if pattern.match(word)), ".")


UNDECIDED = frozenset("wysziegjphotxbnrdumfVJ")
NOUNISH = frozenset("NSJjyszigeoU#VQ")      # may come next inside a noun phrase, as first tagged
OPENS = frozenset("DPhIOpTuAwkL,.KRtB")      # comes after a verb rather than after a noun's modifier

def singular(words, tags, i):
    """Whether a noun before i is one of a kind ("a man", "the skier"): a plural after it would be no noun, so it is a verb."""
    j = i - 1
    while j > 0 and (tags[j] in "NJZUQ" or tags[j] in ",K" and tags[j + 1] in "JZK") and i - j < 9:
        j -= 1
    one = words[j] in ("a", "an", "one", "another", "each", "every") and not MANY.intersection(words[j:i])
    return (one or words[j] == "the" and words[i - 1] in PEOPLE) and words[i][-1:] == "s" and (words[i - 1], words[i]) not in FIXED

def disambiguate(words, tags):
    """Decide every small tag letter, left to right, from its neighbours: lists in, a list of capitals out. Linear.

    w is the word, k its tag; p and pp the (decided) tags before it, q and q2 the (undecided) ones after it.
    """
    words, tags, pp, p, prev = words + ["", ""], tags + [".", "."], "^", "^", ""
    for i, w in enumerate(words[:-2]):
        k, after = tags[i], words[i + 1]
        if after in ("next", "close") and words[i + 2] == "to":
            tags[i + 1] = "A"
        q, q2 = tags[i + 1], tags[i + 2]
        if k in "NS":
            if (q in "DPh#" and (p in ("ST" if k == "N" else "NQ") or k == "S" and p == "K" and "V" in tags[max(0, i - 9):i])
                    or k == "S" and (p == "R" or p == "N" and singular(words, tags, i) and (
                        q in OPENS or q in "#J" or q == "g" and w[-3:] != "ers"))):
                k = tags[i] = "V"                                 # a boy pedals his bike; as she bends; a bird perches on
            elif k == "N" and p == "S" and pp in "^#" and q in "IOpA" and w not in LEXICON:
                k = tags[i] = "V"                                 # two wrestlers grapple on
            elif k == "S" and (prev in ("a", "an") and w[:-1] in MOVERS or w in ("mans", "womans", "childs")) and (q in NOUNISH or q == "b"):
                k = tags[i] = "Y"                                 # a persons back
        elif k in UNDECIDED:
            noun_next, inside = q in NOUNISH, p in "DPJZ#M"
            if (w, after) in FIXED: k = "N"
            elif k == "J":                                        # each other; on top of
                place = w in LOCATIONS and w != "next" and (p == "N" or not noun_next and q not in "rb")
                k = "N" if place else "R" if w == "other" and (prev == "each" or q == "g") else "J"
            elif k == "g" and w in ING_COMPOUND and q in "NSyjz" and after not in MOVERS and (
                    p in "DPJ#MIOUZ" or p in "^,KN" and w in ING_ALWAYS and prev not in MOVERS):
                k = "U"                                           # a cutting board
            elif k == "g":                                        # a smiling man; of running water; the landing
                state = w in ING_STATE and p in "^IOK,VG" and q != "V" or prev in ("of", "with") and q not in "VgJ"
                every = prev in ("all", "both")                   # people, all wearing hats
                k = "Z" if noun_next and (inside and not every or p == "Q" or state) else "N" if p in "DPM" and not every else "G"
            elif k == "e":                                        # a parked car; a snow covered slope; a set
                before = inside or p in "Q^IOK,VGN"
                k = "Z" if before and noun_next and q != "V" else "N" if p in "DP" and prev != "all" else "E"
            elif k == "y":                                        # to ride; people ride; a man and a woman ride
                led = p in "WRHXT" or p in "K," and pp in "VAGE"
                plural = p in "SB" and (noun_next or q in OPENS)
                many = "S" in tags[:4] or "K" in tags[max(0, i - 4):i]
                far = p in "N," and (q in "DPIOphA" or noun_next and pp == "K") and many and not (
                    set("VGEB") & set(tags[max(0, i - 6):i])) and LEXICON.get(w + "s") == "s"
                k = "V" if led or plural or far else "N"
            elif k == "j": k = "J" if noun_next and q not in "Vsg" and p != "N" or q in "K," and q2 == "J" else "N"
            # verbs, has, rides, waves, painting, up, her, to, there, one, that, right, side by side, back, can, 's
            elif k == "V": k = "N" if inside and q not in "DPh" else "V"
            elif k == "d": k = "H" if q == "B" or q == "e" and q2 not in NOUNISH else "V"
            elif k == "s": k = "S" if p in "DZ#IOM" or p in "PJU^" and q not in "DPh" else "V"
            elif k == "z":                                        # a flag waves in; street lights in
                led = p == "N" and (prev in MOVERS or q not in ".,K" and singular(words, tags, i))
                k = "V" if p == "R" or led and q in "DPIOpAuL.,KNSJ#" or p in "NQ" and q in "DP" else "S"
            elif k == "i": k = "G" if p in "SBRV" or p == "N" and (prev in MOVERS or q in "DPh") else "N"
            elif k == "p" and w == "about" and after == "to": k = "J"
            elif k == "p": k = "I" if q in "DPhRo#NSJjyszieUtb" and not (p in "VGE" and PARTICLE.match(f"{prev} {w}")) else "A"
            elif k == "w": k = "J" if noun_next and p in "DPJ" else "A"
            elif k == "f": k = "L" if after in ("he", "she", "they", "we") else "I"
            elif k == "h": k = "P" if noun_next or q in "rb" else "R"
            elif k == "u": k = "T" if q in "VB" or q + q2 in ("ND", "NP") or q == "y" and prev != "next" else "O"
            elif k == "x": k = "X" if q in "BdVHm" else "A"
            elif k == "o": k = "#" if q in "NSJjy" else "R"
            elif k == "t": k = "W" if p in "NSRJ" else "D" if q in "NSJjy" else "L"
            elif k == "r": k = "J" if noun_next or q == "b" else "N" if p in "DIOPJ" else "A"
            elif w == "side": k = "A" if p in "NS" and after == "by" else "N"
            elif k == "b" and after in MOVERS: k = "J"
            elif k == "b": k = "N" if p in "DPJIOMY" or noun_next else "A"
            elif k == "n": k = "H" if q in "VByA" and p in "NSRX" else "N"
            else: k = "M" if p in "NSR" and (noun_next and q != "g" or q in "rb") else "B"
            tags[i] = k
        pp, p, prev = p, k, w
    return tags[:-2]


# ---------------------------------------------------------------------------------------------------------- heads
# A base noun phrase over the tag letters: "red and white cups" is JkJS, "a dog's head" DNMN. k, a conjunction or comma
# between adjectives of one noun, is found first. Repetition is bounded, so the time is linear.
JOINED = re.compile(r"(?<=[JZ])(?:[,K]|,K)(?=Q?[JZ][JZ,KQ]{0,6}[JZNSU]{0,4}[NS])")
NOUN_PHRASE = re.compile(r"D{0,3}P?(?:[JZ#kUMY]|Q(?=[QJZ#NSU])|N(?=[NSZUM])|R(?=M)|S(?=[NSM])){0,40}[NS]|R")
INNER = {"D": "det", "P": "nmod:poss", "R": "nmod:poss", "Y": "nmod:poss", "J": "amod", "Z": "amod", "N": "compound", "S": "compound",
         "U": "compound", "Q": "advmod", "#": "nummod"}           # relations within a noun phrase
WAITS = {"A": "advmod", "Q": "advmod", "I": "case", "O": "case", "T": "mark", "L": "mark", "B": "aux", "H": "aux",
         "K": "cc", "k": "cc", ",": "punct", ".": "punct", "X": "expl", "M": "case"}   # of words that wait for a head

def attach(words, tags):
    """Close each base noun phrase over its modifiers, then `join` them; words: lower-cased; tags: capitals. Linear.

    Returns heads (indices, -1: the one root), Universal Dependencies relations, {first token: head} of noun phrases.
    """
    head, label, ends = [-2] * len(words), [""] * len(words), {}
    code = JOINED.sub(lambda m: "k" * len(m.group()), "".join(tags))
    for m in NOUN_PHRASE.finditer(code):
        start, last, chain, first = m.start(), m.end() - 1, [], -1
        ends[start] = owner = adjective = last
        for j in range(last - 1, start - 1, -1):
            c = code[j]
            if c == "M":                                          # 's; what stands before it belongs to the owner
                head[j], label[j] = j - 1, "case"
                head[j - 1], label[j - 1] = owner, "nmod:poss"
                owner = j - 1
            elif c == "k":                                        # red, white and blue: white and blue hang on red
                head[j], label[j] = adjective, "punct" if words[j] == "," else "cc"
                if words[j] == "," and code[j + 1] != "k" and adjective != first:
                    continue                                      # a large, brown dog: both hang on dog
                chain, first = chain * (adjective == first) + [adjective], j - 1
                for t in chain:
                    head[t], label[t] = first, "conj"
            elif not label[j]:                                    # very tall; a snow covered slope; a three story house
                inner = c == "Q" or c == "N" and code[j + 1] == "Z" or c == "#" and code[j + 1:last + 1] == "NN" and words[j] != "one"
                head[j], label[j] = j + 1 if inner else owner, INNER[c]
            adjective = j if c in "JZ" else adjective
    join(words, code, ends, head, label)
    return head, label, ends

def join(words, code, ends, head, label):
    """The second half of `attach`: hangs noun phrases, predicates and function words together in one pass.

    A word is attached to one on its left, or its head stays -2 until one on its right, or at last the root, takes it.
    """
    root = pred = verb = noun = subject = rel = cc = mark = aux = x = -1     # the latest of each; -1: none
    cases, waits, link, place = [], [], (-1, -1), ""              # adpositions for a noun; other words for a predicate
    while x + 1 < len(words):
        x, start = x + 1, x + 1
        k, be, h, relation = code[x], aux >= 0 and code[aux] == "B", -2, ""
        if x in ends or k in "DPR#NSU" or k == "W" and noun < 0 or k in "JZ" and cases and aux < 0:
            x, k = ends.get(x, x), "n"                            # a noun phrase, or a word used as one ("in red")
        particle = k == "A" and verb >= 0 and PARTICLE.match(f"{words[verb]} {words[x]}")
        if k == "A" and code[x + 1:x + 2] == "O" and not particle or k == "B" and code[x - 1:x] == "X":
            k = k.lower()                                         # next to, there is: predicates
        if k in WAITS:
            label[x] = WAITS[k]
            if particle:
                head[x], label[x] = verb, "compound:prt"
            elif k in "AQ" and verb > noun:
                head[x] = verb
            elif k not in "Kk,.M":
                (cases if k in "IO" else waits).append(x)
            cc = x if k in "Kk," else cc
            aux = x if k in "HB" else aux
            mark = x if k in "TL" and mark < 0 else mark
            continue
        if k == "W":                                              # who: hangs on its noun until a verb comes
            person = words[x] == "who" and words[noun] not in MOVERS and head[noun] >= 0 and words[head[noun]] in MOVERS
            rel, h, relation = x if subject < 0 else rel, head[noun] if person else noun, "nsubj"
        elif k == "n" and not be:                                 # ---- a noun phrase that is no predicate
            if cases:
                place = words[cases[0]]
                near = noun > verb and (verb < 0 or noun == subject or place == "of" or words[x] in ("it", "them", "him")
                                        or place == "with" and words[x] not in TOOLS)
                h, relation = (noun, "nmod") if near else (verb, "obl")
                if near and place != "of" and label[noun] == "nmod" and words[head[noun]] in QUANTITY:
                    h = head[noun]                                # a slice of pizza | on a plate
            elif cc >= 0 and words[cc] == "," and root < 0 <= verb:          # while he rides, a dog | runs
                root, head[cc] = x, verb
            elif cc >= 0 and noun >= 0:
                h, relation, head[cc], link = head[noun] if label[noun] == "conj" else noun, "conj", x, (x, cc)
            elif subject < 0 and (rel >= 0 or mark >= 0):
                subject = x                                       # waits for its verb: "as an airplane flies by"
            elif verb > noun:
                h, relation = verb, "nsubj" if code[verb] == "B" else "obj"
            elif root < 0:
                root = x
            elif start == noun + 1 and label[noun] == "obj" and GIVES.match(words[verb]):
                h, relation, label[noun] = verb, "obj", "iobj"
            elif start == noun + 1 and code[start] in "DP":       # the toy the baby | holds
                h, relation, rel, subject = noun, "parataxis", x, x
            else:
                h, relation = root, "parataxis"
            for t in cases:
                head[t] = x
            noun, cases, cc = x, [], -1
        else:                                                     # ---- a predicate
            nsubj, finite = "nsubj:pass" if k == "E" and aux >= 0 else "nsubj", k in "Vb" or aux >= 0
            for t in cases + waits:
                head[t] = x
                label[t] = "mark" if t in cases and k in "VG" and aux < 0 else label[t]    # for cutting
            if be and k not in "VG":
                label[aux] = "aux:pass" if k == "E" else "cop"
            if rel >= 0 and code[rel] != "W" and not finite:
                rel, subject = -1, -1
            if rel >= 0:                                          # a man who rides; a horse that a man rides
                h, relation, head[rel], label[rel] = head[rel], "acl:relcl", x, nsubj if subject < 0 else "obj"
            elif mark >= 0:                                       # while grazing; ready to go; a man to watch
                h, relation = root, "advcl"
                if code[mark] == "T" and subject < 0:
                    owns = verb < 0 or noun > verb and (words[verb] in ("has", "have", "having") or code[verb] == "B")
                    h, relation = (noun, "acl") if owns else (verb, "xcomp" if verb > noun and XCOMP.match(words[verb]) else "advcl")
                elif words[mark] == "that" and mark == verb + 1:
                    h, relation = verb, "ccomp"
            elif cc >= 0 and verb >= 0:                           # sits and watches
                h, relation, head[cc] = head[verb] if label[verb] == "conj" else verb, "conj", x
            elif finite and pred < 0:                             # a man | sits
                subject, root, pred = root, x, x
            elif finite:                                          # a man sits and a dog | stands
                h, relation = pred, "parataxis"
                subject = noun if noun > verb and label[noun] in ("conj", "parataxis") else subject
                if noun == link[0]:
                    relation, head[link[1]] = "conj", x
            elif root < 0:
                root = x
            elif noun > verb:                                     # a man in a hat | riding; holding a bat | standing
                own = k != "G" or words[noun] in MOVERS or label[noun] == "nsubj" or verb < 0 and (
                    place == "with" or words[root] not in MOVERS)
                h = noun if own else max(verb, root)
                relation = {"J": "amod", "a": "advmod"}.get(k, "advcl" if h == verb else "acl")
            else:
                h, relation = max(verb, root), "advmod" if k == "a" else "xcomp" if k != "G" or XCOMP.match(words[verb]) else "advcl"
            if subject >= 0:
                head[subject], label[subject] = x, nsubj
            noun, verb = (x, verb) if k == "n" else (noun, x)
            cases, waits, aux, rel, cc, mark, subject = [], [], -1, -1, -1, -1, -1
        head[x], label[x] = -2 if h < 0 else h, relation
    if root < 0:                                                  # no clause, no bare noun phrase: the first waiting
        root = next((t for t, h in enumerate(head) if h == -2 and code[t] not in WAITS), 0)
    for t, h in enumerate(head):
        if h == -2:
            comma = code[t:t + 2] == ",K" and head[t + 1] >= 0     # ", and": both hang on what follows
            head[t], label[t] = head[t + 1] if comma else root, label[t] or "dep"
    head[root], label[root] = -1, "root"


# ------------------------------------------------------------------------------------- phrases, subjects, composites
def read_phrases(caption, spans, words, tags, label, ends):
    """The `Phrase`s of a tree: its base noun phrases (`ends`, see `attach`) that name something one can point at.

    The subject is the noun with its compounds; "of" after a word of QUANTITY joins two noun phrases into one phrase.
    """
    phrases, begin, words = [], -1, words + ["", ""]              # words[-1] stands before the first
    for start, h in ends.items():
        w, before, after, s = words[h], words[start - 1], words[h + 1], h
        while s > start and label[s - 1] == "compound":
            s -= 1
        first, begin = begin if begin >= 0 and before == "of" else start, -1
        if after == "of" and (w in QUANTITY or w == "body" and "water" in words[h + 2:h + 5]):
            begin = first
            continue
        picture = w in PICTURES and (before in TAKING or after not in ("on", "hanging", "hung", "above"))
        owned, quoted = {"P", "M", "Y"} & set(tags[start:h]), before in ("says", "saying") and tags[start] != "D"
        manner = h == start and tags[start - 1] == "B" and after in ("skating", "boarding", "surfing", "skiing", "sailing")
        if (tags[h] == "R" or picture or quoted or manner or w in NOT_THINGS or w == "corner" and after == "of" or w in ACTS and before in TAKING
                or w in LOCATIONS and s == h and not owned
                or h == start and (w in BALL_SPORTS or w in BARE and LEXICON.get(before) in ("I", "O"))
                or before == "in" and w in ("row", "line", "circle", "group", "pile")):
            continue
        a, b, s = spans[first + (words[first] == "whose")][0], spans[h][1], spans[s][0]
        phrases.append(Phrase(caption[a:b], (a, b), caption[s:b], (s, b)))
    return phrases

def parse(caption):
    """The `Parse` of a caption, whatever string it is; "" has no tokens and no phrases. Linear in its length."""
    spans = tokenize(caption)
    if not spans:
        return Parse(caption, [], [])
    texts = [caption[a:b] for a, b in spans]
    words = [text.lower() for text in texts]
    tags = disambiguate(words, [tag_word(word) for word in words])
    head, label, ends = attach(words, tags)
    tokens = list(map(Token, texts, *zip(*spans), [UPOS[t] for t in tags], head, label))
    return Parse(caption, tokens, read_phrases(caption, spans, words, tags, label, ends))

def compose(a, b):
    """The text of the composite of two phrases."""
    return f"{a.text} and {b.text}"

def composites(phrases, reach=8):
    """Pairs of phrases of different text, in caption order; none more than `reach` phrases apart, so linear."""
    return [(a, b) for i, a in enumerate(phrases) for b in phrases[i + 1:i + 1 + reach]
            if a.text.lower() != b.text.lower()]

def graph(parsed):
    """The tree as an nltk.parse.DependencyGraph, to draw or convert: nodes 1 … n in caption order, 0 its TOP."""
    from nltk.parse import DependencyGraph                        # here, for it takes a second to import
    rows = [f"{t.text}\t{t.tag}\t{t.head + 1}\t{t.label}" for t in parsed.tokens]
    return DependencyGraph("\n".join(rows), cell_separator="\t", top_relation_label="root")

def to_json(parsed):
    """The hierarchy as dictionaries and lists: caption, phrases with spans and subjects, texts of the composites."""
    return {"caption": parsed.caption, "phrases": [p._asdict() for p in parsed.phrases],
            "composites": [compose(a, b) for a, b in composites(parsed.phrases)]}

def show(parsed):
    """As text: a line a word (number, word, tag, relation, head), then phrases with their subjects, and composites."""
    heads = [f"{i} {t.text}" for i, t in enumerate(parsed.tokens, 1)] + ["root"]           # head -1 is the last of these
    lines = [parsed.caption, *(f"{i:>4} {t.text:<16} {t.tag:<6} {t.label:<11} <- {heads[t.head]}" for i, t in enumerate(parsed.tokens, 1))]
    lines += [f"  phrase     {p.text}  (subject: {p.subject})" for p in parsed.phrases]
    lines += [f"  composite  {compose(a, b)}" for a, b in composites(parsed.phrases)]
    return "\n".join(lines) + "\n"

def draw(parsed):
    """The tree as a picture in text, a line a word: what stands before its head is drawn above it, the rest below."""
    hanging, lines = [[] for _ in parsed.tokens] + [[]], [parsed.caption]
    for i, t in enumerate(parsed.tokens):
        hanging[t.head].append(i)                                 # the root's head is -1, the last of these
    stack = [(i, "", "", "") for i in hanging[-1]]                # a word, and the branches above, at and below its line
    while stack:
        i, above, line, below = stack.pop()
        if i < 0:
            lines.append(line)
            continue
        t, left, right = parsed.tokens[i], [c for c in hanging[i] if c < i], [c for c in hanging[i] if c > i]
        rows = [(c, above + ("│  " if n else "   "), above + ("├─ " if n else "┌─ "), above + "│  ") for n, c in enumerate(left)]
        rows += [(-1, "", f"{line + t.text:<34} {t.tag:<6}{t.label}", "")]
        rows += [(c, below + "│  ", below + "├─ ", below + "│  ") for c in right[:-1]]
        rows += [(c, below + "│  ", below + "└─ ", below + "   ") for c in right[-1:]]
        stack += reversed(rows)
    return "\n".join(lines) + "\n"

# ------------------------------------------------------------------------------- files, and how good and how fast
def read_captions(path):
    """The captions of COCO's annotations (.json), of records (.jsonl) or of a text, one a line; "-": standard input."""
    with open(0 if path == "-" else path, encoding="utf-8", errors="replace") as file:
        try:
            if str(path).endswith(".json"):
                yield from (a["caption"] for a in json.load(file)["annotations"])
            for line in file:
                row = json.loads(line) if str(path).endswith(".jsonl") else {"caption": line.rstrip("\r\n")}
                yield from row["captions"] if "captions" in row else [row["caption"]]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: .json must be COCO's captions, .jsonl records with a caption or captions ({e!r})")

def locate(caption, answer):
    """The `Phrase`s that [{"text": …, "subject": …}, …] names, where the caption has them; ValueError if it has not."""
    found = []
    for row in answer:
        if not (isinstance(row, dict) and all(isinstance(row.get(k), str) and row[k].strip() for k in ("text", "subject"))):
            raise ValueError(f"{row!r} is not a text and its subject")
        (a, b), (s, e) = row.get("span", (0, 0)), row.get("subject_span", (0, 0))
        if caption[a:b] == row["text"] and caption[s:e] == row["subject"] and (found[-1].span[1] if found else 0) <= a <= s < e <= b:
            found.append(Phrase(row["text"], (a, b), row["subject"], (s, e)))              # as to_json wrote it
            continue
        text, subject = (r"(?<!\w)" + r"\s+".join(map(re.escape, row[k].split())) + r"(?!\w)" for k in ("text", "subject"))
        free = (m for m in re.finditer(text, caption, re.I) if all(m.end() <= p.span[0] or p.span[1] <= m.start() for p in found))
        m = next(free, None)
        inner = [n.span() for n in re.finditer(subject, m.group(), re.I)] if m else []
        if not inner:
            raise ValueError(f"{row['text']!r} with the subject {row['subject']!r} is not in {caption!r}")
        s, e = inner[-1]
        found.append(Phrase(m.group(), m.span(), m.group()[s:e], (m.start() + s, m.start() + e)))
    return sorted(found, key=lambda p: p.span)

def read_parses(path):
    """{caption: [`Phrase`, …]} of a file of parses, a JSON object a line as --json writes it; ValueError names a bad line."""
    parses = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                parses[row["caption"]] = locate(row["caption"], row["phrases"])
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f'{path}:{number}: a line is {{"caption": …, "phrases": [{{"text": …, "subject": …}}, …]}} ({e})')
    return parses

def score(gold, parses):
    """Text: precision, recall and F1 of parses against gold, both {caption: [`Phrase`, …]}, then each caption's errors.

    Small letters, no first article, multisets; a caption is right when its subjects are the gold's, in order.
    """
    text, subject = lambda p: re.sub(r"^(an?|the) ", "", " ".join(p.text.lower().split())), lambda p: p.subject.lower()
    both = [(c, gold[c], parses.get(c, [])) for c in gold]
    right = sum(list(map(subject, g)) == list(map(subject, p)) for _, g, p in both)
    lines = [f"{'':10}{'precision':>10}{'recall':>10}{'F1':>10}"]
    for name, view in ("phrases", text), ("subjects", subject), ("heads", lambda p: subject(p).split()[-1]):
        hit = sum((Counter(map(view, g)) & Counter(map(view, p))).total() for _, g, p in both)
        found, wanted = sum(len(p) for _, _, p in both), sum(len(g) for _, g, _ in both)
        lines.append(f"{name:10}{hit / max(1, found):10.4f}{hit / max(1, wanted):10.4f}{2 * hit / max(1, found + wanted):10.4f}")
    lines.append(f"captions right: {right} of {len(gold)}, {right / max(1, len(gold)):.4f}; without a parse: {len(gold.keys() - parses.keys())}")
    for c, *sides in both:
        g, p = (Counter(f"{text(x)}  (subject: {subject(x)})" for x in phrases) for phrases in sides)
        lines += [f"\n{c}"] * (g != p) + [f"  missed {x}" for x in (g - p).elements()] + [f"  wrong  {x}" for x in (p - g).elements()]
    return "\n".join(lines)

def bench(captions):
    """Text: captions a second on one core of `parse`, and of NLTK's RegexpParser on the first 2,000 of the same captions.

    That recipe's usual tagger is a trained one that must be downloaded; here NLTK looks tags up in the lexicon, which is faster.
    """
    from nltk import RegexpParser, RegexpTagger, TreebankWordTokenizer, UnigramTagger
    tagger = UnigramTagger(model={w: UPOS.get(t, "VERB") for w, t in LEXICON.items()},
                           backoff=RegexpTagger([(r".*(ing|ed)$", "VERB"), (r"^\W+$", "PUNCT"), (r".*", "NOUN")]))
    tokens, chunker, lines = TreebankWordTokenizer(), RegexpParser("NP: {<DET>?<NUM|ADJ>*<NOUN>+}"), []
    chunk = lambda caption: caption.strip() and chunker.parse(tagger.tag(tokens.tokenize(caption.lower())))
    for name, function, some in ("parse.py", parse, captions), ("parse.py", parse, captions[:2000]), ("NLTK RegexpParser", chunk, captions[:2000]):
        began = time.perf_counter()
        for caption in some:
            function(caption)
        seconds = time.perf_counter() - began
        lines.append(f"{name:18}{len(some):>9,} captions in {seconds:7.2f} s{len(some) / seconds:>10,.0f} captions/s")
    return "\n".join(lines)

# ----------------------------------------------------------------------------------------- a language model's parses
PROMPT = """List the noun phrases of an image caption that name something visible: people, animals, objects, materials, places.
A phrase is copied from the caption: article, number, adjectives and nouns up to its head noun, and no "of", "with" or "that" after it.
Its subject is the head noun with the nouns compounded to it. "a group of people" is one phrase and its subject is people.
Leave out pronouns, times, events, activities and words such as top or front that only relate two things.
Answer with a JSON list alone, in the order of the caption.

Caption: "A group of people riding two brown horses next to a fire hydrant at sunset."
[{"text": "A group of people", "subject": "people"}, {"text": "two brown horses", "subject": "horses"}, {"text": "a fire hydrant", "subject": "fire hydrant"}]

Caption: """

def ask(url, model, caption, seconds):
    """The answer to PROMPT of the server at url, or None after four tries; ValueError where more of them are of no use."""
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": PROMPT + json.dumps(caption, ensure_ascii=False)}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    for wait in (1, 2, 4, 0):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:   # no answer, or half of one
            reason = getattr(e, "reason", None)
            absent = not wait and isinstance(reason, (ConnectionRefusedError, socket.gaierror))
            if absent or 400 <= getattr(e, "code", 0) < 500 and e.code not in (408, 429):
                raise ValueError(f"{url} as {model}: {e}; answers so far are kept: the same command goes on from there")
        time.sleep(wait)

def parse_by_llm(captions, url, model, name, workers=16, seconds=60):
    """Yields, in order, the hierarchy of each caption as `to_json` has it, "by" the "llm", or by the "rules" if its answer will not do.

    Answers are kept as they come in NAME.HASH.answers.jsonl in the working folder, and none of them is asked for twice.
    """
    url = url.rstrip("/")
    url += "" if url.endswith("/chat/completions") else "/chat/completions" if url.endswith("/v1") else "/v1/chat/completions"
    kept, answers = Path(f"{Path(name).stem}.{zlib.crc32((model + PROMPT).encode()):08x}.answers.jsonl"), {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else ():
        try:
            answers.update([json.loads(line)])
        except (ValueError, TypeError):                           # cut short when the run was killed
            continue
    todo, count = [c for c in dict.fromkeys(captions) if c.strip() and c not in answers], Counter()
    with open(kept, "a", encoding="utf-8") as log, ThreadPool(workers) as pool:
        replies = pool.imap_unordered(lambda caption: (caption, ask(url, model, caption, seconds)), todo)
        for caption, answer in tqdm(replies, f"asking {model}", len(todo), unit="caption"):
            if answer is not None:
                answers[caption] = answer
                log.write(f"\n{json.dumps([caption, answer])}")   # a new line first: the last one may have been cut short
                log.flush()
    for caption in captions:
        answer = answers.get(caption)
        try:
            phrases, by = locate(caption, json.loads(answer[answer.index("["):answer.rindex("]") + 1])) if answer else None, "llm"
        except (ValueError, TypeError, RecursionError):
            phrases = None
        if phrases is None:
            phrases, by = parse(caption).phrases, "rules"
        count["llm" if by == "llm" else "rejected" if answer else "unanswered"] += 1
        yield {**to_json(Parse(caption, [], phrases)), "by": by}
    sys.stderr.write(f"{len(captions)} captions: {count['llm']} parsed by {model}; by the rules {count['rejected']} whose answer was rejected "
                     f"and {count['unanswered']} without one. Answers are kept in {kept}\n")

def main():
    """The command line; returns the exit status."""
    options = argparse.ArgumentParser(description="Parse captions into trees, phrases, subjects and composites.")
    options.add_argument("captions", nargs="*", metavar="CAPTION", help="a caption to parse (with --llm: a file of captions)")
    for name, kind, text in (("--file", "FILE", "parse each line of FILE (or COCO's .json, or .jsonl records); - is standard input"),
                             ("--score", "GOLD.jsonl", "rate the rules, or --parses, against annotated captions"),
                             ("--parses", "FILE.jsonl", "with --score: rate these parses"),
                             ("--bench", "FILE", "time the parser on the captions of FILE, beside NLTK's RegexpParser"),
                             ("--llm", "URL", "ask an OpenAI-compatible server, such as http://localhost:8000/v1"),
                             ("--model", "NAME", "with --llm: the model to ask for")):
        options.add_argument(name, metavar=kind, help=text)
    options.add_argument("--workers", type=int, default=16, metavar="N", help="with --llm: questions at a time [16]")
    options.add_argument("--timeout", type=float, default=60, metavar="S", help="with --llm: seconds to wait for an answer [60]")
    options.add_argument("--json", action="store_true", help="print one JSON object a caption instead of text")
    options.add_argument("--draw", action="store_true", help="draw the trees in text")
    args = options.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        file = args.captions.pop(0) if args.llm and args.captions else args.file
        if args.score:
            gold = read_parses(args.score)
            print(score(gold, read_parses(args.parses) if args.parses else {c: parse(c).phrases for c in gold}))
        elif args.bench:
            print(bench(list(read_captions(args.bench))))
        elif args.llm:
            if not args.model or not file or args.workers < 1 or not args.llm.startswith("http"):
                raise ValueError("it is --llm http://… --model NAME FILE, with one worker or more")
            for row in parse_by_llm(list(read_captions(file)), args.llm, args.model, file, args.workers, args.timeout):
                print(json.dumps(row, ensure_ascii=False))
        elif not args.captions and file is None:
            raise ValueError("nothing to parse: give a caption in quotes, or --file FILE (- is standard input)")
        else:
            text = (lambda parsed: json.dumps(to_json(parsed), ensure_ascii=False)) if args.json else draw if args.draw else show
            for name in args.captions:
                if " " not in name and "." in name and os.path.isfile(name):
                    raise ValueError(f"{name} is a file: --file {name} parses each of its lines")
            for caption in chain(args.captions, read_captions(file) if file else ()):
                print(text(parse(caption)))
        sys.stdout.flush()
    except BrokenPipeError:                                       # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("parse.py: stopped\n")
        return 130
    except (OSError, ValueError) as e:
        sys.stderr.write("parse.py: " + (f"cannot read {e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
