"""What a tokenizer must have to train with, and tokens of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vlmpeft.errors import ModelError, nearest
from vlmpeft.tuners.tokens import grow

Init = Literal["mean", "text"]
MARKS = ("<|im_start|>", "<|im_end|>")  # special tokens that a template of ours writes


def fit_tokenizer(tokenizer: Any, name: str, rows: int, eos: str | None) -> None:
    """Make sure answers can end and every id has a row. A pad token isn't needed: padding is masked by length.

    Args:
        name: of the language model, for messages.
        rows: of its embedding matrix.
        eos: the token that ends answers instead of the tokenizer's own, which is changed in place.

    Raises: ModelError M510 without an end token, or with one that is no token; M511 for ids beyond the matrix.
    """
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            hint = nearest(eos, tokenizer.get_added_vocab())
            raise ModelError("M510", f"language.eos='{eos}' is no token of {name}{hint}", "name one that is.")
        tokenizer.eos_token = eos
    if tokenizer.eos_token_id is None:
        candidates = ", ".join(sorted(tokenizer.get_added_vocab())[:8]) or "it has no special tokens"
        message = f"the tokenizer of {name} has no eos token, so answers would never end."
        raise ModelError("M510", message, f"set language.eos=TOKEN (its special tokens: {candidates}).")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    beyond = {token: i for token, i in vocabulary.items() if i >= rows and _can_occur(token, i, tokenizer)}
    if beyond:
        first = min(beyond, key=lambda token: beyond[token])
        message = f"token '{first}' of {name} has id {beyond[first]}, but its embedding has {rows} rows"
        fix = "use the tokenizer the model was trained with; new tokens are added by tokens.add."
        raise ModelError("M511", f"{message} ({len(beyond)} such).", fix)


def _can_occur(token: str, index: int, tokenizer: Any) -> bool:
    """Whether text or a template can give a token: special ones that no template writes are out of reach.

    Gemma 3 has such a one, for images, that its text model has no row for.
    """
    added = tokenizer.added_tokens_decoder.get(index)
    written = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *MARKS)
    return added is None or not added.special or token in written or token in str(tokenizer.chat_template)


def add_tokens(language: Any, tokenizer: Any, tokens: Sequence[str], init: Init = "mean") -> None:
    """Add tokens to a tokenizer, and a row for each to a causal LM's embedding and head: old rows stay as they are.

    Args:
        tokens: matched wherever they stand in questions, answers and prompts.
        init: what a new row starts as: the mean of all rows, or of the rows its text had before.

    Raises: ModelError M517 for a token that is there already; M511 for a tokenizer that has ids without rows.
    """
    from tokenizers import AddedToken

    if not tokens:
        return
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        raise ModelError("M517", f"tokens.add: '{known[0]}' is a token already.", "leave it out.")
    pieces = [_pieces(tokenizer, token) if init == "text" else [] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    rows = language.get_input_embeddings().weight.shape[0]
    if ids != list(range(ids[0], ids[0] + len(ids))) or ids[0] > rows:
        message = f"tokens.add: the new ids {ids[:3]} do not follow the {rows} rows of the embedding."
        raise ModelError("M511", message, "use a tokenizer whose tokens all have a row.")
    grow(language, ids[0], pieces)


def _pieces(tokenizer: Any, token: str) -> list[int]:
    ids: list[int] = tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids
