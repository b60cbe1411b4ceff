"""Models: their sizes, their Hugging Face files, and their modules in Megatron-Core.

arch                sizes and switches of a decoder, shapes of its parameters
parameters, blocks  checkpoint keys, and the dimensions of each parameter
axes                the prunable axes
families            one file for each model family of transformers
hf_config           reads and writes config.json
hf_weights          converts the weights of a Hugging Face folder
build               build_model(); transformer_config, layer_spec and layers are its parts
sharded_model       ShardedModel: one model as this rank holds it
precision           local or Transformer Engine's layers, and FP8
flops               floating point operations of a model
"""
