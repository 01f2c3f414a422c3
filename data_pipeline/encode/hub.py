"""Models of the Hugging Face Hub by name: whether one can be had, found out in seconds."""

from pathlib import Path

_PATIENCE = 5.0  # seconds for an answer


def check_model_is_had(name: str) -> None:
    """Raise OSError where a name is no folder, nothing of it is in the cache, and the Hub does not answer for it.

    The loaders of transformers and diffusers ask for several files and try each six times, more than a minute without a
    network.
    """
    if Path(name).exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache  # noqa: PLC0415  (optional)

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001 - the errors of its HTTP client are of no common kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"no such folder here, and the Hub has no such model or cannot be reached: {reason}") from None
