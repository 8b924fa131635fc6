"""ALBEF's published checkpoint: BERT's pieces of words against `tokenizers`, its names and numbers
against torch's own layers, and what goes on from it with --init, --ground and --eval-only."""

import json
import random

import pytest
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import COCO_MINI, ROOT, lines, options, own_folder, refused

import hist
from tests.paper import albef

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = "a dog play ##ing ##s ##ed ball cafe red - , . ' # 20 ##° ##c 中 文 t shirt s".split()
WORDS = [*SPECIAL, *PIECES]
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture
def bert():
    return hist.Tokenizer(WORDS)


# ------------------------------------------------------------------------------- BERT's vocabulary
@pytest.mark.parametrize(
    "text, said",
    [
        ("A dog playing", "a dog play ##ing"),
        ("Dogs played, a red ball.", "dog ##s play ##ed , a red ball ."),
        ("CAFÉ\ta\u00a0dog\n", "cafe a dog"),  # accents, and every kind of space
        ("a dog's t-shirt", "a dog ' s t - shirt"),
        ("a 20°C ball", "a 20 ##° ##c ball"),  # a sign outside ASCII is a letter
        ("a\u200ddog\x07s \ufe0fball", "[UNK] ball"),  # "adogs" without its control characters
        ("a中文dog", "a 中 文 dog"),
        ("a #dog", "a # dog"),
        ("playdog zebra", "[UNK] [UNK]"),  # "play", and no "##dog"
        ("a" * 101 + " dog", "[UNK] dog"),
        ("the dog is [MASK].", "[UNK] dog [UNK] [MASK] ."),
        ("", ""),
    ],
)
def test_a_text_is_cut_as_bert_cuts_it(bert, text, said):
    ids = bert.encode(text)
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert [WORDS[i] for i in ids[1:-1]] == said.split()


def test_a_long_text_ends_with_sep_all_the_same(bert):
    ids = bert.encode("playing " * 90)
    assert len(ids) == hist.MAX_TOKENS and ids[-1] == SEP and ids.count(SEP) == 1


def test_pieces_are_read_back_as_words(bert):
    ids = bert.batch(["dogs played a ball", "red"])
    assert ids[1].tolist() == [CLS, bert.ids["red"], SEP, PAD, PAD, PAD, PAD, PAD]
    assert bert.decode(ids[0].tolist()) == "dogs played a ball"
    assert bert.decode(ids[1].tolist()) == "red"


def test_masked_words_are_whole_words(bert):
    ids, rng, shares = bert.encode("dogs zebra played a ball"), random.Random(0), []
    words = [(1, 2), (4, 5), (6,), (7,)]  # 3 is [UNK]
    for _ in range(2000):
        masked, labels = bert.mask_words(ids, rng)
        hidden = {place for place, label in enumerate(labels) if label != -100}
        chosen = [word for word in words if hidden & set(word)]
        assert chosen and hidden == {place for word in chosen for place in word}
        assert all(labels[place] == ids[place] for place in hidden)
        assert all(masked[place] == i for place, i in enumerate(ids) if place not in hidden)
        shares.append([masked[place] == MASK for place in hidden])
    shares = [share for row in shares for share in row]
    assert sum(shares) / len(shares) == pytest.approx(0.8, abs=0.02)
    for text in ("", "zebra"):
        assert bert.mask_words(bert.encode(text), rng)[1] == [-100] * len(bert.encode(text))


def test_words_without_pieces_are_masked_with_the_draws_they_always_were():
    tokenizer = hist.Tokenizer([*hist.Tokenizer.SPECIAL, *"abcdefgh"])
    one, two = random.Random(3), random.Random(3)
    for _ in range(300):
        ids = [1, *two.choices(range(3, 12), k=6)]
        assert ids == [1, *one.choices(range(3, 12), k=6)]
        known = [place for place in range(1, 7) if ids[place] != 3]
        hidden = [place for place in known if one.random() < hist.MASKED_SHARE]
        masked, labels = list(ids), [-100] * 7
        for place in hidden or known and [one.choice(known)]:
            labels[place], another = ids[place], one.randrange(4, 12)
            masked[place] = one.choices((2, another, ids[place]), (8, 1, 1))[0]
        assert tokenizer.mask_words(ids, two) == (masked, labels)


@pytest.mark.parametrize("words", [[*SPECIAL[1:], "##s", "[PAD]"], ["[PAD]", "[UNK]", "##s"]])
def test_a_vocabulary_without_bert_s_special_words_is_refused(words):
    with pytest.raises((KeyError, hist.UserError)):
        hist.Tokenizer(words)


