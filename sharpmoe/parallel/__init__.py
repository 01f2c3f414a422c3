"""Process groups, dispatchers and the engine: the only folder that imports DeepSpeed, Megatron-core and apex."""
