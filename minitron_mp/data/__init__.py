"""From text to micro-batches: sources, documents, tokenizers, samples.

sources     the files of the text that a recipe lists
documents   documents of text files, and the part of each document
tokenizer   Tokenizer, load_tokenizer
corpus      tokenize_corpus: text as Megatron indexed datasets
batches     open_samples, micro_batches
"""
