"""HIST in one file: train a vision-language model that can point at what a phrase names.

A minimal implementation of "Barking Up The Syntactic Tree: Enhancing VLM Training with Syntactic
Losses" (arXiv 2412.08110) on a small ALBEF (arXiv 2107.07651) or BLIP (arXiv 2201.12086). parse.py
cuts each caption into phrases, their subjects and composites of two phrases; here they become
losses. No boxes are used in training.

    python hist.py                                        drawn scenes: no download, no GPU
    python hist.py --data coco --root PATH_TO_COCO        COCO 2017
    python hist.py --data my.jsonl                        your own images and captions
    torchrun --nproc_per_node=4 hist.py --data coco …     four GPUs
    python hist.py --ground PICTURE "a red circle" "a blue star"

The chapter: options, tokenizer, batches, model, Grad-CAM, losses, training. What follows is to be
looked up: measures, pictures, scenes, COCO and JSONL, main.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import signal
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import timm
import timm.data
import torch
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the importer
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

import parse

RANK = int(os.environ.get("RANK", 0))  # this process, and of how many: torchrun sets them
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line, status 2, no traceback."""


def insist(good, why):
    if not good:
        raise UserError(why)


# ------------------------------------------------------------------------------------ options
def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """The command line, a field an option. The defaults suit the scenes; see `presets`."""

    data: str = option("scenes", "scenes, coco, or a file of records: FILE.jsonl")
    root: str = option("data/coco", "--data coco: its folder, laid out as it is published")
    out: str = option("out/scenes", "folder for all that a run writes; an older run's files go")
    parses: str = option("", "parses to train on; parse.py's for the rest (see tests/paper/llm.py)")
    base: str = option("albef", "the model: albef, or blip (causal LM in place of MLM)")
    levels: str = option("caption,phrase,subject,composition", "levels that HIST trains with")
    vit_steps: int = option(300, "--data scenes: steps in which the ViT learns to name shapes")
    base_steps: int = option(400, "steps with captions alone, from which every training goes on")
    steps: int = option(500, "optimiser steps of each training; 0: ten epochs")
    batch_size: int = option(64, "images a step, over all GPUs")
    accumulate: int = option(1, "parts of a step, to need less memory; ITC contrasts within one")
    lr: float = option(2e-3, "peak learning rate")
    composition_weight: float = option(1.0, "lambda, the weight of the composition loss")
    composition_start: float = option(0.8, "share of all steps after which composition begins")
    vit: str = option("scenes", "any timm ViT; scenes: our own, a layer on a convolutional stem")
    pretrained: bool = option(False, "start --vit from timm's pretrained weights")
    init: str = option("", "checkpoint to start from: its weights, words, and options of its model")
    image_size: int = option(60, "side of the square image, pixels")
    width: int = option(64, "width of the text and fusion layers")
    text_layers: int = option(2, "layers of the text encoder")
    fusion_layers: int = option(1, "layers in which text attends to the image")
    cam_layer: int = option(0, "fusion layer that Grad-CAM reads, 0 the first")
    vocab_size: int = option(10_000, "words kept, most frequent first; the rest are [UNK]")
    eval_images: int = option(500, "held-out images to evaluate on, a split; 0: all, of scenes 500")
    save_every: int = option(200, "steps between checkpoints")
    workers: int = option(0, "processes that load images")
    max_bad: float = option(0.2, "share of the images that may be unusable")
    seed: int = option(0, "seed of weights, scenes, order and masks")
    device: str = option("auto", "auto, cpu, cuda or mps")
    resume: bool = option(False, "go on from the last checkpoint in --out, with its options")
    eval_only: bool = option(False, "evaluate the checkpoints in --out, no training")
    ground: list = option(None, "draw where the model in --out looks: PICTURE PHRASE [PHRASE …]")


PHOTOGRAPHS = dict(base_steps=0, steps=0, lr=3e-4, workers=min(8, os.cpu_count()))
GPU = dict(vit="vit_small_patch16_224", image_size=224, width=384, text_layers=4, fusion_layers=4)
CPU = dict(vit="vit_tiny_patch16_224", image_size=160, width=192, text_layers=2, fusion_layers=2)


def presets(typed):
    """What was typed ({option: value}), with defaults for data other than the scenes, and for BLIP,
    whose text layers all fuse."""
    data, base = typed.get("data", Options.data), typed.get("base", Options.base)
    preset = {"text_layers": Options.text_layers, "fusion_layers": Options.fusion_layers}
    preset["out"] = f"out/{Path(data).stem}"
    if data != "scenes":
        preset |= PHOTOGRAPHS | (GPU if torch.cuda.is_available() else CPU)
    if base == "blip":
        preset["fusion_layers"] += preset["text_layers"]
        preset |= {"text_layers": 0, "out": preset["out"] + "-blip"}
    preset |= typed
    return {"cam_layer": (preset["fusion_layers"] - 1) // 2} | preset  # as ALBEF: the third of six


# ---------------------------------------------------------------------------------- tokenizer
MAX_TOKENS = 64
MASKED_SHARE = 0.3  # of a text's words; BERT masks 0.15, but phrases are short
LONGEST_WORD = 100  # letters: BERT does not look for pieces of a longer one


def pad(rows, value=0):
    """Lists of numbers as one tensor (n, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


class Tokenizer:
    """Words to ids and back: the one place to change for another vocabulary."""

    SPECIAL = ["[PAD]", "[CLS]", "[MASK]", "[UNK]"]
    pad_id, cls_id, mask_id, unk_id = range(4)

    def __init__(self, words):
        """words: in the order of ids, SPECIAL first; or BERT's, known by pieces like "##ing"."""
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.split, self.end = parse.split_words, []  # cuts a text into words; ends its ids
        if any(word.startswith("##") for word in self.words):
            insist(self.words[0] == "[PAD]", "the first word of a vocabulary must be [PAD]")
            self.cls_id, self.mask_id, self.unk_id = (self.ids[name] for name in self.SPECIAL[1:])
            self.split, self.end = bert_words, [self.ids["[SEP]"]]

    @classmethod
    def build(cls, captions, size):
        """A tokenizer of the `size` words that are most frequent in the captions."""
        count = Counter(word for caption in captions for word in parse.split_words(caption))
        return cls(cls.SPECIAL + [word for word, _ in count.most_common(size)])

    def encode(self, text):
        """Ids of [CLS] and the words, MAX_TOKENS at most; a "[MASK]" in the text stays one."""
        ids = []
        for part in text.split("[MASK]"):
            ids.append(self.mask_id if ids else self.cls_id)
            ids += itertools.chain(*map(self.pieces, self.split(part)))
        return ids[: MAX_TOKENS - len(self.end)] + self.end

    def pieces(self, word, mark=""):
        """Ids of a word: its own, or of its longest pieces from the left, or [UNK]."""
        for end in range(len(word), 0, -1) if len(word) <= LONGEST_WORD else [len(word)]:
            if mark + word[:end] in self.ids:
                rest = self.pieces(word[end:], "##") if end < len(word) else []
                return rest if self.unk_id in rest else [self.ids[mark + word[:end]], *rest]
        return [self.unk_id]

    def batch(self, texts):
        """Texts as ids (n, L)."""
        return pad([self.encode(text) for text in texts], self.pad_id)

    def decode(self, ids):
        """The words of ids as one text, without [CLS], [SEP] and padding."""
        hidden = (self.cls_id, self.pad_id, *self.end)
        return " ".join(self.words[i] for i in ids if i not in hidden).replace(" ##", "")

    def mask_words(self, ids, rng):
        """ids with MASKED_SHARE of the known words hidden, at least one, and the labels: a hidden
        word's id, -100 elsewhere. 8 of 10 become [MASK], 1 another word, 1 stays (BERT, 3.1)."""
        known = []  # words, as the places of their pieces
        for place in range(1, len(ids)):
            if self.words[ids[place]].startswith("##"):
                known[-1].append(place)
            elif ids[place] not in (self.unk_id, *self.end):
                known.append([place])
        hidden = [places for places in known if rng.random() < MASKED_SHARE]
        if known and not hidden:
            hidden = [rng.choice(known)]
        masked, labels = list(ids), [-100] * len(ids)
        for place in itertools.chain(*hidden):
            labels[place] = ids[place]
            another = rng.randrange(len(self.SPECIAL), len(self.words))
            masked[place] = rng.choices((self.mask_id, another, ids[place]), (8, 1, 1))[0]
        return masked, labels


# ------------------------------------------------------------------------------------ batches
MAX_KEYS = 128  # texts of a level that an image is known for; the same for all, to be gathered
NO_TEXT, NO_KEY = -1, -2  # keys that equal nothing

# texts(parsed): a level's texts, one for each phrase, or one in all. language: whether MLM (BLIP:
# LM) is learnt too; not of a subject, one word with no context to guess it from. A new level is a
# line here, and a name in --levels.
Level = namedtuple("Level", "texts language")
LEVELS = {
    "caption": Level(parse.caption_texts, language=True),
    "phrase": Level(parse.phrase_texts, language=True),
    "subject": Level(parse.subject_texts, language=False),
}


@lru_cache(maxsize=1 << 16)
def text_key(text):
    """An integer, equal for texts that are one: case and a leading article do not count."""
    words = parse.split_words(text)
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    digest = hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def draw_pair(chosen, parsed, parses, rng):
    """A composite [part, part, whole]: a phrase and another one of its caption, in their order; or,
    where it has no other (a region's description), of the image's other captions. [] for none."""
    for some in ([parsed], parses):
        phrases = [phrase for other in some for phrase in other.phrases]
        others = [p for p in phrases if text_key(p.text) != text_key(chosen.text)]
        if others:
            pair = [chosen, rng.choice(others)]
            if some == [parsed]:
                pair.sort(key=parsed.phrases.index)
            return [pair[0].text, pair[1].text, parse.compose(*pair)]
    return []


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(n, generator=generator).tolist()


class Samples(Dataset):
    """What an image gives to a step, by its position in the run: pixels, one text of each level,
    one composite. A text that the caption does not have is empty, and does not exist."""

    def __init__(self, records, tokenizer, options, skipped):
        self.records, self.tokenizer = records, tokenizer
        self.options, self.skipped = options, skipped
        with blaming("--parses"):  # {caption: its phrases}, of another parser
            given = parse.read_parses(options.parses) if options.parses else {}
        self.given = {caption: parse.Parse(caption, [], given[caption]) for caption in given}

    def __len__(self):
        return len(self.records)

    def read(self, position, rng):
        """The record at a position of the run, and its pixels; the next one's where they cannot be
        read. Scenes are drawn in their own order, other images shuffled in each epoch."""
        epoch, place = divmod(position, len(self))
        crop = None if isinstance(self.records, Scenes) else rng
        order = epoch_order(len(self), self.options.seed, epoch) if crop else range(len(self))
        for shift in range(len(self)):
            record = self.records[order[(place + shift) % len(self)]]
            with blaming(("image", record["image"]), self.skipped):
                return record, read_image(record["image"], self.options.image_size, crop)
        raise UserError(f"none of the {len(self)} pictures to train on can be read")

    def text(self, level, parsed, number, parses, rng):
        """Phrase `number`'s text of a level, masked, and the keys that make positives."""
        texts = level.texts(parsed) or [""]
        text = texts[number % len(texts)]
        ids = self.tokenizer.encode(text)
        masked, labels = self.tokenizer.mask_words(ids, rng)
        key = text_key(text) if text else NO_TEXT
        known = {text_key(other) for p in parses for other in level.texts(p)} - {key}
        image_keys = [key if text else NO_KEY, *sorted(known), *[NO_KEY] * MAX_KEYS][:MAX_KEYS]
        row = {"ids": ids, "masked": masked, "labels": labels, "exists": text != ""}
        return row | {"text_keys": key, "image_keys": image_keys}

    def __getitem__(self, position):
        rng = random.Random(f"{self.options.seed} {position}")
        record, image = self.read(position, rng)
        parses = [self.given.get(said) or parse.parse(said) for said in record["captions"]]
        parsed = rng.choice(parses)
        number = rng.randrange(len(parsed.phrases) or 1)
        # Of all levels: every training draws the same texts.
        sample = {name: self.text(LEVELS[name], parsed, number, parses, rng) for name in LEVELS}
        texts = draw_pair(parsed.phrases[number], parsed, parses, rng) if parsed.phrases else []
        part1, part2, whole = map(self.tokenizer.encode, texts or ["", "", ""])
        pair = {"part1": part1, "part2": part2, "whole": whole, "exists": texts != []}
        return sample | {"image": image, "pair": pair}


def collate(rows, name=""):
    """Samples as a batch of B: image (B, 3, side, side) uint8; for each level ids, masked, labels
    (B, L), exists (B,) bool, text_keys (B,), image_keys (B, MAX_KEYS); for "pair" part1, part2,
    whole (B, L), exists (B,). name: under which a sample has these rows."""
    if isinstance(rows[0], dict):
        batch = {}
        for key in rows[0]:
            batch[key] = collate([row[key] for row in rows], key)
        return batch
    if isinstance(rows[0], list):
        return pad(rows, -100 if name == "labels" else Tokenizer.pad_id)
    return torch.stack([torch.as_tensor(row) for row in rows])


# -------------------------------------------------------------------------------------- model
layer_norm = partial(nn.LayerNorm, eps=1e-12)  # BERT's eps


class Attention(nn.Module):
    """Multi-head attention, written out: the fused kernel has no A and no second derivative."""

    def __init__(self, width, heads, source_width=None):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(source_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source):
        """source (B, N, source_width) -> keys and values in one (2, B, heads, N, d)."""
        return self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_values, mask=None):
        """x (B, L, width), mask (B, 1 or L, N) -> what it sees, A (B, heads, L, N)."""
        keys, values = keys_values
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, heads, L, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        A = scores.softmax(-1)
        return self.out((A @ values).transpose(1, 2).flatten(2)), A


