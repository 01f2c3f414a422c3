"""Codecs and text encoders by kind: from command-line options, from a recipe, and from the identity in the shards.

To add a codec, write a class with the methods of `encode.codecs.Codec` and add a row to CODECS; to add a text encoder,
write a class with those of `encode.texts.TextEncoder` and add a row to ENCODERS.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.encode.autoencoders import CachedMoments, KLAutoencoder, QwenAutoencoder
from data_pipeline.encode.codecs import Codec, Pixel
from data_pipeline.encode.patch_pca import PatchPCA
from data_pipeline.encode.texts import HashTextEncoder, JoinedTextEncoder, TextEncoder
from data_pipeline.encode.transformer_texts import MINILM, TransformerTextEncoder
from data_pipeline.identity import Identity, check_identity
from sharpmoe.errors import DataError, first_line
from sharpmoe.invocation import spell_command

CODEC_FILE = "codec.safetensors"
DEFAULT_AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # of codecs in the latents of Stable Diffusion
_TRANSFORMER_SETTINGS = ("max_length", "layer", "pooled", "dtype", "chat")

Options = Mapping[str, Any]  # command-line options of launcher/prepare.py by name
Tensors = Mapping[str, Tensor]


class CodecKind(NamedTuple):
    """How codecs of one kind are chosen and made."""

    settings: Callable[[Options], Identity]  # what a recipe says of the codec, without its kind
    create: Callable[[Identity, Iterable[Tensor], str], Codec]  # from a recipe, training images and a device
    restore: Callable[[Identity, Tensors, str], Codec]  # from an identity, the stored tensors and a device
    is_fitted: bool = False  # it is fitted to the training images, which one rank does for all
    is_cached: bool = False  # its latents were made elsewhere
    has_std: bool = False  # it may have a standard deviation beside the mean
    options: tuple[str, ...] = ()  # command-line options that `settings` reads


class EncoderKind(NamedTuple):
    """How text encoders of one kind are chosen and made."""

    settings: Callable[[str], Identity] | None  # what a recipe says of `--encoder NAME`; None: not chosen by a name
    create: Callable[[Identity, str], TextEncoder]  # from a recipe or an identity, and a device
    options: tuple[str, ...] = ()  # of `--encoder NAME,OPTION=VALUE`


def _sd_name(options: Options) -> Identity:
    return {"name": options["codec_name"] or DEFAULT_AUTOENCODER}


def _qwen_name(options: Options) -> Identity:
    if not options["codec_name"]:
        raise DataError("--codec autoencoder_qwen: no autoencoder is named; give its folder with --codec-name")
    return {"name": options["codec_name"]}


CODECS: dict[str, CodecKind] = {
    "patch_pca": CodecKind(
        settings=lambda options: {
            "patch": options["pca_patch"],
            "channels": options["pca_channels"],
            "whiten": options["pca_whiten"],
        },
        create=lambda spec, images, _: PatchPCA.fit(images, spec["patch"], spec["channels"], spec["whiten"]),
        restore=lambda spec, found, _: PatchPCA(
            spec["patch"], spec["whiten"], found["mean"], found["basis"], found["scale"]
        ),
        is_fitted=True,
        options=("pca_patch", "pca_channels", "pca_whiten"),
    ),
    "autoencoder_kl": CodecKind(
        settings=_sd_name,
        create=lambda spec, _, device: KLAutoencoder(spec["name"], device),
        restore=lambda spec, _, device: KLAutoencoder(spec["name"], device),
        has_std=True,
        options=("codec_name",),
    ),
    "autoencoder_qwen": CodecKind(
        settings=_qwen_name,
        create=lambda spec, _, device: QwenAutoencoder(spec["name"], device),
        restore=lambda spec, _, device: QwenAutoencoder(spec["name"], device),
        has_std=True,
        options=("codec_name",),
    ),
    "cached_moments": CodecKind(
        settings=_sd_name,
        create=lambda spec, _, device: CachedMoments(spec["name"], device),
        restore=lambda spec, _, device: CachedMoments(spec["name"], device),
        is_cached=True,
        has_std=True,
        options=("codec_name",),
    ),
    "pixel": CodecKind(
        settings=lambda _: {},
        create=lambda _spec, _images, _device: Pixel(),
        restore=lambda _spec, _tensors, _device: Pixel(),
    ),
}
CODEC_CHOICES = tuple(kind for kind, codec in CODECS.items() if not codec.is_cached)  # of --codec


def _nucleus_prompt() -> str:
    try:
        from diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image import (  # noqa: PLC0415  (optional)
            DEFAULT_SYSTEM_PROMPT,
        )
    except ImportError:
        raise DataError(
            "--encoder chat=nucleus: takes the system prompt from diffusers; pip install diffusers"
        ) from None
    prompt: str = DEFAULT_SYSTEM_PROMPT
    return prompt


_PROMPTS: dict[str, Callable[[], str | None]] = {"plain": lambda: None, "nucleus": _nucleus_prompt}


def _chat_option(text: str) -> dict[str, str | None]:
    """Parse `chat=plain` (no system prompt), `chat=nucleus` (that of Nucleus-Image) or `chat=@FILE`."""
    if not text.startswith("@"):
        return {"system": _PROMPTS[text]()}
    try:
        return {"system": Path(text[1:]).read_text(encoding="utf-8").strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--encoder chat={text}: cannot be read as a text file ({first_line(error)})") from None


_ENCODER_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {  # how a value is read, and what it is
    "layer": (int, "N"),
    "pooled": (str, "mean|last|model|none"),
    "max_length": (int, "N"),
    "dtype": (str, "float32|bfloat16|float16"),
    "chat": (_chat_option, "|".join([*_PROMPTS, "@FILE"])),
}


def _create_transformer(spec: Identity, device: str) -> TextEncoder:
    settings = {name: spec[name] for name in _TRANSFORMER_SETTINGS if name in spec}
    return TransformerTextEncoder(spec["name"], device=device, **settings)


def _create_joined(spec: Identity, device: str) -> TextEncoder:
    return JoinedTextEncoder([build_text_encoder(part, device) for part in spec["encoders"]], spec["along"])


ENCODERS: dict[str, EncoderKind] = {
    "hash": EncoderKind(
        lambda _: {"width": 32}, lambda spec, _: HashTextEncoder(spec["width"], spec["max_length"]), ("max_length",)
    ),
    "transformers": EncoderKind(lambda name: {"name": name}, _create_transformer, _TRANSFORMER_SETTINGS),
    "joined": EncoderKind(None, _create_joined),
}
_CHOSEN_BY_KIND = ("hash",)  # `--encoder hash`; any other name is that of a transformers model


# --- codecs -----------------------------------------------------------------------------------------------------------


def _kind_of(options: Options) -> str:
    return "cached_moments" if options["moments"] else str(options["codec"])


def unread_codec_options(options: Options) -> tuple[str, list[str]]:
    """Return the option that says what the codec is, and the names of options of codecs that are not read beside it."""
    given = next((name for name in ("like", "codec_from", "moments") if options[name]), None)
    read = () if given in ("like", "codec_from") else CODECS[_kind_of(options)].options
    every = dict.fromkeys(name for kind in CODECS.values() for name in kind.options)
    unread = [name for name in every if name not in read]
    if given is None:
        return f"--codec {options['codec']}", unread
    return f"--{given.replace('_', '-')}", ["codec", *unread]


def codec_settings(options: Options) -> Identity:
    """Return what a recipe says of the codec. `--moments` replaces the codec by the cached latents."""
    kind = _kind_of(options)
    return {"kind": kind, **_codec_kind(kind).settings(options)}


def build_codec(spec: Identity, training_images: Iterable[Tensor], device: str = "cpu") -> Codec:
    """Return the codec of a recipe; one that is fitted reads the training images, batches of (B, 3, H, W)."""
    return _codec_kind(spec["kind"]).create(spec, training_images, device)


def codec_bytes(codec: Codec) -> bytes:
    """Return the codec's tensors and identity as a safetensors file."""
    return save(codec.tensors(), metadata={"identity": json.dumps(codec.identity, sort_keys=True)})


