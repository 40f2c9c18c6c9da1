"""Encoded bytes to the random crop of training, by every decoder that is installed, in one run on one machine.

    OMP_NUM_THREADS=1 python benchmarks/decoders.py [IMAGES] [--image-size 224] [--images 1000] [--enlarge 3]

IMAGES is a folder or a tar of JPEGs; without it photographs are made. Prints rates, their ratios, and how far pixels
are from Pillow's; results that are worth keeping go to benchmarks/results with the command, the versions, the machine.
The requirements of vitscale are enough. To see more rows, install into an environment of its own any of:
opencv-python-headless, imagecodecs, kornia-rs, pyvips[binary], nvidia-nvimgcodec-cu12; and name a libturbojpeg of
version 3 by --turbojpeg.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import io
import platform
import random
import statistics
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from vitscale.config.schema import DataConfig
from vitscale.data.transforms import Box, inception_crop, resize, train_crop

REPEATS = 9
THREADS = 2
# A measurement counts if other processes took less than this share of a core, beyond what the clock can tell.
DISTURBED = 0.03
CLOCK_TICK_S = 0.011
PACKAGES = (
    "torch pillow simplejpeg opencv-python-headless imagecodecs kornia-rs pyvips pyvips-binary nvidia-nvimgcodec-cu12"
)
CONFIG = DataConfig(train="none", image_size=1, flip=False)

Pixels = NDArray[np.uint8]
Crop = Callable[[bytes, int, Pixels], None]
"""Writes the crop that a seed draws from an encoded image into uint8 [H, W, 3]."""


def draw(width: int, height: int, seed: int) -> Box:
    """The crop of a seed."""
    return inception_crop(width, height, random.Random(seed), area=CONFIG.crop_area, aspect=CONFIG.crop_aspect)


def cut(pixels: Pixels, seed: int) -> Pixels:
    """The crop of a seed out of a decoded image."""
    box = draw(pixels.shape[1], pixels.shape[0], seed)
    return pixels[box.top : box.bottom, box.left : box.right]


def pillow_into(image: Image.Image, out: Pixels, box: tuple[float, float, float, float] | None = None) -> None:
    """Pillow's antialiased bilinear resize."""
    size = (out.shape[1], out.shape[0])
    out[:] = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def pillow() -> Crop:
    """The reference of all pixels. Its filter also sees what lies around the crop."""

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
        pillow_into(image, out, draw(*image.size, seed))

    return crop


def pillow_cut() -> Crop:
    """Only the crop reaches the filter."""

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
        pillow_into(image.crop(draw(*image.size, seed)), out)

    return crop


def pillow_draft() -> Crop:
    """The inverse DCT shrinks what is to be shrunk by at least two."""

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        width, height = image.size
        box = draw(width, height, seed)
        shrink = min((box.right - box.left) / out.shape[1], (box.bottom - box.top) / out.shape[0])
        if shrink >= 2:
            image.draft("RGB", (int(width / shrink) + 1, int(height / shrink) + 1))
        x, y = image.width / width, image.height / height
        pillow_into(image.convert("RGB"), out, (box.left * x, box.top * y, box.right * x, box.bottom * y))

    return crop


def simplejpeg_pillow() -> Crop:
    """The whole image, then Pillow."""
    return lambda data, seed, out: pillow_into(Image.fromarray(cut(simplejpeg.decode_jpeg(data), seed)), out)


def simplejpeg_torch() -> Crop:
    """The whole image, then torch."""
    return lambda data, seed, out: resize(cut(simplejpeg.decode_jpeg(data), seed), out)


