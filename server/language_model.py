"""A causal language model of `transformers` that writes descriptions, and can write nothing but given sentences.

Each token is the likeliest of those with which one of the sentences goes on, so what comes out is one of them whatever
the request says, and the same every time. It sees the request as one line among examples. Weights are safetensors and
nothing that comes with a model runs as code. Not here: which sentences there are, and what a request must keep
(`server.prompting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError, PromptError
from shared.metrics.pretrained import load_pretrained
from shared.text import check_vocabulary

INTRODUCTION = "Each description says in known words what a request asks for.\n\n"
LONGEST_REQUEST = 400  # characters
MOST_TOKENS = 1024  # of examples, request and description, where the model itself has no limit
KEPT_TREES = 4

# Node of the tree of token sequences: what may follow, and whether a sentence ends here.
Tree = dict[int, Any]
_END = -1


class LanguageModel:
    """Build it with `load`.

    Attributes:
        name: its id, or its folder's own name: where that lies is nobody else's business.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self._model, self._tokenizer, self.name = model, tokenizer, name
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length, MOST_TOKENS)
        self._most_tokens = int(min(limit for limit in limits if limit))
        self._special = [str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token]
        self._trees: dict[int, tuple[Sequence[str], Tree, int]] = {}
        newline = self._tokens(" a\n")[len(self._tokens(" a")) :]
        self._ends = [t for t in (tokenizer.eos_token_id, *(newline[-1:])) if t is not None]

    @classmethod
    def load(cls, place: str) -> LanguageModel:
        """
        Args:
            place: id of a model at a hub, or a folder with configuration, weights and tokenizer.
        Raises:
            DataError: there is none, it is of another kind, or parts of it are missing.
        """
        tokenizer = load_pretrained(place, "AutoTokenizer")
        model = load_pretrained(place, "AutoModelForCausalLM")
        if model.absent_weights:
            raise DataError(
                f"the model at {place} lacks weights, {model.absent_weights[0]} among them",
                hint="name a causal language model, saved whole by save_pretrained",
            )
        check_vocabulary(model, tokenizer, place)
        folder = Path(place)
        return cls(model, tokenizer, name=folder.resolve().name if folder.is_dir() else place)

    @torch.no_grad()
    def write(self, request: str, *, sentences: Sequence[str], examples: Sequence[tuple[str, str]]) -> str:
        """One of `sentences`, the likeliest token by token.

        Args:
            examples: (request, sentence) of others, which the model sees first.
        Raises:
            PromptError: the model's tokens cannot write them, or request and sentence are too long for it.
        """
        tree, longest = self._tree(sentences)
        tokens = self._opening(request, examples, room=self._most_tokens - longest)
        node, written, past = tree, list[int](), None
        given = torch.tensor([tokens])
        while True:
            output = self._model(input_ids=given, past_key_values=past, use_cache=True)
            logits, past = output.logits[0, -1], getattr(output, "past_key_values", None)
            if not bool(torch.isfinite(logits).all()):
                raise PromptError(f"{self.name} makes no finite numbers")
            token = self._likeliest(logits, node)
            if token == _END:
                break
            written.append(token)
            node = node[token]
            if node.keys() == {_END}:
                break
            given = torch.tensor([[token]]) if past is not None else torch.tensor([[*tokens, *written]])
        return str(node[_END])

    def _likeliest(self, logits: torch.Tensor, node: Tree) -> int:
        choices = {token: float(logits[token]) for token in node if token != _END}
        if _END in node:
            choices[_END] = max((float(logits[token]) for token in self._ends), default=float("-inf"))
        return max(choices, key=lambda token: (choices[token], -token))

    def _tree(self, sentences: Sequence[str]) -> tuple[Tree, int]:
        """(tree of the tokens of `sentences`, the most tokens of one)."""
        if (kept := self._trees.pop(id(sentences), None)) is not None and kept[0] is sentences:
            self._trees[id(sentences)] = kept  # the newest
            return kept[1], kept[2]
        opening = self._tokens("Description:")
        tree: Tree = {}
        longest = 0
        for sentence in sentences:
            tokens = self._tokens(f"Description: {sentence}")
            # A tokenizer that joins the colon to what follows, or lacks a word, cannot write this sentence.
            if tokens[: len(opening)] != opening or not self._can_write(sentence, tokens[len(opening) :]):
                continue
            node = tree
            for token in tokens[len(opening) :]:
                node = node.setdefault(token, {})
            node[_END] = sentence
            longest = max(longest, len(tokens) - len(opening))
        if not tree:
            raise PromptError(f"{self.name} has no tokens for the words of this model")
        while len(self._trees) >= KEPT_TREES:
            del self._trees[next(iter(self._trees))]
        self._trees[id(sentences)] = (sentences, tree, longest)
        return tree, longest

    def _can_write(self, sentence: str, tokens: Sequence[int]) -> bool:
        return bool(tokens) and (self._tokenizer.unk_token_id is None or self._tokenizer.unk_token_id not in tokens)

    def _opening(self, request: str, examples: Sequence[tuple[str, str]], *, room: int) -> list[int]:
        """Tokens of introduction, examples and request: as many examples as there is room for."""
        line = " ".join(request.split())[:LONGEST_REQUEST]
        for token in self._special:
            line = line.replace(token, " ")  # written by a person it is text, and ends nothing
        asked = f"Request: {line}\nDescription:"
        for count in range(len(examples), -1, -1):
            shown = "".join(f"Request: {other}\nDescription: {sentence}\n\n" for other, sentence in examples[:count])
            tokens = self._tokens(f"{INTRODUCTION if count else ''}{shown}{asked}", special=True)
            if len(tokens) <= room:
                return tokens
        raise PromptError(f"the text is too long for {self.name}, which reads {self._most_tokens} tokens")

    def _tokens(self, text: str, *, special: bool = False) -> list[int]:
        tokens = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        # Some tokenizers end every text, after which nothing would follow.
        return list(tokens[:-1] if special and len(tokens) > 1 and tokens[-1] == eos else tokens)
