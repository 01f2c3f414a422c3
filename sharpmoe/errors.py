"""Every error that a user can fix. Imports nothing, so that any module may raise them.

A message is one line: what is wrong, where, what was given, what is allowed, how to fix it.
"""


class SharpMoEError(Exception):
    """Base of all errors that a user can fix; launchers print it as one line and exit with 2."""


class ConfigError(SharpMoEError):
    """A run file, an override or a DeepSpeed JSON holds something that cannot be run."""


class DataError(SharpMoEError):
    """Images, captions or shards are missing, damaged, or do not fit the run."""


class DamageError(DataError):
    """One sample, or a whole shard, is damaged or gone; data.max_bad_fraction says how many a run accepts."""


class CheckpointError(SharpMoEError):
    """A checkpoint or a weights file is missing, damaged, or belongs to another model or layout."""


class TrainingError(SharpMoEError):
    """A run cannot continue: a loss or a gradient is not finite."""
