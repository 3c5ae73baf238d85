"""Spoken words: the Free Spoken Digit Dataset, and TIMIT from a licensed copy.

The features are those of work on TIMIT (Graves and Schmidhuber 2005): of every 10 ms the 12 Mel
cepstral coefficients and the energy, with their first and second derivatives, 39 numbers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewire.app.data.dataset import IGNORED, Dataset
from rewire.app.data.download import Progress
from rewire.app.data.files import needed
from rewire.app.data.public import cache_folder, find
from rewire.app.errors import DataError
from rewire.storage.files import sha256_bytes, sha256_file, write_atomic
from rewire.storage.reading import brief

__all__ = ["features", "fsdd", "timit"]

PACKED = "fsdd.npz"
#: The speaker that `fsdd-speaker` tests on.
HELD_OUT = "theo"
#: Changes with the features, so that those of an older version are not taken from the cache.
VERSION = 1

#: The 24 speakers of TIMIT's core test set.
_CORE = """
MDAB0 MWBT0 FELC0 MTAS1 MWEW0 FPAS0 MJMP0 MLNT0 FPKT0 MLLL0 MTLS0 FJLM0 MBPM0 MKLT0
FNLP0 MCMJ0 MJDH0 FMGD0 MGRT0 MNJM0 FDHC0 MJLN0 MPAM0 FMLD0
"""
CORE = frozenset(_CORE.split())
_PHONES = """
aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h#
hh hv ih ix iy jh k kcl l m n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z
zh
"""
PHONES = tuple(_PHONES.split())


def features(sound: NDArray[np.int16], rate: int) -> NDArray[np.float32]:
    """(steps, 39) of a recording; a step is 10 ms and looks at 25 ms."""
    try:
        from python_speech_features import delta, mfcc
    except ImportError:
        raise needed("python-speech-features", "speech") from None
    length = 1 << (int(0.025 * rate) - 1).bit_length()
    # the first of 13 coefficients is replaced by the logarithm of the energy
    static = mfcc(sound, rate, numcep=13, nfft=length, appendEnergy=True)
    first = delta(static, 2)
    found = np.concatenate([static, first, delta(first, 2)], 1)
    return np.asarray(found, np.float32)


def _padded(sounds: Sequence[NDArray[np.float32]], steps: int) -> Tensor:
    """(samples, steps * features); what is short ends with steps of zeros."""
    x = torch.zeros(len(sounds), steps, sounds[0].shape[1])
    for number, sound in enumerate(sounds):
        x[number, : len(sound)] = torch.from_numpy(sound)
    return x.flatten(1)


def fsdd(
    data_dir: Path | None,
    mirror: str | None,
    progress: Progress | None,
    *,
    held_out: str | None = None,
) -> Dataset:
    """Spoken digits: takes 0 to 4 of each speaker and digit are the test set (the official
    division), or all of the speaker ``held_out``.
    """
    if data_dir is None:
        raise DataError(
            "--data fsdd: give --data-dir FOLDER with recordings/DIGIT_SPEAKER_TAKE.wav of "
            "https://github.com/Jakobovski/free-spoken-digit-dataset, or with fsdd.npz"
        )
    packed = find(data_dir, "fsdd", PACKED)
    if packed is not None:
        recordings, sums = list(_packed(packed)), {PACKED: sha256_file(packed)}
    else:
        recordings = list(_recordings(data_dir))
        joined = b"".join(sound.tobytes() for *_, sound in recordings)
        sums = {"recordings": sha256_bytes(joined)}
    found = _kept(sums, [sound for *_, sound in recordings])
    steps = max(map(len, found))
    x = _padded(found, steps)
    y = torch.tensor([digit for digit, *_ in recordings])
    if held_out is None:
        test = torch.tensor([take < 5 for _, _, take, _ in recordings])
    else:
        test = torch.tensor([speaker == held_out for _, speaker, *_ in recordings])
    if not test.any() or test.all():
        raise DataError(f"--data fsdd: {data_dir} has no recordings of both parts")
    return Dataset(
        "fsdd" if held_out is None else "fsdd-speaker",
        x[~test],
        y[~test],
        x[test],
        y[test],
        tuple("0123456789"),
        sha256=sums,
        shape=(steps, 39),
        standardise=True,
        padded=True,
        stratify=True,
    )


def _kept(
    sums: Mapping[str, str], sounds: Sequence[NDArray[np.int16]]
) -> list[NDArray[np.float32]]:
    """The features of all recordings; they take a quarter of a minute, so they are kept in the
    cache, under the sum of the recordings.
    """
    sum_of_all = sha256_bytes("".join(sums.values()).encode())
    path = cache_folder() / "fsdd" / f"features-{VERSION}-{sum_of_all[:16]}.npy"
    ends = np.cumsum([0, *(steps_of(len(sound), 8000) for sound in sounds)])
    with contextlib.suppress(OSError, ValueError):
        whole = np.load(path, allow_pickle=False)
        if whole.shape == (ends[-1], 39) and whole.dtype == np.float32:
            return [whole[a:b] for a, b in itertools.pairwise(ends.tolist())]
    found = [features(sound, 8000) for sound in sounds]
    with contextlib.suppress(OSError):  # no cache, no harm
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.save(packed, np.concatenate(found))
        write_atomic(path, packed.getvalue())
    return found


def steps_of(samples: int, rate: int) -> int:
    """Steps of a recording of so many samples, as `features` has them."""
    window, move = round(0.025 * rate), round(0.01 * rate)
    return 1 + max(0, -(-(samples - window) // move))


Recording = tuple[int, str, int, NDArray[np.int16]]


def _packed(path: Path) -> Iterator[Recording]:
    try:
        with np.load(path, allow_pickle=False) as file:
            z = {name: file[name] for name in file.files}
        ends = z["offsets"].tolist()
        names = z["speaker_names"].tolist()
        for i, (digit, speaker, take) in enumerate(
            zip(z["labels"].tolist(), z["speaker"].tolist(), z["take"].tolist(), strict=True)
        ):
            yield int(digit), str(names[speaker]), int(take), z["audio"][ends[i] : ends[i + 1]]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"cannot read {path}: {brief(error)}") from None


def _recordings(data_dir: Path) -> Iterator[Recording]:
    places = (data_dir / "fsdd" / "recordings", data_dir / "recordings", data_dir)
    folder = next((p for p in places if any(p.glob("[0-9]_*_*.wav"))), None)
    if folder is None:
        raise DataError(
            f"--data-dir {data_dir}: no {PACKED}, and no recordings/DIGIT_SPEAKER_TAKE.wav there"
        )
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        digit, speaker, take = path.stem.split("_", 2)
        try:
            with wave.open(str(path)) as file:
                kind = file.getframerate(), file.getsampwidth(), file.getnchannels()
                if kind != (8000, 2, 1):
                    raise DataError(f"{path}: needed is 16-bit mono at 8000 Hz, found {kind}")
                sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            yield int(digit), speaker, int(take), sound
        except (OSError, EOFError, wave.Error, ValueError) as error:
            raise DataError(f"cannot read {path}: {brief(error)}") from None


def timit(data_dir: Path | None, mirror: str | None, progress: Progress | None) -> Dataset:
    """TIMIT, 61 phones at each step: the training sentences without the two that all speakers say,
    and the core test set of 192 sentences.
    """
    if data_dir is None:
        raise DataError(
            "--data timit: TIMIT is licensed (LDC93S1): give --data-dir FOLDER, the folder that "
            "has TRAIN and TEST"
        )
    root = next(
        (p for p in (data_dir, *data_dir.glob("*"), *data_dir.glob("*/*")) if _part(p, "train")),
        None,
    )
    if root is None:
        raise DataError(f"--data-dir {data_dir}: there is no folder TRAIN of TIMIT")
    found: dict[str, tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]] = {}
    sums: dict[str, str] = {}
    for part in ("train", "test"):
        folder = _part(root, part)
        if folder is None:
            raise DataError(f"--data-dir {data_dir}: there is no folder {part.upper()} of TIMIT")
        sounds, phones, content = [], [], []
        for path in sorted(folder.glob("*/*/*"), key=lambda p: str(p).upper()):
            is_sound = path.suffix.upper() == ".WAV" and not path.name.upper().startswith("SA")
            if not is_sound or (part == "test" and path.parent.name.upper() not in CORE):
                continue
            sound, rate = _sphere(path)
            x = features(sound, rate)
            sounds.append(x)
            phones.append(_phones(path, len(x), rate))
            content.append(sound.tobytes())
        if not sounds:
            raise DataError(f"{folder} has no sentences of TIMIT (DR*/SPEAKER/*.WAV)")
        found[part] = sounds, phones
        sums[part] = sha256_bytes(b"".join(content))
    steps = max(len(x) for sounds, _ in found.values() for x in sounds)
    y = {}
    for part, (_, phones) in found.items():
        labels = torch.full((len(phones), steps), IGNORED)
        for number, own in enumerate(phones):
            labels[number, : len(own)] = torch.from_numpy(own)
        y[part] = labels
    return Dataset(
        "timit",
        _padded(found["train"][0], steps),
        y["train"],
        _padded(found["test"][0], steps),
        y["test"],
        PHONES,
        sha256=sums,
        shape=(steps, 39),
        standardise=True,
        padded=True,
    )


def _part(root: Path, name: str) -> Path | None:
    if not root.is_dir():
        return None
    return next((p for p in root.iterdir() if p.is_dir() and p.name.lower() == name), None)


def _sphere(path: Path) -> tuple[NDArray[np.int16], int]:
    """Samples and rate of a NIST SPHERE file (16-bit PCM, as TIMIT has it) or an ordinary WAV."""
    try:
        content = path.read_bytes()
        if content[:4] == b"RIFF":
            with wave.open(str(path)) as file:
                return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()
        lines = content[:1024].decode("ascii").splitlines()
        if lines[0] != "NIST_1A":
            raise ValueError("it is neither a NIST SPHERE nor a RIFF file")
        fields = dict(line.split(" -", 1) for line in lines[2:] if " -" in line)
        named = {name.strip(): value.split(" ", 1)[-1] for name, value in fields.items()}
        order = "<i2" if named.get("sample_byte_format", "01") == "01" else ">i2"
        body = content[int(lines[1]) :]
        return np.frombuffer(body[: len(body) // 2 * 2], order), int(named["sample_rate"])
    except (OSError, ValueError, KeyError, IndexError, wave.Error) as error:
        raise DataError(f"cannot read {path}: {brief(error)}") from None


def _phones(path: Path, steps: int, rate: int) -> NDArray[np.int64]:
    """The phone in the middle of each step, from the file beside the recording."""
    beside = next(
        (p for p in path.parent.iterdir() if p.stem == path.stem and p.suffix.upper() == ".PHN"),
        None,
    )
    if beside is None:
        raise DataError(f"{path}: there is no {path.stem}.PHN beside it")
    try:
        marks = [line.split() for line in beside.read_text("ascii").splitlines() if line.strip()]
        ends = np.array([int(end) for _, end, _ in marks])
        names = np.array([PHONES.index(phone) for *_, phone in marks])
    except ValueError as error:
        raise DataError(f"cannot read {beside}: {brief(error)}") from None
    middles = np.arange(steps) * (rate // 100) + int(0.0125 * rate)
    places = np.searchsorted(ends, middles, side="right").clip(max=len(names) - 1)
    return np.asarray(names[places], np.int64)
