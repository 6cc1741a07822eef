"""What the model sees and hears: scans as patches, sounds as spectrograms, both varied by a random draw."""

import functools
import wave
from pathlib import Path

import numpy as np
from PIL import Image


SIDE = 8  # pixels
PATCHES = 4  # of 4 x 4 pixels
RATE = 8000  # samples a second
SAMPLES = 4000  # half a second
FRAMES, WINDOW, BANDS = 16, 256, 24


@functools.cache
def scan(path):
    """Return a PNG file as ink from 0 to 1 [8, 8]."""
    return np.asarray(Image.open(path), dtype=np.float32) / 255


@functools.cache
def voice(path):
    """Return a WAV file of 8 bits as values from -1 to 1."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.uint8).astype(np.float32) / 128 - 1


def moved(ink, draws):
    """Return a scan moved by less than a pixel, with more or less ink."""
    for axis in (0, 1):
        by = draws.uniform(-0.7, 0.7)
        there = np.roll(ink, int(np.sign(by)), axis)
        ink = (1 - abs(by)) * ink + abs(by) * there
    return ink * np.float32(draws.uniform(0.85, 1.15))


def larger(ink, times):
    """Return a picture with so many times as many pixels along each side, interpolated."""
    for axis in (0, 1):
        size = ink.shape[axis]
        places = (np.arange(size * times) + 0.5) / times - 0.5
        below = np.floor(places).astype(int)
        part = np.expand_dims(places - below, 1 - axis)
        first, second = (ink.take((below + i).clip(0, size - 1), axis) for i in (0, 1))
        ink = first * (1 - part) + second * part
    return ink


def patches(ink):
    """Return a scan as its four quarters [4, 16]."""
    return ink.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(PATCHES, 16)


def spoken(sound, draws):
    """Return half a second of a sound: stretched, which also shifts its pitch, somewhere in time, and in noise."""
    length = round(len(sound) * draws.uniform(0.8, 1.25))
    stretched = np.interp(np.linspace(0, len(sound) - 1, length), np.arange(len(sound)), sound)
    start = draws.integers(0, SAMPLES - length + 1)
    heard = np.zeros(SAMPLES)
    heard[start : start + length] = stretched * draws.uniform(0.6, 1.4)
    loudness = np.sqrt(np.mean(stretched**2))
    return heard + draws.normal(0, loudness * 10 ** (-draws.uniform(5, 20) / 20), SAMPLES)


@functools.cache
def _bands():
    """Return which frequencies each band averages [129, 24]: narrow bands below, wide ones above."""
    edges = np.geomspace(1.5, WINDOW / 2 + 1, BANDS + 1) - 1
    bins = np.arange(WINDOW // 2 + 1)[:, None]
    inside = np.clip(np.minimum(bins + 0.5, edges[1:]) - np.maximum(bins - 0.5, edges[:-1]), 0, None)
    return inside / inside.sum(axis=0)


def spectrogram(sound):
    """Return the logarithm of the energy of each frame in each band [16, 24], about 0 to 1."""
    starts = np.linspace(0, SAMPLES - WINDOW, FRAMES).astype(int)
    frames = sound[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    energy = np.abs(np.fft.rfft(frames)) ** 2 @ _bands()
    return (np.log(energy + 1e-2).astype(np.float32) + 4) / 10


def folder_of(name):
    """Return the scans of a folder by their digits, for training and held out, and the voices."""
    folder = Path(__file__).parent / name
    paths = sorted(folder.glob("scans/[0-9]-*.png"))
    if not paths:
        raise FileNotFoundError(f"no scans/DIGIT-NUMBER.png in {folder}: run make.py")
    train, held = ([p for i, p in enumerate(paths) if (i % 5 == 0) is out] for out in (False, True))
    return train, held, {int(path.stem): path for path in folder.glob("voices/[0-9].wav")}