def load_codec(folder: str | Path, device: str = "cpu") -> Codec:
    """Load the codec stored with a folder of shards.

    Raises DataError where the file is missing or damaged, or where the weights of an autoencoder are no longer those
    that made the shards.
    """
    path = Path(folder) / CODEC_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _no_codec(str(path), error) from None
    return codec_of(*parse_codec(content, str(path)), device, str(path))


def parse_codec(content: bytes, where: str) -> tuple[Identity, Tensors]:
    """Return identity and tensors of a file that `codec_bytes` has made. Raises DataError, which names `where`."""
    try:
        size = int.from_bytes(content[:8], "little")
        identity = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["identity"])
        return dict(identity), load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _no_codec(where, error) from None


def _no_codec(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: not a codec file ({first_line(error)}); delete it and run "
        f"`{spell_command('prepare')}` again as before"
    )


def codec_of(identity: Identity, tensors: Tensors, device: str = "cpu", where: str = "") -> Codec:
    """Return the codec of an identity and stored tensors. Raises DataError where it is no longer the same."""
    codec = _codec_kind(identity["kind"]).restore(identity, tensors, device)
    check_identity("codec", where or str(identity["kind"]), found=codec.identity, expected=identity)
    return codec


def _codec_kind(kind: str) -> CodecKind:
    if kind not in CODECS:
        raise DataError(f"codec {kind!r}: expected one of {', '.join(CODECS)}")
    return CODECS[kind]


