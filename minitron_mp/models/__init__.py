"""What a model is: on paper, in Hugging Face files, and in Megatron-Core.

Arch (arch), the tables of parameters (parameters, blocks), read_arch (hf_config), build_model (build), precision switches (precision).
"""
