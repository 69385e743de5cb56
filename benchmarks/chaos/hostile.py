"""Files that a stranger made: each is refused in one line, runs nothing, and takes no more than ``BOUND`` of memory.

Bound and acts are measured in a fork whose address space is limited and whose audit hook notes what reading has no need
of: processes, sockets, links, removals.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.chaos.case import Case, Fault, Place, said_no
from mutor_img.checkpoints.folder import FORMAT, read_tensors
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.loading import load_run
from mutor_img.common.config import load_config
from mutor_img.common.files import file_hash
from mutor_img.common.images import read_image
from mutor_img.data.store import Codes
from mutor_img.metrics.digits import load_digits
from mutor_img.metrics.image_sets import read_all
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.samples import open_samples
from mutor_img.pretraining.config import GeneratorConfig
from tokenizer.images.layouts import open_images
from tokenizer.images.source import read_class_list
from tokenizer.images.webdataset import list_tars
from tokenizer.loading import load_tokenizer

BOUND = 256 * 2**20  # bytes of address space beyond what the process has: reading a whole image needs some of it
_NO_MEMORY = re.compile(r"MemoryError|allocate")  # how a reader says that it ran into the limit
HUGE = 2**40
_SAMPLED = {"layers": 2, "heads": 2, "dim": 32, "grid": [4, 4], "vocabulary": 64, "classes": 3}


def read(kind: str, path: str) -> str:
    """Read a file as the command that takes it does; runs in a fork. Returns what there is to say of it."""
    found = READERS[kind](Path(path))
    return type(found).__name__


READERS: dict[str, Callable[[Path], object]] = {
    "pt": read_pt,
    "generator": load_run,
    "tokenizer": load_tokenizer,
    "tensors": lambda path: read_tensors(path, "model"),
    "samples": lambda path: read_all(open_samples(path)),
    "reference": open_reference,
    "config": lambda path: load_config(GeneratorConfig, path),
    "codes": lambda path: Codes(path).verify(),
    "image": read_image,
    "tar": lambda path: list_tars([path / "shard.tar"], ["a", "b"]).read(0, "RGB"),
    "classes": read_class_list,
    "labels": lambda path: open_images(path.parent, labels=path),
    "classifier": load_digits,
}


class _Runs:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def _saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _npy(descr: str, shape: tuple[int, ...], data: bytes = b"", header: bytes | None = None) -> bytes:
    text = header or f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text + data


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _zeros(members: dict[str, tuple[bytes, int]]) -> bytes:
    """Return a zip of members that each begin with some bytes and go on with many zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (begin, zeros) in members.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(begin)
                for _ in range(zeros // 2**24):
                    file.write(bytes(2**24))
    return buffer.getvalue()


def _png(width: int, height: int, bits: int = 8, colour: int = 2, *, data: bytes = b"", more: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg2000() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG2000")
    return buffer.getvalue()


def _text_bomb() -> bytes:
    content = b"Comment\0\0" + zlib.compress(bytes(2**29), 1)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def _tiff(width: int, height: int, count: int = 1) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, count, 8), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
            + bytes(4) + bytes(100))


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _member(name: str, content: bytes = b"", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def _sparse(name: str, real: int) -> bytes:
    """Return a tar whose member says in GNU's old sparse header that it is ``real`` bytes long, all of them a hole."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:482] = bytes(96)
    header[482] = 0
    header[483:495] = (b"\x80" + real.to_bytes(11, "big"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def _codes(folder: Path, codes: bytes, labels: bytes, **changes) -> None:
    folder.mkdir()
    (folder / "codes.npy").write_bytes(codes)
    (folder / "labels.npy").write_bytes(labels)
    (folder / "codes.json").write_text(json.dumps({
        "format": "mutor_img codes 1", "block": 4096, "grid": [4, 4], "vocabulary": 64, "class_names": ["a"],
        "views": ["plain"], "crop": "center", "image_size": 16, "tokenizer": "t", "tokenizer_hash": "0",
        "checksums": ["0"], "images_hash": "", **changes}))


def _checkpoint(folder: Path, weights: bytes, meta: dict | str | None = None, **changes) -> None:
    """Write a checkpoint folder whose hashes are right, as a stranger who means harm would."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    files = {"model.safetensors": {"bytes": len(weights), "sha256": file_hash(folder / "model.safetensors")}}
    about = {"format": FORMAT, "step": 1, "kind": "generator", "model": _SAMPLED, "files": files, **changes}
    (folder / "checkpoint.json").write_text(meta if isinstance(meta, str) else json.dumps(about))


def _stretched(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


def _laughs(levels: int) -> str:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


_WEIGHT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_TOKENIZER = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 8, "code_dim": 4,
              "vocabulary": 64, "groups": 4, "attention": False, "image_channels": 1}
_ONE_IMAGE = _npy("|u1", (1, 8, 8, 3), bytes(192))
_NAMES = {"tok_embeddings.weight": (2**20, 2**16), "cls_embedding.embedding_table.weight": (2**20, 2**16),
          "output.weight": (2**20, 2**16), "layers.0.attention.wo.weight": (2, 2)}

# name: what reads it, the file's name, and its bytes or what writes it
FILES: dict[str, tuple[str, str, bytes | str | Callable]] = {
    **{f"pickled code in a .pt, {form}": ("pt", "c2i.pt", make) for form, make in {
        "zip": lambda _: _saved({"model": _Runs()}),
        "old layout": lambda _: _saved({"model": _Runs()}, _use_new_zipfile_serialization=False),
        "bare pickle": lambda _: pickle.dumps(_Runs())}.items()},
    "a .pt of tensors stretched over one number": (
        "generator", "c2i.pt", lambda _: _saved({name: _stretched(*shape) for name, shape in _NAMES.items()})),
    "a .pt whose thousand tensors share one memory": (
        "generator", "c2i.pt", lambda _: _saved(
            {f"layers.{i}.w": w for w in [torch.zeros(2**16)] for i in range(1000)})),
    "a .pt whose pickle is 512 MiB of zeros, compressed": (
        "pt", "c2i.pt", lambda _: _zeros({"archive/data.pkl": (b"", 2**29), "archive/version": (b"3\n", 0)})),
    "safetensors: a header of 2^62 bytes": (
        "tensors", "c", lambda f: _checkpoint(f, _safetensors({}, length=2**62))),
    "safetensors: a header of all the file": (
        "tensors", "c", lambda f: _checkpoint(f, _safetensors(b" " * 200, length=200))),
    "safetensors: tensors that overlap": ("tensors", "c", lambda f: _checkpoint(f, _safetensors(
        {"a": _WEIGHT, "b": {**_WEIGHT, "data_offsets": [4, 12]}}, bytes(12)))),
    "safetensors: a shape of 2^40": (
        "tensors", "c", lambda f: _checkpoint(f, _safetensors({"a": {**_WEIGHT, "shape": [HUGE]}}, bytes(8)))),
    "safetensors: a shape that overflows": (
        "tensors", "c", lambda f: _checkpoint(f, _safetensors({"a": {**_WEIGHT, "shape": [2**62, 16]}}, bytes(8)))),
    "safetensors: 100 000 lists in each other": (
        "tensors", "c", lambda f: _checkpoint(f, _safetensors(b"[" * 10**5))),
    **{f"safetensors: rows that are {rows[:20]}": ("tensors", "c", lambda f, rows=rows: _checkpoint(f, _safetensors(
        {"__metadata__": {"rows": rows}, "a": _WEIGHT}, bytes(8)))) for rows in (
            "[" * 10**5, "no JSON", "[]", '{"a": 3}', '{"a": ["x", 2]}', '{"a": [0, 1099511627776]}',
            '{"a": [-5, 2]}', '{"a": [1e400, 2]}')},
    "safetensors: rows of one number": ("tensors", "c", lambda f: _checkpoint(f, _safetensors(
        {"__metadata__": {"rows": '{"a": [0, 2]}'}, "a": {**_WEIGHT, "shape": [], "data_offsets": [0, 4]}}, bytes(4)))),
    **{f"checkpoint.json: {name}": ("generator", "c", lambda f, meta=meta: _checkpoint(
        f, _safetensors({"a": _WEIGHT}, bytes(8)), meta if isinstance(meta, str) else None,
        **({} if isinstance(meta, str) else meta))) for name, meta in {
            "100 000 lists in each other": "[" * 10**5, "a number of 10 000 digits": '{"format": ' + "9" * 10**4 + "}",
            "no object": "3", "files that are none": {"files": 3}, "a file without a hash": {"files": {"a": {}}},
            "a billion layers": {"model": {**_SAMPLED, "layers": 10**9}},
            "a width of 2^40": {"model": {**_SAMPLED, "dim": HUGE}},
            "a vocabulary of 2^40": {"model": {**_SAMPLED, "vocabulary": HUGE}},
            "a grid of 2^20 squared": {"model": {**_SAMPLED, "grid": [2**20, 2**20]}},
            "a width that is text": {"model": {**_SAMPLED, "dim": "x" * 100}},
            "a width of no heads": {"model": {**_SAMPLED, "heads": 0}},
            "no numbers at all": {"model": dict.fromkeys(_SAMPLED)},
            "a step that is text": {"step": "../../x"},
            "files outside": {"files": {"../../model.safetensors": {"bytes": 1, "sha256": ""}}}}.items()},
    **{f"tokenizer's checkpoint.json: {name}": ("tokenizer", "c", lambda f, change=change: _checkpoint(
        f, _safetensors({"a": _WEIGHT}, bytes(8)), kind="tokenizer", image_size=16, model={**_TOKENIZER, **change}))
       for name, change in {
           "2^40 codes": {"vocabulary": HUGE}, "2^40 channels": {"channels": HUGE},
           "a billion blocks": {"blocks": 10**9}, "a million levels": {"multipliers": [1] * 10**6},
           "groups of 0": {"groups": 0}, "channels of -1": {"channels": -1},
           "text": {"channels": "x"}}.items()},
    "npz: names that lead outside": (
        "samples", "x.npz", lambda _: _zip({"../../etc/arr_0.npy": _ONE_IMAGE, "/tmp/ran.npy": _ONE_IMAGE})),
    "npz: images of Python objects": (
        "samples", "x.npz", lambda _: _zip({"arr_0.npy": _npy("|O", (1,), pickle.dumps([_Runs()]))})),
    "npz: labels of Python objects": ("samples", "x.npz", lambda _: _zip(
        {"arr_0.npy": _ONE_IMAGE, "arr_1.npy": _npy("|O", (1,), pickle.dumps([_Runs()]))})),
    "npz: 2^40 images": ("samples", "x.npz", lambda _: _zip({"arr_0.npy": _npy("|u1", (HUGE, 8, 8, 3), bytes(192))})),
    "npz: images of 2^20 squared": (
        "samples", "x.npz", lambda _: _zip({"arr_0.npy": _npy("|u1", (1, 2**20, 2**20, 3), bytes(192))})),
    "npz: 2^40 labels": (
        "samples", "x.npz", lambda _: _zip({"arr_0.npy": _ONE_IMAGE, "arr_1.npy": _npy("<i8", (HUGE,), bytes(8))})),
    "npz: 512 MiB of labels, compressed": ("samples", "x.npz", lambda _: _zeros(
        {"arr_0.npy": (_ONE_IMAGE, 0), "arr_1.npy": (_npy("<i8", (2**26,)), 2**29)})),
    "npz: one image of 768 MiB, compressed": (
        "samples", "x.npz", lambda _: _zeros({"arr_0.npy": (_npy("|u1", (1, 2**14, 2**14, 3)), 3 * 2**28)})),
    "npz: a header of 512 MiB, compressed": (
        "samples", "x.npz", lambda _: _zeros({"arr_0.npy": (b"\x93NUMPY\2\0" + struct.pack("<I", 2**29), 2**29)})),
    "npz: a header of 4000 brackets": (
        "samples", "x.npz", lambda _: _zip({"arr_0.npy": _npy("", (), header=b"(" * 4000 + b"\n")})),
    "npz: 20 000 arrays": ("samples", "x.npz", lambda _: _zip({f"a{i}" * 5: b"" for i in range(20_000)})),
    "reference: a covariance of 2^20 squared": ("reference", "r.npz", lambda _: _zip(
        {"mu.npy": _npy("<f8", (2**20,), bytes(2**23)), "sigma.npy": _npy("<f8", (2**20, 2**20), bytes(8))})),
    **{f"reference: a description of {name}": ("reference", "r.npz", lambda _, text=text: _zip(
        {"about.npy": _npy("|u1", (len(text),), text)})) for name, text in {
            "100 000 lists": b"[" * 10**5, "no JSON": b"\xff\xfe", "text": b'"x"',
            "other kinds": b'{"role": [], "name": 3, "count": {}, "features": 1, "weights_sha256": 0}',
            "a size that is a number": b'{"role": "generation", "name": "", "count": 1, "features": "", '
                                       b'"weights_sha256": "", "image_size": 3}'}.items()},
    **{f"config: {name}": ("config", "c.yaml", text) for name, text in {
        "a tag that runs code": "train: !!python/object/apply:os.system ['touch ran']",
        "a tag that makes an object": "!!python/object/new:os.system [touch ran]",
        "lists 100 000 deep": "[" * 10**5, "mappings 5000 deep": "{a: " * 5000,
        "a billion laughs": _laughs(10), "ten to the eighteenth laughs": _laughs(18),
        "an alias of itself": "train: &a [*a]", "a number of 10 000 digits": f"seed: {'9' * 10**4}",
        "a number of 10^400": "seed: 1e400", "bytes that are no text": "seed: \0",
        "an interpolation of the environment": "run_dir: ${oc.env:HOME}/${oc.decode:x}"}.items()},
    **{f"codes: {name}": ("codes", "codes", make) for name, make in {
        "2^40 images": lambda f: _codes(f, _npy("<u2", (HUGE, 1, 16)), _npy("<i8", (HUGE,))),
        "Python objects": lambda f: _codes(f, _npy("|O", (1, 1, 16), pickle.dumps(_Runs())), _npy("<i8", (1,))),
        "a grid of 2^40": lambda f: _codes(f, _npy("<u2", (1, 1, 16), bytes(32)), _npy("<i8", (1,), bytes(8)),
                                           grid=[HUGE, 1]),
        "a grid of text": lambda f: _codes(f, _npy("<u2", (1, 1, 16), bytes(32)), _npy("<i8", (1,), bytes(8)),
                                           grid="x"),
        "views that are a number": lambda f: _codes(f, _npy("<u2", (1, 1, 16), bytes(32)),
                                                    _npy("<i8", (1,), bytes(8)), views=3),
        "checksums that are a number": lambda f: _codes(f, _npy("<u2", (1, 1, 16), bytes(32)),
                                                        _npy("<i8", (1,), bytes(8)), checksums=3),
    }.items()},
    "image: 2^31 pixels of PNG": ("image", "x.png", lambda _: _png(2**16, 2**15, data=zlib.compress(bytes(100)))),
    "image: 2^31 x 1 pixels": ("image", "x.png", lambda _: _png(2**31 - 1, 1, data=zlib.compress(bytes(100)))),
    "image: 10 000 pixels squared, all black": (
        "image", "x.png", lambda _: _png(10_000, 10_000, 8, 6, data=zlib.compress(bytes(10_000 * 40_001), 1))),
    "image: text of 512 MiB, compressed": ("image", "x.png", lambda _: _png(
        8, 8, data=zlib.compress(bytes(200)), more=_text_bomb())),
    "image: 2^31 pixels of TIFF": ("image", "x.tif", lambda _: _tiff(2**16, 2**15)),
    "image: 2^32 - 1 numbers in a tag": ("image", "x.tif", lambda _: _tiff(8, 8, 2**32 - 1)),
    "image: 2^31 pixels of PPM": ("image", "x.ppm", b"P6 65536 32768 255\n" + bytes(99)),
    "image: 2^31 pixels of BMP": ("image", "x.bmp", b"BM" + struct.pack(
        "<IIIIiiHHIIIIII", 200, 0, 54, 40, 2**16, 2**15, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99)),
    "image: a part of 4 GiB in a JPEG 2000": ("image", "x.jp2", lambda _: _jpeg2000().replace(
        b"\0\0\0\x2djp2h", b"\xff\0\0\x2djp2h")),
    "image: PostScript": ("image", "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file\n"),
    **{f"tar: {name}": ("tar", "t", make) for name, make in {
        "a link outside": lambda f: _write_tar(f, _tar(_member("a.jpg", type=tarfile.SYMTYPE,
                                                               linkname="/etc/passwd"), _member("a.cls", b"0"))),
        "a device": lambda f: _write_tar(f, _tar(_member("a.jpg", type=tarfile.CHRTYPE), _member("a.cls", b"0"))),
        "a label that is a hole of 2^40 bytes": lambda f: _write_tar(f, _sparse("a.cls", HUGE)),
        "an image that is a hole of 2^40 bytes": lambda f: _write_tar(f, _sparse("a.jpg", HUGE)
                                                                      + _tar(_member("a.cls", b"0"))),
        "a label of 10 000 digits": lambda f: _write_tar(f, _tar(_member("a.cls", b"9" * 10**4),
                                                                 _member("a.jpg", b"x"))),
        "a label of 100 MiB": lambda f: _write_tar(f, _tar(_member("a.cls", b" " * (100 * 2**20)),
                                                           _member("a.jpg", b"x"))),
        "a name that leads outside": lambda f: _write_tar(f, _tar(_member("../../a.jpg", b"x"),
                                                                  _member("../../a.cls", b"0"))),
    }.items()},
    "classes: bytes that are no text": ("classes", "classes.txt", bytes(range(128, 256)) * 100),
    "labels: one line of 10 MB": ("labels", "labels.csv", '"' + "x," * (5 * 10**6)),
    "labels: a field without an end": ("labels", "labels.csv", 'a.png,"' + "x" * 200_000),
    **{f"classifier.json: {name}": ("classifier", "k", lambda f, about=about: _classifier(f, about))
       for name, about in {"lists 100 000 deep": "[" * 10**5, "text": '"x"',
                           "2^40 channels": {"channels": HUGE}, "a size of 2^40": {"image_size": HUGE},
                           "a size that is text": {"image_size": "x"}, "names that are a number": {"class_names": 3},
                           "2^24 classes": {"class_names": [""] * 2**20}}.items()},
}
# These are read all the same: what they hold is never followed.
HARMLESS = {"config: an interpolation of the environment", "image: 2^32 - 1 numbers in a tag"}


def _write_tar(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "shard.tar").write_bytes(content)


def _classifier(folder: Path, about: dict | str) -> None:
    folder.mkdir()
    weights = _safetensors({"a": _WEIGHT}, bytes(8))
    (folder / "model.safetensors").write_bytes(weights)
    whole = {"class_names": ["a", "b"], "image_size": 32, "channels": 1,
             "weights_sha256": file_hash(folder / "model.safetensors")}
    (folder / "classifier.json").write_text(about if isinstance(about, str) else json.dumps({**whole, **about}))


def cases(place: Place) -> list[Case]:
    """Return a case for each file."""
    return [Case(name, lambda name=name: _try(name, place)) for name in FILES]


def _try(name: str, place: Place) -> str:
    kind, file, content = FILES[name]
    folder = place.folder / str(list(FILES).index(name))
    folder.mkdir()
    path = folder / file
    if kind == "labels":
        np.save(folder / "a.npy", np.zeros(1))
        (folder / "a.png").write_bytes(_png(8, 8))
    _put(path, content)
    answer = place.forks.run("benchmarks.chaos.hostile:read", kind, str(path), memory=BOUND)
    if answer["acts"] or list(Path.cwd().glob("ran")):
        raise Fault(f"it did something: {', '.join(answer['acts']) or 'ran'}")
    if name in HARMLESS and answer["outcome"] == "returned":
        return "without effect"
    message = said_no(answer, folder)
    if _NO_MEMORY.search(message):
        raise Fault(f"wanted more than {BOUND // 2**20} MiB: {message}")
    return f"refused, {answer['memory'] / 2**20:.0f} MiB"


def _put(path: Path, content: bytes | str | Callable) -> None:
    content = content(path) if callable(content) else content
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
