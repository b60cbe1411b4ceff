"""Text to micro-batches: sources, documents, tokenizers, samples.

tokenize_corpus (corpus), load_tokenizer (tokenizer), open_samples and micro_batches (batches).
"""
