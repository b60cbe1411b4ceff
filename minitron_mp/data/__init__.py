"""Text to microbatches.

sources     text files of a recipe, and their fingerprint
folders     text files of a folder
text_files  formats, packings and encodings of text files
records     texts of JSON lines, JSON arrays and parquet tables
documents   documents of a text file, and their parts
unused      counts of text that is not used
checks      problems of the text before a run
corpus      tokenize_corpus: documents to Megatron's indexed datasets
tokenizer   load_tokenizer: Hugging Face or sentencepiece
batches     open_samples, microbatches
positions   SamplePositions: the samples of a step, after changes of a run
"""
