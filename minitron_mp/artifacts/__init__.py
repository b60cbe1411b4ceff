"""What is on disk: manifests, sharded checkpoints, optimizer state, the run log.

Manifest, find_manifest, require_artifact, writing_artifact (manifest), save_checkpoint, load_weights (checkpoint).
"""
