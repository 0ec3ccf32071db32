"""Make a small Ministral 3 VLM with random weights, from the real Hugging Face classes and a newly trained tokenizer.

``python examples/tiny_vlm.py OUT --text train.jsonl`` writes a Hugging Face model folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.utils import logging

#: tokens with the first ids of Ministral 3's own vocabulary
SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
)


def build_tiny_vlm(folder: Path, texts: Iterable[str], *, hidden: int, layers: int, vocabulary: int) -> int:
    """Save a random ``Mistral3ForConditionalGeneration`` with its tokenizer.

    Args:
        texts: training texts of the tokenizer.

    Returns:
        The number of parameters of the language tower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = train_tokenizer(folder, texts, vocabulary)
    config = Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "pad_token_id": 11,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=SPECIAL_TOKENS.index("[IMG]"),
        spatial_merge_size=2,
        multimodal_projector_bias=False,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mistral3ForConditionalGeneration(config)
        # Embeddings must outweigh the random layers' output, as in a trained model; otherwise all texts look alike.
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.model.language_model.parameters())


def train_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> int:
    """Train a byte-level BPE with Ministral 3's control tokens and ``<s> … </s>`` around every text.

    Returns:
        The size of its vocabulary, at most ``vocabulary``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 4096,
        "pad_token": "<pad>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A small random Ministral 3 VLM in Hugging Face form.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE.jsonl", help="what to train the tokenizer on")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    logging.disable_progress_bar()
    with args.text.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = (row[field] for row in rows for field in ("query", "positive"))
    size = build_tiny_vlm(args.out, texts, hidden=args.hidden, layers=args.layers, vocabulary=args.vocabulary)
    print(f"{args.out}: Mistral3ForConditionalGeneration, {size:,} parameters in the language tower")


if __name__ == "__main__":
    main()
