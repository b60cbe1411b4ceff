"""What is on disk: manifests, sharded checkpoints, optimizer state, the run log.

manifest          Manifest, find_manifest, require_artifact, writing_artifact
run_folder        the checkpoints of a training run: newest, best, those that stay
checkpoint        save_checkpoint, load_checkpoint, load_weights, AsyncCheckpointWriter
checkpoint_errors errors of reading and writing a checkpoint, as sentences
writer_processes  the processes that write a checkpoint end with their parent
saved_model       load_model, save_model, save_state
hf_folder         import_hf, export_hf: Hugging Face folder to checkpoint and back
optimizer_state   the distributed optimizer's state at any layout
output_lock       locked: one job at a time in an output folder
run_log           append_record, records_of
curves            CORRECTION, DISTILLATION: metrics files of training runs
files             atomic writes, fingerprints
written_files     the files of an artifact that the user added or edited
"""
