"""Checkpoints of a run: saved beside the training, found, verified and loaded. The entrance is `save.Checkpoints`.

How a piece of the training state (consecutive elements of one parameter that one rank owns) is saved:

1. `parallel/zero/partitions.py`: `ShardedState` returns this rank's flat tensors and where each parameter is in them.
2. `checkpoint/save.py`: `Checkpoints.begin` takes a snapshot between two steps; a thread writes and publishes it.
3. `parallel/ranks/background.py`: `HostCopies` copies tensors to the host, `SideGroup` is the thread's process group.
4. `checkpoint/state.py`: `write_state` stores each piece as KIND/PARAMETER with its place in the whole parameter.
5. `model/weights.py`: `SafetensorsWriter` writes the bytes of the file.
6. `durable.py`: the folder is flushed and gets its name step<N> when it is complete.

How it is loaded into another number of ranks, ep_size or ZeRO stage:

7. `checkpoint/load.py`: `find_checkpoints` and `first_sound` choose and verify one, `load_checkpoint` loads it:
   `StateReader` (4) reads the elements that a rank owns now, and `ShardedState.restore` (1) fills its partitions.

Beside that walk: `weights` assembles live.safetensors and ema.safetensors, `manifest` describes and hashes whole files,
`retention` decides which folders stay, `rng` saves generator states.
"""