# --- text encoders ----------------------------------------------------------------------------------------------------


def encoder_settings(options: Options) -> Identity:
    """Return what a recipe says of the text encoder: one `--encoder`, or several joined along `--join`.

    Raises DataError for an option that encoders do not have.
    """
    parts = [_one_encoder(text, options["max_length"]) for text in options["encoder"] or [MINILM]]
    return parts[0] if len(parts) == 1 else {"kind": "joined", "along": options["join"], "encoders": parts}


def build_text_encoder(spec: Identity, device: str = "cpu") -> TextEncoder:
    """Return the text encoder of a recipe. Raises DataError where it is missing."""
    if spec["kind"] not in ENCODERS:
        raise DataError(f"text encoder {spec['kind']!r}: expected one of {', '.join(ENCODERS)}")
    return ENCODERS[spec["kind"]].create(spec, device)


def restore_text_encoder(identity: Identity, device: str = "cpu") -> TextEncoder:
    """Return the encoder with which shards were made. Raises DataError where it is missing or has other weights."""
    encoder = build_text_encoder(identity, device)
    check_identity("text encoder", str(identity.get("name", identity["kind"])), encoder.identity, identity)
    return encoder


def _one_encoder(text: str, max_length: int) -> Identity:
    """Parse `NAME` or `NAME,layer=-2,pooled=model,max_length=77,dtype=bfloat16`."""
    name, *options = text.split(",")
    found: Identity = {"max_length": max_length}
    kind = name if name in _CHOSEN_BY_KIND else "transformers"
    readers = {key: reader for key, reader in _ENCODER_OPTIONS.items() if key in ENCODERS[kind].options}
    for option in options:
        key, _, value = option.partition("=")
        try:
            found[key] = readers[key][0](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{key}={what}" for key, (_, what) in readers.items())
            raise DataError(f"--encoder {text}: option {option!r}; expected NAME and any of {known}") from None
    settings = ENCODERS[kind].settings
    assert settings is not None
    return {"kind": kind, **settings(name), **found}
