"""The same images as Parquet and tar files, as other programs write them."""

import io
import json
import tarfile

import numpy as np
import pytest


def content(source, index):
    where = source.open(index)
    return where.getvalue() if isinstance(where, io.BytesIO) else where.read_bytes()


def write_shards(folder, source, *, split="train", shards=3, names=None, rows=7, **columns):
    """Write a source's files as Hugging Face does: numbered shards, class names in the schema's metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    features = {"label": {"names": names or source.classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {} if names == [] else {"huggingface": json.dumps({"info": {"features": features}})}
    for number, part in enumerate(np.array_split(np.arange(len(source)), shards)):
        made = {"image": [{"bytes": source.path(i).read_bytes(), "path": source.files[i]} for i in part],
                "label": pyarrow.array(source.labels[part])} | columns
        table = pyarrow.table({k: v for k, v in made.items() if v is not None}).replace_schema_metadata(metadata)
        parquet.write_table(table, folder / f"{split}-{number:05d}-of-{shards:05d}.parquet", row_group_size=rows)
    return folder


def write_tars(folder, source, labels, *, tars=2):
    """Write a source's files as WebDataset does: key.jpg and key.cls, and JSON that nobody needs."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(source)), tars)):
        with tarfile.open(folder / f"train-{number:04d}.tar", "w") as tar:
            for i in part:
                for name, content in ((f"{i:05d}.jpg", source.path(i).read_bytes()), (f"{i:05d}.json", b"{}"),
                                      (f"{i:05d}.cls", labels(i))):
                    if content is not None:
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return folder


def write_tar(path, *members):
    """Write a tar file of (name, content) pairs; content may be a link's type and target."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path.parent
