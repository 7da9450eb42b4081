import json
import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from zo2jax.models.tokenizers import read_tokenizer

END = "<|endoftext|>"
OPT_CONFIG = {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"} | {
    name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}
    for name, token in {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}.items()
}


def write(folder, files):
    """Writes bytes, text, or JSON; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


# ids by hand: letters, "Ġ" for a space, then he, ll, hell, hello, Ġhe
SMALL = {
    t: i for i, t in enumerate(["h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello", "Ġhe", "</s>", END, "<pad>"])
}
MERGES = "#version: 0.2\nh e\nl l\nhe ll\nhell o\nĠ he\n"


def small(folder, **files):
    return write(
        folder, {"vocab.json": SMALL, "merges.txt": MERGES} | {k.replace("__", "."): v for k, v in files.items()}
    )


BOS = {"add_bos_token": True}
BY_HAND = {  # family, other files, text, ids
    "merges": ("gpt2", {}, "hello", [8]),
    "longest": ("gpt2", {}, "helhell", [5, 2, 7]),
    "first merges first": ("gpt2", {}, "he hello hel", [5, 4, 8, 9, 2]),
    "no merge over special tokens": ("gpt2", {}, f"he{END}llo", [5, 11, 6, 3]),
    "end alone": ("gpt2", {}, END, [11]),
    "empty": ("gpt2", {}, "", []),
    "opt": ("opt", {}, "hello", [10, 8]),
    "opt, empty": ("opt", {}, "", [10]),
    "opt, no bos": ("opt", {"tokenizer_config__json": {"add_bos_token": False}}, "hello</s>", [8, 10]),
    "opt, other bos": ("opt", {"tokenizer_config__json": {"bos_token": "<pad>"}}, "he", [12, 5]),
    "gpt2 with bos": ("gpt2", {"tokenizer_config__json": BOS}, "he", [11, 5]),
    "bos in the map": (
        "gpt2",
        {"tokenizer_config__json": BOS, "special_tokens_map__json": {"bos_token": {"content": "<pad>"}}},
        "he<pad>",
        [12, 5, 12],
    ),
    "the map wins": (
        "gpt2",
        {"tokenizer_config__json": BOS | {"bos_token": "<pad>"}, "special_tokens_map__json": {"bos_token": "</s>"}},
        "he",
        [10, 5],
    ),
    "pad": ("gpt2", {"special_tokens_map__json": {"pad_token": "<pad>"}}, "<pad>he", [12, 5]),
    "null": ("gpt2", {"special_tokens_map__json": {"pad_token": None}}, "he", [5]),
    "new token": ("gpt2", {"special_tokens_map__json": {"pad_token": "hello"}}, "hehello", [5, 8]),
    "new id": ("gpt2", {"special_tokens_map__json": {"pad_token": "[x]"}}, "he[x]", [5, 13]),
    "added": ("gpt2", {"added_tokens__json": {"[y]": 14, "[x]": 13}}, "[y]he[x]", [14, 5, 13]),
    "added in vocab": ("gpt2", {"added_tokens__json": {"<pad>": 12}}, "<pad>", [12]),
    "additional": ("gpt2", {"special_tokens_map__json": {"additional_special_tokens": ["[x]"]}}, "[x]", [13]),
    "strips": (
        "gpt2",
        {"special_tokens_map__json": {"mask_token": {"content": "[x]", "lstrip": True}}},
        "he [x]",
        [5, 13],
    ),
    "prefix": ("gpt2", {"tokenizer_config__json": {"add_prefix_space": True}}, "hell", [4, 7]),
    "other family, GPT-2's class": (
        "llama",
        {"tokenizer_config__json": {"tokenizer_class": "GPT2Tokenizer"}},
        "he",
        [5],
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_ids_worked_by_hand(case, tmp_path):
    family, files, text, ids = BY_HAND[case]
    assert read_tokenizer(small(tmp_path, **files), family).encode(text).ids == ids


def test_special_tokens_are_left_out_of_decoded_text(tmp_path):
    files = {"added_tokens.json": {"[plain]": 13, "[bos]": 14}, "tokenizer_config.json": {"bos_token": "[bos]"} | BOS}
    tokenizer = read_tokenizer(write(small(tmp_path), files), "gpt2")
    ids = tokenizer.encode("he[plain]").ids
    assert ids == [14, 5, 13]
    assert tokenizer.decode(ids) == "he[plain]"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[bos]he[plain]"


def test_the_bos_token_is_added_on_request_only(tmp_path):
    tokenizer = read_tokenizer(small(tmp_path), "opt")
    assert tokenizer.encode("he", add_special_tokens=False).ids == [5]
    assert tokenizer.encode("he", "hello").ids == [10, 5, 10, 8]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_ends_and_versions_of_merges_do_not_matter(ending, tmp_path):
    for merges in (MERGES, MERGES.split("\n", 1)[1], MERGES.rstrip("\n")):
        folder = write(small(tmp_path), {"merges.txt": merges.replace("\n", ending).encode()})
        assert read_tokenizer(folder, "gpt2").encode("he hello hel").ids == [5, 4, 8, 9, 2]


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_tokenizer_json_comes_first_and_drops_nothing(tmp_path):
    saved = words()
    saved.enable_truncation(2)
    saved.enable_padding(length=5)
    folder = small(tmp_path, tokenizer__json=saved.to_str(), tokenizer__model=b"")
    assert read_tokenizer(folder, "gpt2").encode("a b a b").ids == [0, 1, 0, 1]
    assert read_tokenizer(folder, "gpt2").encode("a").ids == [0]


@pytest.mark.parametrize("files", [{}, {"vocab.json": SMALL}, {"merges.txt": MERGES}, {"tokenizer_config.json": {}}])
def test_a_folder_may_have_no_tokenizer(files, tmp_path):
    assert read_tokenizer(write(tmp_path, files), "gpt2") is None


OTHERS = {  # files, family: read by transformers
    "SentencePiece": ({"tokenizer.model": b"\n"}, "llama"),
    "SentencePiece of OPT": ({"tokenizer.model": b"\n"}, "opt"),
    "other family": ({"vocab.json": SMALL, "merges.txt": MERGES}, "qwen2"),
    "other class": (
        {"vocab.json": SMALL, "merges.txt": MERGES, "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
        "gpt2",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_formats_are_read_by_transformers(case, tmp_path, monkeypatch):
    files, family = OTHERS[case]
    folder, made, calls = write(tmp_path, files), words(), []
    made.enable_truncation(1)

    def from_pretrained(*args, **options):
        calls.append((args, options))
        return SimpleNamespace(backend_tokenizer=made)

    for name in ("transformers", "sentencepiece"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["transformers"].AutoTokenizer = SimpleNamespace(from_pretrained=from_pretrained)
    assert read_tokenizer(folder, family).encode("a b").ids == [0, 1]
    assert calls == [((folder,), {"use_fast": True, "local_files_only": True})]
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert (read_tokenizer(folder, family) is None) == ("tokenizer.model" in files)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read_tokenizer(folder, family) is None


def test_what_transformers_cannot_read_is_one_error(tmp_path):
    pytest.importorskip("transformers")
    folder = write(small(tmp_path), {"config.json": {"model_type": "qwen2"}, "vocab.json": "no JSON"})
    with pytest.raises(ValueError, match=r"vocab\.json is damaged"):
        read_tokenizer(folder, "qwen2")


DAMAGED = {  # file: content, message
    "tokenizer.json, empty": ("tokenizer.json", "", r"tokenizer\.json is damaged"),
    "tokenizer.json, cut": ("tokenizer.json", words().to_str()[:90], r"tokenizer\.json is damaged"),
    "vocab.json, cut": ("vocab.json", '{"h": 0, "e', r"vocab\.json is damaged"),
    "vocab.json, list": ("vocab.json", ["h"], r"vocab\.json is damaged .*JSON list, expected an object"),
    "vocab.json, text id": ("vocab.json", SMALL | {"h": "x"}, r"vocab\.json is damaged"),
    "vocab.json, negative id": ("vocab.json", SMALL | {"h": -1}, r"vocab\.json is damaged"),
    "vocab.json, real id": ("vocab.json", SMALL | {"h": 0.5}, r"vocab\.json is damaged"),
    "vocab.json, not UTF-8": ("vocab.json", b'{"\xff": 0}', r"vocab\.json is damaged"),
    "merges.txt, empty": ("merges.txt", "", r"merges\.txt is damaged .*\('', ''\)"),
    "merges.txt, cut": ("merges.txt", MERGES[:-3], r"merges\.txt is damaged .*\('Ġ', ''\)"),
    "merges.txt, cut in a token": ("merges.txt", MERGES[:-2], r"merges\.txt is damaged .*\('Ġ', 'h'\)"),
    "merges.txt, three": ("merges.txt", "h e l\n", r"merges\.txt is damaged .*\('h', 'e l'\) are not two tokens"),
    "merges.txt, one": ("merges.txt", "h\n", r"merges\.txt is damaged"),
    "merges.txt, gap": ("merges.txt", MERGES.replace("l l", "\nl l"), r"merges\.txt is damaged"),
    "merges.txt, of another": (
        "merges.txt",
        "h e\nĠ t\n",
        r"merges\.txt is damaged .*\('Ġ', 't'\) are not .* vocab\.json",
    ),
    "merges.txt, not UTF-8": ("merges.txt", b"h \xff\n", r"merges\.txt is damaged"),
    "config, cut": ("tokenizer_config.json", "{", r"tokenizer_config\.json is damaged"),
    "config, token": ("tokenizer_config.json", {"eos_token": 2}, r"tokenizer_config\.json .*a token is 2, expected"),
    "map, token": ("special_tokens_map.json", {"eos_token": {"a": 1}}, r"special_tokens_map\.json .*a token is"),
    "map, list": ("special_tokens_map.json", [], r"special_tokens_map\.json is damaged"),
    "added, gap": ("added_tokens.json", {"[x]": 20}, r"added_tokens\.json .*'\[x\]' has the id 20, and 13"),
    "added, moved": ("added_tokens.json", {"he": 6}, r"added_tokens\.json .*'he' has the id 6, and 5"),
    "added, text id": ("added_tokens.json", {"[x]": "13"}, r"added_tokens\.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(case, tmp_path):
    name, content, message = DAMAGED[case]
    with pytest.raises(ValueError, match=message):
        read_tokenizer(write(small(tmp_path), {name: content}), "gpt2")


def test_a_bos_token_that_is_asked_for_has_to_be_there(tmp_path):
    vocab = {t: i for t, i in SMALL.items() if t != "</s>"}
    with pytest.raises(ValueError, match=r"bos_token.*'</s>'"):
        read_tokenizer(write(small(tmp_path), {"vocab.json": vocab}), "opt")


# ---- against transformers, on GPT-2's files

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789.,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+~`",
    " \t\n\r\x0b\x0c\u00a0\u2003\u200b\u3000\x85\u2028",
    "äöüßéèñçøåœ",
    "привет мир",
    "你好世界こんにちは안녕",
    "مرحباשלום",
    "👍🏽🙂👨‍👩‍👧🇩🇪",
    "e\u0301\u0323o\u0308\ufeff\ufffd\x00\x7f",
)
WORDS = ("the", " quick", " it's", "we'll", "I'VE", " don't", "2024", "\n\n", "   ", "http://a.b/c?d=e", " x=1;")


def random_texts(special: tuple[str, ...], count: int = 300) -> list[str]:
    rng = random.Random(0)
    texts = ["", " ", "\n", "  leading", "trailing  ", "a\r\nb", "It was terrible", " great", *special]
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.15:
                parts.append(rng.choice(special))
            elif kind < 0.45:
                parts.append(rng.choice(WORDS))
            elif kind < 0.9:
                parts.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6))))
            else:
                parts.append(chr((rng.randrange(0x110000 - 0x800) + 0xE000) % 0x110000))  # no surrogates
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def gpt2_files(test_data):
    folder = test_data / "tokenizers" / "gpt2"
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), (folder / "merges.txt").read_bytes()


def folders(gpt2_files):
    """Folders as they are on the hub: name -> (family, files, special tokens)."""
    vocab, merges = gpt2_files
    ids = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1]) if t != END]
    opt = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *ids, "madeupword0000", "madeupword0001"])}
    gpt2 = {"vocab.json": vocab, "merges.txt": merges}
    new = {"[PAD]": 50257, "<extra>": 50258}
    return {
        "gpt2": ("gpt2", gpt2, (END,)),
        "gpt2 with tokens": (
            "gpt2",
            gpt2
            | {
                "added_tokens.json": new,
                "special_tokens_map.json": {
                    "pad_token": {"content": "[PAD]", "lstrip": True, "rstrip": True},  # added_tokens.json wins
                    "eos_token": {"content": END, "lstrip": True},
                },
                "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
            },
            (END, "[PAD]", "<extra>"),
        ),
        "gpt2, new tokens": (
            "gpt2",
            gpt2
            | {
                "special_tokens_map.json": {
                    "mask_token": "[M]",
                    "pad_token": "[P]",
                    "additional_special_tokens": ["[A]"],
                },
                "tokenizer_config.json": {"add_bos_token": True},
            },
            (END, "[P]", "[M]", "[A]"),
        ),
        "opt": (
            "opt",
            {
                "vocab.json": opt,
                "merges.txt": merges,
                "tokenizer_config.json": OPT_CONFIG,
                "special_tokens_map.json": {k: v["content"] for k, v in OPT_CONFIG.items() if k.endswith("n_token")},
            },
            ("</s>", "<pad>", "<s>", "<unk>"),
        ),
    }


@pytest.mark.parametrize("name", ["gpt2", "gpt2 with tokens", "gpt2, new tokens", "opt"])
def test_ids_are_those_of_transformers(name, gpt2_files, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, files, special = folders(gpt2_files)[name]
    folder = write(tmp_path, files | {"config.json": {"model_type": family}})
    ours = read_tokenizer(folder, family)
    classes = (transformers.GPT2Tokenizer, transformers.GPT2TokenizerFast, transformers.AutoTokenizer)
    for theirs in [each.from_pretrained(folder) for each in classes]:
        for text in random_texts(special):
            ids = theirs(text)["input_ids"]
            assert ours.encode(text).ids == ids, text
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_known_ids_of_gpt2(gpt2_files, tmp_path):
    ours = read_tokenizer(write(tmp_path, {"vocab.json": gpt2_files[0], "merges.txt": gpt2_files[1]}), "gpt2")
    assert ours.encode("Hello world").ids == [15496, 995]
    assert ours.encode(f" Hello world{END}").ids == [18435, 995, 50256]


def test_texts_come_back(gpt2_files, tmp_path):
    for name in ("gpt2", "opt"):
        family, files, special = folders(gpt2_files)[name]
        ours = read_tokenizer(write(tmp_path / name, files), family)
        for text in random_texts(special):
            ids = ours.encode(text).ids
            assert ids[:1] == [2] or family == "gpt2"
            assert ours.decode(ids[family == "opt" :], skip_special_tokens=False) == text
