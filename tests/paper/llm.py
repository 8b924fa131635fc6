"""A language model's parses, the paper's own way, for `hist.py --parses` and `parse.py --score`.

    python -m tests.paper.llm http://localhost:8000/v1 --model vicuna captions.txt > parses.jsonl

Any OpenAI-compatible server will do (vLLM, llama.cpp, Ollama); a key is read from OPENAI_API_KEY.
Answers are kept in the working folder as they come, and the same command goes on from them. An
answer that is not made of the caption's own words is rejected, and the rules parse that caption.
"""

import argparse
import http.client
import json
import os
import socket
import sys
import time
import urllib.request
import zlib
from collections import Counter
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from parse import Parse, locate, parse, read_captions, to_json

PROMPT = """\
List the noun phrases of an image caption that name something visible: people, animals, objects, \
materials, places.
A phrase is copied from the caption: article, number, adjectives and nouns up to its head noun, \
and no "of", "with" or "that" after it.
Its subject is the head noun with the nouns compounded to it. "a group of people" is one phrase \
and its subject is people.
Leave out pronouns, times, events, activities and words such as top or front that only relate two \
things.
Answer with a JSON list alone, in the order of the caption.

Caption: "A group of people riding two brown horses next to a fire hydrant at sunset."
[{"text": "A group of people", "subject": "people"}, \
{"text": "two brown horses", "subject": "horses"}, \
{"text": "a fire hydrant", "subject": "fire hydrant"}]

Caption: """
WAITS = (1, 2, 4, 0)  # seconds after each try
BUSY = (408, 429)  # HTTP errors of a request that may be made again: time-out, too many


def address(url):
    """The URL of the chat completions of a server, of which the beginning will do."""
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"


def is_final(error, last):
    """Whether an error will not go away: a bad request, or at the last try no server at all."""
    code = getattr(error, "code", 0)
    if 400 <= code < 500 and code not in BUSY:
        return True
    absent = (ConnectionRefusedError, socket.gaierror)
    return last and isinstance(getattr(error, "reason", None), absent)


def ask(url, model, caption, seconds):
    """The answer to PROMPT, or None after four tries; ValueError where more are of no use."""
    question = PROMPT + json.dumps(caption, ensure_ascii=False)
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"model": model, "temperature": 0, "messages": messages}).encode()
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    for wait in WAITS:
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            if is_final(error, last=not wait):
                kept = "answers so far are kept: the same command goes on from there"
                raise ValueError(f"{url} as {model}: {error}; {kept}") from error
        time.sleep(wait)
    return None


def collect(captions, url, model, path, workers, seconds):
    """{caption: answer}, those of the file at path and new ones, which are added to it."""
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):  # cut short when the run was killed
            answers.update([json.loads(line)])
    todo = [c for c in dict.fromkeys(captions) if c.strip() and c not in answers]

    def reply(caption):
        return caption, ask(url, model, caption, seconds)

    with open(path, "a", encoding="utf-8") as log, ThreadPool(workers) as pool:
        replies = pool.imap_unordered(reply, todo)
        for caption, answer in tqdm(replies, f"asking {model}", len(todo), unit="caption"):
            if answer is not None:
                answers[caption] = answer
                # a new line first: the last one may have been cut short
                log.write(f"\n{json.dumps([caption, answer])}")
                log.flush()
    return answers


def parse_by_llm(captions, url, model, name, workers=16, seconds=60):
    """Yields, in order, each caption's hierarchy as `to_json` has it, "by" the "llm" or "rules".
    Answers are kept in NAME.HASH.answers.jsonl in the working folder; none is asked for twice."""
    known = zlib.crc32((model + PROMPT).encode())
    path = Path(f"{Path(name).stem}.{known:08x}.answers.jsonl")
    answers, count = collect(captions, address(url), model, path, workers, seconds), Counter()
    for caption in captions:
        answer = answers.get(caption, "")
        try:
            listed = json.loads(answer[answer.index("[") : answer.rindex("]") + 1])
            phrases, by = locate(caption, listed), "llm"
        except (ValueError, TypeError, RecursionError):  # no list of the caption's own phrases
            count["rejected" if answer else "unanswered"] += 1
            phrases, by = parse(caption).phrases, "rules"
        yield {**to_json(Parse(caption, [], phrases)), "by": by}
    parsed = f"{len(captions)} captions: {len(captions) - count.total()} parsed by {model}"
    why = f"{count['rejected']} whose answer was rejected and {count['unanswered']} without one"
    print(f"{parsed}; by the rules {why}. Answers: {path}", file=sys.stderr)


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of an OpenAI-compatible server: http://localhost:8000/v1")
    parser.add_argument("file", help="captions: a text, COCO's .json or .jsonl records")
    parser.add_argument("--model", required=True, help="the model to ask for")
    parser.add_argument("--workers", type=int, default=16, help="questions at a time [16]")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for an answer [60]")
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        if args.workers < 1 or not args.url.startswith("http"):
            raise ValueError("it is http://… --model NAME FILE, with one worker or more")
        captions = list(read_captions(args.file))
        rows = parse_by_llm(captions, args.url, args.model, args.file, args.workers, args.timeout)
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("llm.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"llm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
