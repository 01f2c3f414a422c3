"""Process groups, dispatchers and the engine: the only room that knows DeepSpeed, Megatron-core and apex."""
