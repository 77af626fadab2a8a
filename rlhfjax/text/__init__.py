"""Text and ids: the tokenizer, and conversations as ids."""
