"""What a model is: on paper, in Hugging Face files, and in Megatron-Core.

Arch and AXES (arch), read_arch (hf_config), build_model (build), precision switches (precision).
"""
