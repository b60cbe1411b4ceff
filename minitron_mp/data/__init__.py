"""Text to microbatches.

sources         text files of a recipe, and their fingerprint
folders         text files of a folder
text_files      formats, packings and encodings of text files
records         texts of JSON lines, JSON arrays and parquet tables
record_fields   names of the fields of records
chats           lists of messages of records, as JSON text
record_errors   what is wrong with a record, and what to do
documents       documents of a text file, and their parts
unused          counts of text that is not used
checks          problems of the text before a run
file_hashes     hashes of text files, remembered between starts
chat_encoder    chats to token ids, and the mask of the assistant's tokens
tokenize        write_parts: documents to token ids, in one process
indexed_files   Megatron's indexed datasets: write and put together
shards          shards of a large text: divide, make, put together
workers         processes that make shards
worker_process  the program of such a process
corpus          tokenize_corpus: text to Megatron's indexed datasets
held_out        held-out parts of a fixed number of tokens
tokenizer       load_tokenizer: Hugging Face or sentencepiece
blend           samples of each text of a blend
batches         open_samples, microbatches
positions       SamplePositions: the samples of a step, after changes of a run
mapped_samples  Megatron's samples over files without open descriptors
prefetch        the next batches on a thread
"""