def simplejpeg_scaled() -> Crop:
    """The inverse DCT shrinks what is to be shrunk by at least two, then torch."""

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        box = draw(width, height, seed)
        shrink = min((box.right - box.left) / out.shape[1], (box.bottom - box.top) / out.shape[0])
        by = max(n for n in (1, 2, 4, 8) if n == 1 or n <= shrink)
        size = {"min_height": -(-height // by), "min_width": -(-width // by)} if by > 1 else {}
        pixels = simplejpeg.decode_jpeg(data, min_factor=by, **size)
        rows, columns = slice(round(box.top / by), round(box.bottom / by)), slice(round(box.left / by), None)
        resize(pixels[rows, columns][:, : round(box.right / by) - round(box.left / by)], out)

    return crop


def ours() -> Crop:
    """Rows down to the crop's lower edge by simplejpeg, then torch."""
    return lambda data, seed, out: train_crop(data, CONFIG, seed, out)


def simplejpeg_cv2() -> Crop:
    """OpenCV's bilinear filter has no antialiasing."""
    import cv2

    cv2.setNumThreads(1)

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        cv2.resize(cut(simplejpeg.decode_jpeg(data), seed), out.shape[1::-1], dst=out, interpolation=cv2.INTER_LINEAR)

    return crop


def only_cv2() -> Crop:
    """Both steps by OpenCV, averaging over areas where it shrinks."""
    import cv2

    cv2.setNumThreads(1)

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        pixels = cut(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), seed)
        shrinks = pixels.shape[0] > out.shape[0] and pixels.shape[1] > out.shape[1]
        cv2.resize(pixels, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    return crop


def imagecodecs_torch() -> Crop:
    """The whole image, then torch."""
    from imagecodecs import jpeg8_decode

    return lambda data, seed, out: resize(cut(jpeg8_decode(data), seed), out)


def kornia() -> Crop:
    """All steps by kornia-rs."""
    from kornia_rs.image import Image as RustImage

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        image = RustImage.decode(data)
        part = image.crop(tuple(draw(image.width, image.height, seed)))
        out[:] = part.resize(out.shape[1], out.shape[0], "bilinear", True).to_numpy(copy=False)

    return crop


def vips() -> Crop:
    """All steps by libvips, which reads an image from top to bottom."""
    import pyvips

    pyvips.cache_set_max(0)

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        image = pyvips.Image.new_from_buffer(data, "", access="sequential")
        box = draw(image.width, image.height, seed)
        part = image.crop(box.left, box.top, box.right - box.left, box.bottom - box.top)
        out[:] = part.resize(out.shape[1] / part.width, vscale=out.shape[0] / part.height, kernel="linear").numpy()

    return crop


def nvimgcodec_torch() -> Crop:
    """Only the crop is decoded, on the CPU, then torch."""
    from nvidia import nvimgcodec

    own = threading.local()
    as_stored = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        if not hasattr(own, "decoder"):
            on_cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
            own.decoder = nvimgcodec.Decoder(device_id=-99999, max_num_cpu_threads=1, backends=[on_cpu])
        stream = nvimgcodec.CodeStream(data)
        box = draw(stream.width, stream.height, seed)
        region = nvimgcodec.Region(box.top, box.left, box.bottom, box.right)
        image = own.decoder.decode(stream.get_sub_code_stream(region=region), params=as_stored)
        resize(np.asarray(image.cpu()), out)

    return crop


class Region(ctypes.Structure):
    """tjregion of turbojpeg.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


def turbojpeg_torch(library: Path) -> Crop:
    """Only the crop is decoded, through TurboJPEG 3's cropping region, then torch."""
    if not library.is_file():
        raise ImportError("no libturbojpeg is named by --turbojpeg")
    jpeg = ctypes.CDLL(str(library))
    size, handle = ctypes.c_size_t, ctypes.c_void_p
    jpeg.tj3Init.restype = handle
    jpeg.tj3Get.argtypes = [handle, ctypes.c_int]
    jpeg.tj3DecompressHeader.argtypes = [handle, ctypes.c_char_p, size]
    jpeg.tj3SetCroppingRegion.argtypes = [handle, Region]
    jpeg.tj3Decompress8.argtypes = [handle, ctypes.c_char_p, size, handle, ctypes.c_int, ctypes.c_int]
    subsampling, width, height, rgb = 4, 5, 6, 0  # TJPARAM_SUBSAMP, _JPEGWIDTH, _JPEGHEIGHT; TJPF_RGB
    block_widths = (8, 16, 16, 8, 8, 32, 8)  # of TJSAMP_444, 422, 420, GRAY, 440, 411, 441
    own = threading.local()

    def crop(data: bytes, seed: int, out: Pixels) -> None:
        if not hasattr(own, "handle"):
            own.handle = jpeg.tj3Init(1)
        jpeg.tj3SetCroppingRegion(own.handle, Region(0, 0, 0, 0))
        bad = jpeg.tj3DecompressHeader(own.handle, data, len(data))
        whole_width = jpeg.tj3Get(own.handle, width)
        box = draw(whole_width, jpeg.tj3Get(own.handle, height), seed)
        block = block_widths[jpeg.tj3Get(own.handle, subsampling)]
        # Columns around the crop, so that colours at its edges are upsampled as those of the whole image.
        left, right = max(0, (box.left - 2) // block * block), min(whole_width, box.right + block)
        bad |= jpeg.tj3SetCroppingRegion(own.handle, Region(left, box.top, right - left, box.bottom - box.top))
        pixels = np.empty((box.bottom - box.top, right - left, 3), np.uint8)
        bad |= jpeg.tj3Decompress8(own.handle, data, len(data), pixels.ctypes.data, 0, rgb)
        if bad:
            raise ValueError("TurboJPEG cannot decode an image")
        resize(pixels[:, box.left - left : box.right - left], out)

    return crop


def decode_alone() -> Crop:
    """The whole image and nothing else: what is left if a crop were free."""

    def crop(data: bytes, _seed: int, _out: Pixels) -> None:
        simplejpeg.decode_jpeg(data)

    return crop


REFERENCE = "Pillow (reference)"
CUT_REFERENCE = "Pillow, crop cut out first"
OURS = "vitscale: simplejpeg down to the crop's lower edge + torch"
NO_PIXELS = "simplejpeg, whole image, not resized"


def candidates(turbojpeg: Path) -> dict[str, Callable[[], Crop]]:
    """What is compared. Building one raises ImportError where it is not installed."""
    return {
        REFERENCE: pillow,
        CUT_REFERENCE: pillow_cut,
        "Pillow, draft (scaled by 1/2, 1/4, 1/8)": pillow_draft,
        "simplejpeg + Pillow": simplejpeg_pillow,
        "simplejpeg + torch": simplejpeg_torch,
        "simplejpeg, scaled by 1/2, 1/4, 1/8 + torch": simplejpeg_scaled,
        OURS: ours,
        "simplejpeg + OpenCV, not antialiased": simplejpeg_cv2,
        "OpenCV, areas": only_cv2,
        "imagecodecs + torch": imagecodecs_torch,
        "kornia-rs": kornia,
        "libvips": vips,
        "nvImageCodec on the CPU, region + torch": nvimgcodec_torch,
        "TurboJPEG 3, region + torch": lambda: turbojpeg_torch(turbojpeg),
        NO_PIXELS: decode_alone,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="folder or tar of JPEGs; photographs are made if omitted")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1000, help="at most so many images, evenly spaced")
    parser.add_argument("--minutes", type=float, default=5, help="wait so long for a machine that is left alone")
    parser.add_argument("--enlarge", type=int, default=1, help="enlarge the images so many times beforehand")
    parser.add_argument("--turbojpeg", type=Path, default=Path(), help="a libturbojpeg of version 3")
    arguments = parser.parse_args()
    images = list(read_jpegs(arguments.source) if arguments.source else photographs(arguments.images))
    if not images:
        parser.error(f"{arguments.source}: no JPEG of three channels in it")
    images = images[:: -(-len(images) // arguments.images)]
    if arguments.enlarge > 1:
        images = [enlarged(data, arguments.enlarge) for data in images]
    torch.set_num_threads(1)
    print_versions()
    print(f"{len(images)} JPEGs, crops of {arguments.image_size} px, {REPEATS} repeats, one and {THREADS} threads\n")
    contestants, absent = {}, []
    for name, build in candidates(arguments.turbojpeg).items():
        try:
            contestants[name] = build()
        except (ImportError, OSError) as error:
            absent.append(f"- {name}: not installed ({error})")
    size = arguments.image_size
    differences = compare(contestants, images, size)
    print_table(measure(contestants, images, size, arguments.minutes), differences)
    print("\n" + "\n".join(absent))


def read_jpegs(source: Path) -> Iterator[bytes]:
    """Three-channel JPEGs of a folder or tar, by name. The others would be another matter for each decoder."""
    if source.is_dir():
        files = ((path.name, path.read_bytes()) for path in sorted(source.rglob("*")) if path.is_file())
        yield from (data for name, data in files if is_rgb_jpeg(name, data))
        return
    with tarfile.open(source) as tar:
        for member in sorted(tar, key=lambda member: member.name):
            file = tar.extractfile(member)
            if file and is_rgb_jpeg(member.name, data := file.read()):
                yield data


def is_rgb_jpeg(name: str, data: bytes) -> bool:
    """Whether a file is measured."""
    return name.lower().endswith((".jpg", ".jpeg")) and Image.open(io.BytesIO(data)).mode == "RGB"


def enlarged(data: bytes, times: int) -> bytes:
    """An image of more pixels, with grain: without it they would be cheaper to decode than those of a camera."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 3, (image.height, image.width, 3))
    return encode(np.asarray(image) + grain)


def encode(picture: NDArray[np.float64]) -> bytes:
    """JPEG of a picture, [H, W, 3]."""
    encoded = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def photographs(count: int) -> Iterator[bytes]:
    """JPEGs of 500 x 375 pixels with smooth shapes and grain, about the weight of ImageNet's."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        yield encode(np.asarray(shapes) + rng.normal(0, 12, (375, 500, 3)))


class Sample(NamedTuple):
    """One measurement that no other process disturbed."""

    images_per_s: float
    cpu_s_per_image: float


Samples = dict[tuple[str, int], list[Sample]]
"""By contestant and number of threads."""


def measure(contestants: dict[str, Crop], images: list[bytes], size: int, minutes: float) -> Samples:
    """Interleave the contestants; repeat what fell into a busy moment of the machine, while there is time."""

    def crop_all(crop: Crop) -> None:
        out = np.empty((size, size, 3), np.uint8)
        for seed, data in enumerate(images):
            crop(data, seed, out)

    samples: Samples = {(name, threads): [] for name in contestants for threads in (1, THREADS)}
    end = time.perf_counter() + 60 * minutes
    with ThreadPoolExecutor(THREADS) as pool:
        while time.perf_counter() < end and any(len(found) < REPEATS for found in samples.values()):
            for (name, threads), found in samples.items():
                if len(found) < REPEATS:
                    others, cpu, start = busy_s(), time.process_time(), time.perf_counter()
                    list(pool.map(crop_all, [contestants[name]] * threads))
                    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
                    if busy_s() - others - cpu < DISTURBED * elapsed + CLOCK_TICK_S:
                        found.append(Sample(threads * len(images) / elapsed, cpu / (threads * len(images))))
    return samples


def busy_s() -> float:
    """CPU seconds that this machine has spent on anything."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0))


Difference = tuple[int, float, float, int, float]
"""Largest and mean difference from the reference and PSNR in dB; largest and PSNR from the cut-out reference."""


def compare(contestants: dict[str, Crop], images: list[bytes], size: int) -> dict[str, Difference]:
    """How far the pixels of all crops are from Pillow's."""

    def pixels(name: str) -> NDArray[np.int16]:
        out = np.empty((len(images), size, size, 3), np.uint8)
        for seed, data in enumerate(images):
            contestants[name](data, seed, out[seed])
        return out.astype(np.int16)

    whole, cut_out = pixels(REFERENCE), pixels(CUT_REFERENCE)
    differences = {}
    for name in contestants:
        if name != NO_PIXELS:
            found = pixels(name)
            gap, other_gap = np.abs(found - whole), np.abs(found - cut_out)
            differences[name] = (int(gap.max()), float(gap.mean()), psnr(gap), int(other_gap.max()), psnr(other_gap))
    return differences


def psnr(gap: NDArray[np.int16]) -> float:
    """Peak signal-to-noise ratio over all pixels, in dB."""
    error = float(np.square(gap, dtype=np.int32).mean(dtype=np.float64))
    return 10 * np.log10(255**2 / error) if error else float("inf")


def print_versions() -> None:
    """What is measured."""
    versions = []
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"{', '.join(versions)}, Python {platform.python_version()}, {platform.machine()}")


def print_table(samples: Samples, differences: dict[str, Difference]) -> None:
    """One row per contestant, of medians."""

    def median(name: str, threads: int, what: int) -> float:
        return statistics.median([sample[what] for sample in samples[name, threads]] or [float("nan")])

    print(
        f"| what | CPU per image | speed-up | images/s, 1 thread | {THREADS} threads | gain | "
        "from reference: max | mean | PSNR | from cut-out: max | PSNR |"
    )
    print("|---" * 11 + "|")
    for name in dict.fromkeys(name for name, _ in samples):
        one, every, cpu = median(name, 1, 0), median(name, THREADS, 0), median(name, 1, 1)
        row = f"| {name} | {1e6 * cpu:.0f} us | {median(REFERENCE, 1, 1) / cpu:.2f} | {one:.0f} | {every:.0f} |"
        row += f" {every / one:.2f} |"
        if name in differences:
            most, mean, noise, most_cut, noise_cut = differences[name]
            row += f" {most} | {mean:.3f} | {noise:.1f} dB | {most_cut} | {noise_cut:.1f} dB |"
        else:
            row += " | | | | |"
        print(row)
    fewest = min(map(len, samples.values()))
    print(f"\nMedians of {fewest} to {REPEATS} measurements that no other process disturbed.")


if __name__ == "__main__":
    main()