def captions():
    """2,000 captions, every other one with letters in it that captions seldom have."""
    said = [row["caption"] for path in ROOT.glob("tests/coco_*.jsonl") for row in lines(path)]
    for path in ROOT.glob("tests/*.txt"):
        said += path.read_text(encoding="utf-8").splitlines()
    for path in COCO_MINI.glob("annotations/captions_*.json"):
        said += [row["caption"] for row in json.loads(path.read_text())["annotations"]]
    rng, strange = random.Random(0), "éÀñß°€½…—“”’#$_`^\t\u00a0\u200d\ufe0f😀中ИΔ²ﬁ‐"
    for number in range(2000):
        letters = list(said[number % len(said)])
        for _ in range(number % 2 * 4):
            letters.insert(rng.randrange(len(letters) + 1), rng.choice(strange))
        yield "".join(letters)


def test_the_pieces_are_those_of_bert_s_own_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    texts = list(captions())
    trainer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(texts, vocab_size=500, limit_alphabet=60, show_progress=False)
    ids = trainer.get_vocab()
    theirs = tokenizers.BertWordPieceTokenizer(ids, lowercase=True)
    theirs.enable_truncation(hist.MAX_TOKENS)
    ours = hist.Tokenizer(sorted(ids, key=ids.get))
    expected = [theirs.encode(text).ids for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    known = [i for row in expected for i in row]
    assert len(texts) == 2000 and 0 < known.count(ours.unk_id) < 0.2 * len(known)
    assert sum(ours.words[i].startswith("##") for i in known) > 0.2 * len(known)


# ------------------------------------------------------------------- the published names, in small
WIDTH, IMAGE_WIDTH, SIDE, TEXT, FUSION, PLACES = 64, 192, 48, 6, 6, 80


def linear(weights, name, rows, columns):
    weights[f"{name}.weight"] = torch.randn(rows, columns) * columns**-0.5
    weights[f"{name}.bias"] = torch.randn(rows) * 0.1


def norm(weights, name, width):
    weights[f"{name}.weight"] = 1 + torch.randn(width) * 0.1
    weights[f"{name}.bias"] = torch.randn(width) * 0.1


def vision(weights, name):
    """Names and shapes of ALBEF's models/vit.py."""
    weights[f"{name}.cls_token"] = torch.randn(1, 1, IMAGE_WIDTH)
    weights[f"{name}.pos_embed"] = torch.randn(1, (SIDE // 16) ** 2 + 1, IMAGE_WIDTH)
    weights[f"{name}.patch_embed.proj.weight"] = torch.randn(IMAGE_WIDTH, 3, 16, 16) * 0.05
    weights[f"{name}.patch_embed.proj.bias"] = torch.randn(IMAGE_WIDTH)
    for block in (f"{name}.blocks.{number}" for number in range(12)):
        norm(weights, f"{block}.norm1", IMAGE_WIDTH)
        linear(weights, f"{block}.attn.qkv", 3 * IMAGE_WIDTH, IMAGE_WIDTH)
        linear(weights, f"{block}.attn.proj", IMAGE_WIDTH, IMAGE_WIDTH)
        norm(weights, f"{block}.norm2", IMAGE_WIDTH)
        linear(weights, f"{block}.mlp.fc1", 4 * IMAGE_WIDTH, IMAGE_WIDTH)
        linear(weights, f"{block}.mlp.fc2", IMAGE_WIDTH, 4 * IMAGE_WIDTH)
    norm(weights, f"{name}.norm", IMAGE_WIDTH)


def language(weights, name, bert):
    """Names and shapes of ALBEF's models/xbert.py; without "bert." those of its BertModel alone."""
    inner = f"{name}.bert" if bert else name
    weights[f"{inner}.embeddings.position_ids"] = torch.arange(PLACES)[None]
    for kind, rows in (("word", len(WORDS)), ("position", PLACES), ("token_type", 2)):
        weights[f"{inner}.embeddings.{kind}_embeddings.weight"] = torch.randn(rows, WIDTH)
    norm(weights, f"{inner}.embeddings.LayerNorm", WIDTH)
    for number in range(TEXT + FUSION):
        layer = f"{inner}.encoder.layer.{number}"
        sources = [("attention", WIDTH), ("crossattention", IMAGE_WIDTH)]
        for kind, source in sources[: 1 + (number >= TEXT)]:
            linear(weights, f"{layer}.{kind}.self.query", WIDTH, WIDTH)
            linear(weights, f"{layer}.{kind}.self.key", WIDTH, source)
            linear(weights, f"{layer}.{kind}.self.value", WIDTH, source)
            linear(weights, f"{layer}.{kind}.output.dense", WIDTH, WIDTH)
            norm(weights, f"{layer}.{kind}.output.LayerNorm", WIDTH)
        linear(weights, f"{layer}.intermediate.dense", 4 * WIDTH, WIDTH)
        linear(weights, f"{layer}.output.dense", WIDTH, 4 * WIDTH)
        norm(weights, f"{layer}.output.LayerNorm", WIDTH)
    if bert:
        head = f"{name}.cls.predictions"
        weights[f"{head}.bias"] = weights[f"{head}.decoder.bias"] = torch.randn(len(WORDS))
        linear(weights, f"{head}.transform.dense", WIDTH, WIDTH)
        norm(weights, f"{head}.transform.LayerNorm", WIDTH)
        weights[f"{head}.decoder.weight"] = weights[f"{inner}.embeddings.word_embeddings.weight"]


def published(bert=True, momentum=True):
    """A state dictionary as salesforce/ALBEF writes it, random and small."""
    torch.manual_seed(0)
    weights = {}
    for copy in ("", "_m")[: 1 + momentum]:
        vision(weights, f"visual_encoder{copy}")
        language(weights, f"text_encoder{copy}", bert)
        linear(weights, f"vision_proj{copy}", 256, IMAGE_WIDTH)
        linear(weights, f"text_proj{copy}", 256, WIDTH)
    linear(weights, "itm_head", 2, WIDTH)
    weights["temp"] = torch.tensor(0.09)
    if momentum:
        weights |= {"image_queue": torch.randn(256, 8), "text_queue": torch.randn(256, 8)}
        weights["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    return weights


def convert(folder, state):
    """The converter's command, on a state; the checkpoint that it writes."""
    torch.save(state, folder / "ALBEF.pth")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    target = folder / "albef/base.pt"
    albef.main([str(path) for path in (folder / "ALBEF.pth", folder / "vocab.txt", target)])
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint."""
    return convert(tmp_path_factory.mktemp("published"), {"model": published(), "epoch": 3})


def read(path, **changes):
    """(model, tokenizer, state) of a checkpoint, by the options that it holds."""
    state = torch.load(path, weights_only=True)
    return hist.read_checkpoint(
        path, hist.Options(**state["options"] | {"device": "cpu"} | changes)
    )


def test_published_weights_fill_every_weight_and_none_is_left(tmp_path, capsys):
    model, tokenizer, state = read(convert(tmp_path, {"model": published()}))
    said = capsys.readouterr().out.splitlines()
    left = "image_queue queue_ptr text_encoder.embeddings.position_ids text_encoder_m"
    left += " text_proj_m text_queue vision_proj_m visual_encoder_m"
    assert said[0] == f"left out: {left}"
    assert said[1] == "missing, to be learnt:"
    assert tokenizer.words == WORDS
    o = hist.Options(**state["options"])
    assert (o.vit, o.image_size, o.width) == ("vit_tiny_patch16_224", SIDE, WIDTH)
    assert (o.text_layers, o.fusion_layers, o.cam_layer) == (6, 6, 2)  # the third fusion layer
    kept = json.loads((tmp_path / "albef/options.json").read_text())
    assert kept.items() <= state["options"].items()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bare_weights_of_a_fine_tuned_model_have_no_word_head(tmp_path, capsys):
    """As refcoco.pth: not under "model", BertModel's names, no momentum."""
    model, _, _ = read(convert(tmp_path, published(bert=False, momentum=False)))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "left out: text_encoder.embeddings.position_ids"
    names = said[1].removeprefix("missing, to be learnt: ").split()
    assert names and all(name.startswith("word_head.") for name in names)
    weights = published(bert=False, momentum=False)
    theirs = weights["text_encoder.encoder.layer.8.crossattention.output.dense.weight"]
    assert (model.fusion_layers[2].cross_attention.out.weight == theirs).all()


def without(start):
    return {name: w for name, w in published().items() if not name.startswith(start)}


def deeper():
    weights = published()
    block = {name.replace("blocks.11", "blocks.12"): w for name, w in weights.items()}
    return weights | block


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: torch.randn(3), "no dictionary of weights"),
        (lambda: {"weight": torch.randn(3)}, "no text_encoder"),
        (lambda: without("text_encoder"), "no text_encoder"),
        (lambda: without("itm_head"), "match_head.bias"),
        (lambda: without("visual_encoder.norm"), "vit.norm"),
        (lambda: without("text_encoder.bert.encoder.layer.3.output"), "text_layers.3.mlp.2"),
        (deeper, "vit.blocks.12"),
        (lambda: {"model": {"word_embedding.weight": torch.randn(9, 8)}}, "no text_encoder"),
    ],
)
def test_what_is_no_albef_is_refused_in_one_sentence(tmp_path, capsys, make, said):
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path, make())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
    assert error.startswith("albef: ") and "ALBEF.pth" in error
    assert not (tmp_path / "albef").exists()


