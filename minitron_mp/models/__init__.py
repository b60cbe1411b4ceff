"""What a model is: on paper, in Hugging Face files, and in Megatron-Core.

arch                  Arch, BlockArch: sizes and switches of a decoder
parameters, blocks    checkpoint keys, and the dimensions of each parameter
axes                  AXES: the prunable axes
families              one Family for each model family of transformers
model_folder          the files of a Hugging Face folder
hf_config             config.json; rope: its rotary settings in both forms
hf_weights            the weights of a Hugging Face folder, read; hf_writer: a folder, written
build                 build_model; transformer_config, layer_spec, layers, engine_layers: its parts
sharded_model         ShardedModel: a model as one rank holds it
precision             which layers run, and FP8; number_formats: its tables
flops                 operations of a model
"""
