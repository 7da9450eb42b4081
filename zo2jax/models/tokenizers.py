"""Tokenizers and chat templates from the files of Hugging Face folders."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

_BOS = {"gpt2": "<|endoftext|>", "opt": "</s>"}  # of the families whose vocab.json and merges.txt are GPT-2's BPE
_NAMES = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise ValueError(f"{path} is damaged or does not fit the other files ({error}): download it again") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}, expected an object")
        return content


def _added_token(value: Any) -> AddedToken:
    flags = {"content": value} if isinstance(value, str) else value
    if not isinstance(flags, dict) or not isinstance(flags.get("content"), str):
        raise ValueError(f'a token is {value!r}, expected a string or {{"content": "..."}}')
    names = [name for name in ("single_word", "lstrip", "rstrip") if name in flags]
    return AddedToken(flags["content"], special=True, **{name: bool(flags[name]) for name in names})


def _special_tokens(folder: Path) -> dict[str, AddedToken]:
    """Tokens by names such as bos_token (additional ones by numbers), from both files that may hold them."""
    found: dict[str, AddedToken] = {}
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        content = _read_object(path)
        with _reading(path):
            found |= {name: _added_token(content[name]) for name in _NAMES if content.get(name)}
            found |= {str(i): _added_token(t) for i, t in enumerate(content.get("additional_special_tokens") or ())}
    return found


def _gpt2_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """GPT-2's byte-level BPE (also OPT's, which puts a bos token first) from vocab.json and merges.txt."""
    vocab = _read_object(folder / "vocab.json")
    with _reading(path := folder / "merges.txt"):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        merges = [line.partition(" ")[::2] for line in lines if not line.startswith("#version")]
        if wrong := [pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()]:
            raise ValueError(f"{wrong[0]} are not two tokens that make one of vocab.json's")
    with _reading(folder / "vocab.json"):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    config = _read_object(folder / "tokenizer_config.json")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    bos = _BOS.get(model_type, "<|endoftext|>")
    named = ({"bos_token": AddedToken(bos, special=True)} if bos in vocab else {}) | _special_tokens(folder)
    added = _read_object(path := folder / "added_tokens.json")  # its tokens strip no spaces, whatever other files say
    special = {t.content: AddedToken(t.content, special=True) if t.content in added else t for t in named.values()}
    with _reading(path):
        for text, index in sorted(added.items(), key=lambda item: item[1]):
            tokenizer.add_tokens([special.get(text, text)])
            if (got := tokenizer.token_to_id(text)) != index:
                raise ValueError(f"{text!r} has the id {index!r}, and {got} after vocab.json")
    tokenizer.add_special_tokens(list(special.values()))
    if config.get("add_bos_token", model_type == "opt"):
        if "bos_token" not in named:
            raise ValueError(f"{folder}: each text begins with bos_token; no file names it, and {bos!r} is no token")
        bos = named["bos_token"].content
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def read_tokenizer(folder: Path, model_type: str) -> Tokenizer | None:
    """The tokenizer of a model folder, or None where there is none that can be read.

    From the first of these that is there: tokenizer.json; vocab.json and merges.txt, as GPT-2's byte-level BPE, if
    the tokenizer's class is GPT-2's or ``model_type`` is "gpt2" or "opt"; what ``transformers`` makes of other classes
    and (with ``sentencepiece``) of tokenizer.model. OPT puts a bos token first unless tokenizer_config.json differs.

    Raises:
        ValueError: naming the file that is damaged or does not fit the others.

    >>> from zo2jax.demo import model_folder
    >>> read_tokenizer(model_folder(), "llama").encode("(self)").tokens
    ['(', 'self', ')']
    """
    path = folder / "tokenizer.json"
    pair = not path.is_file() and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    others = ("transformers",) if pair else ("transformers", "sentencepiece")
    kind = pair and _read_object(folder / "tokenizer_config.json").get("tokenizer_class")
    if path.is_file():
        with _reading(path):
            tokenizer = Tokenizer.from_file(str(path))
    elif pair and (kind in ("GPT2Tokenizer", "GPT2TokenizerFast") or (not kind and model_type in _BOS)):
        tokenizer = _gpt2_tokenizer(folder, model_type)
    elif (pair or (folder / "tokenizer.model").is_file()) and all(map(find_spec, others)):
        with _reading(folder / ("vocab.json" if pair else "tokenizer.model")):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True).backend_tokenizer
    else:
        return None
    tokenizer.no_truncation()  # which the files may ask for, and which would drop text silently
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that turns messages into text, and the special tokens that it may name.

    >>> ChatTemplate("[INST] {{ messages[0].content }} [/INST]").render([{"role": "user", "content": "Hi"}])
    '[INST] Hi [/INST]'
    """

    template: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate":
        """Reads chat_template.jinja, else the template (of several: "default") in tokenizer_config.json.

        Raises:
            FileNotFoundError: if neither is there.
            ValueError: if a file is damaged.
        """
        path, config_path = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
        template = _read_object(config_path).get("chat_template")
        with _reading(path if path.is_file() else config_path):
            if path.is_file():
                template = path.read_text(encoding="utf-8")
            elif isinstance(template, list):
                template = {entry["name"]: entry["template"] for entry in template}["default"]
        if template is None:
            raise FileNotFoundError(f"{folder} has no chat_template.jinja, nor chat_template in tokenizer_config.json")
        return cls(template, {name: t.content for name, t in _special_tokens(path.parent).items() if name in _NAMES})

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; ``add_generation_prompt`` adds the header of the next reply.

        Raises:
            ValueError: if the template is no Jinja template, or refuses the messages.
        """
        try:
            rows = [{key: value for key, value in message.items() if value is not None} for message in messages]
            plain = json.loads(json.dumps(rows))  # templates are foreign code: they get no objects of the caller's
            rest = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
            return self._compiled.render(messages=plain, **rest, **self.tokens)
        except Exception as error:  # expressions in templates raise many kinds
            raise ValueError(f"chat template: {type(error).__name__}: {error}; rendering {messages!r:.300}") from error

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        # generation blocks mark the assistant's text for other tools; "with" blocks scope and render the same
        return env.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", self.template))
