"""What a model is: on paper, in Hugging Face files, and in Megatron-Core.

arch                sizes and switches of a decoder, shapes of its parameters
parameters, blocks  checkpoint keys, and the dimensions of each parameter
axes                the prunable axes
families            one file for each model family of transformers
hf_config           config.json
hf_weights          the weights of a Hugging Face folder
build               build_model(); transformer_config, layer_spec and layers are its parts
precision           which layers run, and FP8
flops               operations of a model
"""
