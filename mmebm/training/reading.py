"""How a run reads its data: kept in its checkpoint, so that it serves without the data, and with no other reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmebm.data.base import Modality, MultimodalDataset, TextCodec
from mmebm.data.mnist_svhn import CharacterCodec
from mmebm.data.text_codec import TextAutoencoder

CODEC = "codec.pt"

Description = dict[str, Any]


def describe(data: MultimodalDataset) -> Description:
    """What a checkpoint says of its data, plain values: the set's name, its classes, and of each modality the name,
    shape, kind, words and units, with the settings that its arrays are read with (``info["reading"]``)."""
    settings = data.info.get("reading", {})
    return {
        "set": data.name,
        "classes": list(data.classes),
        "modalities": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "kind": m.kind,
                "words": list(m.words),
                "centre": list(m.centre),
                "spread": list(m.spread),
                "settings": dict(settings.get(m.name, {})),
                "codec": _small_codec(m.codec),
            }
            for m in data.modalities
        ],
    }


def _small_codec(codec: TextCodec | None) -> dict[str, Any] | None:
    """What makes a codec without weights again; None for others, which are files (:func:`keep_codecs`)."""
    if isinstance(codec, CharacterCodec):
        return {"characters": codec.alphabet, "length": codec.length}
    return None


def _made_again(small: Mapping[str, Any] | None) -> TextCodec | None:
    return None if small is None else CharacterCodec(small["length"], small["characters"])


def modalities_of(description: Mapping[str, Any], codecs: Mapping[str, TextCodec]) -> tuple[Modality, ...]:
    """The modalities that :func:`describe` wrote down, captions with their codec in ``codecs`` (by modality)."""
    return tuple(
        Modality(
            m["name"],
            tuple(m["shape"]),
            m["kind"],
            tuple(m["words"]),
            codecs.get(m["name"]) or _made_again(m.get("codec")),
            tuple(m["centre"]),
            tuple(m["spread"]),
        )
        for m in description["modalities"]
    )


def check_reading(description: Mapping[str, Any], data: MultimodalDataset) -> None:
    """That ``data`` is read as the data that the run was trained on.

    Raises:
        ValueError: naming the modality, what differs, and both values.
    """
    here = describe(data)
    then, now = ({m["name"]: m for m in of["modalities"]} for of in (description, here))
    advice = "make the data as it was (in a folder of arrays: meta.json), or train a new run on it"
    if list(then) != list(now):
        raise ValueError(
            f"the run was trained on the modalities {list(then)}, and its data now has {list(now)}: {advice}"
        )
    for name, old in then.items():
        for key, value in old.items():
            if now[name][key] != value:
                raise ValueError(
                    f"modality {name!r} was trained with {key} {_short(value)}, and the data is now read "
                    f"with {key} {_short(now[name][key])}: {advice}"
                )
    if description["classes"] != here["classes"]:
        raise ValueError(
            f"the run was trained with classes {_short(description['classes'])}, and the data now has "
            f"{_short(here['classes'])}: {advice}"
        )


ROWS = 2000  # that are looked at before training
OUTSIDE = 0.05  # a share of the values, beyond which a modality is not what a decoder can say


def check_range(data: MultimodalDataset, own: Sequence[str]) -> None:
    """That the values of every modality lie where its decoder's do, in [-1, 1] but for some; ``own`` are the modalities
    whose decoders are the user's own.

    Raises:
        ValueError: naming the modality and how far its values reach.
    """
    rows = torch.linspace(0, len(data) - 1, min(len(data), ROWS)).long().unique()
    for column, modality in enumerate(data.modalities):
        if modality.kind != "vector" or modality.name in own:
            continue
        x = data.instances(modality.name, data.index[rows.to(data.index.device), column])
        share, most = float((x.abs() > 1).double().mean()), float(x.abs().max())
        if share > OUTSIDE:
            raise ValueError(
                f"modality {modality.name!r}: {100 * share:.0f} % of its values lie outside [-1, 1], where a decoder's "
                f'lie (the largest is {most:.4g}): give its "range" in meta.json (`mmebm init` writes one), or '
                "a decoder of your own"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def codec_file(folder: Path, name: str) -> Path:
    """Where a run keeps the codec of the caption modality ``name``."""
    return folder / (CODEC if name == "caption" else f"codec-{name}.pt")


def keep_codecs(modalities: Iterable[Modality], folder: Path) -> None:
    """Stores fitted text codecs beside the run, those that are not there yet: another fit would be another modality."""
    for modality in modalities:
        file = codec_file(folder, modality.name)
        if isinstance(modality.codec, TextAutoencoder) and not file.is_file():
            modality.codec.save(file)


def stored_codecs(folder: Path, description: Mapping[str, Any]) -> dict[str, TextCodec]:
    """The codecs that :func:`keep_codecs` stored, by modality."""
    files = {m["name"]: codec_file(folder, m["name"]) for m in description["modalities"] if m["kind"] == "caption"}
    return {name: TextAutoencoder.load(file) for name, file in files.items() if file.is_file()}
