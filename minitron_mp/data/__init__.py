"""Text to microbatches.

sources     text files of a recipe, and their fingerprint
documents   documents of a text file
corpus      tokenize_corpus: documents to Megatron's indexed datasets
tokenizer   load_tokenizer: Hugging Face or sentencepiece
batches     open_samples, microbatches
"""
