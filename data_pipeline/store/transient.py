"""What may pass by itself: a busy server, a cut connection, a time-out."""


class TransientError(Exception):
    """A request that is worth another try. Never leaves data_pipeline."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s  # what the server asked for
