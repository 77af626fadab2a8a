"""Corpora as rows of tokens, made once and for all: `data prepare --tokenizer` writes shards, a run reads its rows."""
