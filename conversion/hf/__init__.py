"""What lies in a Hugging Face folder: weights, tokenizer, sentence-transformers files, model card."""
