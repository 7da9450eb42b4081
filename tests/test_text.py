"""Text: every token is a target once, the order is a function of the seed, and nothing held out is trained on."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

import zo2jax as zo
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.llama import LlamaConfig
from zo2jax.tasks.text import HeldOut, TextBatches, load_text, pack, text_files

VOCABULARY, CONTEXT, STOP = 500, 16, 1
FIRST = 0x400  # token i is the character FIRST + i


def make_model(stop_ids: tuple[int, ...] = (STOP,), vocabulary: int = VOCABULARY) -> zo.Model:
    """A model (its weights do not matter here) with a tokenizer of one token per character."""
    tokenizer = Tokenizer(models.WordLevel({chr(FIRST + i): i for i in range(VOCABULARY)}, unk_token=chr(FIRST)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    start = chr(FIRST)  # a special token, which has no place in the middle of a text
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    shape = {"size": 4, "hidden": 4, "layers": 1, "heads": 1, "kv_heads": 1, "head_size": 4, "context": CONTEXT}
    config = LlamaConfig(vocabulary=vocabulary, stop_ids=stop_ids, **shape)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), owned_shapes(config.blocks()))
    return zo.Model(config, config.blocks(), params, Path("a/folder"), tokenizer)


def text(ids) -> str:
    return "".join(chr(FIRST + i) for i in ids)


def flat(rows: np.ndarray) -> list[int]:
    """The tokens that packed rows came from."""
    return [*rows[:1, 0].tolist(), *rows[:, 1:].ravel().tolist()]


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 50])
def test_each_token_is_a_target_once(count, length):
    tokens = np.random.default_rng(count).permutation(count)
    rows = pack(tokens, length)
    assert rows.dtype == np.int32
    assert rows.shape == (max(count - 1, 0) // length, length + 1)
    assert rows[:, 1:].ravel().tolist() == tokens[1 : 1 + rows[:, 1:].size].tolist()
    assert rows[:, :-1].ravel().tolist() == tokens[: rows[:, 1:].size].tolist()
    assert max(count - 1, 0) - rows[:, 1:].size < length  # only an incomplete last row is left out


ROWS = pack(np.arange(11 * 3 + 1), 3)  # 11 rows, which differ


def order(batches: TextBatches) -> list[int]:
    """The rows in the order in which they are trained on; asserts that each is whole."""
    rows = [np.concatenate([b["ids"], b["targets"][:, -1:]], axis=1) for b in batches]
    numbers = np.concatenate(rows)[:, 0] // 3
    np.testing.assert_array_equal(np.concatenate(rows), ROWS[numbers])
    assert all((b["ids"][:, 1:] == b["targets"][:, :-1]).all() for b in batches)
    return numbers.tolist()


@pytest.mark.parametrize("batch", [1, 4, 11, 25])
def test_each_epoch_is_a_new_permutation_of_all_rows(batch):
    epochs = np.array(order(TextBatches(ROWS, batch, steps=44, seed=7)))[:44].reshape(4, 11)
    assert np.sort(epochs, axis=1).tolist() == [list(range(11))] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_batch_is_a_function_of_seed_and_index():
    batches = TextBatches(ROWS, 4, steps=20, seed=3)
    wanted = list(batches)
    for i in np.random.default_rng(0).permutation(20).tolist():
        order(TextBatches(ROWS, 5, steps=9, seed=i + 10))  # others in between
        for other in (batches, TextBatches(ROWS, 4, steps=i + 1, seed=3)):
            for name in ("ids", "targets"):
                np.testing.assert_array_equal(other[i][name], wanted[i][name])
                assert other[i][name].dtype == np.int32


def test_the_order_is_the_same_in_every_version():
    """Pinned: a run that is resumed with another version of NumPy relies on it."""
    assert order(TextBatches(ROWS, 11, steps=1, seed=0)) == [0, 2, 9, 1, 8, 5, 4, 3, 10, 6, 7]


def test_seeds_give_different_orders():
    seeds = (0, 1, 2, -1, 2**40)
    assert len({tuple(order(TextBatches(ROWS, 11, steps=2, seed=seed))) for seed in seeds}) == len(seeds)


def test_batches_are_a_sequence():
    batches = TextBatches(ROWS, 2, steps=10, seed=0)
    assert len(batches) == len(list(batches)) == 10
    for part in (slice(3, 7), slice(None, None, -2), slice(-3, None), slice(8, 99)):
        expected = [batches[i]["ids"].tolist() for i in range(10)[part]]
        assert [b["ids"].tolist() for b in batches[part]] == expected
    assert [batches[-i]["ids"].tolist() for i in (1, 10)] == [batches[i]["ids"].tolist() for i in (9, 0)]
    for index in (10, -11):
        with pytest.raises(IndexError, match="of 10"):
            batches[index]


@pytest.mark.parametrize("batch", [1, 3, 4, 11, 20])
def test_held_out_weights_count_each_row_once(batch):
    held_out = HeldOut(ROWS, batch)
    batches = list(held_out)
    assert len(batches) == len(held_out) == -(-11 // batch)
    counted = np.concatenate([b["weights"] for b in batches])
    assert (counted.dtype, counted.shape) == (np.float32, (len(batches) * batch, 3))
    assert set(counted.ravel().tolist()) <= {0.0, 1.0}
    assert (counted == counted[:, :1]).all()
    for name, part in (("ids", ROWS[:, :-1]), ("targets", ROWS[:, 1:])):
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches])[counted[:, 0] == 1], part)
        assert {b[name].shape for b in batches} == {(batch, 3)}
        assert {b[name].dtype for b in batches} == {np.dtype(np.int32)}


def write_texts(folder: Path) -> list[list[int]]:
    """Three files a.txt, b.txt, c.txt of 100 characters; no character occurs twice in all of them."""
    texts = np.random.default_rng(5).permutation(np.arange(2, VOCABULARY))[:300].reshape(3, 100).tolist()
    for name, ids in zip("abc", texts, strict=True):
        (folder / f"{name}.txt").write_text(text(ids), encoding="utf-8")
    (folder / "notes.md").write_text("not read")
    return texts


@pytest.mark.parametrize("held_out", [0.1, 0.33])
@pytest.mark.parametrize("stop_ids", [(STOP,), (STOP, 0), ()])
@pytest.mark.parametrize("names", ["a", "b,a", " c , a ", "folder"])
def test_text_is_split_packed_and_joined(names, stop_ids, held_out, tmp_path):
    texts = dict(zip("abc", write_texts(tmp_path), strict=True))
    files = "abc" if names == "folder" else names.replace(" ", "").split(",")
    data = str(tmp_path) if names == "folder" else re.sub(r"(\w)", rf"{tmp_path}/\1.txt", names)
    loaded = load_text(make_model(stop_ids), data, tokens=5, batch=2, held_out=held_out)
    cut = round(100 * (1 - held_out))
    for rows, part in ((loaded.train, slice(cut)), (loaded.held_out, slice(cut, None))):
        joined = []
        for n in files:
            joined += [*([STOP] if joined and stop_ids else []), *texts[n][part]]
        got = flat(rows)
        assert got == joined[: len(got)]
        assert len(joined) - len(got) < 5
    train, kept = (set(flat(rows)) - {STOP} for rows in (loaded.train, loaded.held_out))
    assert train and kept and not train & kept


def test_real_text_is_read_whole(stories, shakespeare):
    model = zo.load(stories)
    loaded = load_text(model, str(shakespeare), tokens=64, batch=8)
    written = shakespeare.read_text(encoding="utf-8")
    cut = round(len(written) * 0.9)
    for rows, part in ((loaded.train, written[:cut]), (loaded.held_out, written[cut:])):
        decoded = model.tokenizer.decode(flat(rows))
        assert part.startswith(decoded)
        assert len(part) - len(decoded) < 64 * 10


def save(folder: Path, content: bytes = text(range(2, 202)).encode()) -> str:
    (folder / "t.txt").write_bytes(content)
    return str(folder / "t.txt")


def load_t(tmp_path, content=None, model=None, **changes):
    data = save(tmp_path) if content is None else save(tmp_path, content)
    return load_text(model or make_model(), **{"data": data, "tokens": 5, "batch": 2} | changes)


ERRORS = {
    "missing file": (lambda p: load_t(p, data=f"{p}/t.txt,{p}/no.txt"), FileNotFoundError, r"no file at .*/no\.txt"),
    "no name": (lambda p: load_t(p, data=f"{p}/t.txt, "), FileNotFoundError, r"no file at \(empty\)"),
    "no texts": (lambda p: text_files(str(p)), FileNotFoundError, r"the folder .* has no \.txt files"),
    "empty": (lambda p: load_t(p, b""), ValueError, r"t\.txt is empty"),
    "blank": (lambda p: load_t(p, b" \n\t"), ValueError, r"t\.txt is empty"),
    "not UTF-8": (lambda p: load_t(p, b"caf\xe9 au lait"), ValueError, r"t\.txt is not UTF-8 .*position 3"),
    "short": (lambda p: load_t(p, batch=40), ValueError, "gives 180 training and 20 held-out .* 35 and 3 rows of 5"),
    "nothing held out": (lambda p: load_t(p, held_out=0.02), ValueError, "196 training and 4 held-out .* 0 rows"),
    "context": (lambda p: load_t(p, tokens=17), ValueError, "17 tokens do not fit the model's context of 16"),
    "no tokens": (lambda p: load_t(p, tokens=0), ValueError, "tokens=0, batch=2, held_out=0.1"),
    "no batch": (lambda p: load_t(p, batch=0), ValueError, "batch=0"),
    "all held out": (lambda p: load_t(p, held_out=1.0), ValueError, r"held_out=1\.0"),
    "tokenizer": (
        lambda p: load_t(p, model=make_model(vocabulary=150)),
        ValueError,
        "the tokenizer gives token 201, the model has 150",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_cannot_be_read_is_named(error, tmp_path):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match=message):
        call(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    model = zo.Model(make_model().config, (), {}, Path("a/folder"))
    with pytest.raises(ValueError, match=r"a/folder has no tokenizer\.json"):
        load_t(tmp_path, model=model)


def test_the_longest_rows_that_fit_are_taken(tmp_path):
    assert load_t(tmp_path, tokens=CONTEXT, batch=1).train.shape == (11, CONTEXT + 1)
