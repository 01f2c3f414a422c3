"""Images and captions to samples, and samples to WebDataset tars with the same bytes on every machine."""

import errno
import io
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.codecs import CachedLatent, Codec, Posterior
from data_pipeline.encode.saliency import EncodedImages, Maps
from data_pipeline.encode.texts import TEXT_DTYPES, TextEncoder, TextStates
from data_pipeline.index import Places
from data_pipeline.members import BFLOAT16_BITS, encode_json, encode_npy
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.counts import Counts
from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.survey import unreadable
from data_pipeline.sources.animations import frames_of, load_clip
from data_pipeline.sources.images import UNREADABLE, Picture, load_map, load_picture, mirror
from data_pipeline.sources.items import ImageSource, Item, Skipped, hash_int
from sharpmoe.errors import DataError
from sharpmoe.saliency import token_mask

BATCH = 32  # images encoded together
_AHEAD = 2 * BATCH  # images decoded in advance
# Errors that concern one file; any other error number is a failure of the disk.
_OF_ONE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Everything that is needed to turn items into samples."""

    source: ImageSource
    recipe: Recipe
    codec: Codec
    encoder: TextEncoder
    make_maps: Maps  # of saliency
    threads: int


class Encoded(NamedTuple):
    """One sample, ready to be written."""

    key: str
    members: dict[str, bytes]  # extension -> content
    text_length: int  # tokens of its longest caption
    counts: Counts = Counts()


class _DecodedBatch(NamedTuple):
    """Images that are encoded together, and those that could not be read."""

    items: list[Item]
    pictures: list[Picture]
    skipped: list[Skipped]


def decoded_batches(worker: Worker, items: list[Item], image_size: tuple[int, int]) -> Iterator[_DecodedBatch]:
    """Decode in threads; every batch but the last holds `BATCH` images (of clips, frames) that could be read."""
    batch, size = _DecodedBatch([], [], []), max(1, BATCH // worker.recipe.frames)
    for item, picture in decoded_pictures(worker.source, items, image_size, worker.threads, worker.recipe):
        if isinstance(picture, Skipped):
            batch.skipped.append(picture)
            continue
        batch.items.append(item)
        batch.pictures.append(picture)
        if len(batch.items) == size:
            yield batch
            batch = _DecodedBatch([], [], [])
    yield batch


def decoded_pictures(
    source: ImageSource, items: list[Item], size: tuple[int, int], threads: int, recipe: Recipe
) -> Iterator[tuple[Item, Picture | Skipped]]:
    """Yield items with their decoded images or clips, in order; at most `_AHEAD` images are in memory."""
    waiting: deque[tuple[Item, Future[Picture | Skipped]]] = deque()
    left, ahead = iter(items), max(2, _AHEAD // recipe.frames)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for item in islice(left, ahead - len(waiting)):
                waiting.append((item, pool.submit(_try_load, source, item, size, recipe)))
            if not waiting:
                return
            item, picture = waiting.popleft()
            yield item, picture.result()


def _try_load(source: ImageSource, item: Item, size: tuple[int, int], recipe: Recipe) -> Picture | Skipped:
    """Return the image with its maps, or why it cannot be used. Raises DataError where the disk itself fails."""
    what = ""
    try:
        content = source.read(item)
        if recipe.frames == 1:
            picture = load_picture(content, size, recipe.fit)
        else:
            picture = load_clip(content, size, recipe.fit, recipe.frames)
        if item.saliency is not None:
            what = "its saliency map is "
            assert picture.view is not None
            content = source.read(replace(item, image=item.saliency))
            picture = picture._replace(saliency=load_map(content, picture.view))
        if lacking := recipe.saliency.lacking(picture):
            return Skipped(item.name, lacking)
        return mirror(picture) if item.flip else picture
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
            raise DataError(
                f"{item.name}: cannot be read ({error}); nothing is lost, run the same command again"
            ) from None
        return Skipped(item.name, what + unreadable(error))


def encode_batch(worker: Worker, resolution: Resolution, batch: _DecodedBatch) -> Iterator[Encoded | Skipped]:
    """Encode every image or clip of a batch; one whose saliency map is not finite is left out.

    Clips are encoded frame by frame, as images, and so are their maps.

    Raises DataError where another result is not finite.
    """
    images = torch.from_numpy(np.stack([picture.pixels for picture in batch.pictures]))
    latents = _latents(worker, batch.items, images)
    texts = _texts(worker, batch.items)
    saliency, substituted = _saliency(worker, resolution, batch, images, latents["latent"], texts)
    for row, item in enumerate(batch.items):
        if not saliency[row].isfinite().all():
            yield Skipped(item.name, "its saliency map is not finite")
            continue
        arrays = {name: tensor[row] for name, tensor in latents.items()}
        arrays |= {"saliency": saliency[row], **texts[row]}
        alpha = batch.pictures[row].alpha
        if alpha is not None:
            parts = [torch.from_numpy(frame.alpha) for frame in frames_of(batch.pictures[row])]
            arrays["foreground"] = token_mask(torch.stack(parts), _of_frame(resolution)).flatten()
        longest = max(len(arrays[_numbered("text", number)]) for number in range(len(item.captions)))
        counts = replace(
            _counted(worker.encoder, item, batch.pictures[row]),
            flat_maps=int(saliency[row].min() == saliency[row].max()),
            substituted=int(substituted[row]),
        )
        yield Encoded(item.key, _members(item, arrays), longest, counts)


def _of_frame(resolution: Resolution) -> tuple[int, int]:
    """Return the tokens (h, w) of an image, or of a frame."""
    height, width = resolution.grid[-2:]
    return height, width


def _saliency(
    worker: Worker,
    resolution: Resolution,
    batch: _DecodedBatch,
    images: Tensor,
    latents: Tensor,
    texts: list[dict[str, Tensor]],
) -> tuple[Tensor, list[bool]]:
    """Return the maps (B, N), made of every frame as of an image, and which are substitutes in a frame or more."""
    frames = worker.recipe.frames
    pictures = [frame for picture in batch.pictures for frame in frames_of(picture)]
    keys = [item.key if frames == 1 else f"{item.key}/{at}" for item in batch.items for at in range(frames)]
    seen = EncodedImages(
        images=images if frames == 1 else _frames(images),
        pictures=pictures,
        grid=_of_frame(resolution),
        latents=latents if frames == 1 else _frames(latents),
        texts=[text for text in texts for _ in range(frames)],
        labels=[item.label for item in batch.items for _ in range(frames)],
        numbers=[hash_int(key) >> 2 for key in keys],
    )
    saliency, substituted = worker.recipe.saliency.maps(worker.make_maps, seen)
    by_item = [any(substituted[at : at + frames]) for at in range(0, len(keys), frames)]
    return saliency.reshape(len(batch.items), -1), by_item


def _counted(encoder: TextEncoder, item: Item, picture: Picture) -> Counts:
    lengths = encoder.lengths([text for text, _ in item.captions])
    return Counts(
        pictures=1,
        enlarged=int(picture.enlarged),
        captions=len(lengths),
        cut=sum(length.tokens > length.kept for length in lengths),
        longest=max(length.tokens for length in lengths),
        kept=max(length.kept for length in lengths),
    )


def _latents(worker: Worker, items: list[Item], images: Tensor) -> dict[str, Tensor]:
    """Return latents (B, C, [T,] h, w) float16 by the names of their members."""
    stored = _stored(worker, items, _posterior(worker, items, images, flip=False), "latent")
    if worker.recipe.flip_pair:
        stored |= _stored(worker, items, _posterior(worker, items, images, flip=True), "latent_flip")
    return stored


def _stored(worker: Worker, items: list[Item], found: Posterior, name: str) -> dict[str, Tensor]:
    kind = worker.recipe.posterior
    if kind == "mean":
        return {name: found.mean.half()}
    if found.std is None:
        raise DataError(f"posterior {kind}: no standard deviations in the cached latents; use posterior mean")
    if kind == "std":
        return {name: found.mean.half(), f"{name}_std": found.std.half()}
    noise = torch.stack([_noise(f"{name} {item.key}", found.mean.shape[1:]) for item in items])
    return {name: (found.mean + found.std * noise).half()}


def _noise(key: str, shape: torch.Size) -> Tensor:
    """Draw standard normal numbers that depend on the sample alone."""
    generator = np.random.Generator(np.random.Philox(key=hash_int(key)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def _posterior(worker: Worker, items: list[Item], images: Tensor, flip: bool) -> Posterior:
    """Encode images (B, 3, [T,] H, W), or with `flip` their mirror images; clips frame by frame."""
    cached = [CachedLatent(item.name, item.latent, item.flip != flip) for item in items]
    images = images.flip(-1) if flip else images
    if images.ndim == 4:
        return worker.codec.posterior(images, cached)
    mean, std = worker.codec.posterior(_frames(images))
    clips = len(items), images.shape[2]
    return Posterior(_clips(mean, clips), None if std is None else _clips(std, clips))


def _frames(clips: Tensor) -> Tensor:
    """Return all frames (B T, C, H, W) of clips (B, C, T, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(frames: Tensor, clips: tuple[int, int]) -> Tensor:
    """Return clips (B, C, T, H, W), given (B, T), of all their frames (B T, C, H, W)."""
    return frames.unflatten(0, clips).transpose(1, 2).contiguous()


def _texts(worker: Worker, items: list[Item]) -> list[dict[str, Tensor]]:
    """Encode every caption of every item: all first captions together, then all second ones."""
    arrays: list[dict[str, Tensor]] = [{} for _ in items]
    for number in range(max(len(item.captions) for item in items)):
        rows = [row for row, item in enumerate(items) if number < len(item.captions)]
        text = worker.encoder.encode([items[row].captions[number][0] for row in rows])
        for place, row in enumerate(rows):
            found = text_arrays(text, place, worker.recipe.text_dtype)
            arrays[row] |= {_numbered(name, number): array for name, array in found.items()}
    return arrays


def _numbered(name: str, number: int) -> str:
    return f"{name}{number}" if number else name


def text_arrays(text: TextStates, row: int, dtype: str) -> dict[str, Tensor]:
    """Return token states (L, D) in a dtype of TEXT_DTYPES without padding, and pooled states (D,) float32, if any."""
    arrays = {"text": text.states[row, text.mask[row]].to(TEXT_DTYPES[dtype])}
    return arrays | ({"pooled": text.pooled[row].float()} if text.pooled.shape[1] else {})


def stored_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as it is stored: bfloat16 as its bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16_BITS)
    return tensor.numpy()