def test_a_truncated_file_and_a_wrong_vocabulary_are_refused(tmp_path, capsys, converted):
    vocabulary, target = tmp_path / "vocab.txt", tmp_path / "albef/base.pt"
    whole = converted.parents[1] / "ALBEF.pth"
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:100_000])
    for source, words in ((cut, WORDS), (whole, WORDS[:-1]), (converted, WORDS)):
        vocabulary.write_text("\n".join(words), encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            albef.main([str(source), str(vocabulary), str(target)])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not target.exists()


# ----------------------------------------------------------------------- its numbers, against torch
class Crossing(nn.Module):
    """Cross-attention head by head, for torch's decoder layer; each head's A is kept."""

    def __init__(self, part, name):
        super().__init__()
        self.part, self.name, self.A = part, name, []

    def forward(self, x, V, _, **how):
        q, k, v = (
            F.linear(source, **self.part(f"{self.name}.self.{kind}"))
            for source, kind in ((x, "query"), (V, "key"), (V, "value"))
        )
        seen = []
        for head in torch.arange(WIDTH).split(WIDTH // 4):
            A = (q[..., head] @ k[..., head].mT / (WIDTH // 4) ** 0.5).softmax(-1)
            self.A.append(A)
            seen.append(A @ v[..., head])
        return F.linear(torch.cat(seen, -1), **self.part(f"{self.name}.output.dense")), None


class Reference:
    """ALBEF by torch's own layers, straight from the published names: one text, one image."""

    def __init__(self, weights):
        self.weights = {name: w.double() for name, w in weights.items()}

    def part(self, name):
        """{"weight": …, "bias": …} of a module."""
        return {kind: self.weights[f"{name}.{kind}"] for kind in ("weight", "bias")}

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], **self.part(name), eps=eps)

    def layer(self, kind, names, qkv, heads, **how):
        """A layer of torch's, its modules loaded from {its name: the published one}."""
        width = qkv["weight"].shape[1]
        how |= {"activation": "gelu", "batch_first": True, "dropout": 0}
        layer = kind(width, heads, 4 * width, **how).double()
        for theirs, name in names.items():
            layer.get_submodule(theirs).load_state_dict(self.part(name))
        qkv = {f"in_proj_{name}": w for name, w in qkv.items()}
        layer.self_attn.load_state_dict(qkv, strict=False)
        return layer

    def see(self, pixels):
        """Tokens V of an image (1, 3, side, side) of bytes, normalised as CLIP's."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        patches = self.part("visual_encoder.patch_embed.proj")
        x = F.conv2d(((pixels / 255 - mean) / std).double(), stride=16, **patches)
        x = torch.cat([self.weights["visual_encoder.cls_token"], x.flatten(2).mT], 1)
        x = x + self.weights["visual_encoder.pos_embed"]
        names = {"norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "attn.proj"}
        names |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
        for block in (f"visual_encoder.blocks.{n}" for n in range(12)):
            source = {theirs: f"{block}.{name}" for theirs, name in names.items()}
            how = {"norm_first": True, "layer_norm_eps": 1e-6}
            qkv = self.part(f"{block}.attn.qkv")
            x = self.layer(nn.TransformerEncoderLayer, source, qkv, 3, **how)(x)
        return self.norm(x, "visual_encoder.norm", 1e-6)

    def read(self, ids):
        """The embeddings of a text (1, L)."""
        kinds = {"word": ids, "position": torch.arange(ids.shape[1])[None], "token_type": 0 * ids}
        name = "text_encoder.bert.embeddings"
        x = sum(self.weights[f"{name}.{k}_embeddings.weight"][i] for k, i in kinds.items())
        return self.norm(x, f"{name}.LayerNorm", 1e-12)

    def bert(self, number, x, V=None):
        """(x after layer `number` of the text encoder, its cross-attention [A, …] by head)."""
        name, how = f"text_encoder.bert.encoder.layer.{number}", {"layer_norm_eps": 1e-12}
        names = {"self_attn.out_proj": "attention.output.dense", "linear2": "output.dense"}
        names |= {"norm1": "attention.output.LayerNorm", "linear1": "intermediate.dense"}
        names |= {"norm2": "output.LayerNorm"}
        if V is not None:
            names |= {"norm2": "crossattention.output.LayerNorm", "norm3": "output.LayerNorm"}
        source = {theirs: f"{name}.{ours}" for theirs, ours in names.items()}
        parts = [self.part(f"{name}.attention.self.{kind}") for kind in ("query", "key", "value")]
        qkv = {kind: torch.cat([part[kind] for part in parts]) for kind in ("weight", "bias")}
        if V is None:
            return self.layer(nn.TransformerEncoderLayer, source, qkv, 4, **how)(x), []
        layer = self.layer(nn.TransformerDecoderLayer, source, qkv, 4, **how)
        layer.multihead_attn = Crossing(self.part, f"{name}.crossattention")
        return layer(x, V), layer.multihead_attn.A

    def __call__(self, pixels, ids):
        """{name: number} of what ALBEF gives for a text (1, L) and an image."""
        V, x = self.see(pixels), self.read(ids)
        for number in range(TEXT):
            x, _ = self.bert(number, x)
        features = {"text": F.linear(x[:, 0], **self.part("text_proj"))}
        features |= {"image": F.linear(V[:, 0], **self.part("vision_proj"))}
        found = {name: row / row.norm() for name, row in features.items()}
        attentions = {}
        for number in range(TEXT, TEXT + FUSION):
            x, attentions[number] = self.bert(number, x, V)
        heads = attentions[8]  # the third fusion layer's
        found["itm"] = F.linear(x[:, 0], **self.part("itm_head"))
        slopes = torch.autograd.grad(found["itm"][0, 1], heads, retain_graph=True)
        cam = sum(A * slope.clamp(min=0) for A, slope in zip(heads, slopes)) / len(heads)
        found["cam"] = cam[:, :, 1:].mean(1).reshape(1, SIDE // 16, SIDE // 16)
        head = "text_encoder.cls.predictions"
        x = F.gelu(F.linear(x, **self.part(f"{head}.transform.dense")))
        x = self.norm(x, f"{head}.transform.LayerNorm", 1e-12)
        found["mlm"] = F.linear(x, **self.part(f"{head}.decoder"))
        return found


def test_itc_itm_mlm_and_grad_cam_are_albef_s(converted):
    model, tokenizer, state = read(converted)
    cam_layer, reference = state["options"]["cam_layer"], Reference(published())
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    texts = ["a dog playing", "a red ball, dogs and a cafe's 20°c t-shirt", "ball [MASK]"]
    ids = tokenizer.batch(texts)  # of three lengths, padded
    with torch.no_grad():
        image_features, V = model.encode_image(images)
        image_kv = model.project_image(V)
        T, mask, text_features = model.encode_text(ids)
        states = model.fuse(T, mask, image_kv)[0]
        logits = model.word_head(states)
    maps, _ = hist.locate(model, ids, image_kv, cam_layer)
    for n, text in enumerate(texts):
        alone = tokenizer.batch([text])
        there = reference(images[n : n + 1], alone)
        ours = {"image": image_features[n : n + 1], "text": text_features[n : n + 1]}
        ours |= {"itm": model.match_head(states[n : n + 1, 0]), "cam": maps[n : n + 1]}
        ours |= {"mlm": logits[n : n + 1, : alone.shape[1]]}
        for name, value in there.items():
            size = value.abs().max().item()
            torch.testing.assert_close(ours[name].double(), value, rtol=0, atol=1e-5 * size)
        assert there["cam"].max() > 0


# ------------------------------------------------------------------------------- going on from it
TINY = "--batch-size 4 --steps 3 --eval-images 4 --workers 0 --device cpu".split()


def test_hist_goes_on_from_albef_at_another_image_size(here, converted):
    own_folder(here)
    arguments = ["--data", "my.jsonl", "--init", str(converted), "--image-size", "32", "--lr", "0"]
    hist.main([*arguments, *TINY, "--composition-start", "0"])
    state = torch.load(here / "out/my/hist.pt", weights_only=True)
    o, first = hist.Options(**state["options"]), torch.load(converted, weights_only=True)
    assert state["words"] == WORDS and (o.base_steps, o.cam_layer, o.fusion_layers) == (0, 2, 6)
    place = "vit.pos_embed"
    assert state["model"][place].shape == (1, 5, IMAGE_WIDTH)
    resampled = timm.layers.resample_abs_pos_embed(first["model"][place], [2, 2])
    torch.testing.assert_close(state["model"][place], resampled)
    for name in first["model"].keys() - {place}:  # the rate was 0
        assert (state["model"][name] == first["model"][name]).all(), name
    rows = [row for row in lines(here / "out/my/metrics.jsonl") if row["run"] == "hist"]
    assert all({"caption_mlm", "phrase_itc", "subject_itm"} <= row.keys() for row in rows)
    assert "composition" in rows[-1]
    assert not (here / "out/my/base.pt").exists()


def test_ground_and_eval_only_take_the_converted_model(here, converted, capsys):
    own_folder(here)
    hist.main(["--ground", "3.png", "dogs playing", "a red zebra", "--out", str(converted.parent)])
    said = capsys.readouterr().out
    assert "read as [UNK]: zebra" in said and (converted.parent / "ground.png").exists()
    hist.main(["--eval-only", "--data", "my.jsonl", "--out", str(converted.parent), *TINY])
    results = json.loads((converted.parent / "on-my/results.json").read_text())
    assert results["baseline"]["images"] == 3 and "r1_image_to_text" in results["baseline"]


def test_photographs_after_scenes_with_the_words_and_the_model_of_the_scenes(here):
    own_folder(here)
    o, words = options(), [*hist.Tokenizer.SPECIAL, "a", "cat", "circle"]
    first = hist.ALBEF(o, hist.Tokenizer(words)).state_dict()
    torch.save({"words": words, "model": first, "options": hist.asdict(o)}, "alone.pt")
    hist.main(
        ["--data", "my.jsonl", "--init", "alone.pt", *TINY, "--lr", "0", "--levels", "phrase"]
    )
    state = torch.load(here / "out/my/hist.pt", weights_only=True)
    assert state["words"] == words and state["options"]["width"] == 32
    kept = [name for name in first if not name.startswith("vit.")]  # batch norm counts on
    assert all((state["model"][name] == first[name]).all() for name in kept)
    blip = hist.asdict(options(base="blip", text_layers=0))
    torch.save({"words": words, "model": {}, "options": blip}, "blip.pt")
    o = hist.parse_options(["--init", "blip.pt", "--device", "cpu"])
    assert (o.base, o.out) == ("blip", "out/scenes-blip")  # not where ALBEF's run may lie


def test_init_is_refused_where_it_is_no_checkpoint_or_would_be_lost(here, capsys, converted):
    own_folder(here)
    (here / "bad.pt").write_bytes(b"no checkpoint")
    said = refused(capsys, "--data", "my.jsonl", "--init", "bad.pt", *TINY)
    assert "bad.pt is no checkpoint" in said
    said = refused(capsys, "--data", "my.jsonl", "--init", "out/my/base.pt", *TINY)
    assert "--init" in said and "--out" in said
    said = refused(capsys, "--data", "my.jsonl", "--init", converted, "--width", "32", *TINY)
    assert "no checkpoint that fits" in said


def test_a_run_is_not_resumed_at_another_image_size(here, capsys):
    own_folder(here)
    how = ["--data", "my.jsonl", *TINY, "--vit", "vit_tiny_patch16_224", "--width", "32"]
    hist.main([*how, "--image-size", "32", "--levels", "caption"])
    said = refused(capsys, "--resume", "--out", "out/my", "--image-size", "48", "--steps", "5")
    assert "--image-size 48: this run has 32" in said


def test_positions_without_a_cls_token_are_resampled_too(tmp_path):
    o = options(vit="deit3_small_patch16_224", image_size=32, width=32)
    model = hist.ALBEF(o, hist.Tokenizer(hist.Tokenizer.SPECIAL))
    state = {"words": hist.Tokenizer.SPECIAL, "model": model.state_dict()}
    torch.save(state, tmp_path / "a.pt")
    for side, places in ((32, 4), (48, 9)):
        again, _, _ = hist.read_checkpoint(tmp_path / "a.pt", hist.replace(o, image_size=side))
        assert again.vit.pos_embed.shape == (1, places, 384)
    same, _, _ = hist.read_checkpoint(tmp_path / "a.pt", o)
    assert (same.vit.pos_embed == model.vit.pos_embed).all()
