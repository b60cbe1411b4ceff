"""Artifacts on disk: manifests, sharded checkpoints, optimizer state, the run log.

manifest          Manifest, find_manifest, require_artifact, writing_artifact
checkpoint        save_checkpoint, load_checkpoint, load_weights, AsyncCheckpointWriter
saved_model       load_model, save_model, save_state
hf_folder         import_hf, export_hf
optimizer_state   the distributed optimizer's state, for any layout
run_log           append_record, records_of
files             atomic writes, JSON, fingerprints
"""
