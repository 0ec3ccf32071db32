"""Tokenize texts. Only this module joins prompts and texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import normalizers

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.hf.sentence_files import SentenceSettings
from megatron_embed.conversion.hf.tokenizer_files import write_tokenizer
from megatron_embed.recipes.datasets.long_texts import knows_borders, tokenize_starts

#: ``text`` is neither of the others, as in sentence-transformers' plain ``encode``
Kind = Literal["query", "passage", "text"]


class TextTokenizer:
    """A model's tokenizer with the prompts and maximal lengths of its training.

    It tokenizes the prompt, exactly as written, followed by the text, and adds the tokenizer's own BOS and EOS, which
    truncation keeps. Text that looks like a control token (``</s>``, ``[INST]``) stays text. The exported folder gives
    the same ids in sentence-transformers.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        query_prompt: str,
        passage_prompt: str,
        query_max_length: int,
        passage_max_length: int,
        do_lower_case: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.split_special_tokens = True
        self.do_lower_case = do_lower_case
        if do_lower_case:
            _lower_case(tokenizer)
        self._knows_borders = knows_borders(tokenizer)
        self.prompts: dict[Kind, str] = {"query": query_prompt, "passage": passage_prompt, "text": ""}
        self.max_lengths: dict[Kind, int] = {
            "query": query_max_length,
            "passage": passage_max_length,
            "text": max(query_max_length, passage_max_length),
        }

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        query_prompt: str,
        passage_prompt: str,
        query_max_length: int,
        passage_max_length: int,
        do_lower_case: bool = False,
    ) -> TextTokenizer:
        """Load the tokenizer of a model folder, without network access and remote code.

        The tokenizer of a ready embedder (a folder with ``modules.json``) stays as it is. That of any other model gets
        the edits that export makes, above all BOS and EOS around every text, so that training and the exported embedder
        agree.

        Args:
            do_lower_case: lower-case prompt and text first.

        Raises:
            UserError: the folder has no tokenizer, or it cannot be read.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"{path}: no tokenizer.json; wanted a model folder with a fast tokenizer")
        try:
            if (path / "modules.json").is_file():
                tokenizer = _load(path)
            else:
                with tempfile.TemporaryDirectory(prefix="tokenizer-") as edited:
                    write_tokenizer(path, Path(edited), max_length=max(query_max_length, passage_max_length))
                    tokenizer = _load(Path(edited))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise UserError(
                f"{path / 'tokenizer.json'}: cannot be read ({error}); copy it again from the model"
            ) from None
        return cls(
            tokenizer,
            query_prompt=query_prompt,
            passage_prompt=passage_prompt,
            query_max_length=query_max_length,
            passage_max_length=passage_max_length,
            do_lower_case=do_lower_case,
        )

    @classmethod
    def from_settings(cls, path: str | Path, settings: SentenceSettings) -> TextTokenizer:
        """Load the tokenizer of a model folder with its sentence settings; see :meth:`from_folder`."""
        found = cls.from_folder(
            path,
            query_prompt=settings.query_prompt,
            passage_prompt=settings.passage_prompt,
            query_max_length=settings.query_max_length,
            passage_max_length=settings.passage_max_length,
            do_lower_case=settings.do_lower_case,
        )
        found.prompts["text"], found.max_lengths["text"] = settings.text_prompt, settings.text_max_length
        return found

    @property
    def pad_token_id(self) -> int:
        """The id of padding; any id serves, because padding is masked."""
        tokenizer = self.tokenizer
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(id_ for id_ in known if id_ is not None)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def text(self, text: str, kind: Kind, prompt: str | None = None) -> str:
        """Return the model's input for a text: the prompt followed by the text, both unchanged."""
        return (self.prompts[kind] if prompt is None else prompt) + text

    def tokenize(self, texts: Sequence[str], kind: Kind, prompts: Sequence[str] | None = None) -> list[list[int]]:
        """Return the token ids of each text, BOS and EOS included, truncated to the kind's maximal length.

        Args:
            prompts: one for each text; they replace the kind's own prompt.
        """
        if not texts:
            return []
        length = self.max_lengths[kind]
        own: Sequence[str | None] = [None] * len(texts) if prompts is None else prompts
        whole = [self.text(text, kind, prompt) for text, prompt in zip(texts, own, strict=True)]

        def ids_of(texts: list[str]) -> list[list[int]]:
            return self.tokenizer(
                texts,
                truncation=True,
                max_length=length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]

        return tokenize_starts(ids_of, whole, length) if self._knows_borders else ids_of(whole)


def _lower_case(tokenizer: Any) -> None:
    """Make a tokenizer lower-case its input before all other steps, as sentence-transformers does."""
    backend = tokenizer.backend_tokenizer
    before = backend.normalizer
    steps: list[Any] = []
    if before is not None:
        steps = [*before] if isinstance(before, normalizers.Sequence) else [before]  # type: ignore[misc]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _load(folder: Path) -> Any:
    # AutoTokenizer is unsuitable: beside a tekken.json its result depends on whether mistral_common is installed.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