class Layer(nn.Module):
    """BERT's post-norm transformer layer; given an image width, it can also look at an image."""

    def __init__(self, width, image_width=None):
        super().__init__()
        heads = max(4, width // 64)
        self.self_attention = Attention(width, heads)
        self.self_norm = layer_norm(width)
        if image_width:
            self.cross_attention = Attention(width, heads, image_width)
            self.cross_norm = layer_norm(width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        self.mlp_norm = layer_norm(width)

    def forward(self, x, mask, keys_values=None):
        """x (n, L, width), mask (n, 1 or L, L) of what a token may see, an image's keys_values (2,
        n, heads, N, d) or None -> x (n, L, width), cross-attention A (n, heads, L, N) or None."""
        seen, _ = self.self_attention(x, self.self_attention.keys_values(x), mask)
        x = self.self_norm(x + seen)
        A = None
        if keys_values is not None:
            seen, A = self.cross_attention(x, keys_values)
            x = self.cross_norm(x + seen)
        return self.mlp_norm(x + self.mlp(x)), A


class ALBEF(nn.Module):
    """Image tokens, text tokens, fusion layers in which text looks at the image, and heads for
    ITC, ITM and MLM (arXiv 2107.07651, without its momentum encoder)."""

    language_kind = "mlm"

    def __init__(self, options, tokenizer):
        super().__init__()
        width, words, depth = options.width, len(tokenizer.words), options.fusion_layers
        self.vit = make_vit(options)
        self.grid = self.vit.patch_embed.grid_size
        self.prefix = self.vit.num_prefix_tokens  # [CLS] and the like, before the patches
        image_width = self.vit.embed_dim
        data = timm.data.resolve_model_data_config(self.vit)  # as this ViT was trained
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(data[name]).view(3, 1, 1))
        self.word_embedding = nn.Embedding(words, width)
        self.position_embedding = nn.Embedding(MAX_TOKENS, width)
        self.embedding_norm = layer_norm(width)
        self.text_layers = nn.ModuleList(Layer(width) for _ in range(options.text_layers))
        self.fusion_layers = nn.ModuleList(Layer(width, image_width) for _ in range(depth))
        self.image_projection = nn.Linear(image_width, 256)
        self.text_projection = nn.Linear(width, 256)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.match_head = nn.Linear(width, 2)
        transform, decoder = nn.Linear(width, width), nn.Linear(width, words)
        self.word_head = nn.Sequential(transform, nn.GELU(), layer_norm(width), decoder)
        nn.init.normal_(self.word_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        decoder.weight = self.word_embedding.weight  # tied; the bias is its own

    def encode_image(self, images):
        """images (B, 3, side, side) uint8 -> ITC features (B, 256), tokens V (B, N, D)."""
        V = self.vit.forward_features((images / 255 - self.mean) / self.std)
        pooled = self.vit.forward_head(V, pre_logits=True)  # [CLS], mean or max, as this ViT pools
        return F.normalize(self.image_projection(pooled).float(), dim=-1), V

    def project_image(self, V):
        """V (B, N, D) -> image_kv, the keys and values of each fusion layer [(2, B, heads, N, d),
        …]: projected once for all texts that look at these images."""
        return [layer.cross_attention.keys_values(V) for layer in self.fusion_layers]

    def embed(self, ids):
        """ids (n, L) -> (n, L, width)."""
        positions = self.position_embedding.weight[: ids.shape[1]]
        return self.embedding_norm(self.word_embedding(ids) + positions)

    def encode_text(self, ids):
        """ids (n, L) -> tokens T to fuse (n, L, width), mask (n, L), ITC features (n, 256)."""
        mask = ids != Tokenizer.pad_id
        T = self.embed(ids)
        for layer in self.text_layers:
            T, _ = layer(T, mask[:, None])
        return T, mask, F.normalize(self.text_projection(T[:, 0]).float(), dim=-1)

    def fuse(self, T, mask, image_kv):
        """n texts look at n images, or at one -> states (n, L, width), cross-attentions [A, …]."""
        attentions = []
        for layer, keys_values in zip(self.fusion_layers, image_kv):
            T, A = layer(T, mask[:, None], keys_values)
            attentions.append(A)
        return T, attentions

    def match(self, T, mask, image_kv):
        """Match logits (n, 2), [1] for a match, and the cross-attentions behind them."""
        states, attentions = self.fuse(T, mask, image_kv)
        return self.match_head(states[:, 0]), attentions

    def language_loss(self, text, image_kv):
        """MLM of a level's texts, each with its own image: the masked words from the others."""
        T, mask, _ = self.encode_text(text["masked"])
        return mlm_loss(self.word_head(self.fuse(T, mask, image_kv)[0]), text["labels"])

    def word_logits(self, ids, place, image_kv):
        """Logits (words,) of what stands at a place of a text (1, L), which is masked there."""
        T, mask, _ = self.encode_text(ids)
        return self.word_head(self.fuse(T, mask, image_kv)[0][0, place])

    def forward(self, *arguments):
        """hist_losses; DistributedDataParallel wraps forward and nothing else."""
        return hist_losses(self, *arguments)


class BLIP(ALBEF):
    """The same parts wired as in arXiv 2201.12086, without CapFilt: cross-attention in every text
    layer, left out for ITC; a decoder shares all but self-attention. [CLS] begins and ends."""

    language_kind = "lm"

    def __init__(self, options, tokenizer):
        super().__init__(options, tokenizer)
        layers = [Layer(options.width, self.vit.embed_dim) for _ in self.fusion_layers]
        self.decoder_layers, self.cls_id = nn.ModuleList(layers), tokenizer.cls_id
        for decoder_layer, layer in zip(layers, self.fusion_layers):
            for name in ("cross_attention", "cross_norm", "mlp", "mlp_norm"):
                setattr(decoder_layer, name, getattr(layer, name))
        self.text_layers = self.fusion_layers

    def encode_text(self, ids):
        """As ALBEF's; the tokens to fuse are embeddings, for the layers that encode also fuse."""
        _, mask, features = super().encode_text(ids)
        return self.embed(ids), mask, features

    def decode(self, ids, image_kv):
        """Logits (n, L, words) of the word after each, from those before it and the image."""
        mask = (ids != Tokenizer.pad_id)[:, None].expand(-1, ids.shape[1], -1).tril()  # (n, L, L)
        T = self.embed(ids)
        for layer, keys_values in zip(self.decoder_layers, image_kv):
            T, _ = layer(T, mask, keys_values)
        return self.word_head(T)

    def language_loss(self, text, image_kv):
        """Causal LM: every word from those before it; after the last one comes [CLS]."""
        ids = text["ids"]
        following = F.pad(ids[:, 1:], (0, 1), value=Tokenizer.pad_id)
        labels = following.masked_fill(following == Tokenizer.pad_id, self.cls_id)
        nothing = (ids == Tokenizer.pad_id) | ~text["exists"][:, None]
        return mlm_loss(self.decode(ids, image_kv), labels.masked_fill(nothing, -100))

    def word_logits(self, ids, place, image_kv):
        """The same from what stands before that place; what follows is not read."""
        return self.decode(ids[:, :place], image_kv)[0, -1]


MODELS = {"albef": ALBEF, "blip": BLIP}


# ----------------------------------------------------------------------------------- Grad-CAM
def grad_cam(A, score, mask, grid, prefix=1, create_graph=False):
    """Where a score looks: M = mean over heads and tokens of A * ReLU(ds/dA).
    A: cross-attention of one fusion layer (n, heads, L, prefix + patches), in the graph of score.
    score: s, the match logit (n,). mask: (n, L), True for tokens that are not padding. grid:
    (height, width) in patches. create_graph: to differentiate M again, as composition does.
    Returns M (n, height, width), >= 0. This is ALBEF's variant (its section 6) of Selvaraju et
    al. (arXiv 1610.02391), who pool the gradient over space and rectify the sum."""
    (gradient,) = torch.autograd.grad(score.sum(), A, retain_graph=True, create_graph=create_graph)
    cam = (A * gradient.relu()).mean(1)  # (n, L, prefix + patches)
    cam = (cam * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return cam[:, prefix:].reshape(-1, *grid)


@torch.enable_grad()  # a map is a gradient, whoever asks for it
def locate(model, ids, image_kv, cam_layer, create_graph=False):
    """Maps (n, height, width) of texts (n, L) over n images, or over one, and probabilities (n,) of
    a match. In the last fusion layer [CLS] alone reaches the match head: other rows of A add 0."""
    T, mask, _ = model.encode_text(ids)
    logits, attentions = model.match(T, mask, image_kv)
    A = attentions[cam_layer]
    maps = grad_cam(A, logits[:, 1], mask, model.grid, model.prefix, create_graph)
    return maps, logits.detach().softmax(-1)[:, 1]


# ------------------------------------------------------------------------------------- losses
def find_positives(image_keys, text_keys):
    """(B, n) bool: whether the parse of image b holds text n, be it another image's ("a dog").
    image_keys (B, K), text_keys (n,): equal integers for equal texts."""
    return (image_keys[:, :, None] == text_keys).any(1)


def itc_loss(image_features, text_features, positives, exists, temperature):
    """Image-text contrast with several positives, both ways (ALBEF, equations 1, 2, the targets
    of arXiv 2004.11362, L_out): mean cross-entropy to the uniform distribution over positives.
    image_features (B, 256), text_features (n, 256), of length 1; positives (B, n) bool; exists (n,)
    bool, whether the text does. An image, or a text, without a positive is a negative only."""
    logits = (image_features @ text_features.T / temperature).masked_fill(~exists, -1e4)

    def one_way(logits, positives):
        count = positives.sum(1)
        loss = -(logits.log_softmax(1) * positives).sum(1) / count.clamp(min=1)
        return loss.sum() / (count > 0).sum().clamp(min=1)

    return (one_way(logits, positives) + one_way(logits.T, positives.T)) / 2


@torch.no_grad()
def draw_negatives(similarity, allowed, hardness):
    """For each row one column that is allowed: uniform at hardness 0, by softmax of the similarity
    at 1 (ALBEF, 3.2). similarity, allowed (a, b) -> columns (a,), whether there was one (a,)."""
    found = allowed.any(1)
    uniform = allowed / allowed.sum(1, keepdim=True)
    hard = similarity.masked_fill(~allowed, -1e4).softmax(1)
    weights = (1 - hardness) * uniform + hardness * hard
    weights = weights.masked_fill(~found[:, None], 1.0)  # where there is none, any, to be ignored
    return torch.multinomial(weights, 1)[:, 0], found


def itm_loss(logits, labels, weight):
    """Mean cross-entropy, by weight (n,), of match logits (n, 2) with labels (n,), 1: a match."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def mlm_loss(logits, labels):
    """Language modelling: mean cross-entropy of word logits (n, L, words) with labels (n, L), the
    masked words (LM: the next ones); -100 leaves a place out. 0 where all are left out."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)


def composition_loss(part1, part2, whole, weight, eps=1e-12):
    """The map of "p1 and p2" is to be the sum of the maps of p1 and p2 (HIST's composition loss):
    || normalise(M12) - normalise(normalise(M1) + normalise(M2)) ||_1.
    part1, part2, whole: Grad-CAM maps (n, height, width) >= 0; weight (n,): how far to trust each
    pair. The parts are detached: they are the target, and a teacher's: see composition_losses."""

    def normalise(M):
        return M / (M.sum((1, 2), keepdim=True) + eps)

    target = normalise(normalise(part1.detach()) + normalise(part2.detach()))
    distance = (normalise(whole) - target).abs().sum((1, 2))
    return (distance * weight).sum() / weight.sum().clamp(min=eps)


def level_losses(model, image_features, image_kv, text, language, hardness):
    """{"itc": scalar, "itm": …, "mlm": …} of one level, with one text for each of the B images."""
    T, mask, text_features = model.encode_text(text["ids"])
    exists = text["exists"]
    temperature = model.log_temperature.exp().clamp(0.01, 1)

    # Contrast, over the images and texts of all processes; in float32: 1 / temperature is large.
    with torch.autocast(exists.device.type, enabled=False):
        positives = find_positives(gather(text["image_keys"]), gather(text["text_keys"]))
        features = gather(image_features), gather(text_features)
        losses = {"itc": itc_loss(*features, positives, gather(exists), temperature)}
        similarity = image_features @ text_features.T / temperature

    # Matching, within this process: text and image, text and wrong image, image and wrong text.
    allowed = ~find_positives(text["image_keys"], text["text_keys"]) & exists
    wrong_image, found_image = draw_negatives(similarity.T, allowed.T, hardness)
    wrong_text, found_text = draw_negatives(similarity, allowed, hardness)
    own = torch.arange(len(exists), device=exists.device)
    texts, images = torch.cat([own, own, wrong_text]), torch.cat([own, wrong_image, own])
    kv = [keys_values.index_select(1, images) for keys_values in image_kv]
    logits, _ = model.match(T[texts], mask[texts], kv)
    labels = torch.tensor([1, 0, 0], device=own.device).repeat_interleave(len(own))
    weight = torch.cat([exists, found_image, found_text & exists])
    losses["itm"] = itm_loss(logits, labels, weight)

    if language:
        losses[model.language_kind] = model.language_loss(text, image_kv)
    return losses


def composition_losses(model, teacher, V, pair, cam_layer):
    """The composition loss; and figures that show a collapse which the loss would reward: map_mass
    (sum of the composite's M), map_entropy (1: flat), trust (the pairs' weight).
    The parts' maps are a frozen teacher's, on image tokens V (B, N, D) of the model in training:
    with its own maps, they flatten with the composite's. Teacher and trust are not the paper's."""
    with torch.autocast(V.device.type, enabled=False):  # the gradient of a gradient, in float32
        V = V.float()
        teacher_kv = teacher.project_image(V.detach())
        part1, match1 = locate(teacher, pair["part1"], teacher_kv, cam_layer)
        part2, match2 = locate(teacher, pair["part2"], teacher_kv, cam_layer)
        own_kv = model.project_image(V)
        whole, _ = locate(model, pair["whole"], own_kv, cam_layer, create_graph=True)
        weight = match1 * match2 * pair["exists"]
        loss = composition_loss(part1, part2, whole, weight)
    mass = whole.detach().sum((1, 2))
    shares = whole.detach() / mass.clamp(min=1e-12)[:, None, None]
    entropy = torch.special.entr(shares).sum((1, 2)) / math.log(shares[0].numel())
    there = pair["exists"] / pair["exists"].sum().clamp(min=1)
    figures = {"map_mass": (mass * there).sum(), "map_entropy": (entropy * there).sum()}
    return loss, figures | {"trust": weight.mean()}


def hist_losses(model, batch, levels, hardness, cam_layer, teacher=None):
    """The method: {"phrase_itc": scalar, …, "composition": scalar}, unweighted, and figures to
    watch. The images are encoded once, for every text of every level and every negative."""
    losses, figures = {}, {}
    image_features, V = model.encode_image(batch["image"])
    image_kv = model.project_image(V)
    for name, level in LEVELS.items():
        if name in levels:
            text = batch[name]
            found = level_losses(model, image_features, image_kv, text, level.language, hardness)
            losses |= {f"{name}_{kind}": loss for kind, loss in found.items()}
    if "composition" in levels:
        loss, figures = composition_losses(model, teacher, V, batch["pair"], cam_layer)
        losses["composition"] = loss
    return losses, figures


# ----------------------------------------------------------------------------------- training
WEIGHT_DECAY, BETAS = 0.02, (0.9, 0.98)
WARMUP_STEPS, LEAST_RATE = 100, 0.01  # the last rate, as a share of its peak
FINE_TUNING_RATE = 0.5  # the peak of what goes on from a base, as a share of --lr
# Hard negatives from the first step on leave the match head at chance, and composition from then
# on makes the maps vanish: both ramp in. Start and length are shares of all steps, base included.
HARDNESS, HARD_START, HARD_RAMP = 0.5, 0.5, 0.3
COMPOSITION_RAMP = 0.1


def gather(x):
    """x of all processes, one after the other, with gradients; x itself where there is one."""
    return x if WORLD == 1 else torch.cat(torch.distributed.nn.all_gather(x))


def barrier():
    """All processes wait here for each other."""
    if WORLD > 1:
        torch.distributed.barrier()


def ramp(done, start, length):
    """0 until start, then linearly up to 1 within length."""
    return min(1.0, max(0.0, (done - start) / length))


def learning_rate(step, steps, peak):
    """Linear warm-up, times a cosine from the first step down to LEAST_RATE of the peak."""
    warmup = max(1, min(WARMUP_STEPS, steps // 10))
    cosine = max(LEAST_RATE, (1 + math.cos(math.pi * step / steps)) / 2)
    return peak * min(1, (step + 1) / warmup) * cosine


def make_teacher(model):
    """A frozen copy of all but the image encoder: it looks at the tokens of the one in training."""
    teacher = copy.deepcopy(model).eval()
    teacher.vit = nn.Identity()
    return teacher


def loader(samples, options, first, last):
    """Batches of positions first to last of the run; each process has its part of each step."""
    size = options.batch_size // (options.accumulate * WORLD)
    positions = [p for p in range(first, last) if p // size % WORLD == RANK]
    how = {"num_workers": options.workers, "timeout": PATIENCE if options.workers else 0}
    how |= {"worker_init_fn": start_worker, "pin_memory": options.device == "cuda"}
    return DataLoader(samples, size, sampler=positions, collate_fn=collate, **how)


def loss_weights(levels, composition):
    """The weights that are not 1: lambda, and (not in the paper) the number of levels for matching
    captions: phrases and subjects are easier, and would take the match head over."""
    return {"composition": composition, "caption_itm": len(LEVELS.keys() & levels)}


def train_step(model, teacher, batches, optimizer, options, levels, hardness, composition):
    """One step -> {name: value} of each loss and figure, and "gradient", the gradient's norm; where
    it is not finite no weight changes. composition: that loss's weight; at 0 it is left out."""
    values, weights = Counter(), loss_weights(levels, composition)
    levels = [level for level in levels if level != "composition" or composition > 0]
    optimizer.zero_grad()
    for part in range(options.accumulate):
        batch = to_device(next(batches), options.device)
        if WORLD > 1:  # as DDP.no_sync() does: gradients are averaged once a step
            model.require_backward_grad_sync = part == options.accumulate - 1
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            losses, figures = model(batch, levels, hardness, options.cam_layer, teacher)
        loss = sum(weights.get(name, 1) * value for name, value in losses.items())
        (loss / options.accumulate).backward()
        for name, value in (losses | figures).items():
            values[name] += value.item() / options.accumulate
    values["gradient"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if math.isfinite(values["gradient"]):
        optimizer.step()
    return values


def train(name, levels, samples, options, steps):
    """Train one model with these levels, and return it and the seconds that took.
    "base", with --base-steps, comes first; all others go on from its weights, with the images
    after its own: they start alike and see the same images and captions in the same order. Writes
    OUT/name.pt and a line a step into OUT/metrics.jsonl."""
    path = Path(options.out) / f"{name}.pt"
    before = 0 if name == "base" else options.base_steps
    peak = options.lr * (FINE_TUNING_RATE if before else 1)
    model, teacher, optimizer, start, seconds = start_training(path, samples, options, before)
    ddp = partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    wrapped = ddp(model) if WORLD > 1 else model
    first, last = ((before + step) * options.batch_size for step in (start, steps))
    batches = iter(loader(samples, options, first, last))
    began = time.time() - seconds
    model.train()
    bar = tqdm(range(start, steps), name, steps, initial=start, unit="step", disable=RANK > 0)
    with open_metrics(path.with_name("metrics.jsonl"), name, start) as metrics:
        for step in bar:
            done = (before + step) / (options.base_steps + options.steps)
            hardness = HARDNESS * ramp(done, HARD_START, HARD_RAMP)
            composition = ramp(done, options.composition_start, COMPOSITION_RAMP)
            composition *= options.composition_weight
            if composition == 0:
                teacher = None  # also where more --steps put the beginning off
            elif "composition" in levels and teacher is None:
                teacher = make_teacher(model)  # of the weights as composition begins
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            # Seeded anew, a resumed run draws the same negatives.
            torch.manual_seed((options.seed << 32) + (before + step) * WORLD + RANK)
            values = train_step(
                wrapped, teacher, batches, optimizer, options, levels, hardness, composition
            )
            insist_finite(values, f"step {step + 1} of {name}")
            row = {"run": name, "step": step + 1} | {k: round(v, 5) for k, v in values.items()}
            metrics.write(json.dumps(row) + "\n")
            bar.set_postfix_str(", ".join(f"{k} {v:.2f}" for k, v in values.items()), refresh=False)
            if step + 1 == steps or (step + 1) % options.save_every == 0:
                metrics.flush()
                samples.skipped.check()
                seconds = time.time() - began
                save(path, model, teacher, optimizer, step + 1, seconds, samples, options)
    barrier()  # the checkpoint is there before anyone goes on from it
    return model, seconds


# ----------------------------------------------------------------------------------- measures
THRESHOLDS = np.linspace(0.05, 0.95, 19)
RERANKED = 16  # the match head sees so many captions of each image, and images of each caption
ANSWERS = 1000  # to choose from, where a question has no choices

# What a phrase names: boxes and mask (the boxes where there is none) as (side, side) bool; mentions
# of one object share it. How the map of "p1 and p2" divides: iou (thresholds,), area of the union.
Target = namedtuple("Target", "phrase boxes mask tags object")
Pair = namedtuple("Pair", "record balance iou area")


def pointing_game(heat, region):
    """Whether a map's highest point lies in a region, both (height, width) (arXiv 1608.00507)."""
    return bool(region.reshape(-1)[heat.argmax()])


def multi_object_iou(heat, union, thresholds=THRESHOLDS):
    """IoU (thresholds,) of a map, cut at fractions of its maximum, with the union of masks."""
    marked = heat >= thresholds[:, None, None] * max(heat.max(), 1e-12)
    return (marked & union).sum((1, 2)) / (marked | union).sum((1, 2)).clip(1)


def balance(heat, mask1, mask2):
    """The smaller of two targets' shares of a map over the larger: 1 when both get as much."""
    small, large = sorted((heat[mask1].sum(), heat[mask2].sum()))
    return small / max(large, 1e-12)


def vqa_accuracy(said, answers):
    """1 for any of the answers; for ten annotators' VQA v2's accuracy: min(n / 3, 1), n of the
    others having said it, averaged over leaving out each."""
    same = [answer.strip() == said.strip() for answer in answers]
    if len(same) < 10:
        return float(any(same))
    return float(np.mean([min((sum(same) - own) / 3, 1) for own in same]))


def box_mask(boxes, side):
    """Boxes [[x0, y0, x1, y1], …] filled: (side, side) bool."""
    filled = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in np.clip(boxes, 0, side):
        filled[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    return filled


def targets_of(record, size, side):
    """The Targets of a record whose picture has the size (height, width)."""
    targets = []
    for number, target in enumerate(record["targets"]):
        scale = [side / size[1], side / size[0]] * 2
        boxes = mask = box_mask(np.array(target["boxes"]) * scale, side)
        if target.get("mask") is not None:
            drawn = Image.fromarray(decode_mask(target["mask"])).resize((side, side))
            mask = np.asarray(drawn) if np.any(drawn) else boxes
        tags, thing = target.get("tags") or [], target.get("object", number)
        targets.append(Target(target["phrase"], boxes, mask, tags, thing))
    return targets


def texts_to_find(targets, rng):
    """[(kinds of measure, text, Targets named), …]: phrases, subjects, three pairs, of no kind."""
    subjects, objects = defaultdict(list), defaultdict(list)
    for target in targets:
        phrases = parse.parse(target.phrase).phrases
        subjects[phrases[0].subject if phrases else target.phrase].append(target)
        objects[target.object].append(target)
    found = [(["phrases", *target.tags], target.phrase, [target]) for target in targets]
    found += [(["subjects"], subject, named) for subject, named in subjects.items()]
    pairs = list(itertools.combinations([rng.choice(named) for named in objects.values()], 2))
    for one, two in rng.sample(pairs, min(3, len(pairs))):
        found.append(([], f"{one.phrase} and {two.phrase}", [one, two]))
    return found


def look_at(model, image):
    """image_kv of one image (3, side, side), for however many texts."""
    return model.project_image(model.encode_image(image[None])[1])


@torch.no_grad()
def maps_of(model, tokenizer, image, texts, cam_layer):
    """Maps at pixel size (n, side, side), bicubic, of n texts over an image (3, side, side), and
    probabilities [n] that they match."""
    model.eval()
    ids = tokenizer.batch(texts).to(image.device)
    maps, match = locate(model, ids, look_at(model, image), cam_layer)
    maps = F.interpolate(maps.detach()[:, None].float(), size=image.shape[1:], mode="bicubic")
    return maps[:, 0].clamp(min=0).cpu().numpy(), match.tolist()


@torch.no_grad()
def answer(model, tokenizer, image, text, choices):
    """The choice that the language head thinks likeliest at [MASK], about an image (3, side, side);
    where there is no [MASK], the second of two if the text matches, else the first."""
    ids, image_kv = tokenizer.batch([text]).to(image.device), look_at(model, image)
    if tokenizer.mask_id in ids:
        place = ids[0].tolist().index(tokenizer.mask_id)
        logits = model.word_logits(ids, place, image_kv)
        scores = logits[[tokenizer.ids.get(choice, tokenizer.unk_id) for choice in choices]]
    else:
        T, mask, _ = model.encode_text(ids)
        scores = model.match(T, mask, image_kv)[0][0]
    return choices[int(scores.argmax())]


def measure_maps(model, tokenizer, records, options, answers):
    """({measure: [value, …]} of pointing and questions, [Pair, …])."""
    values, pairs, rng = defaultdict(list), [], random.Random(0)
    for record in tqdm(records, "evaluating", unit="img", leave=False):
        pixels = load_pixels(record["image"])
        image = read_image(pixels, options.image_size).to(options.device)
        targets = targets_of(record, pixels.shape, options.image_size)
        found = texts_to_find(targets, rng)
        texts = [text for _, text, _ in found]
        maps = maps_of(model, tokenizer, image, texts, options.cam_layer)[0] if texts else []
        for (kinds, _, named), heat in zip(found, maps):
            boxes = np.logical_or.reduce([target.boxes for target in named])
            mask = np.logical_or.reduce([target.mask for target in named])
            chance = len({t.object for t in named}) / len({t.object for t in targets})
            for kind in kinds:
                name = f"pointing_{kind}"
                values[name].append(pointing_game(heat, boxes))
                values[f"{name}_in_mask"].append(pointing_game(heat, mask))
                values[f"{name}_chance"].append(chance)
                values[f"{name}_chance_pixel"].append(boxes.mean())
            if not kinds:
                shares = balance(heat, named[0].mask, named[1].mask)
                pairs.append(Pair(record, shares, multi_object_iou(heat, mask), mask.mean()))
        for question in record.get("questions", []):
            if choices := question.get("choices") or answers:
                said = answer(model, tokenizer, image, question["text"], choices)
                for name in ("vqa", f"vqa_{question['kind']}"):
                    values[name].append(vqa_accuracy(said, question["answers"]))
                    values[f"{name}_chance"].append(1 / len(choices))
    return values, pairs


def rerank(model, records, ids, similarity, options):
    """Match probabilities of each image with the captions that ITC likes best, and of each caption
    with its images: two (images, texts), -inf elsewhere (ALBEF, section 5). ids (texts, L)."""
    best = []
    for dim in (1, 0):
        near = similarity.topk(min(RERANKED, similarity.shape[dim]), dim).indices
        best.append(torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, near, True))
    score = torch.full_like(similarity, -torch.inf)
    for row, record in enumerate(records):
        image = read_image(record["image"], options.image_size).to(options.device)
        image_kv = look_at(model, image)
        for texts in (best[0] | best[1])[row].nonzero()[:, 0].split(512):
            T, mask, _ = model.encode_text(ids[texts])
            logits, _ = model.match(T, mask, image_kv)
            score[row, texts] = logits.softmax(-1)[:, 1]
    return [score.masked_fill(~chosen, -torch.inf) for chosen in best]


def recalls(scores, right):
    """{k: R@k} for k of 1, 5, 10: scores, and which are right, (queries, candidates)."""
    order = scores.cpu().topk(min(10, scores.shape[1]), 1).indices
    hits = right.gather(1, order)
    return {k: hits[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}


@torch.no_grad()
def retrieval(model, tokenizer, records, options):
    """R@1, 5 and 10 both ways, by ITC and re-ranked by ITM; any of an image's captions is right."""
    owner = [number for number, record in enumerate(records) for _ in record["captions"]]
    right = torch.tensor(owner) == torch.arange(len(records))[:, None]  # (images, texts)
    ids = tokenizer.batch([caption for record in records for caption in record["captions"]])
    ids, images, result = ids.to(options.device), [], {}
    for record in records:
        image = read_image(record["image"], options.image_size).to(options.device)
        images.append(model.encode_image(image[None])[0])
    texts = torch.cat([model.encode_text(part)[2] for part in ids.split(512)])
    similarity = torch.cat(images) @ texts.T
    reranked = rerank(model, records, ids, similarity, options)
    for name, (to_text, to_image) in {"": (similarity, similarity), "_itm": reranked}.items():
        ways = {"image_to_text": (to_text, right), "text_to_image": (to_image.T, right.T)}
        for way, (scores, truth) in ways.items():
            for k, value in recalls(scores, truth).items():
                result[f"r{k}_{way}{name}"] = value
                result[f"r{k}_{way}{name}_chance"] = min(1.0, k / len(records))
    return result


def best_threshold(pairs):
    """Index of the threshold with the highest mean IoU; the middle one where there is no pair."""
    return int(np.mean([pair.iou for pair in pairs], 0).argmax()) if pairs else len(THRESHOLDS) // 2


def pair_measures(pairs, val_pairs):
    """IoU and balance of pairs. The IoU's threshold is val_pairs' best; where there are none, the
    images are halved, and each half has the other's."""
    of_image = [list(same) for _, same in itertools.groupby(pairs, lambda pair: id(pair.record))]
    halves, ious = [list(itertools.chain(*of_image[first::2])) for first in (0, 1)], []
    for half, other in (halves, halves[::-1]):
        best = best_threshold(val_pairs or other)
        ious += [pair.iou[best] for pair in half]
    measures = {"multi_object_iou": ious, "balance": [pair.balance for pair in pairs]}
    measures["multi_object_iou_chance_pixel"] = [pair.area for pair in pairs]
    return {name: float(np.mean(row)) for name, row in measures.items()}


def evaluate(model, tokenizer, records, options, answers=()):
    """Every measure on held-out records: ({split: {measure: 0 to 1}}, [Pair, …]).
    "…_chance": what pointing at a random object of the image, a random image, a random choice
    would get; "…_chance_pixel": any pixel. answers: the choices of questions that have none."""
    model.eval()
    results, pairs = {}, {}
    for split in dict.fromkeys(record["split"] for record in records):
        some = [record for record in records if record["split"] == split]
        values, pairs[split] = measure_maps(model, tokenizer, some, options, answers)
        results[split] = {name: float(np.mean(row)) for name, row in values.items()}
        results[split] |= retrieval(model, tokenizer, some, options)
        phrases = len(values.get("pointing_phrases", []))
        results[split] |= {"images": len(some), "phrases": phrases, "pairs": len(pairs[split])}
    for split, own in pairs.items():
        val_pairs = [] if split == "val" else pairs.get("val", [])
        results[split] |= pair_measures(own, val_pairs) if own else {}
    return results, list(itertools.chain(*pairs.values()))


def common_answers(records, tokenizer):
    """The training records' most frequent answers that are one word of the vocabulary."""
    said = Counter()
    for record in records if isinstance(records, list) else []:
        for question in record.get("questions", []):
            said.update(map(str.strip, question["answers"]))
    return [answer for answer, _ in said.most_common() if answer in tokenizer.ids][:ANSWERS]


# ----------------------------------------------------------------------------------- pictures
def draw_map(ax, title, picture, heat, region):
    """A map over its picture, a cross at its highest point, a line around the target."""
    how = {"extent": (0, 1, 1, 0), "aspect": picture.shape[0] / picture.shape[1]}
    ax.imshow(picture, **how)
    ax.set_axis_off()
    ax.set_title(textwrap.fill(title, 32), fontsize=9, parse_math=False)
    if heat is not None:
        ax.imshow(heat, cmap="inferno", alpha=0.7, vmin=0, **how)
        y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) / heat.shape
        ax.plot(x, y, "x", color="cyan", markersize=9, markeredgewidth=2)
    if region is not None:
        ax.contour(region, [0.5], extent=(0, 1, 0, 1), colors="white", linewidths=1.5)


def draw_grounding(models, tokenizer, records, options, path):
    """Where each model looks: a row a record of the picture, then for each model the map of each of
    two phrases (its targets', its caption's, or those of "ask") and of both together."""
    rows = []
    for record in records:
        picture = load_pixels(record["image"])
        image = read_image(picture, options.image_size).to(options.device)
        targets = targets_of(record, picture.shape, options.image_size)[:2]
        said = parse.phrase_texts(parse.parse(record["captions"][0]))[:2]
        texts = record.get("ask") or [target.phrase for target in targets] or said
        regions = [target.boxes for target in targets] or [None] * len(texts)
        if len(texts) > 1:
            texts = [*texts, " and ".join(texts)]
            regions.append(np.logical_or.reduce(regions) if targets else None)
        rows.append([(record["captions"][0], picture, None, None)])
        for name, model in models.items() if texts else []:
            maps, match = maps_of(model, tokenizer, image, texts, options.cam_layer)
            for text, heat, probability, region in zip(texts, maps, match, regions):
                rows[-1].append((f"{name}: {text} ({probability:.2f})", picture, heat, region))
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.6 * columns, 2.75 * len(rows) + 0.5), layout="constrained")
    for line, row in enumerate(rows):
        for place, drawn in enumerate(row, line * columns + 1):
            draw_map(figure.add_subplot(len(rows), columns, place), *drawn)
    figure.suptitle("Grad-CAM; a cross: its maximum; a line: the target; in brackets: P(a match)")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def draw_curves(path):
    """curves.png: each loss against the step, a line a training, its points are means."""
    points = defaultdict(lambda: defaultdict(list))  # loss -> training -> (step, value)
    for row in map(json.loads, path.read_text().splitlines()):
        run, step = row.pop("run"), row.pop("step")
        for name, value in row.items():
            points[name][run].append((step, value))
    figure = Figure(figsize=(12, 0.9 * len(points)), layout="constrained")
    colours = {"base": "C0", "baseline": "C1", "hist": "C2"}
    for number, (name, runs) in enumerate(points.items(), 1):
        ax = figure.add_subplot(-(-len(points) // 3), 3, number)
        for run, values in runs.items():
            parts = np.array_split(np.array(values), min(50, len(values)))
            means = np.array([part.mean(0) for part in parts])
            ax.plot(means[:, 0], means[:, 1], color=colours.get(run), label=run)
        ax.set(title=name, xlabel="step")
        ax.legend()
    figure.savefig(path.with_name("curves.png"), dpi=100)


# ------------------------------------------------------------------------------------- scenes
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")  # as CSS has them


def corners(count, *radii):
    """Points at equal angles around (0, 0), from the top, at these radii in turn: (count, 2)."""
    angle = 2 * np.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], 1)


def polygon(numbers):
    """Points (n, 2) from "x y x y …" in hundredths; a right half gets its mirror image."""
    points = np.array(numbers.split(), dtype=float).reshape(-1, 2) / 100
    if points[:, 0].min() < 0:
        return points
    return np.concatenate([points, points[::-1] * (-1, 1)])


OUTLINES = {  # a right half goes from top to bottom
    "boat": "-6 -50 32 6 2 6 2 14 48 14 30 44 -30 44 -48 14 -6 14",
    "bolt": "10 -50 -34 8 -4 8 -12 50 34 -10 4 -10",
    "flag": "-40 -48 46 -25 -26 -2 -26 48 -40 48",
    "fish": "-48 -30 -20 -8 8 -32 48 0 8 32 -20 8 -48 30",
    "stairs": "-46 46 -46 -46 -15 -46 -15 -15 15 -15 15 15 46 15 46 46",
    "square": "42 -42 42 42",
    "heart": "0 -20 16 -38 34 -38 46 -18 42 0 0 42",
    "cross": "15 -46 15 -15 46 -15 46 15 15 15 15 46",
    "arrow": "0 -50 44 -4 16 -4 16 48",
    "house": "0 -48 48 -5 34 -5 34 46",
    "tree": "0 -50 42 18 9 18 9 48",
    "bar": "48 -14 48 14",
    "hourglass": "42 -46 5 0 42 46",
    "crown": "0 -40 18 0 46 -34 38 40",
    "mushroom": "12 -44 38 -30 48 2 14 2 14 46",
    "cup": "46 -40 30 10 7 22 7 36 30 46",
    "bell": "8 -48 24 -34 30 14 48 36 12 36 10 48",
    "comb": "46 -40 46 40 28 40 28 -10 9 -10 9 40",
}
ROUND = {"circle": (40, 0.46), "ring": (40, 0.46), "moon": (40, 0.46), "triangle": (3, 0.5)}
ROUND |= {"star": (10, 0.5, 0.2), "diamond": (4, 0.48, 0.3)}
SHAPES = {name: corners(*form) for name, form in ROUND.items()}  # in a square from -0.5 to 0.5
SHAPES |= {name: polygon(numbers) for name, numbers in OUTLINES.items()}
HOLES = {"ring": (0.27, 0.27, 0.73, 0.73), "moon": (0.3, -0.05, 1, 0.65)}  # ellipses, x0 y0 x1 y1
KINDS = list(itertools.product(COLOURS, SHAPES))
UNSEEN = set(KINDS[::5])  # in held-out scenes only
Thing = namedtuple("Thing", "colour shape size x y")  # in a square of size pixels, corner at x, y


def place_things(rng, side, wanted, unseen):
    """Up to `wanted` Things, no two alike; half of the later ones are distractors, which share
    colour or shape with the first. unseen: whether UNSEEN kinds may be drawn."""
    things, taken = [], np.zeros((side, side), dtype=bool)
    used = set() if unseen else set(UNSEEN)
    for _ in range(200):  # attempts
        colour, shape = rng.choice(KINDS)
        if things and rng.random() < 0.5:
            colour, shape = rng.choice([(things[0].colour, shape), (colour, things[0].shape)])
        size = int(side * 0.2 * 2 ** rng.random())
        x, y = rng.randint(0, side - size), rng.randint(0, side - size)
        square = taken[max(0, y - 1) : y + size + 1, max(0, x - 1) : x + size + 1]
        if (colour, shape) not in used and not square.any():
            things.append(Thing(colour, shape, size, x, y))
            used.add((colour, shape))
            square[:] = True
        if len(things) == wanted:
            break
    return things


def coverage(thing, side):
    """How much of each pixel a Thing covers: (side, side) in [0, 1], drawn at four times that."""
    big = Image.new("L", (4 * side, 4 * side))
    draw, corner, size = ImageDraw.Draw(big), np.array([4 * thing.x, 4 * thing.y]), 4 * thing.size
    points = (SHAPES[thing.shape] + 0.5) * size + corner
    draw.polygon(points.flatten().tolist(), fill=255)
    if thing.shape in HOLES:
        draw.ellipse((np.array(HOLES[thing.shape]) * size + np.tile(corner, 2)).tolist(), fill=0)
    return np.float32(big.resize((side, side), Image.Resampling.BOX)) / 255


def alone(things, what):
    """The things whose "colour", or "shape", no other has."""
    count = Counter(getattr(thing, what) for thing in things)
    return [thing for thing in things if count[getattr(thing, what)] == 1]


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def relation(one, two, rng):
    """A true word for where one Thing is to another, or a vague one."""
    dx = one.x + one.size / 2 - two.x - two.size / 2
    dy = one.y + one.size / 2 - two.y - two.size / 2
    exact = "above" if dy <= 0 else "below"
    if abs(dx) > abs(dy):
        exact = "left of" if dx <= 0 else "right of"
    return rng.choice((exact, exact, "next to", "and", "with", "near"))


LISTS = (  # of one to four things; {where}: the relation of the first two
    ("{0}", "there is {0}", "a picture of {0}"),
    ("{0} {where} {1}", "there is {0} {where} {1}", "a picture of {0} {where} {1}"),
    ("{0}, {1} and {2}", "{0} {where} {1} and {2}", "{0} {where} {1}, with {2}"),
    ("{0}, {1}, {2} and {3}", "{0} {where} {1}, {2} and {3}", "{0} {where} {1}, with {2} and {3}"),
)


def describe(rng, things, side):
    """A true caption of some of the things, and [(phrase, number of its thing), …] that it says: "a
    small red circle above a blue star", "a pink ring and the star is blue"."""
    *others, last = rng.sample(things, len(things))
    clauses = []
    if last in alone(things, "shape"):
        clauses.append([f"the {last.shape}", last.colour])
    if last in alone(things, "colour"):
        clauses.append([f"the {last.colour} shape", with_article(last.shape)])
    clause = rng.choice(clauses) if clauses and rng.random() < 0.5 else []
    listed = (others if clause else [*others, last])[: rng.randint(1 if clause else 2, 4)]
    said = []
    for thing in listed:
        words = [thing.colour, thing.shape]
        if rng.random() < 0.4 and not 0.25 < thing.size / side < 0.32:
            words.insert(0, "small" if thing.size < 0.25 * side else "large")
        said.append((with_article(" ".join(words)), things.index(thing)))
    where = relation(*listed[:2], rng) if len(listed) > 1 else ""
    names = [phrase for phrase, _ in said]
    listing = rng.choice(LISTS[len(listed) - 1]).format(*names, where=where) if listed else ""
    said += [(part, things.index(last)) for part in clause if " " in part]
    return " and ".join(filter(None, [listing, " is ".join(clause)])), said


def ask(rng, things):
    """Questions about a scene, each with one right answer; a text without [MASK] asks whether it is
    true: of a kind that is there, and of one that is not but shares a colour or shape with it."""
    there = [thing[:2] for thing in things]
    absent = [kind for kind in KINDS if kind not in there and set(kind) & set(there[0])]
    asked = []
    for kind, right in ((there[0], "yes"), (rng.choice(absent), "no")):
        asked.append(("is_there", with_article(" ".join(kind)), ["no", "yes"], [right]))
    for thing in alone(things, "shape")[:1]:
        asked.append(("colour", f"the {thing.shape} is [MASK]", [*COLOURS], [thing.colour]))
    for thing in alone(things, "colour")[:1]:
        asked.append(("shape", f"the {thing.colour} shape is a [MASK]", [*SHAPES], [thing.shape]))
    return [dict(zip(("kind", "text", "choices", "answers"), row)) for row in asked]


def draw_scene(rng, side, wanted, unseen):
    """A scene as a record, its picture (side, side, 3) uint8; see `place_things`."""
    things, targets = place_things(rng, side, wanted, unseen), []
    grain = np.frombuffer(rng.randbytes(side * side), dtype=np.uint8).reshape(side, side, 1)
    image = np.float32([rng.uniform(190, 240) for _ in "rgb"]) + grain * np.float32(0.05)
    for thing in things:
        covered = coverage(thing, side)
        ink = np.float32([value + rng.gauss(0, 12) for value in ImageColor.getrgb(thing.colour)])
        image += covered[..., None] * (ink - image)
        mask = covered >= covered.max() / 2
        box = list(Image.fromarray(mask).getbbox())
        tags = [f"shared_{w}" for w in ("colour", "shape") if thing not in alone(things, w)]
        tags += ["unseen"] if thing[:2] in UNSEEN else []
        phrase = with_article(f"{thing.colour} {thing.shape}")
        targets.append({"phrase": phrase, "boxes": [box], "mask": mask, "tags": tags})
    caption, said = describe(rng, things, side)
    record = {"image": image.clip(0, 255).astype(np.uint8), "captions": [caption], "said": said}
    return record | {"targets": targets, "questions": ask(rng, things), "split": "test"}


class Scenes:
    """n scenes of three to six objects, or of as many as said, drawn on demand by number, seed and
    name: no two sets share a scene. held_out: with UNSEEN kinds too."""

    def __init__(self, n, options, name, held_out, objects=None):
        self.n, self.side, self.held_out, self.objects = n, options.image_size, held_out, objects
        self.stream = f"{options.seed} {name}"

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)  # what ends a loop over them
        rng = random.Random(f"{self.stream} {i}")
        return draw_scene(rng, self.side, self.objects or rng.randint(3, 6), self.held_out)


def name_shapes(model, options):
    """What ImageNet is to ALBEF's image encoder: the model's learns to name the shape of the one
    object of a scene, and the head it names with is thrown away."""
    shapes, n = list(SHAPES), options.batch_size
    drawn = Scenes(n * options.vit_steps, options, "one", held_out=False, objects=1)
    head = nn.Linear(model.vit.embed_dim, len(shapes)).to(options.device)
    weights = [*model.vit.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=WEIGHT_DECAY, betas=BETAS)
    bar = tqdm(range(options.vit_steps), "vit", unit="step", disable=RANK > 0)
    for step in bar:
        scenes = [drawn[number] for number in range(step * n, (step + 1) * n)]
        names = [scene["targets"][0]["phrase"].split()[-1] for scene in scenes]
        named = torch.tensor([shapes.index(name) for name in names], device=options.device)
        images = [read_image(scene["image"], options.image_size) for scene in scenes]
        _, V = model.encode_image(torch.stack(images).to(options.device))
        logits = head(model.vit.forward_head(V, pre_logits=True))
        loss = F.cross_entropy(logits, named)
        optimizer.param_groups[0]["lr"] = learning_rate(step, options.vit_steps, options.lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (logits.argmax(1) == named).float().mean()
        bar.set_postfix_str(f"right {right:.2f}", refresh=False)


def scenes_vit(options):
    """Four convolutions, 6 pixels to a token that sees 26, and one ViT layer: learns shapes where a
    linear patch layer learns colours only (a stem as in arXiv 2106.14881, with batch norm). With
    another 3x3 convolution a token sees farther, and maps point beside the shape."""
    w = options.width
    # in, out, kernel, stride, padding, which centres a token on its patch, or maps are shifted
    sizes = [(3, w // 2, 6, 2, 2), (w // 2, w, 5, 3, 1), (w, w, 3, 1, 1), (w, w, 1, 1, 0)]
    stem = nn.Sequential(*itertools.chain(*itertools.starmap(Conv2dNormActivation, sizes)))
    embed = partial(timm.layers.HybridEmbed, backbone=stem)
    # With a [CLS] matching reads the scene off it, and maps point nowhere.
    how = dict(class_token=False, global_pool="max", num_classes=0, embed_layer=embed)
    size = dict(img_size=options.image_size, patch_size=1, embed_dim=w, depth=1, num_heads=4)
    return timm.models.VisionTransformer(**size, **how)


def make_vit(options):
    """The image encoder; UserError where timm has no such ViT."""
    if options.vit == "scenes":
        insist(options.image_size % 6 == 0, "--image-size: take a multiple of the patch, 6")
        return scenes_vit(options)
    how = dict(pretrained=options.pretrained, num_classes=0, img_size=options.image_size)
    with blaming(f"--vit {options.vit} {how}: no ViT of timm's, or no network"):
        vit = timm.create_model(options.vit, **how)
        patch = vit.patch_embed.patch_size[0]
    insist(options.image_size % patch == 0, f"--image-size: take a multiple of the patch, {patch}")
    return vit


# ------------------------------------------------------------------------------ COCO and JSONL
# Every reader makes records {"image": path or array, "captions": [str, …], "split": str, "targets":
# [{"phrase": str, "boxes": [[x0, y0, x1, y1], …], "mask": …, "tags": …, "object": …}, …],
# "questions": [{"text", "kind", "choices", "answers"}, …]}, and the rest knows only these.
class Skipped:
    """What of the data cannot be used, and why: lines of a file, of whichever process met it."""

    def __init__(self, path, max_bad):
        self.path, self.max_bad, self.added = Path(path), max_bad, set()
        self.total = 0  # images that the readers met

    def add(self, kind, which, why):
        line = json.dumps({"kind": kind, "which": str(which), "why": why}) + "\n"
        if line not in self.added:
            self.added.add(line)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(line)

    def count(self, kind="image"):
        """How many of a kind cannot be used, as far as any process knows."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return len({row["which"] for row in map(json.loads, lines) if row["kind"] == kind})

    def check(self):
        """UserError where more than max_bad of the images cannot be used."""
        bad = self.count()
        said = f"{bad} of {self.total} images cannot be used, more than --max-bad {self.max_bad}"
        insist(bad <= self.max_bad * self.total, f"{said}; {self.path} lists them")


@contextmanager
def blaming(what, skipped=None):
    """What fails inside is a UserError about `what`; or skipped, where `what` is (kind, which)."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # nothing is wrong with the data
    except Exception as error:  # PIL, pickle and torch have as many as there are ways to fail
        missing = " is missing" if isinstance(error, KeyError) else ""
        why = " ".join(f"{error}{missing}".split())[:300]
        if skipped is None:
            raise UserError(f"{what}: {why}") from error
        skipped.add(*what, why)


def read_json(path, *names):
    """The lists of these names in a JSON file; UserError with the file, the line and the fault."""
    with blaming(f"{path}: no JSON object with {names}"):
        data = json.loads(parse.read_text(path))
        return [list(data[name]) for name in names]


def cut_box(box, size):
    """A box cut at the edges of its picture (height, width); UserError where nothing is left."""
    x0, y0, x1, y1 = box
    cut = [max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])]
    insist(cut[0] < cut[2] and cut[1] < cut[3], f"its box {box} has no pixel in the picture")
    return cut


def read_coco(root, split, skipped):
    """Records of COCO 2017's split, in pixels as stored; of "val" with boxes and masks."""
    folder, told = root / f"{split}2017", root / f"annotations/captions_{split}2017.json"
    how = f"python -m tests.paper.convert coco {root} fetches it (20 GB), or see cocodataset.org"
    for path in (told, folder):
        insist(path.exists(), f"--root {root}: there is no {path}; {how}")
    images, captions = read_json(told, "images", "annotations")
    there, records = set(os.listdir(folder)), {}
    for number, entry in enumerate(images):
        with blaming(("image", f"{told.name}, entry {number}"), skipped):
            name, size = entry["file_name"], (entry["height"], entry["width"])
            insist(name in there, f"there is no file {name} in {folder}")
            record = {"image": folder / name, "captions": [], "targets": [], "size": size}
            records[entry["id"]] = record | {"split": split}
    for number, entry in enumerate(captions):
        with blaming(("caption", f"{told.name}, entry {number}"), skipped):
            caption = entry["caption"].strip()
            insist(caption, "it is empty")
            records[entry["image_id"]]["captions"].append(caption)
    if split == "val":
        add_instances(records, root / "annotations/instances_val2017.json", skipped)
    for record in records.values():
        if not record["captions"]:
            skipped.add("image", record["image"], "no caption of it can be used")
    skipped.total += len(images)
    return [record for record in records.values() if record["captions"]]


def add_instances(records, path, skipped):
    """Give COCO's records {id: record} a target for each category: all its instances in the image;
    of one whose mask cannot be used the box is the mask."""
    annotations, categories = read_json(path, "annotations", "categories")
    names = {category["id"]: category["name"] for category in categories}
    targets = {}  # of (image id, category)
    for number, entry in enumerate(annotations):
        where = f"{path.name}, entry {number}"
        with blaming(("annotation", where), skipped):
            record, phrase = records[entry["image_id"]], names[entry["category_id"]]
            (x, y, width, height), size = entry["bbox"], record["size"]
            x0, y0, x1, y1 = box = cut_box([x, y, x + width, y + height], size)
            part = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            with blaming(("mask", where), skipped):
                drawn = decode_mask({"size": size, "parts": [entry["segmentation"]]})
                insist(drawn.any(), "it has no pixel")
                part = entry["segmentation"]
            empty = {"phrase": phrase, "boxes": [], "mask": {"size": size, "parts": []}}
            target = targets.setdefault((entry["image_id"], phrase), empty)
            target["boxes"].append(box)
            target["mask"]["parts"].append(part)
    for (image_id, _), target in targets.items():
        records[image_id]["targets"].append(target)


def decode_mask(mask):
    """A mask (height, width) bool from an array, or from {"size": [height, width], "parts": […]}, a
    part being COCO's polygons [[x, y, x, y, …], …] or its uncompressed run lengths {"counts":
    [zeros, ones, zeros, …]} down the columns."""
    if isinstance(mask, np.ndarray):
        return mask
    height, width = mask["size"]
    drawn = Image.new("1", (width, height))
    for part in mask["parts"]:
        if isinstance(part, dict):
            counts = part["counts"]
            insist(isinstance(counts, list), "its run lengths are compressed")
            runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height)
            drawn.paste(1, mask=Image.fromarray(runs.T))
        else:
            for points in part:
                ImageDraw.Draw(drawn).polygon(points, fill=1)
    return np.asarray(drawn)


def read_record(line, folder):
    """A record from a line of JSONL; what it raises says what is wrong with it."""
    record = json.loads(line)
    name, captions, targets = Path(record["image"]), record["captions"], record.get("targets") or []
    inside = not name.is_absolute() and ".." not in name.parts  # where a link leads is not asked
    insist(inside, f'"image": {name} leads out of {folder}')
    insist((folder / name).is_file(), f'"image": there is no picture {folder / name}')
    good = isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)
    insist(good, '"captions" must be a list of at least one string')
    for target in targets:
        good = target["phrase"].strip() and target["boxes"]
        insist(good, '"targets": a target is {"phrase": …, "boxes": [[x0, y0, x1, y1], …]}')
        for box in target["boxes"]:
            shares = all(0 <= edge <= 1 for edge in box)
            insist(not shares, '"boxes" are in pixels: these look like shares of the picture')
    questions = record.get("questions") or []
    for question in questions:
        good = isinstance(question["text"], str) and question["kind"] and question["answers"]
        good = good and all(isinstance(answer, str) for answer in question["answers"])
        insist(good, '"questions": a question is {"text": …, "kind": …, "answers": ["…", …]}')
        good = "[MASK]" in question["text"] or len(question.get("choices") or []) == 2
        insist(good, '"questions": one without [MASK] has two "choices", the second if it is true')
    read = {"image": folder / name, "targets": targets, "questions": questions}
    return {"split": "train"} | record | read


def read_jsonl(path):
    """(training records, those of all other splits) of a JSONL file; UserError gives the line and
    what is wrong. Where all are for training, every tenth is held out."""
    path, records = Path(path), []
    for number, line in parse.read_lines(path):
        with blaming(f"{path}, line {number}"):
            if line.strip():
                records.append(read_record(line, path.parent))
    if all(record["split"] == "train" for record in records):
        for record in records[9::10] or records[-1:]:
            record["split"] = "val"
        print(f'{path.name}: no line says "split": "val"; every tenth is held out to evaluate on')
    train = [record for record in records if record["split"] == "train"]
    return train, [record for record in records if record["split"] != "train"]


def load_data(options, skipped):
    """(training records, held-out records) of --data; UserError where too many are unusable."""
    if options.data == "scenes":
        train = Scenes(1_000_000, options, "train", held_out=False)
        held_out = list(Scenes(options.eval_images or 500, options, "held out", held_out=True))
    elif options.data == "coco":
        train, held_out = (read_coco(Path(options.root), s, skipped) for s in ("train", "val"))
    else:
        train, held_out = read_jsonl(options.data)
        skipped.total += len(train) + len(held_out)
    held_out = usable(held_out, options, skipped)
    skipped.check()
    insist(held_out, f"{options.data}: there is no image to evaluate on")
    return train, held_out


def load_pixels(image, upright=False):
    """A path or an array as an array (height, width, 3) uint8; as stored, or upright as its EXIF
    tag says; what is transparent is white. UserError where it is no picture."""
    if isinstance(image, np.ndarray):
        return image
    reading = blaming(f"{image}: not readable as a picture")
    # A file, not a path: of that PIL maps a turned TIFF into memory, and garbles it.
    with reading, open(image, "rb") as file, Image.open(file) as picture:
        with suppress(Exception):  # a malformed EXIF block says nothing about the pixels
            if upright:
                picture = ImageOps.exif_transpose(picture)
            picture.getexif().pop(0x0112, None)  # or PIL turns a TIFF as it loads it
        if picture.mode[0] in "IF":  # 16 bits, or floats, which convert() would cut
            grey = np.nan_to_num(np.asarray(picture.convert("F")), posinf=0)
            white = next((top for top in (1, 255) if grey.max() <= 1.05 * top), grey.max())
            grey = 255 * (grey / white).clip(0, 1)
            picture = Image.fromarray(grey.round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return np.array(picture.convert("RGB"))


def read_image(image, side, crop=None):
    """A path or an array as (3, side, side) uint8, squeezed; crop: an rng, for a random part."""
    pixels = torch.from_numpy(np.ascontiguousarray(load_pixels(image))).permute(2, 0, 1)
    if crop:
        size = [round(edge * crop.uniform(0.7, 1)) for edge in pixels.shape[1:]]
        corner = [crop.randint(0, edge - part) for edge, part in zip(pixels.shape[1:], size)]
        pixels = TF.crop(pixels, *corner, *size)
    return TF.resize(pixels, [side, side], antialias=True)


def usable(records, options, skipped):
    """Of each split's first --eval-images those whose picture can be read, and their targets."""
    kept, seen = [], Counter()
    for record in records:
        seen[record["split"]] += 1
        if not 0 < options.eval_images < seen[record["split"]]:
            with blaming(("image", record["image"]), skipped):
                size = load_pixels(record["image"]).shape[:2]
                kept.append(record | {"targets": usable_targets(record, size, skipped)})
    return kept


def usable_targets(record, size, skipped):
    """A record's targets, with what of their boxes lies in its picture (height, width); those of
    which nothing does are left out, and those with a mask of another size."""
    targets, image = [], record["image"]
    for target in record["targets"]:
        boxes, mask = [], target.get("mask")
        for box in target["boxes"]:
            with blaming(("box", image), skipped):
                boxes.append(cut_box(box, size))
        with blaming(("mask", image), skipped):
            shape = size if mask is None else decode_mask(mask).shape
            insist(shape == size, f"{image} has {size} pixels, its mask {shape}")
            targets += [target | {"boxes": boxes}] if boxes else []
    return targets


# --------------------------------------------------------------------------------------- main
def write_whole(path, data):
    """Write text, or a checkpoint, to a temporary file that then takes the name: whatever has the
    name is whole. UserError where that fails, as on a full disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with blaming(f"{path} could not be written, the one before is kept"):
        try:
            with open(part, "wb") as file:
                file.write(data.encode()) if isinstance(data, str) else torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def bert_words(text):
    """BERT's: lower case, no accents; signs and Chinese characters are words of their own."""
    spaced = ""
    for c in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(c)  # P: punctuation, S: symbols, Mn: accents, Cc, Cf: control
        if kind[0] == "P" or kind[0] == "S" and c.isascii() or "\u3400" <= c <= "\u9fff":
            spaced += f" {c} "
        elif c.isspace() or kind not in ("Mn", "Cc", "Cf"):
            spaced += c
    return spaced.split()


def read_checkpoint(path, options):
    """(model, tokenizer, state), the ViT's positions resampled to --image-size; or UserError."""
    with blaming(f"{path} is no checkpoint that fits these options"):
        state = torch.load(path, map_location=options.device, weights_only=True)
        tokenizer, weights, name = Tokenizer(state["words"]), state["model"], "vit.pos_embed"
        options = replace(options, pretrained=False)  # the weights are here: nothing to fetch
        model = MODELS[options.base](options, tokenizer).to(options.device)
        if name in weights:
            prefix = model.vit.pos_embed.shape[1] - math.prod(model.grid)
            resample = timm.layers.resample_abs_pos_embed
            weights[name] = resample(weights[name], model.grid, num_prefix_tokens=prefix)
        model.load_state_dict(weights)
    return model, tokenizer, state


def start_training(path, samples, options, base_steps):
    """(model, teacher, optimizer, steps done, seconds) of a training: with --resume as its own
    checkpoint has them; or from the base, where it goes on from one, or --init; or from scratch."""
    torch.manual_seed(options.seed)
    resumed = options.resume and path.exists()
    source = path if resumed else path.with_name("base.pt") if base_steps else options.init
    if source:
        model, tokenizer, state = read_checkpoint(source, options)
        same = tokenizer.words == samples.tokenizer.words
        insist(same, f"{source}: of other captions than these")
    else:
        model = MODELS[options.base](options, samples.tokenizer).to(options.device)
        if options.data == "scenes":
            name_shapes(model, options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, betas=BETAS)
    if not resumed:
        return model, None, optimizer, 0, 0.0
    optimizer.load_state_dict(state["optimizer"])
    teacher = make_teacher(model) if state["teacher"] else None
    if teacher:
        teacher.load_state_dict(state["teacher"])
    return model, teacher, optimizer, state["step"], state["seconds"]


def save(path, model, teacher, optimizer, step, seconds, samples, options):
    """Write the checkpoint of a training: all that `start_training` needs to go on."""
    state = {"step": step, "seconds": seconds, "options": asdict(options)}
    state |= {"words": samples.tokenizer.words, "model": model.state_dict()}
    state |= {"optimizer": optimizer.state_dict(), "teacher": teacher and teacher.state_dict()}
    if RANK == 0:
        write_whole(path, state)


def insist_finite(values, where):
    wrong = f"{where} is not finite: {dict(values)}"
    mend = "the last checkpoint is kept, --resume with a lower --lr may go on from it"
    insist(all(map(math.isfinite, values.values())), f"{wrong}; {mend}")


def open_metrics(path, name, start):
    """metrics.jsonl to append to, without this training's steps after `start`: a run that was
    killed wrote them, and its last line may be cut short."""
    if RANK > 0:
        return open(os.devnull, "w")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    kept = [row for row in rows if row["run"] != name or row["step"] <= start]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return open(path, "a")


def to_device(batch, device):
    """A batch with its tensors on the device."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True)


PATIENCE = 50  # seconds that a batch is waited for, which a worker may have lost


def start_worker(number):
    """Of a process that loads images: Ctrl-C, and what fails, are the main process's to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")


ONCE = ("resume", "eval_only", "ground", "device")  # asked of one command, not kept with a run
OF_MODEL = ("base", "vit", "image_size", "width", "text_layers", "fusion_layers", "cam_layer")
CHECKPOINTS = ("base.pt", "baseline.pt", "hist.pt")
# What a resumed run may change, beside more --steps; it would do the rest by halves, or not at all.
CHANGEABLE = ("lr", "accumulate", "save_every", "workers", "eval_images", "max_bad")


def table(results):
    """{training: {measure: value}} as text, in percent: a line each, with what chance gives."""
    rows = [("", *results, "chance", "any pixel")]
    first = next(iter(results.values()))
    for name, value in first.items():
        if "_chance" not in name and isinstance(value, float):
            values = [result[name] for result in results.values()]
            values += [first.get(f"{name}_chance"), first.get(f"{name}_chance_pixel")]
            rows.append([name, *("" if v is None else f"{100 * v:.1f}" for v in values)])
    line = "{:34}" + "{:>12}" * (len(results) + 2)
    return "\n".join(line.format(*row) for row in rows)


def free_cores():
    """Cores that no other program uses just now, by the idle time in /proc/stat; all without it.
    Threads that wait for a busy core spin: two on such a one train half as fast as one."""
    cores, stat = os.cpu_count() or 1, Path("/proc/stat")
    with suppress(OSError):
        before = np.array(stat.read_text().split()[1:9], dtype=int)
        time.sleep(0.3)
        spent = np.array(stat.read_text().split()[1:9], dtype=int) - before
        cores = max(1, round(cores * spent[3:5].sum() / spent.sum()))  # idle, waiting for a disk
    return cores


class CommandLine(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; python hist.py --help lists the options")


def use_any_console():
    """A letter that the console does not have is shown as "?", and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has every letter
            stream.reconfigure(errors="replace")


def saved_options(out):
    """What the run in a folder was told; None where there is none."""
    path = Path(out) / "options.json"
    return json.loads(path.read_text()) if path.exists() else None


def parse_options(argv=None):
    """The Options of a command: what was typed; else, for one that goes on from a run, that run's;
    else what suits the data."""
    use_any_console()
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=29)
    cli = CommandLine(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    for f in fields(Options):
        how = {"type": f.type, "metavar": f.type.__name__.upper()}
        how = {bool: {"action": "store_true"}, list: {"nargs": "+"}}.get(f.type, how)
        text = f.metadata["help"] + (f" [{f.default}]" if f.default else "")
        cli.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **how)
    typed = vars(cli.parse_args(argv))
    told = presets(typed)
    if "init" in typed:
        with suppress(Exception):  # what is wrong with it read_checkpoint will say
            given = torch.load(typed["init"], map_location="meta", weights_only=True)["options"]
            told = presets({"base_steps": 0} | {name: given[name] for name in OF_MODEL} | typed)
    if typed.keys() & {"resume", "eval_only", "ground"}:
        saved = saved_options(told["out"])
        insist(saved is not None, f"there is no run in {told['out']}: train first, or say --out")
        if "resume" in typed:
            check_changes(typed, saved)
        told |= saved | typed | {"out": told["out"]}
    options = Options(**told)
    check_options(options)
    return options


def flag(name):
    return "--" + name.replace("_", "-")


def check_changes(typed, saved):
    """UserError where a resumed run cannot change what was typed from what it has."""
    may = f"raise --steps, and change {', '.join(map(flag, CHANGEABLE))}"
    for name in typed.keys() & saved.keys() - {"out", *CHANGEABLE}:
        old, new = saved[name], typed[name]
        good = new == old or name == "steps" and new > old
        insist(good, f"{flag(name)} {new}: this run has {old}; with --resume one may {may}")


def check_options(options):
    """Settle the device; UserError where options do not fit each other, or the machine."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if options.device == "auto":
        options.device = next(device for device in has if has[device])
    for name, value in vars(options).items():
        least = int(name in ("accumulate", "batch_size", "save_every", "image_size", "width"))
        good = not isinstance(value, (int, float)) or value >= least
        insist(good, f"{flag(name)} {value}: {least} or more, please")
    insist(options.base in MODELS, f"--base {options.base}: albef or blip")
    insist(options.steps or options.data != "scenes", "--steps 0: scenes have no end, and no epoch")
    parts = options.accumulate * WORLD
    whole = options.batch_size % parts == 0
    insist(whole, f"--batch-size: take a multiple of {parts}, --accumulate times processes")
    insist(has.get(options.device), f"--device {options.device}: this machine has none")
    named, levels = set(options.levels.split(",")), {*LEVELS, "composition"}
    insist(named <= levels, f"--levels {options.levels}: they are {', '.join(levels)}")
    insist(named & set(LEVELS), "--levels composition: it needs another, until it begins")
    heads, layers = max(4, options.width // 64), options.fusion_layers
    ignored = options.base == "blip" and options.text_layers > 0
    insist(not ignored, "--text-layers: BLIP's text layers all fuse; say --fusion-layers")
    insist(options.width % heads == 0, f"--width: take a multiple of {heads}, its heads")
    insist(options.cam_layer < layers, f"--cam-layer: the fusion layers are 0 to {layers - 1}")
    insist(not (options.pretrained and options.vit == "scenes"), "--pretrained: say --vit NAME too")
    insist(not options.parses or options.data != "scenes", "--parses: scenes are parsed as drawn")
    there = options.init and Path(options.init).resolve().parent == Path(options.out).resolve()
    insist(not there, "--init: it lies in --out, where a run deletes checkpoints; say another")


@contextmanager
def only_writer(out):
    """No other run writes into a folder meanwhile: a file there holds the number of the process,
    and counts nothing when that is gone."""
    lock = out / "running"
    holder = lock.read_text() if lock.exists() else ""
    held = holder.isdigit() and int(holder) != os.getpid()
    if held and os.name != "nt":  # there it would end the process that it asks after
        try:
            os.kill(int(holder), 0)
        except OSError as error:
            held = isinstance(error, PermissionError)  # another person's; others are gone
    said = f"another run writes into {out}, process {holder}; if it does not, delete {lock}"
    insist(not held, said)
    out.mkdir(parents=True, exist_ok=True)
    lock.write_text(str(os.getpid()))
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):
            out.rmdir()  # where nothing was written into it


def prepare(options):
    """(Samples to train on, held-out records) of a run, its folder made and its options written.
    Checkpoints and options there stay as they are until all that was typed is known to fit."""
    out = Path(options.out)
    listed, new = out / "skipped.jsonl", out / "new.skipped.jsonl"
    tokenizer = read_checkpoint(options.init, options)[1] if options.init else None
    if tokenizer is None:  # options that build no model stop here, either way
        MODELS[options.base](options, Tokenizer(Tokenizer.SPECIAL))
    grown = [listed, *map(out.joinpath, (*CHECKPOINTS, "metrics.jsonl", "results.json"))]
    old = [path for path in grown if path.exists() and not options.resume]
    data = (saved_options(out) or {}).get("data", options.data)
    same = not old or os.path.abspath(data) == os.path.abspath(options.data)
    insist(same, f"{out} holds a run on {data}: say another --out, or delete it")
    if RANK == 0:
        new.unlink(missing_ok=True)  # of a command that was refused
    skipped = Skipped(listed if options.resume else new, options.max_bad)
    records, held_out = load_data(options, skipped)
    insist(len(records), f"{options.data}: there is no image to train on")
    options.steps = options.steps or max(1, 10 * len(records) // options.batch_size)  # ten epochs
    # Every word of the scenes is in any two thousand of them.
    some = range(100_000, 102_000) if options.data == "scenes" else range(len(records))
    captions = (caption for i in some for caption in records[i]["captions"])
    tokenizer = tokenizer or Tokenizer.build(captions, options.vocab_size)
    samples = Samples(records, tokenizer, options, skipped)
    for name in CHECKPOINTS:  # what does not fit is refused here
        if options.resume and (out / name).exists():
            start_training(out / name, samples, options, 0)
    barrier()
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        for path in old:
            print(f"{path}, of an older run, is deleted", file=sys.stderr)
            path.unlink()
        kept = {name: value for name, value in asdict(options).items() if name not in ONCE}
        write_whole(out / "options.json", json.dumps(kept, indent=1))
        if skipped.path.exists():
            skipped.path.replace(listed)
    skipped.path = listed
    barrier()
    return samples, held_out


def run(options):
    """Train the models, or none with --eval-only, and evaluate them on the same records."""
    if options.eval_only:
        skipped = Skipped(writable(Path(options.out)) / "eval-only.skipped.jsonl", options.max_bad)
        skipped.path.unlink(missing_ok=True)
        return report(options, *load_data(options, skipped), skipped)
    with only_writer(Path(options.out)) if RANK == 0 else nullcontext():
        samples, held_out = prepare(options)
        levels = options.levels.split(",")
        if options.base_steps:
            train("base", ["caption"], samples, options, options.base_steps)
        train("baseline", ["caption"], samples, options, options.steps)
        if levels != ["caption"]:
            train("hist", levels, samples, options, options.steps)
        report(options, samples.records, held_out, samples.skipped)


def writable(folder):
    """The folder; a temporary one where it cannot be written into."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="hist-"))


def report(options, records, held_out, skipped):
    """Evaluate OUT's checkpoints; print the table, write the pictures and results.json: {model:
    {measure: value}}, or where there are several splits {split: the same}."""
    out, models, results = Path(options.out), {}, {}
    if RANK > 0:
        return
    for path in filter(Path.exists, (out / "baseline.pt", out / "hist.pt")):
        model, tokenizer, state = read_checkpoint(path, options)
        answers = common_answers(records, tokenizer)
        models[path.stem] = model
        results[path.stem], pairs = evaluate(model, tokenizer, held_out, options, answers)
        print(f"{path.stem}: {state['step']} steps in {state['seconds']:.0f} s")
    insist(models, f"there is no baseline.pt and no hist.pt in {out}: train first")
    out = skipped.path.parent
    if options.data != state["options"]["data"]:  # of --eval-only: the run's own results stay
        out = out / f"on-{Path(options.data).stem}"
        out.mkdir(exist_ok=True)
    splits = {record["split"]: {} for record in held_out}  # split: {model: its measures}
    for split, measures in splits.items():
        measures.update({name: result[split] for name, result in results.items()})
        some = next(iter(measures.values()))
        counts = ", ".join(f"{some[name]} {name}" for name in ("images", "phrases", "pairs"))
        print(f"\n{options.data}, {split}: {counts}; seed {options.seed}; percent\n")
        print(table(measures) + "\n")
    if skipped.count():
        print(f"{skipped.count()} images could not be used; {skipped.path} lists them")
    if len(splits) == 1:
        (results,) = splits.values()
    write_whole(out / "results.json", json.dumps(results, indent=1))
    several = [record for record in held_out if len(record["targets"]) > 1] or held_out
    draw_grounding(models, tokenizer, several[:8], options, out / "grounding.png")
    if pairs:
        best = best_threshold(pairs)
        worst = {id(p.record): p.record for p in sorted(pairs, key=lambda p: p.iou[best])}
        draw_grounding(models, tokenizer, list(worst.values())[:4], options, out / "worst.png")
    if not options.eval_only:
        draw_curves(out / "metrics.jsonl")
    print(f"in {out}: {' '.join(sorted(path.name for path in out.glob('*.*')))}")


def pad_to_square(pixels):
    """Pixels (height, width, 3) on a square of the colour of their border: a model of the scenes
    knows no shape that is squeezed."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    side, colour = max(pixels.shape), np.median(border, 0).astype(int).tolist()
    return np.array(ImageOps.pad(Image.fromarray(pixels), (side, side), color=tuple(colour)))


def look(options):
    """--ground PICTURE PHRASE …: where the last trained model looks in a person's own picture."""
    picture, *phrases = options.ground
    insist(phrases, '--ground PICTURE "a red circle" "a blue star": say at least one phrase')
    path = Path(options.out) / "hist.pt"
    path = path if path.exists() else path.with_name("baseline.pt")
    model, tokenizer, _ = read_checkpoint(path, options)
    words = tokenizer.split(" ".join(phrases))
    unknown = {word for word in words if tokenizer.unk_id in tokenizer.pieces(word)}
    if unknown:
        print(f"not in the vocabulary, read as [UNK]: {', '.join(sorted(unknown))}")
    pixels = pad_to_square(load_pixels(picture, upright=True))
    record = {"image": pixels, "captions": [Path(picture).name], "targets": [], "ask": phrases}
    drawn = writable(path.parent) / "ground.png"
    draw_grounding({path.stem: model}, tokenizer, [record], options, drawn)
    print(drawn)


def sentence(error):
    """What a person is told of an error; one of the program's own is raised again."""
    said = " ".join(str(error).split("UserError: ")[-1].split())  # a worker's has its traceback
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said:
        return f"out of memory: lower --batch-size or --image-size, or raise --accumulate: {said}"
    lost = "DataLoader worker (pid|DataLoader timed out|shared memory|open files|ancdata".split("|")
    if isinstance(error, ConnectionError) or any(text in said for text in lost):
        how = "--workers 0 does without; docker run --shm-size 8g gives them more shared memory, "
        how += "ulimit -n 4096 more open files"
        return f"--workers: what one has loaded did not arrive; {how}: {said}"
    if isinstance(error, RuntimeError):
        raise error
    return said


@contextmanager
def told(program):
    """A mistake, a full disk or too little memory ends a program with one line and status 2; Ctrl-C
    with what it is told and 130."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"{program}: stopped{stop}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        print(f"{program}: {sentence(error)}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    """Do what was typed."""
    with told("hist.py"):
        options = parse_options(argv)
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(free_cores())
        if WORLD > 1:
            torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
        threads = f"{torch.get_num_threads()} threads (OMP_NUM_THREADS says otherwise)"
        print(f"hist.py on {options.device}, {threads}, into {options.out}", file=sys.stderr)
        try:
            (look if options.ground else run)(options)
        except KeyboardInterrupt:
            command = f"; python hist.py --resume --out {shlex.quote(options.out)} goes on"
            raise KeyboardInterrupt(command if saved_options(options.out) else "") from None
        if WORLD > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
