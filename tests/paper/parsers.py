"""What the rules of parse.py are worth: captions a second and F1, beside NLTK's recipe and spaCy.

    python -m tests.paper.parsers captions.txt [--gold tests/coco_heldout.jsonl]

NLTK's recipe is a grammar of tags, a RegexpParser. Its usual tagger is a trained one that must be
downloaded; here it looks tags up in parse.py's lexicon, which is faster. spaCy is en_core_web_sm
with noun_chunks, where it is installed. One core; both on the first 2,000 captions.
"""

import argparse
import sys
import time

from nltk import RegexpParser, RegexpTagger, TreebankWordTokenizer, UnigramTagger

import parse as rules

FIRST = 2000  # captions for the slow ones
# the usual part of speech of parse.py's undecided classes
USUAL = {rules.ORANGE: "ADJ", rules.LIGHTS: "NOUN", rules.PAINTING: "NOUN", rules.UP: "ADP"}


def nltk_parser():
    """A function from a caption to its `Phrase`s, by a tagger and a grammar of NLTK."""
    upos = USUAL | {tag: name for name, tags in rules.UPOS.items() for tag in tags}
    model = {word: upos.get(tag, "VERB") for word, tag in rules.LEXICON.items()}
    endings = [(r".*(ing|ed)$", "VERB"), (r"^\W+$", "PUNCT"), (r".*", "NOUN")]
    tagger = UnigramTagger(model=model, backoff=RegexpTagger(endings))
    chunker = RegexpParser("NP: {<DET>?<NUM|ADJ>*<NOUN>+}")
    tokenizer = TreebankWordTokenizer()

    def run(caption):
        if not caption.strip():
            return []
        tree = chunker.parse(tagger.tag(tokenizer.tokenize(caption.lower())))
        rows = []
        for chunk in tree.subtrees(lambda part: part.label() == "NP"):
            nouns = [word for word, tag in chunk if tag == "NOUN"]
            rows.append((" ".join(word for word, _ in chunk), " ".join(nouns)))
        return phrases(rows)

    return run


def spacy_parser():
    """A function from a caption to its `Phrase`s, by spaCy's noun_chunks; ImportError, OSError."""
    import spacy  # not in requirements.txt: a table's other column

    nlp = spacy.load("en_core_web_sm")

    def run(caption):
        rows = []
        for chunk in nlp(caption).noun_chunks:
            first = chunk.root.i
            while first > chunk.start and chunk.doc[first - 1].dep_ == "compound":
                first -= 1
            if chunk.root.pos_ != "PRON":
                rows.append((chunk.text, chunk.doc[first : chunk.root.i + 1].text))
        return phrases(rows)

    return run


def phrases(rows):
    """`Phrase`s of texts and subjects; a score asks for no spans."""
    return [rules.Phrase(text, (0, 0), subject, (0, 0)) for text, subject in rows]


def rules_phrases(caption):
    return rules.parse(caption).phrases


def report(name, parser, captions, gold=None):
    """Prints how fast a parser is on captions, and its scores on gold where there is some."""
    began = time.perf_counter()
    for caption in captions:
        parser(caption)
    seconds, count = time.perf_counter() - began, len(captions)
    print(f"{name:20}{count:>9,} captions in {seconds:7.2f} s{count / seconds:>10,.0f} captions/s")
    if gold:
        found = {caption: parser(caption) for caption in gold}
        print("\n".join(rules.score(gold, found).splitlines()[:5]) + "\n")


def main():
    """The command line; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("captions", help="a text, COCO's .json or .jsonl records")
    options.add_argument("--gold", help="annotated captions (.jsonl): scores, too")
    args = options.parse_args()
    try:
        captions = list(rules.read_captions(args.captions))
        gold = rules.read_parses(args.gold) if args.gold else {}
    except (OSError, ValueError) as error:
        print(f"parsers.py: {error}", file=sys.stderr)
        return 2
    report("parse.py", rules_phrases, captions, gold)
    report("parse.py", rules_phrases, captions[:FIRST])
    report("NLTK RegexpParser", nltk_parser(), captions[:FIRST], gold)
    try:
        report("spaCy en_core_web_sm", spacy_parser(), captions[:FIRST], gold)
    except (ImportError, OSError):
        print("spaCy is not here: pip install spacy, python -m spacy download en_core_web_sm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