def _members(item: Item, arrays: dict[str, Tensor]) -> dict[str, bytes]:
    members = {}
    for name, tensor in arrays.items():
        if not tensor.isfinite().all():
            large = name.startswith("text") and tensor.dtype == torch.float16
            remedy = "use --text-dtype bfloat16" if large else "use another codec or encoder"
            raise DataError(f"{item.name}: its {name} is not finite in {tensor.dtype}; {remedy}")
        members[f"{name}.npy"] = encode_npy(stored_array(tensor))
    several = [{"text": text, "weight": weight} for text, weight in item.captions]
    meta = {"file": item.name, "label": item.label, "split": item.split}
    meta |= {"captions": several} if len(several) > 1 else {}
    return {**members, "json": encode_json(meta), "txt": item.captions[0][0].encode()}


def write_tar(path: Path, samples: Iterable[Encoded]) -> tuple[list[tuple[str, Places]], int]:
    """Write a tar; return (key, {extension: (offset, size, crc32)}) per sample, and the tokens of the longest text."""
    found: list[tuple[str, Places]] = []
    longest = 0
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            places = {}
            for extension, content in sorted(sample.members.items()):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid stay 0
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                end = stream.tell() - (-len(content) % tarfile.BLOCKSIZE)
                places[extension] = (end - len(content), len(content), zlib.crc32(content))
            found.append((sample.key, places))
            longest = max(longest, sample.text_length)
    return found, longest
