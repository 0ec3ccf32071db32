"""Contents of a Hugging Face folder: weights, tokenizer, sentence-transformers files, model card."""
